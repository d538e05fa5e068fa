"""The Distiller learns, while an LLM decodes, to predict h^L from h¹: the paper's network, and a closed form.

    eq.  3    ĥ = f_φ(h¹)                                          `Distiller.predict`
    eq. 10    mean over live rows of ‖h^L − f_φ(h¹)‖²              `loss`
    E.2       two gated blocks, each x + down(silu(gate x) ⊙ up x), D → 384 → D      `Distiller.predict`
    E.2       Adam, lr 4e-4, ε 1e-4, gradient norm clipped to 0.5, per Distiller     `Distiller.train`
    –         not in the paper: ridge regression on fixed features, exact every step `LeastSquares`

The P Distillers of P prompts are one batched module: every product is a batched one, and nothing (loss, clip
norm, moments, step count) crosses from one Distiller to another. All start from the same seeded weights, so
what a prompt gets does not depend on its neighbours. One Distiller for a whole batch is P = 1.

Shapes: P Distillers, K rows of each, D width of the LLM, R inner width, F features. All is fp32 whatever the
LLM's dtype: a step of 4e-4 on a bf16 weight near 1 rounds to nothing. When they work, `train_async` decides.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

BLOCKS = 2
BETA1, BETA2, EPS = 0.9, 0.999, 1e-4                    # Adam's; ε is the paper's (E.2)
CLIP_NORM = 0.5                                         # of one Distiller's whole gradient (E.2)
CHOICES = {"kind": ("swiglu", "rls"), "scope": ("prompt", "batch")}


def at_least_one(name, value):
    """ValueError unless value is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2 ** 31:
        raise ValueError(f"{name} is {value!r}; accepted: whole numbers from 1 to 2^31 - 1")


@dataclass(frozen=True)
class DistillerConfig:
    """The Distiller's knobs; a ValueError names the one out of range."""

    kind: str = "swiglu"           # the paper's network, or "rls": `LeastSquares`
    scope: str = "prompt"          # one Distiller per "prompt", or per "batch" of prompts decoded together
    width: int = 384               # inner width R; of rls the number of random features
    lr: float = 4e-4               # Adam's learning rate
    ridge: float = 10.0            # of rls, as the next two
    linear: int = 64               # its linear features: all D where there are no more, else a projection
    forget: float = 1.0            # weight that a pair keeps from one update to the next
    warm: bool | None = None       # begin with a step on the prompt's own pairs? None: rls does
    train_every: int = 1           # steps whose pairs share one update
    seed: int = 0                  # of the initial weights
    zero_init: bool = False        # down = 0, so that f starts as the identity

    def __post_init__(self):
        at_least_one("width", self.width)
        at_least_one("train_every", self.train_every)
        if not (type(self.linear) is int and 0 <= self.linear < 2 ** 31):
            raise ValueError(f"linear is {self.linear!r}; accepted: whole numbers from 0 to 2^31 - 1")
        if not (type(self.forget) in (int, float) and 0 < self.forget <= 1):
            raise ValueError(f"forget is {self.forget!r}; accepted: numbers above 0 to 1")
        for name in ("lr", "ridge"):
            value = getattr(self, name)
            if not (type(value) in (int, float) and 0 < value < math.inf):
                raise ValueError(f"{name} is {value!r}; accepted: finite numbers above 0")
        if not (type(self.seed) is int and 0 <= self.seed < 2 ** 63):
            raise ValueError(f"seed is {self.seed!r}; accepted: whole numbers from 0 to 2^63 - 1")
        if not isinstance(self.zero_init, bool):
            raise ValueError(f"zero_init is {self.zero_init!r}; accepted: True and False")
        if not isinstance(self.warm, bool | None):
            raise ValueError(f"warm is {self.warm!r}; accepted: True, False and None")
        for name, accepted in CHOICES.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} is {getattr(self, name)!r}; accepted: {', '.join(accepted)}")

    @property
    def starts_warm(self):
        """Whether the prompt's own pairs are trained on before decoding begins."""
        return self.kind == "rls" if self.warm is None else self.warm

    def bytes(self, width_D):
        """Bytes of one Distiller for an LLM of width D, fp32: weights, Adam's two moments, gradient; U, W."""
        if self.kind == "rls":
            features = min(width_D, self.linear) + self.width + 1
            return 4 * features * (features + width_D)
        return 4 * 4 * BLOCKS * 3 * width_D * self.width


