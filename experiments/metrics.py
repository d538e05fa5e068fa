"""What the tables count: success, diversity, coherence, and how sure a difference is.

    success      `pass_at_k`, `maj_at_k`               of n samples of one problem
    diversity    `vendi`, `mean_cosine`                of the embeddings of one prompt's samples
                 `distinct_n`, `self_bleu`             of their token ids
    coherence    `score`, `perplexity`                 under any model, teacher-forced at T = 1
    one step     `entropy`, `kl`                       of next-token distributions, in nats
    certainty    `interval`, `above_frontier`          95 % bootstrap over problems or prompts

A sampler that only sharpens or flattens the distribution moves *along* vanilla's curve of diversity against
perplexity, which its temperature draws. So `above_frontier` compares at equal perplexity, not with T = 1, and
resamples the same prompts for all points: prompts differ far more from one another than samplers do.

Shapes: N texts, D width of an embedding, B rows, V vocabulary, P prompts, F points of a curve,
E all points, R resamples, T tokens of an answer. All is fp64, except in `score`'s model.
"""

import math
import random
from collections import Counter

import torch
import torch.nn.functional as F

from esamp import divergence

ROWS = 16                                               # of a batch that `score` computes at once
UNSEEN = 0.1                                            # what `self_bleu` counts instead of no match


# ------------------------------------------------------------------------------
# success
# ------------------------------------------------------------------------------

def subset_of(k, n):
    """ValueError unless 1 ≤ k ≤ n."""
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}; accepted: 1 to the number of samples, {n}")


