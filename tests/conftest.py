"""Fixtures that more than one file of tests needs: a small real data set carried through the stages, and hand-made
shards. Everything random is seeded, everything runs in one thread."""

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from sanitize.augment import AugmentConfig
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.digits import Digits, write_digits
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.tables import EmbeddingBatch, Embeddings, Scores
from sanitize.embed import EmbedConfig, EmbedderConfig, embed_shards, train_embedder
from sanitize.loop import OptimConfig
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.convnet import ConvNetConfig
from sanitize.score import SpectralConfig, fit_scorer, score_shards

# derandomize: the same examples on every machine, so that a red test is red everywhere.
settings.register_profile("sanitize", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("sanitize")

Members = Sequence[tuple[str, bytes]]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _leave_torch_as_it_was() -> Iterator[None]:
    """Stages switch torch to deterministic kernels; a test must not depend on which one ran before it."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def compute() -> Compute:
    return Compute(device="cpu")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of public data sets beside the checkout."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    return folder


# --- the digits, stage by stage ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the artifacts of the session lie; tests read them and write elsewhere."""
    return tmp_path_factory.mktemp("digits")


@pytest.fixture(scope="session")
def digits(home: Path, compute: Compute) -> Digits:
    return write_digits(str(home / "shards"), compute, n_shards=18)


@pytest.fixture(scope="session")
def dataset(home: Path, digits: Digits, compute: Compute) -> Dataset:
    """Four shards of about a hundred real images each."""
    return index_shards(IndexConfig(), digits.shards()[:4], str(home / "index"), compute)


@pytest.fixture(scope="session")
def embedder_config() -> EmbedderConfig:
    return EmbedderConfig(
        architecture=ConvNetConfig(widths=(8, 16)),
        optim=OptimConfig(epochs=3, batch_size=32, learning_rate=0.02),
        augment=AugmentConfig(),
        min_steps=1,
        max_steps=1,
    )


@pytest.fixture(scope="session")
def checkpoint(home: Path, dataset: Dataset, embedder_config: EmbedderConfig, compute: Compute) -> Checkpoint:
    return train_embedder(embedder_config, dataset, str(home / "embedder"), compute)


@pytest.fixture(scope="session")
def embeddings(home: Path, dataset: Dataset, checkpoint: Checkpoint, compute: Compute) -> Embeddings:
    return embed_shards(EmbedConfig(batch_size=64), dataset, checkpoint, str(home / "embeddings"), compute)


@pytest.fixture(scope="session")
def scores(home: Path, embeddings: Embeddings, compute: Compute) -> Scores:
    config = SpectralConfig()
    fitted = fit_scorer(config, embeddings, str(home / "scorer"), compute)
    return score_shards(config, fitted, embeddings, str(home / "scores"), compute)


# --- hand-made shards -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def make_png() -> Callable[..., bytes]:
    """Encoded noise, another picture for every seed: make_png(seed, size=(H, W), mode="RGB", format="PNG")."""

    def make(seed: int = 0, size: tuple[int, int] = (6, 6), mode: str = "RGB", format: str = "PNG") -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, format)
        return file.getvalue()

    return make


@pytest.fixture(scope="session")
def make_tar() -> Callable[..., str]:
    """Write an archive with Python's own tarfile: make_tar(path, members, mode="w", format=tarfile.USTAR_FORMAT).

    A member is (name, bytes), or a tarfile.TarInfo for what is no regular file. The path is given back as text.
    """

    def make(
        path: Path,
        members: Sequence[tuple[str, bytes] | tarfile.TarInfo],
        mode: str = "w",
        format: int = tarfile.USTAR_FORMAT,
    ) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, mode, format=format, errors="surrogateescape") as tar:  # type: ignore[call-overload]
            for member in members:
                if isinstance(member, tarfile.TarInfo):
                    tar.addfile(member)
                    continue
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
        return str(path)

    return make


@pytest.fixture(scope="session")
def read_tar() -> Callable[[str | Path], list[tuple[str, bytes]]]:
    """What Python's own tarfile finds in an archive, compressed or not: (name, payload) of each file, in order."""

    def read(path: str | Path) -> list[tuple[str, bytes]]:
        with tarfile.open(path) as tar:
            return [(m.name, tar.extractfile(m).read()) for m in tar if m.isreg()]  # type: ignore[union-attr]

    return read


@pytest.fixture(scope="session")
def good(make_png: Callable[..., bytes]) -> Callable[..., list[tuple[str, bytes]]]:
    """Members of `n` samples with nothing wrong: good(n, prefix="good", n_classes=2)."""

    def members(n: int, prefix: str = "good", n_classes: int = 2) -> list[tuple[str, bytes]]:
        return [
            member
            for i in range(n)
            for member in ((f"{prefix}{i:04d}.png", make_png(i)), (f"{prefix}{i:04d}.cls", b"%d" % (i % n_classes)))
        ]

    return members


# --- embeddings without a network -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def in_batches() -> Callable[..., list[EmbeddingBatch]]:
    """Rows as embedding batches: in_batches(z_ND, labels_N, size=64, shard="a.tar")."""

    def split(z_ND: torch.Tensor, labels_N: torch.Tensor, size: int = 64, shard: str = "a.tar") -> list[EmbeddingBatch]:
        positions_N = torch.arange(len(z_ND))
        return [
            EmbeddingBatch(shard, p_B, [f"{shard}-{i}" for i in p_B.tolist()], labels_N[p_B], z_ND[p_B].float())
            for p_B in positions_N.split(size)
        ]

    return split
