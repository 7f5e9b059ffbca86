#!/usr/bin/env python
"""768 workers: the gradient variance with as many replicas, and what AGVM costs a step then.

    python benchmarks/scale.py measure  # 22 minutes of one core; into benchmarks/results/scale.json
    python benchmarks/scale.py account  # arithmetic: prints the tables
    python benchmarks/scale.py write    # the tables of docs/scale.md, and docs/scale.png

`measure` is one process: each replica is a micro-batch of two images, and its gradient is a unit.
The thin Faster R-CNN first trains at batch 16, so that its gradients are those of training; then
every step has the gradients of all replicas. `account` measures nothing: its formulas are below,
and its assumptions are the fields of `Network` and `Model`.
"""

from __future__ import annotations
import argparse
import hashlib
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
import matplotlib
import numpy as np
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from detectron2.utils.events import EventStorage
from tqdm import tqdm

from agvm_d2 import AGVM, Settings, build_optimizer
from agvm_d2.d2.config import read_config
from agvm_d2.data import digits
from agvm_d2.moments import Moments, TensorTap, pairwise_moments
from agvm_d2.norms import ModuleNorms
from agvm_d2.precondition import preconditioner
from agvm_d2.solver import build_lr_scheduler
from agvm_d2.variance import noise_scale, pairwise_variance

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs/Digits-Detection/faster_rcnn_thin_R_50_FPN_6ep_bs16_adamw_agvm.yaml"
RESULTS = ROOT / "benchmarks/results/scale.json"
DOCUMENT = ROOT / "docs/scale.md"
IMAGES = 2  # of a replica
FEWER = (8, 32, 128, 256)  # replicas, beside all
KINDS = {"adamw": "AdamW's", "sgd": "plain"}  # gradients: preconditioned, and as they are
PAPER_UNITS = 256  # replicas of two images that have the batch of the paper's figure, 512
# Its variances in mid-training, digitised (± 0.02).
PAPER = {
    "adamw": {"backbone": 1.06, "fpn": 0.41, "rpn": 0.55, "box_head": 0.44},
    "sgd": {"backbone": 1.21, "fpn": 0.52, "rpn": 0.39, "box_head": 0.34},
}


# Measured.


class Drawn:
    """Images of the digits, each drawn anew: a batch of 1,536 out of the bundled 2,000 would be
    most of them, and its noise too small."""

    def __init__(self, seed: int):
        self.sources, self.seed, self.count = digits.sources(train=True), seed, 0

    def __call__(self) -> dict:
        found: list = []
        while not found:
            rng = np.random.default_rng([self.seed, self.count])
            self.count += 1
            picture, _, found = digits.draw(rng, self.sources)
        size = picture.shape[:2]
        instances = Instances(size)
        instances.gt_classes = torch.tensor([label for label, _ in found])
        masks = BitMasks(torch.from_numpy(np.stack([mask for _, mask in found])))
        instances.gt_boxes = masks.get_bounding_boxes()
        image = torch.from_numpy(picture.transpose(2, 0, 1).copy())
        return {"image": image, "instances": instances, "height": size[0], "width": size[1]}


