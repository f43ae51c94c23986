"""Owns bytes that came out of a pickle and are read as if they were a file.

Input: a `bytes` value and the file it came from.
"""

from ensemblekit.errors import DamagedError
from ensemblekit.files import Source


class MemorySource:
    """Bytes in memory with the interface of `files.Readable`.

    Args:
        file: The file whose pickle held the bytes.
        data: The bytes.
    """

    def __init__(self, file: Source, data: bytes) -> None:
        self._file = file
        self.path = file.path
        self.fingerprint = file.fingerprint
        self.data = data

    @property
    def file(self) -> Source:
        """The file that the bytes come from."""
        return self._file

    @property
    def size(self) -> int:
        """Number of bytes."""
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`."""
        if length < 0 or offset < 0 or offset + length > self.size:
            raise DamagedError(
                f"{self.path}: a pickled storage ends too early: bytes {offset} to "
                f"{offset + length} are promised, it has {self.size}"
            )
        return self.data[offset : offset + length]

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on."""
        view[:] = self.read(offset, len(view))
