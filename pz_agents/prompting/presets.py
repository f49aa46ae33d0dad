"""How each family's turns are told to a chat model: data, in one place.

The template ``chat`` takes its texts from here, by the family of the environment that is played,
so that the format of a trained model is a row of this table and not code. First and second
attempts, training and evaluation read the same row. The rules of the game are the environment's
own ``info["instruction"]``; a preset adds how to play well and how to reply. Formats are those of
R3L's environments (one ``<think>``, then one ``<action>`` or ``<answer>``), the wording is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_THINK_THEN_ACT = """\
Think first, briefly, between <think> and </think>. Then give exactly one {tag} and nothing after \
it: <{tag}>...</{tag}>"""
_REMIND = "\n\nReply with <think>...</think> and then <action>...</action>."


@dataclass(frozen=True, slots=True)
class Preset:
    """One family's texts.

    tag: the reply's tag, as the family's environments read it; ``{tag}`` in ``system``.
    advice: what the system message says between the environment's rules and the reply format.
    user: a turn, with ``{observation}``; commands, put behind it where they are known, with
        ``{commands}``, between which stands ``separator``; reminder, what ends a turn.
    history: most past turns that a prompt shows; None is the whole conversation.
    """

    family: str
    tag: str = "action"
    advice: str = ""
    user: str = "{observation}"
    commands: str = "\n\nCommands that do something here: {commands}"
    separator: str = "; "
    reminder: str = _REMIND
    history: int | None = None

    @property
    def rules(self) -> str:
        """How the game goes and how to play it well, with ``{instruction}``."""
        return "\n\n".join(part for part in ("{instruction}", self.advice) if part)

    @property
    def system(self) -> str:
        """The system message: the rules and the reply's format, with ``{tag}``."""
        return f"{self.rules}\n\n{_THINK_THEN_ACT}"


GENERIC = Preset(family="", reminder="")
"""For environments of no known family."""

PRESETS: Mapping[str, Preset] = {
    preset.family: preset
    for preset in (
        Preset(
            family="alfworld",
            advice=(
                "You are in a house and act by text. Find what the task names, looking into "
                "closed things if need be; clean, heat, cool or light it where that is asked for; "
                "then bring it to where it belongs. You carry one thing at a time. Reply with one "
                "of the listed actions, word for word."
            ),
            commands="\n\nYou can do one of these:\n{commands}",
            separator="\n",
        ),
        Preset(
            family="webshop",
            advice=(
                "Search with a few words that matter. Open a product that fits the description "
                "and the price, choose every option that the instruction asks for, then buy."
            ),
            user="Page:\n{observation}",
            commands="\n\nYou can do one of these:\n{commands}",
            separator="\n",
        ),
        Preset(
            family="scienceworld",
            advice=(
                "You work in a laboratory with several rooms. Go where what you need is, pick it "
                "up or focus on it as the task says, use the devices, and wait where something "
                "takes time. Do not focus on anything but what the task names."
            ),
        ),
        Preset(
            family="textworld",
            advice="Explore, read what you find, and do what the task asks, one command a turn.",
        ),
        Preset(
            family="jericho",
            advice=(
                "Explore, try things out, and remember where things are. What does nothing "
                "costs a turn."
            ),
            history=40,
        ),
        Preset(
            family="sokoban",
            advice="A box in a corner that is no target can never be moved again.",
            user="Room:\n{observation}",
            commands="\n\nMoves that are possible: {commands}",
            history=8,
        ),
        Preset(
            family="gymcards",
            commands="\n\nAllowed now: {commands}",
            separator=" ",
        ),
        Preset(family="countdown", tag="answer", reminder=""),
        Preset(
            family="math",
            tag="answer",
            advice="Work it out step by step in your thoughts before you answer.",
            reminder="",
        ),
    )
}
"""Every family's preset, by the family's name."""
