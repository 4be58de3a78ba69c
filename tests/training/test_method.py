"""Whole methods on a small problem whose truth is known: a Gaussian blob a class, or a linear map."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.data.shuffle import Resident
from sanitize.errors import ConfigError, NumericsError
from sanitize.loop import OptimConfig, TrainBatch, cross_entropy, predict, train
from sanitize.training import Drops, MethodConfig, Pair, SelectBatchConfig, robust_objective, zoo
from sanitize.training.adversary import AdversaryConfig
from sanitize.training.labels import LabelsConfig

OPTIM = OptimConfig(optimizer="adam", learning_rate=3e-3, schedule="constant", epochs=6, batch_size=50, weight_decay=0)
CLASSIFY = zoo(tau=0.3, warmup_epochs=2)
REGRESS = zoo(tau=0.3, warmup_epochs=2, loss="squared")


def identity(x_B: Tensor) -> Tensor:
    return x_B


def blobs(n: int = 600, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y_N = torch.randint(3, (n,), generator=generator)
    return 3 * torch.eye(8)[y_N] + torch.randn(n, 8, generator=generator), y_N


def network(n_out: int, config: MethodConfig) -> nn.Module:
    torch.manual_seed(1)
    made = [nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, n_out)) for _ in range(config.n_networks)]
    return made[0] if len(made) == 1 else Pair(*made)


def fit(  # type: ignore[no-untyped-def]
    config: MethodConfig, x_ND: Tensor, y_N: Tensor, compute: Compute, drops: Drops | None = None, optim=OPTIM
):
    model = network(3 if y_N.dim() == 1 else y_N.shape[1], config)
    data = Resident(x_ND, y_N, optim.batch_size, partial(compute.generator, "order"))
    objective = robust_objective(config, compute, drops=drops)
    return model, train(model, data.epoch, data.steps_per_epoch, optim, compute, identity, objective=objective)


@pytest.mark.parametrize("name", [name for name in CLASSIFY if name != "min_sgd"])
def test_every_classifier_of_the_zoo_learns_clean_labels(name: str, compute: Compute) -> None:
    x_ND, y_N = blobs()
    least = 0.8 if name == "decouple" else 0.93  # it learns from disagreement alone
    model, history = fit(CLASSIFY[name], x_ND, y_N, compute)
    assert (predict(model, x_ND, identity, compute).argmax(1) == y_N).float().mean() > least
    assert set(history[0]) == {"epoch", "loss", "dropped", "accuracy"}


def test_min_sgd_learns_one_class_and_nothing_else(compute: Compute) -> None:
    """As in the chapter (Table 4.2: 13 % on CIFAR-10): the sample with the smallest loss is of the class it knows."""
    x_ND, y_N = blobs()
    model, history = fit(CLASSIFY["min_sgd"], x_ND, y_N, compute)
    assert history[-1]["loss"] < 0.01
    assert len(predict(model, x_ND, identity, compute).argmax(1).unique()) == 1


@pytest.mark.parametrize("name", REGRESS)
def test_every_regressor_of_the_zoo_learns_clean_targets(name: str, compute: Compute) -> None:
    x_ND, _ = blobs()
    y_NQ = x_ND @ torch.randn(8, 2, generator=torch.Generator().manual_seed(5)) / 3
    model, history = fit(REGRESS[name], x_ND, y_NQ, compute, optim=OPTIM.model_copy(update={"epochs": 20}))
    residual = (predict(model, x_ND, identity, compute) - y_NQ).square().sum() / (y_NQ - y_NQ.mean(0)).square().sum()
    assert residual < (0.9 if name == "min_sgd" else 0.1)  # one sample in fifty
    assert "accuracy" not in history[0]


def test_the_dropped_share_is_that_of_the_schedule(compute: Compute) -> None:
    _, history = fit(CLASSIFY["prl_l"], *blobs(), compute)
    assert [row["dropped"] for row in history] == pytest.approx([0, 0.16, 0.3, 0.3, 0.3, 0.3])  # 7.5 of 50 rounds to 8


@pytest.mark.parametrize("name", ["prl_l", "spl", "co_prl_l", "prl_g"])
def test_wrong_labels_are_those_that_are_dropped(name: str, compute: Compute) -> None:
    x_ND, y_N = blobs()
    wrong_N = torch.rand(600, generator=torch.Generator().manual_seed(2)) < 0.2
    given_N = torch.where(wrong_N, (y_N + 1) % 3, y_N)
    drops = Drops(600, compute.torch_device)
    fit(CLASSIFY[name], x_ND, given_N, compute, drops)
    fraction_N = drops.fraction()
    assert fraction_N[wrong_N].mean() > 0.9
    assert fraction_N[~wrong_N].mean() < 0.25
    per_network = OPTIM.epochs - 2  # the first two epochs are warm-up
    assert (drops.seen_N == per_network * CLASSIFY[name].n_networks).all()


def test_without_ingredients_it_is_plain_cross_entropy(compute: Compute) -> None:
    x_ND, y_N = blobs()
    gradients = []
    for objective in (cross_entropy(compute), robust_objective(MethodConfig(), compute)):
        model = network(3, MethodConfig())
        objective(model, TrainBatch(x_ND, y_N), 0).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_selection_averages_over_what_it_keeps(compute: Compute) -> None:
    x_ND, y_N = blobs(50)
    config = MethodConfig(select_batch=SelectBatchConfig(kind="spl", tau=0.4, warmup_epochs=1))
    model = network(3, config)
    losses_B = nn.functional.cross_entropy(model(x_ND), y_N, reduction="none")
    loss = robust_objective(config, compute)(model, TrainBatch(x_ND, y_N), 5).loss
    torch.testing.assert_close(loss, losses_B.sort().values[:30].mean())


def test_co_updates_each_network_with_what_the_other_picked(compute: Compute) -> None:
    x_ND, y_N = blobs(50)
    config = zoo(tau=0.4, warmup_epochs=1)["co_teaching"]
    pair = network(3, config)
    f, g = (nn.functional.cross_entropy(one(x_ND), y_N, reduction="none") for one in pair.networks)
    wanted = f[g.argsort()[:30]].mean() + g[f.argsort()[:30]].mean()
    torch.testing.assert_close(robust_objective(config, compute)(pair, TrainBatch(x_ND, y_N), 5).loss, wanted)


def test_decouple_with_networks_that_agree_changes_nothing(compute: Compute) -> None:
    x_ND, y_N = blobs(50)
    pair = network(3, CLASSIFY["decouple"])
    pair.networks[1].load_state_dict(pair.networks[0].state_dict())
    step = robust_objective(CLASSIFY["decouple"], compute)(pair, TrainBatch(x_ND, y_N), 0)
    step.loss.backward()
    assert step.loss == 0
    assert all((p.grad == 0).all() for p in pair.parameters())
    assert step.sums["dropped"] == 50


def test_bootstrap_mixes_the_given_label_with_the_predicted_one() -> None:
    targets = LabelsConfig(kind="bootstrap", alpha=0.7)(
        torch.tensor([[0.0, 5.0, 1.0], [4.0, 0, 0]]), torch.tensor([2, 0])
    )
    torch.testing.assert_close(targets, torch.tensor([[0, 0.3, 0.7], [1.0, 0, 0]]))
    given = torch.tensor([2, 0])
    assert LabelsConfig()(torch.zeros(2, 3), given) is given


def test_an_adversary_costs_the_trusted_and_leaves_the_dropped(compute: Compute) -> None:
    """On x + c the loss of what is kept is larger than on x, and the same samples are kept."""
    x_ND, y_N = blobs(50)
    filtered = MethodConfig(select_batch=SelectBatchConfig(kind="prl_l", tau=0.4, warmup_epochs=1))
    attacked = filtered.model_copy(update={"adversary": AdversaryConfig(kind="at", tau_x=0.1)})
    model = network(3, filtered)
    batch = TrainBatch(x_ND, y_N)
    before, after = (robust_objective(config, compute)(model, batch, 5) for config in (filtered, attacked))
    assert after.loss > before.loss
    assert after.sums["dropped"] == before.sums["dropped"] == 20
    model.zero_grad()
    robust_objective(attacked, compute)(model, batch, 5)
    assert all(p.grad is None for p in model.parameters()), "the inner step must not touch the weights' gradients"
    assert not batch.x_B.requires_grad


def test_gradients_of_samples_are_shortened_one_by_one(compute: Compute) -> None:
    x_ND, _ = blobs(20)
    y_NQ = 10 * torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    config = MethodConfig(loss="squared", max_sample_grad_norm=5.0)
    model = network(2, config)
    robust_objective(config, compute)(model, TrainBatch(x_ND, y_NQ), 0).loss.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    total = torch.zeros_like(found)
    for x_D, y_Q in zip(x_ND, y_NQ, strict=True):
        model.zero_grad()
        (0.5 * (model(x_D[None])[0] - y_Q).square().sum()).backward()
        one = torch.cat([p.grad.flatten() for p in model.parameters()])
        total += one * (5.0 / one.norm()).clamp(max=1)
    torch.testing.assert_close(found, total / 20, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["co_prl_l", "prl_at", "prl_g"])
def test_the_same_seed_gives_the_same_weights_to_the_bit(name: str, compute: Compute) -> None:
    compute.activate()
    first, second = (fit(CLASSIFY[name], *blobs(), compute)[0].state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize("ingredients", [{"collaborate": {"kind": "decouple"}}, {"labels": {"kind": "bootstrap"}}])
def test_what_only_classifies_is_refused_for_regression(ingredients: dict) -> None:
    with pytest.raises(ConfigError, match="regression"):
        MethodConfig(loss="squared", **ingredients)


def test_a_loss_that_is_not_finite_names_the_step_and_its_samples(compute: Compute) -> None:
    x_ND, y_N = blobs(100)
    x_ND[17] = float("inf")
    with pytest.raises(NumericsError, match=r"epoch 1, step [12] \(samples .*\)") as raised:
        fit(MethodConfig(), x_ND, y_N, compute)
    order_N = torch.randperm(100, generator=compute.generator("order", 0))
    step = int((order_N == 17).nonzero()) // 50
    wanted = ", ".join(map(str, order_N.split(50)[step].tolist()[:8]))
    assert f"step {step + 1} (samples {wanted}, ...)" in str(raised.value)
