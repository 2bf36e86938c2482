"""Evaluation: each token is predicted once, the numbers match a slow independent computation, and plots are drawn."""

from __future__ import annotations

import builtins
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
from mlx_gptoss.measure import evaluation, plot
from mlx_gptoss.measure.evaluation import Divergence, Evaluation, evaluate, kl_divergence, log_softmax
from mlx_gptoss.measure.passages import Document, places, read_documents, windows
from mlx_gptoss.measure.results import Places, mean_of
from mlx_gptoss.tokenizer import Tokenizer

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


@pytest.fixture(scope="module")
def tokenizer(request):
    return Tokenizer.from_folder(request.getfixturevalue("mini") / "mxfp4")


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


# ---- documents and windows -----------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(2, 60), st.integers(1, 59)), min_size=1, max_size=4),
    st.integers(1, 20),
    st.none() | st.integers(1, 80),
)
def test_every_token_that_counts_is_predicted_once_from_what_precedes_it(sizes, context, max_tokens):
    documents = [
        Document(tuple(range(100 * n, 100 * n + size)), min(first, size - 1)) for n, (size, first) in enumerate(sizes)
    ]
    wanted = [id for document in documents for id in document.ids[document.first :]]
    cut = windows(documents, context, max_tokens)
    got = []
    for window in cut:
        assert 1 <= len(window.inputs) <= context
        assert len(window.targets) <= len(window.inputs)
        run = (*window.inputs, window.targets[-1])
        assert run[-len(window.targets) :] == window.targets
        assert list(run) == list(range(run[0], run[-1] + 1)) and run[0] // 100 == run[-1] // 100
        for target in window.targets:
            assert target - run[0] >= min(target % 100, context // 2 + 1)
        got += window.targets
    assert got == wanted[:max_tokens]


def test_documents_end_where_the_text_says(tokenizer):
    text = "One.<|endoftext|>\nTwo.<|endoftext|>Three.<|endoftext|>\r\n"
    documents = read_documents(text, tokenizer)
    assert [tokenizer.decode(d.ids) for d in documents] == ["One.", "Two.", "Three."]
    assert [d.first for d in documents] == [1, 1, 1]


def test_replies_are_what_follows_the_last_message_of_others(tokenizer):
    history = "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Hello<|end|>"
    prompt = history + "<|start|>user<|message|>2 + 2?<|end|><|start|>assistant"
    reply = "<|channel|>analysis<|message|>4<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
    (document,) = read_documents(prompt + reply, tokenizer, "replies")
    assert tokenizer.decode(document.ids[: document.first], specials=True) == prompt
    assert tokenizer.decode(document.ids[document.first :], specials=True) == reply


@pytest.mark.parametrize(
    ("text", "score", "message"),
    [
        ("", "all", "nothing to predict"),
        ("<|endoftext|>\n<|endoftext|>", "all", "nothing to predict"),
        ("<|return|>", "all", "two tokens"),
        ("plain text", "replies", "document 1 .* without a reply"),
        ("<|start|>assistant hi<|return|><|endoftext|><|start|>user<|message|>x<|end|>", "replies", "document 2"),
        ("<|start|>user<|message|>x<|end|><|start|>assistant", "replies", "nothing to predict"),
        ("text", "some", "score"),
    ],
)
def test_texts_without_anything_to_predict(tokenizer, text, score, message):
    with pytest.raises(InvalidRequest, match=message):
        read_documents(text, tokenizer, score)


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


# ---- the plot ------------------------------------------------------------------------------------------------------


def made_up(name, bits, kl, reference=None):
    against = () if reference is None else (Divergence(reference, np.asarray(kl), np.ones(len(kl), bool)),)
    return Evaluation(name, name, 1000, bits, 64, np.ones(len(kl)), against)


@pytest.fixture
def comparisons():
    kl = np.random.default_rng(0).exponential(size=300)
    reference = made_up("bf16", 16.0, np.zeros(300))
    means = {"mlx-4bit": (4.5, 0.02), "mlx-nvfp4": (4.5, 0.021), "mlx-8bit": (8.5, 5e-4), "same": (4.25, 0.0)}
    return [made_up(name, bits, mean * kl, reference) for name, (bits, mean) in means.items()]


@pytest.mark.parametrize("chosen", [slice(0, 1), slice(0, 4), slice(3, 4)], ids=["one", "four", "no difference"])
def test_plots_are_drawn(comparisons, tmp_path, chosen):
    from matplotlib.image import imread

    plot.plot_divergences(comparisons[chosen], tmp_path / "kl.png")
    pixels = imread(tmp_path / "kl.png")[..., :3]
    assert pixels.shape[0] > 600 and pixels.shape[1] > 1000
    assert 0.5 < (pixels == 1).all(-1).mean() < 0.99  # mostly white, but not empty


def test_the_most_divergent_comes_first_under_the_name_of_its_format(comparisons):
    assert [line.label for line in plot.comparisons(comparisons)] == ["mlx-nvfp4", "mlx-4bit", "mlx-8bit", "same"]
    assert [line.differs for line in plot.comparisons(comparisons)] == [True, True, True, False]
    assert plot.comparisons(comparisons[:1])[0].label == "mlx-4bit against bf16"


def test_folders_name_checkpoints_of_one_format():
    ones = np.ones(3)
    reference = Evaluation("runs/a", "bf16", 1, 16.0, 64, ones)
    model = Evaluation("runs/b", "bf16", 1, 16.0, 64, ones, (Divergence(reference, ones, ones > 0),))
    assert plot.comparisons([model])[0].label == "b against a"


def test_smoothing_keeps_the_mean():
    assert plot.rolling_mean(np.array([1.0, 2.0, 6.0, 0.0]), 2).tolist() == [1.5, 4.0, 3.0]
    assert plot.rolling_mean(np.array([1.0, 2.0]), 1).tolist() == [1.0, 2.0]


def test_labels_of_points_in_one_place_do_not_overlap():
    points = np.array([[10.0, 10.0], [10.0, 10.0], [12.0, 11.0], [200.0, 10.0]])
    shifts = plot._shifts(["one", "two", "three", "four"], points)
    assert shifts[0] == shifts[3] == 0
    heights = sorted(y + shift for (_, y), shift in zip(points[:3], shifts[:3], strict=True))
    assert min(np.diff(heights)) >= plot.FONT


def test_plots_that_cannot_be_written_are_refused_beforehand(comparisons, tmp_path, monkeypatch):
    with pytest.raises(InvalidRequest, match="PNG"):
        plot.check_plot(tmp_path / "kl.pdf")
    with pytest.raises(InvalidRequest, match="does not exist"):
        plot.check_plot(tmp_path / "nowhere" / "kl.png")
    with pytest.raises(InvalidRequest, match="nothing was compared"):
        plot.plot_divergences([made_up("a", 4.0, np.ones(3))], tmp_path / "kl.png")
    importing = builtins.__import__

    def without_matplotlib(name, *rest):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(GptOssError, match=r"mlx-gptoss\[bench\]"):
        plot.check_plot(tmp_path / "kl.png")


# ---- errors, channels and replies ----------------------------------------------------------------------------------


def test_the_standard_error_is_that_of_resampled_documents():
    """Against the spread of the mean over 2000 resamplings of whole documents."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(5, 60, 80)
    window = np.repeat(np.arange(80), sizes)
    values = rng.exponential(1, len(window)) * np.repeat(rng.exponential(1, 80), sizes)
    found = mean_of(values, window)
    sums, counts = np.bincount(window, values), np.bincount(window)
    drawn = rng.integers(0, 80, (2000, 80))
    spread = (sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)).std()
    assert found.mean == pytest.approx(values.mean())
    assert found.error == pytest.approx(spread, rel=0.1)
    assert mean_of(values, None).error == pytest.approx(values.std(ddof=1) / len(values) ** 0.5)
    assert math.isnan(mean_of(values, np.zeros(len(values), int)).error)


def test_a_difference_is_that_of_pairs():
    rng = np.random.default_rng(2)
    hard = np.repeat(rng.exponential(1, 40), 25)
    places = Places(np.repeat(np.arange(40), 25), np.full(1000, ""), np.full(1000, -1))
    reference = Evaluation("a", "bf16", 1, 16.0, 64, hard)
    first, second = (
        Divergence(reference, hard * factor + rng.normal(0, 0.01, 1000), hard > 0, places) for factor in (1.0, 1.1)
    )
    found = second.difference(first)
    assert found.mean == pytest.approx(second.kl_mean - first.kl_mean)
    assert found.error < 0.2 * (first.kl_error**2 + second.kl_error**2) ** 0.5


def test_channels_and_replies_of_a_text(tokenizer):
    first = (
        "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>analysis<|message|>Think<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
    )
    text = f"{first}<|endoftext|>\nprose<|endoftext|><|start|>user<|message|>No reply<|end|>"
    documents = read_documents(text, tokenizer)
    by_channel = {
        name: tokenizer.decode(
            [id for id, at in zip(documents[0].ids, documents[0].channels, strict=True) if at == name], specials=True
        )
        for name in ("analysis", "commentary")
    }
    assert by_channel == {"analysis": "Think<|end|>", "commentary": "{}<|call|>"}
    reply = documents[0].reply
    assert reply and tokenizer.decode(documents[0].ids[reply:], specials=True).startswith("<|channel|>analysis")
    assert [document.reply for document in documents[1:]] == [None, None]
    assert not any(any(document.channels) for document in documents[1:])
    for context in (10, 500):
        found = places(list(windows(documents, context)))
        assert (found.reply == 0).sum() == len(documents[0].ids) - reply and (found.reply <= 0).all()
        assert (found.channel == "commentary").sum() == 3 and len(found.window) == sum(
            len(d.ids) - 1 for d in documents
        )
    assert (places(list(windows(documents, 500, 12))).reply == -1).all()  # a reply that was cut is none


def test_the_bundled_model_writes_most_replies_as_the_text_has_them():
    text = "<|endoftext|>".join(evaluation.BUNDLED_TEXT.read_text("utf-8").split("<|endoftext|>")[::20])
    (result,) = evaluate(None, text=text)
    assert result.replies is not None and result.hits is not None and result.places is not None
    right, count = result.replies
    assert count == 10 and right >= 8
    inside = result.places.reply == result.places.reply.max()
    assert np.exp(-result.nll[inside].max()) > 0.4 if result.hits[inside].all() else not result.hits[inside].all()
    assert result.perplexity_error > 0
