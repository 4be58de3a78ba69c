"""Names of the classes of integer labels, for people to read: `classes.json` beside the shards, as `sanitize import`
writes it, or `dataset.json` beside the folder of clean or condensed shards.

No result depends on a name: a class without a name is shown by its number, and names never choose labels.
"""

import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from sanitize.errors import DataError
from sanitize.storage import exists, for_each, open_read
from sanitize.tar.names import printable

logger = logging.getLogger("sanitize.run")
CLASSES_FILE = "classes.json"
MAX_NAMES = 100_000  # class names of a data set
MAX_NAME = 200  # characters of a class name
_MAX_BYTES = 8 << 20  # of a file with names
_MAX_SHOWN = 60  # characters of a name in a sentence or a table
_MAX_NUMBER = 2**31
# Numbers of classes in a sentence: "class 3", "classes (3, 5, ...)", "labelled 3"; not "class 3.5" or "class 3 %".
_NUMBERS = re.compile(r"\b(class|classes|labelled)( \(?)(\d{1,9}(?:, \d{1,9})*)\b(?!\.\d| %)")
REMEDY = (
    "Import both with one list of classes (`sanitize import --classes FILE`); if a file is wrong, set "
    "index.class_names={}, which leaves names out"
)
_WRITTEN = ("clean", "quarantine", "shards")  # folders of written shards; their description is beside them


def _checked(name: str) -> str:
    if not name.isprintable():
        raise ValueError("a class name has characters that are not printable")
    return name


ClassName = Annotated[str, Field(min_length=1, max_length=MAX_NAME), AfterValidator(_checked)]
ClassNames = Annotated[dict[Annotated[int, Field(ge=0, lt=_MAX_NUMBER)], ClassName], Field(max_length=MAX_NAMES)]


def class_name(label: int, names: Mapping[int, str]) -> str:
    """Number of a class, with its name if there is one that says more; a long name is cut."""
    name = names.get(label, "")
    return str(label) if name in ("", str(label)) else f"{label} ({short(name)})"


def notes_on_names(names: Iterable[str]) -> list[str]:
    """What is odd about the names of classes: names that may mean one class, and names that may mean none."""
    alike: dict[str, list[str]] = {}
    missing = []
    for name in names:
        alike.setdefault(_form(name), []).append(name)
        if name.casefold() in ("nan", "null", "n/a", "na", "undefined", "-1"):
            missing.append(name)
    groups = [group for group in alike.values() if len(group) > 1]
    notes = []
    if groups:
        shown = "; ".join(", ".join(repr(short(name)) for name in group[:4]) for group in groups[:3])
        more = f" and {len(groups) - 3:,} more groups" if len(groups) > 3 else ""
        notes.append(
            f"names of classes differ in case, blanks, accents or zeros alone: {shown}{more}; each name is a class of "
            "its own: write them alike where they mean one class"
        )
    if missing:
        notes.append(f"class {', '.join(map(repr, missing))} looks like a missing label; it is a class like the others")
    return notes


def _form(name: str) -> str:
    """The name without what people write in different ways: case, blanks, accents; of a number its value."""
    if len(name) > MAX_NAME:  # normalising n accents takes n * n steps
        return name
    text = unicodedata.normalize("NFKD", name).casefold()
    if re.fullmatch(r"\s*[+-]?\d{1,18}(\.0*)?\s*", text):
        return str(int(text.partition(".")[0]))
    return "".join(c for c in text if not unicodedata.combining(c) and not c.isspace() and c not in "_-")


def short(name: str) -> str:
    """The name, cut where it is too long for a sentence or a table."""
    return name if len(name) <= _MAX_SHOWN else name[: _MAX_SHOWN - 2] + " …"


def named_in(text: str, names: Mapping[int, str]) -> str:
    """A sentence of this package about classes, with their names: "class 3", "classes 3, 5", "labelled 3".

    For sentences that are stored without the numbers they name. They hold no text from the data.
    """

    def name(found: re.Match[str]) -> str:
        numbers = [class_name(int(number), names) for number in found[3].split(", ")]
        return f"{found[1]}{found[2]}{', '.join(numbers)}"

    return _NUMBERS.sub(name, text) if names else text


