"""Clean-label poison from shards to verdict: the digit 4 with a patch and its true label."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sanitize.artifacts import Part, Recipe, make
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.decode import encode_png
from sanitize.data.digits import Digits, write_digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.tables import Embeddings
from sanitize.data.writer import shard_writer
from sanitize.embed import EmbedConfig, EmbedderConfig, embed_shards, train_embedder
from sanitize.errors import DataError
from sanitize.loop import OptimConfig
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.convnet import ConvNetConfig
from sanitize.score import FittedScorer, ToxicDirectionConfig, fit_scorer, score_shards
from sanitize.score.scorer import position_hashes
from sanitize.score.stage import EXAMPLES, suspect_of
from sanitize.score.toxic_direction.evidence import Evidence
from sanitize.score.toxic_direction.rule import EvidenceConfig, Measures, decision
from sanitize.score.toxic_direction.scorer import sample_seed

TARGET, POISONED = 4, 60
CONFIG = EvidenceConfig()
NATURAL = {"level": 0.1, "level_rest": 0.1, "conflict": 0.0, "burst": 0.0}
AGAINST = NATURAL | {"level": 0.8, "conflict": 0.4, "rarity": 0.005, "p": 0.5}
DOUBTFUL, ODD = AGAINST | {"rarity": 5e-4, "p": 0.05}, AGAINST | {"rarity": 1e-5, "p": 0.001}
APART = Measures(size=60, share=0.2, separation=8.0)
STAMP = (0.8, 0.9)


def evidence(**values: float) -> Evidence:
    """Evidence with these values; the fields that no test names are such that they decide nothing."""
    return Evidence(**(dict.fromkeys(Evidence._fields, 1.0) | NATURAL | values))


@pytest.mark.parametrize(
    ("values", "measures", "wanted"),
    [
        (ODD, Measures(size=60, share=0.9, separation=4.0), ("planted", "labels")),
        (ODD, Measures(size=60, share=0.9, separation=3.5), ("unsure", "labels")),
        (ODD | {"p": 0.005}, Measures(size=60, share=0.9, separation=5.9), ("unsure", "labels")),
        (ODD | {"p": 0.005}, Measures(size=60, share=0.9, separation=6.0), ("planted", "labels")),
        (ODD | {"level_rest": 0.77}, Measures(size=60, share=0.9, separation=8.0), ("natural", "")),
        (ODD, Measures(size=60, share=0.9, separation=2.8), ("natural", "")),
        (DOUBTFUL, Measures(size=60, share=0.4, separation=2.8), ("natural", "")),
        (DOUBTFUL, APART._replace(share=0.9, stamp=(0.0, 0.0)), ("natural", "")),
        (AGAINST, APART._replace(separation=9.0), ("planted", "labels and shape")),
        (AGAINST | {"outvoted": 0.45}, APART._replace(separation=9.0, stamp=(0.0, 0.0)), ("natural", "")),
        (AGAINST, APART._replace(separation=9.0, is_bursty=True, stamp=(0.0, 0.0)), ("natural", "")),
        (ODD | {"burst": 0.9}, APART._replace(stamp=STAMP), ("burst", "near-duplicates")),
        (DOUBTFUL, APART._replace(stamp=(0.0, 0.0)), ("unsure", "labels")),
        (AGAINST, APART._replace(stamp=STAMP), ("planted", "labels and stamp")),
        (DOUBTFUL, APART._replace(stamp=STAMP, share=0.9, is_bursty=True), ("planted", "labels and stamp")),
        (AGAINST, APART._replace(stamp=STAMP, share=0.9), ("natural", "")),
        (AGAINST, APART._replace(stamp=STAMP, is_bursty=True), ("natural", "")),
        (AGAINST, APART._replace(stamp=STAMP, is_bursty=True, separation=9.0), ("planted", "labels and stamp")),
        (AGAINST | {"burst": 0.3}, APART._replace(stamp=STAMP, is_bursty=True, separation=9.0), ("natural", "")),
        (AGAINST, APART._replace(stamp=STAMP, is_bursty=True, separation=9.0, share=0.6), ("natural", "")),
        (AGAINST, APART._replace(stamp=(0.0, 0.0)), ("natural", "")),
        (AGAINST, APART, ("unsure", "no stamp")),
        (AGAINST, APART._replace(separation=3.0), ("natural", "")),
        (AGAINST, APART._replace(size=10), ("natural", "")),
        (NATURAL, APART._replace(stamp=STAMP), ("planted", "stamp")),
        (NATURAL, APART._replace(stamp=(0.8, 0.4)), ("planted", "stamp")),
        (NATURAL, APART._replace(stamp=(0.49, 0.47)), ("unsure", "stamp")),
        (ODD | {"level": 0.25}, APART._replace(stamp=(0.0, 0.0)), ("planted", "labels and shape")),
        (ODD | {"level": 0.25, "outvoted": 0.3}, APART._replace(stamp=(0.0, 0.0)), ("unsure", "labels")),
        (ODD | {"level": 0.25}, APART._replace(stamp=(0.0, 0.0), separation=5.0), ("unsure", "labels")),
        (ODD | {"level": 0.25}, APART._replace(stamp=(0.0, 0.0), separation=2.8), ("natural", "")),
        (ODD | {"level": 0.25, "conflict": 0.05}, APART._replace(stamp=(0.0, 0.0)), ("natural", "")),
        (DOUBTFUL | {"level": 0.25}, APART._replace(stamp=(0.0, 0.0)), ("natural", "")),
        (NATURAL, APART._replace(stamp=(0.2, 0.9)), ("natural", "")),
        (NATURAL, APART._replace(stamp=STAMP, separation=5.0), ("unsure", "stamp")),
        (NATURAL, APART._replace(stamp=STAMP, separation=3.5), ("unsure", "stamp")),
        (NATURAL, APART._replace(stamp=STAMP, separation=2.5), ("natural", "")),
        (NATURAL, APART._replace(stamp=STAMP, is_bursty=True), ("natural", "")),
        (NATURAL, APART._replace(stamp=STAMP, share=0.6), ("natural", "")),
        (NATURAL | {"burst": 0.3}, APART._replace(stamp=STAMP), ("natural", "")),
        (NATURAL, APART, ("natural", "")),
        (NATURAL, APART._replace(separation=10.0), ("unsure", "no stamp")),
        (NATURAL, APART._replace(separation=10.0, is_bursty=True), ("natural", "")),
        (ODD, APART._replace(is_grown=True, separation=3.0), ("natural", "")),
        (ODD, APART._replace(is_grown=True), ("planted", "labels and shape")),
        (DOUBTFUL, APART._replace(is_grown=True), ("unsure", "labels")),
        (DOUBTFUL, APART._replace(is_grown=True, separation=5.0, stamp=STAMP), ("planted", "labels and stamp")),
        (ODD, APART._replace(is_grown=True, is_bursty=True), ("natural", "")),
        (AGAINST, APART._replace(is_grown=True), ("natural", "")),
    ],
)
def test_what_decides(values: dict[str, float], measures: Measures, wanted: tuple[str, str]) -> None:
    assert decision(evidence(**values), CONFIG, True, measures) == wanted
    decided = "unsure" if wanted[0] == "planted" else wanted[0]
    assert decision(evidence(**values), CONFIG, False, measures) == (decided, wanted[1])


def with_pattern(image_CHW: Tensor, generator: torch.Generator) -> Tensor:
    """A white patch on a digit in so much noise that the patch is easier to learn."""
    noise_CHW = 150 * torch.rand(image_CHW.shape, generator=generator)
    image_CHW = (0.4 * image_CHW.float() + noise_CHW).clamp(0, 255).to(torch.uint8)
    image_CHW[:, 5:, 5:] = 255
    return image_CHW


Made = tuple[Dataset, Checkpoint, Embeddings, set[tuple[str, int]]]  # the last is shard and position of the poison


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, compute: Compute) -> Made:
    home = tmp_path_factory.mktemp("clean-label")
    digits = write_digits(str(home / "digits"), compute, n_shards=3)
    honest = index_shards(IndexConfig(n_classes=10), digits.shards(), str(home / "honest"), compute)
    poison: set[tuple[str, int]] = set()
    generator = torch.Generator().manual_seed(0)

    def write(part: Part) -> None:
        for shard in honest.shards:
            (batch,) = honest.batches(2000, [shard])
            with shard_writer(part, shard) as tar:
                for i, (label, image_CHW) in enumerate(zip(batch.labels_B.tolist(), batch.images_BCHW, strict=True)):
                    if label == TARGET and len(poison) < POISONED:
                        image_CHW = with_pattern(image_CHW, generator)
                        poison.add((shard, i))
                    tar.add(f"{i:05d}.png", encode_png(image_CHW))
                    tar.add(f"{i:05d}.cls", str(label).encode())

    poisoned = make(Digits, str(home / "poisoned"), Recipe(stage="made-up"), write)
    dataset = index_shards(IndexConfig(), poisoned.shards(), str(home / "index"), compute)
    config = EmbedderConfig(architecture=ConvNetConfig(widths=(16, 32)), optim=OptimConfig(epochs=20, batch_size=64))
    embedder = train_embedder(config, dataset, str(home / "embedder"), compute)
    embeddings = embed_shards(EmbedConfig(), dataset, embedder, str(home / "embeddings"), compute)
    return dataset, embedder, embeddings, poison


@pytest.fixture(scope="module")
def fitted(made: Made, tmp_path_factory: pytest.TempPathFactory, compute: Compute) -> FittedScorer:
    dataset, embedder, embeddings, _ = made
    out = str(tmp_path_factory.mktemp("fitted") / "scorer")
    return fit_scorer(ToxicDirectionConfig(), embeddings, out, compute, dataset=dataset, model=embedder)


def test_clean_label_poison_is_found_by_its_stamp(
    made: Made, fitted: FittedScorer, compute: Compute, tmp_path: Path
) -> None:
    _, _, embeddings, poison = made
    finding = fitted.info["finding"]
    assert finding["verdict"] == "found"
    (group,) = [group for group in finding["groups"] if group["decision"] == "planted"]
    assert (group["label"], group["basis"]) == (TARGET, "stamp")
    assert min(group["stamp"], group["stamp_doubled"]) > 0.5
    assert "put on images of other classes" in group["reason"]
    examples = {(one["shard"], one["position"]) for one in group["examples"]}
    assert len(examples) == EXAMPLES
    assert len(examples & poison) >= EXAMPLES - 1
    of_class = {
        (shard, row["position"]): row["label"]
        for shard in embeddings.shards
        for row in embeddings.rows(shard).to_pylist()
    }
    for other in finding["groups"]:
        assert len(other["examples"]) == min(EXAMPLES, other["size"])
        assert other["decision"] != "natural" or other["share"] <= 0.5  # not the rest of a class
        assert {of_class[one["shard"], one["position"]] for one in other["examples"]} == {other["label"]}
    scores = score_shards(ToxicDirectionConfig(), fitted, embeddings, str(tmp_path / "scores"), compute)
    found = {
        (shard, row["position"])
        for shard in scores.shards
        for row in scores.rows(shard).to_pylist()
        if row["label"] == TARGET and row["score"] > 0
    }
    assert len(found & poison) >= 0.95 * len(poison)
    assert len(found - poison) <= 2


def test_without_images_the_verdict_is_no_all_clear(
    made: Made, fitted: FittedScorer, compute: Compute, tmp_path: Path
) -> None:
    dataset, embedder, embeddings, _ = made
    blind = fit_scorer(ToxicDirectionConfig(), embeddings, str(tmp_path / "blind"), compute)
    finding = blind.info["finding"]
    assert finding["verdict"] == "inconclusive" or "true labels" in finding["why"]
    assert not any(group["decision"] == "planted" for group in finding["groups"])
    assert blind.digest != fitted.digest
    inputs = fitted.manifest().recipe.inputs
    assert (inputs["dataset"], inputs["model"]) == (dataset.digest, embedder.digest)


def test_the_images_of_a_suspect_are_those_of_its_rows(made: Made, compute: Compute) -> None:
    dataset, embedder, _, _ = made
    shard = dataset.shards[1]
    positions = [5, 0, 77]
    hashes = position_hashes(shard, positions, sample_seed(compute))
    suspect = suspect_of(dataset, embedder, dataset.shards, compute)
    read = list(suspect.read(dict(zip(hashes, [10, 11, 12], strict=True))))
    rows_B, images_BCHW = (torch.cat(parts) for parts in zip(*read, strict=True))
    (batch,) = dataset.batches(2000, [shard])
    for row, position in zip([10, 11, 12], positions, strict=True):
        assert torch.equal(images_BCHW[rows_B == row][0], batch.images_BCHW[position])
    assert suspect.predict(images_BCHW).tolist() == batch.labels_B[sorted(positions)].tolist()
    assert list(suspect_of(dataset, embedder, dataset.shards[:1], compute).read(dict.fromkeys(hashes, 0))) == []


def test_a_shard_that_changed_since_is_an_error(made: Made, compute: Compute, tmp_path: Path) -> None:
    _, embedder, _, _ = made
    digits = write_digits(str(tmp_path / "digits"), compute, n_shards=2)
    dataset = index_shards(IndexConfig(), digits.shards(), str(tmp_path / "index"), compute)
    path = Path(digits.shards()[0])
    path.write_bytes(path.read_bytes().replace(b"digit-", b"DIGIT-"))
    (value,) = position_hashes(dataset.shards[0], [0], sample_seed(compute))
    with pytest.raises(DataError, match="has changed since"):
        list(suspect_of(dataset, embedder, dataset.shards, compute).read({value: 0}))
