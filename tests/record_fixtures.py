"""Records tests/fixtures from transformers: tiny random checkpoints and what they compute, part by part.

Also the token ids of a few prompts under real tokenizers (from ../shared/data/configs, where at hand).

    pip install transformers && python tests/record_fixtures.py
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "fixtures"
SIZES = dict(vocab_size=67, intermediate_size=36, num_hidden_layers=3, max_position_embeddings=64)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
MODELS = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=2, **SIZES)),
    "llama3_tied": (transformers.LlamaForCausalLM, transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, rope_parameters=LLAMA3,
        tie_word_embeddings=True, **SIZES)),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(
        hidden_size=40, num_attention_heads=5, num_key_value_heads=1, **SIZES)),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=16, **SIZES)),
}
PARTS = {
    "embed": "model.embed_tokens", "norm0": "model.layers.0.input_layernorm",
    "attention0": "model.layers.0.self_attn", "mlp0": "model.layers.0.mlp", "block0": "model.layers.0",
    "block1": "model.layers.1", "deep": "model.norm",
}


def record(name):
    """One checkpoint in Hugging Face layout and `expected.safetensors` beside it."""
    torch.manual_seed(7)
    kind, config = MODELS[name]
    config.eos_token_id, config.bos_token_id = 2, 1
    model = kind(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in key else 0.0, 0.25)
    model.save_pretrained(FOLDER / name)
    (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
    expected = {"tokens": torch.randint(0, 67, (3, 29))}

    def keep(part):
        def hook(_module, _inputs, output):
            value = output[0] if isinstance(output, tuple) else output
            expected[part] = value.detach().clone().contiguous()
        return hook
    handles = [model.get_submodule(path).register_forward_hook(keep(part)) for part, path in PARTS.items()]
    with torch.no_grad():
        expected["logits"] = model(expected["tokens"]).logits
        for handle in handles:
            handle.remove()
        expected["cos"], expected["sin"] = model.model.rotary_emb(expected["embed"], torch.arange(29)[None])
        prompt = expected["tokens"][:, :11]
        expected["greedy"] = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                            max_new_tokens=30, min_new_tokens=30, eos_token_id=None)[:, 11:]
    top = expected["logits"].topk(2).values
    gap = (top[..., 0] - top[..., 1]).min().item()
    print(name, sum(p.numel() for p in model.parameters()), "smallest gap", gap)
    save_file({k: v.contiguous() for k, v in expected.items()}, FOLDER / name / "expected.safetensors",
              metadata={"transformers": transformers.__version__, "torch": torch.__version__})


TEXTS = ["Hello world", "", "  two  spaces\n\nnewline", "Café déjà vu 東京 🦄 e\u0301", "<|im_start|>user hi",
         "What is 12*7? Answer: \\boxed{}", "\u200b\x00 x", "<think>a</think>b"]


def record_ids():
    """token_ids.json: raw and templated ids of TEXTS for every real tokenizer."""
    real, recorded = FOLDER.parent.parent.parent / "shared" / "data" / "configs", {}
    for folder in sorted(real.iterdir()) if real.is_dir() else ():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        cases = [{"given": text, "ids": tokenizer(text)["input_ids"]} for text in TEXTS]
        for text in TEXTS if tokenizer.chat_template else ():
            user = {"role": "user", "content": text}
            reply = {"role": "assistant", "content": "<think>x</think>ok"}
            for chat in ([user], [{"role": "system", "content": "Be brief."}, user],
                         [user, reply, {"role": "user", "content": "more"}]):
                ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
                cases.append({"given": chat, "ids": ids})
        recorded[folder.name] = cases
    if recorded:
        text = json.dumps(recorded, ensure_ascii=False) + "\n"
        (FOLDER / "token_ids.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    record_ids()
    for each in MODELS:
        record(each)
    print(json.dumps({"transformers": transformers.__version__}))
