"""AGVMHook's events, without a trainer."""

import math
import re
from types import SimpleNamespace
import bad_values
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import HookBase, TrainerBase
from detectron2.solver import LRMultiplier
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils.events import EventStorage
from fvcore.common.param_scheduler import LinearParamScheduler
from toy import MODULES, ToyDetector, batch, factors, loss
from toy_d2 import toy_config

from agvm_d2 import AGVMHook, split_param_groups
from agvm_d2.d2.hook import noise_summary
from agvm_d2.modules import assign_modules, module_table


def sgd(model, lr=0.1, **kwargs):
    return split_param_groups(torch.optim.SGD(model.parameters(), lr=lr, **kwargs), model)


def make_hook(model, optimizer, **kwargs):
    options = {"micro_batches": 2, "momentum": 0.5, "interval": 1, **kwargs}
    hook = AGVMHook(model, optimizer, **options)
    hook.before_train()
    return hook


def units(iteration):
    return [batch(4, seed=10 * iteration + half) for half in (0, 1)]


def step(hook, model, optimizer, iteration=0):
    """One iteration of a plain loop with two micro-batches."""
    hook.before_step()
    optimizer.zero_grad()
    for unit in units(iteration):
        (loss(model, unit) / 2).backward()
        hook.after_micro_batch(0.5)
    hook.after_backward()
    optimizer.step()
    hook.after_step()


def run(model, optimizer, steps=3, **kwargs):
    """Train; the hook and what the reference says its factors are."""
    hook, wanted = make_hook(model, optimizer, **kwargs), dict.fromkeys(MODULES, 1.0)
    with EventStorage(0) as storage:
        for i in range(steps):
            if hook.modulator.due(i):
                wanted = factors(model, units(i), wanted)
            step(hook, model, optimizer, i)
            storage.step()
    return hook, list(wanted.values())


def test_a_detectron2_without_the_event_is_refused(monkeypatch):
    """Release 0.6 has no `after_backward`."""
    monkeypatch.delattr(HookBase, "after_backward")
    model = ToyDetector()
    message = r"Detectron2 in '.*detectron2' .version .* has no HookBase.after_backward.*: pip inst"
    with pytest.raises(ImportError, match=message):
        AGVMHook(model, sgd(model))


def test_a_loop_without_a_trainer_counts_by_its_event_storage():
    model = ToyDetector()
    hook, wanted = run(model, sgd(model), steps=4, interval=2, start_iter=1)
    assert hook.modulator.factors.tolist() == pytest.approx(wanted, rel=1e-5) != [1.0] * 4


def clipped_sgd(model, built_before: bool, per_class: bool):
    """Detectron2's clipping subclass, with and without a plain SGD built earlier."""
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1e9
    if built_before:
        torch.optim.SGD(ToyDetector().parameters(), lr=1.0)
    if per_class:
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.SGD)(model.parameters(), lr=0.1)
    else:
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.SGD(model.parameters(), lr=0.1))
    return split_param_groups(optimizer, model)


@pytest.mark.parametrize("built_before", [False, True])
@pytest.mark.parametrize("per_class", [False, True])
def test_a_step_pre_hook_that_fires_twice_scales_once(built_before, per_class):
    plain, clipped = ToyDetector(), ToyDetector()
    optimizer = clipped_sgd(clipped, built_before, per_class)
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append(1))
    _, wanted = run(plain, sgd(plain))
    hook, _ = run(clipped, optimizer)
    if built_before and per_class:
        assert len(fired) == 6  # the trap: twice in each of three steps
    assert hook.modulator.factors.tolist() == pytest.approx(wanted, rel=1e-5)
    for a, b in zip(plain.parameters(), clipped.parameters()):
        torch.testing.assert_close(a, b)
    assert {g["lr"] for g in optimizer.param_groups} == {0.1}


def test_the_scheduler_never_sees_the_factors():
    model = ToyDetector()
    optimizer = sgd(model, lr=1.0)
    schedule = LRMultiplier(optimizer, LinearParamScheduler(1.0, 0.5), max_iter=10)
    hook = make_hook(model, optimizer)
    with EventStorage(0) as storage:
        for i in range(5):
            step(hook, model, optimizer, i)
            schedule.step()
            storage.step()
    assert {g["lr"] for g in optimizer.param_groups} == {1.0 * (1 - 0.5 * 5 / 10)}
    assert schedule.base_lrs == [1.0] * 4


def test_after_train_puts_the_lr_back_where_a_step_raised():
    model = ToyDetector()
    optimizer = sgd(model, lr=0.1)
    hook = make_hook(model, optimizer)
    optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with EventStorage(0):
        with pytest.raises(ZeroDivisionError):
            step(hook, model, optimizer)
        assert len({g["lr"] for g in optimizer.param_groups}) > 1
        hook.after_train()  # TrainerBase calls it in `finally`
    assert {g["lr"] for g in optimizer.param_groups} == {0.1}


