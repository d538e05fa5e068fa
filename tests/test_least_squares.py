"""The closed-form Distiller: it is ridge regression at every step, and stays it."""

import dataclasses

import pytest
import torch
from conftest import TINY, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from decode import ESampConfig, SamplingConfig, generate
from distiller import DistillerConfig, LeastSquares, make_distiller

PROMPTS, EOS = [[1, 2, 3, 4, 5], [9, 8], [7, 7, 7, 30, 2, 2, 1]], {4, 11, 12}
SHORT = SamplingConfig(n=3, max_new_tokens=12, seed=5)
P, K, D = 3, 5, 7
CONFIG = DistillerConfig(kind="rls", width=6, ridge=0.3, seed=4)
STRONG = ESampConfig(kind="rls", beta=1.5, width=16)


def pairs(seed, rows=K, distillers=P, width=D):
    """Random (h¹, h^L, live) in fp64; live is ragged and may be empty for a Distiller."""
    g = torch.Generator().manual_seed(seed)
    shallow, deep = (torch.randn(distillers, rows, width, generator=g, dtype=torch.float64) for _ in range(2))
    return shallow, 5 * deep, torch.rand(distillers, rows, generator=g) < 0.6


def fresh(config=CONFIG, dtype=torch.float64):
    """P Distillers of width D."""
    return LeastSquares(config, P, D, dtype=dtype)


def ridge_regression(distiller, taps, p, ridge):
    """W of Distiller p from all its live pairs at once, by the normal equations."""
    F = torch.cat([distiller.features(shallow)[p][live[p]] for shallow, _, live in taps])
    Y = torch.cat([deep[p][live[p]] for _, deep, live in taps])
    return torch.linalg.solve(F.mT @ F + ridge * torch.eye(F.shape[1], dtype=F.dtype), F.mT @ Y)


@given(st.integers(0, 999), st.sampled_from([1e-3, 0.3, 20.0]), st.sampled_from([1, 4, 40]))
@settings(max_examples=30)
def test_after_every_step_it_is_ridge_regression_on_all_pairs_so_far(seed, ridge, rows):
    distiller, taps = fresh(dataclasses.replace(CONFIG, ridge=ridge)), []
    for step in range(7):
        taps.append(pairs(1000 * seed + step, rows))
        distiller.train(*taps[-1])
        for p in range(P):
            expected = ridge_regression(distiller, taps, p, ridge)
            torch.testing.assert_close(distiller.weight_PFD[p], expected, rtol=1e-7, atol=1e-7)
    assert distiller.step_P.tolist() == [sum(bool(live[p].any()) for *_, live in taps) for p in range(P)]


def test_the_features_are_what_they_are_said_to_be():
    distiller = fresh()
    shallow = pairs(0)[0]
    for p in range(P):
        for k in range(K):
            x = shallow[p, k] / shallow[p, k].square().mean().sqrt()
            gate, up = x @ distiller.gate_DR, x @ distiller.up_DR
            parts = [x @ distiller.project_DC, gate * gate.sigmoid() * up, torch.ones(1, dtype=x.dtype)]
            torch.testing.assert_close(distiller.features(shallow)[p, k], torch.cat(parts), rtol=1e-5,
                                       atol=1e-5)


def test_the_order_of_rows_inside_a_step_and_of_steps_does_not_matter():
    one, other, last = fresh(), fresh(), fresh()
    taps = [pairs(step) for step in range(4)]
    for shallow, deep, live in taps:
        order = torch.randperm(K, generator=torch.Generator().manual_seed(1))
        one.train(shallow, deep, live)
        other.train(shallow[:, order], deep[:, order], live[:, order])
    for tap in reversed(taps):
        last.train(*tap)
    last.train(*(torch.cat(x, dim=1)[:, :0] for x in zip(*taps, strict=True)))          # no row at all
    torch.testing.assert_close(one.weight_PFD, other.weight_PFD)
    torch.testing.assert_close(one.weight_PFD, last.weight_PFD)
    whole = fresh()
    whole.train(*(torch.cat(x, dim=1) for x in zip(*taps, strict=True)))                # all steps as one
    torch.testing.assert_close(one.weight_PFD, whole.weight_PFD)


