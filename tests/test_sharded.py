"""FSDP2: moments of a sharded model against tests/reference.py, and how it is refused or kept."""

import functools
import re
import pytest
import reference
import torch
import torch.distributed as dist
from detectron2.utils.events import EventStorage
from helpers import needs_muon
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from toy import MODULES, ToyDetector, batch, loss, parameter_names, same_bits

from agvm_d2 import AGVM, Settings, sharded, split_param_groups
from agvm_d2.agvm import build_tap
from agvm_d2.modules import assign_modules
from agvm_d2.shards import is_sharded, local_part, shard_like, whole_state
from agvm_d2.solver import build_muon, clip_gradients, muon_params, skip_nonfinite_steps
from agvm_d2.solver.clip import AVERAGE

fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("fully_shard is public from torch 2.6 on", allow_module_level=True)

WIDTH = 13  # that neither 2 nor 4 workers share evenly; the rpn's one row leaves some with nothing


def shard(model, replicas=1, reduce_dtype=None, device="cpu", **options):
    """The bottom-up in a unit of its own; the root's holds three modules."""
    workers = dist.get_world_size() // replicas
    sizes = (replicas, workers) if replicas > 1 else (workers,)
    names = ("replicas", "shards") if replicas > 1 else ("shards",)
    mesh = init_device_mesh(device, sizes, mesh_dim_names=names)
    policy = fsdp.MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    for part in (model.backbone.bottom_up, model):
        fsdp.fully_shard(part, mesh=mesh, mp_policy=policy, **options)
    return model


def units_of(workers: int, micro: int = 1, device: str = "cpu") -> list:
    """For each worker and micro-batch; those of rank r are micro * r and the next ones."""
    units = [batch(2, seed=10 + i) for i in range(workers * micro)]
    return [[{k: v.to(device) for k, v in image.items()} for image in unit] for unit in units]


def measure(model, tap, mine, sync=True):
    """Moments of one iteration of this worker's micro-batches."""
    tap.start()
    model.zero_grad()
    for i, unit in enumerate(mine):
        last = i == len(mine) - 1
        model.set_requires_gradient_sync(last or sync)
        model.set_is_last_backward(last)
        (loss(model, unit) / len(mine)).backward()
        tap.unit_done(1 / len(mine))
    tap.average_done()
    return tap.collect()


def _moments(micro, sync, checkpointed, adam, replicas, options, largest=None, device="cpu"):
    if largest is not None:
        sharded.GATHERED = largest
    try:
        model = ToyDetector(width=WIDTH)
        if checkpointed:
            part = model.backbone.bottom_up
            part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False)
        shard(model.to(device), replicas, device=device, **options)
        optimizer = (torch.optim.AdamW if adam else torch.optim.SGD)(model.parameters(), lr=0.01)
        split_param_groups(optimizer, model)
        rank, workers = dist.get_rank(), dist.get_world_size()
        if adam:  # for a second moment
            loss(model, units_of(workers, 1, device)[rank]).backward()
            optimizer.step()
        tap = build_tap(model, assign_modules(model), micro, optimizer)
        mine = units_of(workers, micro, device)[micro * rank : micro * (rank + 1)]
        for _ in range(2):
            moments = measure(model, tap, mine, sync)
        weights = whole_state(model.state_dict(), keep=True)
        second = {
            name: whole_state(optimizer.state[p]["exp_avg_sq"], keep=True).double()
            for name, p in model.named_parameters()
            if "exp_avg_sq" in optimizer.state[p]
        }
        return moments, weights, second, type(tap).__name__
    finally:
        sharded.GATHERED = 1 << 24


def gradients_of(weights, second, units):
    """One whole gradient per unit, over the second moment where there is one; the model's names."""
    model = ToyDetector(width=WIDTH)
    model.load_state_dict(weights)
    model.double()
    double = [[{k: v.double() for k, v in image.items()} for image in unit] for unit in units]
    gradients = reference.unit_gradients(model, loss, double)
    if second:
        gradients = [
            {n: g / (second[n].sqrt() + 1e-8) * (second[n] > 0) for n, g in one.items()}
            for one in gradients
        ]
    return gradients, list(parameter_names(model).values())


def wanted(weights, second, units):
    """S1 and S2 of each module."""
    gradients, modules = gradients_of(weights, second, units)
    return [reference.moments(reference.flatten(gradients, names)) for names in modules]


