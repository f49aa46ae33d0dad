r"""Decoupled clip and dynamic sampling policy optimisation (Yu et al., DAPO, 2025).

GRPO with five changes:

- clip-higher: the ratio is clipped to 1 - .2 and 1 + .28, which leaves room for rare tokens;
- the mean over all tokens of the batch, and no KL term;
- dynamic sampling: a task whose rollouts all earn the same is replaced by another, until every
  task of the step has a group to learn from or ``max_rounds`` rounds were played;
- a soft punishment of long rollouts, added to the reward: 0 up to ``overlong_limit`` -
  ``overlong_cache`` tokens, falling to -1 at the limit (eq. 13). Sampled tokens are counted, never
  the environment's words;
- as an option, rollouts that were cut short are left out of the loss (overlong filtering).

A round plays just as many new tasks as groups are missing, so there is never a surplus to carry
over. Every rollout is yielded and stored, and counts in the step's figures; the credit rule leaves
out what teaches nothing. Whether it does is judged by the reward before the punishment.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pydantic

from pz_agents.algorithms import Algorithm, Credit
from pz_agents.algorithms.credit import Scale, group_advantages, overlong_penalty, varied
from pz_agents.algorithms.losses import (
    Aggregation,
    Loss,
    Tokens,
    aggregate,
    clipped_policy_loss,
    ratio,
    ratio_stats,
)
from pz_agents.algorithms.rows import rewards_of, rows_with
from pz_agents.config import Settings
from pz_agents.rollout.programs import RolloutContext, Task, single
from pz_agents.sdk.types import Trajectory
from pz_envs.errors import ConfigError
from pz_envs.seeding import derive_seed

_logger = logging.getLogger(__name__)


class Options(Settings):
    """What can be changed about DAPO."""

    clip_low: float = pydantic.Field(default=0.2, ge=0, le=1)
    """The ratio is clipped below 1 - clip_low."""

    clip_high: float = pydantic.Field(default=0.28, ge=0)
    """The ratio is clipped above 1 + clip_high."""

    scale: Scale = "group"
    """What advantages are divided by, as in GRPO."""

    aggregation: Aggregation = "token_mean"
    """How token losses become one number."""

    dynamic_sampling: bool = True
    """Replace tasks whose rollouts all earn the same."""

    max_rounds: int = pydantic.Field(default=10, ge=1)
    """Most rounds of one step, the first included."""

    when_short: Literal["train", "stop"] = "train"
    """After the last round, train on the groups there are, or end the run."""

    overlong_limit: int = pydantic.Field(default=20480, ge=1)
    """Sampled tokens of a rollout from which on the punishment is whole."""

    overlong_cache: int = pydantic.Field(default=4096, ge=1)
    """The punishment begins this many tokens before the limit."""

    overlong_factor: float = pydantic.Field(default=1.0, ge=0)
    """Weight of the punishment; 0 turns it off."""

    filter_overlong: bool = False
    """Leave rollouts cut by a limit on turns, tokens or time, or in mid-reply, out of the loss;
    their rewards still count in their groups' means."""

    @pydantic.model_validator(mode="after")
    def _cache_within_limit(self) -> Options:
        if self.overlong_cache > self.overlong_limit:
            raise ValueError(
                f"overlong_cache {self.overlong_cache} is more than overlong_limit "
                f"{self.overlong_limit}, so even an empty rollout would be punished; set "
                f"overlong_cache to at most {self.overlong_limit}, or a higher overlong_limit"
            )
        return self


def program(context: RolloutContext, tasks: Sequence[Task]) -> Iterator[Trajectory]:
    """Play each task's group, and another task's in place of one whose rewards are all equal.

    Raises:
        ConfigError: ``when_short`` is ``stop`` and groups are still missing after the last round.
    """
    options = context.options if isinstance(context.options, Options) else Options()
    missing = list(tasks)
    for number in range(options.max_rounds if options.dynamic_sampling else 1):
        played: list[Trajectory] = []
        for trajectory in single(context, [_replacement(task, number) for task in missing]):
            played.append(trajectory)
            yield trajectory
        names = [item.group_id for item in played]
        usable = {
            name
            for name, good in zip(names, varied(rewards_of(played), names), strict=True)
            if good
        }
        missing = [task for task in missing if _replacement(task, number).group_id not in usable]
        if not missing:
            return
    if not options.dynamic_sampling:
        return
    message = (
        f"{len(missing)} of {len(tasks)} groups still earn all the same after "
        f"{options.max_rounds} rounds, the first being {missing[0].group_id}; the tasks are too "
        "hard or too easy for this policy"
    )
    if options.when_short == "stop":
        raise ConfigError(
            f"{message}. Change the environment's settings, raise `group_size` or `max_rounds`, "
            "or set `when_short` to train"
        )
    _logger.warning("%s", message)


def credit(trajectories: Sequence[Trajectory], options: Options) -> Credit:
    """Give group advantages of the punished rewards to rollouts of groups that teach something."""
    names = [item.group_id for item in trajectories]
    rewards = rewards_of(trajectories)
    played = len({name for name, reward in zip(names, rewards, strict=True) if reward == reward})
    lengths = [item.sampled_tokens for item in trajectories]
    penalties = overlong_penalty(lengths, options.overlong_limit, options.overlong_cache)
    shaped = rewards + options.overlong_factor * penalties
    shaped[~varied(rewards, names)] = np.nan
    advantages = group_advantages(shaped, names, scale=options.scale)
    overlong = np.array([is_overlong(item) for item in trajectories], np.bool_)
    if options.filter_overlong:
        advantages = replace(advantages, used=advantages.used & ~overlong)
    count = max(len(trajectories), 1)
    stats = {
        "groups": played,
        "usable_groups": advantages.usable,
        "overlong": float(overlong.sum()) / count,
        "overlong_penalty": float(penalties.sum()) / count,
    }
    return Credit(rows_with(trajectories, advantages), stats)


def is_overlong(trajectory: Trajectory) -> bool:
    """Return whether a rollout was cut for its length: by a limit, or in the middle of a reply."""
    if trajectory.truncated in ("turns", "tokens", "time"):
        return True
    samples = [step.sample for step in trajectory.steps if step.sample is not None]
    return bool(samples) and samples[-1].finish == "length"


def loss(tokens: Tokens, options: Options) -> Loss:
    """Return the policy loss, clipped further above than below."""
    ratios = ratio(tokens.log_probs, tokens.old_log_probs, tokens.mask)
    per_token = clipped_policy_loss(
        ratios, tokens.advantages, tokens.mask, options.clip_low, options.clip_high
    )
    stats = ratio_stats(tokens, ratios, options.clip_low, options.clip_high)
    return Loss(aggregate(per_token, tokens.mask, options.aggregation, tokens.totals), stats)


def _replacement(task: Task, number: int) -> Task:
    """Return what is played for ``task`` in round ``number``: itself in round 0."""
    if number == 0:
        return task
    seed = derive_seed(task.env_seed, "refill", number) % 2**31
    return replace(task, env_seed=seed, group_id=f"{task.group_id}/refill{number:02d}")


DAPO = Algorithm(program=program, credit=credit, loss=loss, defaults=Options())
