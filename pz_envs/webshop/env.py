"""The WebShop environment: one instruction an episode, from the search bar to a purchase.

Observations, actions, search results and rewards are those of the original text environment
(Yao et al. 2022) for the same files. Two things differ by default and can be switched back: the
goal is drawn uniformly from the chosen split (the original's draw shifts every weight by one), and
the random prices come from a seed (the original's differ from process to process).
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np

from pz_envs.errors import ConfigError, EnvError, did_you_mean
from pz_envs.textenv import Outcome, ReplyFormat, TextEnv
from pz_envs.webshop.expert import oracle_action, without_price
from pz_envs.webshop.goals import GoalKind, Split, draw_like_original, split_range
from pz_envs.webshop.pages import ObservationMode, render
from pz_envs.webshop.session import Session
from pz_envs.webshop.store import open_shop

SEARCH_PLACEHOLDER = "search[<query>]"
"""The admissible command that stands for every search; sent literally, it searches for the goal."""

_MODES = ("text_rich", "text", "url")
_DRAWS = ("uniform", "faithful")
_MAX_HISTORY = 100

_RULES = (
    "You are shopping online. Find a product that fits the instruction, choose its options and buy "
    "it. Write search[words] to search, or click[text] to click one of the texts on the page, such "
    "as click[buy now]. Buying ends the episode; its score is the share of the wanted attributes, "
    "options and price that the product meets."
)


class WebShopEnv(TextEnv):
    """An instruction and web pages in, ``search[...]`` and ``click[...]`` out.

    ``info["admissible_commands"]`` holds ``click[...]`` for everything on the page and, where
    there is a search bar, ``search[<query>]``: put words in place of ``<query>``; sent as it is,
    it searches for the instruction's words. As in the original, searching works on every page.

    Args:
        source: ``"builtin"`` (a catalogue that pz makes itself), ``"products_1000"`` (the
            published small shop), a shop folder made by ``pz-envs data import-webshop``, or a
            folder with the original's files; see ``open_shop``.
        num_products: how many records of the source to take; None for all (10,000 built in).
        goals: ``"human"`` instructions or ``"synthetic"`` ones.
        split: ``"train"``, ``"eval"``, ``"test"``, ``"all"``, or ``"fork_train"`` and
            ``"fork_test"``, the ranges of the published R3L runs; see ``split_range``.
        observation_mode: ``"text_rich"``, ``"text"`` or ``"url"``.
        draw: how a seed picks a goal of the split: ``"uniform"``, or ``"faithful"`` to the
            original's shifted weights. ``reset(options={"index": i})`` picks goal ``i`` of all.
        price_seed: seed of purchase prices within ranges and of price bounds.
        show_attributes: whether product pages link to their attributes.
        num_prev_obs: earlier observations put before the current one, oldest first.
        num_prev_actions: earlier actions put between them.
        admissible_commands: whether ``info`` lists them.
        reply_format: see ``TextEnv``.
        render_mode: see ``TextEnv``.

    Raises:
        ConfigError: an argument is out of range, or the split holds no goals.
        DataError: the files of ``source`` are missing or broken.
    """

    family: ClassVar[str] = "webshop"
    reply_tag: ClassVar[str] = "action"
    can_snapshot: ClassVar[bool] = True

    def __init__(
        self,
        *,
        source: str = "builtin",
        num_products: int | None = None,
        goals: GoalKind = "human",
        split: Split = "train",
        observation_mode: ObservationMode = "text_rich",
        draw: Literal["uniform", "faithful"] = "uniform",
        price_seed: int = 0,
        show_attributes: bool = False,
        num_prev_obs: int = 0,
        num_prev_actions: int = 0,
        admissible_commands: bool = True,
        reply_format: ReplyFormat = "auto",
        render_mode: str | None = None,
    ) -> None:
        super().__init__(reply_format=reply_format, render_mode=render_mode)
        _check_choice("observation_mode", observation_mode, _MODES)
        _check_choice("draw", draw, _DRAWS)
        for name, value in (("num_prev_obs", num_prev_obs), ("num_prev_actions", num_prev_actions)):
            if not 0 <= value <= _MAX_HISTORY:
                raise ConfigError(f"{name}={value}: allowed are 0 to {_MAX_HISTORY}")
        self._shop = open_shop(str(source), num_products)
        self._goals, self._prices = self._shop.goals(goals, price_seed)
        self._range = split_range(split, len(self._goals))
        self._sums = np.cumsum(self._goals.weights(self._range)) if draw == "faithful" else None
        self._name = f"webshop/{self._shop.name}/{goals}"
        self._identity = f"{self._shop.fingerprint}/{goals}/{price_seed}"
        self._mode: ObservationMode = observation_mode
        self._show_attributes = show_attributes
        self._history = (num_prev_obs, num_prev_actions)
        self._list_commands = admissible_commands
        self._session = self._new_session(self._range[0])
        self._past_observations: list[str] = []
        self._past_actions: list[str] = []

    def expert_action(self) -> str | None:
        """Return the oracle's next action; it knows which product the goal is about."""
        if self._outcome is None or self._outcome.terminated:
            return None
        return oracle_action(self._session, self._shop, self._goal)

    def random_action(self, rng: np.random.Generator) -> str | None:
        """Return a random click, or where nothing leads on a search for words of the goal."""
        page = self._session.page
        texts = [text for text in page.clickables if text and text != "search"]
        if texts and not page.has_search_bar:
            return f"click[{texts[int(rng.integers(len(texts)))]}]"
        words = without_price(self._goal.instruction_text).split()
        count = int(rng.integers(1, min(5, len(words)) + 1))
        chosen = sorted(rng.choice(len(words), size=count, replace=False))
        return f"search[{' '.join(words[place] for place in chosen)}]"

    def _start(self, seed: int, options: Mapping[str, Any]) -> Outcome:
        self._session = self._new_session(self._choose(seed, options))
        self._task_id = f"{self._name}/{self._index}"
        self._max_score = 1.0
        self._instruction = f"{_RULES}\nInstruction: {self._goal.instruction_text}"
        observation = self._observe()
        self._past_observations = [observation]
        self._past_actions = []
        return self._outcome_of(observation, valid=True)

    def _advance(self, command: str) -> Outcome:
        action = command
        if command == SEARCH_PLACEHOLDER:
            action = f"search[{without_price(self._goal.instruction_text)}]"
        step = self._session.act(action)
        observation = self._observe()
        shown = self._with_history(observation, command)
        if step.verdict is None:
            return self._outcome_of(shown, valid=step.valid)
        reward = step.verdict.reward
        return Outcome(
            shown,
            score=reward,
            reward=reward,
            terminated=True,
            success=reward >= 1.0,
            admissible_commands=() if self._list_commands else None,
            extra={**self._extra(), "verdict": dict(step.verdict.parts)},
        )

    def _save(self) -> bytes:
        state = {
            "identity": self._identity,
            "index": self._index,
            "session": self._session.save(),
            "observations": self._past_observations,
            "actions": self._past_actions,
        }
        return json.dumps(state, sort_keys=True).encode()

    def _load(self, engine: bytes, header: Mapping[str, Any]) -> None:
        state = json.loads(engine)
        if state["identity"] != self._identity:
            raise EnvError(
                f"this snapshot is of another shop or price seed ({state['identity']}); this "
                f"environment has {self._identity}: make it with the same source, num_products, "
                "goals and price_seed"
            )
        self._session = self._new_session(state["index"])
        self._session.load(state["session"])
        self._past_observations = state["observations"]
        self._past_actions = state["actions"]

    def _choose(self, seed: int, options: Mapping[str, Any]) -> int:
        index = options.get("index")
        if index is not None:
            if not isinstance(index, int) or not 0 <= index < len(self._goals):
                raise ConfigError(f"index={index!r}: allowed are 0 to {len(self._goals) - 1}")
            return index
        if self._sums is None:
            return self._range[seed % len(self._range)]
        return self._range[draw_like_original(self._sums, random.Random(seed))]

    def _new_session(self, index: int) -> Session:
        self._index = index
        self._goal = self._goals[index]
        return Session(
            self._shop,
            self._goal,
            str(index),
            self._prices,
            show_attributes=self._show_attributes,
        )

    def _observe(self) -> str:
        session = self._session
        return render(session.page, self._mode, session.url, session.visited)

    def _with_history(self, observation: str, action: str) -> str:
        """Return the observation behind as much history as was asked for, and record both."""
        observations, actions = self._history
        if not observations and not actions:
            return observation
        self._past_actions.append(action)
        parts = [observation]
        for back in range(1, max(observations, actions) + 1):
            if back <= actions and back <= len(self._past_actions):
                parts.append(self._past_actions[-back])
            if back <= observations and back <= len(self._past_observations):
                parts.append(self._past_observations[-back])
        self._past_observations.append(observation)
        del self._past_observations[: -max(1, observations)]
        del self._past_actions[: -max(1, actions)]
        return " [SEP] ".join(reversed(parts))

    def _outcome_of(self, observation: str, *, valid: bool) -> Outcome:
        return Outcome(
            observation,
            score=0.0,
            valid=valid,
            admissible_commands=self._commands() if self._list_commands else None,
            extra=self._extra(),
        )

    def _commands(self) -> tuple[str, ...]:
        page = self._session.page
        clicks = tuple(f"click[{text}]" for text in page.clickables if text and text != "search")
        return (SEARCH_PLACEHOLDER, *clicks) if page.has_search_bar else clicks

    def _extra(self) -> dict[str, Any]:
        return {
            "url": self._session.url,
            "page": self._session.kind,
            "goal": self._goal.instruction_text,
            "has_search_bar": self._session.page.has_search_bar,
            "nouns": self._shop.nouns,
        }


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"{name}={value!r}: allowed are {', '.join(allowed)}."
            f"{did_you_mean(str(value), allowed)}"
        )
