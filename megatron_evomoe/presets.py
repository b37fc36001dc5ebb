"""Named model shapes: values for the `language` and `vision` sections of a configuration."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {"tiny": {"language": {}, "vision": {}}}
