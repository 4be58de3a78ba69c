"""What a batch costs where little was processed before it and where much was, and what the drift rule sees.

    python -m benchmarks.ingest --quick|--full [--json FILE]

Time: ingest of the same new shards into a store whose ledger has 10, 100 and 1,000 batches, and whose listing has as
many old shards. Drift: digits with BadNets at several rates and with none, over seeds: how often a batch is held.
Targets: 10 x the history costs at most 1.3 x the time, no batch without poison is held, all with 5 % or more are.
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import conclude, print_table, quick_or_full
from sanitize.attack import BadNetsConfig, poison_shards
from sanitize.compute import Compute
from sanitize.data.digits import write_digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.jobs import reference
from sanitize.jobs.clean import CleanConfig
from sanitize.jobs.ingest import IngestConfig
from sanitize.jobs.job import run_job
from sanitize.ledger import ClaimEntry, CommitEntry, Entry, Ledger, Offered
from sanitize.storage import fingerprint

CPU = Compute(device="cpu")
RATES = (0.0, 0.01, 0.02, 0.05, 0.1)
SETTINGS = {
    "embedder": {
        "architecture": {"kind": "convnet", "widths": [8, 16]},
        "optim": {"epochs": 3, "batch_size": 32, "learning_rate": 0.02},
    },
    "scorers": [{"kind": "spectral"}],
    "compute": {"device": "cpu"},
    "n_groups": 1,
}


def prepared(folder: Path, seed: int) -> tuple[list[str], Path]:
    """Digits in 18 shards in the order of a seed, and a store with a reference made from ten of them."""
    shards = write_digits(str(folder / "digits"), Compute(device="cpu", seed=seed), n_shards=18).shards()
    config = CleanConfig.model_validate(SETTINGS | {"shards": shards[:10]})
    run_job(config, folder / "run")
    reference(run=folder / "run", out=folder / "store", level=0.01)
    return shards[10:], folder / "store"


def with_history(store: Path, incoming: Path, n_batches: int) -> None:
    """Write `n_batches` of one old shard each into the ledger, and the shards, which nobody should open, to disk."""
    entries: list[Entry] = []
    for i in range(n_batches):
        shard = incoming / f"old-{i:06d}.tar"
        shard.write_bytes(b"%d" % i)
        found = fingerprint(str(shard))
        url, size, modified = (str(found[name]) for name in ("url", "size", "modified"))
        old = Offered(url=url, size=int(size), modified=modified, sha256=f"{i:064d}")
        name = f"{i:016d}"
        entries.append(ClaimEntry(batch=name, reference=1, shards=(old,)))
        entries.append(CommitEntry(batch=name, status="accepted", verdict="accept"))
    for number, entry in enumerate(entries, Ledger(str(store)).read().n_entries):
        (store / "ledger" / f"{number:08d}.json").write_text(entry.model_dump_json())


def cost(folder: Path, shards: list[str], store: Path, n_batches: int, n_repeats: int) -> dict[str, Any]:
    """Median seconds of an ingest of two new shards after `n_batches`, and of one that finds nothing new."""
    seconds, again = [], []
    for repeat in range(n_repeats):
        place = folder / f"history-{n_batches}-{repeat}"
        copy, incoming = shutil.copytree(store, place / "store"), place / "incoming"
        incoming.mkdir()
        with_history(copy, incoming, n_batches)
        for shard in shards[:2]:
            shutil.copy2(shard, incoming)
        config = IngestConfig(shards=(str(incoming),), compute=CPU)
        for times in (seconds, again):
            begun = time.process_time()
            run_job(config, copy)
            times.append(time.process_time() - begun)
        shutil.rmtree(place)
    return {
        "batches before": n_batches,
        "CPU seconds": statistics.median(seconds),
        "nothing new": statistics.median(again),
    }


def held(folder: Path, shards: list[str], store: Path, rate: float, seed: int) -> dict[str, Any]:
    """What becomes of a batch of two shards, some of it poisoned, and of the poison in it."""
    incoming = folder / f"incoming-{rate}"
    incoming.mkdir()
    places = shards[:2]
    if rate:
        dataset = index_shards(IndexConfig(n_classes=10), places, str(folder / f"index-{rate}"), CPU)
        attack = BadNetsConfig(rate=rate, size=3)
        places = poison_shards(
            attack, dataset, str(folder / f"poisoned-{rate}"), Compute(device="cpu", seed=seed)
        ).shard_paths()
    for place in places:
        shutil.copy2(place, incoming)
    copy = shutil.copytree(store, folder / f"store-{rate}")
    (batch,) = run_job(IngestConfig(shards=(str(incoming),), compute=CPU), copy)["batches"]
    return {"held": batch["status"] == "held", "removed": batch["samples"]["quarantined"] / batch["samples"]["samples"]}


def main() -> None:
    """Command line."""
    options = quick_or_full(__doc__).parse_args()
    torch.set_num_threads(1)
    start, n_seeds, n_repeats = time.perf_counter(), 5 if options.quick else 20, 1 if options.quick else 5
    found: dict[float, list[dict[str, Any]]] = {rate: [] for rate in RATES}
    costs: list[dict[str, Any]] = []
    for seed in range(options.first_seed, options.first_seed + n_seeds):
        with tempfile.TemporaryDirectory(prefix="sanitize-ingest-") as name:
            shards, store = prepared(Path(name), seed)
            if not costs:
                cost(Path(name), shards, store, 1, 1)  # imports
                costs = [cost(Path(name), shards, store, n, n_repeats) for n in (10, 100, 1_000)]
            for rate, outcomes in found.items():
                outcomes.append(held(Path(name), shards, store, rate, seed))
    print_table(costs, list(costs[0]), "ingest of two new shards of 100 images")
    rows = [
        {
            "BadNets": rate,
            "batches": len(of),
            "held": sum(o["held"] for o in of),
            "removed": sum(o["removed"] for o in of) / len(of),
        }
        for rate, of in found.items()
    ]
    print_table(rows, list(rows[0]), "batches of 200 digits; 1,000 in the reference")
    ratio = costs[1]["CPU seconds"] / costs[0]["CPU seconds"]
    missed = [f"10 x the history costs {ratio:.2f} x the time, more than 1.3"] * (ratio > 1.3)
    missed += [f"{row['held']} of {row['batches']} clean batches were held" for row in rows[:1] if row["held"]]
    missed += [
        f"{row['held']} of {row['batches']} batches at rate {row['BadNets']} were held"
        for row in rows[3:]
        if row["held"] < row["batches"]
    ]
    conclude(missed, options.json, start, costs=costs, drift=rows)


if __name__ == "__main__":
    main()
