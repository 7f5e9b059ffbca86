"""AGVM on FSDP2 beside FSDP2 alone and DDP, on a CPU over gloo.

    python -m benchmarks.sharded --model demo --workers 2 --rounds 5

First the same 20 iterations in DDP and in FSDP2: how far their LR factors are apart. FSDP2 starts
each of them from DDP's weights, since proposals that nearly tie change places at a difference of
1e-8 in a weight, and then all gradients differ, as they do between two runs of DDP. Then times:
variants run in turn, step by step, in rotating order, on the same images with the same random
numbers; one thread per worker. A round is 10 steps of each; ratios are of a round to that of FSDP2
alone: median (lowest to highest).
"""

from __future__ import annotations
import argparse
import statistics
import time
import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from agvm_d2 import AGVM, Settings, split_param_groups
from agvm_d2.d2.fsdp import parts_to_shard, shard
from agvm_d2.shards import shard_like
from benchmarks.overhead import ROUND, make_image, make_model

UNIT_SIZE = {"demo": 20_000, "r50": 1_000_000}
VARIANTS = ("FSDP2", "FSDP2 agvm interval 10", "FSDP2 agvm interval 1", "DDP agvm interval 1")
COMPARED = 20  # iterations


class Job:
    """One variant's model, optimizer and step."""

    def __init__(self, variant: str, model_name: str, lr: float):
        model, self.side = make_model(model_name)
        self.units = len(parts_to_shard(model, UNIT_SIZE[model_name]))
        if variant.startswith("FSDP2"):
            self.model = shard(model, "cpu", {"unit_size": UNIT_SIZE[model_name]})
        else:
            self.model = DistributedDataParallel(model, broadcast_buffers=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9, foreach=True)
        self.agvm = None
        if "agvm" in variant:
            split_param_groups(self.optimizer, self.model)
            settings = Settings(interval=int(variant.split()[-1]), momentum=0.5)
            self.agvm = AGVM(self.model, self.optimizer, settings)

    def step(self, iteration: int, seed: int) -> float:
        """Seconds of one step of all workers."""
        data = [make_image(self.side, 1000 * seed + dist.get_rank())]
        torch.manual_seed(seed)
        dist.barrier()
        start = time.perf_counter()
        with EventStorage(iteration):
            if self.agvm:
                self.agvm.begin(iteration)
            loss = sum(self.model(data).values())
            self.optimizer.zero_grad()
            loss.backward()
            if self.agvm:
                self.agvm.backward_done()
            self.optimizer.step()
            if self.agvm:
                self.agvm.end()
        dist.barrier()
        return time.perf_counter() - start


def compare(model_name: str) -> tuple[float, list[float]]:
    """The largest relative difference of a factor in `COMPARED` iterations, and the last ones."""
    sharded, whole = (Job(v, model_name, lr=1e-6) for v in VARIANTS[-2:])
    worst = 0.0
    for i in range(COMPARED):
        factors = []
        shards, params = sharded.model.parameters(), whole.model.module.parameters()
        with torch.no_grad():
            for mine, param in zip(shards, params, strict=True):
                mine.copy_(shard_like(param, mine))
        for job in (sharded, whole):
            job.step(i, seed=i)
            factors.append(job.agvm.modulator.factors)
        worst = max(worst, (factors[0] / factors[1] - 1).abs().max().item())
    return worst, factors[0].tolist()


def times(model_name: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round."""
    jobs = [Job(variant, model_name, lr=1e-7) for variant in VARIANTS]
    if dist.get_rank() == 0:
        print(f"{model_name}: {jobs[0].units} units and the root", flush=True)
    for i in range(2):
        for job in jobs:
            job.step(0, seed=i)
    found = {variant: [0.0] * rounds for variant in VARIANTS}
    for round_ in range(rounds):
        for i in range(ROUND):
            for k in range(len(jobs)):
                place = (k + i) % len(jobs)
                seed = ROUND * round_ + i
                found[VARIANTS[place]][round_] += jobs[place].step(i, seed)
    return found


def work(model_name: str, rounds: int) -> None:
    """In a worker."""
    torch.set_num_threads(1)
    worst, factors = compare(model_name)
    if dist.get_rank() == 0:
        shown = ", ".join(f"{f:.3f}" for f in factors)
        print(f"factors after {COMPARED} iterations {shown}: FSDP2 and DDP differ by {worst:.1e}")
    found = times(model_name, rounds)
    if dist.get_rank() == 0:
        for variant, seconds in found.items():
            ratios = [s / base for s, base in zip(seconds, found["FSDP2"], strict=True)]
            print(
                f"{variant:24} {1000 * statistics.median(seconds) / ROUND:7.1f} ms per step, "
                f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=UNIT_SIZE, default="demo")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    launch(work, args.workers, dist_url="auto", args=(args.model, args.rounds))


if __name__ == "__main__":
    main()
