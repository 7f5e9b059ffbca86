"""AGVM in real Detectron2 trainers: micro-batches, two workers, checkpoints, other projects."""

import copy
import json
import os
import shutil
import pytest
import reference
import torch
from detectron2.engine import DefaultTrainer, SimpleTrainer, create_ddp_model, hooks
from detectron2.solver import build_optimizer as d2_build_optimizer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from toy import MODULES, ToyDetector, ToyLoader, ToyTrainer, agvm_hook, batch, toy_config, train
from toy import weights as weights_of

from agvm_d2 import AGVMHook, AGVMTrainer, AGVMTrainerMixin, split_param_groups
from agvm_d2.d2.micro_batches import MicroBatchTrainer

MICRO = {"SOLVER__MICRO_BATCH_SIZE": 2}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


# Micro-batches


def test_micro_batches_make_the_step_of_the_whole_batch(tmp_path):
    off = {"AGVM__ENABLED": False}
    whole = train(toy_config(tmp_path / "a", **off))
    pieces = train(toy_config(tmp_path / "b", **off, **MICRO))
    assert type(whole._trainer) is SimpleTrainer and type(pieces._trainer) is MicroBatchTrainer
    for key, value in weights_of(whole).items():
        torch.testing.assert_close(weights_of(pieces)[key], value, rtol=1e-4, atol=1e-6)


def test_a_batch_of_no_images_is_an_error():
    model = ToyDetector()
    trainer = MicroBatchTrainer(model, [[]], torch.optim.SGD(model.parameters(), lr=0.1), 3)
    with pytest.raises(ValueError, match="batch of no images"):
        trainer.run_step()


