"""The section about the hygiene of the data: duplicates, leaks, images of low quality, wrong hashes."""

from collections.abc import Mapping
from typing import Any

from sanitize.data.class_names import class_name
from sanitize.data.dataset import Dataset
from sanitize.data.tables import HYGIENE_KINDS, Hygiene, Selection
from sanitize.plural import counted
from sanitize.report.pictures import Thumbnail, pictures, written
from sanitize.select.write import Shards

N_GROUPS, N_MEMBERS, N_EXAMPLES, N_PICTURES = 8, 4, 3, 48
EXPLAINED = {
    "exact_duplicate": "The same file as an earlier sample.",
    "near_duplicate": "Nearly the picture of an earlier sample: encoded again, rescaled, recoloured, the next frame.",
    "label_conflict": "Copies of one picture have different labels.",
    "test_leak": "The picture is also in the test shards: accuracy on them is too high.",
    "wrong_hash": "The stated hash is of another image (exchanged, or encoded again), or a table of hashes has none.",
    "dark": "Nearly all pixels are dark.",
    "bright": "Nearly all pixels are white.",
    "blank": "One colour, or hardly any contrast.",
    "blurred": "No sharp edge at the size at which models see the image.",
    "low_entropy": "Few levels of brightness.",
    "odd_aspect": "Much longer than wide, or wider than long.",
    "odd_size": "Much larger or smaller than the median.",
    "grey": "No colour, where most images have colour.",
    "torn": "Grey rows at one end, as decoders make of a file that was cut.",
}


def hygiene_numbers(hygiene: Hygiene, selection: Selection, names: Mapping[int, str]) -> dict[str, Any]:
    """Content of `report.json`: counts of each kind, groups of copies, examples with their verdict and `class`."""
    info = hygiene.read_json("hygiene.json")
    groups = [
        group
        | {
            "members": group["members"][:N_MEMBERS],
            "classes": {class_name(int(label), names): n for label, n in group["labels"].items()},
        }
        for group in info["groups"][:N_GROUPS]
    ]
    examples = {kind: found[:N_EXAMPLES] for kind, found in info["examples"].items()}
    shown = [*(row for found in examples.values() for row in found), *(row for g in groups for row in g["members"])]
    for shard in sorted({row["shard"] for row in shown}):
        statuses = selection.rows(shard, ["status"])["status"]
        for row in shown:
            if row["shard"] == shard:
                row["class"] = class_name(row["label"], names)
                row["status"] = statuses[row["position"]].as_py()
    kinds = [
        {"kind": kind, "n": info["counts"][kind], "n_classes": len(info["classes"][kind]), "explained": EXPLAINED[kind]}
        for kind in HYGIENE_KINDS
        if info["counts"][kind]
    ]
    return {
        "checked": info["checked"],
        "samples": info["samples"],
        "kinds": kinds,
        "bursts": info["bursts"],
        "groups": groups,
        "examples": {kind: examples[kind] for kind in HYGIENE_KINDS if kind in examples},
        "quarantine": selection.read_json("selection.json").get("quarantine", []),
    }


def members_of(group: Mapping[str, Any]) -> str:
    """Size of a group of alike pictures in words, and whether their files are equal."""
    n, n_files = group["n"], group["n_files"]
    if n_files == 1:
        return f"{counted(n, 'copy')} of one file"
    alike = counted(n, "near-duplicate")
    return alike if n_files == n else f"{alike} in {counted(n_files, 'file')}"


def hygiene_pictures(found: dict[str, Any], dataset: Dataset, shards: Shards) -> dict[tuple[str, int], Thumbnail]:
    """Thumbnails of the samples in the section, by shard and position."""
    rows = [
        *(row for kind in found["examples"].values() for row in kind),
        *(m for g in found["groups"] for m in g["members"]),
    ]
    unique = {(row["shard"], row["position"]): row for row in rows}
    wanted = list(unique.values())[:N_PICTURES]
    thumbnails = pictures(wanted, dataset, written(shards)) if wanted else []
    return {at: picture for at, picture in zip(unique, thumbnails, strict=False) if picture is not None}
