"""Resuming with another config: what the user asked for holds, and a line says so for each key."""

import json
import os
import re
import pytest
import torch
import yaml
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from toy import ToyDetector, ToyTrainer, agvm_hook, batch, toy_config, weights

from agvm_d2.d2 import resume
from agvm_d2.d2.loader import ResumableLoader
from agvm_d2.plain_yaml import plain_config

OFF = {"AGVM__ENABLED": False}
MICRO = {"SOLVER__MICRO_BATCH_SIZE": 2}
IMAGES = 24


def as_dict(record):
    """One of the toy images."""
    return {**batch(1, seed=record["name"])[0], **record}


class Trainer(ToyTrainer):
    """With images that have names, in a loader that can be brought back."""

    @classmethod
    def build_train_loader(cls, cfg):
        return ResumableLoader(
            [{"name": i} for i in range(IMAGES)],
            as_dict,
            cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
            lambda seed: TrainingSampler(IMAGES, seed=seed),
            grouping=False,
            seed=max(cfg.SEED, 0),
        )


def train(folder, until, resume=True, cls=Trainer, **options):
    cfg = toy_config(folder, **{"SOLVER__MAX_ITER": 20, **options})
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "config.yaml")
    if not os.path.exists(path):  # as default_setup
        with open(path, "w") as f:
            f.write(cfg.dump())
    trainer = cls(cfg)
    seen, lrs = [], []
    step = trainer.run_step

    def run_step():
        batches = trainer._trainer._data_loader_iter
        trainer._trainer._data_loader_iter_obj = (keep(b) for b in batches)
        trainer.run_step = counted
        counted()

    def keep(data):
        seen.extend(d.get("name") for d in data)
        return data

    def counted():
        lrs.append(trainer.optimizer.param_groups[0]["lr"])
        step()

    trainer.run_step = run_step
    trainer.resume_or_load(resume=resume)
    trainer.max_iter = until
    trainer.train()
    trainer.seen, trainer.lrs = seen, lrs
    return trainer


def lines(log):
    found = re.findall(r"Resumed at iteration (\d+) with another (\S+): saved (.*), now", log.text)
    return {key: (int(at), saved) for at, key, saved in found}


def by_hand(folder, batches, **options):
    """The saved weights and momentum, and then plain SGD with these options."""
    saved = torch.load(os.path.join(folder, "model_final.pth"), weights_only=True)
    model = ToyDetector()
    model.load_state_dict(saved["model"])
    optimizer = torch.optim.SGD(model.parameters(), **options)
    state = saved["trainer"]["_trainer"]["optimizer"]
    groups = saved["trainer"]["hooks"]["ConfigRecord"]["groups"]
    index = {
        name: i
        for names, group in zip(groups, state["param_groups"])
        for name, i in zip(names, group["params"])
    }
    for name, p in model.named_parameters():
        optimizer.state[p]["momentum_buffer"] = state["state"][index[name]]["momentum_buffer"]
    for data in batches:
        optimizer.zero_grad()
        sum(model(data).values()).backward()
        optimizer.step()
    return model.state_dict()


DEFAULTS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.0001, "nesterov": False}


@pytest.mark.parametrize("agvm", [OFF, {"AGVM__START_ITER": 1000}], ids=["off", "on"])
@pytest.mark.parametrize(
    "option, value",
    [
        ("BASE_LR", 0.002),
        ("MOMENTUM", 0.5),
        ("WEIGHT_DECAY", 0.3),
        ("WEIGHT_DECAY", 0.0),
        ("NESTEROV", True),
    ],
)
def test_the_optimizers_options_hold(option, value, agvm, tmp_path, d2_log):
    train(tmp_path, 6, **agvm)
    assert not lines(d2_log)
    key = {"BASE_LR": "lr"}.get(option, option.lower())
    # 48 images of 24: the next epoch's order is the loader's own.
    trainer = train(tmp_path / "straight", 9, resume=False, **agvm)
    batches = [[as_dict({"name": n}) for n in trainer.seen[8 * i :][:8]] for i in (6, 7, 8)]
    expected = by_hand(tmp_path, batches, **{**DEFAULTS, key: value})
    resumed = train(tmp_path, 9, **agvm, **{f"SOLVER__{option}": value})
    assert resumed.seen == trainer.seen[48:]
    assert resumed.lrs == [value if key == "lr" else 0.05] * 3
    for name, found in weights(resumed).items():
        assert torch.allclose(found, expected[name], rtol=1e-5, atol=1e-7), name
    saved = {"BASE_LR": 0.05, "MOMENTUM": 0.9, "WEIGHT_DECAY": 0.0001, "NESTEROV": False}[option]
    assert lines(d2_log) == {f"SOLVER.{option}": (6, repr(saved))}
    held = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert held["SOLVER"][option] == value


