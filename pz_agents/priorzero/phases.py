"""When which half learns, and how much: from the settings and the run's counters alone.

``wm_turns`` and ``llm_turns`` count turns that a half has not learned from yet, ``stretch`` the
world model's updates since the language model last learned in phase ``alternating``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pz_agents.priorzero.settings import GuidedSettings, UniZeroSettings


@dataclass(frozen=True, slots=True)
class Updates:
    """How many updates each half does in a step."""

    world: int
    language: int


def collects(settings: UniZeroSettings, counters: Mapping[str, int]) -> bool:
    """Return whether the next step plays; otherwise it is the language model's alone."""
    return not (_alternates(settings) and counters["stretch"] >= _stretch(settings))


def updates(settings: UniZeroSettings, counters: Mapping[str, int], step: int) -> Updates:
    """Return what is learned in ``step``, whose turns are counted already.

    A half that is due learns at least once where there are turns to learn from.
    """
    if not collects(settings, counters):
        return Updates(0, _language(settings, _stretch(settings)))
    world = language = 0
    if step % settings.wm_every == 0:
        world = _rounded(counters["wm_turns"] * settings.replay_ratio)
    if isinstance(settings, GuidedSettings) and not _alternates(settings):
        due = settings.trains_language and step % settings.llm_every == 0
        if due:
            language = _language(settings, counters["llm_turns"] * settings.replay_ratio)
    return Updates(world, language)


def counted(
    settings: UniZeroSettings, counters: Mapping[str, int], done: Updates
) -> dict[str, int]:
    """Return the counters that change when ``done`` has been done."""
    if not collects(settings, counters):
        return {"stretch": 0, "llm_turns": 0}
    changed: dict[str, int] = {}
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
    assert isinstance(settings, GuidedSettings)
    ratio = settings.wm_llm_ratio
    return _rounded(world * (1 - ratio) / ratio)


def _rounded(number: float) -> int:
    return max(1, round(number)) if number > 0 else 0
