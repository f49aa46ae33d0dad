"""Text environments of LLM-agent research behind Gymnasium; importing registers ``pz/...`` ids.

``gymnasium.make("pz/Zork1-v0")`` works once this package is imported, and
``gymnasium.make("pz_envs:pz/Zork1-v0")`` imports it by itself. Importing starts nothing, downloads
nothing and loads no engine.
"""

from pz_envs.catalog import EnvRow, find, make_env, missing, register_all, rows
from pz_envs.errors import ConfigError, DataError, EnvError, InfraError, PzError
from pz_envs.families import FAMILIES, Family
from pz_envs.textenv import INFO_KEYS, Info, Outcome, Snapshot, TextEnv, TextSpace, text_env

__all__ = [
    "FAMILIES",
    "INFO_KEYS",
    "ConfigError",
    "DataError",
    "EnvError",
    "EnvRow",
    "Family",
    "Info",
    "InfraError",
    "Outcome",
    "PzError",
    "Snapshot",
    "TextEnv",
    "TextSpace",
    "find",
    "make_env",
    "missing",
    "register_all",
    "rows",
    "text_env",
]

register_all()
