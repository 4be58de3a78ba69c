"""Two Ray nodes on loopback: a worker that is killed in the middle of a group costs time, and no digest."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.start import start
from sanitize.jobs.clean import CleanConfig
from tests.flows.test_clean import digests


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[int, str]]:
    """{process id of a node's raylet: name of the node}; RAY_ADDRESS leads to them."""
    set_before = pytest.MonkeyPatch()
    set_before.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # read by the import: listen on loopback only
    set_before.setenv("RAY_worker_niceness", "0")  # 15 otherwise: on a busy machine that is hardly ever
    from ray.cluster_utils import Cluster

    resources = {"num_cpus": 1, "object_store_memory": 2**27, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=resources)
    try:
        nodes = {"first": cluster.head_node, "second": cluster.add_node(**resources)}
        cluster.wait_for_nodes()
        set_before.setenv("RAY_ADDRESS", cluster.address)
        yield {node.all_processes["raylet"][0].process.pid: name for name, node in nodes.items()}
    finally:
        set_before.undo()
        cluster.shutdown()


class Killer(threading.Thread):
    """Kills the worker of the second node in the middle of its first group of a stage."""

    def __init__(self, nodes: dict[int, str], stage: str) -> None:
        super().__init__(daemon=True)
        self._nodes, self._title = nodes, f"ray::{stage}"  # Ray names a worker after the task it is at
        self._done = threading.Event()
        self.at_work: set[tuple[str, int]] = set()
        self.killed: int | None = None

    def run(self) -> None:
        while not self._done.wait(0.01):
            for pid, parent, title in processes():
                if title != self._title or parent not in self._nodes:
                    continue
                self.at_work.add((self._nodes[parent], pid))
                if self.killed is None and self._nodes[parent] == "second":
                    os.kill(pid, signal.SIGKILL)
                    self.killed = pid

    def stop(self) -> None:
        self._done.set()
        self.join()


def processes() -> Iterator[tuple[int, int, str]]:
    """Id, parent and title of each process on this machine."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace")
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:  # it ended meanwhile
            continue
        yield int(folder.name), int(parent), title.strip()


@pytest.mark.slow
@pytest.mark.prefect
@pytest.mark.timeout(600)  # each of three workers imports torch and Prefect
def test_a_killed_worker_changes_no_digest(
    direct: Path, settings: dict[str, Any], nodes: dict[int, str], prefect_server: str, tmp_path: Path
) -> None:
    config = CleanConfig.model_validate(settings | {"n_groups": 5, "runner": {"kind": "ray", "address": "auto"}})
    killer = Killer(nodes, "embed_shards")
    killer.start()
    start(config, tmp_path / "run", direct=False)
    killer.stop()
    assert killer.killed is not None
    # Both nodes were at it, and another worker than the killed one went on.
    assert {node for node, _ in killer.at_work} == {"first", "second"}
    assert len(killer.at_work) >= 3
    assert digests(tmp_path / "run") == digests(direct)
