"""Bad values, found before anything is built; each message names the key and the way out."""

from __future__ import annotations
import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable
from typing import Any
import detectron2
import torch
from detectron2.config import CfgNode as CN
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, GeneralizedRCNN

from ..settings import Settings, yacs_key
from ..solver.build import OPTIMIZERS
from ..solver.clip import CLIP, check_clip, clip_key
from ..validate import INSTALL_DETECTRON2, holds, is_int, is_number, one_of, require
from .micro_batches import micro_batches

STOP_OR_SKIP = ("stop", "skip")
WARMUP_METHODS = ("constant", "linear", "exp")


def check_detectron2() -> None:
    """See that Detectron2's trainers call hooks between the backward pass and the step.

    Raises:
        ImportError: they do not; says which Detectron2 was found, and how to get one that does.
    """
    if not hasattr(HookBase, "after_backward"):
        raise ImportError(
            f"The Detectron2 in '{os.path.dirname(detectron2.__file__)}' (version "
            f"{detectron2.__version__}) has no HookBase.after_backward, where AGVM measures. "
            f"Its main branch has it since March 2023, release 0.6 not: {INSTALL_DETECTRON2}"
        )


def check_whole(key: str, value: Any, low: int) -> None:
    """See that `value`, of the key `key`, is a whole number from `low` on.

    Raises:
        ValueError: not a whole number, or below `low`.
    """
    require(is_int(value) and value >= low, key, value, f"be a whole number from {low} on")


def check_agvm(values: dict, key: Callable[[str], str]) -> Settings:
    """Check the fields of `Settings`, and `enabled` and `log_period`; missing ones are not.

    Args:
        key: name -> what a message calls it.

    Returns:
        The settings.

    Raises:
        ValueError: names the key, what was found and what it must be.
    """
    values = dict(values)
    enabled = values.pop("enabled", True)
    require(isinstance(enabled, bool), key("enabled"), enabled, "be True or False")
    check_whole(key("log_period"), values.pop("log_period", 20), 1)
    return Settings(**values).check(key)


def check_agvm_of(cfg: CN) -> Settings:
    """`check_agvm` of a yacs config.

    Raises:
        ValueError: names the key, what was found and what it must be.
    """
    return check_agvm({k.lower(): v for k, v in cfg.AGVM.items()}, yacs_key)


# key -> (what holds of a good value, in words).
RANGES: dict[str, tuple[Callable, str]] = {
    "SOLVER.MAX_ITER": (lambda v: v >= 1, "be at least 1"),
    "SOLVER.BASE_LR": (lambda v: 0 < v < math.inf, "be positive"),
    "SOLVER.MOMENTUM": (lambda v: 0 <= v < 1, "be in [0, 1)"),
    "SOLVER.BETAS": (
        lambda v: len(v) == 2 and is_number(*v) and all(0 <= beta < 1 for beta in v),
        "be two numbers in [0, 1)",
    ),
    "SOLVER.EPS": (lambda v: 0 <= v < math.inf, "not be negative"),
    "SOLVER.WEIGHT_DECAY": (lambda v: 0 <= v < math.inf, "not be negative"),
    "SOLVER.GAMMA": (lambda v: 0 < v <= 1, "be in (0, 1]"),
    "SOLVER.STEPS": (
        lambda v: all(map(is_int, v)) and list(v) == sorted(set(v)) and min(v, default=1) > 0,
        "be iterations in increasing order",
    ),
    "SOLVER.WARMUP_ITERS": (lambda v: v >= 0, "not be negative"),
    "SOLVER.WARMUP_FACTOR": (lambda v: 0 < v <= 1, "be in (0, 1]"),
    "SOLVER.CHECKPOINT_PERIOD": (lambda v: v >= 1, "be at least 1"),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": (lambda v: v > 0, "be positive"),
    "DATALOADER.NUM_WORKERS": (lambda v: v >= 0, "not be negative"),
    "TEST.EVAL_PERIOD": (lambda v: v >= 0, "not be negative"),
}
SCHEDULERS = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR")
SAMPLERS = (
    "TrainingSampler",
    "RepeatFactorTrainingSampler",
    "RandomSubsetTrainingSampler",
    "WeightedTrainingSampler",
    "WeightedCategoryTrainingSampler",
)


def check_names(cfg: CN) -> None:
    """What Detectron2 and this package have closed lists of. A project may have more, and build
    what it names itself: so only where nobody else reads the config.

    Raises:
        ValueError: names the key, what was found and what it must be.
    """
    model = cfg.MODEL
    for key, name, registry in (
        ("MODEL.META_ARCHITECTURE", model.META_ARCHITECTURE, META_ARCH_REGISTRY),
        ("MODEL.BACKBONE.NAME", model.BACKBONE.NAME, BACKBONE_REGISTRY),
    ):
        one_of(key, name, [name for name, _ in registry])
    solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
    one_of("SOLVER.OPTIMIZER", solver.OPTIMIZER, OPTIMIZERS)
    one_of("SOLVER.WARMUP_METHOD", solver.WARMUP_METHOD, WARMUP_METHODS)
    check_clip({name: clip[name.upper()] for name in CLIP}, clip_key)
    one_of("SOLVER.LR_SCHEDULER_NAME", solver.LR_SCHEDULER_NAME, SCHEDULERS)
    one_of("DATALOADER.SAMPLER_TRAIN", cfg.DATALOADER.SAMPLER_TRAIN, SAMPLERS)


