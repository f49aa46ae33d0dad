"""The families of environments: what all ids of one share, and how its score is defined.

A score and a success are defined here once; every table of every report links to these sentences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """What all rows of a family share; ``score`` and ``success`` are definitions for reports.

    ``turns`` is what a table calls an episode's turns: steps, or attempts at one question.
    """

    name: str
    title: str
    score: str
    success: str
    extra: str | None = None
    dataset: str | None = None
    turns: str = "Steps"


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="countdown",
            title="Countdown number puzzles",
            score="1 when an answer used every number once and made the target exactly, else 0.",
            success="The answer uses every number exactly once and equals the target exactly.",
            dataset="countdown",
            turns="Attempts",
        ),
        Family(
            name="jericho",
            title="Z-machine interactive fiction",
            score="The game's own score counter; score_norm is clip(score / max_score, 0, 1).",
            success="The maximum score is reached, or the game itself declares victory.",
            extra="jericho",
            dataset="jericho",
        ),
        Family(
            name="webshop",
            title="WebShop: buy what an instruction describes",
            score=(
                "The purchase's reward: the share of wanted attributes, options and price that it "
                "meets, times a product-type factor; 0 when nothing is bought."
            ),
            success="The purchase's reward is 1.",
        ),
        Family(
            name="scienceworld",
            title="ScienceWorld: elementary-science experiments in a house",
            score="The engine's points / 100, and 0 where they are negative (a fatal mistake).",
            success="The engine gives 100 points.",
            extra="scienceworld",
        ),
        Family(
            name="textworld",
            title="TextWorld: text adventures made to order",
            score=(
                "The game's own score counter; score_norm divides by the maximum that the game "
                "itself states."
            ),
            success="The game declares its end as won.",
            extra="textworld",
        ),
        Family(
            name="sokoban",
            title="Sokoban",
            score="The number of boxes on targets; score_norm divides by the number of boxes.",
            success="Every box is on a target.",
            dataset="boxoban",
        ),
        Family(
            name="gymcards",
            title="Card and number games of RL4VLM",
            score=(
                "NumberLine, EZPoints, Points24: 1 when the target is reached or the formula is "
                "right, else 0. Blackjack: 1 for a win, 0 for a draw, -1 for a loss."
            ),
            success=(
                "The target is reached (NumberLine), the formula is right (EZPoints, Points24), "
                "the hand is won (Blackjack)."
            ),
        ),
        Family(
            name="alfworld",
            title="ALFWorld household tasks",
            score="1 when the goal of the game's PDDL problem holds, else 0.",
            success="The goal of the game's PDDL problem holds.",
            dataset="alfworld",
        ),
        Family(
            name="math",
            title="Mathematics questions",
            score="1 when an answer was graded equal to the gold answer, else 0.",
            success=(
                "An answer is equal to the gold answer: as text, as an exact number, or by "
                "math-verify."
            ),
            extra="math",
            dataset="math",
            turns="Attempts",
        ),
    )
}
"""Every family, by name."""
