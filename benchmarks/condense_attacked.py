"""Can 1 % of poison in the data steer what networks learn from a condensed set, and does calibration stop it?

    python -m benchmarks.condense_attacked --quick [--attacks dm direct gradients] [--json FILE]
    python -m benchmarks.condense_attacked --full  [--targets 5] [--runs 5] [--iterations 20000]

As in Zheng & Li, RDM-DC, section 5.1: of the data set 1 % is poisoned, all of it in one class, which a test image of
another class, the target, is to be taken for. `dm` is DM poisoning and `gradients` gradient matching, both within 64 of
255 levels; `direct` puts the target itself there. Then the set is condensed by distribution matching, with the plain
mean (DM) or the calibrated one (RDM-DC, eps = .1, the rate within the class), and networks learn from it.
--full is CIFAR-10 with 50 images a class, beside them Table 2's other aggregates, and wants a GPU. --quick is
Fashion-MNIST with 10 images a class, blocks of width 32, and less of everything: 3 targets, 1 run, 150 iterations with
64 real images of each class.

What poison in one class does to the condensed images of the others is nothing: they share the extractors and no more
(`tests/condensation/test_distribution_matching.py`). So each run condenses the clean data set once, and for every
target and attack the attacked class again.

ASR          share of the networks that give the target the attacker's label; of each set 3 learn in --quick, one in
             --full. In the rows without an attack: how often that happens by itself.
log10 p      p is the probability they give that label: it moves before ASR does.
deviation    distance of what stands for the attacked class from the mean of the clean one, before any condensing: mean
             over 20 extractors and changes, 256 images each. Calibration deviates without poison too.
steered      the part of it that poison adds in the direction of the target, over the distance of the target: for the
             plain mean and the direct attack that is the rate within the class.

Exits with 1 where a target is missed: ASR 0 with the calibrated mean, which is steered half as far as the plain one at
most, and is within 2 points of it in accuracy; --full: accuracies within 1.5 points of the source's.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.data import cifar10, fashion_mnist
from benchmarks.report import conclude, print_table, quick_or_full
from sanitize.attack import (
    DMPoisoningConfig,
    GradientMatchingConfig,
    PerturbConfig,
    direct_attack,
    dm_poison,
    match_gradients,
    plant,
)
from sanitize.compute import Compute
from sanitize.condensation import AggregateConfig, EvaluateConfig, MatchingConfig, SiameseConfig
from sanitize.condensation.aggregate import aggregate
from sanitize.condensation.distribution_matching import condense
from sanitize.condensation.evaluate import learn_from
from sanitize.condensation.pool import Pool
from sanitize.data.shuffle import Resident
from sanitize.loop import OptimConfig, predict, train
from sanitize.measure import accuracy
from sanitize.models.config import ModelConfig
from sanitize.models.instance_convnet import InstanceConvNet, InstanceConvNetConfig

RATE = 0.01
KINDS: dict[str, dict[str, Any]] = {
    "DM": {"kind": "mean"},
    "median": {"kind": "median"},
    "trimmed": {"kind": "trimmed", "margin": 3},
    "truncated": {"kind": "truncated", "margin": 3},
    "RDM-DC": {"kind": "calibrated"},
}
# Table 2, accuracy under DM poisoning
SOURCE = {"DM": 59.25, "median": 44.08, "trimmed": 51.14, "truncated": 57.04, "RDM-DC": 57.65}


class Setting(NamedTuple):
    """How much is done; `architecture`, `mean` and `std` are those of extractors and networks alike."""

    architecture: InstanceConvNetConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]
    images_per_class: int
    iterations: int
    learning_rate: float
    batch_size: int
    n_targets: int
    n_runs: int
    perturb: PerturbConfig
    learn: EvaluateConfig
    n_trained: int  # networks that gradient matching knows
    sets: tuple[str, ...]  # of KINDS; DM and RDM-DC among them

    def network(self, images_NCHW: Tensor) -> ModelConfig:
        """What learns from condensed images."""
        channels, height, width = images_NCHW.shape[1:]
        return ModelConfig(
            architecture=self.architecture,
            n_classes=10,
            image_shape=(channels, height, width),
            mean=self.mean,
            std=self.std,
        )

    def matching(self, name: str) -> MatchingConfig:
        """DM or RDM-DC."""
        return MatchingConfig(
            images_per_class=self.images_per_class,
            iterations=self.iterations,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            architecture=self.architecture,
            aggregate=AggregateConfig.model_validate({"eps": 10 * RATE} | KINDS[name]),
            mean=self.mean,
            std=self.std,
        )


QUICK = Setting(
    architecture=InstanceConvNetConfig(widths=(32, 32, 32)),
    mean=(0.2861,),
    std=(0.353,),
    images_per_class=10,
    iterations=150,
    learning_rate=50.0,  # 5 M: gradients are spread over the images of a class
    batch_size=64,
    n_targets=3,
    n_runs=1,
    perturb=PerturbConfig(eps=64, step=4, iterations=50, restarts=1),
    learn=EvaluateConfig(
        optim=OptimConfig(optimizer="sgd", learning_rate=0.03, schedule="cosine", weight_decay=5e-4, epochs=100),
        n_networks=3,
        check_every=10,
    ),
    n_trained=2,
    sets=("DM", "RDM-DC"),
)
FULL = Setting(
    architecture=InstanceConvNetConfig(widths=(128, 128, 128)),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    images_per_class=50,
    iterations=20_000,
    learning_rate=1.0,
    batch_size=256,
    n_targets=5,
    n_runs=5,
    perturb=PerturbConfig(eps=64),
    learn=EvaluateConfig(n_networks=1),
    n_trained=16,
    sets=tuple(KINDS),
)


class Data(NamedTuple):
    """Training images class by class; those that are held out of them to choose the epoch of a network; and the test
    images that accuracy is measured on and targets are taken from."""

    images_NCHW: Tensor
    labels_N: Tensor
    held_out: tuple[Tensor, Tensor]
    test_NCHW: Tensor
    test_N: Tensor

    def pool(self) -> Pool:
        """All training images; copies of one image count as often as they are there."""
        count_K = self.labels_N.bincount()
        return Pool(self.images_NCHW, count_K.cumsum(0) - count_K, count_K)


class Target(NamedTuple):
    """A test image (C, H, W), its label, and the one it is to get."""

    image_CHW: Tensor
    label: int
    adversarial: int


def load(train_images: tuple[Tensor, Tensor], test_images: tuple[Tensor, Tensor], n_test: int, seed: int) -> Data:
    """Test images are drawn by the seed."""
    draws = Compute(seed=seed).generator("benchmark", "test")
    drawn_N = torch.randperm(len(test_images[1]), generator=draws)[:n_test]
    order_N = train_images[1].argsort(stable=True)
    labels_N = train_images[1][order_N]
    end_K = labels_N.bincount().cumsum(0)[labels_N]
    is_held_N = torch.arange(len(labels_N)) >= end_K - EvaluateConfig().held_out
    held_N, order_N = order_N[is_held_N], order_N[~is_held_N]
    return Data(
        train_images[0][order_N],
        train_images[1][order_N],
        (train_images[0][held_N], train_images[1][held_N]),
        test_images[0][drawn_N],
        test_images[1][drawn_N],
    )


def draw_targets(data: Data, n: int, seed: int) -> list[Target]:
    """Test images, each with a label that is not its own; of every `seed + i` one."""
    targets = []
    for number in range(seed, seed + n):
        draws = Compute(seed=number).generator("benchmark", "target")
        row = int(torch.randint(len(data.test_N), (), generator=draws))
        label = int(data.test_N[row])
        targets.append(
            Target(data.test_NCHW[row], label, (label + int(torch.randint(1, 10, (), generator=draws))) % 10)
        )
    return targets


# --- the attacker -------------------------------------------------------------------------------------------------


def trained_networks(data: Data, setting: Setting, compute: Compute) -> list[nn.Module]:
    """What gradient matching knows: networks that were trained on clean data, the first for one epoch, and so on."""
    model_config = setting.network(data.images_NCHW)
    networks = []
    device = compute.torch_device
    images_NCHW, labels_N = data.images_NCHW.to(device), data.labels_N.to(device)
    for number in range(setting.n_trained):
        compute.seed_global("attacker", number)
        order = partial(compute.generator, "attacker", "order", number)
        batches = Resident(images_NCHW, labels_N, 256, order)
        network = model_config.build()
        optim = OptimConfig(optimizer="sgd", learning_rate=0.01, schedule="constant", epochs=number + 1, batch_size=256)
        train(network, batches.epoch, batches.steps_per_epoch, optim, compute, model_config.normalise)
        networks.append(network)
    return networks


def crafts(
    attack: str, target: Target, data: Data, setting: Setting, networks: Sequence[nn.Module], compute: Compute
) -> Callable[[Tensor], Tensor]:
    """What becomes of images of the attacked class."""
    if attack == "direct":
        return partial(direct_attack, target_CHW=target.image_CHW)
    if attack == "dm":
        knows = {"architecture": setting.architecture, "mean": setting.mean, "std": setting.std}
        of_dm = DMPoisoningConfig.model_validate({"perturb": setting.perturb, **knows})
        return lambda images_PCHW: dm_poison(images_PCHW, target.image_CHW, of_dm, compute)
    matching, network = GradientMatchingConfig(perturb=setting.perturb), setting.network(data.images_NCHW)
    label = target.adversarial
    return lambda images_PCHW: match_gradients(
        networks, images_PCHW, target.image_CHW, label, matching, network, compute
    )


# --- what stands for the class ------------------------------------------------------------------------------------


@torch.no_grad()
def deviations(
    clean_NCHW: Tensor, dirty_NCHW: Tensor, target: Target, setting: Setting, compute: Compute, n_draws: int = 20
) -> dict[str, dict[str, float]]:
    """Of each aggregate how far it is from the clean mean, and how much of that leads to the target."""
    device, network = compute.torch_device, setting.network(clean_NCHW)
    extractor = InstanceConvNet(setting.architecture, 10, network.image_shape).to(device)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in setting.sets}
    for number in range(n_draws):
        draws = compute.generator("benchmark", "deviation", number)
        extractor.redraw(compute.generator("benchmark", "extractor", number, device=device))
        change = SiameseConfig().draw(1, network.image_shape[1:], draws).to(device)
        drawn_N = torch.randint(len(clean_NCHW), (256,), generator=draws)
        images_XCHW = torch.cat([clean_NCHW[drawn_N], dirty_NCHW[drawn_N], target.image_CHW[None]]).to(device)
        x_XCHW = change(network.normalise(images_XCHW)[None])[0]
        r_XD = torch.cat([extractor.features(part) for part in x_XCHW.split(64)])
        clean_ND, dirty_ND, target_D = r_XD[:256], r_XD[256:512], r_XD[512]
        mean_D = clean_ND.mean(0)
        way_D = target_D - mean_D
        for name in setting.sets:
            config = setting.matching(name).aggregate
            found_D, without_D = (
                aggregate(of_ND[None], config, torch.Generator().manual_seed(number))[0]
                for of_ND in (dirty_ND, clean_ND)
            )
            rows[name].append(
                {
                    "deviation": float((found_D - mean_D).norm()),
                    "deviation, clean": float((without_D - mean_D).norm()),
                    "steered": float((found_D - without_D) @ way_D / way_D.square().sum()),
                }
            )
    return {name: {key: mean(row[key] for row in of) for key in of[0]} for name, of in rows.items()}


# --- what networks learn ------------------------------------------------------------------------------------------


def learned(
    images_KMCHW: Tensor, data: Data, setting: Setting, network: ModelConfig, compute: Compute
) -> list[nn.Module]:
    """Networks that saw these images alone."""
    labels_N = torch.arange(len(images_KMCHW)).repeat_interleave(images_KMCHW.shape[1])
    numbers = range(setting.learn.n_networks)
    images_NCHW = images_KMCHW.flatten(0, 1)
    return [
        learn_from(images_NCHW, labels_N, data.held_out, setting.learn, network, number, compute) for number in numbers
    ]


def outcome(
    models: Sequence[nn.Module], target: Target, network: ModelConfig, compute: Compute
) -> dict[str, float | list[int]]:
    """What the networks take the target for."""
    logits_XK = torch.cat([predict(of, target.image_CHW[None], network.normalise, compute) for of in models])
    predictions = logits_XK.argmax(1).tolist()
    return {
        "predictions": predictions,
        "ASR": mean(float(label == target.adversarial) for label in predictions),
        "p": float(logits_XK.softmax(1)[:, target.adversarial].mean()),
    }


def measure(data: Data, attacks: Sequence[str], setting: Setting, seed: int) -> list[dict[str, Any]]:
    """A row an attack, target, run and aggregate."""
    network, pool = setting.network(data.images_NCHW), data.pool()
    targets = draw_targets(data, setting.n_targets, seed)
    attacker = Compute(seed=seed)
    attacker.activate()
    known = trained_networks(data, setting, attacker) if "gradients" in attacks else []
    rows: list[dict[str, Any]] = []

    def look(images_KMCHW: Tensor, run: int, of: dict[str, Any], looked_at: Sequence[int]) -> None:
        models = learned(images_KMCHW, data, setting, network, Compute(seed=seed + run))
        right = [
            100 * accuracy(predict(model, data.test_NCHW, network.normalise, attacker), data.test_N) for model in models
        ]
        for number in looked_at:
            found = outcome(models, targets[number], network, attacker)
            rows.append({"target": number, "run": run, "accuracy": mean(right), "networks": right} | of | found)
            print(rows[-1], flush=True)

    clean: dict[tuple[int, str], Tensor] = {}
    for run in range(setting.n_runs):
        for name in setting.sets:
            clean[run, name] = condense(setting.matching(name), pool, Compute(seed=seed + run)).images_KMCHW
            look(clean[run, name], run, {"attack": "none", "set": name}, range(len(targets)))
    for number, target in enumerate(targets):
        of_class = target.adversarial
        is_class_N = data.labels_N == of_class
        for attack in attacks:
            own = Compute(seed=seed + number)
            craft = crafts(attack, target, data, setting, known, own)
            draws = own.generator("benchmark", "choice")
            images_NCHW, is_poisoned_N = plant(data.images_NCHW, data.labels_N, of_class, RATE, craft, draws)
            dirty = Pool(images_NCHW[is_class_N], torch.tensor([0]), is_class_N.sum()[None])
            moved = deviations(data.images_NCHW[is_class_N], dirty.images_NCHW, target, setting, attacker)
            for run in range(setting.n_runs):
                for name in setting.sets:
                    found = condense(setting.matching(name), dirty, Compute(seed=seed + run)).images_KMCHW
                    images_KMCHW = clean[run, name].clone()
                    images_KMCHW[of_class] = found[0]
                    of = {"attack": attack, "set": name, "poisoned": int(is_poisoned_N.sum())}
                    look(images_KMCHW, run, of | moved[name], [number])
    return rows


# --- the table ----------------------------------------------------------------------------------------------------

MEASURES = ("accuracy", "deviation", "deviation, clean", "steered", "ASR")


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over targets and runs: a row an attack and aggregate."""
    table = []
    for attack in dict.fromkeys(row["attack"] for row in rows):
        for name in dict.fromkeys(row["set"] for row in rows):
            of = [row for row in rows if (row["attack"], row["set"]) == (attack, name)]
            means = {key: mean(row[key] for row in of) for key in MEASURES if key in of[0]}
            likely = mean(math.log10(row["p"]) for row in of)
            table.append({"attack": attack, "set": name, "log10 p": likely} | means)
    return table


