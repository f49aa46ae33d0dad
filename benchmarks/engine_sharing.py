"""What several callers get of one engine, served one call at a time and side by side, in one run.

An engine of a fleet in a child process, on CPU, with a model of random weights; each caller asks
for a few completions, then for the next few, as a worker does. "In turn" the callers wait for one
another, "shared" the engine puts what waits into one batch; it is the same engine.

    python benchmarks/engine_sharing.py [--model FOLDER] [--rounds 6] [--runtime local]

With ``--model vllm:FOLDER`` (where vLLM is installed) the engine's own batching is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from pz_agents.models import GenerateRequest, load_model
from pz_agents.models.recipe import Recipe
from pz_agents.models.tiny import tiny_config, tiny_tokenizer
from pz_agents.runtime import Handle, Resources, connect, open_runtime
from pz_agents.sdk.types import Ids
from pz_agents.training.worker import pack_files, plain_request

CALLERS = (1, 2, 4)
CALLS = 6
REQUESTS = 4
TOKENS = 32


def small_model(folder: Path) -> str:
    """Write a model of four layers and 128 channels; returns its folder."""
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    recipe = Recipe(layers=4, hidden=128, key_value_heads=2, feed_forward=512, context=256)
    Qwen2ForCausalLM(tiny_config(recipe)).save_pretrained(folder)
    tiny_tokenizer(recipe.context).save_pretrained(folder)
    return str(folder)


def rate(engine: Handle, prompt: Ids, callers: int, turn: AbstractContextManager[Any]) -> float:
    """Return the tokens a second that ``callers`` get together, each call made inside ``turn``."""

    def ask(caller: int) -> int:
        remote, tokens = connect(engine.address), 0
        for call in range(CALLS):
            seeds = range(caller * 1000 + call * 10, caller * 1000 + call * 10 + REQUESTS)
            asked = [plain_request(GenerateRequest(prompt, TOKENS, seed)) for seed in seeds]
            with turn:
                answers = remote.call("generate", asked, 0)
            tokens += sum(len(each["token_ids"]) // 4 for each in answers)
        return tokens

    with ThreadPoolExecutor(callers) as pool:
        began = time.perf_counter()
        tokens = sum(pool.map(ask, range(callers)))
        return tokens / (time.perf_counter() - began)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--runtime", default="local")
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(open_runtime(given.runtime, cpus=2)) as runtime,
    ):
        model = given.model or small_model(Path(folder))
        policy: Any = load_model(model.removeprefix("vllm:").partition("?")[0])
        weights = runtime.share(pack_files(policy.save))
        prompt = policy.encode("You are in a kitchen.")
        (engine,) = runtime.spawn(
            "pz_agents.training.worker:Engine",
            1,
            Resources(cpus=0.1),
            {"model": model, "threads": 1},
            concurrency=max(CALLERS),
        )
        runtime.call(engine, "load", weights, 0).result()
        turns: list[AbstractContextManager[Any]] = [threading.Lock(), contextlib.nullcontext()]
        rate(engine, prompt, max(CALLERS), turns[1])
        print(f"{'callers':>7} {'in turn':>12} {'shared':>12} {'ratio':>6}   (tokens/s)")
        for callers in CALLERS:
            # In turns of their own, and the best of each: the machine has other work too.
            pairs = [
                [rate(engine, prompt, callers, turn) for turn in turns] for _ in range(given.rounds)
            ]
            alone, shared = (max(column) for column in zip(*pairs, strict=True))
            print(f"{callers:>7} {alone:>12.0f} {shared:>12.0f} {shared / alone:>6.2f}")


if __name__ == "__main__":
    main()
