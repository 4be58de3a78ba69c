"""Kill the write stage, or let its system calls fail; what the next run makes of it must be what it always makes.

The accidents happen in `crash_write.py`, which says how.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
SCRIPT = Path(__file__).with_name("crash_write.py")


def accidents(what: str, folder: Path) -> Any:
    """What the script found."""
    # One thread, or it would not fork: OpenBLAS and the allocator in Arrow each start one when they are loaded.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, str(SCRIPT), what, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.slow
def test_killed_at_any_instant_and_run_again(tmp_path: Path) -> None:
    found = accidents("instants", tmp_path)
    kills = found["kills"]
    finished_shards = Counter(kill["shards"] for kill in kills)
    in_a_file = sum(kill["in_a_file"] for kill in kills)
    print(
        f"{len(kills)} kills in {found['chains']} chains within {found['seconds']:.2f} s of work: {in_a_file} while a "
        f"file was written, {found['late']} more came too late; by shards finished: {sorted(finished_shards.items())}"
    )
    assert found["problems"] == []
    assert len(kills) >= 200
    assert in_a_file > len(kills) / 2
    assert min(finished_shards[n] for n in range(6)) >= 3, "kills are not spread over the six shards"


@pytest.mark.slow
def test_killed_or_failing_at_any_system_call_and_run_again(tmp_path: Path) -> None:
    found = accidents("windows", tmp_path)
    windows = {scene: len(calls) for scene, calls in found["windows"].items()}
    kinds = Counter(call.split()[0] for call in found["windows"]["empty folder"])
    print(f"{found['accidents']} accidents in {sum(windows.values())} windows ({windows}; {dict(kinds)}), ", end="")
    print(f"which leave {found['states']} different states of the disk")
    assert found["problems"] == []
    assert found["overlooked"] == {}, "calls that change files went by unseen"
    # Every file that is opened reaches the disk before it gets its name; then the folder gets its own.
    assert kinds["fsync"] >= kinds["open"] == kinds["close"] == kinds["replace"] > 0
    assert kinds["rename"] == 1
    assert min(kinds["mkdir"], kinds["unlink"], kinds["rmdir"]) > 0
