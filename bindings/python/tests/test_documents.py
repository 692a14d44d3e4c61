"""The examples, and the code of docs/python.md as it is written there."""

import pathlib
import re
import subprocess
import sys

import pytest

from conftest import MODEL, ROOT

EXAMPLES = sorted((ROOT / "bindings" / "python" / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(example):
    if example.name == "tables.py":
        pytest.importorskip("polars")
    run = subprocess.run(
        [sys.executable, example, MODEL], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) >= 5


def test_the_page_is_true(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 5
    (tmp_path / "models").symlink_to(ROOT / "models")
    catalog = pathlib.Path("items.jsonl")
    monkeypatch.chdir(tmp_path)
    catalog.write_bytes((MODEL / "items.jsonl").read_bytes())
    names = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
