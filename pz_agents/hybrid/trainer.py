"""The algorithm ``priorzero-ppo`` for ``pz-agents train``: UniZero's run with ORZ's half beside it.

What is in the run's folder, and that the same call resumes it to the same weights and metrics, is
as in ``priorzero.run``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from pz_agents.hybrid.engines import Engines, place
from pz_agents.hybrid.half import Half
from pz_agents.hybrid.settings import FREE_TO_CHANGE, HybridSettings
from pz_agents.priorzero import run
from pz_agents.priorzero.run import OnProgress, last_evaluation, player
from pz_agents.priorzero.settings import UniZeroSettings
from pz_agents.runtime import Runtime, open_runtime

__all__ = ["FREE_TO_CHANGE", "Settings", "last_evaluation", "player", "progress_line", "train"]

Settings = HybridSettings


def train(
    settings: HybridSettings,
    folder: Path,
    *,
    resume: str = "auto",
    on_progress: OnProgress | None = None,
    runtime: Runtime | None = None,
) -> Path:
    """Train both halves until ``settings.steps`` are done; see ``priorzero.run.train``.

    Args:
        settings: what to do.
        folder: of this run alone.
        resume: see there.
        on_progress: see there.
        runtime: where engines live, left open; None: one that the settings name is opened.
    """
    with contextlib.ExitStack() as stack:
        if not settings.vllm_num_engines:
            runtime = None
        elif runtime is None:
            runtime = stack.enter_context(contextlib.closing(open_runtime(settings.runtime)))
        engines = None
        if runtime is not None:
            # Before anything else: what this process uses of a GPU it uses of its own.
            each = place(settings, runtime)
            engines = partial(Engines, settings, runtime=runtime, each=each)
        guide = partial(_half, engines=engines)
        return run.train(settings, folder, resume=resume, on_progress=on_progress, guide=guide)


def progress_line(metrics: Mapping[str, float]) -> str:
    """Return what a person wants to see of a step."""
    shown = {
        "train/llm_policy_loss": "PL {:.4f}",
        "train/llm_value_loss": "VL {:.4f}",
        "train/llm_reward_mean": "R {:.3f}",
        "train/llm_valid": "valid {:.2f}",
    }
    parts = [text.format(metrics[name]) for name, text in shown.items() if name in metrics]
    return " ".join([run.progress_line(metrics), *(["| llm", *parts] if parts else [])])


def _half(
    settings: UniZeroSettings,
    start: Path | None,
    folder: Path,
    *,
    resumed: bool,
    engines: Callable[[str], Engines] | None,
) -> Half:
    assert isinstance(settings, HybridSettings)
    return Half(settings, start, folder, resumed=resumed, engines=engines)
