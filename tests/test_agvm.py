"""AGVM in a plain PyTorch loop, without Detectron2."""

import copy
import math
import pytest
import reference
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR, LinearLR
from toy import MODULES, ToyDetector, batch, factors, loss, parameter_names, vectors

from agvm_d2 import AGVM, Settings, split_param_groups


def sgd(model, lr=0.1, **kwargs):
    return split_param_groups(torch.optim.SGD(model.parameters(), lr=lr, **kwargs), model)


def make(model, optimizer, micro_batches=2, batch_size=None, **settings):
    settings = Settings(**{"momentum": 0.5, "interval": 1, **settings})
    return AGVM(model, optimizer, settings, micro_batches=micro_batches, batch_size=batch_size)


def units(iteration):
    """An iteration's two micro-batches."""
    return [batch(4, seed=10 * iteration + half) for half in (0, 1)]


def backward(model, iteration, agvm=None):
    for unit in units(iteration):
        (loss(model, unit) / 2).backward()
        if agvm is not None:
            agvm.micro_batch_done(0.5)


def step(agvm, model, optimizer, iteration=0, clip=None):
    """One iteration, as the docstring of AGVM has it."""
    agvm.begin(iteration)
    optimizer.zero_grad()
    backward(model, iteration, agvm)
    agvm.backward_done()
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    agvm.end()


def run(model, optimizer, steps=3, **kwargs):
    """Train; AGVM and what the reference says its factors are."""
    agvm, wanted = make(model, optimizer, **kwargs), dict.fromkeys(MODULES, 1.0)
    for i in range(steps):
        if agvm.modulator.due(i):
            wanted = factors(model, units(i), wanted)
        step(agvm, model, optimizer, i)
    return agvm, list(wanted.values())


# Factors


def test_factors_and_weights_equal_the_literal_algorithm():
    model = ToyDetector()
    literal = copy.deepcopy(model)
    agvm, wanted = run(model, sgd(model), steps=5, interval=2, start_iter=1)
    scale = dict.fromkeys(MODULES, 1.0)
    for i in range(5):
        if i in (1, 3):  # and 4 keeps the factors of 3
            scale = factors(literal, units(i), scale)
        literal.zero_grad()
        backward(literal, i)
        with torch.no_grad():
            for module, names in parameter_names(literal).items():
                for name in names:
                    p = literal.get_parameter(name)
                    p -= 0.1 * scale[module] * p.grad
    assert agvm.modulator.factors.tolist() == pytest.approx(wanted, rel=1e-5)
    assert max(abs(f - 1) for f in wanted) > 0.05  # or this would say little
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, literal.get_parameter(name))


@pytest.mark.parametrize("base_batch_size, base_units", [(4, 1), (8, 2)])
def test_gain_scales_each_module_as_the_literal_algorithm(base_batch_size, base_units):
    model = ToyDetector()
    optimizer = sgd(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = reference.unit_gradients(model, loss, units(0))
    agvm = make(
        model,
        optimizer,
        rule="gain",
        base_batch_size=base_batch_size,
        batch_size=8,
        momentum=0.0,
    )
    step(agvm, model, optimizer)
    for module, names in parameter_names(model).items():
        gain = reference.gain(reference.flatten(gradients, names), base_units)
        factor = agvm.modulator.factors[MODULES.index(module)].item()
        assert factor == pytest.approx(gain, rel=1e-5) and (gain > 1.01) == (base_units == 1)
        for name in names:
            mean = (gradients[0][name] + gradients[1][name]) / 2
            found = before[name] - model.get_parameter(name)
            torch.testing.assert_close(found.double(), 0.1 * gain * mean, rtol=1e-4, atol=1e-6)


def test_moments_are_taken_before_clipping():
    model = ToyDetector()
    optimizer = sgd(model)
    agvm = make(model, optimizer)
    wanted = factors(model, units(0))
    step(agvm, model, optimizer, clip=1e-3)
    assert agvm.modulator.factors.tolist() == pytest.approx(list(wanted.values()), rel=1e-5)


class ClippedAdamW(torch.optim.AdamW):
    """A project's own, as Mask2Former's."""


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "ClippedAdamW", "Lamb", "SGD"])
def test_moments_are_preconditioned_where_the_optimizer_keeps_a_second_moment(kind):
    package = pytest.importorskip("pytorch_optimizer") if kind == "Lamb" else torch.optim
    optimizer_class = ClippedAdamW if kind == "ClippedAdamW" else getattr(package, kind)
    model = ToyDetector()
    optimizer = optimizer_class(model.parameters(), lr=0.01)
    agvm = make(model, split_param_groups(optimizer, model), mode="monitor")
    step(agvm, model, optimizer, 0)
    gradients = reference.unit_gradients(model, loss, units(1))
    if kind != "SGD":
        for gradient in gradients:
            for name, p in model.named_parameters():
                v = optimizer.state[p]["exp_avg_sq"].double()
                gradient[name] = gradient[name] / (v.sqrt() + optimizer.defaults["eps"])
    step(agvm, model, optimizer, 1)
    for i, names in enumerate(parameter_names(model).values()):
        wanted = reference.pairwise_variance(reference.flatten(gradients, names))
        assert float(agvm.modulator.variance[i]) == pytest.approx(wanted, rel=1e-4)


