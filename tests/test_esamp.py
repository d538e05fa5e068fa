"""The equations: as properties, against a plain-Python float64 oracle, and against known answers."""

import doctest
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import esamp
from esamp import divergence, draw, keep_mask, mix_hidden, novelty, reweight, uniform

seeds = st.integers(0, 2 ** 32 - 1)
betas = st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, 3.0])
temperatures = st.sampled_from([0.0, 0.3, 1.0, 1.7])
tied_logits = st.lists(st.integers(-12, 12).map(lambda i: i / 4), min_size=2, max_size=23)


def logits(seed, B=3, V=17, scale=3.0):
    """Two random float64 (B, V) logits."""
    g = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(B, V, generator=g, dtype=torch.float64) for _ in range(2)]


def test_the_worked_step_in_the_docstring():
    results = doctest.testmod(esamp)
    assert results.attempted >= 9 and not results.failed


# ------------------------------------------------------------------------------
# keep_mask
# ------------------------------------------------------------------------------

def keep_oracle(row, temperature, top_k, top_p, min_p):
    """METHOD of the filters, one token at a time, in Python floats; None where a sum is too close to call."""
    T = temperature or 1.0
    order = sorted(range(len(row)), key=lambda z: (-row[z], z))
    weight = [math.exp((row[z] - row[order[0]]) / T) for z in order]
    left = len(order) if top_k is None else min(top_k, len(order))
    if top_p is not None and top_p < 1:
        total, before, kept = sum(weight[:left]), 0.0, 0
        for w in weight[:left]:
            if abs(before - top_p * total) < 1e-9:
                return None
            kept += before < top_p * total
            before += w
        left = kept
    kept = order[:left]
    if min_p is not None:
        if any(abs(w - min_p) < 1e-9 and w != min_p for w in weight):
            return None
        kept = [z for z, w in zip(order[:left], weight, strict=False) if w >= min_p]
    return sorted(set(kept) | {order[0]})


@given(tied_logits, temperatures, st.none() | st.integers(1, 30), st.none() | st.floats(0.01, 1.0),
       st.none() | st.floats(0.0, 1.0))
def test_keep_mask_equals_the_oracle_ties_included(row, temperature, top_k, top_p, min_p):
    expected = keep_oracle(row, temperature, top_k, top_p, min_p)
    assume(expected is not None)
    other = [x + 1 for x in reversed(row)]               # a second row that must not leak into the first
    keep_BV = keep_mask(torch.tensor([row, other], dtype=torch.float64), temperature, top_k, top_p, min_p)
    assert keep_BV[0].nonzero()[:, 0].tolist() == expected


def test_filters_work_in_their_order_each_on_the_last_ones_survivors():
    T, F = True, False
    ref = torch.tensor([[4.0, 3.0, 2.0, 1.0]], dtype=torch.float64).mul(math.log(2))  # weights 8 : 4 : 2 : 1
    assert keep_mask(ref, 1.0, top_k=2).tolist() == [[T, T, F, F]]
    assert keep_mask(ref, 1.0, top_p=0.79).tolist() == [[T, T, F, F]]                 # 8/15 < .79 < 12/15
    assert keep_mask(ref, 1.0, top_p=0.81).tolist() == [[T, T, T, F]]
    assert keep_mask(ref, 1.0, top_k=3, top_p=0.81).tolist() == [[T, T, F, F]]        # now 12/14 ≥ .81
    assert keep_mask(ref, 1.0, min_p=0.4).tolist() == [[T, T, F, F]]
    assert keep_mask(ref, 0.5, min_p=0.4).tolist() == [[T, F, F, F]]                  # T = ½: weights square
    assert keep_mask(ref, 0.0, min_p=0.4).tolist() == keep_mask(ref, 1.0, min_p=0.4).tolist()


