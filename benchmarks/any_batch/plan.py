"""Which runs there are to do, in order."""

from __future__ import annotations

from .setting import Run

GRID: list[Run] = []