def test_without_a_start_it_begins_at_once():
    model = ToyDetector()
    agvm = AGVM(model, sgd(model), micro_batches=2)
    assert [i for i in range(25) if agvm.modulator.due(i)] == [0, 10, 20]


def test_an_iteration_that_is_not_measured_says_so():
    model = ToyDetector()
    optimizer = sgd(model)
    agvm = make(model, optimizer, interval=2, start_iter=1, stop_iter=4)
    measured = []
    for i in range(6):
        step(agvm, model, optimizer, i)
        measured.append(agvm.measured)
    assert measured == [False, True, False, True, False, False]


# Learning rates


def seen_lrs(optimizer):
    """Filled with the groups' learning rates as each step uses them."""
    seen = []
    optimizer.register_step_post_hook(
        lambda opt, *_: seen.append([g["lr"] for g in opt.param_groups])
    )
    return seen


def test_lr_is_scaled_in_the_step_only_and_put_back_exactly():
    model = ToyDetector()
    optimizer = sgd(model, lr=0.1)
    seen = seen_lrs(optimizer)  # AGVM's own hook comes after it
    agvm = make(model, optimizer)
    step(agvm, model, optimizer)
    assert seen[0] == [0.1 * f for f in agvm.modulator.factors.tolist()]
    assert len(set(seen[0])) > 1
    assert [g["lr"] for g in optimizer.param_groups] == [0.1] * 4


def test_the_factors_hold_between_start_and_stop_only():
    model = ToyDetector()
    optimizer = sgd(model, lr=0.1)
    seen = seen_lrs(optimizer)
    agvm = make(model, optimizer, start_iter=1, stop_iter=3)
    for i in range(4):
        step(agvm, model, optimizer, i)
    assert [lrs == [0.1] * 4 for lrs in seen] == [True, False, False, True]
    assert (agvm.modulator.factors[1:] != 1).all()  # kept, for the log


def test_each_group_has_its_own_modules_factor_also_beside_frozen_ones():
    model = ToyDetector()
    model.backbone.bottom_up[0].requires_grad_(False)
    names = [n for n, _ in model.named_parameters()]
    frozen = [p for n, p in model.named_parameters() if n.startswith("backbone.bottom_up.0")]
    groups = [{"params": frozen, "lr": 0.5}]
    groups += [{"params": [model.get_parameter(n)], "lr": 0.1} for n in reversed(names[2:])]
    optimizer = torch.optim.SGD(groups)
    seen = seen_lrs(optimizer)
    agvm = make(model, optimizer)
    step(agvm, model, optimizer)
    backbone, fpn, rpn, box_head = (0.1 * agvm.modulator.factors).tolist()
    assert seen[0] == [0.5, box_head, box_head, rpn, rpn, fpn, fpn, backbone, backbone]
    assert len({backbone, fpn, rpn, box_head}) == 4


