"""THE table: every Gymnasium id with its family, arguments, data and extras.

A row is all that trainers, the benchmark and the command line know of an environment. Entry points
are strings: neither this module nor registration imports an engine, and ``make_env`` imports only
the one it makes. A row can be listed and yet not be playable here; ``missing`` says why.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import gymnasium

from pz_envs.errors import ConfigError, did_you_mean
from pz_envs.jericho.games import GAMES, MIT_ZORK1_MD5, find_game
from pz_envs.scienceworld.tasks import TASKS

if TYPE_CHECKING:
    from pz_envs.textenv import TextEnv


@dataclass(frozen=True, slots=True)
class EnvRow:
    """One Gymnasium id.

    ``kwargs`` are what ``gym.make`` passes; ``train_kwargs`` and ``eval_kwargs`` are added by
    trainers and by the benchmark (disjoint splits). ``metric`` is the number a leaderboard shows.
    ``dataset`` is None when no data are needed, ``extra`` when no package is. ``expert`` says that
    there is one; it reaches success, or ``expert_score`` where that is not None.
    """

    id: str
    family: str
    entry_point: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    train_kwargs: Mapping[str, Any] = field(default_factory=dict)
    eval_kwargs: Mapping[str, Any] = field(default_factory=dict)
    metric: Literal["success", "score_norm"] = "success"
    max_turns: int = 100
    dataset: str | None = None
    extra: str | None = None
    expert: bool = True
    expert_score: float | None = None


# Games whose bundled walkthrough ends below the maximum (measured with jericho 3.3.1).
_WALKTHROUGH_SCORES = {
    "anchor": 99,
    "balances": 50,
    "curses": 450,
    "lostpig": 6,
    "murdac": 249,
    "theatre": 47,
    "yomomma": 34,
}


_EXTRA_MODULES = {"math": "math_verify"}
"""What an extra installs, where the module is not called as the extra is."""

_MATH_SETS = {
    "DAPOMath": "dapo_math_17k",
    "AIME24": "aime24",
    "AIME25": "aime25",
    "AMC23": "amc23",
    "MATH500": "math500",
    "GSM8K": "gsm8k",
    "Minerva": "minerva_math",
    "OlympiadBench": "olympiadbench",
}


@functools.cache
def rows() -> tuple[EnvRow, ...]:
    """Return every row: families without an engine first, then the games by name."""
    countdown = EnvRow(
        id="pz/Countdown-v0",
        family="countdown",
        entry_point="pz_envs.countdown.env:CountdownEnv",
        train_kwargs={"split": "train"},
        eval_kwargs={"split": "test"},
        max_turns=16,
    )
    games = (
        EnvRow(
            id=f"pz/{game.camel}-v0",
            family="jericho",
            entry_point="pz_envs.jericho.env:JerichoEnv",
            kwargs={"game": game.name},
            metric="score_norm",
            dataset="jericho",
            extra="jericho",
            expert=game.has_walkthrough,
            expert_score=_WALKTHROUGH_SCORES.get(game.name),
        )
        for game in GAMES
    )
    webshop = EnvRow(
        id="pz/WebShop-v0",
        family="webshop",
        entry_point="pz_envs.webshop.env:WebShopEnv",
        train_kwargs={"split": "train"},
        eval_kwargs={"split": "test"},
        metric="score_norm",
        max_turns=15,
    )
    sokoban = EnvRow(
        id="pz/Sokoban-v0",
        family="sokoban",
        entry_point="pz_envs.sokoban.env:SokobanEnv",
        train_kwargs={"split": "train"},
        eval_kwargs={"split": "test"},
    )
    alfworld = EnvRow(
        id="pz/ALFWorld-v0",
        family="alfworld",
        entry_point="pz_envs.alfworld.env:ALFWorldEnv",
        kwargs={"split": "valid_seen"},
        train_kwargs={"split": "train"},
        max_turns=50,
        dataset="alfworld",
    )
    adventures = (*_scienceworld(), *_textworld())
    return (countdown, alfworld, webshop, *adventures, sokoban, *_cards(), *_maths(), *games)


def _scienceworld() -> tuple[EnvRow, ...]:
    """Return all tasks over a split, then each of the 30."""
    whole = EnvRow(
        id="pz/ScienceWorld-v0",
        family="scienceworld",
        entry_point="pz_envs.scienceworld.env:ScienceWorldEnv",
        train_kwargs={"split": "train"},
        eval_kwargs={"split": "test"},
        metric="score_norm",
        extra="scienceworld",
    )
    return (
        whole,
        *(
            replace(whole, id=f"pz/ScienceWorld-{task.camel}-v0", kwargs={"task": task.name})
            for task in TASKS.values()
        ),
    )


def _textworld() -> tuple[EnvRow, ...]:
    """Return the three challenges, then all of them in turn (or a file by path)."""
    mixed = EnvRow(
        id="pz/TextWorld-v0",
        family="textworld",
        entry_point="pz_envs.textworld.env:TextWorldEnv",
        train_kwargs={"split": "train"},
        eval_kwargs={"split": "test"},
        metric="score_norm",
        extra="textworld",
    )
    return (
        *(
            replace(mixed, id=f"pz/TextWorld{name.title()}-v0", kwargs={"challenge": name})
            for name in ("cooking", "treasure", "coin")
        ),
        mixed,
    )


def _cards() -> tuple[EnvRow, ...]:
    """Return the card games; where luck decides, the expert's score is the least it ends with."""
    points = "pz_envs.gymcards.points:PointsEnv"
    return (
        EnvRow(
            id="pz/NumberLine-v0",
            family="gymcards",
            entry_point="pz_envs.gymcards.numberline:NumberLineEnv",
            max_turns=10,
        ),
        EnvRow(
            id="pz/EZPoints-v0",
            family="gymcards",
            entry_point=points,
            kwargs={"game": "ezpoints"},
            max_turns=7,
        ),
        EnvRow(
            id="pz/Points24-v0",
            family="gymcards",
            entry_point=points,
            kwargs={"game": "points24"},
            max_turns=22,
            expert_score=0.0,
        ),
        EnvRow(
            id="pz/Blackjack-v0",
            family="gymcards",
            entry_point="pz_envs.gymcards.blackjack:BlackjackEnv",
            max_turns=22,
            expert_score=-1.0,
        ),
    )


