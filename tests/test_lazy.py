"""train_net.py with a LazyConfig."""

import os
import re
import pytest
import torch
from test_train_net import args, command, read

import train_net

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VITDET = os.path.join(
    ROOT, "configs/Digits-InstanceSegmentation/mask_rcnn_vitdet_thin_6ep_bs16_agvm.py"
)
SHORT = (
    "dataloader.train.total_batch_size=8 train.micro_batch_size=2 train.max_iter=4 "
    "dataloader.train.num_workers=0 dataloader.test.num_workers=0 agvm.start_iter=1 "
    "agvm.interval=1 train.expected_results=[]"
).split()


@pytest.fixture(autouse=True)
def needs_timm():
    pytest.importorskip("timm")


def factors(path):
    return torch.load(path, weights_only=True)["trainer"]["hooks"]["AGVMHook"]["factors"]


def test_train_resume_and_eval_only(digits, tmp_path):
    out = command(
        "--config-file", VITDET, *SHORT, "train.clip_gradients.iter_range=[0,3]",
        f"train.output_dir={tmp_path}/a",
    )  # fmt: skip
    assert "K = 1 workers x 4 micro-batches = 4 gradients" in out
    assert re.search(r"Evaluation results for segm", out)
    scalars = {k for row in read(tmp_path / "a" / "metrics.json") for k in row}
    assert {"agvm/variance/mask_head", "agvm/lr_scale/backbone", "segm/AP"} <= scalars
    final = tmp_path / "a" / "model_final.pth"
    before = factors(final)
    assert before != [1.0] * len(before)

    out = command(
        "--config-file", VITDET, "--resume", *SHORT, "train.max_iter=6", "agvm.interval=1000",
        f"train.output_dir={tmp_path}/a",
    )  # fmt: skip
    assert "Starting training from iteration 4" in out and factors(final) == before

    out = command(
        "--config-file", VITDET, "--eval-only", *SHORT, f"train.init_checkpoint={final}",
        f"train.output_dir={tmp_path}/b",
    )  # fmt: skip
    last = [row["segm/AP"] for row in read(tmp_path / "a" / "metrics.json") if "segm/AP" in row][-1]
    found = re.search(r"copypaste: Task: segm\n.*\n.*copypaste: (\S+?),", out).group(1)
    assert last == pytest.approx(float(found), abs=1e-3)


def test_a_resumed_run_is_exact(digits, tmp_path):
    from agvm_d2.d2 import lazy

    def run(folder, *more):
        cfg = lazy.load(
            VITDET,
            [
                *SHORT,
                "train.max_iter=6",
                "train.checkpointer.period=3",
                f"train.output_dir={folder}",
            ]
            + ["dataloader.train.mapper.augmentations=[]", *more],
        )
        del cfg.dataloader["evaluator"]
        lazy.do_train(cfg, resume=True)
        return torch.load(folder / "model_final.pth", weights_only=True)

    whole = run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "model_0000002.pth").rename(tmp_path / "b" / "model_0000002.pth")
    (tmp_path / "b" / "last_checkpoint").write_text("model_0000002.pth")
    again = run(tmp_path / "b", "dataloader.train.num_workers=1")
    assert whole["trainer"]["hooks"] == again["trainer"]["hooks"]
    for name, value in whole["model"].items():
        assert torch.equal(value, again["model"][name]), name


def test_two_workers_without_agvm(digits, tmp_path):
    out = command(
        "--config-file", VITDET, "--num-gpus", 2, "--dist-url", "auto", *SHORT,
        "agvm.enabled=False", "train.max_iter=2", f"train.output_dir={tmp_path}",
    )  # fmt: skip
    assert "AGVM" not in re.sub(r"agvm_d2|agvm=|AGVMHook", "", out).split("Starting training")[1]
    assert not any("agvm" in key for row in read(tmp_path / "metrics.json") for key in row)


@pytest.mark.parametrize(
    "opts, message",
    [
        (["train.maxiter=3"], "the override 'train.maxiter=3' does not fit: .* 'train.maxiter'"),
        (["trian.max_iter=3"], "'trian.max_iter'"),
        (["SOLVER.MAX_ITER", "3"], "does not fit"),
        (["train.max_iter=[1"], "config: overrides"),
        (["train.micro_batch_size=3"], "train.micro_batch_size: found 3, .*total_batch_size 16"),
        (["dataloader.train.dataset.names=digit"], "'digit' is not a registered dataset"),
        (["train.init_checkpoint=no.pth"], "train.init_checkpoint: 'no.pth' is not there"),
        (["agvm.intervall=3"], "agvm.intervall: there is no such key; there are anchor, "),
        (["agvm.modules=null"], "agvm.modules: found None"),
        (["agvm=null"], "agvm: found None, but it must be a dict"),
        (["agvm.log_period=0"], "agvm.log_period: found 0"),
        (["agvm.start_iter=-1"], "agvm.start_iter: a LazyConfig must name"),
        (["train.max_iter=abc"], "train.max_iter: found 'abc'"),
        (["train.clip_gradients.clip_type=foo"], "train.clip_gradients.clip_type: found 'foo'"),
        (["dataloader.train.num_workers=-1"], "dataloader.train.num_workers: found -1"),
        (["agvm.interval=0"], "agvm.interval: found 0, .*at least 1"),
        (["agvm.mode=on"], "agvm.mode: found 'on', .*modulate, monitor"),
        (["agvm.ratio_range=[2,3]"], "agvm.ratio_range: found .2, 3."),
        (["agvm.rule=agvm"], "agvm.rule: found 'agvm', .*variance, gain"),
        (["agvm.base_batch_size=0"], "agvm.base_batch_size: found 0"),
        (["agvm.modules=[[a,b,c]]"], "agvm.modules: found ..'a', 'b', 'c'"),
        (["train.on_nonfinite=ignore"], "train.on_nonfinite: found 'ignore', .*stop, skip"),
        (["train.amp.enabled=True"], "train.amp.enabled: found True, .*CUDA"),
        (["train.device=cuda"], "train.device: found 'cuda', .*train.device=cpu"),
    ],
)
def test_bad_overrides(opts, message, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises((ValueError, OSError), match=message):
        train_net.setup(args(f"train.output_dir={tmp_path}/out", *opts, config=VITDET))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "source, message",
    [
        ("x = 1 +", "c.py': SyntaxError"),
        ("import no_such_package", "c.py': ModuleNotFoundError: No module named 'no_such"),
        ("train = dict(device='cpu')", "The config has no 'model'"),
    ],
)
def test_bad_files(source, message, tmp_path):
    (tmp_path / "c.py").write_text(source)
    with pytest.raises(ValueError, match=message):
        train_net.setup(args(config=str(tmp_path / "c.py")))


def test_a_stock_config_is_told_what_it_lacks(tmp_path):
    from detectron2.model_zoo import get_config_file

    stock = get_config_file("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py")
    with pytest.raises(ValueError, match="no 'agvm': .*dict.enabled=False. trains without"):
        train_net.setup(args(config=stock))
