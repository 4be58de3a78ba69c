"""`sanitize condense`."""

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
    set_compute,
    settings_of,
)


def condense(
    config: ConfigFile = None,
    shards: Shards = None,
    test_shards: Annotated[
        list[str] | None,
        typer.Option("--test-shards", help="Shards that networks trained on the condensed set are measured on."),
    ] = None,
    images_per_class: Annotated[int | None, typer.Option(help="Condensed images of each class (default 10).")] = None,
    iterations: Annotated[int | None, typer.Option(help="Steps of learning (default 20000).")] = None,
    out: Out = "runs/condense",
    direct: Direct = False,
    seed: Seed = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Condense shards into a few images a class that poison in the shards cannot steer (RDM-DC).

    The set is OUT/70-condensed: condensed.safetensors, a shard with PNG and exact .npy, and grid.png to look at.

    Examples:

        sanitize condense --shards 'data/train-*.tar' --test-shards 'data/test-*.tar' --images-per-class 10

        sanitize condense configs/condense.yaml --out runs/condensed --direct
    """
    from flows.start import start
    from sanitize.jobs.condense import CondenseRunConfig

    with errors():
        settings = settings_of(config, shards=shards, test_shards=test_shards)
        of_matching = {"images_per_class": images_per_class, "iterations": iterations}
        of_condense = dict(settings.get("condense") or {})
        of_condense["matching"] = dict(of_condense.get("matching") or {}) | {
            name: value for name, value in of_matching.items() if value is not None
        }
        settings["condense"] = of_condense
        set_compute(settings, seed=seed, device=device)
        with bars(quiet):
            result = start(CondenseRunConfig.model_validate(settings), out, direct)
    if as_json:
        print_json(result)
        return
    accuracies = result.pop("test_accuracy") or []
    last = result.pop("last")
    console.print(f"loss {last['loss']:.4g} after {last['iteration']:,} iterations", highlight=False)
    if accuracies:
        reached = ", ".join(f"{of:.1%}" for of in accuracies)
        console.print(f"test accuracy of networks that learned from it: {reached}", highlight=False)
    print_places(result)
