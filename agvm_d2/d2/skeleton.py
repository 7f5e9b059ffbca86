"""The model of a config file as it would be trained, without the memory of its parameters."""

from __future__ import annotations
import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from detectron2.config import get_cfg, instantiate
from detectron2.modeling import build_model
from omegaconf import OmegaConf
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..modules import ModulePatterns
from . import lazy
from .checks import check_agvm_of
from .config import read_config
from .imports import import_project

REGISTRY_HINT = " (--import MODULE registers a project's own architectures)"


def model_of(
    path: str, opts: list[str], imports: Sequence[str] = (), allow_unsafe: bool = False
) -> tuple[nn.Module, ModulePatterns]:
    """The model of a YAML config or a LazyConfig, and its AGVM.MODULES.

    Args:
        opts: KEY VALUE pairs, or a LazyConfig's KEY=VALUE.
        imports: see `import_project`.
        allow_unsafe: let !!python tags run code.

    Raises:
        ValueError, OSError: names the file, key or import, and what to do.
    """
    cfg = import_project(imports, get_cfg())
    if path.endswith(".py"):
        return _of_lazyconfig(path, opts)
    cfg = read_config(path, opts, allow_unsafe, cfg)
    check_agvm_of(cfg)

    def build(device: str) -> nn.Module:
        cfg.MODEL.DEVICE = device
        return build_model(cfg)

    return _built(build, path), cfg.AGVM.MODULES


def _of_lazyconfig(path: str, opts: list[str]) -> tuple[nn.Module, ModulePatterns]:
    cfg = lazy.load(path, opts)
    if "model" not in cfg:
        raise ValueError(f"--config-file: '{path}' has no 'model'.")
    if "agvm" in cfg:
        lazy.check_keys(cfg)

    def build(device: str) -> nn.Module:
        if "device" in cfg.model:  # detrex's, for constants
            cfg.model.device = "cpu"
        return instantiate(cfg.model)

    modules = OmegaConf.select(cfg, "agvm.modules") or ()
    return _built(build, path), [(name, regex) for name, regex in modules]


def _built(build: Callable[[str], nn.Module], path: str) -> nn.Module:
    with contextlib.suppress(Exception), _parameters_on_meta():
        return build("meta")
    try:
        return build("cpu")  # some code sets or reads values
    except Exception as error:  # a project's code: anything
        raise ValueError(
            f"--config-file: '{path}': the model does not build: {_explained(error)}"
        ) from error


def _explained(error: Exception) -> str:
    text = f"{type(error).__name__}: {error.args[0] if len(error.args) == 1 else error}"
    if not str(error):  # a bare assert
        at = traceback.extract_tb(error.__traceback__)[-1]
        text += f"{at.line} ({at.filename}:{at.lineno})"
    return text + REGISTRY_HINT if "registry" in text else text


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters get no memory, and are not initialized; other tensors are as always, since models
    compute with them while they are built."""
    register = nn.Module.register_parameter
    made = WeakIdKeyDictionary()  # one that two places share stays one

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            if param not in made:
                made[param] = nn.Parameter(param.detach().to("meta"), param.requires_grad)
            param = made[param]
        register(module, name, param)

    target: Any = nn.Module
    target.register_parameter = on_meta
    try:
        yield
    finally:
        target.register_parameter = register
