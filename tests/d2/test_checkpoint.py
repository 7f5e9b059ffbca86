import os
import pickle
import socket
import numpy as np
import pytest
import torch
from toy import ToyDetector
from toy_d2 import ToyTrainer, toy_config

from agvm_d2.d2.checkpoint import AtomicCheckpointer


@pytest.fixture
def saved(tmp_path):
    """A checkpointer with one whole checkpoint."""
    checkpointer = AtomicCheckpointer(ToyDetector(), str(tmp_path))
    checkpointer.save("model_0", iteration=0)
    return checkpointer


def whole(folder) -> dict:
    name = (folder / "last_checkpoint").read_text()
    return torch.load(folder / name, weights_only=True)


def test_save_and_load(saved, tmp_path):
    other = AtomicCheckpointer(ToyDetector(seed=1), str(tmp_path))
    assert other.resume_or_load("", resume=True)["iteration"] == 0
    for a, b in zip(saved.model.parameters(), other.model.parameters()):
        assert torch.equal(a, b)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0.pth"]


@pytest.mark.parametrize("kind", [OSError, RuntimeError])  # the second is some versions of torch's
def test_a_failed_write_keeps_the_last_one(saved, tmp_path, monkeypatch, kind):
    def full(data, f):
        f.write(b"half")
        raise kind(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="model_1.pth' cannot be written .*No space.*model_0.pth"):
        saved.save("model_1")
    assert whole(tmp_path)["iteration"] == 0
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0.pth"]


def part_of(path):
    """Where this process writes a file before it is whole."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.part")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("num_extra", [0, 10**6])  # less than a file's buffer, and more
def test_a_full_disk(saved, tmp_path, num_extra):
    """/dev/full answers each write as a full disk does."""
    part_of(tmp_path / "model_1.pth").symlink_to("/dev/full")
    with pytest.raises(OSError, match="model_1.pth' cannot be written .*model_0.pth. Make room"):
        saved.save("model_1", extra=torch.zeros(num_extra))
    assert whole(tmp_path)["iteration"] == 0
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0.pth"]


def test_a_full_disk_for_the_last_name_only(saved, tmp_path):
    part_of(tmp_path / "last_checkpoint").symlink_to(tmp_path / "no" / "such")
    with pytest.raises(
        OSError, match="last_checkpoint' cannot be written .*model_0.pth. Make room"
    ):
        saved.save("model_1")
    assert whole(tmp_path)["iteration"] == 0


def test_weights_with_nan_are_not_saved(saved, tmp_path):
    with torch.no_grad():
        saved.model.proposal_generator.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="'proposal_generator.bias' .*model_0.pth"):
        saved.save("model_1")
    assert whole(tmp_path)["iteration"] == 0


def test_statistics_with_nan_are_not_saved_but_masks_are(tmp_path):
    model = torch.nn.BatchNorm1d(2)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    checkpointer = AtomicCheckpointer(model, str(tmp_path))
    checkpointer.save("good")
    model.running_mean[0] = torch.nan
    with pytest.raises(FloatingPointError, match="'running_mean'"):
        checkpointer.save("bad")


def test_who_does_not_save_to_disk_writes_nothing(tmp_path):
    AtomicCheckpointer(ToyDetector(), str(tmp_path), save_to_disk=False).save("model_0")
    assert not os.listdir(tmp_path)


class Evil:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call, ("evil", ()) if self.call is np.save else ("evil",)


@pytest.mark.parametrize("call", [os.mkdir, np.save])  # numpy's functions, too
@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_nothing_that_could_run_code_is_loaded(tmp_path, suffix, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"file.{suffix}"
    if suffix == "pth":
        torch.save({"model": {}, "evil": Evil(call)}, path)
    else:
        path.write_bytes(pickle.dumps({"model": {}, "__author__": "x", "evil": Evil(call)}))
    with pytest.raises((ValueError, pickle.UnpicklingError), match="wants to call|tensors and pl"):
        AtomicCheckpointer(ToyDetector()).load(str(path))
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("protocol", [2, 4])
def test_the_model_zoos_pickles_are_loaded(tmp_path, protocol):
    model = ToyDetector()
    arrays = {k: v.numpy() + 1 for k, v in model.state_dict().items()}
    data = {"model": arrays, "__author__": "Someone", "scale": np.float32(2.0)}
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(data, protocol=protocol))
    AtomicCheckpointer(model).load(str(tmp_path / "m.pkl"))
    for key, value in model.state_dict().items():
        assert torch.equal(value, torch.from_numpy(arrays[key]))


def test_caffe2s_pickles_are_without_their_momentum(tmp_path):
    blobs = {"conv1_w": np.ones(2), "conv1_w_momentum": np.ones(2), "lr": 0.1}
    for data in ({"blobs": blobs}, blobs):
        (tmp_path / "m.pkl").write_bytes(pickle.dumps(data, protocol=2))
        found = AtomicCheckpointer(ToyDetector())._load_file(str(tmp_path / "m.pkl"))
        assert set(found["model"]) == {"conv1_w", "lr"} and found["matching_heuristics"]


def test_a_torn_file_is_named(tmp_path):
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(ValueError, match="torn.pth' cannot be read"):
        AtomicCheckpointer(ToyDetector()).load(str(tmp_path / "torn.pth"))


def test_a_state_under_the_seeders_old_name_is_found(tmp_path):
    """Hooks are saved by their class, which was RandomState before version 0.2."""
    trainer = ToyTrainer(toy_config(tmp_path, SEED=7, SOLVER__MAX_ITER=3))
    trainer.train()
    path = tmp_path / "model_final.pth"
    saved = torch.load(path, weights_only=True)
    hooks = saved["trainer"]["hooks"]
    assert hooks["IterationSeeder"] == {"seed": 7, "workers": 1}
    hooks["RandomState"] = hooks.pop("IterationSeeder")
    torch.save(saved, path)

    resumed = ToyTrainer(toy_config(tmp_path, SEED=9))
    assert resumed.state_dict()["hooks"]["IterationSeeder"]["seed"] == 9
    resumed.resume_or_load(resume=True)
    assert resumed.state_dict()["hooks"]["IterationSeeder"] == {"seed": 7, "workers": 1}
