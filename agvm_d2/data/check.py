"""Datasets looked at before training, one pass over the annotations.

    python -m agvm_d2.data.check NAME...

says what is wrong with datasets that are registered in Detectron2's catalog, one line for each kind
of fault: the file, the first record, what was found, and how many more there are. The exit code is
1 if something would spoil training.

A COCO or LVIS JSON file is looked at as it is; of a dataset whose function returns dicts, the dicts
are. Of images and label files the names are all checked, and a few are opened. What a JSON file
gave is kept under `cache_folder()` until the file, or a folder of its images, changes.
"""

from __future__ import annotations
import argparse
import contextlib
import dataclasses
import gc
import hashlib
import itertools
import json
import os
import random
import reprlib
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import file_lock
from PIL import Image

from ..validate import is_int

REACH = 10  # coordinates up to so many times an image's longer side; C code dies of more
SIDE = 10_000  # of an image whose size is not known
RARE = 0.01  # COCO itself has a few boxes without area: a fault of more than this share is no slip
SAMPLE = 16  # image and label files that are opened
# What a fault does: it spoils training; it does unless bad images are skipped; it does if it is not
# rare; it does not.
ERROR, IMAGE, SLIP, WARNING = "error", "image", "slip", "warning"
COCO_LIKE = (None, "coco", "lvis", "coco_panoptic_seg")  # evaluator_type
DEEP = ("I", "F")  # modes of more than 8 bits begin so; Detectron2 cuts them off at 255

short = reprlib.Repr()
short.maxstring = short.maxother = 60
found = short.repr


@dataclasses.dataclass
class Fault:
    level: str
    text: str
    count: int = 1
    of: int = 0  # records looked at

    def spoils(self, skip_images: bool) -> bool:
        if self.level == SLIP:
            return self.count > RARE * self.of
        return self.level == ERROR or (self.level == IMAGE and not skip_images)

    def __str__(self) -> str:
        return self.text + (f" (and {self.count - 1:,} more)" if self.count > 1 else "")


@dataclasses.dataclass
class Report:
    """What `check` found; `facts` is what a config can be compared with."""

    faults: list[Fault] = dataclasses.field(default_factory=list)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def errors(self, skip_images: bool = False) -> list[str]:
        return [str(f) for f in self.faults if f.spoils(skip_images)]

    def warnings(self, skip_images: bool = False) -> list[str]:
        return [str(f) for f in self.faults if not f.spoils(skip_images)]


class DatasetError(ValueError):
    """A dataset that would spoil training; one line for each kind of fault."""


class _Findings:
    """Collects a file's faults, one for each kind."""

    def __init__(self, file: str):
        self.file = file
        self.faults: dict[str, Fault] = {}

    def add(
        self, level: str, kind: str, where: str, what: str, count: int = 1, of: int = 0
    ) -> None:
        if kind in self.faults:
            self.faults[kind].count += count
        else:
            place = f"{where}: " if where else ""
            self.faults[kind] = Fault(level, f"{self.file}: {place}{what}", count, of)

    def add_where(
        self,
        bad: np.ndarray | Sequence[bool],
        level: str,
        field: str,
        need: str,
        where: Callable[[int], str],
        value: Callable[[int], Any],
    ) -> np.ndarray:
        """A fault of each record whose entry in `bad` is set; returns `bad` as an array."""
        bad = np.asarray(bad, bool)
        places = np.flatnonzero(bad)
        if len(places):
            first = int(places[0])
            what = f"{field}: found {found(value(first))}, but it must {need}"
            self.add(level, f"{field} {need}", where(first), what, len(places), len(bad))
        return bad

    def add_twice(
        self, values: Sequence[Any], level: str, what: Callable[[Any], str], where: str = ""
    ) -> None:
        twice = [(v, n) for v, n in Counter(values).items() if n > 1]
        if twice:
            text = what(twice[0][0])
            self.add(level, f"twice {where} {text.split(' ')[0]}", where, text, len(twice))


def _id_ok(value: Any) -> bool:
    return is_int(value) or (isinstance(value, str) and value != "")


# Images


@dataclasses.dataclass
class _Images:
    records: list[dict]
    root: str | None  # None: names are paths
    names: list[str]  # paths; "" where there is none
    sizes: np.ndarray  # (images, 2): width and height, NaN where not known
    where: Callable[[int], str]


def _sizes(findings: _Findings, records: list[dict], where: Callable, needed: bool) -> np.ndarray:
    sizes = np.full((len(records), 2), np.nan)
    for column, key in enumerate(("width", "height")):
        values: list[Any] = [record.get(key) for record in records]
        good = np.array([is_int(v) and v > 0 for v in values], bool)
        given = np.array([key in r for r in records], bool)
        # numpy's whole numbers too, which dataset functions give
        for i in np.flatnonzero(~good & given):
            good[i] = isinstance(values[i], np.integer) and values[i] > 0
        wrong = ~good & (given | needed)
        need = "be a whole number from 1 on"
        shown = [v if g else "none" for v, g in zip(values, given, strict=True)]
        findings.add_where(wrong, ERROR, key, need, where, shown.__getitem__)
        sizes[good, column] = [values[i] for i in np.flatnonzero(good)]
    return sizes


def _folders(paths: Iterable[str]) -> dict[str, list[str]]:
    """Folder -> names in it that `paths` want; remote ones are left out."""
    wanted: dict[str, list[str]] = {}
    for path in paths:
        if path and "://" not in path:
            folder, name = os.path.split(path)
            wanted.setdefault(folder, []).append(name)
    return wanted


