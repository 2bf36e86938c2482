"""The benchmark with drafts: which rows it submits, what it counts, and that it decodes the same tokens."""

from __future__ import annotations

import pytest

from mlx_gptoss.backends import BACKENDS
from mlx_gptoss.backends.base import Limits, Sampled, verified
from mlx_gptoss.config import TINY
from mlx_gptoss.loading.plan import LoadRequest
from mlx_gptoss.measure.benchmark import BenchModel, Target, bench, load
from mlx_gptoss.measure.timing import REPEATED, WARM_STEPS, Case, OurEngine, prompts
from mlx_gptoss.weights.synthetic import Synthetic


class Repeating:
    """A runner that goes on repeating the passage of the prompts, but samples another token at every tenth position."""

    def __init__(self, case: Case) -> None:
        self.config, self.limits = TINY, Limits(case.batch, 1000, 64, drafts=3)
        self.passages = prompts(TINY.vocab_size, case, repeated=True)
        self.lengths = [0] * case.batch
        self.rows: list = []

    def token(self, slot: int, position: int) -> int:
        passage = self.passages[slot]
        return passage[position % REPEATED] if position % 10 or position < len(passage) else 1

    def submit(self, rows):
        self.rows.append(rows)
        results = []
        for row in rows:
            assert row.start == self.lengths[row.slot] and len(row.drafts) <= 3
            assert all(fed == self.token(row.slot, row.start + n) for n, fed in enumerate(row.tokens))
            end = row.start + len(row.tokens)
            sampled = verified(row.drafts, lambda n, row=row, end=end: Sampled(self.token(row.slot, end + n), 0.0))
            self.lengths[row.slot] = end + len(sampled.accepted)
            results.append(sampled if row.sampling else None)
        return Done(results)

    def release(self, slot):
        self.lengths[slot] = 0


class Done:
    def __init__(self, results):
        self.results = results

    def wait(self):
        return self.results


def test_every_sequence_decodes_as_many_tokens_as_without_drafts():
    case = Case(batch=2, prompt=130, context=150, generate=33)
    runner = Repeating(case)
    ours = OurEngine(runner, "none", "cpu", "none", 0.0)
    ours.begin(case)
    ours.prefill()
    ours.fill()
    for n in range(2):
        before = len(runner.rows)
        ours.decode()
        assert runner.lengths == [150 + WARM_STEPS + 33 * (n + 1)] * 2
        steps = runner.rows[before:]
        found = ours.drafts[n]
        assert found.steps == len(steps) < 33 and 0 < found.right < found.drafted
        assert found.drafted == sum(len(row.drafts) for rows in steps for row in rows)
        assert found.right == 2 * 33 - sum(len(rows) for rows in steps)
    assert len(ours.host_seconds) == 2


def test_prompts_with_drafts_repeat_a_passage():
    for ids in prompts(320, Case(2, 10, 200, 5), repeated=True):
        assert len(ids) == 200 and ids[REPEATED:] == ids[:-REPEATED] and len(set(ids)) > 40
    assert len(prompts(320, Case(1, 10, 20, 5), repeated=True)[0]) == 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_decodes_the_same_tokens_with_drafts(backend, backend_module):
    """Greedily, in float32 on a CPU; what the report says of them."""
    backend_module(backend)
    source = Synthetic(TINY, "mxfp4")
    case, target, texts = Case(2, 70, 80, 12), Target.find(backend, "cpu", None), []
    for speculate in (True, False):
        model = BenchModel(source, source.size_bytes, "mxfp4", LoadRequest(speculate=speculate))
        engine, _ = load(model, [case], 1, target, lambda what: None)
        engine._tokens = prompts(TINY.vocab_size, case, repeated=True)
        engine._case, engine._sampled, seen = case, [0, 0], []
        submit = engine._runner.submit
        engine._runner.submit = lambda rows, submit=submit, seen=seen: kept(rows, submit(rows), seen)
        engine.fill()
        engine.decode()
        engine.close()
        texts.append([[token for slot, token in seen if slot == n] for n in range(2)])
    assert texts[0] == texts[1] and len(texts[0][0]) == 1 + WARM_STEPS + 12
    model = BenchModel(source, source.size_bytes, "mxfp4, drafts", LoadRequest(speculate=True))
    (result,) = bench(model, [case], target, repeat=2).results
    assert result.drafts.drafted >= result.drafts.right >= 0 and 0 < result.drafts.steps <= 2 * 2 * 12
    assert result.decode_tok_s > 0 and result.host_ms_per_step > 0


def kept(rows, pending, seen: list):
    """A step whose sampled tokens are appended to `seen`, each with its slot."""
    results = pending.wait()
    for row, sampled in zip(rows, results, strict=True):
        if sampled is not None:
            seen += [(row.slot, token.token) for token in (sampled, *sampled.accepted)]
    return Done(results)
