"""Files of weights: read without running code, and found broken before anything is made of them."""

from __future__ import annotations
import io
import logging
import os
import pickle
import zipfile
from collections.abc import Iterator
from typing import Any
import torch

logger = logging.getLogger("detectron2.agvm_d2")

# The first torch whose weights_only is not known to be bypassed (CVE-2025-32434 was in 2.5.1 and
# before, CVE-2026-24747 in 2.9 and before).
TRUSTED_TORCH = (2, 10)

_CHECKED: dict[tuple, str] = {}  # (path, size, time) -> what is wrong with it


def torch_version() -> tuple[int, ...]:
    return tuple(int(n) for n in str(torch.__version__).split(".")[:2])


def warn_of_old_torch(path: str, own_folder: str) -> None:
    """Say so where this torch's weights_only can be bypassed and the file is not of this run."""
    inside = own_folder and os.path.realpath(path).startswith(os.path.realpath(own_folder) + os.sep)
    if torch_version() < TRUSTED_TORCH and not inside:
        logger.warning(
            f"'{path}' is read by torch {torch.__version__}, whose weights_only a hostile file can "
            f"bypass: make sure that you trust it, or use torch "
            f"{'.'.join(map(str, TRUSTED_TORCH))} or newer."
        )


def what_is_broken(path: str) -> str:
    """Of a .pth file: "", or why it is not whole. A zip file's checksums see each flipped bit;
    files of torch before 1.6 have none."""
    stat = os.stat(path)
    key = (os.path.realpath(path), stat.st_size, stat.st_mtime_ns)
    if key not in _CHECKED:
        _CHECKED[key] = _broken(path) if stat.st_size else "it is empty"
    return _CHECKED[key]


def _is_zip(path: str) -> bool:
    with open(path, "rb") as f:
        return f.read(2) == b"PK"


def _broken(path: str) -> str:
    try:
        if _is_zip(path):
            with zipfile.ZipFile(path) as file:
                bad = file.testzip()
            return f"the checksum of its part '{bad}' is wrong" if bad else ""
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a flipped bit can make zipfile raise anything
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def load_pth(path: str, own_folder: str = "", mapped: bool = False) -> Any:
    """A .pth file's tensors and plain values.

    Args:
        own_folder: this run's; a file elsewhere may be from anyone.
        mapped: read from the disk what is used of a tensor, when it is used.

    Raises:
        ValueError: it is damaged, or holds more than tensors and plain values.
    """
    if _is_zip(path) or not os.path.getsize(path):
        broken = what_is_broken(path)
        if broken:
            raise ValueError(
                f"The checkpoint '{path}' cannot be read: {broken}. Copy it again, or take another."
            )
    warn_of_old_torch(path, own_folder)
    try:
        mapped = mapped and _is_zip(path)  # others cannot be
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # what is no checkpoint can make pickle raise anything
        raise ValueError(
            f"The checkpoint '{path}' cannot be read: {str(error).splitlines()[0]} Only files of "
            "tensors and plain values are loaded, since others could run code; "
            "torch.serialization.add_safe_globals lets in classes that you trust."
        ) from error


def load_pkl(path: str) -> Any:
    """A .pkl file's arrays, tensors and plain values.

    Raises:
        ValueError: it is damaged, or holds more than that.
    """
    try:
        with open(path, "rb") as f:
            return _ArraysUnpickler(f, encoding="latin1").load()
    except Exception as error:  # damaged bytes can make pickle raise anything
        raise ValueError(
            f"MODEL.WEIGHTS (train.init_checkpoint): '{path}' cannot be read: {error}"
        ) from error


def _storage_from_bytes(data: bytes) -> Any:
    """torch's own `_load_from_bytes` unpickles whatever it is given."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


class _ArraysUnpickler(pickle.Unpickler):
    """Numpy arrays, torch tensors and plain values only."""

    NUMPY = {"_frombuffer", "_reconstruct", "ndarray", "dtype", "scalar"}
    OTHERS = {
        ("_codecs", "encode"),  # how Python 3 pickles bytes in protocol 2
        ("collections", "OrderedDict"),
        ("torch", "Size"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch._utils", "_rebuild_tensor_v2"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _storage_from_bytes
        of_numpy = module.split(".")[0] == "numpy" and name in self.NUMPY
        if of_numpy or (module, name) in self.OTHERS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"the file wants to call {module}.{name}, but a .pkl may hold numpy arrays, torch "
            "tensors and plain values only, since others could run code. If you trust the file, "
            'keep only its weights: torch.save({"model": weights}, "weights.pth").'
        )


def unreadable(value: Any, path: str) -> Iterator[str]:
    """Where in `value` is something that `load_pth` would refuse."""
    if type(value) in (torch.Tensor, str, bytes, int, float, bool, type(None)):
        return
    inner: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        inner = [(f"{path}.{key}", part) for key, part in value.items()]
        inner += [(f"{path}, a key", key) for key in value]
    elif type(value) in (list, tuple):
        inner = [(f"{path}[{i}]", part) for i, part in enumerate(value)]
    found = [place for name, part in inner for place in unreadable(part, name)]
    yield from found
    if not found and not _survives(value):
        yield f"'{path}' of type {type(value).__module__}.{type(value).__qualname__}"


def _survives(value: Any) -> bool:
    try:
        file = io.BytesIO()
        torch.save(value, file)
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    except Exception:
        return False
    return True
