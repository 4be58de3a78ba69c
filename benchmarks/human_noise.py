"""Are labels found that people got wrong? CIFAR-10N, majority of three people (Wei et al. 2022), beside cleanlab.

    python -m benchmarks.human_noise --quick [--first-seed 0] [--json FILE]     10,000 images, 5 minutes on 2 cores
    python -m benchmarks.human_noise --full [--json FILE]                       50,000 images, 9-layer CNN; for a GPU

What CIFAR-10 itself says is the truth; about 9 % of the given labels differ from it. Every sample is left out once in
K folds; standard training and PRL(L), tau twice the true share of wrong ones, learn from the others, without
augmentation. Scores of wrong labels, AUROC and average precision: from the probabilities of the network that had not
seen the sample, PRL's own measure, the length of softmax(o) - y, beside cleanlab's label quality scores
(normalized_margin is the given-label margin); the share of visits on which PRL(L) dropped the sample in the other
folds; and `label_margin`, a ridge on oriented gradients. `cleanlab.filter.find_label_issues` on the same probabilities
answers yes or no. Needs extra `baselines`. No targets.
"""

import argparse
import importlib.util
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from benchmarks.data import cifar10, cifar10n
from benchmarks.label_noise import build, fit, normalise
from benchmarks.report import conclude, print_table, quick_or_full
from sanitize.compute import Compute
from sanitize.data.tables import EmbeddingBatch
from sanitize.embed.label_free import oriented_gradients
from sanitize.loop import OptimConfig, predict
from sanitize.measure import accuracy, auroc
from sanitize.models.architectures import Architecture
from sanitize.models.cnn9 import CNN9Config
from sanitize.models.convnet import ConvNetConfig
from sanitize.score.label_margin import LabelMargin, LabelMarginConfig
from sanitize.training import Drops, zoo
from sanitize.training.losses import loss_gradient_norms

METHODS = ("standard", "prl_l")
QUALITIES = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")
WARMUP_EPOCHS = 5
OVERESTIMATE = 2.0


class Setting(NamedTuple):
    """What quick and full differ in."""

    n_folds: int
    network: Architecture
    optim: OptimConfig


QUICK = Setting(
    3,
    ConvNetConfig(widths=(16, 32, 64)),
    OptimConfig(optimizer="adam", learning_rate=3e-3, schedule="one_cycle", weight_decay=0, epochs=15, batch_size=128),
)


class People(NamedTuple):
    """Images (N, 3, 32, 32) uint8, labels that people gave, and true ones, (N,) int64."""

    images_NCHW: Tensor
    given_N: Tensor
    true_N: Tensor

    @property
    def wrong_N(self) -> np.ndarray:
        """Where people were wrong, (N,) bool."""
        return (self.given_N != self.true_N).numpy()


class Fold(NamedTuple):
    """What one training says: outputs (n, K) of the samples it left out, and of all N how often each was dropped and
    seen."""

    rows_n: Tensor
    logits_nK: Tensor
    dropped_N: Tensor
    seen_N: Tensor


def people(shards: Sequence[int]) -> People:
    """Some shards of the training images, 5,000 random images each."""
    images_NCHW, true_N = cifar10("train", shards)
    if not torch.equal(cifar10n("clean_label", shards), true_N):
        raise SystemExit("the labels of CIFAR-10N are not in the order of the images")
    return People(images_NCHW, cifar10n("aggre_label", shards), true_N)


def one_fold(of: People, setting: Setting, method: str, fold: int, compute: Compute) -> Fold:
    """Train without one fold, and predict it."""
    compute.activate()
    n = len(of.given_N)
    fold_N = torch.randperm(n, generator=compute.generator("benchmark", "folds")) % setting.n_folds
    rows_n, others_m = ((fold_N == fold).nonzero()[:, 0], (fold_N != fold).nonzero()[:, 0])
    config = zoo(OVERESTIMATE * float(of.wrong_N.mean()), WARMUP_EPOCHS)[method]
    split = of.images_NCHW[others_m], of.given_N[others_m]
    model = build(setting.network, config, split[0], compute)
    drops = Drops(len(others_m), compute.torch_device)
    fit(config, model, split, {}, setting.optim, compute, drops=drops)
    dropped_N, seen_N = (
        torch.zeros(n, dtype=torch.int32).index_put_((others_m,), counts_m.cpu())
        for counts_m in (drops.dropped_N, drops.seen_N)
    )
    return Fold(rows_n, predict(model, of.images_NCHW[rows_n], normalise, compute), dropped_N, seen_N)


def quick_fold(seed: int, method: str, fold: int) -> Fold:
    """In a process of its own, which reads the images itself."""
    torch.set_num_threads(1)
    return one_fold(people(quick_shards(seed)), QUICK, method, fold, Compute(device="cpu", seed=seed))


def quick_shards(seed: int) -> list[int]:
    """Two of the ten, by the seed."""
    return [2 * seed % 10, (2 * seed + 1) % 10]


def out_of_fold(folds: Sequence[Fold], n: int) -> Tensor:
    """Outputs (N, K), each of the network that had not seen the sample."""
    logits_NK = torch.zeros(n, 10)
    for fold in folds:
        logits_NK[fold.rows_n] = fold.logits_nK
    return logits_NK


