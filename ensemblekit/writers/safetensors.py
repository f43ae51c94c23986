"""Owns the writing side of safetensors: the header, and where each tensor goes.

Input: a signature. Larger element types come first, so that every tensor is aligned.
"""

import json
from collections.abc import Mapping
from math import prod

from ensemblekit.dtypes import DTYPES
from ensemblekit.errors import UnsupportedError
from ensemblekit.snapshots import Signature
from ensemblekit.writers import Layout


def layout(signature: Signature, metadata: Mapping[str, str]) -> Layout:
    """Header and places.

    Raises:
        UnsupportedError: A dtype that the format does not know.
    """
    order = sorted(signature, key=lambda key: (-DTYPES[signature[key][1]].itemsize, key))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    spans: dict[str, tuple[int, int]] = {}
    place = 0
    for key in order:
        shape, dtype = signature[key]
        if not _is_unicode(key):
            raise UnsupportedError(f"{key!r}: the name is not Unicode, safetensors cannot hold it")
        code = DTYPES[dtype].safetensors
        if code is None:
            raise UnsupportedError(f"'{key}': safetensors has no {dtype}")
        nbytes = prod(shape) * DTYPES[dtype].itemsize
        spans[key] = (place, nbytes)
        header[key] = {
            "dtype": code,
            "shape": list(shape),
            "data_offsets": [place, place + nbytes],
        }
        place += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return Layout(head, {key: (len(head) + start, n) for key, (start, n) in spans.items()})


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, out of a pickle
        return False
    return True
