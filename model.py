"""
Wavelet sequence mixers, from scratch: everything that is a model is in this file.

  haar    Learnable Multi-Scale Wavelet Transformer    arXiv 2504.08801
  wavspa  Wavelet Space Attention                      arXiv 2210.01989
  wersa   Wavelet-Enhanced Random Spectral Attention   arXiv 2507.08637

and two baselines, attention (flash SDPA) and fourier (FNet, arXiv 2105.03824), in one small
encoder-decoder that is also an encoder or a decoder alone.

Letters:  B batch · T target (or only) length · S source length · C channels (n_embd) · H heads
          dh channels per head · L levels, a level-l coefficient spans 2^l tokens · F filter taps
          m random features per head · a_l, d_l approximation and detail coefficients of level l

A mixer is an nn.Module with
  y = mixer(x, mask)                    x, y (B,T,C); mask (B,T) bool, True = real token, or None
  state = mixer.init_state(B, device, dtype);  y_t, state = mixer.step(x_t, state)    if causal
and keeps four promises that test_model.py checks: a causal one never looks ahead (not by a bit),
masked positions change nothing at real ones, step equals the parallel form, any T >= 1 will do.
"""

import inspect
import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product

import torch
import torch.nn as nn
from torch.nn import functional as F


def check(ok, sentence):
    """A wrong setting ends in one sentence that names the flag to change."""
    if not ok:
        raise ValueError(sentence)


@dataclass
class ModelConfig:
    arch: str = "encdec"            # encdec | encoder | decoder
    mixer: str = "wersa"            # attention | haar | wavspa | wersa | fourier
    cross: str = "auto"             # auto | attention | wersa | aligned: how the decoder reads the source
    vocab_size: int = 259
    block_size: int = 128
    n_classes: int = 2              # encoder only
    pad_id: int = 0                 # ids equal to it are padding: masked, and never a target
    n_layer: int = 2                # of the encoder and of the decoder, each
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    bias: bool = False
    pos: str = "rope"               # rope (in attention and wersa) | learned (added to the tokens) | none
    gate: bool = False              # True = mixed * silu(W x) before the last projection, for any mixer
    pool: str = "mean"              # encoder output: mean | cls | token (one label per token)
    label_smoothing: float = 0.0    # while training only
    levels: int = 0                 # haar, wavspa, aligned; 0 = ceil(log2(block_size)), the whole block
    haar_aggregate: str = "sum"     # sum | concat
    haar_learnable: bool = True     # False freezes the taps at Haar's
    haar_tile: bool = False         # True = the paper's plain tiling, which has rank T/2
    haar_encoder: str = "block"     # block (the paper's, decimated) | atrous (undecimated, centred)
    haar_causal: str = "atrous"     # atrous | partial | literal (leaks; kept for the record)
    wavelet: str = "db2"            # haar | db2 ... db20 | lazy (even and odd samples) | random (4 orthonormal taps): the last two are controls
    wavelet_params: str = "ortho"   # fixed | ada | ortho | lift | conv (a control: the taps as a depthwise convolution before the inner mixer)
    wavspa_causal: str = "atrous"   # atrous (undecimated) | sorted (by completion time)
    wavspa_shared: bool = True      # False = one attention per band, the authors' choice
    inner: str = "attention"        # attention | wersa | fourier: what wavspa wraps
    n_features: int = 0             # wersa; 0 = 4 * channels per head
    feature_map: str = "relu"       # relu | exp
    orthogonal_features: bool = False
    beta: float = 1.0               # wersa's bandwidth; inert with relu features, live with exp
    wersa_levels: int = 2           # 0 = no wavelets
    wersa_adaptive: bool = True     # False = gains that do not depend on the input
    cross_ratio: float = 1.0        # aligned: source tokens per target token
    aligned_content: bool = True    # aligned: weigh the candidates by content too, not by place alone

    def __post_init__(self):
        for name, known in CHOICES.items():
            check(getattr(self, name) in known, f"--{name}={getattr(self, name)} is unknown, use one of: {' '.join(known)}")
        for name, most in dict(vocab_size=2**24, block_size=2**24, n_classes=2**20, n_layer=1024, n_head=2**16, n_embd=2**16, n_features=2**20, pad_id=2**24).items():
            low = int(name not in ("n_features", "pad_id"))    # --n_features=0 stands for 4 * n_embd / n_head
            check(low <= getattr(self, name) <= most, f"--{name}={getattr(self, name)} must lie in {low}..{most}")
        for name in ("levels", "wersa_levels"):
            v, most = getattr(self, name), max(1, math.ceil(math.log2(self.block_size)))
            check(0 <= v <= most, f"--{name}={v} must lie in 0..{most}: 2^{name} may not pass --block_size={self.block_size} by more than padding")
        check(self.n_embd % self.n_head == 0, f"--n_embd={self.n_embd} must be divisible by --n_head={self.n_head}")
        check(0 <= self.dropout < 1, f"--dropout={self.dropout} must lie in [0, 1)")
        check(0 <= self.label_smoothing < 1, f"--label_smoothing={self.label_smoothing} must lie in [0, 1)")
        for name in ("beta", "cross_ratio"):
            check(0 < getattr(self, name) <= 1e6, f"--{name}={getattr(self, name)} must lie above 0, up to 1e6")
        for flag, whole in (("mixer", "fourier"), ("inner", "fourier"), ("wavelet_params", "conv")):
            check(getattr(self, flag) != whole or self.arch == "encoder", f"--{flag}={whole} has no causal form: use it with --arch=encoder, on a data set for encoders (listops, imdb, ...), not with {self.arch}")

    @property
    def n_levels(self):
        return self.levels or max(1, math.ceil(math.log2(self.block_size)))


CHOICES = {  # every flag that takes one of a few words
    "arch": ("encdec", "encoder", "decoder"),
    "cross": ("auto", "attention", "wersa", "aligned"),
    "pos": ("rope", "learned", "none"),
    "pool": ("mean", "cls", "token"),
    "haar_aggregate": ("sum", "concat"),
    "haar_encoder": ("block", "atrous"),
    "haar_causal": ("atrous", "partial", "literal"),
    "wavelet": ("haar", *(f"db{n}" for n in range(2, 21)), "lazy", "random"),
    "wavelet_params": ("fixed", "ada", "ortho", "lift", "conv"),
    "wavspa_causal": ("atrous", "sorted"),
    "inner": ("attention", "wersa", "fourier"),
    "feature_map": ("relu", "exp"),
}

# -----------------------------------------------------------------------------
# wavelet transforms: free functions along dim -2 of (..., T, C), used by every mixer


@lru_cache
def _daubechies(n):
    """Taps of dbN and its lattice angles, by spectral factorisation (Daubechies 1992, section 6.1). float64 cannot hold
    the polynomial's roots at n = 20, so both are found with 60 digits of mpmath, which torch brings along."""
    check(1 <= n <= 20, f"daubechies({n}): n must lie in 1..20")
    import mpmath as mp
    with mp.workdps(60):
        roots = mp.polyroots([mp.binomial(n - 1 + k, k) for k in reversed(range(n))], maxsteps=500, extraprec=200) if n > 1 else []
        h = [mp.mpf(1)]
        for y in roots:                                        # z + 1/z = 2 - 4y: keep the root inside the unit circle
            z = 1 - 2 * y + mp.sqrt((1 - 2 * y) ** 2 - 1)
            z = z if abs(z) < 1 else 1 / z
            h = [u - z * w for u, w in zip(h + [0], [0] + h)]
        for _ in range(n):
            h = [u + w for u, w in zip(h + [0], [0] + h)]
        h = [mp.re(u) * mp.sqrt(2) / mp.re(sum(h)) for u in h]
        taps, angles = [float(u) for u in h], []
        while h:                                               # peel one rotation off at a time: tan(phi_i) = h[-1] / h[0]
            angles.append(mp.atan2(h[-1], h[0]))
            g = [-u if m % 2 else u for m, u in enumerate(reversed(h))]
            h = [mp.cos(angles[-1]) * u + mp.sin(angles[-1]) * w for u, w in zip(h, g)][:-2]
        return [torch.tensor(u, dtype=torch.float64, device="cpu") for u in (taps, [float(a) for a in angles[::-1]])]


def daubechies(n):
    """The 2n taps of the Daubechies wavelet dbN, N = n in 1..20: float64 (2n,), sum sqrt(2), norm 1, energy first."""
    return _daubechies(n)[0].clone()


def lattice_angles(n):
    """The n rotation angles, float64, with lattice(angles) = daubechies(n)."""
    return _daubechies(n)[1].clone()


def wavelet_angles(name):
    """The rotation angles that a --wavelet starts from: haar, dbN, or a control: lazy (h = (1, 0)) or random."""
    if name in ("lazy", "random"):
        return torch.zeros(1, dtype=torch.float64) if name == "lazy" else 2 * math.pi * torch.rand(2, dtype=torch.float64)
    return lattice_angles(1 if name == "haar" else int(name[2:]))


def qmf(h):
    """The high-pass that makes h (F,) or (F, C) an orthonormal pair: g[m] = (-1)^m h[F-1-m], PyWavelets' sign."""
    sign = torch.ones(h.size(0), dtype=h.dtype, device=h.device)
    sign[1::2] = -1
    return h.flip(0) * sign.view(-1, *[1] * (h.dim() - 1))


def lattice(phi):
    """Rotation angles phi (F/2,) or (F/2, C) -> orthonormal low-pass (F,) or (F, C), orthonormal for any angles
    (Vaidyanathan's lattice, WavSpA eq. 8). Angles that add up to pi/4 give sum(h) = sqrt(2)."""
    c, s = phi.cos(), phi.sin()
    h, g = torch.stack((c[0], s[0])), torch.stack((-s[0], c[0]))
    for ci, si in zip(c[1:], s[1:]):
        zero = torch.zeros_like(h[:2])
        h, g = torch.cat((h, zero)), torch.cat((zero, g))
        h, g = ci * h + si * g, ci * g - si * h
    return h


