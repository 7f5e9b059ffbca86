"""Training a sharded model (train.fsdp) from a LazyConfig, on real workers."""

import json
import shutil
import signal
import pytest
import torch
import torch.distributed as dist
from helpers import VITDET, agvm_state, command, needs_muon, same, start

from agvm_d2.d2 import lazy

pytest.importorskip("timm")
if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
    pytest.skip("fully_shard is public from torch 2.6 on", allow_module_level=True)

SHORT = (
    "dataloader.train.total_batch_size=8 train.micro_batch_size=2 train.max_iter=4 "
    "dataloader.train.num_workers=0 dataloader.test.num_workers=0 agvm.start_iter=1 "
    "agvm.interval=1 agvm.momentum=0.5 train.expected_results=[] train.checkpointer.period=2 "
    "dataloader.train.mapper.augmentations=[]"
).split()
FSDP = "train.fsdp={unit_size:10000}"
MUON = (
    "optimizer._target_=agvm_d2.solver.build_muon",
    "optimizer.params._target_=agvm_d2.solver.muon_params",
)


def _train(folder, *overrides):
    """The last checkpoint, and the results of its evaluation."""
    import agvm_d2.data  # noqa: F401

    cfg = lazy.load(VITDET, [*SHORT, f"train.output_dir={folder}", *overrides])
    cfg.dataloader.evaluator.output_dir = str(folder)
    lazy.check(cfg, dist.get_world_size())
    torch.manual_seed(7 + dist.get_rank())
    results = lazy.do_train(cfg, resume=True)
    dist.barrier()
    return torch.load(f"{folder}/model_final.pth", weights_only=True), results


def close(one, other, rel=1e-3):
    for name, weight in one["model"].items():
        assert torch.allclose(weight, other["model"][name], rtol=rel, atol=1e-5), name
    ours, theirs = (c["trainer"]["hooks"]["AGVMHook"]["factors"] for c in (one, other))
    assert ours == pytest.approx(theirs, rel=1e-3) and ours != [1.0] * len(ours)


