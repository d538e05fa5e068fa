"""Tables and figures from what `experiments.run` wrote: the same files give the same text.

    python -m experiments.report                       prints all tables
    python -m experiments.report --write               into the blocks of EXPERIMENTS.md; draws its figures
    python -m experiments.report --check               exit code 1 names the first block that differs

    <!-- table NAME -->  …  <!-- end -->               becomes the table of experiments/results/NAME.jsonl
    <!-- table NAME:PATTERN,PATTERN -->  …             only the settings whose name matches, as in a shell

    one setting              seeds averaged for each prompt, whole seeds only         `Row`, `rows_of`
    stories, a line          diversity, and its distance to vanilla's curve at equal perplexity  `story_cells`
    countdown, a line        success, and its difference to vanilla's best            `countdown_cells`

All intervals are 95 % percentile bootstraps over prompts (`metrics.interval`, `metrics.above_frontier`).
Differences are paired: resampled prompts are the same on both sides.
"""

import argparse
import fnmatch
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from experiments.metrics import above_frontier, interval, pass_at_k, perplexity
from experiments.run import HERE, read
from experiments.tables import TABLES

PAGE = HERE.parent / "EXPERIMENTS.md"
BLOCK = re.compile(r"<!-- table ([^\s:]+)(?::(.*?))? -->\n(.*?)<!-- end -->", re.DOTALL)
CURVES = ("vanilla T 1", "esamp β 0.25", "rls β 0.5", "min-p 0.05", "fire")     # drawn as pass@k over k
FEW = (1, 4, 16, 64)                                    # the k of a table's columns


# ------------------------------------------------------------------------------
# from lines to rows
# ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Row:
    """What a table knows of a setting."""

    name: str
    knobs: dict
    seeds: tuple                                # those with every prompt
    per_prompt: dict                            # metric: a figure per prompt, the mean over seeds
    stats: dict                                 # of all seeds together
    ms_per_step: float
    seconds: float

    @property
    def plain(self):
        """Whether it is vanilla with nothing but a temperature: a point of the curve to compare with."""
        return set(self.knobs) <= {"name", "temperature"}

    @property
    def perplexity(self):
        """exp(Σ nll / Σ tokens)."""
        return perplexity(list(zip(self.per_prompt["nll"], self.per_prompt["tokens"], strict=True)))

    def mean(self, metric):
        """The mean over prompts."""
        return mean(self.per_prompt[metric])


def mean(values):
    """Σ/n."""
    return sum(values) / len(values)


def rows_of(path):
    """(header, the `Row` of each setting that has a whole seed) of a results file."""
    header, lines = read(path)
    rows, n = [], header["n"]
    for figures in (line["per_prompt"] for line in lines if "correct" in line["per_prompt"]):
        figures |= {f"pass{k}": [100 * pass_at_k(n, c, k) for c in figures["correct"]] for k in powers(n)}
    for knobs in header["settings"]:
        by_seed = {seed: sorted((x for x in lines if (x["setting"], x["seed"]) == (knobs["name"], seed)),
                                key=lambda x: x["first"]) for seed in header["seeds"]}
        whole = {seed: mine for seed, mine in by_seed.items()
                 if sum(len(x["per_prompt"]["nll"]) for x in mine) == header["prompts"]}
        if whole:
            rows.append(row(knobs, whole))
    return header, rows


def powers(n):
    """1, 2, 4, … up to n: the k of pass@k."""
    return [2 ** i for i in range(n.bit_length())]


def row(knobs, whole):
    """The `Row` of a setting from {seed: its lines in the prompts' order}."""
    used = [line for mine in whole.values() for line in mine]
    per_prompt = {}
    for metric in used[0]["per_prompt"]:
        by_seed = [[x for line in mine for x in line["per_prompt"][metric]] for mine in whole.values()]
        per_prompt[metric] = [mean(values) for values in zip(*by_seed, strict=True)]
    seconds = sum(line["seconds"] for line in used)
    return Row(knobs["name"], knobs, tuple(whole), per_prompt, together([line["stats"] for line in used]),
               1000 * seconds / sum(line["steps"] for line in used), seconds)


