"""The page: its numbers are the selection's, it repeats byte for byte, and data stays data."""

import base64
import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from sanitize.artifacts import Part, Recipe, make
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.decode import ImageConfig
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.tables import Scores, Selection, write_rows
from sanitize.errors import ArtifactError
from sanitize.models.checkpoint import Checkpoint
from sanitize.report import Report, ReportConfig, write_report
from sanitize.report import groups as report_groups
from sanitize.report.page import MAX_GROUPS, clean_text, render
from sanitize.report.pictures import BUDGET, pictures, thumbnail, written
from sanitize.select import (
    ContaminationRule,
    RestoreConfig,
    Rule,
    SelectConfig,
    SeparationRule,
    Shards,
    WriteConfig,
    restore_samples,
    select_samples,
    write_selected,
)

COMPUTE = Compute(device="cpu")
N_SHARDS, N_PER_SHARD, N_CLASSES = 3, 40, 4
HOSTILE = [
    [("<script>alert(1)<:script>.png", b"no image"), ("<script>alert(1)<:script>.cls", b"0")],
    [("\"'&<b>\u202egnp\u05d0.png", b""), ("\"'&<b>\u202egnp\u05d0.cls", b"</td><img src=x onerror=alert(1)>")],
    [("bell\x07.cls", b"1")],
    [("label.png", b"?"), ("label.cls", b"<svg/onload=alert(1)>")],
]


class Run(NamedTuple):
    """Artifacts of one small run."""

    dataset: Dataset
    scores: Scores
    selection: Selection
    shards: Shards

    def report(self, out: Path, config: ReportConfig | None = None, **facts: str) -> Report:
        given = (self.dataset, [self.scores], self.selection, self.shards)
        return write_report(config or ReportConfig(), *given, str(out), COMPUTE, facts)


