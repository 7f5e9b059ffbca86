#!/usr/bin/env python
"""Accuracy against batch size, for AGVM and for what else one would pick.

    python benchmarks/large_batch.py run --pipeline faster_rcnn --method agvm --batch 128 --lr 0.16
    python benchmarks/large_batch.py grid          # all that is missing, two runs side by side
    python benchmarks/large_batch.py grid --quick  # another file, another budget: minutes

A finished run is one line of benchmarks/results/large_batch.jsonl; a grid that was stopped goes on
where it was. The setting: thin models on the bundled digits at 64x64 pixels, from a backbone
trained on digit classification (benchmarks/pretrain.py) whose first stage is frozen; a fixed budget
of images, whatever the batch; micro-batches of 16 images, so BatchNorm sees 16 in each method.
"""

from __future__ import annotations
import argparse
import concurrent.futures
import contextlib
import fcntl
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from typing import NamedTuple
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.engine import HookBase, default_setup, launch
from detectron2.utils import comm
from tqdm import tqdm

import agvm_d2.data  # noqa: F401  registers the bundled datasets
from agvm_d2 import AGVMHook, AGVMTrainer
from agvm_d2.config import check_config, read_config
from agvm_d2.loader import build_train_loader
from agvm_d2.modulator import Modulator
from agvm_d2.moments import Moments
from agvm_d2.solver import scaled_lr
from agvm_d2.variance import lr_gain, lr_ratio, pairwise_variance

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from benchmarks.pretrain import pretrain  # noqa: E402

RESULTS = os.path.join(ROOT, "benchmarks/results/large_batch.jsonl")
PRETRAINED = os.path.join(ROOT, "output/pretrained")
IMAGES, UNIT = 2000, 16  # of digits_train; of a micro-batch
HALVED = "SOLVER.MICRO_BATCH_SIZE 8"  # batch 16 then has two gradients to compare


class Pipeline(NamedTuple):
    config: str
    task: str
    metric: str
    backbone: str = "resnet"  # of benchmarks/pretrain.py
    options: str = ""


PIPELINES = {
    "faster_rcnn": Pipeline("Base-RCNN-FPN-Digits.yaml", "bbox", "AP"),
    "faster_rcnn_swin": Pipeline(
        "Base-RCNN-FPN-Digits.yaml",
        "bbox",
        "AP",
        "swin",
        "MODEL.BACKBONE.NAME build_thin_swin_fpn_backbone",
    ),
    "mask_rcnn": Pipeline(
        "Digits-InstanceSegmentation/mask_rcnn_thin_R_50_FPN_6ep_bs16_adamw_agvm.yaml",
        "segm",
        "AP",
    ),
    "semantic_fpn": Pipeline(
        "Digits-SemanticSegmentation/semantic_fpn_thin_R_50_4ep_bs16_adamw_agvm.yaml",
        "sem_seg",
        "mIoU",
    ),
    "panoptic_fpn": Pipeline(
        "Digits-PanopticSegmentation/panoptic_fpn_thin_R_50_6ep_bs16_adamw_agvm.yaml",
        "panoptic_seg",
        "PQ",
    ),
}
SMALL = """
    MODEL.BACKBONE.FREEZE_AT 2 INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64
    MODEL.ANCHOR_GENERATOR.SIZES [[8],[14],[22],[32]] MODEL.RPN.POST_NMS_TOPK_TRAIN 32
    MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16 MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 5
    TEST.EXPECTED_RESULTS [] SOLVER.CHECKPOINT_PERIOD 1000000 SOLVER.WEIGHT_DECAY_NORM 0.0
""".split()


class Averaged(Modulator):
    """AGVM of averaged moments: S1 and S2 are averaged before the ratio instead of its root after
    it."""

    def update(self, moments: Moments) -> None:
        super().update(moments)
        variance = pairwise_variance(self.unit_sq, self.mean_sq, self.num_units)
        self.factors = lr_ratio(variance, variance[self.anchor], self.ratio_range).sqrt()


class AveragedGain(Modulator):
    """The same for the gain: of averaged moments, at once, instead of its moving average."""

    def update(self, moments: Moments) -> None:
        before = self.factors
        super().update(moments)
        units = self.num_units
        gain = lr_gain(self.unit_sq, self.mean_sq, units, units * self.base_share)
        self.factors = torch.where(gain.isfinite(), gain, before)


