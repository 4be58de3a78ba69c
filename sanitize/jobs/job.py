"""Jobs: functions `config, run -> summary` that call stages in order, each declared once.

    @job(DenoiseRunConfig, DenoiseRun)
    def denoise(config: DenoiseRunConfig, run: Run) -> dict[str, Any]:
        ...
        return run.finish(config, summary)

The decorator returns the job as a Python function, `denoise(shards, out=..., denoise={"dims": 8}) -> DenoiseRun`, and
adds the job to the registry, `JOBS`. Prefect's flows, the command line and the tests read that registry. A job that
reads no shards has no argument `shards`, and a job that measures in a temporary folder needs no `out`.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from inspect import Parameter, Signature, getdoc
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, NamedTuple, Protocol, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from sanitize.compute import Compute
from sanitize.data.index_config import IndexConfig
from sanitize.distributed import rank0_first, world
from sanitize.errors import ConfigError
from sanitize.jobs.result import JobResult
from sanitize.jobs.run import CONFIGS, Run, claimed
from sanitize.jobs.runner import RunnerConfig, Threads
from sanitize.progress import shown
from sanitize.settings import ConfigSource, Sources, config_from, merged


class JobConfig(BaseModel):
    """Settings of all jobs.

    Attributes:
        compute: device, precision, seed, threads.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    compute: Compute = Compute()

    @property
    def sources(self) -> tuple[str, ...]:
        """All shards that the job reads."""
        return ()


class ShardsConfig(JobConfig):
    """Settings of jobs that read shards.

    Attributes:
        shards: directories, globs, brace ranges or URLs of .tar / .tar.gz shards.
        n_groups: number of groups of shards, which flows run side by side; None takes the number of CPU cores. Results
            do not depend on it.
        runner: threads, processes or ray, for the groups of a flow.
    """

    shards: tuple[str, ...] = Field(min_length=1)
    n_groups: int | None = Field(default=1, ge=1)
    runner: RunnerConfig = Threads()

    @property
    def groups(self) -> int:
        """`n_groups`, resolved."""
        return self.n_groups or os.cpu_count() or 1

    @property
    def sources(self) -> tuple[str, ...]:
        """All shards that the job reads."""
        return self.shards


class DecisionConfig(JobConfig):
    """Settings of jobs that go on from a finished run, because a person decided so.

    Attributes:
        compute: device and threads, where they are not to be those of the finished run; seed and precision always are.
        note: name of the person, and the reason; for the record.
    """

    note: str = ""

    def compute_after(self, finished: Compute) -> Compute:
        """Compute settings of the stages, given those of the finished run."""
        given = self.compute.model_fields_set & {"device", "threads"}
        return finished.model_copy(update={name: getattr(self.compute, name) for name in given})


class RunConfig(ShardsConfig):
    """Settings of jobs that read shards in a way of their own.

    Attributes:
        index: settings of reading shards.
    """

    has_several: ClassVar[bool] = False  # True for jobs that can look at several pictures a sample

    index: IndexConfig = IndexConfig()

    @model_validator(mode="after")
    def _one_picture_a_sample(self) -> Self:
        if self.index.has_several and not self.has_several:
            raise ConfigError(
                "index.image.member=all is for `clean` alone: this job reads one picture a sample; set "
                "index.image.member to its suffix, such as left.jpg, or to first"
            )
        return self


class ModelRunConfig(RunConfig):
    """Settings of jobs on a trained model; image size and classes are those of the model.

    Attributes:
        model: a model package, the folder of a training stage, or a run folder with a package.
        allow_factory: True allows a model of kind "factory" to run the function that it names, if an installed package
            holds the function. The setting is not kept in `config.yaml`.
    """

    model_config = ConfigDict(protected_namespaces=())

    model: str
    allow_factory: bool = Field(default=False, exclude=True)  # never written down: a copied config.yaml grants nothing


C = TypeVar("C", bound=BaseModel)
R = TypeVar("R", bound=JobResult)
Result = TypeVar("Result", bound=JobResult, covariant=True)
Order = Callable[[C, Run], dict[str, Any]]


