"""Fills a table of `experiments.tables`, unit by unit, into a file that a kill can not hurt.

    python -m experiments.run --list
    python -m experiments.run stories                              → experiments/results/stories.jsonl
    python -m experiments.run countdown --amateur small            contrastive decoding needs one
    python -m experiments.run countdown_peaky --model peaky
    python -m experiments.run countdown --only 'vanilla*' 'rls β 0.5'
    python -m experiments.run stories --smoke                      a minute part of it, to see that it works

A unit is (seed, setting, chunk of prompts), seeds outermost, so that a run cut short has whole seeds. After
each one a JSON line is written through to the disk; started again, the run goes on with the first unit that
has no line (`resume`). What a file must not mix it refuses: other settings under the same name, other
problems, another model, another embedder. `experiments.report` reads the file.

    header   {"table", "task", "settings": the knobs that are not at their defaults, …}
    unit     {"setting", "seed", "first": its first prompt, "per_prompt": {metric: one figure per prompt},
              "stats": `decode.Stats.summary`, "steps": decode steps, "seconds": spent on sampling}

    stories     `Stories`     nll, tokens, vendi1, vendi_inf, cosine, distinct2, self_bleu, distinct
    countdown   `Countdown`   nll, tokens, correct, distinct, maj8, maj16, maj32

nll is −Σ log-probability of a prompt's samples under the model itself at T = 1 without filters, whatever they
were drawn with; tokens are theirs, EOS included.
"""

import argparse
import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from decode import BUNDLED, Text
from experiments import countdown, methods, metrics
from experiments.embeddings import embedder
from experiments.tables import AMATEUR, TABLES
from model import load

HERE = Path(__file__).resolve().parent
MAJORITIES = (8, 16, 32)
DRAWS = 200                                             # subsets behind each maj@k
DEVELOPMENT, PROBLEMS = 160, 400       # of one list of Countdown problems; the rest is held out
FIXED = ("table", "task", "split", "prompts", "chunk", "n", "max_new_tokens", "digits", "seeds", "model",
         "weights", "embedder")                         # what one file holds one of
WHERE = ("commit", "machine", "torch", "threads")       # what is told of each run that wrote to it


# ------------------------------------------------------------------------------
# tasks: prompts, and what is counted of their samples
# ------------------------------------------------------------------------------

class Stories:
    """Openings to go on from: how unlike each other a prompt's samples are, and how likely."""

    def __init__(self, table, text, embedding):
        openings = json.loads((HERE / "openings.json").read_text(encoding="utf-8"))[table.split]
        self.text, self.embed, self.prompts = text, embedding, chosen(openings, table)

    def measure(self, first, samples_PK):
        """{metric: a figure per prompt}; words for distinct-2 and self-BLEU are \\w+ and single signs."""
        text_PK = [[self.text.decode(s.token_ids) for s in samples] for samples in samples_PK]
        embedding_ND = self.embed([text for texts in text_PK for text in texts])
        figures = []
        for texts, embedding_KD in zip(text_PK, embedding_ND.chunk(len(text_PK)), strict=True):
            words = [re.findall(r"\w+|[^\w\s]", text.lower()) for text in texts]
            figures.append(dict(
                vendi1=metrics.vendi(embedding_KD), vendi_inf=metrics.vendi(embedding_KD, math.inf),
                cosine=metrics.mean_cosine(embedding_KD),
                distinct2=metrics.distinct_n(words, 2) if any(len(w) > 1 for w in words) else 0.0,
                self_bleu=metrics.self_bleu(words), distinct=len(set(texts))))
        return {name: [f[name] for f in figures] for name in figures[0]}


