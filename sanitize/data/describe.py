"""Description of clean shards for other programs: `dataset.json`, and the same as `croissant.json`, the format of
catalogues and loaders (Croissant 1.0, MLCommons: http://mlcommons.org/croissant/1.0).

Both are beside the folder `clean/`, not in it: Hugging Face `datasets` reads any .json among shards as data.
"""

import glob
import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import pyarrow.compute as pc

from sanitize.artifacts import FileEntry
from sanitize.data.dataset import Dataset
from sanitize.data.samples import ALL
from sanitize.data.tables import Selection
from sanitize.plural import counted
from sanitize.tar.compression import unread_suffix

# The standard JSON-LD context of Croissant 1.0, whole: mlcroissant warns of any other.
_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{
        term: f"cr:{term}"
        for term in (
            *("citeAs", "column", "equivalentProperty", "extract", "field", "fileObject", "fileProperty", "fileSet"),
            *("format", "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet"),
            *("references", "regex", "repeated", "replace", "samplingRate", "separator", "source", "subField"),
            "transform",
        )
    },
}
_MIME_TYPES = {
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "jpe": "image/jpeg",
    "jfif": "image/jpeg",
    "png": "image/png",
    "webp": "image/webp",
    "bmp": "image/bmp",
    "gif": "image/gif",
    "tif": "image/tiff",
    "tiff": "image/tiff",
    "avif": "image/avif",
    "ppm": "image/x-portable-pixmap",
    "pgm": "image/x-portable-graymap",
    "pbm": "image/x-portable-bitmap",
    "pnm": "image/x-portable-anymap",
}


def describe_clean(dataset: Dataset, selection: Selection, files: Mapping[str, FileEntry]) -> dict[str, Any]:
    """Content of `dataset.json`.

    Args:
        dataset: index that the shards were written from.
        selection: verdicts on the samples.
        files: sha256 and size of every written shard, by `clean/SHARD`; others are ignored.

    Returns:
        `samples`: number of kept, quarantined and unreadable samples. `n_classes`; `classes`: their names, or None;
        `class_names`: number -> name, where labels are integers that have names.
        `labels`: label -> kept samples, perhaps 0. `label`: place of the class, as in `IndexConfig.label`. `image`:
        settings of decoding (size is [height, width]), and suffixes of usable images. `shards`: path -> samples, size
        in bytes, sha256; in sorted order. `made_from`: digests of index and selection.
    """
    counts = selection.manifest().counts
    labels: Counter[int] = Counter()
    suffixes: set[str] = set()
    shards = {}
    for shard in dataset.shards:
        if unread_suffix(shard):
            continue  # it has no clean shard
        verdicts = selection.sample_rows(shard, ["label", "keep"])
        kept = verdicts["label"].filter(verdicts["keep"]).to_pylist()
        labels.update(kept)
        images = dataset.rows(shard, ["image", "status"])
        names = images["image"].filter(pc.equal(images["status"], "ok"))
        suffixes.update(pc.replace_substring_regex(names, r"^(?:.*/)?[^./]*\.", "").unique().to_pylist())
        entry = files[f"clean/{shard}"]
        shards[f"clean/{shard}"] = {"samples": len(kept), "size": entry.size, "sha256": entry.sha256}
    return {
        "format": 1,
        "samples": {status: counts.get(status, 0) for status in ("kept", "quarantined", "unreadable")},
        "n_classes": dataset.n_classes,
        "classes": dataset.info.get("classes"),
        **({"class_names": names} if (names := dataset.info.get("class_names")) else {}),
        "labels": {label: labels[int(label)] for label in dataset.info["labels"]},
        "label": dataset.info["label"],
        "image": {**dataset.info["image"], "size": dataset.info["image_size"], "suffixes": sorted(suffixes)},
        "shards": shards,
        "made_from": {"dataset": dataset.digest, "selection": selection.digest},
    }


def croissant(description: Mapping[str, Any]) -> dict[str, Any]:
    """Content of `croissant.json`, from that of `dataset.json`.

    Three record sets: `images` and `labels` as stored in the shards, and `samples`, which joins them by key; `images`
    alone where no member of the shards has labels. With several pictures a sample, a record of `images` and `samples`
    is one picture, by its name. Paths are relative to the folder of the file. Unknown fields (license, creator, url,
    datePublished, citeAs, version) are left out; add them before publication.
    """
    n = description["samples"]
    source = description["made_from"]
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": f"clean-{source['selection'][:12]}",
        "description": (
            f"{counted(n['kept'], 'sample')} {_classes(description)} in "
            f"{counted(len(description['shards']), 'WebDataset shard')}, kept by "
            f"sanitize out of {sum(n.values())} ({n['quarantined']} quarantined, {n['unreadable']} "
            f"unreadable). Index {source['dataset']}, selection {source['selection']}."
        ),
        "distribution": _distribution(description),
        "recordSet": _record_sets(description),
    }


