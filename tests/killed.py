"""Processes that kill themselves in the middle of a stage."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from pydantic import BaseModel

from sanitize.data.dataset import Dataset

_AFTER_A_SNAPSHOT = """
import os, signal, sys
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.snapshots import Snapshots

dataset, config, out, n = Dataset.load(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
compute = Compute(device="cpu", threads=1)
save, saved = Snapshots.save, 0

def counted(self, state):
    global saved
    save(self, state)
    saved += 1
    if saved == n:
        os.kill(os.getpid(), signal.SIGKILL)

Snapshots.save = counted
"""


def run_until_killed(program: str, *arguments: str) -> None:
    """Run a Python program that ends by SIGKILL."""
    command = [sys.executable, "-c", program, *arguments]
    killed = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert killed.returncode == -signal.SIGKILL


def kill_after_snapshot(n: int, call: str, dataset: Dataset, config: BaseModel, out: Path) -> None:
    """Run `call`, in terms of `dataset`, `config` (JSON), `out` and `compute`, and kill it after snapshot `n`."""
    run_until_killed(_AFTER_A_SNAPSHOT + call, dataset.path, config.model_dump_json(), str(out), str(n))
