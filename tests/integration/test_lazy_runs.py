"""Training from a LazyConfig."""

import json
import re
import shutil
import pytest
import torch
from helpers import VITDET, agvm_state, args, command, read, same

import train_net
from agvm_d2.d2 import lazy

SHORT = (
    "dataloader.train.total_batch_size=8 train.micro_batch_size=2 train.max_iter=4 "
    "dataloader.train.num_workers=0 dataloader.test.num_workers=0 agvm.start_iter=1 "
    "agvm.interval=1 train.expected_results=[]"
).split()


@pytest.fixture(autouse=True)
def needs_timm(request):
    if "stock" not in request.node.name:
        pytest.importorskip("timm")


# As a project's that knows nothing of this package.
STOCK = """
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper
from detectron2.data.samplers import RepeatFactorTrainingSampler as Sampler
from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config
from detectron2.modeling.backbone import ResNet

train = get_config("common/train.py").train
train.device = "cpu"
optimizer = get_config("common/optim.py").SGD
lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_1x
dataloader = get_config("common/data/coco.py").dataloader
dataloader.train.dataset.names = "digits_train"
dataloader.test.dataset.names = "digits_val"
dataloader.train.mapper = L(DatasetMapper)(
    is_train=True, augmentations=[], image_format="BGR", use_instance_mask=True
)
dataloader.train.sampler = L(Sampler)(
    repeat_factors=L(Sampler.repeat_factors_from_category_frequency)(
        dataset_dicts="${dataloader.train.dataset}", repeat_thresh=0.5
    )
)
del dataloader["evaluator"]
model = get_config("common/models/mask_rcnn_fpn.py").model
bottom_up = model.backbone.bottom_up
bottom_up.freeze_at = 0
bottom_up.stem.norm = "BN"
bottom_up.stages = L(ResNet.make_default_stages)(depth=18, norm="BN")
model.backbone.out_channels = model.proposal_generator.head.in_channels = 32
model.proposal_generator.post_nms_topk = (32, 32)
heads = model.roi_heads
heads.num_classes, heads.batch_size_per_image = 10, 16
heads.box_head.input_shape = ShapeSpec(channels=32, height=7, width=7)
heads.box_head.fc_dims = [32]
heads.box_predictor.input_shape = ShapeSpec(channels=32)
heads.mask_head.input_shape = ShapeSpec(channels=32, width=14, height=14)
heads.mask_head.conv_dims = [16, 16]
"""


def test_a_stock_config_trains_and_resumes(digits, tmp_path):
    (tmp_path / "stock.py").write_text(STOCK)
    options = (
        "train.micro_batch_size=2 agvm.start_iter=1 agvm.interval=1 agvm.momentum=0.5 "
        "train.max_iter=3 train.checkpointer.period=2 train.seed=3 train.on_bad_image=skip "
        "dataloader.train.total_batch_size=4 dataloader.train.num_workers=0"
    ).split()

    def run(folder, *more):
        more = [*options, f"train.output_dir={folder}", *more]
        cfg = train_net.setup(args(*more, config=str(tmp_path / "stock.py")))
        lazy.do_train(cfg, resume=True)
        return torch.load(folder / "model_final.pth", weights_only=True)

    whole = run(tmp_path / "a")
    factors = whole["trainer"]["hooks"]["AGVMHook"]["factors"]
    assert len(factors) == 5 and factors[0] == 1 and all(factor != 1 for factor in factors[1:])
    assert len(whole["trainer"]["optimizer"]["param_groups"]) >= 5  # by module
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "model_0000001.pth", tmp_path / "b")
    (tmp_path / "b" / "last_checkpoint").write_text("model_0000001.pth")
    resumed = run(tmp_path / "b", "dataloader.train.num_workers=1")
    same(whole, resumed)


