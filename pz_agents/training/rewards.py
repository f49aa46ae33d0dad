"""What an episode is paid for other than by its environment: a function, a reward model, or both.

A function is found by import path and called with the texts of all episodes of a step; a reward
model is a transformers sequence classifier with one label. Their sum stands in the place of the
environment's reward, unless ``env_reward`` says how much of that is to stay, and is paid on the
last turn. A program that chooses by reward while it plays (dapo's refills, raft's marks) chooses
by the environment's.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pz_agents.errors import AgentError
from pz_agents.models.protocol import Message
from pz_agents.models.transformers import TransformersModel
from pz_agents.sdk.loading import load_object
from pz_agents.sdk.types import Trajectory
from pz_agents.training.batching import micro_batches
from pz_agents.training.critic import classifier, classifier_folder
from pz_agents.training.settings import TrainSettings
from pz_envs.errors import ConfigError

MAX_SCORE = 10.0
"""A reward model's score is clipped to plus and minus this."""

Columns = Callable[[Trajectory], Mapping[str, Any]]


class Rewards:
    """Pays episodes by the settings' function and reward model.

    Args:
        settings: of the run.
        policy: reads back what it sampled.

    Raises:
        AgentError: there is no such function.
        WrongModelError: there is no such reward model.
    """

    def __init__(self, settings: TrainSettings, policy: TransformersModel) -> None:
        self._policy = policy
        self._own = 0.0 if settings.env_reward is None else settings.env_reward
        self._function = (
            load_function(settings.reward_function) if settings.reward_function else None
        )
        self._model = None
        if settings.reward_model:
            device = next(policy.network.parameters()).device
            folder = classifier_folder(settings.reward_model, "reward_model")
            self._model = RewardModel(folder, device, settings.max_tokens_per_microbatch)

    def __call__(
        self, played: Sequence[Trajectory], columns: Columns | None = None
    ) -> list[Trajectory]:
        """Return the episodes, paid; one that the function has no reward for counts as failed.

        Args:
            played: episodes, failed ones too.
            columns: gives an episode's row of its data set; None for games.

        Raises:
            AgentError: the function failed, or gave something else than rewards.
        """
        found: list[float | None] = [0.0] * len(played)
        places = [place for place, item in enumerate(played) if item.steps]
        kept = [played[place] for place in places]
        talks = [self._talk(item) for item in kept]
        if self._function is not None:
            for place, value in zip(places, self._asked(kept, talks, columns), strict=True):
                found[place] = value
        if self._model is not None and kept:
            for place, score in zip(places, self._model.scores(talks), strict=True):
                earned = found[place]
                found[place] = None if earned is None else earned + score
        return [_paid(item, value, self._own) for item, value in zip(played, found, strict=True)]

    def _talk(self, item: Trajectory) -> list[Message]:
        """Return what was said: observations as the user's, replies as they were sampled."""
        talk: list[Message] = []
        for step in item.steps:
            reply = step.action
            if step.sample is not None:
                reply = self._policy.decode(step.sample.token_ids)
            talk.append({"role": "user", "content": step.observation})
            talk.append({"role": "assistant", "content": reply})
        return talk

    def _asked(
        self,
        played: Sequence[Trajectory],
        talks: Sequence[Sequence[Message]],
        columns: Columns | None,
    ) -> list[float | None]:
        assert self._function is not None
        given: dict[str, Any] = {
            "prompts": [talk[0]["content"] for talk in talks],
            "completions": [
                "\n".join(each["content"] for each in talk if each["role"] == "assistant")
                for talk in talks
            ],
            "trajectories": list(played),
        }
        rows = [columns(item) if columns else {} for item in played]
        for name in sorted({name for row in rows for name in row} - given.keys()):
            given[name] = [row.get(name) for row in rows]
        return call_rewards(self._function, given)


