"""deployments/automations.yaml on a real server: the run of a dead worker is found, and what it held is free."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import yaml

ROOT = Path(__file__).parents[2]
AUTOMATIONS = ROOT / "deployments" / "automations.yaml"


class Machine:
    """A server with a deployment of `sleeper` that is set up as those of prefect.yaml are."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.api = folder, f"http://127.0.0.1:{port}/api"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        self.environment |= {"PREFECT_HOME": str(folder / "home"), "PREFECT_API_URL": self.api, "DO_NOT_TRACK": "1"}
        self.environment |= {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PYTHONPATH": str(ROOT)}

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "prefect", "--no-prompt", *words]

    def prefect(self, *words: str) -> None:
        done = subprocess.run(
            self.command(*words), cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr

    @contextmanager
    def running(self, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        with (self.folder / f"{words[0]}.log").open("ab") as log:
            process = subprocess.Popen(
                self.command(*words), cwd=ROOT, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urlopen(Request(self.api + path, data, {"Content-Type": "application/json"}), timeout=60) as answer:
            return json.load(answer)

    def states(self) -> list[str]:
        """States of all runs, the oldest first."""
        runs = self.ask("/flow_runs/filter", {"sort": "EXPECTED_START_TIME_ASC"})
        return [run["state"]["type"] for run in sorted(runs, key=lambda run: run["created"])]


def wait(is_there: Callable[[], Any], seconds: float = 180) -> None:
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        with suppress(OSError):
            if is_there():
                return
        time.sleep(0.5)
    raise AssertionError(f"not within {seconds} s: {is_there}")


@pytest.mark.slow
@pytest.mark.prefect
@pytest.mark.timeout(900)  # a minute and a half on a machine with nothing else to do
def test_run_of_a_dead_worker_is_found_and_the_next_one_starts(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out, machine = tmp_path / "run", Machine(tmp_path, port)
    common = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["definitions"]["common"]
    sleeper = common | {
        "flow_name": "sleeper",
        "entrypoint": "tests/flows/sleeper.py:sleeper",
        "parameters": {"out": str(out), "seconds": 3600},
        "concurrency_limit": {"limit": 1, "collision_strategy": "ENQUEUE"},
    }
    pull = [{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}]
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump({"name": "x", "pull": pull, "deployments": [sleeper]}))
    worker = ("worker", "start", "--pool", "cpu-pool", "--limit", "1")
    with machine.running("server", "start", "--host", "127.0.0.1", "--port", str(port)):
        wait(lambda: machine.ask("/health"))
        machine.prefect("work-pool", "create", "cpu-pool", "--type", "process")
        machine.prefect("deploy", "--all", "--prefect-file", str(tmp_path / "prefect.yaml"))
        machine.prefect("automation", "create", "--from-file", str(AUTOMATIONS))
        names = {automation["name"] for automation in machine.ask("/automations/filter", {})}
        assert names == {"sanitize-dead-runs", "sanitize-dead-starts"}
        with machine.running(*worker) as first:
            machine.prefect("deployment", "run", "sleeper/local")
            wait((out / "pid").exists)
            machine.prefect("deployment", "run", "sleeper/local", "--param", "seconds=0")
            first.kill()
            os.kill(int((out / "pid").read_text()), signal.SIGKILL)
            killed = time.monotonic()
        with machine.running(*worker):
            wait(lambda: machine.states()[0] == "CRASHED")
            found = time.monotonic() - killed
            wait(lambda: machine.states()[1] == "COMPLETED")
            freed = time.monotonic() - killed
        print(f"crashed after {found:.0f} s, the next run done after {freed:.0f} s")
        assert found < 90  # 45 to 50 s, on a machine that has time for it
