"""Decoding with ESamp: first the loop, which is the paper's Algorithm 1, then the command line around it.

    python decode.py --esamp                                   the bundled checkpoint on its own prompts
    python decode.py --model path --esamp --prompt "Once"      any Llama / Qwen2 / Qwen3 folder

`generate` takes token ids and returns token ids; text, chat templates and files belong to the second chapter.

Shapes: P prompts of K samples each are B = P·K rows, the rows of a prompt side by side; L positions, D width,
V vocabulary, T generated tokens. Token 0 of a row comes from the prefill and is the plain LLM's; the loop at step t
makes token t + 1. The LLM has its own dtype; logits and everything made from them are fp32 (`draw` works in fp64).
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import torch
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tqdm import tqdm

import model as model_module
from distiller import Distiller, DistillerConfig, at_least_one
from esamp import divergence, draw, keep_mask, novelty, reweight, uniform
from model import DTYPES, KVCache, Model, ModelConfig, read_json
from train_async import AsyncDistiller

LOOK_EVERY = 16                                         # steps between two looks of the host at the device

# ------------------------------------------------------------------------------
# chapter 1: the loop
# ------------------------------------------------------------------------------


def in_range(name, value, low, high, above=False):
    """ValueError unless value is a number with low ≤ value ≤ high (low < value where `above`)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and low <= value <= high and math.isfinite(value) and not (above and value == low)):
        limit = f" to {high}" if high < math.inf else ""
        raise ValueError(f"{name} is {value!r}; accepted: {'above' if above else 'from'} {low}{limit}, finite")


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn; None switches a filter off. A ValueError names the field out of range."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    n: int = 16
    max_new_tokens: int = 256
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


@dataclass(frozen=True)
class ESampConfig(DistillerConfig):
    """β and the Distiller's knobs."""

    beta: float = 0.25

    def __post_init__(self):
        super().__post_init__()
        in_range("beta", self.beta, 0, math.inf)


@dataclass(frozen=True)
class Sample:
    """One finished row: prompt is its index in the whole input, the lists are as long as token_ids (EOS included)."""

    prompt: int
    sample: int
    token_ids: list
    finish_reason: str                                  # "stop": drew an EOS; "length": its token or context limit
    logprob: list                                       # log softmax(ref) of the token at T = 1, unfiltered
    novelty: list                                       # ‖e‖ behind the token; None for the first one and for vanilla


@dataclass(frozen=True)
class Generation:
    """What `generate` returns; the Distillers go on where they stopped when they are passed to it again."""

    samples: list
    stats: "Stats"
    distillers: Distiller | None


@torch.no_grad()
def generate(model, prompts, sampling, esamp=None, *, eos_ids, distillers=None, on_step=None, first_prompt=0):
    """Draws `sampling.n` samples of each prompt with ESamp, or vanilla where `esamp` is None → `Generation`.

    prompts: lists of token ids; eos_ids: the ids that end a sample. distillers: those of an earlier `Generation` for
    the same prompts, trained on in place; None makes new ones. on_step(t, finished) is called after every step with
    the samples of each prompt whose samples have all ended since the last call. first_prompt: the position of
    prompts[0] in the whole input, which the noise depends on. ValueError for a prompt that is empty or leaves no room
    in the context, FloatingPointError for logits or predictions that are not finite.
    """
    device, rows = model.head_weight.device, len(prompts) * sampling.n
    limit_B = token_limits(model.config, prompts, sampling, device)
    noise = Noise(sampling, len(prompts), first_prompt, device)
    eos_1E = torch.tensor([sorted(eos_ids)], dtype=torch.int64, device=device)
    steps = int(limit_B.max())
    ledger = Ledger(steps, limit_B, sampling, first_prompt, frozenset(eos_ids))
    cache, ref_BV = prefill(model, prompts, sampling.n, steps)

    keep_BV = keep_mask(ref_BV, *filters(sampling))
    token_B = noise.draw(0, ref_BV.masked_fill(~keep_BV, -torch.inf))           # the first token is the plain LLM's
    live_B = torch.ones(rows, dtype=torch.bool, device=device)
    ledger.write(0, live_B, token_B, ref_BV)
    live_B = live_B & (token_B[:, None] != eos_1E).all(-1) & (limit_B > 1)
    if on_step:
        on_step(0, ledger.look(0, live_B))

    if esamp:
        distillers = distillers or new_distillers(model.config, len(prompts), esamp, device)
        updates = distillers.step_P.clone()
        side = AsyncDistiller(distillers, rows, model.config.hidden_size, esamp.train_every, device)
        baselines = Baselines(len(distillers.step_P), rows, model.config.hidden_size, device)
    try:
        for t in range(steps - 1):
            shallow_BD = model.lower(token_B, cache)                            # embedding, layer 1
            if esamp:
                side.predict(t, shallow_BD, live_B)                             # side stream: ĥ with φ_t
            deep_BD = model.upper(shallow_BD, cache)                            # layers 2 … L, final norm
            ref_BV = model.head(deep_BD)
            keep_BV = keep_mask(ref_BV, *filters(sampling))
            plain_BV = ref_BV.masked_fill(~keep_BV, -torch.inf)
            if esamp:
                predicted_BD = side.prediction()                                # waits for ĥ
                dist_BV = model.head(predicted_BD)
                new_BV = reweight(ref_BV, dist_BV, esamp.beta, keep_BV)
            else:
                new_BV = plain_BV
            token_B = noise.draw(t + 1, new_BV)
            if esamp:
                side.train(t, deep_BD)                                          # side stream: φ_t → φ_{t+1}
            ledger.write(t + 1, live_B, token_B, ref_BV)
            if esamp:
                ledger.write_esamp(t + 1, new_BV, plain_BV, dist_BV, noise, token_B, novelty(deep_BD, predicted_BD),
                                   baselines.errors(shallow_BD, deep_BD, live_B))
            live_B = live_B & (token_B[:, None] != eos_1E).all(-1) & (limit_B > t + 2)      # seen by step t + 1
            looking = (t + 1) % LOOK_EVERY == 0 or t == steps - 2
            finished = ledger.look(t + 1, live_B) if looking else []
            if on_step:
                on_step(t + 1, finished)
            if looking and ledger.all_ended:
                break
    finally:
        if esamp:
            side.finish()
    if steps == 1:
        ledger.look(0, live_B)
    stats = ledger.stats(int((distillers.step_P - updates).sum()) if esamp else 0)
    return Generation(ledger.samples, stats, distillers if esamp else None)


