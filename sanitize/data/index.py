"""The index: one pass over every shard that finds the usable samples, and a reason for each of the others.

Later stages read only samples of status `ok`; the others go to quarantine unchanged. `IndexConfig.check` sets the depth
of the check; only "decode" proves that images can be decoded.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sanitize.artifacts import ArtifactBuilder, Part, Sources
from sanitize.compute import Compute
from sanitize.data.class_names import MAX_NAMES, ClassNames, names_beside
from sanitize.data.dataset import Dataset
from sanitize.data.decode import BadImage, ImageConfig, decode_pixels, image_format
from sanitize.data.image_facts import FACTS_VERSION, SIDE, ImageFacts, reduced, write_facts
from sanitize.data.labels import MAX_CLASSES, BadLabel, LabelReader, notes_on
from sanitize.data.layout import dots, explained
from sanitize.data.reasons import Reasons
from sanitize.data.rows import SCHEMA, SEVERAL, plain_rows, read_rows
from sanitize.data.samples import ALL, Sample, SampleLimits, ShardReader, image_names
from sanitize.data.sources import find_shards, fingerprint_shards
from sanitize.data.stated_hashes import StatedHashes
from sanitize.data.tables import read_table, rows_name, sample_starts, write_rows
from sanitize.errors import ConfigError, DataError
from sanitize.plural import are, counted
from sanitize.stage import Advance, Bars, Work, stage
from sanitize.tar.compression import not_read, unread_suffix
from sanitize.tar.names import printable

_MAX_NAMED = 10  # shards in a message
_NO_LABELS = "none"
_STOPPED = re.compile(r" at byte \d+$")  # end of the `damage` of a ShardReader that stopped
_LARGE_LABEL = re.compile(r"label (\d+) is not in ")


class IndexConfig(BaseModel):
    """Requirements on samples.

    Attributes:
        check: depth of the check. "decode": each image is decoded, so that later stages can read all `ok` samples.
            "digest": images are hashed, not decoded. "headers": only labels are read, and no byte is hashed; a changed
            shard is then recognised by its size and modification time.
        label: place of the class. The suffix of a member ("cls", "output.cls") with an ASCII integer or an exact
            one-hot vector; "json:FIELD" or "json:A.B.C" for a path; "table:FILE#COLUMN" for a CSV or Parquet file with
            a column `key`. None or "none" reads no labels: all samples are of class 0.
        n_classes: number of classes; None takes the largest label below 1,000, plus one.
        classes: "names" if labels are class names: the classes are the sorted names, and `dataset.json` lists them. A
            list of names gives their order. None for integers.
        class_names: names of integer classes, by number, to show to people; no result depends on them. None takes those
            of `classes.json` beside the shards (label "cls"), as `sanitize import` writes it; {} leaves names out.
        image: settings of decoding.
        limits: limits on the cost of one sample.
        max_bad_fraction: share of unreadable samples in [0, 1] above which the run stops. The bytes behind the place
            where a shard is damaged count as so many samples as fit there.
        max_bad_shards: number of damaged shards without a usable sample above which the run stops: the number of
            samples in them is unknown.
        image_facts: True also takes facts about each decoded image (brightness, a perceptual hash, ...), which
            `check_hygiene` reads. They need check "decode".
        max_pictures: with `image.member: all`, number of pictures above which a sample is unreadable.
        verify: place of the hash of the image as stored: "json:FIELD", a field of the metadata, or "table:FILE#COLUMN",
            as for `label`. sha256, sha512, sha1 or md5 in hexadecimal, known by its length. An image with another hash
            stays usable; `check_hygiene` lists it, and images whose key has no row in the table, or several.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: Literal["decode", "digest", "headers"] = "decode"
    label: str | None = Field(default="cls", pattern=r"^[^:]+$|^([^:]+\.)?json:.+$|^table:.+$")
    n_classes: int | None = Field(default=None, gt=0)
    classes: Literal["names"] | tuple[str, ...] | None = None
    class_names: ClassNames | None = None
    image: ImageConfig = ImageConfig()
    limits: SampleLimits = SampleLimits()
    max_bad_fraction: float = Field(default=0.05, ge=0, le=1)
    max_bad_shards: int = Field(default=0, ge=0)
    image_facts: bool = False
    verify: str | None = Field(default=None, pattern=r"^(json|table):.+$")
    max_pictures: int = Field(default=32, gt=0)

    @model_validator(mode="after")
    def _reads_images(self) -> Self:
        if self.verify is not None and self.check == "headers":
            raise ConfigError("index.verify compares images with their hashes, and index.check=headers reads no image")
        if self.verify is not None and self.has_several:
            raise ConfigError(
                "index.verify names the hash of one image, and index.image.member=all reads several; set "
                "index.verify=null, or index.image.member to the suffix of that image"
            )
        return self

    def recipe(self) -> dict[str, Any]:
        """What the index depends on. Settings that came later are left out where they are off, so that an index from
        before them is still found."""
        settings = self.model_dump(mode="json")
        used = {name: settings[name] for name in ("image_facts", "verify", "class_names")} | {
            "max_pictures": self.has_several
        }
        recipe = {name: value for name, value in settings.items() if used.get(name, True)}
        return recipe | ({"image_facts": FACTS_VERSION} if self.image_facts else {})

    @property
    def has_several(self) -> bool:
        """True where every picture of a sample is read, and the index has one row a picture."""
        return self.image.member == ALL

    @property
    def has_facts(self) -> bool:
        """True where the index gets a table of facts about images."""
        return self.verify is not None or (self.image_facts and self.check == "decode")

    @field_validator("label")
    @classmethod
    def _none_is_no_label(cls, label: str | None) -> str | None:
        return None if label == _NO_LABELS else label

    @model_validator(mode="after")
    def _settings_of_labels(self) -> Self:
        for name, place in (("label", self.label), ("verify", self.verify)):
            if place is not None and place.startswith("table:") and "#" not in place[6:]:
                raise ConfigError(f"index.{name}={place} names no column: table:FILE#COLUMN")
        if isinstance(self.classes, tuple):
            if not self.classes or len(set(self.classes)) < len(self.classes) or len(self.classes) > MAX_NAMES:
                raise ConfigError(f"index.classes needs 1 to {MAX_NAMES:,} different names")
            if self.n_classes not in (None, len(self.classes)):
                raise ConfigError(f"index.classes has {len(self.classes)} names, and index.n_classes={self.n_classes}")
        if self.classes is not None and self.class_names:
            raise ConfigError("index.class_names names integer classes; with index.classes labels are names: set one")
        return self

    def named(self, urls: Iterable[str]) -> Self:
        """The same settings with the names of classes from beside the shards, unless the settings have names."""
        if self.class_names is not None or self.classes is not None or self.label != "cls":
            return self
        limit = self.n_classes or MAX_CLASSES
        names = {number: name for number, name in names_beside(urls).items() if number < limit}
        return self.model_copy(update={"class_names": names}) if names else self


