"""The base of the errors that are meant for users. It imports nothing, so that every room can build on it."""

from __future__ import annotations


class UserError(Exception):
    """An error whose message says all that a user needs: the value, the rule and the remedy.

    The command line prints it as one line, without a traceback, and ends with status 2.
    """
