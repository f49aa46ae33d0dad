"""A UniZero or PriorZero run in a folder: collect, remember, learn, save; the same call resumes it.

The folder holds ``config.json``, ``metrics.jsonl``, ``timings.jsonl``, ``checkpoints/``, and at the
end ``policy/`` and the curves. What a step does follows from the state before it and (run seed,
step) alone, and a checkpoint is that whole state: models, target, optimisers, texts, replay with
its priorities, and counters. A run that was killed and called again ends with the same weights as
one that was not. Episodes that fail are counted; collections without one whole episode end the run
only when several come in a row.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pz_agents.priorzero import phases
from pz_agents.priorzero.actor import Actor
from pz_agents.priorzero.agent import (
    PriorZeroAgent,
    UniZeroAgent,
    load_weights,
    policy_folder,
    read_policy,
    world_model,
)
from pz_agents.priorzero.collect import Played
from pz_agents.priorzero.evaluate import evaluate, last_evaluation, mean
from pz_agents.priorzero.games import Game
from pz_agents.priorzero.guidance import FOLDER, guidance_of, trained_model
from pz_agents.priorzero.memory import Margin, Memory, packed, unpacked
from pz_agents.priorzero.settings import (
    FREE_TO_CHANGE,
    PriorZeroSettings,
    UniZeroSettings,
    check_resumable,
)
from pz_agents.training import checkpoint
from pz_agents.training.monitors import MetricsLog, read_metrics
from pz_agents.training.plots import plot_panels
from pz_agents.worldmodel.learner import WorldModelLearner
from pz_agents.worldmodel.replay import Replay, ReplaySettings, Segment
from pz_envs.catalog import find
from pz_envs.errors import DataError, InfraError
from pz_envs.files import write_atomic
from pz_envs.seeding import derive_seed, generator

__all__ = ["FREE_TO_CHANGE", "Settings", "last_evaluation", "player", "progress_line", "train"]

Settings = UniZeroSettings

OnProgress = Callable[[int, int, Mapping[str, float]], None]
Alter = Callable[[list[Segment]], list[Segment]]

BARREN_COLLECTIONS = 3
"""Collections in a row without one whole episode, after which a run gives up."""

PANELS = (
    "reward",
    "evaluator_step/reward_mean",
    "train/wm_total_loss",
    "train/llm_total_loss",
    "collector_iter/visit_entropy_mean",
    "collector_iter/llm_agreement_mean",
)
"""What is plotted, as far as a run has it."""

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
        settings: what to do; of UniZero or PriorZero.
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
    for env in settings.games:
        find(env)
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
    plot_panels(read_metrics(folder / "metrics.jsonl"), folder / "training_metrics", PANELS)
    return policy


def player(folder: Path, **kwargs: Any) -> UniZeroAgent:
    """Return the agent that plays what was learned in a run's or policy's folder."""
    settings = read_policy(policy_folder(Path(folder))).settings
    kind = PriorZeroAgent if isinstance(settings, PriorZeroSettings) else UniZeroAgent
    return kind(folder=str(folder), **kwargs)


def progress_line(metrics: Mapping[str, float]) -> str:
    """Return what a person wants to see of a step."""
    parts = [f"turns {metrics['env_steps']:.0f}"]
    shown = {
        "reward": "reward {:.2f}",
        "success": "success {:.2f}",
        "collector_iter/visit_entropy_mean": "visit entropy {:.2f}",
        "train/wm_total_loss": "loss {:.3f}",
        "train/llm_total_loss": "llm loss {:.3f}",
        "evaluator_step/reward_mean": "eval {:.2f}",
    }
    parts += [text.format(metrics[name]) for name, text in shown.items() if name in metrics]
    for name in ("failed_episodes", "failed_priors"):
        if metrics.get(name):
            parts.append(f"{name.replace('_', ' ')} {metrics[name]:.0f}")
    return " ".join(parts)


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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(settings.seed, "weights"))
            model, self.texts = world_model(settings)
        start = policy_folder(Path(settings.start_from)) if settings.start_from else None
        if start and not resumed:
            load_weights(model, start)
        self.learner = WorldModelLearner(model, settings.learner)
        self.replay = Replay(self.texts, settings.replay)
        self.guidance = guidance_of(settings, start and trained_model(start))
        self.memory = Memory(self.replay, self.texts, read_instruction=settings.read_instruction)
        # Batches that were collected and wait to be learned from.
        self.ahead: deque[list[tuple[Segment, Margin]]] = deque()
        self.counters = {
            "step": 0,
            "env_steps": 0,
            "episodes": 0,
            "failed_episodes": 0,
            "barren_collections": 0,
        }
        if self.guidance is not None:
            self.counters["failed_priors"] = 0
        self.owed = {"wm_turns": 0, "llm_turns": 0, "stretch": 0}
        commands: Mapping[str, Sequence[int]] = {}
        if resumed:
            commands = self._load(resumed)
        self.games = [
            Game(
                env,
                number,
                settings,
                self.texts,
                self._collector,
                commands.get(find(env).id, ()),
            )
            for number, env in enumerate(settings.games)
        ]
        self._remember_order()
        self.saved = self.counters["step"]
        self.metrics = MetricsLog(
            folder,
            self.counters["step"],
            monitor=settings.monitor,
            config=settings.model_dump(mode="json"),
        )

    def close(self) -> None:
        """Close the environments and the metrics."""
        for each in self.games:
            each.close()
        self.metrics.close()

    def collect_and_learn(self, on_progress: OnProgress | None) -> None:
        """Take every step that is left, saving now and then and always at the end."""
        settings, counters = self.settings, self.counters
        for step in range(counters["step"] + 1, settings.steps + 1):
            began = time.monotonic()
            played: list[list[Played]] = []
            try:
                if phases.collects(settings, self.owed):
                    played = [game.collect(step) for game in self.games]
            except KeyboardInterrupt:
                # Nothing has changed since the last step but the order of new texts.
                if self.saved < counters["step"]:
                    self._save(None)
                raise
            collected = time.monotonic()
            figures: dict[str, float] = {}
            timings: dict[str, float] = {}
            if played:
                figures, timings = self._store(step, played)
            figures |= self._learn(step)
            counters["step"] = step
            last = step == settings.steps
            learned_at = time.monotonic()
            score = None
            if settings.eval_episodes and (last or step % settings.eval_every == 0):
                found, score = self._evaluate()
                figures |= found
            metrics = {**counters, **figures}
            timings |= {
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

    def _actor(self, **kwargs: Any) -> Actor:
        settings = self.settings
        return Actor(self.learner.model, self.texts, settings, slots=settings.slots, **kwargs)

    def _collector(self, **kwargs: Any) -> Actor:
        guidance = self.guidance
        return self._actor(prior=guidance.prior if guidance and guidance.asked else None, **kwargs)

    def _evaluate(self) -> tuple[dict[str, float], float]:
        guidance = self.guidance
        prior = guidance.prior if guidance else None
        mixed = guidance is not None and guidance.asked
        return evaluate(self.games, self._actor, prior, mixed=mixed)

    def _store(
        self, step: int, played: Sequence[Sequence[Played]]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Remember the whole episodes; returns figures, and those that a clock decides."""
        counters = self.counters
        whole = [each for game in played for each in game if each.segment is not None]
        segments = [each.segment for each in whole if each.segment is not None]
        failed = [each.error for game in played for each in game if each.error is not None]
        counters["episodes"] += len(segments)
        counters["failed_episodes"] += len(failed)
        counters["barren_collections"] = 0 if segments else counters["barren_collections"] + 1
        if counters["barren_collections"] >= BARREN_COLLECTIONS:
            raise InfraError(
                f"{BARREN_COLLECTIONS} collections in a row without one whole episode, the last in "
                f"step {step}: {failed[-1]}. Mend the environment; the same command goes on from "
                "the last checkpoint"
            )
        counters["env_steps"] += sum(len(each.actions) for each in segments)
        if self.guidance is not None:
            counters["failed_priors"] += sum(map(_failed_priors, whole))
        altered = self.alter(segments) if self.alter else segments
        margins = map(self._margin, whole)
        self.ahead.append(list(zip(altered, margins, strict=True)))
        if len(self.ahead) > self.settings.off_policy:
            for segment, margin in self.ahead.popleft():
                self.replay.add(segment)
                self.memory.add(margin)
                for name in ("wm_turns", "llm_turns"):
                    self.owed[name] += len(segment.actions)
        figures = collected([each for game in played for each in game])
        if len(self.games) > 1:
            for game, mine in zip(self.games, played, strict=True):
                reward = mean([each.reward for each in mine if each.segment is not None])
                figures[f"collector_iter/{game.name}/reward_mean"] = reward
        clocked = {name for name in figures if "latency" in name}
        return (
            {name: value for name, value in figures.items() if name not in clocked},
            {name: figures[name] for name in sorted(clocked)},
        )

    def _margin(self, played: Played) -> Margin:
        settings = self.settings
        thinks = (
            isinstance(settings, PriorZeroSettings)
            and settings.language is not None
            and settings.language.reasoning
        )
        return Margin(played.instruction, played.prefixes if thinks else None)

    def _learn(self, step: int) -> dict[str, float]:
        """Do the step's updates of both halves; returns means over the updates."""
        settings, guidance = self.settings, self.guidance
        due = phases.updates(settings, self.owed, step)
        random = generator(settings.seed, "language", step)
        lessons = partial(self._lessons, due.language, random)
        together = isinstance(settings, PriorZeroSettings) and settings.phase == "parallel"
        decisions = lessons() if together else []
        figures = self._learn_world(step, due.world)
        if guidance is not None and due.language:
            learned = guidance.learn(decisions if together else lessons())
            figures |= learned
        self.owed |= phases.counted(settings, self.owed, due)
        return figures

    def _lessons(self, updates: int, random: Any) -> list[Any]:
        if self.guidance is None or not updates:
            return []
        return self.guidance.lessons(self.memory, updates, self.learner, random)

    def _learn_world(self, step: int, updates: int) -> dict[str, float]:
        if not updates:
            return {}
        seed = self.settings.seed
        random = generator(seed, "learn", step)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "dropout", step))
            stats = [self.learner.learn(self.replay, random) for _ in range(updates)]
        for game in self.games:
            game.actor.imagination.refresh()
        found = {name: [line[name] for line in stats] for name in stats[0]}
        names = {name: f"wm_{name}_loss" if name in _LOSSES else name for name in found}
        learned = {f"train/{names[name]}": mean(values) for name, values in found.items()}
        return learned | {"train/updates": float(self.learner.updates)}

    def _remember_order(self) -> None:
        """Note the texts and commands of whole steps: a resumed run must find the same order."""
        self.order = (len(self.texts), {game.env: game.commands for game in self.games})

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
        ahead = Replay(self.texts, ReplaySettings(capacity=2**62))
        for segment, _ in (each for batch in self.ahead for each in batch):
            ahead.add(segment)
        margins = [margin for batch in self.ahead for _, margin in batch]
        sizes = [len(batch) for batch in self.ahead]
        waiting = {"segments": ahead.state(), "margins": packed(margins), "sizes": sizes}
        torch.save({"margins": self.memory.state(), "ahead": waiting}, folder / "memory.pt")
        known = {number: each for number, each in self.texts.vectors.items() if number < count}
        torch.save(known, folder / "vectors.pt")
        state = {
            "counters": self.counters,
            "owed": self.owed,
            "texts": self.texts.strings()[:count],
            "commands": commands,
        }
        write_atomic(folder / "run.json", json.dumps(state))
        policy = folder / "policy"
        write_atomic(policy / "config.json", _config(self.settings))
        torch.save(self.learner.model.state_dict(), policy / "model.pt")
        listed = {env: [self.texts.string(each) for each in its] for env, its in commands.items()}
        write_atomic(policy / "commands.json", json.dumps(listed))
        if self.guidance is not None:
            self.guidance.save(folder)

    def _load(self, resumed: Path) -> Mapping[str, Sequence[int]]:
        """Take over a checkpoint; returns the commands that each game's searches knew."""
        self.learner.load(resumed / "learner.pt")
        state = _read_json(resumed / "run.json")
        for text in state["texts"]:
            self.texts.intern(text)
        self.texts.vectors.update(torch.load(resumed / "vectors.pt", weights_only=True))
        self.replay.load_state(torch.load(resumed / "replay.pt", weights_only=True))
        remembered = torch.load(resumed / "memory.pt", weights_only=True)
        self.memory.load_state(remembered["margins"])
        waiting = remembered["ahead"]
        ahead = Replay(self.texts)
        ahead.load_state(waiting["segments"])
        both = iter(zip(ahead.segments, unpacked(waiting["margins"]), strict=True))
        self.ahead.extend([next(both) for _ in range(size)] for size in waiting["sizes"])
        if self.guidance is not None:
            self.guidance.load(resumed)
        self.counters.update(state["counters"])
        self.owed.update(state["owed"])
        _logger.info("resumed from step %d", self.counters["step"])
        commands: Mapping[str, Sequence[int]] = state["commands"]
        return commands


