"""Hygiene of a data set: copies, leaks between training and test samples, images of low quality, wrong hashes.

Found in what the index stored, before any model; no image is decoded. With several pictures a sample, each picture is
looked at, copies within one sample are no finding, and counts are of samples. Shapes: N usable samples (or pictures) of
all shards in sorted order, those of the test shards behind them; M of one shard.
"""

import os
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from sanitize.artifacts import ArtifactBuilder, Part
from sanitize.compute import Compute
from sanitize.data import image_facts
from sanitize.data.dataset import Dataset
from sanitize.data.tables import (
    HYGIENE_KINDS,
    Hygiene,
    HygieneKind,
    read_table,
    rows_name,
    sample_starts,
    write_rows,
)
from sanitize.errors import ArtifactError
from sanitize.hygiene import quality
from sanitize.hygiene.copies import PIXELS, Thumbnails, first_of, near_groups, usual_distance
from sanitize.hygiene.quality import QualityConfig, Usual, UsualCounts, judge_quality
from sanitize.stage import Advance, Bars, Work, stage
from sanitize.tar.names import printable

N_GROUPS, N_MEMBERS, N_EXAMPLES = 50, 12, 12  # in hygiene.json: groups, members of each, examples of each kind
KEY_BYTES = 128  # most of a key in a reason
_LEAST_CONTRAST = 5  # levels; thumbnails of less are alike whatever they show
_DIGEST = np.dtype([("a", "<u8"), ("b", "<u8")])  # half of a sha256: 2^64 attempts for one collision
SCHEMA = pa.schema(
    {
        "position": pa.int64(),
        "key": pa.string(),
        "label": pa.int64(),
        "kind": pa.string(),
        "value": pa.float64(),
        "group": pa.int64(),
        "other_shard": pa.string(),
        "other_position": pa.int64(),
        "reason": pa.string(),
    }
)


class HygieneConfig(BaseModel):
    """What counts as a finding.

    Attributes:
        near_bits: most bits of 64 in which the perceptual hashes of near-duplicates differ.
        near_distance: largest distance of their thumbnails, in [0, 2]; .28 is a correlation of .96.
        near_fraction: the distance is at most this share of the median distance to the nearest other image.
        burst: number of copies of one picture that is called a burst.
        quality: thresholds of the quality of images.
        quarantine: kinds of findings that put a sample into quarantine. Of duplicates the first one stays.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    near_bits: int = Field(default=10, ge=0, le=32)
    near_distance: float = Field(default=0.28, ge=0, le=2)
    near_fraction: float = Field(default=0.5, ge=0, le=1)
    burst: int = Field(default=10, ge=2)
    quality: QualityConfig = QualityConfig()
    quarantine: tuple[HygieneKind, ...] = ()


@stage(Hygiene, version=3, gpu=False, draws="nothing")
def check_hygiene(
    config: HygieneConfig, dataset: Dataset, out: str, compute: Compute, test: Dataset | None = None
) -> Work:
    """List duplicates, samples that are also in the test shards, images of low quality and wrong hashes.

    Args:
        config: thresholds of the findings.
        dataset: index of the samples; with `IndexConfig.image_facts` for all kinds, otherwise only exact duplicates
            are found (nothing with check "headers").
        out: folder of the artifact: `rows/SHARD.parquet`, one row a finding; `hygiene.json`: counts, the largest groups
            of copies, and examples.
        compute: not used; nothing is random.
        test: index of test samples.

    Returns:
        The Hygiene. It does not depend on the order of the shards.
    """
    found = cache(lambda: _find(config, dataset, test))

    def write_part(shard: str, part: Part, advance: Advance) -> None:
        rows = _findings(config, dataset, found(), shard)
        write_rows(part, shard, pa.Table.from_pylist(rows, SCHEMA))
        part.counts.update(findings=len(rows))
        advance(found().slices[shard].stop - found().slices[shard].start)

    def finish(part: Part, builder: ArtifactBuilder) -> None:
        part.write_json("hygiene.json", _summary(config, dataset, found(), builder))

    settings = config.model_dump(mode="json", exclude={"quarantine"})
    bar = Bars("hygiene", dataset.n_samples)
    return Work(parts=dataset.shards, write_part=write_part, finish=finish, bar=bar, config=settings)


class Keys:
    """Keys of all samples in a temporary file, at most `KEY_BYTES` of each: reasons name samples of other shards."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - as long as this object

    def add(self, keys: pa.ChunkedArray) -> None:
        """Keys of the next samples."""
        self._file.write(b"".join(key.encode()[:KEY_BYTES].ljust(KEY_BYTES, b"\0") for key in keys.to_pylist()))

    def __getitem__(self, i: int) -> str:
        """The key of sample i, printable; a long one is cut."""
        self._file.flush()
        key = os.pread(self._file.fileno(), KEY_BYTES, KEY_BYTES * i).rstrip(b"\0")
        shown = printable(key.decode(errors="ignore"))
        return shown if len(key) < KEY_BYTES and len(shown) < KEY_BYTES else f"{shown[:KEY_BYTES]}…"


