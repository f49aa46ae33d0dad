"""User configuration: frozen pydantic models that refuse unknown keys by naming the nearest one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import pydantic

from pz_envs.errors import ConfigError, did_you_mean


class Settings(pydantic.BaseModel):
    """Base of every user-facing configuration model."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )


AnySettings = TypeVar("AnySettings", bound=Settings)


def parse_settings(kind: type[AnySettings], values: Mapping[str, Any], source: str) -> AnySettings:
    """Check ``values`` against ``kind``.

    Args:
        kind: the settings model.
        values: what was read.
        source: where from, for the message (a path, or ``"--set"``).

    Raises:
        ConfigError: one line a problem, each with its path, value and what is allowed.
    """
    try:
        return kind.model_validate(dict(values))
    except pydantic.ValidationError as error:
        problems = error.errors()
        broken = [each["loc"] for each in problems]
        # A list with a broken part is also reported as too short, by what is left without it.
        lines = [
            _explain(kind, each)
            for each in problems
            if each["type"] != "too_short"
            or not any(loc[: len(each["loc"])] == each["loc"] != loc for loc in broken)
        ]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def _explain(kind: type[Settings], problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = list(_fields_at(kind, problem["loc"][:-1]))
        hint = did_you_mean(str(problem["loc"][-1]), known)
        return f"unknown key `{path}`.{hint} Known: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"`{path}` is missing; give it a value"
    said = problem["msg"].removeprefix("Value error, ")
    return f"`{path}`: {said} (got {problem['input']!r})"


def _fields_at(kind: type[Settings], path: tuple[int | str, ...]) -> list[str]:
    """Return the field names of the model found by walking ``path`` from ``kind``."""
    current: Any = kind
    for part in path:
        if isinstance(part, int) or not hasattr(current, "model_fields"):
            continue
        if part not in current.model_fields:
            continue
        current = _model_in(current.model_fields[part].annotation)
    return list(getattr(current, "model_fields", {}))


def _model_in(annotation: Any) -> Any:
    """Return the settings model inside an annotation such as ``tuple[Model, ...] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_in(argument)
        if found is not None:
            return found
    return None
