"""Which methods run on which cells, and what the table makes of their rows; nothing is trained."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

import benchmarks.published as published
from benchmarks.published import GIVEN, OF_SAM, cells_of, methods_of, rows_of
from benchmarks.verdict_cells import ATTACKS, DATA
from sanitize.compute import Compute

QUICK = Namespace(quick=True, methods=None, data=None, only=None, first_seed=0, seeds=1)


def test_cells_are_those_of_the_verdict() -> None:
    for quick in (True, False):
        for data, attack, _ in cells_of(Namespace(**vars(QUICK) | {"quick": quick, "seeds": 2})):
            assert data in DATA
            assert attack in ATTACKS


def test_every_method_runs_somewhere_and_says_what_it_is_given() -> None:
    full = Namespace(**vars(QUICK) | {"quick": False})
    assert sorted(methods_of("none", full)) == sorted(GIVEN)
    assert not set(methods_of("none", QUICK)) & set(OF_SAM)
    assert set(methods_of("adap-blend 1 %", QUICK)) == set(GIVEN)
    assert methods_of("none", Namespace(**vars(QUICK) | {"methods": ["flare"]})) == ["flare"]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, object]]:
    """Rows of a cell of six samples: two poisoned, one a cover sample. Methods remove what is written here."""
    truth_N, cover_N = np.array([1, 1, 0, 0, 0, 0], bool), np.array([0, 0, 1, 0, 0, 0], bool)
    removes = {"flare": [1, 0, 1, 1, 0, 0], "ct": None, "scan": [0, 0, 0, 0, 0, 0]}

    def removed_by(method: str, _case: object, _suspect: object) -> np.ndarray:
        if removes[method] is None:
            raise ValueError("no")
        return np.array(removes[method], bool)

    compute = Compute(device="cpu")
    case = published.Case(None, None, None, truth_N, cover_N, tmp_path / "cell", compute)  # type: ignore[arg-type]
    suspect = published.Suspect(None, None, 0.5, 7.0, tmp_path)  # type: ignore[arg-type]
    monkeypatch.setattr(published, "poisoned_case", lambda *_: case)
    monkeypatch.setattr(published, "suspect_of", lambda *_: suspect)
    monkeypatch.setattr(published, "removed_by", removed_by)
    return list(rows_of("fashion", "sig 3 %", 0, tmp_path, list(removes), lambda _text: None))


def test_cover_samples_count_as_neither(rows: list[dict[str, object]]) -> None:
    flare, _, _ = rows
    assert flare["recall"] == 0.5
    assert flare["false_removals"] == pytest.approx(1 / 3)  # of three clean samples
    assert flare["suspect_cpu_seconds"] == 7


def test_a_method_that_fails_is_a_row_and_runs_again(rows: list[dict[str, object]], tmp_path: Path) -> None:
    assert [row["method"] for row in rows] == ["flare", "ct", "scan"]
    assert rows[1]["error"] == "ValueError: no"
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"rows": [row | {"images": None} for row in rows]}))
    assert [row["method"] for row in published._finished(file, None)] == ["flare", "scan"]
    with pytest.raises(SystemExit, match="another number of images"):
        published._finished(file, 500)
