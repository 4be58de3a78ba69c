from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.errors import NumericsError
from sanitize.loop import OptimConfig, predict, train
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

    def epoch() -> Iterator[tuple[Tensor, Tensor]]:
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

    with pytest.raises(NumericsError, match=r"epoch 1; lower learning_rate=0.003 or set max_grad_norm"):
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

    def epoch() -> Iterator[tuple[Tensor, Tensor]]:
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
