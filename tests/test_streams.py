"""On a GPU, `split` measures on streams of its own: no number is read before it is made. Checked
with `streams`, on any machine, for one backward pass as the first worker sees it. (`pairwise`
measures in parameter hooks, which autograd orders, and at the end of the pass, after DDP.)"""

import pytest
import torch
import torch.distributed as dist
from streams import Bucket, Streams, nccl
from torch import nn

from agvm_d2.split import SplitBucketTap


@pytest.fixture(params=[2, 4])
def streams(monkeypatch, request):
    streams, workers = Streams(), request.param
    for name, value in {
        "is_initialized": True,
        "get_world_size": workers,
        "get_rank": 0,
        "get_process_group_ranks": list(range(workers)),
        "new_group": None,
    }.items():
        monkeypatch.setattr(dist, name, lambda *_, _value=value, **__: _value)
    monkeypatch.setattr(dist, "all_reduce", nccl(streams, "world", workers))
    monkeypatch.setattr(dist, "reduce", nccl(streams, "half", workers // 2))
    return streams


class Model:
    """What a tap needs of DDP: the slot of the communication hook, then a backward pass."""

    process_group = None

    def register_comm_hook(self, state, hook):
        self._state, self._hook = state, hook

    def backward(self, params, waits=True):
        buckets = [Bucket(params[i : i + 2]) for i in range(0, len(params), 2)]
        futures = [self._hook(self._state, bucket) for bucket in buckets]
        for bucket, future in zip(buckets, futures):
            if waits:
                future.wait()
            bucket.buffer().mul_(0.5)  # as clipping does


def measured_step(streams, tap_class, precondition=None, waits=True):
    params = [nn.Parameter(torch.randn(5, 7)) for _ in range(6)]
    model = Model()
    tap = tap_class(model, {"a": params[:3], "b": params[3:]}, precondition)
    with streams, torch.no_grad():
        tap.start()
        model.backward(params, waits)
        return tap.collect()


def adam(param, grad):
    return grad / grad.abs().sqrt()


@pytest.mark.parametrize("precondition", [None, adam])
def test_no_measurement_races(streams, precondition):
    moments = measured_step(streams, SplitBucketTap, precondition)
    assert streams.races == [] and (moments.mean_sq > 0).all()


class SplitWithoutAValue(SplitBucketTap):
    """Its callback returns nothing, so that there is nothing to wait for."""

    def measure_half(self, bucket, measure):
        def reduced(future):
            measure(self._half, future)

        work = dist.reduce(bucket.buffer().clone(), 0, async_op=True)
        self._pending.append(work.get_future().then(reduced))


def test_a_callback_that_returns_nothing_would_race(streams):
    measured_step(streams, SplitWithoutAValue)
    assert len(streams.races) == 6  # the norms of six parameters
    assert all("on main, unordered after pool" in race for race in streams.races)


def test_a_measurement_read_before_ddp_has_waited_would_race(streams):
    measured_step(streams, SplitBucketTap, waits=False)
    assert any("on main, unordered after pool" in race for race in streams.races)


def test_memory_that_is_still_read_elsewhere_may_not_be_written():
    streams = Streams()
    with streams:
        tensor = torch.ones(3)
        before = streams.event()
        with streams.on("side"):
            streams.wait(before)
            tensor.sum()
            after = streams.event()
        tensor.view(1, 3)  # touches no memory
        assert streams.races == []
        tensor.add_(1)
        assert streams.races == ["aten.add_.Tensor on main, unordered after side"]
        streams.wait(after)
        tensor.add_(1)
        assert len(streams.races) == 1
