import math
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.solver import build_optimizer as d2_build_optimizer
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils.events import EventStorage
from torch import nn
from toy import ToyDetector, batch, loss
from toy_d2 import toy_config

from agvm_d2 import build_optimizer
from agvm_d2.solver import clip, clip_gradients, skip_nonfinite_steps
from agvm_d2.solver.clip import AVERAGE

# Clipping


def clip_config(tmp_path, kind, value=0.1, **options):
    return toy_config(
        tmp_path,
        SOLVER__CLIP_GRADIENTS__ENABLED=True,
        SOLVER__CLIP_GRADIENTS__CLIP_TYPE=kind,
        SOLVER__CLIP_GRADIENTS__CLIP_VALUE=value,
        **options,
    )


def clipped_gradients(cfg, model, iteration=0):
    optimizer = build_optimizer(cfg, model)
    loss(model, batch(4, scale=10.0)).backward()
    with EventStorage(iteration):
        optimizer.step()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("kind, norm", [("value", 2.0), ("norm", 2.0), ("norm", math.inf)])
def test_clip_types_of_detectron2_are_detectron2_s(tmp_path, kind, norm):
    cfg = clip_config(tmp_path, kind, SOLVER__CLIP_GRADIENTS__NORM_TYPE=norm)
    a, b = ToyDetector(), ToyDetector()
    ours = clipped_gradients(cfg, a)
    theirs = d2_build_optimizer(cfg, b)
    loss(b, batch(4, scale=10.0)).backward()
    theirs.step()
    assert all(torch.equal(g, p.grad) for g, p in zip(ours, b.parameters(), strict=True))


@pytest.mark.parametrize("norm", [1.0, 2.0, math.inf])
def test_full_model_clips_the_norm_over_all_parameters(tmp_path, norm):
    cfg = clip_config(tmp_path, "full_model", SOLVER__CLIP_GRADIENTS__NORM_TYPE=norm)
    gradients = torch.cat([g.flatten() for g in clipped_gradients(cfg, ToyDetector())])
    assert torch.linalg.vector_norm(gradients, norm) == pytest.approx(0.1, rel=1e-4)


def test_an_unknown_clip_type_is_named():
    optimizer = torch.optim.SGD(ToyDetector().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="clip_type: found 'global', .*full_model"):
        clip_gradients(optimizer, "global", 1.0)


@pytest.mark.parametrize("iteration, clipped", [(9, False), (10, True), (19, True), (20, False)])
def test_clipping_only_in_its_window(tmp_path, iteration, clipped):
    cfg = clip_config(tmp_path, "full_model", SOLVER__CLIP_GRADIENTS__ITER_RANGE=(10, 20))
    norm = torch.cat([g.flatten() for g in clipped_gradients(cfg, ToyDetector(), iteration)]).norm()
    assert (norm <= 0.1001) == clipped


class Scripted:
    """One parameter of two numbers, whose gradient is as given; SGD with learning rate 1."""

    def __init__(self, **options):
        self.param = nn.Parameter(torch.zeros(2))
        self.optimizer = torch.optim.SGD([self.param], lr=1.0)
        clip_gradients(self.optimizer, "relative", 4.0, **options)

    def step(self, norm):
        """The norm that is left of a gradient of `norm`."""
        self.param.data.zero_()
        self.param.grad = norm * torch.tensor([0.6, 0.8])
        self.optimizer.step()
        return float(self.param.detach().norm())

    @property
    def average(self):
        (found,) = (v for k, v in self.optimizer.param_groups[-1].items() if AVERAGE in k)
        return found.tolist()


def test_groups_added_later_are_clipped_too():
    run = Scripted()
    run.step(1.0)
    late = nn.Parameter(torch.zeros(1))
    run.optimizer.add_param_group({"params": [late]})
    late.grad = torch.tensor([100.0])
    assert run.step(1.0) == pytest.approx(4 / 10_001**0.5, rel=1e-4)
    assert float(late.grad) == pytest.approx(4, rel=1e-3)


def test_relative_clips_to_a_multiple_of_the_average():
    run = Scripted()
    assert run.step(100.0) == pytest.approx(100)  # nothing to hold it against
    assert run.step(2.0) == pytest.approx(2)
    assert run.average == pytest.approx([51, 2])  # the mean of the first steps
    assert run.step(1000.0) == pytest.approx(4 * 51, rel=1e-6)
    assert run.average == pytest.approx([(102 + 1.5 * 51) / 3, 3])  # it hardly follows
    for _ in range(60):
        run.step(50.0)
    before, _ = run.average
    run.step(51.0)
    assert run.average[0] == pytest.approx(0.98 * before + 0.02 * 51, rel=1e-6)


