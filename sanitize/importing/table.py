"""A table of paths and labels: .csv or .tsv, UTF-8, one image a row."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import IO

from sanitize.data.labels import delimiter_of
from sanitize.errors import ConfigError, DataError
from sanitize.importing.config import ImportConfig
from sanitize.importing.files import Files, Folder, Listed, folder_of
from sanitize.importing.source import MAX_CLASS_NAME, MAX_CLASSES, class_numbers, not_listed, shown_names
from sanitize.storage import fingerprint, open_read
from sanitize.tar.names import as_path, printable

PATHS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img", "img_path")
LABELS = ("label", "labels", "class", "class_name", "category", "target", "y")
_MAX_LINE = 1 << 20  # characters
_MAX_COLUMNS = 1_000
_EXCESS = "a row of more cells than the table has columns: put cells with a comma in quotes"


def table(url: str, config: ImportConfig) -> Files:
    """The files that a table lists, sorted by path; a path that is listed again is offered again, with a problem.

    Args:
        url: path or URL of the table.
        config: settings; `images` is the folder that paths start from.

    Raises:
        ConfigError: the columns cannot be told apart, or there are too many rows or classes.
        DataError: the table cannot be read, or has no rows.
    """
    stamp = fingerprint(url)
    if int(stamp["size"]) > config.max_table_bytes:
        raise DataError(f"{url} has {stamp['size']:,} bytes, more than max_table_bytes {config.max_table_bytes:,}")
    folder = Folder(config.images or folder_of(url), config.max_samples)
    rows = sorted(_rows(url, config), key=lambda row: (row[0].encode("utf-8", "surrogatepass"), row[1]))
    if not rows:
        raise DataError(f"{url} has no rows")
    usable = (label for _, _, label, problem in rows if problem is None and 0 < len(label) <= MAX_CLASS_NAME)
    numbers = class_numbers(usable, config.classes)
    listed, before = [], None
    for path, _, label, excess in rows:
        place = as_path(path)
        problem = excess or _problem(label, numbers)
        if problem is None and place == before:
            problem = "listed again: an earlier row has this path"
        listed.append(Listed(path, numbers.get(label, -1), (), problem))
        before = place
    origin = (stamp["size"], stamp["modified"])
    return Files(folder, listed, shown_names(numbers), config.max_image_bytes, origin=origin)


def _problem(label: str, numbers: Mapping[str, int]) -> str | None:
    if not label:
        return "no label"
    if len(label) > MAX_CLASS_NAME:
        return f"a label of more than {MAX_CLASS_NAME} characters"
    return None if label in numbers else not_listed(label)


def _rows(url: str, config: ImportConfig) -> Iterator[tuple[str, int, str, str | None]]:
    """Path, number of the row, label, and problem of each row that is not empty.

    A row of more cells than columns is refused: where a comma split a cell, the label is that of another column. Empty
    cells at its end are none, and cells that are missing there are empty (Excel leaves them out).
    """
    classes: dict[str, str] = {}
    with open_read(url) as raw, io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="") as text:
        lines = _lines(text, url)
        first = next(lines, "")
        if not first:
            raise DataError(f"{url} is empty")
        if first.startswith(("\udcff\udcfe", "\udcfe\udcff")):
            raise DataError(f"{url} is UTF-16 text: save it as UTF-8")
        delimiter = "\t" if url.lower().endswith(".tsv") else delimiter_of(first)
        reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
        line = 1
        try:
            columns: list[str] = []
            for number, row in enumerate(reader):
                line = reader.line_num + 1
                if not columns:
                    columns = row if config.header else list(map(str, range(len(row))))
                    image, label = _columns(columns, config, url)
                    if config.header:
                        continue
                if number > config.max_samples:
                    raise ConfigError(f"{url} has more than {config.max_samples:,} rows; raise max_samples")
                if any(row):
                    values = [row[i].strip() if i < len(row) else "" for i in (image, label)]
                    if len(classes) > MAX_CLASSES:
                        class_numbers(classes)  # raises
                    problem = _EXCESS if any(cell.strip() for cell in row[len(columns) :]) else None
                    # Equal texts are stored once.
                    yield values[0], number, classes.setdefault(values[1], values[1]), problem
        except csv.Error as error:
            why = "a quotation mark is not closed" if "unexpected end" in str(error) else str(error)
            raise DataError(f"{url}, line {line}: {why}") from error


def _lines(text: IO[str], url: str) -> Iterator[str]:
    """Lines of bounded length."""
    while line := text.readline(_MAX_LINE):
        if len(line) == _MAX_LINE and not line.endswith("\n"):
            raise DataError(f"{url} has a line of more than {_MAX_LINE:,} characters: is it a table?")
        yield line.replace("\0", "\\x00")


def _columns(columns: Sequence[str], config: ImportConfig, url: str) -> tuple[int, int]:
    """Position of the column of paths and of the column of labels."""
    if len(columns) > _MAX_COLUMNS:
        raise DataError(f"{url} has more than {_MAX_COLUMNS} columns")
    names = [name.strip() for name in columns]
    image = _column(names, config.image_column, PATHS, "paths", "--image-column", url, config.header)
    label = _column(names, config.label_column, LABELS, "labels", "--label-column", url, config.header)
    return image, label


def _column(
    names: Sequence[str], wanted: str | None, usual: Sequence[str], what: str, flag: str, url: str, header: bool
) -> int:
    shown = ", ".join(printable(name)[:40] for name in names[:20])
    if wanted is not None:
        if wanted not in names:
            raise ConfigError(f"{flag} {wanted}: {url} has the columns {shown}")
        return _the_only(names, wanted, url)
    lower = [name.lower() for name in names]
    found = [name for name in usual if name in lower]
    if len(found) == 1:
        return _the_only(lower, found[0], url)
    why = f"several columns may hold {what} ({', '.join(found)})" if found else f"no column of {what} is known by name"
    hint = "" if found or not header else ". If the first line is a row, add --no-header"
    raise ConfigError(f"{url}: {why}; choose with {flag} among {shown}{hint}")


def _the_only(names: Sequence[str], name: str, url: str) -> int:
    if names.count(name) > 1:
        raise ConfigError(f"{url} has {names.count(name)} columns {printable(name)!r}: rename all but one")
    return names.index(name)
