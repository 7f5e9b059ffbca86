"""Gradients -> the two numbers that each module needs, over all workers.

S1, the mean squared norm of the single gradients, must be seen before DDP averages them, S2 after.
Only squared norms are kept and sent. The paper's estimator, which needs more, is in `split.py`.
"""

from __future__ import annotations
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

ENGINE: Any = getattr(torch.autograd.Variable, "_execution_engine", None)  # not public


class Moments(NamedTuple):
    """One measurement, one value per module: float64 on the CPU, shape (modules,)."""

    unit_sq: torch.Tensor  # S1
    mean_sq: torch.Tensor  # S2
    num_units: int  # K
    variance: torch.Tensor  # phi by the estimator in use; NaN where there was no gradient

    def with_model(self) -> tuple[torch.Tensor, torch.Tensor]:
        """S1 and S2 of each module, and last of all together: shape (modules + 1,)."""
        one, other = (torch.cat([s, s.sum(0, keepdim=True)]) for s in (self.unit_sq, self.mean_sq))
        return one, other


def averaged(old: torch.Tensor, new: torch.Tensor, momentum: float) -> torch.Tensor:
    """The moving average with `new` taken in; as it was where that is not finite."""
    return torch.where(new.isfinite(), momentum * old + (1 - momentum) * new, old)


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
    "train in DistributedDataParallel, without micro-batches."
)


def _trainable(params: list[nn.Parameter]) -> list[nn.Parameter]:
    """Without those that were frozen while training."""
    return [p for p in params if p.requires_grad]


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
        self._unchecked = {p for ps in self.modules.values() for p in _trainable(ps)[:1]}
        for param in self._unchecked:
            hook = functools.partial(self._check, param)
            self._handles.append(self.leaf(param).register_hook(hook))

    def leaf(self, param: nn.Parameter) -> torch.Tensor:
        """What the backward pass gives the parameter's gradient to."""
        return param

    def _check(self, param: nn.Parameter, grad: torch.Tensor) -> None:
        """Runs before a gradient is added to `param.grad`, which is empty in a first pass."""
        self.seen = True
        if param in self._unchecked:
            self._unchecked.remove(param)
            before = param.grad
            self.accumulated |= before is not None and bool(local_part(before).any())

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
        where a worker's gradients were added to older ones, none were averaged, or there is only
        one.

        One all-reduce of 2 * modules + 1 float64 (`split`: 3 * modules + 1) and one host sync.
        """
        self.stop()
        rows, num_units = self.local()
        count = torch.nan if self.accumulated else num_units
        numbers = torch.cat([rows.flatten(), rows.new_full((1,), count)])
        if self.workers > 1:
            dist.all_reduce(numbers, group=self.group)
        numbers = numbers.cpu()
        if not numbers[-1] > 1:
            return None
        return self.moments(numbers[:-1].view(rows.shape) / self.workers, int(numbers[-1]))


class TensorTap(GradientTap):
    """One unit per worker, or per micro-batch: parameter hooks see each backward pass's own
    gradient, before DDP averages it. DDP itself stays as it is.

    One small kernel per parameter and pass, on measured steps only. Reentrant activation
    checkpointing gives a parameter that is used several times as many gradients; their sum is then
    kept from one to the next.

    Args:
        ddp: where one backward pass makes a step, its end is seen here, and no one need tell, as
            far as this torch has a callback for it.
    """

    def __init__(
        self,
        modules: Modules,
        precondition: Precondition | None = None,
        group: dist.ProcessGroup | None = None,
        ddp: DistributedDataParallel | None = None,
    ):
        super().__init__(modules, precondition, group)
        self.ddp = ddp if hasattr(ENGINE, "queue_callback") else None
        self._several: set[nn.Parameter] = set()

    def start(self) -> None:
        super().start()
        self._unit_sq = torch.zeros(len(self.modules), dtype=torch.float64, device=self.device)
        self._mean_sq: torch.Tensor | None = None
        self._num_units = 0
        self._waiting = False  # for the end of a backward pass
        self._begin_unit()
        self._handles += [
            self.leaf(p).register_hook(functools.partial(self._add, p))
            for p in _trainable(self.params)
        ]

    def _begin_unit(self) -> None:
        self._unit, self._sums = self.norms(), dict[nn.Parameter, torch.Tensor | None]()
        self._before = dict[nn.Parameter, tuple[int, int]]()

    @torch.no_grad()
    def _add(self, param: nn.Parameter, grad: torch.Tensor | None) -> None:
        if self.ddp is not None and self.ddp.require_backward_grad_sync and not self._waiting:
            self._waiting = True
            # Again from there: it then comes after DDP's own, which ends the averaging.
            _at_the_end_of_backward(lambda: _at_the_end_of_backward(self._averaged))
        if grad is None:  # of a loss that was left out
            return
        # Where nothing was added to `.grad` since the last gradient, that was of autograd.grad().
        held = self.leaf(param).grad
        mark = (-1, 0) if held is None else (id(held), held._version)
        if self._before.get(param, mark) != mark:
            before = self._sums[param]
            if before is None:  # not expected: the first unit's is in `.grad`, another's is lost
                before = None if self._num_units else held
            grad = grad + (torch.nan if before is None else before)
            self._several.add(param)
        self._before[param] = mark
        self._sums[param] = grad.clone() if param in self._several else None
        self.add_unit(param, grad)

    def add_unit(self, param: nn.Parameter, grad: torch.Tensor) -> None:
        """Measure a parameter's gradient of one backward pass."""
        self._unit.add([param], [grad])

    def _averaged(self) -> None:
        self._waiting = False
        if self.measuring:
            self._measure_average()

    @torch.no_grad()
    def _measure_average(self) -> None:
        norms = self.norms()
        for params in self.modules.values():  # one by one: Adam's needs a copy of what it measures
            grads = {p: local_part(p.grad) for p in params if p.grad is not None}
            norms.add([*grads], [*grads.values()])
        self._mean_sq = norms.total(self.device)

    @torch.no_grad()
    def unit_done(self, weight: float = 1.0) -> None:
        # Weighting S1 alike, sum_k w_k |u_k|^2, keeps S1 - S2 = (K - 1) tr(Sigma)/batch in
        # expectation for micro-batches of unequal size.
        self._unit_sq += self._unit.total(self.device) / weight
        self._num_units += 1
        self._begin_unit()

    def average_done(self) -> None:
        if self.ddp is None:
            self._measure_average()

    def local(self) -> tuple[torch.Tensor, int]:
        if self._mean_sq is None:
            if self.ddp is None:
                raise RuntimeError(NOT_SEEN)
            return torch.stack([self._unit_sq] * 2), 0  # all passes were under no_sync()
        if not self._num_units:  # a training loop without micro-batches
            self.unit_done()
        return torch.stack([self._unit_sq, self._mean_sq]), self._num_units


def _at_the_end_of_backward(function: Callable[[], None]) -> None:
    """Call it when the running backward pass is over, as DDP and FSDP do for themselves."""
    ENGINE.queue_callback(function)
