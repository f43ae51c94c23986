"""Owns the inert pickle machine: it follows a pickle's opcodes and runs nothing they ask for.

Input: the bytes of a pickle. Tensors become descriptions, plain values stay what they are, and
every other global becomes a lifeless `Inert`. The list of globals that mean something is
`pickle_globals`; what may be called without raising suspicion is in `suspects`.
"""

import struct
from collections.abc import Callable
from typing import Any

from ensemblekit.containers import Inert, Unusable, suspects
from ensemblekit.containers.pickle_globals import (
    REBUILD,
    Global,
    StorageLookup,
    brief,
    brief_args,
    find_storage,
)
from ensemblekit.errors import DamagedError, HostileError

MAX_OPCODES = 5_000_000
MAX_STACK = 1_000_000
MAX_WORK = 1 << 30  # bytes copied by calls; each copy is small, their number might not be
_HINT = "copy the file again, or leave it out with --exclude"


class _Mark:
    """The boundary that MARK puts on the stack."""


_MARK = _Mark()


class EndsTooEarlyError(DamagedError):
    """The bytes end before the pickle does."""


def no_storage(key: str, numel: int, itemsize: int) -> Unusable:
    """The lookup for pickles that bring no storages."""
    return Unusable(f"lies in storage '{key}', which is not there", damaged=True)


def load(data: bytes, *, where: str, storage: StorageLookup) -> Any:
    """Follow the pickle in `data` to its end and return the inert object it describes.

    Args:
        data: A complete pickle of protocol 0 to 5.
        where: Name for messages, such as the file's path.
        storage: Finds the extent of a storage.

    Raises:
        HostileError: It calls into the interpreter or the operating system.
        DamagedError: It is no well-formed pickle, or asks for absurd amounts.
    """
    return load_prefix(data, where=where, storage=storage)[0]


def load_prefix(
    data: bytes,
    *,
    where: str,
    storage: StorageLookup,
    nested: Callable[[bytes], Any] | None = None,
    persistent: Callable[[Any], Any] | None = None,
) -> tuple[Any, int]:
    """The object of the pickle that `data` begins with, and the number of bytes it took.

    Args:
        data: Begins with a pickle.
        where: Name for messages.
        storage: Finds the extent of a storage.
        nested: Reads a torch file that lies in the pickle as bytes.
        persistent: What a persistent id means, where it is not one of torch's storages.

    Raises:
        EndsTooEarlyError: `data` end before the pickle does.
        HostileError, DamagedError: See `load`.
    """
    machine = _Machine(data, where)
    machine.nested = nested
    machine.find_persistent = persistent or (lambda identity: find_storage(identity, storage))
    return machine.run(), machine.place


