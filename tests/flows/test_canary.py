"""Canaries from shards to verdict: in no shard, and an all-clear only where the run saw them."""

import hashlib
import html
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from flows.cli.clean import _print_verdict
from flows.start import start
from sanitize.data.canaries import Canaries
from sanitize.data.digits import Digits
from sanitize.jobs.clean import CleanConfig, CleanRun

SMALL, LARGE = ({"architecture": {"kind": "convnet", "widths": widths}} for widths in ([16, 32], [16, 32, 64]))
BRIEF = SMALL | {"optim": {"epochs": 5}, "min_steps": 1, "max_steps": 1}


def cleaned(digits: Digits, out: Path, embedder: dict[str, Any]) -> CleanRun:
    settings = {
        "shards": digits.shards(),
        "embedder": embedder,
        "compute": {"device": "cpu"},
        "n_groups": 1,
    }
    start(CleanConfig.model_validate(settings), out, direct=True)
    return CleanRun.open(out)


def images(shards: Iterable[str]) -> Counter[str]:
    """How often each picture occurs in the shards, by its SHA-256."""
    found: Counter[str] = Counter()
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    file = tar.extractfile(member)
                    assert file is not None
                    found[hashlib.sha256(file.read()).hexdigest()] += 1
    return found


def said_once(run: CleanRun, capsys: pytest.CaptureFixture[str]) -> None:
    """Terminal, page and record give the same verdict, and each of its sentences once."""
    found = run.summary["verdict"]
    assert json.loads(Path(run.folder, "run.json").read_text())["verdict"] == found
    page = " ".join(html.unescape(re.sub("<[^>]*>", "", Path(run.report).read_text())).split())
    _print_verdict(found)
    shown = capsys.readouterr().err
    assert shown.splitlines()[0].endswith(found["why"])
    for text in (found["why"], *(text for reason in found["reasons"] for text in reason.values() if text)):
        assert (page.count(text), shown.count(text)) == (1, 1), text
    assert all(line[10] == ":" for line in shown.splitlines())


def test_a_model_that_learned_the_data_and_not_the_canaries_gives_no_all_clear(
    digits: Digits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = cleaned(digits, tmp_path / "run", BRIEF)
    assert run.summary["suspect"]["learned"]
    assert run.verdict == "inconclusive"
    missed = [canary for canary in run.summary["verdict"]["canaries"] if canary["missed"] == "not learned"]
    assert missed
    reason = run.summary["verdict"]["reasons"][0]
    assert "was not learned" in reason["why"]
    assert reason["remedy"] == "set embedder.min_steps=600"
    said_once(run, capsys)
    page = (tmp_path / "run/90-report/index.html").read_text()
    assert "What this run could have seen" in page
    assert "not learned" in page


def test_canaries_are_in_no_shard(direct: Path, poisoned: Path) -> None:
    run = CleanRun.open(direct)
    canaries = Canaries.load(str(direct / "09-canaries"))
    assert canaries.n_samples == 60
    before = images(map(str, sorted(poisoned.glob("*.tar"))))
    assert images([*run.clean_shards, *run.quarantine]) == before
    assert run.summary["samples"]["samples"] == sum(before.values())
    assert len(run.verdicts()) == sum(before.values())
    assert [canary["n"] for canary in run.summary["verdict"]["canaries"]] == [30, 30]


def test_without_canaries_there_is_no_all_clear(digits: Digits, tmp_path: Path) -> None:
    run = cleaned(digits, tmp_path / "run", BRIEF | {"canary": None})
    folders = [stage["folder"] for stage in json.loads((tmp_path / "run/run.json").read_text())["stages"]]
    assert not [folder for folder in folders if "canaries" in folder]
    assert run.verdict == "inconclusive"
    assert [reason["remedy"] for reason in run.summary["verdict"]["reasons"]] == ["set embedder.canary={}"]


@pytest.mark.slow
def test_an_all_clear_says_what_the_run_would_have_seen(digits: Digits, tmp_path: Path) -> None:
    run = cleaned(digits, tmp_path / "run", LARGE)
    assert run.verdict == "nothing"
    assert run.summary["samples"]["quarantined"] == 0
    assert all(not canary["missed"] and canary["learned"] > 0.9 for canary in run.summary["verdict"]["canaries"])
    assert run.summary["verdict"]["reasons"][-1]["why"] == "This run found the triggers that it planted itself."
    page = (tmp_path / "run/90-report/index.html").read_text()
    assert "What this run could have seen" in page
    assert "faint noise on 1.7 % of the samples" in page
