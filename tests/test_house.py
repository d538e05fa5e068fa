"""The project keeps its own promises: equation maps, imports, files, and what the README says."""

import ast
import contextlib
import importlib
import io
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import decode
from experiments import cost_model

NESTED = ("work", "upper", "buffer", "weight", "add", "per", "text", "note", "on_step", "tojson",
          "raise_exception", "normal", "solve")
ROOMS = ["esamp", "distiller", "model", "train_async", "decode"]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tree(name):
    """The syntax tree of a room."""
    return ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ROOMS)
def test_the_equation_map_names_things_that_exist(name):
    doc = importlib.import_module(name).__doc__
    names = re.findall(r"`([A-Za-z_][\w.]*)`", doc)
    assert names
    for dotted in names:
        first, *rest = dotted.split(".")
        if first in ROOMS:
            thing = importlib.import_module(first)
        else:
            thing, rest = importlib.import_module(name), [first, *rest]
        for part in rest:
            assert hasattr(thing, part), f"{name}.py names {dotted}"
            thing = getattr(thing, part)


def test_every_equation_of_the_paper_has_a_place():
    doc = importlib.import_module("esamp").__doc__
    for equation in ("1, 2", "3", "4, 5", "6, 7", "8", "9", "10"):
        assert re.search(rf"eq\. +{equation} ", doc), equation


def test_imports_point_one_way():
    allowed = {"esamp": set(), "distiller": set(), "model": set(), "train_async": set(), "decode": set(ROOMS)}
    libraries = {"esamp": {"torch"}, "distiller": {"torch"},
                 "model": {"torch", "safetensors", "huggingface_hub"}, "train_async": {"torch"},
                 "decode": {"torch", "jinja2", "tokenizers", "tqdm"}}
    for name in ROOMS:
        found = set()
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
        assert found & set(ROOMS) <= allowed[name], name
        assert found - set(ROOMS) - sys.stdlib_module_names <= libraries[name], name


def test_only_train_async_says_stream_or_event_in_code():
    for name in set(ROOMS) - {"train_async"}:
        names = {n.attr for n in ast.walk(tree(name)) if isinstance(n, ast.Attribute)}
        words = {"Stream", "Event", "wait_event", "synchronize", "record_stream", "CUDAGraph"}
        assert not names & words, name


def test_the_top_level_files_are_the_five():
    assert {p.stem for p in ROOT.glob("*.py")} == set(ROOMS)


def test_every_public_thing_has_a_docstring_and_lines_fit():
    for name in ROOMS:
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                nested = node.name in NESTED
                assert nested or ast.get_docstring(node), f"{name}.{node.name}"
        longest = max((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines(), key=len)
        assert len(longest) <= 110, f"{name}.py: {longest}"


def test_readme_line_counts_are_true():
    counts = dict(re.findall(r"\| `(\w+)\.py` \| (\d+) \|", README))
    assert counts == {name: str(len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()))
                      for name in ROOMS}
    assert list(counts) == ROOMS                        # and the order is the reading order


def test_readme_flags_are_the_parsers_with_their_defaults():
    table = README.split("## Every flag")[1].split("\n\n")[1]
    cells = [line.split("|") for line in table.splitlines()]
    rows = {flag: cell[2].strip() for cell in cells for flag in re.findall(r"`(--[\w-]+)", cell[1])}
    actions = {o: a for a in decode.build_parser()._actions for o in a.option_strings
               if o.startswith("--") and o != "--help"}
    assert set(rows) == set(actions)
    for flag, action in actions.items():
        if isinstance(action.default, int | float) and not isinstance(action.default, bool):
            assert rows[flag] == str(action.default), flag


def test_readme_python_blocks_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    D, V, K = 8, 11, 4
    space = dict(D=D, W=torch.randn(V, D), h1=torch.randn(1, K, D), hL=torch.randn(1, K, D),
                 live=torch.ones(1, K, dtype=torch.bool))
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 2
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(block, space)
    assert printed.getvalue().count(" stop") >= 12
    assert space["logits"].shape == (K, V) and space["distiller"].step_P.tolist() == [1]
    six = blocks[1].split("\n\n", 1)[1].strip().splitlines()
    assert len([line for line in six if not line.startswith("with")]) <= 6


