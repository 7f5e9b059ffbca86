"""Samples on their way from a loader's process, each in one piece.

torch hands over each tensor as shared memory of its own, an open file for as long as the tensor
lives; two batches read ahead are then thousands, where Linux' usual limit is 1,024.
"""

from __future__ import annotations
import contextlib
import io
import pickle
import resource
from collections.abc import Callable, Iterable, Iterator
from typing import Any
import torch

OTHER_FILES = 256  # that a process may have open


class _Pickler(pickle.Pickler):
    """Plain CPU tensors as numpy arrays: torch's own way makes a zip file of each."""

    def reducer_override(self, value: Any) -> Any:
        plain = type(value) is torch.Tensor and value.layout is torch.strided
        if plain and value.device.type == "cpu" and not value.requires_grad:
            with contextlib.suppress(TypeError, RuntimeError):  # bfloat16, conjugate views
                return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def pack(sample: Any) -> bytes:
    """Goes through a pipe: no open file.

    >>> next(unpacked([pack({"image": torch.arange(3)})]))
    {'image': tensor([0, 1, 2])}
    """
    file = io.BytesIO()
    _Pickler(file, protocol=5).dump(sample)
    return file.getvalue()


def pack_shared(sample: Any) -> torch.Tensor:
    """Goes through shared memory, which is quicker: one open file until it is unpacked."""
    return torch.frombuffer(bytearray(pack(sample)), dtype=torch.uint8)


def packer(in_flight: int) -> Callable[[Any], Any]:
    """The quicker one that the limit of open files allows.

    Args:
        in_flight: samples that are read ahead.
    """
    # Two for each: the memory's, and the one that waits to be fetched.
    return pack_shared if 2 * in_flight + OTHER_FILES < raise_open_files() else pack


def unpacked(samples: Iterable[Any]) -> Iterator[Any]:
    for sample in samples:
        yield pickle.loads(sample if isinstance(sample, bytes) else sample.numpy().data)


def raise_open_files() -> float:
    """This process's limit of open files, raised to what it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return float("inf") if soft == resource.RLIM_INFINITY else soft
