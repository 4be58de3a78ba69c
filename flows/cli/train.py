"""`sanitize train`."""

from typing import Annotated

import typer

from flows.cli.app import (
    AsJson,
    ConfigFile,
    Device,
    Direct,
    Out,
    Quiet,
    Seed,
    Shards,
    bars,
    console,
    errors,
    print_json,
    print_places,
    print_proved,
    set_compute,
    settings_of,
)
from sanitize.errors import ConfigError


def train(
    config: ConfigFile = None,
    shards: Shards = None,
    test_shards: Annotated[
        list[str] | None,
        typer.Option("--test-shards", help="Shards to measure the accuracy on after each epoch; not learned from."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="standard, prl_l, prl_g, spl, co_teaching, co_prl_l, bootstrap, decouple, at, prl_at, …"),
    ] = None,
    tau: Annotated[float, typer.Option(help="With --method: share of each batch that it drops.")] = 0.2,
    warmup: Annotated[int, typer.Option(help="With --method: epochs until that share is dropped.")] = 10,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    partitions: Annotated[
        int | None,
        typer.Option(
            help="Instead of --method: train so many networks on as many parts of the data, whose vote is certified "
            "against poisoned samples."
        ),
    ] = None,
    out: Out = "runs/train",
    direct: Direct = False,
    seed: Seed = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train a model that outlives corrupted labels and triggers; judge the samples on the way.

    The model package is OUT/80-package (model.safetensors, config.json, certificate.json, MODEL_CARD.md); its history
    is in OUT/60-model. Methods that drop samples also write how often each was dropped, OUT/61-drop-scores: a suspicion
    that grows with the share of corrupted labels.

    Examples:

        sanitize train --shards 'data/train-*.tar' --test-shards 'data/test-*.tar' --method prl_l --tau 0.3

        sanitize train configs/train.yaml --out runs/robust --direct

        torchrun --nproc-per-node 4 --no-python sanitize train configs/train.yaml    (four GPUs share each batch)
    """
    from flows.start import start
    from sanitize.distributed import joined, world
    from sanitize.jobs.train import TrainRunConfig
    from sanitize.train import zoo

    with errors():
        settings = settings_of(config, shards=shards, test_shards=test_shards)
        if partitions is not None:
            if method is not None or epochs is not None:
                raise ConfigError("--partitions goes without --method and --epochs: set `partition.optim` in the file")
            settings["partition"] = dict(settings.get("partition") or {}) | {"n_partitions": partitions}
        of_train = dict(settings.get("train", {}))
        if method is not None:
            methods = zoo(tau, warmup)
            if method not in methods:
                raise ConfigError(f"--method {method}: there are {', '.join(methods)}")
            of_train["method"] = methods[method]
        if epochs is not None:
            of_train["optim"] = of_train.get("optim", {}) | {"epochs": epochs}
        if of_train:
            settings["train"] = of_train
        set_compute(settings, seed=seed, device=device)
        run_config = TrainRunConfig.model_validate(settings)
        with joined(run_config.compute):
            is_first = world()[0] == 0
            with bars(quiet or not is_first):
                result = start(run_config, out, direct)
    if not is_first:
        return
    if as_json:
        print_json(result)
        return
    last = result.pop("last", {})
    console.print(", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in last.items()), highlight=False)
    print_proved(result.pop("certificates", []))
    print_places(result)