def filters(sampling):
    """The arguments of `keep_mask` after the logits."""
    return sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p


def token_limits(config, prompts, sampling, device):
    """How many tokens each row may get, int64 (B,): max_new_tokens, clipped to what the context leaves."""
    room = []
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} has no token")
        room.append(config.max_position_embeddings - len(prompt))
        if room[-1] < 1:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; accepted: at most "
                             f"{config.max_position_embeddings - 1}, one less than the context")
    limit_P = torch.tensor(room, device=device).clamp(max=sampling.max_new_tokens)
    return limit_P.repeat_interleave(sampling.n)


def prefill(model, prompts, samples, steps):
    """Runs every prompt once and shares it among its samples: (cache of B rows, ref (B, V) after the prompt).

    Prompts are padded on the right; a real token sees only what is left of it, so padding changes nothing.
    """
    device = model.head_weight.device
    length_P = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = max(len(prompt) for prompt in prompts)
    token_PL = torch.tensor([list(prompt) + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    cache = KVCache(model.config, len(prompts), longest, device, model.head_weight.dtype)
    deep_PLD = model.upper(model.lower(token_PL, cache), cache)
    last_PD = deep_PLD[torch.arange(len(prompts), device=device), length_P - 1]
    return cache.repeat(samples, length_P, longest + steps), model.head(last_PD).repeat_interleave(samples, dim=0)


def new_distillers(config, prompts, esamp, device):
    """One Distiller per prompt, or one for all of them (scope `batch`), as one batched module."""
    return Distiller(esamp, prompts if esamp.scope == "prompt" else 1, config.hidden_size, device)


class Noise:
    """The run's randomness: u(seed, prompt, sample, step) for every row, and nothing else."""

    def __init__(self, sampling, prompts, first_prompt, device):
        self.device = torch.device("cpu") if device.type == "mps" else device   # MPS has no fp64
        rows = torch.arange(prompts * sampling.n, device=self.device)
        self.prompt_B, self.sample_B = first_prompt + rows // sampling.n, rows % sampling.n
        self.seed, self.temperature = sampling.seed, sampling.temperature

    def draw(self, step, logits_BV):
        """Token `step` of every row from softmax(logits/T), inverse CDF at that row's and step's u."""
        noise_B = uniform(self.seed, self.prompt_B, self.sample_B, step)
        return draw(logits_BV.to(self.device), noise_B, self.temperature).to(logits_BV.device)


class Baselines:
    """What predicting without learning would cost: ĥ = h¹, and ĥ = the mean of all h^L seen before."""

    def __init__(self, distillers, rows, width_D, device):
        self.shape_PKD = (distillers, rows // distillers, width_D)
        self.sum_P1D = torch.zeros(distillers, 1, width_D, device=device)
        self.count_P11 = torch.zeros(distillers, 1, 1, device=device)

    def errors(self, shallow_BD, deep_BD, live_B):
        """‖h^L − h¹‖² and ‖h^L − mean‖², both (B,), then takes the live rows into the mean."""
        shallow_PKD, deep_PKD = shallow_BD.float().view(self.shape_PKD), deep_BD.float().view(self.shape_PKD)
        live_PK1 = live_B.view(*self.shape_PKD[:2], 1)
        to_shallow_PK = (deep_PKD - shallow_PKD).square().sum(-1)
        to_mean_PK = (deep_PKD - self.sum_P1D / self.count_P11.clamp(min=1)).square().sum(-1)
        self.sum_P1D += torch.where(live_PK1, deep_PKD, 0).sum(1, keepdim=True)
        self.count_P11 += live_PK1.sum(1, keepdim=True)
        return to_shallow_PK.flatten(), to_mean_PK.flatten()


# ------------------------------------------------------------------------------
# what a run leaves behind
# ------------------------------------------------------------------------------

@dataclass
class Stats:
    """Sums over a run's rows; those of several runs add up (`+`), `summary` makes the ratios."""

    tokens: int = 0                                     # generated, EOS included
    reweighted: int = 0                                 # of them drawn from π_new: all but each sample's first
    moved: int = 0                                      # of these, other than vanilla's draw with the same u
    updates: int = 0                                    # steps that the Distillers' Adam took, all together
    samples: int = 0
    distinct: int = 0                                   # different token_ids within each prompt, summed
    kl: float = 0.0                                     # KL(π_new ‖ π_ref), nats, same T and filters
    total_variation: float = 0.0
    first_rows: int = 0                                 # rows of each prompt's first decode step, and the squared
    first_loss: float = 0.0                             # errors (eq. 10) of three predictors on them
    first_shallow: float = 0.0
    first_mean: float = 0.0
    last_rows: int = 0                                  # the same over each prompt's last ten decode steps
    last_loss: float = 0.0
    last_shallow: float = 0.0
    last_mean: float = 0.0

    def __add__(self, other):
        return Stats(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))

    def summary(self):
        """A dict of figures; None where there is nothing to divide by, or an infinite KL (T = 0)."""
        def per(total, count):
            return total / count if count and math.isfinite(total) else None
        return {
            "tokens": self.tokens, "samples": self.samples, "distinct_samples": self.distinct,
            "updates": self.updates, "reweighted_tokens": self.reweighted, "moved_tokens": self.moved,
            "moved_share": per(self.moved, self.reweighted), "kl_nats": per(self.kl, self.reweighted),
            "total_variation": per(self.total_variation, self.reweighted),
            "loss_first_step": per(self.first_loss, self.first_rows),
            "loss_last_10_steps": per(self.last_loss, self.last_rows),
            "loss_last_10_steps_if_h1": per(self.last_shallow, self.last_rows),
            "loss_last_10_steps_if_running_mean": per(self.last_mean, self.last_rows),
        }


class Ledger:
    """Everything that a run records, one row of device memory per token; the host reads it when it looks."""

    def __init__(self, steps, limit_B, sampling, first_prompt, eos_ids):
        def column(dtype):
            return torch.zeros(steps, len(limit_B), dtype=dtype, device=limit_B.device)
        self.token_TB, self.live_TB = column(torch.int64), column(torch.bool)
        self.finite_TB, self.moved_TB = column(torch.bool), column(torch.bool)
        self.logprob_TB, self.novelty_TB = column(torch.float32), column(torch.float32)
        self.kl_TB, self.variation_TB = column(torch.float32), column(torch.float32)
        self.shallow_TB, self.mean_TB = column(torch.float32), column(torch.float32)
        self.sampling, self.first_prompt, self.eos_ids = sampling, first_prompt, eos_ids
        self.prompts = len(limit_B) // sampling.n
        self.samples, self.ended, self.checked, self.esamp = [], set(), 0, False

    @property
    def all_ended(self):
        """True once a look found every sample of every prompt ended."""
        return len(self.ended) == self.prompts

    def write(self, step, live_B, token_B, ref_BV):
        """Records one token per row."""
        self.token_TB[step], self.live_TB[step] = token_B, live_B
        self.finite_TB[step] = ref_BV.isfinite().all(-1)
        self.logprob_TB[step] = ref_BV.log_softmax(-1).gather(-1, token_B[:, None])[:, 0]

    def write_esamp(self, step, new_BV, plain_BV, dist_BV, noise, token_B, novelty_B, errors):
        """Records what ESamp did to that token, against vanilla at the same temperature, filters and u."""
        self.esamp = True
        self.finite_TB[step] &= dist_BV.isfinite().all(-1) & novelty_B.isfinite()
        self.novelty_TB[step] = novelty_B
        self.moved_TB[step] = noise.draw(step, plain_BV) != token_B
        self.kl_TB[step], self.variation_TB[step] = divergence(new_BV, plain_BV, self.sampling.temperature)
        self.shallow_TB[step], self.mean_TB[step] = errors

    def look(self, step, live_B):
        """The samples of the prompts that have ended since the last look; FloatingPointError for a bad number."""
        window = slice(self.checked, step + 1)
        bad = (self.live_TB[window] & ~self.finite_TB[window]).nonzero().tolist()
        if bad:
            prompt, sample = divmod(bad[0][1], self.sampling.n)
            raise FloatingPointError(f"not finite: the logits or the Distiller's prediction at step {self.checked + bad[0][0]}"
                                     f", prompt {self.first_prompt + prompt}, sample {sample}")
        self.checked, finished = step + 1, []
        for prompt, live in enumerate(live_B.view(self.prompts, -1).any(-1).tolist()):
            if not live and prompt not in self.ended:
                self.ended.add(prompt)
                finished += self._samples(prompt, step + 1)
        self.samples += finished
        return finished

    def _samples(self, prompt, steps):
        """The finished rows of one prompt."""
        found, K = [], self.sampling.n
        rows = slice(prompt * K, (prompt + 1) * K)
        columns = (self.live_TB, self.token_TB, self.logprob_TB, self.novelty_TB)
        live_KT, token_KT, logprob_KT, novelty_KT = (c[:steps, rows].T.tolist() for c in columns)
        for k in range(K):
            length = sum(live_KT[k])
            tokens = token_KT[k][:length]
            new = [None] + novelty_KT[k][1:length] if self.esamp else [None] * length
            reason = "stop" if tokens[-1] in self.eos_ids else "length"
            found.append(Sample(self.first_prompt + prompt, k, tokens, reason, logprob_KT[k][:length], new))
        return found

    def stats(self, updates):
        """The run's `Stats`, once every sample has ended."""
        stats = Stats(tokens=int(self.live_TB.sum()), updates=updates, samples=len(self.samples))
        stats.distinct = len({(s.prompt, *s.token_ids) for s in self.samples})
        if not self.esamp:
            return stats
        live_TB = self.live_TB.clone()
        live_TB[0] = False
        stats.reweighted, stats.moved = int(live_TB.sum()), int((live_TB & self.moved_TB).sum())
        stats.kl, stats.total_variation = (float(c[live_TB].sum()) for c in (self.kl_TB, self.variation_TB))
        for rows in torch.arange(live_TB.shape[1], device=live_TB.device).view(self.prompts, -1):
            last = int(live_TB[:, rows].any(-1).sum())
            for name, span in (("first", slice(1, 2)), ("last", slice(max(1, last - 9), last + 1))):
                live = live_TB[span, rows]
                sums = [(live * c[span, rows]).sum().item() for c in (self.novelty_TB ** 2, self.shallow_TB, self.mean_TB)]
                for field_name, value in zip(("rows", "loss", "shallow", "mean"), (int(live.sum()), *sums), strict=True):
                    setattr(stats, f"{name}_{field_name}", getattr(stats, f"{name}_{field_name}") + value)
        return stats


# ------------------------------------------------------------------------------
# chapter 2: text in, text out
# ------------------------------------------------------------------------------

BUNDLED = Path(__file__).resolve().parent / "checkpoints" / "countdown"
SAMPLING_HINTS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")


class Text:
    """A checkpoint's tokenizer and chat template: text → ids → text, and the set of ids that end a sample."""

    def __init__(self, folder, config):
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder} has no tokenizer.json; expected a tokenizer in that format")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:                      # the library raises bare Exceptions
            raise ValueError(f"{path} is not a readable tokenizer ({one_line(error)})") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        top = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        if top >= config.vocab_size:
            raise ValueError(f"{path} has token id {top}, but the model embeds only {config.vocab_size} tokens")
        self.settings = optional_json(Path(folder) / "tokenizer_config.json")
        self.special = {name: token_text(self.settings[name]) for name in
                        ("bos_token", "eos_token", "unk_token", "pad_token") if self.settings.get(name)}
        self.template = self._template(Path(folder) / "chat_template.jinja")
        self.hints = optional_json(Path(folder) / "generation_config.json")
        self.eos_ids = eos_set(self.hints, Path(folder) / "generation_config.json") | eos_set(
            read_json(Path(folder) / "config.json"), Path(folder) / "config.json")

    def _template(self, path):
        """The compiled chat template, None where there is none; it may be untrusted, so it lives in a sandbox."""
        try:
            source = path.read_text(encoding="utf-8") if path.is_file() else self.settings.get("chat_template")
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8") from None
        if isinstance(source, list):                    # several named ones: [{"name": "default", "template": …}, …]
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise ValueError(f"the chat template is a {type(source).__name__}; expected a string")
        box = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        box.filters["tojson"] = lambda value, indent=None, ensure_ascii=False: json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent)
        box.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
        try:
            return box.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise ValueError(f"the chat template does not compile ({one_line(error)})") from None

    def encode_raw(self, text):
        """Ids with the tokenizer's own special tokens in front: one BOS, never two."""
        ids = self.tokenizer.encode(text).ids
        bos = self.tokenizer.token_to_id(self.special.get("bos_token", ""))
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def encode_chat(self, messages):
        """(rendered text, its ids): the template writes every special token, the tokenizer adds none."""
        try:
            text = self.template.render(messages=messages, tools=None, documents=None, add_generation_prompt=True,
                                        **self.special)
        except Exception as error:                      # whatever a template does wrong
            raise ValueError(f"the chat template failed ({type(error).__name__}: {one_line(error)})") from None
        return text, self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """The text of ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def unknown(self, text):
        """The characters of text that the tokenizer drops or maps to its unknown token, each once."""
        unk, covered, lost = getattr(self.tokenizer.model, "unk_token", None), set(), set()
        whole = self.tokenizer.encode(text, add_special_tokens=False)
        for token, (start, end) in zip(whole.tokens, whole.offsets, strict=True):
            covered.update(range(start, end))
            if token == unk:
                lost.update(text[start:end])
        bare = {c for i, c in enumerate(text) if i not in covered and not c.isspace()}      # spaces may be trimmed
        lost.update(c for c in bare if not self.tokenizer.encode(c, add_special_tokens=False).ids)
        return "".join(sorted(lost))


def raise_exception(message):
    """What a template calls to refuse a conversation."""
    raise TemplateError(message)


def one_line(error):
    """An exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def optional_json(path):
    """The JSON object in a file, {} where there is no file."""
    return read_json(path) if path.is_file() else {}