class Combined(Modulator):
    """The gain times AGVM's factor."""

    def target(self, moments: Moments) -> torch.Tensor:
        gain = lr_gain(*moments[:3], self.num_units * self.base_share)
        return gain * lr_ratio(self.variance, self.variance[self.anchor], self.ratio_range).sqrt()

    def update(self, moments: Moments) -> None:
        before, a = self.factors, self.momentum
        super().update(moments)
        target = self.target(moments)
        self.factors = torch.where(target.isfinite(), a * before + (1 - a) * target, before)


class Bounded(Combined):
    """AGVM with bounds from the data: no module's learning rate above its gain times batch 16's."""

    base_lr = 0.08
    lr = base_lr  # the run's

    def target(self, moments: Moments) -> torch.Tensor:
        gain = lr_gain(*moments[:3], self.num_units * self.base_share)
        ratio = lr_ratio(self.variance, self.variance[self.anchor], self.ratio_range)
        return torch.minimum(ratio.sqrt(), gain * self.base_lr / self.lr)


class LikeAGVM(Modulator):
    """The factors that AGVM had on average before the LR drop at batch 128, from its first
    iteration to the end: is it the measuring that helps?"""

    backbone, others = 1.0, 1.65

    def update(self, moments: Moments) -> None:
        super().update(moments)
        self.factors.fill_(self.others)
        self.factors[self.names.index("backbone")] = self.backbone


class LikeGain(LikeAGVM):
    """The same for the gain."""

    backbone, others = 5.5, 1.75


class Method(NamedTuple):
    optimizer: str
    mode: str = "modulate"
    estimator: str = "pairwise"
    rule: str = "variance"
    modulator: type[Modulator] = Modulator
    lr_rule: str = "linear-sqrt"  # of `scaled_lr`, to use untuned; "none": batch 16's learning rate
    backbone_lr: float = 1.0  # times the others'

    @property
    def plain(self) -> str:
        """The method without AGVM."""
        return self.optimizer.lower() + ("_3" if self.backbone_lr == 3 else "")


METHODS = {
    "sgd": Method("SGD", "monitor"),
    "agvm": Method("SGD"),
    "agvm_split": Method("SGD", estimator="split"),
    "averaged": Method("SGD", modulator=Averaged),
    "gain": Method("SGD", rule="gain", lr_rule="none"),
    "gain_averaged": Method("SGD", rule="gain", modulator=AveragedGain, lr_rule="none"),
    "combined": Method("SGD", rule="gain", modulator=Combined, lr_rule="none"),
    "bounded": Method("SGD", modulator=Bounded),
    "like_agvm": Method("SGD", modulator=LikeAGVM),
    "like_gain": Method("SGD", modulator=LikeGain, lr_rule="none"),
    "sgd_3": Method("SGD", "monitor", backbone_lr=3),
    "agvm_3": Method("SGD", backbone_lr=3),
    "gain_3": Method("SGD", rule="gain", lr_rule="none", backbone_lr=3),
    "gain_averaged_3": Method("SGD", "modulate", "pairwise", "gain", AveragedGain, "none", 3),
    "adamw": Method("ADAMW", "monitor", lr_rule="sqrt"),
    "agvm_adamw": Method("ADAMW", lr_rule="sqrt"),
    "gain_adamw": Method("ADAMW", rule="gain", lr_rule="none"),
    "lars": Method("LARS", "monitor", lr_rule="sqrt"),
    "lamb": Method("LAMB", "monitor", lr_rule="sqrt"),
}


def scaled(lr: float, batch: int, rule: str) -> float:
    """The learning rate that a rule derives from batch 16's."""
    return lr if rule == "none" else scaled_lr(batch, rule, lr)


class Run(NamedTuple):
    """What tells one run from another."""

    pipeline: str
    method: str
    batch: int
    lr: float
    seed: int
    epochs: int
    options: str = ""  # more config keys and values
    workers: int = 1

    @classmethod
    def of(cls, row: dict) -> Run:
        """That of a line of the results."""
        return cls(**{key: row[key] for key in cls._fields if key in row})

    @property
    def name(self) -> str:
        return "_".join(str(x) for x in self).replace(" ", "-").replace("/", "-").strip("_")


