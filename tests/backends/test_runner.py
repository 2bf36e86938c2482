"""The Runner of every backend on the CPU: slots are independent, sliding windows limit attention, and a batch gives the
same tokens as each sequence alone."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from mlx_gptoss.backends import BACKENDS
from mlx_gptoss.backends.base import Limits, Row, stage_count
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.weights import checkpoint as checkpoints

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request, backend_module):
    return backend_module(request.param)


@pytest.fixture(scope="module")
def runner(backend, mini, device_of):
    device = device_of(backend.__name__.rpartition(".")[2])
    return backend.load(checkpoints.open(mini / "mxfp4"), device=device, dtype="float32", limits=Limits(4, 700, 2048))


def prompt_of(length: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(300), k=length))


def alone(runner, prompt, n, sampling=GREEDY, slot=0):
    tokens = [runner.submit([Row(slot, 0, prompt, sampling, prompt)]).wait()[0].token]
    for i in range(n - 1):
        tokens.append(runner.submit([Row(slot, len(prompt) + i, None, sampling)]).wait()[0].token)
    runner.release(slot)
    return tokens


def test_continuing_is_the_same_as_recomputing(runner):
    """Beyond the window, and beyond a growth of the full layers' arrays."""
    prompt = prompt_of(250, 1)
    tokens = alone(runner, prompt, 20)
    logits = runner.logits([*prompt, *tokens])
    assert logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist() == tokens


def test_rows_of_a_batch_do_not_touch_each_other(runner):
    """Four sequences of different lengths, joining and leaving at different steps, in slots used before."""
    prompts = [prompt_of(length, length) for length in (3, 40, 9, 1)]
    steps = [25, 7, 18, 30]
    expected = [alone(runner, p, n, slot=3 - i) for i, (p, n) in enumerate(zip(prompts, steps, strict=True))]
    got = [[] for _ in prompts]
    for step in range(40):
        rows, owners = [], []
        for i, prompt in enumerate(prompts):
            done = len(got[i])
            if step < 2 * i or done == steps[i]:
                continue
            first = done == 0
            tokens = prompt if first else None
            start = 0 if first else len(prompt) + done - 1
            rows.append(Row(i, start, tokens, GREEDY, prompt if first else None))
            owners.append(i)
        for i, sampled in zip(owners, runner.submit(rows).wait() if rows else [], strict=True):
            got[i].append(sampled.token)
    assert got == expected


def test_steps_may_be_submitted_before_the_last_is_read(runner):
    prompt = prompt_of(12, 5)
    expected = alone(runner, prompt, 10)
    pending = [runner.submit([Row(2, 0, prompt, GREEDY, prompt)])]
    pending += [runner.submit([Row(2, len(prompt) + i, None, GREEDY)]) for i in range(9)]
    assert [p.wait()[0].token for p in pending] == expected


def test_seeds_reproduce_in_any_batch(runner):
    sampling = Sampling(seed=11, top_p=0.9, presence_penalty=0.5, logprobs=3)
    prompt, other = prompt_of(10, 6), prompt_of(31, 7)
    expected = alone(runner, prompt, 12, sampling, slot=1)
    first = runner.submit([Row(0, 0, other, Sampling(), other), Row(3, 0, prompt, sampling, prompt)]).wait()
    got = [first[1].token]
    for i in range(11):
        rows = [Row(0, 31 + i, None, Sampling()), Row(3, 10 + i, None, sampling)]
        sampled = runner.submit(rows).wait()[1]
        got.append(sampled.token)
        assert len(sampled.top) == 3 and sampled.top[0][1] >= sampled.logprob - 1e-6
    assert got == expected


def test_the_same_seed_in_another_slot_later_gives_the_same(runner):
    """Also with 64-bit seeds. A slot's next request does not continue the previous request's stream."""
    prompt = prompt_of(5, 10)
    sampling = Sampling(seed=2**64 - 1)
    first = alone(runner, prompt, 8, sampling, slot=2)
    assert alone(runner, prompt, 8, Sampling(seed=12), slot=2) != first
    assert alone(runner, prompt, 8, sampling, slot=0) == first


