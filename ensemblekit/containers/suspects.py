"""Owns the question whether a pickle's call is data or an attack.

Input: the names of a call found in a pickle. No call is ever made; an attack is still refused,
because a file that carries one is not a file to build a product on. The standard library is
judged by what is allowed: beyond these modules and names a checkpoint has nothing to call in it.
"""

import _compat_pickle
import sys
from functools import lru_cache
from typing import Any

# Standard modules whose objects are plain data wherever they appear.
_DATA_MODULES = {
    "argparse",
    "array",
    "cmath",
    "collections",
    "copyreg",
    "dataclasses",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "functools",
    "ipaddress",
    "itertools",
    "logging",
    "math",
    "numbers",
    "pathlib",
    "pathlib._local",
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
    ("operator", "getitem"),
    ("_operator", "getitem"),
    ("types", "UnionType"),
    ("io", "BytesIO"),
    ("_io", "BytesIO"),
    ("io", "StringIO"),
    ("_io", "StringIO"),
    ("zoneinfo", "ZoneInfo._unpickle"),
    ("threading", "Event"),
    ("inspect", "Signature"),
    ("inspect", "Parameter"),
    ("inspect", "_ParameterKind"),
}
# Functions in data modules that objects of theirs are pickled with.
_REBUILDERS = {"_reconstructor", "_array_reconstructor", "_compile", "_unpickle", "_make"}
_REACHING = {
    *("basicConfig", "shutdown", "sleep", "system", "popen", "reduce", "getnode", "FileType"),
    *("FileHandler", "get_type_hints", "NamedTemporaryFile", "SystemRandom"),
}
_BUILTINS = {
    *("bool", "bytearray", "bytes", "complex", "dict", "enumerate", "filter", "float"),
    *("frozenset", "int", "iter", "list", "map", "max", "min", "object", "property", "range"),
    *("reversed", "set", "slice", "staticmethod", "classmethod", "str", "super", "tuple"),
    *("type", "zip", "sorted", "len", "sum", "abs", "round", "print", "Ellipsis"),
    "NotImplemented",
}
# The standard library has these in other versions of Python, from 3.10 on, than in the one that runs: a
# pickle is an attack on whoever opens it.
_OTHER_VERSIONS = {
    *("_bootsubprocess", "_crypt", "_msi", "_sha256", "_sha512", "aifc", "asynchat", "asyncore"),
    *("audioop", "binhex", "cgi", "cgitb", "chunk", "crypt", "distutils", "imghdr", "imp"),
    *("lib2to3", "mailcap", "msilib", "nis", "nntplib", "ossaudiodev", "pipes", "smtpd", "sndhdr"),
    *("spwd", "sunau", "telnetlib", "uu", "xdrlib"),  # gone by 3.13
    *("_android_support", "_colorize", "_interpchannels", "_interpqueues", "_interpreters"),
    *("_ios_support", "_opcode_metadata", "_pydatetime", "_pylong", "_pyrepl", "_sha2"),
    *("_suggestions", "_sysconfig", "_wmi", "annotationlib", "_remote_debugging"),  # new since 3.12
    *("nt", "posix"),  # of other systems
}
_BY_ARGUMENTS = "depends on the arguments"
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
    found = _by_name(module, name, instance_only)
    if found is not _BY_ARGUMENTS:
        return found
    current_module, current_name = _today(module, name)
    found = _builtin(f"{current_module}.{current_name}", current_name, args)
    return found and found.replace(f"{current_module}.{current_name}", f"{module}.{name}")


@lru_cache(maxsize=1024)  # a checkpoint makes the same few calls for each tensor
def _by_name(module: str, name: str, instance_only: bool) -> str | None:  # noqa: FBT001
    """The verdict where the name alone decides it, `_BY_ARGUMENTS` elsewhere."""
    current_module, current_name = _today(module, name)
    if current_module in ("builtins", "__builtins__") and not _reaches_in(current_name):
        return _BY_ARGUMENTS
    found = _of_name(current_module, current_name, instance_only=instance_only)
    return found and found.replace(f"{current_module}.{current_name}", f"{module}.{name}")


def _of_name(module: str, name: str, *, instance_only: bool) -> str | None:
    full = f"{module}.{name}"
    if (module, name) in _DATA_NAMES or module.startswith("numpy.random."):
        return None
    if _reaches_in(name):
        return full if name != "__newobj__" or module != "copyreg" else None
    if any(full == f"{m}.{n}" for m, names in _LOADERS.items() for n in names):
        return full
    if any(full.startswith(m + ".") for m in _LOADER_MODULES):
        return full
    if module in _DATA_MODULES:
        return _in_data_module(full, name)
    top = module.partition(".")[0]
    if not _is_powerful(top) and top not in _DATA_MODULES:
        return None
    return None if instance_only and _is_error(name) else full


def _reaches_in(name: str) -> bool:
    """Whether a name goes through a class's or a module's insides.

    Such as a module reached through another one's imports, as in torch: os.system.
    """
    parts = name.split(".")
    inner = any(part.startswith("__") and part != "__main__" for part in parts)
    return inner or any(_is_powerful(part) for part in parts[:-1])


def is_attribute_of_a_class(value: Any) -> bool:
    """Whether `getattr` on this global can only give a method: the name is a class's."""
    module, name = getattr(value, "module", ""), getattr(value, "name", "")
    return name.rpartition(".")[2][:1].isupper() and module not in ("pathlib", "io", "_io")


def of_type(kind: type, args: tuple[Any, ...]) -> list[Any]:
    """Arguments, and members of those that are collections, that are of a type."""
    found = []
    for arg in args:
        own = type(arg)
        if own is kind:
            found.append(arg)
        elif own is tuple or own is list or own is dict:
            members = arg.values() if own is dict else arg
            found += [member for member in members if type(member) is kind]
    return found


def _builtin(full: str, name: str, args: tuple[Any, ...]) -> str | None:
    if name == "getattr":
        attribute = args[1] if len(args) > 1 else None
        if isinstance(attribute, str) and not attribute.startswith("__"):
            return None  # how bound methods and enum members are pickled
        return f"{full}(..., {attribute!r})" if attribute is not None else None
    return None if name in _BUILTINS or _is_error(name) else full


def _in_data_module(full: str, name: str) -> str | None:
    """Data modules have a few functions and methods that reach out of the data."""
    private = name.startswith("_") and name[1:2].islower() and name not in _REBUILDERS
    return full if name in _REACHING or "." in name or private else None


def _today(module: str, name: str) -> tuple[str, str]:
    """The name that Python 3 has for a global of Python 2."""
    if (module, name) in _compat_pickle.NAME_MAPPING:
        return _compat_pickle.NAME_MAPPING[module, name]
    return _compat_pickle.IMPORT_MAPPING.get(module, module), name


def _is_powerful(module: str) -> bool:
    """Whether a module of this name belongs to the standard library and is more than data."""
    known = module in sys.stdlib_module_names or module in _OTHER_VERSIONS
    return known and module not in _DATA_MODULES


def _is_error(name: str) -> bool:
    return name.endswith(("Error", "Exception", "Warning"))