def _check_files(
    findings: _Findings, field: str, paths: list[str], where: Callable[[int], str]
) -> list[str]:
    """All are there: one listing a folder, which is cheaper than a look at each file. Returns the
    folders."""
    folders = _folders(paths)
    there: dict[str, set[str]] = {}
    for folder in folders:
        try:
            there[folder] = set(os.listdir(folder or "."))
        except OSError:
            there[folder] = set()

    def missing(path: str) -> bool:
        folder, name = os.path.split(path)
        return bool(path) and folder in there and name not in there[folder]

    findings.add_where(
        [missing(path) for path in paths], IMAGE, field, "be a file that is there", where,
        lambda i: paths[i],
    )  # fmt: skip
    return list(folders)


def _sample(paths: Sequence[Any]) -> list[int]:
    return sorted(random.Random(0).sample(range(len(paths)), min(SAMPLE, len(paths))))


def image_faults(path: str, label: bool = False) -> tuple[tuple[int, int], str, str]:
    """(width, height) as stored, then what spoils the image when Detectron2 reads it, and what
    merely looks odd, from the file's header; "" for nothing.

    Args:
        label: a semantic label file, one class index a pixel.

    Raises:
        OSError: it cannot be read.
    """
    with PathManager.open(path, "rb") as file, Image.open(file) as image:
        size, mode = image.size, image.mode
        # A phone's MPO has a small copy or a second view behind the picture.
        animated = getattr(image, "is_animated", False) and image.format != "MPO"
        if label:
            spoils = f"mode {mode}, but labels must be 8-bit grey (L)" if mode != "L" else ""
            return size, spoils, ""
        if mode.startswith(DEEP):
            return size, f"mode {mode}: more than 8 bits a pixel, which reading cuts off", ""
        odd = "several frames, of which the first is taken" if animated else ""
        if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            odd = odd or f"mode {mode} with transparency, which is left out"
        elif mode not in ("RGB", "L", "P", "1"):
            odd = odd or f"mode {mode}, whose colours may come out wrong"
    return size, "", odd


def image_size(path: str) -> tuple[int, int]:
    """(width, height) as Detectron2 reads it: turned by EXIF."""
    with PathManager.open(path, "rb") as file, Image.open(file) as image:
        turned = False
        with contextlib.suppress(Exception):  # a broken EXIF: Detectron2 leaves it out
            turned = image.getexif().get(0x0112, 1) >= 5
        return image.size[::-1] if turned else image.size


def _check_sampled(findings: _Findings, images: _Images) -> None:
    for i in _sample(images.names):
        path = images.names[i]
        if not path or "://" in path or not os.path.exists(path):
            continue
        try:
            (_, spoils, odd), size = image_faults(path), image_size(path)
        except Exception as error:  # Pillow's plugins raise what they like
            findings.add(IMAGE, "unreadable", images.where(i), f"'{path}' cannot be read: {error}")
            continue
        given = images.sizes[i]
        if not np.isnan(given).any() and tuple(given) != size:
            text = f"width and height: found {given[0]:.0f} x {given[1]:.0f}, but the file "
            findings.add(
                IMAGE, "size", images.where(i), text + f"'{path}' is {size[0]} x {size[1]}"
            )
        if spoils:
            findings.add(IMAGE, "mode", images.where(i), f"'{path}': {spoils}")
        if odd:
            findings.add(WARNING, "odd mode", images.where(i), f"'{path}': {odd}")


def _check_labels(
    findings: _Findings, pairs: list[tuple[str, str]], classes: int | None, ignore: int
) -> None:
    """Semantic label files.

    Args:
        pairs: (image file, label file).
    """
    stems = [[os.path.splitext(os.path.basename(p))[0] for p in pair] for pair in pairs]
    same = [image == label for image, label in stems]
    if any(same):  # else the names have another scheme
        findings.add_where(
            ~np.array(same), ERROR, "sem_seg_file_name", "be named as its image is",
            lambda i: f"'{pairs[i][0]}'", lambda i: pairs[i][1],
        )  # fmt: skip
    for i in _sample(pairs):
        path, label = pairs[i]
        if not (os.path.exists(path) and os.path.exists(label)):
            continue
        try:
            size, spoils, _ = image_faults(label, label=True)
            wanted = image_size(path)
            with Image.open(label) as file:
                values = np.unique(np.asarray(file))
        except Exception as error:
            what = f"'{label}' or its image cannot be read: {error}"
            findings.add(IMAGE, "unreadable label", "", what)
            continue
        if spoils:
            findings.add(ERROR, "label mode", "", f"'{label}': {spoils}")
            continue
        if size != wanted:
            what = f"'{label}': {size[0]} x {size[1]}, but its image '{path}' is "
            findings.add(IMAGE, "label size", "", what + f"{wanted[0]} x {wanted[1]}")
        beyond = values[(values >= classes) & (values != ignore)] if classes else values[:0]
        if len(beyond):
            what = f"'{label}': label {beyond[0]}, but it must be below {classes}, the number of "
            findings.add(IMAGE, "label value", "", f"{what}classes, or {ignore}, which is ignored")


# Annotations


