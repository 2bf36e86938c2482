"""api.load() with the torch backend: the choice of auto, and the error if torch is missing."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time

import pytest

import mlx_gptoss
from mlx_gptoss import Sampling, backends
from mlx_gptoss.backends.base import Limits

GREEDY = Sampling(temperature=0)


@pytest.fixture
def torch_backend(backend_module):
    return backend_module("cuda")


def python(code: str, *words: str) -> str:
    out = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    return out.stdout.strip()


def test_the_bundled_model_says_the_same_on_both(torch_backend, backend_module):
    backend_module("mlx")
    prompts = ["Sort these numbers: 3 1 2", "Hello"]
    said = []
    for backend in ("mlx", "cuda"):
        with mlx_gptoss.load(backend=backend, device="cpu", max_context=1024) as model:
            assert model.backend == backend
            said.append([model.generate(prompt, sampling=GREEDY, max_tokens=40).ids for prompt in prompts])
    assert said[0] == said[1]


def test_a_cpu_is_the_reference(torch_backend, mini, caplog):
    """Who asks for PyTorch on a CPU learns that it is no fast path: from the log and from `show`."""
    caplog.set_level("INFO", "mlx_gptoss")
    mlx_gptoss.load(mini / "mxfp4", backend="cuda", device="cpu", max_context=64).close()
    assert "--backend mlx is the fast one" in caplog.text
    assert torch_backend.cpu_products("cpu", None) == "reference"
    shown = python(
        "import sys; from mlx_gptoss_cli.main import main; sys.argv[0] = 'mlx-gptoss'; main()",
        *("show", str(mini / "mxfp4"), "--backend", "cuda", "--device", "cpu"),
    )
    assert "Products on this CPU: by PyTorch, as the reference of the CUDA kernels" in shown


def test_seeds_and_memory_through_the_api(torch_backend, mini):
    with mlx_gptoss.load(mini / "mxfp4", backend="cuda", device="cpu", max_context=256, slots=2) as model:
        texts = [model.complete((1, 2, 3), max_tokens=20, sampling=Sampling(seed=5)).ids for _ in range(2)]
        other = model.complete((1, 2, 3), max_tokens=20, sampling=Sampling(seed=6)).ids
        assert texts[0] == texts[1] != other
        assert model.peak_memory() > 1 << 20


def test_a_closed_model_leaves_no_threads(torch_backend, mini):
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = mlx_gptoss.load(mini / "mxfp4", backend="cuda", device="cpu", max_context=64)
        assert len(crew()) == 2
        model.close()
        deadline = time.monotonic() + 60
        while crew() and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.01)
        assert not crew()
    finally:
        torch.set_num_threads(before)


def crew() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("gptoss-product")]


def test_quantized_while_loading(torch_backend, mini, relative_error):
    logits = []
    for backend in ("mlx", "cuda"):
        with mlx_gptoss.load(mini / "mxfp4", backend=backend, device="cpu", quantize="mlx-4bit") as model:
            logits.append(model.logits(range(50)))
    assert relative_error(logits[1], logits[0]) < 1e-4


def test_auto_takes_the_gpu_that_torch_finds(torch_backend, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(backends, "DRIVER_LIBRARIES", ("nothing.so", "libc.so.6"))  # a library that is there
    monkeypatch.setattr(torch_backend, "has_gpu", lambda: True)
    assert backends.best_backend() == "cuda"
    monkeypatch.setattr(torch_backend, "has_gpu", lambda: False)  # a torch built for CPUs
    assert backends.best_backend() == "mlx"


@pytest.mark.parametrize("platform", ["darwin", "linux"])
@pytest.mark.parametrize("torch", [True, False])
def test_auto_without_an_nvidia_driver(monkeypatch, platform, torch):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(backends, "DRIVER_LIBRARIES", ("nothing.so",))
    monkeypatch.setattr(backends, "find_spec", lambda name: name if torch else None)
    monkeypatch.setattr(backends, "_backend_module", lambda name: pytest.fail("torch was imported"))
    assert backends.best_backend() == "mlx"


def test_auto_does_not_import_torch_for_a_cpu():
    code = (
        "import sys; from mlx_gptoss import backends\n"
        "backends.DRIVER_LIBRARIES = ('nothing.so',)\n"
        "print(backends.find_backend('auto')[1], 'torch' in sys.modules)"
    )
    assert python(code) == "mlx False"


def test_without_torch_the_extra_is_named():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import mlx_gptoss\n"
        "try: mlx_gptoss.load(backend='cuda')\n"
        "except mlx_gptoss.GptOssError as error: print(type(error).__name__, error)"
    )
    said = python(code)
    assert said.startswith("BackendUnavailable") and "pip install 'mlx-gptoss[cuda]'" in said


@pytest.mark.cuda
def test_the_gpu_agrees_with_the_cpu(torch_backend, mini, relative_error):
    """With float32 on both. In bfloat16 the default device is the GPU."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    logits = []
    for device in ("cpu", "cuda"):
        with mlx_gptoss.load(mini / "mxfp4", backend="cuda", device=device, dtype="float32") as model:
            logits.append(model.logits(range(200)))
    assert relative_error(logits[1], logits[0]) < 1e-4
    runner = torch_backend.load(
        mlx_gptoss.api.open_checkpoint(mini / "mxfp4"), device=None, dtype=None, limits=Limits(1, 64, 64)
    )
    assert runner.peak_memory() > 0 and torch_backend.dtype_name(None, None) == "bfloat16"
