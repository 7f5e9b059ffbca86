"""What a config and its datasets must have in common, compared before anything is built."""

from __future__ import annotations
import dataclasses
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any
import pycocotools.mask as mask_util
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from ..data.check import check
from ..data.faults import DatasetError, Report
from ..validate import is_int

logger = logging.getLogger("detectron2.agvm_d2")

MAX_LINES = 10
# Detectron2's own architectures; others may read other keys.
THINGS = {
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "PanopticFPN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
}
STUFF = ("SemanticSegmentor", "PanopticFPN")
EVALUATORS = ("coco", "coco_panoptic_seg", "lvis", "pascal_voc", "sem_seg")
PACKAGES = {"coco_panoptic_seg": "panopticapi", "lvis": "lvis"}
COCO_KEYPOINTS = 17  # what the evaluation takes without sigmas


@dataclasses.dataclass
class Needs:
    """Pairs are (the key, its value); None: not wanted, or not known."""

    train: Sequence[str]
    test: Sequence[str]
    off: str  # what turns the check off
    things: tuple[str, int] | None = None
    stuff: tuple[str, int] | None = None
    masks: str | None = None  # the key that asks for them
    polygons: str | None = None  # what to set for masks in run-length codes
    keypoints: tuple[str, int] | None = None
    sigmas: tuple[str, Sequence[float]] | None = None
    skip_images: bool = False
    evaluators: bool = False  # those of AGVMTrainer
    own_mapper: bool = False  # a project's, which may read what Detectron2's cannot
    completed: bool = True  # the evaluator goes through `complete`


def of_yacs(cfg: CfgNode, eval_only: bool = False, evaluators: bool = True) -> Needs | None:
    """What a yacs config needs; None with DATALOADER.CHECK_DATASETS False."""
    if not cfg.DATALOADER.CHECK_DATASETS:
        return None
    model, arch = cfg.MODEL, cfg.MODEL.META_ARCHITECTURE
    needs = Needs(
        train=() if eval_only else tuple(cfg.DATASETS.TRAIN),
        test=tuple(cfg.DATASETS.TEST),
        off="DATALOADER.CHECK_DATASETS False",
        skip_images=cfg.DATALOADER.ON_BAD_IMAGE == "skip",
        evaluators=evaluators,
    )
    if arch in THINGS:
        retina = arch == "RetinaNet"
        heads = model.RETINANET if retina else model.ROI_HEADS
        needs.things = (THINGS[arch], heads.NUM_CLASSES)
        if model.MASK_ON and not retina:
            needs.masks = "MODEL.MASK_ON"
            if cfg.INPUT.MASK_FORMAT == "polygon":
                needs.polygons = "INPUT.MASK_FORMAT bitmask"
        if model.KEYPOINT_ON and not retina:
            key = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
            needs.keypoints = (key, model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS)
            needs.sigmas = ("TEST.KEYPOINT_OKS_SIGMAS", cfg.TEST.KEYPOINT_OKS_SIGMAS)
    if arch in STUFF:
        needs.stuff = ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", model.SEM_SEG_HEAD.NUM_CLASSES)
    return needs


def of_lazy(cfg: DictConfig, train: Sequence[str], test: Sequence[str]) -> Needs | None:
    """What a LazyConfig needs, as far as Detectron2's names tell; None with train.check_datasets
    False."""
    if not cfg.train.get("check_datasets", True):
        return None

    def number(*keys: str) -> tuple[str, int] | None:
        for key in keys:
            value = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
            if is_int(value):
                return key, value
        return None

    needs = Needs(
        train=train,
        test=test,
        off="train.check_datasets=False",
        things=number("model.roi_heads.num_classes", "model.num_classes"),
        stuff=number("model.sem_seg_head.num_classes"),
        keypoints=number("model.roi_heads.keypoint_head.num_keypoints"),
        skip_images=cfg.train.get("on_bad_image", "stop") == "skip",
    )
    mapper = OmegaConf.select(cfg, "dataloader.train.mapper", default={})
    target = mapper.get("_target_", DatasetMapper) if OmegaConf.is_dict(mapper) else None
    name = getattr(target, "__name__", str(target).rpartition(".")[2])
    needs.own_mapper = name != "DatasetMapper"
    if OmegaConf.select(cfg, "model.roi_heads.mask_head") is not None:
        needs.masks = "model.roi_heads.mask_head"
        stock = OmegaConf.is_dict(mapper)  # else a function, whose masks are not known
        if stock and mapper.get("instance_mask_format", "polygon") == "polygon":
            needs.polygons = "dataloader.train.mapper.instance_mask_format=bitmask"
    evaluator = OmegaConf.select(cfg, "dataloader.evaluator", default=None)
    if OmegaConf.is_dict(evaluator):
        key = "dataloader.evaluator.kpt_oks_sigmas"
        needs.sigmas = (key, evaluator.get("kpt_oks_sigmas", ()))
    else:
        needs.test = ()  # not evaluated
    return needs


