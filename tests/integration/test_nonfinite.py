"""NaN and inf in one worker: all workers decide alike."""

import logging
import math
import random
import pytest
import torch
from detectron2.utils import comm
from toy_d2 import RCNNTrainer, ToyLoader, ToyTrainer, agvm_hook, rcnn_config, toy_config, weights

import agvm_d2.data  # noqa: F401


class Poison:
    """The toy loader, with bad values in one worker's images at some iterations."""

    def __init__(self, loader, bad: dict[int, tuple[int, float]], rank: int):
        self.loader, self.bad, self.rank = loader, bad, rank

    def __iter__(self):
        for i, data in enumerate(self.loader):
            rank, value = self.bad.get(i, (None, 0.0))
            if rank == self.rank:
                data[0]["image"][0] = value
            yield data


def train(output_dir, bad, options):
    """In a worker or here; (weights, factors, text of the log)."""

    class Trainer(ToyTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            workers = comm.get_world_size()
            loader = ToyLoader(cfg.SOLVER.IMS_PER_BATCH, comm.get_rank(), workers)
            return Poison(loader, bad, comm.get_rank())

    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("detectron2.agvm_d2")
    logger.addHandler(handler)
    try:
        trainer = Trainer(toy_config(output_dir, **options))
        trainer.train()
    finally:
        logger.removeHandler(handler)
    params = [p.detach().clone() for p in trainer.model.parameters()]
    return params, agvm_hook(trainer).modulator.factors, [line for line in lines if "NaN" in line]


SKIP = {"SOLVER__ON_NONFINITE": "skip", "AGVM__INTERVAL": 1}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", ["SGD", "ADAMW"])
def test_a_step_is_skipped_by_all_workers(workers, tmp_path, value, optimizer):
    options = {**SKIP, "SOLVER__OPTIMIZER": optimizer}
    one, other = workers(2).run(train, tmp_path, {3: (1, value), 6: (0, value)}, options)
    for a, b in zip(one[0], other[0]):
        assert a.isfinite().all() and torch.equal(a, b)
    assert torch.equal(one[1], other[1]) and one[1].isfinite().all() and (one[1] != 1).any()
    for _, _, lines in (one, other):
        assert [line.split(":")[0] for line in lines] == ["Iteration 3", "Iteration 6"]
        assert "(2 so far)" in lines[1]


def test_a_skipped_step_leaves_weights_and_momentum(tmp_path):
    """With the bad iteration last, the weights are those of one iteration less."""
    options = {**SKIP, "SOLVER__MICRO_BATCH_SIZE": 2}
    skipped = train(tmp_path / "a", {9: (0, math.nan)}, options)
    short = train(tmp_path / "b", {}, {**options, "SOLVER__MAX_ITER": 9})
    assert all(torch.equal(a, b) for a, b in zip(skipped[0], short[0]))
    assert len(skipped[2]) == 1


def test_the_default_stops_and_the_last_checkpoint_is_finite(tmp_path):
    options = {"SOLVER__CHECKPOINT_PERIOD": 1, "SOLVER__MICRO_BATCH_SIZE": 4}
    with pytest.raises(FloatingPointError, match="iteration=5"):
        train(tmp_path, {5: (0, math.nan)}, options)
    name = (tmp_path / "last_checkpoint").read_text()
    assert name == "model_0000004.pth"
    model = torch.load(tmp_path / name, weights_only=True)["model"]
    assert all(v.isfinite().all() for v in model.values())


def test_without_bad_values_skip_changes_no_bit(workers, tmp_path):
    options = {"AGVM__INTERVAL": 1}
    plain = workers(2).run(train, tmp_path, {}, options)
    skip = workers(2).run(train, tmp_path, {}, {**options, **SKIP})
    assert all(torch.equal(a, b) for a, b in zip(plain[0][0], skip[0][0]))
    assert skip[0][2] == []


@pytest.mark.slow
def test_factors_stay_finite_over_10_000_poisoned_steps(workers, tmp_path):
    rng = random.Random(0)
    values = (math.nan, math.inf, -math.inf, 1e38)
    bad = {i: (rng.randrange(2), rng.choice(values)) for i in rng.sample(range(10_000), 1_000)}
    options = {**SKIP, "SOLVER__MAX_ITER": 10_000, "SOLVER__BASE_LR": 0.01}
    one, other = workers(2).run(train, tmp_path, bad, options)
    assert torch.equal(one[1], other[1]) and one[1].isfinite().all()
    assert all(a.isfinite().all() and torch.equal(a, b) for a, b in zip(one[0], other[0]))
    assert len(one[2]) == len(other[2]) > 700
    print(f"10,000 steps, {len(bad)} poisoned, {len(one[2])} skipped; factors {one[1].tolist()}")


def rcnn(output_dir, options):
    """In a worker: a real R-CNN, one NaN pixel in the last worker's image at iteration 2."""

    class Poisoned(RCNNTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            for i, data in enumerate(super().build_train_loader(cfg)):
                for d in data:
                    d["image"] = d["image"].float()
                if i == 2 and comm.get_rank() == comm.get_world_size() - 1:
                    data[0]["image"][0, 0, 0] = math.nan
                yield data

    trainer = Poisoned(rcnn_config(output_dir, **options))
    trainer.train()
    return weights(trainer)


RCNN = {"SOLVER__ON_NONFINITE": "skip", "SOLVER__MAX_ITER": 5, "AGVM__START_ITER": 1}


def test_a_detector_skips_it_in_all_workers_and_keeps_its_statistics(digits, workers, tmp_path):
    one, other = workers(2).run(rcnn, tmp_path, RCNN)
    for name, value in one.items():
        assert value.isfinite().all(), name
        if "running_" not in name and "num_batches" not in name:  # BatchNorm's are each worker's
            assert torch.equal(value, other[name]), name


def test_a_detector_skips_a_bad_micro_batch(digits, tmp_path):
    state = rcnn(tmp_path, {**RCNN, "SOLVER__MICRO_BATCH_SIZE": 2})
    assert all(value.isfinite().all() for value in state.values())


def test_skipping_comes_before_clipping_by_value(tmp_path):
    options = {
        **SKIP,
        "SOLVER__CLIP_GRADIENTS__ENABLED": True,
        "SOLVER__CLIP_GRADIENTS__CLIP_TYPE": "value",
        "SOLVER__MICRO_BATCH_SIZE": 2,
    }
    assert len(train(tmp_path, {3: (0, math.nan)}, options)[2]) == 1
