"""`python -m agvm_d2.plot OUTPUT_DIR`: a picture of a run from its metrics.json."""

from __future__ import annotations
import argparse
import json
import os
import sys
from collections import defaultdict
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Series = dict[str, tuple[tuple[int, ...], tuple[float, ...]]]

# One colour a module in every picture, anchor first.
ORDER = (
    "backbone",
    "fpn",
    "rpn",
    "box_head",
    "mask_head",
    "keypoint_head",
    "sem_seg_head",
    "head",
    "rest",
)


def read_metrics(path: str) -> Series:
    """Scalar -> (iterations, values) of a Detectron2 metrics.json. Where a resumed run wrote an
    iteration again, the last value holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not JSON, named by its number.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"'{path}' is not there: train first, or give the run's OUTPUT_DIR")
    values: dict[str, dict[int, float]] = defaultdict(dict)
    with open(path) as f:
        lines = f.read().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # a run that was killed while writing
                break
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        iteration = row.pop("iteration", None)
        for name, value in row.items():
            if isinstance(value, (int, float)) and iteration is not None:
                values[name][iteration] = value
    return {n: (tuple(sorted(v)), tuple(v[i] for i in sorted(v))) for n, v in values.items()}


def modules_of(series: Series, kind: str) -> list[str]:
    """The modules that have the scalar agvm/KIND/MODULE, in the order of `ORDER`."""
    prefix = f"agvm/{kind}/"
    found = [name[len(prefix) :] for name in series if name.startswith(prefix)]
    return sorted(found, key=lambda m: (ORDER.index(m) if m in ORDER else len(ORDER), m))


def colours_of(modules: list[str]) -> dict:
    """A colour for each."""
    return {name: plt.get_cmap("tab10")(i % 10) for i, name in enumerate(modules)}


def plot(output_dir: str, picture: str | None = None) -> str:
    """Draw variances and LR factors of all modules, losses, learning rate; return the PNG's path.

    Args:
        output_dir: folder with a metrics.json.
        picture: the PNG to write; OUTPUT_DIR/agvm.png by default.

    Raises:
        FileNotFoundError, ValueError: no metrics.json, or one without AGVM's scalars.
    """
    path = os.path.join(output_dir, "metrics.json")
    series = read_metrics(path)
    if not modules_of(series, "variance"):
        raise ValueError(
            f"{path} has no agvm/variance/... scalars: the run ended before AGVM.START_ITER, had "
            "one worker and no micro-batches, or AGVM.ENABLED was False."
        )
    modules = modules_of(series, "variance")
    colours = colours_of(modules)
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
        for axis, kind, label in (
            (axes[0, 0], "variance", "gradient variance $\\phi$"),
            (axes[0, 1], "lr_scale", "LR factor $\\mu$"),
        ):
            for name in modules_of(series, kind):
                axis.plot(*series[f"agvm/{kind}/{name}"], color=colours[name], label=name, lw=1.4)
            axis.set_ylabel(label)
        axes[0, 0].set_ylim(bottom=0)
        axes[0, 1].axhline(1, color="0.7", lw=0.8, zorder=0)
        axes[0, 1].legend(frameon=False)
        for name in sorted(series):
            if "loss" in name and "/" not in name and name != "total_loss":
                axes[1, 0].plot(*series[name], label=name, lw=1)
        if "total_loss" in series:  # a loop of one's own may not write it
            axes[1, 0].plot(*series["total_loss"], color="black", label="total_loss", lw=1.4)
        axes[1, 0].set_yscale("log")
        axes[1, 0].set_ylabel("loss")
        if axes[1, 0].lines:
            axes[1, 0].legend(frameon=False)
        if "lr" in series:
            axes[1, 1].plot(*series["lr"], color="black", lw=1.4)
        axes[1, 1].set_yscale("log")
        axes[1, 1].set_ylabel("learning rate before the factors")
        for axis in axes[1]:
            axis.set_xlabel("iteration")
        picture = picture or os.path.join(output_dir, "agvm.png")
        figure.savefig(picture, dpi=160)
        plt.close(figure)
    return picture


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", help="OUTPUT_DIR of a run")
    parser.add_argument("--out", metavar="PNG", help="default: OUTPUT_DIR/agvm.png")
    args = parser.parse_args(argv)
    try:
        print(plot(args.output_dir, args.out))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"agvm_d2.plot: error: {error}")


if __name__ == "__main__":
    main()