class JobFunction(Protocol[Result]):
    """A job as a Python function; see `job`."""

    __name__: str

    def __call__(
        self,
        shards: Sources | None = None,
        *,
        out: str | Path | None = None,
        config: ConfigSource | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> Result:
        """Run the job."""
        ...


class Job(NamedTuple):
    """Facts about a job.

    Attributes:
        function: the order of work; its name is the name of the job.
        config: class of its config.
        settings: takes the config; returns its part with the settings of all jobs.
        reads_shards: True where that part is a ShardsConfig.
        claims: True where the job locks its folder; False where it locks parts of the folder.
        has_flow: True where the job is a flow of Prefect too; False where it is always called directly.
        is_temporary: True where the job works in a temporary folder, unless `out` is given.
        call: the job as a Python function.
        result: class of what `call` returns.
    """

    function: Order[Any]
    config: type[BaseModel]
    settings: Callable[[Any], JobConfig]
    reads_shards: bool
    claims: bool
    has_flow: bool
    is_temporary: bool
    call: JobFunction[JobResult]
    result: type[JobResult]

    @property
    def name(self) -> str:
        """Name of the function."""
        return self.function.__name__

    @contextmanager
    def claim(self, settings: JobConfig, out: str | Path | None) -> Iterator[str]:
        """The folder of a run, locked where the job needs it; of the processes of torchrun the first one has the lock.

        Raises:
            ConfigError: shards are searched for in a folder that `out` lies in.
            ArtifactError: another process works in `out`.
            TypeError: the job needs a folder, and `out` is None.
        """
        if out is None and not self.is_temporary:
            raise TypeError(f"{self.name}: `out` is missing, the path or URL of the {self.result.place}")
        is_locked = self.claims and world()[0] == 0
        with (
            TemporaryDirectory(prefix=f"sanitize-{os.getpid()}-") if out is None else nullcontext(str(out)) as folder,
            claimed(folder, settings.sources) if is_locked else nullcontext(),
        ):
            yield folder


JOBS: dict[str, Job] = {}


def job(
    config: type[C],
    result: type[R],
    *,
    section: str | None = None,
    claims: bool = True,
    has_flow: bool = True,
    is_temporary: bool = False,
) -> Callable[[Order[C]], JobFunction[R]]:
    """Declare a job.

    Args:
        config: class of its config.
        result: class of its result.
        section: field of the config that holds the settings of all jobs; None where the config itself has them.
        claims: False for a job that locks parts of its folder itself.
        has_flow: False for a job that is always called directly.
        is_temporary: True for a job that needs no folder of its own.

    Returns:
        A decorator. It takes the order of work and returns the job as a function of shards, `out` and settings.

    Raises:
        TypeError: name or config belong to another job, or the settings of all jobs are missing.
    """
    base = config if section is None else _class_of(config, section)
    if not issubclass(base, JobConfig):
        raise TypeError(f"{config.__name__} is no JobConfig: name the section that has the settings of all jobs")

    def settings_of(given: C) -> JobConfig:
        return given if section is None else getattr(given, section)  # type: ignore[return-value]

    def declare(function: Order[C]) -> JobFunction[R]:
        name = function.__name__
        if name in JOBS or any(known.config is config for known in JOBS.values()):
            raise TypeError(f"there is a job {name}, or one of {config.__name__}, already")
        call = _callable(function, config, result, section)
        reads = issubclass(base, ShardsConfig)
        CONFIGS[name] = config
        declared = JOBS[name] = Job(function, config, settings_of, reads, claims, has_flow, is_temporary, call, result)
        call.__doc__, call.__signature__ = _doc(declared), _signature(declared)  # type: ignore[attr-defined]
        return call

    return declare


def _class_of(config: type[BaseModel], section: str) -> type:
    field = config.model_fields.get(section)
    return field.annotation if field is not None and isinstance(field.annotation, type) else object


def job_of(config: BaseModel) -> Job:
    """The job that takes a config of this class. Raises TypeError where there is none."""
    for known in JOBS.values():
        if type(config) is known.config:
            return known
    raise TypeError(f"no job takes a {type(config).__name__}")


def run_job(config: BaseModel, out: str | Path | None = None) -> dict[str, Any]:
    """Run the job that takes this config, with plain function calls.

    Args:
        config: the config of a job.
        out: path or URL of the run folder; of the store for `ingest`. None takes a temporary folder where the job needs
            no other.

    Returns:
        The summary of the run: counts and places.

    Raises:
        SanitizeError: an error of a stage; ArtifactError if another process works in `out`.
    """
    found = job_of(config)
    settings = found.settings(config)
    # Groups run one after another here, so None means one.
    n_groups = settings.n_groups or 1 if isinstance(settings, ShardsConfig) else 1
    with found.claim(settings, out) as folder:
        return found.function(config, Run(folder, settings.compute, n_groups))


# --- a job as a Python function ------------------------------------------------------------------------------------


def _callable(function: Order[C], kind: type[C], result: type[R], section: str | None) -> JobFunction[R]:
    def call(
        shards: Sources | None = None,
        *,
        out: str | Path | None = None,
        config: ConfigSource | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> R:
        if shards is not None:
            several = [shards] if isinstance(shards, str | Path) else shards
            given: dict[str, Any] = {"shards": [str(place) for place in several]}
            settings = merged(settings, given if section is None else {section: given})
        checked = config_from(kind, config, settings)
        with shown() if progress else nullcontext():
            summary = run_job(checked, out)
        return rank0_first(lambda: result.after(out or "", summary))

    call.__name__, call.__qualname__, call.__module__ = function.__name__, function.__qualname__, function.__module__
    return call


class _Shown(NamedTuple):
    """A default as `help` shows it."""

    text: str

    def __repr__(self) -> str:
        return self.text


def _signature(job: Job) -> Signature:
    """Arguments of a job: those of all jobs, then the fields of its config."""
    shards, out, *common, _ = Signature.from_callable(job.call).parameters.values()
    needed = out.replace(default=Parameter.empty, annotation=str | Path)
    first = [*([shards] if job.reads_shards else []), out if job.is_temporary else needed]
    fields = {name: field for name, field in job.config.model_fields.items() if name != "shards"}
    settings = [Parameter(name, Parameter.KEYWORD_ONLY, default=_default(field)) for name, field in fields.items()]
    return Signature([*first, *common, *settings], return_annotation=job.result)


def _default(field: FieldInfo) -> Any:
    """The default of a field; "..." where there is none, for `config` may have it, and sections by their class."""
    if field.is_required():
        return _Shown("...")
    value = field.get_default(call_default_factory=True, validated_data={})
    section = value[0] if isinstance(value, tuple) and value else value
    if not isinstance(section, BaseModel):
        return value
    name = f"{type(section).__name__}()"
    return _Shown(name if section is value else f"({name},)")


def _doc(job: Job) -> str:
    """Docstring of a job as a function: its first lines, its settings, its result."""
    kind, result = job.config, job.result
    first, _, _ = (getdoc(job.function) or "").partition("\n\nReturns:")
    settings = {names: text for config in _configs(kind) for names, text in _attributes(config).items()}
    shards = settings.pop("shards", "directories, globs, brace ranges or URLs of .tar / .tar.gz shards.")
    again = "given again, the job resumes where it was interrupted"
    common = {"shards": shards} if job.reads_shards else {}
    common |= {
        "out": f"path or URL of the {result.place}; {'None takes a temporary one' if job.is_temporary else again}.",
        "config": f"{kind.__name__} object, dict, or path or URL of a YAML file; the other arguments have precedence.",
        "progress": "True shows progress on stderr.",
    }
    entries = "\n".join(f"    {names}: {text}" for names, text in (common | settings).items())
    place = f"{kind.__module__}.{kind.__name__}"
    sections = f"Sections (`compute`, ...) are config objects or dicts; `{place}` has all settings."
    later = "" if job.is_temporary else f"; `{result.__name__}.open(out)` opens it again later"
    returns = f"Returns:\n    {result.__name__}{later}."
    raises = "Raises:\n    SanitizeError: a setting is wrong (ConfigError), or an error of a stage."
    return f"{first}\n\n{sections}\n\nArgs:\n{entries}\n\n{returns}\n\n{raises}\n"


def _configs(kind: type[BaseModel]) -> list[type[BaseModel]]:
    """The class and its bases, the most general first."""
    return [base for base in reversed(kind.__mro__) if issubclass(base, BaseModel) and base is not BaseModel]


def _attributes(config: type) -> dict[str, str]:
    """Entries of "Attributes:" in the docstring of a class itself; names -> text."""
    doc = getdoc(config) if config.__doc__ else ""
    _, _, section = (doc or "").partition("Attributes:\n")
    entries = re.findall(r"^    ([\w, ]+): (.*(?:\n {8}.*)*)", section.partition("\n\n")[0], re.MULTILINE)
    return dict(entries)
