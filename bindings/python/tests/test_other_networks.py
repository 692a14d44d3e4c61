"""Networks that give vectors or score candidates, opened as any folder is."""

import json

import pytest
from conftest import ROOT

import sidereal


def golden(folder):
    with open(ROOT / "models" / folder / "golden.json") as file:
        return json.load(file)


@pytest.mark.parametrize("folder", ["sasrec/recbole-small", "gru4rec/small", "hstu/small"])
def test_vectors_retrieve_the_published_best(folder):
    with sidereal.Recommender.open(ROOT / "models" / folder, threads=1, read_only=True) as recommender:
        for case in golden(folder)["cases"]:
            fields = {"history": case["history"], "top_k": 5}
            if "time" in case:
                fields["time"] = case["time"]
            if case["best"] is None:
                with pytest.raises(sidereal.CallerError):
                    recommender.recommend(**fields)
                continue
            answer = recommender.recommend(**fields)
            assert [found.item for found in answer.items] == [name for name, _ in case["best"][:5]]
            assert answer.items[0].score == pytest.approx(case["best"][0][1], abs=2e-4)


def test_candidates_are_scored_by_task():
    folder = "dlrm_hstu/small"
    with sidereal.Recommender.open(ROOT / "models" / folder, threads=1, read_only=True) as recommender:
        tasks = golden(folder)["tasks"]
        for case in golden(folder)["cases"]:
            request = dict(case["request"])
            answer = recommender.rank(request.pop("candidates"), **request)
            found = {item.item: item.tasks for item in answer.items}
            for name, scores in case["scores"]:
                assert found[name] == pytest.approx(dict(zip(tasks, scores)), abs=1e-4)
        with pytest.raises(sidereal.CallerError, match="candidates"):
            recommender.recommend(history=["3"], time=5)
