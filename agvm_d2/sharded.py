"""The tap for FSDP2 (`fully_shard`), where each worker holds a shard of the model.

In a backward pass a worker has its own whole gradient of each parameter for a moment, before the
reduce-scatter that leaves it with its shard of the average: the first gives S1, the second S2.
"""

from __future__ import annotations
import torch
from torch import nn

from .moments import TensorTap
from .norms import Modules
from .precondition import AdamPrecondition
from .shards import Sharded, gathered, local_part, shard_of, whole_parameters

# Elements of a module whose second moments are gathered, for an exact S1 under Adam.
GATHERED = 1 << 24


class ShardedTap(TensorTap):
    """One unit per worker and micro-batch, of a model under `fully_shard`.

    With Adam, a worker has the second moment of its own shard only. Those of modules of up to
    `GATHERED` elements are gathered when a measured iteration begins, for the same S1 as without
    shards. Of a larger module each worker measures its own shard of its own gradient: S1 is right
    in expectation, without traffic, and costs a worker only its share of the elements.
    """

    def __init__(
        self, model: nn.Module, modules: Modules, precondition: AdamPrecondition | None = None
    ):
        self.adam = precondition
        super().__init__(modules, None if precondition is None else self._divide)
        self._whole = whole_parameters(model)
        first: Sharded = self.params[0]
        self.shards = first.device_mesh.size(-1)
        self.device = torch.device(first.device_mesh.device_type)  # shards may be offloaded
        self._second_moments: dict[torch.Tensor, torch.Tensor] = {}

    def leaf(self, param: nn.Parameter) -> torch.Tensor:
        whole = self._whole[param]
        if param.requires_grad and not whole.requires_grad:  # as FSDP2 does when it gathers it next
            whole.requires_grad_()
        return whole

    def _own_shard_only(self) -> list[bool]:
        """For each module."""
        sizes = [sum(p.numel() for p in params) for params in self.modules.values()]
        return [self.adam is not None and size > GATHERED for size in sizes]

    def _second_moment(self, param: nn.Parameter) -> torch.Tensor:
        """Of this worker's shard; 0, where nothing counts, before the first step."""
        assert self.adam is not None
        held = self.adam.second_moment(param)
        return torch.zeros_like(local_part(param)) if held is None else held

    def start(self) -> None:
        if self.adam is not None:
            large = self._own_shard_only()
            small = [ps for ps, own in zip(self.modules.values(), large, strict=True) if not own]
            params = [p for ps in small for p in ps]
            self._second_moments = gathered(params, [self._second_moment(p) for p in params])
        super().start()

    def _divide(self, param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """A whole gradient by the whole second moment, a shard by this worker's."""
        assert self.adam is not None
        v = self._second_moments.get(param)
        return self.adam(param, grad, v if v is not None and v.shape == grad.shape else None)

    def add_unit(self, param: nn.Parameter, grad: torch.Tensor) -> None:
        if self.adam is not None and param not in self._second_moments:
            grad = shard_of(grad, param)
        super().add_unit(param, grad)

    def average_done(self) -> None:
        if self.seen and all(p.grad is None for p in self.params):
            raise RuntimeError(
                "AGVM: no gradient was reduced in this iteration: the model's gradients were "
                "accumulated over iterations inside FSDP2, by set_requires_gradient_sync(False) or "
                "set_requires_all_reduce(False). "
                "Accumulate within an iteration (train.micro_batch_size) instead."
            )
        super().average_done()

    def local(self) -> tuple[torch.Tensor, int]:
        rows, num_units = super().local()
        # The workers' mean of squares of shards is 1/shards of that of whole gradients.
        rows[1] *= self.shards
        for i, own_shard_only in enumerate(self._own_shard_only()):
            if own_shard_only:
                rows[0, i] *= self.shards
        return rows, num_units
