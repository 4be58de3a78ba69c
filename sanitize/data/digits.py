"""Demo data without a download: scikit-learn's 1,797 handwritten digits as WebDataset shards."""

import sklearn.datasets
import torch

from sanitize.artifacts import Artifact, Part
from sanitize.compute import Compute
from sanitize.data.decode import encode_png
from sanitize.data.writer import shard_writer
from sanitize.stage import Work, stage


class Digits(Artifact):
    """`digits-NNNN.tar`: 8 x 8 grey PNG images, `.cls` labels 0 to 9."""

    def shards(self) -> list[str]:
        """Paths of the shards, sorted."""
        return [self.url(name) for name in sorted(self.manifest().files)]


@stage(Digits, gpu=False)
def write_digits(out: str, compute: Compute, n_shards: int = 12) -> Work:
    """Write the digits, shuffled by the seed and divided evenly among the shards."""

    def write(part: Part) -> None:
        digits = sklearn.datasets.load_digits()
        images_N1HW = torch.from_numpy(digits.images * 255 / 16).round().to(torch.uint8)[:, None]
        order_N = torch.randperm(len(images_N1HW), generator=compute.generator("digits"))
        for shard, rows in enumerate(order_N.tensor_split(n_shards)):
            with shard_writer(part, f"digits-{shard:04d}.tar") as tar:
                for row in rows.tolist():
                    tar.add(f"digit-{row:04d}.png", encode_png(images_N1HW[row]))
                    tar.add(f"digit-{row:04d}.cls", str(digits.target[row]).encode())
        part.counts["samples"] = len(order_N)

    return Work(write=write, config={"n_shards": n_shards})
