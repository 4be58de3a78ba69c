"""Published detectors and the default rule of `sanitize clean`, side by side on the same poisoned data.

    python -m benchmarks.published --quick [--json FILE]          six cells, one seed; about 20 CPU minutes
    python -m benchmarks.published [--json FILE]                  all cells, SAM in each of them
    python -m benchmarks.published --data cifar10 --only none --methods flare ct

A cell is a data set, an attack and a seed of `benchmarks.verdict`; the rule beside it is that of `clean` on a suspect
model without canaries. What each method is given is in the table. `spectral`, `activation clustering`, `scan` and
`flare` read the suspect model that the rule reads; names that end in `sam` read a suspect trained by sharpness-aware
minimisation with as many steps. `ct` and `asset` train networks of their own (16-32-64 channels). They are rebuilt from
their papers in a page each, with the simplifications in their docstrings (`benchmarks/baselines.py`,
`benchmarks/proactive.py`): figures of other code and larger networks may be better.

Columns: attack success rate (ASR) of the suspect that the method reads, recall, false removals (share of the clean
samples; cover samples count as neither), CPU seconds of the method, and those of what it reads (suspect, embeddings).
Nothing here is a target of the project, so nothing is missed.

With --json the file is written after each method, and what is in the file is not run again.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from benchmarks.baselines import activation_clustering, flare, highest_of_class, scan
from benchmarks.proactive import Labelled, asset, confusion_training, extremes, train_by_sam
from benchmarks.report import conclude, print_table, write_rows
from benchmarks.verdict_cells import (
    ATTACKS,
    DATA,
    TRUSTED_SHARE,
    _acc_asr,
    _column,
    _config,
    _poisoned,
    attack_settings,
    write_data,
)
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.tables import Embeddings
from sanitize.embed import EmbedConfig, EmbedderConfig, embed_shards, train_embedder
from sanitize.measure import detection
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.config import ModelConfig
from sanitize.models.convnet import ConvNetConfig
from sanitize.score import SpectralConfig, ToxicDirectionConfig, fit_scorer, score_shards
from sanitize.select import SelectConfig, select_samples

N_TRUSTED = 1_000  # test images, with their labels
CELLS = {
    "fashion": ("none", "adap-blend 1 %", "badnets 1 %", "sig 3 %", "smooth 3 %", "tact 1 %", "blended 1 %"),
    "cifar10": ("none", "blended 1 %", "adap-blend 1 %", "tact 1 %"),
    "gtsrb": ("none", "tact 1 %"),
}
QUICK = {"fashion": ("none", "badnets 1 %", "sig 3 %", "adap-blend 1 %"), "cifar10": ("blended 1 %", "none")}
BY_SAM_WHEN_QUICK = ("adap-blend 1 %",)  # where the suspect learns least
GIVEN = {
    "sanitize": "nothing",
    "spectral": "number of poisoned samples in each class",
    "activation clustering": "nothing",
    "scan": f"{TRUSTED_SHARE:.0%} of the clean samples",
    "flare": "nothing",
}
OF_SUSPECT = tuple(GIVEN)
OF_SAM = tuple(f"{name}, sam" for name in OF_SUSPECT)
GIVEN |= {f"{name}, sam": GIVEN[name] for name in OF_SUSPECT}
GIVEN |= dict.fromkeys(("ct", "asset"), f"{N_TRUSTED:,} further clean images, with labels")


class Case(NamedTuple):
    """Data of a cell: clean, poisoned, and what is known of it.

    Attributes:
        config: the attack; None for "none".
        test: test images; the first `N_TRUSTED` are given to methods that need trusted samples.
        untrusted: the poisoned data.
        truth_N: True for poisoned samples, in the order of `untrusted`.
        cover_N: True for cover samples.
        place: folder for what the methods write.
        compute: seed of the cell.
    """

    config: Any
    test: Dataset
    untrusted: Dataset
    truth_N: np.ndarray
    cover_N: np.ndarray
    place: Path
    compute: Compute


class Suspect(NamedTuple):
    """A model trained on the poisoned data, its embeddings, and the CPU seconds of both."""

    model: Checkpoint
    embeddings: Embeddings
    asr: float | None
    seconds: float
    place: Path


def poisoned_case(data: str, attack: str, seed: int, folder: Path) -> Case:
    """Poison the data of a cell; `write_data` has written them."""
    compute = Compute(device="cpu", seed=seed)
    honest, test = (Dataset.load(folder / data / f"{split}-index") for split in ("train", "test"))
    place = folder / "cells" / f"{data}-{ATTACKS.index(attack)}-{seed}"
    shards, config = list(honest.urls.values()), None
    truth_N = cover_N = np.zeros(honest.n_samples, bool)
    settings = attack_settings(attack, torch.from_numpy(_column(honest, "label")), honest.image_shape[1])
    if settings is not None:
        config = _config(settings)
        poisoned = _poisoned(config, honest, place, compute)
        shards, truth_N = poisoned.shard_paths(), _column(poisoned, "poisoned")
        cover_N = (_column(poisoned, "attack") >= 0) & ~truth_N
    untrusted = index_shards(IndexConfig(n_classes=honest.n_classes), shards, str(place / "index"), compute)
    return Case(config, test, untrusted, truth_N, cover_N, place, compute)


def suspect_of(case: Case, name: str) -> Suspect:
    """Train and embed: "plain" is the suspect of `clean` without canaries, "sam" has as many steps."""
    start, place = time.process_time(), case.place / name
    config = EmbedderConfig()
    if name == "sam":
        described = config.describe(case.untrusted)
        case.compute.seed_global("embedder", "init")
        model = described.build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        n_steps = config.n_passes(case.untrusted.n_samples) * (case.untrusted.n_samples // config.optim.batch_size)
        train_by_sam(model, _labelled(case.untrusted, described), n_steps, case.compute)
        place.mkdir(parents=True)
        torch.save(model.state_dict(), place / "weights.pt")
        config = EmbedderConfig(weights=str(place / "weights.pt"))
    checkpoint = train_embedder(config, case.untrusted, str(place / "model"), case.compute)
    embeddings = embed_shards(EmbedConfig(), case.untrusted, checkpoint, str(place / "embeddings"), case.compute)
    seconds = time.process_time() - start
    asr = _acc_asr(case.config, checkpoint, case.test, place / "test", case.compute).get("asr")
    return Suspect(checkpoint, embeddings, asr, seconds, place)


def _labelled(dataset: Dataset, model: ModelConfig, n: int | None = None) -> Labelled:
    """The first images of a data set as the model reads them, channels_last."""
    images_NCHW, labels_N = dataset.images()
    x_NCHW = model.normalise(images_NCHW[:n]).contiguous(memory_format=torch.channels_last)
    return Labelled(x_NCHW, labels_N[:n].long())


def removed_by(method: str, case: Case, suspect: Suspect) -> np.ndarray:
    """Samples that a method removes, (N,) bool."""
    name, compute = method.removesuffix(", sam"), case.compute
    if name in ("sanitize", "spectral"):
        return _by_scores(name, case, suspect)
    described = suspect.model.config
    if name == "flare":
        return flare(extremes(suspect.model.model(), _labelled(case.untrusted, described).x_NCHW), seed=compute.seed)
    if name in ("ct", "asset"):
        data, trusted = _labelled(case.untrusted, described), _labelled(case.test, described, N_TRUSTED)
        build = partial(_small_network, described)
        if name == "ct":
            return confusion_training(build, data, trusted, described.n_classes, compute)
        return asset(build, data, trusted, suspect.model.model(), compute)
    z_ND = np.concatenate([batch.z_BD.numpy() for batch in suspect.embeddings.batches("penultimate")])
    labels_N = _column(suspect.embeddings, "label")
    if name == "activation clustering":
        return activation_clustering(z_ND, labels_N, seed=compute.seed)
    random_N = np.random.default_rng(compute.seed).random(len(labels_N))
    return scan(z_ND, labels_N, ~case.truth_N & ~case.cover_N & (random_N < TRUSTED_SHARE), seed=compute.seed)


def _small_network(model: ModelConfig) -> nn.Module:
    network = ConvNetConfig(widths=(16, 32, 64)).build(model.n_classes, model.image_shape)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _by_scores(name: str, case: Case, suspect: Suspect) -> np.ndarray:
    """Removals of the library's scorers: the default rule, and spectral signatures at the true number in each class."""
    is_default = name == "sanitize"
    config: ToxicDirectionConfig | SpectralConfig = ToxicDirectionConfig() if is_default else SpectralConfig()
    fitted = fit_scorer(
        config,
        suspect.embeddings,
        str(suspect.place / f"{name}-fitted"),
        case.compute,
        dataset=case.untrusted,
        model=suspect.model,
    )
    scores = score_shards(config, fitted, suspect.embeddings, str(suspect.place / f"{name}-scores"), case.compute)
    if is_default:
        out = str(suspect.place / "selection")
        return ~_column(select_samples(SelectConfig(), case.untrusted, (scores,), out, case.compute), "keep")
    return highest_of_class(_column(scores, "score"), _column(suspect.embeddings, "label"), case.truth_N)


