"""
Wavelet sequence mixers, from scratch: everything that is a model is in this file.

  haar    Learnable Multi-Scale Wavelet Transformer    arXiv 2504.08801
  wavspa  Wavelet Space Attention                      arXiv 2210.01989
  wersa   Wavelet-Enhanced Random Spectral Attention   arXiv 2507.08637

A wavelet filter bank turns x into bands: haar weighs and adds them up, wavspa attends each, wersa scales
those of its queries and keys. Undecimated causal haar is MultiresConv's recursion (2305.01638), --gate Gated
Attention's (2505.06708), rotary RoFormer's (2104.09864), fourier FNet (2105.03824), exp FAVOR+ (2009.14794).

B batch, T target (or only) length, S source length, C channels (n_embd), H heads, dh channels a head, F taps,
L levels, a level-l coefficient spans 2^l tokens, a_l d_l approximations and details, m random features a head

A mixer is an nn.Module of (cfg, causal); x, y (B,T,C), mask (B,T) with True = real token, padding behind:
  y = mixer(x, mask)
  y, state = mixer(x, state=state)  # causal: any T >= 1 goes on from state, at first mixer.init_state(B)
Promises, tested: no look ahead, not by a bit; padding changes nothing; any cut into chunks equals the whole.
"""

import inspect
import math
import warnings
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

def check(ok, sentence):  # a wrong setting ends in one sentence
    if not ok:
        raise ValueError(sentence)

@dataclass
class ModelConfig:
    arch: str = "encdec"  # encdec | encoder | decoder
    mixer: str = "wersa"  # attention | haar | wavspa | wersa | fourier; a,b: layers take turns
    cross: str = "auto"  # how the decoder reads the source: auto | attention | wersa | aligned | place
    window: int = 0  # attention sees that many tokens, in an encoder half of them on either side; 0 = all
    vocab_size: int = 259
    block_size: int = 128
    n_classes: int = 2  # encoder only
    pad_id: int = 0  # ids equal to it are padding: masked, and never a target
    n_layer: int = 2  # of the encoder and of the decoder, each
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0  # on what the embedding, mixers, crosses and MLPs put out
    label_smoothing: float = 0.0  # while training only
    pos: str = "rope"  # rope (attention, wersa, crosses) | learned (added to the tokens) | none
    gate: bool = True  # c_proj(mixed * silu(W x)), for any mixer
    pool: str = "mean"  # encoder output: mean | cls | token (one label per token)
    levels: int = -1  # -1: haar the whole block, wavspa 1, wersa 2; 0 = no wavelets
    wavelet: str = "haar"  # haar | db2 ... db20: the filters that training starts from
    wavelet_params: str = "auto"  # auto: haar free, wavspa ortho, wersa fixed | ada | lift
    undecimated: str = "auto"  # yes | no | decoder (only there); auto: haar yes, wavspa and wersa decoder
    inner: str = "attention"  # what wavspa wraps: attention | wersa | fourier
    wavspa_shared: bool = True  # False = one inner mixer per band, the authors' choice
    n_features: int = 0  # wersa's m; 0 = 4 * dh
    feature_map: str = "relu"  # wersa: relu | exp
    cross_ratio: float = 1.0  # source tokens per target token: where in the source target t stands

    def __post_init__(self):
        names = self.mixer.split(",")
        for flag, known in CHOICES.items():
            for value in names if flag == "mixer" else [getattr(self, flag)]:
                check(value in known, f"--{flag}={value} is unknown, use one of: {' '.join(known)}")
        for flag, (low, high) in RANGES.items():
            value = getattr(self, flag)
            check(low <= value <= high, f"--{flag}={value} must lie in {low}..{high}")
        most = self.whole_block
        check(-1 <= self.levels <= most, f"--levels={self.levels} must lie in -1..{most}")
        check(self.n_embd % self.n_head == 0, f"--n_embd={self.n_embd} is no multiple of --n_head")
        if self.arch != "encoder":
            for flag, used in (("mixer", names), ("inner", [self.inner])):
                check("fourier" not in used, f"--{flag}=fourier has no causal form: it needs --arch=encoder")
            check(self.undecimated != "no" or not {"wavspa", "wersa"} & set(names),
                  f"--undecimated=no: {self.mixer} has no decimated causal form, use --undecimated=decoder")

    def auto(self, flag, **own):  # what auto and -1 stand for: the mixer's own, or else the others'
        value = getattr(self, flag)
        return own.get(self.mixer, own["others"]) if value in ("auto", -1) else value

    whole_block = property(lambda s: math.ceil(math.log2(s.block_size + (s.pool == "cls"))))  # in levels
    n_levels = property(lambda self: self.auto("levels", haar=self.whole_block, wavspa=1, others=2))
    learned = property(lambda self: self.auto("wavelet_params", haar="free", wavspa="ortho", others="fixed"))
    cross_kind = property(lambda s: s.auto("cross", haar="aligned", attention="attention", others="wersa"))

    def is_undecimated(self, causal):
        form = self.auto("undecimated", haar="yes", others="decoder")
        check(form != "no" or self.mixer == "haar" or not causal, "--undecimated=no has no causal form")
        return form == "yes" or (form == "decoder" and causal)

    def of_layer(self, i):  # with one mixer
        names = self.mixer.split(",")
        return replace(self, mixer=names[i % len(names)])

RANGES = dict(window=(0, 2**24), vocab_size=(1, 2**24), block_size=(1, 2**24), n_classes=(1, 2**20),
              pad_id=(0, 2**24), n_layer=(1, 999), n_head=(1, 2**16), n_embd=(1, 2**16), dropout=(0, 0.999),
              n_features=(0, 2**20), label_smoothing=(0, 0.99), cross_ratio=(1e-6, 1e6))
CHOICES = dict(
    arch=("encdec", "encoder", "decoder"), cross=("auto", "attention", "wersa", "aligned", "place"),
    pos=("rope", "learned", "none"), pool=("mean", "cls", "token"), feature_map=("relu", "exp"),
    wavelet=("haar", *(f"db{n}" for n in range(2, 21))), inner=("attention", "wersa", "fourier"),
    wavelet_params=("auto", "fixed", "free", "ada", "ortho", "lift"),
    undecimated=("auto", "yes", "no", "decoder"))

def wide(x):  # half precision becomes float32, where sums over T belong; float64 stays
    return x.to(torch.promote_types(x.dtype, torch.float32))
def no_autocast(x):  # which would round them; meta has none
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)

def functorch(x):  # is torch.func at work on this tensor?
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x)
def may_look(x):  # at values: not while compiling, nor where a GPU is waited for
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not functorch(x)