def loss(deep_PKD, predicted_PKD, live_PK):
    """Σ_live ‖h^L − ĥ‖² / (number of live rows), per Distiller (eq. 10): (P,); 0 where no row is live.

    The squared error is summed over D, not averaged: only so does the clip at norm 0.5 act.
    """
    error_PK = (deep_PKD - predicted_PKD).square().sum(-1)
    return torch.where(live_PK, error_PK, 0).sum(-1) / live_PK.sum(-1).clamp(min=1)


class Batched(nn.Module):
    """What both kinds of Distiller share: `step_P`, and copies of some of the P."""

    @torch.no_grad()
    def take(self, index_P):
        """A copy of some of the Distillers; `put` returns them."""
        some = type(self)(self.config, len(index_P), self.width_D, self.step_P.device, self.dtype)
        for mine, theirs in zip(self.state(), some.state(), strict=True):
            theirs.copy_(mine[index_P])
        return some

    @torch.no_grad()
    def put(self, index_P, some):
        """Overwrites the Distillers at `index_P`."""
        for mine, theirs in zip(self.state(), some.state(), strict=True):
            mine[index_P] = theirs


class Distiller(Batched):
    """P Distillers with their Adam state. `step_P` counts each one's updates."""

    blocks = BLOCKS

    def __init__(self, config, prompts, width_D, device="cpu", dtype=torch.float32):
        super().__init__()
        source, R = torch.Generator().manual_seed(config.seed), config.width

        def weight(rows, columns, zero=False):          # PyTorch's Linear init: U(−1/√columns, 1/√columns)
            values = torch.rand(rows, columns, generator=source, dtype=torch.float64) * 2 - 1
            values = values * 0 if zero else values / math.sqrt(columns)
            return nn.Parameter(values.to(device, dtype).repeat(prompts, 1, 1))

        self.gate_up, self.down = nn.ParameterList(), nn.ParameterList()
        for _ in range(self.blocks):
            self.gate_up.append(weight(2 * R, width_D))          # (P, 2R, D): gate above up
            self.down.append(weight(width_D, R, config.zero_init))
        self.config, self.width_D, self.dtype = config, width_D, dtype
        self.first = [torch.zeros_like(p) for p in self.parameters()]
        self.second = [torch.zeros_like(p) for p in self.parameters()]
        self.step_P = torch.zeros(prompts, dtype=torch.int64, device=device)

    def state(self):
        """All that an update may write, each with the Distillers on its first axis."""
        return [*self.parameters(), *self.first, *self.second, self.step_P]

    def predict(self, shallow_PKD):
        """ĥ = f_φ(h¹): two blocks of x + down(silu(gate x) ⊙ up x), each Distiller on its rows (eq. 3)."""
        return self._forward(shallow_PKD)[0].mT

    def _forward(self, shallow_PKD):
        """ĥ with rows as columns, (P, D, K), and each block's input, gate, up and product of the two."""
        x_PDK, trace = shallow_PKD.mT, []
        for gate_up, down in zip(self.gate_up, self.down, strict=True):
            gate_PRK, up_PRK = (gate_up @ x_PDK).chunk(2, dim=1)
            inner_PRK = F.silu(gate_PRK) * up_PRK
            trace.append((x_PDK, gate_PRK, up_PRK, inner_PRK))
            x_PDK = x_PDK + down @ inner_PRK
        return x_PDK, trace

    @torch.no_grad()
    def train(self, shallow_PKD, deep_PKD, live_PK):
        """One Adam step of every Distiller on its live pairs (eq. 10); returns the loss before it (P,).

        Writes φ. A Distiller without a live row is left as it was, bit for bit, step count included. What a
        dead row holds does not matter, not even a NaN: its gradient would be one however it is masked later.
        """
        shallow_PKD, deep_PKD = (torch.where(live_PK[..., None], x, 0) for x in (shallow_PKD, deep_PKD))
        predicted_PDK, trace = self._forward(shallow_PKD)
        loss_P = loss(deep_PKD, predicted_PDK.mT, live_PK)
        count_P11 = live_PK.sum(-1).clamp(min=1)[:, None, None]
        slope_PDK = torch.where(live_PK[:, None], self.slope(deep_PKD.mT, predicted_PDK), 0) / count_P11
        self._adam(*self._gradients(slope_PDK, trace), live_PK.any(-1))
        return loss_P

    def slope(self, deep_PDK, predicted_PDK):
        """∂‖h^L − ĥ‖²/∂ĥ of each row, rows as columns."""
        return 2 * (predicted_PDK - deep_PDK)

    def _gradients(self, slope_PDK, trace):
        """The chain rule from ∂loss/∂ĥ down: each weight's gradient as factors (left, right) of left·rightᵀ.

        In the order of `parameters`. The factors have a column per row, so the gradient's norm, too, comes
        from them: ‖left·rightᵀ‖² = Σ (leftᵀleft ⊙ rightᵀright).
        """
        for_gate_up, for_down = [], []
        for block in reversed(range(self.blocks)):
            x_PDK, gate_PRK, up_PRK, inner_PRK = trace[block]
            for_down.insert(0, (slope_PDK, inner_PRK))
            back_PRK, share_PRK = self.down[block].mT @ slope_PDK, gate_PRK.sigmoid()
            silu_slope_PRK = share_PRK * (1 + gate_PRK * (1 - share_PRK))
            both = torch.cat((back_PRK * up_PRK * silu_slope_PRK, back_PRK * gate_PRK * share_PRK), dim=1)
            for_gate_up.insert(0, (both, x_PDK))
            if block:
                slope_PDK = slope_PDK + self.gate_up[block].mT @ both
        factors = for_gate_up + for_down
        squares = [((a.mT @ a) * (b.mT @ b)).sum((1, 2)) for a, b in factors]
        return factors, torch.stack(squares).sum(0).clamp(min=0).sqrt()

    @torch.no_grad()
    def _adam(self, factors, norm_P, active_P):
        """φ ← φ − lr·m̂/(√v̂ + ε) after clipping each Distiller's gradient to norm 0.5; idle ones wait.

        The clip scales a factor before the gradient exists. torch's fused Adam then reads and writes every
        number once: a call per Distiller, since each has its own step count and its own leave to step (the
        kernel does nothing where `found_inf` is 1, a flag on the device that no host has to read).
        """
        scale_P11 = (CLIP_NORM / (norm_P + 1e-6)).clamp(max=1)[:, None, None]
        gradients = [(left * scale_P11) @ right.mT for left, right in factors]
        self.step_P += active_P
        seen_P, idle_P = self.step_P.float(), 1.0 - active_P.float()
        tensors = (self.parameters(), gradients, self.first, self.second)
        by_distiller = [list(zip(*(t.detach().unbind(0) for t in kind), strict=True)) for kind in tensors]
        for p, (weights, slopes, firsts, seconds) in enumerate(zip(*by_distiller, strict=True)):
            torch._fused_adam_(weights, slopes, firsts, seconds, [], [seen_P[p]] * len(weights),
                               lr=self.config.lr, beta1=BETA1, beta2=BETA2, weight_decay=0.0, eps=EPS,
                               amsgrad=False, maximize=False, found_inf=idle_P[p])


