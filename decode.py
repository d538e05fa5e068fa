"""Decoding with ESamp: first the loop, which is the paper's Algorithm 1, then the command line around it.

    python decode.py --esamp                                   the bundled checkpoint on its own prompts
    python decode.py --model path --esamp --prompt "Once"      any Llama / Qwen2 / Qwen3 folder

`generate` takes token ids and returns token ids; text, chat templates and files belong to the second chapter.

A step has two forms that mean the same: `esamp_step` is the paper's page, `fast_step` runs unless plain=True.

Shapes: P prompts of K samples each are B = P·K rows, the rows of a prompt side by side; L positions, D width,
V vocabulary, C candidates, T generated tokens. Token 0 of a row comes from the prefill and is the plain
LLM's; step t of the loop makes token t + 1. The LLM has its own dtype; logits and all that follows are fp32,
draws fp64.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))      # Ctrl-C during the slow imports: no traceback

import torch
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tqdm import tqdm

import model as model_module
from distiller import CHOICES, Batched, DistillerConfig, at_least_one, make_distiller
from esamp import candidates, divergence, draw, keep_mask, mix_hidden, novelty, reweight, uniform
from model import DTYPES, KVCache, ModelConfig, read_json
from train_async import AsyncDistiller, Graphs

LOOK_EVERY = 16                                 # steps between two looks of the host at a device
WIDTHS = (64, 512)                              # candidates that the fast form looks at; then all tokens

# ------------------------------------------------------------------------------
# chapter 1: the loop
# ------------------------------------------------------------------------------


def in_range(name, value, low, high, above=False):
    """ValueError unless value is a finite number with low ≤ value ≤ high (low < value where `above`)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and low <= value <= high and math.isfinite(value) and not (above and value == low)):
        limit = f" to {high}" if high < math.inf else ""
        start = "above" if above else "from"
        raise ValueError(f"{name} is {value!r}; accepted: finite numbers {start} {low}{limit}")


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn; None switches a filter off. A ValueError names the field out of range."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    n: int = 16                                 # samples per prompt
    max_new_tokens: int = 256                   # clipped to what the context leaves
    seed: int = 0

    def __post_init__(self):
        in_range("temperature", self.temperature, 0, math.inf)
        for name in ("n", "max_new_tokens") + (("top_k",) if self.top_k is not None else ()):
            at_least_one(name, getattr(self, name))
        if self.top_p is not None:
            in_range("top_p", self.top_p, 0, 1, above=True)
        if self.min_p is not None:
            in_range("min_p", self.min_p, 0, 1)
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2 ** 63:
            raise ValueError(f"seed is {self.seed!r}; accepted: whole numbers from 0 to 2^63 - 1")

    @property
    def filters(self):
        """Whether any filter may drop a token."""
        return bool(self.top_k or (self.top_p or 1.0) < 1 or self.min_p)


@dataclass(frozen=True)
class ESampConfig(DistillerConfig):
    """β and the Distiller's knobs."""

    beta: float = 0.25

    def __post_init__(self):
        super().__post_init__()
        in_range("beta", self.beta, 0, math.inf)


@dataclass(frozen=True)
class Sample:
    """One finished row; the lists are as long as token_ids, which ends with the EOS if there was one."""

    prompt: int                                 # index in the whole input
    sample: int
    token_ids: list
    finish_reason: str                          # "stop": drew an EOS; "length": its token or context limit
    logprob: list                               # log softmax(ref) of each token at T = 1, or None: no record
    novelty: list                               # ‖e‖ behind each token; None for the first, and for vanilla


@dataclass(frozen=True)
class Generation:
    """What `generate` returns; the Distillers go on where they stopped when they are passed to it again."""

    samples: list
    stats: "Stats"
    distillers: Batched | None


@torch.no_grad()
def generate(model, prompts, sampling, esamp=None, *, eos_ids, distillers=None, on_step=None, first_prompt=0,
             record=True, plain=False, overlap=True, policy=None):
    """Draws `sampling.n` samples of each prompt with ESamp, or vanilla where `esamp` is None → `Generation`.

    prompts: lists of token ids; eos_ids: the ids that end a sample. distillers: those of an earlier
    `Generation` for the same prompts, trained on in place with their own width and rate; None makes new ones.
    on_step(t, finished) is called after every token with the samples of the prompts that were found ended
    since the last call. first_prompt: where prompts[0] stands in the whole input, which the noise depends on.
    record: also log-probabilities under the model, and how far ESamp moved the distribution. plain: the step
    as the paper writes it, instead of the fast one, which means the same. overlap: the Distiller on a stream
    of its own, where there are streams. None of the three changes what is drawn. policy: somebody else's way
    from logits to tokens, as `experiments.methods` has many: `first(run, ref_BV)` and `step(t, run)` take the
    place of `first_token` and `esamp_step`.
    ValueError for a prompt that is empty or leaves no room in the context, FloatingPointError for numbers
    that are not finite.
    """
    rows = Rows(model, prompts, sampling, eos_ids, first_prompt)
    ledger, side, width_D = Ledger(rows, record), None, model.config.hidden_size
    cache, ref_BV, pairs = prefill(model, prompts, sampling.n, rows.steps)
    if esamp:
        distillers = ready(distillers, esamp, pairs)
        before = int(distillers.step_P.sum())
        window = min(esamp.train_every, rows.steps)                     # a longer one would never fill
        side = AsyncDistiller(distillers, rows.count, width_D, window, rows.device, overlap)
        ledger.watch(len(distillers.step_P), width_D)
    del pairs                                                           # a prompt's length of memory
    plain = plain or policy is not None or rows.device.type == "mps"    # which has no fp64
    run = Run(model, rows, ledger, cache, side, esamp.beta if esamp else 0.0, plain)
    first, step = first_token, (esamp_step if esamp else vanilla_step) if plain else fast_step
    if policy is not None:
        first, step = policy.first, policy.step
    first(run, ref_BV)
    t, finished = run.look(0)
    try:
        with torch.cuda.device_of(rows.token_B):                        # its streams are the current ones
            while True:
                if on_step:
                    on_step(t, finished)
                if len(ledger.ended) == len(prompts):
                    break
                step(t, run)
                t, finished = t + 1, []
                if t % look_every(rows.device) == 0 or t == rows.steps - 1:
                    t, finished = run.look(t)
    finally:
        if run.side:
            run.side.finish()
    stats = ledger.stats(int(distillers.step_P.sum()) - before if esamp else 0)
    return Generation(sorted(ledger.samples, key=lambda s: (s.prompt, s.sample)), stats, distillers)


def ready(distillers, esamp, pairs):
    """The run's Distillers: those given, if they fit; else new ones, maybe trained on the prompts."""
    P, _, width_D = pairs[0].shape
    count = P if esamp.scope == "prompt" else 1
    if distillers is None:
        distillers = make_distiller(esamp, count, width_D, pairs[0].device)
        if esamp.starts_warm:
            shallow_PLD, deep_PLD, real_PL = (x.view(count, -1, *x.shape[2:]) for x in pairs)
            distillers.train(shallow_PLD.float(), deep_PLD.float(), real_PL)
    held = len(distillers.step_P), distillers.width_D
    if held != (count, width_D):
        raise ValueError(f"distillers holds {held[0]} of width {held[1]}; expected {count} of {width_D}")
    return distillers


