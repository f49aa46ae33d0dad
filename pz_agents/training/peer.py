"""A learner rank other than rank 0: the same networks, taught with a share of every step's rows.

What it is told it gets as plain data, and of each row only what networks and losses need. It holds
no store and writes no file; its weights are rank 0's, before the first update and after each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pz_agents.algorithms import load_algorithm
from pz_agents.algorithms.losses import Totals
from pz_agents.algorithms.rows import TrainRow
from pz_agents.training.batching import StepRows, side_by_side
from pz_agents.training.group import Backend, Group, checksum, device_name
from pz_agents.training.settings import TrainSettings, algorithm_options
from pz_agents.training.update import Updater, objective

_FIELDS = {"ids": np.int32, "mask": np.bool_, "log_probs": np.float32, "advantages": np.float32}
"""What networks and losses need of a row."""


class Peer:
    """A rank other than 0: what the runtime's processes hold.

    Args:
        settings: of the run, as plain values.
        number: its rank, less one.
    """

    def __init__(self, settings: dict[str, Any], number: int) -> None:
        from pz_agents.models import load_model
        from pz_agents.training.worker import one_thread

        self._rank = number + 1
        self._settings = TrainSettings(**settings)
        one_thread(self._settings.threads)
        self._updaters = updaters_of(self._settings, load_model(self._settings.model))
        self._group: Group | None = None

    def device(self) -> str:
        """Return which device this rank is on."""
        return device_name(self._updaters["policy"].module)

    def join(self, size: int, host: str, port: int, backend: Backend, seconds: float) -> None:
        """Join the group and take up rank 0's weights and optimizers' states."""
        self._group = Group(self._rank, size, host, port, backend, seconds)
        for updater in self._updaters.values():
            updater.group = self._group
            self._group.same_state(updater.module, updater.optimizer)

    def learn(
        self, name: str, packed: dict[str, Any], state: dict[str, Any]
    ) -> list[dict[str, float]]:
        """Take every update of a step and return each one's figures.

        Args:
            name: of the network.
            packed: this rank's share; see ``pack``.
            state: rank 0's counters.
        """
        torch.set_num_threads(self._settings.threads)
        updater = self._updaters[name]
        # How much fits at once is each rank's own.
        updater.load_counters({**state, "budget": updater.budget})
        return updater.take(updater.prepared(unpack(packed)))

    def per_token(self, name: str, packed: dict[str, Any]) -> bytes:
        """Return what the network ``name`` says of the rows' tokens, row after row."""
        torch.set_num_threads(self._settings.threads)
        return _joined(self._updaters[name].per_token(unpack_rows(packed)), np.float32)

    def checksums(self) -> dict[str, str]:
        """Return the digest of each network's weights."""
        return {name: checksum(updater.module) for name, updater in self._updaters.items()}


def pack(step: StepRows) -> dict[str, Any]:
    """Return a share of a step as plain data; see ``unpack``."""
    lengths = [len(row.ids) for row in step.rows]
    return {
        "rows": pack_rows(step.rows),
        "groups": [int(group) for group in step.groups],
        "minibatches": [[int(number) for number in part] for part in step.minibatches],
        "sums": [list(each) for each in step.sums],
        "sizes": list(step.sizes),
        "targets": {
            name: _joined(
                [each[:length] for each, length in zip(values.numpy(), lengths, strict=True)],
                np.float32,
            )
            for name, values in step.targets.items()
        },
    }


def unpack(packed: Mapping[str, Any]) -> StepRows:
    """Return what ``pack`` was given."""
    lengths = packed["rows"]["lengths"]
    return StepRows(
        rows=unpack_rows(packed["rows"]),
        groups=packed["groups"],
        minibatches=[np.array(part, np.intp) for part in packed["minibatches"]],
        sums=[Totals(*each) for each in packed["sums"]],
        sizes=packed["sizes"],
        targets={
            name: side_by_side(parted(blob, lengths, np.float32))
            for name, blob in packed["targets"].items()
        },
    )


def pack_rows(rows: Sequence[TrainRow]) -> dict[str, Any]:
    """Return what networks and losses need of rows, as plain data."""
    return {
        "lengths": [len(row.ids) for row in rows],
        **{
            name: _joined([getattr(row, name) for row in rows], kind)
            for name, kind in _FIELDS.items()
        },
    }


def unpack_rows(packed: Mapping[str, Any]) -> list[TrainRow]:
    """Return the rows; what ``pack_rows`` left out is empty."""
    nothing = np.empty(0, np.int32)
    fields = [parted(packed[name], packed["lengths"], kind) for name, kind in _FIELDS.items()]
    return [
        TrainRow(
            **dict(zip(_FIELDS, arrays, strict=True)),
            versions=nothing,
            turns=nothing,
            trajectory_id="",
            group_id="",
        )
        for arrays in zip(*fields, strict=True)
    ]


def _joined(arrays: Sequence[NDArray[Any]], kind: type) -> bytes:
    return np.concatenate([np.empty(0, kind), *arrays]).astype(kind).tobytes()


def parted(blob: bytes, lengths: Sequence[int], kind: type) -> list[NDArray[Any]]:
    """Return the arrays of these ``lengths`` that lie in ``blob`` one after another."""
    return np.split(np.frombuffer(blob, kind), np.cumsum(lengths)[:-1]) if lengths else []


def updaters_of(settings: TrainSettings, policy: Any) -> dict[str, Updater]:
    """Return the networks of a rank as the run builds its own."""
    options = algorithm_options(settings)
    rule = load_algorithm(settings.algorithm).critic
    critic: dict[str, Updater] = {}
    if rule is not None:
        from pz_agents.training.critic import Critic

        # The critic copies the weights as they are before any adapter.
        critic["critic"] = Critic(policy, settings, options, rule)
    goal = objective(settings, policy.network)
    learner = Updater(
        policy.network,
        settings,
        goal.loss,
        goal.reference,
        entropy_gradient=goal.entropy_gradient,
    )
    return {"policy": learner, **critic}
