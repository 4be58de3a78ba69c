"""Real data for benchmarks, from the folder `../shared/data` beside the checkout, written as shards on the fly.

Images have the size and the channels they are stored with, and networks take them so: `Trigger.apply` on them is what
`sanitize.attack.triggered` gives of their shards.
"""

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast

import numpy as np
import sklearn.datasets
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sanitize.artifacts import Artifact, Part, Recipe, make
from sanitize.data.decode import encode_png
from sanitize.data.writer import shard_writer

SHARED = Path(__file__).parents[2] / "shared" / "data"


class ImageShards(Artifact):
    """`SPLIT-NNNN.tar` shards of PNG images and `.cls` labels."""

    def paths(self) -> list[str]:
        """Paths of the shards, sorted."""
        return [self.url(name) for name in sorted(self.manifest().files)]


def fashion_mnist(split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) uint8 and labels (N,) int64 of "train" or "t10k"."""
    folder = SHARED / "fashion-mnist"
    if not folder.exists():
        raise SystemExit(f"{folder} is missing: this benchmark needs the shared data folder beside the checkout")
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def cifar10(split: str, shards: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 of "train" or "test", in the order of the shards.

    Args:
        split: train (ten shards) or test (two), 5,000 images each, drawn at random.
        shards: numbers of those to read; None is all.
    """
    images, labels = [], []
    for path in _cifar10_shards(split, shards):
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                payload = cast(IO[bytes], tar.extractfile(member)).read()
                if member.name.endswith(".jpg"):
                    images.append(np.asarray(Image.open(io.BytesIO(payload)).convert("RGB")))
                else:
                    labels.append(int(payload))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def cifar10n(kind: str, shards: Sequence[int] | None = None) -> Tensor:
    """Labels that people gave the training images of CIFAR-10 (Wei et al. 2022), (N,) int64, in the order of `cifar10`.

    Args:
        kind: aggre_label (the majority of three people), worse_label, random_label1 to 3, or clean_label.
        shards: as for `cifar10`.
    """
    with gzip.open(SHARED / "cifar10" / "index.csv.gz", "rt") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    names = {path.name.split(".")[0] for path in _cifar10_shards("train", shards)}
    placed = sorted((row["shard"], int(row["position"]), int(row["index"])) for row in rows if row["shard"] in names)
    labels_N = np.load(SHARED / "cifar10-labels" / "cifar10n-train-labels.npz")[kind].astype(np.int64)
    return torch.from_numpy(labels_N[[index for _, _, index in placed]])


def gtsrb(split: str, per_class: int | None = None) -> tuple[Tensor, Tensor]:
    """Traffic signs (N, 3, 32, 32) uint8 and labels (N,) int64, shuffled; tracks of 30 frames of one sign.

    Args:
        split: "train", or "test": the last track of each class. No track is in both.
        per_class: most images of a class, taken track by track; None is all.
    """
    by_class: dict[str, list[tuple[str, Tensor]]] = {}
    for key, member, payload in _members("gtsrb", "train-*.tar.gz"):
        if member.endswith(".webp"):
            by_class.setdefault(key.partition("-")[0], []).append((key, _rgb(payload, 32)))
    images, labels = [], []
    for name, signs in sorted(by_class.items()):
        last_track = max(key.rpartition("-")[0] for key, _ in signs)
        chosen = sorted(sign for sign in signs if (sign[0].rpartition("-")[0] == last_track) == (split == "test"))
        images += [image_CHW for _, image_CHW in chosen[:per_class]]
        labels += [int(name)] * len(chosen[:per_class])
    return _shuffled(torch.stack(images), torch.tensor(labels))


def flowers(split: str, size: int = 64) -> tuple[Tensor, Tensor]:
    """Photographs of flowers (N, 3, size, size) uint8 and labels (N,) int64, shuffled; cropped to squares.

    Args:
        split: "train" (1,200 images) or "test" (300).
        size: side of the images.
    """
    labels = {}
    images = {}
    for key, member, payload in _members("flowers", "flowers-*.tar"):
        if member.endswith(".jpg"):
            images[key] = _rgb(payload, size)
        else:
            labels[key] = int(json.loads(payload)["label"])
    images_NCHW = torch.stack([images[key] for key in sorted(images)])
    images_NCHW, labels_N = _shuffled(images_NCHW, torch.tensor([labels[key] for key in sorted(images)]))
    is_test_N = torch.arange(len(labels_N)) % 5 == 0
    chosen_N = is_test_N if split == "test" else ~is_test_N
    return images_NCHW[chosen_N], labels_N[chosen_N]


def digits(split: str) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits (N, 1, 8, 8) uint8 and labels (N,) int64, shuffled: 1,500 of "train", 297 of "test"."""
    bunch = sklearn.datasets.load_digits()
    images_NCHW = torch.from_numpy(bunch.images * 255 / 16).round().to(torch.uint8)[:, None]
    images_NCHW, labels_N = _shuffled(images_NCHW, torch.from_numpy(bunch.target.astype(np.int64)))
    return (images_NCHW[:1500], labels_N[:1500]) if split == "train" else (images_NCHW[1500:], labels_N[1500:])


def _members(folder: str, pattern: str) -> Iterator[tuple[str, str, bytes]]:
    """Key, name and content of all files in the shards of a folder of `../shared/data`."""
    paths = sorted((SHARED / folder).glob(pattern))
    if not paths:
        raise SystemExit(f"{SHARED / folder} is missing: this benchmark needs the shared data folder")
    for path in paths:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                yield member.name.partition(".")[0], member.name, cast(IO[bytes], tar.extractfile(member)).read()


def _rgb(payload: bytes, size: int) -> Tensor:
    """The image cropped around the centre to a square and scaled, uint8 (3, size, size)."""
    picture = ImageOps.fit(Image.open(io.BytesIO(payload)).convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def _shuffled(images_NCHW: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    order_N = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(0))
    return images_NCHW[order_N], labels_N[order_N]


def _cifar10_shards(split: str, shards: Sequence[int] | None) -> list[Path]:
    paths = sorted((SHARED / "cifar10").glob(f"{split}-*.tar.gz"))
    if not paths:
        raise SystemExit(f"{SHARED / 'cifar10'} is missing: this benchmark needs the shared data folder")
    return paths if shards is None else [paths[number] for number in shards]


def write_images(out: Path, split: str, images_NCHW: Tensor, labels_N: Tensor, per_shard: int = 1000) -> ImageShards:
    """Write images as shards of `per_shard` samples, in order."""

    def write(part: Part) -> None:
        for shard, start in enumerate(range(0, len(images_NCHW), per_shard)):
            with shard_writer(part, f"{split}-{shard:04d}.tar") as tar:
                for i in range(start, min(start + per_shard, len(images_NCHW))):
                    tar.add(f"{split}-{i:06d}.png", encode_png(images_NCHW[i]))
                    tar.add(f"{split}-{i:06d}.cls", str(int(labels_N[i])).encode())

    recipe = Recipe(stage="write_images", config={"split": split, "n": len(images_NCHW), "per_shard": per_shard})
    return make(ImageShards, out, recipe, write)
