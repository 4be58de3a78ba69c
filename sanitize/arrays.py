"""Poison among embeddings in memory: the toxic-direction scorer and its rule, without files.

Shapes: N samples, D features.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sanitize.compute import Compute
from sanitize.data.tables import EmbeddingBatch
from sanitize.errors import ConfigError, DataError
from sanitize.plural import are, counted
from sanitize.score import ToxicDirection, ToxicDirectionConfig
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
        evidence: label -> measures of the class: n, flagged, threshold (of the scores; None where the class is not
            touched), capped, decision, and of its most suspicious group separation (in standard deviations; 0 where the
            class cannot be split) and minority_fraction (its share, in [0, 1]).
            With label evidence: decision is "planted", "unsure", "burst" or "natural"; disagreement and
            disagreement_of_rest (mean share of neighbours with another label, in [0, 1]), conflict (the part that the
            doubt of the model does not explain) and z (conflict in standard deviations of natural groups).
            Without: decision is "inconclusive"; level (the separation above which the class is touched) and agreement
            (of the folds, in [0, 1]). With a label check: disagreement, disagreement_of_rest and side ("labels" or
            "shape", which decided the suspicious part).
        finding: verdict ("found", "inconclusive" or "nothing"), why, and groups: label, size, share, separation, level
            and level_rest (mean disagreement), conflict, z, p, burst (share of near-duplicates), decision, basis (the
            evidence that decided), reason. Stamps (`fit_scorer`) need images, so clean labels are not judged here.
    """

    mask: np.ndarray
    scores: np.ndarray
    evidence: dict[int, dict[str, Any]]
    finding: dict[str, Any]


_NO_LABEL_EVIDENCE: dict[str, Any] = {
    "verdict": "inconclusive",
    "why": "label evidence is missing: give a dict with pooled, gradients and logits of the samples",
    "groups": [],
}


def find_poison(
    embeddings: Array | Mapping[str, Array],
    labels: Array,
    *,
    seed: int = 0,
    scorer: ToxicDirectionConfig | None = None,
    select: SelectConfig | None = None,
) -> PoisonFound:
    """Find poisoned samples by the embeddings of a model that was trained on them. No rate of poison is needed.

    With "pooled", "gradients" and "logits": a group of a class is removed where the model is sure of its label, but
    images that look alike carry other labels. Groups of near-duplicates are left alone.

    With less, every class is split in two, and the suspicious part of a class whose parts are far apart is removed. A
    tight natural group cannot then be distinguished from poison, so the finding is inconclusive: look before you
    remove.

    Args:
        embeddings: finite real numbers (N, D) from an inner layer of the model, for example its pooled features; or a
            dict of several embeddings of the same samples, by name: "pooled" is split; "early" (pooled features of an
            early layer) may show a trigger that "pooled" hides, and may be missing; "gradients" (made without labels,
            for example histograms of oriented gradients) and "logits" (N, K) give the label evidence. "pixels" (made
            without labels, for example flattened images) serves the label check where that evidence is missing.
        labels: given labels (N,), integers; with logits, columns of the logits.
        seed: seed of all random choices, in [0, 2**63); with the same number of torch threads, the same seed gives the
            same result to the bit.
        scorer: settings of the scorer. None takes the defaults, with what the given embeddings allow.
        select: rule and cap. None takes the defaults: the separation rule, and at most 60 % of a class, unless label
            evidence names more.

    Returns:
        mask, scores, evidence and finding.

    Raises:
        ConfigError: an embedding that the scorer reads is missing, or a setting is wrong.
        DataError: an array has the wrong shape or dtype, an embedding is not finite, a label has no logit, or every
            class is too small.

    Example:
        >>> x = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
        >>> y = torch.arange(600) // 300
        >>> x[:20, 0] += 30
        >>> find_poison(x, y).mask.nonzero()[0].tolist() == list(range(20))
        True
    """
    select = select or SelectConfig()
    scorer = scorer or _default_scorer(embeddings)
    if isinstance(embeddings, Mapping) and scorer.early not in embeddings and "early" not in scorer.model_fields_set:
        scorer = scorer.model_copy(update={"early": None})
    labels_N = _labels(labels)
    z = _embeddings(embeddings, scorer, len(labels_N))
    _refuse_small(labels_N, scorer)

    def batches(name: str | Sequence[str]) -> Iterator[EmbeddingBatch]:
        chosen = [z[one] for one in ([name] if isinstance(name, str) else name)]
        widths = tuple(z_ND.shape[1] for z_ND in chosen)
        for rows in torch.arange(len(labels_N)).split(_ROWS):
            keys = [str(i) for i in rows.tolist()]
            z_BD = torch.cat([z_ND[rows] for z_ND in chosen], 1)
            yield EmbeddingBatch("arrays", rows, keys, labels_N[rows], z_BD, widths)

    fitted = scorer.build()
    fitted.fit(batches, Compute(device="cpu", seed=seed))
    scores_N = torch.cat([fitted.score(batch) for batch in batches(scorer.scored)]).numpy()
    judged = {label: np.flatnonzero(labels_N.numpy() == label) for label in labels_N.unique().tolist()}
    output = ScorerOutput(scorer.kind, scores_N, fitted.statistics, scorer.rule)
    scored = Scored({}, judged, {}, np.zeros(len(scores_N), bool), [output])
    found = rule_on(output, select.rules_of({scorer.kind: scorer.rule})[scorer.kind], scored, select)
    finding = fitted.finding if isinstance(fitted, ToxicDirection) else _NO_LABEL_EVIDENCE
    evidence = {
        label: {"n": len(judged[label]), "decision": _decision(label, measures, finding)} | _evidence(measures)
        for label, measures in found.classes.items()
    }
    return PoisonFound(found.flagged_N, scores_N, evidence, finding)


