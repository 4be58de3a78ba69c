"""`sanitize poison`."""

from typing import Annotated, Any

import typer

from flows.cli.app import AsJson, Quiet, Seed, Shards, bars, console, errors, print_json
from sanitize.errors import ConfigError
from sanitize.settings import make_config


def poison(
    shards: Shards = None,
    out: Annotated[str, typer.Option(help="Folder of the poisoned copy.")] = "runs/poisoned",
    attack: Annotated[str, typer.Option(help="One of the attacks below.")] = "badnets",
    rate: Annotated[
        float, typer.Option(help="Poisoned samples as a share of all, in (0, 1]; each of several has its own.")
    ] = 0.01,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="Any other setting of the attack: target=3, size=4 (pixels) or size=0.1 (of the shorter side), "
            "cover_rate=0.01, sources=[1, 2] … May be given several times.",
        ),
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
    """Write a poisoned copy of shards with the ground truth, to test a defence.

    The shards are in OUT/poisoned/shards; OUT/poisoned/rows/*.parquet says which samples are poisoned. All images are
    re-encoded as PNG, poisoned or not.

    Examples:

        sanitize poison --shards 'data/*.tar' --attack blended --rate 0.01 --set alpha=0.2 --out runs/poisoned

        sanitize poison --shards 'data/*.tar' --attack several --set \\
            'attacks=[{kind: badnets, rate: 0.05, target: 0}, {kind: wanet, rate: 0.05, target: 1}]'
    """
    from sanitize.attack import AttackConfig

    with errors(), bars(quiet):
        if not shards:
            raise ConfigError("no shards: give --shards")
        if label.strip().lower() in ("", "null", "none"):
            raise ConfigError(
                f"--label {label!r}: an attack needs labels; name the member with the class, or json:FIELD"
            )
        settings = {"kind": attack} | ({} if attack == "several" else {"rate": rate})
        config = make_config(AttackConfig, settings, assignments=set_ or ())
        result = _poison(config, shards, out, label, surrogate, seed or 0)
    if as_json:
        print_json(result)
    else:
        counts = result["counts"]
        covers = f", {counts['cover']:,} cover samples" if "cover" in counts else ""
        console.print(
            f"{counts['poisoned']:,} of {counts['samples']:,} samples poisoned{covers}: {result['shards']}",
            soft_wrap=True,
        )


def _poison(config: Any, shards: list[str], out: str, label: str, surrogate: str | None, seed: int) -> dict[str, Any]:
    """Index, then poison; places and counts."""
    from sanitize.attack import poison_shards
    from sanitize.compute import Compute
    from sanitize.data.index import index_shards
    from sanitize.data.index_config import IndexConfig
    from sanitize.data.sources import refuse_inside
    from sanitize.models.checkpoint import Checkpoint
    from sanitize.storage import join

    refuse_inside(shards, out)
    compute = Compute(seed=seed)
    dataset = index_shards(IndexConfig(label=label), shards, join(out, "index"), compute)
    network = Checkpoint.load(surrogate) if surrogate else None
    poisoned = poison_shards(config, dataset, join(out, "poisoned"), compute, surrogate=network)
    return {
        "shards": poisoned.url("shards"),
        "truth": poisoned.url("rows"),
        "counts": poisoned.manifest().counts,
    }
