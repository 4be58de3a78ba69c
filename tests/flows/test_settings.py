"""Settings of all commands: declared paths exist, every setting can be set, and a typo names its neighbour."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from typer.testing import CliRunner

from flows.cli import app
from flows.cli.app import ConfigOption, RunFolder, Store
from flows.cli.command import COMMANDS
from flows.cli.methods import ATTACKS, EPILOGS, REPAIRS, TRAINING
from sanitize.attack import AttackConfig
from sanitize.attack.several import OneAttack
from sanitize.errors import ConfigError
from sanitize.jobs import JOBS, CleanConfig, TrainRunConfig
from sanitize.repairs import RepairConfig
from sanitize.score import ScorerConfig
from sanitize.settings import WrongSettings, change, make_config, paths_of
from sanitize.training import zoo

SCORERS = [{"kind": kind.model_fields["kind"].default} for kind in get_args(get_args(ScorerConfig)[0])]
NEEDED: dict[str, dict[str, Any]] = {
    "certify": {"model": "a"},
    "clean": {"scorers": SCORERS},
    "denoise": {"denoise": {"dims": 3}},
    "redteam": {
        "clean": {"shards": ["a"]},
        "attacks": [{"kind": "badnets", "rate": 0.1}, {"kind": "wanet", "rate": 0.1}],
    },
    "repair": {"model": "a", "repair": {"trigger": {"kind": "wanet", "rate": 0.1}}},
    "reference": {"run": "a"},
    "restore": {"keys": ["a"]},
    "robustness": {"model": "a"},
    "package": {
        "model": {"weights": "a", "architecture": {"kind": "convnet"}, "size": [8, 8], "mean": [0.5], "std": [0.25]}
    },
    "train": {"simclr": {}},
}
SETTINGS = {
    name: ({"shards": ["a"]} if "shards" in job.config.model_fields else {}) | NEEDED.get(name, {})
    for name, job in JOBS.items()
}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of every setting of a config that is no section."""
    if isinstance(value, dict) and value:
        for name, below in value.items():
            yield from leaves(below, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
        for place, below in enumerate(value):
            yield from leaves(below, f"{path}.{place}")
    else:
        yield path, value


CONFIGS: dict[str, BaseModel] = {name: make_config(JOBS[name].config, SETTINGS[name]) for name in JOBS}
LEAVES = {name: dict(leaves(config.model_dump(mode="json"))) for name, config in CONFIGS.items()}


def test_each_job_has_a_command_and_each_option_is_a_setting() -> None:
    assert COMMANDS.keys() == JOBS.keys()
    for name, command in COMMANDS.items():
        known = set(paths_of(JOBS[name].config))
        declared = {option.path for option in (*command.common, *command.options)} - {""}
        assert declared <= known
        assert declared, name


ENSEMBLE = {"partition": {"n_partitions": 5}, "index": {"n_classes": 10, "image": {"size": [8, 8]}}}


def train_config(tmp_path: Path, settings: dict[str, Any], **options: Any) -> Any:
    """The config of `sanitize train` with a YAML file and options."""
    file, command = tmp_path / "train.yaml", COMMANDS["train"]
    file.write_text(yaml.safe_dump({"shards": ["data"]} | settings))
    values = {option.name: option.default for option in (*command.common, *command.options)}
    return command.config(JOBS["train"].config, values | {"config": file, "set_": None} | options)


def test_epochs_are_those_of_what_is_trained_and_go_over_the_file(tmp_path: Path) -> None:
    index = {"index": ENSEMBLE["index"]}
    for settings, options in ((ENSEMBLE, {}), (index, {"partitions": 5}), (ENSEMBLE, {"partitions": 7})):
        config = train_config(tmp_path, settings, epochs=3, **options)
        plain = train_config(tmp_path, settings, **options)
        assert config.partition.optim == plain.partition.optim.model_copy(update={"epochs": 3})
        assert config.train == plain.train
    in_file = {"train": {"optim": {"epochs": 9, "batch_size": 7}}}
    optim = train_config(tmp_path, in_file, epochs=3).train.optim
    assert (optim.epochs, optim.batch_size) == (3, 7)
    assert train_config(tmp_path, in_file).train.optim.epochs == 9
    assert train_config(tmp_path, in_file, set_=["train.optim.epochs=4"], epochs=3).train.optim.epochs == 4


def test_a_method_does_not_go_with_an_ensemble_wherever_that_is_set(tmp_path: Path) -> None:
    for settings, options in ((ENSEMBLE, {}), ({}, {"partitions": 5})):
        with pytest.raises(ConfigError, match="--method prl_l: networks of an ensemble"):
            train_config(tmp_path, settings, method="prl_l", **options)


@pytest.mark.parametrize("name", JOBS)
def test_every_setting_can_be_set_to_what_it_is(name: str) -> None:
    assert len(LEAVES[name]) > 3
    for path, value in LEAVES[name].items():
        assignment = f"{path}={json.dumps(value)}"
        assert make_config(JOBS[name].config, SETTINGS[name], assignments=[assignment]) == CONFIGS[name], assignment
    every = [f"{path}={json.dumps(value)}" for path, value in LEAVES[name].items()]
    assert make_config(JOBS[name].config, SETTINGS[name], assignments=every[::-1]) == CONFIGS[name]


@given(st.data())
def test_a_typo_names_its_neighbour(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(JOBS)))
    path = data.draw(st.sampled_from(sorted(one for one in LEAVES[name] if not one.rpartition(".")[2].isdecimal())))
    above, _, last = path.rpartition(".")
    place = data.draw(st.integers(0, len(last) - 1))
    typo = f"{above}.{last[:place]}{last[place] * 2}{last[place + 1 :]}".lstrip(".")
    with pytest.raises(WrongSettings) as raised:
        make_config(JOBS[name].config, SETTINGS[name], assignments=[f"{typo}=1"])
    assert f"{typo}: there is no such setting; nearest: {path}" in raised.value.problems
    with pytest.raises(WrongSettings) as raised:  # in a file too
        make_config(JOBS[name].config, change(SETTINGS[name], typo, 1, JOBS[name].config))
    assert f"{typo}: there is no such setting; nearest: {path}" in raised.value.problems


