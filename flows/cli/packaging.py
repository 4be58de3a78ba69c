"""`sanitize package`."""

from typing import Any

from flows.cli.app import console, print_places
from flows.cli.command import REQUIRED, Option, Settings, Values, job_command
from sanitize.errors import ConfigError
from sanitize.plural import counted


def _described(settings: Settings, values: Values) -> Settings:
    """Settings of the model with those of the options that are not one setting."""
    given: dict[str, Any] = {}
    if values["classes"] is not None:
        from sanitize.importing.source import listed_classes

        number = values["classes"]
        given |= {"n_classes": int(number)} if number.isdecimal() else {"classes": listed_classes(number)}
    if values["size"] is not None:
        given["size"] = _numbers("--size", values["size"].replace("x", ","), int)
    for name in ("mean", "std"):
        if values[name] is not None:
            given[name] = _numbers(f"--{name}", values[name], float)
    model = settings.get("model", {})
    if "size" in given and len(given["size"]) == 1:
        given["size"] *= 2
    return settings | {"model": {**model, **given} if isinstance(model, dict) else model}


def _numbers(flag: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(one) for one in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{flag}: {text!r} is no list of numbers such as 224 or 0.485,0.456,0.406") from error


@job_command(
    Option("weights", str, "model.weights", "State dict: a .safetensors or torch file.", REQUIRED),
    Option(
        "--architecture",
        str,
        "model.architecture",
        "The network: torchvision:resnet18, factory:package.module:function (called with n_classes and in_channels), "
        "or one of sanitize's own; with fields: --set 'model.architecture={kind: resnet, widths: [32, 64]}'.",
    ),
    Option(
        "--classes",
        str,
        "",
        "JSON file with the names of the classes in the order of the outputs: a list, or the classes.json of "
        "`sanitize import`. Or their number (default: the rows of the last matrix of weights).",
    ),
    Option("--size", str, "", "Height and width of the images in pixels: 224, or 224x192."),
    Option("--mean", str, "", "Mean of each channel on [0, 1], as in the training: 0.485,0.456,0.406 for ImageNet."),
    Option("--std", str, "", "Standard deviation of each channel, likewise: 0.229,0.224,0.225 for ImageNet."),
    Option("--channels", int, "model.channels", "Channels of the images: 3 (default) or 1."),
    Option("--entry", str, "model.entry", "Entry of the torch file that holds the weights, such as ema."),
    out="runs/package",
    has_flow=False,
    common=(),
    prepare=_described,
)
def package(result: dict[str, Any], out: str) -> None:
    """Make a model package of a network that you trained elsewhere; repair, certify and robustness take it.

    The file holds weights alone: torch.save(model.state_dict(), "weights.pt"), or the same as an entry of a checkpoint.
    Names may have the prefixes of wrappers (module., _orig_mod.). Pickled models are refused, because loading one runs
    code. The weights are compared with the architecture, and the network is run once.

    Examples:

        sanitize package resnet18.pt --architecture torchvision:resnet18 --classes names.json --size 224 --mean
        0.485,0.456,0.406 --std 0.229,0.224,0.225 --out runs/mine

        sanitize repair runs/mine --shards 'data/train-*.tar' --test-shards 'data/test-*.tar' --out runs/repaired
    """
    channels, height, width = result.pop("image_shape")
    weights, classes = counted(result.pop("weights"), "weight"), counted(result.pop("classes"), "class")
    size = f"{channels} x {height} x {width} (channels, height, width)"
    console.print(f"{weights}, {classes}, images of {size}", highlight=False)
    print_places(result)
