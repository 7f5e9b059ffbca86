"""Training and evaluation from a LazyConfig (.py), as Detectron2's tools/lazyconfig_train_net.py.

Beside Detectron2's keys a config has

    agvm                    dict of `AGVMHook`'s arguments, and `enabled`
    train.micro_batch_size  images of one forward and backward pass on one worker; 0: all at once
    train.clip_gradients    dict of `clip_gradients`' arguments; none: no clipping
    train.expected_results  as TEST.EXPECTED_RESULTS
    train.on_nonfinite      "stop" or "skip", as SOLVER.ON_NONFINITE
    train.on_bad_image      as DATALOADER.ON_BAD_IMAGE
    train.check_datasets    as DATALOADER.CHECK_DATASETS
    train.fsdp              dict of options of FSDP2, see `fsdp.DEFAULTS`; none: DDP

None of them must be in the file: a config that knows nothing of this package gets them by override,
and an `agvm` of the defaults, from the end of its warm-up on.

What `dataloader.train` builds by Detectron2's `build_detection_train_loader` becomes a
`ResumableLoader`, which a resumed run brings back to its place.
"""

from __future__ import annotations
import contextlib
import dataclasses
import os
from collections.abc import Iterable
from typing import Any, cast
import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.engine import AMPTrainer, SimpleTrainer, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format, verify_results
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from .. import model_zoo
from ..settings import Settings
from ..shards import is_sharded
from ..solver.build import prepare
from ..solver.clip import CLIP, check_clip, clip_gradients, skip_nonfinite_steps
from ..validate import did_you_mean, is_int, is_number, nested_keys, one_of, require
from .agreement import AgreementHook, check_agreement, code, flat
from .checkpoint import AtomicCheckpointer
from .checks import STOP_OR_SKIP, check_agvm, check_amp, check_device, check_whole
from .fsdp import EvenLoader, alike, check_fsdp, precision, shard
from .gain_schedule import TrainingDone
from .hook import AGVMHook
from .loader import ResumableLoader, check_resumable, resumable
from .micro_batches import STATIC_GRAPH, MicroBatchTrainer, autocast, split_batch
from .needs import Needs, check_data, complete, of_lazy
from .preemption import PreemptionHook
from .resume import ConfigRecord, check_not_done
from .run import RunOptions
from .trainer import create_ddp_model

AGVM_KEYS = {"enabled", "log_period"} | {field.name for field in dataclasses.fields(Settings)}
TRAIN_KEYS = {"micro_batch_size", "clip_gradients", "expected_results", "on_nonfinite"}
TRAIN_KEYS |= {"on_bad_image", "check_datasets", "fsdp", "seed"}
DATASETS = "dataloader.*.dataset.names"  # where they are named
# What Detectron2's own train_net reads of `train`, too.
THERE = (
    "amp.enabled", "checkpointer.period", "ddp", "device", "eval_period", "init_checkpoint",
    "log_period", "max_iter", "output_dir",
)  # fmt: skip
KEYS = ("model", "optimizer", "lr_multiplier", "dataloader", "train", "agvm")


def _as_dict(node: DictConfig) -> dict[str, Any]:
    """`node` and all below it as plain containers."""
    return cast(dict[str, Any], OmegaConf.to_container(node))


def read(path: str) -> DictConfig:
    """The LazyConfig of a .py file, or of the model zoo, as it is.

    Raises:
        ValueError, FileNotFoundError: it does not load.
    """
    path = model_zoo.find(path)
    try:
        return LazyConfig.load(path)
    except Exception as error:  # the file is code: anything
        raise ValueError(f"--config-file: '{path}': {type(error).__name__}: {error}") from error


