"""A training run in a folder: play, store, give credit, learn, save; the same call resumes it.

The folder holds ``config.json``, ``experience.db``, ``metrics.jsonl``, ``timings.jsonl``,
``checkpoints/``, ``logs/``, and at the end ``policy/`` and ``training_metrics.png``. Each step's
tasks, sampling and row order follow from (run seed, step) alone, so a run that was killed and
called again ends with the same bytes as one that was not, in weights, metrics and store. That
holds where one process plays and learns in turn; where another one plays (``modes.py``), no group
is lost or trained on twice.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pz_agents.interrupt import Interrupt
from pz_agents.rollout import ExperienceStore, Lease
from pz_agents.rollout.budget import FailureBudget
from pz_agents.rollout.store import Role, check_free
from pz_agents.runtime import LostError, open_runtime
from pz_agents.sdk.types import Trajectory
from pz_agents.training import checkpoint
from pz_agents.training.disk import full_disk_told, room_for_another
from pz_agents.training.fleet import Fleet, capacity
from pz_agents.training.mixture import env_row
from pz_agents.training.monitors import MetricsLog, read_metrics
from pz_agents.training.placement import take_places
from pz_agents.training.player import Player, check, episode_figures
from pz_agents.training.plots import plot_metrics
from pz_agents.training.settings import TrainSettings, check_resumable, resolved
from pz_agents.training.stopping import Stopper
from pz_agents.training.telling import STEPS, UsableGroups, figures_text, log_to
from pz_envs.errors import DataError, InfraError
from pz_envs.files import write_atomic

if TYPE_CHECKING:
    from pz_agents.algorithms.rows import TrainRow
    from pz_agents.sdk.types import Trajectory
    from pz_agents.training.critic import Critic
    from pz_agents.training.ranks import Team
    from pz_agents.training.trl_learner import Learner
    from pz_agents.training.update import Updater

__all__ = ["TrainSettings", "train"]

OnProgress = Callable[[int, int, Mapping[str, float]], None]

_logger = logging.getLogger(__name__)

MOST_RESTARTS = 3
"""How often a run goes on by itself after a learner rank was lost."""


def train(
    settings: TrainSettings,
    folder: Path,
    *,
    resume: str = "auto",
    on_progress: OnProgress | None = None,
    wait: Callable[[int, int], None] | None = None,
    fleet: Fleet | None = None,
) -> Path:
    """Train until ``settings.steps`` steps are done and return the final policy's folder.

    A run that is finished returns at once; one that was cut short goes on from its newest whole
    checkpoint. Ctrl-C and SIGTERM leave a checkpoint of the last step and raise KeyboardInterrupt,
    of SIGTERM its subclass ``Terminated``.

    Args:
        settings: what to do.
        folder: of this run alone.
        resume: ``auto``, ``never``, ``must`` or a checkpoint's path; see ``checkpoint.choose``.
        on_progress: called after each step with the step, the number of steps, and its metrics
            and timings.
        wait: None plays the episodes here. Otherwise another process plays them into the store
            with the weights that are published in ``folder/weights``, and ``wait`` is called over
            and over with the number of groups there are and that are needed.
        fleet: plays the episodes, in other processes that it looks after.

    Raises:
        ConfigError: a setting is wrong, or differs from those the run in ``folder`` began with.
        DataError: every checkpoint in ``folder`` is damaged.
        InfraError: another process trains in ``folder``, or episodes keep failing.
        ModelError: the model cannot be trained, or its loss is no longer finite.
        LostError: a learner rank died, again and again; the same call resumes the run.
    """
    for restarts in range(MOST_RESTARTS):
        try:
            return _train(settings, folder, resume, on_progress, wait, fleet)
        except LostError as error:
            if fleet is not None and settings.batches_ahead:
                raise  # what it plays now may be of weights that the checkpoint has not seen
            _logger.warning(
                "%s; going on from the last checkpoint (%d of %d)",
                error,
                restarts + 1,
                MOST_RESTARTS,
            )
        resume = "auto"
    return _train(settings, folder, resume, on_progress, wait, fleet)


def _train(
    settings: TrainSettings,
    folder: Path,
    resume: str,
    on_progress: OnProgress | None,
    wait: Callable[[int, int], None] | None,
    fleet: Fleet | None,
) -> Path:
    """Train from the checkpoint there is until the end, or until a learner rank is lost."""
    folder = Path(folder)
    config = json.dumps(resolved(settings), indent=1)
    check(settings, plays=wait is None and settings.runtime == "local")
    role: Role = "both" if wait is None else "trainer"
    # Nothing in the folder of a run that is going on is moved or written over.
    check_free(folder / "experience.db", role)
    if resume == "never" and (folder / "experience.db").exists():
        with contextlib.suppress(DataError):
            ExperienceStore(folder / "experience.db").close()
    resumed = checkpoint.choose(folder, resume)
    begun = (resumed or folder) / "config.json"
    # Before the first checkpoint only an explorer's episodes bind the trainer.
    if resumed or (wait is not None and begun.is_file()):
        check_resumable(json.loads(begun.read_text("utf-8")), settings, str(folder))
    policy = folder / "policy"
    done = checkpoint.step_of(resumed) if resumed else 0
    if resumed and done >= settings.steps and not checkpoint.problems(policy):
        return policy
    with (
        full_disk_told(folder),
        log_to(folder / "logs"),
        _open_store(folder, resumed, role) as store,
        Interrupt() as interrupt,
        _team(settings, fleet) as team,
    ):
        write_atomic(folder / "config.json", config)
        run = _Run(settings, folder, store, interrupt, resumed, wait, fleet, team)
        try:
            if not run.stopper.stopped:
                run.play_and_learn(on_progress)
        finally:
            run.metrics.close()
            if run.interrupt.requested and run.done:
                _draw(folder)
    checkpoint.write_folder(policy, partial(_copy_policy, folder / "checkpoints"))
    _draw(folder)
    return policy


class _Run:
    """The parts of a run and what it has done so far."""

    def __init__(
        self,
        settings: TrainSettings,
        folder: Path,
        store: ExperienceStore,
        interrupt: Interrupt,
        resumed: Path | None,
        wait: Callable[[int, int], None] | None,
        fleet: Fleet | None,
        team: Team | None,
    ) -> None:
        from pz_agents.training.trl_learner import Learner
        from pz_agents.training.update import objective

        self.settings = settings
        self.folder = folder
        self.store = store
        self.interrupt = interrupt
        self.wait = wait
        self.fleet = fleet
        self.team = team
        self.in_turn = wait is None and (fleet is None or settings.batches_ahead == 0)
        self.budget = FailureBudget()
        self.done = self.saved = checkpoint.step_of(resumed) if resumed else 0
        self.stopper = Stopper(settings.early_stopping)
        self.usable = UsableGroups()
        self.player = Player(settings)
        self.policy = self.player.policy
        # The critic copies the weights as they are before any adapter.
        self.critic = self._critic()
        goal = objective(settings, self.policy.network)
        self.learner: Learner = Learner(
            self.policy.network,
            self.policy.chat.tokenizer,
            settings,
            goal.loss,
            goal.reference,
            entropy_gradient=goal.entropy_gradient,
        )
        self.policy.autocast = self.learner.autocast
        if resumed:
            self._load(resumed)
        if team is not None:
            team.join({"policy": self.learner, **({"critic": self.critic} if self.critic else {})})
        self.whole = [updater.state() for updater in self._updaters()]
        self.policy.version = self.learner.updates
        # Without a checkpoint nothing that is stored belongs to this run's history, but for what
        # an explorer played with the weights that the run begins with.
        store.rollback(self.done if resumed or wait is not None else -1)
        self.metrics = MetricsLog(
            folder, self.done, monitor=settings.monitor, config=resolved(settings)
        )
        lines = read_metrics(folder / "metrics.jsonl")[-settings.save_every :]
        self.rewards = deque([line["reward"] for line in lines], settings.save_every)
        self.lease: Lease | None = None
        self.figures: dict[str, float] = {}
        self.began = time.monotonic()
        self.rollout_seconds = 0.0

    def play_and_learn(self, on_progress: OnProgress | None) -> None:
        """Take every step that is left, saving now and then and always at the end."""
        settings = self.settings

        def after_step(step: int, learned: Mapping[str, float]) -> bool:
            assert self.lease is not None
            self.policy.version = self.learner.updates
            for updater in self._updaters():
                updater.schedule.observe(self.figures["reward"])
            self._publish(step)
            self.store.ack(self.lease, step, settings.max_uses)
            self.done = step
            self.whole = [updater.state() for updater in self._updaters()]
            self.rewards.append(self.figures["reward"])
            metrics = {"step": step, **self.figures, **learned}
            due = step % settings.save_every == 0 or step == settings.steps
            score = self._evaluated(metrics)
            timings = {
                "seconds": time.monotonic() - self.began,
                "rollout_seconds": self.rollout_seconds,
            }
            self.metrics.write(metrics, timings)
            self.usable.observe(metrics)
            stops = self.stopper.observe(metrics)
            if self.team is not None and (due or stops):
                self.team.check()
            if due or stops:
                self.save(score)
            told = {**metrics, **timings}
            STEPS.info("step %d/%d %s", step, settings.steps, figures_text(told))
            if on_progress is not None:
                on_progress(step, settings.steps, told)
            return not (stops or self.interrupt.requested)

        self._publish(self.done)
        try:
            self.learner.run(self.done + 1, settings.steps, self.collect, after_step, self.folder)
        except BaseException as error:
            # While episodes are played the weights are those of the last whole step.
            whole = self.interrupt.may_raise or (isinstance(error, InfraError) and self._is_whole())
            if whole and self.done > self.saved:
                self.save()
            if isinstance(error, LostError) and self.interrupt.requested:
                raise self.interrupt.requested from error
            raise
        if self.stopper.stopped:
            _logger.warning("stopped early after step %d: %s", self.done, settings.early_stopping)
        elif self.interrupt.requested and self.done < settings.steps:
            self.save()
            raise self.interrupt.requested

    def _evaluated(self, metrics: dict[str, float]) -> float | None:
        """Evaluate where it is time to, adding to the figures; return how good the weights are.

        None where only evaluated weights are compared and these are not.
        """
        settings, step = self.settings, self.done
        if not settings.eval_episodes:
            return float(sum(self.rewards)) / len(self.rewards)
        if step % (settings.eval_every or settings.save_every) and step != settings.steps:
            return None
        figures = self.player.evaluate(settings.eval_episodes)
        metrics.update({f"eval_{name}": value for name, value in figures.items()})
        return self.player.score(figures)

    def collect(self, step: int) -> Sequence[TrainRow]:
        """Get the step's episodes through the store and return their rows."""
        self.began = time.monotonic()
        with self.interrupt.allowed():
            stale = self._gather(step)
        settings = self.settings
        # Who plays in turn with the learner trains on all that was played, also on groups that
        # a program played in place of others.
        count = self.store.unspent() if self.in_turn else settings.groups_per_step
        self.lease = self.store.lease(count, settings.sampling, seed=step)
        played = self.player.paid([item for group in self.lease.groups for item in group])
        self.rollout_seconds = time.monotonic() - self.began
        rows, figures = self._judged(step, played)
        self.figures = {
            "version": float(self.policy.version),
            **episode_figures(played, self.policy.version),
            **figures,
            **self.player.progress(step),
            "rows": float(len(rows)),
            "stale_groups": float(stale),
        }
        return rows

    def _judged(
        self, step: int, played: Sequence[Trajectory]
    ) -> tuple[Sequence[TrainRow], dict[str, float]]:
        """Return the rows of the step's episodes with their advantages, and figures about them."""
        algorithm, options = self.player.algorithm, self.player.options
        if self.critic is None:
            credit = algorithm.credit(self.learner.with_kl_in_rewards(played), options)
            return credit.rows, {**credit.stats, **self.learner.kl_figures}
        credit = algorithm.credit(played, options)
        rows = self.learner.with_kl_in_token_rewards(credit.rows, len(played))
        rows, figures = self.critic.judge(step, played, rows)
        return rows, {**credit.stats, **self.learner.kl_figures, **figures}

    def _critic(self) -> Critic | None:
        """Return the critic of an algorithm that has one."""
        rule = self.player.algorithm.critic
        if rule is None:
            return None
        from pz_agents.prompting.templates import for_family, user_text
        from pz_agents.training.critic import Critic

        template = for_family(self.player.agent.template, env_row(self.settings.env).family)
        return Critic(
            self.policy,
            self.settings,
            self.player.options,
            rule,
            lambda observation: user_text(template, observation, None),
        )

    def _updaters(self) -> list[Updater]:
        return [self.learner, *([self.critic] if self.critic else [])]

    def _is_whole(self) -> bool:
        """Whether no weight has moved since the last whole step; the counters go back to it."""
        updaters = self._updaters()
        if any(
            now.updates != then["updates"] for now, then in zip(updaters, self.whole, strict=True)
        ):
            return False
        for updater, then in zip(updaters, self.whole, strict=True):
            updater.load_counters(then)
        return True

    def _gather(self, step: int) -> int:
        """Have enough groups in the store; returns how many were too old to be used."""
        settings = self.settings
        usable = range(step - 1 - settings.max_staleness, step)
        stale = self.store.drop_stale(usable, step)
        if self.in_turn:
            if self.store.unspent() < settings.groups_per_step:
                play = self.player.play if self.fleet is None else self.fleet.play
                self._keep(play(step), step - 1)
            return stale
        if self.wait is None:
            return stale + self._gather_ahead(usable, step)
        while (ready := self.store.unspent()) < settings.groups_per_step:
            self.wait(ready, settings.groups_per_step)
            stale += self.store.drop_stale(usable, step)
        return stale

    def _gather_ahead(self, usable: range, step: int) -> int:
        """Have enough groups from a fleet that plays ahead; returns how many were too old."""
        assert self.fleet is not None
        stale, needed = 0, self.settings.groups_per_step
        while (ready := self._play_ahead()) < needed:
            for done in self.fleet.finished():
                number = max(done.share.number, self.store.batches)
                self._keep(done.trajectories, done.share.step, number)
            stale += self.store.drop_stale(usable, step)
        _logger.debug("%d groups are ready for step %d", ready, step)
        return stale

    def _play_ahead(self) -> int:
        """Ask the fleet for as many batches as may be begun; returns how many groups are ready."""
        assert self.fleet is not None
        settings, ready, running = self.settings, self.store.unspent(), self.fleet.running
        room = capacity(
            max_concurrent=(settings.batches_ahead + 1) * settings.groups_per_step,
            running=running,
            staleness=settings.batches_ahead,
            version=self.done,
            batch=settings.groups_per_step,
            accepted=self.done * settings.groups_per_step + ready,
        )
        for _ in range(room // settings.groups_per_step):
            self.fleet.request(max(self.fleet.requested, self.store.batches, self.done) + 1)
        return ready

    def _keep(self, played: Sequence[Trajectory], step: int, number: int | None = None) -> None:
        """Store what weights of ``step`` steps played, unless the run is broken."""
        self.budget.add(played)
        self.store.append(played, step, batch=number)

    def save(self, score: float | None = None) -> None:
        """Write a checkpoint of the steps that are done; without room, only a warning."""
        self.metrics.sync()
        folder = self.folder / "checkpoints"
        if not room_for_another(folder) and self.done < self.settings.steps:
            _logger.warning("no room for a checkpoint of step %d in %s", self.done, folder)
            return
        checkpoint.save(folder, self.done, self._write, self.settings.keep_checkpoints, score)
        self.saved = self.done

    def _write(self, folder: Path) -> None:
        import torch

        self.policy.network.save_pretrained(folder / "policy")
        self.policy.chat.tokenizer.save_pretrained(folder / "policy")
        (folder / "optimizer").mkdir()
        torch.save(self.learner.optimizer.state_dict(), folder / "optimizer" / "state.pt")
        state = {
            "step": self.done,
            "learner": self.learner.state(),
            "stopping": self.stopper.state(),
        }
        if self.critic is not None:
            self.critic.save(folder)
            state["critic"] = self.critic.state()
        torch.save(state, folder / "training_state.pt")
        self.store.snapshot(folder / "buffer" / "experience.db", unspent=True)
        shutil.copyfile(self.folder / "config.json", folder / "config.json")

    def _load(self, resumed: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        saved = AutoModelForCausalLM.from_pretrained(resumed / "policy", dtype=torch.float32)
        self.policy.load_state(saved.state_dict())
        state = torch.load(resumed / "training_state.pt", weights_only=True)
        optimizer = torch.load(resumed / "optimizer" / "state.pt", weights_only=True)
        self.learner.load_state(state["learner"], optimizer)
        if "stopping" in state:
            self.stopper.load_state(state["stopping"])
        if self.critic is not None:
            self.critic.load(resumed, state["critic"])
        _logger.info("resumed from step %d", self.done)

    def _publish(self, step: int) -> None:
        """Publish the weights for processes that play, where there are any."""
        from pz_agents.models.adapters import merged_state

        network = self.policy.network
        if self.fleet is not None:
            state_of = partial(merged_state, network)
            self.fleet.publish(network.save_pretrained, self.learner.updates, step, state_of)
        if self.wait is None:
            return
        import torch

        state = merged_state(network)
        checkpoint.publish(
            self.folder / "weights",
            lambda folder: torch.save(state, folder / "weights.pt"),
            step,
            self.learner.updates,
        )


@contextlib.contextmanager
def _team(settings: TrainSettings, fleet: Fleet | None) -> Iterator[Team | None]:
    """Hold the other learner ranks, where the settings ask for any."""
    if settings.learner_ranks == 1 and not settings.colocate_all:
        yield None
        return
    from pz_agents.training.ranks import Team

    with contextlib.ExitStack() as stack:
        if fleet is None:
            runtime = stack.enter_context(contextlib.closing(open_runtime(settings.runtime)))
            take_places(settings, runtime)
        else:
            runtime = fleet.runtime
        team = stack.enter_context(contextlib.closing(Team(settings, runtime)))
        yield team if team.size > 1 else None


def _open_store(folder: Path, resumed: Path | None, role: Role) -> ExperienceStore:
    """Open the run's store; where it is lost, the checkpoint's copy of what is left to use.

    Raises:
        DataError: the store is damaged and there is no checkpoint.
    """
    path = folder / "experience.db"
    buffer = resumed / "buffer" / "experience.db" if resumed else None
    if path.exists() or buffer is None:
        try:
            return ExperienceStore(path, role)
        except DataError:
            # A damaged file was moved out of the way; one of another version was not.
            if buffer is None or path.exists():
                raise
    _logger.warning("%s goes on from the copy in %s", path, buffer)
    write_atomic(path, buffer.read_bytes())
    return ExperienceStore(path, role)


def _draw(folder: Path) -> None:
    plot_metrics(read_metrics(folder / "metrics.jsonl"), folder / "training_metrics")


def _copy_policy(checkpoints: Path, target: Path) -> None:
    newest = checkpoint.newest(checkpoints)
    if newest is None:
        raise InfraError(f"the last checkpoint in {checkpoints} has gone; run again")
    shutil.copytree(newest / "policy", target, dirs_exist_ok=True)
