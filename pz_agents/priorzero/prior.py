"""The language model's opinion at a root: scores of the state's commands, or nothing.

Kind ``score`` (PriorZero, arXiv 2605.12289, 2026) scores every admissible command behind one shared
prefix; kind ``generate`` (its predecessor) lets the model write a ranked list and reads it. What
fails is told and counted, never raised: the search then goes by the world model alone.
"""

from __future__ import annotations

import logging
import re
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pz_agents.config import Settings
from pz_agents.errors import ModelError
from pz_agents.models.protocol import Completion, GenerateRequest, LanguageModel
from pz_agents.priorzero.language_settings import Decision
from pz_agents.priorzero.prompt import LABEL, REASONING, prompt_ids
from pz_agents.sdk.types import Ids
from pz_agents.search.priors import entropy, softmax
from pz_envs.seeding import derive_seed

Scores = NDArray[np.float64]
_Answer = tuple[Ids, Scores | None]

_FLOOR = 1e-9
"""The share of a command that a ranked list leaves out."""
_MOST_REMEMBERED = 4096
_RANKED = re.compile(r"^\s*(\d+)\s*[.):]\s*(\S.*?)\s*$", re.MULTILINE)
_WORD = re.compile(r"\w+")

_NOTHING: _Answer = (np.empty(0, np.int32), None)

_logger = logging.getLogger(__name__)


class LanguageSettings(Settings):
    """Which language model gives the prior, and how it is asked."""

    model: str = "tiny"
    """``tiny``, a folder, a name of the hub; see ``pz_agents.models``."""
    kind: Literal["score", "generate"] = "score"
    """``score`` scores every command; ``generate`` lets the model write a ranked list."""
    reduction: Literal["mean", "sum"] = "mean"
    """A command's score: the mean of its tokens' log-probs, terminator included, or their sum."""
    reasoning: bool = False
    """Whether the model thinks aloud before its commands are scored (kind ``score``)."""
    history: int = Field(default=25, ge=0)
    """Most past turns that the prompt shows; fewer where they do not fit."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Most tokens of a ranked list or of a line of reasoning."""
    top: int = Field(default=5, ge=1)
    """Commands that a ranked list is asked for (kind ``generate``)."""
    tries: int = Field(default=3, ge=1)
    """Attempts, each with a seed of its own, before a judgement counts as failed."""
    seconds: float = Field(default=30.0, gt=0)
    """No attempt begins later than this after the first."""


