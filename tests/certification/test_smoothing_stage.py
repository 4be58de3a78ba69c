"""The stage: what it writes, and a run that is killed again and again."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from sanitize.artifacts import verify
from sanitize.certification import Certificates, CertifySmoothingConfig, certify_smoothing
from sanitize.certification.certificates import certified_accuracy
from sanitize.certification.smoothing import certify, lower_bound
from sanitize.certification.smoothing_stage import Journal
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.errors import ConfigError
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.pixels import OnPixels
from tests.killed import run_until_killed

SMALL = CertifySmoothingConfig(sigma=0.1, n0=20, n=100, max_images=40, batch_size=256)


@pytest.fixture(scope="module")
def certificates(
    dataset: Dataset, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory, compute: Compute
) -> Certificates:
    out = tmp_path_factory.mktemp("certificates") / "certificates"
    return certify_smoothing(SMALL, checkpoint, dataset, str(out), compute)


def test_rows_are_the_certificates_of_the_images(
    certificates: Certificates, dataset: Dataset, checkpoint: Checkpoint, compute: Compute
) -> None:
    assert verify(certificates.path) == []
    assert dict(certificates.manifest().counts)["samples"] == len(certificates.table()) == 40
    model = OnPixels(checkpoint.model(), checkpoint.config)
    for batch in dataset.batches(1000):
        rows = certificates.rows(batch.shard).to_pydict()
        at = [batch.keys.index(key) for key in rows["key"]]
        assert rows["position"] == batch.positions_B[at].tolist() == sorted(rows["position"])
        assert rows["label"] == batch.labels_B[at].tolist()
        found = certify(model, batch.images_BCHW[at], SMALL, compute)
        for name, wanted in zip(("prediction", "radius", "p_lower", "n_top", "n"), found, strict=True):
            np.testing.assert_array_equal(rows[name], wanted)


def test_neither_shards_apart_nor_more_images_change_a_row(
    certificates: Certificates, dataset: Dataset, checkpoint: Checkpoint, compute: Compute, tmp_path: Path
) -> None:
    for shard in reversed(dataset.shards):
        certify_smoothing(SMALL, checkpoint, dataset, str(tmp_path / "apart"), compute, shards=[shard])
    apart = certify_smoothing(SMALL, checkpoint, dataset, str(tmp_path / "apart"), compute)
    assert apart.digest == certificates.digest
    more = SMALL.model_copy(update={"max_images": 60})
    larger = certify_smoothing(more, checkpoint, dataset, str(tmp_path / "more"), compute).table().to_pylist()
    assert len(larger) == 60
    assert all(row in larger for row in certificates.table().to_pylist())


def test_all_images_are_taken_where_no_number_is_given(
    dataset: Dataset, checkpoint: Checkpoint, compute: Compute, tmp_path: Path
) -> None:
    config = SMALL.model_copy(update={"n0": 1, "n": 10, "max_images": None})
    found = certify_smoothing(config, checkpoint, dataset, str(tmp_path / "all"), compute)
    assert len(found.table()) == dataset.n_samples


@given(alpha=st.floats(1e-12, 0.49), n=st.integers(1, 60))
def test_settings_that_can_certify_nothing_are_refused_and_no_others(alpha: float, n: int) -> None:
    p_lower = float(lower_bound(n, n, alpha))  # all copies are of one class
    if p_lower > 0.5:
        config = CertifySmoothingConfig(sigma=0.5, n=n, alpha=alpha)
        assert config.largest_radius == pytest.approx(0.5 * float(scipy.special.ndtri(alpha ** (1 / n))), rel=1e-6)
        return
    with pytest.raises(ConfigError, match=f"with n = {n} no image can be certified") as error:
        CertifySmoothingConfig(sigma=0.5, n=n, alpha=alpha)
    smallest = int(re.findall(r"take n >= (\d+)", str(error.value))[0])
    assert lower_bound(smallest - 1, smallest - 1, alpha) <= 0.5 < lower_bound(smallest, smallest, alpha)


def test_too_few_copies_are_refused_before_the_model_is_read(
    checkpoint: Checkpoint, dataset: Dataset, compute: Compute, tmp_path: Path
) -> None:
    nothing = checkpoint.model_copy(update={"path": str(tmp_path / "nothing")})
    config = SMALL.model_copy(update={"n": 9})
    with pytest.raises(ConfigError, match=r"n = 9 .* alpha 0\.001, .* take n >= 10"):
        certify_smoothing(config, nothing, dataset, str(tmp_path / "out"), compute)
    assert not (tmp_path / "out").exists()


def test_a_certificate_says_the_largest_radius_there_can_be(certificates: Certificates) -> None:
    largest = certificates.statement["largest_radius"]
    assert largest == pytest.approx(0.1 * scipy.stats.norm.ppf(0.001 ** (1 / 100)))
    assert 0 < certificates.table()["radius"].to_numpy().max() <= largest + 1e-12
    assert "larger than 0.151" in certificates.statement["scope"]["statement"]


def test_certified_accuracy_by_hand() -> None:
    table = pa.table({"label": [0, 1, 2, 3], "prediction": [0, 1, -1, 0], "radius": [0.5, 0.2, 0.0, 0.9]})
    assert certified_accuracy(table, (0, 0.19, 0.2, 0.5), is_open=True) == [0.5, 0.5, 0.25, 0.0]
    assert certified_accuracy(table, (0, 0.19, 0.2, 0.5), is_open=False) == [0.5, 0.5, 0.5, 0.25]


KILLED = """
import os, signal, sys
from sanitize.certification import CertifySmoothingConfig, certify_smoothing
from sanitize.certification.smoothing_stage import Journal
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.models.checkpoint import Checkpoint

