"""A config from what a Python caller gives: a config object, a dict or a YAML file, and settings by name over it."""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from sanitize.errors import ConfigError
from sanitize.storage import read_bytes

C = TypeVar("C", bound=BaseModel)
Sources = str | Path | Sequence[str | Path]
ConfigSource = BaseModel | Mapping[str, Any] | str | Path


def config_from(kind: type[C], config: ConfigSource | None, settings: Mapping[str, Any]) -> C:
    """A config of class `kind`.

    Args:
        kind: class of the config.
        config: a config of that class, a dict, or path or URL of a YAML file; None starts from the defaults.
        settings: fields of the config; they have precedence over `config`. Mappings are merged section by section,
            everything else replaces what `config` has.

    Raises:
        ConfigError: a setting is unknown, missing or wrong, or the file is no YAML mapping.
    """
    given = merged(_fields(kind, config), settings)
    try:
        return kind.model_validate({name: _plain(kind, name, value) for name, value in given.items()})
    except ValidationError as error:
        raise ConfigError("; ".join(problems(kind, error))) from None


def problems(kind: type[BaseModel], error: ValidationError) -> list[str]:
    """One line for each wrong setting; an unknown one comes with the nearest known name."""
    lines = []
    for problem in error.errors(include_url=False):
        *above, name = problem["loc"] or ("config",)
        line = f"{'.'.join(map(str, (*above, name)))}: {problem['msg']}"
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(name), known_names(kind, above), n=1, cutoff=0.5)
            line += f" (nearest name: {near[0]})" if near else ""
        lines.append(line)
    return lines


def known_names(kind: type[BaseModel], place: Sequence[str | int]) -> list[str]:
    """Names of the settings in a section of a config.

    Args:
        kind: class of the config.
        place: location of the section as pydantic reports it, with the kinds of unions and the numbers of list items.
    """
    sections = {kind}
    for part in place:
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        if fields:
            sections = {model for field in fields for model in _models(field.annotation)}
        else:  # the kind of a union narrows the choice, the number of an item does not
            sections = {model for model in sections if part in _kinds(model)} or sections
    return sorted({name for section in sections for name in section.model_fields})


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two sets of settings; `above` has precedence, and mappings of the same kind are merged."""
    result = dict(below)
    for name, value in above.items():
        old = result.get(name)
        section = _fields(type(old), old) if isinstance(old, BaseModel) else old
        if isinstance(section, Mapping) and isinstance(value, Mapping):
            is_same = value.get("kind", section.get("kind")) == section.get("kind")
            result[name] = merged(section, value) if is_same else value
        else:
            result[name] = value
    return result


def _fields(kind: type[BaseModel], config: ConfigSource | None) -> dict[str, Any]:
    """Settings that a config, a dict or a YAML file has."""
    if config is None:
        return {}
    if isinstance(config, BaseModel):
        if not isinstance(config, kind):
            raise ConfigError(f"config is a {type(config).__name__}; give a {kind.__name__}, a dict or a YAML file")
        given = config.model_fields_set | ({"kind"} & type(config).model_fields.keys())  # the kind names the class
        return {name: getattr(config, name) for name in type(config).model_fields if name in given}
    if isinstance(config, Mapping):
        return dict(config)
    try:
        content = yaml.safe_load(read_bytes(os.fspath(config)))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {config}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{config} must be a YAML mapping; see configs/ for examples")
    return content


def _plain(kind: type[BaseModel], name: str, value: Any) -> Any:
    """Paths as strings; one string where a field takes several."""
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, list | tuple):
        value = tuple(str(item) if isinstance(item, Path) else item for item in value)
    field = kind.model_fields.get(name)
    takes_several = field is not None and field.annotation == tuple[str, ...]
    return (value,) if takes_several and isinstance(value, str) else value


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Configs named in an annotation."""
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("kind")
    is_literal = field is not None and get_origin(field.annotation) is Literal
    return get_args(field.annotation) if field is not None and is_literal else ()
