"""The bundled dataset: real handwritten digits on real texture, in COCO's formats.

The digits are scikit-learn's `load_digits` (UCI, 1,797 samples of 8x8), the texture its two sample
photographs. Train and val share neither: val has the last 360 digits and the right quarter of each
photograph. Made on first use, deterministic, under $DETECTRON2_DATASETS (or ./datasets). Three
forms, for train and val:

    digits_train            instances (boxes and polygons) of 10 things
    digits_train_sem_seg    12 classes: the digits, then the two photographs
    digits_train_panoptic   10 things and 2 stuff classes, "separated" as Detectron2's Panoptic FPN
                            wants it: its semantic head has one class for all things
"""

from __future__ import annotations
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, load_sem_seg
from detectron2.data.datasets.coco_panoptic import merge_to_panoptic
from iopath.common.file_io import file_lock
from PIL import Image
from portalocker import LockException

VERSION = "v2"  # of what the folder holds: a new one for every change below
SIZE = 96
CLASSES = [str(digit) for digit in range(10)]
COLORS = [
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189),
    (140, 86, 75), (227, 119, 194), (188, 189, 34), (23, 190, 207), (255, 221, 0),
]  # fmt: skip
GROUNDS = ["temple", "flower"]  # what the two photographs show; COCO category ids 11 and 12
SPLITS = {"train": 2000, "val": 300}
TRAIN_DIGITS = 1437
MIN_VISIBLE = 0.5  # of a digit's pixels, else a later one is not pasted over it


class Sources(NamedTuple):
    """What images are made of."""

    photos: Sequence[np.ndarray]  # (height, width, 3), uint8
    samples: Sequence[tuple[np.ndarray, int]]  # a glyph, uint8 with ink at 255, and its digit


def root() -> str:
    datasets = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    return os.path.join(datasets, f"digits_{VERSION}")


def register(
    name: str = "digits",
    splits: Iterable[str] = SPLITS,
    folder: Callable[[], str] = root,
    make_folder: Callable[[str], None] | None = None,
    grounds: Sequence[str] = GROUNDS,
) -> None:
    """Register `NAME_{train,val}` and their `_sem_seg` and `_panoptic` forms.

    Args:
        folder, make_folder: where the files are, and what writes them if they are not there.
        grounds: what each of the photographs shows.
    """
    things = {i + 1: i for i in range(len(CLASSES))}  # COCO category id -> index
    ground_colors = [
        (40 + 50 * i % 200, 60 + 50 * i % 190, 90 - 20 * i % 90) for i, _ in enumerate(grounds)
    ]
    stuff = {0: 0, **{11 + i: 1 + i for i in range(len(grounds))}}
    for split in splits:

        def path(kind: str, split: str = split) -> str:
            return os.path.join(folder(), kind.format(split))

        instances: dict[str, Any] = {
            "json_file": path("annotations/instances_{}.json"),
            "image_root": path("{}"),
            "thing_classes": CLASSES,
            "thing_colors": COLORS,
            "thing_dataset_id_to_contiguous_id": things,
        }
        forms: dict[str, dict[str, Any]] = {
            "": {"evaluator_type": "coco", **instances},
            "_sem_seg": {
                "evaluator_type": "sem_seg",
                "image_root": path("{}"),
                "sem_seg_root": path("sem_seg_{}"),
                "stuff_classes": [*CLASSES, *grounds],
                "stuff_colors": COLORS + ground_colors,
                "ignore_label": 255,
            },
            "_panoptic": {
                "evaluator_type": "coco_panoptic_seg",
                **instances,
                "sem_seg_root": path("panoptic_stuff_{}"),
                "panoptic_root": path("panoptic_{}"),
                "panoptic_json": path("annotations/panoptic_{}.json"),
                "stuff_classes": ["things", *grounds],
                "stuff_colors": [(200, 200, 200), *ground_colors],
                "stuff_dataset_id_to_contiguous_id": stuff,
                "ignore_label": 255,
            },
        }
        for form, metadata in forms.items():
            full = f"{name}_{split}{form}"
            DatasetCatalog.register(
                full, lambda m=metadata: _load(m, folder(), make_folder or make)
            )
            MetadataCatalog.get(full).set(made_on_first_use=True, **metadata)


