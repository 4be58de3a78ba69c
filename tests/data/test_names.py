"""Many names split at once are each split as one is; what strangers wrote is shown in Markdown and does nothing."""

import re
from typing import Any

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from sanitize.data.names import USUAL_NAME, as_markdown, printable, split_name, split_usual

odd = st.text("aB0_-./\0 é:", max_size=12).map(str.encode).filter(lambda name: len(name) <= 100)
part = st.text("aB0_-", min_size=1, max_size=5)
usual = st.tuples(st.lists(part, max_size=2), part, st.lists(part, min_size=1, max_size=3)).map(
    lambda parts: "/".join([*parts[0], ".".join([parts[1], *parts[2]])]).encode()
)


def array(names: list[bytes]) -> np.ndarray:
    return np.array(names, "S100")


@given(st.lists(usual, min_size=1, max_size=20))
def test_usual_names_are_split_as_one_by_one(names: list[bytes]) -> None:
    split = split_usual(array(names))
    assert split is not None
    assert list(zip(*(of.astype(str).tolist() for of in split), strict=True)) == [split_name(n.decode()) for n in names]


@given(st.lists(usual, max_size=3), odd)
def test_one_odd_name_spoils_all(names: list[bytes], other: bytes) -> None:
    stripped = other.rstrip(b"\0")  # that is how names are padded
    matches = stripped.isascii() and re.fullmatch(USUAL_NAME, stripped.decode()) is not None
    assert (split_usual(array([*names, other])) is not None) == matches


def test_names_that_fill_the_field() -> None:
    assert split_usual(array([b"a" * 96 + b".jpg"])) is not None
    assert split_usual(array([b"a" * 99 + b"."])) is None
    assert split_usual(array([b"a" * 100])) is None
    assert split_usual(array([b"a.jpg", b"a"])) is None


# --- Markdown ---------------------------------------------------------------------------------------------------

INERT = {"text", "code_inline", "softbreak", "inline", "paragraph_open", "paragraph_close"}
INERT |= {f"{part}_{end}" for part in ("table", "thead", "tbody", "tr", "th", "td") for end in ("open", "close")}
LINKED = re.compile(r"https?:|ftp:|mailto:|www\.|\w@\w|[^\W\d]\.\w", re.IGNORECASE)  # by GitHub's dialect and linkify
MARKS = ["![x](http://a.b/c)", "<img src=x onerror=y>", "</td>", "`", "``", "|", "\\", "\\|", "\n", "\r", "\n\n", "- "]
MARKS += [
    "[a](javascript:b)",
    "https://a.b",
    "www.a.b",
    "a@b.c",
    "**",
    "_",
    "~~",
    "#",
    "1. ",
    "> ",
    "&lt;",
    "---",
    "[^1]",
]
MARKS += [
    "\u202e",
    "\x1b[31m",
    "\x00",
    "\udcff",
    "```mermaid\n",
    "$$",
    "    ",
    "a",
    "Z",
    "é",
    "0.5",
    " ",
    ":x:",
    "<!--",
    "%",
]
hostile_text = st.one_of(st.text(), st.lists(st.sampled_from(MARKS), max_size=12).map("".join))


def rendered(markdown: str) -> list[Any]:
    """All tokens of a page, read as a browser's page would be: with raw HTML and tables."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(markdown)
    return [inner for token in tokens for inner in (token, *(token.children or []))]


def text_of(tokens: list[Any]) -> str:
    return "".join(token.content for token in tokens if token.type in ("text", "code_inline"))


@given(hostile_text)
@example("a\\|![x](http://a.b/c)")
@example("`|` ![x](http://a.b/c)")
@example("1.")
@settings(max_examples=500)
def test_markdown_shows_what_strangers_wrote_and_does_nothing(text: str) -> None:
    shown = as_markdown(text)
    expected = printable(" ".join(text.split()))
    for page in (shown, f"Batch {shown} was held.", f"| a | b |\n|---|---|\n| {shown} | 7 |"):
        tokens = rendered(page)
        assert {token.type for token in tokens} <= INERT
        assert not LINKED.search(" ".join(token.content for token in tokens if token.type == "text"))
        assert sum(token.type == "td_open" for token in tokens) in (0, 2)
        if len(expected) <= 300:
            assert "".join(expected.split()) in "".join(text_of(tokens).split())


def test_plain_words_stay_plain_in_markdown() -> None:
    for text in ("class 3 moved by 0.25 (p 0.001), as planned.", "accepted", "12 % removed", "badnets_small-2", ""):
        assert as_markdown(text) == text


@given(st.text(min_size=1), st.integers(10, 40))
def test_markdown_is_bounded(text: str, limit: int) -> None:
    assert len(text_of(rendered(as_markdown(text * 100, limit)))) <= limit