class Found(NamedTuple):
    """What needs all samples at once.

    Attributes:
        slices: name of a shard -> slice of its samples.
        names, starts: name and first sample of all shards, those of the test shards behind the others.
        position_N: position in the shard, int32.
        sample_N: number of the sample among all, int32; None where each has one picture.
        first_N: index of the first sample with the same file, int32.
        group_N: smallest index in the group of copies, int32.
        size_N: number of samples in the group of that index, without test samples, int32; each counts once.
        same_N: the same for copies at half the distance, which show one picture, not just one scene, int32.
        is_mixed_N: True where the samples of the group `same_N` of that index have different labels.
        test_N: index of the first test sample in the group of that index; -1 without, int32.
        keys: keys of all samples.
        usual: usual values of the images; None without facts about them.
        near_distance: largest distance of near-duplicates.
    """

    slices: dict[str, slice]
    names: list[str]
    starts: list[int]
    position_N: np.ndarray
    sample_N: np.ndarray | None
    first_N: np.ndarray
    group_N: np.ndarray
    size_N: np.ndarray
    same_N: np.ndarray
    is_mixed_N: np.ndarray
    test_N: np.ndarray
    keys: "Keys"
    usual: Usual | None
    near_distance: float

    def is_another(self, i_M: np.ndarray, j_M: np.ndarray) -> np.ndarray:
        """True where pictures i and j are of different samples, bool (M,)."""
        sample_N = self.sample_N
        return np.asarray(i_M != j_M if sample_N is None else sample_N[i_M] != sample_N[j_M])

    def place(self, i: int) -> tuple[str, int]:
        """Shard and position of sample i."""
        return self.names[bisect_right(self.starts, i) - 1], int(self.position_N[i])


def usable(dataset: Dataset, shard: str, columns: Sequence[str] | None = None) -> tuple[pa.Table, pa.Table | None]:
    """Index rows of the M usable samples of a shard, and facts about their images where the index decoded them.

    Args:
        dataset: index.
        shard: name of the shard.
        columns: columns of the facts; None reads all.

    Raises:
        ArtifactError: the facts are about other samples.
    """
    of_rows = ["position", "key", "label", "status", "sha256", "height", "width"]
    rows = dataset.rows(shard, [*of_rows, "sample"] if dataset.has_several else of_rows)
    rows = rows.filter(pc.equal(rows["status"], "ok"))
    facts = dataset.facts(shard, columns)
    if facts is not None and not facts["position"].equals(rows["position"]):
        raise ArtifactError(f"the facts about images of shard {shard} do not belong to the samples of {dataset.path}")
    return rows, facts


def _has_pictures(dataset: Dataset, facts: pa.Table | None) -> bool:
    return facts is not None and dataset.info["check"] == "decode" and facts["hash"].null_count < max(1, len(facts))


