"""The forward pass: against transformers (recorded; live if installed), against itself, on real weights."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import SHARED, TINY, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from model import KVCache, ModelConfig, RMSNorm, load, rope_frequencies

FIXTURES = sorted(p for p in (Path(__file__).parent / "fixtures").iterdir() if p.is_dir())


@pytest.fixture(params=FIXTURES, ids=lambda p: p.name)
def recorded(request):
    """(our model, what transformers computed with the same weights)."""
    return load(request.param), load_file(request.param / "expected.safetensors")


def watch(monkeypatch, model, path):
    """The list that collects a submodule's outputs; ours are called without hooks."""
    seen, module = [], model.get_submodule(path)
    plain = type(module).__call__

    def call(self, *args):
        out = plain(self, *args)
        if self is module:
            seen.append(out)
        return out
    monkeypatch.setattr(type(module), "__call__", call)
    return seen


# fp32 with the same operations in the same order: differences are last bits of a few sums of 24 … 48 products
CLOSE = dict(rtol=2e-5, atol=2e-5)


def test_every_part_equals_transformers(recorded, monkeypatch):
    model, expected = recorded
    parts = {"embed": "model.embed_tokens", "norm0": "model.layers.0.input_layernorm",
             "attention0": "model.layers.0.self_attn", "mlp0": "model.layers.0.mlp",
             "block1": "model.layers.1"}
    seen = {part: watch(monkeypatch, model, path) for part, path in parts.items()}
    shallow = model.lower(expected["tokens"])
    deep = model.upper(shallow)
    for part, outputs in seen.items():
        torch.testing.assert_close(outputs[0], expected[part], **CLOSE,
                                   msg=lambda m, part=part: f"{part}: {m}")
    torch.testing.assert_close(shallow, expected["block0"], **CLOSE)         # hidden_states[1]
    torch.testing.assert_close(deep, expected["deep"], **CLOSE)              # last_hidden_state
    torch.testing.assert_close(model.head(deep), expected["logits"], **CLOSE)
    assert torch.equal(model(expected["tokens"]), model.head(deep))
    assert expected["logits"].std() > 0.5                 # the comparison is not about zeros
    angle = torch.arange(29)[:, None] * model.frequency
    torch.testing.assert_close(torch.cat([angle, angle], -1).cos(), expected["cos"][0], **CLOSE)
    torch.testing.assert_close(torch.cat([angle, angle], -1).sin(), expected["sin"][0], **CLOSE)


def test_greedy_ids_equal_transformers(recorded):
    model, expected = recorded
    cache = KVCache(model.config, 3, 41, "cpu", torch.float32)
    token = model(expected["tokens"][:, :11], cache)[:, -1].argmax(-1)
    ids = [token]
    for _ in range(29):
        token = model(token, cache).argmax(-1)
        ids.append(token)
    assert torch.equal(torch.stack(ids, 1), expected["greedy"])


def test_norm_statistics_are_fp32_in_a_bf16_model():
    norm = RMSNorm(512, 1e-6).bfloat16()
    x = (30 * torch.randn(7, 512, generator=torch.Generator().manual_seed(0))).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), exact.bfloat16()) or (norm(x) != exact.bfloat16()).float().mean() < 1e-3
    coarse = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    assert (coarse != exact.bfloat16()).float().mean() > 0.05                # what bf16 statistics would give


def test_head_is_linear_and_nothing_but_a_product(tiny):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 24, generator=g) for _ in range(2))
    assert torch.equal(tiny.head(a), a @ tiny.lm_head.weight.T)
    torch.testing.assert_close(tiny.head(a) + tiny.head(b), tiny.head(a + b), rtol=0, atol=1e-5)


@given(st.integers(0, 999), st.lists(st.integers(1, 5), min_size=1, max_size=4))
@settings(max_examples=25)
def test_cached_equals_uncached_in_any_chunks(tiny, seed, chunks):
    tokens = torch.randint(0, 31, (3, sum(chunks)), generator=torch.Generator().manual_seed(seed))
    cache, at, parts = KVCache(tiny.config, 3, sum(chunks) + 2, "cpu", torch.float32), 0, []
    for length in chunks:
        parts.append(tiny(tokens[:, at:at + length], cache))
        at += length
    torch.testing.assert_close(torch.cat(parts, 1), tiny(tokens), rtol=1e-5, atol=1e-5)


