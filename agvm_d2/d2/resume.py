"""Resuming with another config than the saved run's: what holds, and a line for each key."""

from __future__ import annotations
import itertools
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any, cast
import torch
import yaml
from detectron2.config import CfgNode, LazyConfig
from detectron2.engine import HookBase
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..modules import named_parameters
from ..param_groups import regroup
from ..plain_yaml import plain_config
from .output_dir import FolderLock

logger = logging.getLogger("detectron2.agvm_d2")

# Where a run writes, how often it does or evaluates, and who reads its images: not in a checkpoint,
# which is the same bit for bit whatever they are.
NEUTRAL = re.compile(
    r"OUTPUT_DIR|DATALOADER\.NUM_WORKERS|SOLVER\.CHECKPOINT_PERIOD|TEST\.EVAL_PERIOD"
    r"|train\.eval_period|train\.log_period"
    r"|train\.output_dir|dataloader\.(train|test)\.num_workers|train\.checkpointer\..*"
)
SEED = ("SEED", "train.seed")

# keys -> (which value holds, what that means); the first that matches.
HOLDS: tuple[tuple[str, str, str], ...] = (
    (r"SEED|train\.seed", "saved", "the order of images and random numbers goes on"),
    (
        r"MODEL\.WEIGHTS|train\.init_checkpoint",
        "neither",
        "the weights are those of the checkpoint",
    ),
    (
        r"SOLVER\.IMS_PER_BATCH|dataloader\.train\.total_batch_size",
        "new",
        "the data go on after as many images as were seen, rounded down to whole batches; "
        "iterations count on, and the noise scale is averaged anew",
    ),
    (
        r"AGVM\.(RULE|ANCHOR|RATIO_RANGE|BASE_BATCH_SIZE)"
        r"|agvm\.(rule|anchor|ratio_range|base_batch_size)",
        "new",
        "the factors were made with the saved one and start at 1 again; progress counts on as it "
        "is",
    ),
    (r"AGVM\.ESTIMATOR|agvm\.estimator", "new", "the noise scale is averaged anew"),
    (
        r"AGVM\.SCHEDULE|agvm\.schedule",
        "new",
        "the learning rate and the end are those of its count; steps without the gain's learning "
        "rates have counted 1",
    ),
    (
        r"SOLVER\.(BASE_LR.*|STEPS|GAMMA|WARMUP_.*|MAX_ITER|NUM_DECAYS|LR_SCHEDULER_NAME"
        r"|RESCALE_INTERVAL|BIAS_LR_FACTOR)|lr_multiplier\..*|train\.max_iter|optimizer\..*lr.*",
        "new",
        "the learning rate of the next iteration is that of the new schedule",
    ),
    (
        r"SOLVER\.(MOMENTUM|NESTEROV|BETAS|EPS|WEIGHT_DECAY.*)|optimizer\..*",
        "new",
        "the optimizer takes it, and goes on with its saved state",
    ),
    (
        r"DATASETS\.TRAIN|DATALOADER\..*|dataloader\.train\..*",
        "new",
        "the data go on at the same number of images, perhaps in another order",
    ),
    (r".*", "new", "it takes effect from the next iteration on"),
)


