"""AGVM inside Detectron2: config keys, hook, trainers, loader, checkpoints, launch."""

from ..validate import INSTALL_DETECTRON2

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        raise
    raise ModuleNotFoundError(
        f"Detectron2 is needed, and is not installed: {INSTALL_DETECTRON2}", name="detectron2"
    ) from None
