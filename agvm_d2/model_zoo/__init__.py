"""The configs that come with this package, by their names below `configs/`.

    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_16ep_bs256_agvm.yaml")

`python -m agvm_d2.model_zoo` lists them, and each command's --config-file takes such a name.
"""

from __future__ import annotations
import glob
import os
from typing import TYPE_CHECKING

from ..validate import did_you_mean

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from omegaconf import DictConfig

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs")


def _files() -> list[str]:
    """All YAML and Python files, also those that others are made from."""
    found = glob.glob("**/*.yaml", root_dir=FOLDER, recursive=True)
    found += glob.glob("*/*.py", root_dir=FOLDER)
    return sorted(name.replace(os.sep, "/") for name in found)


def names() -> list[str]:
    """Of the configs to train with."""
    return [n for n in _files() if "/" in n and not n.startswith("common/") and "/Base-" not in n]


def get_config_file(name: str) -> str:
    """The path of a config.

    Raises:
        FileNotFoundError: there is no such config; names those with a name close to it.
    """
    if name not in _files():
        raise FileNotFoundError(f"'{name}' is not in agvm_d2's model zoo{_close(name)}")
    return os.path.join(FOLDER, name)


def get_config(name: str) -> CfgNode | DictConfig:
    """A YAML config with this package's keys and Detectron2's, or a LazyConfig (.py).

    Raises:
        FileNotFoundError: as `get_config_file`.
        ModuleNotFoundError: Detectron2 is not installed.
    """
    path = get_config_file(name)
    if name.endswith(".py"):
        from ..d2.lazy import load

        return load(path, [])
    from ..d2.config import read_config

    return read_config(path, [])


def find(path: str) -> str:
    """What --config-file means: the file at `path`, else the model zoo's config of that name, which
    may begin with "configs/", as in a clone.

    Raises:
        FileNotFoundError: it is neither.
    """
    if "://" in path or os.path.isfile(path):
        return path
    name = path.removeprefix("configs/")
    if name in _files():
        return get_config_file(name)
    raise FileNotFoundError(
        f"--config-file: '{path}' is not a file, nor is it in agvm_d2's model zoo{_close(name)}"
    )


def _close(name: str) -> str:
    return f"{did_you_mean(name, names())} `python -m agvm_d2.model_zoo` lists all."


def main() -> None:
    print("\n".join(names()))
