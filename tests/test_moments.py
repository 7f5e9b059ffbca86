"""Moments from every way of tapping gradients, against tests/reference.py."""

import functools
import pytest
import reference
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from toy import ToyDetector, batch, ddp_moments, loss, parameter_names, same_bits, vectors

from agvm_d2.agvm import build_tap
from agvm_d2.modules import assign_modules
from agvm_d2.moments import TensorTap
from agvm_d2.precondition import preconditioner
from agvm_d2.split import SplitBucketTap
from agvm_d2.variance import pairwise_variance


def expected(model, units, weights=None) -> dict[str, tuple[float, float]]:
    return {m: reference.moments(v, weights) for m, v in vectors(model, units).items()}


def assert_equal(moments, wanted, rel=1e-5):
    for i, (s1, s2) in enumerate(wanted.values()):
        assert float(moments.unit_sq[i]) == pytest.approx(s1, rel=rel)
        assert float(moments.mean_sq[i]) == pytest.approx(s2, rel=rel)


# One process


def micro_batches(model, tap, units, weights):
    tap.start()
    model.zero_grad()
    for unit, weight in zip(units, weights, strict=True):
        (loss(model, unit) * weight).backward()
        tap.unit_done(weight)
    tap.average_done()
    return tap.collect()


@pytest.mark.parametrize("sizes", [(4, 4), (3, 3, 3, 3), (5, 2, 1)])
def test_micro_batches_equal_reference(sizes):
    model = ToyDetector()
    data = batch(sum(sizes))
    units = [data[sum(sizes[:i]) :][:size] for i, size in enumerate(sizes)]
    weights = [size / sum(sizes) for size in sizes]
    tap = TensorTap(assign_modules(model))
    moments = micro_batches(model, tap, units, weights)
    assert moments.num_units == len(sizes)
    assert_equal(moments, expected(model, units, weights))


def test_unequal_micro_batches_leave_the_noise_unbiased():
    # Gradients with mean 0.5 and variance 1 an image in 200 dimensions, units of 6, 1 and 1 images:
    # E[S1 - S2] = (K - 1) tr(Sigma)/batch = 2 * 200/8 = 50.
    g = torch.Generator().manual_seed(0)
    param, total = nn.Parameter(torch.zeros(200, dtype=torch.float64)), 0.0
    tap = TensorTap({"all": [param]})
    for _ in range(500):
        tap.start()
        param.grad = None
        for images in (6, 1, 1):
            unit = 0.5 + torch.randn(200, generator=g, dtype=torch.float64) / images**0.5
            ((param * unit).sum() * images / 8).backward()
            tap.unit_done(images / 8)
        tap.average_done()
        moments = tap.collect()
        total += float(moments.unit_sq - moments.mean_sq) / 500
    assert total == pytest.approx(50, rel=0.02)


def test_tensor_hooks_are_there_only_while_measuring():
    model = ToyDetector()
    tap = TensorTap(assign_modules(model))
    hooks = [len(p._backward_hooks or ()) for p in model.parameters()]
    assert not any(hooks)
    micro_batches(model, tap, [batch(2), batch(2, seed=1)], [0.5, 0.5])
    assert not any(len(p._backward_hooks or ()) for p in model.parameters())
    tap.start()
    hooks = [len(p._backward_hooks) for p in model.parameters()]
    assert all(hooks)
    tap.start()  # a measurement that was not collected is dropped
    assert [len(p._backward_hooks) for p in model.parameters()] == hooks


def test_a_module_without_a_gradient_has_zero_moments():
    model = ToyDetector()
    tap = TensorTap(assign_modules(model))
    tap.start()
    for unit in (batch(2), batch(2, seed=1)):
        (model(unit)["loss_rpn"] / 2).backward()
        tap.unit_done(0.5)
    tap.average_done()
    moments = tap.collect()
    assert moments.unit_sq[3] == 0 and moments.mean_sq[3] == 0
    assert (moments.unit_sq[:3] > 0).all()


