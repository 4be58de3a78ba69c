"""Repairs of models with a backdoor: attack success rate and accuracy after the repair, and after fine-tuning.

    python -m benchmarks.repair --quick [--first-seed 0] [--json FILE]     3 seeds, 10 minutes on 2 cores
    python -m benchmarks.repair --full [--images 50000] [--epochs 60] [--json FILE]     CIFAR-10, on a GPU
    python -m benchmarks.repair --timing [--images 50000] [--json FILE]     DRR on ResNet-18, I-BAU and fine-tuning

--quick: Fashion-MNIST, 12,000 images. DRR on a CNN 16-32-64 under BadNets 10 and 1 %, blended 10 %, BadNets
all-to-all 10 %, and untouched; `drr third_moment` is the method of the paper. I-BAU with 500 clean images on a
simplified VGG under BadNets and blended 10 %; `ibau direct` has no implicit term. For the first seed: a subset of
CIFAR-10, and the baselines. The clean images are not in the training data (100 of 500 are held out for the stopping
rule); ACC and ASR are measured on test images that no method sees. Per run: ACC and ASR after the repair, and again
after 2 epochs of fine-tuning on the same clean images.

--full: ResNet-18 and WRN-28-1 under BadNets, BadNets all-to-all, blended and clean-label attacks, 10 % (clean label:
8 %), ResNet-18 at 5 and 1 % too (DRR, Tables 1 and 3); the simplified VGG under the eight attacks of I-BAU's Table 1 at
20 % with 5,000 clean images, and with 100 (Table 5). Targets: mean ASR, and mean loss of ACC, at most the papers'.

--timing: DRR on an untrained ResNet-18 compared with a forward pass over the same images (target: at most 3 passes
without the search, which does not grow with the data); a round of I-BAU compared with an epoch of fine-tuning, on 400
images.

Exits with 1 where a target is missed.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.data import cifar10, fashion_mnist
from benchmarks.report import conclude, print_table, quick_or_full
from sanitize.attack import ATTACKS, Attack, BadNetsConfig
from sanitize.compute import Compute
from sanitize.data.shuffle import Resident
from sanitize.loop import OptimConfig, predict, train
from sanitize.measure import accuracy, attack_success_rate
from sanitize.models.architectures import Architecture
from sanitize.models.config import ModelConfig
from sanitize.models.convnet import ConvNetConfig
from sanitize.models.pixels import OnPixels
from sanitize.models.resnet import ResNetConfig
from sanitize.models.vgg import VGGConfig
from sanitize.repairs import (
    ANPConfig,
    BaseRepairConfig,
    CLPConfig,
    DRRConfig,
    EPConfig,
    FinePruningConfig,
    FineTuningConfig,
    IBAUConfig,
    NADConfig,
    NeuralCleanseConfig,
    Repaired,
    RepairInputs,
    in_memory,
    split_clean,
)

N_CLEAN, N_TEST = 500, 5000
KINDS = (
    "badnets",
    "all-to-all",
    "blended",
    "clean label",
    "l0",
    "l2",
    "smooth",
    "trojan square",
    "trojan watermark",
)
DRR: dict[str, BaseRepairConfig] = {
    "drr": DRRConfig(),
    "drr third_moment": DRRConfig(search="third_moment", projection="orthogonal", rank=1, layers=("features.norm2_0",)),
}
IBAU: dict[str, BaseRepairConfig] = {"ibau": IBAUConfig(), "ibau direct": IBAUConfig(implicit=False)}
BASELINES: dict[str, BaseRepairConfig] = {
    "fine-tuning": FineTuningConfig(),
    "fine-pruning": FinePruningConfig(),
    "clp": CLPConfig(),
    "ep": EPConfig(),
    "anp": ANPConfig(),
    "nad": NADConfig(),
    "neural cleanse": NeuralCleanseConfig(),
}
METHODS = DRR | IBAU | BASELINES
TUNING = OptimConfig(optimizer="adam", learning_rate=1e-3, schedule="constant", epochs=2, batch_size=50)


class Setting(NamedTuple):
    """Data, network, training and attacks of a suspect model, and its repairs; `methods` are names of `METHODS`."""

    data: str
    n_train: int
    architecture: Architecture
    optim: OptimConfig
    attacks: tuple[str, ...]
    methods: tuple[str, ...]
    n_clean: int = N_CLEAN


CNN = ConvNetConfig(widths=(16, 32, 64))
SMALL_VGG = VGGConfig(widths=(16, 32, 64))
QUICK = (
    Setting(
        "fashion",
        12_000,
        CNN,
        OptimConfig(),
        ("badnets 10 %", "badnets 1 %", "blended 10 %", "all-to-all 10 %", "untouched"),
        tuple(DRR),
    ),
    Setting("fashion", 12_000, SMALL_VGG, OptimConfig(), ("badnets 10 %", "blended 10 %"), tuple(IBAU)),
)
QUICK_ONCE = (  # for the first seed
    Setting("cifar10", 10_000, CNN, OptimConfig(), ("badnets 10 %", "blended 10 %"), ("drr",)),
    Setting("fashion", 12_000, CNN, OptimConfig(), ("badnets 10 %", "blended 10 %"), tuple(BASELINES)),
)
RESNET18 = ResNetConfig(widths=(64, 128, 256, 512), blocks_per_stage=2)
LONG = OptimConfig(optimizer="sgd", learning_rate=0.1, weight_decay=5e-4, epochs=60)
WRN_28_1 = ResNetConfig(blocks_per_stage=4)
TABLE_1 = ("badnets 10 %", "all-to-all 10 %", "blended 10 %", "clean label 8 %")
TABLE_3 = {
    "5 %": ("badnets 5 %", "all-to-all 5 %", "blended 5 %", "clean label 4 %"),
    "1 %": ("badnets 1 %", "all-to-all 1 %", "blended 1 %", "clean label 1 %"),
}
ONE_TARGET = tuple(f"{kind} 20 %" for kind in KINDS if kind not in ("all-to-all", "clean label"))
FULL = {
    "drr table 1, resnet18": Setting("cifar10", 50_000, RESNET18, LONG, (*TABLE_1, "untouched"), ("drr",)),
    "drr table 1, wrn-28-1": Setting("cifar10", 50_000, WRN_28_1, LONG, TABLE_1, ("drr",)),
    "drr table 3, 5 %": Setting("cifar10", 50_000, RESNET18, LONG, TABLE_3["5 %"], ("drr",)),
    "drr table 3, 1 %": Setting("cifar10", 50_000, RESNET18, LONG, TABLE_3["1 %"], ("drr",)),
    "ibau table 1": Setting("cifar10", 45_000, VGGConfig(), LONG, (*ONE_TARGET, "all-to-all 20 %"), ("ibau",), 5_000),
    "ibau table 5": Setting("cifar10", 45_000, VGGConfig(), LONG, ("badnets 20 %",), ("ibau",), 100),
}
# Results of the papers, mean over the attacks of a setting: ASR after the repair, and loss of ACC. Table 1 of DRR has
# one mean for both networks, with two more attacks; Table 5 of I-BAU does not report the suspect model.
PAPERS = {
    "drr table 1, resnet18": (0.0150, 0.0129),
    "drr table 1, wrn-28-1": (0.0150, 0.0129),
    "drr table 3, 5 %": (0.0130, 0.0039),
    "drr table 3, 1 %": (0.0245, 0.0013),
    "ibau table 1": (0.1053, 0.0225),
    "ibau table 5": (0.040, 1.0),
}


def trigger_of(attack: str) -> Attack | None:
    """The attack of this name, which ends with its rate."""
    if attack == "untouched":
        return None
    kind, rate, _ = attack.rsplit(" ", 2)
    if kind == "all-to-all":
        return BadNetsConfig(rate=float(rate) / 100, target="next")
    return ATTACKS[kind.replace(" ", "_")](rate=float(rate) / 100)


def run(setting: Setting, attack: str, seed: int, device: str = "cpu") -> list[dict[str, Any]]:
    """Poison, train, repair and fine-tune with one seed; one row for each method, the first for the suspect model."""
    compute = Compute(device=device, seed=seed)
    compute.activate()
    images, labels, test, test_labels = _data(setting)
    poisoned, given, truth_N = _poisoned(attack, images[: setting.n_train], labels[: setting.n_train], compute)
    config = ModelConfig(
        architecture=setting.architecture,
        n_classes=10,
        image_shape=tuple(images.shape[1:]),  # type: ignore[arg-type]
    )
    compute.seed_global("init")
    model = config.build()
    _train(model, config, poisoned, given, setting.optim, compute)
    clean_rows = slice(setting.n_train, setting.n_train + setting.n_clean)
    clean_data = images[clean_rows], labels[clean_rows]
    clean = split_clean(*clean_data, 0.2, compute.generator("held out"))
    inputs = RepairInputs(config, in_memory(poisoned, given, truth_N), clean)

    def measured(network: nn.Module) -> dict[str, float]:
        return _acc_asr(network, config, attack, test, test_labels, compute)

    def tuned(network: nn.Module) -> dict[str, float]:
        network = deepcopy(network)
        _train(network, config, *clean_data, TUNING, compute)
        return {f"{name}_tuned": value for name, value in measured(network).items()}

    common = {"data": setting.data, "network": _name(setting), "attack": attack, "seed": seed}
    before = measured(model)
    start = time.perf_counter()
    after_tuning = tuned(model)
    rows = [common | {"method": "none"} | before | after_tuning | {"tuning_seconds": time.perf_counter() - start}]
    for name in setting.methods:
        start = time.perf_counter()
        repaired = METHODS[name].build()(model, inputs, compute)
        seconds = time.perf_counter() - start
        row = common | {"method": name, "seconds": seconds, "acc_lost": before["acc"]} | measured(repaired.model)
        row["acc_lost"] -= row["acc"]
        rows.append(row | tuned(repaired.model) | {"done": repaired.done} | _brief(repaired))
    return rows


def _name(setting: Setting) -> str:
    network = {RESNET18: "resnet18", WRN_28_1: "wrn-28-1"}.get(setting.architecture, setting.architecture.kind)
    return network if setting.n_clean == N_CLEAN else f"{network}, {setting.n_clean} clean"


def _brief(repaired: Repaired) -> dict[str, Any]:
    done, seconds = repaired.done, repaired.seconds
    if "layers" in done:
        return {"search_s": seconds["search"], "removed": sum(layer["removed"] for layer in done["layers"])}
    if "rounds" not in done:
        return {}
    rounds = len(done["rounds"]) - 1
    return {"rounds": rounds, "taken": done["taken"], "round_s": seconds["total"] / max(1, rounds)}


def _data(setting: Setting) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images followed by clean images, and test images, with labels."""
    if setting.data == "fashion":
        images, labels = fashion_mnist("train")
        test, test_labels = fashion_mnist("t10k")
    else:
        n_shards = -(-(setting.n_train + setting.n_clean) // 5000)
        images, labels = cifar10("train", range(min(10, n_shards)))
        test, test_labels = cifar10("test")
    if len(labels) < setting.n_train + setting.n_clean:  # clean images are taken from the test set
        n = setting.n_clean
        images, labels = torch.cat([images, test[:n]]), torch.cat([labels, test_labels[:n]])
        test, test_labels = test[n:], test_labels[n:]
    n_test = min(N_TEST, setting.n_train)  # fewer only for a trial run with few --images
    return images, labels, test[:n_test], test_labels[:n_test]


def _poisoned(attack: str, images: Tensor, labels: Tensor, compute: Compute) -> tuple[Tensor, Tensor, Tensor]:
    """Images, given labels, and a mask of the poisoned samples."""
    truth_N = torch.zeros(len(labels), dtype=torch.bool)
    if (config := trigger_of(attack)) is None:
        return images, labels, truth_N
    generator = torch.Generator().manual_seed(compute.seed)
    wanted_N = config.relabel(labels, 10, generator)
    eligible = config.eligible(labels, wanted_N).nonzero()[:, 0]
    chosen = eligible[torch.randperm(len(eligible), generator=generator)[: round(config.rate * len(labels))]]
    images, labels = images.clone(), labels.clone()
    poison = config.build(_surrogate(images, labels, compute) if config.needs_surrogate else None, compute)
    images[chosen] = torch.cat([poison(images[rows], labels[rows], rows.tolist()) for rows in chosen.split(500)])
    labels[chosen], truth_N[chosen] = wanted_N[chosen], True
    return images, labels, truth_N


def _surrogate(images: Tensor, labels: Tensor, compute: Compute) -> OnPixels:
    """The attacker's network, trained on the clean data, against which images are perturbed."""
    shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
    config = ModelConfig(architecture=ConvNetConfig(widths=(32, 64, 128)), n_classes=10, image_shape=shape)
    compute.seed_global("surrogate")
    model = config.build()
    _train(model, config, images, labels, OptimConfig(epochs=10), compute)
    return OnPixels(model, config)


def _train(
    model: nn.Module, config: ModelConfig, images: Tensor, labels: Tensor, optim: OptimConfig, compute: Compute
) -> None:
    device = compute.torch_device
    data = Resident(images.to(device), labels.to(device), optim.batch_size, lambda n: compute.generator("order", n))
    train(model, data.epoch, data.steps_per_epoch, optim, compute, config.normalise)
    model.eval()


def _acc_asr(
    model: nn.Module, config: ModelConfig, attack: str, test: Tensor, labels: Tensor, compute: Compute
) -> dict[str, float]:
    found = {"acc": accuracy(predict(model, test, config.normalise, compute), labels)}
    if (trigger := trigger_of(attack)) is not None:
        logits = predict(model, trigger.apply(test), config.normalise, compute)
        found["asr"] = attack_success_rate(logits, labels, trigger.relabel(labels, 10, torch.Generator()))
    return found


def check(rows: list[dict[str, Any]]) -> list[str]:
    """Messages on the targets that were missed."""
    missed = []

    def expect(row: dict[str, Any], name: str, limit: float) -> None:
        if row[name] > limit:
            where = f"{row['data']} {row['attack']}, seed {row['seed']}, {row['method']}"
            missed.append(f"{where}: {name} <= {limit}, got {row[name]:.3f}")

    for row in rows:
        if row["data"] != "fashion":
            continue
        if row["method"] == "drr" and row["attack"].startswith("badnets"):
            expect(row, "asr", 0.05)
            expect(row, "acc_lost", 0.05)
            expect(row, "search_s", 1.0)
        if row["method"] == "drr" and row["attack"] == "untouched":
            expect(row, "acc_lost", 0.01)
        if row["method"] == "ibau":
            expect(row, "asr", 0.15)
            expect(row, "acc_lost", 0.05)
    return missed


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds; a suspect model that two settings share counts once."""
    groups: dict[tuple[str, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in ("data", "network", "attack", "method")), {})[row["seed"]] = row
    names = ("acc", "asr", "acc_tuned", "asr_tuned", "seconds", "search_s", "round_s", "removed", "rounds")
    return [
        dict(zip(("data", "network", "attack", "method"), group, strict=True))
        | {"seeds": len(runs)}
        | {name: float(np.mean([row[name] for row in runs])) for name in names if name in runs[0]}
        for group, runs in ((group, list(by_seed.values())) for group, by_seed in groups.items())
    ]


def check_full(rows: list[dict[str, Any]]) -> list[str]:
    """Messages on the results of the papers that were missed."""
    missed = []
    for setting, wanted in PAPERS.items():
        runs = [
            row
            for row in rows
            if row["setting"] == setting and row["method"] in ("drr", "ibau") and row["attack"] != "untouched"
        ]
        for name, limit in zip(("asr", "acc_lost"), wanted, strict=True):
            if runs and (got := float(np.mean([row[name] for row in runs]))) > limit:
                missed.append(f"{setting}: mean {name} <= {limit}, got {got:.4f}")
    return missed


def timing(n_images: int, device: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Seconds of repairs and of the passes to compare them with; messages on the targets that were missed."""
    compute = Compute(device=device)
    compute.activate()
    images, labels = cifar10("train", range(max(1, n_images // 5_000)))
    images, labels = images[:n_images], labels[:n_images]
    rows = []

    def network(architecture: Architecture) -> tuple[nn.Module, ModelConfig]:
        config = ModelConfig(architecture=architecture, n_classes=10, image_shape=(3, 32, 32))
        compute.seed_global("init")
        return config.build(), config

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()  # its result is on the CPU, so the device has finished
        return time.perf_counter() - start

    model, config = network(RESNET18)
    predict(model, images[:256], config.normalise, compute)  # warm-up: kernels are chosen
    pass_s = seconds(lambda: predict(model, images, config.normalise, compute))
    # A low tau removes directions of any data, so that all parts of the repair are measured.
    repair = DRRConfig(search="third_moment", tau=1e-6, n_starts=2, n_steps=10)
    repaired: list[Repaired] = []
    inputs = RepairInputs(config, in_memory(images, labels))
    drr_s = seconds(lambda: repaired.append(repair.build()(model, inputs, compute)))
    search = repaired[0].seconds["search"]
    rows.append({"what": "a forward pass of ResNet-18", "images": n_images, "seconds": pass_s})
    rows.append({"what": "DRR, all of it", "images": n_images, "seconds": drr_s, "times": drr_s / pass_s})
    rows.append({"what": "of it, the search", "images": n_images, "seconds": search})
    model, config = network(VGGConfig())
    clean = split_clean(images[:N_CLEAN], labels[:N_CLEAN], 0.2, compute.generator("held out"))
    unlearn = IBAUConfig(rounds=3, patience=3)
    round_s = seconds(lambda: unlearn.build()(model, RepairInputs(config, None, clean), compute)) / unlearn.rounds
    tuning = TUNING.model_copy(update={"epochs": 3})
    tuned = clean.images_NCHW, clean.labels_N
    epoch_s = seconds(lambda: _train(deepcopy(model), config, *tuned, tuning, compute)) / tuning.epochs
    n_learned = len(clean.labels_N)
    rows.append({"what": "an epoch of fine-tuning, simplified VGG", "images": n_learned, "seconds": epoch_s})
    rows.append(
        {
            "what": "a round of I-BAU",
            "images": n_learned,
            "seconds": round_s,
            "times": round_s / epoch_s,
        }
    )
    passes = (drr_s - search) / pass_s
    return rows, [f"DRR without its search <= 3 forward passes, got {passes:.2f}"] if passes > 3 else []


def main() -> None:
    """Run all settings and seeds, two at a time without a GPU, print the results, check the targets."""
    parser = quick_or_full(__doc__, "timing")
    parser.add_argument("--epochs", type=int, help="of --full; other results than those of the tables")
    parser.add_argument("--settings", nargs="+", choices=list(FULL), default=list(FULL), help="of --full")
    arguments = parser.parse_args()
    start = time.perf_counter()
    if arguments.timing:
        rows, missed = timing(arguments.images, "auto")
        print_table(rows, ["what", "images", "seconds", "times"], "seconds, and multiples of the row above")
        conclude(missed, arguments.json, start, rows=rows)
    rows = full(arguments) if arguments.full else quick(arguments.first_seed, start)
    columns = ["data", "network", "attack", "method", "seeds", "acc", "asr", "acc_tuned", "asr_tuned"]
    columns += ["seconds", "search_s", "round_s", "removed", "rounds"]
    print_table(summary(rows), columns, "repair: means over seeds; *_tuned: after 2 epochs of clean fine-tuning")
    conclude((check_full if arguments.full else check)(rows), arguments.json, start, rows=rows)


def full(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The tables of the papers, one network after the other."""
    rows = []
    for name in arguments.settings:
        setting = FULL[name]._replace(n_train=min(FULL[name].n_train, arguments.images))
        if arguments.epochs is not None:
            setting = setting._replace(optim=setting.optim.model_copy(update={"epochs": arguments.epochs}))
        for attack in setting.attacks:
            rows += [{"setting": name} | row for row in run(setting, attack, arguments.first_seed, "auto")]
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def quick(first: int, start: float) -> list[dict[str, Any]]:
    """Three seeds, two jobs at a time."""
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = [
        (setting, attack, seed) for seed in range(first, first + 3) for setting in QUICK for attack in setting.attacks
    ]
    jobs += [(setting, attack, first) for setting in QUICK_ONCE for attack in setting.attacks]
    rows = []
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        for job, future in [(job, pool.submit(run, *job)) for job in jobs]:
            rows += future.result()
            done = f"{job[0].data} {job[1]}, seed {job[2]}, {', '.join(job[0].methods)}"
            print(f"[{time.perf_counter() - start:5.0f} s] {done}", file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    main()
