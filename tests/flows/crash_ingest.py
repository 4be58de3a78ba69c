"""Kill `ingest` at random instants, alone and two at once, while shards land and copies of them are offered again.

    python -m tests.flows.crash_ingest RUN DIGITS FOLDER

`test_ingest.py` runs this as a process of its own; RUN is an approved run, DIGITS a folder of shards. As in
`tests/select/crash_write.py`, every ingest is a fork of a process that has imported everything. The result is JSON.
"""

import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sanitize.compute import Compute
from sanitize.jobs import reference
from sanitize.jobs.ingest import IngestConfig
from sanitize.jobs.job import run_job
from sanitize.ledger import Ledger
from sanitize.storage import sha256_file
from tests.select.crash_write import start

N_RUNS = 30
SHARDS_OF_BATCH = 2


def work(store: Path, incoming: Path) -> str:
    """One ingest of what is there."""
    config = IngestConfig(shards=(str(incoming),), max_shards=SHARDS_OF_BATCH, compute=Compute(device="cpu"))
    return json.dumps(run_job(config, store))


def outcome(store: Path) -> dict[str, Any]:
    """All that must not depend on accidents: batches, digests of their artifacts, feed, bytes of clean shards."""
    state = Ledger(str(store)).read()
    feed = json.loads((store / "feed.json").read_text())["shards"]
    batches = {
        name: [[shard.sha256 for shard in batch.claim.shards], batch.commit.model_dump() if batch.commit else None]
        for name, batch in state.batches.items()
    }
    wrong = [line["shard"] for line in feed if line["batch"] and sha256_file(store / line["shard"]) != line["sha256"]]
    return {"batches": dict(sorted(batches.items())), "feed": feed, "wrong": wrong}


def entries(store: Path) -> list[dict[str, Any]]:
    """The log as it is."""
    return [json.loads(path.read_text()) for path in sorted((store / "ledger").glob("[0-9]*.json"))]


def imported(folder: Path, shard: Path) -> str:
    """Names of what an ingest imports only when it runs; every fork would do it again, in more time than it works."""
    before = set(sys.modules)
    shutil.copytree(folder / "store", folder / "warm")
    (folder / "one").mkdir()
    shutil.copy2(shard, folder / "one")
    work(folder / "warm", folder / "one")
    return " ".join(sorted(sys.modules.keys() - before))


def accidents(folder: Path, shards: list[Path], seconds: float) -> dict[str, Any]:
    """`N_RUNS` ingests, every third time two at once, each killed within half the time that a batch takes."""
    rng = random.Random(0)
    store, incoming = folder / "store", folder / "incoming"
    waiting, killed, ended = list(shards), 0, 0
    for number in range(N_RUNS):
        if number % (N_RUNS * SHARDS_OF_BATCH // len(shards)) == 0:
            for shard in waiting[:SHARDS_OF_BATCH]:  # they land pairwise: what is a batch is the same in every run
                shutil.copy2(shard, incoming / shard.name)
            del waiting[:SHARDS_OF_BATCH]
        again = rng.choice([path for path in incoming.iterdir() if not path.name.startswith("zz")])
        shutil.copy2(again, incoming / f"zz-{number}.tar")
        children = [start(lambda: work(store, incoming)) for _ in range(1 + (number % 3 == 0))]
        time.sleep(rng.uniform(0, seconds / 2))
        for child in children:
            os.kill(child.pid, signal.SIGKILL)
        statuses = [child.wait()[0] for child in children]
        killed += statuses.count(-signal.SIGKILL)
        ended += len(statuses) - statuses.count(-signal.SIGKILL)
    assert not waiting
    last = json.loads(start(lambda: work(store, incoming)).result())
    return {"killed": killed, "ended": ended, "last": last}


def main() -> None:
    """Command line."""
    run, digits, folder = map(Path, sys.argv[1:])
    shards = sorted(digits.glob("*.tar"))
    start(lambda: json.dumps(reference(run=run, out=folder / "store", level=0.01).summary)).result()
    shutil.copytree(folder / "store", folder / "undisturbed")
    whole, incoming = folder / "whole", folder / "incoming"
    for place in (whole, incoming):
        place.mkdir()
    for shard in shards:
        shutil.copy2(shard, whole / shard.name)
    for name in start(lambda: imported(folder, shards[0])).result().split():
        with suppress(ImportError):  # of what is no module of its own
            importlib.import_module(name)
    begun = time.perf_counter()
    start(lambda: work(folder / "undisturbed", whole)).result()
    seconds = (time.perf_counter() - begun) * SHARDS_OF_BATCH / len(shards)
    found = accidents(folder, shards, seconds)
    stores = {name: outcome(folder / store) for name, store in (("expected", "undisturbed"), ("found", "store"))}
    print(json.dumps({"seconds": seconds, **found, **stores, "entries": entries(folder / "store")}))


if __name__ == "__main__":
    main()
