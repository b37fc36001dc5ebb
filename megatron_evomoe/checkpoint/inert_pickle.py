"""Reads a pickle as data: nothing is imported or called, and no object gets state.

Python's own unpickler asks which *names* a file may use, and then does with them what the file says. A name
that is harmless alone (a class, `getattr`) can be misused in that way. Here a name stays a name, and a call
becomes a note of what the file wants to call. Only the instructions are understood with which pickle
protocols 4 and 5 write plain objects; a file with any other instruction is refused. Memory and time grow with
the length of the file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

_LONGEST_INT = 16  # bytes


class PickleError(ValueError):
    """The bytes are not a pickle of plain data; the message says why."""


class Name(NamedTuple):
    """A global that the file names; it is not looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Call:
    """A call that the file asks for, with its arguments; it is not made."""

    what: Name
    args: tuple[Any, ...]


@dataclass(eq=False, slots=True)
class Instance:
    """An object that the file creates without arguments, and the state that it gives to it, if any."""

    kind: Name
    state: Any = None
    has_state: bool = False


class Pairs(list[tuple[Any, Any]]):
    """The keys and values of a dictionary in the order of the file; no key is hashed."""


_MARK = object()


class _Reader:
    """Reads a pickle in one pass over its bytes."""

    def __init__(
        self, content: bytes, is_name: Callable[[Name], bool], is_call: Callable[[Call], bool]
    ) -> None:
        self.content, self.at, self.is_name, self.is_call = content, 0, is_name, is_call
        self.stack: list[Any] = []
        self.memo: list[Any] = []

    def run(self) -> Any:
        content, steps = self.content, _STEPS
        if content[:1] != b"\x80" or content[1:2] not in (b"\x04", b"\x05"):
            raise PickleError("it does not begin as a pickle of protocol 4 or 5")
        self.at = 2
        try:
            while (code := content[self.at]) != _STOP:
                self.at += 1
                step = steps[code]
                if step is None:
                    raise PickleError(
                        f"it uses instruction {bytes([code])!r} at byte {self.at - 1}, which no checkpoint "
                        "needs"
                    )
                step(self)
        except (IndexError, struct.error):
            raise PickleError(f"it ends or goes wrong at byte {self.at}") from None
        if self.at + 1 != len(content) or len(self.stack) != 1:
            raise PickleError("something follows its end, or is left over")
        return self.stack[0]

    def take(self, count: int) -> bytes:
        start = self.at
        self.at += count
        if self.at > len(self.content):
            raise PickleError(f"it claims {count} bytes at byte {start}, and has {len(self.content) - start}")
        return self.content[start : self.at]

    def number(self, form: struct.Struct) -> int:
        return form.unpack(self.take(form.size))[0]

    def since_mark(self) -> list[Any]:
        stack = self.stack
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise PickleError(f"nothing was marked before byte {self.at}")
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def frame(self) -> None:
        """Check the length of a frame, which only tells how far to read ahead."""
        if (length := self.number(_U8)) > len(self.content) - self.at:
            raise PickleError(
                f"it claims a frame of {length} bytes at byte {self.at}, and has "
                f"{len(self.content) - self.at}"
            )

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, *kinds: type) -> Any:
        value = self.stack.pop()
        if value is _MARK or (kinds and type(value) not in kinds):
            raise PickleError(
                f"it takes {_in_words(value)} for {' or '.join(k.__name__ for k in kinds) or 'a value'} "
                f"at byte {self.at - 1}"
            )
        return value

    def top(self, kind: type) -> Any:
        value = self.stack[-1]
        if type(value) is not kind:
            raise PickleError(f"it takes {_in_words(value)} for a {kind.__name__} at byte {self.at - 1}")
        return value

    def text(self, form: struct.Struct) -> None:
        try:
            self.push(self.take(self.number(form)).decode())
        except UnicodeDecodeError:
            raise PickleError(f"it has a text that is not UTF-8 before byte {self.at}") from None

    def long(self) -> None:
        if (size := self.take(1)[0]) > _LONGEST_INT:
            raise PickleError(f"it has a number of {size} bytes at byte {self.at}")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def memoize(self) -> None:
        if self.stack[-1] is _MARK:
            raise PickleError(f"it keeps a mark at byte {self.at - 1}")
        self.memo.append(self.stack[-1])

    def recall(self, form: struct.Struct) -> None:
        self.push(self.memo[self.number(form)])

    def items(self, count: int | None) -> None:
        self.push(
            tuple(self.pop() for _ in range(count))[::-1] if count is not None else tuple(self.since_mark())
        )

    def append(self, values: list[Any]) -> None:
        self.top(list).extend(values)

    def set_items(self, values: list[Any]) -> None:
        if len(values) % 2:
            raise PickleError(f"it has a key without a value at byte {self.at - 1}")
        self.top(Pairs).extend(zip(values[::2], values[1::2], strict=True))

    def name(self) -> None:
        name, module = self.pop(str), self.pop(str)
        if not self.is_name(found := Name(module, name)):
            raise PickleError(f"it names {found}, which no checkpoint needs")
        self.push(found)

    def call(self) -> None:
        args, what = self.pop(tuple), self.pop(Name)
        if not self.is_call(call := Call(what, args)):
            raise PickleError(f"it calls {what} in a way that no checkpoint needs, at byte {self.at - 1}")
        self.push(call)

    def new(self) -> None:
        args, kind = self.pop(tuple), self.pop(Name)
        if args:
            raise PickleError(f"it makes a {kind} with arguments at byte {self.at - 1}")
        self.push(Instance(kind))

    def build(self) -> None:
        state, instance = self.pop(), self.top(Instance)
        if instance.has_state:
            raise PickleError(f"it gives state to a {instance.kind} twice at byte {self.at - 1}")
        instance.state, instance.has_state = state, True


