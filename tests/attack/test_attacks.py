import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from sanitize.artifacts import verify
from sanitize.attack import (
    AttackConfig,
    BadNetsConfig,
    BlendedConfig,
    L0Config,
    L2Config,
    LabelNoiseConfig,
    Poisoned,
    SmoothConfig,
    TrojanSquareConfig,
    TrojanWatermarkConfig,
    WaNetConfig,
    choose,
    poison_shards,
)
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.digits import Digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.errors import ConfigError

ATTACKS: dict[str, AttackConfig] = {
    "badnets": BadNetsConfig(rate=0.05, target=3),
    "badnets, all-to-all": BadNetsConfig(rate=0.05, target="next", pattern="white", corner="top-left", size=2),
    "blended": BlendedConfig(rate=0.05, target=0, alpha=0.2),
    "blended, gaussian": BlendedConfig(rate=0.05, target="next", alpha=0.5, noise="gaussian", pattern_seed=3),
    "trojan square": TrojanSquareConfig(rate=0.05, target=2),
    "trojan watermark": TrojanWatermarkConfig(rate=0.05, target="next"),
    "smooth": SmoothConfig(rate=0.05, target=9),
    "l0": L0Config(rate=0.05, n_pixels=5),
    "l2": L2Config(rate=0.05, target="next", length=100),
    "wanet": WaNetConfig(rate=0.05, target=1, strength=4),
    "symmetric": LabelNoiseConfig(rate=0.3),
    "pairflip": LabelNoiseConfig(rate=0.3, noise="pairflip"),
}
every_attack = pytest.mark.parametrize("config", ATTACKS.values(), ids=ATTACKS.keys())


@pytest.fixture(scope="module")
def poisoned(
    tmp_path_factory: pytest.TempPathFactory, dataset: Dataset, compute: Compute
) -> Callable[[AttackConfig], Poisoned]:
    made: dict[str, Poisoned] = {}

    def make(config: AttackConfig) -> Poisoned:
        name = config.model_dump_json()
        if name not in made:
            made[name] = poison_shards(config, dataset, str(tmp_path_factory.mktemp("p") / "out"), compute)
        return made[name]

    return make


def pixels(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB"))


def stored(data: bytes) -> torch.Tensor:
    """The image as it is stored, (1, C, H, W): the digits are grey."""
    pixels_HWC = np.atleast_3d(np.asarray(Image.open(io.BytesIO(data)))).copy()
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None]


def truth_of(artifact: Poisoned) -> list[dict]:
    return [row | {"shard": shard} for shard in artifact.shards for row in artifact.rows(shard).to_pylist()]


@every_attack
def test_exactly_the_rate_is_poisoned_and_the_truth_says_which(
    digits: Digits, dataset: Dataset, poisoned: Callable, read_tar: Callable[..., list], config: AttackConfig
) -> None:
    artifact = poisoned(config)
    wanted = round(config.rate * dataset.n_samples)
    assert artifact.manifest().counts == {"samples": dataset.n_samples, "poisoned": wanted}
    truth = truth_of(artifact)
    assert sum(row["poisoned"] for row in truth) == wanted
    before, after = {}, {}
    for shard, path in zip(dataset.shards, digits.shards()[:4], strict=True):
        before[shard], after[shard] = dict(read_tar(path)), read_tar(artifact.file(f"shards/{shard}"))
        assert [name for name, _ in after[shard]] == list(before[shard])
        after[shard] = dict(after[shard])
    target = getattr(config, "target", None)
    assert all(row["attack"] == (0 if row["poisoned"] else -1) for row in truth)
    for row in truth:
        shard, key = row["shard"], row["key"]
        assert int(before[shard][f"{key}.cls"]) == row["original_label"]
        assert int(after[shard][f"{key}.cls"]) == row["label"]
        x, y = pixels(before[shard][f"{key}.png"]), pixels(after[shard][f"{key}.png"])
        if not row["poisoned"]:
            assert row["label"] == row["original_label"]
            np.testing.assert_array_equal(y, x)
            continue
        assert row["label"] != row["original_label"]
        assert 0 <= row["label"] < 10
        if target == "next" or getattr(config, "noise", "") == "pairflip":
            assert row["label"] == (row["original_label"] + 1) % 10
        elif target is not None:
            assert row["label"] == target
        if not config.has_trigger:
            np.testing.assert_array_equal(y, x)
        else:
            wanted_1CHW = config.apply(stored(before[shard][f"{key}.png"]))
            assert torch.equal(stored(after[shard][f"{key}.png"]), wanted_1CHW)
            assert (y != x).any()
    assert artifact.read_json("attack.json") == config.model_dump(mode="json")
    assert verify(Path(artifact.path)) == []


