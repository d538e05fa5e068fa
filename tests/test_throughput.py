"""The harness and the cost model: what they count, what they refuse, and that a no-op fails."""

import dataclasses
import json

import pytest
import torch
from conftest import ROOT, TINY, random_model

from decode import ESampConfig, SamplingConfig, generate
from distiller import Distiller, DistillerConfig, LeastSquares
from experiments import cost_model, distiller_cost, throughput
from model import KVCache

MACHINE = dict(bandwidth=4e12, rate=7e14, fp32_rate=4e13)


def test_bytes_of_a_vanilla_step_are_the_models():
    model = random_model(dataclasses.replace(TINY, model_type="llama", tie_word_embeddings=True))
    held = sum(p.numel() for name, p in model.named_parameters() if "norm" not in name)
    cache = KVCache(model.config, 5, 11, "cpu", torch.float32)
    found = cost_model.vanilla_cost(model.config, 5, 11, itemsize=4)
    assert found.bytes == 4 * held + cache.k_NBGME.nbytes + cache.v_NBGME.nbytes
    assert found.operations > 2 * 5 * held


def test_real_shapes_have_their_known_sizes():
    sizes = {"qwen2.5-0.5b": 0.494e9, "qwen2.5-7b": 7.07e9, "qwen3-8b": 7.57e9, "llama-3.1-8b": 7.50e9}
    for name, known in sizes.items():                    # without the embedding, where it is not the head
        found = cost_model.vanilla_cost(cost_model.shape(name), 1, 0, 1).bytes
        assert found == pytest.approx(known, rel=0.01)


def test_a_distillers_weights_and_what_eight_billion_parameters_need():
    config = cost_model.shape("qwen3-8b")
    held = sum(p.numel() for p in Distiller(ESampConfig(width=16), 3, 24).parameters())
    tiny = cost_model.distiller_cost(TINY, 3, 6, width=16)
    assert tiny.bytes == pytest.approx(held * (cost_model.PREDICT_BYTES + cost_model.TRAIN_BYTES))
    assert tiny.operations == 6 * held / 3 * 8
    assert round(ESampConfig().bytes(config.hidden_size) / 1e6) == 151        # the paper promises under 200