@dataclass(frozen=True, slots=True, eq=False)
class Moment:
    """What a prior sees of one root.

    observation: the state's text. instruction: the task's rules; may be empty.
    commands: the state's real list, in the search's order.
    history: past (observation, command, reward), oldest first; the prompt takes the last few.
    seed: decides what is sampled.
    """

    observation: str
    instruction: str
    commands: tuple[str, ...]
    history: tuple[tuple[str, str, float], ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Opinion:
    """What the model said.

    scores: [A] log-probs, or log weights of a ranking; None where it failed. Made for
        ``search.priors.mix_prior``.
    prefix_ids: what the commands were scored behind: the prompt, and the reasoning where there is
        one; keep it for ``LanguagePrior.decision``.
    statistics: ``ok`` (0 or 1), ``latency`` (seconds), ``retries``, and where it is ok ``entropy``
        (nats, of the softmax of the scores).
    """

    scores: NDArray[np.float64] | None
    prefix_ids: Ids
    statistics: Mapping[str, float] = field(default_factory=dict)


class LanguagePrior:
    """Asks a language model about commands; plays with whatever weights the model has now.

    A plain score is remembered until the weights change: text games come back to their states.

    Args:
        model: any backend; kind ``score`` needs one that scores.
        settings: see there.
    """

    def __init__(self, model: LanguageModel, settings: LanguageSettings) -> None:
        self.model, self.settings = model, settings
        self._ranks = settings.kind == "generate"
        self._thinks = settings.reasoning and not self._ranks
        self._label = model.encode(LABEL)
        self._closing = model.encode(f"\n{LABEL}")
        self._remembered: dict[tuple[bytes, tuple[str, ...]], Scores] = {}
        self._version = model.version
        self._told = False

    def judge(self, moments: Sequence[Moment]) -> list[Opinion]:
        """Return one opinion a moment, in order; a failure is an opinion without scores.

        A failed attempt is made again with another seed, at most ``tries`` times in all and not
        after ``seconds``. Every moment's ``latency`` is its share of the call's time.
        """
        began = time.monotonic()
        opened: list[_Answer] = [_NOTHING] * len(moments)
        retries = [0] * len(moments)
        waiting = list(range(len(moments)))
        for attempt in range(self.settings.tries):
            if not waiting or (attempt and time.monotonic() - began > self.settings.seconds):
                break
            answers = self._attempt([moments[place] for place in waiting], attempt)
            for place, answer in zip(waiting, answers, strict=True):
                opened[place] = answer
                retries[place] = attempt
            waiting = [place for place in waiting if opened[place][1] is None]
        latency = (time.monotonic() - began) / max(len(moments), 1)
        return [
            Opinion(scores, prefix, _statistics(scores, latency, retries[place]))
            for place, (prefix, scores) in enumerate(opened)
        ]

    def prefix(self, moment: Moment) -> Ids:
        """Return the ids that ``judge`` conditions on without reasoning.

        Raises:
            ModelError: no prompt fits into the model's context.
        """
        if self._ranks:
            return self._prompt(moment, self.settings.max_new_tokens)
        room = self._longest(moment.commands) + len(self._label)
        return np.concatenate([self._prompt(moment, room), self._label])

    def candidates(self, commands: Sequence[str]) -> list[Ids]:
        """Return the ids of each command as the model would write it, terminator included.

        With the terminator ``go`` is not the beginning of ``go north``. Of a ranked list it is
        the first line.
        """
        if self._ranks:
            return [self.model.encode(f"1. {command}\n") for command in commands]
        end = np.array([self.model.end_of_turn_id], np.int32)
        return [np.concatenate([self.model.encode(f" {command}"), end]) for command in commands]

    def decision(
        self,
        prefix_ids: Ids,
        commands: Sequence[str],
        visits: NDArray[np.floating],
        played: int,
        advantage: float,
    ) -> Decision:
        """Return a stored turn as ``LanguageLearner.learn`` takes it.

        Args:
            prefix_ids: the opinion's, or ``prefix(moment)`` where there was none.
            commands: A of them.
            visits: [A] shares or counts.
            played: place of the played one.
            advantage: see ``Decision``.
        """
        if not self._ranks:
            candidates = tuple(self.candidates(commands))
            return Decision(prefix_ids, candidates, np.asarray(visits), played, advantage)
        order = np.argsort(-np.asarray(visits), kind="stable")[: self.settings.top]
        best = [commands[place] for place in order if visits[place] > 0]
        lines = "\n".join(f"{rank}. {command}" for rank, command in enumerate(best, start=1))
        end = np.array([self.model.end_of_turn_id], np.int32)
        return Decision(
            prefix_ids,
            tuple(self.candidates([commands[played]])),
            np.ones(1),
            played=0,
            advantage=advantage,
            ranking=np.concatenate([self.model.encode(lines), end]) if best else None,
        )

    def _attempt(self, moments: Sequence[Moment], attempt: int) -> list[_Answer]:
        """Return each moment's prefix and scores, None where it failed."""
        asked: list[_Answer] = []
        for moment in moments:
            try:
                asked.append((self._asked(moment), None))
            except ModelError as error:
                self._tell(error)
                asked.append(_NOTHING)
        places = [place for place, (prefix, _) in enumerate(asked) if len(prefix)]
        generates = self._ranks or self._thinks
        replies: Sequence[Completion | None] = [None] * len(places)
        if generates:
            requests = [
                GenerateRequest(
                    asked[place][0],
                    self.settings.max_new_tokens,
                    seed=derive_seed(moments[place].seed, "prior", attempt) % 2**31,
                )
                for place in places
            ]
            try:
                replies = self.model.generate(requests)
            except ModelError as error:
                self._tell(error)
                return asked
        for place, reply in zip(places, replies, strict=True):
            try:
                asked[place] = self._answered(asked[place][0], moments[place].commands, reply)
            except ModelError as error:
                self._tell(error)
        return asked

    def _asked(self, moment: Moment) -> Ids:
        """Return what the model reads before it writes or is scored."""
        if not self._thinks:
            return self.prefix(moment)
        opening, closing = self.model.encode(REASONING), self._closing
        room = self.settings.max_new_tokens + len(opening) + len(closing)
        prompt = self._prompt(moment, room + self._longest(moment.commands))
        return np.concatenate([prompt, opening])

    def _answered(
        self, prefix: Ids, commands: tuple[str, ...], reply: Completion | None
    ) -> _Answer:
        """Return the prefix that was conditioned on, and the scores."""
        if reply is None:
            return prefix, self._scored(prefix, commands)
        if self._ranks:
            return prefix, read_ranking(reply.text, commands)
        ids = reply.token_ids[:-1] if reply.finish == "stop" else reply.token_ids
        prefix = np.concatenate([prefix, self._thoughts(ids), self._closing])
        return prefix, self._scored(prefix, commands)

    def _thoughts(self, ids: Ids) -> Ids:
        """Return the sampled ids before the first blank line or answer; no text is encoded anew."""
        text = self.model.decode(ids)
        starts = [text.index(stop) for stop in ("\n\n", LABEL) if stop in text]
        if not starts:
            return ids
        start = min(starts)
        count = bisect_left(
            range(len(ids) + 1), start + 1, key=lambda n: len(self.model.decode(ids[:n]))
        )
        return ids[: max(count - 1, 0)]

    def _scored(self, prefix: Ids, commands: tuple[str, ...]) -> Scores | None:
        if self._version != self.model.version or len(self._remembered) >= _MOST_REMEMBERED:
            self._remembered.clear()
            self._version = self.model.version
        key = (prefix.tobytes(), commands)
        if key not in self._remembered:
            log_probs = self.model.score(prefix, self.candidates(commands))
            reduced = np.mean if self.settings.reduction == "mean" else np.sum
            scores = np.array([float(reduced(each)) for each in log_probs], np.float64)
            if not np.isfinite(scores).all():
                return None
            self._remembered[key] = scores
        return self._remembered[key].copy()

    def _prompt(self, moment: Moment, room: int) -> Ids:
        history = moment.history[max(len(moment.history) - self.settings.history, 0) :]
        return prompt_ids(
            self.model,
            moment.observation,
            moment.instruction,
            moment.commands,
            history,
            room=room,
            reasoning=self._thinks,
            top=self.settings.top if self._ranks else 0,
        )

    def _longest(self, commands: Sequence[str]) -> int:
        return max((len(ids) for ids in self.candidates(commands)), default=0)

    def _tell(self, error: ModelError) -> None:
        if not self._told:
            self._told = True
            _logger.warning(
                "the prior of %s failed, counted from now on: %s", self.model.name, error
            )


def read_ranking(text: str, commands: Sequence[str]) -> Scores | None:
    """Return log weights [A] of a ranked list such as ``1. north``; None where nothing is read.

    The k-th of n recognised commands (from 0) weighs n - k, all weights together 1; what is not
    named weighs next to nothing. A line means the command that it is, letter for letter but for
    case and what stands around it, or else the one with the greatest share of words in common.
    """
    ranked: list[int] = []
    for _, line in _RANKED.findall(text):
        place = _meant(line, commands)
        if place is not None and place not in ranked:
            ranked.append(place)
    if not ranked:
        return None
    weights = np.zeros(len(commands))
    weights[ranked] = np.arange(len(ranked), 0, -1)
    return np.asarray(np.log(weights / weights.sum() + _FLOOR))


def _meant(line: str, commands: Sequence[str]) -> int | None:
    said = line.strip("\"'`*. ").casefold()
    words = set(_WORD.findall(said))
    best, most = None, 0.0
    for place, command in enumerate(commands):
        if command.casefold() == said:
            return place
        own = set(_WORD.findall(command.casefold()))
        overlap = len(words & own) / max(len(words | own), 1)
        if overlap > most:
            best, most = place, overlap
    return best


def _statistics(scores: Scores | None, latency: float, retries: int) -> dict[str, float]:
    statistics = {"ok": float(scores is not None), "latency": latency, "retries": float(retries)}
    if scores is not None:
        statistics["entropy"] = entropy(softmax(scores))
    return statistics
