"""A LazyConfig's checks, on one that is never built; real ones are in integration/."""

import dataclasses
import re
import bad_values
import pytest
from detectron2.model_zoo import get_config_file

from agvm_d2 import Settings
from agvm_d2.d2 import lazy

GOOD = """
model = dict()
optimizer = dict()
lr_multiplier = dict()
dataloader = dict(train=dict(total_batch_size=16, num_workers=0, dataset=dict(names="a")))
train = dict(
    max_iter=10, device="cpu", amp=dict(enabled=False), micro_batch_size=4, ddp=dict(),
    checkpointer=dict(period=5), eval_period=0, log_period=20, output_dir="x", init_checkpoint=None,
    clip_gradients=dict(clip_type="norm", clip_value=1.0), on_nonfinite="stop",
)
agvm = dict(start_iter=1)
"""


@pytest.fixture
def config(tmp_path):
    """config(override, ...): the checked LazyConfig."""
    (tmp_path / "c.py").write_text(GOOD)

    def checked(*overrides):
        cfg = lazy.load(str(tmp_path / "c.py"), list(overrides))
        lazy.check(cfg, 1)
        return cfg

    return checked


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_a_good_one(config):
    config()
    config("agvm.log_period=5", "agvm.enabled=False", "agvm.start_iter=-1")


def test_another_packages_key_that_is_off(tmp_path):
    (tmp_path / "c.py").write_text(GOOD + "train['clip_grad'] = dict(enabled=False)\n")
    lazy.check(lazy.load(str(tmp_path / "c.py"), []), 1)


@pytest.mark.parametrize("key, value, said", bad_values.CASES, ids=str)
def test_bad_agvm_values_are_named(key, value, said, config):
    with pytest.raises(ValueError, match=f"^agvm.{re.escape(key)}: {said}"):
        config(bad_values.override(key, value))


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.maxiter=3", "the override 'train.maxiter=3' does not fit: .* 'train.maxiter'"),
        ("trian.max_iter=3", "has no key 'trian.max_iter'; did you mean train.max_iter"),
        ("train.micro_batchsize=2", "did you mean train.micro_batch_size"),
        ("agvm.start_itr=2", "^agvm.start_itr: there is no .*; did you mean start_iter"),
        ("SOLVER.MAX_ITER", "does not fit"),
        ("train.max_iter=[1", "config: overrides"),
        ("train.micro_batch_size=3", "train.micro_batch_size: found 3, .*total_batch_size 16"),
        ("agvm.intervall=3", "agvm.intervall: there is no such key; there are anchor, "),
        ("agvm.modules=null", "agvm.modules: found None"),
        ("agvm=null", "agvm: found None, but it must be a dict"),
        ("agvm.enabled=1", "agvm.enabled: found 1, .*True or False"),
        ("dataloader.train.total_batch_size=null", "^dataloader.*_batch_size: found None"),
        ("agvm.log_period=0", "agvm.log_period: found 0"),
        ("agvm.start_iter=-1", "agvm.start_iter: a LazyConfig must name"),
        ("train.max_iter=abc", "train.max_iter: found 'abc'"),
        ("train.clip_gradients.clip_type=foo", "train.clip_gradients.clip_type: found 'foo'"),
        ("+train.clip_gradients={kind: norm}", "train.clip_gradients.kind: there is no such key"),
        ("train.clip_gradients.clip_value=-1", "^train.clip_gradients.clip_value: found -1, but"),
        ("train.clip_gradients.clip_value=x", "train.clip_gradients.clip_value: found 'x'"),
        (
            "train.clip_gradients={clip_type:norm,clip_value:1,norm_type:0}",
            "train.clip_gradients.norm_type: found 0, .*posit",
        ),
        (
            "train.clip_gradients={clip_type:norm,clip_value:1,iter_range:[5]}",
            "train.clip_gradients.iter_range: found .5., ",
        ),
        (
            "train.clip_gradients={clip_type:norm,clip_value:1,iter_range:[9,3]}",
            "iter_range: found .9, 3., .*first < last",
        ),
        ("train.clip_gradients=3", "train.clip_gradients: found 3, but it must be a dict"),
        ("dataloader.train.num_workers=-1", "dataloader.train.num_workers: found -1"),
        ("train.on_nonfinite=ignore", "train.on_nonfinite: found 'ignore', .*stop, skip"),
        ("train.amp.enabled=True", "train.amp.enabled: found True, .*CUDA"),
        ("train.device=cuda", "train.device: found 'cuda', .*train.device=cpu"),
        ("train.device=gpu", "train.device: found 'gpu', .*cpu, cuda or cuda:N"),
        ("train.device=0", "train.device: found 0, .*cpu, cuda or cuda:N"),
        ("train.amp=null", "^train.amp.enabled: it is missing, or None"),
        ("train.output_dir=null", "^train.output_dir: it is missing, or None"),
        ("train=null", "^train: found None, but it must be a dict"),
        ("train.seed=abc", "^train.seed: found 'abc', .*whole number"),
    ],
)
def test_bad_overrides(override, message, config):
    with pytest.raises(ValueError, match=message):
        config(override)


