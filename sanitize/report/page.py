"""The page about a cleaning run: removed and unreadable samples, scores, provenance, and how to restore samples.

The page is rendered from the numbers in `report.json`, which come from finished artifacts alone. Strings and images of
the data are untrusted: strings are escaped and shown without control characters, images are decoded and encoded again,
and the content security policy of the page forbids scripts and requests.
"""

import base64
import functools
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field

from sanitize.artifacts import Artifact, Part
from sanitize.compute import Compute
from sanitize.data.class_names import class_name as class_label
from sanitize.data.dataset import Dataset
from sanitize.data.tables import Hygiene, Scores, Selection
from sanitize.errors import ArtifactError
from sanitize.models.checkpoint import Checkpoint
from sanitize.plural import counted, were
from sanitize.report import charts
from sanitize.report.finding import VERDICTS, Finding, by_remedy, describe_canary, find, groups_of
from sanitize.report.groups import pictures_of, with_examples
from sanitize.report.hygiene import hygiene_numbers, hygiene_pictures, members_of
from sanitize.report.numbers import collect
from sanitize.report.pictures import Thumbnail, pictures, written
from sanitize.select.scored import kind_of
from sanitize.select.write import Shards
from sanitize.stage import Work, stage

MAX_TEXT = 160  # characters of one string from the data
MAX_GROUPS = 60  # candidate groups in the table
MAX_FACT = 8_000  # characters of one fact or configuration


