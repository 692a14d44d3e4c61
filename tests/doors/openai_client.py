"""The openai package, and the Prometheus parser over /metrics."""
import urllib.request

from openai import BadRequestError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from common import HTTP, bits, expected, histories, post

client = OpenAI(base_url=f"http://{HTTP}/v1", api_key="none")
assert [model.id for model in client.models.list()] == ["industrial"]
for history in histories(20):
    tokens = post("/v1/recommend", {"history": history})["tokens"]
    assert tokens > 0
completion = client.completions.create(model="industrial", prompt=[5, 6, 7], n=4, best_of=20)
assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
by_tokens = post("/v1/recommend", {"tokens": [5, 6, 7], "beams": 20, "top_k": 4})["items"]
assert [choice.text for choice in completion.choices] == [found["item"] for found in by_tokens]
assert [bits(choice.score) for choice in completion.choices] == [bits(found["score"]) for found in by_tokens]
assert completion.usage.prompt_tokens == 3
stream = client.completions.create(model="industrial", prompt=[5, 6, 7], n=2, stream=True)
assert sum(len(part.choices) for part in stream) == 2
try:
    client.completions.create(model="industrial", prompt=[5], n=0)
    raise AssertionError("n=0 was answered")
except BadRequestError as error:
    assert "not at least 1" in str(error), error

with urllib.request.urlopen(f"http://{HTTP}/metrics") as response:
    families = list(text_string_to_metric_families(response.read().decode()))
assert len(families) >= 40, len(families)
samples = {sample.name for family in families for sample in family.samples}
assert "sidereal_request_seconds_bucket" in samples and "sidereal_requests_total" in samples
buckets = {sample.labels["le"] for family in families for sample in family.samples
           if sample.name == "sidereal_door_request_seconds_bucket"}
assert sum(0.001 <= float(bound) <= 0.2 for bound in buckets) >= 12, buckets
print(f"openai: completions agree with /v1/recommend; prometheus-client: {len(families)} families")
