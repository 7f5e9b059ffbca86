import copy
import pytest
import torch
import torch.distributed as dist
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, hooks
from detectron2.utils.events import EventStorage
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from toy import ToyDetector, batch, factors
from toy_d2 import ToyLoader, ToyTrainer, toy_config, train, weights

from agvm_d2 import AGVMHook, AGVMTrainerMixin, split_param_groups
from agvm_d2.d2.micro_batches import MicroBatchTrainer, in_micro_batches, micro_batches, split_batch
from agvm_d2.solver import skip_nonfinite_steps

MICRO = {"SOLVER__MICRO_BATCH_SIZE": 2}


@pytest.mark.parametrize(
    "batch, micro, workers, message",
    [
        (8, 0, 3, "SOLVER.IMS_PER_BATCH: found 8, .*number of workers, 3"),
        (8, 4, 4, "SOLVER.MICRO_BATCH_SIZE: found 4, .*8 / 4 workers = 2"),
        (8, 3, 1, "SOLVER.MICRO_BATCH_SIZE: found 3, .*8 / 1 workers = 8"),
        (8, -1, 1, "SOLVER.MICRO_BATCH_SIZE: found -1, .*0 .off. or positive"),
        (0, 0, 1, "SOLVER.IMS_PER_BATCH: found 0, .*positive"),
        (8.0, 0, 1, "SOLVER.IMS_PER_BATCH: found 8.0, .*whole number of images"),
        (8, True, 1, "SOLVER.MICRO_BATCH_SIZE: found True, .*whole number of images"),
    ],
)
def test_a_batch_that_cannot_be_cut(batch, micro, workers, message):
    with pytest.raises(ValueError, match=message):
        split_batch(batch, micro, workers)


@pytest.mark.parametrize("micro, workers, passes", [(0, 1, 1), (8, 1, 1), (2, 1, 4), (2, 2, 2)])
def test_passes_of_one_worker(tmp_path, micro, workers, passes):
    assert micro_batches(toy_config(tmp_path, SOLVER__MICRO_BATCH_SIZE=micro), workers) == passes


def test_micro_batches_make_the_step_of_the_whole_batch(tmp_path):
    off = {"AGVM__ENABLED": False}
    whole = train(toy_config(tmp_path / "a", **off))
    pieces = train(toy_config(tmp_path / "b", **off, **MICRO))
    assert type(whole._trainer) is SimpleTrainer and type(pieces._trainer) is MicroBatchTrainer
    for key, value in weights(whole).items():
        torch.testing.assert_close(weights(pieces)[key], value, rtol=1e-4, atol=1e-6)


def test_a_batch_of_no_images_is_an_error():
    model = ToyDetector()
    trainer = MicroBatchTrainer(model, [[]], torch.optim.SGD(model.parameters(), lr=0.1), 3)
    with pytest.raises(ValueError, match="batch of no images"):
        trainer.run_step()


def test_unequal_pieces_are_averaged_by_image_count():
    model, data = ToyDetector(), batch(7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = MicroBatchTrainer(model, [data], optimizer, 3)  # 3 + 3 + 1
    passes = []
    trainer.register_hooks([watcher := hooks.CallbackHook()])
    watcher.after_micro_batch = passes.append
    with EventStorage(0) as storage:
        trainer.run_step()
        logged = storage.latest()["total_loss"][0]
    assert passes == [3 / 7, 3 / 7, 1 / 7]
    found = [p.grad.clone() for p in model.parameters()]
    other = ToyDetector()
    loss = sum(other(data).values())
    loss.backward()
    for g, p in zip(found, other.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad)
    assert logged == pytest.approx(loss.item(), rel=1e-5)


cpu_scaler = pytest.mark.skipif(
    not hasattr(torch.amp, "GradScaler"), reason="torch before 2.3 has no GradScaler on a CPU"
)


@pytest.mark.parametrize("scaled", [False, pytest.param(True, marks=cpu_scaler)])
def test_micro_batches_with_autocast_and_a_grad_scaler(scaled):
    model = ToyDetector()
    optimizer = split_param_groups(torch.optim.SGD(model.parameters(), lr=0.1), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    trainer = MicroBatchTrainer(
        model, ToyLoader(8), optimizer, 2, grad_scaler=scaler, precision=torch.bfloat16
    )
    hook = AGVMHook(model, optimizer, interval=1, momentum=0.5, micro_batches=4, batch_size=8)
    trainer.register_hooks([hook])
    other = copy.deepcopy(model)
    trainer.train(0, 1)

    def loss_of(model, data):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return sum(model(data).values())

    data = next(iter(ToyLoader(8)))
    wanted = factors(other, [data[i : i + 2] for i in range(0, 8, 2)], loss_of=loss_of)
    assert hook.modulator.factors.tolist() == pytest.approx(list(wanted.values()), rel=1e-3)
    if scaled:
        saved = trainer.state_dict()
        assert saved["grad_scaler"]["scale"] == 1024.0
        scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0})
        trainer.load_state_dict(saved)
        assert scaler.get_scale() == 1024.0


