"""The 30 tasks and their variations: a table that needs neither Java nor the engine's package.

Official splits are runs of variations: the first half trains (rounded down to twice a quarter), the
next quarter is for development, the rest tests; the engine's own sets are the same (7,207
variations: 3,592, 1,796 and 1,819). The ``fork`` splits are those of Trinity-RFT's ScienceWorld
example, which R3L uses: 17 tasks train, the other 13 test, and of each the first half of its
variations is played, whatever official split those are in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pz_envs.errors import ConfigError, did_you_mean

Split = Literal["train", "dev", "test", "all", "fork_train", "fork_test"]
"""The official splits, all variations, and the fork's."""

SIMPLIFICATIONS: tuple[str, ...] = (
    "teleportAction",
    "openDoors",
    "openContainers",
    "selfWateringFlowerPots",
    "noElectricalAction",
)
"""What the engine can make easier; ``"easy"`` stands for all that the task allows."""


@dataclass(frozen=True, slots=True)
class Task:
    """One task: the engine's name, the paper's number, and how many variations there are."""

    name: str
    number: str
    variations: int

    @property
    def camel(self) -> str:
        """The name as it stands in an id: ``identify-life-stages-1`` is IdentifyLifeStages1."""
        return "".join(word.capitalize() for word in self.name.split("-"))

    @property
    def electrical(self) -> bool:
        """Whether it is about circuits, so that ``noElectricalAction`` would make it impossible."""
        return "power-component" in self.name or "conductivity" in self.name

    def in_split(self, split: Split) -> range:
        """Return the variations that a split plays; none where the fork leaves the task out."""
        quarter = self.variations // 4
        official = {
            "train": range(2 * quarter),
            "dev": range(2 * quarter, 3 * quarter),
            "test": range(3 * quarter, self.variations),
            "all": range(self.variations),
        }
        if split in official:
            return official[split]
        trains = self.name in _FORK_TRAIN
        return range(self.variations // 2 if trains == (split == "fork_train") else 0)


TASKS: Mapping[str, Task] = {
    name: Task(name, number, variations)
    for number, name, variations in (
        ("1-1", "boil", 30),
        ("1-2", "melt", 30),
        ("1-3", "freeze", 30),
        ("1-4", "change-the-state-of-matter-of", 30),
        ("2-1", "use-thermometer", 540),
        ("2-2", "measure-melting-point-known-substance", 436),
        ("2-3", "measure-melting-point-unknown-substance", 300),
        ("3-1", "power-component", 20),
        ("3-2", "power-component-renewable-vs-nonrenewable-energy", 20),
        ("3-3", "test-conductivity", 900),
        ("3-4", "test-conductivity-of-unknown-substances", 600),
        ("4-1", "find-living-thing", 300),
        ("4-2", "find-non-living-thing", 300),
        ("4-3", "find-plant", 300),
        ("4-4", "find-animal", 300),
        ("5-1", "grow-plant", 126),
        ("5-2", "grow-fruit", 126),
        ("6-1", "chemistry-mix", 32),
        ("6-2", "chemistry-mix-paint-secondary-color", 36),
        ("6-3", "chemistry-mix-paint-tertiary-color", 36),
        ("7-1", "lifespan-longest-lived", 125),
        ("7-2", "lifespan-shortest-lived", 125),
        ("7-3", "lifespan-longest-lived-then-shortest-lived", 125),
        ("8-1", "identify-life-stages-1", 14),
        ("8-2", "identify-life-stages-2", 10),
        ("9-1", "inclined-plane-determine-angle", 168),
        ("9-2", "inclined-plane-friction-named-surfaces", 1386),
        ("9-3", "inclined-plane-friction-unnamed-surfaces", 162),
        ("10-1", "mendelian-genetics-known-plant", 120),
        ("10-2", "mendelian-genetics-unknown-plant", 480),
    )
}
"""Every task by name, in the paper's order."""

_FORK_TRAIN = frozenset(
    (
        *("boil", "melt", "change-the-state-of-matter-of", "use-thermometer"),
        *("measure-melting-point-known-substance", "power-component", "test-conductivity"),
        *("find-living-thing", "find-plant", "grow-plant", "chemistry-mix"),
        *("chemistry-mix-paint-secondary-color", "lifespan-shortest-lived"),
        *("identify-life-stages-2", "inclined-plane-determine-angle"),
        *("inclined-plane-friction-named-surfaces", "mendelian-genetics-known-plant"),
    )
)


def find_task(name: str) -> Task:
    """Return the task of a name.

    Raises:
        ConfigError: no such task; the message names the nearest.
    """
    if name not in TASKS:
        raise ConfigError(
            f"No ScienceWorld task `{name}`.{did_you_mean(name, TASKS)} "
            f"Known: {', '.join(sorted(TASKS))}"
        )
    return TASKS[name]


def episodes(task: str | None, split: Split) -> list[tuple[Task, int]]:
    """Return the (task, variation) pairs of a split, of one task or of all, in the table's order.

    Raises:
        ConfigError: no such task or split, or the split leaves the task out.
    """
    if split not in get_args(Split):
        raise ConfigError(
            f"No ScienceWorld split `{split}`.{did_you_mean(split, get_args(Split))} "
            f"Allowed: {', '.join(get_args(Split))}"
        )
    chosen = TASKS.values() if task is None else (find_task(task),)
    pairs = [(entry, variation) for entry in chosen for variation in entry.in_split(split)]
    if not pairs:
        raise ConfigError(f"The split `{split}` does not play `{task}`; use another split")
    return pairs


def simplification_text(wanted: str | Sequence[str], task: Task) -> str:
    """Return the engine's comma-separated form of simplifications, checked for the task.

    Raises:
        ConfigError: no such simplification, or one that makes the task impossible.
    """
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    allowed = ("easy", *SIMPLIFICATIONS)
    for name in names:
        if name not in allowed:
            raise ConfigError(
                f"No simplification `{name}`.{did_you_mean(name, allowed)} "
                f"Allowed: {', '.join(allowed)}"
            )
    if task.electrical and "noElectricalAction" in names:
        raise ConfigError(
            f"`{task.name}` needs electrical actions; leave noElectricalAction out, or say 'easy', "
            "which leaves it out itself"
        )
    return ",".join(names)
