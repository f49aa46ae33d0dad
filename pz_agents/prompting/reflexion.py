"""Reflexion: after an attempt that failed the model says why, and tries the same instance again.

An episode of this agent is up to ``attempts`` attempts at one instance, each from its beginning.
All that they cost is counted: the episode's steps are those of all attempts, its tokens those of
all replies and reflections. Its score and success are the last attempt's. The first attempt is,
token for token, the episode that ``zeroshot`` would play under the same seed, so that the two rows
of a table are the first-episode score and the score after reflection. The notes of each attempt's
first step have its number, its score and success, and the reflection that it was played with.

Whether to go on is decided by the environment's own ``success``: other agents are not told that.

Source: Shinn et al., "Reflexion: Language Agents with Verbal Reinforcement Learning",
arXiv 2303.11366: at most three reflections stay in view.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pz_agents.models.protocol import GenerateRequest, LanguageModel
from pz_agents.prompting.agents import ZeroShot
from pz_agents.prompting.reflection import fitted_guidance, reflection_prompts, with_guidance
from pz_agents.prompting.templates import Template
from pz_agents.rollout.episode import EpisodeSpec, Limits
from pz_agents.rollout.loop import run_episodes
from pz_agents.rollout.slots import MakeEnv
from pz_agents.sdk.types import Action, Step, Trajectory, Turn
from pz_envs.errors import ConfigError
from pz_envs.seeding import derive_seed

_SYSTEM = """\
You are given the log of an attempt at a task that did not reach its goal. Do not retell it. Find \
the decision that lost it, name what should have been done there, and end with a short plan for \
the next attempt at this same task, in concrete actions."""
_SHORT_SYSTEM = "The attempt below failed. Say what to do otherwise next time."
_ASK = "\n\nNew plan:"

_MEMORY = """\
# What your earlier attempts taught
You have tried this task before and did not succeed. You wrote then:

{lessons}

