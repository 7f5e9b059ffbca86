"""What the runs say, as Markdown, and how well the plan foretold them."""

from __future__ import annotations
import statistics
from collections import defaultdict
from collections.abc import Sequence
import numpy as np

from agvm_d2.plan import Measured, predict
from agvm_d2.variance import gain_of

from .curvature import MODEL
from .plan import OPTIONS
from .setting import ARMS, BASE, ITERATIONS, ON_GPU, PARTS, ROOT, Run

DOCUMENT = ROOT / "docs/evidence-tables.md"
BEGIN, END = "<!-- from python -m benchmarks.any_batch tables -->\n", "<!-- end of any_batch -->\n"
Rows = dict[Run, dict]
Cells = dict[Run, list[dict]]  # by seed; the key's own seed is 0


def by_cell(rows: Rows) -> Cells:
    cells: Cells = defaultdict(list)
    for run in sorted(rows):
        cells[run._replace(seed=0)].append(rows[run])
    return cells


def ended(rows: list[dict]) -> list[dict]:
    """Those that did not diverge."""
    return [row for row in rows if row.get("diverged_at") is None]


def spread(values: Sequence[float], form: str = ".1f") -> str:
    mean = f"{statistics.fmean(values):{form}}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):{form}}"


def base_of(cells: Cells, pipeline: str) -> list[dict]:
    """The base batch's runs at the rate that is best there, SGD's."""
    found = [
        rows
        for run, rows in cells.items()
        if (run.pipeline, run.arm, run.batch, run.iterations, run.options)
        == (pipeline, "sgd", BASE, ITERATIONS, "")
    ]
    mean = [statistics.fmean(row["accuracy"] for row in rows) for rows in found]
    return found[mean.index(max(mean))] if found else []


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def label(run: Run) -> str:
    """The method, with what else was changed."""
    options = OPTIONS.get(run.options, run.options)
    return ARMS[run.arm].label + (f", {options}" if options else "")


def all_runs(cells: Cells) -> str:
    """A row for each cell; the means are of runs that did not diverge, where there are any."""
    lines = []
    order = {arm: i for i, arm in enumerate(ARMS)}
    for run, rows in sorted(
        cells.items(), key=lambda c: (c[0].pipeline, c[0].batch, order[c[0].arm])
    ):
        base = base_of(cells, run.pipeline)
        whole = [row["accuracy"] for row in base]
        good = ended(rows)
        diverged, rows = len(rows) - len(good), good or rows
        accuracy, took = ([row[key] for row in rows] for key in ("accuracy", "took"))
        kept = statistics.fmean(accuracy) / statistics.fmean(whole) if base else None
        lines.append(
            [
                run.pipeline,
                str(run.batch),
                label(run),
                f"{run.lr:g}",
                spread(took, ".0f"),
                f"{statistics.fmean(took) / ITERATIONS:.2f}",
                f"{statistics.fmean(took) * run.batch / (ITERATIONS * BASE):.1f}",
                spread(accuracy) + f" ({len(good)})" + bool(diverged) * f", {diverged} diverged",
                "–" if kept is None else f"{100 * kept:.0f} %",
            ]
        )
    head = ["pipeline", "batch", "method", "LR", "iterations", "/ base's", "images / base's"]
    return table([*head, "accuracy (seeds)", "of the base's"], lines)


def measured(row: dict) -> Measured:
    """What a base run says about noise, as `plan.read_run` reads it."""
    curves = row["curves"]
    share = np.array(curves["iteration"]) / row["took"]
    noise = {}
    for name in (key for key in curves if key.startswith("noise_scale/")):
        images = np.array([np.inf if v is None else v for v in curves[name]])
        noise[name.removeprefix("noise_scale/")] = (share, images)
    return Measured(row["batch"], row["iterations"], noise)


def plan_against_runs(cells: Cells) -> str:
    """Iterations that the base run at the same learning rate foretells, and those that runs by the
    gain took."""
    lines = []
    for run, rows in sorted(cells.items()):
        optimizer = "adamw" if run.arm.endswith("adamw") else "sgd"
        base = cells.get(Run(run.pipeline, optimizer, BASE, run.lr, 0))
        rows = ended(rows)
        if not run.arm.startswith("gain_least") or not base or not rows:
            continue
        foretold = predict(measured(base[0]), run.batch).iterations
        took = statistics.fmean(row["took"] for row in rows)
        lines.append(
            [
                run.pipeline,
                str(run.batch),
                label(run),
                f"{run.lr:g}",
                str(foretold),
                f"{took:.0f}",
                f"{100 * (foretold / took - 1):+.0f} %",
            ]
        )
    return table(["pipeline", "batch", "method", "LR", "plan", "took", "plan / took"], lines)


