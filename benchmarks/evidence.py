#!/usr/bin/env python
"""Tables and figures of docs/evidence.md from the runs of benchmarks/large_batch.py.

python benchmarks/evidence.py          # print the tables
python benchmarks/evidence.py --write  # put them into docs/evidence.md, and draw the figures
"""

from __future__ import annotations
import argparse
import json
import os
import statistics
import sys
from collections import defaultdict
from typing import NamedTuple
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from benchmarks.large_batch import EPOCHS, HALVED, LONG, METHODS, RESULTS, scaled  # noqa: E402

DOCUMENT = os.path.join(ROOT, "docs/evidence.md")
BEGIN, END = "<!-- from benchmarks/evidence.py -->\n", "<!-- end -->\n"

NAMES = {
    "sgd": "SGD",
    "agvm": "AGVM",
    "agvm_split": "AGVM, split",
    "averaged": "AGVM of averaged moments",
    "combined": "gain × AGVM",
    "bounded": "AGVM bounded by the gain",
    "gain": "gain per module",
    "gain_averaged": "gain of averaged moments",
    "like_agvm": "constant, as AGVM's",
    "like_gain": "constant, as the gain's",
    "sgd_3": "SGD, backbone ×3",
    "agvm_3": "AGVM, backbone ×3",
    "gain_3": "gain per module, backbone ×3",
    "gain_averaged_3": "gain of averaged moments, backbone ×3",
    "adamw": "AdamW",
    "agvm_adamw": "AGVM on AdamW",
    "gain_adamw": "gain on AdamW",
    "lars": "LARS",
    "lamb": "LAMB",
}
MAIN = ("sgd", "agvm", "gain", "adamw", "agvm_adamw", "lars", "lamb")  # in the figures
COLOURS = dict(zip(NAMES, plt.cm.tab20.colors[::2] + plt.cm.tab20.colors[1::2], strict=False))
KEPT = 0.98  # of the accuracy at batch 16
TUNED = 3  # the seeds up to this one were seen when rates and rules were chosen
FAILED = 1.0  # an accuracy below it is a run that failed, also if no loss was NaN
WORKS = 0.9  # of a method's best accuracy at a batch: a learning rate that works


class Cell(NamedTuple):
    """All runs that differ by learning rate and seed only."""

    pipeline: str
    method: str
    batch: int
    epochs: int
    options: str = ""
    workers: int = 1

    @property
    def varied(self) -> str:
        """What differs from the setting itself."""
        workers = f"{self.workers} workers" if self.workers > 1 else ""
        return ", ".join(filter(None, [workers, self.options and f"`{self.options}`"]))


def read(path: str = RESULTS) -> dict[Cell, dict[float, list[dict]]]:
    """Cell -> learning rate -> its runs, by seed; of a run done twice, the last."""
    runs: dict = {}
    with open(path) as f:
        for row in map(json.loads, f):
            cell = Cell(**{key: row[key] for key in Cell._fields if key in row})
            runs[cell, row["lr"], row["seed"]] = row
    cells: dict = defaultdict(lambda: defaultdict(list))
    for cell, lr, seed in sorted(runs, key=lambda k: (k[0], k[1], k[2])):
        cells[cell][lr].append(runs[cell, lr, seed])
    return cells


def accuracy(rows: list[dict]) -> list[float]:
    return [row["accuracy"] for row in rows]


def spread(values: list[float]) -> str:
    """mean ± sd (n)."""
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f} ({len(values)})" if len(values) > 1 else mean


def best(lrs: dict[float, list[dict]]) -> float:
    """The learning rate with the best mean among those with the most seeds."""
    seeds = max(map(len, lrs.values()))
    return max(
        (lr for lr in lrs if len(lrs[lr]) == seeds),
        key=lambda lr: statistics.fmean(accuracy(lrs[lr])),
    )


def band(lrs: dict[float, list[dict]]) -> str:
    """The learning rates tried whose first seed reaches WORKS of the best first seed."""
    first = {lr: rows[0]["accuracy"] for lr, rows in lrs.items()}
    good = [lr for lr, value in first.items() if value >= WORKS * max(first.values())]
    if min(good) == max(good):
        return f"{good[0]:g}"
    return f"{min(good):g} to {max(good):g} (×{max(good) / min(good):.1f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def order(cell: Cell) -> tuple:
    return cell.pipeline, cell.epochs, cell.batch, [*NAMES].index(cell.method), cell.varied


