"""`python -m agvm_d2.recipe --config-file CONFIG --batch-size N`: what to put in a config to train
with batches of N images."""

from __future__ import annotations
import argparse
import sys
from typing import Any, NamedTuple
import yaml
from detectron2.config import CfgNode, get_cfg
from omegaconf import DictConfig, OmegaConf

from .d2.config import add_agvm_config, naming_the_key
from .d2.yaml_files import check_yaml
from .solver.build import EPS
from .solver.schedule import LR_SCALINGS, adam_scaled, scaled_lr

# Of training, as in the paper: two epochs of sixteen.
WARMUP = 1 / 8
# Iterations to each side of the end of warm-up in which the paper clips.
CLIP = 100
# The paper has hardly a run below (Faster R-CNN, batch 1536: 924).
FEW_ITERATIONS = 900
# With AGVM.SCHEDULE gain: an average over some 50 iterations, as in this package's study.
INTERVAL, MOMENTUM = 5, 0.9


class Baseline(NamedTuple):
    """Training that works, at its own batch."""

    batch: int
    lr: float
    max_iter: int
    steps: tuple[int, ...] = ()  # none in a LazyConfig, where drops are shares of training
    checkpoint_period: int = 5000
    adam: bool = False
    agvm: dict | None = None  # a LazyConfig's
    betas: tuple[float, float] | None = None  # of Adam and LAMB
    eps: float = EPS["ADAMW"]

    @property
    def lazy(self) -> bool:
        """A LazyConfig's?"""
        return self.agvm is not None


def recipe(
    base: Baseline, batch: int, scaling: str | None = None, scale_betas: bool = False
) -> dict[str, dict]:
    """yacs keys for training at `batch`, on as many images as `base`; or, with "gain", as long as
    the gain asks.

    Args:
        scaling: of `scaled_lr`; by default "sqrt" for Adam, LAMB and Muon, else "linear-sqrt".
            "gain": SOLVER stays that of `base`, and AGVM.SCHEDULE "gain" does the rest.
        scale_betas: also Adam's betas and eps, see `adam_scaled`, which goes with "sqrt".

    Raises:
        ValueError: a batch that is not positive, or below the base with "gain", or so large that
            nothing is left to train; betas to scale without Adam, or without "sqrt".
    """
    scaling = scaling or ("sqrt" if base.adam else "linear-sqrt")
    if scale_betas and (base.betas is None or scaling != "sqrt"):
        raise ValueError(
            "--scale-betas: is for ADAMW and LAMB with --rule sqrt, but the config has "
            f"{'another optimizer' if base.betas is None else 'one of them'} and the rule is "
            f"{scaling}"
        )
    if scaling == "gain":
        if batch < base.batch:
            raise ValueError(f"--batch-size {batch}: is below {base.batch}, the config's own")
        agvm = {"ENABLED": True, "RULE": "gain", "SCHEDULE": "gain", "BASE_BATCH_SIZE": base.batch}
        agvm |= {"MODE": "modulate", "INTERVAL": INTERVAL, "MOMENTUM": MOMENTUM, "START_ITER": -1}
        return {"SOLVER": {"IMS_PER_BATCH": batch}, "AGVM": agvm}
    lr = scaled_lr(batch, scaling, base.lr, base.batch)
    shrink = base.batch / batch
    iterations = round(base.max_iter * shrink)
    warmup = round(iterations * WARMUP)
    if warmup < 2:
        raise ValueError(
            f"--batch-size {batch}: {iterations} iterations would be left of the "
            f"{base.max_iter} at batch {base.batch}; train longer or take a smaller one"
        )
    window = min(CLIP, warmup)
    adam = {}
    if scale_betas and base.betas:
        betas, eps = adam_scaled(batch / base.batch, base.betas, base.eps)
        adam = {"BETAS": tuple(float(f"{b:.6g}") for b in betas), "EPS": float(f"{eps:.3g}")}
    return {
        "SOLVER": {
            "IMS_PER_BATCH": batch,
            "BASE_LR": float(f"{lr:.3g}"),
            **adam,
            "MAX_ITER": iterations,
            "STEPS": tuple(sorted({round(step * shrink) for step in base.steps} - {0})),
            "CHECKPOINT_PERIOD": max(1, round(base.checkpoint_period * shrink)),
            "WARMUP_METHOD": "exp",
            "WARMUP_FACTOR": 0.001,
            "WARMUP_ITERS": warmup,
            "CLIP_GRADIENTS": {
                "ENABLED": True,
                "CLIP_TYPE": "full_model",
                "CLIP_VALUE": 1.0,
                "ITER_RANGE": (warmup - window, warmup + window + 1),
            },
        },
        "AGVM": {
            "ENABLED": True,  # a baseline's config has it off
            "START_ITER": warmup + window,
            "INTERVAL": 5 if batch > 1000 else 10,
        },
    }


