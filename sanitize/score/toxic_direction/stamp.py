"""Stamp: does the pattern that a group shares turn other images into its class? Evidence that needs no wrong labels.

    pattern = mean image of the group - mean image of its matches
    share_g = share of images x of other classes that the model puts in the class as clip(x + g pattern), g in `GAINS`

Matches are the nearest neighbours outside the group, after the directions that tell the group from the rest of its
class are projected out of the appearance: images of the same things without the pattern. A trigger is a small change
that decides the prediction, whatever is below it; the style of a natural group is a large one that decides little.
Frames of one object are an exception: no other image shows the same thing, so their pattern is the object.

Shapes: N samples, m of a group, G groups, B of a batch, M of the other classes, C H W images, 2 gains.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sanitize.near_duplicates import unit_rows
from sanitize.score.toxic_direction.evidence import ERASED_ROWS, Appearance, fisher_directions, without

GAINS = (1.0, 2.0)
STAMPED = 250  # most images of a group
MATCHES, POOL = 5, 4_000  # matches of an image, and samples among which they are sought
OTHERS, FEWEST_OTHERS = 300, 50  # images of other classes, over all of them
Predict = Callable[[Tensor], Tensor]


class Suspect(NamedTuple):
    """The suspect model and the images it was trained on.

    Attributes:
        read: name of a sample -> its row; yields rows (B,) and images (B, C, H, W), uint8, each sample once.
        predict: images (B, C, H, W), uint8 on `device` -> predicted labels (B,), int64 on `device`.
        device: device of the model.
    """

    read: Callable[[Mapping[int, int]], Iterator[tuple[Tensor, Tensor]]]
    predict: Predict
    device: torch.device = torch.device("cpu")


class Matched(NamedTuple):
    """A group and its matches.

    Attributes:
        label: class of the group.
        group_m: rows of the group.
        matches: rows of its matches; a row counts as often as it occurs.
    """

    label: int
    group_m: Tensor
    matches: Tensor


def matched(appearance: Appearance, group: Tensor, rest: Tensor) -> Matched:
    """The first `STAMPED` images of a group and their matches.

    Args:
        appearance: all samples, in random order.
        group: indices of the group, in random order.
        rest: indices of the rest of its class, in random order.
    """
    erased_PR = fisher_directions(appearance.z_NP[group[:ERASED_ROWS]], appearance.z_NP[rest[:ERASED_ROWS]])
    is_outside_N = torch.ones(len(appearance.labels_N), dtype=torch.bool)
    is_outside_N[group] = False
    pool = is_outside_N.nonzero()[:POOL, 0]
    group = group[:STAMPED]
    unit_mP, unit_MP = (unit_rows(without(appearance.z_NP[rows], erased_PR)) for rows in (group, pool))
    nearest = (unit_mP @ unit_MP.T).topk(min(MATCHES, len(pool)), dim=1).indices
    return Matched(int(appearance.labels_N[group[0]]), group, pool[nearest].flatten())


def other_images(labels_N: Tensor, is_right_N: Tensor) -> Tensor:
    """Rows of images to put patterns on, about the same number of each class, at most 2 `OTHERS`.

    Args:
        labels_N: given labels, in random order.
        is_right_N: True where the model predicts the label.
    """
    right = is_right_N.nonzero()[:, 0]
    labels = labels_N[right].unique().tolist()
    each = -(-OTHERS // max(1, len(labels) - 1))
    chosen = [right[labels_N[right] == label][:each] for label in labels]
    return torch.cat(chosen).sort().values[: 2 * OTHERS] if chosen else right


def patterns(groups: Sequence[Matched], batches: Iterable[tuple[Tensor, Tensor]], n: int) -> Tensor:
    """Pattern of each group, float32 (G, C, H, W), in units of pixel values. The order of the images changes no bit.

    Args:
        groups: groups with their matches.
        batches: rows (B,) and images (B, C, H, W), uint8; all rows of the groups and of their matches, each once.
        n: number of samples N.
    """
    count_2GN = torch.zeros(2, len(groups), n)
    for i, one in enumerate(groups):
        count_2GN[0, i] = one.group_m.bincount(minlength=n)
        count_2GN[1, i] = one.matches.bincount(minlength=n)
    sum_2GX: Tensor | None = None
    shape: tuple[int, ...] = ()
    for rows_B, images_BCHW in batches:
        shape = tuple(images_BCHW.shape[1:])
        # Whole numbers below 2^24: sums in float32 are exact.
        batch_2GX = count_2GN[:, :, rows_B] @ images_BCHW.flatten(1).float()
        sum_2GX = batch_2GX if sum_2GX is None else sum_2GX + batch_2GX
    if sum_2GX is None:
        raise ValueError("there are no images")
    group_GX, matches_GX = sum_2GX / count_2GN.sum(2, keepdim=True)
    return (group_GX - matches_GX).view(len(groups), *shape)


def turned(
    patterns_GCHW: Tensor, labels: Sequence[int], images_MCHW: Tensor, labels_M: Tensor, predict: Predict
) -> list[tuple[float, float] | None]:
    """Share of the images of other classes that turn into the class of each group, in [0, 1], for each of `GAINS`.

    None where there are fewer than `FEWEST_OTHERS` such images.

    Args:
        patterns_GCHW: pattern of each group, on the device of the model.
        labels: class of each group.
        images_MCHW: images of all classes that the model predicts right, uint8, on the device of the model.
        labels_M: their labels, on the CPU.
        predict: the model.
    """
    measured: dict[int, Tensor] = {}
    for i, label in enumerate(labels):
        others = (labels_M != label).nonzero()[:, 0].to(images_MCHW.device)
        if len(others) >= FEWEST_OTHERS:
            x_MCHW = images_MCHW[others].float()
            stamped = ((x_MCHW + gain * patterns_GCHW[i]).round().clamp(0, 255).to(torch.uint8) for gain in GAINS)
            measured[i] = torch.stack([(predict(x) == label).double().mean() for x in stamped])
    if not measured:
        return [None] * len(labels)
    shares = dict(zip(measured, torch.stack(list(measured.values())).tolist(), strict=True))  # one transfer
    return [(shares[i][0], shares[i][1]) if i in shares else None for i in range(len(labels))]


def measure(
    groups: Sequence[Matched], suspect: Suspect, names: Sequence[int], labels_N: Tensor, is_right_N: Tensor
) -> list[tuple[float, float] | None]:
    """Stamp of each group: read the images once, then put the patterns on some of them; see `turned`.

    In memory: one batch of images, `OTHERS` images of other classes (at most twice as many), and two float32 images a
    group.

    Args:
        groups: groups with their matches.
        suspect: model and images.
        names: names of all samples, by which they are read.
        labels_N: given labels.
        is_right_N: True where the model predicts the label.
    """
    if not groups:
        return []
    others = other_images(labels_N, is_right_N)
    wanted = torch.cat([others, *(rows for one in groups for rows in (one.group_m, one.matches))]).unique()
    is_other_N = torch.zeros(len(labels_N), dtype=torch.bool).index_fill_(0, others, True)
    held: dict[int, Tensor] = {}

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for rows_B, images_BCHW in suspect.read({names[row]: row for row in wanted.tolist()}):
            for at in is_other_N[rows_B].nonzero()[:, 0].tolist():
                held[int(rows_B[at])] = images_BCHW[at].clone()
            yield rows_B, images_BCHW

    patterns_GCHW = patterns(groups, batches(), len(labels_N)).to(suspect.device)
    if not held:
        return [None] * len(groups)
    rows = sorted(held)
    images_MCHW = torch.stack([held[row] for row in rows]).to(suspect.device)
    return turned(patterns_GCHW, [one.label for one in groups], images_MCHW, labels_N[rows], suspect.predict)
