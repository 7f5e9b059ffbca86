#!/usr/bin/env python
"""What AGVM costs in a step: time, collectives, bytes, memory, beside plain DDP and the official
code's scheme, on a CPU over gloo or on GPUs over NCCL.

    python benchmarks/overhead.py --model r50 --workers 2 --rounds 5 --json overhead.json
    python benchmarks/overhead.py --model r50 --device cuda --workers 1 2 4

Variants run in turn, step by step, in rotating order, on the same images with the same random
numbers; one thread per worker. A round is 10 steps of each; ratios are of a round to plain DDP's:
median (lowest to highest). CPU time is the process's, less disturbed than wall time. "own code" is
CPU time in the package's functions over the round's wall time, without the averaging of buckets by
`split`, which takes DDP's place and stands beside it. Calls and bytes are of one worker (lowest to
highest where workers differ). Peak memory is taken in jobs of their own.

On a GPU a worker has a GPU and two images of 800 pixels, and memory is what torch has reserved. CPU
time is left out there, since a thread that waits for the GPU spends it. A single worker, on either
device, compares two micro-batches, and has no halves of workers to compare.
"""

from __future__ import annotations
import argparse
import contextlib
import functools
import json
import os
import platform
import resource
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.config import get_cfg
from detectron2.model_zoo import get_config_file
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from agvm_d2 import AGVM, AGVMHook, add_agvm_config, split, split_param_groups
from agvm_d2.modules import assign_modules
from agvm_d2.moments import TensorTap
from agvm_d2.split import SplitBucketTap
from agvm_d2.variance import lr_ratio

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
VARIANTS = (
    "plain",
    "agvm interval 10",
    "agvm interval 1",
    "split interval 1",
    "official interval 1",
)
ROUND = 10  # steps, so that each round has one measurement of interval 10


def variants() -> list[str]:
    """Those that this number of workers can run."""
    alone = dist.get_world_size() == 1
    return [v for v in VARIANTS if not (alone and v.startswith(("split", "official")))]


def on_cuda() -> bool:
    return dist.get_backend() == "nccl"


