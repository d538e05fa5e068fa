"""A Llama / Qwen2 / Qwen3 forward pass in Hugging Face's names, cut where ESamp taps it.

    token ──► embedding ──► block 0 ──► h¹ ──► blocks 1 … N−1 ──► final RMSNorm ──► h^L ──► lm_head ──► logits
              └──────── lower ───────┘        └────────────── upper ───────────────┘      └─ head ─┘

    h¹  (shallow)  `Model.lower`    the residual stream after the first block: the Distiller's input
    h^L (deep)     `Model.upper`    the final norm's *output*, so that the head is linear in it: its target
    W h (logits)   `Model.head`     one frozen matrix for both h^L and the Distiller's ĥ (paper, eqs. 4 and 5)

Shapes: B rows, L new positions, M cache slots, N layers, D width, H query heads, G kv heads, E head size,
V vocabulary. Every method that takes token_BL or x_BLD also takes one position per row (token_B, x_BD).

Dtypes: weights and activations have the dtype the model was loaded with; RMSNorm statistics, rotary angles
and the returned logits are fp32 (fp64 for an fp64 model).

Does not include: sliding windows, mixture of experts, quantised weights, RoPE other than default, linear and
llama3, training-time dropout. What is not implemented is refused by name, never approximated.
"""

import dataclasses
import json
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

# ------------------------------------------------------------------------------
# config.json
# ------------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROPE_TYPES = ("default", "linear", "llama3")
QWEN_DEFAULTS = dict(vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32,
                     num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=32768)
FAMILY_DEFAULTS = {                                     # what Hugging Face assumes for an absent key
    "llama": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                  num_attention_heads=32, num_key_value_heads=None, head_dim=None,
                  max_position_embeddings=2048),
    "qwen2": QWEN_DEFAULTS | dict(head_dim=None),
    "qwen3": QWEN_DEFAULTS | dict(head_dim=128),
}


def read_json(path):
    """The JSON object in a file; ValueError or OSError in one line that names the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model in config.json's names; `ModelConfig.read(folder)` makes one from a checkpoint."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False                        # biases on q, k, v and o (Qwen2: on q, k, v only)
    mlp_bias: bool = False
    rope_type: str = "default"
    rope_theta: float = 10000.0
    rope_factor: float = 1.0                            # linear and llama3
    rope_low_freq_factor: float = 1.0                   # llama3 from here on
    rope_high_freq_factor: float = 4.0
    rope_original_context: int = 8192
    dtype: torch.dtype | None = None                    # of the checkpoint; None: whatever its tensors have

    def __post_init__(self):
        if self.model_type not in FAMILY_DEFAULTS:
            raise ValueError(f"model_type {self.model_type!r} is not implemented; "
                             f"accepted: {', '.join(FAMILY_DEFAULTS)}")
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"RoPE type {self.rope_type!r} is not implemented; "
                             f"accepted: {', '.join(ROPE_TYPES)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if field.type is int and not (whole and 0 < value < 2 ** 24):
                raise ValueError(f"{field.name} is {value!r}; expected a whole number from 1 to 2^24 - 1")
            if field.type is float:
                if not ((whole or isinstance(value, float)) and 0 < value < 1e300):
                    raise ValueError(f"{field.name} is {value!r}; expected a positive number")
                object.__setattr__(self, field.name, float(value))
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{field.name} is {value!r}; expected true or false")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embeddings need an even one")
        if self.rope_type == "llama3" and self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise ValueError(f"llama3 RoPE: high_freq_factor {self.rope_high_freq_factor} must exceed "
                             f"low_freq_factor {self.rope_low_freq_factor}")

    @classmethod
    def read(cls, folder):
        """The config of a checkpoint folder; ValueError or OSError names the file and the value at fault."""
        path = Path(folder) / "config.json"
        if not Path(folder).is_dir():
            what = "is a file, not a folder" if Path(folder).exists() else "does not exist"
            raise ValueError(f"model folder {str(folder)!r} {what}; "
                             "expected a folder with config.json and *.safetensors")
        if not path.is_file():
            raise ValueError(f"{folder} has no config.json; expected a Hugging Face checkpoint folder")
        try:
            return cls.from_dict(read_json(path))
        except ValueError as error:
            raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw):
        """The config from config.json's content, in either spelling of RoPE and dtype; see `read`."""
        family = raw.get("model_type")
        if not isinstance(family, str) or family not in FAMILY_DEFAULTS:
            raise ValueError(f"model_type {family!r} is not implemented; "
                             f"accepted: {', '.join(FAMILY_DEFAULTS)}")
        refuse_unimplemented(raw)
        values = {name: raw.get(name, default) for name, default in FAMILY_DEFAULTS[family].items()}
        if values["num_key_value_heads"] is None:
            values["num_key_value_heads"] = values["num_attention_heads"]
        if values["head_dim"] is None:
            width, heads = values["hidden_size"], values["num_attention_heads"]
            if not (isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads == 0):
                raise ValueError(f"hidden_size {width!r} is not a multiple of num_attention_heads {heads!r}")
            values["head_dim"] = width // heads
        for name in ("rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias"):
            if raw.get(name) is not None:
                values[name] = raw[name]
        return cls(model_type=family, dtype=read_dtype(raw), **read_rope(raw, values), **values)


