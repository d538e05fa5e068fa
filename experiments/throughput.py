"""How fast is it? Vanilla, ESamp in its forms and transformers' `generate`, in turn, on the same work.

    python -m experiments.throughput                                        # the defaults of this machine
    python -m experiments.throughput --shape qwen3-8b --scenario 1x1 32x1 32x16
    python -m experiments.throughput --shape qwen2.5-7b --scenario 8x16 --min-p 0.05
    python -m experiments.throughput --model checkpoints/countdown --scenario 1x64
    python -m experiments.throughput --loading                              # 1 GB against reading its file

A shape has random weights, made on the device, random prompts of 32 tokens and no EOS. Its head is scaled so
that logits spread over a standard deviation of 5: one to a few dozen tokens pass min-p 0.05, as with an LLM,
and the table says how many did. A folder does its own work: the prompts of its prompts.txt if it has one, its
EOS. Every round runs each variant once, A B C A B C …; a figure is the median of the rounds' ratios to the
same round's vanilla, with the smallest and the largest. `bound` is what `experiments.cost_model` allows at
the bandwidth and rates measured just before. A variant whose Distiller made no update, did not learn, or left
every sample as vanilla's is reported as FAILED, not as fast.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from decode import ESampConfig, SamplingConfig, Text, generate
from esamp import keep_mask
from experiments.cost_model import SHAPES, bound, figure, shape, vanilla_cost
from model import DTYPES, blank, load, rope_frequencies

LOGIT_SPREAD = 5.0
PROMPT_LENGTH = 32
ESAMP = {                                               # name: its ESampConfig, `generate`'s other arguments
    "ESamp, scope batch": (ESampConfig(scope="batch"), {}),
    "ESamp, per prompt": (ESampConfig(), {}),
    "ESamp, per prompt, every 8": (ESampConfig(train_every=8), {}),
    "ESamp, no overlap": (ESampConfig(), dict(overlap=False)),
    "ESamp, recorded": (ESampConfig(), dict(record=True)),
    "ESamp, plain form": (ESampConfig(), dict(record=True, plain=True)),
}
VARIANTS = ["vanilla", *ESAMP, "transformers"]
ON_CPU = ["vanilla", "ESamp, scope batch", "ESamp, per prompt", "ESamp, recorded", "transformers"]
ON_CUDA = [name for name in VARIANTS if name != "ESamp, plain form"]


# ------------------------------------------------------------------------------
# the work
# ------------------------------------------------------------------------------

def random_model(config, device, dtype, seed=0):
    """A model of a shape with random weights, made on the device and joined there as `load` would.

    The blocks outweigh the embedding: else a token's likeliest successor would be the token itself.
    """
    model, source = blank(config), torch.Generator(device).manual_seed(seed)
    for name, empty in list(model.named_parameters()):
        weight = torch.empty(empty.shape, device=device, dtype=dtype)
        spread = (4 if "o_proj" in name or "down_proj" in name else 1) / math.sqrt(weight.shape[-1])
        weight.fill_(1) if "norm" in name else weight.normal_(0, spread, generator=source)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(weight, requires_grad=False))
    model.head_weight.normal_(0, LOGIT_SPREAD / math.sqrt(config.hidden_size), generator=source)
    model.frequency = rope_frequencies(config).to(device)
    return model.eval() if torch.device(device).type == "cpu" else model.eval().join()


@dataclasses.dataclass
class Work:
    """What every variant has to do: prompts as ids, how to sample, what ends a sample."""

    prompts: list
    sampling: SamplingConfig
    eos_ids: list


def work_of(name, model, P, K, tokens, min_p):
    """The `Work` of a shape or a folder."""
    sampling = SamplingConfig(n=K, max_new_tokens=tokens, min_p=min_p, seed=3)
    file = Path(name) / "prompts.txt"
    if name in SHAPES or not file.is_file():
        source = torch.Generator().manual_seed(1)
        return Work(torch.randint(3, model.config.vocab_size, (P, PROMPT_LENGTH), generator=source).tolist(),
                    sampling, [])
    text = Text(name, model.config)
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return Work([text.encode_raw(lines[i % len(lines)]) for i in range(P)], sampling, sorted(text.eos_ids))


def ours(model, work, esamp, how):
    """A run of `generate`; returns its `Generation`."""
    return generate(model, work.prompts, work.sampling, esamp, eos_ids=set(work.eos_ids),
                    **{"record": False} | how)


def theirs(model):
    """A function that does a `Work` with transformers on the same tensors → number of tokens; the version."""
    import transformers
    transformers.logging.set_verbosity_error()
    config = model.config
    family = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[config.model_type]
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
              "tie_word_embeddings", "attention_bias")
    rope = dict(rope_type=config.rope_type, rope_theta=config.rope_theta)
    if config.rope_type == "llama3":
        raise ValueError("the comparison with transformers does not know llama3 RoPE; leave it out with "
                         "--variants")
    their_config = getattr(transformers, f"{family}Config")(
        **{name: getattr(config, name) for name in fields}, rope_parameters=rope)
    with torch.device("meta"):
        peer = getattr(transformers, f"{family}ForCausalLM")(their_config)
    peer.load_state_dict(model.state_dict(), assign=True, strict=False)
    peer.tie_weights()
    device = model.head_weight.device
    peer.model.rotary_emb = type(peer.model.rotary_emb)(their_config).to(device)
    peer.eval()

    def run(work, static):
        s = work.sampling
        longest = max(map(len, work.prompts))
        padded = [[0] * (longest - len(prompt)) + prompt for prompt in work.prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in work.prompts]
        ends = {} if work.eos_ids else {"min_new_tokens": s.max_new_tokens}
        cache = {"cache_implementation": "static"} if static else {}
        with torch.no_grad():
            out = peer.generate(
                torch.tensor(padded, device=device), attention_mask=torch.tensor(mask, device=device),
                do_sample=True, temperature=s.temperature, top_k=0, min_p=s.min_p, num_return_sequences=s.n,
                max_new_tokens=s.max_new_tokens, eos_token_id=work.eos_ids or None, pad_token_id=0,
                **ends, **cache)
        new = out[:, longest:]
        ended = torch.isin(new, torch.tensor(work.eos_ids, device=device, dtype=new.dtype)).long()
        return int((ended.cumsum(-1) - ended == 0).sum())             # up to each row's EOS
    return run, transformers.__version__


# ------------------------------------------------------------------------------
# the measurement
# ------------------------------------------------------------------------------

def timed(function, device):
    """(seconds on the wall, what it returned)."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    found = function()
    wait()
    return time.perf_counter() - began, found


