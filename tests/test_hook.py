"""AGVMHook around optimizer.step, without a trainer."""

import copy
import math
import pytest
import reference
import torch
from detectron2.config import get_cfg
from detectron2.solver import LRMultiplier
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils.events import EventStorage
from fvcore.common.param_scheduler import LinearParamScheduler
from toy import MODULES, ToyDetector, batch, loss, parameter_names, toy_config

from agvm_d2 import AGVMHook, split_param_groups


def sgd(model, lr=0.1, **kwargs):
    return split_param_groups(torch.optim.SGD(model.parameters(), lr=lr, **kwargs), model)


def make_hook(model, optimizer, **kwargs):
    hook = AGVMHook(model, optimizer, **{"micro_batches": 2, "momentum": 0.5, **kwargs})
    hook.before_train()
    return hook


def step(hook, model, optimizer, seed=0, clip=None):
    """One iteration of a plain loop with two micro-batches."""
    hook.before_step()
    optimizer.zero_grad()
    for half in (0, 1):
        (loss(model, batch(4, seed=10 * seed + half)) / 2).backward()
        hook.after_micro_batch(0.5)
    hook.after_backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    hook.after_step()


def reference_factors(model, old, seed=0, momentum=0.5):
    gradients = reference.unit_gradients(
        model, loss, [batch(4, seed=10 * seed + h) for h in (0, 1)]
    )
    variances = {
        m: reference.pairwise_variance(reference.flatten(gradients, names))
        for m, names in parameter_names(model).items()
    }
    return reference.factors(old, variances, "backbone", momentum, (0.5, 10))


def run(model, optimizer, steps=3, **kwargs):
    """Train and return the hook and what the reference says its factors are."""
    hook, wanted = make_hook(model, optimizer, **kwargs), dict.fromkeys(MODULES, 1.0)
    with EventStorage(0) as storage:
        for i in range(steps):
            if hook.modulator.due(i):
                wanted = reference_factors(model, wanted, seed=i)
            step(hook, model, optimizer, seed=i)
            storage.step()
    return hook, wanted


def test_factors_and_weights_equal_the_literal_algorithm():
    model = ToyDetector()
    literal = copy.deepcopy(model)
    hook, wanted = run(model, sgd(model), steps=4, interval=2, start_iter=1)
    factors = dict.fromkeys(MODULES, 1.0)
    for i in range(4):
        if i in (1, 3):
            factors = reference_factors(literal, factors, seed=i)
        literal.zero_grad()
        for half in (0, 1):
            (loss(literal, batch(4, seed=10 * i + half)) / 2).backward()
        with torch.no_grad():
            for module, names in parameter_names(literal).items():
                for name in names:
                    p = literal.get_parameter(name)
                    p -= 0.1 * factors[module] * p.grad
    assert hook.modulator.factors.tolist() == pytest.approx(list(wanted.values()), rel=1e-5)
    assert not all(f == pytest.approx(1, abs=0.02) for f in wanted.values())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, literal.get_parameter(name))