def gains_of(curves: dict[str, list]) -> list[np.ndarray]:
    """Of each module, not the whole model."""
    keys = (key for key in curves if key.startswith("gain/") and key != "gain/model")
    return [np.array(curves[key]) for key in keys]


def smallest_gain(curves: dict[str, list]) -> np.ndarray:
    return np.min(gains_of(curves), axis=0)


def clocks(row: dict) -> dict[str, float]:
    """Iterations that a run by the gain would have taken, by what counts as its progress, had its
    gains been the same at each point of the schedule: the integral of d progress / gain."""
    curves = row["curves"]
    progress = np.array([*curves["progress"], row["iterations"]])
    modules = gains_of(curves)
    candidates = {
        "whole model's": np.array(curves["gain/model"]),
        "mean of the modules'": np.mean(modules, axis=0),
        "smallest module's": smallest_gain(curves),
        "largest module's": np.max(modules, axis=0),
    }
    return {
        name: float(progress[0] + (np.diff(progress) / gain).sum())
        for name, gain in candidates.items()
    }


def which_gain(cells: Cells) -> str:
    """Iterations by `clocks`, over the base's."""
    lines, names = [], None
    for run, rows in sorted(cells.items()):
        rows = ended(rows)
        if run.arm not in ("gain", "gain_least") or run.options or not rows:
            continue
        found = [clocks(row) for row in rows]
        names = list(found[0])
        shares = [spread([f[name] / ITERATIONS for f in found], ".2f") for name in names]
        lines.append([run.pipeline, str(run.batch), ARMS[run.arm].label, *shares])
    return table(["pipeline", "batch", "method", *(names or [])], lines)


def in_parts(cells: Cells) -> str:
    """PQ of things and of stuff, and both on images of the glyphs and photographs of training."""
    lines = []
    for run, rows in sorted(cells.items(), key=lambda cell: (cell[0].batch, cell[0].arm)):
        if not any(row.get("parts") for row in rows):
            continue
        line = [str(run.batch), label(run), f"{run.lr:g}"]
        for key in ("parts", "seen_parts"):
            found = [row[key] for row in rows if row.get(key)]
            for part in PARTS:
                values = [parts[part] for parts in found]
                line.append(f"{spread(values)} ({len(values)})" if values else "–")
        lines.append(line)
    head = ["batch", "method", "LR", "things (seeds)", "stuff (seeds)"]
    return table([*head, "things, seen", "stuff, seen"], lines)


SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of training, in progress


def loss_at(row: dict, share: float, width: float = 0.05) -> float:
    """The mean loss around a share of progress."""
    shares = np.array(row["curves"]["progress"], dtype=float) / row["iterations"]
    return float(np.mean(np.array(row["curves"]["loss"])[abs(shares - share) <= width]))


def at_equal_progress(cells: Cells) -> str:
    """Losses of runs by the gain over those of the base batch with the same learning rate, by the
    same optimizer, where as much progress is made: 1 or less where the clock is not too fast."""
    lines = []
    kept = {
        run: [row for row in ended(rows) if "loss" in row["curves"]] for run, rows in cells.items()
    }
    for run, rows in sorted(kept.items()):
        base = "adamw" if run.arm.endswith("adamw") else "sgd"
        base_rows = kept.get(run._replace(arm=base, batch=BASE))
        if not ARMS[run.arm].by_gain or run.options or not rows or not base_rows:
            continue
        ratios = [
            statistics.fmean(loss_at(row, share) for row in rows)
            / statistics.fmean(loss_at(row, share) for row in base_rows)
            for share in SHARES
        ]
        label = [run.pipeline, str(run.batch), ARMS[run.arm].label, f"{run.lr:g}"]
        lines.append([*label, *(f"{ratio:.3f}" for ratio in ratios)])
    head = ["pipeline", "batch", "method", "LR", *(f"{100 * share:.0f} %" for share in SHARES)]
    return table(head, lines)


def noise_at(row: dict, module: str, share: float, width: float = 0.05) -> float:
    """The module's noise scale in images around a share of training: of the mean signal, where
    what was all noise has none."""
    shares, images = measured(row).noise[module]
    return 1 / max(float(np.mean(1 / images[abs(shares - share) <= width])), 1e-9)


