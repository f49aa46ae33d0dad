"""From a name to an agent: built in, installed, in a module, or in a file anywhere on the disk.

A target may be a class, an agent object, a factory, or a plain function ``(observation, info) ->
reply``. Nothing is copied: a file is run where it lies, under a module name of its own, and may
import the files beside it. Every failure is an ``AgentError`` that says what is there instead.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pz_agents.errors import AgentError, WrongAgentError
from pz_agents.sdk.protocols import Agent, AgentFunction
from pz_agents.sdk.types import Turn
from pz_envs.errors import did_you_mean

if TYPE_CHECKING:
    from pz_agents.models.protocol import LanguageModel

BUILT_IN: Mapping[str, str] = {
    "random": "pz_agents.sdk.builtin:RandomAgent",
    "expert": "pz_agents.sdk.builtin:ExpertAgent",
    "zeroshot": "pz_agents.prompting.agents:ZeroShot",
    "best-of-n": "pz_agents.prompting.several:BestOfN",
    "mcts": "pz_agents.search.agent:MctsAgent",
    "few-shot": "pz_agents.prompting.fewshot:FewShot",
    "react": "pz_agents.prompting.react:ReAct",
    "reflexion": "pz_agents.prompting.reflexion:Reflexion",
    "self-consistency": "pz_agents.prompting.several:SelfConsistency",
    "unizero": "pz_agents.priorzero.agent:UniZeroAgent",
    "priorzero": "pz_agents.priorzero.agent:PriorZeroAgent",
    "webshop-rule": "pz_envs.webshop.expert:rule_agent",
}
"""Agents that come with the package."""

ENTRY_POINT_GROUP = "pz_agents.agents"


def agent_names() -> tuple[str, ...]:
    """Return the names that ``load_agent`` knows: built-in ones, then installed ones."""
    return (*BUILT_IN, *sorted(set(_installed()) - set(BUILT_IN)))


def installed_agent(name: str) -> EntryPoint | None:
    """Return the entry point that ``load_agent(name)`` would follow, None for any other name."""
    # Looking them up reads every installed distribution; a place in a file is none of them.
    return None if name in BUILT_IN or ":" in name else _installed().get(name)


def load_agent(
    spec: str,
    *,
    model: LanguageModel | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Agent:
    """Return the agent that ``spec`` names.

    Args:
        spec: a name of ``agent_names()``, ``"package.module:Name"``, ``"path/file.py:Name"``, or
            ``"external:COMMAND"`` for a program of its own (``pz_agents.sdk.external``).
            A class or factory is called; a function whose two required parameters are the
            observation and the info dictionary is an agent by itself.
        model: given to a class or factory that takes a parameter ``model``.
        kwargs: further arguments of the class or factory.

    Raises:
        AgentError: no such name, file or attribute; it fails when called; it has no usable
            ``act``; it needs a model and there is none.
    """
    target = _target(spec)
    arguments = dict(kwargs or {})
    if inspect.isclass(target) or (inspect.isroutine(target) and not _is_plain(target)):
        agent = _construct(spec, target, model, arguments)
    elif arguments:
        raise WrongAgentError(
            f"{spec} is no class and no factory, so it takes no {_listed(arguments)}"
        )
    else:
        agent = target
    if not hasattr(agent, "act") and inspect.isroutine(agent) and _is_plain(agent):
        agent = _FunctionAgent(agent)
    _check_act(spec, agent)
    return agent  # type: ignore[no-any-return]  # _check_act saw to it


def needs_model(spec: str) -> bool:
    """Return whether the agent cannot be made without a language model.

    Raises:
        AgentError: ``spec`` names nothing.
    """
    target = _target(spec)
    if not (inspect.isclass(target) or (inspect.isroutine(target) and not _is_plain(target))):
        return False
    parameter = _parameters(target).get("model")
    return parameter is not None and parameter.default is parameter.empty


def load_object(spec: str) -> Any:
    """Return what ``package.module:Name`` or ``path/file.py:Name`` names, whatever it is.

    Raises:
        AgentError: there is no such module, file or name, or it could not be imported.
    """
    return _target(spec)


class _FunctionAgent:
    """A plain function as an agent."""

    def __init__(self, function: AgentFunction) -> None:
        self._function = function

    def act(self, turns: Sequence[Turn]) -> list[str]:
        return [self._function(turn.observation, turn.info) for turn in turns]


def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


def _target(spec: str) -> Any:
    if spec.startswith("external:"):
        from pz_agents.sdk.external import external

        return external(spec.removeprefix("external:"))
    if spec in BUILT_IN:
        spec = BUILT_IN[spec]
    elif (installed := installed_agent(spec)) is not None:
        spec = installed.value
    place, colon, name = spec.rpartition(":")
    if not colon and spec.endswith(".py"):
        place = spec
    elif not colon or not place or not name:
        known = agent_names()
        raise WrongAgentError(
            f"No agent `{spec}`.{did_you_mean(spec, known)} Known: {', '.join(known)}; "
            "or give package.module:Name, path/file.py:Name or external:COMMAND"
        )
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    target: Any = module
    for part in name.split(".") if colon else ():
        target = getattr(target, part, None)
    if target is None or target is module:
        present = _names_in(module)
        listed = f"It has: {', '.join(present)}" if present else "It defines no class or function"
        failed = f"has no `{name}`.{did_you_mean(name, present)}" if colon else "needs a `:Name`."
        raise WrongAgentError(f"{place} {failed} {listed}")
    return target


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise _import_failed(name, error) from error
        raise WrongAgentError(
            f"No module `{name}` ({error.name} is not installed). For a file give its path: "
            "path/file.py:Name"
        ) from error
    except Exception as error:  # foreign code: whatever it raises, it did not load
        raise _import_failed(name, error) from error


def _load_file(path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        beside = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise WrongAgentError(f"No file {path}.{did_you_mean(path.name, beside)}")
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    name = f"pz_agent_file_{path.stem}_{digest}"
    loader_spec = importlib.util.spec_from_file_location(name, path)
    assert loader_spec is not None
    assert loader_spec.loader is not None
    module = importlib.util.module_from_spec(loader_spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module
    try:
        loader_spec.loader.exec_module(module)
    except Exception as error:  # foreign code: whatever it raises, it did not load
        del sys.modules[name]
        raise _import_failed(str(path), error) from error
    return module


def _import_failed(place: str, error: Exception) -> AgentError:
    if isinstance(error, SyntaxError):
        where = f"line {error.lineno}: "
    else:
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
    return AgentError(f"{place} could not be loaded: {where}{type(error).__name__}: {error}")


def _names_in(module: ModuleType) -> list[str]:
    """Return the public classes and functions that the module itself defines."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]


