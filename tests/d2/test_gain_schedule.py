"""AGVM.SCHEDULE gain: learning rates, end, checkpoints and resume of Detectron2's trainers."""

import copy
import inspect
import json
import math
import os
import re
import shutil
import signal
import textwrap
from types import SimpleNamespace
import pytest
import reference
import torch
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, hooks
from detectron2.solver import LRMultiplier
from detectron2.solver import build_lr_scheduler as d2_build_lr_scheduler
from detectron2.utils.events import EventStorage
from fvcore.common.param_scheduler import LinearParamScheduler
from helpers import ROOT
from toy import ToyDetector, vectors
from toy_d2 import ToyLoader, ToyTrainer, agvm_hook, toy_config, train, weights

from agvm_d2 import AGVMHook, AGVMTrainerMixin, ends_when_done, split_param_groups
from agvm_d2.d2.gain_schedule import TrainingDone
from agvm_d2.d2.micro_batches import MicroBatchTrainer

GAIN = {
    "SOLVER__MICRO_BATCH_SIZE": 2,
    "SOLVER__MAX_ITER": 40,
    "SOLVER__STEPS": (20, 30),
    "SOLVER__WARMUP_ITERS": 6,
    "AGVM__RULE": "gain",
    "AGVM__SCHEDULE": "gain",
    "AGVM__BASE_BATCH_SIZE": 2,
    "AGVM__START_ITER": -1,
}


class Watch(HookBase):
    """The learning rates that each iteration is made with, before the factors."""

    def __init__(self):
        self.lrs, self.progress = [], []

    def before_step(self):
        self.lrs.append(self.trainer.optimizer.param_groups[0]["lr"])

    def after_step(self):
        self.progress.append(agvm_hook(self.trainer).agvm.progress)


def run(folder, resume=False, cls=ToyTrainer, **options):
    trainer = cls(toy_config(folder, **{**GAIN, **options}))
    watch = Watch()
    trainer.register_hooks([watch])
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer, watch


def test_progress_is_the_sum_of_the_smallest_gains(tmp_path):
    # The first step by the reference: K = 4 units of two images, the base batch is one unit.
    class OneStep(ToyTrainer):
        def build_hooks(self):
            return [*super().build_hooks(), hooks.CallbackHook(after_step=check)]

    found = []

    def check(trainer):
        if not found:
            found.append(agvm_hook(trainer).agvm.progress)

    run(tmp_path, cls=OneStep)
    data = next(iter(ToyLoader(8)))
    units = vectors(ToyDetector(), [data[i : i + 2] for i in range(0, 8, 2)])
    gain = min(reference.gain(vectors, 1) for vectors in units.values())
    assert found == pytest.approx([0.5 + 0.5 * gain], rel=1e-5)  # momentum 0.5, from 1


def test_the_schedule_and_the_end_are_those_of_progress(tmp_path):
    trainer, watch = run(tmp_path)
    progress = watch.progress
    assert len(progress) < 40 and progress[-1] >= 40 > progress[-2]
    assert progress[-1] > len(progress) + 5  # or this would say little
    multiplier = trainer.scheduler._multiplier
    for lr, before in zip(watch.lrs, [0.0, *progress]):
        assert lr == 0.05 * multiplier(((before - 1) + 1) / 40)
    assert {0.05, 0.005} < {round(lr, 6) for lr in watch.lrs}
    assert trainer.iter == trainer.max_iter == len(progress)
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    last = {key: value for row in rows for key, value in row.items()}
    assert last["agvm/progress"] <= progress[-1] and last["agvm/gain/model"] > 1
    assert {"agvm/gain/backbone", "agvm/gain/box_head"} <= last.keys()


@pytest.mark.parametrize("name", ["WarmupCosineLR", "WarmupStepWithFixedGammaLR"])
@pytest.mark.parametrize("warmup", ["linear", "constant", "exp"])
def test_every_schedule_of_detectron2(name, warmup, tmp_path):
    options = {"SOLVER__LR_SCHEDULER_NAME": name, "SOLVER__WARMUP_METHOD": warmup}
    trainer, watch = run(tmp_path, SOLVER__MAX_ITER=20, **options)
    assert len(watch.lrs) < 20 and len(set(watch.lrs)) > 3
    stock = toy_config(tmp_path, **{**GAIN, **options, "SOLVER__MAX_ITER": 20})
    scheduler = ToyTrainer.build_lr_scheduler(stock, torch.optim.SGD([torch.zeros(1)], lr=0.05))
    for lr, before in zip(watch.lrs, [0.0, *watch.progress]):
        assert lr == pytest.approx(0.05 * scheduler._multiplier(before / 20), rel=1e-9)


