"""What the learner costs: against plain torch, against TRL's own update, its log, its store.

Rows of log-normal lengths go through the same model under the same loss and optimizer: in a plain
torch loop over the same micro-batches, right after it through our learner, and through TRL's
GRPOTrainer with its own padded batch and its own loss. One thread; CPU time; medians of paired
ratios, the first step of a round left out. With ``--large`` a random model of Qwen2.5-1.5B's shape
takes GRPO steps on a GPU instead, with and without an adapter.

    python benchmarks/learner.py [--rows 128] [--steps 6] [--rounds 3] [--large]
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from datasets import Dataset
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from pz_agents.algorithms.grpo import GRPO, Options
from pz_agents.algorithms.losses import Tokens, Totals
from pz_agents.algorithms.rows import TrainRow
from pz_agents.models.tiny import tiny_config, tiny_tokenizer
from pz_agents.rollout import ExperienceStore
from pz_agents.sdk.types import Sample, Step, Trajectory
from pz_agents.training.batching import group_numbers, log_probs_of, micro_batch, micro_batches
from pz_agents.training.monitors import MetricsLog
from pz_agents.training.settings import TrainSettings
from pz_agents.training.trl_learner import Learner

LOSS = partial(GRPO.loss, options=Options())
BUDGET = 8192

METRICS: dict[str, float] = {}
"""Of the learner's last step."""


def random_rows(count: int, seed: int, mean: float = 67.0, longest: int = 256) -> list[TrainRow]:
    """Return rows of log-normal lengths, some 60 % prompt, nobody's log-probs."""
    rng = np.random.default_rng(seed)
    spread = 0.75
    drawn = rng.lognormal(np.log(mean) - spread**2 / 2, spread, count)
    rows = []
    for index, length in enumerate(np.clip(drawn, 8, longest).astype(int)):
        start = int(length * rng.uniform(0.4, 0.8))
        mask = np.arange(length) >= start
        zeros = np.zeros(length, np.int32)
        rows.append(
            TrainRow(
                ids=rng.integers(20, 250, size=length).astype(np.int32),
                mask=mask,
                log_probs=np.where(mask, -5.6, 0.0).astype(np.float32),
                versions=zeros,
                turns=zeros,
                advantages=np.where(mask, rng.normal(), 0.0).astype(np.float32),
                trajectory_id=str(index),
                group_id=str(index // 8),
            )
        )
    return rows


def settings(steps: int, rank: int = 0) -> TrainSettings:
    """Return what all ways have in common."""
    return TrainSettings(
        env="benchmark",
        steps=steps,
        learning_rate=1e-4,
        max_tokens_per_microbatch=BUDGET,
        lora_rank=rank,
    )


def plain_step(
    network: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer, rows: Sequence[TrainRow]
) -> None:
    """Take one step as one would without any trainer."""
    totals = Totals(float(sum(row.mask.sum() for row in rows)), float(len(rows)))
    groups = group_numbers(rows)
    for part in micro_batches([len(row.ids) for row in rows], BUDGET):
        batch = micro_batch(rows, part, groups)
        log_probs, _ = log_probs_of(network, batch, 1.0, plain_head=True)
        tokens = Tokens(log_probs, batch.log_probs, batch.advantages, batch.mask, totals)
        torch.autograd.backward(LOSS(tokens).value)
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def time_learner(
    network: Qwen2ForCausalLM, steps: Sequence[Sequence[TrainRow]]
) -> tuple[list[float], list[float]]:
    """Return the CPU seconds of each step of the plain loop, and right after it of our learner."""
    other = copy.deepcopy(network).train()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-4, weight_decay=0.0)
    learner = Learner(network, tiny_tokenizer(), settings(len(steps)), LOSS)
    marks: list[float] = []
    plain: list[float] = []
    ours: list[float] = []

    def collect(step: int) -> Sequence[TrainRow]:
        began = time.process_time()
        plain_step(other, optimizer, steps[step - 1])
        plain.append(time.process_time() - began)
        marks.append(time.process_time())
        return steps[step - 1]

    def after_step(step: int, metrics: Any) -> bool:
        ours.append(time.process_time() - marks[-1])
        METRICS.update(metrics)
        return True

    with tempfile.TemporaryDirectory() as folder:
        learner.run(1, len(steps), collect, after_step, Path(folder))
    return plain, ours


