"""What several test files share: the small checkpoints in tests/data, and where the bigger ones may be."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, cast

import hypothesis
import numpy as np
import pytest

from mlx_gptoss.backends import find_backend, has_nvidia_driver
from mlx_gptoss.errors import BackendUnavailable

if not has_nvidia_driver():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: its kernels then run on the CPU

# An M5 multiplies float32 in TF32 by default, with errors of 1e-3. MLX reads this at its first product.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

os.environ["MLX_GPTOSS_CONFIG"] = ""  # a developer's own defaults do not count
os.environ.pop("MLX_GPTOSS_MODEL", None)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in background jobs and xdist's workers; children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine takes longer for an example, which is no failure.
hypothesis.settings.register_profile(
    "any-speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any-speed")

DATA = Path(__file__).parent / "data"
DEVICE = os.environ.get("MLX_GPTOSS_TEST_DEVICE", "cpu")  # "gpu" runs tests/backends and tests/golden on a Mac's GPU
SHARED = Path(__file__).parents[1] / ".." / "shared"
QUICK = (  # the tests of `-m quick`, by the beginning of their ids: every package, under a minute in all
    "tests/adapters/test_peft.py::test_rows_without_an_adapter_are_as_before[mlx]",
    "tests/test_tokenizer.py",
    "tests/test_config.py",
    "tests/test_sampling.py",
    "tests/options/",
    "tests/backends/test_mlx_devices.py",
    "tests/backends/test_rope.py",
    "tests/backends/test_torch_layers.py",
    "tests/calibration/test_moments.py",
    "tests/chat/test_reply.py",
    "tests/cli/test_commands.py::test_errors_are_one_line",
    "tests/clients/test_requests.py",
    "tests/engine/test_lookup.py",
    "tests/engine/test_scheduler.py",
    "tests/golden/test_reference_logits.py::test_logits_match_the_reference[",
    "tests/harmony/test_messages.py",
    "tests/harmony/test_render.py",
    "tests/harmony/test_typescript.py",
    "tests/kernels/test_sample.py",
    "tests/loading/test_memory.py",
    "tests/measure/test_benchmark.py::test_bytes_of_a_step",
    "tests/ranks/test_launch.py::test_ranks_that_would_compute_differently_are_rejected",
    "tests/ranks/test_launch.py::test_mlx_launch",
    "tests/server/test_completions.py",
    "tests/server/test_store.py",
    "tests/server/anthropic/test_tokens.py::test_transport_lines",
    "tests/server/ollama/test_generate.py::test_generate_refuses",
    "tests/server/hosted/test_items.py",
    "tests/server/hosted/test_settings.py",
    "tests/weights/test_codecs.py",
    "tests/weights/formats/test_gguf_reading.py",
)
STDERR = pytest.StashKey[int]()  # descriptor of the real stderr, duplicated while pytest does not capture it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("hang_s", "seconds after which a test fails with the stacks of all threads", default="1800")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(QUICK):
            item.add_marker(pytest.mark.quick)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[STDERR])


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Restores how SIGINT and SIGTERM are handled: a rank ignores them, and so would the processes of later tests."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in before:
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_hang(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that hangs prints the stack of every thread and fails, and the run goes on.

    If the main thread does not come back to Python for the signal, the process ends after as long again, with the
    stacks printed. Tests marked slow or benchmark have no limit.
    """
    stderr, seconds = request.config.stash[STDERR], float(request.config.getini("hang_s"))
    if any(request.node.get_closest_marker(name) for name in ("slow", "benchmark", "cuda")):
        yield
        return

    def fail(_number: int, _frame: FrameType | None) -> None:
        faulthandler.dump_traceback(stderr)
        pytest.fail(f"no end after {seconds:g} seconds; stderr has the stacks of all threads")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # again, should the clean-up hang, too
    faulthandler.dump_traceback_later(2 * seconds, exit=True, file=stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def mini() -> Path:
    """Tiny checkpoints that the reference tools wrote, with their reference logits beside them."""
    return DATA / "mini"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Files that are too big for the repository; tests that need one skip where it is absent."""
    return SHARED


@pytest.fixture(scope="session")
def device_of() -> Callable[[str], str]:
    """The device that a backend is tested on, by its name."""
    return lambda backend: DEVICE if backend == "mlx" else "cpu"


@pytest.fixture(scope="session")
def backend_module():
    """A backend's module by its name; the test skips where that cannot be imported."""

    def find(name: str) -> ModuleType:
        try:
            return cast(ModuleType, find_backend(name)[0])
        except BackendUnavailable as error:
            pytest.skip(str(error))

    return find


@pytest.fixture(scope="session")
def relative_error():
    """Largest error over each position's vocabulary, relative to the position's largest logit; the worst position."""

    def worst(got: np.ndarray, wanted: np.ndarray) -> float:
        return float((np.abs(got - wanted).max(axis=-1) / np.abs(wanted).max(axis=-1)).max())

    return worst


@pytest.fixture(scope="session")
def weather_tool() -> dict[str, Any]:
    """The function that the bundled model was trained to call, in the format of chat completions."""
    parameters = {
        "type": "object",
        "properties": {"location": {"type": "string", "description": "City name"}},
        "required": ["location"],
    }
    function = {"name": "get_weather", "description": "Get the current weather.", "parameters": parameters}
    return {"type": "function", "function": function}
