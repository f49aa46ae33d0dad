"""A UniZero or PriorZero run in a folder: collect, remember, learn, save; the same call resumes it.

The folder holds ``config.json``, ``metrics.jsonl``, ``timings.jsonl``, ``checkpoints/``, and at the
end ``policy/`` and the curves. What a step does follows from the state before it and (run seed,
step) alone, and a checkpoint is that whole state: models, target, optimisers, texts, replay with
its priorities, and counters. A run that was killed and called again ends with the same weights as
one that was not. Episodes that fail are counted; collections without one whole episode end the run
only when several come in a row.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pz_agents.interrupt import Interrupt
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
from pz_agents.priorzero.collect import Played, figures_of, mean
from pz_agents.priorzero.evaluate import evaluate
from pz_agents.priorzero.games import Game
from pz_agents.priorzero.guidance import FOLDER, MakeGuide, guidance_of, trained_model
from pz_agents.priorzero.memory import Margin, Memory, Waiting
from pz_agents.priorzero.settings import (
    FREE_TO_CHANGE,
    GuidedSettings,
    UniZeroSettings,
    check_resumable,
)
from pz_agents.priorzero.telling import PANELS, also_named, last_evaluation, progress_line
from pz_agents.rollout.store import take_lock
from pz_agents.training import checkpoint
from pz_agents.training.monitors import MetricsLog, read_metrics
from pz_agents.training.plots import plot_panels
from pz_agents.worldmodel.learner import WorldModelLearner
from pz_agents.worldmodel.replay import Replay, Segment
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

_LOSSES = ("total", "latent", "reward", "value", "policy")

_logger = logging.getLogger(__name__)


def train(
    settings: UniZeroSettings,
    folder: Path,
    *,
    resume: str = "auto",
    on_progress: OnProgress | None = None,
    alter: Alter | None = None,
    guide: MakeGuide = guidance_of,
) -> Path:
    """Train until ``settings.steps`` steps are done and return the final policy's folder.

    A run that is finished returns at once; one that was cut short goes on from its newest whole
    checkpoint. Ctrl-C and SIGTERM leave a checkpoint of the last step and raise KeyboardInterrupt.

    Args:
        settings: what to do; of UniZero or PriorZero.
        folder: of this run alone.
        resume: ``auto``, ``never``, ``must`` or a checkpoint's path; see ``checkpoint.choose``.
        on_progress: called after each step with the step, the number of steps, and its metrics
            and timings.
        alter: what to do to a step's episodes before they are remembered, for controls.
        guide: makes the language model's half.

    Raises:
        AgentError: the environment does not list its commands.
        ConfigError: a setting is wrong, or differs from those the run in ``folder`` began with.
        DataError: every checkpoint in ``folder`` is damaged, or the environment's data are missing.
        InfraError: another process trains in ``folder``, or episodes keep failing.
    """
    for env in settings.games:
        find(env)
    with _alone_in(Path(folder)):
        return _train(settings, Path(folder), resume, on_progress, alter, guide)


def _train(
    settings: UniZeroSettings,
    folder: Path,
    resume: str,
    on_progress: OnProgress | None,
    alter: Alter | None,
    guide: MakeGuide,
) -> Path:
    """Train from the checkpoint there is until the end."""
    resumed = checkpoint.choose(folder, resume)
    if resumed:
        check_resumable(_read_json(resumed / "policy" / "config.json"), settings, str(folder))
    policy = folder / "policy"
    done = checkpoint.step_of(resumed) if resumed else 0
    if done >= settings.steps and not checkpoint.problems(policy):
        return policy
    write_atomic(folder / "config.json", _config(settings))
    torch.set_num_threads(settings.threads)
    run = _Run(settings, folder, resumed, alter, guide)
    try:
        with Interrupt() as interrupt:
            run.collect_and_learn(on_progress, interrupt)
    finally:
        run.close()
    checkpoint.write_folder(policy, partial(_copy_policy, folder / "checkpoints"))
    plot_panels(read_metrics(folder / "metrics.jsonl"), folder / "training_metrics", PANELS)
    return policy


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the run's lock, so that no other process trains in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = take_lock(folder / "run.lock", folder, "that trains")
    try:
        yield
    finally:
        os.close(lock)


def player(folder: Path, **kwargs: Any) -> UniZeroAgent:
    """Return the agent that plays what was learned in a run's or policy's folder."""
    settings = read_policy(policy_folder(Path(folder))).settings
    kind = PriorZeroAgent if isinstance(settings, GuidedSettings) else UniZeroAgent
    return kind(folder=str(folder), **kwargs)


class _Run:
    """The parts of a run and what it has done so far."""

    def __init__(
        self,
        settings: UniZeroSettings,
        folder: Path,
        resumed: Path | None,
        alter: Alter | None,
        guide: MakeGuide,
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
        self.guidance = guide(settings, start, folder, resumed=resumed is not None)
        self.memory = Memory(self.replay, self.texts, read_instruction=settings.read_instruction)
        self.waiting = Waiting(self.texts, settings.off_policy)
        self.counters = {
            "step": 0,
            "env_steps": 0,
            "episodes": 0,
            "failed_episodes": 0,
            "barren_collections": 0,
        }
        if self.guidance is not None:
            self.counters["failed_priors"] = 0
        self.owed: dict[str, float] = {"wm_turns": 0, "llm_turns": 0, "stretch": 0}
        if self.guidance is not None:
            self.owed["llm_owed"] = 0.0
        commands: Mapping[str, Sequence[int]] = {}
        if resumed:
            try:
                commands = self._load(resumed)
            except BaseException:
                if self.guidance is not None:
                    self.guidance.close()
                raise
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
            also=also_named,
        )

    def close(self) -> None:
        """Close the environments and the metrics."""
        for each in self.games:
            each.close()
        if self.guidance is not None:
            self.guidance.close()
        self.metrics.close()

    def collect_and_learn(self, on_progress: OnProgress | None, interrupt: Interrupt) -> None:
        """Take every step that is left, saving now and then and always at the end."""
        settings, counters = self.settings, self.counters
        for step in range(counters["step"] + 1, settings.steps + 1):
            began = time.monotonic()
            played: list[list[Played]] = []
            try:
                with interrupt.allowed():
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
            counters["failed_priors"] += sum(each.failed_priors for each in whole)
        altered = self.alter(segments) if self.alter else segments
        margins = [
            self._margin(each, game.env)
            for game, mine in zip(self.games, played, strict=True)
            for each in mine
            if each.segment is not None
        ]
        for segment, margin in self.waiting.swap(list(zip(altered, margins, strict=True))):
            self.replay.add(segment)
            self.memory.add(margin)
            for name in ("wm_turns", "llm_turns"):
                self.owed[name] += len(segment.actions)
        figures = figures_of([each for game in played for each in game])
        if len(self.games) > 1:
            for game, mine in zip(self.games, played, strict=True):
                reward = mean([each.reward for each in mine if each.segment is not None])
                figures[f"collector_iter/{game.name}/reward_mean"] = reward
        clocked = {name for name in figures if "latency" in name}
        return (
            {name: value for name, value in figures.items() if name not in clocked},
            {name: figures[name] for name in sorted(clocked)},
        )

    def _margin(self, played: Played, env: str) -> Margin:
        settings = self.settings
        thinks = (
            isinstance(settings, GuidedSettings)
            and settings.language is not None
            and settings.language.reasoning
        )
        prefixes = played.prefixes if thinks else None
        return Margin(played.instruction, prefixes, env, played.env_seed)

    def _learn(self, step: int) -> dict[str, float]:
        """Do the step's updates of both halves; returns means over the updates."""
        settings, guidance = self.settings, self.guidance
        due = phases.updates(settings, self.owed, step)
        random = generator(settings.seed, "language", step)
        lessons = partial(self._lessons, due.language, random)
        together = isinstance(settings, GuidedSettings) and settings.phase == "parallel"
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
        beside = {"margins": self.memory.state(), "waiting": self.waiting.state()}
        torch.save(beside, folder / "memory.pt")
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
        beside = torch.load(resumed / "memory.pt", weights_only=True)
        self.memory.load_state(beside["margins"])
        self.waiting.load_state(beside["waiting"])
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


def _config(settings: UniZeroSettings) -> str:
    return json.dumps(settings.model_dump(mode="json"), indent=1)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
