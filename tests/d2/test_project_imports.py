"""--import: where a project's modules are found, and what is said where they are not."""

import sys
import pytest
from detectron2.config import get_cfg

from agvm_d2.d2.imports import import_project


def test_a_module_in_this_folder_is_found_by_a_console_script_too(tmp_path, monkeypatch):
    (tmp_path / "own_shapes.py").write_text("def add(cfg):\n    cfg.OWN = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    assert import_project(["own_shapes:add"], get_cfg()).OWN == 3


def test_a_function_that_returns_no_config_is_told():
    with pytest.raises(ValueError, match="--import os:getcwd: .*getcwd returns '.*a config"):
        import_project(["os:getcwd"], get_cfg())


def test_a_file_of_a_package_is_told_to_be_imported_by_name(tmp_path):
    (tmp_path / "own_part.py").write_text("from .other import x\n")
    with pytest.raises(ValueError, match="--import .*own_part.py: .*by name, without .py"):
        import_project([str(tmp_path / "own_part.py")], get_cfg())