def _parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):
        return {}


def _required(target: Callable[..., Any]) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = _parameters(target).values()
    return [item for item in parameters if item.default is item.empty and item.kind not in kinds]


def _is_plain(function: Callable[..., Any]) -> bool:
    """Return whether a function is an agent itself: two required parameters, none the model."""
    required = _required(function)
    positional = all(item.kind is not item.KEYWORD_ONLY for item in required)
    return len(required) == 2 and positional and all(item.name != "model" for item in required)


def _construct(
    spec: str, target: Callable[..., Any], model: LanguageModel | None, arguments: dict[str, Any]
) -> Any:
    parameters = _parameters(target)
    if "model" in parameters:
        if model is not None:
            arguments.setdefault("model", model)
        elif parameters["model"].default is inspect.Parameter.empty and "model" not in arguments:
            raise WrongAgentError(
                f"agent {spec} needs a language model; give one, e.g. model `tiny`"
            )
    any_keyword = any(item.kind is item.VAR_KEYWORD for item in parameters.values())
    unknown = [] if any_keyword else [name for name in arguments if name not in parameters]
    if unknown:
        takes = [name for name in parameters if name != "model"]
        raise WrongAgentError(
            f"agent {spec} takes no {_listed(unknown)}.{did_you_mean(unknown[0], takes)} "
            f"It takes: {', '.join(takes) or 'nothing'}"
        )
    missing = [item.name for item in _required(target) if item.name not in arguments]
    if missing:
        kind = "class" if inspect.isclass(target) else "factory"
        raise WrongAgentError(
            f"agent {spec} is a {kind} that also needs {_listed(missing)}; give them as agent "
            "arguments (a function that is the agent itself takes (observation, info))"
        )
    try:
        return target(**arguments)
    except AgentError:
        raise
    except Exception as error:  # foreign code: whatever it raises, there is no agent
        message = f"agent {spec} could not be made: {type(error).__name__}: {error}"
        raise AgentError(message) from error


def _check_act(spec: str, agent: Any) -> None:
    act = getattr(agent, "act", None)
    if not callable(act):
        raise AgentError(
            f"{spec} gave {agent!r:.200}, which is no agent: an agent has act(turns) -> actions, "
            "or is a function (observation, info) -> reply"
        )
    function = agent._function if isinstance(agent, _FunctionAgent) else act
    if inspect.iscoroutinefunction(function):
        raise AgentError(f"{spec} is asynchronous; act must be a plain function")
    required = len(_required(act))
    accepts = _parameters(act)
    if required > 1 or (not accepts and inspect.ismethod(act)):
        signature = ", ".join(accepts)
        raise AgentError(f"{spec}: act({signature}) must take one argument, the list of turns")


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in names)
