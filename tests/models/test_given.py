"""Networks that were trained elsewhere: the files that people save, and what is refused."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from sanitize.compute import Compute
from sanitize.errors import ConfigError, DataError
from sanitize.models.architectures import Architecture
from sanitize.models.config import ModelConfig
from sanitize.models.factory import FactoryConfig
from sanitize.models.given import GivenModelConfig, import_model
from sanitize.models.mlp import MLPConfig
from sanitize.models.resnet import ResNetConfig
from sanitize.models.torchvision import TorchvisionConfig
from sanitize.models.weights import load_into, load_state, without_prefix
from sanitize.packaging import load_model, package_model

CPU = Compute(device="cpu")
RESNET = ResNetConfig(widths=(4, 8))
EXPECTED = ModelConfig(architecture=RESNET, n_classes=3, image_shape=(3, 8, 8))


def trained() -> nn.Module:
    """A network whose BatchNorms have seen images."""
    torch.manual_seed(0)
    model = EXPECTED.build()
    model(torch.randn(8, 3, 8, 8))
    return model.eval()


def described(weights: Path, **more: Any) -> GivenModelConfig:
    settings: dict[str, Any] = {"architecture": RESNET, "size": 8, "mean": (0.5,), "std": (0.25,)}
    return GivenModelConfig(weights=str(weights), **settings | more)


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


SHAPES = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "best": 0.5},
    "model": lambda state: {"epoch": 3, "optimizer": {"lr": 0.1}, "model": state},
    "nested": lambda state: {"model": {"state_dict": state}},
    "DataParallel": lambda state: prefixed(state, "module."),
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "compiled and parallel": lambda state: {"state_dict": prefixed(state, "module._orig_mod.")},
    "Lightning": lambda state: {"state_dict": prefixed(state, "net."), "global_step": 10},
    "AveragedModel": lambda state: {"n_averaged": torch.tensor(3)} | prefixed(state, "module."),
    "no counters": lambda state: {name: t for name, t in state.items() if "num_batches" not in name},
    "half": lambda state: {name: t.half() if t.is_floating_point() else t for name, t in state.items()},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shapes_that_people_save_are_one_model(tmp_path: Path, shape: str) -> None:
    model = trained()
    torch.save(SHAPES[shape](model.state_dict()), tmp_path / "w.pt")
    checkpoint = import_model(described(tmp_path / "w.pt"), str(tmp_path / "model"), CPU)
    assert checkpoint.config.n_classes == 3
    images_BCHW = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    with torch.inference_mode():
        wanted_BK = model(checkpoint.config.normalise(images_BCHW))
        package = package_model(checkpoint, str(tmp_path / "package"), CPU)
        found_BK = load_model(package.path)(images_BCHW)
    torch.testing.assert_close(found_BK, wanted_BK, rtol=0, atol=1e-2 if shape == "half" else 0)


def test_plain_weights_come_before_averages_and_an_entry_can_be_named(tmp_path: Path) -> None:
    state = trained().state_dict()
    average = {name: tensor * 0 for name, tensor in state.items()}
    torch.save({"ema": average, "model": state}, tmp_path / "w.pt")
    assert load_state(tmp_path / "w.pt")["head.bias"].equal(state["head.bias"])
    assert load_state(tmp_path / "w.pt", "ema")["head.bias"].eq(0).all()
    with pytest.raises(DataError, match="no weights under 'best'; it has 'ema', 'model'"):
        load_state(tmp_path / "w.pt", "best")


@settings(max_examples=50, deadline=None)
@given(prefixes=st.lists(st.sampled_from(["module", "_orig_mod", "net", "0", "head", "stem"]), max_size=3))
def test_prefixes_that_all_names_share_are_dropped_and_no_others(prefixes: list[str]) -> None:
    expected = EXPECTED.build().state_dict()
    prefix = "".join(f"{one}." for one in prefixes)
    assert without_prefix(prefixed(expected, prefix), expected).keys() == expected.keys()
    mixed = prefixed(expected, prefix) | {"other.weight": torch.ones(1)}
    if prefixes:
        with pytest.raises(ConfigError, match="do not fit"):
            load_into(EXPECTED.build(), mixed, "w.pt")


class Tied(nn.Module):
    """Two names for one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight
        self.head = nn.Linear(12, 3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.head(self.second(self.first(x_BCHW.flatten(1)).relu()).relu())


def tied(n_classes: int, in_channels: int) -> nn.Module:
    """Factory of `Tied`."""
    return Tied()


@pytest.mark.parametrize("left_out", [None, "first.weight", "second.weight"])
def test_tied_weights_are_written_under_both_names_and_may_be_given_under_one(
    tmp_path: Path, left_out: str | None
) -> None:
    torch.manual_seed(0)
    model = Tied()
    torch.save({name: t for name, t in model.state_dict().items() if name != left_out}, tmp_path / "w.pt")
    config = described(tmp_path / "w.pt", architecture=f"factory:{__name__}:tied", size=2)
    package = package_model(import_model(config, str(tmp_path / "model"), CPU), str(tmp_path / "package"), CPU)
    again = package.model()
    assert again.first.weight is again.second.weight  # type: ignore[union-attr]
    x_BCHW = torch.randn(2, 3, 2, 2)
    assert torch.equal(again(x_BCHW), model(x_BCHW))


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.hostile
def test_a_pickled_model_is_refused_with_the_remedy(tmp_path: Path) -> None:
    torch.save(trained(), tmp_path / "model.pt")
    with pytest.raises(DataError, match=r"none was loaded. Save the weights alone.*model\.state_dict\(\)") as refused:
        load_state(tmp_path / "model.pt")
    assert "\n" not in str(refused.value)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"w": print}))
    with pytest.raises(DataError, match=r"plain\.pt"):
        load_state(tmp_path / "plain.pt")


