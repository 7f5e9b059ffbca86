"""AGVM in loops of projects' own: accumulation over iterations, closures, checkpointing."""

from __future__ import annotations
import logging
import pytest
import reference
import torch
from torch.utils.checkpoint import checkpoint
from toy import MODULES, ToyDetector, batch, loss, parameter_names

from agvm_d2 import AGVM, Settings, param_groups, split_param_groups
from agvm_d2.modules import assign_modules
from agvm_d2.moments import TensorTap
from agvm_d2.precondition import preconditioner
from agvm_d2.solver import clip_gradients, skip_nonfinite_steps

HALVES = 2  # micro-batches of an iteration


def make(model, optimizer=None, **settings):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1e-6)  # weights all but stay
    split_param_groups(optimizer, model)
    settings = {"interval": 1, "start_iter": 0, "momentum": 0.5, **settings}
    return AGVM(model, optimizer, Settings(**settings), micro_batches=HALVES), optimizer


def units(iteration):
    return [batch(4, seed=10 * iteration + k) for k in range(HALVES)]


def backward(agvm, iteration):
    for unit in units(iteration):
        (loss(agvm.model, unit) / HALVES).backward()
        agvm.micro_batch_done(1 / HALVES)
    agvm.backward_done()


def variances(model, iteration):
    gradients = reference.unit_gradients(model, loss, units(iteration))
    vectors = [reference.flatten(gradients, n) for n in parameter_names(model).values()]
    return [reference.pairwise_variance(v) for v in vectors]


def warnings_in(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.fixture
def log(caplog):
    logger = logging.getLogger("detectron2")
    before, logger.propagate = logger.propagate, True
    yield caplog
    logger.propagate = before


@pytest.mark.parametrize("every", [2, 3])
def test_accumulation_over_iterations_measures_gradients_that_stand_alone(every, log):
    """Zeroed and stepped every k-th time: the gradients between are sums of old and new."""
    model = ToyDetector()
    agvm, optimizer = make(model)
    measured = {}
    for i in range(7):
        agvm.begin(i)
        if i % every == 0:
            optimizer.zero_grad()
        backward(agvm, i)
        if i % every == every - 1:
            optimizer.step()
        agvm.end()
        if agvm.measured:
            measured[i] = agvm.modulator.variance.tolist()
    assert list(measured) == list(range(0, 7, every))
    for i, found in measured.items():
        assert found == pytest.approx(variances(model, i), rel=1e-3)
    assert len(warnings_in(log)) == 1 and "accumulates gradients" in warnings_in(log)[0]


def test_a_due_measurement_waits_for_an_iteration_that_can_be_measured(log):
    """Due at 5, 15, 25; zeroed at 0, 4, 8 ...: measured at 8, 16, 28."""
    model = ToyDetector()
    agvm, optimizer = make(model, start_iter=5, interval=10)
    measured = []
    for i in range(30):
        agvm.begin(i)
        if i % 4 == 0:
            optimizer.zero_grad()
        backward(agvm, i)
        if i % 4 == 3:
            optimizer.step()
        agvm.end()
        measured += [i] * agvm.measured
    assert measured == [8, 16, 28]


def test_gradients_set_to_zero_instead_of_none_are_no_accumulation(log):
    agvm, optimizer = make(ToyDetector())
    for i in range(3):
        agvm.begin(i)
        optimizer.zero_grad(set_to_none=False)
        backward(agvm, i)
        optimizer.step()
        agvm.end()
        assert agvm.measured
    assert not warnings_in(log)


def test_a_step_with_a_closure_measures_the_backward_pass_inside_it():
    model, plain = ToyDetector(), ToyDetector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agvm, _ = make(model, optimizer, momentum=0.0, ratio_range=(0.01, 100.0))
    agvm.begin(0)

    def closure():
        optimizer.zero_grad()
        backward(agvm, 0)
        return torch.tensor(3.0)

    assert optimizer.step(closure) == 3.0  # the closure's value comes through
    assert agvm.measured
    expected = variances(plain, 0)
    assert agvm.modulator.variance.tolist() == pytest.approx(expected, rel=1e-4)
    for unit in units(0):
        (loss(plain, unit) / HALVES).backward()
    factors = agvm.modulator.factors.tolist()
    assert len(set(factors)) == len(MODULES)
    new = dict(model.named_parameters())
    for names, factor in zip(parameter_names(plain).values(), factors, strict=True):
        for name in names:
            p = plain.get_parameter(name)
            torch.testing.assert_close(new[name], p - 0.1 * factor * p.grad)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1] * len(MODULES)