def together(stats):
    """KL and moved share over all reweighted tokens; losses as means over units weighted by their samples."""
    def weighted(name, weight):
        if any(s[name] is None for s in stats):
            return None
        return sum(s[name] * s[weight] for s in stats) / sum(s[weight] for s in stats)
    return dict(kl=weighted("kl_nats", "reweighted_tokens"),
                moved=weighted("moved_share", "reweighted_tokens"),
                loss=weighted("loss_last_10_steps", "samples"),
                loss_of_mean=weighted("loss_last_10_steps_if_running_mean", "samples"))


# ------------------------------------------------------------------------------
# a table's lines
# ------------------------------------------------------------------------------

def figure(value, digits=2):
    """A number with so many decimals, – for None."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def within(value, low, high, digits=2, sign=""):
    """value [low, high]."""
    x, a, b = (f"{number:{sign}.{digits}f}".replace("-", "−") for number in (value, low, high))
    return f"{x} [{a}, {b}]"


def losses(stats):
    """The loss over the last ten steps / that of the running mean."""
    if stats["loss"] is None:
        return "–"
    return f"{stats['loss']:.1f} / {figure(stats['loss_of_mean'], 1)}"


def point(row):
    """A row as `above_frontier` takes it."""
    figures = row.per_prompt
    return dict(diversity=figures["vendi1"], nll=figures["nll"], tokens=figures["tokens"])


def frontier(rows):
    """Vanilla's points, one for each perplexity."""
    return list({row.perplexity: point(row) for row in rows if row.plain}.values())


def above(row, curve):
    """The row's distance to the curve as text: – for the curve's own points."""
    if row.plain or len(curve) < 2:
        return "–"
    found = above_frontier(point(row), curve)
    return within(*found, sign="+") if found else "outside"


def label(header, row):
    """The setting's name, with its seeds where it has not all of the table's."""
    some = f" (seed {', '.join(map(str, row.seeds))})" if list(row.seeds) != header["seeds"] else ""
    return row.name + some


def story_cells(header, rows):
    """(titles, {setting: cells}) of a table of stories."""
    titles = ("Vendi q=1 [95 %]", "above vanilla at equal perplexity [95 %]", "perplexity", "Vendi q=∞",
              "cosine", "distinct-2", "self-BLEU", "KL, nats", "moved %", "loss last 10 / running mean",
              "ms per step (s)")
    cells, curve = {}, frontier(rows)
    for r in rows:
        moved = None if r.stats["moved"] is None else 100 * r.stats["moved"]
        cells[r.name] = (within(*interval(r.per_prompt["vendi1"])), above(r, curve), figure(r.perplexity),
                         figure(r.mean("vendi_inf")), figure(r.mean("cosine"), 3),
                         figure(r.mean("distinct2"), 3), figure(r.mean("self_bleu"), 3),
                         figure(r.stats["kl"], 3), figure(moved, 1), losses(r.stats),
                         f"{r.ms_per_step:.1f} ({r.seconds:.0f})")
    return titles, cells


def best(rows, metric):
    """Vanilla's row with the largest mean: chosen on the same data, in its favour; None without vanilla."""
    return max((r for r in rows if r.plain), key=lambda r: r.mean(metric), default=None)


def gain(row, rows, metric, digits=1):
    """The paired difference of the row to vanilla's best temperature for this metric, as text."""
    rival = best(rows, metric)
    if rival is None or row is rival:
        return "–" if rival is None else "best"
    differences = [a - b for a, b in zip(row.per_prompt[metric], rival.per_prompt[metric], strict=True)]
    return within(*interval(differences), digits, "+")


