"""Owns the safetensors header: eight bytes of length, JSON, then tensors without holes.

Input: an open file. Format: https://github.com/huggingface/safetensors#format.
"""

import json
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

from ensemblekit.containers import Extent, TensorSpec, Tree
from ensemblekit.dtypes import FROM_SAFETENSORS
from ensemblekit.errors import DamagedError, UnsupportedError, listing
from ensemblekit.files import Readable

MAX_HEADER = 100_000_000  # the reference implementation's limit
_MOST_KEPT = 1 << 22  # bytes of a header that is kept for the next file
_FIELDS = {"dtype", "shape", "data_offsets"}


def sniff(source: Readable) -> bool:
    """Whether eight bytes of length are followed by the beginning of a JSON object.

    A file that ends in `.safetensors` is claimed whatever it holds, so that damage in its first
    nine bytes is reported as what it is.
    """
    if source.path.suffix == ".safetensors":
        return True
    if source.size < 10:
        return False
    head = source.read(0, 9)
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER


def read(source: Readable) -> Tree:
    """Describe every tensor of the file.

    Raises:
        DamagedError: The header is no safetensors header, or tensors overlap, leave holes or
            do not fill the file.
    """
    header, data_start = _header(source)
    describe = _described if len(header) > _MOST_KEPT else _described_again
    try:
        metadata, described = describe(header, source.size - data_start)
    except _UnsoundError as error:
        raise _damaged(source, str(error)) from error
    except UnsupportedError as error:
        raise UnsupportedError(f"{source.path}: {error}") from error
    if "DCP_SHARDING_INFO" in metadata and source.path.name.startswith("shard-"):
        raise UnsupportedError(
            f"{source.path}: is what one rank saved: parts of tensors",
            hint="join them: torch.distributed.checkpoint.hf_storage, HuggingFaceStorageWriter("
            "..., enable_consolidation=True)",
        )
    tensors = {
        key: TensorSpec(dtype, shape, None, 0, Extent(source, data_start + begin, nbytes, None))
        for key, dtype, shape, begin, nbytes in described
    }
    return Tree("safetensors", tensors, {**metadata}, (source.file,))


class _Described(NamedTuple):
    """One tensor: name, torch's name of its type, sizes, first byte in the data, bytes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class _UnsoundError(Exception):
    """What is wrong with a header."""


def _described(header: bytes, data_size: int) -> tuple[dict[str, str], list[_Described]]:
    """Metadata and tensors out of a header, for as many bytes of data as the file has.

    Raises:
        _UnsoundError: It is no safetensors header, or does not fit the data.
        UnsupportedError: An element type that we do not know.
    """
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _UnsoundError(f"the header is not JSON ({_brief(error)})") from error
    if not isinstance(entries, dict):
        raise _UnsoundError(f"the header is a JSON {type(entries).__name__}, not an object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _UnsoundError("'__metadata__' is not an object of texts")
    found = [_tensor(key, entry, data_size) for key, entry in entries.items()]
    spans = [(0, 0, "the header"), (data_size, data_size, "the end")]
    spans += [(one.begin, one.begin + one.nbytes, one.key) for one in found]
    for (_, left_end, left), (right, _, name) in pairwise(sorted(spans)):
        if left_end != right:
            what = "overlap" if right < left_end else "leave a hole"
            ends = f"{left_end} and {right} of the data"
            raise _UnsoundError(f"'{left}' and '{name}' {what} between bytes {ends}")
    return metadata, found


# the snapshots of a run mostly have one header, to the byte
_described_again = lru_cache(maxsize=1)(_described)


def _header(source: Readable) -> tuple[bytes, int]:
    if source.size < 10:
        raise _damaged(source, f"has only {source.size} bytes, less than the shortest header")
    length = int.from_bytes(source.read(0, 8), "little")
    if length > MAX_HEADER or 8 + length > source.size:
        raise _damaged(source, f"promises a header of {length} bytes in {source.size} bytes")
    return source.read(8, length), 8 + length


def _tensor(key: str, entry: Any, data_size: int) -> _Described:
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise _UnsoundError(f"'{key}': expected {sorted(_FIELDS)}, found {_brief(entry)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape):
        raise _UnsoundError(f"'{key}': shape is {_brief(shape)}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _UnsoundError(f"'{key}': data_offsets is {_brief(offsets)}")
    code = entry["dtype"]
    if not isinstance(code, str) or code not in FROM_SAFETENSORS:
        raise UnsupportedError(
            f"'{key}': dtype {_brief(code)} is not one we can average; "
            f"known: {listing(FROM_SAFETENSORS, limit=99)}"
        )
    dtype = FROM_SAFETENSORS[code]
    begin, end = offsets
    if not begin <= end <= data_size:
        raise _UnsoundError(
            f"'{key}': bytes {begin} to {end} do not lie in the {data_size} bytes of data"
        )
    if prod(shape) * dtype.itemsize != end - begin:
        raise _UnsoundError(
            f"'{key}': {code} of shape {shape} takes {prod(shape) * dtype.itemsize} bytes, "
            f"its data_offsets span {end - begin}"
        )
    return _Described(key, dtype.name, tuple(shape), begin, end - begin)


def _naturals(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    for n in value:  # noqa: SIM110  # a plain loop is quicker, for 100,000 tensors
        if type(n) is not int or not 0 <= n < 2**63:
            return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name '{twice}' stands twice")
    return found


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _damaged(source: Readable, what: str) -> DamagedError:
    return DamagedError(
        f"{source.path}: damaged safetensors file: {what}",
        hint="copy or download it again, or leave it out with --exclude",
    )