def best_rates(cells: Cells, batch: int = 256) -> str:
    """Of base runs: each module's curvature and noise scale, and how its learning rate at `batch`
    should stand to the backbone's, were the loss a quadratic; with AGVM's and the gain's answer."""
    lines = []
    for run, rows in sorted(cells.items()):
        rows = [row for row in rows if row.get("curvature")]
        for at in rows[0]["curvature"] if rows else ():
            share, curvature, noise = int(at) / run.iterations, {}, {}
            for module in (name for name in rows[0]["curvature"][at] if name != MODEL):
                curvature[module] = statistics.fmean(row["curvature"][at][module] for row in rows)
                noise[module] = statistics.fmean(noise_at(row, module, share) for row in rows)
            best = {m: 1 / (c * (1 + noise[m] / batch)) for m, c in curvature.items()}
            gain = {m: gain_of(1 / n, BASE, batch) for m, n in noise.items()}
            # phi of two halves of the batch is 2 B/(batch + 2 B).
            agvm = {m: ((batch + 2 * n) / (2 * n)) ** 0.5 for m, n in noise.items()}
            for module in curvature:
                ratios = [f"{r[module] / r['backbone']:.2f}" for r in (best, gain, agvm)]
                numbers = f"{curvature[module]:.1f}", f"{noise[module]:.0f}"
                lines.append([run.pipeline, at, module, *numbers, *ratios, str(len(rows))])
    head = ["pipeline", "iteration", "module", "curvature", "noise scale"]
    return table([*head, "best", "gain", "AGVM", "seeds"], lines)


def corrected_gain(cells: Cells, batch: int = 128) -> str:
    """Of base runs: the gain at `batch` by the noise scale, and by that which counts the curvature
    along the mean gradient and along its noise."""
    lines = []
    for run, rows in sorted(cells.items()):
        rows = [row for row in rows if row.get("noise_curvature")]
        for at in rows[0]["noise_curvature"] if rows else ():
            for module in rows[0]["noise_curvature"][at]:
                along = [
                    statistics.fmean(row[key][at][module] for row in rows)
                    for key in ("curvature", "noise_curvature")
                ]
                share = int(at) / run.iterations
                noise = statistics.fmean(noise_at(row, module, share) for row in rows)
                line = [run.pipeline, at, module, *(f"{c:.1f}" for c in along), f"{noise:.0f}"]
                line.append(f"{gain_of(1 / noise, BASE, batch):.2f}")
                if min(along) > 0:
                    noise *= along[1] / along[0]
                    line += [f"{noise:.0f}", f"{gain_of(1 / noise, BASE, batch):.2f}"]
                else:  # no minimum along it
                    line += ["–", "–"]
                lines.append([*line, str(len(rows))])
    head = ["pipeline", "iteration", "module", "curvature, mean", "curvature, noise"]
    return table([*head, "noise scale", "gain", "corrected", "its gain", "seeds"], lines)


def where(rows: Rows) -> str:
    """On what runs were made, and from which weights."""
    machine, version, hashes = (
        ", ".join(sorted({row[key] for row in rows.values()}))
        for key in ("machine", "torch", "weights_hash")
    )
    return f"{machine}; torch {version}; hash of the first weights {hashes}"


def on_gpu(rows: Rows) -> str:
    """Those of another machine and torch, among themselves: their base is not there."""
    text = f"Many side by side on one GPU ({where(rows)}). Compare them with each other only.\n\n"
    return text + all_runs(by_cell(rows))


def report(rows: Rows) -> str:
    gpu = {run: row for run, row in rows.items() if ON_GPU in run.options}
    rows = {run: row for run, row in rows.items() if run not in gpu}
    cells = by_cell(rows)
    seconds = sum(row["seconds"] for row in rows.values())
    return "\n".join(
        [
            f"{len(rows)} runs, {seconds / 3600:.1f} hours of one core ({where(rows)}). The base: "
            f"batch {BASE}, {ITERATIONS:,} iterations, at the learning rate of SGD's that did best "
            "there.\n",
            all_runs(cells),
            *(("\n### On a GPU\n", on_gpu(gpu)) if gpu else ()),
            "\n### Panoptic FPN in parts\n",
            "PQ, and on new images of the glyphs and parts of photographs that training sees. "
            "Of runs since this is measured.\n",
            in_parts(cells),
            "\n### The plan against the runs\n",
            plan_against_runs(cells),
            "\n### Which gain counts\n",
            "Iterations / the base's, if another gain had been the clock of the same run.\n",
            which_gain(cells),
            "\n### Loss at equal progress\n",
            "The training loss over that of the base batch at the same learning rate, at shares of "
            "progress. Of runs that kept their losses.\n",
            at_equal_progress(cells),
            "\n### Which way a module's rate should go\n",
            "Curvature of the loss along each module's gradient, and noise scale in images, in "
            "runs of the base batch. Then the rate at batch 256 over the backbone's: best on a "
            "quadratic, 1/(c (1 + B/256)); by the gain; by AGVM. Equal rates are 1.\n",
            best_rates(cells),
            "\n### What a step is worth, with the curvature of its noise\n",
            "Curvature along the mean gradient of 256 images and along its noise, in runs of the "
            "base batch; the noise scale, and the gain at batch 128; both with the noise scale "
            "times the curvatures' ratio.\n",
            corrected_gain(cells),
        ]
    )


def write(text: str) -> None:
    """Put the tables into the page."""
    before, rest = DOCUMENT.read_text().split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + "\n" + text + "\n\n" + END + rest.split(END)[1])