VARIANTS = {
    "plain": {},
    "kept after forward": {"options": {"reshard_after_forward": False}},
    "micro-batches": {"micro": 3},
    "micro-batches without sync": {"micro": 3, "sync": False},
    "kept, without sync": {"micro": 2, "sync": False, "options": {"reshard_after_forward": False}},
    "checkpointed": {"checkpointed": True},
    "checkpointed, micro-batches": {"checkpointed": True, "micro": 2, "sync": False},
    "Adam": {"adam": True},
    "Adam, micro-batches": {"adam": True, "micro": 2},
    "replicas": {"replicas": 2},
    "replicas, micro-batches": {"replicas": 2, "micro": 2, "sync": False},
    "replicas, Adam": {"replicas": 2, "adam": True},
    "bfloat16 reduced": {"options": {"reduce_dtype": torch.bfloat16}},
}
DEFAULTS = {
    "micro": 1,
    "sync": True,
    "checkpointed": False,
    "adam": False,
    "replicas": 1,
    "options": {},
}
CASES = [
    (num, name) for num in (2, 4) for name, v in VARIANTS.items() if num == 4 or "replicas" not in v
]


@pytest.mark.parametrize("num, name", CASES)
def test_moments_equal_reference_with_the_same_bits(workers, num, name):
    variant = {**DEFAULTS, **VARIANTS[name]}
    results = workers(num).run(_moments, *variant.values())
    assert {kind for *_, kind in results} == {"ShardedTap"}
    assert same_bits([moments for moments, *_ in results])
    moments, weights, second, _ = results[0]
    assert moments.num_units == num * variant["micro"]
    # Adding in bfloat16 rounds the mean that the step is made with, to 8 bits of each element.
    rel = 1e-2 if "bfloat16" in name else 1e-5
    for i, (s1, s2) in enumerate(wanted(weights, second, units_of(num, variant["micro"]))):
        assert float(moments.unit_sq[i]) == pytest.approx(s1, rel=1e-5), MODULES[i]
        assert float(moments.mean_sq[i]) == pytest.approx(s2, rel=rel), MODULES[i]


@pytest.mark.parametrize("num, replicas", [(2, 1), (4, 2)])
def test_of_a_large_module_each_worker_measures_its_own_shard(workers, num, replicas):
    variant = {**DEFAULTS, "adam": True, "replicas": replicas}
    moments, weights, second, _ = workers(num).run(_moments, *variant.values(), 0)[0]
    gradients, modules = gradients_of(weights, second, units_of(num))
    shards = num // replicas
    for i, names in enumerate(modules):
        total = 0.0
        for rank, gradient in enumerate(gradients):
            for name in names:
                rows = torch.chunk(gradient[name], shards)
                if rank % shards < len(rows):
                    total += float(rows[rank % shards].square().sum())
        assert float(moments.unit_sq[i]) == pytest.approx(total / replicas, rel=1e-5)
        exact = reference.moments(reference.flatten(gradients, names))
        assert float(moments.mean_sq[i]) == pytest.approx(exact[1], rel=1e-5)


# Training


def step(agvm, iteration, data):
    agvm.begin(iteration)
    agvm.optimizer.zero_grad()
    loss(agvm.model, data).backward()
    agvm.backward_done()
    agvm.optimizer.step()
    agvm.end()


OPTIMIZERS = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "Muon": lambda model: build_muon(muon_params(model), lr=0.01, weight_decay=0.05),
}


@pytest.fixture(params=OPTIMIZERS)
def kind(request):
    if request.param == "Muon":
        needs_muon()
    return request.param


def train(sharded, kind, mode, iterations=20):
    """Factors after each iteration, and the weights at the end, by name."""
    model = ToyDetector(width=WIDTH)
    model = shard(model) if sharded else DistributedDataParallel(model)
    optimizer = split_param_groups(OPTIMIZERS[kind](model), model)
    clip_gradients(optimizer, "full_model", 1.0)
    skip_nonfinite_steps(optimizer, model)
    settings = Settings(interval=2, momentum=0.5, mode=mode or "monitor")
    agvm = AGVM(model, optimizer, settings) if mode else None
    factors = []
    for i in range(iterations):
        if agvm:
            agvm.begin(i)
        optimizer.zero_grad()
        loss(model, batch(4, seed=2 * i + dist.get_rank())).backward()
        if agvm:
            agvm.backward_done()
        optimizer.step()
        if agvm:
            agvm.end()
            factors.append(agvm.modulator.factors.clone())
    state = {n.removeprefix("module."): p for n, p in whole_state(model.state_dict(), True).items()}
    return factors, state


