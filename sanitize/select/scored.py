"""What all scorers say of all samples, side by side.

This is the one thing in a run that grows with the data set: of each sample its label, its place in its class and
whether it is trusted (17 bytes), and a float32 score a scorer. Shapes: N scored samples, in the order of shards and
rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sanitize.data.tables import Scores
from sanitize.errors import ArtifactError, ConfigError


class ScorerOutput(NamedTuple):
    """What one scorer says.

    Attributes:
        kind: of the scorer.
        scores_N: float32.
        statistics: label -> what the scorer measured of the class.
    """

    kind: str
    scores_N: np.ndarray
    statistics: dict[int, dict[str, float]]


@dataclass(frozen=True)
class Scored:
    """All scores of a run.

    Attributes:
        slices: name of a shard -> where its samples are.
        judged: label -> where its samples are, int64, but for those that are trusted.
        trusted: label -> where those are.
        trusted_N: True where the user vouches for the sample.
        outputs: one a scorer.
    """

    slices: dict[str, slice]
    judged: dict[int, np.ndarray]
    trusted: dict[int, np.ndarray]
    trusted_N: np.ndarray
    outputs: list[ScorerOutput]

    def by_class(self, values_N: np.ndarray) -> dict[int, np.ndarray]:
        """label -> the values of its judged samples."""
        return {label: values_N[at] for label, at in self.judged.items()}


def kind_of(scores: Scores) -> str:
    """Kind of the scorer they come from."""
    return str(scores.read_json("scorer.json")["config"]["kind"])


def read_scores(scores: Sequence[Scores], trusted: Sequence[str]) -> Scored:
    """Read the scores of all scorers of a run.

    Raises:
        ConfigError: two scorers are of one kind, or a scorer was fitted on trusted shards.
        ArtifactError: the scorers did not score the same samples.
    """
    infos = [of_scorer.read_json("scorer.json") for of_scorer in scores]
    kinds = [kind_of(of_scorer) for of_scorer in scores]
    if len(set(kinds)) < len(kinds):
        raise ConfigError(f"two scorers are of one kind: {', '.join(kinds)}")
    for of_scorer, info in zip(scores, infos, strict=True):
        if not set(trusted) <= set(info.get("exclude", [])):
            raise ConfigError(f"the scorer of {of_scorer.path} was fitted on trusted shards; hold them out")
    if any(of_scorer.shards != scores[0].shards for of_scorer in scores):
        raise ArtifactError("the scorers did not score the same shards; give scores of one run")
    slices: dict[str, slice] = {}
    labels, pieces, n = [np.zeros(0, np.int64)], [[np.zeros(0, np.float32)] for _ in scores], 0
    for shard in scores[0].shards:
        labels.append(_same_samples(scores, shard))
        slices[shard] = slice(n, n + len(labels[-1]))
        n += len(labels[-1])
        for piece, of_scorer in zip(pieces, scores, strict=True):
            piece.append(of_scorer.rows(shard, ["score"])["score"].to_numpy())
    trusted_N = np.zeros(n, bool)
    for shard in set(trusted) & set(slices):
        trusted_N[slices[shard]] = True
    outputs = [
        ScorerOutput(kind, np.concatenate(piece), _by_label(info))
        for kind, piece, info in zip(kinds, pieces, infos, strict=True)
    ]
    judged, trusted_of_class = (_by_class(np.concatenate(labels), which_N) for which_N in (~trusted_N, trusted_N))
    return Scored(slices, judged, trusted_of_class, trusted_N, outputs)


def _same_samples(scores: Sequence[Scores], shard: str) -> np.ndarray:
    """Labels of the scored samples of a shard, int64."""
    tables = [of_scorer.rows(shard, ["position", "label"]) for of_scorer in scores]
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