def token_text(token):
    """A special token's text: a plain string, or the "content" of an object."""
    return str(token.get("content", "") if isinstance(token, dict) else token)


def eos_set(settings, path):
    """The ids under `eos_token_id`: a number, a list of them, or nothing."""
    ids = settings.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2 ** 31 for i in ids):
        raise ValueError(f"{path}: eos_token_id is {settings['eos_token_id']!r}; expected a token id or a list of them")
    return frozenset(ids)


# ------------------------------------------------------------------------------
# prompts
# ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Prompt:
    """One prompt: what the user calls it, where it stands (for error messages), and what was given."""

    id: object
    where: str
    content: object                                     # a string, or a list of messages


def read_prompts(source):
    """The prompts of a file, `-` for standard input: JSONL when the first line is a JSON object, else one a line."""
    data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    name = "standard input" if source == "-" else source
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name}, line {line}: not UTF-8 (byte {data[error.start]:#04x})") from None
    lines = [(i, line.strip("\r")) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{name} holds no prompt")
    if not re.match(r'\s*\{\s*["}]', lines[0][1]):
        return [Prompt(i, f"{name}, line {number}", line) for i, (number, line) in enumerate(lines)]
    return [json_prompt(i, f"{name}, line {number}", line) for i, (number, line) in enumerate(lines)]


def json_prompt(index, where, line):
    """The prompt of one JSONL line: `prompt` (a string) or `messages` (a list of {role, content}), optional `id`."""
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({one_line(error)})") from None
    if not isinstance(entry, dict) or ("prompt" in entry) == ("messages" in entry):
        raise ValueError(f"{where}: expected an object with either 'prompt' or 'messages'")
    content, name = entry.get("prompt", entry.get("messages")), entry.get("id", index)
    if "prompt" in entry and not isinstance(content, str):
        raise ValueError(f"{where}: 'prompt' is {content!r}; expected a string")
    if "messages" in entry and not (isinstance(content, list) and content and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in content)):
        raise ValueError(f"{where}: 'messages' must be a non-empty list of objects with string 'role' and 'content'")
    if not isinstance(name, (str, int, float)):
        raise ValueError(f"{where}: 'id' is {name!r}; expected a string or a number")
    return Prompt(name, where, content)


def gather_prompts(args):
    """The prompts that the flags ask for; the bundled model brings its own."""
    if args.prompts is not None:
        return read_prompts(args.prompts)
    if args.prompt:
        return [Prompt(i, f"--prompt {text!r}", text) for i, text in enumerate(args.prompt)]
    if args.model is None:
        return read_prompts(str(BUNDLED / "prompts.txt"))
    raise ValueError("no prompt; give --prompt TEXT (repeatable) or --prompts FILE")


def encode(prompt, text, args, config):
    """A prompt's ids; ValueError names it where it can not be encoded or leaves no room in the context."""
    chat = text.template is not None and not args.raw
    messages = prompt.content if isinstance(prompt.content, list) else [{"role": "user", "content": prompt.content}]
    if args.system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": args.system}, *messages]
    if not chat and (isinstance(prompt.content, list) or args.system is not None):
        raise ValueError(f"{prompt.where}: messages and --system need a chat template, and "
                         + ("--raw turns it off" if args.raw else "this model has none"))
    for message in messages:
        if any("\ud800" <= c <= "\udfff" for c in message["content"]):
            raise ValueError(f"{prompt.where}: not valid Unicode text (a lone surrogate)")
    bad = "".join(text.unknown(message["content"]) for message in messages)
    if bad:
        hint = f"; its prompts look like those in {BUNDLED.name}/prompts.txt" if args.model is None else ""
        raise ValueError(f"{prompt.where}: the tokenizer does not know the characters {bad!r}{hint}")
    ids = text.encode_chat(messages)[1] if chat else text.encode_raw(prompt.content)
    if not ids:
        raise ValueError(f"{prompt.where}: encodes to no token; give at least one")
    if len(ids) >= config.max_position_embeddings:
        raise ValueError(f"{prompt.where}: has {len(ids)} tokens; the context holds {config.max_position_embeddings}, "
                         "and one must be left to generate")
    return ids


# ------------------------------------------------------------------------------
# what the user sees
# ------------------------------------------------------------------------------

def megabytes(count):
    """A number of bytes for people."""
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= u or u == 1e3)
    return f"{count / unit:.1f} {name}"


def memory(config, dtype, lengths, sampling, esamp, batch):
    """What a run holds at once, in bytes, by part."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Model(config).parameters())
    size, rows = dtype.itemsize, min(batch, len(lengths)) * sampling.n
    slots = max(lengths) + min(sampling.max_new_tokens, config.max_position_embeddings - min(lengths))
    parts = {"weights": parameters * size,
             "kv cache": 2 * config.num_hidden_layers * rows * config.num_key_value_heads * slots * config.head_dim * size,
             "logits": 8 * 4 * rows * config.vocab_size}         # ref, dist, new and their fp64 CDF, about
    if esamp:
        distillers = min(batch, len(lengths)) if esamp.scope == "prompt" else 1
        pairs = 2 * (2 + esamp.train_every) * rows * config.hidden_size * 4
        parts["Distiller"] = distillers * esamp.bytes(config.hidden_size) + pairs
    return parts


def printable(text):
    """Text for a terminal: control characters other than newline and tab are shown, not obeyed."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def report(stats, seconds_s, esamp, name):
    """The lines that end a run for a person."""
    s = stats.summary()

    def share(value, form):
        return "–" if value is None else format(value, form)
    lines = [f"{'ESamp, β ' + format(esamp.beta, 'g') if esamp else 'vanilla'} on {name}",
             f"  tokens       {s['tokens']:,} in {seconds_s:.1f} s, {s['tokens'] / max(seconds_s, 1e-9):,.0f} tok/s",
             f"  distinct     {s['distinct_samples']} of {s['samples']} samples"]
    if esamp:
        lines += [
            f"  Distiller    {s['updates']} updates; loss {share(s['loss_first_step'], '.4g')} at the first step → "
            f"{share(s['loss_last_10_steps'], '.4g')} over the last ten",
            f"               there, ĥ = h¹ gives {share(s['loss_last_10_steps_if_h1'], '.4g')} and a running mean of "
            f"h^L {share(s['loss_last_10_steps_if_running_mean'], '.4g')}",
            f"  reweighting  moved {share(s['moved_share'], '.1%')} of {s['reweighted_tokens']:,} tokens; "
            f"KL(new ‖ ref) {share(s['kl_nats'], '.4f')} nats, total variation {share(s['total_variation'], '.4f')}"]
    return lines


def warnings(stats, esamp):
    """What a run must not pass over in silence: a Distiller that did nothing."""
    if esamp and stats.updates == 0:
        yield ("the Distiller made no update: the samples were shorter than "
               f"{esamp.train_every + 1} tokens (--train-every {esamp.train_every})")
    if esamp and esamp.beta > 0 and stats.moved == 0:
        yield f"no token was moved although β is {esamp.beta:g}: this run is no evidence about ESamp"


class Out:
    """The JSONL file: opened at the first line, whole lines only, even under Ctrl-C."""

    def __init__(self, path):
        self.path, self.file = path, None
        if path is None:
            return
        folder = Path(path).resolve().parent
        if Path(path).is_dir() or not folder.is_dir() or not os.access(path if Path(path).exists() else folder, os.W_OK):
            raise ValueError(f"--out {path!r} can not be written; expected a file in a folder that exists")

    def write(self, entries):
        """Appends JSON lines in one piece."""
        if self.path is None:
            return
        with uninterrupted():
            self.file = self.file or open(self.path, "w", encoding="utf-8")
            self.file.write("".join(json.dumps(e, ensure_ascii=False, allow_nan=False) + "\n" for e in entries))
            self.file.flush()


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
        "seed": ("--seed", "of the noise and of the Distiller's first weights"),
    },
    ESampConfig: {
        "beta": ("--beta", "strength of ESamp; 0 is the plain model"),
        "scope": ("--distiller-scope", "one Distiller per prompt, or one per batch of prompts"),
        "width": ("--distiller-width", "inner width of the Distiller"),
        "lr": ("--distiller-lr", "learning rate of the Distiller"),
        "train_every": ("--train-every", "steps whose pairs share one update of the Distiller"),
    },
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message):
        """ValueError, for `main` to print."""
        raise ValueError(message + " (see --help)")