def as_mask(mask):
    """A mask (B,T) of any type -> bool, or None. Padding in front would shift the wavelets' grid."""
    if mask is None:
        return None
    mask = mask.bool()
    if may_look(mask):
        check(not (mask.any(1) & ~mask[:, 0]).any(), "padding stands in front of a row: pad on the right")
    return mask

def masked(x, mask):  # x (B, T, C), zero where mask (B, T) is False
    return x if mask is None else x.masked_fill(~mask[..., None], 0)
def lengths(mask):  # mask (B, T) -> (B,) index of the last real token + 1
    return (mask * torch.arange(1, mask.size(1) + 1, device=mask.device)).amax(-1).clamp(min=1)

def rotary(x, pos):
    """x (B,H,T,dh), each pair of channels turned by an angle that grows with its place pos (T,)."""
    n = x.size(-1) // 2
    angle = pos[:, None] * 10000 ** (-torch.arange(n, device=x.device) / max(n, 1))  # (T, n)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b, odd = x.split([n, n, x.size(-1) - 2 * n], -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos, odd), -1)

def attend(q, k, v, mask=None, causal=False, window=0):
    """Softmax attention of q (B,H,T,dh), the last T of the S places of k, v (B,H,S,dh), mask (B,S)."""
    T, S = q.size(2), k.size(2)
    if mask is None and window == 0 and (not causal or T == S or T == 1):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal if T == S else False)
    back = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)  # (T, S)
    seen = back >= 0 if causal else torch.ones_like(back, dtype=torch.bool)
    if window > 0:
        seen = seen & (back < window if causal else back.abs() <= window // 2)
    if mask is not None:
        seen = seen & mask[:, None, None]  # (B, 1, T, S)
    seen = seen | ~seen.any(-1, keepdim=True)  # what sees nothing would be NaN; it is padding itself
    return F.scaled_dot_product_attention(q, k, v, seen)

class Attention(nn.Module):
    """Softmax attention (B,T,C) -> (B,T,C), flash where there is no mask."""
    def __init__(self, cfg, causal=False):
        super().__init__()
        self.n_head, self.head_size = cfg.n_head, cfg.n_embd // cfg.n_head
        self.causal, self.window, self.rope = causal, cfg.window, cfg.pos == "rope"
        self.c_attn = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=False)
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)

    def heads(self, x):  # (B, T, C) -> (B, H, T, dh)
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
    def out(self, y):  # (B, H, T, dh) -> (B, T, C)
        return self.c_proj(y.transpose(1, 2).flatten(-2))
    def placed(self, x, t, ratio=1):  # x (B, H, T, dh), its first token at place t
        return rotary(x, torch.arange(t, t + x.size(2), device=x.device) * ratio) if self.rope else x

    def init_state(self, B, device=None, dtype=None):  # position, keys and values
        empty = torch.zeros(B, self.n_head, 0, self.head_size, device=device, dtype=dtype)
        return 0, empty, empty

    def forward(self, x, mask=None, state=None):
        mask = as_mask(mask)
        q, k, v = (self.heads(u) for u in self.c_attn(masked(x, mask)).chunk(3, -1))
        t = 0 if state is None else state[0]
        q, k = self.placed(q, t), self.placed(k, t)
        if state is None:
            return self.out(attend(q, k, v, mask, self.causal, self.window))
        k, v = torch.cat((state[1].to(k.dtype), k), 2), torch.cat((state[2].to(v.dtype), v), 2)
        y = self.out(attend(q, k, v, None, True, self.window))
        if self.window > 0:
            k, v = (u[:, :, max(u.size(2) - self.window + 1, 0):].clone() for u in (k, v))
        return y, (t + x.size(1), k, v)

class Fourier(nn.Module):
    """FNet (arXiv 2105.03824): the real part of a 2-D FFT, of each row at its own length. Encoder only."""
    def __init__(self, cfg, causal=False):
        super().__init__()

    def forward(self, x, mask=None):
        T, mask = x.size(1), x.new_ones(x.shape[:2]).bool() if mask is None else as_mask(mask)
        # a DFT of any length n is a convolution (Bluestein 1970)
        n, t = lengths(mask)[:, None, None], torch.arange(T, device=x.device)[:, None]
        y = torch.fft.fft(wide(masked(x, mask)), norm="ortho")
        angle = -math.pi * (t * t % (2 * n)) / n  # (B, T, 1)
        chirp = torch.polar(torch.ones_like(angle), angle).to(y.dtype)
        kernel = torch.cat((chirp, torch.zeros_like(chirp[:, :1]), chirp[:, 1:].flip(1)), 1).conj()
        y = torch.fft.fft(y * chirp, 2 * T, dim=1) * torch.fft.fft(kernel, dim=1)
        y = torch.fft.ifft(y, dim=1)[:, :T] * chirp
        return (y.real / n.sqrt() * (t < n)).to(x.dtype)

def mirror(h):
    """The high-pass of an orthonormal low-pass h (F, C): g[m] = (-1)^m h[F-1-m], PyWavelets' sign."""
    sign = torch.ones_like(h)
    sign[1::2] = -1
    return h.flip(0) * sign

def lattice(stages):
    """2 x 2 matrices (F/2, 2, 2, C), a delay of a pair between -> low- and high-pass (F, C). Rotations give
    every orthonormal pair (WavSpA eq. 8), determinants of 1 every lifting (Daubechies, Sweldens 1998)."""
    low, high = stages[0]  # (2, C)
    for (a, b), (c, d) in stages[1:]:
        low, high = F.pad(low, (0, 0, 0, 2)), F.pad(high, (0, 0, 2, 0))
        low, high = a * low + b * high, c * low + d * high
    return low, -high  # PyWavelets' sign, as mirror

def rotations(angles):  # (F/2, C) -> (F/2, 2, 2, C)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((cos, sin, -sin, cos), 1).unflatten(1, (2, 2))

def lifting(steps):
    """(F/2, 3, C): low += u0 high, high += p low, low += u1 high (Sweldens 1996) -> (F/2, 2, 2, C)."""
    u0, p, u1 = steps.unbind(1)
    return torch.stack((1 + u1 * p, u0 + u1 + u0 * u1 * p, p, 1 + u0 * p), 1).unflatten(1, (2, 2))

def pick(x, at):  # x (B, T, C), at (1 or B, N) -> (B, N, C)
    return x.gather(1, at[..., None].expand(x.size(0), -1, x.size(2)))
def delayed(x, n, step, stride, T):  # x (B, N, C) -> for m < n: x[stride k + m step], (B, T, C)
    return [x[:, m * step:m * step + stride * T:stride] for m in range(n)]
def filtered(lags, taps):  # their sum, weighed by taps (F, C)
    y = taps[0] * lags[0]
    for m in range(1, len(taps)):
        y += taps[m] * lags[m]
    return y