def load(path: str, overrides: list[str]) -> DictConfig:
    """The LazyConfig of a .py file, with overrides as KEY=VALUE, and with an `agvm`.

    Raises:
        ValueError, FileNotFoundError: it does not load, or an override does not fit it.
    """
    cfg = read(path)
    if "agvm" not in cfg:
        hint = did_you_mean("agvm", map(str, cfg))
        if hint != ".":
            raise ValueError(f"--config-file: '{path}' has no 'agvm'{hint}")
        cfg.agvm = {}
    if OmegaConf.is_dict(cfg.agvm):
        defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
        cfg.agvm = {"enabled": True, **defaults, **cfg.agvm}
    for override in overrides:
        key = override.split("=")[0].lstrip("+~")
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        if parent == "train.fsdp" and node is None and "train" in cfg:  # off: on, with its defaults
            cfg.train.fsdp = node = OmegaConf.create({})
        free = parent in ("agvm", "train.fsdp") or (parent == "train" and name in TRAIN_KEYS)
        fits = OmegaConf.is_dict(node) and (name in node or "_target_" in node or free)
        if not fits:
            known = [*nested_keys(_as_dict(cfg)), *(f"train.{name}" for name in TRAIN_KEYS)]
            raise ValueError(
                f"config: the override '{override}' does not fit: {path} has no key '{key}'"
                f"{did_you_mean(key, known)}"
            )
    try:
        cfg = LazyConfig.apply_overrides(cfg, overrides)
    except Exception as error:  # hydra's parser has errors of its own
        raise ValueError(f"config: overrides {overrides}: {error}") from None
    _fill_start_iter(cfg)
    evaluator = OmegaConf.select(cfg, "dataloader.evaluator")
    target = evaluator.get("_target_") if OmegaConf.is_dict(evaluator) else None
    name = getattr(target, "__name__", str(target).rpartition(".")[2])
    if name == "COCOEvaluator" and evaluator.get("output_dir") is None:
        evaluator.output_dir = "${train.output_dir}/inference"  # or it takes COCO files only
    return cfg


def _fill_start_iter(cfg: DictConfig) -> None:
    """-1, as AGVM.START_ITER: 100 iterations after the warm-up, of a schedule that tells it."""
    agvm = cfg.agvm
    if not OmegaConf.is_dict(agvm) or agvm.get("start_iter", -1) != -1:
        return
    keys = ("lr_multiplier.warmup_length", "train.max_iter")
    share, iters = (OmegaConf.select(cfg, key, throw_on_resolution_failure=False) for key in keys)
    if agvm.get("schedule") != "gain" and is_number(share, iters):
        agvm.start_iter = round(share * iters) + 100


def micro_batches(cfg: DictConfig, num_workers: int) -> int:
    """Forward/backward passes of one worker in one iteration; ValueError as `split_batch`."""
    return split_batch(
        cfg.dataloader.train.total_batch_size,
        cfg.train.get("micro_batch_size", 0),
        num_workers,
        ("dataloader.train.total_batch_size", "train.micro_batch_size"),
    )


def _key(name: str) -> str:
    return f"agvm.{name}"


def check_keys(cfg: DictConfig) -> Settings:
    """See that the keys of `agvm` and `train.clip_gradients` are ours, and agvm's values good.

    Returns:
        AGVM's settings.

    Raises:
        ValueError: names the key, what was found and what it must be.
    """
    for key, known in (("agvm", AGVM_KEYS), ("train.clip_gradients", CLIP)):
        node = OmegaConf.select(cfg, key)
        if node is None and key != "agvm":
            continue
        if not OmegaConf.is_dict(node):
            raise ValueError(f"{key}: found {node!r}, but it must be a dict.")
        for name in node:
            if name not in known:
                raise ValueError(
                    f"{key}.{name}: there is no such key; there are {', '.join(sorted(known))}"
                    f"{did_you_mean(str(name), known)}"
                )
    return check_agvm(_as_dict(cfg.agvm), _key)


def _check_there(cfg: DictConfig) -> None:
    if OmegaConf.select(cfg, "train.init_checkpoint", default="") is None:  # as Detectron2 takes it
        cfg.train.init_checkpoint = ""
    for key in KEYS:
        if key != "agvm" and not OmegaConf.is_dict(cfg[key]):
            raise ValueError(f"{key}: found {cfg[key]!r}, but it must be a dict.")
    for name in THERE:
        if OmegaConf.select(cfg.train, name) is None:
            raise ValueError(
                f"train.{name}: it is missing, or None. Detectron2's model_zoo has it in "
                "configs/common/train.py."
            )


