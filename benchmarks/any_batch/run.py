"""One run, and all that are missing, each in a process of its own."""

from __future__ import annotations
import argparse
import concurrent.futures
import fcntl
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
import torch
from detectron2.engine import HookBase, default_setup

from agvm_d2 import AGVMHook
from agvm_d2.agvm import AGVM
from agvm_d2.d2.checks import check_config
from agvm_d2.d2.loader import build_train_loader
from agvm_d2.progress import Progress
from benchmarks.study import run as study

from .scenes import Scenes
from .setting import ARMS, PIPELINES, ROOT, Run, config, weights_hash

RESULTS = ROOT / "benchmarks/results/any_batch.jsonl"
POINTS = 60  # of each curve that a run keeps


class Trainer(study.Trainer):
    @classmethod
    def build_train_loader(cls, cfg):
        stuff = cfg.MODEL.META_ARCHITECTURE in ("PanopticFPN", "SemanticSegmentor")
        return build_train_loader(cfg, mapper=Scenes(cfg.SEED, cfg.MODEL.MASK_ON, stuff))


class Curves(HookBase):
    """AGVM's scalars of each measured iteration."""

    def __init__(self, agvm: AGVM):
        self.agvm = agvm
        self.rows: list[dict] = []

    def after_step(self) -> None:
        if self.agvm.measured:
            self.rows.append({"iteration": self.trainer.iter, **self.agvm.scalars()})

    def thin(self) -> dict[str, list]:
        """Scalar -> values, None where it was not measurable."""
        rows = self.rows[:: max(1, len(self.rows) // POINTS)]
        names = sorted({name for row in rows for name in row})
        return {
            name.removeprefix("agvm/"): [
                None if name not in row else float(f"{row[name]:.4g}") for row in rows
            ]
            for name in names
        }


class KeepDecay(HookBase):
    """From the first drop of the learning rate on, the factors stay as they are."""

    def __init__(self, agvm: AGVM, drop: int):
        self.agvm, self.drop = agvm, drop

    def after_step(self) -> None:
        if self.agvm.progress >= self.drop:
            self.agvm.modulator.rule = lambda moments: torch.full_like(moments.unit_sq, torch.nan)


class LeastGain(Progress):
    """A step counts as many steps of the base batch as the smallest module's gain."""

    @property
    def gain(self) -> float:
        return self.gains[:-1].min().item()


def train(run: Run, folder: Path) -> dict:
    """Train here; the run's line in the results."""
    torch.set_num_threads(1)
    cfg = config(run, str(folder))
    check_config(cfg, 1)
    cfg.freeze()
    default_setup(cfg, argparse.Namespace(config_file="", eval_only=False))
    Trainer.backbone_lr = ARMS[run.arm].backbone_lr
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    agvm = next(h for h in trainer._hooks if isinstance(h, AGVMHook)).agvm
    arm, curves = ARMS[run.arm], Curves(agvm)
    trainer.register_hooks([curves])
    if arm.by_least:
        model = agvm._progress
        least = LeastGain(len(agvm.modules), model.base_share, model.momentum, model.max_iter)
        agvm._progress = least
    if arm.keep_decay:
        trainer.register_hooks([KeepDecay(agvm, cfg.SOLVER.STEPS[0])])
    task, metric, _ = PIPELINES[run.pipeline]
    start = time.time()
    accuracy, diverged = 0.0, None
    try:
        trainer.train()
        if cfg.DATASETS.TEST:
            found = trainer._last_eval_results[task][metric]
            accuracy = round(found, 3) if found == found else 0.0  # NaN: nothing found
    except FloatingPointError:
        diverged = trainer.iter
    done = trainer.iter
    return {
        **run._asdict(),
        "metric": f"{task} {metric}",
        "accuracy": accuracy,
        "diverged_at": diverged,
        "took": done,
        "images": done * run.batch,
        "seconds": round(time.time() - start),
        "curves": curves.thin(),
        "torch": torch.__version__,
        "machine": f"{study.cpu()}, 1 thread",
        "weights_hash": weights_hash(),
    }


def do_run(run: Run, path: Path) -> dict:
    """Train here, and add the run's line to the results."""
    folder = ROOT / "output/any_batch" / run.name
    shutil.rmtree(folder, ignore_errors=True)
    row = train(run, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.write(json.dumps(row) + "\n")
    return row


def read(path: Path = RESULTS) -> dict[Run, dict]:
    """Of a run done twice, the last."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {Run(**{key: row[key] for key in Run._fields}): row for row in rows}


def grid(runs: Sequence[Run], path: Path, jobs: int, minutes: float) -> None:
    """Those that are missing, `jobs` at a time; start nothing new after `minutes`."""
    ends = time.time() + 60 * minutes

    def start(run: Run) -> None:
        if time.time() > ends or run in read(path):
            return
        flags = {"results": path.resolve(), **run._asdict()}
        try:
            study.start_process("benchmarks.any_batch", flags)
            print(f"{run.name}: {read(path)[run]['accuracy']}", flush=True)
        except RuntimeError as error:  # the others go on
            print(f"{run.name} failed: {error}", flush=True)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(start, runs))
