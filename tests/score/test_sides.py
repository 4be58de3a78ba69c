"""The poisoned side of a split: by the label check where it is sure and the split is even, else by shape."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sanitize.compute import Compute
from sanitize.data.tables import EmbeddingBatch
from sanitize.score.neighbours import NeighboursConfig
from sanitize.score.toxic_direction import ToxicDirectionConfig, fit_class, log_odds
from sanitize.score.toxic_direction.sides import Side, at_odds, suspicious_side

CONFIG = ToxicDirectionConfig(n_starts=32, evidence=None)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def halves(n: int, n_diverse: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two groups 40 apart; the first varies like several classes, which its shape gives away. Returns rows, mask."""
    x_ND = torch.randn(n, 16, generator=seeded(seed), dtype=torch.float64)
    diverse_N = torch.arange(n) < n_diverse
    centres_KD = 3 * torch.randn(4, 16, generator=seeded(seed + 1), dtype=torch.float64)
    x_ND[diverse_N] += centres_KD[torch.arange(n_diverse) % 4]
    x_ND[:, 0] = 40.0 * diverse_N + 0.5 * x_ND[:, 0]
    return x_ND, diverse_N


@pytest.mark.parametrize("poison_first", [True, False], ids=["as the shape says", "against the shape"])
@pytest.mark.parametrize("flip", [False, True], ids=["poison first", "poison last"])
def test_labels_decide_an_even_split(poison_first: bool, flip: bool) -> None:
    x_ND, diverse_N = halves(600, 290)
    poison_N = diverse_N == poison_first
    noise_N = 0.1 * torch.rand(600, generator=seeded(3), dtype=torch.float64)
    disagreement_N = torch.where(poison_N, 0.9 - noise_N, 0.1 + noise_N)
    if flip:
        x_ND, poison_N, disagreement_N = x_ND.flip(0), poison_N.flip(0), disagreement_N.flip(0)
    split = fit_class(x_ND, CONFIG, seeded(0), disagreement_N)
    assert ((log_odds(split, x_ND) > 0) == poison_N).double().mean() > 0.98
    assert split.sides.by_labels
    assert split.sides.suspicious.disagreement == pytest.approx(0.85, abs=0.02)
    assert split.sides.rest.disagreement == pytest.approx(0.15, abs=0.02)
    assert split.sides.suspicious.n + split.sides.rest.n == 600
    assert split.separation > 4.5


@pytest.mark.parametrize(
    ("poison", "clean"),
    [(0.1, 0.3), (0.1, 0.1), (0.9, 0.9), (0.55, 0.1), (math.nan, math.nan), (0.9, math.nan)],
    ids=["each other's neighbours", "true labels", "a hard class", "not sure", "not measured", "one side measured"],
)
def test_else_the_shape_decides_and_says_so(poison: float, clean: float) -> None:
    x_ND, poison_N = halves(400, 190)
    split = fit_class(x_ND, CONFIG, seeded(0), torch.where(poison_N, poison, clean))
    assert ((log_odds(split, x_ND) > 0) == poison_N).double().mean() > 0.98
    assert not split.sides.by_labels


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_the_shape_of_an_even_split_has_no_unit(scale: float) -> None:
    """A strong trigger leaves little else to vary."""
    x_ND, poison_N = halves(600, 290)
    x_ND[poison_N, 1:] *= scale
    unknown_N = torch.full((600,), math.nan)
    assert suspicious_side(x_ND, poison_N, unknown_N)[0]
    assert not suspicious_side(x_ND, ~poison_N, unknown_N)[0]


def test_labels_do_not_turn_an_uneven_split_around() -> None:
    """A small group is suspicious, whatever the label check says of the rest."""
    z_ND, small_N = halves(1000, 100)
    for disagreement_N in (torch.where(small_N, 0.1, 0.9), torch.full((1000,), math.nan)):
        is_upper, sides = suspicious_side(z_ND, small_N, disagreement_N)
        assert is_upper
        assert not sides.by_labels
    assert suspicious_side(z_ND, ~small_N, disagreement_N)[0] is False


def test_few_samples_are_never_sure() -> None:
    assert not at_odds(Side(1.0, 9), Side(0.0, 9))
    assert at_odds(Side(1.0, 10), Side(0.0, 10))
    assert not at_odds(Side(0.6, 200), Side(0.0, 200))
    assert at_odds(Side(0.6, 300), Side(0.0, 300))
    assert not at_odds(Side(0.0, 300), Side(0.6, 300))


def test_the_scorer_uses_its_label_check_and_reports_it(compute: Compute) -> None:
    """Class 0 has two groups of one shape: its own images, and some of each other class that were given its label."""
    generator = seeded(5)
    true_N = torch.arange(1200) % 6
    poison_N = (true_N != 0) & (torch.arange(1200) // 6 % 6 == 0)
    labels_N = torch.where(poison_N, 0, true_N)
    pixels_ND = 3 * torch.randn(6, 8, generator=generator)[true_N] + torch.randn(1200, 8, generator=generator)
    pooled_ND = torch.randn(1200, 6, generator=generator)
    pooled_ND[poison_N, 0] += 30

    def passes(name: str | Sequence[str]) -> list[EmbeddingBatch]:
        z_ND = {"pooled": pooled_ND, "pixels": pixels_ND}[str(name)]
        keys = [f"{i:04d}" for i in range(1200)]
        whole = EmbeddingBatch("s", torch.arange(1200), keys, labels_N, z_ND)
        return [whole.take(rows.tolist()) for rows in torch.arange(1200).split(128)]

    scorer = CONFIG.build()
    scorer.fit(passes, compute)
    statistics = scorer.statistics[0]
    assert statistics["side_by_labels"]
    assert statistics["disagreement"] > 0.8
    assert statistics["disagreement_of_rest"] < 0.2
    assert statistics["minority_fraction"] == pytest.approx(float(poison_N[labels_N == 0].double().mean()), abs=0.01)
    flagged_N = torch.cat([scorer.score(batch) for batch in passes("pooled")]) > 0
    assert (flagged_N == poison_N)[labels_N == 0].double().mean() > 0.98
    again = CONFIG.build()
    again.load_state(scorer.state_dict(), scorer.statistics)
    assert {name: t.tolist() for name, t in again.state_dict().items()} == {
        name: t.tolist() for name, t in scorer.state_dict().items()
    }
    label_check = NeighboursConfig(embedding="pixels", windows=1)
    alone = ToxicDirectionConfig(n_starts=32, evidence=None, label_check=label_check).build()
    alone.fit(lambda name: passes(name)[::-1], compute)
    assert alone.statistics[0]["side_by_labels"]
