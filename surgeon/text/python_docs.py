"""The built-in text: the reference documentation that comes with Python, split into two parts by topic.

Topics repeat one another: `else` is a part of `if`, which is a part of `compound`. So topics that share a paragraph
form a family, and a family lies in one split as a whole. With topics divided one by one, a third of the held-out text
would be calibration text (a test compares the two).
"""

import hashlib
import platform
import re
from collections import defaultdict
from collections.abc import Mapping
from pydoc_data.topics import topics

PYTHON_DOCS = "python-docs"
CALIBRATION = "calibration"
HELD_OUT = "held-out"
SPLITS = (CALIBRATION, HELD_OUT)

_HELD_OUT_PERCENT = 25
# Shorter paragraphs are headings and stock phrases, which unrelated topics share by chance.
_PARAGRAPH_CHARACTERS = 40


def python_docs_text(split: str) -> str:
    """Returns one of the two parts of Python's documentation, topics in the order of their names."""
    return "\n\n".join(topics[name] for name in topic_split(topics)[split])


def python_docs_revision() -> str:
    """Returns the version of the documentation, which is that of the running Python."""
    return f"python-{platform.python_version()}"


def topic_split(texts: Mapping[str, str]) -> dict[str, list[str]]:
    """Divides topics into calibration and held-out topics.

    Families are taken in the order of a hash of their first topic's name, and each is held out if the held-out part
    stays within a quarter of all characters with it.

    Args:
        texts: Text of each topic.

    Returns:
        The sorted names of the topics of each split.
    """
    families = sorted(topic_families(texts), key=lambda names: hashlib.sha256(names[0].encode()).hexdigest())
    room = sum(map(len, texts.values())) * _HELD_OUT_PERCENT // 100
    parts: dict[str, list[str]] = {CALIBRATION: [], HELD_OUT: []}
    for names in families:
        n_characters = sum(len(texts[name]) for name in names)
        is_held_out = n_characters <= room
        room -= n_characters if is_held_out else 0
        parts[HELD_OUT if is_held_out else CALIBRATION].extend(names)
    return {split: sorted(names) for split, names in parts.items()}


def topic_families(texts: Mapping[str, str]) -> list[list[str]]:
    """Groups topics that share a paragraph, directly or through other topics; names and groups are sorted."""
    parent = {name: name for name in texts}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    owners: dict[str, str] = {}
    for name in sorted(texts):
        for paragraph in _paragraphs(texts[name]):
            first, second = sorted((root(owners.setdefault(paragraph, name)), root(name)))
            parent[second] = first
    families: dict[str, list[str]] = defaultdict(list)
    for name in sorted(texts):
        families[root(name)].append(name)
    return sorted(families.values())


def _paragraphs(text: str) -> list[str]:
    """Paragraphs without their line breaks and indentation; a text too short to have one counts as one."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    return [p for p in paragraphs if len(p) >= _PARAGRAPH_CHARACTERS] or [" ".join(text.split())]
