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
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from torch import nn

from agvm_d2 import AGVMHook
from agvm_d2.d2.checks import check_config
from benchmarks.study import run as study

from .curvature import AT, IMAGES, Curvature
from .hooks import Curves, KeepDecay, ModelGain, Profile
from .scenes import NUM_TRAIN
from .setting import ARMS, BASE, PARTS, PIPELINES, ROOT, UNIT, Run, config, weights_hash
from .trainer import Trainer, mapper

RESULTS = ROOT / "benchmarks/results/any_batch.jsonl"


def train(run: Run, folder: Path) -> dict:
    """Train here; the run's line in the results."""
    torch.set_num_threads(1)
    cfg = config(run, str(folder))
    check_config(cfg, 1)
    cfg.freeze()
    default_setup(cfg, argparse.Namespace(config_file="", eval_only=False))
    Trainer.backbone_lr = ARMS[run.arm].backbone_lr
    if run.arm == "sam":
        from .sam import SAMTrainer as trainer_class
    else:
        trainer_class = Trainer
    trainer = trainer_class(cfg)
    agvm = next((h.agvm for h in trainer._hooks if isinstance(h, AGVMHook)), None)
    arm, curves = ARMS[run.arm], Curves(agvm)
    if arm.by_model:
        least = agvm._progress
        model = ModelGain(len(agvm.modules), least.base_share, least.momentum, least.max_iter)
        agvm._progress = model
    if arm.profile:
        trainer.register_hooks([Profile(agvm)])
    if arm.keep_decay:
        trainer.register_hooks([KeepDecay(agvm, cfg.SOLVER.STEPS[0])])
    curvature = None
    if (run.arm, run.batch, run.options) == ("sgd", BASE, ""):
        images = [mapper(cfg)({"image_id": i}) for i in range(NUM_TRAIN - IMAGES, NUM_TRAIN)]
        at = [round(share * run.iterations) for share in AT]
        curvature = Curvature(agvm.modules, images, UNIT, at)
        trainer.register_hooks([curvature])
    trainer.register_hooks([curves])
    trainer.resume_or_load(resume=True)  # of a run that was stopped
    task, metric, _ = PIPELINES[run.pipeline]
    accuracy, diverged, parts, seen = 0.0, None, {}, {}
    try:
        trainer.train()
        if cfg.DATASETS.TEST:
            found = trainer._last_eval_results[task]
            accuracy = _rounded(found[metric])
            parts = _parts(found)
            seen = _parts(evaluate_seen(cfg, trainer.model)[task]) if parts else {}
    except FloatingPointError:
        diverged = trainer.iter
    done = trainer.iter
    return {
        **run._asdict(),
        "metric": f"{task} {metric}",
        "accuracy": accuracy,
        "parts": parts,
        "seen_parts": seen,
        "diverged_at": diverged,
        "took": done,
        "images": done * run.batch,
        "seconds": round(curves.seconds),
        "curves": curves.thin(),
        "curvature": {} if curvature is None else curvature.found,
        "noise_curvature": {} if curvature is None else curvature.of_noise,
        "torch": torch.__version__,
        "machine": machine(cfg.MODEL.DEVICE),
        "weights_hash": weights_hash() if cfg.MODEL.WEIGHTS else "none",
    }


def machine(device: str) -> str:
    if device == "cpu":
        return f"{study.cpu()}, 1 thread"
    return torch.cuda.get_device_name()


def evaluate_seen(cfg: CfgNode, model: nn.Module) -> dict:
    """As at the end of training, on new images of the glyphs and photographs of training."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = tuple(n.replace("scenes_", "scenes_seen_") for n in cfg.DATASETS.TEST)
    return Trainer.test(cfg, model)


def _parts(found: dict[str, float]) -> dict[str, float]:
    return {name: _rounded(found[name]) for name in PARTS if name in found}


def _rounded(value: float) -> float:
    return round(value, 3) if value == value else 0.0  # NaN: nothing found


def do_run(run: Run, path: Path) -> dict:
    """Train here and add the run's line to the results. One that was stopped goes on; one that has
    a line starts again."""
    folder = ROOT / "output/any_batch" / run.name
    if run in read(path):
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
