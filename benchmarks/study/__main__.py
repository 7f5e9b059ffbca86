"""The command.

    python -m benchmarks.study run --pipeline faster_rcnn --method agvm --batch 128 --lr 0.16
    python -m benchmarks.study grid            # all that is missing, two runs side by side
    python -m benchmarks.study grid --quick    # another file, another budget: minutes
    python -m benchmarks.study tables          # print the tables of docs/evidence-tables.md
    python -m benchmarks.study tables --write  # put them there, and draw the figure

A finished run is one line of benchmarks/results/large_batch.jsonl; a grid that was stopped goes on
where it was.
"""

from __future__ import annotations
import argparse
import json
from pathlib import Path

from .figures import draw
from .methods import METHODS
from .plan import GRID, QUICK, SEEDS
from .results import EPOCHS, RESULTS, ROOT, Run, by_cell, read
from .run import PIPELINES, do_run, grid, make_weights
from .tables import DOCUMENT, report, write


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="one run, again also if it is in the results")
    one.add_argument("--pipeline", choices=PIPELINES, required=True)
    one.add_argument("--method", choices=METHODS, required=True)
    one.add_argument("--batch", type=int, required=True)
    one.add_argument("--lr", type=float, required=True)
    one.add_argument("--seed", type=int, default=1)
    one.add_argument("--epochs", type=int, default=EPOCHS)
    one.add_argument("--options", default="", help="'KEY VALUE KEY VALUE'")
    one.add_argument("--workers", type=int, default=1)
    every = commands.add_parser("grid", help="all runs that are missing")
    every.add_argument("--quick", action="store_true", help="two methods, two epochs, one seed")
    every.add_argument("--jobs", type=int, default=2)
    every.add_argument("--minutes", type=float, default=1e6, help="start nothing new after that")
    tables = commands.add_parser("tables", help="what the runs say")
    tables.add_argument("--write", action="store_true", help="into docs/evidence-tables.md")
    for part, default in (
        (one, ROOT / "output/large_batch.jsonl"),
        (every, None),
        (tables, RESULTS),
    ):
        part.add_argument("--results", type=Path, default=default, metavar="JSONL")
    args = parser.parse_args()
    if args.command == "tables":
        cells = by_cell(read(args.results))
        if args.write:
            write(report(cells))
            draw(cells, DOCUMENT.parent)
        else:
            print(report(cells))
    elif args.command == "run":
        run = Run(**{key: getattr(args, key) for key in Run._fields})
        make_weights([run.pipeline])
        row = do_run(run, args.results)
        print(json.dumps({k: v for k, v in row.items() if k not in ("variance", "lr_scale")}))
    elif args.quick:
        path = args.results or ROOT / "output/large_batch_quick.jsonl"
        grid(QUICK, path, args.jobs, (1,), args.minutes)
    else:
        grid(GRID, args.results or RESULTS, args.jobs, SEEDS, args.minutes)


if __name__ == "__main__":
    main()
