"""Networks built by code of the user's own: his training runs and goes on; elsewhere the code needs his word."""

import pickle
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.start import start
from sanitize.data.digits import Digits
from sanitize.jobs.train import TrainRunConfig
from sanitize.models.checkpoint import Checkpoint
from sanitize.packaging import open_model

RUNNER = CliRunner()
CODE = """
from torch import nn

def linear(n_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, n_classes))
"""


@pytest.fixture
def trained(digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose YAML file names a function of the user's, in a folder that is on the path."""
    site, out = tmp_path / "site", tmp_path / "run"
    site.mkdir()
    (site / "networks_of_mine.py").write_text(CODE)
    monkeypatch.syspath_prepend(site)
    settings = {
        "shards": digits.shards()[:2],
        "index": {"n_classes": 10, "image": {"size": [8, 8], "channels": 1}},
        "train": {
            "architecture": {"kind": "factory", "function": "networks_of_mine:linear"},
            "optim": {"epochs": 1},
        },
        "compute": {"device": "cpu"},
    }
    for _ in range(2):  # the second one goes on with what the first one made
        start(TrainRunConfig.model_validate(settings), out, direct=True)
    return out


@pytest.mark.parametrize("command", ["certify", "repair", "robustness"])
def test_a_command_runs_code_that_a_model_names_only_where_it_is_allowed(
    command: str, trained: Path, digits: Digits, tmp_path: Path
) -> None:
    options = {
        "certify": ["--n=20", "--max-images=2"],
        "repair": ["--method=fine_tuning", f"--clean-shards={digits.shards()[3]}"],
        "robustness": ["--n-images=2", "--radius=0.1"],
    }
    arguments = [command, str(trained), *options[command], f"--shards={digits.shards()[2]}", "--device=cpu", "--direct"]
    refused = RUNNER.invoke(app, [*arguments, f"--out={tmp_path / 'refused'}"])
    assert refused.exit_code == 1
    assert "networks_of_mine:linear; none of it was run" in " ".join(refused.output.split())
    allowed = RUNNER.invoke(app, [*arguments, f"--out={tmp_path / 'allowed'}", "--allow-factory"])
    assert allowed.exit_code == 0, allowed.output
    assert "allow_factory" not in (tmp_path / "allowed" / "config.yaml").read_text()


def test_the_permission_travels_to_workers_and_not_into_files(trained: Path) -> None:
    model = open_model(trained, trust_code=True)
    assert pickle.loads(pickle.dumps(model)).trust_code
    assert Checkpoint.model_validate_json(model.model_dump_json()).trust_code
    assert not open_model(trained).trust_code
    for path in trained.rglob("*.json"):
        assert "trust_code" not in path.read_text()
