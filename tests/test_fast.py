"""The fast form means the plain one: candidates, mixed hidden states, void steps, graphs, smaller batches."""

import contextlib
import dataclasses

import pytest
import torch
from conftest import TINY, random_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import decode
import model as model_module
import train_async
from decode import ESampConfig, SamplingConfig, generate
from distiller import Distiller, DistillerConfig
from esamp import candidates, keep_mask
from model import KVCache, product
from train_async import AsyncDistiller

PROMPTS = [[1, 2, 3, 4, 5], [9, 8], [7, 7, 7, 30, 2, 2, 1]]
EOS = {4, 11, 12}
SHORT = SamplingConfig(n=3, max_new_tokens=14, seed=5)
STRONG = ESampConfig(beta=1.5, width=16, lr=1e-2)
CLOSED = ESampConfig(beta=1.5, width=16, kind="rls", warm=True)
FILTERS = {"none": {}, "min-p": dict(min_p=0.08), "top-k": dict(top_k=5), "top-p": dict(top_p=0.7),
           "all": dict(top_k=12, top_p=0.9, min_p=0.02), "greedy": dict(temperature=0.0, top_k=4)}


def drawn(result):
    """Tokens of every sample."""
    return [s.token_ids for s in result.samples]


def close(one, other):
    """The same tokens; the same numbers but for rounding."""
    assert drawn(one) == drawn(other)
    for a, b in zip(one.samples, other.samples, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=2e-5) and a.finish_reason == b.finish_reason
        if None in (*a.novelty[1:], *b.novelty[1:]):
            assert a.novelty == b.novelty
        else:
            assert a.novelty[1:] == pytest.approx(b.novelty[1:], rel=1e-4)
    figures = other.stats.summary()
    for name, value in one.stats.summary().items():
        assert value == figures[name] or value == pytest.approx(figures[name], rel=1e-4, abs=1e-6), name


# ------------------------------------------------------------------------------
# candidates
# ------------------------------------------------------------------------------

@given(st.integers(0, 9999), st.integers(1, 40), st.sampled_from([0.0, 0.5, 1.0, 1.7]),
       st.none() | st.integers(1, 12), st.none() | st.sampled_from([0.3, 0.8, 0.999, 1.0]),
       st.none() | st.sampled_from([0.0, 0.05, 0.4, 1.0]), st.booleans())
@example(seed=0, width=3, T=0.5, top_k=4, top_p=0.999, min_p=None, ties=False)     # top-p counts all top-k
@settings(max_examples=300)
def test_candidates_are_keep_masks_where_they_say_so(seed, width, T, top_k, top_p, min_p, ties):
    g = torch.Generator().manual_seed(seed)
    ref = 3 * torch.randn(5, 37, generator=g)
    ref = ref.round() if ties else ref
    full = keep_mask(ref, T, top_k, top_p, min_p)
    ids, keep, whole = candidates(ref, width, T, top_k, top_p, min_p)
    assert ids.shape == keep.shape == (5, min(width, 37)) and (ids[:, 1:] > ids[:, :-1]).all()
    for b in range(5):
        found, expected = set(ids[b][keep[b]].tolist()), set(full[b].nonzero()[:, 0].tolist())
        assert found == expected or not whole[b]
        if len(expected) == 37:
            assert not whole[b] or width >= 37
    if width >= 37:
        assert whole.all()
    if not ties and not (top_p and top_k and top_k > width):
        assert whole[full.sum(-1) < width].all()         # a bound that is not reached is no excuse


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("esamp", [None, STRONG, dataclasses.replace(STRONG, scope="batch"),
                                   dataclasses.replace(STRONG, train_every=3), CLOSED,
                                   dataclasses.replace(CLOSED, scope="batch", train_every=3)])