def pass_at_k(n, correct, k):
    """1 − C(n − c, k) / C(n, k): the chance that k of n samples, c of them correct, hold a correct one."""
    subset_of(k, n)
    if not 0 <= correct <= n:
        raise ValueError(f"correct is {correct}; accepted: 0 to the number of samples, {n}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def maj_at_k(answers, truth, k, draws=200, seed=0):
    """The share of `draws` seeded k-subsets of the answers whose commonest answer is the truth.

    answers: hashable, one per sample; None does not vote. A truth tied with m − 1 others counts 1/m.
    """
    subset_of(k, len(answers))
    source, credit = random.Random(f"majority {seed}"), 0.0
    for _ in range(draws):
        votes = Counter(answer for answer in source.sample(answers, k) if answer is not None)
        top = max(votes.values(), default=0)
        if top and votes[truth] == top:
            credit += 1 / sum(count == top for count in votes.values())
    return credit / draws


# ------------------------------------------------------------------------------
# diversity
# ------------------------------------------------------------------------------

def similarities(embedding_ND):
    """K = X Xᵀ (N, N) in fp64; ValueError unless every row of X is a unit vector."""
    embedding_ND = embedding_ND.double()
    norm_N = embedding_ND.norm(dim=-1)
    if not bool(((norm_N - 1).abs() < 1e-3).all()):
        raise ValueError(f"embeddings have norms from {norm_N.min():.4g} to {norm_N.max():.4g}; accepted: 1")
    return embedding_ND @ embedding_ND.T


def vendi(embedding_ND, q=1.0):
    """exp(−Σ λ log λ), or 1/λ_max at q = ∞, over the eigenvalues λ of K/N: the effective number of texts.

    1 where all texts are one, N where all are orthogonal. The score's usual order is 1; the
    paper's values fit q = ∞ (inferred: 16/(1 + 15·Sim) comes within 0.03 of each).
    """
    share_N = torch.linalg.eigvalsh(similarities(embedding_ND) / len(embedding_ND)).clamp(min=0)
    if q == 1:
        return torch.special.entr(share_N).sum().exp().item()
    if q == math.inf:
        return 1 / share_N[-1].item()
    raise ValueError(f"q is {q!r}; accepted: 1, inf")


def mean_cosine(embedding_ND):
    """Σ_{i<j} K_ij / (N(N − 1)/2): the mean similarity of two different texts ("Sim." in the paper)."""
    N = len(embedding_ND)
    if N < 2:
        raise ValueError(f"{N} embeddings have no pairs; accepted: at least 2")
    return similarities(embedding_ND).triu(diagonal=1).sum().item() / (N * (N - 1) / 2)


def n_grams(tokens, n):
    """How often each run of n tokens occurs."""
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def distinct_n(token_lists, n):
    """Different n-grams / all n-grams, over all texts together."""
    counts = Counter()
    for tokens in token_lists:
        counts.update(n_grams(tokens, n))
    if not counts:
        raise ValueError(f"no text has an n-gram of n = {n} tokens")
    return len(counts) / counts.total()


def self_bleu(token_lists, n=4):
    """Mean BLEU-n of each text against all others, bp · exp(mean log p_i): 1 for copies, 0 for strangers.

    p_i is the clipped precision of i-grams, i = 1 … n as far as the text has any, all weighted alike; bp is
    the brevity penalty for the other text of the nearest length (of two, the shorter). Smoothing: an order
    above 1 without a match counts as 0.1 matches. A text that shares no token with the others has BLEU 0.
    """
    if len(token_lists) < 2:
        raise ValueError(f"{len(token_lists)} texts have no others; accepted: at least 2")
    lengths, total = [len(tokens) for tokens in token_lists], 0.0
    by_order = zip(*(precisions(token_lists, order) for order in range(1, n + 1)), strict=True)
    for i, found in enumerate(by_order):
        found = [p for p in found if p is not None]
        if found and found[0] > 0:
            nearest = min(lengths[:i] + lengths[i + 1:], key=lambda x, own=lengths[i]: (abs(x - own), x))
            brevity = min(1, math.exp(1 - nearest / lengths[i]))
            total += brevity * math.exp(sum(map(math.log, found)) / len(found))
    return total / len(token_lists)


def precisions(token_lists, order):
    """Each text's Σ_g min(count of g, its largest in another text) / Σ_g count; None without n-grams."""
    counts_N, held, found = [n_grams(tokens, order) for tokens in token_lists], {}, []
    for gram, count in (item for counts in counts_N for item in counts.items()):
        held[gram] = sorted((count, *held.get(gram, (0, 0))))[1:]       # second largest count, largest
    for counts in counts_N:
        matched = sum(min(c, held[g][0] if held[g][1] == c else held[g][1]) for g, c in counts.items())
        least = UNSEEN if order > 1 else 0
        found.append(max(matched, least) / counts.total() if counts else None)
    return found


# ------------------------------------------------------------------------------
# coherence
# ------------------------------------------------------------------------------

@torch.no_grad()
def score(model, prompts, samples, first_prompt=0):
    """(−Σ log softmax(logits)[token] in nats, tokens) of each sample under `model` at T = 1: a list.

    prompts: lists of ids, the first is that of sample.prompt = first_prompt; a sample's EOS counts. Samples
    of similar length share a batch, padded on the right: a real token sees only what is left of it. The head
    meets the positions that predict a sample's tokens, one sample at a time, so that V may be large.
    """
    device, context = model.head_weight.device, model.config.max_position_embeddings
    texts = []
    for s in samples:
        if not 0 <= s.prompt - first_prompt < len(prompts):
            raise ValueError(f"a sample is of prompt {s.prompt}; accepted: {first_prompt} to "
                             f"{first_prompt + len(prompts) - 1}")
        prompt, answer = list(prompts[s.prompt - first_prompt]), list(s.token_ids)
        if not prompt or len(prompt) + len(answer) > context:
            raise ValueError(f"prompt {s.prompt}, sample {s.sample} has {len(prompt)} + {len(answer)} "
                             f"tokens; accepted: at least 1 + 0, at most {context} together")
        texts.append((prompt, answer))
    order, scored = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i]))), [None] * len(texts)
    for start in range(0, len(order), ROWS):
        batch = order[start:start + ROWS]
        rows = [sum(texts[i], []) for i in batch]
        longest = max(map(len, rows))
        token_BL = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        deep_BLD = model.upper(model.lower(token_BL))
        for i, tokens_L, deep_LD in zip(batch, token_BL, deep_BLD, strict=True):
            begin, length = len(texts[i][0]), len(texts[i][1])
            logits_TV = model.head(deep_LD[begin - 1:begin + length - 1])
            nll_T = F.cross_entropy(logits_TV, tokens_L[begin:begin + length], reduction="none")
            scored[i] = (nll_T.double().sum().item(), length)
    return scored


def perplexity(pairs):
    """exp(Σ nll / Σ tokens) over (nll, tokens) pairs, as `score` returns them."""
    tokens = sum(count for _, count in pairs)
    if not tokens:
        raise ValueError("there are no tokens to take the perplexity of")
    return math.exp(sum(nll for nll, _ in pairs) / tokens)


