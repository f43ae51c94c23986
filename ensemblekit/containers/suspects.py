"""Owns the question whether a pickle's call is data or an attack.

Input: the names of a call found in a pickle. No call is ever made; an attack is still refused,
because a file that carries one is not a file to build a product on. The standard library is
judged by what is allowed: beyond these modules and names a checkpoint has nothing to call in it.
"""

import sys
from collections.abc import Iterator
from typing import Any

# Standard modules whose objects are plain data wherever they appear.
_DATA_MODULES = {
    "argparse",
    "array",
    "collections",
    "copyreg",
    "copy_reg",
    "dataclasses",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "functools",
    "ipaddress",
    "itertools",
    "logging",
    "numbers",
    "pathlib",
    "queue",
    "random",
    "_random",
    "re",
    "statistics",
    "string",
    "time",
    "typing",
    "uuid",
    "weakref",
    "zoneinfo",
    "__main__",
    "__mp_main__",
}
_DATA_NAMES = {
    ("_codecs", "encode"),
    ("codecs", "encode"),
    ("types", "SimpleNamespace"),
    ("types", "MappingProxyType"),
    ("types", "MethodType"),
    ("types", "GenericAlias"),
    ("operator", "itemgetter"),
    ("_operator", "itemgetter"),
    ("threading", "Event"),
    ("inspect", "Signature"),
    ("inspect", "Parameter"),
    ("inspect", "_ParameterKind"),
}
_BUILTINS = {
    *("bool", "bytearray", "bytes", "complex", "dict", "enumerate", "filter", "float"),
    *("frozenset", "int", "iter", "list", "map", "max", "min", "object", "property", "range"),
    *("reversed", "set", "slice", "staticmethod", "classmethod", "str", "super", "tuple"),
    *("type", "zip", "sorted", "len", "sum", "abs", "round", "print"),
}
# Outside of the standard library: loaders that run what they load, shells, compilers.
_LOADERS = {
    "torch": {"load", "compile", "classes", "ops"},
    "torch.serialization": {"load", "_legacy_load", "_load"},
    "torch.utils.data": {"get_worker_info"},
    "numpy": {"load", "loadtxt", "genfromtxt", "fromfile", "memmap", "save", "savetxt", "tofile"},
    "numpy.lib.npyio": {"load", "loadtxt", "genfromtxt", "save", "savetxt"},
    "numpy.lib._npyio_impl": {"load", "loadtxt", "genfromtxt", "save", "savetxt"},
    "pandas": {"read_pickle", "eval", "read_csv", "read_sql"},
    "pandas.io.pickle": {"read_pickle"},
    "joblib": {"load"},
    "joblib.numpy_pickle": {"load"},
    "dill": {"load", "loads", "load_session", "load_module"},
    "dill._dill": {"load", "loads", "_import_module", "_eval_repr"},
    "cloudpickle": {"load", "loads"},
    "cloudpickle.cloudpickle": {"load", "loads", "subimport"},
    "_pickle": {"load", "loads"},
    "yaml": {"load", "unsafe_load", "full_load"},
}
_LOADER_MODULES = (
    "torch.hub",
    "torch.jit",
    "torch.utils.cpp_extension",
    "torch.utils.model_zoo",
    "torch.utils.bottleneck",
    "torch.utils.collect_env",
    "torch._inductor",
    "torch._dynamo",
    "torch.distributed.rpc",
    "torch.distributed.run",
    "torch.package",
    "torch._utils_internal",
    "numpy.f2py",
    "numpy.distutils",
    "numpy.testing",
    "setuptools",
    "distutils",
    "pip",
    "pkg_resources",
    "IPython",
    "requests",
    "urllib3",
    "httpx",
    "aiohttp",
    "paramiko",
    "fabric",
    "invoke",
    "pexpect",
    "psutil",
    "win32api",
    "commands",
    "popen2",
)


def verdict(
    module: str, name: str, args: tuple[Any, ...], *, instance_only: bool = False
) -> str | None:
    """What a call of `module.name` would do to a reader that trusts it, None when it is data.

    Args:
        module: Module that the pickle would import.
        name: Attribute of it, dots included.
        args: What it would be called with.
        instance_only: The opcode makes an instance without calling `__init__`.
    """
    full = f"{module}.{name}"
    if any(part.startswith("__") and part != "__main__" for part in name.split(".")):
        return full if name != "__newobj__" or module not in ("copyreg", "copy_reg") else None
    if any(_is_powerful(part) for part in name.split(".")[:-1]):
        return full  # a module reached through another one's imports, as in torch: os.system
    if module in ("builtins", "__builtin__", "__builtins__"):
        return _builtin(full, name, args)
    top = module.partition(".")[0]
    if module in _LOADERS and name.partition(".")[0] in _LOADERS[module]:
        return full
    if any(module == m or module.startswith(m + ".") for m in _LOADER_MODULES):
        return full
    if top in _DATA_MODULES:
        return _in_data_module(full, name)
    if not _is_powerful(top):
        return None
    if (module, name) in _DATA_NAMES or (instance_only and _is_error(name)):
        return None
    return full


def flat(args: tuple[Any, ...]) -> Iterator[Any]:
    """The arguments and the members of those that are collections, one level deep."""
    for arg in args:
        yield arg
        if isinstance(arg, tuple | list):
            yield from arg
        elif isinstance(arg, dict):
            yield from arg.values()


def _builtin(full: str, name: str, args: tuple[Any, ...]) -> str | None:
    if name == "getattr":
        attribute = args[1] if len(args) > 1 else None
        if isinstance(attribute, str) and not attribute.startswith("__"):
            return None  # how bound methods and enum members are pickled
        return f"{full}(..., {attribute!r})" if attribute is not None else None
    return None if name in _BUILTINS or _is_error(name) else full


def _in_data_module(full: str, name: str) -> str | None:
    """Data modules have a few functions and methods that reach out of the data."""
    reaching = {"FileHandler", "basicConfig", "shutdown", "sleep", "system", "popen", "reduce"}
    return full if name in reaching or "." in name else None


def _is_powerful(module: str) -> bool:
    """Whether a module of this name belongs to the standard library and is more than data."""
    known = module in sys.stdlib_module_names or module in ("nt", "posix")
    return known and module not in _DATA_MODULES


def _is_error(name: str) -> bool:
    return name.endswith(("Error", "Exception", "Warning"))
