"""WebShop steps a second on a small shop, by page and by player, on one core.

The shop is the built-in catalogue of 3,000 products; episodes are played by a random player, by
the rule (search the instruction, open the first hit, choose, buy) and by the oracle, in turn, so
that the ratios come from one run. Time is this process's CPU time spent inside ``reset`` and
``step``; the player's own thinking is left out. Queries are new in the first round and known in the
second. Goal: 5,000 steps a second.
Run: ``python benchmarks/webshop_step.py [products]``
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict

from pz_envs.seeding import generator
from pz_envs.webshop.env import WebShopEnv
from pz_envs.webshop.expert import rule_agent

EPISODES = 400
LIMIT = 15


class Clock:
    """CPU seconds and calls by what was called."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)

    def add(self, name: str, seconds: float) -> None:
        """Count one call."""
        self.seconds[name] += seconds
        self.calls[name] += 1


def play(env: WebShopEnv, player: str, index: int, clock: Clock) -> None:
    """Play one episode, timing every call into the environment."""
    at = time.process_time()
    observation, info = env.reset(options={"index": index})
    clock.add("reset", time.process_time() - at)
    rng = generator("webshop_step", index)
    for _ in range(LIMIT):
        if player == "oracle":
            action = env.expert_action() or ""
        elif player == "rule":
            action = rule_agent(observation, info)
        else:
            action = env.random_action(rng) or ""
        at = time.process_time()
        observation, _, over, _, info = env.step(action)
        clock.add("search" if action.startswith("search[") else "click", time.process_time() - at)
        if over:
            break


def main() -> None:
    """Print the table."""
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    env = WebShopEnv(num_products=size, split="all")
    indices = generator("webshop_step", "goals").integers(0, size, size=EPISODES).tolist()
    print(f"{size} products    steps/s   µs a reset  µs a search  µs a click")
    for queries in ("new", "known"):
        for player in ("random", "rule", "oracle"):
            clock = Clock()
            for index in indices:
                play(env, player, index, clock)
            steps = clock.calls["search"] + clock.calls["click"]
            cost = {name: clock.seconds[name] / clock.calls[name] * 1e6 for name in clock.calls}
            total = sum(clock.seconds.values())
            print(
                f"{player:8}{queries:8}{steps / total:9.0f} {cost['reset']:12.0f} "
                f"{cost['search']:12.0f} {cost['click']:11.0f}"
            )


if __name__ == "__main__":
    main()
