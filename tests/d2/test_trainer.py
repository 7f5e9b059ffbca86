"""AGVMTrainer and AGVMTrainerMixin on the toy detector, in one process."""

import json
import shutil
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import build
from detectron2.engine import DefaultTrainer, TrainerBase, hooks
from detectron2.solver import build_optimizer as d2_build_optimizer
from detectron2.utils.events import EventStorage
from torch import nn
from toy import MODULES
from toy_d2 import ToyLoader, ToyTrainer, agvm_hook, toy_config, train, weights

from agvm_d2 import AGVMTrainer, AGVMTrainerMixin
from agvm_d2.d2.checkpoint import AtomicCheckpointer
from agvm_d2.d2.loader import IterationSeeder, ResumableLoader
from agvm_d2.solver import prepare_optimizer

MICRO = {"SOLVER__MICRO_BATCH_SIZE": 2}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


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
    assert same(weights(off), weights(monitor))
    assert (agvm_hook(monitor).modulator.factors[1:] != 1).all()
    on = train(toy_config(tmp_path / "on", **options))
    assert not same(weights(off), weights(on))


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
    assert same(weights(straight), weights(trainer))
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
    assert trainer.scheduler.get_last_lr() == [g["lr"] for g in trainer.optimizer.param_groups]
    trainer.train()
    lrs = {round(g["lr"], 7) for g in trainer.optimizer.param_groups}
    assert lrs == {round(g["lr"], 7) for g in stock.optimizer.param_groups} == {0.005, 0.01}
    pairs = zip(weights(stock).values(), weights(trainer).values(), strict=True)
    # One batch against micro-batches: not the bits.
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in pairs) == (mode == "monitor")


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


def test_lars_to_sgd_at_resume_is_named(tmp_path):
    pytest.importorskip("pytorch_optimizer")
    train(toy_config(tmp_path, SOLVER__OPTIMIZER="LARS", **MICRO))
    with pytest.raises(ValueError, match="another optimizer than SGD: it has .*trust_coefficient"):
        train(toy_config(tmp_path, **MICRO), resume=True)


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
    assert same(weights(mixed), weights(ours))
    assert (agvm_hook(mixed).modulator.factors[1:] != 1).all()


def test_the_mixin_behind_the_trainer_is_refused():
    with pytest.raises(TypeError, match=r"class Trainer\(AGVMTrainerMixin, DefaultTrainer\)"):

        class Trainer(DefaultTrainer, AGVMTrainerMixin):
            pass

    class Part(AGVMTrainerMixin):  # itself to be mixed in
        pass

    class Whole(Part, DefaultTrainer):
        pass


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


def test_a_projects_detectron2_clipping_is_kept(tmp_path):
    class Theirs(DefaultTrainer):
        build_model = ToyTrainer.__dict__["build_model"]
        build_train_loader = ToyTrainer.__dict__["build_train_loader"]
        build_optimizer = classmethod(lambda cls, cfg, model: d2_build_optimizer(cfg, model))

    class Trainer(AGVMTrainerMixin, Theirs):
        pass

    cfg = toy_config(tmp_path / "a", SOLVER__CLIP_GRADIENTS__ENABLED=True, **MICRO)
    trainer = train(cfg, Trainer)
    assert type(trainer.optimizer).__name__ == "SGDWithGradientClip"
    assert (agvm_hook(trainer).modulator.factors[1:] != 1).all()
    # Which Detectron2's does not know.
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "relative"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 4.0
    cfg.OUTPUT_DIR = str(tmp_path / "b")
    trainer = train(cfg, Trainer)
    assert type(trainer.optimizer) is torch.optim.SGD
    assert trainer.optimizer.param_groups[0]["average_norm_2"][1] == trainer.iter
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1e-9  # nothing moves
    cfg.SOLVER.WEIGHT_DECAY = 0.0
    cfg.OUTPUT_DIR = str(tmp_path / "c")
    trainer = Trainer(cfg)
    before = weights(trainer)
    trainer.train()
    assert all(torch.allclose(before[k], v, atol=1e-7) for k, v in weights(trainer).items())


