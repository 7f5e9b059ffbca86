#!/usr/bin/env python
"""Train and evaluate with AGVM, with the command line of Detectron2's tools/train_net.py."""

from __future__ import annotations
import os
import sys
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm

import agvm_d2.data  # noqa: F401  registers the bundled datasets
from agvm_d2 import AGVMTrainer, add_agvm_config
from agvm_d2.config import check_config, check_datasets


def setup(args) -> CfgNode:
    """The checked config; nothing is written.

    Raises:
        ValueError, KeyError, OSError: names the config key or path, and what to do.
    """
    cfg = get_cfg()
    add_agvm_config(cfg)
    if not os.path.isfile(args.config_file):
        raise FileNotFoundError(f"--config-file: '{args.config_file}' is not a file")
    try:
        cfg.merge_from_file(args.config_file)
        cfg.merge_from_list(args.opts)
    except AssertionError as error:  # how yacs says that a key on the command line is unknown
        raise ValueError(f"config: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config-file: '{args.config_file}' is not YAML: {error}") from None
    cfg.freeze()
    num_workers = args.num_gpus * args.num_machines
    check_config(AGVMTrainer.auto_scale_workers(cfg, num_workers), num_workers)
    check_datasets(cfg.DATASETS.TEST if args.eval_only else cfg.DATASETS.TRAIN + cfg.DATASETS.TEST)
    weights = cfg.MODEL.WEIGHTS
    resumes = args.resume and os.path.exists(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    if weights and "://" not in weights and not os.path.exists(weights) and not resumes:
        raise FileNotFoundError(f"MODEL.WEIGHTS: '{weights}' is not there")
    gpus = torch.cuda.device_count()
    if cfg.MODEL.DEVICE.startswith("cuda") and args.num_gpus > gpus:
        raise ValueError(f"--num-gpus {args.num_gpus}: this machine has {gpus}")
    try:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    except OSError as error:
        raise OSError(f"OUTPUT_DIR: '{cfg.OUTPUT_DIR}' cannot be made ({error.strerror})") from None
    if not os.access(cfg.OUTPUT_DIR, os.W_OK):
        raise PermissionError(f"OUTPUT_DIR: '{cfg.OUTPUT_DIR}' cannot be written")
    return cfg


def main(args):
    cfg = setup(args)
    default_setup(cfg, args)
    if args.eval_only:
        model = AGVMTrainer.build_model(cfg)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = AGVMTrainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = AGVMTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def invoke_main() -> None:
    args = default_argument_parser().parse_args()
    try:  # once, before any worker starts
        cfg = setup(args)
    except (ValueError, KeyError, OSError) as error:
        sys.exit(f"train_net.py: error: {error.args[0] if len(error.args) == 1 else error}")
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or launch() picks NCCL for a CPU model
    print("Command Line Args:", args)
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


if __name__ == "__main__":
    invoke_main()