def machine_rates(device, dtype):
    """Bytes/s of a large copy, read and written; operations/s of large products in dtype and in fp32."""
    on_cuda = torch.device(device).type == "cuda"
    a, b = (torch.randn(2 ** 28 if on_cuda else 2 ** 25, device=device) for _ in range(2))
    bandwidth = 2 * a.nbytes / statistics.median(timed(lambda: b.copy_(a), device)[0] for _ in range(9))
    rates, size = [], 8192 if on_cuda else 2048
    for kind in (dtype, torch.float32):
        x = torch.randn(size, size, device=device).to(kind)
        spent = [timed(lambda x=x: x @ x, device)[0] for _ in range(6)][1:]
        rates.append(2 * size ** 3 / statistics.median(spent))
    return dict(bandwidth=bandwidth, rate=rates[0], fp32_rate=rates[1])


def survivors(model, work, result):
    """How many tokens pass the filters behind a few of the run's tokens: (median, largest); None without."""
    s = work.sampling
    if not s.filters:
        return None
    kept = []
    for sample in result.samples[:4]:
        prompt = work.prompts[sample.prompt]
        with torch.no_grad():
            ids = torch.tensor([prompt + sample.token_ids[:32]], device=model.head_weight.device)
            ref_LV = model(ids)[0, len(prompt) - 1:]
        kept.append(keep_mask(ref_LV, s.temperature, s.top_k, s.top_p, s.min_p).sum(-1))
    kept = torch.cat(kept)
    return int(kept.median()), int(kept.max())