def refuse_unimplemented(raw):
    """ValueError for a config.json whose model we would run wrongly."""
    if not isinstance(raw.get("layer_types") or [], list):
        raise ValueError(f"layer_types is {raw['layer_types']!r}; expected a list")
    if raw.get("quantization_config"):
        raise ValueError("quantization_config is set; quantised weights are not implemented "
                         "(fp32, fp16, bf16 are)")
    if raw.get("use_sliding_window") or set(map(str, raw.get("layer_types") or ())) - {"full_attention"}:
        raise ValueError("a sliding window is in use; only full attention in every layer is implemented")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {raw['hidden_act']!r} is not implemented; accepted: silu")


def read_dtype(raw):
    """torch.dtype of `dtype` (new spelling) or `torch_dtype` (old); None where neither is given."""
    name = raw.get("dtype") or raw.get("torch_dtype")
    if name is not None and str(name) not in DTYPES:
        raise ValueError(f"dtype {name!r} is not implemented; accepted: {', '.join(DTYPES)}")
    return DTYPES.get(name)


def read_rope(raw, values):
    """The rope_* fields from `rope_parameters` (new spelling) or `rope_theta` + `rope_scaling` (old)."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"the RoPE parameters are {rope!r}; expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if str(kind) not in ROPE_TYPES:
        raise ValueError(f"RoPE type {kind!r} is not implemented; accepted: {', '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise ValueError("partial_rotary_factor is not implemented; accepted: 1")
    found = {"rope_type": kind, "rope_theta": rope.get("rope_theta", raw.get("rope_theta", 10000.0))}
    needed = {"default": (), "linear": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    for name in needed[kind]:
        if name not in rope:
            raise ValueError(f"{kind} RoPE needs {name!r}, which is missing")
        found[f"rope_{name}"] = rope[name]
    if kind == "llama3":
        default = values["max_position_embeddings"]
        found["rope_original_context"] = rope.get("original_max_position_embeddings", default)
    return found


# ------------------------------------------------------------------------------
# the parts of a block
# ------------------------------------------------------------------------------

def rope_frequencies(config):
    """1/θ^(2i/E) for i < E/2, stretched as config.rope_type says: fp32 (E/2,), radians per position."""
    i = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float()
    frequency = 1.0 / config.rope_theta ** (i / config.head_dim)
    if config.rope_type == "linear":
        return frequency / config.rope_factor
    if config.rope_type == "llama3":                    # long waves stretched, short kept, a ramp between
        turns = config.rope_original_context * frequency / (2 * math.pi)
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * frequency + (1 - keep) * frequency / config.rope_factor
    return frequency


def rotate(x_BHLE, cos_B1LE, sin_B1LE):
    """Rotary embedding in the half-split layout of Hugging Face: component i turns with component i + E/2.

        half-split (here)    x = [a₀ a₁ a₂ … | b₀ b₁ b₂ …]     pair i = (x[i], x[i + E/2])
        interleaved (Meta)   x = [a₀ b₀ a₁ b₁ a₂ b₂ …]         pair i = (x[2i], x[2i + 1])

    sin_B1LE is negative in its first half: [a | b]·cos + [b | a]·sin = [a cos − b sin | b cos + a sin].
    """
    a, b = x_BHLE.chunk(2, dim=-1)
    return torch.addcmul(x_BHLE * cos_B1LE, torch.cat((b, a), dim=-1), sin_B1LE)


def rotation(position_L, frequency, dtype):
    """cos and sin at positions, (L, E) each, as `rotate` takes them."""
    angle_Le = position_L[:, None] * frequency
    cos, sin = angle_Le.cos(), angle_Le.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def product(x_D, weight_VD, bias_V=None):
    """x Wᵀ + b: (…, D) → (…, V), the one product that all weights go through.

    A bf16 product on a CPU rearranges its right operand first. With a few rows that costs more than the rest,
    so it is written as (W xᵀ)ᵀ, where the right operand is x; the output's last axis is then strided.
    """
    rows = x_D.numel() // x_D.shape[-1] if x_D.is_cpu and x_D.dtype == torch.bfloat16 else 0
    if not 8 < rows <= 256:
        return F.linear(x_D, weight_VD, bias_V)
    x_DB = x_D.reshape(rows, -1).T
    y_VB = weight_VD @ x_DB if bias_V is None else torch.addmm(bias_V[:, None], weight_VD, x_DB)
    return y_VB.T.unflatten(0, x_D.shape[:-1])


def bare(module_class):
    """A module that is called without the machinery for hooks, which costs as much as a small layer does."""
    module_class.__call__ = module_class.forward
    return module_class


@bare
class Linear(nn.Linear):
    """x Wᵀ + b; `joined` is one (weight, bias) for this layer and its neighbours, where `join` made one."""

    joined = None

    def reset_parameters(self):
        """PyTorch's init, unless there is no memory to initialise: that would take a second to import."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x):
        """(…, D) → (…, V)."""
        return product(x, self.weight, self.bias).contiguous()


