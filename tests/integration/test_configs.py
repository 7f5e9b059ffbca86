"""Every file under configs/: it loads, builds, and its arithmetic holds."""

import functools
import glob
import os
import re
import pytest
import torch
from detectron2.config import get_cfg, instantiate
from detectron2.modeling import build_model
from helpers import ROOT

from agvm_d2 import add_agvm_config, build_optimizer
from agvm_d2.d2 import lazy
from agvm_d2.d2.checks import check_config
from agvm_d2.d2.config import read_config
from agvm_d2.modules import assign_modules, unwrap
from agvm_d2.solver import build_lr_scheduler, split_param_groups

FILES = [
    os.path.relpath(path, ROOT)
    for path in sorted(glob.glob(os.path.join(ROOT, "configs", "*", "*")))
    if path.endswith((".yaml", ".py")) and not re.search(r"/common/|/Base-", path)
]
IMAGES = {"coco": 117266, "ade20k": 20210, "digits": 2000}  # COCO's with annotations
RCNN = {"backbone", "fpn", "rpn", "box_head"}
MODULES = {
    "faster_rcnn": RCNN,
    "retinanet": {"backbone", "fpn", "head"},
    "mask_rcnn": RCNN | {"mask_head"},
    "cascade_mask_rcnn": RCNN | {"mask_head"},
    "panoptic_fpn": RCNN | {"mask_head", "sem_seg_head"},
    "semantic_fpn": {"backbone", "fpn", "sem_seg_head"},
}


def test_there_are_configs_for_every_pipeline():
    assert {name for name in MODULES if any(name in path for path in FILES)} == set(MODULES)
    assert len(FILES) > 50


def expected_modules(path: str) -> set[str]:
    name = os.path.basename(path)
    return MODULES[max((m for m in MODULES if name.startswith(m)), key=len)]


def check_arithmetic(path, dataset, batch, iterations, enabled):
    """epochs x images / batch = iterations; the name says what is inside."""
    epochs, named = re.search(r"_(?:(\d+)ep_)?bs(\d+k?)", path).groups()
    assert int(named.replace("k", "000")) == batch
    if epochs:  # the demo's are not whole
        images = IMAGES[re.split("[_/]", dataset)[0]]
        assert iterations == pytest.approx(int(epochs) * images / batch, rel=0.01)
    assert path.endswith(("_agvm.yaml", "_agvm.py", "_gain.yaml")) == enabled


@pytest.mark.parametrize("path", [p for p in FILES if "_gain" in p])
def test_by_the_gain_a_config_is_its_base_with_another_batch(path):
    path = os.path.join(ROOT, path)
    cfg = read_config(path, ["MODEL.DEVICE", "cpu"])
    with open(path) as f:
        base = re.search('_BASE_: "(.*)"', f.read()).group(1)
    base = read_config(os.path.join(os.path.dirname(path), base), [])
    changed = {key for key in cfg.SOLVER if cfg.SOLVER[key] != base.SOLVER[key]}
    kept = {"IMS_PER_BATCH", "MICRO_BATCH_SIZE", "CHECKPOINT_PERIOD", "CLIP_GRADIENTS"}
    assert changed <= kept
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not base.SOLVER.CLIP_GRADIENTS.ENABLED:
        assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE) == (True, "relative", 4.0)
    agvm = cfg.AGVM
    assert (agvm.RULE, agvm.SCHEDULE, agvm.START_ITER) == ("gain", "gain", -1)
    assert agvm.BASE_BATCH_SIZE == base.SOLVER.IMS_PER_BATCH < cfg.SOLVER.IMS_PER_BATCH
    check_config(cfg, 1)


@pytest.mark.parametrize("path", [p for p in FILES if "_megdet" in p])
def test_megdets_recipe(path):
    """The AGVM config at the same batch, but for a learning rate linear in the batch, a linear
    warm-up, and no clipping."""
    cfg, other = get_cfg(), get_cfg()
    for c, name in ((cfg, path), (other, path.replace("_megdet", "_agvm"))):
        add_agvm_config(c)
        c.merge_from_file(os.path.join(ROOT, name))
    assert cfg.MODEL == other.MODEL and cfg.MODEL.RESNETS.NORM == "SyncBN"
    solver = cfg.SOLVER
    assert not cfg.AGVM.ENABLED and not solver.CLIP_GRADIENTS.ENABLED
    assert pytest.approx(0.02 / 16) == solver.BASE_LR / solver.IMS_PER_BATCH
    assert solver.WARMUP_METHOD == "linear"
    changed = {"BASE_LR", "WARMUP_METHOD", "CLIP_GRADIENTS"}
    assert {k for k in solver if solver[k] != other.SOLVER[k]} == changed


def check_optimizer(model, optimizer, expected):
    """Each trainable parameter is in one module and in one group, each group in one module."""
    modules = assign_modules(model)
    assert set(modules) == expected
    counted = [id(p) for params in modules.values() for p in params]
    trainable = [id(p) for p in unwrap(model).parameters() if p.requires_grad]
    assert sorted(counted) == sorted(trainable)
    owner = {id(p): name for name, params in modules.items() for p in params}
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert set(trainable) <= set(grouped) and len(grouped) == len(set(grouped))
    return [{owner[id(p)] for p in g["params"] if id(p) in owner} for g in optimizer.param_groups]


