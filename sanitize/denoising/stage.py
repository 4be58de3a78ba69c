"""Write shards of modified training images."""

import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sanitize.artifacts import Artifact, ArtifactBuilder, Part
from sanitize.compute import Compute
from sanitize.data.class_names import CLASSES_FILE
from sanitize.data.dataset import Dataset
from sanitize.data.decode import ImageConfig, decode, encode_png
from sanitize.data.samples import Sample, find_image, in_format
from sanitize.data.writer import shard_writer, write_class_names
from sanitize.denoising.pca import PCA
from sanitize.denoising.pca_noise import PCANoise, PCANoiseConfig
from sanitize.stage import Advance, Bars, Work, stage
from sanitize.tar.compression import unread_suffix
from sanitize.tar.write import TarWriter


class DenoiseConfig(PCANoiseConfig):
    """Modification of the images, and their file format.

    Attributes:
        member: png (8 bits, clipped to [0, 255]) or npy (float32 (C, H, W), 255 times a pixel on [0, 1], exact).
            Clipping removes part of the noise: see docs/methods.md.
    """

    member: Literal["png", "npy"] = Field(default="png")


class Denoised(Artifact):
    """`shards/SHARD`: the usable samples with modified images; other members are unchanged. Beside them lies
    `classes.json`, if the classes of the data set have names."""

    def shard_paths(self) -> list[str]:
        """Paths of the shards, sorted."""
        names = sorted(name for name in self.manifest().files if name.startswith("shards/"))
        return [self.url(name) for name in names if not name.endswith(f"/{CLASSES_FILE}")]

    def image(self, sample: Sample, member: str | None = None) -> Tensor:
        """The modified image of a sample of these shards, rounded to uint8, (C, H, W).

        `member`: `ImageConfig.member` of the data set.
        """
        arrays = [payload for name, payload in sample.members if name.endswith(".npy")]
        if arrays and self.manifest().recipe.config["member"] == "npy":
            return _rounded(torch.from_numpy(np.load(io.BytesIO(arrays[0]), allow_pickle=False)))
        return decode(find_image(sample, member)[1], ImageConfig())


@stage(Denoised, version=2, gpu=False)
def denoise_shards(
    config: DenoiseConfig,
    pca: PCA,
    dataset: Dataset,
    out: str,
    compute: Compute,
    shards: Sequence[str] | None = None,
) -> Work:
    """Write a copy of the shards with modified images, in the order of the samples.

    The noise of a sample is drawn from a stream named by its shard, key and position, independent of order and workers.

    Args:
        config: modification and file format.
        pca: components of the same images.
        dataset: samples to copy; unreadable samples are left out.
        out: folder of the artifact.
        compute: seed of the noise.
        shards: names of the shards to do now; None does all that are missing and finishes.
    """
    modify = PCANoise(config, pca.components, torch.device("cpu"))
    image = ImageConfig.model_validate(dataset.info["image"] | {"size": dataset.image_shape[1:]})

    def write_part(shard: str, part: Part, advance: Advance) -> None:
        if unread_suffix(shard):
            return  # the shard was not read, and a file written here must match its suffix
        with shard_writer(part, f"shards/{shard}") as tar:
            for sample, row in dataset.samples(shard):
                if row["status"] == "ok":
                    generator = compute.generator("denoise", shard, row["key"], row["position"])
                    _copy(sample, modify, generator, config.member, image, tar)
                    part.counts["samples"] += 1
                    advance(1)

    def finish(part: Part, _builder: ArtifactBuilder) -> None:
        write_class_names(part, (f"shards/{shard}" for shard in dataset.shards), dataset.class_names)

    return Work(parts=dataset.shards, write_part=write_part, finish=finish, bar=Bars("denoise", dataset.n_samples))


def _copy(
    sample: Sample, modify: PCANoise, generator: torch.Generator, member: str, image: ImageConfig, tar: TarWriter
) -> None:
    image_name, data = find_image(sample, image.member)
    image_CHW = decode(data, image)
    xi_1m = torch.randn(1, modify.n_noise, generator=generator)
    modified_CHW = 255 * modify(image_CHW[None].float() / 255, xi_1m)[0]
    for name, payload in sample.members:
        if name == image_name:
            tar.add(in_format(name, member), _encoded(modified_CHW, member))
        else:
            tar.add(name, payload)


def _encoded(image_CHW: Tensor, member: str) -> bytes:
    if member == "png":
        return encode_png(_rounded(image_CHW))
    sink = io.BytesIO()
    np.save(sink, image_CHW.numpy(), allow_pickle=False)
    return sink.getvalue()


def _rounded(image_CHW: Tensor) -> Tensor:
    return image_CHW.round().clamp(0, 255).to(torch.uint8)
