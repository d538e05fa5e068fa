"""Ways to sample, on one interface: a `Setting` is a row of a table, `sample` draws with it.

    vanilla        softmax(ref/T) under top-k, top-p, min-p                        `decode.generate`
    esamp          the paper's method, with either Distiller and scope             `decode.generate`
    subtract       ref − β·dist: no fusion (paper, T2)                             `Policy.logits`
    gaussian       ESamp's error replaced by noise of the same norm (T10)          `Policy.logits`
    vocabulary     the Distiller trained on KL(π_ref ‖ q_dist) (T10), our reading  `Vocabulary`
    typical        locally typical sampling, mass typical_p                        `typical_mask`
    edt            T = T₀·0.8^(θ/H) for a distribution of entropy H, our reading   `Policy.logits`
    contrastive    (1+β)·ref − β·amateur where π_ref ≥ α·max π_ref                 `Policy.logits`

Knobs that compose with any of them: `first_temperature` makes the first token hot (FIRE; our reading: at
T = 30 among the 16 likeliest), `waves` draws the n samples in that many rounds, of which each gets the last
one's Distillers, `ramp` lets β grow to its value over the first steps. `distiller` also takes predictors that
exist only for comparison: `mean` (the running mean of h^L, no learning), `swiglu4` (four blocks), `mlp` (four
plain layers; T17), `rls_raw` (the closed form without its normalisation). OverRIDE is not here: its published
definition could not be checked.

All draw with the noise of `esamp.uniform`: two settings at the same seed differ by their mathematics alone
(of `waves`, in the first round; a later one has noise of its own).
Shapes as in `decode`.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import decode
from decode import ESampConfig, SamplingConfig, generate, in_range, masked, of_esamp, of_ref, prefill
from distiller import CHOICES, Batched, Distiller, LeastSquares, at_least_one
from esamp import draw, keep_mask, mix_hidden, novelty, over, reweight

PLAIN = ("vanilla", "typical", "edt", "contrastive")    # these have no Distiller
WITH_DISTILLER = ("esamp", "subtract", "gaussian", "vocabulary")
EDT_BASE = 0.8                                          # N of the entropy-adaptive temperature
FIRST_TOP_K = 16                                        # FIRE's candidates for its hot first token


@dataclass(frozen=True)
class Setting:
    """A row of a table. A ValueError names the knob out of range."""

    name: str
    method: str = "vanilla"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    beta: float = 0.25
    distiller: str = "swiglu"                           # or rls, rls_raw, mean, swiglu4, mlp
    scope: str = "prompt"
    width: int | None = None                            # None: the Distiller's own default, as for the rates
    lr: float | None = None
    ridge: float | None = None
    linear: int | None = None
    forget: float | None = None
    warm: bool | None = None
    ramp: int = 0                                       # steps until β has its value
    waves: int = 1                                      # rounds that share the Distillers
    first_temperature: float | None = None              # FIRE
    typical_p: float = 0.9                              # typical
    theta: float = 1.0                                  # edt, nats
    alpha: float = 0.1                                  # contrastive

    def __post_init__(self):
        for name, value, accepted in (("method", self.method, PLAIN + WITH_DISTILLER),
                                      ("distiller", self.distiller, (*CHOICES["kind"], *PREDICTORS))):
            if value not in accepted:
                raise ValueError(f"{name} is {value!r}; accepted: {', '.join(accepted)}")
        if self.method == "vocabulary" and self.distiller != "swiglu":
            raise ValueError(f"distiller is {self.distiller!r}; method vocabulary accepts swiglu alone")
        if self.warm and (self.distiller in PREDICTORS or self.method == "vocabulary"):
            raise ValueError("warm is True; only swiglu and rls can start on the prompt")
        at_least_one("waves", self.waves)
        in_range("ramp", self.ramp, 0, math.inf)
        in_range("theta", self.theta, 0, math.inf)
        for name in ("typical_p", "alpha"):
            in_range(name, getattr(self, name), 0, 1, above=True)
        if self.first_temperature is not None:
            in_range("first_temperature", self.first_temperature, 0, math.inf)
        self.sampling(1, 1, 0), self.esamp(0)

    def sampling(self, n, max_new_tokens, seed):
        """Its `SamplingConfig`."""
        return SamplingConfig(self.temperature, self.top_k, self.top_p, self.min_p, n, max_new_tokens, seed)

    def esamp(self, seed):
        """Its `ESampConfig`; None for a method without a Distiller."""
        if self.method in PLAIN:
            return None
        own = {name: getattr(self, name) for name in ("width", "lr", "ridge", "linear", "forget", "warm")}
        kind = {"rls": "rls", "rls_raw": "rls"}.get(self.distiller, "swiglu")
        return ESampConfig(beta=float(self.beta), kind=kind, scope=self.scope, seed=seed,
                           **{name: value for name, value in own.items() if value is not None})


def sample(model, prompts, setting, *, n, max_new_tokens, seed, eos_ids, first_prompt=0, amateur=None):
    """n samples of each prompt (lists of ids) → (list of `decode.Sample`, their `decode.Stats`).

    amateur: the small model of contrastive decoding. n must be a multiple of setting.waves.
    """
    if n % setting.waves:
        raise ValueError(f"n is {n}; expected a multiple of waves, {setting.waves}")
    each, esamp, distillers = n // setting.waves, setting.esamp(seed), None
    samples, stats = [], decode.Stats()
    for wave in range(setting.waves):
        if esamp and distillers is None:
            distillers = special_distillers(setting, esamp, model, len(prompts))
        result = generate(model, prompts, setting.sampling(each, max_new_tokens, seed + (wave << 32)), esamp,
                          eos_ids=eos_ids, first_prompt=first_prompt, distillers=distillers,
                          policy=policy_of(setting, amateur, prompts),
                          plain=setting.distiller in PREDICTORS or setting.method == "vocabulary")
        distillers = result.distillers
        samples += [dataclasses.replace(s, sample=s.sample + wave * each) for s in result.samples]
        stats += result.stats
    return sorted(samples, key=lambda s: (s.prompt, s.sample)), stats


def policy_of(setting, amateur, prompts):
    """The setting's `Policy`; None where `generate` itself does all that it asks for."""
    own = setting.method in ("subtract", "gaussian", "typical", "edt", "contrastive")
    if setting.method == "contrastive" and amateur is None:
        raise ValueError("method contrastive needs an amateur, a smaller model with the same vocabulary")
    if own or setting.first_temperature is not None or setting.ramp:
        return Policy(setting, amateur, prompts)
    return None


