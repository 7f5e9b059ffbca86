"""The moving averages: when to measure, and what factor holds now."""

from __future__ import annotations
from collections.abc import Sequence
import torch

from .moments import Moments
from .rules import Rule
from .variance import noise_scale


class Modulator:
    """LR factor of each module: mu <- a mu + (1 - a) rule(moments) at each measurement.

    >>> from agvm_d2.moments import pairwise_moments
    >>> modulator = Modulator(["fpn"], rule=lambda moments: torch.tensor([3.0]), momentum=0.5)
    >>> modulator.update(pairwise_moments(torch.tensor([2.0]), torch.tensor([1.0]), num_units=2))
    >>> modulator.factors.tolist()
    [2.0]

    Args:
        names: modules, in the order of the moments.
        rule: such as `rules.variance_rule` builds.
        momentum: a, in [0, 1).
        interval: iterations from one measurement to the next.
        start_iter: the first measured iteration; factors are 1 before it.
        stop_iter: from this iteration on nothing is measured and factors are 1 again; -1: never.
    """

    def __init__(
        self,
        names: Sequence[str],
        rule: Rule,
        momentum: float = 0.97,
        interval: int = 10,
        start_iter: int = 0,
        stop_iter: int = -1,
    ):
        self.names, self.rule, self.momentum = list(names), rule, momentum
        self.interval, self.start_iter, self.stop_iter = interval, start_iter, stop_iter
        self.factors = torch.ones(len(names), dtype=torch.float64)
        self.variance = torch.full_like(self.factors, torch.nan)  # the last measurement's
        # Averages of S1 and S2 for the noise scale; a ratio of them needs no bias correction.
        self.unit_sq, self.mean_sq = self.factors * 0, self.factors * 0
        self.num_units = 0

    def active(self, iteration: int) -> bool:
        """Do the factors hold in this iteration?"""
        return iteration >= self.start_iter and not 0 <= self.stop_iter <= iteration

    def due(self, iteration: int) -> bool:
        """Is this iteration measured?"""
        return self.active(iteration) and (iteration - self.start_iter) % self.interval == 0

    def update(self, moments: Moments) -> None:
        """Take a measurement in. A module where it is not finite keeps what it had."""
        if moments.num_units != self.num_units:  # averages of other units, before a resume
            self.unit_sq, self.mean_sq = self.factors * 0, self.factors * 0
            self.num_units = moments.num_units
        self.variance = moments.variance
        valid = self.variance.isfinite()
        self.unit_sq = self._average(self.unit_sq, moments.unit_sq, valid)
        self.mean_sq = self._average(self.mean_sq, moments.mean_sq, valid)
        # Of each measurement, not of averaged moments, which one huge gradient would rule for long.
        target = self.rule(moments)
        self.factors = self._average(self.factors, target, target.isfinite())

    def _average(self, old: torch.Tensor, new: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return torch.where(valid, self.momentum * old + (1 - self.momentum) * new, old)

    def noise_scale(self, batch_size: int | None) -> dict[str, float]:
        """B_simple of each module and of the whole "model" in images, from averaged moments.

        NaN where it is not measurable, before the first measurement, or without a batch size. With
        Adam it is that of the preconditioned gradients.
        """
        names = [*self.names, "model"]
        if not self.num_units or not batch_size:
            return dict.fromkeys(names, torch.nan)
        sums = [torch.cat([s, s.sum(0, keepdim=True)]) for s in (self.unit_sq, self.mean_sq)]
        values = noise_scale(*sums, self.num_units, batch_size / self.num_units)
        return dict(zip(names, values.tolist(), strict=True))

    def state_dict(self) -> dict:
        """Lists and numbers only: a checkpoint that `torch.load(weights_only=True)` takes."""
        arrays = {key: getattr(self, key).tolist() for key in ("factors", "unit_sq", "mean_sq")}
        return {"modules": list(self.names), "num_units": self.num_units, **arrays}

    def load_state_dict(self, state: dict) -> None:
        """
        Raises:
            ValueError: the state was saved with other modules.
        """
        if state["modules"] != self.names:
            raise ValueError(
                f"The checkpoint's AGVM state is for the modules {', '.join(state['modules'])}, "
                f"but this model has {', '.join(self.names)}. Resume with the model and "
                "AGVM.MODULES of the saved run (its config.yaml), or start anew from these "
                "weights, without --resume."
            )
        for key in ("factors", "unit_sq", "mean_sq"):
            setattr(self, key, torch.tensor(state[key], dtype=torch.float64))
        self.num_units = state["num_units"]
