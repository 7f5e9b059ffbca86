"""The configs by name."""

import os
import pytest
from detectron2.config import get_cfg
from helpers import CONFIGS, DIGITS

from agvm_d2 import add_agvm_config, model_zoo
from agvm_d2.d2 import lazy

YAML = "Digits-Detection/faster_rcnn_thin_R_50_FPN_bs64_agvm.yaml"
PY = "Digits-InstanceSegmentation/mask_rcnn_vitdet_thin_6ep_bs16_agvm.py"


def test_every_config_of_the_clone_has_its_name(capsys):
    found = {
        os.path.relpath(os.path.join(folder, file), CONFIGS)
        for folder, _, files in os.walk(CONFIGS)
        for file in files
        if file.endswith((".yaml", ".py")) and not file.startswith("Base-")
    }
    assert set(model_zoo.names()) == {name for name in found if not name.startswith("common")}
    model_zoo.main()
    assert capsys.readouterr().out.splitlines() == model_zoo.names()


def test_a_yaml_config_has_the_keys_of_both_packages():
    cfg = get_cfg()
    add_agvm_config(cfg)
    cfg.merge_from_file(DIGITS)
    assert model_zoo.get_config(YAML) == cfg


def test_a_lazyconfig_with_what_it_imports():
    cfg, loaded = model_zoo.get_config(PY), lazy.load(os.path.join(CONFIGS, PY), [])
    assert cfg.keys() == loaded.keys()
    assert cfg.agvm == loaded.agvm and cfg.train == loaded.train


def test_a_base_is_found_but_not_listed():
    assert os.path.isfile(model_zoo.get_config_file("Base-RCNN-FPN-Digits.yaml"))
    assert "Base-RCNN-FPN-Digits.yaml" not in model_zoo.names()


@pytest.mark.parametrize("get", [model_zoo.get_config, model_zoo.get_config_file, model_zoo.find])
@pytest.mark.parametrize(
    "name", [YAML.replace("bs64", "bs65"), os.path.basename(YAML), YAML.removesuffix(".yaml")]
)
def test_an_unknown_name_is_told_those_close_to_it(get, name):
    with pytest.raises(FileNotFoundError, match=f"'{name}' is not .* did you mean .*{YAML}"):
        get(name)


@pytest.mark.parametrize("name", ["", "zoo.yaml", "../__init__.py", "common", CONFIGS])
def test_what_is_no_config_is_not_found(name):
    with pytest.raises(FileNotFoundError) as error:
        model_zoo.get_config_file(name)
    assert str(error.value) == (
        f"'{name}' is not in agvm_d2's model zoo. `python -m agvm_d2.model_zoo` lists all."
    )


def test_a_config_file_is_a_path_before_it_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = model_zoo.get_config_file(YAML)
    assert model_zoo.find(YAML) == model_zoo.find(f"configs/{YAML}") == path
    os.makedirs("Digits-Detection")
    with open(YAML, "w"):
        assert model_zoo.find(YAML) == YAML
    assert model_zoo.find("https://example.org/a.yaml") == "https://example.org/a.yaml"
    with pytest.raises(FileNotFoundError, match="^--config-file: 'a.yaml' is not a file, nor is"):
        model_zoo.find("a.yaml")
