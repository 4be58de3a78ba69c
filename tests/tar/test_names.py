"""Names split together and one by one give the same parts; untrusted text in Markdown has no effect but to be shown."""

import re
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from sanitize.tar.names import (
    USUAL_NAME,
    SeenPaths,
    as_markdown,
    as_path,
    folded_path,
    is_portable,
    printable,
    split_name,
    split_usual,
)

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
    assert list(zip(*(part.astype(str).tolist() for part in split), strict=True)) == [
        split_name(n.decode()) for n in names
    ]


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


# --- names that are one file ------------------------------------------------------------------------------------

part_of_path = st.sampled_from(["a", "b", "a.png", "b.cls", ".", "", "a.b.c", "é", "e\u0301"])
paths = st.lists(part_of_path, min_size=1, max_size=4).map("/".join)


@pytest.mark.hostile
@settings(deadline=None, max_examples=300)
@given(st.lists(paths, max_size=8))
def test_samples_that_are_accepted_can_be_extracted_beside_each_other(names: list[str]) -> None:
    seen, files = SeenPaths(), []
    for name in names:
        key = split_name(name)[0]
        if name.startswith("/") or not key.rpartition("/")[2] or name.endswith("/"):
            continue  # refused for other reasons
        if seen.add(key, [name]) is None:
            files.append(name)
    with tempfile.TemporaryDirectory() as folder:
        for name in files:
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            with (Path(folder) / name).open("x") as file:  # not over one that is there
                file.write(name)
        assert len({as_path(name) for name in files}) == len(files)


@given(st.text("aB./ é\u0301\\", max_size=20))
def test_the_path_of_a_path_is_itself(name: str) -> None:
    for path_of in (as_path, folded_path):
        assert path_of(path_of(name)) == path_of(name)
    assert folded_path(as_path(name)) == folded_path(name)
    assert as_path(f"./{name}") == as_path(name.replace("/", "//")) == as_path(name)


@given(st.lists(usual, min_size=1, max_size=20))
def test_usual_names_are_paths(names: list[bytes]) -> None:
    """No folder has the name of a member, so that columns of names need no check one by one."""
    assert [as_path(name.decode()) for name in names] == [name.decode() for name in names]
    seen = SeenPaths()
    for key in dict.fromkeys(split_name(name.decode())[0] for name in names):
        own = [name.decode() for name in names if split_name(name.decode())[0] == key]
        assert seen.add(key, own) is None


@pytest.mark.parametrize(
    "name", ["con.png", "d/AUX", "nul .txt", "lpt9.a.b", "x.", "d /x", "a?b", "a\\b", "n" * 256, "d/" * 64 + "x"]
)
def test_names_for_which_some_system_has_another_use(name: str) -> None:
    assert not is_portable(name)


@pytest.mark.parametrize(
    "name", ["icon.png", "d/console", "com.png", "lpt10", "./x", "x.y", "a b", "n" * 255, "[/red]", "é"]
)
def test_names_that_every_system_can_hold(name: str) -> None:
    assert is_portable(name)


@pytest.mark.hostile
def test_a_thousand_accents_take_no_thousand_times_a_thousand_steps() -> None:
    """Normalising this name takes 18 ms, 4.6 s for 1 MB of names."""
    name = "a" + "\u0301" * 1000 + "\u0327" * 1000
    assert as_path(name) == name
    short = "a" + "\u0301" * 50 + "\u0327" * 50
    assert as_path(short) == unicodedata.normalize("NFC", short) != short


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
    """All tokens of a page, with raw HTML and tables."""
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