def extend(x, left, right, n, period):
    """x (..., T, C) -> (..., left + T + T % 2 + right, C): sample j of a row of n real samples is x[min(j mod period, n-1)].
    n and period are ints, or (B,) tensors when the rows of a batch differ: each row then wraps at its own end and sees
    nothing of its padding. An odd row repeats its last sample first, as PyWavelets' periodization does."""
    T = x.size(-2)
    if isinstance(n, int):
        if T % 2 == 0 and left == right == 0:
            return x
        j = torch.arange(-left, T + T % 2 + right, device=x.device)
        return x.index_select(-2, (j % period).clamp(max=n - 1))
    j = torch.arange(-left, T + T % 2 + right, device=x.device)
    j = torch.minimum(j % period[:, None], n[:, None] - 1)[..., None]               # (B, T', 1)
    return x.gather(-2, j.expand(-1, -1, x.size(-1)))


class Mix(torch.autograd.Function):
    """Tensors x_j (..., T, C) and a small matrix W (R, n) or one for each channel (R, n, C) -> y_r = sum_j W[r, j] x_j: the
    arithmetic of every transform here. A later x may have fewer rows, which are then the last ones. Autograd alone would
    store, pad and add up each product."""

    @staticmethod
    def forward(ctx, W, *x):
        ctx.save_for_backward(W, *(x if ctx.needs_input_grad[0] else ()))
        ctx.like = [(u.size(-2), u.dtype) for u in x]
        return Mix.rows(W, x)

    @staticmethod
    def rows(W, x):
        y = tuple(w[0] * x[0] for w in W)
        for y_r, w in zip(y, W):
            for w_j, x_j in zip(w[1:], x[1:]):
                Mix.end(y_r, x_j.size(-2)).addcmul_(w_j, x_j)
        return y

    @staticmethod
    def end(y, n):                                             # the rows of y that an x of n rows is added to
        return y[..., y.size(-2) - n:, :]

    @staticmethod
    def backward(ctx, *dy):
        W, *x = ctx.saved_tensors
        dx, dW = [None] * len(ctx.like), None
        for j, (n, dtype) in enumerate(ctx.like):
            if ctx.needs_input_grad[1 + j]:
                dx[j] = W[0, j] * Mix.end(dy[0], n)
                for w, d in zip(W[1:, j], dy[1:]):
                    dx[j].addcmul_(w, Mix.end(d, n))
                dx[j] = dx[j].to(dtype)
        if ctx.needs_input_grad[0]:
            total = (lambda v: v.float().flatten(0, -2).sum(0)) if W.dim() == 3 else torch.sum
            dW = torch.stack([total(Mix.end(d, u.size(-2)) * u) for d in dy for u in x]).view_as(W)
        return dW, *dx


def mix(W, *x):
    learning = torch.is_grad_enabled() and any(u.requires_grad for u in (W, *x))
    return Mix.apply(W, *x) if learning else Mix.rows(W, x)


