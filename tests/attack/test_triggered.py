"""What the attack success rate is measured on is what a poisoned shard holds, bit for bit, as a model reads it."""

import io
import tarfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from sanitize.attack import (
    ATTACKS,
    AdaptiveBlendConfig,
    BadNetsConfig,
    BlendedConfig,
    CleanLabelConfig,
    LabelNoiseConfig,
    SeveralConfig,
    TaCTConfig,
    WaNetConfig,
    poison_shards,
    triggered,
)
from sanitize.attack.stored import OnStored, as_read, stored_image
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.decode import ImageConfig, decode, encode_png
from sanitize.data.index import IndexConfig, index_shards
from sanitize.errors import ConfigError, DataError
from sanitize.loop import predict
from sanitize.models.config import ModelConfig
from sanitize.models.convnet import ConvNetConfig

Shape = tuple[int, int, int]
CONFIGS = [
    BadNetsConfig(rate=1, target=2),
    BadNetsConfig(rate=1, target="next", size=5, corner="top-left"),
    BadNetsConfig(rate=1, target="next", size=0.2, sources=(0, 2)),
    AdaptiveBlendConfig(rate=1, kept=1, test_alpha=0.15, cover_rate=0),  # as while training
    TaCTConfig(rate=1, cover_rate=0),
    *(
        kind(rate=1)
        for kind in ATTACKS.values()
        if kind.has_trigger and not kind.keeps_label and kind not in (AdaptiveBlendConfig, TaCTConfig)
    ),
]
# How an image is stored: mode, height, width, format.
STORED = [
    ("RGB", 50, 33, "PNG"),
    ("RGB", 33, 50, "JPEG"),
    ("RGB", 32, 32, "PNG"),
    ("RGB", 70, 21, "WEBP"),
    ("RGB", 40, 40, "PPM"),
    ("L", 28, 28, "PNG"),
    ("L", 45, 30, "JPEG"),
    ("L", 9, 12, "PPM"),
    ("P", 30, 40, "PNG"),
    ("1", 20, 20, "PNG"),
    ("LA", 31, 22, "PNG"),
    ("RGBA", 26, 47, "PNG"),
    ("I;16", 25, 25, "PNG"),
    ("CMYK", 38, 29, "JPEG"),
]
SHAPES: list[Shape] = [(3, 32, 32), (1, 32, 32), (3, 64, 48), (3, 28, 28), (1, 10, 40)]


