"""Artifacts by strangers: a state, a table or a certificate that is not what it should be is one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sanitize.artifacts import Artifact, Part, Recipe, make
from sanitize.compute import Compute
from sanitize.condensation import CondensedSet, load_condensed
from sanitize.data.tables import Embeddings, Scores, Selection
from sanitize.denoising import PCA
from sanitize.drift import Projection, Statistics
from sanitize.errors import ArtifactError, SanitizeError
from sanitize.jobs.reference import ReferenceConfig
from sanitize.jobs.restore import config_of, verify_run
from sanitize.jobs.run import read_config
from sanitize.models.checkpoint import write_checkpoint
from sanitize.models.config import ModelConfig
from sanitize.models.mlp import MLPConfig
from sanitize.packaging import PACKAGE, ModelPackage, open_model, package_model
from sanitize.score import FittedScorer, SpectralConfig, ToxicDirectionConfig, fit_scorer

pytestmark = pytest.mark.hostile
State = dict[str, Tensor]


def written(kind: type[Artifact], out: Path, **files: bytes) -> Any:
    def write(part: Part) -> None:
        for name, data in files.items():
            part.write(name.replace("__", "."), data)

    return make(kind, str(out), Recipe(stage="made-up"), write)


F64 = torch.float64
GOOD: dict[type[Artifact], tuple[str, State, Callable[[Any], object]]] = {
    Projection: (
        "projection",
        {"mean": torch.zeros(3, dtype=F64), "map": torch.ones(3, 2, dtype=F64)},
        lambda artifact: artifact(torch.ones(4, 3)),
    ),
    PCA: (
        "pca",
        {
            "mean_D": torch.zeros(4, dtype=F64),
            "values_R": torch.ones(2, dtype=F64),
            "vectors_DR": torch.ones(4, 2, dtype=F64),
            "total": torch.tensor(2.0, dtype=F64),
        },
        lambda artifact: artifact.components.energy(1),
    ),
    Statistics: (
        "moments",
        {"0.count": torch.tensor(5), "0.mean": torch.zeros(2, dtype=F64), "0.scatter": torch.eye(2, dtype=F64)},
        lambda artifact: artifact.moments.by_class[0].covariance(),
    ),
    CondensedSet: (
        "condensed",
        {"images": torch.zeros(2, 1, 4, 4), "labels": torch.tensor([0, 1])},
        lambda artifact: load_condensed(artifact.path),
    ),
}
INFO = {"classes": {"0": {"n": 5, "removed": 0}}, "n_components": 2, "unreadable": 0}


def with_state(kind: type[Artifact], out: Path, state: State) -> Any:
    files = {f"{GOOD[kind][0]}__safetensors": safetensors.torch.save(state)}
    return written(kind, out, statistics__json=json.dumps(INFO).encode(), **files)


@pytest.mark.parametrize("kind", GOOD)
def test_tensors_that_are_missing_not_finite_or_of_another_shape_are_refused(
    kind: type[Artifact], tmp_path: Path
) -> None:
    _, good, use = GOOD[kind]
    use(with_state(kind, tmp_path / "good", good))
    n = 0
    for name in good:
        less = {other: tensor for other, tensor in good.items() if other != name}
        spoilt = [less, less | {name: torch.zeros(7, 7, 7, dtype=F64)}]
        if good[name].is_floating_point():
            spoilt.append(good | {name: torch.full_like(good[name], torch.nan)})
        for state in spoilt:
            n += 1
            with pytest.raises(ArtifactError):
                use(with_state(kind, tmp_path / str(n), state))
    with pytest.raises(ArtifactError, match="no safetensors file"):
        use(written(kind, tmp_path / "bytes", **{f"{GOOD[kind][0]}__safetensors": b"x" * 99}, statistics__json=b"{}"))


def test_a_scorer_whose_state_is_not_that_of_one_is_refused(
    embeddings: Embeddings, compute: Compute, tmp_path: Path
) -> None:
    config = SpectralConfig()
    fitted = fit_scorer(config, embeddings, str(tmp_path / "fitted"), compute)
    state, info = safetensors.torch.load(fitted.read("state.safetensors")), fitted.info
    fitted.scorer(config)
    spoilt: list[tuple[State, Any]] = [
        (dict(list(state.items())[1:]), info),
        ({f"x.{name}": tensor for name, tensor in state.items()}, info),
        (state, info | {"classes": {"one": {}}}),
        (state, info | {"classes": 3}),
        (state, {"classes": {}}),
        (state, [1]),
    ]
    for i, (tensors, described) in enumerate(spoilt):
        files = {"state__safetensors": safetensors.torch.save(tensors), "scorer__json": json.dumps(described).encode()}
        with pytest.raises(ArtifactError):
            written(FittedScorer, tmp_path / str(i), **files).scorer(config)


def test_lines_of_a_planted_group_that_do_not_fit_are_refused(
    embeddings: Embeddings, compute: Compute, tmp_path: Path
) -> None:
    config = ToxicDirectionConfig(n_starts=16)
    fitted = fit_scorer(config, embeddings, str(tmp_path / "fitted"), compute)
    state, info = safetensors.torch.load(fitted.read("state.safetensors")), fitted.info
    fitted.scorer(config)
    weight = next(name for name in state if name.endswith(".weight"))
    mixture, offset = (weight.replace("weight", name) for name in ("mixture", "offset"))
    spoilt: list[State] = [
        {name: tensor for name, tensor in state.items() if name != "labels"},
        {name: tensor for name, tensor in state.items() if name != offset},
        state | {weight: state[weight][:2]},
        state | {weight: state[weight].float()},
        state | {offset: state[offset] * torch.nan},
        state | {mixture: -state[mixture]},
    ]
    for i, tensors in enumerate(spoilt):
        files = {"state__safetensors": safetensors.torch.save(tensors), "scorer__json": json.dumps(info).encode()}
        with pytest.raises(ArtifactError):
            written(FittedScorer, tmp_path / str(i), **files).scorer(config)


@pytest.mark.parametrize("kind", [Embeddings, Scores, Selection])
def test_rows_that_are_no_parquet_file_are_refused(kind: type[Scores], tmp_path: Path) -> None:
    out = tmp_path / "tables"

    def write(part: Part) -> None:
        part.write("rows/a.tar.parquet", b"PAR1" + b"\0" * 40 + b"PAR1")

    made = make(kind, str(out), Recipe(stage="made-up"), write)
    with pytest.raises(ArtifactError, match=r"a\.tar\.parquet is damaged"):
        made.rows("a.tar")


# --- run folders ----------------------------------------------------------------------------------------------------

RECORDS = ["[" * 100_000, "{}", "[]", '{"stages": 3}', '{"stages": [3]}', '{"stages": [{"folder": "a"}]}', "\0"]


@pytest.mark.parametrize("record", RECORDS)
def test_a_damaged_run_json_is_one_line(record: str, tmp_path: Path) -> None:
    written(Artifact, tmp_path / "run" / "00-index", a=b"a")
    (tmp_path / "run" / "run.json").write_text(record)
    n_files, (problem,) = verify_run(str(tmp_path / "run"))
    assert n_files == 1
    assert "run.json is damaged" in problem
    assert problem.isprintable()


@pytest.mark.parametrize(
    "text", ["[" * 3000, "a: [1", "3", "", "shards: 3", "!!python/object/apply:os.system [touch x]", "seed: .nan"]
)
def test_a_config_of_a_run_that_is_none_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    for read in (config_of, lambda folder: read_config(folder, ReferenceConfig)):
        with pytest.raises(ArtifactError, match=r"config\.yaml is no") as error:
            read(str(tmp_path))
        assert str(error.value).isprintable()


# --- what a package says ------------------------------------------------------------------------------------------

CONFIG = ModelConfig(architecture=MLPConfig(widths=(4,)), n_classes=3, image_shape=(1, 4, 4))
PROVED = {
    "kind": "smoothing",
    "source": "Cohen",
    "radius_unit": "l2",
    "integral": False,
    "open": True,
    "parameters": {"sigma": 0.25},
    "scope": {"threat": "changes", "statement": "It holds.", "not_covered": ["the rest"]},
    "samples": 10,
    "abstained": 1,
    "clean_accuracy": 0.9,
    "certified_accuracy": [[0.0, 0.9], [0.1, 0.5]],
}
SAYS: dict[str, Any] = {
    "training.json": Recipe(stage="train_robust", inputs={"dataset": "0" * 64}).model_dump(mode="json"),
    "certificate.json": {"format": 1, "model": "0" * 64, "certificates": [PROVED]},
    "metrics.json": {"training": {"epoch": 1, "loss": 0.5}},
    "history.json": [{"epoch": 1, "loss": 0.5}],
}


def package_that_says(out: Path, says: dict[str, Any]) -> str:
    def write(part: Part) -> None:
        write_checkpoint(part, CONFIG.build(), CONFIG, [])
        for name, value in says.items():
            part.write_json(name, value)

    shutil.rmtree(out.parent, ignore_errors=True)
    return make(ModelPackage, str(out), Recipe(stage="package_model"), write).path


JUNK = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers()))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [place for name, child in children for place in places(child, (*path, name))]


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=st.sampled_from(list(SAYS)), data=st.data())
def test_a_package_that_says_anything_is_packaged_again_or_is_one_line(
    file: str, data: st.DataObject, tmp_path: Path, compute: Compute
) -> None:
    says = json.loads(json.dumps(SAYS))
    *path, last = data.draw(st.sampled_from([place for place in places(says) if place[:1] == (file,)]))
    holder = says
    for name in path:
        holder = holder[name]
    holder[last] = data.draw(JUNK)
    model = open_model(package_that_says(tmp_path / "stranger" / PACKAGE, says))
    problem = "none"
    try:
        package_model(model, str(tmp_path / "stranger" / "again"), compute)
    except SanitizeError as error:
        problem = str(error)
    assert problem.isprintable()


def test_what_a_package_says_is_no_markup_in_the_card_of_another(tmp_path: Path, compute: Compute) -> None:
    says = json.loads(json.dumps(SAYS))
    says["certificate.json"]["certificates"][0]["scope"]["statement"] = "![x](http://a/b.png) <script>go()</script>"
    model = open_model(package_that_says(tmp_path / "stranger" / PACKAGE, says))
    card = package_model(model, str(tmp_path / "again"), compute).read("MODEL_CARD.md").decode()
    assert "<script" not in card
    assert "](" not in card


def test_a_config_that_was_written_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"shards": ["a.tar"]}))
    assert config_of(str(tmp_path)).shards == ("a.tar",)
