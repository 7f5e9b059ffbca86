#!/usr/bin/env python
"""Where each rule wins, on two modules whose loss is quadratic: the arithmetic of docs/theory.md.

    python -m benchmarks.theory --out docs/theory.png

A module has 12 directions, whose curvatures fall from its own, h, to h/300. Each begins at 1/12 of
a loss of 1, and its noise is in proportion to its curvature. The expected loss of such a problem
follows exactly, so nothing is drawn at random. The learning rate falls linearly to 0. For the first
three panels every method has its own best learning rate at every point, of 41; AGVM measures as it
does by default. For the last one only the batch changes, at plain SGD's best learning rate at the
base batch; SGD there has the gain's number of steps and again its own best rate.
"""

from __future__ import annotations
import argparse
import matplotlib
import torch

from agvm_d2.modulator import Modulator
from agvm_d2.moments import pairwise_moments
from agvm_d2.progress import Progress
from agvm_d2.rules import RULES
from agvm_d2.settings import Settings
from agvm_d2.variance import lr_gain, lr_ratio, pairwise_variance

matplotlib.use("Agg")
import matplotlib.pyplot as plt

UNITS = 8  # gradients that are compared; the expected variance is the same for any number
STEPS, DIRECTIONS, NOISE, BASE = 1000, 12, 0.3, 1 / 16  # BASE: base batch over batch
RATIOS = torch.logspace(-2, 2, 13, dtype=torch.float64)  # of the second module to the first
RATES = torch.logspace(-3, 1, 41, dtype=torch.float64)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
METHODS = {
    None: ("SGD", "0.4"),
    "variance": ("AGVM", "tab:blue"),
    "gain": ("gain per module", "tab:red"),
    "model gain": ("one gain for the model", "tab:orange"),
}


