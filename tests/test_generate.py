"""The loop: against a literal, cache-free Algorithm 1, and its invariants."""

import dataclasses
import math

import pytest
import torch
from conftest import TINY, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

import esamp as equations
from decode import ESampConfig, SamplingConfig, Stats, generate
from distiller import Distiller

PROMPTS = [[1, 2, 3, 4, 5], [9, 8], [7, 7, 7, 30, 2, 2, 1]]
EOS = {4, 11, 12}
SHORT = SamplingConfig(n=3, max_new_tokens=12, seed=5)
STRONG = ESampConfig(beta=1.5, width=16, lr=1e-2)


def tokens(result):
    """The token ids of every sample, by (prompt, sample)."""
    return {(s.prompt, s.sample): s.token_ids for s in result.samples}


def algorithm_1(model, prompts, sampling, esamp, eos_ids):
    """The paper's Algorithm 1 in its plainest form: whole sequences again at every step, rows one by one."""
    rows = [(p, k) for p in range(len(prompts)) for k in range(sampling.n)]
    text = {row: list(prompts[row[0]]) for row in rows}
    context = model.config.max_position_embeddings
    limit = {row: min(sampling.max_new_tokens, context - len(prompts[row[0]])) for row in rows}
    scopes = {p: p if esamp is None or esamp.scope == "prompt" else 0 for p in range(len(prompts))}
    distillers = {scope: esamp and Distiller(esamp, 1, model.config.hidden_size)
                  for scope in set(scopes.values())}
    sums = dict(kl=0.0, variation=0.0, moved=0, updates=0)
    live, novelties, windows = list(rows), {row: [None] for row in rows}, {scope: [] for scope in distillers}
    for step in range(sampling.max_new_tokens):
        pairs = {scope: [] for scope in distillers}
        for p, k in live:
            shallow = model.lower(torch.tensor([text[p, k]]))
            deep = model.upper(shallow)[:, -1]
            ref = model.head(deep)
            keep = equations.keep_mask(ref, sampling.temperature, sampling.top_k, sampling.top_p,
                                       sampling.min_p)
            new = ref.masked_fill(~keep, -math.inf)
            if esamp and step > 0:
                predicted = distillers[scopes[p]].predict(shallow[:, -1:])[:, 0]
                new = equations.reweight(ref, model.head(predicted), esamp.beta, keep)
                novelties[p, k].append(equations.novelty(deep, predicted).item())
                pairs[scopes[p]].append((shallow[0, -1], deep[0]))
            u = equations.uniform(sampling.seed, torch.tensor([p]), torch.tensor([k]), step)
            if esamp and step > 0:
                plain = ref.masked_fill(~keep, -math.inf)
                sums["moved"] += int(equations.draw(plain, u, sampling.temperature) != equations.draw(
                    new, u, sampling.temperature))
                if sampling.temperature > 0:
                    pi, pi_ref = ((x[keep] / sampling.temperature).double().softmax(-1) for x in (new, plain))
                    sums["kl"] += (pi * (pi / pi_ref).log()).sum().item()
                    sums["variation"] += (pi - pi_ref).abs().sum().item() / 2
            text[p, k].append(equations.draw(new, u, sampling.temperature).item())
        for scope, found in pairs.items() if esamp and step > 0 else ():
            windows[scope] += found
            if step % esamp.train_every == 0:
                if found:                                # else an incomplete last window, dropped
                    sums["updates"] += 1
                    shallow, deep = (torch.stack(x)[None] for x in zip(*windows[scope], strict=True))
                    distillers[scope].train(shallow, deep, torch.ones(1, shallow.shape[1], dtype=torch.bool))
                windows[scope] = []
        made = {row: text[row][len(prompts[row[0]]):] for row in rows}
        live = [row for row in live if made[row][-1] not in eos_ids and len(made[row]) < limit[row]]
        if not live:
            break
    return made, novelties, sums, [distillers[scope] for scope in sorted(distillers)]