def config(run: Run, folder: str) -> CfgNode:
    """Warm-up over a tenth of the run, AGVM from 14 % on, the learning rate divided by 10 at 3/4
    and 7/8: the paper's proportions. The global norm is clipped throughout: clipped until AGVM
    starts only, as in the paper, runs diverge as soon as that ends."""
    method, pipeline = METHODS[run.method], PIPELINES[run.pipeline]
    weights = os.path.join(PRETRAINED, f"{pipeline.backbone}.pth")
    steps = run.epochs * IMAGES // run.batch
    start = round(0.14 * steps)
    opts = [
        *SMALL, *f"""
        MODEL.WEIGHTS {weights} {pipeline.options} SEED {run.seed} OUTPUT_DIR {folder}
        SOLVER.OPTIMIZER {method.optimizer} SOLVER.BASE_LR {run.lr} SOLVER.IMS_PER_BATCH {run.batch}
        SOLVER.MICRO_BATCH_SIZE {UNIT}
        SOLVER.WEIGHT_DECAY {0.05 if method.optimizer in ("ADAMW", "LAMB") else 0.0001}
        SOLVER.MAX_ITER {steps} SOLVER.STEPS ({steps * 3 // 4},{steps * 7 // 8})
        SOLVER.WARMUP_ITERS {steps // 10}
        AGVM.MODE {method.mode} AGVM.ESTIMATOR {method.estimator} AGVM.RULE {method.rule}
        AGVM.BASE_BATCH_SIZE {UNIT} AGVM.START_ITER {start} AGVM.MOMENTUM 0.9
        """.split(), *run.options.split(),
    ]  # fmt: skip
    return read_config(os.path.join(ROOT, "configs", pipeline.config), opts)


class Cached:
    """A mapper without random parts needs to read each image only once."""

    def __init__(self, mapper: DatasetMapper):
        self.mapper = mapper
        self.samples: dict[str, dict] = {}

    def __call__(self, record: dict) -> dict:
        name = record["file_name"]
        if name not in self.samples:
            self.samples[name] = self.mapper(record)
        return dict(self.samples[name])


class Trainer(AGVMTrainer):
    backbone_lr = 1.0

    @classmethod
    def build_optimizer(cls, cfg, model):
        optimizer = super().build_optimizer(cfg, model)
        backbone = set(model.backbone.bottom_up.parameters())
        for group in optimizer.param_groups:
            if backbone.intersection(group["params"]):
                group["lr"] *= cls.backbone_lr
        return optimizer

    @classmethod
    def build_model(cls, cfg):
        # 15 % faster here; the gradients are the same but for rounding.
        return super().build_model(cfg).to(memory_format=torch.channels_last)

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg, mapper=Cached(DatasetMapper(cfg, is_train=True)))