@pytest.mark.parametrize("name", JOBS)
def test_a_typo_exits_2_and_writes_nothing(name: str, tmp_path: Path) -> None:
    path = "clean.compute" if name == "redteam" else "compute"
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(SETTINGS[name]))
    command = COMMANDS[name]
    there, new = tmp_path / "there", str(tmp_path / "run")
    there.mkdir()
    folders = {Store: ["--store", new], RunFolder: [str(there)], None: []}
    arguments = [name, *folders.get(command.out, ["--out", new]), "--set", f"{path}.sede=1"]
    arguments += ["a" for option in command.options if not option.flag.startswith("--")]
    arguments += ["--key", "a"] if name == "restore" else []
    arguments += ["--config"] if command.parameters()["config"][0] is ConfigOption else []
    arguments += [str(file)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert f"config: {path}.sede: there is no such setting; nearest: {path}.seed" in result.output
    assert sorted(one.name for one in tmp_path.rglob("*")) == [file.name, there.name]


def test_the_file_then_options_then_set() -> None:
    file = {"shards": ["a"], "compute": {"seed": 1}, "n_groups": 1, "index": {"n_classes": 3}}
    options = {"compute.seed": 2, "n_groups": 2}
    config = make_config(CleanConfig, file, options, ["n_groups=3"])
    assert (config.index.n_classes, config.compute.seed, config.n_groups) == (3, 2, 3)
    assert make_config(CleanConfig, file, {}, ["index.n_classes=null"]).index.n_classes is None
    assert file["n_groups"] == 1
    assert make_config(CleanConfig, file, {}, ["n_groups=3", "n_groups=4"]).n_groups == 4


def values_of(command: str, **values: Any) -> dict[str, Any]:
    """Values of the options of a command as typer gives them."""
    options = {name: default for name, (_, default) in COMMANDS[command].parameters().items()}
    return options | {"set_": []} | values


def test_options_of_commands_go_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "clean.yaml"
    file.write_text("shards: [a]\ncompute: {seed: 3}\ntrusted: [b]\n")
    values = values_of("clean", config=file, seed=0, shards=["c", "d"])
    config = COMMANDS["clean"].config(CleanConfig, values)
    assert (config.shards, config.trusted, config.compute.seed) == (("c", "d"), ("b",), 0)
    # The same file is a red team's pipeline.
    config = COMMANDS["redteam"].config(JOBS["redteam"].config, values_of("redteam", config=file, shards=[], seed=4))
    assert (config.clean.shards, config.clean.compute.seed) == (("a",), 4)
    for name, method in zoo(0.3, 4).items():
        values = values_of("train", config=file, method=name, tau=0.3, warmup=4, set_=["train.optim.epochs=2"])
        file.write_text("shards: [a]\ntrain: {optim: {epochs: 9, batch_size: 7}}\n")
        config = COMMANDS["train"].config(TrainRunConfig, values)
        assert config.train.method == method
        assert (config.train.optim.epochs, config.train.optim.batch_size) == (2, 7)


def test_lists_unions_and_sections_that_are_left_out() -> None:
    shards = {"shards": ["a"]}
    config = make_config(CleanConfig, shards, {}, ["scorers.0.kind=rca", "scorers.1.kind=spectral"])
    assert [scorer.kind for scorer in config.scorers] == ["rca", "spectral"]
    # Another kind starts with its defaults, whatever the order.
    file = shards | {"embedder": {"architecture": {"kind": "convnet", "widths": [8]}, "optim": {"epochs": 3}}}
    assignments = ["embedder.architecture.kind=resnet", "embedder.architecture.blocks_per_stage=2"]
    for order in (assignments, assignments[::-1]):
        config = make_config(CleanConfig, file, {}, order)
        assert (config.embedder.architecture.kind, config.embedder.architecture.blocks_per_stage) == ("resnet", 2)
        assert config.embedder.optim.epochs == 3
    same = make_config(CleanConfig, file, {}, ["embedder.architecture.kind=convnet"])
    assert same.embedder.architecture.widths == (8,)
    # A kind that is an ordinary setting leaves the others alone.
    file = shards | {"train": {"method": {"select_batch": {"kind": "spl", "tau": 0.3}}}}
    select_batch = make_config(TrainRunConfig, file, {}, ["train.method.select_batch.kind=prl_l"]).train.method
    assert select_batch.select_batch.tau == 0.3
    # What the default of a section says holds for the settings beside the one that is set.
    attack = make_config(
        JOBS["robustness"].config, SETTINGS["robustness"], {}, ["robustness.attack.radius=2"]
    ).robustness.attack
    assert (attack.norm, attack.radius, attack.loss) == ("l2", 2.0, "margin")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("select", "--set select: give it as PATH=VALUE"),
        ("select..verdict=all", "give it as PATH=VALUE"),
        ("shards=*.tar", "the value is not valid YAML"),
        ("scorers.2.kind=rca", "2 is no index of a list of 1"),
        ("scorers.first.kind=rca", "first is no index of a list of 1"),
        ("shards.0.x=1", "shards.0 is 'a', which has no settings of its own"),
        ("verdict=all", "verdict: there is no such setting; nearest: select.verdict"),
        ("scorers.0.kind=rcaa", "scorers.0.kind: rcaa is unknown; nearest: rca; kinds:"),
        ("select.rules.rca.q=0.1", "select.rules.rca.kind: missing; kinds: contamination"),
        ("embedder={kind: simclr, max_steps: 1}", "embedder.max_steps: there is no such setting; another `kind` of"),
        ("embedder.architecture.widths=8", "embedder.architecture.widths: Input should be a list"),
    ],
)
def test_wrong_assignments_are_named(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make_config(CleanConfig, {"shards": ["a"]}, {}, [assignment])
    assert message in str(raised.value)


def test_what_is_missing_names_the_option() -> None:
    for command, message in {
        "clean": "no shards: give --shards, or `shards:`",
        "redteam": "no shards: give --shards, or `clean.shards:`",
        "repair": "no model: give MODEL, or `model:`",
    }.items():
        result = CliRunner().invoke(app, [command])
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())


