"""Names of members: key and suffix, for one name and for many at once; names that stand for the same file."""

import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from unicodedata import normalize

import numpy as np

# An ordinary name; the groups are its key and suffix, as in `split_name`.
USUAL_NAME = re.compile(r"((?:[\w-]+/)*[\w-]+)\.([\w-]+(?:\.[\w-]+)*)", re.ASCII)
_DOT, _SLASH, _WORD, _OTHER = 1, 2, 3, 4
_KINDS = np.full(256, _OTHER, np.uint8)
_KINDS[list(b"-_0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")] = _WORD
_KINDS[ord(".")], _KINDS[ord("/")], _KINDS[0] = _DOT, _SLASH, 0
_MAX_COMPONENT = 255  # bytes; the limit of file systems
_MAX_PATH = 1024  # characters; normalising n accents takes n * n steps, and paths of macOS are not longer
_MAX_FOLDERS = 64  # depth of nested folders
FOLDER_BYTES = 128  # memory of each stored folder name
# Names that Windows refuses or changes: devices, a dot or blank at the end, some characters.
_DEVICE = "(?:con|prn|aux|nul|(?:com|lpt)[0-9\xb9\xb2\xb3])"
_UNPORTABLE = re.compile(rf'(?:^|/){_DEVICE} *(?:[./]|$)|[. ](?:/|$)|[<>:"|?*\\]', re.IGNORECASE)


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix of a member, split at the first dot of the base name; the suffix is lower-case, perhaps ''."""
    slash = name.rfind("/") + 1
    dot = name.find(".", slash)
    return (name, "") if dot < 0 else (name[:dot], name[dot + 1 :].lower())


def is_of_macos(name: str) -> bool:
    """True for the files that macOS puts beside others: `._NAME` (attributes of NAME) and `.DS_Store`."""
    base = name.rpartition("/")[2]
    return base.startswith("._") or base == ".DS_Store"


def split_usual(names_N: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The same for N names (bytes, dtype S); None unless USUAL_NAME matches each."""
    byte_NX = np.ascontiguousarray(names_N).view(np.uint8).reshape(len(names_N), -1)
    kind_NX = _KINDS[byte_NX]
    is_dot_NX, is_slash_NX, ends_NX = kind_NX == _DOT, kind_NX == _SLASH, kind_NX == 0
    separates_NX = is_dot_NX | is_slash_NX
    dot_N = is_dot_NX.argmax(1)
    column_X = np.arange(byte_NX.shape[1])
    if (
        (kind_NX == _OTHER).any()
        or (ends_NX[:, :-1] & ~ends_NX[:, 1:]).any()  # a NUL inside
        or separates_NX[:, 0].any()  # separators need a character before and behind
        or (separates_NX[:, :-1] & (separates_NX | ends_NX)[:, 1:]).any()
        or separates_NX[:, -1].any()
        or not is_dot_NX.any(1).all()
        or (is_slash_NX & (column_X > dot_N[:, None])).any()
    ):
        return None
    keys_N = np.where(column_X < dot_N[:, None], byte_NX, 0).view(names_N.dtype)[:, 0]
    width = int((~ends_NX).sum(1).max() - dot_N.min())  # no suffix is longer
    suffix_NX = np.take_along_axis(np.pad(byte_NX, ((0, 0), (0, width))), dot_N[:, None] + 1 + np.arange(width), 1)
    suffix_NX |= ((suffix_NX >= ord("A")) & (suffix_NX <= ord("Z"))).astype(np.uint8) << 5
    return keys_N, suffix_NX.view(f"S{width}")[:, 0]


def printable(name: str) -> str:
    """The name for tables and terminals: bytes that are not UTF-8, and control characters, are escaped."""
    if name.isprintable():
        return name
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def as_path(name: str) -> str:
    """Path of the file that a name stands for: without `.` and empty components, in Unicode's form NFC (as Apple's file
    systems compare names). Names with different paths are different files, except where case is ignored."""
    if (
        name.isascii()
        and "//" not in name
        and "/." not in name
        and not name.startswith((".", "/"))
        and name[-1:] != "/"
    ):
        return name
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if len(name) <= _MAX_PATH:
        parts = [normalize("NFC", part) if len(part) <= _MAX_COMPONENT else part for part in parts]
    return "/".join(parts) + "/" * (bool(parts) and name.endswith("/"))


