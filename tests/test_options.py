"""Each option stands once, in Settings: docs/keys.md, a yacs config, a LazyConfig and AGVMHook's
arguments follow it."""

import ast
import dataclasses
import functools
import os
import re
import pytest
import torch
from detectron2.config import get_cfg
from helpers import ROOT
from omegaconf import OmegaConf
from toy import ToyDetector
from toy_d2 import toy_config

from agvm_d2 import AGVMHook, Settings, add_agvm_config, split_param_groups
from agvm_d2.d2 import lazy
from agvm_d2.d2.run import RunOptions

DEFAULTS = {field.name: field.default for field in dataclasses.fields(Settings)}
# Good values, none of them the default.
OTHERS = {
    "mode": "monitor",
    "estimator": "split",
    "rule": "gain",
    "schedule": "gain",
    "base_batch_size": 4,
    "interval": 3,
    "start_iter": 7,
    "stop_iter": 9,
    "momentum": 0.5,
    "ratio_range": (0.25, 4.0),
    "anchor": "fpn",
    "modules": (("backbone", "backbone"), ("rest", "")),
}


def in_docs() -> dict[str, str]:
    """Key -> its default, of the table in docs/keys.md; keys may share a row."""
    with open(os.path.join(ROOT, "docs", "keys.md")) as f:
        section = f.read().partition("\n## ")[0]
    found: dict[str, str] = {}
    for row in re.findall(r"^\| (`.*?) \| (.*?) \|", section, flags=re.M):
        keys = re.findall(r"`(.*?)`", row[0])
        group = keys[0].rpartition(".")[0]
        defaults = row[1].split(", ") if len(keys) > 1 else [row[1]]
        for key, default in zip(keys, defaults, strict=True):
            key = key if "." in key else f"{group}.{key}"
            assert key not in found
            found[key] = default
    return found


def test_the_docs_have_a_row_for_each_with_its_default():
    rows = {k: v for k, v in in_docs().items() if k.startswith("AGVM.")}
    assert ast.literal_eval(rows.pop("AGVM.ENABLED")) is True
    found = {k.removeprefix("AGVM.").lower(): ast.literal_eval(v) for k, v in rows.items()}
    assert found == DEFAULTS


def test_the_readmes_other_defaults_are_the_configs():
    cfg = get_cfg()
    add_agvm_config(cfg)
    for key, default in in_docs().items():
        value = functools.reduce(getattr, key.split("."), cfg)
        assert ast.literal_eval(default) == value, key


def test_a_yacs_config_has_each_with_its_default():
    cfg = get_cfg()
    add_agvm_config(cfg)
    found = {key.lower(): value for key, value in cfg.AGVM.items()}
    assert found.pop("enabled") is True
    assert found == DEFAULTS


def test_a_lazyconfig_may_name_each():
    assert lazy.AGVM_KEYS == {*DEFAULTS, "enabled", "log_period"}


def by_hook(model, optimizer, options, tmp_path):
    return AGVMHook(model, optimizer, micro_batches=2, batch_size=8, **options)


def by_yacs(model, optimizer, options, tmp_path):
    cfg = toy_config(tmp_path, SOLVER__MICRO_BATCH_SIZE=4)
    for key, value in {**DEFAULTS, "start_iter": 0, **options}.items():
        cfg.AGVM[key.upper()] = value
    return AGVMHook(cfg, model, optimizer)


def by_lazyconfig(model, optimizer, options, tmp_path):
    cfg = OmegaConf.create({"agvm": {**options, "enabled": True, "log_period": 5}})
    return lazy.agvm_hook(cfg, RunOptions(8, 4), model, optimizer)


@pytest.mark.parametrize("make", [by_hook, by_yacs, by_lazyconfig])
@pytest.mark.parametrize("key", DEFAULTS)
def test_each_reaches_agvm(make, key, tmp_path):
    options = {key: OTHERS[key]}
    if key == "schedule":  # it goes with that rule, and a batch that is not below the base
        options |= {"rule": "gain", "base_batch_size": 4}
    model = ToyDetector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    split_param_groups(optimizer, model, options.get("modules", ()))
    settings = dataclasses.asdict(make(model, optimizer, options, tmp_path).agvm.settings)
    own = {"start_iter": settings["start_iter"], "interval": 10, "momentum": 0.97}
    if options.get("rule") == "gain":
        own |= {"interval": 5, "momentum": 0.9}
    for name, default in {**DEFAULTS, **own, **options}.items():
        value = settings[name]
        if isinstance(value, list):  # a LazyConfig's
            value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
        assert value == default
    assert OTHERS[key] != DEFAULTS[key]


def test_a_lazyconfig_without_agvm_has_no_hook():
    cfg = OmegaConf.create({"agvm": {"enabled": False}})
    assert lazy.agvm_hook(cfg, RunOptions(8), None, None) is None