def _load(metadata: dict, folder: str, make_folder: Callable[[str], None]) -> list[dict]:
    make_folder(folder)
    dicts = []
    if "json_file" in metadata:
        dicts = load_coco_json(metadata["json_file"], metadata["image_root"])
        for instance in (a for d in dicts for a in d["annotations"]):
            instance["category_id"] = metadata["thing_dataset_id_to_contiguous_id"][
                instance["category_id"]
            ]
    if "sem_seg_root" in metadata:
        masks = load_sem_seg(metadata["sem_seg_root"], metadata["image_root"], "png", "png")
        dicts = merge_to_panoptic(dicts, masks) if dicts else masks
    return dicts


def make(folder: str, splits: dict[str, int] = SPLITS) -> None:
    """Make the dataset in `folder` unless it is there, as `make_whole`.

    Args:
        splits: split -> number of images.

    Raises:
        OSError: the folder cannot be written.
        ImportError: scikit-learn is missing.
    """

    def fill(folder: str) -> None:
        for split, num_images in splits.items():
            train = split == "train"
            rng = np.random.default_rng(0 if train else 1)
            write_split(folder, split, num_images, sources(train), rng, GROUNDS)

    make_whole(folder, fill)


def make_whole(folder: str, fill: Callable[[str], None]) -> None:
    """Make `folder` unless it is there. All of it appears at once, by a rename, so an interrupted
    or parallel first use leaves no half of it.

    Args:
        fill: writes what belongs there into the folder that it is given.

    Raises:
        OSError: the folder cannot be written.
    """
    if os.path.isdir(folder):
        return
    folder = os.path.abspath(folder)
    try:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        with file_lock(folder):  # one of several workers makes it, the others wait
            if os.path.isdir(folder):
                return
            temporary = tempfile.mkdtemp(prefix=folder + ".making-")
            try:
                fill(temporary)
                os.chmod(temporary, 0o755)
                os.rename(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, LockException) as error:
        raise OSError(
            f"The digits dataset cannot be made in '{folder}': {error}. Set the environment "
            "variable DETECTRON2_DATASETS to a folder that can be written."
        ) from error


def sources(train: bool) -> Sources:
    """What the images of a split are made of."""
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    half = slice(0, TRAIN_DIGITS) if train else slice(TRAIN_DIGITS, None)
    glyphs = np.pad(digits.images[half] * (255 / 16), ((0, 0), (1, 1), (1, 1))).astype(np.uint8)
    samples = list(zip(glyphs, digits.target[half].tolist(), strict=True))
    photos = load_sample_images().images
    cuts = [photo.shape[1] * 3 // 4 for photo in photos]
    photos = [p[:, :c] if train else p[:, c:] for p, c in zip(photos, cuts, strict=True)]
    return Sources(photos, samples)


def write_split(
    folder: str,
    split: str,
    num_images: int,
    sources: Sources,
    rng: np.random.Generator,
    grounds: Sequence[str],
    size: int = SIZE,
) -> None:
    """Draw a split's images, and write them and their labels in COCO's formats.

    Args:
        grounds: what each of the photographs shows.
        size: of an image, in pixels.
    """
    for kind in ("{}", "sem_seg_{}", "panoptic_stuff_{}", "panoptic_{}"):
        os.makedirs(os.path.join(folder, kind.format(split)))
    os.makedirs(os.path.join(folder, "annotations"), exist_ok=True)
    images: list[dict] = []
    annotations: list[dict] = []
    panoptic: list[dict] = []
    for image_id in range(1, num_images + 1):
        picture, ground, digits_in_it = draw(rng, sources, size)
        file_name = f"{image_id:06d}.png"

        def save(kind: str, pixels: np.ndarray, file_name: str = file_name) -> None:
            path = os.path.join(folder, kind.format(split), file_name)
            Image.fromarray(pixels).save(path, compress_level=1)

        save("{}", picture)
        sem_seg, stuff, segment = (
            np.full((size, size), value, np.uint8)
            for value in (len(CLASSES) + ground, 1 + ground, 0)
        )
        segments = [{"category_id": len(CLASSES) + ground + 1}]
        for label, mask in digits_in_it:
            sem_seg[mask], stuff[mask], segment[mask] = label, 0, len(segments)
            segments.append({"category_id": label + 1})
        save("sem_seg_{}", sem_seg)
        save("panoptic_stuff_{}", stuff)
        # COCO's panoptic PNG: the id of a segment, 0 being void, is R + 256 G + 256^2 B.
        save("panoptic_{}", np.stack([segment + 1, 0 * segment, 0 * segment], 2))
        for i, entry in enumerate(segments):
            entry.update(id=i + 1, iscrowd=0, area=int((segment == i).sum()))
        panoptic.append({"image_id": image_id, "file_name": file_name, "segments_info": segments})
        images.append({"id": image_id, "file_name": file_name, "width": size, "height": size})
        for label, mask in digits_in_it:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label + 1,
                    "iscrowd": 0,
                    **outline(mask),
                }
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    stuff_kinds = [{"id": 11 + i, "name": name, "isthing": 0} for i, name in enumerate(grounds)]
    info = {"description": "handwritten digits (UCI, CC BY 4.0) on scikit-learn's photographs"}
    for kind, labels, classes in (
        ("instances", annotations, categories),
        ("panoptic", panoptic, [{**c, "isthing": 1} for c in categories] + stuff_kinds),
    ):
        content = {"info": info, "images": images, "annotations": labels, "categories": classes}
        with open(os.path.join(folder, "annotations", f"{kind}_{split}.json"), "w") as f:
            f.write(json.dumps(content))


