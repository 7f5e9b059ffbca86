"""CUDA's streams without a GPU: everything runs on the CPU, and what a stream has waited for is
written down (vector clocks). A use of memory that nothing orders after another stream's is a race.
"""

from __future__ import annotations
import contextlib
import itertools
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Event = dict[str, int]  # stream -> how many of its uses of memory came before


def _tensors(values) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class Streams(TorchDispatchMode):
    """`races` says of each race what was done where, and who had used the memory."""

    def __init__(self):
        super().__init__()
        self.races: list[str] = []
        self.current = "main"
        self._seen: dict[str, Event] = {}  # of each stream; its own entry counts its uses
        self._write: dict[int, tuple[str, int]] = {}  # the last one of each storage
        self._reads: dict[int, Event] = {}  # since then
        self._kept: list[torch.UntypedStorage] = []  # so that no address comes twice

    @contextlib.contextmanager
    def on(self, stream: str):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def event(self) -> Event:
        """All that the current stream has done and waited for."""
        return dict(self._seen.get(self.current, {}))

    def wait(self, event: Event) -> None:
        """The current stream goes on after `event` only."""
        seen = self._seen.setdefault(self.current, {})
        for stream, count in event.items():
            seen[stream] = max(seen.get(stream, 0), count)

    def use(self, tensor: torch.Tensor, what: str, writes: bool) -> None:
        """The current stream reads or writes `tensor`."""
        storage = tensor.untyped_storage()
        self._kept.append(storage)
        key = storage._cdata
        seen = self._seen.setdefault(self.current, {})
        reads = self._reads.setdefault(key, {})
        for stream, count in [self._write.get(key, ("", 0)), *(reads.items() if writes else ())]:
            if stream != self.current and seen.get(stream, 0) < count:
                self.races.append(f"{what} on {self.current}, unordered after {stream}")
        seen[self.current] = count = seen.get(self.current, 0) + 1
        if writes:
            self._write[key] = self.current, count
            reads.clear()
        else:
            reads[self.current] = count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = func._schema
        views = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        if views:  # touches no memory
            return result
        known = set()
        for i, argument in enumerate(schema.arguments):
            writes = bool(argument.alias_info and argument.alias_info.is_write)
            for tensor in _tensors(args[i] if i < len(args) else kwargs.get(argument.name)):
                known.add(tensor.untyped_storage()._cdata)
                self.use(tensor, str(func), writes)
        for tensor in _tensors(result):
            if tensor.untyped_storage()._cdata not in known:
                self.use(tensor, str(func), writes=True)
        return result


class CudaFuture:
    """The rules of c10's futures: done at once for the CPU, with events for who waits; a callback
    runs on a stream of its own. Only a value with tensors has events (`markCompleted`)."""

    _numbers = itertools.count()

    def __init__(self, streams: Streams, value):
        self._streams, self._value = streams, value
        self._event = streams.event() if _tensors(value) else {}

    def value(self):
        return self._value

    def wait(self):
        self._streams.wait(self._event)
        return self._value

    def then(self, callback) -> CudaFuture:
        with self._streams.on(f"pool {next(self._numbers)}"):
            self._streams.wait(self._event)
            return CudaFuture(self._streams, callback(self))


class _Work:
    def __init__(self, future: CudaFuture):
        self.get_future = lambda: future


def nccl(streams: Streams, group: str, workers: int):
    """A sum over so many workers, all with the same numbers, on the stream of their group."""

    def collective(tensor, *args, async_op=False, **kwargs):
        event = streams.event()
        with streams.on(f"nccl {group}"):
            streams.wait(event)
            tensor.mul_(workers)
            future = CudaFuture(streams, [tensor])
        return _Work(future) if async_op else future.wait() and None

    return collective


class Bucket:
    """DDP's GradBucket of these parameters."""

    def __init__(self, params: list[torch.nn.Parameter]):
        self._params = params
        self._buffer = torch.randn(sum(p.numel() for p in params))

    def buffer(self) -> torch.Tensor:
        return self._buffer

    def parameters(self) -> list[torch.nn.Parameter]:
        return self._params

    def gradients(self) -> list[torch.Tensor]:
        parts = self._buffer.split([p.numel() for p in self._params])
        return [part.view_as(p) for part, p in zip(parts, self._params)]
