"""The runs and their report: a kill loses nothing, files are not mixed, planted numbers come out again."""

import dataclasses
import json
import re
import xml.etree.ElementTree

import pytest
from conftest import ROOT

import decode
from decode import BUNDLED
from experiments import countdown, methods, metrics, report, run, tables
from experiments.methods import Setting
from experiments.tables import TABLES, Table

ROOMS = dict(decode=decode, methods=methods, metrics=metrics, run=run, report=report, tables=tables)
MINI = Table("A small table", "countdown", (Setting("vanilla T 1"), Setting("rls β 0.5", "esamp", beta=0.5,
             distiller="rls", width=16), Setting("waves β 1", "esamp", beta=1.0, width=16, waves=2)),
             prompts=3, n=8, max_new_tokens=24, seeds=(41, 42), model=str(BUNDLED), chunk=2)
UNITS = 2 * 3 * 2                                       # seeds × settings × chunks of 2 and 1 prompts


@pytest.fixture(scope="module")
def bench():
    """The small table on the bundled checkpoint."""
    return run.Bench(MINI, BUNDLED, None, None)


def header_for(table, bench, name="mini"):
    """The header that a run of `table` would write."""
    changed = run.Bench.__new__(run.Bench)
    changed.__dict__ |= bench.__dict__ | dict(table=table)
    return run.header_of(name, changed, BUNDLED, None, None)


def fill(bench, path):
    """All that a command would do."""
    settings = list(bench.table.settings)
    run.fill(bench, path, settings, run.resume(path, header_for(bench.table, bench)))


def timeless(path):
    """The file's entries without what a clock said."""
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


@pytest.fixture(scope="module")
def drawn():
    """What `methods.sample` returned, by what it was asked for: kills need not draw the same again."""
    return {}


@pytest.fixture(scope="module")
def whole(bench, tmp_path_factory, drawn):
    """The file of an uninterrupted run."""
    def remembered(model, prompts, setting, **more):
        key = setting.name, more["seed"], more["first_prompt"], len(prompts)
        drawn[key] = sample(model, prompts, setting, **more)
        return drawn[key]
    path, sample = tmp_path_factory.mktemp("whole") / "mini.jsonl", methods.sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "sample", remembered)
        fill(bench, path)
    return path


@pytest.mark.parametrize("module", [run, report, tables], ids=lambda m: m.__name__)
def test_the_map_names_things_that_exist(module):
    names = re.findall(r"`([A-Za-z_][\w.]*)`", module.__doc__)
    assert len(names) >= 2
    for dotted in names:
        first, *rest = dotted.removeprefix("experiments.").split(".")
        thing = ROOMS.get(first) or getattr(module, first)
        for part in rest:
            thing = getattr(thing, part)


# ------------------------------------------------------------------------------
# a run that is killed
# ------------------------------------------------------------------------------

def test_seeds_are_outermost_and_every_unit_is_there_once(whole):
    header, lines = run.read(whole)
    assert [(x["seed"], x["setting"], x["first"]) for x in lines] == [
        (seed, s.name, first) for seed in (41, 42) for s in MINI.settings for first in (0, 2)]
    assert len(lines) == UNITS and header["seeds"] == [41, 42] and header["n"] == 8
    assert header["settings"][0] == {"name": "vanilla T 1"} and header["weights"] == run.digest(BUNDLED)
    assert header["settings"][2] == dict(name="waves β 1", method="esamp", beta=1.0, width=16, waves=2)
    assert [len(x["per_prompt"]["nll"]) for x in lines] == 6 * [2, 1]
    assert all(x["steps"] >= max(x["per_prompt"]["tokens"]) / 8 and x["seconds"] > 0 for x in lines)


@pytest.mark.parametrize("kills", [(0,), (7, 2), (3, 0, 8), (11,)])
def test_killed_and_started_again_it_is_the_same_file(bench, whole, tmp_path, monkeypatch, drawn, kills):
    path, calls, died = tmp_path / "mini.jsonl", [], []

    def dies_at(count):
        def dying(model, prompts, setting, **more):
            assert path.read_bytes().count(b"\n") == 1 + len(calls) - len(died)     # on the disk already
            calls.append(more["first_prompt"])
            dying.left -= 1
            if dying.left < 0:
                died.append(True)
                raise KeyboardInterrupt
            return drawn[setting.name, more["seed"], more["first_prompt"], len(prompts)]
        dying.left = count
        return dying
    for count in kills:
        monkeypatch.setattr(methods, "sample", dies_at(count))
        with pytest.raises(KeyboardInterrupt):
            fill(bench, path)
    monkeypatch.setattr(methods, "sample", dies_at(UNITS))
    fill(bench, path)
    assert timeless(path) == timeless(whole)
    assert len(calls) == UNITS + len(kills)             # those that died, and every unit once


