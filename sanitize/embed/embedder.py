"""Train the suspect model by cross-entropy on the untrusted data, or load weights of the user."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from sanitize.artifacts import Part
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.fit import ClassifierConfig, fit_classifier
from sanitize.models.checkpoint import Checkpoint, write_checkpoint
from sanitize.models.weights import load_into, load_state
from sanitize.stage import Work, stage
from sanitize.storage import fingerprint, sha256_file


class EmbedderConfig(ClassifierConfig):
    """The suspect model and how it is trained.

    Attributes:
        architecture: the network; a small ConvNet learns a backdoor as readily as a large one, and sooner.
        weights: a .safetensors or torch state dict to load instead of training.
        mean, std, optim, cache_bytes: as in `FitConfig`.
        augment: none by default. Even 10 % of brightness and contrast keep a suspect model from learning a faint
            trigger fully (blended 1 %: attack success rate 75 % instead of 92 %), and a trigger that is not learned
            leaves no trace in the embeddings. `flip` and `shift` move a corner trigger as well.
    """

    kind: Literal["classifier"] = "classifier"
    weights: str | None = None

    @property
    def stage(self) -> Callable[..., Checkpoint]:
        """The stage that makes this embedder."""
        return train_embedder

    @property
    def n_passes(self) -> int:
        """Passes over the data set."""
        return self.optim.epochs if self.weights is None else 1


@stage(Checkpoint, version=2)
def train_embedder(config: EmbedderConfig, dataset: Dataset, out: str, compute: Compute) -> Work:
    """Train (or load) the suspect model.

    Args:
        config: network and training.
        dataset: the untrusted data; only usable samples are read.
        out: folder of the artifact.
        compute: device, precision, seed.

    Returns:
        The Checkpoint; `history.json` has loss and training accuracy of each epoch.

    Raises:
        NumericsError: training diverged.
        ConfigError, DataError: the weights or the architecture cannot be used.
    """
    model_config = config.describe(dataset)
    inputs = {"dataset": dataset.digest}
    sources = {}
    if config.weights is not None:
        sources["weights"] = fingerprint(config.weights)
        inputs["weights"] = sha256_file(Path(config.weights))

    def write(part: Part) -> None:
        compute.seed_global("embedder", "init")
        model = model_config.build()
        history: list[dict[str, float]] = []
        if config.weights is not None:
            load_into(model, load_state(config.weights), config.weights)
        else:
            history = fit_classifier(
                model,
                model_config,
                config,
                dataset,
                compute,
                description="train the suspect model",
                stream="embedder",
                generator=compute.generator("embedder", "augment"),
            )
        write_checkpoint(part, model, model_config, history)

    own = partial(Checkpoint.of_own, architecture=config.architecture)
    settings = config.model_dump(mode="json", exclude={"weights"})
    return Work(write=write, sources=sources, handle=own, config=settings, inputs=inputs)
