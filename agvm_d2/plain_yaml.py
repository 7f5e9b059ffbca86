"""A run's config.yaml as plain values; needs no Detectron2."""

from __future__ import annotations
from typing import Any
import yaml


class _TagsAsText(yaml.SafeLoader):
    """A LazyConfig's text names classes and functions; they are only compared."""


def _as_text(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        inner: Any = loader.construct_sequence(node, deep=True)
    elif isinstance(node, yaml.MappingNode):
        inner = loader.construct_mapping(node, deep=True)
    else:
        inner = node.value
    return inner if suffix in ("tuple", "list", "dict") else f"{suffix} {inner}".strip()


_TagsAsText.add_multi_constructor("tag:yaml.org,2002:python/", _as_text)


def plain_config(text: str) -> dict:
    """A config.yaml of either kind, its tags as text."""
    try:
        return yaml.load(text, Loader=_TagsAsText) or {}
    except (yaml.YAMLError, ValueError, TypeError):  # compared as one value
        return {"config": text}