@stage(Dataset, version=5, gpu=False, draws="nothing")
def index_shards(
    config: IndexConfig,
    sources: Sequence[str] | str | Sources,
    out: str,
    compute: Compute,
    shards: Sequence[str] | None = None,
) -> Work:
    """Read the shards once, check every sample as `config.check` says, and write one row a sample.

    With `image.member: all` there is one row a picture: `position` counts the rows of a shard, and a column `sample`
    its samples. An unreadable sample has one row.

    Args:
        config: requirements on samples.
        sources: directories, globs, brace ranges or URLs of .tar / .tar.gz shards, in any order; or the shards that
            were found, with their fingerprints (`fingerprint_shards`).
        out: folder of the artifact: `rows/SHARD.parquet`, `dataset.json`.
        compute: threads; no random numbers are drawn.
        shards: names of the shards to index now; None indexes all missing ones and finishes.

    Returns:
        The Dataset.

    Raises:
        ConfigError: no shards, or one of them twice.
        DataError: a shard cannot be opened, no sample is usable, more than `max_bad_fraction` of the samples or more
            than `max_bad_shards` shards are unreadable.
        ArtifactError: `out` was made from other shards.
    """
    found = sources if isinstance(sources, Mapping) else fingerprint_shards(find_shards(sources))
    found = dict(sorted(found.items()))
    _refuse_unread(config, found)
    labels = label_reader(config)
    hashes = None if config.verify is None else StatedHashes(config.verify)
    tables = {"label table": labels.sha256, "hash table": hashes.sha256 if hashes else None}

    def write_part(shard: str, part: Part, advance: Advance) -> None:
        facts = ImageFacts() if config.has_facts else None
        table, summary = index_shard(str(found[shard]["url"]), config, advance, labels, facts, hashes)
        write_rows(
            part, shard, table.replace_schema_metadata((table.schema.metadata or {}) | {"shard": json.dumps(summary)})
        )
        if facts is not None:
            write_facts(part, shard, facts)
        part.counts.update(summary["counts"])

    def finish(part: Part, builder: ArtifactBuilder) -> None:
        part.write_json("dataset.json", _describe(config, list(found), builder))

    return Work(
        parts=list(found),
        write_part=write_part,
        finish=finish,
        sources=found,
        bar=Bars("index"),
        config=config.recipe(),
        inputs=dict.fromkeys(found, "shard") | {name: sha256 for name, sha256 in tables.items() if sha256},
    )


