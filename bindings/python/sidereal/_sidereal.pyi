from collections.abc import Callable, Iterator
from typing import Any, overload

import numpy as np
import numpy.typing as npt

__version__: str

class Item:
    item: str
    sid: list[int]
    score: float
    title: str | None
    log_probs: list[tuple[float, float]] | None
    branch: int | None
    tasks: dict[str, float] | None

class Answer:
    items: list[Item]
    names: list[str]
    scores: npt.NDArray[np.float32]
    sids: npt.NDArray[np.int32]
    snapshot: int
    weights_version: int
    tokens: int
    cached_tokens: int
    groups: list[dict[str, Any]] | None
    read: list[dict[str, Any]] | None
    sequences: list[dict[str, Any]] | None
    thoughts: list[dict[str, Any]] | None
    unknown_items: dict[str, Any] | None
    timings: dict[str, Any] | None
    def to_dict(self) -> dict[str, Any]: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Item]: ...
    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

class Recommender:
    is_closed: bool
    @staticmethod
    def open(
        model: str,
        catalog: str | None,
        *,
        device: str,
        dtype: str | None,
        threads: int,
        max_context: int | None,
        context_tokens: int | None,
        max_queued: int | None,
        max_wait: float | None,
        base: str | None,
        read_only: bool,
        machine_durability: bool,
    ) -> Recommender: ...
    def recommend(self, fields: dict[str, Any]) -> Answer: ...
    def recommend_batch(self, requests: list[dict[str, Any]]) -> list[Any]: ...
    def submit_with(self, fields: dict[str, Any], callback: Callable[[Any], None]) -> int: ...
    def cancel(self, request: int) -> None: ...
    def update_weights(self, tensors: list[tuple[str, str, list[int], bytes]]) -> int: ...
    def change(self, batch: dict[str, Any]) -> tuple[int, bool]: ...
    def replace_catalog(self, path: str) -> int: ...
    def sync(self) -> None: ...
    def has_item(self, name: str) -> bool: ...
    def status(self) -> dict[str, Any]: ...
    def metrics(self) -> str: ...
    def close(self, within: float) -> None: ...
