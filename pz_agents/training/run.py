"""A training run in a folder: play, store, give credit, learn, save; the same call resumes it.

The folder holds ``config.json``, ``experience.db``, ``metrics.jsonl``, ``checkpoints/``, and at the
end ``policy/`` and ``training_metrics.png``. Each step's tasks, sampling and row order follow from
(run seed, step) alone, so a run that was killed and called again ends with the weights of one that
was not. The policy that plays and the one that learns are the same module in one process.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from pz_agents.algorithms import Algorithm, load_algorithm
from pz_agents.config import Settings
from pz_agents.errors import ModelError
from pz_agents.rollout import ExperienceStore, Lease, Limits, RolloutContext, Task
from pz_agents.sdk.types import Trajectory
from pz_agents.training import checkpoint
from pz_agents.training.monitors import MetricsLog, plot, read_metrics
from pz_agents.training.settings import TrainSettings, algorithm_options, check_resumable
from pz_envs.catalog import find
from pz_envs.errors import InfraError, require
from pz_envs.files import write_atomic
from pz_envs.seeding import derive_seed

if TYPE_CHECKING:
    from pz_agents.algorithms.rows import TrainRow
    from pz_agents.training.trl_learner import Learner

__all__ = ["TrainSettings", "train"]

OnProgress = Callable[[int, int, Mapping[str, float]], None]

_logger = logging.getLogger(__name__)


def train(settings: TrainSettings, folder: Path, *, on_progress: OnProgress | None = None) -> Path:
    """Train until ``settings.steps`` steps are done and return the final policy's folder.

    A run that is finished returns at once; one that was cut short goes on from its newest whole
    checkpoint. Ctrl-C and SIGTERM leave a checkpoint of the last step and raise KeyboardInterrupt.

    Args:
        settings: what to do.
        folder: of this run alone.
        on_progress: called after each step with the step, the number of steps and its metrics.

    Raises:
        ConfigError: a setting is wrong, or differs from those the run in ``folder`` began with.
        DataError: every checkpoint in ``folder`` is damaged.
        InfraError: another process trains in ``folder``, or episodes keep failing.
        ModelError: the model cannot be trained, or its loss is no longer finite.
    """
    folder = Path(folder)
    options = algorithm_options(settings)
    find(settings.env)
    resumed = checkpoint.newest(folder / "checkpoints")
    if resumed:
        saved = json.loads((resumed / "config.json").read_text("utf-8"))
        check_resumable(saved, settings, str(folder))
    policy = folder / "policy"
    done = checkpoint.step_of(resumed) if resumed else 0
    if resumed and done >= settings.steps and not checkpoint.problems(policy):
        return policy
    require("trl", "pz-agents[train]")
    write_atomic(folder / "config.json", json.dumps(settings.model_dump(mode="json"), indent=1))
    with ExperienceStore(folder / "experience.db") as store, _Interrupt() as interrupt:
        run = _Run(settings, options, folder, store, interrupt, resumed)
        try:
            run.play_and_learn(on_progress)
        finally:
            run.metrics.close()
    checkpoint.write_folder(policy, partial(_copy_policy, folder / "checkpoints"))
    plot(read_metrics(folder / "metrics.jsonl"), folder / "training_metrics.png")
    return policy


class _Run:
    """The parts of a run and what it has done so far."""

    def __init__(
        self,
        settings: TrainSettings,
        options: Settings,
        folder: Path,
        store: ExperienceStore,
        interrupt: _Interrupt,
        resumed: Path | None,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        from pz_agents.models import load_model
        from pz_agents.models.transformers import TransformersModel
        from pz_agents.sdk.loading import load_agent
        from pz_agents.training.trl_learner import Learner

        torch.set_num_threads(settings.threads)
        disable_progress_bar()
        self.settings = settings
        self.options = options
        self.algorithm: Algorithm = load_algorithm(settings.algorithm)
        self.folder = folder
        self.store = store
        self.interrupt = interrupt
        self.done = self.saved = checkpoint.step_of(resumed) if resumed else 0
        policy = load_model(settings.model)
        if not isinstance(policy, TransformersModel):
            raise ModelError(
                f"`{settings.model}` cannot be trained here: its weights are not in this process. "
                "Use `tiny` or a folder with a transformers model."
            )
        self.policy = policy
        # Small updates vanish in bfloat16.
        network = policy.network.float()
        reference = None
        if getattr(options, "beta", 0.0):
            reference = copy.deepcopy(network).requires_grad_(False)
        self.learner: Learner = Learner(
            network,
            policy.chat.tokenizer,
            settings,
            partial(self.algorithm.loss, options=options),
            reference,
        )
        if resumed:
            saved = AutoModelForCausalLM.from_pretrained(resumed / "policy", dtype=torch.float32)
            policy.load_state(saved.state_dict())
            state = torch.load(resumed / "training_state.pt", weights_only=True)
            optimizer = torch.load(resumed / "optimizer.pt", weights_only=True)
            self.learner.load_state(state["learner"], optimizer)
            _logger.info("resumed from step %d", self.done)
        self.policy.version = self.learner.updates
        # Without a checkpoint nothing that is stored belongs to this run's history.
        store.rollback(self.done if resumed else -1)
        self.agent = load_agent(
            "zeroshot",
            model=self.policy,
            kwargs={
                "temperature": settings.temperature,
                "max_new_tokens": settings.max_new_tokens,
            },
        )
        self.metrics = MetricsLog(folder, self.done, tensorboard=settings.monitor == "tensorboard")
        self.lease: Lease | None = None
        self.figures: dict[str, float] = {}
        self.began = time.monotonic()

    def play_and_learn(self, on_progress: OnProgress | None) -> None:
        """Take every step that is left, saving now and then and always at the end."""
        settings = self.settings

        def after_step(step: int, learned: Mapping[str, float]) -> bool:
            assert self.lease is not None
            self.policy.version = self.learner.updates
            self.store.ack(self.lease, step)
            self.done = step
            metrics = {"step": step, **self.figures, **learned}
            metrics["seconds"] = time.monotonic() - self.began
            self.metrics.write(metrics)
            if step % settings.save_every == 0 or step == settings.steps:
                self.save()
            if on_progress is not None:
                on_progress(step, settings.steps, metrics)
            return not self.interrupt.requested

        try:
            self.learner.run(self.done + 1, settings.steps, self.collect, after_step, self.folder)
        except BaseException:
            # While episodes are played the weights are those of the last whole step.
            if self.interrupt.may_raise and self.done > self.saved:
                self.save()
            raise
        if self.done < settings.steps:
            self.save()
            raise KeyboardInterrupt

    def collect(self, step: int) -> Sequence[TrainRow]:
        """Play the step's tasks, put the episodes through the store and return their rows."""
        settings = self.settings
        self.began = time.monotonic()
        with self.interrupt.allowed():
            trajectories = list(self.algorithm.program(self._context(), self._tasks(step)))
            trajectories.sort(key=lambda item: (item.group_id, item.attempt))
            self.store.append(trajectories, step - 1)
        # A program may play more groups than tasks, e.g. to replace those that teach nothing.
        groups = len({item.group_id or item.key for item in trajectories})
        self.lease = self.store.lease(max(groups, settings.groups_per_step))
        played = [item for group in self.lease.groups for item in group]
        credit = self.algorithm.credit(played, self.options)
        self.figures = {
            "version": float(self.policy.version),
            **_episode_figures(played),
            **credit.stats,
            "rows": float(len(credit.rows)),
            "rollout_seconds": time.monotonic() - self.began,
        }
        return credit.rows

    def save(self) -> None:
        """Write a checkpoint of the steps that are done."""
        checkpoint.save(
            self.folder / "checkpoints", self.done, self._write, self.settings.keep_checkpoints
        )
        self.saved = self.done

    def _write(self, folder: Path) -> None:
        import torch

        self.policy.network.save_pretrained(folder / "policy")
        self.policy.chat.tokenizer.save_pretrained(folder / "policy")
        torch.save(self.learner.optimizer.state_dict(), folder / "optimizer.pt")
        state = {"step": self.done, "learner": self.learner.state()}
        torch.save(state, folder / "training_state.pt")
        shutil.copyfile(self.folder / "config.json", folder / "config.json")

    def _tasks(self, step: int) -> list[Task]:
        settings = self.settings
        return [
            Task(
                settings.env,
                derive_seed(settings.seed, "task", step, number) % 2**31,
                f"step{step:06d}/task{number:04d}",
            )
            for number in range(settings.groups_per_step)
        ]

    def _context(self) -> RolloutContext:
        from pz_envs.catalog import make_env

        settings = self.settings
        commands = True if getattr(self.agent, "needs_admissible_commands", False) else None
        return RolloutContext(
            agent=self.agent,
            make_env=partial(
                make_env, split="train", admissible_commands=commands, **settings.env_kwargs
            ),
            limits=Limits(turns=settings.max_turns),
            seed=settings.seed,
            concurrency=settings.concurrency,
            group_size=settings.group_size,
            options=self.options,
        )