def analyze(x, low, high, n=None):
    """One level of x (B,T,C): a[k] = sum_m low[m] x[2k - p + m], p = F/2 - 1 as PyWavelets, d[k] with high.
    Rows are periodic over their own n (B,) samples, or T; odd ones repeat the last -> (B, ceil(T/2), C)."""
    T, p = x.size(1), len(low) // 2 - 1
    K = (T + 1) // 2
    if n is None and p == 0:  # Haar's pairs reach over no end
        x = torch.cat((x, x[:, -1:]), 1)
    else:
        j = torch.arange(-p, 2 * K + p, device=x.device)
        n = torch.full_like(j[:1], T) if n is None else n
        x = pick(x, torch.minimum(j % (n + n % 2)[:, None], n[:, None] - 1))
    x = delayed(x, len(low), 1, 2, K)
    return filtered(x, low), filtered(x, high)

def synthesize(a, d, low, high, n=None):
    """analyze transposed, its inverse for orthonormal pairs: x[2k - p + m] += low[m] a[k] + high[m] d[k].
    a, d (B,K,C), rows periodic over their own n (B,) coefficients, or K -> (B,2K,C)."""
    K, p = a.size(1), len(low) // 2 - 1
    reach = (p + 1) // 2  # coefficients that are needed beyond either end
    if reach > 0:
        j = torch.arange(-reach, K + reach, device=a.device)
        n = torch.full_like(j[:1], K) if n is None else n
        a, d = pick(a, j % n[:, None]), pick(d, j % n[:, None])
    halves = []
    for r in (0, 1):  # even samples, then odd ones
        y = 0
        for m in range((r + p) % 2, len(low), 2):  # the taps whose parity reaches them
            k = reach + (r + p - m) // 2
            y += low[m] * a[:, k:k + K] + high[m] * d[:, k:k + K]
        halves.append(y)
    return torch.stack(halves, 2).flatten(1, 2)

def down(x, pairs, n=None):  # pairs: each level's (low, high) -> [a_L, d_L, ..., d_1]
    details = []
    for low, high in pairs:
        x, d = analyze(x, low, high, n)
        n = None if n is None else (n + 1) // 2
        details.insert(0, d)
    return [x, *details]
