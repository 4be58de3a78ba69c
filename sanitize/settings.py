"""Configs from settings: of a Python caller (`config_from`), and of a command (`make_config`): a YAML file, over it
short options, over them `--set a.b.c=value`.

A path names a setting from the root of the file: `scorers.0.kind`, `embedder.optim.epochs`. In commands, a section that
is left out starts as its default. Unknown names are refused, with the nearest known one.
"""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from sanitize.errors import ConfigError
from sanitize.storage import read_bytes

C = TypeVar("C", bound=BaseModel)
Sources = str | Path | Sequence[str | Path]
ConfigSource = BaseModel | Mapping[str, Any] | str | Path


class WrongSettings(ConfigError):
    """Settings that a config class refuses.

    Attributes:
        problems: one line for each, beginning with its path.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def config_from(kind: type[C], config: ConfigSource | None, settings: Mapping[str, Any]) -> C:
    """A checked config, from Python arguments.

    Args:
        kind: class of the config.
        config: a config of that class or of a class that it extends, a dict, or path or URL of a YAML file; None starts
            from the defaults.
        settings: fields of the config; they have precedence over `config`. Mappings are merged section by section,
            everything else replaces what `config` has.

    Raises:
        WrongSettings: a setting is unknown, missing or wrong.
        ConfigError: the file is no YAML mapping, or `config` is of another class.
    """
    given = merged(_given(kind, config), settings)
    checked: C = _checked(kind, {name: _without_paths(kind, name, value) for name, value in given.items()})
    return checked


def make_config(
    kind: Any,
    settings: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
    flags: Mapping[str, str] | None = None,
) -> Any:
    """A checked config, from a YAML file, options and assignments.

    Args:
        kind: the config class, or a union of config classes.
        settings: settings of a YAML file; not changed.
        options: path -> value of short options, which go over `settings`.
        assignments: values of `--set`, PATH=VALUE with the value in YAML; these go over `options`.
        flags: path -> short option, for messages about settings that are missing.

    Raises:
        WrongSettings: the config class refuses the settings.
        ConfigError: an assignment cannot be read, or its path leads below a value.
    """
    changed = dict(settings)
    for path, value in (options or {}).items():
        changed = change(changed, path, value, kind)
    # From the outside in: a section as a whole, then its `kind`, then what is in it; otherwise the later one wins.
    parsed = [_parse(text) for text in assignments]
    for path, value in sorted(parsed, key=lambda one: (one[0].count("."), not one[0].endswith(".kind"))):
        changed = change(changed, path, value, kind)
    return _checked(kind, changed, flags)


def _checked(kind: Any, settings: dict[str, Any], flags: Mapping[str, str] | None = None) -> Any:
    try:
        return TypeAdapter(kind).validate_python(_with_sections(settings, kind))
    except ValidationError as error:
        raise WrongSettings(problems_of(error, kind, flags)) from None


def read_yaml(place: str | Path) -> dict[str, Any]:
    """Content of a YAML file; a path or a URL. Raises ConfigError where the file cannot be read or is no mapping."""
    try:
        content = yaml.safe_load(read_bytes(os.fspath(place)))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {place}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{place} must be a YAML mapping; see configs/ for examples")
    return content


def _given(kind: type[BaseModel], config: ConfigSource | None) -> dict[str, Any]:
    """Settings that a config, a dict or a YAML file has."""
    if config is None:
        return {}
    if isinstance(config, BaseModel):
        if not isinstance(config, kind) and not issubclass(kind, type(config)):  # one of a base class has a part
            raise ConfigError(f"config is a {type(config).__name__}; give a {kind.__name__}, a dict or a YAML file")
        return _fields(config)
    return dict(config) if isinstance(config, Mapping) else read_yaml(config)


def _fields(config: BaseModel) -> dict[str, Any]:
    """Settings of a config that were given, and its kind, which names its class."""
    fields = type(config).model_fields
    given = config.model_fields_set | ({"kind"} & fields.keys())
    return {name: getattr(config, name) for name in fields if name in given}


def _without_paths(kind: type[BaseModel], name: str, value: Any) -> Any:
    """Paths as strings; one string where a field takes several."""
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, list | tuple):
        value = tuple(str(item) if isinstance(item, Path) else item for item in value)
    field = kind.model_fields.get(name)
    takes_several = field is not None and field.annotation == tuple[str, ...]
    return (value,) if takes_several and isinstance(value, str) else value


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two sets of settings; `above` has precedence, and mappings of the same kind are merged."""
    result = dict(below)
    for name, value in above.items():
        old = result.get(name)
        section = _fields(old) if isinstance(old, BaseModel) else old
        if isinstance(section, Mapping) and isinstance(value, Mapping):
            is_same = value.get("kind", section.get("kind")) == section.get("kind")
            result[name] = merged(section, value) if is_same else value
        else:
            result[name] = value
    return result


