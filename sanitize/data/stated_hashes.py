"""Hashes of images that the metadata of a sample state."""

import hashlib
import re

from sanitize.data.labels import BadLabel, json_value
from sanitize.data.samples import Sample
from sanitize.tar.names import split_name

_HASHES = {32: "md5", 40: "sha1", 64: "sha256", 128: "sha512"}  # by the number of digits
_HEXADECIMAL = re.compile(rb"[0-9a-fA-F]+")


def differing_hash(sample: Sample, image: bytes, field: str) -> str | None:
    """The hash that the metadata state for the image, where it is not the image's own.

    Args:
        sample: sample with the payload of its .json member.
        image: its image as stored.
        field: field of the .json member with the hash in hexadecimal; its length tells the kind.

    Returns:
        The stated hash; "" where the image has it; None where no hash is stated, or one that cannot be read.
    """
    found = [data for name, data in sample.members if split_name(name)[1] == "json"]
    try:
        stated = json_value(found[0], field).strip() if len(found) == 1 else b""
    except BadLabel:
        return None
    kind = _HASHES.get(len(stated))
    if kind is None or not _HEXADECIMAL.fullmatch(stated):
        return None
    own = hashlib.new(kind, image, usedforsecurity=False).hexdigest()
    text = stated.decode().lower()
    return "" if text == own else text