def check_data(needs: Needs | None, log: bool = False) -> None:
    """Look at the datasets and compare the config with them.

    Args:
        log: say what is odd, but does not spoil training.

    Raises:
        DatasetError: names file and record, or key, what was found and what to do.
    """
    if needs is None:
        return
    errors: list[str] = []
    for test, names in ((False, needs.train), (True, needs.test)):
        for name in names:
            if name not in DatasetCatalog.list():
                continue  # a project's own way to name them
            report = check(name)
            spared = needs.skip_images and not test, needs.own_mapper
            found = report.errors(*spared) or _mismatches(needs, name, report, test)
            errors += [line for line in found if line not in errors]
            if log and comm.is_main_process():
                for line in report.warnings(*spared) + _unseen(needs, name, report, test):
                    logger.warning(f"Dataset '{name}': {line}")
    if errors:
        more = len(errors) - MAX_LINES
        rest = f"\nand {more} more kinds of fault" if more > 0 else ""
        raise DatasetError(
            "\n".join(errors[:MAX_LINES]) + rest + f" (To train without this check: {needs.off})"
        )


def _mismatches(needs: Needs, name: str, report: Report, test: bool) -> list[str]:
    """One line for each key that does not fit the dataset."""
    meta, facts = MetadataCatalog.get(name), report.facts
    errors = []
    things = meta.get("thing_classes", None) or facts.get("category_names")
    for pair, classes in ((needs.things, things), (needs.stuff, meta.get("stuff_classes", None))):
        if pair and classes and pair[1] != len(classes):
            some = ", ".join(map(str, classes[:3])) + (", ..." if len(classes) > 3 else "")
            errors.append(
                f"{pair[0]}: found {pair[1]}, but it must be {len(classes)}: dataset '{name}' has "
                f"so many classes ({some})."
            )
    if test:
        errors += _evaluator_needs(needs, name, facts)
    if not facts.get("labelled"):
        if needs.things and not test and "labelled" in facts and "category_names" in facts:
            errors.append(f"DATASETS: '{name}' has no annotations, but it is to be trained on.")
        return errors
    total = facts.get("annotations", 0)
    if needs.things and not test and not facts.get("not_crowd"):
        errors.append(
            f"DATASETS: '{name}' has no annotation that is not a crowd: nothing to learn."
        )
        return errors
    if needs.masks:
        without, first = facts["any_without_mask" if test else "without_mask"]
        if without:
            of = total if test else facts["not_crowd"]
            errors.append(
                f"{needs.masks}: masks are asked for, but {without:,} of {of:,} annotations of "
                f"dataset '{name}' have none (segmentation), first {first}. Add masks, or train "
                f"without ({_without_masks(needs.masks)})."
            )
        codes, first = facts["codes"]
        # Crowds are not counted: training leaves them out.
        if codes and not test and needs.polygons:
            errors.append(
                f"{needs.polygons.replace('=', ' ').split(' ')[0]}: found 'polygon', but {codes:,} "
                f"masks of dataset '{name}' are run-length codes (RLE), first {first}: set "
                f"{needs.polygons}."
            )
    if needs.keypoints:
        errors += _keypoint_needs(needs, name, facts, test)
    return errors


def _unseen(needs: Needs, name: str, report: Report, test: bool) -> list[str]:
    """What an evaluator that nobody completes, if it is a COCOEvaluator, will fail at."""
    if needs.completed or not test or evaluator_type(name) != "coco":
        return []
    return [
        f"{report.facts[f'without_{field}'][0]:,} annotations have no {field}, which COCO's "
        "evaluation needs: agvm_d2.d2.needs.complete(evaluator) fills it in."
        for field in ("area", "iscrowd")
        if MetadataCatalog.get(name).get("json_file", None)
        and report.facts.get(f"without_{field}", [0])[0]
    ]


def _without_masks(key: str) -> str:
    return "MODEL.MASK_ON False" if key.isupper() else f"a model without {key.split('.')[-1]}"


