"""The examples in docstrings."""

import doctest
import importlib
import pkgutil
import pytest

import agvm_d2

NAMES = [m.name for m in pkgutil.walk_packages(agvm_d2.__path__, "agvm_d2.")]
# These have examples, and must not lose the last one.
WITH_EXAMPLES = {
    f"agvm_d2.{name}"
    for name in ("d2.run", "modulator", "moments", "param_groups", "settings", "variance")
}


def test_the_modules_are_there():
    assert set(NAMES) >= WITH_EXAMPLES


@pytest.mark.parametrize("name", NAMES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert not result.failed
    assert result.attempted or name not in WITH_EXAMPLES