def test_train_resume_and_eval_only(digits, tmp_path):
    threshold = "model.roi_heads.box_predictor.test_score_thresh=0.0"  # or nothing is found yet
    out = command(
        "--config-file", VITDET, *SHORT, "train.clip_gradients.iter_range=[0,3]", threshold,
        f"train.output_dir={tmp_path}/a", f"dataloader.evaluator.output_dir={tmp_path}/a",
    )  # fmt: skip
    trained = (tmp_path / "a" / "coco_instances_results.json").read_text()
    assert len(json.loads(trained)) > 0
    assert "K = 1 workers x 4 micro-batches = 4 gradients" in out
    assert re.search(r"Evaluation results for segm", out)
    scalars = {k for row in read(tmp_path / "a" / "metrics.json") for k in row}
    assert {"agvm/variance/mask_head", "agvm/lr_scale/backbone", "segm/AP"} <= scalars
    final = tmp_path / "a" / "model_final.pth"
    before = agvm_state(final)["factors"]
    assert before != [1.0] * len(before)

    command(
        "--config-file", VITDET, "--eval-only", *SHORT, threshold,
        f"train.init_checkpoint={final}", f"train.output_dir={tmp_path}/b",
        f"dataloader.evaluator.output_dir={tmp_path}/b",
    )  # fmt: skip
    assert (tmp_path / "b" / "coco_instances_results.json").read_text() == trained

    out = command(
        "--config-file", VITDET, "--resume", *SHORT, "train.max_iter=6", "agvm.interval=1000",
        f"train.output_dir={tmp_path}/a",
    )  # fmt: skip
    assert "Starting training from iteration 4" in out and agvm_state(final)["factors"] == before


def test_a_resumed_run_is_exact(digits, tmp_path):
    def run(folder, *more):
        cfg = lazy.load(
            VITDET,
            [
                *SHORT,
                "train.max_iter=6",
                "train.checkpointer.period=3",
                f"train.output_dir={folder}",
            ]
            + ["dataloader.train.mapper.augmentations=[]", *more],
        )
        del cfg.dataloader["evaluator"]
        lazy.do_train(cfg, resume=True)
        return torch.load(folder / "model_final.pth", weights_only=True)

    whole = run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "model_0000002.pth").rename(tmp_path / "b" / "model_0000002.pth")
    (tmp_path / "b" / "last_checkpoint").write_text("model_0000002.pth")
    again = run(tmp_path / "b", "dataloader.train.num_workers=1")
    assert whole["trainer"]["hooks"] == again["trainer"]["hooks"]
    for name, value in whole["model"].items():
        assert torch.equal(value, again["model"][name]), name


def test_a_run_that_lasts_as_long_as_the_gain_asks(digits, tmp_path):
    def run(folder, *more):
        options = "train.max_iter=12 agvm.rule=gain agvm.schedule=gain agvm.base_batch_size=2"
        options += f" agvm.start_iter=-1 agvm.momentum=0.5 train.output_dir={folder}"
        options += " dataloader.train.mapper.augmentations=[] train.checkpointer.period=3"
        cfg = lazy.load(VITDET, [*SHORT, *options.split(), *more])
        cfg.dataloader.evaluator.output_dir = str(folder)
        results = lazy.do_train(cfg, resume=True)
        return torch.load(folder / "model_final.pth", weights_only=True), results

    whole, results = run(tmp_path / "a")
    assert 4 < whole["iteration"] + 1 < 12 and "segm" in results
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "model_0000002.pth", tmp_path / "b")
    (tmp_path / "b" / "last_checkpoint").write_text("model_0000002.pth")
    again, _ = run(tmp_path / "b", "dataloader.train.num_workers=1")
    same(whole["model"], again["model"])
    hooks, resumed = (found["trainer"]["hooks"] for found in (whole, again))
    assert hooks["AGVMHook"] == resumed["AGVMHook"] and hooks["AGVMHook"]["progress"]
    assert whole["iteration"] == again["iteration"]


def test_two_workers_without_agvm(digits, tmp_path):
    out = command(
        "--config-file", VITDET, "--num-gpus", 2, "--dist-url", "auto", *SHORT,
        "agvm.enabled=False", "train.max_iter=2", f"train.output_dir={tmp_path}",
    )  # fmt: skip
    assert "AGVM" not in re.sub(r"agvm_d2|agvm=|AGVMHook", "", out).split("Starting training")[1]
    assert not any("agvm" in key for row in read(tmp_path / "metrics.json") for key in row)


@pytest.mark.parametrize(
    "opts, message",
    [
        (["agvm.interval=0"], "agvm.interval: found 0"),
        (["SOLVER.MAX_ITER", "3"], "does not fit"),
        (["dataloader.train.dataset.names=digit"], "'digit' is not a registered dataset"),
        (["train.init_checkpoint=no.pth"], "train.init_checkpoint: 'no.pth' is not there"),
    ],
)
def test_bad_overrides_end_before_anything_is_written(opts, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        train_net.setup(args(f"train.output_dir={tmp_path}/out", *opts, config=VITDET))
    assert not (tmp_path / "out").exists()