def test_scalars_and_the_line_in_the_log(d2_log):
    model = ToyDetector()
    optimizer = sgd(model)
    hook = make_hook(model, optimizer, batch_size=8, log_period=2)
    said = []
    with EventStorage(0) as storage:
        for i in range(3):
            step(hook, model, optimizer, i)
            noise = hook.noise_scale()["model"]
            said.append("not measurable" if math.isnan(noise) else f"{noise:,.0f} images")
            latest = storage.latest()
            storage.step()
    for i, name in enumerate(MODULES):
        assert latest[f"agvm/variance/{name}"][0] == hook.modulator.variance[i].item()
        assert latest[f"agvm/lr_scale/{name}"][0] == hook.modulator.factors[i].item()
        value, iteration = latest.get(f"agvm/noise_scale/{name}", (None, -1))
        if iteration == 2:  # not where it was not measurable
            assert value == hook.noise_scale()[name]
    assert any("noise_scale" in name for name in latest)
    lines = [r.getMessage() for r in d2_log.records if "variance and LR factor" in r.getMessage()]
    assert len(lines) == 1 and all(name in lines[0] for name in MODULES)
    assert lines[0].endswith(f"  noise scale of the model {said[1]}")


def test_no_noise_scale_in_the_log_without_a_batch_size(d2_log):
    model = ToyDetector()
    run(model, sgd(model), log_period=1)
    assert "variance and LR factor" in d2_log.text and "noise scale" not in d2_log.text


def test_scalars_are_written_where_an_iteration_was_measured():
    model = ToyDetector()
    optimizer = sgd(model)
    hook = make_hook(model, optimizer, interval=2)
    with EventStorage(0) as storage:
        for i in range(3):
            step(hook, model, optimizer, i)
            storage.step()
        assert [i for _, i in storage.history("agvm/variance/fpn").values()] == [0, 2]


def test_the_log_line_ends_with_the_factors(d2_log):
    model = ToyDetector()
    optimizer = sgd(model)
    hook = make_hook(model, optimizer, stop_iter=2, log_period=1, mode="monitor")
    with EventStorage(0) as storage:
        for i in range(4):
            step(hook, model, optimizer, i)
            storage.step()
    assert d2_log.text.count("variance and LR factor, not used,") == 2


@pytest.mark.parametrize("options, times", [({"mode": "monitor"}, 1), ({"mode": "modulate"}, 0)])
def test_a_monitored_run_ends_with_a_summary(d2_log, options, times):
    model = ToyDetector()
    hook, _ = run(model, sgd(model), steps=4, interval=2, batch_size=8, **options)
    hook.after_train()
    hook.after_train()
    assert d2_log.text.count("AGVM, monitored: the least noisy module has") == times
    assert d2_log.text.count("of 2 measurements") == times


def test_the_summary_in_words():
    # (1 + 64/64)/(1 + 64/128) = 4/3 and 2/(1 + 64/256) = 8/5, a little late: 37.5 % less 0.02.
    assert noise_summary([(i, 64.0) for i in range(3)], 64, 90_000).startswith(
        "the least noisy module has a noise scale of 64 images at batch 64 (median of 3 of 3 "
        "measurements). Trained by the gain, twice the batch would save 25 % of the iterations and "
        "read 1.50 times the images; four times the batch would save 37 % of the iterations and "
        "read 2.50 times the images. "
    )
    # All signal: a larger batch saves nothing.
    said = noise_summary([(0, 0.0)], 64, 90_000)
    assert "would save 0 % of the iterations and read 2.00 times" in said


def test_the_summary_counts_what_is_unknown_as_noise():
    half = [(0, 64.0), (44_999, 64.0), (45_000, math.nan), (89_999, math.nan)]
    some = noise_summary(half, 64, 90_000)
    assert "(median of 2 of 4 measurements)" in some
    assert "twice the batch would save 37 %" in some  # half of the time 25 %, half 50 %
    for few, known in (([64.0, math.nan, math.nan], 1), ([math.nan], 0)):
        said = noise_summary([*enumerate(few)], 64, 90_000)
        assert f"from only {known} of {len(few)} measurements" in said
        assert "how many is not known" in said and "%" not in said


def test_trained_twice_by_one_trainer_keeps_working():
    model = ToyDetector()
    optimizer = sgd(model)
    hook, _ = run(model, optimizer)
    hook.after_train()
    assert not optimizer._optimizer_step_pre_hooks
    before = hook.modulator.factors.clone()
    hook.before_train()
    with EventStorage(0):
        step(hook, model, optimizer, 5)
    assert not torch.equal(before, hook.modulator.factors)
    assert len(optimizer._optimizer_step_pre_hooks) == 1


