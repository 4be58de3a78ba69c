"""README and docs/: links lead somewhere, commands parse, examples run."""

import io
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from PIL import Image

import sanitize
from flows.cli import app
from flows.cli.app import Terminal
from flows.cli.command import COMMANDS as JOB_COMMANDS
from sanitize import Compute
from sanitize.data.digits import write_digits
from sanitize.data.samples import ShardReader
from sanitize.importing import ImportConfig, import_data
from sanitize.stage import STAGES

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, ROOT / "deployments/README.md", ROOT / "benchmarks/README.md"]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
_OPERATORS = {"&", "&&", "|", "||", ";", ">", "2>&1"}


def tokens(page: Path) -> list[Token]:
    """Block tokens of a Markdown page."""
    return MarkdownIt().enable("table").parse(page.read_text())


def links(page: Path) -> list[str]:
    """Targets of the links and images of a page."""
    inline = [child for token in tokens(page) for child in token.children or ()]
    return [
        str(token.attrs.get("href") or token.attrs["src"]) for token in inline if token.type in ("link_open", "image")
    ]


def anchors(page: Path) -> set[str]:
    """Anchors of headings that GitHub and mkdocs make alike."""
    titles = [
        after.content
        for token, after in zip(tokens(page), tokens(page)[1:], strict=False)
        if token.type == "heading_open"
    ]
    plain = [re.sub(r"[^\w\s-]", "", title).strip().lower() for title in titles]
    return {title.replace(" ", "-") for title in plain} & {re.sub(r"[-\s]+", "-", title) for title in plain}


