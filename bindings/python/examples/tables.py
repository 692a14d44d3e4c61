"""A table of users in, a table of recommendations out: `python tables.py MODEL`, with Polars."""

import sys

import polars as pl

import sidereal


def main(model: str) -> None:
    users = pl.DataFrame(
        {"user": ["ann", "bob", "cem"], "history": [["168", "278"], ["17"], ["4", "100", "168"]]}
    )
    with sidereal.Recommender.open(model, read_only=True) as recommender:
        requests = users.select("user", "history").to_dicts()
        answers = recommender.recommend_batch({**request, "top_k": 5} for request in requests)
    columns = [
        pl.DataFrame({"user": user, "rank": range(1, len(found) + 1), "item": found.names, "score": found.scores})
        for user, found in zip(users["user"], answers)
    ]
    print(pl.concat(columns))


if __name__ == "__main__":
    main(*sys.argv[1:])
