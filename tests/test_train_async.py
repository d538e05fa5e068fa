"""Timing changes nothing: race checker, the schedule against the code, every token under delayed lanes."""

import contextlib
import dataclasses

import pytest
import torch
from conftest import TINY, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import decode
import train_async
from decode import ESampConfig, SamplingConfig, generate
from distiller import Distiller, DistillerConfig
from train_async import AsyncDistiller, Lane, Op, races, schedule

# ------------------------------------------------------------------------------
# the schedule as data
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("train_every", [1, 2, 3, 4])
def test_the_schedule_has_no_race(train_every):
    assert races(schedule(13, train_every=train_every)) == []


def test_planted_bugs_are_found():
    no_copy = [dataclasses.replace(op, reads=tuple((p.replace("held", "shallow"), t) for p, t in op.reads))
               if op.name.startswith("train") else op for op in schedule(6)]
    assert ("train 0", "lower 1") in races(no_copy)      # training on main's buffer needs a second one
    no_wait = [dataclasses.replace(op, waits=()) if op.name.startswith("reweight") else op
               for op in schedule(6)]
    assert ("predict 0", "reweight 0") in races(no_wait)
    for missing in ("predict", "train", "finish"):
        ops = [dataclasses.replace(op, waits=()) if op.name.startswith(missing) else op for op in schedule(6)]
        assert races(ops), missing


def test_an_ordered_overwrite_is_no_race_but_stale():
    ops = [Op("main", "write 0", writes=(("slot", 0),)),
           Op("main", "write 1", writes=(("slot", 1),), records=("E",)),
           Op("side", "read 0", reads=(("slot", 0),), waits=("E",))]
    assert races(ops) == [("write 1", "read 0")]
    unordered = [ops[0], dataclasses.replace(ops[1], records=()),
                 dataclasses.replace(ops[0], name="e", writes=(), records=("E",)), ops[2]]
    assert races(unordered) == [("write 1", "read 0")]
    late = [dataclasses.replace(op, reads=tuple((p, v + (p == "φ")) for p, v in op.reads))
            if op.name == "predict 3" else op for op in schedule(6)]
    assert races(late) == [("train 2", "predict 3")]     # who names a φ of the future meets an older one


class Recorder(Lane):
    """A lane that also writes down what it was asked for."""

    def __init__(self, device, overlap=True):
        super().__init__(device, overlap)
        self.log = []

    def record(self, event):
        self.log.append(("main", (), (event,)))

    def wait(self, event):
        self.log.append(("main", (event,), ()))

    def run(self, work, name, waits=None, records=None):
        self.log.append(("side", (waits,) if waits else (), (records,) if records else ()))
        return super().run(work, name)


@pytest.mark.parametrize("train_every", [1, 3])
def test_the_code_follows_the_schedule(monkeypatch, train_every):
    monkeypatch.setattr(train_async, "Lane", Recorder)
    side = AsyncDistiller(Distiller(DistillerConfig(width=4), 2, 6), 4, 6, train_every)
    for t in range(5):
        side.predict(t, torch.randn(4, 6))
        assert not side.prediction().requires_grad       # no graph grows from step to step
        side.train(t, torch.randn(4, 6), torch.ones(4, dtype=torch.bool))
    side.finish()
    assert side.lane.log == [(op.stream, op.waits, op.records) for op in schedule(5, train_every=train_every)]


# ------------------------------------------------------------------------------
# delayed lanes
# ------------------------------------------------------------------------------

def delayed(choices):
    """A lane whose side work runs late: after any call, as many queued pieces as `choices` says.

    All that an event orders before main's wait runs there at the latest.
    """
    pick = iter(choices)

    class Delayed(Lane):
        def __init__(self, device, overlap=True):
            self.queue, self.ran_late = [], 0

        def some(self):
            for _ in range(min(next(pick, 0), len(self.queue))):
                self.queue.pop(0)[0]()

        def record(self, event):
            self.some()

        def run(self, work, name, waits=None, records=None):
            self.queue.append((work, records))
            self.some()

        def wait(self, event):
            while any(records == event for _, records in self.queue):
                self.queue.pop(0)[0]()
                Delayed.late += 1
            self.some()
    Delayed.late = 0
    return Delayed


MODEL = random_model(TINY)
PROMPTS = [[1, 2, 3, 4, 5], [9, 8], [7, 7, 7]]
SAMPLING = SamplingConfig(n=3, max_new_tokens=14, seed=5)