class Embedding(nn.Embedding):
    """Rows of a table."""

    def reset_parameters(self):
        """As `Linear`'s."""
        if not self.weight.is_meta:
            super().reset_parameters()


def join(*layers):
    """Puts the weights of layers with one input behind each other in memory; theirs become views of that."""
    sizes = [layer.out_features for layer in layers]
    joined = torch.cat([layer.weight for layer in layers]), None
    for layer, weight in zip(layers, joined[0].split(sizes), strict=True):
        layer.weight = nn.Parameter(weight, requires_grad=False)
    if layers[0].bias is not None:
        joined = joined[0], torch.cat([layer.bias for layer in layers])
        for layer, bias in zip(layers, joined[1].split(sizes), strict=True):
            layer.bias = nn.Parameter(bias, requires_grad=False)
    layers[0].joined = joined


def together(x, *layers):
    """The layers' outputs for one input, side by side: one product where they are joined."""
    if layers[0].joined is None:
        return torch.cat([product(x, layer.weight, layer.bias) for layer in layers], dim=-1)
    return product(x, *layers[0].joined).contiguous()


def rms_norm(x, weight, eps):
    """x / √(mean x² + ε) · weight over the last axis, statistics in fp32, the cast back before the weight."""
    if weight.dim() == 1 and x.dtype in (torch.float32, torch.float64):
        return torch.rms_norm(x, weight.shape, weight, eps)
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.rms_norm(wide, x.shape[-1:], None, eps).to(x.dtype) * weight


