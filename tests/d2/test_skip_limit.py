"""ON_NONFINITE skip has an end; a static graph and micro-batches."""

import math
import pytest
import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from toy import ToyDetector, ToyLoader, ToyTrainer, toy_config

from agvm_d2.d2 import lazy
from agvm_d2.d2.checkpoint import AtomicCheckpointer
from agvm_d2.d2.micro_batches import MicroBatchTrainer
from agvm_d2.solver.clip import MAX_SHARE, MAX_SKIPPED, SkipLimit

OPTIONS = {"SOLVER__ON_NONFINITE": "skip", "SOLVER__CHECKPOINT_PERIOD": 1, "SOLVER__MAX_ITER": 60}


class Bad:
    """The toy loader, whose images of the last worker are NaN from iteration 3 on."""

    def __init__(self, size):
        self.rank, self.workers = comm.get_rank(), comm.get_world_size()
        self.loader = ToyLoader(size, self.rank, self.workers)

    def __iter__(self):
        for i, data in enumerate(self.loader):
            if i >= 3 and self.rank == self.workers - 1:
                data[0]["image"][0] = math.nan
            yield data


class BadTrainer(ToyTrainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return Bad(cfg.SOLVER.IMS_PER_BATCH)


def train(folder, options) -> str:
    """In a worker or here; how it ended."""
    trainer = BadTrainer(toy_config(folder, **{**OPTIONS, **options}))
    try:
        trainer.train()
    except FloatingPointError as error:
        return str(error)
    return "at the end"


def check(ends, folder):
    for end in ends:
        assert end.startswith(f"Iteration {3 + MAX_SKIPPED - 1}: {MAX_SKIPPED} of the last 23 ste")
        assert "ON_NONFINITE" in end and "BASE_LR" in end and "\n" not in end
    assert not (folder / "model_final.pth").exists()
    model = ToyDetector()
    assert AtomicCheckpointer(model, str(folder)).resume_or_load("")["iteration"] == 21
    assert all(p.isfinite().all() for p in model.parameters())


def test_outside_of_detectron2s_trainers():
    limit = SkipLimit()
    with pytest.raises(FloatingPointError, match=f"^{MAX_SKIPPED} of the last {MAX_SKIPPED} st"):
        for _ in range(MAX_SKIPPED):
            limit.step(skipped=True)
    assert limit.skipped == MAX_SKIPPED


def test_a_diverged_run_ends(tmp_path):
    check([train(tmp_path, {"SOLVER__MICRO_BATCH_SIZE": 2})], tmp_path)


def test_all_workers_alike(workers, tmp_path):
    check(workers(2).run(train, tmp_path, {}), tmp_path)


def skip(pattern):
    """The steps that pass."""
    limit = SkipLimit()
    with EventStorage(0) as storage:
        for i, bad in enumerate(pattern):
            try:
                limit.step(bad)
            except FloatingPointError:
                return i
            storage.step()
    return len(pattern)


@pytest.mark.parametrize(
    "pattern, steps",
    [
        ([True] * 60, MAX_SKIPPED - 1),
        (([True] * (MAX_SKIPPED - 1) + [False] * 31) * 9, 9 * (MAX_SKIPPED + 30)),
        ([True, False] * 200, 400),  # just half
        ([True, True, False] * 200, 3 * MAX_SHARE // 2 + 1),
    ],
)
def test_in_a_row_and_of_the_last_hundred(pattern, steps):
    assert skip(pattern) == pytest.approx(steps, abs=1)


class Statistics(ToyDetector):
    """With a mean of its images, as BatchNorm's."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, batched_inputs):
        for sample in batched_inputs:
            self.mean += sample["image"].mean()
        return super().forward(batched_inputs)


def test_what_a_grad_scaler_skips_counts_too():
    model = Statistics()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        scaler = torch.amp.GradScaler("cpu")
    except (AttributeError, TypeError):
        pytest.skip("this torch scales gradients on CUDA only")
    loader = Bad(8)
    trainer = MicroBatchTrainer(model, loader, optimizer, 4, scaler, skip_nonfinite=True)
    with pytest.raises(FloatingPointError, match=f"{MAX_SKIPPED} of the last"):
        trainer.train(0, 60)
    assert trainer.iter == 3 + MAX_SKIPPED - 1
    means = [s["image"].mean() for i, data in zip(range(3), ToyLoader(8)) for s in data]
    assert model.mean.item() == pytest.approx(sum(means).item(), rel=1e-5)  # of the good images


class Static(ToyDetector):
    static_graph = True  # as DistributedDataParallel has it


@pytest.mark.parametrize("skip", [False, True])
def test_a_static_graph_with_micro_batches_is_refused(skip):
    model = Static()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match="train.ddp.static_graph.*SOLVER.MICRO_BATCH_SIZE .train.m"
    ):
        MicroBatchTrainer(model, ToyLoader(8), optimizer, 2, skip_nonfinite=skip)
    loader = ToyLoader(8)
    loader.batch_size = 8
    MicroBatchTrainer(model, loader, optimizer, 8, skip_nonfinite=skip)  # one pass


def test_a_lazy_config_is_told_before_it_starts(tmp_path):
    pytest.importorskip("timm")
    import os

    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    folder = os.path.join(root, "configs/Digits-InstanceSegmentation")
    path = os.path.join(folder, "mask_rcnn_vitdet_thin_6ep_bs16_agvm.py")
    cfg = lazy.load(path, ["train.micro_batch_size=2"])
    cfg.train.ddp.static_graph = True
    with pytest.raises(ValueError, match="train.ddp.static_graph.*micro_batch_size"):
        lazy.check(cfg, 2)
    cfg.train.micro_batch_size = 8  # one pass
    lazy.check(cfg, 2)