@given(seeds, temperatures, st.floats(0.001, 1.0), st.floats(0.0, 1.0), st.integers(1, 20))
def test_the_largest_token_always_survives_and_equal_ones_fall_to_the_lower_id(seed, T, top_p, min_p, top_k):
    ref, _ = logits(seed)
    ref = ref.round()
    keep = keep_mask(ref, T, top_k, top_p, min_p)
    assert keep.gather(-1, ref.argmax(-1, keepdim=True)).all()
    assert (keep.sum(-1) <= top_k).all()
    half = keep_mask(torch.zeros(1, 4), T, top_p=0.5)    # exactly half of the probability is enough
    assert half.tolist() == [[True, True, False, False]]
    flat = keep_mask(torch.zeros(2, 9), T, top_k=4)
    assert flat.tolist() == [[True] * 4 + [False] * 5] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keep_mask_survives_extreme_logits_and_temperatures(dtype):
    ref = torch.tensor([[6e4, -6e4, 0.0, 6e4], [-6e4, -6e4, -6e4, -6e4]]).to(dtype)
    for T in (1e-300, 1e-46, 1e-30, 1e-3, 1.0, 1e6, 1e39, 1e300):
        keep = keep_mask(ref, T, top_p=0.9, min_p=0.01)
        assert keep[0].tolist()[1] is (T >= 1e6) and keep[0, 0]
        assert keep[1].sum() == 4                       # 0.9 of four equal ones needs all four
    assert keep_mask(ref, 1.0).all()


# ------------------------------------------------------------------------------
# reweight, mix_hidden, novelty
# ------------------------------------------------------------------------------

@given(seeds, betas)
def test_beta_zero_and_a_perfect_prediction_are_vanilla(seed, beta):
    ref, dist = logits(seed)
    assert torch.equal(reweight(ref.float(), dist.float(), 0.0), ref.float())
    torch.testing.assert_close(reweight(ref, ref, beta), ref, rtol=0, atol=1e-13)
    hidden, other = logits(seed, V=6)
    assert torch.equal(mix_hidden(hidden.float(), other.float(), 0.0), hidden.float())


@given(seeds, betas)
def test_equations_7_8_9_and_mix_hidden_agree(seed, beta):
    g = torch.Generator().manual_seed(seed)
    W, deep, predicted = (torch.randn(*s, generator=g, dtype=torch.float64)
                          for s in ((17, 5), (3, 5), (3, 5)))
    new = reweight(deep @ W.T, predicted @ W.T, beta)
    e = deep - predicted
    torch.testing.assert_close(new, deep @ W.T + beta * (e @ W.T))                           # eq. 8
    torch.testing.assert_close(new, mix_hidden(deep, predicted, beta) @ W.T)
    cosine = torch.nn.functional.cosine_similarity(W[None], e[:, None], dim=-1)
    length = novelty(deep, predicted)[:, None]
    torch.testing.assert_close(new - deep @ W.T, beta * W.norm(dim=-1) * length * cosine)


@given(seeds, betas)
def test_constants_change_nothing_and_permutations_commute(seed, beta):
    ref, dist = logits(seed)
    shift = torch.tensor([[3.0], [-2.0], [50.0]], dtype=torch.float64)
    plain = reweight(ref, dist, beta).softmax(-1)
    torch.testing.assert_close(reweight(ref + shift, dist - 2 * shift, beta).softmax(-1), plain)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(seed))
    keep = keep_mask(ref, 1.0, top_k=9, top_p=0.95)
    permuted = keep_mask(ref[:, order], 1.0, top_k=9, top_p=0.95)
    assert torch.equal(permuted, keep[:, order])         # no ties: ids do not matter
    assert torch.equal(reweight(ref[:, order], dist[:, order], beta, keep[:, order]),
                       reweight(ref, dist, beta, keep)[:, order])