@functools.lru_cache(maxsize=2)
def yaml_model(dumped: str):
    """Batch sizes of one pipeline share a model."""
    cfg = get_cfg()
    cfg.MODEL.merge_from_other_cfg(cfg.load_cfg(dumped))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    return build_model(cfg)


@functools.lru_cache(maxsize=1)
def lazy_model(path: str):
    if "vitdet_g" not in path:
        return instantiate(lazy.load(path, []).model)
    # A billion parameters: without memory. ViT reads what linspace makes.
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(torch, "linspace", functools.partial(torch.linspace, device="cpu"))
        return instantiate(lazy.load(path, []).model)


@pytest.mark.parametrize("path", [p for p in FILES if p.endswith(".yaml")])
def test_yaml_configs(path):
    with open(os.path.join(ROOT, path)) as f:
        assert len(f.readlines()) < 25
    cfg = get_cfg()
    add_agvm_config(cfg)
    cfg.merge_from_file(os.path.join(ROOT, path))
    cfg.MODEL.DEVICE = "cpu"
    check_config(cfg, 1)
    solver = cfg.SOLVER
    check_arithmetic(
        path, cfg.DATASETS.TRAIN[0], solver.IMS_PER_BATCH, solver.MAX_ITER, cfg.AGVM.ENABLED
    )

    model = yaml_model(cfg.MODEL.dump())
    optimizer = build_optimizer(cfg, model)
    groups = check_optimizer(model, optimizer, expected_modules(path))
    if cfg.AGVM.ENABLED:
        assert all(len(modules) <= 1 for modules in groups)
        start = cfg.AGVM.START_ITER
    if cfg.AGVM.ENABLED and cfg.AGVM.SCHEDULE != "gain":
        assert solver.WARMUP_ITERS < start < 0.5 * solver.MAX_ITER  # something is left to do
        window = solver.CLIP_GRADIENTS.ITER_RANGE
        # The official code's includes the iteration at which AGVM starts.
        assert not window or window[0] <= solver.WARMUP_ITERS < window[1] <= start + 1
    scheduler = build_lr_scheduler(cfg, optimizer)
    optimizer._opt_called = True  # no warning: the scheduler alone is stepped
    lrs = []
    for _ in range(solver.MAX_ITER if solver.MAX_ITER < 10_000 else solver.WARMUP_ITERS + 1):
        lrs.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    assert lrs[0] < 0.01 * solver.BASE_LR
    assert max(lrs) == pytest.approx(solver.BASE_LR, rel=0.02)


@pytest.mark.parametrize("path", [p for p in FILES if p.endswith(".py")])
def test_lazy_configs(path):
    if "swin" in path or "vitdet" in path:
        pytest.importorskip("timm")
    full = os.path.join(ROOT, path)
    cfg = lazy.load(full, ["train.device=cpu", "train.amp.enabled=False"])
    lazy.check(cfg, 8 if cfg.train.fsdp else 1)
    check_arithmetic(
        path,
        cfg.dataloader.train.dataset.names,
        cfg.dataloader.train.total_batch_size,
        cfg.train.max_iter,
        cfg.agvm.enabled,
    )
    (large,) = glob.glob(re.sub(r"bs\d+.*", "bs*_agvm.py", full))
    model = lazy_model(large)  # a baseline's is the same
    cfg.optimizer.params.model = model
    optimizer = split_param_groups(instantiate(cfg.optimizer), model)
    groups = check_optimizer(model, optimizer, expected_modules(path))
    assert all(len(modules) <= 1 for modules in groups)
    if "vitdet" in path:  # layer decay is kept: lower layers learn slower
        lrs = {g["lr"] for g, m in zip(optimizer.param_groups, groups) if m == {"backbone"}}
        assert len(lrs) > 4 and max(lrs) <= cfg.optimizer.lr
    schedule = instantiate(cfg.lr_multiplier)
    assert schedule(0.0) == pytest.approx(0.001)
    assert schedule(cfg.lr_multiplier.warmup_length) == pytest.approx(1.0)
    drops = 1 if "swin_t_" in path else 2
    assert schedule(0.9999) == pytest.approx(0.1**drops)
    assert schedule.__class__.__module__.startswith("fvcore")
    assert isinstance(optimizer, torch.optim.AdamW)


def test_the_billion_parameter_detector():
    """Each parameter is in one module, and the backbone's are as many as they should be."""
    pytest.importorskip("timm")
    path = "configs/COCO-InstanceSegmentation/cascade_mask_rcnn_vitdet_g_bs960_agvm.py"
    modules = assign_modules(lazy_model(os.path.join(ROOT, path)))
    sizes = {name: sum(p.numel() for p in params) for name, params in modules.items()}
    assert 1.0e9 < sum(sizes.values()) < 1.1e9
    # A block: norms 4 d, qkv 3 d (d + 1), projection d (d + 1), MLP d h + h + h d + d, and relative
    # positions, two of head x (2 size - 1): of windows of 14, or of the image's 64 patches.
    d, h, head = 1408, 6144, 1408 // 16
    block = 4 * d + 4 * d * (d + 1) + 2 * d * h + h + d
    positions = head * 2 * (36 * (2 * 14 - 1) + 4 * (2 * 64 - 1))
    embedding = d * (3 * 16 * 16 + 1) + d * (14 * 14 + 1)
    assert sizes["backbone"] == 40 * block + positions + embedding
