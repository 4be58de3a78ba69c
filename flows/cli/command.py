"""Commands that run a job: what each takes is declared, and the rest is the same for all.

    @job_command(
        Option("--dims", int, "denoise.dims", "Number of principal components to keep."),
        out="runs/denoise",
    )
    def denoise(result: dict[str, Any], out: str) -> None:
        \"\"\"Help of the command.\"\"\"
        print_places(result)

declares `sanitize denoise`, which runs the job `denoise` of `sanitize.jobs`. An option is one setting of the job's
config, named by its path. The function shows the result; its docstring is the help. The YAML file, `--shards`, `--out`,
`--set`, `--direct`, `--seed`, `--device`, `--json` and `--quiet` come with every command that has a use for them.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Annotated, Any, NamedTuple

import typer

from flows.cli.app import (
    SHARDS_HELP,
    AsJson,
    ConfigFile,
    ConfigOption,
    Direct,
    Out,
    Quiet,
    RunFolder,
    Set,
    bars,
    errors,
    print_json,
)
from sanitize.settings import make_config, read_yaml

REQUIRED = Parameter.empty


class Option(NamedTuple):
    """An option of a command.

    Attributes:
        flag: "--n-images"; a name without dashes is an argument.
        type: type of the value; `list[str]` may be given several times.
        path: path of the setting; "" where `prepare` makes settings of the option.
        help: one or two sentences.
        default: shown in the help; None leaves the setting alone, REQUIRED makes an argument that must be given.
    """

    flag: str
    type: Any
    path: str
    help: str
    default: Any = None

    @property
    def name(self) -> str:
        """Name of the value among those of the command."""
        return self.flag.strip("-").replace("-", "_")

    def inside(self, section: str) -> "Option":
        """The same of a job that has its settings in a section of its config."""
        return self._replace(path=f"{section}.{self.path}")

    def parameter(self) -> tuple[Any, Any]:
        """Annotation and default of the parameter that typer makes it of."""
        is_option = self.flag.startswith("--")
        info = typer.Option(self.flag, help=self.help) if is_option else typer.Argument(help=self.help)
        if self.type is bool:
            return Annotated[bool, info], False
        if self.default is not None:
            return Annotated[self.type, info], self.default
        return Annotated[self.type | None, info], None


SHARDS = Option("--shards", list[str], "shards", SHARDS_HELP)
SEED = Option("--seed", int, "compute.seed", "Seed of every random choice (default 0).")
DEVICE = Option("--device", str, "compute.device", "cpu, cuda, cuda:N, or auto (default).")
MODEL = Option("model", str, "model", "A model package, or a run folder of `sanitize train`.", REQUIRED)
ALLOW_FACTORY = Option(
    "--allow-factory",
    bool,
    "allow_factory",
    "Run the function that a model of kind `factory` names, if an installed package holds it. Only for models from "
    "sources that you trust.",
)
COMMON = (SHARDS, SEED, DEVICE)

Settings = dict[str, Any]
Values = dict[str, Any]  # of all options, by name
Result = dict[str, Any]


@dataclass(frozen=True)
class JobCommand:
    """A declared command; the attributes are those of `job_command`."""

    name: str
    show: Callable[[Result, str], None]
    options: tuple[Option, ...]
    common: tuple[Option, ...]
    out: Any
    has_flow: bool
    prepare: Callable[[Settings, Values], Settings]
    exit_code: Callable[[Result], int]
    torchrun: bool

    def config(self, kind: Any, values: Values) -> Any:
        """The job's config of class `kind`, given the values of all options. Raises ConfigError."""
        settings = self.prepare(read_yaml(values["config"]) if values["config"] else {}, values)
        declared = (*self.common, *self.options)
        options = chosen(declared, values)
        flags = {one.path: one.flag if one.flag.startswith("--") else one.flag.upper() for one in declared}
        return make_config(kind, settings, options, values["set_"] or (), flags)

    def run(self, values: Values) -> None:
        """Run the job and show its result."""
        from flows.start import start
        from sanitize.distributed import joined, world
        from sanitize.jobs import JOBS

        job, out = JOBS[self.name], values.get("out")
        with errors():
            config = self.config(job.config, values)
            with joined(job.settings(config).compute) if self.torchrun else nullcontext():
                is_first = world()[0] == 0
                with bars(values["quiet"] or not is_first):
                    result = start(config, out, values.get("direct", True))
        if not is_first:
            return
        code = self.exit_code(result)
        if values["as_json"]:
            print_json(result)
        else:
            self.show(result, out or "")
        if code:
            raise typer.Exit(code)

    def parameters(self) -> dict[str, tuple[Any, Any]]:
        """Name -> annotation and default of each parameter of the function that typer makes a command of."""
        shards = [one for one in self.common if one.name == "shards"]
        numerics = [one for one in self.common if one.name != "shards"]
        arguments = [one for one in self.options if not one.flag.startswith("--")]
        others = [one for one in self.options if one not in arguments]
        out = (Out, self.out) if isinstance(self.out, str) else (self.out, Parameter.empty)
        is_first = self.out is RunFolder
        places = {} if self.out is None else {"out": out}
        return {
            **(places if is_first else {}),
            **{one.name: one.parameter() for one in arguments},
            "config": (ConfigOption if arguments or is_first else ConfigFile, None),
            **{one.name: one.parameter() for one in (*shards, *others)},
            **({} if is_first else places),
            "set_": (Set, None),
            **({"direct": (Direct, False)} if self.has_flow else {}),
            **{one.name: one.parameter() for one in numerics},
            "as_json": (AsJson, False),
            "quiet": (Quiet, False),
        }


def chosen(options: Sequence[Option], values: Values) -> Settings:
    """Path -> value of the options that were given and are one setting."""
    given = {one.path: values[one.name] for one in options if one.path}
    return {path: value for path, value in given.items() if value is not None and value is not False and value != []}


COMMANDS: dict[str, JobCommand] = {}


def job_command(
    *options: Option,
    out: Any,
    has_flow: bool = True,
    common: Sequence[Option] = COMMON,
    prepare: Callable[[Settings, Values], Settings] = lambda settings, _values: settings,
    exit_code: Callable[[Result], int] = lambda _result: 0,
    torchrun: bool = False,
) -> Callable[[Callable[[Result, str], None]], Callable[..., None]]:
    """Declare a command; the decorated function has the name of the job and shows its result, given the run folder.

    Args:
        options: options of this command alone.
        out: default run folder; `Store` or `RunFolder`, which must be given; None where the job needs no folder.
        has_flow: False where the job is no flow of Prefect, and so needs no `--direct`.
        common: those of `--shards`, `--seed` and `--device` that the job has.
        prepare: takes the settings of the file and the values of all options; returns settings. For options that are
            not one setting.
        exit_code: exit code of a result.
        torchrun: True for a job that several processes share.

    Returns:
        A function that typer makes the command of.
    """

    def declare(show: Callable[[Result, str], None]) -> Callable[..., None]:
        name = show.__name__
        command = JobCommand(name, show, options, tuple(common), out, has_flow, prepare, exit_code, torchrun)
        COMMANDS[name] = command

        def function(**values: Any) -> None:
            command.run(values)

        function.__name__, function.__doc__ = name, show.__doc__
        function.__signature__ = Signature(  # type: ignore[attr-defined]  # typer reads it
            [
                Parameter(name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
                for name, (annotation, default) in command.parameters().items()
            ]
        )
        return function

    return declare
