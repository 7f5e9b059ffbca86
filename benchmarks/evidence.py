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
from collections import defaultdict
from typing import NamedTuple
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "benchmarks/results/large_batch.jsonl")
DOCUMENT = os.path.join(ROOT, "docs/evidence.md")
BEGIN, END = "<!-- from benchmarks/evidence.py -->\n", "<!-- end -->\n"

NAMES = {
    "sgd": "SGD",
    "agvm": "AGVM",
    "agvm_split": "AGVM, split",
    "averaged": "AGVM of averaged moments",
    "gain": "gain per module",
    "adamw": "AdamW",
    "agvm_adamw": "AGVM on AdamW",
    "lars": "LARS",
    "lamb": "LAMB",
}
COLOURS = dict(zip(NAMES, plt.cm.tab10.colors, strict=False))
KEPT = 0.98  # of the accuracy at batch 16
WORKS = 0.9  # of a method's best accuracy at a batch: a learning rate that works


class Cell(NamedTuple):
    """All runs that differ by learning rate and seed only."""

    pipeline: str
    method: str
    batch: int
    epochs: int
    options: str


def read(path: str = RESULTS) -> dict[Cell, dict[float, list[dict]]]:
    """Cell -> learning rate -> its runs, by seed; of a run done twice, the last."""
    runs: dict = {}
    with open(path) as f:
        for row in map(json.loads, f):
            cell = Cell(*(row[key] for key in Cell._fields))
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


def by_batch(cells, varied: bool = False) -> str:
    """The cells of the setting itself, or those that vary it by config keys."""
    rows = []
    for cell, lrs in sorted(
        cells.items(), key=lambda x: (x[0].pipeline, x[0].batch, [*NAMES].index(x[0].method))
    ):
        if bool(cell.options) != varied:
            continue
        chosen = best(lrs)
        every = [row for runs in lrs.values() for row in runs]
        rows.append(
            [
                cell.pipeline,
                f"{cell.batch}",
                NAMES[cell.method],
                spread(accuracy(lrs[chosen])),
                f"{chosen:g}",
                band(lrs),
                f"{every[0]['iterations']}",
                f"{sum(row['diverged_at'] is not None for row in every)} of {len(every)}",
                f"{statistics.median(row['seconds'] for row in every):.0f}",
                *([f"`{cell.options}`"] if varied else []),
            ]
        )
    head = ["pipeline", "batch", "method", "accuracy, tuned", "LR", "LRs that work", "iterations"]
    return table([*head, "diverged", "s a run", *(["varied"] if varied else [])], rows)


def by_lr(cells) -> str:
    parts = []
    places = sorted({(c.pipeline, c.batch, c.epochs) for c in cells if not c.options})
    for pipeline, batch, epochs in places:
        chosen = {
            c.method: lrs
            for c, lrs in cells.items()
            if (c.pipeline, c.batch, c.epochs, c.options) == (pipeline, batch, epochs, "")
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


def kept(cells) -> str:
    """The largest batch at which a method keeps KEPT of its optimizer's accuracy at batch 16."""
    base = {"agvm_adamw": "adamw", "agvm": "sgd", "agvm_split": "sgd", "averaged": "sgd"}
    base["gain"] = "sgd"
    tuned: dict = defaultdict(dict)
    for cell, lrs in cells.items():
        if not cell.options:
            tuned[cell.pipeline, cell.epochs, cell.method][cell.batch] = statistics.fmean(
                accuracy(lrs[best(lrs)])
            )
    rows = []
    for (pipeline, epochs, method), values in sorted(tuned.items()):
        reference = tuned.get((pipeline, epochs, base.get(method, method)), {}).get(16)
        if reference is None:
            continue
        reached = [b for b, v in {16: reference, **values}.items() if v >= KEPT * reference]
        shares = ", ".join(f"{b}: {100 * v / reference:.0f} %" for b, v in sorted(values.items()))
        rows.append([pipeline, NAMES[method], f"{max(reached)}", shares])
    head = ["pipeline", "method, tuned", f"largest batch that keeps {KEPT:.0%}"]
    return table([*head, "share of the accuracy at batch 16"], rows)


def variances(cells) -> str:
    rows = []
    for cell, lrs in sorted(cells.items()):
        row = lrs[best(lrs)][0]
        for part in ("before_drop", "after_drop"):
            found = {m: v[part] for m, v in row["variance"].items() if part in v}
            if found:
                rows.append(
                    [
                        cell.pipeline + (f", `{cell.options}`" if cell.options else ""),
                        NAMES[cell.method],
                        f"{cell.batch}",
                        part.replace("_", " the first ").replace("drop", "LR drop"),
                        ", ".join(f"{m} {v:.2f}" for m, v in found.items()),
                    ]
                )
    return table(["pipeline", "method", "batch", "when", "mean variance φ"], rows)


def draw(cells, folder: str) -> None:
    """AP against batch, AP against LR at batch 128 and 256, factors: evidence.png."""
    rcnn = {c: lrs for c, lrs in cells.items() if c.pipeline == "faster_rcnn" and not c.options}
    figure, axes = plt.subplots(1, 4, figsize=(17, 3.8), layout="constrained")
    for method, name in NAMES.items():
        points = []
        for cell, lrs in sorted(rcnn.items()):
            if cell.method == method:
                values = accuracy(lrs[best(lrs)])
                sd = statistics.stdev(values) if len(values) > 1 else 0
                points.append((cell.batch, statistics.fmean(values), sd))
        if points:
            axes[0].errorbar(
                *zip(*points, strict=True), capsize=3, marker="o", label=name, color=COLOURS[method]
            )
        for axis, batch in zip(axes[1:3], (128, 256), strict=True):
            for cell, lrs in rcnn.items():
                if (cell.method, cell.batch) == (method, batch):
                    means = [statistics.fmean(accuracy(rows)) for rows in lrs.values()]
                    axis.plot([*lrs], means, marker="o", label=name, color=COLOURS[method])
                    axis.set_title(f"batch {batch}")
    axes[0].set(xscale="log", xlabel="batch", ylabel="box AP, learning rate tuned")
    axes[0].legend(frameon=False, fontsize=8)
    for axis in axes[1:3]:
        axis.set(xscale="log", xlabel="learning rate", ylabel="box AP, mean over seeds")
    for cell, lrs in rcnn.items():
        if (cell.method, cell.batch) == ("agvm", 256):
            scale = lrs[best(lrs)][0]["lr_scale"]
            for module in (m for m in scale if m != "iteration"):
                axes[3].plot(scale["iteration"], scale[module], label=module)
            axes[3].legend(frameon=False, fontsize=8)
    axes[3].set(xlabel="iteration", ylabel="LR factor", title="AGVM, batch 256")
    figure.savefig(os.path.join(folder, "evidence.png"), dpi=110)


def report(cells) -> str:
    runs = [row for lrs in cells.values() for rows in lrs.values() for row in rows]
    machines = ", ".join(sorted({row["machine"] for row in runs}))
    return "\n".join(
        [
            f"{len(runs)} runs, {sum(row['seconds'] for row in runs) / 3600:.1f} hours of one core "
            f"({machines}; torch {', '.join(sorted({row['torch'] for row in runs}))}).\n",
            "### The largest batch\n",
            kept(cells),
            "### Accuracy against batch\n",
            by_batch(cells),
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