def first_token(run, ref_BV):
    """The token after the prompt is the plain LLM's."""
    token_B = run.rows.draw(masked(ref_BV, run.rows.keep(ref_BV)))
    run.ledger.write(token_B, run.rows.live_B, of_ref(run, ref_BV, token_B))
    run.rows.advance(token_B)


def esamp_step(t, run):
    """Algorithm 1, one decode step: from token t of every row to token t + 1."""
    model, rows, side = run.model, run.rows, run.side
    shallow_BD = model.lower(rows.token_B, run.cache)                   # embedding, block 0: h¹
    side.predict(t, shallow_BD)                                         # side stream: ĥ with φ_t
    deep_BD = model.upper(shallow_BD, run.cache)                        # the other blocks, final norm: h^L
    ref_BV = model.head(deep_BD)
    keep_BV = rows.keep(ref_BV)
    predicted_BD = side.prediction()                                    # waits for ĥ
    dist_BV = model.head(predicted_BD)
    new_BV = reweight(ref_BV, dist_BV, run.beta, keep_BV)
    side.train(t, deep_BD, rows.live_B)                                 # side stream: φ_t → φ_{t+1}
    token_B = rows.draw(new_BV)
    run.ledger.write(token_B, rows.live_B, of_ref(run, ref_BV, token_B) | of_esamp(
        run, rows.live_B, token_B, shallow_BD, deep_BD, predicted_BD, new_BV, masked(ref_BV, keep_BV)))
    rows.advance(token_B)


def vanilla_step(t, run):
    """The same without a Distiller."""
    model, rows = run.model, run.rows
    ref_BV = model.head(model.upper(model.lower(rows.token_B, run.cache), run.cache))
    token_B = rows.draw(masked(ref_BV, rows.keep(ref_BV)))
    run.ledger.write(token_B, rows.live_B, of_ref(run, ref_BV, token_B))
    rows.advance(token_B)


def masked(logits_BV, keep_BV):
    """The logits of the candidates, −inf elsewhere."""
    return logits_BV.masked_fill(~keep_BV, -torch.inf)


def prefill(model, prompts, samples, steps):
    """Runs every prompt once for all of its samples: (cache of B rows, ref (B, V) after the prompt, pairs).

    pairs: h¹ and h^L of the prompts' positions, (P, L, D) each, and which of these are real, (P, L).
    Prompts are padded on the right; a real token sees only what is left of it, so padding changes nothing.
    """
    device, lengths = model.head_weight.device, [len(prompt) for prompt in prompts]
    padded = [list(prompt) + [0] * (max(lengths) - len(prompt)) for prompt in prompts]
    cache = KVCache(model.config, len(prompts), max(lengths), device, model.head_weight.dtype)
    shallow_PLD = model.lower(torch.tensor(padded, device=device), cache)
    deep_PLD = model.upper(shallow_PLD, cache)
    last_P = torch.tensor(lengths, device=device) - 1
    last_PD = deep_PLD[torch.arange(len(prompts), device=device), last_P]
    ref_BV = model.head(last_PD).repeat_interleave(samples, dim=0)
    real_PL = torch.arange(max(lengths), device=device) <= last_P[:, None]
    return cache.repeat(samples, lengths, max(lengths) + steps), ref_BV, (shallow_PLD, deep_PLD, real_PL)


class Rows:
    """Who the B rows are: prompt and sample, which make their noise; limits, last token; who is live."""

    def __init__(self, model, prompts, sampling, eos_ids, first_prompt):
        context, self.device = model.config.max_position_embeddings, model.head_weight.device
        if not prompts:
            raise ValueError("prompts is empty; expected at least one list of token ids")
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) < context:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens; accepted: 1 to {context - 1}, one "
                                 "less than the context")
        limits = [min(sampling.max_new_tokens, context - len(prompt)) for prompt in prompts]
        self.sampling, self.first_prompt, self.prompts = sampling, first_prompt, list(range(len(prompts)))
        self.count, self.steps, self.eos_ids = len(prompts) * sampling.n, max(limits), frozenset(eos_ids)
        self.row_B = torch.arange(self.count, device=self.device)       # its place in the whole run
        self.last_TB = None                     # is a token the last its row may have? None: the run's is
        if min(limits) < self.steps:
            limit_B = torch.tensor(limits, device=self.device).repeat_interleave(sampling.n)
            self.last_TB = torch.arange(1, self.steps + 1, device=self.device)[:, None] >= limit_B
        self.live_B = torch.ones(self.count, dtype=torch.bool, device=self.device)
        self.token_B = torch.zeros(self.count, dtype=torch.int64, device=self.device)
        self.step_1 = torch.zeros(1, dtype=torch.int64, device=self.device)     # the token to be drawn next
        ends = [i for i in self.eos_ids if 0 <= i < model.config.vocab_size]
        self.goes_on_V = torch.ones(model.config.vocab_size, dtype=torch.bool, device=self.device)
        self.goes_on_V[torch.tensor(ends, dtype=torch.int64, device=self.device)] = False
        on_cpu = self.device.type == "mps"      # which has no fp64
        self.draws_on = torch.device("cpu") if on_cpu else self.device
        row_B = self.row_B.to(self.draws_on)
        step_T1 = torch.arange(self.steps, device=self.draws_on)[:, None]
        prompt_B, sample_B = first_prompt + row_B // sampling.n, row_B % sampling.n
        self.uniform_TB = uniform(sampling.seed, prompt_B, sample_B, step_T1)

    def keep(self, ref_BV):
        """The candidates, by the run's filters."""
        s = self.sampling
        keep_BV = keep_mask(ref_BV.to(self.draws_on), s.temperature, s.top_k, s.top_p, s.min_p)
        return keep_BV.to(self.device)

    def draw(self, logits_BV):
        """The next token of every row: inverse CDF of softmax(logits/T) at u(seed, prompt, sample, step)."""
        uniform_B = self.uniform_TB.index_select(0, self.step_1.to(self.draws_on))[0]
        token_B = draw(logits_BV.to(self.draws_on), uniform_B, self.sampling.temperature)
        return token_B.to(self.device)

    def advance(self, token_B, counts=None):
        """Every row has drawn: who goes on? In place; no change where `counts`, on the device, is False."""
        goes_on_B = self.goes_on_V[token_B]
        if self.last_TB is not None:
            goes_on_B &= ~self.last_TB.index_select(0, self.step_1)[0]
        if counts is None:
            self.token_B.copy_(token_B)
            self.live_B &= goes_on_B
            self.step_1 += 1
        else:
            self.token_B.copy_(torch.where(counts, token_B, self.token_B))
            self.live_B &= goes_on_B | ~counts
            self.step_1 += counts

    def take(self, prompts, row_B):
        """Some of the rows: those at row_B, of the prompts at these places."""
        fewer = copy.copy(self)
        fewer.prompts, fewer.count = [self.prompts[p] for p in prompts], len(row_B)
        for name in ("row_B", "live_B", "token_B"):
            setattr(fewer, name, getattr(self, name)[row_B])
        fewer.last_TB = None if self.last_TB is None else self.last_TB[:, row_B]
        fewer.uniform_TB = self.uniform_TB[:, row_B.to(self.draws_on)]
        return fewer