def next_square(
    square: torch.Tensor, rate: torch.Tensor, curvature: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """E|x|^2 after a step at `rate`, from E|x|^2; `noise` is the variance of the gradient."""
    return (1 - rate * curvature) ** 2 * square + rate**2 * noise


def steady_loss(rate: float, curvature: float, noise: float) -> float:
    """(h/2) E|x|^2 after endless steps at one rate below 2/h."""
    return rate * noise / (2 * (2 - rate * curvature))


def loss_after(steps: int, loss: float, rate: float, curvature: float, noise: float) -> float:
    """(h/2) E|x|^2 after steps at one rate, from `loss`."""
    end = steady_loss(rate, curvature, noise)
    return (1 - rate * curvature) ** (2 * steps) * (loss - end) + end


def expected_moments(
    signal: torch.Tensor, noise: torch.Tensor, units: int = UNITS
) -> tuple[torch.Tensor, torch.Tensor]:
    """E S1 and E S2 of `units` gradients, whose mean is |G|^2 = `signal` and `noise` about it."""
    return signal + units * noise, signal + noise


def train(
    curvature: torch.Tensor,
    noise: torch.Tensor,
    square: torch.Tensor,
    lrs: torch.Tensor,
    rule: str | None,
    steps: int = STEPS,
    settings: Settings = Settings(),  # noqa: B008, it is frozen
    base: float = BASE,
    decay: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Expected loss of each module after training, and its LR factor; module 0 is the anchor.

    Args:
        curvature, noise, square: of each direction, shape (..., modules, directions); `square` is
            E|x|^2 at the start.
        lrs: shape (n,); the results have shape (..., n, modules).
        base: base batch over batch, for the gains.
    """
    lrs = lrs[:, None]
    curvature, noise, square = (t[..., None, :, :] for t in (curvature, noise, square))
    square = square + 0 * lrs[..., None]
    factors = torch.ones(square.shape[:-1], dtype=torch.float64)
    for step in range(steps):
        if rule and step % settings.interval == 0:
            parts = (curvature**2 * square).sum(-1), noise.sum(-1)
            moments = expected_moments(*torch.broadcast_tensors(*parts))
            if rule == "variance":
                phi = pairwise_variance(*moments, UNITS)
                target = lr_ratio(phi, phi[..., :1], settings.ratio_range).sqrt()
            else:
                if rule == "model gain":
                    moments = tuple(s.sum(-1, keepdim=True) for s in moments)
                target = lr_gain(*moments, UNITS, UNITS * base)
            new = settings.momentum * factors + (1 - settings.momentum) * target
            factors = torch.where(new.isfinite(), new, factors)
        rate = lrs * factors * (1 - step / steps if decay else 1)
        square = next_square(square, rate[..., None], curvature, noise)
    return (curvature * square).sum(-1) / 2, factors


def two_modules(
    noise_ratio: torch.Tensor, curvature_ratio: torch.Tensor, noise: float = NOISE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Curvature, noise and E|x|^2 at the start, of shape (..., 2, directions); `noise` is that of
    each module's gradient where the ratio is 1."""
    spread = torch.logspace(-2.5, 0, DIRECTIONS, dtype=torch.float64)
    sides = torch.tensor([-0.5, 0.5], dtype=torch.float64)[:, None]
    curvature = spread * curvature_ratio[..., None, None] ** sides
    noises = noise * spread / spread.sum() * noise_ratio[..., None, None] ** sides
    return curvature, noises, 2 / curvature / DIRECTIONS


def best(
    rule: str | None,
    noise_ratio: torch.Tensor,
    curvature_ratio: torch.Tensor,
    noise: float = NOISE,
    steps: int = STEPS,
) -> torch.Tensor:
    """Both modules' loss at the best learning rate for each ratio; its shape is the ratios'."""
    lrs = RATES * BASE if rule and "gain" in rule else RATES
    problem = two_modules(noise_ratio, curvature_ratio, noise)
    return train(*problem, lrs, rule, steps)[0].sum(-1).nan_to_num(torch.inf).amin(-1)


def ideal(noise_ratio: torch.Tensor, curvature_ratio: torch.Tensor) -> torch.Tensor:
    """Both modules' loss where each has a learning rate of its own, the best for it."""
    loss = train(*two_modules(noise_ratio, curvature_ratio), RATES, None)[0]
    return loss.nan_to_num(torch.inf).amin(-2).sum(-1)


def only_the_batch(batch: int, curvature_ratio: float) -> tuple[int, float, float]:
    """At `batch` times the base batch, with the base's best learning rate: steps by the gain, its
    loss over the base's, and that of SGD with as many steps and its best learning rate.

    Each module has its own gain, and the learning rate and the end follow the sum of the smallest
    gains, by the package's own classes.
    """
    curvature, noise, square = two_modules(torch.tensor(1.0), torch.tensor(curvature_ratio))
    losses = train(curvature, noise, square, RATES, None)[0].sum(-1).nan_to_num(torch.inf)
    base_loss, lr = float(losses.min()), RATES[losses.argmin()]
    settings = Settings(rule="gain", base_batch_size=1, momentum=0.9, interval=5)
    names = ["backbone", "head"]
    modulator = Modulator(
        names, RULES["gain"](settings, names, batch), settings.momentum, settings.interval
    )
    progress = Progress(len(names), 1 / batch, settings.momentum, STEPS)
    step, moved = 0, square
    while progress.iterations < STEPS:
        if modulator.due(step):
            signal = (curvature**2 * moved).sum(-1)
            moments = pairwise_moments(*expected_moments(signal, noise.sum(-1) / batch), UNITS)
            modulator.update(moments)
            progress.update(moments)
        rate = lr * modulator.factors * (1 - progress.iterations / STEPS)
        moved = next_square(moved, rate[:, None], curvature, noise / batch)
        progress.begin()
        progress.count(raised=True)
        step += 1
    control = train(curvature, noise / batch, square, RATES, None, step)[0].sum(-1)
    gained = float((curvature * moved).sum() / 2)
    return step, gained / base_loss, float(control.nan_to_num(torch.inf).min()) / base_loss


def draw(out: str) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.8), layout="constrained")
    one = torch.ones_like(RATIOS)
    for axis, ratios, label in (
        (axes[0, 0], (RATIOS, one), "noise of the second module / of the first"),
        (axes[0, 1], (one, RATIOS), "curvature of the second module / of the first"),
    ):
        goal = ideal(*ratios)
        print(f"{label}: loss over that of two best learning rates")
        for rule, (name, colour) in METHODS.items():
            found = best(rule, *ratios) / goal
            print(f"  {name}: " + " ".join(f"{v:.3g}" for v in found.tolist()))
            axis.plot(RATIOS, found, color=colour, label=name)
        axis.set(xscale="log", xlabel=label, ylabel="loss / loss with two best rates")
    axes[0, 0].set(title="only the noise differs", ylim=(0.95, 2))
    axes[0, 0].legend(frameon=False)
    axes[0, 1].set(title="only the curvature differs", yscale="log")

    grid = torch.meshgrid(RATIOS, RATIOS, indexing="ij")  # curvature, noise
    order = (best("gain", grid[1], grid[0]) / best("variance", grid[1], grid[0])).log10()
    axis = axes[1, 0]
    colours = axis.pcolormesh(RATIOS, RATIOS, order, cmap="RdBu", vmin=-1, vmax=1, rasterized=True)
    axis.contour(RATIOS, RATIOS, order, levels=[0.0], colors="k")
    axis.set(xscale="log", yscale="log", xlabel="noise ratio", ylabel="curvature ratio")
    axis.set_title("blue: AGVM wins; red: the gain wins")
    figure.colorbar(colours, ax=axis, label="log10(loss of the gain / of AGVM)")

    axis = axes[1, 1]
    for ratio, style in ((1.0, "-"), (10.0, "--")):
        found = [(b, *only_the_batch(b, ratio)) for b in BATCHES]
        print(f"curvature ratio {ratio:g}: batch, steps, gain's loss / base's, SGD's / base's")
        print("\n".join(f"  {b} {steps} {g:.3g} {c:.3g}" for b, steps, g, c in found))
        for i, name, colour in ((2, "gain per module", "tab:red"), (3, "SGD, best rate", "0.4")):
            label = f"{name}; curvature 1 : {ratio:g}"
            axis.plot(BATCHES, [f[i] for f in found], style, color=colour, label=label)
    axis.set(xscale="log", yscale="log", xlabel="batch / base batch", ylabel="loss / the base's")
    axis.set_title("only the batch changes; steps by the gain")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", metavar="PNG", default="docs/theory.png")
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