def _refuse_unread(config: IndexConfig, found: Mapping[str, object]) -> None:
    """Raise DataError if the names alone show too many unreadable shards."""
    unread = {shard: not_read(unread_suffix(shard)) for shard in found if unread_suffix(shard)}
    if len(unread) > config.max_bad_shards:
        raise DataError(_too_many(unread, len(found), config))


def label_reader(config: IndexConfig) -> LabelReader:
    """The reader of labels of these settings. Raises as `LabelReader` does."""
    return LabelReader(config.label, config.n_classes, config.classes)


def index_shard(
    url: str,
    config: IndexConfig,
    advance: Callable[[int], None] = lambda _n: None,
    labels: LabelReader | None = None,
    facts: ImageFacts | None = None,
    hashes: StatedHashes | None = None,
) -> tuple[pa.Table, dict[str, Any]]:
    """Rows of one shard in the order of its samples (rows.SCHEMA, rows.SEVERAL), and a summary of the shard itself.

    Where class names are gathered, `label` is the number of a name in the list `names` of the schema's metadata. The
    summary has sha256, bytes, damage and counts (of samples; with `image.member: all` also of usable pictures);
    `unread`: bytes behind the damage; `of_macos`: number of files of macOS, if there are any; `formats`: number of
    images of each format that were read, usable or not.

    Args:
        url: path or URL of the shard.
        config: requirements on samples.
        advance: function called with the number of finished samples.
        labels: `label_reader(config)`, if the caller has it.
        facts: facts about the images are added to it, as `config` says.
        hashes: images are compared with them, and what differs is added to `facts`.
    """
    headers_only = config.check == "headers"
    reader = labels or label_reader(config)
    names: dict[str, int] = {}

    formats: Counter[str] = Counter()

    def judge(sample: Sample, position: int) -> list[dict[str, Any]]:
        judged = _judge(sample, position, config, reader, formats, facts, hashes)
        for row in judged:
            if isinstance(name := row.get("label"), str):
                row["label"] = names.setdefault(name, len(names))
                if len(names) > MAX_NAMES:
                    raise DataError(_too_many_names(url, config))
        return judged

    found = None
    if headers_only and reader.reads_members and not unread_suffix(url) and not config.has_several:
        integers = reader.n_classes if reader.is_plain else 0
        found = plain_rows(url, config.limits, reader.suffix, integers, judge, advance, config.image.member)
    if found is None:
        suffix = reader.suffix if headers_only else None
        shard = ShardReader(url, config.limits, suffix, digest=not headers_only)
        found = read_rows(shard, judge, advance, SEVERAL if config.has_several else SCHEMA)
    table = explained(found.table, config.label)
    n_bad = len(table) - table["status"].to_pylist().count("ok")
    summary = {"sha256": found.sha256, "bytes": found.size, "damage": found.damage, "unread": found.n_unread}
    if found.n_of_macos:
        summary["of_macos"] = found.n_of_macos
    counts = {"samples": len(sample_starts(table)), "unreadable": n_bad}
    if config.has_several:
        counts["pictures"] = len(table) - n_bad
    if config.classes == "names":
        table = table.replace_schema_metadata({"names": json.dumps(list(names))})
    return table, summary | {"counts": counts, "formats": dict(formats)}


