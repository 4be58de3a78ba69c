"""Names of members: what a key and a suffix are, for one name and for many at once."""

import re

import numpy as np

# A name in which nothing is odd, and its key and suffix as `split_name` finds them.
USUAL_NAME = re.compile(r"((?:[\w-]+/)*[\w-]+)\.([\w-]+(?:\.[\w-]+)*)", re.ASCII)
_DOT, _SLASH, _WORD, _OTHER = 1, 2, 3, 4
_KINDS = np.full(256, _OTHER, np.uint8)
_KINDS[list(b"-_0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")] = _WORD
_KINDS[ord(".")], _KINDS[ord("/")], _KINDS[0] = _DOT, _SLASH, 0


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix of a member: split at the first dot of the base name; the suffix is lower-case, may be ''."""
    slash = name.rfind("/") + 1
    dot = name.find(".", slash)
    return (name, "") if dot < 0 else (name[:dot], name[dot + 1 :].lower())


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
        or separates_NX[:, 0].any()  # something must stand before, between and behind separators
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
    """A name that any table or terminal can hold: bytes that are not UTF-8, and control characters, are escaped."""
    if name.isprintable():
        return name
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


# Words with nothing in them that Markdown, in any dialect, would take for more than words.
_PLAIN_WORD = r"(?:\(?[^\W_]+(?:[-'_][^\W_]+|(?<=\d)\.\d+)*(?:\)| %)?[,;:.]?|&)"
_PROSE = re.compile(rf"(?!\d+[.)](?: |$)){_PLAIN_WORD}(?: {_PLAIN_WORD})*")
_SPAN = re.compile(r"\|+|[^|]+")
_CUT = " …"


def as_markdown(text: str, limit: int = 300) -> str:
    """What strangers wrote, as Markdown that shows it and does nothing: no link, image, HTML or layout comes of it.

    Anything but plain words becomes a code span, in which no dialect looks for links. Line breaks become spaces; what
    cannot be printed is escaped as in `printable`.

    Args:
        text: a label, name, path or message.
        limit: characters that are shown of it.
    """
    line = printable(" ".join(text[: 2 * limit].split()))
    if len(line) > limit or len(text) > 2 * limit:
        line = line[: limit - len(_CUT)] + _CUT
    if _PROSE.fullmatch(line):
        return line
    # A pipe would end the cell of a table, even in a code span; dialects disagree on how to escape it there.
    return "".join("&#124;" * len(part) if part[0] == "|" else _code(part) for part in _SPAN.findall(line))


def _code(text: str) -> str:
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    edge = " " if text[0] in "` " or text[-1] in "` " else ""
    return f"{fence}{edge}{text}{edge}{fence}"
