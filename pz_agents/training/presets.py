"""Presets: settings that go together, composed from layers, so that no file per combination is.

``presets.toml`` holds them by layer. A run takes at most one a layer; later layers win over
earlier ones, a configuration file over presets, and the command line over all.
"""

from __future__ import annotations

import functools
import json
import tomllib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pz_envs.errors import ConfigError, did_you_mean

LAYERS = ("base", "env", "algorithm", "model", "hardware")
NONE = "none"
"""As the only preset name: take no preset, not even a matching one."""

_TOGETHER = "together"


def presets() -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """Return every layer's presets by name, ``match`` included."""
    return {layer: _table()[layer] for layer in LAYERS}


def preset_names(text: str) -> list[str]:
    """Return the single presets that ``text``, names with commas between, stands for.

    Raises:
        ConfigError: there is no preset of a name, or two are of one layer.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == [NONE]:
        return []
    single: list[str] = []
    for name in names:
        single += _table()[_TOGETHER].get(name, [name])
    taken: dict[str, str] = {}
    for name in single:
        layer = _layer_of(name)
        if layer in taken:
            raise ConfigError(
                f"presets `{taken[layer]}` and `{name}` are both of the layer {layer}; take one"
            )
        taken[layer] = name
    return [taken[layer] for layer in LAYERS if layer in taken]


def compose(names: Iterable[str]) -> dict[str, Any]:
    """Return the settings of several presets, later layers over earlier ones."""
    values: dict[str, Any] = {}
    for layer in LAYERS:
        for name in names:
            if _layer_of(name) == layer:
                preset = {k: v for k, v in _table()[layer][name].items() if k != "match"}
                values = merged(values, preset)
    return values


def resolve(*given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the presets that are named, or that match, filled in.

    ``preset`` in the result says which. A layer of which none is named takes the one that matches
    the environment, the algorithm or the model. Mappings such as ``options`` are merged.

    Args:
        given: settings, later ones over earlier ones, e.g. those of a file and of the flags.

    Raises:
        ConfigError: a preset does not exist.
    """
    values: dict[str, Any] = {}
    for each in given:
        values = merged(values, each)
    text = str(values.get("preset") or "")
    names = preset_names(text)
    if text != NONE:
        named = {_layer_of(name) for name in names}
        known = merged(compose(names), values)
        for layer in LAYERS:
            if layer not in named:
                names += _matching(layer, known)
        names.sort(key=lambda name: LAYERS.index(_layer_of(name)))
    values["preset"] = ",".join(names)
    preset = compose(names)
    if values.get("epochs") is not None:
        preset.pop("steps", None)
    return merged(preset, values)


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings in a TOML, YAML or JSON file, by its suffix.

    Raises:
        ConfigError: there is no such file, or it is no table of settings.
    """
    import yaml

    try:
        text = path.read_text("utf-8")
        if path.suffix == ".toml":
            values: Any = tomllib.loads(text)
        elif path.suffix == ".json":
            values = json.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            values = yaml.load(text, _loader())
        else:
            raise ConfigError(f"{path}: a configuration is .toml, .yaml, .yml or .json")
    except OSError as error:
        raise ConfigError(f"no configuration in {path}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be KEY: VALUE lines; it holds a {type(values).__name__}")
    return values


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``under`` with ``over``'s values, mappings merged key by key."""
    values = dict(under)
    for key, value in over.items():
        old = values.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        values[key] = merged(old, value) if both else value  # type: ignore[arg-type]
    return values


@functools.cache
def _table() -> Mapping[str, Any]:
    text = Path(__file__).with_name("presets.toml").read_text("utf-8")
    return tomllib.loads(text)


def _layer_of(name: str) -> str:
    for layer in LAYERS:
        if name in _table()[layer]:
            return layer
    known = [*_table()[_TOGETHER], *(name for layer in LAYERS for name in _table()[layer])]
    raise ConfigError(f"No preset `{name}`.{did_you_mean(name, known)} Known: {', '.join(known)}")


def _matching(layer: str, values: Mapping[str, Any]) -> list[str]:
    """Return the first preset of a layer that matches what was given; none or one name."""
    if layer == "base":
        subjects = [""]
    elif layer == "env":
        subjects = [str(values.get("env", "")), _family(str(values.get("env", "")))]
    elif layer == "model":
        subjects = [Path(str(values.get("model", "tiny"))).name.lower()]
    else:
        subjects = [str(values.get(layer, "grpo"))]
    for name, preset in _table()[layer].items():
        for pattern in preset.get("match", ()):
            if any(fnmatchcase(subject, pattern) for subject in subjects):
                return [name]
    return []


def _family(env_id: str) -> str:
    """Return the family of an environment; empty for one that does not exist."""
    from pz_envs.catalog import find

    try:
        return find(env_id).family
    except ConfigError:
        return ""


@functools.cache
def _loader() -> Any:
    """Return a YAML loader that reads 1e-4 as a number, as everyone but YAML 1.1 does."""
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    return Loader
