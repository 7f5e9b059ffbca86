"""Train and evaluate with AGVM. The command line is that of Detectron2's tools/train_net.py (.yaml)
and tools/lazyconfig_train_net.py (.py)."""

from __future__ import annotations
import logging
import os
import sys
from argparse import Namespace
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig

import agvm_d2.data  # noqa: F401  registers the bundled datasets

from .. import model_zoo
from ..validate import message
from . import lazy
from .checkpoint import AtomicCheckpointer, iterations_done
from .checks import check_config, check_datasets, check_detectron2, check_names, check_tta
from .config import read_config
from .imports import add_flag, add_unsafe_flag, import_project
from .launch import launch, worker_from_environment
from .needs import check_data, of_yacs
from .output_dir import FolderLock, check_free, config_kept, set_aside
from .rendezvous import restarts
from .resume import check_not_done
from .sources import check_weights
from .trainer import AGVMTrainer


def setup(args: Namespace) -> CfgNode | DictConfig:
    """The checked config; nothing is written but the output folder. A name of the model zoo in
    `args.config_file` becomes its path.

    Raises:
        ValueError, KeyError, OSError: names the config key or path, and what to do.
        ImportError: a Detectron2 that is too old.
    """
    check_detectron2()
    args.config_file = model_zoo.find(args.config_file)  # Detectron2 logs what it holds
    project = import_project(getattr(args, "imports", ()), get_cfg())
    num_workers = args.num_gpus * args.num_machines
    if args.config_file.endswith(".py"):
        cfg = lazy.load(args.config_file, args.opts)
        lazy.check(cfg, num_workers, args.eval_only)
        check_datasets(lazy.dataset_names(cfg, args.eval_only), lazy.DATASETS)
        needs = lazy.needs(cfg, args.eval_only)
        keys = ("train.init_checkpoint", "train.output_dir", "train.device", "train.max_iter")
        train = cfg.train
        values = (train.init_checkpoint, train.output_dir, train.device, train.max_iter)
    else:
        unsafe = getattr(args, "allow_unsafe_yaml", False)
        cfg = read_config(args.config_file, args.opts, unsafe, project)
        cfg.freeze()
        scaled = AGVMTrainer.auto_scale_workers(cfg, num_workers)
        check_config(scaled, num_workers)
        check_names(cfg)
        check_tta(cfg)
        sets = cfg.DATASETS
        if not sets.TRAIN and not args.eval_only:
            raise ValueError("DATASETS.TRAIN: found (), but it must name at least one dataset.")
        if cfg.TEST.EXPECTED_RESULTS and not sets.TEST:
            raise ValueError(
                "TEST.EXPECTED_RESULTS: set, but DATASETS.TEST is empty. Set it to []."
            )
        check_datasets(sets.TEST if args.eval_only else sets.TRAIN + sets.TEST)
        needs = of_yacs(cfg, args.eval_only)
        keys = ("MODEL.WEIGHTS", "OUTPUT_DIR", "MODEL.DEVICE", "SOLVER.MAX_ITER")
        iters = scaled.SOLVER.MAX_ITER
        values = (cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, cfg.MODEL.DEVICE, iters)
    check_files(args, keys, *values)
    check_data(needs)
    return cfg


def check_files(
    args: Namespace,
    keys: tuple[str, str, str, str],
    weights: str,
    output_dir: str,
    device: str,
    max_iter: int,
) -> None:
    done = iterations_done(output_dir) if args.resume else None
    check_weights(keys, weights, output_dir, args.eval_only, done is not None)
    if done and not args.eval_only:
        check_not_done(done, max_iter, keys[3])
    gpus = torch.cuda.device_count()
    if device.startswith("cuda") and args.num_gpus > gpus:
        hint = " (with Slurm, give the GPUs to the node, --gpus-per-node, not to the task)"
        hint = hint if "SLURM_PROCID" in os.environ else ""
        raise ValueError(f"--num-gpus {args.num_gpus}: this process sees {gpus} GPUs{hint}")
    try:
        PathManager.mkdirs(output_dir)
    except OSError as error:
        raise OSError(f"{keys[1]}: '{output_dir}' cannot be made ({error.strerror})") from None
    if "://" not in output_dir and not os.access(output_dir, os.W_OK):
        raise PermissionError(f"{keys[1]}: '{output_dir}' cannot be written")
    if not device.startswith("cuda"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or launch() picks NCCL for a CPU model


def open_folder(args: Namespace, cfg: CfgNode | DictConfig) -> FolderLock | None:
    """Detectron2's default_setup, in a folder without another run.

    Returns:
        The lock of the folder, to be kept while this run trains.
    """
    lazily = isinstance(cfg, DictConfig)
    folder = cfg.train.output_dir if lazily else cfg.OUTPUT_DIR
    weights = (cfg.train.init_checkpoint if lazily else cfg.MODEL.WEIGHTS).partition("?")[0]
    lock, aside = None, ""
    if comm.is_main_process() and not args.eval_only:
        lock = FolderLock.take(folder)
        if not args.resume or iterations_done(folder) is None:
            aside = set_aside(folder, keep=(weights, args.config_file))
    comm.synchronize()
    with config_kept(folder, comm.is_main_process() and (args.eval_only or args.resume)):
        default_setup(cfg, args)
    if aside:
        logging.getLogger("detectron2.agvm_d2").warning(
            f"'{folder}' held an older run, which is now in '{aside}'; --resume goes on with one."
        )
    return lock


def main(args: Namespace) -> dict | None:
    """What each worker does; the last evaluation's results."""
    cfg = setup(args)
    lock = open_folder(args, cfg)  # noqa: F841  held until the end
    if restarts():
        logging.getLogger("detectron2.agvm_d2").warning(
            f"Restart {restarts()} by torchrun: going on from the last checkpoint, as --resume."
        )
    if isinstance(cfg, DictConfig):
        return lazy_main(args, cfg)
    if args.eval_only:
        model = AGVMTrainer.build_model(cfg)
        AtomicCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = AGVMTrainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(AGVMTrainer.test_with_TTA(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = AGVMTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def lazy_main(args: Namespace, cfg: DictConfig) -> dict:
    if not args.eval_only:
        return lazy.do_train(cfg, args.resume)
    model = lazy.build_model(cfg)
    AtomicCheckpointer(model, cfg.train.output_dir).resume_or_load(
        cfg.train.init_checkpoint, resume=args.resume
    )
    results = lazy.do_test(cfg, model)
    lazy.verify(cfg, results)
    return results


def invoke_main(argv: list[str] | None = None, name: str = "agvm_d2.train") -> None:
    """The command.

    Args:
        name: of the command, for messages.
    """
    parser = default_argument_parser()
    add_unsafe_flag(parser)
    add_flag(parser)
    args = parser.parse_args(argv)
    try:  # once, before any worker starts
        worker = worker_from_environment(args)
        cfg = setup(args)
        first = args.machine_rank == 0 if worker is None else worker.rank == 0
        if first and not args.eval_only:
            check_free(cfg.train.output_dir if isinstance(cfg, DictConfig) else cfg.OUTPUT_DIR)
    except (ValueError, KeyError, OSError, ImportError) as error:
        sys.exit(f"{name}: error: {message(error)}")
    print("Command Line Args:", args)
    launch(main, args, worker)