def test_training_is_that_of_ddp(workers, kind):
    sharded, other = workers(2).run(train, True, kind, "modulate")
    whole, _ = workers(2).run(train, False, kind, "modulate")
    assert all(torch.equal(a, b) for a, b in zip(sharded[0], other[0], strict=True))
    assert (sharded[0][-1] - 1).abs().max() > 0.01
    for ours, theirs in zip(sharded[0], whole[0], strict=True):
        assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-4)
    for name, weight in whole[1].items():
        assert torch.allclose(sharded[1][name], weight, rtol=1e-3, atol=1e-5), name


def test_monitoring_changes_no_bit(workers, kind):
    watched = workers(2).run(train, True, kind, "monitor")[0][1]
    alone = workers(2).run(train, True, kind, None)[0][1]
    assert all(torch.equal(watched[name], weight) for name, weight in alone.items())


def _unfrozen():
    model = shard(ToyDetector(width=WIDTH))
    model.proposal_generator.bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    agvm = AGVM(model, split_param_groups(optimizer, model), Settings(interval=1))
    found = []
    for i in range(4):
        if i == 2:
            model.proposal_generator.bias.requires_grad_(True)
        step(agvm, i, units_of(2)[dist.get_rank()])
        found.append(agvm.modulator.last.unit_sq[MODULES.index("rpn")].item())
    return found, whole_state(model.state_dict(), True)


def test_a_parameter_unfrozen_while_training_counts_from_then_on(workers):
    found, weights = workers(2).run(_unfrozen)[0]
    gradients, _ = gradients_of(weights, {}, units_of(2))
    names = ["proposal_generator.weight", "proposal_generator.bias"]
    frozen, free = (
        reference.moments(reference.flatten(gradients, n))[0] for n in (names[:1], names)
    )
    assert found == pytest.approx([frozen, frozen, free, free], rel=1e-5)
    assert free > 1.01 * frozen


def _reduced_every_second_iteration():
    """Which iterations were measured, and what was said at the end."""
    model = shard(ToyDetector(width=WIDTH))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    agvm = AGVM(model, split_param_groups(optimizer, model), Settings(interval=2))
    measured = []
    try:
        for i in range(7):
            agvm.begin(i)
            model.set_requires_gradient_sync(i % 2 == 0)
            loss(model, units_of(2)[dist.get_rank()]).backward()
            agvm.backward_done()
            if i % 2 == 0:
                optimizer.step()
                optimizer.zero_grad()
            agvm.end()
            measured.append(agvm.measured)
    except RuntimeError as error:
        return measured, str(error)


def test_gradients_kept_inside_fsdp2_over_iterations_are_not_measured(workers):
    for measured, said in workers(2).run(_reduced_every_second_iteration):
        assert measured == [True, False, False]  # nothing was kept before the first
        assert "accumulated over iterations inside FSDP2" in said


def _one_parameter_left_to_another_optimizer():
    model = shard(ToyDetector(width=WIDTH))
    bias = model.roi_heads.box_head.bias
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p is not bias], lr=0.01)
    agvm = AGVM(model, split_param_groups(optimizer, model), Settings(interval=1))
    for i in range(3):
        step(agvm, i, batch(4, seed=2 * i + dist.get_rank()))
    return agvm.modulator.last.unit_sq.tolist()


def test_with_adam_a_parameter_of_no_group_counts_as_0(workers):
    for found in workers(2).run(_one_parameter_left_to_another_optimizer):
        assert all(value > 0 for value in found)


def test_a_state_made_whole_keeps_the_versions_of_its_modules():
    state = ToyDetector().state_dict()
    whole = whole_state(state, keep=True)
    assert whole._metadata == state._metadata and type(whole) is type(state)
    assert whole_state({"a": (1, [2])}, keep=False) == {"a": (1, [2])}


def _evaluated(reshard_after_forward):
    """Factors with and without a forward pass between the iterations."""
    found = []
    for evaluates in (False, True):
        model = ToyDetector(width=WIDTH)
        fsdp.fully_shard(model, reshard_after_forward=reshard_after_forward)  # one unit, the root
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        agvm = AGVM(model, split_param_groups(optimizer, model), Settings(interval=1))
        for i in range(4):
            step(agvm, i, batch(4, seed=2 * i + dist.get_rank()))
            if evaluates:
                with torch.no_grad():
                    model(batch(2))
                assert is_sharded(model)
        found.append(agvm.modulator.factors.tolist())
    return found


@pytest.mark.parametrize("reshard_after_forward", [False, True])
def test_an_evaluation_between_the_iterations_changes_nothing(workers, reshard_after_forward):
    for without, with_one in workers(2).run(_evaluated, reshard_after_forward):
        assert without == with_one != [1.0] * 4