def make_model(name: str) -> tuple[torch.nn.Module, int]:
    """The model and the side of its images."""
    cfg = get_cfg()
    add_agvm_config(cfg)
    if name == "r50":
        cfg.merge_from_file(get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
    else:
        cfg.merge_from_file(
            str(CONFIGS / "Digits-Detection/faster_rcnn_thin_R_50_FPN_bs64_agvm.yaml")
        )
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cuda" if on_cuda() else "cpu", ""
    torch.manual_seed(0)
    side = 96 if name == "demo" else 800 if on_cuda() else 320
    return build_model(cfg).train(), side


def make_image(side: int, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    corners = torch.rand(4, 2, generator=g) * side * 0.6
    instances = Instances((side, side))
    instances.gt_boxes = Boxes(torch.cat([corners, corners + side * 0.3], 1))
    instances.gt_classes = torch.randint(10, (4,), generator=g)
    image = torch.randint(256, (3, side, side), generator=g, dtype=torch.uint8)
    return {"image": image, "instances": instances, "height": side, "width": side}


class Official:
    """The official code's scheme, for an even number of workers: a DDP of its own with one
    all-reduce per parameter after backward, and on a measured step 3 P + 2 collectives. Each
    parameter is reduced in either half (a worker's call for the other half returns at once) and
    over all; one all-gather shows two workers, one of each half, all gradients of both; the first
    tells all what it found."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.modules = assign_modules(model)
        self.factors = torch.ones(len(self.modules))
        world = dist.get_world_size()
        half = world // 2
        self.halves = [dist.new_group([*range(half)]), dist.new_group([*range(half, world)])]
        self.pair = dist.new_group([0, min(half + 8, world - 1)])
        self.scale = 1 / (world * half)  # of the loss: gradients are summed over a half, then all
        warnings.filterwarnings("ignore", "Running all_", UserWarning)  # for the other half

    def __call__(self, data: list[dict]) -> dict[str, torch.Tensor]:
        return {name: loss * self.scale for name, loss in self.model(data).items()}

    @torch.no_grad()
    def after_backward(self) -> None:
        params = [p for params in self.modules.values() for p in params]
        for p in params:
            for group in self.halves:
                dist.all_reduce(p.grad, group=group)
        world = dist.get_world_size()
        grads = [
            torch.cat([p.grad.flatten() for p in params]) * world
            for params in self.modules.values()
        ]
        sizes = [len(grad) for grad in grads]
        flat = torch.cat(grads)
        gathered = [torch.zeros_like(flat) for _ in range(2)]
        dist.all_gather(gathered, flat, group=self.pair)
        for p in params:
            dist.all_reduce(p.grad)
        variances = flat.new_zeros(len(sizes))
        if dist.get_rank() == 0:
            pairs = zip(*(both.split(sizes) for both in gathered), strict=True)
            cosine = torch.cosine_similarity
            variances = torch.stack([1 - cosine(a, b, dim=0) for a, b in pairs])
        dist.broadcast(variances, 0)
        anchor = variances[[*self.modules].index("backbone")]
        self.factors = 0.97 * self.factors + 0.03 * lr_ratio(variances, anchor).sqrt()


class _Then:
    """A future of which only `then` is called, once."""

    def __init__(self, then):
        self.then = then


class OwnTime:
    """CPU seconds of the calling threads inside the package's functions. What one of them spends
    inside another is the inner one's, so nothing is counted twice."""

    def __init__(self):
        # append is atomic: futures call back on other threads
        self._spent: dict[str, list[float]] = {"own": [], "averaging": []}
        self._thread = threading.local()

    def install(self) -> OwnTime:
        """From here on in this process; jobs are built after it."""
        self._wrap(split, "_comm_hook")
        for owner, names in (
            (AGVM, "begin backward_done end _before_optimizer_step _after_optimizer_step"),
            (AGVMHook, "before_step after_backward after_step"),
            (TensorTap, "_check _add _averaged"),
            (Official, "after_backward"),
        ):
            for name in names.split():
                self._wrap(owner, name)
        # What measures an averaged bucket, or a half's, runs later, when a future calls back.
        average = self.timed(SplitBucketTap.average, "averaging")

        def timed_average(tap, bucket):
            future = average(tap, bucket)
            if not tap.measuring:
                return future  # DDP's own
            return _Then(lambda measure: future.then(self.timed(measure)))

        measure_half = SplitBucketTap.measure_half
        SplitBucketTap.average = timed_average
        SplitBucketTap.measure_half = lambda tap, bucket, measure: measure_half(
            tap, bucket, self.timed(measure)
        )
        return self

    def timed(self, function: Callable, kind: str = "own") -> Callable:
        def timed(*args, **kwargs):
            outer = getattr(self._thread, "inner", 0.0)
            self._thread.inner = 0.0  # spent by those that this one calls
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.thread_time() - start
                self._spent[kind].append(seconds - self._thread.inner)
                self._thread.inner = outer + seconds

        return functools.update_wrapper(timed, function)

    def _wrap(self, owner, name: str) -> None:
        setattr(owner, name, self.timed(getattr(owner, name)))

    def take(self) -> tuple[float, float]:
        """Seconds since the last call: without averaging, and averaging."""
        own, averaging = (sum(spent) for spent in self._spent.values())
        for spent in self._spent.values():
            spent.clear()
        return own, averaging


class Job:
    """One variant's model, optimizer and step."""

    def __init__(self, variant: str, model_name: str):
        self.model, self.side = make_model(model_name)
        self.variant = variant
        # A worker alone has its images in micro-batches, in all variants.
        self.passes = 2 if dist.get_world_size() == 1 else 1
        self.images = 2 if on_cuda() else self.passes
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=1e-7, momentum=0.9, foreach=True
        )
        self.hook = None
        if variant.startswith("official"):
            self.ddp = Official(self.model)
        else:
            self.ddp = DistributedDataParallel(self.model, broadcast_buffers=False)
        if variant.startswith(("agvm", "split")):
            split_param_groups(self.optimizer, self.model)
            self.hook = AGVMHook(
                self.ddp,
                self.optimizer,
                interval=int(variant.split()[-1]),
                estimator="split" if variant.startswith("split") else "pairwise",
                micro_batches=self.passes,
                batch_size=dist.get_world_size() * self.images,
                log_period=10**9,
            )
            self.hook.before_train()
        self.iteration = 0

    def step(self, seed: int) -> tuple[float, float]:
        """Wall and CPU seconds of one step of all workers."""
        first = 1000 * seed + dist.get_rank() * self.images
        data = [make_image(self.side, first + i) for i in range(self.images)]
        torch.manual_seed(seed)
        settle()
        start, cpu = time.perf_counter(), time.process_time()
        with EventStorage(self.iteration):
            if self.hook:
                self.hook.before_step()
            for i in range(self.passes):
                last = i == self.passes - 1
                with contextlib.nullcontext() if last else self.ddp.no_sync():
                    loss = sum(self.ddp(data[i :: self.passes]).values()) / self.passes
                    if i == 0:
                        self.optimizer.zero_grad()
                    loss.backward()
                if self.hook and self.passes > 1:
                    self.hook.after_micro_batch(1 / self.passes)
            for listener in (self.hook, self.ddp):
                if isinstance(listener, (AGVMHook, Official)):
                    listener.after_backward()
            self.optimizer.step()
            if self.hook:
                self.hook.after_step()
        settle()
        self.iteration += 1
        return time.perf_counter() - start, time.process_time() - cpu


def settle() -> None:
    """All workers, and their GPUs, are here."""
    if on_cuda():
        torch.cuda.synchronize()
    dist.barrier()


def count_collectives(function: Callable[[], object]) -> tuple[int, int]:
    """(calls, bytes) of `function`, seen where torch.distributed hands them to gloo."""
    sizes: list[int] = []
    names = ("all_reduce", "all_gather", "broadcast", "reduce")
    originals = {name: getattr(dist, name) for name in names}

    def spy(name):
        def call(first, *args, **kwargs):
            tensor = args[0] if name == "all_gather" else first
            outside = kwargs.get("group") is dist.GroupMember.NON_GROUP_MEMBER
            sizes.append(0 if outside else tensor.numel() * tensor.element_size())
            return originals[name](first, *args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, spy(name))
    try:
        function()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return len(sizes), sum(sizes)


def averaging_hook(state, bucket):
    """What DDP does in C++ without a hook, where the spy can see it."""
    buffer = bucket.buffer().div_(dist.get_world_size())
    return dist.all_reduce(buffer, async_op=True).get_future().then(lambda f: f.value()[0])


def collectives(model_name: str) -> dict:
    """{variant: {step: [(calls, bytes) of each worker]}}"""
    found = {}
    for variant in variants():
        job = Job(variant, model_name)
        if not variant.startswith(("split", "official")):
            job.ddp.register_comm_hook(None, averaging_hook)
        job.step(0)  # after it DDP rebuilds its buckets
        job.iteration = 0
        found[variant] = {
            kind: comm.all_gather(count_collectives(functools.partial(job.step, seed)))
            for seed, kind in enumerate(("measured", "other"))
        }
    return found


def times(model_name: str, rounds: int) -> dict:
    """{figure: {variant: [one value per round]}}"""
    clock = OwnTime().install()
    jobs = [Job(variant, model_name) for variant in variants()]
    for i in range(2):
        for job in jobs:
            job.step(i)
    figures = ("wall", "cpu", "own", "averaging")
    found = {figure: {job.variant: [0.0] * rounds for job in jobs} for figure in figures}
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


def peak_memory() -> int:
    """Bytes, of this process or of its GPU."""
    if on_cuda():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(
    rank: int,
    workers: int,
    device: str,
    folder: str,
    task: str,
    model_name: str,
    rounds: int,
    variant: str,
) -> None:
    """In a worker; the first writes the result to `folder`."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=workers,
    )
    if task == "times":
        result = times(model_name, rounds)
    elif task == "collectives":
        result = collectives(model_name)
    else:
        job = Job(variant, model_name)
        for i in range(4):
            job.step(i)
        result = peak_memory()
    if rank == 0:
        with open(os.path.join(folder, "result.json"), "w") as f:
            json.dump(result, f)
    dist.destroy_process_group()


def run(
    task: str,
    workers: int,
    model_name: str,
    rounds: int = 0,
    variant: str = "",
    device: str = "cpu",
):
    """What `task` (times, collectives, memory) finds in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        args = workers, device, folder, task, model_name, rounds, variant
        mp.spawn(work, args, nprocs=workers)
        with open(os.path.join(folder, "result.json")) as f:
            return json.load(f)


def spread(values: list[float], form: str) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def span(values: list[float], form: str) -> str:
    """One number where all are alike."""
    return " to ".join(dict.fromkeys(f"{end:{form}}" for end in (min(values), max(values))))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["r50", "demo"], default="r50")
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    gpus = torch.cuda.device_count()
    if args.device == "cuda" and gpus < max(args.workers):
        parser.error(f"--device cuda: {max(args.workers)} workers need as many GPUs; found {gpus}.")
    measure = functools.partial(run, model_name=args.model, device=args.device)
    cpus = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    report = {
        "model": args.model,
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else cpus,
        "runs": {},
    }
    for workers in args.workers:
        timed = measure("times", workers, rounds=args.rounds)
        counted = measure("collectives", workers)
        memory = {v: measure("memory", workers, variant=v) for v in counted}
        report["runs"][workers] = {**timed, "collectives": counted, "peak_memory": memory}
        print(f"\n{args.model}, {workers} workers, {args.rounds} rounds of {ROUND} steps:\n")
        print(
            "| variant | step, s | wall / plain | CPU / plain | own code, % | averaging, % "
            "| measured step: calls, MB | other: calls, MB | peak memory, MB more |\n"
            "|---|---|---|---|---|---|---|---|---|"
        )
        for v in counted:
            wall = timed["wall"][v]
            ratios = [
                spread([a / b for a, b in zip(timed[c][v], timed[c]["plain"], strict=True)], ".3f")
                for c in ("wall", "cpu")
            ]
            shares = [
                spread([100 * a / b for a, b in zip(timed[c][v], wall, strict=True)], ".2f")
                for c in ("own", "averaging")
            ]
            if args.device == "cuda":
                ratios[1], shares = "–", ["–", "–"]
            # Of all workers.
            steps = [zip(*counted[v][kind], strict=True) for kind in ("measured", "other")]
            calls = [
                f"{span(number, 'd')}, {span([size / 1e6 for size in sizes], '.6f')}"
                for number, sizes in steps
            ]
            more = f"{(memory[v] - memory['plain']) / 1e6:.0f}"
            step = f"{statistics.median(wall) / ROUND:.3f}"
            print("| " + " | ".join([v, step, *ratios, *shares, *calls, more]) + " |")
    if args.json:
        with open(args.json, "w") as f:
            json.dump(report, f, indent=1)


if __name__ == "__main__":
    main()
