"""Clean labels, source classes, cover samples and random pieces: which samples are changed, and how."""

import io
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter
from torch import Tensor

from sanitize.attack import (
    AdaptiveBlendConfig,
    Attack,
    AttackConfig,
    BadNetsConfig,
    BlendedConfig,
    Poisoned,
    SeveralConfig,
    SIGConfig,
    TaCTConfig,
    WaNetConfig,
    choose,
    poison_shards,
    triggered,
)
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.digits import Digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.errors import ConfigError

SEVERAL = SeveralConfig(
    attacks=(
        AdaptiveBlendConfig(rate=0.05, target=1),
        TaCTConfig(rate=0.02, cover_rate=0.06),
        SIGConfig(rate=0.02, target=3),
        BadNetsConfig(rate=0.03, target="next"),
    )
)
KINDS = [AdaptiveBlendConfig, BadNetsConfig, BlendedConfig, SIGConfig, TaCTConfig, WaNetConfig]
shares = st.floats(0.001, 0.03)


@st.composite
def attacks(draw: st.DrawFn) -> Attack:
    """Attacks with cover samples, sources and clean labels, at rates that the digits can bear."""
    target = draw(st.integers(0, 9))
    others = st.integers(0, 9).filter(lambda label: label != target)
    sources = draw(st.none() | st.sets(others, min_size=1, max_size=5))
    kind = draw(st.sampled_from(KINDS))
    known = {"rate": draw(shares), "target": target, "cover_rate": draw(st.none() | shares)}
    if kind is TaCTConfig:
        known["sources"] = tuple(sources or {(target + 1) % 10})
    elif kind is not SIGConfig and sources is not None:
        known["sources"] = tuple(sources)
    return kind(**known)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset, compute: Compute) -> Poisoned:
    return poison_shards(SEVERAL, dataset, str(tmp_path_factory.mktemp("covers") / "out"), compute)


def truth_of(artifact: Poisoned) -> list[dict]:
    return [row | {"shard": shard} for shard in artifact.shards for row in artifact.rows(shard).to_pylist()]


def labels_of(dataset: Dataset) -> dict[tuple[str, int], int]:
    rows = ((shard, row) for shard in dataset.shards for row in dataset.rows(shard).to_pylist())
    return {(shard, row["position"]): row["label"] for shard, row in rows}


