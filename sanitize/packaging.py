"""The model package: one folder with a model, the recipe of its training, and its certificates.

    model = sanitize.load_model("runs/robust/80-package")
    logits = model(images)                      # uint8 (B, C, H, W), or float on [0, 1]

`model.safetensors`, `config.json` (architecture, classes, preprocessing, input range), `training.json` (the recipe),
`certificate.json`, `metrics.json`, and `MODEL_CARD.md`, which is written from the other files. No pickle.
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, RootModel, ValidationError
from torch import nn

from sanitize.artifacts import MANIFEST, Part, Recipe, first_problem, read_manifest
from sanitize.certification import Certificates, PartitionEnsemble
from sanitize.certification.certificates import Proved, excerpt
from sanitize.certification.ensemble import PROVED
from sanitize.compute import Compute
from sanitize.data.class_names import class_name
from sanitize.errors import ArtifactError
from sanitize.models.checkpoint import Checkpoint
from sanitize.models.config import ModelConfig
from sanitize.models.pixels import OnPixels
from sanitize.models.weights import as_safetensors
from sanitize.plural import counted
from sanitize.stage import Work, stage
from sanitize.storage import exists, join
from sanitize.tar.names import as_markdown

_N_NAMED = 50  # classes on the card
PACKAGE = "80-package"  # folder of the package in a run


class ModelPackage(Checkpoint):
    """A Checkpoint with `training.json`, `certificate.json`, `metrics.json` and `MODEL_CARD.md`."""


@stage(ModelPackage, version=4, gpu=False, draws="nothing")
def package_model(model: Checkpoint, out: str, compute: Compute, certificates: Sequence[Certificates] = ()) -> Work:
    """Put a model and its certificates into one folder; a package keeps its earlier certificates of other kinds.

    Args:
        model: the trained model.
        out: folder of the artifact.
        compute: not used; every stage takes it.
        certificates: new certificates of this model.
    """

    def write(part: Part) -> None:
        training, proved = _known(model)
        new = [certificate.summary() for certificate in certificates]
        kinds = {certificate["kind"] for certificate in new}
        proved = [certificate for certificate in proved if certificate["kind"] not in kinds] + new
        metrics = _metrics(model, proved)
        part.write("model.safetensors", as_safetensors(model.model()))
        part.write_json("config.json", model.config.model_dump(mode="json"))
        part.write_json("training.json", training)
        part.write_json("certificate.json", {"format": 1, "model": model.digest, "certificates": proved})
        part.write_json("metrics.json", metrics)
        part.write("MODEL_CARD.md", _card(model.config, training, proved, metrics).encode())
        if PROVED in model.manifest().files:
            part.write(PROVED, model.read(PROVED))

    return Work(write=write, handle=partial(ModelPackage.trusted_like, model=model))


def open_model(path: str | Path, trust_code: bool = False) -> Checkpoint:
    """The model in a folder or URL: a package, the artifact of a training stage, or a run folder with a package.

    Args:
        path: path of the folder.
        trust_code: see `load_model`.

    Raises:
        ArtifactError: the folder holds no model.
    """
    path = str(path).rstrip("/")
    if not exists(join(path, MANIFEST)) and exists(join(path, PACKAGE, MANIFEST)):
        path = join(path, PACKAGE)
    manifest = read_manifest(path)
    if "config.json" not in manifest.files:
        raise ArtifactError(f"{path} is no model: it was made by {manifest.recipe.stage}")
    kind = PartitionEnsemble if manifest.recipe.stage == "train_partitions" else Checkpoint
    return kind(path=path, digest=manifest.digest, trust_code=trust_code)


def load_model(path: str | Path, *, trust_code: bool = False) -> nn.Module:
    """A model with its preprocessing, in eval mode, on the CPU.

    A package may come from a stranger: its numbers are bounded, nothing larger than its files is built, and code it
    names is not run.

    Args:
        path: see `open_model`.
        trust_code: allow the function in the package that builds its network ("kind": "factory"). The function must be
            in an installed package: nothing is imported from the working directory or from the model's folder.

    Returns:
        A module from images (B, C, H, W), uint8 or float on [0, 1], to logits (B, K), or to votes for an ensemble.

    Raises:
        ArtifactError: there is no model; a file differs from the manifest, or describes no network; the weights do not
            fit the network; or the package names code and `trust_code` is False.
    """
    checkpoint = open_model(path, trust_code)
    return OnPixels(checkpoint.model(), checkpoint.config).eval()


def training_recipe(model: Checkpoint) -> Recipe:
    """Recipe of the training of a model; a package carries it. Raises ArtifactError where it is damaged."""
    return Recipe.model_validate(_known(model)[0])


def _known(model: Checkpoint) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Recipe of the training, and earlier certificates; both are copied from a package."""
    if "certificate.json" not in model.manifest().files:
        return model.manifest().recipe.model_dump(mode="json"), []
    training = _checked(model, "training.json", Recipe)
    return training, _checked(model, "certificate.json", _Certificates)["certificates"]


class _Certificates(BaseModel):
    certificates: tuple[Proved, ...] = Field(max_length=20)


