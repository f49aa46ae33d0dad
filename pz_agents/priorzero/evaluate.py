"""Evaluation: held-out episodes without noise, by each half alone and by both together.

``evaluator_step/reward_mean`` is of both (of the world model where there is no language model);
``wm_reward_mean`` and ``llm_reward_mean`` are of each alone. With several games it is their mean,
and each game's own stands under its name.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pz_agents.priorzero.actor import Actor, Mode
from pz_agents.priorzero.collect import Played, mean
from pz_agents.priorzero.games import Game, MakeActor
from pz_agents.priorzero.prior import LanguagePrior

PREFIX = "evaluator_step/"
_FEWER = ("reward_mean", "score", "success")


def modes(prior: LanguagePrior | None, *, mixed: bool) -> tuple[Mode, ...]:
    """Return who is to play: the first is the one that counts."""
    if prior is None:
        return ("wm",)
    return ("both", "wm", "llm") if mixed else ("wm", "llm")


def actor_of(
    make_actor: MakeActor, mode: Mode, commands: Sequence[int], prior: LanguagePrior | None
) -> Actor:
    """Return an actor that plays in ``mode`` without noise."""
    return make_actor(
        explore=False,
        commands=commands,
        prior=None if mode == "wm" else prior,
        alone=mode == "llm",
    )


def evaluate(
    games: Sequence[Game], make_actor: MakeActor, prior: LanguagePrior | None, *, mixed: bool
) -> tuple[dict[str, float], float]:
    """Play every game in every mode.

    Args:
        games: with their environments.
        make_actor: as for ``Game``.
        prior: the language model's; None: the world model alone.
        mixed: whether the search that is trained asks it.

    Returns:
        What to log, and the score by which checkpoints are compared. A failed episode counts as
        nothing gained.
    """
    figures: dict[str, float] = {}
    wanted = modes(prior, mixed=mixed)
    score = 0.0
    for mode in wanted:
        first = mode == wanted[0]
        found = []
        for game in games:
            played = game.evaluate(actor_of(make_actor, mode, game.commands, prior))
            each = _figures(played)
            found.append(each)
            if first:
                score += each["success" if game.metric == "success" else "score"] / len(games)
            if len(games) > 1:
                prefix = f"{PREFIX}{game.name}/" + ("" if first else f"{mode}_")
                figures |= {f"{prefix}{name}": each[name] for name in _FEWER}
        merged = {name: mean([each[name] for each in found]) for name in found[0]}
        if first:
            figures |= {f"{PREFIX}{name}": value for name, value in merged.items()}
        if prior is not None and mode != "both":
            figures |= {f"{PREFIX}{mode}_{name}": merged[name] for name in _FEWER}
    return figures, score


def _figures(played: Sequence[Played]) -> dict[str, float]:
    rewards = [each.reward for each in played]
    return {
        "reward_mean": mean(rewards),
        "reward_max": max(rewards),
        "reward_std": float(np.std(rewards)),
        "score": mean([each.score_norm for each in played]),
        "success": mean([float(each.success) for each in played]),
        "failed": float(sum(each.error is not None for each in played)),
    }
