"""docs/extending.md, each section's code, run as a user would; only AGVM starts earlier."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace
import mask2former
import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from helpers import RCNN_BASE, ROOT, VITDET, same
from toy import ToyDetector, batch, loss

import agvm_d2.data  # noqa: F401
from agvm_d2 import recipe
from agvm_d2.d2 import lazy
from agvm_d2.modules import assign_modules


def code(heading: str, language: str = "python") -> str:
    with open(os.path.join(ROOT, "docs", "extending.md")) as f:
        sections = re.split(r"^## ", f.read(), flags=re.M)
    (section,) = (s for s in sections if s.startswith(heading))
    source = "\n".join(re.findall(rf"^```{language}\n(.*?)^```", section, flags=re.M | re.S))
    # Three iterations: too few to wait for the end of warm-up.
    return re.sub(r"(start_iter ?= ?)1000", r"\g<1>1", source, flags=re.I)


def config(folder):
    """A stock config of a small project, without this package's keys."""
    cfg = get_cfg()
    given = CfgNode.load_yaml_with_base(RCNN_BASE)
    for key in ("MODEL", "DATASETS", "INPUT"):
        cfg[key].merge_from_other_cfg(CfgNode(given[key]))
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.SOLVER.MAX_ITER = 3
    cfg.SOLVER.STEPS = ()
    cfg.SOLVER.BASE_LR = 1e-3
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATASETS.TEST = ()
    cfg.OUTPUT_DIR = str(folder)
    return cfg


def factors(folder) -> set[str]:
    """Modules whose factors were logged."""
    with open(os.path.join(folder, "metrics.json")) as f:
        found = {key for line in f for key in json.loads(line)}
    return {key.split("/")[-1] for key in found if key.startswith("agvm/lr_scale/")}


RCNN = {"backbone", "fpn", "rpn", "box_head"}


def test_a_default_trainer_with_its_own_optimizer(digits, tmp_path):
    space = {"cfg": config(tmp_path)}
    exec(code("A `DefaultTrainer` with its own"), space)
    optimizer = space["trainer"].optimizer
    assert type(optimizer).__name__ == "FullModelClippedAdamW"
    assert sorted({round(g["lr"], 6) for g in optimizer.param_groups}) == [1e-4, 1e-3]
    assert factors(tmp_path) == RCNN


def run_in_worker(heading: str, folder: str, kind: str) -> None:
    os.makedirs(folder, exist_ok=True)
    if kind == "plain":
        cfg = config(folder)
        exec(code(heading), {"cfg": cfg, "model": build_model(cfg)})
    else:
        cfg = lazy.load(
            VITDET,
            [
                f"train.output_dir={folder}", "train.max_iter=3",
                "dataloader.train.total_batch_size=4", "dataloader.train.num_workers=0",
            ],
        )  # fmt: skip
        exec(code(heading), {"cfg": cfg, "args": SimpleNamespace(resume=False)})


@pytest.mark.parametrize(
    "kind, heading", [("plain", "A loop of its own"), ("lazy", "A LazyConfig project")]
)
def test_projects_with_a_loop_of_their_own(kind, heading, digits, tmp_path, workers):
    workers(2).run(run_in_worker, heading, str(tmp_path / "out"), kind)
    expected = RCNN | {"mask_head"} if kind == "lazy" else RCNN
    assert factors(tmp_path / "out") == expected


def test_an_architecture_of_its_own(digits, tmp_path):
    source = code("An architecture of its own")
    cfg = config(tmp_path)
    exec(source, {"cfg": cfg})
    assert factors(tmp_path) == {"encoder", "head"}

    # "enough": without the rules
    source = source.replace("cfg.AGVM.MODULES =", "ignored =")
    source = source.replace("@META_ARCH_REGISTRY.register()\n", "")
    cfg = config(tmp_path / "children")
    exec(source, {"cfg": cfg})
    assert factors(tmp_path / "children") == {"encoder", "decoder", "fusion"}


# Mask2Former's, for COCO instances.
THEIRS = """
SOLVER:
  IMS_PER_BATCH: 16
  BASE_LR: 0.0001
  STEPS: (327778, 355092)
  MAX_ITER: 368750
  WARMUP_FACTOR: 1.0
  WARMUP_ITERS: 10
  OPTIMIZER: "ADAMW"
  CLIP_GRADIENTS: {ENABLED: True, CLIP_TYPE: "full_model", CLIP_VALUE: 0.01}
"""


@pytest.fixture
def mask2former_files(tmp_path):
    (tmp_path / "maskformer2_R50_bs16_50ep.yaml").write_text(THEIRS)
    path = tmp_path / "maskformer2_R50_bs256_50ep_agvm.yaml"
    path.write_text(code("A DETR-like", "yaml"))
    return path


def test_mask2formers_modules_and_recipe(mask2former_files):
    given = yaml.safe_load(mask2former_files.read_text())
    theirs = recipe.read_baseline(str(mask2former_files.with_name(given.pop("_BASE_"))))
    images = recipe.IMAGES["coco_2017_train"]  # of their base config
    expected = recipe.recipe(theirs._replace(images=images), 256)
    assert "CLIP_GRADIENTS" not in expected["SOLVER"]  # theirs, always, stays
    solver = {**given["SOLVER"], "STEPS": eval(given["SOLVER"]["STEPS"])}
    assert solver == {key: expected["SOLVER"][key] for key in solver}
    assert given["AGVM"]["START_ITER"] == expected["AGVM"]["START_ITER"]

    model = mask2former.Named()
    names = {p: name for name, p in model.named_parameters()}
    found = {m: {names[p] for p in params} for m, params in assign_modules(model).items()}
    assert found == {module: set(names) for module, names in mask2former.NAMES.items()}