def test_the_last_checkpoint_and_evaluation_are_at_the_true_end(tmp_path):
    evaluated = []

    class Evaluated(ToyTrainer):
        def build_hooks(self):
            def evaluate():
                evaluated.append((self.iter, self.max_iter))
                return {"toy": {"AP": 1.0}}

            return [*super().build_hooks(), hooks.EvalHook(7, evaluate)]

        def train(self):
            return super().train() or "went on behind the loop"

    trainer = Evaluated(toy_config(tmp_path, **GAIN))
    trainer.resume_or_load(resume=False)
    assert trainer.train() == "went on behind the loop"
    end = trainer.iter
    assert evaluated[-1] == (end, end) and [i for i, _ in evaluated[:-1]] == [*range(6, end - 1, 7)]
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert saved["iteration"] == end - 1
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_a_resume_of_what_ended_evaluates_and_trains_nothing(tmp_path):
    trainer, watch = run(tmp_path)
    before = weights(trainer)
    again, watched = run(tmp_path, resume=True)
    assert watched.progress == [] and again.start_iter == len(watch.progress) == again.max_iter
    assert all(torch.equal(before[k], v) for k, v in weights(again).items())


class Continued(ToyTrainer):
    """The toy loader has no place to go back to: give it the one."""

    start = 0

    @classmethod
    def build_train_loader(cls, cfg):
        loader = iter(super().build_train_loader(cfg))
        for _ in range(cls.start):
            next(loader)
        return loader


CLIPPED = {
    "SOLVER__CLIP_GRADIENTS__ENABLED": True,
    "SOLVER__CLIP_GRADIENTS__CLIP_TYPE": "relative",
    "SOLVER__CLIP_GRADIENTS__CLIP_VALUE": 1.01,
}


@pytest.mark.parametrize("options", [{}, {"SOLVER__LR_SCHEDULER_NAME": "WarmupCosineLR"}, CLIPPED])
@pytest.mark.parametrize("k", [1, 4, 9])
def test_a_resumed_run_has_the_same_bits_and_ends_at_the_same_iteration(k, options, tmp_path):
    whole, watch = run(tmp_path / "a", SOLVER__CHECKPOINT_PERIOD=1, **options)
    (tmp_path / "b").mkdir()
    name = f"model_{k:07d}.pth"
    shutil.copy(tmp_path / "a" / name, tmp_path / "b" / name)
    (tmp_path / "b" / "last_checkpoint").write_text(name)
    Continued.start = k + 1
    again, watched = run(tmp_path / "b", True, Continued, **options)
    assert again.start_iter == k + 1 and again.iter == whole.iter
    assert watched.lrs == watch.lrs[k + 1 :] and watched.progress == watch.progress[k + 1 :]
    assert all(torch.equal(v, weights(again)[key]) for key, v in weights(whole).items())


def test_monitor_says_what_progress_would_be_and_changes_nothing(tmp_path):
    options = {**GAIN, "SOLVER__MAX_ITER": 12, "SOLVER__STEPS": (8,), "AGVM__MODE": "monitor"}
    monitor, watch = run(tmp_path / "a", **options)
    off = train(toy_config(tmp_path / "b", **{**options, "AGVM__ENABLED": False}))
    assert all(torch.equal(v, weights(off)[k]) for k, v in weights(monitor).items())
    assert monitor.iter == 12 < watch.progress[-1]


def test_at_the_base_batch_nothing_changes(tmp_path):
    options = {**GAIN, "AGVM__BASE_BATCH_SIZE": 8, "SOLVER__MAX_ITER": 12, "SOLVER__STEPS": (8,)}
    on, watch = run(tmp_path / "a", **options)
    off = train(toy_config(tmp_path / "b", **{**options, "AGVM__ENABLED": False}))
    assert on.iter == 12 == watch.progress[-1]
    assert all(torch.equal(v, weights(off)[k]) for k, v in weights(on).items())


