"""An indexed shard read again in pieces gives the samples of the strict reader, or the place of a change."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.pieces import Piece
from sanitize.data.samples import Sample, ShardReader
from sanitize.errors import DataError

ANYTHING = IndexConfig(max_bad_fraction=1)
Good = Callable[..., list[tuple[str, bytes]]]


def directory(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def pieces_of(dataset: Dataset, shard: str = "x.tar") -> list[Piece | Sample]:
    return list(dataset.pieces(shard, dataset.rows(shard)))


def members_of(pieces: list[Piece | Sample]) -> list[tuple[int, str, list[tuple[str, bytes]], Any]]:
    samples = [s for piece in pieces for s in ([piece] if isinstance(piece, Sample) else piece.samples())]
    return [(s.position, s.key, s.members, s.sizes) for s in samples]


@pytest.mark.parametrize("check", ["decode", "digest", "headers"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_pieces_hold_the_samples_of_the_strict_reader(
    tmp_path: Path,
    make_tar: Callable[..., str],
    good: Good,
    compute: Compute,
    monkeypatch: pytest.MonkeyPatch,
    check: Any,
    form: int,
) -> None:
    """Plain runs between a directory, a long name, an unsafe one, two images, a large member and a double key."""
    monkeypatch.setattr("sanitize.data.pieces._PIECE_BYTES", 1 << 14)
    odd = [directory("d"), ("long/" * 40 + "a.png", b"?"), ("../b.png", b"?"), ("c.png", b"?"), ("c.jpg", b"?")]
    members = [*good(40), *odd, ("big.bin", bytes(100_000)), *good(40, "more"), *good(1), *good(3, "caf\xe9")]
    path = make_tar(tmp_path / "x.tar", members, "w", form)
    config = ANYTHING.model_copy(update={"check": check})
    pieces = pieces_of(index_shards(config, path, str(tmp_path / "index"), compute))
    assert members_of(pieces) == [(s.position, s.key, s.members, s.sizes) for s in ShardReader(path)]
    assert sum(len(piece.keys) for piece in pieces if isinstance(piece, Piece)) >= 60


def test_some_of_a_piece(tmp_path: Path, make_tar: Callable[..., str], good: Good, compute: Compute) -> None:
    dataset = index_shards(ANYTHING, make_tar(tmp_path / "x.tar", good(9)), str(tmp_path / "index"), compute)
    (piece,) = pieces_of(dataset)
    assert isinstance(piece, Piece)
    assert [sample.key for sample in piece.samples([1, 7])] == ["good0001", "good0007"]
    keep_K = np.arange(9) % 2 == 0
    kept = tarfile.open(fileobj=io.BytesIO(piece.normalised(keep_K) + bytes(1024)))  # noqa: SIM115
    assert [name for name in kept.getnames() if name.endswith("png")] == [f"good{i:04d}.png" for i in range(0, 9, 2)]


@pytest.mark.parametrize("check", ["digest", "headers"])
@pytest.mark.parametrize("what", ["more", "fewer", "other sizes", "other names", "other suffixes", "other bytes"])
def test_a_change_is_noticed(
    tmp_path: Path, make_tar: Callable[..., str], good: Good, compute: Compute, what: str, check: Any
) -> None:
    members = good(20)
    path = make_tar(tmp_path / "x.tar", members)
    config = ANYTHING.model_copy(update={"check": check})
    dataset = index_shards(config, path, str(tmp_path / "index"), compute)
    other = {
        "more": [*members, *good(1, "z")],
        "fewer": members[:-2],
        "other sizes": [*members[:-1], ("good0019.cls", b"00")],
        "other names": [(f"x{name[1:]}", data) for name, data in members],
        "other suffixes": [(name.replace(".png", ".jpeg"), data) for name, data in members],
        "other bytes": [(name, data[::-1]) for name, data in members],
    }[what]
    make_tar(tmp_path / "x.tar", other)
    with pytest.raises(DataError, match=r"x\.tar has changed since it was indexed"):
        pieces_of(dataset)


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
@pytest.mark.parametrize("odd", [False, True])
def test_no_batch_is_made_of_images_that_are_not_there(
    tmp_path: Path, make_tar: Callable[..., str], good: Good, compute: Compute, name: str, odd: bool
) -> None:
    """Keys and sizes as indexed, but an image has been replaced; also where samples are read one by one."""
    members = [*good(6), *([("é.txt", b"")] if odd else [])]
    mode = "w:gz" if name.endswith("gz") else "w"
    dataset = index_shards(ANYTHING, make_tar(tmp_path / name, members, mode), str(tmp_path / "index"), compute)
    make_tar(tmp_path / name, [(member.replace(".png", ".txt"), data) for member, data in members], mode)
    with pytest.raises(DataError, match=r"has changed since it was indexed \(at sample 0\)"):
        list(dataset.batches(2))