def entropy(logits_BV):
    """−Σ p log p, p = softmax(logits): nats (B,); −inf marks a token that is no candidate."""
    return torch.special.entr(logits_BV.double().softmax(-1)).sum(-1)


def kl(new_BV, ref_BV):
    """Σ p_new (log p_new − log p_ref) of two rows of logits: nats (B,); `esamp.divergence` at T = 1."""
    return divergence(new_BV.double(), ref_BV.double(), 1.0)[0]


# ------------------------------------------------------------------------------
# certainty
# ------------------------------------------------------------------------------

def resamples(count, draws, seed):
    """`draws` seeded choices of `count` indices with replacement: (R, P)."""
    if count < 2:
        raise ValueError(f"{count} problems can not be resampled; accepted: at least 2")
    return torch.randint(count, (draws, count), generator=torch.Generator().manual_seed(seed))


def middle_95(value_R):
    """The 2.5 % and the 97.5 % quantile."""
    return tuple(value_R.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist())


def interval(values_P, draws=2000, seed=0):
    """(mean, low, high): the mean over problems and its 95 % percentile bootstrap.

    For a difference of two samplers pass the paired differences, one per problem. With few problems it is a
    little too narrow: a nominal 95 % is about 94 % at 60 of them.
    """
    value_P = torch.as_tensor(values_P, dtype=torch.float64)
    return value_P.mean().item(), *middle_95(value_P[resamples(len(value_P), draws, seed)].mean(-1))


def above_frontier(point, frontier, draws=2000, seed=0):
    """(difference, low, high): the point's diversity − the frontier's at its perplexity, 95 % bootstrap.

    point and each entry of frontier (vanilla at several temperatures): {"diversity", "nll", "tokens"}, lists
    of one figure per prompt. Diversity is their mean, perplexity exp(Σ nll / Σ tokens); straight lines join
    the frontier's points in order of perplexity. A resample takes the same prompts for all; where the point
    then leaves the frontier's range, the end segment goes on. None where it is outside to begin with.
    """
    diversity_EP, nll_EP, tokens_EP = columns([*frontier, point])
    choice_RP = resamples(diversity_EP.shape[1], draws, seed)
    choice_RP = torch.cat((torch.arange(choice_RP.shape[1])[None], choice_RP))        # first, all as they are
    perplexity_ER = (nll_EP[:, choice_RP].sum(-1) / tokens_EP[:, choice_RP].sum(-1)).exp()
    diversity_ER = diversity_EP[:, choice_RP].mean(-1)
    all_F, mine = perplexity_ER[:-1, 0], perplexity_ER[-1, 0]
    if len(all_F.unique()) < len(all_F):
        raise ValueError("two frontier points have the same perplexity; accepted: different temperatures")
    if not all_F.min() <= mine <= all_F.max():
        return None
    above_R = diversity_ER[-1] - on_curve(perplexity_ER[-1], perplexity_ER[:-1].T, diversity_ER[:-1].T)
    return above_R[0].item(), *middle_95(above_R[1:])


def columns(entries):
    """Diversity, nll and tokens of all points, (E, P) each; ValueError where they do not fit together."""
    if len(entries) < 3:
        raise ValueError(f"the frontier has {len(entries) - 1} points; accepted: at least 2")
    names = ("diversity", "nll", "tokens")
    lengths = {len(entry[name]) for entry in entries for name in names}
    if len(lengths) > 1:
        raise ValueError(f"lists per prompt have lengths {sorted(lengths)}; accepted: all the same")
    return (torch.tensor([entry[name] for entry in entries], dtype=torch.float64) for name in names)


def on_curve(x_R, x_RF, y_RF):
    """y at x on the piecewise linear curve through F points, one curve a row; end segments go on for ever."""
    x_RF, order_RF = x_RF.sort(dim=-1)
    y_RF = y_RF.gather(-1, order_RF)
    left_R1 = (torch.searchsorted(x_RF.contiguous(), x_R[:, None]) - 1).clamp(0, x_RF.shape[1] - 2)
    (x0_R, x1_R), (y0_R, y1_R) = (
        (all_RF.gather(-1, left_R1)[:, 0], all_RF.gather(-1, left_R1 + 1)[:, 0]) for all_RF in (x_RF, y_RF))
    slope_R = torch.where(x1_R > x0_R, (y1_R - y0_R) / (x1_R - x0_R), 0.0)
    return y0_R + slope_R * (x_R - x0_R)