def _maths() -> tuple[EnvRow, ...]:
    """Return the generated questions, then the published sets."""
    questions = EnvRow(
        id="pz/Math-v0",
        family="math",
        entry_point="pz_envs.mathqa.env:MathEnv",
        train_kwargs={"split": "train"},
        eval_kwargs={"split": "test"},
        max_turns=16,
    )
    return (
        questions,
        *(
            replace(
                questions,
                id=f"pz/{camel}-v0",
                kwargs={"dataset": name},
                dataset="math",
                extra="math",
            )
            for camel, name in _MATH_SETS.items()
        ),
    )


def find(env_id: str) -> EnvRow:
    """Return the row of an id; the form ``pz_envs:pz/Zork1-v0`` is understood too.

    Raises:
        ConfigError: no such id; the message names the nearest one.
    """
    wanted = env_id.removeprefix("pz_envs:")
    table = _by_id()
    if wanted not in table:
        lowered = {key.lower(): key for key in table}
        near = did_you_mean(wanted.lower(), lowered)
        for low, key in lowered.items():
            near = near.replace(f"`{low}`", f"`{key}`")
        raise ConfigError(f"No environment `{env_id}`.{near} All ids: pz-envs list")
    return table[wanted]


def register_all() -> None:
    """Register every row with Gymnasium; calling it again changes nothing.

    Gymnasium's passive checker stays off: it expects bounded character sets, and ``check_env``
    tests far more. No step limit is set.
    """
    for row in rows():
        if row.id not in gymnasium.registry:
            gymnasium.register(
                row.id,
                entry_point=row.entry_point,
                vector_entry_point=f"pz_envs.vector:{row.id}",
                kwargs=dict(row.kwargs),
                disable_env_checker=True,
            )