def test_a_torn_last_line_is_dropped_and_done_again(bench, whole, tmp_path):
    data = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for cut in (ends[-2] + 40, ends[-1] - 1, ends[-3], ends[0] - 5):        # the last tears the header
        path = tmp_path / "mini.jsonl"
        path.write_bytes(data[:cut])
        done = run.resume(path, header_for(MINI, bench))
        assert len(done) == max(0, data[:cut].count(b"\n") - 1)
        assert path.read_bytes() == data[:ends[len(done)]]
    path.write_bytes(data[:ends[-2] + 40])
    fill(bench, path)
    assert timeless(path) == timeless(whole)


def test_a_whole_file_is_left_alone(bench, whole, monkeypatch):
    before = whole.read_bytes()
    monkeypatch.setattr(methods, "sample", None)
    fill(bench, whole)
    assert whole.read_bytes() == before and [p.name for p in whole.parent.iterdir()] == ["mini.jsonl"]


def test_what_would_mix_is_refused_in_one_line(bench, whole):
    before = whole.read_bytes()
    changed = Setting("rls β 0.5", "esamp", beta=0.5, distiller="rls", width=17)
    for change, words in ((dict(n=16), "n is 8 there, 16 here"), (dict(prompts=2), "prompts"),
                          (dict(seeds=(41,)), "seeds"), (dict(digits=5), "digits"), (dict(chunk=3), "chunk"),
                          (dict(max_new_tokens=9), "max_new_tokens"), (dict(split="development"), "split"),
                          (dict(settings=(MINI.settings[0], changed, MINI.settings[2])), "'rls β 0.5'"),
                          (dict(settings=MINI.settings[1:]), "'vanilla T 1', not of the table")):
        with pytest.raises(ValueError, match=words) as error:
            run.resume(whole, header_for(dataclasses.replace(MINI, **change), bench))
        assert "\n" not in str(error.value) and whole.read_bytes() == before
    header = header_for(MINI, bench)
    for key, words in (("weights", "weights"), ("embedder", "embedder"), ("table", "table")):
        with pytest.raises(ValueError, match=words):
            run.resume(whole, header | {key: "other"})
    for text in ("", "{}\n", "[1]\n", "not json\n"):
        (whole.parent / "x.jsonl").write_text(text)
        with pytest.raises(ValueError, match="no results file"):
            run.read(whole.parent / "x.jsonl")
    (whole.parent / "x.jsonl").unlink()


def test_a_table_may_gain_settings_and_with_only_lose_some(bench, whole, tmp_path):
    path, more = tmp_path / "mini.jsonl", (Setting("top-k 2", top_k=2), *MINI.settings)
    path.write_bytes(whole.read_bytes())
    assert len(run.resume(path, header_for(dataclasses.replace(MINI, settings=more), bench))) == UNITS
    header, lines = run.read(path)
    assert [s["name"] for s in header["settings"]] == ["top-k 2", *(s.name for s in MINI.settings)]
    assert lines == run.read(whole)[1]
    fewer = header_for(dataclasses.replace(MINI, settings=more[:2]), bench)
    run.resume(path, fewer, some=True)
    kept = [s["name"] for s in run.read(path)[0]["settings"]]
    assert kept == ["top-k 2", "vanilla T 1", "rls β 0.5", "waves β 1"]
    where = [fewer | dict(commit=c, settings=header["settings"]) for c in ("new", "new", "newer")]
    for entry in where:
        run.resume(path, entry)
    header = run.read(path)[0]
    assert header["commit"] == fewer["commit"]
    assert [place["commit"] for place in header["continued"]] == ["new", "newer"]


