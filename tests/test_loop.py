from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.errors import NumericsError
from sanitize.loop import OptimConfig, predict, train
from sanitize.models.config import ModelConfig
from sanitize.models.convnet import ConvNet, ConvNetConfig


def toy(n: int = 256) -> tuple[Tensor, Tensor]:
    """Bright images are class 1, dark ones class 0."""
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.arange(n) % 2
    images_NCHW = torch.randint(0, 100, (n, 1, 4, 4), generator=generator) + 150 * labels_N[:, None, None, None]
    return images_NCHW.to(torch.uint8), labels_N


def to_float(images_BCHW: Tensor) -> Tensor:
    return images_BCHW.float() / 255 - 0.5


def run(config: OptimConfig, compute: Compute, transform=to_float, n: int = 256):  # type: ignore[no-untyped-def]
    images, labels = toy(n)
    torch.manual_seed(0)
    model = ConvNet(ConvNetConfig(widths=(4,)), 2, 1)
    steps: list[int] = []

    def epoch(_number: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(images.split(config.batch_size), labels.split(config.batch_size), strict=True)

    history = train(model, epoch, -(-n // config.batch_size), config, compute, transform, steps.append)
    return model, history, steps


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_separable_problem_is_learned(compute: Compute, optimizer: str, max_grad_norm: float | None) -> None:
    config = OptimConfig(
        optimizer=optimizer,
        learning_rate=0.05,
        epochs=6,
        batch_size=32,
        max_grad_norm=max_grad_norm,  # type: ignore[arg-type]
    )
    model, history, steps = run(config, compute)
    images, labels = toy()
    assert (predict(model, images, to_float, compute).argmax(1) == labels).float().mean() == 1
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["loss"] < 0.1 < history[0]["loss"]
    assert history[-1]["accuracy"] > 0.99
    assert sum(steps) == 6 * 256


def test_the_same_seed_gives_the_same_weights_to_the_bit(compute: Compute) -> None:
    compute.activate()
    first, second = (run(OptimConfig(epochs=2, batch_size=32), compute)[0].state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_loss_that_is_not_finite_stops_the_training_and_says_what_to_change(compute: Compute) -> None:
    def poisoned(images_BCHW: Tensor) -> Tensor:
        return to_float(images_BCHW) * float("nan")

    with pytest.raises(NumericsError, match=r"epoch 1, step 1; lower learning_rate=0.003 or set max_grad_norm"):
        run(OptimConfig(epochs=3, batch_size=32), compute, poisoned)


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("n_batches", [1, 2, 4])
def test_any_number_of_steps_can_be_trained(compute: Compute, epochs: int, n_batches: int) -> None:
    """The one-cycle schedule divides by the length of its first phase."""
    _, history, _ = run(OptimConfig(epochs=epochs, batch_size=16), compute, n=16 * n_batches)
    assert len(history) == epochs


def test_the_means_of_an_epoch_weigh_samples_and_not_batches(compute: Compute) -> None:
    """With a learning rate near zero, in eval-like conditions, the reported accuracy is that of all samples."""
    images, labels = toy(100)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    wanted = (predict(model, images, to_float, compute).argmax(1) == labels).float().mean()

    def epoch(_number: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield images[:90], labels[:90]
        yield images[90:], labels[90:]

    (row,) = train(model, epoch, 2, OptimConfig(epochs=1, learning_rate=1e-12, weight_decay=0), compute, to_float)
    assert row["accuracy"] == pytest.approx(float(wanted), abs=1e-6)


def test_predict_does_not_depend_on_the_batch_size_and_uses_eval_mode(compute: Compute) -> None:
    images, _ = toy(50)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 2)).train()
    whole = predict(model, images, to_float, compute)
    assert whole.shape == (50, 2)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(predict(model, images, to_float, compute, batch_size=7), whole)
    with torch.inference_mode():
        torch.testing.assert_close(whole, model.eval()(to_float(images)))


def test_bfloat16_learns_too() -> None:
    compute = Compute(device="cpu", precision="bfloat16")
    _, history, _ = run(OptimConfig(learning_rate=0.05, epochs=4, batch_size=32), compute)
    assert history[-1]["accuracy"] > 0.95


@pytest.mark.parametrize(
    "changed",
    [{"schedule": "cosine"}, {"schedule": "constant"}, {"optimizer": "adam"}, {"noise_sd": 0.05}, {"ema_decay": 0.8}],
    ids=lambda changed: next(iter(changed)),
)
def test_every_option_learns_and_changes_the_weights(compute: Compute, changed: dict) -> None:
    plain = OptimConfig(learning_rate=0.05, epochs=6, batch_size=32)
    model, _, _ = run(plain.model_copy(update=changed), compute)
    images, labels = toy()
    assert (predict(model, images, to_float, compute).argmax(1) == labels).float().mean() > 0.97
    same, _, _ = run(plain, compute)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


def test_the_average_is_the_recursion_over_the_steps(compute: Compute) -> None:
    """Two runs, without and with: the average follows from the weights after each step."""
    seen: list[list[Tensor]] = []
    config = OptimConfig(epochs=3, batch_size=256, schedule="constant")  # one step an epoch

    def weights(model: nn.Module) -> dict[str, float]:
        seen.append([p.detach().clone() for p in model.parameters()])
        return {}

    images, labels = toy()

    def fit(config: OptimConfig, measure) -> nn.Module:  # type: ignore[no-untyped-def]
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        train(model, lambda _number: iter([(images, labels)]), 1, config, compute, to_float, measure=measure)
        return model

    fit(config, weights)
    wanted = seen[0]
    for after in seen[1:]:
        wanted = [0.6 * average + 0.4 * value for average, value in zip(wanted, after, strict=True)]
    found = fit(config.model_copy(update={"ema_decay": 0.6}), lambda _model: {})
    for parameter, value in zip(found.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


def test_what_is_measured_after_an_epoch_joins_its_row_and_training_goes_on_in_training_mode(compute: Compute) -> None:
    images, labels = toy()
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 2))
    modes: list[bool] = []

    def measure(network: nn.Module) -> dict[str, float]:
        return {"test": (predict(network, images, to_float, compute).argmax(1) == labels).float().mean().item()}

    history = train(
        model,
        lambda _number: iter([(images, labels)]),
        1,
        OptimConfig(epochs=3),
        compute,
        to_float,
        on_step=lambda _n: modes.append(model.training),
        measure=measure,
    )
    assert [row["epoch"] for row in history if 0 <= row["test"] <= 1] == [1, 2, 3]
    assert modes == [True] * 3


def test_noise_is_gaussian_in_its_unit_and_new_in_every_step(compute: Compute) -> None:
    """As randomized smoothing wants it: sigma in pixels on [0, 1], whatever each channel is normalised with."""
    described = ModelConfig(n_classes=2, image_shape=(2, 8, 8), mean=(0.2, 0.7), std=(0.1, 0.4))
    images = torch.randint(0, 256, (50, 2, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []

    class Spy(nn.Linear):
        def forward(self, x_BCHW: Tensor) -> Tensor:
            seen.append(x_BCHW.detach())
            return super().forward(x_BCHW.flatten(1))

    config = OptimConfig(epochs=4, batch_size=50, noise_sd=0.3)
    batches = lambda _epoch: iter([(images, torch.arange(50) % 2)])  # noqa: E731
    train(Spy(128, 2), batches, 1, config, compute, described.normalise, unit=described.pixel_unit)
    noise = torch.stack([(x - described.normalise(images)) / described.pixel_unit for x in seen])
    torch.testing.assert_close(noise.std((0, 1, 3, 4)), torch.tensor([0.3, 0.3]), rtol=0.03, atol=0)
    torch.testing.assert_close(noise.mean((0, 1, 3, 4)), torch.zeros(2), rtol=0, atol=0.01)
    assert len(noise.flatten(1).unique(dim=0)) == 4


def test_a_network_that_has_predicted_can_still_be_trained(compute: Compute) -> None:
    model = ConvNet(ConvNetConfig(widths=(4, 4)), 2, 3)  # its weights move when they become channels_last
    predict(model, torch.zeros(4, 3, 4, 4, dtype=torch.uint8), to_float, compute)
    model(torch.zeros(4, 3, 4, 4)).sum().backward()
    assert model.head.weight.grad is not None