class _Machine:
    """One run: the stack, the memo, and the place in the stream."""

    def __init__(self, data: bytes, where: str) -> None:
        self.data = data
        self.where = where
        self.nested: Callable[[bytes], Any] | None = None
        self.find_persistent: Callable[[Any], Any] = lambda _: None
        self.place = 0
        self.work = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        steps, data, end, stack = _OPCODES, self.data, len(self.data), self.stack
        for _ in range(MAX_OPCODES):
            if self.place >= end:
                raise self.too_early("it ends without STOP")
            code = data[self.place]
            self.place += 1
            step = steps.get(code)
            if step is None:
                if code == _STOP:
                    return self.finish()
                raise self.damaged(f"opcode 0x{code:02x} is not one that checkpoints use")
            step(self)
            if len(stack) > MAX_STACK:
                raise self.damaged(f"more than {MAX_STACK} values on the stack")
        raise self.damaged(f"more than {MAX_OPCODES} opcodes")

    def finish(self) -> Any:
        value = self.pop()
        if self.stack:
            raise self.damaged(f"{len(self.stack)} values are left over")
        return value

    # --- reading the stream

    def take(self, n: int) -> bytes:
        if n < 0:
            raise self.damaged(f"a length of {n}")
        if self.place + n > len(self.data):
            raise self.too_early(f"a value of {n} bytes runs past the end")
        chunk = self.data[self.place : self.place + n]
        self.place += n
        return chunk

    def number(self, form: struct.Struct) -> Any:
        try:
            (value,) = form.unpack_from(self.data, self.place)
        except struct.error:
            what = f"a value of {form.size} bytes runs past the end"
            raise self.too_early(what) from None
        self.place += form.size
        return value

    def line(self) -> str:
        stop = self.data.find(b"\n", self.place)
        if stop < 0:
            raise self.too_early("a text line has no end")
        return self.take(stop + 1 - self.place)[:-1].decode("latin1")

    # --- stack and memo

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise self.damaged("it takes from an empty stack")
        value = self.stack.pop()
        if value is _MARK:
            raise self.damaged("it takes a mark as a value")
        return value

    def peek(self) -> Any:
        if self.stack and self.stack[-1] is not _MARK:
            return self.stack[-1]
        return self.pop()  # which says what is wrong

    def pop_to_mark(self) -> list[Any]:
        stack = self.stack
        for i in range(len(stack) - 1, -1, -1):
            if stack[i] is _MARK:
                items = stack[i + 1 :]
                del stack[i:]
                return items
        raise self.damaged("it looks for a mark that is not there")

    def remember(self, key: int) -> None:
        self.memo[key] = self.peek()

    def recall(self, key: int) -> None:
        try:
            self.stack.append(self.memo[key])
        except KeyError:
            raise self.damaged(f"memo entry {key} was never written") from None

    def spend(self, amount: int) -> None:
        self.work += amount
        if self.work > MAX_WORK:
            raise self.damaged("it asks for the same work over and over")

    # --- what opcodes mean

    def find_global(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise self.damaged("a global without a name")
        self.push(Global(module, name))

    def call(self, function: Any, args: Any, *, new: bool = False) -> Any:
        """What REDUCE, NEWOBJ, INST and OBJ leave on the stack."""
        if not isinstance(args, tuple):
            args = tuple(args) if isinstance(args, list) else (args,)
        self.refuse_if_hostile(function, args, new=new)
        if isinstance(function, Inert):
            self.refuse_hidden_call(function)
            return Inert(function.cls, args)
        if not isinstance(function, Global):
            raise self.damaged(f"it calls a {type(function).__name__}")
        rebuild = REBUILD.get(function)
        if rebuild is None:
            if function.module in ("torch", "torch.cuda") and function.name.endswith("Tensor"):
                return Unusable(
                    f"is torch.{function.name}{brief_args(args)}: memory that nobody filled"
                )
            return Inert(str(function), args)
        try:
            return rebuild(self, args)
        except (
            TypeError,
            ValueError,
            AttributeError,
            IndexError,
            KeyError,
            OverflowError,
        ) as error:
            raise self.damaged(f"{function} with unusable arguments ({error})") from error

    def refuse_if_hostile(self, function: Any, args: tuple[Any, ...], *, new: bool) -> None:
        verdict = None
        if isinstance(function, Global):
            verdict = suspects.verdict(*function, args, instance_only=new)
        if verdict is None and args:
            for smuggled in suspects.of_type(Global, args):
                fetcher = smuggled.name == "getattr"
                if fetcher or suspects.verdict(smuggled.module, smuggled.name, ()):
                    verdict = f"{smuggled} handed to {_call_name(function)}"
        if verdict is not None:
            raise self.hostile(verdict)

    def hostile(self, call: str) -> HostileError:
        return HostileError(
            f"{self.where}: hostile pickle: it would call {call}. Nothing of it was run",
            hint="do not open this file with torch.load or pickle; ask where it came from, "
            "and leave it out with --exclude",
        )

    def refuse_hidden_call(self, function: Inert) -> None:
        """`getattr` may have fetched anything; methods of classes are data's own."""
        fetched = function.cls in ("builtins.getattr", "__builtin__.getattr")
        if fetched and not (function.args and suspects.is_attribute_of_a_class(function.args[0])):
            raise self.hostile(f"getattr{brief_args(function.args)}")

    def refuse_hooks(self, target: Inert, *names: str) -> None:
        """Methods that pickle would call may have been replaced by attributes set before."""
        attributes = target.attributes()
        for name in names:
            hook = attributes.get(name)
            if isinstance(hook, Global):
                self.refuse_if_hostile(hook, (), new=False)

    def append_all(self, items: list[Any]) -> None:
        target = self.peek()
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Inert):
            self.refuse_hooks(target, "append", "extend", "add")
            target.items.extend(items)
        else:
            raise self.damaged(f"it appends to a {type(target).__name__}")

    def hashable(self, key: Any) -> Any:
        """A key that hashes in constant time; nested tuples can be built to hash for years."""
        if isinstance(key, list | dict):
            raise self.damaged(f"a {type(key).__name__} as a key")
        if isinstance(key, int) and key.bit_length() > 60:
            self.spend(1 << 17)  # from here on any number of integers share one hash
        if isinstance(key, str | int | float | bytes | Global | Inert | type(None)):
            return key
        if isinstance(key, tuple) and len(key) < 64 and not any(type(k) is tuple for k in key):
            return tuple(self.hashable(k) for k in key)
        return Inert("key", (key,))

    def set_all(self, items: list[Any]) -> None:
        target = self.peek()
        if len(items) % 2:
            raise self.damaged("a key without a value")
        pairs = list(zip(items[::2], items[1::2], strict=True))
        if isinstance(target, dict):
            for key, value in pairs:
                target[self.hashable(key)] = value
        elif isinstance(target, Inert):
            self.refuse_hooks(target, "__setitem__")
            target.mapping.extend(pairs)
        elif isinstance(target, Global):
            self.refuse_if_hostile(target, (), new=False)
            raise self.damaged(f"it sets items on {target}")
        else:
            raise self.damaged(f"it sets items on a {type(target).__name__}")

    def build(self) -> None:
        state = self.pop()
        target = self.peek()
        if isinstance(target, Global):
            self.refuse_if_hostile(target, (state,), new=False)
        if isinstance(target, Inert):
            self.refuse_hooks(target, "__setstate__")
            target.state = state
        # a state on a dict is an attribute such as state_dict's `_metadata`; nothing needs it

    def persistent(self, identity: Any) -> None:
        """A storage: ('storage', class, key, location, numel[, view])."""
        self.push(self.find_persistent(identity))

    def too_early(self, what: str) -> EndsTooEarlyError:
        return EndsTooEarlyError(str(self.damaged(what)), hint=_HINT)

    def damaged(self, what: str) -> DamagedError:
        return DamagedError(
            f"{self.where}: damaged pickle at byte {self.place}: {what}", hint=_HINT
        )