def draw(
    rng: np.random.Generator, sources: Sources, size: int = SIZE
) -> tuple[np.ndarray, int, list[tuple[int, np.ndarray]]]:
    """One picture (size, size, 3) uint8, which photograph it is on, and its digits [(label, visible
    mask)]."""
    photos, samples = sources
    which = int(rng.integers(len(photos)))
    photo = photos[which]
    crop = int(rng.integers(size // 2, min(photo.shape[:2]) + 1))
    y, x = (int(rng.integers(0, length - crop + 1)) for length in photo.shape[:2])
    cut = np.ascontiguousarray(photo[y : y + crop, x : x + crop])  # else Pillow is slow to copy it
    ground = Image.fromarray(cut)
    pixels = np.asarray(ground.resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32)
    picture: np.ndarray = pixels * rng.uniform(0.5, 1.0)

    found: list[tuple[int, np.ndarray]] = []
    areas: list[int] = []
    for _ in range(int(rng.integers(2, 8))):
        glyph, label = samples[int(rng.integers(len(samples)))]
        # A sixth to a half of the picture, with a margin of 1/10 on each side.
        side = int(rng.integers(size // 6, size // 2 + 1))
        top, left = rng.integers(0, size - side + 1, 2)
        window = slice(top, top + side), slice(left, left + side)
        resized = Image.fromarray(glyph).resize((side, side), Image.Resampling.BICUBIC)
        ink = np.asarray(resized, dtype=np.float32) / 255
        mask = np.zeros((size, size), bool)
        mask[window] = ink > 0.5
        visible = [m & ~mask for _, m in found]
        hides = any(v.sum() < MIN_VISIBLE * a for v, a in zip(visible, areas, strict=True))
        if hides or not mask.any():
            continue
        found = [(seen, v) for (seen, _), v in zip(found, visible, strict=True)]
        found.append((label, mask))
        areas.append(int(mask.sum()))
        # A colour away from the ground's, so that a digit can be told from it.
        mean = picture[mask].mean(0)
        colour = rng.uniform(0, 255, 3)
        colour = np.where(np.abs(colour - mean) < 70, (mean + 128) % 256, colour)
        inked = picture[window] * (1 - ink[..., None]) + colour * ink[..., None]
        picture = picture.astype(inked.dtype, copy=False)  # float64 from the first digit on
        picture[window] = inked
    picture = picture + rng.normal(0, 4, picture.shape)
    return picture.round().clip(0, 255).astype(np.uint8), which, found


def outline(mask: np.ndarray) -> dict:
    """COCO's `segmentation` (outer polygons), `area` and `bbox` of a boolean mask."""
    from contourpy import FillType, contour_generator

    padded = np.pad(mask, 1).astype(np.float64)
    centers = np.arange(-1, len(mask) + 1) + 0.5  # pixel i covers [i, i + 1]
    contours = contour_generator(centers, centers, padded, fill_type=FillType.OuterOffset)
    polygons = [
        _corners(points[offsets[0] : offsets[1] - 1])
        for points, offsets in zip(*contours.filled(0.5, 2.0), strict=True)
    ]
    corners = np.concatenate(polygons)
    (x0, y0), (x1, y1) = corners.min(0), corners.max(0)
    return {
        "segmentation": [p.round(2).ravel().tolist() for p in polygons],
        "area": float(mask.sum()),
        "bbox": [round(float(v), 2) for v in (x0, y0, x1 - x0, y1 - y0)],
    }


def _corners(polygon: np.ndarray) -> np.ndarray:
    """The polygon without the points between two others on a line."""
    (bx, by), (ax, ay) = (polygon - np.roll(polygon, 1, 0)).T, (np.roll(polygon, -1, 0) - polygon).T
    return polygon[bx * ay != by * ax]
