import os
import re
import sys
import pytest
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

from agvm_d2 import add_agvm_config, visualize
from agvm_d2.d2 import lazy

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def untrained(path, folder) -> str:
    """A checkpoint of the model as built."""
    if path.endswith(".py"):
        model = instantiate(lazy.load(path, []).model)
    else:
        cfg = get_cfg()
        add_agvm_config(cfg)
        cfg.merge_from_file(path)
        model = build_model(cfg)
    DetectionCheckpointer(model, str(folder)).save("model")
    return str(folder / "model.pth")


@pytest.mark.parametrize(
    "path",
    [
        "Digits-InstanceSegmentation/mask_rcnn_thin_R_50_FPN_6ep_bs16_adamw_agvm.yaml",
        "Digits-SemanticSegmentation/semantic_fpn_thin_R_50_4ep_bs16_adamw_agvm.yaml",
        "Digits-PanopticSegmentation/panoptic_fpn_thin_R_50_6ep_bs16_adamw_agvm.yaml",
        "Digits-InstanceSegmentation/mask_rcnn_vitdet_thin_6ep_bs16_agvm.py",
    ],
)
def test_draws_each_task(path, digits, tmp_path, capsys):
    if path.endswith(".py"):
        pytest.importorskip("timm")
    path = os.path.join(ROOT, "configs", path)
    weights = untrained(path, tmp_path)
    key = "train.init_checkpoint=" + weights if path.endswith(".py") else "MODEL.WEIGHTS " + weights
    out = str(tmp_path / "p.png")
    visualize.main(
        ["--config-file", path, "--out", out, "--num", "2", "--threshold", "0.0", *key.split()]
    )
    assert capsys.readouterr().out == out + "\n"
    with Image.open(out) as picture:
        assert picture.width > 400 and len(picture.convert("RGB").getcolors(2**24)) > 1000


DATASET = """
from detectron2.data.datasets import register_coco_instances

register_coco_instances("own_digits", {}, "FOLDER/annotations/instances_val.json", "FOLDER/val")
"""


def test_a_projects_own_dataset_and_a_threshold_that_nothing_reaches(digits, tmp_path, capsys):
    source = DATASET.replace("FOLDER", os.path.join(digits, "digits_v2"))
    (tmp_path / "own_digits_dataset.py").write_text(source)
    path = os.path.join(ROOT, "configs/Digits-Detection/faster_rcnn_thin_R_50_FPN_bs64_agvm.yaml")
    given = ["--config-file", path, "--out", str(tmp_path / "p.png"), "--num", "1"]
    given += ["--import", str(tmp_path / "own_digits_dataset.py")]
    keys = ["MODEL.WEIGHTS", untrained(path, tmp_path), "DATASETS.TEST", "('own_digits',)"]
    keys += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    try:
        for _ in range(2):  # registered once
            visualize.main([*given, "--threshold", "1.5", *keys])
        said = capsys.readouterr().err.splitlines()[-1]
        assert re.fullmatch(
            r"No instance has a score of 1.5 \(--threshold\): the highest score is [01]\.\d+\.",
            said,
        )
        keys[-1] = "1.0"
        visualize.main([*given, *keys])
        assert "of 0.5 (--threshold): the model finds nothing." in capsys.readouterr().err
    finally:
        DatasetCatalog.pop("own_digits", None)
        MetadataCatalog.pop("own_digits", None)
        sys.path.remove(str(tmp_path))
        sys.modules.pop("own_digits_dataset")


def test_missing_weights_are_named():
    path = os.path.join(ROOT, "configs/Digits-Detection/faster_rcnn_thin_R_50_FPN_bs64_agvm.yaml")
    with pytest.raises(SystemExit, match="MODEL.WEIGHTS: 'no.pth' is no file"):
        visualize.main(["--config-file", path, "MODEL.WEIGHTS", "no.pth"])


def test_a_yaml_file_that_runs_code_needs_its_flag(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("SOLVER:\n  STEPS: !!python/object/apply:eval ['(10, 20)']\n")
    args = ["--config-file", str(path), "MODEL.WEIGHTS", "no.pth", "MODEL.DEVICE", "cpu"]
    with pytest.raises(SystemExit, match="--allow-unsafe-yaml"):
        visualize.main(args)
    with pytest.raises(SystemExit, match="'no.pth' is no file"):
        visualize.main(["--allow-unsafe-yaml", *args, "DATASETS.TEST", "('digits_val',)"])


def test_an_architecture_that_is_not_registered_is_named_without_quotes(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "MODEL: {META_ARCHITECTURE: Other, DEVICE: cpu}\nDATASETS: {TEST: [digits_val]}"
    )
    with pytest.raises(SystemExit, match="error: No object named 'Other' found"):
        visualize.main(["--config-file", str(path), "MODEL.WEIGHTS", str(path)])