class ReportConfig(BaseModel):
    """Content of the page.

    Attributes:
        title: title of the page.
        n_images: number of suspicious samples shown: removed samples first, then the highest scores that were kept.
        n_kept_images: least number of kept samples shown in addition, however many were removed.
        n_group_images: most pictures of a group of similar samples; fewer where there are many groups.
        n_histograms: number of histograms, one for a class and a scorer; the most affected classes first.
        n_classes: rows of the class table, the most affected classes first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = Field(default="Training data report", min_length=1, max_length=200)
    n_images: int = Field(default=48, ge=0, le=200)
    n_kept_images: int = Field(default=12, ge=0, le=48)
    n_group_images: int = Field(default=8, ge=0, le=8)
    n_histograms: int = Field(default=24, ge=1, le=64)
    n_classes: int = Field(default=200, ge=1, le=1000)


class Report(Artifact):
    """`index.html`, and `report.json` with the same numbers for machines."""


@stage(Report, version=9, gpu=False, draws="nothing")
def write_report(
    config: ReportConfig,
    dataset: Dataset,
    scores: Sequence[Scores],
    selection: Selection,
    shards: Shards,
    out: str,
    compute: Compute,
    facts: dict[str, str] | None = None,
    embedder: Checkpoint | None = None,
    hygiene: Hygiene | None = None,
) -> Work:
    """Write the page about a cleaning run.

    Args:
        config: content of the page.
        dataset: all samples; the source shards are not read again.
        scores: scores of the usable samples, by each scorer.
        selection: verdict on each sample.
        shards: the written shards; the pictures are read from them.
        out: folder of the artifact: `index.html`, `report.json`.
        compute: unused; every stage takes it.
        facts: further rows of "How it was done", name -> text. Facts are part of the recipe: keep dates and paths out.
        embedder: the suspect model, for the verdict on the whole data set; None leaves the verdict out.
        hygiene: duplicates, images of low quality and the like; None leaves the section out.

    Returns:
        The Report. Versions of the software are on the page but not in the recipe: a newer torch is no reason to
        refuse a finished folder.

    Raises:
        ArtifactError: the artifacts do not belong together.
    """
    given: dict[str, Artifact] = {"dataset": dataset, **{f"scores.{kind_of(s)}": s for s in scores}}
    given |= {"selection": selection, "shards": shards} | ({} if embedder is None else {"embedder": embedder})
    given |= {} if hygiene is None else {"hygiene": hygiene}
    rows = [[name, text] for name, text in (facts or {}).items()]  # a list: their order is seen on the page

    def write(part: Part) -> None:
        _check(dataset, scores, selection, shards)
        n_images = config.n_images, min(config.n_kept_images, config.n_images)
        numbers = collect(dataset, scores, selection, n_images, config.n_histograms)
        numbers |= {"title": config.title, "n_class_rows": min(config.n_classes, len(numbers["classes"]))}
        numbers |= {"chain": [_link(*item) for item in given.items()], "facts": rows, "versions": versions(rows)}
        numbers |= _verdict(scores, selection, embedder, config.n_group_images, dataset.class_names)
        numbers["hygiene"] = None if hygiene is None else hygiene_numbers(hygiene, selection, dataset.class_names)
        numbers["headline"] = headline(numbers)
        part.write_json("report.json", numbers)
        thumbnails = pictures(numbers["suspects"], dataset, written(shards))
        of_groups = pictures_of(numbers["groups"], dataset, shards)
        if hygiene is not None:
            numbers["hygiene_pictures"] = hygiene_pictures(numbers["hygiene"], dataset, shards)
        part.write("index.html", render(numbers, thumbnails, of_groups).encode())
        part.counts.update(numbers["counts"])

    digests = {name: artifact.digest for name, artifact in given.items()}
    return Work(write=write, config=config.model_dump(mode="json") | {"facts": rows}, inputs=digests)


def _check(dataset: Dataset, scores: Sequence[Scores], selection: Selection, shards: Shards) -> None:
    """Refuse artifacts of different runs: the page would be silently wrong."""
    parents: tuple[tuple[Artifact, str, Artifact], ...] = (
        (selection, "dataset", dataset),
        *((selection, f"scores.{kind_of(s)}", s) for s in scores),
        (shards, "dataset", dataset),
        (shards, "selection", selection),
    )
    judged = {name for name in selection.manifest().recipe.inputs if name.startswith("scores.")}
    if judged and judged != {f"scores.{kind_of(s)}" for s in scores}:
        raise ArtifactError(f"{selection.path} was made from {', '.join(sorted(judged))}; give artifacts of one run")
    for child, name, parent in parents:
        # A restored selection names neither data set nor scores.
        if child.manifest().recipe.inputs.get(name, parent.digest) != parent.digest:
            raise ArtifactError(f"{child.path} was not made from {parent.path}; give artifacts of one run")


def _verdict(
    scores: Sequence[Scores],
    selection: Selection,
    embedder: Checkpoint | None,
    n_images: int,
    names: Mapping[int, str],
) -> dict[str, Any]:
    """Verdict on the data set, facts about the suspect model, and the groups that were judged."""
    if embedder is None:
        return {"finding": None, "suspect": None, "groups": [], "n_groups": 0}
    finding = finding_of(scores, selection, embedder, names).plain()
    groups = groups_of([s.read_json("scorer.json") for s in scores])
    shown = with_examples(groups[:MAX_GROUPS], selection, n_images)
    return {"finding": finding, "suspect": embedder.suspect, "groups": shown, "n_groups": len(groups)}


def finding_of(
    scores: Sequence[Scores], selection: Selection, embedder: Checkpoint, names: Mapping[int, str]
) -> Finding:
    """The verdict on the data set of a run, from its artifacts, with the names of classes."""
    scorers = {kind_of(s): s.read_json("scorer.json") for s in scores}
    removed = selection.manifest().counts.get("quarantined", 0)
    return find(selection.read_json("selection.json"), scorers, embedder.suspect, removed, names)


def _link(name: str, artifact: Artifact) -> dict[str, Any]:
    """One artifact of the chain; source shards are counted, not listed."""
    recipe = artifact.manifest().recipe
    inputs = {parent: digest for parent, digest in sorted(recipe.inputs.items()) if digest != "shard"}
    return {
        "name": name,
        "stage": recipe.stage,
        "version": recipe.version,
        "digest": artifact.digest,
        "inputs": inputs,
        "n_shards": len(recipe.inputs) - len(inputs),
        "numerics": recipe.numerics,
        "config": recipe.config,
    }


def versions(facts: list[list[str]]) -> dict[str, str]:
    """Versions of the software, except those given among the facts."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    found |= {name: metadata.version(name) for name in ("sanitize", "torchvision", "numpy", "pyarrow")}
    stated = {name.lower() for name, _ in facts}
    return {name: text for name, text in sorted(found.items()) if name not in stated}


