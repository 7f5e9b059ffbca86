"""The moving averages: when to measure, and what factor holds now."""

from __future__ import annotations
from collections.abc import Sequence
import torch

from .moments import Moments
from .variance import lr_gain, lr_ratio, pairwise_variance, split_variance


class Modulator:
    """LR factor of each module, every `interval` iterations: mu <- a mu + (1 - a) sqrt(r), or
    a mu + (1 - a) gain.

    Args:
        names: modules, in the order of the moments.
        anchor: the module whose variance the others are brought to; its factor stays 1. Not used by
            the gain.
        momentum: a, in [0, 1).
        ratio_range: bounds of the ratio r.
        interval: iterations from one measurement to the next.
        start_iter: the first measured iteration; factors are 1 before it.
        stop_iter: from this iteration on nothing is measured and factors are 1 again; -1: never.
        rule: "variance", the paper's, or "gain", `lr_gain`, without anchor and ratio range.
        base_share: for the gain, the batch that the learning rate is for, over this batch.

    Raises:
        ValueError: the anchor is not one of the modules.
    """

    def __init__(
        self,
        names: Sequence[str],
        anchor: str = "backbone",
        momentum: float = 0.97,
        ratio_range: tuple[float, float] = (0.5, 10.0),
        interval: int = 10,
        start_iter: int = 0,
        stop_iter: int = -1,
        rule: str = "variance",
        base_share: float = 1.0,
    ):
        if rule == "variance" and anchor not in names:
            raise ValueError(
                f"AGVM.ANCHOR: '{anchor}' is not a module with trainable parameters; "
                f"the modules are {', '.join(names)}."
            )
        self.names = list(names)
        self.anchor = self.names.index(anchor) if anchor in names else None
        self.momentum = momentum
        self.ratio_range = ratio_range
        self.interval = interval
        self.start_iter = start_iter
        self.stop_iter = stop_iter
        self.rule = rule
        self.base_share = base_share
        nan = torch.full((len(names),), torch.nan, dtype=torch.float64)
        self.factors = torch.ones_like(nan)
        self.variance = nan  # the last measurement's; NaN where there was none
        # Averages of S1 and S2 for the noise scale; a ratio of them needs no bias correction.
        self.unit_sq = torch.zeros_like(nan)
        self.mean_sq = torch.zeros_like(nan)
        self.num_units = 0

    def active(self, iteration: int) -> bool:
        """Do the factors hold in this iteration?"""
        return iteration >= self.start_iter and not 0 <= self.stop_iter <= iteration

    def due(self, iteration: int) -> bool:
        """Is this iteration measured?"""
        return self.active(iteration) and (iteration - self.start_iter) % self.interval == 0

    def update(self, moments: Moments) -> None:
        """Take a measurement in. A module without a finite variance keeps its factor."""
        unit_sq, mean_sq, num_units, halves, share = moments
        if num_units != self.num_units:  # averages of other units, before a resume
            self.unit_sq, self.mean_sq = torch.zeros_like(unit_sq), torch.zeros_like(mean_sq)
            self.num_units = num_units
        if halves is None:
            self.variance = pairwise_variance(unit_sq, mean_sq, self.num_units)
        else:
            self.variance = split_variance(*halves, mean_sq, share)
        a = self.momentum
        valid = self.variance.isfinite()
        self.unit_sq = torch.where(valid, a * self.unit_sq + (1 - a) * unit_sq, self.unit_sq)
        self.mean_sq = torch.where(valid, a * self.mean_sq + (1 - a) * mean_sq, self.mean_sq)
        # Of each measurement, not of averaged moments, which one huge gradient would rule for long.
        if self.rule == "gain":
            target = lr_gain(unit_sq, mean_sq, num_units, num_units * self.base_share)
        else:
            target = lr_ratio(self.variance, self.variance[self.anchor], self.ratio_range).sqrt()
        valid = target.isfinite()
        self.factors = torch.where(valid, a * self.factors + (1 - a) * target, self.factors)

    def state_dict(self) -> dict:
        """Lists and numbers only: a checkpoint that `torch.load(weights_only=True)` takes."""
        return {
            "modules": list(self.names),
            "factors": self.factors.tolist(),
            "unit_sq": self.unit_sq.tolist(),
            "mean_sq": self.mean_sq.tolist(),
            "num_units": self.num_units,
        }

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
