"""With Adam, gradients are measured as its steps use them: over the root of the second moment."""

from __future__ import annotations
from collections.abc import Callable
import torch

Precondition = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (parameter, gradient)

# By name: Lamb is pytorch-optimizer's, and it keeps Adam's second moment too.
ADAM_LIKE = {"Adam", "AdamW", "Lamb"}


def preconditioner(optimizer: torch.optim.Optimizer) -> Precondition | None:
    """u -> u/(sqrt(v) + eps) with the stored second moment v, the same for all units; None for an
    optimizer that keeps none.

    The map is then linear, so S1 and S2 stay consistent. An element whose v is 0 has never had a
    gradient, such as a rare class's row, and one divided by eps alone would drown all others: it
    counts as 0, as does a parameter without a state.
    """
    if not ADAM_LIKE & {c.__name__ for c in type(optimizer).__mro__}:
        return None
    eps = {p: group["eps"] for group in optimizer.param_groups for p in group["params"]}

    def precondition(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        v = optimizer.state.get(param, {}).get("exp_avg_sq")
        if v is None:
            return torch.zeros_like(grad)
        return (grad / v.sqrt().add_(eps[param])).masked_fill_(v == 0, 0)

    return precondition
