"""ESamp's equations as pure functions of tensors (Exploratory Sampling, arXiv:2604.24927).

A tiny network, the Distiller, learns during decoding to predict an LLM's last hidden state from its first
layer's. Where a trained one fails, the context is unlike those it has seen; the error, seen through the LLM's
own head, says which tokens make it so:

    h^L  deep hidden state, the head's input        π_ref   softmax(ref), the LLM's distribution
    ĥ    the Distiller's prediction of h^L          π_new   softmax(new), what ESamp draws from
    W    the LLM's head, (V, D)                     β       strength of the push; 0 is vanilla
    ref  W h^L, reference logits                    e       h^L − ĥ, the prediction error
    dist W ĥ, the Distiller's logits                u       one uniform number per row and token

    eq.  1, 2   π_new maximises E[r] − KL(π ‖ π_ref)/β with
                r = log π_ref − log q_dist                                       `reweight`
    eq.  3      ĥ = f_φ(h¹)                                                      `distiller.Distiller.predict`
    eq.  4, 5   ref = W h^L, dist = W ĥ                                          `model.Model.head`
    eq.  6, 7   π_new ∝ π_ref^(1+β) / q_dist^β, new = (1+β)·ref − β·dist         `reweight`
    eq.  8      new = W((1+β)·h^L − β·ĥ): one product where nothing is filtered  `mix_hidden`
    eq.  9      ‖e‖, the novelty of a context                                    `novelty`
    eq. 10      the Distiller's loss                                             `distiller.loss`
    Algorithm 1 candidates from ref, before fusion                               `keep_mask`, `candidates`
                z ~ softmax(new / T), its noise an argument                      `draw`, `uniform`

Shapes: B rows, V vocabulary, D width. Any float dtype; half precision is raised to fp32 where it enters,
`draw` works in fp64. No module, no randomness, no device code. One step in numbers (V = 4, D = 2, β = 0.5):

    >>> W = torch.tensor([[1., 0.], [0., 1.], [1., 1.], [-1., 0.]])
    >>> deep, predicted = torch.tensor([[2., 1.]]), torch.tensor([[1., 1.]])
    >>> ref, dist = deep @ W.T, predicted @ W.T
    >>> ref.tolist(), dist.tolist()
    ([[2.0, 1.0, 3.0, -2.0]], [[1.0, 1.0, 2.0, -1.0]])
    >>> keep = keep_mask(ref, temperature=1.0, top_k=3)
    >>> reweight(ref, dist, 0.5, keep).tolist()                  # up by half of ref − dist = (1, 0, 1, −1)
    [[2.5, 1.0, 3.5, -inf]]
    >>> (mix_hidden(deep, predicted, 0.5) @ W.T).tolist()        # eq. 8: the same, before the filter
    [[2.5, 1.0, 3.5, -2.5]]
    >>> novelty(deep, predicted).tolist()
    [1.0]
    >>> u = torch.tensor([0.32], dtype=torch.float64)
    >>> draw(ref, u, 1.0).tolist(), draw(reweight(ref, dist, 0.5, keep), u, 1.0).tolist()
    ([1], [2])
"""

import torch

# ------------------------------------------------------------------------------
# who may be drawn, and with what logits
# ------------------------------------------------------------------------------

def keep_mask(ref_BV, temperature=1.0, top_k=None, top_p=None, min_p=None, outside_B1=0.0):
    """The candidates: top-k, then top-p, then min-p of softmax(ref/T), each over the last one's survivors.

    Bool (B, V); None switches a filter off. Equal logits keep the lower token id, the largest logit always
    survives, T = 0 filters at T = 1. The paper filters ref before fusion and never after it (Algorithm 1).
    outside_B1: weight that top-p counts although its tokens are not shown, Σ exp((ref − largest)/T), fp64.
    """
    if top_k is None and top_p is None and min_p is None:
        return torch.ones_like(ref_BV, dtype=torch.bool)
    if top_k is None and top_p is None:                  # the order does not matter
        return over(ref_BV, temperature or 1.0).exp() >= min_p
    sorted_BV, order_BV = at_least_fp32(ref_BV).sort(dim=-1, descending=True, stable=True)
    weight_BV = over(sorted_BV, temperature or 1.0).exp()                           # the largest weighs 1
    keep_BV = torch.ones_like(weight_BV, dtype=torch.bool)
    if top_k is not None:
        keep_BV[:, top_k:] = False
    if top_p is not None and top_p < 1:
        left_BV = weight_BV * keep_BV
        before_BV = left_BV.cumsum(-1, dtype=torch.float64) - left_BV
        total_B1 = left_BV.sum(-1, keepdim=True, dtype=torch.float64) + outside_B1
        keep_BV &= before_BV < top_p * total_B1
    if min_p is not None:
        keep_BV &= weight_BV >= min_p
    return torch.zeros_like(keep_BV).scatter(-1, order_BV, keep_BV)