def _too_many_names(where: str, config: IndexConfig) -> str:
    return (
        f"more than {MAX_NAMES:,} class names in {printable(where)}: index.label={config.label} is no class, but "
        "perhaps a caption or an id; name another member, or index.label=none"
    )


def _judge(
    sample: Sample,
    position: int,
    config: IndexConfig,
    labels: LabelReader,
    formats: Counter[str],
    facts: ImageFacts | None,
    hashes: StatedHashes | None,
) -> list[dict[str, Any]]:
    """Rows of a sample: status, the reason where it is not "ok", and properties; one for each image that is read.

    A sample with a bad image is unreadable, as a whole and in one row: nobody has looked at that image.

    Args:
        sample: the sample.
        position: number of its first row.
        config: requirements on samples.
        labels: reader of its label.
        formats: the formats of the images that are read are counted in it.
        facts: facts about the images of usable samples are added to it.
        hashes: images are compared with them, and what differs is added to `facts`.
    """
    if sample.problem is not None:
        return [{"status": "unreadable", "reason": sample.problem}]
    found: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    seen: list[Any] = []  # what facts are taken of: decoded images, or what is kept of them
    payloads = dict(sample.members)
    try:
        for name in _image_names(sample, config, labels):
            found = {"image": printable(name)}
            if config.check != "headers":
                found["sha256"] = hashlib.sha256(payloads[name]).hexdigest()
                formats[image_format(payloads[name]) or "unknown"] += 1
            found["label"] = rows[0]["label"] if rows else labels.read(sample)
            if config.check == "decode":
                pixels_HWC = decode_pixels(payloads[name], config.image)
                found["height"], found["width"] = pixels_HWC.shape[:2]
                if facts is not None and config.image_facts:
                    keeps_all = not config.has_several or pixels_HWC.shape[:2] == (SIDE, SIDE)
                    seen.append(pixels_HWC if keeps_all else reduced(pixels_HWC))
            rows.append(found | {"status": "ok"})
    except (LookupError, BadLabel, BadImage) as error:
        reason = str(error.args[0])
        if config.has_several and isinstance(error, BadImage):
            reason = f"'{found['image']}': {reason}"
        return [found | {"status": "unreadable", "reason": reason}]
    if facts is not None:
        for i, image in enumerate(seen):
            facts.add(position + i, image)
        if hashes is not None:
            facts.add_stated(position, hashes.differing(sample, payloads[name]))
    return rows


def _image_names(sample: Sample, config: IndexConfig, labels: LabelReader) -> list[str]:
    names = [name for name, _ in sample.sizes]
    try:
        images = image_names(names, config.image.member)
    except LookupError as error:
        raise LookupError((labels.reads_members and dots(names, labels.suffix)) or error.args[0]) from None
    if config.has_several and len(images) > config.max_pictures:
        raise LookupError(f"{len(images)} pictures, more than index.max_pictures={config.max_pictures}")
    return images