def proof(result, vanilla, esamp, P):
    """What the Distiller did in a run, and why the run does not count, if it does not."""
    figures = result.stats.summary()
    first, last = figures["loss_first_step"], figures["loss_last_10_steps"]
    steps = max(len(s.token_ids) for s in result.samples) - 1
    changed = sum(a.token_ids != b.token_ids for a, b in zip(result.samples, vanilla.samples, strict=True))
    expected = steps // esamp.train_every                # of the Distiller whose rows live longest
    failed = None
    if not 0 < expected <= figures["updates"] <= expected * (P if esamp.scope == "prompt" else 1):
        failed = f"{figures['updates']} updates in {steps} steps"
    elif not changed:
        failed = "every sample is vanilla's"
    elif not (math.isfinite(first) and math.isfinite(last) and first != last):
        failed = "the Distiller's loss did not move"
    return dict(updates=figures["updates"], loss_first=first, loss_last=last, samples_changed=changed,
                rows_trained_per_step=figures["reweighted_tokens"] / max(steps, 1)), failed


def measure(name, model, P, K, args, rates):
    """One scenario, all variants in turn: a dict for the JSON."""
    device, config = model.head_weight.device, model.config
    tokens = args.tokens or (256 if device.type == "cuda" else 64)
    work = work_of(name, model, P, K, tokens, args.min_p)
    tokens = min(tokens, config.max_position_embeddings - max(map(len, work.prompts)))
    work.sampling = dataclasses.replace(work.sampling, max_new_tokens=tokens)
    runs, version = {}, None
    for variant in args.variants:
        if variant == "transformers":
            peer, version = theirs(model)
            for static in (False, True):
                runs[f"transformers, {'static' if static else 'dynamic'} cache"] = (
                    lambda w, static=static, peer=peer: peer(w, static))
        else:
            esamp, how = ESAMP.get(variant, (None, {}))
            runs[variant] = lambda w, esamp=esamp, how=how: ours(model, w, esamp, how)
    short = dataclasses.replace(work.sampling, max_new_tokens=min(8, tokens))
    brief = dataclasses.replace(work, sampling=short)
    times, results, peaks = {v: [] for v in runs}, {}, {}
    with tqdm(total=len(runs) * (args.rounds + 1), desc=f"{Path(name).name} {P}×{K}", unit="run", leave=False,
              disable=not sys.stderr.isatty()) as bar:
        for round_ in range(args.rounds + 1):                         # the first is a short rehearsal
            for variant, run in runs.items():
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                job = work if round_ else brief
                spent, results[variant] = timed(lambda run=run, job=job: run(job), device)
                if round_:
                    times[variant].append(spent)
                    peaks[variant] = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
                bar.update()
    return dict(shape=Path(name).name, prompts=P, samples=K, tokens=tokens, min_p=args.min_p,
                survivors=survivors(model, work, results["vanilla"]), transformers=version,
                variants=evaluate(model, work, times, results, peaks, rates))


def evaluate(model, work, times, results, peaks, rates):
    """The figures of every variant, from its seconds and its last result."""
    device, itemsize, P = model.head_weight.device, model.head_weight.dtype.itemsize, len(work.prompts)
    made = {v: r if isinstance(r, int) else r.stats.tokens for v, r in results.items()}
    speed = {v: [made[v] / spent for spent in found] for v, found in times.items()}
    steps = max(len(s.token_ids) for s in results["vanilla"].samples)
    context = max(map(len, work.prompts)) + steps // 2
    entries = {}
    for variant, found in speed.items():
        ratios = [a / b for a, b in zip(found, speed["vanilla"], strict=True)]
        entry = dict(seconds=times[variant], tokens=made[variant], tok_s=statistics.median(found),
                     ratio=[min(ratios), statistics.median(ratios), max(ratios)], peak_bytes=peaks[variant])
        if variant == "vanilla":
            least = vanilla_cost(model.config, P * work.sampling.n, context, itemsize).bytes
            entry["roofline_share"] = least / rates["bandwidth"] * steps / statistics.median(times[variant])
        if variant in ESAMP:
            esamp = ESAMP[variant][0]
            entry["proof"], entry["failed"] = proof(results[variant], results["vanilla"], esamp, P)
            entry["bound"] = bound(model.config, P, work.sampling.n, context, esamp.scope, esamp.width,
                                   esamp.train_every, work.sampling.filters, itemsize=itemsize,
                                   overlap=device.type == "cuda", **rates)[2]
        entries[variant] = entry
    return entries


# ------------------------------------------------------------------------------
# loading
# ------------------------------------------------------------------------------

