import os
import re
import pytest
import torch
import torchvision
from detectron2 import model_zoo
from detectron2.config import LazyCall, get_cfg, instantiate
from detectron2.model_zoo import get_config_file
from detectron2.modeling import MViT, build_model
from torch import nn
from toy import ToyDetector, parameter_names

from agvm_d2.modules import assign_modules, module_table

NAMES = os.path.join(os.path.dirname(__file__), "fixtures", "modules")


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


def expanded(name: str) -> list[str]:
    """`a.{0-2}.b` -> a.0.b, a.1.b, a.2.b"""
    found = re.search(r"\{(\d+)-(\d+)\}", name)
    if not found:
        return [name]
    head, tail = name[: found.start()], expanded(name[found.end() :])
    return [f"{head}{i}{t}" for i in range(int(found[1]), int(found[2]) + 1) for t in tail]


def skeleton(path: str) -> nn.Module:
    """Parameters by the names in a file, which says where they are from."""
    model = nn.Module()
    with open(path) as f:
        lines = [line.split() for line in f if not line.startswith("#")]
    for collapsed, shape, *frozen in lines:
        for name in expanded(collapsed):
            *parents, leaf = name.split(".")
            place = model
            for parent in parents:
                if parent not in place._modules:
                    place.add_module(parent, nn.Module())
                place = place._modules[parent]
            values = torch.empty([int(n) for n in shape.split("x")], device="meta")
            place.register_parameter(leaf, nn.Parameter(values, requires_grad=not frozen))
    return model


# Parameters of each module but the backbone, whose names are not all in the files.
ARCHITECTURES = {
    # Encoder: 4 x 256 for the levels, and 6 layers of 65,792 + 32,896 + 2 x 65,792 (attention),
    # 1,050,880 (FFN) and 1,024 (norms). Head: 7 x 20,560 (classes) + 7 x 132,612 (boxes).
    "detrex_dino": "neck 5639168 encoder 7694080 decoder 9789952 head 1072204",
    "detrex_dino_vitdet": "fpn 3444096 neck 265216 encoder 7694080 decoder 9789952 head 1072204",
    "detrex_detr": "neck 524544 encoder 7890432 decoder 9498624 head 153429",
    "detrex_deformable_detr": "neck 5639168 encoder 4542208 decoder 6277378 head 153172",
    "detrex_dab_detr": "neck 524544 encoder 8022022 decoder 11514040 head 153172",
    "detrex_dn_deformable_detr": "neck 5639168 encoder 7694080 decoder 9702195 head 919032",
    "detrex_deta": "neck 6229760 encoder 7842368 decoder 9819456 head 1072204",
    "detrex_anchor_detr": "neck 525056 encoder 5528064 decoder 7374680 head 153172",
    "detrex_pnp_detr": "neck 524544 encoder 8029983 decoder 9498624 head 153429",
    "detrex_focus_detr": "neck 5639168 encoder 9404244 decoder 9789952 head 1051644",
    # Head: 20,817 (classes) + 197,376 (masks).
    "mask2former": "pixel_decoder 6035904 decoder 14261248 head 218193",
    "maskformer": "pixel_decoder 7540480 decoder 10023168 head 236183",
    "maskformer_panoptic": "pixel_decoder 11826688 decoder 9498624 head 231814",
    "maskformer_per_pixel": "pixel_decoder 7540480 sem_seg_head 38550",
    "oneformer": "pixel_decoder 6035904 decoder 17558016 head 236183 text_encoder 17542913",
    "adelaidet_fcos": "fpn 3868672 head 4920666",
    "adelaidet_blendmask": "fpn 3868672 head 4920661 mask_head 3737317",
    "adelaidet_condinst_bifpn": "fpn 11649554 head 1969530 mask_head 1389137",
    "adelaidet_solov2": "fpn 3344384 head 18081104 mask_head 1659392",
    "centernet_fpn": "fpn 3868672 head 4918361",
    "centernet2": "fpn 3868672 rpn 2373898 box_head 41948415",
    "centernet2_bifpn": "fpn 3918756 rpn 930728 box_head 27497727",
    "pointrend": "fpn 3344384 rpn 593935 mask_head 18461856 box_head 14306705",
    "pointrend_semantic": "fpn 3344384 sem_seg_head 1833382",
    "panoptic_deeplab": "sem_seg_head 3340901 ins_embed_head 3327939",
    "deeplab_v3_plus": "sem_seg_head 16843379",
    "tridentnet": "rpn 9515083 box_head 821649",
    "unbiased_teacher": "fpn 3344384 rpn 593935 box_head 14306705",
    "mmdet_mask_rcnn": "neck 3344384 rpn 593935 mask_head 2643280 box_head 14306705",
    "mmdet_htc": (
        "neck 3344384 rpn 593935 mask_head 8061424 box_head 41948415 sem_seg_head 2802103"
    ),
    "mmdet_retinanet": "neck 7997440 head 6463220",
    "mmdet_condinst": "neck 3868672 head 5310211 mask_head 1477384",
    "mmdet_panoptic_fpn": (
        "neck 3344384 rpn 593935 mask_head 2643280 box_head 14306705 sem_seg_head 1630774"
    ),
    "mmdet_dino": "neck 5638144 encoder 7694080 decoder 9789952 head 1072204",
    "mmdet_deformable_detr": "neck 5638144 encoder 4542208 decoder 6277378 head 153172",
    "mmdet_mask2former": "pixel_decoder 6035904 decoder 14261248 head 218193",
    "mmseg_upernet": "sem_seg_head 40523283 auxiliary_head 2364691",
}


