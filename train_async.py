"""When the Distiller works: beside the LLM, on a second CUDA stream, ordered by events alone.

    time →        step t                                        step t+1
    main  [lower]●S────[upper]────○P[reweight]●D[draw] [lower]●S────[upper]────○P[reweight]●D[draw]
                 ╲               ╱            ╲              ╲                ╱
    side         ○S[predict φt]●P              ○D[train φt → φt+1]○S[predict φt+1]●P
                                               └ overlaps draw, lower, upper of t+1 ┘
    ●X records event X, ○X waits for it.   S shallow tap ready   P prediction ready   D deep tap ready

1. φ is read and written on *side* only, so stream order is its lock: step t predicts with a φ that was
   trained on exactly the pairs of earlier steps. No staleness, no torn read.
2. Tap slot t % 2 holds (h¹, h^L, live) of step t. Step t+2 rewrites it after main has waited for P(t+1), and
   side ran train(t) before predict(t+1). One slot would not do.
3. The prediction buffer is rewritten by predict(t+1), after S(t+1), which main recorded after reweight(t).

Hence timing can not change a token: overlapped and serial runs agree bit for bit. The argument is also data:
`schedule` lists the operations, `races` searches them for a conflicting pair that no order covers, and tests
hold `AsyncDistiller` to the list. The main stream may go on using a prediction until it records the next S.

With train_every = u, side copies each step's pair into a window of u steps and trains once when it is full. A
Distiller's incomplete last window, whose end none of its rows lived to see, is dropped. On a CPU a `Lane` is
nothing at all: the same program, in order. Only this file uses streams and events.

Shapes: B rows, P Distillers, K rows of each, D width, S slots, U window.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch


class Lane:
    """Device work beside the caller's: `run` queues it on a side stream; without CUDA it runs where called.

    Events are (letter, step) pairs for the reader and the tests. CUDA needs one event per letter: to wait is
    to wait for its latest record, and the host issues records and waits in program order. The side stream has
    the higher priority, as in the paper (B.1): its kernels are small, and the main stream waits for them.
    """

    def __init__(self, device):
        self.stream = torch.cuda.Stream(device, priority=-1) if torch.device(device).type == "cuda" else None
        self.events = defaultdict(torch.cuda.Event)

    def record(self, event):
        """main: everything queued so far comes before `event`."""
        if self.stream is not None:
            self.events[event[0]].record(torch.cuda.current_stream(self.stream.device))

    def wait(self, event):
        """main: everything queued from now on comes after `event`."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(self.events[event[0]])

    def run(self, work, waits=None, records=None):
        """side: calls `work` after `waits`, then records `records`."""
        if self.stream is None:
            return work()
        with torch.cuda.stream(self.stream):
            if waits:
                self.stream.wait_event(self.events[waits[0]])
            work()
            if records:
                self.events[records[0]].record(self.stream)


class AsyncDistiller:
    """A Distiller in time: `predict`, `prediction`, `train`, once each per step t = 0, 1, …; then `finish`.

    rows must be a multiple of the Distiller's P; rows of one Distiller are neighbours. Buffers are allocated
    here, once, and shared by the two streams; whatever a stream makes for itself never leaves it, so no
    memory can be handed from one stream to the other while it is still in use.
    """

    def __init__(self, distiller, rows, width_D, train_every=1, device="cpu", slots=2):
        def buffer(*shape, dtype=torch.float32):
            return torch.zeros(shape, dtype=dtype, device=device)
        self.distiller, self.train_every, self.slots = distiller, train_every, slots
        self.shape_PKD = (len(distiller.step_P), rows // len(distiller.step_P), width_D)
        self.shallow_SBD, self.deep_SBD = buffer(slots, rows, width_D), buffer(slots, rows, width_D)
        self.live_SB = buffer(slots, rows, dtype=torch.bool)
        self.shallow_UBD = buffer(train_every, rows, width_D)
        self.deep_UBD = buffer(train_every, rows, width_D)
        self.live_UB = buffer(train_every, rows, dtype=torch.bool)
        self.predicted_BD, self.step = buffer(rows, width_D), None
        self.lane = Lane(device)                        # φ and the buffers were made on main, before S(0)

    @torch.no_grad()
    def predict(self, t, shallow_BD, live_B):
        """Starts ĥ = f_φ(h¹) for step t; live_B says whose pair of this step may train."""
        slot, self.step = t % self.slots, t
        self.shallow_SBD[slot].copy_(shallow_BD)
        self.live_SB[slot].copy_(live_B)
        self.lane.record(("S", t))

        def work():
            predicted_PKD = self.distiller.predict(self.shallow_SBD[slot].view(self.shape_PKD))
            self.predicted_BD.copy_(predicted_PKD.flatten(0, 1))
        self.lane.run(work, waits=("S", t), records=("P", t))

    def prediction(self):
        """ĥ (B, D) fp32 of the step begun last; valid until the next `predict`."""
        self.lane.wait(("P", self.step))
        return self.predicted_BD

    @torch.no_grad()
    def train(self, t, deep_BD):
        """Starts the update on step t's pairs (eq. 10), or stores them until the window is full."""
        slot, at = t % self.slots, t % self.train_every
        self.deep_SBD[slot].copy_(deep_BD)
        self.lane.record(("D", t))

        def work():
            self.shallow_UBD[at].copy_(self.shallow_SBD[slot])
            self.deep_UBD[at].copy_(self.deep_SBD[slot])
            self.live_UB[at].copy_(self.live_SB[slot])
            if at == self.train_every - 1:
                window = (self.shallow_UBD, self.deep_UBD, self.live_UB)
                shallow_PKD, deep_PKD, live_PK = (self._by_distiller(x) for x in window)
                reached_P1 = self.live_UB[at].view(self.shape_PKD[:2]).any(-1, keepdim=True)
                self.distiller.train(shallow_PKD, deep_PKD, live_PK & reached_P1)
        self.lane.run(work, waits=("D", t))

    def _by_distiller(self, window):
        """(U, B, …) → (P, U·K, …): a window's rows, grouped by the Distiller they belong to."""
        P, K, _ = self.shape_PKD
        return window.unflatten(1, (P, K)).transpose(0, 1).flatten(1, 2)

    def finish(self):
        """main waits for all side work: from here on φ may be read, kept or freed."""
        self.lane.run(lambda: None, records=("F", 0))
        self.lane.wait(("F", 0))


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


def schedule(steps, slots=2, train_every=1):
    """The operations of `steps` steps in the order the host issues them: a list of `Op`."""
    ops = []
    for t in range(steps):
        shallow, deep, updates = f"shallow[{t % slots}]", f"deep[{t % slots}]", t // train_every
        window, full = (f"window[{t % train_every}]", t), (t + 1) % train_every == 0
        older = tuple((f"window[{s % train_every}]", s) for s in range(t + 1 - train_every, t))
        ops += [
            Op("main", f"lower {t}", writes=((shallow, t),), records=(("S", t),)),
            Op("side", f"predict {t}", reads=((shallow, t), ("φ", updates)), writes=(("ĥ", t),),
               waits=(("S", t),), records=(("P", t),)),
            Op("main", f"reweight {t}", reads=(("ĥ", t),), waits=(("P", t),)),
            Op("main", f"deep {t}", writes=((deep, t),), records=(("D", t),)),
            Op("side", f"train {t}", waits=(("D", t),),
               reads=((shallow, t), (deep, t)) + ((*older, ("φ", updates)) if full else ()),
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
