#!/usr/bin/env python
"""Do the modules' variances drift apart at a large batch, and why? The paper's Figure 1, its
appendix figure and its experiment on RetinaNet, on the images of benchmarks/any_batch.

    python -m benchmarks.drift grid --jobs 2  # runs that are missing; each takes 7 minutes or more
    python -m benchmarks.drift run --pipeline retinanet --optimizer sgd --batch 128
    python -m benchmarks.drift draw                # docs/drift.png, and the table of docs/drift.md

Runs are in monitor mode: what is measured changes nothing. Each sees as many images.
"""

from __future__ import annotations
import argparse
import concurrent.futures
import fcntl
import json
import shutil
import statistics
from pathlib import Path
from typing import NamedTuple
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from torch import nn

from benchmarks.any_batch import run as any_batch
from benchmarks.any_batch.run import train
from benchmarks.any_batch.setting import PIPELINES, STAGES, MobileNetV2
from benchmarks.any_batch.setting import Run as BaseRun
from benchmarks.study.results import ROOT
from benchmarks.study.run import start_process

RESULTS = ROOT / "benchmarks/results/drift.jsonl"
PAGE = ROOT / "docs/drift.md"
BEGIN, END = "<!-- begin: python -m benchmarks.drift draw -->", "<!-- end -->"
IMAGES = 48_000  # of each run; at half as many a large batch is still all signal
SMALL, LARGE = 32, 128
LR = {"sgd": {SMALL: 0.02, LARGE: 0.04}, "adamw": {SMALL: 0.001, LARGE: 0.002}}

# Of the variances digitised from the paper's appendix figure, ± 0.02: in mid-training, at batch 32
# and at 512.
PAPER = {
    ("retinanet", "sgd", SMALL): {"backbone": 0.91, "fpn": 0.93, "head": 0.86},
    ("retinanet", "sgd", LARGE): {"backbone": 1.15, "fpn": 1.03, "head": 0.59},
    ("faster_rcnn", "sgd", SMALL): {"backbone": 0.91, "fpn": 0.91, "rpn": 0.89, "box_head": 0.87},
    ("faster_rcnn", "sgd", LARGE): {"backbone": 1.21, "fpn": 0.52, "rpn": 0.39, "box_head": 0.34},
    ("mask_rcnn", "sgd", SMALL): {
        "backbone": 0.90, "fpn": 0.92, "rpn": 0.89, "box_head": 0.88, "mask_head": 0.82,
    },
    ("mask_rcnn", "sgd", LARGE): {
        "backbone": 1.15, "fpn": 0.48, "rpn": 0.39, "box_head": 0.33, "mask_head": 0.22,
    },
    ("panoptic_fpn", "sgd", LARGE): {
        "backbone": 1.32, "fpn": 0.45, "rpn": 0.40, "box_head": 0.36, "mask_head": 0.25,
        "sem_seg_head": 0.54,
    },
    ("semantic_fpn", "sgd", LARGE): {"backbone": 1.42, "fpn": 0.84, "sem_seg_head": 0.82},
    ("faster_rcnn", "adamw", LARGE): {
        "backbone": 1.06, "fpn": 0.41, "rpn": 0.55, "box_head": 0.44,
    },
    ("faster_rcnn_swin", "adamw", LARGE): {
        "backbone": 1.00, "fpn": 0.67, "rpn": 0.71, "box_head": 0.66,
    },
}  # fmt: skip


# The paper's experiment: what makes RetinaNet's head quiet?


class HeadPerLevel(nn.Module):
    """A RetinaNetHead of its own for each level, instead of one that all share."""

    def __init__(self, cfg, shapes: list[ShapeSpec]):
        super().__init__()
        options = RetinaNetHead.from_config(cfg, shapes)
        self.levels = nn.ModuleList(
            RetinaNetHead(**{**options, "input_shape": [shape]}) for shape in shapes
        )

    def forward(self, features: list[torch.Tensor]):
        found = [head([x]) for head, x in zip(self.levels, features, strict=True)]
        return [logits[0] for logits, _ in found], [deltas[0] for _, deltas in found]


@META_ARCH_REGISTRY.register()
class RetinaNetPerLevel(RetinaNet):
    @classmethod
    def from_config(cls, cfg):
        parts = super().from_config(cfg)
        shapes = parts["backbone"].output_shape()
        parts["head"] = HeadPerLevel(cfg, [shapes[f] for f in cfg.MODEL.RETINANET.IN_FEATURES])
        return parts


@META_ARCH_REGISTRY.register()
class RetinaNetMasked(RetinaNet):
    """Three quarters of the pixels, drawn anew for each image, have no loss."""

    def label_anchors(self, anchors, gt_instances):
        labels, boxes = super().label_anchors(anchors, gt_instances)
        for label in labels:
            pixels = label.view(-1, self.anchor_generator.num_anchors[0])
            pixels[torch.rand(len(pixels)) < 0.75] = -1  # ignored
        return labels, boxes