@pytest.mark.parametrize("base_batch_size, base_units", [(4, 1), (8, 2)])
def test_gain_scales_each_module_as_the_literal_algorithm(base_batch_size, base_units):
    model = ToyDetector()
    optimizer = sgd(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    units = reference.unit_gradients(model, loss, [batch(4, seed=half) for half in (0, 1)])
    hook = make_hook(
        model,
        optimizer,
        rule="gain",
        base_batch_size=base_batch_size,
        batch_size=8,
        interval=1,
        momentum=0.0,
    )
    with EventStorage(0):
        step(hook, model, optimizer)
    for module, names in parameter_names(model).items():
        gain = reference.gain(reference.flatten(units, names), base_units)
        factor = hook.modulator.factors[MODULES.index(module)].item()
        assert factor == pytest.approx(gain, rel=1e-5) and (gain > 1.01) == (base_units == 1)
        for name in names:
            mean = (units[0][name] + units[1][name]) / 2
            found = before[name] - model.get_parameter(name)
            torch.testing.assert_close(found.double(), 0.1 * gain * mean, rtol=1e-4, atol=1e-6)


def test_gain_needs_the_batch():
    model = ToyDetector()
    with pytest.raises(ValueError, match="AGVM.RULE gain needs batch_size"):
        AGVMHook(model, sgd(model), rule="gain")


def test_lr_is_scaled_in_the_step_only_and_put_back_exactly():
    model = ToyDetector()
    optimizer = sgd(model, lr=0.1)
    seen = []
    optimizer.register_step_post_hook(
        lambda opt, *_: seen.append([g["lr"] for g in opt.param_groups])
    )
    hook = make_hook(model, optimizer, interval=1)  # its post-hook comes second
    with EventStorage(0):
        step(hook, model, optimizer)
    assert seen[0] == [0.1 * f for f in hook.modulator.factors.tolist()]
    assert len(set(seen[0])) > 1
    assert [g["lr"] for g in optimizer.param_groups] == [0.1] * 4


def test_lr_as_a_tensor_keeps_its_object_and_value():
    model = ToyDetector()
    lr = torch.tensor(0.1)
    optimizer = split_param_groups(
        torch.optim.AdamW(model.parameters(), lr=lr, foreach=False), model
    )
    hook = make_hook(model, optimizer, interval=1, start_iter=1)
    before = [p.detach().clone() for p in model.parameters()]
    with EventStorage(0) as storage:
        for i in range(2):
            step(hook, model, optimizer, seed=i)
            storage.step()
    assert all(g["lr"] is lr for g in optimizer.param_groups)
    assert lr.item() == pytest.approx(0.1)
    assert (hook.modulator.factors != 1).any()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("kind", ["foreach", "fused"])
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_foreach_and_fused_optimizers(optimizer_class, kind):
    one, two = ToyDetector(), ToyDetector()
    plain = split_param_groups(optimizer_class(one.parameters(), lr=0.01, foreach=False), one)
    try:
        other = optimizer_class(two.parameters(), lr=0.01, **{kind: True})
    except (TypeError, RuntimeError):
        pytest.skip("this torch has no fused optimizer on a CPU")
    split_param_groups(other, two)
    hook, _ = run(one, plain, interval=1, start_iter=1)
    same, _ = run(two, other, interval=1, start_iter=1)
    torch.testing.assert_close(hook.modulator.factors, same.modulator.factors)
    assert (hook.modulator.factors[1:] != 1).all()
    for a, b in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(a, b)


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
    _, wanted = run(plain, sgd(plain), interval=1)
    hook, _ = run(clipped, optimizer, interval=1)
    if built_before and per_class:
        assert len(fired) == 6  # the trap: twice in each of three steps
    assert hook.modulator.factors.tolist() == pytest.approx(list(wanted.values()), rel=1e-5)
    for a, b in zip(plain.parameters(), clipped.parameters()):
        torch.testing.assert_close(a, b)
    assert {g["lr"] for g in optimizer.param_groups} == {0.1}


def test_moments_are_taken_before_clipping():
    model = ToyDetector()
    optimizer = sgd(model)
    hook = make_hook(model, optimizer, interval=1)
    wanted = reference_factors(model, dict.fromkeys(MODULES, 1.0))
    with EventStorage(0):
        step(hook, model, optimizer, clip=1e-3)
    assert hook.modulator.factors.tolist() == pytest.approx(list(wanted.values()), rel=1e-5)


def test_the_scheduler_never_sees_the_factors():
    model = ToyDetector()
    optimizer = sgd(model, lr=1.0)
    schedule = LRMultiplier(optimizer, LinearParamScheduler(1.0, 0.5), max_iter=10)
    hook = make_hook(model, optimizer, interval=1)
    with EventStorage(0) as storage:
        for i in range(5):
            step(hook, model, optimizer, seed=i)
            schedule.step()
            storage.step()
    assert {g["lr"] for g in optimizer.param_groups} == {1.0 * (1 - 0.5 * 5 / 10)}
    assert schedule.base_lrs == [1.0] * 4


def test_a_step_that_raises_leaves_the_lr_as_it_was():
    model = ToyDetector()
    optimizer = sgd(model, lr=0.1)
    hook = make_hook(model, optimizer, interval=1)
    fail = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with EventStorage(0) as storage:
        with pytest.raises(ZeroDivisionError):
            step(hook, model, optimizer)
        hook.after_train()  # TrainerBase calls it in `finally`
        assert {g["lr"] for g in optimizer.param_groups} == {0.1}
        fail.remove()
        hook.before_train()
        storage.step()
        step(hook, model, optimizer, seed=1)
    assert {g["lr"] for g in optimizer.param_groups} == {0.1}


def test_a_skipped_step_drops_the_measurement():
    # What GradScaler does on an inf gradient: optimizer.step is not called, no hook fires.
    model = ToyDetector()
    optimizer = sgd(model)
    hook = make_hook(model, optimizer, interval=1)
    with EventStorage(0) as storage:
        hook.before_step()
        for _ in range(2):
            (loss(model, batch(4)) * math.inf).backward()
            hook.after_micro_batch(0.5)
        hook.after_backward()
        hook.after_step()
        optimizer.zero_grad()
        assert hook.modulator.factors.tolist() == [1.0] * 4
        storage.step()
        wanted = reference_factors(model, dict.fromkeys(MODULES, 1.0), seed=1)
        step(hook, model, optimizer, seed=1)
    assert hook.modulator.factors.tolist() == pytest.approx(list(wanted.values()), rel=1e-5)


def test_split_compares_the_first_micro_batches_with_the_others():
    for sizes in ((4, 4), (3, 2, 3), (2, 2, 2, 2)):
        model, total = ToyDetector(), sum(sizes)
        optimizer = sgd(model)
        hook = make_hook(model, optimizer, interval=1, estimator="split", micro_batches=len(sizes))
        data = batch(total)
        units = [data[sum(sizes[:i]) :][:size] for i, size in enumerate(sizes)]
        gradients = reference.unit_gradients(model, loss, units)
        with EventStorage(0):
            hook.before_step()
            for unit, size in zip(units, sizes):
                (loss(model, unit) * size / total).backward()
                hook.after_micro_batch(size / total)
            hook.after_backward()
            optimizer.step()
            hook.after_step()
        cut = (len(sizes) + 1) // 2
        for i, names in enumerate(parameter_names(model).values()):
            weighted = [u * n for u, n in zip(reference.flatten(gradients, names), sizes)]
            a, b = sum(weighted[:cut]), sum(weighted[cut:])
            wanted = reference.split_variance([a], [b])
            assert float(hook.modulator.variance[i]) == pytest.approx(wanted, abs=1e-5)


def test_split_without_micro_batches_says_what_to_call():
    model = ToyDetector()
    optimizer = sgd(model)
    hook = make_hook(model, optimizer, interval=1, estimator="split", micro_batches=2)
    with EventStorage(0), pytest.raises(RuntimeError, match="saw 0: .*after_micro_batch"):
        hook.before_step()
        loss(model, batch(4)).backward()
        hook.after_backward()


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("estimator", ["pairwise", "split"])
def test_monitor_measures_and_changes_nothing(optimizer_class, estimator):
    plain, watched = ToyDetector(), ToyDetector()
    optimizer = split_param_groups(optimizer_class(watched.parameters(), lr=0.01), watched)
    hook, _ = run(watched, optimizer, interval=1, mode="monitor", steps=5, estimator=estimator)
    optimizer = optimizer_class(plain.parameters(), lr=0.01)
    for i in range(5):
        optimizer.zero_grad()
        for half in (0, 1):
            (loss(plain, batch(4, seed=10 * i + half)) / 2).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters()))
    assert (hook.modulator.factors[1:] != 1).all()


