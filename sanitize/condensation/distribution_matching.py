"""Distribution matching (Zhao & Bilen, 2021), and the robust RDM-DC (Zheng & Li, Algorithm 3).

M images s_j a class are learned from noise. Each iteration draws a new random network as the feature extractor r and,
for each class, one random change A of real and condensed images, and minimises
    loss = sum over classes of || mean_j r(A s_j) - mu ||^2,    mu: aggregate of r(A x_i), x_i real images of the class
With the mean as mu, this is DM (Eq. 2); with the calibrated mean, RDM-DC. The images start as noise, because real
images as a start would carry poison over.

Shapes: K classes, N real and M condensed images of a class, C H W image, D features.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat
from torch import Tensor

from sanitize.compute import Compute
from sanitize.condensation.aggregate import AggregateConfig, aggregate
from sanitize.condensation.pool import Pool
from sanitize.errors import NumericsError
from sanitize.models.config import ModelConfig
from sanitize.models.instance_convnet import InstanceConvNet, InstanceConvNetConfig
from sanitize.siamese import Change, SiameseConfig
from sanitize.snapshots import Snapshots, restore_optimizer

# Images in one pass of the extractor. On a CPU its activations must fit into the cache: all classes at once take 1.5 to
# 2 x as long. On a GPU large passes are faster.
_AT_ONCE = {"cpu": 32, "cuda": 4096}
_HISTORY_EVERY = 50  # iterations
_IN_A_FRAME = 10  # classes, and images of each: frames are held in memory until the end


class MatchingConfig(BaseModel):
    """The condensed images and their optimisation.

    Attributes:
        images_per_class: M.
        iterations: steps of SGD.
        learning_rate, momentum: settings of SGD on pixels in normalised units. The mean over M divides gradients by M.
        batch_size: N, real images of each class in an iteration.
        architecture: network of the random feature extractors.
        augment: random changes shared by real and condensed images.
        aggregate: aggregation of the representations of real images.
        mean, std: normalisation of each channel on the scale [0, 1].
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    images_per_class: int = Field(default=10, ge=1)
    iterations: int = Field(default=20_000, ge=1)
    learning_rate: float = Field(default=1.0, gt=0)
    momentum: float = Field(default=0.5, ge=0, lt=1)
    batch_size: int = Field(default=256, ge=2)
    architecture: InstanceConvNetConfig = InstanceConvNetConfig()
    augment: SiameseConfig = SiameseConfig()
    aggregate: AggregateConfig = AggregateConfig()
    mean: tuple[float, ...] = (0.5,)
    std: tuple[PositiveFloat, ...] = (0.25,)


class Condensed(NamedTuple):
    """Result of `condense`.

    Attributes:
        images_KMCHW: in normalised units, float32, on the CPU.
        history: rows of iteration and loss, averaged since the last row.
        frames: first ten images of the first ten classes, uint8, by iteration: at the start, after each quarter of the
            iterations, and at the end.
    """

    images_KMCHW: Tensor
    history: list[dict[str, float]]
    frames: dict[int, Tensor]


