"""What SimCLR's encoder is good for: `neighbours` in its embedding, and PRL-SimCLR-SN. Fashion-MNIST, 6,000 images.

    python -m benchmarks.simclr [--seed 0] [--only detect] [--rate 0.15] [--json FILE]     10 minutes of one core

Detection: AUROC of `neighbours` under 20 % symmetric label noise, and its recall at 5 % false positives on BadNets 10 %
(half of the target class is poison), in the encoder's `penultimate` beside the embeddings that need no training,
`gradients` (its default, nine windows) and `pixels`. Training (`--only train`): the share `--rate` of the images
with a patch and the label y + 1; accuracy on clean test images, and poison accuracy: on triggered ones, against their
true labels.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import fashion_mnist, write_images
from benchmarks.report import conclude, print_table
from sanitize.artifacts import Artifact
from sanitize.attack import AttackConfig, BadNetsConfig, LabelNoiseConfig, poison_shards
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.decode import ImageConfig
from sanitize.data.index import IndexConfig, index_shards
from sanitize.embed import EmbedConfig, SimCLRConfig, embed_shards, pretrain_simclr
from sanitize.loop import OptimConfig, predict
from sanitize.measure import accuracy, auroc, detection
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.convnet import ConvNetConfig
from sanitize.score import NeighboursConfig, fit_scorer, score_shards
from sanitize.training import MethodConfig, TrainConfig, train_robust, zoo

N_TRAIN = 6_000
N_TEST = 2_000
INDEX = IndexConfig(n_classes=10, image=ImageConfig(channels=1))
NETWORK = ConvNetConfig(widths=(16, 32, 64))
SIMCLR = SimCLRConfig(architecture=NETWORK, optim=OptimConfig(epochs=30, batch_size=256))
OPTIM = OptimConfig(epochs=20, batch_size=128)
HEAD_OPTIM = OPTIM.model_copy(update={"learning_rate": 0.03})  # one layer on small features takes larger steps
DETECTED: dict[str, AttackConfig] = {
    "flips 20 %": LabelNoiseConfig(rate=0.20),
    "badnets 10 %": BadNetsConfig(rate=0.10),
}
NEIGHBOURS = {
    "gradients": NeighboursConfig(),
    "gradients, 1 window": NeighboursConfig(windows=1),
    "pixels": NeighboursConfig(embedding="pixels", windows=1),
    "simclr": NeighboursConfig(embedding="penultimate", windows=1),
}


def corrupted(attack: AttackConfig, honest: Dataset, out: Path, compute: Compute) -> tuple[Dataset, np.ndarray]:
    """The data set after an attack, and which samples it touched."""
    poisoned = poison_shards(attack, honest, str(out / "poisoned"), compute)
    return index_shards(INDEX, poisoned.shard_paths(), str(out / "index"), compute), _column(poisoned, "poisoned")


def _column(tables: Any, name: str) -> np.ndarray:
    return np.concatenate([tables.rows(shard, [name])[name].to_numpy(zero_copy_only=False) for shard in tables.shards])


def detect(attack: AttackConfig, honest: Dataset, out: Path, compute: Compute) -> list[dict[str, Any]]:
    """One row an embedding."""
    dataset, truth_N = corrupted(attack, honest, out, compute)
    encoder = pretrain_simclr(SIMCLR, dataset, str(out / "encoder"), compute)
    embeddings = embed_shards(EmbedConfig(), dataset, encoder, str(out / "embeddings"), compute)
    rows = []
    for name, config in NEIGHBOURS.items():
        fitted = fit_scorer(config, embeddings, str(out / f"{name}-fitted"), compute)
        scores_N = _column(score_shards(config, fitted, embeddings, str(out / f"{name}-scores"), compute), "score")
        of = detection(scores_N > np.quantile(scores_N[~truth_N], 0.95), truth_N)
        rows.append({"embedding": name, "auroc": auroc(scores_N, truth_N), "recall": of.recall})
    return rows


def train(attack: BadNetsConfig, honest: Dataset, out: Path, compute: Compute) -> list[dict[str, Any]]:
    """Clean and poison accuracy, one row a method."""
    dataset, _ = corrupted(attack, honest, out, compute)
    encoder = pretrain_simclr(SIMCLR, dataset, str(out / "encoder"), compute)
    methods = zoo(tau=attack.rate + 0.15, warmup_epochs=5)  # overestimate rather than underestimate
    prl = methods["prl_l"]
    runs: dict[str, tuple[MethodConfig, Artifact | None, float | None]] = {
        "standard": (methods["standard"], None, None),
        "PRL(L)": (prl, None, None),
        "standard-SimCLR": (methods["standard"], encoder, None),
        "PRL-SimCLR": (prl, encoder, None),
        **{f"PRL-SimCLR-SN, k = {k:g}": (prl, encoder, k) for k in (5.0, 2.0)},
    }
    rows = []
    for name, (method, start, lipschitz) in runs.items():
        optim = OPTIM if start is None else HEAD_OPTIM
        config = TrainConfig(architecture=NETWORK, optim=optim, method=method, lipschitz=lipschitz)
        model = train_robust(config, dataset, str(out / name), compute, encoder=start)
        clean, poison = _accuracies(attack, model, compute)
        rows.append({"method": name, "clean": clean, "poison": poison})
    return rows


def _accuracies(attack: BadNetsConfig, checkpoint: Checkpoint, compute: Compute) -> tuple[float, float]:
    test_NCHW, truth_N = (tensor[:N_TEST] for tensor in fashion_mnist("t10k"))
    model, normalise = checkpoint.model(), checkpoint.config.normalise
    clean, poison = (
        accuracy(predict(model, images_NCHW, normalise, compute), truth_N)
        for images_NCHW in (test_NCHW, attack.apply(test_NCHW))
    )
    return clean, poison


def main() -> None:
    """Measure with one seed and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.15, help="poisoning rate of the patch")
    parser.add_argument("--only", choices=("detect", "train"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    start = time.perf_counter()
    compute = Compute(device="cpu", seed=arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        images_NCHW, labels_N = (tensor[:N_TRAIN] for tensor in fashion_mnist("train"))
        shards = write_images(Path(folder) / "shards", "train", images_NCHW, labels_N)
        honest = index_shards(INDEX, shards.paths(), f"{folder}/honest", compute)
        found = {}
        for name, attack in DETECTED.items() if arguments.only != "train" else ():
            found[name] = detect(attack, honest, Path(folder) / name, compute)
            print_table(found[name], ["embedding", "auroc", "recall"], f"neighbours: {name}")
        if arguments.only != "detect":
            patch = BadNetsConfig(rate=arguments.rate, target="next")
            found["patch"] = train(patch, honest, Path(folder) / "patch", compute)
            print_table(found["patch"], ["method", "clean", "poison"], f"patch {arguments.rate:.0%}, y + 1")
    conclude([], arguments.json, start, checked=False, **found)


if __name__ == "__main__":
    main()