Use it in this attempt."""


@dataclass(frozen=True, slots=True)
class _Lesson:
    """A reflection and what it took to write."""

    text: str
    sampled_tokens: int
    prompt_tokens: int


class Reflexion:
    """Tries an instance several times and reflects in words in between.

    ``play_episodes`` is how it is played; ``act`` alone is one attempt.

    Args:
        model: plays and reflects.
        attempts: most attempts at an instance; 1 is ``zeroshot``.
        memory: most reflections in view, the newest.
        reflection_tokens: most tokens of one; never more than a quarter of the context.

    The others are those of ``ZeroShot``.

    Raises:
        ConfigError: an argument is out of range.
    """

    needs_admissible_commands = True

    def __init__(
        self,
        model: LanguageModel,
        attempts: int = 3,
        memory: int = 3,
        reflection_tokens: int = 256,
        temperature: float = 1.0,
        max_new_tokens: int | None = None,
        template: str | Template | None = None,
        history: int | None = None,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> None:
        for name, value in (
            ("attempts", attempts),
            ("memory", memory),
            ("reflection_tokens", reflection_tokens),
        ):
            if value < 1:
                raise ConfigError(f"{name}={value}: allowed are 1 and above")
        self._player = _Told(model, temperature, max_new_tokens, template, history, top_p, top_k)
        self._attempts = attempts
        self._memory = memory
        self._reflection_tokens = min(reflection_tokens, model.max_context // 4)
        self._temperature = temperature

    def act(self, turns: Sequence[Turn]) -> list[Action]:
        """Return the actions of a first attempt."""
        return self._player.act(turns)

    def end(self, trajectory: Trajectory) -> None:
        """Forget the episode."""
        self._player.end(trajectory)
        self._player.rules.pop(trajectory.key, None)

    def play_episodes(
        self,
        specs: Iterable[EpisodeSpec],
        *,
        make_env: MakeEnv,
        limits: Limits,
        seed: int,
        concurrency: int,
    ) -> Iterator[Trajectory]:
        """Yield one trajectory a spec, of all its attempts; see ``run_episodes``.

        ``limits`` hold for each attempt. ``concurrency`` episodes are played at a time, each round
        of attempts to its end.
        """
        waiting = iter(specs)
        while batch := list(itertools.islice(waiting, concurrency)):
            tried: dict[str, list[Trajectory]] = {spec.key: [] for spec in batch}
            lessons: dict[str, list[_Lesson]] = {spec.key: [] for spec in batch}
            left = {spec.key: spec for spec in batch}
            for attempt in range(self._attempts):
                names = {_attempt_key(key, attempt): key for key in left}
                self._player.memories = {
                    name: self._memory_text(lessons[key]) for name, key in names.items() if attempt
                }
                played = run_episodes(
                    self._player,
                    [
                        replace(left[key], key=name, attempt=left[key].attempt + attempt)
                        for name, key in names.items()
                    ],
                    make_env=make_env,
                    limits=limits,
                    seed=seed,
                    concurrency=concurrency,
                )
                for trajectory in played:
                    key = names[trajectory.key]
                    tried[key].append(trajectory)
                    over = trajectory.success or trajectory.status == "failed"
                    if over or attempt == self._attempts - 1:
                        yield _joined(left.pop(key), tried[key], lessons[key])
                if not left:
                    break
                for key, lesson in self._reflect({key: tried[key][-1] for key in left}, seed):
                    lessons[key].append(lesson)
            self._player.rules.clear()

    def _reflect(
        self, failed: Mapping[str, Trajectory], seed: int
    ) -> Iterator[tuple[str, _Lesson]]:
        """Yield a lesson for each attempt, all sampled in one call."""
        model = self._player.model
        new = self._reflection_tokens
        episodes = [(item, self._player.rules.get(item.key, "")) for item in failed.values()]
        room = model.max_context - new
        prompts = reflection_prompts(model, episodes, room, (_SYSTEM, _SHORT_SYSTEM, ""), _ASK)
        requests = [
            GenerateRequest(
                prompt_ids=prompt,
                max_new_tokens=new,
                seed=derive_seed(seed, "reflexion", item.key),
                temperature=self._temperature,
            )
            for prompt, item in zip(prompts, failed.values(), strict=True)
        ]
        for key, prompt, said in zip(failed, prompts, model.generate(requests), strict=True):
            yield key, _Lesson(said.text.strip(), len(said.token_ids), len(prompt))

    def _memory_text(self, lessons: Sequence[_Lesson]) -> str:
        newest = lessons[-self._memory :]
        return _MEMORY.format(lessons="\n\n".join(lesson.text for lesson in newest))


class _Told(ZeroShot):
    """Plays with what earlier attempts taught, by the episode's key; keeps each one's rules."""

    def __init__(
        self,
        model: LanguageModel,
        temperature: float,
        max_new_tokens: int | None,
        template: str | Template | None,
        history: int | None,
        top_p: float,
        top_k: int,
    ) -> None:
        super().__init__(model, temperature, max_new_tokens, template, history, top_p, top_k)
        self.memories: Mapping[str, str] = {}
        self.rules: dict[str, str] = {}

    def _template_for(self, turn: Turn) -> Template:
        key = turn.episode.key
        self.rules[key] = str(turn.info.get("instruction", ""))
        if key not in self.memories:
            return self.template
        room = self.model.max_context - self._max_new_tokens
        memory = fitted_guidance(self.model, self.memories[key], room)
        return with_guidance(self.template, memory)


def _attempt_key(key: str, attempt: int) -> str:
    return f"{key}/attempt-{attempt}" if attempt else key


def _joined(
    spec: EpisodeSpec, tried: Sequence[Trajectory], lessons: Sequence[_Lesson]
) -> Trajectory:
    """Return all attempts as one episode that ended as the last of them did."""
    steps: list[Step] = []
    for number, attempt in enumerate(tried):
        notes: dict[str, Any] = {
            "attempt": number,
            "attempt_score": attempt.score_norm,
            "attempt_success": attempt.success,
        }
        if number:
            lesson = lessons[number - 1]
            notes |= {
                "reflection": lesson.text,
                "other_tokens": lesson.sampled_tokens,
                "other_prompt_tokens": lesson.prompt_tokens,
            }
        for step in attempt.steps[:1]:
            steps.append(replace(step, notes={**step.notes, **notes}))
        steps += attempt.steps[1:]
    return replace(
        tried[-1],
        key=spec.key,
        attempt=spec.attempt,
        steps=tuple(steps),
        reward=float(sum(step.reward for step in steps)),
        seconds=sum(attempt.seconds for attempt in tried),
    )
