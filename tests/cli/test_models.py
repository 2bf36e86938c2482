"""list, pull, rm and ps, over real HTTP: a small hub on loopback, and a running server."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlx_gptoss_cli.ps import _counts
from serving import serving
from small_hub import small_hub

import mlx_gptoss
from mlx_gptoss.loading.plan import NANO

CLI = [sys.executable, "-m", "mlx_gptoss_cli"]
LARGE = "model-00001-of-00002.safetensors"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def files_of_nano() -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in NANO.iterdir() if path.suffix in (".json", ".safetensors")}
    return {**files, "README.md": b"# A model", "original/model.safetensors": b"the same weights"}


@pytest.fixture
def hub():
    with small_hub({}) as running:
        yield running


@pytest.fixture(scope="module")
def base_url():
    """The address of a running server."""
    with mlx_gptoss.load(slots=2, max_context=2048) as model, serving(model) as server:
        yield server.url


@pytest.fixture
def environment(hub, tmp_path):
    """The environment of a command that knows only the small hub and an empty cache."""
    hub.repos["org/nano"] = files_of_nano()
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "MLX_GPTOSS"))}
    settings = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "MLX_GPTOSS_CONFIG": "",
    }  # fmt: skip
    return {**clean, **settings}


@pytest.fixture
def run(environment) -> Run:
    def run(*words, stdin="", **variables):
        return subprocess.run(
            [*CLI, *map(str, words)], input=stdin, env={**environment, **variables}, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip

    return run


def cache(tmp_path: Path) -> Path:
    return tmp_path / "hf/hub"


def test_pull_list_generate_rm(run, hub, tmp_path):
    pulled = run("pull", "org/nano")
    assert pulled.returncode == 0, pulled.stderr
    assert "org/nano: 2.8 MB to download, 4 of 4 files" in pulled.stderr
    folder = Path(pulled.stdout.strip())
    assert {path.name for path in folder.iterdir()} == files_of_nano().keys() - {
        "README.md",
        "original/model.safetensors",
    }
    used = time.time() - 3 * 86400 - 60
    os.utime((folder / "tokenizer.json").resolve(), (used, used))
    listed = {model["name"]: model for model in json.loads(run("list", "--json").stdout)["models"]}
    assert list(listed) == ["nano", "org/nano"]
    model = listed["org/nano"]
    assert (model["format"], model["place"], model["fits"]) == ("mxfp4", "cache", True)
    assert model["size_bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert model["last_used"] == int(used) and model["needed_bytes"] < model["available_bytes"]
    table = run("list").stdout
    assert "org/nano" in table and "3 days ago" in table and "fits" in table

    answer = run("generate", "What is 12 + 30?", "-m", "org/nano", "-t", "0", "--json")
    assert "42" in json.loads(answer.stdout)["text"], answer.stderr

    asked = run("rm", "org/nano")
    assert asked.returncode == 2 and "--yes" in asked.stderr and folder.exists()
    removed = run("rm", "org/nano", "--yes")
    assert removed.returncode == 0 and "Removed org/nano, 2.8 MB" in removed.stdout
    assert not folder.exists() and not list(cache(tmp_path).glob("models--*"))
    again = run("rm", "org/nano", "--yes")
    assert again.returncode == 1 and "is not in the cache" in again.stderr


def test_pull_again_only_checks(run, hub):
    assert run("pull", "org/nano").returncode == 0
    hub.log.clear()
    again = run("pull", "org/nano")
    assert again.returncode == 0 and "are here; checking them" in again.stderr and hub.fetched() == []


def test_pull_continues_after_kill_9(run, environment, hub, tmp_path):
    """The connection of a file stalls, the process is killed, and the next one asks for the rest only."""
    large = os.urandom(24 << 20)
    hub.repos["org/large"] = {**files_of_nano(), LARGE: large}
    del hub.repos["org/large"]["model.safetensors"]
    hub.stalls[LARGE] = 21 << 20
    process = subprocess.Popen([*CLI, "pull", "org/large"], env=environment, stderr=subprocess.DEVNULL)
    begun = lambda: list(cache(tmp_path).glob("models--org--large/blobs/*.incomplete"))  # noqa: E731
    until = time.monotonic() + 120
    while not any(path.stat().st_size >= 20 << 20 for path in begun()):  # the client writes pieces of 10 MiB
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = begun()[0].stat().st_size
    hub.stalls.clear()
    hub.log.clear()
    done = run("pull", "org/large")
    assert done.returncode == 0, done.stderr
    assert "are here" in done.stderr
    assert f"{LARGE} bytes={kept}-" in hub.fetched() and LARGE not in hub.fetched()
    assert (Path(done.stdout.strip()) / LARGE).read_bytes() == large and not begun()


def test_pull_notices_a_file_that_differs(run, hub):
    folder = Path(run("pull", "org/nano").stdout.strip())
    blob = (folder / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    wrong = run("pull", "org/nano")
    assert wrong.returncode == 1 and "model.safetensors did not arrive as the hub has it" in wrong.stderr
    assert not blob.exists()
    assert run("pull", "org/nano").returncode == 0 and blob.read_bytes() == files_of_nano()["model.safetensors"]


def test_pull_refuses(run, hub):
    assert "nothing to download" in run("pull", "nano").stdout
    for name, message in (("org/nothing", "no such model"), ("nonsense", "not a hub id"), ("./x", "not a hub id")):
        done = run("pull", name)
        assert done.returncode == 1 and message in done.stderr and done.stderr.startswith("error: "), done.stderr
    hub.repos["org/gguf"] = {"a-q4.gguf": b"GGUF", "config.json": b"{}"}
    assert "only GGUF files" in run("pull", "org/gguf").stderr
    dry = run("pull", "org/nano", "--dry-run")
    assert dry.returncode == 0 and "2.8 MB to download" in dry.stderr and hub.fetched() == []


def test_rm_touches_nothing_outside_the_cache(run, tmp_path):
    outside = tmp_path / "outside"
    shutil.copytree(NANO, outside)
    cache(tmp_path).mkdir(parents=True)
    (cache(tmp_path) / "models--org--linked").symlink_to(outside, target_is_directory=True)
    for name in (outside, "org/linked", "../outside", "nano", "org/../../outside", f"org/nano@{'0' * 40}", "./x/y"):
        done = run("rm", name, "--yes")
        assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, name
    assert (outside / "model.safetensors").exists()


def test_rm_asks_on_a_terminal(run, environment, tmp_path):
    pulled = run("pull", "org/nano")
    assert pulled.returncode == 0, pulled.stderr
    folder = Path(pulled.stdout.strip())
    for reply, code in ((b"n\n", 1), (b"y\n", 0)):
        child, terminal = pty.fork()
        if child == 0:
            os.execve(sys.executable, [*CLI, "rm", "org/nano"], environment)
        os.write(terminal, reply)
        shown = b""
        try:
            while piece := os.read(terminal, 4096):
                shown += piece
        except OSError:  # the other side has closed it
            pass
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code and b"Remove org/nano" in shown
        os.close(terminal)
        assert folder.exists() == (code == 1)


def test_models_of_a_folder_by_name(run, tmp_path):
    shutil.copytree(NANO, tmp_path / "home/mine")
    home = {"MLX_GPTOSS_HOME": str(tmp_path / "home")}
    listed = json.loads(run("list", "--json", **home).stdout)["models"]
    assert [model["name"] for model in listed] == ["nano", "mine"] and listed[1]["place"] == "folder"
    shown = json.loads(run("show", "mine", "--json", **home).stdout)
    assert shown["format"] == "mxfp4"
    assert "42" in run("generate", "What is 12 + 30?", "-m", "mine", "-t", "0", **home).stdout


def test_nano_is_a_name_everywhere(run, tmp_path):
    (tmp_path / "text.txt").write_text("What is 12 + 30? " * 20)
    commands = [
        ["generate", "Hi", "-m", "nano", "--max-tokens", "2"],
        ["chat", "-m", "nano"],
        ["convert", "nano", tmp_path / "out", "--to", "mlx-4bit"],
        ["show", "nano"],
        ["bench", "-m", "nano", "--prompt", "8", "--generate", "2", "--repeat", "1"],
        ["eval", "nano", "--against", "nano", "--text", tmp_path / "text.txt", "--max-tokens", "32"],
    ]
    for words in commands:
        done = run(*words)
        assert done.returncode == 0, (words, done.stderr)


def test_ps_of_a_server(run, base_url):
    done = run("ps", "--url", base_url, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["status"] == "ok" and report["load"]["running"] == 0
    assert report["models"][0]["state"] == "loaded" and report["models"][0]["memory_bytes"] > 0
    host, port = base_url.removeprefix("http://").split(":")
    table = run("ps", MLX_GPTOSS_HOST=host, MLX_GPTOSS_PORT=port)
    assert table.returncode == 0 and "loaded" in table.stdout and "0 requests running" in table.stdout


def test_ps_without_a_server(run, hub):
    done = run("ps", MLX_GPTOSS_PORT="9")
    assert done.returncode == 1 and "no server answers at http://127.0.0.1:9" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "not as a server of mlx-gptoss does" in run("ps", "--url", hub.url).stderr
    assert run("ps", "--url", "ftp://x").returncode == 2


def test_counts_of_metrics():
    text = 'mlx_gptoss_running 2.0\nmlx_gptoss_prompt_tokens_total{model="a"} 5.0\nmlx_gptoss_prompt_tokens_total 7\n'
    counts = _counts(text + "mlx_gptoss_waiting NaN\nmlx_gptoss_completion_tokens_total inf\n\x00\n")
    assert counts == {"running": 2, "waiting": 0, "prompt_tokens": 12, "cached_tokens": 0, "completion_tokens": 0}
