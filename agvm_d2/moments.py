"""Gradients -> the two numbers that each module needs, over all workers.

S1, the mean squared norm of the single gradients, must be seen before DDP averages them, S2 after.
Only squared norms are kept and sent. The paper's estimator, which needs more, is in `split.py`.
"""

# No `from __future__ import annotations` here: DDP compares the annotation of a communication
# hook's `bucket` with the class itself, and would refuse a string.
import functools
from collections.abc import Callable
from typing import Any, NamedTuple
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .norms import ModuleNorms, Modules
from .precondition import Precondition
from .shards import local_part
from .variance import pairwise_variance

CommHook = tuple[Any, Callable]  # (state, hook), the arguments of DDP's register_comm_hook


class Moments(NamedTuple):
    """One measurement, one value per module: float64 on the CPU, shape (modules,)."""

    unit_sq: torch.Tensor  # S1
    mean_sq: torch.Tensor  # S2
    num_units: int  # K
    variance: torch.Tensor  # phi by the estimator in use; NaN where there was no gradient


def pairwise_moments(unit_sq: torch.Tensor, mean_sq: torch.Tensor, num_units: int) -> Moments:
    """Moments with the variance over all pairs of units.

    >>> pairwise_moments(torch.tensor([2.0]), torch.tensor([1.0]), 2).variance.tolist()
    [1.0]
    """
    variance = pairwise_variance(unit_sq, mean_sq, num_units)
    return Moments(unit_sq, mean_sq, num_units, variance)


NOT_SEEN = (
    "AGVM did not see the averaged gradient: call AGVMHook.after_backward() (AGVM.backward_done()) "
    "between backward() and clipping or optimizer.step(), as Detectron2's SimpleTrainer does, or "
    "train in DistributedDataParallel with its communication hook free."
)


class GradientTap:
    """Measures the backward passes of one iteration: `start`, the passes, `collect`."""

    def __init__(
        self,
        modules: Modules,
        precondition: Precondition | None = None,
        group: dist.ProcessGroup | None = None,
    ):
        self.modules, self.precondition, self.group = modules, precondition, group
        self.device = next(iter(modules.values()))[0].device
        self.workers = dist.get_world_size(group) if dist.is_initialized() else 1
        self.measuring = self.seen = self.accumulated = False
        self._handles: list[Any] = []

    @property
    def params(self) -> list[nn.Parameter]:
        """Those of all modules."""
        return [p for params in self.modules.values() for p in params]

    def norms(self) -> ModuleNorms:
        """Empty, for one gradient of the whole model."""
        return ModuleNorms(self.modules, self.precondition)

    def start(self) -> None:
        """Measure the coming backward pass(es)."""
        self.stop()
        self.measuring, self.seen, self.accumulated = True, False, False
        self._unchecked = {params[0] for params in self.modules.values()}
        self._handles = [self.leaf(p).register_hook(self._check(p)) for p in self._unchecked]

    def leaf(self, param: nn.Parameter) -> torch.Tensor:
        """What the backward pass gives the parameter's gradient to."""
        return param

    def _check(self, param: nn.Parameter) -> Callable[[torch.Tensor], None]:
        """A hook that runs before a gradient is added to `param.grad`, empty in a first pass."""

        def check(grad: torch.Tensor) -> None:
            self.seen = True
            if param in self._unchecked:
                self._unchecked.remove(param)
                before = param.grad
                self.accumulated |= before is not None and bool(local_part(before).any())

        return check

    def unit_done(self, weight: float) -> None:
        """A backward pass ended, whose gradient entered this worker's average as weight * u."""

    def average_done(self) -> None:
        """`.grad` holds the average, before clipping and unscaling."""

    def stop(self) -> None:
        """Do not measure any more; what was not collected is dropped at the next `start`."""
        self.measuring = False
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def local(self) -> tuple[torch.Tensor, int]:
        """This worker's rows of squared norms, shape (rows, modules), and its number of units."""
        raise NotImplementedError

    def moments(self, rows: torch.Tensor, num_units: int) -> Moments:
        """From the workers' mean of the rows, and the number of all units."""
        return pairwise_moments(rows[0], rows[1], num_units)

    @torch.no_grad()
    def collect(self) -> Moments | None:
        """Moments over all workers, with the same bits in each, so that all decide alike; None
        where a worker's gradients were added to older ones, or where none were averaged.

        One all-reduce of 2 * modules + 1 float64 (`split`: 3 * modules + 1) and one host sync.
        """
        self.stop()
        rows, num_units = self.local()
        count = torch.nan if self.accumulated else num_units
        numbers = torch.cat([rows.flatten(), rows.new_tensor([count])])
        if self.workers > 1:
            dist.all_reduce(numbers, group=self.group)
        numbers = numbers.cpu()
        if not numbers[-1] > 0:
            return None
        return self.moments(numbers[:-1].view(rows.shape) / self.workers, int(numbers[-1]))