dataset, checkpoint, config, out, n = sys.argv[1:]
append, appended = Journal.append, 0

def counted(self, first, rows):
    global appended
    append(self, first, rows)
    appended += 1
    if appended == int(n):
        with self._path.open("ab") as file:
            file.write(b'[99,[{"position"')  # as if it had been in the middle of the next line
        os.kill(os.getpid(), signal.SIGKILL)

Journal.append = counted
config = CertifySmoothingConfig.model_validate_json(config)
certify_smoothing(config, Checkpoint.load(checkpoint), Dataset.load(dataset), out, Compute(device="cpu", threads=1))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_digest(
    certificates: Certificates,
    dataset: Dataset,
    checkpoint: Checkpoint,
    compute: Compute,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "certificates"
    for n in (3, 2):  # groups: two images each, so that the first kill is in the middle of the first shard
        run_until_killed(KILLED, dataset.path, checkpoint.path, SMALL.model_dump_json(), str(out), str(n))
        assert not out.exists()
    again: list[int] = []
    append = Journal.append

    def counted(self: Journal, first: int, rows: list) -> None:
        again.append(len(rows))
        append(self, first, rows)

    monkeypatch.setattr(Journal, "append", counted)
    found = certify_smoothing(SMALL, checkpoint, dataset, str(out), compute)
    assert found.digest == certificates.digest
    assert found.table().equals(certificates.table())
    assert sum(again) <= 40 - 2 * 4  # what five groups had was not done again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["certificates"]


def test_a_journal_gives_back_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "journal" / "a.tar.jsonl"
    journal = Journal(path)
    assert dict(journal.read()) == {}
    rows = [{"key": "ä", "radius": 0.1 + 0.2}]
    journal.append(0, rows)
    journal.append(5, rows)
    whole = path.read_bytes()
    for end in range(len(whole) // 2 + 1, len(whole)):
        path.write_bytes(whole[:end])
        assert dict(journal.read()) == {0: rows}
        assert path.read_bytes() == whole[: len(whole) // 2]  # so that what is appended begins a line
    for broken in (b"\0" * 40 + b"\n", b"[1]\n", b"7\n", b'{"a": 1\n'):
        path.write_bytes(whole + broken + json.dumps([9, rows]).encode() + b"\n")
        assert dict(journal.read()) == {0: rows, 5: rows}
