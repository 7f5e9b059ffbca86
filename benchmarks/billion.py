"""A few real iterations of the one-billion-parameter detector on a CPU: in one process, and in two
workers that share it by FSDP2.

    python -m benchmarks.billion                     # both; needs 16 GiB of memory
    python -m benchmarks.billion --workers 2 --iterations 3

The model is that of configs/COCO-InstanceSegmentation/cascade_mask_rcnn_vitdet_g_bs960_agvm.py; so
that it fits into this memory and into minutes, it trains in float32 on random images of 224 pixels,
two per iteration, with 64 RoIs per image and SGD without momentum. "own" is CPU
time in this package's functions, in the slowest worker; peak memory is of one worker.
"""

from __future__ import annotations
import argparse
import functools
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.engine import HookBase, launch
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch.utils.checkpoint import checkpoint

from agvm_d2 import AGVM, AGVMHook, split_param_groups
from agvm_d2.d2 import lazy
from agvm_d2.d2.fsdp import parts_to_shard
from agvm_d2.d2.micro_batches import MicroBatchTrainer
from agvm_d2.moments import TensorTap

NAME = "configs/COCO-InstanceSegmentation/cascade_mask_rcnn_vitdet_g_bs960_agvm.py"
CONFIG = str(Path(__file__).resolve().parents[1] / NAME)
IMAGES = 2  # of an iteration
SIDE, ROIS = 224, 64


def make_image(seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    corners = torch.rand(4, 2, generator=g) * SIDE * 0.5
    boxes = torch.cat([corners, corners + SIDE * 0.4], 1)
    instances = Instances((SIDE, SIDE))
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = torch.randint(80, (4,), generator=g)
    corners_of = [[x0, y0, x1, y0, x1, y1, x0, y1] for x0, y0, x1, y1 in boxes.double().tolist()]
    instances.gt_masks = PolygonMasks([[np.array(polygon)] for polygon in corners_of])
    image = torch.randint(256, (3, SIDE, SIDE), generator=g, dtype=torch.uint8)
    return {"image": image, "instances": instances, "height": SIDE, "width": SIDE}


class Images:
    """This worker's, without end."""

    def __iter__(self) -> Iterator[list[dict]]:
        rank, workers, iteration = comm.get_rank(), comm.get_world_size(), 0
        while True:
            seeds = range(IMAGES * iteration, IMAGES * (iteration + 1))
            yield [make_image(seed) for seed in seeds[rank::workers]]
            iteration += 1


class OwnTime:
    """CPU seconds in the package's functions."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for owner, names in (
            (AGVM, "begin micro_batch_done backward_done end"),
            (AGVM, "_before_optimizer_step _after_optimizer_step"),
            (TensorTap, "_add"),
        ):
            for name in names.split():
                setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - start

        return functools.update_wrapper(timed, function)

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class Report(HookBase):
    """One line per iteration; register it first, and it is the last to hear of the end."""

    def __init__(self, clock: OwnTime):
        self._clock = clock

    def before_step(self) -> None:
        self._start = time.perf_counter()

    def report(self, measured: bool) -> None:
        seconds = time.perf_counter() - self._start
        found = comm.gather((self._clock.take(), peak()))
        if found:
            own, memory = (max(values) for values in zip(*found, strict=True))
            print(
                f"iteration {self.trainer.iter}{', measured' if measured else ''}: "
                f"{seconds:.1f} s, own {own:.2f} s ({own / seconds:.1%}), "
                f"peak memory {memory:.2f} GiB",
                flush=True,
            )


def peak() -> float:
    """GiB of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def build(overrides: list[str], workers: int) -> torch.nn.Module:
    """The config's model, on the CPU."""
    cfg = lazy.load(CONFIG, ["train.device=cpu", "train.fsdp.precision=float32", *overrides])
    cfg.model.backbone.square_pad = SIDE
    cfg.model.roi_heads.batch_size_per_image = ROIS
    if workers > 1:
        return lazy.build_model(cfg)
    model = instantiate(cfg.model)
    for unit in parts_to_shard(model, 1_000_000):
        unit.forward = functools.partial(checkpoint, unit.forward, use_reentrant=False)
    return model


def work(iterations: int, overrides: list[str]) -> None:
    """In a worker."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    workers, main = comm.get_world_size(), comm.is_main_process()
    start = time.perf_counter()
    model = build(overrides, workers).train()
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, foreach=False)
    split_param_groups(optimizer, model)
    if main:
        how = f"{workers} workers, FSDP2" if workers > 1 else "one process"
        print(f"{how}: {parameters:,} parameters, built in {time.perf_counter() - start:.0f} s")
    clock = OwnTime()
    hook = AGVMHook(
        model,
        optimizer,
        interval=2,
        momentum=0.5,
        micro_batches=IMAGES // workers,
        batch_size=IMAGES,
    )
    report = Report(clock)
    after_step = hook.after_step

    def and_report() -> None:
        after_step()
        report.report(hook.agvm.measured)

    hook.after_step = and_report  # type: ignore[method-assign]
    trainer = MicroBatchTrainer(model, Images(), optimizer, micro_batch_size=1)
    trainer.register_hooks([report, hook])
    with EventStorage():
        trainer.train(0, iterations)
    if main:
        found = zip(hook.modulator.names, hook.modulator.variance.tolist(), strict=True)
        print("phi: " + ", ".join(f"{name} {phi:.3f}" for name, phi in found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="of the LazyConfig, KEY=VALUE")
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or launch() picks NCCL
    for workers in args.workers:
        launch(work, workers, dist_url="auto", args=(args.iterations, args.overrides))


if __name__ == "__main__":
    main()
