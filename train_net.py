#!/usr/bin/env python
"""Train and evaluate with AGVM. The command line is that of Detectron2's tools/train_net.py (.yaml)
and tools/lazyconfig_train_net.py (.py)."""

from __future__ import annotations
import os
import sys
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from omegaconf import DictConfig

import agvm_d2.data  # noqa: F401  registers the bundled datasets
from agvm_d2 import AGVMTrainer
from agvm_d2.d2 import lazy
from agvm_d2.d2.checkpoint import AtomicCheckpointer
from agvm_d2.d2.checks import check_config, check_datasets, check_names
from agvm_d2.d2.config import read_config
from agvm_d2.d2.launch import launch, worker_from_environment
from agvm_d2.d2.needs import check_data, of_yacs


def setup(args) -> CfgNode | DictConfig:
    """The checked config; nothing is written but the output folder.

    Raises:
        ValueError, KeyError, OSError: names the config key or path, and what to do.
    """
    num_workers = args.num_gpus * args.num_machines
    if args.config_file.endswith(".py"):
        cfg = lazy.load(args.config_file, args.opts)
        lazy.check(cfg, num_workers)
        check_datasets(lazy.dataset_names(cfg, args.eval_only))
        needs = lazy.needs(cfg, args.eval_only)
        keys = ("train.init_checkpoint", "train.output_dir", "train.device")
        values = (cfg.train.init_checkpoint, cfg.train.output_dir, cfg.train.device)
    else:
        cfg = read_config(args.config_file, args.opts)
        cfg.freeze()
        check_config(AGVMTrainer.auto_scale_workers(cfg, num_workers), num_workers)
        check_names(cfg)
        sets = cfg.DATASETS
        if not sets.TRAIN and not args.eval_only:
            raise ValueError("DATASETS.TRAIN: found (), but it must name at least one dataset.")
        if cfg.TEST.EXPECTED_RESULTS and not sets.TEST:
            raise ValueError(
                "TEST.EXPECTED_RESULTS: set, but DATASETS.TEST is empty. Set it to []."
            )
        check_datasets(sets.TEST if args.eval_only else sets.TRAIN + sets.TEST)
        needs = of_yacs(cfg, args.eval_only)
        keys = ("MODEL.WEIGHTS", "OUTPUT_DIR", "MODEL.DEVICE")
        values = (cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, cfg.MODEL.DEVICE)
    check_files(args, keys, *values)
    check_data(needs)
    return cfg


def check_files(args, keys, weights: str, output_dir: str, device: str) -> None:
    resumes = args.resume and os.path.exists(os.path.join(output_dir, "last_checkpoint"))
    if weights and "://" not in weights and not os.path.exists(weights) and not resumes:
        raise FileNotFoundError(f"{keys[0]}: '{weights}' is not there")
    gpus = torch.cuda.device_count()
    if device.startswith("cuda") and args.num_gpus > gpus:
        hint = " (with Slurm, give the GPUs to the node, --gpus-per-node, not to the task)"
        hint = hint if "SLURM_PROCID" in os.environ else ""
        raise ValueError(f"--num-gpus {args.num_gpus}: this process sees {gpus} GPUs{hint}")
    try:
        os.makedirs(output_dir, exist_ok=True)
    except OSError as error:
        raise OSError(f"{keys[1]}: '{output_dir}' cannot be made ({error.strerror})") from None
    if not os.access(output_dir, os.W_OK):
        raise PermissionError(f"{keys[1]}: '{output_dir}' cannot be written")
    if not device.startswith("cuda"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or launch() picks NCCL for a CPU model


def main(args):
    cfg = setup(args)
    default_setup(cfg, args)
    if isinstance(cfg, DictConfig):
        return lazy_main(args, cfg)
    if args.eval_only:
        model = AGVMTrainer.build_model(cfg)
        AtomicCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = AGVMTrainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = AGVMTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def lazy_main(args, cfg: DictConfig):
    if not args.eval_only:
        return lazy.do_train(cfg, args.resume)
    model = instantiate(cfg.model).to(cfg.train.device)
    AtomicCheckpointer(model, cfg.train.output_dir).resume_or_load(
        cfg.train.init_checkpoint, resume=args.resume
    )
    results = lazy.do_test(cfg, model)
    lazy.verify(cfg, results)
    return results


def invoke_main() -> None:
    args = default_argument_parser().parse_args()
    try:  # once, before any worker starts
        worker = worker_from_environment(args)
        setup(args)
    except (ValueError, KeyError, OSError) as error:
        sys.exit(f"train_net.py: error: {error.args[0] if len(error.args) == 1 else error}")
    print("Command Line Args:", args)
    launch(main, args, worker)


if __name__ == "__main__":
    invoke_main()
