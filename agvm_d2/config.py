"""Every config key of this package, and the checks that name a bad one."""

from __future__ import annotations
import functools
import math
import os
import re
from collections.abc import Callable
import torch
import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

MODES = ("modulate", "monitor")
ESTIMATORS = ("pairwise", "split")
RULES = ("variance", "gain")
OPTIMIZERS = ("SGD", "ADAMW", "LARS", "LAMB")
CLIP_TYPES = ("value", "norm", "full_model")
STOP_OR_SKIP = ("stop", "skip")
WARMUP_METHODS = ("constant", "linear", "exp")


def add_agvm_config(cfg: CN) -> None:
    """Add this package's keys to a Detectron2 config."""
    cfg.AGVM = CN()
    cfg.AGVM.ENABLED = True
    # "modulate" scales learning rates; "monitor" measures and logs, and training is untouched.
    cfg.AGVM.MODE = "modulate"
    # "pairwise": from all pairs of workers (or micro-batches); "split": two halves, as the paper.
    cfg.AGVM.ESTIMATOR = "pairwise"
    # "variance": AGVM, each module's variance is brought to the anchor's. "gain": each module's
    # learning rate is multiplied by its AdaScale gain, from 1 to IMS_PER_BATCH/BASE_BATCH_SIZE.
    cfg.AGVM.RULE = "variance"
    # For "gain": the batch at which SOLVER.BASE_LR is known to work. BASE_LR is not to be scaled.
    cfg.AGVM.BASE_BATCH_SIZE = 16
    # Iterations from one measurement to the next.
    cfg.AGVM.INTERVAL = 10
    # First measured iteration; -1: 100 iterations after warm-up.
    cfg.AGVM.START_ITER = -1
    # From here on nothing is measured and factors are 1 again; -1: never.
    cfg.AGVM.STOP_ITER = -1
    # Of the factors' moving average.
    cfg.AGVM.MOMENTUM = 0.97
    # Bounds of the variance ratio; factors approach its square root.
    cfg.AGVM.RATIO_RANGE = (0.5, 10.0)
    # The module whose gradient variance the others are brought to.
    cfg.AGVM.ANCHOR = "backbone"
    # Pairs (module, regex at the start of a parameter's name), first match wins; (): known by
    # architecture.
    cfg.AGVM.MODULES = ()

    # "SGD" or "ADAMW"; "LARS" or "LAMB", from the package pytorch-optimizer.
    cfg.SOLVER.OPTIMIZER = cfg.SOLVER.get("OPTIMIZER", "SGD")  # a project may have the key
    # Images of one forward and backward pass on one worker, gradients averaged over the worker's
    # share of IMS_PER_BATCH; 0: all at once.
    cfg.SOLVER.MICRO_BATCH_SIZE = 0
    # Iterations [first, last) in which CLIP_GRADIENTS works; (): always. CLIP_TYPE may also be
    # "full_model", the norm over all parameters together.
    cfg.SOLVER.CLIP_GRADIENTS.ITER_RANGE = ()
    # A NaN or inf: "stop" when the loss has one, as Detectron2, or "skip" each step whose gradient
    # has one, in all workers alike.
    cfg.SOLVER.ON_NONFINITE = "stop"
    # An image or annotation that cannot be read: "stop", or "skip" to the next; both name the file.
    cfg.DATALOADER.ON_BAD_IMAGE = "stop"
    # SOLVER.WARMUP_METHOD may also be "exp": the learning rate grows by a constant factor.


TYPE_MISMATCH = re.compile(
    r"Type mismatch \(<class '(.*?)'> vs\. <class '(.*?)'>\) .* vs\. (.*)\) for config key: (\S+)",
    re.DOTALL,
)


def readable(error: Exception) -> ValueError:
    """yacs' complaint about a key of a config, in words that name the key."""
    mismatch = TYPE_MISMATCH.search(str(error))
    if not mismatch:
        return ValueError(f"config: {error}")
    wanted, found, value, key = mismatch.groups()
    wanted = "a group of keys" if wanted.endswith("CfgNode") else f"of type {wanted}"
    return ValueError(f"{key}: found {value} of type {found}, but it must be {wanted}.")


def read_config(path: str, opts: list) -> CN:
    """Detectron2's config with this package's keys, the file and then `opts`, KEY VALUE pairs.

    Raises:
        ValueError, KeyError, OSError: names the file or key.
    """
    cfg = get_cfg()
    add_agvm_config(cfg)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--config-file: '{path}' is not a file")
    flags = [key for key in opts[::2] if key.startswith("--")]
    if flags:  # argparse takes all that follows the first key for keys and values
        raise ValueError(f"{flags[0]}: flags go before the KEY VALUE pairs.")
    try:
        cfg.merge_from_file(path)
        cfg.merge_from_list(opts)
    except yaml.YAMLError as error:
        raise ValueError(f"--config-file: '{path}' is not YAML: {error}") from None
    except (AssertionError, ValueError) as error:  # an unknown key or a wrong type, in yacs' words
        raise readable(error) from None
    return cfg


