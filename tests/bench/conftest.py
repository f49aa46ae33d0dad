"""Synthetic cells for the tests of scores and reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from pz_bench.cell import CellResult, CellSpec, EpisodeRecord, env_seed

MakeCell = Callable[..., CellResult]


def _record(env: str, episode: int, value: float, tokens: int, most: float) -> EpisodeRecord:
    return EpisodeRecord(
        episode=episode,
        env_seed=env_seed(env, episode),
        task_id=f"task-{episode}",
        success=value >= 1,
        score=value * most,
        max_score=most,
        score_norm=value,
        reward=value * most,
        turns=4,
        invalid=1,
        format_errors=2,
        sampled_tokens=tokens,
        prompt_tokens=10 * tokens,
        truncated="",
        terminated=True,
        status="ok",
        error=None,
        seconds=0.25,
    )


@pytest.fixture
def make_cell() -> MakeCell:
    """Return ``make(algorithm, env, values, seed=0, ...)``: a done cell, one episode a value."""

    def make(
        algorithm: str,
        env: str,
        values: Sequence[float],
        *,
        seed: int = 0,
        model: str | None = None,
        tokens: int = 0,
        most: float = 1.0,
        status: str = "done",
        reason: str | None = None,
        command: str | None = None,
        **spec: Any,
    ) -> CellResult:
        settings = {"episodes": max(1, len(values)), **spec}
        return CellResult(
            spec=CellSpec(algorithm=algorithm, env=env, model=model, seed=seed, **settings),
            status=status,  # type: ignore[arg-type]
            reason=reason,
            command=command,
            episodes=tuple(
                _record(env, episode, value, tokens, most) for episode, value in enumerate(values)
            ),
            versions={"pz-envs": "0.1.0", "pz-bench": "0.1.0"},
            seconds=1.0,
            id=f"{algorithm}-{env}-{seed}",
        )

    return make
