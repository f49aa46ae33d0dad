"""EZPoints and Points24: build a formula of the cards symbol by symbol, then say ``=``.

Rules of RL4VLM's gym_cards: a symbol pays 0; a number that is on no remaining card pays -1, leaves
a blank in the formula, and play goes on; ``=`` ends the episode with +10 when the formula makes
the target of all cards, else -1; a symbol sent when the formula is already longer than the limit
is not read and ends the episode with -1.

Two things differ on purpose. A reply that is no symbol of the game is treated like a refused
number (the original plays a random symbol). A formula is read as arithmetic in exact fractions;
the original evaluates its text as Python floats, where ``8/(3-8/3)`` misses 24 and the neighbours
``2 4`` and ``* *`` are read as 24 and a power.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pz_envs.countdown.solver import solve
from pz_envs.errors import ConfigError, EnvError, did_you_mean
from pz_envs.gymcards.cards import Card, deal_ezpoints, draw, shown
from pz_envs.gymcards.formula import BLANK, completion, value
from pz_envs.gymcards.picture import picture
from pz_envs.gymcards.saving import pack, unpack
from pz_envs.seeding import generator
from pz_envs.textenv import Info, Outcome, ReplyFormat, TextEnv

_SAME = str.maketrans("×·∗＊÷／−–－＋（）＝", "****//---+()=")
_DEALS = ("original", "solvable")
_ATTEMPTS = 1000
_SYMBOL = re.compile(r"\d+|\D")


@dataclass(frozen=True, slots=True)
class PointsGame:
    """A formula game: its name, what to make, the symbols besides numbers, and the limit.

    ``limit`` is the length up to which a formula may still be ended by ``=``.
    """

    name: str
    title: str
    target: int
    operators: str
    cards: int
    limit: int


GAMES: Mapping[str, PointsGame] = {
    game.name: game
    for game in (
        PointsGame("ezpoints", "EZPoints", 12, "+*", 2, 5),
        PointsGame("points24", "Points24", 24, "+-*/()", 4, 20),
    )
}
"""The formula games by name."""


class PointsEnv(TextEnv):
    """Cards in, one symbol of a formula out; score 1 and success when the formula is right.

    Args:
        game: ``"ezpoints"`` (two cards, 12, ``+ *``) or ``"points24"`` (four cards, 24,
            ``+ - * / ( )``).
        deal: ``"original"`` deals Points24 as the original does, so that some hands have no
            solution; ``"solvable"`` deals again until one has. EZPoints hands always have one.
        admissible_commands: whether info lists the symbols that are not refused.
        image: whether ``info["extra"]["image"]`` holds a picture, [240, 320, 3] uint8 RGB.
        reply_format: see ``TextEnv``.
        render_mode: see ``TextEnv``.

    Raises:
        ConfigError: no such game or deal.
    """

    family: ClassVar[str] = "gymcards"
    can_snapshot: ClassVar[bool] = True

    def __init__(
        self,
        *,
        game: str = "points24",
        deal: Literal["original", "solvable"] = "original",
        admissible_commands: bool = True,
        image: bool = False,
        reply_format: ReplyFormat = "auto",
        render_mode: str | None = None,
    ) -> None:
        super().__init__(reply_format=reply_format, render_mode=render_mode)
        if game not in GAMES:
            raise ConfigError(
                f"No game {game!r}.{did_you_mean(game, GAMES)} Allowed: {', '.join(GAMES)}"
            )
        if deal not in _DEALS:
            raise ConfigError(
                f"No deal {deal!r}.{did_you_mean(deal, _DEALS)} Allowed: {', '.join(_DEALS)}"
            )
        self._game = GAMES[game]
        self._deal = deal
        self._listed = admissible_commands
        self._image = image
        self._cards: tuple[Card, ...] = ()
        self._left: tuple[int, ...] = ()
        self._formula: tuple[str, ...] = ()
        self._plan: tuple[str, ...] = ()  # the expert's, from the last time it was asked

    def expert_action(self) -> str | None:
        """Return the best next symbol: towards a right formula, else ``=``, which loses least.

        Exhaustive: ``=`` before the formula is right means that no completion of it is.
        """
        if self._outcome is None or self._outcome.terminated:
            return None
        done = len(self._formula)
        if self._plan[:done] != self._formula or not self._plan:
            self._plan = self._formula + self._ending()
        return (*self._plan, "=")[done]

    def _ending(self) -> tuple[str, ...]:
        """Return symbols that make the formula right; none when it is, or when nothing does."""
        game = self._game
        solution = solve([card.value for card in self._cards], game.target)
        if solution is None:
            return ()
        if not self._formula:
            return tuple(_SYMBOL.findall(solution))
        room = game.limit - len(self._formula)
        return completion(self._formula, self._left, game.target, room, game.operators) or ()

    def _start(self, seed: int, options: Mapping[str, Any]) -> Outcome:
        game = self._game
        self._cards = self._dealt(seed)
        self._left = tuple(card.value for card in self._cards)
        self._formula = ()
        self._task_id = f"{game.name}/{'-'.join(map(str, self._cards))}"
        self._max_score = 1.0
        self._plan = ()
        symbols = " ".join(game.operators)
        self._instruction = (
            f"Make {game.target} of the numbers on the cards, each used exactly once; J, Q and K "
            f"count 10, A counts 1. Answer one symbol at a time: a number, {symbols} or =, which "
            f"ends the formula. A refused symbol leaves {BLANK} in the formula, which may have "
            f"{game.limit} symbols."
        )
        return self._going_on("", reward=0.0, valid=True)

    def _dealt(self, seed: int) -> tuple[Card, ...]:
        rng = generator(self._game.name, seed)
        if self._game.name == "ezpoints":
            return deal_ezpoints(rng)
        for _ in range(_ATTEMPTS):
            cards = draw(rng, self._game.cards)
            if self._deal == "original" or solve([card.value for card in cards], 24) is not None:
                return cards
        raise EnvError(f"no solvable hand in {_ATTEMPTS} deals; reset with another seed")

    def _advance(self, command: str) -> Outcome:
        symbol = command.translate(_SAME).strip("'\"` ")
        if self._too_long():
            return self._cut()
        if symbol == "=":
            return self._evaluated()
        if symbol.isascii() and symbol.isdigit() and len(symbol) <= 2:
            return self._number(int(symbol))
        if len(symbol) == 1 and symbol in self._game.operators:
            self._formula += (symbol,)
            return self._going_on("", reward=0.0, valid=True)
        allowed = " ".join(self._game.operators)
        return self._refused(
            f"{command[:40]!r} is no symbol; allowed are 1 to 10, {allowed} and =."
        )

    def _unreadable(self, last: Outcome, complaint: str) -> Outcome:
        return self._cut() if self._too_long() else self._refused(complaint)

    def _number(self, number: int) -> Outcome:
        if number not in self._left:
            return self._refused(f"{number} is on no remaining card.")
        at = self._left.index(number)
        self._left = self._left[:at] + self._left[at + 1 :]
        self._formula += (str(number),)
        return self._going_on("", reward=0.0, valid=True)

    def _refused(self, complaint: str) -> Outcome:
        self._formula += (BLANK,)
        return self._going_on(f"{complaint} ", reward=-1.0, valid=False)

    def _evaluated(self) -> Outcome:
        made = value(self._formula)
        right = not self._left and made == self._game.target
        if right:
            said = "Correct."
        elif made is None:
            said = "That is no formula with a value."
        elif self._left:
            said = f"It makes {made}, and cards are left."
        else:
            said = f"It makes {made}."
        return Outcome(
            f"{said} {self._statement()}",
            score=float(right),
            reward=10.0 if right else -1.0,
            terminated=True,
            success=right,
            extra=self._extra(cut=False),
        )

    def _too_long(self) -> bool:
        return len(self._formula) > self._game.limit

    def _cut(self) -> Outcome:
        return Outcome(
            f"The formula is too long. {self._statement()}",
            score=0.0,
            reward=-1.0,
            terminated=True,
            valid=False,
            extra=self._extra(cut=True),
        )

    def _going_on(self, complaint: str, *, reward: float, valid: bool) -> Outcome:
        numbers = (str(number) for number in dict.fromkeys(self._left))
        commands = (*numbers, *self._game.operators, "=")
        return Outcome(
            complaint + self._statement(),
            score=0.0,
            reward=reward,
            valid=valid,
            admissible_commands=commands if self._listed else None,
            extra=self._extra(cut=False),
        )

    def _statement(self) -> str:
        numbers = " ".join(str(card.value) for card in self._cards)
        formula = " ".join(self._formula) or "(empty)"
        return f"Cards: {shown(self._cards)}. Numbers: {numbers}. Formula: {formula}"

    def _extra(self, *, cut: bool) -> dict[str, Any]:
        return {
            "cards": [str(card) for card in self._cards],
            "numbers": [card.value for card in self._cards],
            "formula": list(self._formula),
            "cut": cut,
        }

    def _info(self, outcome: Outcome, *, format_error: bool) -> Info:
        info = super()._info(outcome, format_error=format_error)
        if self._image:
            info["extra"]["image"] = picture((self._cards, "".join(self._formula)))
        return info

    def _save(self) -> bytes:
        cards = [card.index for card in self._cards]
        return pack(self._game.name, cards, self._left, self._formula)

    def _load(self, engine: bytes, header: Mapping[str, Any]) -> None:
        cards, left, formula = unpack(engine, self._game.name)
        self._cards = tuple(map(Card, cards))
        self._left, self._formula = tuple(left), tuple(formula)
        self._plan = ()
