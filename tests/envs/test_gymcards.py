"""NumberLine, EZPoints, Points24 and Blackjack: the original's rules, and exact experts."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.toy_text import blackjack as reference

from pz_envs import ConfigError, EnvError
from pz_envs.checks import check_env
from pz_envs.gymcards.blackjack import (
    BlackjackEnv,
    _dealer_totals,
    best_action,
    hand_total,
    hit_value,
    stand_value,
)
from pz_envs.gymcards.cards import Card, deal_ezpoints
from pz_envs.gymcards.formula import BLANK, completion, value
from pz_envs.gymcards.numberline import NumberLineEnv
from pz_envs.gymcards.picture import _GLYPHS
from pz_envs.gymcards.points import PointsEnv
from pz_envs.seeding import generator
from pz_envs.textenv import Info, Outcome, TextEnv


def _ezpoints() -> PointsEnv:
    return PointsEnv(game="ezpoints")


def _solvable24() -> PointsEnv:
    return PointsEnv(deal="solvable")


def _expert(env: TextEnv, seed: int) -> tuple[float, Info]:
    """Return the sum of rewards and the last info of the expert's episode."""
    _, info = env.reset(seed=seed)
    paid = 0.0
    while (action := env.expert_action()) is not None:
        _, reward, _, _, info = env.step(action)
        assert info["valid"]
        paid += reward
    return paid, info


def _commands(env: TextEnv) -> tuple[str, ...]:
    assert env._outcome is not None
    return env._outcome.admissible_commands or ()


def _rewards(env: TextEnv, *actions: str) -> list[float]:
    return [env.step(action)[1] for action in actions]


def _seed_where(env: TextEnv, wanted: Callable[[Info], bool]) -> int:
    return next(seed for seed in range(5000) if wanted(env.reset(seed=seed)[1]))


@pytest.mark.parametrize("make", [NumberLineEnv, _ezpoints, _solvable24])
def test_a_game_that_can_always_be_won_passes_the_conformance_suite(
    make: Callable[[], TextEnv],
) -> None:
    assert "expert" in check_env(make).passed


def test_blackjack_passes_the_conformance_suite_on_hands_that_the_expert_wins() -> None:
    won = [seed for seed in range(20) if _expert(BlackjackEnv(), seed)[1]["success"]]
    assert "going back" in check_env(BlackjackEnv, seeds=tuple(won[:2])).passed


def test_points24_as_the_original_deals_it_obeys_every_rule_but_a_sure_win() -> None:
    env = PointsEnv()
    won = [seed for seed in range(20) if _expert(env, seed)[1]["success"]]
    assert "fuzzed replies" in check_env(PointsEnv, seeds=tuple(won[:2])).passed


# NumberLine.


def _line(current: int, target: int) -> NumberLineEnv:
    env = NumberLineEnv()
    where = {"target": target, "current": current}
    _seed_where(env, lambda info: where.items() <= info["extra"].items())
    return env


def test_every_number_line_is_walked_straight_to_the_target() -> None:
    met = {}
    env = NumberLineEnv()
    for seed in range(400):
        _, start = env.reset(seed=seed)
        paid, info = _expert(env, seed)
        distance = abs(start["extra"]["target"] - start["extra"]["current"])
        assert (paid, info["success"], info["steps"]) == (1.0, True, distance)
        met[start["task_id"]] = distance
    assert len(met) == 30  # six numbers, and another one as the target
    assert set(met.values()) == {1, 2, 3, 4, 5}


def test_a_number_line_pays_what_the_rules_say() -> None:
    env = _line(current=1, target=3)
    observation, reward, terminated, _, info = env.step("-")
    assert (observation, reward, terminated) == ("Target: 3. Current: 0.", -1.0, False)
    assert info["admissible_commands"] == ("+",)
    observation, reward, _, _, info = env.step("-")
    assert (observation, reward, info["valid"]) == ("Target: 3. Current: 0.", -1.0, False)
    assert _rewards(env, "+", "<action>＋</action>") == [0.0, 0.0]
    observation, reward, terminated, _, info = env.step("+")
    assert (observation, reward, terminated) == ("Target: 3. Current: 3. Reached.", 1.0, True)
    assert (info["score"], info["success"], info["extra"]["cut"]) == (1.0, True, False)


