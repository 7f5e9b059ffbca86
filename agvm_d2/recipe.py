"""`python -m agvm_d2.recipe --config-file CONFIG --batch-size N`: a config to train with batches of
N images, on top of one that works. It is YAML with CONFIG as its _BASE_, or lines to add to a .py.
"""

from __future__ import annotations
import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
import yaml
from detectron2.config import CfgNode, get_cfg
from omegaconf import DictConfig, ListConfig, OmegaConf

from . import model_zoo
from .d2.checks import SCHEDULERS
from .d2.config import add_agvm_config, naming_the_key
from .d2.imports import add_unsafe_flag
from .d2.yaml_files import check_yaml
from .solver.build import EPS
from .solver.schedule import LR_SCALINGS, adam_scaled, scaled_lr
from .validate import message, require

# Of warm-up, in the paper: two epochs of 12 to 16, so shares of training from 1/8 to 1/6.
EPOCHS, LOW, HIGH = 2, 1 / 8, 1 / 6
# In the training sets of the configs that are shipped; COCO's that have annotations.
IMAGES = {
    "coco_2017_train": 117266,
    "coco_2017_train_panoptic_separated": 117266,
    "ade20k_sem_seg_train": 20210,
    "digits_train": 2000,
    "digits_train_sem_seg": 2000,
    "digits_train_panoptic": 2000,
}
# Of AGVM, whatever the rule.
DEFAULTS = {"MODE": "modulate", "INTERVAL": -1, "MOMENTUM": -1.0}
# Iterations to each side of the end of warm-up in which the paper clips.
CLIP = 100
# With the gain, throughout: rates as large as the noise allows may be too large for a step now and
# then (docs/evidence.md); most are far below it.
LOOSE = {"ENABLED": True, "CLIP_TYPE": "relative", "CLIP_VALUE": 4.0}
# The paper has hardly a run below (Faster R-CNN, batch 1536: 924).
FEW_ITERATIONS = 900


class Baseline(NamedTuple):
    """Training that works."""

    batch: int  # that its learning rate and schedule are for
    lr: float
    max_iter: int
    steps: tuple[int, ...] = ()  # none in a LazyConfig, where drops are shares of training
    checkpoint_period: int = 5000
    adam: bool = False  # or Muon, whose rate is AdamW's
    muon: bool = False
    agvm: dict | None = None  # a LazyConfig's
    betas: tuple[float, float] | None = None  # of Adam and LAMB
    eps: float = EPS["ADAMW"]
    warmup: float = 0  # iterations
    images: int | None = None  # of the training set; None: not known
    eval_period: int = 0
    clip: dict | None = None  # CLIP_GRADIENTS' keys, if it clips
    config: CfgNode | DictConfig | None = None  # that all this is from
    own: int | None = None  # the config's batch, where another than `batch`: it trains by the gain

    @property
    def lazy(self) -> bool:
        """A LazyConfig's?"""
        return self.agvm is not None


def warm_up(base: Baseline, batch: int) -> tuple[int, str]:
    """Iterations at `batch`, and in words why so many: two epochs, but at most a sixth of training,
    and never a smaller share of it than `base` has."""
    shrink = base.batch / batch
    if base.images is None:
        length, why = base.max_iter * shrink * LOW, "an eighth of training"
        why += "; with --images N, those of the training set, it is two epochs"
    else:
        length, why = EPOCHS * base.images / batch, f"two epochs of {base.images:,} images"
        if length > base.max_iter * shrink * HIGH:
            length, why = base.max_iter * shrink * HIGH, "a sixth of training: two epochs are more"
    if base.warmup * shrink > length:
        length, why = base.warmup * shrink, "the same share of training as in the config"
    return max(2, round(length)), why


