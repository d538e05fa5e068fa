"""Fixed Hypothesis profile, one thread (tiny tensors: a second only waits), small models that tests share."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))

from model import Model, ModelConfig, load  # noqa: E402

settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("fixed")
torch.set_num_threads(1)

TINY = ModelConfig(model_type="qwen3", vocab_size=31, hidden_size=24, intermediate_size=40,
                   num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=4,
                   max_position_embeddings=48)


def random_model(config, seed=0, dtype=torch.float32, scale=0.3):
    """A frozen model whose every weight is random, norms and biases too, and whose logits are well spread."""
    torch.manual_seed(seed)
    model = Model(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, scale)
    return model.to(dtype).requires_grad_(False).eval()


@pytest.fixture(scope="session")
def tiny():
    """A random Qwen3-style model: B, G ≠ H, odd sizes."""
    return random_model(TINY)


@pytest.fixture(scope="session")
def stories_folder():
    """The trained 260K-parameter story model, where it is at hand."""
    folder = SHARED / "stories260K"
    if not folder.is_dir():
        pytest.skip("stories260K is not at ../shared/data/stories260K")
    return folder


@pytest.fixture(scope="session")
def stories(stories_folder):
    """Its weights."""
    return load(stories_folder)


def write_checkpoint(folder, template=None, seed=0, **changes):
    """A tiny random checkpoint in Hugging Face layout with the bundled tokenizer; returns the folder."""
    bundled = ROOT / "checkpoints" / "countdown"
    config = dict(model_type="llama", vocab_size=24, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
                  num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=40, rms_norm_eps=1e-5,
                  tie_word_embeddings=False, eos_token_id=2, bos_token_id=1, torch_dtype="float32")
    folder.mkdir(parents=True, exist_ok=True)
    model = random_model(ModelConfig.from_dict(config | changes), seed)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | changes))
    shutil.copy(bundled / "tokenizer.json", folder)
    settings_ = json.loads((bundled / "tokenizer_config.json").read_text())
    extra = {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_ | extra))
    return folder
