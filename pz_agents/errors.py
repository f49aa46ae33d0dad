"""Errors of this floor, beside those of ``pz_envs.errors``."""

from __future__ import annotations

from pz_envs.errors import ConfigError, InfraError, PzError


class AgentError(PzError):
    """An agent could not be loaded or broke its contract."""


class ModelError(PzError):
    """A language model could not be loaded, or failed to answer."""


class FailureBudgetError(InfraError):
    """So many episodes failed that the run is broken."""


class EngineMissing(ModelError):
    """An inference engine that was demanded is not installed; the command line exits 3."""


class WrongModelError(ModelError, ConfigError):
    """A model's name stands for none, or for one that cannot be used here."""


class WrongAgentError(AgentError, ConfigError):
    """An agent's name, or its arguments, stand for none."""