def test_a_module_that_only_some_passes_reach():
    """What an earlier pass left is not counted again."""
    model = ToyDetector()
    tap = TensorTap(assign_modules(model))
    tap.start()
    (loss(model, batch(2)) / 2).backward()
    tap.unit_done(0.5)
    (model(batch(2, seed=1))["loss_rpn"] / 2).backward()
    tap.unit_done(0.5)
    tap.average_done()
    moments = tap.collect()
    vector = vectors(ToyDetector(), [batch(2)])["box_head"][0]
    s1, s2 = reference.moments([vector, torch.zeros_like(vector)])
    assert float(moments.unit_sq[3]) == pytest.approx(s1, rel=1e-5)
    assert float(moments.mean_sq[3]) == pytest.approx(s2, rel=1e-5)


def test_collect_without_the_average_says_what_to_call():
    model = ToyDetector()
    tap = TensorTap(assign_modules(model))
    tap.start()
    loss(model, batch(2)).backward()
    with pytest.raises(RuntimeError, match="AGVMHook.after_backward"):
        tap.collect()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_moments_are_of_the_preconditioned_gradients(kind):
    model = ToyDetector()
    optimizer = kind(model.parameters(), lr=0.01, eps=1e-3)
    for seed in range(3):
        optimizer.zero_grad()
        loss(model, batch(4, seed=seed)).backward()
        optimizer.step()
    units = [batch(4, seed=7), batch(4, seed=8)]
    gradients = reference.unit_gradients(model, loss, units)
    for gradient in gradients:
        for name, p in model.named_parameters():
            v = optimizer.state[p]["exp_avg_sq"].double()
            gradient[name] = gradient[name] / (v.sqrt() + 1e-3)
    wanted = {
        module: reference.moments(reference.flatten(gradients, names))
        for module, names in parameter_names(model).items()
    }
    tap = TensorTap(assign_modules(model), preconditioner(optimizer))
    assert_equal(micro_batches(model, tap, units, [0.5, 0.5]), wanted)


def test_adam_without_a_state_yet_measures_nothing():
    model = ToyDetector()
    optimizer = torch.optim.AdamW(model.parameters())
    tap = TensorTap(assign_modules(model), preconditioner(optimizer))
    moments = micro_batches(model, tap, [batch(2), batch(2, seed=1)], [0.5, 0.5])
    assert moments.unit_sq.tolist() == moments.mean_sq.tolist() == [0.0] * 4
    assert moments.variance.isnan().all()


# Workers


def _build_tap(ddp, modules):
    return build_tap(ddp, modules)


def _taken_slot(ddp, modules):
    ddp.register_comm_hook(ddp.process_group, default_hooks.allreduce_hook)
    return build_tap(ddp, modules)


@pytest.mark.parametrize("make_tap", [_build_tap, _taken_slot])
def test_the_bits_do_not_depend_on_the_buckets(workers, make_tap):
    """A resumed run may lay them out differently."""
    units = [batch(4, seed=rank) for rank in range(2)]
    found = [
        workers(2).run(functools.partial(ddp_moments, bucket_cap_mb=size), make_tap, units)[0]
        for size in (0.0005, 0.003, 25)
    ]
    assert same_bits(found)


@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
        {"static_graph": True},
    ],
    ids=str,
)
def test_workers_equal_reference_with_the_same_bits(workers, num, options):
    units = [batch(4, seed=rank) for rank in range(num)]
    moments = workers(num).run(functools.partial(ddp_moments, **options), _build_tap, units)
    assert same_bits(moments)
    assert moments[0].num_units == num
    assert_equal(moments[0], expected(ToyDetector(width=32), units))


def test_a_communication_hook_of_the_projects_own_is_no_hindrance(workers):
    units = [batch(4, seed=rank) for rank in range(2)]
    results = workers(2).run(ddp_moments, _taken_slot, units)
    assert same_bits(results)
    assert_equal(results[0], expected(ToyDetector(width=32), units))


def _compressed(make_tap, ddp, modules):
    return make_tap(ddp, modules, inner=(None, default_hooks.fp16_compress_hook))