def test_an_amateur_may_come_later_but_not_change(bench, whole, tmp_path):
    path, header = tmp_path / "mini.jsonl", header_for(MINI, bench)
    path.write_bytes(whole.read_bytes())
    for amateur in ("a", None, "a"):
        run.resume(path, header | dict(amateur=amateur))
        assert run.read(path)[0]["amateur"] == "a"
    with pytest.raises(ValueError, match="amateur is a there, b here"):
        run.resume(path, header | dict(amateur="b"))


# ------------------------------------------------------------------------------
# what is counted
# ------------------------------------------------------------------------------

@dataclasses.dataclass
class Ids:
    """A sample whose ids are its text already."""

    token_ids: str


class Echo:
    """A tokenizer for it."""

    def decode(self, ids):
        """The text."""
        return ids


def test_a_unit_is_what_methods_and_metrics_say(bench, whole):
    line = run.read(whole)[1][2]                        # rls, seed 41, prompts 0 and 1
    samples, stats = methods.sample(bench.model, bench.prompts[:2], MINI.settings[1], n=8, seed=41,
                                    max_new_tokens=24, eos_ids=bench.text.eos_ids)
    pairs = metrics.score(bench.model, bench.prompts, samples)
    for p, prompt in enumerate(bench.task.prompts[:2]):
        mine = samples[8 * p:8 * p + 8]
        found = [countdown.canonical(prompt, bench.text.decode(s.token_ids)) for s in mine]
        assert line["per_prompt"]["correct"][p] == sum(x is not None for x in found)
        assert line["per_prompt"]["distinct"][p] == len(set(found) - {None})
        assert line["per_prompt"]["tokens"][p] == sum(len(s.token_ids) for s in mine)
        nll = sum(x for x, _ in pairs[8 * p:8 * p + 8])
        assert line["per_prompt"]["nll"][p] == pytest.approx(nll, rel=1e-4)
    assert line["stats"] == run.rounded(stats.summary()) and set(line["per_prompt"]) == {
        "nll", "tokens", "correct", "distinct", "maj8"}
    assert line["steps"] == max(len(s.token_ids) for s in samples)
    assert sum(sum(x["per_prompt"]["correct"]) for x in run.read(whole)[1]) > 0
    later = run.read(whole)[1][3]["per_prompt"]         # prompt 2, with its own noise
    samples, _ = methods.sample(bench.model, bench.prompts[2:], MINI.settings[1], n=8, seed=41,
                                max_new_tokens=24, eos_ids=bench.text.eos_ids, first_prompt=2)
    assert later["tokens"] == [sum(len(s.token_ids) for s in samples)]


def test_steps_are_those_of_all_waves(whole, drawn):
    for line in run.read(whole)[1]:
        samples = drawn[line["setting"], line["seed"], line["first"], len(line["per_prompt"]["nll"])][0]
        waves = [range(4), range(4, 8)] if line["setting"] == "waves β 1" else [range(8)]
        assert line["steps"] == sum(max(len(s.token_ids) for s in samples if s.sample in w) for w in waves)


def test_countdown_measures_by_the_problem_itself():
    task = run.Countdown(dataclasses.replace(MINI, prompts=3), Echo())
    task.prompts = ["9111>99:", "8321>13:", "4421>11:"]
    same, other = "2+3=5,5/1=5,5+8=13", "8+1=9,2*2=4,9+4=13"
    eight = [same, "3+2=5,5/1=5,8+5=13", same, "8+3=11,11+2=13,13/1=13", other, "", "8+3=11", same]
    found = task.measure(1, [[Ids(answer) for answer in eight], 8 * [Ids("4+4=8,8+2=10,10+1=11")]])
    assert found["correct"] == [5, 8] and found["distinct"] == [2, 1]       # order of a sum does not count
    assert found["maj8"] == [1.0, 1.0] and len(found) == 3


def test_majority_shares_the_credit_of_ties_and_votes_on_text():
    def of(answers, right, k):
        return run.majority(list(answers), [a in right for a in answers], [k])[0]
    assert of("aab", "a", 3) == 1 and of("aab", "b", 3) == 0 and of("aabb", "a", 4) == 0.5
    assert of("aabbc", "ab", 5) == 1                    # right answers tied with each other
    assert of("abcd", "abc", 4) == 0.75 and of("aaaa", "", 2) == 0
    assert of("ab", "a", 1) == pytest.approx(0.5, abs=0.15)         # 200 draws: 4 σ = 0.14
    answers = list("aaaaabbbbccccddde")                 # one subset at k = N: the sum of maj_at_k exactly
    for k in (4, 9, 17):
        expected = sum(metrics.maj_at_k(answers, truth, k, draws=2000) for truth in "be")
        assert of(answers, "be", k) == pytest.approx(expected, abs=0.11 if k < 17 else 1e-6)


