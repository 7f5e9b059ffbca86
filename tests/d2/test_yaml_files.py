"""YAML configs that run code, or are no configs."""

import os
import pytest
import yaml
from detectron2 import model_zoo

from agvm_d2 import recipe
from agvm_d2.d2.config import read_config

CODE = [
    "!!python/object/apply:os.mkdir [made]",
    "!!python/object/apply:eval [\"__import__('os').mkdir('made')\"]",
    "!!python/object/new:os.mkdir [made]",
    "!!python/object/apply:builtins.exec [\"import os; os.mkdir('made')\"]",
    "!<tag:yaml.org,2002:python/object/apply:os.mkdir> [made]",
    "!!python/name:os.mkdir",
    "!!python/module:antigravity",
    "!!python/object:collections.Counter {}",
    "[1, {a: !!python/object/apply:os.mkdir [made]}]",
]


def read(path, *opts, **flags):
    return read_config(str(path), list(opts), **flags)


def solver(path, **flags):
    return recipe.read_baseline(str(path), **flags)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("reader", [read, solver])
@pytest.mark.parametrize("code", CODE)
def test_code_is_refused_with_tag_and_line(code, reader, tmp_path):
    (tmp_path / "c.yaml").write_text(f"VERSION: 2\nSOLVER:\n  STEPS: {code}\n")
    with pytest.raises(ValueError, match="c.yaml', line 3: the tag !!python/.* runs code"):
        reader(tmp_path / "c.yaml")


@pytest.mark.parametrize("reader", [read, solver])
def test_also_in_a_base_of_a_base(reader, tmp_path):
    (tmp_path / "a.yaml").write_text("_BASE_: b.yaml\n")
    (tmp_path / "b.yaml").write_text("_BASE_: [c.yaml, sub/d.yaml]\n")
    (tmp_path / "c.yaml").write_text("VERSION: 2\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.yaml").write_text(f"OUTPUT_DIR: {CODE[0]}\n")
    with pytest.raises(ValueError, match="_BASE_ of '.*b.yaml': '.*sub/d.yaml', line 1: the tag"):
        reader(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("SOLVER:\n  <<: {_BASE_: sub/d.yaml}\n")
    with pytest.raises(ValueError, match="line 2: _BASE_ must be a key of the whole file"):
        reader(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("<<: {_BASE_: sub/d.yaml}\n")
    with pytest.raises(ValueError, match="line 1: _BASE_ must be a key of the whole file"):
        reader(tmp_path / "a.yaml")


def test_under_another_name_for_the_tag(tmp_path):
    text = "%TAG !e! tag:yaml.org,2002:python/object/apply:\n---\nOUTPUT_DIR: !e!os.mkdir [made]\n"
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match="line 3: the tag !!python/object/apply:os.mkdir"):
        read(tmp_path / "c.yaml")


def test_the_flag_lets_it_run(tmp_path):
    code = '!!python/object/apply:eval ["tuple(10 * x for x in (1, 2))"]'
    (tmp_path / "c.yaml").write_text(f"SOLVER:\n  STEPS: {code}\n")
    assert read(tmp_path / "c.yaml", allow_unsafe=True).SOLVER.STEPS == (10, 20)
    assert solver(tmp_path / "c.yaml", allow_unsafe=True).steps == (10, 20)
    recipe.main(["--config-file", "c.yaml", "--batch-size", "64", "--allow-unsafe-yaml"])


def test_plain_values_and_detectron2s_own_files_need_no_flag(tmp_path):
    (tmp_path / "c.yaml").write_text("SOLVER:\n  STEPS: !!python/tuple [1, 2]\n")
    assert read(tmp_path / "c.yaml").SOLVER.STEPS == (1, 2)
    retinanet = model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    sizes = read(retinanet).MODEL.ANCHOR_GENERATOR.SIZES
    assert sizes[0] == [32, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)]


@pytest.mark.parametrize("code", ["__import__('os').mkdir('made')", CODE[0]])
def test_an_override_is_no_code(code, tmp_path):
    (tmp_path / "c.yaml").write_text("VERSION: 2\n")
    assert read(tmp_path / "c.yaml", "OUTPUT_DIR", code).OUTPUT_DIR == code


@pytest.mark.parametrize("reader", [read, solver])
@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "is empty, not keys and values"),
        (b"# nothing\n", "is empty"),
        (b"null\n", "is a scalar"),
        (b"- 1\n- 2\n", "is a sequence"),
        (b"hello", "is a scalar"),
        (b"a: [1", "is not YAML"),
        (b"\x00\xff\xfe\x80", "is not YAML"),
        (b"a: 1\n---\nb: 2\n", "is not YAML"),
        (b"_BASE_: c.yaml\n", "have each other as a base: .*c.yaml -> .*c.yaml"),
        (b"_BASE_: ../HERE/c.yaml\n", "have each other as a base"),
        (b"_BASE_: no.yaml\n", "_BASE_ of '.*c.yaml': '.*no.yaml' is not a file"),
        (b"_BASE_: 3\n", "'.*3' is not a file"),
        (b"_BASE_: {a: 1}\n", "_BASE_ must be a file, or a list"),
        (b"_BASE_: [[a]]\n", "_BASE_ must be a file, or a list"),
        (b"_BASE_:\n", "_BASE_ must be a file, or a list"),
        (b"SOLVER: !thing 3\n", "thing"),
        (b"SOLVER: 3\n", "SOLVER"),
        (b"SOLVER: !!python/tuple 3\n", "."),
        (b"a: " + b"[" * 5000 + b"\n", "nested too deep|not YAML"),
    ],
)
def test_what_is_no_config_is_one_line(text, message, reader, tmp_path):
    (tmp_path / "c.yaml").write_bytes(text.replace(b"HERE", tmp_path.name.encode()))
    with pytest.raises((ValueError, OSError), match=message) as caught:
        reader(tmp_path / "c.yaml")
    assert not isinstance(caught.value, yaml.YAMLError)


def test_two_files_that_are_each_others_base(tmp_path):
    (tmp_path / "a.yaml").write_text("_BASE_: b.yaml\n")
    (tmp_path / "b.yaml").write_text("_BASE_: a.yaml\n")
    with pytest.raises(ValueError, match="a.yaml -> .*b.yaml -> .*a.yaml"):
        read(os.path.join(tmp_path, "a.yaml"))