@pytest.mark.parametrize("make_tap", [build_tap, SplitBucketTap])
def test_half_precision_compression_composes(workers, make_tap):
    units = [batch(4, seed=rank) for rank in range(2)]
    make = functools.partial(_compressed, make_tap)
    results = workers(2).run(ddp_moments, make, units)
    assert same_bits(results)
    # S1 is of the float32 gradients, S2 of what was averaged in float16.
    wanted = expected(ToyDetector(width=32), units)
    assert [float(v) for v in results[0].unit_sq] == pytest.approx(
        [s1 for s1, _ in wanted.values()], rel=1e-5
    )
    assert [float(v) for v in results[0].mean_sq] == pytest.approx(
        [s2 for _, s2 in wanted.values()], rel=2e-3
    )
    exact = torch.tensor([s2 for _, s2 in wanted.values()], dtype=torch.float64)
    assert ((results[0].mean_sq / exact - 1).abs() > 1e-6).any()  # and it was


def _adam(units, scaled):
    """In a worker: AdamW's moments under DDP, also with a loss scale that phi must not see."""
    model = ToyDetector(width=32)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.002)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
    tap = build_tap(ddp, assign_modules(model), optimizer=optimizer)
    for seed in range(3):
        optimizer.zero_grad()
        loss(ddp, batch(4, seed=50 + seed)).backward()  # the same on all workers
        optimizer.step()
    tap.start()
    optimizer.zero_grad()
    (loss(ddp, units[dist.get_rank()]) * (1024.0 if scaled else 1.0)).backward()
    return tap.collect()


@pytest.mark.parametrize("scaled", [False, True])
def test_adam_under_ddp(workers, scaled):
    units = [batch(4, seed=rank) for rank in range(2)]
    results = workers(2).run(_adam, units, scaled)
    assert same_bits(results)
    model = ToyDetector(width=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
    for seed in range(3):
        optimizer.zero_grad()
        loss(model, batch(4, seed=50 + seed)).backward()
        optimizer.step()
    gradients = reference.unit_gradients(model, loss, units)
    for i, names in enumerate(parameter_names(model).values()):
        vectors = []
        for gradient in gradients:
            parts = []
            for name in names:
                v = optimizer.state[model.get_parameter(name)]["exp_avg_sq"].double()
                parts.append((gradient[name] / (v.sqrt() + 1e-3)).reshape(-1))
            vectors.append(torch.cat(parts))
        found = pairwise_variance(results[0].unit_sq[i], results[0].mean_sq[i], 2)
        assert found == pytest.approx(reference.pairwise_variance(vectors), abs=1e-5)


def _shared_and_frozen(units):
    model = shared_and_frozen()
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.002)
    tap = build_tap(ddp, assign_modules(model))
    tap.start()
    loss(ddp, units[dist.get_rank()]).backward()
    return tap.collect()


def shared_and_frozen():
    model = ToyDetector(width=32)
    model.roi_heads.box_head.weight = model.proposal_generator.weight
    model.backbone.bottom_up[0].requires_grad_(False)
    return model


def test_shared_and_frozen_parameters_under_ddp(workers):
    units = [batch(4, seed=rank) for rank in range(2)]
    results = workers(2).run(_shared_and_frozen, units)
    model = shared_and_frozen()
    gradients = reference.unit_gradients(model, loss, units)
    for i, names in enumerate(
        (
            ["backbone.bottom_up.2.weight", "backbone.bottom_up.2.bias"],
            ["backbone.fpn_lateral2.weight", "backbone.fpn_lateral2.bias"],
            ["proposal_generator.weight", "proposal_generator.bias"],
            ["roi_heads.box_head.bias"],
        )
    ):
        s1, s2 = reference.moments(reference.flatten(gradients, names))
        assert float(results[0].unit_sq[i]) == pytest.approx(s1, rel=1e-5)
        assert float(results[0].mean_sq[i]) == pytest.approx(s2, rel=1e-5)


def test_compression_under_micro_batches_is_registered_all_the_same(workers):
    assert workers(2).run(_compressed_micro_batches) == [True, True]


def _compressed_micro_batches():
    calls = []

    def inner(state, bucket):
        calls.append(bucket.index())
        return default_hooks.allreduce_hook(state, bucket)

    ddp = DistributedDataParallel(ToyDetector())
    build_tap(ddp, assign_modules(ddp), micro_batches=2, inner=(ddp.process_group, inner))
    loss(ddp, batch(2)).backward()
    return calls == [0]