# ------------------------------------------------------------------------------
# the fast form of the same step
# ------------------------------------------------------------------------------

def look_every(device):
    """Steps between two looks of the host at the device: a CPU's memory is the host's own."""
    return 1 if device.type == "cpu" else LOOK_EVERY


def fast_step(t, run):
    """`esamp_step` and `vanilla_step` in parts, each of which a CUDA graph can replay.

    With filters, ĥ meets only the rows of W that belong to candidates. Without, one product makes the new
    logits from mixed hidden states (eq. 8). If more tokens pass the filters than were looked at, the step is
    void: nothing of it is kept, and `Run.look` has it repeated with more.
    """
    run.begin(t)
    shallow_BD = run.part("lower", lambda: run.model.lower(run.rows.token_B, run.cache))
    if run.side:
        run.side.predict(t, shallow_BD)

    def upper():
        deep_BD = run.model.upper(shallow_BD, run.cache)
        return deep_BD, choose(run, deep_BD)
    deep_BD, choice = run.part("upper", upper)
    predicted_BD = run.side.prediction() if run.side else None
    live_B = run.part("finish", lambda: finish(run, shallow_BD, deep_BD, predicted_BD, *choice))
    if run.side:
        run.side.train(t, deep_BD, live_B)


def choose(run, deep_BD):
    """(ref, ids of the candidates, their logits, does the step count): None where there is nothing to say."""
    s, rows = run.rows.sampling, run.rows
    if not s.filters:
        ref_BV = run.model.head(deep_BD) if run.ledger.record or not run.side else None
        return ref_BV, None, ref_BV, None
    ref_BV = run.model.head(deep_BD)
    for width in run.widths:
        id_BC, keep_BC, whole_B = candidates(ref_BV, width, s.temperature, s.top_k, s.top_p, s.min_p)
        counts, free = (whole_B | ~rows.live_B).all(), look_every(rows.device) == 1
        if not free or counts:                  # a CPU need not wait for the next look
            return ref_BV, id_BC, masked(ref_BV.gather(-1, id_BC), keep_BC), None if free else counts
    return ref_BV, None, masked(ref_BV, rows.keep(ref_BV)), None


def finish(run, shallow_BD, deep_BD, predicted_BD, ref_BV, id_BC, plain_BC, counts):
    """Reweights, draws, records, advances; returns whose pairs of this step may train."""
    model, rows, new_BC = run.model, run.rows, plain_BC
    if run.side and not rows.sampling.filters:
        new_BC = model.head(mix_hidden(deep_BD, predicted_BD, run.beta))
    elif run.side:
        dist_BC = model.head(predicted_BD) if id_BC is None else model.head_at(predicted_BD, id_BC)
        new_BC = reweight(plain_BC, dist_BC, run.beta, ~plain_BC.isneginf())
    drawn_B = rows.draw(new_BC)
    token_B = drawn_B if id_BC is None else id_BC.gather(-1, drawn_B[:, None])[:, 0]
    live_B = rows.live_B.clone() if counts is None else rows.live_B & counts
    figures = of_ref(run, ref_BV, token_B)
    if run.side:
        figures |= of_esamp(run, live_B, drawn_B, shallow_BD, deep_BD, predicted_BD, new_BC, plain_BC)
    run.ledger.write(token_B, live_B, figures)
    rows.advance(token_B, counts)
    if counts is not None:
        run.cache.next_1 -= (~counts).long()
    return live_B


@dataclass
class Run:
    """What a step works on: who the rows are, their cache, their record, and the Distiller, if any."""

    model: torch.nn.Module
    rows: Rows
    ledger: "Ledger"
    cache: KVCache
    side: AsyncDistiller | None
    beta: float
    plain: bool
    widths: tuple = WIDTHS                      # candidates looked at, if the filters let no more pass

    def __post_init__(self):
        self.graphs, self.prompt_slots, self.key = Graphs(self.rows.device), self.cache.filled, None

    def begin(self, t):
        """What the host has to know before step t: all that a part depends on beside tensors that stay."""
        self.cache.filled, self.cache.places = self.prompt_slots + t, {}
        self.key = (self.cache.reach, self.widths)

    def part(self, name, function):
        """A part of the fast step; a replayed one does not run its Python."""
        return self.graphs.run(name, function, self.key)

    def look(self, t):
        """The host's look at the device, t tokens after the first: (t, samples of prompts newly ended).

        A void step has stopped the device: then t is that step again, with more candidates from now on.
        """
        reached, finished = t if look_every(self.rows.device) == 1 else int(self.rows.step_1) - 1, []
        if reached < t:
            self.widths = self.widths[1:]
        last = reached == self.rows.steps - 1
        if last:
            self.rows.live_B.fill_(False)
        live_P = self.rows.live_B.view(len(self.rows.prompts), -1).sum(-1).tolist()
        if t % LOOK_EVERY == 0 or 0 in live_P or last:
            finished = self.ledger.look(reached + 1, live_P)
        needed = max(live_P) * sum(live > 0 for live in live_P)
        if 0 < 2 * needed <= self.rows.count and reached % 4 == 0 and not self.plain:
            self.begin(reached)
            self.shrink(reached, max(live_P))
        return reached, finished

    def shrink(self, t, most):
        """Goes on without finished rows, now that half of the batch is enough; `most` rows of each prompt.

        What is left to compute depends on tokens alone, so vanilla and β = 0 shrink alike.
        """
        K = self.rows.count // len(self.rows.prompts)
        live_PK = self.rows.live_B.view(-1, K).tolist()
        places, rows = [p for p, live in enumerate(live_PK) if any(live)], []
        for p in places:                        # the live ones, and finished ones where a prompt has fewer
            first = sorted(range(K), key=lambda k: not live_PK[p][k])[:most]
            rows += [p * K + k for k in sorted(first)]
        place_P, row_B = (torch.tensor(x, device=self.rows.device) for x in (places, rows))
        self.rows, self.cache = self.rows.take(places, row_B), self.cache.take(row_B)
        if self.side:
            place_P = place_P if self.side.shape_PKD[0] > 1 else torch.zeros_like(place_P[:1])
            self.side = self.side.fewer(t, place_P, row_B)
        self.ledger.take(self.rows, place_P)
        self.graphs = Graphs(self.rows.device)


def of_ref(run, ref_BV, token_B):
    """What the record says about a token under the LLM itself."""
    if ref_BV is None:
        return {}
    figures = {"spread": spread(ref_BV)}
    if run.ledger.record:
        figures["logprob"] = ref_BV.log_softmax(-1).gather(-1, token_B[:, None])[:, 0]
    return figures


