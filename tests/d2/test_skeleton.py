"""`python -m agvm_d2.modules`, and the model that it looks at."""

import os
import sys
import pytest
from detectron2.config import get_cfg
from detectron2.model_zoo import get_config_file
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from helpers import DIGITS, ROOT, VITDET, finish, start
from torch import nn

from agvm_d2.d2.skeleton import model_of
from agvm_d2.modules import assign_modules, main, module_table

PANOPTIC = get_config_file("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml")
VITDET_G = "configs/COCO-InstanceSegmentation/cascade_mask_rcnn_vitdet_g_bs960_agvm.py"
PROJECT = """
import torch
from detectron2.config import get_cfg as detectron2s
from detectron2.modeling import META_ARCH_REGISTRY

def add_project_config(cfg):
    cfg.MODEL.WIDTH = 3

def get_cfg():
    cfg = detectron2s()
    add_project_config(cfg)
    return cfg

class Project(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.backbone = torch.nn.Linear(3, cfg.MODEL.WIDTH)
        self.neck = torch.nn.Linear(cfg.MODEL.WIDTH, 1)
        scale = torch.nn.Parameter(torch.ones(2))
        self.neck.scale = self.neck.also_scale = scale

if "Project" not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY.register(Project)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project's config, with a key and an architecture of its own; its code is at hand."""
    (tmp_path / "its_code.py").write_text(PROJECT)
    monkeypatch.syspath_prepend(tmp_path)
    yield write(tmp_path / "c.yaml", "MODEL:\n  META_ARCHITECTURE: Project\n  WIDTH: 5\n")
    sys.modules.pop("its_code", None)
    META_ARCH_REGISTRY._obj_map.pop("Project", None)


def write(path, text: str) -> str:
    path.write_text(text)
    return str(path)


def printed(capsys, *argv) -> str:
    main(list(map(str, argv)))
    return capsys.readouterr().out


def error(*argv) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, argv)))
    return str(stopped.value)


def test_a_yaml_config_is_built_without_memory(capsys):
    """The same as the model that is trained."""
    model, patterns = model_of(PANOPTIC, [])
    assert patterns == () and {p.device.type for p in model.parameters()} == {"meta"}
    cfg = get_cfg()
    cfg.merge_from_file(PANOPTIC)
    cfg.MODEL.DEVICE = "cpu"
    trained = build_model(cfg)
    table = module_table(trained, assign_modules(trained))
    # Stem and res2, as in the header of Detectron2's log: 64 x 3 x 7 x 7, and three blocks.
    frozen = 9_408 + (64 * (64 + 576 + 256) + 64 * 256) + 2 * (256 * 64 + 64 * (576 + 256))
    assert printed(capsys, "--config-file", PANOPTIC) == (
        f"{table}\n({frozen:,} parameters are frozen and in no module)\n"
    )


def test_a_lazyconfig_of_a_billion_parameters():
    pytest.importorskip("timm")
    model, patterns = model_of(os.path.join(ROOT, VITDET_G), [])
    assert patterns == [] and {p.device.type for p in model.parameters()} == {"meta"}
    assert 1.0e9 < sum(p.numel() for p in assign_modules(model)["backbone"]) < 1.1e9


def test_keys_and_overrides_are_heard(capsys):
    modules = "(('body', 'backbone'), ('top', ''))"
    out = printed(capsys, "--config-file", DIGITS, "AGVM.MODULES", modules)
    assert [line.split()[0] for line in out.splitlines()] == ["module", "body", "top"]
    pytest.importorskip("timm")
    out = printed(capsys, "--config-file", VITDET, "agvm.modules=[[body,backbone],[top,'']]")
    assert [line.split()[0] for line in out.splitlines()] == ["module", "body", "top"]


@pytest.mark.parametrize(
    "imports",
    [["its_code:add_project_config"], ["its_code:get_cfg"], ["json", "its_code:get_cfg"]],
)
def test_a_projects_keys_and_architecture(capsys, project, imports):
    flags = [word for name in imports for word in ("--import", name)]
    lines = printed(capsys, *flags, "--config-file", project).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["backbone", "20"], ["neck", "8"]]


def test_a_model_that_reads_its_values(tmp_path, capsys):
    @META_ARCH_REGISTRY.register()
    class ReadsValues(nn.Module):
        def __init__(self, cfg):
            super().__init__()
            self.backbone = nn.Linear(3, 2)
            self.scale = self.backbone.weight.norm().item()

    try:
        config = write(tmp_path / "c.yaml", "MODEL:\n  META_ARCHITECTURE: ReadsValues\n")
        assert "backbone           8  100.0" in printed(capsys, "--config-file", config)
    finally:
        META_ARCH_REGISTRY._obj_map.pop("ReadsValues")


def test_parameters_have_memory_again_afterwards():
    register = nn.Module.register_parameter
    model_of(DIGITS, [])
    assert nn.Module.register_parameter is register
    assert nn.Linear(1, 1).weight.device.type == "cpu"


def test_errors_name_what_is_wrong_and_what_to_do(project, tmp_path):
    said = error("--config-file", "no.yaml")
    assert said.startswith("agvm_d2.modules: error: --config-file: 'no.yaml' is not a file, nor is")
    assert "--config-file: 'no.py' is not a file" in error("--config-file", "no.py")
    said = error("--config-file", project)
    assert (
        "config: Non-existent config key: MODEL.WIDTH; did you mean MODEL.WEIGHTS? --import MODULE:"
        in said
    )
    other = write(tmp_path / "other.yaml", "MODEL:\n  META_ARCHITECTURE: Other\n")
    said = error("--config-file", other)
    assert "'Other' found in 'META_ARCH' registry" in said and "(--import MODULE registers" in said
    said = error("--import", "no_such_code", "--config-file", other)
    assert "--import no_such_code: ModuleNotFoundError" in said
    said = error("--import", "json:nothing", "--config-file", other)
    assert "--import json:nothing: AttributeError" in said
    without = write(tmp_path / "c.py", "train = dict(max_iter=1)\n")
    assert error("--config-file", without).endswith("c.py' has no 'model'.")
    said = error("--config-file", DIGITS, "AGVM.MODULES", "(('a', 'backbone'),)")
    assert "AGVM.MODULES: no pattern matches the trainable parameter 'proposal_generator" in said
    said = error("--config-file", DIGITS, "AGVM.MODULES", "(('a', '('),)")
    assert "AGVM.MODULES: '(' of module 'a' is not a regex" in said
    assert "AGVM.RULE: found 'best'" in error("--config-file", DIGITS, "AGVM.RULE", "best")


BARE_ASSERT = """
from detectron2.config import LazyCall
def build(width):
    assert width > 3
model = LazyCall(build)(width=3)
agvm = dict(enabled=True)
"""


def test_errors_of_a_lazyconfig(tmp_path):
    config = write(tmp_path / "c.py", BARE_ASSERT)
    said = error("--config-file", config)
    assert "the model does not build: AssertionError: assert width > 3 (" in said
    assert "agvm.rule: found 'best'" in error("--config-file", config, "agvm.rule=best")
    assert "agvm.rul: there is no such key" in error("--config-file", config, "agvm.rul=gain")


def test_the_command_line_warns_of_nothing():
    """The package has imported the file that is run."""
    line = ("-W", "default", "-m", "agvm_d2.modules", "--config-file", DIGITS)
    out = finish(start(*line))
    assert "RuntimeWarning" not in out
    assert out.splitlines()[-4].startswith("backbone ")