class Countdown:
    """Problems with a verifier: how many answers are right, how many different solutions, who wins a vote."""

    def __init__(self, table, text, embedding=None):
        problems = countdown.test_prompts(random.Random("countdown tables"), PROBLEMS, table.digits)
        cut = {"development": slice(0, DEVELOPMENT), "held_out": slice(DEVELOPMENT, None)}[table.split]
        self.text, self.prompts = text, chosen(problems[cut], table)

    def measure(self, first, samples_PK):
        """{metric: a figure per prompt}."""
        figures = []
        for prompt, samples in zip(self.prompts[first:], samples_PK, strict=False):
            answers = [self.text.decode(s.token_ids) for s in samples]
            solutions = [countdown.canonical(prompt, answer) for answer in answers]
            sizes = [k for k in MAJORITIES if k <= len(answers)]
            shares = majority(answers, [s is not None for s in solutions], sizes)
            figures.append(dict(
                correct=sum(s is not None for s in solutions), distinct=len(set(solutions) - {None}),
                **{f"maj{k}": share for k, share in zip(sizes, shares, strict=True)}))
        return {name: [f[name] for f in figures] for name in figures[0]}


TASKS = {"stories": Stories, "countdown": Countdown}


def chosen(texts, table):
    """The first `table.prompts` of them; ValueError where there are fewer."""
    if len(texts) < table.prompts:
        raise ValueError(f"prompts is {table.prompts}; {table.task} {table.split} has {len(texts)}")
    return texts[:table.prompts]


def majority(answers, right, sizes, seed=0):
    """For each k: the share of k-subsets whose commonest answer is right; tied answers share the credit.

    The sum of `metrics.maj_at_k` over all different right answers, on the same 200 random orders for each k.
    """
    different = {answer: i for i, answer in enumerate(dict.fromkeys(answers))}
    vote_N = torch.tensor([different[answer] for answer in answers])
    right_A = torch.zeros(len(different)).scatter(0, vote_N, torch.tensor(right, dtype=torch.float32))
    source, shares = torch.Generator().manual_seed(seed), []
    order_RN = torch.rand(DRAWS, len(answers), generator=source).argsort(dim=-1)
    for k in sizes:
        vote_RK = vote_N[order_RN[:, :k]]
        count_RA = torch.zeros(DRAWS, len(different)).scatter_add(1, vote_RK, torch.ones(DRAWS, k))
        top_RA = (count_RA == count_RA.amax(-1, keepdim=True)).float()
        shares.append((top_RA @ right_A / top_RA.sum(-1)).mean().item())
    return shares


# ------------------------------------------------------------------------------
# a unit of work
# ------------------------------------------------------------------------------

