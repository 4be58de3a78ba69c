"""Train many networks of one architecture side by side, independently: each on its own samples, with its own seed.

Shapes: M networks, B batch, V visits of an epoch, K classes, C H W image.
"""

from collections.abc import Iterator, Sequence
from threading import Lock

import torch
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.loop import Objective, OptimConfig, Step, TrainBatch, train
from sanitize.models.config import ModelConfig
from sanitize.models.stacked import Stacked
from sanitize.plural import counted
from sanitize.progress import track
from sanitize.snapshots import training

_NO_LABEL = -100  # ignored by cross_entropy
_INITIALISING = Lock()  # groups may be trained in threads, and layers draw weights from a global generator


def fit_networks(
    optim: OptimConfig,
    steps_per_epoch: int,
    model_config: ModelConfig,
    numbers: Sequence[int],
    samples: Sequence[tuple[Tensor, Tensor]],
    compute: Compute,
) -> tuple[Stacked, list[dict[str, float]]]:
    """Train networks side by side, each on its own samples.

    Args:
        optim: optimizer, schedule, epochs, and samples of one network in a step.
        steps_per_epoch: steps in an epoch.
        model_config: description of one network.
        numbers: numbers of the partitions.
        samples: for each network its images (n, C, H, W), uint8, and labels (n,); n may be 0.
        compute: device, precision, seed.

    Returns:
        The networks, and loss and accuracy of each epoch, averaged over the networks.
    """
    networks = stacked_networks(model_config, numbers, compute)
    data = PartitionBatches(samples, numbers, optim.batch_size, steps_per_epoch, compute)
    with (
        track(f"train {counted(len(numbers), 'partition')}", optim.epochs * data.samples_per_epoch) as advance,
        training(None),
    ):
        history = train(
            networks,
            data.epoch,
            steps_per_epoch,
            optim,
            compute,
            model_config.normalise,
            lambda n: advance(n * len(numbers)),
            side_by_side(compute),
            unit=model_config.pixel_unit,
        )
    return networks, history


def stacked_networks(model_config: ModelConfig, numbers: Sequence[int], compute: Compute) -> Stacked:
    """New networks for these partitions; each has the seed of its partition."""
    networks = []
    with _INITIALISING:
        for number in numbers:
            compute.seed_global("partition", number, "init")
            networks.append(model_config.build_one())
    return Stacked.of(networks)


class PartitionBatches:
    """Batches for networks trained side by side, each on its own samples.

    Args:
        samples: for each network its images (n, C, H, W) and labels (n,); n may be 0.
        numbers: numbers of the networks, for their random streams.
        batch_size: B, samples of one network in a step.
        steps_per_epoch: steps in an epoch; a network with fewer samples repeats them in another order.
        compute: device and seed.
    """

    def __init__(
        self,
        samples: Sequence[tuple[Tensor, Tensor]],
        numbers: Sequence[int],
        batch_size: int,
        steps_per_epoch: int,
        compute: Compute,
    ) -> None:
        image_shape = samples[0][0].shape[1:]
        # One more sample, without a label, for networks that have none.
        images = [images for images, _ in samples] + [torch.zeros(1, *image_shape, dtype=torch.uint8)]
        labels = [labels for _, labels in samples] + [torch.tensor([_NO_LABEL])]
        device = compute.torch_device
        self.images_NCHW, self.labels_N = torch.cat(images).to(device), torch.cat(labels).to(device)
        self.sizes = [len(labels) for _, labels in samples]
        self.numbers, self.compute = numbers, compute
        self.batch_size, self.steps_per_epoch = batch_size, steps_per_epoch

    @property
    def samples_per_epoch(self) -> int:
        """Samples of an epoch, over all networks."""
        return self.steps_per_epoch * self.batch_size * len(self.sizes)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, M, C, H, W), uint8, and labels (B, M); -100 for networks without samples."""
        rows_VM = torch.stack(self._rows(number), 1).to(self.images_NCHW.device)
        for rows_BM in rows_VM.split(self.batch_size):
            yield self.images_NCHW[rows_BM], self.labels_N[rows_BM]

    def _rows(self, epoch: int) -> list[Tensor]:
        """For each network the rows that it visits, (V,): random orders of its samples, one after another."""
        n_visits, start, rows = self.steps_per_epoch * self.batch_size, 0, []
        for number, size in zip(self.numbers, self.sizes, strict=True):
            generator = self.compute.generator("partition", number, "order", epoch)
            orders = [torch.randperm(size, generator=generator) for _ in range(-(-n_visits // size) if size else 0)]
            none_V = torch.full((n_visits,), len(self.labels_N) - 1)
            rows.append(torch.cat(orders)[:n_visits] + start if size else none_V)
            start += size
        return rows


def side_by_side(compute: Compute) -> Objective:
    """The sum over networks of their mean cross-entropy, so that each is trained independently."""

    def objective(model: nn.Module, batch: TrainBatch, _epoch: int) -> Step:
        with compute.autocast():
            logits_BMK = model(batch.x_B).float()
        logits_NK, labels_N = logits_BMK.flatten(0, 1), batch.y_B.flatten()
        loss = nn.functional.cross_entropy(logits_NK, labels_N, ignore_index=_NO_LABEL, reduction="sum")
        n_networks = batch.y_B.shape[1]
        correct = (logits_NK.argmax(1) == labels_N).sum()
        return Step(loss / len(batch.y_B), {"loss": loss.detach() / n_networks, "accuracy": correct / n_networks})

    return objective
