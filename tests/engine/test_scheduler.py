"""The scheduling policy, without threads or devices."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gptoss.backends.base import Limits, Row, Sampled
from mlx_gptoss.engine.request import Request
from mlx_gptoss.engine.scheduler import Scheduler, max_new_tokens
from mlx_gptoss.engine.sequence import Output, Step
from mlx_gptoss.errors import GptOssError, InvalidRequest
from mlx_gptoss.sampling import Sampling

GREEDY = Sampling(temperature=0)


def prompt(length: int, max_tokens: int = 4, stop: Sequence[int] = ()) -> Request:
    return Request(tuple(range(length)), max_tokens, GREEDY, frozenset(stop))


def plan(scheduler: Scheduler) -> Step:
    step = scheduler.plan()
    assert step is not None
    return step


def sample(scheduler: Scheduler, step: Step, token: int = 1) -> list[Output]:
    """Process a step in which every sampled row gives `token`."""
    return scheduler.process_results(step, [Sampled(token, 0.0) if row.sampling else None for row in step.rows])


def shape(step: Step) -> list[tuple[int, int, int | None]]:
    """(slot, start, prompt tokens or None for feedback) of each row."""
    return [(row.slot, row.start, None if row.tokens is None else len(row.tokens)) for row in step.rows]


def test_a_prompt_is_prefilled_in_chunks_and_then_feeds_back() -> None:
    released: list[int] = []
    scheduler = Scheduler(Limits(2, 100, 4), released.append)
    request = prompt(10, max_tokens=3)
    scheduler.add(request)
    steps = [plan(scheduler) for _ in range(5)]
    assert [step.rows[0] for step in steps] == [
        Row(0, 0, (0, 1, 2, 3)),
        Row(0, 4, (4, 5, 6, 7)),
        Row(0, 8, (8, 9), GREEDY, prompt=request.prompt),
        Row(0, 10, None, GREEDY),
        Row(0, 11, None, GREEDY),
    ]
    assert scheduler.plan() is None and scheduler.idle  # three tokens were requested: no row beyond
    ended = [output.end_reason for step in steps for output in sample(scheduler, step)]
    assert ended == [None, None, "length"]
    assert released == [0]


def test_short_prompts_share_a_step_and_no_chunk_is_shortened_to_fill_one() -> None:
    scheduler = Scheduler(Limits(4, 100, 8), lambda slot: None)
    for length in (3, 4, 4, 1):
        scheduler.add(prompt(length))
    assert shape(plan(scheduler)) == [(0, 0, 3), (1, 0, 4), (3, 0, 1)]  # 4 more would not fit; 1 does
    assert shape(plan(scheduler)) == [(0, 3, None), (1, 4, None), (3, 1, None), (2, 0, 4)]


def test_a_long_prompt_delays_neither_a_short_one_nor_the_streams() -> None:
    scheduler = Scheduler(Limits(3, 1000, 8), lambda slot: None)
    scheduler.add(prompt(2, max_tokens=50))
    plan(scheduler)
    scheduler.add(prompt(80))
    scheduler.add(prompt(8))
    assert shape(plan(scheduler)) == [(0, 2, None), (1, 0, 8)]
    assert shape(plan(scheduler)) == [(0, 3, None), (2, 0, 8)]
    assert shape(plan(scheduler)) == [(0, 4, None), (2, 8, None), (1, 8, 8)]


def test_slots_are_given_first_come_first_served() -> None:
    scheduler = Scheduler(Limits(1, 100, 8), lambda slot: None)
    sequences = [scheduler.add(prompt(2, max_tokens=1)) for _ in range(3)]
    for sequence in sequences:
        step = plan(scheduler)
        assert step.sequences == (sequence,)
        assert scheduler.plan() is None
        sample(scheduler, step)


def test_a_slot_is_released_only_when_no_step_in_flight_uses_it() -> None:
    released: list[int] = []
    scheduler = Scheduler(Limits(1, 100, 8), released.append)
    scheduler.add(prompt(2, max_tokens=10, stop=(7,)))
    first, second = plan(scheduler), plan(scheduler)
    waiting = scheduler.add(prompt(2))
    assert [output.end_reason for output in sample(scheduler, first, token=7)] == ["stop"]
    assert released == [] and scheduler.plan() is None
    assert sample(scheduler, second) == []  # the token after the stop id is dropped
    assert released == [0]
    assert plan(scheduler).sequences == (waiting,)


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_ending_a_sequence_at_any_point_frees_its_slot_once(steps: int) -> None:
    released: list[int] = []
    scheduler = Scheduler(Limits(1, 100, 4), released.append)
    sequence = scheduler.add(prompt(6, max_tokens=10))
    planned = [plan(scheduler) for _ in range(steps)]
    scheduler.end(sequence)
    scheduler.end(sequence)
    assert scheduler.plan() is None and scheduler.idle
    for step in planned:
        assert released == []
        assert sample(scheduler, step) == []
    assert released == ([0] if steps else [])


def test_a_failed_step_ends_its_sequences_and_spares_the_rest() -> None:
    released: list[int] = []
    scheduler = Scheduler(Limits(2, 100, 4), released.append)
    failed = scheduler.add(prompt(2, max_tokens=10))
    first = plan(scheduler)
    spared = scheduler.add(prompt(4))
    second = plan(scheduler)
    assert second.sequences == (failed, spared)
    scheduler.fail(first)
    assert failed.ended and released == []
    assert [output.sequence for output in sample(scheduler, second)] == [spared]
    assert released == [0]
    assert plan(scheduler).sequences == (spared,)


def test_results_that_do_not_match_the_step_are_an_error() -> None:
    scheduler = Scheduler(Limits(1, 100, 4), lambda slot: None)
    scheduler.add(prompt(2))
    step = plan(scheduler)
    with pytest.raises(ValueError):
        scheduler.process_results(step, [])
    scheduler = Scheduler(Limits(1, 100, 4), lambda slot: None)
    scheduler.add(prompt(2))
    with pytest.raises(RuntimeError, match="sampled no token"):
        scheduler.process_results(plan(scheduler), [None])


def test_max_new_tokens() -> None:
    limits = Limits(1, 10, 4)
    assert max_new_tokens(prompt(4, max_tokens=3), limits) == 3
    assert max_new_tokens(prompt(4, max_tokens=30), limits) == 6
    assert max_new_tokens(prompt(9, max_tokens=30), limits) == 1
    with pytest.raises(InvalidRequest, match="10 tokens and the context holds 10"):
        max_new_tokens(prompt(10), limits)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), slots=st.integers(1, 4), chunk=st.integers(1, 9))
def test_any_interleaving_serves_everything_and_leaks_no_slot(data: st.DataObject, slots: int, chunk: int) -> None:
    """Plan up to two steps ahead, process, add and end at random: every sequence ends and frees its slot."""
    released: list[int] = []
    scheduler = Scheduler(Limits(slots, 40, chunk), released.append)
    in_flight: list[Step] = []
    sequences = []
    stalls = 0
    for _ in range(data.draw(st.integers(0, 60))):
        action = data.draw(st.sampled_from(("add", "plan", "process", "end")))
        if action == "add":
            sequences.append(scheduler.add(prompt(data.draw(st.integers(1, 30)), data.draw(st.integers(1, 12)))))
        elif action == "plan" and len(in_flight) < 2:
            in_flight += [step for step in [scheduler.plan()] if step]
        elif action == "process" and in_flight:
            sample(scheduler, in_flight.pop(0))
        elif action == "end" and sequences:
            scheduler.end(data.draw(st.sampled_from(sequences)))
    while in_flight or not scheduler.idle:
        step = scheduler.plan()
        in_flight += [step] if step else []
        if in_flight:
            sample(scheduler, in_flight.pop(0))
        stalls += 1
        assert stalls < 2000
    assert all(sequence.ended and sequence.slot == -1 and sequence.in_flight == 0 for sequence in sequences)
    started = [sequence for sequence in sequences if sequence.length]
    assert len(released) >= len(started)
    assert all(sequence.delivered <= sequence.max_new_tokens for sequence in sequences)


def tokens(outputs: Sequence[Output]) -> list[int]:
    return [output.sampled.token for output in outputs]


def test_drafts_wait_for_the_previous_result_and_accepted_ones_advance_the_sequence() -> None:
    released: list[int] = []
    scheduler = Scheduler(Limits(1, 100, 8, drafts=3), released.append)
    sequence = scheduler.add(Request((1, 2, 3, 4, 1, 2), 7, GREEDY, frozenset({9})))
    first = plan(scheduler)
    assert scheduler.plan() is None and not scheduler.idle  # the drafts depend on the next token
    assert tokens(sample(scheduler, first, token=3)) == [3]
    step = plan(scheduler)
    assert step.rows == (Row(0, 6, (3,), GREEDY, drafts=(4, 1, 2)),)
    assert scheduler.plan() is None
    got = scheduler.process_results(
        step, [Sampled(4, 0.0, accepted=(Sampled(1, 0.0), Sampled(7, 0.0)))]
    )  # two were accepted
    assert tokens(got) == [4, 1, 7]
    step = plan(scheduler)
    assert step.rows == (Row(0, 9, (7,), GREEDY),)  # 1 7 has not occurred before
    assert tokens(sample(scheduler, step, token=4)) == [4]
    step = plan(scheduler)
    assert step.rows[0].start == 10 and len(step.rows[0].drafts) <= 1  # two more tokens may be generated
    assert (sequence.drafted, sequence.accepted) == (3, 2)
    assert sample(scheduler, step, token=9)[-1].end_reason == "stop"
    assert released == [0] and scheduler.idle


def test_a_stop_among_accepted_drafts_ends_the_sequence_there() -> None:
    scheduler = Scheduler(Limits(1, 100, 8, drafts=3), lambda slot: None)
    scheduler.add(Request((1, 2, 9, 4, 1), 50, GREEDY, frozenset({9})))
    sample(scheduler, plan(scheduler), token=2)
    step = plan(scheduler)
    assert step.rows[0].drafts == (9, 4, 1)
    got = scheduler.process_results(
        step, [Sampled(9, 0.0, accepted=(Sampled(4, 0.0), Sampled(1, 0.0), Sampled(2, 0.0)))]
    )
    assert [(output.sampled.token, output.end_reason) for output in got] == [(9, "stop")]
    assert scheduler.idle


def test_drafts_never_exceed_the_tokens_left_to_generate() -> None:
    scheduler = Scheduler(Limits(1, 100, 8, drafts=3), lambda slot: None)
    scheduler.add(Request((5, 6) * 4, 3, GREEDY))
    sample(scheduler, plan(scheduler), token=5)
    step = plan(scheduler)
    assert len(step.rows[0].drafts) == 1
    got = scheduler.process_results(step, [Sampled(6, 0.0, accepted=(Sampled(5, 0.0),))])
    assert got[-1].end_reason == "length"


class Alternating:
    """A guide that allows 1, then 2, then 1, ...; raises at any other token."""

    def __init__(self) -> None:
        self.next = 1

    def mask(self) -> bytes:
        return bytes([1 << self.next])

    def accept(self, token: int) -> None:
        if token != self.next:
            raise GptOssError(f"{token} is not {self.next}")
        self.next = 3 - token

    def ends_with(self, token: int) -> bool | None:
        return None


def test_a_guided_row_waits_for_the_previous_result_and_carries_its_mask() -> None:
    scheduler = Scheduler(Limits(2, 100, 4, drafts=3), lambda slot: None)
    guided = Request((1, 2, 1, 2, 1, 2), 4, GREEDY, guide=Alternating())
    scheduler.add(guided)
    chunk, first = plan(scheduler), plan(scheduler)
    assert chunk.rows == (Row(0, 0, (1, 2, 1, 2)),)
    assert first.rows == (Row(0, 4, (1, 2), GREEDY, guided.prompt, mask=b"\x02"),)
    scheduler.add(prompt(2, max_tokens=9))
    other = plan(scheduler)
    assert shape(other) == [(1, 0, 2)]  # the guided sequence waits for its result
    sample(scheduler, chunk)
    sample(scheduler, first, token=1)
    second = plan(scheduler)
    assert second.rows[0] == Row(0, 6, (1,), GREEDY, mask=b"\x04")  # no drafts: a mask depends on every earlier token
    sample(scheduler, other)
    sample(scheduler, second, token=2)
    third = plan(scheduler)
    assert third.rows[0] == Row(0, 7, (2,), GREEDY, mask=b"\x02")
    assert [output.end_reason for output in sample(scheduler, third, token=1)] == [None, None]
    assert [output.end_reason for output in sample(scheduler, plan(scheduler), token=2)] == ["length", None]


def test_a_guide_that_fails_ends_its_own_sequence() -> None:
    released: list[int] = []
    scheduler = Scheduler(Limits(1, 100, 8), released.append)
    scheduler.add(Request((5,), 9, GREEDY, guide=Alternating()))
    (output,) = sample(scheduler, plan(scheduler), token=2)
    assert isinstance(output.end_reason, GptOssError) and "2 is not 1" in str(output.end_reason)
    assert released == [0] and scheduler.idle
