"""The toxic-direction scorer: groups of a bounded sample are weighed and decided, then all samples are scored.

State while fitting: `MAX_ROWS` hash-chosen rows of all classes, at most `MAX_OF_CLASS` of one, the same however the
data is sharded, with all embeddings that count. Shapes: N rows of the sample, B of a batch, D columns of all
embeddings, F folds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sanitize.compute import Compute
from sanitize.data.tables import EmbeddingBatch
from sanitize.errors import DataError
from sanitize.progress import track
from sanitize.score.neighbours import NeighboursConfig
from sanitize.score.scorer import BaseScorerConfig, Passes, by_label, row_hashes
from sanitize.score.toxic_direction.canary import Planted as PlantedCanaries
from sanitize.score.toxic_direction.canary import known_of, look_for, sample_of, weighed_class, with_parts
from sanitize.score.toxic_direction.decide import ROUNDS as MOST_GROUPS
from sanitize.score.toxic_direction.decide import Planted, decide_class
from sanitize.score.toxic_direction.grow import FOLDS, Lines, digests, grow, log_odds
from sanitize.score.toxic_direction.mixed import most_mixed
from sanitize.score.toxic_direction.rule import EvidenceConfig
from sanitize.score.toxic_direction.single_split import SingleSplit
from sanitize.score.toxic_direction.split import UNTOUCHED_ODDS, SplitConfig
from sanitize.score.toxic_direction.stamp import Suspect
from sanitize.score.toxic_direction.twins import TRACKS, most_contradicted
from sanitize.score.toxic_direction.two_gaussians import Mixture
from sanitize.score.toxic_direction.verdict import finding, on_clean_labels, shown, statistics_of
from sanitize.score.toxic_direction.weigh import Group, Knowledge, Weighed, compare, measure_stamps
from sanitize.streaming import HashSample

MAX_ROWS, MAX_OF_CLASS = 40_000, 10_000


class ToxicDirectionConfig(SplitConfig, BaseScorerConfig):
    """Settings of the scorer: those of the splits, the embeddings, and the decision."""

    rule: ClassVar[str] = "separation"

    kind: Literal["toxic_direction"] = "toxic_direction"
    embedding: str = Field(default="pooled", description="embedding of the model")
    early: str | None = Field(
        default="early",
        description="embedding of an early layer, where a trigger can be plain that later layers hide; null: none",
    )
    evidence: EvidenceConfig | None = Field(
        default=EvidenceConfig(),
        description="decision by labels, appearance and logits; null: one split a class, judged by its separation",
    )
    label_check: NeighboursConfig | None = Field(
        default=NeighboursConfig(embedding="pixels", windows=1, k=20),
        description="without evidence: label disagreement that decides the side of an even split; null: shape alone",
    )

    @property
    def scored(self) -> str | tuple[str, ...]:
        """Names of the embeddings in a batch that is scored."""
        return self.embedding if self.evidence is None else (*self.of_model, self.evidence.appearance)

    @property
    def of_model(self) -> tuple[str, ...]:
        """Names of the embeddings of the model that the evidence is sought in."""
        return (self.embedding,) if self.early is None else (self.embedding, self.early)

    def build(self) -> "ToxicDirection | SingleSplit":
        """The scorer, not fitted yet."""
        if self.evidence is None:
            return SingleSplit(self, self.embedding, self.label_check)
        return ToxicDirection(self, self.evidence)


class ToxicDirection:
    """Scorer: log-odds that a sample belongs to a planted group of its class, the largest over its groups.

    In a class without a planted group, the log-odds of a natural one: the rule touches no sample there, and new samples
    can still be compared with a reference.

    Attributes:
        finding: verdict of the data, and the groups worth showing.
        members: hashes (`row_hashes`) of the samples of each group in `finding`; a fitted scorer has them, a loaded one
            has not.
        canaries: result of `canary.look_for`; empty where none were given.
    """

    def __init__(self, config: ToxicDirectionConfig, evidence: EvidenceConfig) -> None:
        self.config, self.evidence = config, evidence
        self.statistics: dict[int, dict[str, float]] = {}
        self.finding: dict[str, Any] = {}
        self.members: list[list[int]] = []
        self.canaries: dict[str, Any] = {}
        self._groups: dict[int, list[Lines]] = {}

    def fit(
        self, passes: Passes, compute: Compute, suspect: Suspect | None = None, canaries: PlantedCanaries | None = None
    ) -> None:
        """One pass to draw the sample; the groups of each class; with a suspect, their stamps; the decisions.

        Canaries change nothing of these: they are looked for afterwards.

        Args:
            passes: passes over the embeddings.
            compute: seed of the sample and of the searches.
            suspect: model and images, read by hashes of `row_hashes` with `sample_seed`; None leaves groups that need
                a stamp unsure.
            canaries: samples with known triggers that the model was trained on beside the data.
        """
        names = (*self.config.of_model, self.evidence.appearance, "logits")
        sample = ClassSamples()
        widths: tuple[int, ...] = ()
        for batch in passes(names):
            widths = batch.widths
            sample.update(batch, row_hashes(batch, sample_seed(compute)))
        rows_ND, labels_N, hashes = sample.rows()
        n_of = sample.n_of
        del sample  # it holds the same rows once more
        if len(labels_N) < 2:
            self.finding = {"verdict": "inconclusive", "why": "there are too few samples", "groups": []}
            return
        sampled = sample_of(rows_ND, widths, labels_N, hashes, self.config.of_model)
        labels_N, n_classes = sampled.labels_N, widths[-1]
        if int(labels_N.min()) < 0 or int(labels_N.max()) >= n_classes:
            raise DataError(f"a label is not among the {n_classes} logits: {labels_N.unique().tolist()[:20]}")
        known = known_of(sampled)
        weighed: list[Weighed] = []
        labels = labels_N.unique().tolist()
        with track("weigh groups of classes", len(labels), "classes") as advance:
            for label in labels:
                weighed.append(weighed_class(sampled, known, label, self.evidence, self.config, compute))
                advance(1)
        alone, weighed = weighed, compare(weighed, known, self.evidence)
        weighed = [with_parts(sampled, known, one, self.evidence, self.config, compute) for one in weighed]
        if suspect is not None:
            weighed = measure_stamps(weighed, known, self.evidence, suspect, sampled.names)
        planted: list[Planted] = []
        for one in weighed:
            here = decide_class(one, known, self.evidence, self.config)
            lines = [found.lines for found in here] or natural_lines(known, one.rows, one.groups, self.config)
            self._groups[one.label] = [unreduced(of_group, known) for of_group in lines]
            self.statistics[one.label] = dict(statistics_of(here, one.groups))
            planted += here
        groups = [group for one in weighed for group in one.groups]
        clean_labels = on_clean_labels(known, self.evidence, suspect is not None)
        twins = most_contradicted(known.appearance.z_NP, labels_N) if known.bursty >= TRACKS else None
        small = [one.label for one in weighed if len(one.rows) < self.config.min_class]
        judged = sum(len(one.rows) for one in weighed if one.label not in small) / len(labels_N)
        mixed = most_mixed(sampled.rows_ND[:, -n_classes:], labels_N)
        self.finding = finding(planted, groups, known.accuracy, clean_labels, twins, mixed, small, judged)
        rows_of = {one.label: one.rows for one in weighed}
        self.members = [
            [sampled.names[i] for i in rows_of[group.label][group.candidate.members_n].tolist()]
            for group, _ in shown(planted, groups)
        ]
        if canaries is not None:
            self.canaries = look_for(
                canaries, sampled, alone, names, n_of, self.evidence, self.config, compute, suspect
            )

    def score(self, batch: EmbeddingBatch) -> Tensor:
        """Log-odds (B,), float32."""
        scores_B = torch.zeros(len(batch.keys))
        for label, rows in by_label(batch):
            if label in self._groups:
                x_bD = batch.z_BD[rows]
                fold_b = digests(x_bD) % FOLDS
                nothing_b = torch.full((len(rows),), math.log(UNTOUCHED_ODDS))
                odds = [log_odds(lines, x_bD, fold_b) for lines in self._groups[label]]
                scores_B[rows] = torch.stack(odds).amax(0) if odds else nothing_b
        return scores_B

    def state_dict(self) -> dict[str, Tensor]:
        """Labels that were fitted, and the lines of their groups."""
        state = {"labels": torch.tensor(sorted(self._groups), dtype=torch.int64)}
        for label, groups in sorted(self._groups.items()):
            for i, lines in enumerate(groups):
                state |= {
                    f"{label}.{i}.weight": lines.weight_FD.contiguous(),
                    f"{label}.{i}.offset": lines.offset_F.contiguous(),
                    f"{label}.{i}.mixture": torch.stack(list(lines.mixture)),
                }
        return state

    def load_state(self, state: Mapping[str, Tensor], statistics: dict[int, dict[str, float]]) -> None:
        """The inverse of `state_dict`, without the finding. Raises ValueError where the tensors do not fit together."""
        self.statistics = statistics
        for label in state["labels"].tolist():
            self._groups[label] = []
            for i in range(MOST_GROUPS):
                if f"{label}.{i}.weight" not in state:
                    break
                weight_FD, offset_F, mixture_32 = (state[f"{label}.{i}.{n}"] for n in ("weight", "offset", "mixture"))
                if weight_FD.ndim != 2 or len(weight_FD) != FOLDS or offset_F.shape != (FOLDS,):
                    raise ValueError(f"the lines of class {label} are {tuple(weight_FD.shape)}, not one for each fold")
                if mixture_32.shape != (3, 2) or not (mixture_32[1] > 0).all():
                    raise ValueError(f"the mixture of class {label} is none")
                if not all(t.dtype == torch.float64 and t.isfinite().all() for t in (weight_FD, offset_F, mixture_32)):
                    raise ValueError(f"the lines of class {label} are not finite float64")
                self._groups[label].append(Lines(weight_FD, offset_F, Mixture(*mixture_32.unbind()), 0.0, ""))


class ClassSamples:
    """Hash-chosen rows of each class: `MAX_ROWS` in all, shared so that small classes keep most."""

    def __init__(self) -> None:
        self._of_class: dict[int, HashSample] = {}
        self._size = MAX_OF_CLASS
        self._counts: dict[int, int] = {}

    def update(self, batch: EmbeddingBatch, hashes: list[int]) -> None:
        """Offer the rows of a batch with one hash each; rows that are not finite are left out."""
        finite_B = batch.z_BD.isfinite().all(1)
        for label, rows in by_label(batch):
            rows = rows[finite_B[rows]]
            self._counts[label] = self._counts.get(label, 0) + len(rows)
            sample = self._of_class.setdefault(label, HashSample(self._size))
            sample.update([hashes[i] for i in rows.tolist()], batch.z_BD[rows])
        self._size = fair_share([len(sample) for sample in self._of_class.values()], MAX_ROWS, self._size)
        for sample in self._of_class.values():
            sample.shrink(self._size)

    @property
    def n_of(self) -> Callable[[int, float], int]:
        """Number of rows that the sample would hold, of a class, of a group with this share of all rows seen."""
        kept = {label: len(sample) / max(1, self._counts[label]) for label, sample in self._of_class.items()}
        n_seen = sum(self._counts.values())
        return lambda label, rate: round(rate * n_seen * kept.get(label, 0.0))

    def rows(self) -> tuple[Tensor, Tensor, list[int]]:
        """Rows (N, D), labels (N,) and hashes of the sample, class by class."""
        filled = [(label, sample) for label, sample in sorted(self._of_class.items()) if len(sample)]
        if not filled:
            return torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64), []
        labels_N = torch.cat([torch.full((len(sample),), label) for label, sample in filled])
        hashes = [value for _, sample in filled for value in sample.hashes()]
        return torch.cat([sample.rows() for _, sample in filled]), labels_N, hashes


def sample_seed(compute: Compute) -> int:
    """Seed of the hashes that choose the sample."""
    return compute.seed_for("score", "toxic_direction", "sample")


def fair_share(counts: list[int], total: int, most: int) -> int:
    """Largest number in [1, most] to which all counts can be cut so that their sum is at most `total`."""
    left, n_left = total, len(counts)
    for count in sorted(counts):
        if count * n_left > left:
            return max(1, min(most, left // n_left))
        left, n_left = left - count, n_left - 1
    return most


def natural_lines(known: Knowledge, rows: Tensor, groups: Sequence[Group], config: SplitConfig) -> list[Lines]:
    """Lines of the first split of the model's embedding, its side with more conflict; none in a class without one."""
    name = next(iter(known.model))
    first = next((group.candidate for group in groups if group.candidate.found_in == name), None)
    if first is None:
        return []
    conflict_n = known.conflict_N[rows]
    members_n = first.members_n
    if float(conflict_n[members_n].mean()) < float(conflict_n[~members_n].mean()):
        members_n = ~members_n
    lines = grow({name: known.model[name][rows]}, members_n, known.fold_N[rows], config)
    n_others = sum(x_ND.shape[1] for x_ND in known.spaces.values()) - lines.weight_FD.shape[1]
    return [lines._replace(weight_FD=torch.cat([lines.weight_FD, lines.weight_FD.new_zeros(FOLDS, n_others)], 1))]


def unreduced(lines: Lines, known: Knowledge) -> Lines:
    """Lines for the columns of the model and of the appearance as they are stored, not for its principal axes."""
    n_model = sum(x_ND.shape[1] for x_ND in known.model.values())
    model_FD, axes_FP = lines.weight_FD[:, :n_model], lines.weight_FD[:, n_model:]
    appearance_FD = axes_FP @ known.appearance.axes_DP.T
    offset_F = lines.offset_F - appearance_FD @ known.appearance.mean_D
    return lines._replace(weight_FD=torch.cat([model_FD, appearance_FD], 1), offset_F=offset_F)