def extra_module(extra: str) -> str:
    """Return the name of the module that an extra installs."""
    return _EXTRA_MODULES.get(extra, extra)


def missing(row: EnvRow) -> str | None:
    """Return None when ``row`` can be played now, else a sentence and the command that mends it.

    Raises:
        DataError: ``PZ_DATA`` names a folder that does not exist.
    """
    if row.family == "scienceworld":
        from pz_envs.scienceworld.jvm import missing_engine

        return missing_engine()
    if row.extra is not None:
        module = extra_module(row.extra)
        if importlib.util.find_spec(module) is None:
            return (
                f"The package `{module}` is not installed. "
                f"Install it: pip install 'pz-envs[{row.extra}]'"
            )
    if row.family == "math" and row.dataset is not None:
        return _missing_questions(row)
    if row.family == "alfworld":
        from pz_envs.alfworld.games import missing_games

        return missing_games(row.kwargs["split"])
    return _missing_story(row) if row.family == "jericho" else None


def make_env(
    env_id: str,
    *,
    split: Literal["train", "eval"] | None = None,
    admissible_commands: bool | None = None,
    **kwargs: Any,
) -> TextEnv:
    """Make a bare environment, without Gymnasium's wrappers, as rollouts want it.

    Args:
        env_id: an id in the table.
        split: adds the row's ``train_kwargs`` or ``eval_kwargs``.
        admissible_commands: whether info lists them; None leaves the family's default.
        **kwargs: go to the constructor, over those of the row.

    Raises:
        ConfigError: no such id or split, or an argument that the family does not take.
        DataError: a data file that the environment needs is not here.
    """
    row = find(env_id)
    chosen = dict(row.kwargs)
    if split is not None:
        splits = {"train": row.train_kwargs, "eval": row.eval_kwargs}
        if split not in splits:
            raise ConfigError(f"make_env(split={split!r}): allowed are 'train', 'eval' and None")
        chosen |= splits[split]
    chosen |= kwargs
    if admissible_commands is not None:
        chosen["admissible_commands"] = admissible_commands
    module, _, name = row.entry_point.partition(":")
    make: type[TextEnv] = getattr(importlib.import_module(module), name)
    allowed = [key for key in inspect.signature(make.__init__).parameters if key != "self"]
    for key in chosen:
        if key not in allowed:
            raise ConfigError(
                f"{row.id} takes no argument `{key}`.{did_you_mean(key, allowed)} "
                f"Allowed: {', '.join(allowed)}"
            )
    return make(**chosen)


@functools.cache
def _by_id() -> Mapping[str, EnvRow]:
    return {row.id: row for row in rows()}


def _missing_questions(row: EnvRow) -> str | None:
    from pz_envs.datasets import find_file
    from pz_envs.mathqa.sets import SETS, advice

    chosen = SETS[row.kwargs["dataset"]]
    for names in chosen.files.values():
        if not any(find_file("math", name) for name in names):
            return advice(chosen, names)
    return None


def _missing_story(row: EnvRow) -> str | None:
    from pz_envs import datasets

    game = find_game(row.kwargs["game"])
    if datasets.find_story(game.md5) is not None:
        return None
    if game.name == "zork1":
        if datasets.find_story(MIT_ZORK1_MD5) is not None:
            return None
        return (
            f"No story file for {row.id} is here. "
            "Get the MIT-licensed release: pz-envs data get zork_mit"
        )
    if any(file.name == game.file for file in datasets.DATASETS["jericho"].files):
        return (
            f"The story file {game.file} is not here. Get it: pz-envs data get jericho/{game.file}"
        )
    return (
        f"The story file {game.file} is not here, and pz knows no free source. Put your own copy "
        f"(md5 {game.md5}) into {datasets.download_root() / 'jericho'}"
    )
