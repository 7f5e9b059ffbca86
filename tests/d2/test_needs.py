"""A config against its datasets, before anything is built."""

import contextlib
import copy
import itertools
import json
import os
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators
from detectron2.structures import Boxes, Instances
from PIL import Image
from toy_d2 import ToyTrainer, toy_config

from agvm_d2 import AGVMTrainer, AGVMTrainerMixin
from agvm_d2.d2 import lazy
from agvm_d2.d2.config import read_config
from agvm_d2.d2.needs import Needs, check_data, complete, evaluator_type, of_lazy, of_yacs
from agvm_d2.data import digits as data
from agvm_d2.data.faults import DatasetError

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DETECTION = f"{ROOT}/configs/Digits-Detection/faster_rcnn_thin_R_50_FPN_bs64_agvm.yaml"
RETINANET = f"{ROOT}/configs/Digits-Detection/retinanet_thin_R_50_FPN_6ep_bs16_adamw_agvm.yaml"
SEMANTIC = (
    f"{ROOT}/configs/Digits-SemanticSegmentation/semantic_fpn_thin_R_50_4ep_bs16_adamw_agvm.yaml"
)
PANOPTIC = (
    f"{ROOT}/configs/Digits-PanopticSegmentation/panoptic_fpn_thin_R_50_6ep_bs16_adamw_agvm.yaml"
)
MASKS = (
    f"{ROOT}/configs/Digits-InstanceSegmentation/mask_rcnn_thin_R_50_FPN_6ep_bs16_adamw_agvm.yaml"
)
LAZY = f"{ROOT}/configs/Digits-InstanceSegmentation/mask_rcnn_vitdet_thin_6ep_bs16_agvm.py"

names = (f"needs_{i}" for i in itertools.count())


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, digits):
    import agvm_d2.data  # noqa: F401

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def changed(tmp_path, change, split="val", **metadata):
    """The name of a copy of the digits, each annotation changed."""
    with open(f"{data.root()}/annotations/instances_{split}.json") as file:
        content = json.load(file)
    for i, annotation in enumerate(content["annotations"]):
        change(annotation, i)
    if "keypoints" in content["annotations"][0]:
        for category in content["categories"]:
            category["keypoints"] = ["a", "b", "c"]
    name = next(names)
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(content))
    register_coco_instances(name, metadata, str(path), f"{data.root()}/{split}")
    return name


def without(*fields, of=None):
    def change(annotation, i):
        if of is None or i == of:
            for field in fields:
                annotation.pop(field, None)

    return change


def keypoints(annotation, i):
    x, y, w, h = annotation["bbox"]
    points = [x + 1, y + 1, 2, x + w / 2, y + h / 2, 2, x + w - 1, y + h - 1, 2]
    annotation.update(keypoints=points, num_keypoints=3)


def rle(annotation, i):
    import pycocotools.mask as mask_util

    code = mask_util.merge(mask_util.frPyObjects(annotation["segmentation"], 96, 96))
    annotation["segmentation"] = {"size": [96, 96], "counts": code["counts"].decode()}


def look(config, *opts, log=False, **kwargs):
    check_data(of_yacs(read_config(config, list(opts)), **kwargs), log)


@pytest.mark.parametrize("config", [DETECTION, RETINANET, SEMANTIC, PANOPTIC, MASKS])
def test_the_digits_configs_fit(config):
    look(config)


@pytest.mark.parametrize(
    "config, key, value, wanted",
    [
        (DETECTION, "MODEL.ROI_HEADS.NUM_CLASSES", 5, 10),
        (DETECTION, "MODEL.ROI_HEADS.NUM_CLASSES", 80, 10),
        (MASKS, "MODEL.ROI_HEADS.NUM_CLASSES", 11, 10),
        (RETINANET, "MODEL.RETINANET.NUM_CLASSES", 80, 10),
        (SEMANTIC, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 54, 12),
        (PANOPTIC, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2, 3),
        (PANOPTIC, "MODEL.ROI_HEADS.NUM_CLASSES", 9, 10),
    ],
)
def test_numbers_of_classes(config, key, value, wanted):
    message = f"{key}: found {value}, but it must be {wanted}: dataset 'digits_.*CHECK_DATASETS"
    with pytest.raises(DatasetError, match=message):
        look(config, key, value)
    look(config, key, value, "DATALOADER.CHECK_DATASETS", False)


def test_classes_that_only_the_file_knows(tmp_path):
    name = changed(tmp_path, lambda a, i: None)
    assert MetadataCatalog.get(name).get("thing_classes", None) is None
    with pytest.raises(DatasetError, match="NUM_CLASSES: found 9, but it must be 10"):
        look(DETECTION, "DATASETS.TRAIN", (name,), "MODEL.ROI_HEADS.NUM_CLASSES", 9)