def rle_pixels(counts: Any) -> int:
    """Pixels that a run-length code covers, COCO's compressed one or a list; -1 if it is none.

    >>> rle_pixels([5, 4]), rle_pixels(b"54")
    (9, 9)
    """
    if isinstance(counts, list):
        return sum(counts) if all(is_int(c) and c >= 0 for c in counts) else -1
    if isinstance(counts, str):
        counts = counts.encode("ascii", "replace")
    if not isinstance(counts, bytes) or not counts:
        return -1
    code = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((code & 0x20) == 0)
    if code.min() < 0 or code.max() > 63 or len(ends) == 0 or ends[-1] != len(code) - 1:
        return -1
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 6:  # more than 30 bits
        return -1
    shift = 5 * (np.arange(len(code)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((code & 0x1F) << shift, starts)
    runs -= np.where(code[ends] & 0x10, 1 << (5 * lengths), 0)
    for start in (1, 2):  # from the fourth on each is the difference to the last but one
        runs[start::2] = np.cumsum(runs[start::2])
    return int(runs.sum()) if runs.min() >= 0 else -1


def _numbers(rows: list[Any], width: int) -> tuple[np.ndarray, np.ndarray]:
    """`rows` as floats (n, width), and which of them are so; the others are NaN."""
    with contextlib.suppress(ValueError, TypeError):
        array = np.array(rows)
        if array.shape == (len(rows), width) and array.dtype.kind in "iuf":
            return array.astype(np.float64), np.ones(len(rows), bool)
    array = np.full((len(rows), width), np.nan)
    good = np.zeros(len(rows), bool)
    for i, row in enumerate(rows):
        with contextlib.suppress(ValueError, TypeError):
            numbers = np.asarray(row)
            if numbers.shape == (width,) and numbers.dtype.kind in "iuf":
                array[i], good[i] = numbers, True
    return array, good


@dataclasses.dataclass
class _Annotations:
    records: list[dict]
    image: np.ndarray  # index of its image
    sizes: np.ndarray  # (n, 2) of its image
    where: Callable[[int], str]
    crowd: np.ndarray

    def column(self, key: str) -> list[Any]:
        return [record.get(key) for record in self.records]

    @property
    def reach(self) -> np.ndarray:
        side = np.where(np.isnan(self.sizes), SIDE, self.sizes)
        return REACH * side.max(1, initial=1)


def _check_boxes(findings: _Findings, anns: _Annotations, boxes: list[Any], modes: list) -> None:
    """`boxes` of four numbers, in the given modes; rotated ones, of five, only for being finite."""
    five = np.array([getattr(b, "__len__", int)() == 5 for b in boxes], bool)
    five &= np.array([m == BoxMode.XYWHA_ABS for m in modes], bool)
    array, good = _numbers([b[:4] if f else b for b, f in zip(boxes, five, strict=True)], 4)

    def fault(bad: np.ndarray, level: str, need: str) -> np.ndarray:
        return findings.add_where(bad, level, "bbox", need, anns.where, lambda i: boxes[i])

    rest = ~fault(~good, ERROR, "be four numbers")
    rest &= ~fault(rest & ~np.isfinite(array).all(1), IMAGE, "be finite")
    far = np.abs(np.nan_to_num(array)).max(1, initial=0) > anns.reach
    rest &= ~fault(rest & far, IMAGE, f"lie within {REACH} times the image's side")
    relative = np.array([m in (BoxMode.XYXY_REL, BoxMode.XYWH_REL) for m in modes], bool)
    rest &= ~five & ~relative
    corners = np.array([m == BoxMode.XYXY_ABS for m in modes], bool)[:, None]
    low = array[:, :2]
    high = np.where(corners, array[:, 2:], low + array[:, 2:])
    extent = high - low
    rest &= ~fault(rest & (extent < 0).any(1), IMAGE, "not have a negative width or height")
    rest &= ~fault(rest & (extent == 0).any(1), SLIP, "have an area; training leaves it out")
    known = ~np.isnan(anns.sizes).any(1)
    outside = rest & known & ((high <= 0) | (low >= anns.sizes)).any(1)
    rest &= ~fault(outside, SLIP, "lie in the image; training leaves it out")
    over = rest & known & ((low < -2) | (high > anns.sizes + 2)).any(1)
    if over.any():
        fault(over, WARNING, "not stick out of the image; training cuts it off there")


def _check_masks(findings: _Findings, anns: _Annotations, masks: list[Any], dropped: str) -> None:
    """`segmentation`: polygons, or run-length codes.

    Args:
        dropped: how bad a polygon of too few points is.
    """
    kinds = [type(mask) for mask in masks]
    is_list = np.array([k is list or k is tuple for k in kinds], bool)
    is_code = np.array([k is dict for k in kinds], bool)
    odd = ~is_list & ~is_code & np.array([m is not None for m in masks], bool)

    def fault(bad: np.ndarray, level: str, need: str) -> np.ndarray:
        return findings.add_where(bad, level, "segmentation", need, anns.where, lambda i: masks[i])

    fault(odd, ERROR, "be a list of polygons, or a run-length code {size, counts}")
    owners, polygons, flat = [], [], np.zeros(len(masks), bool)
    for i in np.flatnonzero(is_list):
        for polygon in masks[i]:
            if isinstance(polygon, (list, tuple, np.ndarray)):
                owners.append(i)
                polygons.append(polygon)
            else:
                flat[i] = True
    fault(flat, ERROR, "be a list of polygons, each a list of numbers")
    if polygons:
        _check_polygons(findings, anns, np.array(owners), polygons, dropped)
    codes = np.flatnonzero(is_code)
    shape = np.zeros(len(masks), bool)
    for i in codes:
        size = masks[i].get("size")
        known = not np.isnan(anns.sizes[i]).any()
        shape[i] = "counts" not in masks[i] or not (
            isinstance(size, (list, tuple))
            and len(size) == 2
            and (not known or tuple(size) == (anns.sizes[i, 1], anns.sizes[i, 0]))
        )
    fault(shape, IMAGE, "have counts, and a size of the image's (height, width)")
    wrong = np.zeros(len(masks), bool)
    for i in codes[:1000]:  # the rest when they are read
        if not shape[i]:
            height, width = masks[i]["size"]
            wrong[i] = rle_pixels(masks[i]["counts"]) != height * width
    fault(wrong, IMAGE, "have counts that cover the image")


def _check_polygons(
    findings: _Findings, anns: _Annotations, owners: np.ndarray, polygons: list, dropped: str
) -> None:
    lengths = np.array([len(p) for p in polygons])

    def fault(bad: np.ndarray, level: str, need: str, of: np.ndarray | None = None) -> None:
        index = np.arange(len(bad)) if of is None else of
        findings.add_where(
            bad, level, "segmentation", need,
            lambda i: anns.where(int(owners[index[i]])), lambda i: polygons[index[i]],
        )  # fmt: skip

    fault(lengths % 2 == 1, dropped, "have an even number of coordinates in a polygon")
    fault((lengths < 6) & (lengths % 2 == 0), dropped, "have at least 3 points in a polygon")
    filled = np.flatnonzero(lengths)
    if not len(filled):
        return
    try:
        values = np.fromiter(itertools.chain.from_iterable(polygons), np.float64, lengths.sum())
        good = np.ones(len(filled), bool)
    except (ValueError, TypeError):  # some are not numbers
        good = np.array([_numbers([polygons[i]], lengths[i])[1][0] for i in filled])
        fault(~good, ERROR, "have numbers in a polygon", filled)
        filled = filled[good]
        if not len(filled):
            return
        parts = [np.asarray(polygons[i], np.float64) for i in filled]
        values = np.concatenate(parts)
    starts = np.concatenate([[0], np.cumsum(lengths[filled])[:-1]])
    most = np.maximum.reduceat(np.abs(values), starts)  # NaN if there is one
    bad = ~np.isfinite(most)
    fault(bad, IMAGE, "have finite coordinates", filled)
    far = ~bad & (most > anns.reach[owners[filled]])
    fault(far, IMAGE, f"lie within {REACH} times the image's side", filled)


def _check_keypoints(
    findings: _Findings, anns: _Annotations, values: list[Any], wanted: Sequence[int | None]
) -> list[int]:
    """Returns how many keypoints there are, each number once.

    Args:
        wanted: how many the category of each annotation has, None if that is not known.
    """
    given = np.array([v is not None and getattr(v, "__len__", int)() > 0 for v in values], bool)
    places = np.flatnonzero(given)
    arrays = {}
    for i in places:
        with contextlib.suppress(ValueError, TypeError):
            array = np.asarray(values[i])
            if array.size % 3 == 0 and array.dtype.kind in "iuf":
                arrays[i] = array.reshape(-1, 3)

    def fault(bad: Iterable[int], level: str, need: str) -> None:
        mask = np.zeros(len(values), bool)
        mask[list(bad)] = True
        findings.add_where(mask, level, "keypoints", need, anns.where, lambda i: values[i])

    fault((i for i in places if i not in arrays), ERROR, "be triples (x, y, visibility)")
    fault(
        (i for i, a in arrays.items() if wanted[i] is not None and len(a) != wanted[i]), ERROR,
        "be as many as its category has",
    )  # fmt: skip
    finite = {i: a for i, a in arrays.items() if np.isfinite(a).all()}
    fault((i for i in arrays if i not in finite), IMAGE, "be finite")
    fault(
        (i for i, a in finite.items() if not np.isin(a[:, 2], (0, 1, 2)).all()), ERROR,
        "have visibilities 0, 1 or 2",
    )  # fmt: skip
    reach = anns.reach
    fault(
        (i for i, a in finite.items() if np.abs(a[:, :2]).max(initial=0) > reach[i]), IMAGE,
        f"lie within {REACH} times the image's side",
    )  # fmt: skip
    return sorted({len(a) for a in arrays.values()})


def _check_annotations(
    findings: _Findings,
    anns: _Annotations,
    modes: list,
    keypoints: Sequence[int | None],
    dropped: str,
) -> dict[str, Any]:
    """The fields of annotations; the facts about them."""
    crowds = anns.column("iscrowd")
    findings.add_where(
        [c is not None and c not in (0, 1) for c in crowds], ERROR, "iscrowd", "be 0 or 1",
        anns.where, lambda i: crowds[i],
    )  # fmt: skip
    boxes, masks = anns.column("bbox"), anns.column("segmentation")
    _check_boxes(findings, anns, boxes, modes)
    _check_masks(findings, anns, masks, dropped)
    areas = anns.column("area")
    findings.add_where(
        [a is not None and not (_is_real(a) and 0 <= a < np.inf) for a in areas], ERROR, "area",
        "be a number from 0 on", anns.where, lambda i: areas[i],
    )  # fmt: skip
    points = anns.column("keypoints")
    numbers = _check_keypoints(findings, anns, points, keypoints)
    code = [isinstance(m, dict) for m in masks]
    plain = ~anns.crowd  # what training sees

    def count(values: Iterable[bool], among: np.ndarray) -> list:
        """How many, and where the first is."""
        places = np.flatnonzero(np.fromiter(values, bool, len(anns.records)) & among)
        return [len(places), anns.where(int(places[0])) if len(places) else ""]

    everything = np.ones(len(anns.records), bool)
    return {
        "annotations": len(anns.records),
        "not_crowd": int(plain.sum()),
        "without_mask": count((not m and not c for m, c in zip(masks, code, strict=True)), plain),
        "codes": count(code, plain),
        "any_without_mask": count(
            (not m and not c for m, c in zip(masks, code, strict=True)), everything
        ),
        "without_area": count((a is None for a in areas), everything),
        "without_iscrowd": count((c is None for c in crowds), everything),
        "without_keypoints": count((p is None for p in points), everything),
        "keypoints": numbers,
    }


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating))


