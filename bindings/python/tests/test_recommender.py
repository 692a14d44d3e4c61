"""Answers, waits and errors."""

import asyncio
import concurrent.futures
import json
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

import sidereal
from conftest import MODEL, ROOT

BINARY = os.environ.get("SIDEREAL_BINARY", ROOT / "target" / "debug" / "sidereal")


def requests(count):
    lines = (MODEL / "test.jsonl").read_text().splitlines()[:count]
    return [{"history": json.loads(line)["history"], "beams": 20, "top_k": 10} for line in lines]


@pytest.mark.skipif(not pathlib.Path(BINARY).exists(), reason=f"{BINARY} is not built")
def test_answers_are_those_of_the_command_line_to_the_last_bit(demo):
    asked = requests(200)
    lines = "".join(json.dumps(request) + "\n" for request in asked)
    command = [BINARY, "recommend", "--model", MODEL, "--requests", "-", "--dtype", "f32"]
    output = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    expected = [json.loads(line) for line in output.stdout.splitlines()]
    assert len(expected) == 200
    alone = [demo.recommend(**request) for request in asked[:50]]
    for answer, line in zip(alone + demo.recommend_batch(asked), expected[:50] + expected):
        assert answer.names == [item["item"] for item in line["items"]]
        assert answer.sids.tolist() == [item["sid"] for item in line["items"]]
        scores = np.array([item["score"] for item in line["items"]], dtype=np.float32)
        assert answer.scores.tobytes() == scores.tobytes()


def test_an_answer_says_what_belongs_to_it(demo):
    answer = demo.recommend(
        history=["168", "278", "nobody"], top_k=3, titles=True, log_probs=True, timings=True
    )
    assert len(answer) == 3 and [item.item for item in answer] == answer.names
    first = answer[0]
    assert first.title and len(first.sid) == 3 and len(first.log_probs) == 3
    assert first.score == answer.items[0].score == float(answer.scores[0])
    assert answer.sids.dtype == np.int32 and answer.sids.shape == (3, 3)
    assert answer.snapshot >= 1 and answer.weights_version == 1 and answer.tokens > 0
    assert answer.timings["total_us"] > 0 and answer.groups is None
    assert answer.unknown_items["history"]["count"] == 1
    assert answer.to_dict()["items"][0]["item"] == first.item
    assert "3 items" in repr(answer) and first.item in repr(first)


def test_numbers_and_series_of_other_libraries_are_read(demo):
    pandas = pytest.importorskip("pandas")
    expected = demo.recommend(history=["168", "278"]).names
    for history in (np.array([168, 278]), pandas.Series(["168", "278"]), (168, np.int64(278))):
        assert demo.recommend(history=history, top_k=np.int32(10)).names == expected


def test_rank_score_and_sample(demo):
    found = demo.recommend(history=["168", "278"], beams=20, top_k=5)
    ranked = demo.rank(found.names[::-1], history=["168", "278"])
    assert ranked.names == found.names and ranked.scores.tobytes() == found.scores.tobytes()
    assert demo.score(found.names, history=["168", "278"]) == dict(
        zip(found.names, found.scores.tolist())
    )
    one, again = (demo.sample(7, history=["168"], beams=8, top_k=8) for _ in range(2))
    assert one.names == again.names and one[0].log_probs
    with pytest.raises(sidereal.CallerError, match="candidates"):
        demo.rank([], history=["168"])


def test_tasks_wait_without_a_thread_each(demo):
    asked = requests(40)
    expected = [answer.names for answer in demo.recommend_batch(asked)]

    async def ask():
        return await asyncio.gather(*(demo.recommend_async(**request) for request in asked))

    assert [answer.names for answer in asyncio.run(ask())] == expected

    async def fail():
        await demo.recommend_async(history=["168"], beams=0)

    with pytest.raises(sidereal.CallerError):
        asyncio.run(fail())


def test_a_cancelled_task_cancels_its_request(demo):
    async def ask():
        request = {"history": requests(1)[0]["history"], "beams": 1000, "top_k": 10}
        tasks = [asyncio.ensure_future(demo.recommend_async(**request)) for _ in range(30)]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(ask())
    assert any(isinstance(result, asyncio.CancelledError) for result in results)
    deadline = time.monotonic() + 10
    while demo.status()["running"] + demo.status()["queued"] > 0:
        assert time.monotonic() < deadline, "cancelled requests run on"
        time.sleep(0.01)
    assert "cancelled" in demo.metrics()


def test_many_threads_ask_one_recommender(demo):
    asked = requests(64)
    expected = [answer.names for answer in demo.recommend_batch(asked)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda request: demo.recommend(**request).names, asked))
    assert names == expected


def test_others_run_while_one_waits(demo):
    ticks = 0

    def wait():
        return demo.recommend(history=requests(1)[0]["history"], beams=4000, top_k=10)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(wait)
        while not future.done():
            ticks += 1
            time.sleep(0)
    assert len(future.result()) == 10 and ticks > 10