@cpu_scaler
def test_a_step_skipped_for_inf_leaves_factors_alone():
    model = ToyDetector()
    optimizer = split_param_groups(torch.optim.SGD(model.parameters(), lr=0.1), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)  # times the loss: inf
    data = [{"image": d["image"], "target": d["target"] * 1e6} for d in batch(8)]
    trainer = MicroBatchTrainer(model, [data], optimizer, 4, scaler)
    hook = AGVMHook(model, optimizer, interval=1, micro_batches=2)
    trainer.register_hooks([hook])
    before = copy.deepcopy(model.state_dict())
    trainer.train(0, 1)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert scaler.get_scale() == pytest.approx(0.5e38)  # less the next time
    assert hook.modulator.factors.tolist() == [1.0] * 4


@cpu_scaler
def test_an_amp_trainer_keeps_its_precision_and_scaler():
    model = ToyDetector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    amp = AMPTrainer(model, ToyLoader(8), optimizer, grad_scaler=scaler)
    amp.precision, amp.gather_metric_period = torch.bfloat16, 7
    made = in_micro_batches(amp, 4)
    assert (made.model, made.optimizer, made.grad_scaler) == (model, optimizer, scaler)
    assert (made.precision, made.gather_metric_period) == (torch.bfloat16, 7)


@pytest.mark.parametrize("skip", [False, True])
def test_a_models_own_stop_at_nan_holds_unless_it_is_to_be_skipped(skip):
    """Detectron2's RPN raises."""

    class Stops(ToyDetector):
        def forward(self, data):
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN")

    model = Stops()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    skip_nonfinite_steps(optimizer, model)
    trainer = MicroBatchTrainer(model, ToyLoader(8), optimizer, 4, skip_nonfinite=skip)
    before = copy.deepcopy(model.state_dict())
    with EventStorage(0):
        if skip:
            trainer.run_step()
        else:
            with pytest.raises(FloatingPointError, match="contain Inf/NaN"):
                trainer.run_step()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def _count_reductions(micro_batch_size):
    """In a worker: buckets reduced in each of three steps."""
    calls = []

    def hook(group, bucket):
        calls.append(bucket.index())
        return default_hooks.allreduce_hook(group, bucket)

    ddp = DistributedDataParallel(ToyDetector())
    ddp.register_comm_hook(ddp.process_group, hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    loader = ToyLoader(8, dist.get_rank(), 2)
    MicroBatchTrainer(ddp, loader, optimizer, micro_batch_size).train(0, 3)
    return calls


@pytest.mark.parametrize("micro_batch_size", [4, 1])
def test_workers_communicate_in_the_last_pass_only(workers, micro_batch_size):
    assert workers(2).run(_count_reductions, micro_batch_size) == [[0] * 3] * 2


def test_a_projects_own_inner_trainer_cannot_be_cut(tmp_path):
    class Own(SimpleTrainer):
        pass

    class Theirs(DefaultTrainer):
        def __init__(self, cfg):
            super().__init__(cfg)
            self._trainer = Own(self.model, self.data_loader, self.optimizer)

        build_model = ToyTrainer.__dict__["build_model"]
        build_train_loader = ToyTrainer.__dict__["build_train_loader"]

    class Trainer(AGVMTrainerMixin, Theirs):
        pass

    with pytest.raises(ValueError, match="SOLVER.MICRO_BATCH_SIZE.*its own Own"):
        Trainer(toy_config(tmp_path, **MICRO))
