"""The playing side of a run: the policy, the agent that plays with it, its tasks, its evaluation.

Batch ``n`` of a run is the same tasks under the same keys wherever and whenever it is played; with
the same weights it is the same episodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pz_agents.algorithms import Algorithm, load_algorithm
from pz_agents.errors import WrongModelError
from pz_agents.rollout import EpisodeSpec, Limits, RolloutContext, Task, run_episodes
from pz_agents.sdk.types import Trajectory
from pz_agents.training.mixture import DATA_ENV, ORDERED, DataEnv, Mixture, env_row, load_mixture
from pz_agents.training.settings import TrainSettings, algorithm_options
from pz_agents.training.stopping import check_metric
from pz_envs.errors import require
from pz_envs.seeding import derive_seed

if TYPE_CHECKING:
    from pz_agents.models import LanguageModel
    from pz_agents.training.rewards import Rewards

_ELSEWHERE = ("openai:", "scripted:", "supervised:")
"""Beginnings of models whose weights another process has."""


def check(settings: TrainSettings, *, plays: bool = True) -> None:
    """Raise what is wrong with the settings before a run begins, as far as that is quickly seen.

    Args:
        settings: of the run.
        plays: episodes are played on this machine, so it must have the environment and its data.

    Raises:
        AgentError: there is no such reward function, or no such function for ``eval_metrics``.
        ConfigError: an environment, algorithm, model, option or argument does not exist, or a
            package is not installed.
        DataError: a file that is trained or evaluated on cannot be read.
        WrongModelError: there is no such model, it cannot be trained, or it is no critic or no
            reward model.
    """
    from pz_agents.models import model_folder, untrainable

    options = algorithm_options(settings)
    env_row(settings.env)
    require("trl", "pz-agents[train]")
    for name in (settings.reward_function, settings.eval_metrics):
        if name:
            from pz_agents.training.rewards import load_function

            load_function(name)
    check_metric(
        settings.early_stopping,
        evaluates=settings.eval_episodes > 0,
        own_metrics=bool(settings.eval_metrics),
    )
    critic = str(getattr(options, "critic_model", ""))
    if critic or settings.reward_model:
        from pz_agents.training.critic import classifier_folder

        if critic:
            classifier_folder(critic, "critic_model")
        if settings.reward_model:
            classifier_folder(settings.reward_model, "reward_model")
    if settings.model.startswith(_ELSEWHERE):
        raise WrongModelError(f"{untrainable(settings.model)}.")
    if settings.model != "tiny" and not settings.model.startswith("vllm:"):
        model_folder(settings.model)
    splits: list[Literal["train", "eval"]] = ["train"] if plays else []
    if settings.eval_episodes:
        splits.append("eval")
    for split in splits:
        _make_env(settings, None, split)(settings.env).close()


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

        from pz_agents.models import load_model, untrainable
        from pz_agents.models.transformers import TransformersModel

        torch.set_num_threads(settings.threads)
        disable_progress_bar()
        self.settings = settings
        self.options = algorithm_options(settings)
        self.algorithm: Algorithm = load_algorithm(settings.algorithm)
        policy = load_model(str(model or settings.model))
        if not isinstance(policy, TransformersModel):
            raise WrongModelError(f"{untrainable(settings.model)}.")
        self.policy = policy
        self.agent = make_agent(settings, policy, settings.temperature)
        self._rewards: Rewards | None = None
        if settings.reward_function or settings.reward_model:
            from pz_agents.training.rewards import Rewards

            self._rewards = Rewards(settings, policy)

    def play(self, number: int) -> list[Trajectory]:
        """Play batch ``number`` with the policy as it is; sorted by group and attempt."""
        return play_batch(self.settings, self.agent, number, range(self.settings.groups_per_step))

    def paid(
        self, played: Sequence[Trajectory], split: Literal["train", "eval"] = "train"
    ) -> list[Trajectory]:
        """Return the episodes with what the settings' function and reward model pay for them."""
        if self._rewards is None:
            return list(played)
        if self.settings.env != DATA_ENV:
            return self._rewards(played)
        mixture = _mixture(self.settings, split)
        return self._rewards(played, lambda item: mixture.row(item.env_seed))

    def progress(self, batch: int) -> dict[str, float]:
        """Return how often a data set has been gone through after ``batch`` batches."""
        if self.settings.env != DATA_ENV:
            return {}
        rows = len(_mixture(self.settings, "train"))
        return {"epoch": batch * self.settings.groups_per_step / rows}

    def evaluate(self, episodes: int) -> dict[str, float]:
        """Play ``episodes`` held-out episodes greedily; a failed one counts as no success.

        Returns:
            ``success`` with its 95 % interval ``low`` to ``high`` (Wilson), ``score_norm``,
            ``reward``, ``turns``, ``sampled_tokens`` a mean each, the number ``failed``, and what
            the settings' ``eval_metrics`` measured.
        """
        env = env_row(self.settings.env).id
        specs = [
            EpisodeSpec(f"eval/{number}", env, _eval_seed(env, number))
            for number in range(episodes)
        ]
        training = self.policy.network.training
        self.policy.network.eval()
        played = list(
            run_episodes(
                make_agent(self.settings, self.policy, 0.0),
                specs,
                make_env=_make_env(self.settings, self.agent, "eval"),
                limits=Limits(turns=self.settings.max_turns),
                seed=self.settings.seed,
                concurrency=self.settings.concurrency,
            )
        )
        self.policy.network.train(training)
        played.sort(key=lambda item: int(item.key.removeprefix("eval/")))
        played = self.paid(played, "eval")
        low, high = wilson(sum(item.success for item in played), episodes)
        own: Mapping[str, float] = {}
        if self.settings.eval_metrics:
            from pz_agents.training.rewards import call_metrics

            own = call_metrics(self.settings.eval_metrics, played)
        return {
            **own,
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
        return figures[env_row(self.settings.env).metric]


def make_agent(settings: TrainSettings, policy: LanguageModel, temperature: float) -> Any:
    """Return the agent that plays a run's episodes with ``policy``."""
    from pz_agents.sdk.loading import load_agent

    kwargs = {"temperature": temperature, "max_new_tokens": settings.max_new_tokens}
    return load_agent("zeroshot", model=policy, kwargs=kwargs)


def play_batch(
    settings: TrainSettings, agent: Any, number: int, places: Iterable[int]
) -> list[Trajectory]:
    """Play tasks of a run's batch ``number``; sorted by group and attempt.

    Args:
        settings: of the run.
        agent: plays them.
        number: of the batch, from 1.
        places: of the tasks in the batch, from 0. Each is played as if it were alone.
    """
    tasks = [
        Task(
            settings.env,
            _task_seed(settings, number, place),
            f"batch{number:06d}/task{place:04d}",
        )
        for place in places
    ]
    context = RolloutContext(
        agent=agent,
        make_env=_make_env(settings, agent, "train"),
        limits=Limits(turns=settings.max_turns),
        seed=settings.seed,
        concurrency=settings.concurrency,
        group_size=settings.group_size,
        options=algorithm_options(settings),
    )
    played = list(load_algorithm(settings.algorithm).program(context, tasks))
    return sorted(played, key=lambda item: (item.group_id, item.attempt))


def _task_seed(settings: TrainSettings, number: int, place: int) -> int:
    """Return a task's seed; a data set's rows come in order."""
    if settings.env == DATA_ENV:
        return ORDERED + (number - 1) * settings.groups_per_step + place
    return derive_seed(settings.seed, "task", number, place) % 2**31


def _eval_seed(env: str, number: int) -> int:
    return ORDERED + number if env == DATA_ENV else derive_seed("eval", env, number) % 2**31


def _mixture(settings: TrainSettings, split: Literal["train", "eval"]) -> Mixture:
    return load_mixture(settings.datasets, split, settings.seed if split == "train" else 0)


def _make_env(settings: TrainSettings, agent: Any, split: Literal["train", "eval"]) -> Any:
    from pz_envs.catalog import make_env

    if settings.env == DATA_ENV:
        mixture = _mixture(settings, split)
        return lambda env_id: DataEnv(mixture, **settings.env_kwargs)
    commands = True if getattr(agent, "needs_admissible_commands", False) else None
    return partial(make_env, split=split, admissible_commands=commands, **settings.env_kwargs)


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
