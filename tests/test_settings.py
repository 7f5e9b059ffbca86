import dataclasses
import re
import bad_values
import pytest

from agvm_d2 import Settings

FIELDS = [field.name for field in dataclasses.fields(Settings)]


def test_the_defaults_are_good():
    settings = Settings()
    assert settings.check() is settings


@pytest.mark.parametrize("rule, own", [("variance", (10, 0.97)), ("gain", (5, 0.9))])
def test_the_average_is_the_rule_s_where_it_is_not_given(rule, own):
    found = Settings(rule=rule)
    assert (found.interval, found.momentum) == own
    found = Settings(rule=rule, interval=7)
    assert (found.interval, found.momentum) == (7, own[1])
    found = Settings(rule=rule, momentum=0.0)
    assert (found.interval, found.momentum) == (own[0], 0.0)


def test_every_option_has_bad_values_in_the_table():
    assert list(bad_values.BAD) == FIELDS


@pytest.mark.parametrize("key, value, said", bad_values.CASES, ids=str)
def test_bad_values_are_named(key, value, said):
    settings = Settings(**{key: value})
    with pytest.raises(ValueError, match=f"^{re.escape(bad_values.in_yacs(key))}: {said}"):
        settings.check()
    with pytest.raises(ValueError, match=f"^--{key}: {said}"):
        settings.check(lambda name: f"--{name}")


@pytest.mark.parametrize(
    "options",
    [
        {"base_batch_size": 1, "interval": 1, "start_iter": 0, "stop_iter": 0, "momentum": 0},
        {"start_iter": -1, "stop_iter": -1, "momentum": 0.999},
        {"ratio_range": (1, 1)},
        {"ratio_range": [0.1, 10]},
        {"modules": [["body", "backbone"], ["rest", ""]]},
        {"mode": "monitor", "estimator": "split", "rule": "gain", "anchor": "any"},
    ],
    ids=str,
)
def test_values_at_the_bounds_are_good(options):
    Settings(**options).check()


def test_there_is_no_other_option():
    with pytest.raises(TypeError, match="intervall"):
        Settings(intervall=3)


def test_they_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().interval = 5
