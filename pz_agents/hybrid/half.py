"""The language model's half: states become rollouts, and rollouts updates, the critic's first.

Each rollout is fresh: its replies are sampled by the weights that learn from them, so that with one
update a rollout the policy ratio is 1. PPO's critic, the losses, the rows and what guards an update
are those of ``training`` and ``algorithms``; with gamma = lambda = 1 and one turn an episode the
advantage of every token is the reward less the critic's value, normalised over the rollout.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pz_agents.algorithms import load_algorithm
from pz_agents.algorithms.rows import TrainRow
from pz_agents.errors import ModelError
from pz_agents.hybrid.engines import Engines
from pz_agents.hybrid.prompt import HybridPrior
from pz_agents.hybrid.settings import HybridSettings
from pz_agents.hybrid.trials import State, Trials
from pz_agents.models import load_model, untrainable
from pz_agents.models.chat import without_progress_bars
from pz_agents.priorzero.guidance import FOLDER, beginning_of
from pz_agents.priorzero.memory import Memory
from pz_agents.priorzero.prior import LanguagePrior
from pz_agents.rollout.budget import FailureBudget
from pz_agents.sdk.types import Trajectory
from pz_agents.training.critic import Critic
from pz_agents.training.rewards import call_rewards, load_function
from pz_agents.training.settings import algorithm_options
from pz_agents.training.update import Updater
from pz_agents.worldmodel.learner import WorldModelLearner
from pz_envs.seeding import derive_seed

_STATE = "state.pt"
_BETAS = (0.9, 0.95)
_FIGURES = (
    *("policy_loss", "value_loss", "entropy", "ratio", "approx_kl", "kl", "clip_low", "clip_high"),
    *("value_clip", "advantage", "advantage_std", "value", "return", "explained_variance"),
    *("grad_norm", "critic_grad_norm", "learning_rate", "critic_learning_rate", "engine_gap"),
    *("skipped_updates", "critic_skipped_updates", "out_of_memory", "usable_groups", "groups"),
)
"""What is logged of the updates, as far as the algorithm has it."""

Rollout = Sequence[State]


class Half:
    """See the module.

    Args:
        settings: of the run.
        start: the policy that the run begins with; None: ``settings.language.model``.
        folder: of the run.
        resumed: whether the run was begun before.
        engines: starts the engines with the model that the run begins with; None: there are none.

    Attributes:
        prior: judges with whatever the weights are now.
        asked: whether the search asks it.

    Raises:
        ModelError: the model's weights are not here to be trained.
    """

    def __init__(
        self,
        settings: HybridSettings,
        start: Path | None,
        folder: Path,
        *,
        resumed: bool,
        engines: Callable[[str], Engines] | None = None,
    ) -> None:
        from pz_agents.models.transformers import TransformersModel

        source = beginning_of(settings, start, folder, resumed=resumed)
        model = load_model(str(source))
        if not isinstance(model, TransformersModel):
            raise ModelError(untrainable(model.name))
        self.settings, self._model = settings, model
        prior = HybridPrior(model, settings)
        self.prior: LanguagePrior = prior
        self._prompter = prior.prompter
        self.asked = settings.use_llm_prior_in_mcts
        given = settings.training()
        self._algorithm = load_algorithm(given.algorithm)
        self._options = algorithm_options(given)
        rule = self._algorithm.critic
        # The critic copies the weights as they are before any adapter.
        self._critic = Critic(model, given, self._options, rule) if rule else None
        reference = None
        if getattr(self._options, "beta", 0.0):
            network = model.network
            own = given.lora_rank > 0
            reference = network if own else copy.deepcopy(network).requires_grad_(False)
        self._learner = Updater(
            model.network,
            given,
            partial(self._algorithm.loss, options=self._options),
            reference,
            entropy_gradient=bool(getattr(self._options, "entropy_coef", 0.0)),
        )
        model.autocast = self._learner.autocast
        for updater in (self._learner, *([self._critic] if self._critic else [])):
            for group in updater.optimizer.param_groups:
                group["betas"] = _BETAS
        self._pays = load_function(settings.custom_reward_fn) if settings.custom_reward_fn else None
        self._budget = FailureBudget()
        self.rollouts = 0
        self._unfit = 0
        self._trials: Trials | None = None
        self._engines: Engines | None = None
        if engines is not None:
            self._engines = engines(str(source))
        else:
            self._trials = Trials(settings, model)

    def lessons(
        self,
        memory: Memory,
        updates: int,
        world: WorldModelLearner,
        random: np.random.Generator,
    ) -> list[Rollout]:
        """Draw the states of the rollouts that ``updates`` updates make up.

        Engines begin with the first at once.
        """
        count = updates // self.settings.updates_per_rollout
        rollouts = [self._states(memory, random, self.rollouts + 1 + each) for each in range(count)]
        self._begin(rollouts[0])
        return rollouts

    def learn(self, decisions: list[Rollout]) -> dict[str, float]:
        """Play the rollouts of ``lessons``, each with the weights that the last one left.

        Returns:
            Means over the rollouts, to be logged, and what was done so far.
        """
        lines = []
        for place, states in enumerate(decisions):
            if place:
                self._begin(states)
            played = self._finish(states)
            self.rollouts += 1
            if played:
                lines.append(self._update(played))
            self._model.version = self._learner.updates
        names = dict.fromkeys(name for line in lines for name in line)
        found = {
            name: float(np.mean([line[name] for line in lines if name in line])) for name in names
        }
        counts = {
            "rollouts": self.rollouts,
            "updates": self._learner.updates,
            "unfit_states": self._unfit,
        }
        if self._critic:
            counts["critic_updates"] = self._critic.updates
        return {f"train/llm_{name}": float(value) for name, value in {**found, **counts}.items()}

    def save(self, folder: Path) -> None:
        """Write what is trained into a checkpoint's folder."""
        into = folder / FOLDER
        (into / "optimizer").mkdir(parents=True)
        with without_progress_bars():
            self._model.save(into / "model")
            if self._critic:
                self._critic.save(into)
        torch.save(self._learner.optimizer.state_dict(), into / "optimizer" / "policy.pt")
        state: dict[str, Any] = {
            "rollouts": self.rollouts,
            "unfit": self._unfit,
            "learner": self._learner.state(),
        }
        if self._critic:
            state["critic"] = self._critic.state()
        torch.save(state, into / _STATE)

    def load(self, folder: Path) -> None:
        """Go on from ``save``, bit for bit."""
        from transformers import AutoModelForCausalLM

        source = folder / FOLDER
        with without_progress_bars():
            saved = AutoModelForCausalLM.from_pretrained(source / "model", dtype=torch.float32)
        self._model.load_state(saved.state_dict())
        state = torch.load(source / _STATE, weights_only=True)
        optimizer = torch.load(source / "optimizer" / "policy.pt", weights_only=True)
        self._learner.load_state(state["learner"], optimizer)
        if self._critic:
            with without_progress_bars():
                self._critic.load(source, state["critic"])
        self.rollouts, self._unfit = state["rollouts"], state["unfit"]
        self._model.version = self._learner.updates

    def close(self) -> None:
        """End the engines, or close the games."""
        for each in (self._engines, self._trials):
            if each is not None:
                each.close()

    def _states(self, memory: Memory, random: np.random.Generator, number: int) -> Rollout:
        """Draw the states of a rollout; one that fits no prompt is left out and counted."""
        settings = self.settings
        drawn = memory.draw(settings.rollout_batch_size, random)
        states = []
        for place, reached in enumerate(memory.reached(drawn, settings.language.history)):
            try:
                text, ids = self._prompter.prompt(reached.moment)
            except ModelError:
                self._unfit += 1
                continue
            seeds = [
                derive_seed(settings.seed, "reply", number, place, each) % 2**31
                for each in range(settings.n_samples_per_prompt)
            ]
            states.append(
                State(
                    key=f"rollout{number:06d}/prompt{place:04d}",
                    env=reached.env,
                    env_seed=reached.env_seed,
                    before=reached.before,
                    seen=reached.moment.observation,
                    commands=reached.moment.commands,
                    prompt=text,
                    prompt_ids=ids,
                    seeds=tuple(seeds),
                )
            )
        return states

    def _begin(self, states: Rollout) -> None:
        if self._engines is not None:
            with without_progress_bars():
                self._engines.publish(self._model.network.save_pretrained, self._learner.updates)
            self._engines.begin(states)

    def _finish(self, states: Rollout) -> list[Trajectory]:
        if self._engines is not None:
            return self._engines.finish()
        assert self._trials is not None
        return self._trials.play(states)

    def _update(self, played: Sequence[Trajectory]) -> dict[str, float]:
        """Learn from a rollout: the critic's updates, then the policy's."""
        self._budget.add(played)
        played = self._paid(played)
        told = figures_of(played)
        credit = self._algorithm.credit(played, self._options)
        rows, learned = credit.rows, dict(credit.stats)
        seed = self.settings.seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "critic", self.rollouts))
            if self._critic and self._algorithm.critic and rows:
                values = self._critic.values(rows)
                estimate = self._algorithm.critic.estimate(rows, values, {}, self._options)
                rows = estimate.rows
                learned |= estimate.stats
                learned |= self._critic.learn(rows, values, estimate.returns)
            torch.manual_seed(derive_seed(seed, "learner", self.rollouts))
            learned |= self._improve(rows)
        return told | {name: learned[name] for name in _FIGURES if name in learned}

    def _improve(self, rows: Sequence[TrainRow]) -> dict[str, float]:
        """Take the policy's updates; nothing where no row is of use."""
        if not rows:
            return {}
        learner = self._learner
        step = learner.step_rows(rows)
        updates = []
        for _ in range(learner.settings.updates_per_step):
            if not len(step.numbers):
                step.updates += 1  # fewer rows than mini-batches
                continue
            learner.accumulate(step)
            updates.append(learner.before_update())
            learner.optimizer.step()
            learner.module.zero_grad(set_to_none=True)
        metrics = learner.step_metrics(updates)
        return {"policy_loss" if name == "loss" else name: each for name, each in metrics.items()}

    def _paid(self, played: Sequence[Trajectory]) -> list[Trajectory]:
        """Return the episodes with what the user's function pays beside the terms."""
        if self._pays is None:
            return list(played)
        kept = [item for item in played if item.status == "ok"]
        given = {
            "prompts": [item.steps[0].observation for item in kept],
            "completions": [item.steps[0].action for item in kept],
            "trajectories": kept,
            "commands": [item.steps[0].notes["commands"] for item in kept],
        }
        values = dict(
            zip((item.key for item in kept), call_rewards(self._pays, given), strict=True)
        )
        return [item if item.status != "ok" else _with(item, values[item.key]) for item in played]


def _with(item: Trajectory, value: float | None) -> Trajectory:
    """Return a reply paid ``value`` more; None leaves it out of training."""
    if value is None:
        return replace(item, status="rejected", error="custom_reward_fn has no reward for it")
    notes = {**item.steps[0].notes, "reward_custom": value}
    step = replace(item.steps[0], reward=item.reward + value, notes=notes)
    return replace(item, steps=(step,), reward=item.reward + value)


def figures_of(played: Sequence[Trajectory]) -> dict[str, float]:
    """Return means over a rollout's replies; a failed one counts under ``failed`` alone."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for item in played:
        found["failed"].append(float(item.status == "failed"))
        if item.status != "ok":
            continue
        step = item.steps[0]
        found["reward_mean"].append(item.reward)
        found["score_gain"].append(float(step.notes["gain"] > 0))
        found["valid"].append(float(step.valid))
        found["format"].append(float(not step.format_error))
        found["response_length"].append(float(step.sampled_tokens))
        found["cut"].append(float(item.truncated != ""))
        if "reward_custom" in step.notes:
            found["reward_custom"].append(float(step.notes["reward_custom"]))
    return {name: sum(values) / len(values) for name, values in found.items()}