class Levels(torch.nn.Module):
    """A head shared by three levels, with activation checkpointing."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = torch.nn.Linear(6, 8), torch.nn.Linear(8, 1)
        self.reentrant = reentrant

    def forward(self, x):
        levels = [self.backbone(x).tanh() * (i + 1) for i in range(3)]
        outs = [checkpoint(self.head, level, use_reentrant=self.reentrant) for level in levels]
        return sum(out.square().mean() for out in outs)


def test_reentrant_checkpointing_of_a_shared_head_gives_the_whole_passes_moments():
    """A parameter's hook fires once per use; S1 is that of the sum. Twice, since from then on the
    tap knows which parameters do."""
    found = {}
    for reentrant in (False, True):
        model = Levels(reentrant)
        tap = TensorTap(assign_modules(model))
        for seed in (1, 2):
            model.zero_grad()
            tap.start()
            torch.manual_seed(seed)
            for weight in (0.5, 0.25, 0.25):
                (model(torch.randn(4, 6)) * weight).backward()
                tap.unit_done(weight)
            tap.average_done()
            moments = tap.collect()
            found[reentrant, seed] = torch.stack([moments.unit_sq, moments.mean_sq])
    for seed in (1, 2):
        torch.testing.assert_close(found[True, seed], found[False, seed])


def test_a_use_that_comes_only_later_is_not_measured_wrongly():
    """The first unit uses the head once, the second twice: its first gradient is lost, so S1 of
    that measurement is unknown. The next one is right."""
    model = Levels(True)
    tap = TensorTap(assign_modules(model))

    def measure(uses):
        model.zero_grad()
        tap.start()
        for count in uses:
            level = model.backbone(torch.ones(2, 6)).tanh()
            outs = [
                checkpoint(model.head, level * (i + 1), use_reentrant=True) for i in range(count)
            ]
            (sum(out.square().mean() for out in outs) / 2).backward()
            tap.unit_done(0.5)
        tap.average_done()
        return tap.collect()

    first = measure([1, 2])
    assert first.unit_sq[0].isfinite() and first.unit_sq[1].isnan() and first.variance[1].isnan()
    assert measure([1, 2]).unit_sq.isfinite().all()


@pytest.mark.parametrize(
    "clip_type, value", [("full_model", 0.01), ("norm", 0.01), ("value", 1e-3)]
)
def test_fused_optimizers_are_clipped_after_unscaling(clip_type, value):
    """A GradScaler leaves the unscaling to a fused optimizer's step, after its pre-hooks."""
    steps = []
    for fused in (False, True):
        model = ToyDetector()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
        skip_nonfinite_steps(optimizer, model)
        clip_gradients(optimizer, clip_type, value)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        scaler.scale(loss(model, batch(4))).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - before)
    torch.testing.assert_close(steps[1], steps[0])
    if clip_type == "full_model":
        assert float(steps[1].norm()) == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_grad_scaler_leaves_out_counts_one(fused):
    """It leaves the decision to a fused optimizer's step, whose gradients stay."""
    model = ToyDetector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    split_param_groups(optimizer, model)
    settings = Settings(rule="gain", schedule="gain", base_batch_size=2, start_iter=0, interval=1)
    agvm = AGVM(model, optimizer, settings, micro_batches=HALVES, batch_size=8, max_iter=100)
    agvm.follow(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1.0))
    agvm._progress.gains.fill_(3.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    made = []
    for i in range(2):
        agvm.begin(i)
        optimizer.zero_grad()
        for unit in units(i):
            scaler.scale((torch.inf if i else 1.0) * loss(model, unit) / HALVES).backward()
            agvm.micro_batch_done(1 / HALVES)
        agvm.backward_done()
        before = agvm.progress
        scaler.step(optimizer)
        scaler.update()
        agvm.end()
        made.append(agvm.progress - before)
    assert made[0] > 1 and made[1] == 1


def test_a_loop_that_cannot_be_measured_fails_in_its_first_iteration():
    agvm, optimizer = make(ToyDetector(), start_iter=1000)
    agvm.begin(0)
    for unit in units(0):
        loss(agvm.model, unit).backward()
        agvm.micro_batch_done(0.5)
    with pytest.raises(RuntimeError, match=r"did not see the averaged gradient.*backward_done"):
        optimizer.step()


def test_a_loop_without_the_micro_batches_it_was_set_up_for_fails_in_its_first_iteration():
    agvm, optimizer = make(ToyDetector(), start_iter=1000)
    agvm.begin(0)
    loss(agvm.model, batch(4)).backward()
    agvm.backward_done()
    with pytest.raises(RuntimeError, match="set up for 2 micro-batches, .*MICRO_BATCH_SIZE"):
        optimizer.step()


@pytest.mark.parametrize("estimator", ["pairwise", "split"])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_short_last_batch_is_measured_where_it_has_two_gradients(estimator, passes, log):
    """An epoch's last one may have fewer pieces than the others."""
    model = ToyDetector()
    agvm, optimizer = make(model, estimator=estimator)
    agvm.micro_batches = agvm.num_units = 3
    if estimator == "split":
        agvm.attach()  # halves of two and one
    for i, count in enumerate((3, passes, 3)):
        agvm.begin(i)
        optimizer.zero_grad()
        for k in range(count):
            (loss(model, batch(4, seed=k)) / count).backward()
            agvm.micro_batch_done(1 / count)
        agvm.backward_done()
        optimizer.step()
        agvm.end()
        short = passes < 2 or estimator == "split"
        assert agvm.measured == (count == 3 or not short)
    assert len(warnings_in(log)) == short and all("short last" in w for w in warnings_in(log))


def test_a_measurement_that_was_due_is_made_after_a_resume_too():
    model = ToyDetector()
    agvm, optimizer = make(model, interval=10, start_iter=1)
    for i in range(3):  # iteration 1, which was due, adds to 0's gradients
        agvm.begin(i)
        backward(agvm, i)
        agvm.end()
    assert agvm.modulator.num_units == 0
    again, optimizer = make(model, interval=10, start_iter=1)
    again.load_state_dict(agvm.state_dict())
    optimizer.zero_grad()
    again.begin(3)
    backward(again, 3)
    optimizer.step()
    assert again.measured


def test_the_capture_of_a_cuda_graph_is_refused(monkeypatch):
    agvm, _ = make(ToyDetector())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        agvm.begin(0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    agvm.begin(0)


def test_the_first_iteration_is_tried_and_thrown_away():
    model, plain = ToyDetector(), ToyDetector()
    agvm, optimizer = make(model, start_iter=2)
    for i in range(2):
        agvm.begin(i)
        optimizer.zero_grad()
        backward(agvm, i)
        optimizer.step()
        agvm.end()
        assert not agvm.measured and agvm.modulator.num_units == 0
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=1e-6)
    for i in range(2):
        plain_optimizer.zero_grad()
        for unit in units(i):
            (loss(plain, unit) / HALVES).backward()
        plain_optimizer.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_parameters_unfrozen_while_training_are_measured():
    model = ToyDetector()
    for p in model.backbone.bottom_up[0].parameters():
        p.requires_grad_(False)
    agvm, optimizer = make(model)
    for i in range(2):
        if i == 1:
            for p in model.backbone.bottom_up[0].parameters():
                p.requires_grad_(True)
        agvm.begin(i)
        optimizer.zero_grad()
        backward(agvm, i)
        optimizer.step()
        agvm.end()
        gradients = reference.unit_gradients(model, loss, units(i))
        names = [n for n in gradients[0] if n.startswith("backbone.bottom_up")]
        assert len(names) == (4 if i else 2)
        wanted = reference.moments(reference.flatten(gradients, names))
        assert agvm.modulator.last.unit_sq[0] == pytest.approx(wanted[0], rel=1e-3)


@pytest.mark.parametrize("at", [4, 5])  # of which one is measured
@pytest.mark.parametrize("frozen", [True, False])
def test_groups_added_while_training_have_their_modules_factor(at, frozen):
    model = ToyDetector()
    late = [*model.backbone.bottom_up[0].parameters()]
    for p in late:
        p.requires_grad_(not frozen)
    others = [p for p in model.parameters() if all(p is not one for one in late)]
    agvm, optimizer = make(model, torch.optim.SGD(others, lr=1e-6), interval=2)
    seen = []
    optimizer.register_step_post_hook(lambda o, *_: seen.append(o.param_groups[-1]["lr"]))
    for i in range(8):
        if i == at:
            for p in late:
                p.requires_grad_(True)
            optimizer.add_param_group({"params": late, "lr": 1e-6})
        agvm.begin(i)
        model.zero_grad()
        backward(agvm, i)
        agvm.modulator.factors[0] = 3.0  # the backbone's
        optimizer.step()
        agvm.end()
    # Measured at every second: halfway from 3 to the anchor's 1.
    assert seen[at:] == pytest.approx([1e-6 * (3.0 if i % 2 else 2.0) for i in range(at, 8)])
    assert optimizer.param_groups[-1]["lr"] == 1e-6 and len(optimizer.param_groups) == 5


@pytest.mark.parametrize("left_out", ["backbone.bottom_up.0.weight", "roi_heads"])
def test_parameters_of_no_optimizer_are_not_measured(left_out):
    """Nobody clears their gradients, which grow over iterations."""
    model = ToyDetector()
    kept = [p for name, p in model.named_parameters() if not name.startswith(left_out)]
    agvm, optimizer = make(model, torch.optim.SGD(kept, lr=1e-6), anchor="backbone")
    for i in range(3):
        agvm.begin(i)
        optimizer.zero_grad()
        backward(agvm, i)
        optimizer.step()
        agvm.end()
        assert agvm.measured
        gradients = reference.unit_gradients(model, loss, units(i))
        for module, names in parameter_names(model).items():
            names = [name for name in names if not name.startswith(left_out)]
            if names:
                wanted = reference.moments(reference.flatten(gradients, names))
                found = agvm.modulator.last.mean_sq[agvm.modulator.names.index(module)]
                assert found == pytest.approx(wanted[1], rel=1e-3)
            else:
                assert module not in agvm.modules


def test_an_optimizer_of_another_model_is_refused():
    optimizer = torch.optim.SGD(ToyDetector().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="has none of the model's trainable parameters"):
        AGVM(ToyDetector(), optimizer, micro_batches=HALVES)


def test_autograd_grad_in_between_is_no_part_of_a_gradient():
    """As in losses weighted by their gradients' norms, such as GradNorm's."""
    model = ToyDetector()
    agvm, optimizer = make(model)
    for i in range(3):
        agvm.begin(i)
        optimizer.zero_grad()
        for unit in units(i):
            total = loss(model, unit) / HALVES
            torch.autograd.grad(7 * total, [*model.roi_heads.parameters()], retain_graph=True)
            total.backward()
            agvm.micro_batch_done(1 / HALVES)
        agvm.backward_done()
        optimizer.step()
        agvm.end()
        assert agvm.modulator.variance.tolist() == pytest.approx(variances(model, i), rel=1e-3)


def test_a_gradient_that_overflows_is_measured_again():
    model = ToyDetector()
    agvm, optimizer = make(model, interval=10)
    measured = []
    for i in range(3):
        agvm.begin(i)
        measured.append(agvm.tap.measuring)
        optimizer.zero_grad()
        for unit in units(i):
            ((1.0 if i else torch.inf) * loss(model, unit) / HALVES).backward()
            agvm.micro_batch_done(1 / HALVES)
        agvm.backward_done()
        agvm.end()  # without a step, as a GradScaler leaves it out
    assert measured == [True, True, False]


def test_an_old_torchs_compile_is_refused(monkeypatch):
    """It took the hooks of every optimizer's step away, and said nothing."""
    model = ToyDetector()

    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    agvm, _ = make(model, Own(model.parameters(), lr=0.1))
    monkeypatch.setattr(param_groups, "OLD_COMPILE", True)
    agvm.begin(0)
    bare = Own.step.__wrapped__
    bare.hooked = True
    monkeypatch.setattr(Own, "step", bare)
    with pytest.raises(RuntimeError, match=r"torch.compile of torch .* of Own.step .*torch 2.3"):
        agvm.begin(1)


def test_a_module_unfrozen_while_training_is_refused():
    model = ToyDetector()
    for p in model.roi_heads.parameters():
        p.requires_grad_(False)
    agvm, _ = make(model)
    for p in model.roi_heads.parameters():
        p.requires_grad_(True)
    with pytest.raises(
        ValueError, match="set up for the modules backbone, fpn, rpn, but .*box_head"
    ):
        agvm.begin(0)


def test_a_wrapper_without_hooks_is_named():
    """Lookahead and others do not call Optimizer.__init__."""
    import pytorch_optimizer

    model = ToyDetector()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapper = pytorch_optimizer.Lookahead(inner)
    with pytest.raises(TypeError, match="Lookahead has no hooks.*inside it"):
        split_param_groups(wrapper, model)
    with pytest.raises(TypeError, match="Lookahead has no hooks"):
        AGVM(model, wrapper, micro_batches=2)
    # The way out that the message names.
    split_param_groups(inner, model)
    agvm = AGVM(model, inner, Settings(interval=1, momentum=0.0), micro_batches=2)
    wrapper = pytorch_optimizer.Lookahead(inner)
    agvm.begin(0)
    backward(agvm, 0)
    wrapper.step()
    assert agvm.measured and agvm.modulator.factors[1:].ne(1).all()


def test_names_inside_wrappers_are_the_models_own():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain = {k: len(v) for k, v in assign_modules(ToyDetector()).items()}
    model = ToyDetector()
    model.backbone.fpn_lateral2 = checkpoint_wrapper(model.backbone.fpn_lateral2)
    model.backbone.bottom_up = checkpoint_wrapper(model.backbone.bottom_up)
    model.roi_heads = torch.compile(model.roi_heads)
    assert {k: len(v) for k, v in assign_modules(model).items()} == plain
    assert {k: len(v) for k, v in assign_modules(torch.compile(model)).items()} == plain


def test_adams_elements_without_a_second_moment_do_not_count():
    """A rare class's first sample: its row of the predictor, divided by eps alone, would be 1e8
    times as long as all others together."""
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.AdamW([weight], lr=0.0, eps=1e-8)
    weight.grad = torch.tensor([[1.0, -2.0, 4.0], [0.0, 0.0, 0.0]])
    optimizer.step()
    found = preconditioner(optimizer)(weight, torch.tensor([[1.0, 2.0, 0.0], [5.0, 0.0, 7.0]]))
    root = 0.001**0.5  # v = (1 - beta2) g^2
    wanted = torch.tensor([[1 / root, 1 / root, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name, said", [("RMSprop", True), ("SGD", False), ("NAdam", False)])
def test_an_optimizer_that_scales_otherwise_is_named(name, said, d2_log):
    optimizer = getattr(torch.optim, name)([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    assert (preconditioner(optimizer) is not None) == (name == "NAdam")
    assert (f"as {name} gets them, not as it scales them" in d2_log.text) == said


@pytest.mark.parametrize("name", ["FusedAdam", "AdamW8bit", "Lion"])
def test_so_is_one_of_another_package(name, d2_log):
    kind = type(name, (torch.optim.SGD,), {})
    assert preconditioner(kind([torch.nn.Parameter(torch.zeros(2))], lr=0.1)) is None
    assert f"as {name} gets them" in d2_log.text


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_one_huge_gradient_or_a_change_of_scale_does_not_rule_the_noise_scale(scale):
    """S1 = 2, S2 = 1 of K = 4: tr Sigma = 4/3, |G|^2 = 2/3 and B = 2 units, whatever the scale."""
    from agvm_d2.modulator import Modulator
    from agvm_d2.moments import pairwise_moments

    one = torch.ones(1, dtype=torch.float64)
    modulator = Modulator(["head"], lambda moments: one, momentum=0.9)
    for k in range(20):
        factor = scale if k in (3, 4) or k > 10 else 1.0
        modulator.update(pairwise_moments(2 * one * factor, one * factor, 4))
    assert modulator.noise_scale(64) == pytest.approx({"head": 32.0, "model": 32.0})


def _without_ddp(averages, kind=torch.optim.SGD, iterations=1):
    """Two workers, no DistributedDataParallel; gradients averaged by the loop, or not at all."""
    import torch.distributed as dist

    model = ToyDetector()
    optimizer = split_param_groups(kind(model.parameters(), lr=0.1), model)
    agvm = AGVM(model, optimizer, Settings(interval=1, momentum=0.0))
    for i in range(iterations):
        optimizer.zero_grad()
        agvm.begin(i)
        loss(model, batch(4, seed=dist.get_rank())).backward()
        for p in model.parameters() if averages else ():
            dist.all_reduce(p.grad)
            p.grad /= 2
        agvm.backward_done()
        try:
            optimizer.step()
        except RuntimeError as error:
            return str(error)
        agvm.end()
    return agvm.modulator.variance.tolist()


def test_workers_without_ddp_average_themselves_or_are_refused(workers):
    said = workers(2).run(_without_ddp, False)
    assert all("not averaged over the workers" in message for message in said)
    model = ToyDetector()
    gradients = reference.unit_gradients(model, loss, [batch(4, seed=0), batch(4, seed=1)])
    vectors = [reference.flatten(gradients, n) for n in parameter_names(model).values()]
    wanted = [reference.pairwise_variance(v) for v in vectors]
    for found in workers(2).run(_without_ddp, True):
        assert found == pytest.approx(wanted, rel=1e-4)


def test_workers_without_ddp_and_with_adam_are_looked_at_from_the_second_iteration_on(workers):
    """Before the first step there are no second moments, by which both gradients are 0."""
    said = workers(2).run(_without_ddp, False, torch.optim.AdamW, 2)
    assert all("not averaged over the workers" in message for message in said)
    one, other = workers(2).run(_without_ddp, True, torch.optim.AdamW, 2)
    assert one == other and all(0 < value < 2 for value in one)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_second_moments_are_those_that_the_optimizer_has_now(amsgrad):
    model = ToyDetector()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=amsgrad)
    precondition = preconditioner(optimizer)
    weight, ones = model.proposal_generator.weight, torch.ones(1, 8)
    assert not precondition(weight, ones).any()  # before the first step
    loss(model, batch(4)).backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())  # makes new dicts of state and groups
    loss(model, batch(4, seed=1, scale=0.01)).backward()
    optimizer.step()
    v = optimizer.state[weight]["max_exp_avg_sq" if amsgrad else "exp_avg_sq"]
    assert torch.equal(precondition(weight, ones), 1 / (v.sqrt() + 1e-8))
    other = torch.nn.Parameter(ones.clone())
    assert not precondition(other, ones).any()  # not the optimizer's


def test_a_module_frozen_while_training_is_left_out():
    model = ToyDetector()
    optimizer = split_param_groups(torch.optim.SGD(model.parameters(), lr=0.01), model)
    agvm = AGVM(model, optimizer, Settings(interval=1), micro_batches=2)
    for i in range(4):
        if i == 2:
            model.backbone.fpn_lateral2.requires_grad_(False)
        agvm.begin(i)
        optimizer.zero_grad()
        for k in range(2):
            (loss(model, batch(2, seed=2 * i + k)) / 2).backward()
            agvm.micro_batch_done(0.5)
        agvm.backward_done()
        optimizer.step()
        agvm.end()
    last = dict(zip(agvm.modulator.names, agvm.modulator.last.unit_sq.tolist(), strict=True))
    assert last["fpn"] == 0 and last["backbone"] > 0 and last["rpn"] > 0