def test_a_copy_of_detectron2s_trainer_is_refused():
    """As few-shot-object-detection's."""
    copy = type("DefaultTrainer", (TrainerBase,), {})
    with pytest.raises(TypeError, match=r"class Mixed: .*DefaultTrainer is a copy of Detectron2.s"):

        class Mixed(AGVMTrainerMixin, copy):
            pass


# Built


def of_periodic_hooks(trainer, built=()):
    found = [h for h in built or trainer._hooks if isinstance(h, hooks.PeriodicCheckpointer)]
    return [h.checkpointer for h in found]


def test_the_stock_checkpointer_gives_way_to_one_that_is_never_half_written(tmp_path):
    trainer = ToyTrainer(toy_config(tmp_path))
    assert type(trainer.checkpointer) is AtomicCheckpointer
    assert trainer.checkpointer.save_to_disk and trainer.checkpointer.save_dir == str(tmp_path)
    assert of_periodic_hooks(trainer) == [trainer.checkpointer]


def test_projects_keep_their_checkpointer(tmp_path):
    class Theirs(DetectionCheckpointer):
        pass

    class Project(ToyTrainer):
        def build_hooks(self):
            self.checkpointer = Theirs(self.model, self.cfg.OUTPUT_DIR, trainer=self)
            return super().build_hooks()

    trainer = Project(toy_config(tmp_path))
    assert type(trainer.checkpointer) is Theirs
    assert of_periodic_hooks(trainer) == [trainer.checkpointer]


def test_the_hook_comes_right_after_the_scheduler(tmp_path):
    kinds = [type(h).__name__ for h in ToyTrainer(toy_config(tmp_path))._hooks]
    assert kinds[kinds.index("LRScheduler") + 1] == "AGVMHook"
    # The seeder before any other hook draws random numbers; those before it draw none.
    assert kinds[:4] == ["PreemptionHook", "AgreementHook", "ConfigRecord", "IterationSeeder"]
    off = ToyTrainer(toy_config(tmp_path, AGVM__ENABLED=False))
    assert "AGVMHook" not in [type(h).__name__ for h in off._hooks]


def test_one_process_without_micro_batches_trains_as_without_agvm(tmp_path, d2_log):
    on = train(toy_config(tmp_path / "on"))
    off = train(toy_config(tmp_path / "off", AGVM__ENABLED=False))
    assert same(weights(on), weights(off))
    assert d2_log.text.count("at least two gradients") == 1


def test_a_reference_world_size_scales_before_the_checks(tmp_path):
    # A batch of 6 for 2 workers is one of 3 here.
    options = {"SOLVER__REFERENCE_WORLD_SIZE": 2, "SOLVER__IMS_PER_BATCH": 6}
    trainer = ToyTrainer(toy_config(tmp_path, SOLVER__MICRO_BATCH_SIZE=1, **options))
    assert trainer.cfg.SOLVER.IMS_PER_BATCH == 3 and agvm_hook(trainer).agvm.num_units == 3


@pytest.mark.parametrize("frozen", [False, True])
def test_a_reference_world_size_scales_every_key_that_counts_iterations(tmp_path, frozen):
    """Eight times the workers: an eighth of the iterations. How often to measure stays."""
    options = {
        "SOLVER__MAX_ITER": 9000, "SOLVER__WARMUP_ITERS": 480, "SOLVER__STEPS": (6000, 8000),
        "SOLVER__IMS_PER_BATCH": 64, "SOLVER__CLIP_GRADIENTS__ITER_RANGE": (400, 600),
        "AGVM__START_ITER": 600, "AGVM__STOP_ITER": 8000, "AGVM__INTERVAL": 10,
    }  # fmt: skip
    cfg = toy_config(tmp_path, SOLVER__REFERENCE_WORLD_SIZE=8, **options)
    if frozen:
        cfg.freeze()
    new = ToyTrainer.auto_scale_workers(cfg, 64)
    assert (new.SOLVER.MAX_ITER, new.SOLVER.WARMUP_ITERS) == (1125, 60)
    assert (new.AGVM.START_ITER, new.AGVM.STOP_ITER, new.AGVM.INTERVAL) == (75, 1000, 10)
    assert tuple(new.SOLVER.CLIP_GRADIENTS.ITER_RANGE) == (50, 75)
    assert new.is_frozen() == frozen
    cfg = toy_config(tmp_path, SOLVER__REFERENCE_WORLD_SIZE=8)  # -1: never, and always
    new = ToyTrainer.auto_scale_workers(cfg, 64)
    assert new.AGVM.STOP_ITER == -1 and new.SOLVER.CLIP_GRADIENTS.ITER_RANGE == ()
    assert ToyTrainer.auto_scale_workers(toy_config(tmp_path), 64).AGVM.START_ITER == 2  # off