def change(settings: dict[str, Any], path: str, value: Any, kind: Any) -> dict[str, Any]:
    """A copy of `settings` with one setting changed; `kind` is their config class, or a union of config classes."""
    changed: dict[str, Any] = _changed(settings, path.split("."), value, kind, path)
    return changed


def plain(value: Any) -> Any:
    """A value as a YAML file would hold it; of a config, the settings that were given, and its kind."""
    if isinstance(value, BaseModel):
        return {name: plain(one) for name, one in _fields(value).items()}
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def _parse(assignment: str) -> tuple[str, Any]:
    path, is_assignment, text = assignment.partition("=")
    path = path.strip()
    if not is_assignment or not all(path.split(".")):
        raise ConfigError(f"--set {assignment}: give it as PATH=VALUE, such as select.verdict=all")
    try:
        return path, yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"--set {assignment}: the value is not valid YAML ({reason}); quote it as 'PATH=\"VALUE\"'"
        ) from error


def _changed(value: Any, names: Sequence[str], new: Any, annotation: Any, path: str) -> Any:
    """A copy of `value` with the setting at `names` replaced; `path` is the whole path, for messages."""
    if not names:
        return new
    name, *rest = names
    value = {} if value is None else value
    if isinstance(value, list | tuple):
        if not name.isdecimal() or int(name) > len(value):
            raise ConfigError(f"{path}: {name} is no index of a list of {len(value)}; indices start at 0")
        i = int(name)
        old = value[i] if i < len(value) else None
        return [*value[:i], _changed(old, rest, new, _element(annotation), path), *value[i + 1 :]]
    if not isinstance(value, dict):
        where = ".".join(path.split(".")[: -len(names)])
        raise ConfigError(f"{path}: {where} is {value!r}, which has no settings of its own; set {where} as a whole")
    if name == "kind" and not rest and len(_sections(annotation)) > 1 and value.get("kind", new) != new:
        return {"kind": new}  # the other settings are those of another kind
    default, below = _field(annotation, value, name)
    old = default if value.get(name) is None else value[name]
    return value | {name: _changed(old, rest, new, below, path)}


def _with_sections(settings: dict[str, Any], kind: Any) -> dict[str, Any]:
    """The settings with an empty section for each required one that is missing: messages then name its settings."""
    fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
    needed = [name for name, field in fields.items() if field.is_required() and _sections(field.annotation)]
    return {name: {} for name in needed} | settings


# --- fields of config classes ------------------------------------------------------------------------------------


