"""Muon (Jordan et al. 2024): momentum whose matrix updates are made nearly orthogonal.

It warms ``tiny`` up in far fewer steps: 500 brought 48 % of sampled Countdown answers right where
500 of AdamW brought 10 %, and 900 at a higher rate 19 %. ``torch.optim.Muon`` is the same rule,
but it always works in bfloat16, which made those 500 steps take 121 CPU seconds instead of 44;
here it works in the weights' type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

_MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Optimizer for weight matrices; embeddings and vectors belong to AdamW.

    Args:
        params: matrices only.
        lr: step size at the scale of AdamW's: an update has a root mean square of 0.2 ``lr``.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; ``closure`` is not used."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state: dict[str, Any] = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - _MOMENTUM)
                update = orthogonalized(parameter.grad.lerp(momentum, _MOMENTUM))
                scale = 0.2 * max(parameter.shape) ** 0.5
                parameter.add_(update, alpha=-group["lr"] * scale)


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Return ``matrix`` with all singular values near 1 (Newton-Schulz, a quintic iteration)."""
    a, b, c = _COEFFICIENTS
    wide: torch.Tensor = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T
