"""Writes ``mctx_visits.json``: what DeepMind's mctx visits in a small decision process.

The process is a table of states with six actions each, made here once and kept in the file, so that
the test needs no mctx and no jax. Rewards and values are never below the root's, by which "scaled
by the tree's lowest value and the floor" is a fixed range and mctx's PUCT with that range is
ours; mctx completes unvisited actions by the least q, we by the mean of the node's value and its
visited siblings, so that one function is given to it. Its Gumbel search is left as it is.

    pip install mctx jax && python tests/agents/make_mctx_golden.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mctx
import numpy as np

STATES, ACTIONS, ROOTS = 30, 6, 32
FLOOR = 10.0
CONSIDERED = 4
C_BASE = 1e12
"""mctx takes the logarithm of the node's visits, we of its actions' visits; here it vanishes."""
GOLDEN = Path(__file__).with_name("mctx_visits.json")


def make_process() -> dict[str, Any]:
    """Return the tables; state 0, every root's, is worth nothing and all else something."""
    rng = np.random.default_rng(20)
    shape = (STATES, ACTIONS)
    return {
        "following": rng.integers(0, STATES, shape),
        "rewards": rng.random(shape).round(4),
        "discounts": np.where(rng.random(shape) < 0.1, 0.0, 0.9),
        "logits": rng.normal(size=shape).round(4),
        "values": (2 * rng.random(STATES)).round(4),
        "root_logits": rng.normal(size=(ROOTS, ACTIONS)).round(4),
        "root_states": rng.integers(0, STATES, ROOTS),
        "root_allowed": (rng.random((ROOTS, ACTIONS)) < 0.8) | (np.arange(ACTIONS) < 2),
    }


def step(process: Any, _: Any, action: Any, state: Any) -> tuple[mctx.RecurrentFnOutput, Any]:
    """Take one action in each state."""
    after = process["following"][state, action]
    return (
        mctx.RecurrentFnOutput(
            reward=process["rewards"][state, action],
            discount=process["discounts"][state, action],
            prior_logits=process["logits"][after],
            value=process["values"][after],
        ),
        after,
    )


def with_mean_of_siblings(tree: Any, node: Any) -> Any:
    """Return q / FLOOR, an unvisited action's q being the mean of the node's value and its own."""
    q, visited = tree.qvalues(node), tree.children_visits[node] > 0
    mean = (tree.raw_values[node] + jnp.sum(q * visited)) / (1 + jnp.sum(visited))
    return jnp.where(visited, q, mean) / FLOOR


def visits(tables: dict[str, Any], rule: str, simulations: int) -> list[list[int]]:
    """Return mctx's visits of every root's six actions."""
    process = {name: jnp.asarray(value) for name, value in tables.items()}
    logits = process["root_logits"]
    common = {
        "params": process,
        "rng_key": jax.random.PRNGKey(0),
        "recurrent_fn": step,
        "num_simulations": simulations,
        "invalid_actions": ~process["root_allowed"],
    }
    at = process["root_states"]
    if rule == "gumbel":
        root = mctx.RootFnOutput(prior_logits=logits, value=process["values"][at], embedding=at)
        found = mctx.gumbel_muzero_policy(
            root=root, gumbel_scale=0.0, max_num_considered_actions=CONSIDERED, **common
        )
    else:
        root = mctx.RootFnOutput(prior_logits=logits, value=jnp.zeros(ROOTS), embedding=at)
        found = mctx.muzero_policy(
            root=root,
            dirichlet_fraction=0.0,
            pb_c_base=C_BASE,
            qtransform=with_mean_of_siblings,
            **common,
        )
    return np.asarray(found.search_tree.summary().visit_counts).astype(int).tolist()


def make() -> dict[str, Any]:
    """Return the file's content."""
    jax.config.update("jax_enable_x64", True)
    tables = make_process()
    return {
        "floor": FLOOR,
        "c_base": C_BASE,
        "considered": CONSIDERED,
        "process": {name: value.tolist() for name, value in tables.items()},
        "visits": {
            f"{rule}-{simulations}": visits(tables, rule, simulations)
            for rule in ("puct", "gumbel")
            for simulations in (25, 80)
        },
    }


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(make(), separators=(",", ":")) + "\n", "utf-8")
