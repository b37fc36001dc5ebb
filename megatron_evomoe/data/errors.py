"""What can go wrong with data: one bad sample (`SampleError`, counted) or too many of them (`DataError`,
fatal).
"""

from __future__ import annotations

from megatron_evomoe.errors import UserError


class SampleError(ValueError):
    """One sample cannot be used. `reason` is a short slug to count by; the message says what is wrong with
    this one.
    """

    def __init__(self, reason: str, message: str = "") -> None:
        # whatever a sample holds, its message goes on one line into logs and JSON, which take no lone
        # surrogates
        message = message if message.isprintable() else ascii(message)[1:-1]
        super().__init__(f"{reason}: {message}" if message else reason)
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple:
        # Exceptions rebuild themselves from `args`, which holds the joined text; worker processes send these
        # to the parent.
        return type(self), (self.reason, self.message)


class DataError(UserError, ValueError):
    """The data as a whole is not fit to train on; the message has counts by reason and examples."""