class Run:
    """The model in training, and what its measured steps gave."""

    def __init__(self, replicas: int, start: int, seed: int = 1):
        """
        Args:
            start: steps at the config's batch before the measured ones.
        """
        torch.manual_seed(seed)
        cfg = read_config(str(CONFIG), ["SOLVER.MAX_ITER", max(start, 1), "SOLVER.STEPS", ()])
        self.start_units = cfg.SOLVER.IMS_PER_BATCH // IMAGES
        self.replicas, self.draw = replicas, Drawn(seed)
        self.model = build_model(cfg).train()
        self.optimizer = build_optimizer(cfg, self.model)
        self.scheduler = build_lr_scheduler(cfg, self.optimizer)
        self.found: list[dict] = []

    def passes(self, units: int) -> Iterator[int]:
        """Backward passes of one step, each of a unit's mean loss over `units`."""
        self.optimizer.zero_grad()
        for unit in range(1, units + 1):
            losses = self.model([self.draw() for _ in range(IMAGES)])
            (sum(losses.values()) / units).backward()
            yield unit

    def train(self, steps: int) -> None:
        for _ in tqdm(range(steps), unit="step", desc="start"):
            for _ in self.passes(self.start_units):
                pass
            self.optimizer.step()
            self.scheduler.step()

    def measure(self, steps: int) -> AGVM:
        """Steps of all replicas, at the learning rate that the start ended with."""
        agvm = AGVM(
            self.model,
            self.optimizer,
            Settings(interval=1),
            micro_batches=self.replicas,
            batch_size=IMAGES * self.replicas,
        )
        plain = TensorTap(agvm.modules)
        maps = {"adamw": preconditioner(self.optimizer), "sgd": None}
        for step in tqdm(range(steps), unit="step", desc=f"{self.replicas} replicas"):
            agvm.begin(step)
            plain.start()
            fewer: dict = {kind: {} for kind in maps}
            for unit in self.passes(self.replicas):
                for listener in (agvm.micro_batch_done, plain.unit_done):
                    listener(1 / self.replicas)
                if unit in FEWER and unit < self.replicas:  # |mean of the first ones|^2
                    grads = {p: p.grad for p in plain.params if p.grad is not None}
                    for kind, precondition in maps.items():
                        norms = ModuleNorms(agvm.modules, precondition)
                        total = norms.add([*grads], [*grads.values()]).total(plain.device)
                        fewer[kind][unit] = total * (self.replicas / unit) ** 2
            plain.average_done()
            agvm.backward_done()
            sgd = plain.collect()
            self.optimizer.step()
            agvm.end()
            assert sgd is not None and agvm.modulator.last is not None  # nothing was accumulated
            for kind, moments in (("adamw", agvm.modulator.last), ("sgd", sgd)):
                self.found.append({"kind": kind, **rounded(moments, fewer[kind])})
        return agvm


def rounded(moments: Moments, fewer: dict[int, torch.Tensor]) -> dict:
    """A step's numbers per module, with six digits."""

    def digits6(values: torch.Tensor) -> list[float]:
        return [float(f"{value:.6g}") for value in values.tolist()]

    return {
        "unit_sq": digits6(moments.unit_sq),
        "mean_sq": digits6(moments.mean_sq),
        "mean_sq_of_first": {str(k): digits6(values) for k, values in fewer.items()},
    }


def weights_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def measure(replicas: int, steps: int, start: int) -> dict:
    """What benchmarks/results/scale.json holds."""
    torch.set_num_threads(1)
    with EventStorage(0):
        run = Run(replicas, start)
        began = time.process_time()
        run.train(start)
        start_seconds = time.process_time() - began
        first_weights = weights_hash(run.model)
        began = time.process_time()
        agvm = run.measure(steps)
        seconds = time.process_time() - began
    return {
        "replicas": replicas,
        "images": IMAGES,
        "start": start,
        "start_units": run.start_units,
        "lr": run.optimizer.param_groups[0]["lr"],
        "steps": steps,
        "modules": [*agvm.modules],
        "lr_scale": [round(factor, 4) for factor in agvm.modulator.factors.tolist()],
        "start_cpu_seconds": round(start_seconds),
        "step_cpu_seconds": round(seconds / steps, 2),
        "torch": torch.__version__,
        "machine": f"1 thread of {os.cpu_count()} CPU cores, {platform.machine()}",
        "weights_hash": first_weights,
        "moments": run.found,
    }


# What was measured, as tables.


def fewer_units(unit_sq: Any, mean_sq: Any, num_units: int, fewer: int) -> Any:
    """The |mean|^2 to expect of `fewer` units, from S1 and S2 of `num_units`.

    S2 = |G|^2 + tr(Sigma)/K, and (S1 - S2) K/(K - 1) estimates tr(Sigma).
    """
    trace = (unit_sq - mean_sq) * num_units / (num_units - 1)
    return mean_sq + trace * (1 / fewer - 1 / num_units)


def curves(result: dict, kind: str) -> dict[str, list[list[float]]]:
    """Of each step and module: phi of all units, by K ("8") from the moments of all, and by K
    ("first 8") from the first units' own mean."""
    units = result["replicas"]
    found: dict[str, list[list[float]]] = {}
    for row in (row for row in result["moments"] if row["kind"] == kind):
        unit_sq, mean_sq = (
            torch.tensor(row[key], dtype=torch.float64) for key in ("unit_sq", "mean_sq")
        )
        values = {str(units): pairwise_moments(unit_sq, mean_sq, units).variance}
        for k in {PAPER_UNITS, *map(int, row["mean_sq_of_first"])}:
            expected = fewer_units(unit_sq, mean_sq, units, k)
            values[str(k)] = pairwise_variance(unit_sq, expected, k)
        for k, own in row["mean_sq_of_first"].items():
            values[f"first {k}"] = pairwise_variance(unit_sq, own, int(k))
        for name, phi in values.items():
            found.setdefault(name, []).append(phi.tolist())
    return found


