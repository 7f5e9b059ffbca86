"""The literal algorithm, slow and obvious: the oracle of the tests.

Every unit's full gradient is kept, in float64, and every sum is written out.
"""

from __future__ import annotations
import itertools
import math
import torch


def unit_gradients(model, loss_of, units) -> list[dict[str, torch.Tensor]]:
    """One gradient a unit: {parameter name: float64 gradient}, zero where there is none."""
    names, params = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad])
    gradients = []
    for unit in units:
        grads = torch.autograd.grad(loss_of(model, unit), params, allow_unused=True)
        gradients.append(
            {
                n: (torch.zeros_like(p) if g is None else g).double()
                for n, p, g in zip(names, params, grads)
            }
        )
    return gradients


def flatten(gradients, names) -> list[torch.Tensor]:
    """The units' gradients of one module as vectors."""
    return [torch.cat([g[n].reshape(-1) for n in names]) for g in gradients]


def moments(vectors, weights=None) -> tuple[float, float]:
    """S1 = sum_k w_k |u_k|^2 and S2 = |sum_k w_k u_k|^2; equal weights by default."""
    weights = weights or [1 / len(vectors)] * len(vectors)
    unit_sq = sum(w * float(u.dot(u)) for w, u in zip(weights, vectors))
    mean = sum(w * u for w, u in zip(weights, vectors))
    return unit_sq, float(mean.dot(mean))


def pairwise_variance(vectors) -> float:
    """From all pairs: phi = 1 - E[ab] / E|a|^2 for the means a, b of two random disjoint halves."""
    k = len(vectors)
    pairs = [float(u.dot(v)) for u, v in itertools.permutations(vectors, 2)]
    inner = sum(pairs) / len(pairs)
    square = sum(float(u.dot(u)) for u in vectors) / k
    half = (square + (k / 2 - 1) * inner) / (k / 2)
    return max(1 - inner / half, 0.0)


def split_variance(half_a, half_b) -> float:
    """1 - cos of the two halves' mean gradients (the paper's equation)."""
    a, b = sum(half_a) / len(half_a), sum(half_b) / len(half_b)
    return 1 - float(a.dot(b)) / math.sqrt(float(a.dot(a)) * float(b.dot(b)))


def gain(vectors, base_units: int) -> float:
    """How much longer the mean gradient of `base_units` units is than that of all, in squares: over
    all choices of `base_units` from them; from 1 to the ratio of the batches."""
    squares = []
    for chosen in itertools.combinations(vectors, base_units):
        mean = sum(chosen) / base_units
        squares.append(float(mean.dot(mean)))
    found = sum(squares) / len(squares) / moments(vectors)[1]
    return min(max(found, 1.0), len(vectors) / base_units)


def factors(old: dict, variances: dict, anchor: str, momentum: float, ratio_range) -> dict:
    """One update of every module's LR factor."""
    new = {}
    for name, variance in variances.items():
        ratio = (variances[anchor] + 1e-6) / (variance + 1e-6)
        ratio = min(max(ratio, ratio_range[0]), ratio_range[1])
        new[name] = momentum * old[name] + (1 - momentum) * math.sqrt(ratio)
    return new
