"""Recommend, wait for many at once, rank, and change the catalog: `python quickstart.py MODEL [CATALOG]`."""

import asyncio
import sys

import sidereal


def main(model: str, catalog: str | None = None) -> None:
    # Without `read_only` the catalog may be changed, and the changes are logged beside its file.
    with sidereal.Recommender.open(model, catalog, read_only=True) as recommender:
        print(recommender, "with", len(recommender.catalog), "items")

        # One request. The fields are those of docs/cli.md.
        answer = recommender.recommend(history=["168", "278"], beams=50, top_k=5, titles=True)
        for found in answer:
            print(f"{found.item:>6} {found.score:8.3f} {found.title}")

        # Arrays, for those who go on computing.
        print(answer.scores.shape, answer.sids.dtype, answer.sids[0])

        # Many requests share the engine's steps.
        users = [["168"], ["278", "17"], ["4"]]
        answers = recommender.recommend_batch([{"history": history, "top_k": 3} for history in users])
        print([found.names for found in answers])

        # The same in tasks; one that is cancelled gives its room back at once.
        async def ask() -> list[sidereal.Answer]:
            waits = [recommender.recommend_async(history=history, top_k=3) for history in users]
            return await asyncio.gather(*waits)

        print([found.names for found in asyncio.run(ask())])

        # Given items, best first, and errors that say what to do.
        print(recommender.score(["17", "4", "278"], history=["168"]))
        try:
            recommender.recommend(history=["168"], beams=0)
        except sidereal.CallerError as error:
            print(error.code, "-", error)


if __name__ == "__main__":
    main(*sys.argv[1:])
