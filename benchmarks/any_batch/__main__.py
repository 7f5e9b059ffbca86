"""The command."""

from __future__ import annotations
import argparse
import json
from pathlib import Path
import torch

from . import __doc__ as description
from .figures import draw
from .plan import GRID, GRID_ON_GPU
from .run import RESULTS, do_run, grid, read
from .setting import ARMS, ITERATIONS, PIPELINES, ROOT, Run
from .tables import DOCUMENT, report, write


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.any_batch",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="one run, again also if it is in the results")
    one.add_argument("--pipeline", choices=PIPELINES, default="faster_rcnn")
    one.add_argument("--arm", choices=ARMS, required=True)
    one.add_argument("--batch", type=int, required=True)
    one.add_argument("--lr", type=float, required=True)
    one.add_argument("--seed", type=int, default=1)
    one.add_argument("--iterations", type=int, default=ITERATIONS, help="of the base, for a gain")
    one.add_argument("--options", default="", help="'KEY VALUE KEY VALUE'")
    one.add_argument("--results", type=Path, default=ROOT / "output/any_batch.jsonl")
    every = commands.add_parser("grid", help="all runs that are missing")
    every.add_argument("--jobs", type=int, default=2)
    every.add_argument("--minutes", type=float, default=1e6, help="start nothing new after that")
    every.add_argument("--results", type=Path, default=RESULTS)
    tables = commands.add_parser("tables", help="what the runs say")
    tables.add_argument("--write", action="store_true", help="into docs/evidence-tables.md")
    tables.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.command == "tables":
        rows = read(args.results)
        if args.write:
            write(report(rows))
            draw(rows, DOCUMENT.parent)
        else:
            print(report(rows))
    elif args.command == "run":
        row = do_run(Run(**{key: getattr(args, key) for key in Run._fields}), args.results)
        print(json.dumps({k: v for k, v in row.items() if k != "curves"}))
    else:
        grid(
            [*GRID, *(GRID_ON_GPU if torch.cuda.is_available() else ())],
            args.results,
            args.jobs,
            args.minutes,
        )


if __name__ == "__main__":
    main()
