"""The demo keeps what the README promises."""

from pathlib import Path

import pytest

from sanitize.embed import EmbedderConfig
from sanitize.jobs.demo import demo
from sanitize.loop import OptimConfig
from sanitize.models.convnet import ConvNetConfig


def test_demo_goes_from_digits_to_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With networks that learn next to nothing: the numbers are counts of the same samples."""
    optim = OptimConfig(epochs=1, batch_size=64)
    quick = EmbedderConfig(architecture=ConvNetConfig(widths=(8,)), optim=optim, min_steps=1, max_steps=1)
    monkeypatch.setitem(demo.__globals__, "MODEL", quick)
    result = demo(tmp_path)
    assert result["poisoned"] == round(0.02 * 1797) == result["found"] + result["missed"]
    assert result["clean_samples"] == 1797 - result["poisoned"]
    assert result["recall"] == result["found"] / result["poisoned"]
    assert {"acc_before", "asr_before", "acc_after", "asr_after"} <= result.keys()
    assert "<html" in Path(result["report"]).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_demo_finds_the_backdoor_and_closes_it(tmp_path: Path, seed: int) -> None:
    result = demo(tmp_path, seed)
    assert result["recall"] >= 0.9
    assert result["clean_lost_fraction"] <= 0.02
    assert result["asr_before"] >= 0.9
    assert result["asr_after"] <= 0.1
    assert result["acc_after"] >= result["acc_before"] - 0.02
    assert Path(result["report"]).exists()
