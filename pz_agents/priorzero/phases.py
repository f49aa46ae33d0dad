"""When which half learns, and how much: from the settings and the run's counters alone.

``wm_turns`` and ``llm_turns`` count turns that a half has not learned from yet, ``stretch`` the
world model's updates since the language model last learned in phase ``alternating``. Where the
language model takes several updates at once (the rollouts of the hybrid), ``llm_owed`` are those
that it is behind its share by, so that over many steps the share is what was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pz_agents.priorzero.settings import GuidedSettings, UniZeroSettings

_ROUNDING = 1e-6
"""Of a rollout: what sums of shares may be short of one by."""


@dataclass(frozen=True, slots=True)
class Updates:
    """How many updates each half does in a step."""

    world: int
    language: int


def collects(settings: UniZeroSettings, counters: Mapping[str, float]) -> bool:
    """Return whether the next step plays; otherwise it is the language model's alone."""
    if not _alternates(settings) or counters["stretch"] < _stretch(settings):
        return True
    return _at_once(settings) > 0 and _whole(settings, counters["llm_owed"]) == 0


def updates(settings: UniZeroSettings, counters: Mapping[str, float], step: int) -> Updates:
    """Return what is learned in ``step``, whose turns are counted already.

    A half that is due learns at least once where there are turns to learn from, but for a language
    model that takes several updates at once: it learns when it is behind by so many.
    """
    if not collects(settings, counters):
        if _at_once(settings):
            return Updates(0, _whole(settings, counters["llm_owed"]))
        return Updates(0, _language(settings, _stretch(settings)))
    world = language = 0
    if step % settings.wm_every == 0:
        world = _rounded(counters["wm_turns"] * settings.replay_ratio)
    if isinstance(settings, GuidedSettings) and not _alternates(settings):
        due = settings.trains_language and step % settings.llm_every == 0
        if due and _at_once(settings):
            language = _whole(settings, counters["llm_owed"] + _odds(settings) * world)
        elif due:
            language = _language(settings, counters["llm_turns"] * settings.replay_ratio)
    return Updates(world, language)


def counted(
    settings: UniZeroSettings, counters: Mapping[str, float], done: Updates
) -> dict[str, float]:
    """Return the counters that change when ``done`` has been done."""
    changed: dict[str, float] = {}
    if _at_once(settings):
        owed = counters["llm_owed"] + _odds(settings) * done.world - done.language
        changed["llm_owed"] = owed
    if not collects(settings, counters):
        return changed | {"stretch": 0, "llm_turns": 0}
    if done.world:
        changed |= {"wm_turns": 0, "stretch": counters["stretch"] + done.world}
    if done.language:
        changed["llm_turns"] = 0
    return changed


def _alternates(settings: UniZeroSettings) -> bool:
    return (
        isinstance(settings, GuidedSettings)
        and settings.phase == "alternating"
        and settings.trains_language
    )


def _stretch(settings: UniZeroSettings) -> int:
    assert isinstance(settings, GuidedSettings)
    return settings.phase_updates


def _language(settings: UniZeroSettings, world: float) -> int:
    """Return the language model's updates beside ``world`` updates of the world model."""
    return _rounded(world * _odds(settings))


def _odds(settings: UniZeroSettings) -> float:
    """Return the language model's updates for each of the world model's."""
    assert isinstance(settings, GuidedSettings)
    return (1 - settings.wm_llm_ratio) / settings.wm_llm_ratio


def _at_once(settings: UniZeroSettings) -> int:
    return settings.updates_per_rollout if isinstance(settings, GuidedSettings) else 0


def _whole(settings: UniZeroSettings, owed: float) -> int:
    """Return as many of the updates that are owed as make up whole rollouts."""
    size = _at_once(settings)
    return size * max(math.floor(owed / size + _ROUNDING), 0)


def _rounded(number: float) -> int:
    return max(1, round(number)) if number > 0 else 0
