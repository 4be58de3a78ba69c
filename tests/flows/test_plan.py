"""`sanitize plan` beside the run it is about."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.cli.app import Terminal
from flows.cli.command import COMMANDS
from sanitize.artifacts import read_manifest
from sanitize.errors import ConfigError, DataError
from sanitize.jobs import CleanConfig, plan

command = sys.modules["flows.cli.plan"]  # the name in the package is the function


@pytest.fixture(scope="module")
def planned(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    config, out = CleanConfig.model_validate(settings), tmp_path_factory.mktemp("plan")
    return plan(out=out, config=config, n_samples=400, task_minutes=0.001, scale_to=10**9).summary


def test_data_are_counted_without_being_read(planned: dict[str, Any], poisoned: Path) -> None:
    assert planned["data"]["bytes"] == sum(path.stat().st_size for path in poisoned.glob("*.tar"))
    assert planned["data"]["samples"] == pytest.approx(1797, rel=0.05)
    assert planned["measured_on"] == 400


def test_bytes_are_those_of_the_run(planned: dict[str, Any], direct: Path, poisoned: Path) -> None:
    stages = {row["folder"]: row for row in planned["stages"]}
    assert list(stages) == [stage["folder"] for stage in json.loads((direct / "run.json").read_text())["stages"]]
    for folder in ("00-index", "20-embeddings", "50-shards"):
        written = sum(file.size for file in read_manifest(direct / folder).files.values())
        assert stages[folder]["written"] == pytest.approx(written, rel=0.3), folder
    n_bytes = planned["data"]["bytes"]
    assert 0.7 * n_bytes < stages["50-shards"]["read"] < 4 * n_bytes  # once, and the tables


def test_time_and_bytes_are_scaled_on_paper(planned: dict[str, Any]) -> None:
    n, scaled = planned["data"]["samples"], planned["scaled"]
    assert scaled["shards"] == pytest.approx(5 * 1e9 / n, rel=0.001)
    for small, large in zip(planned["stages"], scaled["stages"], strict=True):
        assert large["written"] == pytest.approx(small["written"] * 1e9 / n)
        assert small["seconds"] <= large["seconds"] <= small["seconds"] * 1e9 / n * 1.001
    assert scaled["memory"]["select"] == 21e9
    assert scaled["memory"]["task"] == planned["memory"]["task"] > 1e8
    assert 100 < planned["memory"]["driver"] / 5 < 10_000  # kilobytes a shard


def test_groups_make_tasks_of_the_configured_time(planned: dict[str, Any]) -> None:
    assert planned["n_groups"] == 5  # every shard a task: none takes as much as a tenth of a second
    slowest = max(row["task_seconds"] for row in planned["scaled"]["stages"] if row["tasks"] > 1)
    assert slowest <= 0.06 * 1.001 or planned["scaled"]["n_groups"] == planned["scaled"]["shards"]
    assert {row["tasks"] for row in planned["stages"]} == {1, 5}


def test_many_small_shards_are_sampled_until_there_is_enough(
    settings: dict[str, Any], tmp_path: Path, make_tar: Any, good: Any
) -> None:
    for i in range(40):
        make_tar(tmp_path / "in" / f"{i}.tar", good(2, f"{i}-"))
    config = CleanConfig.model_validate(settings | {"shards": [str(tmp_path / "in")]})
    planned = plan(out=tmp_path / "plan", config=config, n_samples=40).summary
    assert planned["measured_on"] == 40
    assert (planned["data"]["shards"], planned["data"]["samples"]) == (40, 80)


def test_too_few_samples_to_measure_are_an_error(
    settings: dict[str, Any], tmp_path: Path, make_tar: Any, good: Any
) -> None:
    make_tar(tmp_path / "in" / "a.tar", good(1))
    config = CleanConfig.model_validate(settings | {"shards": [str(tmp_path / "in")]})
    with pytest.raises((ConfigError, DataError)):
        plan(out=tmp_path / "out", config=config, n_samples=40)


def test_command_prints_the_plan(config_file: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(config_file), "--samples", "100", "--quiet", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["measured_on"] == 100
    assert json.loads(result.stdout)["scaled"] is None


@pytest.mark.parametrize("is_scaled", [False, True])
def test_only_the_sizes_that_were_asked_for_are_shown_and_groups_in_words(
    planned: dict[str, Any], monkeypatch: pytest.MonkeyPatch, is_scaled: bool
) -> None:
    text = io.StringIO()
    monkeypatch.setattr(command, "console", Terminal(file=text, width=200))
    COMMANDS["plan"].show(planned if is_scaled else planned | {"scaled": None}, "")
    shown = text.getvalue()
    assert ("1,000,000,000" in shown) == is_scaled
    assert shown.count("--groups ") == 1 + is_scaled
    assert re.search(r"--groups 5: the shards in 5 groups, one task each .* the longest task takes about", shown)


@pytest.mark.parametrize(
    ("n_groups", "seconds", "shown"),
    [
        (1, 30.0, "--groups 1: the shards in 1 group, .* about 30 s (tasks of at most 10 minutes"),
        (8, 590.0, "--groups 8: the shards in 8 groups, .* about 10 min (tasks of at most 10 minutes"),
        (20, 1800.0, "--groups 20: .* about 30 min (a group has at least one shard; 10 minutes"),
    ],
)
def test_groups_are_recommended_with_their_reason(
    monkeypatch: pytest.MonkeyPatch, n_groups: int, seconds: float, shown: str
) -> None:
    text = io.StringIO()
    monkeypatch.setattr(command, "console", Terminal(file=text, width=200))
    command._groups({"n_groups": n_groups, "task_seconds": seconds}, 20, 10)
    assert re.search(shown.replace("(", r"\("), text.getvalue())