@bare
class RMSNorm(nn.Module):
    """`rms_norm` with a weight for each component."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        """Normalises the last axis; any leading shape."""
        return rms_norm(x, self.weight, self.eps)


@bare
class Attention(nn.Module):
    """Causal grouped-query attention: query head h reads kv head h // (H/G)."""

    def __init__(self, config, layer):
        super().__init__()
        D, E = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        bias = config.attention_bias or config.model_type == "qwen2"
        self.layer, self.head_dim, self.heads = layer, E, (H, G)
        self.q_proj = Linear(D, H * E, bias=bias)
        self.k_proj = Linear(D, G * E, bias=bias)
        self.v_proj = Linear(D, G * E, bias=bias)
        self.o_proj = Linear(H * E, D, bias=config.attention_bias and config.model_type != "qwen2")
        qk_norm = config.model_type == "qwen3"
        self.joined_hE = None
        self.q_norm = RMSNorm(E, config.rms_norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(E, config.rms_norm_eps) if qk_norm else None

    def norm_hE(self):
        """q_norm's weight for every query head, k_norm's for every kv head: (H + G, E)."""
        if self.joined_hE is not None:
            return self.joined_hE
        (H, G), E = self.heads, self.head_dim
        return torch.cat((self.q_norm.weight.expand(H, E), self.k_norm.weight.expand(G, E)))

    def forward(self, x_BLD, place, cache):
        """Attends to everything up to each position; appends the new keys and values to the cache, if any."""
        (B, L, _), E, (H, G) = x_BLD.shape, self.head_dim, self.heads
        qkv_BLhE = together(x_BLD, self.q_proj, self.k_proj, self.v_proj).view(B, L, H + 2 * G, E)
        qk_BLhE, v_BLGE = qkv_BLhE.split_with_sizes((H + G, G), dim=2)
        if self.q_norm is not None:
            qk_BLhE = rms_norm(qk_BLhE, self.norm_hE(), self.q_norm.eps)
        q_BHLE, k_BGLE = rotate(qk_BLhE.transpose(1, 2), *place.rope).split_with_sizes((H, G), dim=1)
        v_BGLE = v_BLGE.transpose(1, 2)
        if cache is not None:
            k_BGLE, v_BGLE = cache.write(self.layer, k_BGLE, v_BGLE, place)
        seen = None if place.seen_BLM is None else place.seen_BLM[:, None]
        if L > 1:
            mixed_BHLE = F.scaled_dot_product_attention(q_BHLE, k_BGLE, v_BGLE, attn_mask=seen,
                                                        is_causal=seen is None, enable_gqa=True)
            return self.o_proj(mixed_BHLE.transpose(1, 2).flatten(-2))
        q_BGqE = q_BHLE.reshape(B, G, H // G, E)        # one token: a group's heads are its queries
        mixed_BGqE = F.scaled_dot_product_attention(q_BGqE, k_BGLE, v_BGLE, attn_mask=seen)
        return self.o_proj(mixed_BGqE.reshape(B, 1, -1))


@bare
class MLP(nn.Module):
    """down(silu(gate x) ⊙ up x)."""

    def __init__(self, config):
        super().__init__()
        D, F_, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(D, F_, bias=bias)
        self.up_proj = Linear(D, F_, bias=bias)
        self.down_proj = Linear(F_, D, bias=bias)

    def forward(self, x):
        """Any leading shape."""
        if self.gate_proj.joined is None:
            gate, up = (product(x, layer.weight, layer.bias) for layer in (self.gate_proj, self.up_proj))
        else:
            gate, up = product(x, *self.gate_proj.joined).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


@bare
class Block(nn.Module):
    """x + attention(norm x), then x + MLP(norm x)."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BLD, place, cache):
        """One block of the residual stream."""
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), place, cache)
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))


# ------------------------------------------------------------------------------
# the cache
# ------------------------------------------------------------------------------

@dataclass
class Place:
    """Where L new tokens of each row sit, which slots each may see (None: all, or causal), their rotation."""

    slot_L: torch.Tensor
    seen_BLM: torch.Tensor | None
    rope: tuple                                         # cos, sin (B or 1, 1, L, E)


class KVCache:
    """Keys and values of every layer. Rows are flush on the right: the next token of all goes to one slot.

        slot       0    1    2    3    4    5
        row 0    [ The  cat  sat  down ·    ·  ]        start_B 0
        row 1    [ ·    ·    A    dog  ·    ·  ]        start_B 2: its token i sits in slot start + i
                                       ↑ next_1 = 4, on the device; `filled` is the same on the host

    Attention reads no more than the filled part of the allocation: exactly that on a CPU. Elsewhere `reach`
    grows in strides, behind a mask, so that a CUDA graph serves many steps; a stride is at least 64 slots,
    and as many as hold a sixteenth of the weights' bytes.
    """

    def __init__(self, config, rows, slots, device, dtype):
        self.config = config
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, slots, config.head_dim)
        exact = torch.device(device).type == "cpu"      # no slot is read before it is written
        made = torch.empty if exact else torch.zeros    # a masked NaN would still be one
        self.k_NBGME, self.v_NBGME = (made(shape, device=device, dtype=dtype) for _ in range(2))
        self.next_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.start_B, self.filled, self.stride, self.places = None, 0, 1, {}
        self.rope_2ME = None                            # cos and sin of every position, once asked for
        if not exact:
            N, B, G, _, E = shape
            mlp, heads = 3 * config.intermediate_size, 2 * E * (config.num_attention_heads + G)
            weights = config.hidden_size * (N * (mlp + heads) + config.vocab_size)
            self.stride = 64 * max(1, weights // 16 // (64 * 2 * N * B * G * E))

    @property
    def reach(self):
        """The slots that attention reads when the next token has been written."""
        return min(-(-(self.filled + 1) // self.stride) * self.stride, self.k_NBGME.shape[3])

    def place(self, length, frequency):
        """The `Place` of the next `length` tokens of every row; made once for all layers."""
        slots, E = self.k_NBGME.shape[3:]
        if self.filled + length > slots:
            raise ValueError(f"{self.filled} + {length} tokens do not fit into a cache of {slots} slots")
        if length not in self.places:
            slot_L = self.next_1 + torch.arange(length, device=self.next_1.device)
            position_BL, seen_BLM = slot_L[None], None
            if self.filled and (length > 1 or self.stride > 1 or self.start_B is not None):
                slot_M = torch.arange(max(self.reach, self.filled + length), device=slot_L.device)
                seen_BLM = (slot_M <= slot_L[:, None])[None]
                if self.start_B is not None:
                    seen_BLM = seen_BLM & (slot_M >= self.start_B[:, None])[:, None]
            if self.start_B is not None:
                position_BL = slot_L - self.start_B[:, None]
            if self.rope_2ME is None:
                every_M = torch.arange(slots, device=slot_L.device)
                self.rope_2ME = torch.stack(rotation(every_M, frequency, self.k_NBGME.dtype))
            rope_2B1LE = self.rope_2ME.index_select(1, position_BL.flatten()).view(2, -1, 1, length, E)
            self.places = {length: Place(slot_L, seen_BLM, rope_2B1LE.unbind())}
        return self.places[length]

    def write(self, layer, k_BGLE, v_BGLE, place):
        """Writes one layer's new keys and values; returns all that rows may see, (B, G, M, E)."""
        k_BGME, v_BGME, length = self.k_NBGME[layer], self.v_NBGME[layer], k_BGLE.shape[2]
        if self.stride == 1:                            # the host knows the slots, and a slice is faster
            k_BGME.narrow(2, self.filled, length).copy_(k_BGLE)
            v_BGME.narrow(2, self.filled, length).copy_(v_BGLE)
        else:
            k_BGME.index_copy_(2, place.slot_L, k_BGLE)
            v_BGME.index_copy_(2, place.slot_L, v_BGLE)
        if self.filled == 0:
            return k_BGLE, v_BGLE
        reach = max(self.reach, self.filled + length)
        return k_BGME.narrow(2, 0, reach), v_BGME.narrow(2, 0, reach)

    def advance(self, length):
        """Every row has `length` more tokens."""
        self.next_1 += length
        self.filled, self.places = self.filled + length, {}

    def repeat(self, samples, lengths, slots):
        """The cache of `samples` rows per prompt, with room for `slots`, after one prefill of all prompts.

        What `lengths` says is prompt is copied, flush on the right; the padding behind it is forgotten.
        """
        N, P, G, _, E = self.k_NBGME.shape
        wider = KVCache(self.config, P * samples, slots, self.next_1.device, self.k_NBGME.dtype)
        longest = max(lengths)
        for old, new in ((self.k_NBGME, wider.k_NBGME), (self.v_NBGME, wider.v_NBGME)):
            new_NPKGME = new.view(N, P, samples, G, slots, E)
            for p, length in enumerate(lengths):
                new_NPKGME[:, p, :, :, :longest - length] = 0                       # seen by nobody
                new_NPKGME[:, p, :, :, longest - length:longest] = old[:, p, None, :, :length]
        if min(lengths) < longest:
            start_P = torch.tensor([longest - length for length in lengths], device=self.next_1.device)
            wider.start_B = start_P.repeat_interleave(samples)
        wider.advance(longest)
        return wider

    def take(self, row_B):
        """The cache of some of the rows, with the same room."""
        slots = self.k_NBGME.shape[3]
        fewer = KVCache(self.config, len(row_B), slots, self.next_1.device, self.k_NBGME.dtype)
        for old, new in ((self.k_NBGME, fewer.k_NBGME), (self.v_NBGME, fewer.v_NBGME)):
            new[:, :, :, :self.filled] = old.narrow(3, 0, self.filled).index_select(1, row_B)
        fewer.start_B = None if self.start_B is None else self.start_B[row_B]
        fewer.advance(self.filled)
        return fewer


# ------------------------------------------------------------------------------
# the model
# ------------------------------------------------------------------------------

class Model(nn.Module):
    """A decoder-only transformer; parameter names are those of the checkpoint."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.frequency = rope_frequencies(config)

    def _apply(self, fn, recurse=True):
        """Follows the parameters to another device, but never to a coarser dtype: angles are fp32."""
        super()._apply(fn, recurse)
        for layer in self.modules():
            if isinstance(layer, Linear):
                layer.joined = None                     # the parameters are no longer views of it
            if isinstance(layer, Attention):
                layer.joined_hE = None
        self.frequency = self.frequency.to(self.head_weight.device)
        return self

    def join(self):
        """One product instead of three for q, k, v, and of two for gate, up; frozen weights, same names."""
        for block in self.model.layers:
            attention = block.self_attn
            join(attention.q_proj, attention.k_proj, attention.v_proj)
            attention.joined_hE = attention.norm_hE() if attention.q_norm is not None else None
            join(block.mlp.gate_proj, block.mlp.up_proj)
        return self

    @property
    def head_weight(self):
        """W (V, D): lm_head's own matrix, or the embedding where the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def _run(self, x_BLD, layers, cache):
        """x through some blocks; positions come from the cache, or count from 0 without one."""
        length = x_BLD.shape[1]
        if cache is None:
            slot_L = torch.arange(length, device=x_BLD.device)
            place = Place(slot_L, None, rotation(slot_L, self.frequency, x_BLD.dtype))
        else:
            place = cache.place(length, self.frequency)
        for layer in layers:
            x_BLD = layer(x_BLD, place, cache)
        return x_BLD

    def lower(self, token_BL, cache=None):
        """h¹ = block 0 of the embedded tokens: (B, L) ids → (B, L, D). Writes layer 0 of the cache."""
        if token_BL.dim() == 1:
            return self.lower(token_BL[:, None], cache)[:, 0]
        return self._run(self.model.embed_tokens(token_BL), self.model.layers[:1], cache)

    def upper(self, shallow_BLD, cache=None):
        """h^L = norm(blocks 1 … N−1 of h¹), both (B, L, D); writes the other layers, moves the cache on."""
        if shallow_BLD.dim() == 2:
            return self.upper(shallow_BLD[:, None], cache)[:, 0]
        deep_BLD = self.model.norm(self._run(shallow_BLD, self.model.layers[1:], cache))
        if cache is not None:
            cache.advance(shallow_BLD.shape[1])
        return deep_BLD

    def head(self, x_D):
        """logits = W x, linear in x (eqs. 4, 5): (…, D) → fp32 (…, V); x is cast to W's dtype first."""
        logits_V = product(x_D.to(self.head_weight.dtype), self.head_weight).contiguous()
        return logits_V.to(torch.promote_types(logits_V.dtype, torch.float32))

    def head_at(self, x_BD, token_BC):
        """`head`, only at some tokens of each row: (B, D), (B, C) ids → fp32 (B, C)."""
        weight_BCD = F.embedding(token_BC, self.head_weight)
        logits_BC = (weight_BCD @ x_BD.to(weight_BCD.dtype)[:, :, None])[:, :, 0]
        return logits_BC.to(torch.promote_types(logits_BC.dtype, torch.float32))

    def forward(self, token_BL, cache=None):
        """head(upper(lower(tokens))): (B, L) ids → (B, L, V) logits; differentiable without a cache."""
        return self.head(self.upper(self.lower(token_BL, cache), cache))


# ------------------------------------------------------------------------------
# the checkpoint
# ------------------------------------------------------------------------------

HUB_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
             "chat_template.jinja", "model*.safetensors", "model.safetensors.index.json"]


def find(name):
    """The folder of a model given as a folder or as `Org/Name` on the Hugging Face hub.

    The local cache comes first, then the download. Only config, tokenizer and safetensors files are fetched;
    offline and absent is a ValueError.
    """
    if Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)):
        return Path(name)
    import huggingface_hub  # slow to import, and only needed here
    try:
        folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
        rest = all((folder / name).is_file() for name in ("config.json", "tokenizer.json"))
        if weight_files(folder) and rest:
            return folder
    except (OSError, ValueError):                       # not in the cache, or an interrupted download
        pass
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:                          # the client raises many kinds, none of them ours
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{name!r} is no folder here, not in the local Hugging Face cache, and could not be "
                         f"downloaded ({reason})") from None