def fences(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return [token.content for token in tokens(page) if token.type == "fence" and token.info == language]


def shown(command: str, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """What the command prints about this result."""
    text = io.StringIO()
    for module in (sys.modules[f"flows.cli.{command}"], sys.modules["flows.cli.app"]):
        monkeypatch.setattr(module, "console", Terminal(file=text, width=120))
    JOB_COMMANDS[command].show(result, "runs/first")
    return text.getvalue()


def rows(text: str) -> list[list[str]]:
    """Cells of the rows of tables in the output of a command, headers too."""
    return [
        [cell.strip() for cell in re.split("[┃│]", line)[1:-1]] for line in text.splitlines() if line[:1] in tuple("┃│")
    ]


def test_tables_and_sentences_of_repair_and_robustness_are_those_of_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    summary = {"norm": "l2", "samples": 100, "clean_accuracy": 1.0, "mean": 0.571, "median": 0.597, "not_found": 0}
    found = rows(shown("robustness", {"summary": summary}, monkeypatch))
    page = (ROOT / "docs/robustness.md").read_text()
    assert found == rows(page)
    assert f"`{found[0][-1]}` counts" in " ".join(page.split())

    measured = [{"acc": 1.0, "asr": 1.0, "acc_of_class": [1.0] * 3}, {"acc": 0.973, "asr": 0.048}]
    measured[1]["acc_of_class"] = [1.0, 0.781, 0.972]
    changed = {"changed": 75530, "of": 95213, "relative_l2": 0.0349}
    report = {"method": {"kind": "drr"}, "weights_changed": changed, "before": measured[0], "after": measured[1]}
    text = shown("repair", {"repair": report}, monkeypatch)
    page = " ".join((ROOT / "docs/repair.md").read_text().split())
    assert rows(text) == [row for row in rows((ROOT / "docs/repair.md").read_text()) if len(row) == 3]
    assert text.splitlines()[-1] in page
    unchanged = {"method": {"kind": "drr"}, "weights_changed": changed | {"changed": 0}}
    assert f'"{shown("repair", {"repair": unchanged}, monkeypatch).strip()}" means' in page


def test_keys_in_examples_have_the_shape_of_real_keys(tmp_path: Path) -> None:
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "cat" / "1.png")
    compute = Compute(device="cpu")
    made = [
        *import_data(ImportConfig(), [str(tmp_path / "photos")], str(tmp_path / "imported"), compute).shards(),
        *write_digits(str(tmp_path / "digits"), compute).shards()[:1],
    ]
    real = set()
    for shard in made:
        key = next(iter(ShardReader(shard))).key
        real |= {_shape(key), _shape(f"{Path(shard).name}:{key}")}
    texts = [page.read_text() for page in PAGES] + [COMMANDS["restore"].help]
    named = [key for text in texts for key in re.findall(r"--key (\S+)", text) if not key.isupper()]
    assert len(named) >= 5
    assert [key for key in named if _shape(key) not in real] == []


def _shape(key: str) -> str:
    """The key with 0 for each digit."""
    return re.sub(r"\d", "0", key)


def command_lines(script: str) -> Iterator[list[str]]:
    """The words of each `sanitize ...` command of a shell script, without the first."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "sanitize" in words:
            rest = words[words.index("sanitize") + 1 :]
            end = next((i for i, word in enumerate(rest) if word in _OPERATORS), len(rest))
            yield rest[:end]


def parse(words: list[str]) -> None:
    """Parse a command line as Typer does, without running it.

    Raises:
        KeyError: there is no such command.
        Exception: a UsageError of click's: an unknown option, a missing argument, a value of the wrong type.
    """
    name, *arguments = [word for word in words if word not in ("-v", "--verbose")]
    COMMANDS[name].make_context(name, arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), link
        assert page not in DOCS or target.is_relative_to(ROOT / "docs"), f"{link}: mkdocs serves only docs/"
        assert not anchor or anchor in anchors(target), link


TABLES = runpy.run_path(str(ROOT / "docs/tables.py"))


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_tables_hold_what_the_registries_hold(page: Path) -> None:
    text = page.read_text()
    assert text == TABLES["filled"](text), "a registry has changed: run `python docs/tables.py`"


def test_every_table_is_on_a_page_and_a_stale_one_is_found() -> None:
    text = "".join(page.read_text() for page in DOCS)
    for name in TABLES["TABLES"]:
        assert text.count(f"<!-- table: {name} -->\n") == 1
    for name, declared in STAGES.items():
        if declared.function.__module__.startswith("sanitize."):
            assert f"| `{name}` |" in text
    stale = re.sub(r"\n.*\| `fit_scorer` \|.*", "", text)
    assert stale != text == TABLES["filled"](stale)


def test_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_names_every_command(command: str) -> None:
    assert re.search(rf"`(sanitize )?{command}[` ]", (ROOT / "README.md").read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page: Path) -> None:
    for script in fences(page, "bash"):
        for words in command_lines(script):
            try:
                parse(words)
            except Exception as error:
                pytest.fail(f"sanitize {shlex.join(words)}: {error!r}")


def test_there_are_commands_and_wrong_ones_are_found() -> None:
    found = [words for page in DOCS for script in fences(page, "bash") for words in command_lines(script)]
    assert {words[0] for words in found} > {"clean", "train", "repair", "certify", "ingest", "redteam"}
    (words,) = command_lines("FOO=1 sanitize clean --shards 'a b' \\\n  --out x > log  # and a comment\n")
    assert words == ["clean", "--shards", "a b", "--out", "x"]
    parse(words)
    for wrong in (["clean", "--shard-s", "x"], ["restore", "runs/first"], ["redteam", "--repeats", "many"]):
        with pytest.raises(Exception, match=r"No such option|Missing parameter|should be a valid|not a valid"):
            parse(wrong)
    with pytest.raises(KeyError):
        parse(["harden"])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_parse(command: str) -> None:
    """The examples of `sanitize COMMAND --help` work as printed."""
    paragraphs = [" ".join(text.split()) for text in re.split(r"\n\s*\n", COMMANDS[command].help or "")]
    examples = [text.replace("\\ ", "") for text in paragraphs if text.startswith(f"sanitize {command}")]
    assert examples
    for words in command_lines("\n".join(examples)):
        parse(words)


def test_every_page_is_in_the_navigation_and_the_map() -> None:
    def pages(nav: object) -> Iterator[str]:
        if isinstance(nav, str):
            yield nav
        elif isinstance(nav, list | dict):
            for entry in nav.values() if isinstance(nav, dict) else nav:
                yield from pages(entry)

    names = {page.name for page in DOCS}
    assert set(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])) == names
    assert {link.partition("#")[0] for link in links(ROOT / "docs/index.md")} == names - {"index.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_compiles(page: Path) -> None:
    for code in fences(page, "python"):
        compile(code, str(page), "exec")


@pytest.mark.slow
def test_first_examples_of_the_python_api_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shards = write_digits(str(tmp_path / "digits"), Compute(device="cpu"), n_shards=18).shards()[:2]
    (tmp_path / "data").mkdir()
    for i, shard in enumerate(shards):
        shutil.copy(shard, tmp_path / f"data/train-{i}.tar")
    settings = {"shards": ["elsewhere"], "embedder": {"optim": {"epochs": 1, "batch_size": 64}}}
    (tmp_path / "clean.yaml").write_text(yaml.safe_dump(settings))
    names: dict[str, Any] = {}
    clean, find_poison, with_settings = fences(ROOT / "docs/python-api.md", "python")[:3]

    _execute(clean, names)
    assert {Path(path).name for path in names["run"].clean_shards} == {"train-0.tar", "train-1.tar"}
    assert len(names["removed"]) == names["run"].summary["samples"]["quarantined"]
    _execute(find_poison, names)
    assert names["mask"].nonzero()[0].tolist() == list(range(25))
    _execute(with_settings, names)
    optim, seed = names["run"].config.embedder.optim, names["run"].config.compute.seed
    assert (optim.epochs, optim.batch_size, seed) == (2, 64, 1)


@pytest.mark.slow
def test_other_examples_of_the_python_api_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"sanitize": sanitize}
    for code in fences(ROOT / "docs/python-api.md", "python")[3:]:
        _execute(code, names)
    assert (tmp_path / "api/50-shards/clean").is_dir()
    assert (tmp_path / "api/80-package/MODEL_CARD.md").is_file()
    assert tuple(names["logits"].shape) == (4, 10)
    assert names["outliers"][:6].all()


def _execute(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, "docs/python-api.md", "exec"), names)