# COCO's and LVIS's JSON


def load_json(path: str) -> dict:
    """
    Raises:
        DatasetError: not JSON in UTF-8, or no object at its top; names the file.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
        if content.startswith(b"\xef\xbb\xbf"):
            raise ValueError("it starts with a byte order mark: save it as UTF-8 without one")
        if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content[:4]:
            raise ValueError("it is UTF-16 or UTF-32, not UTF-8: save it as UTF-8")
        if content[:2] == b"\x1f\x8b":
            raise ValueError("it is compressed: unpack it")
        if not content.strip():
            raise ValueError("it is empty")
        data = json.loads(content)
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: it is not UTF-8: {error}") from None
    except json.JSONDecodeError as error:
        hint = " (it ends there: cut off?)" if error.pos >= len(error.doc.rstrip()) - 1 else ""
        raise DatasetError(f"{path}: it is not JSON: {error}{hint}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise DatasetError(f"{path}: {error}") from None
    if not isinstance(data, dict):
        raise DatasetError(
            f"{path}: found a {type(data).__name__} at the top, but it must be an object with "
            "images, annotations and categories"
        )
    return data


def _records(
    findings: _Findings, data: dict, key: str, what: str, optional: bool = False
) -> list[dict]:
    """The list `data[key]`, of dicts; what is none is left out and named."""
    if key not in data and optional:
        return []
    records = data.get(key)
    if not isinstance(records, list):
        kind = f"found {found(records)}" if key in data else "it is missing"
        findings.add(ERROR, key, "", f"{key}: {kind}, but it must be a list")
        return []
    if not records and not optional:
        findings.add(ERROR, key, "", f"{key}: found no {what}")
    good = [isinstance(r, dict) for r in records]
    findings.add_where(
        ~np.array(good, bool), ERROR, f"{key}[]", "be an object",
        lambda i: f"{what} number {i}", lambda i: records[i],
    )  # fmt: skip
    return records if all(good) else [r for r, ok in zip(records, good, strict=True) if ok]


def _ids(
    findings: _Findings, records: list[dict], what: str, key: str = "id", level: str = ERROR
) -> list[Any]:
    """Their ids; those that are none or there twice are named, and the former are None here."""
    values = [record.get(key) for record in records]
    good = [_id_ok(v) for v in values]
    findings.add_where(
        ~np.array(good, bool), ERROR, f"{what}'s {key}", "be a whole number or a name",
        lambda i: f"{what} number {i}", lambda i: values[i] if key in records[i] else "none",
    )  # fmt: skip
    if key == "id":
        known = [v for v, ok in zip(values, good, strict=True) if ok]
        findings.add_twice(known, level, lambda v: f"{what} id {v!r} is there twice")
    return [v if ok else None for v, ok in zip(values, good, strict=True)]


def _near(value: Any, known: dict) -> str:
    """A hint for an id of the other type."""
    other = str(value) if is_int(value) else value
    with contextlib.suppress(ValueError, TypeError):
        other = str(value) if is_int(value) else int(value)
    return f" (there is {other!r}, of another type)" if other in known and other != value else ""


def _file_names(
    findings: _Findings, images: list[dict], root: str, lvis: bool, outside: bool
) -> tuple[list[Any], list[str], Callable[[int], str]]:
    """Each image's id, and path, "" where it has none; and how an image is called."""
    ids = _ids(findings, images, "image")

    def where(i: int) -> str:
        return f"image {ids[i]!r}" if ids[i] is not None else f"image number {i}"

    names: list[Any] = [image.get("file_name") for image in images]
    if lvis:  # as Detectron2 reads LVIS: by the end of the address
        ends = [str(image.get("coco_url", "")).split("/")[-2:] for image in images]
        names = ["/".join(e) if len(e) == 2 else None for e in ends]
    field = "coco_url" if lvis else "file_name"
    good = [isinstance(n, str) and n.strip() != "" for n in names]
    findings.add_where(
        ~np.array(good, bool), ERROR, field, "be the name of a file", where,
        lambda i: images[i].get(field, "none"),
    )  # fmt: skip
    if root and not outside:
        allow = "MetadataCatalog.get(NAME).set(outside_image_root=True)"
        need = f"stay inside the image root; to allow it: {allow}"
        findings.add_where(
            [ok and _leaves(n) for n, ok in zip(names, good, strict=True)], ERROR, field, need,
            where, lambda i: names[i],
        )  # fmt: skip
    first: dict[str, int] = {}
    paths = []
    for i, (name, ok) in enumerate(zip(names, good, strict=True)):
        paths.append((root + name if lvis else os.path.join(root, name)) if ok else "")
        if ok and first.setdefault(name, i) != i:
            what = f"{field}: {name!r} is there twice, first as {where(first[name])}"
            findings.add(ERROR, "listed twice", where(i), what)
    return ids, paths, where