def _classes(description: Mapping[str, Any]) -> str:
    return "without labels" if description["label"] is None else f"of {counted(description['n_classes'], 'class')}"


def _label_member(description: Mapping[str, Any]) -> tuple[str, str] | None:
    """Suffix of the member with the label, and the field or path in it; None if no member of the shards has it."""
    label = description["label"]
    if label is None or label.startswith("table:"):
        return None
    suffix, _, field = label.partition(":")
    return suffix, field


def _distribution(description: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Shards, and the images and labels in them. @id must be an IRI; contentUrl is opened as a path."""
    shards = [
        {
            "@type": "cr:FileObject",
            "@id": quote(path),
            "name": path,
            "contentUrl": path,
            "contentSize": f"{shard['size']} B",
            "encodingFormat": "application/x-tar",  # compressed or not: Croissant's readers find out
            "sha256": shard["sha256"],
        }
        for path, shard in description["shards"].items()
    ]
    shard_ids = [{"@id": shard["@id"]} for shard in shards]
    suffixes = description["image"]["suffixes"]
    image_types = sorted({_MIME_TYPES[suffix.lower().rpartition(".")[2]] for suffix in suffixes})
    files = [*shards, _file_set("image-files", shard_ids, suffixes, image_types)]
    if (member := _label_member(description)) is not None:
        type = "application/json" if member[1] else "text/plain"
        files.append(_file_set("label-files", shard_ids, [member[0]], [type]))
    return files


def _file_set(name: str, shards: list[dict[str, str]], suffixes: list[str], types: list[str]) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": name,
        "name": name,
        "containedIn": shards,
        "encodingFormat": types,
        "includes": [f"*.{glob.escape(suffix)}" for suffix in suffixes],
    }


def _record_sets(description: Mapping[str, Any]) -> list[dict[str, Any]]:
    image_key = _key("image-files", description["image"]["suffixes"])
    has_several = description["image"].get("member") == ALL
    name = _field("images/name", "sc:Text", _extract("image-files", {"fileProperty": "fullpath"}))
    images = _record_set(
        "images",
        *([name] if has_several else []),
        _field("images/key", "sc:Text", image_key),
        _field("images/image", "sc:ImageObject", _extract("image-files", {"fileProperty": "content"})),
    )
    if (member := _label_member(description)) is None:
        return [images]
    suffix, field = member
    value = {"jsonPath": _json_path(field)} if field else {"fileProperty": "content"}
    type = ["sc:Text" if description.get("classes") else "sc:Integer", "cr:Label"]
    # Joined from the labels: a second picture of a sample (KEY.mask.png) has no label and is dropped.
    keys = [_field("samples/key", "sc:Text", _other("labels/key"), references=_other("images/key"))]
    if has_several:
        keys = [
            _field("samples/name", "sc:Text", _other("images/name")),
            _field("samples/key", "sc:Text", _other("images/key"), references=_other("labels/key")),
        ]
    return [
        images,
        _record_set(
            "labels",
            _field("labels/key", "sc:Text", _key("label-files", [suffix])),
            _field("labels/label", type, _extract("label-files", value)),
        ),
        _record_set(
            "samples",
            *keys,
            _field("samples/image", "sc:ImageObject", _other("images/image")),
            _field("samples/label", type, _other("labels/label")),
        ),
    ]


def _json_path(field: str) -> str:
    return "$" + "".join(f"[{json.dumps(name, ensure_ascii=False)}]" for name in field.split("."))


def _record_set(name: str, *fields: dict[str, Any]) -> dict[str, Any]:
    """A record set; the first field is its key."""
    key = {"@id": fields[0]["@id"]}
    return {"@type": "cr:RecordSet", "@id": name, "name": name, "key": key, "field": list(fields)}


def _field(id: str, type: str | list[str], source: dict[str, Any], **more: Any) -> dict[str, Any]:
    name = id.rpartition("/")[2]
    return {"@type": "cr:Field", "@id": id, "name": name, "dataType": type, "source": source, **more}


def _extract(file_set: str, what: dict[str, str]) -> dict[str, Any]:
    return {"fileSet": {"@id": file_set}, "extract": what}


def _key(file_set: str, suffixes: list[str]) -> dict[str, Any]:
    """Name up to the first dot of its last component, for names with one of the suffixes."""
    regex = rf"^((?:.*/)?[^/.]+)\.(?:{'|'.join(map(re.escape, suffixes))})$"
    return {**_extract(file_set, {"fileProperty": "fullpath"}), "transform": {"regex": regex}}


def _other(field: str) -> dict[str, Any]:
    return {"field": {"@id": field}}