def test_a_data_set_without_labels_is_refused(digits: Digits, compute: Compute, tmp_path: Path) -> None:
    index = IndexConfig(label=None, n_classes=1)
    dataset = index_shards(index, digits.shards()[:1], str(tmp_path / "index"), compute)
    with pytest.raises(ConfigError, match="reads no labels"):
        poison_shards(ATTACKS["badnets"], dataset, str(tmp_path / "out"), compute)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [ATTACKS["badnets"], ATTACKS["symmetric"]], ids=["badnets", "symmetric"])
def test_the_choice_does_not_depend_on_order_grouping_or_run(
    tmp_path: Path, digits: Digits, dataset: Dataset, compute: Compute, poisoned: Callable, config: AttackConfig
) -> None:
    again = index_shards(IndexConfig(), digits.shards()[:4][::-1], str(tmp_path / "index"), compute)
    for shard in again.shards[::-1]:
        poison_shards(config, again, str(tmp_path / "out"), compute, shards=[shard])
    assert poison_shards(config, again, str(tmp_path / "out"), compute).digest == poisoned(config).digest
    other = choose(config, dataset, Compute(device="cpu", seed=1))
    mine = choose(config, dataset, compute)
    assert {(s, p) for s in mine for p in mine[s]} != {(s, p) for s in other for p in other[s]}


def test_the_choice_is_spread_over_shards_and_eligible_classes(dataset: Dataset, poisoned: Callable) -> None:
    rows = [row for row in truth_of(poisoned(ATTACKS["symmetric"])) if row["poisoned"]]
    assert set(Counter(row["shard"] for row in rows)) == set(dataset.shards)
    assert min(Counter(row["shard"] for row in rows).values()) > 0.15 * 100
    labels = Counter(row["original_label"] for row in rows)
    assert len(labels) == 10
    shifts = Counter((row["label"] - row["original_label"]) % 10 for row in rows)
    assert set(shifts) == set(range(1, 10))
    assert min(shifts.values()) > len(rows) / 9 / 4


@pytest.mark.parametrize("n_classes", [2, 3, 10])
def test_symmetric_flips_never_keep_the_label_and_reach_every_other(n_classes: int) -> None:
    labels = torch.arange(3000) % n_classes
    new = LabelNoiseConfig(rate=0.5).relabel(labels, n_classes, torch.Generator().manual_seed(0))
    assert (new != labels).all()
    pairs = Counter(zip(labels.tolist(), new.tolist(), strict=True))
    assert len(pairs) == n_classes * (n_classes - 1)
    assert min(pairs.values()) > 0.5 * 3000 / len(pairs)


