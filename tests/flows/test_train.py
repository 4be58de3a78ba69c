"""The training flow: the same however it is called; the command says where everything is."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from flows.cli import app
from flows.start import start
from sanitize.artifacts import read_manifest
from sanitize.jobs.restore import verify_run
from sanitize.jobs.train import TrainRunConfig
from sanitize.training import RobustModel

FOLDERS = (
    "00-index",
    "01-index-test",
    "05-hygiene",
    "06-test-leaks",
    "60-model",
    "61-drop-scores",
    "80-package",
    "90-report",
)


@pytest.fixture(scope="module")
def train_settings(poisoned: Path) -> dict[str, Any]:
    shards = sorted(str(path) for path in poisoned.glob("*.tar"))
    return {
        "shards": shards[:3],
        "test_shards": shards[3:],
        "train": {
            "architecture": {"kind": "convnet", "widths": [8, 16]},
            "optim": {"epochs": 3, "batch_size": 64, "learning_rate": 0.02},
            "method": {"select_batch": {"kind": "prl_l", "tau": 0.1, "warmup_epochs": 1}},
        },
        "compute": {"device": "cpu"},
    }


def digests(out: Path) -> dict[str, str]:
    return {folder: read_manifest(out / folder).digest for folder in FOLDERS}


@pytest.fixture(scope="module")
def trained(train_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("train") / "run"
    start(TrainRunConfig.model_validate(train_settings), out, direct=True)
    return out


@pytest.mark.usefixtures("prefect_server")
def test_prefect_and_direct_give_the_same_digests(
    trained: Path, train_settings: dict[str, Any], tmp_path: Path
) -> None:
    result = start(TrainRunConfig.model_validate(train_settings), tmp_path / "run", direct=False)
    assert digests(tmp_path / "run") == digests(trained)
    assert result["last"]["epoch"] == 3
    assert result["last"]["test_accuracy"] > 0.5


def test_a_run_is_whole_and_its_page_shows_the_curves(trained: Path) -> None:
    assert verify_run(str(trained))[1] == []
    record = json.loads((trained / "run.json").read_text())
    assert record["status"] == "finished"
    assert [stage["folder"] for stage in record["stages"]] == list(FOLDERS)
    page = (trained / "90-report" / "index.html").read_text()
    history = json.loads((trained / "90-report" / "report.json").read_text())["history"]
    assert page.count("<svg") == 2
    assert page.count("<polyline") == len(history[0]) - 1  # all columns but the number of the epoch
    assert "<script" not in page


def test_the_command_trains_and_says_where_everything_is(train_settings: dict[str, Any], tmp_path: Path) -> None:
    options = [f"--shards={shard}" for shard in train_settings["shards"]]
    options += [f"--test-shards={shard}" for shard in train_settings["test_shards"]]
    more = ["--method=co_prl_l", "--tau=0.1", "--warmup=1", "--epochs=2", f"--out={tmp_path / 'run'}", "--direct"]
    result = CliRunner().invoke(app, ["train", *options, *more, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found) == {"model", "history", "last", "drop_scores", "package", "report", "test_leaks"}
    assert found["last"]["dropped"] == pytest.approx(0.1, abs=0.02)
    recipe = read_manifest(tmp_path / "run" / "60-model").recipe
    assert recipe.config["method"]["collaborate"] == {"kind": "co"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method=magic"], "--method magic: there are standard, "),
        (["--method=prl_l", "--tau=0"], "needs tau > 0"),
        (["--epochs=0"], "train.optim.epochs"),
    ],
)
def test_settings_that_cannot_work_exit_2(options: list[str], message: str, poisoned: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", f"--shards={poisoned}", f"--out={tmp_path / 'run'}", *options])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "run").exists()


def torchrun(settings: dict[str, Any], out: Path) -> subprocess.Popen[str]:
    """Two processes that train one network, as a user starts them."""
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(settings))
    # A free port each: tests run side by side.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "flows.cli"]
    train = ["train", str(config), f"--out={out}", "--direct", "--json", "--quiet"]
    return subprocess.Popen(
        [*launch, *train],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_two_processes_make_one_run_and_killed_they_go_on(train_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = train_settings | {"train": train_settings["train"] | {"snapshot_every": 1}}
    whole = torchrun(settings, tmp_path / "whole")
    printed, errors = whole.communicate(timeout=240)
    assert whole.returncode == 0, errors
    result = json.loads(printed)  # of one process: the other prints nothing
    assert result["last"]["test_accuracy"] > 0.5
    manifest = read_manifest(tmp_path / "whole" / "60-model")
    assert manifest.recipe.numerics["processes"] == 2
    dropped_N, seen_N = RobustModel.load(tmp_path / "whole" / "60-model").drops()
    assert seen_N.unique().tolist() == [0, 1, 2]  # both epochs after the warm-up, of both processes' shares
    assert dropped_N.sum() / seen_N.sum() == pytest.approx(0.1, abs=0.02)

    killed = torchrun(settings, tmp_path / "killed")
    snapshot = tmp_path / "killed" / ".60-model.partial" / "snapshot"
    deadline = time.monotonic() + 240
    while not snapshot.exists():
        assert killed.poll() is None, killed.stderr and killed.stderr.read()
        assert time.monotonic() < deadline, "no snapshot"
        time.sleep(0.01)
    for pid in [*Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split(), killed.pid]:
        os.kill(int(pid), signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "60-model").exists()
    again = torchrun(settings, tmp_path / "killed")
    _, errors = again.communicate(timeout=240)
    assert again.returncode == 0, errors
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
