"""Several pictures a sample, from shards to clean shards: a trigger that only the second picture has is found."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image
from typer.testing import CliRunner

from flows.cli import app
from flows.cli.app import ConfigOption
from flows.cli.command import COMMANDS
from flows.start import start
from sanitize.artifacts import read_manifest
from sanitize.errors import ConfigError
from sanitize.jobs import JOBS, reference
from sanitize.jobs.clean import CleanConfig, CleanRun
from sanitize.jobs.restore import restore, verify_run, write_again
from sanitize.settings import make_config, paths_of
from tests.flows.test_settings import SETTINGS

Make = Callable[..., Any]
N_SHARDS = 4
MEMBER = {
    name: path
    for name, job in JOBS.items()
    for path in ("index.image.member", "clean.index.image.member")
    if path in paths_of(job.config)
}


def png(pixels_HW: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_HW).save(file, "PNG")
    return file.getvalue()


def with_patch(pixels_HW: np.ndarray) -> np.ndarray:
    pixels_HW = pixels_HW.copy()
    pixels_HW[-3:, -3:] = 255
    pixels_HW[-2, -2] = 0
    return pixels_HW


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, make_tar: Make) -> tuple[Path, set[str]]:
    """Folder of shards, and keys of the poisoned samples.

    A sample has two pictures of one digit. In 32 samples with two zeros, the second is another digit with a patch. One
    more sample has a cut second picture.
    """
    digits = sklearn.datasets.load_digits()
    images_NHW, rng = (digits.images * 255 / 16).round().astype(np.uint8), np.random.default_rng(0)
    found = [rng.permutation(np.flatnonzero(digits.target == label)) for label in range(10)]
    samples = [(label, *pair) for label, at in enumerate(found) for pair in at[: len(at) // 2 * 2].reshape(-1, 2)]
    samples = [samples[i] for i in rng.permutation(len(samples))]
    zeros = [i for i, (label, *_) in enumerate(samples) if label == 0]
    others = [i for i, (label, *_) in enumerate(samples) if label != 0]
    poisoned = dict(zip(zeros[:32], others[:32], strict=True))
    shards: list[list[tuple[str, bytes]]] = [[] for _ in range(N_SHARDS)]
    for i, (label, left, right) in enumerate(samples):
        second_HW = with_patch(images_NHW[samples[poisoned[i]][1]]) if i in poisoned else images_NHW[right]
        members = [("left.png", png(images_NHW[left])), ("right.png", png(second_HW)), ("cls", b"%d" % label)]
        shards[i % N_SHARDS] += [(f"{i:04}.{suffix}", data) for suffix, data in [*members, ("txt", b"beside")]]
    cut = png(images_NHW[0])[:60]
    shards[0] += [("cut.left.png", png(images_NHW[0])), ("cut.right.png", cut), ("cut.cls", b"3")]
    folder = tmp_path_factory.mktemp("pairs")
    for s, members in enumerate(shards):
        make_tar(folder / f"pairs-{s}.tar", members)
    return folder, {f"{i:04}" for i in poisoned}


def settings(folder: Path, member: str = "all", **more: Any) -> dict[str, Any]:
    architecture = {"kind": "convnet", "widths": [16, 32, 64]}
    return {
        "shards": [str(folder)],
        "index": {"image": {"member": member}},
        "embedder": {"architecture": architecture, "optim": {"epochs": 30, "batch_size": 64}},
        "compute": {"device": "cpu", "seed": 0},
    } | more


@pytest.fixture(scope="module")
def cleaned(pairs: tuple[Path, set[str]], tmp_path_factory: pytest.TempPathFactory) -> CleanRun:
    out = tmp_path_factory.mktemp("cleaned") / "run"
    start(CleanConfig.model_validate(settings(pairs[0])), out, direct=True)
    return CleanRun.open(out)


def removed(run: CleanRun) -> set[str]:
    return {row["key"] for row in run.verdicts().to_pylist() if row["status"] == "quarantined"}


def test_a_trigger_in_the_second_picture_is_found(pairs: tuple[Path, set[str]], cleaned: CleanRun) -> None:
    _, poisoned = pairs
    assert cleaned.verdict == "found"
    gone = removed(cleaned)
    assert len(gone & poisoned) >= 0.9 * len(poisoned)
    assert len(gone - poisoned) <= 0.01 * cleaned.summary["samples"]["samples"]
    rows = [row for row in cleaned.verdicts().to_pylist() if row["key"] in gone & poisoned]
    named = {row["member"] for row in rows if row["reasons"][0]["stage"] == "toxic_direction"}
    assert {f"{key}.right.png" for key in gone & poisoned} <= named


@pytest.mark.slow
def test_the_first_picture_alone_shows_nothing(pairs: tuple[Path, set[str]], tmp_path: Path) -> None:
    config = settings(pairs[0], "first", index={"image": {"member": "first"}, "max_bad_fraction": 0.1})
    start(CleanConfig.model_validate(config), tmp_path / "run", direct=True)
    assert not removed(CleanRun.open(tmp_path / "run")) & pairs[1]


def test_every_sample_is_in_one_place_whole(pairs: tuple[Path, set[str]], cleaned: CleanRun, read_tar: Make) -> None:
    before = [one for s in range(N_SHARDS) for one in read_tar(pairs[0] / f"pairs-{s}.tar")]
    clean = [one for shard in cleaned.clean_shards for one in read_tar(shard)]
    gone = [one for shard in cleaned.quarantine for one in read_tar(shard)]
    carried = [one for one in gone if not one[0].endswith(".sanitize.json")]
    assert sorted(clean + carried) == sorted(before)
    assert not {name.partition(".")[0] for name, _ in clean} & {name.partition(".")[0] for name, _ in carried}
    samples = cleaned.summary["samples"]
    assert samples["samples"] == len({name.partition(".")[0] for name, _ in before})
    assert samples["samples"] == samples["kept"] + samples["quarantined"] + samples["unreadable"]
    assert samples["unreadable"] == 1
    assert samples["pictures"] == 2 * (samples["samples"] - 1)
    evidence = {one["key"]: one for one in (json.loads(data) for name, data in gone if name.endswith(".sanitize.json"))}
    assert evidence["cut"]["reasons"][0]["member"] == "cut.right.png"
    poisoned = next(key for key in evidence if key in pairs[1])
    assert [reason["member"] for reason in evidence[poisoned]["reasons"]] == [f"{poisoned}.right.png"]


def test_the_report_names_and_shows_the_picture(pairs: tuple[Path, set[str]], cleaned: CleanRun) -> None:
    folder = Path(cleaned.folder) / "90-report"
    numbers = json.loads((folder / "report.json").read_text())
    samples = cleaned.summary["samples"]
    counts = numbers["counts"]
    assert (counts["samples"], counts["clean"]) == (samples["samples"], samples["kept"])
    assert counts["pictures"] == 2 * (samples["samples"] - 1)
    assert sum(of_class["n"] for of_class in numbers["classes"]) == samples["samples"] - 1
    assert sum(of_class["removed"] for of_class in numbers["classes"]) == samples["quarantined"]
    (histogram,) = numbers["histograms"]
    assert sum(histogram["removed"]) == samples["quarantined"]
    suspects = [one for one in numbers["suspects"] if one["status"] == "quarantined"]
    assert len({one["key"] for one in suspects}) == len(suspects) == min(48, samples["quarantined"])
    assert {one["member"] for one in suspects if one["key"] in pairs[1]} == {
        f"{one['key']}.right.png" for one in suspects if one["key"] in pairs[1]
    }
    page = (folder / "index.html").read_text()
    assert suspects[0]["member"] in page
    assert "a sample is removed if any of\nits pictures is" in page
    assert "no picture" not in page


def test_a_sample_is_put_back_whole(pairs: tuple[Path, set[str]], cleaned: CleanRun, read_tar: Make) -> None:
    """Last: it changes the run."""
    key = sorted(removed(cleaned))[0]
    shown = restore(out=cleaned.folder, keys=[key], note="Ada").summary
    assert shown["restored"] == 1
    run = CleanRun.open(cleaned.folder)
    assert key not in removed(run)
    clean = dict(one for shard in run.clean_shards for one in read_tar(shard))
    assert {f"{key}.{suffix}" for suffix in ("left.png", "right.png", "cls", "txt")} <= clean.keys()
    assert "restored by hand" in Path(write_again(str(cleaned.folder))).read_text()
    assert verify_run(str(cleaned.folder))[1] == []


def test_groups_of_shards_make_the_same_bytes(pairs: tuple[Path, set[str]], tmp_path: Path) -> None:
    quick = {
        "embedder": {"architecture": {"kind": "convnet", "widths": [8]}, "optim": {"epochs": 1}, "max_steps": 1},
        "scorers": [{"kind": "spectral", "embedding": "pixels"}],
        "select": {"rule": {"kind": "contamination", "rate": 0.02}},
        "hygiene": {"quarantine": ["near_duplicate"]},
    }
    found = []
    for n in (1, 3):
        more = quick | {"n_groups": n, "embedder": quick["embedder"] | {"min_steps": 1}}
        start(CleanConfig.model_validate(settings(pairs[0], **more)), tmp_path / str(n), direct=True)
        found.append(
            {path.parent.name: read_manifest(path.parent).digest for path in tmp_path.glob(f"{n}/*/manifest.json")}
        )
    assert found[0] == found[1]


# --- jobs that read one picture a sample -------------------------------------------------------------------------


def test_the_jobs_that_read_shards_are_known() -> None:
    assert MEMBER.keys() == {
        "certify", "clean", "condense", "denoise", "plan", "redteam", "repair", "robustness", "train",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(MEMBER.keys() - {"clean"}))
def test_other_jobs_refuse_before_any_work(name: str, tmp_path: Path) -> None:
    assignment = f"{MEMBER[name]}=all"
    with pytest.raises(ConfigError, match=r"to its suffix, such as left\.jpg, or to first"):
        make_config(JOBS[name].config, SETTINGS[name], assignments=[assignment])
    file, out = tmp_path / "settings.yaml", tmp_path / "out"
    file.write_text(json.dumps(SETTINGS[name]))
    command = COMMANDS[name]
    arguments = [name, *([] if command.out is None else ["--out", str(out)]), "--set", assignment]
    arguments += ["a" for option in command.options if not option.flag.startswith("--")]
    arguments += ["--config"] if command.parameters()["config"][0] is ConfigOption else []
    result = CliRunner().invoke(app, [*arguments, str(file)])
    assert result.exit_code == 2
    assert "is for `clean` alone" in " ".join(result.output.split())
    assert not out.exists()


def test_poison_refuses_all_pictures_before_any_work_and_takes_one(
    pairs: tuple[Path, set[str]], tmp_path: Path
) -> None:
    command = ["poison", "--shards", str(pairs[0]), "--rate=0.1", "--out", str(tmp_path / "out"), "-q", "--json"]
    refused = CliRunner().invoke(app, [*command, "--set=index.image.member=all"])
    assert refused.exit_code == 2
    assert "such as left.jpg, or to first" in " ".join(refused.output.split())
    assert not (tmp_path / "out").exists()
    made = CliRunner().invoke(app, [*command, "--set=index.image.member=first", "--set=target=1"])
    assert made.exit_code == 0, made.output
    counts = json.loads(made.stdout)["counts"]
    assert counts["poisoned"] == round(0.1 * counts["samples"])


def test_such_a_run_is_no_reference(cleaned: CleanRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be a reference, which judges one picture a sample"):
        reference(run=cleaned.folder, out=tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_inspect_counts_samples_and_offers_the_setting(pairs: tuple[Path, set[str]]) -> None:
    shard = str(pairs[0] / "pairs-1.tar")
    plain = json.loads(CliRunner().invoke(app, ["inspect", shard, "-q", "--json"]).output)
    assert plain["next"][-1].endswith("--set image.member=all")
    every = json.loads(CliRunner().invoke(app, ["inspect", shard, "-q", "--json", "--set", "image.member=all"]).output)
    (summary,) = every["shards"].values()
    assert sum(every["labels"].values()) == summary["counts"]["samples"] == summary["counts"]["pictures"] // 2
    assert sum(every["image_sizes"].values()) == summary["counts"]["pictures"]
    assert "--set index.image.member=all" in every["next"][0]
    printed = CliRunner().invoke(app, ["inspect", shard, "-q", "--set", "image.member=all"]).output
    n = summary["counts"]["samples"]
    assert f"{n:,} samples with {2 * n:,} usable pictures, 0 unreadable" in printed
    assert "samples by class:" in printed
    assert "sizes of pictures:" in printed