def one_of(key: str, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{key}: found {value!r}, but it must be one of {', '.join(allowed)}.")


def _check(ok: bool, key: str, value, need: str) -> None:
    if not ok:
        raise ValueError(f"{key}: found {value!r}, but {need}.")


def _holds(condition: Callable, value) -> bool:
    try:
        return bool(condition(value))
    except TypeError:  # not even comparable
        return False


def _is_number(*values) -> bool:
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


def check_whole(key: str, value, low: int) -> None:
    """
    Raises:
        ValueError: not a whole number, or below `low`.
    """
    _check(_is_int(value) and value >= low, key, value, f"it must be a whole number from {low} on")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def split_batch(
    batch: int,
    micro: int,
    num_workers: int,
    keys: tuple[str, str] = ("SOLVER.IMS_PER_BATCH", "SOLVER.MICRO_BATCH_SIZE"),
) -> int:
    """Forward/backward passes of one worker in one iteration.

    Args:
        batch, micro: images of an iteration, and of one pass on one worker (0: the worker's share).
        keys: their names in the config.

    Raises:
        ValueError: the batch cannot be cut into equal workers and micro-batches.
    """
    for key, value in zip(keys, (batch, micro), strict=True):
        _check(_is_int(value), key, value, "it must be a whole number of images")
    _check(batch > 0, keys[0], batch, "it must be positive")
    _check(
        batch % num_workers == 0,
        keys[0],
        batch,
        f"it must be divisible by the number of workers, {num_workers}",
    )
    _check(micro >= 0, keys[1], micro, "it must be 0 (off) or positive")
    share = batch // num_workers
    _check(
        micro == 0 or share % micro == 0,
        keys[1],
        micro,
        f"it must divide the images of one worker: {keys[0]} {batch} / {num_workers} "
        f"workers = {share}",
    )
    return share // micro if micro else 1


def micro_batches(cfg: CN, num_workers: int) -> int:
    """`split_batch` of a config's keys."""
    return split_batch(cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MICRO_BATCH_SIZE, num_workers)


def check_agvm(values: dict, key: Callable[[str], str]) -> None:
    """Check AGVM's settings, by the names of `AGVMHook`'s arguments; missing ones are not.

    Args:
        key: name -> what a message calls it.

    Raises:
        ValueError: names the key, what was found and what it must be.
    """

    def check(name: str, ok: Callable, need: str) -> None:
        if name in values:
            _check(_holds(ok, values[name]), key(name), values[name], need)

    if "mode" in values:
        one_of(key("mode"), values["mode"], MODES)
    if "estimator" in values:
        one_of(key("estimator"), values["estimator"], ESTIMATORS)
    if "rule" in values:
        one_of(key("rule"), values["rule"], RULES)
    check("base_batch_size", lambda v: _is_int(v) and v >= 1, "it must be at least 1")
    check("enabled", lambda v: isinstance(v, bool), "it must be True or False")
    check("anchor", lambda v: isinstance(v, str), "it must be a module's name")
    check("interval", lambda v: _is_int(v) and v >= 1, "it must be at least 1")
    for name in ("start_iter", "stop_iter"):
        check(name, lambda v: _is_int(v) and v >= -1, "it must be -1 or an iteration")
    check("momentum", lambda v: _is_number(v) and 0 <= v < 1, "it must be in [0, 1)")
    check(
        "ratio_range",
        lambda v: len(v) == 2 and _is_number(*v) and 0 < v[0] <= 1 <= v[1],
        "it must be two numbers (low, high) with 0 < low <= 1 <= high",
    )
    check("log_period", lambda v: _is_int(v) and v >= 1, "it must be at least 1")
    modules = values.get("modules", ())
    _check(isinstance(modules, (tuple, list)), key("modules"), modules, "it must be pairs")
    for rule in modules:
        _check(
            isinstance(rule, (tuple, list))
            and len(rule) == 2
            and all(isinstance(part, str) for part in rule),
            key("modules"),
            rule,
            "each entry must be a pair (module name, regex)",
        )
        try:
            re.compile(rule[1])
        except re.error as error:
            raise ValueError(
                f"{key('modules')}: '{rule[1]}' of module '{rule[0]}' is not a regex: {error}."
            ) from None


# key -> (what holds of a good value, in words).
RANGES: dict[str, tuple[Callable, str]] = {
    "SOLVER.MAX_ITER": (lambda v: v >= 1, "it must be at least 1"),
    "SOLVER.BASE_LR": (lambda v: 0 < v < math.inf, "it must be positive"),
    "SOLVER.MOMENTUM": (lambda v: 0 <= v < 1, "it must be in [0, 1)"),
    "SOLVER.WEIGHT_DECAY": (lambda v: 0 <= v < math.inf, "it must not be negative"),
    "SOLVER.GAMMA": (lambda v: 0 < v <= 1, "it must be in (0, 1]"),
    "SOLVER.STEPS": (
        lambda v: all(map(_is_int, v)) and list(v) == sorted(set(v)) and min(v, default=1) > 0,
        "it must be iterations in increasing order",
    ),
    "SOLVER.WARMUP_ITERS": (lambda v: v >= 0, "it must not be negative"),
    "SOLVER.WARMUP_FACTOR": (lambda v: 0 < v <= 1, "it must be in (0, 1]"),
    "SOLVER.CHECKPOINT_PERIOD": (lambda v: v >= 1, "it must be at least 1"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": (lambda v: 0 < v < math.inf, "it must be positive"),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": (lambda v: v > 0, "it must be positive"),
    "DATALOADER.NUM_WORKERS": (lambda v: v >= 0, "it must not be negative"),
    "TEST.EVAL_PERIOD": (lambda v: v >= 0, "it must not be negative"),
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
    """What Detectron2 itself has a closed list of; a project may have more.

    Raises:
        ValueError: names the key, what was found and what it must be.
    """
    model = cfg.MODEL
    for key, name, registry in (
        ("MODEL.META_ARCHITECTURE", model.META_ARCHITECTURE, META_ARCH_REGISTRY),
        ("MODEL.BACKBONE.NAME", model.BACKBONE.NAME, BACKBONE_REGISTRY),
    ):
        one_of(key, name, [name for name, _ in registry])
    one_of("SOLVER.LR_SCHEDULER_NAME", cfg.SOLVER.LR_SCHEDULER_NAME, SCHEDULERS)
    one_of("DATALOADER.SAMPLER_TRAIN", cfg.DATALOADER.SAMPLER_TRAIN, SAMPLERS)


def check_config(cfg: CN, num_workers: int) -> None:
    """
    Raises:
        ValueError: names the key, what was found and what it must be.
    """
    if "AGVM" not in cfg:
        raise ValueError("The config has no AGVM keys: call add_agvm_config(cfg) after get_cfg().")
    for key, (holds, need) in RANGES.items():
        value = functools.reduce(getattr, key.split("."), cfg)
        _check(_holds(holds, value), key, value, need)
    solver = cfg.SOLVER
    check_agvm({k.lower(): v for k, v in cfg.AGVM.items()}, lambda name: f"AGVM.{name.upper()}")
    one_of("SOLVER.OPTIMIZER", solver.OPTIMIZER, OPTIMIZERS)
    one_of("SOLVER.WARMUP_METHOD", solver.WARMUP_METHOD, WARMUP_METHODS)
    one_of("SOLVER.ON_NONFINITE", solver.ON_NONFINITE, STOP_OR_SKIP)
    one_of("DATALOADER.ON_BAD_IMAGE", cfg.DATALOADER.ON_BAD_IMAGE, STOP_OR_SKIP)
    clip = solver.CLIP_GRADIENTS
    one_of("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip.CLIP_TYPE, CLIP_TYPES)
    window = tuple(clip.ITER_RANGE)
    _check(
        not window or (len(window) == 2 and all(map(_is_int, window)) and window[0] < window[1]),
        "SOLVER.CLIP_GRADIENTS.ITER_RANGE",
        window,
        "it must be () or two iterations (first, last) with first < last",
    )
    micro_batches(cfg, num_workers)
    check_device("MODEL.DEVICE", cfg.MODEL.DEVICE)
    check_amp("SOLVER.AMP.ENABLED", solver.AMP.ENABLED, cfg.MODEL.DEVICE)


def check_device(key: str, device: str) -> None:
    """
    Raises:
        ValueError: no such device, or CUDA, and there is none.
    """
    try:
        torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"{key}: found {device!r}, but it must be cpu, cuda or cuda:N.") from None
    assign = "=" if key.islower() else " "  # LazyConfig's overrides, or yacs'
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"{key}: found '{device}', but this machine has no usable CUDA device. To run on a "
            f"CPU, add to the command: {key}{assign}cpu"
        )


def check_amp(key: str, enabled: bool, device: str) -> None:
    """
    Raises:
        ValueError: mixed precision on a CPU, for which Detectron2's AMPTrainer is not made.
    """
    _check(not enabled or device.startswith("cuda"), key, enabled, "it needs a CUDA device")


def check_datasets(names) -> None:
    """
    Raises:
        ValueError: a name that is not registered.
        FileNotFoundError: a registered dataset whose files are not there.
    """
    for name in names:
        if name not in DatasetCatalog.list():
            name = str(name)
            near = [n for n in DatasetCatalog.list() if n.split("_")[0] == name.split("_")[0]]
            raise ValueError(
                f"DATASETS: '{name}' is not a registered dataset. Registered ones that look alike: "
                f"{', '.join(near) or 'none'}; all of them: detectron2.data.DatasetCatalog.list()."
            )
        meta = MetadataCatalog.get(name)
        if meta.get("made_on_first_use", False):
            continue
        for key in ("json_file", "image_root", "panoptic_json", "panoptic_root", "sem_seg_root"):
            path = meta.get(key, "")
            if path and "://" not in path and not os.path.exists(path):
                raise FileNotFoundError(
                    f"DATASETS: '{name}' needs '{path}' ({key}), which is not there. Put the "
                    "dataset under the folder that the environment variable DETECTRON2_DATASETS "
                    "names (./datasets without it), laid out as Detectron2's docs say."
                )