def ragged(model, prompts, steps, K=2):
    """Logits of `steps` fixed tokens after prompts of different lengths, K rows each: (B, steps + 1, V)."""
    lengths = [len(p) for p in prompts]
    padded = torch.tensor([p + [0] * (max(lengths) - len(p)) for p in prompts])
    cache = KVCache(model.config, len(prompts), padded.shape[1], "cpu", torch.float32)
    last = torch.tensor(lengths) - 1
    first = model(padded, cache)[torch.arange(len(prompts)), last].repeat_interleave(K, 0)
    cache = cache.repeat(K, lengths, padded.shape[1] + steps)
    tokens = torch.arange(len(prompts) * K)[:, None] + torch.arange(steps) * 3
    return torch.stack([first] + [model(tokens[:, i] % 31, cache) for i in range(steps)], 1), tokens % 31


def test_prompts_of_different_lengths_share_a_batch(tiny):
    prompts = [[1, 2, 3, 4, 5, 6, 7], [9], [4, 4, 8]]
    together, tokens = ragged(tiny, prompts, 5)
    for row in range(6):
        prompt = prompts[row // 2]
        alone = tiny(torch.tensor([prompt + tokens[row].tolist()]))[0, len(prompt) - 1:]
        torch.testing.assert_close(together[row], alone, rtol=1e-5, atol=1e-5)   # batch size: rounding


def test_a_neighbours_content_changes_nothing(tiny):
    one, _ = ragged(tiny, [[1, 2, 3, 4, 5], [9, 8], [4, 4, 8]], 5)
    other, _ = ragged(tiny, [[7, 7, 7, 7, 30], [9, 8], [0, 1, 2]], 5)
    assert torch.equal(one[2:4], other[2:4]) and not torch.equal(one[:2], other[:2])


def test_forward_is_differentiable_and_fp64_stays_fp64():
    config = dataclasses.replace(TINY, num_hidden_layers=2)
    model = random_model(config, dtype=torch.float64).requires_grad_(True)
    tokens = torch.randint(0, 31, (2, 6), generator=torch.Generator().manual_seed(1))
    value = model(tokens).square().mean()
    value.backward()
    assert value.dtype == torch.float64
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name
    weight, step = model.model.layers[0].self_attn.k_proj.weight, 1e-6
    with torch.no_grad():
        weight[1, 2] += step
        slope = (model(tokens).square().mean() - value).item() / step
        assert slope == pytest.approx(weight.grad[1, 2].item(), rel=1e-3)


def test_stories_equal_the_golden_greedy_ids(stories, stories_folder):
    for case in json.loads((stories_folder / "golden_greedy.json").read_text())["cases"]:
        ids = case["greedy_ids"]
        cache = KVCache(stories.config, 1, len(case["prompt_ids"]) + len(ids), "cpu", torch.float32)
        token, found = stories(torch.tensor([case["prompt_ids"]]), cache)[:, -1].argmax(-1), []
        for _ in ids:
            found.append(token.item())
            token = stories(token, cache).argmax(-1)
        assert found == ids


def test_stories_mean_nll(stories, stories_folder):
    from tokenizers import Tokenizer
    text, total, count = Tokenizer.from_file(str(stories_folder / "tokenizer.json")), 0.0, 0
    for line in (SHARED / "evals" / "tinystories_sample.jsonl").read_text().splitlines():
        story = json.loads(line)
        ids = text.encode(story["prompt"] + " " + story["reference"]).ids[:512]
        tokens = torch.tensor([ids])
        logits = stories(tokens)[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
        count += len(ids) - 1
    assert total / count == pytest.approx(1.266, abs=0.002)


# ------------------------------------------------------------------------------
# config.json
# ------------------------------------------------------------------------------

def test_both_spellings_of_config_json_are_one_config():
    new = dict(model_type="llama", hidden_size=64, num_attention_heads=4, dtype="bfloat16",
               rope_parameters=dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0,
                                    high_freq_factor=4.0, original_max_position_embeddings=8192))
    old = dict(model_type="llama", hidden_size=64, num_attention_heads=4, torch_dtype="bfloat16",
               rope_theta=5e5,
               rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                 original_max_position_embeddings=8192))
    oldest = dict(old, rope_scaling={**old["rope_scaling"], "type": "llama3"})
    del oldest["rope_scaling"]["rope_type"]
    assert ModelConfig.from_dict(new) == ModelConfig.from_dict(old) == ModelConfig.from_dict(oldest)
    assert ModelConfig.from_dict(new).dtype == torch.bfloat16 and ModelConfig.from_dict(new).rope_theta == 5e5


