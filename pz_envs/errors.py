"""The error tree, by boundary, and the sentence helpers every error uses.

An error says what failed, the value it got, what is allowed, and the next command.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class PzError(Exception):
    """Base of every error that pz raises on purpose."""


class ConfigError(PzError):
    """A setting, name or command-line value is wrong."""


class DataError(PzError):
    """A data file is missing, corrupt, or not the file it should be."""


class EnvError(PzError):
    """An environment was used wrongly or its engine failed."""


class InfraError(PzError):
    """The machine failed: a process died, a lock is held, a disk is full."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return `` Did you mean `x`?`` for the choice nearest to ``name``, or an empty string."""
    nearest = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f" Did you mean `{nearest[0]}`?" if nearest else ""


def require(module: str, install: str) -> ModuleType:
    """Import an optional dependency where it is used.

    Args:
        module: dotted module name, e.g. ``"jericho"``.
        install: what to give ``pip install``, e.g. ``"pz-envs[jericho]"``.

    Raises:
        ConfigError: the module is not installed; the message is the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        message = f"`{module}` is not installed. Install it: pip install '{install}'"
        raise ConfigError(message) from error