def test_config_yaml_is_the_runs_own_at_its_end(tmp_path):
    """A project's script writes it before its run is refused here, and while another trains."""
    path = tmp_path / "config.yaml"

    class Trainer2(Trainer):
        def after_step(self):
            path.write_text("SEED: 99")
            super().after_step()

    train(tmp_path, 4, cls=Trainer2)
    assert yaml.safe_load(path.read_text())["SOLVER"]["MAX_ITER"] == 20


@pytest.mark.parametrize("agvm", [OFF, MICRO], ids=["off", "on"])
def test_keys_that_make_other_param_groups(agvm, tmp_path):
    """Detectron2 puts parameters of equal options into one group."""
    before = train(tmp_path, 5, **agvm)
    momenta = {p.sum().item(): s["momentum_buffer"] for p, s in before.optimizer.state.items()}
    groups = len(before.optimizer.param_groups)
    after = Trainer(toy_config(tmp_path, SOLVER__MAX_ITER=20, SOLVER__BIAS_LR_FACTOR=2.0, **agvm))
    after.resume_or_load(resume=True)
    assert len(after.optimizer.param_groups) == 2 * groups
    for p, state in after.optimizer.state.items():
        assert torch.equal(state["momentum_buffer"], momenta[p.sum().item()])
    after.max_iter = 6
    after.train()
    found = {(g["lr"], p.dim()) for g in after.optimizer.param_groups for p in g["params"]}
    assert found == {(0.05, 2), (0.1, 1)}


@pytest.mark.parametrize("optimizer", ["SGD", "ADAMW"])
def test_the_schedules_keys_hold_from_the_next_iteration(optimizer, tmp_path, d2_log):
    options = {**MICRO, "SOLVER__OPTIMIZER": optimizer}
    warm = {"SOLVER__WARMUP_ITERS": 4, "SOLVER__WARMUP_METHOD": "linear"}
    straight = train(tmp_path / "a", 12, **options, **warm).lrs
    train(tmp_path / "b", 6, **options, **warm)
    again = train(tmp_path / "b", 12, **options, **warm)
    assert again.lrs == straight[6:] and not lines(d2_log)
    train(tmp_path / "c", 6, **options, **warm)
    steps = {"SOLVER__STEPS": (6, 9), "SOLVER__GAMMA": 0.5, "SOLVER__BASE_LR": 0.01}
    found = train(tmp_path / "c", 12, **options, **warm, **steps)
    assert found.lrs == pytest.approx([0.005] * 3 + [0.0025] * 3)
    assert {k.split(".")[1] for k in lines(d2_log)} == {"STEPS", "GAMMA", "BASE_LR"}
    base = [g["initial_lr"] for g in found.optimizer.param_groups]
    assert base == [0.01] * len(base) == found.scheduler.base_lrs