def _leaves(name: str) -> bool:
    if os.path.isabs(name) or "\\" in name and name[1:2] == ":":
        return True
    return ".." in name and os.path.normpath(name).split(os.sep)[0] == ".."


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """Millions of small objects come and none goes: looking for garbage takes a third of it."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@_without_gc()
def check_json(
    path: str, root: str, *, lvis: bool = False, outside: bool = False
) -> tuple[Report, list[str]]:
    """A file of COCO's format, and the folders that its images lie in.

    Args:
        root: folder of the images.
        lvis: images are named by their `coco_url`.
        outside: images may lie outside of `root`.
    """
    try:
        data = load_json(path)
    except DatasetError as error:
        return Report([Fault(ERROR, str(error))]), []
    findings = _Findings(path)
    categories = _records(findings, data, "categories", "category")
    category_ids = _ids(findings, categories, "category")
    names = [c.get("name") for c in categories]
    findings.add_where(
        [not isinstance(n, str) for n in names], ERROR, "category's name", "be a text",
        lambda i: f"category {category_ids[i]!r}", lambda i: names[i],
    )  # fmt: skip
    texts = [n for n in names if isinstance(n, str)]
    findings.add_twice(texts, WARNING, lambda n: f"category name {n!r} is there twice")

    images = _records(findings, data, "images", "image")
    ids, paths, where = _file_names(findings, images, root, lvis, outside)
    sizes = _sizes(findings, images, where, needed=True)
    folders = _check_files(findings, "coco_url" if lvis else "file_name", paths, where)
    _check_sampled(findings, _Images(images, root, paths, sizes, where))

    facts: dict[str, Any] = {
        "category_ids": category_ids,
        "category_names": [str(n) for n in names],
        "labelled": "annotations" in data,
    }
    annotations = _records(findings, data, "annotations", "annotation", "annotations" not in data)
    own_ids = _ids(
        findings, annotations, "annotation", level=WARNING if "minival" in path else ERROR
    )
    of_image = _ids(findings, annotations, "annotation", "image_id")
    of_category = _ids(findings, annotations, "annotation", "category_id")
    index = {v: i for i, v in enumerate(ids) if v is not None}
    places = np.array([index.get(v, -1) for v in of_image], np.int64)

    def which(i: int) -> str:
        own = f"annotation {own_ids[i]!r}" if own_ids[i] is not None else f"annotation number {i}"
        return own + (f" of image {of_image[i]!r}" if of_image[i] is not None else "")

    if index:
        lost = (places < 0) & np.array([v is not None for v in of_image], bool)
        if lost.any():
            hint = _near(of_image[int(np.flatnonzero(lost)[0])], index)
            need = f"be the id of an image{hint}"
            findings.add_where(lost, ERROR, "image_id", need, which, lambda i: of_image[i])
    known = {v: c for v, c in zip(category_ids, categories, strict=True) if v is not None}
    if known:
        strange = np.array([v is not None and v not in known for v in of_category], bool)
        if strange.any():
            hint = _near(of_category[int(np.flatnonzero(strange)[0])], known)
            need = f"be the id of a category{hint}"
            findings.add_where(strange, ERROR, "category_id", need, which, lambda i: of_category[i])
        used = set(of_category)
        unused = [c.get("name") for v, c in known.items() if v not in used]
        if unused and annotations:
            what = f"{len(unused)} of {len(known)} categories have no annotation, such as "
            findings.add(WARNING, "unused", "", f"{what}{unused[0]!r}")
    ignored = [a.get("ignore", 0) for a in annotations]
    findings.add_where(
        [bool(v) for v in ignored], ERROR, "ignore", "be 0: Detectron2 knows iscrowd only", which,
        lambda i: ignored[i],
    )  # fmt: skip
    points = {
        v: len(c["keypoints"]) for v, c in known.items() if isinstance(c.get("keypoints"), list)
    }
    anns = _Annotations(
        annotations,
        places,
        np.concatenate([sizes, [[np.nan, np.nan]]])[places],
        which,
        np.array([a.get("iscrowd", 0) == 1 for a in annotations], bool),
    )
    boxes = [BoxMode.XYWH_ABS] * len(annotations)
    facts |= _check_annotations(
        findings, anns, boxes, [points.get(v) for v in of_category], ERROR if lvis else SLIP
    )
    return Report(list(findings.faults.values()), facts), folders


def check_panoptic(path: str, root: str) -> Report:
    """A JSON file of COCO's panoptic format, and its PNG files under `root`."""
    try:
        data = load_json(path)
    except DatasetError as error:
        return Report([Fault(ERROR, str(error))])
    findings = _Findings(path)
    categories = _records(findings, data, "categories", "category")
    known = set(_ids(findings, categories, "category"))
    images = _records(findings, data, "images", "image")
    ids = set(_ids(findings, images, "image"))
    annotations = _records(findings, data, "annotations", "annotation")
    of_image = _ids(findings, annotations, "annotation", "image_id")
    findings.add_twice(
        [v for v in of_image if v is not None], ERROR, lambda v: f"image {v!r} has two annotations"
    )

    def where(i: int) -> str:
        return f"image {of_image[i]!r}" if of_image[i] is not None else f"annotation number {i}"

    findings.add_where(
        [v is not None and v not in ids for v in of_image], ERROR, "image_id",
        "be the id of an image", where, lambda i: of_image[i],
    )  # fmt: skip
    names: list[Any] = [a.get("file_name") for a in annotations]
    good = [isinstance(n, str) and n != "" and not _leaves(n) for n in names]
    findings.add_where(
        ~np.array(good, bool), ERROR, "file_name", "be the name of a file in the panoptic root",
        where, lambda i: names[i],
    )  # fmt: skip
    paths = [os.path.join(root, n) if ok else "" for n, ok in zip(names, good, strict=True)]
    _check_files(findings, "file_name", paths, where)
    segments = [a.get("segments_info") for a in annotations]
    findings.add_where(
        [not (isinstance(s, list) and all(isinstance(e, dict) for e in s)) for s in segments],
        ERROR, "segments_info", "be a list of objects", where, lambda i: segments[i],
    )  # fmt: skip
    sample = _sample(paths)
    for i, entries in enumerate(segments):
        if not isinstance(entries, list):
            continue
        seen = set()
        for entry in (e for e in entries if isinstance(e, dict)):
            number: Any = entry.get("id")
            category = entry.get("category_id")
            if not is_int(number) or not 0 < number < 256**3 or number in seen:
                what = f"segment id: found {found(number)}, but it must be a number of its own, "
                findings.add(ERROR, "segment id", where(i), what + "from 1 on")
            seen.add(number if is_int(number) else None)
            if not _id_ok(category) or category not in known:
                what = f"category_id of segment {found(number)}: found {found(category)}, but it "
                findings.add(ERROR, "category", where(i), what + "must be the id of a category")
        if i in sample and paths[i] and os.path.exists(paths[i]):
            _check_segments(findings, where(i), paths[i], seen)
    return Report(list(findings.faults.values()))


