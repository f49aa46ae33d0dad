"""Algorithms: each a rollout program, a credit rule, a loss and its options, in one short file.

An algorithm knows nothing about any environment, model or trainer. The table holds module names,
so that listing the algorithms imports none of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from pz_agents.config import Settings
from pz_envs.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pz_agents.algorithms.losses import Loss
    from pz_agents.algorithms.rows import TrainRow
    from pz_agents.rollout.programs import Program
    from pz_agents.sdk.types import Trajectory

__all__ = [
    "ALGORITHMS",
    "TRAINERS",
    "Algorithm",
    "Credit",
    "CriticRule",
    "Estimate",
    "load_algorithm",
    "load_trainer",
]

ALGORITHMS: Mapping[str, str] = {
    "grpo": "pz_agents.algorithms.grpo:GRPO",
    "dapo": "pz_agents.algorithms.dapo:DAPO",
    "opmd": "pz_agents.algorithms.opmd:OPMD",
    "opmd-reweight": "pz_agents.algorithms.opmd:OPMD_REWEIGHT",
    "raft": "pz_agents.algorithms.raft:RAFT",
    "raft-pp": "pz_agents.algorithms.raft:RAFT_PP",
    "r3l": "pz_agents.algorithms.r3l:R3L",
    "r3l-trinity-fork": "pz_agents.algorithms.r3l:R3L_TRINITY_FORK",
    "r3l-trinity-release": "pz_agents.algorithms.r3l:R3L_TRINITY_RELEASE",
    "dr-grpo": "pz_agents.algorithms.variants:DR_GRPO",
    "rloo": "pz_agents.algorithms.variants:RLOO",
    "gspo": "pz_agents.algorithms.variants:GSPO",
    "cispo": "pz_agents.algorithms.variants:CISPO",
    "ppo": "pz_agents.algorithms.ppo:PPO",
}
"""Name of each algorithm and where its ``Algorithm`` is."""

TRAINERS: Mapping[str, str] = {
    "unizero": "pz_agents.priorzero.run",
    "priorzero": "pz_agents.priorzero.trainer",
    "priorzero-ppo": "pz_agents.hybrid.trainer",
}
"""Name of each algorithm that trains no language model, and the module with its ``Settings``,
``FREE_TO_CHANGE``, ``train``, ``player`` and ``progress_line``."""


class Credit(NamedTuple):
    """The rows worth training on, and figures about the groups they came from."""

    rows: Sequence[TrainRow]
    stats: Mapping[str, float]


class Estimate(NamedTuple):
    """Rows with advantages, the returns [L] of each row's tokens, and figures about them."""

    rows: Sequence[TrainRow]
    returns: Sequence[NDArray[np.float32]]
    stats: Mapping[str, float]


class CriticRule(NamedTuple):
    """How a critic is used.

    estimate: rows, the values [L] of each row's tokens, the values of what came after
    trajectories that were cut short, and the options to advantages and returns.
    loss: ``loss(values, old_values, returns, mask, totals, options)``, one micro-batch's share.
    """

    estimate: Callable[..., Estimate]
    loss: Callable[..., Loss]


class Algorithm(NamedTuple):
    """The four parts of an algorithm, and a fifth where it has a critic.

    program: plays episode specs and yields finished trajectories (``pz_agents.rollout.programs``).
    credit: trajectories of one step and the options to rows with advantages.
    loss: ``loss(tokens, options)``, one micro-batch's share of the loss.
    defaults: the options with their default values; users change them under ``options``.
    critic: how its critic is used; the advantages are then the critic's and not the credit's.
    """

    program: Program
    credit: Callable[[Sequence[Trajectory], Any], Credit]
    loss: Callable[..., Loss]
    defaults: Settings
    critic: CriticRule | None = None


def load_algorithm(name: str) -> Algorithm:
    """Return the algorithm called ``name``.

    Raises:
        ConfigError: there is none of that name; the message has the nearest.
    """
    if name not in ALGORITHMS:
        names = (*ALGORITHMS, *TRAINERS)
        known = ", ".join(names)
        raise ConfigError(f"No algorithm `{name}`.{did_you_mean(name, names)} Known: {known}")
    module, attribute = ALGORITHMS[name].split(":")
    algorithm: Algorithm = getattr(importlib.import_module(module), attribute)
    return algorithm


def load_trainer(name: str) -> ModuleType | None:
    """Return the module of a trainer in ``TRAINERS``; None for any other name."""
    return importlib.import_module(TRAINERS[name]) if name in TRAINERS else None
