"""What a step of either Distiller costs: bytes held, bytes moved on paper, milliseconds measured here.

    python -m experiments.distiller_cost                     # → experiments/results/distiller_cost.json
    python -m experiments.distiller_cost --widths 128 --rounds 3 --out quick.json

A step is one `predict` and one `train` of one Distiller on K rows, fp32. The two kinds take turns, A B A B …;
a figure is the median of the rounds, a ratio the median of the rounds' ratios. On paper a step moves

    swiglu   43 bytes per weight, 6·D·R of them (`experiments.cost_model`)
    rls      U four times (V = F U, V Uᵀ, and the update reads and writes it), W four times (`predict`,
             `train`, and the update in place), the fixed A, B, C twice: 4·(4F² + 4F·D + 2·D·(2R + C)) bytes
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from distiller import DistillerConfig, make_distiller
from experiments.cost_model import PREDICT_BYTES, TRAIN_BYTES

WIDTHS = (64, 128, 896, 4096)
KINDS = ("swiglu", "rls")
RESULT = Path(__file__).resolve().parent / "results" / "distiller_cost.json"


def moved(kind, width_D, config):
    """Bytes that a step of one Distiller moves, on paper."""
    if kind == "swiglu":
        return 6 * width_D * config.width * (PREDICT_BYTES + TRAIN_BYTES)
    C = min(config.linear, width_D)
    features = C + config.width + 1
    return 4 * (4 * features ** 2 + 4 * features * width_D + 2 * width_D * (2 * config.width + C))


def step_s(distiller, taps):
    """Seconds of one step on (h¹, h^L, live)."""
    shallow_PKD, deep_PKD, live_PK = taps
    began = time.perf_counter()
    distiller.predict(shallow_PKD)
    distiller.train(shallow_PKD, deep_PKD, live_PK)
    return time.perf_counter() - began


@torch.no_grad()
def measure(width_D, rows, rounds):
    """One width: a dict of both kinds' figures."""
    source = torch.Generator().manual_seed(0)
    configs = {kind: DistillerConfig(kind=kind) for kind in KINDS}
    distillers = {kind: make_distiller(config, 1, width_D) for kind, config in configs.items()}
    times = {kind: [] for kind in KINDS}
    for round_ in range(rounds + 2):                     # two rehearsals
        taps = [torch.randn(1, rows, width_D, generator=source) for _ in range(2)]
        for kind, distiller in distillers.items():
            spent_s = step_s(distiller, (*taps, torch.ones(1, rows, dtype=torch.bool)))
            times[kind] += [spent_s] if round_ > 1 else []
    ratios = [a / b for a, b in zip(times["rls"], times["swiglu"], strict=True)]
    return dict(width=width_D, rows=rows, ratio=statistics.median(ratios), **{
        kind: dict(bytes_held=configs[kind].bytes(width_D), bytes_moved=moved(kind, width_D, configs[kind]),
                   ms=1e3 * statistics.median(times[kind])) for kind in KINDS})


def table(report):
    """Markdown lines."""
    yield ("| D | swiglu holds, MB | rls holds, MB | swiglu moves, MB | rls moves, MB | swiglu ms | rls ms | "
           "rls / swiglu |")
    yield "|---|---|---|---|---|---|---|---|"
    for case in report["cases"]:
        cells = [f"{case[kind][name] / 1e6:.1f}" for name in ("bytes_held", "bytes_moved") for kind in KINDS]
        cells += [f"{case[kind]['ms']:.2f}" for kind in KINDS]
        yield "| " + " | ".join([str(case["width"]), *cells, f"{case['ratio']:.2f}"]) + " |"


def build_parser():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, metavar="D",
                        help=f"of the LLM (default: {' '.join(map(str, WIDTHS))})")
    parser.add_argument("--rows", type=int, default=16, metavar="K", help="samples per prompt (default 16)")
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="steps of each kind (default 30)")
    parser.add_argument("--out", default=RESULT, metavar="FILE", help="JSON (default: %(default)s)")
    return parser


def main(argv=None):
    """Runs the command line: 0, or 2 for bad input."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if min(*args.widths, args.rows, args.rounds) < 1:
        parser.error("--widths, --rows and --rounds must be at least 1")
    report = dict(machine=f"{platform.machine()}, {os.cpu_count()} cores", torch=torch.__version__,
                  threads=torch.get_num_threads(),
                  cases=[measure(width_D, args.rows, args.rounds) for width_D in args.widths])
    print("\n".join(table(report)))
    Path(args.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