class OneLevel(Backbone):
    """MobileNetV2 without an FPN: its stride 8."""

    def __init__(self):
        super().__init__()
        self.bottom_up = MobileNetV2()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"s8": self.bottom_up(x)["s8"]}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"s8": ShapeSpec(channels=STAGES["s8"][1], stride=8)}


@BACKBONE_REGISTRY.register()
def build_mobilenet_v2_one_level(cfg, input_shape) -> Backbone:
    return OneLevel()


# Without clipping it diverges at these learning rates. What is measured is the gradient before it.
RETINANET = """MODEL.META_ARCHITECTURE RetinaNet MODEL.RETINANET.NUM_CLASSES 10
    SOLVER.CLIP_GRADIENTS.ENABLED True SOLVER.CLIP_GRADIENTS.CLIP_TYPE full_model
    MODEL.RETINANET.NUM_CONVS 2 MODEL.RETINANET.IN_FEATURES ['p2','p3','p4','p5']"""
PIPELINES.update(
    retinanet=("bbox", "AP", RETINANET),
    retinanet_per_level=(
        "bbox", "AP", RETINANET.replace("CTURE RetinaNet", "CTURE RetinaNetPerLevel"),
    ),
    retinanet_masked=(
        "bbox", "AP", RETINANET.replace("CTURE RetinaNet", "CTURE RetinaNetMasked"),
    ),
    retinanet_no_fpn=(
        "bbox", "AP", RETINANET.replace("['p2','p3','p4','p5']", "['s8']")
        + " MODEL.BACKBONE.NAME build_mobilenet_v2_one_level"
        " MODEL.ANCHOR_GENERATOR.SIZES [[8,14,22,32]]",
    ),
)  # fmt: skip
PANELS = ("retinanet", "faster_rcnn", "mask_rcnn", "panoptic_fpn", "semantic_fpn")
TITLES = {
    "retinanet": "RetinaNet",
    "faster_rcnn": "Faster R-CNN",
    "mask_rcnn": "Mask R-CNN",
    "panoptic_fpn": "Panoptic FPN",
    "semantic_fpn": "Semantic FPN",
    "faster_rcnn_swin": "Faster R-CNN, Swin",
    "retinanet_per_level": "RetinaNet, a head per level",
    "retinanet_masked": "RetinaNet, 3/4 of pixels masked",
    "retinanet_no_fpn": "RetinaNet without FPN",
}
WHY = ("retinanet", "retinanet_per_level", "retinanet_masked", "retinanet_no_fpn")


OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW"}


class Key(NamedTuple):
    pipeline: str
    optimizer: str
    batch: int

    def run(self) -> BaseRun:
        iterations = IMAGES // self.batch
        options = f"""DATASETS.TEST () SOLVER.WARMUP_ITERS {iterations // 5}
            AGVM.INTERVAL {1 if self.batch == LARGE else 5}"""
        lr = LR[self.optimizer][self.batch]
        return BaseRun(self.pipeline, self.optimizer, self.batch, lr, 1, iterations, options)


ORDER = [
    *(Key(p, "sgd", batch) for p in PANELS for batch in (SMALL, LARGE)),
    *(Key(p, "adamw", batch) for p in (*PANELS, "faster_rcnn_swin") for batch in (SMALL, LARGE)),
    *(Key(p, "sgd", LARGE) for p in WHY[1:]),
]
FIRST = [Key(p, "sgd", LARGE) for p in WHY]
GRID = list(dict.fromkeys([*FIRST, *ORDER]))


def read(path: Path = RESULTS) -> dict[Key, dict]:
    """The runs in `path`, and any_batch's at these learning rates, which see more images; of
    several that differ in their iterations, one that did not diverge."""
    found: dict[Key, dict] = {}
    for run, row in any_batch.read().items():
        if (run.lr, run.seed, run.options) != (LR.get(run.arm, {}).get(run.batch), 1, ""):
            continue
        key = Key(run.pipeline, run.arm, run.batch)
        if key not in found or found[key]["diverged_at"] is not None:
            found[key] = {**row, "curves": variances(row)}
    if path.exists():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found |= {Key(*(row[key] for key in Key._fields)): row for row in rows}
    return found


def variances(row: dict) -> dict[str, list]:
    """Module -> curve, of a row with all scalars."""
    prefix = "variance/"
    curves = row["curves"].items()
    return {name.removeprefix(prefix): v for name, v in curves if name.startswith(prefix)}


