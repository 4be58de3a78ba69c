"""`sanitize redteam`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Column, Table

from flows.cli.app import (
    AsJson,
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
    read_yaml,
    say,
    set_compute,
)
from sanitize.errors import ConfigError

REQUIREMENT_MISSED = 3


def redteam(
    config: Annotated[
        Path | None,
        typer.Argument(help="YAML file of a red team, see configs/redteam.yaml; or of `sanitize clean`, as it is."),
    ] = None,
    shards: Shards = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            help="KIND@RATE%, such as badnets@1%, blended@5%, labels@10%; kinds are those of `sanitize poison`. May be "
            "given several times. Default: badnets@1%, badnets@5%, blended@5%, labels@5%. Case none is always run."
        ),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            help="CASE:MEASURE>=SHARE or <=, such as 'badnets@1%:recall>=0.9' (quote it). May be given several times. "
            "Measures: recall, precision, false_removals, acc_before, acc_after, asr_before, asr_after."
        ),
    ] = None,
    repeats: Annotated[int | None, typer.Option(help="Seeds of each case (default 2).")] = None,
    out: Out = "runs/redteam",
    direct: Direct = False,
    seed: Seed = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Try your pipeline: plant known attacks in a sample of your data, and see what it catches.

    For each attack and each seed: poison a copy of the sample, run your cleaning pipeline on it without telling it
    anything, train a model on what came in and one on what was kept, and measure. In case none nobody is at work: what
    is removed there is removed for nothing. The table gives means over seeds; the page, OUT/90-report/index.html, their
    confidence intervals too.

    A requirement is judged by the mean. If one is missed the exit code is 3 (1: the run failed, 2: bad configuration),
    so that a deployment can wait for it. What is not among the attacks is not tried, and larger data may behave
    otherwise.

    Examples:

        sanitize redteam --shards 'data/train-*.tar' --out runs/redteam

        sanitize redteam my-pipeline.yaml --attack badnets@1% --require 'badnets@1%:recall>=0.9' --require
        'none:false_removals<=0.02'
    """
    from flows.start import start
    from sanitize.jobs.redteam import RedTeamConfig

    with errors():
        settings = read_yaml(config) if config else {}
        if not settings.keys() & RedTeamConfig.model_fields.keys():
            settings = {"clean": settings}
        given = {"attacks": attack, "require": require, "repeats": repeats}
        settings |= {name: value for name, value in given.items() if value is not None}
        pipeline = dict(settings.get("clean") or {})
        if shards:
            pipeline["shards"] = shards
        if not pipeline.get("shards"):
            raise ConfigError("no shards: give --shards, or `shards:` under `clean:` in the YAML file")
        set_compute(pipeline, seed=seed, device=device)
        run_config = RedTeamConfig.model_validate(settings | {"clean": pipeline})
        with bars(quiet):
            result = start(run_config, out, direct)
    if as_json:
        print_json(result)
    else:
        _show(result)
    if not result["met"]:
        raise typer.Exit(REQUIREMENT_MISSED)


def _show(result: dict[str, Any]) -> None:
    from sanitize.jobs.redteam import SHOWN

    names = ("caught", "right", "lost", "ACC\nbefore", "after", "ASR\nbefore", "after", "untouched")
    columns = [Column(name, justify="right", no_wrap=True) for name in names]
    # It fits into 80 columns: cut, badnets@1% and badnets@5% would look alike.
    table = Table(Column("case", overflow="fold"), *columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for case in result["cases"]:
        of = case["measures"]
        table.add_row(case["name"], *(_share(of.get(measure)) for measure in SHOWN))
    console.print(table)
    console.print(
        "caught: of the poison (recall); right: of what was removed (precision); lost: clean samples removed; ASR: "
        "triggered images that get the attacker's label, untouched: by a model that never saw the attack"
    )
    for case in result["not_learned"]:
        console.print(
            f"{case}: hardly learned before cleaning, so there was little to see; sample.n_train, smaller batches or "
            "more epochs of the embedder would show more",
            highlight=False,
        )
    for requirement in result["requirements"]:
        word, style = ("met", "green") if requirement["met"] else ("MISSED", "red")
        between = f", {result['level']:.0%} interval {_share(requirement, 'low')} to {_share(requirement, 'high')}"
        found = f"{_share(requirement)}{between}" if requirement["mean"] is not None else "nothing to count"
        say(f"{word:>8}", style, f"{requirement['text']}: {found}")
    print_places({name: result[name] for name in ("findings", "report")})


def _share(of: dict[str, Any] | None, what: str = "mean") -> str:
    """In per cent; "-" where there was nothing to count, nothing where it is not measured."""
    if of is None:
        return ""
    return "-" if of[what] is None else f"{of[what]:.1%}"
