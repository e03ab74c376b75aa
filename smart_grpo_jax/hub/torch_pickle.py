"""The pickle inside a torch file, read by an interpreter that can build dictionaries and tensor records only.

A pickle is a program for a stack machine. Python's own machine can import and call anything; this one knows
the instructions that `torch.save` writes for a state dict, and the few names of torch_names.py. Nothing is
imported, called or copied in bulk: every instruction makes at most one small object, and their number is
bounded. Values are never walked or compared in depth, so that an object inside itself costs nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from smart_grpo_jax.hub.torch_names import CALLS, GLOBALS, STORAGES, Name, Refused, Storage, brief, whole

LONGEST = 8 * 2**20
"""Bytes of the longest pickle that is read: a state dict needs about 140 bytes a tensor."""

INSTRUCTIONS = 400_000
"""The most that one pickle may execute: a state dict needs about 35 a tensor."""

NAME = 200
"""Bytes of the longest name of a module or a class."""


def load(program: bytes) -> Any:
    """The value of a pickle: dictionaries, lists, tuples, numbers, strings and `Tensor` records."""
    machine = Machine(program)
    try:
        return machine.run()
    except (IndexError, KeyError, struct.error, UnicodeDecodeError, TypeError) as error:
        detail = f"{type(error).__name__} at byte {machine.at}"
        raise Refused(f"its pickle is damaged ({detail})") from error


class Machine:
    """Stack, marks and memo of one run."""

    def __init__(self, program: bytes) -> None:
        self.program = program
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Execute until STOP."""
        for _ in range(INSTRUCTIONS):
            code = self.take(1)[0]
            if code == STOP:
                return self.pop()
            step = STEPS.get(code)
            if step is None:
                raise Refused(f"its pickle has instruction {bytes([code])!r}, which weights do not need")
            step(self)
        raise Refused(f"its pickle has more than {INSTRUCTIONS} instructions")

    def take(self, count: int) -> bytes:
        """The next bytes of the program."""
        part = self.program[self.at : self.at + count]
        if len(part) < count:
            raise Refused("its pickle is cut")
        self.at += count
        return part

    def number(self, form: str) -> Any:
        """The next number of the program."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def pop(self) -> Any:
        """The top of the stack, above the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Refused("its pickle takes from an empty stack")
        return self.stack.pop()

    def marked(self) -> list[Any]:
        """All above the last mark, which is removed."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self, kind: type) -> Any:
        """The top of the stack, which stays, if it has this type."""
        if not self.stack or type(self.stack[-1]) is not kind:
            raise Refused(f"its pickle fills something that is no {kind.__name__}")
        return self.stack[-1]

    def line(self) -> str:
        """A name up to the end of its line."""
        end = self.program.find(b"\n", self.at, self.at + NAME + 1)
        if end < 0:
            raise Refused("its pickle has a name without an end")
        text = self.program[self.at : end].decode()
        self.at = end + 1
        return text


def text(machine: Machine, form: str) -> None:
    """A string with its length before it."""
    machine.stack.append(machine.take(machine.number(form)).decode())


def raw(machine: Machine, form: str) -> None:
    """Bytes with their length before them."""
    machine.stack.append(machine.take(machine.number(form)))


def long_number(machine: Machine) -> None:
    """An integer of up to 8 bytes: longer ones can be keys of equal hash by the thousand."""
    size = machine.number("<B")
    if size > 8:
        raise Refused(f"its pickle has an integer of {size} bytes")
    machine.stack.append(int.from_bytes(machine.take(size), "little", signed=True))


def protocol(machine: Machine) -> None:
    """The pickle protocol; 2 is torch's own."""
    if (version := machine.number("<B")) not in (2, 3, 4, 5):
        raise Refused(f"its pickle has protocol {version}")


def tuple_of(machine: Machine, count: int) -> None:
    """A tuple of the last few values."""
    items = [machine.pop() for _ in range(count)]
    machine.stack.append(tuple(reversed(items)))


def marked_tuple(machine: Machine) -> None:
    """A tuple of all since the mark."""
    machine.stack.append(tuple(machine.marked()))


