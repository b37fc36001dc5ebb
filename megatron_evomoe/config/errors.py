"""The error of a configuration."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the value, the rule and the remedy."""
