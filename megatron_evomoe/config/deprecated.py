"""Values of fields that older configurations and checkpoints hold, and what stands in their place now.

A value stays here until the second minor release after the one that replaced it.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

REPLACED: dict[tuple[str, str], dict[str, str]] = {("moe", "dtr_kernel"): {"auto": "torch"}}
"""(section, field) -> old value -> new value."""

log = logging.getLogger(__name__)


def current(section: str, name: str, value: Any) -> Any:
    """`value`, or what replaces it; a replacement is reported once in a process."""
    replaced = REPLACED.get((section, name), {})
    if not isinstance(value, str) or value not in replaced:
        return value
    _report(section, name, value, replaced[value])
    return replaced[value]


@functools.cache
def _report(section: str, name: str, old: str, new: str) -> None:
    log.warning(
        "%s.%s = %s is deprecated and is read as %s, which computes the same", section, name, old, new
    )
