"""Evaluation: each token is predicted once, the numbers match a slow independent computation."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import mlx_gptoss
from mlx_gptoss import api
from mlx_gptoss.errors import CheckpointError, GptOssError, InvalidRequest
from mlx_gptoss.measure import evaluation
from mlx_gptoss.measure.evaluation import Evaluation, evaluate, kl_divergence, log_softmax
from mlx_gptoss.measure.passages import Document, read_documents, windows

TEXT = "<|start|>user<|message|>What is 12 + 30?<|end|>The quick brown fox jumps over the lazy dog. " * 3
TOOLS = Path(__file__).parents[2] / "examples" / "tools"
LOGITS = arrays(np.float32, (2, 5), elements=st.floats(-60, 60, width=32))


@pytest.fixture(scope="module")
def bf16(request, tmp_path_factory):
    return converted(request, tmp_path_factory, "bf16")


@pytest.fixture(scope="module")
def four_bit(request, tmp_path_factory):
    return converted(request, tmp_path_factory, "mlx-4bit")


def converted(request, tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("eval") / name
    mlx_gptoss.convert(request.getfixturevalue("mini") / "mxfp4", folder, to=name)
    return folder


# ---- the numbers ---------------------------------------------------------------------------------------------------


def slow_probabilities(logits):
    exact = [float(x) - float(max(logits)) for x in logits]
    total = math.fsum(map(math.exp, exact))
    return [math.exp(x) / total for x in exact]


def test_known_divergences():
    p, q = np.log([0.5, 0.5]), np.log([0.25, 0.75])
    assert kl_divergence(p, q) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-12)
    assert kl_divergence(q, p) == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2), rel=1e-12)
    certain, uniform = np.array([0.0, -800.0, -800.0, -800.0]), np.log(np.full(4, 0.25))
    assert kl_divergence(certain, uniform) == pytest.approx(math.log(4), rel=1e-12)


@given(LOGITS)
def test_divergence_is_what_the_definition_gives(logits):
    p, q = (slow_probabilities(row) for row in logits)
    log_p, log_q = log_softmax(logits)
    assert np.allclose(np.exp(log_p), p, atol=1e-12)
    wanted = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert kl_divergence(log_p, log_q) == pytest.approx(wanted, abs=1e-9)
    assert kl_divergence(log_p, log_q) >= 0
    assert kl_divergence(log_p, log_p) == 0


@given(LOGITS, st.floats(-1000, 1000), st.permutations(range(5)))
def test_divergence_ignores_a_shift_of_logits_and_the_order_of_tokens(logits, shift, order):
    exact = logits.astype(np.float64)
    plain = kl_divergence(*log_softmax(exact))
    assert kl_divergence(*log_softmax(exact + shift)) == pytest.approx(plain, abs=1e-9)
    assert kl_divergence(*log_softmax(exact[:, list(order)])) == pytest.approx(plain, abs=1e-9)


def test_logits_of_any_size_have_a_softmax():
    assert np.allclose(log_softmax(np.float32([[3e38, 3e38], [-3e38, 3e38]])), [[-math.log(2)] * 2, [-6e38, 0]])


@pytest.mark.parametrize(("vocab", "context"), [(201088, 1024), (320, 2048), (10**10, 1)])
def test_the_default_context_keeps_logits_under_a_gigabyte(vocab, context):
    assert evaluation._context(None, vocab, 131072) == context
    assert evaluation._context(None, vocab, 512) == min(context, 512)


def test_the_bundled_text_is_what_its_example_writes(tokenizer):
    script = [sys.executable, str(TOOLS / "nano_eval_text.py")]
    written = subprocess.run(script, capture_output=True, check=True).stdout
    assert evaluation.BUNDLED_TEXT.read_bytes() == written, "run examples/tools/nano_eval_text.py again"
    documents = read_documents(written.decode(), tokenizer, "replies")
    assert len(documents) == 200 and all(d.first > 20 for d in documents)


# ---- models --------------------------------------------------------------------------------------------------------


def slow_evaluation(model_folder, reference_folder, documents, context):
    """Perplexity and divergence by their definitions: one forward pass for each prediction."""
    nll, kl, agrees = [], [], []
    with mlx_gptoss.load(model_folder) as model, mlx_gptoss.load(reference_folder) as reference:
        for ids in documents:
            for window in windows([Document(ids, 1)], context):
                before = len(window.inputs) - len(window.targets)
                for length, target in enumerate(window.targets, before + 1):
                    q, p = (slow_probabilities(m.logits(window.inputs[:length])[-1]) for m in (model, reference))
                    nll.append(-math.log(q[target]))
                    kl.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
                    agrees.append(p.index(max(p)) == q.index(max(q)))
    return nll, kl, agrees


def test_perplexity_and_divergence_match_their_definitions(mini, bf16, four_bit, tokenizer):
    text = "Reverse the word planet, then add 7 and 8.<|endoftext|>\nHello there"
    documents = [d.ids for d in read_documents(text, tokenizer)]
    context = 12
    nll, kl, agrees = slow_evaluation(four_bit, bf16, documents, context)
    (result,) = evaluate(four_bit, against=bf16, text=text, context=context)
    (divergence,) = result.against
    assert result.tokens == len(nll) == sum(len(ids) - 1 for ids in documents)
    assert max(map(len, documents)) > context  # several windows
    assert result.perplexity == pytest.approx(math.exp(math.fsum(nll) / len(nll)), rel=1e-4)
    assert np.allclose(result.nll, nll, atol=1e-3)
    assert np.allclose(divergence.kl, kl, rtol=2e-3, atol=1e-5)
    assert divergence.agrees.tolist() == agrees
    assert divergence.kl_mean == pytest.approx(math.fsum(kl) / len(kl), rel=1e-3)
    assert divergence.kl_max == pytest.approx(max(kl), rel=1e-3)
    assert divergence.kl_median == pytest.approx(float(np.median(kl)), rel=1e-2)
    assert divergence.kl_p99 == pytest.approx(float(np.percentile(kl, 99)), rel=1e-2)
    assert 0 < divergence.top1_agreement < 1 and divergence.kl_median < divergence.kl_mean < divergence.kl_p99


def test_a_model_does_not_differ_from_itself(mini):
    (result,) = evaluate(mini / "mxfp4", against=[mini / "mxfp4"], text=TEXT, context=32)
    (divergence,) = result.against
    assert divergence.kl_max == 0 and divergence.top1_agreement == 1
    assert divergence.reference.perplexity == result.perplexity


def test_a_lossless_conversion_does_not_differ(mini, bf16):
    (result,) = evaluate(mini / "mxfp4", against=bf16, text=TEXT)
    assert result.against[0].kl_max < 1e-6
    assert result.perplexity == pytest.approx(result.against[0].reference.perplexity, rel=1e-4)


def test_the_reference_is_the_first_argument_of_the_divergence(bf16, four_bit):
    (there,) = evaluate(four_bit, against=bf16, text=TEXT, max_tokens=40)
    (back,) = evaluate(bf16, against=four_bit, text=TEXT, max_tokens=40)
    assert there.against[0].kl_mean != pytest.approx(back.against[0].kl_mean, rel=1e-3)
    assert there.against[0].reference.format == "bf16" and there.format == "mlx-4bit"
    assert there.perplexity == back.against[0].reference.perplexity


def test_several_models_and_references_are_each_loaded_once_and_one_at_a_time(mini, bf16, four_bit, monkeypatch):
    log, loaded = [], api.load

    class Watched:
        def __init__(self, source, **options):
            self.name, self.model = Path(source).name, loaded(source, **options)

        def __enter__(self):
            log.append(f"+{self.name}")
            return self.model

        def __exit__(self, *error):
            self.model.close()
            log.append(f"-{self.name}")

    monkeypatch.setattr(api, "load", Watched)
    calls = []
    results = evaluate(
        four_bit, mini / "mxfp4", against=[bf16, mini / "mxfp4"], text=TEXT, max_tokens=20,
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    assert log == ["+bf16", "-bf16", "+mxfp4", "-mxfp4", "+mlx-4bit", "-mlx-4bit", "+mxfp4", "-mxfp4"]
    assert [[d.reference.format for d in result.against] for result in results] == [["bf16", "mxfp4"]] * 2
    assert results[1].against[1].kl_max == 0 < results[0].against[1].kl_max
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    assert {total for _, total, _ in calls} == {80} and calls[-1] == (80, 80, str(mini / "mxfp4"))


def test_max_tokens_takes_the_first(mini):
    (whole,) = evaluate(mini / "mxfp4", text=TEXT)
    (part,) = evaluate(mini / "mxfp4", text=TEXT, max_tokens=25)
    assert part.tokens == 25
    assert np.allclose(part.nll, whole.nll[:25], atol=1e-4)


def test_replies_of_the_bundled_text(mini, tokenizer):
    (result,) = evaluate(mini / "mxfp4", max_tokens=60, score="replies")
    (document, *_) = read_documents(evaluation.BUNDLED_TEXT.read_text(encoding="utf-8"), tokenizer, "replies")
    with mlx_gptoss.load(mini / "mxfp4") as model:
        logits = model.logits(document.ids)[document.first - 1]
    assert result.nll[0] == pytest.approx(-math.log(slow_probabilities(logits)[document.ids[document.first]]), rel=1e-4)


def test_it_is_a_public_name():
    assert mlx_gptoss.evaluate is evaluate and mlx_gptoss.Evaluation is Evaluation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context"),
        ({"context": 10**7}, "context"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"text": ""}, "nothing to predict"),
        ({"backend": "abacus"}, "backend"),
    ],
)
def test_bad_options_are_refused(mini, options, message):
    with pytest.raises(InvalidRequest, match=message):
        evaluate(mini / "mxfp4", **{"text": TEXT, **options})


def test_other_vocabularies_are_refused_before_anything_is_loaded(mini, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(mini / "mxfp4", other, copy_function=shutil.copyfile)
    other.chmod(0o755)
    file = other / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('"a":', '"tmp":').replace('"b":', '"a":').replace('"tmp":', '"b":'), encoding="utf-8")
    monkeypatch.setattr(api, "load", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(InvalidRequest, match="different vocabularies"):
        evaluate(mini / "mxfp4", against=other, text=TEXT)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        evaluate(other, text=TEXT)


def test_too_little_disk_space_is_an_error_before_anything_is_loaded(mini, monkeypatch):
    monkeypatch.setattr(api, "load", lambda *a, **k: pytest.fail("it was loaded"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10_000))
    with pytest.raises(GptOssError, match="--max-tokens 6, or set TMPDIR"):
        evaluate(mini / "mxfp4", against=mini / "mxfp4", text=TEXT)


def test_logits_that_are_not_numbers_are_an_error(mini, monkeypatch):
    logits = api.Model.logits

    def broken(model, ids, adapter=None):
        out = logits(model, ids)
        out[-1, 3] = np.nan
        return out

    monkeypatch.setattr(api.Model, "logits", broken)
    with pytest.raises(GptOssError, match="not finite"):
        evaluate(mini / "mxfp4", text=TEXT, max_tokens=5)


def test_the_bundled_model_writes_most_replies_as_the_text_has_them():
    text = "<|endoftext|>".join(evaluation.BUNDLED_TEXT.read_text("utf-8").split("<|endoftext|>")[::20])
    (result,) = evaluate(None, text=text)
    assert result.replies is not None and result.hits is not None and result.places is not None
    right, count = result.replies
    assert count == 10 and right >= 8
    inside = result.places.reply == result.places.reply.max()
    assert np.exp(-result.nll[inside].max()) > 0.4 if result.hits[inside].all() else not result.hits[inside].all()
    assert result.perplexity_error > 0
