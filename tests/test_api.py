"""The Python API: jobs as functions, their results, the exports of `sanitize`, and find_poison on arrays."""

import doctest
import inspect
import json
import pydoc
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

import sanitize
import sanitize.arrays
from sanitize import api, jobs
from sanitize.compute import Compute
from sanitize.data.digits import Digits
from sanitize.data.tables import Embeddings, Scores, Selection
from sanitize.errors import ArtifactError, ConfigError, DataError, SanitizeError
from sanitize.jobs import JOBS, CleanConfig, CleanRun, Job, RedTeamConfig, TrainRun
from sanitize.jobs.result import JobRun
from sanitize.score import ToxicDirectionConfig
from sanitize.settings import config_from, merged
from sanitize.stage import STAGES

CPU = {"device": "cpu"}
SMALL: dict[str, Any] = {
    "architecture": {"kind": "convnet", "widths": [8, 16]},
    "optim": {"epochs": 2, "batch_size": 64, "learning_rate": 0.02},
}
every_job = pytest.mark.parametrize("declared", JOBS.values(), ids=JOBS.keys())


# --- exports ---------------------------------------------------------------------------------------------------------


def test_every_stage_and_job_can_be_imported_from_sanitize() -> None:
    missing = {name for name in STAGES if name not in api.__all__}
    assert missing == set()
    hidden = {name for name in api.__all__ if find_spec(f"sanitize.{name}")}  # a subpackage has the name
    assert hidden == set()
    for name in JOBS:
        assert getattr(sanitize, name) is JOBS[name].call
    for name in api.__all__:
        assert getattr(sanitize, name) is getattr(api, name)


def test_dir_is_complete_and_unknown_names_are_errors() -> None:
    assert {*api.__all__, "__version__", "find_poison", "clean"} <= set(dir(sanitize))
    with pytest.raises(AttributeError, match="no attribute 'claen'"):
        sanitize.claen  # noqa: B018
    names: dict[str, Any] = {}
    exec("from sanitize import *", names)
    assert set(api.__all__) <= names.keys()