def test_a_sharded_run_is_that_of_ddp(digits, workers, tmp_path):
    """From the same weights in each iteration: proposals that tie part at a difference of 1e-8."""
    still = "optimizer.lr=1e-12"
    sharded, _ = workers(2).run(_train, tmp_path / "sharded", FSDP, still)[0]
    whole, _ = workers(2).run(_train, tmp_path / "whole", still)[0]
    close(sharded, whole)
    pairs = [c["trainer"]["optimizer"]["state"].values() for c in (sharded, whole)]
    for ours, theirs in zip(*pairs, strict=True):
        assert torch.allclose(ours["exp_avg"], theirs["exp_avg"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("optimizer", [(), MUON], ids=["adamw", "muon"])
def test_a_sharded_run_goes_on_where_it_stopped(digits, workers, tmp_path, optimizer):
    if optimizer:
        needs_muon()
    options = FSDP, *optimizer
    sharded, results = workers(2).run(_train, tmp_path / "a", *options)[0]
    assert "segm" in results
    states = sharded["trainer"]["optimizer"]["state"].values()
    assert {type(v) for state in states for v in state.values()} == {torch.Tensor}  # any run's
    assert any("momentum_buffer" in state for state in states) == bool(optimizer)

    folder = _resumed(tmp_path / "a" / "model_0000001.pth", tmp_path / "b")
    again, _ = workers(2).run(_train, folder, *options)[0]
    same(sharded["model"], again["model"])
    same(sharded["trainer"]["optimizer"], again["trainer"]["optimizer"])
    same(sharded["trainer"]["hooks"]["AGVMHook"], again["trainer"]["hooks"]["AGVMHook"])


def _resumed(saved, folder):
    folder.mkdir()
    shutil.copy(saved, folder)
    (folder / "last_checkpoint").write_text(saved.name)
    return folder


@pytest.mark.parametrize(
    "num, replicas",
    [(1, 0), *(pytest.param(4, r, marks=pytest.mark.slow) for r in (0, 2))],
)
def test_another_number_of_workers_goes_on(digits, workers, tmp_path, num, replicas):
    """With steps too small to see: random numbers are another worker's."""
    workers(2).run(_train, tmp_path / "a", FSDP)
    saved = tmp_path / "a" / "model_0000001.pth"
    folder = _resumed(saved, tmp_path / "b")
    if num == 1:  # whole
        command(
            "--config-file", VITDET, "--resume", *SHORT, "optimizer.lr=1e-12",
            f"train.output_dir={folder}",
        )  # fmt: skip
        again = torch.load(folder / "model_final.pth", weights_only=True)
    else:
        options = f"{FSDP[:-1]},replicas:{replicas}}}" if replicas else FSDP
        again, _ = workers(num).run(_train, folder, options, "optimizer.lr=1e-12")[0]
    before = torch.load(saved, weights_only=True)
    for name, weight in before["model"].items():
        assert torch.allclose(weight, again["model"][name], atol=1e-8), name
    states = (c["trainer"]["optimizer"]["state"][0] for c in (before, again))
    assert [float(state["step"]) for state in states] == [2, 4]
    assert again["trainer"]["hooks"]["AGVMHook"]["num_units"] == 4


def test_bfloat16_and_activations_computed_again(digits, workers, tmp_path):
    options = "unit_size:10000,precision:bfloat16,checkpoint_activations:true"
    options += ",reshard_after_forward:false"
    trained, results = workers(2).run(_train, tmp_path / "a", f"train.fsdp={{{options}}}")[0]
    assert "segm" in results
    assert all(v.dtype == torch.float32 for v in trained["model"].values() if v.is_floating_point())
    factors = trained["trainer"]["hooks"]["AGVMHook"]["factors"]
    assert factors != [1.0] * len(factors) and all(f == f for f in factors)


def test_from_the_command_line(digits, tmp_path):
    two = ("--num-gpus", 2, "--dist-url", "auto")

    def run(folder, *flags, options=(FSDP,), ok=True):
        return command(
            "--config-file", VITDET, *flags, *SHORT, *options, f"train.output_dir={folder}",
            "model.roi_heads.box_predictor.test_score_thresh=0.0",  # or nothing is found yet
            f"dataloader.evaluator.output_dir={folder}", ok=ok,
        )  # fmt: skip

    assert "by ShardedTap" in run(tmp_path / "a", *two)

    def scores(folder):
        found = json.loads((tmp_path / folder / "coco_instances_results.json").read_text())
        return sorted((f["score"] for f in found), reverse=True)

    trained = scores("a")
    assert len(trained) > 50
    final = tmp_path / "a" / "model_final.pth"
    assert agvm_state(final)["factors"] != [1.0] * 5
    weights = f"train.init_checkpoint={final}"
    run(tmp_path / "b", *two, "--eval-only", options=(FSDP, weights))
    run(tmp_path / "c", "--eval-only", options=(FSDP, weights))
    # A gathered parameter lies elsewhere in memory than a whole one, which may change a last bit.
    for folder in ("b", "c"):
        assert scores(folder)[:50] == pytest.approx(trained[:50], rel=1e-3)
    out = run(tmp_path / "d", ok=False)
    assert "train.fsdp: there is one worker" in out and not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "moment", [pytest.param(" iter: 3 ", marks=pytest.mark.slow), "Start inference"]
)
def test_a_signal_ends_it_with_a_whole_checkpoint(digits, tmp_path, moment):
    process = start(
        "train_net.py", "--config-file", VITDET, "--num-gpus", 2, "--dist-url", "auto", *SHORT,
        FSDP, "train.max_iter=1000", "train.checkpointer.period=1000", "train.log_period=1",
        "train.eval_period=4", f"train.output_dir={tmp_path}",
    )  # fmt: skip
    lines = []
    for line in process.stdout:
        lines.append(line)
        if moment in line:
            process.send_signal(signal.SIGTERM)
            break
    out = process.communicate(timeout=600)[0]
    assert process.returncode == 75, "".join(lines)[-2000:] + out[-4000:]
    saved = torch.load(tmp_path / (tmp_path / "last_checkpoint").read_text(), weights_only=True)
    assert saved["iteration"] >= 3 and saved["trainer"]["optimizer"]["state"]