def of_esamp(run, live_B, token_B, shallow_BD, deep_BD, predicted_BD, new_BV, plain_BV):
    """What ESamp did to a token, against vanilla at the same T, filters, u; V may be candidates only."""
    novelty_B = novelty(deep_BD, predicted_BD)
    fine_BV = new_BV if plain_BV is None else torch.where(plain_BV.isneginf(), 0, new_BV)
    figures = {"novelty": novelty_B, "new_spread": spread(fine_BV)}
    if run.ledger.record:
        figures["moved"] = (run.rows.draw(plain_BV) != token_B).float()
        figures["kl"], figures["variation"] = divergence(new_BV, plain_BV, run.rows.sampling.temperature)
        figures["to_shallow"] = novelty(deep_BD, shallow_BD).square()
        figures["to_mean"] = run.ledger.to_mean(deep_BD, live_B)
    return figures


def spread(logits_BV):
    """Largest minus smallest logit (B,): finite if and only if all of a row is, or nearly at fp32's end."""
    return logits_BV.amax(-1) - logits_BV.amin(-1)


# ------------------------------------------------------------------------------
# what a run leaves behind
# ------------------------------------------------------------------------------

def added(a, b):
    """The sum of two dataclasses of sums, field by field."""
    return type(a)(*(getattr(a, f.name) + getattr(b, f.name) for f in dataclasses.fields(a)))


@dataclass
class Errors:
    """‖h^L − ĥ‖² (eq. 10), summed over rows, for the Distiller and for two predictors that learn nothing."""

    rows: int = 0
    distiller: float = 0.0
    shallow: float = 0.0                        # ĥ = h¹
    mean: float = 0.0                           # ĥ = the mean of all h^L that this Distiller has seen before
    __add__ = added


@dataclass
class Stats:
    """Sums over a run's rows; those of several runs add up (`+`), `summary` makes the ratios.

    NaN where a run kept no record.
    """

    tokens: int = 0                             # generated, EOS included
    reweighted: int = 0                         # of them drawn from π_new: all but each sample's first
    moved: float = 0                            # of these, other than vanilla's draw with the same u
    updates: int = 0                            # steps that the Distillers' Adam took, all together
    samples: int = 0
    distinct: int = 0                           # different token_ids within each prompt, summed
    kl: float = 0.0                             # KL(π_new ‖ π_ref), nats, same T and filters
    variation: float = 0.0                      # total variation of the two
    first: Errors = dataclasses.field(default_factory=Errors)       # at each prompt's first decode step
    last: Errors = dataclasses.field(default_factory=Errors)        # over each prompt's last ten
    __add__ = added

    def summary(self):
        """A dict of figures; None where there is nothing to divide by, or for an infinite KL (T = 0)."""
        def per(total, count):
            return total / count if count and math.isfinite(total) else None
        return {
            "tokens": self.tokens, "samples": self.samples, "distinct_samples": self.distinct,
            "updates": self.updates, "reweighted_tokens": self.reweighted,
            "moved_tokens": int(self.moved) if math.isfinite(self.moved) else None,
            "moved_share": per(self.moved, self.reweighted), "kl_nats": per(self.kl, self.reweighted),
            "total_variation": per(self.variation, self.reweighted),
            "loss_first_step": per(self.first.distiller, self.first.rows),
            "loss_last_10_steps": per(self.last.distiller, self.last.rows),
            "loss_last_10_steps_if_h1": per(self.last.shallow, self.last.rows),
            "loss_last_10_steps_if_running_mean": per(self.last.mean, self.last.rows),
        }