def test_another_architecture_reads_keys_of_its_own(monkeypatch):
    cfg = read_config(DETECTION, ["MODEL.ROI_HEADS.NUM_CLASSES", 3])
    cfg.MODEL.META_ARCHITECTURE = "MaskFormer"
    check_data(of_yacs(cfg))


def test_masks_that_are_not_there(tmp_path):
    every, one = without("segmentation"), without("segmentation", of=1)
    for change, count in ((every, "of"), (one, "1 of")):
        name = changed(tmp_path, change)
        for split in ("TRAIN", "TEST"):
            with pytest.raises(DatasetError, match=f"MODEL.MASK_ON: .* {count} .* have none") as e:
                look(MASKS, f"DATASETS.{split}", (name,))
            assert f"dataset '{name}'" in str(e.value) and "MODEL.MASK_ON False" in str(e.value)
        look(DETECTION, "DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,))


def test_run_length_codes_under_polygons(tmp_path):
    name = changed(tmp_path, rle)
    with pytest.raises(DatasetError, match="INPUT.MASK_FORMAT: found 'polygon', .* bitmask"):
        look(MASKS, "DATASETS.TRAIN", (name,))
    look(MASKS, "DATASETS.TRAIN", (name,), "INPUT.MASK_FORMAT", "bitmask")
    look(MASKS, "DATASETS.TEST", (name,))
    look(DETECTION, "DATASETS.TRAIN", (name,))


POINTS = ["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3]


def test_keypoints(tmp_path):
    meta = {"keypoint_names": ["a", "b", "c"], "keypoint_flip_map": []}
    name = changed(tmp_path, keypoints, **meta)
    opts = [*POINTS, "DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,)]
    look(DETECTION, *opts, "TEST.KEYPOINT_OKS_SIGMAS", [0.1] * 3)
    with pytest.raises(DatasetError, match="KEYPOINT_OKS_SIGMAS: found 0 values, .* have 3"):
        look(DETECTION, *opts)
    with pytest.raises(DatasetError, match="KEYPOINT_OKS_SIGMAS: found 4 values, .* have 3"):
        look(DETECTION, *opts, "TEST.KEYPOINT_OKS_SIGMAS", [0.1] * 4)
    with pytest.raises(DatasetError, match=f"NUM_KEYPOINTS: found 17, but dataset '{name}' has 3"):
        look(DETECTION, *opts, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 17)
    with pytest.raises(
        DatasetError, match="NUM_KEYPOINTS: dataset 'digits_train' has no keypoints"
    ):
        look(DETECTION, *opts, "DATASETS.TRAIN", ("digits_train",))
    bare = changed(tmp_path, keypoints)
    with pytest.raises(DatasetError, match=f"'{bare}' has no keypoint_names"):
        look(DETECTION, *opts, "DATASETS.TRAIN", (bare,))

    content = changed(tmp_path, lambda a, i: keypoints(a, i) if i != 3 else None, **meta)
    with pytest.raises(DatasetError, match="1 annotations of test set .* have no keypoints"):
        look(DETECTION, *opts, "DATASETS.TEST", (content,), "TEST.KEYPOINT_OKS_SIGMAS", [0.1] * 3)


def test_sigmas_are_passed_on(tmp_path):
    cfg = read_config(
        DETECTION, ["TEST.KEYPOINT_OKS_SIGMAS", [0.1] * 3, "OUTPUT_DIR", str(tmp_path)]
    )
    assert AGVMTrainer.build_evaluator(cfg, "digits_val")._kpt_oks_sigmas == [0.1] * 3


def test_a_set_without_annotations(tmp_path):
    path = tmp_path / "a.json"
    images = [{"id": 1, "file_name": "000001.png", "width": 96, "height": 96}]
    categories = [{"id": i, "name": str(i)} for i in range(10)]
    path.write_text(json.dumps({"images": images, "categories": categories}))
    name = next(names)
    register_coco_instances(name, {}, str(path), f"{data.root()}/val")
    look(DETECTION, "DATASETS.TEST", (name,))  # as COCO's test-dev
    with pytest.raises(DatasetError, match=f"'{name}' has no annotations, but it is to be trained"):
        look(DETECTION, "DATASETS.TRAIN", (name,))


# Evaluators


def registered(**metadata):
    name = next(names)
    record = {"file_name": f"{data.root()}/val/000001.png", "annotations": []}
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(**metadata)
    return name


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"evaluator_type": "mine"}, "no evaluator for dataset .* of evaluator_type 'mine'"),
        ({}, "no evaluator for dataset .* of evaluator_type None"),
        ({"stuff_classes": list("ab")}, "lack ignore_label"),
        ({"evaluator_type": "coco"}, "lack thing_classes"),
        ({"thing_classes": data.CLASSES}, "1 records of .* have no image_id"),
        ({"evaluator_type": "coco_panoptic_seg", "stuff_classes": ["a"]}, "lack panoptic_json"),
    ],
)
def test_what_evaluators_look_for_only_after_training(metadata, message):
    name = registered(**metadata)
    with pytest.raises(DatasetError, match=f"DATASETS.TEST: .*{message}|{message}"):
        look(DETECTION, "DATASETS.TEST", (name,))
    look(DETECTION, "DATASETS.TEST", (name,), evaluators=False)  # a project's own


