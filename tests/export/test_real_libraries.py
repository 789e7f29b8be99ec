"""The real libraries that stand-ins replace in other tests: Triton Inference Server, TensorRT's module, Torch-TensorRT.

CONTRIBUTING.md says how to install each; a test whose library is absent is skipped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.export.model_repository.test_writing import CAPTIONS, eager_scores, photo
from xfm_fast.export.model_repository import RepositoryOptions, write_model_repository
from xfm_fast.models.xfm import XFM
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the packages are those of Linux"),
]

ROOT = Path(__file__).parents[2]
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
# The wheel of the server has the Python backend alone: a model of it that does what `onnxruntime_onnx` does.
ONNX_MODEL = """
from pathlib import Path
import onnxruntime, triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        path, = Path(args["model_repository"], args["model_version"]).glob("*.onnx")
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        inputs, outputs = self.session.get_inputs(), [each.name for each in self.session.get_outputs()]
        feed = {each.name: pb_utils.get_input_tensor_by_name(request, each.name).as_numpy() for each in inputs}
        results = zip(outputs, self.session.run(outputs, feed))
        return pb_utils.InferenceResponse([pb_utils.Tensor(*result) for result in results])
"""
# NVIDIA's bindings over the libraries of TensorRT for RTX, which have the same functions under other names.
TENSORRT = """
import importlib, sys
from pathlib import Path
bindings, exported, out = sys.argv[1:]
sys.path.insert(0, bindings)
sys.modules["tensorrt"] = trt = importlib.import_module("tensorrt_bindings")
from xfm_fast.errors import ExportError
from xfm_fast.export import engines, tensorrt
from xfm_fast.export.manifest import Manifest
from xfm_fast.export.request import TensorRTRequest
engines.local_capability = lambda: 89
library = engines.find_builder("tensorrt")
request = TensorRTRequest(level=3, timing_cache=Path(out, "timings"), hardware_compatible="ampere_plus")
targets = library.check(request, "fp32")
try:
    engines.build_engines(Manifest.load(exported), Path(exported), Path(out), library, targets, request)
except ExportError as error:
    # Parsed, configured and built; a writer of one version is not called by the library of another.
    assert "wrote nothing" in str(error), error
errors = []
runtime = tensorrt.start("TensorRT", trt.Runtime, tensorrt.message_logger(trt, errors), errors)
assert runtime.deserialize_cuda_engine(b"no engine") is None and errors
context, engine = trt.IExecutionContext, trt.ICudaEngine
assert context.set_device_memory and context.set_optimization_profile_async and context.set_input_shape
assert context.set_tensor_address and context.execute_async_v3 and engine.create_execution_context
assert engine.device_memory_size_v2 and engine.get_device_memory_size_for_profile_v2
"""
# Programs are lowered and divided as `torch.compile(backend="tensorrt")` does it; nothing is built.
TORCH_TENSORRT = """
import json, sys, torch
folder, *names = sys.argv[1:]
sys.path.insert(0, folder)
torch.cuda.get_device_capability, torch.cuda.current_device = lambda *_: (8, 9), lambda: 0
if not hasattr(torch._C, "_CudaDeviceProperties"):
    torch._C._CudaDeviceProperties = object
import torch_tensorrt
from torch_tensorrt.dynamo import partitioning
from torch_tensorrt.dynamo.conversion import CompilationSettings
from torch_tensorrt.dynamo.conversion._ConverterRegistry import DYNAMO_CONVERTERS
from torch_tensorrt.dynamo.lowering import get_decompositions, post_lowering, pre_export_lowering
from xfm_fast.config import XFMConfig
from xfm_fast.export.graphs import build
from xfm_fast.export.pipeline import trace
from xfm_fast.tasks.nlvr2 import NLVR2Model
from xfm_fast.tasks.vqa_model import VQAModel
config, settings = XFMConfig.preset("tiny"), CompilationSettings(min_block_size=1)
DYNAMO_CONVERTERS.set_compilation_settings(settings)
vqa, nlvr2 = VQAModel(config, decoder_layers=2).eval(), NLVR2Model(config).eval()
parts, left = {}, {}
for name in names:
    program = trace(build(name, nlvr2 if name == "nlvr2" else vqa, "primitives"), "fp32", {})
    with torch.no_grad():
        program = pre_export_lowering(program, settings).run_decompositions(get_decompositions(False))
        divided, tester = partitioning.fast_partition(post_lowering(program.module(), settings), min_block_size=1)
    parts[name], left[name] = len([*divided.named_children()]), sorted(tester.unsupported_operators)
