"""The paper's estimator, 1 - cos of two halves of the gradients; unread by who uses `pairwise`.

Of workers: each bucket is also reduced within each half, on measured steps. Of one process's
micro-batches: the first half's gradient is kept from the middle of a measured step to its end.
"""

# No `from __future__ import annotations` here: DDP compares the annotation of a communication
# hook's `bucket` with the class itself, and would refuse a string.
import functools
from collections.abc import Callable
from typing import Any
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .modules import uncompiled
from .moments import NOT_SEEN, CommHook, GradientTap, Moments
from .norms import ModuleNorms, Modules
from .precondition import Precondition
from .variance import split_variance


def split_moments(rows: torch.Tensor, share: float) -> Moments:
    """From rows |a|^2, |b|^2, |mean|^2 of two halves, the first of them `share` of the batch; shape
    (3, modules). The halves are the units: K = 2."""
    sq_a, sq_b, mean_sq = rows
    unit_sq = share * sq_a + (1 - share) * sq_b
    return Moments(unit_sq, mean_sq, 2, split_variance(sq_a, sq_b, mean_sq, share))


class SplitBucketTap(GradientTap):
    """The first half of the workers against the second; of an odd number it has one more.

    A communication hook sees each of DDP's flat buckets before averaging and its future after, so
    clipping and loss scaling come later and all moments have one scale. Steps that are not measured
    do just what DDP does without a hook.

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
        ranks = dist.get_process_group_ranks(self.group)
        cut = (self.workers + 1) // 2
        self.share = cut / self.workers
        halves = ranks[:cut], ranks[cut:]
        # Any: that of the other half is a placeholder.
        groups: list[Any] = [dist.new_group(h, use_local_synchronization=True) for h in halves]
        self.side = int(dist.get_rank() not in halves[0])
        self.half, self.half_group = halves[self.side], groups[self.side]

    def start(self) -> None:
        self._half, self._mean = self.norms(), self.norms()
        self._averaged = False
        self._pending: list[torch.futures.Future] = []
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
        """`average`, with the half's sum measured before it and the average after it."""
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

        self.measure_half(bucket, measure)
        return self.average(bucket).then(functools.partial(measure, self._mean))

    def measure_half(self, bucket: dist.GradBucket, measure: Callable) -> None:
        """Measure the sum of this half's gradients on its first worker; `measure` does so for what
        a future holds, a copy of the bucket."""
        params = bucket.parameters()
        if len(self.half) == 1:
            self._half.add(params, bucket.gradients())
            return
        copy = bucket.buffer().clone()
        work = dist.reduce(copy, self.half[0], group=self.half_group, async_op=True)
        assert work is not None  # it is outside the group only
        root = dist.get_rank() == self.half[0]

        def reduced(future: torch.futures.Future) -> list[torch.Tensor]:
            if not root:
                return []
            measure(self._half, future)
            # On CUDA this runs on a stream of its own, and who waits for the future waits for what
            # it returns. So not None; and not the copy, which would be kept.
            return self._half.of(params)

        self._pending.append(work.get_future().then(reduced))

    def local(self) -> tuple[torch.Tensor, int]:
        for future in self._pending:
            future.wait()
        mean_sq = self._mean.total(self.device)
        halves = mean_sq.new_zeros(2, len(mean_sq))
        # 0 but on the half's root.
        halves[self.side] = self._half.total(self.device) * self.workers / len(self.half) ** 2
        return torch.cat([halves, mean_sq[None]]), int(self._averaged)

    def moments(self, rows: torch.Tensor, num_units: int) -> Moments:
        return split_moments(rows, self.share)


def _comm_hook(tap: SplitBucketTap, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    return tap.measured_average(bucket) if tap.measuring else tap.average(bucket)


class SplitMicroBatchTap(GradientTap):
    """The first half of one process's micro-batches against the others."""

    def __init__(
        self, modules: Modules, micro_batches: int, precondition: Precondition | None = None
    ):
        super().__init__(modules, precondition)
        self.cut = (micro_batches + 1) // 2

    def start(self) -> None:
        self._first: dict[nn.Parameter, torch.Tensor] | None = None
        self._rows: torch.Tensor | None = None
        self._num_units, self.share = 0, 0.0
        super().start()

    @torch.no_grad()
    def unit_done(self, weight: float) -> None:
        self._num_units += 1
        if self._num_units <= self.cut:
            self.share += weight
        if self._num_units == self.cut:
            self._first = {p: p.grad.clone() for p in self.params if p.grad is not None}

    @torch.no_grad()
    def average_done(self) -> None:
        if self._first is None or self._num_units <= self.cut:  # a short batch
            self._rows, self._num_units = torch.zeros(3, len(self.modules)), 0
            return
        grad_of = {p: p.grad for p in self.params if p.grad is not None}
        grads, zero = list(grad_of.values()), torch.zeros((), device=self.device)
        first = [self._first.get(p, zero).expand_as(p) for p in grad_of]
        second = [g - f for g, f in zip(grads, first, strict=True)]
        rows = [f / self.share for f in first], [s / (1 - self.share) for s in second], grads
        norms = [self.norms().add([*grad_of], row).total(self.device) for row in rows]
        self._rows, self._first = torch.stack(norms), None

    def local(self) -> tuple[torch.Tensor, int]:
        if self._rows is None:
            raise RuntimeError(NOT_SEEN)
        return self._rows, self._num_units

    def moments(self, rows: torch.Tensor, num_units: int) -> Moments:
        return split_moments(rows, self.share)


def build_split_tap(
    model: nn.Module,
    modules: Modules,
    micro_batches: int,
    precondition: Precondition | None,
    inner: CommHook | None,
) -> GradientTap:
    """The tap for the halves that this model has: of workers, or of micro-batches.

    Raises:
        ValueError: neither micro-batches nor DDP with a free communication hook.
    """
    model = uncompiled(model)
    ddp = model if isinstance(model, DistributedDataParallel) else None
    if ddp is None or dist.get_world_size(ddp.process_group) == 1:
        if micro_batches < 2:
            raise ValueError(
                "AGVM.ESTIMATOR split compares halves of the workers, but the model given to "
                "AGVMHook is not inside DistributedDataParallel."
            )
        if ddp is not None and inner is not None:
            ddp.register_comm_hook(*inner)
        return SplitMicroBatchTap(modules, micro_batches, precondition)
    try:
        return SplitBucketTap(ddp, modules, precondition, inner)
    except RuntimeError as error:
        raise ValueError(
            "AGVM.ESTIMATOR split needs DDP's communication hook, which is taken: give the "
            "hook to AGVMHook(comm_hook=(state, hook)) instead, or use pairwise."
        ) from error
