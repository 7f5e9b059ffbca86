"""Squared norms of gradients: exact to 1e-8, and the same bits whatever the order of arrival."""

from __future__ import annotations
from collections.abc import Sequence
import torch
from torch import nn

from .precondition import Precondition

# A CPU's float32 norm loses digits over millions of elements (5e-3 at 40 M); blocks of this size
# combined in float64 are good to 1e-8 and no slower. CUDA's multi-tensor norm has its own blocks.
BLOCK = 4096

Modules = dict[str, list[nn.Parameter]]


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`'s elements in one dimension, in any order; a view where it is contiguous or
    channels-last, else a copy.

    Raises:
        ValueError: a sparse one.
    """
    if tensor.layout != torch.strided:
        raise ValueError(
            f"A parameter of shape {tuple(tensor.shape)} has a sparse gradient, as of nn.Embedding("
            "sparse=True), whose norm AGVM cannot take: build it with sparse=False."
        )
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(-1)


def _multi_norm(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    try:  # one fused kernel on CUDA; not public, so with the public form beside it
        return list(torch._foreach_norm(tensors))
    except (AttributeError, RuntimeError):
        return [torch.linalg.vector_norm(t) for t in tensors]


def block_norms(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """For each tensor, norms of its blocks (1-D, float32 or wider): |t|^2 = sum of squares."""
    norms: list[list[torch.Tensor]] = [[] for _ in tensors]
    small, owner = [], []
    for i, tensor in enumerate(tensors):
        flat = _flat(tensor)
        if flat.dtype in (torch.float16, torch.bfloat16):
            flat = flat.float()  # squares would overflow
        rows = flat.numel() // BLOCK if flat.device.type == "cpu" else 0
        if rows:
            head = flat[: rows * BLOCK].view(rows, BLOCK)
            norms[i].append(torch.linalg.vector_norm(head, dim=1))
        if flat.numel() > rows * BLOCK:
            small.append(flat[rows * BLOCK :])
            owner.append(i)
    if small:  # an empty list raises
        for i, norm in zip(owner, _multi_norm(small), strict=True):
            norms[i].append(norm.view(1))
    return norms


class ModuleNorms:
    """Squared norm of each module's gradient, gathered piece by piece, summed once at the end.

    By parameter and in the modules' order, so that the sum's bits depend neither on the order in
    which gradients become ready nor on DDP's buckets, which a resumed run may lay out differently.
    """

    def __init__(self, modules: Modules, precondition: Precondition | None = None):
        self._modules, self._precondition = modules, precondition
        self._norms: dict[torch.Tensor, list[torch.Tensor]] = {}

    def add(self, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> ModuleNorms:
        """Gradients of these parameters, each with its parameter's shape."""
        if self._precondition is not None:
            grads = [self._precondition(p, g) for p, g in zip(params, grads, strict=True)]
        # Futures call back on other threads, but each for parameters of its own.
        self._norms.update(zip(params, block_norms(grads), strict=True))
        return self

    def of(self, params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The norms of these parameters' blocks; none for a parameter without a gradient."""
        return [norm for param in params for norm in self._norms.get(param, ())]

    def total(self, device: torch.device) -> torch.Tensor:
        """float64, shape (modules,)."""
        totals = torch.zeros(len(self._modules), dtype=torch.float64, device=device)
        for i, params in enumerate(self._modules.values()):
            norms = self.of(params)
            if norms:
                totals[i] = torch.cat(norms).double().square().sum()
        return totals