def _decision(label: int, measures: Mapping[str, Any], finding: Mapping[str, Any]) -> str:
    """The weightiest decision on a group of a class."""
    if "planted" not in measures:
        return "inconclusive"
    decisions = {group["decision"] for group in finding["groups"] if group["label"] == label}
    if measures["planted"]:
        return "planted"
    return next((name for name in ("unsure", "burst") if name in decisions), "natural")


def _default_scorer(embeddings: Array | Mapping[str, Array]) -> ToxicDirectionConfig:
    default = ToxicDirectionConfig()
    given = set(embeddings) if isinstance(embeddings, Mapping) else {default.embedding}
    if _needed(default.model_copy(update={"early": None})) <= given:
        return default
    check = default.label_check if default.label_check and default.label_check.embedding in given else None
    return ToxicDirectionConfig(evidence=None, label_check=check)


def _needed(scorer: ToxicDirectionConfig) -> set[str]:
    """Names of the embeddings that the scorer reads."""
    if scorer.evidence is not None:
        return {*scorer.of_model, scorer.evidence.appearance, "logits"}
    return {scorer.embedding} | ({scorer.label_check.embedding} if scorer.label_check else set())


def _embeddings(embeddings: Array | Mapping[str, Array], scorer: ToxicDirectionConfig, n: int) -> dict[str, Tensor]:
    """The embeddings that the scorer reads, by name, float32 (N, D)."""
    needed = _needed(scorer)
    if not isinstance(embeddings, Mapping):
        if len(needed) > 1:
            raise ConfigError(f"the scorer reads several embeddings: give a dict with {', '.join(sorted(needed))}")
        return {scorer.embedding: _embedding("embeddings", embeddings, n)}
    if missing := sorted(needed - embeddings.keys()):
        raise ConfigError(f"embeddings: {', '.join(missing)} is missing; there are {', '.join(embeddings) or 'none'}")
    return {name: _embedding(f"embedding {name!r}", embeddings[name], n) for name in sorted(needed)}


def _evidence(measures: Mapping[str, Any]) -> dict[str, Any]:
    measures = dict(measures)
    by_labels, has_evidence = measures.pop("side_by_labels", None), measures.pop("planted", None) is not None
    return measures if by_labels is None or has_evidence else measures | {"side": "labels" if by_labels else "shape"}


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
        raise DataError(
            f"{name} has {counted(len(array), 'row')}, and there {are(n)} {counted(n, 'label')}; give one label a row"
        )
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
            f"the largest class has {counted(most, 'sample')}; a class is judged from "
            f"{counted(scorer.min_class, 'sample')} on (min_class)"
        )
