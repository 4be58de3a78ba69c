"""Signals and dead servers: a command ends soon, with its processes and one line, and goes on when it is run again.

Real processes. On an idle machine they end within a second or two; the limits leave room for a busy one.
"""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import yaml

from flows import server
from flows.interrupts import INTERRUPTED, _descendants

SOON = 15.0  # seconds
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a Python process as a terminal would, in a process group of its own: start("-c", code)."""
    started: list[subprocess.Popen[str]] = []
    env = {name: value for name, value in os.environ.items() if name not in ("PREFECT_API_URL", "RANK")}
    env |= {"PREFECT_HOME": str(tmp_path / "prefect"), "PYTHONPATH": str(Path(__file__).parents[2])}

    def new(*arguments: Any, **more: Any) -> subprocess.Popen[str]:
        command = [sys.executable, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        more.setdefault("preexec_fn", hear_signals)
        started.append(subprocess.Popen(command, env=env, start_new_session=True, **pipes, **more))
        return started[-1]

    yield new
    for process in started:
        for pid in [process.pid, *_descendants(process.pid)]:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def hear_signals() -> None:
    """A shell lets what it starts in the background ignore SIGINT; the tests may run there."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for_end(pids: list[int]) -> None:
    """Processes of a process that has ended: the last of them may still be at its last step."""
    deadline = time.monotonic() + SOON
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ended(process: subprocess.Popen[str], seconds: float = SOON) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; fails if it takes longer."""
    stdout, stderr = process.communicate(timeout=seconds)
    return process.returncode, stdout, stderr


def command(settings: dict[str, Any], out: Path, **changes: Any) -> list[Any]:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings | changes))
    return ["-m", "flows.cli", "clean", path, "--out", out, "--json", "--quiet"]


def digests(run: Path) -> dict[str, str]:
    return {stage["folder"]: stage["digest"] for stage in json.loads((run / "run.json").read_text())["stages"]}


# --- small processes --------------------------------------------------------------------------------------------

HANDLED = "import time, signal, subprocess, sys, hashlib\nfrom flows import interrupts\nwith interrupts.handled():\n "
READY = "print('ready', flush=True); "


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_long_computation_in_one_line(start: Start, signum: int) -> None:
    process = start("-c", f"{HANDLED}{READY}hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signum)
    assert ended(process) == (128 + signum, "", INTERRUPTED + "\n")


def test_a_training_that_begins_again_is_named(start: Start, tmp_path: Path) -> None:
    snapshots = f"Snapshots(Path({str(tmp_path / 'snapshot')!r}), 500)"
    imports = "from pathlib import Path\nfrom sanitize.snapshots import Snapshots, training\n"
    expected = {
        snapshots: "has no snapshot yet (one every 500 steps), and begins again",
        f"{snapshots} ": "goes on from its last snapshot",
        "None": "keeps no snapshots, and begins again",
    }
    for argument, after in expected.items():
        if "last snapshot" in after:
            (tmp_path / "snapshot").touch()
        process = start("-c", f"{imports}{HANDLED}with training({argument}):\n  {READY}time.sleep(60)")
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert ended(process) == (143, "", f"{INTERRUPTED}; the training in progress {after}\n")


def test_cleaning_up_is_bounded_and_a_second_signal_does_not_wait_for_it(start: Start) -> None:
    cleanup = "lambda signum: (print('cleaning', flush=True), time.sleep(60))"
    code = f"{HANDLED}with interrupts.before_end({cleanup}):\n  {READY}time.sleep(60)"
    for n_signals in (1, 2):
        process = start("-c", code)
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "cleaning\n"
        begun = time.monotonic()
        if n_signals == 2:
            process.send_signal(signal.SIGINT)
        assert ended(process) == (143, "", INTERRUPTED + "\n")
        if n_signals == 1:
            assert time.monotonic() - begun > 1  # it had its time


def test_threads_that_lose_their_server_print_nothing(start: Start) -> None:
    """As Prefect's do, which send events and logs."""
    module = "import threading\n"
    sends = "for _ in range(20):\n  child = subprocess.Popen(['sleep', '600'])\n  "
    sends += "threading.Thread(target=lambda child=child: child.wait() and print(1 / 0), daemon=True).start()\n "
    process = start("-c", f"{module}{HANDLED}{sends}{READY}time.sleep(60)")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "", INTERRUPTED + "\n")


def test_whose_handler_it_is_does_not_matter(start: Start) -> None:
    """Prefect replaces the handler of SIGTERM by one that raises while a flow begins and ends."""
    raises = "signal.signal(signal.SIGTERM, lambda *_: sys.exit('not this') or None)"
    process = start("-c", f"{HANDLED}{raises}; {READY}time.sleep(60)")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, "", INTERRUPTED + "\n")


