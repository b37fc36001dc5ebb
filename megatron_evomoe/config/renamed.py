"""Fields that had another name in an earlier version.

Files and flags with the old name are still read, and a warning gives the present name. Whoever renames a
field adds a line to `RENAMED` in the same commit. The line stays for at least two minor versions and is
removed in a release whose notes say so.
"""

from __future__ import annotations

import logging
from typing import Any

from megatron_evomoe.config.errors import ConfigError
from megatron_evomoe.config.run import FLAT, SECTIONS, flat_name

RENAMED: dict[str, str] = {}
"""Old flat name -> present flat name (`config.run.FLAT`), for flags, stages and files alike."""

log = logging.getLogger(__name__)


def present_names(given: dict[str, Any], *, is_silent: bool = False) -> dict[str, Any]:
    """Flat names to values, with present names in place of old ones.

    Args:
        is_silent: do not warn; for what a checkpoint holds, which nobody can edit.

    Raises:
        ConfigError: a field is given under both of its names.
    """
    found = dict(given)
    for old in RENAMED.keys() & given.keys():
        if (new := RENAMED[old]) in given:
            raise ConfigError(f"{old} is the former name of {new}, and both are given; leave {old} out")
        if not is_silent:
            _warn(old, new)
        found[new] = found.pop(old)
    return found


def present_sections(raw: dict[str, Any], *, is_silent: bool = False) -> dict[str, Any]:
    """A file's content with present names, in their present sections. The stages are left as they are.

    Args:
        is_silent: as for `present_names`.

    Raises:
        ConfigError: a field is given under both of its names.
    """
    found: dict[str, Any] = {
        name: dict(values) if isinstance(values, dict) else values for name, values in raw.items()
    }
    for section in SECTIONS:
        values: Any = found.get(section)
        for name in list(values) if isinstance(values, dict) else ():
            old = flat_name(section, name)
            if old in FLAT or old not in RENAMED:
                continue
            target, new = FLAT[RENAMED[old]]
            place = found[target] = found.get(target) or {}
            if new in place:
                raise ConfigError(
                    f"{section}.{name} is the former name of {target}.{new}, and both are given"
                )
            if not is_silent:
                _warn(f"{section}.{name}", f"{target}.{new}")
            place[new] = values.pop(name)
    return found


def _warn(old: str, new: str) -> None:
    log.warning("%s is now called %s; the old name will be removed in a later version", old, new)
