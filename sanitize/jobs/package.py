"""A network that was trained elsewhere becomes a model package, which other jobs take."""

from dataclasses import dataclass
from typing import Any

from sanitize.jobs.job import JobConfig, job
from sanitize.jobs.result import ModelRun
from sanitize.jobs.run import Run
from sanitize.models.given import GivenModelConfig, import_model
from sanitize.packaging import PACKAGE, package_model


class PackageRunConfig(JobConfig):
    """Config of one run; one YAML file.

    Attributes:
        model: the file of weights, and the description of the network.
    """

    model: GivenModelConfig


@dataclass(frozen=True)
class PackageRun(ModelRun):
    """A finished run of `package`."""

    kind = PackageRunConfig


@job(PackageRunConfig, PackageRun, has_flow=False)
def package(config: PackageRunConfig, run: Run) -> dict[str, Any]:
    """Make a model package of a network that was trained elsewhere.

    Stages: import, package.

    Returns:
        The place of the package, and what it holds: number of weights, classes, shape of the images.
    """
    model = run.stage("10-model", import_model, config.model)
    packaged = run.stage(PACKAGE, package_model, model)
    found = model.config
    network = model.model()
    return run.finish(
        config,
        {
            "package": packaged.path,
            "weights": sum(parameter.numel() for parameter in network.parameters()),
            "classes": found.n_classes,
            "image_shape": list(found.image_shape),
        },
    )