print("\\n" + json.dumps([torch._dynamo.list_backends(), parts, left]))
"""


def installed(variable: str, commands: str) -> Path:
    """Return the folder that a variable names, or skip the test with the commands that make one."""
    if not Path(os.environ.get(variable) or "/absent").is_dir():
        pytest.skip(f"{variable} names no folder; {commands}, then {variable}=DIR")
    return Path(os.environ[variable])


def run_script(script: str, *arguments: object, **variables: str) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | variables
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@contextlib.contextmanager
def triton_server(environment: Path, repository: Path, scratch: Path) -> Iterator[str]:
    """Run the server of nvidia-pytriton on a repository until all models are ready; yields its address."""
    site = environment / "lib" / f"python{PYTHON}" / "site-packages"
    stub = (
        site
        / "pytriton"
        / "tritonserver"
        / "python_backend_stubs"
        / PYTHON
        / "triton_python_backend_stub"
    )
    if not stub.is_file():
        pytest.skip(f"nvidia-pytriton in {environment} has no stub for Python {PYTHON}")
    # Behind the environment's own packages, whose NumPy is the older one.
    (site / "xfm_fast_tests.pth").write_text(f"{ROOT}\n{sysconfig.get_paths()['purelib']}\n")
    server, backends = site / "pytriton" / "tritonserver", scratch / "backends"
    shutil.copytree(server / "backends" / "python", backends / "python")
    shutil.copy(stub, backends / "python")
    libraries = f"{site / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = (
        f"--model-repository={repository} --backend-directory={backends} --http-address=127.0.0.1"
    )
    options += f" --http-port={port} --allow-grpc=false --allow-metrics=false"
    command = [server / "bin" / "tritonserver", *options.split()]
    path = {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "LD_LIBRARY_PATH": libraries}
    log = scratch / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=os.environ | path, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text(errors="replace")[-8000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(
                    f"http://127.0.0.1:{port}/v2/health/ready", timeout=5
                ).close()
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def ask(address: str, images: list[bytes], captions: list[str]) -> dict[str, Any]:
    """Send a request to the rank model, its texts in binary, and return its outputs, or `error`."""
    inputs, content = [], b""
    for name, values in {
        "images": images,
        "captions": [text.encode() for text in captions],
    }.items():
        binary = b"".join(struct.pack("<I", len(tensor)) + tensor for tensor in values)
        sizes = {"shape": [1, len(values)], "parameters": {"binary_data_size": len(binary)}}
        inputs.append({"name": name, "datatype": "BYTES", **sizes})
        content += binary
    head = json.dumps({"inputs": inputs}).encode()
    headers = {
        "Inference-Header-Content-Length": str(len(head)),
        "Content-Type": "application/octet-stream",
    }
    request = urllib.request.Request(f"{address}/v2/models/xfm_rank/infer", head + content, headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            outputs = json.load(response)["outputs"]
    except urllib.error.HTTPError as error:
        return json.load(error)
    return {
        tensor["name"]: np.array(tensor["data"]).reshape(tensor["shape"])[0] for tensor in outputs
    }


def test_the_real_triton_server(exported_fp32: Path, small_model: XFM, tmp_path: Path) -> None:
    commands = "python -m venv DIR && DIR/bin/pip install 'numpy<2' nvidia-pytriton"
    environment = installed("XFM_FAST_TRITON_ENV", commands)
    tokenizer = CaptionTokenizer.train_on_texts(
        [pre_caption(text) for text in CAPTIONS], small_model.config.vocab_size
    )
    repository = tmp_path / "models"
    write_model_repository(
        exported_fp32, repository, RepositoryOptions(device="cpu"), tokenizer=tokenizer
    )
    for graph in repository.glob("*/1/*.onnx"):
        graph.with_name("model.py").write_text(ONNX_MODEL)
        config = graph.parents[1] / "config.pbtxt"
        lines = (
            config.read_text()
            .replace('platform: "onnxruntime_onnx"', 'backend: "python"')
            .splitlines()
        )
        config.write_text(
            "\n".join(line for line in lines if not line.startswith("default_model_filename"))
        )
    with triton_server(environment, repository, tmp_path) as address:
        images = [photo(1), photo(2, width=9)]
        answer = ask(address, images, CAPTIONS)
        expected = eager_scores(small_model, tokenizer, images, CAPTIONS)
        np.testing.assert_allclose(answer["scores"], expected, rtol=0, atol=1e-4)
        assert "image 0" in ask(address, [b"no photograph"], CAPTIONS)["error"]
        assert ask(address, images[:1], CAPTIONS[:1])["reused"].tolist() == [True]


def test_the_real_module_of_tensorrt(exported_fp32: Path, tmp_path: Path) -> None:
    bindings = installed(
        "XFM_FAST_TENSORRT", "pip install --no-deps --target DIR tensorrt-cu13-bindings"
    )
    rtx = pytest.importorskip(
        "tensorrt_rtx_libs", reason="the bindings are loaded over TensorRT for RTX"
    )
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("one function that TensorRT for RTX lacks is compiled by a C compiler")
    (metadata,) = bindings.glob("tensorrt_cu*_bindings-*.dist-info")
    major = metadata.name.split("-")[1].split(".")[0]
    libraries = Path(rtx.__path__[0])
    for name, library in {
        "nvinfer": "tensorrt_rtx",
        "nvonnxparser": "tensorrt_onnxparser_rtx",
    }.items():
        (tmp_path / f"lib{name}.so.{major}").symlink_to(next(libraries.glob(f"lib{library}.so.*")))
    plugins = tmp_path / f"libnvinfer_plugin.so.{major}"
    source = b"_Bool initLibNvInferPlugins(void *logger, const char *space) { return 1; }"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-xc", "-", "-o", plugins], input=source, check=True
    )
    (tmp_path / "engines").mkdir()
    run_script(
        TENSORRT,
        bindings,
        exported_fp32,
        tmp_path / "engines",
        LD_LIBRARY_PATH=f"{tmp_path}:{libraries}",
    )


def test_the_partition_of_torch_tensorrt(tmp_path: Path) -> None:
    """Check that all operators go into engines but the running sum of positions, which later versions take too."""
    version = torch.__version__.partition("+")[0]
    command = f"pip install --no-deps --target DIR torch-tensorrt-rtx=={version} dllist"
    folder = installed("XFM_FAST_TORCH_TENSORRT", command)
    pytest.importorskip("tensorrt_rtx", reason="the package looks at its version")
    # Without its libraries, which are linked to CUDA, the package is Python alone.
    shutil.copytree(
        folder, tmp_path / "package", ignore=shutil.ignore_patterns("libtorchtrt*", "_C.*")
    )
    graphs = ("vision", "text", "image_memory", "fusion", "nlvr2", "decoder_memory", "decoder_step")
    backends, parts, left = json.loads(
        run_script(TORCH_TENSORRT, tmp_path / "package", *graphs).splitlines()[-1]
    )
    assert "tensorrt" in backends
    summed = left.pop("text")
    assert summed in ([], ["torch.ops.aten.cumsum.default"])
    assert not any(left.values()), left
    assert parts == dict.fromkeys(graphs, 1) | {"text": 3 if summed else 1}