def _find(config: HygieneConfig, dataset: Dataset, test: Dataset | None) -> Found:
    """Groups of copies. Memory: about 65 bytes a sample; thumbnails and keys are in temporary files, 384."""
    n_train = dataset.n_samples
    n = n_train + (0 if test is None else test.n_samples)
    digest_N, hash_N = np.zeros(n, _DIGEST), np.zeros(n, np.uint64)
    label_N, position_N = np.zeros(n, np.int32), np.zeros(n, np.int32)
    is_judged_N = np.zeros(n, bool)
    has_several = dataset.has_several or (test is not None and test.has_several)
    sample_N, n_samples = np.zeros(n if has_several else 0, np.int32), 0
    counts, has_facts, keys = UsualCounts(config.quality.grey), False, Keys()
    slices: dict[str, slice] = {}
    names: list[str] = []
    starts: list[int] = []
    start = 0
    with tempfile.TemporaryFile() as file:
        for which, data in enumerate([dataset] if test is None else [dataset, test]):
            for shard in data.shards:
                rows, facts = usable(data, shard, ("position", "hash", "contrast", "colour", "thumbnail"))
                at = slice(start, start + len(rows))
                digest_N[at] = _digests(rows)
                keys.add(rows["key"])
                label_N[at], position_N[at] = rows["label"].to_numpy(), rows["position"].to_numpy()
                if facts is not None and _has_pictures(data, facts):
                    has_facts = True
                    hash_N[at] = facts["hash"].to_numpy()
                    is_judged_N[at] = facts["contrast"].to_numpy() >= _LEAST_CONTRAST
                    file.write(_bytes(facts["thumbnail"]))
                    if which == 0:
                        counts.add(facts, rows)
                else:
                    file.write(bytes(PIXELS * len(rows)))
                if has_several:
                    firsts = sample_starts(rows)
                    sample_N[at] = n_samples + np.repeat(np.arange(len(firsts)), np.diff(firsts, append=len(rows)))
                    n_samples += len(firsts)
                names.append(shard)
                starts.append(start)
                if which == 0:
                    slices[shard] = at
                start = at.stop
        file.flush()
        first_N = first_of(digest_N)
        key_N = digest_N["a"].copy()
        del digest_N
        is_judged_N &= first_N == np.arange(n)
        same_N, group_N, distance = first_N, first_N, config.near_distance
        if has_facts:
            thumbnails = Thumbnails(file)
            # Of each sample the first picture: the others may be frames of one scene, nearer than any other sample.
            is_first_N = is_judged_N & np.diff(sample_N, prepend=-1).astype(bool) if has_several else is_judged_N
            distance = min(distance, config.near_fraction * usual_distance(key_N, is_first_N, thumbnails))
            same_N, group_N = near_groups(hash_N, first_N, is_judged_N, thumbnails, config.near_bits, distance)
    del key_N, hash_N
    return Found(
        slices,
        names,
        starts,
        position_N,
        sample_N if has_several else None,
        first_N,
        group_N,
        _group_sizes(group_N[:n_train], sample_N[:n_train] if has_several else None),
        same_N,
        _mixed_groups(same_N[:n_train], label_N[:n_train]),
        _test_samples(group_N, n_train),
        keys,
        counts.usual() if has_facts else None,
        distance,
    )


def _group_sizes(group_n: np.ndarray, sample_n: np.ndarray | None) -> np.ndarray:
    """Number of samples in the group of each index, int32; with several pictures a sample, each sample counts once."""
    counted_n = group_n if sample_n is None else group_n[_once_a_sample(group_n, sample_n)]
    return np.bincount(counted_n, minlength=len(group_n)).astype(np.int32)


def _mixed_groups(same_n: np.ndarray, label_n: np.ndarray) -> np.ndarray:
    """True where the samples of the group of that index have different labels, bool."""
    is_mixed_n = np.zeros(len(same_n), bool)
    is_mixed_n[same_n[label_n != label_n[same_n]]] = True
    return is_mixed_n