def recipe(
    base: Baseline, batch: int, scaling: str | None = None, scale_betas: bool = False
) -> dict[str, dict]:
    """yacs keys for training at `batch`, on as many images as `base`; or, with "gain", as long as
    the gain asks. None at the config's own batch.

    Args:
        scaling: of `scaled_lr`; by default "sqrt" for Adam, LAMB and Muon, else "linear-sqrt".
            "gain": SOLVER stays that of `base`, clipped loosely if it does not clip, and
            AGVM.SCHEDULE "gain" does the rest.
        scale_betas: also Adam's betas and eps, see `adam_scaled`, which goes with "sqrt".

    Raises:
        ValueError: a batch that is not positive, or below the base with "gain", or so large that
            nothing is left to train; betas to scale without Adam, or without "sqrt".
    """
    scaling = scaling or ("sqrt" if base.adam else "linear-sqrt")
    if scale_betas and (base.betas is None or scaling != "sqrt"):
        found = "another optimizer" if base.betas is None else f"--rule {scaling}"
        raise ValueError(
            f"--scale-betas: is for ADAMW and LAMB with --rule sqrt, but there is {found}"
        )
    if batch == (base.own or base.batch):
        return {}
    if scaling == "gain":
        if batch < base.batch:
            raise ValueError(
                f"--batch-size {batch}: is below {base.batch}, which the config's schedule is for"
            )
        agvm = {"RULE": "gain", "SCHEDULE": "gain", "BASE_BATCH_SIZE": base.batch}
        agvm = {"ENABLED": True, **agvm, **_changed(base, {**DEFAULTS, "START_ITER": -1})}
        solver = {} if base.clip else {"CLIP_GRADIENTS": _clipping(base, LOOSE)}
        return {"SOLVER": {"IMS_PER_BATCH": batch, **solver}, "AGVM": agvm}
    lr = scaled_lr(batch, scaling, base.lr, base.batch)
    shrink = base.batch / batch
    iterations = round(base.max_iter * shrink)
    if iterations * LOW < 1.5:
        raise ValueError(
            f"--batch-size {batch}: {iterations} iterations would be left of the "
            f"{base.max_iter} at batch {base.batch}; train longer or take a smaller one"
        )
    warmup, _ = warm_up(base, batch)
    window = min(CLIP, warmup)
    agvm = {
        "ENABLED": True,  # a baseline's config has it off
        "START_ITER": warmup + window,
        **_changed(base, {**DEFAULTS, "RULE": "variance", "SCHEDULE": "iterations"}),
        **({"INTERVAL": 5} if batch > 1000 else {}),
    }
    clip = _clipping(base, {"ENABLED": True, "CLIP_TYPE": "full_model", "CLIP_VALUE": 1.0})
    first, last = warmup - window, warmup + window + 1
    if base.muon:  # as it was tried: without AGVM's factors and clipping (docs/evidence.md)
        agvm, clip, last = {"ENABLED": True, "MODE": "monitor"}, {}, 0
    if base.clip:  # its type and value stay; a window goes where the end of warm-up goes
        clip, before = {}, base.clip.get("ITER_RANGE") or (0, base.max_iter)
        first, last = min(first, before[0]), last if before[1] < base.max_iter else 0
    if last:
        clip["ITER_RANGE"] = (first, last)
    adam = {}
    if scale_betas and base.betas:
        betas, eps = adam_scaled(batch / base.batch, base.betas, base.eps)
        adam = {"BETAS": tuple(float(f"{b:.6g}") for b in betas), "EPS": float(f"{eps:.3g}")}
    period = max(1, round(base.eval_period * shrink))
    exp = _old(base.config, "SOLVER.LR_SCHEDULER_NAME") in (None, *SCHEDULERS)  # those that take it
    return {
        "SOLVER": {
            "IMS_PER_BATCH": batch,
            "BASE_LR": float(f"{lr:.3g}"),
            **adam,
            "MAX_ITER": iterations,
            "STEPS": tuple(sorted({round(step * shrink) for step in base.steps} - {0})),
            "CHECKPOINT_PERIOD": max(1, round(base.checkpoint_period * shrink)),
            **({"WARMUP_METHOD": "exp", "WARMUP_FACTOR": 0.001} if exp else {}),
            "WARMUP_ITERS": warmup,
            **({"CLIP_GRADIENTS": clip} if clip else {}),
        },
        **({"TEST": {"EVAL_PERIOD": period}} if base.eval_period else {}),
        "AGVM": agvm,
    }