def headline(numbers: dict[str, Any]) -> str:
    """The verdict in one sentence that claims no more than the rule supports."""
    sentence, finding = _outcome(numbers), numbers["finding"]
    if finding is None or finding["verdict"] == "found":
        return sentence
    return f"{VERDICTS[finding['verdict']].capitalize()}: {sentence[:1].lower()}{sentence[1:]}"


def _outcome(numbers: dict[str, Any]) -> str:
    counts = numbers["counts"]
    n, total = counts["quarantined"], counts["samples"]
    by_hygiene = sum(c.get("by_hygiene", 0) for c in numbers["classes"])
    unreadable = f"{counts['unreadable']:,} could not be read"
    if n == 0:
        if not counts["unreadable"]:
            return f"No samples were removed; all {total:,} were kept."
        return f"No samples were removed; {counts['clean']:,} of {total:,} were kept, {unreadable}."
    kinds = {rule["kind"] for rule in numbers["rules"].values()}
    if numbers["verdict"] == "combined":
        kinds = {"fdr"}
    one = n == 1
    outliers = "an outlier" if one else "outliers"
    reasons = {
        "separation": " as likely poisoned",
        "fdr": f" as {outliers}",
        "conformal": f" as {outliers} from the trusted samples",
        "contamination": f" as the most suspicious of {'its class' if one else 'their classes'}",
    }
    reason = reasons[kinds.pop()] if len(kinds) == 1 and not by_hygiene else ""
    reason += f" ({by_hygiene:,} for hygiene alone)" if by_hygiene else ""
    end = f"; {unreadable}" if counts["unreadable"] else ""
    return f"{n:,} of {counted(total, 'sample')} {were(n)} removed{reason}, from {_places(numbers)}{end}."


def _places(numbers: dict[str, Any]) -> str:
    touched = [clean_text(class_name(c)) for c in numbers["classes"] if c["removed"]]
    if len(touched) == numbers["n_classes"] > 4:
        return f"all {counted(len(touched), 'class')}"
    if len(touched) > 4:
        return f"{len(touched):,} of {counted(numbers['n_classes'], 'class')}"
    if len(touched) == 1:
        return f"class {touched[0]}"
    return f"classes {', '.join(touched[:-1])} and {touched[-1]}"


def class_name(of_class: dict[str, Any]) -> str:
    """Number of a class, and its name if known."""
    return class_label(of_class["label"], {} if of_class["name"] is None else {of_class["label"]: of_class["name"]})


def clean_text(text: str, limit: int = MAX_TEXT) -> str:
    """Untrusted text, safe to show: without control, direction or surrogate characters, and of limited length."""
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[: limit + 1])
    if len(text) <= limit and len(shown) <= limit:
        return shown
    return shown[: limit - 2] + " …"


def clean_lines(text: str) -> str:
    """The same for a longer text, line by line."""
    head = text if len(text) <= MAX_FACT else text[:MAX_FACT] + " …"
    return "\n".join(clean_text(line, MAX_FACT) for line in head.split("\n"))


def render(numbers: dict[str, Any], thumbnails: list[Thumbnail | None], of_groups: list[list[Thumbnail | None]]) -> str:
    """The page.

    Args:
        numbers: content of `report.json`.
        thumbnails: picture of each suspect; None where there is none.
        of_groups: pictures of the examples of each group.
    """
    shown = {"hygiene_pictures": {}} | numbers | _charts(numbers)
    return template("page.html.j2").render(shown, thumbnails=thumbnails, of_groups=of_groups)


