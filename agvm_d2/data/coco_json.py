"""COCO's and LVIS's JSON files, of instances and of panoptic segments."""

from __future__ import annotations
import contextlib
import gc
import json
import os
from collections.abc import Callable, Iterator
from typing import Any
import numpy as np
from detectron2.structures import BoxMode
from PIL import Image

from ..validate import is_int
from .annotations import Annotations, check_annotations
from .faults import ERROR, IMAGE, SLIP, WARNING, DatasetError, Fault, Findings, Report, found, id_ok
from .files import Images, check_files, check_sampled, image_sizes, some


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
    findings: Findings, data: dict, key: str, what: str, optional: bool = False
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
    findings: Findings, records: list[dict], what: str, key: str = "id", level: str = ERROR
) -> list[Any]:
    """Their ids; those that are none or there twice are named, and the former are None here."""
    values = [record.get(key) for record in records]
    good = [id_ok(v) for v in values]
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
    findings: Findings, images: list[dict], root: str, lvis: bool, outside: bool
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
    findings = Findings(path)
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
    sizes = image_sizes(findings, images, where, needed=True)
    folders = check_files(findings, "coco_url" if lvis else "file_name", paths, where)
    check_sampled(findings, Images(paths, sizes, where))

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
    anns = Annotations(
        annotations,
        places,
        np.concatenate([sizes, [[np.nan, np.nan]]])[places],
        which,
        np.array([a.get("iscrowd", 0) == 1 for a in annotations], bool),
    )
    boxes = [BoxMode.XYWH_ABS] * len(annotations)
    facts |= check_annotations(
        findings, anns, boxes, [points.get(v) for v in of_category], ERROR if lvis else SLIP
    )
    return Report(list(findings.faults.values()), facts), folders


def check_panoptic(path: str, root: str) -> Report:
    """A JSON file of COCO's panoptic format, and its PNG files under `root`."""
    try:
        data = load_json(path)
    except DatasetError as error:
        return Report([Fault(ERROR, str(error))])
    findings = Findings(path)
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
    check_files(findings, "file_name", paths, where)
    segments = [a.get("segments_info") for a in annotations]
    findings.add_where(
        [not (isinstance(s, list) and all(isinstance(e, dict) for e in s)) for s in segments],
        ERROR, "segments_info", "be a list of objects", where, lambda i: segments[i],
    )  # fmt: skip
    sample = some(paths)
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
            if not id_ok(category) or category not in known:
                what = f"category_id of segment {found(number)}: found {found(category)}, but it "
                findings.add(ERROR, "category", where(i), what + "must be the id of a category")
        if i in sample and paths[i] and os.path.exists(paths[i]):
            _check_segments(findings, where(i), paths[i], seen)
    return Report(list(findings.faults.values()))


def _check_segments(findings: Findings, where: str, path: str, numbers: set) -> None:
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
