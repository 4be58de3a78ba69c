"""A flow that holds its run folder and sleeps, for `test_dead_worker`: an artifact that takes hours to make."""

import os
import time
from pathlib import Path

from prefect import flow

from sanitize.jobs.run import claimed


@flow(name="sleeper", persist_result=False)
def sleeper(out: str, seconds: float) -> None:
    """Claim `out`, leave the number of this process in it, and sleep."""
    with claimed(out, []):
        Path(out, "pid").write_text(str(os.getpid()))
        time.sleep(seconds)
