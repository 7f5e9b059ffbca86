"""Checkpoints that are damaged, lost or not to be trusted."""

import collections
import os
import pickle
import random
import shutil
import subprocess
import sys
import numpy as np
import pytest
import torch
from detectron2.utils.file_io import PathHandler, PathManager
from toy import ToyDetector

from agvm_d2.d2 import weights_files
from agvm_d2.d2.checkpoint import AtomicCheckpointer


def saved(folder, *iterations):
    """A checkpointer whose checkpoint of iteration i holds i in each weight."""
    checkpointer = AtomicCheckpointer(ToyDetector(), str(folder))
    for i in iterations:
        with torch.no_grad():
            for p in checkpointer.model.parameters():
                p.fill_(i)
        checkpointer.save(f"model_{i:07d}", iteration=i)
    return checkpointer


def resumed(folder) -> int:
    model = ToyDetector()
    data = AtomicCheckpointer(model, str(folder)).resume_or_load("", resume=True)
    assert all((p == data.get("iteration", -1)).all() for p in model.parameters()) or not data
    return data.get("iteration", -1)


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_no_flipped_bit_loads_silently(tmp_path):
    """300 of them; those in padding and dates change nothing."""
    path = tmp_path / "w.pth"
    torch.save({"model": {f"w{i}": torch.randn(64) for i in range(6)}}, path)
    whole = path.read_bytes()
    good = weights_files.load_pth(str(path))["model"]
    refused = 0
    for bit in random.Random(0).sample(range(len(whole) * 8), 300):
        path.write_bytes(whole)
        flip(path, bit)
        weights_files._CHECKED.clear()  # the clock may not have moved
        try:
            found = weights_files.load_pth(str(path))["model"]
        except ValueError as error:
            assert "w.pth' cannot be read" in str(error)
            refused += 1
        else:
            assert found.keys() == good.keys()
            assert all(torch.equal(found[k], good[k]) for k in good)
    assert refused > 100


def test_a_damaged_last_checkpoint_falls_back(tmp_path, d2_log):
    saved(tmp_path, 9, 10, 11)
    size = (tmp_path / "model_0000011.pth").stat().st_size
    flip(tmp_path / "model_0000011.pth", size * 4)
    assert resumed(tmp_path) == 10
    assert "model_0000011.pth', which last_checkpoint names: the checksum of" in d2_log.text
    assert "Going on from the newest whole checkpoint: " in d2_log.text


@pytest.mark.parametrize(
    "tag, why",
    [
        (None, "there is no last_checkpoint"),
        (b"", "it names no file"),
        (b"\x00\xff\xfe", "it names no file"),
        (b"\n \n", "it names no file"),
        (b"../elsewhere.pth", "it names no file"),
        (b"model_0000077.pth", "model_0000077.pth', which last_checkpoint names: it is not there"),
    ],
)
def test_a_bad_last_checkpoint_falls_back(tag, why, tmp_path, d2_log):
    saved(tmp_path, 9, 10)
    os.utime(tmp_path / "model_0000010.pth", (0, 0))  # a copy loses times
    torch.save({"model": {}}, tmp_path / "pretrained.pth")  # not to go on from
    (tmp_path / "last_checkpoint").unlink()
    if tag is not None:
        (tmp_path / "last_checkpoint").write_bytes(tag)
    assert resumed(tmp_path) == 10
    assert why in d2_log.text


def test_nothing_whole_is_an_error_and_nothing_at_all_a_start(tmp_path):
    torch.save({"model": {}}, tmp_path / "pretrained.pth")
    assert resumed(tmp_path) == -1
    assert resumed(tmp_path / "not" / "there") == -1
    (tmp_path / "model_0000003.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="model_0000003.pth': it is empty.*without --resume"):
        resumed(tmp_path)
    (tmp_path / "model_0000003.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    with pytest.raises(ValueError, match="it is not there"):
        resumed(tmp_path)


def test_pycls_files_run_no_code(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("evil",)

    monkeypatch.chdir(tmp_path)
    torch.save({"model_state": {}, "evil": Evil()}, tmp_path / "m.pyth")
    with pytest.raises(ValueError, match="m.pyth' cannot be read"):
        AtomicCheckpointer(ToyDetector()).load("m.pyth")
    assert not (tmp_path / "evil").exists()
    model = ToyDetector()
    state = {k: v + 1 for k, v in model.state_dict().items()}
    torch.save({"model_state": state}, tmp_path / "m.pyth")
    AtomicCheckpointer(model).load("m.pyth")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_in_a_pkl_of_any_protocol(protocol, tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.float32(3)}
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(arrays, protocol=protocol))
    found = weights_files.load_pkl(str(tmp_path / "m.pkl"))
    assert (found["a"] == arrays["a"]).all() and found["b"] == 3


@pytest.mark.parametrize("data", [b"hello, this is a text\n", b"a" * 300, b"\x80\x02q\x00."])
def test_what_is_no_checkpoint_is_told(data, tmp_path):
    (tmp_path / "m.pth").write_bytes(data)
    with pytest.raises(ValueError, match="m.pth' cannot be read"):
        weights_files.load_pth(str(tmp_path / "m.pth"))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", [lambda t: t, torch.nn.Parameter], ids=["tensor", "parameter"])
def test_tensors_in_a_pkl(protocol, kind, tmp_path):
    """As Mask2Former's converter of Swin writes it."""
    model = ToyDetector()
    state = {k: kind(v + 1) for k, v in model.state_dict().items()}
    data = {"model": collections.OrderedDict(state), "__author__": "third_party"}
    (tmp_path / "m.pkl").write_bytes(
        pickle.dumps({**data, "matching_heuristics": True}, protocol=protocol)
    )
    AtomicCheckpointer(model).load(str(tmp_path / "m.pkl"))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


class InnerEvil:
    """A storage whose bytes are a pickle of their own."""

    def __reduce__(self):
        import io
        from torch.storage import _load_from_bytes

        class Evil:
            def __reduce__(self):
                return os.mkdir, ("evil",)

        file = io.BytesIO()
        torch.save(Evil(), file, _use_new_zipfile_serialization=False)
        return _load_from_bytes, (file.getvalue(),)


def test_the_storages_in_a_pkl_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"model": InnerEvil(), "__author__": "x"}))
    with pytest.raises(
        ValueError, match="MODEL.WEIGHTS .train.init_checkpoint.: 'm.pkl' cannot be read"
    ):
        AtomicCheckpointer(ToyDetector()).load("m.pkl")
    assert not (tmp_path / "evil").exists()
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"model": {"a": np.zeros(9)}})[:-30])
    with pytest.raises(
        ValueError, match="MODEL.WEIGHTS .train.init_checkpoint.: 'm.pkl' cannot be read"
    ):
        AtomicCheckpointer(ToyDetector()).load("m.pkl")


