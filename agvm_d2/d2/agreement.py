"""Workers that do not train the same run find out before the first iteration.

DistributedDataParallel averages gradients, whatever each worker then does with them: with another
learning rate, seed or batch the weights drift apart without a word.
"""

from __future__ import annotations
import functools
import os
import re
import zlib
from collections.abc import Mapping
from typing import Any
import detectron2
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import agvm_d2

# Each machine may have its own, by the last part of a key. What files of weights hold is compared.
OWN = {"OUTPUT_DIR", "NUM_WORKERS", "WEIGHTS", "DEVICE"}
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
SHOWN = 12  # keys in a message


def check_agreement(what: Mapping[str, Any]) -> None:
    """All workers call this with the same names; values are compared by what they look like.

    Raises:
        ValueError: on all workers; names what differs, and who has which value.
    """
    if comm.get_world_size() == 1:
        return
    mine = {name: _text(value) for name, value in what.items()}
    if len(set(comm.all_gather(zlib.crc32(repr(sorted(mine.items())).encode())))) == 1:
        return
    found = comm.all_gather(mine)
    names = [n for n in dict.fromkeys(n for d in found for n in d) if _differs(n, found)]
    lines = [f"{name}: {_who_has(name, found)}" for name in names[:SHOWN]]
    more = f"\n  and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    raise ValueError(
        "The workers do not agree, and would train different models. Give all of them the same "
        "command, config and code:\n  " + "\n  ".join(lines) + more
    )


def _differs(name: str, found: list[dict[str, str]]) -> bool:
    return len({d.get(name) for d in found}) > 1


def _who_has(name: str, found: list[dict[str, str]]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, values in enumerate(found):
        value = values.get(name, "nothing")
        ranks.setdefault(value if len(value) <= 80 else f"{value[:77]}...", []).append(rank)
    return "; ".join(f"{value} on {_ranks(r)}" for value, r in ranks.items())


def _ranks(ranks: list[int]) -> str:
    """[0, 1, 2, 5] -> "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def _text(value: Any) -> str:
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return ADDRESS.sub("", repr(value))


def flat(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Key -> value of a yacs config or a LazyConfig, without those that each machine may choose."""
    if isinstance(cfg, DictConfig):
        cfg = OmegaConf.to_container(cfg, resolve=False)
    found: dict[str, Any] = {}
    for key, value in cfg.items():
        name = f"{prefix}{key}"
        if str(key).upper() in OWN or name == "train.init_checkpoint":
            continue
        if isinstance(value, (dict, DictConfig)):
            found.update(flat(value, f"{name}."))
        else:
            found[name] = value
    return found


@functools.lru_cache
def code() -> dict[str, str]:
    """Versions, and a checksum of this package's files."""
    folder, checksum = os.path.dirname(os.path.abspath(agvm_d2.__file__)), 0
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(n for n in names if n.endswith(".py")):
            with open(os.path.join(root, name), "rb") as f:
                checksum = zlib.crc32(name.encode() + f.read(), checksum)
    return {
        "version of agvm_d2": f"{agvm_d2.__version__} (files {checksum:08x})",
        "version of detectron2": detectron2.__version__,
        "version of torch": torch.__version__,
    }


class AgreementHook(HookBase):
    """The workers begin at one iteration, end at one, and begin with the same weights."""

    def __init__(self, model: nn.Module):
        self._model = model

    def before_train(self) -> None:
        """
        Raises:
            ValueError: they do not.
        """
        what = {"first iteration": self.trainer.start_iter, "end": self.trainer.max_iter}
        if isinstance(self._model, DistributedDataParallel):  # a sharded one differs
            what["weights at the start"] = weights(self._model)
        check_agreement(what)


def weights(model: nn.Module) -> str:
    """A checksum of all parameters."""
    checksum = 0
    for parameter in model.parameters():
        data = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
        checksum = zlib.crc32(data.numpy().data, checksum)
    return f"checksum {checksum:08x}"
