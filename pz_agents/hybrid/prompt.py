"""The prompt of a state in ORZ's form, and what a reply to it says.

A jinja template makes the text; it is given ``instruction``, ``observation``, ``commands``,
``history`` (turns with ``observation``, ``command``, ``reward``, oldest first) and ``compact``. A
prompt ends inside an open ``<think>``, and is encoded as plain text. To models whose template is
``compact`` commands are numbered, and an answer may be a number. Where a prompt does not fit, past
turns are left out first, then the ends of the observation and of the list.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pz_agents.errors import ModelError
from pz_agents.models.protocol import Completion, LanguageModel
from pz_agents.priorzero.prior import LanguagePrior, Moment
from pz_agents.priorzero.prompt import cuts, kept
from pz_agents.sdk.types import Ids, Sample
from pz_envs.errors import ConfigError
from pz_envs.replies import parse_reply

if TYPE_CHECKING:
    from pz_agents.hybrid.settings import HybridSettings

STOPS = ("</answer>", "User:", "Human:", "Assistant:")
"""A reply ends with the token in which the first of these is complete."""

_BUILT_IN = Path(__file__).with_name("prompt.jinja")
_COMPACT_HISTORY = 3
_COMPACT_CHARS = 300
_CLOSING = " </think> <answer>"
_NUMBER = re.compile(r"[1-9][0-9]{0,3}")
_FORM = re.compile(r"(?s).*</think>\s*<answer>[^<>]*\S[^<>]*</answer>\s*")
_TAG = re.compile(r"</?(?:think|answer)>")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a reply says: the command, None without one, and whether it kept to the form."""

    command: str | None
    well_formed: bool


class Prompter:
    """Makes the prompts of one model.

    Args:
        model: encodes.
        settings: of the run.

    Raises:
        ConfigError: the template cannot be read, or is no jinja template.
    """

    def __init__(self, model: LanguageModel, settings: HybridSettings) -> None:
        import jinja2

        path = Path(settings.prompt_template or _BUILT_IN)
        environment = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined)
        try:
            self._template = environment.from_string(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, jinja2.TemplateError) as error:
            raise ConfigError(f"prompt_template {path} cannot be used: {error}") from error
        self._model, self._path = model, path
        self.numbered = model.template == "compact"
        self.reply_tokens = min(settings.generate_max_len, model.max_context // 2)
        self._room = min(settings.prompt_max_len, model.max_context - self.reply_tokens)

    def prompt(self, moment: Moment) -> tuple[str, Ids]:
        """Return the text and the ids of the longest prompt of a state that fits.

        Raises:
            ConfigError: the template names something that it is not given.
            ModelError: not even a prompt without an observation fits.
        """
        history = moment.history
        if self.numbered:
            history = history[max(len(history) - _COMPACT_HISTORY, 0) :]
        for turns, chars in cuts(len(history), _COMPACT_CHARS if self.numbered else None):
            text = self._text(moment, history[len(history) - turns :], chars)
            ids = self._model.encode(text)
            if len(ids) <= self._room:
                return text, ids
        raise ModelError(
            f"no prompt of {self._path.name} fits into {self._room} tokens; raise prompt_max_len, "
            "lower generate_max_len, or take a model with a longer context"
        )

    def answers(self, commands: Sequence[str]) -> list[str]:
        """Return the shortest answer that means each command."""
        if not self.numbered:
            return list(commands)
        return [str(number) for number in range(1, len(commands) + 1)]

    def read(self, reply: str, commands: Sequence[str]) -> Answer:
        """Return what ``reply`` says in a state with these commands."""
        command = parse_reply(reply, "answer", "tags").command
        if command is not None:
            command = " ".join(command.split())
            if self.numbered and _NUMBER.fullmatch(command) and int(command) <= len(commands):
                command = commands[int(command) - 1]
        formed = _FORM.fullmatch(reply) is not None and len(_TAG.findall(reply)) == 3
        return Answer(command or None, formed)

    def _text(
        self, moment: Moment, history: Sequence[tuple[str, str, float]], chars: int | None
    ) -> str:
        import jinja2

        observation = moment.observation.strip()
        try:
            return self._template.render(
                compact=self.numbered,
                instruction=moment.instruction.strip(),
                observation=observation if chars is None else observation[:chars],
                commands=moment.commands if chars is None else kept(moment.commands, chars),
                history=[
                    {"observation": seen.strip(), "command": command, "reward": f"{reward:g}"}
                    for seen, command, reward in history
                ],
            )
        except jinja2.TemplateError as error:
            raise ConfigError(f"prompt_template {self._path}: {error}") from error


class HybridPrior(LanguagePrior):
    """Scores a state's answers behind its prompt and an empty thought.

    Args:
        model: any backend that scores.
        settings: of the run.
    """

    def __init__(self, model: LanguageModel, settings: HybridSettings) -> None:
        super().__init__(model, settings.language)
        self.prompter = Prompter(model, settings)
        self._behind = model.encode(_CLOSING)

    def prefix(self, moment: Moment) -> Ids:
        """Return the ids that commands are scored behind; see ``LanguagePrior``."""
        ids = np.concatenate([self.prompter.prompt(moment)[1], self._behind])
        longest = max((len(each) for each in self.candidates(moment.commands)), default=0)
        if len(ids) + longest > self.model.max_context:
            raise ModelError(f"a command of {longest} tokens does not fit behind the prompt")
        return ids

    def candidates(self, commands: Sequence[str]) -> list[Ids]:
        """Return the ids of each command's answer, its closing tag included."""
        return [
            self.model.encode(f" {answer} </answer>") for answer in self.prompter.answers(commands)
        ]


def sampled(prompt_ids: Ids, done: Completion, temperature: float) -> Sample:
    """Return a completion as the record that is trained on."""
    return Sample(
        prompt_ids=np.asarray(prompt_ids, np.int32),
        token_ids=np.asarray(done.token_ids, np.int32),
        log_probs=np.asarray(done.log_probs, np.float32),
        finish=done.finish,
        version=done.version,
        temperature=temperature,
    )
