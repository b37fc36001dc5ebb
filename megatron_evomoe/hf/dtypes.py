"""The types in which weights can be written and computed."""

from __future__ import annotations

DTYPES = ("float32", "bfloat16", "float16")
"""Their names in torch, in a config.json and on the command line."""