def test_partitions_are_refused_before_any_work(tmp_path: Path) -> None:
    arguments = ["train", "--shards", str(tmp_path), "--partitions", "5", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "set index.n_classes=N and index.image.size=[H,W]" in " ".join(result.output.split())
    result = CliRunner().invoke(app, [*arguments, "--set", "index.n_classes=3"])
    assert "set index.image.size=[H,W]" in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


def test_partitions_are_refused_from_python_too() -> None:
    settings = {"shards": ["a"], "partition": {"n_partitions": 5}}
    with pytest.raises(ConfigError, match=r"set index\.n_classes=N and index\.image\.size"):
        TrainRunConfig.model_validate(settings)


def test_statistics_of_a_reference_take_set(tmp_path: Path) -> None:
    arguments = ["reference", str(tmp_path), "--store", str(tmp_path / "store"), "--set"]
    result = CliRunner().invoke(app, [*arguments, "n_components=3"])
    assert (result.exit_code, "nearest: statistics.n_components" in result.output) == (2, True)
    result = CliRunner().invoke(app, [*arguments, "statistics.n_components=0"])
    assert (result.exit_code, "n_components: Input should be greater" in result.output) == (2, True)
    assert list(tmp_path.iterdir()) == []


def kinds(union: Any) -> dict[str, Any]:
    """Kind -> config class of a union."""
    return {one.model_fields["kind"].default: one for one in get_args(get_args(union)[0])}


def test_help_lists_the_methods_that_there_are() -> None:
    assert TRAINING.keys() == zoo(0.1).keys()
    for name, method in zoo(0.1234).items():
        assert ("Needs --tau" in TRAINING[name]) == (method.select_batch.tau == 0.1234)
    assert REPAIRS.keys() == kinds(RepairConfig).keys()
    options = {"clean": "Needs --clean-shards.", "untrusted": "Needs --shards.", "nothing": "Needs no data."}
    for name, config in kinds(RepairConfig).items():
        assert options[config.needs] in REPAIRS[name]
    assert ATTACKS.keys() == kinds(OneAttack).keys() | {"several"}
    for command, text in EPILOGS.items():
        shown = " ".join(CliRunner().invoke(app, [command, "--help"]).output.split())
        assert all(f"• {name}:" in shown for name in {"train": TRAINING, "repair": REPAIRS, "poison": ATTACKS}[command])
        assert len(text.splitlines()) > 9


def test_settings_of_an_attack_are_checked_alike(tmp_path: Path) -> None:
    config = make_config(AttackConfig, {"kind": "badnets", "rate": 0.1}, {}, ["size=5"])
    assert (config.size, len(config.attacks)) == (5, 1)
    arguments = ["poison", "--shards", str(tmp_path), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--set", "sise=5"])
    assert (result.exit_code, "sise: there is no such setting; nearest: size" in result.output) == (2, True)
    result = CliRunner().invoke(app, [*arguments, "--label", "null"])
    assert (result.exit_code, "an attack needs labels" in " ".join(result.output.split())) == (2, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["poison", "--help"]])
def test_help_imports_neither_torch_nor_prefect(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom flows.cli import app\ntry:\n app(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'prefect', 'numpy', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
