"""Repair from shards to the package: a learned backdoor is removed; a clean model is not changed."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sanitize
from flows.cli import app
from flows.start import start
from sanitize.artifacts import read_manifest
from sanitize.attack import BadNetsConfig, Poisoned, poison_shards
from sanitize.compute import Compute
from sanitize.data.digits import Digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.embed import EmbedderConfig, train_embedder
from sanitize.errors import ConfigError
from sanitize.jobs.repair import RepairRunConfig
from sanitize.loop import OptimConfig
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.convnet import ConvNetConfig

TRIGGER = BadNetsConfig(rate=0.1, size=2, pattern="white")


@pytest.fixture(scope="module")
def suspect(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Poisoned]:
    """A network that has learned a backdoor from 14 shards of digits."""
    home, compute = tmp_path_factory.mktemp("suspect"), Compute(device="cpu")
    honest = index_shards(IndexConfig(), digits.shards()[:14], str(home / "honest"), compute)
    poisoned = poison_shards(TRIGGER, honest, str(home / "poisoned"), compute)
    dataset = index_shards(IndexConfig(), poisoned.shard_paths(), str(home / "index"), compute)
    optim = OptimConfig(epochs=12, batch_size=32, learning_rate=0.01)
    embedder = EmbedderConfig(architecture=ConvNetConfig(widths=(16, 32)), optim=optim, min_steps=1)
    return train_embedder(embedder, dataset, str(home / "model"), compute), poisoned


def settings(suspect: tuple[Checkpoint, Poisoned], digits: Digits) -> RepairRunConfig:
    model, poisoned = suspect
    return RepairRunConfig.model_validate(
        {
            "model": model.path,
            "shards": poisoned.shard_paths(),
            "test_shards": digits.shards()[14:],
            "repair": {"trigger": TRIGGER.model_dump()},
            "truth": poisoned.path,
            "compute": {"device": "cpu"},
        }
    )


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_the_backdoor_is_gone_and_prefect_gives_the_same_model(
    suspect: tuple[Checkpoint, Poisoned], digits: Digits, tmp_path: Path
) -> None:
    config = settings(suspect, digits)
    report = start(config, tmp_path / "direct", direct=True)["repair"]
    assert report["before"]["asr"] > 0.8
    assert report["after"]["asr"] < 0.2
    assert report["after"]["acc"] > report["before"]["acc"] - 0.05
    assert report["done"]["layers"][0]["c"] > 0, "the truth is known"
    assert report["weights_changed"]["changed"] > 0
    start(config.model_copy(update={"n_groups": 3}), tmp_path / "prefect", direct=False)
    for folder in ("60-repaired", "80-package"):
        assert read_manifest(tmp_path / "direct" / folder).digest == read_manifest(tmp_path / "prefect" / folder).digest
    images_BCHW = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    assert sanitize.load_model(tmp_path / "direct")(images_BCHW).shape == (3, 10)


def test_the_command_repairs_with_clean_images_and_says_what_it_did(
    suspect: tuple[Checkpoint, Poisoned], digits: Digits, tmp_path: Path
) -> None:
    model, _ = suspect
    command = ["repair", model.path, "--method=ibau", f"--out={tmp_path / 'run'}", "--direct", "--device=cpu"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "clean_shards" in result.output
    shards = digits.shards()
    command += [f"--clean-shards={shards[14]}", f"--test-shards={shards[15]}"]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)["repair"]
    assert report["method"]["kind"] == "ibau"
    assert len(report["before"]["acc_of_class"]) == 10
    table = CliRunner().invoke(app, command)
    assert table.exit_code == 0
    assert "accuracy" in table.output


@pytest.mark.slow
def test_a_model_that_learned_no_backdoor_is_left_as_it_is(digits: Digits, tmp_path: Path) -> None:
    compute = Compute(device="cpu")
    dataset = index_shards(IndexConfig(), digits.shards()[:14], str(tmp_path / "index"), compute)
    optim = OptimConfig(epochs=12, batch_size=32, learning_rate=0.01)
    embedder = EmbedderConfig(architecture=ConvNetConfig(widths=(16, 32)), optim=optim, min_steps=1)
    model = train_embedder(embedder, dataset, str(tmp_path / "model"), compute)
    config = {"model": model.path, "shards": digits.shards()[:14]}
    config |= {"compute": {"device": "cpu"}}
    report = start(RepairRunConfig.model_validate(config), tmp_path / "run", direct=True)["repair"]
    assert report["weights_changed"]["changed"] == 0


def test_an_unknown_layer_is_refused_with_the_names_there_are(
    suspect: tuple[Checkpoint, Poisoned], digits: Digits, tmp_path: Path
) -> None:
    config = settings(suspect, digits).model_dump(mode="json")
    config["repair"]["method"]["layers"] = ["features.nothing"]
    with pytest.raises(ConfigError, match="head"):
        start(RepairRunConfig.model_validate(config), tmp_path / "run", direct=True)


def test_what_is_repaired_can_be_certified_in_the_same_run(
    suspect: tuple[Checkpoint, Poisoned], digits: Digits, tmp_path: Path
) -> None:
    config = settings(suspect, digits).model_dump(mode="json")
    config |= {"smoothing": {"sigma": 0.05, "n": 200, "n0": 20, "max_images": 20}}
    result = start(RepairRunConfig.model_validate(config), tmp_path / "run", direct=True)
    assert [certificate["kind"] for certificate in result["certificates"]] == ["smoothing"]
    assert result["certificates"][0]["samples"] == 20
    assert Path(result["report"]).exists()
    written = json.loads((Path(result["package"]) / "certificate.json").read_text())
    assert written["certificates"][0]["kind"] == "smoothing"
    with pytest.raises(ConfigError, match="test_shards"):
        start(RepairRunConfig.model_validate(config | {"test_shards": []}), tmp_path / "none", direct=True)