def test_the_eta_is_that_of_progress(tmp_path):
    expected = []

    class Printed(ToyTrainer):
        def build_hooks(self):
            built = super().build_hooks()
            (writer,) = (h for h in built if isinstance(h, hooks.PeriodicWriter))
            printer = writer._writers[0]
            after = hooks.CallbackHook(after_step=lambda t: expected.append(printer._max_iter))
            return [*built, after]

    trainer, watch = run(tmp_path, cls=Printed)
    end = trainer.iter
    gains = [b - a for a, b in zip([0.0, *watch.progress], watch.progress)]
    for i in range(end - 1):
        left = (40 - watch.progress[i]) / gains[i]
        assert expected[i] == i + 1 + math.ceil(left)
    assert expected[-1] == end and abs(expected[end // 2] - end) < abs(40 - end)


def test_two_workers_end_together(workers, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    one, _ = run(folders[0], SOLVER__IMS_PER_BATCH=8, SOLVER__MICRO_BATCH_SIZE=4)
    ends = workers(2).run(end_of_run, folders[1])
    assert ends[0] == ends[1]
    assert ends[0][0] == one.iter  # the same units
    saved = torch.load(folders[1] / "model_final.pth", weights_only=True)
    assert saved["iteration"] == one.iter - 1


def end_of_run(folder):
    trainer, watch = run(folder, SOLVER__MICRO_BATCH_SIZE=0)
    return trainer.iter, watch.progress


def test_another_number_of_workers_goes_on_with_progress(workers, tmp_path):
    _, watch = run(tmp_path, SOLVER__MICRO_BATCH_SIZE=4, SOLVER__CHECKPOINT_PERIOD=5)
    (tmp_path / "last_checkpoint").write_text("model_0000004.pth")
    start, progress = workers(2).run(resumed, tmp_path)[0]
    assert start == 5 and progress[0] > watch.progress[4]
    assert progress[-1] >= 40 > progress[-2]


def resumed(folder):
    trainer, watch = run(folder, True, SOLVER__MICRO_BATCH_SIZE=0)
    return trainer.start_iter, watch.progress


# Resumes with other keys


def half(folder, **options):
    """A checkpoint after 5 iterations, and their progress."""
    _, watch = run(folder, SOLVER__CHECKPOINT_PERIOD=5, **options)
    (folder / "last_checkpoint").write_text("model_0000004.pth")
    return watch.progress[4]


@pytest.mark.parametrize("options", [{"AGVM__SCHEDULE": "iterations"}, {"AGVM__MODE": "monitor"}])
def test_a_schedule_that_is_iterations_again_counts_them(options, tmp_path):
    assert half(tmp_path) > 6
    trainer, watch = run(tmp_path, True, **options)
    assert trainer.iter == 40 and len(watch.lrs) == 35
    stock = [0.05 * trainer.scheduler._multiplier(i / 40) for i in range(5, 40)]
    assert watch.lrs == pytest.approx(stock)


@pytest.mark.parametrize(
    "options",
    [
        {"AGVM__MODE": "monitor"},
        {"AGVM__RULE": "variance", "AGVM__SCHEDULE": "iterations", "AGVM__START_ITER": 0},
    ],
)
def test_steps_without_the_gains_learning_rates_have_counted_one(options, tmp_path):
    assert half(tmp_path, **options) > 5.5  # what it could have been
    _, watch = run(tmp_path, True)
    assert 6 <= watch.progress[0] < 10 and watch.progress[-1] >= 40
    assert watch.lrs[0] == pytest.approx(0.05 * (1 / 6 * 0.001 + 5 / 6))  # warm-up at 5 of 6


def test_a_finished_run_and_a_smaller_max_iter(tmp_path):
    first, _ = run(tmp_path)
    trainer, watch = run(tmp_path, True, SOLVER__MAX_ITER=30, SOLVER__STEPS=(20,))
    assert watch.progress == [] and trainer.iter == first.iter


# Iterations that take no step, or several


def with_steps(steps_of):
    """A trainer whose optimizer takes `steps_of(iteration)` steps when it is asked for one."""

    class Steps(ToyTrainer):
        def build_hooks(self):
            step = self.optimizer.step  # with torch's hooks

            def several():
                for _ in range(steps_of(self.iter)):
                    step()

            self.optimizer.step = several
            return super().build_hooks()

    return Steps


@pytest.mark.parametrize("steps_of", [lambda i: i % 2, lambda i: 2], ids=["every second", "two"])
def test_at_the_base_batch_an_iteration_is_one_whatever_steps_it_takes(steps_of, tmp_path):
    options = {"AGVM__BASE_BATCH_SIZE": 8}
    trainer, watch = run(tmp_path, cls=with_steps(steps_of), **options)
    assert watch.progress == list(range(1, 41)) and trainer.iter == 40
    assert watch.lrs == [0.05 * trainer.scheduler._multiplier(i / 40) for i in range(40)]


def test_a_resume_after_an_iteration_without_a_step_has_the_same_bits(tmp_path):
    options = {"SOLVER__LR_SCHEDULER_NAME": "WarmupCosineLR", "SOLVER__CHECKPOINT_PERIOD": 1}
    cls = with_steps(lambda i: i not in (3, 4))  # as a GradScaler skips
    whole, watch = run(tmp_path / "a", cls=cls, **options)
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "model_0000004.pth", tmp_path / "b")
    (tmp_path / "b" / "last_checkpoint").write_text("model_0000004.pth")

    class Resumed(cls, Continued):
        start = 5

    again, watched = run(tmp_path / "b", True, Resumed, **options)
    assert watched.lrs == watch.lrs[5:] and watched.progress == watch.progress[5:]
    assert all(torch.equal(v, weights(again)[key]) for key, v in weights(whole).items())


def test_no_step_in_the_last_iteration(tmp_path):
    end = run(tmp_path / "a")[0].iter
    trainer, watch = run(tmp_path / "b", cls=with_steps(lambda i: i != end - 1))
    assert end <= trainer.iter <= end + 1 and watch.progress[-1] >= 40


def test_a_step_that_is_left_out_for_a_nan_counts_one(tmp_path):
    class Poisoned(ToyLoader):
        def __iter__(self):
            for i, data in enumerate(super().__iter__()):
                if i in (6, 7):
                    data[0]["image"] *= math.nan
                yield data

    class Skipping(ToyTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return Poisoned(cfg.SOLVER.IMS_PER_BATCH)

    _, watch = run(tmp_path, cls=Skipping, SOLVER__ON_NONFINITE="skip")
    made = [b - a for a, b in zip(watch.progress, watch.progress[1:])]
    assert made[5:7] == pytest.approx([1, 1]) and made[4] > 1.1 < made[7]


def test_behind_stop_iter_the_eta_counts_one_for_each(tmp_path):
    trainer, watch = run(tmp_path, AGVM__STOP_ITER=5)
    assert watch.progress[-1] - watch.progress[4] == pytest.approx(trainer.iter - 5)
    assert agvm_hook(trainer).agvm.gain == 1


# Signals


def test_a_signal_in_the_last_iteration_saves_nothing_twice(tmp_path):
    end = run(tmp_path / "a")[0].iter

    class Signalled(ToyTrainer):
        def build_hooks(self):
            def signal_in_the_last(trainer):
                if trainer.iter == end - 1:
                    os.kill(os.getpid(), signal.SIGUSR1)

            return [*super().build_hooks(), hooks.CallbackHook(after_step=signal_in_the_last)]

    with pytest.raises(SystemExit) as left:
        run(tmp_path / "b", cls=Signalled)
    assert left.value.code == 75
    assert [path.name for path in (tmp_path / "b").glob("*.pth")] == ["model_final.pth"]
    again, watched = run(tmp_path / "b", True)
    assert watched.progress == [] and again.iter == end


# Trainers without the mixin


BY_GAIN = {"rule": "gain", "schedule": "gain", "base_batch_size": 2, "momentum": 0.5}


def simple(
    tmp_path,
    order=("lr", "agvm", "save"),
    scheduler=None,
    max_iter=40,
    gain=BY_GAIN,
    split=True,
):
    model = ToyDetector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    if split:
        split_param_groups(optimizer, model)
    if inspect.isfunction(scheduler):
        scheduler = scheduler(optimizer)
    trainer = MicroBatchTrainer(model, ToyLoader(8), optimizer, 2)
    if not split:
        hook = SimpleNamespace(agvm=None)
    else:
        hook = AGVMHook(model, optimizer, micro_batches=4, batch_size=8, interval=2, **gain)
    made = {
        "lr": hooks.LRScheduler(scheduler=scheduler or LinearParamScheduler(1, 0.1)),
        "agvm": hook,
        "save": hooks.EvalHook(0, lambda: {}),
    }
    trainer.register_hooks([made[name] for name in order])
    return trainer, hook.agvm, max_iter


def test_a_simple_trainer(tmp_path):
    trainer, agvm, max_iter = simple(tmp_path, ("lr", "agvm"))
    with ends_when_done():
        trainer.train(0, max_iter)
    assert agvm.progress >= 40 and trainer.iter == trainer.max_iter < 40
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.005, rel=1e-3)

    first = trainer.iter
    with ends_when_done():  # once more, from the weights that there are
        trainer.train(0, max_iter)
    assert trainer.iter == trainer.max_iter > first // 2 and agvm.follows

    trainer, agvm, max_iter = simple(tmp_path)
    with pytest.raises(TrainingDone, match="Call it within .*ends_when_done"):  # never unseen
        trainer.train(0, max_iter)
    assert SimpleTrainer.train is DefaultTrainer.__mro__[1].train  # as it was


def test_a_second_training_is_as_long_as_it_is_told_where_the_gain_is_one(tmp_path):
    trainer, agvm, _ = simple(tmp_path, ("lr", "agvm"))
    agvm.modulator.start_iter = 1000  # every step counts 1
    for _ in range(2):
        with ends_when_done():
            trainer.train(0, 5)
        assert trainer.iter == 5 and agvm.progress == 5


def multiplier(optimizer):
    """A scheduler that is there before the training, and so is loaded."""
    return LRMultiplier(optimizer, LinearParamScheduler(1, 0.1), 40)


def saved_at(trainer, iteration):
    """Filled with the trainer's state after this iteration."""
    kept = {}

    def keep(trainer):
        if trainer.iter == iteration:
            kept.update(copy.deepcopy(trainer.state_dict()))

    trainer.register_hooks([hooks.CallbackHook(after_step=keep)])
    return kept


def resumed_by_iterations(tmp_path, state):
    """Iterations 10 to 40 by the hook, from a trainer's state; see their rates fall linearly."""
    again, _, max_iter = simple(tmp_path, ("lr", "agvm"), multiplier, gain={})
    again.load_state_dict(state)
    watch = Watch()
    watch.after_step = lambda: None
    again.register_hooks([watch])
    again.train(10, max_iter)
    assert watch.lrs == pytest.approx([0.05 * (1 - 0.9 * i / 40) for i in range(10, 40)])
    return again


def test_a_resume_through_the_hook_counts_iterations_again(tmp_path):
    trainer, _, max_iter = simple(tmp_path, ("lr", "agvm"), multiplier)
    state = saved_at(trainer, 9)
    with ends_when_done():
        trainer.train(0, max_iter)
    resumed_by_iterations(tmp_path, state)


def test_the_hook_takes_a_checkpoint_without_agvm(tmp_path):
    stock, _, max_iter = simple(tmp_path, ("lr",), multiplier, split=False)
    state = saved_at(stock, 9)
    stock.train(0, max_iter)
    again = resumed_by_iterations(tmp_path, state)
    rates = {group["lr"] for group in again.optimizer.param_groups}
    assert len(again.optimizer.param_groups) == 4 and len(rates) == 1


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md"])
def test_the_hook_of_the_pages(page, tmp_path):
    with open(os.path.join(ROOT, page)) as f:
        blocks = re.findall(r"^( *)```python\n(.*?)^ *```", f.read(), flags=re.M | re.S)
    (code,) = [textwrap.dedent(code) for _, code in blocks if "AGVMHook(" in code]
    sizes = "base_batch_size=2, batch_size=8, micro_batches=4"  # of one worker
    assert "base_batch_size=16, batch_size=128)" in code
    trainer, _, max_iter = simple(tmp_path, ())
    optimizer = trainer.optimizer

    def linear(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - 0.9 * i / max_iter)

    space = {"model": trainer.model, "optimizer": optimizer, "your_lr_scheduler": linear}
    space |= {"trainer": trainer, "max_iter": max_iter}
    exec(code.replace("base_batch_size=16, batch_size=128", sizes), space)
    assert space["agvm"].agvm.progress >= 40 and trainer.iter < 40
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005, rel=1e-3)


class OwnLoop(DefaultTrainer):
    """As in forks of Detectron2."""

    build_model = ToyTrainer.build_model
    build_train_loader = ToyTrainer.build_train_loader

    def train(self):
        self.iter = self.start_iter
        with EventStorage(0) as self.storage:
            try:
                self.iterations()
            finally:
                self.after_train()

    def iterations(self):
        self.before_train()
        for i in range(self.start_iter, self.max_iter):
            self.iter = i
            self.before_step()
            self.run_step()
            self.after_step()


class OwnLoopAndEnd(OwnLoop):
    """As AdelaiDet's: what comes after training does not come after an exception."""

    def train(self):
        self.iter = self.start_iter
        with EventStorage(0) as self.storage:
            self.iterations()
            self.after_train()
        return self._last_eval_results


@pytest.mark.parametrize("loop", [OwnLoop, OwnLoopAndEnd])
def test_a_loop_of_the_projects_own(loop, tmp_path, d2_log):
    end = run(tmp_path / "a")[0].iter
    tested, results = [], []

    class Mixed(AGVMTrainerMixin, loop):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            tested.append(True)
            return {"bbox": {"AP": 7.0}}

        def train(self):
            results.append(super().train())

    d2_log.clear()
    trainer = run(tmp_path / "b", cls=Mixed)[0]
    assert trainer.iter == end and (tmp_path / "b" / "model_final.pth").exists()
    assert d2_log.text.count(f"AGVM: training ends after {end} iterations") == 1
    assert results == [{"bbox": {"AP": 7.0}}] and len(tested) == 1


# What cannot be


@pytest.mark.parametrize(
    "options, message",
    [
        ({"AGVM__RULE": "variance"}, "AGVM.SCHEDULE: found 'gain', but AGVM.RULE is 'variance'"),
        ({"SOLVER__MICRO_BATCH_SIZE": 0}, "AGVM.SCHEDULE gain: .* at least two gradients"),
        ({"AGVM__BASE_BATCH_SIZE": 16}, "8 images is below AGVM.BASE_BATCH_SIZE, 16"),
        ({"AGVM__START_ITER": 40}, "AGVM.START_ITER is 40, but training has 40 iterations"),
        ({"AGVM__SCHEDULE": "epochs"}, "AGVM.SCHEDULE: found 'epochs'"),
    ],
)
def test_bad_configs(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **options)
    assert not list(tmp_path.glob("*.pth"))


class OwnScheduler(ToyTrainer):
    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [20, 30])


