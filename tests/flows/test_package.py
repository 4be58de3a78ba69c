"""`sanitize package`: from a file of weights to a package that other commands take."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sanitize
from flows.cli import app
from sanitize.data.digits import Digits
from sanitize.models.config import ModelConfig
from sanitize.models.convnet import ConvNetConfig

ARCHITECTURE = ["--set", "model.architecture={kind: convnet, widths: [8, 16]}"]
IMAGES = ["--size", "8", "--channels", "1", "--mean", "0.5", "--std", "0.25"]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """State dict of a network for digits."""
    torch.manual_seed(0)
    config = ModelConfig(architecture=ConvNetConfig(widths=(8, 16)), n_classes=10, image_shape=(1, 8, 8))
    torch.save({"state_dict": config.build().state_dict(), "epoch": 1}, tmp_path / "w.pt")
    return tmp_path / "w.pt"


def test_weights_become_a_package_that_can_be_certified(weights: Path, digits: Digits, tmp_path: Path) -> None:
    names = [f"digit {i}" for i in range(10)]
    (tmp_path / "names.json").write_text(json.dumps(names))
    out = tmp_path / "mine"
    arguments = ["package", str(weights), *ARCHITECTURE, *IMAGES, "--classes", str(tmp_path / "names.json")]
    found = CliRunner().invoke(app, [*arguments, "--out", str(out), "--json"])
    assert found.exit_code == 0, found.output
    summary = json.loads(found.stdout)
    assert summary["classes"] == 10
    assert summary["image_shape"] == [1, 8, 8]
    assert sanitize.load_model(out)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert "0 (digit 0)" in (out / "80-package" / "MODEL_CARD.md").read_text()

    smoothing = ["--n", "20", "--max-images", "5"]
    certified = CliRunner().invoke(
        app, ["certify", str(out), "--shards", digits.shards()[0], "--out", str(tmp_path / "c"), "--direct", *smoothing]
    )
    assert certified.exit_code == 0, certified.output


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--mean", "half"], 2, "--mean: 'half' is no list of numbers"),
        (["--size", "8x8x8"], 2, "model.size"),
        (["--classes", "nowhere.json"], 2, "nowhere.json cannot be read as a list of classes"),
        (["--classes", "11"], 2, "do not fit the architecture"),
        (["--set", "model.architecture=resnett"], 2, "resnett is unknown; nearest: resnet"),
        (["--set", "model.std=[0]"], 2, "model.std"),
    ],
)
def test_what_is_wrong_is_said(weights: Path, tmp_path: Path, more: list[str], code: int, message: str) -> None:
    arguments = ["package", str(weights), *ARCHITECTURE, *IMAGES, "--out", str(tmp_path / "mine"), *more]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == code, found.output
    assert message in found.output
    assert "Traceback" not in found.output
    assert not (tmp_path / "mine" / "80-package").exists()
