"""`--import`: a project's code, before a config is read that names what it registers."""

from __future__ import annotations
import importlib
import inspect
import os
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from types import ModuleType
from detectron2.config import CfgNode


def add_flag(parser: ArgumentParser) -> None:
    """`--import`, whose values are `imports`."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE_OR_FILE[:FUNCTION]",
        help="import a project's code first (datasets, models), and let FUNCTION(cfg) add its "
        "config keys; repeatable",
    )


def add_unsafe_flag(parser: ArgumentParser) -> None:
    """`--allow-unsafe-yaml`, which `read_config` takes as `allow_unsafe`."""
    parser.add_argument(
        "--allow-unsafe-yaml", action="store_true", help="let !!python tags in the file run code"
    )


def import_project(names: Sequence[str], cfg: CfgNode) -> CfgNode:
    """Import each of `names`, modules or .py files; once in a process, however often it is called.

    Args:
        names: with :FUNCTION, that is called with the config, to which it adds a project's keys,
            or without, to return one.

    Returns:
        The config; `cfg` is changed.

    Raises:
        ValueError: names the import that fails.
    """
    for name in names:
        module, _, function = name.partition(":")
        try:
            found = _module(module)
            if function:
                call = getattr(found, function)
                cfg = (call(cfg) or cfg) if inspect.signature(call).parameters else call()
                if not isinstance(cfg, CfgNode):
                    raise TypeError(f"{function} returns {cfg!r}, but it must be a config")
        except Exception as error:  # the module is code: anything
            hint = "; import its package by name, without .py" if "relative" in str(error) else ""
            raise ValueError(f"--import {name}: {type(error).__name__}: {error}{hint}") from error
    return cfg


def _module(name: str) -> ModuleType:
    if not name.endswith(".py"):
        if os.getcwd() not in sys.path:  # a console script's path lacks it
            sys.path.append(os.getcwd())
        return importlib.import_module(name)
    path = os.path.abspath(name)
    folder, file = os.path.split(path)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as a script's: what it imports may lie beside it
    module = importlib.import_module(file.removesuffix(".py"))
    if os.path.abspath(module.__file__ or "") != path:
        raise ImportError(f"its name is that of another module, '{module.__file__}'; rename it")
    return module
