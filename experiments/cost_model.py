"""What a decode step costs on paper: bytes, operations, seconds. When is ESamp free, and when not?

    python -m experiments.cost_model                                  # the README's table, for one H200
    python -m experiments.cost_model --shape qwen3-8b --prompts 32 --samples 16 --train-every 8
    python -m experiments.cost_model --check experiments/results/throughput_cpu.json
    python -m experiments.cost_model --plot cost.svg

A step moves every weight once, the live KV cache once, and each Distiller's numbers as often as the update
needs; it costs two operations per weight and row. Overlap hides latency and idle units, not bytes: with two
streams the bytes of both add up, the LLM's bf16 operations and the Distiller's fp32 ones use different units,
and a step takes the longest of the three. One after the other, as on a CPU, their seconds add up. So

    ESamp / vanilla ≤ vanilla seconds / seconds of both,

which is vanilla bytes / (vanilla bytes + Distiller bytes) where decoding is limited by memory.

Per Distiller weight, fp32, K rows (6·D·R weights; see `distiller.Distiller`):

    predict         reads 4
    train           forward reads 4; backward reads 2.7 (all but the first block's gate and up), writes 4
    Adam            reads gradient, weight and two moments, writes the last three: 28

Those of train and Adam are paid every `train_every` steps; the clip needs none. Not counted: activations,
which are a few rows wide, launches, the host.
"""

import argparse
import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from model import ModelConfig

SHAPES = {
    "qwen2.5-0.5b": dict(model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864,
                         num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                         rope_theta=1e6, tie_word_embeddings=True),
    "qwen2.5-7b": dict(model_type="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944,
                       num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, rope_theta=1e6),
    "qwen3-8b": dict(model_type="qwen3", vocab_size=151936, hidden_size=4096, intermediate_size=12288,
                     num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                     rope_theta=1e6),
    "llama-3.1-8b": dict(model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
                         num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                         rope_theta=5e5),
}
FP32 = 4
PREDICT_BYTES, TRAIN_BYTES = 4, 4 + 8 / 3 + 4 + 28           # per Distiller weight, as above
H200 = dict(bandwidth=4.2e12, rate=700e12, fp32_rate=40e12)      # bytes/s copied, bf16 and fp32 operations/s


def shape(name):
    """The `ModelConfig` of a shape by name, or of a folder."""
    if name in SHAPES:
        return ModelConfig.from_dict(dict(max_position_embeddings=4096) | SHAPES[name])
    return ModelConfig.read(name)


@dataclass(frozen=True)
class Cost:
    """What one decode step moves (bytes) and computes (operations)."""

    bytes: float
    operations: float

    def seconds(self, bandwidth, rate):
        """The longer of the two, in seconds; bandwidth in bytes/s, rate in operations/s."""
        return max(self.bytes / bandwidth, self.operations / rate)


def block_weights(config):
    """Weights of all blocks: q, k, v, o and the MLP."""
    D, E, H, G = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
    return config.num_hidden_layers * D * (2 * H * E + 2 * G * E + 3 * config.intermediate_size)


def vanilla_cost(config, rows, context, itemsize=2):
    """One step of the LLM alone: `rows` sequences of `context` tokens each, weights of `itemsize` bytes."""
    D, V, N = config.hidden_size, config.vocab_size, config.num_hidden_layers
    E, H, G = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    weights = block_weights(config) + D * V                      # the head; of the embedding only a row each
    kv = 2 * N * G * E * context * rows
    operations = 2 * rows * weights + 4 * rows * context * N * H * E
    return Cost(itemsize * (weights + kv), operations)


def distiller_cost(config, distillers, rows, width=384, train_every=1):
    """One step of P Distillers with `rows` rows altogether, all trained and predicted; fp32."""
    weights = 6 * config.hidden_size * width
    moved = distillers * weights * (PREDICT_BYTES + TRAIN_BYTES / train_every)
    return Cost(moved, rows * weights * (2 + 6))                 # train sees every pair once, whatever u is


def candidates_cost(config, rows, candidates=64, itemsize=2):
    """The rows of W that ĥ meets when filters are set; without filters nothing is added (eq. 8)."""
    moved = rows * candidates * config.hidden_size
    return Cost(itemsize * moved, 2 * moved)


def bound(config, prompts, samples, context, scope="prompt", width=384, train_every=1, filters=False, *,
          bandwidth, rate, fp32_rate, overlap=True, itemsize=2):
    """(vanilla seconds, seconds with ESamp, the largest ESamp/vanilla that they allow) for one step."""
    rows, distillers = prompts * samples, prompts if scope == "prompt" else 1
    vanilla = vanilla_cost(config, rows, context, itemsize)
    extra = distiller_cost(config, distillers, rows, width, train_every)
    looked_up = candidates_cost(config, rows, itemsize=itemsize).bytes if filters else 0
    vanilla_s = vanilla.seconds(bandwidth, rate)
    if overlap:
        both_s = max((vanilla.bytes + extra.bytes + looked_up) / bandwidth, vanilla.operations / rate,
                     extra.operations / fp32_rate)
    else:
        both_s = vanilla_s + extra.seconds(bandwidth, fp32_rate) + looked_up / bandwidth
    return vanilla_s, both_s, vanilla_s / both_s


