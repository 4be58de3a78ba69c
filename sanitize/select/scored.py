"""Scores of all scorers for all samples, side by side.

The only state of a run that grows with the data set: 17 bytes a sample for label, place in its class and trust, and a
float32 score a scorer. Shapes: N scored samples, in the order of shards and rows; with several pictures a sample, N
pictures, and 8 more bytes for each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sanitize.data.tables import Scores
from sanitize.errors import ArtifactError, ConfigError


class ScorerOutput(NamedTuple):
    """Scores and class statistics of one scorer.

    Attributes:
        kind: kind of the scorer.
        scores_N: scores, float32; higher is more suspicious.
        statistics: label -> name -> number measured of the class.
        rule: kind of the default rule of the scorer; None where `scorer.json` names none.
    """

    kind: str
    scores_N: np.ndarray
    statistics: dict[int, dict[str, float]]
    rule: str | None = None


@dataclass(frozen=True)
class Scored:
    """All scores of a run.

    Attributes:
        slices: name of a shard -> slice of its samples.
        judged: label -> indices of its samples that are not trusted, int64.
        trusted: label -> indices of its trusted samples, int64.
        trusted_N: True for trusted samples.
        outputs: scores of each scorer.
        sample_N: number of the sample among all, ascending, int64; None where each has one picture.
    """

    slices: dict[str, slice]
    judged: dict[int, np.ndarray]
    trusted: dict[int, np.ndarray]
    trusted_N: np.ndarray
    outputs: list[ScorerOutput]
    sample_N: np.ndarray | None = None

    def worst(self, label: int, values_n: np.ndarray) -> np.ndarray:
        """Largest value of each judged sample of a class, given those of its pictures, in order."""
        return values_n if self.sample_N is None else _worst(values_n, self.sample_N[self.judged[label]])[0]

    def any_picture(self, is_found_N: np.ndarray) -> np.ndarray:
        """True for all pictures of a sample of which one is True, bool (N,)."""
        if self.sample_N is None or not len(is_found_N):
            return is_found_N
        found_K, n_K = _worst(is_found_N, self.sample_N)
        return np.repeat(found_K, n_K)

    def by_class(self, values_N: np.ndarray) -> dict[int, np.ndarray]:
        """Label -> values of its judged samples."""
        return {label: values_N[at] for label, at in self.judged.items()}


def _worst(values_n: np.ndarray, sample_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Largest value of each sample, and the number of its values."""
    starts = np.flatnonzero(np.diff(sample_n, prepend=-1))
    return np.maximum.reduceat(values_n, starts), np.diff(starts, append=len(sample_n))


def kind_of(scores: Scores) -> str:
    """Kind of the scorer that made the scores."""
    return str(scores.read_json("scorer.json")["config"]["kind"])


def read_scores(scores: Sequence[Scores], trusted: Sequence[str]) -> Scored:
    """Read the scores of all scorers of a run.

    Raises:
        ConfigError: two scorers are of one kind, or a scorer was fitted on trusted shards.
        ArtifactError: the scorers did not score the same samples.
    """
    infos = [one.read_json("scorer.json") for one in scores]
    kinds = [kind_of(one) for one in scores]
    if len(set(kinds)) < len(kinds):
        raise ConfigError(f"two scorers are of one kind: {', '.join(kinds)}")
    for one, info in zip(scores, infos, strict=True):
        if not set(trusted) <= set(info.get("exclude", [])):
            raise ConfigError(f"the scorer of {one.path} was fitted on trusted shards; exclude them from fitting")
    if any(one.shards != scores[0].shards for one in scores):
        raise ArtifactError("the scorers did not score the same shards; give scores of one run")
    slices: dict[str, slice] = {}
    labels, pieces, n = [np.zeros(0, np.int64)], [[np.zeros(0, np.float32)] for _ in scores], 0
    for shard in scores[0].shards:
        labels.append(_same_samples(scores, shard))
        slices[shard] = slice(n, n + len(labels[-1]))
        n += len(labels[-1])
        for piece, one in zip(pieces, scores, strict=True):
            piece.append(one.rows(shard, ["score"])["score"].to_numpy())
    trusted_N = np.zeros(n, bool)
    for shard in set(trusted) & set(slices):
        trusted_N[slices[shard]] = True
    outputs = [
        ScorerOutput(kind, np.concatenate(piece), _by_label(info), info.get("rule"))
        for kind, piece, info in zip(kinds, pieces, infos, strict=True)
    ]
    judged, trusted_of_class = (_by_class(np.concatenate(labels), which_N) for which_N in (~trusted_N, trusted_N))
    return Scored(slices, judged, trusted_of_class, trusted_N, outputs)


def _same_samples(scores: Sequence[Scores], shard: str) -> np.ndarray:
    """Labels of the scored samples of a shard, int64."""
    tables = [one.rows(shard, ["position", "label"]) for one in scores]
    if not all(table.equals(tables[0]) for table in tables):
        raise ArtifactError(f"the scorers did not score the same samples of shard {shard}; give scores of one run")
    return np.asarray(tables[0]["label"].to_numpy())


def _by_class(labels_N: np.ndarray, which_N: np.ndarray) -> dict[int, np.ndarray]:
    at_N = np.flatnonzero(which_N)
    if not len(at_N):
        return {}
    at_N = at_N[labels_N[at_N].argsort(kind="stable")]
    labels, starts = np.unique(labels_N[at_N], return_index=True)
    return {
        label: at_N[start:end] for label, start, end in zip(labels.tolist(), starts, [*starts[1:], None], strict=True)
    }


def _by_label(info: dict[str, Any]) -> dict[int, dict[str, float]]:
    return {int(label): values for label, values in info["classes"].items()}
