"""Exact recommendations from generative models that write semantic IDs.

    with sidereal.Recommender.open("models/industrial", "models/industrial/items.jsonl") as recommender:
        for found in recommender.recommend(history=["168", "278"]):
            print(found.item, found.score)
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import _sidereal, errors
from ._sidereal import Answer, Item, __version__
from ._values import fields, plain, rows, tensor
from .errors import (
    CallerError,
    CancelledError,
    DeadlineExceededError,
    DeviceError,
    FilesError,
    InternalError,
    OverloadedError,
    SiderealError,
)

__all__ = [
    "Answer",
    "CallerError",
    "CancelledError",
    "Catalog",
    "DeadlineExceededError",
    "DeviceError",
    "FilesError",
    "InternalError",
    "Item",
    "OverloadedError",
    "Recommender",
    "SiderealError",
    "__version__",
    "errors",
]

Path = str | os.PathLike[str]


class Recommender:
    """A model and a catalog on a device, until it is closed. Any number of threads may ask it.

    Requests have the fields of the command line's request lines (`docs/cli.md`): `history`, `tokens`,
    `text` or `messages`; `beams`, `top_k`, `exclude`, `only`, `filter`, `candidates`, `user`,
    `deadline_ms` and so on. An unknown field is a `CallerError` that lists the known ones.
    """

    def __init__(self, native: _sidereal.Recommender) -> None:
        self._native = native
        self.catalog = Catalog(native)

    @classmethod
    def open(
        cls,
        model: Path,
        catalog: Path | None = None,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        threads: int = 0,
        max_context: int | None = None,
        context_tokens: int | None = None,
        max_queued: int | None = None,
        max_wait: float | None = None,
        base: Path | None = None,
        read_only: bool = False,
        durability: str = "process",
    ) -> Recommender:
        """Opens a model folder and a catalog, by default the one beside the model: `catalog.sidereal`,
        `items.jsonl` or `items.index.json`.

        `device` is "cpu", "cuda" or "cuda:1"; `dtype` "f32", "bf16" or "int8", by default as the checkpoint
        is stored and the device suits. `threads` 0 is all cores. `max_wait` is in seconds. `base` is
        the folder of the base where the model's folder is that of a LoRA adapter. `read_only` lets
        another process change the catalog's files. With `durability="machine"` an acknowledged change
        survives the end of the machine, not only that of the process.
        """
        if durability not in ("process", "machine"):
            raise CallerError(
                f'durability: {durability!r} is neither "process" nor "machine"',
                "invalid_field",
                "caller",
            )
        native = _sidereal.Recommender.open(
            os.fspath(model),
            None if catalog is None else os.fspath(catalog),
            device=device,
            dtype=dtype,
            threads=threads,
            max_context=max_context,
            context_tokens=context_tokens,
            max_queued=max_queued,
            max_wait=max_wait,
            base=None if base is None else os.fspath(base),
            read_only=read_only,
            machine_durability=durability == "machine",
        )
        return cls(native)

    def recommend(self, **request: Any) -> Answer:
        """Answers a request and waits for the answer. Ctrl-C ends the wait and the request."""
        return self._native.recommend(fields(request))

    async def recommend_async(self, **request: Any) -> Answer:
        """Answers a request. Where the task is cancelled, the request is, too."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()

        def settle(result: Answer | BaseException) -> None:
            if future.done():
                return
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)

        def deliver(result: Answer | BaseException) -> None:
            try:
                loop.call_soon_threadsafe(settle, result)
            except RuntimeError:
                pass  # the loop was closed: nobody waits

        name = self._native.submit_with(fields(request), deliver)
        try:
            return await future
        except asyncio.CancelledError:
            self._native.cancel(name)
            raise

    def recommend_batch(
        self, requests: Iterable[Mapping[str, Any]], *, return_exceptions: bool = False
    ) -> list[Any]:
        """Answers many requests together, each in its place. The first exception is raised at the end,
        unless exceptions are to be returned in the places of their answers.
        """
        results = self._native.recommend_batch([fields(request) for request in requests])
        if not return_exceptions:
            for result in results:
                if isinstance(result, BaseException):
                    raise result
        return results

    def rank(self, candidates: Sequence[Any], **request: Any) -> Answer:
        """Scores given items: those that are available come back, best first."""
        candidates = plain(candidates)
        if len(candidates) == 0:
            raise CallerError("candidates: name the items to score", "invalid_field", "caller")
        return self.recommend(candidates=candidates, **request)

    def score(self, items: Sequence[Any], **request: Any) -> dict[str, float]:
        """The natural log of the probability of each given item that is available."""
        return {found.item: found.score for found in self.rank(items, **request)}

    def sample(self, seed: int, **request: Any) -> Answer:
        """Draws items without replacement, by their probabilities and a seed (Gumbel top-k), with the
        log-probabilities of each token.
        """
        return self.recommend(seed=seed, log_probs=True, **request)

    def update_weights(self, weights: Mapping[str, Any]) -> int:
        """Puts other tensors in the place of those of the same names, and returns the version that
        answers carry from now on. Requests that run are finished with the old ones.

        Arrays are NumPy's, or anything that speaks DLPack, in float32, float16 or bfloat16.
        """
        return self._native.update_weights(
            [(name, *tensor(value)) for name, value in weights.items()]
        )

    def status(self) -> dict[str, Any]:
        """What waits, what runs, what is free, and the state of the catalog."""
        return self._native.status()

    def metrics(self) -> str:
        """Counters and histograms as Prometheus' text."""
        return self._native.metrics()

    def close(self, within: float = 10.0) -> None:
        """Takes no more requests, and waits at most so many seconds for those that run."""
        self._native.close(within)

    @property
    def is_closed(self) -> bool:
        """Whether it was closed."""
        return self._native.is_closed

    def __enter__(self) -> Recommender:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.is_closed:
            return "<sidereal.Recommender, closed>"
        return f"<sidereal.Recommender on {self.status()['computes_on']}>"