def noise_scales(result: dict, kind: str) -> list[float]:
    """B_simple of each module in images, from the steps' mean of S2/S1."""
    rows = [row for row in result["moments"] if row["kind"] == kind]
    unit_sq, mean_sq = (
        torch.tensor([row[key] for row in rows], dtype=torch.float64)
        for key in ("unit_sq", "mean_sq")
    )
    ratio = (mean_sq / unit_sq).mean(0)
    return noise_scale(torch.ones_like(ratio), ratio, result["replicas"], result["images"]).tolist()


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def span(values: list[float]) -> str:
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def measured_tables(result: dict) -> str:
    units, levels, by_k = str(result["replicas"]), [], []
    fewer = [*result["moments"][0]["mean_sq_of_first"]]
    for kind, label in KINDS.items():
        found, noise = curves(result, kind), noise_scales(result, kind)
        mean = {
            k: [statistics.fmean(v) for v in zip(*rows, strict=True)] for k, rows in found.items()
        }
        anchor = result["modules"].index("backbone")
        for i, module in enumerate(result["modules"]):
            rows = mean[units], mean[str(PAPER_UNITS)], [PAPER[kind][m] for m in result["modules"]]
            levels.append(
                [label, module, span([row[i] for row in found[units]])]
                + [f"{row[i]:.2f}" for row in rows[1:]]
                + [f"{(row[anchor] / row[i]) ** 0.5:.2f}" for row in rows]
                + [f"{noise[i]:,.0f}" if noise[i] == noise[i] else "–"]
            )
            cells = [f"{mean[k][i]:.2f} ({mean[f'first {k}'][i]:.2f})" for k in fewer]
            by_k.append([label, module, *cells, f"{mean[units][i]:.2f}"])
    starts = f"{result['start']} steps of {result['start_units']} × {IMAGES}"
    factors = [
        f"{module} {factor:.2f}"
        for module, factor in zip(result["modules"], result["lr_scale"], strict=True)
    ]
    text = (
        f"{result['steps']} steps of {units} × {result['images']} images, each "
        f"{result['step_cpu_seconds']:.0f} s of CPU time, after {starts} "
        f"({result['start_cpu_seconds']} s). {result['machine']}; torch {result['torch']}; hash of "
        f"the weights at the first measured step {result['weights_hash']}. Factors after the last "
        f"step: {', '.join(factors)}.\n"
    )
    same = f"batch {PAPER_UNITS * result['images']}"
    columns = ["gradients", "module", f"φ, K = {units}", f"φ, {same}", f"φ, paper, {same}"]
    columns += [f"√(φ backbone / φ), K = {units}", same, f"paper, {same}", "noise scale, images"]
    ks = ["gradients", "module", *(f"K = {k}" for k in fewer), f"K = {units}"]
    return "\n".join([text, table(columns, levels), table(ks, by_k)])


# Arithmetic.


class Network(NamedTuple):
    """Of one worker, an A100 of a DGX A100."""

    latency: float = 5e-6  # alpha, s a message: NCCL's own figure (tuning.cc: network, tree, LL)
    bandwidth: float = 25e9  # bytes/s each way: an adapter of 200 Gbit/s for each GPU
    memory: float = 1.555e12  # bytes/s of the GPU's own memory, 40 GB version


A100 = Network()


class Model(NamedTuple):
    label: str
    numbers: int  # N, trainable parameters
    tensors: int  # P, that they are in
    modules: int  # M
    alone: float  # s of a step where the all-reduce hardly counts


WORKERS = (8, 64, 128, 256, 768, 2048, 10_000)
INTERVAL = 5  # the paper's at batches above about 1,000
# 148 minutes for 43,980 iterations, and 73 hours for as many: the paper's runs at batch 32.
R50 = Model("Faster R-CNN R50-FPN", 41_527_712, 156, 4, 148 * 60 / 43_980)
BILLION = Model("1 billion parameters", 1_073_600_000, 673, 5, 73 * 3600 / 43_980)


def ring(size: float, workers: int, network: Network) -> float:
    """Seconds of a ring all-reduce of `size` bytes: 2 (W - 1) messages of size/W one by one."""
    messages = 2 * (workers - 1)
    return messages * (size / workers / network.bandwidth + network.latency)


