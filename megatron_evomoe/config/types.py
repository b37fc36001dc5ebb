"""The types of fields with their ranges, and the messages about values that do not fit them.

No value is converted silently: true is not a number, 1.0 is not a whole number, 7 is not text. The one
    exception
is text in exponent notation (``"1e-5"``), which is read as a number, because programs that follow YAML 1.1
quote ``1e-5``.
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

_LARGEST = 2**31 - 1  # every counter, tensor size and file name can hold this number
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
            'names a directory: use at most 100 bytes, none of / \\ : * ? " < > |, none of . - ~ at the '
            "start and no blank at either end"
        )
    if value.lower() in ("profile", "vision_features"):
        raise ValueError("is the name of another directory of a run; choose another name")
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
"""A number of layers, experts or ranks."""
Seed = Annotated[Int, Field(ge=0, le=2**32 - 1)]
"""NumPy takes seeds of 32 bits."""

Float = Annotated[float, BeforeValidator(_exponent), Strict(), Field(allow_inf_nan=False)]
Share = Annotated[Float, Field(ge=0, le=1)]
PositiveShare = Annotated[Float, Field(gt=0, le=1)]
Decay = Annotated[Float, Field(ge=0, lt=1)]
Epsilon = Annotated[Float, Field(ge=1e-37, lt=1)]
"""A positive number that float32 can hold."""
Deviation = Annotated[Float, Field(gt=0, le=100)]
Rate = Annotated[Float, Field(ge=0, le=1000)]
"""A learning rate, or a coefficient of weight decay."""
Coefficient = Annotated[Float, Field(ge=0, le=1e6)]
Factor = Annotated[Float, Field(gt=0, le=1e6)]
Minutes = Annotated[Float, Field(ge=0.001, le=525_600)]
"""From 0.06 seconds, below which time limits would round to 0, to a year."""
Range = tuple[Share, Share]

Text = Annotated[str, Strict(), StringConstraints(min_length=1, max_length=4096), AfterValidator(_plain_text)]
ShortText = Annotated[Text, Field(max_length=128)]
StageName = Annotated[Text, AfterValidator(_stage_name)]
WandbName = Annotated[ShortText, AfterValidator(_wandb_name)]


def validated(section: type, field: str, value: Any, name: str) -> Any:
    """`value` as the type of a section's field.

    Raises:
        ConfigError: the value is not of that type; the message calls the field `name`.
    """
    try:
        return _adapter(section, field).validate_python(value)
    except pydantic.ValidationError as error:
        rule = _rule(error.errors(include_url=False), value)
    except (RecursionError, OverflowError):
        rule = "is nested too deeply, or too large"
    raise ConfigError(f"{name} = {shown(value)}: {rule}{_default(section, field)}")


def from_flag(section: type, field: str, given: str) -> Any:
    """The value that the text of a flag means for the type of a section's field.

    A text, and each item of a list of texts (``[a, b]``), is taken as typed; other values are read as in a
    file. ``null``, ``~`` and the empty text (``--load ""``) mean none where the field may be none.
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
    """Whether the flag of a field may stand without a value, which means true."""
    return _kinds(_hints(section)[field]) <= {bool, type(None)}


def shown(value: Any) -> str:
    """`value` for a message, in one line of limited length."""
    try:
        written = repr(value)
    except (RecursionError, ValueError):  # ValueError: a whole number of more digits than Python writes
        written = f"a {type(value).__name__}"
    return written if len(written) <= 120 else f"{written[:100]}… ({len(written)} characters)"


def nearest(word: Any, known: Iterable[str]) -> str:
    """The hint `` (did you mean 'x'?)`` for the known word most like `word`; empty if none is like it."""
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
    """The types of a union without their metadata; a `Literal` counts as the types of its values."""
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
    deepest = max(len(error["loc"]) for error in errors)  # the member of a union that validated furthest
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
