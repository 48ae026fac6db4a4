"""Streams that run ahead: the device computes while the caller is busy with the last result."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import normal

import eqx_cogvae as cv
from eqx_cogvae._transforms import streamed as module


def counting(x, cache):
    start = 0 if cache is None else cache
    return start + jnp.cumsum(x, axis=1), start + jnp.sum(x, axis=1, keepdims=True)


def slow(x, cache):
    """Takes some tens of milliseconds of a processor."""
    y = jnp.full((500, 500), 1e-3) + x[0, 0, 0]
    for _ in range(20):
        y = jnp.tanh(y @ y)
    result, cache = counting(x, cache)
    return result + 0 * y[0, 0], cache


def seconds(call):
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def test_a_batch_is_computed_while_the_caller_holds_the_last():
    """After a pause that is longer than a batch takes, the next result is there at once.

    The shortest of all waits counts: what else the machine does only makes them longer.
    """
    x = np.ones((1, 9, 1), np.float32)
    waits = {}
    for ahead in (False, True):
        stream = cv.streamed(slow, 1, ahead=ahead)(x)
        jax.block_until_ready(next(stream))
        waits[ahead] = []
        for i in range(8):
            time.sleep(4 * min(waits[False], default=0.1))
            result, wait = seconds(lambda stream=stream: jax.block_until_ready(next(stream)))
            waits[ahead].append(wait)
            assert float(result[0, 0, 0]) == i + 2
    assert min(waits[True]) < min(waits[False]) / 3


@pytest.mark.parametrize("ahead", [None, True])
def test_one_batch_is_in_flight(ahead, monkeypatch):
    """However slow the caller is, and none is dispatched before the one before it is done."""
    dispatched, real = [], module.jitted_step

    def dispatch(*args):
        assert all(result.is_ready() for result, _ in dispatched)
        dispatched.append(real(*args))
        return dispatched[-1]

    monkeypatch.setattr(module, "jitted_step", dispatch)
    stream = cv.streamed(slow, 1, ahead=ahead)(np.ones((1, 4, 1), np.float32))
    for given, _ in enumerate(stream, 1):
        time.sleep(0.05)
        assert len(dispatched) == min(given + 1, 4)


def test_two_caches_are_held():
    """The one before the batch in flight and the one behind it, however long the clip."""
    shape = (1, 1, 7, 11, 13)
    held = lambda: sum(x.shape == shape for x in jax.live_arrays())  # noqa: E731
    x = np.ones((1, 20, *shape[2:]), np.float32)
    stream = cv.streamed(lambda x, c: (x.sum((2, 3, 4)), counting(x, c)[1]), 1)(x)
    before = held()
    for _ in range(15):
        next(stream)
        assert held() - before <= 2
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(stream.cache))


STEPS = {
    "keeps its cache": lambda x, c: (x + 1, jnp.zeros(3) if c is None else c),
    "gives its cache": lambda x, c: (jnp.zeros_like(x) if c is None else c,) * 2,
    "one array for both": lambda x, c: (x + (0 if c is None else c),) * 2,
}


@pytest.mark.parametrize("step", STEPS)
def test_results_and_caches_that_are_one_array(step):
    x = normal((1, 5, 2))
    results = list(cv.streamed(STEPS[step], 1)(x))
    due = list(cv.streamed(STEPS[step], 1, ahead=False)(iter(jnp.split(x, 5, axis=1))))
    for got, other in zip(results, due, strict=True):
        assert not got.is_deleted()
        np.testing.assert_allclose(got, other, rtol=1e-6)


def test_an_iterator_is_read_ahead_on_request_only():
    """What it gives may follow from the results so far."""
    read = []

    def feed():
        for i in range(4):
            read.append(i)
            yield np.full((1, 1, 2, 2, 1), float(i), np.float32)

    for ahead, more in ((None, 0), (True, 1)):
        read.clear()
        for given, _ in enumerate(cv.streamed(counting, 1, ahead=ahead)(feed()), 1):
            assert len(read) == min(given + more, 4)


def test_an_error_is_heard_when_its_result_is_due():
    """A list, as its frames are all there, is run ahead of: the third piece is another size."""
    pieces = [np.ones((1, 1, 2, w, 1), np.float32) for w in (2, 2, 3)]
    stream = cv.streamed(counting, 1)(pieces)
    done = [np.asarray(next(stream)), np.asarray(next(stream))]
    assert stream.frame == 2
    cache = jax.tree.map(jnp.copy, stream.cache)
    with pytest.raises(
        ValueError, match="stopped at frame 2; the frames before it are done: frames ch"
    ):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    (rest,) = cv.streamed(counting, 1)(pieces[0], cache=cache)
    assert [float(piece[0, 0, 0, 0, 0]) for piece in (*done, rest)] == [1, 2, 3]


def test_an_interrupt_while_waiting_loses_nothing(monkeypatch):
    """The result that was waited for comes when it is asked for again, or from the cache."""
    x, real = normal((1, 5, 1, 1, 1)), jax.block_until_ready
    due = np.cumsum(np.asarray(x), axis=1)
    stream = cv.streamed(counting, 1)(x)
    done = [np.asarray(next(stream)), np.asarray(next(stream))]

    def interrupted(tree):
        monkeypatch.setattr(module.jax, "block_until_ready", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(module.jax, "block_until_ready", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        next(stream)
    assert stream.frame == 2
    resumed = cv.streamed(counting, 1)(x[:, 2:], cache=stream.cache)
    for rest in (stream, resumed):
        got = np.concatenate([*done, *map(np.asarray, rest)], axis=1)
        np.testing.assert_allclose(got, due, rtol=1e-5)
