"""The types of fields, ranges included, and how a value that does not fit is told.

Nothing is converted silently: true is no number, 1.0 is no whole number, 7 is no text. The one exception:
text in exponent notation (``"1e-5"``) is a number, because YAML 1.1, and what other programs write with it,
takes ``1e-5`` for text.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field, Strict, StringConstraints

from megatron_evomoe.config import text
from megatron_evomoe.config.errors import ConfigError

_LARGEST = 2**31 - 1  # what every counter, tensor size and file name here can hold
_EXPONENT = re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+")


def _exponent(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _plain_text(value: str) -> str:
    if any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in value):
        raise ValueError("must not hold control characters")
    if "${" in value:
        raise ValueError(
            "must not hold ${; a variable is written ${NAME} or ${NAME:-default}, in the configuration file"
        )
    return value


def _stage_name(value: str) -> str:
    if (
        re.search(r'[/\\:*?"<>|]', value)
        or value[0] in ".-~"
        or value != value.strip()
        or len(value.encode()) > 100
    ):
        raise ValueError(
            'names a folder: at most 100 bytes, none of / \\ : * ? " < > |, not . - ~ first, no blank at an '
            "end"
        )
    if value.lower() in ("profile", "vision_features"):
        raise ValueError("is the name of another folder of a run; choose another name")
    return value


def _wandb_name(value: str) -> str:
    if re.search(r"[/\\#?%:]", value):
        raise ValueError("must be without any of / \\ # ? % : (a rule of wandb)")
    return value


Bool = Annotated[bool, Strict()]
Int = Annotated[int, Strict()]
Count = Annotated[Int, Field(ge=0, le=_LARGEST)]
PositiveCount = Annotated[Int, Field(ge=1, le=_LARGEST)]
Size = Annotated[Int, Field(ge=1, le=2**24)]
"""The size of a tensor along one axis, in elements."""
ZeroOrOne = Annotated[Int, Field(ge=0, le=1)]
Few = Annotated[Int, Field(ge=1, le=4096)]
"""Layers, experts, ranks."""
Seed = Annotated[Int, Field(ge=0, le=2**32 - 1)]
"""NumPy's limit; beyond it two seeds could draw the same."""

Float = Annotated[float, BeforeValidator(_exponent), Strict(), Field(allow_inf_nan=False)]
Share = Annotated[Float, Field(ge=0, le=1)]
PositiveShare = Annotated[Float, Field(gt=0, le=1)]
Decay = Annotated[Float, Field(ge=0, lt=1)]
Epsilon = Annotated[Float, Field(ge=1e-37, lt=1)]
"""Not 0 in fp32."""
Deviation = Annotated[Float, Field(gt=0, le=100)]
Rate = Annotated[Float, Field(ge=0, le=1000)]
"""A learning rate, or the rate of weight decay."""
Coefficient = Annotated[Float, Field(ge=0, le=1e6)]
Factor = Annotated[Float, Field(gt=0, le=1e6)]
Minutes = Annotated[Float, Field(ge=0.001, le=525_600)]
"""A millisecond, below which time limits round to 0, to a year."""
Range = tuple[Share, Share]

Text = Annotated[str, Strict(), StringConstraints(min_length=1, max_length=4096), AfterValidator(_plain_text)]
ShortText = Annotated[Text, Field(max_length=128)]
StageName = Annotated[Text, AfterValidator(_stage_name)]
WandbName = Annotated[ShortText, AfterValidator(_wandb_name)]


def validated(section: type, field: str, value: Any, name: str) -> Any:
    """`value` as `field` of a section holds it. Raises `ConfigError`, which calls the field `name`."""
    try:
        return _adapter(section, field).validate_python(value)
    except pydantic.ValidationError as error:
        rule = _rule(error.errors(include_url=False), value)
    except (RecursionError, OverflowError):
        rule = "is nested too deeply, or too large"
    raise ConfigError(f"{name} = {shown(value)}: {rule}{_default(section, field)}")


def from_flag(section: type, field: str, given: str) -> Any:
    """What a flag's text means for a field of that type.

    Text stays what was typed, and so do the items of a list of texts (``[a, b]``); everything else is read as
    in a file. ``null``, ``~`` and nothing at all (``--load ""``) mean none where the field may be none.
    """
    kinds = _kinds(_hints(section)[field])
    if type(None) in kinds and given in ("", "~", "null"):
        return None
    if str in kinds:
        return given
    source = f"the value of --{field.replace('_', '-')}"
    items = typing.get_args(next((kind for kind in kinds if typing.get_origin(kind) is list), None)) or (
        None,
    )
    return text.load(given, source, scalars_are_text=str in _kinds(items[0]))


def takes_only_bool(section: type, field: str) -> bool:
    """Whether a flag may stand without a value."""
    return _kinds(_hints(section)[field]) <= {bool, type(None)}


def shown(value: Any) -> str:
    """`value` for a message: one line, not too long."""
    try:
        written = repr(value)
    except (RecursionError, ValueError):  # ValueError: a whole number of more digits than Python writes
        written = f"a {type(value).__name__}"
    return written if len(written) <= 120 else f"{written[:100]}… ({len(written)} characters)"


def nearest(word: Any, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)``, or nothing."""
    close = (
        difflib.get_close_matches(word[:100], list(known), n=1, cutoff=0.4) if isinstance(word, str) else []
    )
    return f" (did you mean {close[0]!r}?)" if close else ""


@functools.cache
def _hints(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section, include_extras=True)


@functools.cache
def _adapter(section: type, field: str) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(_hints(section)[field])


def _kinds(hint: Any) -> set[Any]:
    """The types of a union, without their metadata; a choice of words counts as text."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _kinds(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        return set().union(*(_kinds(part) for part in typing.get_args(hint)))
    return {type(word) for word in typing.get_args(hint)} if origin is Literal else {hint}


_RULES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text; put it in quotes",
    "string_unicode": "must be valid Unicode",
    "list_type": "must be a list, [a, b]",
    "tuple_type": "must be a pair, [low, high]",
    "finite_number": "must be finite",
    "string_too_short": "must not be empty",
    "missing": "must be a pair, [low, high]",
    "too_long": "must be a pair, [low, high]",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "string_too_long": "must be at most {max_length} characters long",
    "literal_error": "must be one of {expected}",
    "value_error": "{error}",
}


def _rule(errors: list[Any], value: Any) -> str:
    deepest = max(len(error["loc"]) for error in errors)  # of a union, the kind that came furthest
    told: dict[str, None] = {}
    for error in (e for e in errors if len(e["loc"]) == deepest):
        rule = _RULES.get(error["type"], error["msg"]).format(**error.get("ctx", {}))
        item = next((part + 1 for part in error["loc"] if isinstance(part, int)), None)
        where = f"item {item} " if item is not None else ""
        hint = (
            nearest(error["input"], re.findall(r"'([^']+)'", rule))
            if error["type"] == "literal_error"
            else ""
        )
        told[f"{where}{rule}{hint}"] = None
    return ", or ".join(told)


def _default(section: type, field: str) -> str:
    default = next(f.default for f in dataclasses.fields(section) if f.name == field)
    return (
        "" if default is dataclasses.MISSING else f"; the default is {text.dump(default).split(chr(10))[0]}"
    )
