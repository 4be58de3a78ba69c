"""Certify samples of a data set by randomized smoothing."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
from pydantic import Field, model_validator

from sanitize.artifacts import ArtifactBuilder, Part, partial_of
from sanitize.certification.certificates import Certificates
from sanitize.certification.smoothing import SmoothingConfig, certify, lower_bound, radius
from sanitize.compute import Compute
from sanitize.data.chosen import choose_samples, read_chosen
from sanitize.data.dataset import Dataset, ImageBatch
from sanitize.data.tables import write_rows
from sanitize.errors import ConfigError, NumericsError
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.pixels import OnPixels
from sanitize.plural import counted
from sanitize.stage import Advance, Bars, Work, stage
from sanitize.storage import is_local, local_path

_SCHEMA = pa.schema(
    {
        "position": pa.int64(),
        "key": pa.string(),
        "label": pa.int64(),
        "prediction": pa.int64(),
        "radius": pa.float64(),
        "p_lower": pa.float64(),
        "n_top": pa.int64(),
        "n": pa.int64(),
    }
)


class CertifySmoothingConfig(SmoothingConfig):
    """Settings of the certification, and number of samples.

    n copies that all agree prove a probability of alpha^(1/n): no radius is larger than sigma Phi^-1(alpha^(1/n)), and
    no image can be certified if that probability is at most 1/2.

    | n | 10 | 20 | 50 | 100 | 1,000 | 10,000 | 100,000 |
    |---|---|---|---|---|---|---|---|
    | largest radius in units of sigma, alpha .001 | 0.003 | 0.55 | 1.14 | 1.51 | 2.47 | 3.20 | 3.82 |

    Attributes:
        max_images: number of usable samples to certify, chosen by a keyed hash of shard and key; None takes all.
    """

    max_images: int | None = Field(default=500, ge=1)

    @property
    def largest_radius(self) -> float:
        """Radius of an image if all n copies agree; 0 if no image can be certified."""
        return float(radius(lower_bound(self.n, self.n, self.alpha), self.sigma))

    def refuse_if_hopeless(self) -> None:
        """Raise ConfigError if n copies cannot certify any image at level alpha."""
        if self.largest_radius > 0:
            return
        n = max(1, int(-math.log2(self.alpha)))
        while not lower_bound(n, n, self.alpha) > 0.5:
            n += 1
        reach = self.model_copy(update={"n": n}).largest_radius
        raise ConfigError(
            f"with n = {self.n} no image can be certified at alpha {self.alpha:g}, even if all copies agree: take n >= "
            f"{n}. The largest radius there can be is sigma Phi^-1(alpha^(1/n)): {_rounded(reach)} at n = {n}, "
            f"{_rounded(self.model_copy(update={'n': 1000}).largest_radius)} at n = 1000"
        )

    @model_validator(mode="after")
    def _something_can_be_certified(self) -> Self:
        self.refuse_if_hopeless()
        return self


def _rounded(reach: float) -> str:
    """Three digits, rounded up, for an upper bound."""
    digits = 2 - math.floor(math.log10(reach))
    return f"{math.ceil(reach * 10**digits) / 10**digits:g}"


@stage(Certificates, version=3)
def certify_smoothing(
    config: CertifySmoothingConfig,
    checkpoint: Checkpoint,
    dataset: Dataset,
    out: str,
    compute: Compute,
    shards: Sequence[str] | None = None,
) -> Work:
    """Certify usable samples by Algorithm CERTIFY.

    Finished rows are appended to a journal in the folder of the unfinished artifact, if it is on a disk: a killed run
    resumes after the last finished image, to the same bytes.

    Args:
        config: noise, copies, level, and how many samples.
        checkpoint: the base classifier, best trained under the same noise (`optim.noise_sd`).
        dataset: samples to certify.
        out: folder of the artifact.
        compute: device, precision (part of the certified function) and seed of the noise.
        shards: names of the shards to do now; None does all that are missing and finishes.

    Raises:
        ConfigError: n copies cannot certify any image.
        NumericsError: a logit is not finite; the message names shard and keys.
    """
    config.refuse_if_hopeless()  # model_copy(update=...) does not validate

    @cache  # loaded for the first missing part
    def prepared() -> tuple[OnPixels, Mapping[str, set[int]]]:
        model = OnPixels(checkpoint.model(), checkpoint.config)
        return model, choose_samples(dataset, config.max_images, compute)

    def write_part(shard: str, part: Part, advance: Advance) -> None:
        model, chosen = prepared()
        if shard not in chosen:
            return
        journal = Journal(local_path(partial_of(out)) / "journal" / f"{shard}.jsonl") if is_local(out) else None
        done = dict(journal.read()) if journal else {}
        rows: list[dict[str, Any]] = []
        for group in read_chosen(dataset, shard, chosen[shard], config.images_at_once):
            first = int(group.positions_B[0])
            if first not in done:
                done[first] = _certify(model, group, config, compute)
                if journal is not None:
                    journal.append(first, done[first])
            rows += done[first]
            advance(len(group.keys))
        write_rows(part, shard, pa.Table.from_pylist(rows, schema=_SCHEMA))
        part.counts.update(samples=len(rows), abstained=sum(row["prediction"] < 0 for row in rows))

    def finish(part: Part, _builder: ArtifactBuilder) -> None:
        part.write_json("certificate.json", _proved(config, compute))

    n_images = min(config.max_images or dataset.n_samples, dataset.n_samples)
    bar = Bars("certify", n_images, "images")
    return Work(parts=dataset.shards, write_part=write_part, finish=finish, bar=bar)


def _proved(config: CertifySmoothingConfig, compute: Compute) -> dict[str, Any]:
    """The statement of these certificates."""
    return {
        "kind": "smoothing",
        "source": "Randomized smoothing, Cohen, Rosenfeld & Kolter 2019",
        "radius_unit": "l2, pixels on [0, 1]",
        "integral": False,
        "open": True,
        "confidence": 1 - config.alpha,
        "largest_radius": config.largest_radius,
        "parameters": config.model_dump(mode="json", exclude={"batch_size"}) | {"precision": compute.precision},
        "scope": {
            "threat": "changes of the image that is classified",
            "statement": (
                "The smoothed classifier returns the class that the model predicts most often for copies of an image "
                f"with Gaussian noise of standard deviation {config.sigma:g}. It returns the same class for every "
                "image closer than the radius in l2 (pixels on [0, 1]). For each image alone this holds with a "
                f"probability of at least {1 - config.alpha:g} over the noise that was drawn. With "
                f"{counted(config.n, 'copy')} and sigma {config.sigma:g} "
                f"no radius can be larger than {_rounded(config.largest_radius)}."
            ),
            "not_covered": [
                "the model without the noise",
                "poisoned training data",
                "changes that are small to the eye and large in l2: rotation, crop, brightness",
                "forward passes in another precision than the certified one",
            ],
        },
    }


def _certify(model: OnPixels, group: ImageBatch, config: SmoothingConfig, compute: Compute) -> list[dict[str, Any]]:
    try:
        found = certify(model, group.images_BCHW, config, compute)
    except NumericsError as error:
        raise NumericsError(f"{error} (shard {group.shard}, {', '.join(group.keys[:8])})") from error
    columns = (group.positions_B, group.keys, group.labels_B, *found)
    values = (column if isinstance(column, list) else column.tolist() for column in columns)
    return [dict(zip(_SCHEMA.names, row, strict=True)) for row in zip(*values, strict=True)]


class Journal:
    """Rows of finished groups, one line of JSON a group, appended as they finish.

    Reading the journal removes an incomplete line and everything after it; those groups are certified again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """For each group, the position of its first sample and its rows."""
        if not self._path.exists():
            return
        whole = 0
        with self._path.open("rb") as file:
            for line in file:
                try:
                    first, rows = json.loads(line)
                except (ValueError, TypeError):
                    break
                if not line.endswith(b"\n"):
                    break
                yield first, rows
                whole += len(line)
        with self._path.open("r+b") as file:
            file.truncate(whole)

    def append(self, first: int, rows: list[dict[str, Any]]) -> None:
        """Append the rows of a group; afterwards a killed process does not lose them."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(json.dumps([first, rows], separators=(",", ":")).encode() + b"\n")
