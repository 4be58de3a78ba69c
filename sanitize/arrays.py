"""Poison among embeddings that lie in memory: the toxic-direction scorer and its rule, without files.

Shapes: N samples, D features.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sanitize.compute import Compute
from sanitize.data.tables import EmbeddingBatch
from sanitize.errors import ConfigError, DataError
from sanitize.score import ToxicDirectionConfig
from sanitize.select import SelectConfig
from sanitize.select.scored import Scored, ScorerOutput
from sanitize.select.stage import rule_on

_ROWS = 8192  # of a batch
Array = np.ndarray | Tensor


class PoisonFound(NamedTuple):
    """Result of `find_poison`.

    Attributes:
        mask: True for samples that the rule removes, bool (N,).
        scores: log-odds (nats) that a sample belongs to the suspicious part of its class; higher is more suspicious.
            float32 (N,).
        evidence: label -> measures of the class: n, flagged, separation (in standard deviations; 0 where the class
            cannot be split), level (the separation above which the class is touched), minority_fraction (share of the
            suspicious part, in [0, 1]), agreement (of the folds, in [0, 1]), threshold (of the scores; None where the
            class is not touched), capped. With a label check: disagreement and disagreement_of_rest (mean label
            disagreement of the two parts, in [0, 1]) and side ("labels" or "shape", which decided the suspicious part).
    """

    mask: np.ndarray
    scores: np.ndarray
    evidence: dict[int, dict[str, Any]]


def find_poison(
    embeddings: Array | Mapping[str, Array],
    labels: Array,
    *,
    seed: int = 0,
    scorer: ToxicDirectionConfig | None = None,
    select: SelectConfig | None = None,
) -> PoisonFound:
    """Find poisoned samples by the embeddings of a model that was trained on them.

    In a class with poison, the embeddings fall into two parts. Every class is split in two, the separation is measured
    on held-out samples, and the suspicious part of a class that stands out is removed. No rate of poison is needed.

    Args:
        embeddings: finite real numbers (N, D) from an inner layer of the model, for example its pooled features; or a
            dict of several embeddings of the same samples, by name: "pooled" is split, and "pixels" (an embedding
            without labels, for example flattened images) serves the label check, which decides the suspicious part
            where a class splits evenly.
        labels: given labels (N,), integers.
        seed: seed of all random choices, in [0, 2**63); with the same number of torch threads, the same seed gives the
            same result to the bit.
        scorer: settings of the scorer. None takes the defaults, with the label check where its embedding is given.
        select: rule and cap. None takes the defaults: the separation rule, and at most 60 % of a class.

    Returns:
        mask, scores and evidence.

    Raises:
        ConfigError: an embedding that the scorer reads is missing, or a setting is wrong.
        DataError: an array has the wrong shape or dtype, an embedding is not finite, or every class is too small.

    Example:
        >>> x = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
        >>> y = torch.arange(600) // 300
        >>> x[:20, 0] += 30
        >>> find_poison(x, y).mask.nonzero()[0].tolist() == list(range(20))
        True
    """
    select = select or SelectConfig()
    scorer = scorer or _default_scorer(embeddings)
    labels_N = _labels(labels)
    z = _embeddings(embeddings, scorer, len(labels_N))
    _refuse_small(labels_N, scorer)

    def batches(name: str) -> Iterator[EmbeddingBatch]:
        for rows in torch.arange(len(labels_N)).split(_ROWS):
            keys = [str(i) for i in rows.tolist()]
            yield EmbeddingBatch("arrays", rows, keys, labels_N[rows], z[name][rows])

    fitted = scorer.build()
    fitted.fit(batches, Compute(device="cpu", seed=seed))
    scores_N = torch.cat([fitted.score(batch) for batch in batches(scorer.embedding)]).numpy()
    judged = {label: np.flatnonzero(labels_N.numpy() == label) for label in labels_N.unique().tolist()}
    output = ScorerOutput(scorer.kind, scores_N, fitted.statistics)
    scored = Scored({}, judged, {}, np.zeros(len(scores_N), bool), [output])
    found = rule_on(output, select.rules_of([scorer.kind])[scorer.kind], scored, select)
    evidence = {label: {"n": len(judged[label])} | _evidence(measures) for label, measures in found.classes.items()}
    return PoisonFound(found.flagged_N, scores_N, evidence)


def _default_scorer(embeddings: Array | Mapping[str, Array]) -> ToxicDirectionConfig:
    default = ToxicDirectionConfig()
    check = default.label_check
    is_given = check is not None and isinstance(embeddings, Mapping) and check.embedding in embeddings
    return default if is_given else ToxicDirectionConfig(label_check=None)


def _embeddings(embeddings: Array | Mapping[str, Array], scorer: ToxicDirectionConfig, n: int) -> dict[str, Tensor]:
    """The embeddings that the scorer reads, by name, float32 (N, D)."""
    needed = {scorer.embedding} | ({scorer.label_check.embedding} if scorer.label_check else set())
    if not isinstance(embeddings, Mapping):
        if len(needed) > 1:
            raise ConfigError(f"the label check reads a second embedding: give a dict with {', '.join(sorted(needed))}")
        return {scorer.embedding: _embedding("embeddings", embeddings, n)}
    if missing := sorted(needed - embeddings.keys()):
        raise ConfigError(f"embeddings: {', '.join(missing)} is missing; there are {', '.join(embeddings) or 'none'}")
    return {name: _embedding(f"embedding {name!r}", embeddings[name], n) for name in sorted(needed)}


def _evidence(measures: Mapping[str, Any]) -> dict[str, Any]:
    measures = dict(measures)
    by_labels = measures.pop("side_by_labels", None)
    return measures if by_labels is None else measures | {"side": "labels" if by_labels else "shape"}


def _labels(labels: Array) -> Tensor:
    array = _tensor("labels", labels)
    if array.ndim != 1 or len(array) == 0:
        raise DataError(f"labels has shape {tuple(array.shape)}; give one label a sample, (N,)")
    if array.is_floating_point() or array.is_complex() or array.dtype == torch.bool:
        raise DataError(f"labels has dtype {_name(array)}; give integers")
    return array.long()


def _embedding(name: str, values: Array, n: int) -> Tensor:
    array = _tensor(name, values)
    if array.ndim != 2 or array.shape[1] == 0:
        raise DataError(f"{name} has shape {tuple(array.shape)}; give one row a sample, (N, D)")
    if len(array) != n:
        raise DataError(f"{name} has {len(array):,} rows, and there are {n:,} labels; give one label a row")
    if array.is_complex():
        raise DataError(f"{name} has dtype {_name(array)}; give real numbers")
    array = array.float()
    if not (finite_ND := array.isfinite()).all():
        row, column = (~finite_ND).nonzero()[0].tolist()
        raise DataError(f"{name} is not finite as float32: row {row}, column {column} is {array[row, column]:g}")
    return array


def _tensor(name: str, values: Array) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().cpu()
    array = np.require(values, requirements=["C", "W"])
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise DataError(f"{name} has dtype {array.dtype}; give numbers") from error


def _name(array: Tensor) -> str:
    return str(array.dtype).removeprefix("torch.")


def _refuse_small(labels_N: Tensor, scorer: ToxicDirectionConfig) -> None:
    most = int(labels_N.unique(return_counts=True)[1].max())
    if most < scorer.min_class:
        raise DataError(
            f"the largest class has {most} samples; a class is judged from {scorer.min_class} samples on (min_class)"
        )
