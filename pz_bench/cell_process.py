"""The process that measures one cell: ``python -m pz_bench.cell_process FOLDER``.

It trains first where the algorithm is a trained one, then evaluates, appending every finished
episode to the cell's log; what is there already is not measured again. It ends with the parent
that started it, however that ended. Exit codes: 0 done, 1 failed for a reason that a second try
would not change (recorded in ``cell.json``), 75 another process is writing this cell,
130 interrupted; anything else is a crash.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pz_agents.errors import AgentError, ModelError
from pz_bench import store
from pz_bench.cell import (
    CellSpec,
    Status,
    canonical,
    env_seed,
    identity,
    is_trained,
    record,
    training_settings,
)
from pz_bench.lock import FolderLock, Locked
from pz_envs.errors import ConfigError, DataError, PzError
from pz_envs.files import write_atomic

if TYPE_CHECKING:
    from pz_agents.models import LanguageModel
    from pz_agents.sdk.protocols import Agent
    from pz_agents.sdk.types import Ids

DONE, FAILED, LOCKED, INTERRUPTED = 0, 1, 75, 130
PROGRESS = "progress.json"

_MODEL_CONCURRENCY = 32
_CONCURRENCY = 8
_LOCK_SECONDS = 3.0

_logger = logging.getLogger(__name__)


class Progress:
    """Tells the parent how far the cell is, through a small file, a few times a second.

    Beside ``done`` of ``total`` it says where the phase began (``from``) and its ``seconds`` so
    far, from which a reader can tell what is left.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / PROGRESS
        self._last = 0.0
        self._phase = ""
        self._began = 0.0
        self._from = 0

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Report ``done`` of ``total`` in ``phase``; the first and last report are always seen."""
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._began, self._from = phase, now, done
        if 0 < done < total and now - self._last < 0.5:
            return
        self._last = now
        values = {"phase": phase, "done": done, "total": total, "from": self._from}
        write_atomic(self._path, json.dumps(values | {"seconds": round(now - self._began, 3)}))


def measure(folder: Path) -> None:
    """Measure what the cell in ``folder`` still owes and seal it.

    Raises:
        PzError: the cell cannot be measured.
    """
    began = time.monotonic()
    cell = store.read_cell(folder)
    spec = cell.spec
    progress = Progress(folder)
    try:
        with FolderLock(folder, wait_seconds=_LOCK_SECONDS) as lock:
            try:
                _check_unchanged(cell)
                store.begin_cell(folder)
                agent, model = _player(spec, folder, progress)
                decode = None if model is None else model.decode
                _evaluate(spec, agent, decode, folder, progress, lock.check)
            except (ConfigError, DataError, AgentError, ModelError) as error:
                _seal(folder, "failed", str(error), began)
                raise
            except BaseException:
                _seal(folder, "partial", None, began)
                raise
            _seal(folder, *_verdict(folder), began)
    finally:
        (folder / PROGRESS).unlink(missing_ok=True)


def _check_unchanged(cell: store.CellFile) -> None:
    """Raise ConfigError when the number would no longer be the one that the cell's id names."""
    now = identity(cell.spec)
    changed = [name for name in now if canonical(now[name]) != canonical(cell.identity.get(name))]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)} of this cell changed since it was planned; run the same "
            "command again, which measures it as a new cell"
        )


def _player(spec: CellSpec, folder: Path, progress: Progress) -> tuple[Agent, LanguageModel | None]:
    """Return who plays and with which model, trained first where the algorithm says so."""
    from pz_agents.sdk.loading import load_agent

    if is_trained(spec.algorithm):
        from pz_agents.algorithms import load_trainer
        from pz_agents.training.run import train

        def on_step(step: int, steps: int, metrics: Mapping[str, float]) -> None:
            progress("train", step, steps)

        trainer = load_trainer(spec.algorithm)
        if trainer is not None:
            policy = trainer.train(training_settings(spec), folder / "train", on_progress=on_step)
            return trainer.player(policy, **spec.agent_kwargs), None
        policy = train(training_settings(spec), folder / "train", on_progress=on_step)
        model = _load_model(str(policy))
        return load_agent("zeroshot", model=model, kwargs=spec.agent_kwargs), model
    model = None if spec.model is None else _load_model(spec.model)
    return load_agent(spec.algorithm, model=model, kwargs=spec.agent_kwargs), model