class LeastSquares(Batched):
    """ĥ = F W: ridge regression of h^L on fixed features F of h¹, over all live pairs so far, at every step.

        F = [h̃ C, silu(h̃ A) ⊙ (h̃ B), 1],   h̃ = h¹/rms(h¹);   W = argmin Σ‖h^L − F W‖² + ridge·‖W‖²

    Not in the paper: its Distiller needs hundreds of steps to fit, this one fits a pair in one, up to the
    ridge. A, B (R columns) and C are fixed and shared; C is the identity up to D = `linear`, random beyond.
    Recursive least squares holds the inverse of ridge·I + ΣFᵀF, here as a square root: U Uᵀ is symmetric and
    positive whatever rounding does. A step with rows F and targets Y: V = F U, LLᵀ = I + V Vᵀ, E = Y − F W,

        W ← W + U Vᵀ(LLᵀ)⁻¹ E,   U ← U − U Vᵀ L⁻ᵀ(L + I)⁻¹ V
    """

    def __init__(self, config, prompts, width_D, device="cpu", dtype=torch.float32):
        super().__init__()
        source, R, C = torch.Generator().manual_seed(config.seed), config.width, min(width_D, config.linear)

        def normal(columns):                            # N(0, 1/D): a column of h̃ times it has variance 1
            values = torch.randn(width_D, columns, generator=source, dtype=torch.float64)
            return (values / math.sqrt(width_D)).to(device, dtype)
        self.config, self.width_D, self.dtype = config, width_D, dtype
        self.gate_DR, self.up_DR, self.project_DC = normal(R), normal(R), normal(C)
        if C == width_D:
            self.project_DC = torch.eye(C, device=device, dtype=dtype)
        eye_FF = torch.eye(C + R + 1, device=device, dtype=dtype)
        self.root_PFF = (eye_FF / math.sqrt(config.ridge)).repeat(prompts, 1, 1)
        self.weight_PFD = torch.zeros(prompts, C + R + 1, width_D, device=device, dtype=dtype)
        self.step_P = torch.zeros(prompts, dtype=torch.int64, device=device)

    def state(self):
        """All that an update may write, each with the Distillers on its first axis."""
        return [self.root_PFF, self.weight_PFD, self.step_P]

    def features(self, shallow_PKD):
        """F (P, K, F) of the rows' h¹."""
        x = shallow_PKD * torch.rsqrt(shallow_PKD.square().mean(-1, keepdim=True) + 1e-6)
        gated_PKR = F.silu(x @ self.gate_DR) * (x @ self.up_DR)
        return torch.cat((x @ self.project_DC, gated_PKR, torch.ones_like(x[..., :1])), dim=-1)

    def predict(self, shallow_PKD):
        """ĥ = F W, each Distiller on its rows; 0 before the first update."""
        return self.features(shallow_PKD) @ self.weight_PFD

    @torch.no_grad()
    def train(self, shallow_PKD, deep_PKD, live_PK):
        """Adds the live pairs to the regression; returns the loss before it (P,). As `Distiller.train`."""
        shallow_PKD, deep_PKD = (torch.where(live_PK[..., None], x, 0) for x in (shallow_PKD, deep_PKD))
        rows_PKF = self.features(shallow_PKD) * live_PK[..., None]
        predicted_PKD = rows_PKF @ self.weight_PFD
        if self.config.forget < 1:                      # old pairs, and with them the ridge, weigh less
            self.root_PFF /= torch.where(live_PK.any(-1), math.sqrt(self.config.forget), 1.0)[:, None, None]
        v_PKF = rows_PKF @ self.root_PFF
        eye_KK = torch.eye(v_PKF.shape[1], device=v_PKF.device, dtype=v_PKF.dtype)
        lower_PKK = torch.linalg.cholesky_ex(eye_KK + v_PKF @ v_PKF.mT).L           # at least I: always there

        def solve(triangle, right):
            return torch.linalg.solve_triangular(triangle, right, upper=False)
        gain_PFK = solve(lower_PKK, v_PKF @ self.root_PFF.mT).mT                    # U Vᵀ L⁻ᵀ
        self.weight_PFD.baddbmm_(gain_PFK, solve(lower_PKK, deep_PKD - predicted_PKD))
        self.root_PFF.baddbmm_(gain_PFK, solve(lower_PKK + eye_KK, v_PKF), alpha=-1)
        self.step_P += live_PK.any(-1)
        return loss(deep_PKD, predicted_PKD, live_PK)


MADE_BY = {"swiglu": Distiller, "rls": LeastSquares}


def make_distiller(config, prompts, width_D, device="cpu"):
    """The Distillers of P prompts, of the config's kind."""
    return MADE_BY[config.kind](config, prompts, width_D, device)
