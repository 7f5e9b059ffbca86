"""Checkpoints that survive: written aside and renamed, and read without unpickling code."""

from __future__ import annotations
import os
import pickle
from collections.abc import Callable
from typing import IO, Any
import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer


class AtomicCheckpointer(DetectionCheckpointer):
    """DetectionCheckpointer whose files are whole or not there.

    A checkpoint is written to NAME.part, flushed to disk and renamed; `last_checkpoint` follows the
    same way, after it. Killed at any moment, or on a full disk, the one before stays.

        checkpointer = AtomicCheckpointer(model, "output", trainer=trainer)
        checkpointer.resume_or_load(weights, resume=True)
        checkpointer.save("model_0000999")
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Write NAME.pth, then make `last_checkpoint` name it.

        Raises:
            OSError: the disk is full or cannot be written; nothing older is touched.
            FloatingPointError: the model holds NaN or inf; a run could not go on from it.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        # A buffer may hold -inf, as a mask does.
        bad = [key for key, p in self.model.named_parameters() if not p.isfinite().all()]
        bad += [key for key, buffer in self.model.named_buffers() if buffer.isnan().any()]
        if bad:
            raise FloatingPointError(
                f"'{bad[0]}' of the model holds NaN or inf: checkpoint {name} is not written. The "
                f"last whole one is {self.get_checkpoint_file() or 'none yet'}."
            )
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
        data.update(kwargs)
        basename = f"{name}.pth"
        path = os.path.join(self.save_dir, basename)
        self.logger.info(f"Saving checkpoint to {path}")
        self._write(path, lambda f: torch.save(data, f))
        self.tag_last_checkpoint(basename)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        self._write(path, lambda f: f.write(last_filename_basename.encode()))

    def _write(self, path: str, write: Callable[[IO[bytes]], Any]) -> None:
        part = path + ".part"
        try:
            with open(part, "wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # torch's writer turns ENOSPC into RuntimeError
            if os.path.exists(part):
                os.remove(part)
            last = self.get_checkpoint_file() or "none yet"
            raise OSError(
                f"The checkpoint '{path}' cannot be written ({error}). The last whole one stays "
                f"as it is: {last}. Make room, then go on with --resume."
            ) from error

    def _load_file(self, filename: str) -> dict:
        if filename.endswith(".pkl"):  # the model zoo's: numpy arrays in a dict
            with open(filename, "rb") as f:
                data = _ArraysUnpickler(f, encoding="latin1").load()
            if "model" in data and "__author__" in data:
                return data
            data = data.get("blobs", data)
            data = {k: v for k, v in data.items() if not k.endswith("_momentum")}
            return {"model": data, "__author__": "Caffe2", "matching_heuristics": True}
        data = super()._load_file(filename)
        state = data.get("trainer")
        if isinstance(state, dict):  # hooks are saved by their class; this one's name has changed
            states = state.get("hooks", {})
            if "RandomState" in states:
                states["IterationSeeder"] = states.pop("RandomState")
        return data

    def _torch_load(self, f: str) -> dict:
        """
        Raises:
            ValueError: not a checkpoint, or one that holds more than tensors and plain values.
        """
        try:
            return torch.load(f, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"The checkpoint '{f}' cannot be read: {str(error).splitlines()[0]} Only files of "
                "tensors and plain values are loaded, since others could run code; "
                "torch.serialization.add_safe_globals lets in classes that you trust."
            ) from error


class _ArraysUnpickler(pickle.Unpickler):
    """Numpy arrays and plain values only."""

    ALLOWED = {"_reconstruct", "ndarray", "dtype", "scalar"}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self.ALLOWED:
            if name in ("ndarray", "dtype"):
                return getattr(np, name)
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 pickles bytes in protocol 2
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"MODEL.WEIGHTS: the file wants to call {module}.{name}; a .pkl may hold numpy arrays "
            "and plain values only."
        )
