"""With Adam, gradients are measured as its steps use them: over the root of the second moment."""

from __future__ import annotations
from collections.abc import Callable
import torch

from .modules import local_part

Precondition = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (parameter, gradient)

# By name: Lamb is pytorch-optimizer's, and it keeps Adam's second moment too.
ADAM_LIKE = {"Adam", "AdamW", "Lamb"}


class AdamPrecondition:
    """u -> u/(sqrt(v) + eps) with the stored second moment v, the same for all units.

    The map is then linear, so S1 and S2 stay consistent. An element whose v is 0 has never had a
    gradient, such as a rare class's row, and one divided by eps alone would drown all others: it
    counts as 0, as does a parameter without a state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._state = optimizer.state
        self._eps = {p: group["eps"] for group in optimizer.param_groups for p in group["params"]}

    def second_moment(self, param: torch.Tensor) -> torch.Tensor | None:
        """v as far as this worker holds it; None before the first step."""
        v = self._state.get(param, {}).get("exp_avg_sq")
        return None if v is None else local_part(v)

    def __call__(
        self, param: torch.Tensor, grad: torch.Tensor, v: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`grad`, of the shape of `v`; without one, of this worker's `second_moment`."""
        v = self.second_moment(param) if v is None else v
        if v is None:
            return torch.zeros_like(grad)
        return (grad / v.sqrt().add_(self._eps[param])).masked_fill_(v == 0, 0)


def preconditioner(optimizer: torch.optim.Optimizer) -> AdamPrecondition | None:
    """The optimizer's; None for one that keeps no second moment."""
    is_adam = ADAM_LIKE & {c.__name__ for c in type(optimizer).__mro__}
    return AdamPrecondition(optimizer) if is_adam else None
