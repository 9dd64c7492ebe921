"""The engine with its thread: many callers, streams that end, cancel and fail, and nothing that hangs."""

import asyncio
import gc
import queue
import threading
import time
import weakref

import pytest

from tests.runtime.fake import LIMITS, FakeModel, expected
from tests.runtime.tokenizers_made import byte_level
from tilewright.compiler.errors import RequestError
from tilewright.runtime.engine import Engine
from tilewright.runtime.request import Request
from tilewright.runtime.tokenizer import Tokenizer
from tilewright.runtime.types import DeviceLimits, EngineError, EngineLimits, SamplingParams

pytestmark = pytest.mark.timeout(30)


class GatedModel(FakeModel):
    """Waits at a gate before every step, to catch the engine in the middle of things."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.broken = False

    def step(self, batch):
        self.entered.set()
        assert self.gate.wait(20)
        if self.broken:
            raise MemoryError("the device is gone")
        return super().step(batch)


def idle(engine: Engine) -> None:
    """Waits until all is done, then checks the books."""
    end = time.monotonic() + 10
    while engine._core.busy and time.monotonic() < end:
        time.sleep(0.001)
    engine.check_invariants()
    assert engine._core.pool.free == LIMITS.num_pages


@pytest.mark.parametrize("ahead", [False, True], ids=["in_step", "ahead"])
def test_generate_in_order(ahead: bool) -> None:
    with Engine(FakeModel(runs_ahead=ahead), EngineLimits(max_queue=2)) as engine:
        prompts = [[i, i + 1] for i in range(20)]
        params = [SamplingParams(max_tokens=1 + i % 7, seed=i, n=1 + i % 2) for i in range(20)]
        completions = engine.generate(prompts, params)
        said = [(c.index, list(c.token_ids)) for c in completions]
        assert said == [(k, expected(p, q, k)) for p, q in zip(prompts, params, strict=True) for k in range(q.n)]
        idle(engine)


def test_timings_and_deadlines_count_from_submission() -> None:
    """With the engine's own clock, whose zero is long ago."""
    with Engine(FakeModel()) as engine:
        begun = time.perf_counter()
        [done] = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True, deadline_s=20))
        *_, last = engine.stream_sync([4, 5], SamplingParams(max_tokens=4, ignore_eos=True, deadline_s=20))
        elapsed_ms = 1e3 * (time.perf_counter() - begun)
        for completion in (done, last.completion):
            times = completion.timings
            assert completion.finish_reason == "length"
            assert 0 <= times.queue_ms <= times.ttft_ms <= times.ttft_ms + 3 * times.itl_ms <= elapsed_ms


def test_text_in_text_out() -> None:
    tokenizer = Tokenizer(byte_level(), {"chat_template": "{{ messages[0].content }}"})
    model = FakeModel(DeviceLimits(**{**LIMITS.__dict__, "vocab_size": tokenizer.vocab_size}), tokenizer)
    with Engine(model) as engine:
        params = SamplingParams(max_tokens=12, seed=3)
        text, ids, chat = engine.generate(
            ["the dog", tokenizer.encode("the dog"), [{"role": "user", "content": "the dog"}]], params
        )
        assert text.text == ids.text == chat.text == tokenizer.decode(text.token_ids)
        assert text.prompt_tokens == len(tokenizer.encode("the dog"))
        assert engine.generate("the dog", params)[0].text == text.text
        events = list(engine.stream_sync("the dog", params))
        assert "".join(e.text for e in events) == text.text
        assert [e.token_id for e in events] == list(text.token_ids)
        assert events[-1].completion.token_ids == text.token_ids


def test_nothing_runs_if_one_prompt_is_wrong() -> None:
    with Engine(FakeModel()) as engine:
        with pytest.raises(RequestError, match="empty"):
            engine.generate([[1], []], SamplingParams(max_tokens=3))
        with pytest.raises(RequestError, match="2 sampling parameters for 1 prompts"):
            engine.generate([[1]], [SamplingParams()] * 2)
        assert engine.stats.steps == 0