def up(bands, pairs, n=None):  # -> x, of an odd length with one sample more
    x, *details = bands
    for l, d in zip(reversed(range(len(pairs))), details):
        half = None if n is None else -(-n // 2 ** (l + 1))
        x = synthesize(x[:, :d.size(1)], d, *pairs[l], half)
    return x

def undecimated(x, pair, step, causal, past=None):
    """y[t] = sum_m taps[m] x[t - (F-1-m) step], taps (F, C) of pair, centred on t in an encoder, 0 beyond;
    past: the (F-1) step rows before x (B,T,C) -> [y (B,T,C), ...], the next chunk's past."""
    T, reach = x.size(1), (len(pair[0]) - 1) * step
    if past is None:
        ahead = 0 if causal else (reach + 1) // 2
        x = F.pad(x, (0, 0, reach - ahead, ahead))
    else:
        x = torch.cat((past.to(x.dtype), x), 1)
        past = x[:, T:].clone()  # a view would keep all of x alive
    x = delayed(x, len(pair[0]), step, 1, T)
    return [filtered(x, taps) for taps in pair], past

class Wavelet(nn.Module):
    """The filter pairs of L levels and C channels, a differentiable transform. What is learned:
      fixed  nothing: the taps of the wavelet called name
      free   both filters (LMWT's alpha, beta and gamma, delta); idwt, the transpose, inverts orthonormal ones
      ada    the low-pass, which the high-pass mirrors (WavSpA); idwt as free's
      ortho  the rotation angles of a lattice: orthonormal for any angles (WavSpA eq. 8)
      lift   update and predict steps: an exact inverse for any values (WavSpA; Sweldens 1996)"""
    def __init__(self, name="haar", learned="fixed", L=1, C=1):
        super().__init__()
        self.learned, self.L, self.C = learned, L, C
        low = daubechies(name)
        pair, angles = torch.stack((low, mirror(low))), lattice_angles(low)
        u, p = (angles / 2).tan(), -angles.sin()  # a rotation is three lifting steps
        starts = dict(fixed=pair, free=pair, ada=low, ortho=angles, lift=torch.stack((u, p, u), 1))
        check(learned in starts, f"of a wavelet can be learned: {' '.join(starts)}, not {learned}")
        start = starts[learned].to(torch.empty(0))  # the default dtype and device
        self.reach = len(low) - 1
        if learned == "fixed" or L == 0:
            self.register_buffer("taps", start)
        else:
            self.taps = nn.Parameter(start[None, ..., None].repeat(L, *[1] * start.dim(), C))

    def filters(self, l, inverse=False):
        """The low- and high-pass of level l = 0 .. L-1, each (F, C) or (F, 1), or those that undo them."""
        if self.learned == "fixed":
            return self.taps[..., None].unbind(0)
        taps = self.taps[l]
        if self.learned == "free":
            return taps.unbind(0)
        if self.learned == "ada":
            return taps, mirror(taps)
        if self.learned == "ortho":
            return lattice(rotations(taps))
        stages = lifting(taps)
        if inverse:  # inverted and transposed, each of determinant 1
            (a, b), (c, d) = stages.movedim(0, 2)
            stages = torch.stack((d, -c, -b, a), 1).unflatten(1, (2, 2))
        return lattice(stages)

    def dwt(self, x, n=None):  # x (B, T, C), rows of n (B,) samples -> [a_L, d_L, ..., d_1]
        return down(x, [self.filters(l) for l in range(self.L)], n)
    def idwt(self, bands, n=None):  # -> (B, T, C), for an odd T with one sample more
        return up(bands, [self.filters(l, inverse=True) for l in range(self.L)], n)

    def undecimated(self, x, causal, mask=None, past=None):
        """x (B,T,C) -> [a_L, d_L, ..., d_1], each (B,T,C); the next chunk's past. A detail is what the
        low-pass took away, so they add up to x; free has its own high-pass, for Haar the same at first."""
        details, rows = [], []
        for l in range(self.L):
            low, high = (taps / math.sqrt(2) for taps in self.filters(l))  # low's add up to 1: a mean
            pair = (low, -high) if self.learned == "free" else (low,)
            (a, *d), kept = undecimated(x, pair, 2 ** l, causal, None if past is None else past[l])
            details.insert(0, d[0] if d else x - a)
            rows.append(kept)
            x = masked(a, mask)
        return [x, *details], rows

    def init_past(self, B, **kw):  # the rows before the first token
        return [torch.zeros(B, self.reach * 2 ** l, self.C, **kw) for l in range(self.L)]

def as_taps(h, x):
    """An orthonormal low-pass as dwt takes it, a name or taps (F,) or (F, C) -> (F, 1 or C) like x."""
    h = torch.as_tensor(daubechies(h) if isinstance(h, str) else h).to(x)
    h = h[:, None] if h.dim() == 1 else h
    check(h.dim() == 2 and len(h) > 0 and len(h) % 2 == 0, f"no even number of taps: {tuple(h.shape)}")
    if may_look(h):
        taps = h.detach().double()
        power = torch.fft.fft(taps, 2 * len(h), dim=0).abs().square()
        error = power + power.roll(len(h), 0) - 2  # |H(w)|^2 + |H(w + pi)|^2 = 2
        check(error.abs().max() < 0.02, "these taps are not orthonormal: pass a name, or use Wavelet")
        if 2 < len(h) <= 40:
            error = taps.flip(0) - daubechies(len(h) // 2)[:, None]
            check(error.abs().max() > 1e-4, "these taps are in reverse (dec_lo): pass rec_lo")
    return h

def dwt(x, h="haar", levels=None):
    """The periodised wavelet transform of x (..., T, C), low-pass h: a name or taps (F,) or (F, C), as
    pywt.wavedec(x, h, "periodization", levels, -2): [a_L, d_L, ..., d_1], d_l of ceil(T / 2^l) coefficients.
    levels=None: as many as T takes. Raises ValueError."""
    check(x.is_floating_point(), f"dwt takes floats, not {x.dtype}: x.float() first")
    check(x.dim() >= 3 and x.size(-2) >= 1, f"dwt takes (..., T, C), not {tuple(x.shape)}: x[..., None]?")
    most = math.ceil(math.log2(x.size(-2)))
    levels = most if levels is None else levels
    check(0 <= levels <= most, f"levels={levels}: {x.size(-2)} samples take 0..{most} levels")
    h = as_taps(h, x)
    bands = down(x.flatten(0, -3), [(h, mirror(h))] * levels)
    return [band.unflatten(0, x.shape[:-2]) for band in bands]

def idwt(bands, h="haar", n=None):
    """The inverse of dwt -> (..., T, C), cropped to n samples, else one more for an odd T."""
    h = as_taps(h, bands[0])
    x = up([band.flatten(0, -3) for band in bands], [(h, mirror(h))] * (len(bands) - 1))
    return x[:, :n].unflatten(0, bands[0].shape[:-2])

def daubechies(n):
    """The 2n taps of dbN, n = N in 1..20 (1 is Haar) or its name: float64 (2n,), sum sqrt(2). |H|^2 less its
    zeros at -1 is a polynomial (Ten Lectures, 1992, 6.1); an FFT gives its minimum-phase root to 1e-14."""
    name = n if isinstance(n, str) else "haar" if n == 1 else f"db{n}"
    check(name in CHOICES["wavelet"], f"the wavelet {name} is unknown, use haar or db2 to db20")
    n = 1 if name == "haar" else int(name[2:])
    w = 2 * math.pi * torch.arange(4096, dtype=torch.float64, device="cpu") / 4096
    square = sum(math.comb(n - 1 + k, k) * (w / 2).sin() ** (2 * k) for k in range(n))
    cepstrum = torch.fft.ifft(square.log()).real / 2
    cepstrum[1:2048] *= 2  # minimum phase: times before 0 are folded onto those after it
    cepstrum[2049:] = 0
    zeros = (1 + torch.polar(torch.ones_like(w), -w)) / 2  # n of them, at -1
    return torch.fft.ifft(torch.fft.fft(cepstrum).exp() * zeros ** n).real[:2 * n] * math.sqrt(2)

def lattice_angles(h):
    """The angles (F/2,) with lattice(rotations(angles)) = h (F,), peeled off from the first pair on."""
    u, v, angles = h[0::2], h[1::2], []
    while len(u) > 0:
        angles.append(torch.atan2(v[0], u[0]))
        cos, sin = angles[-1].cos(), angles[-1].sin()
        u, v = (cos * u + sin * v)[:-1], (cos * v - sin * u)[1:]
    return torch.stack(angles)

class Haar(nn.Module):
    """LMWT (arXiv 2504.08801, section 3): per level four vectors in R^C,
         a_i = alpha * x_2i + beta * x_2i+1,   d_i = gamma * x_2i + delta * x_2i+1,   a recurses,
       then the bands, weighed per level and channel, are added up and projected.
    Differs from the paper: undecimated, a_l[t] = alpha * a_{l-1}[t - 2^(l-1)] + beta * a_{l-1}[t], centred on
    t in an encoder. Decimated (the paper's), all layers share one grid: nothing leaves a block of 2^L, and in
    a decoder each token sees all of it. A block's halves differ in weight: tiled alike, y has rank T/2."""
    def __init__(self, cfg, causal=False):
        super().__init__()
        self.L, self.causal, self.undecimated = cfg.n_levels, causal, cfg.is_undecimated(causal)
        self.wavelet = Wavelet(cfg.wavelet, cfg.learned, self.L, cfg.n_embd)
        if cfg.learned == "free":  # channels that start apart
            self.wavelet.taps.data += 0.02 * torch.randn_like(self.wavelet.taps)
        # random signs: equal weights for both halves would start at rank T/2
        halves = 1 if self.undecimated or self.L == 0 else 2
        self.weight = nn.Parameter(torch.randn(self.L + 1, halves, cfg.n_embd) / math.sqrt(self.L + 1))
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)

    def init_state(self, B, device=None, dtype=None):
        if self.undecimated:  # (F-1) (2^L - 1) rows
            return self.wavelet.init_past(B, device=device, dtype=dtype)
        return torch.zeros(B, 0, self.weight.size(-1), device=device, dtype=dtype)

    def forward(self, x, mask=None, state=None):
        mask = as_mask(mask)
        a = masked(x, mask)
        if not self.undecimated:
            after = a if state is None else torch.cat((state, a), 1)
            y = self.block(after, mask)[:, after.size(1) - x.size(1):]
        else:
            y, after = 0, []
            for l in range(self.L):
                low, high = self.wavelet.filters(l)
                pair = low, self.weight[l] * high  # so that its detail is weighed
                (a, d), past = undecimated(a, pair, 2 ** l, self.causal, None if state is None else state[l])
                a = masked(a, mask)  # padding stays zero, as what lies beyond the end
                y += d
                after.append(past)
            y += self.weight[self.L] * a
        return self.c_proj(y) if state is None else (self.c_proj(y), after)

    def block(self, a, mask):  # the paper's, down through the levels and up again, zeros beyond the ends
        T, size = a.size(1), 2 ** self.L
        if not torch.compiler.is_compiling() and T > size:
            warnings.warn(f"decimated haar: nothing leaves a block of {size} tokens, of {T}: raise --levels")
        whole = (T + size - 1) // size * size  # padded behind, so that every level halves
        a = F.pad(a, (0, 0, 0, whole - T))
        mask = F.pad(a.new_ones(1, T).bool() if mask is None else mask, (0, whole - T))
        details = []
        for l in range(self.L):
            low, high = self.wavelet.filters(l)
            p = len(low) // 2 - 1
            a = delayed(F.pad(a, (0, 0, p, p)), len(low), 1, 2, a.size(1) // 2)
            details.append(filtered(a, high))
            mask = mask.unflatten(1, (-1, 2)).any(2)
            a = masked(filtered(a, low), mask)
        y = self.weight[self.L] * a[:, :, None]
        for d, w in zip(reversed(details), self.weight[:self.L].flip(0)):
            y = (y + w * d[:, :, None]).flatten(1, 2)[:, :, None]  # (B, K, 2, C) -> (B, 2K, 1, C)
        return y[:, :T, 0].clone(memory_format=torch.contiguous_format)  # never a view: one graph

class Wavspa(nn.Module):
    """WavSpA (arXiv 2210.01989, eq. 3): y = IDWT(attend(DWT(x))), every band attended.
    Differs from the paper: ortho inverts exactly (theirs flips channels, not taps); rows wrap at own ends;
    one attention for all bands, told apart by an embedding; a causal form, undecimated, at cost L + 1."""
    def __init__(self, cfg, causal=False):
        super().__init__()
        self.L, self.causal, self.undecimated = cfg.n_levels, causal, cfg.is_undecimated(causal)
        self.wavelet = Wavelet(cfg.wavelet, cfg.learned, self.L, cfg.n_embd)
        inner = replace(cfg, mixer=cfg.inner, levels=0)  # an inner wersa: its bands are split already
        count = 1 if cfg.wavspa_shared else self.L + 1
        self.inner = nn.ModuleList(MIXERS[cfg.inner](inner, causal) for _ in range(count))
        self.band = nn.Parameter(0.02 * torch.randn(self.L + 1, cfg.n_embd))  # of a_L, d_L, ..., d_1

    def init_state(self, B, device=None, dtype=None):
        inner = [self.inner[i % len(self.inner)].init_state(B, device, dtype) for i in range(self.L + 1)]
        return self.wavelet.init_past(B, device=device, dtype=dtype), inner

    def forward(self, x, mask=None, state=None):
        mask = as_mask(mask)
        n = None if mask is None else lengths(mask)
        x = masked(x, mask)
        past, inner = (None, None) if state is None else state
        if self.undecimated:
            bands, past = self.wavelet.undecimated(x, self.causal, mask, past)
        else:
            bands = self.wavelet.dwt(x, n)
        states = []
        for i, band in enumerate(bands):
            mixer = self.inner[i % len(self.inner)]
            band = band + self.band[i]
            if state is not None:
                bands[i], after = mixer(band, state=inner[i])
                states.append(after)
            elif n is None or self.undecimated:
                bands[i] = mixer(band, mask)
            else:
                count = -(-n // 2 ** min(self.L, self.L + 1 - i))  # of each row's coefficients
                bands[i] = mixer(band, torch.arange(band.size(1), device=x.device) < count[:, None])
        y = sum(bands) if self.undecimated else self.wavelet.idwt(bands, n)[:, :x.size(1)]
        return y if state is None else (y, (past, states))

SEGMENT, CHUNK = 512, 64  # tokens: features are made for one SEGMENT at a time; a CHUNK's scores are a matrix

def features(x, R, kind, query=False):
    """phi(x) >= 0 of x (..., T, dh), R (dh, m): queries (..., T, m), keys transposed, (..., m, T): faster.
    relu: ReLU(x R) / sqrt(m), an arc-cosine kernel. exp: exp(x R - |x|^2 / 2), for exp(q.k / sqrt(dh))."""
    dh, m = R.shape
    if kind == "exp":
        x = x * dh ** -0.25
        u = x @ R if query else R.mT @ x.mT
        less = u.amax(-1, keepdim=True).detach() if query else x.square().sum(-1)[..., None, :] / 2
        return (u - less).exp()  # a query's factor cancels: its largest is set to 1
    R = R * m ** -0.5
    u = x @ R if query else R.mT @ x.mT
    return (u + u.abs()) / 2 if torch.compiler.is_compiling() else F.relu(u)  # it would keep a mask

def with_ones(v, mask):  # (B, H, T, dh + 1), the last for the denominator; zero where mask (B, T) is False
    v = F.pad(v, (0, 1), value=1.0)
    return v if mask is None else v * mask[:, None, :, None]
def normalise(y, kind):  # sums (..., dh + 1) -> the first dh over the last: relu's may be 0, exp's tiny
    return y[..., :-1] / (y[..., -1:] + (1e-6 if kind == "relu" else 1e-30))

def again(f, R, *parts):
    """f of a segment; where features are many it is made anew in the backward pass, so that none are kept."""
    few = R.size(1) <= 4 * R.size(0)  # those of q and k are no more than an MLP keeps
    if few or parts[0].size(2) < SEGMENT or not torch.is_grad_enabled() or functorch(parts[0]):
        return f(*parts)
    return checkpoint(f, *parts, use_reentrant=False, preserve_rng_state=False)
def digest(k, v, R, kind):  # phi(k)^T v, all that is kept of a source: (B, H, m, dh + 1)
    parts = zip(k.split(SEGMENT, 2), v.split(SEGMENT, 2))
    return sum(again(lambda k, v: features(k, R, kind) @ v, R, *part) for part in parts)
def read(q, KV, R, kind):  # phi(q) KV, normalised: (B, H, T, dh)
    ys = [again(lambda q: features(q, R, kind, True) @ KV, R, part) for part in q.split(SEGMENT, 2)]
    return normalise(torch.cat(ys, 2), kind)

def read_causally(q, k, v, KV, R, kind):
    """read(q, digest(k, v)) of each token and those before it, KV what came earlier -> (B,H,T,dh), KV."""
    T, ys = q.size(2), []
    c = 1 if T == 1 else CHUNK
    def segment(q, k, v, KV):
        q, k, v = (u.unflatten(2, (-1, c)) for u in (q, k, v))  # (B, H, chunks, c, .)
        fq, fk = features(q, R, kind, True), features(k, R, kind)
        KV = torch.cat((KV[:, :, None], fk @ v), 2).cumsum(2)  # before each chunk, and after all
        y = fq @ KV[:, :, :-1] + (fq @ fk).tril() @ v  # earlier chunks, and a triangle for its own
        return y.flatten(2, 3), KV[:, :, -1].clone()
    q, k, v = (F.pad(u, (0, 0, 0, c))[:, :, :(T + c - 1) // c * c] for u in (q, k, v))  # padded behind
    for part in zip(q.split(SEGMENT, 2), k.split(SEGMENT, 2), v.split(SEGMENT, 2)):
        y, KV = again(segment, R, *part, KV)
        ys.append(y)
    return normalise(torch.cat(ys, 2)[:, :, :T], kind), KV

class Wersa(Attention):
    """WERSA (arXiv 2507.08637): DWT of Q and K along T, band l scaled by a gain, inverse DWT, then
         y = phi(Q) (phi(K)^T V) / (phi(Q) . sum phi(K) + eps),   phi(x) = ReLU(x R) / sqrt(m);
       gains (L+1 a head) = scale * sigmoid(MLP(mean query)). Linear in T.
    Differs from the paper: Q and K share one frozen R (two lose the content signal); no bandwidth, as
    it cancels with ReLU; a causal form: undecimated bands, the running mean query, prefix sums. Its bands are
    short moving averages; that convolutions on q and k help recall is known (arXiv 2505.15105)."""
    def __init__(self, cfg, causal=False):
        super().__init__(cfg, causal)
        self.L, self.kind, self.undecimated = cfg.n_levels, cfg.feature_map, cfg.is_undecimated(causal)
        self.register_buffer("R", torch.randn(self.head_size, cfg.n_features or 4 * self.head_size))
        self.wavelet = Wavelet(cfg.wavelet, cfg.learned, self.L, 2 * cfg.n_embd)
        if self.L > 0:
            self.scale = nn.Parameter(torch.ones(cfg.n_head, self.L + 1))  # of a_L, d_L, ...
            self.filter = nn.Sequential(nn.Linear(cfg.n_embd, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                                        nn.Linear(64, cfg.n_head * (self.L + 1)), nn.Sigmoid())

    def init_state(self, B, device=None, dtype=None):
        (dh, m), sums = self.R.shape, torch.promote_types(dtype or torch.float32, torch.float32)
        total = torch.zeros(B, 1, self.n_head * dh, device=device, dtype=sums)
        KV = torch.zeros(B, self.n_head, m, dh + 1, device=device, dtype=sums)
        return 0, total, self.wavelet.init_past(B, device=device, dtype=dtype), KV

    def weigh(self, qk, mean, mask, past):  # qk (B, T, 2C), mean query (B, T or 1, C)
        gains = self.scale * self.filter(mean).unflatten(-1, (self.n_head, -1))  # (B, T or 1, H, L+1)
        n = None if mask is None else lengths(mask)
        if self.undecimated:
            bands, past = self.wavelet.undecimated(qk, self.causal, mask, past)
        else:
            bands = self.wavelet.dwt(qk, n)
        for i, band in enumerate(bands):
            band = band.unflatten(-1, (2, self.n_head, -1))
            bands[i] = (gains[:, :, None, :, i, None] * band).flatten(2)
        return sum(bands) if self.undecimated else self.wavelet.idwt(bands, n)[:, :qk.size(1)], past

    def forward(self, x, mask=None, state=None):
        mask = as_mask(mask)
        B, T, C = x.shape
        t, total, past, KV = (0, 0, None, None) if state is None else state
        qk, v = self.c_attn(masked(x, mask)).split([2 * C, C], -1)
        if self.L > 0:
            qk = masked(qk, mask)  # a bias would fill it
            q = wide(qk[..., :C])
            if self.causal:
                sums = total + q.cumsum(1)
                mean = sums / torch.arange(t + 1, t + T + 1, device=x.device)[:, None]
                total = sums[:, -1:].clone()
            else:
                real = T if mask is None else mask.sum(1)[:, None, None].clamp(min=1)
                mean = q.sum(1, keepdim=True) / real
            qk, past = self.weigh(qk, mean.to(x.dtype), mask, past)
        q, k, v = (wide(self.heads(u)) for u in (*qk.chunk(2, -1), v))  # (B, H, T, dh)
        q, k, v = self.placed(q, t), self.placed(k, t), with_ones(v, mask)
        R = self.R.to(q.dtype)
        with no_autocast(x):
            if self.causal:
                KV = q.new_zeros(B, self.n_head, R.size(1), v.size(-1)) if KV is None else KV
                y, KV = read_causally(q, k, v, KV, R, self.kind)
            else:
                y = read(q, digest(k, v, R, self.kind), R, self.kind)
        y = self.out(y.to(x.dtype))
        return y if state is None else (y, (t + T, total, past, KV))

class Gated(nn.Module):
    """c_proj(mixed * silu(W x)): each token weighs what was mixed for it (arXiv 2505.06708, there a sigmoid).
    haar is linear in x without it. A mixer's own c_proj moves behind the gate."""
    def __init__(self, mixer, cfg):
        super().__init__()
        self.mixer = mixer
        self.gate = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        if isinstance(getattr(mixer, "c_proj", None), nn.Linear):
            self.c_proj, mixer.c_proj = mixer.c_proj, nn.Identity()
        self.init_state = getattr(mixer, "init_state", None)

    def forward(self, x, mask=None, state=None):
        gate = F.silu(self.gate(x))
        if state is None:
            return self.c_proj(self.mixer(x, mask) * gate)
        y, state = self.mixer(x, state=state)
        return self.c_proj(y * gate), state

MIXERS = {"attention": Attention, "haar": Haar, "wavspa": Wavspa, "wersa": Wersa, "fourier": Fourier}
CHOICES["mixer"] = MIXERS

def build_mixer(cfg, causal=False):  # of several that cfg names, the first
    cfg = cfg.of_layer(0)
    mixer = MIXERS[cfg.mixer](cfg, causal)
    goes_on = hasattr(mixer, "init_state") and "state" in inspect.signature(mixer.forward).parameters
    check(goes_on or not causal, f"--mixer={cfg.mixer} cannot be causal: it lacks init_state or state=")
    return Gated(mixer, cfg) if cfg.gate else mixer

class CrossAttention(nn.Module):
    """Softmax attention from x (B,T,C) to memory (B,S,C); by --pos=rope target t stands at ratio * t."""
    heads, out, placed = Attention.heads, Attention.out, Attention.placed
    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.ratio, self.rope = cfg.n_head, cfg.cross_ratio, cfg.pos == "rope"
        self.c_q = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.c_kv = nn.Linear(cfg.n_embd, 2 * cfg.n_embd, bias=False)
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, x, memory, mask=None):
        return self.read(x, self.digest(memory, mask))
    def digest(self, memory, mask=None):
        k, v = (self.heads(u) for u in self.c_kv(memory).chunk(2, -1))
        return self.placed(k, 0), v, as_mask(mask)

    def read(self, x, source, t=0):  # x (B, T, C), the targets from place t on
        return self.out(attend(self.placed(self.heads(self.c_q(x)), t, self.ratio), *source))

class CrossWersa(CrossAttention):
    """phi(Q) (phi(K)^T V) over the source: T and S never meet. No wavelets: they would blur what is read."""
    def __init__(self, cfg):
        super().__init__(cfg)
        dh, self.kind = cfg.n_embd // cfg.n_head, cfg.feature_map
        self.register_buffer("R", torch.randn(dh, cfg.n_features or 4 * dh))

    def digest(self, memory, mask=None):
        k, v, mask = super().digest(memory, mask)
        k, v = wide(k), with_ones(wide(v), mask)
        with no_autocast(memory):
            return digest(k, v, self.R.to(k.dtype), self.kind)

    def read(self, x, source, t=0):
        q = wide(self.placed(self.heads(self.c_q(x)), t, self.ratio))
        with no_autocast(x):
            y = read(q, source, self.R.to(q.dtype), self.kind)
        return self.out(y.to(x.dtype))

class Aligned(CrossAttention):
    """Windowed cross-attention, LMWT's setting, linear in T and S: target t looks at place floor(ratio t),
    the tokens around it and, per level, the means of blocks around it. A softmax over these few weighs them
    by place and q.k, --cross=place by place alone. (ByteNet, arXiv 1610.10099, read by place, too.)"""
    def __init__(self, cfg):
        super().__init__(cfg)
        self.L = cfg.levels if cfg.levels >= 0 else cfg.whole_block
        self.reach = [4] + [2] * self.L  # candidates on either side: tokens, then blocks of each level
        self.chunk = max(1, 64 // 2 ** int(math.log2(max(1, cfg.cross_ratio))))  # targets at once
        self.place = nn.Linear(cfg.n_embd, cfg.n_head * sum(2 * w + 1 for w in self.reach), bias=False)
        if cfg.cross_kind == "place":
            self.c_q, self.c_kv = None, nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)

    def digest(self, memory, mask=None):  # -> prefix sums of (k, v) (B, S + 1, 2C) and of real; lengths
        real = memory.new_ones(memory.shape[:2]).bool() if mask is None else as_mask(mask)
        sums = masked(wide(self.c_kv(memory)), real).cumsum(1)
        return F.pad(sums, (0, 0, 1, 0)), F.pad(real.cumsum(1), (1, 0)), lengths(real)

    def read(self, x, source, t=0):
        # a chunk of c targets shares the blocks that any of them may look at; each sees its own by a mask
        sums, real, n = source
        T, C, H = x.size(1), x.size(2), self.n_head
        c = 1 if T == 1 else self.chunk
        x = F.pad(x, (0, 0, 0, c))[:, :(T + c - 1) // c * c].unflatten(1, (-1, c))  # (B, chunks, c, C)
        at = (torch.arange(t, t + x.size(1) * c, device=x.device) * self.ratio).long()
        at = at.minimum(n[:, None] - 1).unflatten(1, (-1, c))  # (B, chunks, c): each target's place
        edges, first = [], 0  # a block's level, place, reach, candidate
        for l, w in enumerate(self.reach):
            edges += [(l, i, w, first + w) for i in range(-w, w + 3 + int((c - 1) * self.ratio) // 2 ** l)]
            first += 2 * w + 1
        level, place, reach, first = torch.tensor(edges, device=x.device).unbind(1)  # (R + 1,)
        j = (at[:, :, :1] >> level) + place  # (B, chunks, R + 1)
        edge = (j << level).clamp(0, sums.size(1) - 1).flatten(1)
        count = real.gather(1, edge).view_as(j).diff()  # (B, chunks, R) tokens in a block
        kv = pick(sums, edge).unflatten(1, j.shape[1:]).diff(dim=2) / count.clamp(min=1)[..., None]
        *keys, values = kv.unflatten(-1, (-1, H, C // H)).transpose(2, 4).unbind(3)  # (B, chunks, H, R, dh)
        far = j[:, :, None, :-1] - (at[..., None] >> level[:-1])  # (B, chunks, c, R) in blocks
        seen = (far.abs() <= reach[:-1]) & (count > 0)[:, :, None] & (level[1:] == level[:-1])
        slot = torch.where(seen, far + first[:-1], -1)[:, :, None]  # (B, chunks, 1, c, R)
        logits = wide(self.place(x)).unflatten(-1, (H, -1)).transpose(2, 3)
        logits = logits.gather(-1, slot.clamp(min=0).expand(-1, -1, H, -1, -1))  # (B, chunks, H, c, R)
        if keys:
            q = wide(self.c_q(x)).unflatten(-1, (H, -1)).transpose(2, 3)
            logits = logits + q @ keys[0].mT / math.sqrt(C // H)
        weights = logits.masked_fill(slot < 0, -1e9).softmax(-1)
        y = (weights @ values).transpose(2, 3).flatten(3).flatten(1, 2)  # (B, chunks * c, C)
        return self.c_proj(y[:, :T].to(x.dtype).clone(memory_format=torch.contiguous_format))  # as in haar

CROSSES = {"attention": CrossAttention, "wersa": CrossWersa, "aligned": Aligned, "place": Aligned}

def build_cross(cfg):  # y = cross(x, memory, mask): x (B, T, C), memory (B, S, C), mask (B, S) -> (B, T, C)
    return CROSSES[cfg.of_layer(0).cross_kind](cfg.of_layer(0))

class Block(nn.Module):
    """Pre-norm: mix tokens, read the source if there is one, then the MLP."""
    def __init__(self, cfg, causal=False, cross=False):
        super().__init__()
        self.ln_1, self.mixer = nn.LayerNorm(cfg.n_embd, bias=False), build_mixer(cfg, causal)
        if cross:
            self.ln_x, self.cross = nn.LayerNorm(cfg.n_embd, bias=False), build_cross(cfg)
        C = cfg.n_embd
        self.ln_2 = nn.LayerNorm(C, bias=False)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C, bias=False), nn.GELU(), nn.Linear(4 * C, C, bias=False))
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x, mask=None, source=None, state=None, t=0):  # x begins at place t
        if state is None:
            y = self.mixer(self.ln_1(x), mask)
        else:
            y, state = self.mixer(self.ln_1(x), state=state)
        x = x + self.drop(y)
        if source is not None:
            x = x + self.drop(self.cross.read(self.ln_x(x), source, t))
        x = x + self.drop(self.mlp(self.ln_2(x)))
        return x if state is None else (x, state)

class WaveletTransformer(nn.Module):
    """encdec: src (B,S), idx (B,T) -> logits (B,T,V); decoder: idx -> logits; encoder: idx -> (B,n_classes).
    Token embeddings are tied to the output, and shared by both sides of encdec."""
    def __init__(self, cfg):
        super().__init__()
        cfg.__post_init__()  # fields may have been set since
        self.config = cfg
        C, layers = cfg.n_embd, [cfg.of_layer(i) for i in range(cfg.n_layer)]
        self.wte = nn.Embedding(cfg.vocab_size, C)
        self.wpe = nn.Embedding(cfg.block_size, C) if cfg.pos == "learned" else None
        self.drop = nn.Dropout(cfg.dropout)
        if cfg.arch != "decoder":
            self.encoder = nn.ModuleList(Block(layer) for layer in layers)
            self.ln_e = nn.LayerNorm(C, bias=False)
        if cfg.arch == "encoder":
            self.cls = nn.Parameter(0.02 * torch.randn(C)) if cfg.pool == "cls" else None
            self.head = nn.Linear(C, cfg.n_classes)
        else:
            self.decoder = nn.ModuleList(Block(layer, True, cfg.arch == "encdec") for layer in layers)
            self.ln_f = nn.LayerNorm(C, bias=False)
            self.lm_head = nn.Linear(C, cfg.vocab_size, bias=False)
            self.lm_head.weight = self.wte.weight
        for name, module in self.named_modules():  # taps, level weights and the like keep their own start
            if isinstance(module, (nn.Linear, nn.Embedding)):
                last = name.endswith(("c_proj", "mlp.2"))  # of a residual branch
                std = 0.02 / math.sqrt(2 * cfg.n_layer) if last else 0.02
                nn.init.normal_(module.weight, 0.0, std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    def num_params(self, part=None):  # of mixer, cross, mlp, wte
        return sum(p.numel() for n, p in self.named_parameters() if part is None or part in n.split("."))

    def embed(self, idx, t=0):
        check(idx.size(1) >= 1, "a sequence needs at least one token")
        x, end, most = self.wte(idx), t + idx.size(1), self.config.block_size
        if self.wpe is not None:
            if end > most:  # check() would format its sentence, and compile anew for each length
                raise ValueError(f"{end} tokens do not fit --block_size={most}, --pos=learned")
            x = x + self.wpe(torch.arange(t, end, device=idx.device))
        return self.drop(x)

    def encode(self, src):  # ids (B, S) -> memory (B, S, C), mask (B, S)
        mask, x = as_mask(src != self.config.pad_id), self.embed(src)
        if getattr(self, "cls", None) is not None:
            x = torch.cat((self.cls.expand(x.size(0), 1, -1), x), 1)
            mask = F.pad(mask, (1, 0), value=True)
        for block in self.encoder:
            x = block(x, mask)
        return self.ln_e(x), mask

    def digest(self, src):  # what each decoder layer keeps of src (B, S)
        check((src is not None) == (self.config.arch == "encdec"), "src= goes with --arch=encdec alone")
        if src is None:
            return [None] * len(self.decoder)
        memory, mask = self.encode(src)
        return [block.cross.digest(memory, mask) for block in self.decoder]

    def forward(self, idx, targets=None, src=None):
        """-> logits, loss: the mean over targets that are not pad_id (of an encoder: -1), or None."""
        cfg, loss = self.config, None
        if cfg.arch == "encoder":
            x, mask = self.encode(idx)
            if cfg.pool == "mean":
                x = masked(x, mask).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
            elif cfg.pool == "cls":
                x = x[:, 0]
            logits = self.head(x)
        else:
            x = self.embed(idx)
            for block, source in zip(self.decoder, self.digest(src)):
                x = block(x, source=source)  # no mask: padding follows, and the past never sees it
            logits = self.lm_head(self.ln_f(x))
            targets = None if targets is None else targets.masked_fill(targets == cfg.pad_id, -1)
        if targets is not None:
            smoothing = cfg.label_smoothing if self.training else 0.0
            flat = wide(logits.flatten(0, -2))
            loss = F.cross_entropy(flat, targets.flatten(), ignore_index=-1, label_smoothing=smoothing)
        return logits, loss

    def init_state(self, B, src=None):  # before a decoder's first token; src (B, S) is read here once
        like = self.wte.weight
        mixers = [block.mixer.init_state(B, like.device, like.dtype) for block in self.decoder]
        return dict(t=0, mixers=mixers, sources=self.digest(src))

    def decode(self, idx, state):  # idx (B, T) goes on where state stopped -> logits (B, T, V), state
        t, mixers = state["t"], []
        x = self.embed(idx, t)
        for block, mixer, source in zip(self.decoder, state["mixers"], state["sources"]):
            x, after = block(x, None, source, mixer, t)
            mixers.append(after)
        return self.lm_head(self.ln_f(x)), dict(state, t=t + idx.size(1), mixers=mixers)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, src=None, temperature=1.0, top_k=None):
        """Continue idx (B,T) -> (B, T + max_new_tokens); temperature 0 = argmax. Each row, padded behind,
        goes on at its own end: one pass up to the end of the shortest, then token by token."""
        check(temperature >= 0, f"--temperature={temperature} must be at least 0")
        check(top_k is None or top_k >= 1, f"--top_k={top_k} must be at least 1")
        check(idx.size(1) > 0 and max_new_tokens >= 0, "generate takes a token or more and adds 0 or more")
        n = lengths(as_mask(idx != self.config.pad_id))
        ids = F.pad(idx, (0, max_new_tokens), value=self.config.pad_id)
        was_training, t = self.training, 0
        try:
            self.eval()
            state = self.init_state(len(idx), src)
            for end in range(int(n.min()), int(n.max()) + max_new_tokens):
                logits, state = self.decode(ids[:, t:end], state)
                logits = wide(logits[:, -1]) / max(temperature, 1e-6)
                if top_k is not None:
                    least = logits.topk(min(top_k, logits.size(-1)))[0][:, -1:]
                    logits = logits.masked_fill(logits < least, -math.inf)
                new = logits.argmax(-1)
                if temperature > 0:
                    new = torch.multinomial(logits.softmax(-1), 1)[:, 0]
                mine = (n <= end) & (end < n + max_new_tokens)  # others are in the prompt still, or done
                ids[:, end] = torch.where(mine, new, ids[:, end])
                t = end
        finally:
            self.train(was_training)
        return ids

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW: linear and embedding weights decay; norms, biases, taps and level weights do not."""
        matrices = {id(m.weight) for m in self.modules() if isinstance(m, (nn.Linear, nn.Embedding))}
        decay = [p for p in self.parameters() if id(p) in matrices]
        rest = [p for p in self.parameters() if id(p) not in matrices]
        groups = [dict(params=decay, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ("cuda", "cpu"))
