"""What tells one run from another, and the file with a line for each finished one."""

from __future__ import annotations
import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/large_batch.jsonl"
EPOCHS = 16
UNIT = 16  # images of a micro-batch, and of the batch that the others are held against


class Cell(NamedTuple):
    """All runs that differ by learning rate and seed only."""

    pipeline: str
    method: str
    batch: int
    epochs: int = EPOCHS
    options: str = ""  # more config keys and values
    workers: int = 1

    @property
    def varied(self) -> str:
        """What differs from the setting itself."""
        workers = f"{self.workers} workers" if self.workers > 1 else ""
        return ", ".join(filter(None, [workers, self.options and f"`{self.options}`"]))

    def run(self, lr: float, seed: int) -> Run:
        return Run(**self._asdict(), lr=float(f"{lr:.4g}"), seed=seed)


class Run(NamedTuple):
    pipeline: str
    method: str
    batch: int
    lr: float
    seed: int
    epochs: int = EPOCHS
    options: str = ""
    workers: int = 1

    @property
    def cell(self) -> Cell:
        return Cell(**{key: getattr(self, key) for key in Cell._fields})

    @property
    def name(self) -> str:
        return "_".join(str(x) for x in self).replace(" ", "-").replace("/", "-").strip("_")


Rows = dict[Run, dict]  # the finished runs
Cells = dict[Cell, dict[float, list[dict]]]  # those of each cell, by learning rate, then by seed


def read(path: Path = RESULTS) -> Rows:
    """Of a run done twice, the last."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {Run(**{key: row[key] for key in Run._fields if key in row}): row for row in rows}


def by_cell(rows: Rows) -> Cells:
    cells: Cells = defaultdict(lambda: defaultdict(list))
    for run in sorted(rows, key=lambda run: (run.cell, run.lr, run.seed)):
        cells[run.cell][run.lr].append(rows[run])
    return cells
