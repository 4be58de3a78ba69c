"""`sanitize poison`."""

from typing import Annotated, Any

import typer
import yaml
from pydantic import TypeAdapter

from flows.cli.app import AsJson, Quiet, Seed, Shards, bars, console, errors, print_json
from sanitize.errors import ConfigError


def poison(
    shards: Shards = None,
    out: Annotated[str, typer.Option(help="Folder of the poisoned copy.")] = "runs/poisoned",
    attack: Annotated[
        str,
        typer.Option(
            help="badnets (a corner patch), blended (noise all over), wanet, smooth, l0, l2, trojan_square, "
            "trojan_watermark, clean_label, labels, or several (--set attacks=[...])."
        ),
    ] = "badnets",
    rate: Annotated[
        float, typer.Option(help="Poisoned samples as a share of all, in (0, 1]; each of several has its own.")
    ] = 0.01,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", help="Further settings of the attack as NAME=VALUE: target=3, size=4, alpha=0.1 …"),
    ] = None,
    surrogate: Annotated[
        str | None,
        typer.Option(
            help="For clean_label: folder of a network trained on such images: 10-embedder or 60-model of a run."
        ),
    ] = None,
    label: Annotated[str, typer.Option(help="Member with the class: a suffix, or json:FIELD.")] = "cls",
    seed: Seed = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a poisoned copy of shards with the ground truth, to try a defence on.

    The shards are in OUT/poisoned/shards; which samples are poisoned is in OUT/poisoned/rows/*.parquet. All images
    are re-encoded as PNG, poisoned or not.

    Example:

        sanitize poison --shards 'data/*.tar' --attack blended --rate 0.01 --set alpha=0.2 --out runs/poisoned

        sanitize poison --shards 'data/*.tar' --attack several --set \\
            'attacks=[{kind: badnets, rate: 0.05, target: 0}, {kind: wanet, rate: 0.05, target: 1}]'
    """
    from sanitize.attack import AttackConfig, poison_shards
    from sanitize.compute import Compute
    from sanitize.data.index import IndexConfig, index_shards
    from sanitize.data.sources import refuse_inside
    from sanitize.models.checkpoint import Checkpoint
    from sanitize.storage import join

    with errors(), bars(quiet):
        if not shards:
            raise ConfigError("no shards: give --shards")
        refuse_inside(shards, out)
        pairs = dict(option.partition("=")[::2] for option in options or [])
        settings = {"kind": attack} | ({} if attack == "several" else {"rate": rate})
        settings |= {name: yaml.safe_load(value) for name, value in pairs.items()}
        config: Any = TypeAdapter(AttackConfig).validate_python(settings)
        compute = Compute(seed=seed or 0)
        dataset = index_shards(IndexConfig(label=label), shards, join(out, "index"), compute)
        network = Checkpoint.load(surrogate) if surrogate else None
        poisoned = poison_shards(config, dataset, join(out, "poisoned"), compute, surrogate=network)
        counts = poisoned.manifest().counts
    result = {"shards": poisoned.url("shards"), "truth": poisoned.url("rows"), "counts": counts}
    if as_json:
        print_json(result)
    else:
        console.print(
            f"{counts['poisoned']:,} of {counts['samples']:,} samples poisoned: {result['shards']}", soft_wrap=True
        )
