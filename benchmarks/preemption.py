#!/usr/bin/env python
"""Preempted runs: a signal at a random moment of an iteration, an evaluation or a save; then
--resume, whose end must be that of an undisturbed run bit for bit.

python -m benchmarks.preemption --runs 20
python -m benchmarks.preemption --restarts 5   # torchrun --max-restarts, a worker killed in each
python -m benchmarks.preemption --cost 2000    # what the hook takes of an iteration
"""

from __future__ import annotations
import argparse
import itertools
import json
import os
import random
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from typing import Any
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import HookBase, default_setup
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm
from torch import nn
from tqdm import tqdm

from agvm_d2 import AGVMTrainer, add_agvm_config
from agvm_d2.d2.launch import launch, worker_from_environment
from agvm_d2.d2.loader import ResumableLoader
from agvm_d2.d2.preemption import EXIT_CODE, PreemptionHook

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ITERATIONS, PERIOD, EVAL_PERIOD = 24, 10, 8
MARK = "AGVM_PREEMPTION_RUN"  # in the environment of all processes of a run
PHASES = ("training", "evaluation", "saving")
LAUNCHERS = ("launch", "torchrun")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


# The run that is disturbed. It says what it does on its standard output.


def say(what: str) -> None:
    if comm.is_main_process():
        print(f"phase: {what}", flush=True)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(8, 8), nn.Linear(8, 1)
        self.dropout = nn.Dropout(0.2)

    def forward(self, data: list[dict]) -> dict[str, torch.Tensor]:
        x = torch.stack([d["image"] for d in data])
        y = self.head(self.dropout(self.backbone(x).tanh()))
        return {"loss": (y - x[:, :1]).square().mean()}


def mapper(record: dict) -> dict:
    generator = torch.Generator().manual_seed(record["image_id"])
    return {"image": torch.randn(8, generator=generator) + 0.1 * torch.randn(8)}


def in_order(size: int, seed: int) -> itertools.cycle:
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return itertools.cycle(order[comm.get_rank() :: comm.get_world_size()].tolist())


class SlowToSave:
    def state_dict(self) -> dict:
        say("saving")
        time.sleep(0.6)
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class Say(HookBase):
    def before_step(self) -> None:
        say("training")
        time.sleep(0.1)


class Trainer(AGVMTrainer):
    evaluations = 0

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        torch.manual_seed(0)
        return Tiny()

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> ResumableLoader:
        return ResumableLoader(
            [{"image_id": i} for i in range(50)],
            mapper,
            cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
            lambda seed: in_order(50, seed),
            num_workers=1,
            grouping=False,
        )

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: object = None) -> dict:
        say("evaluation")
        cls.evaluations += 1
        # One worker waits in the gathering for the other.
        for _ in range(24 if (cls.evaluations + comm.get_rank()) % 2 else 8):
            time.sleep(0.05)
        comm.all_gather(comm.get_rank())
        return {}


def config(folder: str) -> CfgNode:
    cfg = get_cfg()
    add_agvm_config(cfg)
    cfg.MODEL.DEVICE, cfg.OUTPUT_DIR, cfg.DATASETS.TEST = "cpu", folder, ()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.IMS_PER_BATCH = ITERATIONS, (18,), 8
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.CHECKPOINT_PERIOD = 2, PERIOD
    cfg.TEST.EVAL_PERIOD, cfg.SEED, cfg.AGVM.START_ITER, cfg.AGVM.INTERVAL = EVAL_PERIOD, 1, 3, 2
    return cfg


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    cfg = config(args.train)
    default_setup(cfg, args)
    trainer = Trainer(cfg)
    trainer.checkpointer.add_checkpointable("slow", SlowToSave())
    trainer.register_hooks([Say()])
    if args.die_at >= 0 and not trainer.checkpointer.has_checkpoint():
        trainer.register_hooks([Die(args.die_at)])
    trainer.resume_or_load(resume=args.resume)
    say("start")
    trainer.train()