def trl_batch(rows: Sequence[TrainRow]) -> dict[str, torch.Tensor]:
    """Return the rows in TRL's own format: prompts padded left, what follows padded right."""
    starts = [row.prompt_length for row in rows]
    width = max(starts)
    length = max(len(row.ids) - start for row, start in zip(rows, starts, strict=True))
    prompts = torch.zeros(2, len(rows), width, dtype=torch.long)
    completions = torch.zeros(3, len(rows), length, dtype=torch.long)
    floats = torch.zeros(2, len(rows), length)
    for place, (row, start) in enumerate(zip(rows, starts, strict=True)):
        prompts[0, place, width - start :] = torch.from_numpy(row.ids[:start])
        prompts[1, place, width - start :] = 1
        rest = slice(0, len(row.ids) - start)
        completions[0, place, rest] = torch.from_numpy(row.ids[start:])
        completions[1, place, rest] = 1
        completions[2, place, rest] = torch.from_numpy(row.mask[start:])
        floats[0, place, rest] = torch.from_numpy(row.log_probs[start:])
        floats[1, place, rest] = torch.from_numpy(row.advantages[start:])
    return {
        "prompt_ids": prompts[0],
        "prompt_mask": prompts[1],
        "completion_ids": completions[0],
        "completion_mask": completions[1],
        "tool_mask": completions[2],
        "old_per_token_logps": floats[0],
        "advantages": floats[1],
        "num_items_in_batch": completions[2].sum().float(),
    }


