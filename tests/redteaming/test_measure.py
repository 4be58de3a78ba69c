"""Counts against counting by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sanitize.attack import (
    AttackConfig,
    BadNetsConfig,
    LabelNoiseConfig,
    Poisoned,
    SeveralConfig,
    poison_shards,
    triggered,
)
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.decode import ImageConfig, decode
from sanitize.data.digits import Digits, write_digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.tables import Scores, Selection
from sanitize.embed import EmbedConfig, EmbedderConfig, embed_shards, train_embedder
from sanitize.errors import DataError
from sanitize.loop import predict
from sanitize.measure import accuracy, attack_success_rate, detection
from sanitize.models.checkpoint import Checkpoint
from sanitize.redteaming import Case, FindingsConfig, Measured, measure_case, sum_up
from sanitize.redteaming.measure import count_removals
from sanitize.score import SpectralConfig, fit_scorer, score_shards
from sanitize.select import ContaminationRule, SelectConfig, select_samples

ATTACK = BadNetsConfig(rate=0.1, target=3)


@pytest.fixture(scope="module")
def test_side(digits: Digits, compute: Compute, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Two shards that `checkpoint` never saw; images are scaled from 8 to 12 pixels."""
    out = str(tmp_path_factory.mktemp("test") / "index")
    config = IndexConfig.model_validate({"n_classes": 10, "image": {"size": (12, 12)}})
    return index_shards(config, digits.shards()[4:6], out, compute)


@pytest.fixture(scope="module")
def poisoned(dataset: Dataset, compute: Compute, tmp_path_factory: pytest.TempPathFactory) -> Poisoned:
    return poison_shards(ATTACK, dataset, str(tmp_path_factory.mktemp("poisoned") / "out"), compute)


@pytest.fixture(scope="module")
def selection(
    poisoned: Poisoned, checkpoint: Checkpoint, compute: Compute, tmp_path_factory: pytest.TempPathFactory
) -> Selection:
    out = tmp_path_factory.mktemp("selection")
    dataset = index_shards(IndexConfig(), poisoned.shard_paths(), str(out / "index"), compute)
    embeddings = embed_shards(EmbedConfig(batch_size=64), dataset, checkpoint, str(out / "embeddings"), compute)
    config = SpectralConfig(embedding="pixels")
    fitted = fit_scorer(config, embeddings, str(out / "scorer"), compute)
    scores: Scores = score_shards(config, fitted, embeddings, str(out / "scores"), compute)
    rule = SelectConfig(rule=ContaminationRule(rate=0.2))
    return select_samples(rule, dataset, [scores], str(out / "selection"), compute)


