"""The defaults of options: the config file, environment variables, and what comes before what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CLI = [sys.executable, "-m", "mlx_gptoss_cli"]


@pytest.fixture
def run(tmp_path, mini):
    """Runs a command with a config folder of its own. MINI is a checkpoint's path."""

    def run(*words, **variables):
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MLX_GPTOSS")}
        words = [str(mini / "mxfp4") if word == "MINI" else str(word) for word in words]
        environment = {**clean, "XDG_CONFIG_HOME": str(tmp_path), **variables}
        return subprocess.run([*CLI, *words], stdin=subprocess.DEVNULL, env=environment, capture_output=True, text=True)

    return run


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "mlx-gptoss/config.toml"


def model_of(run, *words, **variables) -> str:
    done = run("generate", "Hi", "--max-tokens", 1, "--json", *words, **variables)
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["model"])


def test_option_before_environment_before_file_before_nano(run, mini):
    assert model_of(run) == "the bundled model"
    assert run("config", "set", "model", "MINI").returncode == 0
    assert model_of(run) == str(mini / "mxfp4")
    other = str(mini / "mlx-4bit")
    assert model_of(run, MLX_GPTOSS_MODEL=other) == other
    assert model_of(run, MLX_GPTOSS_MODEL=f"{other}{os.pathsep}nano") == other  # several are for serve
    assert model_of(run, "-m", "nano", MLX_GPTOSS_MODEL=other) == "nano"
    shown = json.loads(run("show", "--json", MLX_GPTOSS_MODEL=other).stdout)
    assert shown["format"] == "mlx-4bit"
    assert json.loads(run("show", "--json").stdout)["format"] == "mxfp4"


def test_a_default_model_is_no_contradiction_to_synthetic_weights(run):
    words = ["bench", "--synthetic", "tiny", "--layers", 1, "--prompt", 8, "--generate", 2, "--repeat", 1, "--json"]
    assert run(*words, MLX_GPTOSS_MODEL="nano").returncode == 0
    assert run(*words, "--model", "nano").returncode == 2


def test_set_show_unset_path(run, file):
    assert run("config", "path").stdout.strip() == str(file)
    assert "nothing is set" in run("config").stderr
    file.parent.mkdir()
    file.write_text("# mine\nmodel = 'nano' # the small one\n")
    for key, value in (("temperature", "0.5"), ("serve.port", "9000"), ("max_context", "512"), ("speculate", "yes")):
        done = run("config", "set", key, value)
        assert done.returncode == 0, done.stderr
    text = file.read_text()
    assert text.startswith("# mine\n") and "# the small one" in text and "[serve]\nport = 9000" in text
    assert run("config", "show").stdout.splitlines() == [
        'model = "nano"', "temperature = 0.5", "max-context = 512", "speculate = true", "serve.port = 9000",
    ]  # fmt: skip
    settings = json.loads(run("config", "show", "--json").stdout)["settings"]
    assert settings["serve"] == {"port": 9000} and settings["speculate"] is True
    assert run("config", "unset", "serve.port").returncode == 0 and "serve" not in file.read_text()
    assert "is not set" in run("config", "unset", "serve.port").stderr


def test_settings_reach_their_commands(run):
    run("config", "set", "max-tokens", "3")
    run("config", "set", "generate.seed", "7")
    run("config", "set", "chat.max-tokens", "2")
    report = json.loads(run("generate", "Hi", "--json").stdout)
    assert report["usage"]["completion_tokens"] == 3
    run("config", "set", "system", "Be brief.")
    assert run("generate", "Hi", "--json").returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("modle", "nano"), "did you mean model"),
        (("serv.port", "1"), "did you mean serve"),
        (("serve.prot", "1"), "did you mean port"),
        (("serve.port", "x"), "not a valid integer"),
        (("json", "true"), "no setting 'json'"),
        (("temperature", "1", "2"), "takes one value"),
    ],
)
def test_what_cannot_be_set(run, file, words, message):
    done = run("config", "set", *words)
    assert done.returncode == 2 and message in done.stderr and not file.exists()


def test_a_broken_file(run, file):
    file.parent.mkdir()
    file.write_text("model = \n")
    done = run("generate", "Hi")
    assert done.returncode == 1 and f"the config file {file} is not TOML" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert run("generate", "--help").returncode == 0 and run("config", "path").returncode == 0
    file.write_bytes(b"\xff\xfe")
    assert "cannot be read" in run("generate", "Hi").stderr
    assert run("generate", "Hi", "--max-tokens", 1, MLX_GPTOSS_CONFIG="").returncode == 0


def test_a_path_is_kept_absolute(run, file, tmp_path, monkeypatch, mini):
    monkeypatch.chdir(mini)
    assert run("config", "set", "model", "./mxfp4").returncode == 0
    monkeypatch.chdir(tmp_path)
    assert model_of(run) == str(mini / "mxfp4")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("generat",), "did you mean generate"),
        (("lst",), "did you mean list"),
        (("run", "model"), "did you mean chat"),
        (("quantize",), "did you mean convert"),
        (("qqq",), "there are generate, chat"),
        (("generate", "--modle", "x"), "--model"),
        (("generate", "--tempreature", "0"), "--temperature"),
    ],
)
def test_wrong_words_suggest_the_right_ones(run, words, message):
    done = run(*words)
    assert done.returncode == 2 and message in done.stderr


def complete(run, line: str, shell: str = "bash") -> list[str]:
    words = line.split(" ")
    done = run(_MLX_GPTOSS_COMPLETE=f"{shell}_complete", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))  # fmt: skip
    return [entry.partition(",")[2] for entry in done.stdout.splitlines()]


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The command under the name by which shells complete it."""
    path = tmp_path / "bin/mlx-gptoss"
    path.parent.mkdir()
    path.write_text(f"#!{sys.executable}\nfrom mlx_gptoss_cli.main import main\nmain()\n")
    path.chmod(0o755)
    monkeypatch.setitem(globals(), "CLI", [str(path)])


def test_completion_of_commands_formats_and_models(run, program, tmp_path):
    assert complete(run, "mlx-gptoss ge") == ["generate"]
    assert "--temperature" in complete(run, "mlx-gptoss generate --te")
    assert complete(run, "mlx-gptoss convert nano out --to mlx-mxfp4-q") == ["mlx-mxfp4-q8", "mlx-mxfp4-q4"]
    assert complete(run, "mlx-gptoss generate --model na") == ["nano"]
    assert complete(run, "mlx-gptoss show na") == ["nano"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(run, program, shell):
    done = run(_MLX_GPTOSS_COMPLETE=f"{shell}_source")
    assert done.returncode == 0 and "_MLX_GPTOSS_COMPLETE" in done.stdout
