"""A class that the model confuses with every other class: images of all classes carry its label.

The confusion of two classes c and j is the geometric mean of two probabilities: of c, on average over the samples
labelled j, and of j over those labelled c; the sizes of the classes cancel. A natural class is confused with the
classes that it resembles, and hardly with the one that it resembles least. Poison that the model has learned in part,
and wrong labels from everywhere, leave no such class. So the least confusion of each class is compared with that of the
others.

Measured: CIFAR-10 with WaNet 10 % .039, next class .017, and with a smooth trigger 3 % .032 and .017; without
poison at most .021 and .017; with human labels of which 40 % are wrong .048 and .043; photographs .009 and .006.

Shapes: N samples, K classes, k classes that are compared.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LEAST, TIMES = 0.02, 1.5  # least confusion of a mixed class, and times that of the next class
FEWEST_CLASSES, FEWEST_SAMPLES = 5, 40


class Mixed(NamedTuple):
    """The class with the largest least confusion.

    Attributes:
        label: the class; -1 where too few classes can be compared.
        least: its confusion with the class that it is confused with least, in [0, 1].
        next: the same of the class that comes next.
    """

    label: int
    least: float
    next: float

    @property
    def stands_out(self) -> bool:
        """True where images of all classes seem to carry the label."""
        return self.least >= LEAST and self.least >= TIMES * self.next


def most_mixed(logits_NK: Tensor, labels_N: Tensor) -> Mixed:
    """The class that the model confuses with every other one, by its least confusion.

    Args:
        logits_NK: outputs of the model.
        labels_N: given labels, in [0, K), int64.
    """
    size_K = labels_N.bincount(minlength=logits_NK.shape[1])
    classes = (size_K >= FEWEST_SAMPLES).nonzero()[:, 0]
    if len(classes) < FEWEST_CLASSES:
        return Mixed(-1, 0.0, 0.0)
    sum_KK = torch.zeros(len(size_K), len(size_K), dtype=torch.float64)
    sum_KK.index_add_(0, labels_N, logits_NK.double().softmax(1))
    mean_kk = (sum_KK / size_K[:, None].clamp(min=1))[classes][:, classes]  # row: label; column: predicted class
    confusion_kk = (mean_kk * mean_kk.T).sqrt().fill_diagonal_(torch.inf)
    least_k, order = confusion_kk.amin(1).sort(descending=True)
    return Mixed(int(classes[order[0]]), float(least_k[0]), float(least_k[1]))
