"""The tree alone: simulations a CPU-second of one thread, with a model that costs nothing.

The model hands out arrays made beforehand, so what is timed is the planner: descents, expansions
and backups in the compiled tree, and the Python around each wave. ``whole search`` is
``Planner.search`` as users call it; ``tree`` is the compiled calls of the same searches, without
the Python around them. The least of several rounds is printed; the first round, which compiles or
loads the compiled kernels, is printed apart.

    python benchmarks/search.py [--simulations 25] [--actions 20] [--rule puct] [--rounds 40]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from pz_agents.search import Expansion, Leaves, Planner, Roots, SearchSettings
from pz_agents.search import tree as kernels


class FreeModel:
    """Random rewards, values and logits made beforehand; every node has the same actions."""

    def __init__(self, batch: int, actions: int, rng: np.random.Generator) -> None:
        self._actions = actions
        self._rewards, self._values = rng.normal(size=(2, 64, batch))
        self._logits = rng.normal(size=(64, batch * actions))
        self._discounts = np.full(batch, 0.997)
        self._counts = np.full(batch, actions)
        self._wave = 0

    def step(self, leaves: Leaves) -> Expansion:
        """Answer with the next prepared row."""
        size = len(leaves.tree)
        self._wave = row = (self._wave + 1) % 64
        return Expansion(
            self._rewards[row, :size],
            self._discounts[:size],
            self._values[row, :size],
            self._logits[row, : size * self._actions],
            self._counts[:size],
        )


class Stopwatch:
    """Adds up the time inside the kernels while they are replaced by timed ones."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._kernels = {name: vars(kernels)[name] for name in ("plant", "advance", "conclude")}

    def __enter__(self) -> Stopwatch:
        vars(kernels).update({name: self._timed(kernel) for name, kernel in self._kernels.items()})
        return self

    def __exit__(self, *_: object) -> None:
        vars(kernels).update(self._kernels)

    def _timed(self, kernel: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            start = time.perf_counter()
            result = kernel(*arguments)
            self.seconds += time.perf_counter() - start
            return result

        return call


def measure(settings: SearchSettings, batch: int, actions: int, rounds: int) -> tuple[float, ...]:
    """Return the first search's seconds, and the least seconds of a search: whole and tree."""
    rng = np.random.default_rng(0)
    roots = Roots(
        rng.dirichlet(np.ones(actions), batch).ravel(), np.full(batch, actions), np.zeros(batch)
    )
    model, planner = FreeModel(batch, actions, rng), Planner(settings)
    streams = [np.random.default_rng(number) for number in range(batch)]
    repeats = max(1, 128 // batch)
    start = time.perf_counter()
    planner.search(roots, model, streams)
    first, whole, tree = time.perf_counter() - start, np.inf, np.inf
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(repeats):
            planner.search(roots, model, streams)
        whole = min(whole, (time.process_time() - start) / repeats)
    with Stopwatch() as stopwatch:
        for _ in range(rounds):
            stopwatch.seconds = 0.0
            for _ in range(repeats):
                planner.search(roots, model, streams)
            tree = min(tree, stopwatch.seconds / repeats)
    return first, whole, tree


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulations", type=int, default=25)
    parser.add_argument("--actions", type=int, default=20)
    parser.add_argument("--rule", choices=("puct", "lightzero", "gumbel"), default="puct")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    settings = SearchSettings(simulations=options.simulations, rule=options.rule)
    print(f"{options.rule}, {options.simulations} simulations, {options.actions} actions, 1 thread")
    print("roots   first search   whole search           tree")
    for batch in (1, 8, 64):
        first, whole, tree = measure(settings, batch, options.actions, options.rounds)
        done = batch * options.simulations
        print(
            f"{batch:5d} {first:10.2f} s {done / whole / 1e6:9.3f} M/s {done / tree / 1e6:9.3f} M/s"
        )


if __name__ == "__main__":
    main()