def countdown_cells(header, rows):
    """(titles, {setting: cells}) of a table of Countdown; shares in percent."""
    columns = [k for k in FEW if k <= header["n"]]
    gains = [(f"pass{k}", f"pass@{k}", 1) for k in columns[-2:]] + [("distinct", "distinct", 2)]
    majority = "maj16" if header["n"] >= 16 else None
    titles = (*(f"pass@{k}" for k in columns), "distinct correct",
              *(f"{title} − vanilla's best [95 %]" for _, title, _ in gains),
              *(["maj@16"] if majority else []), "KL, nats", "loss last 10 / running mean")
    cells = {r.name: (*(figure(r.mean(f"pass{k}"), 1) for k in columns), figure(r.mean("distinct")),
                      *(gain(r, rows, metric, digits) for metric, _, digits in gains),
                      *([figure(100 * r.mean(majority), 1)] if majority else []),
                      figure(r.stats["kl"], 3), losses(r.stats)) for r in rows}
    return titles, cells


CELLS = {"stories": story_cells, "countdown": countdown_cells}


def caption(header):
    """What a reader has to know about the table."""
    seeds, split = " ".join(map(str, header["seeds"])), header["split"].replace("_", "-")
    work = (f"{header['about']}: {header['prompts']} prompts ({split}) × {header['n']} samples of up to "
            f"{header['max_new_tokens']} tokens, seeds {seeds}, model {header['model']}. ")
    if header["task"] == "stories":
        return work + (
            f"Embeddings: {header['embedder']}. Perplexity is the model's own at T = 1. The distance is to "
            "the curve that vanilla's temperatures draw, at the setting's perplexity; outside: vanilla has "
            f"no such perplexity. A step decodes {header['chunk']} prompts on {header['machine']}, with "
            f"{header['threads']} of torch's threads. Intervals: bootstrap over prompts, seeds averaged.")
    return work + (
        f"pass@k is \"k of {header['n']}\", in percent: samples that share a Distiller are not independent, "
        "so it is not what a run of k samples would give. Differences in points, paired by problem, to "
        "vanilla at its best temperature for that column, chosen on the same data in vanilla's favour. "
        "Intervals: bootstrap over problems, seeds averaged.")


