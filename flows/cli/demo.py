"""`sanitize demo`."""

from typing import Any

from rich.table import Table

from flows.cli.app import console
from flows.cli.command import SEED, job_command


@job_command(out="runs/demo", common=(SEED,))
def demo(result: dict[str, Any], out: str) -> None:
    """Two-minute demonstration: plant a backdoor in 2 % of real handwritten digits, and remove it.

    Writes scikit-learn's 1,797 digits as shards, plants a BadNets patch, runs the whole clean flow, then trains a small
    model on the poisoned and on the cleaned shards and compares clean accuracy (ACC) and attack success rate (ASR).

    Example:

        sanitize demo --out runs/demo --direct
    """
    table = Table(
        "", "poisoned data", "cleaned data", title="demo: BadNets patch in 2 % of the digits", title_justify="left"
    )
    table.add_row("clean accuracy (ACC)", f"{result['acc_before']:.1%}", f"{result['acc_after']:.1%}")
    table.add_row("attack success rate (ASR)", f"{result['asr_before']:.1%}", f"{result['asr_after']:.1%}")
    console.print(table)
    console.print(
        f"poisoned samples found: {result['found']} of {result['poisoned']} (missed {result['missed']}); "
        f"false removals: {result['clean_lost']} of {result['clean_samples']} ({result['clean_lost_fraction']:.2%})"
    )
    console.print(f"report: {result['report']}", highlight=False, soft_wrap=True)
