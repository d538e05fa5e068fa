"""When the Distiller works: beside the LLM, on a second CUDA stream, ordered by events alone.

    time →        step t                                        step t+1
    main  [lower]●S────[upper]────○P[reweight]●D[draw] [lower]●S────[upper]────○P[reweight]●D[draw]
                 ╲               ╱            ╲              ╲                ╱
    side         ○S[predict φt]●P              ○D[train φt → φt+1]○S[predict φt+1]●P
                                               └ overlaps draw, lower, upper of t+1 ┘
    ●X records event X, ○X waits for it.   S shallow tap ready   P prediction ready   D deep tap ready

1. φ is read and written on *side* only, so stream order is its lock: step t predicts with a φ that was
   trained on exactly the pairs of earlier steps. No staleness, no torn read.
2. Main hands over h¹ and (h^L, live) in one buffer each. Step t+1 rewrites that of h¹ after main waited for
   P(t), by when side has its own copy to train on; that of h^L after P(t+1), which side ran after train(t).
3. The prediction buffer is rewritten by predict(t+1), after S(t+1), which main recorded after reweight(t).

Hence timing can not change a token: overlapped and serial runs agree bit for bit. The argument is also data:
`schedule` lists the operations, `races` searches them for a conflicting pair that no order covers, and tests
hold `AsyncDistiller` to the list. The main stream may go on using a prediction until it records the next S.

With train_every = u, side collects a window of u steps and trains once when it is full. A Distiller's
incomplete last window, whose end none of its rows lived to see, is dropped; a step at which no row was live
is void and leaves everything as it was. Streams hide GPU time, not launch time: `Graphs` replays whole
functions at the price of one launch. On a CPU a `Lane` is nothing at all: the same program, in order. Only
this file uses streams, events and graphs.

Shapes: B rows, P Distillers, K rows of each, D width, U window.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch


class Graphs:
    """Functions of no arguments, replayed as CUDA graphs; without CUDA they are simply called.

    A function may depend on `key` and on the content of tensors that stay where they are, on nothing else.
    Its first call is a rehearsal, in which libraries set themselves up; the second is captured; from then on
    the captured launches are replayed, into the same output tensors. Another key forgets all graphs.
    """

    def __init__(self, device, stream=None):
        self.on, self.stream, self.key, self.held = torch.device(device).type == "cuda", stream, None, {}

    def run(self, name, function, key=None):
        """What `function` returns."""
        if not self.on:
            return function()
        if key != self.key:
            self.key, self.held = key, {}
        if name not in self.held:
            self.held[name] = None
            return function()
        if self.held[name] is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                result = function()
            self.held[name] = graph, result
        graph, result = self.held[name]
        graph.replay()
        return result


class Lane:
    """Device work beside the caller's: `run` queues it on a side stream; without CUDA it runs where called.

    Events are (letter, step) pairs for the reader and the tests. CUDA needs one event per letter: to wait is
    to wait for its latest record, and the host issues records and waits in program order. The side stream has
    the higher priority, as in the paper (B.1): its kernels are small, and the main stream waits for them.
    Without `overlap` all runs on the caller's stream.
    """

    def __init__(self, device, overlap=True):
        on_cuda = torch.device(device).type == "cuda"
        self.stream = torch.cuda.Stream(device, priority=-1) if on_cuda and overlap else None
        self.events, self.graphs = defaultdict(torch.cuda.Event), Graphs(device, self.stream)

    def record(self, event):
        """main: everything queued so far comes before `event`."""
        if self.stream is not None:
            self.events[event[0]].record(torch.cuda.current_stream(self.stream.device))

    def wait(self, event):
        """main: everything queued from now on comes after `event`."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(self.events[event[0]])

    def run(self, work, name, waits=None, records=None):
        """side: calls `work` after `waits`, then records `records`; one graph for each name."""
        if self.stream is None:
            return self.graphs.run(name, work)
        with torch.cuda.stream(self.stream):
            if waits:
                self.stream.wait_event(self.events[waits[0]])
            self.graphs.run(name, work)
            if records:
                self.events[records[0]].record(self.stream)


