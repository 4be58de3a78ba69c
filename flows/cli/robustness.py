"""`sanitize robustness`."""

from typing import Annotated

import typer
from rich.table import Table

from flows.cli.app import (
    AllowFactory,
    AsJson,
    ConfigOption,
    Device,
    Direct,
    ModelFolder,
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


def robustness(
    model: ModelFolder,
    config: ConfigOption = None,
    shards: Shards = None,
    train_shards: Annotated[
        list[str] | None,
        typer.Option("--train-shards", help="Images whose principal components gradients are measured against."),
    ] = None,
    norm: Annotated[str | None, typer.Option(help="l2 (default) or linf.")] = None,
    radius: Annotated[float | None, typer.Option(help="Largest perturbation tried, pixels on [0, 1].")] = None,
    n_images: Annotated[int | None, typer.Option(help="Attack so many images, chosen by a hash (default 500).")] = None,
    out: Out = "runs/robustness",
    allow_factory: AllowFactory = False,
    direct: Direct = False,
    seed: Seed = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Attack a model: how small a change of an image makes it wrong, and where its gradients point.

    What an attack finds is an upper bound of the robustness; `sanitize certify` gives a lower one.

    Examples:

        sanitize robustness runs/robust --shards 'data/test-*.tar'

        sanitize robustness runs/robust --shards 'data/test-*.tar' --norm linf --radius 0.1 --n-images 200
    """
    from flows.start import start
    from sanitize.jobs.robustness import RobustnessRunConfig
    from sanitize.measure import RobustnessConfig

    with errors():
        settings = settings_of(
            config, model=model, shards=shards, train_shards=train_shards, allow_factory=allow_factory
        )
        of_robustness = dict(settings.get("robustness") or {})
        attack = {"norm": norm, "radius": radius}
        if given := {name: value for name, value in attack.items() if value is not None}:
            default = RobustnessConfig().attack.model_dump(exclude_unset=True)
            of_robustness["attack"] = default | dict(of_robustness.get("attack") or {}) | given
        if n_images is not None:
            of_robustness["n_images"] = n_images
        settings["robustness"] = of_robustness
        set_compute(settings, seed=seed, device=device)
        with bars(quiet):
            result = start(RobustnessRunConfig.model_validate(settings), out, direct)
    if as_json:
        print_json(result)
        return
    of = result.pop("summary")
    table = Table("images", "right as they are", f"mean {of['norm']} change", "median", "withstood the largest")
    shown = ("-" if of[name] is None else f"{of[name]:.3f}" for name in ("mean", "median"))
    table.add_row(f"{of['samples']:,}", f"{of['clean_accuracy']:.1%}", *shown, f"{of['not_found']:,}")
    console.print(table)
    print_places(result)