def by_batch(cells, varied: bool = False) -> str:
    """The cells of the setting itself, or those that vary it."""
    rows = []
    for cell in sorted(cells, key=order):
        if bool(cell.varied) != varied:
            continue
        lrs = cells[cell]
        chosen = best(lrs)
        every = [row for runs in lrs.values() for row in runs]
        rows.append(
            [
                cell.pipeline,
                f"{cell.epochs}",
                f"{cell.batch}",
                NAMES[cell.method],
                spread(accuracy(lrs[chosen])),
                f"{chosen:g}",
                *([cell.varied] if varied else []),
                f"{every[0]['iterations']}",
                f"{sum(row['accuracy'] < FAILED for row in every)} of {len(every)}",
                f"{statistics.median(row['seconds'] for row in every):.0f}",
            ]
        )
    head = ["pipeline", "epochs", "batch", "method", "accuracy, best LR tried", "LR"]
    head += [*(["varied"] if varied else []), "iterations", "failed", "s a run"]
    return table(head, rows)


def by_lr(cells) -> str:
    parts = []
    places = sorted({(c.pipeline, c.batch, c.epochs) for c in cells if not c.varied})
    for pipeline, batch, epochs in places:
        chosen = {
            c.method: lrs
            for c, lrs in cells.items()
            if (c.pipeline, c.batch, c.epochs, c.varied) == (pipeline, batch, epochs, "")
        }
        grid = sorted({lr for lrs in chosen.values() for lr in lrs})
        rows = [
            [
                NAMES[m],
                *(spread(accuracy(chosen[m][lr])) if lr in chosen[m] else "" for lr in grid),
            ]
            for m in NAMES
            if m in chosen
        ]
        parts.append(
            f"{pipeline}, batch {batch}, {epochs} epochs:\n\n"
            + table(["method \\ LR", *(f"{lr:g}" for lr in grid)], rows)
        )
    return "\n".join(parts)


def small(cells, cell: Cell) -> dict[float, list[dict]] | None:
    """The runs at batch 16 that this cell is held against: of its optimizer without AGVM."""
    plain = METHODS[cell.method].plain
    return cells.get(cell._replace(method=plain, batch=16, options="", workers=1))


def by_rule(cells, cell: Cell, rule: str) -> list[dict] | None:
    """The runs at the learning rate that a rule derives from the best one at batch 16."""
    reference = small(cells, cell)
    if reference is None:
        return None
    lr = scaled(best(reference), cell.batch, rule)
    return next((rows for x, rows in cells[cell].items() if abs(x / lr - 1) < 1e-3), None)


def untuned(cells) -> str:
    rows = []
    for cell in sorted(cells, key=order):
        if cell.varied or cell.batch == 16 or small(cells, cell) is None:
            continue
        found = [by_rule(cells, cell, rule) for rule in ("none", "sqrt", "linear-sqrt", "linear")]
        tuned = spread(accuracy(cells[cell][best(cells[cell])]))
        rows.append(
            [cell.pipeline, f"{cell.epochs}", f"{cell.batch}", NAMES[cell.method]]
            + [spread(accuracy(runs)) if runs else "" for runs in found]
            + [tuned]
        )
    head = ["pipeline", "epochs", "batch", "method", "batch 16's LR", "square root", "paper's rule"]
    return table([*head, "linear", "best LR tried"], rows)


def paired(cells) -> str:
    """Each method against its optimizer without AGVM, and the gain against AGVM too, seed by seed.

    A seed's images and heads start alike for all methods, the backbone for those of one torch.
    """
    rows = []
    for cell in sorted(cells, key=order):
        plain = METHODS[cell.method].plain
        rivals = [plain, *([cell.method.replace("gain", "agvm")] if "gain" in cell.method else [])]
        for rival in rivals:
            against = cells.get(cell._replace(method=rival))
            if cell.varied or rival == cell.method or against is None:
                continue
            own, theirs = (
                {row["seed"]: row for row in lrs[best(lrs)]} for lrs in (cells[cell], against)
            )
            found = {
                seed: (own[seed]["accuracy"] - theirs[seed]["accuracy"])
                for seed in sorted(own.keys() & theirs.keys())
            }
            mixed = {seed for seed in found if own[seed]["torch"] != theirs[seed]["torch"]}
            held_out = [x for seed, x in found.items() if seed > TUNED]
            rows.append(
                [cell.pipeline, f"{cell.epochs}", f"{cell.batch}"]
                + [f"{NAMES[cell.method]} − {NAMES[rival]}"]
                + [", ".join(f"{x:+.1f}" + "†" * (seed in mixed) for seed, x in found.items())]
                + [difference([*found.values()]), difference(held_out)]
            )
    head = ["pipeline", "epochs", "batch", "methods", "difference by seed", "mean ± sd"]
    return table([*head, f"seeds {TUNED + 1} on"], rows)


