"""Tensors that had another name in an earlier version.

Checkpoints with the old name are read as if they had the present one. Whoever renames a tensor adds a line to
`RENAMED` in the same commit. The line stays as long as checkpoints of that version are promised to load (the
next major version at least).
"""

from __future__ import annotations

import dataclasses
import re

from torch.distributed.checkpoint.metadata import Metadata

RENAMED: dict[str, str] = {}
"""Present name by old name: whole segments of a key, such as ``mlp.router.weight``.

The optimizer's state of a parameter is renamed with the parameter.
"""


def present_name(key: str) -> str:
    """The name that the tensor `key` of a checkpoint has now."""
    for old, new in RENAMED.items():
        key = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, key)
    return key


def with_present_names(found: Metadata) -> Metadata:
    """What `.metadata` says, with present names. Files hold no names, so nothing else needs to change.

    Raises:
        ValueError: two tensors would have one name.
    """
    if not RENAMED:
        return found
    entries = {present_name(key): entry for key, entry in found.state_dict_metadata.items()}
    if len(entries) != len(found.state_dict_metadata):
        raise ValueError("it holds a tensor under its old name and under its present one")
    places = {
        dataclasses.replace(index, fqn=present_name(index.fqn)): place
        for index, place in found.storage_data.items()
    }
    return dataclasses.replace(found, state_dict_metadata=entries, storage_data=places)
