"""Gradients -> the two numbers a module needs; the only file that knows torch.distributed.

S1, the mean squared norm of the single gradients, must be seen before DDP averages them, S2 after.
Only squared norms leave this file, so no gradient is sent twice and none is kept.
"""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# A CPU's float32 norm loses digits over millions of elements (5e-3 at 40 M); blocks of this size
# combined in float64 are good to 1e-8 and no slower. CUDA's multi-tensor norm has its own blocks.
BLOCK = 4096

Modules = dict[str, list[nn.Parameter]]
Precondition = Callable[[nn.Parameter, torch.Tensor], torch.Tensor]


class Moments(NamedTuple):
    """The numbers of one measurement, float64 on the CPU, one a module."""

    unit_sq: torch.Tensor  # S1
    mean_sq: torch.Tensor  # S2
    num_units: int  # K
    # `split` only: |a|^2 and |b|^2 of the halves' means, and the first half's share of the batch.
    # The halves are then the units: K = 2.
    halves: tuple[torch.Tensor, torch.Tensor] | None = None
    share: float = 0.5


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`'s elements in one dimension, in any order; a view of any dense tensor."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).view(-1)
    return tensor.reshape(-1)


def _multi_norm(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    try:  # one fused kernel on CUDA; not public, so with the public form beside it
        return list(torch._foreach_norm(tensors))
    except (AttributeError, RuntimeError):
        return [torch.linalg.vector_norm(t) for t in tensors]


def block_norms(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """For each tensor, norms of its blocks (1-D, float32 or wider): |t|^2 = sum of squares."""
    norms: list[list[torch.Tensor]] = [[] for _ in tensors]
    small, owner = [], []
    for i, tensor in enumerate(tensors):
        flat = _flat(tensor)
        if flat.dtype in (torch.float16, torch.bfloat16):
            flat = flat.float()  # squares would overflow
        rows = flat.numel() // BLOCK if flat.device.type == "cpu" else 0
        if rows:
            head = flat[: rows * BLOCK].view(rows, BLOCK)
            norms[i].append(torch.linalg.vector_norm(head, dim=1))
        if flat.numel() > rows * BLOCK:
            small.append(flat[rows * BLOCK :])
            owner.append(i)
    if small:  # an empty list raises
        for i, norm in zip(owner, _multi_norm(small), strict=True):
            norms[i].append(norm.view(1))
    return norms


class ModuleSums:
    """Squared norm of each module's gradient, gathered piece by piece, summed once at the end.

    By parameter and in the modules' order, so that the sum's bits depend neither on the order in
    which gradients become ready nor on how DDP lays out its buckets, which a resumed run may do
    differently.
    """

    def __init__(self, modules: Modules):
        self._modules = modules
        self._norms: dict[nn.Parameter, list[torch.Tensor]] = {}

    def add(self, params: list[nn.Parameter], grads: list[torch.Tensor]) -> None:
        # Futures call back on other threads, but each for parameters of its own.
        for param, norms in zip(params, block_norms(grads), strict=True):
            self._norms[param] = norms

    def total(self, device: torch.device) -> torch.Tensor:
        """float64, shape (modules,)."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        found = [
            [norm for param in params for norm in self._norms.get(param, ())]
            for params in self._modules.values()
        ]
        return torch.stack([torch.cat(n).double().square().sum() if n else zero for n in found])


class _Tap:
    """What all taps share: arm for one step, then hand out its moments."""

    def __init__(self, modules: Modules, precondition: Precondition | None, group=None):
        self.modules = modules
        self.params = [p for params in modules.values() for p in params]
        self.num_modules = len(modules)
        self.device = self.params[0].device
        self.group = group
        self.workers = dist.get_world_size(group) if dist.is_initialized() else 1
        self.precondition = precondition
        self.share: float | None = None  # of the first half, for `split`
        self.measuring = False

    def sums_of(self, params, grads) -> ModuleSums:
        sums = ModuleSums(self.modules)
        self.add_to(sums, params, grads)
        return sums

    def add_to(self, sums: ModuleSums, params, grads) -> None:
        params, grads = list(params), list(grads)
        if self.precondition is not None:
            grads = [self.precondition(p, g) for p, g in zip(params, grads, strict=True)]
        sums.add(params, grads)

    def start(self) -> None:
        """Measure the coming backward pass(es)."""
        self.measuring = True

    def unit_done(self, weight: float) -> None:
        """A backward pass ended, whose gradient entered this worker's average as weight * u."""

    def average_done(self) -> None:
        """`.grad` holds the average, before clipping and unscaling."""

    def stop(self) -> None:
        self.measuring = False

    def _local(self) -> tuple[torch.Tensor, int]:
        """This worker's (S1, S2), or (|a|^2, |b|^2, S2) for `split`, and its number of units."""
        raise NotImplementedError

    @torch.no_grad()
    def collect(self) -> Moments:
        """Moments over all workers: one all-reduce, of 2 * modules + 1 float64 (`split`: 3), and
        one host sync. Every worker gets the same bits, so that all decide alike.
        """
        self.stop()
        rows, num_units = self._local()
        count = torch.tensor([float(num_units)], dtype=torch.float64, device=self.device)
        numbers = torch.cat([rows.flatten(), count])
        if self.workers > 1:
            dist.all_reduce(numbers, group=self.group)
        numbers = numbers.cpu()
        rows = numbers[:-1].view(-1, self.num_modules) / self.workers
        if self.share is None:
            return Moments(rows[0], rows[1], int(numbers[-1]))
        sq_a, sq_b, mean_sq = rows
        unit_sq = self.share * sq_a + (1 - self.share) * sq_b
        return Moments(unit_sq, mean_sq, 2, (sq_a, sq_b), self.share)


class BucketTap(_Tap):
    """One unit a worker: measures DDP's buckets as they become ready, overlapped with backward.

    A communication hook sees each flat bucket before averaging (S1) and its future after (S2), so
    clipping and loss scaling come later and both moments have one scale. Steps that are not
    measured do just what DDP does without a hook. With `split`, each bucket is also reduced within
    each half of the workers, on measured steps only; with an odd number of workers the first half
    has one more.

    Args:
        inner: (state, hook), the communication hook to run; plain averaging by default.

    Raises:
        RuntimeError: the model has a communication hook already.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        modules: Modules,
        precondition: Precondition | None = None,
        split: bool = False,
        inner: tuple | None = None,
    ):
        super().__init__(modules, precondition, model.process_group)
        self.inner = inner
        if split:
            ranks = dist.get_process_group_ranks(self.group)
            cut = (self.workers + 1) // 2
            self.share = cut / self.workers
            halves = ranks[:cut], ranks[cut:]
            groups = [dist.new_group(half, use_local_synchronization=True) for half in halves]
            self.side = int(dist.get_rank() not in halves[0])
            self.half, self.half_group = halves[self.side], groups[self.side]
        self._reset()
        model.register_comm_hook(self, _bucket_hook)

    def _reset(self) -> None:
        self._unit = ModuleSums(self.modules)
        self._mean = ModuleSums(self.modules)
        self._pending: list[torch.futures.Future] = []

    def start(self) -> None:
        self._reset()
        super().start()

    def average(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        if self.inner is not None:
            state, hook = self.inner
            return hook(state, bucket)
        # DDP itself multiplies by 1/W; div_ would differ in the last bit for W = 3.
        buffer = bucket.buffer().mul_(1.0 / self.workers)
        work = dist.all_reduce(buffer, group=self.group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    @torch.no_grad()
    def before(self, bucket: dist.GradBucket) -> Callable:
        """Measure this worker's gradients; return what measures the average of the bucket."""
        # Buckets are rebuilt after the first step: go by parameter, not by position.
        params, grads = bucket.parameters(), bucket.gradients()
        start = bucket.buffer().storage_offset()
        views = [(g.size(), g.stride(), g.storage_offset() - start) for g in grads]

        @torch.no_grad()
        def measure(sums: ModuleSums, future: torch.futures.Future) -> torch.Tensor:
            flat = future.value()
            flat = flat[0] if isinstance(flat, (list, tuple)) else flat
            offset = flat.storage_offset()
            parts = [flat.as_strided(size, stride, offset + o) for size, stride, o in views]
            self.add_to(sums, params, parts)
            return flat

        if self.share is None or len(self.half) == 1:
            self.add_to(self._unit, params, grads)
        else:
            copy = bucket.buffer().clone()
            work = dist.reduce(copy, self.half[0], group=self.half_group, async_op=True)
            root = dist.get_rank() == self.half[0]

            def reduced(future: torch.futures.Future) -> None:
                if root:
                    measure(self._unit, future)  # its result, the copy, is not to be kept

            self._pending.append(work.get_future().then(reduced))
        return functools.partial(measure, self._mean)

    def _local(self) -> tuple[torch.Tensor, int]:
        torch.futures.wait_all(self._pending)
        unit_sq, mean_sq = self._unit.total(self.device), self._mean.total(self.device)
        if self.share is None:
            return torch.stack([unit_sq, mean_sq]), 1
        halves = torch.zeros(2, self.num_modules, dtype=torch.float64, device=self.device)
        halves[self.side] = unit_sq * self.workers / len(self.half) ** 2  # 0 but on the half's root
        return torch.cat([halves, mean_sq[None]]), 1


def _bucket_hook(tap: BucketTap, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    after = tap.before(bucket) if tap.measuring else None
    future = tap.average(bucket)
    return future.then(after) if after else future


class TensorTap(_Tap):
    """One unit a micro-batch: parameter hooks see each backward pass's own gradient.

    Works with one worker and where DDP's communication hook is taken. One small kernel a parameter
    and pass, on measured steps only.
    """

    def __init__(self, modules: Modules, precondition: Precondition | None = None, group=None):
        super().__init__(modules, precondition, group)
        self._handles: list = []
        self._reset()

    def _reset(self) -> None:
        self._unit = ModuleSums(self.modules)
        self._unit_sq = torch.zeros(self.num_modules, dtype=torch.float64, device=self.device)
        self._mean_sq: torch.Tensor | None = None
        self._num_units = 0

    def start(self) -> None:
        self.stop()
        self._reset()
        super().start()
        self._handles = [p.register_hook(functools.partial(self._see, p)) for p in self.params]

    def stop(self) -> None:
        super().stop()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def _see(self, param: nn.Parameter, grad: torch.Tensor) -> None:
        self.add_to(self._unit, [param], [grad])

    @torch.no_grad()
    def unit_done(self, weight: float = 1.0) -> None:
        # Weighting S1 alike, sum_k w_k |u_k|^2, keeps S1 - S2 = (K - 1) tr(Sigma)/batch in
        # expectation for micro-batches of unequal size.
        self._unit_sq += self._unit.total(self.device) / weight
        self._unit = ModuleSums(self.modules)
        self._num_units += 1

    @torch.no_grad()
    def average_done(self) -> None:
        if not self._num_units:  # a training loop without micro-batches
            self.unit_done()
        params = [p for p in self.params if p.grad is not None]
        self._mean_sq = self.sums_of(params, [p.grad for p in params]).total(self.device)

    def _local(self) -> tuple[torch.Tensor, int]:
        if self._mean_sq is None:
            raise RuntimeError(NOT_SEEN)
        result = torch.stack([self._unit_sq, self._mean_sq]), self._num_units
        self._reset()
        return result


class HalvesTap(_Tap):
    """`split` for the micro-batches of one process: the first half of them against the second.

    Keeps the first half's gradient from the middle of a measured step to its end.
    """

    def __init__(
        self, modules: Modules, micro_batches: int, precondition: Precondition | None = None
    ):
        super().__init__(modules, precondition)
        self.cut = (micro_batches + 1) // 2
        self._reset()

    def _reset(self) -> None:
        self._first: dict[nn.Parameter, torch.Tensor] | None = None
        self._rows: torch.Tensor | None = None
        self._num_units, self.share = 0, 0.0

    def start(self) -> None:
        self._reset()
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
        if self._first is None or self._num_units <= self.cut:
            raise RuntimeError(
                "AGVM.ESTIMATOR split compares micro-batches, but of this step it saw "
                f"{self._num_units}: give AGVMHook(micro_batches=) their number and call "
                "after_micro_batch() after each, as MicroBatchTrainer does."
            )
        params = [p for p in self.params if p.grad is not None]
        first, grads = self._first, [p.grad for p in params]
        zero = torch.zeros((), device=self.device)
        halves = [
            [first.get(p, zero).expand_as(p) / self.share for p in params],
            [
                (g - first.get(p, zero)) / (1 - self.share)
                for p, g in zip(params, grads, strict=True)
            ],
            grads,
        ]
        self._rows = torch.stack([self.sums_of(params, half).total(self.device) for half in halves])

    def _local(self) -> tuple[torch.Tensor, int]:
        if self._rows is None:
            raise RuntimeError(NOT_SEEN)
        return self._rows, self._num_units


NOT_SEEN = (
    "AGVM did not see the averaged gradient: call AGVMHook.after_backward() between backward() and "
    "clipping or optimizer.step(), as Detectron2's SimpleTrainer does."
)


def build_tap(
    model: nn.Module,
    modules: Modules,
    micro_batches: int = 1,
    precondition: Precondition | None = None,
    split: bool = False,
    inner: tuple | None = None,
) -> _Tap:
    """The cheapest tap that sees every unit: K = workers * micro_batches.

    Raises:
        ValueError: `split` with several workers needs DDP and its communication hook.
    """
    if not isinstance(model, DistributedDataParallel):
        if split and micro_batches < 2:
            raise ValueError(
                "AGVM.ESTIMATOR split compares halves of the workers, but the model given to "
                "AGVMHook is not inside DistributedDataParallel."
            )
        return (
            HalvesTap(modules, micro_batches, precondition)
            if split
            else TensorTap(modules, precondition)
        )
    if split or micro_batches == 1:
        try:
            return BucketTap(model, modules, precondition, split, inner)
        except RuntimeError as error:  # only one hook fits, and fp16_compression=True takes it
            if split:
                raise ValueError(
                    "AGVM.ESTIMATOR split needs DDP's communication hook, which is taken: give the "
                    "hook to AGVMHook(comm_hook=(state, hook)) instead, or use pairwise."
                ) from error
            logging.getLogger("detectron2.agvm_d2").info(
                "AGVM: DDP's communication hook is taken; measuring with parameter hooks instead."
            )
    elif inner is not None:
        model.register_comm_hook(*inner)
    return TensorTap(modules, precondition, model.process_group)


def adam_precondition(optimizer: torch.optim.Optimizer) -> Precondition:
    """u -> u/(sqrt(v) + eps) with the stored second moment v, the same for all units.

    The map is then linear, so S1 and S2 stay consistent. A parameter without a state counts as 0.
    """
    eps = {p: group["eps"] for group in optimizer.param_groups for p in group["params"]}

    def precondition(param: nn.Parameter, grad: torch.Tensor) -> torch.Tensor:
        v = optimizer.state.get(param, {}).get("exp_avg_sq")
        return torch.zeros_like(grad) if v is None else grad / (v.sqrt().add_(eps[param]))

    return precondition