def check(cfg: DictConfig, num_workers: int, eval_only: bool = False) -> None:
    """See that the values of a LazyConfig can be used with `num_workers` workers.

    Raises:
        ValueError: names the key, what was found and what it must be.
    """
    for key in KEYS:
        if key not in cfg:
            hint = "; dict(enabled=False) trains without it" if key == "agvm" else ""
            raise ValueError(
                f"The config has no '{key}': see the .py ones of agvm_d2.model_zoo{hint}."
            )
    _check_there(cfg)
    for name, node in cfg.train.items():
        hint = did_you_mean(str(name), TRAIN_KEYS)
        off = OmegaConf.is_dict(node) and node.get("enabled") is False  # as detrex's clip_grad
        if name not in TRAIN_KEYS and hint != "." and not off:
            raise ValueError(
                f"train.{name}: there is no such key{hint} Where a project's own training script "
                "reads it, train with that script."
            )
    settings = check_keys(cfg)
    enabled = cfg.agvm.get("enabled", True)
    if enabled and settings.start_iter < 0 and settings.schedule != "gain":
        raise ValueError(
            "agvm.start_iter: a LazyConfig must name the iteration: the end of warm-up, or later."
        )
    train, batch = cfg.train, "dataloader.train.total_batch_size"
    check_whole(batch, OmegaConf.select(cfg, batch), 1)
    if train.get("clip_gradients"):
        options = _as_dict(train.clip_gradients)
        for name in ("clip_type", "clip_value"):
            if name not in options:
                raise ValueError(f"train.clip_gradients.{name}: it is missing.")
        check_clip(options, lambda name: f"train.clip_gradients.{name}")
    for key, low in (
        ("train.max_iter", 1),
        ("train.log_period", 1),
        ("train.checkpointer.period", 1),
        ("train.eval_period", 0),
        ("dataloader.train.num_workers", 0),
        ("dataloader.test.num_workers", 0),
    ):
        check_whole(key, OmegaConf.select(cfg, key, default=low), low)
    if enabled:
        settings.check_gain(cfg.dataloader.train.total_batch_size, train.max_iter, _key)
    if micro_batches(cfg, num_workers) > 1 and OmegaConf.select(cfg, "train.ddp.static_graph"):
        raise ValueError(STATIC_GRAPH)
    seed = train.get("seed", 0)
    require(is_int(seed), "train.seed", seed, "be a whole number")
    for key in ("on_nonfinite", "on_bad_image"):
        one_of(f"train.{key}", train.get(key, "stop"), STOP_OR_SKIP)
    check_device("train.device", train.device)
    check_amp("train.amp.enabled", train.amp.enabled, train.device)
    if not eval_only:
        check_fsdp(train.get("fsdp"), num_workers, train.amp.enabled)


def _names(cfg: DictConfig, split: str) -> list[str]:
    names = OmegaConf.select(cfg, f"dataloader.{split}.dataset.names", default=())
    if not isinstance(names, (str, ListConfig, tuple)):
        raise ValueError(
            f"dataloader.{split}.dataset.names: found {names!r}, but it must be a name or a list "
            "of names."
        )
    return [names] if isinstance(names, str) else list(names)


def dataset_names(cfg: DictConfig, eval_only: bool) -> list[str]:
    return ([] if eval_only else _names(cfg, "train")) + _names(cfg, "test")


def needs(cfg: DictConfig, eval_only: bool = False) -> Needs | None:
    """What the datasets must have."""
    return of_lazy(cfg, [] if eval_only else _names(cfg, "train"), _names(cfg, "test"))


def do_test(cfg: DictConfig, model: nn.Module) -> dict:
    """Results of `cfg.dataloader.evaluator` on `cfg.dataloader.test`; {} without an evaluator."""
    if "evaluator" not in cfg.dataloader:
        return {}
    loader = instantiate(cfg.dataloader.test)
    if is_sharded(model):
        loader = EvenLoader(loader, model)
    with autocast(cfg.train.device, precision(cfg.train.get("fsdp"))):
        evaluator = complete(instantiate(cfg.dataloader.evaluator))
        results = inference_on_dataset(model, loader, evaluator)
    print_csv_format(results)
    return results


def verify(cfg: DictConfig, results: dict) -> None:
    expected = cfg.train.get("expected_results", ())
    if expected and comm.is_main_process():
        expected = OmegaConf.to_container(expected)
        verify_results(CfgNode({"TEST": {"EXPECTED_RESULTS": expected}}), results)


def run_options(cfg: DictConfig) -> RunOptions:
    """Those of a LazyConfig."""
    train, agvm = cfg.train, _as_dict(cfg.agvm)
    return RunOptions(
        batch_size=cfg.dataloader.train.total_batch_size,
        micro_batch_size=train.get("micro_batch_size", 0),
        skip_nonfinite=train.get("on_nonfinite", "stop") == "skip",
        seed=train.get("seed", -1),
        modules=agvm.get("modules", ()) if agvm.get("enabled", True) else None,
    )


