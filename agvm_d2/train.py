"""`python -m agvm_d2.train`: train and evaluate with AGVM, see `agvm_d2.d2.train`."""

from __future__ import annotations
import sys


def main(argv: list[str] | None = None) -> None:
    try:
        from .d2.train import invoke_main
    except ModuleNotFoundError as error:
        if error.name != "detectron2":
            raise
        sys.exit(f"agvm_d2.train: error: {error}")
    invoke_main(argv)


if __name__ == "__main__":
    main()
