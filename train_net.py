#!/usr/bin/env python
"""`python -m agvm_d2.train`, under the name that Detectron2's own script has."""

from agvm_d2.d2.train import invoke_main, main, setup  # noqa: F401  for scripts that import them

if __name__ == "__main__":
    invoke_main(name="train_net.py")
