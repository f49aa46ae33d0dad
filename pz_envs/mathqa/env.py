r"""The mathematics environment: one problem an episode, one or several tries.

The reply's ``<answer>`` tag or ``\boxed{}`` holds the answer (see ``replies``; a line "Answer: 5"
will do too), which ``grading`` compares with the gold answer. Success means graded right; nothing
else scores. A reply that cannot be read, and an answer longer than ``MAX_ANSWER``, use up a try.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from pz_envs.errors import ConfigError, did_you_mean
from pz_envs.mathqa.generator import LEVELS, generate
from pz_envs.mathqa.grading import MAX_ANSWER, Grader
from pz_envs.mathqa.sets import Problem, load_path, load_set
from pz_envs.seeding import generator
from pz_envs.textenv import Outcome, ReplyFormat, TextEnv

_INSTRUCTION = (
    "Solve the problem. Put the final answer alone, exact and simplified, between <answer> and "
    "</answer> or into \\boxed{}."
)
_SPLITS = ("train", "test")


class MathEnv(TextEnv):
    """A problem in, its answer out.

    ``info["extra"]`` holds ``dataset``, ``level`` (of generated problems, else None), ``tries``,
    ``attempts`` (tries used), ``solved_at`` (the try that was right, else None) and ``graded``
    (which step of the grading decided, see ``grading.Verdict``). Solved at the first attempt is
    ``solved_at == 1``; solved within k tries is ``solved_at is not None``.

    Args:
        dataset: ``"generated"`` for procedural problems, which need no data and no extra package
            and are graded as exact numbers, or a name in ``sets.SETS``.
        path: a file of one's own in place of ``dataset``, taken whole; see ``sets``.
        split: ``"train"`` or ``"test"``; generated problems of the two never coincide. By default
            train where the set has it.
        level: difficulty of generated problems, 1 to 5; None mixes them.
        tries: answers an episode allows; after a wrong one the problem is shown again.
        format_reward: paid once an episode for the first answer that could be read, right or
            wrong; added to the reward, never to the score. With ``reply_format="tags"`` that is
            an answer in a tag or a box.
        admissible_commands: accepted for uniformity; there is no list of commands.
        reply_format: see ``TextEnv``.
        render_mode: see ``TextEnv``.

    ``reset(options={"index": i})`` picks a row of a set or file, else the seed does.

    Raises:
        ConfigError: an argument is out of range, or a package is not installed.
        DataError: the file of the set is missing or broken.
    """

    family: ClassVar[str] = "math"
    reply_tag: ClassVar[str] = "answer"
    can_snapshot: ClassVar[bool] = True

    def __init__(
        self,
        *,
        dataset: str = "generated",
        path: str | None = None,
        split: str | None = None,
        level: int | None = None,
        tries: int = 1,
        format_reward: float = 0.0,
        admissible_commands: bool = True,
        reply_format: ReplyFormat = "auto",
        render_mode: str | None = None,
    ) -> None:
        super().__init__(reply_format=reply_format, render_mode=render_mode)
        generated = dataset == "generated" and path is None
        if split not in (None, *_SPLITS):
            raise ConfigError(
                f"No split {split!r}.{did_you_mean(str(split), _SPLITS)} Allowed: train, test"
            )
        if not 1 <= tries <= 100:
            raise ConfigError(f"tries={tries}: allowed are 1 to 100")
        if level is not None and (not generated or level not in LEVELS):
            raise ConfigError(f"level={level}: allowed are 1 to 5, and only generated problems")
        if not generated and importlib.util.find_spec("math_verify") is None:
            raise ConfigError(
                "`math_verify` is not installed. Install it: pip install 'pz-envs[math]'"
            )
        self._dataset = dataset if path is None else "file"
        self._split = split
        self._level = level
        self._tries = tries
        self._format_reward = format_reward
        self._problems: tuple[Problem, ...] | None = None
        if path is not None:
            self._problems = load_path(path)
        elif not generated:
            self._problems = load_set(dataset, split)
        self._grader = Grader(exact=generated)
        self._problem = Problem("", "", "")
        self._problem_level: int | None = None
        self._used = 0
        self._format_paid = False

    def expert_action(self) -> str | None:
        """Return the gold answer; None when all is over."""
        if self._outcome is None or self._outcome.terminated:
            return None
        return self._problem.answer

    def random_action(self, rng: np.random.Generator) -> str | None:
        """Return a random whole number below 1000."""
        return str(int(rng.integers(1000)))

    def close(self) -> None:
        """Leave the shared grading process, which ends with its last user."""
        self._grader.close()
        super().close()

    def _start(self, seed: int, options: Mapping[str, Any]) -> Outcome:
        self._problem, self._problem_level = self._choose(seed, options.get("index"))
        self._used = 0
        self._format_paid = False
        self._task_id = self._problem.id
        self._max_score = 1.0
        self._instruction = _INSTRUCTION
        if self._tries > 1:
            self._instruction += f" You have {self._tries} tries."
        return Outcome(self._problem.text, score=0.0, extra=self._extra())

    def _advance(self, command: str) -> Outcome:
        if len(command) > MAX_ANSWER:
            complaint = f"The answer is {len(command)} characters long; {MAX_ANSWER} are allowed."
            return self._wrong(complaint, valid=False)
        reward = 0.0 if self._format_paid else self._format_reward
        self._format_paid = True
        verdict = self._grader.grade(self._problem.answer, command)
        if not verdict.right:
            return self._wrong("That is not the answer.", reward=reward, graded=verdict.how)
        self._used += 1
        return Outcome(
            "Correct.",
            score=1.0,
            reward=1.0 + reward,
            terminated=True,
            success=True,
            extra=self._extra(solved_at=self._used, graded=verdict.how),
        )

    def _unreadable(self, last: Outcome, complaint: str) -> Outcome:
        return self._wrong(complaint, valid=False)

    def _save(self) -> bytes:
        problem = self._problem
        state = [problem.id, problem.text, problem.answer, self._problem_level]
        return json.dumps([*state, self._used, self._format_paid]).encode()

    def _load(self, engine: bytes, header: Mapping[str, Any]) -> None:
        name, text, answer, self._problem_level, self._used, self._format_paid = json.loads(engine)
        self._problem = Problem(name, text, answer)

    def _choose(self, seed: int, index: int | None) -> tuple[Problem, int | None]:
        if self._problems is None:
            if index is not None:
                raise ConfigError(
                    f"options={{'index': {index!r}}} needs rows to choose from: make the "
                    "environment with dataset='gsm8k' or a path; generated problems go by seed"
                )
            return generate(generator("math", seed), self._split or "train", self._level)
        if index is None:
            index = seed % len(self._problems)
        if not 0 <= index < len(self._problems):
            raise ConfigError(f"index={index}: allowed are 0 to {len(self._problems) - 1}")
        return self._problems[index], None

    def _wrong(
        self, complaint: str, *, valid: bool = True, reward: float = 0.0, graded: str | None = None
    ) -> Outcome:
        self._used += 1
        left = self._tries - self._used
        outcome = Outcome(
            complaint,
            score=0.0,
            reward=reward,
            valid=valid,
            terminated=left == 0,
            extra=self._extra(graded=graded),
        )
        if left == 0:
            return outcome
        again = f"{complaint} Tries left: {left}.\n\n{self._problem.text}"
        return replace(outcome, observation=again)

    def _extra(self, *, solved_at: int | None = None, graded: str | None = None) -> dict[str, Any]:
        return {
            "dataset": self._dataset,
            "level": self._problem_level,
            "tries": self._tries,
            "attempts": self._used,
            "solved_at": solved_at,
            "graded": graded,
        }
