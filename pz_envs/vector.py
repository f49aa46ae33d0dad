"""``gymnasium.make_vec("pz/...", num_envs=64)``: Gymnasium's vector form of the pool.

Observations and actions are tuples of texts, infos are batched by Gymnasium's convention. The
episodes are those of ``gymnasium.vector.SyncVectorEnv`` over the same environment, whatever the
number of processes; ``pool`` says what a failure costs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from pz_envs.errors import EnvError
from pz_envs.pool import AsyncPool, Batch
from pz_envs.textenv import Info, TextSpace


class PoolVectorEnv(VectorEnv[tuple[str, ...], Sequence[str], NDArray[Any]]):
    """Gymnasium's vector form of ``AsyncPool``; what ``gymnasium.make_vec("pz/...")`` makes.

    Observations and actions are tuples of ``num_envs`` texts. The default ``SAME_STEP`` has no row
    in which an action is ignored, so no reply of a model is wasted; a trainer that was written for
    Gymnasium's ``NEXT_STEP`` asks for that. Arguments are those of ``AsyncPool``.
    """

    def __init__(self, env: str, num_envs: int = 1, **kwargs: Any) -> None:
        self.render_mode = kwargs.get("render_mode")
        self.num_envs = num_envs
        self.single_observation_space = TextSpace()
        self.single_action_space = TextSpace()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.pool = AsyncPool(env, num_envs, **kwargs)
        self.metadata = {
            "render_modes": ["ansi"],
            "autoreset_mode": self.pool.autoreset_mode,
        }
        self._observations = [""] * num_envs

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Begin an episode in every environment; seeds as in ``AsyncPool.reset``.

        ``options["reset_mask"]``, a boolean array [num_envs], resets only some of them.

        Raises:
            EnvError: the mask or the seeds do not fit, or an environment cannot be reset.
        """
        options = dict(options or {})
        mask = options.pop("reset_mask", None)
        if mask is None:
            ids = list(range(self.num_envs))
        else:
            if np.shape(mask) != (self.num_envs,) or not np.any(mask):
                raise EnvError(
                    f"reset_mask must be {self.num_envs} booleans, at least one True; got {mask!r}"
                )
            ids = [int(number) for number in np.flatnonzero(mask)]
        if seed is not None and not isinstance(seed, int | np.integer) and mask is not None:
            seed = [seed[number] for number in ids]
        self.pool.reset(seed=seed, options=options, ids=ids)
        _, infos = self._gathered(len(ids))
        return tuple(self._observations), infos

    def step(
        self, actions: Sequence[str]
    ) -> tuple[tuple[str, ...], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Step every environment and wait for all.

        Raises:
            EnvError: not ``num_envs`` texts, or (``DISABLED``) an episode is over.
        """
        self.pool.send(actions)
        batch, infos = self._gathered(self.num_envs)
        order = np.argsort(batch.ids)
        columns = (batch.rewards, batch.terminated, batch.truncated)
        rewards, terminated, truncated = (column[order] for column in columns)
        return tuple(self._observations), rewards, terminated, truncated, infos

    def render(self) -> tuple[str, ...] | None:
        """Return the newest observations in render mode ``ansi``."""
        return tuple(self._observations) if self.render_mode == "ansi" else None

    def close_extras(self, **kwargs: Any) -> None:
        """End the processes."""
        self.pool.close()

    def _gathered(self, count: int) -> tuple[Batch, dict[str, Any]]:
        batch = self.pool.recv(count)
        infos: list[Info | None] = [None] * self.num_envs
        for number, observation, info in zip(
            batch.ids.tolist(), batch.observations, batch.infos, strict=True
        ):
            self._observations[number] = observation
            infos[number] = info
        return batch, batch_infos(infos)


def batch_infos(infos: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """Return Gymnasium's batched form: for each key an array [n], and under ``_key`` who has it.

    Dictionaries are batched in turn. Numbers get the narrowest type that holds all of them (where
    Gymnasium takes the first one's), arrays of one shape are stacked, anything else is an object
    array with None where there is nothing.
    """
    batched: dict[str, Any] = {}
    for key in dict.fromkeys(key for info in infos if info is not None for key in info):
        has = np.array([info is not None and key in info for info in infos], np.bool_)
        values = [info[key] for info in infos if info is not None and key in info]
        if all(isinstance(value, dict) for value in values):
            batched[key] = batch_infos([None if i is None else i.get(key) for i in infos])
        else:
            batched[key] = _column(values, has)
        batched[f"_{key}"] = has
    return batched


def _column(values: Sequence[Any], has: NDArray[np.bool_]) -> NDArray[Any]:
    kinds = {type(value) for value in values}
    column: NDArray[Any]
    if kinds == {bool}:
        column = np.zeros(len(has), np.bool_)
    elif kinds <= {int, float} and all(abs(value) < 2**53 for value in values):
        column = np.zeros(len(has), np.int64 if kinds == {int} else np.float64)
    elif kinds == {np.ndarray} and len({(value.shape, value.dtype) for value in values}) == 1:
        column = np.zeros((len(has), *values[0].shape), values[0].dtype)
    else:
        column = np.full(len(has), None, dtype=object)
    for number, value in zip(np.flatnonzero(has), values, strict=True):
        column[number] = value
    return column


def __getattr__(name: str) -> Any:
    """Let Gymnasium's ``vector_entry_point`` name an id: ``"pz_envs.vector:pz/Zork1-v0"``."""
    if name.startswith("pz/"):
        return functools.partial(PoolVectorEnv, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