def test_the_bound_is_bytes_over_bytes_where_memory_is_the_limit():
    config = cost_model.shape("qwen3-8b")
    vanilla_s, both_s, most = cost_model.bound(config, 1, 1, 256, **MACHINE)
    v = cost_model.vanilla_cost(config, 1, 256).bytes
    d = cost_model.distiller_cost(config, 1, 1).bytes
    assert most == pytest.approx(v / (v + d))
    assert vanilla_s == v / 4e12 and both_s == pytest.approx((v + d) / 4e12)
    bounds = [cost_model.bound(config, 32, 1, 256, train_every=u, **MACHINE)[2] for u in (1, 8, 64)]
    assert bounds == sorted(bounds) and bounds[0] < 0.6
    shared = cost_model.bound(config, 32, 1, 256, "batch", **MACHINE)[2]
    assert shared > bounds[-1]
    serial = cost_model.bound(config, 32, 16, 256, "batch", overlap=False, **MACHINE)[2]
    assert serial < cost_model.bound(config, 32, 16, 256, "batch", **MACHINE)[2] <= 1


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A short run of the harness on the bundled checkpoint: (what it printed, its JSON's path)."""
    out = tmp_path_factory.mktemp("throughput") / "report.json"
    variants = ["vanilla", "ESamp, scope batch", "ESamp, per prompt", "ESamp, recorded"]
    folder = str(ROOT / "checkpoints" / "countdown")
    assert throughput.main(["--model", folder, "--scenario", "2x6", "--rounds", "1", "--device", "cpu",
                            "--min-p", "0.001", "--variants", *variants, "--out", str(out)]) == 0
    return out


def test_the_harness_reports_ratios_with_proof_of_work(report):
    case, = json.loads(report.read_text())["cases"]
    assert case["survivors"][0] >= 1 and case["variants"]["vanilla"]["ratio"] == [1, 1, 1]
    for name, run in case["variants"].items():
        low, middle, high = run["ratio"]
        assert 0 < low <= middle <= high and run["tok_s"] > 0
        if name != "vanilla":
            assert 0 < run["bound"] < 1 and run["failed"] is None
            assert run["proof"]["updates"] > 10 and run["proof"]["samples_changed"] > 0
            assert 6 < run["proof"]["rows_trained_per_step"] <= 12
    both = json.loads(report.read_text())
    shown = "\n".join(throughput.table(both))
    assert "2×6" in shown and "updates, loss" in shown and "FAILED" not in shown


def test_a_report_can_be_shown_again(report, tmp_path, capsys):
    assert throughput.main(["--read", str(report)]) == 0
    assert capsys.readouterr().out.count("updates, loss") == 3
    pytest.importorskip("matplotlib")
    assert throughput.main(["--read", str(report), "--plot", str(tmp_path / "ratios.svg")]) == 0
    assert (tmp_path / "ratios.svg").stat().st_size > 1000


def test_the_cost_model_checks_a_report(report, tmp_path, capsys):
    both = json.loads(report.read_text())
    for run in both["cases"][0]["variants"].values():
        if "bound" in run:
            run["bound"] = run["ratio"][1] * 1.1
    near = tmp_path / "near.json"
    near.write_text(json.dumps(both))
    assert cost_model.main(["--check", str(near)]) == 0
    both["cases"][0]["variants"]["ESamp, recorded"]["bound"] *= 2
    near.write_text(json.dumps(both))
    assert cost_model.main(["--check", str(near)]) == 1
    assert capsys.readouterr().out.count("measured") == 6


def test_a_distiller_that_did_nothing_is_no_result():
    model, sampling = random_model(TINY), SamplingConfig(n=3, max_new_tokens=9)
    prompts = [[1, 2], [3]]
    vanilla = generate(model, prompts, sampling, eos_ids=set())
    idle = generate(model, prompts, sampling, ESampConfig(beta=0.0, width=8), eos_ids=set())
    assert throughput.proof(idle, vanilla, ESampConfig(), 2)[1] == "every sample is vanilla's"
    late = ESampConfig(beta=1.0, width=8, train_every=50)
    never = generate(model, prompts, sampling, dataclasses.replace(late, train_every=8), eos_ids=set())
    assert throughput.proof(never, vanilla, dataclasses.replace(late, train_every=8), 2)[1] is None
    never.stats.updates = 0
    found = throughput.proof(never, vanilla, dataclasses.replace(late, train_every=8), 2)
    assert found[1] == "0 updates in 8 steps"


@pytest.mark.parametrize("argv,words", [(["--rounds", "0"], "--rounds must be"),
                                        (["--model", "no/where"], "does not exist")])
def test_bad_input_is_one_line(argv, words, capsys):
    assert throughput.main([*argv, "--device", "cpu"]) == 2
    assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        throughput.main(["--scenario", "3by4"])
    assert "prompts x samples" in capsys.readouterr().err
    assert cost_model.main(["--shape", "no/where"]) == 2


def test_the_cost_model_answers_in_one_line_and_in_a_table(capsys, tmp_path):
    assert cost_model.main(["--shape", "qwen3-8b", "--prompts", "32"]) == 0
    assert "at most 0." in capsys.readouterr().out
    assert cost_model.main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 20
    pytest.importorskip("matplotlib")
    assert cost_model.main(["--plot", str(tmp_path / "cost.svg")]) == 0
    assert (tmp_path / "cost.svg").stat().st_size > 1000


@pytest.mark.slow
def test_transformers_does_the_same_work(tmp_path):
    """Its forward pass is handed our tensors: same weights, every token counted up to its EOS."""
    pytest.importorskip("transformers")
    model = throughput.load(ROOT / "checkpoints" / "countdown")
    work = throughput.work_of(ROOT / "checkpoints" / "countdown", model, 2, 8, 40, None)
    peer, _ = throughput.theirs(model)
    for static in (False, True):
        assert 8 * 2 * 12 < peer(work, static) < 8 * 2 * 30
    config = dataclasses.replace(TINY, max_position_embeddings=80)
    random = throughput.random_model(config, "cpu", torch.float32)
    work = throughput.work_of("qwen3-8b", random, 2, 3, 10, 0.05)
    assert throughput.theirs(random)[0](work, False) == 60


def test_what_a_distiller_costs_is_counted_and_shown(tmp_path, capsys):
    config = DistillerConfig(kind="rls")
    held = LeastSquares(config, 1, 4096)
    F = 64 + 384 + 1
    assert held.root_PFF.shape[1] == F
    fixed = held.gate_DR.numel() + held.up_DR.numel() + held.project_DC.numel()
    assert distiller_cost.moved("rls", 4096, config) == 4 * (
        4 * held.root_PFF.numel() + 4 * held.weight_PFD.numel() + 2 * fixed)
    whole = cost_model.distiller_cost(cost_model.shape("qwen3-8b"), 1, 16).bytes
    assert distiller_cost.moved("swiglu", 4096, DistillerConfig()) == pytest.approx(whole)
    assert round(whole / distiller_cost.moved("rls", 4096, config)) == 7                # the README's seventh
    assert distiller_cost.main(["--widths", "8", "--rows", "3", "--rounds", "1",
                                "--out", str(tmp_path / "cost.json")]) == 0
    report = json.loads((tmp_path / "cost.json").read_text())
    assert capsys.readouterr().out == "\n".join(distiller_cost.table(report)) + "\n"
    assert report["cases"][0]["rls"]["ms"] > 0
    with pytest.raises(SystemExit):
        distiller_cost.main(["--rounds", "0"])


def test_the_pages_costs_are_the_measured_ones():
    page = (ROOT / "EXPERIMENTS.md").read_text(encoding="utf-8")
    shown = page.split("<!-- cost -->\n")[1].split("\n<!-- end cost -->")[0]
    assert shown == "\n".join(distiller_cost.table(json.loads(distiller_cost.RESULT.read_text())))
