"""`sanitize train`."""

from typing import Any

from flows.cli.app import console, print_certificates, print_leaks, print_places
from flows.cli.command import Option, job_command
from sanitize.errors import ConfigError
from sanitize.settings import change, plain


def _method(settings: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The settings with `train.method` of `--method`, `--tau` and `--warmup`, and the epochs of what is trained."""
    from sanitize.jobs.train import TrainRunConfig
    from sanitize.training import zoo

    method, epochs = values["method"], values["epochs"]
    is_ensemble = values["partitions"] is not None or settings.get("partition") is not None
    if epochs is not None:
        settings = change(settings, f"{'partition' if is_ensemble else 'train'}.optim.epochs", epochs, TrainRunConfig)
    if method is not None and is_ensemble:
        raise ConfigError(
            f"--method {method}: networks of an ensemble (--partitions, `partition:`) are trained in one way, and "
            "robust by their vote; leave one of them out"
        )
    if method is None:
        return settings
    methods = zoo(values["tau"], values["warmup"])
    if method not in methods:
        raise ConfigError(f"--method {method}: there are {', '.join(methods)}")
    return change(settings, "train.method", plain(methods[method]), TrainRunConfig)


@job_command(
    Option(
        "--test-shards",
        list[str],
        "test_shards",
        "Shards to measure the accuracy on after each epoch; not learned from.",
    ),
    Option("--method", str, "", "One of the methods below (default standard)."),
    Option("--tau", float, "", "With --method: share of each batch to drop.", 0.2),
    Option("--warmup", int, "", "With --method: epochs until that share is dropped.", 10),
    Option("--epochs", int, "", "Passes over the data, with --partitions of each network over its part (default 30)."),
    Option(
        "--partitions",
        int,
        "partition.n_partitions",
        "Instead of --method: number of networks, each trained on its own part of the data. Their vote is certified "
        "against poisoned samples. Needs index.n_classes and index.image.size.",
    ),
    out="runs/train",
    prepare=_method,
    torchrun=True,
)
def train(result: dict[str, Any], out: str) -> None:
    """Train a model that tolerates wrong labels and triggers; score every sample on the way.

    The model package is OUT/80-package (model.safetensors, config.json, certificate.json, MODEL_CARD.md); its history
    is in OUT/60-model. Methods that drop samples also write how often each sample was dropped, OUT/61-drop-scores: a
    ranking of suspicious samples.

    Examples:

        sanitize train --shards 'data/train-*.tar' --test-shards 'data/test-*.tar' --method prl_l --tau 0.3

        sanitize train --shards 'data/train-*.tar' --set train.architecture.kind=resnet --set train.augment.flip=true

        sanitize train --shards data --partitions 50 --set index.n_classes=10 --set index.image.size=[32,32]

        torchrun --nproc-per-node 4 --no-python sanitize train configs/train.yaml    (four GPUs share each batch)
    """
    print_leaks(result.pop("test_leaks"), out)
    last = result.pop("last", {})
    console.print(", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in last.items()), highlight=False)
    print_certificates(result.pop("certificates", []))
    print_places(result)
