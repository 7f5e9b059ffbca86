#!/usr/bin/env python
"""What a run survives. Each part prints what it counted, and can write it as JSON.

python benchmarks/reliability.py saves --kills 50    # killed while it writes checkpoints
python benchmarks/reliability.py workers --kills 50  # one of two workers killed, then --resume
python benchmarks/reliability.py long --steps 20000  # memory, open files, log size
"""

from __future__ import annotations
import argparse
import itertools
import json
import os
import pickle
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
import torch
from detectron2.engine import HookBase, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn
from tqdm import trange

from agvm_d2 import AGVMTrainer, add_agvm_config
from agvm_d2.d2.checkpoint import AtomicCheckpointer

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs/Digits-Detection/faster_rcnn_thin_R_50_FPN_bs64_agvm.yaml"
TRAINING = """
    --resume --num-gpus 2 --dist-url auto SOLVER.IMS_PER_BATCH 4 SOLVER.MICRO_BATCH_SIZE 0
    SOLVER.MAX_ITER 1000000 SOLVER.CHECKPOINT_PERIOD 5 DATALOADER.NUM_WORKERS 0 AGVM.INTERVAL 2
    AGVM.START_ITER 4 SOLVER.BASE_LR 0.001
"""


def read_checkpoints(folder: str, due: Iterable[str] = ()) -> dict[str, dict | None]:
    """Name -> content, of the checkpoints in `folder`, those due there, and the one that
    `last_checkpoint` names; None: it cannot be read."""
    names = {name for name in os.listdir(folder) if name.endswith(".pth")} | {*due}
    tagged = tag(folder)
    return {name: load(folder, name) for name in names | ({tagged} if tagged else set())}


def load(folder: str, name: str) -> dict | None:
    try:
        return torch.load(os.path.join(folder, name), weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return None


def tag(folder: str) -> str:
    """What `last_checkpoint` says; "": there is none."""
    path = Path(folder, "last_checkpoint")
    return path.read_text() if path.exists() else ""


def save_forever(checkpointer: AtomicCheckpointer, prefix: str, report: int) -> None:
    """In a forked process: three files in turn; each finished save's number goes to `report`."""
    try:
        for i in itertools.count():
            nn.init.constant_(checkpointer.model.weight, i)
            checkpointer.save(f"{prefix}_{i % 3}", iteration=i)
            os.write(report, f"{i}\n".encode())
    finally:
        os._exit(1)


def saves(
    kills: int, rng: random.Random, checkpointer: type[AtomicCheckpointer] = AtomicCheckpointer
) -> dict:
    """A process that does nothing but save is killed at random moments. Lost is a checkpoint whose
    save had ended and that is not there, cannot be read, or is an older one; also one that is there
    and torn, and a `last_checkpoint` that names no readable one, or one before the last."""
    whole = torn = lost = 0
    torch.set_num_threads(1)  # OpenMP does not survive a fork
    with tempfile.TemporaryDirectory() as folder:
        first = nn.Linear(1, 1)
        nn.init.constant_(first.weight, -1)
        checkpointer(first, folder).save("model_start", iteration=-1)
        due = {"model_start.pth": -1}
        for kill in range(kills):
            ended, report = os.pipe()
            pid = os.fork()
            if pid == 0:
                model = nn.Linear(1000, 2000)  # 8 MB
                save_forever(checkpointer(model, folder), f"model_{kill}", report)
            os.close(report)
            with open(ended) as f:
                numbers = [int(f.readline())]
                time.sleep(rng.uniform(0, 0.6))
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                numbers += [int(line) for line in f]
            due.update((f"model_{kill}_{i % 3}.pth", i) for i in numbers)
            found = {}
            for name, data in read_checkpoints(folder, due).items():
                if data and (data["model"]["weight"] == data["iteration"]).all():
                    found[name] = data["iteration"]
                whole += name in found
                lost += name not in found or found[name] < due.get(name, -1)
            tagged = tag(folder)
            lost += tagged in found and found[tagged] < numbers[-1]
            torn += any(name.endswith(".part") for name in os.listdir(folder))
            for name in os.listdir(folder):
                if name not in (tagged, "last_checkpoint"):
                    os.remove(os.path.join(folder, name))
            due = {tagged: found[tagged]} if tagged in found else {}
    return {
        "kills": kills,
        "in_the_middle_of_a_write": torn,
        "whole_files_read": whole,
        "lost": lost,
    }


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        found = [int(child) for child in f.read().split()]
    return [c for c in found if b"spawn_main" in open(f"/proc/{c}/cmdline", "rb").read()]


def last(folder: str) -> int:
    """The iteration of the last checkpoint; -1: none that can be read."""
    data = load(folder, tag(folder))
    return data["iteration"] if data else -1


def workers(kills: int, rng: random.Random) -> dict:
    """One training in two workers; at random iterations one worker is killed, then it resumes.
    Lost is a checkpoint that is torn, was there and is not, or is named and not there."""
    seconds, resumed, lost = [], 0, 0
    kept: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        for _ in trange(kills, unit="kill"):
            before = last(folder)
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", str(ROOT / "train_net.py")]
                + ["--config-file", str(CONFIG), *TRAINING.split(), "OUTPUT_DIR", folder],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            deadline = time.time() + 300
            while last(folder) == before:  # until it has trained on
                assert process.poll() is None and time.time() < deadline, process.stdout.read()
                time.sleep(0.1)
            time.sleep(rng.uniform(0, 1.5))
            os.kill(rng.choice(children(process.pid)), signal.SIGKILL)
            start = time.time()
            output = process.communicate(timeout=120)[0]
            seconds.append(time.time() - start)
            assert process.returncode not in (0, None), output[-2000:]
            assert re.search(r"error: worker \d .*--resume", output), output[-2000:]
            if before >= 0:
                assert f"Starting training from iteration {before + 1}\n" in output, output[-4000:]
                resumed += 1
            found = read_checkpoints(folder, kept)
            kept = {name for name, data in found.items() if data}
            lost += len(found) - len(kept)
            reached = last(folder)
    return {
        "kills": kills,
        "resumed_from_the_last_checkpoint": resumed,
        "seconds_to_the_end": {"median": statistics.median(seconds), "max": max(seconds)},
        "iterations_reached": reached,
        "lost": lost,
    }


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, data):
        return {"loss": (self.head(self.backbone(data).tanh()) - data[:, :1]).square().mean()}