class Ledger:
    """All that a run records, a value per row and token in device memory; the host reads when it looks."""

    ALWAYS = ("live", "spread", "new_spread", "novelty")                        # of ref, of new: finite?
    RECORD = ("logprob", "moved", "kl", "variation", "to_shallow", "to_mean")   # to_…: without learning

    def __init__(self, rows, record):
        self.rows, self.record, self.samples, self.ended, self.looked = rows, record, [], set(), 0
        self.shape_TB, self.shape_PKD = (rows.steps, rows.count), None
        self.names = self.ALWAYS + (self.RECORD if record else ())
        self.token_X = torch.zeros(rows.steps * rows.count, dtype=torch.int64, device=rows.device)
        self.value_XC = torch.zeros(len(self.token_X), len(self.names), device=rows.device)
        self.none_B = torch.zeros(rows.count, device=rows.device)

    def column(self, name):
        """One kind of figure: (T, B)."""
        if name == "token":
            return self.token_X.view(self.shape_TB)
        return self.value_XC[:, self.names.index(name)].view(self.shape_TB)

    def watch(self, count, width_D):
        """Gets ready for ESamp's figures: a running mean of h^L per Distiller, the simplest predictor."""
        self.shape_PKD = (count, self.rows.count // count, width_D)
        self.sum_P1D = torch.zeros(count, 1, width_D, device=self.rows.device)
        self.seen_P11 = torch.zeros(count, 1, 1, device=self.rows.device)

    def take(self, rows, place_P):
        """Goes on with fewer rows, of the Distillers at place_P; what is written stays."""
        self.rows = rows
        if self.shape_PKD:
            self.sum_P1D, self.seen_P11 = self.sum_P1D[place_P], self.seen_P11[place_P]
            self.shape_PKD = (len(place_P), rows.count // len(place_P), self.shape_PKD[2])

    def to_mean(self, deep_BD, live_B):
        """‖h^L − the mean of all h^L of earlier steps‖² (B,); then these count, too."""
        deep_PKD, live_PK1 = deep_BD.float().view(self.shape_PKD), live_B.view(*self.shape_PKD[:2], 1)
        error_B = (deep_PKD - self.sum_P1D / self.seen_P11.clamp(min=1)).square().sum(-1).flatten()
        self.sum_P1D += torch.where(live_PK1, deep_PKD, 0).sum(1, keepdim=True)
        self.seen_P11 += live_PK1.sum(1, keepdim=True)
        return error_B

    def write(self, token_B, live_B, figures):
        """Records the token that every row drew at this step, and its figures by name; 0 where absent."""
        at_B, none_B = self.rows.step_1 * self.shape_TB[1] + self.rows.row_B, self.none_B[:len(token_B)]
        figures = figures | {"live": live_B.float()}
        row_BC = torch.stack([figures.get(name, none_B) for name in self.names], dim=-1)
        self.token_X.index_copy_(0, at_B, token_B)
        self.value_XC.index_copy_(0, at_B, row_BC)

    def look(self, end, live_P):
        """Looks at all tokens before `end`: the samples of prompts that are newly without a live row.

        FloatingPointError for the first number that is not finite.
        """
        window, n = slice(self.looked, end), self.rows.sampling.n
        live_TB, *spreads, novelty_TB = (self.column(name)[window] for name in self.ALWAYS)
        logits_TB, prediction_TB = (~x.isfinite() for x in (spreads[0], spreads[1] + novelty_TB.square()))
        bad = ((live_TB > 0) & (logits_TB | prediction_TB)).nonzero().tolist()
        if bad:
            what = "logits" if logits_TB[tuple(bad[0])] else "Distiller's loss or reweighted logits"
            prompt, sample = divmod(bad[0][1], n)
            raise FloatingPointError(f"{what} not finite at step {self.looked + bad[0][0]}, prompt "
                                     f"{self.rows.first_prompt + prompt}, sample {sample}")
        self.looked, finished = end, []
        for prompt, live in zip(self.rows.prompts, live_P, strict=True):
            if not live and prompt not in self.ended:
                self.ended.add(prompt)
                finished += self._samples(prompt, end)
        self.samples += finished
        return finished

    def _samples(self, prompt, steps):
        """The finished rows of one prompt."""
        n, found = self.rows.sampling.n, []
        mine = slice(prompt * n, (prompt + 1) * n)
        names = ("live", "token", "novelty") + (("logprob",) if self.record else ())
        by_row = zip(*(self.column(name)[:steps, mine].T.tolist() for name in names), strict=True)
        for k, columns in enumerate(by_row):
            length = int(sum(columns[0]))
            token, new, *rest = (column[:length] for column in columns[1:])
            logprob = rest[0] if self.record else [None] * length
            reason = "stop" if token[-1] in self.rows.eos_ids else "length"
            new = [None] + new[1:] if self.shape_PKD else [None] * length
            found.append(Sample(self.rows.first_prompt + prompt, k, token, reason, logprob, new))
        return found

    def stats(self, updates):
        """The run's `Stats`, once every sample has ended."""
        tokens = int(self.column("live").sum(dtype=torch.float64))
        stats = Stats(tokens=tokens, updates=updates, samples=len(self.samples))
        stats.distinct = len({(s.prompt, *s.token_ids) for s in self.samples})
        if not self.shape_PKD:
            return stats
        column = {name: self.column(name).cpu() for name in self.names}
        live_TB = column["live"] > 0
        live_TB[0] = False                      # token 0 is not ESamp's
        stats.reweighted = int(live_TB.sum())
        nothing = torch.full(self.shape_TB, torch.nan)
        moved, kl, variation, *errors = (column.get(name, nothing) for name in self.RECORD[1:])
        stats.moved, stats.kl, stats.variation = (float(x[live_TB].sum()) for x in (moved, kl, variation))
        errors_4TB = torch.where(live_TB, torch.stack([live_TB, column["novelty"] ** 2, *errors]), 0)
        for error_4TK in errors_4TB.chunk(self.shape_TB[1] // self.rows.sampling.n, dim=-1):
            end = int(error_4TK[0].any(-1).sum()) + 1           # steps with a live row, and step 0
            first, last = error_4TK[:, 1:2], error_4TK[:, max(1, end - 10):end]
            stats += Stats(first=Errors(*first.sum((1, 2)).tolist()), last=Errors(*last.sum((1, 2)).tolist()))
        return stats


# ------------------------------------------------------------------------------
# chapter 2: text in, text out
# ------------------------------------------------------------------------------

BUNDLED = Path(__file__).resolve().parent / "checkpoints" / "countdown"
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
SAMPLING_HINTS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")


class Text:
    """A checkpoint's tokenizer and chat template: text → ids → text, and the set of ids that end a sample."""

    def __init__(self, folder, config):
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder} has no tokenizer.json; expected a tokenizer in that format")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:              # the library raises bare Exceptions
            raise ValueError(f"{path} is not a readable tokenizer ({one_line(error)})") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocab_size, self.unk = config.vocab_size, unknown_id(self.tokenizer)
        top = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        if top >= config.vocab_size:
            raise ValueError(f"{path} has token id {top}, but the model embeds only {self.vocab_size} tokens")
        settings = optional_json(folder / "tokenizer_config.json")
        self.special = {name: token_text(settings[name]) for name in SPECIAL if settings.get(name)}
        self.template = compile_template(folder / "chat_template.jinja", settings.get("chat_template"))
        generation = optional_json(folder / "generation_config.json")
        self.hints = {name: generation[name] for name in SAMPLING_HINTS if name in generation}
        self.eos_ids = (eos_set(generation, folder / "generation_config.json")
                        | eos_set(read_json(folder / "config.json"), folder / "config.json"))

    def _encode(self, text, special):
        """The tokenizer's encoding; whatever goes wrong inside it is a ValueError."""
        try:
            found = self.tokenizer.encode(text, add_special_tokens=special)
        except Exception as error:              # the library raises bare Exceptions
            raise ValueError(f"the tokenizer can not encode {brief(text)} ({one_line(error)})") from None
        if max(found.ids, default=0) >= self.vocab_size:
            raise ValueError(f"the tokenizer makes the id {max(found.ids)}, but the model embeds only "
                             f"{self.vocab_size} tokens")
        return found

    def encode_raw(self, text):
        """Ids with the tokenizer's own special tokens in front: one BOS, never two."""
        ids = self._encode(text, special=True).ids
        bos = self.tokenizer.token_to_id(self.special.get("bos_token", ""))
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def encode_chat(self, messages):
        """(rendered text, its ids): the template writes every special token, the tokenizer adds none."""
        try:
            text = self.template.render(messages=messages, tools=None, documents=None,
                                        add_generation_prompt=True, **self.special)
        except Exception as error:              # whatever a template does wrong
            kind = type(error).__name__
            raise ValueError(f"the chat template failed ({kind}: {one_line(error)})") from None
        return text, self._encode(text, special=False).ids

    def decode(self, ids):
        """The text of ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def unknown(self, text):
        """The characters of text that the tokenizer drops or maps to its unknown token, each once."""
        whole, covered, lost = self._encode(text, special=False), set(), set()
        for token, (start, end) in zip(whole.ids, whole.offsets, strict=True):
            covered.update(range(start, end))
            if token == self.unk:
                lost.update(text[start:end])
        bare = {c for i, c in enumerate(text) if i not in covered and not c.isspace()}
        lost.update(c for c in bare if not self._encode(c, special=False).ids)
        return "".join(sorted(lost))


def unknown_id(tokenizer):
    """The id that the tokenizer gives to what it does not know, None where it has none."""
    if hasattr(tokenizer.model, "unk_token"):
        return tokenizer.token_to_id(tokenizer.model.unk_token or "")
    return json.loads(tokenizer.to_str())["model"].get("unk_id")         # Unigram keeps an id, and hides it


def compile_template(path, source):
    """The chat template in `path`, else `source`, compiled; None where there is none.

    A template is a program from the checkpoint's author, so it runs in jinja2's sandbox, with what real ones
    expect of Hugging Face: trimmed blocks, loop controls, raise_exception, strftime_now, an unescaped tojson.
    """
    if path.is_file():
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8") from None
    if isinstance(source, list):                # several named ones: [{"name": "default", "template": …}, …]
        named = (t.get("template") for t in source if isinstance(t, dict) and t.get("name") == "default")
        source = next(named, None)
    if source is None:
        return None
    if not isinstance(source, str):
        raise ValueError(f"the chat template is a {type(source).__name__}; expected a string")

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    def raise_exception(message):
        raise TemplateError(message)
    box = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    box.filters["tojson"] = tojson
    box.globals["raise_exception"] = raise_exception
    box.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return box.from_string(source)
    except Exception as error:                  # jinja2's own, and Python's compiler's for deep nesting
        raise ValueError(f"the chat template does not compile ({one_line(error)})") from None


def one_line(error):
    """An exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def brief(value):
    """A value as an error message shows it: its beginning."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def optional_json(path):
    """The JSON object in a file, {} where there is no file."""
    return read_json(path) if path.is_file() else {}


def token_text(token):
    """A special token's text: a plain string, or the "content" of an object."""
    return str(token.get("content", "") if isinstance(token, dict) else token)


def eos_set(settings, path):
    """The ids under `eos_token_id`: a number, a list of them, or nothing."""
    given = settings.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2 ** 31 for i in ids):
        raise ValueError(f"{path}: eos_token_id is {given!r}; expected a token id or a list of them")
    return frozenset(ids)


# ------------------------------------------------------------------------------
# prompts
# ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Prompt:
    """One prompt: its name in the output, where it stands (for error messages), and what was given."""

    id: object
    where: str
    content: object                             # a string, or a list of messages

    @property
    def messages(self):
        """The conversation; a plain string is one user message."""
        plain = isinstance(self.content, str)
        return [{"role": "user", "content": self.content}] if plain else self.content


def gather_prompts(args):
    """The prompts that the flags ask for; the bundled model brings its own."""
    if args.prompts is not None:
        return read_prompts(args.prompts)
    if args.prompt:
        return [Prompt(i, f"--prompt {brief(text)}", text) for i, text in enumerate(args.prompt)]
    if args.model is None:
        return read_prompts(str(BUNDLED / "prompts.txt"))
    raise ValueError("no prompt; give --prompt TEXT (repeatable) or --prompts FILE")


def read_prompts(source):
    """The prompts of a file, `-` for stdin: JSONL when line 1 looks like an object, else one a line."""
    if source == "-" and sys.stdin is None:
        raise ValueError("--prompts - reads standard input, which is closed")
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise ValueError(f"--prompts {source!r} can not be read ({error.strerror})") from None
    name = "standard input" if source == "-" else source
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name}, line {line}: not UTF-8 (byte {data[error.start]:#04x})") from None
    numbered = enumerate(text.split("\n"), 1)
    lines = [(f"{name}, line {i}", line.strip("\r")) for i, line in numbered if line.strip()]
    if not lines:
        raise ValueError(f"{name} holds no prompt")
    if not re.match(r'\s*\{\s*["}]', lines[0][1]):
        return [Prompt(i, *line) for i, line in enumerate(lines)]
    prompts, taken = [json_prompt(i, *line) for i, line in enumerate(lines)], {}
    for prompt in prompts:
        if prompt.id in taken:
            raise ValueError(f"{prompt.where}: the id {brief(prompt.id)} is that of {taken[prompt.id]} too")
        taken[prompt.id] = prompt.where
    return prompts


def json_prompt(index, where, line):
    """The prompt of a JSONL line: `prompt` (a string) or `messages` ({role, content} each), maybe `id`."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({one_line(error)})") from None
    if not isinstance(entry, dict) or ("prompt" in entry) == ("messages" in entry):
        raise ValueError(f"{where}: expected an object with either 'prompt' or 'messages'")
    prompt = Prompt(entry.get("id", index), where, entry.get("prompt", entry.get("messages")))
    if "prompt" in entry and not isinstance(prompt.content, str):
        raise ValueError(f"{where}: 'prompt' is {brief(prompt.content)}; expected a string")
    if "messages" in entry and not (isinstance(prompt.content, list) and prompt.content):
        raise ValueError(f"{where}: 'messages' is {brief(prompt.content)}; expected a list that is not empty")
    for message in prompt.messages:
        known = isinstance(message, dict) and [type(message.get(k)) for k in ("role", "content")]
        if known != [str, str]:
            raise ValueError(f"{where}: 'messages' has {brief(message)}; expected texts 'role' and 'content'")
    if type(prompt.id) not in (str, int) or has_surrogate(str(prompt.id)):
        raise ValueError(f"{where}: 'id' is {brief(prompt.id)}; expected a string or a whole number")
    return prompt


def has_surrogate(text):
    """True where a str is no valid Unicode: JSON's "\\ud800", or undecodable bytes of the command line."""
    return any("\ud800" <= c <= "\udfff" for c in text)


def encode(prompt, text, args, config):
    """A prompt's ids; ValueError names it where it can not be encoded or leaves no room in the context."""
    chat, messages = text.template is not None and not args.raw, prompt.messages
    if not chat and (isinstance(prompt.content, list) or args.system is not None):
        reason = "--raw turns it off" if args.raw else "this model has none"
        raise ValueError(f"{prompt.where}: messages and --system need a chat template, and {reason}")
    if args.system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": args.system}, *messages]
    for message in messages:
        if has_surrogate(message["content"]):
            raise ValueError(f"{prompt.where}: not valid Unicode text (a lone surrogate)")
        bad = text.unknown(message["content"])
        if bad:
            hint = "; the bundled model expects prompts like those in checkpoints/countdown/prompts.txt"
            hint = hint if args.model is None else ""
            raise ValueError(f"{prompt.where}: the tokenizer does not know the characters {bad!r}{hint}")
    ids = text.encode_chat(messages)[1] if chat else text.encode_raw(prompt.content)
    if not ids:
        raise ValueError(f"{prompt.where}: encodes to no token; give at least one")
    if len(ids) >= config.max_position_embeddings:
        raise ValueError(f"{prompt.where}: has {len(ids)} tokens; the context holds "
                         f"{config.max_position_embeddings}, and one must be left to generate")
    return ids


# ------------------------------------------------------------------------------
# what the user sees
# ------------------------------------------------------------------------------

def memory(model, dtype, lengths, sampling, esamp, batch):
    """What a run of a (blank) model holds at once, in bytes, by part."""
    config, parameters = model.config, sum(p.numel() for p in model.parameters())
    prompts, size, D = min(batch, len(lengths)), dtype.itemsize, config.hidden_size
    rows, kv = prompts * sampling.n, config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    steps = min(sampling.max_new_tokens, config.max_position_embeddings - min(lengths))
    slots = max(lengths) + steps
    parts = {"weights": parameters * size, "kv cache": 2 * kv * rows * slots * size,
             "logits": 8 * 4 * rows * config.vocab_size}        # ref, dist, new and a CDF in fp64, about
    if esamp:
        pairs = 2 * (2 + min(esamp.train_every, steps)) * rows * D * 4      # four buffers, two windows
        parts["Distiller"] = (prompts if esamp.scope == "prompt" else 1) * esamp.bytes(D) + pairs
    return parts


def size_text(count):
    """A number of bytes for people."""
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    unit, name = next((u, n) for u, n in units if count >= u or u == 1e3)
    return f"{count / unit:.1f} {name}"


def printable(text):
    """Text for a terminal: control characters other than newline and tab are shown, not obeyed."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def report(stats, seconds_s, esamp, name):
    """The lines that end a run for a person."""
    def text(value):
        return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
    s, rate_tok_s = {k: text(v) for k, v in stats.summary().items()}, stats.tokens / max(seconds_s, 1e-9)
    lines = [f"{f'ESamp, β {esamp.beta:g}' if esamp else 'vanilla'} on {name}",
             f"  tokens       {s['tokens']} in {seconds_s:.1f} s, {rate_tok_s:,.0f} tok/s",
             f"  distinct     {s['distinct_samples']} of {s['samples']} samples"]
    if esamp:
        lines += [
            f"  Distiller    {s['updates']} updates; loss {s['loss_first_step']} at the first step, "
            f"{s['loss_last_10_steps']} over the last ten",
            f"               there, ĥ = h¹ gives {s['loss_last_10_steps_if_h1']} and a running mean of h^L "
            f"{s['loss_last_10_steps_if_running_mean']}",
            f"  reweighting  moved {s['moved_tokens']} of {s['reweighted_tokens']} tokens "
            f"({100 * stats.moved / max(stats.reweighted, 1):.1f} %); KL(new ‖ ref) {s['kl_nats']} nats, "
            f"total variation {s['total_variation']}"]
    if esamp and stats.summary()["moved_tokens"] is None:
        lines[-2:] = [f"  reweighting  {s['reweighted_tokens']} tokens; how far was not recorded"]
    return lines


def notes(args, sampling, esamp, text, device, parts):
    """What a person should know before a run starts."""
    if text.hints:
        hints = ", ".join(f"{name} {value}" for name, value in text.hints.items())
        yield f"note: generation_config.json suggests {hints}; not used, the flags alone decide"
    knobs = FLAGS[ESampConfig].items()
    idle = [flag for name, (flag, _) in knobs if getattr(args, name) != getattr(ESampConfig, name)]
    if idle and not esamp:
        yield f"note: {', '.join(idle)} does nothing without --esamp"
    if esamp and esamp.kind == "rls" and esamp.lr != ESampConfig.lr:
        yield "note: --distiller-lr does nothing with --distiller rls, which has no learning rate"
    if sampling.temperature == 0 and sampling.n > 1:
        yield "note: at temperature 0 all samples of a prompt are equal; --n 1 is enough"
    if device.type == "mps":
        yield "note: mps is untested"
    each = " + ".join(f"{part} {size_text(n)}" for part, n in parts.items())
    yield f"memory: about {each} = {size_text(sum(parts.values()))} on {device}"


def warnings(stats, esamp):
    """What a run must not pass over in silence: a Distiller that did nothing."""
    if esamp and stats.updates == 0:
        yield ("the Distiller made no update: the samples were shorter than "
               f"{esamp.train_every + 1} tokens (--train-every {esamp.train_every})")
    elif esamp and esamp.beta > 0 and stats.moved == 0:
        yield f"no token was moved although β is {esamp.beta:g}: this run is no evidence about ESamp"


class Out:
    """The JSONL file: opened at the first line, whole lines only, even under Ctrl-C."""

    def __init__(self, path):
        self.path, self.file = path, None
        if path is None:
            return
        folder = Path(path).resolve().parent
        target = path if Path(path).exists() else folder
        if Path(path).is_dir() or not folder.is_dir() or not os.access(target, os.W_OK):
            raise ValueError(f"--out {path!r} can not be written; expected a file in a folder that exists")

    def spare(self, prompts, folder):
        """ValueError where writing would replace the file of prompts, or one of the model's."""
        if self.path is not None and Path(self.path).exists():
            target = Path(self.path).resolve()
            if target.parent == Path(folder).resolve() or (prompts and target == Path(prompts).resolve()):
                raise ValueError(f"--out {self.path!r} would replace a file that this run reads")

    def write(self, entries):
        """Appends JSON lines in one piece."""
        if self.path is None:
            return
        lines = "".join(json.dumps(e, ensure_ascii=False, allow_nan=False) + "\n" for e in entries)
        data = lines.encode("utf-8", errors="backslashreplace")         # a lone surrogate as JSON writes it
        try:
            with uninterrupted():
                self.file = self.file or open(self.path, "wb")
                self.file.write(data)
                self.file.flush()
        except OSError as error:
            raise ValueError(f"--out {self.path!r} can not be written ({error.strerror})") from None


@contextlib.contextmanager
def uninterrupted():
    """Puts off a Ctrl-C until the block is done."""
    caught = []
    previous = signal.signal(signal.SIGINT, lambda *_: caught.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if caught:
            raise KeyboardInterrupt


# ------------------------------------------------------------------------------
# the command line
# ------------------------------------------------------------------------------

FLAGS = {       # field: (flag, help); type and default are the field's own
    SamplingConfig: {
        "n": ("--n", "samples per prompt"),
        "max_new_tokens": ("--max-new-tokens", "tokens per sample at most, clipped to the model's context"),
        "temperature": ("--temperature", "divides all logits; 0 takes the largest"),
        "top_k": ("--top-k", "candidates: the k largest logits"),
        "top_p": ("--top-p", "candidates: the smallest set with this share of the probability"),
        "min_p": ("--min-p", "candidates: at least this share of the largest probability"),
        "seed": ("--seed", "seed of the noise, and of the Distiller's first weights"),
    },
    ESampConfig: {
        "beta": ("--beta", "strength of ESamp; 0 is vanilla"),
        "kind": ("--distiller", "the paper's network, or recursive least squares"),
        "scope": ("--distiller-scope", "one Distiller per prompt, or one per batch of prompts"),
        "width": ("--distiller-width", "inner width of the Distiller; of rls the number of random features"),
        "lr": ("--distiller-lr", "learning rate of the Distiller; rls has none"),
        "train_every": ("--train-every", "steps whose pairs share one update of the Distiller"),
    },
}
ABOUT = """Generate text with ESamp (arXiv:2604.24927): the samples of a prompt share a small network, the
Distiller, that learns while they are decoded; they are pushed towards what it does not predict yet."""
EXAMPLES = """examples:
  python decode.py --esamp
  python decode.py --model path --esamp --prompt 'Once upon a time' --n 8
  python decode.py --model path --esamp --prompts questions.jsonl --out answers.jsonl"""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message):
        """ValueError, for `main` to print."""
        raise ValueError(message + " (see --help)")


def build_parser():
    """The flags; numeric ones come from the config dataclasses, one place per knob."""
    parser = Parser(prog="decode.py", description=ABOUT, epilog=EXAMPLES, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add, source = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--model", metavar="PATH", help="folder in Hugging Face layout, or Org/Name in the Hugging Face "
        "cache or on the hub (default: the bundled Countdown model)")
    add("--esamp", action=argparse.BooleanOptionalAction, default=False,
        help="reweight with a Distiller (default: off, which is vanilla sampling)")
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    source.add_argument("--prompts", metavar="FILE", help="prompts, one a line, or JSONL with 'prompt' or "
                        "'messages' and maybe 'id'; - is stdin")
    for config, flags in FLAGS.items():
        fields = {f.name: f for f in dataclasses.fields(config)}
        group = parser.add_argument_group("sampling" if config is SamplingConfig else "ESamp (with --esamp)")
        for name, (flag, text) in flags.items():
            default = fields[name].default
            hint = str(fields[name].type)               # of an `int | None` the flag takes the int
            kind = next(k for k in (int, float, str) if k.__name__ in hint)
            shown = "off" if default is None else default
            group.add_argument(flag, dest=name, type=kind, default=default, help=f"{text} (default: {shown})",
                metavar={int: "N", float: "X"}.get(kind) or "{" + ",".join(CHOICES[name]) + "}")
    add = parser.add_argument_group("how it runs").add_argument
    add("--batch-prompts", type=int, default=1, metavar="N", help="prompts decoded together (default: 1)")
    add("--device", help="cpu, cuda, cuda:N or mps (untested) (default: cuda if there is one, else cpu)")
    add("--dtype", choices=tuple(DTYPES),
        help="the model's numbers (default: the checkpoint's on a GPU, float32 on a CPU)")
    add("--no-record", dest="record", action="store_false",
        help="no log-probabilities, no figures on how far ESamp moved them; faster, the same tokens")
    add("--raw", action="store_true", help="do not apply the model's chat template")
    add("--system", metavar="TEXT", help="a system message in front of every prompt that has none")
    add("--out", metavar="FILE", help="write one JSON line per sample and a last one with the summary; "
        "replaces the file")
    add("--quiet", action="store_true", help="print nothing but warnings and errors")
    return parser


def pick_device(name):
    """The torch.device of a name; ValueError where there is none such."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if cuda else "cpu")
    match = re.fullmatch(r"(cpu|mps|cuda)(?::(\d+))?", name)
    count = {"cpu": 1, "mps": int(torch.backends.mps.is_available()), "cuda": cuda}
    if not match or int(match[2] or 0) >= count[match[1]]:
        there = ", ".join(f"{kind}:0 … {kind}:{n - 1}" if n > 1 else kind for kind, n in count.items() if n)
        raise ValueError(f"--device {name!r} is not there; accepted: {there}")
    return torch.device("cpu" if match[1] == "cpu" else name)


def run(args):
    """A whole run after its flags were parsed: everything is checked before any weight is read."""
    sampling = SamplingConfig(**{name: getattr(args, name) for name in FLAGS[SamplingConfig]})
    esamp = ESampConfig(seed=sampling.seed, **{name: getattr(args, name) for name in FLAGS[ESampConfig]})
    esamp = esamp if args.esamp else None
    at_least_one("batch_prompts", args.batch_prompts)
    device, out, prompts = pick_device(args.device), Out(args.out), gather_prompts(args)
    folder = model_module.find(args.model if args.model is not None else BUNDLED)
    out.spare(args.prompts, folder)
    config = ModelConfig.read(folder)
    text = Text(folder, config)
    encoded = [encode(prompt, text, args, config) for prompt in prompts]
    dtype = DTYPES[args.dtype] if args.dtype else torch.float32 if device.type == "cpu" else config.dtype

    blank = model_module.blank(config)
    model_module.catalogue(folder, blank)
    lengths = [len(ids) for ids in encoded]
    parts = memory(blank, dtype or torch.float32, lengths, sampling, esamp, args.batch_prompts)
    if not args.quiet:
        for line in notes(args, sampling, esamp, text, device, parts):
            print(printable(line), file=sys.stderr, flush=True)
    model = model_module.load(folder, device, dtype)
    stats, seconds_s = decode_all(model, text, prompts, encoded, sampling, esamp, args, out)

    settings = {"model": args.model or BUNDLED.name, "batch_prompts": args.batch_prompts, "raw": args.raw,
                "system": args.system, "device": str(device), "torch": torch.__version__,
                "dtype": str(model.head_weight.dtype).removeprefix("torch."),
                "sampling": dataclasses.asdict(sampling), "esamp": esamp and dataclasses.asdict(esamp)}
    out.write([{"summary": {"settings": settings, "seconds": seconds_s, **stats.summary()}}])
    if not args.quiet:
        print("\n".join(report(stats, seconds_s, esamp, args.model or BUNDLED.name)))
    for warning in warnings(stats, esamp):
        print(f"WARNING: {warning}", file=sys.stderr)
    return 0


def decode_all(model, text, prompts, encoded, sampling, esamp, args, out):
    """Runs the batches; prints and writes a prompt's samples when all have ended: (Stats, seconds)."""
    stats, began, batch = Stats(), time.monotonic(), args.batch_prompts
    steps = min(sampling.max_new_tokens, model.config.max_position_embeddings - min(map(len, encoded)))
    silent = args.quiet or not sys.stderr.isatty()
    with tqdm(total=-(-len(encoded) // batch) * steps, unit="step", leave=False, disable=silent) as bar:
        def on_step(_t, finished):
            bar.update()
            for i in sorted({sample.prompt for sample in finished}):
                emit(prompts[i], [s for s in finished if s.prompt == i], text, sampling, args, out, bar)
        for start in range(0, len(encoded), batch):
            result = generate(model, encoded[start:start + batch], sampling, esamp, eos_ids=text.eos_ids,
                              on_step=on_step, first_prompt=start, record=args.record)
            stats += result.stats
            bar.n = (start // batch + 1) * steps
    return stats, time.monotonic() - began


def emit(prompt, samples, text, sampling, args, out, bar):
    """One prompt's samples, to the JSONL file and to the screen."""
    texts = [text.decode(sample.token_ids) for sample in samples]
    out.write([{"prompt_id": prompt.id, "sample": s.sample, "prompt": prompt.content, "text": t,
                "token_ids": s.token_ids, "finish_reason": s.finish_reason, "logprob": s.logprob,
                "novelty": s.novelty, "seed": sampling.seed} for s, t in zip(samples, texts, strict=True)])
    if args.quiet:
        return
    lines = [f"── {printable(prompt.messages[-1]['content'])}"]
    for s, t in zip(samples, texts, strict=True):
        lines.append(f"{s.sample:4d}  " + printable(t).replace("\n", "\n      "))
    with bar.external_write_mode(file=sys.stdout):
        print("\n".join(lines) + "\n", flush=True)


def main(argv=None):
    """Runs the command line: 0, or 2 after one line on stderr for bad input, or 130 after Ctrl-C."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:          # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        return run(build_parser().parse_args(argv))
    except KeyboardInterrupt:
        print("interrupted: unfinished prompts were dropped", file=sys.stderr)
        return 130
    except BrokenPipeError:                     # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, FloatingPointError) as error:
        message = one_line(error)
    except (MemoryError, RuntimeError) as error:
        memory_kinds = (MemoryError, torch.OutOfMemoryError)
        if not isinstance(error, memory_kinds) and "can't allocate memory" not in str(error):
            raise
        message = ("out of memory; lower --n, --batch-prompts, --max-new-tokens or --distiller-width, "
                   "or use --dtype bfloat16")
    with contextlib.suppress(OSError):          # a full disk behind stderr
        print(f"decode.py: error: {printable(message)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