def _test_samples(group_N: np.ndarray, n_train: int) -> np.ndarray:
    """Index of the first test sample in the group of each training sample's index; -1 without, int32."""
    n = len(group_N)
    test_N = np.full(n, -1, np.int32)
    test_N[group_N[n_train:][::-1]] = np.arange(n_train, n, dtype=np.int32)[::-1]  # the first one is written last
    return test_N[:n_train]


def _once_a_sample(group_n: np.ndarray, sample_n: np.ndarray) -> np.ndarray:
    """Indices of the first picture of each sample in each group, ascending."""
    pairs_n = group_n.astype(np.int64) << 32 | sample_n
    return np.sort(np.unique(pairs_n, return_index=True)[1])


def _bytes(thumbnails: pa.ChunkedArray) -> memoryview:
    """The thumbnails one behind the other."""
    column = thumbnails.combine_chunks()
    return memoryview(column.buffers()[1])[PIXELS * column.offset : PIXELS * (column.offset + len(column))]


def _digests(rows: pa.Table) -> np.ndarray:
    """First half of each sha256; zeros where the index did not hash the file."""
    if rows["sha256"].null_count:
        return np.zeros(len(rows), _DIGEST)
    return np.frombuffer(bytes.fromhex("".join(text[:32] for text in rows["sha256"].to_pylist())), _DIGEST)


def _findings(config: HygieneConfig, dataset: Dataset, found: Found, shard: str) -> list[dict[str, Any]]:
    """Rows of one shard, in the order of its samples and of `HYGIENE_KINDS`."""
    rows, facts = usable(dataset, shard, [name for name in image_facts.SCHEMA.names if name != "thumbnail"])
    keys, labels = rows["key"], rows["label"]
    listed: list[dict[str, Any]] = []

    def add(kind: str, m: int, reason: str, value: float | None = None, other: int | None = None) -> None:
        place = (None, None) if other is None else found.place(other)
        group = None if value is not None or kind == "wrong_hash" else int(found.group_N[at.start + m])
        listed.append(
            {
                "position": int(found.position_N[at.start + m]),
                "key": keys[m].as_py(),
                "label": labels[m].as_py(),
                "kind": kind,
                "value": value,
                "group": group,
                "other_shard": place[0],
                "other_position": place[1],
                "reason": reason,
            }
        )

    at = found.slices[shard]
    own_M = np.arange(at.start, at.stop)
    first_M, group_M = found.first_N[at], found.group_N[at]
    for m in np.flatnonzero(found.is_another(first_M, own_M)).tolist():
        add(
            "exact_duplicate",
            m,
            f"the same file as {_name(found, first_M[m])}{_burst(config, found, group_M[m])}",
            None,
            int(first_M[m]),
        )
    for m in np.flatnonzero(found.is_another(group_M, own_M) & (first_M == own_M)).tolist():
        add(
            "near_duplicate",
            m,
            f"nearly the same picture as {_name(found, group_M[m])}{_burst(config, found, group_M[m])}",
            None,
            int(group_M[m]),
        )
    for m in np.flatnonzero(found.is_mixed_N[found.same_N[at]]).tolist():
        add("label_conflict", m, "copies of this picture have different labels", None, int(found.same_N[at][m]))
    for m in np.flatnonzero(found.test_N[group_M] >= 0).tolist():
        other = int(found.test_N[group_M[m]])
        alike = "the same file" if found.first_N[other] == first_M[m] else "nearly the same picture"
        add("test_leak", m, f"{alike} as {_name(found, other)}, a test sample", None, other)
    if facts is not None:
        for m, stated in enumerate(facts["stated"].to_pylist()):
            if stated:
                is_reason = " " in stated  # why a table states no hash
                add("wrong_hash", m, stated if is_reason else f"the hash {stated[:16]}… is stated, of another image")
    if facts is not None and found.usual is not None and _has_pictures(dataset, facts):
        for kind, (is_found_M, value_M) in judge_quality(facts, rows, config.quality, found.usual).items():
            for m in np.flatnonzero(is_found_M).tolist():
                add(kind, m, quality.in_words(kind, float(value_M[m])), float(value_M[m]))
    return sorted(listed, key=lambda row: (row["position"], HYGIENE_KINDS.index(row["kind"])))


