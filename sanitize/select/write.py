"""Copy kept samples, byte for byte; put the others into quarantine shards with the evidence beside them."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from sanitize.artifacts import Artifact, ArtifactBuilder, Part
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.describe import croissant, describe_clean
from sanitize.data.samples import Sample
from sanitize.data.tables import Selection, sample_starts
from sanitize.data.writer import shard_writer
from sanitize.errors import DataError
from sanitize.select.stage import SIBLING
from sanitize.stage import Advance, Bars, Work, stage
from sanitize.tar.compression import unread_suffix
from sanitize.tar.names import SeenPaths, folded_path, is_portable
from sanitize.tar.read import unsafe_name
from sanitize.tar.write import TarWriter

EVIDENCE = "sanitize.json"
_PICTURE = {"position": "position", "member": "image", "sha256": "sha256"}  # of a picture in the evidence, by column


class WriteConfig(BaseModel):
    """How shards are written: compressed as their name says (`.tar.gz`, `.tar.xz`, ...), whatever the input was.

    Attributes:
        gzip_level: level of gzip, 0 (fast) to 9 (small); the others are written at a fast level.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gzip_level: int = Field(default=6, ge=0, le=9)


class Shards(Artifact):
    """`clean/SHARD` and `quarantine/SHARD`: same names, same order, same bytes of every member; `dataset.json` and
    `croissant.json` describe clean/."""

    def clean(self) -> list[str]:
        """Paths of the clean shards, sorted."""
        return [self.url(name) for name in sorted(self.manifest().files) if name.startswith("clean/")]


@stage(Shards, version=4, gpu=False, draws="nothing")
def write_selected(
    config: WriteConfig,
    dataset: Dataset,
    selection: Selection,
    out: str,
    compute: Compute,
    shards: Sequence[str] | None = None,
) -> Work:
    """Write clean and quarantine shards.

    Args:
        config: compression.
        dataset: the samples.
        selection: their verdicts.
        out: folder of the artifact.
        compute: not used.
        shards: names of the shards to do now; None does all missing shards and finishes.

    Returns:
        The Shards, and their description. A shard without kept samples is still written, empty, unless its name ends
        like an archive that is not read (`.tar.lz4`); quarantine holds no empty shards.

    Raises:
        DataError: a shard has changed since it was indexed, or the counts do not add up.
    """

    def write_part(shard: str, part: Part, advance: Advance) -> None:
        _write_shard(shard, part, config, dataset, selection, advance)

    def finish(part: Part, builder: ArtifactBuilder) -> None:
        # The invariant of the whole pipeline: no sample is lost.
        wanted = selection.manifest().counts
        done = builder.counts(dataset.shards)
        if any(done.get(name, 0) != wanted.get(name, 0) for name in ("kept", "quarantined", "unreadable")):
            raise DataError(f"counts do not add up: verdicts say {dict(wanted)}, written were {dict(done)}")
        if done["kept"] + done["quarantined"] + done["unreadable"] != dataset.manifest().counts["samples"]:
            raise DataError(f"samples were lost: {dict(done)} of {dataset.manifest().counts['samples']}")
        described = describe_clean(dataset, selection, builder.files(dataset.shards))
        part.write_json("dataset.json", described)
        part.write_json("croissant.json", croissant(described))

    bar = Bars("write", dataset.manifest().counts["samples"])
    return Work(parts=dataset.shards, write_part=write_part, finish=finish, bar=bar)


