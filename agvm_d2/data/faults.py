"""What is wrong with a dataset: one line for each kind of fault."""

from __future__ import annotations
import dataclasses
import reprlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
import numpy as np

from ..validate import is_int

REACH = 10  # coordinates up to so many times an image's longer side; C code dies of more
SIDE = 10_000  # of an image whose size is not known
RARE = 0.01  # COCO itself has a few boxes without area: a fault of more than this share is no slip
# What a fault does: it spoils training; it does unless bad images are skipped; it does if it is not
# rare; it does not.
ERROR, IMAGE, SLIP, WARNING = "error", "image", "slip", "warning"
short = reprlib.Repr()
short.maxstring = short.maxother = 60
found = short.repr


@dataclasses.dataclass
class Fault:
    level: str
    text: str
    count: int = 1
    of: int = 0  # records looked at
    mapper: bool = False  # only Detectron2's reads it wrongly

    def spoils(self, skip_images: bool, own_mapper: bool = False) -> bool:
        if self.mapper and own_mapper:
            return False
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

    def errors(self, skip_images: bool = False, own_mapper: bool = False) -> list[str]:
        return [str(f) for f in self.faults if f.spoils(skip_images, own_mapper)]

    def warnings(self, skip_images: bool = False, own_mapper: bool = False) -> list[str]:
        return [str(f) for f in self.faults if not f.spoils(skip_images, own_mapper)]


class DatasetError(ValueError):
    """A dataset that would spoil training; one line for each kind of fault."""


class Findings:
    """Collects a file's faults, one for each kind."""

    def __init__(self, file: str):
        self.file = file
        self.faults: dict[str, Fault] = {}

    def add(
        self,
        level: str,
        kind: str,
        where: str,
        what: str,
        count: int = 1,
        of: int = 0,
        mapper: bool = False,
    ) -> None:
        if kind in self.faults:
            self.faults[kind].count += count
        else:
            place = f"{where}: " if where else ""
            self.faults[kind] = Fault(level, f"{self.file}: {place}{what}", count, of, mapper)

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

    def add_twice(self, values: Sequence[Any], level: str, what: Callable[[Any], str]) -> None:
        """A fault for values that are there more than once; `what(value)` says so."""
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            self.add(level, what(""), "", what(twice[0]), len(twice))


def id_ok(value: Any) -> bool:
    return is_int(value) or (isinstance(value, str) and value != "")


def is_real(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating))