def set_items(machine: Machine, items: list[Any]) -> None:
    """Key, value, key, value, … into the dictionary below them. Keys are plain: hashing walks a tuple."""
    found = machine.top(dict)
    if len(items) % 2:
        raise Refused("its pickle has a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int, float, bool, type(None)):
            raise Refused(f"a dictionary has {brief(key)} as a key")
        if key in found:
            raise Refused(f"a dictionary has {brief(key)} twice")
        found[key] = value


def set_item(machine: Machine) -> None:
    """One key and value."""
    value, key = machine.pop(), machine.pop()
    set_items(machine, [key, value])


def append(machine: Machine) -> None:
    """One value to the list below it."""
    value = machine.pop()
    machine.top(list).append(value)


def appends(machine: Machine) -> None:
    """All since the mark to the list below it."""
    values = machine.marked()
    machine.top(list).extend(values)


def remember(machine: Machine, number: int) -> None:
    """The top of the stack gets a number."""
    machine.memo[number] = machine.stack[-1]


def recall(machine: Machine, number: int) -> None:
    """What has this number, again."""
    machine.stack.append(machine.memo[number])


def name(machine: Machine, module: Any, attribute: Any) -> None:
    """A name, if it is one of GLOBALS."""
    if type(module) is not str or type(attribute) is not str:
        raise Refused("its pickle has a name that is no text")
    dotted = f"{module}.{attribute}"
    if dotted not in GLOBALS:
        raise Refused(f"its pickle names {dotted[:80]!r}, which weights do not need")
    machine.stack.append(Name(dotted, GLOBALS[dotted]))


def name_of_stack(machine: Machine) -> None:
    """Module and attribute from the stack."""
    attribute, module = machine.pop(), machine.pop()
    name(machine, module, attribute)


def call(machine: Machine) -> None:
    """Apply one of CALLS."""
    arguments, function = machine.pop(), machine.pop()
    if type(function) is not Name or function.text not in CALLS or type(arguments) is not tuple:
        raise Refused(f"its pickle calls {function.text if type(function) is Name else brief(function)}")
    machine.stack.append(CALLS[function.text](arguments))


def attributes(machine: Machine) -> None:
    """torch hangs the versions of the modules on a state dict; nothing here needs them."""
    machine.pop()
    machine.top(dict)


def storage(machine: Machine) -> None:
    """("storage", class, key, device, count): the device does not matter."""
    record = machine.pop()
    if type(record) is not tuple or len(record) != 5 or record[0] != "storage":
        raise Refused("its pickle refers to something that is no storage")
    _, kind, key, _, count = record
    if type(kind) is not Name or kind.text not in STORAGES or type(key) is not str:
        raise Refused(f"a storage has class {kind.text if type(kind) is Name else brief(kind)}")
    machine.stack.append(Storage(key, STORAGES[kind.text], whole(count, "the length of a storage")))


STOP = ord(".")

STEPS: Mapping[int, Callable[[Machine], None]] = {
    0x80: protocol,
    0x95: lambda m: m.number("<Q"),  # the length of a frame: a hint
    ord("("): lambda m: m.marks.append(len(m.stack)),
    ord("}"): lambda m: m.stack.append({}),
    ord("]"): lambda m: m.stack.append([]),
    ord(")"): lambda m: m.stack.append(()),
    ord("N"): lambda m: m.stack.append(None),
    0x88: lambda m: m.stack.append(True),
    0x89: lambda m: m.stack.append(False),
    ord("K"): lambda m: m.stack.append(m.number("<B")),
    ord("M"): lambda m: m.stack.append(m.number("<H")),
    ord("J"): lambda m: m.stack.append(m.number("<i")),
    ord("G"): lambda m: m.stack.append(m.number(">d")),
    0x8A: long_number,
    0x8C: lambda m: text(m, "<B"),
    ord("X"): lambda m: text(m, "<I"),
    0x8D: lambda m: text(m, "<Q"),
    ord("C"): lambda m: raw(m, "<B"),
    ord("B"): lambda m: raw(m, "<I"),
    0x85: lambda m: tuple_of(m, 1),
    0x86: lambda m: tuple_of(m, 2),
    0x87: lambda m: tuple_of(m, 3),
    ord("t"): marked_tuple,
    ord("s"): set_item,
    ord("u"): lambda m: set_items(m, m.marked()),
    ord("a"): append,
    ord("e"): appends,
    ord("q"): lambda m: remember(m, m.number("<B")),
    ord("r"): lambda m: remember(m, m.number("<I")),
    0x94: lambda m: remember(m, len(m.memo)),
    ord("h"): lambda m: recall(m, m.number("<B")),
    ord("j"): lambda m: recall(m, m.number("<I")),
    ord("c"): lambda m: name(m, m.line(), m.line()),
    0x93: name_of_stack,
    ord("R"): call,
    ord("b"): attributes,
    ord("Q"): storage,
}
"""The instructions that `torch.save` writes."""
