"""Workers with different configs, code, checkpoints or weights: an error on all of them that says
what differs and who has what, before the first iteration."""

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall as L
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from omegaconf import OmegaConf
from torch import nn
from toy import ToyTrainer, toy_config

from agvm_d2 import AGVMTrainerMixin
from agvm_d2.d2.agreement import _ranks, check_agreement, code, flat, weights

# key -> what the last of three workers has in its place.
OTHERS = {
    "SOLVER.BASE_LR": 0.06,
    "SOLVER.OPTIMIZER": "ADAMW",
    "SOLVER.IMS_PER_BATCH": 12,
    "SOLVER.MICRO_BATCH_SIZE": 1,
    "SOLVER.ON_NONFINITE": "skip",
    "SOLVER.MAX_ITER": 20,
    "SOLVER.STEPS": (5,),
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    "SEED": 3,
    "AGVM.MODE": "monitor",
    "AGVM.ENABLED": False,
    "DATASETS.TRAIN": ("digits_train",),
}
OWN = {"OUTPUT_DIR": "elsewhere", "DATALOADER.NUM_WORKERS": 1, "MODEL.WEIGHTS": "/local/a.pkl"}


def fails(function, *args) -> str:
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return ""


def trainer_with_other(folder, key, value) -> str:
    cfg = toy_config(folder, SOLVER__IMS_PER_BATCH=6)
    if comm.get_rank() == 2:
        cfg.merge_from_list([key, value])
    return fails(ToyTrainer, cfg)


@pytest.mark.parametrize("key", OTHERS)
def test_a_key_that_differs(key, workers, tmp_path):
    messages = workers(3).run(trainer_with_other, tmp_path, key, OTHERS[key])
    assert len(set(messages)) == 1
    before = flat(toy_config(tmp_path, SOLVER__IMS_PER_BATCH=6))[key]
    assert f"{key}: {before!r} on ranks 0-1; {OTHERS[key]!r} on rank 2" in messages[0]
    assert len(messages[0].splitlines()) == 2  # no other key


@pytest.mark.parametrize("key", OWN)
def test_what_each_machine_may_choose(key, workers, tmp_path):
    assert workers(3).run(check_flat_with, tmp_path, key, OWN[key]) == [""] * 3


def check_flat_with(folder, key, value) -> str:
    cfg = toy_config(folder)
    if comm.get_rank() == 2:
        cfg.merge_from_list([key, value])
    return fails(check_agreement, flat(cfg))


def resume_on_one(folder) -> str:
    trainer = ToyTrainer(toy_config(folder, SOLVER__IMS_PER_BATCH=6))
    return fails(trainer.resume_or_load, comm.get_rank() == 1)


def test_resume_on_one_machine_only(workers, tmp_path):
    messages = workers(3).run(resume_on_one, tmp_path)
    assert len(set(messages)) == 1
    assert "--resume: False on ranks 0, 2; True on rank 1" in messages[0]


class LoadsOnRankZero(DefaultTrainer):
    """As AdelaiDet's, whose checkpointer of the optimizer is the main worker's alone."""

    build_model = ToyTrainer.__dict__["build_model"]
    build_train_loader = ToyTrainer.__dict__["build_train_loader"]

    def build_hooks(self):
        if comm.is_main_process():
            parts = {"optimizer": self.optimizer, "scheduler": self.scheduler}
            self.checkpointer = DetectionCheckpointer(self.model, self.cfg.OUTPUT_DIR, **parts)
        else:
            self.checkpointer = DetectionCheckpointer(self.model, self.cfg.OUTPUT_DIR)
        return super().build_hooks()

    def resume_or_load(self, resume=True):
        data = self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        self.start_iter = data.get("iteration", -1) + 1


def load_on_rank_zero(folder, resume) -> str:
    cfg = toy_config(folder, SOLVER__WARMUP_ITERS=8, SOLVER__MAX_ITER=4 + 4 * resume)

    class Mixed(AGVMTrainerMixin, LoadsOnRankZero):
        pass

    trainer = Mixed(cfg)
    found = fails(trainer.resume_or_load, resume)
    if not resume:
        trainer.train()
    return found


def test_an_optimizer_that_only_one_worker_loads(workers, tmp_path):
    assert workers(2).run(load_on_rank_zero, tmp_path, False) == [""] * 2
    messages = workers(2).run(load_on_rank_zero, tmp_path, True)
    assert len(set(messages)) == 1 and "learning rates after loading: " in messages[0]


def start_with_others(folder, what) -> str:
    trainer = ToyTrainer(toy_config(folder, SOLVER__IMS_PER_BATCH=6))
    if comm.get_rank() == 0 and what == "weights":
        with torch.no_grad():
            next(trainer.model.parameters()).view(-1)[0] += 1e-6
    if comm.get_rank() == 0 and what == "iteration":
        trainer.start_iter = 4
    return fails(trainer.train)


def test_other_weights_and_another_first_iteration(workers, tmp_path):
    for what, named in (("weights", "weights at the start"), ("iteration", "first iteration")):
        messages = workers(3).run(start_with_others, tmp_path, what)
        assert len(set(messages)) == 1 and f"  {named}: " in messages[0]
        assert "on rank 0; " in messages[0] and "on ranks 1-2" in messages[0]
    assert workers(3).run(start_with_others, tmp_path, "nothing") == [""] * 3


def other_code() -> str:
    return fails(check_agreement, {**code(), "version of torch": f"2.{comm.get_rank() // 2}"})


def test_other_code(workers):
    message = workers(3).run(other_code)[0]
    assert "version of torch: '2.0' on ranks 0-1; '2.1' on rank 2" in message


def lazy_with_other(node) -> str:
    """A function, and an object without a repr of its own, are the same in each process."""
    cfg = OmegaConf.create(
        {
            "model": L(nn.Linear)(in_features=1, out_features="${..train.size}"),
            "train": {"size": comm.get_rank() // 2 if node == "size" else 1},
            "optimizer": {"params": L(nn.Linear)(bias=fails)},
        },
        flags={"allow_objects": True},
    )
    return fails(check_agreement, flat(cfg))


def test_lazy_config(workers):
    assert workers(3).run(lazy_with_other, "nothing") == [""] * 3
    message = workers(3).run(lazy_with_other, "size")[0]
    assert "train.size: 0 on ranks 0-1; 1 on rank 2" in message
    assert len(message.splitlines()) == 2


def test_one_process_asks_nobody(monkeypatch):
    monkeypatch.setattr(comm, "all_gather", None)
    check_agreement({"a": 1})


def test_ranks():
    assert _ranks([0]) == "rank 0"
    assert _ranks([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"


def test_a_checksum_sees_the_last_bit():
    model = nn.Linear(3, 2).bfloat16()
    before = weights(model)
    model.weight.data.view(torch.int16).view(-1)[-1] ^= 1
    assert weights(model) != before
