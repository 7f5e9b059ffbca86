"""Training counted in iterations of the base batch: how far it is, and where its LR schedule."""

from __future__ import annotations
import bisect
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any
import torch

from .moments import averaged
from .settings import AVERAGING_OF_GAIN
from .variance import gain_of, lr_gain

if TYPE_CHECKING:
    from .moments import Moments


class Progress:
    """AdaScale's scale-invariant iterations (Johnson et al. 2020, arXiv 2007.05105): a step counts
    as many steps of the base batch as its gain, from 1 to the ratio of the batches. Each module has
    a gain; the smallest counts, so that no module makes less way than at the base batch.

    >>> from agvm_d2.moments import pairwise_moments
    >>> progress = Progress(modules=1, base_share=1 / 4, momentum=0.5)
    >>> progress.update(pairwise_moments(torch.tensor([4.0]), torch.tensor([1.0]), num_units=4))
    >>> progress.begin()
    >>> progress.count(raised=True)  # all noise: a gain of 4, averaged with the 1 at the start
    >>> progress.iterations
    2.5

    Args:
        modules: how many.
        base_share: images of the base batch over those of an iteration.
        momentum: of the moving average of the gains.
        max_iter: iterations of the base batch after which the schedule ends.
    """

    def __init__(
        self, modules: int, base_share: float, momentum: float, max_iter: int | None = None
    ):
        self.base_share, self.momentum, self.max_iter = base_share, momentum, max_iter
        # Of each module, and of the whole model; as the learning rates, from 1 on.
        self.gains = torch.ones(modules + 1, dtype=torch.float64)
        self.silent = torch.zeros(modules, dtype=torch.bool)  # had no gradient when last measured
        self.iterations = 0.0  # made
        self.possible = 0.0  # with each step's learning rates times its gain
        self.schedulers: list[Any] = []  # those that follow it
        self._counted = True  # this iteration

    @property
    def gain(self) -> float:
        """What one step counts: the smallest module's, of those that have a gradient."""
        found = self.gains[:-1][~self.silent]
        return found.min().item() if len(found) else 1.0

    def update(self, moments: Moments) -> None:
        """Take a measurement in. What is not finite in it changes nothing."""
        units = moments.num_units
        new = lr_gain(*moments.with_model(), num_units=units, base_units=units * self.base_share)
        self.gains = averaged(self.gains, new, self.momentum)
        self.silent = torch.where(moments.unit_sq.isfinite(), moments.unit_sq == 0, self.silent)

    def begin(self) -> None:
        """An iteration begins."""
        self._counted = False
        self._place(self.iterations + 1)  # if it takes no step

    def count(self, raised: bool, possible: bool = True) -> None:
        """The iteration took a step, or ended without one; the first call in it counts.

        Args:
            raised: its learning rates were multiplied by the gain. If not it counts as it would at
                the base batch, 1; so do iterations over which a project accumulates.
            possible: they could have been.
        """
        if not self._counted:
            self._counted = True
            self.iterations += self.gain if raised else 1.0
            self.possible += self.gain if possible else 1.0
            if raised:  # else `begin` has placed them, and they may have stepped since
                self._place(self.iterations)

    def restart(self) -> None:
        """For training that begins anew."""
        self.iterations = self.possible = 0.0

    def follow(self, scheduler: Any) -> None:
        """Let an LR scheduler, stepped after each iteration, stand where training does; ValueError:
        see `check_scheduler`."""
        check_scheduler(scheduler)
        set_position(scheduler, self._position(self.iterations))
        if scheduler not in self.schedulers:
            self.schedulers.append(scheduler)

    def _place(self, iterations: float) -> None:
        for scheduler in self.schedulers:  # its own step, which comes next, adds one
            scheduler.last_epoch = self._position(iterations) - 1

    def _position(self, iterations: float) -> float:
        end = math.inf if self.max_iter is None else self.max_iter
        return min(iterations, end * (1 - 1e-5))  # a few of fvcore's schedules have no end

    def state_dict(self) -> dict:
        return {
            "iterations": self.iterations,
            "possible": self.possible,
            "gains": self.gains.tolist(),
            "silent": self.silent.tolist(),
            "base_share": self.base_share,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from a saved state; with another ratio of the batches, at gains of 1."""
        self.iterations, self.possible = state["iterations"], state["possible"]
        if state["base_share"] == self.base_share:
            self.gains = torch.tensor(state["gains"], dtype=torch.float64)
            self.silent = torch.tensor(state.get("silent", self.silent.tolist()))


def set_position(scheduler: Any, position: float) -> None:
    """Set the learning rates to those that a torch LR scheduler has after `position` steps."""
    scheduler.last_epoch = position - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at the start: "step() before optimizer.step()"
        scheduler.step()


def fit_scheduler(scheduler: Any, position: int) -> None:
    """After an LR scheduler's `load_state_dict`: let it go on where it was saved without AGVM, with
    a learning rate for each group before the split, or with schedule="gain", in which it stood at
    the progress. Otherwise nothing.

    Args:
        position: iterations made.
    """
    groups = scheduler.optimizer.param_groups
    if len(getattr(scheduler, "base_lrs", groups)) != len(groups):
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        scheduler._last_lr = [group["lr"] for group in groups]
    if isinstance(scheduler.last_epoch, float):
        set_position(scheduler, position)


def check_scheduler(scheduler: Any) -> None:
    """See that an LR scheduler's rates follow from its `last_epoch` alone, a whole number or not.

    Raises:
        ValueError: they follow from the rates or steps before, as those of many of torch's do.
    """
    groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", [])
    lrs, before = [group["lr"] for group in groups], dict(vars(scheduler))
    found: list[Any] = [None]

    def at(position: float, factor: float = 1.0) -> list[float]:
        for group, lr in zip(groups, lrs, strict=True):
            group["lr"] = lr * factor
        set_position(scheduler, position)
        return [float(group["lr"]) for group in groups]

    try:
        scheduler._step_count = 3  # some of torch's begin in another way than they go on
        found = [at(1.25)]
        at(1.75)
        found += [at(1.25), at(1.25, 2.0)]
        if scheduler.last_epoch != 1.25 or hasattr(scheduler, "_schedulers"):
            found.append(None)  # it counts elsewhere, or those inside it do, flat at first
    except Exception as error:  # such as a table with a row for each iteration
        found = [error, None]
    finally:
        vars(scheduler).clear()
        vars(scheduler).update(before)
        for group, lr in zip(groups, lrs, strict=True):
            group["lr"] = lr
    if not groups or any(rates != found[0] for rates in found):
        raise ValueError(
            f"AGVM.SCHEDULE gain: the LR scheduler {type(scheduler).__name__} counts iterations "
            "one by one, but progress is no whole number. Use one whose rates follow from "
            "last_epoch: Detectron2's LRMultiplier, with any fvcore ParamScheduler, or torch's "
            "LambdaLR."
        )


def signal_of(images: Iterable[float]) -> float:
    """What `foretell` takes: 1 / noise scale of the module where it is smallest, and so the gain. A
    module whose noise scale is not finite is all noise."""
    return max(1 / max(n, 1e-9) if math.isfinite(n) else 0.0 for n in images)


def foretell(
    signal: Sequence[tuple[float, float]],
    base: int,
    batch: int,
    iterations: int,
    averaging: tuple[int, float] = AVERAGING_OF_GAIN,
) -> int:
    """Iterations at `batch` that count as many as `iterations` at `base`, as `Progress` will count.

    >>> foretell([(0.0, 0.0)], base=16, batch=64, iterations=1000)  # all noise: a gain of 4, soon
    284

    Args:
        signal: (share of training, `signal_of` the modules), in this order; between two of them
            linear, before the first and after the last as there.
        averaging: iterations between measurements, and the momentum of their average.
    """
    shares, values = zip(*signal, strict=True)
    interval, momentum = averaging
    progress, gain, iteration = 0.0, 1.0, 0
    while progress < iterations:
        if iteration % interval == 0:
            new = gain_of(_between(progress / iterations, shares, values), base, batch)
            gain = momentum * gain + (1 - momentum) * new
        progress += gain
        iteration += 1
    return iteration


def _between(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Linear interpolation."""
    i = bisect.bisect(xs, x)
    if i in (0, len(xs)):
        return ys[min(i, len(xs) - 1)]
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])
