"""COCO captions: a JSON file with `images` (id, file_name) and `annotations` (image_id, caption).

The file is parsed one entry at a time, so that only the needed fields are held beside its text.
"""

import json
from collections.abc import Iterator
from typing import Any, TypeGuard

from sanitize.errors import ConfigError, DataError
from sanitize.importing.config import ImportConfig
from sanitize.importing.files import Files, Folder, Listed, folder_of
from sanitize.importing.source import as_bytes
from sanitize.storage import fingerprint, open_read
from sanitize.tar.names import as_path

MAX_CAPTIONS, MAX_CAPTION = 100, 10_000  # captions of an image, characters of a caption
_WINDOWS = (1 << 12, 1 << 16, 1 << 20)  # characters of one entry; the last is the limit
Identity = int | str  # of an image
_DECODER = json.JSONDecoder()
_BLANK = " \t\r\n"


def coco_captions(url: str, config: ImportConfig) -> Files:
    """The images of an annotation file, sorted by file name; the captions of an image keep the order of the file.

    Args:
        url: path or URL of the JSON file.
        config: settings; `images` is the folder that file names start from.

    Raises:
        ConfigError: there are no captions in the file (annotations of boxes), or too many images.
        DataError: the file cannot be read, is too large, or is not of this form.
    """
    stamp = fingerprint(url)
    if int(stamp["size"]) > config.max_json_bytes:
        raise DataError(f"{url} has {stamp['size']:,} bytes, more than max_json_bytes {config.max_json_bytes:,}")
    with open_read(url) as stream:
        data = stream.read(config.max_json_bytes + 1)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{url} is no JSON file: {error.reason} at byte {error.start}") from error
    del data
    names, captions, others = _parse(text, url, config)
    folder = Folder(config.images or folder_of(url), config.max_samples)
    listed, before = [], None
    known = set()
    for name, identity in sorted(names, key=lambda one: (as_bytes(one[0]), str(one[1]))):
        found = captions.get(identity, [])
        again = as_path(name) == before or identity in known
        listed.append(Listed(name, -1, tuple(found), _problem(found, again)))
        before = as_path(name)
        known.add(identity)
    notes = {
        "captions of no image": sum(len(found) for identity, found in captions.items() if identity not in known),
        "annotations without a caption": others,
    }
    notes = {name: n for name, n in notes.items() if n}
    origin = (stamp["size"], stamp["modified"])
    return Files(folder, listed, None, config.max_image_bytes, origin=origin, notes=notes)


def _problem(captions: list[str], again: bool) -> str | None:
    if again:
        return "listed again: an earlier entry has this file or id"
    if not captions:
        return "no caption"
    if len(captions) > MAX_CAPTIONS:
        return f"more than {MAX_CAPTIONS} captions"
    return f"a caption of more than {MAX_CAPTION} characters" if max(map(len, captions)) > MAX_CAPTION else None


def _parse(
    text: str, url: str, config: ImportConfig
) -> tuple[list[tuple[str, Identity]], dict[Identity, list[str]], int]:
    """File names with ids, captions by id of the image, and the number of annotations without a caption."""
    names: list[tuple[str, Identity]] = []
    captions: dict[Identity, list[str]] = {}
    others = 0
    sections = set()
    for section, entry in _entries(text, url):
        sections.add(section)
        if not isinstance(entry, dict):
            raise DataError(f"{url}: an entry of `{section}` is no object")
        if section == "images":
            name, identity = entry.get("file_name"), entry.get("id")
            if not isinstance(name, str) or not _is_identity(identity):
                raise DataError(f"{url}: image {len(names)} has no file_name, or no id that is an integer or a text")
            names.append((name, identity))
        elif not _is_caption(entry.get("caption")) or not _is_identity(entry.get("image_id")):
            others += 1
        else:
            found = captions.setdefault(entry["image_id"], [])
            if len(found) <= MAX_CAPTIONS:
                found.append(entry["caption"][: MAX_CAPTION + 1].strip())
        if max(len(names), len(captions)) > config.max_samples:
            raise ConfigError(f"{url} has more than {config.max_samples:,} images; raise max_samples")
    if not names:
        raise DataError(f"{url} is no annotation file of COCO: it has no `images`")
    if not captions:
        what = "its annotations have no captions (boxes?)" if others else "it has no `annotations`"
        raise ConfigError(f"{url}: {what}; give a captions_*.json, or class folders for labels")
    return names, captions, others


def _is_caption(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_identity(value: Any) -> TypeGuard[Identity]:
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))


def _entries(text: str, url: str) -> Iterator[tuple[str, Any]]:
    """Section and value of each entry of `images` and `annotations`; the other sections are stepped over."""
    try:
        at = _expect(text, 0, "{")
        while text[at : at + 1] != "}":
            section, at = _value(text, at)
            at = _expect(text, at, ":")
            if text[at : at + 1] == "[":
                at = _skip(text, at + 1)
                while text[at : at + 1] != "]":
                    entry, at = _value(text, at)
                    if section in ("images", "annotations"):
                        yield section, entry
                    at = _after(text, at, "]")
                at = _skip(text, at + 1)
            else:
                _, at = _value(text, at)
            at = _after(text, at, "}")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{url} is no JSON file of COCO's form: {error}") from error


def _value(text: str, at: int) -> tuple[Any, int]:
    """The value at a position, and the position behind it and the blanks after it."""
    for size in _WINDOWS:
        try:
            value, end = _DECODER.raw_decode(text[at : at + size])
        except ValueError:
            if at + size >= len(text):
                raise
            continue
        if end < size or at + size >= len(text):  # else a number may go on
            return value, _skip(text, at + end)
    raise ValueError(f"an entry of more than {_WINDOWS[-1]:,} characters at character {at:,}, or none at all")


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in _BLANK and at < len(text):
        at += 1
    return at


def _expect(text: str, at: int, sign: str) -> int:
    at = _skip(text, at)
    if text[at : at + 1] != sign:
        raise ValueError(f"{sign!r} expected at character {at:,}")
    return _skip(text, at + 1)


def _after(text: str, at: int, end: str) -> int:
    """Position of the next entry, or of the end."""
    if text[at : at + 1] == end:
        return at
    at = _expect(text, at, ",")
    if text[at : at + 1] == end:
        raise ValueError(f"an entry expected at character {at:,}")
    return at
