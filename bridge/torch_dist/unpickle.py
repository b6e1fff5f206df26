"""A pickle read as data: nothing is imported and nothing that the bytes name is called.

Python's `pickle` imports the classes that a pickle names and calls them, which is how a file runs code. Here a name is
looked up in the caller's table of `Class`es, `Function`s and plain values; one that is not in the table is refused.
An instance becomes a `Record` of its attributes, a dictionary becomes `Items`: no `__init__`, `__setstate__` or
`__hash__` of anything runs. Memory grows with the bytes read, and nesting costs no recursion.

The opcodes are those that Python's picklers of protocols 2 to 5 write for such values (`pickletools` describes them);
every other one is refused.
"""

import pickle
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Class(NamedTuple):
    """A class whose instances are read as records."""

    name: str


class Function(NamedTuple):
    """What a name does when the pickle calls it; `call` must accept any arguments, and may raise ValueError."""

    name: str
    call: Callable[..., Any]


class Record:
    """An instance: the name of its class, and its state (a dictionary of attributes, or a tuple)."""

    __slots__ = ("kind", "state")
    state: dict[str, Any] | tuple[Any, ...] | None

    def __init__(self, kind: str):
        self.kind, self.state = kind, None


class Items(list):
    """A dictionary as its (key, value) pairs, in order."""


def unpickle(data: bytes, known: Mapping[tuple[str, str], Any]) -> Any:
    """The value that `data` describes, by the names in `known`: {(module, name): what stands for it}.

    Raises:
        ValueError: the bytes are no whole pickle, use an opcode that is not written for data, or name something that
            is not in `known`; says what.
    """
    machine = _Machine(data, known)
    try:
        return machine.run()
    except (IndexError, KeyError, TypeError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"no whole pickle: damaged before byte {machine.at}") from error


