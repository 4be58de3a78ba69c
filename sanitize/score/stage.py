"""Fit a scorer on embeddings, then score every sample. Scorers themselves open no files."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any

import pyarrow as pa
import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor, nn

from sanitize.artifacts import Artifact, Part, first_line
from sanitize.compute import Compute
from sanitize.data.canaries import Canaries
from sanitize.data.dataset import Dataset
from sanitize.data.shuffle import usable_rows
from sanitize.data.tables import EmbeddingBatch, Embeddings, Scores, write_rows
from sanitize.errors import ArtifactError, ConfigError, NumericsError
from sanitize.models.checkpoint import Checkpoint
from sanitize.progress import track
from sanitize.score.anomaly_scorer import RCAScorerConfig, RobustRealNVPScorerConfig
from sanitize.score.label_margin import LabelMarginConfig
from sanitize.score.neighbours import NeighboursConfig
from sanitize.score.scorer import Scorer, position_hashes
from sanitize.score.spectral import SpectralConfig
from sanitize.score.toxic_direction import ToxicDirection, ToxicDirectionConfig
from sanitize.score.toxic_direction.canary import Planted as PlantedCanaries
from sanitize.score.toxic_direction.scorer import sample_seed
from sanitize.score.toxic_direction.stamp import Suspect
from sanitize.stage import Advance, Work, stage

ScorerConfig = Annotated[
    LabelMarginConfig
    | NeighboursConfig
    | RCAScorerConfig
    | RobustRealNVPScorerConfig
    | SpectralConfig
    | ToxicDirectionConfig,
    Field(discriminator="kind"),
]
EXAMPLES = 8  # samples of a group that are named for the report
_READ, _FORWARD = 64, 256  # images decoded at once, and of a forward pass on a GPU
_SCHEMA = pa.schema({"key": pa.string(), "position": pa.int64(), "label": pa.int64(), "score": pa.float32()})


class FittedScorer(Artifact):
    """`state.safetensors` and `scorer.json` (config, class statistics, excluded shards)."""

    @cached_property
    def info(self) -> dict[str, Any]:
        """scorer.json: `config`; `rule`: kind of the default rule; `classes`: label -> statistics; `exclude`: shards.

        Of toxic_direction also `canaries`, and `finding`, each group with `examples`: shard and position of some of its
        samples.
        """
        return self.read_object("scorer.json", "config", "classes")

    def scorer(self, config: ScorerConfig) -> Scorer:
        """The scorer, ready to score.

        Raises:
            ConfigError: the scorer was fitted with another config.
            ArtifactError: the files do not hold the state of such a scorer.
        """
        if config.model_dump(mode="json") != self.info["config"]:
            raise ConfigError(f"the scorer in {self.path} was fitted with another configuration: {self.info['config']}")
        scorer = config.build()
        state = self.read_tensors("state.safetensors")
        try:
            scorer.load_state(state, {int(label): values for label, values in self.info["classes"].items()})
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            raise ArtifactError(f"{self.path} does not hold the state of a {config.kind} scorer ({why})") from error
        return scorer


@stage(FittedScorer, version=9)
def fit_scorer(
    config: ScorerConfig,
    embeddings: Embeddings,
    out: str,
    compute: Compute,
    exclude: Sequence[str] = (),
    dataset: Dataset | None = None,
    model: Checkpoint | None = None,
    canaries: Canaries | None = None,
    embedded_canaries: Embeddings | None = None,
) -> Work:
    """Fit a scorer on embeddings; only toxic_direction uses the images and the model, where there are both.

    Canaries change nothing of the scorer; scorer.json says which of them it finds.

    Args:
        config: settings of the scorer.
        embeddings: embeddings to fit on; read as a stream, several times.
        out: folder of the artifact.
        compute: seed of the hash-chosen samples; device and precision of the model.
        exclude: shards not to fit on: the trusted ones, because rules compare with their scores.
        dataset: the samples that were embedded.
        model: the model that embedded them. Without images and model, stamps are not measured, and a group that only a
            stamp can decide on makes the verdict inconclusive.
        canaries: samples with known triggers that the model was trained on beside the data; for toxic_direction.
        embedded_canaries: their embeddings.

    Raises:
        ConfigError: the embedding of the scorer is missing.
        DataError: a shard has changed since it was indexed.
    """
    excluded = {"exclude": sorted(exclude)}
    shards = [shard for shard in embeddings.shards if shard not in exclude]
    planted = None
    if canaries is not None and embedded_canaries is not None:
        planted = PlantedCanaries(canaries, embedded_canaries)

    def write(part: Part) -> None:
        scorer = config.build()
        with track(f"fit {config.kind}", None) as advance:

            def one_pass(name: str | Sequence[str]) -> Iterator[EmbeddingBatch]:
                for batch in embeddings.batches(name, shards=shards):
                    advance(len(batch.keys))
                    yield batch

            if isinstance(scorer, ToxicDirection):
                suspect = None
                if dataset is not None and model is not None:
                    suspect = suspect_of(dataset, model, shards, compute)
                scorer.fit(one_pass, compute, suspect, planted)
            else:
                scorer.fit(one_pass, compute)
        part.write("state.safetensors", safetensors.torch.save(scorer.state_dict()))
        finding: dict[str, Any] = {}
        if isinstance(scorer, ToxicDirection):
            examples = examples_of(scorer.members, embeddings, shards, sample_seed(compute))
            pairs = zip(scorer.finding["groups"], examples, strict=True)
            finding["finding"] = scorer.finding | {"groups": [group | {"examples": some} for group, some in pairs]}
        if isinstance(scorer, ToxicDirection) and planted is not None:
            finding["canaries"] = scorer.canaries
        info = {"config": config.model_dump(mode="json"), "rule": config.rule, "classes": scorer.statistics}
        part.write_json("scorer.json", info | finding | excluded)

    return Work(write=write, config=config.model_dump(mode="json") | excluded)


def examples_of(
    members: Sequence[Sequence[int]], embeddings: Embeddings, shards: Sequence[str], seed: int
) -> list[list[dict[str, Any]]]:
    """Shard and position of at most `EXAMPLES` samples of each group.

    Shards are taken in the order of a hash, and so are the samples of a shard. All groups share the first shards where
    they can, so that a report of many shards reads few of them.

    Args:
        members: hashes of the samples of each group, by `row_hashes`.
        embeddings: embeddings of all samples; only positions are read.
        shards: shards that hold the samples.
        seed: seed of the hashes.
    """
    groups_of: dict[int, list[int]] = {}
    for i, hashes in enumerate(members):
        for value in hashes:
            groups_of.setdefault(value, []).append(i)
    found: list[list[dict[str, Any]]] = [[] for _ in members]
    for shard in sorted(shards, key=lambda name: position_hashes(name, [-1], seed)):
        if all(len(some) >= min(EXAMPLES, len(hashes)) for some, hashes in zip(found, members, strict=True)):
            break
        positions = embeddings.rows(shard, ["position"])["position"].to_pylist()
        named = zip(position_hashes(shard, positions, seed), positions, strict=True)
        for value, position in sorted(pair for pair in named if pair[0] in groups_of):
            for i in groups_of[value]:
                if len(found[i]) < EXAMPLES:
                    found[i].append({"shard": shard, "position": position})
    return found


def suspect_of(dataset: Dataset, checkpoint: Checkpoint, shards: Sequence[str], compute: Compute) -> Suspect:
    """The model, loaded when a group needs it, and the images of these shards, read by the hashes of their positions.

    Only usable samples are read, and of them only the images that are wanted are decoded.
    """
    device, seed = compute.torch_device, sample_seed(compute)
    loaded: list[nn.Module] = []

    def read(row_of: Mapping[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
        with track("read images of groups", len(row_of)) as advance:
            for shard in shards:
                positions = usable_rows(dataset, shard)["position"].to_pylist()
                hashes = position_hashes(shard, positions, seed)
                row_at = {p: row_of[value] for p, value in zip(positions, hashes, strict=True) if value in row_of}
                for batch in dataset.batches(_READ, [shard], {shard: row_at}) if row_at else ():
                    advance(len(batch.keys))
                    yield torch.tensor([row_at[p] for p in batch.positions_B.tolist()]), batch.images_BCHW

    def predict(images_BCHW: Tensor) -> Tensor:
        if not loaded:
            loaded.append(checkpoint.model().to(device, memory_format=torch.channels_last))  # type: ignore[call-overload]
        found = []
        with torch.inference_mode(), compute.autocast():
            for images_bCHW, n in compute.full_blocks(images_BCHW, _FORWARD):
                x_bCHW = checkpoint.config.normalise(images_bCHW).contiguous(memory_format=torch.channels_last)
                found.append(loaded[0](x_bCHW)[:n].argmax(1))
        return torch.cat(found)

    return Suspect(read, predict, device)


@stage(Scores, version=4, gpu=False, draws="nothing")
def score_shards(
    config: ScorerConfig,
    fitted: FittedScorer,
    embeddings: Embeddings,
    out: str,
    compute: Compute,
    shards: Sequence[str] | None = None,
) -> Work:
    """Score every embedded sample.

    Args:
        config: config that the scorer was fitted with.
        fitted: the scorer.
        embeddings: embeddings to score.
        out: folder of the artifact.
        compute: not used; nothing is random.
        shards: names of the shards to do now; None does all missing shards and finishes.

    Raises:
        NumericsError: a score is not finite; the message names shard and key.
    """
    scorer = fitted.scorer(config)

    def write_part(shard: str, part: Part, _advance: Advance) -> None:
        tables = []
        for batch in embeddings.batches(config.scored, shards=[shard]):
            scores_B = scorer.score(batch)
            if not (finite_B := scores_B.isfinite()).all():
                key = batch.keys[int((~finite_B).nonzero()[0])]
                raise NumericsError(f"{config.kind} score of {shard}, key {key}, is not finite")
            columns = {
                "position": batch.positions_B.numpy(),
                "label": batch.labels_B.numpy(),
                "score": scores_B.numpy(),
            }
            tables.append(pa.table({"key": batch.keys, **columns}))
        # The calibration half of a small reference may have no rows.
        write_rows(part, shard, pa.concat_tables(tables) if tables else _SCHEMA.empty_table())
        part.counts["samples"] += sum(map(len, tables))

    return Work(
        parts=embeddings.shards,
        write_part=write_part,
        finish=lambda part, _: part.write_json("scorer.json", fitted.info),
    )