def test_each_list_of_names_is_looked_at():
    assert sorted(f"{name}.txt" for name in ARCHITECTURES) == sorted(os.listdir(NAMES))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_of_other_projects(name):
    modules = assign_modules(skeleton(os.path.join(NAMES, f"{name}.txt")))
    sizes = {module: sum(p.numel() for p in params) for module, params in modules.items()}
    assert sizes.pop("backbone") > 0
    assert min(sizes.values()) > 10_000  # a tiny one is part of what it serves
    words = ARCHITECTURES[name].split()
    assert sizes == dict(zip(words[::2], map(int, words[1::2])))


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
        ("Misc/semantic_R_50_FPN_1x", "backbone fpn sem_seg_head"),
        ("COCO-Detection/rpn_R_50_FPN_1x", "backbone fpn rpn"),
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


def mvitv2():
    """As in projects/MViTv2."""
    model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
    stages = ("scale2", "scale3", "scale4", "scale5")
    model.backbone.bottom_up = LazyCall(MViT)(
        embed_dim=96, depth=10, num_heads=1, last_block_indexes=(0, 2, 7, 9), out_features=stages
    )
    model.backbone.in_features = stages
    return instantiate(model)


@pytest.mark.parametrize(
    "build, expected",
    [
        (
            lambda: instantiate(model_zoo.get_config("common/models/fcos.py").model),
            "backbone fpn head",
        ),
        (mvitv2, "backbone fpn rpn mask_head box_head"),
        (
            lambda: torchvision.models.get_model("maskrcnn_resnet50_fpn", weights_backbone=None),
            "backbone fpn rpn mask_head box_head",
        ),
        (
            lambda: torchvision.models.get_model(
                "keypointrcnn_resnet50_fpn", weights_backbone=None
            ),
            "backbone fpn rpn keypoint_head box_head",
        ),
        (
            lambda: torchvision.models.get_model("retinanet_resnet50_fpn", weights_backbone=None),
            "backbone fpn head",
        ),
        (
            lambda: torchvision.models.get_model("fcos_resnet50_fpn", weights_backbone=None),
            "backbone fpn head",
        ),
        (
            lambda: torchvision.models.get_model("ssd300_vgg16", weights_backbone=None),
            "backbone head",
        ),
    ],
    ids="fcos mvitv2 tv_mask_rcnn tv_keypoint_rcnn tv_retinanet tv_fcos tv_ssd".split(),
)
def test_models_that_are_installed(build, expected):
    """ViTDet and Swin are among this project's configs, see test_configs."""
    assert list(assign_modules(build())) == expected.split()


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


def test_what_is_known_below_a_wrapper_and_what_else_is_there():
    model = nn.Module()
    model.student, model.teacher = ToyDetector(), ToyDetector()
    model.student.extra = nn.Linear(1, 1)
    model.teacher.requires_grad_(False)
    assert names_of(model, assign_modules(model)) == {
        **{
            module: [f"student.{name}" for name in names]
            for module, names in parameter_names(model.teacher).items()
        },
        "extra": ["student.extra.weight", "student.extra.bias"],
    }


def test_a_frozen_backbone_says_what_the_others_are():
    model = skeleton(os.path.join(NAMES, "detrex_dino.txt"))
    model.adapter = nn.Linear(1, 1)
    model.backbone.requires_grad_(False)
    assert set(assign_modules(model)) == {"neck", "head", "encoder", "decoder", "adapter"}
    for child in (model.neck, model.label_enc, model.adapter):
        child.requires_grad_(False)
    assert set(assign_modules(model)) == {"head", "encoder", "decoder"}


def test_a_single_head_is_where_others_propose():
    model = ToyDetector()
    del model.roi_heads
    model.proposal_generator = nn.ModuleDict({"fcos_head": nn.Linear(1, 1)})
    assert list(assign_modules(model)) == ["backbone", "fpn", "head"]
    model.proposal_generator = nn.ModuleDict({"rpn_head": nn.Linear(1, 1)})
    assert list(assign_modules(model)) == ["backbone", "fpn", "rpn"]


@pytest.mark.parametrize("frozen", [False, True])
def test_with_roi_heads_it_proposes(frozen):
    model = ToyDetector()
    model.proposal_generator = nn.ModuleDict({"fcos_head": nn.Linear(1, 1)})
    model.roi_heads.requires_grad_(not frozen)
    assert "rpn" in assign_modules(model)


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


def test_no_module_is_named_as_the_whole_model():
    with pytest.raises(ValueError, match='a module cannot be named "model"'):
        assign_modules(ToyDetector(), (("model", ""),))
    model = nn.ModuleDict({"model": nn.Linear(1, 1), "decoder": nn.Linear(1, 1)})
    assert list(assign_modules(model)) == ["model_", "decoder"]


def test_a_frozen_model_is_an_error():
    model = ToyDetector()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        assign_modules(model)


def test_the_table():
    model = ToyDetector()
    # 6 x 8 + 8 and 8 x 8 + 8; 8 x 8 + 8; 8 + 1 twice: 218 in all.
    assert module_table(model, assign_modules(model)).splitlines() == [
        "module    parameters     %  first parameter               last parameter",
        "backbone         128  58.7  backbone.bottom_up.0.weight   backbone.bottom_up.2.bias",
        "fpn               72  33.0  backbone.fpn_lateral2.weight  backbone.fpn_lateral2.bias",
        "rpn                9   4.1  proposal_generator.weight     proposal_generator.bias",
        "box_head           9   4.1  roi_heads.box_head.weight     roi_heads.box_head.bias",
    ]
