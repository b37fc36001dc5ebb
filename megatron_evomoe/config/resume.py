"""What a field may do when a stage goes on from its checkpoint: a class, declared beside each field.

``lr: Said[float]`` is ``Annotated[float, OnResume.SAID]``: the type stays what it is, and `on_resume` reads
the class back.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import typing
from typing import Annotated, TypeVar

T = TypeVar("T")


class OnResume(enum.Enum):
    """What happens where a stage goes on under a configuration whose value differs from its checkpoint's."""

    MUST_EQUAL = "refused unless allowed on purpose"
    """The stage would give other numbers than either configuration alone gives: model, samples and their
    order, seed.
    """
    SAID = "may change; one line in the log and an event"
    """Optimization, layout, precision and kernels; and paths, whose contents are compared by their
    fingerprints.
    """
    FREE = "may change"
    """Nothing that is computed depends on it: logs, workers, save intervals, time limits."""


Fixed = Annotated[T, OnResume.MUST_EQUAL]
Said = Annotated[T, OnResume.SAID]
Free = Annotated[T, OnResume.FREE]


def on_resume(section: type, field: str) -> OnResume:
    """The class that `field` of a section (``MoEConfig``, …) declares. Raises `TypeError` unless it declares
    exactly one.
    """
    found = _declared(section)[field]
    if len(found) != 1:
        raise TypeError(
            f"{section.__name__}.{field} must declare one of Fixed[…], Said[…] and Free[…], not {len(found)}"
        )
    return found[0]


@functools.cache
def _declared(section: type) -> dict[str, list[OnResume]]:
    hints = typing.get_type_hints(section, include_extras=True)
    return {
        f.name: [m for m in getattr(hints[f.name], "__metadata__", ()) if isinstance(m, OnResume)]
        for f in dataclasses.fields(section)
    }
