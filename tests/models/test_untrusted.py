"""Model packages by strangers: for any content a model is loaded or one error gives the reason, and no code is run."""

import copy
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sanitize
from sanitize.artifacts import Part, Recipe, make
from sanitize.errors import ArtifactError, SanitizeError
from sanitize.models.checkpoint import Checkpoint, write_checkpoint
from sanitize.models.config import ModelConfig
from sanitize.models.convnet import ConvNetConfig
from sanitize.models.mlp import MLPConfig

pytestmark = pytest.mark.hostile

NETWORKS = {
    "convnet": ModelConfig(architecture=ConvNetConfig(widths=(4, 6)), n_classes=3, image_shape=(1, 8, 8)),
    "mmc": ModelConfig(architecture=MLPConfig(widths=(6,)), n_classes=3, image_shape=(1, 4, 4), mmc=5.0),
    "votes": ModelConfig(architecture=MLPConfig(widths=(5,)), n_classes=3, image_shape=(1, 4, 4), n_networks=4),
}


def save(out: Path, config: ModelConfig) -> Path:
    def write(part: Part) -> None:
        write_checkpoint(part, config.build(), config, [])

    return Path(make(Checkpoint, str(out), Recipe(stage="made-up"), write).path)


def listed_again(package: Path) -> None:
    """Update the manifest to the current files, as a careful attacker would."""
    manifest = json.loads((package / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (package / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (package / "manifest.json").write_text(json.dumps(manifest))


def described_as(package: Path, text: str) -> Path:
    (package / "config.json").write_text(text)
    listed_again(package)
    return package


def changed(config: ModelConfig, **fields: Any) -> str:
    return json.dumps(config.model_dump(mode="json") | fields)


@pytest.fixture(scope="module", params=NETWORKS)
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("packages") / request.param, NETWORKS[request.param])


# --- code -----------------------------------------------------------------------------------------------------------

PAYLOAD = """
from pathlib import Path
Path({ran!r}).touch()
from torch import nn

def go(n_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, n_classes))
"""
LOAD = "import sys, sanitize; print(sanitize.load_model(sys.argv[1], trust_code={trust})); print('loaded')"


def factory_package(out: Path, function: str) -> Path:
    config = ModelConfig(architecture=MLPConfig(widths=(4,)), n_classes=3, image_shape=(1, 8, 8))
    package = save(out, config)
    weights = {"1.weight": torch.zeros(3, 64), "1.bias": torch.zeros(3)}
    (package / "model.safetensors").write_bytes(safetensors.torch.save(weights))
    return described_as(package, changed(config, architecture={"kind": "factory", "function": function}))


def load_in(cwd: Path, model: str, trust: bool, path: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Load in another process, in which the working directory is on the path, as in an interactive session."""
    roots = [str(Path(sanitize.__file__).parents[1]), *map(str, path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(roots), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD.format(trust=trust), model]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("function", ["payload:go", pytest.param("inner.payload:go", marks=pytest.mark.slow)])
def test_code_in_the_package_that_is_the_working_directory_never_runs(
    tmp_path: Path, trust: bool, function: str
) -> None:
    package, ran = factory_package(tmp_path / "package", function), tmp_path / "ran"
    (package / "inner").mkdir()
    for place in (package, package / "inner"):
        (place / "payload.py").write_text(PAYLOAD.format(ran=str(ran)))
    found = load_in(package, ".", trust)
    assert "ArtifactError" in found.stderr
    assert ("no installed package" if trust else "none of it was run") in found.stderr
    assert not ran.exists()


def test_code_in_the_working_directory_or_a_relative_path_never_runs(tmp_path: Path) -> None:
    package, ran = factory_package(tmp_path / "package", "payload:go"), tmp_path / "ran"
    (tmp_path / "lib").mkdir()
    for place in (tmp_path, tmp_path / "lib"):
        (place / "payload.py").write_text(PAYLOAD.format(ran=str(ran)))
    found = load_in(tmp_path, package.name, True, (Path("lib"), tmp_path, package))
    assert "no installed package" in found.stderr
    assert not ran.exists()


@pytest.mark.slow
def test_code_that_is_installed_runs_where_it_is_allowed(tmp_path: Path) -> None:
    package, ran, site = factory_package(tmp_path / "package", "payload:go"), tmp_path / "ran", tmp_path / "site"
    site.mkdir()
    (site / "payload.py").write_text(PAYLOAD.format(ran=str(ran)))
    (tmp_path / "elsewhere").mkdir()
    assert load_in(tmp_path / "elsewhere", str(package), False, (site,)).returncode == 1
    assert not ran.exists()
    found = load_in(tmp_path / "elsewhere", str(package), True, (site,))
    assert found.stdout.endswith("loaded\n"), found.stderr
    assert ran.exists()


def test_a_module_that_was_imported_from_the_package_before_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = factory_package(tmp_path / "package", "imported_before:go")
    (package / "imported_before.py").write_text(PAYLOAD.format(ran=str(tmp_path / "ran")))
    monkeypatch.syspath_prepend(package)
    __import__("imported_before")
    with pytest.raises(ArtifactError, match="only installed packages"):
        sanitize.load_model(package, trust_code=True)
    assert str(package) in sys.path


@pytest.mark.parametrize("function", ["os:system", "json:JSONDecoder", "builtins:print", "math:pi", "no_such_module:f"])
def test_installed_code_that_builds_no_network_is_one_line(tmp_path: Path, function: str) -> None:
    with pytest.raises(ArtifactError, match=function):
        sanitize.load_model(factory_package(tmp_path / "package", function), trust_code=True)


@pytest.mark.slow
def test_a_module_of_torchvisions_name_in_the_working_directory_is_not_imported(tmp_path: Path) -> None:
    config = NETWORKS["convnet"]
    package, ran = save(tmp_path / "package", config), tmp_path / "ran"
    text = changed(config, architecture={"kind": "torchvision", "name": "squeezenet1_0"}, image_shape=[3, 64, 64])
    described_as(package, text)
    (package / "torchvision.py").write_text(PAYLOAD.format(ran=str(ran)))
    assert "ArtifactError" in load_in(package, ".", False).stderr
    assert not ran.exists()


# --- numbers --------------------------------------------------------------------------------------------------------

ABSURD: list[tuple[dict[str, Any], str]] = [
    ({"n_classes": 2_000_000_000}, "n_classes"),
    ({"n_classes": 1_000_000}, "describes a network of"),
    ({"n_networks": 10_000_000}, "n_networks"),
    ({"n_networks": 100_000}, "statistics"),
    ({"n_networks": 100_000, "architecture": {"kind": "mlp", "widths": [4]}}, "describes a network of"),
    ({"n_classes": -1}, "n_classes"),
    ({"n_classes": 1e400}, "n_classes"),
    ({"n_classes": "many"}, "n_classes"),
    ({"n_classes": None}, "n_classes"),
    ({"architecture": {"kind": "convnet", "widths": [65536] * 64}}, "describes a network of"),
    ({"architecture": {"kind": "convnet", "widths": [4] * 1000}}, "widths"),
    ({"architecture": {"kind": "convnet", "widths": [-4]}}, "widths"),
    ({"architecture": {"kind": "convnet", "widths": [10**12]}}, "widths"),
    ({"architecture": {"kind": "resnet", "widths": [4] * 64, "blocks_per_stage": 16}}, "at most 256"),
    ({"architecture": {"kind": "mlp", "widths": [65536, 65536]}}, "describes a network of"),
    ({"architecture": {"kind": "vgg", "widths": [4]}}, "architecture"),
    ({"architecture": {"kind": "cnn9", "width": 10**9}}, "width"),
    ({"architecture": {"kind": "pickle"}}, "architecture"),
    ({"architecture": []}, "architecture"),
    (
        {"architecture": {"kind": "torchvision", "name": "vit_h_14"}, "image_shape": [3, 224, 224]},
        "describes a network",
    ),
    ({"architecture": {"kind": "torchvision", "name": "regnet_y_400mf"}, "image_shape": [3, 64, 64]}, "do not fit"),
    (
        {"architecture": {"kind": "torchvision", "name": "fasterrcnn_resnet50_fpn"}, "image_shape": [3, 64, 64]},
        "no model",
    ),
    ({"image_shape": [1, 65536, 65536]}, "image"),
    ({"image_shape": [65536, 4096, 1]}, "describes a network of"),
    ({"image_shape": [1, 8]}, "image_shape"),
    ({"image_shape": [1, 0, 8]}, "image_shape"),
    ({"mean": []}, "mean"),
    ({"mean": [0.1, 0.2]}, "mean"),
    ({"mean": [float("nan")]}, "mean"),
    ({"std": [0.0]}, "std"),
    ({"std": [1e-300]}, "std"),
    ({"std": [float("inf")]}, "std"),
    ({"std": [0.1] * 100_000}, "std"),
    ({"mmc": float("inf")}, "mmc"),
    ({"mmc": 1e300}, "mmc"),
    ({"n_classes": 1, "mmc": 1.0}, "two classes"),
    ({"input_range": [0, 1]}, "input_range"),
    ({"extra": 1}, "extra"),
]


@pytest.mark.parametrize(("fields", "message"), ABSURD)
def test_every_number_has_a_bound(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    package = described_as(save(tmp_path / "package", NETWORKS["convnet"]), changed(NETWORKS["convnet"], **fields))
    with pytest.raises(ArtifactError, match=message) as error:
        sanitize.load_model(package)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_large_images_cost_nothing_until_there_is_one(tmp_path: Path) -> None:
    """The last Linear of a network is found by running it; the size in a description must not make that slow."""
    text = changed(NETWORKS["convnet"], image_shape=[1, 16384, 16384], mmc=5.0)
    package = described_as(save(tmp_path / "package", NETWORKS["convnet"]), text)
    with pytest.raises(ArtifactError, match=r"describes a network of|do not fit"):
        sanitize.load_model(package)


TEXTS = {
    "nested": "[" * 100_000,
    "a nested field": '{"n_classes": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "empty": "",
    "a list": "[1]",
    "null": "null",
    "many digits": '{"n_classes": ' + "9" * 10_000 + "}",
    "too long": " " * (2 << 20) + "{}",
    "not UTF-8": "\udcff",
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("file", ["config.json", "manifest.json"])
def test_files_that_are_no_description_are_one_line(tmp_path: Path, name: str, file: str) -> None:
    package = save(tmp_path / "package", NETWORKS["convnet"])
    (package / file).write_text(TEXTS[name], errors="surrogateescape")
    if file == "config.json":
        listed_again(package)
    with pytest.raises(ArtifactError) as error:
        sanitize.load_model(package)
    assert "\n" not in str(error.value)


# --- weights --------------------------------------------------------------------------------------------------------

State = dict[str, torch.Tensor]


def without_one(state: State) -> State:
    return dict(list(state.items())[1:])


WEIGHTS: dict[str, tuple[Callable[[State], State], str]] = {
    "a tensor too many": (lambda state: state | {"more\nlines\x1b[31m": torch.zeros(1)}, "is not part of it"),
    "a tensor too few": (without_one, "no |describes a network of"),
    "another shape": (lambda state: {name: t[None] for name, t in state.items()}, "is float32"),
    "another dtype": (lambda state: {name: t.double() for name, t in state.items()}, "is float64"),
    "half as long": (lambda state: {name: t.half() for name, t in state.items()}, "is float16|describes a network of"),
    "not a number": (lambda state: {name: torch.full_like(t, torch.nan) for name, t in state.items()}, "not finite"),
    "infinite": (lambda state: {name: torch.full_like(t, torch.inf) for name, t in state.items()}, "not finite"),
    "none": (lambda state: {}, "describes a network of"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_another_network_are_one_line(tmp_path: Path, package: Path, name: str) -> None:
    change, message = WEIGHTS[name]
    shutil.copytree(package, tmp_path / "package")
    state = safetensors.torch.load_file(tmp_path / "package" / "model.safetensors")
    floats = {n: t for n, t in state.items() if t.is_floating_point()}
    state = (
        state if name in ("a tensor too many", "none") else {n: t for n, t in state.items() if n not in floats}
    ) | (change(floats))
    state = {} if name == "none" else state
    (tmp_path / "package" / "model.safetensors").write_bytes(safetensors.torch.save(state))
    listed_again(tmp_path / "package")
    with pytest.raises(ArtifactError, match=message) as error:
        sanitize.load_model(tmp_path / "package")
    assert str(error.value).isprintable()


@pytest.mark.parametrize("header", [2**63, 2**40, 100 << 20, 0, 1])
def test_a_header_that_lies_about_its_length_is_one_line(tmp_path: Path, package: Path, header: int) -> None:
    shutil.copytree(package, tmp_path / "package")
    weights = tmp_path / "package" / "model.safetensors"
    weights.write_bytes(header.to_bytes(8, "little") + weights.read_bytes()[8:])
    listed_again(tmp_path / "package")
    with pytest.raises(ArtifactError, match="no safetensors file"):
        sanitize.load_model(tmp_path / "package")


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../secret", "", ".", "a//b", "manifest.json", "a\0b"]
)
def test_a_manifest_cannot_name_a_file_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    package = save(tmp_path / "package", NETWORKS["convnet"])
    manifest = json.loads((package / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": hashlib.sha256(b"secret").hexdigest(), "size": 6}
    (package / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="no file inside the folder"):
        sanitize.load_model(package)


def test_a_link_that_leads_out_of_the_package_is_refused(tmp_path: Path) -> None:
    package = save(tmp_path / "package", NETWORKS["convnet"])
    (package / "config.json").rename(tmp_path / "config.json")
    (package / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(ArtifactError, match="leads out of"):
        sanitize.load_model(package)
    (tmp_path / "link").symlink_to(save(tmp_path / "other", NETWORKS["convnet"]))
    sanitize.load_model(tmp_path / "link")  # a link to a whole package is one


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "manifest.json"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "missing"])
def test_what_is_no_regular_file_is_never_waited_for(tmp_path: Path, file: str, kind: str) -> None:
    package = save(tmp_path / "package", NETWORKS["convnet"])
    (package / file).unlink()
    if kind == "fifo":
        os.mkfifo(package / file)
    elif kind == "device":
        (package / file).symlink_to("/dev/zero")
    elif kind == "folder":
        (package / file).mkdir()
    with pytest.raises(SanitizeError):
        sanitize.load_model(package)


def test_a_file_is_read_only_where_it_has_the_size_that_is_listed(tmp_path: Path) -> None:
    """A sparse file of a terabyte takes no space on the disk; reading it would take all memory."""
    package = save(tmp_path / "package", NETWORKS["convnet"])
    os.truncate(package / "model.safetensors", 2**40)
    with pytest.raises(ArtifactError, match="differs from the manifest"):
        sanitize.load_model(package)
    manifest = json.loads((package / "manifest.json").read_text())
    manifest["files"]["model.safetensors"]["size"] = 2**40
    (package / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="describes a network of"):
        sanitize.load_model(package)


# --- anything -------------------------------------------------------------------------------------------------------

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**30]),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-4, 10**6), max_size=5),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
    st.builds(lambda: [[[[]]]] * 100),  # a new list each time: `spoilt` may change what it drew before
)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Places of all values of a JSON document, inner ones too."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [place for name, child in children for place in leaves(child, (*path, name))]


@st.composite
def spoilt(draw: st.DrawFn, document: Any) -> str:
    """The document with one to three values replaced by junk, or deleted."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = [place for place in leaves(document) if place]
        if not places:
            break
        *path, last = draw(st.sampled_from(places))
        holder = document
        for name in path:
            holder = holder[name]
        if draw(st.booleans()):
            del holder[last]
        else:
            holder[last] = draw(JUNK)
    return json.dumps(document)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data(), file=st.sampled_from(["config.json", "manifest.json", "model.safetensors"]))
def test_a_spoilt_package_loads_or_is_one_line(package: Path, tmp_path: Path, data: st.DataObject, file: str) -> None:
    spoilt_package = tmp_path / "package"
    shutil.rmtree(spoilt_package, ignore_errors=True)
    shutil.copytree(package, spoilt_package)
    if file == "model.safetensors":
        content = bytearray((package / file).read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        for _ in range(data.draw(st.integers(1, 4))):
            end = header if data.draw(st.booleans()) else len(content)
            content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
        (spoilt_package / file).write_bytes(content)
    else:
        (spoilt_package / file).write_text(data.draw(spoilt(json.loads((package / file).read_text()))))
    if file != "manifest.json":
        listed_again(spoilt_package)
    before, problem = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "none"
    try:
        model = sanitize.load_model(spoilt_package)
        config = Checkpoint.load(spoilt_package).config
        images_BCHW = torch.zeros(2, *config.image_shape, dtype=torch.uint8)
        assert model(images_BCHW).shape == (2, config.n_classes)
    except SanitizeError as error:
        problem = str(error)
    assert problem.isprintable()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB
