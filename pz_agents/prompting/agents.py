"""Agents that prompt a language model: one sample a turn, or the best of several.

Each episode has its own conversation; one call of ``act`` is one call of ``generate`` for all its
turns. What was sampled is recorded token for token in ``Action.sample``, so that training and
evaluation run the same agent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pz_agents.models.protocol import (
    Completion,
    GenerateRequest,
    LanguageModel,
    is_trainable,
)
from pz_agents.prompting.conversation import Conversation, reply_tag
from pz_agents.prompting.templates import Template, find_template, spelled_out
from pz_agents.sdk.types import Action, Ids, Sample, Trajectory, Turn
from pz_envs.errors import ConfigError
from pz_envs.replies import parse_reply
from pz_envs.seeding import derive_seed


class ZeroShot:
    """Asks the model for one reply a turn.

    Args:
        model: the policy.
        temperature: 0 is greedy.
        max_new_tokens: length of a reply; None takes 48 for templates without a system message,
            512 for those that ask for thought, a quarter of the context at most.
        template: a name, a ``Template``, or None for the one that fits the model.
        history: most past turns in a prompt, over the template's own; -1 is all of them.
        top_p: 1 is off; anything else makes the samples unfit for training.
        top_k: 0 is off; likewise.

    Raises:
        ConfigError: an argument is out of range, or there is no such template.
    """

    needs_admissible_commands = True

    def __init__(
        self,
        model: LanguageModel,
        temperature: float = 1.0,
        max_new_tokens: int | None = None,
        template: str | Template | None = None,
        history: int | None = None,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> None:
        if not 0 <= temperature < math.inf:
            raise ConfigError(f"temperature={temperature}: allowed are 0 (greedy) and above")
        if not 0 < top_p <= 1 or top_k < 0:
            raise ConfigError(
                f"top_p={top_p}, top_k={top_k}: needed is 0 < top_p <= 1 and top_k >= 0"
            )
        if history is not None and history < -1:
            raise ConfigError(f"history={history}: allowed are -1 (all), 0, 1, 2, ...")
        if not isinstance(template, Template):
            template = find_template(template or model.template)
        if history is not None:
            template = replace(template, history=None if history == -1 else history)
        if max_new_tokens is None:
            wanted = 512 if template.system else 48
            max_new_tokens = min(wanted, model.max_context // 4)
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={max_new_tokens}: allowed are 1 and above")
        self.model = model
        self.template = template
        self._temperature = float(temperature)
        self._max_new_tokens = max_new_tokens
        self._top_p = top_p
        self._top_k = top_k
        self._conversations: dict[str, Conversation] = {}

    def act(self, turns: Sequence[Turn]) -> list[Action]:
        """Return one action a turn, sampled with the turn's own seed."""
        prompts = [self._begin(turn).prompt_ids(turn) for turn in turns]
        requests = [
            self._request(prompt, turn.seed) for prompt, turn in zip(prompts, turns, strict=True)
        ]
        completions = self.model.generate(requests)
        return [
            self._take(turn, prompt, completion)
            for turn, prompt, completion in zip(turns, prompts, completions, strict=True)
        ]

    def end(self, trajectory: Trajectory) -> None:
        """Forget the episode."""
        self._conversations.pop(trajectory.key, None)

    def _begin(self, turn: Turn) -> Conversation:
        """Return the episode's conversation; a first turn begins a new one."""
        key = turn.episode.key
        if turn.index == 0 or key not in self._conversations:
            self._conversations[key] = Conversation(self.model, self.template, self._max_new_tokens)
        return self._conversations[key]

    def _request(self, prompt: Ids, seed: int) -> GenerateRequest:
        return GenerateRequest(
            prompt_ids=prompt,
            max_new_tokens=self._max_new_tokens,
            seed=seed,
            temperature=self._temperature,
            top_p=self._top_p,
            top_k=self._top_k,
        )

    def _take(self, turn: Turn, prompt: Ids, completion: Completion) -> Action:
        self._conversations[turn.episode.key].add_reply(completion)
        commands = turn.info.get("admissible_commands")
        text = spelled_out(self.template, completion.text, reply_tag(turn), commands)
        return Action(text, _sample(prompt, completion, self._temperature))


class BestOfN(ZeroShot):
    """Samples ``n`` replies a turn and plays the likeliest well-formed one.

    A reply is well formed when it obeys the tag format; among those (or among all, when there is
    none) the highest mean log-prob a token wins, the earliest on a tie. Nothing is tried out in
    the environment and no score is looked at. The sample that is recorded is the chosen one, so
    its log-probs are not those of the distribution it was drawn from: evaluate with this agent,
    do not train with it.

    Args:
        model: the policy.
        n: samples a turn.
        **options: those of ``ZeroShot``; ``temperature`` must be above 0.

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
        """Return the chosen action a turn; ``notes`` has ``well_formed``, how many of n were."""
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
            chosen, well_formed = _likeliest(candidates, reply_tag(turn))
            action = self._take(turn, prompt, chosen)
            actions.append(replace(action, notes={"well_formed": well_formed}))
        return actions


def _likeliest(candidates: Sequence[Completion], tag: str) -> tuple[Completion, int]:
    """Return the well-formed candidate with the highest mean log-prob, and how many were."""
    replies = [parse_reply(candidate.text, tag, "tags") for candidate in candidates]
    well_formed = [
        candidate
        for candidate, reply in zip(candidates, replies, strict=True)
        if reply.command is not None and reply.problem is None
    ]
    return max(well_formed or candidates, key=_mean_log_prob), len(well_formed)


def _mean_log_prob(completion: Completion) -> float:
    return float(np.mean(completion.log_probs)) if len(completion.log_probs) else -math.inf


def _sample(prompt: Ids, completion: Completion, temperature: float) -> Sample | None:
    """Return the record for training; None where the backend did not tell every log-prob."""
    if not is_trainable(completion):
        return None
    return Sample(
        prompt_ids=prompt,
        token_ids=completion.token_ids,
        log_probs=completion.log_probs,
        finish=completion.finish,
        version=completion.version,
        temperature=temperature,
    )