def run(lane=Lane, sampling=SAMPLING, **knobs):
    """(tokens, novelties, final weights) of one run; a short EOS set makes rows finish at different steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_async, "Lane", lane)
        esamp = ESampConfig(**dict(dict(beta=2.0, width=16, lr=1e-2), **knobs))
        result = generate(MODEL, PROMPTS, sampling, esamp, eos_ids={4, 11})
    weights = [w.detach().clone() for w in result.distillers.state()]
    return [(s.token_ids, s.novelty) for s in result.samples], weights


SERIAL = {(u, scope, kind): run(train_every=u, scope=scope, kind=kind)
          for u in (1, 4) for scope in ("prompt", "batch") for kind in ("swiglu", "rls")}


@given(st.lists(st.integers(0, 3), min_size=60, max_size=60), st.sampled_from(sorted(SERIAL)))
@settings(max_examples=40)
def test_any_delay_gives_the_serial_tokens_bit_for_bit(choices, setting):
    lane = delayed(choices)
    train_every, scope, kind = setting
    tokens, weights = run(lane, train_every=train_every, scope=scope, kind=kind)
    assert tokens == SERIAL[setting][0]
    assert all(torch.equal(a, b) for a, b in zip(weights, SERIAL[setting][1], strict=True))
    assert lane.late > 0


def test_the_delayed_lane_would_notice(monkeypatch):
    """Training on main's own buffer, or a prediction not waited for: the longest delay changes the run."""
    lengths = {len(t) for t, _ in SERIAL[1, "prompt", "swiglu"][0]}
    assert len(lengths) > 2                              # ragged finishing is part of the test

    class NoCopy(AsyncDistiller):
        def _train(self, at):
            self.held_BD = self.shallow_BD
            super()._train(at)
    monkeypatch.setattr(decode, "AsyncDistiller", NoCopy)
    assert run(delayed([]))[0] != SERIAL[1, "prompt", "swiglu"][0]
    hasty = type("Hasty", (AsyncDistiller,), {"prediction": lambda self: self.predicted_BD})
    monkeypatch.setattr(decode, "AsyncDistiller", hasty)
    assert run(delayed([]))[0] != SERIAL[1, "prompt", "swiglu"][0]


def test_the_step_predicts_with_all_earlier_windows_and_no_other_pairs():
    """φ of step t, replayed by hand from the pairs of steps < u·⌊t/u⌋: no staleness.

    A Distiller's incomplete last window is dropped.
    """
    for u in (1, 3, 4):
        g = torch.Generator().manual_seed(u)
        ends = torch.tensor([2, 5, 14, 9])               # the first Distiller's rows end before step 5
        taps = [(torch.randn(4, 6, generator=g), torch.randn(4, 6, generator=g), t < ends) for t in range(14)]
        config = DistillerConfig(width=5, lr=1e-2)
        ours, oracle = Distiller(config, 2, 6), Distiller(config, 2, 6)
        side = AsyncDistiller(ours, 4, 6, u)
        for t, (shallow, deep, live) in enumerate(taps):
            side.predict(t, shallow)
            found, expected = side.prediction(), oracle.predict(shallow.view(2, 2, 6)).view(4, 6)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            side.train(t, deep, live)
            if (t + 1) % u == 0:
                grouped = [[x.unflatten(0, (2, 2)) for x in tap] for tap in taps[t + 1 - u:t + 1]]
                shallow_PUK, deep_PUK, live_PUK = (torch.stack(x, 1) for x in zip(*grouped, strict=True))
                for p in range(2):
                    live_PUK[p] &= bool(live_PUK[p, -1].any())
                oracle.train(*(x.flatten(1, 2) for x in (shallow_PUK, deep_PUK, live_PUK)))
        side.finish()
        assert ours.step_P.tolist() == [5 // u, 14 // u]


class FakeEvent:
    """Knows which stream recorded it last."""

    stream = None

    def record(self, stream):
        self.stream = stream


class FakeStream:
    """A stream on which nothing runs; it refuses to wait for what nobody has recorded."""

    current = None

    def __init__(self, device, priority=0):
        self.device, self.priority, self.waited = device, priority, []

    def wait_event(self, event):
        assert event.stream not in (None, self)          # recorded, and by the other stream
        self.waited.append(event)

    @contextlib.contextmanager
    def entered(self):
        outer, FakeStream.current = FakeStream.current, self
        yield
        FakeStream.current = outer


def test_the_cuda_branch_of_the_lane_speaks_to_its_streams(monkeypatch):
    """The lines that only a GPU runs, with stand-ins for streams and events: what is ordered, no more."""
    main, works = FakeStream("cuda"), []
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream.entered())
    lane = Lane("cuda")
    assert lane.stream.priority == -1
    lane.record(("S", 0))
    lane.graphs.on = False
    lane.run(lambda: works.append(FakeStream.current), "work", waits=("S", 0), records=("P", 0))
    lane.wait(("P", 0))
    lane.record(("S", 1))
    lane.run(lambda: works.append(FakeStream.current), "work", waits=("S", 1), records=("P", 1))
    lane.wait(("P", 1))
    assert works == [lane.stream] * 2 and FakeStream.current is None
    assert lane.stream.waited == [lane.events["S"]] * 2 and main.waited == [lane.events["P"]] * 2
    assert lane.events["S"].stream is main and lane.events["P"].stream is lane.stream
    assert set(lane.events) == {"S", "P"}                # one event per letter, however many steps
    class Pretend(Lane):
        def __init__(self, device, overlap):
            super().__init__("cuda", overlap)
            self.graphs.on = False
    assert run(Pretend)[0] == SERIAL[1, "prompt", "swiglu"][0]


