#!/usr/bin/env python
"""Does this package work on your GPU? About ten minutes; writes a report to paste into an issue.

    python benchmarks/gpu_check.py    # or: make gpu-check

Runs tests/integration/test_cuda*.py, benchmarks/overhead.py on each number of GPUs up to all of
them, and 50 iterations of a COCO config at 800 pixels on the bundled digits, with autocast in
bfloat16 and in float16. Needs no download. The exit code is 1 if a part fails.
"""

from __future__ import annotations
import argparse
import json
import math
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
import torch
from detectron2.engine import default_argument_parser, default_setup

import agvm_d2.data  # noqa: F401  registers the digits
from agvm_d2 import AGVMTrainer
from agvm_d2.d2.config import read_config
from agvm_d2.d2.launch import launch

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/COCO-Detection/faster_rcnn_R_50_FPN_16ep_bs256_agvm.yaml"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ITERATIONS = 50
CUDA_TESTS = ("tests/integration/test_cuda.py", "tests/integration/test_cuda_sharded.py")


def options(gpus: int) -> list[str]:
    """What the config needs to train a short while from scratch, two images at a time on a GPU."""
    return shlex.split(f"""
        MODEL.WEIGHTS "" MODEL.ROI_HEADS.NUM_CLASSES 10 DATASETS.TRAIN "('digits_train',)"
        DATASETS.TEST () DATALOADER.NUM_WORKERS 2 SOLVER.AMP.ENABLED True SOLVER.ON_NONFINITE skip
        SOLVER.IMS_PER_BATCH {4 * gpus} SOLVER.MICRO_BATCH_SIZE 2 SOLVER.BASE_LR 0.005
        SOLVER.MAX_ITER {ITERATIONS} SOLVER.STEPS () SOLVER.WARMUP_ITERS 5
        SOLVER.CLIP_GRADIENTS.ITER_RANGE () SOLVER.CHECKPOINT_PERIOD {ITERATIONS}
        AGVM.START_ITER 10 AGVM.INTERVAL 5 AGVM.MOMENTUM 0.5 SEED 1
    """)


def train(args: argparse.Namespace) -> None:
    """In a worker: train by `args`, and `args.dtype` as autocast's."""
    cfg = read_config(args.config_file, args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    trainer = AGVMTrainer(cfg)
    trainer.resume_or_load(resume=False)
    inner = trainer._trainer
    inner.precision = DTYPES[args.dtype]
    scales = args.dtype == "float16"  # bfloat16 has float32's range
    inner.grad_scaler = torch.amp.GradScaler(cfg.MODEL.DEVICE, enabled=scales)
    trainer.train()


def train_in_workers(dtype: str, gpus: int, folder: str, more: Sequence[str] = ()) -> str:
    """Train; a line on what came out.

    Args:
        more: KEY VALUE pairs for the config.

    Raises:
        ValueError: a loss or a factor is not what training gives.
    """
    out = Path(folder) / dtype
    flags = ["--config-file", str(ROOT / CONFIG), "--num-gpus", str(gpus), "--dist-url", "auto"]
    opts = [*options(gpus), *more, "OUTPUT_DIR", str(out)]
    args = default_argument_parser().parse_args([*flags, *opts])
    args.dtype = dtype
    launch(train, args, None)
    return summary([json.loads(line) for line in (out / "metrics.json").read_text().splitlines()])


def summary(rows: list[dict]) -> str:
    """Of metrics.json.

    Raises:
        ValueError: there is a loss that is not finite, or no factor.
    """
    losses = [row["total_loss"] for row in rows if "total_loss" in row]
    scale = {
        key.rsplit("/", 1)[1]: value
        for row in rows
        for key, value in row.items()
        if key.startswith("agvm/lr_scale/")
    }
    if not losses or not math.isfinite(losses[-1]):
        raise ValueError(f"the losses are {losses}")
    if not any(value != 1 for value in scale.values()):
        raise ValueError(f"the factors are {scale}: AGVM measured nothing")
    factors = ", ".join(f"{name} {value:.3f}" for name, value in scale.items())
    seconds = [row["time"] for row in rows if "time" in row]
    step = f", {seconds[-1]:.3f} s per iteration" if seconds else ""
    return f"loss {losses[0]:.3f} -> {losses[-1]:.3f}{step}; factors: {factors}"


def machine() -> str:
    """Versions and GPUs."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return (
        f"{len(gpus)} x {', '.join(sorted(set(gpus)))}; Python {platform.python_version()}, torch "
        f"{torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl}"
    )


def command(*args: str) -> tuple[bool, str]:
    """Whether Python with this command line ended well, and the end of its output."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode == 0, "\n".join(done.stdout.splitlines()[-60:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", metavar="FILE", default="output/gpu_check.md")
    parser.add_argument("--train", choices=DTYPES, help="only this part of it, in this process")
    args = parser.parse_args()
    gpus = torch.cuda.device_count()
    if not gpus:
        sys.exit(f"gpu_check needs a GPU, and torch {torch.__version__} finds none here.")
    if args.train:
        with tempfile.TemporaryDirectory() as folder:
            print(train_in_workers(args.train, gpus, folder))
        return
    workers = sorted({1, min(2, gpus), gpus})
    overhead = ["benchmarks/overhead.py", "--device", "cuda", "--rounds", "3", "--workers"]
    parts = {
        "tests": ["-m", "pytest", "-q", "-rs", *CUDA_TESTS],
        "overhead": [*overhead, *map(str, workers)],
        **{f"training in {d}": ["benchmarks/gpu_check.py", "--train", d] for d in DTYPES},
    }
    Path(args.report).parent.mkdir(parents=True, exist_ok=True)
    report, failed = [f"# gpu_check\n\n{machine()}\n"], []
    for name, part in parts.items():
        print(f"{name} ...", flush=True)
        start = time.time()
        ok, output = command(*part)
        failed += [] if ok else [name]
        title = f"{name}: {'ok' if ok else 'FAILED'} in {time.time() - start:.0f} s"
        report.append(f"## {title}\n\n```\n{output}\n```\n")
        Path(args.report).write_text("\n".join(report))
    print(f"Wrote {args.report}.")
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
