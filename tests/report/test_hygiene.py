"""The section about hygiene: groups of alike pictures are called what they are."""

import pytest

from sanitize.report.hygiene import members_of


@pytest.mark.parametrize(
    ("n", "n_files", "words"),
    [
        (2, 1, "2 copies of one file"),
        (1_234, 1_234, "1,234 near-duplicates"),
        (5, 3, "5 near-duplicates in 3 files"),
    ],
)
def test_only_equal_files_are_called_copies(n: int, n_files: int, words: str) -> None:
    assert members_of({"n": n, "n_files": n_files}) == words