def test_lr_as_a_tensor_keeps_its_object_and_value():
    model = ToyDetector()
    lr = torch.tensor(0.1)
    optimizer = split_param_groups(
        torch.optim.AdamW(model.parameters(), lr=lr, foreach=False), model
    )
    agvm = make(model, optimizer, start_iter=1)
    before = [p.detach().clone() for p in model.parameters()]
    for i in range(2):
        step(agvm, model, optimizer, i)
    assert all(g["lr"] is lr for g in optimizer.param_groups)
    assert lr.item() == pytest.approx(0.1)
    assert (agvm.modulator.factors[1:] != 1).all()
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
    agvm, _ = run(one, plain, start_iter=1)
    same, _ = run(two, other, start_iter=1)
    torch.testing.assert_close(agvm.modulator.factors, same.modulator.factors)
    assert (agvm.modulator.factors[1:] != 1).all()
    for a, b in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(a, b)


def test_a_step_inside_a_step_is_scaled_and_measured_once():
    """torch patches `step` once per class, so one that calls super().step fires its hooks twice."""

    class Clipped(torch.optim.SGD):
        def step(self, closure=None):
            found = super().step(closure)
            after.append([g["lr"] for g in self.param_groups])
            return found

    plain, clipped, after = ToyDetector(), ToyDetector(), []
    torch.optim.SGD(plain.parameters(), lr=1.0)  # its class is patched, too
    optimizer = split_param_groups(Clipped(clipped.parameters(), lr=0.1), clipped)
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append(1))
    _, wanted = run(plain, sgd(plain))
    agvm, _ = run(clipped, optimizer)
    assert len(fired) == 6  # twice in each of three steps
    assert agvm.modulator.factors.tolist() == pytest.approx(wanted, rel=1e-5)
    assert after[-1] == [0.1 * f for f in agvm.modulator.factors.tolist()]  # till its own end
    for a, b in zip(plain.parameters(), clipped.parameters()):
        torch.testing.assert_close(a, b)
    assert {g["lr"] for g in optimizer.param_groups} == {0.1}


def test_the_scheduler_never_sees_the_factors():
    model = ToyDetector()
    optimizer = sgd(model, lr=1.0)
    scheduler = LinearLR(optimizer, 1.0, 0.5, total_iters=10)
    agvm = make(model, optimizer)
    for i in range(10):
        step(agvm, model, optimizer, i)
        scheduler.step()
    agvm.detach()  # does not bring an old learning rate back
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.5] * 4)
    assert (agvm.modulator.factors[1:] != 1).all()


# When something goes wrong


def test_a_step_that_raises_leaves_the_lr_as_it_was():
    model = ToyDetector()
    optimizer = sgd(model, lr=0.1)
    agvm = make(model, optimizer)
    agvm.attach()
    fail = optimizer.register_step_pre_hook(lambda *_: 1 / 0)  # after AGVM's, which scales
    with pytest.raises(ZeroDivisionError):
        step(agvm, model, optimizer)
    assert len({g["lr"] for g in optimizer.param_groups}) > 1
    agvm.detach()
    assert {g["lr"] for g in optimizer.param_groups} == {0.1}
    fail.remove()
    seen = seen_lrs(optimizer)
    step(agvm, model, optimizer, 1)
    assert agvm.measured and len(set(seen[0])) > 1  # and it goes on as ever
    assert {g["lr"] for g in optimizer.param_groups} == {0.1}


def test_a_skipped_step_drops_the_measurement():
    # What GradScaler does on an inf gradient: optimizer.step is not called, no hook fires.
    model = ToyDetector()
    optimizer = sgd(model)
    agvm = make(model, optimizer)
    agvm.begin(0)
    for _ in range(2):
        (loss(model, batch(4)) * math.inf).backward()
        agvm.micro_batch_done(0.5)
    agvm.backward_done()
    agvm.end()
    optimizer.zero_grad()
    assert agvm.modulator.factors.tolist() == [1.0] * 4
    wanted = factors(model, units(1))
    step(agvm, model, optimizer, 1)
    assert agvm.modulator.factors.tolist() == pytest.approx(list(wanted.values()), rel=1e-5)


def test_a_group_of_two_modules_is_an_error():
    model = ToyDetector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match="Group 0 .*backbone, fpn, rpn, box_head.*split_param_groups"
    ):
        AGVM(model, optimizer)


