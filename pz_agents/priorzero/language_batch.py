"""Log-probs, with gradient, of several candidates behind each of several prefixes.

As in ``models.scoring``, a prefix is computed once: prefix and candidates form one row, in which
each token of a candidate sees the prefix and its own ancestors only. Models that take no mask of
ours get a row a candidate instead. Both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pz_agents.models.scoring import takes_tree_mask, token_tree
from pz_agents.sdk.types import Ids


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """What goes through the network, and where the logits of each candidate token come from.

    ids: [R, L], padded on the right. positions: [R, L], and mask: [R, 1, L, L] additive, where the
        rows are trees.
    rows, columns: [N] the places whose logits are needed.
    sources: [T] for each candidate token, in order, the one of these that predicts it.
    targets: [T] the tokens. sequences: [T] the number of each token's candidate.
    """

    ids: Tensor
    positions: Tensor | None
    mask: Tensor | None
    rows: Tensor
    columns: Tensor
    sources: Tensor
    targets: Tensor
    sequences: Tensor


def lay_out(network: Any, prefixes: Sequence[Ids], candidates: Sequence[Sequence[Ids]]) -> Layout:
    """Return the layout for ``network``.

    Args:
        network: a causal language model of transformers.
        prefixes: B of [P] ids, P >= 1.
        candidates: those of each prefix; numbered through in this order, none of them empty.
    """
    flat = [np.asarray(each, np.int64) for group in candidates for each in group]
    lengths = [len(each) for each in flat]
    positions: NDArray[Any] | None = None
    mask: Tensor | None = None
    if takes_tree_mask(network.config):
        ids, positions, mask, rows, columns = _trees(prefixes, candidates, network.dtype)
    else:
        ids, rows, columns = _expanded(prefixes, candidates)
    needed, sources = np.unique(rows * ids.shape[1] + columns, return_inverse=True)

    def moved(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(network.device)

    return Layout(
        ids=moved(ids),
        positions=None if positions is None else moved(positions),
        mask=None if mask is None else mask.to(network.device),
        rows=moved(needed // ids.shape[1]),
        columns=moved(needed % ids.shape[1]),
        sources=moved(sources.astype(np.int64)),
        targets=moved(np.concatenate(flat)),
        sequences=moved(np.repeat(np.arange(len(flat)), lengths)),
    )


def log_probs_of(
    network: Any, layout: Layout, *, plain_head: bool, autocast: torch.dtype | None
) -> Tensor:
    """Return the log-probs [T] of all candidate tokens, in float32.

    Args:
        network: a causal language model.
        layout: made for it.
        plain_head: ``batching.head_is_plain(network)``; the head then runs on N places alone.
        autocast: the type of matrix products; None: that of the weights.
    """
    inputs = {"input_ids": layout.ids, "use_cache": False}
    if layout.mask is not None:
        inputs |= {"attention_mask": layout.mask, "position_ids": layout.positions}
    with torch.autocast(layout.ids.device.type, autocast, enabled=autocast is not None):
        if plain_head:
            states = network.base_model(**inputs).last_hidden_state
            logits = network.get_output_embeddings()(states[layout.rows, layout.columns])
        else:
            logits = network(**inputs).logits[layout.rows, layout.columns]
    return torch.log_softmax(logits.float(), -1)[layout.sources, layout.targets]


def _trees(
    prefixes: Sequence[Ids], candidates: Sequence[Sequence[Ids]], dtype: torch.dtype
) -> tuple[NDArray[Any], NDArray[Any], Tensor, NDArray[Any], NDArray[Any]]:
    """Return ids, positions, mask, and the row and column that predicts each token."""
    trees = [token_tree(group) for group in candidates]
    width = max(len(prefix) + len(tree[0]) for prefix, tree in zip(prefixes, trees, strict=True))
    ids = np.zeros((len(prefixes), width), np.int64)
    positions = np.zeros_like(ids)
    seen = np.zeros((len(prefixes), width, width), np.bool_)
    rows, columns = [], []
    for row, (prefix, (tokens, parents, sources)) in enumerate(zip(prefixes, trees, strict=True)):
        past = len(prefix)
        ids[row, :past], ids[row, past : past + len(tokens)] = prefix, tokens
        positions[row, :past] = np.arange(past)
        seen[row, :past, :past] = np.tri(past, dtype=np.bool_)
        for node, parent in enumerate(parents):
            above = past + parent - 1
            seen[row, past + node] = seen[row, above]
            positions[row, past + node] = positions[row, above] + 1
            seen[row, past + node, past + node] = True
        for place in range(past + len(tokens), width):
            seen[row, place, place] = True
        rows.append(np.full(len(sources), row))
        columns.append(np.asarray(sources) + past - 1)
    mask = torch.zeros(len(prefixes), 1, width, width, dtype=dtype)
    mask.masked_fill_(torch.from_numpy(~seen)[:, None], torch.finfo(dtype).min)
    return ids, positions, mask, np.concatenate(rows), np.concatenate(columns)


def _expanded(
    prefixes: Sequence[Ids], candidates: Sequence[Sequence[Ids]]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return ids, and the row and column that predicts each token."""
    pairs = [(p, each) for p, group in zip(prefixes, candidates, strict=True) for each in group]
    ids = np.zeros((len(pairs), max(len(p) + len(each) for p, each in pairs)), np.int64)
    for row, (prefix, each) in enumerate(pairs):
        ids[row, : len(prefix) + len(each)] = np.concatenate([prefix, each])
    rows = [np.full(len(each), row) for row, (_, each) in enumerate(pairs)]
    columns = [np.arange(len(each)) + len(prefix) - 1 for prefix, each in pairs]
    return ids, np.concatenate(rows), np.concatenate(columns)