def answers(machine):
    """The README's questions as lines of text, for an 8B model on `machine`."""
    config = shape("qwen3-8b")
    yield "prompts  samples  scope   train_every   vanilla ms  with ESamp ms  bound   Distillers GB held"
    for prompts in (1, 32, 1000):
        for samples in (1, 16) if prompts < 1000 else (1,):
            for scope, every in (("batch", 1), ("prompt", 1), ("prompt", 8), ("prompt", 64)):
                v_s, both_s, most = bound(config, prompts, samples, 512, scope, train_every=every, **machine)
                held = (prompts if scope == "prompt" else 1) * 6 * config.hidden_size * 384 * FP32 * 4
                yield (f"{prompts:7}  {samples:7}  {scope:6}  {every:11}   {1e3 * v_s:10.2f}  "
                       f"{1e3 * both_s:13.2f}  {most:5.3f}   {held / 1e9:8.2f}")


def check(path):
    """Measured ESamp/vanilla beside the bound, for all of a harness's JSON: (lines, all within 25 %)."""
    lines, fine = [], True
    for case in json.loads(Path(path).read_text(encoding="utf-8"))["cases"]:
        for name, run in case["variants"].items():
            if "bound" not in run or run.get("failed"):
                continue
            gap = run["ratio"][1] / run["bound"] - 1
            fine &= abs(gap) <= 0.25
            lines.append(f"{case['shape']:14} {case['prompts']:3}×{case['samples']:<3} {name:28} "
                         f"measured {run['ratio'][1]:.3f}  bound {run['bound']:.3f}  {100 * gap:+.1f} %")
    return lines, fine


@contextmanager
def figure(path, inches):
    """One matplotlib axis, written to `path` at the end; a ValueError that says how to get matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a figure needs matplotlib: pip install -r experiments/requirements.txt") from None
    drawing = Figure(figsize=inches)
    yield drawing.add_subplot()
    drawing.tight_layout()
    drawing.savefig(path)


def plot(path, machine):
    """The bound against the number of concurrent prompts, for both scopes and some `train_every`."""
    config, prompts = shape("qwen3-8b"), [2 ** i for i in range(11)]
    with figure(path, (7, 4.2)) as axis:
        for scope, every in (("batch", 1), ("prompt", 64), ("prompt", 8), ("prompt", 1)):
            most = [bound(config, p, 1, 512, scope, train_every=every, **machine)[2] for p in prompts]
            axis.plot(prompts, most, marker="o", label=f"scope {scope}, train_every {every}")
        axis.set(xscale="log", xlabel="concurrent prompts, one sample each, 512 tokens of context",
                 ylabel="ESamp / vanilla, at most", ylim=(0, 1.02),
                 title=f"Qwen3-8B shape, bf16, on paper: {machine['bandwidth'] / 1e12:.1f} TB/s")
        axis.legend()
        axis.grid(alpha=0.3)


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help=f"{', '.join(SHAPES)}, or a checkpoint folder; with it, one line")
    parser.add_argument("--prompts", type=int, default=1, help="decoded together (default 1)")
    parser.add_argument("--samples", type=int, default=1, help="per prompt (default 1)")
    parser.add_argument("--context", type=int, default=512, help="tokens per sequence (default 512)")
    parser.add_argument("--scope", choices=("prompt", "batch"), default="prompt", help="default prompt")
    parser.add_argument("--width", type=int, default=384, help="of the Distiller (default 384)")
    parser.add_argument("--train-every", type=int, default=1, help="default 1")
    parser.add_argument("--filters", action="store_true", help="top-k, top-p or min-p are set")
    parser.add_argument("--bandwidth", type=float, default=H200["bandwidth"], help="bytes/s (default 4.2e12)")
    parser.add_argument("--rate", type=float, default=H200["rate"], help="bf16 operations/s (default 7e14)")
    parser.add_argument("--fp32-rate", type=float, default=H200["fp32_rate"], help="(default 4e13)")
    parser.add_argument("--check", metavar="JSON", help="compare with what `experiments.throughput` measured")
    parser.add_argument("--plot", metavar="FILE", help="write the figure (svg, png)")
    args = parser.parse_args(argv)
    machine = dict(bandwidth=args.bandwidth, rate=args.rate, fp32_rate=args.fp32_rate)
    try:
        if args.check:
            lines, fine = check(args.check)
            print("\n".join(lines))
            return 0 if fine else 1
        if args.plot:
            plot(args.plot, machine)
        elif args.shape:
            v_s, both_s, most = bound(shape(args.shape), args.prompts, args.samples, args.context, args.scope,
                                   args.width, args.train_every, args.filters, **machine)
            print(f"vanilla {1e3 * v_s:.3f} ms, with ESamp {1e3 * both_s:.3f} ms a step; "
                  f"ESamp / vanilla at most {most:.3f}")
        else:
            print("\n".join(answers(machine)))
    except (ValueError, OSError, KeyError) as error:
        print(f"cost_model: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