class Record(HookBase):
    """What was measured, and the factors."""

    def __init__(self, modulator: Modulator):
        self.modulator = modulator
        self.rows: list[tuple[int, list[float], list[float]]] = []

    def after_step(self) -> None:
        if self.modulator.due(self.trainer.iter):
            m = self.modulator
            self.rows.append((self.trainer.iter, m.variance.tolist(), m.factors.tolist()))

    def summary(self, drop: int) -> dict:
        """Mean variance of each module before and after the first drop of the learning rate, and up
        to 40 points of the factors."""
        found: dict = {"variance": {}, "lr_scale": {}}
        parts = {
            "before_drop": [r for r in self.rows if r[0] < drop],
            "after_drop": [r for r in self.rows if r[0] >= drop],
        }
        thin = self.rows[:: max(1, len(self.rows) // 40)]
        found["lr_scale"]["iteration"] = [r[0] for r in thin]
        for i, name in enumerate(self.modulator.names):
            found["variance"][name] = {
                part: round(statistics.fmean(values), 4)
                for part, rows in parts.items()
                if (values := [r[1][i] for r in rows if r[1][i] == r[1][i]])
            }
            found["lr_scale"][name] = [round(r[2][i], 3) for r in thin]
        return found


def train(run: Run, folder: str) -> None:
    """One run, in each of its workers; what its line in the results says goes to row.json."""
    torch.set_num_threads(1)
    cfg = config(run, folder)
    check_config(cfg, run.workers)
    cfg.freeze()
    default_setup(cfg, argparse.Namespace(config_file="", eval_only=False))
    Trainer.backbone_lr, Bounded.lr = METHODS[run.method].backbone_lr, run.lr
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    hook = next(h for h in trainer._hooks if isinstance(h, AGVMHook))
    hook.modulator.__class__ = METHODS[run.method].modulator  # another rule, the same state
    record = Record(hook.modulator)
    trainer.register_hooks([record])
    _, task, metric, *_ = PIPELINES[run.pipeline]
    start = time.time()
    result: dict = {"accuracy": 0.0, "diverged_at": None}
    try:
        trainer.train()
        if comm.is_main_process():
            found = trainer._last_eval_results[task][metric]
            result["accuracy"] = round(found, 3) if found == found else 0.0  # NaN: nothing found
    except FloatingPointError:
        result["diverged_at"] = trainer.iter
    row = {
        **run._asdict(),
        "metric": f"{task} {metric}",
        **result,
        "iterations": cfg.SOLVER.MAX_ITER,
        "seconds": round(time.time() - start),
        **record.summary(cfg.SOLVER.STEPS[0]),
        "torch": torch.__version__,
        "machine": f"{cpu()}, 1 thread",
    }
    if comm.is_main_process():
        with open(os.path.join(folder, "row.json"), "w") as f:
            json.dump(row, f)


def cpu() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.machine()


def read(path: str) -> dict[Run, dict]:
    """The finished runs."""
    if not os.path.exists(path):
        return {}
    with open(path) as f:
        rows = [json.loads(line) for line in f]
    return {Run.of(row): row for row in rows}


def backbones(pipelines: list[str]) -> None:
    """Train those that are not there yet."""
    for backbone in sorted({PIPELINES[name].backbone for name in pipelines}):
        path = os.path.join(PRETRAINED, f"{backbone}.pth")
        if not os.path.exists(path):
            print(f"pre-training {backbone}: {pretrain(path, backbone)}")


def do_run(run: Run, path: str) -> dict:
    folder = os.path.join(ROOT, "output/large_batch", run.name)
    shutil.rmtree(folder, ignore_errors=True)
    launch(train, run.workers, args=(run, folder), dist_url="auto")
    with open(os.path.join(folder, "row.json")) as f:
        row = json.load(f)
    with open(path, "a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.write(json.dumps(row) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    return row


# The grid. Where the search for the best learning rate at batch 16 starts.
FIRST_LR = {"SGD": 0.08, "ADAMW": 0.002, "LARS": 4.0, "LAMB": 0.01}
SEEDS = (1, 2, 3, 4, 5, 6)
EPOCHS = 16


class Cell(NamedTuple):
    """Runs that differ by learning rate and seed; `lrs`: these only, without a search; `seeds`: how
    many the best one gets."""

    pipeline: str
    method: str
    batch: int
    epochs: int = EPOCHS
    options: str = ""
    workers: int = 1
    lrs: tuple[float, ...] = ()
    seeds: int = 3

    def run(self, lr: float, seed: int) -> Run:
        return Run(
            self.pipeline,
            self.method,
            self.batch,
            float(f"{lr:.4g}"),
            seed,
            self.epochs,
            self.options,
            self.workers,
        )

    def search(self, rows: dict[Run, dict], first: float, seed: int) -> list[Run]:
        """`first` and half of it; then on by factors of 2 until the best is not the last one. All
        runs so far; the search is over when all of them are in `rows`."""
        low, high = -1, 0
        while True:
            tried = [self.run(first * 2.0**k, seed) for k in range(low, high + 1)]
            if not all(run in rows for run in tried):
                return tried
            best = tried.index(max(tried, key=lambda run: rows[run]["accuracy"]))
            if 0 < best < len(tried) - 1:
                return tried
            low, high = low - (best == 0), high + (best > 0)

    def runs(self, rows: dict[Run, dict], seeds: tuple[int, ...] = SEEDS) -> list[Run]:
        """Those that can start now, finished ones too: the search with the first seed, and the
        paper's rule; then the best learning rate with the other seeds."""
        method = METHODS[self.method]
        first = FIRST_LR[method.optimizer]
        if self.lrs:
            runs = [self.run(lr, seeds[0]) for lr in self.lrs]
        elif self.batch == UNIT:
            runs = self.search(rows, first, seeds[0])
        else:
            small = self._replace(method=method.plain, batch=UNIT)
            found = small.search(rows, first, seeds[0])
            if not all(run in rows for run in found):
                return []
            base = max(found, key=lambda run: rows[run]["accuracy"]).lr
            start = "none" if method.lr_rule == "none" else "sqrt"
            runs = self.search(rows, scaled(base, self.batch, start), seeds[0])
            if method.lr_rule == "linear-sqrt":
                runs.append(self.run(scaled(base, self.batch, method.lr_rule), seeds[0]))
        if all(run in rows for run in runs):
            best = max(runs, key=lambda run: rows[run]["accuracy"])
            runs += [best._replace(seed=seed) for seed in seeds[1 : self.seeds]]
        return runs


LONG = 48  # epochs: three times the iterations
FIXED = (("sgd", 0.1131), ("agvm", 0.1131), ("gain", 0.08))  # the best of Faster R-CNN at batch 128
GRID = [
    Cell("faster_rcnn", "sgd", 16),
    *(Cell("faster_rcnn", m, 16, seeds=1) for m in ("adamw", "lars", "lamb")),
    # Seeds 4 to 6 came after the gain's form had been chosen on the first three.
    *(Cell("faster_rcnn", m, b, seeds=6) for b in (64, 128) for m in ("sgd", "agvm", "gain")),
    *(Cell("faster_rcnn", m, 128) for m in ("adamw", "agvm_adamw")),
    *(Cell("faster_rcnn", m, 128, seeds=1) for m in ("lars", "lamb")),
    Cell("faster_rcnn", "gain_adamw", 128, lrs=(0.004,), seeds=1),
    *(
        Cell("faster_rcnn", method, 256, lrs=lrs, seeds=1)
        for method, lrs in (
            ("sgd", (0.08, 0.16, 0.32)),
            ("agvm", (0.08, 0.16)),
            ("gain", (0.04, 0.08)),
        )
    ),
    # More iterations.
    *(
        Cell("faster_rcnn", method, batch, LONG, lrs=lrs, seeds=seeds)
        for batch, seeds, found in (
            (16, 1, {"sgd": (0.08,), "sgd_3": (0.08,)}),
            (128, 1, {"sgd": (0.1131,), "agvm": (0.1131,), "gain": (0.08,)}),
            (256, 3, {"sgd": (0.16, 0.08), "agvm": (0.08, 0.16), "gain": (0.08,)}),
            (256, 1, {"sgd_3": (0.16,), "gain_3": (0.08,)}),
            (512, 1, {"sgd": (0.16,), "agvm": (0.08,), "gain": (0.08,)}),
        )
        for method, lrs in found.items()
    ),
    # A backbone with three times the rate of the other modules.
    Cell("faster_rcnn", "sgd_3", 16, lrs=(0.04, 0.08), seeds=1),
    *(Cell("faster_rcnn", m, 128, lrs=(0.05657, 0.1131)) for m in ("sgd_3", "agvm_3")),
    Cell("faster_rcnn", "gain_3", 128, lrs=(0.04, 0.08)),
    # Other pipelines.
    Cell("semantic_fpn", "sgd", 16, seeds=1),
    *(
        Cell("semantic_fpn", method, 128, lrs=lrs)
        for method, lrs in (
            ("sgd", (0.02828, 0.05657, 0.1131, 0.2263)),
            ("agvm", (0.02828, 0.05657, 0.1131, 0.2263)),
            ("gain", (0.04, 0.08, 0.16)),
        )
    ),
    Cell("semantic_fpn", "agvm_split", 128, lrs=(0.1131,), seeds=1),
    *(
        Cell(pipeline, method, 128, lrs=(lr,), seeds=seeds)
        for pipeline, seeds in (("mask_rcnn", 3), ("panoptic_fpn", 6))
        for method, lr in FIXED
    ),
    *(Cell(p, "sgd", 16, lrs=(0.08,), seeds=1) for p in ("mask_rcnn", "panoptic_fpn")),
    *(
        Cell("faster_rcnn_swin", method, batch, lrs=lrs, seeds=1)
        for method, batch, lrs in (
            ("adamw", 16, (0.002, 0.004)),
            ("adamw", 128, (0.002828,)),
            ("agvm_adamw", 128, (0.002828,)),
            ("gain_adamw", 128, (0.002,)),
        )
    ),
    # Controls, other rules and ablations.
    Cell("faster_rcnn", "combined", 128, lrs=(0.04, 0.08), seeds=1),
    Cell("faster_rcnn", "bounded", 128, lrs=(0.1131, 0.2263), seeds=1),
    *(
        Cell("faster_rcnn", m, 16, options=HALVED, lrs=(lr,), seeds=1)
        for m, lr in (("sgd", 0.08), ("like_gain", 0.0457))
    ),
    Cell("faster_rcnn", "like_gain", 128, lrs=(0.08,)),
    *(
        Cell("faster_rcnn", method, 128, lrs=(0.1131,), seeds=1)
        for method in ("agvm_split", "averaged", "like_agvm")
    ),
    *(
        Cell("faster_rcnn", m, 128, options="MODEL.RESNETS.NORM FrozenBN", lrs=(lr,), seeds=1)
        for m, lr in FIXED
    ),
    *(
        Cell("faster_rcnn", "agvm", 128, options=options, workers=workers, lrs=(0.1131,), seeds=1)
        for options, workers in (
            ("AGVM.ANCHOR fpn", 1),
            ("AGVM.ANCHOR box_head", 1),
            ("AGVM.INTERVAL 1", 1),
            ("AGVM.INTERVAL 10", 1),
            ("AGVM.MOMENTUM 0.97", 1),
            ("AGVM.RATIO_RANGE (0.5,2)", 1),
            ("AGVM.START_ITER 0", 1),
            ("MODEL.RESNETS.NORM BN", 4),
            ("MODEL.RESNETS.NORM naiveSyncBN", 4),
        )
    ),
]
QUICK = [Cell("faster_rcnn", m, b, 2) for m, b in (("sgd", 16), ("sgd", 64), ("agvm", 64))]


def pending(cells: list[Cell], path: str, running: set[Run], seeds) -> list[Run]:
    """What is missing and can start now, the first seed everywhere first."""
    rows = read(path)
    wanted = [run for cell in cells for run in cell.runs(rows, seeds)]
    missing = [run for run in dict.fromkeys(wanted) if run not in rows and run not in running]
    return sorted(missing, key=lambda run: run.seed)


def grid(cells: list[Cell], path: str, jobs: int, seeds: tuple[int, ...], minutes: float) -> None:
    """Run what is missing, `jobs` at a time; start nothing new after `minutes`."""
    backbones([cell.pipeline for cell in cells])
    ends = time.time() + 60 * minutes
    running: dict[concurrent.futures.Future, Run] = {}
    bar = tqdm(unit="run")
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        while True:
            todo = pending(cells, path, set(running.values()), seeds)
            bar.total = bar.n + len(running) + len(todo)
            bar.refresh()
            while todo and len(running) < jobs and time.time() < ends:
                run = todo.pop(0)
                running[pool.submit(start, run, path)] = run
            if not running:
                return
            done, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
            for future in done:
                run = running.pop(future)
                row = future.result()
                bar.update()
                bar.write(f"{run.name}: {row['metric']} {row['accuracy']:.1f}, {row['seconds']} s")


def start(run: Run, path: str) -> dict:
    """In a process of its own."""
    command = [sys.executable, "-W", "ignore", os.path.abspath(__file__), "run", "--results", path]
    for key, value in run._asdict().items():
        command += [f"--{key}", str(value)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-4000:]}")
    return read(path)[run]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="one run, again also if it is in the results")
    one.add_argument("--pipeline", choices=PIPELINES, required=True)
    one.add_argument("--method", choices=METHODS, required=True)
    one.add_argument("--batch", type=int, required=True)
    one.add_argument("--lr", type=float, required=True)
    one.add_argument("--seed", type=int, default=1)
    one.add_argument("--epochs", type=int, default=EPOCHS)
    one.add_argument("--options", default="", help="'KEY VALUE KEY VALUE'")
    one.add_argument("--workers", type=int, default=1)
    every = commands.add_parser("grid", help="all runs that are missing")
    every.add_argument("--quick", action="store_true", help="two methods, two epochs, one seed")
    every.add_argument("--jobs", type=int, default=2)
    every.add_argument("--minutes", type=float, default=1e6, help="start nothing new after that")
    for part in (one, every):
        part.add_argument("--results", metavar="JSONL")
    args = parser.parse_args()
    if args.command == "run":
        run = Run(**{key: getattr(args, key) for key in Run._fields})
        backbones([run.pipeline])
        row = do_run(run, args.results or os.path.join(ROOT, "output/large_batch.jsonl"))
        print(json.dumps({k: v for k, v in row.items() if k not in ("variance", "lr_scale")}))
    elif args.quick:
        path = args.results or os.path.join(ROOT, "output/large_batch_quick.jsonl")
        grid(QUICK, path, args.jobs, (1,), args.minutes)
    else:
        grid(GRID, args.results or RESULTS, args.jobs, SEEDS, args.minutes)


if __name__ == "__main__":
    main()
