"""benchmarks/overhead.py: the official scheme finds what `split` finds; time is counted once."""

import time
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from agvm_d2 import AGVM, Settings, split_param_groups
from benchmarks import overhead

pytestmark = pytest.mark.integration  # processes of their own


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Linear(6, 5), nn.Linear(5, 1)

    def forward(self, data):
        return {"loss": self.head(self.backbone(data).tanh()).square().mean()}


def one_step(official: bool):
    """In a worker: factors, mean gradient, (calls, bytes) of the official scheme."""
    model = Toy()
    data = torch.randn(4, 6, generator=torch.Generator().manual_seed(dist.get_rank()))
    if official:
        scheme = overhead.Official(model)
        sum(scheme(data).values()).backward()
        counted = overhead.count_collectives(scheme.after_backward)
        return scheme.factors.tolist(), model.head.weight.grad, counted
    ddp = DistributedDataParallel(model)
    optimizer = split_param_groups(torch.optim.SGD(model.parameters(), lr=0.0), model)
    agvm = AGVM(ddp, optimizer, Settings(estimator="split"))
    agvm.begin(0)
    sum(ddp(data).values()).backward()
    agvm.backward_done()
    optimizer.step()
    return agvm.modulator.factors.tolist(), model.head.weight.grad, None


@pytest.mark.parametrize("num", [2, 4])
def test_official(workers, num):
    theirs, ours = (workers(num).run(one_step, official) for official in (True, False))
    for (factors, grad, _), (expected, mean, _) in zip(theirs, ours):
        assert factors == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(grad, mean)
    # P = 4 tensors, N = 41 numbers: reduced twice; gathered by the first worker and one of the
    # other half; 2 modules' variances.
    in_pair, others = (14, 4 * (3 * 41 + 2)), (14, 4 * (2 * 41 + 2))
    assert [counted for *_, counted in theirs] == [in_pair, *[others] * (num - 2), in_pair]


def test_nested_time_is_counted_once(monkeypatch):
    clock = overhead.OwnTime()
    seconds = iter([0.0, 1.0, 4.0, 5.0, 9.0, 10.0])
    monkeypatch.setattr(time, "thread_time", lambda: next(seconds))
    inner, averaging = clock.timed(lambda: None), clock.timed(lambda: None, "averaging")
    clock.timed(lambda: (inner(), averaging()))()  # 10 s, 3 of them in `inner`, 4 averaging
    assert clock.take() == (6.0, 4.0)
    assert clock.take() == (0.0, 0.0)


def test_a_worker_alone_compares_micro_batches():
    found = overhead.run("collectives", 1, "demo")
    assert [*found] == ["plain", "agvm interval 10", "agvm interval 1"]
    plain = found["plain"]["other"]
    assert all(kinds == {"measured": plain, "other": plain} for kinds in found.values())


def test_cuda_needs_a_gpu_for_each_worker(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["overhead.py", "--device", "cuda", "--workers", "2"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit):
        overhead.main()
    assert "2 workers need as many GPUs; found 1" in capsys.readouterr().err