def _collectives(adam):
    """Of a measured iteration and of one that is not; names and numbers."""
    from torch.profiler import ProfilerActivity, profile

    model = shard(ToyDetector(width=WIDTH))
    optimizer = (torch.optim.AdamW if adam else torch.optim.SGD)(model.parameters(), lr=0.01)
    agvm = AGVM(model, split_param_groups(optimizer, model), Settings(interval=2))
    found = []
    for i in range(4):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step(agvm, i, batch(4))
        names = [event.name for event in profiler.events()]
        found.append([sum(n == kind for n in names) for kind in KINDS])
    return found[2:]


KINDS = ("c10d::allreduce_", "c10d::allgather_", "c10d::_reduce_scatter_base_")


@pytest.mark.parametrize("adam", [False, True], ids=["SGD", "AdamW"])
def test_a_measurement_is_one_small_all_reduce_and_with_adam_one_gather(workers, adam):
    for measured, plain in workers(2).run(_collectives, adam):
        assert sum(plain) > 0
        assert [m - p for m, p in zip(measured, plain, strict=True)] == [1, int(adam), 0]


def _nan_on_one_worker():
    model = shard(ToyDetector(width=WIDTH))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    skip_nonfinite_steps(optimizer, model)
    before = whole_state(model.state_dict(), True)
    (loss(model, batch(2)) * (torch.nan if dist.get_rank() else 1.0)).backward()
    # In the other worker's shard alone.
    for param in model.parameters():
        if dist.get_rank() == 0:
            local_part(param.grad).nan_to_num_(0.0)
    with EventStorage():
        optimizer.step()
    after = whole_state(model.state_dict(), True)
    return all(torch.equal(after[name], weight) for name, weight in before.items())


def test_all_workers_skip_a_step_that_is_not_finite_in_one_shard(workers):
    assert workers(2).run(_nan_on_one_worker) == [True, True]


def _nan_in_a_measured_iteration():
    model = shard(ToyDetector(width=WIDTH))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    skip_nonfinite_steps(optimizer, model)
    agvm = AGVM(model, split_param_groups(optimizer, model), Settings(interval=1))
    found = []
    with EventStorage() as storage:
        for i in range(4):
            storage.iter = i
            agvm.begin(i)
            optimizer.zero_grad()
            (loss(model, units_of(2)[dist.get_rank()]) * (torch.nan if i == 2 else 1)).backward()
            agvm.backward_done()
            optimizer.step()
            agvm.end()
            found.append((agvm.measured, agvm.modulator.factors.tolist()))
    return found


def test_a_measured_step_is_skipped_too(workers):
    before, (_, there), after = workers(2).run(_nan_in_a_measured_iteration)[0][1:]
    assert there == before[1] != after[1] and before[0] and after[0]


def _clipped(kind, value):
    model, whole = shard(ToyDetector(width=WIDTH)), ToyDetector(width=WIDTH)
    for m in (model, whole):
        optimizer = torch.optim.SGD(m.parameters(), lr=1e-4)
        clip_gradients(optimizer, kind, value)
        for scale in (1.0, 10.0):
            optimizer.zero_grad()
            loss(m, batch(4, scale=scale)).backward()
            optimizer.step()
    weights = whole_state(model.state_dict(), True)
    return [(weights[n] - p).abs().max().item() for n, p in whole.named_parameters()]


@pytest.mark.parametrize(
    "kind, value", [("value", 0.05), ("norm", 0.05), ("full_model", 0.05), ("relative", 1.1)]
)
def test_clipping_is_that_of_the_whole_model(workers, kind, value):
    assert max(workers(2).run(_clipped, kind, value)[0]) < 1e-6


def _clipped_by_inf():
    optimizer = torch.optim.SGD(shard(ToyDetector()).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="norm_type: found inf, .*use 2.0"):
        clip_gradients(optimizer, "full_model", 1.0, torch.inf)


def test_a_norm_that_shards_do_not_have_is_refused(workers):
    workers(2).run(_clipped_by_inf)


def _round_trip(placed_on):
    weight = torch.arange(20.0).view(5, 4)
    model = nn.Linear(4, 5, bias=False)
    model.weight.data.copy_(weight)
    fsdp.fully_shard(model, shard_placement_fn=lambda p: placed_on(p))
    state = whole_state({"a": [model.weight.detach(), 7]}, keep=dist.get_rank() == 0)
    return state, torch.equal(shard_like(weight, model.weight).full_tensor(), weight)


def _columns(param):
    from torch.distributed.tensor import Shard

    return Shard(param.ndim - 1)


