"""Which epoch's network is taken."""

import torch
from torch import nn

from sanitize.compute import Compute
from sanitize.condensation.evaluate import EvaluateConfig, learn_from
from sanitize.data.dataset import Dataset
from sanitize.loop import OptimConfig, predict
from sanitize.measure import accuracy
from sanitize.models.config import ModelConfig
from sanitize.models.instance_convnet import InstanceConvNetConfig
from sanitize.siamese import SiameseConfig

MODEL = ModelConfig(
    architecture=InstanceConvNetConfig(widths=(16, 16)), n_classes=10, image_shape=(3, 8, 8), mean=(0.5,), std=(0.25,)
)


def config(epochs: int, held_out: int = 5) -> EvaluateConfig:
    # A learning rate so large that accuracy jumps from epoch to epoch: the last is then rarely the best.
    optim = OptimConfig(optimizer="sgd", learning_rate=0.5, schedule="constant", epochs=epochs, batch_size=20)
    return EvaluateConfig(optim=optim, augment=SiameseConfig(flip=False), held_out=held_out, check_every=1)


def test_the_network_is_taken_where_it_is_best_on_held_out_images(dataset: Dataset, compute: Compute) -> None:
    images_NCHW, labels_N = dataset.images()
    learned, held_out = (images_NCHW[:100], labels_N[:100]), (images_NCHW[100:300], labels_N[100:300])

    def network(epochs: int, judges: tuple[torch.Tensor, torch.Tensor]) -> nn.Module:
        return learn_from(MODEL.normalise(learned[0]), learned[1], judges, config(epochs), MODEL, 0, compute)

    def right(model: nn.Module) -> float:
        return accuracy(predict(model, held_out[0], MODEL.normalise, compute), held_out[1])

    # The learning rate is constant, so that a run of n epochs begins like a longer one.
    no_images = (images_NCHW[:0], labels_N[:0])
    after = [right(network(epochs, no_images)) for epochs in range(1, 5)]
    assert after[-1] < max(after), "the last epoch must not be the best one, or this test shows nothing"
    assert right(network(4, held_out)) == max(after)