def test_each_inner_trainer_is_listened_to_once():
    """The inner one of DefaultTrainer calls after_backward and after_micro_batch."""
    model = ToyDetector()
    hook = AGVMHook(model, sgd(model), micro_batches=2)
    inner, other = TrainerBase(), TrainerBase()
    for trainer in (inner, inner, other):
        hook.trainer = SimpleNamespace(_trainer=trainer, max_iter=100)
        hook.before_train()
        hook.after_train()
    assert len(inner._hooks) == len(other._hooks) == 1


# Settings


def test_from_config(tmp_path):
    model = ToyDetector()
    cfg = toy_config(
        tmp_path, AGVM__START_ITER=-1, SOLVER__WARMUP_ITERS=7, SOLVER__MICRO_BATCH_SIZE=2
    )
    hook = AGVMHook(cfg, model, sgd(model))
    assert hook.modulator.start_iter == 107  # 100 iterations after warm-up
    assert hook.modulator.interval == 2 and hook.modulator.momentum == 0.5
    assert hook.agvm.num_units == 4 and hook.agvm.batch_size == 8


@pytest.mark.parametrize("key, value, said", bad_values.CASES, ids=str)
def test_bad_values_are_named(key, value, said):
    model = ToyDetector()
    with pytest.raises(ValueError, match=f"^{re.escape(bad_values.in_yacs(key))}: {said}"):
        AGVMHook(model, sgd(model), **{key: value})


def test_there_is_no_other_setting():
    model = ToyDetector()
    with pytest.raises(TypeError, match="no argument 'intervall'; did you mean interval"):
        AGVMHook(model, sgd(model), intervall=3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"start_iter": 5, "stop_iter": 5}, "at 5: nothing will be measured"),
        ({"rule": "gain", "batch_size": 16}, "a batch of 16 images is not above AGVM.BASE_BATCH"),
        ({"rule": "gain", "batch_size": 8, "mode": "monitor"}, "a batch of 8 images is not above"),
    ],
)
def test_settings_without_effect_are_named(d2_log, options, message):
    model = ToyDetector()
    make_hook(model, sgd(model), start_iter=4, stop_iter=5)
    make_hook(model, sgd(model), rule="gain", batch_size=32)
    make_hook(model, sgd(model), rule="gain", batch_size=16, mode="monitor")
    assert "nothing will be measured" not in d2_log.text and "is not above" not in d2_log.text
    make_hook(model, sgd(model), **options)
    assert message in d2_log.text


@pytest.mark.parametrize("images, said", [(4, False), (3, True), (None, False)])
def test_a_loader_with_another_batch_is_named(d2_log, images, said):
    model = ToyDetector()
    hook = AGVMHook(model, sgd(model), micro_batches=2, batch_size=4)
    loader = SimpleNamespace(batch_size=images)  # a loader of one's own may not have it
    hook.trainer = SimpleNamespace(_trainer=SimpleNamespace(data_loader=loader), max_iter=9)
    hook.trainer._trainer.register_hooks = list
    hook.before_train()
    assert ("the training loader gives 3 images to each of 1 workers" in d2_log.text) == said


@pytest.mark.parametrize("options, said", [({"rule": "gain"}, True), ({}, False)])
def test_a_loader_that_does_not_say_its_batch(options, said, d2_log):
    """Such as one with a key of its own for it, where IMS_PER_BATCH alone has grown."""
    model = ToyDetector()
    hook = AGVMHook(model, sgd(model), micro_batches=2, batch_size=32, **options)
    hook.trainer = SimpleNamespace(data_loader=iter([]), max_iter=9)
    hook.before_train()
    assert ("list_iterator, does not say how many images it gives" in d2_log.text) == said


def test_a_loop_without_a_trainer_follows_progress_itself():
    model = ToyDetector()
    options = {"rule": "gain", "schedule": "gain", "base_batch_size": 4, "batch_size": 8}
    hook = make_hook(model, sgd(model), **options)
    with EventStorage(0), pytest.raises(ValueError, match="hook.agvm.follow"):
        hook.before_step()
    hook.agvm.max_iter = 3
    hook.agvm.follow(LRMultiplier(hook.agvm.optimizer, LinearParamScheduler(1, 0), 3))
    with EventStorage(0) as storage:
        while not hook.agvm.done:
            step(hook, model, hook.agvm.optimizer, storage.iter)
            storage.step()
    assert storage.iter < 3 <= hook.agvm.progress


def test_the_log_has_a_table_of_the_modules_in_one_record(d2_log):
    model = ToyDetector()
    make_hook(model, sgd(model))
    records = [r.getMessage() for r in d2_log.records if "modules" in r.getMessage()]
    title, *table = records[0].splitlines()
    assert len(records) == 1 and title == "AGVM (modulate, rule variance): modules"
    assert table == [f"  {row}" for row in module_table(model, assign_modules(model)).splitlines()]