# Projects that build more of it themselves


class OwnOptimizerName(ToyTrainer):
    """As Panoptic-DeepLab's."""

    @classmethod
    def build_optimizer(cls, cfg, model):
        assert cfg.SOLVER.OPTIMIZER == "ADAM" and cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE == "agc"
        return prepare_optimizer(cfg, torch.optim.Adam(model.parameters(), 1e-3), model)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        assert cfg.SOLVER.WARMUP_METHOD == "burnin"
        return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def test_a_project_may_name_what_it_builds_itself(tmp_path):
    names = {"OPTIMIZER": "ADAM", "WARMUP_METHOD": "burnin", "CLIP_GRADIENTS__CLIP_TYPE": "agc"}
    options = {f"SOLVER__{key}": value for key, value in names.items()}
    options["SOLVER__CLIP_GRADIENTS__CLIP_VALUE"] = 0.0
    trainer = train(toy_config(tmp_path, **MICRO, **options), OwnOptimizerName)
    assert (agvm_hook(trainer).modulator.factors[1:] != 1).all()


def test_a_scheduler_with_a_rule_for_each_group_is_told_of_the_split(tmp_path):
    class Theirs(StockToyTrainer):
        @classmethod
        def build_lr_scheduler(cls, cfg, optimizer):
            return torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0])

    class Project(AGVMTrainerMixin, Theirs):
        pass

    with pytest.raises(ValueError, match="Expected 4 lr_lambdas.*split .*, into 4 param groups"):
        Project(toy_config(tmp_path))
    Project(toy_config(tmp_path, AGVM__ENABLED=False))  # one group


class OwnRunStep(ToyTrainer):
    """As unbiased-teacher's."""

    def run_step(self):
        self._trainer.iter = self.iter
        loss = sum(self.model(next(self._trainer._data_loader_iter)).values())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


@pytest.mark.parametrize("enabled", [True, False])
def test_a_run_step_that_does_not_know_micro_batches_is_refused(tmp_path, enabled):
    with pytest.raises(ValueError, match=r"MICRO_BATCH_SIZE: .*OwnRunStep.run_step"):
        OwnRunStep(toy_config(tmp_path, AGVM__ENABLED=enabled, **MICRO))
    train(toy_config(tmp_path, AGVM__ENABLED=enabled), OwnRunStep)


class OwnTrain(DefaultTrainer):
    """As Unbiased Teacher's, whose step has another name."""

    build_model = ToyTrainer.__dict__["build_model"]
    build_train_loader = ToyTrainer.__dict__["build_train_loader"]
    their_step = OwnRunStep.run_step

    def train(self):
        with EventStorage(0) as self.storage:
            self.before_train()
            for i in range(self.max_iter):
                self.iter = i
                self.before_step()
                self.their_step()
                self.after_step()
            self.after_train()


class MixedOwnTrain(AGVMTrainerMixin, OwnTrain):
    pass


def test_a_loop_that_does_not_know_micro_batches_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"MICRO_BATCH_SIZE: .* OwnTrain.train makes"):
        train(toy_config(tmp_path / "a", AGVM__ENABLED=False, **MICRO), MixedOwnTrain)
    train(
        toy_config(tmp_path / "b", AGVM__ENABLED=False, SOLVER__ON_NONFINITE="skip"), MixedOwnTrain
    )


class OwnCheckpoints(ToyTrainer):
    """As AdelaiDet's: a checkpointer of optimizer and scheduler, without the trainer."""

    def build_hooks(self):
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler}
        self.checkpointer = DetectionCheckpointer(self.model, self.cfg.OUTPUT_DIR, **parts)
        built = super().build_hooks()
        assert of_periodic_hooks(self, built) == [self.checkpointer]
        return built

    def resume_or_load(self, resume=True):
        data = self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = data.get("iteration", -1) + 1


