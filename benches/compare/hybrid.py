#!/usr/bin/env python3
"""Written semantic IDs, dense retrieval and both together on the demo's held-out rows: recall, NDCG, a picture.

    python hybrid.py [--sidereal target/release/sidereal] [--svg FILE] [--json FILE]

Each model answers all test rows with 50 items. Lists are joined by reciprocal ranks: an item's score is the sum of
1 / (60 + rank) over the lists that have it (Cormack et al. 2009). Needs Python alone.
"""
import argparse
import json
import math
import subprocess

DEMO = "models/industrial"
CATALOG = f"{DEMO}/items.jsonl"
COMMANDS = {
    "SID generation": ["recommend", "--model", DEMO, "--beams", "50"],
    "SASRec": ["retrieve", "--model", "models/retrieval/sasrec", "--catalog", CATALOG],
    "HSTU": ["retrieve", "--model", "models/retrieval/hstu", "--catalog", CATALOG],
}
JOINED = [("SID generation", "SASRec"), ("SID generation", "HSTU"), ("SASRec", "HSTU"), tuple(COMMANDS)]


def answers(binary, arguments, count):
    command = [binary, *arguments, "--requests", f"{DEMO}/test.jsonl", "--top-k", "50", "--format", "jsonl"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lists = [[item["item"] for item in json.loads(line)["items"]] for line in found.splitlines()]
    assert len(lists) == count
    return lists


def joined(lists):
    scores = {}
    for items in lists:
        for rank, item in enumerate(items):
            scores[item] = scores.get(item, 0) + 1 / (60 + rank + 1)
    return sorted(scores, key=lambda item: (-scores[item], item))


def measures(lists, targets):
    ranks = [items[:10].index(target) if target in items[:10] else None for items, target in zip(lists, targets)]
    found = [rank for rank in ranks if rank is not None]
    return {"recall_at_10": round(len(found) / len(ranks), 4),
            "ndcg_at_10": round(sum(1 / math.log2(rank + 2) for rank in found) / len(ranks), 4)}


def picture(results):
    """Two bars a row: recall and NDCG."""
    width, row, left = 640, 44, 210
    scale = (width - left - 70) / max(result["recall_at_10"] for result in results.values())
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {row * len(results) + 40}" '
             'font-family="sans-serif" font-size="13">', '<rect width="100%" height="100%" fill="#fff"/>',
             f'<text x="{left}" y="18" fill="#1b4f72">Recall@10</text><text x="{left + 90}" y="18" fill="#ca6f1e">NDCG@10</text>']
    for at, (name, result) in enumerate(results.items()):
        top = 30 + at * row
        parts.append(f'<text x="{left - 8}" y="{top + 22}" text-anchor="end" fill="#222">{name}</text>')
        for offset, key, colour in ((0, "recall_at_10", "#1b4f72"), (17, "ndcg_at_10", "#ca6f1e")):
            length = result[key] * scale
            parts.append(f'<rect x="{left}" y="{top + offset}" width="{length:.1f}" height="15" fill="{colour}"/>')
            parts.append(f'<text x="{left + length + 5:.1f}" y="{top + offset + 12}" fill="#222">{result[key]:.4f}</text>')
    return "\n".join(parts + ["</svg>"]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sidereal", default="target/release/sidereal")
    parser.add_argument("--svg", metavar="FILE")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    with open(f"{DEMO}/test.jsonl") as file:
        targets = [json.loads(line)["target"] for line in file]
    lists = {name: answers(arguments.sidereal, command, len(targets)) for name, command in COMMANDS.items()}
    results = {name: measures(of_model, targets) for name, of_model in lists.items()}
    for names in JOINED:
        rows = zip(*(lists[name] for name in names))
        results[" + ".join(names)] = measures([joined(row) for row in rows], targets)
    for name, result in results.items():
        print(f"{name:32} Recall@10 {result['recall_at_10']:.4f}   NDCG@10 {result['ndcg_at_10']:.4f}")
    if arguments.svg:
        with open(arguments.svg, "w") as file:
            file.write(picture(results))
    if arguments.json:
        with open(arguments.json, "w") as file:
            file.write(json.dumps({"rows": len(targets), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