def folded_path(name: str) -> str:
    """The same for file systems that ignore case, and dots and blanks at the end of a name."""
    parts = as_path(as_path(name.replace("\\", "/")).casefold()).split("/")
    return "/".join(stripped for part in parts if (stripped := part.rstrip(". ")))


def is_portable(name: str) -> bool:
    """True if all common file systems can store a file of this name."""
    name = as_path(name)
    parts = name.split("/")
    longest = max(len(part.encode("utf-8", "surrogateescape")) for part in parts)
    return longest <= _MAX_COMPONENT and len(parts) <= _MAX_FOLDERS and not _UNPORTABLE.search(name)


class SeenPaths:
    """Files and folders of the samples of a shard so far, to find samples that share a file.

    Args:
        path_of: function from a name to its path on a file system.
    """

    def __init__(self, path_of: Callable[[str], str] = as_path) -> None:
        self._path_of = path_of
        self._samples: dict[str, tuple[str, tuple[str, ...]]] = {}  # path of the key -> key, suffixes
        self._shared: dict[tuple[str, ...], tuple[str, ...]] = {}  # equal tuples are stored once
        self._folders: set[int] = set()  # hashes of paths
        self._folder = ""
        self._folder_is_member = False

    @property
    def folder_bytes(self) -> int:
        """Approximate memory of the folders in bytes."""
        return FOLDER_BYTES * len(self._folders)

    def add(self, key: str, names: Sequence[str]) -> str | None:
        """Add a sample and the names of its members; returns the problem of its key, or None."""
        path = self._path_of(key)
        if path in self._samples:
            same = self._samples[path][0] == key
            return "occurs a second time in the shard" if same else "names the same file as an earlier key"
        paths = [self._path_of(name) for name in names]
        suffixes = tuple(split_name(name)[1] for name in paths)
        self._samples[path] = (key, self._shared.setdefault(suffixes, suffixes))
        folder = path.rpartition("/")[0]
        if folder.count("/") >= _MAX_FOLDERS:
            return f"lies more than {_MAX_FOLDERS} folders deep"
        if folder != self._folder:
            self._enter(folder)
        if self._folder_is_member:
            return "lies in a folder that has the name of an earlier member"
        if self._folders and not self._folders.isdisjoint(map(hash, paths)):
            return "has a member with the name of a folder"
        return None

    def _enter(self, folder: str) -> None:
        parents = list(accumulate(folder.split("/"), "{}/{}".format)) if folder else []
        self._folder, self._folder_is_member = folder, any(map(self._is_member, parents))
        self._folders.update(map(hash, parents))

    def _is_member(self, path: str) -> bool:
        key, suffix = split_name(path)
        return suffix in self._samples.get(key, ("", ()))[1]


# Words without characters that mean something in a dialect of Markdown.
_PLAIN_WORD = r"(?:\(?[^\W_]+(?:[-'_][^\W_]+|(?<=\d)\.\d+)*(?:\)| %)?[,;:.]?|&)"
_PROSE = re.compile(rf"(?!\d+[.)](?: |$)){_PLAIN_WORD}(?: {_PLAIN_WORD})*")
_SPAN = re.compile(r"\|+|[^|]+")
_CUT = " …"


def as_markdown(text: str, limit: int = 300) -> str:
    """Untrusted text as Markdown without links, images, HTML or layout.

    Anything but plain words becomes a code span, in which no dialect looks for links. Line breaks become spaces;
    unprintable characters are escaped as in `printable`.

    Args:
        text: a label, name, path or message.
        limit: largest number of characters shown.
    """
    line = printable(" ".join(text[: 2 * limit].split()))
    if len(line) > limit or len(text) > 2 * limit:
        line = line[: limit - len(_CUT)] + _CUT
    if _PROSE.fullmatch(line):
        return line
    # A pipe ends the cell of a table, even in a code span, where dialects escape it in different ways.
    return "".join("&#124;" * len(part) if part[0] == "|" else _code(part) for part in _SPAN.findall(line))


def _code(text: str) -> str:
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    edge = " " if text[0] in "` " or text[-1] in "` " else ""
    return f"{fence}{edge}{text}{edge}{fence}"
