"""Names in an exported directory that both the export and the import need."""

from __future__ import annotations

OWN_KEY = "evomoe_config"
"""Key of an export's ``config.json`` for this package's configuration and the stage kind.

An import reads them, so that no information is lost.
"""
EMBEDDING = "language_model.model.embed_tokens.weight"
OUTPUT = "language_model.lm_head.weight"
OUTPUT_BIAS = "language_model.lm_head.bias"
