"""Owns plain pickles: `pickle.dump(model.state_dict(), file)`.

Input: an open file that is one pickle. Each tensor's storage is a torch file of its own inside the
pickle, as bytes; it is read in memory, by the inert machine like everything else.
"""

from typing import Any

from ensemblekit.containers import Tree, pickle_vm, torch_legacy
from ensemblekit.containers.memory import MemorySource
from ensemblekit.errors import DamagedError, UnsupportedError
from ensemblekit.files import Readable

_MAX_PICKLE = 1 << 30
_SUFFIXES = (".pkl", ".pickle")


def sniff(source: Readable) -> bool:
    """Whether the file begins like a pickle of protocol 2 to 5 and ends like one."""
    if source.size < 4:
        return False
    head = source.read(0, 2)
    if head[0] != 0x80 or not 2 <= head[1] <= 5:
        return source.path.suffix in _SUFFIXES
    return True


def read(source: Readable) -> Tree:
    """Describe the pickled object.

    Raises:
        DamagedError: It is no sound pickle, or bytes lie behind it.
        HostileError: It calls into the interpreter or the operating system.
    """
    if source.size > _MAX_PICKLE:
        raise UnsupportedError(
            f"{source.path}: a pickle of {source.size} bytes (limit {_MAX_PICKLE})",
            hint="save the weights with torch.save(state_dict, path)",
        )

    found: dict[int, tuple[bytes, Any]] = {}

    def nested(data: bytes) -> Any:
        if id(data) not in found:  # a small pickle may ask for the same large one again and again
            found[id(data)] = data, torch_legacy.read(MemorySource(source.file, data)).root
        return found[id(data)][1]

    data = source.read(0, source.size)
    root, used = pickle_vm.load_prefix(
        data, where=str(source.path), storage=pickle_vm.no_storage, nested=nested
    )
    if used != source.size:
        raise DamagedError(
            f"{source.path}: {source.size - used} bytes lie behind its pickle",
            hint="copy it again, or leave it out with --exclude",
        )
    return Tree("pickle", root, {}, (source.file,))
