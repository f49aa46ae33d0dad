"""Admissible commands against Jericho's own search: speed and effects kept, in one run.

Each state of a random walk is given to Jericho's search, to the exact and the fast search and to
the cache, one after the other, so that a busy machine slows all alike. Jericho gets the same
object names (it would take them from spaCy, whose time is not counted) and the same fixed chance;
what the input rules refuse does not count. Effects are worlds reached, told apart by their hash.
The fast mode's findings along the walkthrough are made before the clock starts and shown apart.

    python benchmarks/jericho_admissible.py [--states 30] [--seconds 40] [--games zork1 detective]
"""

from __future__ import annotations

import argparse
import hashlib
import random
import tempfile
import time
from pathlib import Path

import jericho

from pz_envs import datasets
from pz_envs.jericho import zloop
from pz_envs.jericho.admissible import AdmissibleCommands, CommandCache
from pz_envs.jericho.commands import refusal, refused_verbs
from pz_envs.jericho.probe import Probe

GAMES = {"zork1": "zork1.z5", "detective": "detective.z5"}
GAMES |= {"pentari": "pentari.z5", "library": "library.z5"}
COLUMNS = ("game", "states", "names", "stock/s", "exact x", "kept", "fast x", "kept", "cached x")
ROW = "{:<10} {:>6} {:>6} {:>8} {:>8} {:>7} {:>7} {:>7} {:>9} {:>8}"


def measure(name: str, states: int, seconds: float, seed: int) -> None:
    """Print one game's row; stops after ``seconds`` with the states done by then (at least 3)."""
    path = datasets.find_file("jericho", GAMES[name])
    if path is None:
        print(f"{name:<10} no {GAMES[name]} is here: set PZ_DATA or run pz-envs data get jericho")
        return
    with tempfile.TemporaryDirectory() as folder:
        _measure(name, path, CommandCache(Path(folder) / "c.sqlite"), states, seconds, seed)


def _measure(
    name: str, path: Path, cache: CommandCache, states: int, seconds: float, seed: int
) -> None:
    frotz = jericho.FrotzEnv(str(path))
    frotz.reset()
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    exact = AdmissibleCommands(frotz, story_md5=md5, mode="exact", timeout_s=600)
    fast = AdmissibleCommands(frotz, story_md5=md5, mode="fast", timeout_s=600)
    cached = AdmissibleCommands(frotz, story_md5=md5, mode="fast", cache=cache, timeout_s=600)
    began = time.perf_counter()
    fast.commands()
    prior = time.perf_counter() - began
    cached.commands()
    probe = Probe(frotz)
    rules = refused_verbs(frotz.bindings["grammar"], frotz.bindings["max_word_length"])
    vocabulary = exact._story.vocabulary
    jericho.jericho.utl.extract_objs = lambda text: {
        (word, "NOUN") for word, _ in vocabulary.words(text)
    }
    generator = random.Random(seed)
    spent = dict.fromkeys(("stock", "exact", "fast", "cached"), 0.0)
    total = kept_exact = kept_fast = names_seen = done = 0
    began = time.perf_counter()
    while done < states and (done < 3 or time.perf_counter() - began < seconds):
        names = list(exact.names())
        frotz._score_object_names = lambda found, names=names: names
        with probe.remembered():
            probe.restore()
            start = time.perf_counter()
            stock = frotz.get_valid_actions(use_parallel=False)
            spent["stock"] += time.perf_counter() - start
        lists = {}
        cached.commands()
        cache._recent.clear()
        for label, commands in (("exact", exact), ("fast", fast), ("cached", cached)):
            start = time.perf_counter()
            lists[label] = commands.commands() or ()
            spent[label] += time.perf_counter() - start
        stock = [command for command in stock if refusal(command, rules) is None]
        with probe.remembered():
            found, by_exact, by_fast = (
                {outcome.effect for outcome in probe.attempt(list(listed))} - {None}
                for listed in (stock, lists["exact"], lists["fast"])
            )
        total += len(found)
        kept_exact += len(found & by_exact)
        kept_fast += len(found & by_fast)
        names_seen += len(names)
        done += 1
        if not lists["exact"] or frotz.step(generator.choice(lists["exact"]))[2]:
            frotz.reset()
    ratio = {label: spent["stock"] / spent[label] for label in ("exact", "fast", "cached")}
    cells = [name, done, f"{names_seen / done:.1f}", f"{done / spent['stock']:.2f}"]
    cells += [f"{ratio['exact']:.1f}", f"{kept_exact / total:.3f}"]
    cells += [f"{ratio['fast']:.1f}", f"{kept_fast / total:.3f}", f"{ratio['cached']:.0f}"]
    print(ROW.format(*cells, f"{prior:.1f} s"), flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, default=40, help="states a game (default 40)")
    parser.add_argument("--seconds", type=float, default=35.0, help="time a game (default 35)")
    parser.add_argument("--games", nargs="+", choices=sorted(GAMES), default=list(GAMES))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"compiled loop: {'yes' if zloop.loop() is not None else 'no (no C compiler)'}")
    print(ROW.format(*COLUMNS, "prior"))
    for name in options.games:
        measure(name, options.states, options.seconds, options.seed)


if __name__ == "__main__":
    main()
