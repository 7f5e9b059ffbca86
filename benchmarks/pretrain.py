#!/usr/bin/env python
"""A thin backbone trained to tell the bundled digits apart, as ImageNet weights stand for COCO.

    python benchmarks/pretrain.py --backbone resnet --out output/pretrained/resnet.pth

The digits of `digits_train` are cut out with 1 to 2 times their box around them, at 32x32 pixels;
the validation images are never seen. What is written holds `backbone.bottom_up.*` only.
"""

from __future__ import annotations
import argparse
import os
import time
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, SwinTransformer
from detectron2.modeling.backbone import Backbone, build_resnet_backbone
from PIL import Image
from torch import nn

import agvm_d2.data  # noqa: F401  registers the bundled datasets
from agvm_d2.d2.config import read_config

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIG = os.path.join(ROOT, "configs/Base-RCNN-FPN-Digits.yaml")
SIDE = 32


def build_thin_swin(cfg: CfgNode, input_shape: ShapeSpec | None = None) -> SwinTransformer:
    return SwinTransformer(
        embed_dim=24,
        depths=[2, 2, 2, 2],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        drop_path_rate=0.0,
        frozen_stages=cfg.MODEL.BACKBONE.FREEZE_AT,  # 2: patches and the first stage, as ResNet's
    )


@BACKBONE_REGISTRY.register()
def build_thin_swin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    stages = ["p0", "p1", "p2", "p3"]
    return FPN(build_thin_swin(cfg), stages, cfg.MODEL.FPN.OUT_CHANNELS)


# The classifier's stages, each pooled to this many cells a side. A network of 50 thin layers with a
# classifier on the last stage alone takes several times as long to learn anything.
BACKBONES = {
    "resnet": (build_resnet_backbone, {"res3": 2, "res4": 2, "res5": 1}),
    "swin": (build_thin_swin, {"p1": 2, "p2": 2, "p3": 1}),
}


def crops(name: str, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Every digit of a dataset once: images (N, 3, SIDE, SIDE), BGR as Detectron2's, and labels."""
    images, labels = [], []
    for record in DatasetCatalog.get(name):
        picture = Image.open(record["file_name"])
        for instance in record["annotations"]:
            x, y, w, h = instance["bbox"]
            side = max(w, h) * rng.uniform(1, 2)
            left = x + w / 2 - side / 2 + rng.uniform(-0.1, 0.1) * side
            top = y + h / 2 - side / 2 + rng.uniform(-0.1, 0.1) * side
            crop = picture.transform(
                (SIDE, SIDE),
                Image.Transform.EXTENT,
                (left, top, left + side, top + side),
                Image.Resampling.BILINEAR,
            )
            images.append(np.asarray(crop)[:, :, ::-1].transpose(2, 0, 1))
            labels.append(instance["category_id"])
    return torch.as_tensor(np.stack(images)).float(), torch.as_tensor(labels)


class Classifier(nn.Module):
    """A linear classifier on each of the last three stages."""

    def __init__(self, cfg: CfgNode, backbone: str):
        super().__init__()
        build, self.cells = BACKBONES[backbone]
        self.trunk = build(cfg, ShapeSpec(channels=3))
        shapes = self.trunk.output_shape()
        self.linear = nn.ModuleDict(
            {name: nn.Linear(shapes[name].channels * n**2, 10) for name, n in self.cells.items()}
        )
        self.register_buffer("mean", torch.tensor(cfg.MODEL.PIXEL_MEAN).view(3, 1, 1), False)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The logits of each stage."""
        features = self.trunk(images - self.mean)
        return [
            linear(nn.functional.adaptive_avg_pool2d(features[name], self.cells[name]).flatten(1))
            for name, linear in self.linear.items()
        ]


def pretrain(
    out: str, backbone: str = "resnet", epochs: int = 30, batch: int = 64, lr: float = 0.004
) -> dict:
    """Train, write `out`, and tell the accuracy of the last stage on the validation digits."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = Classifier(read_config(CONFIG, []), backbone)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    start = time.time()
    for epoch in range(epochs):
        images, labels = crops("digits_train", rng)
        pieces = torch.randperm(len(images))[: len(images) // batch * batch].split(batch)
        if epoch == 0:
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, lr, total_steps=epochs * len(pieces)
            )
        for chosen in pieces:
            loss = sum(
                nn.functional.cross_entropy(x, labels[chosen]) for x in model(images[chosen])
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    images, labels = crops("digits_val", rng)
    with torch.no_grad():
        right = torch.cat([model(x)[-1] for x in images.split(256)]).argmax(1) == labels
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    state = {f"backbone.bottom_up.{key}": value for key, value in model.trunk.state_dict().items()}
    torch.save({"model": state, "matching_heuristics": False}, out + ".part")
    os.replace(out + ".part", out)
    return {"accuracy": float(right.float().mean()), "seconds": time.time() - start}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet")
    parser.add_argument("--out", required=True)
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    result = pretrain(args.out, args.backbone, args.epochs)
    print(f"{result['accuracy']:.3f} of the validation digits right, {result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
