"""Keys of `train.fsdp`, which parts become units, and evaluation by workers with unequal shares."""

import re
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from toy import ToyDetector

from agvm_d2.d2.checkpoint import AtomicCheckpointer
from agvm_d2.d2.fsdp import EvenLoader, alike, check_fsdp, parts_to_shard, shard
from agvm_d2.shards import whole_state

if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
    pytest.skip("fully_shard is public from torch 2.6 on", allow_module_level=True)


@pytest.mark.parametrize(
    "options, workers, message",
    [
        (3, 2, "train.fsdp: found 3, but it must be a dict"),
        ({"replica": 2}, 4, "train.fsdp: found 'replica', .*replicas"),
        ({"replicas": 0}, 4, "train.fsdp.replicas: found 0, .*positive"),
        ({"replicas": 3}, 4, "train.fsdp.replicas: found 3, .*divide the number of workers, 4"),
        ({"replicas": 4}, 4, "train.fsdp.replicas: found 4, .*be below it"),
        ({"unit_size": "1e6"}, 2, "train.fsdp.unit_size: found '1e6'"),
        ({"reshard_after_forward": 1}, 2, "train.fsdp.reshard_after_forward: found 1"),
        ({"checkpoint_activations": "yes"}, 2, "train.fsdp.checkpoint_activations: found 'yes'"),
        ({"precision": "float16"}, 2, "train.fsdp.precision: found 'float16', .*bfloat16"),
        ({}, 1, "train.fsdp: there is one worker.*--num-gpus 2.*train.fsdp=null"),
    ],
)
def test_bad_keys_are_named(options, workers, message):
    with pytest.raises(ValueError, match=message):
        check_fsdp(options, workers, amp=False)


def test_a_loss_scale_is_refused():
    with pytest.raises(ValueError, match="train.amp.enabled: .*train.fsdp.precision=bfloat16"):
        check_fsdp({}, 2, amp=True)


def test_an_older_torch_is_named(monkeypatch):
    monkeypatch.delattr("torch.distributed.fsdp.fully_shard")
    with pytest.raises(ValueError, match=re.escape("torch 2.6 or newer")):
        check_fsdp({}, 2, amp=False)


def test_good_keys_and_none():
    check_fsdp(None, 1, amp=True)
    check_fsdp({"replicas": 2, "precision": "bfloat16"}, 4, amp=False)


def test_blocks_of_lists_and_sequences_are_units_the_innermost_first():
    def block(n):
        return nn.Linear(n, n, bias=False)

    model = nn.Module()
    model.stages = nn.ModuleList(
        [
            nn.Sequential(block(4), block(4)),  # each of 16: too small, but not both together
            nn.Sequential(block(6), nn.ModuleList([block(7)]), block(1)),
        ]
    )
    model.head = block(50)  # no list holds it
    model.shared = nn.ModuleList([model.stages[1][0]])
    found = parts_to_shard(model, 30)
    first, second = model.stages
    assert found == [first, second[0], second[1][0]]
    assert parts_to_shard(model, 10_000) == []


def test_shared_draws_are_the_main_worker_s(workers):
    (a, own, then), (b, *others) = workers(2).run(_draws)
    assert a == b and own != others[0]
    assert then != others[1]


def _draws():
    torch.manual_seed(dist.get_rank())
    expected = torch.rand(1).item()
    torch.manual_seed(dist.get_rank())
    with alike():
        drawn = torch.rand(1).item()
    return drawn, expected, torch.rand(1).item()


def _unequal_weights():
    model = ToyDetector(seed=dist.get_rank())
    with pytest.raises(ValueError, match="weights at the start: 'checksum .*' on rank 0"):
        shard(model, "cpu", {})


def test_workers_with_other_weights_are_told(workers):
    workers(2).run(_unequal_weights)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.weight @ x[0].float()


def _evaluate(images):
    model = shard(Counting(), "cpu", {"unit_size": 1})
    mine = [torch.full((4,), float(i)) for i in range(images)][dist.get_rank() :: 2]
    loader = EvenLoader(DataLoader(mine, collate_fn=list), model)
    with torch.no_grad():
        outputs = [model(inputs)[0].item() for inputs in loader]
    return len(loader), outputs, model.calls


@pytest.mark.parametrize("images", [1, 4, 5])
def test_all_workers_make_as_many_forward_passes(workers, images):
    (first, a, calls), (second, b, as_many) = workers(2).run(_evaluate, images)
    assert calls == as_many == (images + 1) // 2
    assert (first, second) == (len(a), len(b)) == ((images + 1) // 2, images // 2)
    assert sorted(a + b) == [4.0 * i for i in range(images)]


def _in_ddp():
    from agvm_d2.d2.trainer import create_ddp_model

    with pytest.raises(ValueError, match="DefaultTrainer .*train.fsdp"):
        create_ddp_model(shard(ToyDetector(), "cpu", {}))


def test_a_sharded_model_in_default_trainer_is_refused(workers):
    workers(2).run(_in_ddp)


def test_activations_of_batchnorm_are_not_computed_twice(workers):
    workers(2).run(_batch_norm)


def _batch_norm():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    with pytest.raises(ValueError, match="checkpoint_activations: .*BatchNorm.*twice"):
        shard(model, "cpu", {"unit_size": 25, "checkpoint_activations": True})


def _full_disk(folder):
    model = shard(ToyDetector(), "cpu", {})
    checkpointer = AtomicCheckpointer(model, str(folder), save_to_disk=dist.get_rank() == 0)
    checkpointer.save("good")
    before = whole_state(model.state_dict(), keep=True)
    write = checkpointer._write

    def full(path, *args, **kwargs):
        raise OSError(f"The checkpoint '{path}' cannot be written")

    checkpointer._write = full
    with pytest.raises(OSError, match="bad.pth' cannot be written"):
        checkpointer.save("bad")
    checkpointer._write = write
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    dist.barrier()
    checkpointer.resume_or_load("", resume=True)  # of a model that is sharded by whomever
    after = whole_state(model.state_dict(), keep=True)
    return all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_full_disk_is_told_on_all_workers_and_the_last_checkpoint_loads(workers, tmp_path):
    assert workers(2).run(_full_disk, tmp_path) == [True, True]