def markdown(path, patterns=("*",)):
    """The table of a results file, of the settings that match a pattern, and its caption."""
    header, rows = rows_of(path)
    titles, cells = CELLS[header["task"]](header, rows)
    lines = [("setting", *titles), ("---", *["---:"] * len(titles))]
    lines += [(label(header, r), *cells[r.name]) for r in rows
              if any(fnmatch.fnmatchcase(r.name, pattern) for pattern in patterns)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{caption(header)}"


# ------------------------------------------------------------------------------
# figures
# ------------------------------------------------------------------------------

@contextmanager
def drawing(path, axes, inches):
    """A figure of so many axes, written as .svg and .png; the same data give the same SVG."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a figure needs matplotlib: pip install -r experiments/requirements.txt") from None
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        page = Figure(figsize=inches)
        yield page.subplots(1, axes, squeeze=False)[0]
        page.tight_layout()
        page.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        page.savefig(path.with_suffix(".png"), dpi=120)


def families(rows):
    """Vanilla's curve first, then the other settings by the part of their name before β: {family: rows}."""
    found = {"vanilla": [r for r in rows if r.plain]}
    for r in rows:
        if not r.plain:
            found.setdefault(r.name.split(" β ")[0], []).append(r)
    return found


def scatter(axis, groups, x, y):
    """A family is a colour and a marker; vanilla's curve is a line."""
    for i, (family, members) in enumerate(groups.items()):
        look = dict(color=f"C{i % 10}", marker="sDv^<>pP*X"[i % 7], linestyle="")
        if i == 0:
            look = dict(color="black", marker="o", linestyle="-", zorder=3)
        axis.plot([x(r) for r in members], [y(r) for r in members], label=family, **look)


def plot_stories(path, header, rows):
    """Vendi against perplexity; bars are the interval of the distance to vanilla's curve."""
    curve = frontier(rows)
    with drawing(path, 1, (9, 5)) as (axis,):
        groups = families(rows)
        groups["vanilla"].sort(key=lambda r: r.perplexity)
        scatter(axis, groups, lambda r: r.perplexity, lambda r: r.mean("vendi1"))
        for r in rows:
            found = None if r.plain or len(curve) < 2 else above_frontier(point(r), curve)
            if found:
                base = r.mean("vendi1") - found[0]
                axis.vlines(r.perplexity, base + found[1], base + found[2], color="0.6", linewidth=1)
        axis.set(xlabel="perplexity", ylabel=f"Vendi score, q = 1 ({header['embedder']})",
                 title=header["about"])
        axis.legend(fontsize="small", bbox_to_anchor=(1, 1), loc="upper left")
        axis.grid(alpha=0.3)


def plot_countdown(path, header, rows):
    """pass@k over k for a few settings, and the largest k's against distinct solutions for all."""
    ks = powers(header["n"])
    last = ks[-1]
    drawn = [r for r in rows if r.name in CURVES or r is best(rows, f"pass{last}")]
    with drawing(path, 2, (12, 5)) as (left, right):
        for r in drawn:
            left.plot(ks, [r.mean(f"pass{k}") for k in ks], marker="o", label=r.name)
        left.set_xscale("log", base=2)
        left.set_xticks(ks, ks)
        left.set(xlabel="k", ylabel=f"pass@k, k of {header['n']}, %", title=header["about"])
        left.legend(fontsize="small")
        scatter(right, families(rows), lambda r: r.mean("distinct"), lambda r: r.mean(f"pass{last}"))
        right.set(xlabel="different correct solutions per problem", ylabel=f"pass@{last}, %")
        right.legend(fontsize="small", bbox_to_anchor=(1, 1), loc="upper left")
        for axis in (left, right):
            axis.grid(alpha=0.3)


PLOTS = {"stories": plot_stories, "countdown": plot_countdown}


def plot(path):
    """The figures of a results file, beside it."""
    header, rows = rows_of(path)
    PLOTS[header["task"]](Path(path), header, rows)


# ------------------------------------------------------------------------------
# the page
# ------------------------------------------------------------------------------

def rendered(page, folder):
    """[(the block's name, what it holds, what it should hold)] of every block of the page."""
    if page.count("<!-- table ") != len(BLOCK.findall(page)):
        raise ValueError("a table block has no end; expected <!-- table NAME --> … <!-- end -->")
    found = []
    for name, variant, content in BLOCK.findall(page):
        path = folder / f"{name}.jsonl"
        if not path.is_file():
            raise ValueError(f"block {name} has no results; expected {path}")
        text = markdown(path, variant.split(",") if variant else ["*"])
        found.append((f"{name}:{variant}" if variant else name, content, f"{text}\n"))
    return found


def write(page_path, folder):
    """Fills every block of the page, then draws the figures that it links to."""
    page = page_path.read_text(encoding="utf-8")
    new = iter([text for _, _, text in rendered(page, folder)])

    def filled(match):
        return match[0][:match.start(3) - match.start()] + next(new) + "<!-- end -->"
    page_path.write_text(BLOCK.sub(filled, page), encoding="utf-8")
    for name in re.findall(r"\(experiments/results/(\w+)\.svg\)", page):
        plot(folder / f"{name}.jsonl")


def check(page_path, folder):
    """The name of the first block that is not what the results say; None where all are."""
    blocks = rendered(page_path.read_text(encoding="utf-8"), folder)
    return next((name for name, is_there, expected in blocks if is_there != expected), None)


def main(argv=None, page=PAGE, folder=HERE / "results"):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="into EXPERIMENTS.md, and the figures")
    what.add_argument("--check", action="store_true", help="exit code 1 if EXPERIMENTS.md differs")
    args = parser.parse_args(argv)
    try:
        if args.write:
            write(page, folder)
        elif args.check:
            wrong = check(page, folder)
            if wrong:
                print(f"{page.name}: table {wrong} is not what its results say; run with --write")
                return 1
        else:
            paths = [folder / f"{name}.jsonl" for name in TABLES]
            print("\n\n".join(markdown(path) for path in paths if path.is_file()))
    except (ValueError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