def _count_collectives(interval):
    """In a worker: (name, bytes) of every collective call by step, measured or not."""
    model = ToyDetector(width=32)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.002)
    ddp.register_comm_hook(None, default_hooks.allreduce_hook)  # DDP's own calls are not seen
    tap = build_tap(ddp, assign_modules(model)) if interval else None
    calls: list = []
    originals = {}
    for name in ("all_reduce", "all_gather", "broadcast", "reduce", "reduce_scatter", "barrier"):
        originals[name] = original = getattr(dist, name)

        def spy(*args, _name=name, _original=original, **kwargs):
            size = args[0].numel() * args[0].element_size() if args else 0
            calls.append((_name, size))
            return _original(*args, **kwargs)

        setattr(dist, name, spy)
    steps = []
    try:
        for step in range(6):
            calls.clear()
            measured = bool(interval) and step % interval == 0
            if measured:
                tap.start()
            ddp.zero_grad()
            loss(ddp, batch(4, seed=step)).backward()
            if measured:
                tap.collect()
            steps.append((measured, list(calls)))
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return steps


def test_a_measurement_costs_one_small_all_reduce_and_other_steps_none(workers):
    steps = workers(2).run(_count_collectives, 3)[0][2:]  # after buckets are rebuilt
    plain = [calls for measured, calls in steps if not measured]
    measuring = [calls for measured, calls in steps if measured]
    assert len({len(calls) for calls in plain}) == 1  # one a bucket
    parameter_bytes = 4 * sum(p.numel() for p in ToyDetector(width=32).parameters())
    for calls in plain:
        assert sum(size for _, size in calls) == parameter_bytes
    for calls in measuring:
        assert len(calls) == len(plain[0]) + 1
        name, size = calls[-1]
        assert name == "all_reduce"
        assert size == 8 * (2 * 4 + 1) <= 24 * 4 + 64  # S1 and S2 of 4 modules, and K


def _gradients(tapped, measured):
    model = ToyDetector(width=32)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.002)
    tap = build_tap(ddp, assign_modules(model)) if tapped else None
    for step in range(3):
        if measured:
            tap.start()
        ddp.zero_grad()
        loss(ddp, batch(3, seed=10 * step + dist.get_rank())).backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("measured", [False, True])
def test_gradients_are_bit_identical_to_plain_ddp(workers, measured):
    pool = workers(3)  # 1/3 is where a division and a multiplication differ
    plain = pool.run(_gradients, False, False)[0]
    tapped = pool.run(_gradients, True, measured)[0]
    assert all(torch.equal(a, b) for a, b in zip(plain, tapped, strict=True))


def _one_sided(case):
    """In a worker: rank 1's box head gets no gradient, or a NaN."""
    model = ToyDetector(width=32)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.002, find_unused_parameters=True)
    tap = build_tap(ddp, assign_modules(model))
    for _ in range(2):
        tap.start()
        ddp.zero_grad()
        losses = ddp(batch(4, seed=dist.get_rank()))
        odd = dist.get_rank() == 1
        if case == "none" and odd:
            losses = {"loss_rpn": losses["loss_rpn"]}
        total = sum(losses.values())
        if case == "nan" and odd:
            total = losses["loss_rpn"] + losses["loss_box"] * float("nan")
        total.backward()
        moments = tap.collect()
    return moments


def test_no_gradient_on_one_worker_counts_as_zero(workers):
    results = workers(2).run(_one_sided, "none")
    assert same_bits(results)
    model = ToyDetector(width=32)
    names = parameter_names(model)["box_head"]
    vector = reference.flatten(reference.unit_gradients(model, loss, [batch(4, seed=0)]), names)[0]
    s1, s2 = reference.moments([vector, torch.zeros_like(vector)])
    assert float(results[0].unit_sq[3]) == pytest.approx(s1, rel=1e-5)
    assert float(results[0].mean_sq[3]) == pytest.approx(s2, rel=1e-5)


def test_nan_on_one_worker_is_nan_on_all(workers):
    results = workers(2).run(_one_sided, "nan")
    for moments in results:
        assert moments.unit_sq[3].isnan() and moments.mean_sq[3].isnan()
        assert moments.unit_sq[2].isfinite()  # the RPN's gradient does not pass the box head