def test_the_tenth_move_is_the_last_and_an_unread_reply_is_a_move_that_goes_nowhere() -> None:
    env = _line(current=2, target=5)
    for action in ("left", "<action>", "打开门", "+ +", "", "-+", "1", "x", "- 1"):
        _, reward, terminated, _, info = env.step(action)
        assert (reward, terminated, info["valid"]) == (-1.0, False, False)
        assert info["extra"]["current"] == 2
    observation, reward, terminated, _, info = env.step("+")
    assert observation == "Target: 5. Current: 3. No moves are left."
    assert (reward, terminated, info["success"], info["extra"]["cut"]) == (0.0, True, False, True)


# Formulas.


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        ("8 / ( 3 - 8 / 3 )", 24),
        ("1 + 2 * 3", 7),
        ("10 - 3 - 2", 5),
        ("8 / 4 / 2", 1),
        ("7 / 2", Fraction(7, 2)),
        ("- 2 * 3 + 10", 4),
        ("4 - - 2", 6),
        ("- ( 1 - 4 )", 3),
        ("5 _ + _ 7", 12),
        ("( ( 5 ) )", 5),
        ("2 4", None),
        ("2 _ 4", None),
        ("2 * * 3", None),
        ("8 / / 3", None),
        ("2 ( 3 )", None),
        ("( 2 ) ( 3 )", None),
        ("( 2", None),
        ("2 )", None),
        ("( )", None),
        ("+", None),
        ("", None),
        ("8 / ( 3 - 3 )", None),
        ("1 / 0 + 5", None),
    ],
)
def test_formulas_are_read_as_exact_arithmetic(text: str, worth: Fraction | int | None) -> None:
    assert value(text.split()) == worth


def test_every_completion_of_a_short_formula_is_found_and_no_other() -> None:
    for cards in ((10, 2), (6, 6), (2, 6), (4, 3)):
        symbols = [*dict.fromkeys(map(str, cards)), "+", "*"]
        every = [
            formula
            for length in range(6)
            for formula in itertools.product(symbols, repeat=length)
            if sorted(int(s) for s in formula if s.isdigit()) == sorted(cards)
        ]
        right = {formula for formula in every if value(formula) == 12}
        for length in range(4):
            for start in itertools.product([*symbols, BLANK], repeat=length):
                left = list(cards)
                used = [int(s) for s in start if s.isdigit()]
                if any(used.count(n) > left.count(n) for n in used):
                    continue
                for number in used:
                    left.remove(number)
                plain = tuple(s for s in start if s != BLANK)
                room = 5 - len(start)
                possible = any(
                    formula[: len(plain)] == plain and len(formula) - len(plain) <= room
                    for formula in right
                )
                found = completion(start, tuple(left), 12, room, "+*")
                assert (found is not None) == possible, start
                if found is not None:
                    assert len(found) <= room
                    assert value(start + found) == 12


# EZPoints and Points24.


def test_ezpoints_hands_are_two_cards_that_make_twelve() -> None:
    hands = [deal_ezpoints(generator("hands", seed)) for seed in range(2000)]
    made = {tuple(sorted(card.value for card in hand)) for hand in hands}
    assert made == {(2, 10), (3, 9), (4, 8), (5, 7), (6, 6), (2, 6), (3, 4)}
    assert all(card.rank > 1 for hand in hands for card in hand)
    assert {str(card)[-1] for hand in hands for card in hand} == set("CDHS")
    assert Card(12).value == 10


def test_the_expert_wins_every_ezpoints_hand() -> None:
    for seed in range(200):
        paid, info = _expert(_ezpoints(), seed)
        assert (paid, info["success"], info["score"], info["steps"]) == (10.0, True, 1.0, 4)


def _hand(game: str, numbers: list[int]) -> PointsEnv:
    env = PointsEnv(game=game)
    _seed_where(env, lambda info: info["extra"]["numbers"] == numbers)
    return env


def test_an_ezpoints_hand_pays_what_the_rules_say() -> None:
    env = _hand("ezpoints", [5, 7])
    _, reward, terminated, _, info = env.step("5")
    assert (reward, terminated, info["valid"]) == (0.0, False, True)
    assert info["admissible_commands"] == ("7", "+", "*", "=")
    observation, reward, terminated, _, info = env.step("5")
    assert (reward, terminated, info["valid"]) == (-1.0, False, False)
    assert observation.startswith("5 is on no remaining card. Cards: 5")
    assert observation.endswith("Formula: 5 _")
    assert _rewards(env, "<action>+</action>", "7") == [0.0, 0.0]
    observation, reward, terminated, _, info = env.step("=")
    assert observation.startswith("Correct.")
    assert (reward, terminated, info["success"], info["score"]) == (10.0, True, True, 1.0)


