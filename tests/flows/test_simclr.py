"""SimCLR from end to end: as the embedder of a cleaning run, and as the encoder of a robust training."""

from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import yaml

from flows.start import start
from sanitize.artifacts import read_manifest
from sanitize.data.tables import Scores
from sanitize.embed import SimCLRConfig
from sanitize.errors import ConfigError
from sanitize.jobs.clean import CleanConfig
from sanitize.jobs.train import TrainRunConfig
from sanitize.models.checkpoint import Checkpoint

SIMCLR = {
    "architecture": {"kind": "convnet", "widths": [8, 16]},
    "views": {"crop": 0.5, "brightness": 0.4, "contrast": 0.4},
    "projection": [16, 8],
    "optim": {"epochs": 3, "batch_size": 128, "learning_rate": 0.01},
}


def test_cleaning_with_an_encoder_that_sees_no_labels(poisoned: Path, tmp_path: Path) -> None:
    settings = {
        "shards": [str(poisoned)],
        "embedder": {"kind": "simclr", **SIMCLR},
        "scorers": [{"kind": "neighbours", "embedding": "penultimate", "windows": 1}],
        "compute": {"device": "cpu"},
    }
    config = CleanConfig.model_validate(settings)
    assert isinstance(config.embedder, SimCLRConfig)
    start(config, tmp_path / "run", direct=True)
    assert read_manifest(tmp_path / "run" / "10-embedder").recipe.stage == "pretrain_simclr"
    scores = Scores.load(tmp_path / "run" / "31-scores-neighbours")
    found = [value for shard in scores.shards for value in scores.rows(shard, ["score"])["score"].to_pylist()]
    assert median(found) < 0.5  # most samples have the label of most of their neighbours
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert CleanConfig.model_validate(saved) == config


def test_an_embedder_without_a_kind_is_the_suspect_model(settings: dict[str, Any]) -> None:
    assert CleanConfig.model_validate(settings).embedder.kind == "classifier"
    with pytest.raises(ValueError, match="temperature"):
        CleanConfig.model_validate(settings | {"embedder": {"temperature": 0.5}})


def test_prl_simclr_sn(poisoned: Path, tmp_path: Path) -> None:
    shards = sorted(map(str, poisoned.glob("*.tar")))
    prl = {"select_batch": {"kind": "prl_l", "tau": 0.1, "warmup_epochs": 2}}
    settings = {
        "shards": shards[:3],
        "test_shards": shards[3:4],
        "unlabelled_shards": shards[4:],
        "simclr": SIMCLR,
        "train": {
            "architecture": SIMCLR["architecture"],
            "optim": {"epochs": 5, "learning_rate": 0.03},
            "method": prl,
            "lipschitz": 2.0,
        },
        "compute": {"device": "cpu"},
    }
    result = start(TrainRunConfig.model_validate(settings), tmp_path / "run", direct=True)
    model = Checkpoint.load(result["model"])
    assert torch.linalg.matrix_norm(model.model().head.weight.detach(), 2) <= 2 * (1 + 1e-5)
    assert result["last"]["test_accuracy"] > 0.4
    assert "drop_scores" in result
    inputs = read_manifest(tmp_path / "run" / "50-encoder").recipe.inputs
    assert inputs["unlabelled"] == read_manifest(tmp_path / "run" / "02-index-unlabelled").digest
    assert model.manifest().recipe.inputs["encoder"] == read_manifest(tmp_path / "run" / "50-encoder").digest


@pytest.mark.parametrize("wrong", [{"unlabelled_shards": ["b.tar"]}, {"index": {"label": None}}])
def test_labels_and_images_without_them_are_not_confused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="label"):
        TrainRunConfig.model_validate({"shards": ["a.tar"], **wrong})


def test_a_cleaning_run_needs_labels() -> None:
    with pytest.raises(ConfigError, match="label"):
        CleanConfig.model_validate({"shards": ["a.tar"], "index": {"label": None}})