class Noise:
    def __iter__(self):
        while True:
            yield torch.randn(4, 8)


class TinyTrainer(AGVMTrainer):
    @classmethod
    def build_model(cls, cfg):
        torch.manual_seed(0)
        return Tiny()

    @classmethod
    def build_train_loader(cls, cfg):
        return Noise()


class Watch(HookBase):
    """Resident memory, in bytes, and open files, 40 times."""

    def __init__(self, period: int):
        self.period = period
        self.rows: list[tuple[int, int, int]] = []

    def after_step(self):
        if (self.trainer.iter + 1) % self.period == 0:
            with open("/proc/self/statm") as f:
                resident = int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            self.rows.append((self.trainer.iter + 1, resident, len(os.listdir("/proc/self/fd"))))


def long_worker(steps: int, folder: str, enabled: bool) -> None:
    from detectron2.config import get_cfg

    torch.set_num_threads(1)
    setup_logger(folder, distributed_rank=comm.get_rank())
    cfg = get_cfg()
    add_agvm_config(cfg)
    cfg.MODEL.DEVICE, cfg.OUTPUT_DIR, cfg.DATASETS.TEST = "cpu", folder, ()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.IMS_PER_BATCH = steps, (), 8
    cfg.SOLVER.CHECKPOINT_PERIOD = steps
    cfg.AGVM.START_ITER, cfg.AGVM.ENABLED = 100, enabled
    trainer = TinyTrainer(cfg)
    watch = Watch(steps // 40)
    trainer.register_hooks([watch])
    trainer.train()
    with open(os.path.join(folder, f"watch{comm.get_rank()}.json"), "w") as f:
        json.dump(watch.rows, f)


def slope(rows: list, column: int) -> tuple[float, float]:
    """Growth of `column` per 1,000 iterations over the last three quarters, and its standard
    error."""
    rows = rows[len(rows) // 4 :]
    x = torch.tensor([row[0] / 1000 for row in rows], dtype=torch.float64)
    y = torch.tensor([row[column] for row in rows], dtype=torch.float64)
    x = x - x.mean()
    k = (x * (y - y.mean())).sum() / x.square().sum()
    rest = y - y.mean() - k * x
    return float(k), float((rest.square().sum() / (len(x) - 2) / x.square().sum()).sqrt())


def long(steps: int, rng: random.Random) -> dict:
    """With AGVM and without: Detectron2's EventStorage itself keeps up to 1,000,000 values of each
    scalar."""
    found: dict = {"steps": steps, "workers": 2}
    for enabled in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            launch(long_worker, 2, dist_url="auto", args=(steps, folder, enabled))
            part: dict = {}
            for rank in range(2):
                with open(os.path.join(folder, f"watch{rank}.json")) as f:
                    rows = json.load(f)
                growth, error = slope(rows, 1)
                part[f"rank{rank}"] = {
                    "resident_MB": [round(rows[i][1] / 1e6, 1) for i in (len(rows) // 4, -1)],
                    "growth_kB_per_1000_steps": round(growth / 1e3),
                    "standard_error": round(error / 1e3),
                    "open_files": [rows[len(rows) // 4][2], rows[-1][2]],
                }
            for name in ("log.txt", "metrics.json"):
                size = os.path.getsize(os.path.join(folder, name))
                part[f"{name}_bytes_per_1000_steps"] = round(size / steps * 1000)
        found["agvm" if enabled else "plain"] = part
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["saves", "workers", "long"])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    functions = {"saves": saves, "workers": workers, "long": long}
    result = functions[args.part](args.steps if args.part == "long" else args.kills, rng)
    print(json.dumps(result, indent=1))
    if args.json:
        with open(args.json, "w") as f:
            json.dump({**result, "torch": torch.__version__}, f, indent=1)


if __name__ == "__main__":
    main()