class _Metrics(RootModel[dict[str, dict[str, float]]]):
    pass


class _History(RootModel[tuple[dict[str, float], ...]]):
    pass


def _checked(model: Checkpoint, name: str, kind: type[BaseModel]) -> Any:
    """Content of a JSON file. Raises ArtifactError where it does not validate as `kind`."""
    found = model.read_json(name)
    try:
        kind.model_validate(found)
    except ValidationError as error:
        raise ArtifactError(f"{model.url(name)} is damaged: {first_problem(error)}") from error
    return found


def _metrics(model: Checkpoint, proved: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of the last epoch of the training, and accuracies of the certificates."""
    metrics: dict[str, Any] = {}
    if "metrics.json" in model.manifest().files:
        measured = _checked(model, "metrics.json", _Metrics)
        metrics |= {name: values for name, values in measured.items() if name == "training"}
    if "history.json" in model.manifest().files and (history := _checked(model, "history.json", _History)):
        metrics["training"] = history[-1]
    for certificate in proved:
        names = ("samples", "abstained", "clean_accuracy")
        metrics[certificate["kind"]] = {name: certificate[name] for name in names}
    return metrics


def _card(
    config: ModelConfig, training: dict[str, Any], proved: Sequence[dict[str, Any]], metrics: dict[str, Any]
) -> str:
    channels, height, width = config.image_shape
    trained = f"Stage {_shown(training['stage'])}"
    trained += "".join(f", {_shown(name)} {_shown(value)}" for name, value in training["numerics"].items())
    lines = [
        "# Model card",
        "",
        "## The model",
        f"{_architecture(config)}, {counted(config.n_classes, 'class')}{_names(config)}. "
        f"It takes images of {channels} x {height} x {width} (channels, height, width) with values in "
        f"{list(config.input_range)}, normalised by mean {list(config.mean)} and standard deviation {list(config.std)} "
        "on the scale [0, 1].",
        "",
        "```python",
        "import sanitize",
        "",
        'model = sanitize.load_model("path/to/this/folder")  # uint8 images (B, C, H, W) to logits or votes (B, K)',
        "```",
        "",
        "Start Python in another folder than this one: Python imports modules from the folder it is started in, and so "
        "would run any that somebody put here.",
        "",
        "## How it was trained",
        f"{trained}; all settings are in `training.json`. Inputs, by digest:",
        "",
        *(f"- {_shown(name)}: {_shown(digest)}" for name, digest in sorted(training["inputs"].items())),
        "",
        "## What was measured",
        *(_measured(metrics) or ["Nothing but the loss." if "training" in metrics else "Nothing."]),
        "",
        "## What is proved",
        *(chain.from_iterable(map(_proved, proved)) if proved else ["Nothing: this model carries no certificate."]),
    ]
    return "\n".join(_plain(line) for line in lines) + "\n"


def _plain(line: str) -> str:
    """A line of a card without links, pictures and HTML, which may come from another package."""
    return line.replace("<", "&lt;").replace("](", "] (") if line.isprintable() else repr(line)


def _architecture(config: ModelConfig) -> str:
    one = ", ".join(f"{name} {value}" for name, value in config.architecture.model_dump(mode="json").items())
    return (
        f"The vote of {counted(config.n_networks, 'network')} ({one})" if config.is_ensemble else f"One network ({one})"
    )


def _names(config: ModelConfig) -> str:
    """The first classes with their names, or ""."""
    if not config.class_names:
        return ""
    numbers = range(min(config.n_classes, _N_NAMED))
    named = ", ".join(_shown(class_name(number, config.class_names)) for number in numbers)
    return f": {named}" + (", ...; `config.json` names the others" if config.n_classes > _N_NAMED else "")


def _measured(metrics: dict[str, Any]) -> list[str]:
    return [
        f"- {_shown(kind)}: " + ", ".join(f"{_shown(name)} {value:.4g}" for name, value in measured.items())
        for kind, measured in metrics.items()
    ]


def _proved(certificate: dict[str, Any]) -> list[str]:
    """A section of the card: the statement, a short table, and the limits of the statement."""
    shown = excerpt(certificate["certified_accuracy"])
    scope = certificate["scope"]
    parameters = ", ".join(
        f"{_shown(name)} {_shown(value)}" for name, value in certificate["parameters"].items() if value is not None
    )
    return [
        f"### Against {_shown(scope['threat'])}: {_shown(certificate['kind'])}",
        f"{_shown(scope['statement'])} ({_shown(certificate['source'])}; {parameters}.)",
        "",
        f"Of {_shown(certificate['samples'])} samples ({_shown(certificate['abstained'])} of them abstained from):",
        "",
        f"| radius ({_shown(certificate['radius_unit'])}) | " + " | ".join(f"{radius:g}" for radius, _ in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
        "| certified accuracy | " + " | ".join(f"{share:.1%}" for _, share in shown) + " |",
        "",
        "It says nothing about " + "; ".join(map(_shown, scope["not_covered"])) + ".",
        "",
    ]


def _shown(value: Any) -> str:
    """Escaped text of a value, which may come from a stranger's package."""
    return as_markdown(str(value), 2_000)
