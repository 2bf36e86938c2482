"""The command line as a user types it: real processes, exit codes, and what goes to which stream."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from mlx_gptoss_cli.main import main

CLI = [sys.executable, "-m", "mlx_gptoss_cli"]


@pytest.fixture
def run(mini):
    def run(*words, stdin=None):
        words = [str(mini / "mxfp4") if w == "MINI" else str(w) for w in words]
        return subprocess.run([*CLI, *words], input=stdin, capture_output=True, text=True, timeout=300)

    return run


@pytest.mark.parametrize("command", ["generate", "chat", "convert", "serve", "batch", "show"])
def test_every_command_has_help_and_imports_nothing_heavy_for_it(command):
    code = (
        "import sys; sys.argv = ['mlx-gptoss', sys.argv[1], '--help']\n"
        "from mlx_gptoss_cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('numpy', 'mlx.core', 'rich', 'tokenizers', 'huggingface_hub') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, check=True)
    assert out.stdout.startswith("Usage:") and out.stdout.rstrip().endswith("[]")


def test_quantizing_while_loading(run):
    words = ["generate", "Hi", "--model", "MINI", "--raw", "--max-tokens", 3, "--json"]
    done = run(*words, "--quantize", "rest-4bit")
    assert json.loads(done.stdout)["format"] == "rest-4bit"
    wrong = run(*words, "--quantize", "int3")
    assert wrong.returncode == 1 and "rest-8bit" in wrong.stderr


def test_generate_streams_text_to_stdout_and_stats_to_stderr(run):
    out = run("generate", "Hi", "--model", "MINI", "--seed", 1, "--max-tokens", 12, "--raw", "--stats")
    assert out.returncode == 0
    assert out.stdout.strip()
    assert "tok/s" in out.stderr and "tok/s" not in out.stdout


def test_stats_count_accepted_drafts(run):
    words = ("generate", "What is 12 + 30?", "--temperature", 0, "--backend", "mlx", "--stats")
    plain, fast = run(*words), run(*words, "--speculate")
    assert fast.stdout == plain.stdout
    assert "drafts accepted" in fast.stderr and "drafts" not in plain.stderr


def test_generate_json_is_one_object_with_the_promised_fields(run):
    out = run("generate", "-", "--model", "MINI", "--seed", 1, "--max-tokens", 12, "--json", stdin="Hi")
    report = json.loads(out.stdout)
    assert set(report) == {
        "text", "reasoning", "tool_calls", "finish_reason", "ids", "usage", "timings", "model", "backend", "format",
    }  # fmt: skip
    assert set(report["usage"]) == {"prompt_tokens", "completion_tokens", "cached_tokens"}
    assert set(report["timings"]) == {
        "load_s", "ttft_s", "prefill_tok_s", "decode_tok_s", "peak_memory_bytes",
    }  # fmt: skip
    assert (report["finish_reason"], report["backend"], report["format"]) == ("length", "mlx", "mxfp4")
    assert len(report["ids"]) == 12


def test_a_seed_reproduces(run):
    words = ("generate", "Hi", "--model", "MINI", "--seed", 3, "--max-tokens", 20, "--raw")
    assert run(*words).stdout == run(*words).stdout


def test_show_json_has_the_promised_fields(run):
    report = json.loads(run("show", "MINI", "--json", "--context", 4096).stdout)
    assert {"format", "parameters", "size_bytes", "bits_per_weight", "roles", "memory"} <= set(report)
    assert set(report["roles"]) == {"attention", "experts", "router", "embed", "lm_head"}
    memory = report["memory"]
    assert memory["needed_bytes"] == (
        memory["weights_bytes"] + 4096 * memory["kv_bytes_per_token"] + memory["ring_bytes"] + memory["working_bytes"]
    )
    assert memory["fits"] is True
    assert "fits" in run("show", "MINI").stdout


def test_show_ranks(run):
    """The shares of two ranks, of two KV heads and six experts."""
    report = json.loads(run("show", "MINI", "--json", "--context", 4096, "--ranks", 2).stdout)
    assert [(part["rank"], part["kv_heads"], part["experts"]) for part in report["ranks"]] == [(0, 1, 3), (1, 1, 3)]
    whole, part = report["memory"], report["ranks"][1]["memory"]
    assert part["kv_bytes_per_token"] * 2 == whole["kv_bytes_per_token"]
    assert whole["weights_bytes"] / 2 < part["weights_bytes"] < 0.8 * whole["weights_bytes"]
    assert "KV heads" in run("show", "MINI", "--ranks", 2).stdout


def test_convert_then_generate(run, tmp_path):
    out = run("convert", "MINI", tmp_path / "q", "--to", "mlx-4bit")
    assert out.returncode == 0 and "mlx-4bit" in out.stdout
    again = run("convert", "MINI", tmp_path / "q", "--to", "mlx-8bit")
    assert again.returncode == 1 and "overwrite" in again.stderr
    assert run("convert", "MINI", tmp_path / "q", "--to", "mlx-8bit", "--overwrite").returncode == 0
    report = json.loads(run("generate", "x", "--model", tmp_path / "q", "--max-tokens", 2, "--json").stdout)
    assert report["format"] == "mlx-8bit"


def test_convert_calibrated(run, tmp_path):
    """--calibrate says what it needs first, and takes a file or none. With none it stands last or before an option."""
    (tmp_path / "text.txt").write_text("One and two are three. " * 20)
    words = ("--calibrate", tmp_path / "text.txt", "--device", "cpu")
    out = run("convert", "MINI", tmp_path / "q", "--to", "mlx-4bit", *words)
    assert out.returncode == 0, out.stderr
    says = r"calibrating on \d+ tokens, with numpy on the CPU; needs at most \d+ MB of memory and \d+"
    assert re.match(says, out.stderr)
    assert out.stdout.startswith("mxfp4 -> mlx-4bit:")
    wrong = run("convert", "MINI", tmp_path / "r", "--to", "nvfp4", "--calibrate")
    assert wrong.returncode == 1 and "nvfp4 is not calibrated" in wrong.stderr
    small = run("convert", "MINI", tmp_path / "r", "--to", "mlx-4bit", "--calibrate", "--memory", 0.1, "--context", 99)
    assert small.returncode == 1 and "0.1 GB of memory with 99 tokens of context are 0 GB of weights" in small.stderr
    alone = run("convert", "MINI", tmp_path / "r", "--to", "mlx-4bit", "--memory", 11)
    assert alone.returncode == 2 and "--calibrate" in alone.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("generate", "x", "--model", "./nowhere"), "nowhere"),
        (("generate", "x", "--model", "MINI", "--temperature", "9"), "temperature"),
        (("generate", "x", "--model", "MINI", "--backend", "abacus"), "backend"),
        (("generate", "x", "--model", "MINI", "--max-context", "4"), "context"),
        (("show", "./nowhere"), "nowhere"),
        (("convert", "MINI", "out", "--to", "mlx-7bit"), "mlx-7bit"),
    ],
)
def test_errors_are_one_line_and_exit_with_1(run, words, message):
    out = run(*words)
    assert out.returncode == 1
    lines = out.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


@pytest.mark.parametrize(
    "words",
    [("generate", ""), ("generate", "x", "--max-tokens", "0"), ("generate", "--no-such"), ("nonsense",), ("convert",)],
)
def test_usage_errors_exit_with_2(run, words):
    out = run(*words, stdin="")
    assert out.returncode == 2
    assert "Usage:" in out.stderr


def test_ctrl_c_keeps_the_text_so_far(mini):
    words = ["generate", "x", "--model", str(mini / "mxfp4"), "--raw", "--temperature", "0", "--max-context", "100000"]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([*CLI, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _rest, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert first and b"Traceback" not in errors


def test_ctrl_c_while_an_error_is_printed(monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["mlx-gptoss", "show", "./nowhere"])
    monkeypatch.setattr("click.echo", interrupted)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130


def test_a_closed_stdout_gives_no_traceback(mini):
    words = ["generate", "x", "--model", str(mini / "mxfp4"), "--raw", "--temperature", "0"]
    process = subprocess.Popen([*CLI, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=300) != 0
    assert b"Traceback" not in errors


def test_chat_holds_a_conversation(run):
    lines = "/help\nHi\n/stats\nAnd again\n/reasoning low\n/system Be brief.\n/nonsense\n/reset\n/quit\n"
    out = run("chat", "--model", "MINI", "--seed", 1, "--max-tokens", 8, stdin=lines)
    assert out.returncode == 0, out.stderr
    assert "/reset" in out.stderr and "no such command: /nonsense" in out.stderr
    assert out.stderr.count("first token after") == 1


WEATHER = '''
def get_weather(location: str) -> dict:
    """Get the current weather."""
    return {"temperature": 18, "condition": "sunny"}
'''


def test_chat_and_generate_call_the_functions_of_a_file(run, tmp_path):
    (tmp_path / "weather.py").write_text(WEATHER)
    question, offered = "What is the weather in Paris?", ("--tool", tmp_path / "weather.py", "--temperature", 0)
    for out in (run("generate", question, *offered), run("chat", *offered, stdin=f"{question}\n")):
        assert out.returncode == 0, out.stderr
        assert out.stdout == "It is 18 degrees and sunny in Paris.\n"
        assert 'get_weather({"location": "Paris"})\n{"temperature": 18, "condition": "sunny"}\n' in out.stderr
        assert "the model may call get_weather" in out.stderr
    report = json.loads(run("generate", question, *offered, "--json").stdout)
    assert [call["name"] for call in report["tool_calls"]] == ["get_weather"]
    assert (report["finish_reason"], report["text"]) == ("stop", "It is 18 degrees and sunny in Paris.")
    (tmp_path / "weather.py").write_text("def f(x): ...")
    wrong = run("generate", question, *offered)
    assert wrong.returncode == 1 and "no type hint" in wrong.stderr
    assert run("generate", question, *offered, "--raw").returncode == 2
