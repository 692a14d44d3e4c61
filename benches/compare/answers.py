#!/usr/bin/env python3
"""Two builds of Sidereal asked the same: are their answers equal, byte by byte?

    python benches/compare/answers.py OLD_BINARY NEW_BINARY

Every checkpoint under models/ answers requests drawn from a fixed seed: histories of 1 to 60 items, filters, groups,
exclusions, samples, log-probabilities, candidates, widths by level, every normalisation and constraint. Each build
runs them on one thread and on two; lines must agree in every byte. Needs Python alone.
"""
import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
REQUESTS_PER_MODEL = 60
# The names of request fields in builds before they were renamed.
OLD_NAMES = {"groups": "each", "seed": "sample"}


def checkpoints():
    for family in ("t5", "decoder_only"):
        folder = os.path.join(ROOT, "models", family)
        yield from (os.path.join(folder, name) for name in sorted(os.listdir(folder)))
    yield os.path.join(ROOT, "models", "industrial")


def write_items(levels, path):
    """The catalogue with so many levels, with tags for filters; returns the items' names."""
    name = {3: "industrial", 4: "instruments"}[levels]
    with open(os.path.join(ROOT, f"models/catalogs/{name}.index.json")) as file:
        index = json.load(file)
    with open(path, "w") as file:
        for number, (item, texts) in enumerate(index.items()):
            sid = [int(re.findall(r"\d+", text)[-1]) for text in texts]
            tags = [f"mod{number % 7}"] + (["rare"] if number % 97 == 0 else [])
            file.write(json.dumps({"item": item, "sid": sid, "tags": tags, "available": number % 13 != 5}) + "\n")
    return list(index)


def draw(rng, items, levels, number):
    request = {"id": f"r{number}", "history": [rng.choice(items) for _ in range(rng.choice([1, 2, 5, 10, 20, 60]))],
               "beams": rng.choice([1, 3, 10, 20, 50, 128]), "top_k": rng.choice([1, 5, 10, 50])}
    kind = number % 6
    if kind == 1:
        request["filter"] = rng.choice(["tag:mod3", "tag:mod1 | tag:mod2", "!tag:mod0 & !tag:rare", "tag:rare", "tag:nothing"])
        request["exclude"] = rng.sample(items, 200)
    elif kind == 2:
        request["groups"] = rng.sample(["tag:mod1", "tag:mod2", "tag:rare", "!tag:mod4"], rng.randint(1, 3))
    elif kind == 3:
        request["seed"], request["log_probs"] = rng.randrange(1 << 32), rng.random() < 0.5
    elif kind == 4:
        request["candidates"] = rng.sample(items, rng.choice([1, 20, 200]))
        request["log_probs"] = rng.random() < 0.5
    elif kind == 5:
        request["beams"] = [rng.choice([4, 16, 64]) for _ in range(levels)]
        request["constraint"] = rng.choice(["trie", "level", "none"])
        request["shared_sid"] = rng.choice(["all", "first"])
    request["normalize"] = rng.choice(["vocabulary", "children"] if request.get("constraint") == "none"
                                      else ["vocabulary", "level", "children"])
    if rng.random() < 0.3:
        request["temperature"] = rng.choice([0.5, 1.7])
    return request


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--old-names", action="store_true", help="the old build has the field names each and sample")
    options = parser.parse_args()
    total, failed = 0, 0
    with tempfile.TemporaryDirectory() as work:
        for folder in checkpoints():
            rng = random.Random(os.path.basename(folder))
            with open(os.path.join(folder, "sidereal.json")) as file:
                levels = len(json.load(file)["levels"])
            catalog = os.path.join(work, f"{levels}.jsonl")
            items = write_items(levels, catalog)
            requests = [draw(rng, items, levels, number) for number in range(REQUESTS_PER_MODEL)]
            answers = {}
            for build, binary in (("old", options.old), ("new", options.new)):
                names = OLD_NAMES if build == "old" and options.old_names else {}
                path = os.path.join(work, f"{build}.jsonl")
                with open(path, "w") as file:
                    for request in requests:
                        file.write(json.dumps({names.get(key, key): value for key, value in request.items()}) + "\n")
                for threads in ("1", "2"):
                    command = [binary, "recommend", "--model", folder, "--catalog", catalog, "--requests", path,
                               "--threads", threads, "--format", "jsonl"]
                    done = subprocess.run(command, capture_output=True, text=True)
                    assert done.returncode in (0, 1), f"{command}: {done.stderr}"
                    answers[build, threads] = done.stdout.splitlines()
            expected = answers["old", "1"]
            answered = sum('"error"' not in line for line in expected)
            different = {number for lines in answers.values() for number, (a, b) in enumerate(zip(expected, lines)) if a != b}
            is_short = any(len(lines) != len(requests) for lines in answers.values())
            print(f"{os.path.relpath(folder, ROOT)}: {answered} of {len(requests)} answered, {len(different)} differ"
                  + (", LINES ARE MISSING" if is_short else ""), flush=True)
            for number in sorted(different)[:2]:
                print("  request", json.dumps(requests[number])[:300])
                for key, lines in answers.items():
                    print("  ", *key, lines[number][:300])
            total += len(requests)
            failed += len(different) + is_short
    print(f"{total} requests, {failed} differ")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
