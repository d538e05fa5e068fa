"""pass@k and maj@k of one or more ways to sample, on a verifiable task; a run that was stopped goes on.

    python -m experiments.passk --model FOLDER --task aime24 --data aime24.jsonl --n 64
    python -m experiments.passk … --method vanilla esamp --out results.jsonl
    python -m experiments.passk … --settings '[{"method": "vanilla", "temperature": 0.8}, {"beta": 0.5}]'

The file's first line says what was run; a second run with other flags is refused. Then there is one line per
(setting, seed, batch of problems), written when it is done; what is there is not decoded again, and a last
line that was cut off is dropped. More seeds or settings may be added to a file. Printed is the mean over
problems with its 95 % bootstrap interval; a problem's value is the mean over seeds.

A table's "k of n" is the chance that k of the n samples, drawn without replacement, hold a right one (pass@k)
or vote for it (maj@k). Where samples share a Distiller they are not independent, so this is not what a run of
k samples would show: then the table says so.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

import model as model_module
from decode import Text, at_least_one, one_line, pick_device, printable
from experiments import methods, metrics
from experiments.tasks import TASKS
from model import DTYPES, ModelConfig

KS = (1, 2, 4, 8, 16, 32, 64)
ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------
# what is to be done
# ------------------------------------------------------------------------------

def settings_of(given, names):
    """The `methods.Setting`s of --settings, a JSON object or a list of them.

    An object without a method stands for one of each --method; without a name it is called by what it sets.
    """
    try:
        entries = json.loads(given)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--settings {given!r} is not valid JSON ({error})") from None
    entries = [entries] if isinstance(entries, dict) else entries
    known, settings = [f.name for f in dataclasses.fields(methods.Setting)], []
    if not (isinstance(entries, list) and entries and all(isinstance(entry, dict) for entry in entries)):
        raise ValueError(f"--settings {given!r} is no JSON object or list of objects")
    for entry in entries:
        unknown = sorted(set(entry) - set(known))
        if unknown:
            raise ValueError(f"--settings has {unknown[0]!r}; accepted: {', '.join(known)}")
        for method in [entry["method"]] if "method" in entry else names:
            label = " ".join([str(method), *(f"{k}={v}" for k, v in entry.items() if k != "method")])
            try:
                settings.append(methods.Setting(**{"name": label, "method": method} | entry))
            except TypeError as error:
                raise ValueError(f"--settings {json.dumps(entry)}: {one_line(error)}") from None
    labels = [setting.name for setting in settings]
    if len(set(labels)) < len(labels):
        twice = max(labels, key=labels.count)
        raise ValueError(f"two settings are called {twice!r}; give each its own 'name'")
    return settings


def encoded(task, problems, text, raw, config):
    """The problems as token ids, through the chat template if there is one and not `raw`."""
    ids = []
    for problem in problems:
        ids.append(text.encode_raw(task.raw(problem)) if raw or text.template is None
                   else text.encode_chat(task.messages(problem))[1])
        if not 0 < len(ids[-1]) < config.max_position_embeddings:
            raise ValueError(f"{problem.id} has {len(ids[-1])} tokens; accepted: 1 to "
                             f"{config.max_position_embeddings - 1}, one less than the context")
    return ids


def commit():
    """The commit of this code, with "-dirty" where tracked files were changed; "unknown" without git."""
    try:
        words = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        return found.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(device):
    """The device's name, as a person would say it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type.upper()}, {os.cpu_count()} cores"


# ------------------------------------------------------------------------------
# the file
# ------------------------------------------------------------------------------

class Results:
    """The JSONL file: what ran, then a line per (setting, seed, batch of problems)."""

    def __init__(self, path, run):
        self.path, self.entries = Path(path), {}
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[:data.rfind(b"\n") + 1]
        if data and not whole and not data.startswith(b'{"run": '):
            raise ValueError(f"{path} is no such file; give another --out")
        for i, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                entry = json.loads(line)
                self.check(run, entry["run"]) if i == 1 else self.remember(entry)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                reason = one_line(error) if type(error) is ValueError else "no line of such a file"
                raise ValueError(f"{path}, line {i}: {reason}; give another --out") from None
        if len(whole) < len(data):
            print(f"note: {path} ended in the middle of a line, which was dropped", file=sys.stderr)
        self.file = open(self.path, "ab")
        self.file.truncate(len(whole))
        if not whole:
            self.append({"run": run})

    @staticmethod
    def check(run, found):
        """ValueError for the first flag in which the run in the file differs."""
        for name in run:
            if run[name] != found.get(name):
                raise ValueError(f"was made with {name} {found.get(name)!r}, not {run[name]!r}")

    def remember(self, entry):
        """Keeps an entry under its setting, seed and first problem; ValueError for another one there."""
        key = (entry["setting"]["name"], entry["seed"], entry["first"])
        if key in self.entries:
            raise ValueError("is there twice: setting {!r}, seed {}, first problem {}".format(*key))
        self.entries[key] = entry

    def fits(self, setting):
        """ValueError where the file has another setting of the same name."""
        for entry in self.entries.values():
            if entry["setting"]["name"] == setting.name and entry["setting"] != dataclasses.asdict(setting):
                raise ValueError(f"{self.path} has another setting called {setting.name!r}; give another "
                                 "'name' or --out")

    def append(self, entry):
        """Writes a line at once."""
        self.file.write(json.dumps(entry, ensure_ascii=True).encode() + b"\n")
        self.file.flush()