def _in_words(value: Any) -> str:
    if isinstance(value, (Instance, Call)):
        return f"an object of {value.kind if isinstance(value, Instance) else value.what}"
    return (
        str(value) if isinstance(value, Name) else "a mark" if value is _MARK else f"a {type(value).__name__}"
    )


_U1, _U2, _I4, _U4, _U8, _F8 = (struct.Struct(form) for form in ("<B", "<H", "<i", "<I", "<Q", ">d"))
_STOP = ord(".")
_INSTRUCTIONS: dict[bytes, Callable[[_Reader], None]] = {
    b"\x95": _Reader.frame,
    b"N": lambda r: r.push(None),
    b"\x88": lambda r: r.push(True),
    b"\x89": lambda r: r.push(False),
    b"K": lambda r: r.push(r.number(_U1)),
    b"M": lambda r: r.push(r.number(_U2)),
    b"J": lambda r: r.push(r.number(_I4)),
    b"\x8a": _Reader.long,
    b"G": lambda r: r.push(r.number(_F8)),
    b"\x8c": lambda r: r.text(_U1),
    b"X": lambda r: r.text(_U4),
    b"\x8d": lambda r: r.text(_U8),
    b"]": lambda r: r.push([]),
    b"}": lambda r: r.push(Pairs()),
    b")": lambda r: r.push(()),
    b"\x85": lambda r: r.items(1),
    b"\x86": lambda r: r.items(2),
    b"\x87": lambda r: r.items(3),
    b"t": lambda r: r.items(None),
    b"(": lambda r: r.push(_MARK),
    b"a": lambda r: r.append([r.pop()]),
    b"e": lambda r: r.append(r.since_mark()),
    b"s": lambda r: r.set_items([r.pop(), r.pop()][::-1]),
    b"u": lambda r: r.set_items(r.since_mark()),
    b"\x94": _Reader.memoize,
    b"h": lambda r: r.recall(_U1),
    b"j": lambda r: r.recall(_U4),
    b"\x93": _Reader.name,
    b"R": _Reader.call,
    b"\x81": _Reader.new,
    b"b": _Reader.build,
}
_STEPS = [_INSTRUCTIONS.get(bytes([code])) for code in range(256)]


def read(content: bytes, is_name: Callable[[Name], bool], is_call: Callable[[Call], bool]) -> Any:
    """The content of a pickle, as None, bool, int, float, str, list, tuple and the classes of this module.

    Lists and pairs can contain themselves, and one value can appear in many places, so a walk through the
    result needs a limit.

    Args:
        is_name: whether the file may contain a name.
        is_call: whether the file may ask for a call.

    Raises:
        PickleError: the bytes are not such a pickle, or contain another name or call.
    """
    return _Reader(content, is_name, is_call).run()
