"""The plain prompted agent, on which every other one is built: one sample a turn.

Each episode has its own conversation; one call of ``act`` is one call of ``generate`` for all its
turns. What was sampled is recorded token for token in ``Action.sample``, so that training and
evaluation run the same agent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

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
            template = self._template_for(turn)
            self._conversations[key] = Conversation(self.model, template, self._max_new_tokens)
        return self._conversations[key]

    def _template_for(self, turn: Turn) -> Template:
        """Return the template of the episode that ``turn`` begins; others say more in theirs."""
        return self.template

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
