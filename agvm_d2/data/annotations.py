"""The fields of annotations, all of a dataset at once."""

from __future__ import annotations
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any
import numpy as np
from detectron2.structures import BoxMode

from ..validate import is_int
from .faults import ERROR, IMAGE, REACH, SIDE, SLIP, WARNING, Findings, is_real


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
class Annotations:
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


def _check_boxes(findings: Findings, anns: Annotations, boxes: list[Any], modes: list) -> None:
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


def _check_masks(findings: Findings, anns: Annotations, masks: list[Any], dropped: str) -> None:
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
            and all(map(is_int, size))
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
    findings: Findings, anns: Annotations, owners: np.ndarray, polygons: list, dropped: str
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
    findings: Findings, anns: Annotations, values: list[Any], wanted: Sequence[int | None]
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


def check_annotations(
    findings: Findings,
    anns: Annotations,
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
        [a is not None and not (is_real(a) and 0 <= a < np.inf) for a in areas], ERROR, "area",
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
