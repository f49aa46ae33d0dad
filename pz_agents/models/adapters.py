"""Low-rank adapters (Hu et al., LoRA, 2021) through peft: added in place, saved alone, merged.

W x becomes W x + 2 B A x with A [rank, in] and B [out, rank] on every linear layer but the head;
B begins at 0, so that the first step is on policy. Only A and B, in float32, are trained. The
network stays the same object: what plays with it sees the adapter, and ``save_pretrained`` writes
the adapter alone, with the path of the weights it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pz_envs.errors import require

ADAPTER_CONFIG = "adapter_config.json"
"""The file that tells an adapter's folder from a whole model's."""

SCALE = 2
"""The adapter's output is multiplied by this (peft's ``lora_alpha`` over the rank)."""

_NAME = "default"


def add_adapter(network: Any, rank: int, seed: int) -> None:
    """Add an adapter of ``rank`` to a transformers ``network``; nothing else is trained then.

    Args:
        network: changed in place.
        rank: of each pair of matrices.
        seed: decides A.

    Raises:
        ConfigError: peft is not installed.
    """
    peft = require("peft", "pz-agents[train]")
    config = peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules="all-linear")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network.add_adapter(config, adapter_name=_NAME)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()


def has_adapter(network: Any) -> bool:
    """Return whether ``network`` carries an adapter."""
    return bool(getattr(network, "_hf_peft_config_loaded", False))


@contextmanager
def without_adapter(network: Any) -> Iterator[None]:
    """Let ``network`` answer with its own weights alone."""
    network.disable_adapters()
    try:
        yield
    finally:
        network.enable_adapters()


def merged_state(network: Any) -> dict[str, Tensor]:
    """Return the ``state_dict`` of ``network`` with its adapter added to the weights.

    The names are those of the architecture without an adapter; ``network`` is not changed. A
    network without one gives its own.
    """
    state = dict(network.state_dict())
    if not has_adapter(network):
        return state
    merged = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if "lora_" not in name
    }
    for name, module in network.named_modules():
        if hasattr(module, "get_delta_weight"):
            weight = module.base_layer.weight.detach()
            change = module.get_delta_weight(_NAME).detach()
            merged[f"{name}.weight"] = (weight.float() + change.float()).to(weight.dtype)
    return merged
