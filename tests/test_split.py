"""The paper's estimator: of workers' gradients, and of one process's micro-batches."""

import pytest
import reference
import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from toy import ToyDetector, batch, ddp_moments, loss, same_bits, vectors

from agvm_d2 import AGVM, Settings, split_param_groups
from agvm_d2.agvm import build_tap
from agvm_d2.modules import assign_modules
from agvm_d2.split import split_moments


def _split_tap(ddp, modules):
    return build_tap(ddp, modules, split=True)


@pytest.mark.parametrize("num", [2, 3, 4])
def test_split_equals_the_literal_formula_on_gathered_gradients(workers, num):
    units = [batch(4, seed=rank) for rank in range(num)]
    results = workers(num).run(ddp_moments, _split_tap, units)
    assert same_bits(results) and results[0].num_units == 2
    cut = (num + 1) // 2  # the first half has one more of an odd number
    for i, found in enumerate(vectors(ToyDetector(width=32), units).values()):
        wanted = reference.split_variance(found[:cut], found[cut:])
        assert float(results[0].variance[i]) == pytest.approx(wanted, abs=1e-5)


def test_split_needs_the_hook_slot(workers):
    results = workers(2).run(_split_with_a_taken_slot)
    assert all("comm_hook=(state, hook)" in message for message in results)


def _split_with_a_taken_slot():
    ddp = DistributedDataParallel(ToyDetector())
    ddp.register_comm_hook(ddp.process_group, default_hooks.allreduce_hook)
    try:
        build_tap(ddp, assign_modules(ddp), split=True)
    except ValueError as error:
        return str(error)


def test_split_over_workers_asks_for_ddp():
    model = ToyDetector()
    with pytest.raises(ValueError, match="not inside DistributedDataParallel"):
        build_tap(model, assign_modules(model), micro_batches=1, split=True)


def test_moments_of_two_halves_by_hand():
    # a = (2, 0), b = (0, 1), 3 and 1 of four units: the mean is (1.5, 0.25), and cos = 0.
    moments = split_moments(torch.tensor([[4.0], [1.0], [2.3125]], dtype=torch.float64), 0.75)
    assert moments.num_units == 2 and moments.variance.tolist() == pytest.approx([1.0])
    assert (moments.unit_sq.item(), moments.mean_sq.item()) == (3.25, 2.3125)


def micro_batches(sizes):
    """One measured iteration of a plain loop; AGVM and each module's gradients of the passes."""
    model, data, total = ToyDetector(), batch(sum(sizes)), sum(sizes)
    optimizer = split_param_groups(torch.optim.SGD(model.parameters(), lr=0.1), model)
    settings = Settings(estimator="split", momentum=0.0)
    agvm = AGVM(model, optimizer, settings, micro_batches=len(sizes))
    units = [data[sum(sizes[:i]) :][:size] for i, size in enumerate(sizes)]
    found = vectors(model, units)
    agvm.begin(0)
    for unit, size in zip(units, sizes):
        (loss(model, unit) * size / total).backward()
        agvm.micro_batch_done(size / total)
    agvm.backward_done()
    optimizer.step()
    agvm.end()
    return agvm, found


@pytest.mark.parametrize("sizes", [(4, 4), (3, 2, 3), (2, 2, 2, 2), (5, 1, 1, 1, 2)], ids=str)
def test_the_first_micro_batches_against_the_others(sizes):
    agvm, found = micro_batches(sizes)
    assert agvm.modulator.num_units == 2
    cut = (len(sizes) + 1) // 2
    for i, gradients in enumerate(found.values()):
        weighted = [u * n for u, n in zip(gradients, sizes)]
        a, b = sum(weighted[:cut]), sum(weighted[cut:])
        wanted = reference.split_variance([a], [b])
        assert float(agvm.modulator.variance[i]) == pytest.approx(wanted, abs=1e-5)
        share = sum(sizes[:cut]) / sum(sizes)
        halves = [a / sum(sizes[:cut]), b / sum(sizes[cut:])]
        s1, s2 = reference.moments(halves, [share, 1 - share])
        assert float(agvm.modulator.last.unit_sq[i]) == pytest.approx(s1, rel=1e-5)
        assert float(agvm.modulator.last.mean_sq[i]) == pytest.approx(s2, rel=1e-5)


@pytest.mark.parametrize("passes", [0, 1])
def test_without_micro_batches_it_says_what_to_call(passes):
    model = ToyDetector()
    optimizer = split_param_groups(torch.optim.SGD(model.parameters(), lr=0.1), model)
    agvm = AGVM(model, optimizer, Settings(estimator="split", start_iter=0), micro_batches=2)
    agvm.begin(0)
    loss(model, batch(4)).backward()
    for _ in range(passes):
        agvm.micro_batch_done(1.0)
    agvm.backward_done()
    with pytest.raises(RuntimeError, match=r"this loop ran 1, by its calls .*after_micro_batch"):
        optimizer.step()


def test_one_worker_in_ddp_has_micro_batches_to_compare(workers):
    assert workers(1).run(_variance_in_ddp) == [
        micro_batches((4, 4))[0].modulator.variance.tolist()
    ]


def _variance_in_ddp():
    model, data = ToyDetector(), batch(8)
    optimizer = split_param_groups(torch.optim.SGD(model.parameters(), lr=0.1), model)
    settings = Settings(estimator="split", momentum=0.0)
    hook = (None, default_hooks.allreduce_hook)
    ddp = DistributedDataParallel(model)
    agvm = AGVM(ddp, optimizer, settings, micro_batches=2, comm_hook=hook)
    agvm.begin(0)
    for unit in (data[:4], data[4:]):
        (loss(ddp, unit) / 2).backward()
        agvm.micro_batch_done(0.5)
    agvm.backward_done()
    optimizer.step()
    agvm.end()
    return agvm.modulator.variance.tolist()


def test_collect_without_the_average_says_what_to_call():
    model = ToyDetector()
    tap = build_tap(model, assign_modules(model), micro_batches=2, split=True)
    tap.start()
    with pytest.raises(RuntimeError, match="AGVMHook.after_backward"):
        tap.collect()


def test_a_module_that_only_the_second_half_reaches():
    """Its gradient in the first half is zero, so the two are at a right angle: 0/0."""
    model = ToyDetector()
    tap = build_tap(model, assign_modules(model), micro_batches=2, split=True)
    tap.start()
    for seed, name in ((0, "loss_rpn"), (1, "loss_box")):
        (model(batch(4, seed=seed))[name] / 2).backward()
        tap.unit_done(0.5)
    tap.average_done()
    moments = tap.collect()
    assert moments.variance[:2].isfinite().all() and moments.variance[2:].isnan().all()