# ------------------------------------------------------------------------------
# the run
# ------------------------------------------------------------------------------

def decode_batch(job, setting, seed, first):
    """Decodes and grades the samples of one batch of problems: the entry for the file."""
    args, task, began = job.args, job.task, time.monotonic()
    problems = job.problems[first:first + args.batch_prompts]
    samples, stats = methods.sample(
        job.model, job.ids[first:first + args.batch_prompts], setting, n=args.n,
        max_new_tokens=args.max_new_tokens, seed=seed, eos_ids=job.text.eos_ids, first_prompt=first,
        amateur=job.amateur)
    decoded_s = time.monotonic() - began
    mine = [[s for s in samples if s.prompt == first + i] for i in range(len(problems))]
    texts = [[job.text.decode(s.token_ids) for s in rows] for rows in mine]
    with ThreadPoolExecutor(os.cpu_count() if task.code else 1) as pool:  # a program waits
        right = [list(pool.map(lambda text, p=p: task.grade(p, text, args.run_programs), replies))
                 for p, replies in zip(problems, texts, strict=True)]
    entry = dict(
        setting=dataclasses.asdict(setting), seed=seed, first=first, commit=job.commit, machine=job.machine,
        ids=[p.id for p in problems], correct=[sum(flags) for flags in right], right=right,
        stopped=[sum(s.finish_reason == "stop" for s in rows) for rows in mine], seconds=decoded_s,
        stats=stats.summary())
    if not task.code:
        entry["truth"] = [task.truth(p) for p in problems]
        entry["answers"] = [[task.key(text) for text in replies] for replies in texts]
    return entry | ({"texts": texts} if args.texts else {})


def checked(args):
    """(task, settings, seeds) of the flags; ValueError for what can not be run."""
    task, settings = TASKS[args.task], settings_of(args.settings, args.method)
    for name in ("n", "max_new_tokens", "batch_prompts") + (("limit",) if args.limit is not None else ()):
        at_least_one(name, getattr(args, name))
    for setting in settings:
        for seed in args.seeds:
            setting.sampling(args.n, args.max_new_tokens, seed)
        if args.n % setting.waves:
            raise ValueError(f"--n {args.n} is no multiple of {setting.waves}, the waves of {setting.name!r}")
        if setting.method == "contrastive" and args.amateur is None:
            raise ValueError(f"setting {setting.name!r} needs --amateur")
    if task.code and not args.run_programs:
        raise ValueError(f"{args.task} is graded by running what a model wrote, in a sandbox; "
                         "--run-programs allows it")
    return task, settings, list(dict.fromkeys(args.seeds))


def run(args):
    """Everything that can be checked is checked before the weights are read; then decodes what is missing."""
    task, settings, seeds = checked(args)
    if task.code:
        from experiments import sandbox  # Linux only
        sandbox.probe()
    problems, device = task.load(args.data)[:args.limit], pick_device(args.device)
    folder = model_module.find(args.model)
    config = ModelConfig.read(folder)
    text = Text(folder, config)
    ids = encoded(task, problems, text, args.raw, config)
    dtype = DTYPES[args.dtype] if args.dtype else torch.float32 if device.type == "cpu" else config.dtype
    results = Results(args.out or f"passk_{args.task}.jsonl", dict(
        model=args.model, task=args.task, data=hashlib.sha256(Path(args.data).read_bytes()).hexdigest()[:16],
        n=args.n, max_new_tokens=args.max_new_tokens, batch_prompts=args.batch_prompts, limit=args.limit,
        raw=args.raw, amateur=args.amateur, dtype=str(dtype).removeprefix("torch.")))
    for setting in settings:
        results.fits(setting)
    todo = [(setting, seed, first) for seed in seeds for setting in settings
            for first in range(0, len(problems), args.batch_prompts)
            if (setting.name, seed, first) not in results.entries]
    if todo:
        job = argparse.Namespace(
            args=args, task=task, problems=problems, ids=ids, text=text, commit=commit(),
            machine=machine(device), model=model_module.load(folder, device, dtype), amateur=None)
        if args.amateur is not None:
            job.amateur = model_module.load(model_module.find(args.amateur), device, dtype)
        for setting, seed, first in tqdm(todo, unit="batch", smoothing=0.1, disable=not sys.stderr.isatty()):
            entry = decode_batch(job, setting, seed, first)
            results.append(entry)
            results.remember(entry)
    print("\n".join(report(results.entries.values(), [s.name for s in settings], seeds, args.n)))
    return 0


