"""The YAML of configurations: mappings, lists and scalars, each key once, of bounded size and depth.

Scalars are read as YAML 1.2 reads them, because YAML 1.1 converts some of them unexpectedly: it reads ``010``
as 8, ``1:30`` as 90, ``2024-01-01`` as a date and ``1e-5`` as text. Here ``1e-5`` is a number, and the other
three are text, which a number's field refuses. (``yes``, ``no``, ``on`` and ``off`` still mean true and
false.) `dump` quotes each text that either version would read as something else.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any, ClassVar

import yaml

from megatron_evomoe.config.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_VALUES = 100_000
MAX_DEPTH = 16

_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_]\w*)(?::-(?P<default>[^}\n]*))?\}")
# around the number of a variable while YAML is parsed; from Unicode's private use area
_OPEN, _CLOSE = "\ue000", "\ue001"
_PLACE = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")

_BOOL = re.compile(r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF")
_INT = re.compile(r"(?=.{1,40}$)[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
    r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
)
_NULL = re.compile(r"~|null|Null|NULL|")


def read_file(path: str | Path) -> Any:
    """The data of a YAML file, with ``${NAME}`` and ``${NAME:-default}`` replaced by environment variables.

    The value of a variable is one scalar, or part of one: it cannot add keys, lists or comments to the file.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, is too large, or contains YAML that this module
            refuses.
    """
    return load(_text_of(path), f"config file {path}", variables=True)


def load(text: str, source: str, *, variables: bool = False, scalars_are_text: bool = False) -> Any:
    """The data of a YAML text.

    Args:
        source: what the text is, for messages.
        variables: replace ``${NAME}`` by environment variables.
        scalars_are_text: read every scalar as text.

    Raises:
        ConfigError: the text is not valid YAML, or contains YAML that this module refuses.
    """
    found: list[re.Match[str]] = []
    if variables and _OPEN not in text and _CLOSE not in text:
        found = list(_VARIABLE.finditer(text))
        numbers = iter(range(len(found)))
        text = _VARIABLE.sub(lambda match: f"{_OPEN}{next(numbers)}{_CLOSE}", text)
    try:
        loader = (_TextLoader if scalars_are_text else _Loader)(text)
        loader.source, loader.variables = source, found
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())[:400]}") from None


def dump(data: Any) -> str:
    """The YAML text of `data`, which `read_file` reads back.

    A text that contains ``${`` would be read back as a variable; `types.Text` refuses such texts.
    """
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)


def _text_of(path: str | Path) -> str:
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # reading a pipe could block, and a device may be endless
            kind = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device"
            raise ConfigError(f"config file {path} is {kind}; give a plain file")
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except ConfigError:
        raise
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ConfigError(f"config file {str(path)[:200]!r} cannot be read: {error}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(
            f"config file {path} is larger than {MAX_BYTES} bytes; name data by directories, glob patterns "
            "or brace ranges"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None


class _Loader(yaml.SafeLoader):
    """Refuses tags, repeated keys, keys that are not text, and too many values or levels."""

    # PyYAML looks it up on the class; the stubs declare it for instances
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    source = ""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.variables: list[re.Match[str]] = []
        self._depth = 0
        # id of a finished node to its number of values and of levels, aliases counted as what they stand for
        self._extent: dict[int, tuple[int, int]] = {}

    def _refuse(self, node: Any, what: str) -> None:
        raise ConfigError(f"{self.source}, line {node.start_mark.line + 1}: {what}")

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        is_alias = isinstance(event, yaml.AliasEvent)
        if getattr(event, "tag", None) is not None:
            self._refuse(event, f"the tag {event.tag} is not read; leave it out, and put text in quotes")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._refuse(event, f"nested deeper than {MAX_DEPTH} levels; a configuration needs five")
        node = super().compose_node(parent, index)
        if is_alias and id(node) not in self._extent:
            self._refuse(event, f"*{event.anchor} lies inside the value that it stands for; write it out")
        self._measure(node)
        self._depth -= 1
        return node

    def _measure(self, node: Any) -> None:
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        extents = [self._extent[id(child)] for child in children]
        values = 1 + sum(v for v, _ in extents)
        levels = 1 + max((below for _, below in extents), default=0)
        if values > MAX_VALUES or levels > MAX_DEPTH:
            self._refuse(
                node,
                f"with its aliases written out, this is more than {MAX_VALUES} values or {MAX_DEPTH} levels",
            )
        self._extent[id(node)] = values, levels

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        if self.variables and _OPEN in node.value:
            node.value = _PLACE.sub(
                lambda place: self._value_of(self.variables[int(place[1])], node), node.value
            )
            if node.style is None:
                node.value = node.value.strip()
                node.tag = self.resolve(yaml.ScalarNode, node.value, (True, False))
        return node

    def _value_of(self, match: re.Match[str], node: Any) -> str:
        name, default = match["name"], match["default"]
        if name not in os.environ and default is None:
            self._refuse(node, f"${{{name}}} is used, which the environment does not set; export {name}=…")
        return os.environ.get(name) or default or ""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                self._refuse(
                    key, f"the key {str(key.value)[:80]!r} is not text; keys are names of sections and fields"
                )
            if key.value in lines:
                self._refuse(
                    key,
                    f"{key.value[:80]!r} appears twice in one mapping (first on line {lines[key.value]}); "
                    "keep one",
                )
            lines[key.value] = key.start_mark.line + 1
        return node


class _TextLoader(_Loader):
    """Reads every scalar as text."""

    # PyYAML looks it up on the class; the stubs declare it for instances
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]


class _Dumper(yaml.SafeDumper):
    """Quotes what either the resolvers of YAML 1.1 or ours would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in (
    ("bool", _BOOL, "yYnNtTfFoO"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("null", _NULL, ["~", "n", "N", ""]),
    ("merge", re.compile("<<"), "<"),
):
    _whole = re.compile(f"(?:{_pattern.pattern})$")
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _whole, list(_first))