class BucketTap(GradientTap):
    """One unit per worker: measures DDP's buckets as they become ready, overlapped with backward.

    A communication hook sees each flat bucket before averaging (S1) and its future after (S2), so
    clipping and loss scaling come later and both moments have one scale. Steps that are not
    measured do just what DDP does without a hook.

    Args:
        inner: the communication hook to run; plain averaging by default.

    Raises:
        RuntimeError: the model has a communication hook already.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        modules: Modules,
        precondition: Precondition | None = None,
        inner: CommHook | None = None,
    ):
        super().__init__(modules, precondition, model.process_group)
        self.inner = inner
        model.register_comm_hook(self, _comm_hook)

    def start(self) -> None:
        self._unit, self._mean = self.norms(), self.norms()
        self._averaged = False
        super().start()

    def average(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """What DDP does without a hook, or the inner hook."""
        if self.inner is not None:
            state, hook = self.inner
            return hook(state, bucket)
        # DDP itself multiplies by 1/W; div_ would differ in the last bit for W = 3.
        buffer = bucket.buffer().mul_(1.0 / self.workers)
        work = dist.all_reduce(buffer, group=self.group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    @torch.no_grad()
    def measured_average(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """`average`, with the bucket measured before and after it."""
        self._averaged = True  # not in a pass under no_sync()
        # Buckets are rebuilt after the first step: go by parameter, not by position.
        params = bucket.parameters()
        start = bucket.buffer().storage_offset()
        views = [(g.size(), g.stride(), g.storage_offset() - start) for g in bucket.gradients()]

        @torch.no_grad()
        def measure(norms: ModuleNorms, future: torch.futures.Future) -> torch.Tensor:
            flat = future.value()
            flat = flat[0] if isinstance(flat, (list, tuple)) else flat
            offset = flat.storage_offset()
            norms.add(params, [flat.as_strided(s, t, offset + o) for s, t, o in views])
            return flat

        self.measure_units(bucket, measure)
        return self.average(bucket).then(functools.partial(measure, self._mean))

    def measure_units(self, bucket: dist.GradBucket, measure: Callable) -> None:
        """Measure this worker's own gradients; `measure` does so for a copy of the bucket."""
        self._unit.add(bucket.parameters(), bucket.gradients())

    def local(self) -> tuple[torch.Tensor, int]:
        rows = [self._unit.total(self.device), self._mean.total(self.device)]
        return torch.stack(rows), int(self._averaged)


def _comm_hook(tap: BucketTap, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    return tap.measured_average(bucket) if tap.measuring else tap.average(bucket)


class TensorTap(GradientTap):
    """One unit per micro-batch: parameter hooks see each backward pass's own gradient.

    Works with one worker and where DDP's communication hook is taken. One small kernel per
    parameter and pass, on measured steps only. Reentrant activation checkpointing gives a parameter
    that is used several times as many gradients; their sum is then kept from one to the next.
    """

    def __init__(
        self,
        modules: Modules,
        precondition: Precondition | None = None,
        group: dist.ProcessGroup | None = None,
    ):
        super().__init__(modules, precondition, group)
        self._several: set[nn.Parameter] = set()

    def start(self) -> None:
        super().start()
        self._unit_sq = torch.zeros(len(self.modules), dtype=torch.float64, device=self.device)
        self._mean_sq: torch.Tensor | None = None
        self._num_units = 0
        self._begin_unit()
        self._handles += [
            self.leaf(p).register_hook(functools.partial(self._add, p)) for p in self.params
        ]

    def _begin_unit(self) -> None:
        self._unit, self._sums = self.norms(), dict[nn.Parameter, torch.Tensor | None]()

    @torch.no_grad()
    def _add(self, param: nn.Parameter, grad: torch.Tensor) -> None:
        if param in self._sums:
            before = self._sums[param]
            if before is None:  # not expected: the first unit's is in `.grad`, another's is lost
                before = None if self._num_units else self.leaf(param).grad
            grad = grad + (torch.nan if before is None else before)
            self._several.add(param)
        self._sums[param] = grad.clone() if param in self._several else None
        self.add_unit(param, grad)

    def add_unit(self, param: nn.Parameter, grad: torch.Tensor) -> None:
        """Measure a parameter's gradient of one backward pass."""
        self._unit.add([param], [grad])

    @torch.no_grad()
    def unit_done(self, weight: float = 1.0) -> None:
        # Weighting S1 alike, sum_k w_k |u_k|^2, keeps S1 - S2 = (K - 1) tr(Sigma)/batch in
        # expectation for micro-batches of unequal size.
        self._unit_sq += self._unit.total(self.device) / weight
        self._num_units += 1
        self._begin_unit()

    @torch.no_grad()
    def average_done(self) -> None:
        if not self._num_units:  # a training loop without micro-batches
            self.unit_done()
        grads = {p: local_part(p.grad) for p in self.params if p.grad is not None}
        self._mean_sq = self.norms().add([*grads], [*grads.values()]).total(self.device)

    def local(self) -> tuple[torch.Tensor, int]:
        if self._mean_sq is None:
            raise RuntimeError(NOT_SEEN)
        return torch.stack([self._unit_sq, self._mean_sq]), self._num_units
