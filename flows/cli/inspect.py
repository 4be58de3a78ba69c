"""`sanitize inspect`."""

from collections import Counter
from typing import Annotated, Any

import typer
from rich.table import Table

from flows.cli.app import AsJson, Quiet, as_text, bars, console, errors, print_json, say
from sanitize.settings import make_config


def inspect(
    shards: Annotated[list[str], typer.Argument(help="Directory, glob or brace range of shards.")],
    label: Annotated[str, typer.Option(help="Member with the class: a suffix, or json:FIELD.")] = "cls",
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of unreadable samples above which the exit code is 1.")
    ] = 0.05,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="Any other setting of `index:`, such as image.channels=1; the value is YAML. May be given several "
            "times.",
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Read shards and list their samples, classes and image sizes, and what cannot be used, with the reason.

    Nothing is written. Useful before `clean`, and when too many samples are unreadable for `clean`. The table lists
    shards that are damaged or have unreadable samples; `--json` lists all shards.

    Exit code: 0 if all is well. 1 if a shard is damaged or refused, no sample is usable, or more than
    `--max-bad-fraction` of the samples are unreadable. 2 if there are no shards or the options are wrong.

    Example:

        sanitize inspect 'data/train-*.tar' --label json:class
    """
    from sanitize.data.index import IndexConfig

    with errors():
        options = {"label": label, "max_bad_fraction": max_bad_fraction}
        config = make_config(IndexConfig, {}, options, set_ or ())
        with bars(quiet):
            result = _inspect(shards, config)
    if as_json:
        print_json(result)
    else:
        _show(result)
    if not _is_well(result, config.max_bad_fraction):
        raise typer.Exit(1)


def _inspect(sources: list[str], config: Any) -> dict[str, Any]:
    """Contents of the shards. Raises SanitizeError if none of them can be opened."""
    from sanitize.data.index import index_shard
    from sanitize.data.sources import find_shards, list_sources
    from sanitize.errors import DataError
    from sanitize.progress import track

    found, refused = list_sources(sources)
    if not found:
        find_shards(sources)  # raises, unless all there is are archives that are not read
    labels: Counter[int] = Counter()
    sizes: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    per_shard = {}
    failure = None
    with track("inspect", None) as advance:
        for shard, url in found.items():
            try:
                indexed, per_shard[shard] = index_shard(url, config, advance)
            except DataError as error:
                failure, refused[url] = error, str(error)
                continue
            rows = indexed.select(["status", "reason", "label", "height", "width"]).to_pylist()
            ok = [row for row in rows if row["status"] == "ok"]
            labels.update(row["label"] for row in ok)
            sizes.update(f"{row['height']}x{row['width']}" for row in ok)
            formats.update(per_shard[shard]["formats"])
            reasons.update(row["reason"] for row in rows if row["status"] != "ok")
    if failure is not None and not per_shard:
        raise failure
    return {
        "shards": per_shard,
        "refused": refused,
        "labels": {str(label): labels[label] for label in sorted(labels)},
        "image_sizes": dict(sizes.most_common()),
        "formats": dict(formats.most_common()),
        "unreadable": dict(reasons.most_common()),
    }


def _is_well(result: dict[str, Any], max_bad_fraction: float) -> bool:
    n_ok, n_bad = sum(result["labels"].values()), sum(result["unreadable"].values())
    is_damaged = any(summary["damage"] for summary in result["shards"].values())
    return n_ok > 0 and n_bad <= max_bad_fraction * (n_ok + n_bad) and not is_damaged and not result["refused"]


def _show(result: dict[str, Any]) -> None:
    """A row for each shard with problems, and one line for all shards."""
    per_shard = result["shards"]
    odd = {name: s for name, s in per_shard.items() if s["damage"] or s["counts"]["unreadable"]}
    if odd:
        table = Table("shard", "samples", "unreadable", "bytes", "damage")
        for name, summary in odd.items():
            counts = summary["counts"]
            numbers = (f"{n:,}" for n in (counts["samples"], counts["unreadable"], summary["bytes"]))
            table.add_row(as_text(name), *numbers, as_text(summary["damage"] or ""))
        console.print(table)
    n_samples = sum(summary["counts"]["samples"] for summary in per_shard.values())
    n_bytes = sum(summary["bytes"] for summary in per_shard.values())
    n_bad, n_damaged = sum(result["unreadable"].values()), sum(bool(s["damage"]) for s in per_shard.values())
    console.print(
        f"{len(per_shard):,} shards, {n_bytes:,} bytes: {n_samples:,} samples, {n_bad:,} unreadable; "
        f"{n_damaged:,} shards damaged, {len(result['refused']):,} refused",
        soft_wrap=True,
    )
    console.print("classes:", ", ".join(f"{label}: {n:,}" for label, n in result["labels"].items()) or "none")
    console.print("formats:", ", ".join(f"{name}: {n:,}" for name, n in result["formats"].items()) or "none")
    sizes = list(result["image_sizes"].items())[:10]
    console.print("image sizes:", ", ".join(f"{size}: {n:,}" for size, n in sizes) or "none")
    for reason, n in result["unreadable"].items():
        say("unreadable", "yellow", f"{n:,} x {reason}")
    for reason in result["refused"].values():
        say("refused", "red", reason)