def test_a_batch_has_an_answer_or_an_exception_in_each_place(demo):
    asked = [{"history": ["168"]}, {"histroy": ["168"]}, {"history": ["168"], "beams": 0}]
    asked += [{"history": ["278"]}]
    results = demo.recommend_batch(asked, return_exceptions=True)
    kinds = [type(result) for result in results]
    caller = sidereal.CallerError
    assert kinds == [sidereal.Answer, caller, caller, sidereal.Answer]
    with pytest.raises(caller, match="histroy"):
        demo.recommend_batch(asked)
    assert demo.recommend_batch([]) == []


BAD = [
    ({"histroy": ["168"]}, "histroy"),
    ({"history": "168"}, "history|sequence"),
    ({}, "history"),
    ({"history": ["168"], "beams": -1}, "-1"),
    ({"history": ["168"], "beams": 10**30}, "beam|number|range|big"),
    ({"history": ["168"], "top_k": 0}, "top_k|result"),
    ({"history": ["168"], "temperature": float("nan")}, "nan"),
    ({"history": ["168"], "filter": "tag:("}, "filter|tag"),
    ({"history": [object()]}, "object|type"),
    ({"history": ["168"], "deadline_ms": -5}, "deadline"),
    ({"tokens": [10**9]}, "token"),
]


@pytest.mark.parametrize(("request_fields", "words"), BAD)
def test_a_bad_request_is_an_exception_of_the_caller(demo, request_fields, words):
    with pytest.raises(sidereal.CallerError) as caught:
        demo.recommend(**request_fields)
    assert re.search(words, str(caught.value)), str(caught.value)
    assert caught.value.kind == "caller" and caught.value.code


def test_exceptions_pickle(demo):
    with pytest.raises(sidereal.SiderealError) as caught:
        demo.recommend(history=["168"], beams=0)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is type(caught.value) and vars(copy) == vars(caught.value)
    assert isinstance(copy, ValueError)


def test_a_deadline_is_a_timeout(demo):
    with pytest.raises(TimeoutError) as caught:
        demo.recommend(history=requests(1)[0]["history"], beams=4000, deadline_ms=0.01)
    assert isinstance(caught.value, sidereal.DeadlineExceededError)


def test_what_cannot_be_opened_says_why(tmp_path):
    with pytest.raises(sidereal.SiderealError, match="nowhere"):
        sidereal.Recommender.open(tmp_path / "nowhere", MODEL / "items.jsonl")
    with pytest.raises(sidereal.SiderealError, match="catalog"):
        sidereal.Recommender.open(tmp_path)
    for options in ({"device": "abacus"}, {"dtype": "f8"}, {"durability": "x"}, {"max_wait": -1.0}):
        with pytest.raises(sidereal.SiderealError):
            sidereal.Recommender.open(MODEL, read_only=True, **options)
    with pytest.raises(TypeError):
        sidereal.Recommender.open(MODEL, threds=1)


def test_a_closed_recommender_says_so():
    recommender = sidereal.Recommender.open(MODEL, threads=1, read_only=True)
    assert recommender.status()["is_serving"] and "f32" in repr(recommender)
    recommender.close()
    recommender.close()
    assert recommender.is_closed and "closed" in repr(recommender)
    with pytest.raises(sidereal.SiderealError) as caught:
        recommender.recommend(history=["168"])
    assert caught.value.code == "shutting_down"


def run(code):
    program = textwrap.dedent(code).replace("MODEL", repr(str(MODEL)))
    # Not beside the package's source, which `-c` would import in place of the installed wheel.
    elsewhere = pathlib.Path(__file__).parent
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=elsewhere, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_ctrl_c_ends_a_wait():
    process = run(
        """
        import sidereal
        recommender = sidereal.Recommender.open(MODEL, threads=1, read_only=True)
        asked = [{"history": ["168"] * 50, "beams": 4000, "top_k": 5}] * 5000
        print("waits", flush=True)
        try:
            recommender.recommend_batch(asked)
        except KeyboardInterrupt:
            print("interrupted", recommender.recommend(history=["168"]).names[0] != "")
        """
    )
    assert process.stdout.readline() == "waits\n"
    time.sleep(0.5)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out == "interrupted True\n", err
    assert time.monotonic() - start < 30


def test_a_process_ends_while_requests_run():
    process = run(
        """
        import sidereal
        recommender = sidereal.Recommender.open(MODEL, threads=1, read_only=True)
        for _ in range(50):
            recommender._native.submit_with({"history": ["168"], "beams": 1000}, print)
        """
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_is_told():
    process = run(
        """
        import os, sidereal
        recommender = sidereal.Recommender.open(MODEL, threads=1, read_only=True)
        child = os.fork()
        if child == 0:
            try:
                recommender.recommend(history=["168"])
            except sidereal.SiderealError as error:
                print(error.code, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        print(len(recommender.recommend(history=["168"])), flush=True)
        """
    )
    out, err = process.communicate(timeout=60)
    assert out == "forked\n10\n", err
