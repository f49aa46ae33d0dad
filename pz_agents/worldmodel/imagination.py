"""The world model as something the tree search can step: keys and values stored per node.

Every node of every tree owns two rows in each layer's keys and values, one for the action that led
to it and one for its latent; a leaf attends to the rows of its ancestors and of the context before
the root, found by a table of row numbers. Nothing is copied, hashed or recomputed, and the window
slides exactly. What has happened in an episode is kept by the caller's slot number. Below the root
the admissible commands are unknown: a node offers the most likely of the commands seen so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from pz_agents.search.planner import Expansion, Leaves, Roots
from pz_agents.search.tree import Floats
from pz_agents.worldmodel import scalars
from pz_agents.worldmodel.network import Block, WorldModel, product_dtype
from pz_agents.worldmodel.texts import Texts


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """One block's weights in the search's precision."""

    attention_norm: tuple[torch.Tensor, torch.Tensor]
    query_key_value: tuple[torch.Tensor, torch.Tensor]
    project: tuple[torch.Tensor, torch.Tensor]
    bias: torch.Tensor
    mlp_norm: tuple[torch.Tensor, torch.Tensor]
    expand: tuple[torch.Tensor, torch.Tensor]
    contract: tuple[torch.Tensor, torch.Tensor]


class Imagination:
    """A ``SearchModel`` over ``slots`` episodes at once.

    Call ``observe`` once for every real observation; then ``roots`` and the search itself, which
    calls ``step``. ``refresh`` takes over new weights and forgets all contexts.

    Args:
        model: the world model.
        texts: numbers the texts.
        slots: episodes alive at once.
        nodes_per_tree: the planner's.
        branching: commands offered below the root.
        discount: a step's.
        dtype: of weights, keys and values; None is the one that is quick here.
    """

    def __init__(
        self,
        model: WorldModel,
        texts: Texts,
        *,
        slots: int,
        nodes_per_tree: int,
        branching: int = 20,
        discount: float = 0.997,
        dtype: torch.dtype | None = None,
    ) -> None:
        settings = model.settings
        self._model, self._texts = model, texts
        self._window, self._width, self._heads = settings.window, settings.embed, settings.heads
        self._per_tree, self._branching, self._discount = nodes_per_tree, branching, discount
        self._dtype = dtype = dtype or product_dtype()
        self._simnorm = settings.latent_norm == "simnorm"
        # Rows of slot s: a ring of the last `window` tokens, then two for every node but the root.
        self._per_slot = self._window + 2 * (nodes_per_tree - 1)
        rows = slots * self._per_slot
        self._keys = [torch.zeros(rows, self._width, dtype=dtype) for _ in model.blocks]
        self._values = [torch.zeros(rows, self._width, dtype=dtype) for _ in model.blocks]
        self._seen = np.zeros(slots, np.int64)
        self._known = torch.zeros(slots, self._width, dtype=dtype)
        # Row numbers of each node's window, the newest last; -1 where there was nothing yet.
        self._windows = np.full((slots * nodes_per_tree, self._window), -1, np.int64)
        self._offered = np.zeros((slots * nodes_per_tree, branching), np.int64)
        self._vocabulary: dict[int, int] = {}
        self._tokens = torch.zeros(0, self._width, dtype=dtype)
        self._policy_keys = torch.zeros(0, self._width, dtype=dtype)
        self._trees: list[int] = []
        self._lists: list[np.ndarray] = []
        self.refresh()

    def refresh(self) -> None:
        """Take over the model's present weights; contexts made with the old ones are forgotten."""
        model = self._model
        self._layers = [self._layer(block) for block in model.blocks if isinstance(block, Block)]
        self._final_norm = self._pair(model.final_norm)
        self._kind = model.kind.detach().to(self._dtype)
        observed, acted = (
            (model.policy_head, model.value_head),
            (model.latent_head, model.reward_head),
        )
        self._after_observation = self._heads_of(observed)
        self._after_action = self._heads_of(acted)
        known = list(self._vocabulary)
        self._vocabulary = {}
        self._tokens, self._policy_keys = self._tokens[:0], self._policy_keys[:0]
        self.learn_commands(known)
        self._seen[:] = 0

    @property
    def commands(self) -> tuple[int, ...]:
        """The numbers of all commands that it knows, in the order in which they came."""
        return tuple(self._vocabulary)

    def forget(self, slots: Sequence[int]) -> None:
        """Begin new episodes in these slots."""
        self._seen[list(slots)] = 0

    def learn_commands(self, commands: Sequence[int]) -> None:
        """Embed those commands, by number, that may be offered below a root and are not yet."""
        new = [each for each in dict.fromkeys(commands) if each not in self._vocabulary]
        if not new:
            return
        with torch.inference_mode():
            self._model.eval()
            tokens = self._model.encode_actions(self._texts.bags(new))
            keys = self._model.policy_keys(tokens)
        self._vocabulary |= {command: len(self._tokens) + n for n, command in enumerate(new)}
        self._tokens = torch.cat([self._tokens, tokens.to(self._dtype)])
        self._policy_keys = torch.cat([self._policy_keys, keys.to(self._dtype)])

    @torch.inference_mode()
    def observe(
        self, slots: Sequence[int], observations: Sequence[int], actions: Sequence[int | None]
    ) -> None:
        """Add what happened: the command that was played, then the observation that came of it.

        Args:
            slots: [M] distinct slots.
            observations: [M] numbers of the state texts.
            actions: [M] numbers of the commands before them; None at the start of an episode.
        """
        at = np.asarray(slots, np.int64)
        moved = np.array([action is not None for action in actions])
        if moved.any():
            played = [action for action in actions if action is not None]
            self.learn_commands(played)
            tokens = self._tokens[[self._vocabulary[action] for action in played]] + self._kind[1]
            self._append(at[moved], tokens)
        self._model.eval()
        latents = self._model.encode_observations(self._texts.states(list(observations)))
        self._known[at] = self._append(at, latents.to(self._dtype) + self._kind[0])

    @torch.inference_mode()
    def roots(
        self, slots: Sequence[int], lists: Sequence[Sequence[int]]
    ) -> tuple[Roots, list[Floats]]:
        """Return where trees begin, and each root's policy over its list.

        Args:
            slots: [B] whose last observation is the root of tree b.
            lists: [B] numbers of the admissible commands.
        """
        self.learn_commands([command for each in lists for command in each])
        self._trees = [int(slot) for slot in slots]
        self._lists = [
            np.array([self._vocabulary[command] for command in each], np.int64) for each in lists
        ]
        query, value_logits = self._read(self._known[self._trees], self._after_observation)
        values = scalars.expectation(value_logits).double().numpy()
        policies: list[Floats] = []
        for tree, offered in enumerate(self._lists):
            logits = self._policy_keys[offered] @ query[tree] / self._width**0.5
            policies.append(logits.double().softmax(0).numpy())
        trees = np.arange(len(self._trees)) * self._per_tree
        self._windows[trees] = self._contexts(np.array(self._trees, np.int64))
        return Roots.join(policies, values), policies

    @torch.inference_mode()
    def step(self, leaves: Leaves) -> Expansion:
        """Imagine each leaf from its parent."""
        parents = leaves.parent
        commands = np.empty(len(parents), np.int64)
        is_root = parents % self._per_tree == 0
        inside = ~is_root
        commands[inside] = self._offered[parents[inside], leaves.action[inside]]
        for number in np.flatnonzero(is_root).tolist():
            commands[number] = self._lists[leaves.tree[number]][leaves.action[number]]
        bases = np.array([self._trees[tree] for tree in leaves.tree.tolist()]) * self._per_slot
        own = bases + self._window + 2 * (leaves.node % self._per_tree - 1)
        windows = np.concatenate([self._windows[parents], own[:, None], own[:, None] + 1], axis=1)
        self._windows[leaves.node] = windows[:, 2:]
        tokens = self._tokens[torch.from_numpy(commands)] + self._kind[1]
        acted = self._token(tokens, windows[:, 1:-1])
        latents, reward_logits = self._read(acted, self._after_action)
        known = self._token(self._normalise(latents) + self._kind[0], windows[:, 2:])
        query, value_logits = self._read(known, self._after_observation)
        logits = (query @ self._policy_keys.T).float() / self._width**0.5
        count = min(self._branching, logits.shape[1])
        best, which = logits.topk(count, dim=1)
        self._offered[leaves.node, :count] = which.numpy()
        scalar = scalars.expectation(torch.stack([reward_logits, value_logits])).double().numpy()
        size = len(parents)
        return Expansion(
            reward=scalar[0],
            discount=np.full(size, self._discount),
            value=scalar[1],
            logits=best.flatten().double().numpy(),
            counts=np.full(size, count, np.int64),
        )

    def _append(self, slots: np.ndarray, tokens: torch.Tensor) -> torch.Tensor:
        """Put one token into each slot's ring and return what is known after it: [M, E]."""
        self._seen[slots] += 1
        return self._token(tokens, self._contexts(slots))

    def _contexts(self, slots: np.ndarray) -> np.ndarray:
        """Return the row numbers of each slot's last tokens: [M, window], the newest last.

        Where a token would be from before the episode, it is -1.
        """
        places = self._seen[slots][:, None] + np.arange(-self._window, 0)
        rows = slots[:, None] * self._per_slot + places % self._window
        return np.where(places < 0, -1, rows)

    def _token(self, tokens: torch.Tensor, windows: np.ndarray) -> torch.Tensor:
        """Run one token each through the blocks; its row is the last of its window.

        Args:
            tokens: [M, E].
            windows: [M, window] row numbers, -1 for nothing.
        """
        size, window = windows.shape
        rows = torch.from_numpy(np.maximum(windows, 0))
        own, flat = rows[:, -1], rows.flatten()
        absent = torch.from_numpy(windows < 0)[:, None, :]
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            hidden = functional.layer_norm(tokens, (self._width,), *layer.attention_norm)
            states = _product(hidden, *layer.query_key_value)
            query, key, value = states.chunk(3, dim=-1)
            keys.index_copy_(0, own, key)
            values.index_copy_(0, own, value)
            shape = (size, window, self._heads, -1)
            seen_keys = keys.index_select(0, flat).view(shape)
            seen_values = values.index_select(0, flat).view(shape)
            query = query.view(size, self._heads, -1, 1)
            scores = (seen_keys.transpose(1, 2) @ query).squeeze(-1).float()
            scores = scores * query.shape[2] ** -0.5 + layer.bias
            shares = scores.masked_fill(absent, -torch.inf).softmax(-1).to(self._dtype)
            mixed = (shares.unsqueeze(2) @ seen_values.transpose(1, 2)).reshape(size, self._width)
            tokens = tokens + _product(mixed, *layer.project)
            hidden = functional.layer_norm(tokens, (self._width,), *layer.mlp_norm)
            hidden = functional.gelu(_product(hidden, *layer.expand), approximate="tanh")
            tokens = tokens + _product(hidden, *layer.contract)
        return functional.layer_norm(tokens, (self._width,), *self._final_norm)

    def _read(
        self, known: torch.Tensor, heads: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs of two heads whose first layers are one product."""
        weight, bias, one, one_bias, other, other_bias = heads
        hidden = functional.gelu(_product(known, weight, bias), approximate="tanh")
        left, right = hidden.chunk(2, dim=-1)
        return _product(left, one, one_bias), _product(right, other, other_bias)

    def _normalise(self, latents: torch.Tensor) -> torch.Tensor:
        return self._model.normalise(latents)

    def _layer(self, block: Block) -> _Layer:
        # The bias of distance d, window entries being ordered from the oldest to the newest.
        bias = block.bias.detach().float().flip(-1)
        return _Layer(
            self._pair(block.attention_norm),
            self._pair(block.query_key_value),
            self._pair(block.project),
            bias,
            self._pair(block.mlp_norm),
            self._pair(block.expand),
            self._pair(block.contract),
        )

    def _pair(self, module: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = (parameter.detach().to(self._dtype) for parameter in module.parameters())
        # Rows of inputs: one row times such a matrix is half as quick again as the other way round.
        return weight.t().contiguous(), bias

    def _heads_of(self, pair: tuple[torch.nn.Sequential, ...]) -> tuple[torch.Tensor, ...]:
        firsts = [self._pair(head[0]) for head in pair]
        weight = torch.cat([first[0] for first in firsts], dim=1)
        bias = torch.cat([first[1] for first in firsts])
        return (weight, bias, *self._pair(pair[0][-1]), *self._pair(pair[1][-1]))


def _product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return rows times weight plus bias: [M, I], [I, O] and [O] to [M, O]."""
    return torch.addmm(bias, rows, weight)
