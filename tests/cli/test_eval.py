"""mlx-gptoss eval as a user types it."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

import mlx_gptoss

CLI = [sys.executable, "-m", "mlx_gptoss_cli"]
ONE = {"perplexity", "perplexity_error", "tokens", "model", "format", "size_bytes", "bits_per_weight", "context"}
COMPARED = ONE | {
    "kl_mean", "kl_error", "channels", "kl_median", "kl_p99", "kl_max", "top1_agreement", "against", "against_format",
    "against_perplexity",
}  # fmt: skip


@pytest.fixture(scope="module")
def four_bit(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval") / "mlx-4bit"
    mlx_gptoss.convert(request.getfixturevalue("mini") / "mxfp4", folder, to="mlx-4bit")
    return folder


@pytest.fixture
def run(mini, four_bit, tmp_path):
    places = {"MINI": mini / "mxfp4", "Q4": four_bit, "TEXT": tmp_path / "text.txt", "OUT": tmp_path}
    places["TEXT"].write_text("Héllo there, add 12 and 30.<|endoftext|>\nBye now.\n", encoding="utf-8")

    def run(*words):
        words = [str(places.get(str(word), word)) for word in words]
        return subprocess.run([*CLI, "eval", *words], capture_output=True, text=True, timeout=300, cwd=tmp_path)

    return run


def test_json_has_the_promised_fields(run, mini):
    report = json.loads(run("MINI", "--text", "TEXT", "--json").stdout)
    assert set(report) == ONE
    assert (report["format"], report["model"]) == ("mxfp4", str(mini / "mxfp4"))
    compared = json.loads(run("MINI", "--against", "Q4", "--text", "TEXT", "--json").stdout)
    assert set(compared) == COMPARED
    assert {key: compared[key] for key in ONE} == report
    assert compared["against_format"] == "mlx-4bit"
    assert compared["kl_error"] > 0 and compared["channels"] == {}
    assert 0 < compared["kl_median"] <= compared["kl_mean"] <= compared["kl_p99"] <= compared["kl_max"]
    assert 0 <= compared["top1_agreement"] <= 1


def test_perplexity_is_that_of_the_models_own_logits(run, mini, tmp_path):
    text = "Nothing is dropped."
    (tmp_path / "short.txt").write_text(text)
    report = json.loads(run("MINI", "--text", "short.txt", "--json").stdout)
    with mlx_gptoss.load(mini / "mxfp4") as model:
        ids = model.tokenizer.encode(text)
        rows = model.logits(ids).astype(float)
    losses = [math.log(sum(math.exp(x) for x in row)) - row[id] for row, id in zip(rows[:-1], ids[1:], strict=True)]
    assert report["tokens"] == len(losses) == len(ids) - 1
    assert report["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_several_comparisons_are_a_list(run):
    reports = json.loads(run("MINI", "Q4", "--against", "MINI", "--against", "Q4", "--text", "TEXT", "--json").stdout)
    assert [(r["format"], r["against_format"]) for r in reports] == [
        ("mxfp4", "mxfp4"), ("mxfp4", "mlx-4bit"), ("mlx-4bit", "mxfp4"), ("mlx-4bit", "mlx-4bit"),
    ]  # fmt: skip
    assert [r["kl_mean"] > 0 for r in reports] == [False, True, True, False]
    assert [r["top1_agreement"] == 1 for r in reports] == [True, False, False, True]
    differences = [r.get("kl_difference") for r in reports]
    assert differences == [None, None, reports[2]["kl_mean"], -reports[1]["kl_mean"]]
    assert all(r["kl_difference_error"] > 0 for r in reports[2:])


def test_the_table_and_the_plot(run, tmp_path):
    out = run("Q4", "MINI", "--against", "MINI", "--text", "TEXT", "--plot", "kl.png")
    assert out.returncode == 0, out.stderr
    assert out.stderr == ""
    assert "perplexity" in out.stdout and "top-1 agreement" in out.stdout and "100.00%" in out.stdout
    assert (tmp_path / "kl.png").read_bytes().startswith(b"\x89PNG")


def test_layers(run):
    words = ("Q4", "MINI", "--against", "MINI", "--text", "TEXT", "--layers")
    q4, same = json.loads(run(*words, "--json").stdout)
    assert [one["part"] for one in q4["layers"]] == ["embed", "layer 0", "layer 1"]
    assert all(0 < one["own"] < 1 and one["own"] <= 1.5 * one["total"] for one in q4["layers"])
    assert all(one["own"] == one["total"] == 0 for one in same["layers"])
    out = run(*words)
    assert out.returncode == 0 and "layer 1" in out.stdout and "own / so far" in out.stdout


def test_without_a_text_the_bundled_one_is_read(run):
    report = json.loads(run("MINI", "--max-tokens", 30, "--context", 64, "--json").stdout)
    assert (report["tokens"], report["context"]) == (30, 64)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("./nowhere", "--text", "TEXT"), "nowhere"),
        (("MINI", "--text", "nothing.txt"), "nothing.txt"),
        (("MINI", "--text", "latin.txt"), "UTF-8"),
        (("MINI", "--text", "empty.txt"), "nothing to predict"),
        (("MINI", "--text", "TEXT", "--score", "replies"), "reply"),
        (("MINI", "--text", "TEXT", "--against", "Q4", "--plot", "kl.pdf"), "PNG"),
        (("MINI", "--text", "TEXT", "--context", 10**7), "context"),
    ],
)
def test_errors_are_one_line_and_exit_with_1(run, tmp_path, words, message):
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    out = run(*words)
    assert (out.returncode, out.stdout) == (1, "")
    assert out.stderr.startswith("error: ") and message in out.stderr and out.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words", [("MINI", "--plot", "kl.png"), ("MINI", "--layers"), ("MINI", "--score", "some"), ("MINI", "--context", 0)]
)
def test_usage_errors_exit_with_2(run, words):
    out = run(*words)
    assert out.returncode == 2 and "Usage:" in out.stderr


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['mlx-gptoss', 'eval', '--help']\n"
        "from mlx_gptoss_cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('numpy', 'mlx.core', 'rich', 'tokenizers', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.startswith("Usage:") and out.stdout.rstrip().endswith("[]")