def _check_segments(findings: _Findings, where: str, path: str, numbers: set) -> None:
    try:
        with Image.open(path) as image:
            mode, pixels = image.mode, np.asarray(image, np.int64)
    except Exception as error:
        findings.add(IMAGE, "unreadable", where, f"'{path}' cannot be read: {error}")
        return
    if mode != "RGB":
        what = f"'{path}': mode {mode}, but segment ids are coded in RGB"
        findings.add(ERROR, "panoptic mode", where, what)
        return
    drawn = set(np.unique(pixels @ [1, 256, 65536]).tolist()) - {0}
    for what, strange in (
        ("is drawn, but not in segments_info", drawn - numbers),
        ("is in segments_info, but not drawn", numbers - drawn - {None}),
    ):
        if strange:
            findings.add(ERROR, what, where, f"'{path}': segment {min(strange)} {what}")


# Dataset dicts


def check_dicts(name: str, dicts: Sequence[dict], classes: int | None = None) -> Report:
    """Detectron2's dataset dicts.

    Args:
        name: what messages call them.
        classes: number of thing classes.
    """
    findings = _Findings(name)
    if not len(dicts):
        findings.add(ERROR, "empty", "", "found no images")
        return Report(list(findings.faults.values()))
    good = [isinstance(d, dict) for d in dicts]
    findings.add_where(
        ~np.array(good, bool), ERROR, "record", "be a dict", lambda i: f"record {i}",
        lambda i: dicts[i],
    )  # fmt: skip
    records = [d for d in dicts if isinstance(d, dict)]

    def where(i: int) -> str:
        record = records[i]
        image = record.get("image_id", record.get("file_name"))
        return f"record {i}" + (f" (image {image!r})" if image is not None else "")

    names = [r.get("file_name") for r in records]
    named = [isinstance(n, (str, os.PathLike)) and str(n) != "" for n in names]
    if any(named):  # else a mapper of the project's own reads them from elsewhere
        findings.add_where(
            ~np.array(named, bool), ERROR, "file_name", "be the path of a file", where,
            lambda i: names[i],
        )  # fmt: skip
    paths = [str(n) if ok else "" for n, ok in zip(names, named, strict=True)]
    findings.add_twice(
        [p for p in paths if p], WARNING, lambda p: f"file_name: {p!r} is there twice"
    )
    ids = [r["image_id"] for r in records if "image_id" in r]
    with contextlib.suppress(TypeError):  # not hashable
        findings.add_twice(ids, WARNING, lambda v: f"image_id {v!r} is there twice")
    sizes = _sizes(findings, records, where, needed=False)
    _check_files(findings, "file_name", paths, where)
    _check_sampled(findings, _Images(records, None, paths, sizes, where))
    for key in ("sem_seg_file_name", "pan_seg_file_name"):
        labels = [str(r.get(key, "")) for r in records]
        _check_files(findings, key, labels, where)

    lists = [r.get("annotations", []) for r in records]
    usable = [isinstance(a, (list, tuple)) and all(isinstance(x, dict) for x in a) for a in lists]
    findings.add_where(
        ~np.array(usable, bool), ERROR, "annotations", "be a list of dicts", where,
        lambda i: lists[i],
    )  # fmt: skip
    lists = [a if ok else [] for a, ok in zip(lists, usable, strict=True)]
    flat = [a for annotations in lists for a in annotations]
    image = np.repeat(np.arange(len(lists)), [len(a) for a in lists])
    starts = np.cumsum([0] + [len(a) for a in lists])

    def which(i: int) -> str:
        return f"{where(int(image[i]))}, annotation {i - starts[image[i]]}"

    facts: dict[str, Any] = {"labelled": any("annotations" in r for r in records)}
    for key in ("image_id", "width", "height"):
        lacking = [i for i, record in enumerate(records) if key not in record]
        facts[f"without_{key}"] = [len(lacking), where(lacking[0]) if lacking else ""]
    anns = _Annotations(
        flat, image, sizes[image], which,
        np.array([a.get("iscrowd", 0) == 1 for a in flat], bool),
    )  # fmt: skip
    modes = anns.column("bbox_mode")
    whole = [isinstance(m, int) and m in list(BoxMode) for m in modes]
    findings.add_where(
        ~np.array(whole, bool), ERROR, "bbox_mode", "be a BoxMode", which, lambda i: modes[i]
    )
    labels = anns.column("category_id")
    need = "be a whole number from 0 " + (f"to {classes - 1}" if classes else "on")
    findings.add_where(
        [not (isinstance(c, (int, np.integer)) and 0 <= c < (classes or np.inf)) for c in labels],
        ERROR, "category_id", need, which, lambda i: labels[i],
    )  # fmt: skip
    modes = [BoxMode(m) if ok else BoxMode.XYXY_ABS for m, ok in zip(modes, whole, strict=True)]
    facts |= _check_annotations(findings, anns, modes, [None] * len(flat), ERROR)
    return Report(list(findings.faults.values()), facts)