def test_a_scheduler_that_cannot_follow(tmp_path):
    with pytest.raises(ValueError, match="AGVM.SCHEDULE gain: the LR scheduler MultiStepLR"):
        run(tmp_path, cls=OwnScheduler)


class StockScheduler(ToyTrainer):
    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return d2_build_lr_scheduler(cfg, optimizer)


def test_detectron2s_own_scheduler_can(tmp_path):
    ours, _ = run(tmp_path / "a")
    theirs, _ = run(tmp_path / "b", cls=StockScheduler)
    assert ours.iter == theirs.iter < 40


def test_hooks_in_an_order_that_cannot_end(tmp_path):
    trainer, _, max_iter = simple(tmp_path, ("lr", "save", "agvm"))
    with pytest.raises(ValueError, match="AGVMHook is registered after EvalHook"):
        trainer.train(0, max_iter)
    trainer, _, max_iter = simple(tmp_path, ("agvm", "save"))
    with pytest.raises(ValueError, match="has no hooks.LRScheduler"):
        trainer.train(0, max_iter)


def test_a_checkpoint_that_does_not_know_its_progress(tmp_path):
    off = {**GAIN, "AGVM__ENABLED": False, "SOLVER__CHECKPOINT_PERIOD": 5}
    train(toy_config(tmp_path, **{**off, "SOLVER__MAX_ITER": 5, "SOLVER__STEPS": ()}))
    with pytest.raises(ValueError, match="does not say how many iterations of the base batch"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize("mode", ["modulate", "monitor"])
def test_scaling_by_world_size_leaves_what_the_gain_scales(mode, tmp_path):
    cfg = toy_config(tmp_path, **{**GAIN, "SOLVER__REFERENCE_WORLD_SIZE": 2, "AGVM__MODE": mode})
    new = ToyTrainer.auto_scale_workers(cfg, 8)
    assert new.SOLVER.IMS_PER_BATCH == 32 and new.SOLVER.REFERENCE_WORLD_SIZE == 8
    kept = {"BASE_LR": 0.05, "MAX_ITER": 40, "WARMUP_ITERS": 6, "STEPS": (20, 30)}
    assert all(new.SOLVER[key] == value for key, value in kept.items()) == (mode == "modulate")
    assert cfg.SOLVER.IMS_PER_BATCH == 8


def test_the_log_has_progress(tmp_path, d2_log):
    run(tmp_path, SOLVER__MAX_ITER=100)
    assert re.search(
        r"AGVM: variance and LR factor .*  progress \d+ of 100, x[1-4]\.\d\d", d2_log.text
    )
