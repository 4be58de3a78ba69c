"""`sanitize inspect`."""

from typing import Annotated, Any

import typer
from rich.table import Table

from flows.cli.app import AsJson, Quiet, as_text, bars, console, errors, print_json, say


def inspect(
    shards: Annotated[list[str], typer.Argument(help="Directory, glob or brace range of shards.")],
    label: Annotated[str, typer.Option(help="Member with the class: a suffix, or json:FIELD.")] = "cls",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Read shards and say what is in them: samples, classes, image sizes, and what cannot be used and why.

    Nothing is written. Useful before `clean`, and when `clean` says that too much is unreadable.

    Example:

        sanitize inspect 'data/train-*.tar' --label json:class
    """
    from collections import Counter

    from sanitize.data.index import IndexConfig, index_shard
    from sanitize.data.sources import find_shards
    from sanitize.progress import track

    with errors(), bars(quiet):
        found = find_shards(shards)
        config = IndexConfig(label=label)
        labels: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        per_shard = {}
        with track("inspect", None) as advance:
            for shard, url in found.items():
                indexed, per_shard[shard] = index_shard(url, config, advance)
                rows = indexed.to_pylist()
                ok = [row for row in rows if row["status"] == "ok"]
                labels.update(str(row["label"]) for row in ok)
                sizes.update(f"{row['height']}x{row['width']}" for row in ok)
                reasons.update(row["reason"] for row in rows if row["status"] != "ok")
    result: dict[str, Any] = {
        "shards": per_shard,
        "labels": dict(sorted(labels.items(), key=lambda item: int(item[0]))),
        "image_sizes": dict(sizes.most_common()),
        "unreadable": dict(reasons.most_common()),
    }
    if as_json:
        print_json(result)
        return
    table = Table("shard", "samples", "unreadable", "bytes", "damage")
    for shard, summary in per_shard.items():
        counts = summary["counts"]
        numbers = (f"{n:,}" for n in (counts["samples"], counts["unreadable"], summary["bytes"]))
        table.add_row(as_text(shard), *numbers, summary["damage"])
    console.print(table)
    console.print("classes:", ", ".join(f"{label}: {n:,}" for label, n in result["labels"].items()) or "none")
    console.print("image sizes:", ", ".join(f"{size}: {n:,}" for size, n in sizes.most_common(10)) or "none")
    for reason, n in reasons.most_common():
        say("unreadable", "yellow", f"{n:,} x {reason}")
