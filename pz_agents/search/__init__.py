"""Batched tree search: the tree, root priors, the true simulator as a model, and its agent.

Any model that steps batches of (parent, action) can be searched: see ``SearchModel``. Importing
this compiles nothing; the first search does, once, and numba keeps the result on disk.
"""

from pz_agents.search.agent import MctsAgent
from pz_agents.search.planner import (
    Expansion,
    Leaves,
    Planner,
    Roots,
    SearchModel,
    SearchResult,
    SearchSettings,
)
from pz_agents.search.priors import (
    PriorSettings,
    add_noise,
    mix_prior,
    root_notes,
    root_statistics,
    softmax,
    visit_policy,
)
from pz_agents.search.simulator import SimulatorModel, State

__all__ = [
    "Expansion",
    "Leaves",
    "MctsAgent",
    "Planner",
    "PriorSettings",
    "Roots",
    "SearchModel",
    "SearchResult",
    "SearchSettings",
    "SimulatorModel",
    "State",
    "add_noise",
    "mix_prior",
    "root_notes",
    "root_statistics",
    "softmax",
    "visit_policy",
]