def _types(annotation: Any) -> list[Any]:
    """Types that a value may have, without None."""
    if get_origin(annotation) is Annotated:
        return _types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [one for part in get_args(annotation) for one in _types(part)]
    return [] if annotation is type(None) else [annotation]


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Config classes that a value may have; `kind` distinguishes several."""
    return [one for one in _types(annotation) if isinstance(one, type) and issubclass(one, BaseModel)]


def _kinds(section: type[BaseModel]) -> tuple[Any, ...]:
    field = section.model_fields.get("kind")
    return get_args(field.annotation) if field else ()


def _field(annotation: Any, value: dict[str, Any], name: str) -> tuple[Any, Any]:
    """Default of a setting, if it is a section or a list, as a YAML file would hold it; and type of the setting."""
    sections = _sections(annotation)
    if len(sections) > 1 and "kind" in value:  # without it, the first one is meant
        sections = [one for one in sections if value["kind"] in _kinds(one)]
    if sections and name in sections[0].model_fields:
        field = sections[0].model_fields[name]
        default = None if field.is_required() else plain(field.get_default(call_default_factory=True))
        return default if isinstance(default, dict | list) else None, field.annotation
    return None, _element(annotation)


def _element(annotation: Any) -> Any:
    """Type of the entries of a list, tuple or mapping; None for other types."""
    for one in _types(annotation):
        if get_origin(one) in (list, tuple):
            return get_args(one)[0]
        if get_origin(one) is dict:
            return get_args(one)[1]
    return None


def _is_mapping(annotation: Any) -> bool:
    return any(get_origin(one) is dict for one in _types(annotation))


def paths_of(kind: Any, above: str = "", depth: int = 6) -> Iterator[str]:
    """All paths of settings, those of a section before what is below; `0` and `NAME` stand for any entry."""
    named = {name: field.annotation for section in _sections(kind) for name, field in section.model_fields.items()}
    yield from (above + name for name in named)
    if depth:
        for name, annotation in named.items():
            element = _element(annotation)
            step = "." if element is None else ".NAME." if _is_mapping(annotation) else ".0."
            yield from paths_of(annotation if element is None else element, above + name + step, depth - 1)


# --- messages ----------------------------------------------------------------------------------------------------


def problems_of(error: ValidationError, kind: Any = None, flags: Mapping[str, str] | None = None) -> list[str]:
    """One line for each error of a config class: path, what is wrong, what to do."""
    problems = error.errors()
    inner = {problem["loc"][:depth] for problem in problems for depth in range(len(problem["loc"]))}
    # A list whose entries are wrong is also reported as too short.
    return [_problem(dict(problem), kind, flags or {}) for problem in problems if problem["loc"] not in inner]


def _problem(problem: dict[str, Any], kind: Any, flags: Mapping[str, str]) -> str:
    names, annotation = _place(problem["loc"], kind)
    path = ".".join(names)
    match problem["type"]:
        case "extra_forbidden":
            return f"{path}: there is no such setting; {_nearest(names, annotation, kind)}"
        case "missing" | "too_short" if path in flags:
            return f"no {names[-1].replace('_', ' ')}: give {flags[path]}, or `{path}:` in the YAML file"
        case "union_tag_not_found" | "union_tag_invalid":
            kinds = [str(one) for section in _sections(annotation) for one in _kinds(section)]
            tag = problem["ctx"].get("tag")
            close = difflib.get_close_matches(str(tag), kinds, n=1)
            what = "missing" if tag is None else f"{tag} is unknown" + (f"; nearest: {close[0]}" if close else "")
            return f"{'.'.join([*names, 'kind'])}: {what}; kinds: {', '.join(kinds)}"
        case "missing":
            return f"{path}: missing"
        case "string_type":
            return f"{path}: {problem['input']!r} is no text; in YAML, put it in quotes"
    message = problem["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
    return f"{path}: {message}" if path else message


def _place(loc: Sequence[int | str], kind: Any) -> tuple[list[str], Any]:
    """Path of an error, and type of the section that holds the setting; of the setting itself if it is a union.

    Pydantic's locations also have a step for the member of a union, which no path has.
    """
    names: list[str] = []
    annotation = section = kind
    for step in loc:
        sections = _sections(annotation)
        if len(sections) > 1 and (into := [one for one in sections if step in _kinds(one)]):
            annotation = into[0]
        elif isinstance(step, int):
            names.append(str(step))
            annotation, section = _element(annotation), annotation
        elif sections or annotation is None or _is_mapping(annotation):
            names.append(step)
            field = sections[0].model_fields.get(step) if sections else None
            annotation, section = (field.annotation if field else _element(annotation)), annotation
    return names, annotation if len(_sections(annotation)) > 1 else section


def _nearest(names: Sequence[str], section: Any, kind: Any) -> str:
    """Hint for an unknown setting: that another kind has it, the nearest name in its section, the same name elsewhere,
    or all names there."""
    *above, name = names
    if ".".join(names) in paths_of(kind):  # the section has several kinds, and the one that was chosen lacks it
        return f"another `kind` of {'.'.join(above)} has it"
    there = [one for part in _sections(section)[:1] for one in part.model_fields]
    if close := difflib.get_close_matches(name, there, n=1):
        return f"nearest: {'.'.join([*above, close[0]])}"
    if same := [path for path in paths_of(kind) if path.rpartition(".")[2] == name]:
        return f"nearest: {same[0]}"
    return f"settings: {', '.join(there)}" if there else "see configs/ and docs/"
