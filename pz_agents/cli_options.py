"""What several commands of ``pz-agents`` share: ``--set``, ``--json`` and how Ctrl-C ends them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer

Assignments = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="A setting; dots go deeper.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Make Ctrl-C exit 130 and SIGTERM 143, each after what it interrupts has saved its state."""
    from pz_agents.interrupt import exit_status, sigterm_raises

    try:
        with sigterm_raises():
            yield
    except KeyboardInterrupt as stopped:
        raise typer.Exit(exit_status(stopped)) from None


def assign(values: dict[str, Any], assignment: str) -> None:
    """Set ``a.b=value`` in ``values``; the value is read as YAML, so 1e-4 and [1, 2] work."""
    import yaml

    from pz_envs.errors import ConfigError

    key, equals, text = assignment.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"a setting is KEY=VALUE, e.g. --set group_size=16; got `{assignment}`")
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {assignment}: `{parent}` is a single value")
        values = inner
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {assignment}: not a YAML value ({error})") from error
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    values[last] = value
