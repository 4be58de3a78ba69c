"""Cells of `benchmarks.verdict`: real images, poisoned, put through `clean` with its defaults, and measured."""

import math
import shutil
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from benchmarks.art_defences import art_activation_defence, art_spectral_signatures, is_installed
from benchmarks.baselines import activation_clustering, highest_of_class, scan
from benchmarks.data import cifar10, digits, fashion_mnist, flowers, gtsrb, write_images
from sanitize.attack import AttackConfig, Poisoned, Trigger, poison_shards, triggered
from sanitize.attack.badnets import checkerboard
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.decode import ImageConfig
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.tables import Embeddings, ShardTables
from sanitize.jobs.clean import CleanConfig, clean_inside
from sanitize.jobs.run import Run, read_record
from sanitize.loop import OptimConfig, predict
from sanitize.measure import auroc, count_correct, detection
from sanitize.models.checkpoint import Checkpoint
from sanitize.score import SpectralConfig, fit_scorer, score_shards
from sanitize.stage import STAGES
from sanitize.training import TrainConfig, train_robust

LEARNED = 0.25  # attack success rate of the suspect model from which on an attack counts as learned
FOUND, CLEAR, INCONCLUSIVE = "found", "nothing stood out", "inconclusive"
N_TEST = 2_000
MEASURED_STAGES = ("index_shards", "train_embedder", "embed_shards", "fit_scorer", "score_shards", "select_samples")
TRUSTED_SHARE = 0.1  # share of the clean samples that SCAn is given
RETRAIN_EPOCHS, RETRAIN_STEPS = 6, 560  # whichever is more; Fashion-MNIST has 562 steps in 6 epochs

Split = Callable[[str], tuple[Tensor, Tensor]]  # "train" or "test" -> images (N, C, H, W) uint8, labels (N,)
DATA: dict[str, Split] = {
    "fashion": lambda split: _first(fashion_mnist("train" if split == "train" else "t10k"), 12_000, split),
    "cifar10": lambda split: _first(cifar10(split, range(3 if split == "train" else 1)), 15_000, split),
    "gtsrb": gtsrb,
    "gtsrb-small": partial(gtsrb, per_class=300),
    "digits": digits,
    "flowers": flowers,
}
ATTACKS = (
    "none",
    "badnets .3 %",
    "badnets 1 %",
    "badnets 3 %",
    "badnets 10 %",
    "random place 1 %",
    "blended 1 %",
    "blended 3 %",
    "wanet 10 %",
    "smooth 3 %",
    "sig 3 %",
    "label-consistent 3 %",
    "adap-blend 1 %",
    "tact 1 %",
    "two triggers 2 %",
    "all-to-all 10 %",
    "rarest 1 %",
    "pair flips 5 %",
)


class RandomPlaceConfig(Trigger):
    """A checkerboard in a place of the image that its pixels decide.

    Attributes:
        size: side of the patch, in pixels.
    """

    kind: Literal["random_place"] = "random_place"
    size: int = 3

    def apply(self, images_BCHW: Tensor) -> Tensor:
        """Copies of uint8 images with the patch."""
        images_BCHW = images_BCHW.clone()
        for image_CHW in images_BCHW:
            height, width = (side - self.size + 1 for side in image_CHW.shape[1:])
            row, column = divmod(zlib.crc32(image_CHW.contiguous().numpy().tobytes()) % (height * width), width)
            image_CHW[:, row : row + self.size, column : column + self.size] = checkerboard(self.size)
        return images_BCHW


class Cell(NamedTuple):
    """One run: names of the data set and of the attack, seed, and True where models are trained again."""

    data: str
    attack: str
    seed: int
    retrain: bool

    def __str__(self) -> str:
        return f"{self.data}, {self.attack}, seed {self.seed}"


