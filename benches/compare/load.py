#!/usr/bin/env python3
"""Load: what a full engine still answers, and what long requests cost short ones; goals and figures in one table.

    cargo build --release
    python3 benches/compare/load.py --output load-goals.json                    about 5 minutes
    python3 benches/compare/load.py --old OTHER/sidereal                        beside another build, in turns

Goals (ratios within one run):
  goodput    requests answered in time at four times the load that the engine can carry, over those at once that load: 0.9
  beside     99th percentile of short requests beside 5 % long ones, over that without long ones, 5 % busy: at most 2
  mixed      throughput of short and long requests together, over that of the other build: 0.95

`--rate` of `sidereal bench` is an open load; what the engine can carry is measured first, by 16 callers that wait.
Run it on a quiet machine: times are wall-clock times.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
MODEL = ["--model", "models/industrial", "--beams", "20"]
SHORT, LONG = 6, 300  # items of a history
MIXED = ["--mixed-history", ",".join(["6"] * 19 + ["300"])]
KINDS = {
    "short": ["--requests", "models/industrial/test.jsonl", "--deadline", "100"],
    "short, returning": ["--requests", "models/industrial/test.jsonl", "--deadline", "100", "--prefix-cache",
                         "--returning", "90"],
    "long": ["--history", "100", "--deadline", "200"],
    "long, returning": ["--history", "100", "--deadline", "200", "--prefix-cache", "--returning", "90"],
}


def bench(binary, *options):
    command = [binary, "bench", *MODEL, *options, "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if result.returncode not in (0, 1) or not result.stdout.strip():
        sys.exit(f"{' '.join(command)}: {result.stderr.strip()}")
    return json.loads(result.stdout)


def load_of(report):
    """The figures of an open load."""
    return report["loads"][0]


def without_deadline(options):
    at = options.index("--deadline")
    return options[:at] + options[at + 2:]


def goodput(binary, rounds):
    rows = []
    for kind, options in KINDS.items():
        callers = bench(binary, *without_deadline(options), "--concurrency", "16", "--repeat", "1")
        rate = callers["requests_per_second"]
        answered = {1: [], 4: []}
        for _ in range(rounds):
            for factor in answered:
                point = load_of(bench(binary, *options, "--rate", f"{rate * factor:.1f}", "--seconds", "5"))
                answered[factor].append(point["answered_per_second"])
        once, four = (statistics.median(answered[factor]) for factor in (1, 4))
        rows.append({"kind": kind, "capacity": rate, "answered": answered, "ratio": four / once})
        print(f"goodput  {kind:18} capacity {rate:7.1f}/s  1x {once:7.1f}  4x {four:7.1f}  ratio {four / once:.2f}", flush=True)
    return rows


def beside(binary, rounds):
    """The 99th percentile of short requests, with and without long ones, on an engine that is 5 % busy."""
    alone, with_long = [], []
    carried = bench(binary, *MIXED, "--concurrency", "16", "--repeat", "5")["requests_per_second"]
    rate = ["--rate", f"{carried / 20:.2f}", "--seconds", "20"]
    for _ in range(rounds):
        alone.append(load_of(bench(binary, "--history", str(SHORT), *rate))["latency_ms"]["p99"])
        point = load_of(bench(binary, *MIXED, *rate))
        short = next(row for row in point["by_history"] if row["items"] == SHORT)
        with_long.append(short["latency_ms"]["p99"])
    ratio = statistics.median(with_long) / statistics.median(alone)
    print(f"beside   p99 alone {alone}  beside {with_long}  ratio {ratio:.2f}", flush=True)
    return {"rate": rate[1], "alone_ms": alone, "beside_ms": with_long, "ratio": ratio}


def mixed(old, new, rounds):
    speeds = {"old": [], "new": []}
    cpu = {"old": [], "new": []}
    for _ in range(rounds):
        for name, binary in (("old", old), ("new", new)):
            report = bench(binary, *MIXED, "--concurrency", "16", "--repeat", "20")
            speeds[name].append(report["requests_per_second"])
            cpu[name].append(report["cpu_ms_per_request"])
    ratio = statistics.median(speeds["new"]) / statistics.median(speeds["old"])
    work = statistics.median(cpu["new"]) / statistics.median(cpu["old"])
    print(f"mixed    {speeds}  ratio {ratio:.3f}; CPU a request {work:.3f}", flush=True)
    return {"requests_per_second": speeds, "cpu_ms_per_request": cpu, "ratio": ratio, "cpu_ratio": work}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sidereal", default=os.path.join(ROOT, "target/release/sidereal"))
    parser.add_argument("--old", help="another build, for the throughput of mixed requests")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["goodput", "beside", "mixed"])
    parser.add_argument("--output")
    arguments = parser.parse_args()
    binary, rounds = os.path.abspath(arguments.sidereal), arguments.rounds
    record = {"what": __doc__.splitlines()[0], "command": " ".join(sys.argv)}
    if arguments.only in (None, "goodput"):
        record["goodput"] = goodput(binary, rounds)
    if arguments.only in (None, "beside"):
        record["beside"] = beside(binary, rounds)
    if arguments.old and arguments.only in (None, "mixed"):
        record["mixed"] = mixed(os.path.abspath(arguments.old), binary, 2 * rounds)
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
