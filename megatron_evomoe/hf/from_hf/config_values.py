"""Reads the values of a ``config.json``, each as the type that it must have."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, NoReturn

from megatron_evomoe.config import ConfigError

_LARGEST = 2**31 - 1


def refuse(kind: Any, key: str, value: Any, why: str) -> NoReturn:
    """Raise a `ConfigError` with the architecture, the field, its value and the reason."""
    raise ConfigError(f"{kind} with {key} = {reprlib.repr(value)} cannot be imported: {why}")


class ConfigValues:
    """A section of a configuration, with the defaults of its class.

    The methods raise `ConfigError` for a value of a wrong type or out of range: a file may hold any JSON.

    Args:
        kind: the architecture, for messages.
        values: the section as read.
        defaults: values of keys that the section leaves out. A null in the section replaces a default.
    """

    def __init__(self, kind: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.kind, self._values = kind, {**defaults, **values}

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def raw(self, key: str, default: Any = None) -> Any:
        """The value as read."""
        return self._values.get(key, default)

    def size(self, key: str, largest: int = _LARGEST) -> int:
        """A whole number from 1 to `largest`."""
        value = self.raw(key)
        if type(value) is not int or not 1 <= value <= largest:
            self.refuse(key, f"it must be a whole number from 1 to {largest}")
        return value

    def optional_size(self, key: str) -> int | None:
        """As `size`; None if the file has null or nothing."""
        return self.size(key) if key in self else None

    def number(self, key: str, lowest: float, highest: float) -> float:
        """A number from `lowest` to `highest`."""
        value = self.raw(key)
        if type(value) not in (int, float) or not lowest <= value <= highest:
            self.refuse(key, f"it must be a number from {lowest:g} to {highest:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; null or nothing is false."""
        value = self.raw(key)
        if value is not None and type(value) is not bool:
            self.refuse(key, "it must be true or false")
        return bool(value)

    def section(self, key: str) -> dict[str, Any]:
        """A mapping; empty if the file has null or nothing."""
        value = self.raw(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, "it must be a mapping")
        return value or {}

    def expect(self, key: str, *accepted: Any, why: str = "") -> Any:
        """One of the accepted values. If None is among them, the file may also have null or nothing."""
        value = self.raw(key)
        if not any(type(value) is type(a) and value == a for a in accepted):
            self.refuse(key, why or f"only {' or '.join(map(repr, accepted))} can be imported")
        return value

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raise a `ConfigError` with the value of `key` and the reason."""
        refuse(self.kind, key, self.raw(key), why)