CHILD = """
import re, sys, time
sys.path.insert(0, sys.argv[1])
import model
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before, began = peak(), time.perf_counter()
held = model.load(sys.argv[2])
print(time.perf_counter() - began, peak() - before)
"""


def loading(rounds):
    """`load` on the CPU against reading the file in pieces from the page cache, in turn; its peak memory."""
    piece, reads, loads, peaks = bytearray(2 ** 24), [], [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(random_model(shape("qwen2.5-0.5b"), "cpu", torch.bfloat16).state_dict(), path)
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES["qwen2.5-0.5b"] | {"dtype": "bfloat16"}))

        def read():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(piece):
                    pass
        read()
        for _ in range(rounds):
            reads.append(timed(read, "cpu")[0])
            child = [sys.executable, "-c", CHILD, str(Path(__file__).resolve().parent.parent), folder]
            done = subprocess.run(child, capture_output=True, text=True, check=True)
            for values, value in zip((loads, peaks), done.stdout.split(), strict=True):
                values.append(float(value))
        size = path.stat().st_size
    ratios = [a / b for a, b in zip(loads, reads, strict=True)]
    return dict(bytes=size, read_s=reads, load_s=loads, peak_over_size=statistics.median(peaks) / size,
                ratio=[min(ratios), statistics.median(ratios), max(ratios)])


# ------------------------------------------------------------------------------
# the report
# ------------------------------------------------------------------------------

def table(report):
    """The report for people, line by line."""
    if "loading" in report:
        low, middle, high = report["loading"]["ratio"]
        yield (f"loading {report['loading']['bytes'] / 1e9:.2f} GB takes {middle:.2f} ({low:.2f}–{high:.2f}) "
               f"times as long as reading the file from the page cache;")
        yield f"peak memory {report['loading']['peak_over_size']:.2f} times its size"
    for case in report["cases"]:
        rates, passed = case["rates"], case["survivors"]
        filters = "no filter"
        if passed:
            filters = f"min-p {case['min_p']}: {passed[0]} tokens pass, at most {passed[1]}"
        yield (f"{case['shape']}, {case['dtype']}, {case['prompts']}×{case['samples']}, "
               f"{case['tokens']} tokens, {filters}")
        yield (f"  copies {rates['bandwidth'] / 1e9:,.0f} GB/s; products {rates['rate'] / 1e12:.2f} Tflop/s, "
               f"fp32 {rates['fp32_rate'] / 1e12:.2f}")
        yield f"  {'':28}   tok/s   over vanilla          bound  proof of work"
        for name, run in case["variants"].items():
            low, middle, high = run["ratio"]
            limit = f"{run['bound']:.3f}" if "bound" in run else "     "
            yield (f"  {name:28} {run['tok_s']:7,.0f}   {middle:.3f} ({low:.3f}–{high:.3f})   {limit}  "
                   f"{remark(run)}").rstrip()
        peers = [run["tok_s"] for name, run in case["variants"].items() if name.startswith("transformers")]
        if peers:
            gain = case["variants"]["vanilla"]["tok_s"] / max(peers)
            yield f"  vanilla over the better of transformers {case['transformers']}: {gain:.2f}"


def remark(run):
    """The last column: proof of work, or why there is none."""
    words = []
    if run.get("failed"):
        words.append(f"FAILED: {run['failed']}")
    elif "proof" in run:
        p = run["proof"]
        words.append(f"{p['updates']} updates, loss {p['loss_first']:.4g} → {p['loss_last']:.4g}, "
                     f"{p['rows_trained_per_step']:.0f} rows a step, {p['samples_changed']} samples changed")
    if "roofline_share" in run:
        words.append(f"{100 * run['roofline_share']:.0f} % of the bandwidth roofline")
    if run["peak_bytes"]:
        words.append(f"peak {run['peak_bytes'] / 1e9:.1f} GB")
    return "; ".join(words)


