"""The moving averages: when to measure, and what factor holds now."""

from __future__ import annotations
from collections.abc import Sequence
import torch

from .moments import Moments, averaged
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
        self.last: Moments | None = None  # measurement
        self.variance = torch.full_like(self.factors, torch.nan)  # of the last measurement
        self.clear_averages()

    def clear_averages(self, num_units: int = 0) -> None:
        """Forget those behind the noise scale, of `num_units` gradients from now on; the factors
        stay. They are of S1/S1 and S2/S1, of each module and of all together. Over S1, so that
        neither one huge gradient nor gradients that were huge once rule them for long."""
        self.num_units = num_units
        self.unit_sq = torch.zeros(len(self.names) + 1, dtype=torch.float64)
        self.mean_sq = torch.zeros_like(self.unit_sq)

    def active(self, iteration: int) -> bool:
        """Do the factors hold in this iteration?"""
        return iteration >= self.start_iter and not 0 <= self.stop_iter <= iteration

    def due(self, iteration: int) -> bool:
        """Is this iteration measured?"""
        return self.active(iteration) and (iteration - self.start_iter) % self.interval == 0

    def update(self, moments: Moments) -> None:
        """Take a measurement in. A module where it is not finite keeps what it had."""
        if moments.num_units != self.num_units:  # averages of other units, before a resume
            self.clear_averages(moments.num_units)
        self.last, self.variance = moments, moments.variance
        unit_sq, mean_sq = moments.with_model()
        ratio = mean_sq / unit_sq
        one = torch.where(ratio.isfinite(), torch.ones_like(ratio), torch.nan)
        self.unit_sq = averaged(self.unit_sq, one, self.momentum)
        self.mean_sq = averaged(self.mean_sq, ratio, self.momentum)
        self.factors = averaged(self.factors, self.rule(moments), self.momentum)

    def noise_scale(self, batch_size: int | None) -> dict[str, float]:
        """B_simple of each module and of the whole "model" in images, from averages of S2/S1.

        NaN where it is not measurable, before the first measurement, or without a batch size. With
        Adam it is that of the preconditioned gradients.
        """
        names = [*self.names, "model"]
        if not self.num_units or not batch_size:
            return dict.fromkeys(names, torch.nan)
        unit_batch = batch_size / self.num_units
        values = noise_scale(self.unit_sq, self.mean_sq, self.num_units, unit_batch)
        return dict(zip(names, values.tolist(), strict=True))

    def state_dict(self) -> dict:
        """Lists and numbers only: a checkpoint that `torch.load(weights_only=True)` takes."""
        arrays = {key: getattr(self, key).tolist() for key in ("factors", "unit_sq", "mean_sq")}
        return {"modules": list(self.names), "num_units": self.num_units, **arrays}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a saved state.

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
        self.factors = torch.tensor(state["factors"], dtype=torch.float64)
        self.clear_averages(state["num_units"])
        if len(state["unit_sq"]) == len(self.unit_sq):  # not of version 0.1
            self.unit_sq = torch.tensor(state["unit_sq"], dtype=torch.float64)
            self.mean_sq = torch.tensor(state["mean_sq"], dtype=torch.float64)
