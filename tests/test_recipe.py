import os
import re
import pytest
import yaml
from detectron2.config import LazyCall as L
from detectron2.config import get_cfg
from detectron2.model_zoo import get_config_file
from fvcore.common.param_scheduler import CosineParamScheduler
from helpers import DIGITS, VITDET

from agvm_d2 import add_agvm_config, recipe
from agvm_d2.d2 import lazy
from agvm_d2.d2.checks import check_config

FASTER = get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
RETINANET = get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")


def run(capsys, *args) -> str:
    recipe.main(list(map(str, args)))
    return capsys.readouterr().out


def printed(out: str, folder):
    """The config that was printed, checked."""
    (folder / "printed.yaml").write_text(out)
    cfg = get_cfg()
    add_agvm_config(cfg)
    cfg.merge_from_file(str(folder / "printed.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    check_config(cfg, 1)
    return cfg


def test_it_prints_a_config_that_is_the_papers_recipe(capsys, tmp_path):
    out = run(capsys, "--config-file", FASTER, "--batch-size", 512)
    cfg = printed(out, tmp_path)
    solver = cfg.SOLVER
    assert solver.BASE_LR == 0.32  # 0.16 * sqrt(512 / 128)
    assert solver.CHECKPOINT_PERIOD == 156  # 5,000 x 16 / 512
    assert solver.MAX_ITER == 2812 and solver.STEPS == (1875, 2500)  # 90,000 x 16 / 512
    assert solver.WARMUP_ITERS == 458  # two epochs: 2 x 117,266 / 512
    assert solver.WARMUP_METHOD == "exp" and "is two epochs of 117,266 images" in out
    assert solver.CLIP_GRADIENTS.ITER_RANGE == (358, 559)
    assert cfg.AGVM.START_ITER == 558 and cfg.AGVM.INTERVAL == -1


def test_a_comment_has_what_each_key_was(capsys, tmp_path):
    out = run(capsys, "--config-file", FASTER, "--batch-size", 512)
    assert "  BASE_LR: 0.32  # was 0.02\n  MAX_ITER: 2812  # was 90000\n" in out
    assert "  STEPS: (1875, 2500)  # was (60000, 80000)\n" in out
    assert "    ENABLED: true  # was False\n    CLIP_TYPE: full_model  # was value\n" in out
    assert "  WARMUP_FACTOR: 0.001\n" in out  # the same
    gain = run(capsys, "--config-file", VITDET, "--batch-size", 64, "--rule", "gain")
    assert "total_batch_size = 64  # was 16\n" in gain
    assert "# was {'interval': 5, 'start_iter': 100}\n" in gain


@pytest.mark.parametrize("path, batch", [(FASTER, 16), (DIGITS, 64), (VITDET, 16)])
@pytest.mark.parametrize("rule", [[], ["--rule", "gain"]])
def test_nothing_changes_at_the_configs_own_batch(path, batch, rule, capsys):
    out = run(capsys, "--config-file", path, "--batch-size", batch, *rule)
    assert all(line.startswith("#") for line in out.splitlines())
    assert "nothing needs to change" in out


@pytest.mark.parametrize(
    "max_iter, warmup, images, batch, expected, why",
    [
        (9000, 0, 6000, 64, 188, "two epochs"),  # 2 x 6,000 / 64, of 24 epochs
        (2250, 0, 6000, 64, 94, "a sixth"),  # of 562.5: six epochs
        (9000, 0, None, 64, 281, "an eighth.*--images"),  # of 2,250
        (9000, 2000, 6000, 64, 500, "the same share"),  # 2,000 x 16 / 64
        (9000, 0, 10, 64, 2, "two epochs"),
    ],
)
def test_warm_up(max_iter, warmup, images, batch, expected, why):
    base = recipe.Baseline(16, 0.02, max_iter, warmup=warmup, images=images)
    iterations, words = recipe.warm_up(base, batch)
    assert iterations == expected and re.match(why, words)
    assert recipe.recipe(base, batch)["SOLVER"]["WARMUP_ITERS"] == expected


def test_the_number_of_images_of_another_dataset(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text(f"_BASE_: {FASTER}\nDATASETS: {{TRAIN: '(\"mine\",)'}}")
    args = ["--config-file", tmp_path / "c.yaml", "--batch-size", 64]
    assert "WARMUP_ITERS: 2812" in run(capsys, *args)  # of 22,500
    assert "WARMUP_ITERS: 625" in run(capsys, *args, "--images", 20000)


def clipped(folder, clip, more=""):
    """What a config with this CLIP_GRADIENTS becomes at four times its batch."""
    path = folder / "clipped.yaml"
    path.write_text(f"_BASE_: {FASTER}\nSOLVER: {{CLIP_GRADIENTS: {clip}}}\n{more}")
    return recipe.recipe(recipe.read_baseline(str(path)), 64)


def test_clipping_that_works_stays(capsys, tmp_path):
    theirs = "{ENABLED: True, CLIP_TYPE: full_model, CLIP_VALUE: 0.01%s}"
    assert "CLIP_GRADIENTS" not in clipped(tmp_path, theirs % "")["SOLVER"]
    # Always, said otherwise.
    always = clipped(tmp_path, theirs % ", ITER_RANGE: '(0, 90000)'")
    assert "CLIP_GRADIENTS" not in always["SOLVER"]
    # A window moves with the end of warm-up, 2 x 117,266 / 64 = 3,665; it does not start later.
    for before, first in (("(900, 1101)", 900), ("(5000, 5201)", 3565)):
        keys = clipped(tmp_path, theirs % f", ITER_RANGE: '{before}'")["SOLVER"]["CLIP_GRADIENTS"]
        assert keys == {"ITER_RANGE": (first, 3766)}
    out = run(capsys, "--config-file", tmp_path / "clipped.yaml", "--batch-size", 64)
    assert "clipped as in the config (full_model, 0.01)" in out
    assert "ITER_RANGE: (3565, 3766)  # was (5000, 5201)" in out


def test_evaluations_are_as_many_as_before(tmp_path):
    assert "TEST" not in clipped(tmp_path, "{}")
    assert clipped(tmp_path, "{}", "TEST: {EVAL_PERIOD: 5000}")["TEST"] == {"EVAL_PERIOD": 1250}


def test_steps_that_fall_together_or_to_nothing_are_left_out():
    base = recipe.Baseline(16, 0.02, 90, steps=(1, 80, 82))
    assert recipe.recipe(base, 64)["SOLVER"]["STEPS"] == (20,)


def test_rules_and_hints(capsys):
    out = run(capsys, "--config-file", RETINANET, "--batch-size", 2048, "--rule", "linear")
    assert "From batch 16, learning rate 0.01, 90,000 iterations" in out
    keys = yaml.safe_load(out)
    assert keys["SOLVER"]["BASE_LR"] == 1.28 and keys["AGVM"]["INTERVAL"] == 5
    assert "703 iterations are few" in out


RELATIVE = {"ENABLED": True, "CLIP_TYPE": "relative", "CLIP_VALUE": 4.0}


def test_the_gain_changes_nothing_of_the_solver_but_the_batch_and_clips(capsys, tmp_path):
    out = run(capsys, "--config-file", FASTER, "--batch-size", 512, "--rule", "gain")
    solver, base = printed(out, tmp_path).SOLVER, printed(f"_BASE_: {FASTER}", tmp_path).SOLVER
    assert {k for k in base if solver[k] != base[k]} == {"IMS_PER_BATCH", "CLIP_GRADIENTS"}
    assert {k: v for k, v in solver.CLIP_GRADIENTS.items() if k in RELATIVE} == RELATIVE
    agvm = printed(out, tmp_path).AGVM
    assert (agvm.RULE, agvm.SCHEDULE, agvm.BASE_BATCH_SIZE) == ("gain", "gain", 16)
    assert (agvm.INTERVAL, agvm.MOMENTUM, agvm.START_ITER) == (-1, -1.0, -1)
    assert yaml.safe_load(out)["AGVM"].keys() == {"ENABLED", "RULE", "SCHEDULE", "BASE_BATCH_SIZE"}
    digits = run(capsys, "--config-file", DIGITS, "--batch-size", 256, "--rule", "gain")
    assert "CLIP_GRADIENTS" in yaml.safe_load(out)["SOLVER"] and "CLIP" not in digits  # it does
    assert "  INTERVAL: -1  # was 5\n  START_ITER: -1  # was 100\n" in digits


@pytest.mark.parametrize("rule", [["--rule", "gain"], []])
def test_of_a_config_that_does_not_clip_no_window_or_norm_is_left(rule, capsys, tmp_path):
    clip = "{ENABLED: False, NORM_TYPE: 1.0, ITER_RANGE: [0, 1000]}"
    path = tmp_path / "mine.yaml"
    path.write_text(f"_BASE_: {FASTER}\nSOLVER: {{CLIP_GRADIENTS: {clip}}}\n")
    found = printed(run(capsys, "--config-file", path, "--batch-size", 512, *rule), tmp_path)
    clip = found.SOLVER.CLIP_GRADIENTS
    assert (clip.ENABLED, clip.NORM_TYPE) == (True, 2.0)
    assert clip.ITER_RANGE == (() if rule else (358, 559))


def test_by_the_gain_it_is_said_how_a_config_clips(capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    clip = "{ENABLED: True, CLIP_TYPE: norm, CLIP_VALUE: 0.1, ITER_RANGE: [0, 1000]}"
    path.write_text(f"_BASE_: {FASTER}\nSOLVER: {{CLIP_GRADIENTS: {clip}}}\n")
    out = run(capsys, "--config-file", path, "--batch-size", 512, "--rule", "gain")
    assert "clipped as in the config (norm, 0.1)." in out and "in its ITER_RANGE only" in out


def test_a_lazyconfig_takes_what_is_printed(capsys, tmp_path):
    for rule in ("gain", "linear-sqrt"):
        out = run(capsys, "--config-file", VITDET, "--batch-size", 64, "--rule", rule)
        with open(VITDET) as f:  # below the config itself, in its folder for its imports
            text = f.read()
        path = os.path.join(os.path.dirname(VITDET), f"pasted_{rule.replace('-', '_')}.py")
        try:
            with open(path, "w") as f:
                f.write(text + out)
            cfg = lazy.load(path, [])
        finally:
            os.remove(path)
        lazy.check(cfg, 1)
        before = recipe.read_baseline(VITDET)
        assert before.lazy and before.adam
        assert {*before.agvm} <= {*cfg.agvm}  # what the config had, such as modules
        assert cfg.dataloader.train.total_batch_size == 64
        if rule == "gain":
            assert recipe.of_lazyconfig(cfg, path)[1:5] == before[1:5]
            assert cfg.agvm.schedule == "gain" and cfg.agvm.base_batch_size == before.batch
        else:
            scale = before.batch / 64
            assert cfg.train.max_iter == round(before.max_iter * scale)
            assert cfg.optimizer.lr == pytest.approx(before.lr / scale, rel=1e-2)
            # Two epochs of six are a third of training.
            assert cfg.lr_multiplier.warmup_length == pytest.approx(1 / 6, rel=0.05)
            assert cfg.train.clip_gradients == lazy.load(VITDET, []).train.clip_gradients


def test_a_lazyconfig_with_muon_scales_as_adamw_without_its_betas():
    overrides = [
        "optimizer._target_=agvm_d2.solver.build_muon",
        "optimizer.params._target_=agvm_d2.solver.muon_params",
    ]
    base = recipe.of_lazyconfig(lazy.load(VITDET, overrides), VITDET)
    assert base.adam and base.muon and base.betas is None
    assert recipe.recipe(base, 64)["AGVM"] == {"ENABLED": True, "MODE": "monitor"}
    assert recipe.recipe(base, 64)["SOLVER"]["BASE_LR"] == pytest.approx(2 * base.lr)
    with pytest.raises(ValueError, match="--scale-betas: is for ADAMW and LAMB"):
        recipe.recipe(base, 64, scale_betas=True)


def test_of_a_config_with_muon_agvm_only_measures(capsys, tmp_path):
    path = tmp_path / "muon.yaml"
    path.write_text(f"_BASE_: {FASTER}\nSOLVER: {{OPTIMIZER: MUON, BASE_LR: 0.001}}\n")
    out = run(capsys, "--config-file", path, "--batch-size", 64)
    cfg = printed(out, tmp_path)
    assert cfg.SOLVER.BASE_LR == 0.002 and cfg.SOLVER.MAX_ITER == 22500
    assert cfg.AGVM.MODE == "monitor" and "AGVM only measures" in out
    assert not cfg.SOLVER.CLIP_GRADIENTS.ENABLED
    by_gain = run(capsys, "--config-file", path, "--batch-size", 64, "--rule", "gain")
    cfg = printed(by_gain, tmp_path)
    assert cfg.AGVM.MODE == "modulate" and cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE == "relative"


def test_no_warm_up_for_a_schedule_without_one(capsys, tmp_path):
    path = tmp_path / "poly.yaml"
    path.write_text(f"_BASE_: {FASTER}\nSOLVER: {{LR_SCHEDULER_NAME: WarmupPolyLR}}\n")
    out = run(capsys, "--config-file", path, "--batch-size", 64)
    assert "WARMUP_ITERS" in out and "exp" not in out and "WARMUP_FACTOR" not in out
    cfg = lazy.load(VITDET, [])
    cfg.lr_multiplier = L(CosineParamScheduler)(start_value=1.0, end_value=0.1)
    base = recipe.of_lazyconfig(cfg, VITDET)
    assert "warmup" not in recipe.as_python(recipe.recipe(base, 64), base.agvm, base.config)


def test_an_optimizer_that_is_a_function_is_no_lamb():
    cfg = lazy.load(VITDET, [])
    cfg.optimizer = L(lambda params, lr: None)(params=L(list)(), lr=0.02)
    assert not recipe.of_lazyconfig(cfg, VITDET).adam


def test_a_lazyconfigs_evaluations_and_clipping():
    cfg = lazy.load(VITDET, ["train.eval_period=100"])
    cfg.train.clip_gradients = None
    base = recipe.of_lazyconfig(cfg, VITDET)
    out = recipe.as_python(recipe.recipe(base, 64), base.agvm, base.config)
    # Of 188 iterations 31 are warm-up, to which there are 31 on each side.
    clip = "{'clip_type': 'full_model', 'clip_value': 1.0, 'iter_range': (0, 63)}"
    assert f"train.clip_gradients = {clip}\n" in out
    assert "train.eval_period = 25  # was 100\n" in out
    gain = recipe.as_python(recipe.recipe(base, 64, "gain"), base.agvm, base.config)
    assert "train.clip_gradients = {'clip_type': 'relative', 'clip_value': 4.0}\n" in gain
    cfg.train.clip_gradients = {"clip_type": "norm", "clip_value": 0.1, "iter_range": [0, 161]}
    base = recipe.of_lazyconfig(cfg, VITDET)
    out = recipe.as_python(recipe.recipe(base, 64), base.agvm, base.config)
    assert "train.clip_gradients.iter_range = (0, 63)  # was (0, 161)\n" in out


MINE = f"""
_BASE_: {FASTER}
SOLVER: {{OPTIMIZER: ADAMW, WEIGHT_DECAY: 0.05, IMS_PER_BATCH: %d}}
AGVM: {{MODE: %s, RULE: gain, SCHEDULE: gain, BASE_BATCH_SIZE: 16, INTERVAL: 7}}
"""


@pytest.mark.parametrize("own, mode", [(16, "monitor"), (64, "modulate")])
def test_from_a_config_that_monitors_or_trains_by_the_gain(own, mode, capsys, tmp_path):
    """SOLVER is for 16 images in both."""
    path = tmp_path / "mine's.yaml"
    path.write_text(MINE % (own, mode))
    out = run(capsys, "--config-file", path, "--batch-size", 256, "--rule", "gain")
    assert "# From batch 16, learning rate 0.02, 90,000 iterations." in out
    cfg = printed(out, tmp_path)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.AGVM.BASE_BATCH_SIZE) == (256, 16)
    assert (cfg.AGVM.MODE, cfg.AGVM.RULE, cfg.AGVM.SCHEDULE) == ("modulate", "gain", "gain")
    assert (cfg.SOLVER.OPTIMIZER, cfg.SOLVER.WEIGHT_DECAY) == ("ADAMW", 0.05)  # of the file

    cfg = printed(run(capsys, "--config-file", path, "--batch-size", 256), tmp_path)
    assert (cfg.AGVM.MODE, cfg.AGVM.RULE) == ("modulate", "variance")
    assert (cfg.AGVM.SCHEDULE, cfg.AGVM.INTERVAL) == ("iterations", -1)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (0.08, 5625)  # 0.02 sqrt(256 / 16)
    same = run(capsys, "--config-file", path, "--batch-size", own, "--rule", "gain")
    assert "nothing needs to change" in same


@pytest.mark.parametrize("own, mode", [(16, "monitor"), (64, "modulate")])
def test_the_same_of_a_lazyconfig(own, mode):
    agvm = f"agvm.mode={mode} agvm.rule=gain agvm.schedule=gain agvm.base_batch_size=16"
    cfg = lazy.load(VITDET, [*agvm.split(), f"dataloader.train.total_batch_size={own}"])
    base = recipe.of_lazyconfig(cfg, VITDET)
    assert base.batch == 16
    keys = recipe.recipe(base, 256)
    assert keys["AGVM"]["RULE"] == "variance" and keys["AGVM"]["SCHEDULE"] == "iterations"
    assert keys["SOLVER"]["BASE_LR"] == pytest.approx(4 * base.lr, rel=1e-2)
    keys = recipe.recipe(base, 256, "gain")
    assert keys["AGVM"]["BASE_BATCH_SIZE"] == 16
    assert keys["AGVM"].get("MODE") == ("modulate" if mode == "monitor" else None)


def test_agvm_is_on_also_from_a_baseline_without_it(tmp_path):
    (tmp_path / "c.yaml").write_text("AGVM: {ENABLED: False}")
    base = recipe.read_baseline(str(tmp_path / "c.yaml"))
    assert recipe.recipe(base, 64)["AGVM"]["ENABLED"] is True


def test_adam_takes_the_square_root_of_another_projects_config(capsys, tmp_path):
    (tmp_path / "m2f.yaml").write_text(
        "MODEL: {MASK_FORMER: {DEC_LAYERS: 10}}\n"
        "SOLVER: {IMS_PER_BATCH: 16, BASE_LR: 0.0001, OPTIMIZER: ADAMW, BACKBONE_MULTIPLIER: 0.1,\n"
        "  STEPS: [327778, 355092], MAX_ITER: 368750}\n"
    )
    out = run(capsys, "--config-file", tmp_path / "m2f.yaml", "--batch-size", 256)
    assert yaml.safe_load(out)["SOLVER"]["BASE_LR"] == 0.0004


def test_adams_betas_where_they_are_asked_for(capsys, tmp_path):
    (tmp_path / "a.yaml").write_text(
        f"_BASE_: {FASTER}\nSOLVER: {{OPTIMIZER: ADAMW, BETAS: '(0.9, 0.98)'}}"
    )
    args = ["--config-file", tmp_path / "a.yaml", "--batch-size", 64]
    assert "BETAS" not in run(capsys, *args) and " EPS" not in run(capsys, *args)
    out = run(capsys, *args, "--scale-betas")
    solver = printed(out, tmp_path).SOLVER
    assert (solver.BETAS, solver.EPS) == ((0.6, 0.92), 5e-9) and "beta of 0" not in out
    assert "A beta of 0" in run(capsys, *args[:3], 256, "--scale-betas")

    lazily = run(capsys, "--config-file", VITDET, "--batch-size", 64, "--scale-betas")
    assert "betas = (0.6, 0.996)  # was (0.9, 0.999)\noptimizer.eps = 5e-09\n" in lazily


@pytest.mark.parametrize("rule", ["linear", "gain"])
def test_adams_betas_go_with_the_square_root(rule):
    base = recipe.Baseline(16, 1e-4, 90000, adam=True, betas=(0.9, 0.999))
    with pytest.raises(ValueError, match=f"--scale-betas: .*--rule {rule}"):
        recipe.recipe(base, 64, rule, scale_betas=True)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "c.yaml' is not a"),
        ("- 1", "c.yaml' is not a"),
        ("SOLVER: {BASE_LR: fast}", "SOLVER.BASE_LR: found fast of type str"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SystemExit, match=message):
        recipe.main(["--config-file", str(tmp_path / "c.yaml"), "--batch-size", "64"])


@pytest.mark.parametrize(
    "args, message",
    [
        (["--config-file", "no.yaml", "--batch-size", "64"], "'no.yaml' is not a file"),
        (["--config-file", FASTER, "--batch-size", "0"], "batch: found 0"),
        (["--config-file", FASTER, "--batch-size", "64", "--images", "0"], "--images: found 0"),
        (["--config-file", FASTER, "--batch-size", "1000000"], "1 iterations would be left"),
        (["--config-file", FASTER, "--batch-size", "8", "--rule", "gain"], "8: is below 16"),
        (
            ["--config-file", FASTER, "--batch-size", "64", "--scale-betas"],
            "there is another optimizer",
        ),
        (["--config-file", __file__, "--batch-size", "64"], "has no number at dataloader.train"),
    ],
)
def test_bad_arguments(args, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        recipe.main(args)
