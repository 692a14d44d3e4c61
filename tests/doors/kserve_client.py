"""KServe's client, version 2 of the protocol, with its defaults."""
import asyncio

import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

from common import HTTP, MODEL, bits, expected, histories


async def main():
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    base = f"http://{HTTP}"
    assert await client.is_server_ready(base) is True
    assert await client.is_server_live(base) is True
    assert await client.is_model_ready(base, MODEL) is True
    for history in histories(20):
        tensor = InferInput("history", [len(history)], "BYTES")
        tensor.set_data_from_numpy(np.array([item.encode() for item in history], dtype=np.object_))
        request = InferRequest(model_name=MODEL, infer_inputs=[tensor], parameters={"beams": 20})
        answer = await client.infer(base, request, model_name=MODEL)
        outputs = {output.name: output.as_numpy() for output in answer.outputs}
        names = [item.decode() if isinstance(item, bytes) else item for item in outputs["items"][0]]
        found = list(zip(names, map(bits, outputs["scores"][0])))
        assert found == expected(history, beams=20), history
    await client.close()


asyncio.run(main())
print("kserve: the REST client agrees with /v1/recommend to the last bit")
