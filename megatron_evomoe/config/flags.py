"""Command-line flags, one per field."""

from __future__ import annotations

import ast
import inspect
import itertools
from typing import Any

import yaml

from megatron_evomoe.config.run import FLAT, SECTIONS

# Megatron's own spelling of these two
_ALIASES = {name: (f"--{name.replace('_', '-').replace('opt-param', 'opt_param')}",)
            for name in ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler")}


def add_flags(parser: Any) -> None:
    """One flag per field, with the field's own words as help. Values stay text; `coerce` reads them as YAML would."""
    for key, (section, name) in FLAT.items():
        parser.add_argument(f"--{key.replace('_', '-')}", *_ALIASES.get(key, ()), dest=f"cfg_{key}", metavar="VALUE", nargs="?",
                            const="true", help=_field_docs(SECTIONS[section]).get(name), default=None)


def flags_from(args: Any) -> dict[str, Any]:
    """The flags that were given, as flat names to values."""
    given = {k[4:]: v for k, v in vars(args).items() if k.startswith("cfg_") and v is not None}
    return {k: yaml.safe_load(v) if isinstance(v, str) else v for k, v in given.items()}


def _field_docs(cls: type) -> dict[str, str]:
    """The string under each field, read from the source."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for statement, following in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            docs[statement.target.id] = ast.literal_eval(following.value).replace("%", "%%")  # type: ignore[union-attr]
    return docs