def test_stories_measures_are_the_metrics():
    samples = [[Ids(text) for text in texts] for texts in (
        ("The cat sat.", "The cat sat.", "A dog ran, and ran."), ("", "", ""))]
    embed = run.embedder("ngram")
    task = run.Stories(dataclasses.replace(TABLES["stories"], prompts=3), Echo(), embed)
    found = task.measure(0, samples)
    first = embed(["The cat sat.", "The cat sat.", "A dog ran, and ran."])
    assert found["vendi1"] == [pytest.approx(metrics.vendi(first)), pytest.approx(1)]
    assert found["vendi_inf"][0] == pytest.approx(metrics.vendi(first, float("inf")))
    assert found["cosine"][0] == pytest.approx(metrics.mean_cosine(first))
    assert found["distinct"] == [2, 1] and found["distinct2"] == [9 / 12, 0.0]      # 3 + 3 + 6 pairs of words
    assert found["self_bleu"][0] > 0.6 and found["self_bleu"][1] == 0
    assert len(task.prompts) == 3 and len(found) == 6


def test_splits_do_not_overlap():
    for digits in (4, 5):
        by_split = [run.Countdown(dataclasses.replace(MINI, split=split, prompts=count, digits=digits), None)
                    for split, count in (("development", 160), ("held_out", 240))]
        development, held_out = (set(task.prompts) for task in by_split)
        assert len(development) == 160 and len(held_out) == 240 and not development & held_out
        assert all(len(prompt) == digits + 4 for prompt in development | held_out)
    with pytest.raises(ValueError, match="prompts is 241; countdown held_out has 240"):
        run.Countdown(dataclasses.replace(MINI, prompts=241), None)
    openings = json.loads((ROOT / "experiments" / "openings.json").read_text(encoding="utf-8"))
    assert not set(openings["development"]) & set(openings["held_out"])


def test_floats_are_kept_at_six_digits():
    assert run.rounded({"a": [1.23456789, 3], "b": {"c": 123456789.0, "d": None}}) == {
        "a": [1.23457, 3], "b": {"c": 123457000.0, "d": None}}


# ------------------------------------------------------------------------------
# the tables, and the command line
# ------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TABLES)
def test_a_tables_names_are_unique_and_its_work_divides(name):
    table = TABLES[name]
    names = [setting.name for setting in table.settings]
    assert len(set(names)) == len(names) and table.task in run.TASKS
    assert all(table.n % setting.waves == 0 for setting in table.settings)
    assert any(set(run.knobs(s)) <= {"name", "temperature"} for s in table.settings)        # vanilla
    assert table.model or table.recipe


def smoke(capsys, *flags):
    """stdout of a run of the command line that must succeed."""
    assert run.main([*flags, "--smoke"]) == 0
    return capsys.readouterr().out


def test_smoke_prints_a_small_table(capsys, stories_folder, tmp_path):
    out = tmp_path / "x.jsonl"
    printed = smoke(capsys, "countdown_five", "--only", "vanilla*", "esamp β 0.25", "--out", str(out))
    wanted = [s.name for s in TABLES["countdown_five"].settings if s.name.startswith("vanilla")]
    assert re.findall(r"^\| ((?:vanilla|esamp)[^|]*) \|", printed, re.M) == [*wanted, "esamp β 0.25"]
    header, lines = run.read(out)
    assert header["prompts"] == 2 and header["digits"] == 5 and len(lines) == len(wanted) + 1
    printed = smoke(capsys, "stories", "--only", "vanilla T *", "--model", str(stories_folder))
    assert "Embeddings: ngram" in printed and printed.count("| vanilla T") == len(
        [s for s in TABLES["stories"].settings if s.name.startswith("vanilla T")])


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_smoke_of_every_setting(name, capsys, stories_folder):
    printed = smoke(capsys, name)
    for setting in TABLES[name].settings:
        assert f"| {setting.name} |" in printed


