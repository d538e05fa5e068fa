"""The Distiller: its gradient, its Adam against torch's, and that nothing crosses between prompts."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller import Distiller, DistillerConfig, loss

P, K, D = 3, 5, 7
CONFIG = DistillerConfig(width=11, seed=4)


def pairs(seed, rows=K, distillers=P):
    """Random (h¹, h^L, live) in fp64; live is ragged and may be empty for a Distiller."""
    g = torch.Generator().manual_seed(seed)
    shallow, deep = (torch.randn(distillers, rows, D, generator=g, dtype=torch.float64) for _ in range(2))
    return shallow, 5 * deep, torch.rand(distillers, rows, generator=g) < 0.6


def state(distiller):
    """Everything that training may write, cloned, per Distiller on axis 0."""
    tensors = [*distiller.parameters(), *distiller.first, *distiller.second, distiller.step_P]
    return [t.detach().clone() for t in tensors]


class Separate(torch.nn.Module):
    """One Distiller as plain Linear layers, gate and up apart: the paper's E.2 written down independently."""

    def __init__(self, distiller, p):
        super().__init__()
        self.linears = torch.nn.ModuleList()
        for gate_up, down in zip(distiller.gate_up, distiller.down, strict=True):
            for weight in (*gate_up[p].chunk(2), down[p]):
                linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
                linear.weight.data.copy_(weight.data)
                self.linears.append(linear)

    def forward(self, x):
        """Two residual SwiGLU blocks."""
        for gate, up, down in (self.linears[:3], self.linears[3:]):
            x = x + down(F.silu(gate(x)) * up(x))
        return x