def test_the_covariance_is_a_square_and_right_after_ten_thousand_fp32_steps():
    """U Uᵀ can not lose its sign; beside the fp64 inverse of ridge + ΣFᵀF it keeps its digits."""
    width, rows = 12, 4
    distiller = LeastSquares(DistillerConfig(kind="rls", width=20, ridge=1.0), 1, width)
    g = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -2, width)                 # some directions are hardly ever seen
    shallow = torch.randn(1, 10_000 * rows, width, generator=g) * scale
    deep, live = torch.randn(1, 10_000 * rows, width, generator=g), torch.ones(1, rows).bool()
    for each in zip(shallow.split(rows, dim=1), deep.split(rows, dim=1), strict=True):
        distiller.train(*each, live)
    F = distiller.features(shallow)[0].double()
    exact = torch.linalg.eigvalsh(torch.linalg.inv(F.mT @ F + torch.eye(F.shape[1], dtype=F.dtype)))
    eigenvalues = torch.linalg.svdvals(distiller.root_PFF[0].double()).square().flip(0)     # those of U Uᵀ
    assert eigenvalues.min() > 0 and exact.max() / exact.min() > 1e3
    torch.testing.assert_close(eigenvalues, exact, rtol=1e-3, atol=0)


def test_a_dead_row_an_idle_distiller_and_a_neighbour_change_nothing():
    one, other = fresh(), fresh()
    for step in range(4):
        shallow, deep, live = pairs(step)
        live[1] = step == 0
        before = [x.clone() for x in one.state()]
        one.train(shallow, deep, live)
        if step:
            assert all(torch.equal(a[1], b[1]) for a, b in zip(before, one.state(), strict=True))
        noise_shallow, noise_deep, _ = pairs(100 + step)
        keep = live[..., None] & torch.tensor([True, True, False])[:, None, None]
        other.train(torch.where(keep, shallow, torch.where(live[..., None], noise_shallow, torch.nan)),
                    torch.where(keep, deep, torch.where(live[..., None], noise_deep, torch.inf)), live)
    for mine, theirs in zip(one.state(), other.state(), strict=True):
        assert torch.equal(mine[:2], theirs[:2])
    assert not torch.equal(one.weight_PFD[2], other.weight_PFD[2])


