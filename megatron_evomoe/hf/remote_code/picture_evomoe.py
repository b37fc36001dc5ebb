"""The name under which an export carries `megatron_evomoe/data/picture.py` itself; `files.source_files` puts
that in its place.
"""

from megatron_evomoe.data.picture import as_rgb

__all__ = ["as_rgb"]