def test_masked_rows_sample_allowed_tokens_and_do_not_affect_other_rows(runner):
    """Prompt rows and decode rows, with tokens fed back on the device and from the host. The mask ends before the
    vocabulary."""
    prompt, other, mask = prompt_of(10, 6), prompt_of(4, 7), b"\x00\x55" * 9
    free, unmasked = Sampling(seed=4), Sampling(seed=5, top_k=9)
    expected = alone(runner, other, 6, unmasked)
    results = [runner.submit([Row(1, 0, prompt, free, prompt, mask=mask), Row(2, 0, other, unmasked, other)]).wait()]
    for i in range(5):
        token = (results[-1][0].token,) if i % 2 else None
        rows = [Row(1, 10 + i, token, free, mask=mask), Row(2, 4 + i, None, unmasked)]
        results.append(runner.submit(rows).wait())
    for slot in (1, 2):
        runner.release(slot)
    tokens = [masked.token for masked, _ in results]
    assert all(mask[t // 8] >> t % 8 & 1 for t in tokens) and len(set(tokens)) > 1
    assert [row.token for _, row in results] == expected
    raw = runner.logits((*prompt, *tokens))[9:-1].astype(np.float64)
    logprobs = raw - np.log(np.exp(raw).sum(axis=-1, keepdims=True))
    assert np.allclose([masked.logprob for masked, _ in results], logprobs[range(6), tokens], atol=1e-4)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=3)], ids=["greedy", "seeded"])