class Stateful:
    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"best": [1.0, self.value]}


@pytest.mark.parametrize("value", [np.float64(0.5), np.zeros(2), Stateful(1), lambda: 0])
def test_what_could_not_be_read_back_is_found_when_saving(value, tmp_path):
    checkpointer = saved(tmp_path, 1)
    checkpointer.add_checkpointable("project", Stateful(value))
    with pytest.raises(TypeError, match=r"'project.best\[1\]' of type .* could not be read back"):
        checkpointer.save("model_0000002", iteration=2)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]
    assert resumed(tmp_path) == 1


def test_an_old_torch_is_told_for_files_from_elsewhere(tmp_path, d2_log, monkeypatch):
    saved(tmp_path / "run", 1) if (tmp_path / "run").mkdir() is None else None
    shutil.copy(tmp_path / "run" / "model_0000001.pth", tmp_path / "other.pth")
    monkeypatch.setattr(weights_files, "torch_version", lambda: (2, 9))
    resumed(tmp_path / "run")
    assert "weights_only" not in d2_log.text
    AtomicCheckpointer(ToyDetector(), str(tmp_path / "run")).load(str(tmp_path / "other.pth"))
    assert "other.pth' is read by torch " in d2_log.text


WRITER = """
import sys
from toy import ToyDetector
from agvm_d2.d2.checkpoint import AtomicCheckpointer
checkpointer = AtomicCheckpointer(ToyDetector(width=256), sys.argv[1])
print("ready", flush=True)
for _ in range(15):
    checkpointer.save("model_0000001", iteration=1)
"""


@pytest.mark.integration
def test_two_processes_that_write_the_same_name_tear_nothing(tmp_path):
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.path.dirname(here)])}
    command = [sys.executable, "-W", "ignore", "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for _ in range(2)]
    for writer in writers:
        writer.stdout.readline()
    reads = 0
    while any(writer.poll() is None for writer in writers):
        if (tmp_path / "model_0000001.pth").exists():
            assert torch.load(tmp_path / "model_0000001.pth", weights_only=True)["iteration"] == 1
            reads += 1
    assert [writer.returncode for writer in writers] == [0, 0] and reads > 0
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]


class Bucket(PathHandler):
    """A store that has a file once it is closed, and knows nothing of renaming."""

    def __init__(self, root):
        super().__init__()
        self.root = root

    def _get_supported_prefixes(self):
        return ["bucket://"]

    def _where(self, path):
        return os.path.join(self.root, path[len("bucket://") :])

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        return open(self._where(path), mode)

    def _get_local_path(self, path, force=False, **kwargs):
        return self._where(path)

    def _isfile(self, path, **kwargs):
        return os.path.isfile(self._where(path))

    def _exists(self, path, **kwargs):
        return os.path.exists(self._where(path))

    def _ls(self, path, **kwargs):
        return os.listdir(self._where(path))


def test_a_remote_folder(tmp_path):
    PathManager.register_handler(Bucket(str(tmp_path)), allow_override=True)
    (tmp_path / "run").mkdir()
    saved("bucket://run", 1, 2)
    names = ["last_checkpoint", "model_0000001.pth", "model_0000002.pth"]
    assert sorted(os.listdir(tmp_path / "run")) == names
    assert resumed("bucket://run") == 2
    (tmp_path / "run" / "last_checkpoint").write_bytes(b"")
    assert resumed("bucket://run") == 2