def test_one_gradient_warns_once_and_trains_on_with_factors_of_one(d2_log):
    one, other = ToyDetector(), ToyDetector()
    optimizer = sgd(one)
    agvm = make(one, optimizer, micro_batches=1)
    assert agvm.num_units == 1
    for i in range(3):
        step(agvm, one, optimizer, i)
        assert not agvm.measured
    warnings = [r for r in d2_log.records if "at least two gradients" in r.getMessage()]
    assert len(warnings) == 1 and "SOLVER.MICRO_BATCH_SIZE" in warnings[0].getMessage()
    assert agvm.modulator.factors.tolist() == [1.0] * 4
    plain = sgd(other)
    for i in range(3):
        plain.zero_grad()
        backward(other, i)
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("estimator", ["pairwise", "split"])
def test_monitor_measures_and_changes_nothing(optimizer_class, estimator):
    plain, watched = ToyDetector(), ToyDetector()
    optimizer = split_param_groups(optimizer_class(watched.parameters(), lr=0.01), watched)
    agvm, _ = run(watched, optimizer, mode="monitor", steps=5, estimator=estimator)
    optimizer = optimizer_class(plain.parameters(), lr=0.01)
    for i in range(5):
        optimizer.zero_grad()
        backward(plain, i)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters()))
    assert (agvm.modulator.factors[1:] != 1).all()


# Attach and detach


def test_it_attaches_on_the_first_begin_and_detach_takes_all_of_it_away():
    model = ToyDetector()
    optimizer = sgd(model)
    agvm = make(model, optimizer)
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    assert [len(h) for h in hooks] == [0, 0] and agvm.tap is None
    for i in range(2):
        agvm.begin(i)
        assert [len(h) for h in hooks] == [1, 1]
        assert all(p._backward_hooks for p in model.parameters())
    agvm.detach()
    assert [len(h) for h in hooks] == [0, 0]
    assert not any(p._backward_hooks for p in model.parameters())

    before = agvm.modulator.factors.clone()  # and works again
    step(agvm, model, optimizer, 5)
    assert not torch.equal(before, agvm.modulator.factors)
    assert [len(h) for h in hooks] == [1, 1]


def _two_workers_with_a_hook_of_their_own():
    """In a worker: trains, detaches and trains again; the hook's calls, and AGVM's tap."""
    calls = []

    def hook(state, bucket):
        calls.append(bucket.index())
        return default_hooks.allreduce_hook(state, bucket)

    ddp = DistributedDataParallel(ToyDetector())
    optimizer = sgd(ddp)
    settings = Settings(interval=2, momentum=0.5)
    agvm = AGVM(ddp, optimizer, settings, comm_hook=(ddp.process_group, hook))
    taps = []
    for i in range(4):
        agvm.begin(i)
        optimizer.zero_grad()
        loss(ddp, units(i)[dist.get_rank()]).backward()
        agvm.backward_done()
        optimizer.step()
        agvm.end()
        taps.append(agvm.tap)
        if i == 1:
            agvm.detach()
    assert all(tap is taps[0] for tap in taps)  # DDP takes no second hook
    return agvm.num_units, calls, agvm.modulator.factors.tolist()


def test_two_workers_with_a_communication_hook_of_their_own(workers):
    one, other = workers(2).run(_two_workers_with_a_hook_of_their_own)
    assert one == other
    num_units, calls, found = one
    assert num_units == 2
    assert calls == [0] * 4  # measured or not
    assert all(f != 1 for f in found[1:])


# What was found