class Die(HookBase):
    """Kills the last worker once."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_step(self) -> None:
        last = comm.get_rank() == comm.get_world_size() - 1
        if self.trainer.iter == self.iteration and last:
            os.kill(os.getpid(), signal.SIGKILL)


# The disturbance.


class Run:
    """One run in processes of its own; `group`: in a process group of its own, as of a terminal."""

    def __init__(self, launcher: str, workers: int, folder: str, *flags: str) -> None:
        self.mark = uuid.uuid4().hex
        command = [sys.executable, "-W", "ignore"]
        if launcher == "torchrun":
            mine = [flag for flag in flags if flag.startswith(("--max-restarts", "--standalone"))]
            flags = tuple(flag for flag in flags if flag not in mine)
            command += ["-m", "torch.distributed.run", "--nproc-per-node", str(workers), *mine]
            command += (
                []
                if "--standalone" in mine
                else [
                    "--master-port",
                    str(free_port()),
                ]
            )
            command += ["-m", "benchmarks.preemption"]
        else:
            command += ["-m", "benchmarks.preemption", "--num-gpus", str(workers)]
        if launcher == "detectron2":  # in the background of a shell, which ignores SIGINT there
            command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command]
            flags += ("--detectron2-launch",)
        for signum in SIGNALS:  # a shell lets what it starts in the background ignore SIGINT
            if signal.getsignal(signum) == signal.SIG_IGN:
                signal.signal(signum, signal.SIG_DFL)
        self.process = subprocess.Popen(
            [*command, "--train", folder, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", MARK: self.mark},
            start_new_session=True,
        )
        self.output = ""

    def read(self, seconds: float = 0) -> bool:
        """More of the output; False at its end, or after that long without any."""
        pipe = self.process.stdout
        assert pipe is not None
        if not select.select([pipe], [], [], seconds)[0]:
            return False
        new = os.read(pipe.fileno(), 65536).decode(errors="replace")
        self.output += new
        return bool(new)

    def wait_for(self, text: str, times: int = 1, seconds: float = 300) -> None:
        while self.output.count(text) < times:
            assert self.read(seconds), f"no {text!r}:\n{self.output[-4000:]}"

    def end(self, seconds: float = 120) -> int:
        """The exit code; the run must end by then."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.read(1) or self.process.poll() is None:
            assert time.monotonic() < deadline, f"it does not end:\n{self.output[-4000:]}"
        while self.read():
            pass
        return self.process.wait()

    def left(self) -> list[str]:
        """Command lines of this run's processes that still live."""
        found = []
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/environ", "rb") as f:
                    if f"{MARK}={self.mark}".encode() not in f.read():
                        continue
                with open(f"/proc/{pid}/cmdline", "rb") as f:
                    found.append(f"{pid} {f.read().decode().replace(chr(0), ' ')}")
            except (OSError, UnicodeDecodeError):
                pass
        return found

    def gone(self, seconds: float = 60) -> float:
        """Seconds until no process is left."""
        start = time.monotonic()
        while self.left():
            assert time.monotonic() - start < seconds, f"left: {self.left()}"
            time.sleep(0.1)
        return time.monotonic() - start


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def same(one: Any, other: Any, path: str = "checkpoint") -> None:
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            same(a, b, f"{path}[{i}]")
    else:
        assert one == other, path


def load(path: str) -> dict:
    return torch.load(path, weights_only=True)


def last(folder: str) -> dict:
    with open(os.path.join(folder, "last_checkpoint")) as f:
        return load(os.path.join(folder, f.read()))


def undisturbed(workers: int, folder: str) -> dict:
    run = Run("launch", workers, folder)
    assert run.end() == 0, run.output[-4000:]
    return load(os.path.join(folder, "model_final.pth"))


def expected_code(launcher: str, signum: int) -> int:
    """torchrun has its own code after a signal, whatever its workers return."""
    if launcher == "launch":
        return EXIT_CODE
    return -signum if signum == signal.SIGUSR1 else 1  # which torchrun does not handle unless told


def preempt(
    launcher: str,
    workers: int,
    phase: str,
    signum: int,
    everyone: bool,
    whole: dict,
    folder: str,
    rng: random.Random,
) -> dict:
    """One preempted run and its resume; what was found."""
    run = Run(launcher, workers, folder)
    run.wait_for("phase: start")
    run.wait_for(f"phase: {phase}", rng.randint(*{"training": (2, 15)}.get(phase, (1, 2))))
    time.sleep(rng.uniform(0, 0.5 if phase == "saving" else 0.9))
    start = time.monotonic()
    if everyone:  # as a terminal's Ctrl-C
        os.killpg(run.process.pid, signum)
    else:
        os.kill(run.process.pid, signum)
    run.wait_for("the same command with --resume")
    written = time.monotonic() - start
    code = run.end()
    orphans = run.gone()
    seconds = time.monotonic() - start
    expected = expected_code(launcher, signum)
    assert code == expected, f"{code}, not {expected}:\n{run.output[-4000:]}"
    reached = last(folder)["iteration"]
    resumed = Run(launcher, workers, folder, "--resume")
    assert resumed.end() == 0, resumed.output[-4000:]
    assert f"Starting training from iteration {reached + 1}\n" in resumed.output
    same(whole, load(os.path.join(folder, "model_final.pth")))
    resumed.gone()
    return {
        "seconds_to_the_checkpoint": round(written, 2),
        "seconds_to_the_end": round(seconds, 2),
        "after_the_launcher": round(orphans, 2),
        "iteration": reached,
    }


