"""`sanitize repair`."""

from typing import Annotated, Any

import typer
from rich.table import Table

from flows.cli.app import (
    AllowFactory,
    AsJson,
    ConfigOption,
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
    read_yaml,
    set_compute,
)
from sanitize.errors import ConfigError


def repair(
    model: Annotated[str | None, typer.Argument(help="A model package, or a run folder of `sanitize train`.")] = None,
    config: ConfigOption = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="drr or ep (need --shards; drr is the default); ibau, fine_tuning, fine_pruning, anp, nad or "
            "neural_cleanse (need --clean-shards); clp (needs nothing)."
        ),
    ] = None,
    shards: Shards = None,
    clean_shards: Annotated[
        list[str] | None, typer.Option("--clean-shards", help="Shards of a few samples that are known to be good.")
    ] = None,
    test_shards: Annotated[
        list[str] | None, typer.Option("--test-shards", help="Shards to measure on, before and after.")
    ] = None,
    out: Out = "runs/repair",
    allow_factory: AllowFactory = False,
    direct: Direct = False,
    seed: Seed = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Take a backdoor out of a model that has already learned it; the result is a model package.

    drr reads the data the model was trained on, poison and all: it finds the direction along which a second cluster of
    a class lies and projects it out of the weights. A model in which it finds none is left as it is. ibau reads a few
    clean images (500 are enough, a fifth of them decides when to stop) and unlearns the perturbation that hurts most.

    Fine-tuning afterwards can bring a backdoor back: measure with --test-shards, and with `repair.trigger` in the YAML
    file where you know the trigger.

    Examples:

        sanitize repair runs/suspect --method drr --shards 'data/train-*.tar' --test-shards 'data/test-*.tar'

        sanitize repair runs/suspect --method ibau --clean-shards 'data/trusted-*.tar' --out runs/repaired
    """
    from flows.start import start
    from sanitize.jobs.repair import RepairRunConfig

    with errors():
        settings = read_yaml(config) if config else {}
        given: dict[str, Any] = {
            "model": model,
            "shards": shards,
            "clean_shards": clean_shards,
            "test_shards": test_shards,
        }
        given["allow_factory"] = allow_factory
        settings |= {name: value for name, value in given.items() if value}
        if "model" not in settings:
            raise ConfigError("no model: name its package or run folder")
        if method is not None:
            of_repair = dict(settings.get("repair") or {})
            same = (of_repair.get("method") or {}).get("kind") == method
            settings["repair"] = of_repair if same else of_repair | {"method": {"kind": method}}
        set_compute(settings, seed=seed, device=device)
        with bars(quiet):
            result = start(RepairRunConfig.model_validate(settings), out, direct)
    if as_json:
        print_json(result)
        return
    _print_repair(result.pop("repair"))
    if certificates := result.pop("certificates", None):
        print_proved(certificates)
    print_places(result)


def _print_repair(report: dict[str, Any]) -> None:
    """What was measured before and after, and how much of the model changed."""
    changed = report["weights_changed"]
    if "before" in report:
        table = Table("", "before", "after", title=f"repair by {report['method']['kind']}")
        for name, row in (("accuracy", "acc"), ("attack success rate", "asr")):
            if row in report["before"]:
                table.add_row(name, *(f"{report[when][row]:.1%}" for when in ("before", "after")))
        of_class = zip(report["before"]["acc_of_class"], report["after"]["acc_of_class"], strict=True)
        for label, shares in enumerate(of_class):
            table.add_row(f"  class {label}", *("-" if share is None else f"{share:.1%}" for share in shares))
        console.print(table)
    console.print(
        "nothing was found, the model is as it was"
        if not changed["changed"]
        else f"{changed['changed']} of {changed['of']} weights changed, by {changed['relative_l2']:.2%} (l2)",
        highlight=False,
    )
