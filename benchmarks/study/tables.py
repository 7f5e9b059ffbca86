"""The tables of docs/evidence-tables.md."""

from __future__ import annotations
import statistics
from collections import defaultdict

from .methods import METHODS, scaled
from .plan import HALVED
from .results import ROOT, UNIT, Cell, Cells

DOCUMENT = ROOT / "docs/evidence-tables.md"
BEGIN, END = "<!-- from python -m benchmarks.study tables -->\n", "<!-- end -->\n"
KEPT = 0.98  # of the accuracy at batch 16
TUNED = 3  # the seeds up to this one were seen when rates and rules were chosen
FAILED = 1.0  # an accuracy below it is a run that failed, also if no loss was NaN
WORKS = 0.9  # of a method's best accuracy at a batch: a learning rate that works


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
    return cell.pipeline, cell.epochs, cell.batch, [*METHODS].index(cell.method), cell.varied


def by_batch(cells: Cells, varied: bool = False) -> str:
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
                METHODS[cell.method].label,
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


def by_lr(cells: Cells) -> str:
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
                METHODS[m].label,
                *(spread(accuracy(chosen[m][lr])) if lr in chosen[m] else "" for lr in grid),
            ]
            for m in METHODS
            if m in chosen
        ]
        parts.append(
            f"{pipeline}, batch {batch}, {epochs} epochs:\n\n"
            + table(["method \\ LR", *(f"{lr:g}" for lr in grid)], rows)
        )
    return "\n".join(parts)


def small(cells: Cells, cell: Cell) -> dict[float, list[dict]] | None:
    """The runs at batch 16 that this cell is held against: of its optimizer without AGVM."""
    plain = METHODS[cell.method].plain
    return cells.get(cell._replace(method=plain, batch=UNIT, options="", workers=1))


def by_rule(cells: Cells, cell: Cell, rule: str) -> list[dict] | None:
    """The runs at the learning rate that a rule derives from the best one at batch 16."""
    reference = small(cells, cell)
    if reference is None:
        return None
    lr = scaled(best(reference), cell.batch, rule)
    return next((rows for x, rows in cells[cell].items() if abs(x / lr - 1) < 1e-3), None)


def untuned(cells: Cells) -> str:
    rows = []
    for cell in sorted(cells, key=order):
        if cell.varied or cell.batch == UNIT or small(cells, cell) is None:
            continue
        found = [by_rule(cells, cell, rule) for rule in ("none", "sqrt", "linear-sqrt", "linear")]
        tuned = spread(accuracy(cells[cell][best(cells[cell])]))
        rows.append(
            [cell.pipeline, f"{cell.epochs}", f"{cell.batch}", METHODS[cell.method].label]
            + [spread(accuracy(runs)) if runs else "" for runs in found]
            + [tuned]
        )
    head = ["pipeline", "epochs", "batch", "method", "batch 16's LR", "square root", "paper's rule"]
    return table([*head, "linear", "best LR tried"], rows)


def paired(cells: Cells) -> str:
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
                + [f"{METHODS[cell.method].label} − {METHODS[rival].label}"]
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


def place(key: tuple[str, int, str]) -> tuple:
    """Of (pipeline, epochs, method) in a table."""
    return *key[:2], [*METHODS].index(key[2])


def largest(shares: dict[int, float]) -> str:
    """Of the batches, by their share of the accuracy at batch 16."""
    above = [f"{100 * shares[b]:.1f} % at {b}" for b in sorted(shares) if b > UNIT]
    return f"{max(b for b, x in shares.items() if x >= KEPT)}: {', '.join(above)}" if above else ""


def kept(cells: Cells) -> str:
    """The largest batch at which a method keeps KEPT of its optimizer's accuracy at batch 16."""
    tuned: dict = defaultdict(dict)
    ruled: dict = defaultdict(dict)
    for cell in cells:
        reference = None if cell.varied else small(cells, cell)
        if reference is None:
            continue
        base = statistics.fmean(accuracy(reference[best(reference)]))
        key = cell.pipeline, cell.epochs, cell.method
        tuned[key][UNIT] = ruled[key][UNIT] = 1.0
        for shares, rows in (
            (tuned, cells[cell][best(cells[cell])]),
            (ruled, by_rule(cells, cell, METHODS[cell.method].lr_rule)),
        ):
            if rows:
                shares[key][cell.batch] = statistics.fmean(accuracy(rows)) / base
    rows = []
    for key in sorted(tuned, key=place):
        if len(tuned[key]) > 1:
            row = [key[0], f"{key[1]}", METHODS[key[2]].label]
            rows.append([*row, largest(tuned[key]), largest(ruled[key])])
    head = [f"largest batch that keeps {KEPT:.0%}, {how}" for how in ("best LR tried", "by rule")]
    return table(["pipeline", "epochs", "method", *head], rows)


def bands(cells: Cells) -> str:
    """The learning rates that work, by batch, where a search has ended: the best lies inside."""
    found: dict = defaultdict(dict)
    for cell, lrs in cells.items():
        if not cell.varied and min(lrs) < best(lrs) < max(lrs):
            found[cell.pipeline, cell.epochs, cell.method][cell.batch] = band(lrs)
    batches = sorted({batch for row in found.values() for batch in row})
    rows = [
        [pipeline, f"{epochs}", METHODS[method].label, *(row.get(b, "") for b in batches)]
        for (pipeline, epochs, method), row in sorted(
            found.items(), key=lambda item: place(item[0])
        )
    ]
    head = ["pipeline", "epochs", "method", *(f"batch {batch}" for batch in batches)]
    return table(head, rows)


def variances(cells: Cells) -> str:
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
                        METHODS[cell.method].label,
                        part.split("_")[0],
                        ", ".join(f"{m} {v:.2f}" for m, v in found.items()),
                    ]
                )
    head = ["pipeline", "epochs", "batch", "method", "LR drop", "mean variance φ"]
    return table(head, rows)


def report(cells: Cells) -> str:
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


def write(text: str) -> None:
    """Put the tables into the page."""
    before, rest = DOCUMENT.read_text().split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.split(END)[1])