def test_scalars_and_the_line_in_the_log(d2_log):
    model = ToyDetector()
    optimizer = sgd(model)
    hook = make_hook(model, optimizer, interval=1, batch_size=8, log_period=2)
    with EventStorage(0) as storage:
        for i in range(2):
            step(hook, model, optimizer, seed=i)
            latest = storage.latest()
            storage.step()
    for i, name in enumerate(MODULES):
        assert latest[f"agvm/variance/{name}"][0] == hook.modulator.variance[i].item()
        assert latest[f"agvm/lr_scale/{name}"][0] == hook.modulator.factors[i].item()
        value, iteration = latest.get(f"agvm/noise_scale/{name}", (None, -1))
        if iteration == 1:  # not where it was not measurable
            assert value == hook.noise_scale()[name]
    assert any("noise_scale" in name for name in latest)
    lines = [r.getMessage() for r in d2_log.records if "variance and LR factor" in r.getMessage()]
    assert len(lines) == 1 and all(name in lines[0] for name in MODULES)


def test_noise_scale_is_of_averaged_moments_in_images():
    model = ToyDetector()
    hook, _ = run(model, sgd(model, lr=0.0), interval=1, momentum=0.75, batch_size=8, steps=3)
    names = {**parameter_names(model), "model": [n for n, _ in model.named_parameters()]}
    for module in names:
        s1 = s2 = 0.0
        for i in range(3):
            units = [batch(4, seed=10 * i + h) for h in (0, 1)]
            vectors = reference.flatten(reference.unit_gradients(model, loss, units), names[module])
            unit_sq, mean_sq = reference.moments(vectors)
            s1, s2 = 0.75 * s1 + 0.25 * unit_sq, 0.75 * s2 + 0.25 * mean_sq
        # K = 2, 4 images a unit: tr = 4 * 2 (S1 - S2), |G|^2 = S2 - (S1 - S2).
        signal = 2 * s2 - s1
        wanted = 8 * (s1 - s2) / signal if signal > 0 else math.nan
        assert hook.noise_scale()[module] == pytest.approx(wanted, rel=1e-4, nan_ok=True)


