"""`sanitize clean`."""

import json
import re
from typing import Any

from rich.table import Table

from flows.cli.app import console, say
from flows.cli.command import Option, job_command
from sanitize.plural import are, counted, were


@job_command(
    Option(
        "--size", int, "index.image.max_side", "Largest side of the images that the suspect model sees (default 64)."
    ),
    Option("--groups", int, "n_groups", "Groups of shards worked on side by side (default: CPU cores)."),
    out="runs/clean",
)
def clean(result: dict[str, Any], out: str) -> None:
    """Find poisoned samples; write clean shards, quarantine shards and a report.

    The samples that stay are copied byte for byte. The others go to quarantine with the evidence beside them;
    `sanitize restore` puts them back. Nothing needs to be known about the attack, not even whether there is one.

    Where a sample has several pictures, `--set index.image.member=all` looks at each of them, and the worst one decides
    on the sample; with a suffix, or first, one of them is looked at.

    Examples:

        sanitize clean --shards 'data/train-*.tar' --out runs/first

        sanitize clean configs/cifar10.yaml --out runs/cifar10 --direct

        sanitize clean --shards 'data/train-*.tar' --set scorers='[{kind: rca}]' --set select.rules.rca.kind=fdr
    """
    from sanitize.data.class_names import class_name
    from sanitize.storage import join, read_bytes

    _print_suspect(result["suspect"], "pictures" if "pictures" in result["samples"] else "samples")
    _print_stages(json.loads(read_bytes(join(out, "run.json")))["stages"])
    _print_counts(result["samples"], len(result["damaged_shards"]))
    for label, of_class in result["classes_touched"].items():
        flags = ", ".join(f"{kind} {by['flagged']:,}" for kind, by in of_class["scorers"].items() if by["flagged"])
        name = class_name(int(label), {int(label): of_class["name"]} if "name" in of_class else {})
        console.print(
            f"  class {name}: {of_class['removed']:,} of {of_class['n']:,} removed (flagged: {flags or 'none'})"
        )
    _print_verdict(result["verdict"])
    for note in result.get("notes", ()):
        say("      note:", "yellow", note)
    if result["hygiene"]:
        found = ", ".join(f"{kind.replace('_', ' ')} {n:,}" for kind, n in result["hygiene"].items())
        console.print(f"{'hygiene':>10}: {found}", highlight=False, soft_wrap=True)
    for shard, damage in result["damaged_shards"].items():
        what = "  nothing read of shard" if shard in result["bad_shards"] else "  damaged shard"
        say(what, "yellow", f"{shard}: {damage}")
    for name in ("clean", "quarantine", "report"):
        console.print(f"{name:>10}: {result[name]}", highlight=False, soft_wrap=True)


def _print_stages(stages: list[dict[str, Any]]) -> None:
    """A row for each stage: samples, seconds, samples a second."""
    table = Table(title="stages", title_justify="left")
    for name in ("stage", "samples", "seconds", "samples/s"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in stages:
        n, seconds = stage["samples"], stage["seconds"]
        rate = f"{n / seconds:,.0f}" if n and seconds and not stage["resumed"] else ""
        kind = re.search(r"-(?:scorer|scores)-(.*)", stage["folder"])  # 30-scorer-rca, 31-scores-rca
        name = stage["stage"] + (f" {kind[1]}" if kind else "") + (" (was there)" if stage["resumed"] else "")
        table.add_row(name, f"{n:,}" if n else "", f"{seconds:.1f}", rate)
    table.add_row("total", "", f"{sum(stage['seconds'] for stage in stages):.1f}", "", style="bold")
    console.print(table)


def _print_suspect(suspect: dict[str, Any] | None, unit: str) -> None:
    """Training of the suspect model, in one line."""
    if suspect is None:
        return
    n, n_all, (height, width) = suspect["n_samples"], suspect["n_all"], suspect["size"]
    console.print(
        f"suspect model: {counted(suspect['steps'], 'step')}, {counted(suspect['epochs'], 'epoch')}, {n:,} of "
        f"{n_all:,} {unit} at {height}x{width} pixels, accuracy {suspect['accuracy']:.2f}",
        highlight=False,
        soft_wrap=True,
    )


def _print_verdict(finding: dict[str, Any]) -> None:
    """Verdict on the data set, its reasons with what to do about them, and the planted triggers that were found."""
    from sanitize.report.finding import VERDICTS, by_remedy, describe_canary

    verdict = finding["verdict"]
    styles = {"found": "red", "nothing": "green", "inconclusive": "yellow"}
    say(f"{'verdict':>10}: {VERDICTS[verdict]}.", styles[verdict], finding["why"])
    for reasons, remedy in by_remedy(finding["reasons"]):
        for why in reasons:
            say(f"{'limit' if verdict == 'found' else 'reason':>10}:", "", why)
        if remedy:
            say(f"{'remedy':>10}:", "", remedy)
    for canary in finding["canaries"]:
        if not canary["missed"]:
            planted = f"a trigger that this run planted ({describe_canary(canary)}): recall {canary['recall']:.2f}"
            say(f"{'seen':>10}:", "", planted)


def _print_counts(counts: dict[str, int], n_damaged: int) -> None:
    """Samples by verdict, in one line."""
    n, n_pictures = counts["samples"], counts.get("pictures")
    pictures = "" if n_pictures is None else f"; {counted(n_pictures, 'picture')} {were(n_pictures)} judged"
    damaged = (
        f"; {counted(n_damaged, 'shard')} {are(n_damaged)} damaged, and what could not be read there is not counted"
    )
    console.print(
        f"[bold]{n:,}[/bold] {'sample' if n == 1 else 'samples'} = {counts['kept']:,} clean "
        f"+ {counts['quarantined']:,} quarantined + {counts['unreadable']:,} unreadable"
        f"{pictures}{damaged if n_damaged else ''}",
        style="yellow" if n_damaged else None,
        markup=True,
        soft_wrap=True,
    )
