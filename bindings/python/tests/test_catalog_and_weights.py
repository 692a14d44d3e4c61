"""What changes while requests are answered."""

import numpy as np
import pytest

import sidereal

EMBEDDING = "model.embed_tokens.weight"


def test_changes_are_seen_by_the_next_request(own):
    first = own.recommend(history=["168", "278"]).names[0]
    assert first in own.catalog and "nobody" not in own.catalog
    count, before = len(own.catalog), own.catalog.snapshot
    assert own.catalog.set_available([first], False) > before
    assert first not in own.recommend(history=["168", "278"]).names
    own.catalog.set_available([first], True)
    assert own.recommend(history=["168", "278"]).names[0] == first
    own.catalog.delete([first])
    assert first not in own.catalog and len(own.catalog) == count - 1
    own.catalog.sync()


def test_items_come_from_tables(own):
    sid = own.recommend(history=["168"])[0].sid
    rows = [{"item": f"new {n}", "sid": sid, "title": None, "weight": 100.0 + n} for n in range(3)]
    snapshot = own.catalog.put(rows)
    answer = own.recommend(history=["168"], min_snapshot=snapshot)
    assert answer.names[:3] == ["new 2", "new 1", "new 0"]
    own.catalog.delete(row["item"] for row in rows)
    tables = []
    for name, make in (
        ("pyarrow", lambda module: module.Table.from_pylist(rows)),
        ("polars", lambda module: module.DataFrame(rows)),
        ("pandas", lambda module: module.DataFrame(rows)),
    ):
        try:
            tables.append(make(__import__(name)))
        except ImportError:
            pass
    for table in tables:
        own.catalog.put(table)
        assert "new 1" in own.catalog
        own.catalog.delete(["new 0", "new 1", "new 2"])
    if not tables:
        pytest.skip("no library of tables is installed")


def test_a_batch_is_applied_once_by_its_watermark(own):
    watermark = {"source": "items", "partition": 0, "offset": 41}
    change = [{"put": {"item": "new", "sid": own.recommend(history=["168"])[0].sid}}]
    first = own.catalog.apply(change, watermark)
    assert own.catalog.apply(change, watermark) == first
    assert own.status()["watermarks"]


def test_bad_changes_change_nothing(own):
    before = own.catalog.snapshot
    for change in ({"put": {"item": "x", "sid": [1]}}, {"putt": {}}, {"put": {"item": "x"}}, 7):
        with pytest.raises(sidereal.SiderealError):
            own.catalog.apply([{"delete": {"item": "168"}}, change])
    assert own.catalog.snapshot == before and "168" in own.catalog


def test_a_catalog_for_reading_alone_refuses_changes(demo):
    with pytest.raises(sidereal.CallerError, match="read_only"):
        demo.catalog.delete(["168"])


def test_weights_are_exchanged(own):
    before = own.recommend(history=["168", "278"])
    name, shape = EMBEDDING, shape_of(own)
    rng = np.random.default_rng(1)
    weights = rng.standard_normal(shape).astype(np.float32) * 0.05
    assert own.update_weights({name: weights}) == 2
    after = own.recommend(history=["168", "278"])
    assert after.weights_version == 2 and after.names != before.names
    half = weights.astype(np.float16)
    own.update_weights({name: half})
    by_half = own.recommend(history=["168", "278"]).scores
    own.update_weights({name: half.astype(np.float32)})
    assert own.recommend(history=["168", "278"]).scores.tobytes() == by_half.tobytes()


def shape_of(recommender):
    """The embedding's shape, as the refusal of another says it."""
    import re

    with pytest.raises(sidereal.SiderealError) as caught:
        recommender.update_weights({EMBEDDING: np.zeros((1, 1), np.float32)})
    return [int(size) for size in re.findall(r"\[(\d+), (\d+)\]", str(caught.value))[-1]]


def test_weights_of_torch_in_bfloat16(own):
    torch = pytest.importorskip("torch")
    shape = shape_of(own)
    weights = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05).bfloat16()
    own.update_weights({EMBEDDING: weights})
    scores = own.recommend(history=["168"]).scores
    own.update_weights({EMBEDDING: weights.float()})
    assert own.recommend(history=["168"]).scores.tobytes() == scores.tobytes()


def test_bad_weights_change_nothing(own):
    shape = shape_of(own)
    for weights in (
        {"nobody.weight": np.zeros((1, 1), np.float32)},
        {EMBEDDING: np.zeros((1, 1), np.float32)},
        {EMBEDDING: np.full(shape, np.nan, np.float32)},
        {EMBEDDING: np.zeros(shape, np.int32)},
        {EMBEDDING: np.zeros(shape, np.complex64)},
    ):
        with pytest.raises(sidereal.SiderealError):
            own.update_weights(weights)
    assert own.recommend(history=["168"]).weights_version == 1