def rows_of(
    data: str, attack: str, seed: int, folder: Path, methods: Sequence[str], report: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """The row of each method on a cell; a method that fails is a row with the field `error`."""
    case = poisoned_case(data, attack, seed, folder)
    made: dict[str, Suspect] = {}
    try:
        for method in methods:
            of = "sam" if method in OF_SAM else "plain"
            if of not in made:
                made[of] = suspect_of(case, of)
                report(f"suspect model, {of}: {made[of].seconds:.0f} CPU s, ASR {made[of].asr}")
            row = {"data": data, "attack": attack, "seed": seed, "method": method, "given": GIVEN[method]}
            row |= {"asr": made[of].asr, "suspect_cpu_seconds": 0.0 if method == "ct" else made[of].seconds}
            start = time.process_time()
            try:
                removed_N = removed_by(method, case, made[of])
            except Exception as error:  # the other methods go on, and the row says what failed
                yield row | {"error": f"{type(error).__name__}: {error}"}
                continue
            found = detection(removed_N[~case.cover_N], case.truth_N[~case.cover_N])
            yield row | {
                "n": len(removed_N),
                "poisoned": found.n_poisoned,
                "recall": found.recall,
                "false_removals": found.false_positive_rate,
                "removed": found.n_removed,
                "cpu_seconds": time.process_time() - start,
            }
    finally:
        shutil.rmtree(case.place, ignore_errors=True)


def methods_of(attack: str, arguments: argparse.Namespace) -> list[str]:
    """Methods to run on a cell, those of one suspect model together."""
    by_sam = OF_SAM if not arguments.quick or attack in BY_SAM_WHEN_QUICK else ()
    every = [*OF_SUSPECT, "asset", "ct", *by_sam]
    return [method for method in every if not arguments.methods or method in arguments.methods]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print each cell with all methods as columns, and one line for each method over all cells."""
    finished = [row for row in rows if "recall" in row]
    names = [name for name in GIVEN if any(row["method"] == name for row in finished)]
    cells = list(dict.fromkeys((row["data"], row["attack"], row["seed"]) for row in finished))
    shown = []
    for cell in cells:
        of_cell = {row["method"]: row for row in finished if (row["data"], row["attack"], row["seed"]) == cell}
        first = {"data": cell[0], "attack": cell[1], "seed": cell[2], "ASR": next(iter(of_cell.values()))["asr"]}
        shown.append(first | {name: _pair(row) for name, row in of_cell.items()})
    columns = ["data", "attack", "seed", "ASR"]
    for group in ([name for name in names if name not in OF_SAM], [name for name in names if name in OF_SAM]):
        if group:
            part = [row for row in shown if any(name in row for name in group)]
            print_table(part, [*columns, *group], "recall / false removals")
    print_table(
        [_total(name, finished) for name in names], list(_total(names[0], finished)) if names else [], "methods"
    )
    failed = [row for row in rows if "error" in row]
    if failed:
        print_table(failed, ["data", "attack", "seed", "method", "error"], "failed")


def _pair(row: dict[str, Any]) -> str:
    recall = f"{row['recall']:.3f}" if row["poisoned"] else "-"
    return f"{recall} / {row['false_removals']:.4f}"


def _total(method: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    of_method = [row for row in rows if row["method"] == method]
    attacked = [row for row in of_method if row["poisoned"]]
    return {
        "method": method,
        "given": GIVEN[method],
        "cells": len(of_method),
        "mean recall": float(np.mean([row["recall"] for row in attacked])) if attacked else None,
        "most false removals": f"{max(row['false_removals'] for row in of_method):.4f}",
        "CPU s, median": round(float(np.median([row["cpu_seconds"] for row in of_method]))),
        "CPU s before, median": round(float(np.median([row["suspect_cpu_seconds"] for row in of_method]))),
    }


def main() -> None:
    """Run the cells one after another, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cells; SAM on one attack")
    parser.add_argument("--data", nargs="*", choices=list(DATA), help="some of the data sets")
    parser.add_argument("--only", nargs="*", choices=ATTACKS, help="some of the attacks")
    parser.add_argument("--methods", nargs="*", choices=list(GIVEN), help="some of the methods")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=0, help="results of other seeds than those of the tables")
    parser.add_argument("--images", type=int, help="most training images of a data set")
    parser.add_argument("--json", type=Path, help="results; what is in this file is not run again")
    arguments = parser.parse_args()
    start = time.perf_counter()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    rows = _finished(arguments.json, arguments.images)
    with tempfile.TemporaryDirectory() as folder:
        for data, attack, seed in cells_of(arguments):
            cell = f"{data}, {attack}, seed {seed}"
            done = {row["method"] for row in rows if (row["data"], row["attack"], row["seed"]) == (data, attack, seed)}
            missing = [method for method in methods_of(attack, arguments) if method not in done]
            report = partial(_report, start, cell)
            if missing and not (Path(folder) / data).exists():
                write_data(data, Path(folder), arguments.images)
            for row in rows_of(data, attack, seed, Path(folder), missing, report) if missing else ():
                rows.append(row | {"images": arguments.images})
                report(f"{row['method']}: {row.get('error') or _pair(row)}")
                if arguments.json is not None:
                    write_rows(arguments.json, rows)
    show(rows)
    failed = [f"{row['data']}, {row['attack']}, {row['method']}: {row['error']}" for row in rows if "error" in row]
    conclude(failed, arguments.json, start, checked=False, rows=rows)


def cells_of(arguments: argparse.Namespace) -> list[tuple[str, str, int]]:
    """Cells to run: data set, attack, seed."""
    cells = QUICK if arguments.quick else CELLS
    names = arguments.data or list(cells)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    chosen = [(data, attack) for data in names for attack in (arguments.only or cells.get(data, ("none",)))]
    return [(data, attack, seed) for seed in seeds for data, attack in chosen]


def _report(start: float, cell: str, text: str) -> None:
    print(f"[{time.perf_counter() - start:5.0f} s] {cell}: {text}", file=sys.stderr, flush=True)


def _finished(json_file: Path | None, images: int | None) -> list[dict[str, Any]]:
    """Rows of an earlier run; failed ones are run again."""
    if json_file is None or not json_file.exists():
        return []
    rows = json.loads(json_file.read_text())["rows"]
    if any(row["images"] != images for row in rows):
        raise SystemExit(f"{json_file} holds cells of another number of images (--images); give another --json")
    return [row for row in rows if "error" not in row]


if __name__ == "__main__":
    main()
