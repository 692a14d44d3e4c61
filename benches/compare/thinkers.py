#!/usr/bin/env python3
"""What requests that think cost those that do not: latencies of short requests, with and without thinkers beside them.

    python thinkers.py [--model DIR] [--callers 64] [--seconds 8] [--rounds 3] [--tokens 200] [--threads N]

Needs the package `sidereal` (bindings/python). Callers wait for each answer and ask again. A round measures, in turns,
callers who all send short requests, and as many of which half think for so many tokens before they recommend.
"""
import argparse
import json
import random
import statistics
import threading
import time

import sidereal


def measure(recommender, histories, arguments, thinkers):
    """Milliseconds of the short requests, and thoughts that ended, of one load."""
    end = time.perf_counter() + arguments.seconds
    latencies, thoughts, lock = [], [0], threading.Lock()

    def call(number):
        rng, is_thinker = random.Random(number), number < thinkers
        while time.perf_counter() < end:
            request = {"history": rng.choice(histories), "beams": 20, "top_k": 10}
            if is_thinker:  # a code of the first level that ends nothing here: the longest thought each time
                request["think"] = {"max_tokens": arguments.tokens, "stop": [0], "seed": rng.randrange(1 << 30)}
            begin = time.perf_counter()
            recommender.recommend(**request)
            with lock:
                if is_thinker:
                    thoughts[0] += 1
                else:
                    latencies.append((time.perf_counter() - begin) * 1e3)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(arguments.callers)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return latencies, thoughts[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/industrial")
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    with open(f"{arguments.model}/test.jsonl") as file:
        histories = [json.loads(line)["history"] for line in file][:2000]
    recommender = sidereal.Recommender.open(arguments.model, threads=arguments.threads)
    ratios = []
    for round_ in range(arguments.rounds):
        of_round = []
        for thinkers in (0, arguments.callers // 2):
            latencies, thoughts = measure(recommender, histories, arguments, thinkers)
            p50, p99 = (statistics.quantiles(latencies, n=100)[at] for at in (49, 98))
            of_round.append(p99)
            print(f"round {round_}: {arguments.callers - thinkers} short and {thinkers} thinking callers: "
                  f"{len(latencies) / arguments.seconds:.0f} short requests/s, p50 {p50:.2f} ms, p99 {p99:.2f} ms, "
                  f"{thoughts * arguments.tokens / arguments.seconds:.0f} tokens/s", flush=True)
        ratios.append(of_round[1] / of_round[0])
    print(f"p99 beside thinkers over p99 without: {statistics.median(ratios):.2f} (median of {arguments.rounds})")


main()