def signals(runs: int, rng: random.Random) -> dict:
    """Launcher, workers, phase and signal in turn, so that each meets each."""
    found: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        whole = {n: undisturbed(n, os.path.join(folder, f"whole{n}")) for n in (1, 2)}
        cases = itertools.islice(itertools.cycle(itertools.product(LAUNCHERS, (1, 2))), runs)
        for i, (launcher, workers) in enumerate(tqdm(list(cases), unit="run")):
            phase, signum = PHASES[i // 4 % 3], SIGNALS[(i + i // 4) % 4]
            everyone = i % 3 == 2
            out = os.path.join(folder, f"run{i}")
            result = preempt(launcher, workers, phase, signum, everyone, whole[workers], out, rng)
            name = signal.Signals(signum).name
            found.append({"case": (launcher, workers, phase, name, everyone), **result})
    return {
        "runs": runs,
        "bit_equal": len(found),
        "left_over": 0,
        **{
            key: {
                "median": statistics.median(f[key] for f in found),
                "max": max(f[key] for f in found),
            }
            for key in ("seconds_to_the_checkpoint", "seconds_to_the_end")
        },
        "cases": found,
    }


def restarts(runs: int, rng: random.Random) -> dict:
    """torchrun --max-restarts 1, without and with --standalone; one of two workers is killed."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        whole = undisturbed(2, os.path.join(folder, "whole"))
        for i in range(runs):
            out = os.path.join(folder, f"run{i}")
            flags = ["--max-restarts=1"] + ["--standalone"] * (i % 2)
            run = Run("torchrun", 2, out, *flags, "--die-at", str(rng.randint(11, 18)))
            start = time.monotonic()
            code = run.end(300)
            assert code == 0, run.output[-6000:]
            seconds.append(time.monotonic() - start)
            assert f"Starting training from iteration {PERIOD}\n" in run.output, run.output[-6000:]
            same(whole, load(os.path.join(out, "model_final.pth")))
            run.gone()
    return {"runs": runs, "bit_equal": runs, "seconds": round(statistics.median(seconds), 1)}


class Loop:
    iter, max_iter = 0, 10**9


def cost_worker(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    hook = PreemptionHook(DetectionCheckpointer(nn.Linear(1, 1)))
    loop = hook.trainer = Loop()
    hook.before_train()
    comm.synchronize()
    spent = []
    for loop.iter in range(args.cost):
        time.sleep(0.001)  # the rest of the iteration
        start = time.perf_counter()
        hook.before_step()
        middle = time.perf_counter()
        time.sleep(0.001)
        then = time.perf_counter()
        hook.after_step()
        spent.append(middle - start + time.perf_counter() - then)
    hook.after_train()
    if comm.is_main_process():
        spent.sort()
        median, p90 = (round(spent[int(len(spent) * q)] * 1e6) for q in (0.5, 0.9))
        print(json.dumps({"median_us": median, "p90_us": p90}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=0)
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("--cost", type=int, default=0, metavar="ITERATIONS")
    parser.add_argument("--seed", type=int, default=0)
    inner = parser.add_argument_group("the run itself")
    inner.add_argument("--train", metavar="FOLDER")
    inner.add_argument("--resume", action="store_true")
    inner.add_argument("--detectron2-launch", action="store_true", help="as in a project's script")
    inner.add_argument("--die-at", type=int, default=-1)
    for flag, value in (("num-gpus", 1), ("num-machines", 1), ("machine-rank", 0)):
        inner.add_argument(f"--{flag}", type=int, default=value)
    args = parser.parse_args()
    args.dist_url, args.eval_only = "auto", False
    if args.train and args.detectron2_launch:
        detectron2_launch(train, args.num_gpus, dist_url=args.dist_url, args=(args,))
    elif args.train:
        launch(train, args, worker_from_environment(args))
    elif args.cost:
        args.num_gpus = 2
        launch(cost_worker, args, None)
    else:
        rng = random.Random(args.seed)
        if args.runs:
            print(json.dumps(signals(args.runs, rng), indent=1))
        if args.restarts:
            print(json.dumps(restarts(args.restarts, rng), indent=1))


if __name__ == "__main__":
    main()
