"""deployments/: what is there can be deployed, and its README works from nothing to a released batch."""

import importlib
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from prefect import get_client
from prefect.client.schemas.actions import WorkPoolCreate

from flows.deploy import read_config
from sanitize.ledger import Ledger

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]
FLOWS = {"clean", "ingest", "condense", "train", "repair", "redteam"}


def test_all_that_was_promised_is_deployed() -> None:
    assert {deployment["flow_name"] for deployment in DEPLOYMENTS} == FLOWS


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda d: d["flow_name"])
def test_entrypoint_imports_and_takes_its_parameters(deployment: dict[str, Any]) -> None:
    module, _, name = deployment["entrypoint"].rpartition(".")
    flow = getattr(importlib.import_module(module), name)
    assert flow.name == deployment["flow_name"]
    (step,) = deployment["build"]
    given = step["flows.deploy.read_config"]
    assert deployment["parameters"]["config"] == f"{{{{ {given['id']}.settings }}}}"
    settings = read_config(str(ROOT / given["path"]))["settings"]
    kind = get_type_hints(flow.fn)["config"]
    assert kind.model_validate(settings)
    # A schedule that wrote into one folder again and again would find other shards' results there.
    assert deployment["flow_name"] == "ingest" or "{scheduled}" in deployment["parameters"]["out"]


@pytest.mark.parametrize("name", ["docker", "kubernetes"])
def test_job_template_fills_what_it_asks_for_and_requests_a_gpu(name: str) -> None:
    text = (ROOT / "deployments" / "pools" / f"{name}.json").read_text()
    template = json.loads(text)
    variables = template["variables"]["properties"]
    assert set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"]))) == variables.keys()
    assert variables["gpus"]["default"] == 1


@pytest.mark.prefect
@pytest.mark.parametrize("name", ["docker", "kubernetes"])
def test_server_takes_the_job_template(prefect_server: str, name: str) -> None:
    template = json.loads((ROOT / "deployments" / "pools" / f"{name}.json").read_text())
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=f"gpu-{name}", type=name, base_job_template=template))
        assert client.read_work_pool(f"gpu-{name}").base_job_template == template


def commands(text: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines()]


def test_readme_is_the_demonstration() -> None:
    script = {line.strip() for line in (ROOT / "examples" / "ingest_demo.sh").read_text().splitlines()}
    first, *rest = commands((ROOT / "deployments" / "README.md").read_text())
    assert first == "export SANITIZE_HOME=$PWD/runs/ingest_demo PORT=4200"  # its defaults
    assert len(rest) >= 10
    assert [line for line in rest if line not in script] == []


@pytest.mark.slow
@pytest.mark.prefect
@pytest.mark.timeout(1200)  # two minutes on a machine with nothing else to do
def test_demonstration_from_nothing_to_a_released_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"PORT": str(port), "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    demo = subprocess.run(
        [ROOT / "examples" / "ingest_demo.sh", tmp_path],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = (tmp_path / "worker.log").read_text() if (tmp_path / "worker.log").exists() else "no worker"
    assert demo.returncode == 0, demo.stdout[-4000:] + log[-4000:]
    store = tmp_path / "runs" / "store"
    accepted, held = Ledger(str(store)).read().batches.values()
    assert (accepted.status, accepted.is_released) == ("accepted", True)
    assert (held.status, held.outcome, held.is_released) == ("approved", "held", True)
    assert held.commit is not None
    assert any("class 0" in reason for reason in held.commit.reasons)  # where the poison went
    for batch in (accepted, held):
        page = store / "batches" / batch.claim.batch / "90-report" / "index.html"
        assert "<html" in page.read_text()
    fed = {shard["batch"] for shard in json.loads((store / "feed.json").read_text())["shards"]}
    assert {accepted.claim.batch, held.claim.batch} <= fed
    assert "poisoned samples: 59; in the feed: 0" in demo.stdout
    assert not re.search(r"\bTraceback\b", log), log[-4000:]
    with closing(sqlite3.connect(tmp_path / ".prefect" / "prefect.db")) as server:
        # The library's log is on the pages, artifacts are, and the schedule has made runs for the hours to come.
        assert one(server, "SELECT count(*) FROM log WHERE name LIKE 'sanitize.%'") > 0
        assert one(server, "SELECT count(*) FROM artifact WHERE key = 'clean-report'") == 1
        assert one(server, "SELECT count(*) FROM flow_run WHERE auto_scheduled") > 0


def one(server: sqlite3.Connection, query: str) -> int:
    return int(server.execute(query).fetchone()[0])
