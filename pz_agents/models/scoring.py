"""Log-probs of K candidates after one prefix, the prefix computed once.

Two ways give the same numbers. ``score_tree`` lays the candidates out as a tree of tokens behind
the cached prefix and lets each token attend to the prefix and its own ancestors only: one pass, no
padding, shared beginnings computed once. ``score_expanded`` copies the cached prefix for each row
of a padded batch; it serves models whose attention takes no mask of ours (sliding windows).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from pz_agents.sdk.types import Ids, LogProbs

TREE_TOKENS = 2048
"""Most tree tokens in one pass: their mask is [tokens, prefix + tokens]."""

EXPANDED_ROWS = 16
"""Most copies of the prefix in one pass of ``score_expanded``."""


def score_candidates(network: Any, prefix: Ids, candidates: Sequence[Ids]) -> list[LogProbs]:
    """Return log-softmax(logits) [N_k] at each candidate's tokens after ``prefix``, in float32.

    Args:
        network: a causal language model of transformers, in evaluation mode.
        prefix: [P] token ids, P >= 1.
        candidates: K of [N_k] token ids; one may be empty, or the beginning of another.
    """
    if not candidates:
        return []
    score = score_tree if takes_tree_mask(network.config) else score_expanded
    return score(network, prefix, candidates)


def takes_tree_mask(config: Any) -> bool:
    """Return whether every layer is full attention with a mask that may be given as a tensor."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        plain = getattr(config, "sliding_window", None) is None
    else:
        plain = set(kinds) == {"full_attention"}
    return plain and config._attn_implementation in ("sdpa", "eager")


@torch.no_grad()
def score_tree(network: Any, prefix: Ids, candidates: Sequence[Ids]) -> list[LogProbs]:
    """Score by a tree mask; see ``score_candidates``."""
    first, cache = _read_prefix(network, prefix)
    scores: list[LogProbs] = []
    for chunk in _chunks(candidates):
        scores.extend(_score_chunk(network, len(prefix), first, cache, chunk))
    return scores


@torch.no_grad()
def score_expanded(network: Any, prefix: Ids, candidates: Sequence[Ids]) -> list[LogProbs]:
    """Score by copies of the cached prefix; see ``score_candidates``."""
    first, cache = _read_prefix(network, prefix)
    device = first.device
    scores: list[LogProbs] = []
    for start in range(0, len(candidates), EXPANDED_ROWS):
        chunk = candidates[start : start + EXPANDED_ROWS]
        longest = max(len(ids) for ids in chunk)
        ids = torch.zeros(len(chunk), longest, dtype=torch.long)
        for row, candidate in enumerate(chunk):
            ids[row, : len(candidate)] = torch.from_numpy(np.asarray(candidate, np.int64))
        ids = ids.to(device)
        logits = first.expand(len(chunk), 1, -1)
        if longest > 1:
            copies = copy.deepcopy(cache)
            copies.batch_repeat_interleave(len(chunk))
            mask = torch.ones(
                len(chunk), len(prefix) + longest - 1, dtype=torch.long, device=device
            )
            output = network(ids[:, :-1], attention_mask=mask, past_key_values=copies)
            logits = torch.cat([logits, output.logits.float()], dim=1)
        picked = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0].cpu().numpy()
        scores.extend(picked[row, : len(candidate)] for row, candidate in enumerate(chunk))
    return scores


def _read_prefix(network: Any, prefix: Ids) -> tuple[torch.Tensor, Any]:
    """Return the float32 logits [1, 1, V] after the prefix, and its cache."""
    ids = torch.from_numpy(np.asarray(prefix, np.int64)[None]).to(network.device)
    output = network(ids, use_cache=True, logits_to_keep=1)
    return output.logits.float(), output.past_key_values


def _chunks(candidates: Sequence[Ids]) -> Iterator[list[Ids]]:
    """Split into runs of candidates whose tokens together stay within ``TREE_TOKENS``."""
    chunk: list[Ids] = []
    tokens = 0
    for candidate in candidates:
        if chunk and tokens + len(candidate) > TREE_TOKENS:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(candidate)
        tokens += len(candidate)
    yield chunk


def _score_chunk(
    network: Any, past: int, first: torch.Tensor, cache: Any, candidates: Sequence[Ids]
) -> list[LogProbs]:
    tree, parents, sources = token_tree(candidates)
    logits = first[0]
    if tree:
        tokens = torch.tensor([tree], device=first.device)
        mask, depths = _tree_mask(parents, past, network.dtype)
        output = network(
            tokens,
            attention_mask=mask.to(first.device),
            position_ids=(depths[None] + past - 1).to(first.device),
            past_key_values=cache,
            use_cache=True,
        )
        cache.crop(-len(tree))
        logits = torch.cat([logits, output.logits[0].float()])
    targets = torch.from_numpy(np.concatenate(candidates).astype(np.int64)).to(first.device)
    log_probs = torch.log_softmax(logits, -1)
    picked = log_probs[torch.tensor(sources, dtype=torch.long, device=first.device), targets]
    bounds = np.cumsum([len(candidate) for candidate in candidates])[:-1]
    return np.split(picked.cpu().numpy(), bounds)


def token_tree(candidates: Sequence[Ids]) -> tuple[list[int], list[int], list[int]]:
    """Return the candidates as a tree of tokens behind a prefix; common beginnings appear once.

    A candidate's last token predicts nothing and is left out.

    Returns:
        The nodes' tokens [S], numbered from 1; their parents [S], each before its children, 0 being
        the prefix's last token; and for every token of all candidates the node that predicts it.
    """
    nodes: dict[tuple[int, int], int] = {}
    parents: list[int] = []
    sources: list[int] = []
    for candidate in candidates:
        node = 0
        for position, token in enumerate(np.asarray(candidate).tolist()):
            sources.append(node)
            if position == len(candidate) - 1:
                break
            key = (node, token)
            if key not in nodes:
                nodes[key] = len(nodes) + 1
                parents.append(node)
            node = nodes[key]
    return [token for _, token in nodes], parents, sources


def _tree_mask(
    parents: Sequence[int], past: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the additive mask [1, 1, S, past + S] of a tree and each node's depth [S] from 1.

    Node ``i + 1`` has the parent ``parents[i]``, which comes before it; 0 is the prefix.
    """
    count = len(parents)
    seen = np.zeros((count, past + count), np.bool_)
    seen[:, :past] = True
    depths = np.ones(count, np.int64)
    for node, parent in enumerate(parents):
        if parent:
            seen[node, past:] = seen[parent - 1, past:]
            depths[node] = depths[parent - 1] + 1
        seen[node, past + node] = True
    mask = torch.zeros(count, past + count, dtype=dtype)
    mask.masked_fill_(torch.from_numpy(~seen), torch.finfo(dtype).min)
    return mask[None, None], torch.from_numpy(depths)
