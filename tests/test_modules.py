import pytest
import torch
from detectron2.config import get_cfg
from detectron2.model_zoo import get_config_file
from detectron2.modeling import build_model
from torch import nn
from toy import ToyDetector, parameter_names

from agvm_d2.modules import assign_modules


def names_of(model, modules):
    name = {p: n for n, p in model.named_parameters()}
    return {module: [name[p] for p in params] for module, params in modules.items()}


def test_toy_modules_are_those_written_by_hand():
    model = ToyDetector()
    assert names_of(model, assign_modules(model)) == parameter_names(model)


def test_default_modules_by_name():
    model = nn.Module()
    wanted = {
        "backbone": ["backbone.bottom_up.stem", "backbone.net.blocks", "roi_heads.res5.conv"],
        "fpn": ["backbone.fpn_output2", "backbone.top_block.p6", "backbone.simfp_2.conv"],
        "rpn": ["proposal_generator.rpn_head"],
        "mask_head": ["roi_heads.mask_head", "roi_heads.mask_pooler"],
        "keypoint_head": ["roi_heads.keypoint_head"],
        "box_head": ["roi_heads.box_head", "roi_heads.box_predictor"],
        "sem_seg_head": ["sem_seg_head.predictor"],
        "head": ["head.cls_score"],
        "rest": ["criterion.backbone"],  # matched at the start only
    }
    for path in (path for paths in wanted.values() for path in paths):
        *parents, name = path.split(".")
        place = model
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = getattr(place, parent)
        place.add_module(name, nn.Linear(1, 1, bias=False))
    assert names_of(model, assign_modules(model)) == {
        module: [f"{path}.weight" for path in paths] for module, paths in wanted.items()
    }


@pytest.mark.parametrize(
    "config, expected",
    [
        ("COCO-Detection/faster_rcnn_R_50_FPN_1x", "backbone fpn rpn box_head"),
        ("COCO-Detection/faster_rcnn_R_50_C4_1x", "backbone rpn box_head"),
        ("COCO-Detection/retinanet_R_50_FPN_1x", "backbone fpn head"),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x", "backbone fpn rpn mask_head box_head"),
        ("Misc/cascade_mask_rcnn_R_50_FPN_1x", "backbone fpn rpn mask_head box_head"),
        ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x", "backbone fpn rpn keypoint_head box_head"),
        (
            "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x",
            "backbone fpn rpn mask_head box_head sem_seg_head",
        ),
    ],
)
def test_detectron2_architectures(config, expected):
    cfg = get_cfg()
    cfg.merge_from_file(get_config_file(config + ".yaml"))
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    modules = assign_modules(model)
    assert list(modules) == expected.split()
    trainable = {p for p in model.parameters() if p.requires_grad}
    assigned = [p for params in modules.values() for p in params]
    assert len(assigned) == len(trainable) and set(assigned) == trainable  # each exactly once
    names = names_of(model, modules)
    assert all(n.startswith("backbone.fpn_") for n in names.get("fpn", ()) if "top_block" not in n)
    if "C4" in config:
        assert any(n.startswith("roi_heads.res5") for n in names["backbone"])
    # FREEZE_AT 2 is Detectron2's default: stem and res2 are in no module.
    assert not any(".stem." in n or ".res2." in n for n in names["backbone"])


def test_frozen_are_skipped_and_shared_count_once():
    model = ToyDetector()
    model.roi_heads.box_head.weight = model.proposal_generator.weight
    model.backbone.bottom_up[0].bias.requires_grad = False
    names = names_of(model, assign_modules(model))
    assert names["rpn"] == ["proposal_generator.weight", "proposal_generator.bias"]
    assert names["box_head"] == ["roi_heads.box_head.bias"]
    assert "backbone.bottom_up.0.bias" not in names["backbone"]


def test_what_no_default_pattern_knows_is_rest():
    model = ToyDetector()
    model.extra = nn.Linear(1, 1)
    assert names_of(model, assign_modules(model))["rest"] == ["extra.weight", "extra.bias"]


def test_children_of_an_unknown_architecture():
    model = nn.Module()
    model.encoder, model.decoder = nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1))
    model.encoder2 = nn.Linear(1, 1, bias=False)
    model.scale = nn.Parameter(torch.ones(1))
    names = names_of(model, assign_modules(model))
    assert names == {
        "encoder": ["encoder.weight", "encoder.bias"],
        "decoder": ["decoder.0.weight", "decoder.0.bias"],
        "encoder2": ["encoder2.weight"],
        "rest": ["scale"],
    }


def test_children_below_a_wrapper():
    model = nn.Module()
    model.detr = nn.Module()
    model.detr.backbone, model.detr.transformer = nn.Linear(1, 1), nn.Linear(1, 1)
    assert list(assign_modules(model)) == ["backbone", "transformer"]


def test_an_unknown_architecture_without_children_is_one_module():
    assert list(assign_modules(nn.Linear(1, 1))) == ["rest"]


def test_given_patterns_first_match_wins():
    patterns = (("neck", r"backbone\.fpn"), ("body", "backbone"), ("neck", "proposal"), ("top", ""))
    model = ToyDetector()
    names = names_of(model, assign_modules(model, patterns))
    assert list(names) == ["neck", "body", "top"]
    assert names["neck"][0] == "backbone.fpn_lateral2.weight"
    assert names["neck"][-1] == "proposal_generator.bias"
    assert names["top"] == ["roi_heads.box_head.weight", "roi_heads.box_head.bias"]


def test_a_parameter_in_no_module_is_named():
    with pytest.raises(ValueError, match="AGVM.MODULES.*'proposal_generator.weight'.*catch-all"):
        assign_modules(ToyDetector(), (("backbone", r"backbone\."), ("box", r"roi_heads\.")))


@pytest.mark.parametrize("regex", ["bakbone", r"backbone\.bottom_up", "heads"])
def test_a_pattern_that_matches_nothing_is_named(regex):
    patterns = (("backbone", "backbone"), ("typo", regex), ("rest", ""))
    with pytest.raises(ValueError, match='AGVM.MODULES: the pair ."typo", ".*matches no trainable'):
        assign_modules(ToyDetector(), patterns)


def test_a_frozen_model_is_an_error():
    model = ToyDetector()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        assign_modules(model)