def test_a_missing_package_is_named(monkeypatch):
    import importlib.util

    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "panopticapi" else original(n, *a)
    )
    with pytest.raises(DatasetError, match="needs the package panopticapi"):
        look(PANOPTIC)


def test_evaluator_type_has_a_default():
    assert evaluator_type(registered(thing_classes=["a"])) == "coco"
    assert evaluator_type(registered(stuff_classes=["a"])) == "sem_seg"
    assert evaluator_type(registered()) is None
    assert evaluator_type("digits_val_panoptic") == "coco_panoptic_seg"


def predicted(name):
    """What a model that finds all would say."""
    for record in DatasetCatalog.get(name):
        boxes = [a["bbox"] for a in record["annotations"]]
        found = Instances((96, 96))
        found.pred_boxes = Boxes(torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes]))
        found.scores = torch.ones(len(boxes))
        found.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        yield [record], [{"instances": found}]


@pytest.mark.parametrize("lacking", [["area"], ["iscrowd"], ["area", "iscrowd", "segmentation"]])
def test_an_evaluation_without_area_or_iscrowd(lacking, tmp_path, d2_log):
    name = changed(tmp_path, without(*lacking))
    evaluator = complete(DatasetEvaluators([COCOEvaluator(name, output_dir=str(tmp_path))]))
    evaluator.reset()
    for inputs, outputs in predicted(name):
        evaluator.process(inputs, outputs)
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100, abs=0.1)
    assert "annotations of the test set have no area or iscrowd" in d2_log.text
    with open(f"{data.root()}/annotations/instances_val.json") as file:
        areas = {a["id"]: a["area"] for a in json.load(file)["annotations"]}
    for annotation in evaluator._evaluators[0]._coco_api.anns.values():
        w, h = annotation["bbox"][2:]
        if "segmentation" in lacking:
            assert annotation["area"] == pytest.approx(w * h)
        else:  # polygons of the outline: without holes
            assert 0.9 * areas[annotation["id"]] < annotation["area"] < w * h


def test_as_in_the_balloon_tutorial(tmp_path):
    """Registered by functions, no evaluator_type: trains and is evaluated."""
    chosen = {}
    for split in ("train", "val"):
        chosen[split] = name = next(names)
        path = f"{data.root()}/annotations/instances_{split}.json"
        DatasetCatalog.register(
            name, lambda p=path, s=split, n=name: load_coco_json(p, f"{data.root()}/{s}", n)
        )
        MetadataCatalog.get(name).set(thing_classes=data.CLASSES)
    opts = "SOLVER.IMS_PER_BATCH 4 SOLVER.MICRO_BATCH_SIZE 2 SOLVER.STEPS () SOLVER.MAX_ITER 2"
    cfg = read_config(
        DETECTION,
        [
            *opts.split(), "SOLVER.WARMUP_ITERS", 0, "SOLVER.WARMUP_METHOD", "linear",
            "AGVM.START_ITER", 1, "OUTPUT_DIR", str(tmp_path / "out"),
            "DATASETS.TRAIN", (chosen["train"],), "DATASETS.TEST", (chosen["val"],),
        ],
    )  # fmt: skip
    os.makedirs(cfg.OUTPUT_DIR)
    trainer = AGVMTrainer(cfg)
    trainer.train()
    assert "bbox" in trainer._last_eval_results


# What bad images do


