"""What callers hand over, in the plain forms that the native half reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .errors import CallerError


def plain(value: Any) -> Any:
    """Arrays, series and numbers of other libraries as Python's own; anything else as it is.

    JSON has no NaN and no infinity, so they are refused rather than lost.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            raise CallerError(f"{value} is no number that a request can have", "malformed_request", "caller")
        return value
    for method in ("tolist", "to_list", "to_pylist"):
        if hasattr(value, method):
            return plain(getattr(value, method)())
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [inner if type(inner) in (str, int) else plain(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return [plain(inner) for inner in value]
    return value


def fields(request: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request."""
    return {name: plain(value) for name, value in request.items()}


def rows(table: Any) -> Iterable[Mapping[str, Any]]:
    """The rows of a table: Arrow, Polars, pandas, or any iterable of mappings."""
    if hasattr(table, "to_pylist"):  # pyarrow
        return table.to_pylist()
    if hasattr(table, "to_dicts"):  # Polars
        return table.to_dicts()
    if hasattr(table, "to_dict") and hasattr(table, "columns"):  # pandas
        return table.to_dict("records")
    if hasattr(table, "__arrow_c_stream__"):
        import pyarrow

        return pyarrow.table(table).to_pylist()
    return table


def tensor(value: Any) -> tuple[str, list[int], bytes]:
    """Number type, shape and bytes of an array: NumPy's, or any that speaks DLPack."""
    if hasattr(value, "detach"):  # a tensor that a gradient may flow through
        value = value.detach().cpu()
    if not isinstance(value, np.ndarray):
        value = _from_dlpack(value)
    if isinstance(value, tuple):
        return value
    name = value.dtype.name
    if name == "float64":
        value, name = value.astype(np.float32), "float32"
    return name, list(value.shape), np.ascontiguousarray(value).tobytes()


def _from_dlpack(value: Any) -> np.ndarray | tuple[str, list[int], bytes]:
    if not hasattr(value, "__dlpack__"):
        return np.asarray(value, dtype=np.float32)
    if str(getattr(value, "dtype", "")).endswith("bfloat16") and hasattr(value, "view"):
        # NumPy has no such type: its bits travel as integers.
        if type(value).__module__.partition(".")[0] == "torch":
            import torch

            bits = value.contiguous().view(torch.int16).numpy()
        else:
            bits = np.asarray(value).view(np.uint16)
        return "bfloat16", list(bits.shape), np.ascontiguousarray(bits).tobytes()
    return np.from_dlpack(value)