class OwnTrainer(trl.GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer, unchanged but for where its completions come from."""

    next_rows: Callable[[], Sequence[TrainRow]]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, torch.Tensor]:
        return trl_batch(self.next_rows())


def time_trl(network: Qwen2ForCausalLM, steps: Sequence[Sequence[TrainRow]]) -> list[float]:
    """Return the CPU seconds of each update of TRL's own, in four micro-batches."""
    parts, size = 4, len(steps[0]) // 4
    marks: list[float] = []
    seconds: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.process_time() - marks[-1])

    def next_rows() -> Sequence[TrainRow]:
        marks.append(time.process_time())
        return steps[len(marks) - 1]

    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.GRPOConfig(
            output_dir=folder,
            max_steps=len(steps),
            per_device_train_batch_size=size,
            num_generations=8,
            gradient_accumulation_steps=parts,
            steps_per_generation=parts,
            learning_rate=1e-4,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,  # as in ours; TRL's default is slower
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = OwnTrainer(
            model=network,
            reward_funcs=lambda completions, **columns: [0.0] * len(completions),
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": [""] * len(steps[0]) * len(steps)}),
            processing_class=tiny_tokenizer(),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Watch())
        trainer.next_rows = next_rows
        trainer.train()
    return seconds


def time_log(count: int = 200) -> float:
    """Return the CPU seconds of writing one step's metrics."""
    with tempfile.TemporaryDirectory() as folder:
        log = MetricsLog(Path(folder), 0)
        began = time.process_time()
        for step in range(count):
            log.write({**METRICS, "step": step}, {"seconds": 1.0})
        log.close()
        return (time.process_time() - began) / count


def time_store(rows: Sequence[TrainRow]) -> float:
    """Return the CPU seconds of appending, leasing and acknowledging one step's episodes."""
    episodes = [trajectory(row) for row in rows]
    groups = len({row.group_id for row in rows})
    seconds = []
    with tempfile.TemporaryDirectory() as folder, ExperienceStore(Path(folder) / "x.db") as store:
        for step in range(1, 6):
            batch = [renamed(item, step) for item in episodes]
            began = time.process_time()
            store.append(batch, step - 1)
            store.ack(store.lease(groups), step)
            seconds.append(time.process_time() - began)
    return statistics.median(seconds)


def trajectory(row: TrainRow) -> Trajectory:
    """Return an episode of one turn whose row is ``row``."""
    start = row.prompt_length
    sample = Sample(row.ids[:start], row.ids[start:], row.log_probs[start:], "stop", 0)
    step = Step("observation", "action", 0.0, 0.0, True, False, sample)
    return Trajectory(
        key=row.trajectory_id,
        env_id="benchmark",
        env_seed=0,
        task_id="task",
        group_id=row.group_id,
        attempt=0,
        steps=(step,),
        final_observation="",
        reward=0.0,
        score=0.0,
        max_score=1.0,
        score_norm=0.0,
        success=False,
        terminated=True,
        truncated="",
    )


def renamed(item: Trajectory, step: int) -> Trajectory:
    """Return the episode under the keys of ``step``."""
    return replace(item, key=f"{step}/{item.key}", group_id=f"{step}/{item.group_id}")


def time_head(vocabulary: int, rows: Sequence[TrainRow]) -> tuple[float, float]:
    """Return the CPU seconds of forward and backward with the head everywhere, and where needed."""
    config = tiny_config()
    config.vocab_size = vocabulary
    network = Qwen2ForCausalLM(config)
    groups = group_numbers(rows)
    best = [float("inf"), float("inf")]
    for _ in range(3):
        for plain in (False, True):
            began = time.process_time()
            for part in micro_batches([len(row.ids) for row in rows], 2048):
                batch = micro_batch(rows, part, groups)
                log_probs, _ = log_probs_of(network, batch, 1.0, plain_head=plain)
                torch.autograd.backward(log_probs.sum())
            best[plain] = min(best[plain], time.process_time() - began)
            network.zero_grad()
    return best[0], best[1]


def small(count: int, steps: int, rounds: int) -> None:
    """Compare the ways on the CPU and print a table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = Qwen2ForCausalLM(tiny_config())
    seconds: dict[str, list[float]] = {"plain torch": [], "learner": [], "TRL": []}
    for number in range(rounds):
        batches = [random_rows(count, number * steps + step) for step in range(steps)]
        plain, learner = time_learner(copy.deepcopy(start), batches)
        theirs = time_trl(copy.deepcopy(start), batches)
        for values, new in zip(seconds.values(), (plain, learner, theirs), strict=True):
            values += new[1:]
    rows = random_rows(count, 0)
    tokens = sum(len(row.ids) for row in rows)
    ours = statistics.median(seconds["learner"])

    def paired(left: str, right: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[left], seconds[right], strict=True))

    print(f"a step of {count} rows, {tokens} tokens, {start.num_parameters() / 1e6:.2f} M weights")
    for name, values in seconds.items():
        print(f"  {name:12} {statistics.median(values) * 1e3:7.0f} ms")
    print(f"learner / plain torch   {paired('learner', 'plain torch'):.3f}   (at most 1.05)")
    print(f"TRL's own / learner     {paired('TRL', 'learner'):.2f}    (at least 1.8)")
    print(f"padding                 {METRICS['padding']:.1%}")
    print(f"log / step              {time_log() / ours:.3%}  (at most 1 %)")
    print(f"store / step            {time_store(rows) / ours:.2%}")
    long = [random_rows(32, step, mean=2e6, longest=2048) for step in range(2)]
    share = time_store(long[0]) / time_learner(copy.deepcopy(start), long)[1][1]
    print(f"  with rows of 2k       {share:.2%}   (at most 2 %)")
    for vocabulary in (272, 4096, 32768):
        everywhere, needed = time_head(vocabulary, rows[:32])
        print(f"head, {vocabulary:6} words       {everywhere / needed:.2f} times as fast")


def large() -> None:
    """Take GRPO steps with a model of Qwen2.5-1.5B's shape and print tokens a second."""
    for rank in (0, 16):
        network = qwen_1_5b()
        rows = [random_rows(64, step, mean=600, longest=2048) for step in range(4)]
        torch.cuda.reset_peak_memory_stats()
        began = time.monotonic()
        marks: list[float] = []
        learner = Learner(network, tiny_tokenizer(), settings(4, rank), LOSS)

        def after_step(step: int, metrics: Any, marks: list[float] = marks) -> bool:
            torch.cuda.synchronize()
            marks.append(time.monotonic())
            return True

        def collect(step: int, rows: list[list[TrainRow]] = rows) -> list[TrainRow]:
            return rows[step - 1]

        with tempfile.TemporaryDirectory() as folder:
            learner.run(1, 4, collect, after_step, Path(folder))
        tokens = sum(len(row.ids) for step in rows[1:] for row in step)
        speed = tokens / (marks[-1] - marks[0])
        peak = torch.cuda.max_memory_allocated() / 2**30
        what = f"LoRA rank {rank}" if rank else "all weights"
        first = marks[0] - began
        print(f"{what:12} {speed:8.0f} tokens/s, {peak:5.1f} GiB, first step {first:.1f} s")
        del learner, network
        torch.cuda.empty_cache()


def qwen_1_5b() -> Qwen2ForCausalLM:
    """Return random weights in the shape of Qwen2.5-1.5B on the GPU, in bfloat16."""
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    with torch.device("cuda"):
        return Qwen2ForCausalLM(config).bfloat16()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # the rows' log-probs are made up, and the learner notices
    if options.large:
        large()
    else:
        small(options.rows, options.steps, options.rounds)


if __name__ == "__main__":
    main()