def _workers_times_micro_batches(units):
    model = ToyDetector()
    ddp = DistributedDataParallel(model)
    tap = build_tap(ddp, assign_modules(model), 3)
    mine = units[3 * dist.get_rank() :][:3]
    tap.start()
    for i, unit in enumerate(mine):
        if i < 2:
            with ddp.no_sync():
                (loss(ddp, unit) / 3).backward()
        else:
            (loss(ddp, unit) / 3).backward()
        tap.unit_done(1 / 3)
    tap.average_done()
    return tap.collect()


def test_workers_with_micro_batches_have_workers_times_micro_batches_units(workers):
    units = [batch(2, seed=i) for i in range(6)]
    results = workers(2).run(_workers_times_micro_batches, units)
    assert same_bits(results) and results[0].num_units == 6
    wanted = expected(ToyDetector(), units)
    assert_equal(results[0], wanted)
    vectors = reference.flatten(
        reference.unit_gradients(ToyDetector(), loss, units),
        parameter_names(ToyDetector())["backbone"],
    )
    found = pairwise_variance(results[0].unit_sq[0], results[0].mean_sq[0], 6)
    assert found == pytest.approx(reference.pairwise_variance(vectors), abs=1e-5)


def _accumulated_without_the_trainer(units):
    model = ToyDetector()
    ddp = DistributedDataParallel(model)
    tap = build_tap(ddp, assign_modules(model))
    mine = units[dist.get_rank()]
    tap.start()
    with ddp.no_sync():
        (loss(ddp, mine[:2]) / 2).backward()
    (loss(ddp, mine[2:]) / 2).backward()
    return tap.collect()


def _without_communication():
    ddp = DistributedDataParallel(ToyDetector(width=32), bucket_cap_mb=0.002)
    tap = build_tap(ddp, assign_modules(ddp))
    tap.start()
    with ddp.no_sync():
        loss(ddp, batch(4, seed=dist.get_rank())).backward()
    tap.average_done()
    return tap.collect()


def test_a_gradient_that_was_not_averaged_is_not_measured(workers):
    """A project that accumulates over iterations: this one's gradient is this worker's alone."""
    assert workers(2).run(_without_communication) == [None, None]


def _reentrant(units):
    ddp = DistributedDataParallel(SharedHead(), bucket_cap_mb=0.0002, static_graph=True)
    tap = build_tap(
        ddp, {"body": [*ddp.module.body.parameters()], "head": [*ddp.module.head.parameters()]}
    )
    for _ in range(3):
        tap.start()
        ddp.zero_grad()
        ddp(units[dist.get_rank()]).backward()
        moments = tap.collect()
    return moments


class SharedHead(nn.Module):
    """Its head is used on two levels, under reentrant checkpointing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, x, checkpointed=True):
        run = functools.partial(checkpoint, self.head, use_reentrant=True)
        head = run if checkpointed else self.head
        x = self.body(x)
        return (head(x.tanh()) + head(x.sin())).square().mean()


def test_reentrant_checkpointing_under_ddp(workers):
    g = torch.Generator().manual_seed(0)
    units = [torch.randn(4, 6, generator=g) for _ in range(2)]
    results = workers(2).run(_reentrant, units)
    assert same_bits(results)
    gradients = reference.unit_gradients(SharedHead(), lambda net, x: net(x, False), units)
    for i, module in enumerate(("body", "head")):
        names = [f"{module}.weight", f"{module}.bias"]
        s1, s2 = reference.moments(reference.flatten(gradients, names))
        assert float(results[0].unit_sq[i]) == pytest.approx(s1, rel=1e-5)
        assert float(results[0].mean_sq[i]) == pytest.approx(s2, rel=1e-5)


def _slot_is_free():
    ddp = DistributedDataParallel(ToyDetector())
    build_tap(ddp, assign_modules(ddp))
    ddp.register_comm_hook(ddp.process_group, default_hooks.allreduce_hook)


def test_ddp_is_left_as_it_is(workers):
    workers(2).run(_slot_is_free)


def test_no_sync_accumulation_of_another_loop_is_one_unit_a_worker(workers):
    units = [batch(4, seed=i) for i in range(2)]
    results = workers(2).run(_accumulated_without_the_trainer, units)
    assert results[0].num_units == 2
    assert_equal(results[0], expected(ToyDetector(), units))