def attack_settings(name: str, labels_N: Tensor, side: int) -> dict[str, Any] | None:
    """Settings of an attack on a data set; None for "none".

    The target is the most common class, so that clean-label attacks find enough samples; the source of TaCT is the
    second.

    Args:
        name: one of ATTACKS.
        labels_N: labels of the data set.
        side: side of its images, in pixels.
    """
    count_K = labels_N.bincount()
    common, second = count_K.sort(descending=True, stable=True).indices[:2].tolist()
    rarest = int(torch.where(count_K > 0, count_K, len(labels_N)).argmin())
    of_target = min(0.03, float(count_K[common]) / len(labels_N) / 2)  # at most half of the class
    size = max(2, round(side / 10))  # whole pixels, a tenth of the image
    badnets = {"kind": "badnets", "size": size, "target": common}
    blended = {"kind": "blended", "target": common}
    settings: dict[str, dict[str, Any]] = {
        "badnets .3 %": badnets | {"rate": 0.003},
        "badnets 1 %": badnets | {"rate": 0.01},
        "badnets 3 %": badnets | {"rate": 0.03},
        "badnets 10 %": badnets | {"rate": 0.1},
        "random place 1 %": badnets | {"kind": "random_place", "rate": 0.01},
        "blended 1 %": blended | {"rate": 0.01},
        "blended 3 %": blended | {"rate": 0.03},
        "wanet 10 %": {"kind": "wanet", "target": common, "rate": 0.1},
        "smooth 3 %": {"kind": "smooth", "target": common, "rate": 0.03},
        "sig 3 %": {"kind": "sig", "target": common, "rate": of_target},
        "label-consistent 3 %": {"kind": "clean_label", "target": common, "rate": of_target, "size": size},
        "adap-blend 1 %": {"kind": "adaptive_blend", "target": common, "rate": 0.01, "cover_rate": 0.01},
        "tact 1 %": {"kind": "tact", "target": common, "sources": [second], "rate": 0.01, "cover_rate": 0.01},
        "two triggers 2 %": {"kind": "several", "attacks": [badnets | {"rate": 0.01}, blended | {"rate": 0.01}]},
        "all-to-all 10 %": badnets | {"rate": 0.1, "target": "next"},
        "rarest 1 %": badnets | {"rate": 0.01, "target": rarest},
        "pair flips 5 %": {"kind": "labels", "noise": "pairflip", "rate": 0.05},
    }
    return None if name == "none" else settings[name]


def one_cell(cell: Cell, folder: str) -> dict[str, Any]:
    """Poison, clean, measure; the row of the cell.

    A cell that fails is a row with the field `error`: the other cells go on.
    """
    place = Path(folder) / "cells" / f"{cell.data}-{ATTACKS.index(cell.attack)}-{cell.seed}"
    row = {"data": cell.data, "attack": cell.attack, "seed": cell.seed}
    start = time.process_time()
    try:
        row |= _measured(cell, Path(folder) / cell.data, place)
        return row | {"cell_cpu_seconds": time.process_time() - start, "versions": stage_versions()}
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return row | {"error": f"{type(error).__name__}: {error}"}
    finally:
        shutil.rmtree(place, ignore_errors=True)


def stage_versions() -> dict[str, int]:
    """Versions of the stages whose results a row holds."""
    return {name: STAGES[name].version for name in MEASURED_STAGES}