def _name(found: Found, i: int) -> str:
    of = "" if found.sample_N is None else "a picture of "
    return f"{of}{found.keys[int(i)]} in {found.place(int(i))[0]}"


def _burst(config: HygieneConfig, found: Found, group: int) -> str:
    n = int(found.size_N[group])
    return f"; one of a burst of {n} copies" if n >= config.burst else ""


def _summary(config: HygieneConfig, dataset: Dataset, found: Found, builder: ArtifactBuilder) -> dict[str, Any]:
    """Content of hygiene.json."""
    kinds: Counter[str] = Counter()
    classes: dict[str, Counter[int]] = {kind: Counter() for kind in HYGIENE_KINDS}
    examples: dict[str, list[dict[str, Any]]] = {kind: [] for kind in HYGIENE_KINDS}
    for shard in dataset.shards:
        table = read_table(pa.BufferReader(builder.read(rows_name(shard))))
        sample_M = dataset.rows(shard, ["sample"])["sample"].to_numpy() if dataset.has_several else None
        last: dict[str, int] = {}  # kind -> sample of the last finding
        for row in table.to_pylist():
            sample = row["position"] if sample_M is None else int(sample_M[row["position"]])
            if last.get(row["kind"]) == sample:
                continue
            last[row["kind"]] = sample
            kinds[row["kind"]] += 1
            classes[row["kind"]][row["label"]] += 1
            if len(examples[row["kind"]]) < N_EXAMPLES:
                examples[row["kind"]].append({"shard": shard} | {k: row[k] for k in _EXAMPLE})
    largest = np.argsort(-found.size_N, kind="stable")[:N_GROUPS]
    return {
        "checked": "images"
        if found.usual is not None
        else "digests"
        if dataset.info["check"] != "headers"
        else "nothing",
        "samples": sum(dataset.counts(shard)[0] for shard in dataset.shards),
        "near_distance": found.near_distance,
        "usual": None if found.usual is None else found.usual._asdict(),
        "counts": {kind: kinds[kind] for kind in HYGIENE_KINDS},
        "classes": {kind: {str(y): n for y, n in sorted(by.items())} for kind, by in classes.items()},
        "bursts": int((found.size_N >= config.burst).sum()),
        "groups": list(_groups(dataset, found, [int(g) for g in largest if found.size_N[g] > 1])),
        "examples": {kind: rows for kind, rows in examples.items() if rows},
    }


_EXAMPLE = ("position", "key", "label", "reason", "other_shard", "other_position")


def _groups(dataset: Dataset, found: Found, groups: list[int]) -> Iterator[dict[str, Any]]:
    """The largest groups of copies: counts, labels, and the first members."""
    members: dict[int, list[dict[str, Any]]] = {group: [] for group in groups}
    labels: dict[int, Counter[int]] = {group: Counter() for group in groups}
    n_files: Counter[int] = Counter()
    wanted = np.array(sorted(groups), np.int32)
    for shard, at in found.slices.items():
        here = np.flatnonzero(np.isin(found.group_N[at], wanted))
        if found.sample_N is not None:
            here = here[_once_a_sample(found.group_N[at][here], found.sample_N[at][here])]
        if not len(here):
            continue
        rows = dataset.rows(shard, ["position", "key", "label", "status"])
        rows = rows.filter(pc.equal(rows["status"], "ok")).drop_columns("status").take(here)
        for m, row in zip(here.tolist(), rows.to_pylist(), strict=True):
            group = int(found.group_N[at.start + m])
            labels[group][row["label"]] += 1
            n_files[group] += bool(found.first_N[at.start + m] == at.start + m)
            if len(members[group]) < N_MEMBERS:
                members[group].append({"shard": shard, **row})
    for group in groups:
        yield {
            "n": int(found.size_N[group]),
            "n_files": n_files[group],
            "labels": {str(y): n for y, n in sorted(labels[group].items())},
            "in_test": bool(found.test_N[group] >= 0),
            "members": members[group],
        }