def tree(size: float, workers: int, network: Network) -> float:
    """Seconds of an all-reduce over double binary trees: all up, then all down, in pieces."""
    if workers == 1:
        return 0.0
    return 2 * (size / network.bandwidth + math.ceil(math.log2(workers)) * network.latency)


def all_reduce(size: float, workers: int, network: Network) -> float:
    """Seconds with the faster of the two, as NCCL chooses."""
    return min(ring(size, workers, network), tree(size, workers, network))


def plain_step(model: Model, workers: int, network: Network) -> float:
    """Seconds: computing, then one all-reduce of the gradient, of which DDP would hide a part."""
    return model.alone + all_reduce(4 * model.numbers, workers, network)


def agvm_cost(model: Model, workers: int, network: Network) -> float:
    """Seconds that a measured step takes longer: the gradient is read twice, before it is averaged
    and after, and 2 M + 1 float64 are all-reduced. Other steps take no longer."""
    reading = 2 * 4 * model.numbers / network.memory
    return reading + all_reduce(8 * (2 * model.modules + 1), workers, network)


def one_by_one(model: Model, workers: int, network: Network) -> float:
    """Seconds of an all-reduce of each parameter, all of one size."""
    size = 4 * model.numbers / model.tensors
    return model.tensors * all_reduce(size, workers, network)


def official_cost(model: Model, workers: int, network: Network, measured: bool = True) -> float:
    """Seconds that a step of the official scheme takes longer than a plain one.

    Each parameter is all-reduced by itself, on any step. A measured step does so over the halves
    first (the calls for the other half cost nothing), sends one worker's gradient to another,
    reads both for the cosines, and broadcasts M float32: 3 P + 2 calls for at most 3 N numbers.
    """
    size = 4 * model.numbers
    cost = one_by_one(model, workers, network) - all_reduce(size, workers, network)
    if measured:
        gather = size / network.bandwidth + network.latency
        hops = math.ceil(math.log2(workers))
        broadcast = 4 * model.modules / network.bandwidth + hops * network.latency
        cost += one_by_one(model, workers // 2, network) + gather + broadcast
        cost += 2 * size / network.memory
    return cost


def averages(model: Model, workers: int, network: Network, interval: int) -> tuple[float, float]:
    """Seconds more per step, with a measurement every `interval` steps: AGVM, official."""
    measured = official_cost(model, workers, network)
    other = official_cost(model, workers, network, measured=False)
    return (
        agvm_cost(model, workers, network) / interval,
        (measured + (interval - 1) * other) / interval,
    )


def account_tables(network: Network = A100) -> str:
    text = []
    for model in (R50, BILLION):
        rows = []
        for workers in WORKERS:
            size = 4 * model.numbers
            step = plain_step(model, workers, network)
            costs = [cost(model, workers, network) for cost in (agvm_cost, official_cost)]
            means = averages(model, workers, network, INTERVAL)
            reduces = [way(size, workers, network) for way in (ring, tree)]
            rows.append(
                [f"{workers:,}", *(f"{1000 * seconds:,.1f}" for seconds in (*reduces, step))]
                + [f"{1000 * costs[0]:.2f}", f"{1000 * costs[1]:,.1f}"]
                + [f"{100 * cost / step:.2g}" for cost in (costs[0], means[0], costs[1], means[1])]
            )
        head = ["workers", "ring, ms", "tree, ms", "plain step, ms", "AGVM, ms more"]
        head += ["official, ms more", "AGVM, %", f"at interval {INTERVAL}, %"]
        head += ["official, %", f"at interval {INTERVAL}, %"]
        text += [
            f"{model.label}: N = {model.numbers / 1e6:,.1f} M in P = {model.tensors} tensors, "
            f"M = {model.modules} modules, {1000 * model.alone:,.0f} ms alone.\n",
            table(head, rows),
        ]
    return "\n".join([*text, paper_run(network), other_networks()])


def other_networks() -> str:
    """The same on networks with a slower message, and a narrower one."""
    rows = []
    for network in (A100, A100._replace(latency=20e-6), A100._replace(bandwidth=3.125e9)):
        cells = [f"{1e6 * network.latency:.0f}", f"{network.bandwidth / 1e9:g}"]
        for model in (R50, BILLION):
            step = plain_step(model, 768, network)
            costs = [cost(model, 768, network) for cost in (agvm_cost, official_cost)]
            cells += [f"{1000 * step:,.0f}", *(f"{100 * cost / step:.2g}" for cost in costs)]
        rows.append(cells)
    head = ["α, µs", "GB/s"]
    for label in ("R50", "1 billion"):
        head += [f"{label}: plain step, ms", "AGVM, %", "official, %"]
    return "768 workers, a measured step:\n\n" + table(head, rows)


def paper_run(network: Network) -> str:
    """The 4.2 minutes on 768 GPUs, step by step."""
    iterations, workers = 924, 768
    step = plain_step(R50, workers, network)
    ours, official = averages(R50, workers, network, INTERVAL)
    rings = R50.tensors * ring(4 * R50.numbers / R50.tensors, workers, network)
    rows = [
        ("paper, batch 32", 43_980, R50.alone),
        ("paper, batch 1,536, 768 GPUs", iterations, 4.2 * 60 / iterations),
        ("account: computing alone", iterations, R50.alone),
        ("account: and one all-reduce", iterations, step),
        (f"account: and AGVM, interval {INTERVAL}", iterations, step + ours),
        (f"account: or the official scheme, interval {INTERVAL}", iterations, step + official),
        ("account: a ring for each parameter", iterations, R50.alone + rings),
    ]
    cells = [[name, f"{n:,}", f"{1000 * s:,.1f}", f"{n * s / 60:,.2f}"] for name, n, s in rows]
    return table(["148 to 4.2 minutes", "iterations", "step, ms", "minutes"], cells)


# The page.

BEGIN, END = "<!-- from python benchmarks/scale.py write -->\n", "<!-- end of scale -->\n"


def report(result: dict) -> str:
    return "\n".join(
        [
            "### Measured: the variance with 768 replicas\n",
            measured_tables(result),
            "### Arithmetic: a step on up to 10,000 workers\n",
            account_tables(),
        ]
    )


def write(text: str) -> None:
    """Put the tables into the page."""
    before, rest = DOCUMENT.read_text().split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.split(END)[1])


