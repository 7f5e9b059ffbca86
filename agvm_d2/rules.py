"""Rules: one measurement -> the LR factor that it asks for, for each module.

To add a rule, write a function like those here, which takes what a run knows, checks what the rule
needs and returns it, and put it into `RULES`; AGVM.RULE takes its name.
"""

from __future__ import annotations
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
import torch

from .variance import lr_gain, lr_ratio

if TYPE_CHECKING:
    from .moments import Moments
    from .settings import Settings

# Returns shape (modules,); a module where it is not finite keeps its factor.
Rule = Callable[["Moments"], torch.Tensor]


def variance_rule(settings: Settings, names: Sequence[str], batch_size: int | None) -> Rule:
    """AGVM's: sqrt(r), which brings each module's variance to the anchor's."""
    if settings.anchor not in names:
        raise ValueError(
            f"AGVM.ANCHOR: '{settings.anchor}' is not a module with trainable parameters; "
            f"the modules are {', '.join(names)}."
        )
    anchor, bounds = list(names).index(settings.anchor), settings.ratio_range
    return lambda moments: lr_ratio(moments.variance, moments.variance[anchor], bounds).sqrt()


def gain_rule(settings: Settings, names: Sequence[str], batch_size: int | None) -> Rule:
    """Module-wise AdaScale: each module's gain, for the learning rate of `base_batch_size`."""
    if not batch_size:
        raise ValueError("AGVM.RULE gain needs batch_size, the images of one iteration.")
    share = settings.base_batch_size / batch_size
    return lambda m: lr_gain(m.unit_sq, m.mean_sq, m.num_units, m.num_units * share)


RULES: dict[str, Callable[[Settings, Sequence[str], int | None], Rule]] = {
    "variance": variance_rule,
    "gain": gain_rule,
}