def test_the_average_grows_slowly_in_an_explosion_and_is_not_stuck_after_a_tiny_first_step():
    run = Scripted()
    for _ in range(200):
        run.step(1.0)
    for _ in range(40):
        left = run.step(1000.0)
    assert 4 < left < 6
    for _ in range(1000):
        left = run.step(1000.0)
    assert left == pytest.approx(1000)


def test_a_step_below_the_limit_keeps_its_bits():
    run = Scripted()
    run.step(1.0)
    run.param.grad = grad = torch.tensor([0.123, 1.7])
    copy = grad.clone()
    run.optimizer.step()
    assert torch.equal(grad, copy)


@pytest.mark.parametrize("norm", [1e-8, 3.999])
def test_a_step_just_below_the_limit_is_whole(norm):
    run = Scripted()
    run.step(norm / 3.999)
    assert run.step(norm) == pytest.approx(norm, rel=1e-6, abs=0)


@pytest.mark.parametrize("public", [False, True])
def test_all_gradients_are_multiplied_at_once(public, monkeypatch):
    if public:
        monkeypatch.delattr(torch, "_foreach_mul_")
    kinds = torch.float32, torch.float32, torch.bfloat16, torch.float64
    tensors = [torch.full((3,), 40.0, dtype=kind) for kind in kinds]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        clip._multiply(tensors, torch.tensor(0.1))
    expected = [torch.full_like(t, 40.0).mul_(torch.tensor(0.1)) for t in tensors]
    assert all(torch.equal(t, e) for t, e in zip(tensors, expected, strict=True))
    calls = [event.name for event in profiler.events()]
    assert calls.count("aten::_foreach_mul_") == (0 if public else 1)


def test_no_step_is_made_of_a_gradient_whose_norm_overflows():
    run = Scripted()
    run.step(1.0)
    assert run.step(1e20) == 0 and run.average == [1, 1]


def test_a_window_clips_by_the_norms_before_it_too():
    run = Scripted(iter_range=(10, 20))
    for iteration, left in ((8, 1.0), (9, 1000.0), (10, 5.0)):
        with EventStorage(iteration):
            assert run.step(left if iteration < 10 else 1000.0) == pytest.approx(left)


def test_another_norm_has_an_average_of_its_own():
    run = Scripted()
    run.step(1.0)
    other = Scripted(norm_type=1.0)
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    assert other.step(100.0) == pytest.approx(100)


def test_groups_in_another_order_keep_the_average():
    run = Scripted()
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1})
    run.step(1.0)
    state = run.optimizer.state_dict()
    assert all(any(AVERAGE in key for key in group) for group in state["param_groups"])


@pytest.mark.parametrize("norm", [math.nan, math.inf, 0.0])
def test_the_average_leaves_out_what_is_no_norm(norm):
    run = Scripted()
    run.step(1.0)
    run.step(norm)
    assert run.average == [1, 1]
    assert run.step(10.0) == pytest.approx(4)


def test_relative_takes_other_norms():
    run = Scripted(norm_type=math.inf)
    run.step(1.0)
    assert run.average == pytest.approx([0.8, 1])


def test_the_average_is_in_the_optimizers_state(tmp_path):
    straight, saved, resumed = Scripted(), Scripted(), Scripted()
    for norm in (1.0, 2.0):
        straight.step(norm)
        saved.step(norm)
    torch.save(saved.optimizer.state_dict(), tmp_path / "optimizer.pth")
    resumed.optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pth", weights_only=True))
    for norm in (30.0, 1.5, 50.0):
        assert resumed.step(norm) == straight.step(norm)
    assert resumed.average == straight.average


@pytest.mark.parametrize("value", [1.0, 0.5])
def test_relative_needs_more_than_the_average_itself(tmp_path, value):
    with pytest.raises(ValueError, match=rf"CLIP_VALUE: found {value}, .* above 1 .*relative"):
        build_optimizer(clip_config(tmp_path, "relative", value), ToyDetector())


