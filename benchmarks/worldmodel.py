"""The world model on one thread: search, update, encoding, beside the machine's own GEMM rate.

Prints CPU seconds of one thread, the least of several runs: searches of 25 simulations over 20
commands at width 512 with 2 layers for 1, 8 and 64 roots; one update of 64 windows with its
targets; and reading one observation. Weights are random: speed does not depend on them. Search and
update use bfloat16 where the machine is quick at it, as they do in training.

``limit`` is what the machine could do if the model's matrix products were all there is to do, at
the rate measured for as many rows in the same precision; ``share`` is how much of it is reached.

    python benchmarks/worldmodel.py [--quick]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from pz_agents.search.planner import Planner, SearchSettings
from pz_agents.worldmodel.imagination import Imagination
from pz_agents.worldmodel.learner import LearnerSettings, WorldModelLearner
from pz_agents.worldmodel.network import NetworkSettings, WorldModel, product_dtype
from pz_agents.worldmodel.replay import Replay, Segment
from pz_agents.worldmodel.scalars import ATOMS
from pz_agents.worldmodel.texts import Texts, features

SIMULATIONS = 25
COMMANDS = 20
WORDS = [
    "the",
    "a",
    "north",
    "south",
    "east",
    "lamp",
    "sword",
    "house",
    "open",
    "grue",
    "you",
    "see",
]


def least(work: Callable[[], object], repeats: int) -> float:
    """Return the least CPU seconds that ``work`` took."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def observation(random: np.random.Generator, words: int = 60) -> str:
    """Return a text as long as a game's."""
    return " ".join(random.choice(WORDS, words))


def search_rate(roots: int, repeats: int) -> float:
    """Return simulations a CPU second."""
    random = np.random.default_rng(roots)
    torch.manual_seed(0)
    texts = Texts()
    imagined = Imagination(
        WorldModel(), texts, slots=roots, nodes_per_tree=SIMULATIONS + 1, branching=COMMANDS
    )
    commands = [
        texts.intern(f"take {number} {observation(random, 2)}") for number in range(COMMANDS)
    ]
    slots = list(range(roots))
    for turn in range(4):
        seen = [texts.intern(observation(random)) for _ in slots]
        imagined.observe(slots, seen, [commands[0] if turn else None] * roots)
    planner = Planner(SearchSettings(simulations=SIMULATIONS))

    def work() -> None:
        planner.search(imagined.roots(slots, [commands] * roots)[0], imagined)

    work()
    return roots * SIMULATIONS / least(work, repeats)


def update_seconds(repeats: int) -> float:
    """Return CPU seconds of one update on 64 windows of 10 + 5 steps, targets included."""
    random = np.random.default_rng(0)
    texts = Texts()
    replay = Replay(texts)
    commands = tuple(texts.intern(f"take {number}") for number in range(COMMANDS))
    for _ in range(40):
        replay.add(
            Segment(
                tuple(texts.intern(observation(random)) for _ in range(51)),
                tuple(int(random.choice(commands)) for _ in range(50)),
                tuple(float(value) for value in random.integers(0, 2, 50)),
                (commands,) * 50,
                (np.full(COMMANDS, 1 / COMMANDS),) * 50,
                terminated=True,
            )
        )
    torch.manual_seed(0)
    learner = WorldModelLearner(WorldModel(), LearnerSettings())
    learner.learn(replay, random)
    return least(lambda: learner.learn(replay, random), repeats)


def gemm_rate(rows: int, dtype: torch.dtype, repeats: int) -> float:
    """Return FLOP/s of [rows, 512] times [512, 2048], new weights each time, the better layout."""
    left, bias = torch.randn(rows, 512).to(dtype), torch.zeros(2048).to(dtype)
    count = 16 if rows < 100 else 2
    weights = [torch.randn(2048, 512).to(dtype) for _ in range(count)]
    turned = [weight.t().contiguous() for weight in weights]

    def by_rows() -> None:
        for weight in weights:
            functional.linear(left, weight, bias)

    def by_columns() -> None:
        for weight in turned:
            torch.addmm(bias, left, weight)

    by_rows()
    by_columns()
    seconds = min(least(by_rows, repeats), least(by_columns, repeats))
    return count * 2 * rows * 512 * 2048 / seconds


def token_flops(network: NetworkSettings) -> float:
    """Return FLOP of a token's way through the blocks: 12 E^2 weights each."""
    return 2.0 * network.layers * 12 * network.embed**2


def simulation_flops(network: NetworkSettings) -> float:
    """Return FLOP of one simulation: two tokens, four heads of two layers, logits of commands."""
    width = network.embed
    heads = 4 * width**2 + 2 * width**2 + 2 * width * ATOMS + width * COMMANDS
    return 2 * token_flops(network) + 2.0 * heads


def update_flops(network: NetworkSettings, windows: int, horizon: int, td_steps: int) -> float:
    """Return FLOP of an update: forward and twice that backward, and the target's one pass.

    Reading texts is left out: it depends on how many of a batch's texts are distinct.
    """
    width, steps = network.embed, horizon + td_steps
    learned = 3 * horizon * simulation_flops(network)
    target = steps * (2 * token_flops(network) + 2.0 * (width**2 + width * ATOMS))
    return windows * (learned + target)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    repeats = 3 if parser.parse_args().quick else 15
    torch.set_num_threads(1)
    network, kind = NetworkSettings(), product_dtype()
    dtype = str(kind).removeprefix("torch.")
    rates = {
        each: {rows: gemm_rate(rows, each, repeats) for rows in (1, 8, 64, 1280)}
        for each in (torch.float32, torch.bfloat16)
    }
    print("GEMM of M x 512 x 2048, GFLOP/s    M=1    M=8   M=64  M=1280")
    for each, found in rates.items():
        print(f"{each!s:33}" + "".join(f"{rate / 1e9:7.0f}" for rate in found.values()))
    print(f"\nsearch, {SIMULATIONS} simulations, {COMMANDS} commands, 512 x 2, {dtype}")
    print("roots   simulations/s    limit  share   target")
    for roots, target in ((1, 550), (8, 3_000), (64, 6_500)):
        reached, limit = search_rate(roots, repeats), rates[kind][roots] / simulation_flops(network)
        print(f"{roots:5} {reached:15,.0f} {limit:8,.0f} {reached / limit:6.0%} {target:8,}")
    reached = update_seconds(max(3, repeats // 3))
    limit = update_flops(network, 64, 10, 5) / rates[kind][1280]
    print(
        f"\nupdate of 64 windows with targets, {dtype}: {reached:.3f} CPU seconds "
        f"(limit {limit:.3f}, share {limit / reached:.0%}, target 0.33)"
    )
    text = observation(np.random.default_rng(0), 80)
    seconds = least(lambda: [features(text) for _ in range(200)], repeats) / 200
    print(f"\nreading one observation of 80 words: {1e3 * seconds:.3f} ms (target 0.1)")


if __name__ == "__main__":
    main()