def test_bad_images_may_be_skipped_and_the_rest_is_told(tmp_path, d2_log):
    def change(annotation, i):
        if i == 1:
            annotation["segmentation"] = [[1, 2, float("nan"), 4, 5, 6]]
        if i == 2:
            annotation["bbox"] = [90, 5, 20, 5]

    name = changed(tmp_path, change)
    with pytest.raises(DatasetError, match=f"{name}.json: annotation 2 .*finite coordinates"):
        look(DETECTION, "DATASETS.TRAIN", (name,))
    skip = ["DATALOADER.ON_BAD_IMAGE", "skip"]
    look(DETECTION, "DATASETS.TRAIN", (name,), *skip, log=True)
    assert "finite coordinates" in d2_log.text and "not stick out of the image" in d2_log.text
    with pytest.raises(DatasetError, match="finite coordinates"):  # nobody skips these
        look(DETECTION, "DATASETS.TEST", (name,), *skip)


def test_many_faults_end_in_a_few_lines(tmp_path):
    def change(annotation, i):
        key = list(annotation)[i % 5]
        annotation[key] = None

    name = changed(tmp_path, change)
    with pytest.raises(DatasetError) as caught:
        look(DETECTION, "DATASETS.TRAIN", (name,))
    assert 2 <= len(str(caught.value).splitlines()) <= 11


# LazyConfig


@pytest.fixture
def lazy_config():
    pytest.importorskip("timm")
    return lazy.load(LAZY, [])


def test_a_mapper_that_is_a_function():
    cfg = lazy.load(LAZY, [])
    assert not lazy.needs(cfg).own_mapper
    cfg.dataloader.train.mapper = None
    assert lazy.needs(cfg).own_mapper
    look_lazily(cfg)


@pytest.mark.parametrize("own", [False, True])
def test_what_only_detectron2s_mapper_reads_wrongly(own, tmp_path, d2_log):
    image, label, name = tmp_path / "a.jpg", tmp_path / "a.png", next(names)
    Image.new("RGB", (8, 8)).save(image)
    Image.new("P", (8, 8)).save(label)
    record = {"file_name": str(image), "width": 8, "height": 8, "sem_seg_file_name": str(label)}
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(stuff_classes=["a", "b"], ignore_label=255)
    needs = Needs(train=(name,), test=(), off="", own_mapper=own)
    if own:
        check_data(needs, log=True)
        assert "mode P, but labels must be 8-bit grey" in d2_log.text
    else:
        with pytest.raises(DatasetError, match="mode P, but labels must be 8-bit grey"):
            check_data(needs)


@pytest.mark.parametrize("loads", [False, True])
def test_a_projects_own_loader_may_have_its_own_mapper(loads, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr("agvm_d2.d2.trainer.check_data", lambda needs, log: kept.append(needs))

    class Theirs(DefaultTrainer):
        build_model = ToyTrainer.__dict__["build_model"]
        if loads:
            build_train_loader = ToyTrainer.__dict__["build_train_loader"]

    class Mixed(AGVMTrainerMixin, Theirs):
        pass

    with contextlib.suppress(Exception):  # without that loader there are no data
        Mixed(toy_config(tmp_path))
    assert kept[0].own_mapper == loads and kept[0].completed


def look_lazily(cfg, train="digits_train", test="digits_val"):
    cfg = copy.deepcopy(cfg)
    cfg.dataloader.train.dataset.names = train
    cfg.dataloader.test.dataset.names = test
    check_data(lazy.needs(cfg))


def test_a_lazy_config(lazy_config, tmp_path):
    cfg = lazy_config
    look_lazily(cfg)
    name = changed(tmp_path, without("segmentation"))
    with pytest.raises(DatasetError, match="model.roi_heads.mask_head: masks are asked for, but"):
        look_lazily(cfg, train=name)
    codes = changed(tmp_path, rle)
    message = "mapper.instance_mask_format: found 'polygon'.* set dataloader.*format=bitmask"
    with pytest.raises(DatasetError, match=message):
        look_lazily(cfg, train=codes)
    cfg.dataloader.train.mapper.instance_mask_format = "bitmask"
    look_lazily(cfg, train=codes)
    cfg.model.roi_heads.num_classes = 80
    message = "model.roi_heads.num_classes: found 80, but it must be 10.*train.check_datasets=False"
    with pytest.raises(DatasetError, match=message):
        look_lazily(cfg)
    cfg.train.check_datasets = False
    assert of_lazy(cfg, ["digits_train"], []) is None
    look_lazily(cfg)


def test_a_projects_own_evaluator_is_told_of(tmp_path, d2_log):
    name = changed(tmp_path, without("area"))
    look(DETECTION, "DATASETS.TEST", (name,), log=True)
    assert "have no area" not in d2_log.text  # filled in
    needs = of_yacs(read_config(DETECTION, ["DATASETS.TEST", (name,)]), evaluators=False)
    needs.completed = False
    check_data(needs, log=True)
    assert "33 annotations have no area, which COCO's evaluation needs" in d2_log.text