@given(st.integers(0, 999), st.sampled_from([1, 4]))
@settings(max_examples=20)
def test_p_batched_equal_p_separate_ones_under_torch_adam_with_clipping(seed, train_every):
    batched = Distiller(CONFIG, P, D, dtype=torch.float64)
    with torch.no_grad():
        for weight in batched.parameters():              # different ones: a mixed-up index can not hide
            g = torch.Generator().manual_seed(seed)
            weight += 0.3 * torch.randn(weight.shape, generator=g, dtype=torch.float64)
    separate = [Separate(batched, p) for p in range(P)]
    adams = [torch.optim.Adam(s.parameters(), lr=4e-4, eps=1e-4) for s in separate]
    clipped = 0
    for step in range(6):
        shallow, deep, live = pairs(seed + step, rows=K * train_every)
        if step == 2:
            live[1] = False
        alone = torch.stack([s(x) for s, x in zip(separate, shallow, strict=True)])
        torch.testing.assert_close(batched.predict(shallow), alone)
        found = batched.train(shallow, deep, live)
        for p in range(P):
            if not live[p].any():
                assert found[p] == 0
                continue
            value = (deep[p] - separate[p](shallow[p])).square().sum(-1)[live[p]].mean()
            torch.testing.assert_close(found[p], value.detach())
            adams[p].zero_grad()
            value.backward()
            clipped += torch.nn.utils.clip_grad_norm_(separate[p].parameters(), 0.5) > 0.5
            adams[p].step()
    assert clipped > 0
    for p in range(P):
        weights = [w for a, b in zip(batched.gate_up, batched.down, strict=True)
                   for w in (*a[p].chunk(2), b[p])]
        for ours, theirs in zip(weights, separate[p].parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_small_gradients_are_not_clipped():
    """Below norm 0.5 the update is Adam's on the plain gradient: torch agrees only if the clip is idle."""
    batched = Distiller(CONFIG, 1, D, dtype=torch.float64)
    separate = Separate(batched, 0)
    adam = torch.optim.Adam(separate.parameters(), lr=4e-4, eps=1e-4)
    shallow = pairs(0, distillers=1)[0] * 0.1
    deep = batched.predict(shallow).detach() + 1e-3
    for _ in range(3):
        batched.train(shallow, deep, torch.ones(1, K, dtype=torch.bool))
        adam.zero_grad()
        (deep[0] - separate(shallow[0])).square().sum(-1).mean().backward()
        assert 0 < torch.nn.utils.get_total_norm([w.grad for w in separate.parameters()]) < 0.5
        adam.step()
    torch.testing.assert_close(batched.down[1][0], separate.linears[5].weight, rtol=0, atol=1e-10)


def test_gradient_of_the_loss_by_finite_differences():
    distiller = Distiller(dataclasses.replace(CONFIG, width=3), 2, D, dtype=torch.float64)
    shallow, deep, live = (x[:2] for x in pairs(1))
    names = [name for name, _ in distiller.named_parameters()]

    def value(*weights):
        inner = {f"inner.{n}": w for n, w in zip(names, weights, strict=True)}
        predicted = torch.func.functional_call(Predictor(distiller), inner, (shallow,))
        return loss(deep, predicted, live)
    weights = [w.detach().clone().requires_grad_(True) for w in distiller.parameters()]
    assert torch.autograd.gradcheck(value, weights)


class Predictor(torch.nn.Module):
    """`Distiller.predict` as a forward, for functional_call."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, shallow):
        """ĥ."""
        return self.inner.predict(shallow)


def test_loss_sums_over_width_and_averages_over_live_rows():
    deep, predicted = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    predicted[0, 0], predicted[0, 1], predicted[0, 2] = 1.0, 2.0, 100.0
    live = torch.tensor([[True, True, False], [False, False, False]])
    assert loss(deep, predicted, live).tolist() == [(4 + 16) / 2, 0]
    predicted[0, 2] = torch.nan                          # a dead row's content does not matter
    assert loss(deep, predicted, live).tolist() == [10, 0]


def test_an_idle_distiller_is_left_bit_for_bit():
    distiller = Distiller(CONFIG, P, D)
    for seed in range(3):
        shallow, deep, live = pairs(seed)
        distiller.train(shallow.float(), deep.float(), live | True)
    before = state(distiller)
    live = torch.ones(P, K, dtype=torch.bool)
    live[1] = False
    shallow, deep, _ = pairs(9)
    distiller.train(shallow.float(), deep.float(), live)
    for old, new in zip(before, state(distiller), strict=True):
        assert torch.equal(old[1], new[1])
        assert not torch.equal(old[0], new[0]) and not torch.equal(old[2], new[2])
    assert distiller.step_P.tolist() == [4, 3, 4]


@given(st.integers(0, 999))
@settings(max_examples=20)
def test_nothing_leaks_from_prompt_to_prompt_or_from_dead_rows(seed):
    one, other = Distiller(CONFIG, P, D), Distiller(CONFIG, P, D)
    for step in range(4):
        shallow, deep, live = pairs(seed + step)
        live[1, 0] = True
        one.train(shallow.float(), deep.float(), live)
        shallow[[0, 2]] *= 3
        deep[[0, 2]] -= 1                                # the neighbours see something else
        dead = ~live[1]
        shallow[1, dead], deep[1, dead] = 7.0, -7.0      # so do this prompt's finished rows
        other.train(shallow.float(), deep.float(), live)
    for a, b in zip(state(one), state(other), strict=True):
        assert torch.equal(a[1], b[1])
    assert not torch.equal(one.down[0][0], other.down[0][0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_not_even_a_nan_in_a_dead_row_matters(bad):
    one, other = Distiller(CONFIG, P, D), Distiller(CONFIG, P, D)
    for seed in range(3):
        shallow, deep, live = pairs(seed)
        live[0, 0], live[2] = True, False                # Distiller 2 is idle altogether
        one.train(shallow.float(), deep.float(), live)
        shallow[~live], deep[~live] = bad, -bad
        other.train(shallow.float(), deep.float(), live)
    for a, b in zip(state(one), state(other), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


def test_row_order_does_not_matter():
    one, other = Distiller(CONFIG, P, D, dtype=torch.float64), Distiller(CONFIG, P, D, dtype=torch.float64)
    order = torch.tensor([4, 1, 0, 3, 2])
    for seed in range(5):
        shallow, deep, live = pairs(seed)
        one.train(shallow, deep, live)
        other.train(shallow[:, order], deep[:, order], live[:, order])
    torch.testing.assert_close(one.down[1], other.down[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("zero_init", [False, True])
def test_loss_falls_on_a_fixed_map(zero_init):
    distiller = Distiller(DistillerConfig(width=64, lr=1e-2, zero_init=zero_init), 2, D)
    g = torch.Generator().manual_seed(0)
    target, losses = torch.randn(2, D, D, generator=g), []
    for _ in range(1000):
        shallow = torch.randn(2, 16, D, generator=g)
        losses.append(distiller.train(shallow, shallow.tanh() @ target, torch.ones(2, 16, dtype=torch.bool)))
    losses = torch.stack(losses)
    assert (losses[-20:].mean(0) < 0.1 * losses[:5].mean(0)).all()


def test_initial_weights_are_pytorchs_linear_init_from_a_seed_of_their_own():
    before = torch.random.get_rng_state()
    a, b, other = (Distiller(DistillerConfig(width=96, seed=s), 2, 64) for s in (3, 3, 5))
    assert torch.equal(before, torch.random.get_rng_state())
    for x, y, z in zip(a.parameters(), b.parameters(), other.parameters(), strict=True):
        assert torch.equal(x, y) and not torch.equal(x, z)
        assert torch.equal(x[0], x[1])                   # every Distiller of a batch starts alike
        bound = 1 / math.sqrt(x.shape[-1])
        assert x.abs().max() <= bound and x.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    zero = Distiller(DistillerConfig(width=96, zero_init=True), 2, 64)
    x = torch.randn(2, 3, 64)
    assert torch.equal(zero.predict(x), x)
    assert {p.dtype for p in a.parameters()} == {torch.float32}


def test_bytes_say_what_is_allocated():
    config = DistillerConfig(width=96)
    distiller = Distiller(config, 1, 64)
    held = sum(t.nbytes for t in [*distiller.parameters(), *distiller.first, *distiller.second])
    assert config.bytes(64) == held + sum(t.nbytes for t in distiller.parameters())


@pytest.mark.parametrize("bad", [dict(width=0), dict(width=1.5), dict(train_every=0), dict(lr=0.0),
                                 dict(lr=math.nan), dict(lr=math.inf), dict(scope="row"), dict(seed=1.5),
                                 dict(lr=True), dict(zero_init=1), dict(width=2 ** 31), dict(kind="adam"),
                                 dict(ridge=0.0), dict(ridge=math.nan), dict(linear=-1), dict(linear=2.0),
                                 dict(forget=0.0), dict(forget=1.5), dict(warm=1)])
def test_knobs_out_of_range_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        DistillerConfig(**bad)
