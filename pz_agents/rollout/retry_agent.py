"""The two players of reflect-retry: one that remembers its turns, one that plays with guidance.

A retry is sampled from prompts that hold the guidance, and recorded with the prompts that it would
have had without: two conversations over the same replies, of which only the first is read by the
model. What is learned is thus to play well without being told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pz_agents.models.protocol import Completion, LanguageModel
from pz_agents.prompting.agents import ZeroShot
from pz_agents.prompting.conversation import Conversation
from pz_agents.prompting.reflection import fitted_guidance, with_guidance
from pz_agents.sdk.types import Action, Ids, Sample, Step, Trajectory, Turn


@dataclass(frozen=True, slots=True, eq=False)
class Moment:
    """A turn as it was met: the environment's state then, and its expert's word if asked for."""

    turn: Turn
    snapshot: bytes | None
    expert: str | None


class Recorder:
    """Plays as ``agent`` does and keeps the moments of each episode, by its key.

    Args:
        agent: plays.
        expert: ask the environment's expert at each turn.
    """

    needs_admissible_commands = True

    def __init__(self, agent: ZeroShot, *, expert: bool) -> None:
        self.moments: dict[str, list[Moment]] = {}
        self.reset_options: Mapping[str, Any] | None = {"expert": True} if expert else None
        self._agent = agent
        self._expert = expert

    def act(self, turns: Sequence[Turn]) -> list[Action]:
        """Return the agent's actions."""
        for turn in turns:
            moments = self.moments.setdefault(turn.episode.key, [])
            if len(moments) == turn.index:
                moments.append(self._look(turn))
        return self._agent.act(turns)

    def end(self, trajectory: Trajectory) -> None:
        """Tell the agent."""
        self._agent.end(trajectory)

    def _look(self, turn: Turn) -> Moment:
        env = turn.episode.env
        if env is None:
            return Moment(turn, None, None)
        snapshot = env.snapshot() if env.can_snapshot else None
        return Moment(turn, snapshot, env.expert_action() if self._expert else None)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A retry: of which episode, what was met there, what is told, and from which step."""

    base: Trajectory
    moments: Sequence[Moment]
    guidance: str
    pivot: int


class GuidedAgent(ZeroShot):
    """Plays episodes that have a plan with its guidance, and others as ``agent`` would.

    ``Action.sample`` has the prompt without guidance; ``guided`` has, by episode, the samples as
    they were drawn. The log-probs of both are those under guidance. The step at which a retry
    begins to be played has ``retry_of`` and ``planned``, the pivot that was asked for, among its
    notes.

    Args:
        agent: whose model, template and sampling are used.
        plans: by the keys of the episodes.
        reset_options: those that the first attempts were played with.
    """

    def __init__(
        self,
        agent: ZeroShot,
        plans: Mapping[str, Plan],
        reset_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(agent.model, agent._temperature, agent._max_new_tokens, agent.template)
        self.reset_options = reset_options
        self.guided: dict[str, list[Sample]] = {}
        self._plans = plans
        self._guided: dict[str, Conversation] = {}
        self._first: dict[str, int] = {}

    def act(self, turns: Sequence[Turn]) -> list[Action]:
        """Return one action a turn, sampled under guidance where there is a plan."""
        plain = [self._begin(turn).prompt_ids(turn) for turn in turns]
        read = [
            self._guided[turn.episode.key].prompt_ids(turn)
            if turn.episode.key in self._plans
            else prompt
            for turn, prompt in zip(turns, plain, strict=True)
        ]
        completions = self.model.generate(
            [self._request(prompt, turn.seed) for prompt, turn in zip(read, turns, strict=True)]
        )
        return [
            self._answer(turn, prompt, shown, completion)
            for turn, prompt, shown, completion in zip(turns, plain, read, completions, strict=True)
        ]

    def end(self, trajectory: Trajectory) -> None:
        """Forget the episode's conversations."""
        super().end(trajectory)
        self._guided.pop(trajectory.key, None)
        self._first.pop(trajectory.key, None)

    def _begin(self, turn: Turn) -> Conversation:
        """Return the conversation without guidance; a first turn begins both."""
        key = turn.episode.key
        plan = self._plans.get(key)
        if plan is None:
            return super()._begin(turn)
        if self._first.setdefault(key, turn.index) == turn.index:
            room = self.model.max_context - self._max_new_tokens
            guidance = fitted_guidance(self.model, plan.guidance, room)
            told = with_guidance(self.template, guidance)
            for conversations, template in (
                (self._conversations, self.template),
                (self._guided, told),
            ):
                conversation = Conversation(self.model, template, self._max_new_tokens)
                for moment, step in zip(
                    plan.moments[: turn.index], plan.base.steps[: turn.index], strict=True
                ):
                    conversation.prompt_ids(moment.turn)
                    conversation.add_reply(_said(step))
                conversations[key] = conversation
            self.guided[key] = []
        return self._conversations[key]

    def _answer(self, turn: Turn, plain: Ids, read: Ids, completion: Completion) -> Action:
        key = turn.episode.key
        action = self._take(turn, plain, completion)
        plan = self._plans.get(key)
        if plan is None:
            return action
        self._guided[key].add_reply(completion)
        if action.sample is not None:
            self.guided[key].append(replace(action.sample, prompt_ids=read))
        if turn.index > self._first[key]:
            return action
        return replace(action, notes={"retry_of": plan.base.key, "planned": plan.pivot})


def rescored(model: LanguageModel, samples: Sequence[Sample]) -> list[Sample]:
    """Return ``samples`` with the log-probs that ``model`` gives them after their own prompts.

    They are those of temperature 1. Samples of which each prompt continues the last prompt and
    reply are read in one pass.
    """
    done: list[Sample] = []
    while len(done) < len(samples):
        chain = [samples[len(done)]]
        ids = np.concatenate([chain[0].prompt_ids, chain[0].token_ids])
        for sample in samples[len(done) + 1 :]:
            if not np.array_equal(sample.prompt_ids[: len(ids)], ids):
                break
            chain.append(sample)
            ids = np.concatenate([sample.prompt_ids, sample.token_ids])
        first = len(chain[0].prompt_ids)
        (scores,) = model.score(ids[:first], [ids[first:]])
        for sample in chain:
            start = len(sample.prompt_ids) - first
            log_probs = np.asarray(scores[start : start + len(sample.token_ids)], np.float32)
            done.append(replace(sample, log_probs=log_probs.copy(), temperature=1.0))
    return done


def _said(step: Step) -> Completion:
    """Return the reply of a recorded step."""
    sample = step.sample
    if sample is None:
        none = np.empty(0, np.int32)
        return Completion(none, np.empty(0, np.float32), step.action, "stop", 0)
    return Completion(sample.token_ids, sample.log_probs, "", sample.finish, sample.version)