@given(seeds, betas, st.integers(1, 17))
def test_masked_tokens_stay_out_whatever_their_logits(seed, beta, top_k):
    ref, dist = logits(seed)
    ref[0, 3] = -torch.inf                               # already banned by the LLM, and by the Distiller
    dist[0, 3] = -torch.inf
    keep = keep_mask(ref, 1.0, top_k=min(top_k, 16))
    new = reweight(ref, dist, beta, keep)
    assert new[~keep].eq(-torch.inf).all() and new[keep].isfinite().all()


def objective(pi, pi_ref, r, beta):
    """J(π) = E_π[r] − KL(π ‖ π_ref)/β (eq. 1, α = 1/β)."""
    return (pi * r).sum(-1) - (pi * (pi.log() - pi_ref.log())).sum(-1) / beta


@given(seeds, st.sampled_from([0.1, 0.25, 1.0, 3.0]), st.floats(1e-3, 2.0))
def test_pi_new_maximises_the_objective_among_rivals(seed, beta, size):
    ref, dist = logits(seed)
    r = ref.log_softmax(-1) - dist.log_softmax(-1)
    best = reweight(ref, dist, beta).softmax(-1)
    rivals = (reweight(ref, dist, beta) + size * logits(seed + 1)[0]).softmax(-1)
    gap = objective(best, ref.softmax(-1), r, beta) - objective(rivals, ref.softmax(-1), r, beta)
    assert (gap > 0).all()


@given(seeds)
def test_expected_novelty_rises_with_beta(seed):
    ref, dist = logits(seed)
    r = ref.log_softmax(-1) - dist.log_softmax(-1)
    values = [(reweight(ref, dist, beta).softmax(-1) * r).sum(-1) for beta in (0.0, 0.1, 0.25, 0.5, 1.0)]
    assert all((b > a).all() for a, b in zip(values, values[1:], strict=False))


def test_a_constant_distiller_is_vanilla_at_a_lower_temperature():
    ref, _ = logits(1)
    new = reweight(ref, torch.full_like(ref, 7.0), 0.25)
    torch.testing.assert_close(new.softmax(-1), (ref / 0.8).softmax(-1))


@given(seeds, betas, st.sampled_from([0.3, 1.0, 1.7]))
def test_divergence_is_the_textbook_sum(seed, beta, T):
    ref, dist = logits(seed)
    keep = keep_mask(ref, T, top_k=7)
    new, plain = reweight(ref, dist, beta, keep), ref.masked_fill(~keep, -torch.inf)
    kl, tv = divergence(new, plain, T)
    for b in range(3):
        p = [math.exp(x / T) for x in new[b].tolist()]
        q = [math.exp(x / T) for x in plain[b].tolist()]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        pairs = list(zip(p, q, strict=True))
        assert kl[b].item() == pytest.approx(sum(x * math.log(x / y) for x, y in pairs if x), abs=1e-12)
        assert tv[b].item() == pytest.approx(sum(abs(x - y) for x, y in pairs) / 2, abs=1e-12)
    for T in (1e-300, 1e39, 1e300):
        row = torch.tensor([[1.0, -torch.inf, 2.0]])
        kl, tv = divergence(row, row, T)
        assert kl.tolist() == [0] and tv.tolist() == [0]
    kl, tv = divergence(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([[0.0, 5.0], [0.0, 5.0]]), 0)
    assert kl.tolist() == [0, math.inf] and tv.tolist() == [0, 1]


# ------------------------------------------------------------------------------
# draw and uniform
# ------------------------------------------------------------------------------

@given(tied_logits, st.floats(0, 1, exclude_max=True), st.sampled_from([0.3, 1.0, 1.7]))
def test_draw_is_the_first_token_whose_cdf_exceeds_u(row, u, T):
    top = max(row)
    weight, running, cdf = [math.exp((x - top) / T) for x in row], 0.0, []
    for w in weight:
        running += w
        cdf.append(running)
    assume(all(abs(c - u * cdf[-1]) > 1e-9 for c in cdf[:-1]))
    expected = next(z for z, c in enumerate(cdf) if c > u * cdf[-1])
    logits_BV = torch.tensor([row, row], dtype=torch.float64)
    assert draw(logits_BV, torch.tensor([u, 0.0], dtype=torch.float64), T)[0] == expected


