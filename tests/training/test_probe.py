"""A linear layer on a frozen encoder: nothing else moves, and its spectral norm keeps its bound."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.errors import ConfigError
from sanitize.loop import OptimConfig
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.convnet import ConvNetConfig
from sanitize.training import TrainConfig, train_robust, zoo
from sanitize.training.probe import Truncated

METHODS = zoo(tau=0.2, warmup_epochs=1)
CONFIG = TrainConfig(
    architecture=ConvNetConfig(widths=(8, 16)),
    optim=OptimConfig(epochs=4, batch_size=64, learning_rate=0.03),
    method=METHODS["prl_l"],
    lipschitz=1.0,
)


def changed(**update: object) -> TrainConfig:
    return TrainConfig.model_validate(CONFIG.model_dump() | update)


def norm_of_head(model: Checkpoint) -> float:
    return float(np.linalg.svd(model.model().head.weight.detach().numpy(), compute_uv=False)[0])


@given(k=st.integers(1, 5), d=st.integers(1, 7), norm=st.floats(0.1, 5), seed=st.integers(0, 2**16))
def test_singular_values_are_scaled_down_and_never_up(k: int, d: int, norm: float, seed: int) -> None:
    weight_KD = torch.randn(k, d, generator=torch.Generator().manual_seed(seed))
    before, after = (
        np.linalg.svd(matrix.numpy(), compute_uv=False) for matrix in (weight_KD, Truncated(norm)(weight_KD))
    )
    np.testing.assert_allclose(after, before * min(1, norm / before[0]), rtol=1e-4, atol=1e-5)


def test_a_matrix_of_zeros_has_a_gradient() -> None:
    weight_KD = torch.zeros(3, 4, requires_grad=True)
    Truncated(1.0)(weight_KD).sum().backward()
    torch.testing.assert_close(weight_KD.grad, torch.ones(3, 4))


def test_only_the_last_layer_learns_and_it_keeps_its_bound(
    tmp_path: Path, dataset: Dataset, checkpoint: Checkpoint, compute: Compute
) -> None:
    model = train_robust(CONFIG, dataset, str(tmp_path / "a"), compute, encoder=checkpoint)
    free = train_robust(changed(lipschitz=None), dataset, str(tmp_path / "b"), compute, encoder=checkpoint)
    encoder = checkpoint.model().state_dict()
    for trained in (model, free):
        state = trained.model().state_dict()
        assert state.keys() == encoder.keys()
        moved = {name for name, tensor in state.items() if not torch.equal(tensor, encoder[name])}
        assert moved == {"head.weight", "head.bias"}
        assert trained.history[-1]["accuracy"] > 0.5
        assert trained.has_drops
    assert norm_of_head(free) > 1.2
    assert norm_of_head(model) == pytest.approx(1, rel=1e-5)


def test_without_an_encoder_all_layers_learn_under_the_bound(
    tmp_path: Path, dataset: Dataset, compute: Compute
) -> None:
    model = train_robust(CONFIG, dataset, str(tmp_path / "a"), compute, test=dataset)
    assert norm_of_head(model) <= 1 + 1e-5
    assert model.history[-1]["accuracy"] > 0.5
    assert model.history[-1]["test_accuracy"] > 0.4
    compute.seed_global("train", "init")
    untrained = model.config.build().state_dict()
    assert not any(torch.equal(tensor, untrained[name]) for name, tensor in model.model().state_dict().items())


def test_the_same_seed_gives_the_same_digest(
    tmp_path: Path, dataset: Dataset, checkpoint: Checkpoint, compute: Compute
) -> None:
    first, second = (train_robust(CONFIG, dataset, str(tmp_path / n), compute, encoder=checkpoint) for n in "ab")
    assert first.digest == second.digest


@pytest.mark.parametrize("name", ["standard", "spl", "co_prl_l", "bootstrap", "prl_at"])
def test_any_selection_rule_trains_it(
    name: str, tmp_path: Path, dataset: Dataset, checkpoint: Checkpoint, compute: Compute
) -> None:
    optim = CONFIG.optim.model_copy(update={"ema_decay": 0.9})
    config = changed(method=METHODS[name], optim=optim)
    model = train_robust(config, dataset, str(tmp_path / "a"), compute, encoder=checkpoint)
    assert model.history[-1]["accuracy"] > 0.3  # chance is 0.1
    assert norm_of_head(model) <= 1 + 1e-5


def test_gradients_of_single_samples_do_not_mind_a_frozen_batch_norm(
    tmp_path: Path, dataset: Dataset, checkpoint: Checkpoint, compute: Compute
) -> None:
    config = changed(method=METHODS["prl_g"], lipschitz=None)
    model = train_robust(config, dataset, str(tmp_path / "a"), compute, encoder=checkpoint)
    assert not model.config.group_norm
    assert model.history[-1]["accuracy"] > 0.5


def test_what_does_not_go_together_is_refused(
    tmp_path: Path, dataset: Dataset, checkpoint: Checkpoint, compute: Compute
) -> None:
    with pytest.raises(ConfigError, match="lipschitz"):
        changed(method=METHODS["prl_g"])
    other = changed(architecture=ConvNetConfig(widths=(8, 8)), std=(0.5,))
    with pytest.raises(ConfigError, match="differ in architecture, std"):
        train_robust(other, dataset, str(tmp_path / "a"), compute, encoder=checkpoint)
