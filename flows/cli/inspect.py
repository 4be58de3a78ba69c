"""`sanitize inspect`."""

import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Annotated, Any

import typer
from rich.table import Table

from flows.cli.app import AsJson, Quiet, as_text, bars, console, errors, print_json, say
from sanitize.plural import counted
from sanitize.settings import make_config

_N_CLASSES = 20  # classes on the terminal
_N_MEMBERS = 12  # suffixes on the terminal
_N_KINDS = 20  # kinds of reasons on the terminal
_BAD_FRACTION = 0.05  # the default
_UNCHECKED = {
    "images": [],
    "digests": ["hygiene looked for equal files only, because index.check=digest decodes no image"],
    "nothing": ["hygiene looked at nothing, because index.check=headers reads no image"],
}
_TABLE = "table:labels.csv#class"


def inspect(
    shards: Annotated[list[str], typer.Argument(help="Directory, glob or brace range of shards.")],
    label: Annotated[
        str,
        typer.Option(
            help="Place of the class: the suffix of a member, json:FIELD, json:A.B.C, table:FILE#COLUMN, or none."
        ),
    ] = "cls",
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of unreadable samples above which the exit code is 1.")
    ] = _BAD_FRACTION,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="Any other setting of `index:`, such as image.channels=1; the value is YAML. May be given several "
            "times.",
        ),
    ] = None,
    hygiene: Annotated[
        bool,
        typer.Option("--hygiene", help="Also list duplicates, images of low quality and images with a wrong hash."),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Read shards and list their samples, classes and image sizes, and what cannot be used, with the reason.

    Nothing is written. Useful before `clean`, and when too many samples are unreadable for `clean`. The table lists
    shards that are damaged or have unreadable samples; `--json` lists all shards, and all unreadable samples by shard,
    key and byte. The last lines say what to do next. With `--hygiene` also what needs no model: the same picture
    several times, perhaps with different labels; images that are dark, blank, blurred, torn.

    Exit code: 0 if all is well. 1 if a shard is damaged or refused, no sample is usable, or more than
    `--max-bad-fraction` of the samples are unreadable. 2 if there are no shards or the options are wrong.

    Example:

        sanitize inspect 'data/train-*.tar' --label json:class
    """
    from sanitize.data.index_config import IndexConfig

    with errors():
        options = {"label": label, "max_bad_fraction": max_bad_fraction}
        config = make_config(IndexConfig, {}, options, set_ or ())
        with bars(quiet):
            result = _inspect(shards, config, None if as_json else 3)
            if hygiene:
                result["hygiene"], notes = _hygiene(shards, config)
                result["notes"] += [note for note in notes if note not in result["notes"]]
            elif config.verify is not None:
                result["notes"].append("index.verify is looked at with --hygiene only")
        is_well = _is_well(result, config.max_bad_fraction)
        result["next"] = _next(result, shards, config, set_ or (), is_well)
    del result["places"]
    if as_json:
        print_json(result)
    else:
        _show(result, config.label is not None, config.has_several)
        if hygiene:
            _show_hygiene(result["hygiene"], _names(result))
        for line in result["next"]:
            say("next:", "green", line)
    if not is_well:
        raise typer.Exit(1)


def _inspect(sources: list[str], config: Any, max_examples: int | None) -> dict[str, Any]:
    """Contents of the shards. Raises SanitizeError if none of them can be opened."""
    import pyarrow.compute as pc

    from sanitize.data.bad_data import max_label
    from sanitize.data.dataset_info import notes_on_shards, shard_names
    from sanitize.data.index import index_shard
    from sanitize.data.index_config import label_reader
    from sanitize.data.reasons import Reasons
    from sanitize.data.shared_keys import SharedKeys
    from sanitize.data.sources import find_shards, list_sources
    from sanitize.data.tables import sample_starts
    from sanitize.errors import DataError
    from sanitize.progress import track

    found, refused = list_sources(sources)
    if not found:
        find_shards(sources)  # raises, unless all there is are archives that are not read
    names_of = config.named(found.values()).class_names or {}
    reader = label_reader(config)
    labels: Counter[Any] = Counter()  # by class, or by name where names are gathered
    sizes: Counter[str] = Counter()
    members: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    reasons, shared = Reasons(max_examples), SharedKeys()
    per_shard, places = {}, {}
    failure = None
    with track("inspect", None) as advance:
        for shard, url in found.items():
            try:
                indexed, per_shard[shard] = index_shard(url, config, advance, reader)
            except DataError as error:
                failure, refused[url] = error.with_traceback(None), str(error)  # a traceback refers to this frame
                continue
            places[shard] = url
            rows = indexed.select(["status", "label", "height", "width"]).to_pylist()
            ok = [row for row in rows if row["status"] == "ok"]
            names = shard_names(indexed)
            usable = [rows[i]["label"] for i in sample_starts(indexed).tolist() if rows[i]["status"] == "ok"]
            labels.update(label if names is None else names[label] for label in usable)
            sizes.update(f"{row['height']}x{row['width']}" for row in ok)
            formats.update(per_shard[shard]["formats"])
            reasons.add(shard, indexed)
            if config.has_table:
                shared.add(shard, indexed.filter(pc.equal(indexed["status"], "ok"))["key"].to_pylist())
            _count_members(indexed, members)
    if failure is not None and not per_shard:
        raise failure
    classes = sorted(labels) if config.classes == "names" else config.classes
    names_of = names_of if classes is None else dict(enumerate(classes))
    by_class = {i: labels[name] for i, name in enumerate(classes)} if config.classes == "names" else labels
    kinds = reasons.kinds()
    largest = max_label(reasons) if config.n_classes is None else None
    return {
        "shards": per_shard,
        "refused": refused,
        "labels": {str(label): by_class[label] for label in sorted(by_class)},
        "classes": None if classes is None else list(classes),
        "class_names": {str(label): names_of[label] for label in sorted(by_class) if label in names_of},
        "notes": [
            *(_notes(by_class, classes, config, members) if largest is None else []),
            *notes_on_shards(per_shard),
        ],
        "image_sizes": dict(sizes.most_common()),
        "formats": dict(formats.most_common()),
        "members": dict(sorted(members.items(), key=lambda item: (-item[1], item[0]))),
        "unreadable": reasons.counts(),
        "reasons": [{"reason": kind.reason, "n": kind.n, "examples": kind.examples} for kind in kinds],
        "shared_keys": shared.problem(),
        "largest_label": largest,
        "places": places,
    }


def _notes(
    labels: Mapping[int, int], classes: Sequence[str] | None, config: Any, members: Mapping[str, int]
) -> list[str]:
    """What is odd about the classes, or missing."""
    from sanitize.data.labels import notes_on
    from sanitize.data.samples import is_picture

    notes = [] if config.label is None else notes_on(labels, config.n_classes, classes)
    if config.label is None and labels:
        notes.append(
            "without labels `clean` finds samples unlike all others in an embedding made without labels; what looks "
            "like the rest and has a wrong caption is not seen"
        )
    elif not labels and "txt" in members and any(map(is_picture, members)) and config.label == "cls":
        notes.append("pictures with captions (.txt) and no class, as img2dataset writes them")
    return notes


def _count_members(rows: Any, members: Counter[str]) -> None:
    """Count the members of a shard by suffix; rare suffixes beyond a thousand are one."""
    import pyarrow.compute as pc

    names = rows["members"].combine_chunks().flatten().field("name")
    suffixes = pc.utf8_lower(pc.replace_substring_regex(names, r"^(?:.*/)?[^./]*\.?", ""))
    for row in pc.value_counts(suffixes).to_pylist():
        suffix = row["values"] if row["values"] in members or len(members) < 1000 else "others"
        members[suffix or "no suffix"] += row["counts"]


def _hygiene(sources: list[str], config: Any) -> tuple[dict[str, Any], list[str]]:
    """Content of hygiene.json, and the notes of the index; both are made in a temporary folder."""
    import tempfile

    from sanitize.compute import Compute
    from sanitize.data.index import index_shards
    from sanitize.hygiene import HygieneConfig, check_hygiene

    lenient = {"max_bad_fraction": 1.0, "max_bad_shards": 2**31, "image_facts": True}
    with tempfile.TemporaryDirectory() as folder:
        compute = Compute(device="cpu")
        dataset = index_shards(config.model_copy(update=lenient), sources, f"{folder}/index", compute)
        found: dict[str, Any] = check_hygiene(HygieneConfig(), dataset, f"{folder}/hygiene", compute).read_json(
            "hygiene.json"
        )
        return found, dataset.info["notes"] + _UNCHECKED[found["checked"]]


def _show_hygiene(found: dict[str, Any], names: Mapping[int, str]) -> None:
    """A row for each kind of finding, and the largest groups of copies."""
    from sanitize.data.class_names import class_name
    from sanitize.report.hygiene import members_of

    table = Table("hygiene", "samples", "for example", title_justify="left")
    for kind, n in found["counts"].items():
        if n:
            example = found["examples"][kind][0]
            table.add_row(kind.replace("_", " "), f"{n:,}", as_text(f"{example['key']}: {example['reason']}"))
    console.print(table if table.row_count else "hygiene: nothing found")
    for group in found["groups"][:5]:
        of_classes = [(f"{n:,} of ", class_name(int(label), names)) for label, n in group["labels"].items()]
        labels = ", ".join(f"{n if len(of_classes) > 1 else ''}class {name}" for n, name in of_classes)
        keys = [as_text(member["key"]).plain for member in group["members"][:4]]
        keys += ["…"] if len(keys) < group["n"] else []
        line = f"{members_of(group)}, {labels}: {', '.join(keys)}"
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _is_well(result: dict[str, Any], max_bad_fraction: float) -> bool:
    n_ok, n_bad = sum(result["labels"].values()), sum(result["unreadable"].values())
    is_damaged = any(summary["damage"] for summary in result["shards"].values())
    is_read = n_ok > 0 and n_bad <= max_bad_fraction * (n_ok + n_bad) and not result["shared_keys"]
    return is_read and not is_damaged and not result["refused"]


def _next(result: dict[str, Any], shards: Sequence[str], config: Any, set_: Sequence[str], is_well: bool) -> list[str]:
    """What to do next: commands, and sentences where no command helps."""
    if result["shared_keys"]:
        return [result["shared_keys"]]
    n_ok, n_bad = sum(result["labels"].values()), sum(result["unreadable"].values())
    if n_ok and n_bad <= config.max_bad_fraction * (n_ok + n_bad):
        return [_clean(shards, config, set_)] if is_well else _of_damaged(result, _Again(shards, config, set_))
    if not result["reasons"]:
        return ["repair the shards, or leave them out: none has a sample that can be used"]
    again = _Again(shards, config, set_)
    kinds = result["reasons"][:1] if n_ok else result["reasons"]
    remedies = (_remedy(kind, result, again) for kind in kinds)
    lines = next(filter(None, remedies), ["look at the samples named above; --json names all of them"])
    if n_ok:
        fraction = math.ceil(100 * n_bad / (n_ok + n_bad)) / 100
        lines += ["or go on without them:", again(max_bad_fraction=fraction)]
    return lines


def _clean(shards: Sequence[str], config: Any, set_: Sequence[str]) -> str:
    """The command that cleans these shards with these settings."""
    options = [] if config.label in ("cls", None) else [f"index.label={config.label}"]
    options += ["index.label=null", "embedder.kind=simclr", "scorers=[{kind: rca}]"] if config.label is None else []
    options += [f"index.max_bad_fraction={config.max_bad_fraction}"] if config.max_bad_fraction != _BAD_FRACTION else []
    options += [f"index.{one}" for one in set_]
    sets = "".join(f" --set {shlex.quote(one)}" for one in options)
    given = " ".join(f"--shards {shlex.quote(shard)}" for shard in shards)
    return f"sanitize clean {given}{sets} --out runs/first"


class _Again:
    """The same `sanitize inspect` with other options."""

    def __init__(self, shards: Sequence[str], config: Any, set_: Sequence[str]) -> None:
        self._shards, self._set = list(shards), list(set_)
        self._max_bad_fraction = config.max_bad_fraction
        self.label = "none" if config.label is None else config.label

    def __call__(
        self,
        label: str | None = None,
        more: str | None = None,
        shards: Sequence[str] | None = None,
        max_bad_fraction: float | None = None,
    ) -> str:
        options = [] if (label or self.label) == "cls" else ["--label", label or self.label]
        fraction = max_bad_fraction or self._max_bad_fraction
        options += [] if fraction == _BAD_FRACTION else ["--max-bad-fraction", f"{fraction:g}"]
        kept = [one for one in self._set if more is None or one.partition("=")[0] != more.partition("=")[0]]
        options += [word for one in [*kept, *([more] if more else [])] for word in ("--set", one)]
        return shlex.join(["sanitize", "inspect", *(shards or self._shards), *options])


def _of_damaged(result: dict[str, Any], again: _Again) -> list[str]:
    """What to do where most is well, and a shard is damaged or refused."""
    for shard, summary in result["shards"].items():
        if (summary["damage"] or "").startswith("another archive"):
            return _packed_again(result["places"], shard, "joined", again, "--ignore-zeros")
    return ["repair or leave out the damaged or refused shards, then inspect again"]


def _packed_again(places: Mapping[str, str], shard: str, name: str, again: _Again, *options: str) -> list[str]:
    """Commands that unpack a shard with these options of GNU tar, and pack it again, sorted by name."""
    lines, unpack = _unpack(places, shard, name, *options)
    lines.append(f"{unpack} && tar --sort=name -cf {name}.tar -C {name} .")
    lines.append(again(shards=[f"{name}.tar"]))
    return lines + ["the same for the other shards"] * (len(places) > 1)


def _unpack(places: Mapping[str, str], shard: str, folder: str, *options: str) -> tuple[list[str], str]:
    """What to do before, and a command that unpacks a shard into a new folder."""
    from sanitize.storage import is_local

    place = places[shard]
    before = [] if is_local(place) else [f"download {place} first"]
    path = shard.rpartition("/")[2] if before else place
    # -k: two members that become one file are an error.
    return before, shlex.join(["mkdir", folder]) + " && " + shlex.join(["tar", *options, "-xkf", path, "-C", folder])


def _remedy(kind: Mapping[str, Any], result: dict[str, Any], again: _Again) -> list[str]:
    """What to do about one kind of unreadable samples; nothing where no setting helps."""
    reason, example = kind["reason"], kind["examples"][0]
    members, places, shard = result["members"], result["places"], example["shard"]
    if "do not stand together" in reason:
        return _packed_again(places, shard, "sorted", again)
    if "have different keys" in reason:
        return _one_folder(example["reason"], places, shard, again)
    if reason.startswith("a key ends at the first dot"):
        return _packed_again(places, shard, "renamed", again, r"--transform=s,\.\([^./]*\.\),_\1,g")
    if "index.image.member" in reason and _pictures(members):
        return [again(more=f"image.member={one}") for one in (_pictures(members)[0], "first", "all")]
    if result["largest_label"] is not None:
        return [again(more=f"n_classes={result['largest_label'] + 1}")]
    if "set index.classes=names" in reason:
        return [again(more="classes=names")]
    if "set index.label to" in reason:
        found = Counter({s: n for s, n in members.items() if s.endswith(f".{again.label.partition(':')[0]}")})
        rest = again.label.partition(":")[2]
        return [again(found.most_common(1)[0][0] + (f":{rest}" if rest else ""))]
    if reason.startswith("no image member"):
        return _without_pictures(result, shard, again)
    if reason.startswith(("no .", "the json member")):
        return _without_label(example, result, again)
    if again.label.endswith("json") and "it is not one class" in reason and (fields := _fields(places, example)):
        return [again(f"{again.label}:{field}", "classes=names" if is_text else None) for is_text, field in fields]
    if any(part in reason for part in ("is not an integer", "is no class name", "and give the classes in a table")):
        return [
            f"write one {'name' if 'no class name' in reason else 'integer'} a sample; or give the classes in a CSV "
            "file with the columns key and class:",
            again(_TABLE),
        ]
    if "table of labels" in reason:
        return ["give the table one row for each key; a key is the name of the file up to its first dot, with folders"]
    return []


def _one_folder(reason: str, places: Mapping[str, str], shard: str, again: _Again) -> list[str]:
    """Commands that put parallel folders, of pictures and of labels, into one."""
    prose = ["move pictures and labels into one folder, so that their names differ in the suffix alone; pack again"]
    found = re.search("different keys, '(.+)' and '(.+)': ", reason)
    parts = [key.split("/")[:-1] for key in found.groups()] if found else [[], []]
    n = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(*parts, strict=False))))
    before, (a, b) = parts[0][:n], (part[n:] for part in parts)
    names = [*before, *a[:1], *b[:1]]
    if not (a and b) or a[1:] != b[1:] or not all(re.fullmatch(r"[\w-]+|\.", name) for name in names):
        return prose
    stem = "".join(f"{name}/" for name in before)
    moves = ";".join(f"s,^{stem}{one[0]}/,{stem}," for one in (a, b)).replace(".", r"\.")
    return _packed_again(places, shard, "together", again, f"--transform={moves}")


def _without_pictures(result: dict[str, Any], shard: str, again: _Again) -> list[str]:
    """What to do where samples have no picture; nothing where others have one."""
    from sanitize.data.decode import FORMATS
    from sanitize.data.samples import is_picture
    from sanitize.tar.compression import SHARD_SUFFIXES

    if any(map(is_picture, result["members"])):
        return []
    if any(f".{suffix}".endswith(SHARD_SUFFIXES) for suffix in result["members"]):
        before, unpack = _unpack(result["places"], shard, "unpacked")
        return ["there are archives in the archive:", *before, unpack, again(shards=["unpacked"])]
    return [f"nothing here can be cleaned: sanitize reads pictures ({', '.join(FORMATS)})"]


def _without_label(example: Mapping[str, Any], result: dict[str, Any], again: _Again) -> list[str]:
    """Where the class may be instead: in a field, in the folder, or in the name; or there is none."""
    from sanitize.importing.splits import SPLITS

    places = result["places"]
    fields = _fields(places, example)
    lines = [*(again(f"json:{f}", "classes=names" if is_text else None) for is_text, f in fields), again("none")]
    folders = [part for part in example["key"].split("/")[:-1] if part != "."]
    if fields or "txt" in result["members"]:
        return lines
    # Folders of splits are no classes.
    if folders and folders[-1].lower() not in SPLITS:
        before, unpack = _unpack(places, example["shard"], "unpacked")
        root = shlex.quote("/".join(["unpacked", *folders[:-1]]))
        others = ", with the other shards in the same folder" * (len(places) > 1)
        lines += [f"if the folders are the classes, import the pictures{others}:", *before]
        lines += [f"{unpack} && sanitize import {root} --out shards"]
    return [*lines, "if the class is in the name, give it in a CSV file with the columns key and class:", again(_TABLE)]


def _pictures(members: Mapping[str, int]) -> list[str]:
    """Suffixes of pictures, the most frequent first, in the order of their names where they are as frequent."""
    from sanitize.data.samples import is_picture

    found = [suffix for suffix in members if is_picture(suffix)]
    return sorted(found, key=lambda suffix: (-members[suffix], suffix)) or ["first"]


def _fields(places: Mapping[str, str], example: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """Fields of the JSON member of an unreadable sample that may be its label, at most two; see `label_fields`."""
    from sanitize.data.labels import label_fields
    from sanitize.data.samples import ShardReader
    from sanitize.tar.names import printable

    for sample in ShardReader(places[example["shard"]], suffix="json", digest=False):
        if printable(sample.key) == example["key"]:
            return label_fields(sample.members[0][1])[:2] if sample.members else []
    return []


def _show(result: dict[str, Any], has_labels: bool, has_several: bool) -> None:
    """A row for each shard with problems, one line for all shards, and the reasons with examples."""
    from sanitize.data.reasons import differences

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
    n_pictures = sum(summary["counts"].get("pictures", 0) for summary in per_shard.values())
    pictures = f" with {counted(n_pictures, 'usable picture')}" if has_several else ""
    console.print(
        f"{counted(len(per_shard), 'shard')}, {counted(n_bytes, 'byte')}: {counted(n_samples, 'sample')}{pictures}, "
        f"{n_bad:,} unreadable; {counted(n_damaged, 'shard')} damaged, {len(result['refused']):,} refused",
        soft_wrap=True,
    )
    if has_labels:
        console.print("samples by class:" if has_several else "classes:", _classes(result), soft_wrap=True)
    else:
        console.print("no labels are read: all samples are one class", soft_wrap=True)
    # With several pictures a sample, classes count samples, and formats and sizes count pictures.
    of_pictures = " of pictures" if has_several else ""
    console.print(
        f"formats{of_pictures}:", ", ".join(f"{name}: {n:,}" for name, n in result["formats"].items()) or "none"
    )
    sizes = list(result["image_sizes"].items())[:10]
    console.print(
        "sizes of pictures:" if has_several else "image sizes:",
        ", ".join(f"{size}: {n:,}" for size, n in sizes) or "none",
        soft_wrap=True,
    )
    console.print("members:", _some(result["members"], _N_MEMBERS), soft_wrap=True)
    for note in result["notes"]:
        say("note:", "yellow", note)
    for kind in result["reasons"][:_N_KINDS]:
        say("unreadable", "yellow", f"{kind['n']:,} x {kind['reason']}")
        for example in kind["examples"]:
            other = differences(example["reason"], kind["reason"])
            where = f"{example['key']} in {example['shard']} at byte {example['byte']:,}"
            say(" " * 10, "", f"{where}: {other}" if other else where)
    if len(result["reasons"]) > _N_KINDS:
        say(
            "unreadable", "yellow", f"{counted(len(result['reasons']) - _N_KINDS, 'other kind')} of reasons: see --json"
        )
    for reason in result["refused"].values():
        say("refused", "red", reason)


def _classes(result: dict[str, Any]) -> str:
    from sanitize.data.class_names import class_name

    names = _names(result)
    return _some({class_name(int(label), names): n for label, n in result["labels"].items()}, _N_CLASSES)


def _names(result: dict[str, Any]) -> dict[int, str]:
    """Names of the classes, by number."""
    return {int(label): name for label, name in result["class_names"].items()}


def _some(counts: Mapping[str, int], most: int) -> str:
    shown = ", ".join(f"{name}: {n:,}" for name, n in list(counts.items())[:most])
    return (shown + (f" and {len(counts) - most:,} more" if len(counts) > most else "")) or "none"
