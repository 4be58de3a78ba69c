"""How robust is a network whose classes are centres, and what does PCA add to it?

    python -m benchmarks.mmc --quick [--first-seed 0] [--json FILE]     14 minutes on 2 cores

Li, Cheng, Su & Zhu, Table 3: cross-entropy (SCE), max-Mahalanobis centres (MMC), the same learned from images on their
first d principal components (MMC-P), and adversarial training with cross-entropy (PGD-AT: ten steps, radius 8 / 255).
Attacked are 300 test images in l_inf by PGD on the margin loss, away from the label (untargeted) or to a wrong class
drawn for each image (targeted), in 10 or 50 steps; the accuracy under attack is what still gets its true label. Radii
are 1, 2, 4, 8 / 255: of networks this small the table's 16, 24, 32 leave nothing to compare.

Quick: CIFAR-10, 8,000 images, d = 300. Targets: MMC-P > MMC > SCE, each attack's mean over the four radii. Exits
with 1 where one is missed.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.gradient_leaking import components_of, fit, modification, task
from benchmarks.report import conclude, print_table
from sanitize.compute import Compute
from sanitize.loop import predict
from sanitize.measure import EvasionConfig, accuracy, evade
from sanitize.models.convnet import ConvNetConfig
from sanitize.training import AdversaryConfig, MethodConfig
from sanitize.training.adversary import InputSpace
from sanitize.training.method import robust_objective

METHODS = {
    "SCE": MethodConfig(),
    "MMC": MethodConfig(loss="mmc"),
    "MMC-P": MethodConfig(loss="mmc"),
    "PGD-AT": MethodConfig(adversary=AdversaryConfig(kind="pgd", tau_x=8 / 255, steps=10)),
}
RADII = (1, 2, 4, 8)
N_ATTACKED = 300
CENTRE_LENGTH = 10.0


def attacks() -> dict[str, list[EvasionConfig]]:
    """The four attacks, each at four radii."""
    return {
        f"PGD-{steps}, {'targeted' if targeted else 'untargeted'}": [
            EvasionConfig(radius=radius / 255, steps=steps, loss="margin", targeted=targeted) for radius in RADII
        ]
        for steps in (10, 50)
        for targeted in (False, True)
    }


def one_run(method: str, seed: int) -> list[dict[str, Any]]:
    """The rows of one network: its accuracy as images are, and under each attack."""
    compute = Compute(device="cpu", seed=seed)
    compute.activate()
    start = time.process_time()
    of = task("cifar10", seed)
    network = of.network.model_copy(update={"architecture": ConvNetConfig(widths=(16, 32, 64))})
    # A smaller network than there, since adversarial training takes eleven times as long; centres take longer to learn.
    of = of._replace(network=network, optim=of.optim.model_copy(update={"epochs": 24}))
    config = METHODS[method]
    if config.loss == "mmc":
        of = of._replace(network=of.network.model_copy(update={"mmc": CENTRE_LENGTH}))
    space = InputSpace.images(of.network.mean, of.network.std)
    objective = robust_objective(config, compute, space)
    modify = modification(of, "pca", components_of(of), compute) if method == "MMC-P" else None
    model = fit(of, modify, compute, objective)
    images_NCHW, labels_N = of.test
    rows = []
    for attack, configs in attacks().items():
        row: dict[str, Any] = {"attack": attack, "method": method}
        row["clean"] = accuracy(predict(model, images_NCHW, lambda x_BCHW: x_BCHW, compute), labels_N)
        for radius, evasion in zip(RADII, configs, strict=True):
            worst_NCHW = evade(model, images_NCHW[:N_ATTACKED], labels_N[:N_ATTACKED], evasion, compute)
            logits_NK = predict(model, worst_NCHW, lambda x_BCHW: x_BCHW, compute)
            row[str(radius)] = accuracy(logits_NK, labels_N[:N_ATTACKED])
        rows.append(row | {"cpu_seconds": time.process_time() - start})
    return rows


def check(rows: list[dict[str, Any]]) -> list[str]:
    """The targets that were missed."""
    mean = {(row["attack"], row["method"]): sum(row[str(r)] for r in RADII) / len(RADII) for row in rows}
    missed = []
    for attack in attacks():
        values = [mean[attack, method] for method in ("SCE", "MMC", "MMC-P")]
        if values != sorted(set(values)):
            missed.append(f"{attack}: SCE < MMC < MMC-P, got {', '.join(f'{value:.3f}' for value in values)}")
    return missed


def main() -> None:
    """Two networks at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", required=True)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    start = time.perf_counter()
    rows = []
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(one_run, method, arguments.first_seed) for method in reversed(METHODS)]:
            rows += future.result()
            print(f"[{time.perf_counter() - start:5.0f} s] {rows[-1]['method']}", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: (list(attacks()).index(row["attack"]), list(METHODS).index(row["method"])))
    print_table(rows, ["attack", "method", "clean", *map(str, RADII)], "accuracy under attack, radius in 255ths")
    conclude(check(rows), arguments.json, start, rows=rows)


if __name__ == "__main__":
    main()
