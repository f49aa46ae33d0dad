"""What to change when memory runs out: each way out with what it saves, the largest first.

Bytes are estimates: 16 for a float32 weight that AdamW trains (itself, its gradient, two moments),
4 for one that only answers, and for a token what a transformer layer keeps for the backward pass
(Korthikanti et al., 2022: about 34 values of the hidden size) and its logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pz_agents.algorithms import load_algorithm
from pz_agents.training.settings import TrainSettings

_TRAINED = 12
_WEIGHT = 4
_KEPT = 34


@dataclass(frozen=True, slots=True)
class Saving:
    """A change of settings and the bytes that it saves."""

    change: str
    size: float


def savings(
    settings: TrainSettings, network: Any, longest: int, *, reference: bool
) -> list[Saving]:
    """Return what can still be changed, the largest saving first.

    Args:
        settings: of the run.
        network: a transformers model.
        longest: tokens of the row that did not fit.
        reference: a second copy of the weights is held for a KL term.
    """
    weights = sum(parameter.numel() for parameter in network.parameters())
    config = network.config.get_text_config()
    layer = config.num_hidden_layers * config.hidden_size
    token = _KEPT * layer + 3 * _WEIGHT * config.vocab_size
    networks = 1 if load_algorithm(settings.algorithm).critic is None else 2
    found = [
        Saving(f"max_new_tokens={max(settings.max_new_tokens // 2, 1)}", token * longest / 2),
        Saving("a smaller model, of half the weights", weights * (_TRAINED + _WEIGHT) / 2),
    ]
    if settings.max_turns > 1:
        turns = settings.max_turns // 2
        found.append(Saving(f"max_turns={turns}", token * longest / 2))
    if not settings.lora_rank:
        # An adapter trains about a hundredth, and its base is the reference.
        held = _TRAINED * networks + (_WEIGHT if reference else 0)
        found.append(Saving("lora_rank=16", weights * held))
    elif settings.precision == "float32":
        found.append(Saving("precision=bfloat16", weights * _WEIGHT / 2))
    if reference and not settings.lora_rank:
        found.append(Saving("kl_reward=0 and options.beta=0", weights * _WEIGHT))
    if networks == 2:
        held = _WEIGHT if settings.lora_rank else _TRAINED + _WEIGHT
        found.append(Saving("algorithm=grpo, which has no critic", weights * held))
    return sorted(found, key=lambda saving: -saving.size)


def advice(found: list[Saving]) -> str:
    """Return the savings as one line of text."""
    return ", ".join(f"{each.change} (about {_readable(each.size)})" for each in found)


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