class _Machine:
    def __init__(self, data: bytes, known: Mapping[tuple[str, str], Any]):
        self.data, self.known, self.at = data, known, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        data, operations = self.data, _OPERATIONS
        while (code := data[self.at]) != _STOP:
            self.at += 1
            operation = operations.get(code)
            if operation is None:
                raise ValueError(f"opcode {bytes([code])!r} at byte {self.at - 1}, which no pickle of plain data has")
            operation(self)
        if len(self.stack) != 1:
            raise IndexError
        return self.stack[0]

    def take(self, count: int) -> bytes:
        """The next bytes, all of them."""
        start = self.at
        self.at = start + count
        if self.at > len(self.data):
            raise IndexError
        return self.data[start : self.at]

    def number(self, layout: struct.Struct) -> Any:
        """The next number."""
        (value,) = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return value

    def line(self) -> str:
        """The next line, without its end."""
        stop = self.data.find(b"\n", self.at)
        if stop < 0:
            raise IndexError
        text = self.data[self.at : stop].decode()
        self.at = stop + 1
        return text

    def marked(self) -> list[Any]:
        """What was pushed since the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def pop(self, kind: Any) -> Any:
        value = self.stack.pop()
        if type(value) is not kind:
            raise TypeError
        return value


_STOP = pickle.STOP[0]
_ONE, _TWO, _FOUR = struct.Struct("<B"), struct.Struct("<H"), struct.Struct("<I")
_SIGNED, _EIGHT, _FLOAT = struct.Struct("<i"), struct.Struct("<Q"), struct.Struct(">d")


def _push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(make(machine))


def _constant(value: Any) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value)


def _text(length: struct.Struct) -> Callable[[_Machine], None]:
    return _push(lambda machine: machine.take(machine.number(length)).decode("utf-8", "surrogatepass"))


def _tuple(count: int) -> Callable[[_Machine], None]:
    def make(machine: _Machine) -> None:
        items = tuple(machine.stack[-count:])
        if len(items) < count:
            raise IndexError
        machine.stack[-count:] = [items]

    return make


def _put(index: Callable[[_Machine], int]) -> Callable[[_Machine], None]:
    def put(machine: _Machine) -> None:
        machine.memo[index(machine)] = machine.stack[-1]

    return put


def _get(length: struct.Struct) -> Callable[[_Machine], None]:
    return _push(lambda machine: machine.memo[machine.number(length)])


def _extend(items: Callable[[_Machine], list[Any]]) -> Callable[[_Machine], None]:
    """More elements for the list below them."""

    def extend(machine: _Machine) -> None:
        new = items(machine)
        target = machine.pop(list)
        target.extend(new)
        machine.stack.append(target)

    return extend


def _update(items: Callable[[_Machine], list[Any]]) -> Callable[[_Machine], None]:
    """More keys and values for the dictionary below them."""

    def update(machine: _Machine) -> None:
        new = items(machine)
        target = machine.pop(Items)
        if len(new) % 2:
            raise IndexError
        target.extend(zip(new[::2], new[1::2], strict=True))
        machine.stack.append(target)

    return update


def _last(count: int) -> Callable[[_Machine], list[Any]]:
    return lambda machine: [machine.stack.pop() for _ in range(count)][::-1]


def _name(machine: _Machine, module: Any, name: Any) -> None:
    if type(module) is not str or type(name) is not str:
        raise TypeError
    if (module, name) not in machine.known:
        raise ValueError(f"names {f'{module}.{name}'[:200]}, which is no part of a checkpoint's metadata")
    machine.stack.append(machine.known[module, name])


def _reduce(machine: _Machine) -> None:
    arguments, function = machine.pop(tuple), machine.stack.pop()
    if not isinstance(function, Function):
        raise ValueError(f"calls {_described(function)}, which is nothing to call")
    machine.stack.append(function.call(*arguments))


def _new(machine: _Machine) -> None:
    arguments, kind = machine.pop(tuple), machine.stack.pop()
    if not isinstance(kind, Class) or arguments:
        raise ValueError(f"makes an instance of {_described(kind)}, which is not made so")
    machine.stack.append(Record(kind.name))


def _build(machine: _Machine) -> None:
    state, target = machine.stack.pop(), machine.stack[-1]
    if not isinstance(target, Record) or target.state is not None:
        raise ValueError(f"sets the state of {_described(target)}, which has none to be set")
    if type(state) is Items and all(type(key) is str for key, _ in state):
        state = dict(state)
    if not isinstance(state, dict | tuple):
        raise ValueError(f"gives a {target.kind} the state {_described(state)}")
    target.state = state


def _described(value: Any) -> str:
    """For messages: never what a value holds, which may be endless."""
    return value.name if isinstance(value, Class | Function) else f"a {type(value).__name__}"


_OPERATIONS: dict[int, Callable[[_Machine], object]] = {
    code[0]: operation
    for code, operation in {
        pickle.PROTO: lambda machine: machine.take(1),
        pickle.FRAME: lambda machine: machine.take(8),
        pickle.MARK: lambda machine: machine.marks.append(len(machine.stack)),
        pickle.NONE: _constant(None),
        pickle.NEWTRUE: _constant(True),
        pickle.NEWFALSE: _constant(False),
        pickle.BININT: _push(lambda machine: machine.number(_SIGNED)),
        pickle.BININT1: _push(lambda machine: machine.number(_ONE)),
        pickle.BININT2: _push(lambda machine: machine.number(_TWO)),
        pickle.LONG1: _push(lambda machine: int.from_bytes(machine.take(machine.number(_ONE)), "little", signed=True)),
        pickle.BINFLOAT: _push(lambda machine: machine.number(_FLOAT)),
        pickle.SHORT_BINUNICODE: _text(_ONE),
        pickle.BINUNICODE: _text(_FOUR),
        pickle.BINUNICODE8: _text(_EIGHT),
        pickle.EMPTY_TUPLE: _constant(()),
        pickle.TUPLE1: _tuple(1),
        pickle.TUPLE2: _tuple(2),
        pickle.TUPLE3: _tuple(3),
        pickle.TUPLE: _push(lambda machine: tuple(machine.marked())),
        pickle.EMPTY_LIST: _push(lambda machine: []),
        pickle.APPEND: _extend(_last(1)),
        pickle.APPENDS: _extend(_Machine.marked),
        pickle.EMPTY_DICT: _push(lambda machine: Items()),
        pickle.SETITEM: _update(_last(2)),
        pickle.SETITEMS: _update(_Machine.marked),
        pickle.MEMOIZE: _put(lambda machine: len(machine.memo)),
        pickle.BINPUT: _put(lambda machine: machine.number(_ONE)),
        pickle.LONG_BINPUT: _put(lambda machine: machine.number(_FOUR)),
        pickle.BINGET: _get(_ONE),
        pickle.LONG_BINGET: _get(_FOUR),
        pickle.GLOBAL: lambda machine: _name(machine, machine.line(), machine.line()),
        pickle.STACK_GLOBAL: lambda machine: _name(machine, *_last(2)(machine)),
        pickle.REDUCE: _reduce,
        pickle.NEWOBJ: _new,
        pickle.BUILD: _build,
    }.items()
}
