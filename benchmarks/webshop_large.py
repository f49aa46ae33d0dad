"""A synthetic WebShop of a million products: building it, and what serving it costs.

Products are made up by a seed: some 130 indexed words each from a vocabulary of 200,000 with
Mandelbrot's frequencies, 3 KB of text, two options, and 12,087 human-style instructions in all, as
many as the original has. ``build`` writes the shop folder, ``serve`` plays random episodes (search
some words of the instruction, then click) in a fresh process and prints steps a second, private
memory (Private_Clean + Private_Dirty of /proc/self/smaps_rollup) and file sizes; without either,
both are run, each in a process of its own.
Run: ``/usr/bin/time -v python benchmarks/webshop_large.py FOLDER [--products 1000000]``
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pz_envs.seeding import generator
from pz_envs.webshop.build import build_shop
from pz_envs.webshop.env import WebShopEnv
from pz_envs.webshop.products import Annotation, Product

VOCABULARY = 200_000
_SYLLABLE_TEXT = "ba cor dan fi gra hol jun ka lum mar nor ori pel quo ral sen tor ulm ves zin"
SYLLABLES = _SYLLABLE_TEXT.split()
KINDS = ("lamp", "rug", "towel", "jacket", "mug", "shampoo", "serum", "boots", "keyboard", "tea")
COLORS = ("red", "blue", "green", "black", "white", "ivory", "teal", "plum")
SIZES = ("small", "medium", "large", "x-large")
ATTRIBUTES = tuple(
    f"{first} {second}" for first in SYLLABLES for second in ("free", "safe", "wash")
)
HUMAN_GOALS = 12_087
BLOCK = 1000
TITLE, DESCRIPTION, BULLET, FURTHER = 14, 88, 14, 12


def vocabulary() -> list[str]:
    """Return made-up words, the most frequent first."""
    rng = generator("large webshop", "words")
    syllables = np.array(SYLLABLES)
    words: dict[str, None] = {}
    while len(words) < VOCABULARY:
        parts = syllables[rng.integers(0, len(syllables), size=(BLOCK, 5))].tolist()
        lengths = rng.integers(2, 6, size=BLOCK).tolist()
        words.update(
            ("".join(part[:length]), None) for part, length in zip(parts, lengths, strict=True)
        )
    return list(words)[:VOCABULARY]


def products(count: int) -> Iterator[Product]:
    """Yield ``count`` products, the same ones for the same count."""
    words = np.array(vocabulary(), dtype=object)
    frequency = 1.0 / (np.arange(VOCABULARY) + 10.0)
    sums = np.cumsum(frequency / frequency.sum())
    rng = generator("large webshop", count)
    pool = [" ".join(words[np.searchsorted(sums, rng.random(BULLET))]) for _ in range(5000)]
    every = max(1, count // HUMAN_GOALS)
    fresh = TITLE + DESCRIPTION + BULLET
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        drawn = words[np.searchsorted(sums, rng.random((size, fresh))).clip(max=VOCABULARY - 1)]
        choices = rng.integers(0, 1 << 30, size=(size, 8)).tolist()
        bullets = rng.integers(0, len(pool), size=(size, FURTHER)).tolist()
        for place in range(size):
            yield _product(
                start + place, drawn[place].tolist(), choices[place], bullets[place], pool, every
            )


def _product(
    number: int, words: list[str], draw: list[int], bullets: list[int], pool: list[str], every: int
) -> Product:
    kind = KINDS[draw[0] % len(KINDS)]
    own = tuple(ATTRIBUTES[one % len(ATTRIBUTES)] for one in draw[1:4])
    colors = tuple(COLORS[(draw[4] + step) % len(COLORS)] for step in range(3))
    low = 3.0 + draw[5] % 20_000 / 100
    pricing = (low, low + 10.0) if draw[6] % 10 < 3 else (low,)
    asin = f"B{number:09d}"
    people: tuple[Annotation, ...] = ()
    if number % every == 0 and number // every < HUMAN_GOALS:
        text = f"i want a {kind} that is {own[0]}, {words[0]} {words[5]} {words[9]}, in {colors[0]}"
        people = (Annotation(text, own[:2], (colors[0],)),)
    return Product(
        asin=asin,
        title=f"{' '.join(words[:TITLE])} {kind}",
        description=" ".join(words[TITLE : TITLE + DESCRIPTION]),
        bullets=(" ".join(words[-BULLET:]), *(pool[one] for one in bullets)),
        pricing=pricing,
        price_text=" to ".join(f"${price}" for price in pricing),
        options={"color": colors, "size": SIZES[: 1 + draw[7] % len(SIZES)]},
        attributes=own,
        category="garden",
        query=kind,
        product_category=f"Home › {kind.title()}s › {words[1]}",
        nouns=(*words[:TITLE], kind),
        instruction=f"Find me {own[0]} {kind}",
        instruction_attributes=own,
        annotations=people,
    )


def build(folder: Path, count: int) -> None:
    """Build the shop folder and print what it took."""
    began, own = time.perf_counter(), time.process_time()

    def show(done: int) -> None:
        if done % 20_000 == 0:
            took = time.perf_counter() - began
            print(f"{done:>9} products, {took:6.0f} s", file=sys.stderr, flush=True)

    build_shop(products(count), folder, name=f"large-{count}", nouns="given", on_progress=show)
    print(
        f"build: {count} products in {time.process_time() - own:.0f} CPU-s, "
        f"{time.perf_counter() - began:.0f} s by the clock"
    )


def serve(folder: Path, episodes: int) -> None:
    """Play random episodes and print speed, latency, memory and sizes."""
    before = private_mib()
    began = time.perf_counter()
    env = WebShopEnv(source=str(folder))
    print(f"open, goals drawn or found: {time.perf_counter() - began:.2f} s")
    opened = private_mib()
    searches: list[float] = []
    steps = 0
    wall, own = time.perf_counter(), time.process_time()
    for episode in range(episodes):
        env.reset(seed=episode)
        rng = generator("large webshop", "play", episode)
        for _ in range(15):
            action = env.random_action(rng) or ""
            at = time.perf_counter()
            over = env.step(action)[2]
            if action.startswith("search["):
                searches.append(time.perf_counter() - at)
            steps += 1
            if over:
                break
    own, wall = time.process_time() - own, time.perf_counter() - wall
    print(f"steps: {steps} in {episodes} episodes, {len(searches)} of them searches")
    print(f"steps a CPU-second: {steps / own:.0f}; by the clock: {steps / wall:.0f}")
    half, most = np.percentile(searches, [50, 99]) * 1e3
    print(f"a search step by the clock: p50 {half:.2f} ms, p99 {most:.2f} ms")
    print(f"private memory, MiB: {before:.1f} imported, {opened:.1f} opened, ", end="")
    print(f"{private_mib():.1f} after the last step")
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size / 2**20:10.1f} MiB  {path.name}")


def private_mib() -> float:
    """Return this process's private memory in MiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    sizes = [int(line.split()[1]) for line in lines if line.startswith("Private_")]
    return sum(sizes) / 1024


def main() -> None:
    """Build, serve, or both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", nargs="?", choices=("build", "serve"))
    parser.add_argument("--products", type=int, default=1_000_000)
    parser.add_argument("--episodes", type=int, default=1000)
    given = parser.parse_args()
    if given.part == "build":
        build(given.folder, given.products)
    elif given.part == "serve":
        serve(given.folder, given.episodes)
    else:
        for part in ("build", "serve"):
            command = [sys.executable, __file__, str(given.folder), part]
            command += ["--products", str(given.products), "--episodes", str(given.episodes)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
