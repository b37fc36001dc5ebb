"""The error of a configuration."""

from __future__ import annotations

from megatron_evomoe.errors import UserError


class ConfigError(UserError, ValueError):
    """The configuration cannot be run; the message names the value, the rule and the remedy."""
