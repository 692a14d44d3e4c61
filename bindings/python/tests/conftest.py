"""What all tests share: the demo model, open, and a catalog that may be changed."""

import pathlib
import shutil

import pytest

import sidereal

ROOT = pathlib.Path(__file__).resolve().parents[3]
MODEL = ROOT / "models" / "industrial"


@pytest.fixture(scope="session")
def demo():
    with sidereal.Recommender.open(MODEL, threads=1, read_only=True) as recommender:
        yield recommender


@pytest.fixture
def own(tmp_path):
    """A recommender over a copy of the catalog."""
    catalog = tmp_path / "items.jsonl"
    shutil.copy(MODEL / "items.jsonl", catalog)
    with sidereal.Recommender.open(MODEL, catalog, threads=1) as recommender:
        yield recommender
