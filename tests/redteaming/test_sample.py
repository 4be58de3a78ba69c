"""A sample is the same however the data set is cut into shards, and nothing of it changes but keys."""

import hashlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sanitize.artifacts import verify
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.index import IndexConfig, index_shards
from sanitize.errors import ConfigError, DataError
from sanitize.redteaming import SampleConfig, Samples, sample_shards

Members = list[tuple[str, bytes]]
Cut = Callable[..., Dataset]
CONFIG = SampleConfig(n_train=12, n_test=5)


@pytest.fixture
def cut(tmp_path: Path, make_tar: Any, good: Any, compute: Compute) -> Cut:
    """30 samples cut into shards at some places, in some order: cut([10, 20]); more samples may follow."""

    def index(
        places: Sequence[int], order: int = 1, more: Members | None = None, check: str = "digest", n: int = 30
    ) -> Dataset:
        members, name = good(n), f"{'-'.join(map(str, places))}.{order}.{more is not None}"
        folder = tmp_path / name
        edges = [0, *places, n]
        for i, (start, stop) in enumerate(list(pairwise(edges))[::order]):
            make_tar(folder / f"s{i}.tar", members[2 * start : 2 * stop])
        if more:
            make_tar(folder / "x.tar", more)
        config = IndexConfig.model_validate({"check": check, "max_bad_fraction": 0.5})
        return index_shards(config, [str(folder)], str(tmp_path / f"index-{name}-{check}"), compute)

    return index


def payloads(samples: Samples, read_tar: Any, side: str) -> dict[str, tuple[bytes, bytes]]:
    """key -> image and label of every sample of a side."""
    found: dict[str, dict[str, bytes]] = {}
    for path in samples.paths(side):  # type: ignore[arg-type]
        for name, data in read_tar(path):
            key, _, suffix = name.partition(".")
            assert suffix not in found.setdefault(key, {}), "a key that was there already"
            found[key][suffix] = data
    return {key: (sample["png"], sample["cls"]) for key, sample in found.items()}


def test_the_sides_are_disjoint_and_every_byte_is_the_sources(
    cut: Cut, read_tar: Any, compute: Compute, tmp_path: Path
) -> None:
    dataset = cut([10, 20])
    samples = sample_shards(CONFIG, dataset, str(tmp_path / "out"), compute)
    source = {
        (key, *(hashlib.sha256(data).hexdigest() for data in (image, label)))
        for url in dataset.urls.values()
        for key, image, label in triples(read_tar(url))
    }
    train, test = (payloads(samples, read_tar, side) for side in ("train", "test"))
    assert (len(train), len(test)) == (12, 5)
    assert not {image for image, _ in train.values()} & {image for image, _ in test.values()}
    assert not train.keys() & test.keys()
    origins = samples.origins().to_pylist()
    assert [row["side"] for row in origins].count("train") == 12
    for row in origins:
        image, label = (train if row["side"] == "train" else test)[row["key"]]
        assert (
            row["original_key"],
            hashlib.sha256(image).hexdigest(),
            hashlib.sha256(label).hexdigest(),
        ) in source
    assert verify(tmp_path / "out") == []


def triples(members: Members) -> list[tuple[str, bytes, bytes]]:
    return [
        (image[0].partition(".")[0], image[1], label[1])
        for image, label in zip(members[::2], members[1::2], strict=True)
    ]


@pytest.mark.parametrize(("places", "order"), [([10, 20], -1), ([3], 1), ([1, 2, 29], -1)])
def test_how_the_data_is_cut_into_shards_decides_nothing(
    places: list[int], order: int, cut: Cut, read_tar: Any, compute: Compute, tmp_path: Path
) -> None:
    for name, dataset in (("one", cut([10, 20])), ("other", cut(places, order))):
        sample_shards(CONFIG, dataset, str(tmp_path / name), compute)
    for side in ("train", "test"):
        one, other = (
            sorted(payloads(Samples.load(tmp_path / name), read_tar, side).values()) for name in ("one", "other")
        )
        assert one == other


def test_the_seed_decides(cut: Cut, read_tar: Any, tmp_path: Path) -> None:
    dataset, found = cut([10, 20]), []
    for seed in (0, 1):
        samples = sample_shards(CONFIG, dataset, str(tmp_path / str(seed)), Compute(device="cpu", seed=seed))
        found.append(set(payloads(samples, read_tar, "train").values()))
    assert found[0] != found[1]


def test_copies_of_an_image_stand_on_one_side(
    cut: Cut, good: Any, read_tar: Any, compute: Compute, tmp_path: Path
) -> None:
    copies = good(30, prefix="copy")  # the same 30 images once more, under other keys
    dataset = cut([10, 20], more=copies)
    samples = sample_shards(SampleConfig(n_train=40, n_test=10), dataset, str(tmp_path / "out"), compute)
    train, test = ({image for image, _ in payloads(samples, read_tar, side).values()} for side in ("train", "test"))
    assert not train & test


def test_trusted_shards_keep_to_themselves(cut: Cut, read_tar: Any, compute: Compute, tmp_path: Path) -> None:
    samples = sample_shards(CONFIG, cut([10, 20]), str(tmp_path / "out"), compute, trusted=["s1.tar"])
    assert samples.trusted() == ("trusted-0000.tar",)
    of_train = {row["key"]: row["shard"] for row in samples.origins().to_pylist() if row["side"] == "train"}
    by_shard = {
        Path(path).name: {of_train[name.partition(".")[0]] for name, _ in read_tar(path)}
        for path in samples.paths("train")
    }
    assert by_shard == {"part-0000.tar": {"s0.tar", "s2.tar"}, "trusted-0000.tar": {"s1.tar"}}


def test_what_is_unreadable_is_left_out_and_small_data_is_shared(
    cut: Cut, make_png: Any, compute: Compute, tmp_path: Path
) -> None:
    dataset = cut([10, 20], more=[("bad.png", make_png(99)), ("bad.cls", b"not a class")])
    samples = sample_shards(SampleConfig(n_train=600, n_test=300), dataset, str(tmp_path / "out"), compute)
    assert samples.manifest().counts == {"train": 20, "test": 10}
    assert "bad" not in samples.origins()["original_key"].to_pylist()


def test_an_index_without_hashes_and_a_handful_of_samples_are_refused(
    cut: Cut, compute: Compute, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="check=digest"):
        sample_shards(CONFIG, cut([10], check="headers"), str(tmp_path / "a"), compute)
    with pytest.raises(DataError, match="2 usable samples"):
        sample_shards(CONFIG, cut([1], n=2), str(tmp_path / "b"), compute)