def _copy_policy(checkpoints: Path, target: Path) -> None:
    newest = checkpoint.newest(checkpoints)
    if newest is None:
        raise InfraError(f"the last checkpoint in {checkpoints} has gone; run again")
    shutil.copytree(newest / "policy", target, dirs_exist_ok=True)
    language = trained_model(newest / "policy")
    if language is not None:
        shutil.copytree(language, target / FOLDER)


def _failed_priors(played: Played) -> int:
    """Return how many of an episode's turns the language model gave no opinion on."""
    if played.segment is None or "llm_success" not in played.statistics:
        return 0
    return round((1.0 - played.statistics["llm_success"]) * len(played.segment.actions))


def collected(played: Sequence[Played]) -> dict[str, float]:
    """Return what is logged of a collection; means are over whole episodes."""
    whole = [each for each in played if each.segment is not None]
    rewards = [each.reward for each in whole]
    lengths = [len(each.segment.actions) for each in whole if each.segment is not None]
    names = sorted({name for each in whole for name in each.statistics})
    figures = {
        f"collector_iter/{name}_mean": mean(
            [each.statistics[name] for each in whole if name in each.statistics]
        )
        for name in names
    }
    return figures | {
        "reward": mean(rewards),
        "success": mean([float(each.success) for each in whole]),
        "collector_iter/reward_mean": mean(rewards),
        "collector_iter/reward_max": max(rewards, default=0.0),
        "collector_iter/episode_length_mean": mean([float(length) for length in lengths]),
        "collector_iter/failed": float(len(played) - len(whole)),
    }


def _config(settings: UniZeroSettings) -> str:
    return json.dumps(settings.model_dump(mode="json"), indent=1)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
