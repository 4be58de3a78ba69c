"""Names of integer classes: found beside shards, shown everywhere, and never a reason for another result."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sanitize.compute import Compute
from sanitize.data.class_names import MAX_NAME, as_listed, class_name, named_in, names_beside, refuse_others
from sanitize.data.index import IndexConfig, index_shards
from sanitize.errors import DataError
from sanitize.score.toxic_direction import verdict
from sanitize.score.toxic_direction.twins import Twins

Make = Callable[..., str]


def beside(folder: Path, content: object, shard: str = "a.tar", name: str = "classes.json") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder / shard)


def test_a_class_is_shown_with_its_name() -> None:
    assert [class_name(i, {0: "cat", 1: "dog"}) for i in (0, 1, 2)] == ["0 (cat)", "1 (dog)", "2"]
    assert class_name(7, {7: "7"}) == "7"
    assert class_name(7, {7: "07"}) == "7 (07)"
    assert len(class_name(3, {3: "x" * MAX_NAME})) < 70


@given(st.integers(0, 10**6), st.lists(st.integers(0, 10**6), min_size=2, max_size=5))
def test_numbers_of_classes_in_a_sentence_get_names_and_other_numbers_stay(one: int, several: list[int]) -> None:
    names = {number: f"name of {number}" for number in (one, *several)}
    listed, named = ", ".join(map(str, several)), ", ".join(class_name(number, names) for number in several)
    many = (
        "Not judged: {} classes ({}, ...). 12 images of class {} are labelled {}; 9 of 20 neighbours, 3.5 in class {}"
    )
    given_ = many.format(len(several), listed, one, one, one)
    shown = class_name(one, names)
    assert named_in(given_, names) == many.format(len(several), named, shown, shown, shown)
    assert named_in(given_, {}) == given_


def test_sentences_of_the_verdict_name_their_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scorer makes these sentences with numbers alone and stores nothing else: the names must find their places."""
    evidence = SimpleNamespace(p=0.1, z=2.0)
    unsure = SimpleNamespace(label=7, decision="unsure", evidence=evidence)
    monkeypatch.setattr(verdict, "reason", lambda _group: "9 of 20 nearest neighbours")
    monkeypatch.setattr(verdict, "shown", lambda _planted, _groups: [])
    names = {7: "owl", 8: "bee"}
    for more, wanted in (
        ({"groups": [unsure]}, ["class 7 (owl)"]),
        ({"twins": Twins(7, 8, 10**3)}, ["class 7 (owl)", "labelled 8 (bee)"]),
        ({"small": [7, 8]}, ["7 (owl), 8 (bee)"]),
        ({"small": [7]}, ["7 (owl)"]),
        ({"small": [7, 8], "judged": 0.1}, ["7 (owl), 8 (bee)"]),
    ):
        found = verdict.finding([], more.pop("groups", []), 1.0, "no pattern", **more)  # type: ignore[arg-type]
        text = named_in(found["why"], names)
        assert all(one in text for one in wanted), text
        assert re.sub(r" \((?:owl|bee)\)", "", text) == found["why"]


def test_names_are_found_beside_shards_and_beside_clean_shards(tmp_path: Path) -> None:
    a = beside(tmp_path / "a", {"dog": 1, "cat": 0})
    clean = beside(tmp_path / "50", {"class_names": {"1": "dog", "2": "owl"}}, "clean/a.tar", "dataset.json")
    assert names_beside([a]) == {0: "cat", 1: "dog"}
    assert names_beside([clean]) == {1: "dog", 2: "owl"}
    assert names_beside([a, clean, str(tmp_path / "b/x.tar")]) == {0: "cat", 1: "dog", 2: "owl"}


def test_names_are_listed_as_they_are_read_again(tmp_path: Path) -> None:
    names = {3: "cat", 1: "dog", 7: "cat"}
    assert names_beside([beside(tmp_path, as_listed(names))]) == {1: "dog", 3: "cat"}  # the first number of a name


def test_a_shard_in_the_working_directory_has_its_names_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside(tmp_path, {"cat": 0})
    monkeypatch.chdir(tmp_path)
    assert names_beside(["a.tar"]) == {0: "cat"}


@pytest.mark.parametrize("other", [{"dog": 0, "cat": 1}, {"dog": 0}, {"owl": 0, "dog": 1}, {"cat": 3}])
def test_folders_that_number_classes_in_different_ways_are_refused(tmp_path: Path, other: dict[str, int]) -> None:
    places = [beside(tmp_path / "a", {"cat": 0, "dog": 1}), beside(tmp_path / "b", other)]
    for given_ in (places, places[::-1]):
        with pytest.raises(DataError, match=r"numbered in different ways: class .*index.class_names=\{\}"):
            names_beside(given_)


def test_more_classes_of_the_same_numbers_are_no_conflict() -> None:
    refuse_others({2: "owl", 0: "cat"}, {0: "cat", 1: "dog"}, "a", "b")


@pytest.mark.hostile
@pytest.mark.parametrize(
    "content",
    [
        "",
        "[",
        '["cat"]',
        '{"0": "cat"}',
        '{"cat": true}',
        '{"cat": 0, "dog": 0}',
        '{"cat": -1}',
        f'{{"cat": {2**40}}}',
        f'{{"cat": {"9" * 5000}}}',
        "[" * 100_000,
        json.dumps({str(i): i for i in range(100_001)}),
        " " * (9 << 20),
    ],
)
def test_a_file_of_another_form_is_named_and_classes_stay_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    with caplog.at_level(logging.WARNING):
        assert names_beside([beside(tmp_path, content)]) == {}
    assert "classes.json is no map from class names to integers" in caplog.text


@pytest.mark.hostile
def test_names_are_printable_and_short(tmp_path: Path) -> None:
    names = names_beside([beside(tmp_path, {"\x1b[31m\u202ecat": 0, "x" * 10_000: 1, "": 2})])
    assert sorted(names) == [0, 1]
    assert all(name.isprintable() and len(name) <= MAX_NAME for name in names.values())
    assert IndexConfig(class_names=names).class_names == names  # they are valid settings


def test_names_change_no_row_and_no_recipe_of_an_index_without_them(
    tmp_path: Path, make_tar: Make, make_png: Callable[..., bytes], compute: Compute
) -> None:
    make_tar(
        tmp_path / "in" / "a.tar", [(f"{i}.{s}", d) for i in range(4) for s, d in (("png", make_png(i)), ("cls", b"1"))]
    )
    plain = index_shards(IndexConfig(), str(tmp_path / "in"), str(tmp_path / "plain"), compute)
    named = index_shards(
        IndexConfig(class_names={1: "dog", 7: "owl"}), str(tmp_path / "in"), str(tmp_path / "named"), compute
    )
    assert plain.rows("a.tar").equals(named.rows("a.tar"))
    assert "class_names" not in plain.manifest().recipe.config
    assert (named.class_names, plain.class_names, plain.classes) == ({1: "dog"}, {}, None)