def weight_files(folder):
    """The safetensors files of a checkpoint, and the tensor names its index promises (empty without one)."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"], set()
    if not index.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        what = (f" but the pickle {pickles[0]}, which is never loaded: convert it to safetensors"
                if pickles else " and no model.safetensors.index.json")
        raise ValueError(f"{folder} has no model.safetensors{what}")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise ValueError(f"{index}: weight_map is missing or malformed; expected tensor name → file name")
    for name in sorted(set(names.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}; expected a .safetensors file beside the index")
        if not (folder / name).is_file():
            raise ValueError(f"{index} names {name}, which is not there")
    return [folder / name for name in sorted(set(names.values()))], set(names)


@contextmanager
def opened(path, device="cpu"):
    """An open safetensors file; what is wrong with it is a ValueError that names it."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from None


def catalogue(folder, model):
    """{file: names of the tensors to take from it}, from the headers alone.

    Every tensor is accounted for, both ways: ValueError for one that is missing, unexpected, misshapen or not
    floating point, with its file and the shapes.
    """
    expected, found = {name: tuple(p.shape) for name, p in model.named_parameters()}, {}
    files, promised = weight_files(folder)
    for path in files:
        found[path] = []
        with opened(path) as file:
            for name in file.keys():
                promised.discard(name)
                if is_redundant(name, model.config):
                    continue
                if name not in expected:
                    raise ValueError(f"{path}: unexpected tensor {name} "
                                     f"for a {model.config.model_type} of this config")
                stored, shape = file.get_slice(name), expected.pop(name)
                if tuple(stored.get_shape()) != shape:
                    raise ValueError(f"{path}: {name} has shape {tuple(stored.get_shape())}; "
                                     f"the config asks for {shape}")
                if stored.get_dtype() not in ("F32", "F16", "BF16"):
                    raise ValueError(f"{path}: {name} is stored as {stored.get_dtype()}; "
                                     "accepted: F32, F16, BF16")
                found[path].append(name)
    absent = sorted({*expected, *promised})
    if absent:
        others = f", and {len(absent) - 1} more" * (len(absent) > 1)
        indexed = " although the index names it" * (absent[0] in promised)
        raise ValueError(f"{folder}: tensor {absent[0]} is missing{others}{indexed}")
    return found


