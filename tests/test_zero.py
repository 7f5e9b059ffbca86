"""torch's ZeroRedundancyOptimizer: each parameter has one worker that keeps its state."""

import re
import pytest
import reference
import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from toy import ToyDetector, batch, loss, parameter_names, same_bits

from agvm_d2 import AGVM, Settings, split_param_groups
from agvm_d2.agvm import build_tap
from agvm_d2.modules import assign_modules

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def build(kind, **options):
    ddp = DistributedDataParallel(ToyDetector())
    groups = [{"params": params} for params in assign_modules(ddp).values()]
    optimizer = ZeroRedundancyOptimizer(groups, kind, **options)
    return ddp, split_param_groups(optimizer, ddp)


def _moments(kind):
    ddp, optimizer = build(kind, lr=0.01)
    model, rank = ddp.module, dist.get_rank()
    loss(ddp, batch(4, seed=rank)).backward()
    optimizer.step()
    tap = build_tap(ddp, assign_modules(ddp), optimizer=optimizer)
    for _ in range(3):
        tap.start()
        ddp.zero_grad()
        loss(ddp, batch(4, seed=10 + rank)).backward()
        tap.average_done()
        moments = tap.collect()
    owned = {n for n, p in model.named_parameters() if p in optimizer.optim.state}
    second = {
        n: optimizer.optim.state[p]["exp_avg_sq"]
        for n, p in model.named_parameters()
        if kind is torch.optim.AdamW and n in owned
    }
    return moments, owned, second, model.state_dict()


def test_adam_s_moments_are_those_of_who_keeps_the_state(workers):
    results = workers(2).run(_moments, torch.optim.AdamW)
    assert same_bits([moments for moments, *_ in results])
    model = ToyDetector()
    model.load_state_dict(results[0][3])
    gradients = reference.unit_gradients(model, loss, [batch(4, seed=10 + r) for r in range(2)])
    second = {**results[0][2], **results[1][2]}
    assert len(second) == len(gradients[0]) and results[0][2] and results[1][2]
    for one in gradients:
        for name in one:
            one[name] /= second[name].double().sqrt() + 1e-8
    for i, names in enumerate(parameter_names(model).values()):
        owner = {n: next(r for r, result in enumerate(results) if n in result[1]) for n in names}
        unit_sq = sum(float(gradients[owner[n]][n].square().sum()) for n in names)
        exact = reference.moments(reference.flatten(gradients, names))
        assert float(results[0][0].unit_sq[i]) == pytest.approx(unit_sq, rel=1e-4)
        assert float(results[0][0].mean_sq[i]) == pytest.approx(exact[1], rel=1e-4)


def _trained(zero, kind, options):
    """Weights after some steps with a factor of its own for each module."""
    if zero:
        ddp, optimizer = build(kind, **options)
    else:
        ddp = DistributedDataParallel(ToyDetector())
        optimizer = split_param_groups(kind(ddp.parameters(), **options), ddp)
    agvm = AGVM(ddp, optimizer, Settings(start_iter=0, interval=100))
    for i in range(3):
        agvm.begin(i)
        optimizer.zero_grad()
        loss(ddp, batch(4, seed=2 * i + dist.get_rank())).backward()
        agvm.backward_done()
        agvm.modulator.factors[:] = torch.tensor([1.0, 2.0, 3.0, 0.5])
        optimizer.step()
        agvm.end()
    assert [g["lr"] for g in optimizer.param_groups] == [options["lr"]] * 4
    return ddp.module.state_dict()


@pytest.mark.parametrize(
    "kind, options",
    [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.01})],
)
def test_its_steps_are_those_of_the_optimizer_in_it(workers, kind, options):
    zero = workers(2).run(_trained, True, kind, options)[0]
    plain = workers(2).run(_trained, False, kind, options)[0]
    for name, weight in plain.items():
        assert torch.allclose(zero[name], weight, atol=1e-7), name


def _refusal(case):
    ddp = DistributedDataParallel(ToyDetector())
    try:
        if case == "one group":
            optimizer = ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.SGD, lr=0.1)
            split_param_groups(optimizer, ddp)
        elif case == "overlap":
            optimizer = ZeroRedundancyOptimizer(
                ddp.parameters(), torch.optim.SGD, lr=0.1, overlap_with_ddp=True
            )
            split_param_groups(optimizer, ddp)
        else:
            ddp, optimizer = build(torch.optim.AdamW, lr=0.1)
            AGVM(ddp, optimizer, Settings(estimator="split")).attach()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "case, message",
    [
        ("one group", "for params in agvm_d2.modules.assign_modules"),
        ("overlap", "overlap_with_ddp"),
        ("split", "split needs each worker .*pairwise"),
    ],
)
def test_what_it_cannot_do_is_told(workers, case, message):
    for said in workers(2).run(_refusal, case):
        assert re.search(message, said), said
