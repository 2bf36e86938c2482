"""Guides in the engine: where a guide allows every token, a request runs as without one; where it does not, tokens that
were sampled ahead are dropped and sampled again, and the text is that of a guide that always waits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_runner import VOCAB, expected, ids, mock_engine, next_id

from mlx_gptoss.backends.base import Limits, Row, Sampled
from mlx_gptoss.engine import Request
from mlx_gptoss.engine.scheduler import Scheduler
from mlx_gptoss.engine.sequence import Step
from mlx_gptoss.sampling import Sampling

GREEDY = Sampling(temperature=0)
EVERYTHING = bytes([255] * (VOCAB // 8 + 1))


def mask_of(*allowed: int) -> bytes:
    bits = bytearray(VOCAB // 8 + 1)
    for id in allowed:
        bits[id >> 3] |= 1 << (id & 7)
    return bytes(bits)


class Bursts:
    """Allows all tokens, and after every token that is a multiple of `every` only a few for the next `length`.

    waits: gives a mask of all tokens instead of None, so that every row waits for the result before it.
    """

    def __init__(self, every: int = 1_000_000, length: int = 3, *, waits: bool = False) -> None:
        self.every, self.length, self.waits = every, length, waits
        self.left = 0
        self.accepted: list[int] = []

    def mask(self) -> bytes | None:
        if self.left:
            return mask_of(*range(self.left, VOCAB, 5))
        return EVERYTHING if self.waits else None

    def accept(self, token: int) -> None:
        mask = self.mask()
        assert mask is None or mask[token >> 3] >> (token & 7) & 1
        self.accepted.append(token)
        self.left = self.left - 1 if self.left else self.length if token and token % self.every == 0 else 0

    def ends_with(self, token: int) -> bool | None:
        return None


def request(guide: Bursts | None, max_tokens: int = 30, seed: int = 0, sampling: Sampling | None = None) -> Request:
    return Request((3, 1, 4, 1, 5), max_tokens, sampling or Sampling(seed=seed), guide=guide)


ALONE = Limits(slots=1, max_context=200, chunk=8)


def rows(request: Request, limits: Limits = ALONE) -> tuple[list[Row], list[int]]:
    """The rows that the engine submits for a request alone, and the tokens it delivers."""
    with mock_engine(limits) as (engine, runner):
        got = ids(engine.submit(request))
        return [row for step in runner.steps for row in step], got


def test_a_guide_that_allows_everything_costs_no_row_and_no_wait() -> None:
    assert rows(request(Bursts())) == rows(request(None))
    again = rows(request(Bursts()))[0]
    assert len(again) == 30 and all(row.tokens is None and row.mask is None for row in again[1:])


def test_a_free_guide_leaves_drafts_on() -> None:
    limits, prompt = Limits(slots=1, max_context=400, chunk=64, drafts=3), (1, 2, 3) * 9
    seed = next(seed for seed in range(10_000) if next_id(prompt, seed) == 1)  # 3 1 has occurred before
    plain, wanted = rows(Request(prompt, 60, Sampling(seed=seed)), limits)
    held, got = rows(Request(prompt, 60, Sampling(seed=seed), guide=Bursts()), limits)
    assert (held, got) == (plain, wanted) and held[-1].tokens is not None
    assert any(row.drafts == (2, 3, 1) for row in held)


@settings(max_examples=80, deadline=None)
@given(every=st.integers(2, 9), length=st.integers(1, 4), seed=st.integers(0, 30), drafts=st.sampled_from([0, 3]))
def test_what_was_sampled_ahead_is_kept_if_allowed_and_sampled_again_if_not(
    every: int, length: int, seed: int, drafts: int
) -> None:
    limits = Limits(slots=1, max_context=200, chunk=8, drafts=drafts)
    ahead, waiting = Bursts(every, length), Bursts(every, length, waits=True)
    (free_rows, got), (waiting_rows, wanted) = (rows(request(guide, 60, seed), limits) for guide in (ahead, waiting))
    assert got == wanted and ahead.accepted == waiting.accepted
    history = [3, 1, 4, 1, 5]
    reference = Bursts(every, length, waits=True)
    for token in got:
        assert token == next_id(history, seed, reference.mask())
        reference.accept(token)
        history.append(token)
    assert all(row.mask is not None for row in waiting_rows) and len(waiting_rows) == 60
    if not drafts:  # one row more for each token that was dropped: at most one a burst
        bursts = sum(before > 0 and before % every == 0 for before in got)
        assert 60 <= len(free_rows) <= 60 + bursts


def test_a_dropped_token_is_sampled_again_at_its_position() -> None:
    scheduler = Scheduler(Limits(1, 100, 8), lambda slot: None)
    guide = Bursts(every=10, length=1)
    scheduler.add(request(guide, 4, sampling=GREEDY))
    first = plan(scheduler)
    second = plan(scheduler)  # ahead
    assert second.rows == (Row(0, 5, None, GREEDY),) and scheduler.plan() is None  # one row ahead, not two
    assert tokens(scheduler, first, 20) == [20]  # from here on a mask holds
    assert scheduler.plan() is None  # the row in flight decides whether it is needed
    assert tokens(scheduler, second, 7) == []  # not allowed
    third = plan(scheduler)
    assert third.rows == (Row(0, 5, (20,), GREEDY, mask=mask_of(*range(1, VOCAB, 5))),)
    assert tokens(scheduler, third, 6) == [6]
    assert plan(scheduler).rows == (Row(0, 6, (6,), GREEDY),)
    assert guide.accepted == [20, 6]


def test_a_token_dropped_at_the_limit_of_tokens_is_sampled_again() -> None:
    scheduler = Scheduler(Limits(1, 100, 8), lambda slot: None)
    scheduler.add(request(Bursts(every=10, length=1), 2, sampling=GREEDY))
    first, second = plan(scheduler), plan(scheduler)
    assert tokens(scheduler, first, 20) == [20] and tokens(scheduler, second, 7) == []
    third = plan(scheduler)
    (output,) = scheduler.process_results(third, [Sampled(6, 0.0)])
    assert output.end_reason == "length" and scheduler.idle


def test_drafts_that_a_mask_forbids_are_dropped_in_order() -> None:
    scheduler = Scheduler(Limits(1, 100, 64, drafts=3), lambda slot: None)
    guide = Bursts(every=10, length=1)
    sequence = scheduler.add(Request((1, 2, 20, 3, 4, 1, 2), 9, GREEDY, guide=guide))
    tokens(scheduler, plan(scheduler), 20)
    guide.left, sequence.mask = 0, None
    drafted = plan(scheduler)
    assert drafted.rows == (Row(0, 7, (20,), GREEDY, drafts=(3, 4, 1)),)
    sampled = Sampled(3, 0.0, accepted=(Sampled(30, 0.0), Sampled(2, 0.0), Sampled(7, 0.0)))
    assert [output.sampled.token for output in scheduler.process_results(drafted, [sampled])] == [3, 30]
    assert guide.accepted == [20, 3, 30] and (sequence.drafted, sequence.accepted) == (3, 1)
    held = plan(scheduler)
    assert held.rows == (Row(0, 9, (30,), GREEDY, mask=mask_of(*range(1, VOCAB, 5))),)


def test_penalties_are_exact_so_a_penalized_request_samples_nothing_ahead() -> None:
    scheduler = Scheduler(Limits(1, 100, 8), lambda slot: None)
    scheduler.add(request(Bursts(), sampling=Sampling(frequency_penalty=0.5)))
    plan(scheduler)
    assert scheduler.plan() is None


class Ending(Bursts):
    """Goes on after the token 7, a stop id, and ends with 8, which is none."""

    def ends_with(self, token: int) -> bool | None:
        return {7: False, 8: True}.get(token)


@pytest.mark.parametrize(("token", "reason"), [(7, None), (8, "stop"), (9, "stop"), (10, None)])
def test_a_guide_may_decide_what_ends_the_sequence(token: int, reason: str | None) -> None:
    scheduler = Scheduler(Limits(1, 100, 8), lambda slot: None)
    scheduler.add(Request((3, 1), 9, GREEDY, frozenset({7, 9}), guide=Ending()))
    (output,) = scheduler.process_results(plan(scheduler), [Sampled(token, 0.0)])
    assert output.end_reason == reason


def test_guided_and_free_requests_in_one_batch_get_what_they_get_alone() -> None:
    with mock_engine(Limits(slots=3, max_context=64, chunk=8)) as (engine, _):
        held = [(Bursts(every, 2), seed) for every, seed in ((2, 0), (3, 1), (5, 2))]
        streams = [engine.submit(request(guide, seed=seed)) for guide, seed in held]
        free = engine.submit(request(None, seed=4))
        assert ids(free) == expected(request(None, seed=4))[0]
        together = [ids(stream) for stream in streams]
    alone = [rows(request(Bursts(guide.every, 2, waits=True), seed=seed))[1] for guide, seed in held]
    assert together == alone


def plan(scheduler: Scheduler) -> Step:
    step = scheduler.plan()
    assert step is not None
    return step


def tokens(scheduler: Scheduler, step: Step, token: int) -> list[int]:
    return [output.sampled.token for output in scheduler.process_results(step, [Sampled(token, 0.0)])]