def condense(
    config: MatchingConfig,
    pool: Pool,
    compute: Compute,
    snapshots: Snapshots | None = None,
    on_step: Callable[[int], None] = lambda _n: None,
    on_row: Callable[[dict[str, float]], None] = lambda _row: None,
) -> Condensed:
    """Learn condensed images of a pool.

    Args:
        config: number of images and optimisation.
        pool: real images, copied to the device.
        compute: device, precision, seed.
        snapshots: file for the state of the optimisation, which resumes from it, on a CPU to the same bits.
        on_step: called with the number of new iterations.
        on_row: called with each row of the history.

    Raises:
        NumericsError: the loss is not finite; checked every 50 iterations, to avoid waiting for the device.
    """
    learning = _Learning(config, pool, compute)
    if snapshots is not None and (state := snapshots.load()) is not None:
        learning.restore(state)
        on_step(learning.iteration)
    quarters = {config.iterations * i // 4 for i in range(5)}
    while learning.iteration < config.iterations:
        if learning.iteration in quarters:
            learning.keep_frame()
        learning.step()
        on_step(1)
        if learning.iteration % _HISTORY_EVERY == 0 or learning.iteration == config.iterations:
            on_row(learning.end_row())
        if snapshots is not None and learning.iteration % snapshots.every == 0:
            snapshots.save(learning.snapshot())
    learning.keep_frame()
    return Condensed(learning.images_KMCHW.detach().float().cpu().contiguous(), learning.history, learning.frames)


def to_pixels(images_XCHW: Tensor, config: MatchingConfig) -> Tensor:
    """uint8 images, clipped: condensed images may be darker than black or brighter than white."""
    mean_C11, std_C11 = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
    return ((images_XCHW * std_C11 + mean_C11) * 255).round().clamp(0, 255).to(torch.uint8)


class _Learning:
    """The state of the optimisation; random draws depend on the number of the iteration alone."""

    def __init__(self, config: MatchingConfig, pool: Pool, compute: Compute) -> None:
        device = compute.torch_device
        n_classes, (channels, height, width) = len(pool.count_K), pool.images_NCHW.shape[1:]
        shape = (channels, height, width)
        self.config, self.compute, self.pool = config, compute, pool
        self.real_NCHW = pool.images_NCHW.to(device)
        self.input = ModelConfig(n_classes=n_classes, image_shape=shape, mean=config.mean, std=config.std)
        self.extractor = InstanceConvNet(config.architecture, n_classes, shape).requires_grad_(False)
        self.extractor.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        start = torch.randn(
            n_classes, config.images_per_class, *shape, generator=compute.generator("condense", "start")
        )
        self.images_KMCHW = start.to(device).requires_grad_()
        self.optimizer = torch.optim.SGD([self.images_KMCHW], config.learning_rate, config.momentum)
        self.iteration = 0
        self.loss_sum = torch.zeros((), device=device)
        self.history: list[dict[str, float]] = []
        self.frames: dict[int, Tensor] = {}

    def step(self) -> None:
        """One iteration: gradients are computed for groups of classes and added up for one step of SGD."""
        config, device = self.config, self.compute.torch_device
        draws = self.compute.generator("condense", "draws", self.iteration)
        weights = self.compute.generator("condense", "extractor", self.iteration, device=device)
        self.extractor.redraw(weights)
        rows_KN = self.pool.draw(config.batch_size, draws).to(device)
        change = config.augment.draw(len(rows_KN), self.input.image_shape[1:], draws).to(device)
        self.optimizer.zero_grad(set_to_none=True)
        at_once = max(1, _AT_ONCE[device.type] // config.batch_size)
        for first in range(0, len(rows_KN), at_once):
            group = slice(first, first + at_once)
            target_KD = self._targets(rows_KN[group], change.of(group), draws)
            loss = self._loss(self.images_KMCHW[group], change.of(group), target_KD)
            loss.backward()
            self.loss_sum += loss.detach()
        self.optimizer.step()
        self.iteration += 1

    @torch.no_grad()
    def _targets(self, rows_KN: Tensor, change: Change, draws: torch.Generator) -> Tensor:
        """Aggregated representations of the real images of each class, (K, D)."""
        x_KNCHW = self.input.normalise(self.real_NCHW[rows_KN].flatten(0, 1)).unflatten(0, rows_KN.shape)
        x_XCHW = change(x_KNCHW).flatten(0, 1)
        r_XD = torch.cat([self._features(part) for part in x_XCHW.split(_AT_ONCE[x_XCHW.device.type])])
        return aggregate(r_XD.unflatten(0, rows_KN.shape), self.config.aggregate, draws)

    def _loss(self, images_KMCHW: Tensor, change: Change, target_KD: Tensor) -> Tensor:
        r_KMD = self._features(change(images_KMCHW).flatten(0, 1)).unflatten(0, images_KMCHW.shape[:2])
        return (r_KMD.mean(1) - target_KD).square().sum()

    def _features(self, x_BCHW: Tensor) -> Tensor:
        with self.compute.autocast():
            return self.extractor.features(x_BCHW.contiguous(memory_format=torch.channels_last)).float()

    def end_row(self) -> dict[str, float]:
        """Add a row with the mean loss since the last row to the history."""
        before = int(self.history[-1]["iteration"]) if self.history else 0
        loss = float(self.loss_sum) / (self.iteration - before)
        if not math.isfinite(loss):
            raise NumericsError(
                f"matching loss is not finite by iteration {self.iteration}; lower "
                f"learning_rate={self.config.learning_rate}"
            )
        self.loss_sum.zero_()
        self.history.append({"iteration": self.iteration, "loss": loss})
        return self.history[-1]

    def keep_frame(self) -> None:
        """Add the current images to the frames."""
        shown_KMCHW = self.images_KMCHW.detach()[:_IN_A_FRAME, :_IN_A_FRAME]
        self.frames[self.iteration] = to_pixels(shown_KMCHW.float().cpu(), self.config)

    def snapshot(self) -> dict[str, Any]:
        """The state of the optimisation."""
        return {
            "images": self.images_KMCHW,
            "loss_sum": self.loss_sum,
            "optimizer": self.optimizer.state_dict(),
            "iteration": self.iteration,
            "history": self.history,
            "frames": self.frames,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what `snapshot` returned."""
        with torch.no_grad():
            self.images_KMCHW.copy_(state["images"])
        self.loss_sum.copy_(state["loss_sum"])
        restore_optimizer(self.optimizer, state["optimizer"])
        self.iteration, self.history = state["iteration"], state["history"]
        self.frames = {int(iteration): frame for iteration, frame in state["frames"].items()}
