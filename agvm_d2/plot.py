"""`python -m agvm_d2.plot OUTPUT_DIR`: a picture of a run from its metrics.json."""

from __future__ import annotations
import argparse
import contextlib
import itertools
import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from .validate import is_int

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
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"'{path}' is not there: train first, or give the run's OUTPUT_DIR")
    values: dict[str, dict[int, float]] = defaultdict(dict)
    with open(path) as f:
        lines = f.read().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:  # a run was killed while writing it
            if number < len(lines):
                print(f"{path}, line {number}: left out, not JSON ({error})", file=sys.stderr)
            continue
        iteration = row.pop("iteration", None)
        for name, value in row.items():
            if isinstance(value, (int, float)) and iteration is not None:
                values[name][iteration] = value
    return {n: (tuple(sorted(v)), tuple(v[i] for i in sorted(v))) for n, v in values.items()}


def read_config(output_dir: str) -> Callable[..., Any]:
    """A function (yacs key, LazyConfig's key, default) -> value in a run's config.yaml; the
    default where the key, the file or PyYAML is missing."""
    path, config = os.path.join(output_dir, "config.yaml"), {}
    if os.path.isfile(path):
        with contextlib.suppress(ModuleNotFoundError), open(path) as f:
            from .plain_yaml import plain_config

            config = plain_config(f.read())

    def value(yacs: str, lazy: str, default: Any = None) -> Any:
        found: Any = config
        for key in (lazy if "dataloader" in config else yacs).split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return default if found is None else found

    return value


def modules_of(series: Series, kind: str) -> list[str]:
    """The modules that have the scalar agvm/KIND/MODULE, in the order of `ORDER`."""
    prefix = f"agvm/{kind}/"
    found = [name[len(prefix) :] for name in series if name.startswith(prefix)]
    return sorted(found, key=lambda m: (ORDER.index(m) if m in ORDER else len(ORDER), m))


def colours_of(modules: list[str]) -> dict:
    """A colour for each."""
    return {name: plt.get_cmap("tab10")(i % 10) for i, name in enumerate(modules)}


def smooth(values: Sequence[float]) -> np.ndarray:
    """Moving average over a twentieth of the values, at least three, and less at both ends.

    >>> smooth([3.0] * 9 + [9.0])[-2:].tolist()
    [5.0, 9.0]
    """
    n, half = len(values), max(1, len(values) // 40)
    if n < 10:
        return np.array(values)
    reach = [min(half, i, n - 1 - i) for i in range(n)]
    return np.array([np.mean(values[i - r : i + r + 1]) for i, r in enumerate(reach)])


def drops_of(lr: tuple[Sequence[int], Sequence[float]]) -> list[int]:
    """The iterations where a learning rate that was, or then is, constant falls by a third or more:
    a step, and no smooth decay."""
    iterations, rates = lr
    flat = [math.isclose(a, b) for a, b in itertools.pairwise(rates)]
    near = [False, *flat, False]  # near[i], near[i + 2]: before and after the step i -> i + 1
    return [
        iterations[i + 1]
        for i in range(len(flat))
        if rates[i + 1] < rates[i] * 2 / 3 and (near[i] or near[i + 2])
    ]


def plot(output_dir: str, picture: str | None = None) -> str:
    """Draw variances, LR factors and noise scales of all modules, losses, learning rate; return
    the PNG's path.

    Args:
        output_dir: folder with a metrics.json.
        picture: the PNG to write; OUTPUT_DIR/agvm.png by default.

    Raises:
        FileNotFoundError, ValueError: no metrics.json, or one without AGVM's scalars.
    """
    path = os.path.join(output_dir, "metrics.json")
    series = read_metrics(path)
    modules = modules_of(series, "variance")
    if not modules:
        raise ValueError(
            f"{path} has no agvm/variance/... scalars: the run ended before AGVM.START_ITER, had "
            "one worker and no micro-batches, or AGVM.ENABLED was False."
        )
    value = read_config(output_dir)
    batch = value("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size")
    rule, mode = value("AGVM.RULE", "agvm.rule"), value("AGVM.MODE", "agvm.mode")
    start = value("AGVM.START_ITER", "agvm.start_iter", -1)
    if start == -1 and value("AGVM.SCHEDULE", "agvm.schedule") == "gain":
        start = 0
    measured = sorted({i for m in modules for i in series[f"agvm/variance/{m}"][0]})
    marks = {"AGVM starts": ([start if is_int(start) and start >= 0 else measured[0]], ":")}
    marks["learning rate drops"] = (drops_of(series.get("lr", ((), ()))), "--")
    colours = {**colours_of(modules), "model": "black"}
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), layout="constrained")
        (variance, factor, noise), (loss, rate, legends) = axes
        for name in modules:
            _smoothed(variance, series[f"agvm/variance/{name}"], colours[name], name)
        for name in modules_of(series, "lr_scale"):
            factor.plot(*series[f"agvm/lr_scale/{name}"], color=colours.get(name, "black"), lw=1.4)
        for name in modules_of(series, "noise_scale"):
            known = dict(zip(*series[f"agvm/noise_scale/{name}"], strict=True))
            images = [known.get(i, np.nan) for i in measured]  # a gap where noise drowned all
            noise.plot(measured, images, ".-", color=colours.get(name), label=name, lw=1.4, ms=2)
        if noise.lines and is_int(batch):
            noise.axhline(batch, color="0.7", lw=3, zorder=0)
            where: Any = ("axes fraction", "data")
            noise.annotate(f"batch {batch}", (0, batch), (2, 3), where, "offset points")
        if "total_loss" in series:  # a loop of one's own may not write it
            _smoothed(loss, series["total_loss"], "0.3", "total_loss")
        names = [n for n in sorted(series) if "loss" in n and "/" not in n and n != "total_loss"]
        for i, name in enumerate(names):  # muted: no loss is to look like a module
            _smoothed(loss, series[name], plt.get_cmap("tab20b")(4 * i % 19), name)
        if "lr" in series:
            rate.plot(*series["lr"], color="black", lw=1.4)
        variance.set_ylim(bottom=0)
        factor.axhline(1, color="0.7", lw=0.8, zorder=0)
        for axis, title in (
            (variance, "gradient variance $\\phi$"),
            (factor, f"factor $\\mu$ on the learning rate{', not used' * (mode == 'monitor')}"),
            (noise, "noise scale, images"),
            (loss, "losses"),
            (rate, "learning rate before the factors"),
        ):
            axis.set(title=title, xlabel="iteration")
            axis.sharex(variance)
            for iterations, style in marks.values():
                for iteration in iterations:
                    axis.axvline(iteration, color="0.4", lw=0.8, ls=style, zorder=0)
        for axis in (noise, loss, rate):
            axis.set_yscale("log")
            plain_log(axis.yaxis)
        _legends(legends, (noise if noise.lines else variance, loss), marks)
        said = (("batch", batch), ("AGVM.RULE", rule))
        words = [f"{name} {found}" for name, found in said if found is not None]
        if mode == "monitor":
            words.append("only monitored: the factors were measured and not used")
        figure.suptitle(", ".join(words), weight="bold")
        picture = picture or os.path.join(output_dir, "agvm.png")
        figure.savefig(picture, dpi=140)
        plt.close(figure)
    return picture