# --- triggers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [8, 28])
@pytest.mark.parametrize("corner", ["top-left", "top-right", "bottom-left", "bottom-right"])
@pytest.mark.parametrize("pattern", ["checkerboard", "white"])
def test_the_patch_is_where_and_what_it_should_be_to_the_pixel(side: int, corner: str, pattern: str) -> None:
    config = BadNetsConfig(rate=0.1, size=3, corner=corner, pattern=pattern)  # type: ignore[arg-type]
    images = torch.randint(1, 255, (4, 3, side, side), dtype=torch.uint8)
    before = images.clone()
    out = config.apply(images)
    assert torch.equal(images, before)
    margin = 1 if side > 16 else 0
    first, last = margin, side - 3 - margin
    top, left = (first if "top" in corner else last), (first if "left" in corner else last)
    wanted = before.clone()
    for i in range(3):
        for j in range(3):
            wanted[:, :, top + i, left + j] = 255 if pattern == "white" or (i + j) % 2 == 0 else 0
    assert torch.equal(out, wanted)


def test_a_patch_larger_than_the_image_covers_it() -> None:
    out = BadNetsConfig(rate=0.1, size=9, pattern="white").apply(torch.zeros(1, 1, 4, 6, dtype=torch.uint8))
    assert (out[..., 2:] == 255).all()


@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0])
def test_blending_is_its_formula_with_one_fixed_pattern(noise: str, alpha: float) -> None:
    config = BlendedConfig(rate=0.1, alpha=alpha, noise=noise)  # type: ignore[arg-type]
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    pattern = BlendedConfig(rate=0.1, alpha=1.0, noise=noise).apply(images)  # type: ignore[arg-type]
    assert (pattern == pattern[0]).all()
    out = config.apply(images)
    wanted = (1 - alpha) * images.double() + alpha * pattern.double()
    assert (out.double() - wanted).abs().max() <= 0.5 + 0.5 * alpha + 1e-3
    other = BlendedConfig(rate=0.1, alpha=1.0, noise=noise, pattern_seed=1).apply(images)  # type: ignore[arg-type]
    assert not torch.equal(pattern, other)
    large = BlendedConfig(rate=0.1, alpha=1.0, noise=noise).apply(torch.zeros(1, 3, 200, 200, dtype=torch.uint8))  # type: ignore[arg-type]
    assert abs(float(large.float().mean()) - 127.5) < 2
    assert abs(float(large.float().std()) - (73.6 if noise == "uniform" else 62)) < 3


# --- edges ------------------------------------------------------------------------------------------------------


def test_unreadable_samples_are_left_out_and_other_members_carried_along(
    tmp_path: Path,
    make_tar: Callable[..., str],
    make_png: Callable[..., bytes],
    read_tar: Callable[..., list],
    compute: Compute,
) -> None:
    members = []
    for i in range(10):
        record = json.dumps({"y": i % 2, "caption": "kept"}).encode()
        members += [(f"d/{i}.jpg", make_png(i, format="JPEG")), (f"d/{i}.json", record), (f"d/{i}.pickle", b"\x80")]
    members.insert(0, ("bad.json", b"{}"))
    path = make_tar(tmp_path / "x.tar", members, format=tarfile.USTAR_FORMAT)
    dataset = index_shards(IndexConfig(label="json:y", max_bad_fraction=0.2), path, str(tmp_path / "index"), compute)
    artifact = poison_shards(BadNetsConfig(rate=0.2, target=1), dataset, str(tmp_path / "out"), compute)
    after = dict(read_tar(artifact.file("shards/x.tar")))
    assert list(after) == [f"d/{i}.{s}" for i in range(10) for s in ("png", "json", "pickle")]
    for row in truth_of(artifact):
        record = json.loads(after[f"{row['key']}.json"])
        assert record == {"y": row["label"], "caption": "kept"}
        assert after[f"{row['key']}.pickle"] == b"\x80"
    assert artifact.manifest().counts == {"samples": 10, "poisoned": 2}
    # The poisoned copy is itself a data set.
    again = index_shards(IndexConfig(label="json:y"), artifact.shard_paths(), str(tmp_path / "again"), compute)
    assert again.n_samples == 10


