"""Both halves of the hybrid learn: two games, all three modes, engines on a Ray of this machine.

`tiny` is first taught the form of a reply (partly: what is left is for PPO). Each row is one run:
the world model's total loss, the critic's loss and the replies' mean reward (mean of the first two
steps that have them, and of the last two), the first digits of each network's checksum after the
first step and at the end, and whether TensorBoard has the names of the public code.

    python benchmarks/hybrid.py [--out FOLDER] [--runtime ray|local] [--steps 8]
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pz_agents.hybrid.settings import HybridSettings
from pz_agents.hybrid.trainer import train
from pz_agents.hybrid.warmup import teach_form
from pz_agents.runtime import open_runtime
from pz_agents.training import checkpoint
from pz_agents.training.monitors import read_metrics

GAMES = ("pz/Zork1-v0", "pz/Detective-v0")
MODES = ("parallel", "sequential", "alternating")
NAMES = frozenset(
    {
        *("train/wm_total_loss", "train/wm/total_loss", "train/llm_value_loss"),
        *("train/llm/value_loss", "train/llm/rft_loss", "train/llm/reward_mean"),
        *("evaluator_step/reward_mean", "evals/reward_mean"),
    }
)
"""What TensorBoard must have."""

_HEAD = (
    f"{'game':<10} {'mode':<12} {'world model loss':>17} {'critic loss':>15} {'mean reward':>15}  "
    f"{'world model':<13} {'policy':<13} {'critic':<13} tensorboard seconds"
)


def settings(env: str, mode: str, model: str, steps: int, runtime: str) -> HybridSettings:
    """Return one run's settings: small enough for a minute of one core."""
    return HybridSettings.model_validate(
        {
            "env": env,
            "preset": "quick",
            "model": model,
            "steps": steps,
            "wm_training_mode": mode,
            "wm_llm_ratio": 0.8,
            "phase_updates": 20,
            "episodes_per_step": 2,
            "slots": 2,
            "max_turns": 10,
            "replay_ratio": 1.0,
            "network": {"embed": 64, "heads": 4, "layers": 1},
            "learner": {"batch_windows": 16},
            "replay": {"horizon": 5},
            "search": {"simulations": 8},
            "eval_every": steps,
            "eval_episodes": 1,
            "save_every": 1,
            "keep_checkpoints": steps,
            "monitor": "tensorboard",
            "rollout_batch_size": 8,
            "n_samples_per_prompt": 6,
            "actor_learning_rate": 1e-3,
            "prompt_max_len": 320,
            "generate_max_len": 24,
            "runtime": runtime,
            "vllm_num_engines": 1,
            "total_num_nodes": 2,
        }
    )


def checksums(folder: Path, step: int) -> dict[str, str]:
    """Return the first digits of each network's checksum after a step."""
    saved = folder / "checkpoints" / f"step_{step:06d}"
    states: Mapping[str, Mapping[str, torch.Tensor]] = {
        "world": torch.load(saved / "learner.pt", weights_only=True)["model"],
        "policy": load_file(saved / "language" / "model" / "model.safetensors"),
        "critic": load_file(saved / "language" / "critic" / "model.safetensors"),
    }
    found = {}
    for half, state in states.items():
        digest = hashlib.sha256()
        for name in sorted(state):
            digest.update(state[name].contiguous().numpy().tobytes())
        found[half] = digest.hexdigest()[:5]
    return found


def first_and_last(lines: list[dict[str, Any]], name: str) -> str:
    """Return the mean of the first two values and of the last two."""
    values = [line[name] for line in lines if name in line]
    first, last = sum(values[:2]) / len(values[:2]), sum(values[-2:]) / len(values[-2:])
    return f"{first:.3f} {last:.3f}"


def row(folder: Path, env: str, mode: str, seconds: float) -> str:
    """Return a finished run's line of the table."""
    lines = read_metrics(folder / "metrics.jsonl")
    newest = checkpoint.newest(folder / "checkpoints")
    assert newest is not None
    before, after = checksums(folder, 1), checksums(folder, checkpoint.step_of(newest))
    sums = "  ".join(
        f"{before[half]}>{after[half]}" + ("!" if before[half] == after[half] else "")
        for half in after
    )
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    missing = NAMES - set(events.Tags()["scalars"])
    names = ("train/wm_total_loss", "train/llm_value_loss", "train/llm_reward_mean")
    world, value, reward = (first_and_last(lines, name) for name in names)
    told = f"{', '.join(sorted(missing))} missing" if missing else "all names"
    return (
        f"{env.removeprefix('pz/').removesuffix('-v0'):<10} {mode:<12} {world:>17} {value:>15} "
        f"{reward:>15}  {sums}  {told:<11} {seconds:7.0f}"
    )


def main() -> None:
    """Run all six and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--runtime", default="ray")
    parser.add_argument("--steps", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        out = given.out or Path(temporary)
        began = time.monotonic()
        small = settings(GAMES[0], MODES[0], "tiny", given.steps, "local")
        model = str(teach_form(small, out / "model", updates=25))
        print(f"taught the form in {time.monotonic() - began:.0f} s\n{_HEAD}", flush=True)
        runtime = open_runtime(given.runtime, cpus=2)
        try:
            for env in GAMES:
                for mode in MODES:
                    began = time.monotonic()
                    folder = out / f"{env.rpartition('/')[2]}-{mode}"
                    run = settings(env, mode, model, given.steps, given.runtime)
                    train(run, folder, runtime=runtime)
                    print(row(folder, env, mode, time.monotonic() - began), flush=True)
        finally:
            runtime.close()


if __name__ == "__main__":
    main()
