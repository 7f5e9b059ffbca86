"""Pure functions: moments -> variance, noise scale, LR gain; variance ratio -> LR factor.

Notation: u_1..u_K are K independent gradients ("units") of one module, m their mean,
S1 = mean_k |u_k|^2 (`unit_sq`) and S2 = |m|^2 (`mean_sq`). Inputs are floats or tensors of one
value per module; a float comes back for floats, a float64 tensor for tensors. Undefined values
(0/0) are NaN. Where `num_units` is K, K < 2 is a ValueError.
"""

from __future__ import annotations
import functools
from collections.abc import Callable
from typing import Any
import torch

EPS = 1e-6  # keeps the ratio finite; the official code's value


def _elementwise(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """Let `function` on float64 tensors also take and return plain numbers."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # num_units and bounds pass through as_tensor unharmed: all is plain arithmetic.
        values = {k: torch.as_tensor(v, dtype=torch.float64) for k, v in kwargs.items()}
        out = function(*(torch.as_tensor(a, dtype=torch.float64) for a in args), **values)
        return out.item() if out.ndim == 0 else out

    return call


def _check_units(num_units: torch.Tensor) -> None:
    if (num_units < 2).any():
        raise ValueError(f"a variance needs at least 2 gradients; num_units = {num_units.tolist()}")


@_elementwise
def pairwise_variance(
    unit_sq: torch.Tensor, mean_sq: torch.Tensor, num_units: torch.Tensor
) -> torch.Tensor:
    """Gradient variance phi >= 0: 1 - E a.b / E|a|^2 over all halvings of the K units, whose means
    a and b are; `split_variance` is 1 - a.b/(|a||b|) of one of them.

    With p = (K S2 - S1)/(K - 1), the mean inner product of two different units, a half's mean has
    E|a|^2 = (2 S1 + (K - 2) p)/K, and phi = 1 - p/E|a|^2 = 2 (S1 - S2)/((K - 2) S2 + S1).

    >>> pairwise_variance(2.0, 1.0, 2)  # two orthogonal gradients
    1.0
    """
    _check_units(num_units)
    # Rounding may leave S1 a little under S2. Never capped above: with SyncBN phi exceeds 1.
    return (2 * (unit_sq - mean_sq) / ((num_units - 2) * mean_sq + unit_sq)).clamp(min=0)


@_elementwise
def split_variance(
    sq_a: torch.Tensor, sq_b: torch.Tensor, mean_sq: torch.Tensor, share: torch.Tensor | float = 0.5
) -> torch.Tensor:
    """The paper's variance, 1 - cos(a, b), from norms alone.

    Args:
        sq_a: squared norm of the mean gradient a of one half of the units.
        sq_b: of b, of the other half.
        mean_sq: squared norm of the mean m = s a + (1 - s) b, which gives the product ab; for equal
            halves ab = 2 |m|^2 - (|a|^2 + |b|^2)/2.
        share: s, the first half's share of the units.
    """
    rest = 1 - share
    dot = (mean_sq - share**2 * sq_a - rest**2 * sq_b) / (2 * share * rest)
    return (1 - dot / (sq_a * sq_b).sqrt()).clamp(min=0)


@_elementwise
def lr_ratio(
    variance: torch.Tensor,
    anchor: torch.Tensor,
    ratio_range: torch.Tensor | tuple[float, float] = (0.5, 10.0),
) -> torch.Tensor:
    """r = clip((phi_anchor + 1e-6)/(phi + 1e-6), *ratio_range); the LR factor follows sqrt(r).

    Args:
        variance: phi of the module(s).
        anchor: phi of the anchor module.
        ratio_range: bounds (low, high) of the ratio; (0.5, 10) in the paper.
    """
    return ((anchor + EPS) / (variance + EPS)).clamp(*ratio_range)


@_elementwise
def lr_gain(
    unit_sq: torch.Tensor,
    mean_sq: torch.Tensor,
    num_units: torch.Tensor,
    base_units: torch.Tensor | float = 1,
) -> torch.Tensor:
    """AdaScale's gain (Johnson et al. 2020, arXiv 2007.05105), here of a module: the factor on a
    learning rate known at a small batch, E|g|^2 there over E|g|^2 at this one.

    Between 1 (all signal) and K/n (all noise), and (1 + B/base)/(1 + B/batch) with the noise scale
    B. `base_units` is n, units in the small batch; any positive number.
    """
    _check_units(num_units)
    trace = (unit_sq - mean_sq).clamp(min=0) * num_units / (num_units - 1)  # of a unit's Sigma
    base_sq = unit_sq + trace * (1 / base_units - 1)
    noise = num_units / base_units
    return (base_sq / mean_sq).clamp(noise.clamp(max=1), noise.clamp(min=1))


@_elementwise
def noise_scale(
    unit_sq: torch.Tensor,
    mean_sq: torch.Tensor,
    num_units: torch.Tensor,
    unit_batch: torch.Tensor,
) -> torch.Tensor:
    """B_simple = tr(Sigma)/|G|^2 in images (McCandlish et al. 2018, appendix A.1), from units of
    `unit_batch` images.

    tr(Sigma)/unit_batch = (S1 - S2) K/(K - 1) and |G|^2 = S2 - (S1 - S2)/(K - 1) are unbiased;
    their ratio is not, so give averages of S1 and S2 over several steps. NaN where the estimate
    of |G|^2 is not positive, that is, where noise drowns the gradient.
    """
    _check_units(num_units)
    spread = (unit_sq - mean_sq).clamp(min=0) / (num_units - 1)
    signal = mean_sq - spread
    return torch.where(signal > 0, unit_batch * num_units * spread / signal, torch.nan)


def gain_of(signal: float, base: int, batch: int) -> float:
    """(1 + B/base)/(1 + B/batch) of the noise scale B = 1/signal: `lr_gain`, of averages.

    >>> gain_of(1 / 48, base=16, batch=64)  # 4 / 1.75
    2.285714285714286
    """
    return (signal + 1 / base) / (signal + 1 / batch)