def _measured(cell: Cell, source: Path, place: Path) -> dict[str, Any]:
    compute = Compute(device="cpu", seed=cell.seed)
    honest, test = Dataset.load(source / "train-index"), Dataset.load(source / "test-index")
    shards, config = list(honest.urls.values()), None
    truth_N = cover_N = np.zeros(honest.n_samples, bool)
    settings = attack_settings(cell.attack, torch.from_numpy(_column(honest, "label")), honest.image_shape[1])
    if settings is not None:
        config = _config(settings)
        poisoned = _poisoned(config, honest, place, compute)
        shards, truth_N = poisoned.shard_paths(), _column(poisoned, "poisoned")
        cover_N = (_column(poisoned, "attack") >= 0) & ~truth_N

    start, cpu_start = time.perf_counter(), time.process_time()
    run = Run(place / "run", compute)
    cleaned = clean_inside(CleanConfig(shards=tuple(shards), compute=compute), run)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    removed_N = ~_column(cleaned.selection, "keep")
    found = detection(removed_N[~cover_N], truth_N[~cover_N])
    suspect = _acc_asr(config, cleaned.embedder, test, place / "suspect-test", compute)
    row: dict[str, Any] = {
        "n": len(truth_N),
        "poisoned": found.n_poisoned,
        "train_acc": _train_accuracy(cleaned.embedder),
    }
    row |= {"acc": suspect["acc"], "asr": suspect.get("asr"), "learned": suspect.get("asr", 0.0) >= LEARNED}
    row |= {"recall": found.recall, "false_removals": found.false_positive_rate, "removed": found.n_removed}
    said = read_record(run.out).get("verdict")
    row |= {"removed_clean": found.n_false_removals, "verdict": _verdict(said, found.n_removed)}
    if isinstance(said, dict):
        row |= {"why": [reason["why"] for reason in said["reasons"]], "canaries": said["canaries"]}
    row |= {"seconds": seconds, "cpu_seconds": cpu_seconds}
    row |= _baselines(Embeddings.load(place / "run" / "20-embeddings"), truth_N, cover_N, place, compute)
    if cell.retrain and config is not None and config.has_trigger and found.n_removed:
        row |= _retrained(config, cleaned.dataset, honest, test, removed_N, place, compute)
    return row


def _config(settings: dict[str, Any]) -> Any:
    """The checked config of an attack."""
    if settings["kind"] == "random_place":
        return RandomPlaceConfig.model_validate(settings)
    return TypeAdapter(AttackConfig).validate_python(settings)


def _poisoned(config: Any, honest: Dataset, place: Path, compute: Compute) -> Poisoned:
    surrogate = None
    if config.needs_surrogate:
        surrogate = _trained(honest, place / "surrogate", compute.model_copy(update={"seed": compute.seed + 500}))
    return poison_shards(config, honest, str(place / "poisoned"), compute, surrogate=surrogate)


def _column(tables: ShardTables, name: str) -> np.ndarray:
    return np.concatenate([tables.rows(shard, [name])[name].to_numpy(zero_copy_only=False) for shard in tables.shards])


def _verdict(said: Any, n_removed: int) -> str:
    """The verdict in a record of a run; of a version without verdicts, by the number of removed samples."""
    if not said:
        return FOUND if n_removed else CLEAR
    name = said["verdict"] if isinstance(said, dict) else said
    return CLEAR if name == "nothing" else str(name)


def _train_accuracy(suspect: Checkpoint) -> float:
    history = suspect.read_json("history.json")
    return float(history[-1].get("accuracy", math.nan)) if history else math.nan


def _acc_asr(config: Any, network: Checkpoint, test: Dataset, out: Path, compute: Compute) -> dict[str, float]:
    """Accuracy on test images, and attack success rate where the attack has a trigger."""
    channels, *size = network.config.image_shape
    image = ImageConfig(size=tuple(size), channels=channels)
    test = index_shards(
        IndexConfig(n_classes=network.config.n_classes, image=image), list(test.urls.values()), str(out), compute
    )
    logits = partial(predict, network.model(), transform=network.config.normalise, compute=compute)
    clean = ((batch.images_BCHW, batch.labels_B) for batch in test.batches(256))
    found = {"acc": count_correct([logits], clean, test.n_classes)[0].share}
    if config is not None and config.has_trigger:
        attacked = ((batch.images_BCHW, batch.wanted_B) for batch in triggered(config, test, test.n_classes))
        found["asr"] = count_correct([logits], attacked, test.n_classes)[0].share
    return found


