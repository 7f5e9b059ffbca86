"""Checkpoints that survive: written aside and renamed, and read without unpickling code."""

from __future__ import annotations
import os
import pickle
import shutil
import socket
import tempfile
from collections.abc import Callable
from typing import IO, Any
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm

from ..shards import is_sharded, local_part, shard_loaded, whole_state
from .weights_files import load_pkl, load_pth, unreadable, what_is_broken


class AtomicCheckpointer(DetectionCheckpointer):
    """DetectionCheckpointer whose files are whole or not there.

    A checkpoint is written to a .part file of this process, flushed to disk, read back and renamed;
    `last_checkpoint` follows the same way, after it. Killed at any moment, or on a full disk, the
    one before stays. A remote `save_dir` (s3://, whatever Detectron2's PathManager has a handler
    for) gets each file in one piece, as atomically as its handler closes a file.

    Of a sharded model (FSDP2) all workers call `save`, and the file is the same as of a whole one.

        checkpointer = AtomicCheckpointer(model, "output", trainer=trainer)
        checkpointer.resume_or_load(weights, resume=True)
        checkpointer.save("model_0000999")
    """

    def __init__(self, model: torch.nn.Module, *args: Any, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        if is_sharded(self.model):
            self.model.register_load_state_dict_pre_hook(shard_loaded)

    def save(self, name: str, **kwargs: Any) -> None:
        """Write NAME.pth, then make `last_checkpoint` name it.

        Raises:
            OSError: the disk is full or cannot be written; nothing older is touched.
            FloatingPointError: the model holds NaN or inf; a run could not go on from it.
            TypeError: something to save could not be read back, named by its place.
        """
        sharded = is_sharded(self.model)
        if not self.save_dir or not (self.save_to_disk or sharded):
            return
        data = {"model": self.model.state_dict()}
        # A buffer may hold -inf, as a mask does.
        params = [(key, local_part(p)) for key, p in self.model.named_parameters()]
        bad = [key for key, p in params if not p.isfinite().all()]
        bad += [key for key, buffer in self.model.named_buffers() if buffer.isnan().any()]
        if sharded:  # all workers raise, or none
            bad = [key for keys in comm.all_gather(bad) for key in keys]
        if bad:
            raise FloatingPointError(
                f"'{bad[0]}' of the model holds NaN or inf: checkpoint {name} is not written. The "
                f"last whole one is {self._last_whole()}."
            )
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
        data.update(kwargs)
        if sharded:
            data = whole_state(data, keep=self.save_to_disk)
            failed: Exception | None = None
            try:
                if self.save_to_disk:
                    self._save(name, data)
            except (OSError, TypeError) as error:
                failed = error
            told = "".join(comm.all_gather(str(failed or "")))  # all workers raise, or none
            if told:
                raise failed or OSError(told)
        else:
            self._save(name, data)

    def _save(self, name: str, data: dict[str, Any]) -> None:
        basename = f"{name}.pth"
        path = os.path.join(self.save_dir, basename)
        self.logger.info(f"Saving checkpoint to {path}")
        try:
            self._write(path, lambda f: torch.save(data, f), check=_check_readable)
        except (pickle.PickleError, AttributeError, TypeError) as error:
            places = [place for key in data for place in unreadable(data[key], key)]
            raise TypeError(
                f"The checkpoint '{path}' is not written: {', '.join(places[:3]) or error} could "
                "not be read back. Let the state_dict() that it is in return tensors, numbers, "
                "strings, lists and dicts (.item() of a numpy number, torch.as_tensor of an "
                "array), or allow the class with torch.serialization.add_safe_globals."
            ) from error
        self.tag_last_checkpoint(basename)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        self._write(path, lambda f: f.write(last_filename_basename.encode()))

    def _write(
        self,
        path: str,
        write: Callable[[IO[bytes]], Any],
        check: Callable[[str], Any] = lambda part: None,
    ) -> None:
        remote = "://" in path
        if remote:
            folder = tempfile.mkdtemp(prefix="checkpoint-")
            part = os.path.join(folder, "part")
        else:  # a name that no other process has
            part = f"{path}.{socket.gethostname()}-{os.getpid()}.part"
        try:
            with open(part, "wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            check(part)
            if remote:  # an object store shows the file once it is closed
                with open(part, "rb") as source, self.path_manager.open(path, "wb") as target:
                    shutil.copyfileobj(source, target)
            else:
                os.replace(part, path)
                _sync_folder(os.path.dirname(path))
        except (OSError, RuntimeError) as error:  # torch's writer turns ENOSPC into RuntimeError
            raise OSError(
                f"The checkpoint '{path}' cannot be written ({error}). The last whole one stays "
                f"as it is: {self._last_whole()}. Make room, then go on with --resume."
            ) from error
        finally:
            if remote:
                shutil.rmtree(folder, ignore_errors=True)
            elif os.path.exists(part):
                os.remove(part)

    def _last_whole(self) -> str:
        try:
            return self.get_checkpoint_file() or "none yet"
        except ValueError:
            return "none"

    # What to go on from.

    def has_checkpoint(self) -> bool:
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """The checkpoint that `last_checkpoint` names, or, where that is missing or damaged, the
        whole one of the latest iteration; "" where there is none.

        Raises:
            ValueError: there are checkpoints, and none is whole.
        """
        if not self.save_dir:
            return ""
        tagged, name = self._tagged()
        named = os.path.join(self.save_dir, name)
        wrong = (
            (self._what_is_wrong(named) if name else "it names no file of this folder")
            if tagged
            else ""
        )
        if tagged and not wrong:
            return named
        why = f"'{named}', which last_checkpoint names: {wrong}" if name else ""
        why = why or (f"last_checkpoint: {wrong}" if tagged else "there is no last_checkpoint")
        damaged, found = [], []
        for path in self._all_files():
            try:
                iteration = _iteration(self.path_manager.get_local_path(path))
            except Exception as error:
                damaged.append(f"'{path}': {str(error).splitlines()[0]}")
            else:
                found += [(iteration, path)] if iteration is not None else []
        for _, path in sorted(found, reverse=True):
            wrong = self._what_is_wrong(path)
            if not wrong:
                self.logger.warning(f"{why}. Going on from the newest whole checkpoint: {path}")
                return path
            damaged.append(f"'{path}': {wrong}")
        if damaged or tagged:
            raise ValueError(
                f"No checkpoint in '{self.save_dir}' can be gone on from: "
                f"{'; '.join(damaged[:3]) or why}. Put a whole one "
                "there, or train anew, without --resume."
            )
        return ""

    def _tagged(self) -> tuple[bool, str]:
        """Is there a last_checkpoint, and the file name in it, if it is one."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        try:
            if not self.path_manager.isfile(path):
                return False, ""
            with self.path_manager.open(path, "rb") as f:
                name = f.read(4096).decode().strip()
        except (OSError, UnicodeDecodeError):
            return True, ""
        good = name.isprintable() and os.path.basename(name) == name
        return True, name if good else ""

    def _what_is_wrong(self, path: str) -> str:
        try:
            if not self.path_manager.isfile(path):
                return "it is not there"
            return what_is_broken(self.path_manager.get_local_path(path))
        except OSError as error:
            return str(error)

    def _all_files(self) -> list[str]:
        try:
            return sorted(self.get_all_checkpoint_files())
        except OSError:  # no such folder yet
            return []

    # Reading.

    def _load_file(self, filename: str) -> dict:
        if filename.endswith(".pkl"):  # the model zoo's: arrays in a dict
            data = load_pkl(filename)
            if not isinstance(data, dict):
                raise ValueError(
                    f"MODEL.WEIGHTS (train.init_checkpoint): '{filename}' holds no dict of weights."
                )
            if "model" in data and "__author__" in data:
                return data
            data = data.get("blobs", data)
            data = {k: v for k, v in data.items() if not k.endswith("_momentum")}
            return {"model": data, "__author__": "Caffe2", "matching_heuristics": True}
        if filename.endswith(".pyth"):  # pycls'
            state = self._torch_load(filename).get("model_state")
            if state is None:
                raise ValueError(
                    f"MODEL.WEIGHTS (train.init_checkpoint): '{filename}' has no 'model_state', "
                    "which pycls' .pyth files have. Give a file of another kind the name .pth."
                )
            state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
            return {"model": state, "__author__": "pycls", "matching_heuristics": True}
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
            ValueError: not a checkpoint, a damaged one, or one that holds more than tensors and
                plain values.
        """
        # Of a sharded model each worker takes its part alone into memory.
        data = load_pth(f, self.save_dir, mapped=is_sharded(self.model))
        if not isinstance(data, dict):
            raise ValueError(f"The checkpoint '{f}' holds no dict of weights.")
        return data


def iterations_done(folder: str) -> int | None:
    """Of the checkpoint in a run's folder that `--resume` goes on from; None where there is none.

    Raises:
        ValueError: see `AtomicCheckpointer.get_checkpoint_file`.
    """
    checkpointer = AtomicCheckpointer(torch.nn.Module(), folder, save_to_disk=False)
    path = checkpointer.get_checkpoint_file()
    if not path:
        return None
    iteration = _iteration(checkpointer.path_manager.get_local_path(path))
    return 0 if iteration is None else iteration + 1


def _check_readable(path: str) -> None:
    """Raises UnpicklingError, as reading would. Tensors are mapped, so not read again."""
    torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _iteration(path: str) -> int | None:
    """Of a checkpoint to go on from; None for weights alone."""
    if not os.path.getsize(path):
        raise ValueError("it is empty")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # of torch before 1.6: cannot be mapped
        data = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(data, dict):
        return None
    iteration = data.get("iteration", (data.get("trainer") or {}).get("iteration"))
    return iteration if isinstance(iteration, int) else None


def _sync_folder(folder: str) -> None:
    """So that a rename survives a power cut."""
    try:
        descriptor = os.open(folder or ".", os.O_RDONLY)
    except OSError:  # not everywhere can a folder be opened
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
