import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import nn

from sanitize.artifacts import Part, Recipe, make
from sanitize.errors import ConfigError, DataError
from sanitize.models.checkpoint import Checkpoint, write_checkpoint
from sanitize.models.config import ModelConfig
from sanitize.models.convnet import ConvNetConfig
from sanitize.models.factory import FactoryConfig
from sanitize.models.mlp import MLPConfig
from sanitize.models.pixels import OnPixels
from sanitize.models.resnet import ResNetConfig
from sanitize.models.torchvision import TorchvisionConfig
from sanitize.models.weights import load_into, load_state

SMALL = ModelConfig(architecture=ConvNetConfig(widths=(4, 6)), n_classes=3, image_shape=(1, 8, 8))


def save(out: Path, model: nn.Module, config: ModelConfig) -> Checkpoint:
    def write(part: Part) -> None:
        write_checkpoint(part, model, config, [{"epoch": 1, "loss": 0.5}])

    return make(Checkpoint, out, Recipe(stage="made-up"), write)


@pytest.mark.parametrize(
    "architecture", [ConvNetConfig(widths=(4, 6)), ResNetConfig(widths=(4, 6)), MLPConfig(widths=(6, 5))]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_saved_and_loaded_it_is_the_same_model_to_the_bit(
    tmp_path: Path, architecture: ConvNetConfig | ResNetConfig | MLPConfig, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    config = SMALL.model_copy(update={"architecture": architecture, "mean": (0.1,), "std": (0.7,)})
    model = config.build().to(memory_format=memory_format)  # type: ignore[call-overload]
    model(torch.randn(4, 1, 8, 8))  # moves the running statistics of BatchNorm
    checkpoint = Checkpoint.load(save(tmp_path / "a", model, config).path)
    again = checkpoint.model()
    assert not again.training
    assert checkpoint.config == config
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert checkpoint.read_json("history.json") == [{"epoch": 1, "loss": 0.5}]


@pytest.mark.parametrize("format", ["safetensors", "zip", "zip with state_dict"])
def test_state_dicts_of_the_user_are_loaded(tmp_path: Path, format: str) -> None:
    state = SMALL.build().state_dict()
    path = tmp_path / ("w.safetensors" if format == "safetensors" else "w.pt")
    if format == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state if format == "zip" else {"state_dict": state, "epoch": 3}, path)
    loaded = load_state(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


class Bomb:
    """A pickle that touches a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.target,))


@pytest.mark.hostile
@pytest.mark.parametrize("format", ["zip", "plain pickle", "legacy", "pickle called safetensors"])
def test_a_malicious_pickle_is_refused_and_never_executed(tmp_path: Path, format: str) -> None:
    bomb, path = Bomb(tmp_path / "executed"), tmp_path / "weights.pt"
    if format == "plain pickle":
        path.write_bytes(pickle.dumps({"w": bomb}))
    elif format == "pickle called safetensors":
        path = tmp_path / "weights.safetensors"
        path.write_bytes(pickle.dumps(bomb))
    else:
        torch.save({"w": bomb}, path, _use_new_zipfile_serialization=format == "zip")
    with pytest.raises(DataError, match=r"weights\."):
        load_state(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [[1, 2], {"w": 3}, {"state_dict": {"w": "text"}}, torch.ones(2)])
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(DataError, match="no state dict"):
        load_state(tmp_path / "w.pt")


def test_a_missing_or_damaged_file_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    for name in ("missing.safetensors", "missing.pt", "cut.safetensors", "cut.pt"):
        with pytest.raises(DataError, match=name):
            load_state(tmp_path / name)


def test_weights_of_another_architecture_are_a_config_error_that_names_them(tmp_path: Path) -> None:
    other = ModelConfig(architecture=ConvNetConfig(widths=(4, 7)), n_classes=3, image_shape=(1, 8, 8)).build()
    with pytest.raises(ConfigError, match=r"w\.pt do not fit the architecture(.|\n)*features\.conv1_0\.weight"):
        load_into(SMALL.build(), other.state_dict(), "w.pt")
    less = dict(list(SMALL.build().state_dict().items())[:-1])
    with pytest.raises(ConfigError, match=r"head\.bias"):
        load_into(SMALL.build(), less, "w.pt")


# --- architectures ----------------------------------------------------------------------------------------------

FACTORY = """
from torch import nn

def small(n_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, n_classes))
"""


def test_a_factory_of_the_user_is_called_with_classes_and_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_networks.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    config = SMALL.model_copy(update={"architecture": FactoryConfig(function="my_networks:small")})
    assert config.build()(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    again = save(tmp_path / "a", config.build(), config).of_own(config.architecture).model()
    assert again(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize("function", ["no_such_module:f", "json:no_such_function", "sanitize.nothing:f"])
def test_a_factory_that_cannot_be_imported_is_a_config_error(function: str) -> None:
    with pytest.raises(ConfigError, match="cannot import"):
        SMALL.model_copy(update={"architecture": FactoryConfig(function=function)}).build()


@pytest.mark.parametrize("function", ["os.system", "os:system; rm", "a:b:c", ""])
def test_a_factory_must_name_a_module_and_a_function(function: str) -> None:
    with pytest.raises(ValidationError):
        FactoryConfig(function=function)


def test_torchvision_architectures() -> None:
    config = ModelConfig(architecture=TorchvisionConfig(name="squeezenet1_1"), n_classes=5, image_shape=(3, 64, 64))
    assert config.build().eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize("name", ["resnet1", "torch.hub", "fasterrcnn_resnet50_fpn", "raft_small"])
def test_a_name_that_is_no_classifier_of_torchvision_is_a_config_error(name: str) -> None:
    """A detection model would also fetch its backbone from the network."""
    with pytest.raises(ConfigError, match=f"no model '{name}'"):
        ModelConfig(architecture=TorchvisionConfig(name=name), n_classes=5, image_shape=(3, 64, 64)).build()


def test_grey_images_for_a_torchvision_network_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match="channels"):
        ModelConfig(architecture=TorchvisionConfig(name="resnet18"), n_classes=5, image_shape=(1, 64, 64)).build()


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.25,)), ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))])
def test_normalise_is_its_formula(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    config = ModelConfig(n_classes=2, image_shape=(3, 4, 4), mean=mean, std=std)
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    normal = config.normalise(images)
    assert normal.dtype == torch.float32
    for c in range(3):
        m, s = mean[c % len(mean)], std[c % len(std)]
        torch.testing.assert_close(normal[:, c], (images[:, c] / 255 - m) / s)


@pytest.mark.parametrize(
    "wrong", [{"mean": (0.1, 0.2)}, {"std": (0.1, 0.2)}, {"std": (0.0,)}, {"std": (-1.0,)}, {"n_classes": 0}, {"x": 1}]
)
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises((ValidationError, ConfigError)):
        ModelConfig(**({"n_classes": 2, "image_shape": (3, 4, 4)} | wrong))


def test_pixels_are_the_scale_of_noise_and_attacks() -> None:
    config = SMALL.model_copy(update={"image_shape": (3, 8, 8), "mean": (0.1, 0.5, 0.9), "std": (0.1, 0.2, 0.4)})
    images_BCHW, noise_BCHW = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8), torch.randn(2, 3, 8, 8)
    on_pixels = OnPixels(nn.Identity(), config)
    assert torch.equal(on_pixels(images_BCHW / 255), config.normalise(images_BCHW))
    assert not on_pixels.state_dict()
    torch.testing.assert_close(
        on_pixels(images_BCHW / 255 + noise_BCHW), config.normalise(images_BCHW) + config.pixel_unit * noise_BCHW
    )
