"""Blackjack against an infinite deck: hit or stand, the dealer draws to 17.

Rules of RL4VLM's gym_cards and Gymnasium's Blackjack with its defaults: an ace counts 11 unless
that busts, the dealer stands on every 17, a win pays +1, a loss -1, a draw 0, and a natural pays
like any win. The expert's policy is computed once by dynamic programming over the infinite deck
(Sutton and Barto, Reinforcement Learning, 2nd ed., chapter 4 applied to example 5.1).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pz_envs.gymcards.cards import Card, draw, shown
from pz_envs.gymcards.picture import picture
from pz_envs.gymcards.saving import pack, unpack
from pz_envs.seeding import generator
from pz_envs.textenv import Info, Outcome, ReplyFormat, TextEnv

COMMANDS = ("stand", "hit")
"""The two actions."""

_SHOE = 64  # more than any hand and any dealer can draw
_CHANCES = {value: (4 if value == 10 else 1) / 13 for value in range(1, 11)}
_INSTRUCTION = (
    "Blackjack: come closer to 21 than the dealer without going over. Number cards count their "
    "number, J, Q and K 10, an ace 11 or 1. Answer hit for another card or stand to let the "
    "dealer draw to 17."
)


class BlackjackEnv(TextEnv):
    """The dealer's open card and your hand in, ``hit`` or ``stand`` out.

    The score is the hand's result: 1 for a win, 0 for a draw, -1 for a loss; success is a win.
    Another reply is invalid and changes nothing; ``stick`` is read as ``stand``.

    Args:
        admissible_commands: whether info lists ``stand`` and ``hit``.
        image: whether ``info["extra"]["image"]`` holds a picture, [240, 320, 3] uint8 RGB.
        reply_format: see ``TextEnv``.
        render_mode: see ``TextEnv``.
    """

    family: ClassVar[str] = "gymcards"
    can_snapshot: ClassVar[bool] = True

    def __init__(
        self,
        *,
        admissible_commands: bool = True,
        image: bool = False,
        reply_format: ReplyFormat = "auto",
        render_mode: str | None = None,
    ) -> None:
        super().__init__(reply_format=reply_format, render_mode=render_mode)
        self._listed = admissible_commands
        self._image = image
        self._shoe: tuple[Card, ...] = ()
        self._drawn = 0
        self._dealer: tuple[Card, ...] = ()
        self._player: tuple[Card, ...] = ()

    def expert_action(self) -> str | None:
        """Return the action with the highest expected result; None when the hand is over."""
        if self._outcome is None or self._outcome.terminated:
            return None
        total, soft = hand_total([card.value for card in self._player])
        return best_action(total, soft, self._dealer[0].value)

    def _start(self, seed: int, options: Mapping[str, Any]) -> Outcome:
        self._shoe = draw(generator("blackjack", seed), _SHOE)
        self._dealer, self._player = self._shoe[:2], self._shoe[2:4]
        self._drawn = 4
        dealt = "-".join(map(str, (self._dealer[0], *self._player)))
        self._task_id = f"blackjack/{dealt}-{seed % 16**6:06x}"
        self._max_score = 1.0
        self._instruction = _INSTRUCTION
        return self._going_on("")

    def _advance(self, command: str) -> Outcome:
        word = command.strip("'\"`. ").lower()
        if word == "hit":
            self._player += (self._draw(),)
            total, _ = hand_total([card.value for card in self._player])
            return self._ended("You are bust.", -1.0) if total > 21 else self._going_on("")
        if word in ("stand", "stick"):
            return self._dealer_plays()
        return self._going_on(f"{command[:40]!r} is no action; allowed are stand and hit. ", False)

    def _dealer_plays(self) -> Outcome:
        mine, _ = hand_total([card.value for card in self._player])
        while (theirs := hand_total([card.value for card in self._dealer])[0]) < 17:
            self._dealer += (self._draw(),)
        if theirs > 21:
            return self._ended("The dealer is bust. You win.", 1.0)
        if mine == theirs:
            return self._ended("A draw.", 0.0)
        return self._ended("You win.", 1.0) if mine > theirs else self._ended("You lose.", -1.0)

    def _draw(self) -> Card:
        self._drawn += 1
        return self._shoe[self._drawn - 1]

    def _going_on(self, complaint: str, valid: bool = True) -> Outcome:
        mine = _described(self._player)
        return Outcome(
            f"{complaint}Dealer: {self._dealer[0]} and a hidden card. You: {mine}.",
            score=0.0,
            valid=valid,
            admissible_commands=COMMANDS if self._listed else None,
            extra={"dealer": [str(self._dealer[0])], "player": [str(c) for c in self._player]},
        )

    def _ended(self, said: str, result: float) -> Outcome:
        return Outcome(
            f"{said} Dealer: {_described(self._dealer)}. You: {_described(self._player)}.",
            score=result,
            reward=result,
            terminated=True,
            success=result > 0,
            extra={
                "dealer": [str(card) for card in self._dealer],
                "player": [str(card) for card in self._player],
            },
        )

    def _info(self, outcome: Outcome, *, format_error: bool) -> Info:
        info = super()._info(outcome, format_error=format_error)
        if self._image:
            dealer = self._dealer if outcome.terminated else (self._dealer[0], None)
            rows = ("DEALER", dealer, "YOU", self._player)
            info["extra"]["image"] = picture(rows)
        return info

    def _save(self) -> bytes:
        hands = [[card.index for card in hand] for hand in (self._shoe, self._dealer, self._player)]
        return pack("blackjack", self._drawn, hands)

    def _load(self, engine: bytes, header: Mapping[str, Any]) -> None:
        self._drawn, hands = unpack(engine, "blackjack")
        self._shoe, self._dealer, self._player = (tuple(map(Card, hand)) for hand in hands)


def hand_total(values: Sequence[int]) -> tuple[int, bool]:
    """Return a hand's total and whether an ace in it counts 11; ``values`` are 1 to 10."""
    total = sum(values)
    soft = 1 in values and total + 10 <= 21
    return total + 10 * soft, soft