def test_missing_keys_take_hugging_faces_defaults():
    llama, qwen2, qwen3 = (ModelConfig.from_dict(dict(model_type=m)) for m in ("llama", "qwen2", "qwen3"))
    assert (llama.vocab_size, llama.intermediate_size, llama.max_position_embeddings) == (32000, 11008, 2048)
    assert (llama.num_key_value_heads, llama.head_dim) == (32, 128)
    assert (llama.rms_norm_eps, llama.rope_theta) == (1e-6, 1e4)
    assert (qwen2.vocab_size, qwen2.intermediate_size) == (151936, 22016)
    assert qwen2.max_position_embeddings == 32768
    narrow = ModelConfig.from_dict(dict(model_type="qwen3", hidden_size=1024, num_key_value_heads=8))
    assert narrow.head_dim == 128 and qwen3.head_dim == 128 and not qwen3.tie_word_embeddings
    assert ModelConfig.from_dict(dict(model_type="llama", num_attention_heads=16)).num_key_value_heads == 16


def test_real_configs_are_read():
    folder = SHARED / "configs"
    if not folder.is_dir():
        pytest.skip("real configs are not at ../shared/data/configs")
    read = {p.name: ModelConfig.read(p) for p in sorted(folder.iterdir())}
    distilled = read["DeepSeek-R1-Distill-Qwen-1.5B"]
    assert (distilled.model_type, distilled.head_dim, distilled.rope_theta) == ("qwen2", 128, 1e4)
    assert (read["Llama-3.2-1B"].rope_type, read["Llama-3.2-1B"].rope_factor) == ("llama3", 32.0)
    assert (read["Qwen3-0.6B"].head_dim, read["Qwen3-0.6B"].hidden_size) == (128, 1024)
    assert read["Qwen2.5-0.5B-Instruct"].tie_word_embeddings


def test_rope_stretches_as_its_type_says():
    base = rope_frequencies(TINY)
    linear = rope_frequencies(dataclasses.replace(TINY, rope_type="linear", rope_factor=4.0))
    torch.testing.assert_close(linear, base / 4)
    wide = dataclasses.replace(TINY, head_dim=64, rope_type="llama3", rope_factor=8.0,
                               rope_original_context=256)
    found, plain = rope_frequencies(wide), rope_frequencies(dataclasses.replace(wide, rope_type="default"))
    turns = 256 * plain / (2 * math.pi)
    assert torch.equal(found[turns > 4], plain[turns > 4])
    torch.testing.assert_close(found[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any() and ((found > plain / 8) & (found < plain))[between].all()


# ------------------------------------------------------------------------------
# live, where transformers is installed
# ------------------------------------------------------------------------------

@st.composite
def shapes(draw):
    """Keyword arguments of a small Hugging Face config of a random family, in odd sizes."""
    family = draw(st.sampled_from(["Llama", "Qwen2", "Qwen3"]))
    G, per = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    E = 2 * draw(st.integers(1, 5))
    kw = dict(num_key_value_heads=G, num_attention_heads=G * per, hidden_size=G * per * E,
              intermediate_size=draw(st.integers(3, 40)), num_hidden_layers=draw(st.integers(1, 4)),
              vocab_size=draw(st.integers(5, 90)), tie_word_embeddings=draw(st.booleans()),
              max_position_embeddings=64, rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6])))
    if family == "Qwen3":
        kw["head_dim"] = 2 * draw(st.integers(1, 9))
    if family != "Qwen2":
        kw["attention_bias"] = draw(st.booleans())
    if family == "Llama":
        kw["mlp_bias"] = draw(st.booleans())
    rope = dict(rope_type=draw(st.sampled_from(["default", "linear", "llama3"])),
                rope_theta=draw(st.sampled_from([1e2, 1e4])))
    if rope["rope_type"] != "default":
        rope["factor"] = draw(st.sampled_from([2.0, 8.0]))
    if rope["rope_type"] == "llama3":
        rope.update(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
    return family, dict(kw, rope_parameters=rope), draw(st.integers(0, 99))


def test_live_transformers_on_drawn_configs(tmp_path_factory):
    transformers = pytest.importorskip("transformers")

    @given(shapes())
    @settings(max_examples=30)
    def check(shape):
        family, kw, seed = shape
        close = dict(rtol=1e-4, atol=1e-4)
        torch.manual_seed(seed)
        config = getattr(transformers, f"{family}Config")(**kw)
        theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for name, weight in theirs.named_parameters():
                weight.normal_(1.0 if "norm" in name else 0.0, 0.3)
        folder = tmp_path_factory.mktemp("live")
        theirs.save_pretrained(folder)
        ours = load(folder)
        tokens = torch.randint(0, kw["vocab_size"], (2, 13))
        with torch.no_grad():
            expected = theirs(tokens, output_hidden_states=True)
            if kw["num_hidden_layers"] > 1:              # their last entry is behind the final norm
                torch.testing.assert_close(ours.lower(tokens), expected.hidden_states[1], **close)
            torch.testing.assert_close(ours.upper(ours.lower(tokens)), expected.hidden_states[-1], **close)
            torch.testing.assert_close(ours(tokens), expected.logits, **close)
    check()
