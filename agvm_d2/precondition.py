"""With Adam, gradients are measured as its steps use them: over the root of the second moment."""

from __future__ import annotations
import logging
from collections.abc import Callable
import torch
import torch.distributed as dist

from .param_groups import is_zero
from .shards import local_part

logger = logging.getLogger("detectron2.agvm_d2")

Precondition = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (parameter, gradient)

# By name: Lamb is pytorch-optimizer's, and it keeps Adam's second moment too.
ADAM_LIKE = {"Adam", "AdamW", "NAdam", "RAdam", "Lamb"}
# Others that scale each element by what they have seen; how, is not known here. In small letters:
# Adagrad, Adafactor, and FusedAdam or AdamW8bit of other packages.
ADAPTIVE = ("ada", "lion", "rmsprop")


class AdamPrecondition:
    """u -> u/(sqrt(v) + eps) with the stored second moment v, the same for all units.

    The map is then linear, so S1 and S2 stay consistent. An element whose v is 0 has never had a
    gradient, such as a rare class's row, and one divided by eps alone would drown all others: it
    counts as 0, as does a parameter without a state.

    Args:
        optimizer: Adam or one like it.
        share: of the workers that keep a parameter's second moment, 1/W where each parameter has
            one worker to keep it. Its squares then stand for those of all, which do not count.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, share: float = 1.0):
        self._optimizer, self._scale = optimizer, share**-0.5
        self._group_of: dict[torch.Tensor, dict] = {}
        self._groups: list[dict] | None = None  # those that it is of; a loaded state makes others

    def second_moment(self, param: torch.Tensor) -> torch.Tensor | None:
        """v as far as this worker holds it, with amsgrad its maximum; None before the first step,
        and for a parameter that the optimizer does not have."""
        state = self._optimizer.state.get(param, {})
        v = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
        return None if v is None else local_part(v)

    def _eps(self, param: torch.Tensor) -> float:
        groups = self._optimizer.param_groups
        if self._groups is not groups or param not in self._group_of:
            self._groups = groups
            self._group_of = {p: group for group in groups for p in group["params"]}
        return self._group_of.get(param, self._optimizer.defaults)["eps"]

    def __call__(
        self, param: torch.Tensor, grad: torch.Tensor, v: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`grad`, of the shape of `v`; without one, of this worker's `second_moment`."""
        v = self.second_moment(param) if v is None else v
        if v is None:
            return torch.zeros_like(grad)
        v = v.to(grad.device)  # from the CPU, where FSDP2 offloads shards to it
        found = (grad / v.sqrt().add_(self._eps(param))).masked_fill_(v == 0, 0)
        return found if self._scale == 1 else found.mul_(self._scale)


def preconditioner(optimizer: torch.optim.Optimizer) -> AdamPrecondition | None:
    """The optimizer's, or that of the one in a ZeroRedundancyOptimizer; None for one that keeps no
    second moment."""
    inner = optimizer.optim if is_zero(optimizer) else optimizer  # type: ignore[attr-defined]
    names = {c.__name__ for c in type(inner).__mro__}
    if not ADAM_LIKE & names:
        if any(word in name.lower() for word in ADAPTIVE for name in names):
            logger.warning(
                f"AGVM measures gradients as {type(inner).__name__} gets them, not as it scales "
                "them: variance, noise scale and gain are those of SGD."
            )
        return None
    return AdamPrecondition(inner, 1.0 if inner is optimizer else 1 / dist.get_world_size())