# ------------------------------------------------------------------------------
# steps of other methods
# ------------------------------------------------------------------------------

class Policy:
    """`decode.esamp_step` with the line that makes the new logits exchanged."""

    def __init__(self, setting, amateur, prompts):
        self.setting, self.amateur, self.prompts, self.cache = setting, amateur, prompts, None

    def first(self, run, ref_BV):
        """The first token: the plain LLM's, or hot."""
        rows, hot = run.rows, self.setting.first_temperature
        if hot is None:
            decode.first_token(run, ref_BV)
        else:
            new_BV = masked(ref_BV, keep_mask(ref_BV, hot, top_k=FIRST_TOP_K))
            token_B = draw(new_BV, rows.uniform_TB[0], hot)
            run.ledger.write(token_B, rows.live_B, of_ref(run, ref_BV, token_B))
            rows.advance(token_B)
        if self.setting.method == "contrastive":
            self.cache = prefill(self.amateur, self.prompts, rows.sampling.n, rows.steps)[0]

    def step(self, t, run):
        """From token t of every row to token t + 1."""
        setting, model, rows, side = self.setting, run.model, run.rows, run.side
        if setting.ramp:
            run.beta = setting.beta * min(1.0, t / setting.ramp)
        if setting.method in ("vanilla", "esamp", "vocabulary"):
            (decode.esamp_step if side else decode.vanilla_step)(t, run)
            return
        shallow_BD, predicted_BD = model.lower(rows.token_B, run.cache), None
        if side:
            side.predict(t, shallow_BD)
        deep_BD = model.upper(shallow_BD, run.cache)
        ref_BV, predicted_BD = model.head(deep_BD), side.prediction() if side else None
        new_BV = self.logits(t, run, ref_BV, deep_BD, predicted_BD)
        if side:
            side.train(t, deep_BD, rows.live_B)
        token_B = rows.draw(new_BV)
        figures = of_ref(run, ref_BV, token_B)
        if side:
            figures |= of_esamp(run, rows.live_B, token_B, shallow_BD, deep_BD, predicted_BD, new_BV,
                                masked(ref_BV, rows.keep(ref_BV)))
        run.ledger.write(token_B, rows.live_B, figures)
        rows.advance(token_B)

    def logits(self, t, run, ref_BV, deep_BD, predicted_BD):
        """What to draw from, before the division by T: (B, V), −inf for no candidate."""
        setting, model, keep_BV = self.setting, run.model, run.rows.keep(ref_BV)
        beta, method = setting.beta, setting.method
        if method == "subtract":
            return masked(ref_BV - beta * model.head(predicted_BD), keep_BV)
        if method == "gaussian":
            seed, first = run.rows.sampling.seed, run.rows.first_prompt
            source = torch.Generator().manual_seed(seed << 32 ^ first << 16 ^ t)
            noise_BD = torch.randn(deep_BD.shape, generator=source).to(deep_BD)
            error_BD = F.normalize(noise_BD, dim=-1) * novelty(deep_BD, predicted_BD)[:, None]
            return masked(model.head(mix_hidden(deep_BD, deep_BD - error_BD, beta)), keep_BV)
        if method == "typical":
            return masked(ref_BV, keep_BV & typical_mask(ref_BV, setting.temperature, setting.typical_p))
        if method == "edt":
            hot_B1 = EDT_BASE ** (setting.theta / entropy(ref_BV).clamp(min=1e-6))[:, None]
            return masked(over(ref_BV, 1.0) / hot_B1.clamp(min=1e-6), keep_BV)
        amateur_BV = self.amateur.head(self.amateur.upper(
            self.amateur.lower(run.rows.token_B, self.cache), self.cache))
        likely_BV = keep_mask(ref_BV, 1.0, min_p=setting.alpha)
        return reweight(ref_BV.log_softmax(-1), amateur_BV.log_softmax(-1), beta, keep_BV & likely_BV)


