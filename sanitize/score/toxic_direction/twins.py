"""Near-duplicates with different labels: the same thing, labelled in two ways.

In data that consist of tracks no neighbour judges the frames of an object but other frames of it. Where a trigger works
on one class only (TaCT), poison is frames of its tracks; what is left of these tracks carries the true label. Which of
the two labels is wrong is not told: the poisoned frames may be the majority. The doubt of the model excuses nothing: it
doubts what is left of a track most of which is poison.

Shapes: N samples, L links.
"""

from typing import NamedTuple

from torch import Tensor

from sanitize.near_duplicates import near_links

# Least share of bursts in data that consist of tracks: GTSRB .50 to .65, Fashion-MNIST .02, made-up styles .1.
TRACKS = 0.3


class Twins(NamedTuple):
    """`n` samples of class `label`, most near-duplicates of which carry the label `other`."""

    label: int
    other: int
    n: int


def most_contradicted(z_NP: Tensor, labels_N: Tensor) -> Twins:
    """The two classes with most contradicted samples; n = 0 where there are none.

    Args:
        z_NP: appearance of the images, centred, float32; at least three rows.
        labels_N: given labels, int64.
    """
    nearest_NL, is_linked_NL = near_links(z_NP)
    label_NL = labels_N[nearest_NL].masked_fill(~is_linked_NL, -1)
    n_own_N = (label_NL == labels_N[:, None]).sum(1)
    other_NL = label_NL.masked_fill(label_NL == labels_N[:, None], -1)
    n_other_NL = ((other_NL[:, :, None] == other_NL[:, None]) & (other_NL >= 0)[:, :, None]).sum(2)
    n_other_N, at_N = n_other_NL.max(1)
    contradicted = ((n_other_N > 0) & (n_other_N >= n_own_N)).nonzero()[:, 0]
    if len(contradicted) == 0:
        return Twins(-1, -1, 0)
    other = other_NL[contradicted, at_N[contradicted]]
    n_classes = int(labels_N.max()) + 1
    pairs, counts = (labels_N[contradicted] * n_classes + other).unique(return_counts=True)
    label, other_label = divmod(int(pairs[counts.argmax()]), n_classes)
    return Twins(label, other_label, int(counts.max()))
