"""YAML config files, looked at before Detectron2 reads them: it runs what their tags say."""

from __future__ import annotations
import os
from collections.abc import Iterator
from typing import Any
import detectron2
import yaml
from detectron2.utils.file_io import PathManager

PYTHON = "tag:yaml.org,2002:python/"
# What they make is a plain value.
PLAIN = frozenset("tuple list dict str unicode bytes int long float complex bool none".split())


def check_yaml(
    path: str, allow_unsafe: bool = False, key: str = "--config-file", below: tuple[str, ...] = ()
) -> None:
    """Is it, with each file that it has as _BASE_, a mapping that runs no code? Detectron2's own
    files may, as its code does.

    Args:
        allow_unsafe: let tags run code.
        key: what names the file.
        below: the files that have this one as a base.

    Raises:
        ValueError: names the file, and the line where there is one.
        FileNotFoundError: no such file.
    """
    remote = "://" in path
    file = path if remote else os.path.realpath(path)
    if file in below:
        circle = " -> ".join((*below[below.index(file) :], file))
        raise ValueError(f"{key}: the config files have each other as a base: {circle}")
    if not remote and not os.path.isfile(path):
        raise FileNotFoundError(f"{key}: '{path}' is not a file")
    where = f"{key}: '{path}'"
    try:
        with PathManager.open(path, "rb") as f:
            root = yaml.compose(f.read(), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is not YAML: {error}") from None
    except RecursionError:
        raise ValueError(f"{where} is not a config: it is nested too deep.") from None
    if not isinstance(root, yaml.MappingNode):
        kind = "empty" if root is None else f"a {getattr(root, 'id', 'value')}"
        raise ValueError(f"{where} is not a config: it is {kind}, not keys and values.")
    trusted = allow_unsafe or _is_detectron2s(file)
    for node in _nodes(root):
        if isinstance(node, yaml.MappingNode) and node is not root:
            if any(name.value == "_BASE_" for name, _ in node.value):
                line = node.start_mark.line + 1
                raise ValueError(f"{where}, line {line}: _BASE_ must be a key of the whole file.")
        if node.tag.startswith(PYTHON) and node.tag[len(PYTHON) :] not in PLAIN and not trusted:
            tag = f"!!python/{node.tag[len(PYTHON) :]}"
            raise ValueError(
                f"{where}, line {node.start_mark.line + 1}: the tag {tag} runs code when the file "
                "is read. Write the value itself; or, if you trust the file, add "
                "--allow-unsafe-yaml before the KEY VALUE pairs."
            )
    for base in _bases(root, where):
        check_yaml(_from(path, base), allow_unsafe, f"_BASE_ of '{path}'", (*below, file))


def _is_detectron2s(file: str) -> bool:
    return file.startswith(os.path.dirname(os.path.realpath(detectron2.__file__)) + os.sep)


def _nodes(root: yaml.Node) -> Iterator[yaml.Node]:
    """All of them, each once: an alias may point to a node that holds it."""
    seen, left = set(), [root]
    while left:
        node: Any = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            left += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            left += node.value


def _bases(root: yaml.MappingNode, where: str) -> list[str]:
    found = []
    for name, value in root.value:
        if name.value == "_BASE_":
            nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
            if not all(isinstance(n, yaml.ScalarNode) and n.value for n in nodes):
                raise ValueError(f"{where}: _BASE_ must be a file, or a list of files.")
            found += [n.value for n in nodes]
    return found


def _from(path: str, base: str) -> str:
    """Where Detectron2 looks for a base."""
    if base.startswith("~"):
        base = os.path.expanduser(base)
    if base.startswith(("/", "https://", "http://")):
        return base
    return os.path.join(os.path.dirname(path), base)