def _keypoint_needs(needs: Needs, name: str, facts: dict, test: bool) -> list[str]:
    assert needs.keypoints is not None
    errors = []
    key, number = needs.keypoints
    meta = MetadataCatalog.get(name)
    if not facts["keypoints"]:
        errors.append(f"{key}: dataset '{name}' has no keypoints, but they are asked for.")
    elif facts["keypoints"] != [number]:
        had = " or ".join(map(str, facts["keypoints"]))
        errors.append(f"{key}: found {number}, but dataset '{name}' has {had} keypoints.")
    if not test:
        for field in ("keypoint_names", "keypoint_flip_map"):
            if meta.get(field, None) is None:
                errors.append(
                    f"{key}: dataset '{name}' has no {field}, which training needs: "
                    f"MetadataCatalog.get('{name}').set({field}=[...])."
                )
        return errors
    without, first = facts["without_keypoints"]
    if without and facts["keypoints"]:
        errors.append(
            f"{key}: {without:,} annotations of test set '{name}' have no keypoints, which the "
            f"evaluation needs of each, first {first}."
        )
    if needs.sigmas and len(needs.sigmas[1] or ()) != number:
        given = len(needs.sigmas[1] or ())
        if given or number != COCO_KEYPOINTS:
            errors.append(
                f"{needs.sigmas[0]}: found {given} values, but it must have {number}, one for each "
                "keypoint, for the evaluation (without it COCO's 17 are taken)."
            )
    return errors


def evaluator_type(name: str) -> str | None:
    """The dataset's, or what its metadata say it is where they have none."""
    meta = MetadataCatalog.get(name)
    kind = meta.get("evaluator_type", None)
    if kind is None and (meta.get("thing_classes", None) or meta.get("json_file", None)):
        return "coco"
    if kind is None and meta.get("stuff_classes", None):
        return "sem_seg"
    return kind


def _evaluator_needs(needs: Needs, name: str, facts: dict) -> list[str]:
    """What Detectron2's evaluators of the test set look for only when training is over."""
    if not needs.evaluators:
        return []
    meta, kind = MetadataCatalog.get(name), evaluator_type(name)
    if kind not in EVALUATORS:
        return [
            f"DATASETS.TEST: no evaluator for dataset '{name}' of evaluator_type {kind!r}. Set one "
            f"of {', '.join(EVALUATORS)} (MetadataCatalog.get('{name}').set(evaluator_type=...)), "
            "override build_evaluator, or set DATASETS.TEST ()."
        ]
    errors = []
    package = PACKAGES.get(kind)
    if package and importlib.util.find_spec(package) is None:
        errors.append(
            f"DATASETS.TEST: the evaluation of '{name}' ({kind}) needs the package {package}, "
            "which is not installed."
        )
    wanted = {"coco": ("thing_classes",), "sem_seg": ("stuff_classes", "ignore_label")}
    wanted["coco_panoptic_seg"] = (*wanted["sem_seg"], "panoptic_json", "panoptic_root")
    for field in wanted.get(kind, ()):
        if meta.get(field, None) is None and not (
            field == "thing_classes" and meta.get("json_file", None)
        ):
            errors.append(
                f"DATASETS.TEST: the metadata of '{name}' lack {field}, which its evaluation "
                f"({kind}) needs: MetadataCatalog.get('{name}').set({field}=...)."
            )
    for field in ("image_id", "width", "height") if kind == "coco" else ():
        count, first = facts.get(f"without_{field}", (0, ""))
        if count:
            errors.append(
                f"DATASETS.TEST: {count:,} records of '{name}' have no {field}, which the "
                f"evaluation needs, first {first}."
            )
    return errors


def complete(evaluator: DatasetEvaluator) -> DatasetEvaluator:
    """COCO's evaluation needs iscrowd, area and num_keypoints in each annotation, which detection
    datasets of others lack: 0, the area of mask or box, and the number of labelled keypoints."""
    parts = getattr(evaluator, "_evaluators", [evaluator])
    for part in parts:
        api = getattr(part, "_coco_api", None)
        if not isinstance(part, COCOEvaluator) or api is None:
            continue
        filled = 0
        for annotation in api.anns.values():
            filled += "area" not in annotation or "iscrowd" not in annotation
            annotation.setdefault("iscrowd", 0)
            if "area" not in annotation:
                if annotation.get("segmentation"):
                    area: Any = mask_util.area(api.annToRLE(annotation))
                else:
                    area = annotation["bbox"][2] * annotation["bbox"][3]
                annotation["area"] = float(area)
            if "keypoints" in annotation and "num_keypoints" not in annotation:
                annotation["num_keypoints"] = sum(v > 0 for v in annotation["keypoints"][2::3])
        if filled:
            logger.warning(
                f"{filled:,} annotations of the test set have no area or iscrowd: the area of mask "
                "or box, and 0, are taken."
            )
    return evaluator
