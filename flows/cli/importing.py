"""`sanitize import`."""

import shlex
from typing import Annotated, Any

import typer

from flows.cli.app import AsJson, Quiet, Seed, bars, console, errors, print_json, say
from sanitize.errors import ConfigError
from sanitize.plural import counted
from sanitize.settings import make_config

_SHOWN = 10  # classes in the output; `--json` has all


def import_(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of class folders, a folder or glob of Parquet files, a saved `datasets` folder, a .csv or "
            ".tsv, or COCO's captions (.json). A path or a URL.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str,
        typer.Option(help="New folder of the shards, a path or a URL. Given again, an import that was killed goes on."),
    ] = "shards",
    kind: Annotated[
        str | None, typer.Option(help="folders, csv, coco or parquet, where SOURCE can be read in several ways.")
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="csv and coco: folder that the paths start from (default: that of the file).")
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="csv and parquet: column of paths or images.")] = None,
    label_column: Annotated[str | None, typer.Option(help="csv and parquet: column of labels.")] = None,
    no_header: Annotated[
        bool, typer.Option("--no-header", help="csv: the first line is a row; its columns are 0, 1, ...")
    ] = False,
    classes: Annotated[
        str | None,
        typer.Option(
            help="JSON file with the names of all classes in the order of their integers: a list, or the classes.json "
            "of another import, such as that of the training images (default: the sorted names that are found)."
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split to import where there are several, such as train; or all.")
    ] = None,
    samples_per_shard: Annotated[int | None, typer.Option(help="Samples of a shard (default 1000).")] = None,
    max_refused: Annotated[
        float | None, typer.Option(help="Share of refused images above which the import fails (default 0.05).")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="Any other setting: shuffle=false, bytes_per_shard=100000000, max_image_bytes=1000000, name=val … "
            "May be given several times.",
        ),
    ] = None,
    seed: Seed = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write your images as shards that every other command reads.

    Class folders are photos/cat/001.jpg, photos/dog/001.png, and so on: the class is the first folder. Images are
    decoded once to check them, and copied byte for byte. What cannot be used is left out, counted by reason, and listed
    in OUT/refused. OUT/classes.json maps class names to the integers in the shards. Samples are mixed over all shards,
    in an order that depends on the seed alone.

    Exit code: 0 if the shards are written. 1 if the source cannot be read, or more than `--max-refused` of the images
    are refused; then there are no shards. 2 if the options are wrong, or a choice is needed.

    Examples:

        sanitize import photos/ --out shards

        sanitize import labels.csv --images photos/ --label-column species --out shards

        sanitize import photos-test/ --classes shards/classes.json --out test

        sanitize import 'data/train-*.parquet' --out shards

        sanitize import saved_dataset/ --split train --out shards

        sanitize import annotations/captions_train2017.json --images train2017/ --out captions
    """
    from sanitize.importing.source import listed_classes

    with errors(), bars(quiet):
        if not sources:
            raise ConfigError("no source: give a folder or a file, such as `sanitize import photos/ --out shards`")
        options = {
            "kind": kind,
            "images": images,
            "image_column": image_column,
            "label_column": label_column,
            "split": split,
            "samples_per_shard": samples_per_shard,
            "max_refused_fraction": max_refused,
        }
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        given |= {"header": False} if no_header else {}
        given |= {"classes": listed_classes(classes)} if classes is not None else {}
        result = _import(given, sources, out, set_ or [], seed or 0)
    if as_json:
        print_json(result)
    else:
        _show(result)


def _import(options: dict[str, Any], sources: list[str], out: str, assignments: list[str], seed: int) -> dict[str, Any]:
    """Import; places and counts."""
    from sanitize.compute import Compute
    from sanitize.importing import ImportConfig, import_data

    config = make_config(ImportConfig, {}, options, assignments)
    made = import_data(config, sources, out, Compute(device="cpu", seed=seed))
    return {"out": made.path, "shards": len(made.shards()), **made.summary(), "labels": made.classes()}


def _show(result: dict[str, Any]) -> None:
    """Counts, what was refused, and the next command."""
    from sanitize.data.class_names import class_name

    for one in result["refused_by_reason"]:
        examples = f" ({', '.join(one['examples'])}{', …' if one['n'] > len(one['examples']) else ''})"
        say("refused", "yellow", f"{one['n']:,} x {one['reason']}{examples if one['examples'] else ''}")
    for what, n in result["notes"].items():
        say("left out", "yellow", f"{n:,} {what}")
    console.print(
        f"{counted(result['offered'], 'image')} = {result['imported']:,} imported + {result['refused']:,} refused; "
        f"{counted(result['shards'], 'shard')}: {result['out']}",
        highlight=False,
        soft_wrap=True,
    )
    if result["classes"] is None:
        console.print("captions, no classes: later commands need `--set index.label=null`", highlight=False)
        say("next:", "green", f"sanitize inspect {shlex.quote(result['out'])} --label none")
        return
    by_number = sorted((number, name) for name, number in result["labels"].items())
    counts = [f"{class_name(i, {i: name})}: {result['classes'][name]:,}" for i, name in by_number]
    more = f", and {len(counts) - _SHOWN:,} more" if len(counts) > _SHOWN else ""
    console.print("classes:", ", ".join(counts[:_SHOWN]) + more, highlight=False, soft_wrap=True, markup=False)
    for note in result["class_notes"]:
        say("note:", "yellow", note)
    say("next:", "green", f"sanitize clean --shards {shlex.quote(result['out'])} --out runs/first")
