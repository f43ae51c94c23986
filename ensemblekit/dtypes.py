"""Owns tensor dtypes by name: the torch name is the key to numpy, safetensors and storage names.

Input: names found in checkpoints. numpy has no bfloat16 or float8; ml_dtypes lends them.
"""

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

Kind = Literal["float", "complex", "int", "bool"]


@dataclass(frozen=True)
class DType:
    """One element type.

    Attributes:
        name: Torch's name without `torch.`, such as `bfloat16`.
        kind: What arithmetic it takes part in.
        numpy: The numpy (or ml_dtypes) dtype of one element, little-endian.
        safetensors: Its code in a safetensors header, None where the format has none.
    """

    name: str
    kind: Kind
    numpy: np.dtype[Any]
    safetensors: str | None

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return int(self.numpy.itemsize)

    @property
    def real(self) -> np.dtype[Any]:
        """The dtype in which sums see this one: complex numbers are pairs of their real part."""
        parts = {"complex32": np.float16, "complex64": np.float32, "complex128": np.float64}
        return np.dtype(parts.get(self.name, self.numpy))


def _table() -> dict[str, DType]:
    rows: list[tuple[str, Kind, Any, str | None]] = [
        ("float64", "float", "<f8", "F64"),
        ("float32", "float", "<f4", "F32"),
        ("float16", "float", "<f2", "F16"),
        ("bfloat16", "float", ml_dtypes.bfloat16, "BF16"),
        ("float8_e4m3fn", "float", ml_dtypes.float8_e4m3fn, "F8_E4M3"),
        ("float8_e5m2", "float", ml_dtypes.float8_e5m2, "F8_E5M2"),
        ("float8_e4m3fnuz", "float", ml_dtypes.float8_e4m3fnuz, "F8_E4M3FNUZ"),
        ("float8_e5m2fnuz", "float", ml_dtypes.float8_e5m2fnuz, "F8_E5M2FNUZ"),
        ("complex32", "complex", [("re", "<f2"), ("im", "<f2")], None),
        ("complex64", "complex", "<c8", "C64"),
        ("complex128", "complex", "<c16", None),
        ("int64", "int", "<i8", "I64"),
        ("int32", "int", "<i4", "I32"),
        ("int16", "int", "<i2", "I16"),
        ("int8", "int", "<i1", "I8"),
        ("uint64", "int", "<u8", "U64"),
        ("uint32", "int", "<u4", "U32"),
        ("uint16", "int", "<u2", "U16"),
        ("uint8", "int", "|u1", "U8"),
        ("bool", "bool", "|b1", "BOOL"),
    ]
    return {name: DType(name, kind, np.dtype(form), code) for name, kind, form, code in rows}


DTYPES: dict[str, DType] = _table()
FROM_SAFETENSORS = {d.safetensors: d for d in DTYPES.values() if d.safetensors}

# Torch's typed storages, by class name; older files name them instead of a dtype.
STORAGES: dict[str, str] = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
# Quantised ones, with the bytes of an element.
QUANTIZED_STORAGES = {
    "QInt8Storage": 1,
    "QUInt8Storage": 1,
    "QInt32Storage": 4,
    "QUInt4x2Storage": 1,
    "QUInt2x4Storage": 1,
}

_TORCH_ALIASES = {
    "float": "float32",
    "double": "float64",
    "half": "float16",
    "long": "int64",
    "int": "int32",
    "short": "int16",
    "chalf": "complex32",
    "cfloat": "complex64",
    "cdouble": "complex128",
}


def from_torch_name(name: str) -> DType | None:
    """The dtype that `torch.<name>` means, None where it is not one we know."""
    return DTYPES.get(_TORCH_ALIASES.get(name, name))


def narrow(values: npt.NDArray[np.float64], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Round float64 values to `dtype` once, to nearest, ties to even.

    ml_dtypes rounds a double to float first and then again, which moves values that lie just
    beside a tie. Rounding to odd in the first step keeps the second one exact (Boldo and
    Melquiond 2008, "Emulation of FMA and correctly rounded sums").

    >>> x = np.array([1 + 2.0**-8 + 2.0**-40])  # just above the middle of two bfloat16
    >>> float(x.astype(ml_dtypes.bfloat16)[0]), float(narrow(x, np.dtype(ml_dtypes.bfloat16))[0])
    (1.0, 1.0078125)
    """
    if dtype.isbuiltin == 1:  # numpy's own types round once
        return values.astype(dtype)
    nearest = np.asarray(values).astype(np.float32)
    if dtype == DTYPES["bfloat16"].numpy:
        upper = np.empty(values.shape, np.uint16)
        lost = np.isnan(nearest)
        to_bfloat16(values, nearest, upper)
        upper[lost] = 0x7FC0
        return upper.view(dtype)
    back = nearest.astype(np.float64)
    inexact = back != values
    if not inexact.any():
        return nearest.astype(dtype)
    bits = nearest.view(np.uint32)
    bits -= (inexact & (np.abs(back) > np.abs(values))).astype(np.uint32)  # towards zero ...
    bits |= inexact.astype(np.uint32)  # ... and sticky
    return nearest.astype(dtype)


def to_bfloat16(
    values: npt.NDArray[np.float64],
    nearest: npt.NDArray[np.float32],
    upper: npt.NDArray[np.uint16],
) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16 of numbers: the upper halves of floats, rounded.

    Where a lower half says "just between two" the doubles decide: a float may have been rounded to
    there.

    Args:
        values: To round; no NaN.
        nearest: The same as float32; overwritten.
        upper: Receives the bits.
    """
    bits = nearest.view(np.uint32).reshape(-1)  # a view: of an array that was just made
    middle = np.flatnonzero(bits.astype(np.uint16) == 0x8000)
    exact, rounded = values.reshape(-1)[middle], nearest.reshape(-1)[middle]
    moved = exact != rounded
    if moved.any():
        middle, larger = middle[moved], np.abs(exact[moved]) > np.abs(rounded[moved])
        bits[middle[larger]] += 1
        bits[middle[~larger]] -= 1
    odd = bits >> 16
    odd &= 1
    odd += 0x7FFF
    bits += odd
    np.right_shift(bits, 16, out=upper.reshape(-1), casting="unsafe")
    return upper
