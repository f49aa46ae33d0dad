"""``check_agent``: does an agent keep its contract? It plays, and names the first rule broken."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pz_agents.errors import AgentError
from pz_agents.sdk.protocols import Agent, EndsEpisodes, StartsEpisodes
from pz_agents.sdk.types import Action, Episode, Sample, Trajectory, Turn
from pz_envs.textenv import TextEnv

_EPISODES = 3
_TURNS = 3


def check_agent(
    agent: Agent,
    env_id: str = "pz/Countdown-v0",
    *,
    make_env: Callable[[str], TextEnv] | None = None,
) -> None:
    """Play a few short episodes three times and check every answer.

    An agent whose answers differ between two equal runs only earns a warning; its order of
    answers cannot be checked then.

    Args:
        agent: the agent; it is told the ends of all episodes it was told the starts of.
        env_id: where to play.
        make_env: makes the environment; ``pz_envs.catalog.make_env`` by default.

    Raises:
        AgentError: the rule that was broken, and how.
        ConfigError: there is no such environment.
    """
    if not callable(getattr(agent, "act", None)):
        raise AgentError(f"{agent!r:.200} has no act(turns)")
    if make_env is None:
        make_env = _catalog_env(getattr(agent, "needs_admissible_commands", None))
    first, again = (_play(agent, env_id, make_env, reverse=False) for _ in range(2))
    if first != again:
        warnings.warn(
            f"{type(agent).__name__} answers differently under the same seeds; draw from "
            "generator(turn.seed), or runs cannot be repeated",
            stacklevel=2,
        )
        return
    if first != _play(agent, env_id, make_env, reverse=True):
        raise AgentError(
            "order: with the batch reversed, the actions went to other episodes; act must return "
            "one action a turn in the turns' order, whatever else is in the batch"
        )


def _catalog_env(admissible_commands: bool | None) -> Callable[[str], TextEnv]:
    from pz_envs.catalog import make_env

    return lambda env_id: make_env(env_id, admissible_commands=admissible_commands)


def _play(
    agent: Agent, env_id: str, make_env: Callable[[str], TextEnv], *, reverse: bool
) -> dict[str, list[str]]:
    """Return every episode's actions."""
    # The loop is built on this package, so it can only be imported once the package is there.
    from pz_agents.rollout.loop import EpisodeSpec, Limits, run_episodes

    observer = _Observer(agent, reverse=reverse)
    observer.ask([])
    specs = [EpisodeSpec(f"check/{number}", env_id, number) for number in range(_EPISODES)]
    trajectories = list(
        run_episodes(
            observer,
            specs,
            make_env=make_env,
            limits=Limits(turns=_TURNS),
            seed=0,
            concurrency=_EPISODES,
        )
    )
    observer.raise_broken()
    for trajectory in trajectories:
        if trajectory.status == "failed":
            raise AgentError(f"an episode of {env_id} failed: {trajectory.error}")
    return {item.key: [step.action for step in item.steps] for item in trajectories}


class _Observer:
    """An agent that plays another one and writes down the first rule that it breaks."""

    def __init__(self, agent: Agent, *, reverse: bool) -> None:
        self._agent = agent
        self._reverse = reverse
        self._broken: AgentError | None = None

    @property
    def reset_options(self) -> Mapping[str, Any] | None:
        options: Mapping[str, Any] | None = getattr(self._agent, "reset_options", None)
        return options

    def start(self, episodes: Sequence[Episode]) -> None:
        if isinstance(self._agent, StartsEpisodes):
            self._guard("start", lambda agent: agent.start(episodes))

    def end(self, trajectory: Trajectory) -> None:
        if isinstance(self._agent, EndsEpisodes):
            self._guard("end", lambda agent: agent.end(trajectory))

    def act(self, turns: Sequence[Turn]) -> Sequence[Action | str]:
        ordered = list(reversed(turns)) if self._reverse else list(turns)
        before = [_state(turn) for turn in ordered]
        answers = self.ask(ordered)
        for turn, state in zip(ordered, before, strict=True):
            if _state(turn) != state:
                self._break(
                    f"environment: act left {turn.episode.env_id} in another state than it found "
                    "it in; snapshot() before using episode.env and restore() after"
                )
        return list(reversed(answers)) if self._reverse else answers

    def ask(self, turns: Sequence[Turn]) -> list[Action | str]:
        """Return the agent's answers to ``turns``, checked."""
        answers = self._guard("act", lambda agent: agent.act(turns))
        if not isinstance(answers, Sequence) or isinstance(answers, str):
            self._break(f"act must return a list of actions; got {type(answers).__name__}")
        if len(answers) != len(turns):
            self._break(f"act was given {len(turns)} turns and returned {len(answers)} actions")
        for answer in answers:
            text = answer.text if isinstance(answer, Action) else answer
            if not isinstance(text, str):
                self._break(f"act must return Action or str; got {answer!r:.200}")
            if isinstance(answer, Action) and answer.sample is not None:
                self._check_sample(answer.sample)
        return list(answers)

    def raise_broken(self) -> None:
        """Raise the first rule that was broken, if any."""
        if self._broken is not None:
            raise self._broken

    def _check_sample(self, sample: Sample) -> None:
        wanted = {"prompt_ids": np.int32, "token_ids": np.int32, "log_probs": np.float32}
        for name, dtype in wanted.items():
            array = getattr(sample, name)
            if getattr(array, "dtype", None) != dtype or getattr(array, "ndim", None) != 1:
                self._break(f"Sample.{name} must be a one-dimensional {dtype.__name__} array")
        if len(sample.token_ids) != len(sample.log_probs):
            self._break("Sample.token_ids and Sample.log_probs must have the same length")
        if not bool(np.all(sample.log_probs <= 1e-6)):
            self._break("Sample.log_probs must be log-probabilities: at most 0, not NaN")

    def _guard(self, what: str, call: Callable[[Any], Any]) -> Any:
        try:
            return call(self._agent)
        except Exception as error:  # foreign code: what it raises is the finding
            found = AgentError(f"{what} raised {type(error).__name__}: {error}")
            self._broken = self._broken or found
            raise found from error

    def _break(self, rule: str) -> None:
        found = AgentError(rule)
        self._broken = self._broken or found
        raise found


def _state(turn: Turn) -> bytes | None:
    env = turn.episode.env
    return env.snapshot() if env is not None and env.can_snapshot else None
