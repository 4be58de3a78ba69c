"""Put samples back: a new Selection in which the named keys are kept, with the decision as a reason."""

import difflib
from collections import Counter

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from sanitize.artifacts import ArtifactBuilder, Part
from sanitize.compute import Compute
from sanitize.data.tables import Selection, read_table, rows_name, sample_starts, write_rows
from sanitize.errors import DataError
from sanitize.select.stage import SCHEMA, SEVERAL
from sanitize.stage import Advance, Work, stage


class RestoreConfig(BaseModel):
    """Samples to put back, and the reason.

    Attributes:
        keys: keys of quarantined samples; "SHARD:KEY" where a key occurs in several shards.
        note: name of the person and the reason, kept with the verdict.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[str, ...] = Field(min_length=1)
    note: str = ""


@stage(Selection, gpu=False, draws="nothing")
def restore_samples(config: RestoreConfig, selection: Selection, out: str, compute: Compute) -> Work:
    """Make a Selection that keeps the named samples; `write_selected` then writes the shards.

    Raises:
        DataError: a key is not in quarantine, is unreadable, or occurs in several shards.
    """
    wanted = set(config.keys)
    _check(selection, wanted)

    def write_part(shard: str, part: Part, _advance: Advance) -> None:
        rows = selection.rows(shard).to_pylist()
        for row in rows:
            if row["status"] == "quarantined" and wanted & {row["key"], f"{shard}:{row['key']}"}:
                reason = {"stage": "restore", "reason": config.note or "put back by hand"}
                row |= {"status": "kept", "keep": True, "reasons": [*row["reasons"], reason]}
        table = pa.Table.from_pylist(rows, SEVERAL if selection.has_several else SCHEMA)
        before = selection.sample_rows(shard, ["status"])["status"].to_pylist()
        after = table["status"].take(sample_starts(table)).to_pylist()
        part.counts["restored"] += sum(old != new for old, new in zip(before, after, strict=True))
        part.counts.update(after)
        part.counts["samples"] += len(after)
        write_rows(part, shard, table)

    def finish(part: Part, builder: ArtifactBuilder) -> None:
        removed: Counter[str] = Counter()
        for shard in selection.shards:
            columns = ["label", "status", *(["sample"] if selection.has_several else [])]
            table = read_table(pa.BufferReader(builder.read(rows_name(shard))), columns)
            table = table.take(sample_starts(table))
            removed.update(str(row["label"]) for row in table.to_pylist() if row["status"] == "quarantined")
        summary = selection.read_object("selection.json", "classes")
        for label, entry in summary["classes"].items():
            entry["removed"] = removed[label]
            if "by_hygiene" in entry:
                entry["by_hygiene"] = min(entry["by_hygiene"], removed[label])
        part.write_json("selection.json", summary)

    settings = config.model_dump(mode="json") | {"keys": sorted(wanted)}
    return Work(parts=selection.shards, write_part=write_part, finish=finish, config=settings)


def _check(selection: Selection, wanted: set[str]) -> None:
    places: dict[str, list[str]] = {}  # key, or SHARD:KEY -> SHARD:KEY of each such sample in quarantine
    for shard in selection.shards:
        for row in selection.sample_rows(shard, ["key", "status"]).to_pylist():
            if row["status"] == "quarantined":
                for name in (row["key"], place := f"{shard}:{row['key']}"):
                    places.setdefault(name, []).append(place)
    for key in sorted(wanted):
        if key not in places:
            near = difflib.get_close_matches(key, places, n=3) or sorted(places)[:3]
            hint = f"keys there are {', '.join(near)} and others" if near else "quarantine is empty"
            raise DataError(f"key {key!r} is not in quarantine; {hint}: see the report")
        if len(found := places[key]) > 1:
            which = " or ".join(found[:3]) + (" or others" if len(found) > 3 else "")
            raise DataError(f"key {key!r} is in quarantine {len(found)} times; write {which}")
