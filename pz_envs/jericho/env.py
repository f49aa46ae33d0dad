"""``JerichoEnv``: a Z-machine game as a text environment.

By default the interpreter runs in a child process, because native code that hangs or crashes on a
language model's input is a matter of time; ``isolated=False`` runs it in this process, several
times faster on quick games, for commands that can be trusted. An input rule or the game's own
parser refusing a command gives ``valid`` False: the turn and score counters stood still and the
answer is one of the parsers' known refusals. A question back ("Which do you mean") counts as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pz_envs.errors import ConfigError, InfraError, require
from pz_envs.jericho.engine import Engine, Report
from pz_envs.jericho.games import find_game
from pz_envs.jericho.story import find_story
from pz_envs.textenv import Outcome, ReplyFormat, TextEnv
from pz_envs.workers import Worker

_ENGINE = "pz_envs.jericho.engine:Engine"

_INSTRUCTION = """\
You are playing {title}, a text adventure. Each turn you read what happens and reply with one \
command for the game.
Commands are short and imperative: go north (or n), look, inventory, examine lamp, take lamp, \
open door, put lamp in box, ask man about key, wait.
Your score grows as you progress; the most you can reach is {max_score}. Saving, restoring, \
restarting and quitting are not possible.
Put the command into <action> tags, for example <action>open mailbox</action>."""


class JerichoEnv(TextEnv):
    """One of the games that jericho supports.

    ``score`` is the game's own counter (it need not start at 0), ``reward`` its change in this
    step, ``success`` that the maximum is reached or the game declares victory. The episode ends
    when the game does. ``info["extra"]["engine_restarts"]`` counts the engines that were lost.

    Args:
        game: its short name, such as ``"zork1"`` (``games.GAMES``).
        story: its story file; without one the data folders are searched.
        admissible_commands: list in info the commands that would change something; costs from
            milliseconds to seconds a step.
        admissible_mode: ``"fast"`` leaves out what rarely matters, ``"exact"`` nothing.
        isolated: run the engine in a child process.
        timeout_s: seconds for one step, and again for listing commands; only when isolated can a
            hung engine be stopped.
        reply_format: see ``TextEnv``.
        render_mode: None or ``"ansi"``.

    Raises:
        ConfigError: no such game, or jericho is not installed.
        DataError: the story file is missing, damaged, or of another release.
    """

    family: ClassVar[str] = "jericho"
    can_snapshot: ClassVar[bool] = True

    def __init__(
        self,
        game: str,
        *,
        story: Path | str | None = None,
        admissible_commands: bool = False,
        admissible_mode: Literal["fast", "exact"] = "fast",
        isolated: bool = True,
        timeout_s: float = 30.0,
        reply_format: ReplyFormat = "auto",
        render_mode: str | None = None,
    ) -> None:
        super().__init__(reply_format=reply_format, render_mode=render_mode)
        if admissible_mode not in ("fast", "exact"):
            raise ConfigError(f"admissible_mode is {admissible_mode!r}; allowed: fast, exact")
        self.game = find_game(game)
        self.story = find_story(self.game, story)
        self._max_score = float(self.game.max_score)
        self._task_id = f"{game}-r119" if self.story.is_mit_zork1 else game
        self._instruction = _INSTRUCTION.format(
            title=self.game.title, max_score=self.game.max_score
        )
        self._expert: str | None = None
        self._extra: dict[str, Any] = {"engine_restarts": 0}
        arguments: dict[str, Any] = {
            "story": str(self.story.path),
            "md5": self.story.md5,
            "commands": admissible_mode if admissible_commands else None,
            "timeout_s": timeout_s,
        }
        require("jericho", "pz-envs[jericho]")
        self._worker: Worker | None = None
        self._engine: Engine | None = None
        if isolated:
            limit = timeout_s * 2 + 5 if admissible_commands else timeout_s
            self._worker = Worker(_ENGINE, arguments, timeout_s=limit)
        else:
            self._engine = Engine(**arguments)

    def expert_action(self) -> str | None:
        """Return the bundled walkthrough's next command while the episode has followed it.

        It is certified for ``reset(options={"expert": True})``, which plays with the seed that it
        was recorded with; luck may break it elsewhere. None once the episode has left it.
        """
        return None if self._outcome is None else self._expert

    def close(self) -> None:
        """End the engine; ``reset`` starts another."""
        self._outcome = None
        if self._worker is not None:
            self._worker.close()
        super().close()

    def _start(self, seed: int, options: Mapping[str, Any]) -> Outcome:
        report = self._ask("start", seed, bool(options.get("expert", False)))
        return self._outcome_of(report, report.score)

    def _advance(self, command: str) -> Outcome:
        assert self._outcome is not None
        if self._engine is not None:
            report = self._engine.step(command)
        else:
            report = self._ask("step", command)
        return self._outcome_of(report, self._outcome.score)

    def _save(self) -> bytes:
        state: bytes = self._call("save")
        return state

    def _load(self, engine: bytes, header: Mapping[str, Any]) -> None:
        self._expert = self._ask("load", engine).expert

    def _ask(self, method: str, *arguments: Any) -> Report:
        report = self._call(method, *arguments)
        return report if self._worker is None else Report(*report)

    def _call(self, method: str, *arguments: Any) -> Any:
        if self._worker is None:
            return getattr(self._engine, method)(*arguments)
        try:
            return self._worker.call(method, *arguments)
        except InfraError:
            self._outcome = None  # the episode died with its engine: only reset() can go on
            raise
        finally:
            self._extra["engine_restarts"] = self._worker.restarts

    def _outcome_of(self, report: Report, before: float) -> Outcome:
        _, score, over, won, accepted, self._expert, commands = report
        return Outcome(
            report.text,
            float(score),
            score - before,
            over,
            won or score >= self._max_score,
            accepted,
            None if commands is None else tuple(commands),
            self._extra,
        )