def test_a_signal_that_was_ignored_stays_ignored(start: Start) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does

    process = start(
        "-c", f"{HANDLED}{READY}sys.stdin.readline(); print('done')", stdin=subprocess.PIPE, preexec_fn=ignore
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    process.stdin.write("\n")
    assert ended(process) == (0, "done\n", "")


def test_children_and_temporary_files_go_too(start: Start) -> None:
    child = "import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)"
    code = (
        f"{HANDLED}subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True); {READY}time.sleep(600)"
    )
    process = start("-c", code)
    folder = Path(tempfile.gettempdir()) / f"sanitize-{process.pid}-test"
    folder.mkdir()
    assert process.stdout.readline() == "ready\n"
    wait_for(lambda: len(_descendants(process.pid)) == 2, process)
    family = _descendants(process.pid)
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 130
    wait_for_end(family)
    assert not folder.exists()


def test_ctrl_c_in_a_terminal_leaves_workers_no_time_to_complain(start: Start, tmp_path: Path) -> None:
    module = tmp_path / "pool.py"
    module.write_text(
        """if __name__ == "__main__":
    import multiprocessing, time
    from concurrent.futures import ProcessPoolExecutor
    from flows import interrupts
    with interrupts.handled():
        interrupts.prepare_workers()
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            works = [pool.submit(time.sleep, 60) for _ in range(2)]
            print("ready", flush=True)
            works[0].result()
"""
    )
    process = start(module)
    assert process.stdout.readline() == "ready\n"
    wait_for(lambda: len(_descendants(process.pid)) == 3, process)  # two workers and Python's tracker
    family = _descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    assert ended(process) == (130, "", INTERRUPTED + "\n")
    wait_for_end(family)


def test_of_the_processes_of_torchrun_the_first_speaks(start: Start) -> None:
    code = f"import os; os.environ['RANK'] = '1'\n{HANDLED}{READY}time.sleep(60)"
    process = start("-c", code)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, "", "")


# --- servers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def health() -> Iterator[tuple[str, dict[str, int]]]:
    """A web server whose answer to questions for its health can be changed."""
    answer = {"status": 200}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer["status"])
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    web = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=web.serve_forever, daemon=True).start()
    yield f"http://user:secret@127.0.0.1:{web.server_port}/api", answer
    web.shutdown()
    web.server_close()


@pytest.mark.slow
def test_a_server_counts_as_dead_only_after_some_time_without_an_answer(
    health: tuple[str, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, answer = health
    monkeypatch.setattr(server, "PERIOD_SECONDS", 0.05)
    monkeypatch.setattr(server, "PATIENCE_SECONDS", 3.0)
    dead = Event()
    with server.watched(url, dead.set):
        for status in (200, 503, 404, 502, 401):  # not found and forbidden are answers
            answer["status"] = status
            assert not dead.wait(1)
        answer["status"] = 503
        assert dead.wait(60)
    dead.clear()
    with server.watched(url, dead.set):
        assert not dead.wait(1)
    assert not dead.wait(4)  # no longer watched
    assert "secret" not in server.does_not_answer(url)


@pytest.mark.slow
@pytest.mark.prefect
def test_the_temporary_server_ends_with_a_process_that_is_killed(start: Start) -> None:
    code = "from flows.server import temporary_server as t; print(t({})); print(t({}), flush=True); input()"
    process = start("-c", code, stdin=subprocess.PIPE)
    urls = [process.stdout.readline(), process.stdout.readline()]
    assert urls[0] == urls[1] != ""
    family = _descendants(process.pid)
    process.kill()
    deadline = time.monotonic() + SOON
    while any(map(is_running, family)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


# --- commands ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)  # a busy machine takes a minute for each start
def test_a_direct_run_ends_in_one_line_and_goes_on(
    settings: dict[str, Any], direct: Path, tmp_path: Path, start: Start
) -> None:
    out = tmp_path / "run"
    process = start(*command(settings, out), "--direct")
    wait_for((out / "10-embedder").exists, process)  # embeddings come next
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, "", INTERRUPTED + "\n")
    again = start(*command(settings, out), "--direct")
    code, stdout, _ = ended(again, 240)
    assert (code, json.loads(stdout)["report"]) == (0, str(out / "90-report" / "index.html"))
    assert digests(out) == digests(direct)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a busy machine takes a minute for each start
@pytest.mark.prefect
def test_ctrl_c_ends_a_flow_with_server_and_workers_and_it_goes_on(
    settings: dict[str, Any], direct: Path, tmp_path: Path, start: Start
) -> None:
    out = tmp_path / "run"
    flow = command(settings, out, runner={"kind": "processes", "workers": 2}, n_groups=2)
    process = start(*flow)
    wait_for((out / "00-index").exists, process)
    family = _descendants(process.pid)
    assert len(family) >= 3  # the server and two workers
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert ended(process) == (130, "", INTERRUPTED + "\n")
    deadline = time.monotonic() + SOON
    while any(map(is_running, family)):  # multiprocessing's tracker ends by itself
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with sqlite3.connect(tmp_path / "prefect" / "prefect.db") as database:
        assert database.execute("SELECT state_type FROM flow_run").fetchall() == [("CANCELLED",)]
    assert ended(start(*flow, "--direct"), 240)[0] == 0
    assert digests(out) == digests(direct)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a busy machine takes a minute for each start
@pytest.mark.prefect
def test_a_server_that_dies_is_said_in_one_line(settings: dict[str, Any], tmp_path: Path, start: Start) -> None:
    out = tmp_path / "run"
    process = start(*command(settings, out))
    wait_for((out / "00-index").exists, process)
    (temporary,) = _descendants(process.pid)
    os.kill(temporary, signal.SIGKILL)
    code, stdout, stderr = ended(process, 60)
    assert (code, stdout, stderr.count("\n")) == (1, "", 1)
    assert "does not answer; run the same command again to go on, or use --direct" in stderr