def _call_name(function: Any) -> str:
    return str(function) if isinstance(function, Global) else brief(function)


# --- opcodes: what each takes from the stream and does to the stack

_Step = Callable[[_Machine], None]
_U8, _U16, _U32, _U64 = map(struct.Struct, ("<B", "<H", "<I", "<Q"))
_I32, _DOUBLE = map(struct.Struct, ("<i", ">d"))


def _constant(value: Any) -> _Step:
    return lambda m: m.stack.append(value)


def _fixed(form: struct.Struct) -> _Step:
    return lambda m: m.stack.append(m.number(form))


def _counted(form: struct.Struct, convert: Callable[[bytes], Any]) -> _Step:
    def step(m: _Machine) -> None:
        chunk = m.take(m.number(form))
        try:
            m.push(convert(chunk))
        except ValueError as error:
            raise m.damaged(str(error)) from error

    return step


def _signed(chunk: bytes) -> int:
    if len(chunk) > 1024:  # Python refuses to write more than 4300 digits
        raise ValueError(f"an integer of {len(chunk)} bytes")
    return int.from_bytes(chunk, "little", signed=True)


def _unicode(chunk: bytes) -> str:
    return chunk.decode("utf-8", "surrogatepass")


def _latin(chunk: bytes) -> str:
    return chunk.decode("latin1")


def _text(convert: Callable[[str], Any]) -> _Step:
    def step(m: _Machine) -> None:
        text = m.line()
        try:
            m.push(convert(text))
        except ValueError as error:
            raise m.damaged(f"{brief(text)} is not what its opcode says") from error

    return step


def _text_int(text: str) -> Any:
    return text == "01" if text in ("00", "01") else _whole(text)


def _whole(text: str) -> int:
    if len(text) > 2000:
        raise ValueError(text)
    return int(text)


def _quoted(text: str) -> str:
    if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0]:
        raise ValueError(text)
    return text[1:-1].encode("latin1", "replace").decode("unicode_escape", "replace")


def _tuple_of(n: int) -> _Step:
    def step(m: _Machine) -> None:
        items = [m.pop() for _ in range(n)]
        m.push(tuple(reversed(items)))

    return step


def _dict_from_mark(m: _Machine) -> None:
    items = m.pop_to_mark()
    m.push({})
    m.set_all(items)


def _pop_any(m: _Machine) -> None:
    if not m.stack:
        raise m.damaged("it takes from an empty stack")
    m.stack.pop()


def _pop_mark(m: _Machine) -> None:
    m.pop_to_mark()


def _global_lines(m: _Machine) -> None:
    module = _name(m.line())
    m.find_global(module, _name(m.line()))


def _name(line: str) -> str:
    return line.encode("latin1").decode("utf-8", "surrogateescape")


def _stack_global(m: _Machine) -> None:
    name, module = m.pop(), m.pop()
    m.find_global(module, name)


def _reduce(m: _Machine) -> None:
    args, function = m.pop(), m.pop()
    m.push(m.call(function, args))


def _newobj(m: _Machine) -> None:
    args, cls = m.pop(), m.pop()
    m.push(m.call(cls, args, new=True))


def _newobj_ex(m: _Machine) -> None:
    kwargs, args, cls = m.pop(), m.pop(), m.pop()
    args = args if isinstance(args, tuple) else (args,)
    m.push(m.call(cls, (*args, kwargs) if kwargs else args, new=True))


