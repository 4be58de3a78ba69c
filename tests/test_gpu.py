"""The same work on a CUDA device; skipped elsewhere. `make test-gpu` runs these."""

import time
from pathlib import Path
from typing import Literal

import pytest
import torch

from sanitize.artifacts import Artifact
from sanitize.attack import DMPoisoningConfig, PerturbConfig, dm_poison
from sanitize.compute import Compute
from sanitize.condensation import AggregateConfig, MatchingConfig, SiameseConfig, distribution_matching
from sanitize.condensation.aggregate import aggregate
from sanitize.condensation.distribution_matching import condense
from sanitize.condensation.pool import Pool
from sanitize.data.dataset import Dataset
from sanitize.embed import EmbedConfig, EmbedderConfig, embed_shards, train_embedder
from sanitize.loop import OptimConfig
from sanitize.models.convnet import ConvNetConfig
from sanitize.models.instance_convnet import InstanceConvNet, InstanceConvNetConfig

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


# --- condensation -------------------------------------------------------------------------------------------------


def striped_pool(per_class: int = 256) -> Pool:
    """Ten classes of noisy pictures of CIFAR-10's size, each with a bright stripe in another place."""
    images_KNCHW = torch.randint(0, 80, (10, per_class, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    for label, images_NCHW in enumerate(images_KNCHW):
        images_NCHW[:, :, 3 * label : 3 * label + 4] += 150
    first_K = per_class * torch.arange(10)
    return Pool(images_KNCHW.flatten(0, 1).to(torch.uint8), first_K, torch.full((10,), per_class))


@pytest.mark.parametrize("kind", ["mean", "calibrated", "median", "trimmed", "truncated"])
def test_aggregates_agree_with_the_cpu(
    kind: Literal["mean", "calibrated", "median", "trimmed", "truncated"],
) -> None:
    r_KND = torch.randn(10, 256, 512, generator=torch.Generator().manual_seed(0))
    r_KND[:, :20, :100] += 3  # one direction stands out: the power method has settled
    config = AggregateConfig(kind=kind)
    here_KD = aggregate(r_KND, config, torch.Generator().manual_seed(1))
    there_KD = aggregate(r_KND.cuda(), config, torch.Generator().manual_seed(1))
    torch.testing.assert_close(there_KD.cpu(), here_KD, rtol=1e-3, atol=1e-3)


def test_changes_agree_with_the_cpu() -> None:
    x_KBCHW = torch.randn(40, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    change = SiameseConfig().draw(40, (32, 32), torch.Generator().manual_seed(1))
    there_KBCHW = change.to(torch.device("cuda"))(x_KBCHW.cuda())
    torch.testing.assert_close(there_KBCHW.cpu(), change(x_KBCHW), rtol=1e-3, atol=1e-3)


def test_condensed_images_agree_with_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    redraw = InstanceConvNet.redraw

    def the_same_everywhere(network: InstanceConvNet, generator: torch.Generator) -> None:
        device = next(network.parameters()).device
        redraw(network.cpu(), torch.Generator().manual_seed(generator.initial_seed()))
        network.to(device)

    monkeypatch.setattr(InstanceConvNet, "redraw", the_same_everywhere)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    config = MatchingConfig(
        images_per_class=2,
        iterations=4,
        batch_size=32,
        architecture=InstanceConvNetConfig(widths=(16, 16)),
        aggregate=AggregateConfig(kind="mean"),  # where calibration draws its line a rounding decides
    )
    cpu, cuda = (condense(config, striped_pool(64), Compute(device=device)) for device in ("cpu", "cuda"))
    torch.testing.assert_close(cuda.images_KMCHW, cpu.images_KMCHW, rtol=1e-2, atol=1e-2)
    assert cuda.history[-1]["loss"] == pytest.approx(cpu.history[-1]["loss"], rel=1e-2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_condensation_learns_on_the_device(precision: Literal["float32", "bfloat16"]) -> None:
    config = MatchingConfig(images_per_class=2, iterations=200, learning_rate=5, batch_size=64)
    found = condense(config, striped_pool(), Compute(device="cuda", precision=precision))
    assert bool(found.images_KMCHW.isfinite().all())
    assert found.history[-1]["loss"] < 0.5 * found.history[0]["loss"]


def test_all_classes_at_once_are_faster_than_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    config, compute, pool = MatchingConfig(images_per_class=10, iterations=30), Compute(device="cuda"), striped_pool()

    def seconds() -> float:
        start = time.perf_counter()
        condense(config, pool, compute)  # ends with the images on the CPU: nothing is left running
        return time.perf_counter() - start

    seconds()
    at_once = min(seconds() for _ in range(3))
    monkeypatch.setitem(distribution_matching._AT_ONCE, "cuda", config.batch_size)
    seconds()
    one_by_one = min(seconds() for _ in range(3))
    print(f"iterations/s: all classes at once {30 / at_once:.0f}, one by one {30 / one_by_one:.0f}")
    assert at_once < one_by_one


def test_poison_made_on_the_device_lies_within_its_bound() -> None:
    images_NCHW = striped_pool().images_NCHW
    config = DMPoisoningConfig(perturb=PerturbConfig(eps=16, step=4, iterations=10, restarts=2))
    found_PCHW = dm_poison(images_NCHW[:32], images_NCHW[-1], config, Compute(device="cuda"))
    assert found_PCHW.device.type == "cpu"
    assert int((found_PCHW.int() - images_NCHW[:32].int()).abs().max()) == 16
