"""`python -m agvm_d2.recipe --config-file CONFIG --batch-size N`: what to put in a config to train
with batches of N images."""

from __future__ import annotations
import argparse
import sys
import yaml
from detectron2.config import CfgNode, get_cfg

from .d2.config import add_agvm_config, naming_the_key
from .d2.yaml_files import check_yaml
from .solver.schedule import LR_SCALINGS, scaled_lr

# Of training, as in the paper: two epochs of sixteen.
WARMUP = 1 / 8
# Iterations to each side of the end of warm-up in which the paper clips.
CLIP = 100
# The paper has hardly a run below (Faster R-CNN, batch 1536: 924).
FEW_ITERATIONS = 900


def recipe(solver: CfgNode, batch: int, scaling: str | None = None) -> dict:
    """Config keys for training as long as `solver` does (the same number of images), at `batch`.

    Args:
        solver: SOLVER of a config that works at its own IMS_PER_BATCH.
        scaling: of `scaled_lr`; by default "sqrt" for ADAMW and LAMB, else "linear-sqrt".
            "gain": the learning rate stays, and AGVM.RULE "gain" multiplies each module's.

    Raises:
        ValueError: a batch that is not positive, or so large that nothing is left to train.
    """
    if scaling is None:
        scaling = "sqrt" if solver.OPTIMIZER in ("ADAMW", "LAMB") else "linear-sqrt"
    gain = scaling == "gain"
    lr = solver.BASE_LR if gain else scaled_lr(batch, scaling, solver.BASE_LR, solver.IMS_PER_BATCH)
    shrink = solver.IMS_PER_BATCH / batch
    iterations = round(solver.MAX_ITER * shrink)
    warmup = round(iterations * WARMUP)
    if warmup < 2:
        raise ValueError(
            f"--batch-size {batch}: {iterations} iterations would be left of the "
            f"{solver.MAX_ITER} at batch {solver.IMS_PER_BATCH}; train longer or take a smaller one"
        )
    window = min(CLIP, warmup)
    return {
        "SOLVER": {
            "IMS_PER_BATCH": batch,
            "BASE_LR": float(f"{lr:.3g}"),
            "MAX_ITER": iterations,
            "STEPS": str(tuple(sorted({round(step * shrink) for step in solver.STEPS} - {0}))),
            "CHECKPOINT_PERIOD": max(1, round(solver.CHECKPOINT_PERIOD * shrink)),
            "WARMUP_METHOD": "exp",
            "WARMUP_FACTOR": 0.001,
            "WARMUP_ITERS": warmup,
            "CLIP_GRADIENTS": {
                "ENABLED": True,
                "CLIP_TYPE": "full_model",
                "CLIP_VALUE": 1.0,
                # The gain was tried with clipping throughout.
                "ITER_RANGE": "()" if gain else str((warmup - window, warmup + window)),
            },
        },
        "AGVM": {
            "ENABLED": True,  # a baseline's config has it off
            **({"RULE": "gain", "BASE_BATCH_SIZE": solver.IMS_PER_BATCH} if gain else {}),
            "START_ITER": warmup + window,
            "INTERVAL": 5 if batch > 1000 else 10,
        },
    }


def read_solver(path: str, allow_unsafe: bool = False) -> CfgNode:
    """SOLVER of a config of any Detectron2 project, whatever other keys it has.

    Args:
        allow_unsafe: let the file's !!python tags run code, as Detectron2 does.

    Raises:
        ValueError, OSError: not a YAML config, or one that runs code.
    """
    if path.endswith(".py"):
        raise ValueError(
            f"--config-file: '{path}' is a LazyConfig; this command reads .yaml. "
            "agvm_d2.solver.scaled_lr has the rule."
        )
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
    return cfg.SOLVER


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
        "--allow-unsafe-yaml", action="store_true", help="let !!python tags in the file run code"
    )
    args = parser.parse_args(argv)
    try:
        solver = read_solver(args.config_file, args.allow_unsafe_yaml)
        keys = recipe(solver, args.batch_size, args.scaling)
    except (ValueError, KeyError, OSError) as error:
        sys.exit(f"agvm_d2.recipe: error: {error}")
    print(
        f"# From batch {solver.IMS_PER_BATCH}, learning rate {solver.BASE_LR:g}, "
        f"{solver.MAX_ITER:,} iterations."
    )
    if keys["SOLVER"]["MAX_ITER"] < FEW_ITERATIONS:
        print(
            f"# {keys['SOLVER']['MAX_ITER']} iterations are few for any method: the paper rarely "
            f"goes below {FEW_ITERATIONS}."
        )
    print(
        "# AGVM compares the gradients of workers or of micro-batches: with one GPU set\n"
        "# SOLVER.MICRO_BATCH_SIZE to what fits into its memory. TEST.EVAL_PERIOD is not changed."
    )
    print(yaml.safe_dump(keys, sort_keys=False).replace("'", ""), end="")


if __name__ == "__main__":
    main()
