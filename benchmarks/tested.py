"""Run tests, and write down in docs/install.md with which versions and on what they passed.

    python benchmarks/tested.py -m 'not slow and not integration'

The arguments are pytest's. A later run with the same versions, machine and arguments replaces the
row. If a test fails, nothing is written.
"""

from __future__ import annotations
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import sys
from pathlib import Path
import numpy
import pytest
import torch

PAGE = Path(__file__).resolve().parents[1] / "docs/install.md"
HEADER = "| Python | torch | NumPy | Detectron2 | machine | pytest | result | date |\n|"
KEY = 6  # columns that tell rows apart


class Counter:
    """pytest's plugin that keeps how many tests ended how."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        stats = terminalreporter.stats
        self.counts = {how: len(stats[how]) for how in ("passed", "skipped") if how in stats}


def detectron2_version() -> str:
    """Of the package that brought it, and whether its compiled part loads."""
    found = importlib.metadata.packages_distributions().get("detectron2", ["detectron2"])[0]
    compiled = importlib.util.find_spec("detectron2._C") is not None
    version = f"{found} {importlib.metadata.version(found)}"
    return version if compiled else f"{version}, not compiled"


def machine() -> str:
    if not torch.cuda.is_available():
        return f"{os.cpu_count()} CPU cores"
    count = torch.cuda.device_count()
    return f"{count} {torch.cuda.get_device_name(0)}"


def updated(page: str, row: list[str]) -> str:
    """The page with the row in its table, in place of one with the same first `KEY` cells.

    Raises:
        ValueError: the page has no such table, or more than one.
    """
    if page.count(HEADER) != 1:
        raise ValueError(f"{PAGE}: it must have one table with the header {HEADER.splitlines()[0]}")
    start = page.index("\n", page.index(HEADER) + len(HEADER)) + 1
    end = start
    while page.startswith("|", end):
        end = page.find("\n", end) + 1 or len(page)
    old = page[start:end].splitlines()
    mine = [cell.replace("|", "\\|") for cell in row]
    begins = f"| {' | '.join(mine[:KEY])} |"
    rows = [line for line in old if not line.startswith(begins)] + [f"| {' | '.join(mine)} |"]
    return page[:start] + "\n".join(rows) + "\n" + page[end:]


def main(arguments: list[str]) -> int:
    counter = Counter()
    code = pytest.main([*arguments], plugins=[counter])  # which adds to its list
    if code:
        return int(code)
    row = [
        platform.python_version(),
        torch.__version__,
        numpy.__version__,
        detectron2_version(),
        machine(),
        f"`{shlex.join(arguments)}`" if arguments else "all but slow",
        ", ".join(f"{count:,} {how}" for how, count in counter.counts.items()),
        datetime.date.today().isoformat(),
    ]
    PAGE.write_text(updated(PAGE.read_text(), row))
    print(" | ".join(row))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