@pytest.fixture(scope="module")
def model(test_side: Dataset, compute: Compute, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Knows its images a little: it is right on some."""
    config = EmbedderConfig.model_validate({"architecture": {"kind": "convnet", "widths": [8]}, "optim": {"epochs": 3}})
    return train_embedder(config, test_side, str(tmp_path_factory.mktemp("model") / "out"), compute)


@pytest.fixture
def measure(
    selection: Selection, poisoned: Poisoned, model: Checkpoint, test_side: Dataset, compute: Compute, tmp_path: Path
) -> Callable[[AttackConfig], Measured]:
    """Measures of a case whose three models are one."""
    models = dict.fromkeys(("before", "after", "baseline"), model)
    out = str(tmp_path / "measured")
    return lambda config: measure_case(config, selection, models, test_side, out, compute, truth=poisoned)


def test_removals_are_compared_with_the_truth(selection: Selection, poisoned: Poisoned) -> None:
    removed, truth = [], []
    for shard in selection.shards:
        removed += [not keep for keep in selection.rows(shard)["keep"].to_pylist()]
        truth += poisoned.rows(shard)["poisoned"].to_pylist()
    expected = detection(torch.tensor(removed).numpy(), torch.tensor(truth).numpy())
    found = {measure: part / whole for measure, (part, whole) in count_removals(selection, poisoned).items()}
    assert found == {
        "recall": expected.recall,
        "precision": expected.precision,
        "false_removals": expected.false_positive_rate,
    }
    assert 0 < found["recall"] < 1
    assert found["false_removals"] > 0
    assert count_removals(selection, None) == {"false_removals": (sum(removed), len(removed))}


def test_cover_samples_are_neither_recall_nor_false_removals(
    selection: Selection, dataset: Dataset, compute: Compute, tmp_path: Path
) -> None:
    attack = ATTACK.model_copy(update={"cover_rate": 0.3})
    truth = poison_shards(attack, dataset, str(tmp_path / "covered"), compute)
    counts = {}
    for shard in selection.shards:
        kept = selection.rows(shard)["keep"].to_pylist()
        rows = truth.rows(shard).to_pylist()
        for keep, row in zip(kept, rows, strict=True):
            case = (keep, row["poisoned"], row["cover"])
            counts[case] = counts.get(case, 0) + 1
    assert min(counts[False, False, True], counts[True, False, True]) > 0
    found, clean = counts[False, True, False], counts[False, False, False]
    assert count_removals(selection, truth) == {
        "recall": (found, found + counts[True, True, False]),
        "precision": (found, found + clean),
        "false_removals": (clean, clean + counts[True, False, False]),
    }


def test_verdicts_on_other_samples_are_refused(selection: Selection, compute: Compute, tmp_path: Path) -> None:
    smaller = write_digits(str(tmp_path / "digits"), compute, n_shards=30)  # shards of the same names
    dataset = index_shards(IndexConfig(), smaller.shards()[:4], str(tmp_path / "index"), compute)
    truth = poison_shards(ATTACK, dataset, str(tmp_path / "poisoned"), compute)
    with pytest.raises(DataError, match="verdicts on"):
        count_removals(selection, truth)


def test_the_trigger_is_put_on_the_image_as_it_is_stored(test_side: Dataset) -> None:
    _, _, wanted_B, images_BCHW = next(triggered(ATTACK, test_side, 10))
    assert images_BCHW.shape[1:] == (3, 12, 12)
    assert (wanted_B == 3).all()
    # A patch of 3 in 8 pixels covers 4.5 of 12: put on after scaling, it would cover 3.
    difference_HW = images_BCHW.float().std(0).mean(0)
    assert (difference_HW[-4:, -4:] < 1).all()
    assert (difference_HW[:8, 3:8] > 1).any()


def test_accuracy_and_attack_success_are_those_of_the_metrics(
    measure: Callable[[AttackConfig], Measured], model: Checkpoint, test_side: Dataset, compute: Compute
) -> None:
    measured = measure(SeveralConfig(attacks=(ATTACK, LabelNoiseConfig(rate=0.1))))
    shares = {measure: part / whole for measure, (part, whole) in measured.counts.items()}
    images_NCHW, labels_N = test_side.images()
    logits_NK = predict(model.model(), images_NCHW, model.config.normalise, compute)
    assert shares["acc_before"] == shares["acc_after"] == accuracy(logits_NK, labels_N)
    hits, n = 0.0, 0
    for batch in triggered(ATTACK, test_side, 10):
        logits_BK = predict(model.model(), batch.images_BCHW, model.config.normalise, compute)
        hits += attack_success_rate(logits_BK, torch.full_like(batch.wanted_B, -1), batch.wanted_B) * len(
            batch.wanted_B
        )
        n += len(batch.wanted_B)
    assert n == int((labels_N != 3).sum())
    assert shares["asr_before"] == shares["asr_baseline"] == pytest.approx(hits / n)
    assert measured.pictures is not None
    upper_CHW, lower_CHW = decode(measured.pictures, ImageConfig()).split(12, dim=1)
    shown = next(triggered(ATTACK, test_side, 10, 8))
    assert torch.equal(lower_CHW, torch.cat(list(shown.images_BCHW), dim=2)), "as a model reads them"
    first = next(test_side.batches(256, [shown.shard]))
    assert torch.equal(upper_CHW, torch.cat([first.images_BCHW[i] for i in shown.positions], dim=2))


def test_unpoisoned_data_has_false_removals_and_accuracies_only(
    selection: Selection, model: Checkpoint, test_side: Dataset, compute: Compute, tmp_path: Path
) -> None:
    models = {"before": model, "after": model}
    measured = measure_case(None, selection, models, test_side, str(tmp_path / "out"), compute)
    assert measured.counts.keys() == {"false_removals", "acc_before", "acc_after"}
    assert measured.pictures is None


def test_findings_sum_up_and_judge(
    measure: Callable[[AttackConfig], Measured], compute: Compute, tmp_path: Path
) -> None:
    measured = measure(ATTACK)
    recall = measured.counts["recall"][0] / measured.counts["recall"][1]
    config = FindingsConfig(require=("badnets@10%:recall>=0.01", "badnets@10%:recall>=1"))
    findings = sum_up(config, [Case("badnets@10%", [measured, measured])], str(tmp_path / "f"), compute)
    assert [requirement["met"] for requirement in findings.info["requirements"]] == [True, False]
    assert findings.info["met"] is False
    assert findings.info["cases"][0]["measures"]["recall"]["mean"] == pytest.approx(recall)
    asr = measured.counts["asr_before"][0] / measured.counts["asr_before"][1]
    assert findings.info["not_learned"] == (["badnets@10%"] if asr < 0.5 else [])
    assert asr < 0.5  # it never saw the trigger
    assert findings.pictures() == {"badnets@10%": measured.pictures}
    assert json.loads((tmp_path / "f" / "findings.json").read_text()) == findings.info