def test_fast_is_plain(tiny, filters, esamp):
    sampling = dataclasses.replace(SHORT, **FILTERS[filters])
    fast = generate(tiny, PROMPTS, sampling, esamp, eos_ids=EOS)
    close(fast, generate(tiny, PROMPTS, sampling, esamp, eos_ids=EOS, plain=True))
    light = generate(tiny, PROMPTS, sampling, esamp, eos_ids=EOS, record=False)
    assert drawn(light) == drawn(fast)                   # the record changes nothing
    assert {x for s in light.samples for x in s.logprob} == {None}
    figures = light.stats.summary()
    if esamp:
        assert figures["moved_tokens"] is None and figures["kl_nats"] is None
        assert figures["loss_last_10_steps"] == fast.stats.summary()["loss_last_10_steps"]


BOUNDS = [(0.02, (1,)), (0.02, (2, 5)), (0.02, (64,)), (0.3, (6,)), (0.3, (6, 10))]


@pytest.mark.parametrize("min_p,widths", BOUNDS)
@pytest.mark.parametrize("every", [1, 16])
@pytest.mark.parametrize("train_every", [1, 3, 20])
def test_more_survivors_than_looked_at_fall_back(tiny, monkeypatch, min_p, widths, every, train_every):
    """On a CPU at once; where the host looks rarely, the steps until the look are void and come again."""
    esamp = dataclasses.replace(STRONG, train_every=train_every)
    sampling = dataclasses.replace(SHORT, max_new_tokens=24, min_p=min_p, n=4)
    expected = generate(tiny, PROMPTS, sampling, esamp, eos_ids=EOS, plain=True)
    calls, step = [], decode.fast_step
    monkeypatch.setattr(decode, "fast_step", lambda t, run: (calls.append(t), step(t, run)))
    monkeypatch.setattr(decode, "look_every", lambda device: every)
    monkeypatch.setattr(decode, "WIDTHS", widths)
    monkeypatch.setattr(decode.Run.__init__, "__defaults__", (widths,))
    found = generate(tiny, PROMPTS, sampling, esamp, eos_ids=EOS)
    close(found, expected)
    for ours, theirs in zip(found.distillers.state(), expected.distillers.state(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    repeated = len(calls) - len(set(calls))
    assert (repeated > 0) == (every == 16 and widths[0] < 31)


# ------------------------------------------------------------------------------
# CUDA graphs, with a stand-in that records what the dispatcher sees
# ------------------------------------------------------------------------------

class FakeGraph(TorchDispatchMode):
    """Captures like CUDA: nothing it ran has happened, but its outputs stay; `replay` runs it into them."""

    def __init__(self):
        super().__init__()
        self.log, self.before = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        words = ("_local_scalar_dense", "nonzero", "masked_select")
        assert not any(word in str(func) for word in words), f"{func} synchronises in a graph"
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = value if isinstance(value, list | tuple) else [value]
                self.before += [(x, x.clone()) for x in written]
        out = func(*args, **kwargs)
        self.log.append((func, args, kwargs, out))
        return out

    def undo(self):
        """What the capture wrote is taken back; new tensors hold garbage until the first replay."""
        for x, old in reversed(self.before):
            x.copy_(old)
        for func, _, _, out in self.log:
            if not any(r.alias_info is not None for r in func._schema.returns):
                for x in out if isinstance(out, list | tuple) else [out]:
                    if isinstance(x, torch.Tensor) and x.is_floating_point():
                        x.fill_(torch.nan)

    def replay(self):
        """Runs everything again, into the same tensors."""
        for func, args, kwargs, out in self.log:
            again = func(*args, **kwargs)
            if not any(r.alias_info is not None for r in func._schema.returns):
                pairs = zip(out, again, strict=True) if isinstance(out, list | tuple) else [(out, again)]
                for old, new in pairs:
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)


@contextlib.contextmanager
def capture(graph, stream=None):
    """`torch.cuda.graph` for the stand-in."""
    with graph:
        yield
    graph.undo()


@pytest.fixture
def graphed(monkeypatch):
    """Graphs on a CPU, looks every 16 steps, a cache that attention reads in strides: as on a GPU."""
    captured, plain = [], train_async.Graphs.__init__

    def on(self, device, stream=None):
        plain(self, device, stream)
        self.on = True
    monkeypatch.setattr(train_async.Graphs, "__init__", on)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: captured.append(FakeGraph()) or captured[-1])
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(decode, "look_every", lambda device: 16)
    made = KVCache.__init__

    def strided(self, *args):
        made(self, *args)
        self.stride = 8
        self.k_NBGME.zero_()
        self.v_NBGME.zero_()
    monkeypatch.setattr(KVCache, "__init__", strided)
    return captured


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("esamp", [None, STRONG, dataclasses.replace(STRONG, train_every=3), CLOSED])
def test_graphs_are_the_loop(tiny, filters, esamp, request):
    sampling = dataclasses.replace(SHORT, max_new_tokens=34, **FILTERS[filters])
    eos = {11, 12}
    expected = generate(tiny, PROMPTS, sampling, esamp, eos_ids=eos, plain=True)
    captured = request.getfixturevalue("graphed")
    close(generate(tiny, PROMPTS, sampling, esamp, eos_ids=eos), expected)
    assert len(captured) > 6                             # three parts, again for each stride of the cache


