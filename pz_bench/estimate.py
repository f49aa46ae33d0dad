"""What a cell will take before it is run: tokens, GPUs, hours, money.

Tokens follow from the cell's own budget; how much of a budget is used, and how fast models run, are
the assumptions named below, which ``pz-bench plan`` prints beside its figures. A cell whose sister
(the same but for the seed) was measured takes that cell's time instead. The figures order and size
a study; none of them reaches a table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pz_bench.cell import CellSpec, is_trained, training_settings

USED_TURNS = 0.5
"""Share of the turns an episode may take that it takes."""

USED_REPLY = 0.3
"""Share of the longest reply that a reply has."""

OBSERVATION_TOKENS = 150
"""Tokens that the environment adds to the context each turn."""

EVALUATED_REPLY = 128
"""Tokens of a reply where the cell does not say how long one may be."""

REFLECTION = 1.3
"""R3L's reports and guided retries, beside the tokens of its attempts."""

GENERATE_FLOPS = 6e13
"""Of one 80 GB data-centre GPU while sampling (2 FLOPs a parameter a token)."""

TRAIN_FLOPS = 2e14
"""Of one such GPU while learning (6 FLOPs a parameter a token) or reading a prompt (2)."""

CPU_FLOPS = 1e10
"""Of one core, for models small enough to be run on it."""

TURN_SECONDS = 0.005
"""A turn of a player that only chooses, on one core."""

SIMULATION_SECONDS = 0.01
"""A simulation in the true game."""

IMAGINED_SECONDS = 0.001
"""A simulation in a world model of width 96, with its share of learning, on one core."""

_SMALL = 5e7
_TINY_PARAMETERS = 2.7e5
_MCTS_SIMULATIONS = 50


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one cell will take.

    ``prompt_tokens`` are read once each (the prefix is cached), ``sampled_tokens`` written,
    ``trained_tokens`` gone through by the learner; of the first two, evaluation's are in
    ``evaluated_prompt_tokens`` and ``evaluated_sampled_tokens``. ``gpus`` is 0 for a cell that runs
    on one core. ``hours`` is wall clock, None where the speed of a server or of somebody's own
    agent is not known; ``measured`` says that it is the time a sister cell took.
    """

    prompt_tokens: float
    sampled_tokens: float
    trained_tokens: float
    evaluated_prompt_tokens: float
    evaluated_sampled_tokens: float
    gpus: int
    hours: float | None
    measured: bool = False

    @property
    def gpu_hours(self) -> float:
        """GPUs x hours."""
        return self.gpus * (self.hours or 0.0)


def estimate(spec: CellSpec, sister_seconds: float | None = None) -> Estimate:
    """Return what ``spec`` will take; ``sister_seconds`` is a measured sister's wall clock."""
    evaluated, (reads, writes, learns) = _evaluated(spec), _trained(spec)
    reads, writes = reads + evaluated[0], writes + evaluated[1]
    size = parameters(spec.model)
    gpus = 0 if size is None or size < _SMALL else _gpus(size, is_trained(spec.algorithm))
    if sister_seconds is not None:
        hours: float | None = sister_seconds / 3600
    elif spec.model is None:
        hours = _hours_without_model(spec)
    else:
        hours = _hours(spec, size, gpus, reads, writes, learns)
    measured = sister_seconds is not None
    return Estimate(reads, writes, learns, *evaluated, gpus, hours, measured)


def parameters(model: str | None) -> float | None:
    """Return how many parameters ``model`` has, from its weight files or its name.

    None without a model, and for one behind a server whose name does not say.
    """
    if model is None:
        return None
    if model == "tiny":
        return _TINY_PARAMETERS
    weights = list(Path(model).expanduser().glob("*.safetensors"))
    if weights:
        return sum(path.stat().st_size for path in weights) / _bytes_each(Path(model))
    found = re.search(r"(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", model.lower())
    return float(found[1]) * (1e9 if found[2] == "b" else 1e6) if found else None


def sisters(cells: Sequence[tuple[CellSpec, float]]) -> Mapping[str, float]:
    """Return mean seconds by cell-without-its-seed of the (spec, seconds) that were measured."""
    times: dict[str, list[float]] = {}
    for spec, seconds in cells:
        times.setdefault(sister_key(spec), []).append(seconds)
    return {key: sum(values) / len(values) for key, values in times.items()}


