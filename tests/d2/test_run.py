import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from toy import ToyDetector
from toy_d2 import ToyLoader, toy_config

from agvm_d2.d2 import lazy, trainer
from agvm_d2.d2.loader import IterationSeeder, ResumableLoader
from agvm_d2.d2.micro_batches import MicroBatchTrainer
from agvm_d2.d2.run import RunOptions
from agvm_d2.solver.build import prepare

PAIRS = (("body", "backbone"), ("rest", ""))
ALL = RunOptions(batch_size=32, micro_batch_size=4, skip_nonfinite=True, seed=3, modules=PAIRS)
NONE = RunOptions(batch_size=32, modules=None)


def in_yacs(options, tmp_path):
    return toy_config(
        tmp_path,
        SOLVER__IMS_PER_BATCH=options.batch_size,
        SOLVER__MICRO_BATCH_SIZE=options.micro_batch_size,
        SOLVER__ON_NONFINITE="skip" if options.skip_nonfinite else "stop",
        SEED=options.seed,
        AGVM__ENABLED=options.modules is not None,
        AGVM__MODULES=options.modules or (),
    )


def in_lazy(options):
    train = {"micro_batch_size": options.micro_batch_size, "seed": options.seed}
    train["on_nonfinite"] = "skip" if options.skip_nonfinite else "stop"
    agvm = {"enabled": options.modules is not None, "modules": options.modules or ()}
    loader = {"train": {"total_batch_size": options.batch_size}}
    return OmegaConf.create({"train": train, "agvm": agvm, "dataloader": loader})


@pytest.mark.parametrize("options", [ALL, NONE, RunOptions(8)], ids=["all", "none", "default"])
def test_a_yacs_config_and_a_lazyconfig_give_the_same(options, tmp_path):
    assert trainer.run_options(in_yacs(options, tmp_path)) == options
    found = lazy.run_options(in_lazy(options))
    modules = None if found.modules is None else tuple(map(tuple, found.modules))
    assert RunOptions(**{**vars(found), "modules": modules}) == options
    assert lazy.run_options(OmegaConf.create({**in_lazy(RunOptions(8)), "train": {}, "agvm": {}}))


def inner(options, trainer_class=SimpleTrainer):
    model = ToyDetector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return options.prepare_trainer(trainer_class(model, ToyLoader(8), optimizer))


@pytest.mark.parametrize(
    "options, images, skips",
    [
        (RunOptions(8, 2), 2, False),
        (RunOptions(8, skip_nonfinite=True), 8, True),
        (RunOptions(8, 4, skip_nonfinite=True), 4, True),
    ],
)
def test_an_inner_trainer_of_micro_batches_where_one_is_needed(options, images, skips):
    made = inner(options)
    assert isinstance(made, MicroBatchTrainer)
    assert (made.micro_batch_size, made.skip_nonfinite) == (images, skips)


def test_micro_batches_are_of_a_workers_share(monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    options = RunOptions(16, 4)
    assert options.micro_batches == 2 and inner(options).micro_batch_size == 4
    assert inner(RunOptions(16, skip_nonfinite=True)).micro_batch_size == 8


def test_else_the_trainer_that_was_there_also_a_projects_own():
    class Own(SimpleTrainer):
        pass

    for options in (RunOptions(8), RunOptions(8, 8)):
        assert type(inner(options, Own)) is Own
    with pytest.raises(ValueError, match="SOLVER.MICRO_BATCH_SIZE.*its own Own"):
        inner(RunOptions(8, 2), Own)


def test_the_optimizer_is_split_and_skips_as_asked():
    model = ToyDetector()
    for options, groups in ((ALL, 2), (NONE, 1), (RunOptions(8), 4)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        made = prepare(optimizer, model, options.skip_nonfinite, options.modules)
        assert made is optimizer
        assert len(optimizer.param_groups) == groups
        with EventStorage(0):
            bad = next(model.parameters())
            before, bad.grad = bad.detach().clone(), torch.full_like(bad, torch.nan)
            optimizer.step()
        assert torch.equal(bad, before) == options.skip_nonfinite
        bad.data.copy_(before)


def test_the_seeder_takes_the_loaders_seed_or_the_runs():
    loader = ResumableLoader([{}], dict, 1, iter, seed=5)
    assert RunOptions(8, seed=3).iteration_seeder(loader).state_dict()["seed"] == 5
    seeder = RunOptions(8, seed=3).iteration_seeder(ToyLoader(8))
    assert isinstance(seeder, IterationSeeder) and seeder.state_dict() == {"seed": 3, "workers": 1}
    drawn = RunOptions(8).iteration_seeder(ToyLoader(8)).state_dict()["seed"]
    assert drawn >= 0