def test_void_steps_under_graphs(tiny, graphed, monkeypatch):
    sampling = dataclasses.replace(SHORT, max_new_tokens=30, min_p=0.02)
    esamp = dataclasses.replace(STRONG, train_every=2)
    expected = generate(tiny, PROMPTS, sampling, esamp, eos_ids=EOS, plain=True)
    monkeypatch.setattr(decode.Run.__init__, "__defaults__", ((2, 6),))
    close(generate(tiny, PROMPTS, sampling, esamp, eos_ids=EOS), expected)


def test_the_stand_in_would_notice_what_a_graph_must_not_do(graphed):
    """A number that the host changes, a tensor that moves, a read of the device."""
    graphs, x, host = train_async.Graphs("cpu"), torch.zeros(2), [1.0]

    def work():
        x.add_(host[0])
        return x * 2
    for expected in (2.0, 4.0, 6.0):
        assert graphs.run("work", work).tolist() == [expected] * 2
    host[0] = 5.0
    assert graphs.run("work", work).tolist() == [8.0] * 2            # the captured 1, not 5
    assert graphs.run("work", work, key=1).tolist() == [18.0] * 2    # another key: called again
    with pytest.raises(AssertionError, match="synchronises"):
        for _ in range(2):
            graphs.run("read", lambda: float(x.sum()))


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("widths", [(2, 6), (64, 512)])
def test_cuda_graphs_and_void_steps_are_the_plain_loop(filters, widths, monkeypatch):
    model, esamp = random_model(TINY).cuda().join(), dataclasses.replace(STRONG, train_every=2)
    sampling = dataclasses.replace(SHORT, n=6, max_new_tokens=38, **FILTERS[filters])
    monkeypatch.setattr(decode.Run.__init__, "__defaults__", (widths,))
    for setting in (None, STRONG, esamp, CLOSED):
        expected = generate(model, PROMPTS, sampling, setting, eos_ids=EOS, plain=True)
        close(generate(model, PROMPTS, sampling, setting, eos_ids=EOS), expected)


# ------------------------------------------------------------------------------
# batches that shrink
# ------------------------------------------------------------------------------