def missed_targets(table: Sequence[dict[str, Any]], is_full: bool) -> list[str]:
    """A line each."""
    missed = []
    of = {(row["attack"], row["set"]): row for row in table}
    for attack in dict.fromkeys(row["attack"] for row in table):
        plain, calibrated = of[attack, "DM"], of[attack, "RDM-DC"]
        if calibrated["accuracy"] < plain["accuracy"] - 2:
            difference = calibrated["accuracy"] - plain["accuracy"]
            missed.append(f"{attack}: RDM-DC within 2 points of DM, got {difference:.1f}")
        if attack == "none":
            continue
        if calibrated["ASR"] > 0:
            missed.append(f"{attack}: ASR 0 with RDM-DC, got {calibrated['ASR']:.2f}")
        if calibrated["steered"] > 0.5 * plain["steered"]:
            steered = f"{calibrated['steered']:.3f} of {plain['steered']:.3f}"
            missed.append(f"{attack}: RDM-DC steered at most half as far as DM, got {steered}")
        missed += [
            f"{attack}: accuracy of {row['set']} within 1.5 points of {SOURCE[row['set']]}, got {row['accuracy']:.2f}"
            for row in table
            if row["attack"] == attack
            and is_full
            and attack == "dm"
            and abs(row["accuracy"] - SOURCE[row["set"]]) > 1.5
        ]
    return missed