def train_loader(cfg: DictConfig) -> ResumableLoader | Iterable[list[dict]]:
    """A ResumableLoader where `dataloader.train` allows it, else what is configured there.

    Raises:
        ValueError: train.on_bad_image "skip", and the loader does not know it.
    """
    train = cfg.train
    on_bad_image = train.get("on_bad_image", "stop")
    names, check_files = _names(cfg, "train"), train.get("check_datasets", True)
    with resumable(names, train.get("seed", -1), on_bad_image, check_files) as made:
        loader = instantiate(cfg.dataloader.train)
    way_out = "Let dataloader.train be Detectron2's build_detection_train_loader"
    check_resumable(loader, made, "train.on_bad_image", on_bad_image, way_out)
    return loader


def agvm_hook(
    cfg: DictConfig, options: RunOptions, model: nn.Module, optimizer: torch.optim.Optimizer
) -> AGVMHook | None:
    settings = _as_dict(cfg.agvm)
    if not settings.pop("enabled", True):
        return None
    passes, batch_size = options.micro_batches, options.batch_size
    return AGVMHook(model, optimizer, micro_batches=passes, batch_size=batch_size, **settings)


def build_model(cfg: DictConfig) -> nn.Module:
    """On its device; with several workers and `train.fsdp` sharded."""
    fsdp = cfg.train.get("fsdp")
    if fsdp is None or comm.get_world_size() == 1:
        return instantiate(cfg.model).to(cfg.train.device)
    with alike():
        model = instantiate(cfg.model)
    return shard(model, cfg.train.device, fsdp)


def _trainer(
    cfg: DictConfig,
    options: RunOptions,
    model: nn.Module,
    loader: Iterable[list[dict]],
    optimizer: torch.optim.Optimizer,
) -> SimpleTrainer:
    """For the model in DDP or, sharded, as it is."""
    train = cfg.train
    if is_sharded(model):
        share = options.batch_size // comm.get_world_size() // options.micro_batches
        skip = options.skip_nonfinite
        return MicroBatchTrainer(
            model, loader, optimizer, share, precision=precision(train.fsdp), skip_nonfinite=skip
        )
    trainer = (AMPTrainer if train.amp.enabled else SimpleTrainer)(model, loader, optimizer)
    return options.prepare_trainer(trainer)


def do_train(cfg: DictConfig, resume: bool = False) -> dict:
    """Train, and evaluate at the end; the last evaluation's results.

    Raises:
        ValueError: workers with different configs, code or checkpoints; a bad dataset.
    """
    check_agreement({**code(), **flat(cfg), "--resume": resume})
    check_data(needs(cfg), log=True)
    train, options = cfg.train, run_options(cfg)
    model = build_model(cfg)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    del cfg.optimizer.params["model"]  # not a value of the config
    if options.skip_nonfinite:  # before clipping, which can make an inf finite
        skip_nonfinite_steps(optimizer, model)
    if train.get("clip_gradients"):
        clip_gradients(optimizer, **train.clip_gradients)
    prepare(optimizer, model, options.skip_nonfinite, options.modules)
    record = ConfigRecord(cfg, optimizer, model, train.output_dir)
    loader = train_loader(cfg)
    sharded = is_sharded(model)
    if not sharded:
        model = create_ddp_model(model, **train.ddp)
    trainer = _trainer(cfg, options, model, loader, optimizer)
    seeder = options.iteration_seeder(loader)
    checkpointer = AtomicCheckpointer(model, train.output_dir, trainer=trainer)
    results: dict = {}

    def evaluate() -> dict:
        results.clear()
        results.update(do_test(cfg, model))
        return results

    preemption = PreemptionHook(checkpointer)
    main = comm.is_main_process()
    # Of a sharded model all workers have a part to save; the main one writes, and deletes.
    saving = train.checkpointer if main else {**train.checkpointer, "max_to_keep": None}
    writers = default_writers(train.output_dir, train.max_iter) if main else []
    built = [
        preemption,
        AgreementHook(model),
        record,
        seeder,
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        agvm_hook(cfg, options, model, optimizer),
        hooks.PeriodicCheckpointer(checkpointer, **saving) if main or sharded else None,
        hooks.EvalHook(train.eval_period, preemption.abortable(evaluate)),
        hooks.PeriodicWriter(writers, period=train.log_period) if main else None,
    ]
    trainer.register_hooks([hook for hook in built if hook])
    last = checkpointer.get_checkpoint_file() if resume else ""
    check_agreement({"the checkpoint": os.path.basename(last)})
    checkpointer.resume_or_load(train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    check_not_done(start, train.max_iter, "train.max_iter")
    PathManager.mkdirs(train.output_dir)
    try:
        with contextlib.suppress(TrainingDone):
            trainer.train(start, train.max_iter)
    finally:
        record.release()
    verify(cfg, results)
    return results
