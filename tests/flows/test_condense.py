"""Condensation from shards to the set: the same however it is called."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import sanitize
from flows.cli import app
from flows.start import start
from sanitize.artifacts import read_manifest
from sanitize.data.digits import Digits
from sanitize.jobs.condense import CondenseRunConfig
from sanitize.jobs.restore import verify_run


@pytest.fixture(scope="module")
def settings(digits: Digits) -> dict[str, Any]:
    augment = {"flip": False}
    return {
        "shards": digits.shards()[:2],
        "test_shards": digits.shards()[4:5],
        "index": {"n_classes": 10, "image": {"channels": 1}},
        "condense": {
            "matching": {
                "iterations": 12,
                "learning_rate": 5,
                "batch_size": 16,
                "architecture": {"widths": [8, 8]},
                "augment": augment,
            },
            "evaluate": {"n_networks": 1, "optim": {"epochs": 4}, "augment": augment},
        },
        "compute": {"device": "cpu"},
    }


@pytest.fixture(scope="module")
def run_folder(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the command line."""
    home = tmp_path_factory.mktemp("condense")
    (home / "condense.yaml").write_text(yaml.safe_dump(settings))
    command = ["condense", str(home / "condense.yaml"), "--images-per-class=2", f"--out={home / 'run'}", "--direct"]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert len(printed["test_accuracy"]) == 1
    assert printed["last"]["iteration"] == 12
    shown = CliRunner().invoke(app, [*command, "-q"])  # again: all is there, and is shown
    assert shown.exit_code == 0
    assert "after 12 iterations" in shown.output
    assert "test accuracy" in shown.output
    return home / "run"


def test_the_command_makes_a_set_that_loads(run_folder: Path) -> None:
    images_NCHW, labels_N = sanitize.load_condensed(run_folder / "70-condensed")
    assert images_NCHW.shape == (20, 1, 8, 8)
    assert labels_N.bincount().tolist() == [2] * 10
    assert verify_run(str(run_folder))[1] == []
    assert json.loads((run_folder / "run.json").read_text())["status"] == "finished"


def test_the_page_shows_how_noise_became_images(run_folder: Path) -> None:
    page = (run_folder / "90-report" / "index.html").read_text()
    numbers = json.loads((run_folder / "90-report" / "report.json").read_text())
    assert re.fullmatch(r"[\d,]+ images condensed to 20; networks .* test accuracy of \d+\.\d%\.", numbers["headline"])
    assert [row["iteration"] for row in numbers["history"]] == [12]
    assert page.count('src="data:image/png;base64,') == 5
    assert page.count("<polyline") == 1
    assert "calibrated mean" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.usefixtures("prefect_server")
def test_a_flow_gives_the_same_digests(run_folder: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    config = CondenseRunConfig.model_validate(yaml.safe_load((run_folder / "config.yaml").read_text()))
    start(config.model_copy(update={"n_groups": 2}), tmp_path / "run", direct=False)
    for folder in ("00-index", "01-index-test", "70-condensed", "90-report"):
        assert read_manifest(tmp_path / "run" / folder).digest == read_manifest(run_folder / folder).digest


def test_missing_shards_are_an_error() -> None:
    result = CliRunner().invoke(app, ["condense", "--direct"])
    assert result.exit_code == 2
    assert "no shards" in result.output
