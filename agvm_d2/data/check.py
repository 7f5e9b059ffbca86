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
import glob
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
import numpy as np
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import file_lock

from ..d2.imports import add_flag, import_project
from .annotations import Annotations, check_annotations
from .coco_json import check_json, check_panoptic
from .faults import ERROR, WARNING, DatasetError, Fault, Findings, Report
from .files import Images, check_files, check_labels, check_sampled, image_sizes

COCO_LIKE = (None, "coco", "lvis", "coco_panoptic_seg")  # evaluator_type


def check_dicts(name: str, dicts: Sequence[dict], classes: int | None = None) -> Report:
    """Detectron2's dataset dicts.

    Args:
        name: what messages call them.
        classes: number of thing classes.
    """
    findings = Findings(name)
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
    sizes = image_sizes(findings, records, where, needed=False)
    check_files(findings, "file_name", paths, where)
    check_sampled(findings, Images(paths, sizes, where))
    for key in ("sem_seg_file_name", "pan_seg_file_name"):
        labels = [str(r.get(key, "")) for r in records]
        check_files(findings, key, labels, where)

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
    anns = Annotations(
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
    facts |= check_annotations(findings, anns, modes, [None] * len(flat), ERROR)
    return Report(list(findings.faults.values()), facts)


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
    code = hashlib.sha256()
    for source in sorted(glob.glob(os.path.join(os.path.dirname(__file__), "*.py"))):
        with open(source, "rb") as file:  # other code: other findings
            code.update(file.read())
    whole = json.dumps([code.hexdigest(), *key])
    name = hashlib.sha256(whole.encode()).hexdigest()[:32] + ".json"
    path = os.path.join(cache_folder(), name)
    with contextlib.ExitStack() as stack:
        try:
            os.makedirs(cache_folder(), exist_ok=True)
            stack.enter_context(file_lock(path))  # one of several workers looks, the others wait
        except Exception:  # no place to keep it, or no locks there, an error of portalocker's own
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
        findings = Findings(f"dataset '{name}'")
        stuff = meta.get("stuff_classes", None)
        check_labels(findings, pairs, len(stuff) if stuff else None, meta.get("ignore_label", 255))
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
    add_flag(parser)
    args = parser.parse_args(argv)
    try:
        import_project(args.imports, get_cfg())
    except ValueError as error:
        sys.exit(f"agvm_d2.data.check: error: {error}")
    failed = False
    for name in args.names:
        if name not in DatasetCatalog.list():
            sys.exit(
                f"agvm_d2.data.check: error: '{name}' is not a registered dataset; a project's are "
                "registered by --import"
            )
        lines = list(_lines(name))
        for bad, line in lines:
            print(f"{'error' if bad else 'warning'}: {line}")
        failed |= any(bad for bad, _ in lines)
        if not lines:
            print(f"{name}: nothing wrong was found")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