def _write_shard(
    shard: str, part: Part, config: WriteConfig, dataset: Dataset, selection: Selection, advance: Callable[[int], None]
) -> None:
    rows, verdicts = dataset.rows(shard), selection.rows(shard)
    if not rows["position"].equals(verdicts["position"]):
        raise DataError(f"the verdicts are not about the samples of shard {shard} that were indexed")
    starts, keep_R = sample_starts(rows), verdicts["keep"].to_numpy()
    keep_N = keep_R[starts]
    if not np.array_equal(keep_R, np.repeat(keep_N, np.diff(starts, append=len(rows)))):
        raise DataError(f"the pictures of a sample of shard {shard} have different verdicts")
    if unread_suffix(shard):
        return  # nothing was read, and an output must have the format of its name
    removed = _removed(rows.filter(pa.array(~keep_R)), verdicts.filter(pa.array(~keep_R)))
    taken, names = SeenPaths(folded_path), dataset.class_names
    with ExitStack() as stack:
        clean = stack.enter_context(shard_writer(part, f"clean/{shard}", config.gzip_level))
        if not keep_N.all():
            quarantine = stack.enter_context(shard_writer(part, f"quarantine/{shard}", config.gzip_level))
        for piece in dataset.pieces(shard, rows):
            if isinstance(piece, Sample):
                gone = [] if keep_N[piece.position] else [piece]
                if not gone:
                    for name, data in piece.members:
                        clean.add(name, data)
                advance(1)
            else:
                keep_K = keep_N[piece.positions.start : piece.positions.stop]
                clean.add_normal(piece.normalised(keep_K))
                gone = list(piece.samples(np.flatnonzero(~keep_K).tolist()))
                advance(len(keep_K))
            for sample in gone:
                _quarantine(sample, shard, *next(removed), quarantine, taken, names)
    part.counts.update(verdicts["status"].take(starts).to_pylist())


def _removed(rows: pa.Table, verdicts: pa.Table) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Index rows and verdicts of each removed sample; several with one row a picture."""
    starts = sample_starts(rows)
    for start, n in zip(starts.tolist(), np.diff(starts, append=len(rows)).tolist(), strict=True):
        yield rows.slice(start, n).to_pylist(), verdicts.slice(start, n).to_pylist()


def _quarantine(
    sample: Sample,
    shard: str,
    rows: list[dict[str, Any]],
    verdicts: list[dict[str, Any]],
    tar: TarWriter,
    taken: SeenPaths,
    class_names: Mapping[int, str],
) -> None:
    """The members as they were, and the evidence against them. Names unsafe to extract are replaced."""
    row, verdict = rows[0], verdicts[0]
    stem = sample.key
    renamed = {}
    names = [name for name, _ in sample.members]
    fits = _can_be_extracted(stem, names) and taken.add(stem, [*names, f"{stem}.{EVIDENCE}"]) is None
    if not fits:
        stem = f"sample-{sample.position:08d}"
        while taken.add(stem, [f"{stem}.{EVIDENCE}"]) is not None:
            stem += "_"
        renamed = {f"{stem}.member{i}": row["members"][i]["name"] for i in range(len(sample.members))}
    for name, (_, data) in zip(list(renamed) or names, sample.members, strict=True):
        tar.add(name, data)
    evidence = {
        "shard": shard,
        "position": row["position"],
        "key": verdict["key"],
        "label": verdict["label"],
        **({"class_name": class_name} if (class_name := class_names.get(verdict["label"])) else {}),
        "status": verdict["status"],
        "sha256": row["sha256"],
        "reasons": [_stated(reason) for reason in verdict["reasons"]],
    }
    if "sample" in row:
        del evidence["sha256"]
        evidence |= {"sample": row["sample"], "reasons": _of_pictures(verdicts)}
        evidence["pictures"] = [_stated({to: one[name] for to, name in _PICTURE.items()}) for one in rows]
    if renamed:
        evidence["renamed"] = renamed
    tar.add(f"{stem}.{EVIDENCE}", json.dumps(evidence, sort_keys=True).encode())


def _stated(reason: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in reason.items() if value is not None}


def _of_pictures(verdicts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reasons of the pictures of a sample, each with the name of its picture."""
    return [
        _stated({"member": verdict["member"]} | reason)
        for verdict in verdicts
        for reason in verdict["reasons"]
        if reason["stage"] != SIBLING
    ]


def _can_be_extracted(stem: str, names: list[str]) -> bool:
    """True where members and evidence are safe names, short enough, and different on any file system."""
    names = [*names, f"{stem}.{EVIDENCE}"]
    return (
        not any(unsafe_name(name) or name.endswith("/") for name in names)
        and all(map(is_portable, names))
        and len(set(map(folded_path, names))) == len(names)
    )