# A registered dataset


def cache_folder() -> str:
    base = os.getenv("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "agvm_d2", "datasets")


def _stamp(path: str) -> list:
    stat = os.stat(path)
    return [os.path.abspath(path), stat.st_size, stat.st_mtime_ns]


def _stamps(paths: Iterable[str]) -> list:
    return [_stamp(path) for path in paths if os.path.exists(path)]


def _cached(make: Callable[[], tuple[Report, list[str]]], *key: Any) -> Report:
    """`make()`, or what it gave for the same key when its folders were what they are now."""
    with open(__file__, "rb") as file:  # other code: other findings
        whole = json.dumps([hashlib.sha256(file.read()).hexdigest(), *key])
    name = hashlib.sha256(whole.encode()).hexdigest()[:32] + ".json"
    path = os.path.join(cache_folder(), name)
    with contextlib.ExitStack() as stack:
        try:
            os.makedirs(cache_folder(), exist_ok=True)
            stack.enter_context(file_lock(path))  # one of several workers looks, the others wait
        except OSError:  # no place to keep it
            return make()[0]
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            with open(path) as old:
                kept = json.load(old)
            if kept["folders"] == _stamps(folder[0] for folder in kept["folders"]):
                return Report([Fault(**fault) for fault in kept["faults"]], kept["facts"])
        report, folders = make()
        kept = {**dataclasses.asdict(report), "folders": _stamps(f or "." for f in folders)}
        with contextlib.suppress(OSError):
            with open(path + ".part", "w") as new:
                json.dump(kept, new)
            os.replace(path + ".part", path)
        return report


def _load(name: str) -> Sequence[dict]:
    """The dataset's dicts.

    Raises:
        DatasetError: its function fails.
    """
    try:
        return DatasetCatalog.get(name)
    except Exception as error:  # a user's function: anything
        # Where Detectron2 was reading a COCO file, say what is wrong with that.
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_name == "load_coco_json":
                local = frame.f_locals
                report, _ = check_json(local["json_file"], str(local["image_root"]))
                if report.errors():
                    raise DatasetError("\n".join(report.errors())) from error
        raise DatasetError(
            f"dataset '{name}': the function that it is registered with fails: "
            f"{type(error).__name__}: {error}"
        ) from error


def _label_pairs(meta: Any, dicts: Sequence[dict] | None) -> list[tuple[str, str]]:
    """(image file, label file)."""
    if dicts is not None:
        return [
            (str(d["file_name"]), str(d["sem_seg_file_name"]))
            for d in dicts
            if isinstance(d, dict) and "sem_seg_file_name" in d and "file_name" in d
        ]
    root, images = meta.get("sem_seg_root"), meta.get("image_root")
    if not (root and images and os.path.isdir(root) and os.path.isdir(images)):
        return []
    by_stem = {os.path.splitext(n)[0]: n for n in os.listdir(images)}
    return [
        (os.path.join(images, by_stem[stem]), os.path.join(root, label))
        for label in sorted(os.listdir(root))
        if (stem := os.path.splitext(label)[0]) in by_stem
    ]


def check(name: str) -> Report:
    """Look at a registered dataset.

    Raises:
        DatasetError: its function fails.
    """
    meta = MetadataCatalog.get(name)
    if meta.get("made_on_first_use", False):
        _load(name)
    path, kind = meta.get("json_file", None), meta.get("evaluator_type", None)
    dicts = None
    if path and kind in COCO_LIKE:
        path = PathManager.get_local_path(path)
        root, outside = str(meta.get("image_root", "")), bool(meta.get("outside_image_root", False))
        try:
            stamp = _stamp(path)
        except OSError as error:
            return Report([Fault(ERROR, f"{path}: {error.strerror}")])
        report = _cached(
            lambda: check_json(path, root, lvis=kind == "lvis", outside=outside),
            stamp, root, kind, outside,
        )  # fmt: skip
        ids = [v for v in report.facts.get("category_ids", ()) if v is not None]
        mapping = meta.get("thing_dataset_id_to_contiguous_id", None)
        if mapping is not None and set(ids) - set(mapping):
            what = f"category {min(set(ids) - set(mapping), key=str)!r} is not in the metadata's "
            report.faults.append(Fault(ERROR, f"{path}: {what}thing_dataset_id_to_contiguous_id"))
    else:
        dicts = _load(name)
        if not isinstance(dicts, (list, tuple)):  # a dataset of the project's own kind
            return Report(facts={"labelled": False})
        things = meta.get("thing_classes", None)
        report = check_dicts(f"dataset '{name}'", dicts, len(things) if things else None)
    panoptic, folder = meta.get("panoptic_json", None), meta.get("panoptic_root", None)
    if panoptic and folder and os.path.exists(panoptic):

        def look() -> tuple[Report, list[str]]:
            return check_panoptic(panoptic, folder), [folder]

        report.faults += _cached(look, _stamp(panoptic), folder).faults
    pairs = _label_pairs(meta, dicts)
    if pairs:
        findings = _Findings(f"dataset '{name}'")
        stuff = meta.get("stuff_classes", None)
        _check_labels(findings, pairs, len(stuff) if stuff else None, meta.get("ignore_label", 255))
        report.faults += findings.faults.values()
    return report


def _lines(name: str) -> Iterator[tuple[bool, str]]:
    """(whether it is an error, the line)."""
    try:
        report = check(name)
    except DatasetError as error:
        yield True, str(error)
        return
    yield from ((True, line) for line in report.errors())
    yield from ((False, line) for line in report.warnings())


def main(argv: list[str] | None = None) -> None:
    import agvm_d2.data  # noqa: F401  registers the bundled datasets

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="registered datasets")
    failed = False
    for name in parser.parse_args(argv).names:
        if name not in DatasetCatalog.list():
            sys.exit(f"agvm_d2.data.check: error: '{name}' is not a registered dataset")
        lines = list(_lines(name))
        for bad, line in lines:
            print(f"{'error' if bad else 'warning'}: {line}")
        failed |= any(bad for bad, _ in lines)
        if not lines:
            print(f"{name}: nothing wrong was found")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
