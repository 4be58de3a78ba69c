"""Train a new network on a condensed set alone, to measure the set.

A thousand epochs on ten images overfit. The epoch is chosen by real images that were held out of the condensing, never
by the test images. N images, M held out, C H W image.
"""

import copy
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.data.shuffle import Resident
from sanitize.loop import OptimConfig, predict, train
from sanitize.measure import accuracy
from sanitize.models.config import ModelConfig
from sanitize.siamese import SiameseConfig


class EvaluateConfig(BaseModel):
    """Training on a condensed set.

    Attributes:
        optim: the paper uses SGD at 0.01 with momentum 0.9 and weight decay 5e-4, in batches of 256, for 1,000 epochs.
        augment: random change of each image in each step.
        n_networks: number of networks, each with its own seed.
        held_out: real images a class that are not condensed, at most a tenth of the class. The epoch with the highest
            accuracy on them is chosen; 0 chooses the last epoch.
        check_every: epochs between two measurements on held-out images; the last epoch is always measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    optim: OptimConfig = OptimConfig(
        optimizer="sgd", learning_rate=0.01, schedule="cosine", weight_decay=5e-4, epochs=1000, batch_size=256
    )
    augment: SiameseConfig = SiameseConfig()
    n_networks: int = Field(default=3, ge=1)
    held_out: int = Field(default=50, ge=0)
    check_every: int = Field(default=50, ge=1)


def learn_from(
    images_NCHW: Tensor,
    labels_N: Tensor,
    held_out: tuple[Tensor, Tensor],
    config: EvaluateConfig,
    model_config: ModelConfig,
    number: int,
    compute: Compute,
) -> nn.Module:
    """A network trained on these images alone, in eval mode.

    Args:
        images_NCHW: training images in normalised units, float32.
        labels_N: int64.
        held_out: images (M, C, H, W), uint8, and labels (M,) that choose the epoch; M = 0 chooses the last one.
        config: settings of the training.
        model_config: description of the network.
        number: number of the network, which names its random streams (initialisation, order, augmentation).
        compute: device, precision, seed.

    Raises:
        NumericsError: training diverged.
    """
    device = compute.torch_device
    compute.seed_global("evaluate", "init", number)
    model = model_config.build()
    order = partial(compute.generator, "evaluate", "order", number)
    data = Resident(images_NCHW.to(device), labels_N.to(device), config.optim.batch_size, order)
    changing = compute.generator("evaluate", "augment", number)
    size = (images_NCHW.shape[2], images_NCHW.shape[3])

    def change(x_BCHW: Tensor) -> Tensor:
        drawn = config.augment.draw(len(x_BCHW), size, changing).to(device)
        return drawn(x_BCHW[:, None])[:, 0]  # each image is its own class, so that each gets its own change

    best = _Best(held_out, config, model_config, compute)
    train(model, data.epoch, data.steps_per_epoch, config.optim, compute, change, measure=best.look)
    if best.state:
        model.load_state_dict(best.state)
    return model.eval()


class _Best:
    """The state with the highest accuracy on held-out images; on ties, the later one."""

    def __init__(
        self, held_out: tuple[Tensor, Tensor], config: EvaluateConfig, model_config: ModelConfig, compute: Compute
    ) -> None:
        self.state: dict[str, Any] = {}
        self._images_MCHW, self._labels_M = held_out
        self._config, self._model_config, self._compute = config, model_config, compute
        self._epoch, self._accuracy = 0, -1.0

    def look(self, network: nn.Module) -> dict[str, float]:
        self._epoch += 1
        is_due = self._epoch % self._config.check_every == 0 or self._epoch == self._config.optim.epochs
        if not is_due or len(self._labels_M) == 0:
            return {}
        logits_MK = predict(network, self._images_MCHW, self._model_config.normalise, self._compute)
        if (right := accuracy(logits_MK, self._labels_M)) >= self._accuracy:
            self._accuracy, self.state = right, copy.deepcopy(network.state_dict())
        return {"held_out_accuracy": right}