def do_run(key: Key, path: Path) -> None:
    """Train here, and add the run's line to the results."""
    folder = ROOT / "output/drift" / "_".join(map(str, key))
    shutil.rmtree(folder, ignore_errors=True)
    row = train(key.run(), folder)
    row = {**key._asdict(), **{k: v for k, v in row.items() if k not in ("pipeline", "batch")}}
    row["curves"] = variances(row)
    with path.open("a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.write(json.dumps(row) + "\n")
    shutil.rmtree(folder, ignore_errors=True)


def grid(path: Path, jobs: int) -> None:
    def start(key: Key) -> None:
        try:
            start_process("benchmarks.drift", {"results": path.resolve(), **key._asdict()})
            print(key, flush=True)
        except RuntimeError as error:  # the others go on
            print(f"{key} failed: {error}", flush=True)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(start, [key for key in GRID if key not in read(path)]))


def levels(row: dict) -> dict[str, tuple[float, float]]:
    """Of each module, the mean variance of the half before the first drop of the learning rate,
    and after the last one."""
    found = {}
    for name, curve in row["curves"].items():
        middle, end = len(curve) * 3 // 8, len(curve) * 3 // 4
        last = len(curve) * 9 // 10
        parts = ([v for v in part if v is not None] for part in (curve[middle:end], curve[last:]))
        found[name] = tuple(statistics.fmean(part) for part in parts)
    return found


def draw(rows: dict[Key, dict], path: Path) -> None:
    """A panel for each run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    from agvm_d2.plot import colours_of, smooth

    names = ["backbone", "fpn", "head", "rpn", "box_head", "mask_head", "sem_seg_head"]
    colours = colours_of(names)
    keys = [key for key in ORDER if key in rows]
    with plt.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        columns = min(4, len(keys))
        lines = -(-len(keys) // columns)
        size = 3.4 * columns, 2.6 * lines + 0.6
        figure, axes = plt.subplots(
            lines, columns, figsize=size, layout="constrained", squeeze=False
        )
        for axis in axes.flat[len(keys) :]:
            axis.axis("off")
        for axis, key in zip(axes.flat, keys, strict=False):
            for name, level in PAPER.get(key, {}).items():
                axis.axhline(level, color=colours[name], lw=1, ls=":")
            for name, curve in rows[key]["curves"].items():
                found = [(i, v) for i, v in enumerate(curve) if v is not None]  # measurable
                share = [100 * (i + 0.5) / len(curve) for i, _ in found]
                values = smooth([v for _, v in found])
                axis.plot(share, values, color=colours.get(name, "0.6"), lw=1.5)
            for drop in (75, 90):
                axis.axvline(drop, color="0.85", lw=0.8, zorder=0)
            axis.set(ylim=(0, 1.5), xlim=(0, 100), xlabel="% of training")
            axis.set_title(f"{TITLES[key.pipeline]}, {OPTIMIZERS[key.optimizer]}, {key.batch}")
        for axis in axes[:, 0]:
            axis.set_ylabel("variance φ")
        used = {name for key in keys for name in rows[key]["curves"]}
        handles = [Line2D([], [], color=colours[n], label=n) for n in names if n in used]
        paper = "the paper's at 32 or 512, mid-training"
        handles.append(Line2D([], [], color="0.3", ls=":", label=paper))
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, dpi=120)
        plt.close(figure)


def table(rows: dict[Key, dict]) -> str:
    """Mid-training -> after the drops, of each run."""
    lines = ["| pipeline | optimizer | batch | variance of each module |", "|---|---|---|---|"]
    for key in ORDER:
        if key in rows:
            found = ", ".join(
                f"{name} {middle:.2f} → {end:.2f}"
                for name, (middle, end) in levels(rows[key]).items()
            )
            if rows[key]["diverged_at"] is not None:
                found = f"diverged at iteration {rows[key]['diverged_at']}"
            optimizer = OPTIMIZERS[key.optimizer]
            lines.append(f"| {TITLES[key.pipeline]} | {optimizer} | {key.batch} | {found} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.drift",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="one run")
    one.add_argument("--pipeline", choices=TITLES, required=True)
    one.add_argument("--optimizer", choices=LR, required=True)
    one.add_argument("--batch", type=int, choices=(SMALL, LARGE), required=True)
    every = commands.add_parser("grid", help="all runs that are missing")
    every.add_argument("--jobs", type=int, default=2)
    picture = commands.add_parser("draw", help="the figure and the table")
    for part in (one, every, picture):
        part.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.command == "run":
        do_run(Key(args.pipeline, args.optimizer, args.batch), args.results)
    elif args.command == "grid":
        grid(args.results, args.jobs)
    else:
        rows = read(args.results)
        draw(rows, ROOT / "docs/drift.png")
        before, rest = PAGE.read_text().split(BEGIN)
        after = rest.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")


if __name__ == "__main__":
    main()