def _load_model(name: str) -> Any:
    from pz_agents.models import load_model

    model = load_model(name)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    return model


def _evaluate(
    spec: CellSpec,
    agent: Agent,
    decode: Callable[[Ids], str] | None,
    folder: Path,
    progress: Progress,
    check_lock: Callable[[], None],
) -> None:
    from pz_agents.rollout.loop import EpisodeSpec, Limits, run_episodes
    from pz_envs.catalog import make_env

    wants_commands = True if getattr(agent, "needs_admissible_commands", False) else None
    make = functools.partial(
        make_env, split="eval", admissible_commands=wants_commands, **spec.env_kwargs
    )
    limits = Limits(
        turns=spec.max_turns,
        tokens=spec.max_tokens,
        seconds=spec.max_seconds,
        invalid_streak=spec.max_invalid_streak,
        repeats=spec.max_repeats,
    )
    with contextlib.closing(store.EpisodeLog(folder)) as log:
        owed = [number for number in range(spec.episodes) if number not in log.numbers]
        progress("evaluate", spec.episodes - len(owed), spec.episodes)
        trajectories = run_episodes(
            agent,
            [EpisodeSpec(str(number), spec.env, env_seed(spec.env, number)) for number in owed],
            make_env=make,
            limits=limits,
            seed=spec.seed,
            concurrency=_CONCURRENCY if spec.model is None else _MODEL_CONCURRENCY,
        )
        with contextlib.closing(trajectories):  # type: ignore[type-var]
            for trajectory in trajectories:
                check_lock()
                if trajectory.status == "failed":
                    _logger.warning("episode %s failed: %s", trajectory.key, trajectory.error)
                log.append(record(int(trajectory.key), trajectory, decode))
                progress("evaluate", len(log.numbers), spec.episodes)


def _verdict(folder: Path) -> tuple[Status, str | None]:
    """Return ``done``, or ``failed`` when not one episode could be played."""
    episodes = store.read_episodes(folder)
    if any(episode.status != "failed" for episode in episodes):
        return "done", None
    return "failed", f"all {len(episodes)} episodes failed; the first: {episodes[0].error}"


def _seal(folder: Path, status: Status, reason: str | None, began: float) -> None:
    metrics = train_summary(folder / "train" / "metrics.jsonl")
    seconds = time.monotonic() - began
    store.finish_cell(folder, status, reason=reason, seconds=seconds, train_metrics=metrics)


def train_summary(path: Path) -> Mapping[str, Any] | None:
    """Return what a table wants of a metrics file; None without.

    ``steps``, ``first`` and ``last`` line, and where attempts were retried the shares of retries
    (``improve``) and of base attempts (``improve_per_base``) that a retry bettered, over all steps.
    """
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError):
        return None
    if not lines:
        return None
    found: dict[str, Any] = {"steps": len(lines), "first": lines[0], "last": lines[-1]}
    retries = sum(line.get("retries", 0.0) for line in lines)
    bases = sum(line.get("base_attempts", 0.0) for line in lines)
    if "retries" in lines[0]:
        better = sum(line["improve"] * line["retries"] for line in lines)
        found["retries"] = retries
        found["improve"] = better / retries if retries else None
        found["improve_per_base"] = better / bases if bases else None
    return found


def build_tiny(folder: Path) -> None:
    """Build the model ``tiny``, once, so that cells find it ready; ``folder`` takes the log."""
    from pz_agents.models.tiny import tiny_folder

    progress = Progress(folder)
    tiny_folder(on_progress=lambda step, steps, loss: progress("build", step, steps))


def end_with_parent() -> None:
    """End this process when its standard input closes, which the parent's death does too."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the process's command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pz_bench.cell_process", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--build-tiny", action="store_true", help="only build the model tiny")
    parser.add_argument("--with-parent", action="store_true", help="end when stdin closes")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if options.with_parent:
        end_with_parent()
    try:
        if options.build_tiny:
            build_tiny(options.folder)
        else:
            measure(options.folder)
    except KeyboardInterrupt:
        _logger.warning("interrupted")
        return INTERRUPTED
    except Locked as error:
        _logger.error("%s", error)
        return LOCKED
    except (ConfigError, DataError, AgentError, ModelError) as error:
        _logger.error("%s: %s", type(error).__name__, error)
        return FAILED
    except PzError:
        _logger.exception("the cell broke")
        return 70
    return DONE


if __name__ == "__main__":
    sys.exit(main())
