"""What the clients have in common: where the server is, and the answers of its own JSON door."""
import json
import os
import struct
import urllib.request

HTTP = os.environ["SIDEREAL_HTTP"]  # host:port
GRPC = os.environ["SIDEREAL_GRPC"]
MODEL = "industrial"
USERS = os.path.join(os.path.dirname(__file__), "..", "..", "models", "industrial", "users.jsonl")


def histories(count):
    with open(USERS) as file:
        lines = [json.loads(line)["history"] for line in file]
    return [[*line[at % len(line):], *line[:at % len(line)]] for at, line in
            ((at, lines[at % len(lines)]) for at in range(count))]


def post(path, body):
    request = urllib.request.Request(f"http://{HTTP}{path}", json.dumps(body).encode())
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def bits(score):
    return struct.pack("<f", score)


def expected(history, **fields):
    """Names and the bits of scores, as /v1/recommend gives them."""
    items = post("/v1/recommend", {"history": history, **fields})["items"]
    return [(found["item"], bits(found["score"])) for found in items]