class _Interrupt:
    """Turns Ctrl-C and SIGTERM into a stop between steps, at once while episodes are played."""

    def __init__(self) -> None:
        self.requested = False
        self.may_raise = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Let a signal raise KeyboardInterrupt at once inside this block.

        When the block raises, ``may_raise`` stays True: the weights are those of a whole step.
        """
        self.may_raise = True
        if self.requested:
            raise KeyboardInterrupt
        yield
        self.may_raise = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        # A second signal does what it did before.
        self._restore()
        if self.may_raise:
            raise KeyboardInterrupt

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())


def _episode_figures(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Return means over the step's episodes; a failed one counts as reward 0, no success."""
    count = max(len(trajectories), 1)
    return {
        "reward": sum(item.reward for item in trajectories) / count,
        "success": sum(item.success for item in trajectories) / count,
        "turns": sum(len(item.steps) for item in trajectories) / count,
        "sampled_tokens": float(sum(item.sampled_tokens for item in trajectories)),
        "truncated": sum(item.truncated != "" for item in trajectories) / count,
        "failed": float(sum(item.status == "failed" for item in trajectories)),
    }


def _copy_policy(checkpoints: Path, target: Path) -> None:
    newest = checkpoint.newest(checkpoints)
    if newest is None:
        raise InfraError(f"the last checkpoint in {checkpoints} has gone; run again")
    shutil.copytree(newest / "policy", target, dirs_exist_ok=True)
