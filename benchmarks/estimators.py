#!/usr/bin/env python
"""How well `pairwise` and `split` estimate the gradient variance of one module from one iteration.

    python benchmarks/estimators.py --json estimators.json --out docs/estimators.png

Simulated workers: K gradients of 1,000 dimensions, a fixed mean of norm 1 plus noise whose spectrum
falls as 1/i, scaled so that the true variance, 2 tr(Sigma)/K over |G|^2 + 2 tr(Sigma)/K, is 0.2 or
0.8 whatever K is. Gaussian noise, and multivariate Student t with 3 degrees of freedom, whose norms
vary much.
"""

from __future__ import annotations
import argparse
import json
import matplotlib
import numpy as np
import torch

from agvm_d2.variance import pairwise_variance, split_variance

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WORKERS = (2, 4, 8, 16, 32, 64, 128, 256, 768)
DIMENSIONS, FREEDOM = 1000, 3


def trial(g: torch.Generator, k: int, phi: float, heavy: bool) -> tuple[float, float]:
    spectrum = 1 / torch.arange(1, DIMENSIONS + 1, dtype=torch.float64)
    trace = k / 2 * phi / (1 - phi)
    noise = torch.randn(k, DIMENSIONS, generator=g, dtype=torch.float64)
    noise *= (spectrum * trace / spectrum.sum()).sqrt()
    if heavy:  # scaled to the same covariance
        chi2 = (
            torch.randn(k, FREEDOM, generator=g, dtype=torch.float64).square().sum(1, keepdim=True)
        )
        noise *= ((FREEDOM - 2) / chi2).sqrt()
    units = noise + DIMENSIONS**-0.5
    mean_sq = float(units.mean(0).square().sum())
    halves = [float(units[i::2].mean(0).square().sum()) for i in (0, 1)]
    unit_sq = float(units.square().sum(1).mean())
    return pairwise_variance(unit_sq, mean_sq, k), split_variance(*halves, mean_sq)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--out", metavar="PNG")
    args = parser.parse_args()
    rows = []
    print(
        "| noise | true | K | pairwise: bias % | sd | split: bias % | sd | variance ratio |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for heavy in (False, True):
        for phi in (0.2, 0.8):
            for k in WORKERS:
                g = torch.Generator().manual_seed(k)
                found = np.array([trial(g, k, phi, heavy) for _ in range(args.trials)])
                bias, sd = 100 * (found.mean(0) / phi - 1), found.std(0)
                error = 100 * sd / phi / args.trials**0.5
                name = "Student t" if heavy else "Gaussian"
                rows.append({"noise": name, "phi": phi, "K": k, "bias": [*bias], "sd": [*sd]})
                print(
                    f"| {name} | {phi} | {k} | {bias[0]:+.2f} ± {error[0]:.2f} | {sd[0]:.4f} "
                    f"| {bias[1]:+.2f} ± {error[1]:.2f} | {sd[1]:.4f} "
                    f"| {(sd[1] / sd[0]) ** 2:.1f} |"
                )
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"trials": args.trials, "rows": rows}, f, indent=1)
    if args.out:
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        for axis, key, label in (
            (axes[0], "sd", "standard deviation"),
            (axes[1], "bias", "bias, %"),
        ):
            for noise, style in (("Gaussian", "-"), ("Student t", "--")):
                for i, (name, colour) in enumerate(
                    (("pairwise", "tab:blue"), ("split", "tab:red"))
                ):
                    chosen = [r for r in rows if r["noise"] == noise and r["phi"] == 0.2]
                    values = [r[key][i] for r in chosen]
                    axis.plot(WORKERS, values, style, color=colour, label=f"{name}, {noise}")
            axis.set_xscale("log", base=2)
            axis.set_xlabel("gradients K")
            axis.set_ylabel(f"{label} (true variance 0.2)")
        axes[0].set_yscale("log")
        axes[0].legend(frameon=False, fontsize=8)
        axes[1].axhline(0, color="0.7", lw=0.8, zorder=0)
        figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
