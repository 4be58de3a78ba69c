"""The `sanitize` command as a user meets it: help, results, errors and exit codes."""

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from rich.table import Table
from typer.testing import CliRunner, Result

import flows.cli
from flows.cli import app
from flows.cli.app import Terminal
from sanitize.errors import ArtifactError
from sanitize.jobs.clean import CleanConfig
from sanitize.jobs.denoise import DenoiseRunConfig
from sanitize.jobs.run import read_config
from sanitize.storage import exclusive

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def settings(poisoned: Path) -> dict[str, Any]:
    """Quick: a scorer that needs no good network, and a rule that removes a share of each class."""
    architecture, optim = {"kind": "convnet", "widths": [8]}, {"epochs": 2, "batch_size": 64}
    return {
        "shards": [str(poisoned)],
        "embedder": {"architecture": architecture, "optim": optim, "min_steps": 1, "max_steps": 1},
        "scorers": [{"kind": "spectral", "embedding": "pixels"}],
        "select": {"rule": {"kind": "contamination", "rate": 0.02}},
        "compute": {"device": "cpu", "seed": 0},
    }


@pytest.fixture(scope="module")
def config_file(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "clean.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def cleaned(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    result = run("clean", config_file, "--out", out, "--direct", "--quiet")
    assert result.exit_code == 0, result.output
    return out


def members(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {f"{path.name}/{m.name}": tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    return found


def test_help_lists_every_command_and_teaches() -> None:
    text = run("--help").output
    assert all(re.search(rf"\b{command}\b", text) for command in COMMANDS)
    assert "sanitize demo" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself_and_its_options(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert re.search(rf"Examples?:\s+sanitize {command} ", result.output)
    described = re.findall(r"│ \*? *(--[a-z-]+)(?: +-\w)? .*?([A-Za-z][^│]{9,})│", result.output)
    options = set(re.findall(r"^│ \*? *(--[a-z-]+)", result.output, re.MULTILINE))
    assert {name for name, _ in described} == options >= {"--help"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_result_as_json(command: str) -> None:
    assert "--json" in run(command, "--help").output


def test_the_json_of_a_result_is_all_that_goes_to_stdout() -> None:
    """Text for people goes to stderr, through the one console; `--help` is typer's."""
    writes = re.compile(r"sys\.stdout|typer\.echo|(?<![\w.])print\(|\b(Console|Terminal)\(")
    files = sorted(Path(flows.cli.__file__).parent.glob("*.py"))
    found = [
        f"{file.name}: {line.strip()}" for file in files for line in file.read_text().split("\n") if writes.search(line)
    ]
    assert found == [
        "app.py: class Terminal(Console):",
        "app.py: console = Terminal(stderr=True)",
        r'app.py: sys.stdout.write(json.dumps(value, indent=2) + "\n")',
    ]


def test_report_of_a_run_of_another_job_names_the_job_and_the_page(tmp_path: Path) -> None:
    config = DenoiseRunConfig(shards=("data",), denoise={"dims": 8})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    result = run("report", tmp_path)
    assert result.exit_code == 1
    assert result.stderr == f"failed: {tmp_path} is a run of `sanitize denoise`, and not of `sanitize clean`\n"
    (tmp_path / "90-report").mkdir()
    (tmp_path / "90-report" / "index.html").touch()
    assert f"its page is {tmp_path}/90-report/index.html" in run("report", tmp_path).stderr


@pytest.mark.parametrize("kind", [CleanConfig, DenoiseRunConfig])
def test_a_config_that_no_job_has_is_said_in_one_line(tmp_path: Path, kind: type[BaseModel]) -> None:
    for content in ("[" * 5000, "- 1", "shards: [a]\nold: 1"):
        (tmp_path / "config.yaml").write_text(content)
        with pytest.raises(ArtifactError, match="is not that of a run of `sanitize ") as error:
            read_config(str(tmp_path), kind)
        assert len(str(error.value)) < 500
        assert "\n" not in str(error.value)


def test_clean_prints_where_everything_is(cleaned: Path, config_file: Path) -> None:
    result = run("clean", config_file, "--out", cleaned, "--direct", "--quiet", "--json")
    summary = json.loads(result.stdout)
    assert Path(summary["report"]).exists()
    counts = summary["samples"]
    assert counts["samples"] == counts["kept"] + counts["quarantined"] + counts["unreadable"]
    assert counts["quarantined"] > 0


def test_kept_members_are_byte_exact_and_quarantine_carries_evidence(cleaned: Path, poisoned: Path) -> None:
    given, clean = members(poisoned), members(cleaned / "50-shards" / "clean")
    quarantine = members(cleaned / "50-shards" / "quarantine")
    evidence = {name: data for name, data in quarantine.items() if name.endswith(".sanitize.json")}
    rest = {name: data for name, data in quarantine.items() if name not in evidence}
    assert clean.keys() & rest.keys() == set()
    assert clean | rest == given
    assert evidence
    for data in evidence.values():
        record = json.loads(data)
        assert record["reasons"][0]["score"] > record["reasons"][0]["threshold"]


def test_restore_puts_a_sample_back_and_says_so(cleaned: Path) -> None:
    name, data = next(
        (name, data)
        for name, data in members(cleaned / "50-shards" / "quarantine").items()
        if name.endswith(".sanitize.json")
    )
    key = json.loads(data)["key"]
    result = run("restore", cleaned, "--key", key, "--note", "looked at it", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    restored = members(Path(json.loads(result.stdout)["clean"]))
    before = members(cleaned / "50-shards" / "clean")
    assert len(restored) == len(before) + 2
    assert {n for n in restored if n not in before} == {
        f"{name.partition('/')[0]}/{key}.png",
        f"{name.partition('/')[0]}/{key}.cls",
    }
    decision = json.loads((cleaned / "decisions.jsonl").read_text().splitlines()[-1])
    assert (decision["restored"], decision["note"]) == ([key], "looked at it")
    assert run("verify", cleaned).exit_code == 0
    assert run("restore", cleaned, "--key", key).exit_code == 1  # it is no longer in quarantine
    again = run("report", cleaned)
    assert (again.exit_code, again.stdout) == (0, "")
    page = json.loads(run("report", cleaned, "--json").stdout)["report"]
    assert Path(page).exists()
    assert page in again.stderr


def test_verify_names_the_file_that_changed(cleaned: Path) -> None:
    assert run("verify", cleaned).exit_code == 0
    shard = next((cleaned / "50-shards" / "clean").iterdir())
    content = shard.read_bytes()
    try:
        shard.write_bytes(content[:600] + bytes([content[600] ^ 1]) + content[601:])
        result = run("verify", cleaned, "--json")
        assert result.exit_code == 1
        assert [shard.name in problem for problem in json.loads(result.stdout)["problems"]] == [True]
    finally:
        shard.write_bytes(content)


def test_inspect_counts_what_is_there(poisoned: Path) -> None:
    summary = json.loads(run("inspect", poisoned, "--json", "--quiet").stdout)
    n = sum(shard["counts"]["samples"] for shard in summary["shards"].values())
    assert n == sum(summary["labels"].values()) > 1000
    assert summary["image_sizes"] == {"8x8": n}


def test_poison_writes_a_copy_with_the_truth(poisoned: Path, tmp_path: Path) -> None:
    arguments = ("--attack", "blended", "--rate", 0.1, "--set", "alpha=0.5", "--set", "target=3")
    result = run("poison", "--shards", poisoned, "--out", tmp_path, *arguments, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    counts = json.loads(result.stdout)["counts"]
    assert counts["poisoned"] == round(0.1 * counts["samples"])


def test_poison_takes_several_attacks_or_a_surrogate(poisoned: Path, cleaned: Path, tmp_path: Path) -> None:
    attacks = "attacks=[{kind: wanet, rate: 0.02, target: 1}, {kind: badnets, rate: 0.04, target: next}]"
    arguments = ("--attack", "several", "--set", attacks, "--json", "--quiet")
    result = run("poison", "--shards", poisoned, "--out", tmp_path / "several", *arguments)
    assert result.exit_code == 0, result.output
    counts = json.loads(result.stdout)["counts"]
    assert counts["poisoned"] == round(0.02 * counts["samples"]) + round(0.04 * counts["samples"])

    arguments = ("--attack", "tact", "--rate", 0.02, "--set", "sources=[3, 4]", "--set", "size=0.4", "--quiet")
    result = run("poison", "--shards", poisoned, "--out", tmp_path / "tact", *arguments)
    assert result.exit_code == 0, result.output
    n = round(0.02 * counts["samples"])
    assert f"{n} of {counts['samples']:,} samples poisoned, {n} cover samples: " in result.output

    arguments = ("--attack", "clean_label", "--rate", 0.02, "--set", "steps=1", "--json", "--quiet")
    result = run("poison", "--shards", poisoned, "--out", tmp_path / "clean", *arguments)
    assert result.exit_code == 2
    assert "surrogate" in result.output
    network = next(folder for folder in cleaned.iterdir() if (folder / "model.safetensors").exists())
    result = run("poison", "--shards", poisoned, "--out", tmp_path / "clean", *arguments, "--surrogate", network)
    assert result.exit_code == 0, result.output
    counts = json.loads(result.stdout)["counts"]
    assert counts["poisoned"] == round(0.02 * counts["samples"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scorers": [{"kind": "spectral", "whiten": "yes"}]}, "whiten"),
        ({"compute": {"seed": -1}}, "seed"),
        ({"embedder": {"epochs": 3}}, "epochs"),
        ({"shards": ["pipe:cat /etc/passwd"]}, "refused"),
        ({"shards": ["/nowhere/*.tar"]}, "no shards"),
        ({"scorers": [{"kind": "spectral"}], "select": {"rule": {"kind": "separation"}}}, "separation"),
        ({"select": {"rule": {"kind": "conformal"}}}, "trusted:"),
        ({"trusted": ["missing.tar"]}, "missing.tar"),
    ],
)
def test_wrong_settings_exit_2_and_say_which(
    settings: dict[str, Any], tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings | change))
    result = run("clean", path, "--out", tmp_path / "run", "--direct", "--quiet")
    assert result.exit_code == 2
    assert says in result.output


def test_no_shards_exits_2() -> None:
    assert run("clean", "--direct").exit_code == 2


def test_unusable_data_exits_1(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(b"no tar at all" * 100)
    result = run("clean", "--shards", tmp_path / "in", "--out", tmp_path / "run", "--direct", "--quiet")
    assert result.exit_code == 1
    assert "a.tar" in result.output


def test_another_recipe_in_the_same_folder_is_refused(cleaned: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings | {"index": {"max_bad_fraction": 0.5}}))
    result = run("clean", path, "--out", cleaned, "--direct", "--quiet")
    assert result.exit_code == 1
    assert "max_bad_fraction" in result.output


def test_two_runs_do_not_write_the_same_folder(config_file: Path, tmp_path: Path) -> None:
    with exclusive(tmp_path):
        result = run("clean", config_file, "--out", tmp_path, "--direct", "--quiet")
    assert result.exit_code == 1
    assert "another process" in result.output


ESCAPES = [
    "\x1b]8;;http://a.b\x1b\\",
    "\x1b[2J",
    "\x9b31m",
    "\r",
    "\x07",
    "\u202e",
    "[red]",
    "[link=http://a.b]x[/link]",
]
ESCAPES += ["[/]", ":smile:", "\\[", "\udcff", "a", " "]


@given(st.one_of(st.text(max_size=20), st.lists(st.sampled_from(ESCAPES), max_size=6).map("".join)))
def test_what_strangers_wrote_neither_styles_nor_drives_the_terminal(text: str) -> None:
    file = io.StringIO()
    terminal = Terminal(file=file, force_terminal=True, color_system="truecolor", width=400, highlight=False)
    line = text.replace("\n", "")
    terminal.print(line, soft_wrap=True)
    assert file.getvalue().removesuffix("\n").isprintable()  # no escape sequence, no colour, no link
    table = Table(line, title=line)
    table.add_row(line)
    terminal.print(table)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())  # rich's own styles of a table
    assert all(part.isprintable() for part in shown.split("\n"))
    for part in ("[red]", "[link=http://a.b]x[/link]", ":smile:", "[/]"):
        assert shown.count(part) >= 4 * line.count(part)