def entropy(logits_BV):
    """H(softmax(logits)) in nats (B,)."""
    log_BV = logits_BV.log_softmax(-1)
    return -(log_BV.exp() * log_BV).sum(-1)


def typical_mask(ref_BV, temperature, mass):
    """The smallest set of tokens, by |−log π − H| ascending, that holds `mass` of π = softmax(ref/T)."""
    log_BV = over(ref_BV, temperature or 1.0).log_softmax(-1)
    shift_BV = (-log_BV - entropy(over(ref_BV, temperature or 1.0))[:, None]).abs()
    order_BV = shift_BV.sort(dim=-1, stable=True).indices
    sorted_BV = log_BV.gather(-1, order_BV).exp()
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    return torch.zeros_like(order_BV, dtype=torch.bool).scatter(-1, order_BV, before_BV < mass)


# ------------------------------------------------------------------------------
# predictors that exist for comparison
# ------------------------------------------------------------------------------

class RunningMean(Batched):
    """ĥ = the mean of all h^L that were seen before: no learning, no look at h¹."""

    def __init__(self, config, prompts, width_D, device="cpu", dtype=torch.float32):
        super().__init__()
        self.config, self.width_D, self.dtype = config, width_D, dtype
        self.sum_PD = torch.zeros(prompts, width_D, device=device, dtype=dtype)
        self.seen_P, self.step_P = (torch.zeros(prompts, dtype=torch.int64, device=device) for _ in range(2))

    def state(self):
        """All that an update writes."""
        return [self.sum_PD, self.seen_P, self.step_P]

    def predict(self, shallow_PKD):
        """The mean for every row; 0 before the first pair."""
        mean_PD = self.sum_PD / self.seen_P.clamp(min=1)[:, None]
        return mean_PD[:, None].expand(shallow_PKD.shape)

    @torch.no_grad()
    def train(self, shallow_PKD, deep_PKD, live_PK):
        """Counts the live rows in."""
        self.sum_PD += torch.where(live_PK[..., None], deep_PKD, 0).sum(1)
        self.seen_P += live_PK.sum(1)
        self.step_P += live_PK.any(1)