# ------------------------------------------------------------------------------
# no host synchronisation
# ------------------------------------------------------------------------------

class NoSync(TorchDispatchMode):
    """Fails on the operations with which a host reads a device, unless a look is on."""

    looking = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        words = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select")
        reads = any(word in str(func) for word in words)
        if str(func).startswith("aten.index."):
            reads |= any(i is not None and i.dtype == torch.bool for i in args[1])           # x[mask]
        if reads and not NoSync.looking:
            raise AssertionError(f"{func} reads the device outside a look")
        return func(*args, **(kwargs or {}))


def forbid_reads(patch):
    """The same for what the dispatcher does not see on a CPU: tolist, cpu, numpy."""
    for name in ("tolist", "cpu", "numpy", "__array__"):
        plain = getattr(torch.Tensor, name)

        def read(self, *args, plain=plain, name=name, **kw):
            assert NoSync.looking, f"Tensor.{name} reads the device outside a look"
            return plain(self, *args, **kw)
        patch.setattr(torch.Tensor, name, read)


@pytest.mark.parametrize("plain_form", [False, True])
def test_the_hot_loop_never_reads_the_device(monkeypatch, plain_form):
    looks, plain = [], decode.Run.look

    def look(self, step):
        NoSync.looking = True
        looks.append(step)
        try:
            return plain(self, step)
        finally:
            NoSync.looking = False
    monkeypatch.setattr(decode.Run, "look", look)
    monkeypatch.setattr(decode, "look_every", lambda device: decode.LOOK_EVERY)
    sampling = SamplingConfig(n=2, max_new_tokens=40, seed=1, top_k=20, top_p=0.95, min_p=0.01)

    def on_step(t, finished):                            # the guard is on from the first step to the last
        if t == 0:
            guard.__enter__()
            forbid_reads(forbidden)
        if t == 39:
            forbidden.undo()
            guard.__exit__(None, None, None)
    guard, forbidden = NoSync(), pytest.MonkeyPatch()
    try:
        generate(MODEL, PROMPTS, sampling, ESampConfig(width=8), eos_ids=set(), on_step=on_step,
                 plain=plain_form)
    finally:
        forbidden.undo()
    assert looks == [0, 16, 32, 39]
    x = torch.ones(2)
    with pytest.MonkeyPatch.context() as patch, NoSync():
        forbid_reads(patch)
        for read in (lambda: x.sum().item(), lambda: bool(x[0] > 0), lambda: x.tolist(), lambda: x.cpu(),
                     lambda: x[x > 0], lambda: x.nonzero()):
            with pytest.raises(AssertionError, match="outside a look"):
                read()


# ------------------------------------------------------------------------------
# on a GPU
# ------------------------------------------------------------------------------

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize("where", ["main", "side", "both"])
def test_cuda_sleeps_in_either_stream_change_nothing(where):
    class Sleepy(Lane):
        def record(self, event):
            if where != "side":
                torch.cuda._sleep(200_000)
            super().record(event)

        def run(self, work, name, waits=None, records=None):
            def slow():
                torch.cuda._sleep(400_000)
                work()
            super().run(slow if where != "main" else work, name, waits, records)
    model = random_model(TINY).cuda()

    def tokens(lane):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_async, "Lane", lane)
            esamp = ESampConfig(beta=2.0, width=16, lr=1e-2)
            result = generate(model, PROMPTS, SAMPLING, esamp, eos_ids={4, 11})
        return [(s.token_ids, s.novelty) for s in result.samples]

    class Serial(Lane):
        def __init__(self, device, overlap):
            super().__init__(device, overlap=False)
    assert tokens(Sleepy) == tokens(Serial) == tokens(Lane)


@pytest.mark.cuda
@cuda
def test_cuda_hot_loop_never_synchronises(monkeypatch):
    plain, capture = decode.Run.look, torch.cuda.graph.__enter__

    def look(self, step):
        torch.cuda.set_sync_debug_mode("default")
        found = plain(self, step)
        torch.cuda.set_sync_debug_mode("error")
        return found

    def enter(self):                                     # a capture begins with a synchronisation of its own
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        capture(self)
        torch.cuda.set_sync_debug_mode(mode)
    monkeypatch.setattr(decode.Run, "look", look)
    monkeypatch.setattr(torch.cuda.graph, "__enter__", enter)
    model = random_model(TINY).cuda()
    try:
        generate(model, PROMPTS, SamplingConfig(n=2, max_new_tokens=30, top_k=9), ESampConfig(width=8),
                 eos_ids={4},
                 on_step=lambda t, finished: torch.cuda.set_sync_debug_mode("error" if t < 29 else "default"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
