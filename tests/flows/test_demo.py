"""The demo keeps what the README promises."""

from pathlib import Path

import pytest

from sanitize.jobs import demo, verify


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
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
