"""What a person is told of a run: a line a step, its curves, and the last evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from pz_agents.priorzero.evaluate import PREFIX
from pz_agents.training.monitors import read_metrics

PANELS = (
    "reward",
    "evaluator_step/reward_mean",
    "train/wm_total_loss",
    "train/llm_total_loss",
    "train/llm_policy_loss",
    "train/llm_value_loss",
    "train/llm_reward_mean",
    "collector_iter/visit_entropy_mean",
    "collector_iter/llm_agreement_mean",
)
"""What is plotted, as far as a run has it."""


_GROUPS = {"train/wm_": "train/wm/", "train/llm_": "train/llm/", PREFIX: "evals/"}
_NAMES = {"train/llm_policy_loss": "train/llm/rft_loss"}


def also_named(name: str) -> tuple[str, ...]:
    """Return the names under which a monitor shows a figure too: those of the public code."""
    found = [new + name.removeprefix(old) for old, new in _GROUPS.items() if name.startswith(old)]
    return (*found, *([_NAMES[name]] if name in _NAMES else []))


def progress_line(metrics: Mapping[str, float]) -> str:
    """Return what a person wants to see of a step."""
    parts = [f"turns {metrics['env_steps']:.0f}"]
    shown = {
        "reward": "reward {:.2f}",
        "success": "success {:.2f}",
        "collector_iter/visit_entropy_mean": "visit entropy {:.2f}",
        "train/wm_total_loss": "loss {:.3f}",
        "train/llm_total_loss": "llm loss {:.3f}",
        "evaluator_step/reward_mean": "eval {:.2f}",
    }
    parts += [text.format(metrics[name]) for name, text in shown.items() if name in metrics]
    for name in ("failed_episodes", "failed_priors"):
        if metrics.get(name):
            parts.append(f"{name.replace('_', ' ')} {metrics[name]:.0f}")
    return " ".join(parts)


def last_evaluation(folder: Path) -> str:
    """Return one line about the last evaluation of the run in ``folder``; empty without one."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if _has_evaluation(line)]
    if not lines:
        return ""
    parts = list(_parts(lines[-1]))
    return f"evaluation at step {lines[-1]['step']:.0f}: {', '.join(parts)}"


def _has_evaluation(line: Mapping[str, float]) -> bool:
    return f"{PREFIX}reward_mean" in line


def _parts(line: Mapping[str, float]) -> Iterator[str]:
    names = {
        "reward_mean": "reward",
        "wm_reward_mean": "world model alone",
        "llm_reward_mean": "language model alone",
    }
    for name, told in names.items():
        if f"{PREFIX}{name}" in line:
            yield f"{told} {line[PREFIX + name]:.2f}"
    for name, value in line.items():
        if name.startswith(PREFIX) and name.endswith("/reward_mean") and name.count("/") == 2:
            yield f"{name.split('/')[1]} {value:.2f}"
