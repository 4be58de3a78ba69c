"""`sanitize condense`."""

from typing import Any

from flows.cli.app import console, print_leaks, print_places
from flows.cli.command import Option, job_command
from sanitize.plural import counted


@job_command(
    Option(
        "--test-shards",
        list[str],
        "test_shards",
        "Shards to measure networks on that were trained on the condensed set.",
    ),
    Option(
        "--images-per-class",
        int,
        "condense.matching.images_per_class",
        "Condensed images of each class (default 10).",
    ),
    Option("--iterations", int, "condense.matching.iterations", "Steps of learning (default 20000)."),
    out="runs/condense",
)
def condense(result: dict[str, Any], out: str) -> None:
    """Condense shards into a few images a class that poison in the shards cannot steer (RDM-DC).

    The set is OUT/70-condensed: condensed.safetensors, a shard with PNG and exact .npy, and grid.png to look at.

    Examples:

        sanitize condense --shards 'data/train-*.tar' --test-shards 'data/test-*.tar' --images-per-class 10

        sanitize condense configs/condense.yaml --set condense.matching.batch_size=128 --out runs/condensed --direct
    """
    print_leaks(result.pop("test_leaks"), out)
    accuracies = result.pop("test_accuracy") or []
    last = result.pop("last")
    console.print(f"loss {last['loss']:.4g} after {counted(last['iteration'], 'iteration')}", highlight=False)
    if accuracies:
        reached = ", ".join(f"{accuracy:.1%}" for accuracy in accuracies)
        console.print(f"test accuracy of networks trained on the condensed set: {reached}", highlight=False)
    print_places(result)