def test_importing_sanitize_is_light_and_subpackages_need_no_import() -> None:
    code = (
        "import sys, sanitize; print(sorted({'torch', 'pyarrow', 'pydantic', 'sanitize.api'} & set(sys.modules))); "
        "print(sanitize.tar.__name__, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\nsanitize.tar False\n"


# --- jobs as functions -----------------------------------------------------------------------------------------------


@every_job
def test_help_of_a_job_teaches_its_settings(declared: Job) -> None:
    form = inspect.signature(declared.call)
    first = ["shards", "out", "config", "progress"][not declared.reads_shards :]
    assert [*form.parameters][: len(first)] == first
    assert set(form.parameters) - {*first} == declared.config.model_fields.keys() - {"shards"}
    assert (form.parameters["out"].default is inspect.Parameter.empty) != declared.is_temporary
    assert form.return_annotation is declared.result
    text = pydoc.plain(pydoc.render_doc(declared.call))
    for name in form.parameters:
        assert f"        {name}: " in text or f"{name}, " in text or f", {name}: " in text, name
    assert declared.result.__name__ in text
    assert declared.config.__name__ in text


def test_settings_come_from_a_config_a_dict_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "clean.yaml"
    file.write_text("shards: [a.tar]\nembedder: {optim: {epochs: 3, batch_size: 64}}\ncompute: {seed: 4}\n")
    wanted = CleanConfig.model_validate(
        {"shards": ["b.tar"], "embedder": {"optim": {"epochs": 5, "batch_size": 64}}, "compute": {"seed": 4}}
    )
    more = {"shards": Path("b.tar"), "embedder": {"optim": {"epochs": 5}}}
    from_file = config_from(CleanConfig, file, {})
    assert config_from(CleanConfig, str(file), more) == wanted
    assert config_from(CleanConfig, from_file, more) == wanted
    assert config_from(CleanConfig, from_file.model_dump(exclude_unset=True), more) == wanted
    assert from_file.embedder.optim.epochs == 3
    assert config_from(CleanConfig, None, {"shards": ["a", Path("b")], "trusted": "c"}).trusted == ("c",)


def test_a_section_of_another_kind_replaces_the_section() -> None:
    below = {"a": {"kind": "x", "n": 1}, "b": {"n": 1, "m": 2}, "c": 1}
    assert merged(below, {"a": {"kind": "y"}}) == below | {"a": {"kind": "y"}}
    assert merged(below, {"a": {"n": 2}}) == below | {"a": {"kind": "x", "n": 2}}
    assert merged(below, {"b": {"n": 3}, "c": {"k": 1}}) == below | {"b": {"n": 3, "m": 2}, "c": {"k": 1}}
    assert below["b"] == {"n": 1, "m": 2}


WRONG = [
    ({"embeder": {}}, r"embeder: there is no such setting; nearest: embedder"),
    ({"embedder": {"optim": {"epoch": 3}}}, r"optim\.epoch: .*nearest: embedder\.optim\.epochs"),
    ({"scorers": [{"kind": "rca", "modle": {}}]}, r"scorers\.0\.modle: .*nearest: scorers\.0\.model"),
    (
        {"select": {"rules": {"rca": {"kind": "fdr", "level": 1}}}},
        r"select\.rules\.rca\.level: there is no such setting",
    ),
    ({"compute": {"threads": "many"}}, r"compute\.threads: Input should be a valid integer"),
    ({"shards": []}, r"shards: .*at least 1 item"),
    ({"config": "nowhere.yaml"}, r"cannot read nowhere\.yaml"),
    ({"config": JOBS["denoise"].config.model_construct()}, r"config is a DenoiseRunConfig; give a CleanConfig"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_wrong_settings_are_a_config_error_with_the_nearest_name(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        sanitize.clean(**{"shards": "a.tar", "out": tmp_path / "run"} | settings)
    assert not (tmp_path / "run").exists()


def test_shards_of_a_red_team_are_those_of_its_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"clean\.embeder: .*nearest: clean\.embedder"):
        sanitize.redteam("a.tar", out=tmp_path, clean={"embeder": {}})
    with pytest.raises(ConfigError, match=r"clean\.shards: missing"):
        sanitize.redteam(out=tmp_path)
    with pytest.raises(SanitizeError, match=r"nothing-there"):
        sanitize.redteam(
            "nothing-there/*.tar", out=tmp_path, config=RedTeamConfig(clean=CleanConfig(shards=("a.tar",)))
        )


# --- results on real, small runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cleaned(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> CleanRun:
    """A run in which a rule removes one percent of each class."""
    return sanitize.clean(
        digits.shards()[:4],
        out=tmp_path_factory.mktemp("api") / "clean",
        embedder=SMALL,
        scorers=[{"kind": "spectral"}],
        select={"rule": {"kind": "contamination", "rate": 0.02}},
        compute=CPU,
    )


@pytest.fixture(scope="module")
def trained(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    out = tmp_path_factory.mktemp("api") / "train"
    method = {"select_batch": {"kind": "prl_l", "tau": 0.1, "warmup_epochs": 1}}
    settings = SMALL | {"method": method}
    return sanitize.train(digits.shards()[:3], out=out, test_shards=digits.shards()[-1], train=settings, compute=CPU)


def test_clean_returns_shards_report_and_verdicts(cleaned: CleanRun) -> None:
    assert [Path(path).name for path in cleaned.clean_shards] == [Path(path).name for path in cleaned.quarantine]
    assert len(cleaned.clean_shards) == 4
    assert all(Path(path).is_file() for path in [*cleaned.clean_shards, *cleaned.quarantine, cleaned.report])
    counts = cleaned.summary["samples"]
    table = cleaned.verdicts()
    assert table.column_names[:6] == ["shard", "position", "key", "label", "status", "keep"]
    assert len(table) == counts["samples"]
    removed = table.filter(pa.compute.equal(table["status"], "quarantined"))
    assert len(removed) == counts["quarantined"] > 0
    assert not any(removed["keep"].to_pylist())

    selection = Selection.load(Path(cleaned.folder) / "40-selection")
    scores = Scores.load(Path(cleaned.folder) / "31-scores-spectral")
    wanted = {
        (shard, row["position"]): row["score"] for shard in scores.shards for row in scores.rows(shard).to_pylist()
    }
    for row in table.to_pylist():
        assert row["score_spectral"] == wanted.get((row["shard"], row["position"]))
    assert table.column("reasons").to_pylist() == [
        row["reasons"] for shard in selection.shards for row in selection.rows(shard).to_pylist()
    ]


def test_a_result_is_opened_later_and_follows_decisions(cleaned: CleanRun, tmp_path: Path) -> None:
    again = CleanRun.open(Path(cleaned.folder))
    assert again == cleaned
    assert again.config.scorers[0].kind == "spectral"
    table = cleaned.verdicts()
    removed = table.filter(pa.compute.equal(table["status"], "quarantined"))
    key = removed["key"][0].as_py()
    restored = sanitize.restore(out=cleaned.folder, keys=key, note="fine")
    assert restored.summary["restored"] == 1
    assert restored.run == cleaned
    kept = {row["key"]: row["keep"] for row in again.verdicts().to_pylist()}
    assert kept[key]
    assert all("50-shards.r1" in path for path in again.clean_shards)
    assert again.report.endswith("90-report/index.html")  # the page was not written again
    assert sanitize.verify(cleaned.folder).problems == []


def test_a_job_is_silent_unless_progress_is_wanted(
    digits: Digits, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for progress in (False, True):
        sanitize.denoise(
            digits.shards()[:1],
            out=tmp_path / str(progress),
            denoise={"dims": 8},
            index={"n_classes": 10},
            compute=CPU,
            progress=progress,
        )
        out, err = capfd.readouterr()
        assert out == ""
        assert (" samples in " in err) == progress


def test_a_folder_without_a_finished_run_of_the_job_is_refused(cleaned: CleanRun, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no run\.json"):
        CleanRun.open(tmp_path)
    with pytest.raises(ArtifactError, match="is a run of `sanitize clean`"):
        TrainRun.open(cleaned.folder)
    record = json.loads((Path(cleaned.folder) / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"status": "running"}))
    with pytest.raises(ArtifactError, match="has not finished"):
        CleanRun.open(tmp_path)
    with pytest.raises(ArtifactError, match="is no store"):
        sanitize.jobs.IngestStore.open(tmp_path)


def test_train_returns_model_package_and_history(trained: TrainRun) -> None:
    model = trained.model()
    assert isinstance(model, nn.Module)
    assert model(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).shape == (2, 10)
    assert len(trained.history) == 2
    assert trained.history[-1] == trained.summary["last"]
    assert Path(trained.package, "MODEL_CARD.md").is_file()
    assert Path(trained.report).is_file()
    scores = trained.drop_scores()
    assert scores.column_names[0] == "shard"
    assert 0 <= min(scores["score"].to_pylist()) <= max(scores["score"].to_pylist()) <= 1
    with pytest.raises(ArtifactError, match="70-certificates"):
        trained.certificates()


def test_certify_and_robustness_return_tables(trained: TrainRun, digits: Digits, tmp_path: Path) -> None:
    certified = sanitize.certify(
        digits.shards()[-1],
        model=trained.package,
        out=tmp_path / "certify",
        compute=CPU,
        smoothing={"n0": 10, "n": 20, "alpha": 0.1, "max_images": 5},
    )
    rows = certified.certificates()
    assert {"shard", "key", "label", "prediction", "radius"} <= set(rows.column_names)
    assert len(rows) == certified.summary["certificates"][0]["samples"]
    assert isinstance(certified.model(), nn.Module)
    assert Path(certified.report).is_file()

    attack = {"n_images": 4, "searches": 2, "attack": {"norm": "l2", "radius": 1.0, "loss": "margin", "steps": 2}}
    measured = sanitize.robustness(
        digits.shards()[-1], model=trained.package, out=tmp_path / "robustness", robustness=attack, compute=CPU
    )
    assert measured.measures["samples"] == len(measured.perturbations()) == 4
    assert Path(measured.report).is_file()


def test_condense_and_denoise_return_tensors_and_shards(digits: Digits, tmp_path: Path) -> None:
    denoised = sanitize.denoise(digits.shards()[0], out=tmp_path / "denoise", denoise={"dims": 8}, compute=CPU)
    assert [Path(path).name for path in denoised.shards] == [Path(digits.shards()[0]).name]
    assert all(Path(path).is_file() for path in [*denoised.shards, denoised.report])

    matching = {"images_per_class": 1, "iterations": 2}
    condensed = sanitize.condense(
        denoised.shards, out=tmp_path / "condense", condense={"matching": matching}, compute=CPU
    )
    images, labels = condensed.load()
    assert images.shape == (10, 3, 8, 8)
    assert labels.tolist() == list(range(10))
    assert condensed.history[-1] == condensed.summary["last"]
    assert condensed.test_accuracy is None
    assert all(Path(path).is_file() for path in (condensed.grid, condensed.report))


def test_repair_returns_a_model_and_measures(trained: TrainRun, digits: Digits, tmp_path: Path) -> None:
    repaired = sanitize.repair(
        model=trained.package, out=tmp_path / "repair", compute=CPU, repair={"method": {"kind": "clp"}}
    )
    assert isinstance(repaired.model(), nn.Module)
    assert repaired.measures["method"]["kind"] == "clp"
    assert repaired.report is None


@pytest.mark.slow
def test_redteam_returns_measures_by_case(digits: Digits, tmp_path: Path) -> None:
    run = sanitize.redteam(
        digits.shards(),
        out=tmp_path / "redteam",
        clean={"embedder": SMALL, "compute": CPU},
        sample={"n_train": 600, "n_test": 200},
        attacks=["badnets@5%"],
        repeats=1,
        require=["badnets@5%:recall>=0"],
    )
    assert run.measures.keys() == {"none", "badnets@5%"}
    assert 0 <= run.measures["badnets@5%"]["recall"]["mean"] <= 1
    assert run.met
    assert [requirement["met"] for requirement in run.requirements] == [True]
    assert Path(run.report).is_file()


@pytest.mark.slow
def test_ingest_returns_the_store(digits: Digits, tmp_path: Path) -> None:
    approved = sanitize.clean(
        digits.shards()[:8], out=tmp_path / "run", embedder=SMALL, scorers=[{"kind": "spectral"}], compute=CPU
    )
    store = tmp_path / "store"
    made = sanitize.reference(run=approved.folder, out=store)
    assert made.summary["reference"] == 1
    assert len(made.clean_shards) == 8
    done = sanitize.ingest(digits.shards()[8:9], out=store, compute=CPU)
    (batch,) = done.batches
    assert batch["status"] in ("accepted", "held")
    assert done.summary["new"] == 1
    assert done.refused == []
    assert Path(done.feed).is_file()
    again = sanitize.jobs.IngestStore.open(store)
    assert again == done
    assert again.summary == {}
    assert len(again.clean_shards) == 8 + batch["released"]
    assert all(Path(path).is_file() for path in again.clean_shards)


def test_plan_takes_settings_by_name(digits: Digits) -> None:
    planned = sanitize.plan(digits.shards()[:2], n_samples=40, embedder=SMALL, compute=CPU)
    assert planned.summary["data"]["shards"] == 2
    assert planned.n_groups >= 1
    with pytest.raises(ConfigError, match="nearest: shards"):
        sanitize.plan(shard="a.tar")


def test_a_job_without_shards_or_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="refit: `out` is missing, the path or URL of the store"):
        sanitize.refit()
    with pytest.raises(ConfigError, match="shards: there is no such setting"):
        sanitize.refit("a.tar", out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_decision_takes_seed_and_precision_from_the_finished_run() -> None:
    finished = Compute(device="cpu", seed=7, precision="bfloat16")
    assert jobs.RefitConfig().compute_after(finished) == finished
    changed = jobs.RefitConfig(compute=Compute(device="auto", threads=2, seed=3)).compute_after(finished)
    assert changed == Compute(device="auto", threads=2, seed=7, precision="bfloat16")


# --- find_poison -----------------------------------------------------------------------------------------------------


def two_parts(n: int = 300, n_poison: int = 20, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes of `n` samples in 16 dimensions; the first samples of class 0 lie apart."""
    x_ND = torch.randn(2 * n, 16, generator=torch.Generator().manual_seed(seed))
    x_ND[:n_poison, 0] += 30
    return x_ND, torch.arange(2 * n) // n


def test_find_poison_finds_the_tight_part_of_a_class() -> None:
    x_ND, labels_N = two_parts()
    found = sanitize.find_poison(x_ND, labels_N)
    mask, scores, evidence, finding = found
    assert mask.dtype == bool
    assert mask.nonzero()[0].tolist() == list(range(20))
    assert scores.dtype == np.float32
    assert scores[:20].min() > 0 > scores[20:300].max()  # class 1 is not touched, whatever its scores
    assert evidence.keys() == {0, 1}
    assert evidence[0]["n"] == 300
    assert evidence[0]["flagged"] == 20
    assert evidence[0]["separation"] > evidence[0]["level"] > evidence[1]["separation"]
    assert evidence[0]["minority_fraction"] == pytest.approx(20 / 300)
    assert evidence[1]["threshold"] is None
    assert {measures["decision"] for measures in evidence.values()} == {finding["verdict"]} == {"inconclusive"}
    json.dumps([evidence, finding])


def test_find_poison_does_not_depend_on_the_kind_of_array_and_is_deterministic() -> None:
    x_ND, labels_N = two_parts()
    first = sanitize.find_poison(x_ND, labels_N)
    kinds = [
        (x_ND.numpy(), labels_N.numpy().astype(np.uint8)),
        (x_ND.double().requires_grad_(), labels_N.int()),
        (np.asfortranarray(x_ND.numpy()), labels_N.tolist()),
        ({"pooled": x_ND, "other": x_ND[:3]}, labels_N),
    ]
    for embeddings, labels in kinds:
        again = sanitize.find_poison(embeddings, labels)  # type: ignore[arg-type]
        assert (again.scores == first.scores).all()
        assert again.evidence == first.evidence
    order = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(1))
    shuffled = sanitize.find_poison(x_ND[order], labels_N[order])
    assert (shuffled.mask == first.mask[order.numpy()]).all()


def test_find_poison_decides_an_even_split_by_the_labels_of_another_embedding() -> None:
    """40 % of class 0 come from classes 1 to 3: in pixels most of their neighbours have those labels."""
    labels_N = torch.cat([torch.zeros(300), torch.arange(1200) % 3 + 1]).long()
    origin_N = torch.where(torch.arange(1500) < 120, torch.arange(1500) % 3 + 1, labels_N)
    x_ND, pixels_ND = torch.randn(2, 1500, 16, generator=torch.Generator().manual_seed(0))
    x_ND[:120] += 8
    pixels_ND[torch.arange(1500), origin_N] += 20
    found = sanitize.find_poison({"pooled": x_ND, "pixels": pixels_ND}, labels_N)
    assert found.finding["verdict"] == "inconclusive"
    assert found.evidence[0]["side"] == "labels"
    assert found.evidence[0]["disagreement"] > 0.5 > found.evidence[0]["disagreement_of_rest"]
    assert found.mask.nonzero()[0].tolist() == list(range(120))


def test_find_poison_agrees_with_the_pipeline(embeddings: Embeddings, compute: Compute, tmp_path: Path) -> None:
    """The stages on files and the call on arrays give the same scores and the same finding; files name examples too."""
    fitted = sanitize.fit_scorer(ToxicDirectionConfig(), embeddings, str(tmp_path / "scorer"), compute)
    scores = sanitize.score_shards(ToxicDirectionConfig(), fitted, embeddings, str(tmp_path / "scores"), compute)
    table = pa.concat_tables(embeddings.rows(shard) for shard in embeddings.shards)
    arrays = {name: np.stack(table[name].to_pylist()) for name in ("pooled", "early", "gradients", "logits")}
    found = sanitize.find_poison(arrays, table["label"].to_numpy(), seed=compute.seed)
    wanted = np.concatenate([scores.rows(shard)["score"].to_numpy() for shard in scores.shards])
    assert found.scores == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    finding = scores.read_json("scorer.json")["finding"]
    assert finding == fitted.info["finding"]
    groups = [{name: value for name, value in group.items() if name != "examples"} for group in finding["groups"]]
    assert found.finding == finding | {"groups": groups}
    for label, measures in found.evidence.items():
        assert measures["separation"] == pytest.approx(fitted.info["classes"][str(label)]["separation"], rel=1e-6)


BAD: list[tuple[Any, Any, type[SanitizeError], str]] = [
    (np.zeros(600), np.arange(600) % 2, DataError, r"embeddings has shape \(600,\); .*\(N, D\)"),
    (np.zeros((599, 3)), np.arange(600) % 2, DataError, r"embeddings has 599 rows, and there are 600 labels"),
    (np.zeros((600, 3)), np.zeros((600, 1), int), DataError, r"labels has shape \(600, 1\)"),
    (np.zeros((0, 3)), np.zeros(0, int), DataError, r"labels has shape \(0,\)"),
    (np.zeros((600, 3)), np.zeros(600), DataError, r"labels has dtype float64; give integers"),
    (np.zeros((600, 3)), np.array(["cat"] * 600), DataError, r"labels has dtype <U3; give numbers"),
    (np.zeros((600, 3), complex), np.zeros(600, int), DataError, r"embeddings has dtype complex128"),
    (np.zeros((30, 3)), np.zeros(30, int), DataError, r"largest class has 30 samples; .* from 40 samples"),
    ({"pixels": np.zeros((600, 3))}, np.zeros(600, int), ConfigError, r"pooled is missing; there are pixels"),
    (
        dict.fromkeys(("pooled", "gradients", "logits"), np.ones((600, 3))),
        np.arange(600) % 4,
        DataError,
        r"a label is not among the 3 logits: \[0, 1, 2, 3\]",
    ),
]


@pytest.mark.parametrize(("embeddings", "labels", "error", "message"), BAD)
def test_find_poison_names_what_is_wrong(
    embeddings: Any, labels: Any, error: type[SanitizeError], message: str
) -> None:
    with pytest.raises(error, match=message):
        sanitize.find_poison(embeddings, labels)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_find_poison_names_the_place_of_what_is_not_finite(value: float) -> None:
    x_ND = np.zeros((600, 3))
    x_ND[17, 2] = value
    with pytest.raises(DataError, match=r"embedding 'pooled' is not finite as float32: row 17, column 2"):
        sanitize.find_poison({"pooled": x_ND}, np.zeros(600, int))


def test_find_poison_of_constant_embeddings_finds_nothing() -> None:
    found = sanitize.find_poison(np.ones((100, 4)), np.zeros(100, int))
    assert not found.mask.any()
    assert found.evidence[0]["separation"] == 0


def test_example_in_the_docstring_runs() -> None:
    results = doctest.testmod(sanitize.arrays)
    assert results.attempted == 4
    assert results.failed == 0


def test_results_are_small_and_frozen(cleaned: CleanRun) -> None:
    assert repr(cleaned) == f"CleanRun(folder={cleaned.folder!r})"
    with pytest.raises(AttributeError):
        cleaned.folder = "elsewhere"  # type: ignore[misc]
    assert issubclass(CleanRun, JobRun)