def _clipping(base: Baseline, clip: dict[str, Any]) -> dict[str, Any]:
    """For a config that does not clip, also where it has other values of what `clip` leaves out."""
    defaults = {"NORM_TYPE": 2.0, "ITER_RANGE": ()}
    old = {key: _old(base.config, f"SOLVER.CLIP_GRADIENTS.{key}") for key in defaults}
    return clip | {key: value for key, value in defaults.items() if old[key] not in (None, value)}


def _changed(base: Baseline, agvm: dict[str, Any]) -> dict[str, Any]:
    """Of AGVM's defaults, those that the config of `base` has other values for."""
    own = base.agvm or _old(base.config, "AGVM") or {}
    own = {name.upper(): value for name, value in own.items()}
    return {name: value for name, value in agvm.items() if own.get(name, value) != value}


def _old(config: Any, key: str) -> Any:
    """A config's value, lists as tuples; None without one."""
    for name in key.split("."):
        config = config.get(name) if hasattr(config, "get") else None
    return tuple(config) if isinstance(config, (list, ListConfig)) else config


def as_yaml(keys: dict, config: CfgNode | None = None) -> str:
    """As in a yacs config.

    Args:
        config: the one before; a comment has its value of each key that changes.
    """

    def lines(keys: dict, path: str) -> Iterator[str]:
        for name, value in keys.items():
            key = f"{path}{name}"
            head, old = f"{'  ' * key.count('.')}{name}:", _old(config, key)
            if isinstance(value, dict):
                yield head
                yield from lines(value, f"{key}.")
                continue
            # YAML's own spelling: 5e-09 would be a text.
            text = str(value) if isinstance(value, tuple) else yaml.safe_dump(value).split("\n")[0]
            yield f"{head} {text}" + (f"  # was {old}" if old not in (None, value) else "")

    return "".join(f"{line}\n" for line in lines(keys, ""))


def as_python(keys: dict, agvm: dict, config: DictConfig | None = None) -> str:
    """To add at the end of a LazyConfig; its schedule is in shares of training, and stays but for
    warm-up.

    Args:
        agvm: the config's own.
        config: as for `as_yaml`.
    """
    solver = dict(keys["SOLVER"])
    new = {name.lower(): value for name, value in keys["AGVM"].items()}
    lines = {
        "dataloader.train.total_batch_size": solver["IMS_PER_BATCH"],
        "agvm": {**agvm, **new},
    }
    if "MAX_ITER" in solver:
        lines |= {
            "optimizer.lr": solver["BASE_LR"],
            **{f"optimizer.{k.lower()}": solver[k] for k in ("BETAS", "EPS") if k in solver},
            "train.max_iter": solver["MAX_ITER"],
            "train.checkpointer.period": solver["CHECKPOINT_PERIOD"],
        }
        if _old(config, "lr_multiplier.warmup_length") is not None:
            lines |= {
                "lr_multiplier.warmup_factor": solver["WARMUP_FACTOR"],
                "lr_multiplier.warmup_length": solver["WARMUP_ITERS"] / solver["MAX_ITER"],
            }
    clip = {k.lower(): v for k, v in solver.get("CLIP_GRADIENTS", {}).items()}
    if clip.pop("enabled", False):
        lines["train.clip_gradients"] = clip
    elif clip:
        lines["train.clip_gradients.iter_range"] = clip["iter_range"]
    if "TEST" in keys:
        lines["train.eval_period"] = keys["TEST"]["EVAL_PERIOD"]
    text = ""
    for key, value in lines.items():
        old = _old(config, key)
        if key == "agvm":
            old = {k: agvm[k] for k, v in new.items() if agvm.get(k, v) != v} or None
        text += f"{key} = {value!r}" + (f"  # was {old!r}" if old not in (None, value) else "")
        text += "\n"
    return text


def _count(names: Sequence[str]) -> int | None:
    """Images of datasets of these names together, if all are known."""
    found = [IMAGES.get(name) for name in names]
    return sum(n or 0 for n in found) if found and None not in found else None