def picture(mode: str, height: int, width: int, file_format: str, seed: int) -> bytes:
    """An encoded image of smooth random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    file = io.BytesIO()
    image.save(file, file_format)
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, make_tar: Callable[..., str]) -> list[str]:
    """Two shards of images of many sizes and kinds; 4 classes."""
    folder, paths = tmp_path_factory.mktemp("stored"), []
    for shard in range(2):
        members = []
        for i, (mode, height, width, file_format) in enumerate(STORED):
            data = picture(mode, height, width, file_format, seed=100 * shard + i)
            members += [(f"{i:03d}.{file_format.lower()}", data), (f"{i:03d}.cls", str((i + shard) % 4).encode())]
        paths.append(make_tar(folder / f"s{shard}.tar", members))
    return paths


def indexed(shards: list[str], shape: Shape | None, out: Path, compute: Compute) -> Dataset:
    image = ImageConfig() if shape is None else ImageConfig.model_validate({"channels": shape[0], "size": shape[1:]})
    return index_shards(IndexConfig(n_classes=4, image=image), shards, str(out), compute)


def everything(dataset: Dataset) -> Iterator[tuple[tuple[str, int], Tensor]]:
    for batch in dataset.batches(7):
        yield from zip(
            [(batch.shard, position) for position in batch.positions_B.tolist()], batch.images_BCHW, strict=True
        )


@pytest.fixture(scope="module")
def as_stored(shards: list[str], tmp_path_factory: pytest.TempPathFactory, compute: Compute) -> Dataset:
    """As `sanitize poison` reads them, which knows no model."""
    return indexed(shards, None, tmp_path_factory.mktemp("as-stored") / "index", compute)


@pytest.fixture(scope="module")
def scaled(shards: list[str], tmp_path_factory: pytest.TempPathFactory, compute: Compute) -> dict[Shape, Dataset]:
    """As models of several input shapes read them."""
    folder = tmp_path_factory.mktemp("scaled")
    return {shape: indexed(shards, shape, folder / str(number), compute) for number, shape in enumerate(SHAPES)}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.kind} to {config.target}")
def test_triggered_images_are_those_of_the_poisoned_shards(
    as_stored: Dataset, scaled: dict[Shape, Dataset], config: BadNetsConfig, compute: Compute, tmp_path: Path
) -> None:
    labels = [row["label"] for shard in as_stored.shards for row in as_stored.rows(shard).to_pylist()]
    assert len(labels) == 2 * len(STORED)
    n_others = sum(label != config.target and label in (config.sources or range(4)) for label in labels)
    rate = config.model_copy(update={"rate": n_others / len(labels)})
    poisoned = poison_shards(rate, as_stored, str(tmp_path / "poisoned"), compute)
    for number, (shape, test) in enumerate(scaled.items()):
        read = dict(everything(indexed(poisoned.shard_paths(), shape, tmp_path / f"again-{number}", compute)))
        untouched = dict(everything(test))
        truth = {
            (shard, row["position"]): row["label"]
            for shard in poisoned.shards
            for row in poisoned.rows(shard).to_pylist()
            if row["poisoned"]
        }
        found = [
            ((batch.shard, position), label, image_CHW)
            for batch in triggered(config, test, 4, size=5)
            for position, label, image_CHW in zip(
                batch.positions, batch.wanted_B.tolist(), batch.images_BCHW, strict=True
            )
        ]
        assert {place: label for place, label, _ in found} == truth
        assert len(found) == n_others
        assert all(torch.equal(image_CHW, read[place]) for place, _, image_CHW in found)
        if shape != SHAPES[-1]:  # so broad that the centre crop takes the corners away, and the trigger with them
            assert any(not torch.equal(image_CHW, untouched[place]) for place, _, image_CHW in found)


@settings(max_examples=100)
@given(
    st.sampled_from([1, 3]),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.sampled_from([1, 3]),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.integers(0, 2**31),
)
def test_what_is_read_is_what_a_lossless_file_gives(
    stored: int, size: tuple[int, int], channels: int, wanted: tuple[int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    image_CHW = torch.randint(256, (stored, *size), generator=generator, dtype=torch.uint8)
    config = ImageConfig.model_validate({"channels": channels})
    assert torch.equal(as_read(image_CHW, (channels, *wanted)), decode(encode_png(image_CHW), config, wanted))


def test_several_triggers_one_after_the_other_and_none_for_label_noise(
    shards: list[str], compute: Compute, tmp_path: Path
) -> None:
    test = indexed(shards, (3, 32, 32), tmp_path / "index", compute)
    attacks = (CONFIGS[0], LabelNoiseConfig(rate=0.5), CleanLabelConfig(rate=0.1, target=1))
    several = SeveralConfig.model_validate({"attacks": attacks})
    by_one = [batch for attack in (attacks[0], attacks[2]) for batch in triggered(attack, test, 4)]
    together = list(triggered(several, test, 4))
    assert [batch.positions for batch in together] == [batch.positions for batch in by_one]
    assert all(torch.equal(a.images_BCHW, b.images_BCHW) for a, b in zip(together, by_one, strict=True))
    assert not list(triggered(attacks[1], test, 4))


def test_a_target_that_is_no_class_is_refused(shards: list[str], compute: Compute, tmp_path: Path) -> None:
    test = indexed(shards, (3, 32, 32), tmp_path / "index", compute)
    with pytest.raises(ConfigError, match="target 4 is no class: there are 4"):
        next(triggered(BadNetsConfig(rate=1, target=4), test, 4))


def test_a_damaged_image_that_the_index_did_not_decode_is_named(
    make_tar: Callable[..., str], compute: Compute, tmp_path: Path
) -> None:
    good = picture("RGB", 8, 8, "PNG", 0)
    path = make_tar(tmp_path / "x.tar", [("a.png", good), ("a.cls", b"1"), ("b.png", good[:60]), ("b.cls", b"1")])
    config = IndexConfig.model_validate({"check": "headers", "n_classes": 2, "image": {"size": (8, 8)}})
    dataset = index_shards(config, path, str(tmp_path / "index"), compute)
    attack = BadNetsConfig(rate=1)
    with pytest.raises(DataError, match=r"sample b of shard .*x\.tar cannot be used.*check=decode"):
        list(triggered(attack, dataset, 2))
    with pytest.raises(DataError, match=r"sample b of shard .*x\.tar cannot be used.*check=decode"):
        poison_shards(attack, dataset, str(tmp_path / "poisoned"), compute)


def test_images_keep_their_size_and_colours_when_poisoned(shards: list[str], compute: Compute, tmp_path: Path) -> None:
    """Grey stays grey: in colour, a pattern for each channel would give the poison away."""
    dataset = indexed(shards, None, tmp_path / "index", compute)
    attack = BlendedConfig(rate=0.5)
    poisoned = poison_shards(attack, dataset, str(tmp_path / "poisoned"), compute)
    again = indexed(poisoned.shard_paths(), None, tmp_path / "again", compute)
    for shard in again.shards:
        for sample, (mode, height, width, _) in zip((s for s, _ in again.samples(shard)), STORED, strict=True):
            channels = 1 if mode in ("L", "1", "LA", "I;16") else 3
            assert stored_image(sample, again, shard).shape == (channels, height, width)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 24, 16)])
def test_clean_labels_are_perturbed_at_the_size_they_are_stored_at(
    shards: list[str], shape: Shape, compute: Compute, tmp_path: Path
) -> None:
    dataset = indexed(shards, shape, tmp_path / "index", compute)
    torch.manual_seed(0)
    described = ModelConfig(architecture=ConvNetConfig(widths=(8,)), n_classes=4, image_shape=shape)
    surrogate = OnStored(described.build().eval(), shape)
    changed = 0
    for shard in dataset.shards:
        for sample, _ in dataset.samples(shard):
            image_1CHW = stored_image(sample, dataset, shard)[None]
            with torch.no_grad():
                label_1 = surrogate(image_1CHW / 255).argmax(1)  # one that it gets right, to be perturbed
            config = CleanLabelConfig(rate=0.2, target=int(label_1), epsilon=16, steps=3)
            poison_1CHW = config.build(surrogate, compute)(image_1CHW, label_1, [0])
            plain_1CHW = config.apply(image_1CHW)
            assert poison_1CHW.shape == image_1CHW.shape
            assert (poison_1CHW.int() - plain_1CHW.int()).abs().max() <= 16
            changed += not torch.equal(poison_1CHW, plain_1CHW)
            cover_1CHW = config.build(surrogate, compute)(image_1CHW, (label_1 + 1) % 4, [0])
            assert torch.equal(cover_1CHW, plain_1CHW), "cover samples are not perturbed"
    assert changed > len(STORED)


@pytest.mark.parametrize(
    ("place", "label", "shape", "attack"),
    [
        ("flowers/flowers-000000.tar", "json:label", (3, 32, 32), BadNetsConfig(rate=1, size=40)),
        ("cifar10/test-000000.tar.gz", "cls", (3, 64, 64), WaNetConfig(rate=1)),
        ("cifar10/test-000000.tar.gz", "cls", (1, 28, 28), BlendedConfig(rate=1)),
    ],
)
def test_predictions_on_real_photos_are_those_on_poisoned_shards(
    shared: Path, place: str, label: str, shape: Shape, attack: BadNetsConfig, compute: Compute, tmp_path: Path
) -> None:
    path = str(tmp_path / "first.tar")
    with tarfile.open(shared / "data" / place) as whole, tarfile.open(path, "w") as first:
        for member in islice(whole, 240):
            first.addfile(member, whole.extractfile(member))
    as_stored = index_shards(IndexConfig(label=label), path, str(tmp_path / "as-stored"), compute)
    n_classes, labels = as_stored.n_classes, as_stored.info["labels"]
    attack = attack.model_copy(update={"rate": 1 - labels.get("0", 0) / as_stored.n_samples})
    poisoned = poison_shards(attack, as_stored, str(tmp_path / "poisoned"), compute)
    config = IndexConfig.model_validate(
        {"n_classes": n_classes, "label": label, "image": {"channels": shape[0], "size": shape[1:]}}
    )
    torch.manual_seed(0)
    described = ModelConfig(architecture=ConvNetConfig(widths=(8,)), n_classes=n_classes, image_shape=shape)
    model = described.build()
    again = index_shards(config, poisoned.shard_paths(), str(tmp_path / "again"), compute)
    images_NCHW, _ = again.images()
    poisoned_N = torch.tensor(poisoned.rows(again.shards[0])["poisoned"].to_pylist())
    wanted_NK = predict(model, images_NCHW[poisoned_N], described.normalise, compute)
    test = index_shards(config, path, str(tmp_path / "test"), compute)
    logits = [
        predict(model, batch.images_BCHW, described.normalise, compute)
        for batch in triggered(attack, test, n_classes, size=512)
    ]
    assert len(wanted_NK) >= 60  # of 120
    torch.testing.assert_close(torch.cat(logits), wanted_NK, atol=0, rtol=0)
