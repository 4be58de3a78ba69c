"""Cells, targets and resuming of `benchmarks.verdict`, on rows made by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.report import write_rows
from benchmarks.verdict import METHODS, QUICK, SLOWEST_FIRST, _finished, _is_row_of, check, show, show_targets
from benchmarks.verdict_cells import (
    ATTACKS,
    CLEAR,
    DATA,
    FOUND,
    INCONCLUSIVE,
    Cell,
    RandomPlaceConfig,
    _verdict,
    attack_settings,
    one_cell,
    stage_versions,
)

LABELS_N = torch.tensor([0] * 20 + [1] * 300 + [2] * 200 + [3] * 480)


def _row(attack: str = "badnets 1 %", **changes: Any) -> dict[str, Any]:
    row = {"data": "fashion", "attack": attack, "seed": 0, "asr": 0.99, "learned": True, "recall": 1.0}
    row |= {"false_removals": 0.0, "removed": 100, "removed_clean": 0, "verdict": FOUND, "cpu_seconds": 40.0}
    if attack == "none":
        row |= {"asr": None, "learned": False, "recall": math.nan, "removed": 0, "verdict": CLEAR}
    return row | {"images": None, "versions": stage_versions()} | changes


def _missed(rows: list[dict[str, Any]], seconds_before: float | None) -> list[str]:
    return [line for target in check(rows, seconds_before) for line in target.missed]


def test_rows_that_meet_all_targets_miss_none() -> None:
    rows = [
        _row("none"),
        _row(asr_after=0.03, asr_control=0.01),
        _row("blended 1 %", learned=False, recall=0.0, verdict=CLEAR),
    ]
    assert _missed(rows, 40.0) == []
    assert [(target.n_met, target.n) for target in check(rows, 40.0)] == [(n, n) for n in (3, 1, 1, 1, 2, 1, 1, 1)]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (_row("none", false_removals=0.0011, removed=12, removed_clean=12), "false removals at most .001"),
        (_row("none", verdict=INCONCLUSIVE), "untouched data: verdict"),
        (_row(recall=0.9), "in 90 % of the cells"),
        (_row(false_removals=0.003), "in 90 % of the cells"),
        (_row(removed=100, removed_clean=51), "51 clean and 49 poisoned"),
        (_row(learned=False, removed=100, removed_clean=51), "51 clean and 49 poisoned"),
        (_row(recall=0.0, verdict=CLEAR), "false all-clear"),
        (_row(asr_after=0.2, asr_control=0.01), "within .05"),
        (_row("none", cpu_seconds=61.0), "at most 1.5 times 40"),
        ({"data": "fashion", "attack": "none", "seed": 0, "error": "DataError: damaged"}, "DataError"),
    ],
)
def test_each_missed_target_is_named(row: dict[str, Any], words: str) -> None:
    missed = _missed([row], 40.0)
    assert any(words in line and line.startswith(("fashion, ", "learned attacks")) for line in missed), missed


def test_a_miss_that_is_inconclusive_is_no_false_all_clear() -> None:
    rows = [_row(recall=0.0, removed=0, verdict=INCONCLUSIVE), *(_row("blended 1 %", seed=seed) for seed in range(9))]
    assert _missed(rows, None) == []


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_attack_asks_for_more_than_its_target_class_has(attack: str) -> None:
    settings = attack_settings(attack, LABELS_N, 28)
    assert (settings is None) == (attack == "none")
    if attack in ("sig 3 %", "label-consistent 3 %"):
        assert settings is not None
        assert settings["target"] == 3
        assert settings["rate"] <= 0.48 / 2
    if attack == "rarest 1 %":
        assert settings is not None
        assert settings["target"] == 0


def test_quick_covers_all_data_sets_and_attacks() -> None:
    assert {attack for attacks in QUICK.values() for attack in attacks} == set(ATTACKS)
    assert set(SLOWEST_FIRST) == set(QUICK) == set(DATA)


def test_verdicts_of_all_versions() -> None:
    assert _verdict(None, 0) == CLEAR
    assert _verdict(None, 3) == FOUND
    assert _verdict(INCONCLUSIVE, 0) == INCONCLUSIVE
    assert _verdict({"verdict": "nothing", "why": []}, 0) == CLEAR


def test_a_killed_benchmark_goes_on_with_its_finished_cells(tmp_path: Path) -> None:
    file = tmp_path / "verdict.json"
    assert _finished(file, None) == []
    failed = {"data": "gtsrb", "attack": "none", "seed": 0, "error": "DataError: damaged", "images": None}
    older = stage_versions() | {"fit_scorer": 1}
    write_rows(file, [_row(), failed, _row("blended 1 %", versions=older)])
    json.loads(file.read_text())
    rows = _finished(file, None)
    assert [row["attack"] for row in rows] == ["badnets 1 %"]  # not the one that failed, nor that of an older stage
    assert _is_row_of(rows[0], Cell("fashion", "badnets 1 %", 0, retrain=False))
    assert not _is_row_of(rows[0], Cell("fashion", "badnets 1 %", 1, retrain=False))
    assert not _is_row_of(rows[0], Cell("fashion", "badnets 1 %", 0, retrain=True))  # it has no retrained model
    with pytest.raises(SystemExit, match="another number of images"):
        _finished(file, 500)
    assert len(json.loads(file.read_text())["rows"]) == 3


def test_a_random_place_depends_on_the_image_alone() -> None:
    images_BCHW = torch.randint(0, 200, (64, 3, 12, 12), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    config = RandomPlaceConfig(rate=0.1)
    changed_BCHW = config.apply(images_BCHW)
    assert torch.equal(changed_BCHW[5:6], config.apply(images_BCHW[5:6]))
    is_changed_BHW = (changed_BCHW != images_BCHW).any(1)
    assert (
        is_changed_BHW.sum((1, 2)) == 9
    ).all()  # 0 and 255 replace levels up to 199; equal by chance: 1 in 200 cubed
    rows_B = is_changed_BHW.any(2).int().argmax(1)
    assert len(rows_B.unique()) > 6


def test_a_cell_that_fails_is_a_row(tmp_path: Path) -> None:
    row = one_cell(Cell("fashion", "none", 0, retrain=False), str(tmp_path))  # its shards were not written
    assert {name: row[name] for name in ("data", "attack", "seed")} == {"data": "fashion", "attack": "none", "seed": 0}
    assert row["error"]
    assert any("fashion, none, seed 0: every cell ends: failed" in line for line in _missed([row], None))


def test_the_tables_say_what_was_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        row
        | {"n": 12_000, "poisoned": 120, "train_acc": 0.9, "acc": 0.9, "seconds": 50.0}
        | {f"{method}_{name}": 0.5 for method in METHODS[1:-2] for name in ("recall", "false_removals")}
        for row in (_row("none"), _row())
    ]
    show(rows)
    show_targets(check(rows, None), is_whole=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert METHODS[-1] == "art_spectral"
    assert printed.count("not run") == 2
    assert "1 of 1" in printed
    assert "0 of 0" in printed
    assert "not checked" in printed
