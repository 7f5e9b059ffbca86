"""`python -m agvm_d2.plan OUTPUT_DIR --batches 64 128 256`: from one run's noise scales, how many
iterations and images `AGVM.SCHEDULE gain` needs at each batch, and what more GPUs would buy."""

from __future__ import annotations
import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple
import matplotlib.pyplot as plt  # plot.py has chosen the backend
import numpy as np

from .plot import colours_of, modules_of, plain_log, read_config, read_metrics
from .progress import foretell, signal_of
from .settings import AVERAGING_OF_GAIN, averaging
from .validate import is_int

FLAT = 0.9  # of the time: what twice the batch still takes where it is hardly worth it
LIMITS = (
    "It assumes that the noise scale depends on how far training is and not on the batch, and that "
    "the run has measured it well: an average lags behind, at the start and after a drop of the "
    "learning rate, and few gradients per iteration measure a large noise scale badly."
)
HOURS = (
    " Images per second per GPU are taken as they are at any batch; few images per GPU, or many "
    "GPUs, make them fewer."
)
ENOUGH = 0.5  # share of training that should have been measured
LONGER = 1.1  # of training: no single run is


class Measured(NamedTuple):
    """What a run says about noise."""

    base: int  # images of the batch that `iterations` is for
    iterations: int  # that training lasts with it
    # Module -> (share of training, images; inf where noise drowned the gradient).
    noise: dict[str, tuple[np.ndarray, np.ndarray]]
    averaging: tuple[int, float] = AVERAGING_OF_GAIN  # that training by the gain will have


class Row(NamedTuple):
    """Training at one batch."""

    batch: int
    iterations: int
    images: int


def read_run(output_dir: str, base: int | None = None) -> Measured:
    """A run's noise scales, from its config.yaml and metrics.json.

    Args:
        base: images of the base batch; by default AGVM.BASE_BATCH_SIZE with AGVM.RULE "gain", else
            the run's own batch.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or has no noise scale.
    """
    path = os.path.join(output_dir, "config.yaml")
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"'{path}' is not there: give the OUTPUT_DIR of a run. A loop of your own writes it "
            "with Detectron2's default_setup(cfg, args); SOLVER: {IMS_PER_BATCH: N, MAX_ITER: N} "
            "in it is enough for a monitored run."
        )
    value = read_config(output_dir)

    def number(yacs: str, lazy: str, default: int | None = None) -> int:
        found = value(yacs, lazy, default)
        if not is_int(found) or found < 1:
            raise ValueError(f"{path}: {yacs} ({lazy}): found {found!r}, but it must be positive.")
        return found

    batch = number("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size")
    max_iter = number("SOLVER.MAX_ITER", "train.max_iter")
    # A batch below the base's can only be monitored, and its iterations are its own.
    own_base = min(number("AGVM.BASE_BATCH_SIZE", "agvm.base_batch_size", 16), batch)
    by_gain = value("AGVM.SCHEDULE", "agvm.schedule") == "gain"
    own = own_base if by_gain else batch  # that MAX_ITER is for
    base = base or (own_base if value("AGVM.RULE", "agvm.rule") == "gain" else batch)
    follows = by_gain and value("AGVM.MODE", "agvm.mode", "modulate") == "modulate"
    series = read_metrics(os.path.join(output_dir, "metrics.json"))
    if "agvm/noise_scale/model" not in series:
        raise ValueError(
            f"{output_dir} has no agvm/noise_scale/model in its metrics.json: nothing was "
            "measured, or all was noise. Train with AGVM.ENABLED True (AGVM.MODE monitor is "
            "enough), AGVM.START_ITER 0 (by default it is 100 iterations after the warm-up), and "
            "two workers or micro-batches; AGVMHook needs its batch_size."
        )
    progress = dict(zip(*series.get("agvm/progress", ((), ())), strict=True))
    if not progress:
        raise ValueError(f"{output_dir} has no agvm/progress: it is a run of version 0.1.")
    reached = {i: progress[i] if follows else i for i in progress}
    last = max(reached.values())
    if last > LONGER * max_iter:
        raise ValueError(
            f"{output_dir}: its metrics.json goes to iteration {last:.0f}, but config.yaml has "
            f"SOLVER.MAX_ITER (train.max_iter) {max_iter}: it holds several runs. Give the folder "
            "of one."
        )
    noise = {}
    for name in modules_of(series, "noise_scale"):
        images = dict(zip(*series[f"agvm/noise_scale/{name}"], strict=True))
        # Measured, but without a noise scale: the gradient was drowned by it.
        points = sorted((place, images.get(i, np.inf)) for i, place in reached.items())
        share, scale = np.array(points).T
        noise[name] = (share / max_iter, np.where(np.isnan(scale), np.inf, scale))
    own_averaging = AVERAGING_OF_GAIN
    if value("AGVM.RULE", "agvm.rule") == "gain":
        interval = value("AGVM.INTERVAL", "agvm.interval", -1)
        own_averaging = averaging("gain", interval, value("AGVM.MOMENTUM", "agvm.momentum", -1))
    iterations = round(max_iter * own / base)
    if not iterations:
        raise ValueError(f"--base-batch {base}: is too large for a run of {max_iter * own} images.")
    return Measured(base, iterations, noise, own_averaging)


