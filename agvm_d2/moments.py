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
    """S1 and S2 of each module (float64, CPU, shape (modules,)) and the number K of units."""

    unit_sq: torch.Tensor
    mean_sq: torch.Tensor
    num_units: int


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
    """Squared norm of each module's gradient, gathered piece by piece, summed once at the end."""

    def __init__(self, num_modules: int):
        self._norms: list[list[torch.Tensor]] = [[] for _ in range(num_modules)]

    def add(self, owners: list[int], grads: list[torch.Tensor]) -> None:
        for i, norms in zip(owners, block_norms(grads), strict=True):
            self._norms[i] += norms

    def total(self, device: torch.device) -> torch.Tensor:
        """float64, shape (modules,)."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return torch.stack(
            [torch.cat(n).double().square().sum() if n else zero for n in self._norms]
        )


class _Tap:
    """What both ways of tapping share: arm for one step, then hand out its moments."""

    def __init__(self, modules: Modules, precondition: Precondition | None, group):
        self.params = [p for params in modules.values() for p in params]
        self.owner = {p: i for i, params in enumerate(modules.values()) for p in params}
        self.num_modules = len(modules)
        self.device = self.params[0].device
        self.group = group
        self.workers = dist.get_world_size(group) if dist.is_initialized() else 1
        self.precondition = precondition
        self.measuring = False

    def _measure(self, sums: ModuleSums, params, grads) -> None:
        params, grads = list(params), list(grads)
        if self.precondition is not None:
            grads = [self.precondition(p, g) for p, g in zip(params, grads, strict=True)]
        sums.add([self.owner[p] for p in params], grads)

    def _local(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """This worker's S1 and S2, and its number of units."""
        raise NotImplementedError

    def start(self) -> None:
        """Measure the coming backward pass(es)."""
        self.measuring = True

    def stop(self) -> None:
        self.measuring = False

    def unit_done(self, weight: float) -> None:
        """A backward pass ended."""

    def average_done(self) -> None:
        """`.grad` holds the average."""

    @torch.no_grad()
    def collect(self) -> Moments:
        """Moments over all workers; one all-reduce of 2 * modules + 1 float64 and one host sync.

        Every worker gets the same bits, so that all decide alike.
        """
        self.stop()
        unit_sq, mean_sq, num_units = self._local()
        count = torch.tensor([float(num_units)], dtype=torch.float64, device=self.device)
        numbers = torch.cat([unit_sq, mean_sq, count])
        if self.workers > 1:
            dist.all_reduce(numbers, group=self.group)
        numbers = numbers.cpu()
        unit_sq, mean_sq = numbers[:-1].view(2, -1) / self.workers
        return Moments(unit_sq, mean_sq, int(numbers[-1]))


class BucketTap(_Tap):
    """One unit a worker: measures DDP's buckets as they become ready, overlapped with backward.

    A communication hook sees each flat bucket before averaging (S1) and its future after (S2), so
    clipping and loss scaling come later and both moments have one scale. Steps that are not
    measured do just what DDP does without a hook.

    Raises:
        RuntimeError: the model has a communication hook already.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        modules: Modules,
        precondition: Precondition | None = None,
    ):
        super().__init__(modules, precondition, model.process_group)
        self._reset()
        model.register_comm_hook(self, _bucket_hook)

    def _reset(self) -> None:
        self._unit, self._mean = ModuleSums(self.num_modules), {}

    def start(self) -> None:
        self._reset()
        super().start()

    def average(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        # DDP itself multiplies by 1/W; div_ would differ in the last bit for W = 3.
        buffer = bucket.buffer().mul_(1.0 / self.workers)
        work = dist.all_reduce(buffer, group=self.group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    @torch.no_grad()
    def before(self, bucket: dist.GradBucket) -> Callable:
        """Measure this worker's gradients; return what measures the average of the bucket."""
        # Buckets are rebuilt after the first step: go by parameter, not by position.
        params, grads, index = bucket.parameters(), bucket.gradients(), bucket.index()
        start = bucket.buffer().storage_offset()
        views = [(g.size(), g.stride(), g.storage_offset() - start) for g in grads]
        self._measure(self._unit, params, grads)

        @torch.no_grad()
        def after(future: torch.futures.Future) -> torch.Tensor:
            mean = future.value()
            sums = ModuleSums(self.num_modules)
            offset = mean.storage_offset()
            means = [mean.as_strided(size, stride, offset + o) for size, stride, o in views]
            self._measure(sums, params, means)
            self._mean[index] = sums  # futures may end in any order
            return mean

        return after

    def _local(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        mean_sq = torch.zeros(self.num_modules, dtype=torch.float64, device=self.device)
        for index in sorted(self._mean):
            mean_sq += self._mean[index].total(self.device)
        unit_sq = self._unit.total(self.device)
        self._reset()
        return unit_sq, mean_sq, 1


def _bucket_hook(tap: BucketTap, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    after = tap.before(bucket) if tap.measuring else None
    future = tap.average(bucket)
    return future.then(after) if after else future


class TensorTap(_Tap):
    """One unit a micro-batch: parameter hooks see each backward pass's own gradient.

    Works with one worker and where DDP's communication hook is taken. One small kernel a parameter
    and pass, on measured steps only. Call `unit_done` after each backward pass and `average_done`
    when `.grad` holds the average, before clipping or unscaling.
    """

    def __init__(self, modules: Modules, precondition: Precondition | None = None, group=None):
        super().__init__(modules, precondition, group)
        self._handles: list = []
        self._reset()

    def _reset(self) -> None:
        self._unit = ModuleSums(self.num_modules)
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
        self._measure(self._unit, [param], [grad])

    @torch.no_grad()
    def unit_done(self, weight: float = 1.0) -> None:
        """End a unit whose gradient entered the worker's average as weight * u.

        Weighting S1 alike, sum_k w_k |u_k|^2, keeps S1 - S2 = (K - 1) tr(Sigma)/batch in
        expectation for micro-batches of unequal size.
        """
        self._unit_sq += self._unit.total(self.device) / weight
        self._unit = ModuleSums(self.num_modules)
        self._num_units += 1

    @torch.no_grad()
    def average_done(self) -> None:
        if not self._num_units:  # a training loop without micro-batches
            self.unit_done()
        sums = ModuleSums(self.num_modules)
        params = [p for p in self.params if p.grad is not None]
        self._measure(sums, params, [p.grad for p in params])
        self._mean_sq = sums.total(self.device)

    def _local(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        if self._mean_sq is None:
            raise RuntimeError(
                "AGVM did not see the averaged gradient: call AGVMHook.after_backward() between "
                "backward() and clipping or optimizer.step(), as Detectron2's SimpleTrainer does."
            )
        result = self._unit_sq, self._mean_sq, self._num_units
        self._reset()
        return result


def build_tap(
    model: nn.Module, modules: Modules, micro_batches: int, precondition: Precondition | None
) -> BucketTap | TensorTap:
    """The cheapest tap that sees every unit: K = workers * micro_batches."""
    if not isinstance(model, DistributedDataParallel):
        return TensorTap(modules, precondition)
    if micro_batches == 1:
        try:
            return BucketTap(model, modules, precondition)
        except RuntimeError:  # only one hook fits, and fp16_compression=True takes it
            logging.getLogger("detectron2.agvm_d2").info(
                "AGVM: DDP's communication hook is taken; measuring with parameter hooks instead."
            )
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