def test_clipping_has_the_same_bits_with_and_without_split_groups(tmp_path):
    one = clipped_gradients(clip_config(tmp_path, "full_model"), ToyDetector())
    two = clipped_gradients(clip_config(tmp_path, "full_model", AGVM__ENABLED=False), ToyDetector())
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# Skipping


def test_skipping_comes_before_clipping_by_value(tmp_path):
    """Which would make an inf finite."""
    cfg = clip_config(tmp_path, "value", SOLVER__ON_NONFINITE="skip")
    model = ToyDetector()
    optimizer = build_optimizer(cfg, model)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, math.inf)
    with EventStorage(0):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_a_skipped_step_leaves_weights_momentum_and_statistics(d2_log):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    skip_nonfinite_steps(optimizer, model)
    skip_nonfinite_steps(optimizer, model)  # as a project's own and this package's build may both
    assert len(optimizer._optimizer_step_pre_hooks) == 1

    def step(iteration, bad=None):
        optimizer.zero_grad()
        model(torch.randn(4, 2)).square().sum().backward()
        if bad is not None:
            model[1].bias.grad[1] = bad  # the last of all
        with EventStorage(iteration):
            optimizer.step()
        state = [*model.state_dict().values()]
        state += [s["momentum_buffer"] for s in optimizer.state.values()]
        return [value.clone() for value in state]

    def same(one, other):
        return [torch.equal(a, b) for a, b in zip(one, other, strict=True)]

    step(0)
    good = step(1)
    assert all(same(good, step(2, math.nan))) and all(same(good, step(3, math.inf)))
    assert not any(same(good, step(4)))
    said = [r.getMessage() for r in d2_log.records]
    assert [s.split(":")[0] for s in said] == ["Iteration 2", "Iteration 3"]
    assert "(1 so far)" in said[0] and "(2 so far)" in said[1]


@pytest.mark.parametrize("fused", [True, False])
def test_statistics_are_kept_bit_for_bit_also_where_torch_cannot_copy_them_at_once(
    monkeypatch, fused
):
    if not fused:
        monkeypatch.delattr(torch, "_foreach_copy_", raising=False)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))  # its number of batches is an int64
    model.register_buffer("other", torch.randn(5).bfloat16())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    skip_nonfinite_steps(optimizer, model)
    with EventStorage():
        for image in (1.0, math.nan):
            model(torch.full((4, 3), image)).sum().backward()
            optimizer.step()
            if image == 1.0:
                good = {k: v.clone() for k, v in model.named_buffers()}
                model.other.fill_(5)
    assert all(torch.equal(good[k], v) for k, v in model.named_buffers())


def test_a_first_step_goes_back_to_statistics_that_were_loaded_after_the_build():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    skip_nonfinite_steps(optimizer, model)
    loaded = {**model.state_dict(), "1.running_mean": torch.tensor([5.0, 6.0])}
    model.load_state_dict(loaded)
    with EventStorage():
        model(torch.full((4, 3), math.nan)).sum().backward()
        optimizer.step()
    assert model[1].running_mean.tolist() == [5, 6] and model[1].num_batches_tracked == 0


def test_an_optimizer_that_detectron2_clips_is_refused():
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    model = nn.Linear(2, 1)
    optimizer = maybe_add_gradient_clipping(cfg, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="ON_NONFINITE skip .*maybe_add.*clip_gradients"):
        skip_nonfinite_steps(optimizer, model)


class StepInStep(torch.optim.SGD):
    """torch patches both classes' `step`, whose hooks then run twice."""

    def step(self, closure=None):
        return super().step(closure)


def test_a_step_inside_a_step_is_skipped_once_and_counted_once(d2_log):
    model = nn.Linear(2, 1)
    torch.optim.SGD(model.parameters(), lr=0.1)  # its class is patched, too
    optimizer = StepInStep(model.parameters(), lr=0.1)
    skip_nonfinite_steps(optimizer, model)
    with pytest.raises(FloatingPointError, match="20 of the last 20"):
        for i in range(30):
            model.weight.grad = torch.full_like(model.weight, math.inf)
            with EventStorage(i):
                optimizer.step()
    assert i == 19 and "(20 so far)" in d2_log.records[-1].getMessage()


def test_a_model_without_buffers_skips_too():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    skip_nonfinite_steps(optimizer, model)
    with EventStorage():
        model(torch.full((1, 2), math.nan)).sum().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