class RawLeastSquares(LeastSquares):
    """The closed form on h¹ as it is, not divided by its rms."""

    def features(self, shallow_PKD):
        """F (P, K, F)."""
        gated_PKR = F.silu(shallow_PKD @ self.gate_DR) * (shallow_PKD @ self.up_DR)
        one_PK1 = torch.ones_like(gated_PKR[..., :1])
        return torch.cat((shallow_PKD @ self.project_DC, gated_PKR, one_PK1), dim=-1)


class FourBlocks(Distiller):
    """The paper's Distiller with four blocks instead of two (T17)."""

    blocks = 4


class Mlp(Distiller):
    """Four plain layers D → R → R → R → D with SiLU between: no gate, no residual (T17, our reading)."""

    def __init__(self, config, prompts, width_D, device="cpu", dtype=torch.float32):
        super().__init__(config, prompts, width_D, device, dtype)
        source, R = torch.Generator().manual_seed(config.seed), config.width
        del self.gate_up, self.down
        self.layers = nn.ParameterList()
        for rows, columns in ((R, width_D), (R, R), (R, R), (width_D, R)):
            values = torch.rand(rows, columns, generator=source, dtype=torch.float64) * 2 - 1
            values = (values / math.sqrt(columns)).to(device, dtype)
            self.layers.append(nn.Parameter(values.repeat(prompts, 1, 1)))
        self.first = [torch.zeros_like(p) for p in self.layers]
        self.second = [torch.zeros_like(p) for p in self.layers]

    def _forward(self, shallow_PKD):
        """ĥ with rows as columns; the inputs of all layers, and of their SiLUs."""
        x_PDK, trace = shallow_PKD.mT, []
        for layer, weight in enumerate(self.layers):
            inner_PRK = F.silu(x_PDK) if layer else x_PDK
            trace.append((x_PDK, inner_PRK))
            x_PDK = weight @ inner_PRK
        return x_PDK, trace

    def _gradients(self, slope_PDK, trace):
        """As the parent's, for plain layers."""
        factors = []
        for layer in reversed(range(len(self.layers))):
            x_PRK, inner_PRK = trace[layer]
            factors.insert(0, (slope_PDK, inner_PRK))
            share_PRK = x_PRK.sigmoid()
            slope_PDK = self.layers[layer].mT @ slope_PDK * share_PRK * (1 + x_PRK * (1 - share_PRK))
        squares = [((a.mT @ a) * (b.mT @ b)).sum((1, 2)) for a, b in factors]
        return factors, torch.stack(squares).sum(0).clamp(min=0).sqrt()


class Vocabulary(Distiller):
    """The paper's Distiller trained on KL(π_ref ‖ q_dist) through the frozen head instead of on ‖e‖²."""

    head_weight = None

    def slope(self, deep_PDK, predicted_PDK):
        """∂KL/∂ĥ = Wᵀ(q_dist − π_ref)."""
        W = self.head_weight
        return W.mT @ ((W @ predicted_PDK).softmax(1) - (W @ deep_PDK).softmax(1))


PREDICTORS = {"rls_raw": RawLeastSquares, "mean": RunningMean, "swiglu4": FourBlocks, "mlp": Mlp}


def special_distillers(setting, esamp, model, prompts):
    """The Distillers that `generate` would not make by itself; None where it does."""
    size = prompts if setting.scope == "prompt" else 1, model.config.hidden_size, model.head_weight.device
    if setting.method == "vocabulary":
        made = Vocabulary(esamp, *size)
        made.head_weight = model.head_weight.detach().float()
        return made
    return PREDICTORS[setting.distiller](esamp, *size) if setting.distiller in PREDICTORS else None
