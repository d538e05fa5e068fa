"""The methods of the tables: each against its definition, and all against `generate` where they are one."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from decode import ESampConfig, SamplingConfig, generate
from distiller import DistillerConfig
from esamp import draw, uniform
from experiments import methods
from experiments.methods import Setting, sample

PROMPTS, EOS = [[1, 2, 3, 4, 5], [9, 8], [7, 7, 7, 30, 2, 2, 1]], {4, 11, 12}
P, K, D = 2, 5, 6
WORK = dict(n=4, max_new_tokens=12, seed=5, eos_ids=EOS)


def drawn(samples):
    """Tokens of every sample."""
    return [s.token_ids for s in samples]


def pairs(seed, rows=K):
    """Random (h¹, h^L, live) in fp64."""
    g = torch.Generator().manual_seed(seed)
    shallow, deep = (torch.randn(P, rows, D, generator=g, dtype=torch.float64) for _ in range(2))
    return shallow, deep, torch.rand(P, rows, generator=g) < 0.7


@pytest.mark.parametrize("knobs, esamp", [
    ({}, None), (dict(temperature=0.7, top_k=9, top_p=0.9, min_p=0.01), None),
    (dict(method="esamp", beta=1.5, lr=1e-2, width=16), ESampConfig(beta=1.5, lr=1e-2, width=16, seed=5)),
    (dict(method="esamp", distiller="rls", scope="batch", ridge=2.0, warm=True, width=16),
     ESampConfig(kind="rls", scope="batch", ridge=2.0, warm=True, width=16, seed=5))])
def test_what_generate_can_do_is_generates(tiny, knobs, esamp):
    samples, stats = sample(tiny, PROMPTS, Setting("x", **knobs), **WORK, first_prompt=3)
    filters = {k: knobs.get(k) for k in ("top_k", "top_p", "min_p")}
    config = SamplingConfig(knobs.get("temperature", 1.0), **filters, n=4, max_new_tokens=12, seed=5)
    expected = generate(tiny, PROMPTS, config, esamp, eos_ids=EOS, first_prompt=3)
    assert samples == expected.samples and stats == expected.stats


@pytest.mark.parametrize("method", methods.WITH_DISTILLER)
@pytest.mark.parametrize("distiller", ["swiglu", "rls", *methods.PREDICTORS])
def test_without_beta_every_method_is_vanilla_and_with_it_none_is(tiny, method, distiller):
    vanilla = drawn(sample(tiny, PROMPTS, Setting("x"), **WORK)[0])
    if method == "vocabulary" and distiller != "swiglu":
        with pytest.raises(ValueError, match="vocabulary"):
            Setting("x", method, distiller=distiller)
        return
    knobs = dict(method=method, distiller=distiller, width=16)
    zero, strong = (sample(tiny, PROMPTS, Setting("x", beta=beta, **knobs), **WORK) for beta in (0.0, 2.0))
    assert drawn(zero[0]) == vanilla != drawn(strong[0]) and strong[1].updates > 0


def test_each_new_distribution_is_its_formula():
    g = torch.Generator().manual_seed(0)
    W, deep, predicted = (torch.randn(n, D, generator=g) for n in (9, K, K))
    rows = SimpleNamespace(sampling=SimpleNamespace(seed=1), first_prompt=0,
                           keep=lambda ref: torch.ones_like(ref, dtype=torch.bool))
    run, ref = SimpleNamespace(model=SimpleNamespace(head=lambda x: x @ W.T), rows=rows), deep @ W.T

    def new(method, **knobs):
        return methods.Policy(Setting("x", method, **knobs), None, None).logits(3, run, ref, deep, predicted)
    torch.testing.assert_close(new("subtract", beta=0.4), ref - 0.4 * predicted @ W.T)
    shift = torch.linalg.lstsq(W, (new("gaussian", beta=0.4) - ref).T).solution.T / 0.4
    torch.testing.assert_close(shift.norm(dim=-1), (deep - predicted).norm(dim=-1))
    assert (F.cosine_similarity(shift, deep - predicted).abs() < 0.999).all()
    pi = ref.double().softmax(-1)
    T = 0.8 ** (0.7 / -(pi * pi.log()).sum(-1, keepdim=True))
    torch.testing.assert_close(new("edt", theta=0.7).softmax(-1).double(), (ref / T).double().softmax(-1),
                               rtol=1e-4, atol=1e-6)
    kept = new("typical", typical_p=0.6) > -torch.inf
    assert torch.equal(kept, methods.typical_mask(ref, 1.0, 0.6))


@given(st.integers(0, 999), st.floats(0.05, 1.0), st.sampled_from([0.5, 1.0, 2.0]))
@settings(max_examples=30)
def test_typical_keeps_the_smallest_set_nearest_to_the_entropy(seed, mass, temperature):
    ref = 2 * torch.randn(3, 13, generator=torch.Generator().manual_seed(seed))
    kept = methods.typical_mask(ref, temperature, mass)
    for row, mask in zip(ref.double() / temperature, kept, strict=True):
        pi = row.softmax(-1)
        distance = (-pi.log() + (pi * pi.log()).sum()).abs()
        total = 0.0                                      # of what lies nearer
        for z in distance.argsort().tolist():
            assert bool(mask[z]) == (total < mass) or abs(total - mass) < 1e-6         # in fp32
            total += pi[z].item()


def test_contrastive_decoding_knows_its_amateurs_context(tiny):
    """Greedy, against whole forwards of both models over every prefix."""
    amateur = random_model(TINY, seed=9)
    setting = Setting("x", "contrastive", temperature=0.0, beta=0.8, alpha=0.2)
    samples, _ = sample(tiny, PROMPTS, setting, n=1, max_new_tokens=9, seed=0, eos_ids=set(), amateur=amateur)
    changed = 0
    for s in samples:
        text = PROMPTS[s.prompt] + s.token_ids
        for i in range(1, 9):
            prefix = torch.tensor([text[:len(PROMPTS[s.prompt]) + i]])
            ref, other = (m(prefix)[0, -1].double().log_softmax(-1) for m in (tiny, amateur))
            score = (1.8 * ref - 0.8 * other).masked_fill(ref.exp() < 0.2 * ref.exp().max(), -torch.inf)
            assert s.token_ids[i] == score.argmax()
            changed += s.token_ids[i] != ref.argmax()
    assert changed > 0
    with pytest.raises(ValueError, match="amateur"):
        sample(tiny, PROMPTS, setting, **WORK)


def test_fire_heats_the_first_token_alone(tiny):
    samples, _ = sample(tiny, PROMPTS, Setting("x", temperature=0.0, first_temperature=30.0), **WORK)
    ref = torch.stack([tiny(torch.tensor([prompt]))[0, -1] for prompt in PROMPTS])
    best = ref.topk(methods.FIRST_TOP_K).indices
    for s in samples:
        u = uniform(5, torch.tensor([s.prompt]), torch.tensor([s.sample]), 0)
        hot = torch.full_like(ref[:1], -torch.inf)
        hot[0, best[s.prompt]] = ref[s.prompt, best[s.prompt]]
        assert s.token_ids[0] == draw(hot, u, 30.0)
        prefix = torch.tensor([PROMPTS[s.prompt] + s.token_ids[:1]])
        assert len(s.token_ids) == 1 or s.token_ids[1] == tiny(prefix)[0, -1].argmax()
    assert len({s.token_ids[0] for s in samples}) > len(PROMPTS)
    both = Setting("x", "esamp", beta=2.0, width=16, lr=1e-2, first_temperature=30.0)
    fused, stats = sample(tiny, PROMPTS, both, **WORK)
    cold, _ = sample(tiny, PROMPTS, Setting("x", first_temperature=30.0), **WORK)
    assert [s.token_ids[0] for s in fused] == [s.token_ids[0] for s in cold] and drawn(fused) != drawn(cold)
    assert stats.moved > 0


def test_waves_hand_the_distillers_on(tiny, monkeypatch):
    given, plain = [], methods.generate
    monkeypatch.setattr(methods, "generate", lambda *args, **how: (
        given.append((how["distillers"], how["distillers"] and int(how["distillers"].step_P.sum()))),
        plain(*args, **how))[1])
    knobs = dict(method="esamp", beta=1.0, lr=1e-2, width=16)
    one, alone = sample(tiny, PROMPTS, Setting("x", **knobs), **WORK)
    two, stats = sample(tiny, PROMPTS, Setting("x", waves=2, **knobs), **WORK | dict(n=8))
    assert [(s.prompt, s.sample) for s in two] == [(p, k) for p in range(3) for k in range(8)]
    assert drawn(s for s in two if s.sample < 4) == drawn(one) != drawn(s for s in two if s.sample >= 4)
    assert given[:2] == [(None, None)] * 2 and given[2][1] == alone.updates < stats.updates
    with pytest.raises(ValueError, match="multiple of waves"):
        sample(tiny, PROMPTS, Setting("x", waves=3), **WORK)


def test_the_ramp_reaches_beta(tiny, monkeypatch):
    seen, step = [], methods.decode.esamp_step
    monkeypatch.setattr(methods.decode, "esamp_step", lambda t, run: (seen.append(run.beta), step(t, run)))
    sample(tiny, PROMPTS, Setting("x", "esamp", beta=0.8, ramp=4), **WORK)
    assert seen[:6] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 0.8])


def test_the_running_mean_is_the_mean_of_live_rows():
    mean = methods.RunningMean(DistillerConfig(), P, D, dtype=torch.float64)
    taps = [pairs(t) for t in range(4)]
    assert not mean.predict(taps[0][0]).any()
    for tap in taps:
        mean.train(*tap)
    for p in range(P):
        seen = torch.cat([deep[p][live[p]] for _, deep, live in taps])
        torch.testing.assert_close(mean.predict(taps[0][0])[p], seen.mean(0).expand(K, D))


@pytest.mark.parametrize("kind", [methods.FourBlocks, methods.Mlp, methods.Vocabulary])
def test_the_other_networks_take_torchs_adam_steps(kind):
    distiller = kind(DistillerConfig(width=7, lr=1e-2), P, D, dtype=torch.float64)
    distiller.head_weight = W = torch.randn(9, D, generator=torch.Generator().manual_seed(1)).double()
    shallow, deep, live = pairs(0)
    oracle = [w.detach().clone().requires_grad_() for w in distiller.parameters()]
    adams = [torch.optim.Adam([w], lr=1e-2, eps=1e-4) for w in oracle]

    def forward(x):
        if kind is methods.Mlp:
            for i, w in enumerate(oracle):
                x = (F.silu(x) if i else x) @ w.mT
            return x
        half = len(oracle) // 2
        for gate_up, down in zip(oracle[:half], oracle[half:], strict=True):
            gate, up = (x @ gate_up.mT).chunk(2, -1)
            x = x + (F.silu(gate) * up) @ down.mT
        return x
    assert len(oracle) == {methods.FourBlocks: 8, methods.Mlp: 4, methods.Vocabulary: 4}[kind]
    predicted = forward(shallow)
    torch.testing.assert_close(distiller.predict(shallow), predicted)
    if kind is methods.Vocabulary:
        pi = (deep @ W.T).softmax(-1)
        error = (pi * (pi.log() - (predicted @ W.T).log_softmax(-1))).sum(-1)
    else:
        error = (predicted - deep).square().sum(-1)
    for p in range(P):
        grads = torch.autograd.grad(error[p][live[p]].mean(), oracle, retain_graph=True)
        norm = torch.stack([g.norm() for g in grads]).norm()
        for w, g in zip(oracle, grads, strict=True):
            w.grad = (torch.zeros_like(w) if w.grad is None else w.grad) + g * min(1, 0.5 / (norm + 1e-6))
    for adam in adams:
        adam.step()
    distiller.train(shallow, deep, live)
    for ours, theirs in zip(distiller.parameters(), oracle, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("knobs, message", [
    (dict(method="best"), "method is 'best'"), (dict(distiller="gru"), "distiller is 'gru'"),
    (dict(temperature=-1.0), "temperature is -1"), (dict(method="esamp", beta=-1.0), "beta is -1"),
    (dict(typical_p=0.0), "typical_p is 0"), (dict(waves=0), "waves is 0"), (dict(alpha=2.0), "alpha is 2"),
    (dict(first_temperature=-1.0), "first_temperature is -1"), (dict(ramp=-1), "ramp is -1")])
def test_a_knob_out_of_range_is_named(knobs, message):
    with pytest.raises(ValueError, match=message):
        Setting("x", **knobs)
