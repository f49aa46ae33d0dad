"""What it costs to reach a model through the server, and through a process of its own.

    python benchmarks/serve.py [--model tiny] [--requests 64] [--tokens 32]

The same requests are asked directly in one batch, over HTTP from as many threads, one after the
other over HTTP, and in a supervised process. With a scripted model the server's own cost is what is
left. Medians of three rounds that take turns; tokens are those that were sampled.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import openai

from pz_agents.models import GenerateRequest, LanguageModel, load_model
from pz_agents.models.supervised import SupervisedModel
from pz_agents.serving import ModelServer

ROUNDS = 3
PROMPT = [{"role": "user", "content": "Numbers: 3 5 8. Target: 16. Say how."}]


def requests_for(model: LanguageModel, count: int, tokens: int) -> list[GenerateRequest]:
    """Return ``count`` requests with seeds of their own."""
    prompt = model.render(PROMPT)
    return [GenerateRequest(prompt, tokens, seed) for seed in range(count)]


def ask(client: openai.OpenAI, seed: int, tokens: int) -> int:
    """Ask one request over HTTP; returns the number of sampled tokens."""
    answer = client.chat.completions.create(
        model="default", messages=PROMPT, max_tokens=tokens, seed=seed
    )
    return answer.usage.completion_tokens


def measure(ways: dict[str, Callable[[], int]]) -> None:
    """Time each way in turn, ``ROUNDS`` times, and print a row for each."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, int] = {}
    for way in ways.values():
        way()
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began = time.perf_counter()
            tokens[name] = way()
            seconds[name].append(time.perf_counter() - began)
    base = statistics.median(seconds[next(iter(ways))])
    print(f"{'way':<34} {'seconds':>8} {'tokens/s':>9} {'of direct':>9}")
    for name, taken in seconds.items():
        median = statistics.median(taken)
        print(f"{name:<34} {median:8.3f} {tokens[name] / median:9.0f} {base / median:9.2f}")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    model = load_model(options.model)
    count, tokens = options.requests, options.tokens
    asked = requests_for(model, count, tokens)
    with ModelServer(model) as server, SupervisedModel(options.model) as supervised:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
        pool = ThreadPoolExecutor(count)
        few = max(1, count // 8)

        def direct() -> int:
            return sum(len(each.token_ids) for each in model.generate(asked))

        def direct_alone() -> int:
            return sum(len(model.generate([each])[0].token_ids) for each in asked[:few])

        def served() -> int:
            return sum(pool.map(lambda seed: ask(client, seed, tokens), range(count)))

        def served_alone() -> int:
            return sum(ask(client, seed, tokens) for seed in range(few))

        def apart() -> int:
            return sum(len(each.token_ids) for each in supervised.generate(asked))

        print(f"{options.model}: {count} requests of up to {tokens} tokens")
        measure(
            {
                "direct, one batch": direct,
                f"server, {count} threads": served,
                "supervised process, one batch": apart,
            }
        )
        measure({"direct, one after another": direct_alone, "server, one client": served_alone})
        pool.shutdown()


if __name__ == "__main__":
    main()
