"""What a step spends on anything but playing and learning: logging, the store, a checkpoint.

Runs ``tiny`` on easy Countdown for a few steps in a temporary folder and prints, as shares of the
steps' CPU time, what writing figures and the experience store cost, and the cost of a checkpoint
over that of ``torch.save`` of the same weights and optimizer.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pz_agents.rollout import ExperienceStore
from pz_agents.training import run as training
from pz_agents.training.monitors import MetricsLog
from pz_agents.training.presets import resolve
from pz_agents.training.settings import TrainSettings

SECONDS: defaultdict[str, float] = defaultdict(float)


def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``call`` with its CPU time added to ``SECONDS[name]``."""

    @functools.wraps(call)
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        began = time.process_time()
        try:
            return call(*arguments, **keywords)
        finally:
            SECONDS[name] += time.process_time() - began

    return wrapper


def main() -> None:
    """Train for ``--steps`` steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    steps = parser.parse_args().steps
    for name in ("append", "lease", "ack", "drop_stale", "unspent"):
        setattr(ExperienceStore, name, timed("store", getattr(ExperienceStore, name)))
    MetricsLog.write = timed("logging", MetricsLog.write)  # type: ignore[method-assign]
    saved: list[tuple[Any, Any]] = []
    write = training._Run._write

    def remember(self: Any, folder: Path) -> None:
        saved.append((self.policy.network.state_dict(), self.learner.optimizer.state_dict()))
        write(self, folder)

    training._Run._write = remember  # type: ignore[method-assign]
    training._Run.save = timed("checkpoint", training._Run.save)  # type: ignore[method-assign]
    training._Run.play_and_learn = timed(  # type: ignore[method-assign]
        "run", training._Run.play_and_learn
    )
    values = resolve({"preset": "tiny-countdown", "steps": steps, "save_every": steps})
    with tempfile.TemporaryDirectory() as folder:
        training.train(TrainSettings.model_validate(values), Path(folder))
        began = time.process_time()
        torch.save(saved[-1], Path(folder) / "plain.pt")
        plain = time.process_time() - began
    learned = SECONDS["run"] - SECONDS["checkpoint"]
    print(f"{'CPU time of a step':<42}{learned / steps:8.2f} s")
    print(f"{'writing figures, of a step':<42}{100 * SECONDS['logging'] / learned:8.2f} %")
    print(f"{'store: append, lease, ack, of a step':<42}{100 * SECONDS['store'] / learned:8.2f} %")
    print(f"{'a checkpoint':<42}{SECONDS['checkpoint']:8.2f} s")
    print(f"{'torch.save of weights and optimizer':<42}{plain:8.2f} s")


if __name__ == "__main__":
    main()
