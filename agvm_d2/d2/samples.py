"""A record before the mapper sees it, and the sample that the mapper makes of it.

Cheap looks at what the check of datasets before training cannot know, or did not see: C code
(pycocotools' rasterizer) reads out of bounds at a coordinate that is NaN or huge.
"""

from __future__ import annotations
import math
from collections.abc import Iterable, Sequence
from typing import Any
import numpy as np
import torch
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.structures import BoxMode, PolygonMasks

from ..data.annotations import rle_pixels
from ..data.faults import REACH, SIDE, found
from ..data.files import image_faults, image_size
from ..validate import is_int


class SampleCheck:
    """Raises ValueError, which names field and value, where a record or sample is bad.

    Args:
        things, stuff: numbers of classes, of instances and of pixels; None: not known.
        ignore: the label of pixels that do not count.
        files: look at the headers of image files, as Detectron2's own mapper reads them.
    """

    def __init__(
        self,
        things: int | None = None,
        stuff: int | None = None,
        ignore: int = 255,
        files: bool = False,
    ):
        self.things, self.stuff, self.ignore, self.files = things, stuff, ignore, files

    @classmethod
    def of(cls, names: Sequence[str], mapper: Any, check_files: bool = True) -> SampleCheck:
        """For registered datasets, by their metadata."""
        metas = [MetadataCatalog.get(name) for name in names]

        def most(key: str) -> int | None:
            sizes = [len(meta.get(key, None) or ()) for meta in metas]
            return max(sizes, default=0) if all(sizes) else None

        ignored = metas[0].get("ignore_label", 255) if metas else 255
        own = isinstance(mapper, DatasetMapper) and type(mapper).__call__
        stock = own is DatasetMapper.__call__
        return cls(most("thing_classes"), most("stuff_classes"), ignored, stock and check_files)

    def record(self, record: dict) -> str:
        """Before the mapper. Returns what is odd about the image, or ""."""
        sides = [record.get(key, 0) for key in ("width", "height")]
        reach = REACH * (max(sides) if all(map(_positive, sides)) else SIDE)
        for i, annotation in enumerate(record.get("annotations") or ()):
            if isinstance(annotation, dict):
                for field, value, need in self._annotation(annotation, record, reach):
                    raise ValueError(
                        f"annotation {i}: {field}: found {found(value)}, but it must {need}"
                    )
        return self._files(record) if self.files else ""

    def _annotation(self, annotation: dict, record: dict, reach: float) -> Iterable[tuple]:
        """(field, value, what it must be) of what is bad."""
        finite = f"be finite numbers, at most {reach:.0f} away (pixels)"
        box = annotation.get("bbox")
        if box is not None:
            if not _within(box, reach):
                yield "bbox", box, finite
            elif len(box) == 4:
                x, y, w, h = box
                if annotation.get("bbox_mode") in (BoxMode.XYXY_ABS, BoxMode.XYXY_REL):
                    w, h = w - x, h - y
                if w < 0 or h < 0:
                    yield "bbox", box, "not have a negative width or height"
        category: Any = annotation.get("category_id")
        if is_int(category) and self.things and not 0 <= category < self.things:
            yield "category_id", category, f"be from 0 to {self.things - 1}, by thing_classes"
        mask = annotation.get("segmentation")
        if isinstance(mask, dict):
            size = mask.get("size", ())
            wanted = [record.get("height"), record.get("width")]
            if len(size) != 2 or (None not in wanted and list(size) != wanted):
                yield "segmentation", mask, f"have the image's size {wanted}"
            elif rle_pixels(mask.get("counts")) != size[0] * size[1]:
                yield "segmentation", mask, "have counts that cover the image"
        elif isinstance(mask, (list, tuple)):
            for polygon in mask:
                if not _within(polygon, reach):
                    yield "segmentation", polygon, finite
                elif len(polygon) % 2 or len(polygon) < 6:
                    yield "segmentation", polygon, "be at least three points, x and y of each"
        points = annotation.get("keypoints")
        if points is not None and not _within(points, reach):
            yield "keypoints", points, finite

    def _files(self, record: dict) -> str:
        size, spoils, odd = image_faults(record["file_name"])
        if spoils:
            raise ValueError(spoils)
        label = record.get("sem_seg_file_name")
        if label:
            label_size, spoils, _ = image_faults(label, label=True)
            if not spoils and label_size not in (size, image_size(record["file_name"])):
                spoils = (
                    f"{label_size[0]} x {label_size[1]}, but the image is {size[0]} x {size[1]}"
                )
            if spoils:
                raise ValueError(f"'{label}': {spoils}")
        return odd

    def sample(self, sample: Any, record: dict) -> None:
        """After the mapper, whoever's it is: what has the names that Detectron2's models read."""
        if not isinstance(sample, dict):
            return
        image = sample.get("image")
        sides = image.shape[-2:] if isinstance(image, torch.Tensor) and image.ndim >= 2 else ()
        instances = sample.get("instances")
        reach = REACH * max(sides or getattr(instances, "image_size", None) or (SIDE,))
        for field, value in getattr(instances, "_fields", {}).items():
            if field == "gt_classes" and self.things and isinstance(value, torch.Tensor):
                if len(value) and int(value.max()) >= self.things:
                    raise ValueError(
                        f"gt_classes: found {int(value.max())}, but it must be below "
                        f"{self.things}, the number of thing_classes"
                    )
            elif field in ("gt_boxes", "gt_keypoints"):
                _require_within(field, value.tensor, reach)
            elif field == "gt_masks" and isinstance(value, PolygonMasks):
                polygons = [polygon for masks in value.polygons for polygon in masks]
                if polygons:
                    _require_within(field, torch.from_numpy(np.concatenate(polygons)), reach)
        self._labels(sample.get("sem_seg"), tuple(sides), record)

    def _labels(self, labels: Any, sides: tuple, record: dict) -> None:
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.ndim != 2:
            return
        name = record.get("sem_seg_file_name", "sem_seg")
        if sides and tuple(labels.shape) != sides:
            raise ValueError(f"'{name}': labels {tuple(labels.shape)} for an image of {sides}")
        if self.stuff and len(labels):
            bad = (labels >= self.stuff) | (labels < 0)
            bad &= labels != self.ignore
            if bad.any():
                raise ValueError(
                    f"'{name}': found label {int(labels[bad][0])}, but it must be below "
                    f"{self.stuff}, the number of stuff_classes, or {self.ignore}, which is ignored"
                )


def _positive(value: Any) -> bool:
    number = isinstance(value, (int, float, np.integer, np.floating))
    return bool(number and 0 < value < math.inf)


def _within(values: Any, reach: float) -> bool:
    """Whether all of them are numbers within `reach`; nested lists too."""
    try:
        if isinstance(values, (list, tuple)):
            # Quicker than numpy for so few.
            return all(-reach <= v <= reach for v in values)
        array = np.asarray(values, np.float64)
        return bool(array.size == 0 or np.abs(array).max() <= reach)
    except (TypeError, ValueError):
        return False


def _require_within(field: str, values: torch.Tensor, reach: float) -> None:
    values = values.detach()
    far = ~(values.abs() <= reach)  # also NaN
    if values.numel() and bool(far.any()):
        raise ValueError(
            f"{field}: found {float(values[far][0]):g} in the mapped sample, but it must be finite "
            f"and within {reach:.0f} pixels"
        )
