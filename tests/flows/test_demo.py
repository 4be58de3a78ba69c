"""The demo keeps what the README promises."""

import sys
from pathlib import Path

import pytest

from sanitize.embed import EmbedderConfig
from sanitize.jobs import demo, verify
from sanitize.jobs.demo import DemoRun
from sanitize.loop import OptimConfig
from sanitize.models.convnet import ConvNetConfig


def test_demo_goes_from_digits_to_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With networks that learn next to nothing: the numbers are counts of the same samples."""
    optim = OptimConfig(epochs=1, batch_size=64)
    quick = EmbedderConfig(architecture=ConvNetConfig(widths=(8,)), optim=optim, min_steps=1, max_steps=1)
    monkeypatch.setattr(sys.modules[DemoRun.__module__], "MODEL", quick)
    result = demo(out=tmp_path).summary
    assert result["poisoned"] == round(0.02 * 1797) == result["found"] + result["missed"]
    assert result["clean_samples"] == 1797 - result["poisoned"]
    assert result["recall"] == result["found"] / result["poisoned"]
    assert {"acc_before", "asr_before", "acc_after", "asr_after"} <= result.keys()
    assert "<html" in Path(result["report"]).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_demo_finds_the_backdoor_and_closes_it(tmp_path: Path, seed: int) -> None:
    run = demo(out=tmp_path, compute={"seed": seed})
    assert run.config.compute.device == "cpu"
    result = run.summary
    assert result["recall"] >= 0.9
    assert result["clean_lost_fraction"] <= 0.02
    assert result["asr_before"] >= 0.9
    assert result["asr_after"] <= 0.1
    assert result["acc_after"] >= result["acc_before"] - 0.02
    assert Path(result["report"]).exists()
    assert result["report"] == run.cleaned.report
    assert verify(tmp_path).problems == []