def test_only_samples_whose_label_changes_are_eligible(dataset: Dataset, compute: Compute, tmp_path: Path) -> None:
    n_target = dataset.info["labels"]["3"]
    most = (dataset.n_samples - n_target) / dataset.n_samples
    chosen = choose(BadNetsConfig(rate=most, target=3), dataset, compute)
    assert sum(map(len, chosen.values())) == dataset.n_samples - n_target
    with pytest.raises(ConfigError, match="eligible"):
        choose(BadNetsConfig(rate=most + 2 / dataset.n_samples, target=3), dataset, compute)
    with pytest.raises(ConfigError, match="10"):
        poison_shards(BadNetsConfig(rate=0.1, target=10), dataset, str(tmp_path / "out"), compute)
    with pytest.raises(ConfigError, match="target -1"):
        poison_shards(BlendedConfig(rate=0.1, target=-1), dataset, str(tmp_path / "out"), compute)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (BadNetsConfig, {"rate": 0}),
        (BadNetsConfig, {"rate": 1.1}),
        (BadNetsConfig, {"size": 0}),
        (BadNetsConfig, {"target": "previous"}),
        (BlendedConfig, {"alpha": 0}),
        (BlendedConfig, {"alpha": 1.5}),
        (LabelNoiseConfig, {"noise": "random"}),
        (LabelNoiseConfig, {"target": 1}),
    ],
)
def test_impossible_attacks_are_refused(kind: type, wrong: dict) -> None:
    with pytest.raises(ValidationError):
        kind(**({"rate": 0.1} | wrong))


def test_labels_are_written_where_they_were_read_and_the_picture_where_it_was(
    tmp_path: Path, make_tar: Callable[..., str], make_png: Callable[..., bytes], compute: Compute
) -> None:
    """A path in JSON, names of classes, one of two pictures."""
    names = ["cat", "dog", "ship"]
    members = [
        member
        for i in range(12)
        for member in (
            (f"{i:02d}.left.png", make_png(i)),
            (f"{i:02d}.right.png", make_png(100 + i)),
            (f"{i:02d}.json", json.dumps({"a": {"class": names[i % 3], "other": 1}}).encode()),
        )
    ]
    index = IndexConfig(label="json:a.class", classes="names", image={"member": "left.png"})
    dataset = index_shards(index, make_tar(tmp_path / "x.tar", members), str(tmp_path / "index"), compute)
    config = BadNetsConfig(rate=0.25, target=2, size=2)
    artifact = poison_shards(config, dataset, str(tmp_path / "out"), compute)
    again = index_shards(index, artifact.shard_paths(), str(tmp_path / "again"), compute)
    assert again.info["classes"] == names
    truth = truth_of(artifact)
    assert sum(row["poisoned"] for row in truth) == 3
    before, after = ({s.key: dict(s.members) for s, _ in one.samples("x.tar")} for one in (dataset, again))
    for row, label in zip(truth, again.rows("x.tar")["label"].to_pylist(), strict=True):
        old, new, key = before[row["key"]], after[row["key"]], row["key"]
        assert label == row["label"] == (2 if row["poisoned"] else int(key) % 3)
        assert json.loads(new[f"{key}.json"]) == {"a": {"class": names[label], "other": 1}}
        assert new[f"{key}.right.png"] == old[f"{key}.right.png"]
        changed = pixels(new[f"{key}.left.png"]) != pixels(old[f"{key}.left.png"])
        assert changed.any() == row["poisoned"]
    label = f"table:{tmp_path}/labels.csv#class"
    (tmp_path / "labels.csv").write_text("key,class\n" + "".join(f"{i:02d},{i % 2}\n" for i in range(12)))
    index = IndexConfig(label=label, image={"member": "left.png"})
    dataset = index_shards(index, str(tmp_path / "x.tar"), str(tmp_path / "tabled"), compute)
    with pytest.raises(ConfigError, match=r"index.label=table"):
        poison_shards(config, dataset, str(tmp_path / "no"), compute)
