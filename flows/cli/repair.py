"""`sanitize repair`."""

from typing import Any

from rich.table import Table

from flows.cli.app import console, print_certificates, print_places
from flows.cli.command import ALLOW_FACTORY, MODEL, Option, job_command


@job_command(
    MODEL._replace(default=None),
    Option("--method", str, "repair.method.kind", "One of the repairs below (default drr)."),
    Option("--clean-shards", list[str], "clean_shards", "Shards with a few samples that are known to be clean."),
    Option("--test-shards", list[str], "test_shards", "Shards to measure on, before and after."),
    ALLOW_FACTORY,
    out="runs/repair",
)
def repair(result: dict[str, Any], out: str) -> None:
    """Remove a backdoor from a trained model; the result is a model package.

    drr reads the data the model was trained on, poison included. It finds the direction along which a second cluster of
    a class lies and projects it out of the weights; a model without such a cluster stays as it is. ibau reads a few
    clean images (500 are enough; a fifth of them decides when to stop) and unlearns the perturbation that hurts most.

    Fine-tuning afterwards can bring a backdoor back: measure with --test-shards, and with `repair.trigger` where the
    trigger is known.

    Examples:

        sanitize repair runs/suspect --method drr --shards 'data/train-*.tar' --test-shards 'data/test-*.tar'

        sanitize repair runs/suspect --method ibau --clean-shards 'data/trusted-*.tar' --out runs/repaired
    """
    _print_repair(result.pop("repair"), {int(label): name for label, name in result.pop("class_names", {}).items()})
    if certificates := result.pop("certificates", None):
        print_certificates(certificates)
    print_places(result)


def _print_repair(report: dict[str, Any], names: dict[int, str]) -> None:
    """Accuracy and attack success rate before and after, and the share of the weights that changed."""
    from sanitize.data.class_names import class_name

    changed = report["weights_changed"]
    if "before" in report:
        table = Table("", "before", "after", title=f"repair by {report['method']['kind']}")
        for name, row in (("accuracy", "acc"), ("attack success rate", "asr")):
            if row in report["before"]:
                table.add_row(name, *(f"{report[when][row]:.1%}" for when in ("before", "after")))
        by_class = zip(report["before"]["acc_of_class"], report["after"]["acc_of_class"], strict=True)
        for label, shares in enumerate(by_class):
            table.add_row(
                f"  class {class_name(label, names)}", *("-" if share is None else f"{share:.1%}" for share in shares)
            )
        console.print(table)
    console.print(
        "no backdoor was found; the model is unchanged"
        if not changed["changed"]
        else f"{changed['changed']} of {changed['of']} weights changed, by {changed['relative_l2']:.2%} (l2)",
        highlight=False,
    )
