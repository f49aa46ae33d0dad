"""What callers gain who ask one vLLM engine side by side.

    python benchmarks/vllm_async.py [--model tiny] [--callers 1,4,16] [--requests 2] [--tokens 32]

Each caller asks its requests one after the other, each of them alone, as an episode does. The
callers are asked for one after another, which is what an offline engine does for them; in a thread
each; and as tasks of one event loop. Medians of three rounds that take turns, in tokens a second,
and the ratios to one after another in the same round. Needs vLLM: see ``make test-vllm``.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from pz_agents.models import GenerateRequest, load_model
from pz_agents.models.protocol import Message
from pz_agents.models.vllm import VllmModel

ROUNDS = 3
PROMPT: list[Message] = [{"role": "user", "content": "Numbers: 3 5 8. Target: 16. Say how."}]


class Callers:
    """``count`` callers with ``requests`` requests each, and the ways in which they can ask."""

    def __init__(self, model: VllmModel, count: int, requests: int, tokens: int) -> None:
        prompt = model.render(PROMPT)
        self._model = model
        self._asked = [
            [GenerateRequest(prompt, tokens, 1000 * caller + n) for n in range(requests)]
            for caller in range(count)
        ]

    def one_after_another(self) -> int:
        """Return the tokens sampled for all, one caller after another."""
        return sum(map(self._one, self._asked))

    def threads(self) -> int:
        """Return the tokens sampled, in a thread a caller."""
        with ThreadPoolExecutor(len(self._asked)) as pool:
            return sum(pool.map(self._one, self._asked))

    def tasks(self) -> int:
        """Return the tokens sampled, in a task a caller."""

        async def one(asked: list[GenerateRequest]) -> int:
            answers = [await self._model.generate_async([request]) for request in asked]
            return sum(len(answer.token_ids) for [answer] in answers)

        async def everybody() -> int:
            return sum(await asyncio.gather(*map(one, self._asked)))

        return asyncio.run(everybody())

    def _one(self, asked: list[GenerateRequest]) -> int:
        answers = [self._model.generate([request]) for request in asked]
        return sum(len(answer.token_ids) for [answer] in answers)


def speed(way: Callable[[], int]) -> float:
    """Return tokens a second."""
    began = time.perf_counter()
    tokens = way()
    return tokens / (time.perf_counter() - began)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--callers", default="1,4,16")
    parser.add_argument("--requests", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    model = load_model(f"vllm:{options.model}?required=true")
    assert isinstance(model, VllmModel)
    print(f"{'callers':>7} {'one after another':>18} {'threads':>16} {'tasks':>16}")
    Callers(model, 2, 2, options.tokens).tasks()
    for count in map(int, options.callers.split(",")):
        callers = Callers(model, count, options.requests, options.tokens)
        rounds = [
            [speed(way) for way in (callers.one_after_another, callers.threads, callers.tasks)]
            for _ in range(ROUNDS)
        ]
        alone, threads, tasks = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratios = [statistics.median(r[way] / r[0] for r in rounds) for way in (1, 2)]
        print(
            f"{count:7} {alone:18.0f} {threads:7.0f} ({ratios[0]:5.2f}x) "
            f"{tasks:7.0f} ({ratios[1]:5.2f}x)",
            flush=True,
        )


if __name__ == "__main__":
    main()