def test_one_gradient_warns_once_and_trains_on(d2_log):
    model = ToyDetector()
    optimizer = sgd(model)
    hook = make_hook(model, optimizer, micro_batches=1, interval=1)
    with EventStorage(0) as storage:
        for i in range(3):
            step(hook, model, optimizer, seed=i)
            storage.step()
    warnings = [r for r in d2_log.records if "at least two gradients" in r.getMessage()]
    assert len(warnings) == 1 and "SOLVER.MICRO_BATCH_SIZE" in warnings[0].getMessage()
    assert hook.modulator.factors.tolist() == [1.0] * 4


def test_a_group_of_two_modules_is_an_error():
    model = ToyDetector()
    with pytest.raises(
        ValueError, match="Group 0 .*backbone, fpn, rpn, box_head.*split_param_groups"
    ):
        AGVMHook(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_an_unknown_mode_is_an_error():
    model = ToyDetector()
    with pytest.raises(ValueError, match="AGVM.MODE: found 'both'"):
        AGVMHook(model, sgd(model), mode="both")
    with pytest.raises(ValueError, match="AGVM.ESTIMATOR: found 'cos'"):
        AGVMHook(model, sgd(model), estimator="cos")
    with pytest.raises(ValueError, match="AGVM.RULE: found 'adascale'"):
        AGVMHook(model, sgd(model), rule="adascale")


def test_from_config(tmp_path):
    model = ToyDetector()
    cfg = toy_config(
        tmp_path, AGVM__START_ITER=-1, SOLVER__WARMUP_ITERS=7, SOLVER__MICRO_BATCH_SIZE=2
    )
    hook = AGVMHook(cfg, model, sgd(model))
    assert hook.modulator.start_iter == 107  # 100 iterations after warm-up
    assert hook.modulator.interval == 2 and hook.modulator.momentum == 0.5
    assert hook.agvm.num_units == 4 and hook.agvm.batch_size == 8


@pytest.mark.parametrize(
    "options, message",
    [
        ({"start_iter": 5, "stop_iter": 5}, "at 5: nothing will be measured"),
        ({"rule": "gain", "batch_size": 16}, "a batch of 16 images is not above AGVM.BASE_BATCH"),
    ],
)
def test_settings_without_effect_are_named(d2_log, options, message):
    model = ToyDetector()
    make_hook(model, sgd(model), start_iter=4, stop_iter=5)
    make_hook(model, sgd(model), rule="gain", batch_size=32)
    assert "nothing will be measured" not in d2_log.text and "is not above" not in d2_log.text
    make_hook(model, sgd(model), **options)
    assert message in d2_log.text


def test_the_log_line_ends_with_the_factors(d2_log):
    model = ToyDetector()
    optimizer = sgd(model)
    hook = make_hook(model, optimizer, interval=1, stop_iter=2, log_period=1, mode="monitor")
    with EventStorage(0) as storage:
        for i in range(4):
            step(hook, model, optimizer, seed=i)
            storage.step()
    assert d2_log.text.count("variance and LR factor, not used,") == 2


def test_trained_twice_by_one_trainer_keeps_working():
    model = ToyDetector()
    optimizer = sgd(model)
    hook, _ = run(model, optimizer, interval=1)
    hook.after_train()
    assert not optimizer._optimizer_step_pre_hooks
    before = hook.modulator.factors.clone()
    hook.before_train()
    with EventStorage(0):
        step(hook, model, optimizer, seed=5)
    assert not torch.equal(before, hook.modulator.factors)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
