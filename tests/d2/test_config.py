import pytest
from detectron2.config import get_cfg

from agvm_d2.d2.config import add_agvm_config, read_config


def test_read_config_takes_values_that_are_not_strings(tmp_path):
    (tmp_path / "c.yaml").write_text("SEED: 1")
    cfg = read_config(str(tmp_path / "c.yaml"), ["SEED", 2, "SOLVER.STEPS", (3,)])
    assert (cfg.SEED, cfg.SOLVER.STEPS) == (2, (3,))


def test_a_projects_own_optimizer_keys_are_kept():
    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BETAS = "ADAMW", (0.9, 0.95)
    add_agvm_config(cfg)
    assert (cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BETAS) == ("ADAMW", (0.9, 0.95))
    cfg.AGVM.ANCHOR = "encoder"
    add_agvm_config(cfg)  # once more, as where a project adds the keys itself
    assert cfg.AGVM.ANCHOR == "encoder"


@pytest.mark.parametrize(
    "opts, message",
    [
        (["AGVM.MODES", "monitor"], "config: Non-existent key: AGVM.MODES"),
        (["AGVM.SHEDULE", "gain"], "AGVM.SHEDULE; did you mean AGVM.SCHEDULE"),
        (
            ["AGVM.MODULES", "((all, .),)"],
            r"AGVM.MODULES: found .* In a shell: AGVM.MODULES \"\(\(",
        ),
        (["AGVM.INTERVAL", "ten"], "AGVM.INTERVAL: found ten of type str, .*of type int"),
        (["SOLVER.CLIP_GRADIENTS", "3"], "SOLVER.CLIP_GRADIENTS: found 3 .*a group of keys"),
        (["AGVM.INTERVAL", "5", "--num-gpus", "2"], "--num-gpus: flags go before the KEY VALUE"),
    ],
)
def test_bad_options(opts, message, tmp_path):
    (tmp_path / "c.yaml").write_text("SEED: 1")
    with pytest.raises(ValueError, match=message):
        read_config(str(tmp_path / "c.yaml"), opts)


def test_a_key_of_the_file_that_there_is_not(tmp_path):
    (tmp_path / "c.yaml").write_text("MODEL: {ROI_HEADS: {SCORE_THRESH: 0.1}}")
    with pytest.raises(ValueError) as error:
        read_config(str(tmp_path / "c.yaml"), [])
    said = str(error.value)
    assert "c.yaml': config: Non-existent config key: MODEL.ROI_HEADS.SCORE_THRESH; did you" in said
    assert "MODEL.ROI_HEADS.SCORE_THRESH_TEST" in said and said.endswith("a project's own keys.")


def test_no_config_file():
    with pytest.raises(FileNotFoundError, match="--config-file: 'no.yaml' is not a file"):
        read_config("no.yaml", [])


def test_a_config_file_that_is_not_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text("SOLVER: [1")
    with pytest.raises(ValueError, match="--config-file: .*c.yaml' is not YAML"):
        read_config(str(tmp_path / "c.yaml"), [])