def test_many_streams_at_once() -> None:
    async def one(engine: Engine, i: int) -> list[int]:
        params = SamplingParams(max_tokens=3 + i % 9, seed=i, temperature=i % 2)
        said = [event.token_id async for event in engine.stream([i % 50, 7], params)]
        assert said == expected([i % 50, 7], params)
        return said

    async def all_of_them(engine: Engine) -> list[list[int]]:
        return await asyncio.gather(*(one(engine, i) for i in range(40)))

    with Engine(FakeModel()) as engine:
        assert len(asyncio.run(all_of_them(engine))) == 40
        assert len(asyncio.run(all_of_them(engine))) == 40, "a second event loop"
        idle(engine)


def test_leaving_a_stream_cancels_it() -> None:
    async def leave(engine: Engine) -> None:
        stream = engine.stream([1], SamplingParams(max_tokens=90, seed=0))
        async for _ in stream:
            break
        await stream.aclose()

    async def cancel_task(engine: Engine) -> None:
        async def consume() -> None:
            async for _ in engine.stream([2], SamplingParams(max_tokens=90, seed=0)):
                await asyncio.sleep(0)

        task = asyncio.create_task(consume())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    model = GatedModel()
    with Engine(model) as engine:
        model.gate.set()
        asyncio.run(leave(engine))
        asyncio.run(cancel_task(engine))
        next(stream := engine.stream_sync([3], SamplingParams(max_tokens=90, seed=0)))
        stream.close()
        idle(engine)


def test_a_closed_event_loop_cancels_its_requests() -> None:
    model = GatedModel()
    with Engine(model) as engine:
        loop = asyncio.new_event_loop()
        stream = engine.stream([1], SamplingParams(max_tokens=90, seed=0))
        task = loop.create_task(anext(stream))
        loop.run_until_complete(asyncio.sleep(0))
        assert model.entered.wait(10)
        task.cancel()
        loop.close()
        model.gate.set()
        idle(engine)
        assert engine.stats.drawn < 90


def test_a_step_wakes_the_event_loop_once_for_all_streams() -> None:
    streams, params = LIMITS.max_batch, SamplingParams(max_tokens=20, ignore_eos=True, seed=3)
    woken, heard = 0, []

    async def read(engine: Engine, i: int) -> None:
        events = engine.open([engine.request([i], params)])
        await events.listen(lambda _, event: heard.append((i, event.token_id)))

    async def all_of_them(engine: Engine) -> None:
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe

        def counted(*args: object) -> asyncio.Handle:
            nonlocal woken
            woken += 1
            return wake(*args)

        loop.call_soon_threadsafe = counted
        await asyncio.gather(*(read(engine, i) for i in range(streams)))

    with Engine(FakeModel()) as engine:
        asyncio.run(all_of_them(engine))
        for i in range(streams):
            assert [token for who, token in heard if who == i] == expected([i], params), "events are out of order"
        assert woken <= engine.stats.steps + streams < len(heard), "steps, and news that a request is queued"