class ConfigRecord(HookBase):
    """Keeps the run's config in each checkpoint; at a resume says which keys differ, and lets the
    new values hold where they can. Register it before `hooks.LRScheduler`; its state is to be
    loaded before the optimizer's.

    Args:
        cfg: the run's, of yacs or a LazyConfig.
        optimizer: as it was built from `cfg`.
        model: whose parameters the optimizer holds.
        output_dir: where config.yaml is.
    """

    def __init__(
        self,
        cfg: CfgNode | DictConfig,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        output_dir: str,
    ):
        self._cfg, self._optimizer, self._output_dir = cfg, optimizer, output_dir
        self._names: dict[torch.Tensor, str] = {p: n for n, p in named_parameters(model)}
        self._values = dict(_flat(plain_config(config_text(cfg))))
        self._built = [dict(group) for group in optimizer.param_groups]
        self._saved: dict[str, Any] | None = None
        self._lock: FolderLock | None = None

    def state_dict(self) -> dict:
        kept = {key: v for key, v in self._values.items() if not NEUTRAL.fullmatch(key)}
        return {"config": yaml.safe_dump(kept, sort_keys=True), "groups": self._groups()}

    def _groups(self) -> list[list[str]]:
        """Names of each param group's parameters."""
        groups = self._optimizer.param_groups
        return [[self._names.get(p, "") for p in group["params"]] for group in groups]

    def load_state_dict(self, state: dict) -> None:
        self._saved = yaml.safe_load(state["config"])
        keys = [key for key, *_ in differences(self._saved, self._values)]
        if not {"AGVM.ENABLED", "agvm.enabled"} & {*keys}:
            self._optimizer.register_load_state_dict_pre_hook(
                lambda _, saved: regrouped(saved, state["groups"], self._groups()), prepend=True
            )

    def before_train(self) -> None:
        start = self.trainer.start_iter
        if comm.is_main_process() and self._output_dir:
            self._lock = FolderLock.take(self._output_dir)
            # train_net.py has set an older run aside; a project's own script may not.
            if not start and PathManager.exists(os.path.join(self._output_dir, "last_checkpoint")):
                logger.warning(
                    f"'{self._output_dir}' holds an older run, whose metrics and checkpoints will "
                    "mix with this one's. Give this run another OUTPUT_DIR, or call "
                    "agvm_d2.d2.output_dir.set_aside before the trainer is built."
                )
        if not start:
            return
        if self._saved is None:
            logger.warning(
                "The checkpoint does not say with which config it was made: what it holds "
                "(learning rate, momentum, weight decay) goes on."
            )
        self._check_shapes()
        changes = [] if self._saved is None else list(differences(self._saved, self._values))
        for key, saved, new in changes:
            which, why = next(rest for keys, *rest in HOLDS if re.fullmatch(keys, key))
            logger.warning(
                f"Resumed at iteration {start} with another {key}: saved {saved!r}, now {new!r}. "
                f"What holds: {which}; {why}."
            )
            if key in SEED:
                self._values[key] = saved
        if changes:
            keep_built_options(self._optimizer, self._built)
            self._renew_schedule()
        if comm.is_main_process() and self._output_dir:
            self._write_config()

    def _check_shapes(self) -> None:
        state: dict[str, Any]
        for param, state in self._optimizer.state.items():
            for key in ("momentum_buffer", "exp_avg"):
                shape = getattr(state.get(key), "shape", param.shape)
                if shape != param.shape:
                    name = self._names.get(cast(nn.Parameter, param))
                    raise ValueError(
                        f"'{name}' of the model has the shape "
                        f"{tuple(param.shape)}, but {tuple(shape)} in the checkpoint: the config "
                        "builds another model. Resume with the saved run's (its config.yaml), or "
                        "start anew from these weights, without --resume."
                    )

    def after_train(self) -> None:
        """Write config.yaml again: default_setup of a run that was refused in this folder, or only
        evaluated, may have overwritten it."""
        if comm.is_main_process() and self._output_dir:
            self._write_config()

    def release(self) -> None:
        """The folder is free for another run."""
        self._lock = None

    def _renew_schedule(self) -> None:
        scheduler: Any = getattr(self.trainer, "scheduler", None)
        groups = self._optimizer.param_groups
        if not hasattr(scheduler, "base_lrs"):  # a LazyConfig's is built after this
            return
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        if isinstance(scheduler, LRMultiplier):  # torch's go on from the group's own
            for group, lr in zip(groups, scheduler.get_lr(), strict=True):
                group["lr"] = lr
        scheduler._last_lr = [group["lr"] for group in groups]

    def _write_config(self) -> None:
        cfg = self._cfg.clone() if isinstance(self._cfg, CfgNode) else self._cfg.copy()
        if isinstance(cfg, CfgNode):
            cfg.defrost()
            cfg.SEED = self._values.get("SEED", cfg.SEED)
        elif "train.seed" in self._values:
            OmegaConf.update(cfg, "train.seed", self._values["train.seed"])
        path = os.path.join(self._output_dir, "config.yaml")
        if PathManager.isfile(path):
            with PathManager.open(path, "w") as f:
                f.write(config_text(cfg))


def regrouped(state: dict, saved: list[list[str]], now: list[list[str]]) -> dict:
    """An optimizer's saved state for the groups of now, where they hold the same parameters:
    Detectron2 puts those of equal options into one group, and so makes others for other options.

    Args:
        saved, now: the names of each group's parameters.
    """
    fits = sorted(itertools.chain(*saved)) == sorted(itertools.chain(*now))
    known = len(saved) == len(state["param_groups"]) and fits and all(now)
    return state if saved == now or not known else regroup(state, saved, now)


def keep_built_options(optimizer: torch.optim.Optimizer, built: list[dict[str, Any]]) -> None:
    """After `optimizer.load_state_dict`: each group's options are those it was built with, its
    state is the loaded one. A learning rate that a schedule has changed changes in proportion.

    Args:
        built: copies of the groups before loading.
    """
    for group, new in zip(optimizer.param_groups, built, strict=True):
        for key in {*new} - {"params", "param_names", "lr", "initial_lr"}:
            group[key] = new[key]
        base = new.get("initial_lr", new["lr"])
        before = group.get("initial_lr", group["lr"])
        if base != before:
            group["lr"] = group["lr"] * (base / before) if before else base
            group["initial_lr"] = base


def check_not_done(start: int, max_iter: int, key: str) -> None:
    """
    Raises:
        ValueError: a resumed run that is beyond its last iteration.
    """
    if start > max_iter:
        raise ValueError(
            f"{key}: found {max_iter}, but the checkpoint to resume from has {start} iterations "
            f"done. Set it to {start} or more, or train anew, without --resume."
        )
    if start and start == max_iter:
        logger.info(f"All {max_iter} iterations ({key}) are done already: nothing is trained.")


# Configs as text.


def config_text(cfg: CfgNode | DictConfig) -> str:
    """YAML, as Detectron2 writes it into OUTPUT_DIR/config.yaml."""
    if isinstance(cfg, CfgNode):
        return cfg.dump()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "config.yaml")
        LazyConfig.save(cfg, path)
        if not os.path.exists(path):  # it holds objects, and only a .pkl could be written
            return ""
        with open(path) as f:
            return f.read()


def _flat(values: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(saved: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, saved value, new value) of flat configs, "(none)" for a key that one does not have."""
    for key in sorted({*saved, *now}):
        values = saved.get(key, "(none)"), now.get(key, "(none)")
        drawn = key in SEED and isinstance(values[1], int) and values[1] < 0  # none asked for
        same = values[0] == values[1] or repr(values[0]) == repr(values[1])  # also NaN
        same = same or all(value in (None, "(none)") for value in values)  # None is as good as none
        if not same and not NEUTRAL.fullmatch(key) and not drawn:
            yield key, *values
