"""The page about modified training images: examples before and after, the variance kept, and the noise."""

from collections.abc import Iterator

import torch
from markupsafe import Markup
from torch import Tensor

from sanitize.artifacts import Part
from sanitize.compute import Compute
from sanitize.data.chosen import chosen_images
from sanitize.data.dataset import Dataset
from sanitize.data.decode import encode_png
from sanitize.data.samples import SampleLimits, ShardReader
from sanitize.data.shuffle import usable_rows
from sanitize.denoising import PCA, DenoiseConfig, Denoised, PCANoise
from sanitize.report import charts
from sanitize.report.page import Report, write_page
from sanitize.report.pictures import shrink
from sanitize.report.robustness import thinned
from sanitize.stage import Work, stage

_N_IMAGES = 10
_SIDE = 64  # pixels of a picture


@stage(Report, gpu=False, version=3)
def write_denoising_report(pca: PCA, dataset: Dataset, denoised: Denoised, out: str, compute: Compute) -> Work:
    """Write the page about denoised shards.

    Args:
        pca: principal components of the images.
        dataset: the images before.
        denoised: the images after.
        out: folder of the artifact: `index.html`, and `report.json` with the same numbers for machines.
        compute: seed of the sampled images.
    """
    made = denoised.manifest().recipe
    config = DenoiseConfig.model_validate(made.config)

    def write(part: Part) -> None:
        components = pca.components
        modify = PCANoise(config, components, torch.device("cpu"))
        kept = components.energy(modify.dims)
        at = thinned(min(3 * modify.dims, len(components.values_R)))  # what follows is flat
        n_pixels = torch.Size(dataset.image_shape).numel()
        numbers = {
            "headline": f"{modify.dims:,} of {n_pixels:,} directions are kept: {kept:.2%} of the variance.",
            "dims": modify.dims,
            "scale": config.scale,
            "energy_kept": kept,
            "samples": denoised.manifest().counts.get("samples", 0),
            "digest": denoised.digest,
            "recipe": made.model_dump(mode="json"),
        }
        noise_DM = components.vectors_DR[:, modify.dims : modify.dims + modify.n_noise]
        shares = [components.energy(i + 1) for i in at]
        drawing = charts.curves([i + 1 for i in at], {"energy": shares}, "components d", share=True)
        shown = {
            "energy": Markup(drawing),
            "strip": _strip(dataset, denoised, compute),
            "components": [_png(_as_picture(v_D.view(dataset.image_shape))) for v_D in noise_DM.T],
        }
        write_page(part, "denoising", numbers, **shown)

    return Work(write=write)


def _strip(dataset: Dataset, denoised: Denoised, compute: Compute) -> list[tuple[bytes, bytes]]:
    chosen = chosen_images(dataset, _N_IMAGES, compute)
    after: dict[tuple[str, int], Tensor] = {}
    for shard in set(chosen.shards):
        positions = {at for name, at in zip(chosen.shards, chosen.positions, strict=True) if name == shard}
        after |= {(shard, at): image_CHW for at, image_CHW in _written(dataset, denoised, shard, positions)}
    names = zip(chosen.shards, chosen.positions, strict=True)
    return [(_png(x_CHW), _png(after[name])) for name, x_CHW in zip(names, chosen.images_NCHW, strict=True)]


def _written(dataset: Dataset, denoised: Denoised, shard: str, positions: set[int]) -> Iterator[tuple[int, Tensor]]:
    """Images of the samples at these source positions; a shard is written in the order of its usable samples."""
    before = usable_rows(dataset, shard)["position"].to_pylist()
    limits = SampleLimits.model_validate(dataset.info["limits"])
    for position, sample in zip(before, ShardReader(denoised.url(f"shards/{shard}"), limits), strict=True):
        if position in positions:
            yield position, denoised.image(sample, dataset.image_member)


def _as_picture(component_CHW: Tensor) -> Tensor:
    """Zero is grey, the largest entry black or white."""
    return (127.5 + 127.5 * component_CHW / component_CHW.abs().max()).round().to(torch.uint8)


def _png(image_CHW: Tensor) -> bytes:
    return encode_png(shrink(image_CHW, _SIDE))