@pytest.mark.parametrize("new, begins", [(4, 48), (16, 48), (10, 40), (6, 48)])
def test_another_batch_size_goes_on_after_the_images_seen(new, begins, tmp_path, d2_log):
    """6 iterations of 8 images; rounded down to whole batches of the new size."""
    stream = train(tmp_path / "all", 12, resume=False, **OFF).seen
    assert sorted(stream[:IMAGES]) == list(range(IMAGES)) != stream[:IMAGES]
    train(tmp_path / "run", 6, **OFF)
    other = train(tmp_path / "run", 8, SOLVER__IMS_PER_BATCH=new, **OFF)
    assert other.seen == stream[begins : begins + 2 * new]
    assert lines(d2_log) == {"SOLVER.IMS_PER_BATCH": (6, "8")}
    # And back again.
    end = begins + 2 * new
    last = train(tmp_path / "run", 9, **OFF)
    assert last.seen == stream[end // 8 * 8 :][:8]


def test_averages_of_the_noise_scale_start_anew_with_the_batch(tmp_path):
    options = {**MICRO, "AGVM__START_ITER": 0, "AGVM__INTERVAL": 1}
    train(tmp_path, 6, **options)
    same = Trainer(toy_config(tmp_path, SOLVER__MAX_ITER=20, **options))
    same.resume_or_load(resume=True)
    assert agvm_hook(same).modulator.unit_sq.sum() > 0
    # As many units of twice the images.
    options = {**options, "SOLVER__IMS_PER_BATCH": 16, "SOLVER__MICRO_BATCH_SIZE": 4}
    other = Trainer(toy_config(tmp_path, SOLVER__MAX_ITER=20, **options))
    other.resume_or_load(resume=True)
    modulator = agvm_hook(other).modulator
    assert modulator.unit_sq.sum() == 0
    assert torch.equal(modulator.factors, agvm_hook(same).modulator.factors)
    assert (modulator.factors != 1).any()


@pytest.mark.parametrize(
    "option, value",
    [
        ("ANCHOR", "rpn"),
        ("RULE", "gain"),
        ("RATIO_RANGE", (0.9, 1.1)),
        ("BASE_BATCH_SIZE", 4),
    ],
)
def test_factors_of_another_rule_start_at_1(option, value, tmp_path, d2_log):
    options = {**MICRO, "AGVM__START_ITER": 0, "AGVM__INTERVAL": 1}
    before = train(tmp_path, 6, **options)
    assert (agvm_hook(before).modulator.factors != 1).any()
    after = Trainer(
        toy_config(tmp_path, SOLVER__MAX_ITER=20, **options, **{f"AGVM__{option}": value})
    )
    after.resume_or_load(resume=True)
    assert agvm_hook(after).modulator.factors.tolist() == [1.0] * 4
    after.max_iter = 7
    after.train()
    assert f"AGVM.{option}" in lines(d2_log) and "start at 1 again" in d2_log.text
    factors = agvm_hook(after).modulator.factors
    if option == "ANCHOR":
        assert factors[2] == 1  # the anchor's own
    if option == "RATIO_RANGE":
        assert factors.min() >= 0.9**0.5 and factors.max() <= 1.1**0.5


def test_max_iter_below_the_checkpoint_is_an_error(tmp_path, d2_log):
    train(tmp_path, 6, **OFF)
    for max_iter in (1, 5):
        with pytest.raises(ValueError, match=f"MAX_ITER: found {max_iter}, .* has 6 iterations"):
            train(tmp_path, max_iter, SOLVER__MAX_ITER=max_iter, **OFF)
    assert train(tmp_path, 6, SOLVER__MAX_ITER=6, **OFF).seen == []  # done: a requeued job
    assert "All 6 iterations (SOLVER.MAX_ITER) are done already" in d2_log.text


def test_the_saved_seed_holds(tmp_path, d2_log):
    stream = train(tmp_path / "all", 9, SEED=3, **OFF).seen
    train(tmp_path / "run", 6, SEED=3, **OFF)
    assert train(tmp_path / "run", 9, SEED=4, **OFF).seen == stream[48:]
    assert lines(d2_log) == {"SEED": (6, "3")}
    assert "What holds: saved; the order of images" in d2_log.text
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["SEED"] == 3
    d2_log.clear()
    train(tmp_path / "run", 10, SEED=-1, **OFF)  # none asked for
    assert not lines(d2_log)


def test_all_keys_are_listed_but_those_that_change_nothing_in_a_checkpoint(tmp_path, d2_log):
    train(tmp_path, 4, **MICRO)
    train(
        tmp_path, 5, **MICRO, SOLVER__MAX_ITER=30, AGVM__INTERVAL=5, AGVM__MOMENTUM=0.1,
        SOLVER__CHECKPOINT_PERIOD=7, DATALOADER__NUM_WORKERS=1, TEST__EVAL_PERIOD=100,
        MODEL__RPN__NMS_THRESH=0.6, INPUT__MIN_SIZE_TRAIN=(100,), MODEL__WEIGHTS="other.pth",
    )  # fmt: skip
    assert lines(d2_log).keys() == {
        "SOLVER.MAX_ITER", "AGVM.INTERVAL", "AGVM.MOMENTUM",
        "MODEL.RPN.NMS_THRESH", "INPUT.MIN_SIZE_TRAIN", "MODEL.WEIGHTS",
    }  # fmt: skip
    assert "'other.pth'. What holds: neither; the weights are those of the" in d2_log.text


def test_a_checkpoint_without_a_config_goes_on_as_it_did(tmp_path, d2_log):
    train(tmp_path, 4, **OFF)
    path = tmp_path / "model_final.pth"
    data = torch.load(path, weights_only=True)
    del data["trainer"]["hooks"]["ConfigRecord"]
    torch.save(data, path)
    assert train(tmp_path, 6, SOLVER__BASE_LR=0.001, **OFF).lrs == [0.05] * 2
    assert not lines(d2_log)
    assert d2_log.text.count("does not say with which config it was made") == 1


def test_another_model_is_refused(tmp_path):
    train(tmp_path, 4, **OFF)

    class Wider(Trainer):
        @classmethod
        def build_model(cls, cfg):
            return ToyDetector(width=9)

    with pytest.raises(
        ValueError, match="has the shape .*9.*, but .*8.* in the checkpoint: the co"
    ):
        train(tmp_path, 6, cls=Wider, **OFF)


def in_worker(folder, until, options):
    trainer = train(folder, until, **options)
    return trainer.seen, trainer.lrs, weights(trainer)


def test_two_workers(workers, tmp_path):
    workers(2).run(in_worker, tmp_path, 8, OFF)
    data = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert data["trainer"]["hooks"]["IterationSeeder"]["images"] == 64
    options = {**OFF, "SOLVER__IMS_PER_BATCH": 12, "SOLVER__BASE_LR": 0.01}

    one, other = workers(2).run(in_worker, tmp_path, 10, options)
    assert one[1] == other[1] == [0.01] * 2
    assert len(one[0]) == len(other[0]) == 12
    assert all(torch.equal(one[2][k], other[2][k]) for k in one[2])
    whole = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert whole["trainer"]["hooks"]["IterationSeeder"]["images"] == 60 + 24


def test_a_lazy_configs_text_is_compared_without_being_run():
    from detectron2.config import LazyCall as L
    from omegaconf import OmegaConf

    def make(lr, name):
        return OmegaConf.create(
            {
                "optimizer": L(torch.optim.SGD)(lr=lr, betas=(0.9, 0.999)),
                "train": {"seed": 1, "output_dir": name, "checkpointer": {"period": 3}},
                "hooks": [{"a": 1}],
            },
            flags={"allow_objects": True},
        )

    a, b = (
        dict(resume._flat(plain_config(resume.config_text(c))))
        for c in (make(1, "x"), make(2, "y"))
    )
    assert list(resume.differences(a, b)) == [("optimizer.lr", 1, 2)]
    evil = "a: !!python/object/apply:os.mkdir [evil]\nb: 1\n"
    assert plain_config(evil) == {"a": "object/apply:os.mkdir ['evil']", "b": 1}
    assert not os.path.exists("evil")
    json.dumps(a)  # plain
