"""Write the images of a source as shards. Every image is decoded once, and copied byte for byte; what cannot be used is
left out and listed with its reason."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from sanitize.artifacts import Artifact, ArtifactBuilder, Part
from sanitize.compute import Compute
from sanitize.data.class_names import notes_on_names
from sanitize.data.decode import BadImage, decode_pixels, image_format
from sanitize.data.sources import refuse_inside
from sanitize.data.writer import shard_writer
from sanitize.errors import DataError
from sanitize.importing.config import ImportConfig
from sanitize.importing.detect import open_source
from sanitize.importing.files import NO_FILE
from sanitize.importing.source import Offered, Source
from sanitize.plural import counted, were
from sanitize.stage import Advance, Bars, Work, stage
from sanitize.tar.names import printable
from sanitize.tar.write import TarWriter

CLASSES, SUMMARY = "classes.json", "import.json"
_EXAMPLES, _MAX_REASONS = 3, 50  # shown of refused images; `refused/` has all
_MAX_THREADS = 8  # that decode
_AT_ONCE, _AT_ONCE_BYTES = 64, 64 << 20  # images that are decoded side by side
# Of formats with another name: an image gets the suffix of its content, whatever its file was called.
_SUFFIXES = {"jpeg": "jpg", "tiff": "tif"}
_WHERE = {"sources", "images", "max_refused_fraction"}  # settings that change no byte of the result


class Imported(Artifact):
    """`NAME-000000.tar`, ...: samples `KEY.jpg` (or .png, .gif, ...), `KEY.cls`, `KEY.json`, with captions `KEY.txt`.

    Beside them `classes.json` (class names to integers), `import.json` (counts) and, where images were refused,
    `refused/SHARD.jsonl` (name and reason of each).
    """

    def shards(self) -> list[str]:
        """Paths or URLs of the shards, sorted."""
        return [self.url(name) for name in sorted(self.manifest().files) if name.endswith(".tar")]

    def summary(self) -> dict[str, Any]:
        """Counts of the import: offered, imported, refused, `refused_by_reason` with examples, samples by class."""
        return self.read_object(SUMMARY, "offered", "imported", "refused")

    def classes(self) -> dict[str, int]:
        """Integer of each class name; empty for captions."""
        return dict(self.read_object(CLASSES)) if CLASSES in self.manifest().files else {}


class _Judged(NamedTuple):
    offered: Offered
    suffix: str
    problem: str | None


@stage(Imported, version=3, gpu=False, draws="seed")
def import_data(config: ImportConfig, sources: Sequence[str] | str, out: str, compute: Compute) -> Work:
    """Write a folder of images, a table of paths, Parquet files or COCO captions as shards.

    The shards depend on the source's content, the config and the seed alone, not on the order of a file system. The key
    of a sample is the number of its image in the sorted source.

    Args:
        config: settings.
        sources: a folder or file, by path or URL; several only of Parquet or Arrow files.
        out: folder of the artifact.
        compute: seed of the order.

    Raises:
        ConfigError: nothing that is known lies there, or a choice is needed (kind, columns, split).
        DataError: the source cannot be read, no image is usable, or more than `max_refused_fraction` were refused.
    """
    places = [sources] if isinstance(sources, str) else list(sources)
    refuse_inside([*places, *([config.images] if config.images else [])], out)
    source = open_source(places, config)
    generator = compute.generator("import", "order") if config.shuffle else None
    plan = _plan(source, source.order(generator), config)

    def write_part(shard: str, part: Part, advance: Advance) -> None:
        refused = []
        counts: Counter[str] = Counter()
        with ExitStack() as stack:
            tar = None
            for judged in _judge(source, plan[shard].tolist(), config):
                if judged.problem is not None:
                    refused.append({"name": printable(judged.offered.name), "reason": judged.problem})
                else:
                    tar = tar or stack.enter_context(shard_writer(part, shard))
                    _add(tar, judged, source.classes)
                    counts[f"class {judged.offered.label}"] += judged.offered.label is not None
                advance(1)
        if refused:
            lines = "".join(json.dumps(one, sort_keys=True) + "\n" for one in refused)
            part.write(f"refused/{shard}.jsonl", lines.encode())
        n = len(plan[shard])
        part.counts.update(+counts, offered=n, refused=len(refused), samples=n - len(refused))

    def finish(part: Part, builder: ArtifactBuilder) -> None:
        summary = _summarise(list(plan), builder, source)
        _check(summary, config, places)
        if source.classes is not None:
            part.write_json(CLASSES, {name: number for number, name in enumerate(source.classes)})
        part.write_json(SUMMARY, summary)

    return Work(
        parts=list(plan),
        write_part=write_part,
        finish=finish,
        sources={"source": {"url": places[0], **source.stamp}},
        bar=Bars("import", len(source.sizes_N), "images"),
        config=config.model_dump(mode="json", exclude=_WHERE | ({"classes"} if config.classes is None else set())),
    )


def _plan(source: Source, order_N: np.ndarray, config: ImportConfig) -> dict[str, np.ndarray]:
    """Numbers of the images of each shard. Refused images count, so that a shard does not depend on the others."""
    shards, start, held = [], 0, 0
    for i, size in enumerate(source.sizes_N[order_N].tolist()):
        if i > start and (i - start >= config.samples_per_shard or held + size > config.bytes_per_shard):
            shards.append(order_N[start:i])
            start, held = i, 0
        held += size
    shards.append(order_N[start:])
    return {f"{config.name}-{i:06d}.tar": numbers for i, numbers in enumerate(shards)}


def _judge(source: Source, numbers: Sequence[int], config: ImportConfig) -> Iterator[_Judged]:
    """The images of these numbers with their suffix, or the reason why they are refused."""

    def judged(one: Offered) -> _Judged:
        if one.problem is not None:
            return _Judged(one, "", one.problem)
        try:
            decode_pixels(one.data, config.image)
        except BadImage as error:
            return _Judged(one, "", str(error))
        format = str(image_format(one.data))  # known: it was decoded
        return _Judged(one, _SUFFIXES.get(format, format), None)

    offered = source.read(numbers)
    n_threads = min(len(os.sched_getaffinity(0)), _MAX_THREADS)
    with ThreadPoolExecutor(n_threads, thread_name_prefix="sanitize-decode") as pool:
        while group := list(_some(offered)):
            yield from pool.map(judged, group)


def _some(offered: Iterator[Offered]) -> Iterator[Offered]:
    """The next few images."""
    held = 0
    for one in islice(offered, _AT_ONCE):
        yield one
        held += len(one.data)
        if held > _AT_ONCE_BYTES:
            return


def _add(tar: TarWriter, judged: _Judged, classes: list[str] | None) -> None:
    """Write one sample."""
    one, key = judged.offered, f"{judged.offered.number:08d}"
    record: dict[str, Any] = {"file": printable(one.name)}
    tar.add(f"{key}.{judged.suffix}", one.data)
    if classes is not None and one.label is not None:
        tar.add(f"{key}.cls", str(one.label).encode())
        record |= {"label": one.label, "class_name": classes[one.label]}
    if one.captions:
        tar.add(f"{key}.txt", one.captions[0].encode("utf-8", "replace"))
        record |= {"caption": one.captions[0], "captions": list(one.captions)}
    tar.add(f"{key}.json", json.dumps(record, sort_keys=True).encode())


def _summarise(parts: Sequence[str], builder: ArtifactBuilder, source: Source) -> dict[str, Any]:
    """Counts of all parts."""
    counts, there = builder.counts(parts), builder.files(parts)
    reasons: dict[str, list[str]] = {}
    n_of: Counter[str] = Counter()
    for name in sorted(name for name in there if name.startswith("refused/")):
        for line in builder.read(name).splitlines():
            refused = json.loads(line)
            n_of[refused["reason"]] += 1
            examples = reasons.setdefault(refused["reason"], [])
            examples.append(refused["name"])
            reasons[refused["reason"]] = sorted(examples)[:_EXAMPLES]
    most = sorted(n_of, key=lambda reason: (-n_of[reason], reason))
    listed = [{"reason": reason, "n": n_of[reason], "examples": reasons[reason]} for reason in most[:_MAX_REASONS]]
    if others := sum(n_of[reason] for reason in most[_MAX_REASONS:]):
        listed.append({"reason": "other reasons; see refused/", "n": others, "examples": []})
    names = source.classes
    return {
        "offered": counts["offered"],
        "imported": counts["samples"],
        "refused": counts["refused"],
        "refused_by_reason": listed,
        "classes": None if names is None else {name: counts[f"class {i}"] for i, name in enumerate(names)},
        "notes": source.notes,
        "class_notes": [] if names is None else notes_on_names(names),
    }


def _check(summary: dict[str, Any], config: ImportConfig, places: Sequence[str]) -> None:
    """Raise DataError where no image is usable, or too many were refused."""
    refused, offered = summary["refused"], summary["offered"]
    if summary["imported"] and refused <= config.max_refused_fraction * offered:
        return
    most = "; ".join(
        f"{one['n']:,} x {one['reason']} ({', '.join(one['examples'])})" for one in summary["refused_by_reason"][:3]
    )
    of_paths = any(one["reason"].startswith((NO_FILE, "unsafe path")) for one in summary["refused_by_reason"][:3])
    hint = ". Paths of a table or of COCO start from its folder, or from --images FOLDER" if of_paths else ""
    notes = "".join(f"; {what}: {n:,}" for what, n in summary["notes"].items())
    more = f"more than max_refused_fraction {config.max_refused_fraction:g}: mend them or raise --max-refused"
    why = more if summary["imported"] else "nothing to import"
    raise DataError(
        f"{places[0]}: {refused:,} of {counted(offered, 'image')} {were(refused)} refused, {why}. {most}{notes}{hint}"
    )
