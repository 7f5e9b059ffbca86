import copy
import pytest
import torch
from detectron2.engine import DefaultTrainer, SimpleTrainer, hooks
from detectron2.utils.events import EventStorage
from toy import ToyDetector, batch, factors
from toy_d2 import ToyLoader, ToyTrainer, toy_config, train, weights

from agvm_d2 import AGVMHook, AGVMTrainerMixin, split_param_groups
from agvm_d2.d2.micro_batches import MicroBatchTrainer, micro_batches, split_batch

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
        assert trainer.state_dict()["grad_scaler"]["scale"] == 1024.0


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
    assert hook.modulator.factors.tolist() == [1.0] * 4


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
