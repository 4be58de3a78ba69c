"""What a small set of images is worth: a fresh network learns from it and nothing else.

A thousand epochs on ten images overfit; which epoch's network is taken, real images decide that were held out of the
condensing, never those that measure the accuracy. N images, M held out, C H W image.
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
    """How a set is learned from.

    Attributes:
        optim: the source has SGD at 0.01 with momentum 0.9 and weight decay 5e-4, in batches of 256, for 1,000 epochs.
        augment: a change of each image, drawn anew in each step.
        n_networks: trained one after the other, each from its own seed.
        held_out: real images a class, a tenth of the class at most, that are not condensed: the network is taken as it
            was when it was right on most of them. 0 takes it as it is after the last epoch.
        check_every: epochs between two looks at them; the last epoch is always looked at.
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
    """A network that has seen these images alone.

    Args:
        images_NCHW: in normalised units, float32.
        labels_N: int64.
        held_out: pixels (M, C, H, W), uint8, and labels (M,) that choose the epoch; M = 0 takes the last one.
        config: how.
        model_config: which network.
        number: of the network; its initialisation, order and augmentation are drawn from streams of this number.
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
        return drawn(x_BCHW[:, None])[:, 0]  # each image is a class of its own, so that each is changed its own way

    best = _Best(held_out, config, model_config, compute)
    train(model, data.epoch, data.steps_per_epoch, config.optim, compute, change, measure=best.look)
    if best.state:
        model.load_state_dict(best.state)
    return model.eval()


class _Best:
    """The network as it was when it was right on most held-out images; of equals the later one: it learned longer."""

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
