"""Certify samples of a data set by the votes of a partition ensemble."""

from collections.abc import Sequence

import pyarrow as pa

from sanitize.artifacts import ArtifactBuilder, Part
from sanitize.certification.certificates import Certificates
from sanitize.certification.ensemble import PROVED
from sanitize.certification.partition import certified_poisons
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.tables import write_rows
from sanitize.errors import ConfigError
from sanitize.loop import predict
from sanitize.models.checkpoint import Checkpoint
from sanitize.stage import Advance, Bars, Work, stage


@stage(Certificates)
def certify_partitions(
    ensemble: Checkpoint, dataset: Dataset, out: str, compute: Compute, shards: Sequence[str] | None = None
) -> Work:
    """For each usable sample, the number of poisoned training samples that cannot change its prediction.

    Args:
        ensemble: an ensemble of `train_partitions`, or its package.
        dataset: samples to certify.
        out: folder of the artifact: rows with `radius`, a number of training samples, `n_top`, the votes for the
            prediction, and `n_rival`, those for the runner-up, which wins ties.
        compute: device and precision.
        shards: names of the shards to do now; None does all that are missing and finishes.

    Raises:
        ArtifactError: the model is no partition ensemble.
        ConfigError: the ensemble takes other images.
    """
    proved, config, model = ensemble.read_json(PROVED), ensemble.config, ensemble.model()
    if dataset.image_shape != config.image_shape:
        raise ConfigError(
            f"images are {dataset.image_shape}, {ensemble.path} takes {config.image_shape}: set index.image"
        )

    def write_part(shard: str, part: Part, advance: Advance) -> None:
        tables = []
        for batch in dataset.batches(512, [shard]):
            votes_BK = predict(model, batch.images_BCHW, config.normalise, compute).long()
            vote = certified_poisons(votes_BK)
            columns = {"position": batch.positions_B, "label": batch.labels_B} | vote._asdict()
            arrays = {name: values_B.numpy() for name, values_B in columns.items()}
            tables.append(pa.table({"key": batch.keys} | arrays))
            advance(len(batch.keys))
        if tables:
            write_rows(part, shard, pa.concat_tables(tables))
        part.counts.update(samples=sum(map(len, tables)))

    def finish(part: Part, _builder: ArtifactBuilder) -> None:
        part.write_json("certificate.json", proved)

    bar = Bars("certify", dataset.n_samples)
    return Work(parts=dataset.shards, write_part=write_part, finish=finish, bar=bar)
