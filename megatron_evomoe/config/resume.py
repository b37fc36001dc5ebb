"""What a resume does where a field differs from the checkpoint: a class that each field declares.

``lr: Logged[float]`` is ``Annotated[float, OnResume.LOGGED]``: the type of the field stays float, and
`on_resume` reads the class.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import typing
from typing import Annotated, TypeVar

T = TypeVar("T")


class OnResume(enum.Enum):
    """What a resume does where a field of the configuration differs from the checkpoint."""

    MUST_EQUAL = "refused unless allowed on purpose"
    """For fields that define the results: the model, the samples and their order, the seed.

    A change would give results that neither configuration gives alone.
    """
    LOGGED = "may change; one line in the log and an event"
    """For fields of optimization, layout, precision, kernels and paths.

    The contents of paths are compared by their fingerprints.
    """
    FREE = "may change"
    """For fields on which no computed number depends: logs, worker processes, save intervals, time limits."""


Fixed = Annotated[T, OnResume.MUST_EQUAL]
Logged = Annotated[T, OnResume.LOGGED]
Free = Annotated[T, OnResume.FREE]


def on_resume(section: type, field: str) -> OnResume:
    """The class that `field` of a section (such as `MoEConfig`) declares.

    Raises:
        TypeError: the field declares no class, or several.
    """
    found = _declared(section)[field]
    if len(found) != 1:
        raise TypeError(
            f"{section.__name__}.{field} must declare one of Fixed[…], Logged[…], Free[…], not {len(found)}"
        )
    return found[0]


@functools.cache
def _declared(section: type) -> dict[str, list[OnResume]]:
    hints = typing.get_type_hints(section, include_extras=True)
    return {
        f.name: [m for m in getattr(hints[f.name], "__metadata__", ()) if isinstance(m, OnResume)]
        for f in dataclasses.fields(section)
    }
