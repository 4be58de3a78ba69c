"""The same work on a CUDA device; skipped elsewhere. `make test-gpu` runs these."""

from pathlib import Path

import pytest
import torch

from sanitize.artifacts import Artifact
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.embed import EmbedConfig, EmbedderConfig, embed_shards, train_embedder
from sanitize.loop import OptimConfig
from sanitize.models.convnet import ConvNetConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CONFIG = EmbedderConfig(architecture=ConvNetConfig(widths=(16, 32)), optim=OptimConfig(epochs=3, batch_size=64))


def rows(artifact: Artifact, name: str) -> torch.Tensor:
    return torch.cat([batch.z_BD for batch in artifact.batches(name)])  # type: ignore[attr-defined]


def test_embeddings_of_one_model_agree_with_the_cpu(dataset: Dataset, tmp_path: Path) -> None:
    cpu, cuda = Compute(device="cpu"), Compute(device="cuda")
    model = train_embedder(CONFIG, dataset, str(tmp_path / "model"), cpu)
    here = embed_shards(EmbedConfig(), dataset, model, str(tmp_path / "cpu"), cpu)
    there = embed_shards(EmbedConfig(), dataset, model, str(tmp_path / "cuda"), cuda)
    torch.testing.assert_close(rows(there, "pooled"), rows(here, "pooled"), rtol=1e-2, atol=1e-2)  # TF32 convolutions


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_learns_on_the_device(dataset: Dataset, tmp_path: Path, precision: str) -> None:
    compute = Compute(device="cuda", precision=precision)  # type: ignore[arg-type]
    model = train_embedder(CONFIG, dataset, str(tmp_path / "model"), compute)
    assert model.read_json("history.json")[-1]["accuracy"] > 0.5
