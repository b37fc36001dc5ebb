"""Replaces values of fields that older configurations and checkpoints hold (CONTRIBUTING.md, Deprecation)."""

from __future__ import annotations

import functools
import logging
from typing import Any

REPLACED: dict[tuple[str, str], dict[str, tuple[str, str]]] = {
    ("moe", "dtr_kernel"): {"auto": ("torch", "0.3.0")},
}
"""(section, field) -> old value -> (new value, release that refuses the old one)."""

log = logging.getLogger(__name__)


def current(section: str, name: str, value: Any) -> Any:
    """`value`, or what replaces it; a replacement is reported once in a process."""
    replaced = REPLACED.get((section, name), {})
    if not isinstance(value, str) or value not in replaced:
        return value
    new, refused_by = replaced[value]
    _report(f"{section}.{name}", value, new, refused_by)
    return new


@functools.cache
def _report(field: str, old: str, new: str, refused_by: str) -> None:
    log.warning(
        "%s = %s is read as %s; release %s will refuse it, so write %s", field, old, new, refused_by, new
    )