def coverage(measured: Measured) -> str:
    """Which part of training was measured, and which module is the slowest, in words."""
    share, _ = measured.noise["model"]
    first, last = 100 * share[0], 100 * share[-1]
    text = f"Measured from {first:.0f} to {last:.0f} % of training, and taken to stay so outside."
    if last - first < 100 * ENOUGH:
        text += (
            " That is little: the noise scale changes while training, most of all at the drops of "
            "the learning rate. Let the run go to its end, with AGVM.START_ITER 0."
        )
    modules = _of_modules(measured)
    least = np.argmin(list(modules.values()), axis=0)  # of noise, and so of gain
    name, times = Counter(np.array(list(modules))[least].tolist()).most_common(1)[0]
    return text + f" The smallest gain counts: {100 * times / len(least):.0f} % of it {name}'s."


def _of_modules(measured: Measured) -> dict[str, np.ndarray]:
    """Noise scales, all measured at the same shares of training."""
    return {name: images for name, (_, images) in measured.noise.items() if name != "model"}


def predict(measured: Measured, batch: int) -> Row:
    """Training by the gain as it will go, from its first iteration on, with the run's own
    AGVM.INTERVAL and MOMENTUM if its rule is the gain, else the defaults for it.

    Raises:
        ValueError: a batch below the base batch.
    """
    if batch < measured.base:
        raise ValueError(f"--batches: {batch} is below the base batch, {measured.base} images.")
    share, _ = measured.noise["model"]
    modules = zip(*_of_modules(measured).values(), strict=True)
    signal = list(zip(share.tolist(), map(signal_of, modules), strict=True))
    iterations = foretell(signal, measured.base, batch, measured.iterations, measured.averaging)
    return Row(batch, iterations, iterations * batch)


def is_flat(measured: Measured, row: Row) -> bool:
    """Does twice the batch, on twice the GPUs, take nearly as long?"""
    return predict(measured, 2 * row.batch).iterations > FLAT * row.iterations


