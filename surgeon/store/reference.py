"""References: what tasks return and pass around instead of arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_FIELDS = ("key", "kind", "digest", "arrays", "attributes", "label")


@dataclass(frozen=True)
class Reference:
    """Names one stored object and says what is in it. Small, picklable, and JSON both ways.

    Attributes:
        key: names the work, 64 hexadecimal digits.
        kind: the stage that made it.
        digest: names the content, 64 hexadecimal digits; what keys of later stages are made of.
        arrays: summary of each array by name, such as "float32[576,576] symmetric".
        attributes: small results that belong to the content, JSON.
        label: for people, such as "shot-03/block-07/costs"; neither in the key nor in the digest.
    """

    key: str
    kind: str
    digest: str
    arrays: dict[str, str] = field(default_factory=dict, hash=False)
    attributes: dict[str, Any] = field(default_factory=dict, hash=False)
    label: str = ""

    def to_json(self) -> dict[str, Any]:
        """A dict that `json.dumps` takes."""
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Reference":
        """The reference that `to_json` wrote.

        Raises:
            ValueError: if fields are missing, unknown or of another type.
        """
        if set(value) != set(_FIELDS):
            raise ValueError(f"A reference has the fields {list(_FIELDS)}, but got {sorted(value)}.")
        for name in _FIELDS:
            expected = dict if name in ("arrays", "attributes") else str
            if not isinstance(value[name], expected):
                got = type(value[name]).__name__
                raise ValueError(f"{name!r} of a reference must be a {expected.__name__}, but got a {got}.")
        return cls(**value)

    def describe(self) -> str:
        """Label, if any, kind and key, for messages."""
        return f"{self.label or self.kind} (kind {self.kind}, key {self.key})"
