"""Hashes of images that the metadata of a sample state, or a table beside the shards."""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from sanitize.data.labels import TWICE, BadLabel, json_value, read_table
from sanitize.data.samples import Sample
from sanitize.tar.names import printable, split_name

_HASHES = {32: "md5", 40: "sha1", 64: "sha256", 128: "sha512"}  # by the number of digits
_HEXADECIMAL = re.compile(rb"[0-9a-fA-F]+")
NO_ROW = "the table of hashes has no row with the key of this sample"
SEVERAL_ROWS = "the table of hashes has several rows with the key of this sample"
NO_HASH = "the table of hashes has no hash that can be read for this sample"


class StatedHashes:
    """Compare images with the hashes that are stated for them.

    Args:
        verify: `IndexConfig.verify`, "json:FIELD" or "table:FILE#COLUMN". The length of a hash tells its kind.

    Attributes:
        sha256: digest of the table; None without one.

    Raises:
        ConfigError: the table has no such column, or is larger than the limits.
        DataError: the table cannot be read.
    """

    def __init__(self, verify: str) -> None:
        kind, _, self._field = verify.partition(":")
        self._table: Mapping[str, Any] | None = None
        self.sha256: str | None = None
        if kind == "table":
            self._table, self.sha256 = read_table(*self._field.rpartition("#")[::2], "hashes")

    def differing(self, sample: Sample, image: bytes) -> str | None:
        """What is wrong with the image of a sample.

        Args:
            sample: sample with the payload of its .json member.
            image: its image as stored.

        Returns:
            The stated hash where the image has another one, or the reason why the table states none; "" where the
            image has the stated hash; None where the metadata state no hash that can be read. Whoever makes a table
            lists all samples; metadata are often without a hash.
        """
        if self._table is not None:
            value = self._table.get(printable(sample.key))
            if value is None or value is TWICE:
                return NO_ROW if value is None else SEVERAL_ROWS
            return _differing(value.strip(), image, NO_HASH) if isinstance(value, bytes) else NO_HASH
        found = [data for name, data in sample.members if split_name(name)[1] == "json"]
        try:
            stated = json_value(found[0], self._field).strip() if len(found) == 1 else b""
        except BadLabel:
            return None
        return _differing(stated, image, None)


def _differing(stated: bytes, image: bytes, otherwise: str | None) -> str | None:
    """The stated hash if the image has another one, "" if it has this one, `otherwise` if this is no hash."""
    kind = _HASHES.get(len(stated))
    if kind is None or not _HEXADECIMAL.fullmatch(stated):
        return otherwise
    own = hashlib.new(kind, image, usedforsecurity=False).hexdigest()
    text = stated.decode().lower()
    return "" if text == own else text