def difference(values: list[float]) -> str:
    """mean ± sd, with its sign."""
    if len(values) < 2:
        return ""
    return f"{statistics.fmean(values):+.1f} ± {statistics.stdev(values):.1f}"


def kept(cells) -> str:
    """The largest batch at which a method keeps KEPT of its optimizer's accuracy at batch 16."""
    tuned: dict = defaultdict(dict)
    ruled: dict = defaultdict(dict)
    for cell in cells:
        reference = None if cell.varied else small(cells, cell)
        if reference is None:
            continue
        base = statistics.fmean(accuracy(reference[best(reference)]))
        key = cell.pipeline, cell.epochs, cell.method
        tuned[key][16] = ruled[key][16] = 1.0
        for shares, rows in (
            (tuned, cells[cell][best(cells[cell])]),
            (ruled, by_rule(cells, cell, METHODS[cell.method].lr_rule)),
        ):
            if rows:
                shares[key][cell.batch] = statistics.fmean(accuracy(rows)) / base
    rows = [
        [
            pipeline,
            f"{epochs}",
            NAMES[method],
            *(
                (
                    f"{max(b for b, x in shares.items() if x >= KEPT)}: "
                    + ", ".join(f"{100 * shares[b]:.1f} % at {b}" for b in sorted(shares) if b > 16)
                    if len(shares) > 1
                    else ""
                )
                for shares in (tuned[key], ruled[key])
            ),
        ]
        for key in sorted(tuned, key=lambda k: (k[0], k[1], [*NAMES].index(k[2])))
        if len(tuned[key]) > 1
        for pipeline, epochs, method in [key]
    ]
    head = [f"largest batch that keeps {KEPT:.0%}, {how}" for how in ("best LR tried", "by rule")]
    return table(["pipeline", "epochs", "method", *head], rows)


def bands(cells) -> str:
    """The learning rates that work, by batch, where a search has ended: the best lies inside."""
    found: dict = defaultdict(dict)
    for cell, lrs in cells.items():
        if not cell.varied and min(lrs) < best(lrs) < max(lrs):
            found[cell.pipeline, cell.epochs, cell.method][cell.batch] = band(lrs)
    batches = sorted({batch for row in found.values() for batch in row})
    rows = [
        [pipeline, f"{epochs}", NAMES[method], *(row.get(b, "") for b in batches)]
        for (pipeline, epochs, method), row in sorted(
            found.items(), key=lambda item: (item[0][0], item[0][1], [*NAMES].index(item[0][2]))
        )
    ]
    head = ["pipeline", "epochs", "method", *(f"batch {batch}" for batch in batches)]
    return table(head, rows)


def variances(cells) -> str:
    rows = []
    for cell in sorted(cells, key=order):
        if cell.method not in ("sgd", "agvm", "adamw") or cell.options not in ("", HALVED):
            continue
        row = cells[cell][best(cells[cell])][0]
        for part in ("before_drop", "after_drop"):
            found = {m: v[part] for m, v in row["variance"].items() if part in v}
            if found:
                rows.append(
                    [
                        cell.pipeline,
                        f"{cell.epochs}",
                        f"{cell.batch}" + (", micro-batches of 8" if cell.options else ""),
                        NAMES[cell.method],
                        part.split("_")[0],
                        ", ".join(f"{m} {v:.2f}" for m, v in found.items()),
                    ]
                )
    head = ["pipeline", "epochs", "batch", "method", "LR drop", "mean variance φ"]
    return table(head, rows)


def mean_sd(rows: list[dict]) -> tuple[float, float]:
    values = accuracy(rows)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def log_axis(axis, ticks: list[float]) -> None:
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.minorticks_off()


def legend(axis, columns: int = 1) -> None:
    if axis.get_legend_handles_labels()[0]:  # nothing may be drawn yet
        axis.legend(frameon=False, fontsize=8, ncols=columns)


def plot(axis, method: str, points: dict[float, tuple[float, float]]) -> None:
    """Mean and sd against a batch or a learning rate."""
    if points:
        style = {"marker": "o", "label": NAMES[method], "color": COLOURS[method], "capsize": 3}
        axis.errorbar([*points], *zip(*points.values(), strict=True), **style)


