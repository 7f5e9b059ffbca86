"""Image and label files: all names, and a few of the files."""

from __future__ import annotations
import contextlib
import dataclasses
import os
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any
import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..validate import is_int
from .faults import ERROR, IMAGE, WARNING, Findings

SAMPLE = 16  # image and label files that are opened
DEEP = ("I", "F")  # modes of more than 8 bits begin so; Detectron2 cuts them off at 255


@dataclasses.dataclass
class Images:
    names: list[str]  # paths; "" where there is none
    sizes: np.ndarray  # (images, 2): width and height, NaN where not known
    where: Callable[[int], str]


def image_sizes(
    findings: Findings, records: list[dict], where: Callable, needed: bool
) -> np.ndarray:
    sizes = np.full((len(records), 2), np.nan)
    for column, key in enumerate(("width", "height")):
        values: list[Any] = [record.get(key) for record in records]
        # numpy's too, which dataset functions give
        good = np.array([(is_int(v) or isinstance(v, np.integer)) and v > 0 for v in values], bool)
        given = np.array([key in r for r in records], bool)
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


def check_files(
    findings: Findings, field: str, paths: list[str], where: Callable[[int], str]
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


def some(paths: Sequence[Any]) -> list[int]:
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


def check_sampled(findings: Findings, images: Images) -> None:
    for i in some(images.names):
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
            findings.add(IMAGE, "mode", images.where(i), f"'{path}': {spoils}", mapper=True)
        if odd:
            findings.add(WARNING, "odd mode", images.where(i), f"'{path}': {odd}")


def check_labels(
    findings: Findings, pairs: list[tuple[str, str]], classes: int | None, ignore: int
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
    for i in some(pairs):
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
            findings.add(ERROR, "label mode", "", f"'{label}': {spoils}", mapper=True)
            continue
        if size != wanted:
            what = f"'{label}': {size[0]} x {size[1]}, but its image '{path}' is "
            findings.add(IMAGE, "label size", "", what + f"{wanted[0]} x {wanted[1]}")
        beyond = values[(values >= classes) & (values != ignore)] if classes else values[:0]
        if len(beyond):
            what = f"'{label}': label {beyond[0]}, but it must be below {classes}, the number of "
            findings.add(IMAGE, "label value", "", f"{what}classes, or {ignore}, which is ignored")