def draw(folder: Path, network: Network = A100) -> None:
    """Overhead against workers: scale.png."""
    workers = [2**i for i in range(1, 15)]
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
        for axis, model in zip(axes, (R50, BILLION), strict=True):
            steps = [plain_step(model, w, network) for w in workers]
            ours, theirs = zip(
                *(averages(model, w, network, INTERVAL) for w in workers), strict=True
            )
            for name, cost, mean, colour in (
                ("official", official_cost, theirs, "tab:red"),
                ("AGVM", agvm_cost, ours, "tab:blue"),
            ):
                measured = [cost(model, w, network) for w in workers]
                for seconds, how, style in (
                    (measured, "measured step", "-"),
                    (mean, f"interval {INTERVAL}", "--"),
                ):
                    percent = [100 * more / s for more, s in zip(seconds, steps, strict=True)]
                    axis.plot(workers, percent, style, color=colour, label=f"{name}, {how}", lw=1.4)
            axis.axvline(768, color="0.7", lw=0.8, zorder=0)
            axis.set_xscale("log")
            axis.set_xticks([2, 8, 64, 768, 10_000], ["2", "8", "64", "768", "10,000"])
            axis.minorticks_off()
            axis.set(yscale="log", ylim=(0.01, 100), xlabel="workers", title=model.label)
        axes[0].set_ylabel("more per step, %")
        axes[0].set_yticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
        axes[0].legend(frameon=False, loc=(0.17, 0.36))
        figure.savefig(folder / "scale.png", dpi=110)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("measure", help="train, and measure all replicas of each step")
    run.add_argument("--replicas", type=int, default=768)
    run.add_argument("--steps", type=int, default=24)
    run.add_argument("--start", type=int, default=500, help="steps at batch 16 before them")
    run.add_argument("--results", type=Path, default=RESULTS, metavar="JSON")
    arithmetic = commands.add_parser("account", help="what a step costs, by formula")
    for field, default in A100._asdict().items():
        arithmetic.add_argument(f"--{field}", type=float, default=default)
    commands.add_parser("write", help="tables and figure into docs")
    args = parser.parse_args()
    if args.command == "measure":
        result = measure(args.replicas, args.steps, args.start)
        args.results.write_text(json.dumps(result) + "\n")
        print(measured_tables(result))
    elif args.command == "account":
        print(account_tables(Network(args.latency, args.bandwidth, args.memory)))
    else:
        write(report(json.loads(RESULTS.read_text())))
        draw(DOCUMENT.parent)


if __name__ == "__main__":
    main()