@pytest.mark.parametrize(
    ("symbols", "said"),
    [
        (("=",), "That is no formula with a value."),
        (("5", "="), "It makes 5, and cards are left."),
        (("5", "*", "7", "="), "It makes 35."),
        (("7", "5", "="), "That is no formula with a value."),
        (("+", "5", "*", "="), "That is no formula with a value."),
    ],
)
def test_a_wrong_formula_costs_one_and_ends_the_hand(symbols: tuple[str, ...], said: str) -> None:
    env = _hand("ezpoints", [5, 7])
    for symbol in symbols[:-1]:
        assert env.step(symbol)[1:3] == (0.0, False)
    observation, reward, terminated, _, info = env.step(symbols[-1])
    assert observation.startswith(said)
    assert (reward, terminated, info["success"], info["score"]) == (-1.0, True, False, 0.0)


def test_a_formula_that_is_too_long_ends_the_hand_unread() -> None:
    env = _hand("ezpoints", [5, 7])
    assert _rewards(env, "5", "+", "+", "+", "+") == [0.0] * 5
    saved = env.snapshot()
    assert env.step("=")[1:3] == (-1.0, True)  # five symbols are read
    env.restore(saved)
    assert env.step("+")[1:3] == (0.0, False)
    observation, reward, terminated, _, info = env.step("=")
    assert observation.startswith("The formula is too long.")
    assert (reward, terminated, info["valid"], info["extra"]["cut"]) == (-1.0, True, False, True)


def test_an_unread_reply_is_refused_like_a_wrong_number_and_never_played_at_random() -> None:
    env = _hand("ezpoints", [5, 7])
    for reply in ("-", "5+7=", "<action></action>", "eleven", "11"):
        _, reward, terminated, _, info = env.step(reply)
        assert (reward, terminated, info["valid"]) == (-1.0, False, False)
    assert info["extra"]["formula"] == [BLANK] * 5
    _, _, _, _, info = env.step("<action>")
    assert info["format_error"]
    assert env.step("<action>")[1:3] == (-1.0, True)


@functools.cache
def _reachable(numbers: tuple[Fraction, ...]) -> set[Fraction]:
    """Every value that all numbers make: join every two, in every way, until one is left."""
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        for joined in {a + b, a - b, a * b} | ({a / b} if b else set()):
            found |= _reachable(tuple(sorted((joined, *rest))))
    return found


def test_the_expert_wins_exactly_the_points24_hands_that_can_be_won() -> None:
    env = PointsEnv()
    outcomes = []
    for seed in range(24):
        _, start = env.reset(seed=seed)
        numbers = start["extra"]["numbers"]
        possible = 24 in _reachable(tuple(map(Fraction, sorted(numbers))))
        paid, info = _expert(env, seed)
        assert info["success"] == possible, numbers
        assert paid == (10.0 if possible else -1.0)
        outcomes.append(possible)
    assert True in outcomes
    assert False in outcomes


def test_a_solvable_deal_is_always_won_and_the_hard_ones_too() -> None:
    env = PointsEnv(deal="solvable")
    assert all(_expert(env, seed)[0] == 10.0 for seed in range(100))
    env = PointsEnv()
    env.reset(seed=0)
    env._cards = tuple(Card(rank - 1) for rank in (3, 3, 8, 8))
    env._left = (3, 3, 8, 8)
    assert _rewards(env, *"8/(3-8/3)")[-1] == 0.0
    assert env.step("=")[1] == 10.0


def test_the_expert_goes_on_from_any_formula_that_can_still_be_right() -> None:
    rng = generator("beginnings")
    env = PointsEnv(deal="solvable")
    saved = wins = 0
    for seed in range(25):
        env.reset(seed=seed)
        for _ in range(3):
            commands = [c for c in _commands(env) if c != "="]
            env.step(commands[int(rng.integers(len(commands)))])
        hopeful = env.expert_action() != "="
        while (action := env.expert_action()) is not None:
            _, _, _, _, info = env.step(action)
        assert info["success"] == hopeful
        saved += 1
        wins += hopeful
    assert 0 < wins < saved


def test_points24_reads_other_forms_of_its_symbols_and_up_to_twenty_of_them() -> None:
    env = _hand("points24", [10, 10, 10, 6])
    assert _rewards(env, "10", "＋", "'10'", "+", "（", "10", "−", "6", "）") == [0.0] * 9
    assert env.step("＝")[1] == 10.0
    env = _hand("points24", [10, 10, 10, 6])
    assert _rewards(env, *"+" * 21) == [0.0] * 21
    assert env.step("=")[1:3] == (-1.0, True)


