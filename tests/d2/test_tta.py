"""TEST.AUG, as Detectron2's tools/train_net.py has it."""

import json
import os
import pytest
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling import GeneralizedRCNNWithTTA

import agvm_d2.data  # noqa: F401
from agvm_d2 import AGVMTrainer, add_agvm_config
from agvm_d2.d2.checks import check_tta

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def config(folder=".", *opts, base="Digits-Detection/faster_rcnn_thin_R_50_FPN_bs64_agvm.yaml"):
    cfg = get_cfg()
    add_agvm_config(cfg)
    cfg.merge_from_file(os.path.join(ROOT, "configs", base))
    more = "SOLVER.IMS_PER_BATCH 2 SOLVER.MICRO_BATCH_SIZE 1 SOLVER.MAX_ITER 2 SOLVER.STEPS ()"
    more += " SOLVER.WARMUP_ITERS 0 SOLVER.WARMUP_METHOD linear DATALOADER.NUM_WORKERS 0"
    more += " MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 TEST.DETECTIONS_PER_IMAGE 20"
    cfg.merge_from_list([*more.split(), "TEST.AUG.MIN_SIZES", (96, 128), "OUTPUT_DIR", str(folder)])
    cfg.TEST.AUG.ENABLED = True
    cfg.TEST.EXPECTED_RESULTS = []
    cfg.merge_from_list(list(opts))
    return cfg


def test_after_training_and_alone(digits, tmp_path):
    cfg = config(tmp_path)
    trainer = AGVMTrainer(cfg)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert {"bbox/AP", "bbox_TTA/AP"} <= {key for row in rows for key in row}
    after = json.loads((tmp_path / "inference_TTA" / "coco_instances_results.json").read_text())
    plain = json.loads((tmp_path / "inference" / "coco_instances_results.json").read_text())
    assert after and after != plain

    # Detectron2's own parts, by hand.
    model = AGVMTrainer.build_model(cfg)
    DetectionCheckpointer(model).load(str(tmp_path / "model_final.pth"))
    name = cfg.DATASETS.TEST[0]
    evaluator = COCOEvaluator(name, output_dir=str(tmp_path / "hand"))
    loader = AGVMTrainer.build_test_loader(cfg, name)
    expected = inference_on_dataset(GeneralizedRCNNWithTTA(cfg, model.eval()), loader, evaluator)
    assert json.loads((tmp_path / "hand" / "coco_instances_results.json").read_text()) == after
    found = AGVMTrainer.test_with_TTA(cfg, model)
    assert found.keys() == {"bbox_TTA"}
    for key, value in found["bbox_TTA"].items():
        assert value == pytest.approx(expected["bbox"][key], nan_ok=True)


@pytest.mark.parametrize(
    "base, opts, key",
    [
        ("Digits-Detection/retinanet_thin_R_50_FPN_6ep_bs16_adamw_agvm.yaml", [], "RetinaNet"),
        ("Digits-SemanticSegmentation/semantic_fpn_thin_R_50_4ep_bs16_adamw_agvm.yaml", [], "Sem"),
        ("Digits-PanopticSegmentation/panoptic_fpn_thin_R_50_6ep_bs16_adamw_agvm.yaml", [], "Pan"),
        (None, ["MODEL.KEYPOINT_ON", True], "MODEL.KEYPOINT_ON"),
        (None, ["MODEL.LOAD_PROPOSALS", True], "MODEL.LOAD_PROPOSALS"),
    ],
)
def test_models_that_cannot(base, opts, key):
    cfg = config(".", *opts, **({"base": base} if base else {}))
    with pytest.raises(ValueError, match=f"TEST.AUG.ENABLED: found True, but .*{key}"):
        check_tta(cfg)
    cfg.TEST.AUG.ENABLED = False
    check_tta(cfg)


def test_models_that_can():
    check_tta(config())
    check_tta(config(".", "MODEL.ROI_HEADS.NAME", "CascadeROIHeads"))