def build_parser():
    """The flags; numeric ones come from the config dataclasses, one place per knob."""
    parser = Parser(prog="decode.py", description="Generate text with ESamp (arXiv:2604.24927): samples of one prompt "
                    "steer away from contexts that its Distiller has already learnt.", epilog="examples:\n"
                    "  python decode.py --esamp\n"
                    "  python decode.py --model path --esamp --prompt 'Once upon a time' --n 8\n"
                    "  python decode.py --model path --esamp --prompts questions.jsonl --out answers.jsonl",
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", metavar="PATH", help="folder in Hugging Face layout, or Org/Name in the Hugging Face "
                        "cache or on the hub (default: the bundled Countdown model)")
    parser.add_argument("--esamp", action=argparse.BooleanOptionalAction, default=False, help="reweight with a Distiller "
                        "(default: off, the plain model)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    source.add_argument("--prompts", metavar="FILE", help="prompts, one a line, or JSONL with 'prompt' or 'messages' "
                        "and an optional 'id'; - is standard input")
    for config, flags in FLAGS.items():
        for f in dataclasses.fields(config):
            if f.name in flags:
                flag, text = flags[f.name]
                kind = next(k for k in (int, float, str) if k.__name__ in str(f.type))
                default = "off" if f.default is None else f.default
                parser.add_argument(flag, dest=f.name, type=kind, default=f.default, help=f"{text} (default: {default})",
                                    metavar={int: "N", float: "X", str: "{prompt,batch}"}[kind])
    parser.add_argument("--batch-prompts", type=int, default=1, metavar="N", help="prompts decoded together (default: 1)")
    parser.add_argument("--device", help="cpu, cuda, cuda:N or mps (untested) (default: cuda if there is one, else cpu)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the model (default: the checkpoint's on a GPU, "
                        "float32 on a CPU)")
    parser.add_argument("--raw", action="store_true", help="do not apply the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="a system message in front of every prompt")
    parser.add_argument("--out", metavar="FILE", help="write one JSON line per sample and a last one with the summary")
    parser.add_argument("--quiet", action="store_true", help="print nothing but warnings and errors")
    return parser


def pick_device(name):
    """The torch.device of a name; ValueError where there is none such."""
    cuda = torch.cuda.is_available()
    if name is None:
        return torch.device("cuda" if cuda else "cpu")
    match = re.fullmatch(r"(cpu|mps|cuda)(?::(\d+))?", name)
    count = {"cpu": 1, "mps": int(torch.backends.mps.is_available()), "cuda": torch.cuda.device_count() if cuda else 0}
    if not match or int(match[2] or 0) >= count[match[1]]:
        there = ", ".join(f"{kind}:0 … {kind}:{n - 1}" if n > 1 else kind for kind, n in count.items() if n)
        raise ValueError(f"--device {name!r} is not there; accepted: {there}")
    return torch.device(name)


def note(message, args):
    """A line for a person, on stderr, so that stdout pipes."""
    if not args.quiet:
        print(message, file=sys.stderr, flush=True)


def run(args):
    """The whole of a run after its flags were parsed: everything is checked before any weight is read."""
    pick = {config: {name: getattr(args, name) for name in flags} for config, flags in FLAGS.items()}
    sampling = SamplingConfig(**pick[SamplingConfig])
    esamp = ESampConfig(seed=sampling.seed, **pick[ESampConfig])
    esamp = esamp if args.esamp else None
    at_least_one("batch_prompts", args.batch_prompts)
    device, out, prompts = pick_device(args.device), Out(args.out), gather_prompts(args)
    folder = model_module.find(args.model if args.model is not None else BUNDLED)
    config = ModelConfig.read(folder)
    text = Text(folder, config)
    dtype = DTYPES[args.dtype] if args.dtype else torch.float32 if device.type == "cpu" else config.dtype
    encoded = [encode(prompt, text, args, config) for prompt in prompts]

    hints = ", ".join(f"{k} {text.hints[k]}" for k in SAMPLING_HINTS if k in text.hints)
    if hints:
        note(f"note: generation_config.json suggests {hints}; not used, the flags alone decide", args)
    if device.type == "mps":
        note("note: mps is untested", args)
    parts = memory(config, dtype or torch.float32, [len(ids) for ids in encoded], sampling, esamp, args.batch_prompts)
    note(f"memory: {' + '.join(f'{k} {megabytes(v)}' for k, v in parts.items())} = {megabytes(sum(parts.values()))} "
         f"on {device}", args)
    model = model_module.load(folder, device, dtype)
    stats, seconds_s = decode_all(model, text, prompts, encoded, sampling, esamp, args, out)

    settings = {"model": args.model or BUNDLED.name, "esamp": args.esamp, **dataclasses.asdict(sampling),
                **({"distiller_" + k if k != "beta" else k: v for k, v in dataclasses.asdict(esamp).items()} if esamp else {}),
                "batch_prompts": args.batch_prompts, "device": str(device), "torch": torch.__version__,
                "dtype": str(model.head_weight.dtype).removeprefix("torch."), "raw": args.raw, "system": args.system}
    out.write([{"summary": {"settings": settings, "seconds": seconds_s, **stats.summary()}}])
    if not args.quiet:
        print("\n".join(report(stats, seconds_s, esamp, folder.name)))
    for warning in warnings(stats, esamp):
        print(f"WARNING: {warning}", file=sys.stderr)
    return 0


def decode_all(model, text, prompts, encoded, sampling, esamp, args, out):
    """Runs the batches; prints and writes a prompt's samples when all of them have ended: (Stats, seconds)."""
    stats, began = Stats(), time.monotonic()
    steps = min(sampling.max_new_tokens, model.config.max_position_embeddings - min(map(len, encoded)))
    total = -(-len(encoded) // args.batch_prompts) * steps
    with tqdm(total=total, unit="step", leave=False, disable=args.quiet or not sys.stderr.isatty()) as bar:
        for start in range(0, len(encoded), args.batch_prompts):
            def on_step(t, finished):
                bar.update()
                for i in sorted({sample.prompt for sample in finished}):
                    emit(prompts[i], [s for s in finished if s.prompt == i], text, sampling, args, out, bar)

            result = generate(model, encoded[start:start + args.batch_prompts], sampling, esamp, eos_ids=text.eos_ids,
                              on_step=on_step, first_prompt=start)
            stats += result.stats
            bar.n = (start // args.batch_prompts + 1) * steps
    return stats, time.monotonic() - began


def emit(prompt, samples, text, sampling, args, out, bar):
    """One prompt's samples, to the JSONL file and to the screen."""
    texts = [text.decode(sample.token_ids) for sample in samples]
    out.write([{"prompt_id": prompt.id, "sample": s.sample, "prompt": prompt.content, "text": t, "token_ids": s.token_ids,
                "finish_reason": s.finish_reason, "logprob": s.logprob, "novelty": s.novelty, "seed": sampling.seed}
               for s, t in zip(samples, texts, strict=True)])
    if args.quiet:
        return
    given = prompt.content if isinstance(prompt.content, str) else prompt.content[-1]["content"]
    lines = [f"── {printable(given)}"]
    lines += [f"{s.sample:4d}  " + printable(t).replace("\n", "\n      ") for s, t in zip(samples, texts, strict=True)]
    with bar.external_write_mode(file=sys.stdout):
        print("\n".join(lines) + "\n", flush=True)


def main(argv=None):
    """Runs the command line: 0, or 2 after one line on stderr for bad input, or 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return run(build_parser().parse_args(argv))
    except KeyboardInterrupt:
        print("interrupted: unfinished prompts were dropped", file=sys.stderr)
        return 130
    except BrokenPipeError:                             # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, FloatingPointError) as error:
        message = one_line(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        message = "out of memory; lower --n, --batch-prompts, --max-new-tokens or --distiller-width, or use --dtype bfloat16"
    print(f"decode.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