def test_scalars_are_of_the_last_measurement_without_what_was_not_measurable():
    model = ToyDetector()
    optimizer = sgd(model, lr=0.0)
    agvm = make(model, optimizer, batch_size=8, base_batch_size=4, momentum=0.75)
    assert set(agvm.scalars()) == {f"agvm/lr_scale/{m}" for m in MODULES}  # nothing measured yet
    for i in range(10):
        step(agvm, model, optimizer, i)
    found, measured = agvm.scalars(), [vectors(model, units(i)) for i in range(10)]
    whole = [[torch.cat([v[m][u] for m in MODULES]) for u in (0, 1)] for v in measured]
    num = dict.fromkeys(("variance", "lr_scale", "noise_scale", "gain"), 0)
    for i, module in enumerate((*MODULES, "model")):
        # K = 2, 4 images per unit: tr = 4 * 2 (S1 - S2), |G|^2 = S2 - (S1 - S2), over S1, averaged.
        s1 = s2 = 0.0
        gain = 1.0
        for v, w in zip(measured, whole):
            vs = w if module == "model" else v[module]
            unit_sq, mean_sq = reference.moments(vs)
            s1, s2 = 0.75 * s1 + 0.25, 0.75 * s2 + 0.25 * mean_sq / unit_sq
            gain = 0.75 * gain + 0.25 * reference.gain(vs, 1)  # the base batch is one unit
        wanted = {
            "gain": gain,
            "noise_scale": 8 * (s1 - s2) / (2 * s2 - s1) if 2 * s2 > s1 else math.nan,
        }
        if module != "model":
            wanted["variance"] = reference.pairwise_variance(measured[-1][module])
            wanted["lr_scale"] = float(agvm.modulator.factors[i])
        for kind, value in wanted.items():
            key = f"agvm/{kind}/{module}"
            num[kind] += key in found
            assert (key in found) == (not math.isnan(value))
            assert found.get(key, math.nan) == pytest.approx(value, rel=1e-4, nan_ok=True)
    # Noise drowns the gradient of one module.
    assert num == {"variance": 4, "lr_scale": 4, "noise_scale": 4, "gain": 5}
    assert found["agvm/progress"] == agvm.progress and len(found) == 18


def test_without_a_batch_size_there_is_no_noise_scale():
    model = ToyDetector()
    optimizer = sgd(model)
    agvm = make(model, optimizer)
    step(agvm, model, optimizer)
    assert {key.split("/")[1] for key in agvm.scalars()} == {"variance", "lr_scale"}


def test_the_state_goes_on_where_it_was():
    one = ToyDetector()
    agvm, _ = run(one, sgd(one), steps=3)
    saved = copy.deepcopy(agvm.state_dict())
    two = copy.deepcopy(one)
    other = make(two, sgd(two))
    other.load_state_dict(saved)
    assert other.state_dict() == saved and saved["factors"] != [1.0] * 4
    step(agvm, one, agvm.optimizer, 3)
    step(other, two, other.optimizer, 3)
    assert other.state_dict() == agvm.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_a_state_of_other_modules_is_refused():
    model = ToyDetector()
    halves = (("backbone", r"backbone\."), ("heads", ""))
    optimizer = split_param_groups(torch.optim.SGD(model.parameters(), lr=0.1), model, halves)
    other = make(model, optimizer, modules=halves)
    with pytest.raises(ValueError, match="backbone, fpn, rpn, box_head, but .* backbone, heads"):
        other.load_state_dict(make(model, sgd(model)).state_dict())


# AGVM.SCHEDULE gain


GAIN = {"rule": "gain", "schedule": "gain", "base_batch_size": 4, "batch_size": 8}


def by_gain(max_iter=6, **options):
    model = ToyDetector()
    optimizer = sgd(model)
    scheduler = LambdaLR(optimizer, lambda position: 1 - position / max_iter)
    agvm = make(model, optimizer, **{**GAIN, **options})
    agvm.max_iter = max_iter
    agvm.follow(scheduler)
    return model, optimizer, scheduler, agvm


def test_a_plain_loop_that_lasts_as_long_as_the_gain_asks():
    model, optimizer, scheduler, agvm = by_gain()
    literal, progress, gains = copy.deepcopy(model), 0.0, dict.fromkeys(agvm.modules, 1.0)
    iteration = 0
    while not agvm.done:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * (1 - progress / 6))
        for name, found in vectors(literal, units(iteration)).items():
            gains[name] = 0.5 * gains[name] + 0.5 * reference.gain(found, 1)
        progress += min(gains.values())
        step(agvm, model, optimizer, iteration)
        scheduler.step()
        literal.load_state_dict(model.state_dict())
        assert agvm.progress == pytest.approx(progress, rel=1e-5)
        iteration += 1
    assert iteration < 6 <= progress
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-6)  # not beyond its end