@given(config=attacks(), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_exactly_the_rates_are_chosen_and_only_among_samples_that_qualify(
    dataset: Dataset, config: Attack, seed: int
) -> None:
    labels = labels_of(dataset)
    found = choose(config, dataset, Compute(device="cpu", seed=seed))
    chosen = {(shard, position): choice for shard in found for position, choice in found[shard].items()}
    n_covers = sum(choice.cover for choice in chosen.values())
    cover_rate = config.rate if config.cover_rate is None else config.cover_rate
    assert n_covers == round(cover_rate * dataset.n_samples)
    assert len(chosen) - n_covers == round(config.rate * dataset.n_samples)
    for place, choice in chosen.items():
        label = labels[place]
        if choice.cover:
            assert choice.label == label != config.target
            assert config.sources is None or label not in config.sources
        else:
            assert choice.label == config.target
            assert (label == config.target) == config.keeps_label
            assert config.sources is None or label in config.sources


@given(config=attacks())
@settings(deadline=None)
def test_settings_are_read_back(config: Attack) -> None:
    adapter = TypeAdapter(AttackConfig)
    assert adapter.validate_json(adapter.dump_json(config)) == config
    several = SeveralConfig(attacks=(config, BadNetsConfig(rate=0.1, size=0.1)))
    assert adapter.validate_json(several.model_dump_json()) == several


def test_covers_have_the_trigger_and_their_label_and_the_truth_says_which(
    tmp_path: Path, dataset: Dataset, poisoned: Poisoned, compute: Compute
) -> None:
    truth, n = truth_of(poisoned), dataset.n_samples
    counts = Counter((row["attack"], row["cover"]) for row in truth if row["attack"] >= 0)
    wanted = {(0, False): 0.05, (0, True): 0.05, (1, False): 0.02, (1, True): 0.06, (2, False): 0.02, (3, False): 0.03}
    assert counts == {case: round(rate * n) for case, rate in wanted.items()}
    n_poisoned, n_covers = (sum(row[name] for row in truth) for name in ("poisoned", "cover"))
    assert poisoned.manifest().counts == {"samples": n, "poisoned": n_poisoned, "cover": n_covers}
    assert not any(row["poisoned"] and row["cover"] for row in truth)
    assert all(row["label"] == row["original_label"] for row in truth if not row["poisoned"])
    assert [row["cover"] for row in truth] == np.concatenate([poisoned.is_cover(s) for s in poisoned.shards]).tolist()
    before_NCHW, _ = dataset.images()
    after_NCHW, after_N = index_shards(IndexConfig(), poisoned.shard_paths(), str(tmp_path / "i"), compute).images()
    assert after_N.tolist() == [row["label"] for row in truth]
    attack_N = torch.tensor([row["attack"] for row in truth])
    assert torch.equal(after_NCHW[attack_N == -1], before_NCHW[attack_N == -1])
    for number in (1, 2, 3):
        grey_N1HW = before_NCHW[attack_N == number, :1]  # as the digits are stored
        triggered_N1HW = SEVERAL.attacks[number].apply(grey_N1HW)
        assert torch.equal(after_NCHW[attack_N == number], triggered_N1HW.expand(-1, 3, -1, -1))
    sources = {row["original_label"] for row in truth if row["attack"] == 1 and row["poisoned"]}
    others = {row["original_label"] for row in truth if row["attack"] == 1 and row["cover"]}
    assert (sources, others & {0, 1}) == ({1}, set())
    assert len(others) == 8


def test_the_bytes_do_not_depend_on_the_order_of_shards_or_groups(
    tmp_path: Path, digits: Digits, poisoned: Poisoned, compute: Compute
) -> None:
    again = index_shards(IndexConfig(), digits.shards()[:4][::-1], str(tmp_path / "index"), compute)
    for shard in again.shards[::-1]:
        poison_shards(SEVERAL, again, str(tmp_path / "out"), compute, shards=[shard])
    assert poison_shards(SEVERAL, again, str(tmp_path / "out"), compute).digest == poisoned.digest


def test_an_attack_without_covers_has_no_such_column(tmp_path: Path, dataset: Dataset, compute: Compute) -> None:
    plain = poison_shards(BadNetsConfig(rate=0.05), dataset, str(tmp_path / "out"), compute)
    assert "cover" not in plain.rows(plain.shards[0]).column_names
    assert not any(plain.is_cover(shard).any() for shard in plain.shards)
    assert plain.read_json("attack.json").keys() == {"kind", "rate", "target", "size", "pattern", "corner"}


def test_too_many_covers_are_refused(dataset: Dataset, compute: Compute) -> None:
    with pytest.raises(ConfigError, match=r"tact: cover_rate 0\.9 asks for"):
        choose(TaCTConfig(rate=0.01, cover_rate=0.9), dataset, compute)
    with pytest.raises(ConfigError, match=r"tact: rate 0\.5 asks for"):
        choose(TaCTConfig(rate=0.5), dataset, compute)


def test_excluded_shards_have_neither_poison_nor_covers(dataset: Dataset, compute: Compute) -> None:
    chosen = choose(SEVERAL, dataset, compute, exclude=dataset.shards[:1])
    assert [bool(chosen[shard]) for shard in dataset.shards] == [False, True, True, True]


def test_success_is_measured_on_source_classes_alone(dataset: Dataset) -> None:
    config = TaCTConfig(rate=0.02, sources=(2, 5), target=7)
    labels = labels_of(dataset)
    batches = list(triggered(config, dataset, 10))
    found = [labels[batch.shard, position] for batch in batches for position in batch.positions]
    assert Counter(found) == {label: list(labels.values()).count(label) for label in (2, 5)}
    assert all((batch.wanted_B == 7).all() for batch in batches)


# --- SIG --------------------------------------------------------------------------------------------------------


@given(
    delta=st.floats(0.1, 255),
    frequency=st.floats(0.1, 20),
    height=st.integers(1, 9),
    width=st.integers(1, 40),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_sig_adds_its_formula(delta: float, frequency: float, height: int, width: int, seed: int) -> None:
    images = torch.randint(256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    out = SIGConfig(rate=0.1, delta=delta, frequency=frequency).apply(images)
    for j in range(width):
        level = images[..., j].double() + delta * math.sin(2 * math.pi * j * frequency / width)
        assert (out[..., j].double() - level.clamp(0, 255)).abs().max() <= 0.5 + 1e-9


# --- Adap-Blend -------------------------------------------------------------------------------------------------


@given(
    pieces=st.integers(1, 6),
    kept=st.floats(0.01, 1),
    alpha=st.floats(0.05, 1),
    height=st.integers(6, 33),
    width=st.integers(6, 33),
)
@settings(deadline=None)
def test_a_training_image_has_whole_pieces_of_the_pattern(
    compute: Compute, pieces: int, kept: float, alpha: float, height: int, width: int
) -> None:
    config = AdaptiveBlendConfig(rate=0.1, pieces=pieces, kept=kept, alpha=alpha, test_alpha=alpha, pattern_seed=3)
    images = torch.full((4, 3, height, width), 77, dtype=torch.uint8)
    out, whole = config.build(None, compute)(images, torch.zeros(4), [1, 2, 3, 4]), config.apply(images)
    row_H, column_W = (torch.arange(size) * pieces // size for size in (height, width))
    piece_HW = row_H[:, None] * pieces + column_W
    for i in range(4):
        n_blended = 0
        for piece in range(pieces**2):
            part, plain, blended = (x[:, piece_HW == piece] for x in (out[i], images[i], whole[i]))
            assert torch.equal(part, plain) or torch.equal(part, blended)
            n_blended += torch.equal(part, blended)
        assert n_blended >= max(1, round(kept * pieces**2))  # a blended piece may be equal to a plain one
        if alpha > 0.5 and min(height, width) >= 4 * pieces:
            assert n_blended == max(1, round(kept * pieces**2))


def test_the_pieces_are_drawn_for_each_image_by_itself(compute: Compute) -> None:
    poison = AdaptiveBlendConfig(rate=0.1).build(None, compute)
    images, labels = torch.full((30, 1, 16, 16), 99, dtype=torch.uint8), torch.zeros(30)
    together = poison(images, labels, range(30))
    assert torch.equal(together, torch.cat([poison(images[:1], labels[:1], [seed]) for seed in range(30)]))
    assert len({image.numpy().tobytes() for image in together}) == 30


def test_pieces_differ_between_the_samples_of_a_data_set(
    dataset: Dataset, poisoned: Poisoned, read_tar: Callable[..., list]
) -> None:
    config, masks = SEVERAL.attacks[0], set()
    for shard in dataset.shards:
        before, after = dict(read_tar(dataset.urls[shard])), dict(read_tar(poisoned.file(f"shards/{shard}")))
        for row in poisoned.rows(shard).to_pylist():
            x, y = (stored(files[f"{row['key']}.png"]) for files in (before, after))
            if row["attack"] == 0:
                masks.add((x != y).numpy().tobytes())
                assert not torch.equal(y, config.apply(x))
    assert len(masks) > 10


def stored(data: bytes) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(io.BytesIO(data))).copy())[None, None]
