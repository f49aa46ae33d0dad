"""Kills training runs by SIGKILL at calls that a seed chose, and resumes them.

A program of its own, ``python -m kills``: it imports everything once and forks for each attempt,
since imports take most of the time; what it has by then its forks leave to it when they collect
garbage. It writes a line a kill for the test that started it.
"""

import gc
import importlib
import os
import random
import re
import signal
import sys
from pathlib import Path

import fleet_toy

import pz_envs.catalog
from pz_agents.models import load_model
from pz_agents.training import checkpoint, modes
from pz_agents.training import run as training
from pz_agents.training.settings import TrainSettings, algorithm_options

SEED = 18
OURS = re.compile(r"/pz_agents/|/pz_envs/files\.py$")
BOOKS = re.compile(r"/training/(run|checkpoint|monitors|disk)\.py$|/store\.py$|/pz_envs/files\.py$")
"""The modules that keep a run's files."""


class Counter:
    """Counts the calls that modules make in this thread, of functions and of C.

    So also each write, rename and fsync, and each SQL statement.

    Args:
        modules: a pattern for their files.
        at: the call at which this process dies; 0: it does not.
    """

    def __init__(self, modules: re.Pattern[str], at: int) -> None:
        self.made, self._at = 0, at
        self._modules, self._known = modules, {}

    def start(self) -> None:
        """Count from now on."""
        sys.setprofile(self._count)

    def _count(self, frame, event, _) -> None:
        if event not in ("call", "c_call"):
            return
        name = frame.f_code.co_filename
        if name not in self._known:
            self._known[name] = self._modules.search(name) is not None
        if self._known[name]:
            self.made += 1
            if self.made == self._at:
                os.kill(os.getpid(), signal.SIGKILL)


def attempt(chosen: TrainSettings, folder: Path, counter: Counter, after: int = 0):
    """Train in a fork, counting after step ``after``; returns its exit code and the calls made."""
    read, write = os.pipe()
    if os.fork() == 0:
        signal.alarm(250)
        pz_envs.catalog.make_env = fleet_toy.make_env
        training.plot_metrics = lambda metrics, path: []
        modes.Fleet.__init__.__globals__["WORKER"] = "fleet_toy:Worker"

        def on_progress(step, steps, metrics) -> None:
            if step == after:
                counter.start()

        if after == 0:
            counter.start()
        modes.train_both(chosen, folder, on_progress=on_progress)
        sys.setprofile(None)
        os.write(write, str(counter.made).encode())
        os._exit(0)
    os.close(write)
    made = int(os.read(read, 32) or 0)
    os.close(read)
    return os.waitstatus_to_exitcode(os.wait()[1]), made


def step_saved(folder: Path) -> int:
    """Return the step of the newest checkpoint."""
    found = checkpoint.steps_in(folder / "checkpoints")
    return checkpoint.step_of(found[0]) if found else 0


def everywhere(chosen: TrainSettings, folder: Path, points: int) -> None:
    """Kill a fresh run at each point, half of them where files are kept, and resume it."""
    rng = random.Random(SEED)
    totals = [
        attempt(chosen, folder / f"straight-{number}", Counter(modules, 0))[1]
        for number, modules in enumerate((OURS, BOOKS))
    ]
    for point in range(points):
        run, total = folder / f"point-{point}", totals[point % 2]
        at = rng.randrange(1, total + 1)
        killed, _ = attempt(chosen, run, Counter((OURS, BOOKS)[point % 2], at))
        step = step_saved(run)
        resumed, _ = attempt(chosen, run, Counter(OURS, 0), after=-1)
        tell(killed, step, resumed, f"{at}/{total}")


def one_run(chosen: TrainSettings, folder: Path, points: int) -> None:
    """Kill one run again and again, each time a little after one step more, and let it end."""
    rng = random.Random(SEED)
    for after in range(points):
        counter = Counter(BOOKS, rng.randrange(1, 400))
        tell(attempt(chosen, folder / "run", counter, after)[0], step_saved(folder / "run"))
    tell(attempt(chosen, folder / "run", Counter(OURS, 0), after=-1)[0], step_saved(folder / "run"))


def tell(*values: object) -> None:
    """Write a line."""
    sys.stdout.write(" ".join(map(str, values)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    import pz_agents.training.trl_learner  # noqa: F401

    how, given, where, count = sys.argv[1:]
    work = {"everywhere": everywhere, "one_run": one_run}[how]
    settings = TrainSettings.model_validate_json(given)
    algorithm_options(settings)
    load_model(settings.model)
    if settings.runtime.startswith("ray"):
        importlib.import_module("ray")
    gc.collect()
    gc.freeze()
    work(settings, Path(where), int(count))
