"""The playing side of a run: the policy, the agent that plays with it, its tasks, its evaluation.

Batch ``n`` of a run is the same tasks under the same keys wherever and whenever it is played; with
the same weights it is the same episodes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pz_agents.algorithms import Algorithm, load_algorithm
from pz_agents.errors import ModelError
from pz_agents.rollout import EpisodeSpec, Limits, RolloutContext, Task, run_episodes
from pz_agents.sdk.types import Trajectory
from pz_agents.training.settings import TrainSettings, algorithm_options
from pz_envs.catalog import find
from pz_envs.seeding import derive_seed


class Player:
    """Plays a run's batches and evaluates its policy.

    Args:
        settings: of the run.
        model: what to load; None: the settings' model.

    Raises:
        ModelError: the model's weights cannot be held in this process.
    """

    def __init__(self, settings: TrainSettings, model: str | Path | None = None) -> None:
        import torch
        from transformers.utils.logging import disable_progress_bar

        from pz_agents.models import load_model
        from pz_agents.models.transformers import TransformersModel

        torch.set_num_threads(settings.threads)
        disable_progress_bar()
        self.settings = settings
        self.options = algorithm_options(settings)
        self.algorithm: Algorithm = load_algorithm(settings.algorithm)
        policy = load_model(str(model or settings.model))
        if not isinstance(policy, TransformersModel):
            raise ModelError(
                f"`{settings.model}` cannot be trained here: its weights are not in this process. "
                "Use `tiny` or a folder with a transformers model."
            )
        self.policy = policy
        self.agent = self._agent(settings.temperature)

    def play(self, number: int) -> list[Trajectory]:
        """Play batch ``number`` with the policy as it is; sorted by group and attempt."""
        settings = self.settings
        tasks = [
            Task(
                settings.env,
                derive_seed(settings.seed, "task", number, index) % 2**31,
                f"batch{number:06d}/task{index:04d}",
            )
            for index in range(settings.groups_per_step)
        ]
        context = RolloutContext(
            agent=self.agent,
            make_env=self._make_env("train"),
            limits=Limits(turns=settings.max_turns),
            seed=settings.seed,
            concurrency=settings.concurrency,
            group_size=settings.group_size,
            options=self.options,
        )
        played = list(self.algorithm.program(context, tasks))
        return sorted(played, key=lambda item: (item.group_id, item.attempt))

    def evaluate(self, episodes: int) -> dict[str, float]:
        """Play ``episodes`` held-out episodes greedily; a failed one counts as no success.

        Returns:
            ``success`` with its 95 % interval ``low`` to ``high`` (Wilson), ``score_norm``,
            ``reward``, ``turns``, ``sampled_tokens`` a mean each, and the number ``failed``.
        """
        env = find(self.settings.env).id
        specs = [
            EpisodeSpec(f"eval/{number}", env, derive_seed("eval", env, number) % 2**31)
            for number in range(episodes)
        ]
        training = self.policy.network.training
        self.policy.network.eval()
        played = list(
            run_episodes(
                self._agent(0.0),
                specs,
                make_env=self._make_env("eval"),
                limits=Limits(turns=self.settings.max_turns),
                seed=self.settings.seed,
                concurrency=self.settings.concurrency,
            )
        )
        self.policy.network.train(training)
        played.sort(key=lambda item: int(item.key.removeprefix("eval/")))
        low, high = wilson(sum(item.success for item in played), episodes)
        return {
            "success": _mean([float(item.success) for item in played]),
            "low": low,
            "high": high,
            "score_norm": _mean([item.score_norm for item in played]),
            "reward": _mean([item.reward for item in played]),
            "turns": _mean([float(len(item.steps)) for item in played]),
            "sampled_tokens": _mean([float(item.sampled_tokens) for item in played]),
            "failed": float(sum(item.status == "failed" for item in played)),
        }

    def score(self, figures: Mapping[str, float]) -> float:
        """Return the figure of ``evaluate`` that the environment's tables show."""
        return figures[find(self.settings.env).metric]

    def _agent(self, temperature: float) -> Any:
        from pz_agents.sdk.loading import load_agent

        kwargs = {"temperature": temperature, "max_new_tokens": self.settings.max_new_tokens}
        return load_agent("zeroshot", model=self.policy, kwargs=kwargs)

    def _make_env(self, split: Literal["train", "eval"]) -> Any:
        from pz_envs.catalog import make_env

        commands = True if getattr(self.agent, "needs_admissible_commands", False) else None
        return partial(
            make_env, split=split, admissible_commands=commands, **self.settings.env_kwargs
        )


def episode_figures(trajectories: Sequence[Trajectory], version: int) -> dict[str, float]:
    """Return means over the step's episodes; a failed one counts as reward 0, no success.

    Where a program also retries and reflects, the means are over its first attempts alone.

    Args:
        trajectories: of one step.
        version: of the weights now; ``staleness`` is how many updates the episodes' are behind.
    """
    first = [item for item in trajectories if item.kind == "base"]
    versions = [step.sample.version for item in trajectories for step in item.steps if step.sample]
    return {
        "reward": _mean([item.reward for item in first]),
        "success": _mean([float(item.success) for item in first]),
        "turns": _mean([float(len(item.steps)) for item in first]),
        "sampled_tokens": float(sum(item.sampled_tokens for item in trajectories)),
        "truncated": _mean([float(item.truncated != "") for item in first]),
        "failed": float(sum(item.status == "failed" for item in trajectories)),
        "staleness": version - _mean([float(each) for each in versions]) if versions else 0.0,
    }


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, 1927)."""
    z = 1.959963984540054
    share = successes / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    half = z * spread / (1 + z * z / count)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
