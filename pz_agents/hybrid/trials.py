"""Samples replies to prompts of states, and tries each command in the true game.

A state is found again by what led there: the episode's seed and its commands, checked against what
was seen. From its snapshot each distinct command is tried once (where the engine takes no snapshot,
the state is played again). What comes of a reply depends on the state, its seed and the weights,
and on nothing else that is tried beside it, wherever that happens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pz_agents.hybrid.prompt import STOPS, Answer, Prompter, sampled
from pz_agents.hybrid.settings import HybridSettings, RewardSettings
from pz_agents.models.protocol import GenerateRequest, LanguageModel
from pz_agents.sdk.types import Ids, Sample, Step, Trajectory
from pz_envs.errors import ConfigError, DataError, EnvError, PzError
from pz_envs.textenv import Info, TextEnv

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """A state to sample replies to; plain data but for its ids.

    key: of its group. before: the commands that lead there from the seed's start. seen: what the
    game then says. commands: its admissible ones. seeds: one a reply.
    """

    key: str
    env: str
    env_seed: int
    before: tuple[str, ...]
    seen: str
    commands: tuple[str, ...]
    prompt: str
    prompt_ids: Ids
    seeds: tuple[int, ...]

    def plain(self) -> dict[str, Any]:
        """Return plain data, for a runtime."""
        values = asdict(self) | {"prompt_ids": np.asarray(self.prompt_ids, np.int32).tobytes()}
        lists = {name: list(values[name]) for name in ("before", "commands", "seeds")}
        return values | lists

    @staticmethod
    def of(values: Mapping[str, Any]) -> State:
        """Return what ``plain`` was given."""
        lists = {name: tuple(values[name]) for name in ("before", "commands", "seeds")}
        ids = np.frombuffer(values["prompt_ids"], np.int32)
        return State(**{**values, **lists, "prompt_ids": ids})


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a command: what was seen, the gain in score, and the environment's info."""

    observation: str
    gain: float
    info: Info
    terminated: bool


