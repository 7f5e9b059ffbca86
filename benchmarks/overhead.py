#!/usr/bin/env python
"""What AGVM costs in a step: time, collectives, bytes, memory, beside plain DDP and the official
code's scheme, on a CPU over gloo.

    python benchmarks/overhead.py --model r50 --workers 2 --rounds 5 --json overhead.json

Variants run in turn, step by step, in rotating order, on the same images with the same random
numbers; one thread a worker. A round is 10 steps of each; ratios are of a round to plain DDP's:
median (lowest to highest). CPU time is the process's, less disturbed than wall time. "own code" is
CPU time in the package's functions over the round's wall time, without the averaging of buckets,
which takes DDP's place and stands beside it. Peak memory is taken in jobs of their own.
"""

from __future__ import annotations
import argparse
import functools
import json
import os
import platform
import resource
import statistics
import tempfile
import time
import torch
import torch.distributed as dist
from detectron2.config import get_cfg
from detectron2.engine import launch
from detectron2.model_zoo import get_config_file
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from agvm_d2 import AGVMHook, add_agvm_config, moments, split_param_groups
from agvm_d2.modules import assign_modules
from agvm_d2.variance import lr_ratio

VARIANTS = (
    "plain",
    "agvm interval 10",
    "agvm interval 1",
    "split interval 1",
    "official interval 1",
)
ROUND = 10  # steps, so that each round has one measurement of interval 10


