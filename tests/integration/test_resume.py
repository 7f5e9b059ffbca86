"""40 iterations at once, and 20, a resume and 20, give the same bits: weights, optimizer, factors,
losses."""

import shutil
import own_mapper
import pytest
import torch
from detectron2.engine import HookBase
from helpers import agvm_state, needs_muon, same
from toy_d2 import RCNNTrainer, rcnn_config

import agvm_d2.data  # noqa: F401
from agvm_d2 import AGVMTrainer, AGVMTrainerMixin
from agvm_d2.d2.loader import ResumableLoader

INTERVAL = 4


def config(output_dir, **options):
    fixed = {
        "SOLVER__BASE_LR": 0.002,
        "SOLVER__MAX_ITER": 40,
        "SOLVER__STEPS": (30,),
        "SOLVER__WARMUP_ITERS": 5,
        "AGVM__START_ITER": 6,
        "AGVM__INTERVAL": INTERVAL,
    }
    return rcnn_config(output_dir, **{**fixed, **options})


class Losses(HookBase):
    def __init__(self):
        self.values = {}

    def after_step(self):
        history = self.trainer.storage.histories()
        if "total_loss" in history:  # on the main process
            self.values[self.trainer.iter] = history["total_loss"].latest()


def train(output_dir, options, trainer_class=RCNNTrainer) -> dict:
    """In a worker or here; the loss of each iteration."""
    trainer = trainer_class(config(output_dir, **options))
    losses = Losses()
    trainer.register_hooks([losses])
    trainer.resume_or_load(resume=True)
    trainer.train()
    return losses.values


def resumed_at(iteration, straight, folder):
    """An output folder as it was when `iteration` was done."""
    folder.mkdir(parents=True)
    name = f"model_{iteration:07d}.pth"
    shutil.copy(straight / name, folder / name)
    (folder / "last_checkpoint").write_text(name)
    return folder


def check(run, options, tmp_path, iterations):
    straight = tmp_path / "straight"
    period = iterations[0] + 1 if len(iterations) == 1 else 1
    losses = run(straight, {**options, "SOLVER__CHECKPOINT_PERIOD": period})
    by_gain = "AGVM__SCHEDULE" in options
    assert 20 < len(losses) < 40 if by_gain else len(losses) == 40
    assert len(set(losses.values())) == len(losses)
    whole = torch.load(straight / "model_final.pth", weights_only=True)
    factors = whole["trainer"]["hooks"]["AGVMHook"]["factors"]
    assert sum(f != 1 for f in factors) == (4 if options.get("AGVM__RULE") == "gain" else 3)
    for iteration in iterations:
        folder = resumed_at(iteration, straight, tmp_path / f"from{iteration}")
        # With another number of loader processes: the order must not depend on it.
        again = run(folder, {**options, "DATALOADER__NUM_WORKERS": 2})
        assert again == {i: loss for i, loss in losses.items() if i > iteration}
        same(whole, torch.load(folder / "model_final.pth", weights_only=True))


ONE = {"SOLVER__MICRO_BATCH_SIZE": 2}
GAIN = {"AGVM__RULE": "gain", "AGVM__BASE_BATCH_SIZE": 2}
SCHEDULE = {**GAIN, "AGVM__SCHEDULE": "gain", "AGVM__START_ITER": 0}
ADAMW = {"SOLVER__OPTIMIZER": "ADAMW", "SOLVER__WEIGHT_DECAY": 0.05}
MUON = {"SOLVER__OPTIMIZER": "MUON", "SOLVER__MOMENTUM": 0.95}
NO_SEED = {"SEED": -1}  # one is drawn, and kept
EVERY_OFFSET = range(19, 19 + INTERVAL)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow, id="slow")


@pytest.mark.parametrize(
    "options, iterations",
    [
        pytest.param(ADAMW, [19], id="adamw"),
        *(slow(options, [19]) for options in ({}, NO_SEED, MUON, GAIN)),
        *(slow(options, EVERY_OFFSET) for options in ({}, ADAMW, MUON, GAIN)),
    ],
)
def test_one_process_with_micro_batches(options, iterations, digits, tmp_path):
    if options is MUON:
        needs_muon()
    check(train, {**ONE, **options}, tmp_path, iterations)


@pytest.mark.parametrize(
    "options, iterations",
    [
        pytest.param(NO_SEED, [20], id="sgd_without_a_seed"),
        *(
            slow(options, iterations)
            for options in ({}, ADAMW)
            for iterations in ([20], EVERY_OFFSET)
        ),
    ],
)
def test_two_workers(options, iterations, digits, workers, tmp_path):
    def run(folder, options):
        return workers(2).run(train, folder, options)[0]

    check(run, options, tmp_path, iterations)


def test_the_gains_schedule(digits, tmp_path):
    check(train, {**ONE, **SCHEDULE}, tmp_path, [15])


def test_the_gains_schedule_of_two_workers(digits, workers, tmp_path):
    def run(folder, options):
        return workers(2).run(train, folder, options)[0]

    check(run, SCHEDULE, tmp_path, [15])


def test_another_number_of_workers_goes_on_with_the_factors(digits, workers, tmp_path, d2_log):
    straight = tmp_path / "two"
    options = {"SOLVER__CHECKPOINT_PERIOD": 20}
    workers(2).run(train, straight, options)
    folder = resumed_at(19, straight, tmp_path / "one")
    before = agvm_state(straight / "model_0000019.pth")
    found = []

    class Look(RCNNTrainer):
        def before_train(self):
            super().before_train()
            found.extend(self.state_dict()["hooks"]["AGVMHook"]["factors"])

    trainer = Look(config(folder, **ONE))
    trainer.resume_or_load(resume=True)
    trainer.train()
    assert found == before["factors"] and found[1] != 1
    assert "Resumed with 1 workers, saved with 2: " in d2_log.text


class ByTheMixin(AGVMTrainerMixin, own_mapper.Trainer):
    pass


class InItsOwnPlace(AGVMTrainer):
    build_train_loader = classmethod(own_mapper.build_train_loader)


@pytest.mark.parametrize("trainer_class, enabled", [(ByTheMixin, True), (InItsOwnPlace, False)])
def test_a_project_with_a_mapper_of_its_own(trainer_class, enabled, digits, tmp_path, d2_log):
    options = {**ONE, "SOLVER__MAX_ITER": 8, "SOLVER__STEPS": (7,), "SOLVER__CHECKPOINT_PERIOD": 4}
    options |= {"AGVM__ENABLED": enabled, "AGVM__START_ITER": 1, "AGVM__INTERVAL": 2}
    losses = train(tmp_path / "a", options, trainer_class)
    assert len(set(losses.values())) == 8 and "new order" not in d2_log.text
    folder = resumed_at(3, tmp_path / "a", tmp_path / "b")
    again = train(folder, {**options, "DATALOADER__NUM_WORKERS": 1}, trainer_class)
    assert again == {i: losses[i] for i in range(4, 8)}
    whole, resumed = (torch.load(f / "model_final.pth") for f in (tmp_path / "a", folder))
    same(whole, resumed)


def test_each_worker_of_a_project_reads_its_share(digits, workers):
    one, other = workers(2).run(_loader_of_a_project)
    assert one[:2] == other[:2] == (2, 7) and not {*one[2]} & {*other[2]}


def _loader_of_a_project():
    loader = ByTheMixin.build_train_loader(config("", SEED=7))
    assert isinstance(loader, ResumableLoader)
    return loader.batch_size, loader.seed, [d["image_id"] for d in next(iter(loader))]
