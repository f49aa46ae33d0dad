"""One row's numbers as matrices of seeds x instances, and their bootstrap replicates.

A table asks for them several times: for means, intervals, ranks and profiles. Each is made once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from pz_bench import scores, stats
from pz_bench.cell import CellResult


class Column(Protocol):
    """What is needed of an environment of the table."""

    @property
    def name(self) -> str:
        """The column's name."""

    @property
    def family(self) -> str:
        """The family that its mean counts in."""

    @property
    def metric(self) -> scores.Metric:
        """The number that it shows."""


class Draws:
    """The matrices of one row and their bootstrap replicates, each made once, when asked for."""

    def __init__(
        self, cells: Mapping[str, list[CellResult]], environments: Sequence[Column]
    ) -> None:
        self._cells = cells
        self._environments = {each.name: each for each in environments if each.name in cells}
        self._matrices: dict[str, stats.Floats] = {}
        self._families: dict[str, stats.Floats] = {}

    def matrix(self, name: str) -> stats.Floats:
        """Return [S, I] of the metric of the environment of that name."""
        if name not in self._matrices:
            metric = self._environments[name].metric
            self._matrices[name] = scores.matrix(self._cells[name], metric)
        return self._matrices[name]

    def members(self, family: str) -> list[str]:
        """Return the environments of a family."""
        return [name for name, each in self._environments.items() if each.family == family]

    def family_mean(self, family: str) -> float:
        """Return the mean over the family's environments."""
        return float(np.mean([np.nanmean(self.matrix(name)) for name in self.members(family)]))

    def family(self, family: str) -> stats.Floats:
        """Return [B] replicates of the mean over the family's environments."""
        if family not in self._families:
            own = {name: self.matrix(name) for name in self.members(family)}
            self._families[family] = stats.macro_replicates({family: own})
        return self._families[family]

    def macro_mean(self) -> float:
        """Return the mean over families."""
        return float(np.mean([self.family_mean(family) for family in self._names()]))

    def macro(self) -> stats.Floats:
        """Return [B] replicates of the mean over families."""
        total: stats.Floats = np.mean([self.family(family) for family in self._names()], axis=0)
        return total

    def seed_means(self) -> dict[str, stats.Floats]:
        """Return environment -> [S] means of its seeds."""
        return {name: np.nanmean(self.matrix(name), axis=1) for name in self._environments}

    def _names(self) -> list[str]:
        return list(dict.fromkeys(each.family for each in self._environments.values()))