# Blackjack.


def test_blackjack_hands_end_as_in_gymnasiums_own(monkeypatch: pytest.MonkeyPatch) -> None:
    env, theirs = BlackjackEnv(), reference.BlackjackEnv(natural=False, sab=False)
    rng = generator("blackjack players")
    results = set()
    for seed in range(400):
        env.reset(seed=seed)
        shoe = iter([card.value for card in env._shoe[4:]])
        monkeypatch.undo()
        theirs.reset(seed=seed)
        monkeypatch.setattr(reference, "draw_card", lambda _, shoe=shoe: next(shoe))
        theirs.dealer = [card.value for card in env._dealer]
        theirs.player = [card.value for card in env._player]
        over = False
        while not over:
            hit = int(rng.integers(2))
            _, reward, over, _, info = env.step(("stand", "hit")[hit])
            state, their_reward, their_over, _, _ = theirs.step(hit)  # type: ignore[no-untyped-call]
            assert (reward, over) == (their_reward, their_over)
            hand = [card.value for card in env._player]
            assert (hand_total(hand)[0], hand_total(hand)[1]) == (state[0], bool(state[2]))
        assert (info["score"], info["success"]) == (reward, reward == 1.0)
        results.add(reward)
    assert results == {-1.0, 0.0, 1.0}


def test_the_dealer_ends_as_often_as_published() -> None:
    # Chances of a bust by open card, infinite deck, dealer stands on every 17, no peek.
    published = {2: 35.36, 3: 37.39, 4: 39.45, 5: 41.64, 6: 42.32, 7: 26.23, 8: 24.47, 9: 22.84}
    published |= {10: 21.21, 1: 11.53}
    for card, percent in published.items():
        chances = _dealer_totals(11 if card == 1 else card, card == 1)
        bust = sum(chance for total, chance in chances.items() if total > 21)
        assert 100 * bust == pytest.approx(percent, abs=0.01)
        assert sum(chances.values()) == pytest.approx(1)


def test_the_computed_policy_is_basic_strategy_without_doubling_and_splitting() -> None:
    for dealer in range(1, 11):
        stands = {
            s: min(t for t in range(12, 22) if best_action(t, s, dealer) == "stand")
            for s in (False, True)
        }
        assert stands[False] == (12 if dealer in (4, 5, 6) else 13 if dealer in (2, 3) else 17)
        assert stands[True] == (19 if dealer in (1, 9, 10) else 18)
        assert all(best_action(total, False, dealer) == "hit" for total in range(4, 12))
        for total in range(12, 22):
            for soft in (False, True):
                assert -1 <= hit_value(total, soft, dealer) <= 1
    assert stand_value(21, 6) > 0.9


def test_the_expert_plays_the_computed_policy() -> None:
    env = BlackjackEnv()
    results = []
    for seed in range(300):
        env.reset(seed=seed)
        while (action := env.expert_action()) is not None:
            total, soft = hand_total([card.value for card in env._player])
            assert action == best_action(total, soft, env._dealer[0].value)
            _, reward, _, _, _ = env.step(action)
        results.append(reward)
    assert -0.25 < sum(results) / 300 < 0.15  # -0.047 is expected, three deviations are 0.17


def test_blackjack_hides_a_card_and_refuses_what_is_no_action() -> None:
    env = BlackjackEnv()
    observation, info = env.reset(seed=3)
    assert observation == f"Dealer: {env._dealer[0]} and a hidden card. You: 2H JH (12)."
    assert info["admissible_commands"] == ("stand", "hit")
    assert info["extra"]["dealer"] == [str(env._dealer[0])]
    for reply in ("double", "hit me", "<action>", "1"):
        _, reward, terminated, _, info = env.step(reply)
        assert (reward, terminated, info["valid"]) == (0.0, False, False)
        assert info["extra"]["player"] == ["2H", "JH"]
    observation, reward, terminated, _, _ = env.step("Stick.")
    assert observation.startswith("You lose. Dealer: JS QS (20). You: 2H JH (12).")
    assert (reward, terminated) == (-1.0, True)


# All of them.


