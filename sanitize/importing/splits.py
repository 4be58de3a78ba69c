"""Splits of a data set (train, test, ...): their usual names, and the choice of one."""

import re
from collections.abc import Sequence

from sanitize.errors import ConfigError

SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"})
_IN_A_NAME = re.compile(rf"(?:^|[/_.-])({'|'.join(sorted(SPLITS, key=len, reverse=True))})(?=[/_.\d-])")


def split_of(name: str) -> str | None:
    """Split that the path of a file names (`data/Train-00000-of-00002.parquet`), in lower case, or None.

    The last part of the path that names one decides.
    """
    found = _IN_A_NAME.findall(name.lower())
    return found[-1] if found else None


def names_split(folder: str) -> bool:
    """True for a folder whose name has that of a split in it (`Train`, `seg_train`, `val2017`)."""
    return not SPLITS.isdisjoint(re.split("[^a-z]+", folder.lower()))


def choose_split(found: Sequence[str], wanted: str | None, place: str) -> str | None:
    """The split to import; None for all of them.

    Raises:
        ConfigError: there are several and none was chosen, or the chosen one is not there.
    """
    names = ", ".join(found)
    if wanted == "all":
        return None
    if wanted is not None and wanted not in found:
        raise ConfigError(f"--split {wanted}: {place} has {names or 'no splits'}")
    if wanted is None and len(found) > 1:
        raise ConfigError(f"{place} has several splits: {names}. Choose one with --split, or take --split all")
    return wanted or (found[0] if found else None)