def test_errors_are_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(TABLES, "mini", dataclasses.replace(MINI, settings=(Setting("x", "contrastive"),)))
    for flags, words in ((["countdown_wide"], "needs --model DIR: python -m experiments.train_countdown"),
                         (["mini"], "needs --amateur DIR"),
                         (["countdown", "--only", "nothing"], "--only 'nothing' matches no setting"),
                         (["countdown", "--model", str(tmp_path), "--only", "vanilla*"], "config.json")):
        assert run.main([*flags, "--out", str(tmp_path / "x.jsonl")]) == 2
        out, err = capsys.readouterr()
        assert words in err and err.startswith("run: error: ") and err.count("\n") == 1 and not out
    for flags in ([], ["nothing"], ["countdown", "--threads", "0"]):
        with pytest.raises(SystemExit) as stop:
            run.main(flags)
        assert stop.value.code == 2
    assert run.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(TABLES)
    assert run.main(["countdown", "--list"]) == 0
    assert "vanilla T 1 " in capsys.readouterr().out


# ------------------------------------------------------------------------------
# the report
# ------------------------------------------------------------------------------

STATS = dict(tokens=100, samples=4, distinct_samples=4, updates=0, reweighted_tokens=0, moved_tokens=0,
             moved_share=None, kl_nats=None, total_variation=None, loss_first_step=None,
             loss_last_10_steps=None, loss_last_10_steps_if_h1=None, loss_last_10_steps_if_running_mean=None)
OF_ESAMP = STATS | dict(reweighted_tokens=80, moved_share=0.125, kl_nats=0.25, loss_last_10_steps=20.0,
                        loss_last_10_steps_if_running_mean=30.5)


def write_results(path, header, lines):
    """A results file by hand; a line: (setting, seed, first, figures per prompt, stats)."""
    names = ("setting", "seed", "first", "per_prompt", "stats")
    lines = [dict(zip(names, line, strict=True)) | dict(steps=10, seconds=0.5) for line in lines]
    path.write_text("".join(run.to_line(entry) for entry in (header, *lines)), encoding="utf-8")
    return path


def planted_stories(path, lift=0.5):
    """Vanilla's Vendi is 1 + 2·log(perplexity) + the prompt's own; another's lies `lift` above."""
    P, settings = 8, [{"name": f"vanilla T {t}", "temperature": t} for t in (0.8, 0.9)]
    settings += [{"name": "vanilla T 1"}, {"name": "rls β 0.5", "method": "esamp", "beta": 0.5},
                 {"name": "far β 9", "method": "esamp", "beta": 9.0}, {"name": "cut short"}]
    header = dict(table="stories", about="Planted", task="stories", split="held_out", settings=settings, n=4,
                  max_new_tokens=9, prompts=P, chunk=5, seeds=[41, 42], model="m", embedder="ngram",
                  machine="a machine", threads=1)
    lines = []
    for seed in (41, 42):
        for i, setting in enumerate(settings):
            name, log = setting["name"], (0.8, 1.0, 1.2, 1.1, 2.0, 1.0)[i]
            high = 1 + 2 * log + lift * (name == "rls β 0.5") + (0.1 if seed == 41 else -0.1)
            for first, count in ((0, 5), (5, 3)):
                own = [0.3 * ((first + p) % 4) for p in range(count)]
                figures = dict(nll=count * [100 * log], tokens=count * [100], vendi1=[high + x for x in own],
                               vendi_inf=count * [2.25], cosine=count * [0.125], distinct2=count * [0.5],
                               self_bleu=count * [0.0625], distinct=count * [4])
                if not (name == "cut short" and first) and not (name == "far β 9" and seed == 42):
                    lines.append((name, seed, first, figures, OF_ESAMP if "β" in name else STATS))
    return write_results(path, header, lines)