@pytest.mark.parametrize("train_every", [1, 2, 5])
@pytest.mark.parametrize("scope", ["prompt", "batch"])
@pytest.mark.parametrize("kind", [STRONG, CLOSED])
def test_finished_rows_leave_the_batch_and_nothing_else_changes(tiny, monkeypatch, train_every, scope, kind):
    esamp = dataclasses.replace(kind, train_every=train_every, scope=scope)
    sampling = dataclasses.replace(SHORT, n=6, max_new_tokens=30)
    eos = {4, 11, 20}
    rows, lower = [], tiny.lower
    expected = generate(tiny, PROMPTS, sampling, esamp, eos_ids=eos, plain=True)
    monkeypatch.setattr(tiny, "lower", lambda token, cache: (rows.append(len(token)), lower(token, cache))[1])
    found = generate(tiny, PROMPTS, sampling, esamp, eos_ids=eos)
    close(found, expected)
    for ours, theirs in zip(found.distillers.state(), expected.distillers.state(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    sizes = rows[1:]
    assert sizes[0] == 18 and sizes[-1] < 9 and sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 1


def test_some_distillers_leave_and_come_home():
    whole = Distiller(DistillerConfig(width=5, lr=1e-2), 4, 6)
    g = torch.Generator().manual_seed(0)
    taps = [torch.randn(4, 3, 6, generator=g) for _ in range(4)]
    live = torch.ones(4, 3, dtype=torch.bool)
    whole.train(taps[0], taps[1], live)
    index = torch.tensor([3, 1])
    some = whole.take(index)
    before = [x.clone() for x in whole.state()]
    some.train(taps[2][index], taps[3][index], live[index])
    assert all(torch.equal(a, b) for a, b in zip(before, whole.state(), strict=True))       # a copy
    whole.put(index, some)
    both = Distiller(DistillerConfig(width=5, lr=1e-2), 4, 6)
    both.train(taps[0], taps[1], live)
    both.train(taps[2], taps[3], live & torch.tensor([[False], [True], [False], [True]]))
    for ours, theirs in zip(whole.state(), both.state(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_a_window_keeps_the_pairs_of_rows_that_left():
    g, config = torch.Generator().manual_seed(0), DistillerConfig(width=5, lr=1e-2)
    taps = [(torch.randn(6, 6, generator=g), torch.randn(6, 6, generator=g)) for _ in range(4)]
    lives = [[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 0, 1], [0, 1, 0, 0, 0, 1]]
    lives = [torch.tensor(live).bool() for live in lives]
    ours, oracle = Distiller(config, 3, 6), Distiller(config, 3, 6)
    side, row_B = AsyncDistiller(ours, 6, 6, 4), torch.arange(6)
    for t, ((shallow, deep), live) in enumerate(zip(taps, lives, strict=True)):
        if t == 2:                                       # each Distiller keeps one row of two
            row_B = torch.tensor([1, 2, 5])
            side = side.fewer(t, torch.tensor([0, 1, 2]), row_B)
        if t == 3:                                       # the second leaves altogether
            row_B = torch.tensor([1, 5])
            side = side.fewer(t, torch.tensor([0, 2]), torch.tensor([0, 2]))
        side.predict(t, shallow[row_B])
        side.prediction()
        side.train(t, deep[row_B], live[row_B])
    side.finish()
    shallow, deep, live = (torch.stack(x).view(4, 3, 2, -1) for x in (*zip(*taps, strict=True), lives))
    live[:, 1] = False                                   # none of its rows reached the window's end
    by_distiller = [x.transpose(0, 1).flatten(1, 2) for x in (shallow, deep, live)]
    oracle.train(by_distiller[0], by_distiller[1], by_distiller[2][..., 0])
    assert ours.step_P.tolist() == [1, 0, 1]
    for one, other in zip(ours.state(), oracle.state(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


def test_a_void_step_leaves_the_window_and_the_distiller_as_they_were():
    """The host went on to steps 1, 2 and 3 before it learned that step 1 was void."""
    g, ends = torch.Generator().manual_seed(0), []
    taps = [(torch.randn(4, 6, generator=g), torch.randn(4, 6, generator=g)) for _ in range(3)]
    live = torch.tensor([True, True, True, False])
    for order in ([(0, True), (1, True), (2, True)],
                  [(0, True), (1, False), (2, False), (3, False), (1, True), (2, True)]):
        side = AsyncDistiller(Distiller(DistillerConfig(width=5, lr=1e-2), 2, 6), 4, 6, 3)
        for t, counts in order:
            shallow, deep = taps[t] if counts else taps[1]
            side.predict(t, shallow)
            side.prediction()
            side.train(t, deep, live & counts)
        side.finish()
        ends.append(side.distiller)
    assert ends[0].step_P.tolist() == [1, 1]
    assert all(torch.equal(a, b) for a, b in zip(ends[0].state(), ends[1].state(), strict=True))


# ------------------------------------------------------------------------------
# the forward pass
# ------------------------------------------------------------------------------

@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_joined_products_are_the_separate_ones(family):
    biased = dict(attention_bias=family == "llama", mlp_bias=family == "llama")
    config = dataclasses.replace(TINY, model_type=family, **biased)
    model, joined = random_model(config), random_model(config).join()
    tokens = torch.randint(0, 31, (3, 7), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(joined(tokens), model(tokens), rtol=1e-5, atol=1e-5)
    assert list(joined.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), joined.parameters(), strict=True))
    block = joined.model.layers[1]
    weight = block.self_attn.q_proj.joined[0]
    assert block.self_attn.k_proj.weight.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    half = joined.to(torch.bfloat16)                     # moved parameters are no views: joined no more
    assert half.model.layers[1].self_attn.q_proj.joined is None
    torch.testing.assert_close(half(tokens), random_model(config).to(torch.bfloat16)(tokens))


@pytest.mark.parametrize("rows", [1, 8, 9, 40, 256, 257])
@pytest.mark.parametrize("biased", [False, True])
def test_a_bf16_product_on_a_cpu_is_the_same_in_either_order(rows, biased):
    g = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, 1, 48, generator=g), torch.randn(33, 48, generator=g)
    bias = torch.randn(33, generator=g) if biased else None
    exact = torch.nn.functional.linear(x.bfloat16().double(), weight.bfloat16().double(),
                                       bias.bfloat16().double() if biased else None)
    found = product(x.bfloat16(), weight.bfloat16(), bias.bfloat16() if biased else None)
    assert found.shape == (rows, 1, 33) and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2 ** -7, atol=2 ** -4)


def test_head_at_some_tokens_is_the_heads(tiny):
    g = torch.Generator().manual_seed(0)
    x, ids = torch.randn(5, 24, generator=g), torch.randint(0, 31, (5, 7), generator=g)
    torch.testing.assert_close(tiny.head_at(x, ids), tiny.head(x).gather(-1, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 4])
def test_a_cache_goes_on_with_some_of_its_rows(tiny, monkeypatch, stride):
    prompts = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 0, 0, 0], [7, 7, 7, 0, 0]])
    cache = KVCache(tiny.config, 3, 5, "cpu", torch.float32)
    tiny(prompts, cache)
    whole = cache.repeat(2, [5, 2, 3], 12)
    for held in (whole.k_NBGME, whole.v_NBGME):
        held[..., 5:, :] = 0
    whole.stride = stride
    tokens = torch.arange(6)
    tiny(tokens[:, None], whole)
    rows = torch.tensor([1, 2, 5])
    fewer = whole.take(rows)
    for held in (fewer.k_NBGME, fewer.v_NBGME):
        held[..., 6:, :] = 0
    fewer.stride = stride
    expected, found = tiny(tokens[:, None] + 1, whole), tiny(tokens[rows, None] + 1, fewer)
    torch.testing.assert_close(found, expected[rows], rtol=1e-5, atol=1e-5)
    assert fewer.filled == whole.filled == 7 and int(fewer.next_1) == 7


def test_small_models_are_joined_when_they_are_loaded(stories_folder):
    assert model_module.load(stories_folder).model.layers[0].mlp.gate_proj.joined is not None
