"""`sanitize robustness`."""

from typing import Any

from rich.table import Table

from flows.cli.app import console, print_places
from flows.cli.command import ALLOW_FACTORY, MODEL, Option, job_command


@job_command(
    MODEL,
    Option(
        "--train-shards",
        list[str],
        "train_shards",
        "Images whose principal components the gradients are compared with (default: those of --shards).",
    ),
    Option("--norm", str, "robustness.attack.norm", "l2 (default) or linf."),
    Option(
        "--radius", float, "robustness.attack.radius", "Largest perturbation tried, for pixels on [0, 1] (default 3)."
    ),
    Option("--n-images", int, "robustness.n_images", "Number of images to attack, chosen by a hash (default 500)."),
    ALLOW_FACTORY,
    out="runs/robustness",
)
def robustness(result: dict[str, Any], out: str) -> None:
    """Attack a model: the smallest change of an image that makes its prediction wrong, and the direction of gradients.

    The attack gives an upper bound of the robustness; `sanitize certify` gives a lower one.

    Examples:

        sanitize robustness runs/robust --shards 'data/test-*.tar'

        sanitize robustness runs/robust --shards 'data/test-*.tar' --norm linf --radius 0.1 --n-images 200
    """
    found = result.pop("summary")
    table = Table("images", "clean accuracy", f"mean {found['norm']} change", "median", "right at the largest change")
    shown = ("-" if found[name] is None else f"{found[name]:.3f}" for name in ("mean", "median"))
    table.add_row(f"{found['samples']:,}", f"{found['clean_accuracy']:.1%}", *shown, f"{found['not_found']:,}")
    console.print(table)
    print_places(result)