def test_readme_output_is_real():
    """The quoted lines, from the quoted command; other CPUs round otherwise, so not every line must agree."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert decode.main(["--esamp"]) == 0
    real = printed.getvalue().splitlines()
    quoted = README.split("```text\n")[1].split("```")[0].splitlines()
    samples = [line for line in quoted if line.startswith("   ") and "⋮" not in line and "=" in line[:20]]
    assert len(samples) >= 4 and sum(line in real for line in samples) >= 0.7 * len(samples)
    figures = [re.findall(r"[\d.,]+", line) for text in (quoted, real) for line in text[-6:]]
    words = [re.sub(r"[\d.,]+", "#", line) for text in (quoted, real) for line in text[-6:]]
    assert words[:6] == words[6:]
    loss, updates = float(figures[9][1]), int(figures[9][0])
    assert loss == pytest.approx(float(figures[3][1]), rel=0.02)
    assert updates == pytest.approx(int(figures[3][0]), abs=6)


def test_readme_says_what_a_distiller_weighs():
    claim = re.search(r"takes (\d+) MB beside a model of width (\d+)", README)
    assert round(decode.ESampConfig().bytes(int(claim[2])) / 1e6) == int(claim[1])


def test_readme_ratios_are_the_measured_ones():
    """Each is the median of three runs of the harness, with the smallest and the largest of the three."""
    def runs(name):
        return [json.loads((ROOT / f"experiments/results/{name}_{i}.json").read_text()) for i in (1, 2, 3)]

    def ratio(report, variant):
        return report["cases"][0]["variants"][variant]["ratio"][1]

    def over_peer(report):
        speed = {name: run["tok_s"] for name, run in report["cases"][0]["variants"].items()}
        return speed["vanilla"] / max(v for name, v in speed.items() if name.startswith("transformers"))
    section = README.split("## How fast")[1].split("\n## ")[0]
    for words, values in {
            "64 tokens, min-p 0.05: ESamp": [ratio(r, "ESamp, per prompt") for r in runs("cpu")],
            "with the record": [ratio(r, "ESamp, recorded") for r in runs("cpu")],
            "the same: vanilla": [over_peer(r) for r in runs("cpu")],
            "bundled checkpoint": [over_peer(r) for r in runs("countdown")],
            "loading 1 GB": [r["loading"]["ratio"][1] for r in runs("loading")]}.items():
        low, middle, high = sorted(values)
        line = next(line for line in section.splitlines() if words in line)
        assert f"| {middle:.2f} ({low:.2f}–{high:.2f}) |" in line, (words, values)
    tiny = sorted(ratio(r, "ESamp, per prompt") for r in runs("countdown"))[1]
    assert f"at {tiny:.2f} of" in section.replace("\n", " ")
    for report in runs("cpu") + runs("countdown"):
        assert not any(run.get("failed") for run in report["cases"][0]["variants"].values())
    row = r"\| (\d+)×(\d+)" + 4 * r" \| ([\d.]+)" + r" \|"
    for P, K, *ratios in re.findall(row, section):
        found = [cost_model.bound(cost_model.shape("qwen3-8b"), int(P), int(K), 512, scope, train_every=u,
                                  **cost_model.H200)[2]
                 for scope, u in (("batch", 1), ("prompt", 1), ("prompt", 8), ("prompt", 64))]
        assert [f"{x:.3f}" for x in found] == ratios


def test_requirements_are_what_is_imported():
    text = (ROOT / "requirements.txt").read_text()
    names, imported = set(re.findall(r"^([\w-]+)(?:==|>=)", text, re.M)), set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py"), *ROOT.glob("tests/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    ours = {*ROOMS, "experiments", "conftest", "transformers", "matplotlib"}         # peers, never needed
    numpy = {"numpy"}                                    # which safetensors' writer needs
    assert imported - sys.stdlib_module_names - ours == names - numpy
    assert names == {"torch", "safetensors", "tokenizers", "jinja2", "tqdm", "huggingface_hub", "numpy",
                     "pytest", "hypothesis"}
    assert "torch==2.13.0" in text


def test_ci_runs_the_readmes_own_command():
    script = (ROOT / ".ci" / "run").read_text()
    line = next(line for line in script.splitlines() if line.startswith("command="))
    shown = ["bash", "-c", f'{line}; echo "$command"']
    found = subprocess.run(shown, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.stdout == "pip install -r requirements.txt && pytest\n"
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=False).returncode == 0
