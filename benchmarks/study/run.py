"""One run, and all that are missing, side by side in processes of their own."""

from __future__ import annotations
import argparse
import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.engine import HookBase, default_setup, launch
from detectron2.utils import comm
from tqdm import tqdm

import agvm_d2.data  # noqa: F401  registers the bundled datasets
from agvm_d2 import AGVMHook, AGVMTrainer
from agvm_d2.d2.checks import check_config
from agvm_d2.d2.config import read_config
from agvm_d2.d2.loader import build_train_loader
from agvm_d2.modulator import Modulator
from benchmarks.pretrain import pretrain

from .methods import METHODS, register_rules
from .plan import Search, pending
from .results import ROOT, UNIT, Run, read

PRETRAINED = ROOT / "output/pretrained"
IMAGES = 2000  # of digits_train


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


def weights(pipeline: str) -> Path:
    """Where its pre-trained backbone is."""
    return PRETRAINED / f"{PIPELINES[pipeline].backbone}.pth"


def config(run: Run, folder: str) -> CfgNode:
    """Warm-up over a tenth of the run, AGVM from 14 % on, the learning rate divided by 10 at 3/4
    and 7/8: the paper's proportions. The global norm is clipped throughout: clipped until AGVM
    starts only, as in the paper, runs diverge as soon as that ends."""
    method, pipeline = METHODS[run.method], PIPELINES[run.pipeline]
    steps = run.epochs * IMAGES // run.batch
    start = round(0.14 * steps)
    opts = [
        *SMALL, *f"""
        MODEL.WEIGHTS {weights(run.pipeline)} {pipeline.options} SEED {run.seed} OUTPUT_DIR {folder}
        SOLVER.OPTIMIZER {method.optimizer} SOLVER.BASE_LR {run.lr} SOLVER.IMS_PER_BATCH {run.batch}
        SOLVER.MICRO_BATCH_SIZE {UNIT}
        SOLVER.WEIGHT_DECAY {0.05 if method.optimizer in ("ADAMW", "LAMB") else 0.0001}
        SOLVER.MAX_ITER {steps} SOLVER.STEPS ({steps * 3 // 4},{steps * 7 // 8})
        SOLVER.WARMUP_ITERS {steps // 10}
        AGVM.MODE {method.mode} AGVM.ESTIMATOR {method.estimator} AGVM.RULE {method.rule}
        AGVM.BASE_BATCH_SIZE {UNIT} AGVM.START_ITER {start} AGVM.MOMENTUM {method.momentum}
        """.split(), *run.options.split(),
    ]  # fmt: skip
    return read_config(str(ROOT / "configs" / pipeline.config), opts)


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
    register_rules(run.lr)
    cfg = config(run, folder)
    check_config(cfg, run.workers)
    cfg.freeze()
    default_setup(cfg, argparse.Namespace(config_file="", eval_only=False))
    Trainer.backbone_lr = METHODS[run.method].backbone_lr
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    record = Record(next(h for h in trainer._hooks if isinstance(h, AGVMHook)).modulator)
    trainer.register_hooks([record])
    pipeline = PIPELINES[run.pipeline]
    start = time.time()
    result: dict = {"accuracy": 0.0, "diverged_at": None}
    try:
        trainer.train()
        if comm.is_main_process():
            found = trainer._last_eval_results[pipeline.task][pipeline.metric]
            result["accuracy"] = round(found, 3) if found == found else 0.0  # NaN: nothing found
    except FloatingPointError:
        result["diverged_at"] = trainer.iter
    row = {
        **run._asdict(),
        "metric": f"{pipeline.task} {pipeline.metric}",
        **result,
        "iterations": cfg.SOLVER.MAX_ITER,
        "seconds": round(time.time() - start),
        **record.summary(cfg.SOLVER.STEPS[0]),
        "torch": torch.__version__,
        "machine": f"{cpu()}, 1 thread",
        "weights_hash": hashlib.sha256(weights(run.pipeline).read_bytes()).hexdigest()[:12],
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


def make_weights(pipelines: Iterable[str]) -> None:
    """Pre-train the backbones that are not there yet."""
    for path in sorted({weights(pipeline) for pipeline in pipelines}):
        if not path.exists():
            print(f"pre-training {path.stem}: {pretrain(str(path), path.stem)}")


def do_run(run: Run, path: Path) -> dict:
    """Train here, and add the run's line to the results."""
    folder = ROOT / "output/large_batch" / run.name
    shutil.rmtree(folder, ignore_errors=True)
    launch(train, run.workers, args=(run, str(folder)), dist_url="auto")
    row = json.loads((folder / "row.json").read_text())
    with path.open("a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.write(json.dumps(row) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    return row


def grid(
    searches: list[Search], path: Path, jobs: int, seeds: Sequence[int], minutes: float
) -> None:
    """Run what is missing, `jobs` at a time; start nothing new after `minutes`."""
    make_weights(each.cell.pipeline for each in searches)
    ends = time.time() + 60 * minutes
    running: dict[concurrent.futures.Future, Run] = {}
    bar = tqdm(unit="run")
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        while True:
            todo = pending(searches, read(path), set(running.values()), seeds)
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


def start(run: Run, path: Path) -> dict:
    """In a process of its own."""
    start_process("benchmarks.study", {"results": path.resolve(), **run._asdict()})
    return read(path)[run]


def start_process(package: str, flags: dict[str, object]) -> None:
    """`python -m PACKAGE run --FLAG VALUE ...`, with one thread.

    Raises:
        RuntimeError: it failed; has the end of what it printed.
    """
    command = [sys.executable, "-W", "ignore", "-m", package, "run"]
    for key, value in flags.items():
        command += [f"--{key}", str(value)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-4000:]}")
