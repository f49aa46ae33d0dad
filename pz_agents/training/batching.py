"""From rows to log-probs: which rows go through the network together, and what comes out.

Rows are sorted by length and cut into micro-batches where the padding and the fixed cost of one
more micro-batch add up to the least, none above a budget of tokens. They are padded on the right,
so that a causal network needs no attention mask: nothing that is trained comes after padding. The
language-model head runs at trained positions alone wherever it is all that lies between the last
hidden states and the logits. A loss is a sum over rows, so that none of this changes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pz_agents.algorithms.losses import Totals, predictions, token_log_probs
from pz_agents.algorithms.rows import TrainRow

MICRO_BATCH_COST = {"cpu": 128, "cuda": 2048}
"""What one more micro-batch costs on each kind of device, in tokens: its kernels start whatever
their size."""


@dataclass(slots=True, eq=False)
class StepRows:
    """This process's rows of a step and what was worked out about them in the first pass.

    groups: the number of each row's group. minibatches: the rows of each update of a pass.
    sums: of each mini-batch, over the rows of all ranks; so is sizes, their number of rows.
    targets: [N, L] what a critic learns, by name.
    old: [N, L] the learner's log-probs before its first update, where a correction needs them.
    reference: [N, L] the reference's, where there is one. updates: how many were taken.
    """

    rows: Sequence[TrainRow]
    groups: Sequence[int]
    minibatches: Sequence[NDArray[np.intp]]
    sums: Sequence[Totals]
    sizes: Sequence[int]
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    old: Tensor | None = None
    reference: Tensor | None = None
    updates: int = 0

    @property
    def totals(self) -> Totals:
        """What the update that is being taken holds."""
        return self.sums[self.updates % len(self.minibatches)]

    @property
    def size(self) -> int:
        """The number of its rows, over all ranks."""
        return self.sizes[self.updates % len(self.minibatches)]

    @property
    def numbers(self) -> NDArray[np.intp]:
        """The rows of the update that is being taken."""
        return self.minibatches[self.updates % len(self.minibatches)]

    @property
    def first_pass(self) -> bool:
        """Whether the update's rows are seen for the first time."""
        return self.updates < len(self.minibatches)


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Some rows of a step, padded on the right to the longest; [B, L] unless said.

    numbers: [B] where the rows stand in the step. ids: token ids. mask: True on sampled tokens.
    log_probs: as the sampler reported them. advantages: 0 off the mask.
    groups: [B] the number of each row's group.
    """

    numbers: Tensor
    ids: Tensor
    mask: Tensor
    log_probs: Tensor
    advantages: Tensor
    groups: Tensor


def micro_batches(
    lengths: Sequence[int], budget: int, cost: int = MICRO_BATCH_COST["cpu"]
) -> list[NDArray[np.intp]]:
    """Return which rows go together, longest first: the cuts of the sorted rows that cost least.

    Args:
        lengths: of the rows, in tokens.
        budget: most tokens of a micro-batch, padding included; a longer row goes alone. 0: all
            rows go together.
        cost: of one more micro-batch, in tokens.
    """
    count = len(lengths)
    if count == 0:
        return []
    order = np.argsort(-np.asarray(lengths), kind="stable")
    if budget == 0:
        return [order]
    # rest[i]: cost of the rows from i on; after[i]: where the micro-batch beginning with i ends.
    rest = np.zeros(count + 1, np.int64)
    after = np.zeros(count, np.intp)
    for first in range(count - 1, -1, -1):
        longest = int(lengths[order[first]])
        most = min(max(budget // max(longest, 1), 1), count - first)
        sizes = np.arange(1, most + 1)
        costs = sizes * longest + cost + rest[first + 1 : first + most + 1]
        best = int(np.argmin(costs))
        rest[first], after[first] = costs[best], first + best + 1
    parts = []
    first = 0
    while first < count:
        parts.append(order[first : after[first]])
        first = int(after[first])
    return parts


def group_numbers(rows: Sequence[TrainRow]) -> list[int]:
    """Return the number of each row's group, in order of appearance."""
    known: dict[str, int] = {}
    return [known.setdefault(row.group_id, len(known)) for row in rows]


