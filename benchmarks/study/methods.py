"""The methods as data, and the rules that no user needs."""

from __future__ import annotations
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple
import torch

from agvm_d2.moments import Moments, pairwise_moments
from agvm_d2.rules import RULES, Rule, gain_rule, variance_rule
from agvm_d2.settings import Settings
from agvm_d2.solver import scaled_lr

MOMENTUM = 0.9  # the paper's 0.97 would hardly move in 250 iterations
BASE_LR = 0.08  # SGD's best for Faster R-CNN at batch 16

Build = Callable[[Settings, Sequence[str], "int | None"], Rule]


def averaged(build: Build) -> Build:
    """A rule of averaged moments: S1 and S2 are averaged before it instead of the factor after it;
    for a method with momentum 0."""

    def build_averaged(settings: Settings, names: Sequence[str], batch_size: int | None) -> Rule:
        rule = build(settings, names, batch_size)
        averages = torch.zeros(2, len(names), dtype=torch.float64)

        def of_averages(moments: Moments) -> torch.Tensor:
            nonlocal averages
            new = torch.stack([moments.unit_sq, moments.mean_sq])
            new = MOMENTUM * averages + (1 - MOMENTUM) * new
            averages = torch.where(moments.variance.isfinite(), new, averages)
            return rule(pairwise_moments(*averages, moments.num_units))

        return of_averages

    return build_averaged


def combined(settings: Settings, names: Sequence[str], batch_size: int | None) -> Rule:
    """The gain times AGVM's factor."""
    gain, ratio = (build(settings, names, batch_size) for build in (gain_rule, variance_rule))
    return lambda moments: gain(moments) * ratio(moments)


def bounded(
    settings: Settings, names: Sequence[str], batch_size: int | None, lr: float = BASE_LR
) -> Rule:
    """AGVM with bounds from the data: no module's learning rate above its gain times batch 16's, in
    a run at `lr`."""
    gain, ratio = (build(settings, names, batch_size) for build in (gain_rule, variance_rule))
    return lambda moments: torch.minimum(ratio(moments), gain(moments) * BASE_LR / lr)


def constant(backbone: float, others: float) -> Build:
    """Factors that another rule had on average before the LR drop at batch 128, from the first
    measurement to the end: is it the measuring that helps? For a method with momentum 0."""

    def build(settings: Settings, names: Sequence[str], batch_size: int | None) -> Rule:
        factors = [backbone if name == "backbone" else others for name in names]
        return lambda moments: torch.tensor(factors, dtype=torch.float64)

    return build


def register_rules(lr: float) -> None:
    """Let AGVM.RULE name the study's rules too, in a run at `lr`."""
    RULES.update(
        averaged=averaged(variance_rule),
        averaged_gain=averaged(gain_rule),
        combined=combined,
        bounded=functools.partial(bounded, lr=lr),
        like_agvm=constant(1.0, 1.65),
        like_gain=constant(5.5, 1.75),
    )


class Method(NamedTuple):
    label: str
    optimizer: str
    rule: str = "variance"
    lr_rule: str = "linear-sqrt"  # of `scaled`, to use untuned
    mode: str = "modulate"
    estimator: str = "pairwise"
    momentum: float = MOMENTUM
    backbone_lr: float = 1.0  # times the others'

    @property
    def plain(self) -> str:
        """The method without AGVM."""
        return self.optimizer.lower() + ("_3" if self.backbone_lr == 3 else "")


METHODS = {
    "sgd": Method("SGD", "SGD", mode="monitor"),
    "agvm": Method("AGVM", "SGD"),
    "agvm_split": Method("AGVM, split", "SGD", estimator="split"),
    "averaged": Method("AGVM of averaged moments", "SGD", "averaged", momentum=0.0),
    "combined": Method("gain × AGVM", "SGD", "combined", "none"),
    "bounded": Method("AGVM bounded by the gain", "SGD", "bounded"),
    "gain": Method("gain per module", "SGD", "gain", "none"),
    "gain_averaged": Method(
        "gain of averaged moments", "SGD", "averaged_gain", "none", momentum=0.0
    ),
    "like_agvm": Method("constant, as AGVM's", "SGD", "like_agvm", momentum=0.0),
    "like_gain": Method("constant, as the gain's", "SGD", "like_gain", "none", momentum=0.0),
    "sgd_3": Method("SGD, backbone ×3", "SGD", mode="monitor", backbone_lr=3),
    "agvm_3": Method("AGVM, backbone ×3", "SGD", backbone_lr=3),
    "gain_3": Method("gain per module, backbone ×3", "SGD", "gain", "none", backbone_lr=3),
    "gain_averaged_3": Method(
        "gain of averaged moments, backbone ×3",
        "SGD",
        "averaged_gain",
        "none",
        momentum=0.0,
        backbone_lr=3,
    ),
    "adamw": Method("AdamW", "ADAMW", lr_rule="sqrt", mode="monitor"),
    "agvm_adamw": Method("AGVM on AdamW", "ADAMW", lr_rule="sqrt"),
    "gain_adamw": Method("gain on AdamW", "ADAMW", "gain", "none"),
    "lars": Method("LARS", "LARS", lr_rule="sqrt", mode="monitor"),
    "lamb": Method("LAMB", "LAMB", lr_rule="sqrt", mode="monitor"),
}


def scaled(lr: float, batch: int, rule: str) -> float:
    """The learning rate that a rule of `scaled_lr`, or "none", derives from batch 16's."""
    return lr if rule == "none" else scaled_lr(batch, rule, lr)