def is_redundant(name, config):
    """A tensor that real checkpoints carry and the model does not need: a tied head, old rotary tables."""
    return (name == "lm_head.weight" and config.tie_word_embeddings) or name.endswith(".rotary_emb.inv_freq")


def blank(config):
    """The model without memory for its weights, on the meta device."""
    with torch.device("meta"):
        return Model(config)


def load(folder, device="cpu", dtype=None):
    """The model of a checkpoint folder, its weights frozen, tensor by tensor straight to the device.

    dtype None keeps the checkpoint's (config.json's, else the first tensor's). ValueError as in `catalogue`,
    and for a tensor that is not finite. On a CPU a weight whose dtype does not change *is* the mapped file:
    host memory holds the model once, and the file must not be overwritten while the model is in use. So a CPU
    joins (`Model.join`) only small models' weights, which a copy hardly doubles.
    """
    config = ModelConfig.read(folder)
    model = blank(config)
    for path, names in catalogue(folder, model).items():
        with opened(path, device) as file:
            for name in names:
                tensor = file.get_tensor(name)
                if not torch.stack(torch.aminmax(tensor)).isfinite().all():
                    raise ValueError(f"{path}: {name} holds NaN or infinity")
                dtype = dtype or config.dtype or tensor.dtype
                owner, _, leaf = name.rpartition(".")
                weight = nn.Parameter(tensor.to(device, dtype), requires_grad=False)
                setattr(model.get_submodule(owner), leaf, weight)
    model.frequency = model.frequency.to(device)
    small = sum(p.nbytes for p in model.parameters()) < 2 ** 28
    return model.eval().join() if small or torch.device(device).type != "cpu" else model.eval()
