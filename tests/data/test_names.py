"""Many names split at once are each split as one is."""

import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sanitize.data.names import USUAL_NAME, split_name, split_usual

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