def test_a_checkpointer_without_the_trainer_gets_agvms_state(tmp_path):
    options = {**MICRO, "SOLVER__MAX_ITER": 6, "SEED": 7}
    first = train(toy_config(tmp_path, **options), OwnCheckpoints)
    again = OwnCheckpoints(toy_config(tmp_path, **{**options, "SOLVER__MAX_ITER": 9, "SEED": 8}))
    again.resume_or_load(resume=True)
    assert again.start_iter == 6
    old, new = agvm_hook(first).modulator, agvm_hook(again).modulator
    assert torch.equal(new.factors, old.factors) and (new.factors[1:] != 1).all()
    seeder = next(h for h in again._hooks if isinstance(h, IterationSeeder))
    assert seeder.state_dict()["seed"] == 7


def test_such_a_checkpointer_goes_on_with_other_groups(tmp_path):
    options = {**MICRO, "SOLVER__MAX_ITER": 6}
    train(toy_config(tmp_path, **options), OwnCheckpoints)
    more = {**options, "SOLVER__MAX_ITER": 9, "SOLVER__BIAS_LR_FACTOR": 2.0}
    again = OwnCheckpoints(toy_config(tmp_path, **more))
    again.resume_or_load(resume=True)
    again.train()
    assert again.iter == 9 and len({g["lr"] for g in again.optimizer.param_groups}) == 2


def test_bad_values_are_named_before_anything_is_built(tmp_path):
    class Never(ToyTrainer):
        @classmethod
        def build_model(cls, cfg):
            pytest.fail("built")

    with pytest.raises(ValueError, match="AGVM.MODE"):
        Never(toy_config(tmp_path, AGVM__MODE="on"))


def test_the_loader_is_this_packages_and_detectron2s_is_put_back(tmp_path, monkeypatch):
    theirs = build.build_batch_data_loader
    dicts = [{"file_name": "a.png", "width": 2, "height": 2, "annotations": []}]
    monkeypatch.setattr(build, "get_detection_dataset_dicts", lambda *args, **kwargs: dicts)
    loader = AGVMTrainer.build_train_loader(toy_config(tmp_path, DATASETS__TRAIN=("some",)))
    assert isinstance(loader, ResumableLoader) and build.build_batch_data_loader is theirs


def test_a_loader_of_the_projects_own_is_said_at_the_start(tmp_path, d2_log):
    trainer = ToyTrainer(toy_config(tmp_path))
    said = "The training loader is the project's own (ToyLoader): a resumed run will read"
    assert d2_log.text.count(said) == 1
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert d2_log.text.count("new order") == 1
    with pytest.raises(ValueError, match="^DATALOADER.ON_BAD_IMAGE: found 'skip', .*ToyLoader"):
        ToyTrainer(toy_config(tmp_path, DATALOADER__ON_BAD_IMAGE="skip"))


@pytest.mark.parametrize("enabled", [True, False])
def test_with_agvm_off_a_project_with_its_own_loader_draws_its_own_numbers(tmp_path, enabled):
    trainer = ToyTrainer(toy_config(tmp_path, AGVM__ENABLED=enabled, **MICRO))
    assert any(isinstance(h, IterationSeeder) for h in trainer._hooks) == enabled
    assert len(trainer.optimizer.param_groups) == (4 if enabled else 1)


def test_an_anchor_that_the_model_lacks_is_named(tmp_path):
    with pytest.raises(ValueError, match="AGVM.ANCHOR: 'neck'"):
        ToyTrainer(toy_config(tmp_path, AGVM__ANCHOR="neck"))


def test_a_model_without_a_backbone_says_what_its_modules_are(tmp_path):
    class Plain(ToyTrainer):
        @classmethod
        def build_model(cls, cfg):
            return nn.Linear(2, 2)

    with pytest.raises(ValueError, match="AGVM.ANCHOR: 'backbone' .*modules are rest"):
        Plain(toy_config(tmp_path))