def _baselines(
    embeddings: Embeddings, truth_N: np.ndarray, cover_N: np.ndarray, place: Path, compute: Compute
) -> dict[str, Any]:
    """Recall and false removals of the other methods on the penultimate embeddings of the same run."""
    z_ND = np.concatenate([batch.z_BD.numpy() for batch in embeddings.batches("penultimate")])
    labels_N = _column(embeddings, "label")
    trusted_N = ~truth_N & ~cover_N & (np.random.default_rng(compute.seed).random(len(truth_N)) < TRUSTED_SHARE)
    removed = {
        "activation_clustering": activation_clustering(z_ND, labels_N, seed=compute.seed),
        "scan": scan(z_ND, labels_N, trusted_N, seed=compute.seed),
    }
    if is_installed():
        removed["art_activation"] = art_activation_defence(z_ND, labels_N, seed=compute.seed)
    row: dict[str, Any] = {}
    if truth_N.any():  # at a rate of zero nothing is removed by definition
        if is_installed():
            removed["art_spectral"] = art_spectral_signatures(z_ND, labels_N, truth_N.mean())
        config = SpectralConfig()
        fitted = fit_scorer(config, embeddings, str(place / "spectral-fitted"), compute)
        scores = score_shards(config, fitted, embeddings, str(place / "spectral-scores"), compute)
        scores_N = _column(scores, "score")
        removed["spectral"] = highest_of_class(scores_N, labels_N, truth_N)
        row["spectral_auroc"] = auroc(scores_N[~cover_N], truth_N[~cover_N])
    for method, removed_N in removed.items():
        found = detection(removed_N[~cover_N], truth_N[~cover_N])
        row |= {f"{method}_recall": found.recall, f"{method}_false_removals": found.false_positive_rate}
    return row


def _retrained(
    config: Any, dataset: Dataset, honest: Dataset, test: Dataset, removed_N: np.ndarray, place: Path, compute: Compute
) -> dict[str, float]:
    """Accuracy and ASR of models trained on what is left, and on the original images and labels of the same samples."""
    kept_N = torch.from_numpy(~removed_N)
    compute = compute.model_copy(update={"seed": compute.seed + 1000})
    data = {
        name: [tensor[kept_N] for tensor in one.images()] for name, one in (("after", dataset), ("control", honest))
    }
    is_clean = all(map(torch.equal, data["after"], data["control"]))
    found: dict[str, float] = {}
    for name, (images_NCHW, labels_N) in data.items():
        if name == "control" and is_clean:  # the same data and seed give the same model
            found |= {"acc_control": found["acc_after"], "asr_control": found["asr_after"]}
            continue
        shards = write_images(place / f"{name}-shards", name, images_NCHW, labels_N).paths()
        index = index_shards(IndexConfig(n_classes=honest.n_classes), shards, str(place / f"{name}-index"), compute)
        model = _trained(index, place / f"{name}-model", compute)
        measured = _acc_asr(config, model, test, place / f"{name}-test", compute)
        found |= {f"{measure}_{name}": value for measure, value in measured.items()}
    return found


def _trained(dataset: Dataset, out: Path, compute: Compute) -> Checkpoint:
    """A network trained as a user would train it: by cross-entropy, with the architecture of the suspect model."""
    optim = OptimConfig()
    steps_per_epoch = max(1, dataset.n_samples // optim.batch_size)
    epochs = max(RETRAIN_EPOCHS, math.ceil(RETRAIN_STEPS / steps_per_epoch))
    config = TrainConfig(optim=optim.model_copy(update={"epochs": epochs}))
    return train_robust(config, dataset, str(out), compute)


def _first(split: tuple[Tensor, Tensor], n_train: int, name: str) -> tuple[Tensor, Tensor]:
    n = n_train if name == "train" else N_TEST
    return split[0][:n], split[1][:n]


def write_data(name: str, folder: Path, most: int | None) -> None:
    """Write training and test images of a data set as shards, and index them: FOLDER/NAME/SPLIT, SPLIT-index.

    Args:
        name: one of DATA.
        folder: folder of all data sets.
        most: most training images; None is all.
    """
    for split in ("train", "test"):
        images_NCHW, labels_N = DATA[name](split)
        most = most if split == "train" else None
        shards = write_images(folder / name / split, split, images_NCHW[:most], labels_N[:most])
        compute = Compute(device="cpu")
        index_shards(IndexConfig(), shards.paths(), str(folder / name / f"{split}-index"), compute)
