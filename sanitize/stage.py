"""Stages: functions `config, inputs…, out, compute -> artifact`, each declared once.

    @stage(Denoised, gpu=False)
    def denoise_shards(config, pca, dataset, out, compute, shards=None) -> Work:
        ...
        return Work(parts=dataset.shards, write_part=write_part, bar=Bars("denoise", dataset.n_samples))

A stage function checks its arguments and returns the work that fills its folder. The decorator does what all stages
share: it applies the compute settings, derives the recipe from the arguments, makes the artifact, shows progress, and
adds the stage to `STAGES`. Prefect's tasks, the exports of `sanitize` and the tests read that registry.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import Signature, signature
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

from pydantic import BaseModel

from sanitize.artifacts import Artifact, ArtifactBuilder, Part, Recipe, Sources, make, make_together
from sanitize.compute import Compute
from sanitize.progress import track

A = TypeVar("A", bound=Artifact)
P = ParamSpec("P")
Draws = Literal["nothing", "seed", "numerics"]
Advance = Callable[[int], None]


class Bars(NamedTuple):
    """The progress bar of a stage: a description, the total (None where it is unknown) and the unit."""

    description: str
    total: int | None = None
    unit: str = "samples"


class Work(NamedTuple):
    """What fills the folder of an artifact. Every field is optional; see `artifacts.make`.

    Attributes:
        write: writes a small artifact in one piece.
        parts: names of the parts of a large artifact, usually its shards.
        write_part: writes one part; its last argument advances the progress bar.
        finish: writes what needs all parts.
        fit: computes, in every process of torchrun, the value that the first process hands to `write_fitted`.
        write_fitted: writes the value of `fit`.
        sources: size and modification time of inputs that are no artifacts.
        bar: the progress bar over all parts.
        handle: changes the handle that the stage returns, in ways that are no property of the files.
        config: settings in the recipe, where they are not those of the parameter `config`.
        inputs: digests in the recipe, where they are not those of the parameters that are artifacts.
    """

    write: Callable[[Part], None] | None = None
    parts: Sequence[str] = ()
    write_part: Callable[[str, Part, Advance], None] | None = None
    finish: Callable[[Part, ArtifactBuilder], None] | None = None
    fit: Callable[[], Any] | None = None
    write_fitted: Callable[[Part, Any], None] | None = None
    sources: Sources | None = None
    bar: Bars | None = None
    handle: Callable[[Any], Any] | None = None
    config: dict[str, Any] | None = None
    inputs: dict[str, str] | None = None


class Stage(NamedTuple):
    """What others need to know of a stage.

    Attributes:
        function: the stage itself.
        kind: class of its artifact.
        version: version of its meaning; see `Recipe`.
        sharded: True where it takes `shards` and can be divided among workers.
        gpu: True where it uses a GPU if there is one.
        draws: compute settings that are part of the recipe.
    """

    function: Callable[..., Any]
    kind: type[Artifact]
    version: int
    sharded: bool
    gpu: bool
    draws: Draws

    @property
    def name(self) -> str:
        """Name of the function."""
        return self.function.__name__


STAGES: dict[str, Stage] = {}


def stage(
    kind: type[A],
    *,
    version: int = 1,
    gpu: bool = True,
    draws: Draws = "numerics",
) -> Callable[[Callable[P, Work]], Callable[P, A]]:
    """Declare a stage.

    Args:
        kind: class of the artifact.
        version: version of the stage's meaning; raised when the same configuration gives other results.
        gpu: False for a stage that runs on the CPU whatever `Compute.device` says.
        draws: "numerics" puts seed and precision into the recipe, "seed" the seed alone, "nothing" neither.

    Raises:
        TypeError: the function does not have the parameters of a stage, or its name is taken.
    """

    def declare(function: Callable[P, Work]) -> Callable[P, A]:
        form = signature(function)
        _check(function.__name__, form)
        sharded = _is_sharded(form)

        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> A:
            bound = form.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            compute: Compute = given["compute"]
            compute.activate()
            work = function(*args, **kwargs)
            numerics = {"nothing": {}, "seed": {"seed": compute.seed}, "numerics": compute.numerics}[draws]
            recipe = Recipe(
                stage=function.__name__,
                version=version,
                config=_settings(given) if work.config is None else work.config,
                numerics=numerics,
                inputs=_digests(given) if work.inputs is None else work.inputs,
            )
            made = _made(kind, str(given["out"]), recipe, work, given["shards"] if sharded else None)
            return made if work.handle is None else work.handle(made)

        run.__signature__ = form.replace(return_annotation=kind)  # type: ignore[attr-defined]
        STAGES[function.__name__] = Stage(run, kind, version, sharded, gpu, draws)
        return run

    return declare


def _check(name: str, form: Signature) -> None:
    names = list(form.parameters)
    if name in STAGES:
        raise TypeError(f"there are two stages {name}")
    if "out" not in names or names[names.index("out") + 1 : names.index("out") + 2] != ["compute"]:
        raise TypeError(f"stage {name} must take `out, compute` behind its inputs; it takes {', '.join(names)}")


def _is_sharded(form: Signature) -> bool:
    """True where the stage takes names of shards as an option; an input of that name is an artifact."""
    names = list(form.parameters)
    return "shards" in names[names.index("compute") :]


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    config = given.get("config")
    return config.model_dump(mode="json") if isinstance(config, BaseModel) else {}


def _digests(given: Mapping[str, Any]) -> dict[str, str]:
    """Digest of every artifact among the arguments, by the name of its parameter; those of a sequence are numbered."""
    digests = {}
    for parameter, value in given.items():
        if isinstance(value, Artifact):
            digests[parameter] = value.digest
        elif isinstance(value, Sequence) and value and isinstance(value[0], Artifact):
            digests |= {f"{parameter}{i}": artifact.digest for i, artifact in enumerate(value)}
    return digests


def _made(kind: type[A], out: str, recipe: Recipe, work: Work, only: Sequence[str] | None) -> A:
    if work.fit is not None and work.write_fitted is not None:
        return make_together(kind, out, recipe, work.fit, work.write_fitted)
    if work.bar is None:
        return _make(kind, out, recipe, work, only, lambda _n: None)
    total = work.bar.total if only is None else None  # one worker of several sees its own shards alone
    with track(work.bar.description, total, work.bar.unit) as advance:
        return _make(kind, out, recipe, work, only, advance)


def _make(kind: type[A], out: str, recipe: Recipe, work: Work, only: Sequence[str] | None, advance: Advance) -> A:
    write_part = work.write_part
    return make(
        kind,
        out,
        recipe,
        work.write,
        parts=work.parts,
        write_part=None if write_part is None else lambda name, part: write_part(name, part, advance),
        finish=work.finish,
        only=only,
        sources=work.sources,
    )
