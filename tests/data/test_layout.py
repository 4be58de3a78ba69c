from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sanitize.compute import Compute
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.layout import dots
from sanitize.data.reasons import Reasons, counted, differences, gathered

Make = Callable[..., Any]


def reasons_of(members: list[tuple[str, bytes]], folder: Path, make_tar: Make, compute: Compute, **config: Any) -> dict:
    """Reason by position, of a shard with one good sample in front."""
    shard = make_tar(folder / "x.tar", members)
    for check in ("decode", "headers"):
        settings = IndexConfig(max_bad_fraction=1, check=check, **config)
        rows = index_shards(settings, shard, str(folder / f"out-{check}"), compute).rows("x.tar").to_pylist()
    return {row["position"]: row["reason"] for row in rows}


def test_members_that_do_not_stand_together_say_so(
    tmp_path: Path, make_tar: Make, make_png: Make, good: Make, compute: Compute
) -> None:
    members = good(3)
    apart = sorted(members, key=lambda member: member[0].endswith("cls"))
    found = reasons_of([*good(1, "whole"), *apart], tmp_path, make_tar, compute)
    assert found == {
        0: None,
        **{
            1 + 3 * half + i: f"the members of key 'good{i:04d}' do not stand together: make the tar again, with tar "
            "--sort=name"
            for half in (0, 1)
            for i in range(3)
        },
    }


def test_a_key_that_comes_again_whole_is_still_a_second_sample(
    tmp_path: Path, make_tar: Make, good: Make, compute: Compute
) -> None:
    found = reasons_of([*good(1), *good(1, "other"), *good(1)], tmp_path, make_tar, compute)
    assert list(found.values()) == [None, None, "key 'good0000' occurs a second time in the shard"]


def test_parallel_folders_show_both_keys(tmp_path: Path, make_tar: Make, good: Make, compute: Compute) -> None:
    members = [(("images/" if name.endswith("png") else "labels/") + name, data) for name, data in good(2)]
    found = reasons_of([*good(1, "whole"), *members], tmp_path, make_tar, compute)
    assert found[1] == found[2]
    assert (
        found[3]
        == found[4]
        == (
            "picture and label have different keys, 'images/good0001' and 'labels/good0001': the folder is part of the "
            "key; put both into one folder"
        )
    )


def test_dots_in_names_quote_a_member(
    tmp_path: Path, make_tar: Make, make_png: Make, good: Make, compute: Compute
) -> None:
    members = [
        member
        for day in (22, 23)
        for hour in range(3)
        for member in ((f"d.1/{day}.{hour:02d}.png", make_png()), (f"d.1/{day}.{hour:02d}.cls", b"1"))
    ]
    found = reasons_of([*good(1, "v1.0/good"), *members], tmp_path, make_tar, compute)
    assert found[0] is None  # dots in folders are fine
    assert found[1] == (
        "a key ends at the first dot, and the name has more: the key of '22.00.png' is '22', its suffix '00.png'; "
        "replace the other dots"
    )
    assert set(found) == {0, 1, 2}


def test_a_compound_label_is_named() -> None:
    assert "but 'output.cls': set index.label" in str(dots(["a.input.jpg", "a.output.cls"], "cls"))
    assert dots(["a.input.jpg", "a.cls"], "cls") is None
    assert dots(["a.jpg", "a.txt"], "cls") is None
    assert dots(["Track 2.0 (Clean).png", "Track 2.0 (Clean).cls"], "cls").startswith("a key ends at the first dot")


# --- kinds of reasons ---------------------------------------------------------------------------------------------


def test_reasons_that_differ_in_numbers_and_quotes_are_one_kind() -> None:
    assert counted(["label 1200 is not in 0..999", "label 1300 is not in 0..999", "image is empty"]) == {
        "label … is not in 0..999": 2,
        "image is empty": 1,
    }
    assert counted(["label 'a' is not an integer", "label 'it''s' is not an integer"]) == {
        "label '…' is not an integer": 2
    }
    assert (
        gathered(["label 7 is bad", "label 8 is bad", "plain"]).most() == "2 x for example: label 7 is bad; 1 x plain"
    )
    assert differences("label 1200 is not in 0..999", "label … is not in 0..999") == "1200"
    assert differences("image is empty", "image is empty") == ""


@given(
    st.lists(st.sampled_from(["label 'a' x", "label 'b' x", "n 1 of 2", "n 1 of 3", "n 7 of 3", "plain"])), st.randoms()
)
def test_kinds_do_not_depend_on_the_order(reasons: list[str], random: Any) -> None:
    shuffled = random.sample(reasons, len(reasons))
    assert counted(reasons) == counted(shuffled)
    assert sum(counted(reasons).values()) == len(reasons)


@pytest.mark.hostile
def test_each_kind_has_examples_with_shard_key_and_byte(
    tmp_path: Path, make_tar: Make, good: Make, compute: Compute
) -> None:
    members = good(6)
    members[5] = ("good0002.cls", b"")
    members[9] = ("good0004.cls", b"x")
    dataset = index_shards(
        IndexConfig(max_bad_fraction=1), make_tar(tmp_path / "x.tar", members), str(tmp_path / "out"), compute
    )
    rows = dataset.rows("x.tar")
    reasons = Reasons(max_examples=1)
    reasons.add("x.tar", rows)
    for kind in reasons.kinds():
        (example,) = kind.examples
        data = (tmp_path / "x.tar").read_bytes()
        assert data[example["byte"] :].startswith(f"{example['key']}.png\0".encode())
        assert example["shard"] == "x.tar"
