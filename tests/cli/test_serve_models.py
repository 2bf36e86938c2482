"""`mlx-gptoss serve` with several models, in processes as users start them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import psutil
import pytest

from mlx_gptoss.loading.plan import NANO

SUM = [{"role": "user", "content": "What is 12 + 30?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    for name in ("alpha", "beta"):
        shutil.copytree(NANO, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@contextmanager
def serve(*options, **env):
    """A server process and its URL, once it answers."""
    words = [
        sys.executable,
        "-m",
        "mlx_gptoss_cli",
        "serve",
        "--port",
        "0",
        "--max-context",
        "1024",
        *map(str, options),
    ]
    running = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env={**os.environ, **env})
    try:
        line = running.stderr.readline()
        assert " at http" in line, line + running.stderr.read()
        url = line.split(" at ")[1].split(",")[0]
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                httpx.get(url + "/health", timeout=60).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.02)
        yield running, url
    finally:
        running.kill()
        running.wait()
        running.stderr.close()


def names(url):
    return [model["id"] for model in httpx.get(url + "/v1/models", timeout=60).json()["data"]]


def model_of_answer(url, name):
    body = {"model": name, "messages": SUM, "max_tokens": 5}
    answer = httpx.post(url + "/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["model"]


def test_several_models_and_their_end(folder):
    with serve("--model", folder / "alpha", "--model", folder / "beta", "--alias", f"gpt={folder / 'beta'}") as (
        running,
        url,
    ):
        assert names(url) == ["alpha", "beta", "gpt"]
        assert [model_of_answer(url, name) for name in ("alpha", "gpt", str(folder / "beta"))] == [
            "alpha",
            "beta",
            "beta",
        ]
        children = psutil.Process(running.pid).children()
        assert len(children) == 2
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 130
        assert not psutil.wait_procs(children, timeout=60)[1]


def test_a_killed_server_leaves_no_process(folder):
    with serve("--model", folder / "alpha", "--idle-unload", "600") as (running, url):
        assert model_of_answer(url, "alpha") == "alpha"
        children = psutil.Process(running.pid).children()
        assert len(children) == 1
        running.kill()
        running.wait()
        assert not psutil.wait_procs(children, timeout=60)[1]


def test_without_a_model_all_of_this_machine(folder, tmp_path):
    env = {"MLX_GPTOSS_HOME": str(folder), "HF_HUB_CACHE": str(tmp_path / "none")}
    with serve(**env) as (_, url):
        assert names(url) == ["mlx-gptoss-nano", "alpha", "beta"]
        assert [model_of_answer(url, name) for name in ("nano", "beta")] == ["mlx-gptoss-nano", "beta"]


def test_the_variable_names_several_models(folder):
    value = os.pathsep.join([str(folder / "alpha"), "nano"])
    with serve(MLX_GPTOSS_MODEL=value) as (_, url):
        assert names(url) == ["alpha", "mlx-gptoss-nano"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nano", "--model", "./nowhere"], "./nowhere"),
        (["--model", "nano", "--idle-unload", "0"], "idle-unload"),
        (["--model", "nano", "--model", "nano"], "twice"),
        (["--model", "nano", "--idle-unload", "9", "--alias", "a=b"], "--alias"),
    ],
)
def test_wrong_options_are_told_before_anything_is_loaded(options, message):
    words = [sys.executable, "-m", "mlx_gptoss_cli", "serve", "--port", "0", *options]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert ended.returncode in (1, 2) and message in ended.stderr and "Traceback" not in ended.stderr