def _png(i: int) -> bytes:
    pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def _shards(folder: Path, extra: list[list[tuple[str, bytes]]]) -> None:
    folder.mkdir(parents=True)
    for s in range(N_SHARDS):
        numbers = range(s * N_PER_SHARD, (s + 1) * N_PER_SHARD)
        samples = [[(f"{i:04d}.png", _png(i)), (f"{i:04d}.cls", b"%d" % (i % N_CLASSES))] for i in numbers]
        with tarfile.open(folder / f"part-{s}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for name, data in [member for sample in samples + (extra if s == 1 else []) for member in sample]:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def _scores_by(dataset: Dataset, out: Path, kind: str, score: Callable[[dict[str, Any]], float]) -> Scores:
    """Scores of the usable samples by a function of their row."""

    def write_part(shard: str, part: Part) -> None:
        rows = [row for row in dataset.rows(shard).to_pylist() if row["status"] == "ok"]
        columns = {name: [row[name] for row in rows] for name in ("position", "key", "label")}
        write_rows(part, shard, pa.table({**columns, "score": pa.array(map(score, rows), pa.float32())}))

    def finish(part: Part, _builder: object) -> None:
        part.write_json("scorer.json", {"config": {"kind": kind}, "rule": "fdr", "classes": {}})

    recipe = Recipe(stage="score_shards", config={"kind": kind}, inputs={"dataset": dataset.digest})
    return make(Scores, out, recipe, parts=dataset.shards, write_part=write_part, finish=finish)


def _scores(dataset: Dataset, out: Path, separations: dict[int, float], said: dict[str, float] | None = None) -> Scores:
    """Scores below 0, but 5 and more for every third sample of a class whose separation is high."""

    def write_part(shard: str, part: Part) -> None:
        rows = [row for row in dataset.rows(shard).to_pylist() if row["status"] == "ok"]
        noise = np.random.default_rng(len(shard)).random(len(rows)).astype(np.float32)
        far = [separations[row["label"]] > 4 and row["position"] % 3 == 0 for row in rows]
        columns = {name: [row[name] for row in rows] for name in ("position", "key", "label")}
        values = np.where(far, 5 + noise, -5 + noise).astype(np.float32)
        write_rows(part, shard, pa.table({**columns, "score": pa.array(values)}))

    def finish(part: Part, _builder: object) -> None:
        classes = {str(label): {"separation": value, **(said or {})} for label, value in separations.items()}
        info = {"config": {"kind": "toxic_direction"}, "rule": "separation", "classes": classes}
        part.write_json("scorer.json", info)

    recipe = Recipe(stage="score_shards", config=said or {}, inputs={"dataset": dataset.digest})
    return make(Scores, out, recipe, parts=dataset.shards, write_part=write_part, finish=finish)


def _run(
    folder: Path,
    separations: tuple[float, ...] = (9.0, 1.5, 1.0, 0.5),
    extra: list[list[tuple[str, bytes]]] | None = None,
    rule: Rule | None = None,
    said: dict[str, float] | None = None,
) -> Run:
    _shards(folder / "source", extra or [])
    dataset = index_shards(IndexConfig(max_bad_fraction=0.5), str(folder / "source"), str(folder / "00"), COMPUTE)
    scores = _scores(dataset, folder / "31", dict(enumerate(separations)), said)
    config = SelectConfig(rule=rule or SeparationRule())
    selection = select_samples(config, dataset, [scores], str(folder / "40"), COMPUTE)
    shards = write_selected(WriteConfig(), dataset, selection, str(folder / "50"), COMPUTE)
    return Run(dataset, scores, selection, shards)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return _run(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return _run(tmp_path_factory.mktemp("hostile"), extra=HOSTILE)


class _Page(HTMLParser):
    """Tags, attributes and text of a page; fails where tags do not match."""

    VOID = frozenset({"meta", "img", "link", "br", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


def _html(report: Report) -> str:
    return report.file("index.html").read_text("utf-8")


def _numbers(report: Report) -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads(report.file("report.json").read_bytes())
    return numbers


def test_counts_are_the_selections(planted: Run, tmp_path: Path) -> None:
    report = planted.report(tmp_path / "report")
    numbers, page, counts = _numbers(report), _Page(_html(report)), planted.selection.manifest().counts
    assert counts["quarantined"] > 0
    assert numbers["counts"]["samples"] == counts["samples"] == N_SHARDS * N_PER_SHARD
    assert numbers["counts"]["clean"] == counts["kept"]
    assert numbers["counts"]["quarantined"] == counts["quarantined"]
    assert sum(c["removed"] for c in numbers["classes"]) == counts["quarantined"]
    assert numbers["headline"] in page.words
    n_removed = counts["quarantined"]
    assert numbers["headline"] == f"{n_removed} of 120 samples were removed as likely poisoned, from class 0."
    assert re.search(rf"quarantined\s*{counts['quarantined']}", page.words)
    assert [c["label"] for c in numbers["classes"]] == [0, 1, 2, 3]  # the affected first, then by separation
    assert page.tags["script"] == 0


def test_histogram_counts_sum_to_the_class(planted: Run, tmp_path: Path) -> None:
    numbers = _numbers(planted.report(tmp_path / "report"))
    (histogram,) = numbers["histograms"]
    of_class = numbers["classes"][0]
    assert histogram["label"] == of_class["label"] == 0
    assert sum(histogram["removed"]) == of_class["removed"]
    assert sum(histogram["kept"]) == of_class["n"] - of_class["removed"]
    right_of_it = [left >= histogram["threshold"] for left in histogram["edges"][:-1]]
    assert not any(n for n, right in zip(histogram["kept"], right_of_it, strict=True) if right)
    assert not any(n for n, right in zip(histogram["removed"], right_of_it, strict=True) if not right)


def test_suspects_are_the_highest_scores_removed_first(planted: Run, tmp_path: Path) -> None:
    report = planted.report(tmp_path / "report", ReportConfig(n_images=14, n_kept_images=6))
    suspects, page = _numbers(report)["suspects"], _Page(_html(report))
    removed = [s for s in suspects if s["status"] == "quarantined"]
    kept = [s for s in suspects if s["status"] == "kept"]
    n_removed = planted.selection.manifest().counts["quarantined"]
    assert len(removed) == min(14, n_removed)
    assert len(kept) == max(14 - len(removed), 6)
    assert suspects == removed + kept
    for group, status in ((removed, "quarantined"), (kept, "kept")):
        rows = [
            score
            for shard in planted.scores.shards
            for score, verdict in zip(
                planted.scores.rows(shard)["score"].to_pylist(),
                planted.selection.rows(shard)["status"].to_pylist(),
                strict=True,
            )
            if verdict == status
        ]
        assert [s["score"] for s in group] == sorted(rows, reverse=True)[: len(group)]
    assert "the class splits in two" in removed[0]["reason"]
    assert len(page.values("src")) == len(suspects)  # a picture for each


@pytest.mark.parametrize("by_labels", [True, False])
def test_what_the_labels_of_neighbours_say_is_shown(tmp_path: Path, by_labels: bool) -> None:
    said = {"disagreement": 0.942, "disagreement_of_rest": 0.17, "side_by_labels": by_labels}
    report = _run(tmp_path, said=said).report(tmp_path / "report")
    numbers, words = _numbers(report), _Page(_html(report)).words
    assert {name: numbers["classes"][0][name] for name in said} == said
    assert "94.2 % / 17.0 %" in words
    assert ("group chosen by labels" in words) == by_labels
    reason = numbers["suspects"][0]["reason"]
    assert "of the nearest neighbours 94 % have another label on this side and 17 % on the other" in reason
    assert reason.endswith("which decided between them") == by_labels


def test_without_a_label_check_nothing_is_said_of_labels(planted: Run, tmp_path: Path) -> None:
    words = _Page(_html(planted.report(tmp_path / "report"))).words
    assert "Other labels" not in words
    assert "nearest neighbours" not in words


def test_pictures_are_the_samples_own(planted: Run, tmp_path: Path) -> None:
    suspects = _numbers(planted.report(tmp_path / "report"))["suspects"]
    for suspect, picture in zip(suspects, pictures(suspects, planted.dataset, written(planted.shards)), strict=True):
        assert picture is not None
        png, width, height = picture
        assert (width, height) == (8, 8)
        own = Image.open(io.BytesIO(_png(int(suspect["key"]))))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), np.asarray(own))


def test_nothing_removed_shows_why(tmp_path: Path) -> None:
    report = _run(tmp_path, separations=(3.1, 1.0, 3.9, 0.5)).report(tmp_path / "report")
    numbers, html = _numbers(report), _html(report)
    assert numbers["headline"] == "No samples were removed; all 120 were kept."
    assert [h["label"] for h in numbers["histograms"]] == [2]  # the class that came closest
    assert numbers["histograms"][0]["threshold"] is None
    assert {s["status"] for s in numbers["suspects"]} == {"kept"}
    assert "came closest" in html


def test_a_rule_that_always_removes_is_not_said_to_find(tmp_path: Path) -> None:
    report = _run(tmp_path, rule=ContaminationRule(rate=0.1)).report(tmp_path / "report")
    headline = _numbers(report)["headline"]
    assert "poisoned" not in headline
    assert headline.endswith("as the most suspicious of their classes, from classes 0, 1, 2 and 3.")


def test_several_scorers_are_shown_side_by_side(planted: Run, tmp_path: Path) -> None:
    """The second one flags the last sample of every class in each shard."""
    last = _scores_by(planted.dataset, tmp_path / "last", "rca", lambda row: float(row["position"]))
    scores, config = [planted.scores, last], SelectConfig(rules={"rca": ContaminationRule(rate=0.1, factor=1)})
    selection = select_samples(config, planted.dataset, scores, str(tmp_path / "40"), COMPUTE)
    shards = write_selected(WriteConfig(), planted.dataset, selection, str(tmp_path / "50"), COMPUTE)
    parts = (planted.dataset, scores, selection, shards)
    report = write_report(ReportConfig(n_images=12), *parts, str(tmp_path / "report"), COMPUTE)
    numbers, page = _numbers(report), _Page(_html(report))
    assert numbers["counts"]["quarantined"] == selection.manifest().counts["quarantined"]
    flagged = {c["label"]: {kind: by["flagged"] for kind, by in c["scorers"].items()} for c in numbers["classes"]}
    assert flagged == {0: {"toxic_direction": 12, "rca": 3}} | {y: {"toxic_direction": 0, "rca": 3} for y in (1, 2, 3)}
    assert [(h["label"], h["scorer"]) for h in numbers["histograms"]] == [
        (0, "toxic_direction"),
        *((y, "rca") for y in range(4)),
    ]
    for histogram in numbers["histograms"]:
        of_class = next(c for c in numbers["classes"] if c["label"] == histogram["label"])
        assert sum(histogram["removed"]) == of_class["removed"]
    removed = [s for s in numbers["suspects"] if s["status"] == "quarantined"]
    assert [s["scorer"] for s in removed[:4]] == ["toxic_direction", "rca", "toxic_direction", "rca"]
    assert len({(s["shard"], s["position"]) for s in numbers["suspects"]}) == len(numbers["suspects"])
    assert "2 scorers scored every sample" in page.words
    assert "Flagged by rca" in page.words
    assert "were removed" in numbers["headline"]
    with pytest.raises(ArtifactError, match="one run"):
        write_report(
            ReportConfig(), planted.dataset, scores, planted.selection, planted.shards, str(tmp_path / "no"), COMPUTE
        )


@pytest.mark.hostile
def test_hostile_strings_stay_text(hostile: Run, tmp_path: Path) -> None:
    bad = "<script>alert(2)</script>\x1b[31m\u202e{{ 7*7 }}"
    report = hostile.report(tmp_path / "report", ReportConfig(title=bad), **{bad: bad})
    html = _html(report)
    page, numbers = _Page(html), _numbers(report)
    assert numbers["counts"]["unreadable"] == len(HOSTILE)
    assert sum(r["n"] for r in numbers["unreadable"]["reasons"]) == len(HOSTILE)
    assert page.tags["script"] == 0
    assert "<script" not in html
    assert "<script>alert(1)<:script>" in page.words  # shown as what it is
    assert page.tags["img"] == len(numbers["suspects"])
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", html)
    assert "{{ 7*7 }}" in html


@pytest.mark.parametrize("which", ["planted", "hostile"])
def test_page_asks_nothing_of_the_network(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run: Run = request.getfixturevalue(which)
    html = _html(run.report(tmp_path / "report"))
    page = _Page(html)
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert all(src.startswith("data:image/png;base64,") for src in page.values("src"))
    assert all(href.startswith("#") and href[1:] in page.values("id") for href in page.values("href"))
    assert not {"link", "iframe", "object", "embed", "base", "form"} & page.tags.keys()


def test_policy_names_the_one_style_sheet(planted: Run, tmp_path: Path) -> None:
    html = _html(planted.report(tmp_path / "report"))
    page = _Page(html)
    policy = next(value for value in page.values("content") if "default-src" in value)
    style = html[html.index("<style>") + 7 : html.index("</style>")]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'" in policy
    assert not page.values("style")  # the policy would block it


def test_page_can_be_read_aloud(planted: Run, tmp_path: Path) -> None:
    page = _Page(_html(planted.report(tmp_path / "report")))
    assert page.tags["caption"] == page.tags["table"] > 2
    assert page.values("scope").count("col") > 8
    assert all(page.values("alt"))
    assert len(page.values("alt")) == page.tags["img"]
    assert page.values("role").count("img") == page.tags["svg"] == len([v for v in page.values("aria-label") if v]) - 1
    assert len(page.values("id")) == len(set(page.values("id")))


def test_bytes_repeat_and_name_no_place(tmp_path: Path) -> None:
    """Two runs in different folders give the same page."""
    pages = []
    for name in ("here", "there"):
        run = _run(tmp_path / name)
        report = run.report(tmp_path / name / "report", note="by hand")
        pages.append((report.digest, _html(report)))
    assert pages[0] == pages[1]
    assert str(tmp_path) not in pages[0][1]


def test_facts_are_shown_in_order_and_part_of_the_recipe(planted: Run, tmp_path: Path) -> None:
    report = planted.report(tmp_path / "report", zebra="1", ant="first line\nsecond line", torch="as stated")
    html = _html(report)
    assert html.index("zebra") < html.index("first line\nsecond line")
    assert html.count(">torch<") == 1
    assert planted.report(tmp_path / "report", zebra="1", ant="first line\nsecond line", torch="as stated") == report
    with pytest.raises(ArtifactError, match="facts"):
        planted.report(tmp_path / "report", zebra="2")


def test_restored_samples_are_kept_and_counted(planted: Run, tmp_path: Path) -> None:
    first = _numbers(planted.report(tmp_path / "report"))["suspects"][0]
    config = RestoreConfig(keys=(first["key"],), note="looked at it: fine")
    selection = restore_samples(config, planted.selection, str(tmp_path / "41"), COMPUTE)
    with pytest.raises(ArtifactError, match="one run"):
        planted._replace(selection=selection).report(tmp_path / "mixed")
    shards = write_selected(WriteConfig(), planted.dataset, selection, str(tmp_path / "51"), COMPUTE)
    report = Run(planted.dataset, planted.scores, selection, shards).report(tmp_path / "report2")
    numbers = _numbers(report)
    (restored,) = [s for s in numbers["suspects"] if s["key"] == first["key"]]
    assert restored["status"] == "kept"
    assert "looked at it: fine" in restored["reason"]
    assert numbers["counts"]["restored"] == 1
    assert sum(numbers["histograms"][0]["removed"]) == numbers["counts"]["quarantined"]
    assert len(_Page(_html(report)).values("src")) == len(numbers["suspects"])


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    _shards(source, [])
    shard = source / "part-2.tar"
    shard.write_bytes(shard.read_bytes()[:30_000])
    dataset = index_shards(IndexConfig(), str(source), str(tmp_path / "00"), COMPUTE)
    scores = _scores(dataset, tmp_path / "31", dict.fromkeys(range(N_CLASSES), 0.0))
    selection = select_samples(SelectConfig(), dataset, [scores], str(tmp_path / "40"), COMPUTE)
    shards = write_selected(WriteConfig(), dataset, selection, str(tmp_path / "50"), COMPUTE)
    report = Run(dataset, scores, selection, shards).report(tmp_path / "report")
    numbers = _numbers(report)
    assert numbers["n_damaged"] == 1
    assert numbers["damaged"][0]["shard"] == "part-2.tar"
    assert "truncated" in _Page(_html(report)).words


def test_no_images_on_request(planted: Run, tmp_path: Path) -> None:
    html = _html(planted.report(tmp_path / "report", ReportConfig(n_images=0)))
    assert "<img" not in html


def test_class_names_are_used_where_the_data_set_has_them(planted: Run, tmp_path: Path) -> None:
    dataset = planted.dataset.model_copy()
    dataset.__dict__["class_names"] = {0: "<i>cat</i>", 1: "dog", 2: "bird"}
    numbers = _numbers(planted._replace(dataset=dataset).report(tmp_path / "report"))
    assert [c["name"] for c in numbers["classes"]] == ["<i>cat</i>", "dog", "bird", None]
    html = (tmp_path / "report" / "index.html").read_text("utf-8")
    assert "0 (&lt;i&gt;cat&lt;/i&gt;)" in html
    assert "<i>cat" not in html


@pytest.mark.hostile
def test_page_stays_below_3_mb_and_groups_below_2(planted: Run, tmp_path: Path) -> None:
    """A thousand classes, all histograms full, every string as long as it may be and made of what escapes longest."""
    numbers = _numbers(planted.report(tmp_path / "report"))
    long = '"' * 5_000
    one, bins = numbers["classes"][0], 50
    numbers["classes"] = [one | {"label": i, "name": long} for i in range(1000)]
    numbers |= {"n_classes": 1000, "n_touched": 1000, "n_class_rows": 200}
    drawn = {"edges": list(np.linspace(-1e3, 1e3, bins + 1)), "kept": [10**6] * bins, "removed": [10**6] * bins}
    numbers["histograms"] = [drawn | {"label": i, "scorer": "toxic_direction", "threshold": 0.1} for i in range(24)]
    numbers["suspects"] = [numbers["suspects"][0] | {"key": long, "reason": long}] * 60
    numbers["unreadable"]["samples"] = [{"key": long, "shard": long, "reason": long}] * 100
    numbers["unreadable"]["reasons"] = [{"reason": long, "n": 1}] * 20
    numbers["damaged"] = [{"shard": long, "reason": long}] * 100
    pictures = [(bytes(BUDGET // 60), 128, 128)] * 60
    html = render(numbers, pictures, [])
    assert len(html.encode()) < 3_000_000
    assert html.count("<svg") == 1 + 200 + 24
    n = report_groups.MAX_PICTURES // MAX_GROUPS
    example = {"shard": long, "position": 10**9, "key": long, "status": "quarantined"}
    group = {"label": 1, "size": 10**9, "share": 0.5, "separation": 99.0, "decision": "planted", "reason": long}
    numbers["groups"] = [group | {"examples": [example] * n}] * MAX_GROUPS
    numbers |= {"n_groups": 10**9, "suspect": None}
    numbers["finding"] = {"verdict": "found", "why": long, "reasons": [], "looked_for": {}, "canaries": []}
    picture = bytes(report_groups.BUDGET // (n * MAX_GROUPS)), 80, 80
    with_groups = render(numbers, pictures, [[picture] * n] * MAX_GROUPS)
    assert with_groups.count("<img") == 60 + n * MAX_GROUPS
    assert len(with_groups.encode()) - len(html.encode()) < 2_000_000


@pytest.mark.parametrize(("height", "width"), [(400, 300), (8, 8), (1, 2000), (129, 128)])
def test_thumbnails_are_small_and_never_enlarged(height: int, width: int) -> None:
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sink = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(sink, "PNG")
    found = thumbnail(sink.getvalue(), ImageConfig(), 20_000)
    assert found is not None
    png, shown_width, shown_height = found
    assert max(shown_width, shown_height) <= 128
    assert (shown_width, shown_height) == (width, height) or max(height, width) > 96
    assert len(png) <= 20_000
    assert thumbnail(b"\x89PNG but no more", ImageConfig(), 20_000) is None


CLEAN: list[tuple[str, Callable[[str], bool]]] = [
    ("a\nb", lambda text: text == "a\\x0ab"),
    ("\u202eabc", lambda text: text == "\\x202eabc"),
    ("\ud800", lambda text: text == "\\xd800"),
    ("x" * 9_999, lambda text: len(text) == 160 and text.endswith(" …")),
    ("\x01" * 500, lambda text: len(text) == 160),
    ("שלום עולם", lambda text: text == "שלום עולם"),
]


@pytest.mark.parametrize(("text", "holds"), CLEAN)
def test_text_is_made_safe_to_look_at(text: str, holds: Callable[[str], bool]) -> None:
    assert holds(clean_text(text))


def _judged(run: Run, folder: Path, groups: list[dict[str, Any]], planted: dict[int, int]) -> tuple[Run, Checkpoint]:
    """The run with label evidence: groups, and number of planted ones in each class; and a suspect model.

    Scores above 0 are those of samples at positions that a group planted in their class names.
    """
    suspicious = {
        (one["shard"], one["position"])
        for group in groups
        for one in group.get("examples", [])
        if group["decision"] == "planted"
    }

    def write_part(shard: str, part: Part) -> None:
        rows = [row for row in run.dataset.rows(shard).to_pylist() if row["status"] == "ok"]
        columns = {name: [row[name] for row in rows] for name in ("position", "key", "label")}
        # Untouched classes score highest: these scores tell natural groups apart.
        values = [
            (5.0 if (shard, row["position"]) in suspicious else -5.0) if planted[row["label"]] else 50.0 for row in rows
        ]
        write_rows(part, shard, pa.table({**columns, "score": pa.array(values, pa.float32())}))

    def finish(part: Part, _builder: object) -> None:
        by_class = {"separation": 9.0, "disagreement": 0.9, "disagreement_of_rest": 0.1, "side_by_labels": 1.0, "z": 8}
        classes = {str(label): by_class | {"planted": float(n)} for label, n in planted.items()}
        finding = {"verdict": "found" if any(planted.values()) else "nothing", "why": "as made up", "groups": groups}
        config = {"kind": "toxic_direction", "min_class": 20}
        info = {"config": config, "rule": "separation", "classes": classes, "finding": finding}
        part.write_json("scorer.json", info | {"canaries": {"planted": [SEEN_CANARY], "why": ""}})

    def write_suspect(part: Part) -> None:
        suspect = {"learned": True, "why": "accuracy .99", "steps": 600, "epochs": 6, "accuracy": 0.99}
        suspect |= {"size": [8, 8], "n_samples": 120, "n_all": 120}
        part.write_json("suspect.json", suspect)

    recipe = Recipe(stage="score_shards", inputs={"dataset": run.dataset.digest})
    scores = make(Scores, folder / "31", recipe, parts=run.dataset.shards, write_part=write_part, finish=finish)
    selection = select_samples(SelectConfig(), run.dataset, [scores], str(folder / "40"), COMPUTE)
    shards = write_selected(WriteConfig(), run.dataset, selection, str(folder / "50"), COMPUTE)
    embedder = make(Checkpoint, folder / "10", Recipe(stage="train_embedder"), write_suspect)
    return Run(run.dataset, scores, selection, shards), embedder


def _group(label: int, decision: str, places: list[tuple[str, int]], **more: Any) -> dict[str, Any]:
    numbers = {"label": label, "size": len(places), "share": 0.2, "separation": 7.5, "z": 9.0, "reason": "as made up"}
    examples = [{"shard": shard, "position": position} for shard, position in places]
    return numbers | {"decision": decision, "basis": "labels", "examples": examples} | more


# Sample i of class i % 4 is at position i % 40 of shard i // 40.
PLANTED = [("part-0.tar", position) for position in (0, 4, 8, 12, 16)]
TRACK = [("part-2.tar", position) for position in (1, 5, 9)]
SEEN_CANARY = {"kind": "noise", "label": 3, "n": 60, "rate": 0.005, "learned": 1.0, "recall": 0.9, "missed": ""}
STYLE = [("part-1.tar", position) for position in (2, 6)]


def test_groups_are_shown_with_pictures_of_their_own_samples(planted: Run, tmp_path: Path) -> None:
    reason = (
        "19 of 20 nearest neighbours carry another label, " + 10 * "which is a long story, " + "and this is its end"
    )
    groups = [
        _group(1, "burst", TRACK),
        _group(2, "natural", STYLE, z=2.0),
        _group(3, "natural", [], burst=0.53, z=1.0),
        _group(0, "planted", PLANTED, reason=reason),
    ]
    run, embedder = _judged(planted, tmp_path, groups, {0: 1, 1: 0, 2: 0, 3: 0})
    report = write_report(
        ReportConfig(), run.dataset, [run.scores], run.selection, run.shards, str(tmp_path / "90"), COMPUTE,
        embedder=embedder,
    )  # fmt: skip
    numbers, html = _numbers(report), _html(report)
    assert [group["decision"] for group in numbers["groups"]] == ["planted", "burst", "natural", "natural"]
    shown = [one for group in numbers["groups"] for one in group["examples"]]
    assert [(one["shard"], one["position"]) for one in shown] == PLANTED + TRACK + STYLE
    assert [one["status"] for one in shown] == ["quarantined"] * 5 + ["kept"] * 5
    section = html[html.index('id="groups"') : html.index('id="classes"')]
    pngs = re.findall(r'src="data:image/png;base64,([^"]+)"[^>]* alt="Sample (\d+), (\w+)"', section)
    assert [(key, status) for _, key, status in pngs] == [(one["key"], one["status"]) for one in shown]
    for png, key, _ in pngs:
        own = Image.open(io.BytesIO(_png(int(key))))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))), np.asarray(own))
    words = " ".join(_Page(html).words.split())
    assert "and this is its end" in words
    assert "natural group: a style, a sub-population, a track 2 20.0 %" in words
    assert "near-duplicates: copies, a burst, a track 3 20.0 %" in words
    assert "natural group, in part near-duplicates: a track, a burst 0 20.0 %" in words
    assert "; 53.0 % are near-duplicates of each other" in words
    assert "found in the class" not in words


def test_scores_of_classes_without_a_planted_group_are_not_called_suspicious(planted: Run, tmp_path: Path) -> None:
    groups = [_group(1, "burst", TRACK), _group(0, "planted", PLANTED)]
    run, embedder = _judged(planted, tmp_path / "found", groups, {0: 1, 1: 0, 2: 0, 3: 0})
    parts = run.dataset, [run.scores], run.selection, run.shards
    report = write_report(ReportConfig(), *parts, str(tmp_path / "found" / "90"), COMPUTE, embedder=embedder)
    numbers, words = _numbers(report), _Page(_html(report)).words
    assert numbers["counts"]["quarantined"] == len(PLANTED)
    assert {suspect["label"] for suspect in numbers["suspects"]} == {0}
    assert [(h["label"], h["scorer"]) for h in numbers["histograms"]] == [(0, "toxic_direction")]
    assert "Separation" not in words  # a number without a level
    assert "Highest score" not in words

    run, embedder = _judged(planted, tmp_path / "nothing", groups[:1], dict.fromkeys(range(4), 0))
    parts = run.dataset, [run.scores], run.selection, run.shards
    report = write_report(ReportConfig(), *parts, str(tmp_path / "nothing" / "90"), COMPUTE, embedder=embedder)
    numbers, page = _numbers(report), _Page(_html(report))
    assert numbers["headline"] == "Nothing stood out: no samples were removed; all 120 were kept."
    assert numbers["suspects"] == numbers["histograms"] == []
    assert page.tags["img"] == len(TRACK)
    assert "came closest" not in page.words
    assert "too few samples to judge" not in page.words


def test_many_groups_have_fewer_and_smaller_pictures(planted: Run, tmp_path: Path) -> None:
    """A sample may be in several groups; groups beyond those in the table are counted."""
    places = [(f"part-{i // 10}.tar", 4 * (i % 10)) for i in range(30)]
    groups = [_group(0, "natural", places[:8], z=float(i)) for i in range(MAX_GROUPS + 7)]
    run, embedder = _judged(planted, tmp_path, groups, dict.fromkeys(range(4), 0))
    parts = run.dataset, [run.scores], run.selection, run.shards
    report = write_report(ReportConfig(), *parts, str(tmp_path / "90"), COMPUTE, embedder=embedder)
    numbers, page = _numbers(report), _Page(_html(report))
    assert {len(group["examples"]) for group in numbers["groups"]} == {4}
    assert page.tags["img"] == len(page.values("src")) == 4 * MAX_GROUPS
    assert f"the first {MAX_GROUPS} of {MAX_GROUPS + 7} groups" in " ".join(page.words.split())
    few = write_report(
        ReportConfig(n_group_images=0), *parts, str(tmp_path / "91"), COMPUTE, embedder=embedder
    )  # fmt: skip
    assert _Page(_html(few)).tags["img"] == 0


def test_pictures_of_groups_keep_to_their_budget(tmp_path: Path) -> None:
    """Large images of noise, which no encoding makes small."""
    folder = tmp_path / "source"
    folder.mkdir()
    with tarfile.open(folder / "part-0.tar", "w") as tar:
        for i in range(20):
            pixels = np.random.default_rng(i).integers(0, 256, (100, 100, 3), dtype=np.uint8)
            sink = io.BytesIO()
            Image.fromarray(pixels).save(sink, "PNG")
            for name, data in ((f"{i:04d}.png", sink.getvalue()), (f"{i:04d}.cls", b"0")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    dataset = index_shards(IndexConfig(), str(folder), str(tmp_path / "00"), COMPUTE)
    everything = [("part-0.tar", position) for position in range(20)]
    scored = _scores(dataset, tmp_path / "31", {0: 0.0})
    selection = select_samples(SelectConfig(), dataset, [scored], str(tmp_path / "40"), COMPUTE)
    shards = write_selected(WriteConfig(), dataset, selection, str(tmp_path / "50"), COMPUTE)
    for n_groups in (1, 30, MAX_GROUPS):
        groups = report_groups.with_examples([_group(0, "natural", everything[:8])] * n_groups, selection, 8)
        found = [one for some in report_groups.pictures_of(groups, dataset, shards) for one in some]
        assert len(found) == min(8 * n_groups, report_groups.MAX_PICTURES)
        sizes = [len(picture[0]) for picture in found if picture is not None]
        assert len(sizes) == len(found)
        assert sum(sizes) <= report_groups.BUDGET
        assert all(picture is not None and max(picture[1:]) <= 80 for picture in found)


@pytest.mark.hostile
def test_hostile_names_in_groups_stay_text(tmp_path: Path) -> None:
    bad = '"><script>alert(1)<:script>\u202e{{ 7*7 }}'
    extra = [[(f"{bad}.png", _png(7)), (f"{bad}.cls", b"1")]]
    run = _run(tmp_path / "run", extra=extra)
    groups = [
        _group(0, "planted", PLANTED, reason=bad),
        _group(1, "burst", [("part-1.tar", N_PER_SHARD)], reason=bad),
        _group(77, bad, [], reason=bad, basis=bad),
    ]
    run, embedder = _judged(run, tmp_path, groups, {0: 1, 1: 0, 2: 0, 3: 0})
    parts = run.dataset, [run.scores], run.selection, run.shards
    report = write_report(ReportConfig(), *parts, str(tmp_path / "90"), COMPUTE, embedder=embedder)
    html = _html(report)
    page, numbers = _Page(html), _numbers(report)
    (example,) = numbers["groups"][1]["examples"]
    assert "<script>alert(1)<:script>" in example["key"]
    assert page.tags["script"] == 0
    assert "<script" not in html
    assert page.tags["img"] == len(numbers["suspects"]) + len(PLANTED) + 1
    assert sum("alert(1)" in alt for alt in page.values("alt")) == 1
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", html)


@pytest.mark.parametrize("place", [("part-9.tar", 0), ("part-0.tar", N_PER_SHARD), ("part-0.tar", -1)])
def test_a_group_of_other_data_is_refused(planted: Run, place: tuple[str, int]) -> None:
    with pytest.raises(ArtifactError, match=r"part-[09]\.tar"):
        report_groups.with_examples([_group(0, "natural", [place])], planted.selection, 8)


@pytest.mark.hostile
@pytest.mark.parametrize("example", [7, None, {}, {"shard": "part-0.tar"}, {"shard": ["x"], "position": 0}])
def test_an_example_that_names_no_sample_is_refused(planted: Run, example: Any) -> None:
    with pytest.raises(ArtifactError, match=r"no shard and position"):
        report_groups.with_examples([_group(0, "natural", []) | {"examples": [example]}], planted.selection, 8)