class Trials:
    """See the module.

    Args:
        settings: of the run.
        model: samples, with whatever its weights are now.
    """

    def __init__(self, settings: HybridSettings, model: LanguageModel) -> None:
        self._settings, self._model = settings, model
        self._prompter = Prompter(model, settings)
        self._envs: dict[str, TextEnv] = {}

    def play(self, states: Sequence[State]) -> list[Trajectory]:
        """Return an episode of one turn for each seed of each state, in order.

        A state that cannot be reached again, or whose game breaks, gives failed episodes.

        Raises:
            ConfigError: the environment cannot be made as it is asked for.
            DataError: its data are missing.
            ModelError: the model failed.
        """
        requests = [
            GenerateRequest(
                state.prompt_ids,
                min(self._prompter.reply_tokens, self._model.max_context - len(state.prompt_ids)),
                seed,
                temperature=self._settings.llm_temperature,
                stops=STOPS,
            )
            for state in states
            for seed in state.seeds
        ]
        replies = iter(self._model.generate(requests))
        played: list[Trajectory] = []
        for state in states:
            samples = [
                sampled(state.prompt_ids, next(replies), self._settings.llm_temperature)
                for _ in state.seeds
            ]
            played += self._tried(state, samples)
        return played

    def close(self) -> None:
        """Close the environments."""
        while self._envs:
            self._envs.popitem()[1].close()

    def _tried(self, state: State, samples: Sequence[Sample]) -> list[Trajectory]:
        texts = [self._model.decode(sample.token_ids) for sample in samples]
        answers = [self._prompter.read(text, state.commands) for text in texts]
        wanted = dict.fromkeys(each.command for each in answers if each.command)
        try:
            outcomes = self._outcomes(state, [command for command in wanted if command])
        except (ConfigError, DataError):
            raise
        except PzError as error:
            _logger.warning("%s cannot be tried: %s", state.key, error)
            self._forget(state.env)
            return [
                _failed(state, number, f"{type(error).__name__}: {error}")
                for number in range(len(samples))
            ]
        return [
            self._episode(state, number, sample, text, answer, outcomes)
            for number, (sample, text, answer) in enumerate(
                zip(samples, texts, answers, strict=True)
            )
        ]

    def _outcomes(self, state: State, commands: Sequence[str]) -> dict[str | None, Outcome]:
        """Try each command from the state; under None is the state itself.

        Raises:
            EnvError: the state was not reached again.
        """
        env = self._env(state.env)
        seen, info = self._reach(env, state)
        saved = env.snapshot() if env.can_snapshot and commands else None
        found: dict[str | None, Outcome] = {None: Outcome(seen, 0.0, info, False)}
        for number, command in enumerate(commands):
            if number and saved is not None:
                env.restore(saved)
            elif number:
                self._reach(env, state)
            observation, _, terminated, _, after = env.step(command)
            gain = float(after["score"] - info["score"])
            found[command] = Outcome(observation, gain, after, terminated)
        return found

    def _reach(self, env: TextEnv, state: State) -> tuple[str, Info]:
        seen, info = env.reset(seed=state.env_seed)
        for command in state.before:
            seen, _, _, _, info = env.step(command)
        if seen.strip() != state.seen.strip():
            raise EnvError(
                f"{state.env}, seed {state.env_seed}: after the same {len(state.before)} commands "
                f"the game says {seen.strip()[:80]!r} and not {state.seen.strip()[:80]!r}"
            )
        return seen, info

    def _env(self, env_id: str) -> TextEnv:
        if env_id not in self._envs:
            from pz_envs import catalog

            self._envs[env_id] = catalog.make_env(
                env_id, split="train", **self._settings.env_kwargs
            )
        return self._envs[env_id]

    def _forget(self, env_id: str) -> None:
        env = self._envs.pop(env_id, None)
        if env is not None:
            env.close()

    def _episode(
        self,
        state: State,
        number: int,
        sample: Sample,
        text: str,
        answer: Answer,
        outcomes: Mapping[str | None, Outcome],
    ) -> Trajectory:
        outcome = outcomes[answer.command]
        terms = earned(answer, state.commands, outcome.gain, self._settings.rewards)
        reward = sum(terms.values())
        valid = is_valid(answer.command, state.commands)
        step = Step(
            observation=state.prompt,
            action=text,
            reward=reward,
            score=float(outcome.info["score"]),
            valid=valid,
            format_error=not answer.well_formed,
            sample=sample,
            notes={
                "command": answer.command or "",
                "commands": list(state.commands),
                "gain": outcome.gain,
                **terms,
            },
        )
        return Trajectory(
            key=f"{state.key}/{number}",
            env_id=state.env,
            env_seed=state.env_seed,
            task_id=str(outcome.info["task_id"]),
            group_id=state.key,
            attempt=number,
            steps=(step,),
            final_observation=outcome.observation,
            reward=reward,
            score=float(outcome.info["score"]),
            max_score=float(outcome.info["max_score"]),
            score_norm=float(outcome.info["score_norm"]),
            success=bool(outcome.info["success"]),
            terminated=outcome.terminated,
            truncated="tokens" if sample.finish == "length" else "",
        )


def is_valid(command: str | None, commands: Sequence[str]) -> bool:
    """Return whether a command is one of the list, letter for letter but for case."""
    return command is not None and command.casefold() in {each.casefold() for each in commands}


def earned(
    answer: Answer, commands: Sequence[str], gain: float, rewards: RewardSettings
) -> dict[str, float]:
    """Return what a reply is paid, by term; a reply's reward is their sum.

    Args:
        answer: what it says.
        commands: the state's.
        gain: of the game's score, by the command.
        rewards: what each term is worth.
    """
    valid = is_valid(answer.command, commands)
    return {
        "reward_score_gain": rewards.score_gain if gain > 0 else 0.0,
        "reward_valid": rewards.valid if valid else rewards.invalid,
        "reward_format": rewards.format if answer.well_formed else 0.0,
    }


def _failed(state: State, number: int, error: str) -> Trajectory:
    return Trajectory(
        key=f"{state.key}/{number}",
        env_id=state.env,
        env_seed=state.env_seed,
        task_id="",
        group_id=state.key,
        attempt=number,
        steps=(),
        final_observation="",
        reward=0.0,
        score=0.0,
        max_score=0.0,
        score_norm=0.0,
        success=False,
        terminated=False,
        truncated="",
        status="failed",
        error=error,
    )