def sister_key(spec: CellSpec) -> str:
    """Return what ``spec`` shares with its sisters of other seeds."""
    return spec.model_copy(update={"seed": 0}).model_dump_json()


def assumptions() -> str:
    """Return, for people, what the figures rest on."""
    return (
        f"estimated from {USED_TURNS:.0%} of the turns, {USED_REPLY:.0%} of the longest reply, "
        f"{OBSERVATION_TOKENS} tokens an observation; a GPU samples at {GENERATE_FLOPS / 1e12:.0f} "
        f"and learns at {TRAIN_FLOPS / 1e12:.0f} TFLOP/s; measured where a sister cell was run (*)"
    )


def _evaluated(spec: CellSpec) -> tuple[float, float]:
    """Return (read, written) in evaluation."""
    if spec.model is None:
        return 0.0, 0.0
    reply = float(spec.agent_kwargs.get("max_new_tokens", EVALUATED_REPLY))
    if is_trained(spec.algorithm) and "max_new_tokens" not in spec.agent_kwargs:
        reply = float(training_settings(spec).max_new_tokens)
    return _play(spec.episodes, spec.max_turns, reply)


def _trained(spec: CellSpec) -> tuple[float, float, float]:
    """Return (read, written, learned from) in training."""
    if spec.model is None or not is_trained(spec.algorithm):
        return 0.0, 0.0, 0.0
    settings = training_settings(spec)
    attempts = settings.steps * settings.groups_per_step * settings.group_size
    reads, writes = _play(attempts, settings.max_turns, settings.max_new_tokens)
    factor = REFLECTION if spec.algorithm == "r3l" else 1.0
    reads, writes = factor * reads, factor * writes
    return reads, writes, (reads + writes) * settings.iterations


def _play(episodes: float, turns: int, reply: float) -> tuple[float, float]:
    used = max(1.0, USED_TURNS * turns)
    return episodes * used * OBSERVATION_TOKENS, episodes * used * USED_REPLY * reply


def _hours_without_model(spec: CellSpec) -> float | None:
    """Return the hours of a cell that no language model plays, by what plays it."""
    turns = spec.episodes * max(1.0, USED_TURNS * spec.max_turns)
    if spec.algorithm in ("random", "expert"):
        return turns * TURN_SECONDS / 3600
    if spec.algorithm == "mcts":
        simulations = float(spec.agent_kwargs.get("simulations", _MCTS_SIMULATIONS))
        return turns * simulations * SIMULATION_SECONDS / 3600
    if not is_trained(spec.algorithm):
        return None
    settings = training_settings(spec)
    turns += settings.steps * settings.episodes_per_step * USED_TURNS * settings.max_turns
    width: float = settings.network.embed / 96
    simulations = float(settings.search.simulations)
    return float(turns * simulations * IMAGINED_SECONDS * max(1.0, width**2) / 3600)


def _hours(
    spec: CellSpec, size: float | None, gpus: int, reads: float, writes: float, learns: float
) -> float | None:
    if size is None:
        return None
    if gpus == 0:
        return 2 * size * (reads + writes + 3 * learns) / CPU_FLOPS / 3600
    sampling = 2 * size * (reads / TRAIN_FLOPS + writes / GENERATE_FLOPS)
    learning = 6 * size * learns / TRAIN_FLOPS
    # Half of a trained cell's GPUs sample and half learn, one after the other.
    share = gpus / 2 if is_trained(spec.algorithm) else gpus
    return (sampling + learning) / share / 3600


def _gpus(size: float, trained: bool) -> int:
    """Return 80 GB GPUs; weights, gradients, AdamW and activations: 20 bytes a parameter."""
    if not trained:
        return 1 if size < 3e10 else 4
    learners = 2
    while learners * 6e10 < 20 * size:
        learners *= 2
    return 2 * learners


def _bytes_each(folder: Path) -> int:
    try:
        text = (folder.expanduser() / "config.json").read_text("utf-8")
    except OSError:
        return 2
    return 4 if "float32" in text else 2
