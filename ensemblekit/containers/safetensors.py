"""Owns the safetensors header: eight bytes of length, JSON, then tensors without holes.

Input: an open file. Format: https://github.com/huggingface/safetensors#format.
"""

import json
from itertools import pairwise
from math import prod
from typing import Any

from ensemblekit.containers import Extent, TensorSpec, Tree
from ensemblekit.dtypes import FROM_SAFETENSORS
from ensemblekit.errors import DamagedError, UnsupportedError, listing
from ensemblekit.files import Readable

MAX_HEADER = 100_000_000  # the reference implementation's limit
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
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(source, "'__metadata__' is not an object of texts")
    if "DCP_SHARDING_INFO" in metadata and source.path.name.startswith("shard-"):
        raise UnsupportedError(
            f"{source.path}: is what one rank saved: parts of tensors",
            hint="join them: torch.distributed.checkpoint.hf_storage, HuggingFaceStorageWriter("
            "..., enable_consolidation=True)",
        )
    data_size = source.size - data_start
    tensors: dict[str, TensorSpec] = {}
    extents = [(0, 0, "the header"), (data_size, data_size, "the end")]
    for key, entry in header.items():
        spec, begin, end = _spec(source, key, entry, data_start, data_size)
        tensors[key] = spec
        extents.append((begin, end, key))
    for (_, left_end, left), (right, _, name) in pairwise(sorted(extents)):
        if left_end != right:
            what = "overlap" if right < left_end else "leave a hole"
            ends = f"{left_end} and {right} of the data"
            raise _damaged(source, f"'{left}' and '{name}' {what} between bytes {ends}")
    return Tree("safetensors", tensors, metadata, (source.file,))


def _header(source: Readable) -> tuple[dict[str, Any], int]:
    if source.size < 10:
        raise _damaged(source, f"has only {source.size} bytes, less than the shortest header")
    length = int.from_bytes(source.read(0, 8), "little")
    if length > MAX_HEADER or 8 + length > source.size:
        raise _damaged(source, f"promises a header of {length} bytes in {source.size} bytes")
    try:
        text = source.read(8, length).decode("utf-8")
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(source, f"the header is not JSON ({_brief(error)})") from error
    if not isinstance(header, dict):
        raise _damaged(source, f"the header is a JSON {type(header).__name__}, not an object")
    return header, 8 + length


def _spec(
    source: Readable, key: str, entry: Any, data_start: int, data_size: int
) -> tuple[TensorSpec, int, int]:
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise _damaged(source, f"'{key}': expected {sorted(_FIELDS)}, found {_brief(entry)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape):
        raise _damaged(source, f"'{key}': shape is {_brief(shape)}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _damaged(source, f"'{key}': data_offsets is {_brief(offsets)}")
    code = entry["dtype"]
    if not isinstance(code, str) or code not in FROM_SAFETENSORS:
        raise UnsupportedError(
            f"{source.path}: '{key}': dtype {_brief(code)} is not one we can average; "
            f"known: {listing(FROM_SAFETENSORS, limit=99)}"
        )
    dtype = FROM_SAFETENSORS[code]
    begin, end = offsets
    if not begin <= end <= data_size:
        raise _damaged(
            source, f"'{key}': bytes {begin} to {end} do not lie in the {data_size} bytes of data"
        )
    if prod(shape) * dtype.itemsize != end - begin:
        raise _damaged(
            source,
            f"'{key}': {code} of shape {shape} takes {prod(shape) * dtype.itemsize} bytes, "
            f"its data_offsets span {end - begin}",
        )
    extent = Extent(source, data_start + begin, end - begin, None)
    return TensorSpec(dtype.name, tuple(shape), None, 0, extent), begin, end


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