def _rows(param):
    return None


@pytest.mark.parametrize("placed_on", [_rows, _columns])
def test_states_are_made_whole_and_cut_again(workers, placed_on):
    (first, equal), (second, also) = workers(2).run(_round_trip, placed_on)
    assert equal and also
    assert second == {"a": [None, 7]}
    assert torch.equal(first["a"][0], torch.arange(20.0).view(5, 4))


def _torch_s_own_state_dict(kind):
    """torch.distributed.checkpoint's makes the optimizer's state by a step of its own."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = shard(ToyDetector(width=WIDTH))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    clip_gradients(optimizer, kind, 1.1, iter_range=(0, 5))
    agvm = AGVM(model, split_param_groups(optimizer, model), max_iter=10)
    agvm.attach()
    _, state = get_state_dict(model, optimizer)
    average = optimizer.param_groups[0].get(f"{AVERAGE}_2", torch.zeros(2))
    return len(state["state"]), agvm.progress, average.tolist()


@pytest.mark.parametrize("kind", ["full_model", "relative"])
def test_torch_s_own_state_dict_is_taken_outside_of_training(workers, kind):
    assert workers(2).run(_torch_s_own_state_dict, kind) == [(10, 0.0, [0, 0])] * 2


# What is refused


def _message(make):
    try:
        model, optimizer, options = make()
        AGVM(model, optimizer, Settings(**options)).attach()
        return "nothing"
    except (ValueError, RuntimeError) as error:
        return str(error)


def _sgd(model):
    return split_param_groups(torch.optim.SGD(model.parameters(), lr=0.1), model)


def _fsdp1():
    model = ToyDetector()
    optimizer = _sgd(model)
    wrapped = fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    return wrapped, optimizer, {}


def _tensor_parallel():
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    model = parallelize_module(ToyDetector(), mesh, {"backbone.fpn_lateral2": ColwiseParallel()})
    return model, _sgd(model), {}


def _old_optimizer():
    model = ToyDetector()
    optimizer = _sgd(model)
    return shard(model), optimizer, {}


def _part_of_the_workers():
    model = ToyDetector()
    meshes = init_device_mesh("cpu", (2, 1), mesh_dim_names=("outer", "inner"))
    fsdp.fully_shard(model, mesh=meshes["inner"])
    return model, _sgd(model), {}


def _part_of_the_model():
    model = ToyDetector()
    fsdp.fully_shard(model.backbone.bottom_up)
    return model, _sgd(model), {}


def _a_parameter_left_out():
    model = ToyDetector()
    fsdp.fully_shard(model, ignored_params={model.proposal_generator.bias})
    return model, _sgd(model), {}


def _two_meshes():
    model = ToyDetector()
    meshes = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    fsdp.fully_shard(model.backbone.bottom_up, mesh=meshes)
    fsdp.fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return model, _sgd(model), {}


def _sums():
    model = shard(ToyDetector())
    model.set_gradient_divide_factor(1.0)
    return model, _sgd(model), {}


def _split():
    model = shard(ToyDetector())
    return model, _sgd(model), {"estimator": "split"}


REFUSED = {
    _fsdp1: "FSDP1.*fully_shard",
    _tensor_parallel: "not by fully_shard",
    _old_optimizer: "Build the optimizer after fully_shard",
    _part_of_the_workers: "over a mesh of 1 workers, but there are 2",
    _part_of_the_model: "call fully_shard on it last",
    _a_parameter_left_out: "'proposal_generator.bias' is not sharded",
    _two_meshes: "cut into 1 shards, but '.*' into 2: give all calls of fully_shard one mesh",
    _sums: r"set_gradient_divide_factor\(1\) .*the mean over the 2 workers",
    _split: "ESTIMATOR split.*use pairwise",
}


@pytest.mark.parametrize("make", REFUSED)
def test_what_cannot_be_measured_is_refused_by_all_workers(workers, make):
    for message in workers(2).run(_message, make):
        assert re.search(REFUSED[make], message), message


def _accumulated_over_iterations():
    model = shard(ToyDetector())
    optimizer = _sgd(model)
    agvm = AGVM(model, optimizer)
    agvm.begin(0)
    model.set_requires_gradient_sync(False)
    try:
        loss(model, batch(2)).backward()
        agvm.backward_done()
        agvm.end()
    except RuntimeError as error:
        return str(error)


def test_gradients_that_are_never_reduced_are_told(workers):
    for message in workers(2).run(_accumulated_over_iterations):
        assert "set_requires_gradient_sync(False)" in message