def _inst(m: _Machine) -> None:
    module = _name(m.line())
    m.find_global(module, _name(m.line()))
    cls = m.pop()
    m.push(m.call(cls, tuple(m.pop_to_mark())))


def _obj(m: _Machine) -> None:
    items = m.pop_to_mark()
    if not items:
        raise m.damaged("OBJ without a class")
    m.push(m.call(items[0], tuple(items[1:])))


def _append(m: _Machine) -> None:
    item = m.pop()
    m.append_all([item])


def _setitem(m: _Machine) -> None:
    value, key = m.pop(), m.pop()
    m.set_all([key, value])


def _frame(m: _Machine) -> None:
    if m.number(_U64) > len(m.data) - m.place:
        raise m.damaged("a frame runs past the end")


def _proto(m: _Machine) -> None:
    version = m.number(_U8)
    if version > 5:
        raise m.damaged(f"protocol {version}")


def _extension(m: _Machine) -> None:
    raise m.damaged("it uses the extension registry, which no checkpoint does")


_STOP = ord(".")
_OPCODES: dict[int, _Step] = {
    ord("("): _constant(_MARK),
    ord("0"): _pop_any,
    ord("1"): _pop_mark,
    ord("2"): lambda m: m.push(m.peek()),
    # numbers and constants
    ord("N"): _constant(None),
    0x88: _constant(True),
    0x89: _constant(False),
    ord("I"): _text(_text_int),
    ord("L"): _text(lambda t: _whole(t.removesuffix("L"))),
    ord("F"): _text(float),
    ord("J"): _fixed(_I32),
    ord("K"): _fixed(_U8),
    ord("M"): _fixed(_U16),
    ord("G"): _fixed(_DOUBLE),
    0x8A: _counted(_U8, _signed),
    0x8B: _counted(_I32, _signed),
    # texts and bytes
    ord("S"): _text(_quoted),
    ord("V"): _text(lambda t: t.encode("latin1").decode("raw_unicode_escape", "replace")),
    ord("T"): _counted(_I32, _latin),
    ord("U"): _counted(_U8, _latin),
    ord("X"): _counted(_U32, _unicode),
    0x8C: _counted(_U8, _unicode),
    0x8D: _counted(_U64, _unicode),
    ord("B"): _counted(_U32, bytes),
    ord("C"): _counted(_U8, bytes),
    0x8E: _counted(_U64, bytes),
    0x96: _counted(_U64, bytes),
    # collections
    ord("]"): lambda m: m.push([]),
    ord("}"): lambda m: m.push({}),
    ord(")"): _constant(()),
    0x8F: lambda m: m.push(Inert("builtins.set")),
    ord("l"): lambda m: m.push(m.pop_to_mark()),
    ord("t"): lambda m: m.push(tuple(m.pop_to_mark())),
    ord("d"): _dict_from_mark,
    0x85: _tuple_of(1),
    0x86: _tuple_of(2),
    0x87: _tuple_of(3),
    ord("a"): _append,
    ord("e"): lambda m: m.append_all(m.pop_to_mark()),
    ord("s"): _setitem,
    ord("u"): lambda m: m.set_all(m.pop_to_mark()),
    0x90: lambda m: m.append_all(m.pop_to_mark()),
    0x91: lambda m: m.push(Inert("builtins.frozenset", (), None, m.pop_to_mark())),
    # memo
    ord("p"): lambda m: m.remember(_memo_key(m)),
    ord("q"): lambda m: m.remember(m.number(_U8)),
    ord("r"): lambda m: m.remember(m.number(_U32)),
    0x94: lambda m: m.remember(len(m.memo)),
    ord("g"): lambda m: m.recall(_memo_key(m)),
    ord("h"): lambda m: m.recall(m.number(_U8)),
    ord("j"): lambda m: m.recall(m.number(_U32)),
    # names and objects
    ord("c"): _global_lines,
    0x93: _stack_global,
    ord("R"): _reduce,
    0x81: _newobj,
    0x92: _newobj_ex,
    ord("i"): _inst,
    ord("o"): _obj,
    ord("b"): lambda m: m.build(),
    ord("Q"): lambda m: m.persistent(m.pop()),
    ord("P"): lambda m: m.persistent(m.line()),
    # framing
    0x80: _proto,
    0x95: _frame,
    0x82: _extension,
    0x83: _extension,
    0x84: _extension,
}


def _memo_key(m: _Machine) -> int:
    text = m.line()
    if not text.isdecimal() or len(text) > 18:
        raise m.damaged(f"memo entry {brief(text)}")
    return int(text)
