"""Data and attacks that chose nothing: what the default rule of `sanitize clean` does where nobody tuned it.

    python -m benchmarks.unseen --folder FOLDER [--half choose|report] [--only NAME ...]
    python -m benchmarks.unseen --folder FOLDER --decide          decides once more on what is stored

Clean data that a rule may mistake for poison: superclasses, classes with the same content, long tails, human label
noise, a frame or a dark style on some images of one class, copies; and attacks with parameters that
`benchmarks.verdict` does not have. Images have half the resolution and the suspect model a quarter of the default
weights, so that a case takes 20 CPU seconds; one seed. Changes of the rule may be chosen on the half "choose"; the half
"report" is only reported.

Columns: training accuracy of the suspect and its attack success rate (ASR), poisoned samples, recall, clean samples
removed, of these "odd" ones (the natural group that the case is about), share learned and recall of the canaries,
verdict.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from benchmarks.data import cifar10, cifar10n, digits, fashion_mnist, flowers, gtsrb, write_images
from benchmarks.report import print_table
from sanitize.attack.badnets import BadNetsConfig
from sanitize.attack.blended import BlendedConfig
from sanitize.attack.sig import SIGConfig
from sanitize.attack.smooth import SmoothConfig
from sanitize.attack.wanet import WaNetConfig
from sanitize.compute import Compute
from sanitize.data.canaries import Canaries
from sanitize.data.dataset import Dataset
from sanitize.data.index import index_shards
from sanitize.data.tables import Embeddings
from sanitize.embed import (
    CanaryConfig,
    EmbedConfig,
    EmbedderConfig,
    embed_canaries,
    embed_shards,
    plant_canaries,
    train_embedder,
)
from sanitize.jobs.clean import CleanConfig
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.convnet import ConvNetConfig
from sanitize.report.finding import find
from sanitize.score import ToxicDirectionConfig, fit_scorer, score_shards
from sanitize.select import SelectConfig, select_samples

ROWS_PER_TEST = 500


class Images(NamedTuple):
    """Images, given labels, which are poisoned, and which belong to the natural group the case is about."""

    images: Tensor
    labels: Tensor
    poison: Tensor
    odd: Tensor
    triggers: tuple[tuple[Any, int], ...] = ()


def clean(images: Tensor, labels: Tensor) -> Images:
    """Untouched images; labels are made consecutive."""
    _, labels = labels.unique(return_inverse=True)
    none = torch.zeros(len(labels), dtype=torch.bool)
    return Images(images.clone(), labels, none, none.clone())


def seeded(seed: int) -> torch.Generator:
    """Random source."""
    return torch.Generator().manual_seed(seed)


def halved(images: Tensor) -> Tensor:
    """Images of half the height and width."""
    return avg_pool2d(images.float(), 2).round().to(torch.uint8)


def fashion(start: int, n: int) -> Images:
    """Training images from `start` on; `benchmarks.verdict` reads the first 12,000."""
    images, labels = fashion_mnist("train")
    return clean(halved(images[start : start + n]), labels[start : start + n])


def cifar(shard: int, n: int = 3000) -> Images:
    """Images of one training shard; `benchmarks.verdict` reads shards 0 to 2."""
    images, labels = cifar10("train", [shard])
    return clean(halved(images[:n]), labels[:n])


def people(kind: str, shard: int, n: int = 3000) -> Tensor:
    """Labels that people gave the images of `cifar`."""
    return cifar10n(kind, [shard])[:n]


def of_classes(data: Images, classes: list[int]) -> Images:
    """Images of these classes."""
    kept = torch.isin(data.labels, torch.tensor(classes))
    return clean(data.images[kept], data.labels[kept])


def merged(data: Images, groups: list[list[int]]) -> Images:
    """Superclasses: labels that name several classes of the data."""
    labels = data.labels.clone()
    for number, group in enumerate(groups):
        labels[torch.isin(data.labels, torch.tensor(group))] = number
    return data._replace(labels=labels)


def long_tailed(data: Images, largest: int, smallest: int) -> Images:
    """Classes of geometrically falling size."""
    classes = data.labels.unique().tolist()
    sizes = np.geomspace(largest, smallest, len(classes)).round().astype(int)
    kept = [(data.labels == label).nonzero()[:size, 0] for label, size in zip(classes, sizes, strict=True)]
    rows = torch.cat(kept)
    rows = rows[torch.randperm(len(rows), generator=seeded(5))]
    return clean(data.images[rows], data.labels[rows])


def twins(data: Images, label: int) -> Images:
    """Half of a class has the label of a new class."""
    is_twin = (data.labels == label) & (torch.rand(len(data.labels), generator=seeded(6)) < 0.5)
    return data._replace(labels=torch.where(is_twin, int(data.labels.max()) + 1, data.labels))


def framed(data: Images, label: int, share: float, width: int = 2, level: int = 255) -> Images:
    """A frame on some images of one class: they come from another source."""
    rows = (data.labels == label).nonzero()[:, 0]
    rows = rows[: round(share * len(rows))]
    images, odd = data.images.clone(), data.odd.clone()
    for edge in (slice(0, width), slice(-width, None)):
        images[rows, :, edge, :] = level
        images[rows, :, :, edge] = level
    odd[rows] = True
    return data._replace(images=images, odd=odd)


def restyled(data: Images, label: int, share: float, change: Callable[[Tensor], Tensor]) -> Images:
    """Another style of some images of one class."""
    rows = (data.labels == label).nonzero()[:, 0]
    rows = rows[: round(share * len(rows))]
    images, odd = data.images.clone(), data.odd.clone()
    images[rows], odd[rows] = change(images[rows].float()).round().clamp(0, 255).to(torch.uint8), True
    return data._replace(images=images, odd=odd)


def with_copies(data: Images, label: int, n: int) -> Images:
    """Slightly changed copies of one image."""
    rows = (data.labels == label).nonzero()[: n + 1, 0]
    images, odd = data.images.clone(), data.odd.clone()
    noise = torch.randn(n, *images.shape[1:], generator=seeded(7)) * 3
    images[rows[1:]] = (images[rows[0]].float() + noise).round().clamp(0, 255).to(torch.uint8)
    odd[rows] = True
    return data._replace(images=images, odd=odd)


def noisy(data: Images, labels: Tensor) -> Images:
    """Other labels, as people gave them; the wrong ones are "odd", but not poisoned."""
    return data._replace(labels=labels, odd=labels != data.labels)


def flipped(data: Images, share: float) -> Images:
    """Random wrong labels."""
    k = int(data.labels.max()) + 1
    wrong = torch.rand(len(data.labels), generator=seeded(8)) < share
    shift = torch.randint(1, k, data.labels.shape, generator=seeded(9))
    return noisy(data, torch.where(wrong, (data.labels + shift) % k, data.labels))


def attacked(
    data: Images, trigger: Any, n: int, target: int, seed: int = 0, sources: list[int] | None = None
) -> Images:
    """`n` images of other classes (SIG: of the target) get the trigger and the label `target`."""
    is_free = ~data.poison & ((data.labels == target) if trigger.keeps_label else (data.labels != target))
    rows = is_free.nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows), generator=seeded(seed))[:n]]
    images, labels, poison = data.images.clone(), data.labels.clone(), data.poison.clone()
    images[rows], labels[rows], poison[rows] = trigger.apply(images[rows]), target, True
    return Images(images, labels, poison, data.odd & ~poison, (*data.triggers, (trigger, target)))


def all_to_all(data: Images, trigger: Any, n: int) -> Images:
    """`n` images get the trigger and the label of the next class."""
    rows = torch.randperm(len(data.labels), generator=seeded(3))[:n]
    images, labels, poison = data.images.clone(), data.labels.clone(), data.poison.clone()
    images[rows], poison[rows] = trigger.apply(images[rows]), True
    labels[rows] = (labels[rows] + 1) % (int(labels.max()) + 1)
    return Images(images, labels, poison, data.odd)


def halves_of_flowers() -> Images:
    """Flowers at 32 x 32."""
    images, labels = flowers("train")
    return clean(halved(images), labels)


def cifar_test() -> tuple[Tensor, Tensor]:
    """Test images of CIFAR-10."""
    images, labels = cifar10("test", [1])
    return halved(images[:3000]), labels[:3000]


def stripes(n: int, classes: int, start: int = 0, size: int = 16) -> Images:
    """Stripes whose angle is the class, with a random phase and noise (16 x 16 RGB)."""
    images, labels = [], []
    y, x = np.mgrid[:size, :size] / size
    for i in range(start, start + n):
        label = i % classes
        rng = np.random.default_rng([label, i])
        angle = np.pi * label / classes
        wave = np.sin(2 * np.pi * (3 * (x * np.cos(angle) + y * np.sin(angle)) + rng.random()))
        pixels = 128 + 80 * wave[..., None] * rng.uniform(0.6, 1, 3) + rng.normal(0, 20, (size, size, 3))
        images.append(np.clip(pixels, 0, 255).astype(np.uint8))
        labels.append(label)
    return clean(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))


def signs(part: int, per_class: int = 150) -> Images:
    """Every second class of GTSRB, five tracks of each."""
    images, labels = gtsrb("train", per_class)
    kept = labels % 2 == part
    return clean(halved(images[kept]), labels[kept])


def white(size: int, corner: str, rate: float = 0.01, pattern: str = "white") -> BadNetsConfig:
    """A patch."""
    return BadNetsConfig.model_validate({"size": size, "corner": corner, "pattern": pattern, "rate": rate})


def grains(alpha: float, seed: int, grain: int = 4) -> BlendedConfig:
    """A coarse pattern of noise."""
    return BlendedConfig(rate=0.01, alpha=alpha, pattern_seed=seed, grain=grain, noise="gaussian")


PAIRS = [[0, 5], [1, 9], [2, 7], [3, 8], [4, 6]]
OTHER_PAIRS = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
SIG, TILTED = SIGConfig(rate=0.01, delta=30, frequency=9), SIGConfig(rate=0.01, delta=25, frequency=4)

CHOOSE: dict[str, Callable[[], Images]] = {
    "fashion, superclasses": lambda: merged(fashion(20_000, 3000), PAIRS),
    "cifar, human labels, worst": lambda: noisy(cifar(5), people("worse_label", 5)),
    "fashion, superclasses, badnets 2 %": lambda: attacked(
        merged(fashion(25_000, 3000), PAIRS), white(2, "top-left"), 60, 2
    ),
    "fashion, long tail": lambda: long_tailed(fashion(12_000, 12_000), 1000, 10),
    "cifar, human labels, badnets 3 %": lambda: attacked(
        noisy(cifar(5), people("random_label1", 5)), white(3, "bottom-left"), 90, 1
    ),
    "fashion, 500 images": lambda: fashion(30_000, 500),
    "cifar, frame on a class": lambda: framed(cifar(6), 3, 0.1, 1),
    "fashion, shirts and T-shirts": lambda: of_classes(fashion(31_000, 12_000), [0, 6]),
    "cifar, blended 5 %": lambda: attacked(cifar(7), grains(0.15, 11, 2), 150, 6),
    "fashion, majority of a rare class": lambda: attacked(
        long_tailed(fashion(12_000, 12_000), 1000, 30), white(2, "top-left"), 90, 9
    ),
    "digits, superclasses": lambda: merged(clean(*digits("train")), PAIRS),
    "fashion, sig 4 %": lambda: attacked(fashion(41_000, 3000), SIG, 120, 7),
    "gtsrb, half": lambda: signs(0),
    "fashion, twins": lambda: twins(fashion(36_000, 3000), 8),
    "stripes, badnets 2 %": lambda: attacked(stripes(2500, 10), white(2, "top-right"), 50, 4),
    "cifar, wanet 10 %": lambda: attacked(cifar(7), WaNetConfig(rate=0.1, grid=5, strength=1.5), 300, 3),
    "digits, blended 5 %": lambda: attacked(clean(*digits("train")), grains(0.3, 16, 2), 75, 6),
    "fashion, 3,000 images": lambda: fashion(44_000, 3000),
    "gtsrb, half, badnets 4 %": lambda: attacked(signs(0), white(2, "bottom-right", pattern="checkerboard"), 120, 2),
    "fashion, all-to-all 10 %": lambda: all_to_all(fashion(12_000, 3000), white(2, "top-right"), 300),
    "cifar, superclasses": lambda: merged(cifar(8), OTHER_PAIRS),
    "fashion, other superclasses": lambda: merged(fashion(47_000, 3000), OTHER_PAIRS),
    "cifar, human labels": lambda: noisy(cifar(9), people("random_label2", 9)),
    "fashion, random labels 20 %": lambda: flipped(fashion(56_000, 3000), 0.2),
    "cifar, human labels, blended 5 %": lambda: attacked(
        noisy(cifar(8), people("random_label3", 8)), grains(0.2, 15, 2), 150, 8
    ),
}
REPORT: dict[str, Callable[[], Images]] = {
    "fashion, frame on a class": lambda: framed(fashion(46_000, 3000), 4, 0.1, 1, level=128),
    "fashion, one class partly dark": lambda: restyled(fashion(51_000, 3000), 2, 0.15, lambda x: 0.3 * x),
    "cifar, one class partly negative": lambda: restyled(cifar(6), 7, 0.1, lambda x: 255 - x),
    "cifar, superclasses, blended 4 %": lambda: attacked(merged(cifar(8), OTHER_PAIRS), grains(0.2, 12, 4), 120, 0),
    "fashion, two classes, badnets 5 %": lambda: attacked(
        of_classes(fashion(12_000, 10_000), [1, 3]), white(2, "bottom-left"), 100, 1
    ),
    "cifar, long tail": lambda: long_tailed(cifar(9, 5000), 480, 12),
    "digits, five classes": lambda: of_classes(clean(*digits("train")), [1, 3, 4, 7, 9]),
    "digits, other superclasses, badnets 4 %": lambda: attacked(
        merged(clean(*digits("train")), OTHER_PAIRS), white(2, "top-left"), 60, 3
    ),
    "gtsrb, other half, badnets 3 %": lambda: attacked(signs(1), white(2, "top-right"), 90, 3),
    "fashion, two attacks": lambda: attacked(
        attacked(fashion(36_000, 3000), white(2, "bottom-left"), 45, 5), grains(0.2, 13, 3), 60, 0, 1
    ),
    "stripes": lambda: stripes(2500, 7, 10_000),
    "cifar, copies": lambda: with_copies(cifar(8), 4, 60),
    "cifar, sig 4 %": lambda: attacked(cifar(9), TILTED, 120, 2),
    "flowers, blended 6 %": lambda: attacked(halves_of_flowers(), grains(0.25, 14, 8), 72, 2),
    "fashion, 500 images, badnets 6 %": lambda: attacked(fashion(33_000, 500), white(2, "top-left"), 30, 3),
    "fashion, smooth 5 %": lambda: attacked(fashion(46_000, 3000), SmoothConfig(rate=0.05, amplitude=25), 150, 8),
    "cifar, 3,000 images": lambda: clean(*cifar_test()),
}
HALVES = {"choose": CHOOSE, "report": REPORT}


SUSPECT = EmbedderConfig(architecture=ConvNetConfig(widths=(16, 32, 64)))


def place_of(folder: Path, half: str, name: str) -> Path:
    """Folder of a case."""
    return folder / half / name.replace(" ", "-").replace(",", "").replace("%", "pct")


def run_case(half: str, name: str, folder: Path) -> dict[str, Any]:
    """Train the suspect model of a case and embed its images; all stays in the folder."""
    data, place, compute = HALVES[half][name](), place_of(folder, half, name), Compute(device="cpu")
    shutil.rmtree(place, ignore_errors=True)
    start = time.process_time()
    shards = write_images(place / "shards", "train", data.images, data.labels).paths()
    dataset = index_shards(CleanConfig(shards=tuple(shards)).index, shards, str(place / "index"), compute)
    canaries = plant_canaries(CanaryConfig(), dataset, str(place / "canaries"), compute)
    embedder = train_embedder(SUSPECT, dataset, str(place / "embedder"), compute, canaries=canaries)
    embed_shards(EmbedConfig(), dataset, embedder, str(place / "embeddings"), compute)
    embed_canaries(EmbedConfig(), canaries, embedder, str(place / "embedded-canaries"), compute)
    torch.save({"poison": data.poison, "odd": data.odd}, place / "truth.pt")
    asr = [_asr(trigger, target, data, embedder) for trigger, target in data.triggers]
    row = {"case": name, "half": half, "n": len(data.labels), "asr": asr, "train": _accuracy(embedder)}
    row["cpu"] = round(time.process_time() - start)
    (place / "row.json").write_text(json.dumps(row))
    return row


def decide(place: Path) -> dict[str, Any]:
    """The decision on a stored case."""
    row = json.loads((place / "row.json").read_text())
    truth = torch.load(place / "truth.pt")
    dataset, embedder = Dataset.load(place / "index"), Checkpoint.load(place / "embedder")
    embeddings, canaries = Embeddings.load(place / "embeddings"), Canaries.load(place / "canaries")
    seen = {"dataset": dataset, "model": embedder, "canaries": canaries}
    seen["embedded_canaries"] = Embeddings.load(place / "embedded-canaries")
    config, compute, out = ToxicDirectionConfig(), Compute(device="cpu"), place / "decided"
    shutil.rmtree(out, ignore_errors=True)
    fitted = fit_scorer(config, embeddings, str(out / "scorer"), compute, **seen)
    scores = score_shards(config, fitted, embeddings, str(out / "scores"), compute)
    selection = select_samples(SelectConfig(), dataset, (scores,), str(out / "selection"), compute)
    removed = ~np.concatenate([selection.rows(shard)["keep"].to_numpy() for shard in selection.shards])
    poison, odd = truth["poison"].numpy(), truth["odd"].numpy()
    info = fitted.info
    finding = find(selection.read_json("selection.json"), {config.kind: info}, embedder.suspect, int(removed.sum()))
    return row | {
        "poisoned": int(poison.sum()),
        "recall": float((removed & poison).sum() / poison.sum()) if poison.any() else None,
        "clean removed": int((removed & ~poison).sum()),
        "odd": f"{int((removed & odd).sum())} of {int(odd.sum())}" if odd.any() else "",
        "canaries": [(canary["learned"], canary["recall"]) for canary in finding.canaries],
        "verdict": finding.verdict,
        "why": [reason.why for reason in finding.reasons],
    }


def _asr(trigger: Any, target: int, data: Images, embedder: Checkpoint) -> float:
    """Share of clean images of other classes that the trigger turns; the training images themselves."""
    rows = ((data.labels != target) & ~data.poison).nonzero()[:ROWS_PER_TEST, 0]
    images = trigger.apply(data.images[rows]).expand(-1, embedder.config.image_shape[0], -1, -1)
    model = embedder.model().eval()
    with torch.inference_mode():
        found = model(embedder.config.normalise(images)).argmax(1)
    return round(float((found == target).double().mean()), 3)


def _accuracy(embedder: Checkpoint) -> float:
    return round(float(embedder.read_json("history.json")[-1]["accuracy"]), 3)


def main() -> None:
    """Run or decide cases; print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--half", choices=list(HALVES))
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--decide", action="store_true", help="decide on stored cases once more")
    arguments = parser.parse_args()
    rows = []
    for half in [arguments.half] if arguments.half else HALVES:
        for name in arguments.only or HALVES[half]:
            place = place_of(arguments.folder, half, name)
            if name not in HALVES[half] or (arguments.decide and not (place / "row.json").exists()):
                continue
            if not arguments.decide and not (place / "row.json").exists():
                print(run_case(half, name, arguments.folder), flush=True)
            rows.append(decide(place))
            print(rows[-1], flush=True)
    columns = ["case", "half", "n", "train", "asr", "poisoned", "recall", "clean removed", "odd", "canaries", "verdict"]
    print_table(rows, columns, "data and attacks that chose nothing")


if __name__ == "__main__":
    main()