@pytest.mark.hostile
@pytest.mark.parametrize("member", ["w/code/__torch__.py", "w/models/model.json", "serialized_exported_program.json"])
def test_programs_are_refused(tmp_path: Path, member: str) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as file:
        file.writestr(member, "x")
    with pytest.raises(DataError, match="it is a program"):
        load_state(tmp_path / "w.pt")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = trained().state_dict()
    state["head.weight"][0, 0] = torch.nan
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"'head\.weight' in .*w\.pt are not finite"):
        import_model(described(tmp_path / "w.pt"), str(tmp_path / "model"), CPU)


def test_classes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    torch.save(trained().state_dict(), tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"head\.weight is float32 \(3, 8\), not float32 \(4, 8\)"):
        import_model(described(tmp_path / "w.pt", classes=list("abcd")), str(tmp_path / "model"), CPU)
    with pytest.raises(ConfigError, match="n_classes is 3, but classes has 4 names"):
        described(tmp_path / "w.pt", classes=list("abcd"), n_classes=3)


class NoClassifier(nn.Module):
    """A linear map, whatever its parts are called: `output` decides what it returns."""

    def __init__(self, output: str) -> None:
        super().__init__()
        self.head, self.output = nn.Linear(12, 3), output

    def forward(self, x_BCHW: Tensor) -> Any:
        y_BK = self.head(x_BCHW.flatten(1))
        return {"dict": {"logits": y_BK}, "map": y_BK[:, :, None], "fails": None}[self.output]


def as_dict(n_classes: int, in_channels: int) -> nn.Module:
    """Its output is a dict."""
    return NoClassifier("dict")


def as_map(n_classes: int, in_channels: int) -> nn.Module:
    """Its output has a dimension too many."""
    return NoClassifier("map")


@pytest.mark.parametrize(
    ("factory", "size", "message"),
    [
        ("as_dict", 2, "maps two images to dict, not to"),
        ("as_map", 2, r"maps two images to \(2, 3, 1\), not to \(2, 3\)"),
        ("as_map", 4, r"takes no images of \(3, 4, 4\)"),
    ],
)
def test_networks_that_are_no_classifiers_of_such_images_are_refused(
    tmp_path: Path, factory: str, size: int, message: str
) -> None:
    torch.save(NoClassifier("dict").state_dict(), tmp_path / "w.pt")
    config = described(tmp_path / "w.pt", architecture=f"factory:{__name__}:{factory}", size=size)
    with pytest.raises(ConfigError, match=message):
        import_model(config, str(tmp_path / "model"), CPU)


# --- architectures as text --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("mlp", MLPConfig()),
        ("torchvision:resnet18", TorchvisionConfig(name="resnet18")),
        ("factory:package.module:function", FactoryConfig(function="package.module:function")),
    ],
)
def test_text_stands_for_an_architecture(text: str, wanted: Architecture) -> None:
    config = ModelConfig.model_validate({"architecture": text, "n_classes": 2, "image_shape": (3, 8, 8)})
    assert config.architecture == wanted


@pytest.mark.parametrize("text", ["resnett", "resnet:18", "torchvision:", "factory:os", "", ":"])
def test_text_that_names_no_architecture_is_refused(text: str) -> None:
    with pytest.raises((ValidationError, ConfigError)):
        ModelConfig.model_validate({"architecture": text, "n_classes": 2, "image_shape": (3, 8, 8)})
