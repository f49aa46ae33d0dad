"""A UniZero run in a folder: collect, remember, learn, save; the same call resumes it.

The folder holds ``config.json``, ``metrics.jsonl``, ``timings.jsonl``, ``checkpoints/``, and at the
end ``policy/`` and the curves. What a step does follows from the state before it and (run seed,
step) alone, and a checkpoint is that whole state: model, target, optimiser, texts, replay with its
priorities, and counters. A run that was killed and called again ends with the same weights as one
that was not. Episodes that fail are counted; collections without one whole episode end the run
only when several come in a row.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pz_agents.priorzero.actor import Actor
from pz_agents.priorzero.agent import UniZeroAgent
from pz_agents.priorzero.collect import Played, Playground, Task
from pz_agents.priorzero.settings import FREE_TO_CHANGE, UniZeroSettings, check_resumable
from pz_agents.training import checkpoint
from pz_agents.training.monitors import MetricsLog, read_metrics
from pz_agents.training.plots import plot_metrics
from pz_agents.worldmodel.learner import WorldModelLearner
from pz_agents.worldmodel.network import WorldModel
from pz_agents.worldmodel.replay import Replay, Segment
from pz_agents.worldmodel.texts import Texts
from pz_envs.catalog import find
from pz_envs.errors import DataError, InfraError
from pz_envs.files import write_atomic
from pz_envs.seeding import derive_seed, generator

__all__ = ["FREE_TO_CHANGE", "Settings", "player", "progress_line", "train"]

Settings = UniZeroSettings

OnProgress = Callable[[int, int, Mapping[str, float]], None]
Alter = Callable[[list[Segment]], list[Segment]]

BARREN_COLLECTIONS = 3
"""Collections in a row without one whole episode, after which a run gives up."""

_LOSSES = ("total", "latent", "reward", "value", "policy")

_logger = logging.getLogger(__name__)


def train(
    settings: UniZeroSettings,
    folder: Path,
    *,
    resume: str = "auto",
    on_progress: OnProgress | None = None,
    alter: Alter | None = None,
) -> Path:
    """Train until ``settings.steps`` steps are done and return the final policy's folder.

    A run that is finished returns at once; one that was cut short goes on from its newest whole
    checkpoint. Ctrl-C while episodes are played leaves a checkpoint of the last step.

    Args:
        settings: what to do.
        folder: of this run alone.
        resume: ``auto``, ``never``, ``must`` or a checkpoint's path; see ``checkpoint.choose``.
        on_progress: called after each step with the step, the number of steps, and its metrics
            and timings.
        alter: what to do to a step's episodes before they are remembered, for controls.

    Raises:
        AgentError: the environment does not list its commands.
        ConfigError: a setting is wrong, or differs from those the run in ``folder`` began with.
        DataError: every checkpoint in ``folder`` is damaged, or the environment's data are missing.
        InfraError: episodes keep failing.
    """
    folder = Path(folder)
    find(settings.env)
    resumed = checkpoint.choose(folder, resume)
    if resumed:
        check_resumable(_read_json(resumed / "policy" / "config.json"), settings, str(folder))
    policy = folder / "policy"
    done = checkpoint.step_of(resumed) if resumed else 0
    if done >= settings.steps and not checkpoint.problems(policy):
        return policy
    write_atomic(folder / "config.json", _config(settings))
    torch.set_num_threads(settings.threads)
    run = _Run(settings, folder, resumed, alter)
    try:
        run.collect_and_learn(on_progress)
    finally:
        run.close()
    checkpoint.write_folder(policy, partial(_copy_policy, folder / "checkpoints"))
    plot_metrics(read_metrics(folder / "metrics.jsonl"), folder / "training_metrics")
    return policy


def player(folder: Path, **kwargs: Any) -> UniZeroAgent:
    """Return the agent that plays what was learned in a run's or policy's folder."""
    return UniZeroAgent(folder=str(folder), **kwargs)


def progress_line(metrics: Mapping[str, float]) -> str:
    """Return what a person wants to see of a step."""
    line = (
        f"turns {metrics['env_steps']:.0f} reward {metrics['reward']:.2f} "
        f"success {metrics['success']:.2f} "
        f"visit entropy {metrics.get('collector_iter/visit_entropy_mean', 0.0):.2f} "
        f"loss {metrics.get('train/wm_total_loss', 0.0):.3f}"
    )
    if "evaluator_step/reward_mean" in metrics:
        line += f" eval {metrics['evaluator_step/reward_mean']:.2f}"
    if metrics["failed_episodes"]:
        line += f" failed {metrics['failed_episodes']:.0f}"
    return line


class _Run:
    """The parts of a run and what it has done so far."""

    def __init__(
        self,
        settings: UniZeroSettings,
        folder: Path,
        resumed: Path | None,
        alter: Alter | None,
    ) -> None:
        self.settings, self.folder, self.alter = settings, folder, alter
        self.texts = Texts(settings.network.buckets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(settings.seed, "weights"))
            model = WorldModel(settings.network)
        self.learner = WorldModelLearner(model, settings.learner)
        self.replay = Replay(self.texts, settings.replay)
        self.counters = {
            "step": 0,
            "env_steps": 0,
            "episodes": 0,
            "failed_episodes": 0,
            "barren_collections": 0,
        }
        commands: Sequence[int] = ()
        if resumed:
            commands = self._load(resumed)
        self.actor = Actor(
            model, self.texts, settings, slots=settings.slots, explore=True, commands=commands
        )
        self._remember_order()
        self.saved = self.counters["step"]
        self.metrics = MetricsLog(
            folder,
            self.counters["step"],
            monitor=settings.monitor,
            config=settings.model_dump(mode="json"),
        )
        self.playgrounds: dict[str, Playground] = {}

    def close(self) -> None:
        """Close the environments and the metrics."""
        for each in self.playgrounds.values():
            each.close()
        self.metrics.close()

    def collect_and_learn(self, on_progress: OnProgress | None) -> None:
        """Take every step that is left, saving now and then and always at the end."""
        settings, counters = self.settings, self.counters
        for step in range(counters["step"] + 1, settings.steps + 1):
            began = time.monotonic()
            try:
                played = self._collect(step)
            except KeyboardInterrupt:
                # Nothing has changed since the last step but the order of new texts.
                if self.saved < counters["step"]:
                    self._save(None)
                raise
            collected = time.monotonic()
            turns = self._store(step, played)
            learned = self._learn(step, turns)
            counters["step"] = step
            last = step == settings.steps
            metrics = {**counters, **_collected(played), **learned}
            learned_at = time.monotonic()
            score = None
            if settings.eval_episodes and (last or step % settings.eval_every == 0):
                figures = self._evaluate()
                metrics |= {f"evaluator_step/{name}": value for name, value in figures.items()}
                score = figures["success" if find(settings.env).metric == "success" else "score"]
            timings = {
                "seconds": time.monotonic() - began,
                "collect_seconds": collected - began,
                "learn_seconds": learned_at - collected,
            }
            self.metrics.write(metrics, timings)
            self._remember_order()
            if last or step % settings.save_every == 0:
                self._save(score)
            if on_progress is not None:
                on_progress(step, settings.steps, {**metrics, **timings})

    def _collect(self, step: int) -> list[Played]:
        seed = self.settings.seed
        tasks = [
            Task(f"step{step}/episode{number}", derive_seed(seed, "collect", step, number) % 2**31)
            for number in range(self.settings.episodes_per_step)
        ]
        return self._play(self.actor, "train", tasks)

    def _evaluate(self) -> dict[str, float]:
        """Play held-out episodes without noise; a failed one counts as nothing gained."""
        settings = self.settings
        actor = Actor(
            self.learner.model,
            self.texts,
            settings,
            slots=settings.slots,
            explore=False,
            commands=self.actor.imagination.commands,
        )
        env = find(settings.env).id
        tasks = [
            Task(f"eval/{number}", derive_seed("eval", env, number) % 2**31)
            for number in range(settings.eval_episodes)
        ]
        played = self._play(actor, "eval", tasks)
        rewards = [each.reward for each in played]
        return {
            "reward_mean": _mean(rewards),
            "reward_max": max(rewards),
            "reward_std": float(np.std(rewards)),
            "score": _mean([each.score_norm for each in played]),
            "success": _mean([float(each.success) for each in played]),
            "failed": float(sum(each.error is not None for each in played)),
        }

    def _play(
        self, actor: Actor, split: Literal["train", "eval"], tasks: Sequence[Task]
    ) -> list[Played]:
        from pz_envs.catalog import make_env

        settings = self.settings
        if split not in self.playgrounds:
            make = partial(make_env, split=split, admissible_commands=True, **settings.env_kwargs)
            slots = min(settings.slots, len(tasks))
            self.playgrounds[split] = Playground(settings.env, make, slots=slots)
        return self.playgrounds[split].play(
            actor, self.texts, tasks, max_turns=settings.max_turns, seed=settings.seed
        )

    def _store(self, step: int, played: Sequence[Played]) -> int:
        """Remember the whole episodes; returns how many turns they have."""
        counters = self.counters
        segments = [each.segment for each in played if each.segment is not None]
        failed = [each.error for each in played if each.error is not None]
        counters["episodes"] += len(segments)
        counters["failed_episodes"] += len(failed)
        counters["barren_collections"] = 0 if segments else counters["barren_collections"] + 1
        if counters["barren_collections"] >= BARREN_COLLECTIONS:
            raise InfraError(
                f"{BARREN_COLLECTIONS} collections in a row without one whole episode, the last in "
                f"step {step}: {failed[-1]}. Mend the environment; the same command goes on from "
                "the last checkpoint"
            )
        turns = sum(len(each.actions) for each in segments)
        counters["env_steps"] += turns
        for segment in self.alter(segments) if self.alter else segments:
            self.replay.add(segment)
        return turns

    def _learn(self, step: int, turns: int) -> dict[str, float]:
        """Update for the turns that were collected; returns means over the updates."""
        if turns == 0:
            return {}
        seed = self.settings.seed
        random = generator(seed, "learn", step)
        updates = max(1, round(turns * self.settings.replay_ratio))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "dropout", step))
            stats = [self.learner.learn(self.replay, random) for _ in range(updates)]
        self.actor.imagination.refresh()
        found = {name: [line[name] for line in stats] for name in stats[0]}
        names = {name: f"wm_{name}_loss" if name in _LOSSES else name for name in found}
        learned = {f"train/{names[name]}": _mean(values) for name, values in found.items()}
        return learned | {"train/updates": float(self.learner.updates)}

    def _remember_order(self) -> None:
        """Note the texts and commands of whole steps: a resumed run must find the same order."""
        self.order = (len(self.texts), self.actor.imagination.commands)

    def _save(self, score: float | None) -> None:
        self.metrics.sync()
        step = self.counters["step"]
        keep = self.settings.keep_checkpoints
        checkpoint.save(self.folder / "checkpoints", step, self._write, keep, score)
        self.saved = step

    def _write(self, folder: Path) -> None:
        count, commands = self.order
        self.learner.save(folder / "learner.pt")
        torch.save(self.replay.state(), folder / "replay.pt")
        state = {
            "counters": self.counters,
            "texts": self.texts.strings()[:count],
            "commands": commands,
        }
        write_atomic(folder / "run.json", json.dumps(state))
        policy = folder / "policy"
        write_atomic(policy / "config.json", _config(self.settings))
        torch.save(self.learner.model.state_dict(), policy / "model.pt")
        listed = [self.texts.string(number) for number in commands]
        write_atomic(policy / "commands.json", json.dumps(listed))

    def _load(self, resumed: Path) -> Sequence[int]:
        """Take over a checkpoint; returns the commands that the search knew."""
        self.learner.load(resumed / "learner.pt")
        state = _read_json(resumed / "run.json")
        for text in state["texts"]:
            self.texts.intern(text)
        self.replay.load_state(torch.load(resumed / "replay.pt", weights_only=True))
        self.counters.update(state["counters"])
        _logger.info("resumed from step %d", self.counters["step"])
        commands: Sequence[int] = state["commands"]
        return commands


def _copy_policy(checkpoints: Path, target: Path) -> None:
    newest = checkpoint.newest(checkpoints)
    if newest is None:
        raise InfraError(f"the last checkpoint in {checkpoints} has gone; run again")
    shutil.copytree(newest / "policy", target, dirs_exist_ok=True)


def _collected(played: Sequence[Played]) -> dict[str, float]:
    """Return what is logged of a collection; means are over whole episodes."""
    whole = [each for each in played if each.segment is not None]
    rewards = [each.reward for each in whole]
    lengths = [len(each.segment.actions) for each in whole if each.segment is not None]
    names = sorted({name for each in whole for name in each.statistics})
    figures = {
        f"collector_iter/{name}_mean": _mean(
            [each.statistics[name] for each in whole if name in each.statistics]
        )
        for name in names
    }
    return figures | {
        "reward": _mean(rewards),
        "success": _mean([float(each.success) for each in whole]),
        "collector_iter/reward_mean": _mean(rewards),
        "collector_iter/reward_max": max(rewards, default=0.0),
        "collector_iter/episode_length_mean": _mean([float(length) for length in lengths]),
        "collector_iter/failed": float(len(played) - len(whole)),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _config(settings: UniZeroSettings) -> str:
    return json.dumps(settings.model_dump(mode="json"), indent=1)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