def plot(report, path):
    """Ratios to vanilla with their bounds, a group of bars for each scenario."""
    bars = [(f"{case['shape']} {case['prompts']}×{case['samples']}: {name}", run) for case in report["cases"]
            for name, run in case["variants"].items() if name != "vanilla"]
    with figure(path, (8, 0.35 * len(bars) + 1.2)) as axis:
        for i, (_, run) in enumerate(bars):
            low, middle, high = run["ratio"]
            color = "tab:red" if run.get("failed") else "tab:blue" if "bound" in run else "tab:gray"
            axis.barh(i, middle, xerr=[[middle - low], [high - middle]], color=color, alpha=0.8)
            if "bound" in run:
                axis.plot([run["bound"]] * 2, [i - 0.4, i + 0.4], color="black")
        axis.axvline(1, color="gray", linewidth=0.8)
        axis.set_yticks(range(len(bars)), [name for name, _ in bars])
        axis.set_xlabel("tok/s over vanilla's: median and range; black, the bound on paper; gray, not ours")
        axis.invert_yaxis()


def scenario(text):
    """'8x16' → (8, 16)."""
    try:
        P, K = (int(part) for part in text.lower().replace("×", "x").split("x"))
        if min(P, K) < 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected prompts x samples, as in 8x16") from None
    return P, K


def build_parser():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", nargs="+", choices=SHAPES, default=[], help="random weights of these shapes (default: "
        "qwen2.5-0.5b on a CPU, qwen3-8b on a GPU)")
    add("--model", metavar="FOLDER", action="append", default=[], help="a checkpoint; may be repeated")
    add("--scenario", nargs="+", type=scenario, metavar="PxK", help="prompts x samples (default: 1x16 on a "
        "CPU, 1x1 32x1 32x16 on a GPU)")
    add("--tokens", type=int, metavar="N", help="new tokens per sample (default: 64 on a CPU, else 256)")
    add("--min-p", type=float, metavar="X", help="the filter (default: none)")
    add("--rounds", type=int, default=3, metavar="N", help="of all variants in turn (default: 3)")
    add("--variants", nargs="+", choices=VARIANTS, help="default: those that differ on this device")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default: cuda if there is one)")
    add("--dtype", choices=DTYPES, help="default: bfloat16 for a shape, a checkpoint's own")
    add("--loading", action="store_true", help="measure only how a 1 GB checkpoint is loaded on the CPU")
    add("--read", metavar="JSON", help="measure nothing; show what an earlier run wrote with --out")
    add("--out", metavar="FILE", help="write JSON")
    add("--plot", metavar="FILE", help="write the figure (svg, png)")
    return parser


def main(argv=None):
    """Runs the command line: 0, 1 if a variant failed, 2 for bad input."""
    args = build_parser().parse_args(argv)
    on_cuda = torch.device(args.device).type == "cuda"
    args.variants = args.variants or (ON_CUDA if on_cuda else ON_CPU)
    args.variants = ["vanilla"] + [name for name in args.variants if name != "vanilla"]
    names = args.shape + args.model or ["qwen3-8b" if on_cuda else "qwen2.5-0.5b"]
    machine = torch.cuda.get_device_name() if on_cuda else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    report = dict(machine=machine, torch=torch.__version__, threads=torch.get_num_threads(), cases=[])
    try:
        if args.rounds < 1 or (args.tokens is not None and args.tokens < 4):
            raise ValueError("--rounds must be at least 1, --tokens at least 4")
        if args.read:
            report, names = json.loads(Path(args.read).read_text(encoding="utf-8")), []
        elif args.loading:
            report["loading"], names = loading(args.rounds), []
        for name in names:
            dtype = DTYPES.get(args.dtype) or (torch.bfloat16 if name in SHAPES else None)
            model = (random_model(shape(name), args.device, dtype) if name in SHAPES
                     else load(name, args.device, dtype))
            rates = machine_rates(args.device, model.head_weight.dtype)
            for P, K in args.scenario or ([(1, 1), (32, 1), (32, 16)] if on_cuda else [(1, 16)]):
                case = measure(name, model, P, K, args, rates)
                kind = str(model.head_weight.dtype).removeprefix("torch.")
                report["cases"].append(dict(case, rates=rates, dtype=kind))
    except ImportError:
        print("throughput: error: the comparison needs transformers: pip install -r "
              "experiments/requirements.txt, or leave it out with --variants", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"throughput: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(report)))
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.plot and report["cases"]:
        plot(report, args.plot)
    return int(any(run.get("failed") for case in report["cases"] for run in case["variants"].values()))


if __name__ == "__main__":
    sys.exit(main())
