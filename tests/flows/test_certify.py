"""Certificates from shards to the package: the same however it is called; what voids one is refused by its name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import sanitize
from flows.cli import app
from flows.start import start
from sanitize.artifacts import read_manifest
from sanitize.data.digits import Digits
from sanitize.errors import ConfigError
from sanitize.jobs.certify import CertifyRunConfig
from sanitize.jobs.restore import verify_run
from sanitize.jobs.train import TrainRunConfig
from sanitize.jobs.trained_on import training_data
from sanitize.packaging import open_model

RUNNER = CliRunner()
INDEX = {"n_classes": 10, "image": {"size": [8, 8], "channels": 1}}
PARTITION = {
    "n_partitions": 9,
    "group_size": 4,
    "steps_per_epoch": 4,
    "optim": {"epochs": 10, "batch_size": 16, "learning_rate": 0.01},
}


@pytest.fixture(scope="module")
def ensemble_settings(digits: Digits) -> dict[str, Any]:
    shards = digits.shards()
    settings = {"shards": shards[:4], "test_shards": shards[4:6], "index": INDEX, "partition": PARTITION}
    return settings | {"compute": {"device": "cpu"}}


@pytest.fixture(scope="module")
def ensemble_run(ensemble_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("certify") / "ensemble"
    start(TrainRunConfig.model_validate(ensemble_settings), out, direct=True)
    return out


@pytest.fixture(scope="module")
def network_run(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("certify") / "network"
    of_train = {
        "architecture": {"kind": "convnet", "widths": [8, 16]},
        "optim": {"epochs": 6, "noise_sd": 0.25, "learning_rate": 0.02},
    }
    settings = {"shards": digits.shards()[:4], "index": INDEX, "train": of_train, "compute": {"device": "cpu"}}
    start(TrainRunConfig.model_validate(settings), out, direct=True)
    return out


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_groups_of_partitions_as_prefect_tasks_give_the_same_digests(
    ensemble_run: Path, ensemble_settings: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    start(TrainRunConfig.model_validate(ensemble_settings | {"n_groups": 3}), out, direct=False)
    for folder in ("00-index", "60-ensemble", "70-certificates", "80-package", "90-report"):
        assert read_manifest(out / folder).digest == read_manifest(ensemble_run / folder).digest
    assert verify_run(str(out))[1] == []


@pytest.mark.usefixtures("prefect_server")
def test_smoothing_as_a_flow_gives_the_same_digests(network_run: Path, digits: Digits, tmp_path: Path) -> None:
    smoothing = {"n": 200, "n0": 20, "max_images": 12}
    settings = {"model": str(network_run), "shards": digits.shards()[4:6], "smoothing": smoothing}
    config = CertifyRunConfig.model_validate(settings | {"compute": {"device": "cpu"}})
    for name, direct in (("direct", True), ("prefect", False)):
        start(config, tmp_path / name, direct)
    folders = ("70-certificates", "80-package", "90-report")
    assert (
        len({tuple(read_manifest(tmp_path / name / f).digest for f in folders) for name in ("direct", "prefect")}) == 1
    )


def test_a_package_says_what_it_is_and_loads_without_the_rest(
    ensemble_run: Path, digits: Digits, tmp_path: Path
) -> None:
    package = tmp_path / "elsewhere"
    shutil.copytree(ensemble_run / "80-package", package)
    files = {path.name for path in package.iterdir()}
    assert {"model.safetensors", "config.json", "certificate.json", "metrics.json", "MODEL_CARD.md"} <= files
    images_BCHW = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    votes_BK = sanitize.load_model(package)(images_BCHW)
    assert votes_BK.sum(1).tolist() == [9.0] * 5
    torch.testing.assert_close(sanitize.load_model(ensemble_run)(images_BCHW / 255), votes_BK)
    torch.testing.assert_close(sanitize.load_model(ensemble_run / "60-ensemble")(images_BCHW), votes_BK)
    card = (package / "MODEL_CARD.md").read_text()
    assert "| certified accuracy |" in card
    assert "inserted into the training set or removed" in card
    (certificate,) = json.loads((package / "certificate.json").read_text())["certificates"]
    shares = [share for _, share in certificate["certified_accuracy"]]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == certificate["clean_accuracy"] > 0.7


def test_the_command_certifies_a_package_again_and_keeps_how_it_was_trained(
    ensemble_run: Path, digits: Digits, tmp_path: Path
) -> None:
    shards = [f"--shards={shard}" for shard in digits.shards()[6:8]]
    command = ["certify", str(ensemble_run), *shards, f"--out={tmp_path / 'run'}", "--direct"]
    result = RUNNER.invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    (certificate,) = json.loads(result.stdout)["certificates"]
    assert certificate["kind"] == "partitions"
    before, after = (
        json.loads((run / "80-package" / "training.json").read_text()) for run in (ensemble_run, tmp_path / "run")
    )
    assert before == after
    page = (tmp_path / "run" / "90-report" / "index.html").read_text()
    assert "<svg" in page
    assert "<script" not in page
    shown = RUNNER.invoke(app, [*command, "--quiet"])
    assert "A prediction does not change if" in " ".join(shown.output.split())


def certified(model: Path, shards: list[str], out: Path, **smoothing: Any) -> dict[str, Any]:
    settings = {"model": str(model), "shards": shards, "smoothing": smoothing, "compute": {"device": "cpu"}}
    return start(CertifyRunConfig.model_validate(settings), out, direct=True)


def test_test_pictures_that_the_model_was_trained_on_are_counted(
    ensemble_run: Path, digits: Digits, tmp_path: Path
) -> None:
    """Also of a package in another run, whose own folder does not hold the training data."""
    shards = digits.shards()
    first = certified(ensemble_run, shards[3:5], tmp_path / "first")  # one of four training shards
    assert (first["test_leaks"], first["leaks_unchecked"]) == (100, None)
    again = certified(tmp_path / "first", shards[6:7], tmp_path / "again")
    assert (again["test_leaks"], again["leaks_unchecked"]) == (0, None)
    assert verify_run(str(tmp_path / "again"))[1] == []
    command = ["certify", str(ensemble_run), f"--shards={shards[3]}", f"--out={tmp_path / 'shown'}", "--direct", "-q"]
    assert "100 training samples show a picture of the test shards" in RUNNER.invoke(app, command).output


def test_a_network_is_checked_too(network_run: Path, digits: Digits, tmp_path: Path) -> None:
    small = {"n": 10, "n0": 2, "max_images": 2}
    found = certified(network_run / "60-model", digits.shards()[:1], tmp_path / "run", **small)
    assert found["test_leaks"] == 100


def test_a_package_without_its_run_is_certified_and_said_not_to_be_checked(
    ensemble_run: Path, digits: Digits, tmp_path: Path
) -> None:
    shutil.copytree(ensemble_run / "80-package", tmp_path / "lone" / "package")
    shards = digits.shards()[3:4]
    found = certified(tmp_path / "lone" / "package", shards, tmp_path / "run")
    assert found["test_leaks"] is None
    assert "the run that trained the model is not beside it" in found["leaks_unchecked"]
    command = ["certify", str(tmp_path / "lone" / "package"), f"--shards={shards[0]}", f"--out={tmp_path / 'b'}"]
    assert "was not checked" in RUNNER.invoke(app, [*command, "--direct", "-q"]).output


@pytest.mark.hostile
@pytest.mark.parametrize(
    "record",
    [
        "{",
        "[" * 10_000,
        "[]",
        '{"stages": 3}',
        '{"stages": [3, {"digest": []}], "inputs": []}',
        '{"stages": [{"digest": "DATASET", "folder": "../other/00-index"}]}',
        '{"stages": [{"digest": "DATASET", "folder": "80-package"}]}',
        '{"stages": [], "inputs": {"MODEL": "PACKAGE"}}',
        '{"stages": [], "inputs": {"MODEL": "http://localhost:1/model"}}',
    ],
)
def test_a_record_is_believed_by_digest_alone(ensemble_run: Path, digits: Digits, tmp_path: Path, record: str) -> None:
    for name in ("80-package", "00-index"):
        shutil.copytree(ensemble_run / name, tmp_path / ("run" if name == "80-package" else "other") / name)
    package = open_model(tmp_path / "run")
    of_package, of_training = package.manifest().recipe, json.loads(package.read("training.json"))
    given = {"DATASET": of_training["inputs"]["dataset"], "MODEL": of_package.inputs["model"], "PACKAGE": package.path}
    for name, value in given.items():
        record = record.replace(name, value)
    (tmp_path / "run" / "run.json").write_text(record)
    assert isinstance(training_data(package), str)


def test_a_model_without_certificates_says_so(network_run: Path) -> None:
    assert json.loads((network_run / "80-package" / "certificate.json").read_text())["certificates"] == []
    assert "this model carries no certificate" in (network_run / "80-package" / "MODEL_CARD.md").read_text()


def test_shards_that_a_global_filter_left_get_no_poisoning_certificate(
    ensemble_settings: dict[str, Any], approved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "50-shards"
    shutil.copytree(approved / "50-shards", folder)
    settings = ensemble_settings | {"shards": [str(folder / "clean")]}
    with pytest.raises(ConfigError, match="made by write_selected, which looks at all samples"):
        start(TrainRunConfig.model_validate(settings), tmp_path / "refused", direct=True)
    (folder / "manifest.json").unlink()  # a copy of the shards with the description that lies beside them
    with pytest.raises(ConfigError, match="made by write_selected"):
        start(TrainRunConfig.model_validate(settings), tmp_path / "refused too", direct=True)
    assert not list(tmp_path.glob("refused*/80-package"))


def test_a_filter_inside_each_partition_keeps_the_certificate(
    ensemble_settings: dict[str, Any], tmp_path: Path
) -> None:
    filtered = {"kind": "per_partition", "contamination": 0.1}
    settings = ensemble_settings | {"partition": PARTITION | {"filter": filtered}}
    result = start(TrainRunConfig.model_validate(settings), tmp_path / "run", direct=True)
    (certificate,) = result["certificates"]
    assert certificate["scope"]["filter"] == "inside each partition"
    counts = read_manifest(tmp_path / "run" / "60-ensemble").counts
    assert 0.88 < counts["trained_on"] / counts["samples"] < 0.95


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"simclr": {}}, "trains on pixels alone"),
        ({"train": {"lipschitz": 1.0}}, "trains in place of `train:`"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, Any], message: str, ensemble_settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainRunConfig.model_validate(ensemble_settings | settings)


@pytest.mark.parametrize(
    ("path", "message"),
    [("00-index", "is no model: it was made by index_shards"), ("nothing", "is not a finished artifact")],
)
def test_what_is_no_model_is_refused(
    path: str, message: str, network_run: Path, digits: Digits, tmp_path: Path
) -> None:
    command = [
        "certify",
        str(network_run / path),
        f"--shards={digits.shards()[0]}",
        f"--out={tmp_path / 'run'}",
        "--direct",
    ]
    result = RUNNER.invoke(app, command)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize("n", [1, 9])
def test_the_command_refuses_too_few_copies_and_says_how_many_it_takes(
    n: int, network_run: Path, digits: Digits, tmp_path: Path
) -> None:
    command = ["certify", str(network_run), f"--shards={digits.shards()[0]}", f"--out={tmp_path / 'run'}", "--direct"]
    result = RUNNER.invoke(app, [*command, f"--n={n}"])
    assert result.exit_code == 2
    output = " ".join(result.output.split())
    assert f"with n = {n} no image can be certified at alpha 0.001" in output
    assert "take n >= 10" in output
    assert not (tmp_path / "run").exists()


def test_the_largest_radius_is_said_in_print_and_as_json(network_run: Path, digits: Digits, tmp_path: Path) -> None:
    (tmp_path / "few.yaml").write_text("smoothing: {n0: 5}\n")
    command = ["certify", str(network_run), f"--shards={digits.shards()[0]}", f"--out={tmp_path / 'run'}", "--direct"]
    command += [f"--config={tmp_path / 'few.yaml'}", "--n=20", "--max-images=4", "--device=cpu"]
    result = RUNNER.invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    (certificate,) = json.loads(result.stdout)["certificates"]
    assert certificate["largest_radius"] == pytest.approx(0.25 * 0.5473934835)
    shown = RUNNER.invoke(app, [*command, "--quiet"])
    assert "largest possible radius with these settings: 0.1368 l2" in " ".join(shown.output.split())


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_partitions_to_certify_anything_are_refused(n: int, digits: Digits, tmp_path: Path) -> None:
    command = ["train", f"--shards={digits.shards()[0]}", f"--partitions={n}", f"--out={tmp_path / 'run'}", "--direct"]
    result = RUNNER.invoke(app, command)
    assert result.exit_code == 2
    assert "set 3 or more" in " ".join(result.output.split())