def check_config(cfg: CN, num_workers: int) -> None:
    """See that the values of a yacs config can be used with `num_workers` workers.

    Raises:
        ValueError: names the key, what was found and what it must be.
    """
    if "AGVM" not in cfg:
        raise ValueError("The config has no AGVM keys: call add_agvm_config(cfg) after get_cfg().")
    for key, (condition, need) in RANGES.items():
        value = functools.reduce(getattr, key.split("."), cfg)
        require(holds(condition, value), key, value, need)
    solver = cfg.SOLVER
    settings = check_agvm_of(cfg)
    if cfg.AGVM.ENABLED:
        settings.check_gain(solver.IMS_PER_BATCH, solver.MAX_ITER)
    one_of("SOLVER.ON_NONFINITE", solver.ON_NONFINITE, STOP_OR_SKIP)
    one_of("DATALOADER.ON_BAD_IMAGE", cfg.DATALOADER.ON_BAD_IMAGE, STOP_OR_SKIP)
    check_clip({"iter_range": tuple(solver.CLIP_GRADIENTS.ITER_RANGE)}, clip_key)
    micro_batches(cfg, num_workers)
    check_device("MODEL.DEVICE", cfg.MODEL.DEVICE)
    check_amp("SOLVER.AMP.ENABLED", solver.AMP.ENABLED, cfg.MODEL.DEVICE)


def check_tta(cfg: CN) -> None:
    """
    Raises:
        ValueError: TEST.AUG, for a model that Detectron2 cannot augment.
    """
    if not cfg.TEST.AUG.ENABLED:
        return
    name = cfg.MODEL.META_ARCHITECTURE
    arch = META_ARCH_REGISTRY.get(name)
    able = isinstance(arch, type) and issubclass(arch, GeneralizedRCNN)
    # GeneralizedRCNNWithTTA gives it the boxes found before, which PanopticFPN's does not take.
    able = able and "detected_instances" in inspect.signature(arch.inference).parameters
    for key, bad, found in (
        ("MODEL.META_ARCHITECTURE", not able, name),
        ("MODEL.KEYPOINT_ON", cfg.MODEL.KEYPOINT_ON, True),
        ("MODEL.LOAD_PROPOSALS", cfg.MODEL.LOAD_PROPOSALS, True),
    ):
        if bad:
            raise ValueError(
                f"TEST.AUG.ENABLED: found True, but Detectron2's test-time augmentation is for "
                f"GeneralizedRCNN, without keypoints and loaded proposals; {key} is {found}. Set "
                "TEST.AUG.ENABLED False."
            )


def check_device(key: str, device: str) -> None:
    """See that there is such a device.

    Raises:
        ValueError: no such device, or CUDA, and there is none.
    """
    try:
        torch.device(device)
        known = isinstance(device, str)
    except (RuntimeError, TypeError):
        known = False
    if not known:
        raise ValueError(f"{key}: found {device!r}, but it must be cpu, cuda or cuda:N.")
    assign = "=" if key.islower() else " "  # LazyConfig's overrides, or yacs'
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"{key}: found '{device}', but this machine has no usable CUDA device. To run on a "
            f"CPU, add to the command: {key}{assign}cpu"
        )


def check_amp(key: str, enabled: bool, device: str) -> None:
    """See that mixed precision can be used on this device.

    Raises:
        ValueError: mixed precision on a CPU, for which Detectron2's AMPTrainer is not made.
    """
    require(
        not enabled or device.startswith("cuda"), key, enabled, "be False without a CUDA device"
    )


def check_datasets(names: Iterable[str], where: str = "DATASETS") -> None:
    """See that datasets of these names are registered and their files there.

    Args:
        where: the key that names them.

    Raises:
        ValueError: a name that is not registered.
        FileNotFoundError: a registered dataset whose files are not there.
    """
    for name in names:
        if name not in DatasetCatalog.list():
            name = str(name)
            near = [n for n in DatasetCatalog.list() if n.split("_")[0] == name.split("_")[0]]
            raise ValueError(
                f"{where}: '{name}' is not a registered dataset. Registered ones that look alike: "
                f"{', '.join(near) or 'none'}; all of them: detectron2.data.DatasetCatalog.list(). "
                "On a command line, --import MODULE_OR_FILE registers a project's own."
            )
        meta = MetadataCatalog.get(name)
        if meta.get("made_on_first_use", False):
            continue
        for key in ("json_file", "image_root", "panoptic_json", "panoptic_root", "sem_seg_root"):
            path = meta.get(key, "")
            if path and "://" not in path and not os.path.exists(path):
                raise FileNotFoundError(
                    f"{where}: '{name}' needs '{path}' ({key}), which is not there. Put the "
                    "dataset under the folder that the environment variable DETECTRON2_DATASETS "
                    "names (./datasets without it), laid out as Detectron2's docs say."
                )