def write_page(part: Part, name: str, numbers: dict[str, Any], **shown: Any) -> None:
    """Write a page of one column, and its numbers as `report.json`.

    Args:
        part: files of the artifact.
        name: name of the template, without `.html.j2`.
        numbers: content of `report.json`; versions of the software are added.
        shown: further values for the template: drawings, pictures.
    """
    numbers = numbers | {"versions": versions([])}
    part.write_json("report.json", numbers)
    part.write("index.html", template(f"{name}.html.j2").render(numbers, **shown).encode())


@functools.cache
def template(name: str) -> jinja2.Template:
    """The page template of this name."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "count": lambda n: f"{n:,}",
        "counted": counted,
        "share": lambda x: f"{100 * x:.1f} %" if x == 0 or x >= 0.001 else "< 0.1 %",
        "number": lambda x, step=0.0: "–" if x is None else charts.number(x, step),
        "text": clean_text,
        "lines": clean_lines,
        "pretty": lambda value: json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False),
        "class_name": class_name,
        "canary": describe_canary,
        "verdict": VERDICTS.__getitem__,
        "by_remedy": by_remedy,
        "members_of": members_of,
        "combined": lambda config, numerics: config | ({"numerics": numerics} if numerics else {}),
        "csp_hash": lambda css: "sha256-" + base64.b64encode(hashlib.sha256(str(css).encode()).digest()).decode(),
        "png": lambda png: Markup("data:image/png;base64,") + base64.b64encode(png).decode(),
    }
    return environment.get_template(name)


def _note(of_class: dict[str, Any], numbers: dict[str, Any]) -> str:
    """What the table of classes says of a class beside its numbers."""
    if of_class["capped"]:
        return "cap reached"
    if of_class["removed"]:
        return "group chosen by labels" if of_class["side_by_labels"] else ""
    decisions = [group.get("decision") for group in numbers["groups"] if group.get("label") == of_class["label"]]
    if "unsure" in decisions:
        return "no removals; a group is undecided"
    least = max((scorer.get("min_class", 0) for scorer in numbers["scorers"]), default=0)
    n_judged = of_class.get("pictures", of_class["n"])
    return "too few samples to judge" if n_judged < least else "no removals"


def _charts(numbers: dict[str, Any]) -> dict[str, Any]:
    """The drawings as safe markup: charts escape their text."""
    separations = [c["separation"] for c in numbers["classes"] if c["separation"] is not None]
    levels = [c["level"] for c in numbers["classes"] if c["level"] is not None]
    top = 1.15 * max([*separations, *levels], default=1.0)
    by_label = {c["label"]: c for c in numbers["classes"]}
    counts = numbers["counts"]
    return {
        "by_label": by_label,
        "notes": {c["label"]: _note(c, numbers) for c in numbers["classes"]},
        "steps": {
            scorer["kind"]: charts.step_for([c["scorers"][scorer["kind"]]["highest"] for c in numbers["classes"]])
            for scorer in numbers["scorers"]
        },
        "has_separation": bool(separations),
        "has_disagreement": any(c["disagreement"] is not None for c in numbers["classes"]),
        "balance": Markup(charts.balance([(k, counts[k]) for k in ("clean", "quarantined", "unreadable")])),
        "gauges": {
            c["label"]: Markup(charts.gauge(c["separation"], c["level"], top, c["removed"] > 0))
            for c in numbers["classes"][: numbers["n_class_rows"]]
            if c["separation"] is not None
        },
        "drawings": [
            Markup(
                charts.histogram(
                    h["edges"], h["kept"], h["removed"], h["threshold"], clean_text(class_name(by_label[h["label"]]))
                )
            )
            for h in numbers["histograms"]
        ],
    }
