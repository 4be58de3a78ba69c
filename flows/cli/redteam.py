"""`sanitize redteam`."""

from typing import Any

from rich import box
from rich.table import Column, Table

from flows.cli.app import console, print_places, say
from flows.cli.command import COMMON, Option, job_command

REQUIREMENT_MISSED = 3


def _around_clean(settings: dict[str, Any], _values: dict[str, Any]) -> dict[str, Any]:
    """Settings of a red team; a YAML file of `sanitize clean` gives its pipeline."""
    from sanitize.jobs.redteam import RedTeamConfig

    return settings if settings.keys() & RedTeamConfig.model_fields.keys() else {"clean": settings}


@job_command(
    Option(
        "--attack",
        list[str],
        "attacks",
        "KIND@RATE%, such as badnets@1%, blended@5%, labels@10%; kinds are those of `sanitize poison`. May be given "
        "several times. Default: badnets@1%, badnets@5%, blended@5%, labels@5%. Case none is always run.",
    ),
    Option(
        "--require",
        list[str],
        "require",
        "CASE:MEASURE>=SHARE or <=, such as 'badnets@1%:recall>=0.9' (quote it). May be given several times. "
        "Measures: recall, precision, false_removals, acc_before, acc_after, asr_before, asr_after.",
    ),
    Option("--repeats", int, "repeats", "Seeds of each case (default 2)."),
    out="runs/redteam",
    common=[option.inside("clean") for option in COMMON],
    prepare=_around_clean,
    exit_code=lambda result: 0 if result["met"] else REQUIREMENT_MISSED,
)
def redteam(result: dict[str, Any], out: str) -> None:
    """Test a cleaning pipeline: plant known attacks in a sample of the data, and measure recall and false removals.

    The YAML file is one of a red team (configs/redteam.yaml) or of `sanitize clean`. For each attack and
    each seed: poison a copy of the sample, clean the copy with the pipeline, train a model before and after cleaning,
    and measure. Case none has no poison: everything removed there is a false removal. The table gives means over seeds;
    the report, OUT/90-report/index.html, also gives confidence intervals.

    A requirement is judged by the mean. If one is missed the exit code is 3 (1: the run failed, 2: bad configuration),
    so that a deployment can wait for it. Attacks that are not listed are not tested, and results on more data may
    differ.

    Examples:

        sanitize redteam --shards 'data/train-*.tar' --out runs/redteam

        sanitize redteam my-pipeline.yaml --attack badnets@1% --require 'badnets@1%:recall>=0.9' --require
        'none:false_removals<=0.02'

        sanitize redteam --shards 'data/train-*.tar' --set clean.select.verdict=all --set sample.n_train=3000
    """
    from sanitize.jobs.redteam import SHOWN

    names = ("recall", "preci-\nsion", "false\nremoved", "ACC\nbefore", "after", "ASR\nbefore", "after", "baseline")
    columns = [Column(name, justify="right", no_wrap=True) for name in names]
    # The table fits into 80 columns: if names were cut, badnets@1% and badnets@5% would look alike.
    table = Table(Column("case", overflow="fold"), *columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for case in result["cases"]:
        measures = case["measures"]
        table.add_row(case["name"], *(_share(measures.get(measure)) for measure in SHOWN))
    console.print(table)
    console.print(
        "recall: share of the poison that was removed; precision: share of the removed samples that are poison; "
        "false removed: share of the clean samples (false removals); ACC: clean accuracy; ASR: share of triggered "
        "images that get the attacker's label (attack success rate), baseline: of a model trained on unpoisoned data"
    )
    for case in result["not_learned"]:
        console.print(
            f"{case}: the model before cleaning hardly learned the attack, so the case shows little; raise "
            "sample.n_train or the epochs of the embedder, or use smaller batches",
            highlight=False,
        )
    for requirement in result["requirements"]:
        word, style = ("met", "green") if requirement["met"] else ("MISSED", "red")
        between = f", {result['level']:.0%} interval {_share(requirement, 'low')} to {_share(requirement, 'high')}"
        found = f"{_share(requirement)}{between}" if requirement["mean"] is not None else "no samples to count"
        say(f"{word:>8}", style, f"{requirement['text']}: {found}")
    print_places({name: result[name] for name in ("findings", "report")})


def _share(measured: dict[str, Any] | None, what: str = "mean") -> str:
    """A share in per cent; "-" without samples to count, "" where it was not measured."""
    if measured is None:
        return ""
    return "-" if measured[what] is None else f"{measured[what]:.1%}"