def fir(x, taps):
    """y_r[k] = sum_m taps[r, m] * x[2k + m], x (..., T, C), taps (R, F) or (R, F, C), F even -> R times (..., (T - F) // 2 + 1, C)."""
    T, n = x.size(-2) // 2, taps.size(1)
    K = max(0, T - n // 2 + 1)
    phases = (x if x.size(-2) == 2 * T else x[..., :2 * T, :]).unflatten(-2, (T, 2)).unbind(-2)            # even, odd
    return mix(taps, *(phases[m % 2] if K == T else phases[m % 2][..., m // 2:m // 2 + K, :] for m in range(n)))


def synthesize(a, d, h, g, n=None):
    """x[2k - p + m] += h[m] a[k] + g[m] d[k], p = F/2 - 1, periodic: the transpose of analyze, hence its inverse when the
    pair is orthonormal. a, d (..., K, C) -> (..., 2K, C); n: K, or the rows' own counts as a (B,) tensor."""
    p, n, K, both = len(h) // 2 - 1, a.size(-2) if n is None else n, a.size(-2), []
    hg = torch.stack((h, g), 1).flatten(0, 1)                  # h[0], g[0], h[1], ...
    e = (p + 1) // 2                                           # reach on either side, in coefficients
    if p > 0:
        a, d = (extend(v, e, e, n, n)[..., :K + 2 * e, :] for v in (a, d))
    for r in (p, p + 1):
        at = [slice(e + r // 2 - q, e + r // 2 - q + K) for q in range(p + 1)]
        taps = [2 * (2 * q + r % 2) + band for q in range(p + 1) for band in (0, 1)]
        both += mix(hg[taps][None], *(band[..., k, :] for k in at for band in (a, d)))
    return torch.stack(both, -2).flatten(-3, -2)


def _as_taps(h, x):
    h = torch.as_tensor(h).to(x)
    check(h.size(0) % 2 == 0, f"a wavelet filter needs an even number of taps, this one has {h.size(0)}")
    return h


def cascade(a, levels, split):
    """The pyramid that every transform here is: a, d = split(a, l), l = 0 .. levels - 1 -> [d_1, ..., d_L, a_L]."""
    bands = []
    for l in range(levels):
        a, d = split(a, l)
        bands.append(d)
    return bands + [a]


def counts(n, levels):
    """[n, ceil(n / 2), ceil(n / 4), ...]: what is left of n samples, an int or a tensor, after 0 .. levels halvings."""
    out = [n]
    for _ in range(levels):
        out.append((out[-1] + 1) // 2)
    return out


def _dwt(x, levels, n, split):
    """split(x, count) -> (a, d) over and over, rows of n samples (int or (B,)) -> [a_L, d_L, ..., d_1]."""
    n = counts(n, levels)
    return cascade(x, levels, lambda a, l: split(a, n[l]))[::-1]


def _idwt(bands, n, merge):
    """_dwt undone: merge(a, d, count) -> x; n is the int or (B,) length of the result, or None for all there is."""
    x, L = bands[0], len(bands) - 1
    n_l = None if n is None else counts(n, L)
    for l, d in zip(range(L, 0, -1), bands[1:]):
        x = merge(x[..., :d.size(-2), :], d, d.size(-2) if n is None else n_l[l])
    return x[..., :n, :] if isinstance(n, int) else x


def dwt(x, h, levels, n=None):
    """Periodised wavelet transform of x (..., T, C) with an orthonormal low-pass h (F,) or (F, C), F even, any T >= 1.
    Returns [a_L, d_L, ..., d_1], band l of ceil(T / 2^l) coefficients. n (B,): each row's real length, if they differ."""
    most = math.ceil(math.log2(max(1, x.size(-2))))
    check(0 <= levels <= most, f"levels={levels}: {x.size(-2)} samples take 0..{most} levels")
    h = _as_taps(h, x)
    return _dwt(x, levels, x.size(-2) if n is None else n, lambda x, n: analyze(x, h, qmf(h), n))


def idwt(bands, h, n=None):
    """The inverse of dwt, cropped to n samples if n is given (else an odd T comes back with one more)."""
    h = _as_taps(h, bands[0])
    return _idwt(bands, n, lambda a, d, n: synthesize(a, d, h, qmf(h), n))


def analyze(x, h, g, n):
    """One level: a[k] = sum_m h[m] x[2k - p + m], p = F/2 - 1, periodic, and d[k] with g. The filter is centred on its
    pair of samples, as PyWavelets does it: starting at 2k instead would be an odd shift for every second wavelet."""
    p = len(h) // 2 - 1
    return fir(extend(x, p, p, n, n + n % 2), torch.stack((h, g)))


def haar_dwt(x, levels):
    """dwt with Haar's taps: a = (x0 + x1)/sqrt(2), d = (x0 - x1)/sqrt(2), as pywt.wavedec(x, "haar", "periodization")."""
    return dwt(x, daubechies(1), levels)


def haar_idwt(bands, n=None):
    return idwt(bands, daubechies(1), n)


def lift_split(x, lift, n):
    """One lifting level (Sweldens 1996): d = odd - P(even), a = even + U(d); lift (2, 2, C) = taps of P at e[k], e[k+1]
    and of U at d[k-1], d[k]. The scaling makes P = (1, 0), U = (0, 1/2) Haar, PyWavelets' sign."""
    x = extend(x, 0, 0, n, n + n % 2)
    e, o, n = x[..., 0::2, :], x[..., 1::2, :], (n + 1) // 2
    d = o - _lift_term(e, lift[0], n, 0, 1)
    a = e + _lift_term(d, lift[1], n, 1, 0)
    return a * math.sqrt(2), d * -math.sqrt(0.5)


def lift_merge(a, d, lift, n):
    """The exact inverse of lift_split, for any lift: subtract what was added."""
    a, d = a * math.sqrt(0.5), d * -math.sqrt(2)
    e = a - _lift_term(d, lift[1], n, 1, 0)
    o = d + _lift_term(e, lift[0], n, 0, 1)
    return torch.stack((e, o), -2).flatten(-3, -2)


def _lift_term(x, taps, n, left, right):
    T, x = x.size(-2), extend(x, left, right, n, n)
    return mix(taps[None], x[..., :T, :], x[..., 1:1 + T, :])[0]


def lift_taps(lift):
    """The causal lifting step (neighbours k and k-1 only) as a pair of 6-tap filters (6, C) for fir."""
    (p1, p0), (u1, u0) = lift[0].flip(0), lift[1]              # p0, u0 act at k
    zero, one = torch.zeros_like(p0), torch.ones_like(p0)
    g = torch.stack((zero, zero, -p1, zero, -p0, one))
    past = torch.stack((-p1, zero, -p0, one, zero, zero))      # the same d, one coefficient earlier
    h = torch.stack((zero, zero, zero, zero, one, zero)) + u0 * g + u1 * past
    return h * math.sqrt(2), g * -math.sqrt(0.5)


def delayed(x, s, taps=2):
    """x (..., T, C) -> [x[t], x[t - s], ..., x[t - (taps-1)s]] for mix: the a trous (undecimated) reach, zero before the start."""
    T = x.size(-2)
    return [x[..., :max(T - j * s, 0), :] for j in range(taps)]


def centred(x, s):
    """delayed for an encoder, two taps s apart around t: [x[t + s - s // 2], x[t - s // 2]], zero beyond either end."""
    ahead = x[..., s - s // 2:, :]
    return F.pad(ahead, (0, 0, 0, x.size(-2) - ahead.size(-2))), delayed(x, s // 2)[1]


class Ring:
    """delayed, one token at a time: each call keeps its last (taps-1)s + 1 inputs in a slice of buf (B, size, C), written
    in place. Calls must come in the same order at every t. One slot more than needed, so that a step can be redone."""

    def __init__(self, buf, t):
        self.buf, self.t, self.at = buf, t, 0

    def __call__(self, x, s, taps=2):
        size = (taps - 1) * s + 1
        buf = self.buf[:, self.at:self.at + size]
        self.at += size
        buf[:, self.t % size] = x
        return [buf[:, (self.t - j * s) % size].clone() for j in range(taps)]

    @staticmethod
    def zeros(B, levels, C, taps=2, **kw):
        return torch.zeros(B, sum((taps - 1) * 2 ** l + 1 for l in range(levels)), C, **kw)


# -----------------------------------------------------------------------------
# attention: the baseline, and what wavspa wraps


def turns(pos, T, dh, device):
    """Rotary position embedding (arXiv 2104.09864): the matrices (2, 2, T, dh // 2) that turn each pair of channels at
    places pos (T,), or from pos on."""
    n, pos = dh // 2, torch.arange(pos, pos + T, device=device) if isinstance(pos, int) else pos
    angle = pos.float()[:, None] * 10000 ** (-torch.arange(n, device=device) / max(n, 1))
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((cos, -sin, sin, cos)).unflatten(0, (2, 2))


def turn(x, W):
    """x (..., T, dh) turned by W = turns(...), or left alone where W is None; an odd last channel stays."""
    if W is None:
        return x
    n = x.size(-1) // 2
    a, b, rest = x.split([n, n, x.size(-1) - 2 * n], -1)
    return torch.cat((*mix(W.to(x.dtype), a, b), rest), -1)


def append(buf, x, t):
    """Write x (B, H, 1, dh) at row t of a cache that doubles when full; a new tensor when gradients are asked for."""
    if torch.is_grad_enabled():
        return torch.cat((buf[:, :, :t], x), 2)
    if t >= buf.size(2):
        buf = F.pad(buf, (0, 0, 0, max(t, 64)))
    buf[:, :, t:t + 1] = x
    return buf


class Attention(nn.Module):
    """Softmax attention through F.scaled_dot_product_attention, always; RoPE on q and k unless --pos says otherwise."""

    def __init__(self, cfg, causal=False):
        super().__init__()
        self.n_head, self.causal, self.dropout, self.rope = cfg.n_head, causal, cfg.dropout, cfg.pos == "rope"
        self.c_attn = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=cfg.bias)
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)

    def part(self, x, rows):                                   # some of c_attn's q, k, v, (B, T, C) -> (B, T, C or 2C)
        bias = self.c_attn.bias
        return F.linear(x, self.c_attn.weight[rows], None if bias is None else bias[rows])

    def heads(self, x):                                        # (B, T, C) -> (B, H, T, dh)
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)

    def out(self, y):                                          # (B, H, T, dh) -> (B, T, C)
        return self.c_proj(y.transpose(1, 2).flatten(-2))

    def turns(self, x, pos):                                   # for x (..., T, dh)
        return turns(pos, x.size(-2), x.size(-1), x.device) if self.rope else None

    def forward(self, x, mask=None, pos=0):
        q, k, v = (self.heads(u) for u in self.c_attn(x).chunk(3, -1))
        W = self.turns(q, pos)
        return self.out(sdpa(turn(q, W), turn(k, W), v, mask, self.causal, self.dropout if self.training else 0.0))

    def init_state(self, batch_size, device=None, dtype=None):
        empty = torch.zeros(batch_size, self.n_head, 0, self.c_attn.in_features // self.n_head, device=device, dtype=dtype)
        return 0, empty, empty.clone()

    def step(self, x_t, state, pos=None):
        t, K, V = state
        q, k, v = (self.heads(u) for u in self.c_attn(x_t)[:, None].chunk(3, -1))
        W = self.turns(q, t if pos is None else pos)
        K, V = append(K, turn(k, W).to(K.dtype), t), append(V, v.to(V.dtype), t)
        y = F.scaled_dot_product_attention(turn(q, W).to(K.dtype), K[:, :, :t + 1], V[:, :, :t + 1])
        return self.out(y.to(v.dtype))[:, 0], (t + 1, K, V)


def sdpa(q, k, v, mask, causal, dropout=0.0):
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
    mask = mask[:, None, None, :]                              # (B, 1, 1, S)
    if causal:
        mask = mask & torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
    mask = mask | ~mask.any(-1, keepdim=True)                  # a row with nothing to read would be NaN; its output is padding
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


# -----------------------------------------------------------------------------
# fourier: FNet


class Fourier(nn.Module):
    """FNet (arXiv 2105.03824): the real part of a 2-D FFT, no parameters. Encoder only.
    Differs from the paper: each row is transformed at its own length, so padding cannot change the result."""

    def __init__(self, cfg, causal=False):
        super().__init__()
        check(not causal, "--mixer=fourier mixes the whole sequence and cannot be causal: use it with --arch=encoder")

    def forward(self, x, mask=None, pos=None):
        check(x.size(1) >= 1, "a sequence needs at least one token")
        if mask is None:
            return torch.fft.fft2(x.float(), norm="ortho").real.to(x.dtype)
        n, t, T = lengths(mask)[:, None], torch.arange(x.size(1), device=x.device), x.size(1)
        chirp = torch.polar(torch.ones(1, device=x.device), -math.pi * (t * t % (2 * n)) / n)[..., None]   # (B, T, 1): kt = (k^2 + t^2 - (k-t)^2) / 2,
        kernel = torch.cat((chirp, torch.zeros_like(chirp[:, :1]), chirp[:, 1:].flip(1)), 1).conj()        # so a DFT of any length is a convolution
        y = torch.fft.fft((x * mask[..., None]).float(), norm="ortho") * chirp                             # (Bluestein 1970)
        y = torch.fft.ifft(torch.fft.fft(y, 2 * T, dim=1) * torch.fft.fft(kernel, dim=1), dim=1)[:, :T] * chirp
        return ((y.real / n[..., None].sqrt()) * (t < n)[..., None]).to(x.dtype)


def lengths(mask):
    """mask (B, T) -> (B,) index of the last real token + 1, at least 1."""
    return (mask * torch.arange(1, mask.size(1) + 1, device=mask.device)).amax(-1).clamp(min=1)


# -----------------------------------------------------------------------------
# haar: the Learnable Multi-Scale Wavelet Transformer


class Haar(nn.Module):
    """LMWT (arXiv 2504.08801, section 3): per level, four vectors in R^C,
         a_i = alpha * x_2i + beta * x_2i+1,   d_i = gamma * x_2i + delta * x_2i+1,   a recurses,
       then all bands are brought back to T, weighted per level and channel, summed (or concatenated) and projected.
    x (B,T,C) -> (B,T,C), T zero-padded level by level.

    Differs from the paper:
    - two weight vectors per level, one for either half of a block: plain tiling (--haar_tile) makes out_2i = out_2i+1,
      a mixer of rank T/2;
    - levels cover the whole block by default, since all layers share one dyadic grid and fewer levels would never let
      information out of a 2^L block;
    - an encoder without that grid (--haar_encoder=atrous): undecimated, each level's two taps 2^l apart around t;
    - a decoder that does not leak. The paper's block transform lets position t see the rest of its block ("literal").
      atrous: a_l[t] = alpha * a_{l-1}[t - 2^(l-1)] + beta * a_{l-1}[t], undecimated, state 2^L - 1 vectors (and one spare
      a level). partial: the literal module run on (x_0 .. x_t, 0, ...), in parallel for all t, state L vectors."""

    def __init__(self, cfg, causal=False):
        super().__init__()
        C, self.L, self.causal = cfg.n_embd, cfg.n_levels, causal
        self.form = cfg.haar_causal if causal else cfg.haar_encoder
        self.concat = cfg.haar_aggregate == "concat"
        taps = torch.tensor([[1.0, 1.0], [1.0, -1.0]])[None, :, :, None].repeat(self.L, 1, 1, C) / math.sqrt(2)
        if cfg.haar_learnable:                                 # (L, low/high, tap, C)
            self.taps = nn.Parameter(taps + 0.02 * torch.randn_like(taps))
        else:
            self.register_buffer("taps", taps)
        halves = 1 if cfg.haar_tile or self.form == "atrous" else 2
        # random signs across channels: equal weights would start at rank T/2, the very thing two halves repair
        self.weight = nn.Parameter(torch.randn(self.L + 1, halves, C) / math.sqrt(self.L + 1))
        n = C * (self.L + 1 if self.concat else 1)
        self.c_proj = nn.Linear(n, C, bias=cfg.bias)

    def forward(self, x, mask=None):
        if mask is not None:
            x = x * mask[..., None]
        if self.form == "atrous":
            bands = self.atrous(x, delayed) if self.causal else self.atrous(x, centred, mask)
        else:
            bands = self.partial(x) if self.form == "partial" else self.block(x)
        return self.out(bands)

    def out(self, bands):                                      # weighted already: sum or concatenate, and project
        return self.c_proj(torch.cat(bands, -1) if self.concat else sum(bands[1:], bands[0]))

    def rows(self, l):
        """The matrices of level l on a pair (x_2i, x_2i+1): low (1, 2, C), which gives a, and for either half of the block
        (2, bands, 2, C), which give d as it goes into the output; on the last level a too, in the same sum or beside d."""
        low, high = self.taps[l]
        w = self.weight.expand(-1, 2, -1)[:, :, None]
        d, a = w[l] * high, w[self.L] * low
        read = d[:, None] if l + 1 < self.L else torch.stack((d, a), 1) if self.concat else (d + a)[:, None]
        return low[None], read

    def block(self, x):
        """The decimated transform, bidirectional: down through the levels, then back up, each level adding its band to the
        sum of all coarser ones."""
        T = x.size(1)

        def split(a, l):
            a, (low, read) = F.pad(a, (0, 0, 0, a.size(1) % 2)), self.rows(l)
            a, *both = fir(a, torch.cat((low, read.transpose(0, 1).flatten(0, 1))))
            return a, [torch.stack(pair, 2).flatten(1, 2) for pair in zip(both[::2], both[1::2])]
        *bands, _ = cascade(x, self.L, split)
        if self.concat:
            return [b.repeat_interleave(2 ** l, 1)[:, :T] for l, level in enumerate(bands) for b in level]
        y = None
        for level in reversed(bands):
            n = level[0].size(1)
            y = level[0] if y is None else (level[0].view(x.size(0), -1, 2, x.size(2)) + y[:, :n // 2, None]).flatten(1, 2)
        return [y[:, :T]]

    def atrous(self, x, delay, mask=None):
        def split(a, l):
            low, read = self.rows(l)
            a, *bands = mix(torch.cat((low, read[0])).flip(1), *delay(a, 2 ** l))
            return a if mask is None else a * mask[..., None], bands                       # padding stays zero, as what lies beyond the end
        return sum(cascade(x, self.L, split)[:-1], [])

    def partial(self, x):
        T = x.size(1)

        def split(a, l):
            (low, read), n = self.rows(l), 2 ** l
            left, right = (torch.cat((low, r)) for r in read)
            if T <= n:                                         # everything lies in the left half of the first block
                a, *bands = mix(left[:, :1], a)
                return a, bands
            u, v = F.pad(a, (0, 0, 0, -T % (2 * n))).unflatten(1, (-1, 2, n)).unbind(2)                    # (B, blocks, n, C)
            known = u[:, :, -1:].expand_as(u)                  # the left half, complete
            pairs = zip(mix(left[:, :1], u), mix(right.flip(1), v, known))
            a, *bands = (torch.stack(p, 2).flatten(1, 3)[:, :T] for p in pairs)
            return a, bands
        return sum(cascade(x, self.L, split)[:-1], [])

    def init_state(self, batch_size, device=None, dtype=None):
        if self.form == "atrous":
            return 0, Ring.zeros(batch_size, self.L, self.taps.size(-1), device=device, dtype=dtype)
        return 0, torch.zeros(batch_size, self.L, self.taps.size(-1), device=device, dtype=dtype)

    def step(self, x_t, state):
        t, past = state
        if self.form == "atrous":
            bands = self.atrous(x_t, Ring(past, t))
        else:                                                  # literal on a zero-padded prefix is partial, so they share the step
            left, bands = list(past.unbind(1)), []             # per level, the left half of the block that t lies in
            for l in range(self.L):
                low, read = self.rows(l)
                if t >> l & 1:
                    x_t, *b = mix(torch.cat((low, read[1])), left[l], x_t)
                else:
                    left[l] = x_t.to(past.dtype)
                    x_t, *b = mix(torch.cat((low, read[0]))[:, :1], x_t)
                bands += b
            past = torch.stack(left, 1)
        return self.out(bands), (t + 1, past)


# -----------------------------------------------------------------------------
# wavspa: attention in wavelet space


class Wavspa(nn.Module):
    """WavSpA (arXiv 2210.01989, eq. 3): y = IDWT(attend(DWT(x))), a periodised transform, every band attended.
    --wavelet_params: fixed Daubechies taps · ada: free taps per channel (inverse only while they stay orthonormal) ·
    ortho: rotation lattice, exact for any angles · lift: predict and update steps, exact for any. Controls that show what
    is the wavelets' doing: --wavelet=lazy or random, and conv, free taps in front of the inner mixer and no transform.

    Differs from the paper:
    - the inverse is exact (the released lattice flips channels instead of taps, so its inverse is none);
    - rows of a batch wrap at their own ends and padding coefficients are masked;
    - one attention shared by all bands, told apart by a band embedding (--wavspa_shared=False: one each, as theirs);
    - a causal form, where theirs raises NotImplementedError. atrous: the undecimated bands, each attended causally, added
      up. sorted: a coefficient becomes known at the last token it covers; sort all of them by that time, run any causal
      attention over that sequence, and let t read the last completed one of each level: one attention in place of L + 1,
      but t sees nothing of the tokens after the last completed block."""

    def __init__(self, cfg, causal=False):
        super().__init__()
        C, self.L, self.kind = cfg.n_embd, cfg.n_levels, cfg.wavelet_params
        self.form = cfg.wavspa_causal if causal else "bands"
        check(self.kind != "conv" or not causal, "--wavelet_params=conv has no causal form: build it with causal=False")
        angles = wavelet_angles(cfg.wavelet)
        if self.kind == "fixed":
            self.register_buffer("taps", lattice(angles).float())
        elif self.kind in ("ada", "conv"):
            self.taps = nn.Parameter(lattice(angles).float()[:, None].repeat(1, C))
        elif self.kind == "ortho":
            self.angles = nn.Parameter(angles.float()[:, None].repeat(1, C))
        else:                                                  # Haar, no prediction at all, or LeGall's 5/3 for any longer wavelet
            lift = {"haar": [[1.0, 0.0], [0.0, 0.5]], "lazy": [[0.0, 0.0], [0.0, 0.0]]}.get(cfg.wavelet, [[0.5, 0.5], [0.25, 0.25]])
            self.lift = nn.Parameter(torch.tensor(lift)[..., None].repeat(1, 1, C))
        self.inner = nn.ModuleList(MIXERS[cfg.inner](cfg, causal) for _ in range(1 if cfg.wavspa_shared else self.L + 1))
        self.band = nn.Parameter(0.02 * torch.randn(self.L + 1, C), requires_grad=self.kind != "conv")     # order d_1 ... d_L, a_L

    def filters(self):
        """(h, g), (F,) or (F, C): the pair as plain taps."""
        if self.kind == "lift":
            return lift_taps(self.lift)
        h = lattice(self.angles) if self.kind == "ortho" else self.taps
        return h, qmf(h)

    def forward(self, x, mask=None):
        if mask is not None:
            x = x * mask[..., None]
        check(x.size(1) >= 1, "a sequence needs at least one token")
        if self.kind == "conv":
            n, T = len(self.taps), x.size(1)
            x = F.pad(x, (0, 0, n // 2 - 1, n // 2))
            return self.inner[0](mix(self.taps[None], *(x[:, m:m + T] for m in range(n)))[0], mask)
        return {"bands": self.bands, "sorted": self.sorted, "atrous": self.atrous}[self.form](x, mask)

    def transform(self):
        """split(x, n) -> (a, d) and merge(a, d, n) -> x: one level of this layer's transform, and its inverse."""
        if self.kind == "lift":
            return lambda x, n: lift_split(x, self.lift, n), lambda a, d, n: lift_merge(a, d, self.lift, n)
        h, g = self.filters()
        return lambda x, n: analyze(x, h, g, n), lambda a, d, n: synthesize(a, d, h, g, n)

    @torch.no_grad()
    def reconstruction_error(self, x):
        """max |IDWT(DWT(x)) - x|, x (B, T, C)."""
        (split, merge), T = self.transform(), x.size(1)
        return (_idwt(_dwt(x, self.L, T, split), T, merge) - x).abs().max().item()

    def attend(self, i):                                       # the mixer of band i
        return self.inner[i % len(self.inner)]

    def bands(self, x, mask):
        (split, merge), n, out = self.transform(), x.size(1) if mask is None else lengths(mask), []
        n_l = counts(n, self.L)
        for i, c in enumerate(_dwt(x, self.L, n, split)[::-1]):                            # d_1, ..., d_L, a_L
            l, k = min(i + 1, self.L), torch.arange(c.size(1), device=x.device)
            real = None if mask is None else k < n_l[l][:, None]
            out.append(self.attend(i)(c + self.band[i], real, pos=(k + 0.5) * 2 ** l - 0.5))
        return _idwt(out[::-1], n, merge)[:, :x.size(1)]

    def sorted(self, x, mask):
        T, (h, g) = x.size(1), self.filters()

        def split(a, l):
            a = F.pad(a, (0, 0, len(h) - 2, 0))                # reach into the past, so that any filter completes at its block's end
            return fir(a, torch.stack((h, g)))
        coeffs = [c + e for c, e in zip(cascade(x, self.L, split), self.band)]
        times = [(torch.arange(c.size(1), device=x.device) + 1) * 2 ** min(i + 1, self.L) - 1 for i, c in enumerate(coeffs)]
        if len(self.inner) > 1:
            coeffs = [f(c, pos=t) if len(t) else c for f, c, t in zip(self.inner, coeffs, times)]
        elif T > 1:                                            # ties go fine to coarse: the sort is stable
            when, order = torch.cat(times).sort(stable=True)
            y = self.inner[0](torch.cat(coeffs, 1)[:, order], pos=when)
            coeffs = y[:, order.argsort()].split([c.size(1) for c in coeffs], 1)
        t, y = torch.arange(T, device=x.device), 0
        for i, c in enumerate(coeffs):                         # row 0 = nothing completed yet
            y = y + F.pad(c, (0, 0, 1, 0))[:, (t + 1) // 2 ** min(i + 1, self.L)]
        return y

    def atrous(self, x, mask):
        return sum(self.attend(i)(b + self.band[i], mask) for i, b in enumerate(self.undecimated(x, delayed)))

    def undecimated(self, a, delay):
        h = self.filters()[0] / math.sqrt(2)

        def split(a, l):
            low, = mix(h.flip(0)[None], *delay(a, 2 ** l, len(h)))
            return low, a - low
        return cascade(a, self.L, split)

    def init_state(self, batch_size, device=None, dtype=None):
        C, taps, kw = self.band.size(1), len(self.filters()[0]), dict(device=device, dtype=dtype)
        streams = self.L + 1 if self.form == "atrous" else len(self.inner)                 # sequences that go on side by side
        inner = [self.attend(i).init_state(batch_size, **kw) for i in range(streams)]
        if self.form == "atrous":
            return 0, Ring.zeros(batch_size, self.L, C, taps, **kw), inner, None
        return 0, torch.zeros(batch_size, self.L, taps, C, **kw), inner, torch.zeros(batch_size, self.L + 1, C, **kw)

    def step(self, x_t, state):
        t, past, inner, last = state
        inner = list(inner)
        if self.form == "atrous":
            y = 0
            for i, b in enumerate(self.undecimated(x_t, Ring(past, t))):
                y_i, inner[i] = self.attend(i).step(b + self.band[i], inner[i])
                y = y + y_i
            return y, (t + 1, past, inner, None)
        (h, g), a, past, last = self.filters(), x_t, list(past.unbind(1)), list(last.unbind(1))
        done = []                                              # the coefficients that token t completes, fine to coarse
        for l in range(self.L):
            past[l] = torch.cat((past[l][:, 1:], a[:, None].to(past[l].dtype)), 1)
            if (t + 1) % 2 ** (l + 1):
                break
            d = (past[l] * (g if g.dim() > 1 else g[:, None])).sum(1)
            a = (past[l] * (h if h.dim() > 1 else h[:, None])).sum(1)
            done += [(l, d)] + ([(l + 1, a)] if l + 1 == self.L else [])
        for i, c in done:
            j = i % len(self.inner)
            last[i], inner[j] = self.attend(i).step(c + self.band[i], inner[j], pos=t)
        return sum(last), (t + 1, torch.stack(past, 1), inner, torch.stack(last, 1))


# -----------------------------------------------------------------------------
# wersa: linear attention over wavelet-filtered queries and keys


def trailing_means(x, levels, delay=delayed):
    """x (..., T, C), or (B, C) in a step -> [x, the mean of the last 2 tokens, of 4, ..., of 2^levels]."""
    half, out = x.new_full((1, 2), 0.5), [x]
    for l in range(levels):
        out += mix(half, *delay(out[-1], 2 ** l))
    return out


def block_bands(u, w, d=None):
    """y = sum_l w_l mean_l(u), mean_l over the 2^l-block that a token lies in, l = 0..L: u (b, h, c, dh), w (b, h, 1, L+1), zeros
    beyond c. Given d, the gradient at y: those at u and w, by the same sum, since a mean over blocks is its own transpose."""
    L, c = w.size(-1) - 1, u.size(2)
    u, d = (v if v is None or c % 2 ** L == 0 else F.pad(v, (0, 0, 0, -c % 2 ** L)) for v in (u, d))
    means = lambda v: [v.unflatten(2, (-1, 2 ** l)).mean(3, keepdim=True) for l in range(1, L + 1)]
    x, of_u = (u, None) if d is None else (d, means(u))
    y, of_x = x * w[..., :1], means(x)
    for l, m in enumerate(of_x, 1):
        y.unflatten(2, (-1, 2 ** l)).add_(m * w[..., None, l:l + 1])
    if d is None:
        return y[:, :, :c]
    dw = [(d * u).sum((2, 3))] + [(m * n).sum((2, 3, 4)) * 2 ** l for l, (m, n) in enumerate(zip(of_x, of_u), 1)]
    return y[:, :, :c], torch.stack(dw, -1)[:, :, None]


def trailing_bands(u, w, d=None):
    """block_bands for a decoder: mean_l over the last 2^l tokens, and w (b, h, T, L+1) each token's own."""
    means = trailing_means(u, w.size(-1) - 1)
    y = (means[-1] if d is None else d) * w[..., -1:]
    if d is None:
        for l in range(len(means) - 1):
            y.addcmul_(means[l], w[..., l:l + 1])
        return y
    for l in reversed(range(len(means) - 1)):                  # the transpose of a delay: an advance
        y, late = 0.5 * y, y[:, :, 2 ** l:]
        y[:, :, :late.size(2)].add_(late, alpha=0.5)
        y.addcmul_(d, w[..., l:l + 1])
    return y, torch.stack([(d * m).sum(-1) for m in means], -1)


def phi(x, R, kind, query=False, s=1.0):
    """Positive random features of s x, x (..., dh), R (dh, m) -> (..., m). relu: ReLU(s x R), the arc-cosine kernel of order 1;
    exp: exp(s x R - |s x|^2 / 2) / sqrt(m), whose mean over R is exp(s^2 q.k). Its exponent never passes |R|^2 / 2, so keys need
    no running maximum, which would leak; a query's own factor cancels, so its largest feature is set to 1 instead."""
    u = x @ (s * R)
    if kind == "relu":
        return u.relu_()
    return u.sub_(u.amax(-1, keepdim=True).detach() if query else x.square().sum(-1, keepdim=True) * (s * s / 2) + math.log(R.size(1)) / 2).exp_()


def phi_backward(x, R, kind, f, df, query=False, s=1.0):
    """Gradient of phi at x, given its value f and the gradient df that arrives there (overwritten)."""
    df = torch.ops.aten.threshold_backward.grad_input(df, f, 0, grad_input=df) if kind == "relu" else df.mul_(f)
    dx = df @ (s * R).T
    return dx if kind == "relu" or query else dx - s * s * x * df.sum(-1, keepdim=True)


def blocks(x, m, chunk=1):
    """How to walk x (B, H, T, .) so that the features of a block stay in cache: pairs of slices of B and H, and slices of T
    in order, whole chunks. Where one block holds all, they name no numbers, and one compiled graph serves every length."""
    B, H, T = x.shape[:3]
    room, most = (2 ** 20, min(max(512, 2 ** 20 // (H * m)), 1024)) if x.device.type == "cpu" else (2 ** 25, min(max(128, 2 ** 22 // m), 1024))
    most = max(most // chunk, 1) * chunk
    if T <= most and B * H * T * m <= room:
        return [(slice(None), slice(None))], [slice(None)]
    c = -(-T // (chunk * -(-T // most))) * chunk               # even slices
    n = max(1, room // (c * m))
    b, h = max(1, n // H), min(n, H)
    return [(slice(i, i + b), slice(j, j + h)) for i in range(0, B, b) for j in range(0, H, h)], [slice(i, i + c) for i in range(0, T, c)]


class Features:
    """phi of x (B, H, T, dh) in float32, smoothed by its bands and turned to its places first: how = (kind, scale, causal) and
    the tensors R (dh, m), W = turns(...) or None, w (B, H, T or 1, L+1) or None and real (B, T) or None say all of it. load and
    unload pass over all of x at once; phi itself goes block by block."""

    def __init__(self, how, R, W, w=None, real=None):
        (self.kind, self.scale, self.causal), self.R, self.W, self.w = how, R, W, w
        self.bands, self.real = trailing_bands if self.causal else block_bands, real

    def load(self, x):
        x = self.unpadded(x.float())
        return turn(x if self.w is None else self.bands(x, self.w), self.W)

    def unload(self, x, d):                                    # d, the gradient at load(x) -> those at x and w
        d, dw = turn(d, None if self.W is None else self.W.transpose(0, 1)), None
        if self.w is not None:
            d, dw = self.bands(self.unpadded(x.float()), self.w, d)
        return self.unpadded(d), dw

    def unpadded(self, x):
        return unpadded(x, self.real, (slice(None),) * 3)

    def walk(self, x):
        """Pairs of slices of B and H, and slices of T."""
        return blocks(x, self.R.size(1), chunk_of(x) if self.causal else 1)

    def __call__(self, x, query=False):
        return phi(x, self.R, self.kind, query, self.scale)

    def backward(self, x, f, df, query=False):
        return phi_backward(x, self.R, self.kind, f, df, query, self.scale)


def ones(v, real, at):
    """v[at] and a column of ones, which carries the denominator; padding is all zero."""
    return unpadded(F.pad(v[at].float(), (0, 1), value=1.0), real, at)


def unpadded(dv, real, at):
    return dv if real is None else dv * real[at[0], None, at[2], None]


def normalise(y):
    """Sums (..., e + 1) -> numerator over denominator (..., e), the denominator (..., 1); 0 where nothing was seen."""
    den = y[..., -1:] + 1e-6
    return y[..., :-1] / den, den


def normalise_backward(y, den, dy):
    return torch.cat((dy, -(dy * y).sum(-1, keepdim=True)), -1) / den


def beside(x, e=None, **kw):
    """An empty tensor like x (B, H, T, e), in memory as (B, T, H, e)."""
    B, H, T, dh = x.shape
    return x.new_empty(B, T, H, e or dh, **kw).transpose(1, 2)


def digest(phi, k, v):
    """S = phi(k)^T [v, 1], k loaded, v (B,H,T,dh) -> (B,H,m,dh+1). Features are made block by block, in the backward again:
    here and below there is no n x m tensor in memory."""
    S = phi.R.new_zeros(*v.shape[:2], phi.R.size(1), v.size(-1) + 1)
    for row, t in product(*phi.walk(k)):
        S[row] += (ones(v, phi.real, (*row, t)).mT @ phi(k[(*row, t)])).mT                 # wide rows: a faster product than tall ones
    return S


def digest_backward(phi, k, v, dS, dv):                        # -> the gradient at k; writes dv
    dk = torch.empty_like(k)
    for row, t in product(*phi.walk(k)):
        at, dS_row = (*row, t), dS[row]
        f, u = phi(k[at]), ones(v, phi.real, at)
        dv[at] = unpadded(f @ dS_row[..., :-1], phi.real, at)
        dk[at] = phi.backward(k[at], f, u @ dS_row.mT)
    return dk


def read(phi, q, S, like):
    """y = phi(q) S, numerator over denominator, q loaded (B,H,T,dh), S (B,H,m,e+1) -> (B,H,T,e), and the denominators."""
    y, den = beside(like), beside(like, 1, dtype=S.dtype)
    for row, t in product(*phi.walk(q)):
        at = *row, t
        y[at], den[at] = normalise(phi(q[at], True) @ S[row])
    return y, den


def read_backward(phi, q, S, y, den, dy):                      # -> the gradients at q and S
    dq, dS = torch.empty_like(q), torch.zeros_like(S)
    for row, t in product(*phi.walk(q)):
        at = *row, t
        f, dz = phi(q[at], True), normalise_backward(y[at].float(), den[at], dy[at].float())
        dS[row] += (dz.mT @ f).mT
        dq[at] = phi.backward(q[at], f, dz @ S[row].mT, True)
    return dq, dS


def chunk_of(x):                                               # tokens whose sums are taken as a triangle
    return min(max(x.size(2), 1), 32 if x.device.type == "cpu" else 128)


def before(S, each):                                           # S before the first chunk, each chunk's own sum (b, h, n, m, e) -> S before each, S after all
    S = torch.cat((S[:, :, None], each), 2).cumsum_(2)
    return S[:, :, :-1], S[:, :, -1]


def chunks(phi, at, q, k, v, *more):                           # (b, h, n, c, .): n chunks of c tokens
    return [u.unflatten(2, (-1, chunk_of(q))) for u in (phi(q[at], True), phi(k[at]), ones(v, phi.real, at), *more)]


def causal_read(phi, q, k, v):
    """y_t = sum_{s <= t} (phi(q_t) . phi(k_s)) [v_s, 1], normalised, T a multiple of chunk_of(q) -> y, denominators: a triangle
    within each chunk, and S, what all chunks before it add up to; the chunks of a block side by side."""
    y, den = beside(v), beside(v, 1, dtype=phi.R.dtype)
    rows, times = phi.walk(q)
    for row in rows:
        S = phi.R.new_zeros(*v[row].shape[:2], phi.R.size(1), v.size(-1) + 1)
        for t in times:
            at = *row, t
            fq, fk, u = chunks(phi, at, q, k, v)
            past, S = before(S, fk.mT @ u)
            y[at], den[at] = normalise((fq @ past).add_((fq @ fk.mT).tril_() @ u).flatten(2, 3))
    return y, den


def causal_read_backward(phi, q, k, v, y, den, dy, dv):        # -> the gradients at q and k; writes dv
    """Walks twice, forward in time for dq and backward in time for dk and dv, so that of S only one block's is ever kept."""
    (rows, times), dq, dk = phi.walk(q), torch.empty_like(q), torch.empty_like(k)

    def again(at):
        fq, fk, u, dz = chunks(phi, at, q, k, v, normalise_backward(y[at].float(), den[at], dy[at].float()))
        return fq, fk, u, dz, (dz @ u.mT).tril_()
    for row in rows:
        S = phi.R.new_zeros(*v[row].shape[:2], phi.R.size(1), v.size(-1) + 1)
        dS = torch.zeros_like(S)
        for t in times:
            at = *row, t
            fq, fk, u, dz, da = again(at)
            past, S = before(S, fk.mT @ u)
            dq[at] = phi.backward(q[at], fq.flatten(2, 3), (dz @ past.mT).add_(da @ fk).flatten(2, 3), True)
        for t in reversed(times):
            at = *row, t
            if len(times) > 1:                                 # else they are still here
                fq, fk, u, dz, da = again(at)
            late, dS = before(dS, (fq.mT @ dz).flip(2))
            late = late.flip(2)
            dv[at] = unpadded((fk @ late[..., :-1]).add_((fq @ fk.mT).tril_().mT @ dz[..., :-1]).flatten(2, 3), phi.real, at)
            dk[at] = phi.backward(k[at], fk.flatten(2, 3), (u @ late.mT).add_(da.mT @ fq).flatten(2, 3))
    return dq, dk


class Digest(torch.autograd.Function):
    """digest(k, v), the rest as in Features: a source, reduced once."""

    @staticmethod
    def forward(ctx, k, v, R, W, real, how):
        ctx.save_for_backward(k, v, R, W, real)
        ctx.how, phi = how, Features(how, R, W, None, real)
        return digest(phi, phi.load(k), v)

    @staticmethod
    def backward(ctx, dS):
        k, v, R, W, real = ctx.saved_tensors
        phi, dv = Features(ctx.how, R, W, None, real), beside(v)
        dk, _ = phi.unload(k, digest_backward(phi, phi.load(k), v, dS, dv))
        return dk.to(k.dtype), dv, None, None, None, None


class Read(torch.autograd.Function):
    """read(q, S)."""

    @staticmethod
    def forward(ctx, q, S, R, W, how):
        phi = Features(how, R, W)
        y, den = read(phi, phi.load(q), S, q)
        ctx.save_for_backward(q, S, R, W, y, den)
        ctx.how = how
        return y

    @staticmethod
    def backward(ctx, dy):
        q, S, R, W, y, den = ctx.saved_tensors
        phi = Features(ctx.how, R, W)
        dq, dS = read_backward(phi, phi.load(q), S, y, den, dy)
        return phi.unload(q, dq)[0].to(q.dtype), dS, None, None, None


class ReadSelf(torch.autograd.Function):
    """A sequence reading itself, all of it or causally: qkv (B,T,3,H,dh), the rest as in Features -> (B,H,T,dh)."""

    @staticmethod
    def forward(ctx, qkv, R, W, w, real, how):
        phi, (q, k, v) = Features(how, R, W, w, real), qkv.transpose(1, 3).unbind(2)
        S = None if phi.causal else digest(phi, phi.load(k), v)
        y, den = causal_read(phi, phi.load(q), phi.load(k), v) if phi.causal else read(phi, phi.load(q), S, q)
        ctx.save_for_backward(qkv, S, R, W, w, real, y, den)
        ctx.how = how
        return y

    @staticmethod
    def backward(ctx, dy):
        qkv, S, R, W, w, real, y, den = ctx.saved_tensors
        phi, dqkv = Features(ctx.how, R, W, w, real), torch.empty_like(qkv)
        (q, k, v), (dq, dk, dv) = (u.transpose(1, 3).unbind(2) for u in (qkv, dqkv))
        if phi.causal:
            d = causal_read_backward(phi, phi.load(q), phi.load(k), v, y, den, dy, dv)
        else:
            d_q, dS = read_backward(phi, phi.load(q), S, y, den, dy)
            d = d_q, digest_backward(phi, phi.load(k), v, dS, dv)
        (of_q, dw), (of_k, dw_k) = phi.unload(q, d[0]), phi.unload(k, d[1])
        dq.copy_(of_q), dk.copy_(of_k)
        return dqkv, None, None, None if w is None else dw + dw_k, None, None


def read_self(qkv, R, W, w, real, how):
    """ReadSelf for any T: a decoder's is padded behind its end, which no token sees, up to whole chunks."""
    T = qkv.size(1)
    more = -T % chunk_of(qkv.transpose(1, 3)[:, :, 0]) if how[-1] else 0
    if more:
        qkv, (W, w) = F.pad(qkv, (0,) * 7 + (more,)), (None if u is None else F.pad(u, (0, 0, 0, more)) for u in (W, w))
        real = None if real is None else F.pad(real, (0, more))
    return ReadSelf.apply(qkv, R, W, w, real, how)[:, :, :T]


class Wersa(Attention):
    """WERSA (arXiv 2507.08637): Haar DWT of Q and K along T, band l scaled by a gain, inverse DWT, then
         out = phi(Q) (phi(K)^T V) / (phi(Q) . sum phi(K) + eps),   phi(x) = ReLU(x R / beta) / sqrt(m).
       gains (L+1 per head) = MLP(mean query) * scale, sigmoid inside. Linear in T.

    One gain per band makes DWT-scale-IDWT a sum of block means: Q' = g_1 Q + sum_l (g_{l+1} - g_l) mean_{2^l}(Q).
    Differs from the paper and its one public port:
    - Q and K share one frozen R (with two, the content signal is gone);
    - a causal form: trailing means for block means, the running mean query for the mean query, prefix sums;
    - masks, any length, T never padded to a power of two;
    - ReLU features are homogeneous, so beta and any overall gain cancel: they approach the arc-cosine kernel of order 1,
      not softmax's. --feature_map=exp (positive features of exp(q.k), arXiv 2009.14794) has a live bandwidth."""

    def __init__(self, cfg, causal=False):
        super().__init__(cfg, causal)
        dh = cfg.n_embd // cfg.n_head
        m, self.L, self.beta, self.map = cfg.n_features or 4 * dh, cfg.wersa_levels, cfg.beta, cfg.feature_map
        self.register_buffer("R", random_features(dh, m, cfg.orthogonal_features))
        if self.L:
            self.scale = nn.Parameter(torch.ones(cfg.n_head, self.L + 1))
            self.filter = nn.Sequential(nn.Linear(cfg.n_embd, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                                        nn.Linear(64, cfg.n_head * (self.L + 1)), nn.Sigmoid()) if cfg.wersa_adaptive else None

    def weights(self, mean):
        """Mean inputs (B, T or 1, C) -> w (B, H, T or 1, L+1) of the block means: differences of the gains that the mean queries call for."""
        q = self.part(mean, slice(0, mean.size(-1)))
        g = self.scale.expand(*q.shape[:2], -1, -1) if self.filter is None else self.scale * self.filter(q).unflatten(-1, (self.n_head, -1))
        g = g.float().transpose(1, 2)
        return torch.cat((g[..., :1], g.diff(dim=-1)), -1)

    @property
    def how(self):
        """What Features wants to know: the kind, the factors that phi leaves out (beta, and sqrt(m) or dh^(1/4)), causal or not."""
        dh, m = self.R.shape
        return self.map, 1 / (self.beta * (dh ** 0.25 if self.map == "exp" else m ** 0.5)), self.causal

    attend = staticmethod(read_self)

    def forward(self, x, mask=None, pos=0):
        qkv, w = self.c_attn(x).unflatten(-1, (3, self.n_head, -1)), None                  # (B, T, 3, H, dh)
        if self.L:
            n = x.new_ones(1, x.size(1), 1, dtype=torch.float32) if mask is None else mask[..., None].float()
            total = torch.cumsum if self.causal else partial(torch.sum, keepdim=True)
            w = self.weights((total(x.float() * n, 1) / total(n, 1).clamp(min=1)).to(x.dtype))
        with torch.autocast(x.device.type, enabled=False):
            y = self.attend(qkv, self.R.float(), self.turns(qkv[:, :, 0].transpose(1, 2), pos), w, mask, self.how)
        return self.out(y)

    def init_state(self, batch_size, device=None, dtype=None):
        H, (dh, m) = self.n_head, self.R.shape
        S = torch.zeros(batch_size, H, m, dh + 1, device=device)                           # float32: it sums over all of T
        past = Ring.zeros(batch_size, self.L, 2 * H * dh, device=device, dtype=dtype)
        return 0, S, torch.zeros(batch_size, H * dh, device=device), past

    def step(self, x_t, state, pos=None):
        t, S, total, past = state
        qk, v = self.c_attn(x_t).split([2 * x_t.size(-1), x_t.size(-1)], -1)
        total = total + x_t.float()
        if self.L:
            w = self.weights((total / (t + 1)).to(x_t.dtype)[:, None])                     # (B, H, 1, L+1)
            means = torch.stack(trailing_means(qk, self.L, Ring(past, t)), -1).unflatten(1, (2, self.n_head, -1))
            qk = (means * w[:, None]).sum(-1)                                              # (B, 2, H, dh)
        q, k = qk.view(-1, 2, self.n_head, 1, x_t.size(-1) // self.n_head).unbind(1)       # (B, H, 1, dh)
        with torch.autocast(x_t.device.type, enabled=False):
            phi = Features(self.how, self.R.float(), self.turns(q, t if pos is None else pos))
            S = S + phi(phi.load(k)).mT @ ones(self.heads(v[:, None]), None, (slice(None),) * 3)
            y, _ = normalise(phi(phi.load(q), True) @ S)
        return self.out(y.to(v.dtype))[:, 0], (t + 1, S, total, past)


def random_features(dh, m, orthogonal=False):
    """R (dh, m), columns N(0, I); orthogonal: blocks of dh orthogonal columns with the same length distribution."""
    R = torch.randn(dh, m)
    if orthogonal:
        qr = [torch.linalg.qr(torch.randn(dh, dh)) for _ in range(-(-m // dh))]            # its signs are not uniform: repaired
        R = torch.cat([q * r.diagonal().sign() for q, r in qr], 1)[:, :m] * R.norm(dim=0)
    return R


MIXERS = {"attention": Attention, "haar": Haar, "wavspa": Wavspa, "wersa": Wersa, "fourier": Fourier}
CHOICES["mixer"] = MIXERS                                      # so that adding a mixer is one line


class Gated(nn.Module):
    """A mixer whose output every token weighs for itself: c_proj(mixed * silu(W x)), x (B,T,C) -> (B,T,C). haar is linear
    in x without it, and treats every content alike. The last projection is the mixer's own where it has a c_proj."""

    def __init__(self, mixer, cfg):
        super().__init__()
        own = getattr(mixer, "c_proj", None) or nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        mixer.c_proj = nn.Identity()
        self.gate, self.c_proj, self.mixer = nn.Linear(cfg.n_embd, own.in_features, bias=cfg.bias), own, mixer

    def out(self, y, x):
        return self.c_proj(y * F.silu(self.gate(x)))

    def forward(self, x, mask=None):
        return self.out(self.mixer(x, mask), x)

    def init_state(self, *args, **kw):
        return self.mixer.init_state(*args, **kw)

    def step(self, x_t, state):
        y, state = self.mixer.step(x_t, state)
        return self.out(y, x_t), state


def build_mixer(cfg, causal=False):
    """The token mixer that cfg names, x (B,T,C) -> (B,T,C)."""
    mixer = MIXERS[cfg.mixer](cfg, causal)
    return Gated(mixer, cfg) if cfg.gate else mixer


# -----------------------------------------------------------------------------
# cross: how a decoder reads the source. init_state digests the source once, read serves any targets


class CrossAttention(Attention):
    """Softmax attention from x (B,T,C) to memory (B,S,C). With --pos=rope, target t stands at source place ratio * t, so
    that reading straight on is what the kernel knows from the start: without it, training on `numbers` is far slower."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.ratio = cfg.cross_ratio

    def forward(self, x, memory, mask=None):
        return self.read(x, self.init_state(memory, mask), 0)

    def step(self, x_t, state, t=0):
        return self.read(x_t[:, None], state, t)[:, 0]

    def queries(self, x, t=0):
        """q (B, H, T, dh) of x (B, T, C), and what turns it to its places in the source."""
        q = self.heads(self.part(x, slice(0, x.size(-1))))
        return q, self.turns(q, torch.arange(t, t + x.size(1), device=x.device) * self.ratio)

    def keys_values(self, memory):
        k, v = (self.heads(u) for u in self.part(memory, slice(memory.size(-1), None)).chunk(2, -1))
        return k, v, self.turns(k, 0)

    def init_state(self, memory, mask=None):
        k, v, W = self.keys_values(memory)
        return turn(k, W), v, mask

    def read(self, x, state, t):
        k, v, mask = state
        return self.out(sdpa(turn(*self.queries(x, t)), k, v, mask, False, self.dropout if self.training else 0.0))


class CrossWersa(CrossAttention, Wersa):
    """phi(Q) (phi(K)^T V) over the source: T and S never meet, the source is reduced once to m x dh per head.
    No wavelet stage here: block means of K would blur exactly what a reader has to tell apart."""

    def __init__(self, cfg):
        super().__init__(replace(cfg, wersa_levels=0))

    def init_state(self, memory, mask=None):
        k, v, W = self.keys_values(memory)
        with torch.autocast(memory.device.type, enabled=False):
            return (Digest.apply(k, v, self.R.float(), W, mask, self.how),)                # (B, H, m, dh + 1)

    def read(self, x, state, t):
        q, W = self.queries(x, t)
        with torch.autocast(x.device.type, enabled=False):
            y = Read.apply(q, *state, self.R.float(), W, self.how)
        return self.out(y)


class Aligned(CrossAttention):
    """Reading without attention over all of the source, LMWT's setting: target t looks at source place p = floor(ratio * t) only,
    through a window of tokens around p and, per level, the Haar approximations (block means) of the two blocks on either
    side of p's. The decoder's own state weighs these few candidates by place; with --aligned_content also by q.k.
    O(T log S), no T x S product. (ByteNet, arXiv 1610.10099, read its source by place, too.)"""

    window, blocks, chunk = 4, 2, 64

    def __init__(self, cfg):
        super().__init__(cfg)
        self.L, self.content = cfg.n_levels, cfg.aligned_content
        self.reach = [self.window] + [self.blocks] * self.L    # candidates on either side, per level
        self.place = nn.Linear(cfg.n_embd, cfg.n_head * sum(2 * w + 1 for w in self.reach), bias=cfg.bias)
        if not self.content:                                   # no queries and keys, then
            self.c_attn = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)

    def init_state(self, memory, mask=None):
        """-> one table of all levels (B, N, C or 2C), which of its rows hold anything (B, N), rows per level, lengths (B,)."""
        B, S, _ = memory.shape
        mask = torch.ones(B, S, dtype=torch.bool, device=memory.device) if mask is None else mask
        kv = self.part(memory, slice(memory.size(-1) if self.content else 0, None))
        total, count = kv * mask[..., None], mask[..., None].to(kv.dtype)
        tables, counts, pair = [total], [count], kv.new_ones(1, 2)
        for _ in range(self.L):
            total, count = (fir(F.pad(u, (0, 0, 0, u.size(1) % 2)), pair)[0] for u in (total, count))
            tables.append(total / count.clamp(min=1))
            counts.append(count)
        return torch.cat(tables, 1), torch.cat(counts, 1)[..., 0] > 0, [u.size(1) for u in tables], lengths(mask)

    def read(self, x, state, t):
        """A chunk of c targets shares the few table rows that any of them may look at; each sees its own by a mask."""
        (table, real, sizes, n), T = state, x.size(1)
        c = min(self.chunk, T)
        x = F.pad(x, (0, 0, 0, -T % c)).unflatten(1, (-1, c))                              # (B, T/c, c, C)
        at = ((t + torch.arange(x.size(1) * c, device=x.device)) * self.ratio).long()
        at = at.minimum(n[:, None] - 1).unflatten(1, (-1, c))                              # (B, T/c, c) source places
        rows, slots, start, first = [], [], 0, 0
        for l, (size, w) in enumerate(zip(sizes, self.reach)):
            width = 2 * w + 2 + int(c * self.ratio) // 2 ** l
            j = (at[:, :, :1] >> l) - w + torch.arange(width, device=x.device)             # (B, T/c, width) rows of level l
            slot = j[:, :, None] - (at >> l)[..., None] + w                                # (B, T/c, c, width)
            seen = (slot >= 0) & (slot <= 2 * w) & ((j >= 0) & (j < size))[:, :, None]
            slots.append(torch.where(seen, slot + first, -1))
            rows.append(j.clamp(0, size - 1) + start)
            start, first = start + size, first + 2 * w + 1
        rows, slots = torch.cat(rows, -1), torch.cat(slots, -1)[:, :, None]                # (B, T/c, R), (B, T/c, 1, c, R)
        seen = (slots >= 0) & real.gather(1, rows.flatten(1)).view_as(rows)[:, :, None, None]
        kv = table.gather(1, rows.flatten(1)[..., None].expand(-1, -1, table.size(-1)))
        kv = kv.view(*rows.shape, -1, self.n_head, x.size(-1) // self.n_head).transpose(2, 4)  # (B, T/c, H, k/v, R, dh)
        logits = self.place(x).unflatten(-1, (self.n_head, -1)).transpose(2, 3)            # (B, T/c, H, c, slots)
        logits = logits.gather(-1, slots.clamp(min=0).expand(-1, -1, self.n_head, -1, -1))
        if self.content:
            q = self.heads(self.part(x.flatten(1, 2), slice(0, x.size(-1)))).unflatten(2, (-1, c)).transpose(1, 2)    # (B, T/c, H, c, dh)
            logits = logits + q @ kv[:, :, :, 0].mT / math.sqrt(q.size(-1))
        weights = logits.float().masked_fill(~seen, -1e9).softmax(-1).to(kv.dtype)
        y = (weights @ kv[:, :, :, -1]).transpose(2, 3)                                    # (B, T/c, c, H, dh)
        return self.c_proj(y.flatten(3).flatten(1, 2)[:, :T])


CROSSES = {"attention": CrossAttention, "wersa": CrossWersa, "aligned": Aligned}


def build_cross(cfg):
    """How the decoder reads memory (B,S,C): y = cross(x, memory, mask). auto: the mixer's own kind, linear where it is."""
    auto = {"attention": "attention", "haar": "aligned"}.get(cfg.mixer, "wersa")
    return CROSSES[auto if cfg.cross == "auto" else cfg.cross](cfg)


# -----------------------------------------------------------------------------
# the model


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.c_fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd, bias=cfg.bias)
        self.c_proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd, bias=cfg.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Pre-norm: mix tokens, read the source if there is one, then the MLP."""

    def __init__(self, cfg, causal=False, cross=False):
        super().__init__()
        self.ln_1, self.mixer = nn.LayerNorm(cfg.n_embd, bias=cfg.bias), build_mixer(cfg, causal)
        if cross:
            self.ln_x, self.cross = nn.LayerNorm(cfg.n_embd, bias=cfg.bias), build_cross(cfg)
        self.ln_2, self.mlp = nn.LayerNorm(cfg.n_embd, bias=cfg.bias), MLP(cfg)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x, mask=None, memory=None, memory_mask=None):
        x = x + self.drop(self.mixer(self.ln_1(x), mask))
        if memory is not None:
            x = x + self.drop(self.cross(self.ln_x(x), memory, memory_mask))
        return x + self.drop(self.mlp(self.ln_2(x)))

    def step(self, x, state, source, t):
        y, state = self.mixer.step(self.ln_1(x), state)
        x = x + y
        if source is not None:
            x = x + self.cross.step(self.ln_x(x), source, t)
        return x + self.mlp(self.ln_2(x)), state


class WaveletTransformer(nn.Module):
    """encdec: src (B,S), idx (B,T) -> logits (B,T,V) · decoder: idx -> logits · encoder: idx -> (B,n_classes).
    Token embeddings are tied to the output, and shared by both sides of encdec."""

    def __init__(self, cfg):
        super().__init__()
        cfg.__post_init__()                                    # fields may have been set since
        self.config = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size + 1, cfg.n_embd) if cfg.pos == "learned" else None
        self.drop = nn.Dropout(cfg.dropout)
        if cfg.arch != "decoder":
            self.encoder = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
            self.ln_e = nn.LayerNorm(cfg.n_embd, bias=cfg.bias)
        if cfg.arch != "encoder":
            self.decoder = nn.ModuleList(Block(cfg, causal=True, cross=cfg.arch == "encdec") for _ in range(cfg.n_layer))
            self.ln_f = nn.LayerNorm(cfg.n_embd, bias=cfg.bias)
            self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
            self.lm_head.weight = self.wte.weight
        else:
            self.cls = nn.Parameter(0.02 * torch.randn(cfg.n_embd)) if cfg.pool == "cls" else None
            self.head = nn.Linear(cfg.n_embd, cfg.n_classes)
        for name, p in self.named_modules():                   # taps, angles and level weights keep their own init
            if isinstance(p, (nn.Linear, nn.Embedding)):
                std = 0.02 / math.sqrt(2 * cfg.n_layer) if name.endswith("c_proj") else 0.02
                nn.init.normal_(p.weight, 0.0, std)
                if getattr(p, "bias", None) is not None:
                    nn.init.zeros_(p.bias)

    def num_params(self, part=None):
        """Parameters in all, or of the modules whose name holds part ("mixer", "cross", "mlp", "wte")."""
        return sum(p.numel() for n, p in self.named_parameters() if part is None or part in n.split("."))

    def flops_per_token(self, T):
        """FLOPs of one forward and backward pass per token, at T tokens a row: 6 per weight, and what the mixers add."""
        cfg = self.config
        weights = self.num_params() - self.num_params("wpe") - (self.num_params("wte") if cfg.arch == "encoder" else 0)
        if cfg.arch == "encdec":                               # a token passes either half, not both
            weights = (weights + self.num_params("wte")) // 2
        m = cfg.n_features or 4 * cfg.n_embd // cfg.n_head
        bands = cfg.n_levels * (12 * T + 24 * cfg.n_embd * cfg.wavspa_shared) * (cfg.wavspa_causal == "atrous")    # a decoder attends each in full
        bands *= {"encoder": 0, "encdec": 0.5, "decoder": 1}[cfg.arch]
        mix = {"attention": 12 * T, "wersa": 24 * m, "haar": 18 * cfg.n_levels, "wavspa": 4 * T + 24 * cfg.n_levels + bands, "fourier": 15 * math.log2(T * cfg.n_embd)}
        return 6 * weights + cfg.n_layer * cfg.n_embd * mix.get(cfg.mixer, 0)

    def embed(self, idx, start=0):
        check(idx.size(1) >= 1, "a sequence needs at least one token")
        x = self.wte(idx)
        if self.wpe is not None:
            end = start + idx.size(1)
            check(end <= self.config.block_size, f"{end} tokens do not fit --block_size={self.config.block_size} with --pos=learned; cut them, or train with --pos=rope")
            x = x + self.wpe(torch.arange(start, end, device=idx.device))
        return self.drop(x)

    def encode(self, src):
        """src (B,S) ids -> memory (B,S,C), mask (B,S). Padding may only follow a sequence."""
        mask, x = src != self.config.pad_id, self.embed(src)
        if self.config.arch == "encoder" and self.cls is not None:
            x, mask = torch.cat((self.cls.expand(x.size(0), 1, -1), x), 1), F.pad(mask, (1, 0), value=True)
        for block in self.encoder:
            x = block(x, mask)
        return self.ln_e(x), mask

    def forward(self, idx, targets=None, src=None):
        """-> logits, loss. Targets equal to pad_id or -1 are not counted; loss is the mean over the others, or None."""
        cfg = self.config
        if cfg.arch == "encoder":
            x, mask = self.encode(idx)
            if cfg.pool == "mean":
                x = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
            elif cfg.pool == "cls":
                x = x[:, 0]
            logits = self.head(x)
        else:
            check((src is not None) == (cfg.arch == "encdec"), "src= goes with --arch=encdec, and only with it")
            memory, memory_mask = self.encode(src) if src is not None else (None, None)
            x = self.embed(idx)
            for block in self.decoder:                         # no mask: padding follows, and the past never sees it
                x = block(x, None, memory, memory_mask)
            logits = self.lm_head(self.ln_f(x))
            targets = None if targets is None else targets.masked_fill(targets == cfg.pad_id, -1)
        if targets is None:
            return logits, None
        smoothing = cfg.label_smoothing if self.training else 0.0
        loss = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=-1, label_smoothing=smoothing)
        return logits, loss

    def init_state(self, batch_size, src=None):
        """The decoder's state before its first token; src (B,S) for encdec, digested here once."""
        kw = dict(device=self.wte.weight.device, dtype=self.wte.weight.dtype)
        sources = [None] * len(self.decoder)
        if src is not None:
            memory, mask = self.encode(src)
            sources = [block.cross.init_state(memory, mask) for block in self.decoder]
        return dict(t=0, mixers=[block.mixer.init_state(batch_size, **kw) for block in self.decoder], sources=sources)

    def step(self, ids, state):
        """ids (B,) the token at position t -> logits (B,V) for t+1, state. Caches are written in place: copy to branch."""
        t = state["t"]
        x, mixers = self.embed(ids[:, None], t)[:, 0], []
        for block, mix, source in zip(self.decoder, state["mixers"], state["sources"]):
            x, mix = block.step(x, mix, source, t)
            mixers.append(mix)
        return self.lm_head(self.ln_f(x)), dict(t=t + 1, mixers=mixers, sources=state["sources"])

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, src=None, temperature=1.0, top_k=None, eos_id=None):
        """Continue idx (B,T) by max_new_tokens -> (B, T+n), one step a token; temperature 0 = argmax. With eos_id, a row
        that has ended goes on as pad_id, and all stop when the last one ends."""
        check(idx.size(1) >= 1, "generate needs at least one token to start from")
        check(temperature >= 0, f"--temperature={temperature} must be at least 0")
        check(top_k is None or top_k >= 1, f"--top_k={top_k} must be at least 1")
        training, _ = self.training, self.eval()
        state, ended = self.init_state(idx.size(0), src), torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
        for i in range(idx.size(1) + max_new_tokens - 1):
            logits, state = self.step(idx[:, i], state)
            if i + 1 < idx.size(1):
                continue                                       # still in the prompt
            if temperature == 0:
                new = logits.argmax(-1)
            else:
                logits = logits.float() / temperature
                if top_k is not None:
                    logits[logits < logits.topk(min(top_k, logits.size(-1)))[0][:, -1:]] = -math.inf
                new = torch.multinomial(logits.softmax(-1), 1)[:, 0]
            if eos_id is not None:
                new = new.masked_fill(ended, self.config.pad_id)
                ended = ended | (new == eos_id)
            idx = torch.cat((idx, new[:, None]), 1)
            if eos_id is not None and ended.all():
                break
        self.train(training)
        return idx

    @torch.no_grad()
    def beam_search(self, src, bos_id, eos_id, max_new_tokens, beam=4, length_penalty=0.6):
        """src (B,S) -> the best hypothesis of each row (B, <= max_new_tokens), without bos, padded after its eos.
        Scores are log p / ((5 + length) / 6)^length_penalty (arXiv 1609.08144, eq. 14)."""
        check(beam >= 1, f"--beam={beam} must be at least 1")
        training, _ = self.training, self.eval()
        B, pad, dev = src.size(0), self.config.pad_id, src.device
        state = reorder(self.init_state(B, src), torch.arange(B, device=dev).repeat_interleave(beam))
        ids = torch.full((B * beam, 1), bos_id, device=dev)
        score = torch.tensor([0.0] + [-math.inf] * (beam - 1), device=dev).repeat(B)       # one live beam at the start
        ended, length = torch.zeros(B * beam, dtype=torch.bool, device=dev), torch.zeros(B * beam, device=dev)
        norm = lambda score, length: score / ((5 + length) / 6) ** length_penalty
        for _ in range(max_new_tokens):
            logits, state = self.step(ids[:, -1], state)
            logp, V = logits.float().log_softmax(-1), logits.size(-1)
            only_pad = torch.full((V,), -math.inf, device=dev)
            only_pad[pad] = 0.0                                # an ended beam goes on at no cost
            total = score[:, None] + torch.where(ended[:, None], only_pad, logp)           # (B beam, V)
            grown = length + ~ended
            best = norm(total, grown[:, None]).view(B, -1).topk(beam).indices              # (B, beam)
            rows = (best // V + beam * torch.arange(B, device=dev)[:, None]).flatten()
            new = (best % V).flatten()
            score, length, ended = total[rows, new], grown[rows], ended[rows] | (new == eos_id)
            ids, state = torch.cat((ids[rows], new[:, None]), 1), reorder(state, rows)
            if ended.all():
                break
        best = norm(score, length).view(B, beam).argmax(-1) + beam * torch.arange(B, device=dev)
        self.train(training)
        return ids[best, 1:]

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW in two groups: weights of linear and embedding layers decay; norms, biases, wavelet taps, level weights do not."""
        matrices = {id(m.weight) for m in self.modules() if isinstance(m, (nn.Linear, nn.Embedding))}
        params = [p for p in self.parameters() if p.requires_grad]
        decay, rest = [p for p in params if id(p) in matrices], [p for p in params if id(p) not in matrices]
        assert len(decay) + len(rest) == len({id(p) for p in params}), "an optimiser group misses a parameter or holds one twice"
        groups = [dict(params=decay, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]
        fused = device_type in ("cuda", "cpu") and "fused" in inspect.signature(torch.optim.AdamW).parameters
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def reorder(state, rows):
    """Pick rows (n,) of every tensor in a state: what a beam search does to its hypotheses."""
    if torch.is_tensor(state):
        return state.index_select(0, rows)
    if isinstance(state, dict):
        return {k: reorder(v, rows) for k, v in state.items()}
    return type(state)(reorder(v, rows) for v in state) if isinstance(state, (list, tuple)) else state