def test_mask2formers_trainer(mask2former_files, digits, tmp_path):
    class Trainer(DefaultTrainer):
        """Their optimizer: a group for each parameter, the backbone slower."""

        @classmethod
        def build_model(cls, cfg):
            return mask2former.Named()

        @classmethod
        def build_optimizer(cls, cfg, model):
            groups = [
                {"params": [p], "lr": cfg.SOLVER.BASE_LR * (0.1 if "backbone" in name else 1)}
                for name, p in model.named_parameters()
            ]
            return torch.optim.AdamW(groups, cfg.SOLVER.BASE_LR)

    cfg = config(tmp_path)
    space = {
        "cfg": cfg,
        "Trainer": Trainer,
        "args": SimpleNamespace(config_file=str(mask2former_files)),
    }
    exec(code("A DETR-like"), space)
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MICRO_BATCH_SIZE = 8, 2
    cfg.SOLVER.MAX_ITER, cfg.AGVM.START_ITER, cfg.AGVM.INTERVAL = 3, 1, 1
    trainer = space["LargeBatchTrainer"](cfg)
    assert cfg.SOLVER.OPTIMIZER == "ADAMW"
    trainer.train()
    assert factors(tmp_path) == set(mask2former.NAMES)


def test_sam(digits, tmp_path):
    pytest.importorskip("pytorch_optimizer")
    cfg = config(tmp_path)
    cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.CHECKPOINT_PERIOD = 0.05, 2
    space = {"cfg": cfg}
    exec(code("SAM"), space)
    model, optimizer = space["trainer"].model, space["trainer"].optimizer
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, 0.05}
    norm = model.backbone.bottom_up.stem.conv1.norm
    assert norm.num_batches_tracked == 6 and norm.momentum == 0.1

    again = space["SAMTrainer"](cfg)  # the last of three iterations once more
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    again.resume_or_load(resume=True)
    again.train()
    same(again.model.state_dict(), model.state_dict())

    toy, data = ToyDetector(), batch(4)
    before = [p.detach().clone() for p in toy.parameters()]
    sam = space["SAM"](toy.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
    space["TwoPasses"](toy, [data], sam).train(0, 1)
    after = [p.detach().clone() for p in toy.parameters()]
    expected = ToyDetector()
    grads = torch.autograd.grad(loss(expected, data), list(expected.parameters()))
    scale = 0.05 / torch.cat([g.flatten() for g in grads]).norm()
    with torch.no_grad():
        for p, g in zip(expected.parameters(), grads):
            p.add_(g * scale)
    second = torch.autograd.grad(loss(expected, data), list(expected.parameters()))
    for w, g, found in zip(before, second, after):
        assert torch.allclose(found, w - 0.1 * g, atol=1e-6)


def test_a_plain_pytorch_project(tmp_path):
    """In a process of its own, in which Detectron2 is not imported."""
    source = code("A plain PyTorch project").replace("start_iter=1000", "start_iter=1")
    check = (
        "import sys; assert not {m.split('.')[0] for m in sys.modules} & {'detectron2', 'fvcore'}"
    )
    path = tmp_path / "model.pth"
    script = tmp_path / "project.py"
    script.write_text(
        f"import torch; torch.set_num_threads(1)\npath = {str(path)!r}\n{source}\n{check}"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    assert done.returncode == 0, done.stderr
    state = torch.load(path, weights_only=True)["agvm"]
    assert state["modules"] == ["backbone", "fpn", "rpn", "box_head"] and state["num_units"] == 4
    assert state["factors"][0] == 1 and all(factor != 1 for factor in state["factors"][1:])
    assert done.stdout.startswith("1 {'agvm/variance/backbone'")


def test_a_loop_that_lasts_as_long_as_the_gain_asks():
    space = {}
    exec(code("Only the batch changes"), space)
    batches = ([batch(16, seed=4 * i + k) for k in range(4)] for i in range(10**6))
    agvm, iterations = space["train"](ToyDetector(), batches, loss, max_iter=60)
    assert 15 < iterations < 60 <= agvm.progress
    lr = agvm.optimizer.param_groups[0]["lr"]
    assert lr == pytest.approx(0.002) and agvm.gain > 1.2


def _sharded(path, first, last, resume):
    import torch.distributed as dist

    space: dict = {}
    exec(code("A model sharded by FSDP2"), space)
    model = ToyDetector()
    batches = [batch(4, seed=2 * i + dist.get_rank()) for i in range(first, last)]
    agvm = space["train"](model, [model.backbone.bottom_up], batches, loss, path, resume)
    dist.barrier()
    return agvm.modulator.factors.tolist(), torch.load(path, weights_only=True)


def test_a_model_sharded_by_fsdp2(workers, tmp_path):
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("fully_shard is public from torch 2.6 on")
    factors, whole = workers(2).run(_sharded, tmp_path / "a", 0, 6, False)[0]
    assert factors != [1.0] * 4
    workers(2).run(_sharded, tmp_path / "b", 0, 3, False)
    again, resumed = workers(2).run(_sharded, tmp_path / "b", 0, 6, True)[0]
    assert again == factors
    same(whole, resumed)
