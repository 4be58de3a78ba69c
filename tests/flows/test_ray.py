"""Two Ray nodes on loopback: a worker that is killed in the middle costs time, and no digest."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.clean import CleanConfig, run_clean
from tests.flows.test_clean import digests

pytest.importorskip("ray", reason="needs the extra `ray`")


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[int, str]]:
    """Process id of each node's raylet, and its name; the address of the cluster is in RAY_ADDRESS."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # listen on loopback only
    from ray.cluster_utils import Cluster

    resources = {"num_cpus": 1, "object_store_memory": 2**27, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=resources)
    try:
        nodes = {"first": cluster.head_node, "second": cluster.add_node(**resources)}
        cluster.wait_for_nodes()
        os.environ["RAY_ADDRESS"] = cluster.address
        yield {node.all_processes["raylet"][0].process.pid: name for name, node in nodes.items()}
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        cluster.shutdown()


class Killer(threading.Thread):
    """Kills the first worker of the second node that is at a stage, once one was at it on each node."""

    def __init__(self, nodes: dict[int, str], stage: str) -> None:
        super().__init__(daemon=True)
        self.nodes, self.stage = nodes, stage
        self.seen: set[tuple[str, int]] = set()
        self.killed: int | None = None
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.01):
            for pid, parent, title in processes():
                if title == f"ray::{self.stage}" and parent in self.nodes:
                    self.seen.add((self.nodes[parent], pid))
                    if self.killed is None and self.nodes[parent] == "second":
                        self.killed = pid
                        os.kill(pid, signal.SIGKILL)


def processes() -> Iterator[tuple[int, int, str]]:
    """Id, parent and title of everything that runs; Ray names a worker after the task it is at."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace")
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:  # it ended meanwhile
            continue
        yield int(folder.name), int(parent), title.strip()


@pytest.mark.prefect
def test_a_killed_worker_changes_no_digest(
    direct: Path, settings: dict[str, Any], nodes: dict[int, str], prefect_server: str, tmp_path: Path
) -> None:
    config = CleanConfig.model_validate(settings | {"n_groups": 5, "runner": {"kind": "ray", "address": "auto"}})
    killer = Killer(nodes, "embed_shards")
    killer.start()
    t = time.time()
    run_clean(config, tmp_path / "run", direct=False)
    print(time.time() - t)
    killer.done.set()
    killer.join()
    print(killer.seen, killer.killed)
    assert killer.killed is not None
    assert {name for name, _ in killer.seen} == {"first", "second"}
    assert digests(tmp_path / "run") == digests(direct)
