"""Stands for `megatron_evomoe/data/picture.py`, which an export carries under this name."""

from megatron_evomoe.data.picture import as_rgb

__all__ = ["as_rgb"]