def main(arguments: Sequence[str] | None = None) -> None:
    """Quick or full, and with less or more of it."""
    parser = quick_or_full(__doc__)
    parser.add_argument("--attacks", nargs="+", choices=["dm", "direct", "gradients"], default=["dm", "direct"])
    for name, what in (
        ("targets", "attacked test images"),
        ("runs", "times that the data set is condensed"),
        ("iterations", "of condensing"),
        ("attack-iterations", "of each restart of an attack"),
        ("epochs", "of the networks that learn from condensed images"),
    ):
        parser.add_argument(f"--{name}", type=int, help=f"{what}; other results than those of the tables")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    setting = FULL if options.full else QUICK
    changed = {"n_targets": options.targets, "n_runs": options.runs, "iterations": options.iterations}
    setting = setting._replace(**{name: value for name, value in changed.items() if value is not None})
    if options.attack_iterations is not None:
        perturbed = setting.perturb.model_copy(update={"iterations": options.attack_iterations})
        setting = setting._replace(perturb=perturbed)
    if options.epochs is not None:
        optim = setting.learn.optim.model_copy(update={"epochs": options.epochs})
        setting = setting._replace(learn=setting.learn.model_copy(update={"optim": optim}))
    if options.full:
        shards = range(max(1, options.images // 5_000))
        data = load(cifar10("train", shards), cifar10("test"), 10_000, options.first_seed)
    else:
        data = load(fashion_mnist("train"), fashion_mnist("t10k"), 2_000, options.first_seed)
    rows = measure(data, options.attacks, setting, options.first_seed)
    table = summarise(rows)
    of_runs = f"{setting.n_targets} targets, {setting.n_runs} runs, {setting.learn.n_networks} networks each"
    print_table(table, ["attack", "set", *MEASURES, "log10 p"], f"means; {of_runs}")
    conclude(missed_targets(table, options.full), options.json, start, rows=rows, table=table)


if __name__ == "__main__":
    main()