def table(
    measured: Measured, rows: Sequence[Row], gpus: Sequence[int], images_per_second: float | None
) -> str:
    """Text, a line for each batch.

    Args:
        images_per_second: of one GPU; without it there are no hours.
    """
    base_images = measured.base * measured.iterations
    head = ["batch", "iterations", "fewer", "images", "efficiency"]
    head += [f"hours on {n}" for n in gpus if images_per_second]
    head += ["GPU-hours"] if images_per_second else []
    lines = [head]
    for row in rows:
        line = [
            str(row.batch),
            f"{row.iterations:,}",
            f"{measured.iterations / row.iterations:.1f}x",
            f"{row.images:,}",
            f"{100 * base_images / row.images:.0f} %",
        ]
        if images_per_second:
            seconds = row.images / images_per_second
            line += [f"{seconds / n / 3600:.2f}" if n <= row.batch else "-" for n in gpus]
            line += [f"{seconds / 3600:.2f}"]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    flat = next((row.batch for row in rows if is_flat(measured, row)), None)
    marks = ["", *("  <- twice the GPUs hardly save time" if r.batch == flat else "" for r in rows)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + mark
        for line, mark in zip(lines, marks, strict=True)
    )


def draw(measured: Measured, rows: Sequence[Row], picture: str) -> None:
    """Time against cost, and the noise scales over training, as a PNG."""
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        base_images = measured.base * measured.iterations
        if all(row.batch != measured.base for row in rows):
            rows = [Row(measured.base, measured.iterations, base_images), *rows]
        time = [row.iterations / measured.iterations for row in rows]
        cost = [row.images / base_images for row in rows]
        left.plot(cost, time, "o-", color="black", lw=1.4)
        for row, x, y in zip(rows, cost, time, strict=True):
            left.annotate(f"{row.batch}", (x, y), (4, 4), textcoords="offset points")
        left.set(
            xlabel=f"images / those of batch {measured.base}",
            ylabel=f"iterations / those of batch {measured.base}",
            title="each batch: what it costs, how long it takes",
            xscale="log",
            yscale="log",
        )
        plain_log(left.xaxis)
        plain_log(left.yaxis)
        names = [name for name in measured.noise if name != "model"]
        colours = {**colours_of(names), "model": "black"}
        for name, (share, images) in measured.noise.items():
            right.plot(100 * share, images, color=colours[name], label=name, lw=1.4)
        right.set(xlabel="% of training", ylabel="noise scale, images", title="noise", yscale="log")
        plain_log(right.yaxis)
        right.legend(frameon=False)
        figure.savefig(picture, dpi=160)
        plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", help="OUTPUT_DIR of any run with AGVM, also in monitor mode")
    parser.add_argument("--batches", type=int, nargs="+", required=True, metavar="N")
    parser.add_argument("--base-batch", type=int, metavar="N", help="default: the run's")
    parser.add_argument("--gpus", type=int, nargs="+", metavar="N", help="default: 1")
    parser.add_argument("--images-per-second", type=float, metavar="X", help="of one GPU")
    parser.add_argument("--out", metavar="PNG", help="default: OUTPUT_DIR/plan.png")
    args = parser.parse_args(argv)
    try:
        for flag, values in (
            ("--batches", args.batches),
            ("--base-batch", [args.base_batch]),
            ("--gpus", args.gpus or []),
            ("--images-per-second", [args.images_per_second]),
        ):
            if not all(value is None or value > 0 for value in values):
                raise ValueError(f"{flag}: found {values}, but it must be positive.")
        if args.gpus and args.images_per_second is None:
            raise ValueError("--gpus: hours on so many need --images-per-second, of one GPU.")
        measured = read_run(args.output_dir, args.base_batch)
        rows = [predict(measured, batch) for batch in sorted(set(args.batches))]
        picture = args.out or os.path.join(args.output_dir, "plan.png")
        print(
            f"# Base: batch {measured.base}, {measured.iterations:,} iterations, "
            f"{measured.base * measured.iterations:,} images.\n"
            + table(measured, rows, args.gpus or [1], args.images_per_second)
            + f"\n# {coverage(measured)}\n# {LIMITS}{HOURS if args.images_per_second else ''}"
        )
        draw(measured, rows, picture)
        print(picture)
    except (OSError, ValueError) as error:
        sys.exit(f"agvm_d2.plan: error: {error}")


if __name__ == "__main__":
    main()