class RewardModel:
    """A sequence classifier that gives a conversation one score.

    Args:
        folder: what ``save_pretrained`` wrote, tokenizer included.
        device: where it runs.
        budget: most tokens that go through it together, padding included.

    Raises:
        WrongModelError: the folder holds no such model.
    """

    def __init__(self, folder: Path, device: torch.device, budget: int = 8192) -> None:
        from transformers import AutoTokenizer

        self.network = classifier(folder, needs_head=True).to(device).requires_grad_(False)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._device = device
        self._budget = budget
        config = self.network.config.get_text_config()
        self._longest = int(config.max_position_embeddings)

    @torch.no_grad()
    def scores(self, talks: Sequence[Sequence[Message]]) -> list[float]:
        """Return the score at each conversation's last token; what is too long loses its start."""
        rows = [self._ids(talk)[-self._longest :] for talk in talks]
        scores = [0.0] * len(rows)
        for part in micro_batches([len(row) for row in rows], self._budget):
            width = max(len(rows[place]) for place in part)
            ids = torch.zeros(len(part), width, dtype=torch.long)
            for index, place in enumerate(part):
                ids[index, : len(rows[place])] = torch.tensor(rows[place])
            body = self.network.base_model(input_ids=ids.to(self._device), use_cache=False)
            lasts = torch.tensor([len(rows[place]) - 1 for place in part], device=self._device)
            states = body.last_hidden_state[torch.arange(len(part), device=self._device), lasts]
            found = self.network.score(states).float().squeeze(-1).clamp(-MAX_SCORE, MAX_SCORE)
            for place, score in zip(part, found.tolist(), strict=True):
                scores[place] = score
        return scores

    def _ids(self, talk: Sequence[Message]) -> list[int]:
        tokenizer = self._tokenizer
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(list(talk), tokenize=False)
            ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        else:
            ids = tokenizer.encode("\n".join(each["content"] for each in talk), verbose=False)
        return [int(each) for each in ids]


def load_function(spec: str) -> Callable[..., Any]:
    """Return the function that ``package.module:name`` or ``path/file.py:name`` names.

    Raises:
        ConfigError: ``spec`` is not of that form, or names something that cannot be called.
        AgentError: there is no such module, file or name.
    """
    if ":" not in spec:
        raise ConfigError(
            f"`{spec}` names no function; give package.module:name or path/file.py:name"
        )
    found = load_object(spec)
    if not callable(found):
        raise ConfigError(f"{spec} is a {type(found).__name__} and no function")
    return found  # type: ignore[no-any-return]  # callable


def call_rewards(function: Callable[..., Any], given: Mapping[str, Any]) -> list[float | None]:
    """Return what a reward function gives, one a completion; None where it has no answer.

    It is called with the keywords it takes, all of them where it takes any (``**columns``), and
    may be asynchronous.

    Raises:
        AgentError: it raised, or did not give one number or None a completion.
    """
    count = len(given["completions"])
    name = getattr(function, "__name__", repr(function))
    parameters = inspect.signature(function).parameters.values()
    if not any(each.kind is each.VAR_KEYWORD for each in parameters):
        taken = {each.name for each in parameters}
        given = {key: value for key, value in given.items() if key in taken}
    try:
        answer = function(**given)
        if inspect.isawaitable(answer):
            answer = asyncio.run(_waited(answer))
    except Exception as error:  # foreign code: whatever it raises, there are no rewards
        raise AgentError(
            f"the reward function {name} raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(answer, Sequence | np.ndarray) or len(answer) != count:
        raise AgentError(
            f"the reward function {name} must return {count} numbers, one a completion; "
            f"got {answer!r:.200}"
        )
    rewards: list[float | None] = []
    for value in answer:
        if value is not None and not math.isfinite(float(value)):
            raise AgentError(
                f"the reward function {name} returned {value!r}; None is for no answer"
            )
        rewards.append(None if value is None else float(value))
    return rewards


def call_metrics(spec: str, played: Sequence[Trajectory]) -> dict[str, float]:
    """Return what the function that ``spec`` names measures of episodes.

    Raises:
        ConfigError: ``spec`` names no function.
        AgentError: the function is not there, raised, or gave something else than numbers.
    """
    function = load_function(spec)
    try:
        answer = function(list(played))
        return {str(name): float(value) for name, value in dict(answer).items()}
    except Exception as error:  # foreign code: whatever it raises, there are no metrics
        raise AgentError(f"the metrics of {spec} raised {type(error).__name__}: {error}") from error


async def _waited(answer: Any) -> Any:
    return await answer


def _paid(item: Trajectory, value: float | None, own: float) -> Trajectory:
    """Return an episode with ``value`` added to ``own`` times what its environment paid."""
    if value is None and item.status == "ok":
        return replace(item, status="failed", error="the reward function has no reward for it")
    if not item.steps or value is None:
        return item
    steps = [replace(step, reward=own * step.reward) for step in item.steps]
    steps[-1] = replace(steps[-1], reward=steps[-1].reward + value)
    return replace(item, steps=tuple(steps), reward=own * item.reward + value)