def test_draw_follows_softmax():
    """χ² over 13 tokens and 2¹⁸ draws; a correct `draw` with fresh noise would fail once in a million."""
    count, T = 2 ** 18, 1.3
    row = logits(5, B=1, V=13, scale=1.0)[0][0]
    row[4] = -torch.inf
    index = torch.arange(count)
    drawn = draw(row.expand(count, -1), uniform(3, index // 64, index % 64, 5), T)
    expected = count * (row / T).softmax(-1)
    seen = torch.bincount(drawn, minlength=13).double()
    assert seen[4] == 0
    chi2 = ((seen - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    assert torch.special.gammaincc(torch.tensor(11 / 2, dtype=torch.float64), chi2 / 2) > 1e-6


def test_draw_at_the_edges():
    V, last = 5, torch.tensor([1 - 2.0 ** -53] * 3, dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    for row in ([0.0] * V, [-torch.inf, 3.0, -torch.inf, 3.0, -torch.inf], [1e4, -1e4, 1e4, 0.0, -torch.inf]):
        alive = [z for z, x in enumerate(row) if x > max(row) - 700]
        x = torch.tensor([row] * 3)
        assert draw(x, zero, 1.0).tolist() == alive[:1] * 3 and draw(x, last, 1.0).tolist() == alive[-1:] * 3
        assert draw(x, last, 0.0).tolist() == [row.index(max(row))] * 3    # T = 0: lowest id among equals
        assert draw(x, last, 1e-300).tolist() == [[z for z, v in enumerate(row) if v == max(row)][-1]] * 3
    assert 0 <= draw(torch.full((1, V), torch.nan), zero[:1], 1.0).item() < V


def test_uniform_known_answers_and_an_unbounded_integer_oracle():
    def mix(x, mask=2 ** 64 - 1):
        x = x + 0x9E3779B97F4A7C15 & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31
    assert len(esamp.KNOWN_UNIFORMS) == 20
    for keys, answer in esamp.KNOWN_UNIFORMS:
        h = 0
        for k in keys:
            h = mix(h ^ k)
        assert h >> 11 == answer
        seed, prompt, sample, step = keys
        assert uniform(seed, torch.tensor([prompt]), torch.tensor([sample]), step).item() == answer / 2 ** 53


@given(st.integers(0, 2 ** 63 - 1), st.integers(0, 10 ** 6), st.integers(0, 5000))
def test_uniform_of_a_row_does_not_depend_on_its_batch(seed, prompt, step):
    rows = torch.arange(12)
    u = uniform(seed, prompt + rows // 4, rows % 4, step)
    assert u.dtype == torch.float64 and (0 <= u).all() and (u < 1).all() and len(set(u.tolist())) == 12
    alone = uniform(seed, torch.tensor([prompt + 1]), torch.tensor([2]), torch.tensor(step))
    assert alone.item() == u[6].item()


def test_uniform_is_equidistributed_along_every_index_and_uncorrelated_across():
    """χ² over 64 bins of 2¹⁶ numbers, and neighbours' correlation below 5σ: one false alarm in a million."""
    count = 2 ** 16
    index, zero = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    streams = [uniform(0, index, zero, 0), uniform(0, zero, index, 0), uniform(0, zero, zero, index),
               uniform(9, index // 256, index % 256, 3), uniform(index, zero, zero, 0)]
    for u in streams:
        chi2 = ((torch.histc(u, 64, 0, 1) - count / 64) ** 2 / (count / 64)).sum()
        assert torch.special.gammaincc(torch.tensor(63 / 2, dtype=torch.float64), chi2 / 2) > 1e-6
        assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 5 / math.sqrt(count)
    across = torch.corrcoef(torch.stack(streams)) - torch.eye(5)
    assert across.abs().max() < 5 / math.sqrt(count)