def _describe(config: IndexConfig, shards: list[str], builder: ArtifactBuilder) -> dict[str, Any]:
    """Content of dataset.json. Raises DataError where too much data is bad."""
    labels: Counter[int] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    by_name: Counter[str] = Counter()
    reasons = Reasons()
    summaries = {}
    for shard in shards:
        rows = pa.BufferReader(builder.read(rows_name(shard)))
        table = read_table(rows, ["status", "reason", "key", "start", "label", "height", "width"])
        summaries[shard] = json.loads(table.schema.metadata[b"shard"])
        is_ok = pc.equal(table["status"], "ok")
        ok = table.filter(is_ok)
        counts = {row["values"]: row["counts"] for row in pc.value_counts(ok["label"]).to_pylist()}
        if (names := shard_names(table)) is None:
            labels.update(counts)
        else:
            by_name.update({names[i]: n for i, n in counts.items()})
            if len(by_name) > MAX_NAMES:
                raise DataError(_too_many_names("the shards", config))
        by_size = ok.group_by(["height", "width"]).aggregate([([], "count_all")])
        sizes.update({(row["height"], row["width"]): row["count_all"] for row in by_size.to_pylist()})
        reasons.add(shard, table)
    classes = list(config.classes) if isinstance(config.classes, tuple) else sorted(by_name) or None
    if config.n_classes is not None and len(by_name) > config.n_classes:
        raise DataError(
            f"{len(by_name)} class names, more than index.n_classes={config.n_classes}: "
            f"{_some([printable(name) for name in classes or ()])}. Set index.classes to the names that are classes"
        )
    if by_name:
        labels.update({label: by_name[name] for label, name in enumerate(classes or ())})
    n_ok = sum(summary["counts"]["samples"] - summary["counts"]["unreadable"] for summary in summaries.values())
    _refuse_if_bad(config, n_ok, reasons, summaries)
    common = common_size(sizes, config.image.max_side) if config.check == "decode" else None
    n_classes = config.n_classes or (len(classes) if classes else max(labels) + 1)
    return {
        "n_classes": n_classes,
        "classes": classes,
        **({"class_names": _names_below(config.class_names, n_classes)} if config.class_names else {}),
        "notes": [
            *([] if config.label is None else notes_on(labels, config.n_classes, classes)),
            *notes_on_shards(summaries),
        ],
        "labels": {str(label): labels[label] for label in sorted(labels)},
        "image_size": config.image.size or common,
        "check": config.check,
        "label": config.label,
        "image": config.image.model_dump(mode="json"),
        "limits": config.limits.model_dump(mode="json"),
        "shards": summaries,
        "unreadable": reasons.counts(),
    }


def _names_below(names: Mapping[int, str], n_classes: int) -> dict[str, str]:
    return {str(number): names[number] for number in sorted(names) if number < n_classes}


def common_size(sizes: Mapping[tuple[int, int], int], max_side: int | None) -> tuple[int, int]:
    """The size at which a data set is read.

    Args:
        sizes: (H, W) -> number of images.
        max_side: largest side of the result; None takes the most common size as it is.

    Returns:
        The most common size or, if less than half of the images have it, the median height and the median width;
        scaled down to `max_side`, never up.
    """
    if max_side is None:
        return max(sizes, key=lambda size: sizes[size])
    size = max(sizes, key=lambda size: (sizes[size], size))  # no tie depends on the order of the shards
    if 2 * sizes[size] < sum(sizes.values()):
        size = _median(sizes, 0), _median(sizes, 1)
    scale = min(1.0, max_side / max(size))
    return max(1, round(scale * size[0])), max(1, round(scale * size[1]))


def _median(sizes: Mapping[tuple[int, int], int], axis: int) -> int:
    """Lower median of the heights (axis 0) or widths (axis 1)."""
    ordered = sorted((size[axis], n) for size, n in sizes.items())
    seen = accumulate(n for _, n in ordered)
    half = sum(sizes.values()) / 2
    return next(side for (side, _), n in zip(ordered, seen, strict=True) if n >= half)