@pytest.mark.parametrize("make", [NumberLineEnv, _ezpoints, PointsEnv, BlackjackEnv])
def test_a_snapshot_is_of_its_own_game_only(make: Callable[[], TextEnv]) -> None:
    env = make()
    env.reset(seed=1)
    saved = env.snapshot()
    others: list[TextEnv] = [
        NumberLineEnv(max_position=9),
        _ezpoints(),
        PointsEnv(),
        BlackjackEnv(),
        NumberLineEnv(),
    ]
    taken = []
    for other in others:
        try:
            other.restore(saved)
        except EnvError:
            continue
        taken.append(other)
    assert [type(other) for other in taken] == [type(env)]
    assert taken[0].snapshot() == saved
    with pytest.raises(EnvError, match="this snapshot is of"):
        next(other for other in others if type(other) is not type(env)).restore(saved)


def test_admissible_commands_are_listed_unless_declined() -> None:
    for env in (
        NumberLineEnv(admissible_commands=False),
        PointsEnv(admissible_commands=False),
        BlackjackEnv(admissible_commands=False),
    ):
        assert env.reset(seed=0)[1]["admissible_commands"] is None


# Pictures.

_WHITE = (255, 255, 255)


def _read(image: np.ndarray, top: int, left: int, count: int, ink: Sequence[int] = _WHITE) -> str:
    """Return the characters whose dots stand in a line of a picture."""
    known = {dots: character for character, dots in _GLYPHS.items()}
    found = ""
    for number in range(count):
        x = left + 18 * number
        cell = image[top : top + 21 : 3, x : x + 15 : 3]
        lit = (cell == ink).all(axis=2)
        rows = (sum(1 << (4 - bit) for bit in range(5) if row[bit]) for row in lit)
        found += known["".join("0123456789ABCDEFGHIJKLMNOPQRSTUV"[row] for row in rows)]
    return found


def test_a_picture_shows_what_the_text_says() -> None:
    env = NumberLineEnv(image=True)
    _, info = env.reset(seed=0)
    image = info["extra"]["image"]
    assert (image.shape, image.dtype) == ((240, 320, 3), np.uint8)
    assert _read(image, 8, 8, 8) == f"TARGET {info['extra']['target']}"
    assert _read(image, 41, 8, 9) == f"CURRENT {info['extra']['current']}"
    points = PointsEnv(image=True)
    _, info = points.reset(seed=0)
    assert _read(info["extra"]["image"], 10, 13, 1, (0, 0, 0)) == "Q"  # of clubs
    sent = [str(info["extra"]["numbers"][0]), *"+-*/()+-*/()(((("]
    for symbol in sent:
        _, _, _, _, info = points.step(symbol)
    line = "".join(sent)
    assert _read(info["extra"]["image"], 92, 8, 16) == line[:16]
    assert _read(info["extra"]["image"], 125, 8, len(line) - 16) == line[16:]


def test_a_picture_hides_the_dealers_card_until_the_end() -> None:
    env = BlackjackEnv(image=True)
    env.reset(seed=3)
    before = env._info(Outcome("", 0.0), format_error=False)["extra"]["image"]
    hidden = env._dealer[1]
    env._dealer = (env._dealer[0], Card((hidden.index + 20) % 52))
    other = env._info(Outcome("", 0.0), format_error=False)["extra"]["image"]
    assert (before == other).all()
    over = Outcome("", 0.0, terminated=True)
    assert (env._info(over, format_error=False)["extra"]["image"] != before).any()


def test_pictures_obey_the_rules_and_come_back_with_a_snapshot() -> None:
    def pictured() -> TextEnv:
        return PointsEnv(deal="solvable", image=True)

    assert "going back" in check_env(pictured).passed
    assert "image" not in PointsEnv().reset(seed=0)[1]["extra"]


def test_pictures_of_many_environments_stack() -> None:
    env = gymnasium.make_vec("pz/NumberLine-v0", num_envs=3, processes=2, image=True)
    try:
        _, infos = env.reset(seed=0)
        images = infos["extra"]["image"]
        assert images.shape == (3, 240, 320, 3)
        alone = NumberLineEnv(image=True).reset(seed=2)[1]["extra"]["image"]
        assert (images[2] == alone).all()
    finally:
        env.close()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: PointsEnv(game="ezpoint"), "Did you mean `ezpoints`"),
        (
            lambda: PointsEnv(deal="any"),  # type: ignore[arg-type]
            "original, solvable",
        ),
        (lambda: NumberLineEnv(max_position=0), "max_position=0"),
    ],
)
def test_a_wrong_argument_is_named(make: Callable[[], TextEnv], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make()
