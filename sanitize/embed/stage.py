"""Embed every usable sample once with the suspect model; all scorers read these embeddings."""

from collections.abc import Sequence
from itertools import accumulate

import pyarrow as pa
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from sanitize import exact
from sanitize.artifacts import Part
from sanitize.compute import CPU_ROWS, Compute
from sanitize.data.canaries import SHARD, Canaries
from sanitize.data.dataset import Dataset, ImageBatch
from sanitize.data.tables import Embeddings, fixed_size_list, write_rows
from sanitize.embed.label_free import oriented_gradients, reduced_pixels
from sanitize.errors import NumericsError
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.taps import Tapped, find_taps
from sanitize.stage import Advance, Bars, Work, stage

EMBEDDINGS = ("penultimate", "pooled", "early", "pixels", "gradients")  # not every network has `pooled` and `early`


class EmbedConfig(BaseModel):
    """Settings of the embeddings.

    Attributes:
        penultimate: name of the Linear whose input is the embedding; None takes the last Linear that runs.
        pixel_side: largest height and width of the averaged image in the embedding `pixels`.
        gradient_cells: cells a side in the embedding `gradients`.
        batch_size: images read at once, and on a GPU the size of every forward pass (on a CPU it is 32;
            `Compute.full_blocks`). Part of the recipe: kernels may round differently at other sizes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    penultimate: str | None = None
    pixel_side: int = Field(default=14, ge=1)
    gradient_cells: int = Field(default=7, ge=1)
    batch_size: int = Field(default=256, ge=1)


@stage(Embeddings, version=3)
def embed_shards(
    config: EmbedConfig,
    dataset: Dataset,
    checkpoint: Checkpoint,
    out: str,
    compute: Compute,
    shards: Sequence[str] | None = None,
) -> Work:
    """Embed every usable sample.

    On a CPU the embeddings of a sample depend on the model and its image alone, to the bit, not on its shard or batch
    (`tests/embed/test_stage.py`, for every architecture of the library). On a GPU all forward passes have one shape;
    its libraries may still round a row differently at different places of a batch.

    Args:
        config: layer and batch size.
        dataset: samples to embed.
        checkpoint: the suspect model.
        out: folder of the artifact.
        compute: device and precision.
        shards: names of the shards to do now; None does all that are missing and finishes.

    Returns:
        Embeddings with `logits`, `penultimate`, if the network has feature maps `pooled`, and if it has a layer before
        the head `early`, at most 128 columns; and two that use neither labels nor model: `pixels` (`reduced_pixels`)
        and `gradients` (`oriented_gradients`).

    Raises:
        NumericsError: an embedding is not finite; the message names the shard and the key.
        ConfigError: the model has no Linear to take embeddings from.
    """
    tapped: list[Tapped] = []  # the model is loaded when the first missing part needs it
    embedded: dict[str, list[pa.Table]] = {}  # small shards behind the one that is written; see `_together`
    wanted = list(dataset.shards if shards is None else shards)
    place = {shard: i for i, shard in enumerate(wanted)}

    def write_part(shard: str, part: Part, advance: Advance) -> None:
        if not tapped:
            tapped.append(_load(config, checkpoint, compute))
        if shard not in embedded:
            group = _together(dataset, wanted[place[shard] : place[shard] + CPU_ROWS], compute)
            embedded.clear()
            embedded.update({name: [] for name in group})
            batches = dataset.batches(config.batch_size, group)
            for some in [list(batches)] if len(group) > 1 else ([batch] for batch in batches):
                tables = _embed(config, tapped[0], some, checkpoint, compute) if some else []
                for batch, table in zip(some, tables, strict=True):
                    embedded[batch.shard].append(table)
                    advance(len(table))
        tables = embedded.pop(shard)
        if tables:
            write_rows(part, shard, pa.concat_tables(tables))
            part.counts["samples"] += sum(map(len, tables))

    return Work(parts=dataset.shards, write_part=write_part, bar=Bars("embed", dataset.n_samples))


@stage(Embeddings, version=1)
def embed_canaries(config: EmbedConfig, canaries: Canaries, checkpoint: Checkpoint, out: str, compute: Compute) -> Work:
    """Embed canaries as `embed_shards` does samples, into one table; without canaries there is no table.

    Args:
        config: settings of the embeddings of the samples.
        canaries: the copies with triggers.
        checkpoint: the suspect model that was trained with them.
        out: folder of the artifact.
        compute: device and precision.

    Raises:
        NumericsError, ConfigError: as for `embed_shards`.
    """

    def write(part: Part) -> None:
        if canaries.n_samples:
            (table,) = _embed(config, _load(config, checkpoint, compute), [canaries.batch()], checkpoint, compute)
            write_rows(part, SHARD, table)
        part.counts["samples"] = canaries.n_samples

    return Work(write=write)


def _together(dataset: Dataset, shards: Sequence[str], compute: Compute) -> Sequence[str]:
    """The first of these shards, and those behind it whose samples fit into one block with its own.

    A block costs the same however few samples it has. On a GPU the first alone, where the place of an image in a block
    may change its bits.
    """
    if compute.torch_device.type != "cpu":
        return shards[:1]
    n_samples = accumulate(dataset.counts(shard)[1] for shard in shards)
    return shards[: max(1, sum(n <= CPU_ROWS for n in n_samples))]


def _load(config: EmbedConfig, checkpoint: Checkpoint, compute: Compute) -> Tapped:
    model = checkpoint.model()
    if compute.torch_device.type == "cpu":
        exact.make_narrow_linears_exact(model)
    taps = find_taps(model, checkpoint.config.example(), config.penultimate)
    return Tapped(model.to(compute.torch_device, memory_format=torch.channels_last), taps)  # type: ignore[call-overload]


def _embed_block(
    config: EmbedConfig, tapped: Tapped, images_bCHW: Tensor, checkpoint: Checkpoint, compute: Compute, n: int
) -> dict[str, Tensor]:
    """All embeddings of the first `n` images of a block, float32 on the CPU."""
    with torch.inference_mode(), compute.autocast():
        images_bCHW = images_bCHW.to(compute.torch_device)
        x_bCHW = checkpoint.config.normalise(images_bCHW)
        seen = tapped(x_bCHW.contiguous(memory_format=torch.channels_last))
    seen["pixels"] = reduced_pixels(images_bCHW, config.pixel_side)
    seen["gradients"] = oriented_gradients(images_bCHW, config.gradient_cells)
    return {name: x_bD[:n].float().cpu() for name, x_bD in seen.items()}


def _joined(blocks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def _embed(
    config: EmbedConfig, tapped: Tapped, batches: Sequence[ImageBatch], checkpoint: Checkpoint, compute: Compute
) -> list[pa.Table]:
    """One table a batch; they share blocks."""
    blocks = compute.full_blocks(torch.cat([batch.images_BCHW for batch in batches]), config.batch_size)
    seen = _joined([_embed_block(config, tapped, images_bCHW, checkpoint, compute, n) for images_bCHW, n in blocks])
    sizes = [len(batch.keys) for batch in batches]
    parts = {name: x_BD.split(sizes) for name, x_BD in seen.items()}
    return [_table(batch, {name: parts[name][i] for name in parts}) for i, batch in enumerate(batches)]


def _table(batch: ImageBatch, seen: dict[str, Tensor]) -> pa.Table:
    columns: dict[str, pa.Array] = {
        "position": pa.array(batch.positions_B.numpy()),
        "key": pa.array(batch.keys),
        "shard": pa.array([batch.shard] * len(batch.keys)),
        "label": pa.array(batch.labels_B.numpy()),
    }
    for name in ("logits", "penultimate", "pooled", "early", "pixels", "gradients"):
        if name in seen:
            x_BD = seen[name]
            if not (finite_B := x_BD.isfinite().all(1)).all():
                key = batch.keys[int((~finite_B).nonzero()[0])]
                raise NumericsError(f"{name} of {batch.shard}, key {key}, is not finite; check the model's weights")
            columns[name] = fixed_size_list(x_BD)
    return pa.table(columns)
