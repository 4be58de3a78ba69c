"""The loop of both fuzzers: cases of a seed until the time is up; the first that fails is kept and named."""

import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

Case = tuple[Path, Callable[[int], str]]  # its file, and the check: from the most memory in bytes to the outcome


def cases_until(
    seconds: float,
    seed: int,
    keep: Path,
    n_warm: int,
    case: Callable[[int], Case],
    peak_bytes: Callable[[], int],
    more_bytes: int,
) -> tuple[Counter[str], str]:
    """Outcomes, and how many cases there were in what time and memory; no outcomes where a case failed.

    Args:
        seconds: time.
        seed: seed of the cases, for messages.
        keep: folder for the file of a case that fails.
        n_warm: number of cases after which everything is imported and warm.
        case: case `n`.
        peak_bytes: most memory that this process ever held.
        more_bytes: memory that all cases may take above that of the first `n_warm`.
    """
    start, n, outcomes, most_bytes = time.perf_counter(), 0, Counter[str](), 2**62
    while time.perf_counter() - start < seconds:
        path, check = case(n)
        try:
            outcomes[check(most_bytes)] += 1
        except BaseException as error:
            keep.mkdir(parents=True, exist_ok=True)
            saved = keep / f"{seed}-{n}-{path.name}"
            shutil.copy(path, saved)
            if isinstance(error, KeyboardInterrupt):
                raise
            traceback.print_exc()
            print(f"FAILED at case {n} of seed {seed}: {saved}")
            return Counter(), ""
        n += 1
        if n == n_warm:
            most_bytes = peak_bytes() + more_bytes
    took = time.perf_counter() - start
    return outcomes, f"{n} cases of seed {seed} in {took:.0f} s ({n / took:.1f} cases/s), peak {peak_bytes() >> 20} MiB"