def micro_batch(
    rows: Sequence[TrainRow],
    numbers: NDArray[np.intp],
    groups: Sequence[int],
    device: torch.device | None = None,
) -> MicroBatch:
    """Return the rows with these ``numbers`` side by side.

    Args:
        rows: of the step.
        numbers: [B] of the rows to take.
        groups: the number of each of the step's rows' group.
        device: where the tensors go.
    """
    shape = (len(numbers), max(len(rows[number].ids) for number in numbers))
    ids = np.zeros(shape, np.int64)
    mask = np.zeros(shape, np.bool_)
    log_probs, advantages = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for place, number in enumerate(numbers):
        row = rows[number]
        real = slice(0, len(row.ids))
        ids[place, real] = row.ids
        mask[place, real] = row.mask
        log_probs[place, real] = row.log_probs
        advantages[place, real] = row.advantages
    arrays: Mapping[str, NDArray[Any]] = {
        "numbers": np.asarray(numbers, np.int64),
        "ids": ids,
        "mask": mask,
        "log_probs": log_probs,
        "advantages": advantages,
        "groups": np.array([groups[number] for number in numbers], np.int64),
    }
    return MicroBatch(
        **{name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    )


def head_is_plain(module: Any) -> bool:
    """Return whether the logits are the head's output on the last hidden states, and no more.

    Some architectures scale or cap them afterwards; they need all their logits. Four tokens are
    tried, and every bit must agree.
    """
    head, body = module.get_output_embeddings(), module.base_model
    if head is None or body is module:
        return False
    training = module.training
    module.eval()
    ids = torch.arange(4, device=next(module.parameters()).device)[None]
    with torch.no_grad():
        states = getattr(body(input_ids=ids, use_cache=False), "last_hidden_state", None)
        logits = module(input_ids=ids, use_cache=False).logits
        plain = states is not None and torch.equal(head(states), logits)
    module.train(training)
    return plain


def log_probs_of(
    module: Any,
    batch: MicroBatch,
    temperature: float,
    *,
    plain_head: bool = False,
    autocast: torch.dtype | None = None,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return log-probs [B, L] of the sampled tokens (0 off the mask) and their entropies [N].

    Args:
        module: a causal language model.
        batch: B rows with N sampled tokens in all.
        temperature: of sampling.
        plain_head: ``head_is_plain(module)``; the head then runs on N positions, not B * L.
        autocast: the type of matrix products; None: that of the weights. The log-softmax is
            float32 whatever it is.
        entropy_gradient: the entropies keep their graph.
    """
    count = batch.ids.shape[1] - 1
    trained = batch.mask[:, 1:]
    with torch.autocast(batch.ids.device.type, autocast, enabled=autocast is not None):
        if plain_head:
            states = module.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
            logits = module.get_output_embeddings()(predictions(states, count)[trained])
        else:
            logits = module(input_ids=batch.ids, use_cache=False).logits
            logits = predictions(logits, count)[trained]
    chosen, entropy = token_log_probs(
        logits, batch.ids[:, 1:][trained], temperature, entropy_gradient=entropy_gradient
    )
    return at_mask(chosen, batch.mask), entropy


def values_of(module: Any, batch: MicroBatch, autocast: torch.dtype | None = None) -> Tensor:
    """Return values [B, L] of what was there before each sampled token; 0 off the mask.

    Args:
        module: a transformers sequence classifier with one label; its head ``score`` is read at
            the positions that predict sampled tokens.
        batch: B rows.
        autocast: see ``log_probs_of``.
    """
    count = batch.ids.shape[1] - 1
    with torch.autocast(batch.ids.device.type, autocast, enabled=autocast is not None):
        states = module.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
        values = module.score(predictions(states, count)[batch.mask[:, 1:]])
    return at_mask(values.float().squeeze(-1), batch.mask)


def at_mask(flat: Tensor, mask: Tensor) -> Tensor:
    """Return ``flat`` [N] where ``mask`` [B, L] has its N True entries, 0 elsewhere."""
    zeros = torch.zeros(mask.shape, device=flat.device)
    return zeros.masked_scatter(mask, flat)


def side_by_side(arrays: Sequence[NDArray[np.float32]]) -> Tensor:
    """Return ``arrays`` [N, L], padded on the right with 0."""
    padded = np.zeros((len(arrays), max((len(each) for each in arrays), default=0)), np.float32)
    for place, each in enumerate(arrays):
        padded[place, : len(each)] = each
    return torch.from_numpy(padded)