def test_progress_in_monitor_mode_decides_on_nothing():
    model, optimizer, scheduler, agvm = by_gain(mode="monitor")
    for i in range(6):
        assert not agvm.done
        step(agvm, model, optimizer, i)
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * (1 - (i + 1) / 6))
    assert agvm.done and agvm.progress > 6


def test_steps_before_and_behind_the_measured_ones_count_one():
    model, optimizer, _, agvm = by_gain(max_iter=100, start_iter=2, stop_iter=4)
    seen = [0.0]
    for i in range(6):
        step(agvm, model, optimizer, i)
        seen.append(agvm.progress)
    steps = [b - a for a, b in zip(seen, seen[1:])]
    assert steps[:2] == steps[4:] == [1, 1] and min(steps[2:4]) > 1


def test_a_resumed_plain_loop_goes_on_with_progress():
    model, optimizer, scheduler, agvm = by_gain()
    step(agvm, model, optimizer, 0)
    scheduler.step()
    _, again, other, resumed = by_gain()
    resumed.load_state_dict(agvm.state_dict())
    resumed.follow(other)
    assert resumed.progress == agvm.progress and resumed.gain == agvm.gain > 1
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] < 0.1


def test_a_gain_that_starts_anew_does_so_for_progress_too():
    model, optimizer, _, agvm = by_gain()
    step(agvm, model, optimizer, 0)
    *_, other = by_gain(batch_size=16)
    other.load_state_dict(agvm.state_dict())
    assert other.progress == agvm.progress and other.gain == 1
    assert other.modulator.factors.tolist() == [1.0] * 4


def test_what_the_gains_schedule_cannot_do():
    with pytest.raises(ValueError, match="AGVM.SCHEDULE gain: .* at least two gradients"):
        model, optimizer, _, agvm = by_gain(micro_batches=1)
        agvm.begin(0)
    with pytest.raises(ValueError, match="a batch of 8 images is below AGVM.BASE_BATCH_SIZE, 16"):
        by_gain(base_batch_size=16)
    with pytest.raises(ValueError, match="AGVM.done needs max_iter"):
        _ = make(model, optimizer).done
    state = by_gain()[3].state_dict()
    del state["progress"]
    with pytest.raises(ValueError, match="does not say how many iterations of the base batch"):
        by_gain()[3].load_state_dict(state)
    model = ToyDetector()
    make(model, sgd(model), batch_size=8).load_state_dict(state)  # of version 0.1


@pytest.mark.parametrize(
    "micro_batches, passes, weight, message",
    [
        (4, 2, 0.5, "set up for 4 micro-batches, but this loop ran 2"),
        (2, 4, 0.25, "set up for 2 micro-batches, but this loop ran 4"),
        (2, 1, None, "set up for 2 micro-batches, but this loop ran 1"),  # does not call it
        (2, 2, 1.0, "add up to 2, but must to 1"),
    ],
)
def test_a_loop_with_other_micro_batches_than_said_fails_at_once(
    micro_batches, passes, weight, message
):
    model = ToyDetector()
    optimizer = sgd(model)
    agvm = make(model, optimizer, micro_batches=micro_batches, start_iter=100)
    agvm.begin(0)
    for i in range(passes):
        loss(model, batch(4, seed=i)).backward()
        if weight is not None:
            agvm.micro_batch_done(weight)
    agvm.backward_done()
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


@pytest.mark.parametrize("follows", [True, False])
def test_a_schedule_that_nothing_follows_is_said(follows, d2_log):
    model = ToyDetector()
    optimizer = sgd(model)
    agvm = make(model, optimizer, **GAIN)
    if follows:
        agvm.follow(LambdaLR(optimizer, lambda position: 1.0))
    for iteration in range(2):
        step(agvm, model, optimizer, iteration)
    assert d2_log.text.count("no LR scheduler follows progress") == (not follows)


def test_an_iteration_that_has_not_begun():
    model = ToyDetector()
    with pytest.raises(RuntimeError, match=r"without begin\(iteration\)"):
        make(model, sgd(model)).end()
