"""Owns the writing side of safetensors: the header, and where each tensor goes.

Input: a content. Larger element types come first, so that every tensor is aligned. The format has
no aliases: tied tensors are written under each key.
"""

import json
from math import prod

from ensemblekit.dtypes import DTYPES
from ensemblekit.errors import UnsupportedError
from ensemblekit.writers import Content, Layout


def layout(content: Content) -> Layout:
    """Header and places.

    Raises:
        UnsupportedError: A dtype that the format does not know.
    """
    signature = content.signature
    order = sorted(signature, key=lambda key: (-DTYPES[signature[key][1]].itemsize, key))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **content.metadata}}
    spans: dict[str, tuple[int, int]] = {}
    place = 0
    for key in order:
        shape, dtype = signature[key]
        if not is_unicode(key):
            raise UnsupportedError(f"{key!r}: the name is not Unicode, safetensors cannot hold it")
        if key == "__metadata__":
            raise UnsupportedError(
                f"'{key}': safetensors keeps this name for itself",
                hint="-o averaged.pt can hold it",
            )
        code = DTYPES[dtype].safetensors
        if code is None:
            raise UnsupportedError(
                f"'{key}': safetensors has no {dtype}", hint="-o averaged.pt can hold it"
            )
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
    places = {key: (len(head) + start, n) for key, (start, n) in spans.items()}
    return Layout(places, lambda _: [(0, head)])


def is_unicode(text: str) -> bool:
    """Whether a key can be written in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, out of a pickle
        return False
    return True
