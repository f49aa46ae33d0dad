"""Ways to run: explore and train as two processes, both together, and bench over checkpoints.

An explorer and a trainer share the run's folder: episodes go through ``experience.db``, weights
through ``weights/``. Either may be killed and started again. How far the explorer plays ahead
follows from the settings (``batches_ahead``); at 0 the two work in turn, and ``both`` does so in
one process.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pz_agents.algorithms import load_trainer
from pz_agents.config import parse_settings
from pz_agents.rollout import ExperienceStore
from pz_agents.rollout.budget import FailureBudget
from pz_agents.runtime import open_runtime
from pz_agents.training import checkpoint
from pz_agents.training.fleet import Fleet
from pz_agents.training.player import Player
from pz_agents.training.plots import plot_bench
from pz_agents.training.presets import resolve
from pz_agents.training.run import OnProgress, train
from pz_agents.training.settings import TrainSettings, check_resumable, resolved
from pz_envs.errors import ConfigError, InfraError
from pz_envs.files import write_atomic

BENCH_EPISODES = 100
"""Episodes a checkpoint, where the settings name none."""

_POLL_SECONDS = 0.05
_REMIND_SECONDS = 60.0
_MOST_DEATHS = 3
_CHILD = (
    "import sys; from pz_agents.training.modes import _explore_for; _explore_for(*sys.argv[1:])"
)

_logger = logging.getLogger(__name__)


def with_presets(*given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of settings, later ones over earlier ones, with presets filled in.

    Settings of a trainer (``algorithms.TRAINERS``) fill theirs in themselves.
    """
    values = {key: value for each in given for key, value in each.items()}
    return values if load_trainer(str(values.get("algorithm", ""))) else resolve(*given)


def settings_of(values: Mapping[str, Any], source: str) -> Any:
    """Return settings of the kind that their algorithm has.

    Args:
        values: with presets filled in.
        source: where they were read, for messages.

    Raises:
        ConfigError: a setting does not exist or has a wrong value, or there is no environment.
    """
    if not values.get("env") and not values.get("datasets"):
        raise ConfigError(
            "no environment to train on. Name one: --env pz/Countdown-v0; all ids: pz-envs list"
        )
    trainer = load_trainer(str(values.get("algorithm", "")))
    return parse_settings(trainer.Settings if trainer else TrainSettings, values, source)


def train_any(
    settings: Any, folder: Path, *, resume: str = "auto", on_progress: OnProgress | None = None
) -> Path:
    """Train what the settings are of: a language model (``train_both``), or what a trainer does."""
    trainer = load_trainer(settings.algorithm)
    run = trainer.train if trainer else train_both
    policy: Path = run(settings, folder, resume=resume, on_progress=on_progress)
    return policy


def read_settings(folder: Path) -> Any:
    """Return the settings that the run in ``folder`` was started with; None before it was."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    return settings_of({**json.loads(path.read_text("utf-8")), "preset": ""}, str(path))


def train_both(
    settings: TrainSettings,
    folder: Path,
    *,
    resume: str = "auto",
    on_progress: OnProgress | None = None,
) -> Path:
    """Play and train; in one process where they take turns, else with an explorer beside this one.

    Where the settings ask for workers, engines or Ray, a fleet plays.

    Raises:
        ConfigError: Ray is asked for and does not start.
        InfraError: the explorer died three times without adding anything; so did the fleet.
    """
    if settings.has_fleet:
        return _train_with_fleet(settings, Path(folder), resume, on_progress)
    if settings.batches_ahead == 0:
        return train(settings, folder, resume=resume, on_progress=on_progress)
    explorer = _Explorer(Path(folder))
    try:
        return train(settings, folder, resume=resume, on_progress=on_progress, wait=explorer.wait)
    finally:
        explorer.stop()


def _train_with_fleet(
    settings: TrainSettings, folder: Path, resume: str, on_progress: OnProgress | None
) -> Path:
    found = checkpoint.steps_in(folder / "checkpoints")
    if resume == "auto" and found and checkpoint.step_of(found[0]) >= settings.steps:
        return train(settings, folder, on_progress=on_progress)
    with contextlib.closing(open_runtime(settings.runtime)) as runtime:
        fleet = Fleet(settings, runtime)
        return train(settings, folder, resume=resume, on_progress=on_progress, fleet=fleet)


def train_only(
    settings: TrainSettings,
    folder: Path,
    *,
    resume: str = "auto",
    on_progress: OnProgress | None = None,
) -> Path:
    """Train on what an explorer, a process of its own, plays into the same folder."""
    reminded = time.monotonic()

    def wait(ready: int, needed: int) -> None:
        nonlocal reminded
        if time.monotonic() - reminded > _REMIND_SECONDS:
            reminded = time.monotonic()
            _logger.warning(
                "%d of %d groups are ready; is `pz-agents train --mode explore --out %s` running?",
                ready,
                needed,
                folder,
            )
        time.sleep(_POLL_SECONDS)

    return train(settings, folder, resume=resume, on_progress=on_progress, wait=wait)


def explore(
    settings: TrainSettings,
    folder: Path,
    *,
    on_batch: Callable[[int, int], None] | None = None,
    goes_on: Callable[[], bool] = lambda: True,
) -> int:
    """Play batches into the store until the trainer has taken its last step; return how many.

    Weights are taken up between batches. Before any were published the settings' model plays.

    Args:
        settings: of the run.
        folder: shared with the trainer.
        on_batch: called with the number of each batch and the step of the weights that played it.
        goes_on: asked while there is nothing to do; False ends.

    Raises:
        ConfigError: the settings differ from those the run in ``folder`` began with.
        InfraError: another process explores in ``folder``, or episodes keep failing.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        saved = json.loads((folder / "config.json").read_text("utf-8"))
        check_resumable(saved, settings, str(folder))
    else:
        write_atomic(folder / "config.json", json.dumps(resolved(settings), indent=1))
    found = checkpoint.steps_in(folder / "checkpoints")
    if found and checkpoint.step_of(found[0]) >= settings.steps:
        return 0
    limit = (settings.batches_ahead + 1) * settings.groups_per_step
    played = number = step = 0
    budget = FailureBudget()
    with ExperienceStore(folder / "experience.db", "explorer") as store:
        player = Player(settings)
        batch = store.batches
        while goes_on():
            # In this order: what makes room is told only after its weights were published.
            room = store.unspent() < limit
            latest = checkpoint.published(folder / "weights")
            if latest is not None and latest.step >= settings.steps:
                break
            if not room:
                time.sleep(_POLL_SECONDS)
                continue
            if latest is not None and latest.number != number:
                if not _load(player, latest):
                    continue
                number, step = latest.number, latest.step
            batch += 1
            episodes = player.play(batch)
            budget.add(episodes)
            store.append(episodes, step, batch=batch)
            played += 1
            if on_batch is not None:
                on_batch(batch, step)
    return played


