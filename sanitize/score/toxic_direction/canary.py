"""What this run would have seen: canaries, samples with a known trigger, are looked for by the same rule as poison.

The model was trained on the canaries beside the data (`sanitize.data.canaries`). They are added to the sample at the
rate of the training, and the classes whose labels they carry are weighed and decided again. The decision on the data
itself is made before and without them.

    learned    share of a canary to which the model gives its label
    recall     share of a canary that planted groups of its class take: log-odds above 0

A canary is seen where both reach their least share. That of recall is small: a run that takes a quarter of a trigger
says "found". What the model has not learned proves nothing, even where its images alone tell it apart.

Shapes: N rows of the sample, M of the canaries, D columns of all embeddings.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sanitize.compute import Compute
from sanitize.data.canaries import Canaries
from sanitize.data.tables import Embeddings
from sanitize.score.toxic_direction.decide import decide_class
from sanitize.score.toxic_direction.grow import digests, log_odds
from sanitize.score.toxic_direction.rule import EvidenceConfig
from sanitize.score.toxic_direction.split import SplitConfig
from sanitize.score.toxic_direction.stamp import Suspect
from sanitize.score.toxic_direction.weigh import (
    Knowledge,
    Weighed,
    compare,
    know,
    measure_stamps,
    parts_of_unsure,
    weigh_class,
)

LEARNED, SEEN = 0.5, 0.25  # least shares of a canary that was seen; chosen on digits and Fashion-MNIST


class Sample(NamedTuple):
    """Rows of all classes, in a random order that depends on the rows alone.

    Attributes:
        rows_ND: all embeddings side by side, float32.
        widths: columns of each: those of the model, the one made without labels, logits.
        labels_N: given labels, int64.
        digests_N: hashes of the rows, int64.
        names: names of the rows, by which images are read.
        of_model: names of the embeddings of the model.
    """

    rows_ND: Tensor
    widths: tuple[int, ...]
    labels_N: Tensor
    digests_N: Tensor
    names: list[int]
    of_model: tuple[str, ...]


class Planted(NamedTuple):
    """Canaries and their embeddings.

    Attributes:
        canaries: the copies with triggers.
        embeddings: their embeddings.
    """

    canaries: Canaries
    embeddings: Embeddings


def sample_of(
    rows_ND: Tensor, widths: tuple[int, ...], labels_N: Tensor, names: Sequence[int], of_model: tuple[str, ...]
) -> Sample:
    """Rows in the order of their hashes."""
    digests_N = digests(rows_ND[:, : sum(widths[:-1])])
    order_N = digests_N.argsort(stable=True)
    names = [names[i] for i in order_N.tolist()]
    return Sample(rows_ND[order_N], widths, labels_N[order_N], digests_N[order_N], names, of_model)


def known_of(sample: Sample) -> Knowledge:
    """What all classes of a sample share."""
    *model_ND, appearance_ND, logits_NK = sample.rows_ND.split(sample.widths, dim=1)
    model = dict(zip(sample.of_model, model_ND, strict=True))
    return know(model, appearance_ND, logits_NK, sample.labels_N, sample.digests_N)


def weighed_class(
    sample: Sample, known: Knowledge, label: int, evidence: EvidenceConfig, split: SplitConfig, compute: Compute
) -> Weighed:
    """Groups of a class of a sample."""
    rows = (sample.labels_N == label).nonzero()[:, 0]
    # Named by a row, not by its label, so that other names of the classes give the same result.
    generator = compute.generator("score", "toxic_direction", int(sample.digests_N[rows[0]]))
    return weigh_class(known, label, rows, evidence, split, generator)


def with_parts(
    sample: Sample, known: Knowledge, weighed: Weighed, evidence: EvidenceConfig, split: SplitConfig, compute: Compute
) -> Weighed:
    """A class of a sample with parts of the surest group that labels leave unsure, decided as well."""
    generator = compute.generator("score", "toxic_direction", "parts", int(sample.digests_N[weighed.rows[0]]))
    return replace(weighed, groups=[*weighed.groups, *parts_of_unsure(known, weighed, evidence, split, generator)])


def look_for(
    planted: Planted,
    sample: Sample,
    alone: Sequence[Weighed],
    names: Sequence[str],
    n_of: Callable[[int, float], int],
    evidence: EvidenceConfig,
    split: SplitConfig,
    compute: Compute,
    suspect: Suspect | None,
) -> dict[str, Any]:
    """Canaries as the rule sees them, for scorer.json: `planted`, one object each, and `why` there is none.

    Args:
        planted: the canaries.
        sample: rows of the data.
        alone: groups of all classes of the data, not compared yet.
        names: names of the embeddings of the sample.
        n_of: number of rows of a canary that the sample would hold, from its label and rate.
        evidence, split: settings of the scorer.
        compute: seed of the searches.
        suspect: model and images; None measures no stamps.
    """
    if not planted.canaries.n_samples:
        return {"planted": [], "why": planted.canaries.info["why"]}
    (batch,) = planted.embeddings.batches(names, size=planted.canaries.n_samples)
    kinds, digests_M = planted.canaries.kinds(), digests(batch.z_BD[:, : sum(batch.widths[:-1])])
    taken: list[int] = []
    for canary in planted.canaries.planted:
        at = torch.tensor([i for i, kind in enumerate(kinds) if kind == canary.kind])
        taken += at[digests_M[at].argsort(stable=True)][: n_of(canary.label, canary.rate)].tolist()
    rows_ND = torch.cat([sample.rows_ND, batch.z_BD[taken]])
    labels_N = torch.cat([sample.labels_N, batch.labels_B[taken]])
    both = sample_of(rows_ND, sample.widths, labels_N, [*sample.names, *(-1 - i for i in taken)], sample.of_model)
    known = known_of(both)
    if suspect is not None:
        suspect = suspect._replace(read=_with_copies(suspect.read, planted.canaries))
    found = []
    for canary in planted.canaries.planted:
        ours = {-1 - i for i in taken if kinds[i] == canary.kind}
        is_canary_N = torch.tensor([name in ours for name in both.names])
        ours_weighed = weighed_class(both, known, canary.label, evidence, split, compute)
        others = [one for one in alone if one.label != canary.label]
        weighed = compare([ours_weighed, *others], known, evidence)[0]
        weighed = with_parts(both, known, weighed, evidence, split, compute)
        recall = _recall(weighed, is_canary_N, known, evidence, split)
        if recall < SEEN and suspect is not None:
            (weighed,) = measure_stamps([weighed], known, evidence, suspect, both.names)
            recall = _recall(weighed, is_canary_N, known, evidence, split)
        learned = float(known.is_right_N[is_canary_N].double().mean()) if ours else 0.0
        missed = "not learned" if learned < LEARNED else "not found" if recall < SEEN else ""
        shares = {"learned": round(learned, 4), "recall": round(recall, 4)}
        found.append(canary._asdict() | shares | {"missed": missed})
    return {"planted": found, "why": ""}


def _recall(
    weighed: Weighed, is_canary_N: Tensor, known: Knowledge, evidence: EvidenceConfig, split: SplitConfig
) -> float:
    """Share of a canary that planted groups of its class take."""
    is_canary_n = is_canary_N[weighed.rows]
    is_found_n = torch.zeros(len(weighed.rows), dtype=torch.bool)
    for one in decide_class(weighed, known, evidence, split):
        is_found_n |= log_odds(one.lines, torch.cat(list(weighed.spaces.values()), 1), known.fold_N[weighed.rows]) > 0
    return float(is_found_n[is_canary_n].double().mean()) if bool(is_canary_n.any()) else 0.0


Read = Callable[[Mapping[int, int]], Iterator[tuple[Tensor, Tensor]]]


def _with_copies(read: Read, canaries: Canaries) -> Read:
    """The same reader, which also knows the images of canaries, by negative names: -1 is the first of them."""

    def both(row_of: Mapping[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
        yield from read({name: row for name, row in row_of.items() if name >= 0})
        copies = [(name, row) for name, row in row_of.items() if name < 0]
        if copies:
            images_MCHW, _ = canaries.images()
            yield torch.tensor([row for _, row in copies]), images_MCHW[[-1 - name for name, _ in copies]]

    return both
