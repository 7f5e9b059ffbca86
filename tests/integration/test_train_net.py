"""The command line, as a user types it."""

import json
import os
import re
import shutil
import pytest
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.engine import HookBase
from helpers import COCO, DIGITS, agvm_state, args, command, read

import train_net
from agvm_d2 import train

SHORT = (
    "SOLVER.IMS_PER_BATCH 8 SOLVER.MICRO_BATCH_SIZE 2 SOLVER.MAX_ITER 4 SOLVER.WARMUP_ITERS 1 "
    "SOLVER.STEPS (3,) AGVM.START_ITER 1 AGVM.INTERVAL 1 DATALOADER.NUM_WORKERS 0"
)


def test_train_evaluate_resume_and_eval_only(digits, tmp_path):
    out = command("--config-file", DIGITS, *SHORT.split(), "OUTPUT_DIR", tmp_path / "a")
    assert "eta:" in out and re.search(r"\|\s+AP\s+\|\s+AP50", out)
    assert "K = 1 workers x 4 micro-batches = 4 gradients" in out
    scalars = {k for row in read(tmp_path / "a" / "metrics.json") for k in row}
    for module in ("backbone", "fpn", "rpn", "box_head"):
        assert {f"agvm/variance/{module}", f"agvm/lr_scale/{module}"} <= scalars
    trained = (tmp_path / "a" / "inference" / "coco_instances_results.json").read_text()
    assert len(json.loads(trained)) > 0

    final = tmp_path / "a" / "model_final.pth"
    out = command(
        "--config-file", DIGITS, "--eval-only", "MODEL.WEIGHTS", final, "OUTPUT_DIR", tmp_path / "b"
    )
    assert (tmp_path / "b" / "inference" / "coco_instances_results.json").read_text() == trained

    saved = agvm_state(final)["factors"]
    assert saved != [1.0] * 4
    out = command(
        "--config-file", DIGITS, "--resume", *SHORT.split(),
        "SOLVER.MAX_ITER", 6, "AGVM.INTERVAL", 1000, "OUTPUT_DIR", tmp_path / "a",
    )  # fmt: skip
    assert "Starting training from iteration 4" in out
    assert agvm_state(final)["factors"] == saved


def test_two_workers_on_a_cpu(digits, tmp_path):
    out = command(
        "--config-file", DIGITS, "--num-gpus", 2, "--dist-url", "auto", *SHORT.split(),
        "SOLVER.MICRO_BATCH_SIZE", 0, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", tmp_path,
    )  # fmt: skip
    assert "K = 2 workers x 1 micro-batches = 2 gradients" in out and "TensorTap" in out
    assert re.search(r"\|\s+AP\s+\|\s+AP50", out)
    assert any("agvm/lr_scale/rpn" in row for row in read(tmp_path / "metrics.json"))


@pytest.fixture
def coco_folder(digits, tmp_path):
    """A COCO-layout DETECTRON2_DATASETS with digits in it."""
    root = tmp_path / "datasets" / "coco"
    categories = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    (root / "annotations").mkdir(parents=True)
    source = os.path.join(digits, "digits_v2")
    for split in ("train", "val"):
        shutil.copytree(os.path.join(source, split), root / f"{split}2017")
        with open(os.path.join(source, "annotations", f"instances_{split}.json")) as f:
            coco = json.load(f)
        coco["categories"] = categories
        path = root / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(coco))
    return root.parent


def test_the_coco_config_on_a_few_images(coco_folder, tmp_path):
    out = command(
        "--config-file", COCO, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "",
        "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MICRO_BATCH_SIZE", 2, "SOLVER.MAX_ITER", 2,
        "INPUT.MIN_SIZE_TRAIN", "(128,)", "INPUT.MIN_SIZE_TEST", 128, "OUTPUT_DIR", tmp_path / "o",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "DATALOADER.NUM_WORKERS", 0,
        DETECTRON2_DATASETS=str(coco_folder),
    )  # fmt: skip
    assert "Evaluation results for bbox" in out
    assert "nothing will be measured" in out  # AGVM starts at 1020


# Bad input


@pytest.mark.parametrize(
    "opts, message",
    [
        (["AGVM.MODE", "on"], "AGVM.MODE: found 'on'"),
        (["AGVM.MODES", "monitor"], "AGVM.MODES"),
        (["SOLVER.IMS_PER_BATCH", 63, "SOLVER.MICRO_BATCH_SIZE", 2], "63 / 1 workers"),
        (["DATASETS.TRAIN", "('digit_train',)"], "DATASETS: 'digit_train' is not a registered"),
        (["DATASETS.TRAIN", "('coco_2017_train',)"], "coco_2017_train.*DETECTRON2_DATASETS"),
        (["MODEL.WEIGHTS", "no/such.pth"], "MODEL.WEIGHTS: 'no/such.pth' is not there"),
    ],
)
def test_bad_config_values(opts, message, tmp_path):
    with pytest.raises((ValueError, KeyError, OSError), match=message):
        train_net.setup(args("OUTPUT_DIR", tmp_path / "out", *opts))
    assert not (tmp_path / "out").exists()  # nothing was written


def test_a_config_of_the_model_zoo_and_one_that_is_nowhere(digits, tmp_path):
    name = "Digits-Detection/faster_rcnn_thin_R_50_FPN_bs64_agvm.yaml"
    found = args("OUTPUT_DIR", tmp_path, "SOLVER.BASE_LR", 0.5, config=name)
    cfg = train_net.setup(found)
    assert cfg.SOLVER.BASE_LR == 0.5 and cfg.SOLVER.IMS_PER_BATCH == 64
    assert os.path.isfile(found.config_file)  # which Detectron2 opens for its log
    with pytest.raises(FileNotFoundError, match="is not a file, nor is .* did you mean"):
        train_net.setup(args(config=name.replace("bs64", "bs63")))


def test_a_detectron2_that_is_too_old_is_one_line(monkeypatch, capsys):
    monkeypatch.delattr(HookBase, "after_backward")
    with pytest.raises(SystemExit, match="^agvm_d2.train: error: The Detectron2 in "):
        train.main(["--config-file", DIGITS])


def test_an_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="OUTPUT_DIR: '.*/file/out' cannot be made .Not a directory"):
        train_net.setup(args("OUTPUT_DIR", tmp_path / "file" / "out"))


def test_a_user_sees_one_line_and_an_exit_code(tmp_path):
    out = command("--config-file", COCO, "OUTPUT_DIR", tmp_path, ok=False, CUDA_VISIBLE_DEVICES="")
    assert out == (
        "train_net.py: error: MODEL.DEVICE: found 'cuda', but this machine has no usable CUDA "
        "device. To run on a CPU, add to the command: MODEL.DEVICE cpu\n"
    )
    out = command("--config-file", DIGITS, "AGVM.MODES", "on", ok=False)
    assert out == (
        "train_net.py: error: config: Non-existent key: AGVM.MODES; did you mean AGVM.MODE or "
        "AGVM.MODULES?\n"
    )
