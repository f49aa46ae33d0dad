"""The reference backend: TextWorld's PDDL engine with alfworld's names, in a child process.

It plays the same game files as the native engine, some thousand times slower, and serves as its
measure and as the fallback for files that the native engine does not cover. The child is needed
because the engine's translator replaces ``sys.argv`` and ``sys.stdout``. The original evaluates the
expressions of a grammar as Python, so that a game file is a program; here they are read instead
(names, their text attributes, strings, ``+`` and ``or``) and anything else is refused.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from typing import Any

from pz_envs.alfworld.native import Record
from pz_envs.errors import ConfigError, DataError, EnvError, require
from pz_envs.workers import Worker

_INSTALL = "pz-envs[alfworld]"
_GAMES_A_PROCESS = 50
"""The engine never frees a loaded game (2 to 10 MB each): a process serves so many."""
_ATTRIBUTES = ("name", "id", "type", "definite", "indefinite", "adj", "noun")


class ReferenceHousehold:
    """A game in play on the reference engine, with the methods of ``native.Household``.

    Args:
        timeout_s: seconds for a command; starting a game and planning may take four times that.

    Raises:
        ConfigError: the engine is not installed.
    """

    def __init__(self, *, timeout_s: float = 60.0) -> None:
        check_installed()
        self._worker = Worker("pz_envs.alfworld.reference:Engine", {}, timeout_s=timeout_s)
        self._record: Record | None = None
        self._opened = 0
        self._commands: list[str] = []
        self._admissible: tuple[str, ...] = ()
        self._won = False

    @property
    def pid(self) -> int | None:
        """The engine's process id, or None while there is none."""
        return self._worker.pid

    @property
    def won(self) -> bool:
        """Whether the engine says that the goal is met."""
        return self._won

    def open(self, record: Record) -> None:
        """Choose the game that ``begin`` and ``set_state`` start."""
        self._record = record
        self._opened += 1
        if self._opened > _GAMES_A_PROCESS:
            self._opened = 1
            self._worker.close()  # the next call starts another

    def begin(self) -> str:
        """Start the game anew and return its introduction.

        Raises:
            DataError: the file has an expression that nothing may evaluate.
            EnvError: the engine cannot load the file.
        """
        record = self._record
        if record is None:
            raise EnvError("no game is open; call open() before begin()")
        self._commands = []
        texts = (record.domain, record.problem, record.grammar)
        return self._take_in(self._call_long("begin", *texts))

    def admissible(self) -> tuple[str, ...]:
        """Return the commands that do something now, sorted."""
        return self._admissible

    def play(self, command: str) -> str | None:
        """Carry out a command and return the game's answer, or None if it is not admissible."""
        command = command.strip()
        if command not in self._admissible:
            return None
        answer = self._take_in(self._worker.call("play", command))
        self._commands.append(command)
        return answer

    def plan(self) -> tuple[str, ...] | None:
        """Return commands that win, from the engine's own planner, or None where it finds none."""
        commands = self._call_long("plan")
        return tuple(commands) if commands else None

    def state(self) -> dict[str, list[str]]:
        """Return the commands so far: the engine can only replay."""
        return {"commands": list(self._commands)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Start anew and repeat the commands of ``state``.

        Raises:
            EnvError: a command is not admissible on the way.
        """
        self.begin()
        for command in state["commands"]:
            if self.play(command) is None:
                raise EnvError(f"the saved ALFWorld episode cannot be repeated at {command!r}")

    def close(self) -> None:
        """End the child process."""
        self._worker.close()

    def _call_long(self, method: str, *arguments: str) -> Any:
        return self._worker.call(method, *arguments, timeout_s=4 * self._worker.timeout_s)

    def _take_in(self, reply: list[Any]) -> str:
        feedback, admissible, self._won = reply
        self._admissible = tuple(admissible)
        return str(feedback)


class Engine:
    """The child's side: TextWorld's ``PddlEnv`` under alfworld's ``AlfredDemangler``."""

    def __init__(self) -> None:
        textgen: Any = require("textworld.envs.pddl.textgen", _INSTALL)
        textgen.EvalSymbol.derive = _derive
        self._texts: tuple[str, str, str] | None = None
        self._env: Any = None

    def begin(self, domain: str, problem: str, grammar: str) -> list[Any]:
        """Load a game unless it is the loaded one, and start it."""
        if self._texts != (domain, problem, grammar):
            core = require("textworld.core", _INSTALL)
            pddl = require("textworld.envs.pddl", _INSTALL)
            alfred = require("alfworld.agents.environment.alfred_tw_env", _INSTALL)
            infos = core.EnvInfos(won=True, admissible_commands=True)
            env = alfred.AlfredDemangler(pddl.PddlEnv(infos))
            env.load({"pddl_domain": domain, "pddl_problem": problem, "grammar": grammar})
            self._env, self._texts = env, (domain, problem, grammar)
        return self._reply(self._env.reset())

    def play(self, command: str) -> list[Any]:
        """Type a command; returns feedback, admissible commands, won."""
        state, _, _ = self._env.step(command)
        return self._reply(state)

    def plan(self) -> list[str]:
        """Return what Fast Downward finds from here."""
        env = self._env.unwrapped
        return list(env._pddl_state.replan(env._entity_infos))

    def _reply(self, state: Any) -> list[Any]:
        return [state["feedback"], list(state["admissible_commands"]), bool(state["won"])]


def check_installed() -> None:
    """Raise unless the reference engine can be imported.

    Raises:
        ConfigError: a package is missing; the message says how to install it.
    """
    for module in ("textworld", "fast_downward", "alfworld"):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"`{module}`, of ALFWorld's reference engine, is not installed. "
                f"Install it (g++ is needed): pip install '{_INSTALL}'"
            )


def evaluate(expression: str, variables: Mapping[str, Any]) -> Any:
    """Return the value of a grammar's expression without running it.

    Raises:
        DataError: the expression is more than names, text attributes, strings, ``+`` and ``or``.
    """
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body, variables)
    except (SyntaxError, TypeError, ValueError) as error:
        raise DataError(f"the game's grammar has an unknown expression: {expression!r}") from error


def _value(node: ast.expr, variables: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Name(id=name) if name in variables:
            return variables[name]
        case ast.Attribute(value=ast.Name(id=name), attr=attribute) if (
            name in variables and attribute in _ATTRIBUTES
        ):
            return getattr(variables[name], attribute)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left, variables) + _value(right, variables)
        case ast.BoolOp(op=ast.Or(), values=values):
            return next((value for value in (_value(v, variables) for v in values) if value), None)
    raise ValueError(ast.dump(node))


def _derive(symbol: Any, context: Any = None) -> list[Any]:
    """Stand in for ``EvalSymbol.derive``, which evaluates (and fails so from Python 3.13 on)."""
    textgen = require("textworld.envs.pddl.textgen", _INSTALL)
    variables = (context or symbol.context)["variables"]
    return [textgen.TerminalSymbol(evaluate(symbol.expression, variables))]