def ridge_margins(of: People, compute: Compute) -> np.ndarray:
    """Scores of `label_margin` on oriented gradients, (N,)."""
    keys = [str(row) for row in range(len(of.given_N))]
    z_ND = oriented_gradients(of.images_NCHW, cells=7)
    batch = EmbeddingBatch("cifar10", torch.arange(len(keys)), keys, of.given_N, z_ND)
    scorer = LabelMargin(LabelMarginConfig())
    scorer.fit(lambda _name: [batch], compute)
    return scorer.score(batch).numpy()


def scores(of: People, folds: dict[str, list[Fold]], compute: Compute) -> dict[tuple[str, str], np.ndarray]:
    """(trained by, score) -> (N,), higher is more suspicious."""
    from cleanlab.rank import get_label_quality_scores

    found: dict[tuple[str, str], np.ndarray] = {}
    for method, parts in folds.items():
        logits_NK = out_of_fold(parts, len(of.given_N))
        p_NK = logits_NK.double().softmax(1).numpy()
        found[method, "PRL: ||softmax(o) - y||"] = loss_gradient_norms(
            logits_NK.double(), of.given_N, "cross_entropy"
        ).numpy()
        for name in QUALITIES:
            found[method, f"cleanlab: {name}"] = -get_label_quality_scores(of.given_N.numpy(), p_NK, method=name)
    dropped_N, seen_N = (torch.stack([part[i] for part in folds["prl_l"]]).sum(0) for i in (2, 3))
    found["prl_l", "PRL: share of visits dropped"] = (dropped_N / seen_N).nan_to_num().numpy()
    found["ridge", "label_margin"] = ridge_margins(of, compute)
    return found


def verdict(of: People, method: str, folds: Sequence[Fold]) -> dict[str, Any]:
    """What cleanlab would remove; and how good the predictions are, by given and by true labels."""
    from cleanlab.filter import find_label_issues

    logits_NK = out_of_fold(folds, len(of.given_N))
    found_N = find_label_issues(of.given_N.numpy(), logits_NK.double().softmax(1).numpy(), n_jobs=1)
    n_right = int((found_N & of.wrong_N).sum())
    return {
        "method": method,
        "true accuracy": accuracy(logits_NK, of.true_N),
        "given accuracy": accuracy(logits_NK, of.given_N),
        "wrong": int(of.wrong_N.sum()),
        "found": int(found_N.sum()),
        "precision": n_right / max(1, int(found_N.sum())),
        "recall": n_right / int(of.wrong_N.sum()),
    }


def report(of: People, folds: dict[str, list[Fold]], compute: Compute, start: float, json_file: Path | None) -> None:
    """Print both tables, and exit."""
    rows = [
        {"trained by": method, "score": name, "AUROC": auroc(suspicion_N, of.wrong_N)}
        | {"average precision": float(average_precision_score(of.wrong_N, suspicion_N))}
        for (method, name), suspicion_N in scores(of, folds, compute).items()
    ]
    title = f"wrong labels of CIFAR-10N: {len(of.given_N)} images, {of.wrong_N.mean():.2%} wrong"
    print_table(rows, list(rows[0]), title)
    verdicts = [verdict(of, method, parts) for method, parts in folds.items()]
    print_table(verdicts, list(verdicts[0]), "cleanlab.filter.find_label_issues")
    conclude([], json_file, start, checked=False, rows=rows, verdicts=verdicts)


def quick(arguments: argparse.Namespace) -> None:
    """All folds, two at a time."""
    start = time.perf_counter()
    seed = arguments.first_seed
    folds: dict[str, list[Fold]] = {}
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        jobs = [(m, pool.submit(quick_fold, seed, m, fold)) for m in METHODS for fold in range(QUICK.n_folds)]
        for method, future in jobs:
            folds.setdefault(method, []).append(future.result())
            print(f"[{time.perf_counter() - start:5.0f} s] {method}", file=sys.stderr, flush=True)
    report(people(quick_shards(seed)), folds, Compute(device="cpu", seed=seed), start, arguments.json)


def full(arguments: argparse.Namespace) -> None:
    """All shards, one fold after the other."""
    start = time.perf_counter()
    compute = Compute(seed=arguments.first_seed, precision="bfloat16" if torch.cuda.is_available() else "float32")
    of = people(range(math.ceil(arguments.images / 5_000)))
    setting = Setting(5, CNN9Config(width=arguments.width), QUICK.optim.model_copy(update={"epochs": arguments.epochs}))
    folds = {m: [one_fold(of, setting, m, fold, compute) for fold in range(setting.n_folds)] for m in METHODS}
    report(of, folds, compute, start, arguments.json)


def main() -> None:
    """Quick or full."""
    parser = quick_or_full(__doc__)
    parser.add_argument("--epochs", type=int, default=60, help="of --full")
    parser.add_argument("--width", type=int, default=128, help="of the 9-layer CNN of --full")
    arguments = parser.parse_args()
    if not importlib.util.find_spec("cleanlab"):
        raise SystemExit("cleanlab is missing: pip install 'sanitize[baselines]'")
    os.environ["OMP_NUM_THREADS"] = "1"
    (quick if arguments.quick else full)(arguments)


if __name__ == "__main__":
    main()
