"""What needs Detectron2 and what does not, and the old places of public names."""

import importlib
import pytest
from helpers import finish, start

import agvm_d2

CORE = (
    "agvm", "settings", "modules", "norms", "moments", "split", "variance", "rules", "modulator",
    "param_groups", "validate", "model_zoo",
)  # fmt: skip
WING = (
    "AGVMHook", "AGVMTrainer", "AGVMTrainerMixin", "add_agvm_config", "build_optimizer",
    "build_train_loader",
)  # fmt: skip

IMPORT_CORE = f"""
import importlib, sys
for name in {CORE}:
    importlib.import_module(f"agvm_d2.{{name}}")
from agvm_d2 import AGVM, Settings, split_param_groups
names = {{name.split(".")[0] for name in sys.modules}}
print(sorted(names & {{"detectron2", "fvcore", "yacs", "iopath", "omegaconf", "yaml"}}))
"""

# As where Detectron2, and what comes with it, was never installed.
WITHOUT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in {"detectron2", "fvcore", "yacs", "iopath", "omegaconf", "yaml"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
"""

TRAIN = """
import torch
from agvm_d2 import AGVM, Settings, split_param_groups
model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(3, 3), "head": torch.nn.Linear(3, 1)})
optimizer = split_param_groups(torch.optim.SGD(model.parameters(), lr=0.1), model)
agvm = AGVM(model, optimizer, Settings(momentum=0.0, ratio_range=(0.01, 100)), micro_batches=2)
agvm.begin(0)
for data in torch.randn(2, 4, 3):
    (model["head"](model["backbone"](data).tanh()).square().mean() / 2).backward()
    agvm.micro_batch_done(0.5)
agvm.backward_done()
optimizer.step()
agvm.end()
assert list(agvm.modules) == ["backbone", "head"]
print(agvm.measured, agvm.modulator.factors[1] != 1)
"""

COMMAND = """
sys.argv = ["agvm-train", "--config-file", "a.yaml"]
import agvm_d2.train
try:
    agvm_d2.train.main()
except SystemExit as error:
    print(error)
"""

ASK = f"""
import agvm_d2
for name in {WING}:
    try:
        getattr(agvm_d2, name)
    except ModuleNotFoundError as error:
        print(error)
"""


def python(source: str) -> list[str]:
    return finish(start("-c", source)).splitlines()


def test_the_core_imports_nothing_of_detectron2s():
    assert python(IMPORT_CORE) == ["[]"]


def test_the_core_trains_without_detectron2():
    assert python(WITHOUT + TRAIN) == ["True tensor(True)"]


def test_the_rest_says_in_one_line_how_to_get_detectron2():
    said = "agvm_d2.{} needs Detectron2, which is not installed: pip install --no-build"
    lines = python(WITHOUT + ASK)
    assert len(lines) == len(WING)
    assert all(line.startswith(said.format(name)) for name, line in zip(WING, lines))


def test_the_training_command_does_too():
    (line,) = python(WITHOUT + COMMAND)
    assert line.startswith("agvm_d2.train: error: Detectron2 is needed, and is not installed: pip")


def test_every_public_name_is_there_and_no_other():
    assert all(getattr(agvm_d2, name) is not None for name in agvm_d2.__all__)
    assert set(WING) < set(agvm_d2.__all__)
    with pytest.raises(AttributeError, match="module 'agvm_d2' has no attribute 'AGVMHok'"):
        agvm_d2.AGVMHok  # noqa: B018


@pytest.mark.parametrize(
    "old, new",
    [
        ("checkpoint.SafeCheckpointer", "d2.checkpoint.AtomicCheckpointer"),
        ("config.add_agvm_config", "d2.config.add_agvm_config"),
        ("config.check_config", "d2.checks.check_config"),
        ("config.read_config", "d2.config.read_config"),
        ("loader.BadImageError", "d2.loader.BadImageError"),
        ("loader.TrainLoader", "d2.loader.ResumableLoader"),
        ("loader.build_train_loader", "d2.loader.build_train_loader"),
        ("solver.build_lr_scheduler", "solver.schedule.build_lr_scheduler"),
        ("solver.build_optimizer", "solver.build.build_optimizer"),
        ("solver.clip_gradients", "solver.clip.clip_gradients"),
        ("solver.scaled_lr", "solver.schedule.scaled_lr"),
        ("solver.split_param_groups", "param_groups.split_param_groups"),
        ("trainer.AGVMTrainer", "d2.trainer.AGVMTrainer"),
        ("trainer.AGVMTrainerMixin", "d2.trainer.AGVMTrainerMixin"),
        ("trainer.MicroBatchTrainer", "d2.micro_batches.MicroBatchTrainer"),
        ("trainer.create_ddp_model", "d2.trainer.create_ddp_model"),
    ],
)
def test_old_places_of_public_names(old, new):
    def found(place):
        module, name = place.rsplit(".", 1)
        return getattr(importlib.import_module(f"agvm_d2.{module}"), name)

    assert found(old) is found(new)


def test_the_formulas_stayed_where_they_were():
    from agvm_d2 import variance

    for name in ("pairwise_variance", "split_variance", "lr_ratio", "lr_gain", "noise_scale"):
        assert callable(getattr(variance, name))
