"""Real data for benchmarks, from the folder `../shared/data` beside the checkout, written as shards on the fly.

Images have the size and the channels they are stored with, and networks take them so: `Trigger.apply` on them is what
`sanitize.attack.triggered` gives of their shards.
"""

import csv
import gzip
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from PIL import Image
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