def test_what_a_listener_raises_ends_its_stream_alone() -> None:
    async def check(engine: Engine) -> None:
        params = SamplingParams(max_tokens=9, ignore_eos=True)
        bad, good = engine.open([engine.request([1], params)]), engine.open([engine.request([2], params)])
        heard: list[int] = []

        async def hear_badly() -> None:
            with pytest.raises(ZeroDivisionError):
                await bad.listen(lambda *_: 1 // 0)
            bad.leave()

        await asyncio.gather(hear_badly(), good.listen(lambda _, event: heard.append(event.token_id)))
        assert len(heard) == 9

    with Engine(FakeModel()) as engine:
        asyncio.run(check(engine))
        idle(engine)


def test_requests_that_have_ended_are_gone_from_memory() -> None:
    """By reference counts alone: the collector would hold up every stream for them."""
    seen: list[weakref.ref] = []

    def watched(engine: Engine) -> None:
        make = engine._intake.request

        def request(*args: object) -> Request:
            made = make(*args)
            seen.extend(weakref.ref(part) for part in (made, *(sample.output for sample in made.samples)))
            return made

        engine._intake.request = request

    async def streams(engine: Engine) -> None:
        async for _ in engine.stream([1], SamplingParams(max_tokens=5)):
            pass
        left = engine.stream([1], SamplingParams(max_tokens=90, ignore_eos=True))
        await anext(left)
        await left.aclose()

    gc.collect()
    gc.disable()
    try:
        with Engine(FakeModel()) as engine:
            watched(engine)
            engine.generate([[1], [2]], SamplingParams(n=2, max_tokens=5))
            next(stream := engine.stream_sync([3], SamplingParams(max_tokens=90, ignore_eos=True)))
            stream.close()
            asyncio.run(streams(engine))
            idle(engine)
            kept = len(seen)
            engine.generate([[4]], SamplingParams(max_tokens=2))  # the engine remembers the last step's rows
            assert kept == 12 and not any(part() for part in seen[:kept])
    finally:
        gc.enable()


def test_full_queue_refuses_streams_and_holds_generate_back() -> None:
    model = GatedModel()
    with Engine(model, EngineLimits(max_batch=1, max_queue=1)) as engine:
        done: list[object] = []
        worker = threading.Thread(
            target=lambda: done.extend(engine.generate([[i] for i in range(5)], PARAMS)), daemon=True
        )
        worker.start()
        assert model.entered.wait(10)
        end = time.monotonic() + 10
        while len(engine._core._inbox) < 1 and time.monotonic() < end:
            time.sleep(0.001)
        with pytest.raises(RequestError, match="1 requests are waiting"):
            next(engine.stream_sync([1], PARAMS))
        model.gate.set()
        worker.join(20)
        assert len(done) == 5
        idle(engine)


PARAMS = SamplingParams(max_tokens=4, seed=1)


def test_a_dead_device_ends_everything() -> None:
    model = GatedModel()
    model.broken = True
    engine = Engine(model, EngineLimits(max_batch=1, max_queue=1))
    errors: list[BaseException] = []

    def caller() -> None:
        try:
            engine.generate([[1], [2], [3], [4]], PARAMS)
        except BaseException as error:
            errors.append(error)

    async def streamer() -> None:
        async for _ in engine.stream([1], PARAMS):
            raise AssertionError("a dead device said something")

    threads = [threading.Thread(target=caller, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert model.entered.wait(10)
    model.gate.set()
    for thread in threads:
        thread.join(10)
    assert [type(e) for e in errors] == [EngineError] * 3
    assert all("the device is gone" in str(e) for e in errors)
    assert isinstance(engine.failure, MemoryError)
    with pytest.raises(EngineError, match="dead: the device is gone"):
        asyncio.run(streamer())
    with pytest.raises(EngineError, match="dead"):
        engine.generate([[1]], PARAMS)
    engine.close()


def test_close_ends_what_runs() -> None:
    model = GatedModel()
    engine = Engine(model)
    stream = engine.stream_sync([1], SamplingParams(max_tokens=90, seed=0))
    model.gate.set()
    next(stream)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        for _ in stream:
            pass
    with pytest.raises(EngineError, match="closed"):
        engine.generate([[1]], PARAMS)
    unused = Engine(FakeModel())
    unused.close()
    with pytest.raises(EngineError, match="closed"):
        unused.generate([[1]], PARAMS)


def test_an_abandoned_engine_stops_its_thread() -> None:
    engine = Engine(FakeModel())
    engine.generate([[1]], PARAMS)
    thread = engine._thread._thread
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    thread.join(10)
    assert gone() is None and not thread.is_alive()


def test_interrupting_generate_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches the caller while it waits, in the middle of the first step."""
    model = GatedModel()

    class Interrupted(queue.SimpleQueue):
        def get(self) -> None:
            assert model.entered.wait(10)
            raise KeyboardInterrupt

    monkeypatch.setattr(queue, "SimpleQueue", Interrupted)
    with Engine(model) as engine:
        with pytest.raises(KeyboardInterrupt):
            engine.generate([[1], [2]], SamplingParams(max_tokens=90, seed=0))
        model.gate.set()
        idle(engine)
        assert engine.failure is None and engine.stats.steps <= 2


def test_an_idle_engine_sleeps() -> None:
    with Engine(FakeModel()) as engine:
        engine.generate([[1]], PARAMS)
        idle(engine)
        before = time.process_time()
        time.sleep(0.2)
        assert time.process_time() - before < 0.1