SETTINGS = {
    "paper": (SHORT, STRONG),
    "vanilla": (SHORT, None),
    "batch scope": (SHORT, dataclasses.replace(STRONG, scope="batch")),
    "train every 3": (SHORT, dataclasses.replace(STRONG, train_every=3)),
    "windows of 8": (dataclasses.replace(SHORT, max_new_tokens=30),
                     dataclasses.replace(STRONG, train_every=8)),
    "filters": (dataclasses.replace(SHORT, top_k=12, top_p=0.9, min_p=0.02, temperature=1.4), STRONG),
    "greedy": (dataclasses.replace(SHORT, temperature=0.0), STRONG),
    "context ends": (dataclasses.replace(SHORT, max_new_tokens=60), STRONG),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_loop_is_algorithm_1(tiny, name):
    sampling, esamp = SETTINGS[name]
    eos = {"context ends": {3}, "windows of 8": EOS | set(range(20, 27))}.get(name, EOS)
    result = generate(tiny, PROMPTS, sampling, esamp, eos_ids=eos)
    made, novelties, sums, distillers = algorithm_1(tiny, PROMPTS, sampling, esamp, eos)
    assert tokens(result) == made and [(s.prompt, s.sample) for s in result.samples] == sorted(made)
    if esamp:
        assert (result.stats.moved, result.stats.updates) == (sums["moved"], sums["updates"])
        separate = zip(*(d.parameters() for d in distillers), strict=True)
        for weight, apart in zip(result.distillers.parameters(), separate, strict=True):
            torch.testing.assert_close(weight, torch.cat(apart), rtol=0, atol=2e-5)
    if esamp and sampling.temperature > 0:
        assert result.stats.kl == pytest.approx(sums["kl"], rel=2e-5)
        assert result.stats.variation == pytest.approx(sums["variation"], rel=2e-5)
    lengths = {len(t) for t in made.values()}
    assert len(lengths) > 1 or name == "greedy"          # rows ended at different steps
    for s in result.samples:
        ends = s.token_ids[-1] in eos
        assert s.finish_reason == ("stop" if ends else "length") and not set(s.token_ids[:-1]) & eos
        assert len(s.logprob) == len(s.novelty) == len(s.token_ids)
        prompt = PROMPTS[s.prompt]
        row = tiny(torch.tensor([prompt + s.token_ids]))[0, len(prompt) - 1:-1].log_softmax(-1)
        expected = row.gather(-1, torch.tensor(s.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(s.logprob), expected, rtol=0, atol=2e-5)
        if esamp is None:
            assert s.novelty == [None] * len(s.token_ids)
        else:
            assert s.novelty[0] is None
            assert s.novelty[1:] == pytest.approx(novelties[s.prompt, s.sample][1:], rel=2e-5)


@given(st.sampled_from([0.0, 0.7, 1.3]), st.none() | st.integers(2, 9),
       st.none() | st.sampled_from([0.05, 0.3]), st.integers(0, 99), st.sampled_from(["prompt", "batch"]))
@settings(max_examples=20)
def test_beta_zero_is_vanilla_bit_for_bit(tiny, T, top_k, min_p, seed, scope):
    sampling = SamplingConfig(n=3, max_new_tokens=10, temperature=T, top_k=top_k, min_p=min_p, seed=seed)
    vanilla = generate(tiny, PROMPTS, sampling, eos_ids=EOS)
    zero = generate(tiny, PROMPTS, sampling, ESampConfig(beta=0.0, width=8, scope=scope), eos_ids=EOS)
    drawn, expected = ([(s.token_ids, s.logprob) for s in r.samples] for r in (zero, vanilla))
    assert drawn == expected
    assert zero.stats.moved == 0 and zero.stats.kl == 0 and zero.stats.updates > 0


def test_the_first_token_is_vanillas_and_later_ones_are_not(tiny):
    sampling = dataclasses.replace(SHORT, n=20)
    vanilla, esamp = (tokens(generate(tiny, PROMPTS, sampling, e, eos_ids=set())) for e in (None, STRONG))
    assert all(vanilla[row][0] == esamp[row][0] for row in vanilla)
    assert sum(vanilla[row] != esamp[row] for row in vanilla) > 30


def test_same_seed_same_tokens_another_seed_others(tiny):
    runs = [tokens(generate(tiny, PROMPTS, dataclasses.replace(SHORT, seed=s), STRONG, eos_ids=EOS))
            for s in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]


def test_a_sample_does_not_depend_on_how_many_there_are(tiny):
    """Vanilla, fp32, pinned seeds: other batch sizes round otherwise, and no u lies that near a CDF edge."""
    few, many = (tokens(generate(tiny, PROMPTS, dataclasses.replace(SHORT, n=n), eos_ids=EOS))
                 for n in (4, 9))
    assert all(many[row] == few[row] for row in few)


@pytest.mark.parametrize("esamp", [None, STRONG])
def test_prompts_decoded_together_or_one_by_one_are_the_same(tiny, esamp):
    together = tokens(generate(tiny, PROMPTS, SHORT, esamp, eos_ids=EOS))
    alone = {}
    for i, prompt in enumerate(PROMPTS):
        alone |= tokens(generate(tiny, [prompt], SHORT, esamp, eos_ids=EOS, first_prompt=i))
    assert together == alone


@pytest.mark.parametrize("train_every", [1, 2, 3, 4, 5])
def test_a_prompts_distiller_does_not_depend_on_how_long_its_neighbours_live(tiny, train_every):
    esamp = dataclasses.replace(STRONG, train_every=train_every)
    sampling = dataclasses.replace(SHORT, max_new_tokens=25)
    eos = EOS | {20, 21, 22, 23, 24}
    together = generate(tiny, PROMPTS, sampling, esamp, eos_ids=eos)
    alone = [generate(tiny, [p], sampling, esamp, eos_ids=eos, first_prompt=i) for i, p in enumerate(PROMPTS)]
    assert together.distillers.step_P.tolist() == [a.distillers.step_P.item() for a in alone]
    apart = zip(*(a.distillers.parameters() for a in alone), strict=True)
    for weight, weights in zip(together.distillers.parameters(), apart, strict=True):
        torch.testing.assert_close(weight, torch.cat(weights), rtol=0, atol=2e-5)
    assert together.stats.updates == sum(a.stats.updates for a in alone)


def test_siblings_share_a_distiller_and_prompts_do_not(tiny):
    sampling = dataclasses.replace(SHORT, n=2, max_new_tokens=10)
    one = generate(tiny, [PROMPTS[0], PROMPTS[1]], sampling, STRONG, eos_ids=set())
    other = generate(tiny, [[5, 6, 0, 2, 9], PROMPTS[1]], sampling, STRONG, eos_ids=set())
    assert [s.novelty for s in one.samples[2:]] == [s.novelty for s in other.samples[2:]]
    more = generate(tiny, [PROMPTS[1]], dataclasses.replace(sampling, n=5), STRONG, eos_ids=set(),
                    first_prompt=1)
    assert more.samples[0].novelty[1] == pytest.approx(one.samples[2].novelty[1], rel=1e-5)
    assert more.samples[0].novelty[2] != pytest.approx(one.samples[2].novelty[2], rel=1e-5)


def test_distillers_go_on_where_they_are_passed_back_and_start_fresh_otherwise(tiny):
    first = generate(tiny, PROMPTS, SHORT, STRONG, eos_ids=set())
    weights = [w.detach().clone() for w in first.distillers.parameters()]
    fresh = generate(tiny, PROMPTS, SHORT, STRONG, eos_ids=set())
    assert all(torch.equal(a, b) for a, b in zip(weights, fresh.distillers.parameters(), strict=True))
    kept = generate(tiny, PROMPTS, SHORT, STRONG, eos_ids=set(), distillers=first.distillers)
    assert kept.distillers is first.distillers and kept.distillers.step_P.tolist() == [22, 22, 22]
    assert kept.stats.updates == fresh.stats.updates == 33
    with pytest.raises(ValueError, match="distillers holds 3 of width 24; expected 1 of 24"):
        generate(tiny, PROMPTS[:1], SHORT, STRONG, eos_ids=set(), distillers=first.distillers)
    assert kept.stats.summary()["loss_first_step"] < fresh.stats.summary()["loss_first_step"]


def test_finished_samples_arrive_with_their_prompt_and_all_once(tiny):
    calls = []
    result = generate(tiny, PROMPTS, dataclasses.replace(SHORT, max_new_tokens=40), STRONG, eos_ids=EOS,
                      on_step=lambda t, finished: calls.append((t, [(s.prompt, s.sample) for s in finished])))
    assert [t for t, _ in calls] == list(range(len(calls)))
    arrived = [row for _, rows in calls for row in rows]
    assert sorted(arrived) == [(p, k) for p in range(3) for k in range(3)] == sorted(tokens(result))
    assert all(len(rows) % 3 == 0 for _, rows in calls)


def test_stats_are_what_the_samples_say(tiny):
    sampling = dataclasses.replace(SHORT, max_new_tokens=20)
    result = generate(tiny, PROMPTS, sampling, STRONG, eos_ids=EOS)
    stats, figures = result.stats, result.stats.summary()
    assert stats.tokens == sum(len(s.token_ids) for s in result.samples)
    assert stats.reweighted == stats.tokens - 9 and 0 < stats.moved <= stats.reweighted
    firsts = [s.novelty[1] ** 2 for s in result.samples if len(s.novelty) > 1]
    assert figures["loss_first_step"] == pytest.approx(sum(firsts) / len(firsts), rel=1e-5)
    lasts = []
    for p in range(3):
        last = max(len(s.token_ids) for s in result.samples if s.prompt == p) - 1
        lasts += [s.novelty[t] ** 2 for s in result.samples if s.prompt == p
                  for t in range(max(1, last - 9), last + 1) if t < len(s.token_ids)]
    assert figures["loss_last_10_steps"] == pytest.approx(sum(lasts) / len(lasts), rel=1e-5)
    assert (stats + Stats(tokens=1)).tokens == stats.tokens + 1
    empty = Stats().summary()
    assert empty["moved_share"] is None and empty["loss_first_step"] is None


def test_trivial_predictors_are_h1_and_the_running_mean_per_distiller(tiny):
    """Recomputed from whole sequences: vanilla tokens (β = 0), so the pairs are known."""
    sampling = dataclasses.replace(SHORT, max_new_tokens=9)
    for scope in ("prompt", "batch"):
        result = generate(tiny, PROMPTS, sampling, ESampConfig(beta=0.0, width=8, scope=scope), eos_ids=EOS)
        made, pairs = tokens(result), {}
        for (p, _k), ids in made.items():
            shallow = tiny.lower(torch.tensor([PROMPTS[p] + ids[:-1]]))
            deep = tiny.upper(shallow)[0, len(PROMPTS[p]):]
            for t, pair in enumerate(zip(shallow[0, len(PROMPTS[p]):], deep, strict=True)):
                pairs.setdefault(t, []).append((p if scope == "prompt" else 0, *pair))
        to_shallow, to_mean, seen = [], [], {}
        for t in sorted(pairs):
            for scope_of, h1, hL in pairs[t]:
                to_shallow.append((hL - h1).square().sum())
                mean = torch.stack(seen[scope_of]).mean(0) if scope_of in seen else torch.zeros_like(hL)
                to_mean.append((hL - mean).square().sum())
            for scope_of, _, hL in pairs[t]:
                seen.setdefault(scope_of, []).append(hL)
        figures = result.stats.summary()
        for name, losses in (("h1", to_shallow), ("running_mean", to_mean)):
            expected = pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
            assert figures[f"loss_last_10_steps_if_{name}"] == expected


def test_a_prompt_is_prefilled_once_for_all_its_samples(monkeypatch):
    model, seen = random_model(TINY), []
    plain = model.lower
    model.lower = lambda tokens, cache=None: (seen.append(tuple(tokens.shape)), plain(tokens, cache))[1]
    generate(model, PROMPTS, dataclasses.replace(SHORT, max_new_tokens=4), STRONG, eos_ids=set())
    assert seen[0] == (3, 7) and set(seen[1:]) == {(9,), (9, 1)}


def test_context_limits_each_prompt_on_its_own(tiny):
    prompts = [[1] * 47, [2] * 40]
    result = generate(tiny, prompts, SamplingConfig(n=2, max_new_tokens=99), STRONG, eos_ids=set())
    assert {s.prompt: len(s.token_ids) for s in result.samples} == {0: 1, 1: 8}
    assert {s.finish_reason for s in result.samples} == {"length"}
    with pytest.raises(ValueError, match="prompt 1 has 48 tokens"):
        generate(tiny, [[1], [1] * 48], SHORT, eos_ids=set())
    with pytest.raises(ValueError, match="prompt 0 has 0 tokens"):
        generate(tiny, [[]], SHORT, eos_ids=set())
    one = generate(tiny, PROMPTS, dataclasses.replace(SHORT, max_new_tokens=1), STRONG, eos_ids=set())
    assert one.stats.updates == 0 and all(len(s.token_ids) == 1 for s in one.samples)


def test_a_loss_that_overflows_stops_the_run_though_its_logits_do_not(tiny):
    distillers = Distiller(STRONG, 3, 24)
    with torch.no_grad():
        distillers.down[1].mul_(1e25)                    # ĥ is finite, ‖h^L − ĥ‖² is not
    zero = dataclasses.replace(STRONG, beta=0.0)
    with pytest.raises(FloatingPointError, match="Distiller's loss or reweighted .* not finite at step 1,"):
        generate(tiny, PROMPTS, SHORT, zero, eos_ids=EOS, distillers=distillers)


@pytest.mark.parametrize("scope", ["prompt", "batch"])
def test_what_a_finished_row_computes_reaches_nobody(scope):
    """Rows that go on from an EOS compute NaN here; everything is as if they did not."""
    eos, runs = {13, 14, 15, 16, 17}, []
    for huge in (1.0, 1e30):
        model = random_model(TINY)
        model.model.embed_tokens.weight[list(eos)] *= huge
        esamp = dataclasses.replace(STRONG, scope=scope)
        result = generate(model, PROMPTS, dataclasses.replace(SHORT, max_new_tokens=30), esamp, eos_ids=eos)
        runs.append((result.samples, result.stats, [w.tolist() for w in result.distillers.parameters()]))
    assert runs[0] == runs[1]
    assert len({len(s.token_ids) for s in runs[0][0]}) > 3


@pytest.mark.parametrize("where", ["ref", "distiller"])
def test_a_number_that_is_not_finite_names_its_step_and_row(where):
    model = random_model(dataclasses.replace(TINY, max_position_embeddings=60))
    plain, sampling = model.head, SamplingConfig(n=2, max_new_tokens=40, seed=1)
    calls = []

    def head(x):
        """From loop step 20 on, row 3 is bad: in ref (every other call) or in the Distiller's logits."""
        calls.append(1)
        out = plain(x)
        if len(calls) > 1 + 2 * 19 and len(calls) % 2 == (0 if where == "ref" else 1):
            out[3] = out[3] * torch.nan
        return out
    model.head = head
    with pytest.raises(FloatingPointError, match="step 20, prompt 11, sample 1"):
        generate(model, [[1, 2], [3]], sampling, ESampConfig(width=8), eos_ids=set(), first_prompt=10)
    assert len(calls) == 1 + 2 * 32                     # found at the next look, not at the end


def test_bf16_runs_with_fp32_distillers(tiny):
    model = random_model(TINY).to(torch.bfloat16)
    assert model.frequency.dtype == torch.float32
    result = generate(model, PROMPTS, SHORT, STRONG, eos_ids=EOS)
    assert {w.dtype for w in result.distillers.parameters()} == {torch.float32}
    assert result.stats.updates > 0 and result.stats.moved > 0
    vanilla, zero = (generate(model, PROMPTS, SHORT, e, eos_ids=EOS) for e in (None, ESampConfig(beta=0.0)))
    assert tokens(vanilla) == tokens(zero)


@pytest.mark.parametrize("bad", [dict(temperature=-0.1), dict(temperature=math.nan),
                                 dict(temperature=math.inf), dict(top_k=0), dict(top_p=0.0),
                                 dict(top_p=1.1), dict(min_p=-0.1), dict(min_p=1.5), dict(n=0), dict(n=2.0),
                                 dict(max_new_tokens=0), dict(seed=-1), dict(seed=2 ** 63)])
def test_sampling_out_of_range_is_refused_by_name(bad):
    name, value = next(iter(bad.items()))
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        SamplingConfig(**bad)
    with pytest.raises(ValueError, match="beta"):
        ESampConfig(beta=-0.1)
