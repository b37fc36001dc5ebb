"""Errors of data: `SampleError` for one sample, which is counted; `DataError` for the data as a whole."""

from __future__ import annotations

from megatron_evomoe.errors import UserError


class SampleError(ValueError):
    """One sample cannot be used.

    Attributes:
        reason: a short slug, by which samples are counted.
        message: what is wrong with this sample.
    """

    def __init__(self, reason: str, message: str = "") -> None:
        # escaped, because logs need one line and JSON takes no lone surrogates
        message = message if message.isprintable() else ascii(message)[1:-1]
        super().__init__(f"{reason}: {message}" if message else reason)
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple:
        # Worker processes send these to their parent, and by default an exception is rebuilt from `args`,
        # which holds the joined text.
        return type(self), (self.reason, self.message)


class DataError(UserError, ValueError):
    """The data as a whole cannot be trained on; the message has counts by reason and examples."""