def planted_countdown(path):
    """Two vanilla temperatures and a method: the correct answers of 4 problems, 4 samples each, two seeds."""
    correct = {"vanilla T 0.8": [[0, 1, 4, 2], [0, 1, 4, 2]], "vanilla T 1": [[1, 1, 1, 1], [1, 0, 1, 1]],
               "new β 1": [[2, 2, 4, 4], [0, 2, 4, 4]]}
    settings = [{"name": "vanilla T 0.8", "temperature": 0.8}, {"name": "vanilla T 1"},
                {"name": "new β 1", "method": "esamp", "beta": 1.0}]
    header = dict(table="countdown", about="Planted", task="countdown", split="held_out", settings=settings,
                  n=4, max_new_tokens=9, prompts=4, chunk=4, seeds=[41, 42], model="m", embedder=None,
                  machine="a machine", threads=1)
    lines = [(name, seed, 0, dict(nll=4 * [1.0], tokens=4 * [9], correct=c, distinct=[min(x, 2) for x in c]),
              OF_ESAMP if "β" in name else STATS)
             for name, by_seed in correct.items() for seed, c in zip((41, 42), by_seed, strict=True)]
    return write_results(path, header, lines)


def cells(markdown):
    """{setting: {title: cell}} of a Markdown table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()
            if line.startswith("|")]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_a_planted_half_is_reported_as_a_half(tmp_path):
    found = cells(report.markdown(planted_stories(tmp_path / "stories.jsonl")))
    title = "above vanilla at equal perplexity [95 %]"
    row = found["rls β 0.5"]
    vanilla = dict(x=[2.2255, 2.7183, 3.3201], y=[2.6, 3.0, 3.4])
    x = 3.0042                                          # e^1.1, between the last two points
    base = 3.0 + 0.4 * (x - vanilla["x"][1]) / (vanilla["x"][2] - vanilla["x"][1])
    assert row[title] == f"+{3.7 - base:.2f} [+{3.7 - base:.2f}, +{3.7 - base:.2f}]"
    assert row["perplexity"] == "3.00" and row["Vendi q=1 [95 %]"].startswith("4.15 [")
    assert (row["Vendi q=∞"], row["cosine"], row["distinct-2"], row["self-BLEU"]) == (
        "2.25", "0.125", "0.500", "0.062")
    assert (row["KL, nats"], row["moved %"]) == ("0.250", "12.5")
    assert row["loss last 10 / running mean"] == "20.0 / 30.5"
    assert row["ms per step (s)"] == "50.0 (2)"         # four units of half a second and 10 steps
    assert found["vanilla T 1"][title] == "–" and found["vanilla T 1"]["KL, nats"] == "–"
    assert found["far β 9 (seed 41)"][title] == "outside" and "cut short" not in " ".join(found)
    below = cells(report.markdown(planted_stories(tmp_path / "x.jsonl", lift=-0.5)))["rls β 0.5"][title]
    assert below == f"−{base - 2.7:.2f} [−{base - 2.7:.2f}, −{base - 2.7:.2f}]"


def test_at_a_point_of_the_curve_the_planted_lift_is_shown_exactly(tmp_path):
    path = planted_stories(tmp_path / "stories.jsonl")
    header, rows = report.rows_of(path)
    at = next(r for r in rows if r.name == "vanilla T 0.9")
    higher = dict(vendi1=[v + 0.5 for v in at.per_prompt["vendi1"]])
    lifted = dataclasses.replace(at, name="x", knobs=dict(name="x", method="esamp"),
                                 per_prompt=at.per_prompt | higher)
    assert report.above(lifted, report.frontier(rows)) == "+0.50 [+0.50, +0.50]"


def test_countdown_is_against_vanillas_best_for_each_column(tmp_path):
    found = cells(report.markdown(planted_countdown(tmp_path / "countdown.jsonl")))
    cold, hot, new = found["vanilla T 0.8"], found["vanilla T 1"], found["new β 1"]
    assert (cold["pass@1"], cold["pass@4"], cold["distinct correct"]) == ("43.8", "75.0", "1.25")
    assert (hot["pass@1"], hot["pass@4"], hot["distinct correct"]) == ("21.9", "87.5", "0.88")
    assert (new["pass@1"], new["pass@4"]) == ("68.8", "87.5")       # pass@4 of the mean count would be 100
    assert cold["pass@1 − vanilla's best [95 %]"] == "best" == hot["pass@4 − vanilla's best [95 %]"]
    assert new["pass@1 − vanilla's best [95 %]"].startswith("+25.0 [")
    assert new["pass@4 − vanilla's best [95 %]"].startswith("+0.0 [")
    assert new["distinct − vanilla's best [95 %]"].startswith("+0.50 [")
    text = report.markdown(tmp_path / "countdown.jsonl")
    assert 'pass@k is "k of 4"' in text and "in vanilla's favour" in text


def test_patterns_choose_rows_but_not_rivals(tmp_path):
    path = planted_countdown(tmp_path / "countdown.jsonl")
    found = cells(report.markdown(path, ["new*"]))
    assert list(found) == ["new β 1"] and found == {
        "new β 1": cells(report.markdown(path))["new β 1"]}


def page_of(folder):
    """A page with three blocks, empty as yet, and its results."""
    planted_stories(folder / "stories.jsonl")
    planted_countdown(folder / "countdown.jsonl")
    page = folder / "EXPERIMENTS.md"
    names = ("stories", "countdown", "countdown:new*,*T 1")
    blocks = [f"<!-- table {name} -->\n<!-- end -->\n" for name in names]
    page.write_text("# Title\n\n" + "\nbetween\n\n".join(blocks)
                    + "\n![a figure](experiments/results/stories.svg)\nbehind\n", encoding="utf-8")
    return page


def test_check_sees_one_changed_digit(tmp_path, capsys, monkeypatch):
    page = page_of(tmp_path)
    plotted = []
    monkeypatch.setattr(report, "plot", plotted.append)
    assert report.main(["--check"], page, tmp_path) == 1
    assert "table stories " in capsys.readouterr().out
    assert report.main(["--write"], page, tmp_path) == report.main(["--check"], page, tmp_path) == 0
    text = page.read_text(encoding="utf-8")
    assert plotted == [tmp_path / "stories.jsonl"]
    assert text.startswith("# Title\n\n<!-- table stories -->\n| setting |") and text.endswith("\nbehind\n")
    assert text.count("between") == 2 and text.count("| new β 1 |") == 2
    assert report.main(["--write"], page, tmp_path) == 0 and page.read_text(encoding="utf-8") == text
    wrong = text.rindex("87.5")                         # in the last block
    page.write_text(text[:wrong] + "87.6" + text[wrong + 4:], encoding="utf-8")
    assert report.main(["--check"], page, tmp_path) == 1
    assert "table countdown:new*,*T 1 " in capsys.readouterr().out
    for broken, words in ((text.replace("<!-- end -->", "", 1), None),
                          (text.rpartition("<!-- end -->")[0], "has no end"),
                          (text.replace("table stories", "table other"), "other has no results")):
        page.write_text(broken, encoding="utf-8")
        assert report.main(["--check"], page, tmp_path) == 2
        assert (words or "error") in capsys.readouterr().err


def test_figures_repeat_and_show_every_family(tmp_path):
    pytest.importorskip("matplotlib")
    page_of(tmp_path)
    for name, words in (("stories", ("rls", "vanilla", "perplexity")), ("countdown", ("new", "pass@4, %"))):
        report.plot(tmp_path / f"{name}.jsonl")
        first = (tmp_path / f"{name}.svg").read_bytes()
        assert xml.etree.ElementTree.fromstring(first).tag.endswith("svg")
        assert all(f"<!-- {word} -->" in first.decode() for word in words)
        assert (tmp_path / f"{name}.png").read_bytes()[1:4] == b"PNG"
    report.plot(tmp_path / "countdown.jsonl")
    assert (tmp_path / "countdown.svg").read_bytes() == first


@pytest.mark.skipif(not report.PAGE.is_file(), reason="EXPERIMENTS.md is not there")
def test_the_page_is_what_the_results_say():
    assert report.check(report.PAGE, ROOT / "experiments" / "results") is None


def test_the_readme_and_the_page_quote_their_tables():
    """Every difference in the prose, with its interval, is a cell of a table made from the results."""
    page = report.PAGE.read_text(encoding="utf-8")
    tables = "".join(content for _, _, content in report.BLOCK.findall(page))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = readme.split("## What it does to samples")[1].split("\n## ")[0]
    prose = " ".join((readme + report.BLOCK.sub("", page)).split())
    quoted = re.findall(r"[+−]\d+\.\d+ \[[+−][\d.]+, [+−][\d.]+\]", prose)
    assert len(quoted) >= 8
    assert [q for q in quoted if f"| {q} |" not in tables] == []