def test_feeding_the_last_token_again_samples_as_if_nothing_had_been_sampled_after_it(runner, sampling):
    """A dropped token leaves no trace, through three turns of the ring and next to another row."""
    prompt, other = prompt_of(5, 8), prompt_of(30, 9)
    vocabulary = runner.config.vocab_size
    odd = bytes([0b10101010]) * (-(-vocabulary // 8))  # the tokens with odd ids
    tokens = [runner.submit([Row(slot, 0, prompt, sampling, prompt)]).wait()[0].token for slot in (0, 1)]
    assert tokens[0] == tokens[1]
    runner.submit([Row(2, 0, other, GREEDY, other)]).wait()
    token = tokens[0]
    for step in range(27):
        start = len(prompt) + step
        (plain,) = runner.submit([Row(1, start, (token,), sampling, mask=odd)]).wait()
        rows = [Row(0, start, (token,), sampling), Row(2, len(other) + step, None, GREEDY)]
        ahead = runner.submit(rows)
        again = runner.submit([Row(0, start, (token,), sampling, mask=odd)])
        free, (sampled,) = ahead.wait()[0].token, again.wait()
        assert sampled.token == plain.token and sampled.token % 2 == 1
        assert sampled.logprob == pytest.approx(plain.logprob, abs=1e-4)
        assert free % 2 == 0 or free == sampled.token  # a mask changes nothing if it allows what is sampled without it
        token = plain.token
    for slot in (0, 1, 2):
        runner.release(slot)


def test_a_prefill_chunk_samples_nothing(runner):
    assert runner.submit([Row(0, 0, (1, 2, 3))]).wait() == [None]
    runner.release(0)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_chunk_computed_in_pieces_is_bit_for_bit_the_same(runner, stages):
    """A few stages at a time, with steps of another slot between them; with its snapshot, sampled token and logprobs.
    The slot of a chunk that is given up serves the next sequence."""
    prompt, other = prompt_of(300, 17), prompt_of(20, 18)
    sampling = Sampling(temperature=0, logprobs=5)
    total = stage_count(runner.config)
    runner.submit([Row(0, 0, prompt[:200])]).wait()
    expected_bytes = runner.pack(runner.save(0, 0, 200))
    expected = [runner.submit([Row(0, 200, prompt[200:], sampling, prompt)]).wait()[0]]
    expected += [runner.submit([Row(0, 300 + i, None, sampling)]).wait()[0] for i in range(3)]

    runner.submit([Row(2, 0, other, GREEDY, other)]).wait()
    runner.submit([Row(3, 0, prompt[50:150], stages=(0, 1))]).wait()
    runner.release(3)
    got, length = [], len(other)
    for start, end in ((0, 200), (200, 300)):
        for first in range(0, total, stages):
            piece = (first, min(first + stages, total))
            last = end == 300 and piece[1] == total
            row = Row(3, start, prompt[start:end], sampling if last else None, prompt if last else None, stages=piece)
            sampled = runner.submit([Row(2, length, None, GREEDY), row]).wait()[1]
            length += 1
            assert (sampled is not None) == last
            got += [sampled] if last else []
        if end == 200:
            assert runner.pack(runner.save(3, 0, 200)) == expected_bytes
    got += [runner.submit([Row(3, 300 + i, None, sampling)]).wait()[0] for i in range(3)]
    assert got == expected
    for slot in (0, 2, 3):
        runner.release(slot)


def test_logprobs_belong_to_the_logits(runner):
    prompt = prompt_of(20, 8)
    sampled = runner.submit([Row(0, 0, prompt, Sampling(temperature=0, logprobs=5), prompt)]).wait()[0]
    runner.release(0)
    logits = runner.logits(prompt)[-1].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum())
    assert abs(sampled.logprob - logprobs.max()) < 1e-4
    assert [i for i, _ in sampled.top] == np.argsort(-logprobs)[:5].tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_activations_stay_close(backend, mini, dtype):
    checkpoint = checkpoints.open(mini / "mxfp4")
    prompt = prompt_of(30, 9)
    exact = backend.load(checkpoint, device="cpu", dtype="float32", limits=Limits(1, 64, 64)).logits(prompt)
    narrow = backend.load(checkpoint, device="cpu", dtype=dtype, limits=Limits(1, 64, 64)).logits(prompt)
    assert np.corrcoef(exact.ravel(), narrow.ravel())[0, 1] > 0.98


def test_a_restored_sequence_goes_on_bit_for_bit(runner):
    """From snapshots before and beyond the window, restored into a slot that another sequence used, directly and
    through bytes. Further steps do not change the snapshots."""
    prompt = prompt_of(300, 11)
    for cuts in ((40, 90), (100, 260), (256,)):
        chain, start = [], 0
        for end in (*cuts, len(prompt)):
            last = end == len(prompt)
            row = Row(0, start, prompt[start:end], GREEDY if last else None, prompt if last else None)
            (sampled,) = runner.submit([row]).wait()
            if not last:
                chain.append(runner.save(0, start, end))
            start = end
        expected = [sampled] + [runner.submit([Row(0, 300 + i, None, GREEDY)]).wait()[0] for i in range(3)]
        assert sum(saved.nbytes for saved in chain) == sum(len(runner.pack(saved)) for saved in chain)
        copies = [runner.unpack(saved.start, saved.end, runner.pack(saved)) for saved in chain]
        alone(runner, prompt_of(200, 12), 2, slot=2)
        for snapshots in (chain, copies):
            runner.restore(2, snapshots)
            got = runner.submit([Row(2, cuts[-1], prompt[cuts[-1] :], GREEDY, prompt)]).wait()
            got += [runner.submit([Row(2, 300 + i, None, GREEDY)]).wait()[0] for i in range(3)]
            assert got == expected
            runner.release(2)


def chunks_of(runner, slot, prompt, *cuts, save_at=(), stages=None):
    """Compute a prompt in chunks that end at `cuts` and at its end, each in these stages. Returns the snapshots, which
    follow each other, and the first token."""
    saved, start, done = [], 0, 0
    for end in (*cuts, len(prompt)):
        points = tuple(at for at in save_at if start < at <= end)
        for part in stages or [None]:
            last = end == len(prompt) and part in (None, (stages or [None])[-1])
            row = Row(slot, start, prompt[start:end], GREEDY if last else None, prompt if last else None)
            (sampled,) = runner.submit([replace(row, save_at=points, stages=part)]).wait()
        for at in points:
            saved.append(runner.save(slot, done, at))
            done = at
        start = end
    return saved, sampled


@pytest.mark.parametrize("cuts", [(), (150,), (2, 298)], ids=str)
def test_snapshots_inside_a_chunk_are_its_own_values(runner, cuts):
    """Before the window is full, on its borders, at the ends of chunks and across them, whole and in stages. The last
    one goes on as the slot does, bit for bit; the others as shorter chunks do, up to rounding."""
    prompt, points = prompt_of(300, 21), (1, 8, 9, 140, 150, 158, 299, 300)
    half = stage_count(runner.config) // 2
    saved, first = chunks_of(runner, 0, prompt, *cuts, save_at=points)
    expected = [runner.submit([Row(0, 300 + i, None, GREEDY)]).wait()[0] for i in range(3)]
    runner.release(0)
    staged, again = chunks_of(runner, 1, prompt, *cuts, save_at=points, stages=[(0, half), (half, 2 * half)])
    assert again == first and list(map(runner.pack, staged)) == list(map(runner.pack, saved))
    runner.release(1)
    copies = [runner.unpack(each.start, each.end, runner.pack(each)) for each in saved]
    for chain in (saved, copies):
        runner.restore(2, chain)
        got = [runner.submit([Row(2, 300, (first.token,), GREEDY, prompt)]).wait()[0]]
        got += [runner.submit([Row(2, 301 + i, None, GREEDY)]).wait()[0] for i in range(2)]
        assert got == expected
        runner.release(2)
    for count, at in enumerate(points[:-1], 1):
        runner.restore(3, saved[:count])
        (rest,) = runner.submit([Row(3, at, prompt[at:], GREEDY, prompt)]).wait()
        assert rest.token == first.token and abs(rest.logprob - first.logprob) < 1e-5
        runner.release(3)
        chunks, _ = chunks_of(runner, 3, prompt[:at], save_at=(at,))
        assert_near(runner, chunks[-1], saved[:count])
        runner.release(3)


def assert_near(runner, whole, parts):
    """The rings of a snapshot of a whole prefix, and its full layers' values, are those of consecutive parts."""
    for layer in range(runner.config.num_hidden_layers):
        (expected,), found = layer_values(whole, layer), [layer_values(part, layer)[0] for part in parts]
        if runner.config.windows[layer] is None:
            found = [np.concatenate(found, axis=-2)]
        assert expected.shape == found[-1].shape
        assert np.abs(expected - found[-1]).max() < 1e-5 * max(1.0, np.abs(expected).max())


def layer_values(snapshot, layer):
    """Keys and values of one layer in a snapshot of either backend, float32 [2, ..., C, 64]"""
    if hasattr(snapshot, "parts"):
        return [part.cpu().numpy() for part in snapshot.parts[layer]]
    return [np.array(snapshot.arrays[layer])]


def test_what_snapshots_need_is_freed_with_the_next_step(runner):
    """And kept only where a position inside of the chunk is saved, and only until the chunk is finished and saved."""
    prompt, last = prompt_of(60, 22), stage_count(runner.config)

    def kept():
        return sorted({slot for ring in runner._cache.rings for slot in ring.kept})

    runner.submit([Row(0, 0, prompt, save_at=(60,))]).wait()
    assert kept() == []
    runner.submit([Row(1, 0, prompt, save_at=(30,), stages=(0, 3)), Row(2, 0, prompt, save_at=(9, 60))]).wait()
    assert kept() == [1, 2]
    runner.submit([Row(0, 60, (5,))]).wait()
    assert kept() == [1]
    runner.submit([Row(1, 0, prompt, save_at=(30,), stages=(3, last))]).wait()
    assert kept() == [1] and runner.save(1, 0, 30).end == 30
    runner.release(1)
    assert kept() == []
    for slot in (0, 2):
        runner.release(slot)


def test_a_snapshot_holds_nothing_of_the_sequence_before(runner):
    alone(runner, prompt_of(200, 13), 2, slot=1)
    saved = []
    for slot in (1, 3):
        runner.submit([Row(slot, 0, prompt_of(20, 14))]).wait()
        saved.append(runner.pack(runner.save(slot, 0, 20)))
        runner.release(slot)
    assert saved[0] == saved[1]


def test_bytes_that_are_no_snapshot_are_refused(runner):
    runner.submit([Row(0, 0, prompt_of(20, 14))]).wait()
    data = runner.pack(runner.save(0, 0, 20))
    runner.release(0)
    for wrong in (data[:-1], data + b"x", b""):
        with pytest.raises(ValueError, match="a snapshot of the positions 0 to 20 has"):
            runner.unpack(0, 20, wrong)


def test_packed_keys_and_rings_with_slack_are_restored_too(mini, backend):
    limits = Limits(2, 700, 512, drafts=3, kv_bits=8)
    runner = backend.load(checkpoints.open(mini / "mxfp4"), device="cpu", dtype="float32", limits=limits)
    prompt = prompt_of(300, 11)
    runner.submit([Row(0, 0, prompt[:200])]).wait()
    saved = runner.save(0, 0, 200)
    expected = runner.submit([Row(0, 200, prompt[200:], GREEDY, prompt)]).wait()
    for snapshot in (saved, runner.unpack(0, 200, runner.pack(saved))):
        runner.restore(1, [snapshot])
        assert runner.submit([Row(1, 200, prompt[200:], GREEDY, prompt)]).wait() == expected
    runner.release(0)
    points = (6, 11, 12, 200, 298, 299)
    inside, _ = chunks_of(runner, 0, prompt, 297, save_at=points)  # the last chunk has as many tokens as the slack
    for count, at in enumerate(points, 1):
        runner.restore(1, inside[:count])
        (rest,) = runner.submit([Row(1, at, prompt[at:], GREEDY, prompt)]).wait()
        # Chunks of other lengths round otherwise, which changes an 8-bit code here and there, by 6e-5 in the end.
        assert rest.token == expected[0].token and abs(rest.logprob - expected[0].logprob) < 3e-4
        runner.release(1)
    runner.close()
