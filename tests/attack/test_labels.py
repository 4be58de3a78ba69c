import pytest
import torch

from sanitize.attack.labels import CORRUPTIONS, LabelNoiseConfig, corrupt_targets, flip_labels, mixture


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(400, 30, generator=generator)
    return x_ND, x_ND[:, :6] ** 3 + 1, generator


@pytest.mark.parametrize("noise", ["symmetric", "pairflip"])
def test_exactly_the_rate_is_flipped_and_said_to_be(noise: str) -> None:
    labels_N = torch.arange(1000) % 10
    config = LabelNoiseConfig(rate=0.35, noise=noise)  # type: ignore[arg-type]
    given_N, wrong_N = flip_labels(config, labels_N, 10, torch.Generator().manual_seed(0))
    assert torch.equal(given_N != labels_N, wrong_N)
    assert wrong_N.sum() == 350
    shifts = ((given_N - labels_N) % 10)[wrong_N].unique().tolist()
    assert shifts == ([1] if noise == "pairflip" else list(range(1, 10)))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_exactly_the_rate_is_corrupted_and_the_rest_is_untouched(name: str) -> None:
    x_ND, y_NQ, _ = problem()
    given_NQ, wrong_N = corrupt_targets(CORRUPTIONS[name], 0.3, x_ND, y_NQ, torch.Generator().manual_seed(1))
    assert wrong_N.sum() == 120
    assert torch.equal((given_NQ != y_NQ).any(1), wrong_N)
    again_NQ, _ = corrupt_targets(CORRUPTIONS[name], 0.3, x_ND, y_NQ, torch.Generator().manual_seed(1))
    assert torch.equal(given_NQ, again_NQ)


def test_the_corruptions_are_what_their_names_say() -> None:
    x_ND, y_NQ, generator = problem()
    made = {name: corrupt(x_ND, y_NQ, generator) for name, corrupt in CORRUPTIONS.items()}
    found = torch.linalg.lstsq(x_ND, made["linadv"]).solution
    torch.testing.assert_close(x_ND @ found, made["linadv"], rtol=1e-3, atol=1e-3)
    assert made["linadv"].std() == pytest.approx(30**0.5, rel=0.2)
    assert torch.equal(made["signflip"], -y_NQ)
    assert made["uninoise"].aminmax().min > -5
    assert made["uninoise"].aminmax().max < 5
    assert made["uninoise"].std() == pytest.approx(10 / 12**0.5, rel=0.05)
    assert torch.equal(made["pairflip"].sort(1).values, y_NQ.sort(1).values)
    assert (made["pairflip"] != y_NQ).all()
    assert torch.equal(made["maximum"].unique(dim=0), y_NQ.max(0).values[None])


def test_a_mixture_draws_one_corruption_for_each_sample() -> None:
    x_ND, y_NQ, _ = problem()
    mixed_NQ = mixture(x_ND, y_NQ, torch.Generator().manual_seed(3))
    flipped_N, rolled_N = (mixed_NQ == -y_NQ).all(1), (mixed_NQ == y_NQ.roll(1, 1)).all(1)
    for share in (flipped_N.float().mean(), rolled_N.float().mean()):
        assert float(share) == pytest.approx(0.25, abs=0.07)
    assert not (flipped_N & rolled_N).any()
