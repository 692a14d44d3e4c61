"""Triton's clients, HTTP and gRPC, with their defaults: tensors in binary."""
import time

import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from common import GRPC, HTTP, MODEL, bits, expected, histories


def found(result):
    items, scores = result.as_numpy("items")[0], result.as_numpy("scores")[0]
    return [(item.decode(), bits(score)) for item, score in zip(items, scores)]


def history_input(module, history):
    tensor = module.InferInput("history", [len(history)], "BYTES")
    tensor.set_data_from_numpy(np.array([item.encode() for item in history], dtype=np.object_))
    return tensor


def fails(call, *words):
    try:
        call()
    except InferenceServerException as error:
        text = f"{error.status()} {error.message()}"
        assert all(word in text for word in words), text
        return
    raise AssertionError(f"it did not fail: {words}")


http = triton_http.InferenceServerClient(HTTP)
grpc = triton_grpc.InferenceServerClient(GRPC)
for client in (http, grpc):
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(MODEL)

metadata = http.get_server_metadata()
assert {"binary_tensor_data", "model_configuration", "statistics"} <= set(metadata["extensions"]), metadata
assert list(grpc.get_server_metadata().extensions) == metadata["extensions"]
assert http.get_model_metadata(MODEL)["name"] == grpc.get_model_metadata(MODEL).name == MODEL
config = http.get_model_config(MODEL)
assert config["max_batch_size"] == 0 and grpc.get_model_config(MODEL).config.max_batch_size == 0
assert {tensor["name"] for tensor in config["input"]} == {tensor.name for tensor in grpc.get_model_config(MODEL).config.input}

for history in histories(100):
    wanted = expected(history, beams=20)
    parameters = {"beams": 20}
    by_http = http.infer(MODEL, [history_input(triton_http, history)], parameters=parameters)
    by_grpc = grpc.infer(MODEL, [history_input(triton_grpc, history)], parameters=parameters)
    assert found(by_http) == found(by_grpc) == wanted, history

# A ragged batch, and JSON instead of binary.
batch = histories(5)
flat = [item for history in batch for item in history]
for module, client in ((triton_http, http), (triton_grpc, grpc)):
    lengths = module.InferInput("history_lengths", [len(batch)], "INT64")
    lengths.set_data_from_numpy(np.array([len(history) for history in batch], dtype=np.int64))
    result = client.infer(MODEL, [history_input(module, flat), lengths], request_id="7")
    for row, history in enumerate(batch):
        names = [item.decode() for item in result.as_numpy("items")[row]]
        assert names == [item for item, _ in expected(history)], history
    assert result.as_numpy("sids").shape == (5, 10, 3) and list(result.as_numpy("counts")) == [10] * 5
plain = triton_http.InferInput("history", [len(batch[0])], "BYTES")
plain.set_data_from_numpy(np.array([item.encode() for item in batch[0]], dtype=np.object_), binary_data=False)
wanted = [triton_http.InferRequestedOutput("items", binary_data=False), triton_http.InferRequestedOutput("titles")]
result = http.infer(MODEL, [plain], outputs=wanted)
assert [str(item) for item in result.as_numpy("items")[0]] == [item for item, _ in expected(batch[0])]
assert len(result.as_numpy("titles")[0][0]) > 0 and result.as_numpy("scores") is None

# A stream of requests, as perf_analyzer sends with --streaming.
answers = []
grpc.start_stream(lambda result, error: answers.append((result, error)))
grpc.async_stream_infer(MODEL, [history_input(triton_grpc, batch[0])])
grpc.async_stream_infer(MODEL, [history_input(triton_grpc, ["no such item"])])
until = time.time() + 30
while len(answers) < 2 and time.time() < until:
    time.sleep(0.01)
grpc.stop_stream()
assert answers[0][1] is None and "no such item" in str(answers[1][1]), answers

# Errors arrive as such, deadlines too.
unknown = lambda module: [history_input(module, ["no such item"])]
fails(lambda: http.infer(MODEL, unknown(triton_http)), "no such item")
fails(lambda: grpc.infer(MODEL, unknown(triton_grpc)), "INVALID_ARGUMENT", "no such item")
fails(lambda: http.infer("nothing", unknown(triton_http)), "nothing")
fails(lambda: grpc.infer("nothing", unknown(triton_grpc)), "NOT_FOUND")
fails(lambda: grpc.infer(MODEL, [history_input(triton_grpc, batch[0])], client_timeout=1e-6), "DEADLINE_EXCEEDED")
fails(lambda: grpc.infer(MODEL, [history_input(triton_grpc, batch[0])], timeout=1), "DEADLINE_EXCEEDED")
fails(lambda: http.infer(MODEL, [history_input(triton_http, batch[0])], parameters={"tops": 1}), "tops")

# The repository, and statistics that count.
http.load_model(MODEL)
before = http.get_inference_statistics(MODEL)["model_stats"][0]["inference_stats"]["queue"]["count"]
http.infer(MODEL, [history_input(triton_http, batch[0])])
after = grpc.get_inference_statistics(MODEL).model_stats[0]
assert after.inference_stats.queue.count == before + 1 and after.version == "1"
grpc.unload_model(MODEL)
assert not http.is_model_ready(MODEL)
assert http.get_model_repository_index()[0]["state"] == "UNAVAILABLE"
grpc.load_model(MODEL)
assert grpc.get_model_repository_index().models[0].state == "READY"
print("tritonclient: HTTP and gRPC agree with /v1/recommend to the last bit")