# ------------------------------------------------------------------------------
# the table
# ------------------------------------------------------------------------------

def per_problem(entries, value):
    """The mean over seeds of value(entry, place of the problem), one per problem, in the problems' order."""
    found = {}
    for entry in entries:
        for i, name in enumerate(entry["ids"]):
            found.setdefault((entry["first"] + i, name), []).append(value(entry, i))
    return [sum(values) / len(values) for _, values in sorted(found.items())]


def report(entries, names, seeds, n):
    """The lines of the table: a row per setting, pass@k, then maj@k where there are answers to vote."""
    entries = [e for e in entries if e["setting"]["name"] in names and e["seed"] in seeds]
    ks, code = [k for k in KS if k <= n], "answers" not in entries[0]
    measures = {"pass": lambda e, i, k: metrics.pass_at_k(n, e["correct"][i], k)}
    if not code:
        measures["maj"] = lambda e, i, k: metrics.maj_at_k(e["answers"][i], e["truth"][i], k)
    width = max(map(len, names))
    for label, measure in measures.items():
        yield f"{label}@k, % [95 % interval over problems], k of {n}"
        yield " " * width + "".join(f"{f'k = {k}':>20}" for k in ks)
        for name in names:
            mine, cells = [e for e in entries if e["setting"]["name"] == name], ""
            for k in ks:
                values = per_problem(mine, lambda e, i, k=k, measure=measure: measure(e, i, k))
                middle, low, high = (100 * x for x in metrics.interval(values))
                cells += f"{f'{middle:.1f} [{low:.1f}, {high:.1f}]':>20}"
            yield f"{name:<{width}}{cells}"
        yield ""
    problems = len({name for e in entries for name in e["ids"]})
    origins = sorted({f"commit {e['commit']} on {e['machine']}" for e in entries})
    yield f"{problems} problems, seeds {', '.join(map(str, seeds))}; {' and '.join(origins)}"
    method = {e["setting"]["name"]: e["setting"]["method"] for e in entries}
    sharing = [name for name in names if method[name] not in methods.PLAIN]
    if sharing:
        yield (f"k of {n}: samples of a prompt share a Distiller ({', '.join(sharing)}), so they are not "
               "independent: this is not a run of k")


# ------------------------------------------------------------------------------
# the command line
# ------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message):
        """ValueError, for `main` to print."""
        raise ValueError(message + " (see --help)")


def build_parser():
    """The flags."""
    parser = Parser(prog="python -m experiments.passk", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="folder in Hugging Face layout, or Org/Name")
    add("--task", required=True, choices=tuple(TASKS))
    add("--data", required=True, metavar="FILE", help="the task's problems, JSONL")
    add("--out", metavar="FILE",
        help="results, JSONL; a run that was stopped goes on (default: passk_TASK.jsonl)")
    add("--n", type=int, default=64, help="samples per problem (default: 64)")
    add("--method", nargs="+", default=["vanilla", "esamp"],
        help="of experiments.methods (default: vanilla esamp)")
    add("--settings", default="{}", metavar="JSON",
        help="fields of experiments.methods.Setting: an object, or a list of them (default: {})")
    add("--seeds", type=int, nargs="+", default=[41, 42, 43], metavar="N", help="(default: 41 42 43)")
    add("--max-new-tokens", type=int, default=2048, metavar="N", help="(default: 2048)")
    add("--batch-prompts", type=int, default=1, metavar="N", help="problems decoded together (default: 1)")
    add("--limit", type=int, metavar="N", help="only the first N problems")
    add("--amateur", metavar="PATH", help="the small model of contrastive decoding")
    add("--device", help="cpu, cuda, cuda:N (default: cuda if there is one)")
    add("--dtype", choices=tuple(DTYPES), help="(default: the checkpoint's on a GPU, float32 on a CPU)")
    add("--raw", action="store_true", help="no chat template: the prompt of a base model")
    add("--texts", action="store_true", help="write the samples' texts, too")
    add("--run-programs", action="store_true", help="humaneval: run the programs, in experiments.sandbox")
    return parser


def main(argv=None):
    """Runs the command line: 0, or 2 after one line on stderr for bad input, or 130 after Ctrl-C."""
    try:
        return run(build_parser().parse_args(argv))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        message = one_line(error)
    with contextlib.suppress(OSError):
        print(f"passk: error: {printable(message)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