def clipped(clip: dict) -> str:
    """How a config clips, as a comment."""
    found = f"{clip.get('CLIP_TYPE')}, {clip.get('CLIP_VALUE')}"
    return f"# The gradients are clipped as in the config ({found})."


def read_baseline(path: str, allow_unsafe: bool = False) -> Baseline:
    """Of a config of any Detectron2 project, whatever other keys it has; a .py file is a
    LazyConfig, and runs.

    Args:
        allow_unsafe: let a YAML file's !!python tags run code, as Detectron2 does.

    Raises:
        ValueError, OSError: not a config, or a YAML file that runs code.
    """
    if path.endswith(".py"):
        from .d2.lazy import read

        return of_lazyconfig(read(path), path)
    path = model_zoo.find(path)
    check_yaml(path, allow_unsafe)
    cfg = get_cfg()
    add_agvm_config(cfg)
    try:
        given = CfgNode.load_yaml_with_base(path, allow_unsafe=True)
    except (AssertionError, yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--config-file: '{path}' is not a YAML config: {error}") from None
    given = {key: given[key] for key in ("SOLVER", "DATASETS", "TEST", "AGVM") if key in given}
    for key in given:
        cfg[key].set_new_allowed(True)
    try:
        cfg.merge_from_other_cfg(CfgNode(given))
    except ValueError as error:
        raise naming_the_key(error, cfg) from None
    solver = cfg.SOLVER
    batch, own = _batches(solver.IMS_PER_BATCH, {k.lower(): v for k, v in cfg.AGVM.items()})
    return Baseline(
        batch,
        solver.BASE_LR,
        solver.MAX_ITER,
        tuple(solver.STEPS),
        solver.CHECKPOINT_PERIOD,
        solver.OPTIMIZER in EPS,
        solver.OPTIMIZER == "MUON",
        betas=tuple(solver.BETAS) if solver.OPTIMIZER in ("ADAMW", "LAMB") else None,
        eps=solver.EPS or EPS.get(solver.OPTIMIZER, 0.0),
        warmup=solver.WARMUP_ITERS,
        images=_count(cfg.DATASETS.TRAIN),
        eval_period=cfg.TEST.EVAL_PERIOD,
        clip=solver.CLIP_GRADIENTS if solver.CLIP_GRADIENTS.ENABLED else None,
        config=cfg,
        own=own,
    )


def _batches(batch: int, agvm: dict) -> tuple[int, int | None]:
    """`Baseline.batch` and `own` of a config whose batch is `batch`."""
    by_gain = agvm.get("enabled", True) and agvm.get("mode", "modulate") == "modulate"
    if by_gain and agvm.get("schedule") == "gain":
        return agvm.get("base_batch_size", 16), batch
    return batch, None


def of_lazyconfig(cfg: DictConfig, path: str) -> Baseline:
    """
    Raises:
        ValueError: a key is missing, or holds no number.
    """
    keys = ("dataloader.train.total_batch_size", "optimizer.lr", "train.max_iter")
    found = [OmegaConf.select(cfg, key) for key in keys]
    for key, value in zip(keys, found, strict=True):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"--config-file: '{path}' has no number at {key}: found {value!r}.")
    period = OmegaConf.select(cfg, "train.checkpointer.period", default=5000)
    target = cfg.optimizer.get("_target_")
    target = getattr(target, "__name__", str(target)).rpartition(".")[2].lower()
    target = target.replace("<lambda>", "")
    adam = any(name in target for name in ("adam", "lamb"))
    betas = tuple(cfg.optimizer.get("betas", (0.9, 0.999))) if adam else None
    muon = "muon" in target
    eps = cfg.optimizer.get("eps", EPS["LAMB" if "lamb" in target else "ADAMW"])
    own, lr, max_iter = found
    agvm: Any = OmegaConf.to_container(cfg.get("agvm") or OmegaConf.create({}))
    batch, own = _batches(own, agvm)
    names = OmegaConf.select(cfg, "dataloader.train.dataset.names", default=())
    clip = OmegaConf.select(cfg, "train.clip_gradients") or {}
    return Baseline(
        batch,
        lr,
        max_iter,
        (),
        period,
        adam or muon,
        muon,
        agvm,
        betas,
        eps,
        warmup=(OmegaConf.select(cfg, "lr_multiplier.warmup_length") or 0) * max_iter,
        images=_count([names] if isinstance(names, str) else names),
        eval_period=OmegaConf.select(cfg, "train.eval_period") or 0,
        clip={name.upper(): value for name, value in clip.items()} or None,
        config=cfg,
        own=own,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, help="a config that works at its batch")
    parser.add_argument("--batch-size", required=True, type=int, help="images of one iteration")
    parser.add_argument(
        "--rule",
        dest="scaling",
        choices=(*LR_SCALINGS, "gain"),
        help="how the learning rate grows with the batch; default: by the optimizer",
    )
    parser.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="of the training set, for a warm-up of two epochs; default: COCO's or another's that "
        "is known, if the config names it",
    )
    parser.add_argument(
        "--scale-betas",
        action="store_true",
        help="with Adam, print its betas and eps for the batch, too (Malladi et al. 2022)",
    )
    add_unsafe_flag(parser)
    args = parser.parse_args(argv)
    try:
        base = read_baseline(args.config_file, args.allow_unsafe_yaml)
        if args.images is not None:
            require(args.images > 0, "--images", args.images, "be positive")
            base = base._replace(images=args.images)
        keys = recipe(base, args.batch_size, args.scaling, args.scale_betas)
    except (ValueError, KeyError, OSError) as error:
        sys.exit(f"agvm_d2.recipe: error: {message(error)}")
    print(f"# From batch {base.batch}, learning rate {base.lr:g}, {base.max_iter:,} iterations.")
    if not keys:
        print("# That is the batch asked for: nothing needs to change.")
        return
    if args.scaling == "gain":
        periods = "train.eval_period and" if base.lazy else "TEST.EVAL_PERIOD and"
        periods += " train.checkpointer.period" if base.lazy else " SOLVER.CHECKPOINT_PERIOD"
        print(
            "# Learning rate, schedule and iterations stay; the run ends when its steps are worth\n"
            f"# {base.max_iter:,} of batch {base.batch}. `python -m agvm_d2.plan` says when.\n"
            f"# {periods} still count iterations."
        )
        if not base.clip:
            print("# Clipping at 4 times the usual norm is for the few steps that would diverge.")
        else:
            print(clipped(base.clip))
            if base.clip.get("ITER_RANGE"):
                print(
                    "# That is in its ITER_RANGE only: beyond, nothing stops a step that diverges."
                )
    else:
        print(f"# Warm-up is {warm_up(base, args.batch_size)[1]}.")
        if base.muon:
            print("# AGVM only measures: its factors have not been tried on Muon.")
        if base.lazy and _old(base.config, "lr_multiplier.warmup_length") is None:
            print("# The config's lr_multiplier has no warm-up: give it one of that length.")
        if base.clip:
            print(clipped(base.clip))
        if keys["SOLVER"]["MAX_ITER"] < FEW_ITERATIONS:
            print(
                f"# {keys['SOLVER']['MAX_ITER']} iterations are few for any method: the paper "
                f"rarely goes below {FEW_ITERATIONS}."
            )
    if 0 in keys["SOLVER"].get("BETAS", ()):
        print("# A beta of 0 keeps no average: this batch is beyond what --scale-betas is for.")
    micro = "train.micro_batch_size" if base.lazy else "SOLVER.MICRO_BATCH_SIZE"
    print(
        "# AGVM compares the gradients of workers or of micro-batches: with one GPU set\n"
        f"# {micro} to what fits into its memory, at most half of the batch."
    )
    if base.agvm is None:
        path = os.path.abspath(model_zoo.find(args.config_file))
        print(yaml.safe_dump({"_BASE_": path}) + as_yaml(keys, base.config), end="")
    else:
        print(as_python(keys, base.agvm, base.config), end="")


if __name__ == "__main__":
    main()
