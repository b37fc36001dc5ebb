"""Command-line flags: one for each field of the configuration."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
from typing import Any

from megatron_evomoe.config.renamed import RENAMED, present_names
from megatron_evomoe.config.run import FLAT, SECTIONS
from megatron_evomoe.config.types import from_flag, takes_only_bool

# the spelling of these two flags in Megatron-LM
_ALIASES = {
    name: (f"--{name.replace('_', '-').replace('opt-param', 'opt_param')}",)
    for name in ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler")
}


def add_flags(parser: Any) -> None:
    """Add one flag for each field to a parser, with its doc as help; `flags_from` reads the values."""
    for key, (section, name) in FLAT.items():
        words = field_docs(SECTIONS[section]).get(name, "")
        alone = {"nargs": "?", "const": "true"} if takes_only_bool(SECTIONS[section], name) else {}
        parser.add_argument(
            f"--{key.replace('_', '-')}",
            *_ALIASES.get(key, ()),
            dest=f"cfg_{key}",
            metavar="VALUE",
            default=None,
            help=words.replace("%", "%%"),
            **alone,
        )
    for old, new in RENAMED.items():
        flags = [f"--{name.replace('_', '-')}" for name in (old, new)]
        parser.add_argument(
            flags[0], dest=f"cfg_{old}", metavar="VALUE", help=f"the former name of {flags[1]}"
        )


def flags_from(args: Any) -> dict[str, Any]:
    """The flags that were given, as flat names to values.

    Raises:
        ConfigError: the text of a flag is not a value of its field's type.
    """
    given = {k[4:]: v for k, v in vars(args).items() if k.startswith("cfg_") and v is not None}
    given = present_names(given)
    return {key: _value(key, text) for key, text in given.items()}


def _value(key: str, given: Any) -> Any:
    if key not in FLAT or not isinstance(given, str):
        return given
    section, name = FLAT[key]
    return from_flag(SECTIONS[section], name, given)


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, read from its source."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for statement, following in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            docs[statement.target.id] = ast.literal_eval(following.value)  # type: ignore[union-attr]
    return docs