def plain_log(axis: Axis) -> None:
    """Numbers such as 0.4 and 1,000 on a log axis, as many as its range, which is drawn, has room
    for."""
    low, high = axis.get_view_interval()
    subs = (1, 1.5, 2, 3, 4, 6) if high < 15 * low else (1, 3) if high < 1000 * low else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter(NullFormatter())


def _smoothed(axis: Axes, curve: tuple, colour: Any, label: str) -> None:
    """The moving average of a curve, above a pale one of its values."""
    axis.plot(*curve, color=colour, lw=0.8, alpha=0.35)
    axis.plot(curve[0], smooth(curve[1]), color=colour, label=label, lw=1.4)


def _legends(axis: Axes, panels: Sequence[Axes], marks: dict) -> None:
    """Those of the panels side by side, of the vertical lines below, and how to read them."""
    axis.axis("off")
    for panel, x, title in zip(panels, (0, 0.5), ("modules", "losses"), strict=True):
        handles, labels = panel.get_legend_handles_labels()
        if handles:  # there is room for so many
            legend = axis.legend(
                handles[:10],
                labels[:10],
                title=title,
                alignment="left",
                fontsize=9 if len(labels) < 8 else 7,
                frameon=False,
                loc="upper left",
                bbox_to_anchor=(x, 1.05),
            )
            axis.add_artist(legend)
    lines = [Line2D([], [], color="0.4", lw=0.8, ls=style) for _, style in marks.values()]
    axis.legend(lines, marks, loc="lower left", bbox_to_anchor=(0, 0.14), frameon=False, ncols=2)
    axis.text(
        0,
        -0.1,
        "A batch far below the model's noise scale is mostly\n"
        "noise: a larger one saves iterations. A batch far above\n"
        "it gains little. In a gap, noise drowns the gradient.",
        transform=axis.transAxes,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", help="OUTPUT_DIR of a run")
    parser.add_argument("--out", metavar="PNG", help="default: OUTPUT_DIR/agvm.png")
    args = parser.parse_args(argv)
    try:
        print(plot(args.output_dir, args.out))
    except (OSError, ValueError) as error:
        sys.exit(f"agvm_d2.plot: error: {error}")


if __name__ == "__main__":
    main()