def candidates(ref_BV, width, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """`keep_mask` looked for among the `width` largest logits only → (ids, keep, whole).

    ids (B, C) ascend in each row, C = min(width, V); keep (B, C) is `keep_mask` there; whole (B,) says that
    nothing was missed: all that is kept lies above all that was left out. Where it is False, look wider.
    """
    width = min(width, ref_BV.shape[-1])
    id_BC = ref_BV.topk(width, dim=-1, sorted=False).indices.sort(dim=-1).values
    ref_BC, outside_B1 = ref_BV.gather(-1, id_BC), 0.0
    if top_p is not None and top_k is None:              # a top-k would cut it off before top-p counts
        total_B1, inside_B1 = (over(x, temperature or 1.0).exp().sum(-1, keepdim=True, dtype=torch.float64)
                               for x in (ref_BV, ref_BC))
        outside_B1 = total_B1 - inside_B1
    keep_BC = keep_mask(ref_BC, temperature, top_k, top_p, min_p, outside_B1)
    if width == ref_BV.shape[-1]:
        return id_BC, keep_BC, torch.ones_like(keep_BC[:, 0])
    lowest_B1 = ref_BC.amin(-1, keepdim=True)            # what is left out is no larger
    if top_p is not None and top_k is not None and top_k > width:
        lowest_B1 = torch.full_like(lowest_B1, torch.inf)                # top-p would count what is not here
    return id_BC, keep_BC, ~(keep_BC & (ref_BC <= lowest_B1)).any(-1)


def reweight(ref_BV, dist_BV, beta, keep_BV=None):
    """new = (1 + β)·ref − β·dist on the candidates, −inf elsewhere (eq. 7); (B, V), fp32 at least."""
    mixed_BV = (1 + beta) * at_least_fp32(ref_BV) - beta * at_least_fp32(dist_BV)
    if keep_BV is None:
        return mixed_BV
    return mixed_BV.masked_fill(~keep_BV, -torch.inf)            # mask last: (−inf) − (−inf) is NaN


def mix_hidden(deep_BD, predicted_BD, beta):
    """h_mix = (1 + β)·h^L − β·ĥ, so W h_mix = new (eqs. 7, 8): one head product where no filter is set."""
    return (1 + beta) * at_least_fp32(deep_BD) - beta * at_least_fp32(predicted_BD)


def novelty(deep_BD, predicted_BD):
    """‖e‖ = ‖h^L − ĥ‖ (B,), the push's length in hidden space: Δlogit_z = β·‖w_z‖·‖e‖·cos(w_z, e) (eq. 9)."""
    return torch.linalg.vector_norm(at_least_fp32(deep_BD) - at_least_fp32(predicted_BD), dim=-1)


def divergence(new_BV, ref_BV, temperature):
    """KL(π_new ‖ π_ref) in nats and the total variation ½ Σ|π_new − π_ref|, both (B,), at temperature T.

    −inf marks a token that is no candidate; the candidates of new must be among those of ref. At T = 0 both
    are point masses: 0 and 0 where they agree, infinity and 1 where they do not.
    """
    if temperature == 0:
        differ_B = new_BV.argmax(-1) != ref_BV.argmax(-1)
        return torch.where(differ_B, torch.inf, 0.0), differ_B.float()
    log_new_BV = over(new_BV, temperature).log_softmax(-1)
    log_ref_BV = over(ref_BV, temperature).log_softmax(-1)
    new_BV, ref_BV = log_new_BV.exp(), log_ref_BV.exp()
    gap_BV = torch.where(new_BV > 0, log_new_BV - log_ref_BV, 0.0)
    return (new_BV * gap_BV).sum(-1), (new_BV - ref_BV).abs().sum(-1) / 2


def over(logits_BV, temperature):
    """(logits − the row's largest)/T: the same softmax, and no NaN however small or large T > 0 is."""
    logits_BV = at_least_fp32(logits_BV)
    span = torch.finfo(logits_BV.dtype)
    gap_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
    return gap_BV if temperature == 1 else gap_BV / min(max(temperature, span.tiny), span.max)


def at_least_fp32(x):
    """x in fp32, or in fp64 where it was already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ------------------------------------------------------------------------------
# the noise is an argument
# ------------------------------------------------------------------------------

def draw(logits_BV, uniform_B, temperature):
    """The first z with cdf(z) > u·cdf(V−1), cdf over ascending ids of exp(logits/T) in fp64: int64 (B,).

    z follows softmax(logits/T) when u is uniform on [0, 1); −inf is never drawn. T = 0 is the largest logit,
    the lowest id among equals, whatever u. A NaN row gives some id in range: whoever made it must look.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    cdf_BV = over(logits_BV.double(), temperature).exp_().cumsum(-1)
    token_B1 = torch.searchsorted(cdf_BV, uniform_B[:, None] * cdf_BV[:, -1:], right=True)
    return token_B1[:, 0].clamp(max=logits_BV.shape[1] - 1)


def uniform(seed, prompt_B, sample_B, step):
    """u ∈ [0, 1), fp64 (B,): 53 bits that are a pure function of (seed, prompt, sample, step).

    h ← 0; h ← mix(h ⊕ k) for the four keys in that order; u = (h's top 53 bits) / 2⁵³. prompt and sample are
    int64 tensors of 0-based indices (prompt: in the whole input, not in its batch), seed and step ints or
    tensors; step 0 draws the token after the prompt. The same row gets the same noise in any batch, on any
    device, in any port.
    """
    h_B = torch.zeros_like(prompt_B)
    for key in (seed, prompt_B, sample_B, step):
        h_B = splitmix(h_B ^ key)
    return shift(h_B, 11).double() / 2.0 ** 53


def splitmix(x):
    """One step of SplitMix64 on int64 tensors read as unsigned: products wrap (arithmetic modulo 2⁶⁴)."""
    x = x + (0x9E3779B97F4A7C15 - 2 ** 64)
    x = (x ^ shift(x, 30)) * (0xBF58476D1CE4E5B9 - 2 ** 64)
    x = (x ^ shift(x, 27)) * (0x94D049BB133111EB - 2 ** 64)
    return x ^ shift(x, 31)


def shift(x, bits):
    """x ≫ bits with zeros coming in, although int64 has a sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


# ((seed, prompt, sample, step), u·2⁵³), from unbounded integers: for ports to check themselves against
KNOWN_UNIFORMS = (
    ((0, 0, 0, 0), 1167743916529920),
    ((0, 0, 0, 1), 1488610488974510),
    ((0, 0, 1, 0), 7667852325583471),
    ((0, 1, 0, 0), 7379942997291785),
    ((1, 0, 0, 0), 7969478176095689),
    ((0, 0, 0, 2), 2797602792993077),
    ((0, 0, 15, 255), 5013158932721481),
    ((41, 0, 0, 0), 3460918375564425),
    ((42, 0, 0, 0), 6803937899977611),
    ((43, 0, 0, 0), 4365869950592621),
    ((42, 3, 7, 11), 7509153350892551),
    ((42, 7, 3, 11), 1169408647423330),
    ((42, 11, 7, 3), 2262837313001562),
    ((7, 1000, 63, 4095), 3790260890383170),
    ((123456789, 29, 15, 131071), 6497794371710860),
    ((2147483648, 1, 2, 3), 5061678129290533),
    ((4294967301, 2147483648, 1048576, 131072), 7018416134397133),
    ((9007199254740992, 0, 1, 1), 8397250079374671),
    ((4611686018427387905, 999999, 1023, 7), 1858772704717522),
    ((9223372036854775807, 1099511627776, 1048576, 1048576), 192487925297210),
)