def as_yaml(keys: dict) -> str:
    """To paste below a yacs config."""

    def texts(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: texts(inner) for key, inner in value.items()}
        return str(value) if isinstance(value, tuple) else value

    return yaml.safe_dump(texts(keys), sort_keys=False).replace("'", "")


def as_python(keys: dict, agvm: dict) -> str:
    """To paste below a LazyConfig; its schedule is in shares of training, and stays but for
    warm-up.

    Args:
        agvm: the config's own.
    """
    solver = dict(keys["SOLVER"])
    lines = {
        "dataloader.train.total_batch_size": solver["IMS_PER_BATCH"],
        "agvm": {**agvm, **{name.lower(): value for name, value in keys["AGVM"].items()}},
    }
    if "MAX_ITER" in solver:
        clip = {k.lower(): v for k, v in solver["CLIP_GRADIENTS"].items() if k != "ENABLED"}
        lines |= {
            "optimizer.lr": solver["BASE_LR"],
            **{f"optimizer.{k.lower()}": solver[k] for k in ("BETAS", "EPS") if k in solver},
            "train.max_iter": solver["MAX_ITER"],
            "train.checkpointer.period": solver["CHECKPOINT_PERIOD"],
            "train.clip_gradients": clip,
            "lr_multiplier.warmup_factor": solver["WARMUP_FACTOR"],
            "lr_multiplier.warmup_length": solver["WARMUP_ITERS"] / solver["MAX_ITER"],
        }
    return "".join(f"{key} = {value!r}\n" for key, value in lines.items())


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
    check_yaml(path, allow_unsafe)
    cfg = get_cfg()
    add_agvm_config(cfg)
    try:
        given = CfgNode.load_yaml_with_base(path, allow_unsafe=True)
    except (AssertionError, yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--config-file: '{path}' is not a YAML config: {error}") from None
    cfg.SOLVER.set_new_allowed(True)
    try:
        cfg.merge_from_other_cfg(CfgNode({"SOLVER": given.get("SOLVER", {})}))
    except ValueError as error:
        raise naming_the_key(error) from None
    solver = cfg.SOLVER
    return Baseline(
        solver.IMS_PER_BATCH,
        solver.BASE_LR,
        solver.MAX_ITER,
        tuple(solver.STEPS),
        solver.CHECKPOINT_PERIOD,
        solver.OPTIMIZER in EPS,
        betas=tuple(solver.BETAS) if solver.OPTIMIZER in ("ADAMW", "LAMB") else None,
        eps=solver.EPS or EPS.get(solver.OPTIMIZER, 0.0),
    )


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
    target = str(cfg.optimizer.get("_target_")).lower()
    adam = any(name in target for name in ("adam", "lamb"))
    betas = tuple(cfg.optimizer.get("betas", (0.9, 0.999))) if adam else None
    eps = cfg.optimizer.get("eps", EPS["LAMB" if "lamb" in target else "ADAMW"])
    batch, lr, max_iter = found
    agvm: Any = OmegaConf.to_container(cfg.get("agvm") or OmegaConf.create({}))
    return Baseline(batch, lr, max_iter, (), period, adam, agvm, betas, eps)


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
        "--scale-betas",
        action="store_true",
        help="with Adam, print its betas and eps for the batch, too (Malladi et al. 2022; untried)",
    )
    parser.add_argument(
        "--allow-unsafe-yaml", action="store_true", help="let !!python tags in the file run code"
    )
    args = parser.parse_args(argv)
    try:
        base = read_baseline(args.config_file, args.allow_unsafe_yaml)
        keys = recipe(base, args.batch_size, args.scaling, args.scale_betas)
    except (ValueError, KeyError, OSError) as error:
        sys.exit(f"agvm_d2.recipe: error: {error}")
    print(f"# From batch {base.batch}, learning rate {base.lr:g}, {base.max_iter:,} iterations.")
    if args.scaling == "gain":
        print(
            "# Learning rate, schedule and iterations stay; the run ends when its steps are worth\n"
            f"# {base.max_iter:,} of batch {base.batch}. `python -m agvm_d2.plan` says when."
        )
    elif keys["SOLVER"]["MAX_ITER"] < FEW_ITERATIONS:
        print(
            f"# {keys['SOLVER']['MAX_ITER']} iterations are few for any method: the paper rarely "
            f"goes below {FEW_ITERATIONS}."
        )
    if 0 in keys["SOLVER"].get("BETAS", ()):
        print("# A beta of 0 keeps no average: this batch is beyond what --scale-betas is for.")
    micro = "train.micro_batch_size" if base.lazy else "SOLVER.MICRO_BATCH_SIZE"
    period = "train.eval_period" if base.lazy else "TEST.EVAL_PERIOD"
    print(
        "# AGVM compares the gradients of workers or of micro-batches: with one GPU set\n"
        f"# {micro} to what fits into its memory. {period} is not changed."
    )
    print(as_yaml(keys) if base.agvm is None else as_python(keys, base.agvm), end="")


if __name__ == "__main__":
    main()