@pytest.mark.parametrize(
    "source, message",
    [
        ("x = 1 +", "c.py': SyntaxError"),
        ("import no_such_package", "c.py': ModuleNotFoundError: No module named 'no_such"),
        ("train = dict(device='cpu')", "The config has no 'model'"),
        (GOOD.replace("agvm =", "agvmm ="), "c.py' has no 'agvm'; did you mean agvmm?"),
        (
            GOOD.replace("micro_batch_size", "micro_batchsize"),
            "^train.micro_batchsize: there is no",
        ),
        (GOOD.replace("on_nonfinite", "on_nonfinit"), "did you mean on_nonfinite"),
        (GOOD.replace("clip_gradients", "clip_grad"), "^train.clip_grad: .*did you mean clip_grad"),
        (GOOD.replace("max_iter", "iterations"), "^train.max_iter: it is missing, or None"),
    ],
)
def test_bad_files(source, message, tmp_path):
    (tmp_path / "c.py").write_text(source)
    with pytest.raises(ValueError, match=message):
        lazy.check(lazy.load(str(tmp_path / "c.py"), []), 1)


@pytest.mark.parametrize("names", ["None", "5"])
def test_names_that_are_none(names, tmp_path):
    (tmp_path / "c.py").write_text(GOOD.replace('names="a"', f"names={names}"))
    cfg = lazy.load(str(tmp_path / "c.py"), [])
    with pytest.raises(ValueError, match=f"dataloader.train.dataset.names: found {names}, "):
        lazy.dataset_names(cfg, eval_only=False)


def test_no_file():
    with pytest.raises(FileNotFoundError, match="--config-file: 'no.py' is not a file"):
        lazy.load("no.py", [])


STOCK = get_config_file("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py")
CPU = ["train.device=cpu", "train.amp.enabled=False"]


def test_a_stock_config_has_agvm_from_the_end_of_its_warm_up_on():
    stock = lazy.load(STOCK, CPU)
    lazy.check(stock, 2)
    # Of 184,375 iterations 500 are warm-up.
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    assert stock.agvm == {"enabled": True, **defaults, "start_iter": 600}
    assert lazy.load(STOCK, ["train.max_iter=36875"]).agvm.start_iter == 200
    assert lazy.load(STOCK, ["agvm.schedule=gain"]).agvm.start_iter == -1
    with pytest.raises(ValueError, match="no 'agvm': .*dict.enabled=False. trains without"):
        lazy.check(lazy.read(STOCK), 1)


def test_clipping_needs_a_type_and_a_value():
    cfg = lazy.load(STOCK, [*CPU, "train.clip_gradients={clip_type:norm}"])
    with pytest.raises(ValueError, match="train.clip_gradients.clip_value: it is missing"):
        lazy.check(cfg, 2)


def test_a_stock_config_is_evaluated_also_without_a_coco_file():
    evaluator = lazy.load(STOCK, [*CPU, "train.output_dir=out"]).dataloader.evaluator
    assert evaluator.output_dir == "out/inference"
    mine = lazy.load(STOCK, [*CPU, "dataloader.evaluator.output_dir=mine"])
    assert mine.dataloader.evaluator.output_dir == "mine"


def test_a_stock_config_takes_overrides_of_this_packages_keys():
    more = (
        "agvm.start_iter=100 agvm.rule=gain train.micro_batch_size=2 train.seed=3 "
        "train.on_nonfinite=skip train.on_bad_image=skip train.check_datasets=False "
        "train.clip_gradients={clip_type:norm,clip_value:1.0}"
    ).split()
    stock = lazy.load(STOCK, [*CPU, *more])
    lazy.check(stock, 1)
    assert (stock.agvm.start_iter, stock.agvm.rule, stock.train.seed) == (100, "gain", 3)
    options = lazy.run_options(stock)
    assert (options.micro_batches, options.skip_nonfinite, options.seed) == (32, True, 3)
    assert stock.train.clip_gradients == {"clip_type": "norm", "clip_value": 1.0}
    for fsdp in ("train.fsdp={precision:bfloat16}", "train.fsdp.precision=bfloat16"):
        stock = lazy.load(STOCK, [*CPU, fsdp])
        lazy.check(stock, 2)
        assert stock.train.fsdp == {"precision": "bfloat16"}


def test_names_of_datasets(config):
    cfg = config()
    assert lazy.dataset_names(cfg, eval_only=False) == ["a"]
    assert lazy.dataset_names(cfg, eval_only=True) == []


def test_a_key_of_fsdp_turns_it_on(tmp_path):
    (tmp_path / "c.py").write_text(GOOD.replace("train = dict(", "train = dict(fsdp=None,"))
    cfg = lazy.load(str(tmp_path / "c.py"), ["train.fsdp.precision=bfloat16"])
    assert cfg.train.fsdp == {"precision": "bfloat16"}
    lazy.check(cfg, 2)
    with pytest.raises(ValueError, match="train.fsdp: there is one worker"):
        lazy.check(cfg, 1)
    cfg = lazy.load(str(tmp_path / "c.py"), ["train.fsdp.precison=bfloat16"])
    with pytest.raises(ValueError, match="train.fsdp: found 'precison'"):
        lazy.check(cfg, 2)
