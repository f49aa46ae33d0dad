"""Agents that sample several replies a turn and play one: the likeliest, or the majority's.

Nothing is tried out in the environment and no score is looked at. The reply that is played is the
step's ``sample``; what the others cost is in its notes (``other_tokens``, ``other_prompt_tokens``)
and in every count of tokens. The sample's log-probs are not those of the distribution it was
chosen from: evaluate with these agents, do not train with them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np

from pz_agents.models.protocol import Completion, LanguageModel
from pz_agents.prompting.agents import ZeroShot
from pz_agents.prompting.conversation import reply_tag
from pz_agents.prompting.templates import Template
from pz_agents.sdk.types import Action, Turn
from pz_envs.errors import ConfigError
from pz_envs.replies import parse_reply
from pz_envs.seeding import derive_seed

_NUMBER = re.compile(r"[+-]?[0-9]{1,40}(\.[0-9]{1,40}|/[0-9]{0,39}[1-9])?", re.ASCII)


class BestOfN(ZeroShot):
    """Samples ``n`` replies a turn and plays the likeliest well-formed one.

    A reply is well formed when it obeys the tag format; among those (or among all, when there is
    none) the highest mean log-prob a token wins, the earliest on a tie.

    Args:
        model: the policy.
        n: samples a turn.

    The others are those of ``ZeroShot``; ``temperature`` must be above 0.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        model: LanguageModel,
        n: int = 4,
        temperature: float = 1.0,
        max_new_tokens: int | None = None,
        template: str | Template | None = None,
        history: int | None = None,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> None:
        super().__init__(model, temperature, max_new_tokens, template, history, top_p, top_k)
        if n < 1:
            raise ConfigError(f"n={n}: allowed are 1 and above")
        if temperature == 0 and n > 1:
            raise ConfigError("temperature=0 makes all n samples equal; give one above 0")
        self._n = n

    def act(self, turns: Sequence[Turn]) -> list[Action]:
        """Return the chosen action a turn; ``notes`` say how it was chosen and what it cost."""
        prompts = [self._begin(turn).prompt_ids(turn) for turn in turns]
        completions = self.model.generate(
            [
                self._request(prompt, derive_seed(turn.seed, "candidate", number))
                for prompt, turn in zip(prompts, turns, strict=True)
                for number in range(self._n)
            ]
        )
        actions = []
        for index, (turn, prompt) in enumerate(zip(turns, prompts, strict=True)):
            candidates = completions[index * self._n : (index + 1) * self._n]
            chosen, notes = self._choose(candidates, reply_tag(turn))
            cost = {
                "other_tokens": sum(
                    len(each.token_ids) for each in candidates if each is not chosen
                ),
                "other_prompt_tokens": len(prompt) * (self._n - 1),
            }
            action = self._take(turn, prompt, chosen)
            actions.append(replace(action, notes={**action.notes, **notes, **cost}))
        return actions

    def _choose(
        self, candidates: Sequence[Completion], tag: str
    ) -> tuple[Completion, Mapping[str, int]]:
        """Return the likeliest well-formed candidate, and how many were well formed."""
        replies = [parse_reply(candidate.text, tag, "tags") for candidate in candidates]
        well_formed = [
            candidate
            for candidate, reply in zip(candidates, replies, strict=True)
            if reply.command is not None and reply.problem is None
        ]
        chosen = max(well_formed or candidates, key=_mean_log_prob)
        return chosen, {"well_formed": len(well_formed)}


class SelfConsistency(BestOfN):
    """Samples ``n`` replies a turn and plays what most of them say, whatever they thought.

    The vote is on the command or answer between the tags, not on the words around it: case and
    spaces do not matter to a command, spaces do not to an answer, and numbers are equal when their
    values are (0.5 and 1/2). Replies without a tag have no vote; where none has one, the first is
    played. A tie goes to what was sampled first.

    Source: Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in Language Models",
    arXiv 2203.11171.

    Args:
        model: the policy.
        n: samples a turn.

    The others are those of ``ZeroShot``; ``temperature`` must be above 0.

    Raises:
        ConfigError: an argument is out of range.
    """

    def _choose(
        self, candidates: Sequence[Completion], tag: str
    ) -> tuple[Completion, Mapping[str, int]]:
        """Return the first candidate of the majority, and how large that is."""
        commands = [parse_reply(candidate.text, tag, "tags").command for candidate in candidates]
        ballots = [None if command is None else _ballot(command, tag) for command in commands]
        votes = Counter(ballot for ballot in ballots if ballot is not None)
        if not votes:
            return candidates[0], {"votes": 0}
        ((winner, count),) = votes.most_common(1)
        return candidates[ballots.index(winner)], {"votes": count}


def _ballot(command: str, tag: str) -> str:
    """Return what two replies share when they mean the same."""
    if tag != "answer":
        return " ".join(command.lower().split())
    answer = "".join(command.split())
    number = answer.replace(",", "")
    if _NUMBER.fullmatch(number) is None:
        return answer
    whole, _, divisor = number.partition("/")
    return str(Fraction(whole) / int(divisor or 1))


def _mean_log_prob(completion: Completion) -> float:
    return float(np.mean(completion.log_probs)) if len(completion.log_probs) else -math.inf