class Bench:
    """A table's model, prompts and measures, ready to fill in any of its units."""

    def __init__(self, table, folder, amateur, embedding):
        self.table, self.model = table, load(folder)
        self.text = Text(folder, self.model.config)
        self.amateur = load(amateur) if amateur else None
        self.task = TASKS[table.task](table, self.text, embedding)
        self.prompts = [self.text.encode_raw(prompt) for prompt in self.task.prompts]

    def unit(self, seed, setting, first):
        """Draws and measures the prompts from `first` on: the unit's line."""
        table, prompts = self.table, self.prompts[first:first + self.table.chunk]
        began = time.monotonic()
        samples, stats = methods.sample(
            self.model, prompts, setting, n=table.n, max_new_tokens=table.max_new_tokens, seed=seed,
            eos_ids=self.text.eos_ids, first_prompt=first, amateur=self.amateur)
        seconds, each = time.monotonic() - began, table.n // setting.waves
        samples_PK = [samples[i:i + table.n] for i in range(0, len(samples), table.n)]
        longest_W = [max(len(s.token_ids) for s in samples if s.sample // each == wave)
                     for wave in range(setting.waves)]
        figures = dict(nll=[-sum(sum(s.logprob) for s in group) for group in samples_PK],
                       tokens=[sum(len(s.token_ids) for s in group) for group in samples_PK])
        figures |= self.task.measure(first, samples_PK)
        return rounded(dict(setting=setting.name, seed=seed, first=first, per_prompt=figures,
                            stats=stats.summary(), steps=sum(longest_W), seconds=seconds))


def rounded(value):
    """The same with every float at six significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


# ------------------------------------------------------------------------------
# the file
# ------------------------------------------------------------------------------

def knobs(setting):
    """The setting as a dict, defaults left out."""
    defaults = {f.name: f.default for f in dataclasses.fields(setting)}
    return {name: value for name, value in dataclasses.asdict(setting).items() if value != defaults[name]}


def header_of(name, bench, folder, amateur, embedding):
    """The first line of a results file."""
    table, task = bench.table, {}
    if table.task == "countdown":
        task = dict(digits=table.digits)
    return dict(table=name, about=table.about, task=table.task, **task, split=table.split,
                settings=[knobs(setting) for setting in table.settings], n=table.n,
                max_new_tokens=table.max_new_tokens, prompts=table.prompts, chunk=table.chunk,
                seeds=list(table.seeds), model=folder.name, weights=digest(folder),
                amateur=digest(amateur) if amateur else None,
                embedder=embedding.name if table.task == "stories" else None, commit=commit(),
                machine=f"{platform.machine()}, {os.cpu_count()} cores", torch=torch.__version__,
                threads=torch.get_num_threads())


def digest(folder):
    """The first 16 hex digits of the SHA-256 of a checkpoint's weights."""
    found = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def commit():
    """What git calls the code that runs, None without git."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def read(path):
    """(header, lines) of a results file; a torn last line is left out. ValueError for any other file."""
    try:
        header, *lines = [json.loads(line) for line in Path(path).read_bytes().split(b"\n")[:-1]]
        units = [(line["seed"], line["setting"], line["first"]) for line in lines]
        header["settings"], header["table"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} is no results file; expected JSON lines by experiments.run") from None
    if len(set(units)) < len(units):
        raise ValueError(f"{path} has a unit twice; expected each (seed, setting, first) once")
    return header, lines


def resume(path, header, some=False):
    """Gets the file ready to be added to; the units it has: {(seed, setting's name, first prompt)}.

    The file is new, or what it has fits `header`: ValueError if not. Then it is written anew, whole or not at
    all: without a torn last line, with settings that the table gained. Lines of a setting that the table lost
    are an error unless only `some` settings are asked for.
    """
    path, lines = Path(path), []
    if path.exists() and b"\n" in path.read_bytes():
        old, lines = read(path)
        header = merged(path, old, header, {line["setting"] for line in lines}, some)
    content = "".join(to_line(entry) for entry in (header, *lines)).encode()
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(content)
        part.replace(path)
    return {(line["seed"], line["setting"], line["first"]) for line in lines}


def merged(path, old, new, used, some):
    """The header of a file that goes on: the old one with the table's present settings."""
    for key in FIXED:
        if old.get(key) != new.get(key):
            raise ValueError(f"{path}: {key} is {old.get(key)!r} there, {new.get(key)!r} here; remove it or "
                             "name another with --out")
    if old["amateur"] and new["amateur"] and old["amateur"] != new["amateur"]:
        raise ValueError(f"{path}: amateur is {old['amateur']} there, {new['amateur']} here; remove it or "
                         "name another with --out")
    now, gone = {s["name"]: s for s in new["settings"]}, []
    for setting in old["settings"]:
        name = setting["name"]
        if name in used and name not in now:
            if not some:
                raise ValueError(f"{path} has lines of {name!r}, not of the table; accepted with --only")
            gone.append(setting)
        elif name in used and now[name] != setting:
            raise ValueError(f"{path}: setting {name!r} is {setting} there, {now[name]} here; remove it or "
                             "name another with --out")
    merged_header = old | dict(about=new["about"], settings=new["settings"] + gone,
                               amateur=old["amateur"] or new["amateur"])
    places = [{key: place[key] for key in WHERE} for place in (old, *old.get("continued", []), new)]
    if places[-1] not in places[:-1]:
        merged_header["continued"] = places[1:]
    return merged_header


def to_line(entry):
    """One line of JSON."""
    return json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n"


# ------------------------------------------------------------------------------
# the run
# ------------------------------------------------------------------------------

def fill(bench, path, settings, done):
    """Does the units that are not done, a line each."""
    table = bench.table
    left = [(seed, setting, first) for seed in table.seeds for setting in settings
            for first in range(0, table.prompts, table.chunk) if (seed, setting.name, first) not in done]
    began = since = time.monotonic()
    quiet = not sys.stderr.isatty()
    with open(path, "ab") as file, tqdm(total=len(left), unit="unit", disable=quiet) as bar:
        for i, (seed, setting, first) in enumerate(left):
            bar.set_description(f"{setting.name}, seed {seed}")
            file.write(to_line(bench.unit(seed, setting, first)).encode())
            file.flush()
            os.fsync(file.fileno())
            bar.update()
            now, following = time.monotonic(), left[i + 1:i + 2]
            if quiet and (not following or following[0][:2] != (seed, setting)):
                left_s = (now - began) / (i + 1) * (len(left) - i - 1)
                print(f"seed {seed}  {setting.name:24} {now - since:6.0f} s, {left_s / 60:.0f} min left",
                      file=sys.stderr, flush=True)
                since = now


def small(table):
    """A minute part of the table, to see that it works."""
    waves = max(setting.waves for setting in table.settings)
    return dataclasses.replace(table, prompts=2, n=max(4, waves), max_new_tokens=8, seeds=table.seeds[:1])


def selected(table, patterns):
    """The settings whose name matches one of the patterns; ValueError for a pattern without a match."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(setting.name, pattern) for setting in table.settings):
            raise ValueError(f"--only {pattern!r} matches no setting; accepted: "
                             + ", ".join(setting.name for setting in table.settings))
    return [setting for setting in table.settings
            if any(fnmatch.fnmatchcase(setting.name, pattern) for pattern in patterns)]


def listed(name):
    """The lines of --list: all tables, or the settings of one."""
    if name:
        return [f"{setting.name:26} {knobs(setting)}" for setting in TABLES[name].settings]
    return [f"{name:20} {len(t.settings):3} settings × {t.prompts:3} prompts × {t.n:2} samples, seeds "
            f"{' '.join(map(str, t.seeds))}: {t.about}" for name, t in TABLES.items()]


def folders(name, table, settings, args):
    """(model's folder, amateur's or None); ValueError that says how to make one that is missing.

    For --smoke the bundled checkpoint stands in for a Countdown model, and the model for its own amateur.
    """
    smoke = args.smoke and table.task == "countdown"
    folder = args.model or table.model or (str(BUNDLED) if smoke else "")
    if not folder:
        raise ValueError(f"table {name} needs --model DIR: {table.recipe}")
    amateur = args.amateur or (folder if smoke else None)
    if not amateur and any(setting.method == "contrastive" for setting in settings):
        raise ValueError(f"method contrastive needs --amateur DIR, a smaller model: {AMATEUR}")
    return Path(folder), amateur


def run(args):
    """Does what the command line asks for."""
    name, table = args.table, TABLES[args.table]
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = selected(table, args.only or ["*"])
    table = small(table) if args.smoke else table
    folder, amateur = folders(name, table, settings, args)
    embedding = embedder("ngram" if args.smoke else "auto") if table.task == "stories" else None
    bench = Bench(table, folder, amateur, embedding)
    with contextlib.ExitStack() as stack:
        path = args.out or HERE / "results" / f"{name}.jsonl"
        if args.smoke and not args.out:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / f"{name}.jsonl"
        header = header_of(name, bench, folder.resolve(), amateur, embedding)
        fill(bench, path, settings, resume(path, header, bool(args.only)))
        if args.smoke:
            from experiments import report
            print(report.markdown(path))


def build_parser():
    """The command line's flags."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=TABLES, help="the table to fill")
    parser.add_argument("--model", metavar="DIR", help="checkpoint folder (default: the table's)")
    parser.add_argument("--amateur", metavar="DIR", help="the smaller model of contrastive decoding")
    parser.add_argument("--out", metavar="FILE", help="default experiments/results/TABLE.jsonl")
    parser.add_argument("--smoke", action="store_true",
                        help="2 prompts, 4 samples of 8 tokens, one seed, to a temporary file; prints it")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="settings by name; * and ? as in a shell")
    parser.add_argument("--list", action="store_true", help="the tables, or a table's settings")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch (default: torch's own)")
    return parser


def main(argv=None):
    """The command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads is {args.threads}; accepted: at least 1")
    if args.list:
        print("\n".join(listed(args.table)))
        return 0
    if not args.table:
        parser.error(f"no table; accepted: {', '.join(TABLES)}")
    try:
        run(args)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"run: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("run: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