def bench(
    settings: TrainSettings,
    folder: Path,
    *,
    on_row: Callable[[Mapping[str, float]], None] | None = None,
) -> Path:
    """Evaluate the starting model and every whole checkpoint; returns the table ``bench.csv``.

    The held-out instances are the same for all. A plot is written beside the table.

    Raises:
        ConfigError: there is no checkpoint.
    """
    folder = Path(folder)
    found = list(reversed(checkpoint.steps_in(folder / "checkpoints")))
    if not found:
        raise ConfigError(f"there is no checkpoint in {folder / 'checkpoints'} to evaluate")
    episodes = settings.eval_episodes or BENCH_EPISODES
    rows: list[Mapping[str, float]] = []
    for path in (None, *found):
        wrong = checkpoint.problems(path) if path else []
        if wrong:
            _logger.warning("checkpoint left out: %s", "; ".join(wrong))
            continue
        player = Player(settings, path / "policy" if path else None)
        step = checkpoint.step_of(path) if path else 0
        rows.append({"step": step, "episodes": episodes, **player.evaluate(episodes)})
        if on_row is not None:
            on_row(rows[-1])
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    table = folder / "bench.csv"
    write_atomic(table, text.getvalue())
    plot_bench(rows, folder / "bench")
    return table


class _Explorer:
    """An explorer in a child process: started when it is first needed, and again when it dies."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._child: subprocess.Popen[bytes] | None = None
        self._deaths = 0
        self._ready = -1

    def wait(self, ready: int, needed: int) -> None:
        """Sleep a little; see ``train``."""
        if ready != self._ready:
            self._ready, self._deaths = ready, 0
        if self._child is None or self._child.poll() is not None:
            self._start()
        time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """End the child; what it was playing is lost, what it stored is not."""
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()
            self._child.wait()

    def _start(self) -> None:
        log = self._folder / "explorer.log"
        if self._child is not None:
            self._deaths += 1
            what = f"the explorer ended with {self._child.returncode}; see {log}"
            if self._deaths >= _MOST_DEATHS:
                raise InfraError(f"{what}. It did so {self._deaths} times without a new group")
            _logger.warning("%s; it is started again", what)
        command = [sys.executable, "-c", _CHILD, str(self._folder), str(os.getpid())]
        with open(log, "ab") as file:
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )


def _explore_for(folder: str, parent: str) -> None:
    """Explore in ``folder`` as long as the process ``parent`` lives; the child's whole program."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    settings = read_settings(Path(folder))
    if settings is None:
        raise ConfigError(f"there is no run in {folder}")
    explore(settings, Path(folder), goes_on=lambda: os.getppid() == int(parent))


def _load(player: Player, latest: checkpoint.Published) -> bool:
    """Take up published weights; False when they were replaced or are damaged."""
    import torch

    if checkpoint.problems(latest.folder):
        return False
    try:
        state: Any = torch.load(latest.folder / "weights.pt", weights_only=True, map_location="cpu")
    except FileNotFoundError:
        return False
    player.policy.load_state(state)
    player.policy.version = latest.version
    return True