def best_action(total: int, soft: bool, dealer: int) -> str:
    """Return ``hit`` or ``stand``, whichever is worth more against ``dealer``, the open card."""
    return "hit" if hit_value(total, soft, dealer) > stand_value(total, dealer) else "stand"


@functools.cache
def stand_value(total: int, dealer: int) -> float:
    """Return the expected result of standing on ``total``."""
    chances = _dealer_totals(*_added(0, False, dealer))
    return sum(
        chance * (1 if theirs > 21 or theirs < total else -1 if theirs > total else 0)
        for theirs, chance in chances.items()
    )


@functools.cache
def hit_value(total: int, soft: bool, dealer: int) -> float:
    """Return the expected result of taking a card and then playing as well as possible."""
    expected = 0.0
    for value, chance in _CHANCES.items():
        after, still_soft = _added(total, soft, value)
        expected += chance * (
            -1.0
            if after > 21
            else max(stand_value(after, dealer), hit_value(after, still_soft, dealer))
        )
    return expected


@functools.cache
def _dealer_totals(total: int, soft: bool) -> Mapping[int, float]:
    """Return the chance of each total that the dealer ends with."""
    if total >= 17:
        return {total: 1.0}
    chances: dict[int, float] = {}
    for value, chance in _CHANCES.items():
        for end, share in _dealer_totals(*_added(total, soft, value)).items():
            chances[end] = chances.get(end, 0.0) + chance * share
    return chances


def _added(total: int, soft: bool, value: int) -> tuple[int, bool]:
    """Return total and softness after a card; at most one ace of a hand counts 11."""
    total += value
    if value == 1 and not soft and total + 10 <= 21:
        return total + 10, True
    return (total - 10, False) if soft and total > 21 else (total, soft)


def _described(hand: Sequence[Card]) -> str:
    total, soft = hand_total([card.value for card in hand])
    return f"{shown(hand)} ({'soft ' if soft else ''}{total})"