class Catalog:
    """The catalog of a recommender. Each change is one snapshot, seen by all requests after it."""

    def __init__(self, native: _sidereal.Recommender) -> None:
        self._native = native

    def apply(
        self, changes: Iterable[Mapping[str, Any]], watermark: Mapping[str, Any] | None = None
    ) -> int:
        """Applies changes, all of them or with an exception none, and returns the snapshot.

        A change is `{"put": {"item": "9", "sid": [1, 2, 3]}}`, `{"delete": {"item": "9"}}`,
        `{"availability": ...}`, `{"tag": ...}` or `{"weight": ...}`, as in `docs/catalog.md`. With a
        watermark, `{"source": "items", "partition": 0, "offset": 41}`, changes that the catalog has
        already are passed over.
        """
        batch: dict[str, Any] = {"changes": plain(list(changes))}
        if watermark is not None:
            batch["watermark"] = plain(watermark)
        return self._native.change(batch)[0]

    def put(self, items: Any) -> int:
        """Puts items, `{"item": "9", "sid": [1, 2, 3], "title": ..., "tags": [...]}`: mappings, or the
        rows of a table of Arrow, Polars or pandas.
        """
        return self.apply({"put": _without_nulls(item)} for item in rows(items))

    def delete(self, names: Iterable[Any]) -> int:
        """Deletes items by their names."""
        return self.apply({"delete": {"item": name}} for name in plain(list(names)))

    def set_available(self, names: Iterable[Any], available: bool) -> int:
        """Says whether items may be recommended."""
        return self.apply(
            {"availability": {"item": name, "available": available}} for name in plain(list(names))
        )

    def replace(self, path: Path) -> int:
        """Puts a full catalog, a file, in the place of the one that is searched; changes after its
        watermarks are kept.
        """
        return self._native.replace_catalog(os.fspath(path))

    def sync(self) -> None:
        """Waits until the disk has every change so far."""
        self._native.sync()

    @property
    def snapshot(self) -> int:
        """The number of the newest snapshot."""
        return self._native.status()["snapshot"]

    def __len__(self) -> int:
        return self._native.status()["items"]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._native.has_item(name)


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without empty cells, which tables have in the place of fields that are not there."""

    def is_null(value: Any) -> bool:
        return value is None or (isinstance(value, float) and value != value)

    return {name: value for name, value in row.items() if not is_null(value)}