class AsyncDistiller:
    """A Distiller in time: `predict`, `prediction`, `train`, once each per step t = 0, 1, …; then `finish`.

    rows must be a multiple of the Distiller's P; rows of one Distiller are neighbours. Buffers are allocated
    here, once, and shared by the two streams; whatever a stream makes for itself never leaves it, so no
    memory can be handed from one stream to the other while it is still in use.
    """

    def __init__(self, distiller, rows, width_D, train_every=1, device="cpu", overlap=True):
        def buffer(*shape, dtype=torch.float32):
            return torch.zeros(shape, dtype=dtype, device=device)
        self.distiller, self.train_every, self.device, self.overlap = distiller, train_every, device, overlap
        self.shape_PKD = (len(distiller.step_P), rows // len(distiller.step_P), width_D)
        self.shallow_BD, self.deep_BD = buffer(rows, width_D), buffer(rows, width_D)       # main → side
        self.live_B = buffer(rows, dtype=torch.bool)
        self.predicted_BD, self.step = buffer(rows, width_D), None                          # side → main
        self.held_BD = buffer(rows, width_D)                                                # side's own
        self.shallow_UBD, self.deep_UBD = (buffer(train_every, rows, width_D) for _ in range(2))
        self.live_UB = buffer(train_every, rows, dtype=torch.bool)
        self.at_B = torch.arange(rows, device=device)                                       # in the window
        self.home, self.home_P = distiller, None
        self.lane = Lane(device, overlap)               # φ and the buffers were made on main, before S(0)

    @torch.no_grad()
    def predict(self, t, shallow_BD):
        """Starts ĥ = f_φ(h¹) for step t."""
        self.step = t
        self.shallow_BD.copy_(shallow_BD)
        self.lane.record(("S", t))
        self.lane.run(self._predict, "predict", waits=("S", t), records=("P", t))

    def _predict(self):
        """side: keeps h¹ for the training, writes ĥ."""
        self.held_BD.copy_(self.shallow_BD)
        self.predicted_BD.copy_(self.distiller.predict(self.held_BD.view(self.shape_PKD)).flatten(0, 1))

    def prediction(self):
        """ĥ (B, D) fp32 of the step begun last; valid until the next `predict`."""
        self.lane.wait(("P", self.step))
        return self.predicted_BD

    @torch.no_grad()
    def train(self, t, deep_BD, live_B):
        """Starts the update on step t's live pairs (eq. 10), or stores them until the window is full."""
        at = t % self.train_every
        self.deep_BD.copy_(deep_BD)
        self.live_B.copy_(live_B)
        self.lane.record(("D", t))
        self.lane.run(lambda: self._train(at), ("train", at), waits=("D", t))

    def _train(self, at):
        """side: the pair goes into the window, the full window into φ."""
        some = self.live_B.any()                        # otherwise the step is void
        for window, pair in ((self.shallow_UBD, self.held_BD), (self.deep_UBD, self.deep_BD),
                             (self.live_UB, self.live_B)):
            pair_B = torch.zeros_like(window[at]).index_copy_(0, self.at_B, pair)
            window[at] = torch.where(some, pair_B, window[at])
        if at == self.train_every - 1:
            windows = (self.shallow_UBD, self.deep_UBD, self.live_UB)
            shallow_PKD, deep_PKD, live_PK = (self._by_distiller(x) for x in windows)
            reached_P1 = self.live_B.view(self.shape_PKD[:2]).any(-1, keepdim=True)
            self.distiller.train(shallow_PKD, deep_PKD, live_PK & reached_P1)

    def _by_distiller(self, window):
        """(U, B, …) → (P, U·K, …): a window's rows, grouped by the Distiller they belong to."""
        return window.unflatten(1, (self.shape_PKD[0], -1)).transpose(0, 1).flatten(1, 2)

    def fewer(self, t, index_P, row_B):
        """An AsyncDistiller that takes over at step t for some of the rows, all of the Distillers at index_P.

        A window that is not yet full keeps the places of the rows that left: their pairs still train.
        """
        self.finish()
        home_P = index_P if self.home_P is None else self.home_P[index_P]
        part = self.home if len(home_P) == len(self.home.step_P) else self.home.take(home_P)
        fewer = AsyncDistiller(part, len(row_B), self.shape_PKD[2], self.train_every, self.device,
                               self.overlap)
        fewer.home, fewer.home_P = self.home, home_P
        if t % self.train_every:
            for name in ("shallow_UBD", "deep_UBD", "live_UB"):
                by_distiller = getattr(self, name).unflatten(1, (self.shape_PKD[0], -1))
                setattr(fewer, name, by_distiller[:, index_P].flatten(1, 2))
            places = self.live_UB.shape[1] // self.shape_PKD[0]         # of one Distiller in a window
            fewer.at_B = self.at_B[row_B] % places + fewer.at_B // fewer.shape_PKD[1] * places
        return fewer

    def finish(self):
        """main waits for all side work: from here on φ may be read, kept or freed."""
        self.lane.run(lambda: None, "finish", records=("F", 0))
        self.lane.wait(("F", 0))
        if self.distiller is not self.home:
            self.home.put(self.home_P, self.distiller)


# ------------------------------------------------------------------------------
# the same schedule as data
# ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Op:
    """One operation: its reads and writes as (place, version of its content), what it awaits and records."""

    stream: str
    name: str
    reads: tuple = ()
    writes: tuple = ()
    waits: tuple = ()
    records: tuple = ()


def schedule(steps, train_every=1):
    """The operations of `steps` steps in the order the host issues them: a list of `Op`."""
    ops = []
    for t in range(steps):
        updates, full = t // train_every, (t + 1) % train_every == 0
        window = (f"window[{t % train_every}]", t)
        older = tuple((f"window[{s % train_every}]", s) for s in range(t + 1 - train_every, t))
        ops += [
            Op("main", f"lower {t}", writes=(("shallow", t),), records=(("S", t),)),
            Op("side", f"predict {t}", reads=(("shallow", t), ("φ", updates)),
               writes=(("held", t), ("ĥ", t)), waits=(("S", t),), records=(("P", t),)),
            Op("main", f"reweight {t}", reads=(("ĥ", t),), waits=(("P", t),)),
            Op("main", f"deep {t}", writes=(("deep", t),), records=(("D", t),)),
            Op("side", f"train {t}", waits=(("D", t),),
               reads=(("held", t), ("deep", t)) + ((*older, ("φ", updates)) if full else ()),
               writes=(window, ("φ", updates + 1)) if full else (window,)),
        ]
    return ops + [Op("side", "last", records=(("F", 0),)),
                  Op("main", "finish", reads=(("φ", steps // train_every),), waits=(("F", 0),))]


def races(ops):
    """Pairs (earlier, later) of operations that touch one place, one writing, with no order between them.

    Also pairs (writer, reader) where the order is there but the reader meets another version than it names.
    """
    before, last, recorded, found = {}, {}, {}, []       # before[name]: all operations ordered before it
    for i, op in enumerate(ops):
        sources = [last[op.stream]] if op.stream in last else []
        sources += [recorded[event] for event in op.waits]
        before[op.name] = set(sources).union(*(before[name] for name in sources))
        last[op.stream] = op.name
        recorded.update({event: op.name for event in op.records})
        written = {place for place, _ in op.writes}
        for other in ops[:i]:
            theirs = {place for place, _ in other.writes}
            touches = written & (theirs | {p for p, _ in other.reads}) or theirs & {p for p, _ in op.reads}
            if touches and other.name not in before[op.name]:
                found.append((other.name, op.name))
        for place, version in op.reads:
            writes = [(o.name, v) for o in ops[:i] for p, v in o.writes
                      if p == place and o.name in before[op.name]]
            if writes and writes[-1][1] != version:
                found.append((writes[-1][0], op.name))
    return found
