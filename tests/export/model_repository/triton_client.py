"""What the test of the real server runs in the server's environment, which has tritonclient and the protobuf classes.

Reads a job from standard input, as JSON, and writes its results: `parse` names files that are read as model
configurations; `requests` are sent to the model `rank`, those of an inner list together.
"""

import base64
import json
import sys
import threading
from pathlib import Path
from typing import Any


def parse(paths: list[str]) -> list[str]:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2  # pyright: ignore[reportMissingImports]

    names = []
    for path in paths:
        config = text_format.Parse(Path(path).read_text(), model_config_pb2.ModelConfig())
        names.append(config.name)
    return names


def ask(url: str, model: str, request: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import tritonclient.http as triton  # pyright: ignore[reportMissingImports]
    from tritonclient.utils import InferenceServerException  # pyright: ignore[reportMissingImports]

    inputs = []
    for name in ("images", "captions"):
        values = [base64.b64decode(value) for value in request[name]]
        tensor = triton.InferInput(name, [1, len(values)], "BYTES")
        tensor.set_data_from_numpy(np.array([[*values, None]], dtype=object)[:, :-1])
        inputs.append(tensor)
    with triton.InferenceServerClient(url, network_timeout=60.0) as client:
        try:
            answer = client.infer(model, inputs)
        except InferenceServerException as error:
            return {"error": error.message()}
        return {
            name: answer.as_numpy(name)[0].tolist() for name in ("scores", "caption_order", "image_order", "reused")
        }


def main() -> None:
    job = json.load(sys.stdin)
    answers: list[list[dict[str, Any] | None]] = []
    for together in job.get("requests", []):
        found: list[dict[str, Any] | None] = [None] * len(together)

        def send(place: int, together: Any = together, found: Any = found) -> None:
            found[place] = ask(job["url"], job["model"], together[place])

        threads = [threading.Thread(target=send, args=(place,)) for place in range(len(together))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        answers.append(found)
    json.dump({"parsed": parse(job.get("parse", [])), "answers": answers}, sys.stdout)


if __name__ == "__main__":
    main()