def test_unequal_pieces_are_averaged_by_image_count():
    model, data = ToyDetector(), batch(7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = MicroBatchTrainer(model, [data], optimizer, 3)  # 3 + 3 + 1
    weights = []
    trainer.register_hooks([watcher := hooks.CallbackHook()])
    watcher.after_micro_batch = weights.append
    with EventStorage(0) as storage:
        trainer.run_step()
        logged = storage.latest()["total_loss"][0]
    assert weights == [3 / 7, 3 / 7, 1 / 7]
    found = [p.grad.clone() for p in model.parameters()]
    other = ToyDetector()
    loss = sum(other(data).values())
    loss.backward()
    for g, p in zip(found, other.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad)
    assert logged == pytest.approx(loss.item(), rel=1e-5)


cpu_scaler = pytest.mark.skipif(
    not hasattr(torch.amp, "GradScaler"), reason="torch before 2.3 has no GradScaler on a CPU"
)


@pytest.mark.parametrize("scaled", [False, pytest.param(True, marks=cpu_scaler)])
def test_micro_batches_with_autocast_and_a_grad_scaler(scaled):
    model = ToyDetector()
    optimizer = split_param_groups(torch.optim.SGD(model.parameters(), lr=0.1), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    trainer = MicroBatchTrainer(
        model, ToyLoader(8), optimizer, 2, grad_scaler=scaler, precision=torch.bfloat16
    )
    hook = AGVMHook(model, optimizer, interval=1, momentum=0.5, micro_batches=4, batch_size=8)
    trainer.register_hooks([hook])
    other = copy.deepcopy(model)
    trainer.train(0, 1)

    def loss_of(model, data):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return sum(model(data).values())

    data = next(iter(ToyLoader(8)))
    units = [data[i : i + 2] for i in range(0, 8, 2)]
    gradients = reference.unit_gradients(other, loss_of, units)
    variances = reference_variances(gradients, other)
    wanted = reference.factors(dict.fromkeys(MODULES, 1.0), variances, "backbone", 0.5, (0.5, 10))
    assert hook.modulator.factors.tolist() == pytest.approx(list(wanted.values()), rel=1e-3)
    if scaled:
        assert trainer.state_dict()["grad_scaler"]["scale"] == 1024.0


def reference_variances(gradients, model):
    from toy import parameter_names

    return {
        m: reference.pairwise_variance(reference.flatten(gradients, names))
        for m, names in parameter_names(model).items()
    }


@cpu_scaler
def test_a_step_skipped_for_inf_leaves_factors_alone():
    model = ToyDetector()
    optimizer = split_param_groups(torch.optim.SGD(model.parameters(), lr=0.1), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)  # times the loss: inf
    data = [{"image": d["image"], "target": d["target"] * 1e6} for d in batch(8)]
    trainer = MicroBatchTrainer(model, [data], optimizer, 4, scaler)
    hook = AGVMHook(model, optimizer, interval=1, micro_batches=2)
    trainer.register_hooks([hook])
    before = copy.deepcopy(model.state_dict())
    trainer.train(0, 1)
    assert same(before, model.state_dict())
    assert hook.modulator.factors.tolist() == [1.0] * 4


def test_a_projects_own_inner_trainer_cannot_be_cut(tmp_path):
    class Own(SimpleTrainer):
        pass

    class Theirs(DefaultTrainer):
        def __init__(self, cfg):
            super().__init__(cfg)
            self._trainer = Own(self.model, self.data_loader, self.optimizer)

        build_model = ToyTrainer.__dict__["build_model"]
        build_train_loader = ToyTrainer.__dict__["build_train_loader"]

    class Trainer(AGVMTrainerMixin, Theirs):
        pass

    with pytest.raises(ValueError, match="SOLVER.MICRO_BATCH_SIZE.*its own Own"):
        Trainer(toy_config(tmp_path, **MICRO))


# The two ways of getting gradients


def run_in_worker(options, output_dir):
    trainer = train(toy_config(output_dir, **options))
    hook = next((h for h in trainer._hooks if isinstance(h, AGVMHook)), None)
    factors = hook.modulator.factors if hook else None
    return weights_of(trainer), factors, {g["lr"] for g in trainer.optimizer.param_groups}


def test_two_workers_and_two_micro_batches_agree(workers, tmp_path):
    one = train(toy_config(tmp_path / "one", SOLVER__MICRO_BATCH_SIZE=4))
    two = workers(2).run(run_in_worker, {}, tmp_path / "two")
    factors = agvm_hook(one).modulator.factors
    assert torch.equal(two[0][1], two[1][1]) and same(two[0][0], two[1][0])
    assert (factors[1:] != 1).all()
    torch.testing.assert_close(two[0][1], factors, rtol=1e-4, atol=1e-4)
    for key, value in weights_of(one).items():
        torch.testing.assert_close(two[0][0][key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["SGD", "ADAMW"])
def test_monitor_is_bit_identical_to_off_with_micro_batches(tmp_path, optimizer):
    options = {
        **MICRO,
        "SOLVER__OPTIMIZER": optimizer,
        "SOLVER__CLIP_GRADIENTS__ENABLED": True,
        "SOLVER__CLIP_GRADIENTS__CLIP_TYPE": "full_model",
    }
    off = train(toy_config(tmp_path / "off", AGVM__ENABLED=False, **options))
    monitor = train(toy_config(tmp_path / "monitor", AGVM__MODE="monitor", **options))
    assert same(weights_of(off), weights_of(monitor))
    assert (agvm_hook(monitor).modulator.factors[1:] != 1).all()
    on = train(toy_config(tmp_path / "on", **options))
    assert not same(weights_of(off), weights_of(on))


@pytest.mark.parametrize("options", [{}, MICRO], ids=["", "micro"])
def test_monitor_is_bit_identical_to_off_with_two_workers(workers, tmp_path, options):
    pool = workers(2)
    off = pool.run(run_in_worker, {"AGVM__ENABLED": False, **options}, tmp_path / "off")
    monitor = pool.run(run_in_worker, {"AGVM__MODE": "monitor", **options}, tmp_path / "monitor")
    assert same(off[0][0], monitor[0][0])
    assert (monitor[0][1][1:] != 1).all()
    assert monitor[0][2] == {0.05}


def lazyconfig_loop(compressed):
    """In a worker: the trainer of Detectron2's lazyconfig_train_net; its factors and tap."""
    model = ToyDetector()
    optimizer = split_param_groups(torch.optim.SGD(model.parameters(), lr=0.05), model)
    ddp = create_ddp_model(model, fp16_compression=compressed, device_ids=None)
    trainer = SimpleTrainer(ddp, ToyLoader(8, comm.get_rank(), 2), optimizer)
    hook = AGVMHook(ddp, optimizer, interval=1, momentum=0.5, batch_size=8)
    trainer.register_hooks([hook])
    trainer.train(0, 1)
    return hook.modulator.factors, type(hook.agvm.tap).__name__


@pytest.mark.parametrize("compressed, tap", [(False, "BucketTap"), (True, "TensorTap")])
def test_a_simple_trainer_under_ddp_also_with_its_own_compression(workers, compressed, tap):
    results = workers(2).run(lazyconfig_loop, compressed)
    data = next(iter(ToyLoader(8)))
    gradients = reference.unit_gradients(
        ToyDetector(), lambda model, unit: sum(model(unit).values()), [data[:4], data[4:]]
    )
    variances = reference_variances(gradients, ToyDetector())
    wanted = reference.factors(dict.fromkeys(MODULES, 1.0), variances, "backbone", 0.5, (0.5, 10))
    for factors, kind in results:
        assert kind == tap
        # Compressed gradients are averaged in float16.
        assert factors.tolist() == pytest.approx(
            list(wanted.values()), rel=1e-2 if compressed else 1e-4
        )
    assert torch.equal(results[0][0], results[1][0])


class FixedBatchTrainer(AGVMTrainer):
    """The thin Faster R-CNN on one fixed batch of digits."""

    @classmethod
    def build_train_loader(cls, cfg):
        return [fixed_batch(cfg)[comm.get_rank() :: comm.get_world_size()]] * 3

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        raise NotImplementedError


def fixed_batch(cfg):
    from detectron2.data import DatasetCatalog, DatasetMapper

    mapper = DatasetMapper(cfg, is_train=True)
    return [mapper(copy.deepcopy(d)) for d in DatasetCatalog.get("digits_train")[:4]]


def faster_rcnn_config(output_dir, **options):
    import agvm_d2.data  # noqa: F401

    cfg = toy_config(output_dir)
    base = os.path.join(os.path.dirname(__file__), "../configs/Base-RCNN-FPN-Digits.yaml")
    cfg.merge_from_file(base)
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    cfg.SOLVER.MICRO_BATCH_SIZE = 0
    # Sampling takes all anchors and proposals, so that no loss is random.
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 10**6
    cfg.SOLVER.WARMUP_METHOD = "linear"
    cfg.SOLVER.BASE_LR = 0.001
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.SOLVER.MAX_ITER = 1
    cfg.AGVM.START_ITER = 0
    cfg.AGVM.MOMENTUM = 0.5
    cfg.AGVM.RATIO_RANGE = (0.001, 1000.0)  # or the bounds would hide the variances
    cfg.merge_from_list([x for k, v in options.items() for x in (k.replace("__", "."), v)])
    return cfg


def faster_rcnn_step(output_dir, options):
    """In a worker or here: one iteration from fixed weights; the moments and factors."""
    torch.manual_seed(0)
    trainer = FixedBatchTrainer(faster_rcnn_config(output_dir, **options))
    trainer.train()
    modulator = agvm_hook(trainer).modulator
    return modulator.last.unit_sq, modulator.last.mean_sq, modulator.factors


def test_faster_rcnn_in_two_workers_in_micro_batches_and_in_the_reference(
    digits, workers, tmp_path
):
    ranks = workers(2).run(faster_rcnn_step, tmp_path / "two", {})
    # Worker r has images r and r + 2; so must micro-batch r.
    cfg = faster_rcnn_config(tmp_path / "one", SOLVER__MICRO_BATCH_SIZE=2)

    class Reordered(FixedBatchTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            data = fixed_batch(cfg)
            return [data[0::2] + data[1::2]] * 3

    torch.manual_seed(0)
    one = Reordered(cfg)
    start = copy.deepcopy(one.model)
    one.train()
    modulator = agvm_hook(one).modulator
    found = (modulator.last.unit_sq, modulator.last.mean_sq, modulator.factors)

    data = fixed_batch(cfg)
    with EventStorage(0):
        gradients = reference.unit_gradients(
            start, lambda model, unit: sum(model(unit).values()), [data[0::2], data[1::2]]
        )
    prefixes = {
        "backbone": "backbone.bottom_up",
        "fpn": "backbone.fpn_",
        "rpn": "proposal_generator",
        "box_head": "roi_heads",
    }
    vectors = {
        module: reference.flatten(gradients, [n for n in gradients[0] if n.startswith(prefix)])
        for module, prefix in prefixes.items()
    }
    variances = {m: reference.pairwise_variance(v) for m, v in vectors.items()}
    factors = reference.factors(
        dict.fromkeys(vectors, 1.0), variances, "backbone", 0.5, (1e-3, 1e3)
    )
    wanted = [
        torch.tensor(v, dtype=torch.float64) for v in zip(*map(reference.moments, vectors.values()))
    ]
    wanted.append(torch.tensor(list(factors.values()), dtype=torch.float64))
    assert len(set(factors.values())) == 4
    for result in (*ranks, found):
        for value, exact in zip(result, wanted, strict=True):
            torch.testing.assert_close(value, exact, rtol=1e-4, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(*ranks, strict=True))


class EmptyOnOneTrainer(FixedBatchTrainer):
    """Worker 0 has three images, worker 1 one without annotations."""

    @classmethod
    def build_train_loader(cls, cfg):
        data = fixed_batch(cfg)
        data[3]["instances"] = data[3]["instances"][:0]
        return [data[:3] if comm.get_rank() == 0 else data[3:]] * 3


def empty_on_one(output_dir):
    torch.manual_seed(0)
    trainer = EmptyOnOneTrainer(
        faster_rcnn_config(output_dir, SOLVER__MAX_ITER=3, AGVM__INTERVAL=1)
    )
    trainer.train()
    modulator = agvm_hook(trainer).modulator
    return modulator.variance, modulator.factors, [p.detach() for p in trainer.model.parameters()]


def test_unequal_batches_and_a_worker_without_annotations(digits, workers, tmp_path):
    one, other = workers(2).run(empty_on_one, tmp_path)
    assert (one[0] > 0).all() and one[0].isfinite().all() and (one[1] != 1).sum() == 3
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    for a, b in zip(one[2], other[2], strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


# Checkpoints


def test_resume_goes_on_with_the_same_factors_and_weights(tmp_path):
    straight = train(toy_config(tmp_path / "a", **MICRO))
    options = {**MICRO, "SOLVER__CHECKPOINT_PERIOD": 5}
    half = toy_config(tmp_path / "b", **options)

    class Stopped(ToyTrainer):
        def build_hooks(self):
            def stop(trainer):
                if trainer.iter == 4:
                    raise InterruptedError

            return [*super().build_hooks(), hooks.CallbackHook(after_step=stop)]

    with pytest.raises(InterruptedError):
        train(half, Stopped)

    class Resumed(ToyTrainer):
        @classmethod
        def build_train_loader(cls, cfg):  # the toy loader at its sixth batch
            loader = iter(ToyLoader(cfg.SOLVER.IMS_PER_BATCH))
            for _ in range(5):
                next(loader)
            return loader

    trainer = Resumed(half)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 5
    factors = agvm_hook(trainer).modulator.factors.tolist()
    saved = torch.load(tmp_path / "b" / "model_0000004.pth", weights_only=True)
    assert factors == saved["trainer"]["hooks"]["AGVMHook"]["factors"] != [1.0] * 4
    trainer.train()
    assert same(weights_of(straight), weights_of(trainer))
    assert torch.equal(agvm_hook(straight).modulator.factors, agvm_hook(trainer).modulator.factors)


def test_resume_with_other_modules_says_which_and_keeps_the_checkpoint(tmp_path):
    train(toy_config(tmp_path, **MICRO))
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.pth")}
    rules = (("backbone", r"backbone\."), ("heads", ""))
    with pytest.raises(ValueError, match="backbone, fpn, rpn, box_head, but .* backbone, heads"):
        train(toy_config(tmp_path, AGVM__MODULES=rules, **MICRO), resume=True)
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.pth")} == before
    train(toy_config(tmp_path, SOLVER__MAX_ITER=12, **MICRO), resume=True)


class StockToyTrainer(DefaultTrainer):
    """Detectron2's trainer, optimizer and checkpoints."""

    build_model = ToyTrainer.build_model
    build_train_loader = ToyTrainer.build_train_loader


def at_iteration_5(source, folder):
    folder.mkdir()
    shutil.copy(source / "model_0000004.pth", folder / "model_0000004.pth")
    (folder / "last_checkpoint").write_text("model_0000004.pth")
    return folder


STOCK = {
    "SOLVER__CHECKPOINT_PERIOD": 5,
    "SOLVER__STEPS": (7,),
    "SOLVER__BIAS_LR_FACTOR": 2.0,  # two param groups, of two learning rates
    "SOLVER__WEIGHT_DECAY_BIAS": 0.0,
}


@pytest.mark.parametrize("mode", ["monitor", "modulate"])
def test_a_stock_checkpoint_resumed_into_agvm(tmp_path, mode):
    train(toy_config(tmp_path / "stock", **STOCK), StockToyTrainer)
    plain = at_iteration_5(tmp_path / "stock", tmp_path / "plain")
    stock = train(toy_config(plain, **STOCK), StockToyTrainer, resume=True)
    assert stock.start_iter == 5

    options = {**STOCK, **MICRO, "AGVM__MODE": mode, "AGVM__START_ITER": 5}
    agvm = at_iteration_5(tmp_path / "stock", tmp_path / "agvm")
    trainer = ToyTrainer(toy_config(agvm, **options))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 5 and len(trainer.optimizer.param_groups) == 8
    momentum = torch.load(plain / "model_0000004.pth", weights_only=True)
    momentum = momentum["trainer"]["_trainer"]["optimizer"]["state"]
    saved = sorted(float(s["momentum_buffer"].sum()) for s in momentum.values())
    found = sorted(float(s["momentum_buffer"].sum()) for s in trainer.optimizer.state.values())
    assert found == saved
    trainer.train()
    lrs = {round(g["lr"], 7) for g in trainer.optimizer.param_groups}
    assert lrs == {round(g["lr"], 7) for g in stock.optimizer.param_groups} == {0.005, 0.01}
    found = weights_of(trainer)
    for name, value in weights_of(stock).items():
        close = torch.allclose(
            value, found[name], rtol=1e-4
        )  # one batch against micro-batches: not the bits
        assert close or mode == "modulate"


def test_agvm_switched_off_at_resume_says_what_to_do(tmp_path):
    train(toy_config(tmp_path, **MICRO))
    with pytest.raises(ValueError, match='has 4 param groups .*set AGVM.MODE "monitor"'):
        train(toy_config(tmp_path, AGVM__ENABLED=False, **MICRO), resume=True)


def test_another_optimizer_at_resume_is_named(tmp_path):
    train(toy_config(tmp_path, **MICRO))
    with pytest.raises(
        ValueError, match="another optimizer than AdamW: it has momentum instead of betas"
    ):
        train(toy_config(tmp_path, SOLVER__OPTIMIZER="ADAMW", **MICRO), resume=True)


# Scalars


def test_metrics_json_holds_every_scalar(tmp_path):
    train(toy_config(tmp_path, SOLVER__MICRO_BATCH_SIZE=4, SOLVER__MAX_ITER=20))
    names = set()
    for line in (tmp_path / "metrics.json").read_text().splitlines():
        names |= json.loads(line).keys()
    for module in MODULES:
        assert f"agvm/variance/{module}" in names
        assert f"agvm/lr_scale/{module}" in names
    assert any(n.startswith("agvm/noise_scale/") for n in names)
    assert list(tmp_path.glob("events.out.tfevents*"))


# Other projects


def test_detectron2_s_own_train_net_by_the_mixin_alone(digits, tmp_path):
    stock = pytest.importorskip("tools.train_net", reason="only the wheel ships Detectron2's tools")

    class Trainer(AGVMTrainerMixin, stock.Trainer):
        pass

    cfg = faster_rcnn_config(tmp_path, SOLVER__MICRO_BATCH_SIZE=2, SOLVER__MAX_ITER=2)
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0, "DATASETS.TEST", ("digits_val",)])
    trainer = train(cfg, Trainer)
    assert (agvm_hook(trainer).modulator.factors[1:] != 1).all()
    assert "bbox" in trainer._last_eval_results


def test_a_default_trainer_by_the_mixin_alone(tmp_path):
    class Stock(DefaultTrainer):  # as in Detectron2's tools/train_net.py
        @classmethod
        def build_evaluator(cls, cfg, dataset_name, output_folder=None):
            raise NotImplementedError

    class Theirs(Stock):  # a model and data of their own
        build_model = ToyTrainer.__dict__["build_model"]
        build_train_loader = ToyTrainer.__dict__["build_train_loader"]

    class Trainer(AGVMTrainerMixin, Theirs):
        pass

    options = {**MICRO, "SOLVER__WARMUP_METHOD": "exp", "SOLVER__WARMUP_ITERS": 3}
    mixed = train(toy_config(tmp_path / "a", **options), Trainer)
    ours = train(toy_config(tmp_path / "b", **options))
    assert same(weights_of(mixed), weights_of(ours))
    assert (agvm_hook(mixed).modulator.factors[1:] != 1).all()


def test_a_projects_own_optimizer_is_kept_and_split(tmp_path):
    class Theirs(DefaultTrainer):
        build_model = ToyTrainer.__dict__["build_model"]
        build_train_loader = ToyTrainer.__dict__["build_train_loader"]

        @classmethod
        def build_optimizer(cls, cfg, model):
            backbone = [p for n, p in model.named_parameters() if n.startswith("backbone")]
            others = [p for n, p in model.named_parameters() if not n.startswith("backbone")]
            groups = [{"params": backbone, "lr": 0.005}, {"params": others}]
            return torch.optim.AdamW(groups, lr=0.01)

    class Trainer(AGVMTrainerMixin, Theirs):
        pass

    trainer = train(toy_config(tmp_path / "a", **MICRO), Trainer)
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert [g["lr"] for g in trainer.optimizer.param_groups] == [0.005, 0.005, 0.01, 0.01]
    assert (agvm_hook(trainer).modulator.factors[1:] != 1).all()
    off = Trainer(toy_config(tmp_path / "b", AGVM__ENABLED=False))
    assert len(off.optimizer.param_groups) == 2


def test_a_project_that_calls_super_gets_this_packages_keys(tmp_path):
    class Theirs(StockToyTrainer):
        @classmethod
        def build_optimizer(cls, cfg, model):
            optimizer = super().build_optimizer(cfg, model)
            optimizer.theirs = True
            return optimizer

        @classmethod
        def build_lr_scheduler(cls, cfg, optimizer):
            return super().build_lr_scheduler(cfg, optimizer)

    class Trainer(AGVMTrainerMixin, Theirs):
        pass

    options = {
        **MICRO,
        "SOLVER__OPTIMIZER": "ADAMW",
        "SOLVER__WARMUP_METHOD": "exp",
        "SOLVER__WARMUP_ITERS": 4,
        "SOLVER__CLIP_GRADIENTS__ENABLED": True,
        "SOLVER__CLIP_GRADIENTS__CLIP_TYPE": "full_model",
    }
    trainer = train(toy_config(tmp_path, **options), Trainer)
    assert isinstance(trainer.optimizer, torch.optim.AdamW) and trainer.optimizer.theirs
    assert len(trainer.optimizer.param_groups) == len(MODULES)


def test_lars_to_sgd_at_resume_is_named(tmp_path):
    pytest.importorskip("pytorch_optimizer")
    train(toy_config(tmp_path, SOLVER__OPTIMIZER="LARS", **MICRO))
    with pytest.raises(ValueError, match="another optimizer than SGD: it has .*trust_coefficient"):
        train(toy_config(tmp_path, **MICRO), resume=True)


def test_a_projects_detectron2_clipping_is_kept(tmp_path):
    class Theirs(DefaultTrainer):
        build_model = ToyTrainer.__dict__["build_model"]
        build_train_loader = ToyTrainer.__dict__["build_train_loader"]
        build_optimizer = classmethod(lambda cls, cfg, model: d2_build_optimizer(cfg, model))

    class Trainer(AGVMTrainerMixin, Theirs):
        pass

    cfg = toy_config(tmp_path, SOLVER__CLIP_GRADIENTS__ENABLED=True, **MICRO)
    trainer = train(cfg, Trainer)
    assert type(trainer.optimizer).__name__ == "SGDWithGradientClip"
    assert (agvm_hook(trainer).modulator.factors[1:] != 1).all()


def test_what_a_project_adds_to_its_checkpoints_stays(tmp_path):
    class Average:
        def state_dict(self):
            return {"decay": 0.5}

    class Project(ToyTrainer):
        def build_hooks(self):
            self.checkpointer.add_checkpointable("ema", Average())
            return super().build_hooks()

    trainer = Project(toy_config(tmp_path, SOLVER__MAX_ITER=1))
    trainer.train()
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert saved["ema"] == {"decay": 0.5} and "trainer" in saved


def test_the_hook_comes_right_after_the_scheduler(tmp_path):
    kinds = [type(h).__name__ for h in ToyTrainer(toy_config(tmp_path))._hooks]
    assert kinds[kinds.index("LRScheduler") + 1] == "AGVMHook"
    off = ToyTrainer(toy_config(tmp_path, AGVM__ENABLED=False))
    assert "AGVMHook" not in [type(h).__name__ for h in off._hooks]


def test_one_process_without_micro_batches_trains_as_without_agvm(tmp_path, d2_log):
    on = train(toy_config(tmp_path / "on"))
    off = train(toy_config(tmp_path / "off", AGVM__ENABLED=False))
    assert same(weights_of(on), weights_of(off))
    assert d2_log.text.count("at least two gradients") == 1


def test_a_reference_world_size_scales_before_the_checks(tmp_path):
    # A batch of 6 for 2 workers is one of 3 here.
    options = {"SOLVER__REFERENCE_WORLD_SIZE": 2, "SOLVER__IMS_PER_BATCH": 6}
    trainer = ToyTrainer(toy_config(tmp_path, SOLVER__MICRO_BATCH_SIZE=1, **options))
    assert trainer.cfg.SOLVER.IMS_PER_BATCH == 3 and agvm_hook(trainer).agvm.num_units == 3


def test_bad_values_are_named_before_anything_is_built(tmp_path):
    with pytest.raises(ValueError, match="AGVM.MODE"):
        ToyTrainer(toy_config(tmp_path, AGVM__MODE="on"))
    with pytest.raises(ValueError, match="AGVM.ANCHOR: 'neck'"):
        ToyTrainer(toy_config(tmp_path, AGVM__ANCHOR="neck"))


def test_a_model_without_a_backbone_says_what_its_modules_are(tmp_path):
    class Plain(ToyTrainer):
        @classmethod
        def build_model(cls, cfg):
            return nn.Linear(2, 2)

    with pytest.raises(ValueError, match="AGVM.ANCHOR: 'backbone' .*modules are rest"):
        Plain(toy_config(tmp_path))