def bad_shards(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Damaged shards without a usable sample, with the damage. An empty archive is not damaged.

    Args:
        summaries: summary of each shard, from `index_shard` or `dataset.json`.
    """
    return {
        shard: str(summary["damage"])
        for shard, summary in summaries.items()
        if summary["damage"] and summary["counts"]["samples"] == summary["counts"]["unreadable"]
    }


def notes_on_shards(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is odd about the shards and costs no sample.

    Args:
        summaries: as for `bad_shards`.
    """
    n = sum(summary.get("of_macos", 0) for summary in summaries.values())
    belong = "belongs to no sample and is left out" if n == 1 else "belong to no sample and are left out"
    return [f"{counted(n, 'file')} of macOS (._NAME, .DS_Store) {belong}"] if n else []


def lost_samples(summaries: Mapping[str, Mapping[str, Any]]) -> int:
    """Samples behind the places where shards are damaged, by their mean size before; bad shards count none.

    Args:
        summaries: as for `bad_shards`.
    """
    bad = bad_shards(summaries)
    return sum(
        round(summary["counts"]["samples"] * summary["unread"] / max(1, summary["bytes"] - summary["unread"]))
        for shard, summary in summaries.items()
        if shard not in bad
    )


def stopped_early(summary: Mapping[str, Any]) -> bool:
    """True where a shard was not read to its end; otherwise `damage` is an oddity that cost no sample.

    Args:
        summary: summary of the shard, from `index_shard` or `dataset.json`.
    """
    return _STOPPED.search(summary["damage"] or "") is not None


def is_loss_unknown(summary: Mapping[str, Any]) -> bool:
    """True where a shard lost samples and the file does not tell how many: it is cut off, or compressed.

    Args:
        summary: as for `stopped_early`.
    """
    is_cut = str(summary["damage"]).startswith(("truncated in ", "compressed stream is cut"))
    return stopped_early(summary) and (is_cut or lost_samples({"": summary}) == 0)


def _refuse_if_bad(config: IndexConfig, n_ok: int, found: Reasons, summaries: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise DataError where too much data is bad.

    Args:
        config: limits on bad data.
        n_ok: number of usable samples.
        found: reasons of unreadable samples.
        summaries: summary of each shard, from `index_shard`.
    """
    n_lost, bad = lost_samples(summaries), bad_shards(summaries)
    n_bad = sum(found.counts().values()) + n_lost
    why = []
    if n_bad > config.max_bad_fraction * (n_ok + n_bad):
        lost = [f"{n_lost} x behind damage in a shard (about)"] if n_lost else []
        most = "; ".join([*([found.most()] if found.counts() else []), *lost])
        why.append(
            f"{n_bad:,} of {counted(n_ok + n_bad, 'sample')} {are(n_bad)} unreadable, more than "
            f"max_bad_fraction={config.max_bad_fraction}: {most}. {_what_to_do(config, found)}"
        )
    elif n_ok == 0:
        damaged = [f"{printable(shard)} ({s['damage']})" for shard, s in summaries.items() if s["damage"]]
        why.append(f"no usable sample in {counted(len(summaries), 'shard')}{': ' if damaged else ''}{_some(damaged)}")
    if len(bad) > config.max_bad_shards and (n_ok or n_bad):
        why.append(_too_many(bad, len(summaries), config))
    if why:
        raise DataError(". ".join(why))


def _what_to_do(config: IndexConfig, found: Reasons) -> str:
    largest = max_label(found) if config.n_classes is None else None
    if largest is not None:
        return f"Labels go up to {largest}: set index.n_classes={largest + 1} if these are the classes"
    return "Look with `sanitize inspect`, which says what to do; raise max_bad_fraction only if this is expected"


def max_label(found: Reasons) -> int | None:
    """The largest label that was refused for the number of classes, if that is the most frequent reason."""
    kinds = found.kinds()
    match = _LARGE_LABEL.match(kinds[0].largest) if kinds else None
    return int(match[1]) if match else None


def shard_names(table: pa.Table) -> list[str] | None:
    """Class names of the labels of a shard, if they are gathered; see `index_shard`."""
    stored = (table.schema.metadata or {}).get(b"names")
    return None if stored is None else list(json.loads(stored))


def _too_many(bad: Mapping[str, str], n_shards: int, config: IndexConfig) -> str:
    named = [f"{printable(shard)} ({damage})" for shard, damage in bad.items()]
    return (
        f"{len(bad):,} of {counted(n_shards, 'shard')} could not be read, more than "
        f"max_bad_shards={config.max_bad_shards}: {_some(named)}. "
        "Repair or remove them, or raise index.max_bad_shards to go on without them"
    )


def _some(what: Sequence[str]) -> str:
    return ", ".join(what[:_MAX_NAMED]) + (f" and {len(what) - _MAX_NAMED} more" if len(what) > _MAX_NAMED else "")