def draw(cells, folder: str) -> None:
    """Faster R-CNN: AP against batch, AP against LR, variances, factors: evidence.png."""
    rcnn = {c: cells[c] for c in sorted(cells, key=order) if c.pipeline == "faster_rcnn"}
    grid = {c: lrs for c, lrs in rcnn.items() if not c.varied}
    figure, axes = plt.subplots(2, 4, figsize=(19, 8), layout="constrained")
    axes = axes.flatten()
    for axis, epochs in zip(axes[:2], (EPOCHS, LONG), strict=True):
        for method in MAIN:
            own = [c for c in grid if (c.method, c.epochs) == (method, epochs)]
            points = {c.batch: mean_sd(grid[c][best(grid[c])]) for c in own}
            reference = small(cells, own[0]) if own else None
            if reference:  # with one gradient, the optimizer alone
                points = {16: mean_sd(reference[best(reference)])} | points
            plot(axis, method, points)
        axis.set(xlabel="batch", ylabel="box AP, best learning rate tried")
        axis.set(title=f"{epochs} epochs")
        log_axis(axis, sorted({c.batch for c in grid}))
        legend(axis)
    for axis, batch in zip(axes[2:5], (64, 128, 256), strict=True):
        for method in (*MAIN, "gain_averaged"):
            lrs = grid.get(Cell("faster_rcnn", method, batch, EPOCHS), {})
            plot(axis, method, {lr: mean_sd(rows) for lr, rows in lrs.items()})
        legend(axis)
        axis.set(xlabel="learning rate", ylabel="box AP", title=f"batch {batch}, {EPOCHS} epochs")
        log_axis(axis, [0.002, 0.01, 0.04, 0.16, 0.64, 4])

    bars = [
        (cell, lrs[best(lrs)][0]["variance"])
        for cell, lrs in rcnn.items()
        if (cell.method, cell.epochs) == ("sgd", EPOCHS) and cell.options in ("", HALVED)
    ]
    bars = [(cell, found) for cell, found in bars if any(found.values())]
    for i, (cell, found) in enumerate(bars):
        width = 0.8 / len(bars)
        values = [v.get("before_drop", 0) for v in found.values()]
        places = [x + i * width for x in range(len(values))]
        axes[5].bar(places, values, 0.9 * width, label=f"batch {cell.batch}")
        axes[5].set_xticks([x + 0.4 - width / 2 for x in range(len(values))], [*found])
    axes[5].set(ylabel="variance φ before the LR drop", title="SGD", ylim=(0, 1.35))
    legend(axes[5], columns=len(bars))

    for axis, method in zip(axes[6:], ("agvm", "gain"), strict=True):
        lrs = grid.get(Cell("faster_rcnn", method, 128, EPOCHS))
        if lrs:
            scale = lrs[best(lrs)][0]["lr_scale"]
            for module in (m for m in scale if m != "iteration"):
                axis.plot(scale["iteration"], scale[module], label=module)
            legend(axis)
        axis.set(xlabel="iteration", ylabel="LR factor", title=f"{NAMES[method]}, batch 128")
    figure.savefig(os.path.join(folder, "evidence.png"), dpi=100)


def report(cells) -> str:
    runs = [row for lrs in cells.values() for rows in lrs.values() for row in rows]
    machines = ", ".join(sorted({row["machine"] for row in runs}))
    return "\n".join(
        [
            f"{len(runs)} runs, {sum(row['seconds'] for row in runs) / 3600:.1f} hours of one core "
            f"({machines}; torch {', '.join(sorted({row['torch'] for row in runs}))}).\n",
            "### The largest batch\n",
            kept(cells),
            f"### Learning rates within {1 - WORKS:.0%} of the best accuracy\n",
            bands(cells),
            "### Accuracy against batch\n",
            by_batch(cells),
            "### Seed by seed\n",
            paired(cells),
            "### By rule\n",
            untuned(cells),
            "### Accuracy against learning rate\n",
            by_lr(cells),
            "### Other settings\n",
            by_batch(cells, varied=True),
            "### Variances\n",
            variances(cells),
        ]
    )


def write(text: str, path: str = DOCUMENT) -> None:
    with open(path) as f:
        before, rest = f.read().split(BEGIN)
    with open(path, "w") as f:
        f.write(before + BEGIN + "\n" + text + "\n" + END + rest.split(END)[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--results", default=RESULTS, metavar="JSONL")
    args = parser.parse_args()
    cells = read(args.results)
    text = report(cells)
    if args.write:
        write(text)
        draw(cells, os.path.join(ROOT, "docs"))
    else:
        print(text)


if __name__ == "__main__":
    main()