def test_forgetting_is_regression_with_weights_that_decay():
    """After t more updates of a Distiller a pair weighs forget^t, and so does the ridge; idle ones wait."""
    distiller, taps = fresh(dataclasses.replace(CONFIG, forget=0.7)), []
    for step in range(5):
        shallow, deep, live = pairs(step)
        live[1] = live[1] & (step in (0, 3))
        before = [x.clone() for x in distiller.state()]
        distiller.train(shallow, deep, live)
        if not live[1].any():
            assert all(torch.equal(a[1], b[1]) for a, b in zip(before, distiller.state(), strict=True))
        taps.append((shallow, deep, live))
    for p in range(P):
        mine = [(distiller.features(x)[p][live[p]], y[p][live[p]]) for x, y, live in taps if live[p].any()]
        age = [0.7 ** (len(mine) - 1 - i) for i in range(len(mine))]
        gram = sum(w * F.mT @ F for w, (F, _) in zip(age, mine, strict=True))
        gram = gram + 0.3 * 0.7 ** len(mine) * torch.eye(len(gram), dtype=gram.dtype)
        found = torch.linalg.solve(gram, sum(w * F.mT @ Y for w, (F, Y) in zip(age, mine, strict=True)))
        torch.testing.assert_close(distiller.weight_PFD[p], found, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("rows", [4, 14, 60])
def test_seen_pairs_are_met_while_independent_and_least_squares_beyond(rows):
    """7 + 6 + 1 = 14 features: up to 14 independent rows the residual goes to zero with the ridge."""
    shallow, deep, _ = pairs(3, rows)
    live, residual = torch.ones(P, rows, dtype=torch.bool), []
    for ridge in (1e-2, 1e-6, 1e-9):
        distiller = fresh(dataclasses.replace(CONFIG, ridge=ridge))
        for k in range(rows):
            distiller.train(shallow[:, k:k + 1], deep[:, k:k + 1], live[:, :1])
        residual.append(float((distiller.predict(shallow) - deep).norm()))
    F = distiller.features(shallow)
    if rows <= 14:
        assert residual[0] > 50 * residual[1] and residual[2] < 1e-3
    else:
        best = torch.linalg.lstsq(F, deep).solution
        torch.testing.assert_close(distiller.predict(shallow), F @ best, rtol=1e-4, atol=1e-4)
        assert residual[2] > 1


def test_the_loss_it_returns_is_that_before_the_update():
    distiller = fresh()
    distiller.train(*pairs(0))
    shallow, deep, live = pairs(1)
    error = (deep - distiller.predict(shallow)).square().sum(-1)
    expected = torch.stack([error[p][live[p]].mean() if live[p].any() else torch.zeros(()).double()
                            for p in range(P)])
    torch.testing.assert_close(distiller.train(shallow, deep, live), expected)


def test_some_leave_and_come_home():
    whole, both, index = fresh(), fresh(), torch.tensor([2, 1])
    taps, live = [pairs(step) for step in range(2)], torch.ones(P, K, dtype=torch.bool)
    for distiller in (whole, both):
        distiller.train(*taps[0][:2], live)
    some = whole.take(index)
    some.train(taps[1][0][index], taps[1][1][index], live[index])
    whole.put(index, some)
    both.train(*taps[1][:2], live & torch.tensor([[False], [True], [True]]))
    for mine, theirs in zip(whole.state(), both.state(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_at_a_large_width_the_linear_part_is_a_projection():
    small, large = (make_distiller(DistillerConfig(kind="rls", width=32), 1, D) for D in (16, 512))
    assert torch.equal(small.project_DC, torch.eye(16)) and large.project_DC.shape == (512, 64)
    assert small.root_PFF.shape[1:] == (16 + 32 + 1,) * 2 and large.weight_PFD.shape == (1, 64 + 32 + 1, 512)
    for distiller, width in ((small, 16), (large, 512)):
        held = sum(x.nbytes for x in distiller.state()) - distiller.step_P.nbytes
        assert distiller.config.bytes(width) == held


@pytest.mark.parametrize("scope", ["prompt", "batch"])
def test_a_warm_start_is_a_step_on_the_prompts_own_pairs(tiny, scope):
    sampling = dataclasses.replace(SHORT, max_new_tokens=1)          # only the prefill: no step trains
    esamp = dataclasses.replace(STRONG, scope=scope, warm=True)
    held = generate(tiny, PROMPTS, sampling, esamp, eos_ids=EOS).distillers
    cold = generate(tiny, PROMPTS, sampling, dataclasses.replace(esamp, warm=False), eos_ids=EOS).distillers
    assert not cold.weight_PFD.any() and dataclasses.replace(esamp, warm=None).starts_warm
    assert not ESampConfig().starts_warm                 # the paper does not train on the prompt
    oracle = make_distiller(esamp, len(held.step_P), 24)
    for p, prompt in enumerate(PROMPTS):
        shallow = tiny.lower(torch.tensor([prompt]))
        deep, live = tiny.upper(shallow), torch.zeros(len(held.step_P), len(prompt), dtype=torch.bool)
        live[p if scope == "prompt" else 0] = True
        oracle.train(*(x.expand(len(live), -1, -1) for x in (shallow, deep)), live)
    torch.testing.assert_close(held.weight_PFD, oracle.weight_PFD, rtol=1e-3, atol=1e-4)


def test_bf16_runs_with_an_fp32_distiller():
    model = random_model(TINY).to(torch.bfloat16)
    result = generate(model, PROMPTS, SHORT, STRONG, eos_ids=EOS)
    assert {x.dtype for x in result.distillers.state()} == {torch.float32, torch.int64}
    assert result.stats.moved > 0
