"""Demo data that needs no download: scikit-learn's 1,797 handwritten digits, written as WebDataset shards."""

import sklearn.datasets
import torch

from sanitize.artifacts import Artifact, Part, Recipe, make
from sanitize.compute import Compute
from sanitize.data.decode import encode_png
from sanitize.data.writer import shard_writer


class Digits(Artifact):
    """`train-NNNN.tar` and `test-NNNN.tar`: 8 x 8 grey PNG images, `.cls` labels 0 to 9."""

    def shards(self, split: str) -> list[str]:
        """Paths of the shards of "train" or "test", sorted."""
        return [str(self.file(name)) for name in sorted(self.manifest().files) if name.startswith(split)]


def write_digits(out: str, compute: Compute, n_train_shards: int = 10, n_test_shards: int = 2) -> Digits:
    """Write the digits, shuffled by the seed, about equally many in each shard."""
    recipe = Recipe(
        stage="write_digits",
        config={"n_train_shards": n_train_shards, "n_test_shards": n_test_shards},
        numerics=compute.numerics,
    )

    def write(part: Part) -> None:
        digits = sklearn.datasets.load_digits()
        images_N1HW = torch.from_numpy(digits.images * 255 / 16).round().to(torch.uint8)[:, None]
        order_N = torch.randperm(len(images_N1HW), generator=compute.generator("digits"))
        names = [f"train-{i:04d}.tar" for i in range(n_train_shards)] + [
            f"test-{i:04d}.tar" for i in range(n_test_shards)
        ]
        for name, rows in zip(names, order_N.tensor_split(len(names)), strict=True):
            with shard_writer(part, name) as tar:
                for row in rows.tolist():
                    tar.add(f"digit-{row:04d}.png", encode_png(images_N1HW[row]))
                    tar.add(f"digit-{row:04d}.cls", str(digits.target[row]).encode())
        part.counts["samples"] = len(order_N)

    return make(Digits, out, recipe, write)
