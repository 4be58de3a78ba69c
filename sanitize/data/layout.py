"""Layouts of shards that split samples: reasons that name the cause, which one sample alone does not show."""

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from sanitize.data.samples import is_picture
from sanitize.tar.names import printable, split_name

_SECOND = "occurs a second time in the shard"
_HALF = ("no image member", "no .")


def explained(rows: pa.Table, label: str | None) -> pa.Table:
    """Index rows of a shard with better reasons where its members do not stand together, or lie in parallel folders.

    Args:
        rows: index rows (rows.SCHEMA) of one shard.
        label: `IndexConfig.label`.
    """
    reasons = rows["reason"].to_pylist()
    bad = [i for i, reason in enumerate(reasons) if reason is not None]
    if not bad:
        return rows
    keys = rows["key"].to_pylist()
    better = _apart(bad, keys, reasons, rows) or _folders(bad, keys, reasons, rows, label)
    for i, reason in better.items():
        reasons[i] = reason
    at = rows.schema.get_field_index("reason")
    return rows.set_column(at, "reason", pa.array(reasons, pa.string())) if better else rows


def _apart(bad: Iterable[int], keys: list[str], reasons: list[str], rows: pa.Table) -> dict[int, str]:
    """Reasons of samples with one key and without a common suffix: parts of one sample."""
    again = {keys[i] for i in bad if reasons[i].endswith(_SECOND)}
    if not again:
        return {}
    places: dict[str, list[int]] = {key: [] for key in again}
    for i, key in enumerate(keys):
        if key in again:
            places[key].append(i)
    better: dict[int, str] = {}
    for key, at in places.items():
        suffixes = [suffix for i in at for suffix in set(_suffixes(rows, i))]
        if len(set(suffixes)) == len(suffixes):
            reason = f"the members of key '{key}' do not stand together: make the tar again, with tar --sort=name"
            better |= {i: reason for i in at if reasons[i] is not None and reasons[i].startswith((*_HALF, "key "))}
    return better


def _folders(
    bad: Iterable[int], keys: list[str], reasons: list[str], rows: pa.Table, label: str | None
) -> dict[int, str]:
    """Reasons of half samples whose keys differ in the folder alone."""
    if label is None:
        return {}
    label_suffix = label.partition(":")[0].lower()
    halves: dict[str, dict[str, list[int]]] = {}
    for i in bad:
        if "/" in keys[i] and reasons[i].startswith(_HALF):
            suffixes = _suffixes(rows, i)
            half = "label" if label_suffix in suffixes else "image" if any(map(is_picture, suffixes)) else "other"
            halves.setdefault(keys[i].rpartition("/")[2], {}).setdefault(half, []).append(i)
    better: dict[int, str] = {}
    for by_half in halves.values():
        if len(by_half.get("image", ())) == len(by_half.get("label", ())) == 1:
            both = [*by_half["image"], *by_half["label"]]
            image, with_label = (keys[i] for i in both)
            reason = (
                f"picture and label have different keys, '{image}' and '{with_label}': the folder is part of the key; "
                "put both into one folder"
            )
            better |= dict.fromkeys(both, reason)
    return better


def _suffixes(rows: pa.Table, i: int) -> list[str]:
    return [split_name(member["name"])[1] for member in rows["members"][i].as_py()]


def dots(names: Iterable[str], label: str) -> str | None:
    """Reason where dots in the names of files split them at the wrong place, or the label has a compound suffix.

    Args:
        names: names of the members of a sample without a label, or with several pictures.
        label: suffix of the label; lower-case.

    Returns:
        The reason; None if there is no sign of either.
    """
    suffixes = {name: split_name(name)[1] for name in names}
    if label in suffixes.values():
        return None
    labels = _stems(suffixes, lambda suffix: suffix.endswith(f".{label}"))
    pictures = _stems(suffixes, lambda suffix: "." in suffix and is_picture(suffix))
    for stem in pictures:
        if stem in labels:
            name = pictures[stem].rpartition("/")[2]
            key, suffix = split_name(name)
            return (
                f"a key ends at the first dot, and the name has more: the key of '{_cut(name)}' is '{_cut(key)}', its "
                f"suffix '{_cut(suffix)}'; replace the other dots"
            )
    if len(labels) == 1:
        found = next(iter(labels.values()))
        return f"no .{label} member, but '{_cut(split_name(found)[1])}': set index.label to that suffix"
    return None


def _stems(suffixes: Mapping[str, str], fits: Any) -> dict[str, str]:
    """Suffixes without their last part, and the first name with each."""
    found: dict[str, str] = {}
    for name, suffix in suffixes.items():
        if fits(suffix):
            found.setdefault(suffix.rpartition(".")[0], name)
    return found


def _cut(text: str) -> str:
    return printable(text if len(text) <= 60 else f"{text[:58]} …")