def make_model(name: str) -> tuple[torch.nn.Module, int]:
    """The model and the side of its images."""
    cfg = get_cfg()
    add_agvm_config(cfg)
    if name == "r50":
        cfg.merge_from_file(get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
    else:
        cfg.merge_from_file("configs/Digits-Detection/faster_rcnn_thin_R_50_FPN_bs64_agvm.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    torch.manual_seed(0)
    return build_model(cfg).train(), 320 if name == "r50" else 96


def make_image(side: int, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    corners = torch.rand(4, 2, generator=g) * side * 0.6
    instances = Instances((side, side))
    instances.gt_boxes = Boxes(torch.cat([corners, corners + side * 0.3], 1))
    instances.gt_classes = torch.randint(10, (4,), generator=g)
    image = torch.randint(256, (3, side, side), generator=g, dtype=torch.uint8)
    return {"image": image, "instances": instances, "height": side, "width": side}


class Official:
    """The official code's scheme: a DDP of its own with one all-reduce a parameter after backward,
    and on a measured step 3 P + 2 collectives: for each parameter the mean within each half, an
    exchange between the halves, and the mean over all; then the factors."""

    def __init__(self, model):
        self.model = model
        self.modules = assign_modules(model)
        self.factors = dict.fromkeys(self.modules, 1.0)
        world, rank = dist.get_world_size(), dist.get_rank()
        half = world // 2
        groups = [dist.new_group(list(range(half))), dist.new_group(list(range(half, world)))]
        self.half, self.half_group = half, groups[rank >= half]
        pairs = [dist.new_group([i, i + half]) for i in range(half)]
        self.pair = pairs[rank % half]

    def after_backward(self) -> None:
        halves: dict[str, tuple[list, list]] = {}
        for module, params in self.modules.items():
            own, both = [], ([], [])
            for p in params:
                grad = p.grad.clone()
                dist.all_reduce(grad, group=self.half_group)
                own.append(grad / self.half)
            for grad in own:
                gathered = [torch.empty_like(grad) for _ in range(2)]
                dist.all_gather(gathered, grad, group=self.pair)
                both[0].append(gathered[0].flatten())
                both[1].append(gathered[1].flatten())
            halves[module] = both
        for params in self.modules.values():
            for p in params:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        variances = {}
        for module, (a, b) in halves.items():
            cosine = torch.nn.functional.cosine_similarity(torch.cat(a), torch.cat(b), dim=0)
            variances[module] = 1 - cosine.item()
        for module, variance in variances.items():
            ratio = lr_ratio(variance, variances["backbone"])
            self.factors[module] = 0.97 * self.factors[module] + 0.03 * ratio**0.5
        numbers = torch.tensor(list(self.factors.values()))
        dist.broadcast(numbers, 0)
        dist.broadcast(torch.tensor(list(variances.values())), 0)
        self.factors = dict(zip(self.modules, numbers.tolist(), strict=True))


class OwnTime:
    """CPU seconds of the calling threads inside the package's functions, nothing counted twice."""

    def __init__(self):
        self._spent: list[float] = []  # append is atomic: futures call back on other threads
        self._averaging: list[float] = []
        self._wrap(moments, "_bucket_hook", self._spent)
        for name in ("before_step", "after_backward", "after_step"):
            self._wrap(AGVMHook, name, self._spent)
        for name in ("_before_optimizer_step", "_after_optimizer_step"):
            self._wrap(AGVMHook, name, self._spent)
        self._wrap(Official, "after_backward", self._spent)
        # Inside _bucket_hook; what `before` returns runs later.
        self._wrap(moments.BucketTap, "average", self._averaging)
        before = moments.BucketTap.before
        moments.BucketTap.before = lambda tap, bucket: self._timed(before(tap, bucket), self._spent)

    def _timed(self, function, spent: list[float]):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent.append(time.thread_time() - start)

        return timed

    def _wrap(self, owner, name: str, spent: list[float]) -> None:
        setattr(owner, name, self._timed(getattr(owner, name), spent))

    def take(self) -> tuple[float, float]:
        """Seconds since the last call: without averaging, and averaging."""
        averaging, spent = sum(self._averaging), sum(self._spent)
        self._averaging.clear()
        self._spent.clear()
        return spent - averaging, averaging


class Job:
    """One variant's model, optimizer and step."""

    def __init__(self, variant: str, model_name: str):
        self.model, self.side = make_model(model_name)
        self.variant = variant
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=1e-7, momentum=0.9, foreach=True
        )
        self.hook = self.official = None
        if variant.startswith("official"):
            self.official, self.ddp = Official(self.model), self.model
        else:
            self.ddp = DistributedDataParallel(self.model, broadcast_buffers=False)
        if variant.startswith(("agvm", "split")):
            split_param_groups(self.optimizer, self.model)
            self.hook = AGVMHook(
                self.ddp,
                self.optimizer,
                interval=int(variant.split()[-1]),
                estimator="split" if variant.startswith("split") else "pairwise",
                batch_size=dist.get_world_size(),
                log_period=10**9,
            )
            self.hook.before_train()
        self.iteration = 0

    def step(self, seed: int) -> tuple[float, float]:
        """Wall and CPU seconds of one step, all workers at a time."""
        data = [make_image(self.side, 1000 * seed + dist.get_rank())]
        torch.manual_seed(seed)
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        with EventStorage(self.iteration):
            if self.hook:
                self.hook.before_step()
            loss = sum(self.ddp(data).values())
            self.optimizer.zero_grad()
            loss.backward()
            if self.hook:
                self.hook.after_backward()
            if self.official:
                self.official.after_backward()
            self.optimizer.step()
            if self.hook:
                self.hook.after_step()
        dist.barrier()
        self.iteration += 1
        return time.perf_counter() - start, time.process_time() - cpu


def count_collectives(job: Job, steps: int) -> list[tuple[int, int]]:
    """(calls, bytes) of each step, seen where torch.distributed hands them to gloo."""
    counted: list[tuple[int, int]] = []
    calls: list[int] = []
    names = ("all_reduce", "all_gather", "broadcast", "reduce")
    originals = {name: getattr(dist, name) for name in names}

    def spy(name):
        def call(first, *args, **kwargs):
            tensors = args[:1] if name == "all_gather" else [first]
            calls.append(sum(t.numel() * t.element_size() for t in tensors))
            return originals[name](first, *args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, spy(name))
    try:
        for i in range(steps):
            calls.clear()
            job.step(i)
            counted.append((len(calls), sum(calls)))
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return counted


def averaging_hook(state, bucket):
    """What DDP does in C++ without a hook, where the spy can see it."""
    buffer = bucket.buffer().div_(dist.get_world_size())
    return dist.all_reduce(buffer, async_op=True).get_future().then(lambda f: f.value()[0])


def collectives(model_name: str) -> dict:
    found = {}
    for variant in VARIANTS:
        job = Job(variant, model_name)
        if variant == "plain":
            job.ddp.register_comm_hook(None, averaging_hook)
        job.step(0)  # after it DDP rebuilds its buckets
        job.iteration = 0
        counted = count_collectives(job, 2)
        found[variant] = {"measured": counted[0], "other": counted[1]}
        del job
    return found


def times(model_name: str, rounds: int) -> dict:
    """{figure: {variant: [one value a round]}}"""
    clock = OwnTime()
    jobs = [Job(variant, model_name) for variant in VARIANTS]
    for i in range(2):
        for job in jobs:
            job.step(i)
    figures = ("wall", "cpu", "own", "averaging")
    found = {figure: {v: [0.0] * rounds for v in VARIANTS} for figure in figures}
    for round_ in range(rounds):
        for job in jobs:
            job.iteration = 0  # a round starts with a measurement
        for i in range(ROUND):
            for k in range(len(jobs)):
                job = jobs[(k + i) % len(jobs)]
                clock.take()
                values = (*job.step(ROUND * round_ + i), *clock.take())
                for figure, value in zip(figures, values, strict=True):
                    found[figure][job.variant][round_] += value
    return found


def work(task: str, model_name: str, rounds: int, variant: str, path: str) -> None:
    """In a worker."""
    torch.set_num_threads(1)
    if task == "times":
        result = times(model_name, rounds)
    elif task == "collectives":
        result = collectives(model_name)
    else:
        job = Job(variant, model_name)
        for i in range(4):
            job.step(i)
        result = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if dist.get_rank() == 0:
        with open(path, "w") as f:
            json.dump(result, f)


def run(task: str, workers: int, model_name: str, rounds: int = 0, variant: str = ""):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "result.json")
        args = (task, model_name, rounds, variant, path)
        launch(work, workers, dist_url="auto", args=args)
        with open(path) as f:
            return json.load(f)


def spread(values: list[float], form: str) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["r50", "demo"], default="r50")
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    report = {
        "model": args.model,
        "torch": torch.__version__,
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "runs": {},
    }
    for workers in args.workers:
        timed = run("times", workers, args.model, args.rounds)
        counted = run("collectives", workers, args.model)
        memory = {v: run("memory", workers, args.model, variant=v) for v in VARIANTS}
        report["runs"][workers] = {**timed, "collectives": counted, "peak_memory": memory}
        print(f"\n{args.model}, {workers} workers, {args.rounds} rounds of {ROUND} steps:\n")
        print(
            "| variant | step, s | wall / plain | CPU / plain | own code, % | averaging, % "
            "| measured step: calls, MB | other: calls, MB | peak memory, MB more |\n"
            "|---|---|---|---|---|---|---|---|---|"
        )
        for v in VARIANTS:
            wall = timed["wall"][v]
            ratios = [
                spread([a / b for a, b in zip(timed[c][v], timed[c]["plain"], strict=True)], ".3f")
                for c in ("wall", "cpu")
            ]
            shares = [
                spread([100 * a / b for a, b in zip(timed[c][v], wall, strict=True)], ".2f")
                for c in ("own", "averaging")
            ]
            calls = [
                f"{number}, {size / 1e6:.6f}"
                for number, size in (counted[v]["measured"], counted[v]["other"])
            ]
            more = f"{(memory[v] - memory['plain']) / 1e6:.0f}"
            step = f"{statistics.median(wall) / ROUND:.3f}"
            print("| " + " | ".join([v, step, *ratios, *shares, *calls, more]) + " |")
    if args.json:
        with open(args.json, "w") as f:
            json.dump(report, f, indent=1)


if __name__ == "__main__":
    main()