def names_beside(urls: Iterable[str], remedy: str = REMEDY) -> dict[int, str]:
    """Names of the classes from the files beside shards, by number; empty where there are none.

    Args:
        urls: paths or URLs of the shards.
        remedy: as for `refuse_others`.

    Raises:
        DataError: the shards lie in several folders that number the classes in different ways.
    """
    folders = sorted({url[: url.rfind("/") + 1] for url in urls})
    files = [folder + CLASSES_FILE for folder in folders]
    for folder in folders:
        above, last = folder.rstrip("/").rpartition("/")[::2]
        if last in _WRITTEN:
            files.append(f"{above}/dataset.json" if above else "dataset.json")
    found: dict[int, str] = {}
    first = ""
    for url, names in zip(files, for_each(_names_in, files), strict=True):
        if names:
            refuse_others(names, found, url, first, remedy)
            first = first or url
            found |= names
    return dict(sorted(found.items()))


def refuse_others(
    names: Mapping[int, str], others: Mapping[int, str], url: str, whose: str, remedy: str = REMEDY
) -> None:
    """Raise DataError where two lists of names give a number two names, or a name two numbers.

    Args:
        names: names from the file `url`.
        others: names to compare with.
        url, whose: where the names and the others come from, for the message.
        remedy: end of the message: what to do.
    """
    numbers = {name: number for number, name in others.items()}
    for number, name in names.items():
        if others.get(number, name) != name or numbers.get(name, number) != number:
            there = f"{others[number]!r}" if number in others else f"no class, and {name!r} is {numbers[name]}"
            raise DataError(
                f"the classes are numbered in different ways: class {number} is {name!r} in {printable(url)}; in "
                f"{printable(whose)} it is {there}. {remedy}"
            )


def as_listed(names: Mapping[int, str]) -> dict[str, int]:
    """Content of `classes.json`: name -> number. Of numbers with one name the smallest has it."""
    return {names[number]: number for number in sorted(names, reverse=True)}


def _names_in(url: str, _place: Any) -> dict[int, str]:
    """Names in a file; none where there is no file, or, with a warning, where it is of another form."""
    if not exists(url):
        return {}
    try:
        with open_read(url) as stream:
            data = stream.read(_MAX_BYTES + 1)
        return _described(data) if url.endswith("dataset.json") else _listed(data)
    except (ValueError, TypeError, RecursionError, DataError) as error:
        logger.warning(
            "%s is no map from class names to integers (%s): classes are shown by number; index.class_names={0: NAME} "
            "names them",
            printable(url),
            printable(str(error)[:100]),
        )
        return {}


def _listed(data: bytes) -> dict[int, str]:
    """Names of `classes.json`: name -> number."""
    if len(data) > _MAX_BYTES:
        raise ValueError(f"more than {_MAX_BYTES:,} bytes")
    found = json.loads(data)
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in found.values()):
        raise ValueError("a value is no integer")
    if len(set(found.values())) < len(found):
        raise ValueError("two names have one number")
    return _bounded({number: name for name, number in found.items()})


def _described(data: bytes) -> dict[int, str]:
    """Names of the `dataset.json` of clean shards: number -> name."""
    if len(data) > _MAX_BYTES:
        raise ValueError(f"more than {_MAX_BYTES:,} bytes")
    description = json.loads(data)
    found: Any = description.get("class_names", {}) if isinstance(description, dict) else {}
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ValueError("class_names are no texts")
    return _bounded({int(number): name for number, name in found.items()})


def _bounded(names: Mapping[int, str]) -> dict[int, str]:
    """The names as they are kept: printable, and of limited length."""
    if len(names) > MAX_NAMES:
        raise ValueError(f"more than {MAX_NAMES:,} names")
    if not all(0 <= number < _MAX_NUMBER for number in names):
        raise ValueError("a number is negative or too large")
    shown = {number: printable(names[number]) for number in sorted(names) if names[number]}
    return {number: name if len(name) <= MAX_NAME else name[: MAX_NAME - 2] + " …" for number, name in shown.items()}
