"""
The promises of model.py, each held against something slow and obvious: PyWavelets, convolutions, the papers'
formulas, finite differences; then the scripts, as a user runs them. python -m pytest -q runs all of it, -n 2
in two processes, -k wersa a part. A few tests want PyWavelets and hypothesis, and are skipped without them. A
comment at a test's head names wrong versions that it catches. A mixer that you add to MIXERS is taken up by
every promise below.
"""

import argparse
import contextlib
import copy
import csv
import glob
import gzip
import hashlib
import inspect
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from multiprocessing import get_context
from threading import Lock

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import model as M
import prepare_data
import sample
from model import ModelConfig, Wavelet, WaveletTransformer, build_cross, build_mixer, daubechies, dwt, idwt
from prepare_data import Tokenizer, de, en
from sample import beam_search, draw, load_checkpoint, load_model, translate

os.environ["OMP_NUM_THREADS"] = "1"  # of scripts: a second thread that waits for a core costs tenfold
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
torch.set_num_threads(max(1, torch.get_num_threads() // workers))
pytestmark = pytest.mark.filterwarnings("ignore:decimated haar")
each = pytest.mark.parametrize
double = torch.float64
PREFIXES = (1, 2, 3, 7, 8, 15, 16, 31, 33, 63)
CUTS = (1, 1, 2, 5, 16, 1, 39)  # of 65 tokens
BOTH = (True, False)  # causal, bidirectional
PARAMS = ("fixed", "free", "ada", "ortho", "lift")

def lines(text):
    """Settings, set apart by | or line ends."""
    return [" ".join(line.split()) for line in text.replace("\n", "|").split("|") if line.strip()]

VARIANTS = lines("""
    attention | attention gate=0 pos=none | attention window=7 | attention window=1 gate=0
    attention pos=learned | haar gate=0 | haar wavelet=db2 | haar wavelet=db4 levels=3 | haar levels=0
    haar undecimated=yes levels=2 | haar undecimated=decoder
    haar undecimated=decoder wavelet=db2 levels=3 gate=0
    wavspa levels=2 | wavspa gate=0 wavspa_shared=0 levels=3 | wavspa levels=0 | wavspa window=5
    wavspa undecimated=yes levels=2 | wavspa inner=wersa pos=none levels=3
    wavspa wavelet=db4 inner=wersa feature_map=exp wavspa_shared=0
    wersa | wersa gate=0 n_features=7 | wersa levels=0 | wersa feature_map=exp | wersa levels=3 wavelet=db2
    wersa n_features=40 | wersa feature_map=exp n_features=40 levels=3 pos=none gate=0
    wersa undecimated=yes levels=3 | wersa wavelet=db4 gate=0""")
for name, learned in product(("haar", "wavspa", "wersa"), PARAMS):
    VARIANTS.append(f"{name} wavelet_params={learned} levels=2")
    VARIANTS.append(f"{name} wavelet_params={learned} wavelet=db2 levels=2 undecimated=decoder gate=0")
MIXED = lines("""attention | haar | haar gate=0 pos=learned | wavspa
    wavspa wavelet_params=lift inner=wersa levels=2 | wersa | wersa feature_map=exp
    haar,attention | wersa,attention window=7 | haar,haar,attention n_layer=3""")
for name in M.MIXERS:  # yours
    if name not in ("attention", "haar", "wavspa", "wersa", "fourier"):
        VARIANTS.append(name)
        MIXED.append(name)
ENCODERS = [*product(VARIANTS, BOTH), ("fourier", False), ("wavspa inner=fourier", False),
            ("haar undecimated=no levels=6", False), ("wavspa undecimated=no levels=3", False)]
READERS = lines("""cross=attention cross_ratio=0.5 | cross=attention pos=none
    cross=wersa | cross=wersa feature_map=exp n_features=40 cross_ratio=0.5
    cross=aligned levels=2 | cross=aligned cross_ratio=1.5 | cross=aligned cross_ratio=10 levels=2
    cross=place cross_ratio=0.5 levels=2""")

def config(text="", **kw):
    """config("wersa levels=2", n_embd=8): a tiny model, but for the flags in text and the keywords."""
    settings = dict(arch="encoder", vocab_size=13, block_size=64, n_head=2, n_embd=16)
    for word in text.split():
        key, _, value = word.rpartition("=")
        kind = type(getattr(ModelConfig, key or "mixer"))
        settings[key or "mixer"] = value if kind is str else kind(float(value))
    return ModelConfig(**(settings | kw))

def shaken(build, text, *args, **kw):
    """A module with every parameter moved off its start, where many mistakes cannot be seen."""
    torch.manual_seed(0)
    module = build(config(text, **kw), *args)
    for p in module.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return module.eval()

def mixer(text, causal=True, **kw):
    return shaken(build_mixer, text, causal, **kw)

def transformer(text, arch="decoder", **kw):
    return shaken(WaveletTransformer, text, arch=arch, **kw)

def rand(*shape, seed=1, **kw):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kw)

def tokens(*shape, seed=1, low=1, high=13):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))

def mask_of(T, *lengths):
    return torch.arange(T) < torch.tensor(lengths)[:, None]

def loud(x, t):
    """x with everything from t on replaced."""
    return torch.cat((x[:, :t], 1e4 * torch.randn_like(x[:, t:])), 1)

def cut(row, eos):
    return row[:row.index(eos) + 1] if eos in row else row

SOURCE = tokens(2, 30, seed=0) * mask_of(30, 30, 11)

@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    """wersa walks in small steps, several in a short sequence; monkeypatch.undo() for the real ones."""
    monkeypatch.setattr(M, "SEGMENT", 16)
    monkeypatch.setattr(M, "CHUNK", 4)

def close(a, b, tol=1e-5):
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    error = ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()
    assert error <= tol, f"off by {error:.2e}, allowed {tol:.0e}"

def same_gradients(module, y, want, tol):
    """y and want have the same slopes in every parameter of the module."""
    params = list(module.parameters())
    weights = rand(*y.shape, seed=2, dtype=y.dtype)
    ours = torch.autograd.grad((y * weights).sum(), params)
    theirs = torch.autograd.grad((want * weights).sum(), params)
    for a, b in zip(ours, theirs):
        close(a, b, tol)

def leaks(f, x):
    """The prefixes t for which f(x)[:, :t] notices x[:, t:]: t if by a bit, -t if by a gradient."""
    y, found = f(x.requires_grad_()), set()
    for t in PREFIXES:
        dx, = torch.autograd.grad((y * torch.randn_like(y))[:, :t].sum(), x, retain_graph=True)
        assert t < 3 or dx[:, :t].any()
        if dx[:, t:].any():
            found.add(-t)
        if not torch.equal(f(loud(x, t))[:, :t], y[:, :t]):
            found.add(t)
    return found

def in_chunks(step, x, state, cuts=CUTS):
    """step(x, state) -> y, state over pieces of x."""
    ys = []
    for part in x.split(cuts, 1):
        y, state = step(part, state)
        ys.append(y)  # no clone: a view of the state would change under us
    return torch.cat(ys, 1), state

def chunked(m, x, cuts=CUTS):
    state = m.init_state(len(x), x.device, x.dtype)
    return in_chunks(lambda part, state: m(part, state=state), x, state, cuts)

# -----------------------------------------------------------------------------
# wavelets

# catches: taps flipped along channels, a wrap wrong for T < F, an odd T cropped at the wrong end, lost energy
@each("T", [1, 2, 3, 5, 16, 17, 24, 100, 255])
@each("n", [1, 2, 3, 4, 9, 20])
def test_reconstruction(n, T):
    x = rand(2, 1, T, 3, dtype=double).requires_grad_()
    rotated = M.lattice(M.rotations(rand(n, 3, dtype=double)))[0]  # another filter for each channel
    for h, levels in product((daubechies(n), rotated), range(math.ceil(math.log2(T)) + 1)):
        bands = dwt(x, h, levels)
        assert [b.size(2) for b in bands[1:]] == [-(-T // 2 ** l) for l in range(levels, 0, -1)]
        close(idwt(bands, h, T), x, 1e-12)
        if T % 2 ** levels == 0:  # orthonormal: the transpose, which a gradient takes, is the inverse
            energy = sum(b.square().sum() for b in bands)
            close(torch.autograd.grad(energy / 2, x)[0], x, 1e-12)

# catches: a row that wraps at the batch's end, or reads padding; an inverse that is none
@each("learned,n", [("fixed", 1), ("fixed", 2), ("fixed", 9), ("ortho", 1), ("ortho", 3),
                    ("lift", 1), ("lift", 2), ("lift", 4)])
@each("levels", [1, 4])
def test_rows_of_own_length(learned, n, levels):
    w = shaken(lambda cfg: Wavelet(n, learned, levels, 3).double(), "")
    if learned == "fixed":  # rounded to float32 when it was built
        w.taps.data = torch.stack((daubechies(n), M.mirror(daubechies(n))))
    x = rand(8, 31, 3, dtype=double)
    lengths = [1, 2, 3, 5, 16, 17, 30, 31]
    bands = w.dwt(x, torch.tensor(lengths))
    back = w.idwt(bands, torch.tensor(lengths))
    for i, T in enumerate(lengths):
        close(back[i, :T], x[i, :T], 1e-9)
        alone = w.dwt(x[i:i + 1, :T])
        close(w.idwt(alone)[0, :T], x[i, :T], 1e-9)
        for a, b in zip(alone, bands):
            close(b[i, :a.size(1)], a[0], 1e-12)
        if learned != "lift" and T % 2 ** levels == 0:  # orthonormal
            close(sum(b.square().sum() for b in alone), x[i, :T].square().sum(), 1e-9)

# catches: a sign, bands in the wrong order, an odd T extended by zero, levels drifting apart
@pytest.mark.filterwarnings("ignore::UserWarning")
@each("T", [2, 3, 5, 16, 17, 63, 64, 100])
def test_pywavelets(T):
    pywt = pytest.importorskip("pywt")
    x = rand(1, T, 1, dtype=double)
    most = math.ceil(math.log2(T))
    assert len(dwt(x)) == most + 1
    for levels, name in product(range(1, most + 1), ("haar", "db2", "db3", "db4", "db8", "db20")):
        theirs = pywt.wavedec(x[0, :, 0].numpy(), name, mode="periodization", level=levels)
        for a, b in zip(dwt(x, name, levels), map(torch.tensor, theirs), strict=True):
            shifts = range(len(b) if name != "haar" else 1)  # Haar exactly, the others up to a shift per band
            error = min((a[0, :, 0].roll(s) - b).abs().max() for s in shifts)
            assert error < 1e-10, f"{name}, {levels} levels"

# catches: a float64 too short, the maximum-phase twin, a lattice peeled in the wrong order
@each("n", range(1, 21))
def test_filters(n):
    low = daubechies(n)
    angles = M.lattice_angles(low)
    close(M.lattice(M.rotations(angles[:, None]))[0][:, 0], low, 1e-14)
    for h in (low[:, None], M.lattice(M.rotations(rand(n, 3, dtype=double)))[0]):
        pair = torch.stack((h, M.mirror(h)))
        for k in range(n):  # orthonormal to its own even shifts, and low-pass to high-pass
            products = torch.einsum("amc,bmc->cab", pair[:, :2 * n - 2 * k], pair[:, 2 * k:])
            close(products, (k == 0) * torch.eye(2, dtype=double).expand_as(products), 1e-13)
    assert abs(low.sum() - math.sqrt(2)) < 1e-14
    pywt = pytest.importorskip("pywt")
    close(low, torch.tensor(pywt.Wavelet(f"db{n}").rec_lo, dtype=double), 1e-14)

# catches: a parametrisation that starts elsewhere, a high-pass of another sign, a shape that forgets C
@each("name,learned", [*product(("haar", "db2", "db4"), PARAMS)])
def test_wavelet_starts(name, learned):
    w, low = Wavelet(name, learned, 3, 5), daubechies(name).float()
    for l, inverse in product(range(3), BOTH):
        for taps, want in zip(w.filters(l, inverse), (low, M.mirror(low))):
            close(taps, want[:, None].expand_as(taps), 1e-6)
            assert taps.size(1) in (1, 5)
    assert bool(list(w.parameters())) == (learned != "fixed")
    moved = shaken(lambda cfg: Wavelet(name, learned, 3, 5), "")
    x = rand(2, 33, 5)
    bands, _ = moved.undecimated(x, True)
    assert all(b.shape == x.shape for b in bands)
    if learned != "free":  # whose high-pass is a filter of its own
        close(sum(bands), x)
    if name == "haar":  # and starts as what the low-pass takes away
        close(sum(w.undecimated(x, True)[0]), x)

# catches: update and predict swapped, a matrix transposed
def test_lifting():
    steps = rand(1, 3, 1, dtype=double)
    u0, p, u1 = steps.flatten()
    low, high = torch.eye(2, dtype=double)
    low = low + u0 * high
    high = high + p * low
    low = low + u1 * high
    close(M.lifting(steps)[0, ..., 0], torch.stack((low, high)), 1e-12)

# catches: integers that become zeros, a transform along the batch, an inverse that is none
def test_dwt_refuses():
    x = rand(2, 16, 3)
    bad = [
        ("floats", lambda: dwt(torch.arange(12).view(1, 12, 1))),
        ("x\\[..., None\\]", lambda: dwt(rand(4, 16), "db2")),
        ("not orthonormal", lambda: dwt(x, torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4, 1)),
        ("not orthonormal", lambda: idwt(dwt(x, "db2", 1), torch.ones(4))),
        ("reverse", lambda: dwt(x, daubechies("db4").flip(0), 1)),
        ("bior2.2 is unknown", lambda: dwt(x, "bior2.2", 1)),
        ("even number", lambda: dwt(x, torch.ones(3), 1)),
        ("0..4 levels", lambda: dwt(x, "db2", 5)),
        ("levels=-1", lambda: dwt(x, "haar", -1)),
        ("db0 is unknown", lambda: daubechies(0)),
        ("db21 is unknown", lambda: daubechies(21)),
        ("can be learned", lambda: Wavelet("haar", "all"))]
    for words, call in bad:
        with pytest.raises(ValueError, match=words):
            call()

# -----------------------------------------------------------------------------
# every mixer: the promises

# catches: block means in a decoder, (total - own) prefix sums, a maximum over T, a wrap around the end
@each("text", VARIANTS)
def test_no_leak(text):
    m = mixer(text)
    assert leaks(m, rand(2, 65, 16)) == set()
    with torch.no_grad():  # the same within a chunk that goes on
        _, state = chunked(m, rand(2, 20, 16, seed=3), cuts=(20,))
    assert leaks(lambda x: m(x, state=copy.deepcopy(state))[0], rand(2, 65, 16)) == set()

# catches: a leak checker that finds nothing
def test_leaks_are_caught():
    found = leaks(mixer("haar undecimated=no gate=0"), rand(2, 65, 16))
    assert found == {s * t for t in PREFIXES for s in (1, -1)}

# catches: a view of a buffer, a state written in place, a position off by one, a lost gradient
@each("text", VARIANTS)
def test_chunks(text):
    m, x = mixer(text), rand(2, 65, 16)

    def step(part, state):
        kept = copy.deepcopy(state)
        m(1e4 * torch.randn(2, 3, 16), state=state)  # another future, tried and left
        torch.testing.assert_close(state, kept, rtol=0, atol=0)
        return m(part, state=state)
    with torch.no_grad():
        whole = m(x)
        for cuts in (CUTS, (65,), (64, 1), (1,) * 65, (3, 62)):
            close(in_chunks(step, x, m.init_state(2, device="cpu", dtype=x.dtype), cuts)[0], whole)
    x = x[:, :37]
    same_gradients(m, chunked(m, x, cuts=(1, 4, 17, 15))[0], m(x), 1e-4)

# catches: a state of another type than the module's, where none was asked for
@each("text", VARIANTS)
@torch.no_grad()
def test_default_state_of_a_half_precision_mixer(text):
    m, x = mixer(text).bfloat16(), rand(2, 9, 16).bfloat16()
    y, state = m(x, state=m.init_state(2))
    assert y.dtype == m(x[:, :1], state=state)[0].dtype == torch.bfloat16
    close(y, m(x), 0.05)

@each("text", ["haar", "wersa", "wersa feature_map=exp"])
@torch.no_grad()
def test_real_segments(text, monkeypatch):
    # catches: a segment's end forgotten, what only happens beyond 1,024 tokens
    monkeypatch.undo()
    m = mixer(text, block_size=2600)
    x = rand(1, 2600, 16)
    whole = m(x)
    close(chunked(m, x, cuts=(1300, 1, 1299))[0], whole)
    assert torch.equal(m(loud(x, 1500))[:, :1500], whole[:, :1500])

# catches: a state that grows, or is a view that holds all of a long prompt
@each("text", VARIANTS)
@torch.no_grad()
def test_size_of_state(text):
    m = mixer(text)
    plain = m.mixer if isinstance(m, M.Gated) else m
    for T in (1, 10, 100):
        _, state = chunked(m, rand(1, T, 16), cuts=(T,))
        for u in tree_leaves(state):
            assert not torch.is_tensor(u) or u.untyped_storage().nbytes() == u.numel() * u.element_size()
        numbers = sum(u.numel() for u in tree_leaves(state) if torch.is_tensor(u))
        if type(plain) is M.Attention and plain.window > 0:
            assert numbers == min(T, plain.window - 1) * 2 * 16
        elif type(plain) in (M.Haar, M.Wersa):  # whatever T
            rows = plain.wavelet.reach * (2 ** plain.L - 1)
            sums = 16 + 2 * plain.R.size(1) * 9 if type(plain) is M.Wersa else 0
            assert numbers == rows * plain.wavelet.C + sums

# catches: means over padding, a wrap into padding, masked keys that weigh, the NaN of a softmax over nothing
@each("text,causal", ENCODERS)
def test_masks(text, causal):
    m, x = mixer(text, causal), rand(4, 65, 16)
    lengths = (65, 40, 33, 1)
    mask, holes = mask_of(65, *lengths), rand(4, 65) < 0.5
    holes[:, 0] = True
    for seen in (mask, mask & holes):  # padding; holes anywhere
        y = m(x, seen)
        for hidden in (1e4 * torch.randn_like(x), torch.full_like(x, math.nan)):
            other = m(torch.where(seen[..., None], x, hidden), seen)
            assert y.isfinite().all() and torch.equal(y[seen], other[seen])
    y = m(x, mask)
    longer = m(F.pad(x, (0, 0, 0, 9), value=3.0), F.pad(mask, (0, 9)))
    close(longer[:, :65][mask], y[mask])
    for i, T in enumerate(lengths):
        close(m(x[i:i + 1, :T])[0], y[i, :T])
    for kind in (torch.int64, torch.float32, torch.uint8):
        assert torch.equal(m(x, mask.to(kind))[mask], y[mask])
    with pytest.raises(ValueError, match="pad on the right"):
        m(x, mask.flip(1))
    y = m(x.requires_grad_(), mask_of(65, 65, 0, 3, 0))  # rows with nothing in them
    assert y.isfinite().all() and torch.autograd.grad(y.sum(), x)[0].isfinite().all()

# catches: dh = 1 or odd under rope, a batch of one squeezed away, T below one block, a division by nothing
@each("text", VARIANTS)
def test_odd_shapes(text):
    for T, (C, H), causal in product((1, 2, 3, 63), ((4, 4), (6, 2), (5, 1)), BOTH):
        m, x = mixer(text, causal, n_embd=C, n_head=H), rand(1, T, C)
        y = m(x)
        assert y.shape == x.shape and y.isfinite().all() and m(0 * x).isfinite().all()
        if causal and T < 4:
            close(chunked(m, x, cuts=(1,) * T)[0], y)

# catches: a weight never read, a detach, a level that T = 2^L does not reach
@each("text,causal", ENCODERS)
def test_every_parameter_learns(text, causal):
    T = 200 if "wavelet=db" in text else 64  # db2's farthest tap of the last level lies 96 tokens back
    m, x = mixer(text, causal), rand(4, T, 16)
    (m(x) * rand(4, T, 16, seed=2)).sum().backward()
    for name, p in m.named_parameters():
        assert p.grad is not None and p.grad.any(), name
        whole = name.split(".")[-1] in ("taps", "band", "scale") or p.dim() == 3
        assert not whole or p.grad.bool().all(), f"part of {name}"

# catches: a detach, a write in place that autograd misses, float32 inside
@each("text,causal", [(text, causal) for text, causal in ENCODERS if "db4" not in text])
def test_gradcheck(text, causal):
    m = mixer(text.replace("levels=6", "levels=3"), causal, n_embd=4, block_size=8, n_features=5).double()
    names = [name for name, _ in m.named_parameters()]
    mask = mask_of(9, 9, 6)

    def f(x, *params):
        return torch.func.functional_call(m, dict(zip(names, params)), (x, mask))
    inputs = (rand(2, 9, 4, dtype=double).requires_grad_(), *m.parameters())
    assert f(*inputs).dtype == double
    assert torch.autograd.gradcheck(f, inputs, atol=1e-6, fast_mode=True)

PLAIN = lines("attention window=3 | haar | wavspa levels=2 | wersa | wersa feature_map=exp n_features=40")

# catches: a backward by hand: no double backward, no hooks
@each("text,causal", [*product(PLAIN, BOTH)])
def test_plain_autograd(text, causal):
    m, x = mixer(text, causal, n_embd=4, block_size=8).double(), rand(2, 9, 4, dtype=double).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # torch's flash kernels have no second derivative
        assert torch.autograd.gradgradcheck(lambda x: m(x).tanh(), x, atol=1e-5, fast_mode=True)
    same_gradients(m, checkpoint(m, x, use_reentrant=False), m(x), 1e-12)

# catches: a copy that goes on with the original's weights
@each("text", PLAIN)
@torch.no_grad()
def test_a_copy_is_its_own(text):
    m, x = mixer(text), rand(2, 9, 16)
    twin = copy.deepcopy(m)
    assert torch.equal(twin(x), m(x))
    for p in twin.parameters():
        p.zero_()
    assert m(x).any() and not twin(x).any() and not chunked(twin, x, cuts=(4, 5))[0].any()

# catches: slices of a weight, F.linear past the module: LoRA puts another in its place
@each("text", MIXED[:7])
@each("arch", ["decoder", "encdec"])
def test_a_replaced_linear_is_the_one_that_is_used(text, arch):
    m = transformer(text, arch)
    src = SOURCE if arch == "encdec" else None
    logits = m(tokens(2, 9), src=src)[0]
    for name, linear in list(m.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(m.get_submodule(parent), leaf, nn.Sequential(linear, nn.Tanh()))
            changed = m(tokens(2, 9), src=src)[0]
            assert not torch.allclose(changed, logits, atol=1e-7), name
            setattr(m.get_submodule(parent), leaf, linear)

# catches: a weight that is read past its Linear
@each("text", MIXED[:7])
@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # torch says that torchao takes over
def test_dynamic_quantisation(text):
    m = transformer(text, "encdec")
    small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(m), {nn.Linear}, dtype=torch.qint8)
    logits, want = small(tokens(2, 9), src=SOURCE)[0], m(tokens(2, 9), src=SOURCE)[0]
    assert not torch.equal(logits, want) and (logits - want).abs().max() < 0.2 * want.abs().max()
    assert small.generate(tokens(2, 3), 4, src=SOURCE).shape == (2, 7)

# catches: a tensor made on another device than asked for
@each("text", MIXED)
def test_construction_elsewhere(text):
    with torch.device("meta"):
        m = WaveletTransformer(config(text, arch="encdec", block_size=16))
    assert all(u.is_meta for u in [*m.parameters(), *m.buffers()])
    idx = torch.ones(2, 9, dtype=torch.long, device="meta")
    logits, loss = m(idx, idx, idx)  # shapes and FLOPs can be had without memory
    loss.backward()
    assert logits.shape == (2, 9, m.config.vocab_size) and logits.is_meta
    assert m.decode(idx, m.init_state(2, idx))[0].is_meta

# catches: a place in the whole model, its crosses and masks too, that torch.func cannot enter
@each("text,arch", [*product(MIXED, ("encdec", "encoder", "decoder"))])
def test_gradients_of_each_row_alone(text, arch, monkeypatch):
    monkeypatch.undo()
    m, idx, src = transformer(text, arch), tokens(2, 9), tokens(2, 11, seed=2) * mask_of(11, 11, 6)
    args = dict(encdec=(idx, idx, src), encoder=(src, idx[:, 0] % 2), decoder=(idx, idx))[arch]
    weights = dict(m.named_parameters())

    def loss(weights, *row):
        return torch.func.functional_call(m, weights, tuple(x[None] for x in row))[1]
    rows = (None, *[0] * len(args))
    each_row = torch.func.vmap(torch.func.grad(loss), rows, randomness="different")(weights, *args)
    m(*(x[1:] for x in args))[1].backward()
    for name, weight in weights.items():
        close(each_row[name][1], torch.zeros_like(weight) if weight.grad is None else weight.grad, 1e-5)

def error_in(dtype, module, *inputs):
    """How far a module in half precision is from itself in float64, relative."""
    want = copy.deepcopy(module).double()(*(x.to(dtype).double() for x in inputs))
    y = copy.deepcopy(module).to(dtype)(*(x.to(dtype) for x in inputs))
    return ((y.double() - want).norm() / want.norm()).item()

# catches: sums over 24,000 tokens beyond 65,504
@each("kind", list(M.CROSSES))
@each("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_long_source_in_half_precision(kind, dtype):
    cross = build_cross(ModelConfig(mixer="haar", cross=kind, n_embd=16, block_size=24_000))
    assert error_in(dtype, cross.to(dtype), rand(1, 50, 16), rand(1, 24_000, 16) + 6) < 0.005

HALF = [*product(lines("attention | haar gate=0 | wersa | wersa feature_map=exp | wavspa levels=4"),
                 BOTH, [4096]), ("haar undecimated=no gate=0", False, 4096),
        *product(("haar gate=0", "wersa", "wersa levels=0"), BOTH, [65_536])]

# catches: a sum over T in float16 (4096 tokens around 6 overflow it) or bfloat16 (it stalls at 256)
@each("text,causal,T", HALF)
@torch.no_grad()
def test_half_precision(text, causal, T, monkeypatch):
    monkeypatch.undo()
    m, x = mixer(text, causal, block_size=4096), rand(1, T, 16) + 6
    assert error_in(torch.float16, m, x) < 0.005
    want = copy.deepcopy(m).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert (m(x) - want).norm() < 0.02 * want.norm()

# catches: 300^2 in float16
@each("text,causal", [*product(VARIANTS, BOTH)])
def test_large_values_in_half_precision(text, causal):
    most = 300 if "gate=0" in text else 60  # a gated output is a product: at 300 its true value is no float16
    assert mixer(text, causal).half()(most * rand(1, 64, 16).half()).isfinite().all()

class Largest(TorchDispatchMode):
    """The largest tensor that any operation puts out."""
    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if torch.is_tensor(t):
                self.n = max(self.n, t.numel())
        return out

# catches: a T x T or T x S product, or a mask of that size; T x m features, in the backward too
@each("text", lines("""haar | haar wavelet=db2 levels=3 | wersa | wersa feature_map=exp | wersa n_features=64
    cross=wersa | cross=aligned levels=3"""))
def test_linear_memory(text, monkeypatch):
    monkeypatch.setattr(M, "SEGMENT", 64)
    monkeypatch.setattr(M, "CHUNK", 64)
    sizes = []
    for T in (512, 2048):
        x, mask = rand(1, T, 16), mask_of(T, T - 3)
        with Largest() as most:
            if "cross" in text:
                shaken(build_cross, text)(x, x, mask).sum().backward()
            else:
                for causal in BOTH:
                    mixer(text, causal, levels=3)(x, mask).sum().backward()
        sizes.append(most.n)
    assert sizes[1] <= min(4.2 * sizes[0], 512 * 2048)

# catches: features that the backward pass keeps, though they are many; a few that are made twice
@each("causal", BOTH)
def test_many_features_are_not_kept(causal, monkeypatch):
    monkeypatch.undo()
    kept = {}
    for m in (32, 33, 320):  # of 8 channels a head 32 are few
        layer, sizes = mixer(f"wersa levels=0 gate=0 n_features={m}", causal), []
        with torch.autograd.graph.saved_tensors_hooks(lambda u: sizes.append(u.numel()) or u, lambda u: u):
            layer(rand(1, 1024, 16))
        kept[m] = sum(sizes)
    features = 1024 * 2 * 32
    assert kept[32] > 2 * features and kept[320] < 10 * features
    assert kept[33] < kept[32] / 2

# -----------------------------------------------------------------------------
# every mixer: a slow twin

def turned(u, places):
    """RoFormer's rotary on u (..., T, dh): channels i and i + dh/2 are a complex number, turned by place."""
    n = u.size(-1) // 2
    angle = places[:, None] * 10000 ** (-torch.arange(n) / n)  # in float32, as the model's
    z = torch.complex(u[..., :n], u[..., n:]) * torch.complex(angle.cos(), angle.sin())
    return torch.cat((z.real, z.imag), -1)

def convolved(a, taps, step=1, ahead=0, stride=1):
    """torch's convolution of a (B, T, C) with taps (F, C or 1), `step` apart, the last at t + ahead."""
    C, reach = a.size(2), (len(taps) - 1) * step
    a = F.pad(a.mT, (reach - ahead, ahead))
    return F.conv1d(a, taps.expand(-1, C).T[:, None], stride=stride, dilation=step, groups=C).mT

# catches: halves or taps swapped, a weight at the wrong level, a reach of 2^l, a half that forgets the other
@each("form", ["block", "centred", "causal"])
@each("wavelet", ["haar", "db2"])
@each("T", [1, 5, 16, 21, 40])
def test_haar_loop(form, wavelet, T):
    block = form == "block"
    text = f"haar gate=0 levels=4 wavelet={wavelet} undecimated={'no' if block else 'yes'}"
    m, x, bands = mixer(text, form == "causal").double(), rand(2, T, 16, dtype=double), []
    a, want = x, torch.zeros_like(x)
    for l in range(4):
        low, high = m.wavelet.filters(l)
        step, stride = (1, 2) if block else (2 ** l, 1)
        reach = (len(low) - 1) * step
        ahead = {"block": len(low) // 2, "centred": (reach + 1) // 2, "causal": 0}[form]
        bands.append(convolved(a, high, step, ahead, stride))
        a = convolved(a, low, step, ahead, stride)
    for l, band in enumerate([*bands, a]):
        span = 2 ** min(l + 1, 4)  # tokens of a block's coefficient; either half of them has a weight
        for t in range(T):
            half = t // (span // 2) % 2 if block else 0
            want[:, t] += m.weight[l, half] * band[:, t // span if block else t]
    close(m(x), m.c_proj(want), 1e-12)

# catches: halves of a block with one weight, a mixer of rank T/2
def test_haar_rank():
    m = mixer("haar undecimated=no gate=0", False, block_size=32)
    m.c_proj = nn.Identity()
    assert torch.linalg.matrix_rank(m(torch.eye(32)[:, :, None].expand(-1, -1, 16))[..., 3]) == 32
    with pytest.warns(UserWarning, match="nothing leaves a block of 32"):
        m(rand(1, 33, 16))

# catches: a gate made of what was mixed, a gate after the projection, a mixer projected twice or not at all
@each("text", ["attention", "haar", "wersa", "wavspa", "fourier"])
def test_gate(text):
    m, plain, x = mixer(text, False), mixer(text, False, gate=False), rand(2, 9, 16)
    plain.load_state_dict(m.mixer.state_dict(), strict=False)
    if text in ("attention", "haar", "wersa"):  # whose own projection comes after the gate
        plain.c_proj = nn.Identity()
    mixed, gate = plain(x), m.gate(x)
    assert isinstance(m.c_proj, nn.Linear)
    close(m(x), m.c_proj(mixed * gate / (1 + (-gate).exp())))

# catches: a window of one token more, one that looks ahead
@each("causal,window", [*product(BOTH, (1, 2, 7, 64))])
def test_window(causal, window):
    m, x, t = mixer(f"attention window={window} gate=0", causal), rand(2, 20, 16), torch.arange(20)
    q, k, v = (u.unflatten(-1, (2, 8)).transpose(1, 2) for u in m.c_attn(x).chunk(3, -1))
    back = t[:, None] - t
    seen = (0 <= back) & (back < window) if causal else back.abs() <= window // 2
    score = turned(q, t) @ turned(k, t).mT / math.sqrt(8)
    y = score.masked_fill(~seen, -math.inf).softmax(-1) @ v
    close(m(x), m.c_proj(y.transpose(1, 2).flatten(2)))

# catches: an inverse that is none, a row's own length ignored, undecimated bands that do not add up
@each("text", [v for v in VARIANTS if v.startswith("wavspa") and not re.search("gate=0|ada|free", v)])
@each("causal", BOTH)
def test_wavspa_identity(text, causal):
    m, x, mask = mixer(text, causal, gate=False), rand(3, 37, 16), mask_of(37, 37, 20, 3)
    for inner in m.inner:
        inner.forward = lambda c, mask=None: c
    m.band.data.zero_()
    close(m(x, mask)[mask], x[mask], 1e-4)

def phi(m, u, query):
    """The features of u (..., dh), as the papers write them (a query's up to a factor, which cancels)."""
    dh, n = m.R.shape
    if m.kind == "relu":
        return (u @ m.R).clamp(min=0) / math.sqrt(n)
    u = u / dh ** 0.25
    y = u @ m.R
    less = y.max(-1, keepdim=True)[0].detach() if query else u.square().sum(-1, keepdim=True) / 2
    return (y - less).exp()

def causal_bands(w, a):
    """[a_L, d_L, ..., d_1] of a (B, T, C): each level's average of the past, and what it took away."""
    details = []
    for l in range(w.L):
        average = convolved(a, w.filters(l)[0] / math.sqrt(2), 2 ** l)
        details.insert(0, a - average)
        a = average
    return [a, *details]

# catches: gains from the whole mean, bands of the wrong span, two different R, a chunk that forgets itself
@each("text,causal", [*product(lines("""wersa | wersa levels=0 pos=none | wersa feature_map=exp levels=3
    wersa wavelet=db2 wavelet_params=ortho"""), BOTH)])
@each("T", [1, 16, 37])
def test_wersa_loop(text, causal, T):
    m, x = mixer(text + " gate=0", causal).double(), rand(2, T, 16, dtype=double)
    qk, v = m.c_attn(x).split((32, 16), -1)
    if m.L > 0:
        q = qk[..., :16]
        means = [q[:, :t + 1].mean(1) if causal else q.mean(1) for t in range(T)]
        gains = m.scale * m.filter(torch.stack(means, 1)).unflatten(-1, (2, -1))  # (B, T, H, L+1)
        bands = causal_bands(m.wavelet, qk) if causal else m.wavelet.dwt(qk)
        for i, band in enumerate(bands):
            gain = gains[:, :band.size(1), None, :, i, None]  # for q and k
            bands[i] = (band.unflatten(-1, (2, 2, 8)) * gain).flatten(2)
        qk = sum(bands) if causal else m.wavelet.idwt(bands)[:, :T]
    q, k, v = (u.unflatten(-1, (2, 8)).transpose(1, 2) for u in (*qk.chunk(2, -1), v))
    if m.rope:
        q, k = turned(q, torch.arange(T)), turned(k, torch.arange(T))
    weights = phi(m, q, True) @ phi(m, k, False).mT  # (B, H, T, T)
    weights = weights.tril() if causal else weights
    mixed = weights @ v / (weights.sum(-1, keepdim=True) + (1e-6 if m.kind == "relu" else 1e-30))
    y, want = m(x), m.c_proj(mixed.transpose(1, 2).flatten(2))
    close(y, want, 1e-10)
    same_gradients(m, y, want, 1e-9)

# catches: a constant that outweighs the denominator, so that a mean of ones is less than one
@each("kind,size", [("relu", 1), ("relu", 8), ("exp", 1), ("exp", 5)])
def test_wersa_takes_means(kind, size):
    q, k = (size * rand(1, 2, 40, 8, seed=seed).requires_grad_() for seed in (1, 2))
    R, v = rand(8, 32, seed=3), M.with_ones(torch.ones(1, 2, 40, 1), None)
    y = M.read(q, M.digest(k, v, R, kind), R, kind)
    causal, _ = M.read_causally(q, k, v, torch.zeros(1, 2, 32, 2), R, kind)
    for mean in (y, causal):
        close(mean, torch.ones_like(mean), 1e-3)
        assert all(slope.isfinite().all() for slope in torch.autograd.grad(mean.sum(), (q, k)))

# catches: a token that costs a whole chunk
@torch.no_grad()
def test_a_token_costs_its_share(monkeypatch):
    monkeypatch.undo()
    m, cost = mixer("wersa"), {}
    for T in (1, 64):
        with FlopCounterMode(display=False) as counter:
            m(rand(1, T, 16), state=m.init_state(1))
        cost[T] = counter.get_total_flops()
    assert cost[1] < 2 * cost[64] / 64

# catches: an FFT over padding, a missing real part
def test_fourier():
    m, x, mask = mixer("fourier gate=0", False), rand(3, 11, 16), mask_of(11, 11, 7, 1)
    for i, n in enumerate((11, 7, 1)):
        close(m(x, mask)[i, :n], torch.fft.fft2(x[i, :n].to(torch.complex64), norm="ortho").real)
    close(m(x), m(x, mask_of(11, 11, 11, 11)))

def read_all(m, x, memory):
    """What x (T, C) reads of one row's memory (S, C), by softmax or by wersa's features."""
    q, k, v = (u.unflatten(-1, (2, 8)).transpose(0, 1) for u in (m.c_q(x), *m.c_kv(memory).chunk(2, -1)))
    if m.rope:
        q, k = turned(q, torch.arange(len(x)) * m.ratio), turned(k, torch.arange(len(memory)))
    if isinstance(m, M.CrossWersa):
        weights = phi(m, q, True) @ phi(m, k, False).mT
        weights = weights / (weights.sum(-1, keepdim=True) + (1e-6 if m.kind == "relu" else 1e-30))
    else:
        weights = (q @ k.mT / math.sqrt(8)).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)

def read_around(m, x, memory):
    """The same of aligned and place: tokens around place t * ratio, then the means of ever larger blocks."""
    kv, rows = m.c_kv(memory).unflatten(-1, (-1, 2, 8)), []  # (S, k and v, H, dh)
    for t, x_t in enumerate(x):
        at = min(int(t * m.ratio), len(memory) - 1)
        by_place = iter(m.place(x_t).view(2, -1).unbind(1))
        scores, values = [], []
        for l, w in enumerate(m.reach):
            for block in range((at >> l) - w, (at >> l) + w + 1):
                score = next(by_place)
                members = kv[max(block << l, 0):max((block + 1) << l, 0)]
                if len(members) == 0:
                    continue
                if m.c_q is not None:
                    q, k = m.c_q(x_t).view(2, 8), members[:, 0].mean(0)
                    score = score + (q * k).sum(-1) / math.sqrt(8)
                scores.append(score)
                values.append(members[:, -1].mean(0))
        weights = torch.stack(scores).softmax(0)
        rows.append((weights[..., None] * torch.stack(values)).sum(0).flatten())
    return torch.stack(rows)

# catches: a chunk of targets whose sources reach far beyond what they look at
def test_a_short_target_of_a_long_source():
    cost = {}
    for ratio in (1, 50):
        m = shaken(build_cross, f"cross=place cross_ratio={ratio} levels=3")
        with Largest() as most:
            m(rand(1, 4, 16), rand(1, 4 * ratio, 16))
        cost[ratio] = most.n
    assert cost[50] < 2 * cost[1]

# catches: source padding that is read, slots shifted within a chunk, an edge block taken for real
@each("text", READERS)
def test_cross_loop(text):
    m = shaken(build_cross, text).double()
    x, memory = rand(2, 70, 16, dtype=double), rand(2, 33, 16, seed=2, dtype=double)
    mask = mask_of(33, 33, 11)
    y = m(x, memory, mask)
    slow = read_around if isinstance(m, M.Aligned) else read_all
    for b in range(2):
        close(y[b], m.c_proj(slow(m, x[b], memory[b, mask[b]])), 1e-6)
    close(m(x[1:], memory[1:, :11]), y[1:])
    source = m.digest(memory, mask)
    close(torch.cat([m.read(x[:, t:t + 1], source, t) for t in range(70)], 1), y)
    close(torch.cat([m.read(x[:, :4], source), m.read(x[:, 4:], source, 4)], 1), y)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in m.parameters())

# -----------------------------------------------------------------------------
# the model

# catches: a leak between blocks, a chunk that forgets its position, a source whose padding counts
@each("text,cross", [*product(MIXED, (None, "auto")), *product(["haar,attention"], M.CROSSES)])
def test_decoder(text, cross):
    arch, src = ("encdec", SOURCE) if cross else ("decoder", None)
    m, idx = transformer(text, arch, cross=cross or "auto", block_size=65), tokens(2, 65)
    logits = m(idx, src=src)[0]
    for t in PREFIXES:
        other = torch.cat((idx[:, :t], tokens(2, 65 - t, seed=t)), 1)
        assert torch.equal(m(other, src=src)[0][:, :t], logits[:, :t])
    for cuts in (CUTS, (1,) * 65):
        close(in_chunks(m.decode, idx, m.init_state(2, src), cuts)[0], logits)
    if cross:
        close(m(idx, src=F.pad(src, (0, 5)))[0], logits)
        close(m(idx[1:], src=src[1:, :11])[0], logits[1:])
        assert (m(idx, src=tokens(2, 30, seed=9))[0] - logits).abs().max() > 1e-3  # it is read

# catches: a state one token behind, dropout left on, a prompt not fed
@each("text,arch", [*product(MIXED, ["decoder", "encdec"])])
def test_generate(text, arch):
    m, slow = transformer(text, arch, dropout=0.5), tokens(2, 3)
    src = SOURCE if arch == "encdec" else None
    for _ in range(30):
        slow = torch.cat((slow, m(slow, src=src)[0][:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(m.train().generate(slow[:, :3], 30, src=src, temperature=0), slow) and m.training
    assert torch.equal(m.generate(slow[:, :3], 30, src=src, temperature=0.7, top_k=1), slow)
    assert torch.equal(m.generate(slow[:, :3], 30, src=src, temperature=1e-42), slow)
    assert torch.equal(m.generate(slow, 0, src=src), slow)

# catches: a short prompt continued behind its padding
@each("text", MIXED)
def test_generate_rows_of_unequal_length(text):
    lengths = (9, 4, 1, 7)
    m, prompts = transformer(text), tokens(4, 9) * mask_of(9, *lengths)
    out = m.generate(prompts, 8, temperature=0)
    assert out.shape == (4, 17)
    for row, prompt, n in zip(out, prompts, lengths):
        alone = m.generate(prompt[None, :n], 8, temperature=0)[0]
        assert torch.equal(row[:n + 8], alone) and not row[n + 8:].any()
    with pytest.raises(ValueError, match="pad on the right"):
        m.generate(prompts.flip(1), 2)

# catches: a prompt that is read token by token
def test_prompt_in_one_pass(monkeypatch):
    m, calls = transformer("wersa"), []
    decode = m.decode
    monkeypatch.setattr(m, "decode", lambda idx, state: calls.append(idx.size(1)) or decode(idx, state))
    m.generate(tokens(2, 40), 3)
    assert calls == [40, 1, 1]

def shares(ids, n):
    return torch.bincount(ids, minlength=n) / len(ids)

# catches: a temperature multiplied, top_k that keeps k + 1 or masks the wrong side
@each("top_k", [None, 4, 100])
def test_sampling(top_k):
    m, idx = transformer("attention"), tokens(1, 4).expand(4000, -1)
    logits = m(idx[:1])[0][0, -1].detach() / 0.2
    least = logits.sort(descending=True)[0][min(top_k or 13, 13) - 1]
    new = m.generate(idx, 1, temperature=0.2, top_k=top_k)[:, -1]
    close(shares(new, 13), logits.masked_fill(logits < least, -math.inf).softmax(-1), 0.03)

# catches: the token that fills the nucleus left out, one more kept, the nucleus of what top_k has not cut
@each("top_p,top_k,kept", [(0.1, None, [1]), (0.5, None, [1]), (0.6, None, [1, 2]), (0.8, None, [0, 1, 2]),
                           (1.0, None, [0, 1, 2, 3]), (0.6, 2, [1]), (0.7, 2, [1, 2])])
def test_nucleus(top_p, top_k, kept):
    torch.manual_seed(0)
    p, want = torch.tensor([0.125, 0.5, 0.25, 0.125]), torch.zeros(4)
    want[kept] = p[kept]
    close(shares(draw(p.log().expand(4000, -1), 1.0, top_k, top_p), 4), want / want.sum(), 0.03)
    assert draw(p.log()[None], 0.0).tolist() == [1]

@torch.no_grad()
def score(m, src, seq, alpha=0.6):
    """log p of one sequence after bos = 1, normalised for its length."""
    logp = m(torch.tensor([[1] + seq[:-1]]), src=src)[0][0].log_softmax(-1)
    return logp.gather(-1, torch.tensor(seq)[:, None]).sum().item() / ((5 + len(seq)) / 6) ** alpha

def slow_beams(m, src, most, beam):
    """The best of so many hypotheses (log p, ids), each read anew from its start."""
    kept = [(0.0, [])]
    for _ in range(most):
        found = []
        for total, ids in kept:
            if ids[-1:] == [2]:
                found.append((total, ids))
            else:
                logp = m(torch.tensor([[1, *ids]]), src=src)[0][0, -1].log_softmax(-1)
                found += [(total + p, [*ids, i]) for i, p in enumerate(logp.tolist())]
        found.sort(key=lambda one: one[0] / ((5 + len(one[1])) / 6) ** 0.6, reverse=True)
        kept = found[:beam]
    return kept[0][1]

# catches: states not reordered with their hypotheses, tokens after eos, scores mixed between rows
@torch.no_grad()
@each("text", MIXED)
def test_beam(text):
    m, src = transformer(text, "encdec"), tokens(6, 12, low=3) * mask_of(12, 12, 5, 12, 1, 9, 12)
    one, four = (beam_search(m, src, 1, 2, 15, beam=b).tolist() for b in (1, 4))
    greedy = m.generate(torch.ones(6, 1, dtype=torch.long), 15, src=src, temperature=0)[:, 1:].tolist()
    for i in range(6):
        first, best, alone = cut(one[i], 2), cut(four[i], 2), src[i:i + 1, :(src[i] > 0).sum()]
        assert first == cut(greedy[i], 2)
        assert best == slow_beams(m, alone, 15, 4)
        assert not any(four[i][len(best):])
        assert cut(beam_search(m, alone, 1, 2, 15, beam=4)[0].tolist(), 2) == best

# catches: an ended hypothesis dropped, a length penalty on the wrong side
@each("alpha", [0.0, 0.6, 2.0])
def test_beam_exhaustive(alpha):
    m, src = transformer("wersa", "encdec", vocab_size=5), tokens(3, 6, low=3, high=5)
    m.wte.weight.data *= 4
    every = {tuple(cut(list(s), 2)) for s in product(range(5), repeat=3)}
    got = beam_search(m, src, 1, 2, 3, beam=125, length_penalty=alpha)
    for i in range(3):
        best = max(every, key=lambda s: score(m, src[i:i + 1], list(s), alpha))
        assert cut(got[i].tolist(), 2) == list(best)
    with pytest.raises(ValueError, match="--block_size=8"):
        beam_search(transformer("haar pos=learned", "encdec", block_size=8), SOURCE[:, :5], 1, 2, 20)

# catches: a mean over padding, cls out of its place, class 0 taken for padding
@each("text,pool", [*product([*MIXED, "fourier"], ["mean", "cls", "token"])])
def test_encoder(text, pool):
    m, labels, seen = transformer(text, "encoder", pool=pool, n_classes=3), torch.tensor([0, 2]), slice(None)
    if pool == "token":
        seen, labels = SOURCE > 0, torch.where(SOURCE > 0, SOURCE % 3, -1)
    logits, loss = m(SOURCE)
    assert logits.shape == ((2, 30, 3) if pool == "token" else (2, 3)) and loss is None
    close(m(F.pad(SOURCE, (0, 7)))[0][:, :30][seen], logits[seen])
    close(m(SOURCE[1:, :11])[0], logits[1:, :11])
    close(m(SOURCE, labels)[1], F.cross_entropy(logits[seen], labels[seen]), 1e-6)
    with pytest.raises(ValueError, match="pad on the right"):
        m(SOURCE.flip(1))

# catches: pad targets counted, smoothing left on in evaluation, a pad_id of 0 hard-wired
@each("pad", [0, 7])
def test_loss(pad):
    m, targets = transformer("wersa", "encdec", pad_id=pad, label_smoothing=0.2), tokens(2, 10, seed=2, low=0)
    src = torch.where(SOURCE > 0, torch.where(SOURCE == pad, 1, SOURCE), pad)
    targets[0, 4:] = pad
    targets[1, 8:] = -1
    counted = (targets != pad) & (targets != -1)
    for smoothing in (0, 0.2):
        logits, loss = m.train(smoothing > 0)(tokens(2, 10), targets, src)
        close(loss, F.cross_entropy(logits[counted], targets[counted], label_smoothing=smoothing), 1e-6)
    close(m(tokens(2, 10), src=F.pad(src, (0, 5), value=pad))[0], logits)

# catches: dropout in attention weights, which other mixers have not
@each("text", MIXED)
def test_dropout_acts_at_the_same_places(text):
    m, x = transformer(text, "encdec", dropout=0.5).train(), rand(2, 9, 16)
    for name, module in m.named_modules():
        assert not isinstance(module, nn.Dropout) or re.fullmatch(r"((en|de)coder\.\d+\.)?drop", name)
    plain = m.decoder[0].mixer
    assert torch.equal(plain(x), plain(x))  # a mixer has none of its own

# catches: an R that is not saved, untied embeddings, decayed taps, a global init that overwrites them
@each("text", lines("""haar | wavspa | wavspa wavelet_params=ada wavspa_shared=0
    wavspa wavelet_params=lift inner=wersa | wersa feature_map=exp | haar,attention"""))
def test_parameters(text):
    torch.manual_seed(0)
    cfg = config(text, arch="encdec", cross="wersa", block_size=32)
    m, other = WaveletTransformer(cfg), WaveletTransformer(cfg)
    optimizer = m.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    decayed, rest = ([id(p) for p in group["params"]] for group in optimizer.param_groups)
    assert sorted(decayed + rest) == sorted(id(p) for p in m.parameters())
    assert m.lm_head.weight is m.wte.weight
    for name, p in m.named_parameters():
        assert (id(p) in decayed) == (p.dim() == 2 and name.endswith(".weight")), name
        if name.endswith("taps"):
            start = Wavelet(m.config.wavelet, m.config.of_layer(0).learned, 1, 1).taps
            assert (p - start).abs().max() < 0.1, name
        if name.endswith("mixer.mixer.weight"):  # of haar's levels
            assert p.std() > 0.2, name
    m(tokens(2, 32), tokens(2, 32, seed=2), SOURCE)[1].backward()
    assert all(p.grad is not None and p.grad.any() for p in m.parameters())
    optimizer.step()
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(m(tokens(2, 32), src=SOURCE)[0], other(tokens(2, 32), src=SOURCE)[0])

# catches: what only training shows: a wrong sign, targets shifted, a source not read
@each("text", MIXED)
def test_overfits_one_batch(text):
    torch.manual_seed(0)
    m = WaveletTransformer(config(text, arch="encdec", block_size=16, n_embd=32))
    src, out = tokens(8, 12, low=2), tokens(8, 12, seed=2, low=2)
    optimizer = m.configure_optimizers(0.0, 1e-2, (0.9, 0.95), "cpu")
    for _ in range(150):
        loss = m(F.pad(out[:, :-1], (1, 0), value=1), out, src)[1]
        if loss < 0.05:
            return
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        optimizer.step()
    assert False, f"loss {loss}"

LAYERS = {"encoder": lines("""attention | haar | haar undecimated=no | wavspa | wersa | haar,attention
              fourier | wavspa wavelet_params=lift inner=wersa levels=2"""),
          "decoder": lines("attention | haar | wavspa | wersa | haar,attention"),
          "encdec": lines("attention | attention cross=place levels=3 | haar | wersa")}

# catches: a graph for each length, a break, a Python number read from a tensor
@each("text,arch", [(text, arch) for arch, texts in LAYERS.items() for text in texts])
def test_one_graph_for_all_lengths(text, arch, monkeypatch):
    monkeypatch.undo()
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    m = transformer(f"{text} n_layer={1 + text.count(',')}", arch, block_size=128)
    run = torch.compile(m, dynamic=True, backend=count, fullgraph=True)
    for i, T in enumerate((40, 48, 57, 64, 65, 80, 99, 104, 120, 128)):
        idx, src = tokens(2 + i % 2, T), tokens(2 + i % 2, T + 3, seed=2)
        labels = tokens(2 + i % 2, seed=3, high=2)
        args = dict(encdec=(idx, idx, src), encoder=(idx, labels), decoder=(idx, idx))[arch]
        run(*args)[1].backward()
    halved_twice = text == LAYERS["encoder"][-1] or text + arch == "wersaencdec"
    assert len(graphs) <= (3 if halved_twice else 2), f"{len(graphs)} graphs for ten lengths"

# -----------------------------------------------------------------------------
# a mixer of a reader's own: these ten lines are README's, and pass the promises

class Mean(nn.Module):
    """A causal exponential moving average, per channel."""

    def __init__(self, cfg, causal=False):
        super().__init__()
        self.rate = nn.Parameter(torch.zeros(cfg.n_embd))

    def init_state(self, B, device=None, dtype=None):
        return torch.zeros(B, len(self.rate), device=device, dtype=dtype)

    def forward(self, x, mask=None, state=None):
        x = x if mask is None else x * mask.bool()[..., None]
        mean, keep, y = x[:, 0] * 0 if state is None else state, self.rate.sigmoid(), []
        for x_t in x.unbind(1):
            mean = keep * mean + (1 - keep) * x_t
            y.append(mean)
        return torch.stack(y, 1) if state is None else (torch.stack(y, 1), mean)

# catches: a place that knows its mixers by name
def test_a_readers_mixer(monkeypatch):
    monkeypatch.setitem(M.MIXERS, "mean", Mean)
    test_no_leak("mean")
    test_chunks("mean")
    test_odd_shapes("mean")
    test_every_parameter_learns("mean", True)
    test_decoder("mean,attention", "aligned")
    test_generate("mean", "decoder")
    test_beam("haar,mean")
    test_overfits_one_batch("mean,attention")

# -----------------------------------------------------------------------------
# settings

BAD = """n_embd=15 n_embd=0 n_head=0 n_layer=0 block_size=0 vocab_size=0 n_classes=0 levels=-2 levels=8
    n_features=-1 window=-1 dropout=1 dropout=-0.1 dropout=nan label_smoothing=1 cross_ratio=0 cross_ratio=nan
    arch=decodr mixer=mamba mixer=haar,mamba inner=wavspa cross=haar wavelet=db21 wavelet=db1 pool=max
    pos=alibi wavelet_params=conv undecimated=maybe feature_map=elu mixer=fourier;arch=decoder
    mixer=fourier;arch=encdec mixer=haar,fourier;arch=decoder inner=fourier;arch=decoder
    undecimated=no;arch=decoder;mixer=wersa undecimated=no;arch=encdec;mixer=wavspa"""

# catches: an assertion or an index error deep inside, a sentence that names no flag
@each("text", BAD.split())
def test_bad_configuration(text):
    with pytest.raises(ValueError, match="--" + text.split("=")[0]):
        config(text.replace(";", " "))

# catches: a silent crop, a check that is skipped when a field is set later, a model left in eval
def test_bad_calls():
    late = config()
    late.dropout = 1.0
    m, encdec = transformer("haar pos=learned", block_size=12).train(), transformer("haar", "encdec")
    bad = [
        ("--dropout", lambda: WaveletTransformer(late)),
        ("--mixer=fourier cannot be causal", lambda: build_mixer(config("fourier"), causal=True)),
        ("no causal form", lambda: build_mixer(config("wavspa undecimated=no"), causal=True)),
        ("--undecimated=no has", lambda: build_mixer(config("wersa undecimated=no"), causal=True)),
        ("src=", lambda: encdec(tokens(2, 4))),
        ("with --arch", lambda: m(tokens(2, 4), src=SOURCE)),
        ("--block_size", lambda: m(tokens(2, 13))),
        ("13 tokens", lambda: m.generate(tokens(2, 2), 12)),
        ("--temperature", lambda: m.generate(tokens(2, 2), 1, temperature=-1.0)),
        ("--top_k", lambda: m.generate(tokens(2, 2), 1, top_k=0)),
        ("a token or more", lambda: m.generate(tokens(2, 0), 1)),
        ("adds 0 or more", lambda: m.generate(tokens(2, 4), -1)),
        ("--beam", lambda: beam_search(encdec, SOURCE, 1, 2, 5, beam=0))]
    for words, call in bad:
        with pytest.raises(ValueError, match=words):
            call()
        assert m.training  # again, where generate raised

# catches: the combination that nobody listed
def test_random_configurations():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    fields = dict(block_size=st.integers(1, 40), n_head=st.integers(1, 4), levels=st.integers(-2, 5),
                  n_features=st.integers(0, 9), window=st.integers(0, 9), gate=st.booleans(),
                  wavspa_shared=st.booleans())
    for flag, known in M.CHOICES.items():
        if flag not in ("arch", "cross"):
            fields[flag] = st.sampled_from([value for value in known if value not in ("fourier", "no")])

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @hypothesis.given(st.fixed_dictionaries(fields), st.integers(1, 6), st.sampled_from([0, 0, 0, 0, 1]),
                      st.integers(1, 45))
    @torch.no_grad()
    def promises(kw, dh, off, T):
        x = rand(2, T, kw["n_head"] * dh + off)
        try:
            m = mixer("", n_embd=x.size(-1), **kw)
        except ValueError as e:
            assert str(e).startswith("--"), e
            return
        y = m(x)
        assert y.shape == x.shape and y.isfinite().all()
        assert all(torch.equal(m(loud(x, t))[:, :t], y[:, :t]) for t in range(1, T, 3))
        close(chunked(m, x, cuts=(1,) * (T // 2) + (T - T // 2,))[0], y)
    promises()

# catches: growth that nobody decided
def test_model_py_stays_readable():
    with open(M.__file__, encoding="utf-8") as f:
        text = f.read()
    assert len(text.splitlines()) <= 900 and len(text.encode()) <= 51_000
    assert max(map(len, text.splitlines())) <= 110
    assert "autograd.Function" not in text

# -----------------------------------------------------------------------------
# the scripts, as a user runs them

HERE = os.path.dirname(os.path.abspath(__file__))
TINY = """--device=cpu --n_embd=16 --n_head=2 --n_layer=1 --batch_size=8 --max_iters=12 --warmup_iters=2
    --dropout=0.1 --eval_interval=4 --log_interval=1 --eval_rows=16 --metric_rows=2
    --eval_block_size=0""".split()
ENDLESS = ["--max_iters=100000", "--eval_interval=100000"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
# python -c LIMITED BYTES SCRIPT FLAGS: no file may grow beyond so many bytes
LIMITED = f"""import resource, runpy, sys
sys.path.insert(0, {HERE!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv[:2] = []
runpy.run_path(sys.argv[0], run_name='__main__')
"""

def script(path, argv, cwd, out):
    """What a child of the fork server does: run a script, its words into files."""
    os.chdir(cwd)
    os.environ["HF_HUB_OFFLINE"], sys.argv = "1", [path, *argv]
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{out}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), fd)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal; background jobs ignore it
    try:
        runpy.run_path(path, run_name="__main__")
    except KeyboardInterrupt:  # python ends by the signal then, a child of multiprocessing in 1
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)

class Forked:
    """subprocess.Popen's face for a script, forked where torch is imported: that is most of a short run."""
    server = get_context("forkserver")
    preload = ["torch", "torch._dynamo", "numpy", "matplotlib.backends.backend_agg", "test_model"]
    server.set_forkserver_preload(preload)
    turn = Lock()  # start and exitcode reap all children: two threads at once lose an exit code

    def __init__(self, name, flags, cwd):
        self.folder = tempfile.TemporaryDirectory()
        self.words = os.path.join(self.folder.name, "words")
        args = (os.path.join(HERE, name), flags, str(cwd), self.words)
        self.process = self.server.Process(target=script, args=args)
        with self.turn:
            self.process.start()
        self.pid = self.process.pid

    def poll(self):
        with self.turn:
            return self.process.exitcode

    returncode = property(poll)

    def send_signal(self, sig):
        os.kill(self.pid, sig)

    def communicate(self, timeout=math.inf):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.words, timeout)
            time.sleep(0.005)
        paths = [f"{self.words}.{name}" for name in ("out", "err")]
        return [open(path, encoding="utf-8").read() if os.path.exists(path) else "" for path in paths]

def start(script, *flags, cwd, launcher=()):
    if not launcher:
        return Forked(script, flags, cwd)
    env = dict(os.environ, HF_HUB_OFFLINE="1")
    argv = [sys.executable, *launcher, os.path.join(HERE, script), *flags]
    return subprocess.Popen(argv, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def run(script, *flags, cwd, code=0, **kw):
    p = start(script, *flags, cwd=cwd, **kw)
    out, err = p.communicate(timeout=170)
    assert p.returncode == code, (p.returncode, out, err)
    assert "Traceback" not in err, err
    return out + err

def until(there, p):
    """Wait for something that a running script does."""
    while not there():
        assert p.poll() is None, p.communicate()
        time.sleep(0.01)

def read(*path):
    with open(os.path.join(*path), encoding="utf-8", newline="") as f:
        return f.read()

def logged(*folder):
    """The rows of log.csv that are written so far."""
    path = os.path.join(*folder, "log.csv")
    return list(csv.DictReader(open(path))) if os.path.exists(path) else []

def result_of(*folder):
    return json.loads(read(*folder, "result.json"))

def kill_after(step, sig, *flags, cwd, out, **kw):
    """Start train.py and send sig once log.csv has reached a step; -> exit code."""
    p = start("train.py", *flags, f"--out_dir={out}", cwd=cwd, **kw)
    while p.poll() is None:
        time.sleep(0.005)
        if str(step) in [row["step"] for row in logged(cwd, out)]:
            p.send_signal(sig)
            break
    p.communicate(timeout=60)
    return p.returncode

def make_work(folder):
    """A small numbers data set and one finished run."""
    prepare_data.prepare("numbers", os.path.join(folder, "data"), rows=400)
    run("train.py", *TINY, "--mixer=haar", "--out_dir=whole", cwd=folder)
    return folder

@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_work(str(tmp_path_factory.mktemp("work")))

def left(folder):
    """What a run leaves behind, but for the clock: log.csv, the weights and counters of its checkpoints."""
    found = [read(folder, "log.csv")]
    for name in ("ckpt.pt", "best.pt"):
        ckpt = load_checkpoint(os.path.join(folder, name))
        found += [ckpt["iter_num"], ckpt["best_loss"], {k: v.tolist() for k, v in ckpt["model"].items()}]
    return found

def test_killed_and_resumed_equals_undisturbed(work):
    # catches: data order or dropout from a generator's state, log rows written twice, AdamW state lost
    flags = [*TINY, "--mixer=haar", "--out_dir=broken"]
    assert kill_after(2, signal.SIGINT, *flags, cwd=work, out="broken") == 128 + signal.SIGINT
    assert kill_after(7, signal.SIGKILL, *flags, "--resume", cwd=work, out="broken") == -signal.SIGKILL
    run("train.py", *flags, "--resume", cwd=work)
    assert left(f"{work}/broken") == left(f"{work}/whole")
    assert not os.path.exists(f"{work}/broken/ckpt.pt.tmp")

def test_average_of_the_last_evaluations(work):
    # catches: a mean of other steps, one that a kill changes, older weights left on the disk
    flags = [*TINY, "--mixer=haar", "--average=2", "--eval_interval=3"]
    run("train.py", *flags, "--out_dir=mean", cwd=work)
    folders = [os.path.join(work, name) for name in ("mean", "mean-killed")]
    kept = ["weights-00000009.pt", "weights-00000012.pt"]
    assert kill_after(10, signal.SIGKILL, *flags, cwd=work, out="mean-killed") == -signal.SIGKILL
    said = run("train.py", *flags, "--resume", "--out_dir=mean-killed", cwd=work)
    assert "of the weights at 2 evaluations" in said
    for folder in folders:
        assert sorted(name for name in os.listdir(folder) if name.startswith("weights-")) == kept
        parts = [load_checkpoint(os.path.join(folder, name))["model"] for name in kept]
        mean = load_model(os.path.join(folder, "average.pt"))[0].state_dict()
        for name, tensor in mean.items():
            close(tensor, (parts[0][name] + parts[1][name]) / 2, 1e-6)
    results = [result_of(folder) for folder in folders]
    assert results[0]["test_loss"] == results[1]["test_loss"]
    assert results[0]["val_loss"] != load_checkpoint(os.path.join(folders[0], "best.pt"))["best_loss"]
    for name in kept:
        os.remove(os.path.join(folders[1], name))
    said = run("train.py", "--resume", "--out_dir=mean-killed", cwd=work, code=2)
    assert "no weights of earlier evaluations to average" in said

def test_patience(work):
    # catches: evaluations counted anew after --resume, an equal loss taken for a lower one, no test
    flags = [*TINY, "--mixer=haar", "--learning_rate=0", "--patience=2", "--max_iters=400"]
    assert kill_after(5, signal.SIGKILL, *flags, cwd=work, out="tired") == -signal.SIGKILL
    said = run("train.py", *flags, "--resume", "--out_dir=tired", cwd=work)
    assert "step 00008/00400 | no lower validation loss in 2 evaluations: the end" in said
    assert "8 steps in" in said and "test loss" in said

def test_two_processes_say_what_ends_them(work, tmp_path):
    # catches: what is said lost in torch's excepthook, a weight without a gradient, two --out_dirs
    train = os.path.join(HERE, "train.py")
    breaks = "import model; model.WaveletTransformer.configure_optimizers = lambda *a: 1 / 0"
    for name, line in (("breaks", breaks), ("apart", "os.chdir(os.environ['RANK'])")):
        (tmp_path / f"{name}.py").write_text(f"""import os, runpy, sys
sys.path.insert(0, {HERE!r})
{line}
runpy.run_path({train!r}, run_name='__main__')""")
    two = dict(cwd=tmp_path, launcher=[*TORCHRUN, "2"])

    def said(name, *flags):
        return start(str(tmp_path / name), *TINY, *flags, **two).communicate(timeout=170)[1]

    for name, flags in (("recall", dict(n_pairs=4, n_keys=16)), ("listops", dict(min_len=10, max_len=30))):
        prepare_data.prepare(name, tmp_path / "data", rows=100, **flags)
    for i in "01":
        (tmp_path / i).mkdir()
    shutil.copytree(f"{work}/whole", tmp_path / "0" / "out")
    assert "ZeroDivisionError" in said("breaks.py", "--dataset=recall")
    go_on = ["--mixer=haar", "--resume", f"--data_dir={work}/data", "--max_iters=14"]
    assert "different steps (0, 12): --out_dir=out must be one folder" in said("apart.py", *go_on)
    for flags in ("--dataset=recall --levels=2 --wavspa_shared=False", "--dataset=listops --undecimated=yes"):
        run("train.py", *TINY, "--mixer=wavspa", "--max_iters=2", *flags.split(), **two)

def test_resume_refuses_another_model_and_keeps_earlier_runs(work):
    # catches: weights left at their start in silence, a finished run overwritten, out/ and out as two folders
    said = run("train.py", "--resume", "--out_dir=whole", "--n_layer=2", cwd=work, code=1)
    assert "n_layer: 1 in the checkpoint, 2 now" in said and said.count("\n") == 1
    before = read(work, "whole", "log.csv")
    shutil.copytree(f"{work}/whole", f"{work}/again")
    run("train.py", *TINY, "--mixer=haar", "--out_dir=again/", "--max_iters=1", cwd=work)
    assert read(work, "again.1", "log.csv") == before
    said = run("train.py", *TINY, "--resume", "--out_dir=nowhere", "--max_iters=1", cwd=work)
    assert "nowhere/ckpt.pt does not exist: starting anew" in said
    log = read(work, "again", "log.csv")
    with open(f"{work}/again/log.csv", "w") as f:
        f.write(log[:-5])
    said = run("train.py", "--resume", "--out_dir=again", "--max_iters=2", cwd=work)
    assert "kept as log.00001.csv" in said and read(work, "again", "log.00001.csv") == log[:-5]
    best = open(f"{work}/again/best.pt", "rb").read()
    os.remove(f"{work}/again/ckpt.pt")
    run("train.py", *TINY, "--mixer=haar", "--resume", "--out_dir=again", "--max_iters=1", cwd=work)
    assert open(f"{work}/again.2/best.pt", "rb").read() == best

def test_sample_lines_in_lines_out(work):
    # catches: order lost by length-batching, an empty line dropped, a separator in an answer
    lines = ["seven", "", "  ", "one hundred and two", "x" * 300, "emoji 🙂", "eins\u2028zwei", "\u0000"]
    with open(f"{work}/a.en", "w", newline="") as f:
        f.write("\ufeff" + "\r\n".join(lines) + "\r\n")
    ask = "sample.py", "--out_dir=whole", "--device=cpu"
    said = run(*ask, "--input=a.en", "--output=a.de", "--max_new_tokens=8", cwd=work)
    got = read(work, "a.de").split("\n")
    assert len(got) == len(lines) + 1 and got[-1] == "" and got[1] == got[2] == "" and "1 of 8 inputs" in said
    model, tokenizer, _ = load_model(f"{work}/whole/best.pt")
    alone = [translate(model, tokenizer, [t], max_new_tokens=8)[0][0] for t in lines]
    assert [" ".join(a.splitlines()) for a in alone] == got[:-1]
    open(f"{work}/none.en", "w").close()
    assert run(*ask, "--input=none.en", cwd=work) == ""
    for extra in ("--beam=3", "--temperature=0.7"):
        assert run(*ask, "--start=one\ntwo", "--max_new_tokens=5", extra, cwd=work).count("\n") == 1

def test_decoder_from_text(work):
    # catches: bits per byte from token counts, a decoder that trains on its own labels
    with open(f"{work}/t.txt", "w") as f:
        f.write("".join(f"{i} little words, {en(i)}.\n" for i in range(1500)))
    prepare_data.prepare("text", f"{work}/data", source=f"{work}/t.txt", tokenizer="bytes")
    flags = [*TINY, "--dataset=text", "--block_size=32", "--out_dir=text", "--mixer=haar"]
    assert "leaks" in run("train.py", *flags, "--undecimated=no", cwd=work, code=1)
    said = run("train.py", *flags, "--eval_block_size=32,64", cwd=work)
    result = result_of(work, "text")
    same, far = result["far"]
    assert same["metric"] == result["test_metric"] != far["metric"]
    assert (same["block_size"], far["block_size"]) == (32, 64)
    assert far["split"] == "test" and far["n"] == -(-same["n"] // 2)
    assert abs(far["metric"] - far["loss"] / math.log(2)) < 1e-3  # bytes: one token each
    loss, bpb = (float(re.search(rf"test {what} ([\d.]+)", said)[1]) for what in ("loss", "bits per byte"))
    assert abs(bpb - loss / math.log(2)) < 1e-3
    ask = "sample.py", "--out_dir=text", "--start=0 little", "--max_new_tokens=5"
    assert "little" in run(*ask, cwd=work)
    assert run(*ask, "--top_p=0.001", cwd=work) == run(*ask, "--temperature=0", cwd=work)
    said = run(*ask, "--temperature=0", "--top_p=0.9", cwd=work, code=2)
    assert "--top_p changes nothing here" in said
    learned = [*flags, "--pos=learned", "--out_dir=places", "--max_iters=1"]  # room for 32 tokens read
    said = run("train.py", *learned, "--eval_block_size=32,64", cwd=work, code=2)
    assert "--pos=learned knows no position beyond 32" in said
    run("train.py", *learned, cwd=work)
    model, tokenizer, _ = load_model(f"{work}/places/best.pt")
    ids = tokenizer.encode("0 little")
    want = model.generate(torch.tensor([ids]), 33 - len(ids), temperature=0)[0].tolist()
    ask = "sample.py", "--out_dir=places", "--start=0 little", "--device=cpu"
    said = run(*ask, "--temperature=0", cwd=work)
    assert said == f"{tokenizer.decode(want)}\n---------------\n"

@each("kind", ["bytes", "words"])
def test_tokens_are_printed_as_they_come(kind):
    # catches: half a character, a blank lost between words, text that waits for the end
    tokenizer = Tokenizer(dict(kind=kind, words=["a", "b", "cd"]) if kind == "words" else dict(kind=kind))
    model = transformer("haar", vocab_size=tokenizer.vocab_size)
    ids = [1] + tokenizer.encode("a b cd" if kind == "words" else "é🙂 a")
    for temperature, top_k in ((0.0, None), (1.5, None), (0.8, 40)):
        torch.manual_seed(3)
        whole = model.generate(torch.tensor([ids]), 60, None, temperature, top_k)[0].tolist()
        torch.manual_seed(3)
        new = sample.continued(model, torch.tensor([ids]), 60, temperature=temperature, top_k=top_k)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            sample.say(tokenizer, [*ids, *(i.item() for i in new)])
        assert said.getvalue() == tokenizer.decode(whole) + "\n"
    at = []
    with contextlib.redirect_stdout(io.StringIO()) as said:
        sample.say(tokenizer, (at.append(said.getvalue()) or i for i in ids))
    texts = ["", "", "", "é", "é", "é", "é", "é🙂", "é🙂 "]
    assert at == (["", "", "a", "a b"] if kind == "words" else texts)

def scored(text):  # "loss 1.5, exact match 0.2" -> {name: value}
    return {name: float(value) for name, value in re.findall(r"([A-Za-z][A-Za-z ]+) (-?[\d.]+\d)", text)}

def test_score_is_what_training_found(work, tmp_path):
    # catches: windows that overlap, a row's eos left out, a mean over batches, pairs that drift apart
    test = result_of(work, "whole")["test"]
    shutil.copytree(f"{work}/data/numbers", tmp_path / "d")
    files = [str(tmp_path / "d" / f"test.{side}.txt") for side in ("src", "tgt")]
    ask = "sample.py", "--out_dir=whole", "--device=cpu", f"--score={','.join(files)}"
    said = scored(run(*ask, "--batch_size=37", cwd=work))
    assert abs(said["loss"] - test["loss"]) < 1e-4
    assert abs(said["perplexity"] - math.exp(test["loss"])) < 1e-3
    assert abs(said["token accuracy"] - test["accuracy"]) < 1e-4 and said["exact match"] == test["metric"]
    said = run(*ask, "--temperature=1", cwd=work, code=2)
    assert "--temperature changes nothing here" in said and said.count("\n") == 1
    said = run(*ask[:3], "--score=a.txt", cwd=work, code=1)
    assert "does not suit this checkpoint: --score=FILE,FILE" in said
    with open(files[1], "a") as f:
        f.write("eins\n")
    assert "1000 lines and" in run(*ask, cwd=work, code=1)

def test_score_of_a_text_and_of_labels(work, tmp_path):
    # catches: bits per token, a last window forgotten, labels compared with how likely they are
    (tmp_path / "t.txt").write_text("".join(f"{i} small words, {en(i)}.\n" for i in range(1000)))
    source = str(tmp_path / "t.txt")
    folder = prepare_data.prepare("text", tmp_path / "data", source=source, tokenizer="bytes")
    ids = np.fromfile(os.path.join(folder, "test.bin"), np.uint16)
    (tmp_path / "test.txt").write_text(Tokenizer(dict(kind="bytes")).decode(ids))
    run("train.py", *TINY, "--dataset=text", "--block_size=32", "--mixer=haar", cwd=tmp_path)
    result = result_of(tmp_path, "out")
    said = scored(run("sample.py", "--score=test.txt", "--device=cpu", cwd=tmp_path))
    assert abs(said["loss"] - result["test_loss"]) < 1e-4
    assert abs(said["bits per byte"] - result["test_metric"]) < 1e-4
    rows = "".join(f"{('good', 'bad')[i % 2]} {i},{('up', 'down')[i % 2]}\n" for i in range(60))
    (tmp_path / "t.csv").write_text("text,label\n" + rows)
    prepare_data.prepare("table", tmp_path / "data", source=str(tmp_path / "t.csv"))
    run("train.py", *TINY, "--dataset=table", "--mixer=haar", "--out_dir=table", cwd=tmp_path)
    (tmp_path / "a").write_text("good 1\nbad 2\ngood 3\n")
    ask = "sample.py", "--out_dir=table", "--device=cpu"
    labels = [line.split("\t")[0] for line in run(*ask, "--input=a", cwd=tmp_path).splitlines()]
    (tmp_path / "b").write_text("\n".join([*labels[:-1], "neither"]) + "\n")
    assert "accuracy 0.6667 (n=3)" in run(*ask, "--score=a,b", cwd=tmp_path)

@each("text", READERS)
def test_what_an_output_token_read(text):
    # catches: a gradient of the targets' embeddings, another token's logit, rows and columns swapped
    m, src, new = transformer(text, "encdec").double(), tokens(1, 7, low=3), [5, 3, 8, 2]
    shares = sample.source_shares(m, src, new)
    assert len(shares) == (2 if M.CROSSES[m.config.cross_kind] is M.CrossAttention else 1)
    for share in shares.values():
        assert share.shape == (4, 7)
        close(share.sum(1), torch.ones(4, dtype=share.dtype))
    embed, slopes = m.wte.forward, []
    for s in range(7):
        found = []
        for eps in (1e-5, -1e-5):
            scale = 1 + eps * torch.eye(7, dtype=torch.double)[s][:, None]
            m.wte.forward = lambda idx: embed(idx) * scale if idx is src else embed(idx)
            logits = m(torch.tensor([[1] + new[:-1]]), src=src)[0][0]
            found.append(logits[range(4), new])
        slopes.append((found[0] - found[1]).abs())
    want = torch.stack(slopes, 1)
    close(next(iter(shares.values())), want / want.sum(1, keepdim=True), 1e-4)

def test_source_and_wavelets_are_drawn(work, tmp_path, capsys):
    # catches: a picture of another text, a label taken for mathematics, a level without a line
    shutil.copytree(f"{work}/whole", tmp_path / "out")
    ask = "sample.py", "--device=cpu"
    said = run(*ask, "--show=source", "--start=one $ two $", "--max_new_tokens=5", cwd=tmp_path)
    assert said.count(" <- ") == 5 and "drawn to out/source.png" in said
    assert "--show=source draws a translation" in run(*ask, "--show=source", cwd=tmp_path, code=2)
    said = run(*ask, "--show=wavelets", cwd=tmp_path)
    assert "decoder.0.mixer" in said and said.count("  a_L  ") == 2
    assert "reconstruction error" not in said  # haar never goes back
    for text in ("wersa", "wavspa"):
        sample.show_wavelets(transformer(text, "encdec"), tmp_path / "out" / "wavelets.png")
        shown = capsys.readouterr().out
        assert shown.count("  a_L  ") == shown.count("reconstruction error") == 4
    os.mkdir(tmp_path / "out" / "no.png")
    with pytest.raises(SystemExit, match="no.png cannot be written: "):
        sample.show_wavelets(transformer("haar"), tmp_path / "out" / "no.png")
    assert "drawn to out/wavelets.png" in said
    for name in ("source", "wavelets"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")

# exit code, what is said, the command
WRONG = """
    2  --mixer                       train.py --mixr=wersa
    2  --mixer                       train.py --mixer=wers
    2  --mixer=mamba                 train.py --mixer=haar,mamba
    2  fourier                       train.py --mixer=fourier
    2  --n_head                      train.py --n_head=3
    2  --compile                     train.py --compile=maybe
    2  --max_iters                   train.py --max_iters=ten
    2  --max_iters                   train.py --max_iters=-1
    2  --batch_size                  train.py --batch_size=0
    2  --levels                      train.py --levels=99
    2  --levels                      train.py --mixer=attention --levels=2
    2  --window                      train.py --mixer=wersa --window=4
    2  --n_layer                     train.py --mixer=haar,attention,wersa
    2  --leak                        train.py --mixer=haar --leak
    2  --inner                       train.py --mixer=haar --inner=wersa
    2  --vocab_size                  train.py --vocab_size=300
    2  --undecimated=decoder         train.py --mixer=wersa --undecimated=no
    1  --undecimated=decoder         train.py --mixer=haar --undecimated=no
    1  --arch                        train.py --arch=decoder
    1  numbers                       train.py --dataset=nombres
    1  --dataset                     train.py --dataset=../data --out_dir=b
    1  none.py                       train.py --mixers_from=none.py
    2  --start                       sample.py
    2  --beam                        sample.py --start=a --beam=0
    2  --beam                        sample.py --start=a --out_dir=whole --beam=3 --temperature=1.5
    2  --num_samples                 sample.py --start=a --out_dir=whole --num_samples=3
    2  --start changes nothing here  sample.py --start=a --out_dir=whole --input=a
    2  --start changes nothing here  sample.py --start=a --out_dir=whole --show=wavelets
    1  --pos=learned has room        sample.py --start=a --out_dir=learned --max_new_tokens=300
    1  --pos=learned has room        sample.py --start=a --out_dir=learned --max_new_tokens=300 --beam=2
    1  none/best.pt does not exist   sample.py --start=a --out_dir=none
    1  damaged                       sample.py --start=a --out_dir=whole --ckpt=log.csv
    1  none cannot be read           sample.py --input=none --out_dir=whole
    2  multi30k                      prepare_data.py --dataset=multi
    1  --source                      prepare_data.py --dataset=text --data_dir=none
    1  train.jsonl                   prepare_data.py --dataset=multi30k --source=."""

def test_wrong_input_is_one_line(work):
    # catches: tracebacks, silent defaults, idle flags, messages that do not say what to change
    run("train.py", *TINY, "--mixer=haar", "--pos=learned", "--max_iters=1", "--out_dir=learned", cwd=work)
    run("sample.py", "--out_dir=learned", "--start=one", "--beam=2", cwd=work)

    def check(wrong):
        code, words, command = re.split("  +", wrong.strip())
        name, *flags = command.split()
        text = run(name, *flags, cwd=work, code=int(code))
        assert words in text and len(text.strip().splitlines()) == 1, (command, text)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(check, WRONG.strip().split("\n")))

def test_a_strangers_checkpoint_runs_nothing(work):
    # catches: torch.load without weights_only
    class Evil:
        def __reduce__(self):
            return os.mkdir, (f"{work}/pwned",)
    torch.save({"format": 1, "model": Evil()}, f"{work}/evil.pt")
    torch.save(dict(load_checkpoint(f"{work}/whole/best.pt"), format=1), f"{work}/old.pt")  # first edition
    for name, words in (("evil.pt", "damaged or not a checkpoint"), ("old.pt", "commit 9d7600d")):
        said = run("sample.py", "--start=a", "--out_dir=.", f"--ckpt={name}", cwd=work, code=1)
        assert words in said and said.count("\n") == 1
    assert not os.path.exists(f"{work}/pwned")

@each("encoding", ("ascii", "cp1252"))
def test_what_the_terminal_cannot_show(work, tmp_path, encoding):
    # catches: a traceback after the work, an answer that has become question marks
    rows = "".join(f"{('schön', '猫')[i % 2]} {i},{('gut', '好い')[i % 2]}\n" for i in range(60))
    (tmp_path / "t.csv").write_text("text,label\n" + rows, encoding="utf-8")

    def said(script, *flags):
        env = dict(os.environ, PYTHONIOENCODING=encoding)
        argv = [sys.executable, os.path.join(HERE, script), *flags]
        p = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True)
        assert p.returncode == 0 and b"Traceback" not in p.stderr, p.stderr
        return p.stdout.decode(encoding)

    assert "\\u732b" in said("prepare_data.py", "--dataset=table", "--source=t.csv")
    flags = ["--dataset=table", "--mixer=haar", "--max_iters=60", "--learning_rate=1e-2", "--log_interval=50"]
    run("train.py", *TINY, *flags, cwd=tmp_path)
    assert said("sample.py", "--start=猫 7", "--device=cpu").startswith("\\u597d\\u3044\t")

def test_one_run_owns_a_folder(work):
    # catches: a live run's folder moved aside, a lock that outlives its process or stays with a moved folder
    flags = [*TINY, *ENDLESS, "--out_dir=owned"]
    for again in (False, True):  # the second time over a killed run's folder
        p = start("train.py", *flags, cwd=work)
        until(lambda: os.path.exists(f"{work}/owned.1") == again and len(logged(work, "owned")) > 2, p)
        for more in ([], ["--resume"]):
            said = run("train.py", *flags, *more, cwd=work, code=1)
            assert f"held by process {p.pid} on" in said and said.count("\n") == 1
        assert p.poll() is None
        assert os.path.exists(f"{work}/owned.1") == again and not os.path.exists(f"{work}/owned.2")
        p.send_signal(signal.SIGKILL)
        p.communicate(timeout=30)
    run("train.py", "--resume", "--out_dir=owned", "--max_iters=4", cwd=work)

def test_resume_checks_first_what_its_end_needs(work):
    # catches: best.pt missed after the last step, a disk that is full at the first checkpoint
    out, go_on = f"{work}/needs", ["--resume", "--out_dir=needs", "--max_iters=14"]
    shutil.copytree(f"{work}/whole", out)
    log = read(out, "log.csv")
    open(f"{out}/best.pt", "w").close()
    assert "best.pt is damaged" in run("train.py", *go_on, cwd=work, code=1)
    os.remove(f"{out}/best.pt")
    assert "needs/best.pt does not exist" in run("train.py", *go_on, cwd=work, code=1)
    assert read(out, "log.csv") == log
    shutil.copy(f"{out}/ckpt.pt", f"{out}/best.pt")
    full = """import collections, shutil
shutil.disk_usage = lambda path: collections.namedtuple('Disk', 'total free')(1, 1)
""" + LIMITED
    assert "make room" in run("train.py", *go_on, cwd=work, code=1, launcher=["-c", full, str(10**9)])
    run("train.py", *go_on, cwd=work)

def test_resume_takes_the_saved_device(work):
    # catches: a run on --device=cpu that goes on elsewhere, a GPU's run that goes on nowhere else, in silence
    shutil.copytree(f"{work}/whole", f"{work}/elsewhere")
    path = f"{work}/elsewhere/ckpt.pt"
    ckpt, go_on = load_checkpoint(path), ["--resume", "--out_dir=elsewhere", "--max_iters=12"]
    assert "             as this run began" in run("train.py", *go_on, cwd=work)
    ckpt["config"]["device"] = "cuda:77"
    torch.save(ckpt, path)
    assert "cuda:77 is not there, where this run began" in run("train.py", *go_on, cwd=work)
    torch.save(ckpt, path)
    assert "this run began" not in run("train.py", *go_on, "--device=cpu", cwd=work)

@pytest.mark.skipif(os.name == "nt", reason="a terminal of another kind")
def test_a_closed_terminal_saves(work):
    # catches: SIGHUP unheeded, a line to the lost terminal that ends the run before it has saved
    import pty
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(work)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup had ignored
        train = os.path.join(HERE, "train.py")
        os.execv(sys.executable, [sys.executable, train, *TINY, *ENDLESS, "--out_dir=closed"])
    while len(logged(work, "closed")) < 5:
        os.read(terminal, 10_000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    assert load_checkpoint(f"{work}/closed/ckpt.pt")["iter_num"] >= 3

def test_preparation_has_no_time_limit(tmp_path):
    # catches: the limit of a collective applied to the work that others wait for, one that --resume forgets
    (tmp_path / "slow.py").write_text(f"""import runpy, sys, time
sys.path.insert(0, {HERE!r})
import prepare_data
import torch.distributed as dist
recall, init = prepare_data.DATASETS["recall"], dist.init_process_group
def slow(out, seed=1337):
    time.sleep(6)
    return recall(out, rows=200, n_pairs=2, n_keys=4)
prepare_data.DATASETS["recall"] = slow
dist.init_process_group = lambda *a, timeout: print("limit", timeout) or init(*a, timeout=timeout)
runpy.run_path({os.path.join(HERE, "train.py")!r}, run_name="__main__")
""")
    first = [*TINY, "--dataset=recall", "--max_iters=2", "--dist_timeout=3"]
    for flags in (first, ["--resume", "--max_iters=3"]):
        said = run(str(tmp_path / "slow.py"), *flags, cwd=tmp_path, launcher=[*TORCHRUN, "2"])
        assert "limit 0:00:03" in said
    assert result_of(tmp_path, "out")["steps"] == 3

def test_half_precision_on_a_cpu_goes_without_flash(work):
    # catches: a backward that takes several times as long, float32 or a long block slowed down with it
    told = "import atexit\natexit.register(lambda: print('flash', torch.backends.cuda.flash_sdp_enabled()))\n"
    flags = [*TINY, "--mixer=attention", "--max_iters=1", "--out_dir=half"]
    launcher = ["-c", "import torch\n" + told + LIMITED, str(10**9)]
    for more, flash in (("--dtype=bfloat16", False), ("--dtype=float32", True),
                        ("--dtype=bfloat16 --block_size=256", True)):
        said = run("train.py", *flags, *more.split(), cwd=work, launcher=launcher)
        assert f"flash {flash}" in said, more

def test_the_log_can_be_plotted(work):
    # catches: the loss of one step among ten, a mean that forgets what was before a kill, smoothing's part
    flags = [*TINY, "--mixer=haar", "--max_iters=40", "--eval_interval=40", "--label_smoothing=0.2"]
    said = run("train.py", *flags, "--out_dir=every", cwd=work)
    assert "cross place (auto)" in said or "cross aligned (auto)" in said
    kill_after(5, signal.SIGTERM, *flags, "--log_interval=5", cwd=work, out="fifth")
    run("train.py", "--resume", "--out_dir=fifth", cwd=work)
    every, fifth, whole = ([r for r in logged(work, out) if r["loss"]] for out in ("every", "fifth", "whole"))
    assert [int(r["step"]) for r in fifth] == list(range(0, 40, 5))
    for r in fifth[1:]:
        since = every[int(r["step"]) - 4:int(r["step"]) + 1]
        for k in ("loss", "nll"):
            assert abs(float(r[k]) - np.mean([float(e[k]) for e in since])) < 1e-5
    assert float(fifth[-1]["nll"]) < float(fifth[-1]["loss"]) - 0.01
    assert all(r["nll"] == r["loss"] for r in whole)

def test_resume_says_what_changed(work):
    # catches: a setting changed in silence, the settings of the first steps written over
    out, go_on = f"{work}/changed", ["--resume", "--out_dir=changed"]
    shutil.copytree(f"{work}/whole", out)
    before = read(out, "config.json")
    said = run("train.py", *go_on, "--max_iters=14", cwd=work)
    assert "changed from step 12 on: out_dir=changed was whole, max_iters=14 was 12\n" in said
    assert read(out, "config.00012.json") == before and '"max_iters": 14' in read(out, "config.json")
    assert "changed from" not in run("train.py", *go_on, cwd=work)

def test_the_curves_are_drawn(work):
    # catches: a half-written last line read as a number, a picture that ends a training
    from matplotlib.image import imread
    one, two = f"{work}/whole", f"{work}/growing"
    assert np.ptp(imread(f"{one}/curve.png")[..., :3]) == 1
    os.mkdir(two)
    said = read(one, "log.csv")
    for name, text in (("whole", said[:said.rindex("\n", 0, -1) + 1]), ("half", said[:-3])):
        with open(f"{two}/log.csv", "w", newline="") as f:
            f.write(text)
        prepare_data.draw_curves([one, two], f"{two}/{name}.png")
    assert np.array_equal(imread(f"{two}/whole.png"), imread(f"{two}/half.png"))
    assert not np.array_equal(imread(f"{two}/whole.png"), imread(f"{one}/curve.png"))
    none = "import sys\nsys.modules['matplotlib.figure'] = None\n" + LIMITED
    flags = [*TINY, "--mixer=haar", "--max_iters=5", "--out_dir=undrawn"]
    said = run("train.py", *flags, cwd=work, launcher=["-c", none, str(10**9)])
    assert said.count("curve.png is not drawn") == 1
    assert not os.path.exists(f"{work}/undrawn/curve.png")

def test_fine_tuning(work):
    # catches: fresh weights without a word, flags to repeat, embeddings of other words, a restart at step 0
    flags = """--device=cpu --eval_rows=16 --metric_rows=2 --eval_block_size=0 --batch_size=8
        --warmup_iters=2 --max_iters=2 --init_from=whole/best.pt --out_dir=tuned""".split()
    said = run("train.py", *flags, cwd=work)
    best = load_checkpoint(f"{work}/whole/best.pt")["best_loss"]
    assert f"step 00000/00002 | val loss {best:.4f}" in said
    assert "those of step 12 of whole/best.pt; fresh: none" in said and "other words" not in said
    config = [json.loads(read(work, name, "config.json")) for name in ("whole", "tuned")]
    for k in ("mixer", "n_layer", "n_embd", "block_size", "dropout"):
        assert config[0][k] == config[1][k]
    said = run("train.py", *flags, "--max_iters=3", "--resume", cwd=work)
    assert "--init_from is left out" in said and "step 00003/00003" in said and "step 00000" not in said
    prepare_data.prepare("recall", f"{work}/tune", rows=100, n_pairs=2, n_keys=4)
    prepare_data.prepare("lego", f"{work}/tune", rows=100, n_links=2, n_tr=1)
    labels = ["--dataset=lego", "--data_dir=tune", "--pool=mean", "--out_dir=pooled"]
    assert "--pool=mean does not suit lego" in run("train.py", *TINY, *labels, cwd=work, code=1)
    said = run("train.py", *flags, "--dataset=recall", "--data_dir=tune", cwd=work)
    assert "fresh: wte.weight, lm_head.weight\n" in said and "--tokenizer_from=tune/numbers" in said
    for wrong, words in (("--n_embd=32", "nothing in whole/best.pt fits"),
                         ("--init_from=none.pt", "none.pt does not exist"),
                         ("--init_from=whole/log.csv", "damaged or not a checkpoint")):
        said = run("train.py", *flags, wrong, "--out_dir=untuned", cwd=work, code=1)
        assert words in said and said.count("\n") == 1

MEANT = lines("""--lr=1 learning_rate | --epochs max_iters | --steps max_iters | --max-steps=9 max_iters
    --heads n_head | --layers n_layer | --hidden_size n_embd | --batch batch_size | --fp16 dtype=float16
    --bf16 dtype=bfloat16 | --checkpoint init_from | --load init_from | --n-head n_head
    --batchsize batch_size | --lerning_rate learning_rate""")

def test_did_you_mean(capsys):
    # catches: a guess that is none, a flag of another program that gets the nearest spelling
    p = prepare_data.Parser("")
    for name in "learning_rate max_iters n_head n_layer n_embd batch_size dtype init_from seed".split():
        p.add(f"--{name}")

    def said(flag):
        with pytest.raises(SystemExit):
            p.parse_args([flag])
        return capsys.readouterr().err

    for flag, ours in map(str.split, MEANT):
        assert f"unknown argument {flag.split('=')[0]}: did you mean --{ours}?" in said(flag)
    assert "log.csv" in said("--wandb_log") and "torchrun" in said("--gpus=4")
    assert "did you mean" not in said("--verbose")

COUNTED = f"""import os, runpy, sys, time
from functools import partial
import torch
sys.path.insert(0, {HERE!r})
graphs = []
def count(graph, inputs):
    graphs.append(graph)
    print("graphs", len(graphs), flush=True)
    if len(graphs) == 2 and "--out_dir=slow" in sys.argv:  # the first one is the check for a compiler
        os.mkdir("compiling")
        time.sleep(100)
    return graph.forward
torch.compile = partial(torch.compile, backend=count)
runpy.run_path({os.path.join(HERE, "train.py")!r}, run_name="__main__")
"""

def test_compiled_block_by_block(work):
    # catches: a graph for each layer or decoded token, a stop that waits for the compiler
    path = f"{work}/counted.py"
    with open(path, "w") as f:
        f.write(COUNTED)
    flags = [*TINY, "--mixer=haar", "--n_layer=3", "--max_iters=14"]
    said = run(path, *flags, "--compile=True", "--out_dir=quick", cwd=work)
    assert re.findall(r"graphs (\d+)", said)[-1] == "3" and said.count("compiled in ") == 1
    run("train.py", *flags, "--out_dir=plain", cwd=work)
    quick, plain = (load_checkpoint(f"{work}/{name}/best.pt")["model"] for name in ("quick", "plain"))
    assert quick.keys() == plain.keys()
    for k, v in plain.items():
        close(quick[k], v, 1e-4)
    p = start(path, *flags, "--compile=True", "--out_dir=slow", cwd=work)
    until(lambda: os.path.exists(f"{work}/compiling"), p)
    p.send_signal(signal.SIGTERM)
    said = p.communicate(timeout=30)[1]
    assert p.returncode == 128 + signal.SIGTERM and "--resume goes on from step 0\n" in said
    assert load_checkpoint(f"{work}/slow/ckpt.pt")["iter_num"] == 0

# -----------------------------------------------------------------------------
# faults: each does its worst so many times, from a fixed seed, and counts what was lost. pytest tries each
# once; python test_model.py 20 > results/faults.md tries each 20 times and writes the table

def hurt(p, rng, seconds, i):
    """Send a script the i-th of three signals at a random moment -> was it hurt in time? and what it said."""
    try:
        return False, p.communicate(timeout=rng.uniform(0.2, 1.0) * seconds)[1]
    except subprocess.TimeoutExpired:
        p.send_signal((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[i % 3])
        return True, p.communicate(timeout=30)[1]

def killed(work, rng, tries, *flags):
    """Start, kill at a random moment, go on, until tries kills are done; then let it end, and compare."""
    done, lost, flags = 0, 0, [*TINY, *flags, "--resume"]
    began = time.time()
    run("train.py", *flags, "--out_dir=undisturbed", cwd=work)
    seconds = time.time() - began
    while done < tries:
        code = None
        while code != 0:
            p = start("train.py", *flags, "--out_dir=disturbed", cwd=work)
            if done < tries:
                hit, err = hurt(p, rng, seconds, done)
                done += hit
            else:
                err = p.communicate(timeout=170)[1]
            code = p.returncode
            lost += "Traceback" in err and "KeyboardInterrupt" not in err
            lost += code not in (0, 130, 143, -9, -15, -2)
        lost += left(f"{work}/disturbed") != left(f"{work}/undisturbed")
        shutil.rmtree(f"{work}/disturbed")
    shutil.rmtree(f"{work}/undisturbed")
    return done, lost

def fault_killed_in_training(work, rng, tries):
    return killed(work, rng, tries, "--mixer=haar", "--max_iters=60", "--eval_interval=20", "--metric_rows=1")

def fault_killed_in_writing_checkpoints(work, rng, tries):
    flags = "--mixer=attention --max_iters=30 --eval_interval=1 --eval_rows=1 --metric_rows=1 --n_embd=128"
    return killed(work, rng, tries, *flags.split())

def fault_killed_in_evaluation(work, rng, tries):
    flags = "--mixer=wersa --max_iters=4 --eval_interval=2 --eval_rows=1000 --metric_rows=100"
    return killed(work, rng, tries, *flags.split())

def fault_killed_in_preparation(work, rng, tries):
    flags, lost, folder = ["--dataset=lego", "--rows=60000"], 0, f"{work}/killed"
    run("prepare_data.py", *flags, "--data_dir=undisturbed", cwd=work)
    want = prepare_data.load_meta(f"{work}/undisturbed/lego")["files"]  # sizes and checksums
    for i in range(tries):
        p = start("prepare_data.py", *flags, "--force", "--data_dir=killed", cwd=work)
        _, err = hurt(p, rng, 1.6, i)
        lost += "Traceback" in err and "KeyboardInterrupt" not in err  # while it still imports
        if i % 5 == 4 or i + 1 == tries:
            run("prepare_data.py", *flags, "--data_dir=killed", cwd=work)
            lost += prepare_data.load_meta(f"{folder}/lego")["files"] != want
            lost += os.listdir(folder) != ["lego"]
    shutil.rmtree(folder)
    shutil.rmtree(f"{work}/undisturbed")
    return tries, lost

def fault_disk_full(work, rng, tries):
    lost, flags, out = 0, [*TINY, "--mixer=haar", "--resume", "--out_dir=full"], f"{work}/full"
    for _ in range(tries):
        run("train.py", *flags, "--max_iters=4", cwd=work)
        before = open(f"{out}/ckpt.pt", "rb").read()
        room = rng.integers(5_000, len(before) - 1000)
        p = start("train.py", *flags, cwd=work, launcher=["-c", LIMITED, str(room)])
        err = p.communicate(timeout=60)[1].strip().splitlines()
        lost += p.returncode != 1 or len(err) != 1 or "cannot be written" not in err[0]
        lost += open(f"{out}/ckpt.pt", "rb").read() != before
        lost += any(name.endswith(".tmp") for name in os.listdir(out))
        shutil.rmtree(out)
    said = run("train.py", *TINY, "--out_dir=/proc/nowhere", cwd=work, code=1)
    return tries + 1, lost + ("cannot be written" not in said)

def fault_number_of_processes_changed(work, rng, tries):
    """Stopped and gone on with 2, 4 and 1 processes, against 1 throughout; none divides 37 rows."""
    # catches: means of per-process means, a rank reading another's rows, unsummed gradients
    lost, steps = 0, 50 if tries > 2 else 14
    for i in range(tries):
        mixer = ("haar", "attention", "wersa", "wavspa")[i % 4]
        flags = [*TINY, "--dropout=0", "--gradient_accumulation_steps=2", "--eval_rows=37"]
        flags += [f"--mixer={mixer}", f"--max_iters={steps}", f"--eval_interval={steps // 2}"]
        run("train.py", *flags, "--out_dir=one", cwd=work)
        flags += ["--resume"]
        stops = sorted(rng.choice(range(1, steps - 4), 3, replace=False))
        for n, step in zip((1, 2, 4) if i % 2 else (4, 2), stops):
            launcher = [*TORCHRUN, str(n)] if n > 1 else []
            code = kill_after(step, signal.SIGTERM, *flags, cwd=work, out="some", launcher=launcher)
            lost += code == 0 and step < steps - 8
        run("train.py", *flags, "--out_dir=some", cwd=work, launcher=[*TORCHRUN, "2"])
        one, some = logged(work, "one"), logged(work, "some")
        lost += [r["step"] for r in one] != [r["step"] for r in some]
        for k, most in (("loss", 1e-5), ("val_loss", 1e-5), ("val_metric", 1e-5), ("norm", 1e-3)):
            worst = max(abs(float(a[k] or 0) - float(b[k] or 0)) for a, b in zip(one, some))
            print(mixer, steps, "steps,", k, worst, file=sys.stderr)
            lost += worst > most
        shutil.rmtree(f"{work}/one")
        shutil.rmtree(f"{work}/some")
    return tries, lost

def fault_one_of_two_processes_dies(work, rng, tries):
    lost, flags = 0, [*TINY, *ENDLESS, "--out_dir=dies", "--dist_timeout=10"]
    for _ in range(tries):
        p = start("train.py", *flags, cwd=work, launcher=[*TORCHRUN, "2"])
        until(lambda: len(logged(work, "dies")) > 2, p)
        workers = subprocess.run(["pgrep", "-P", str(p.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(workers[rng.integers(2)]), signal.SIGKILL)
        began, err = time.time(), p.communicate(timeout=60)[1]
        lost += p.returncode == 0 or time.time() - began > 45 or not re.search("SIGKILL|Signal 9", err)
        load_checkpoint(f"{work}/dies/ckpt.pt")
        shutil.rmtree(f"{work}/dies")
    return tries, lost

def mutated(raw, rng):
    """A file with one thing wrong: cut, a bit or a run of bytes changed, bytes added, put in or taken out."""
    raw, at, n = bytearray(raw), int(rng.integers(len(raw))), int(rng.integers(1, 64))
    kind = rng.integers(6)
    if kind == 0:
        return bytes(raw[:at])
    if kind == 1:
        raw[at] ^= 1 << rng.integers(8)
    elif kind == 2:
        raw[at:at + n] = rng.bytes(len(raw[at:at + n]))
    elif kind == 3:
        raw[at:at + n] = bytes(len(raw[at:at + n]))
    elif kind == 4:
        raw[at:at] = rng.bytes(n)
    else:
        del raw[at:at + n]
    return bytes(raw)

def refused(call):
    """Whether call ends in one clear line; a traceback or two lines are an error."""
    try:
        call()
    except SystemExit as e:
        assert isinstance(e.code, str) and "\n" not in e.code, e.code
        return True
    return False

def same(a, b):
    """Are two trees of tensors and plain types the same, to the bit?"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b

def fault_damaged_checkpoints(work, rng, tries):
    path, lost = f"{work}/damaged.pt", 0
    raw, sound = open(f"{work}/whole/ckpt.pt", "rb").read(), load_checkpoint(f"{work}/whole/ckpt.pt")
    for _ in range(tries):
        with open(path, "wb") as f:
            f.write(mutated(raw, rng))
        if not refused(lambda: load_model(path)):
            lost += not same(load_checkpoint(path), sound)  # a byte that means nothing may differ
    return tries, lost

def fault_strange_checkpoints(work, rng, tries):
    """Well-formed files of someone else: parts missing, of a wrong type, absurd."""
    path, tried, lost, sound = f"{work}/strange.pt", 0, 0, load_checkpoint(f"{work}/whole/best.pt")
    wrong = [None, -1, 0, 10**12, "x", [], {}, 1e300, float("nan"), True, "../../x", torch.zeros(3)]
    while tried < tries:
        ckpt = copy.deepcopy(sound)
        part = (ckpt, ckpt["model_args"], ckpt["meta"], ckpt["model"])[rng.integers(4)]
        keys = ["tokenizer"] if part is ckpt["meta"] else list(part)
        key, value = keys[rng.integers(len(keys))], wrong[rng.integers(len(wrong))]
        kind = type(part[key])
        plausible = type(value) is kind and kind is not torch.Tensor or value is True and kind is int
        if plausible or part is ckpt and key in ("iter_num", "best_loss"):
            continue
        if tried % 4:
            part[key] = value
        else:
            del part[key]
        tried += 1
        torch.save(ckpt, path)
        found = []
        if not refused(lambda: found.append(load_model(path)[0].state_dict())):
            lost += not same(found[0], sound["model"])  # what this model does not use may be absurd
    return tried, lost

def fault_damaged_data(work, rng, tries):
    folder, lost = f"{work}/data/numbers", 0
    for _ in range(tries):
        names = sorted(os.listdir(folder))
        path = os.path.join(folder, names[rng.integers(len(names))])
        raw = open(path, "rb").read()
        bad = mutated(raw, rng)
        with open(path, "wb") as f:
            f.write(bad)
        if bad != raw and not refused(lambda: prepare_data.load_meta(folder)):
            lost += json.loads(bad) != json.loads(raw)
        with open(path, "wb") as f:
            f.write(raw)
    return tries, lost

def fault_strange_data(work, rng, tries):
    """Data sets whose checksums are right and whose contents are not."""
    lost, folder = 0, f"{work}/strange/numbers"
    for i in range(tries):
        shutil.copytree(f"{work}/data/numbers", folder)
        meta, kind = json.loads(read(folder, "meta.json")), i % 4
        if kind < 2:  # offsets beyond the end, or backwards; ids beyond the vocabulary
            name, dtype = (("train.src.idx", np.int64), ("val.tgt.bin", np.uint16))[kind]
            values = np.fromfile(f"{folder}/{name}", dtype)
            values[rng.integers(len(values))] = rng.integers(259, 2**16) if kind else rng.choice([-5, 10**12])
            values.tofile(f"{folder}/{name}")
            meta["files"][name][1] = prepare_data.crc32(f"{folder}/{name}")
        elif kind == 2:
            meta[("block_size", "vocab_size")[rng.integers(2)]] = int(rng.choice([-1, 0, 10**15]))
        else:
            meta[sorted(meta)[rng.integers(len(meta))]] = [None, "x", -1][rng.integers(3)]
        meta["checksum"] = prepare_data.checksum(meta)
        with open(f"{folder}/meta.json", "w") as f:
            json.dump(meta, f)
        flags = ["--data_dir=strange", "--out_dir=strange/out", "--max_iters=1"]
        p = start("train.py", *TINY, *flags, cwd=work)
        err = p.communicate(timeout=60)[1].strip()
        lost += "Traceback" in err or kind < 3 and p.returncode == 0
        lost += p.returncode != 0 and len(err.splitlines()) != 1
        shutil.rmtree(f"{work}/strange")
    return tries, lost

def fault_wrong_flags(work, rng, tries):
    """Every flag of every script with a wrong type, a negative, a zero, a huge number and a misspelling: a
    result, or one line and exit code 2 that name the flag (a wrong file may end in 1)."""
    base = {"train.py": [*TINY, "--max_iters=1", "--eval_rows=2"],
            "sample.py": "--out_dir=whole --start=one --max_new_tokens=2 --device=cpu".split(),
            "prepare_data.py": "--dataset=recall --rows=50 --data_dir=flags --force".split(),
            "bench.py": "speed --lengths=8 --only=copy --compile=False".split()}
    files = """--out_dir --data_dir --dataset --source --start --input --output --ckpt --json --first
        --nanogpt --mixers_from --init_from --show""".split()
    jobs = []
    for name in base:
        for flag in sorted(set(re.findall(r"^  (--\w+)", run(name, "--help", cwd=work), re.M))):
            jobs += [(name, flag, end) for end in ("=x?y", "=-1", "=0", "=1000000000000", "x=1")]
    jobs = [job for job in jobs if tries > 9 or rng.random() < 0.05]

    def fails(i, job):
        name, flag, end = job
        out = f"{work}/flag {i:04d}"
        own = [f"--out_dir={out}"] if name == "train.py" and flag != "--out_dir" else []
        p = start(name, *base[name], flag + end, *own, cwd=work)
        try:
            said = p.communicate(timeout=8)[1].strip()
        except subprocess.TimeoutExpired:  # a run that goes on: it is to stop when told to
            p.send_signal(signal.SIGTERM)
            said = p.communicate(timeout=30)[1].strip()
        shutil.rmtree(out, ignore_errors=True)
        code, is_file = p.returncode, flag in files
        one_line = len(said.splitlines()) == 1 and (flag in said or is_file)
        runs = code in (0, 143) and "Traceback" not in said
        runs = runs and (code or end != "=x?y" or is_file)
        fine = one_line and code == 2
        if end != "x=1":
            fine = fine or runs or one_line and code == 1 and is_file
        if not fine:
            print(name, flag + end, code, said[-300:], file=sys.stderr)
        return not fine
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return len(jobs), sum(pool.map(fails, range(len(jobs)), jobs))

def fault_any_text(work, rng, tries):
    """Any Unicode, control characters, line ends, a megabyte: one line out for each line in."""
    lost = 0
    odd = ["\u0000", "\ufeff", "\u2028", "\x85", "\x0b\x0c", "\U0001f642", "\u05e9\u05dc\u05d5\u05dd",
           "\u0627\u202e\u0644", "a\u0301", "\ufffd", "\r", "\t", " ", "", "y"]
    for i in range(tries):
        lines = ["x" * 2**20] if i == 0 else []
        while len(lines) < 200:
            words = [odd[k] for k in rng.integers(len(odd), size=rng.integers(4))]
            words += map(chr, rng.integers(32, 0xd7ff, size=rng.integers(20)))
            lines.append("".join(words).rstrip("\r"))
        with open(f"{work}/any.txt", "w", encoding="utf-8", newline="") as f:
            f.writelines(line + ("\n", "\r\n")[i % 2] for line in lines)
        flags = "--out_dir=whole --input=any.txt --output=any.out --max_new_tokens=4 --device=cpu".split()
        said = run("sample.py", *flags, cwd=work)
        got = read(work, "any.out").split("\n")
        lost += len(got) != len(lines) + 1 or i == 0 and "were cut" not in said or any("\r" in g for g in got)
    return tries * 200, lost

def growth(p, at):
    """Watch a process while at() holds -> how much its memory, in bytes, and its open files grew over the
    second half of that time."""
    seen = []
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(p.communicate)  # a pipe that nobody reads stops it
        while not ended.done():
            with contextlib.suppress(OSError, TypeError):  # it ends while we look
                kilobytes = re.search(r"VmRSS:\s+(\d+)", read(f"/proc/{p.pid}/status"))[1]
                now = int(kilobytes) * 1024, len(os.listdir(f"/proc/{p.pid}/fd"))
                seen += [now] if at() else []
            time.sleep(0.05)
    assert p.returncode == 0 and len(seen) > 8, (p.returncode, len(seen))
    half, end = seen[len(seen) // 2], seen[-1]
    return end[0] - half[0], end[1] - half[1]

def fault_long_runs(work, rng, tries):
    """2,000 steps and as many translated lines (300 in a short test): memory and open files at the end."""
    if sys.platform != "linux":
        pytest.skip("growth reads what Linux's kernel tells of a process")
    n, lost = 2000 if tries > 2 else 300, 0
    with open(f"{work}/long.txt", "w") as f:
        f.writelines(f"{en(int(i))}\n" for i in rng.integers(10**6, size=n))
    train = [*TINY, "--mixer=wersa", f"--max_iters={n}", f"--eval_interval={n}", "--out_dir=long"]
    write = """--out_dir=whole --input=long.txt --output=long.out --max_new_tokens=40 --batch_size=8
        --device=cpu""".split()
    training = lambda: 20 < len(logged(work, "long")) < n  # and no evaluation
    translating = lambda: not glob.glob(f"{work}/long.out*")  # and its file is not open yet
    for name, flags, at in (("train.py", train, training), ("sample.py", write, translating)):
        memory, files = growth(start(name, *flags, cwd=work), at)
        print(f"{name}: {memory / n * 2:.0f} bytes a step or line, {files} files", file=sys.stderr)
        lost += memory > 2e6 + 500 * n or files > 0
    shutil.rmtree(f"{work}/long")
    return 2 * n, lost

def fault_not_finite(work, rng, tries):
    """Steps whose loss is not finite are left out and counted; where none succeeds, training ends."""
    lost, factor = 0, "scaler.scale(loss * size * world"
    source = read(HERE, "train.py")
    assert factor in source
    for i in range(tries):
        bad, value = sorted(rng.choice(range(1, 12), 3, replace=False).tolist()), ("nan", "inf")[i % 2]
        with open(f"{work}/sick.py", "w") as f:
            f.write(source.replace(factor, f"{factor} * (float('{value}') if iter_num in {bad} else 1)"))
        env = dict(os.environ, PYTHONPATH=HERE)
        argv = [sys.executable, "sick.py", *TINY, "--mixer=haar", "--out_dir=sick"]
        p = subprocess.run(argv, cwd=work, env=env, capture_output=True)
        skipped = [int(row["skipped"]) for row in logged(work, "sick") if row["loss"]]
        lost += p.returncode != 0 or skipped != [sum(b <= t for b in bad) for t in range(12)]
        weights = load_checkpoint(f"{work}/sick/ckpt.pt")["model"].values()
        lost += not all(v.isfinite().all() for v in weights)
        shutil.rmtree(f"{work}/sick")
    flags = """--learning_rate=100 --grad_clip=0 --warmup_iters=0 --max_iters=300 --mixer=attention
        --out_dir=sick --dtype=float16""".split()
    said = run("train.py", *TINY, *flags, cwd=work, code=1)
    return tries + 1, lost + ("steps in a row" not in said or "--learning_rate" not in said)

# how often, for each time that is asked for
OFTEN = {"number of processes changed": 0.2, "one of two processes dies": 0.2, "long runs": 0.2,
         "any text": 0.2, "disk full": 0.25, "not finite": 0.25, "damaged checkpoints": 5,
         "strange checkpoints": 5, "damaged data": 5}
FAULTS = {name[6:].replace("_", " "): f for name, f in list(globals().items()) if name.startswith("fault_")}

@each("name", FAULTS)
def test_faults(work, name):  # catches: what a user would lose overnight
    tried, lost = FAULTS[name](work, np.random.default_rng(0), math.ceil(OFTEN.get(name, 1)))
    assert tried and not lost

# -----------------------------------------------------------------------------
# data

prepare, load_meta = prepare_data.prepare, prepare_data.load_meta
BYTES = Tokenizer({"kind": "bytes"})

def refusal(words):
    return pytest.raises(SystemExit, match=words)

def write_lines(path, rows):
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(row + "\n" for row in rows)
    return str(path)

def write_parquet(path, **columns):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)

def rows_of(folder, stem):
    """The rows of a prepared file, as text."""
    meta = load_meta(folder)
    ids, idx = prepare_data.read_ragged(folder, stem, meta["dtype"])
    tok = Tokenizer(meta["tokenizer"])
    return [tok.decode(ids[i:j]) for i, j in zip(idx, idx[1:])]

def labels_of(folder, split, name="label"):
    return np.fromfile(os.path.join(folder, f"{split}.{name}.bin"), dtype=np.int32)

def counts(folder, *splits):
    return [load_meta(folder)["splits"][split]["rows"] for split in splits or ("train", "val", "test")]

def test_number_names():
    # catches: "einsundzwanzig", "eintausendeinhundert" lost, a missing British "and"
    for n, e, d in (
            (0, "zero", "null"), (1, "one", "eins"), (21, "twenty-one", "einundzwanzig"),
            (101, "one hundred and one", "einhunderteins"),
            (421, "four hundred and twenty-one", "vierhunderteinundzwanzig"),
            (1001, "one thousand and one", "eintausendeins"),
            (17000, "seventeen thousand", "siebzehntausend"),
            (101000, "one hundred and one thousand", "einhunderteintausend"),
            (312405, "three hundred and twelve thousand four hundred and five",
             "dreihundertzwölftausendvierhundertfünf"),
            (2300001, "two million three hundred thousand and one",
             "zwei Millionen dreihunderttausendeins")):
        assert (en(n), de(n)) == (e, d)
    assert len({de(n) for n in range(20000)}) == len({en(n) for n in range(20000)}) == 20000

def test_numbers_held_out_are_never_trained_on(tmp_path):
    # catches: held-out values in training, one row twice in a test
    folder = prepare("numbers", str(tmp_path), rows=2000)
    train = set(rows_of(folder, "train.src"))
    for split in ("val", "test"):
        rows = open(os.path.join(folder, f"{split}.src.txt")).read().split("\n")[:-1]
        assert len(set(rows)) == 1000 and not train & set(rows)

SMALL = dict(numbers={}, listops=dict(min_len=5, max_len=60, max_depth=5), lego={}, recall={}, pathfinder={})
DIGESTS = dict(numbers="3cafe6170ca1", listops="7d2c3d6bec8a", lego="cbca611bfd40", recall="fff606ef8a57",
               pathfinder="783775a10bb2")

@each("name", SMALL)
def test_generated_data_are_the_same_everywhere(name, tmp_path):
    # catches: order of a set or dict, a seed not used, a generator that follows the number of cores
    digests = []
    for i, seed in enumerate((1337, 1337, 7)):
        folder = prepare(name, str(tmp_path / str(i)), seed=seed, rows=160, **SMALL[name])
        files = [f for f in sorted(os.listdir(folder)) if f.endswith((".bin", ".idx", ".txt"))]
        whole = b"".join(open(os.path.join(folder, f), "rb").read() for f in files)
        digests.append(hashlib.sha256(whole).hexdigest()[:12])
    assert digests[0] == digests[1] == DIGESTS[name] != digests[2]

@each("name", ("listops", "lego", "recall"))
def test_a_large_test_set_leaves_the_rows_of_training_alone(name, tmp_path):
    more = SMALL[name] or dict(recall=dict(n_pairs=4)).get(name, {})
    a, b = (prepare(name, str(tmp_path / str(n)), rows=160, test_rows=n, **more) for n in (20, 41))
    assert counts(a, "test", "long") == [20, 10] and counts(b, "test", "long") == [41, 21]
    assert rows_of(a, "train.src") == rows_of(b, "train.src")

def value_and_depth(words):
    """A ListOps row read with a stack: its value, its depth, its operators' counts of arguments."""
    stack, depth, arguments = [[]], 0, []
    for w in words:
        if w[0] == "[":
            stack.append([w])
            depth = max(depth, len(stack) - 1)
        elif w == "]":
            op, *v = stack.pop()
            arguments.append(len(v))
            v.sort()
            half = len(v) // 2
            middle = v[half] if len(v) % 2 else int((v[half - 1] + v[half]) / 2)
            stack[-1].append({"[MIN": v[0], "[MAX": v[-1], "[MED": middle, "[SM": sum(v) % 10}[op])
        else:
            stack[-1].append(int(w))
    (value,), = stack
    return value, depth + 1, arguments  # the deepest operator's digits are one level below it

def test_listops_against_a_stack(tmp_path):
    # catches: a median rounded up, an argument beside its own list, a row in train and test, too deep a tree
    folder = prepare("listops", str(tmp_path), rows=3000, min_len=20, max_len=90, max_depth=6)
    seen, arguments, deepest, votes = {}, [], 0, {}
    for split in ("train", "val", "test", "long"):
        low, high = (90, 180) if split == "long" else (20, 90)
        for row, label in zip(rows_of(folder, f"{split}.src"), labels_of(folder, split), strict=True):
            value, depth, args = value_and_depth(row.split())
            assert value == label and low < len(row.split()) < high and depth <= 6
            assert seen.setdefault(row, split) == split
            arguments += args
            deepest = max(deepest, depth)
            if split == "train":
                votes.setdefault(row.split()[0], []).append(label)
    assert set(arguments) == set(range(2, 11)) and abs(np.mean(arguments) - 6) < 0.5 and deepest == 6
    trivial = load_meta(folder)["splits"]["test"]["trivial"]
    guesses = [np.bincount(votes[row.split()[0]]).argmax() for row in rows_of(folder, "test.src")]
    assert trivial["root operator"] == np.mean(guesses == labels_of(folder, "test"))
    assert trivial["root operator"] > trivial["majority class"] > 0.1
    with refusal("only 4.. different rows"):
        prepare_data.listops(tmp_path, rows=1000, min_len=1, max_len=5, max_depth=2)

def test_lego_chains_can_be_followed(tmp_path):
    # catches: a clause that names the wrong letter, a label out of step, later links told in training
    folder = prepare("lego", str(tmp_path), rows=300, n_links=8, n_tr=3)
    for split, links, told in (("train", 8, 3), ("val", 8, 3), ("test", 8, 8), ("long", 16, 16)):
        labels, groups = (labels_of(folder, split, name).reshape(-1, links, 5) for name in ("label", "group"))
        assert (labels[..., 1:] == -1).all() and (groups[..., 1:] == 0).all()
        rows = rows_of(folder, f"{split}.src")
        for row, label, group in zip(rows, labels[..., 0], groups[..., 0], strict=True):
            clauses = np.reshape(row.split(), (-1, 5))
            of = {c[0]: (c[3], c[2] == "-") for c in clauses}
            for c, y, g in zip(clauses, label, group):
                letter, minus, link = c[0], 0, 0
                while letter != "1":
                    letter, flip = of[letter]
                    minus, link = minus ^ flip, link + 1
                assert link == g and y == (minus if link <= told else -1)

def test_recall_rows_answer_themselves(tmp_path):
    # catches: a key with two values, an answer before its question, a key that is never asked
    folder = prepare("recall", str(tmp_path), rows=300, n_pairs=8, n_keys=40)
    ids = load_meta(folder)["tokenizer"]["words"]
    for split, sizes in (("train", {1, 2, 4, 8}), ("test", {1, 2, 4, 8}), ("long", {16, 32})):
        labels, groups, at, seen = labels_of(folder, split), labels_of(folder, split, "group"), 0, set()
        for words in map(str.split, rows_of(folder, f"{split}.src")):
            p = (len(words) + 1) // 4
            told = dict(zip(words[:2 * p:2], words[1:2 * p:2]))
            assert len(told) == p and sorted(told) == sorted(words[2 * p::2])
            want = [-1] * len(words)
            want[2 * p::2] = [ids.index(told[key]) + 3 for key in words[2 * p::2]]
            end = at + len(words)
            assert labels[at:end].tolist() == want and (groups[at:end] == p).all()
            at, seen = end, seen | {p}
        assert at == len(labels) and seen == sizes

def follow(image):
    """Whether the second disc of a Pathfinder picture can be reached from the first over lit pixels, never
    stepping farther than the gap between two dashes."""
    box, join = {32: (1, 5), 128: (2, 53)}[len(image)]  # a disc's half, the longest step squared
    shape = 2 * box + 1, 2 * box + 1
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(image.astype(int), box), shape).sum((2, 3))
    discs = []
    for _ in range(2):  # the two places with most ink
        y, x = np.unravel_index(windows.argmax(), windows.shape)
        windows[max(0, y - 3 * box):y + 3 * box + 1, max(0, x - 3 * box):x + 3 * box + 1] = 0
        discs.append((y, x))
    lit, at, front = image > 12, np.argwhere(image > 12), [discs[0]]
    while front:
        here = front.pop()
        for y, x in at[((at - here) ** 2).sum(1) <= join]:
            if lit[y, x]:
                lit[y, x] = False
                front.append((y, x))
    return int(not lit[discs[1]])

@each("size,count", ((32, 600), (128, 40)))
def test_pathfinder_labels_can_be_read_off_the_picture(size, count):
    # catches: contours that touch, discs on the wrong ends, a label that the ink gives away
    images, labels = prepare_data.pathfinder_images(count, size, seed=3)
    assert [follow(i) for i in images] == labels.tolist() and 0.4 < labels.mean() < 0.6
    assert not np.array_equal(images[:9], prepare_data.pathfinder_images(9, size, seed=4)[0])
    ink = images.reshape(count, -1).astype(float).sum(1)
    assert abs(np.corrcoef(ink, labels)[0, 1]) < 0.25

LEARN = [*TINY, "--learning_rate=1e-2", "--log_interval=50", "--eval_interval=50", "--max_iters=100"]

def test_token_labels_groups_and_longer_rows_through_training(work):
    # catches: labels shifted against their tokens, groups of another row, a bos that moves everything by one
    data = os.path.join(work, "data")
    prepare("lego", data, rows=400, n_links=2, n_tr=1)
    prepare("recall", data, rows=800, n_pairs=2, n_keys=4)
    flags = [*LEARN, "--n_embd=32", "--max_iters=200", "--dropout=0", "--mixer=attention", "--gate=False"]
    flags.remove("--eval_block_size=0")  # its default is what long needs
    said = run("train.py", *flags, "--dataset=lego", "--out_dir=lego", cwd=work)
    result = result_of(f"{work}/lego")
    groups, far = result["test"]["groups"], result["far"][0]
    assert groups["1"] > 0.95 and groups.keys() == {"1", "2"} and "trivial majority class" in said
    assert far["groups"].keys() == {"1", "2", "3", "4"} and far["block_size"] >= 20
    assert 0.4 < result["trivial"]["majority class"] < 0.6
    assert "a=-1" in run("sample.py", "--out_dir=lego", "--start=a = - 1 ; b = + a ;", cwd=work)
    run("train.py", *flags, "--dataset=recall", "--out_dir=recall", "--n_layer=2", cwd=work)
    result = result_of(f"{work}/recall")
    assert result["test"]["groups"]["1"] > 0.9 and result["far"][0]["groups"].keys() == {"4"}
    assert result["test_metric"] > result["trivial"]["a value of the row"]
    ask = "--start=k1 v2 k1", "--max_new_tokens=1", "--temperature=0"
    assert run("sample.py", "--out_dir=recall", *ask, cwd=work).startswith("k1 v2 k1 v2")

def test_evaluation_is_the_loop_over_rows(work):
    # catches: a last batch that weighs as much as a full one, padding counted as right, another split
    flags = "--mixer=attention", "--out_dir=far", "--max_iters=4", "--eval_block_size=120"
    run("train.py", *TINY, *flags, cwd=work)
    result, (model, tok, _) = result_of(f"{work}/far"), load_model(f"{work}/far/best.pt")
    for found, split, n in ((result["test"], "test", 1000), (result["far"][0], "long", 500)):
        loss = right = count = 0
        sides = [rows_of(f"{work}/data/numbers", f"{split}.{side}") for side in ("src", "tgt")]
        for a, b in zip(*sides, strict=True):
            a, b = tok.encode(a), tok.encode(b)
            with torch.no_grad():
                logits, _ = model(torch.tensor([[1] + b]), src=torch.tensor([a + [2]]))
            answer = torch.tensor(b + [2])
            loss += F.cross_entropy(logits[0], answer, reduction="sum").item()
            right += (logits[0].argmax(-1) == answer).sum().item()
            count += len(answer)
        assert abs(found["loss"] - loss / count) < 1e-4 and abs(found["accuracy"] - right / count) < 2e-4
        assert len(sides[0]) == n and found["split"] == split
    assert result["far"][0]["block_size"] == 120

def test_roc_auc_and_the_leak_alarm(work):
    # catches: ties counted whole, an alarm that never rings, one that rings on generated words
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 6, 200), rng.random(200) < 0.3
    pairs = [(a > b) + (a == b) / 2 for a in score[positive] for b in score[~positive]]
    assert abs(prepare_data.roc_auc(score, positive) - np.mean(pairs)) < 1e-12
    source = [write_lines(f"{work}/en", (f"the same words again, {i}" for i in range(400))),
              write_lines(f"{work}/de", ["immer die gleichen Worte"] * 400)]
    prepare("parallel", f"{work}/data", source=",".join(source), vocab_size=260)
    said = run("train.py", *LEARN, "--dataset=parallel", "--mixer=attention", "--out_dir=alarm", cwd=work)
    assert "warning: perplexity" in said and "nrefs:1|case:mixed" in said
    said = run("train.py", *TINY, "--mixer=haar", "--out_dir=quiet", "--max_iters=1", cwd=work)
    assert "warning: perplexity" not in said

def test_translation_data_from_the_hubs_layout(tmp_path):
    # catches: lost umlauts, rows with an empty side, sides drifting apart, a blank last line
    for split, n in (("train", 60), ("val", 5), ("test", 5)):
        rows = [dict(en=f"{split} {i}: {en(i)}.", de=f"Satz {i}: {de(i)}, größer.") for i in range(n)]
        rows += [dict(en="x", de="")] * (split == "train")
        content = "\ufeff" + "\n".join(map(json.dumps, rows)) + "\n\n"
        (tmp_path / f"{split}.jsonl").write_text(content, encoding="utf-8")
    folder = prepare("multi30k", str(tmp_path / "data"), source=str(tmp_path), vocab_size=300)
    meta = load_meta(folder)
    assert counts(folder) == [60, 5, 5] and sum(meta["skipped"].values()) == 1 and meta["vocab_size"] <= 300
    tok = Tokenizer(json.loads(json.dumps(meta["tokenizer"])))
    with open(f"{folder}/val.tgt.txt", encoding="utf-8") as f:
        assert rows_of(folder, "val.tgt") == f.read().split("\n")[:-1]
    assert tok.decode(tok.encode("neue Wörter 🙂")) == "neue Wörter 🙂"

def test_imdb_from_the_hubs_layout_trains_an_encoder(tmp_path):
    # catches: labels out of step with skipped rows, accuracy over a batch only
    for split, n in (("train", 200), ("test", 40)):
        texts = [("good " if i % 2 else "bad ") * (1 + i % 3) + f"{split} {i}" for i in range(n)] + [""]
        labels = [i % 2 for i in range(n)] + [0]
        write_parquet(tmp_path / "plain_text" / f"{split}-00000-of-00001.parquet", text=texts, label=labels)
    folder = prepare("imdb", str(tmp_path / "data"), source=str(tmp_path))
    assert sum(counts(folder)) == 240 and sum(load_meta(folder)["skipped"].values()) == 2
    flags = "--dataset=imdb", "--mixer=wersa", "--block_size=32", "--learning_rate=5e-3", "--metric_rows=40"
    said = run("train.py", *LEARN, *flags, cwd=tmp_path)
    assert float(re.search(r"test accuracy ([\d.]+) \(n=40", said)[1]) > 0.95
    assert run("sample.py", "--start=good good movie", cwd=tmp_path).startswith("positive\t")

def test_strange_rows_in_the_hubs_layout(tmp_path):
    # catches: a traceback for a label that is none, a train split too short for a tenth
    def imdb(texts, labels):
        for split in ("train", "test"):
            write_parquet(tmp_path / "plain_text" / f"{split}-0.parquet", text=texts, label=labels)
        return prepare("imdb", str(tmp_path / "data"), source=str(tmp_path), force=True)
    for text, labels, words in (
            ("a", [0, 7], "none of the 2 classes"), ("a", [0, -1], "none of the 2 classes"),
            ("a", ["x", "y"], "lack a field"), ("a", [0, None], "lack a field"),
            ("", [0, 1], "no text of train")):
        with refusal(words):
            imdb([text] * 20, labels * 10)
    with refusal("no text of train"):
        imdb(["a"], [0])
    assert counts(imdb(["a"] * 5, [0, 1, 0, 1, 0]), "val") == [1]

def test_cifar10_from_the_hubs_layout(tmp_path):
    # catches: colours read as three rows, labels named wrongly
    image = pytest.importorskip("PIL.Image")
    def png(i):
        file = io.BytesIO()
        image.new("RGB", (32, 32), (10 + i % 2 * 200, 0, i)).save(file, "PNG")
        return dict(bytes=file.getvalue(), path=None)
    for split, n in (("train", 100), ("test", 30)):
        path = tmp_path / "plain_text" / f"{split}-00000-of-00001.parquet"
        write_parquet(path, img=[png(i) for i in range(n)], label=[i % 2 for i in range(n)])
    folder = prepare("cifar10", str(tmp_path / "data"), source=str(tmp_path))
    ids, idx = prepare_data.read_ragged(folder, "test.src", load_meta(folder)["dtype"])
    assert counts(folder) == [90, 10, 30] and set(np.diff(idx)) == {1024}
    assert ids[idx[2]] == 3 + int(10 * 0.299 + 2 * 0.114)
    assert ids[idx[3]] == 3 + int(210 * 0.299 + 3 * 0.114 + 0.5)
    run("train.py", *LEARN, "--dataset=cifar10", "--mixer=haar", "--max_iters=20", cwd=tmp_path)
    assert result_of(tmp_path / "out")["test"]["auc"] > 0.9
    (tmp_path / "x.png").write_bytes(png(1)["bytes"])
    (tmp_path / "y.png").write_bytes(b"no image")
    assert run("sample.py", "--start=FILE:x.png", cwd=tmp_path).split("\t")[0] in ("airplane", "automobile")
    assert "cannot be read as an image" in run("sample.py", "--start=FILE:y.png", cwd=tmp_path, code=1)

def test_arxiv_from_the_hubs_layout(tmp_path):
    # catches: documents cut in the files, a class that the text spells
    for kind in ("no_ref", "default"):
        for split, n in (("train", 40), ("validation", 10), ("test", 12)):
            texts = [(f"{kind} " + "abc"[i % 3] * (40 + i)) * (i % 4) for i in range(n)]
            labels = [i % 3 for i in range(n)]
            write_parquet(tmp_path / kind / split / "0000.parquet", text=texts, label=labels)
    folder = prepare("arxiv", str(tmp_path / "data"), source=str(tmp_path), tokenizer="bytes", min_len=60)
    meta, rows = load_meta(folder), rows_of(folder, "train.src")
    assert rows[0].startswith("no_ref ") and min(map(len, rows)) >= 60 and meta["classes"][1] == "cs.CV"
    short = sum((47 + i) * (i % 4) < 60 for i in range(40))
    assert meta["skipped"]["train: fewer than 60 tokens, left out"] == short
    flags = "--dataset=arxiv", "--mixer=wersa", "--block_size=131072", "--batch_size=2", "--max_iters=2"
    said = run("train.py", *TINY, *flags, cwd=tmp_path)
    assert "block 131,072" in said.replace("131072", "131,072") and "test AUC" in said

def test_preparation_is_all_or_nothing(tmp_path):
    # catches: a half-written folder taken for a data set, temporary files left, another format read as this
    data = tmp_path / "data"
    for content in ("", "  \n", "abc"):
        (tmp_path / "t").write_text(content)
        with refusal("too short"):
            prepare("text", str(data), source=str(tmp_path / "t"), tokenizer="bytes")
    limit = ("import resource, prepare_data; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
             "prepare_data.main()")
    full = subprocess.run([sys.executable, "-c", limit, "--dataset=lego", "--rows=20000"], cwd=tmp_path,
                          env=dict(os.environ, PYTHONPATH=HERE), capture_output=True, text=True)
    said = full.stderr.strip().splitlines()[-1]
    assert full.returncode == 1 and said.startswith("data/lego cannot be made")
    p = start("prepare_data.py", "--dataset=listops", cwd=tmp_path)
    until(lambda: (data / "listops.tmp-new").exists(), p)
    time.sleep(0.3)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=30)
    assert p.returncode == 130 and "nothing was changed" in err and "Traceback" not in err
    assert os.listdir(data) == []
    run("prepare_data.py", "--dataset=listops", "--rows=20", "--min_len=5", "--max_len=30", cwd=tmp_path)
    path = data / "listops" / "meta.json"
    path.write_text(json.dumps(dict(json.loads(path.read_text()), format=1)))
    said = run("train.py", *TINY, "--dataset=listops", cwd=tmp_path, code=1)
    assert "has format 1 and this code reads" in said and "--force" in said and said.count("\n") == 1
    began = time.time()
    with refusal("--source=DIR"):
        os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
        prepare("cifar10", str(data))
    assert time.time() - began < 15 and os.listdir(data) == ["listops"]

def test_damaged_data_is_one_line(tmp_path):
    # catches: a truncated file read as a shorter data set
    folder = prepare("numbers", str(tmp_path), rows=100)
    with open(f"{folder}/train.src.bin", "ab") as f:
        f.write(b"x")
    with refusal("is damaged, train.src.bin is not what was written"):
        load_meta(folder)
    os.remove(f"{folder}/val.src.idx")
    with refusal("val.src.idx is missing"):
        load_meta(folder)
    write_lines(tmp_path / "a", ["one", "two", "three"])
    write_lines(tmp_path / "b", ["eins", "zwei"])
    (tmp_path / "c").write_bytes(b"ab\xff")
    for second, words in (("b", "3 lines and .*2"), ("c", "not UTF-8"), ("none", "no .*none")):
        with refusal(words):
            prepare("parallel", str(tmp_path), source=f"{tmp_path}/a,{tmp_path}/{second}")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c", "numbers"]

def test_text_is_prepared_alike_for_training_and_asking(work, tmp_path):
    # catches: a no-break space that is kept here and not there, a separator that cuts a row in two
    odd = ["the\u00a0cat", "the\tcat", "the\u2028cat", "the\u3000cat", " the  cat\x85"]
    source = [write_lines(tmp_path / "en", (f"{odd[i % 5]} {i}" for i in range(60))),
              write_lines(tmp_path / "de", (f"die\u00a0Katze\u2028{i}\t" for i in range(60)))]
    folder = prepare("parallel", str(tmp_path / "data"), source=",".join(source), vocab_size=270)
    assert {re.sub(r"\d+", "N", row) for row in rows_of(folder, "train.src")} == {"the cat N"}
    assert {re.sub(r"\d+", "N", row) for row in rows_of(folder, "train.tgt")} == {"die Katze N"}
    asked = [row.strip().replace("the", "one").replace("cat", "hundred") + " 7" for row in ["the cat", *odd]]
    write_lines(tmp_path / "in", asked)
    ask = ("--out_dir=whole", "--max_new_tokens=8", "--device=cpu")
    run("sample.py", *ask, f"--input={tmp_path}/in", f"--output={tmp_path}/out", cwd=work)
    first, *others = (tmp_path / "out").read_text(encoding="utf-8").split("\n")[:-1]
    assert others == [first] * 5
    for line in ("one hundred 7", "one\u00a0hundred\u30007", "\tone\u2028hundred\n7"):
        assert run("sample.py", *ask, f"--start={line}", cwd=work) == first + "\n"

@each("run_of", [" ", "\u3000", "x", "7", "\n", "\u0301"])
def test_long_runs_do_not_reach_the_tokenizer(run_of):
    # catches: a library that panics at a million blanks, in training a BPE or in using it
    text = "a cat" + run_of * 1_000_000 + "sat"
    tok = Tokenizer(prepare_data.train_bpe([["the cat sat", text]], 270))
    assert tok.decode(tok.encode(text)) == text and max(map(len, prepare_data.pieces(text))) == 50_000

def test_bleu_counts_the_words_of_its_script(tmp_path):
    # catches: a line of Japanese taken for one word, so that a nearly perfect translation scores 0
    import sacrebleu
    assert prepare_data.bleu_tokenizer(["สวัสดีชาวโลก{}ฉันรักแมว"]) == "char"
    source = write_lines(tmp_path / "a", (f"row {i}" for i in range(100)))
    for want, line in (("13a", "Der Hund {} läuft im Park, 猫."), ("zh", "第{}个人在公园里跑步。"),
                       ("char", "これは{}番目の文です。猫が好き")):
        rows = [line.format(i) for i in range(100)]
        both = f"{source},{write_lines(tmp_path / 'b', rows)}"
        folder = prepare("parallel", str(tmp_path / "data"), source=both, vocab_size=300, force=True)
        assert load_meta(folder)["bleu_tokenizer"] == want
        good = [row.replace("猫", "犬").replace("第", "等") for row in rows]
        assert sacrebleu.metrics.BLEU(tokenize=want).corpus_score(good, [rows]).score > 60
    said = run("train.py", *TINY, "--dataset=parallel", "--mixer=haar", "--max_iters=1", cwd=tmp_path)
    assert "|tok:char|" in said

def test_no_row_of_test_is_trained_on(tmp_path):
    # catches: rows on both sides of a split, unsaid; one test row of 150 pairs; a score on few rows, unsaid
    rows = [f"sentence {i % 300}" for i in range(900)]
    pair = ",".join((write_lines(tmp_path / "a", rows),
                     write_lines(tmp_path / "b", (f"Satz {i}" for i in range(900)))))
    table = (json.dumps(dict(text=row, label=i % 2)) for i, row in enumerate(rows))
    for name, source in (("parallel", pair), ("table", write_lines(tmp_path / "c", table))):
        said = run("prepare_data.py", f"--dataset={name}", f"--source={source}", cwd=tmp_path)
        stems = ("train.src", "val.src", "test.src")
        train, val, test = (rows_of(tmp_path / "data" / name, stem) for stem in stems)
        assert [len(train), len(val), len(test)] == [720, 30, 30] and len({*val, *test}) == 60
        assert not {*train} & {*val, *test} and "test has only 30 rows" in said
        assert "120 rows train: same source as a row of val or test, left out" in said
    assert 259 < load_meta(tmp_path / "data" / "parallel")["vocab_size"] < 280  # few letters teach few ids
    for more, words in ((dict(), "too few to train on"), (dict(held_out=5), "--held_out is for")):
        with refusal(words):
            prepare("parallel", str(tmp_path / "six"), source=",".join([pair] * 3), **more)
    folder = prepare("parallel", str(tmp_path / "more"), source=pair, held_out=100)
    assert counts(folder, "test") == [100]

def test_no_line_of_test_is_trained_on(tmp_path):
    whole = [f"a line of text, the {i}th of all" if i % 2 else "KING:" for i in range(2000)]
    source = write_lines(tmp_path / "t", whole + whole[-20:] + whole[:80])
    folder = prepare("text", str(tmp_path / "data"), source=source, tokenizer="bytes")
    train, val, test = (text_of(folder, split).split("\n") for split in ("train", "val", "test"))
    assert not {line for line in train if len(line) >= 20} & {*val, *test} and train.count("KING:") > 900
    assert load_meta(folder)["skipped"] == {"train: lines that stand in val or test, left out": 40}

def text_of(folder, split):
    return BYTES.decode(np.fromfile(os.path.join(folder, f"{split}.bin"), BYTES.dtype))

def test_twins_that_look_alike(tmp_path):
    # catches: a row of test that train has with another blank, another accent, an invisible mark
    alike = [("caf\u00e9 {}", "cafe\u0301 {}"), ("a cafe {}", " a\u00a0 cafe\t{}\u3000"),
             ("cafe {}", "ca\u200bfe\u00ad {}")]
    targets = write_lines(tmp_path / "b", (f"Satz {i}" for i in range(200)))
    for n, pair in enumerate(alike):
        source = write_lines(tmp_path / "a", (form.format(i) for form in pair for i in range(100)))
        folder = prepare("parallel", str(tmp_path / str(n)), source=f"{source},{targets}")
        assert counts(folder) == [160, 10, 10]
        left_out = {"train: same source as a row of val or test, left out": 20}
        assert load_meta(folder)["skipped"] == left_out
    rows = [f"this is a line of text, the {i}th" for i in range(2000)]
    for n, change in enumerate((("\n", "\r\n"), ("\n", "\u2028"), (" ", "\u00a0"), ("this", "\ufeffthis"))):
        twins = "\n".join(rows[:300] + [" " * 30]).replace(*change)
        (tmp_path / "t").write_bytes(("\n\n".join(rows) + "\n" + twins).encode("utf-8"))
        folder = prepare("text", str(tmp_path / f"text{n}"), source=f"{tmp_path}/t", tokenizer="bytes")
        left_out = load_meta(folder)["skipped"]["train: lines that stand in val or test, left out"]
        assert 200 < left_out <= 300  # and the empty lines stay
    row = "\ufeffx\ud800\u0065\u0301\u00a0\u2028y"
    assert prepare_data.plain(row) == "x?\u00e9 y" == prepare_data.plain(prepare_data.plain(row))

@each("kind", ["csv", "tsv", "jsonl", "semicolons"])
def test_a_table_of_labelled_texts(tmp_path, kind, monkeypatch):
    # catches: a quotation mark that swallows rows, a number for a label's name
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    quote = {"csv": '"so, ', "semicolons": '"so; ', "tsv": '"so ', "jsonl": "so,\t"}[kind]
    words, names = ("dull ", "grand ", "fair "), ("bad film", "10", "9")
    rows = [(quote + words[i % 3] * 3 + str(i), names[i % 3], i) for i in range(400)]
    with open(tmp_path / "mine", "w", encoding="utf-8-sig", newline="") as f:
        if kind == "jsonl":
            f.writelines(json.dumps(dict(review=text, stars=label, n=n)) + "\n" for text, label, n in rows)
        elif kind == "tsv":  # as many are: a quotation mark is a mark
            f.write("review\tstars\tn\n" + "".join(f"{text}\t{label}\t{n}\n" for text, label, n in rows))
        else:
            table = csv.writer(f, delimiter=";" if kind == "semicolons" else ",")
            table.writerows([("review", "stars", "n"), *rows, ("", "9", 0)])
    flags = "--dataset=table", "--source=mine", "--text=review", "--label=stars", "--held_out=60"
    run("prepare_data.py", *flags, cwd=tmp_path)
    folder = tmp_path / "data" / "table"
    assert load_meta(folder)["classes"] == ["bad film", "9", "10"] and counts(folder) == [280, 60, 60]
    if kind != "csv":
        return
    said = run("train.py", *LEARN, "--dataset=table", "--mixer=haar", cwd=tmp_path)
    assert "test accuracy 1.0" in said and "test AUC 1.0000, macro F1 1.0000" in said
    assert result_of(tmp_path / "out")["test"]["f1"] == 1
    for words, label in (("dull dull dull 5", "bad film"), ("fair\tfair fair 5", "9")):
        said = run("sample.py", f"--start=so, {words}", "--device=cpu", cwd=tmp_path)
        assert said.startswith(label + "\t")

def test_macro_f1_and_the_bag_of_words():
    # catches: a mean over rows, a class that is only guessed left out
    guess, answer = np.array([0, 0, 0, 2, 1]), np.array([0, 0, 1, 1, 1])
    assert abs(prepare_data.macro_f1(guess, answer) - (4 / 5 + 2 / 4 + 0) / 3) < 1e-12
    pytest.importorskip("sklearn")
    texts = [f"{('dull', 'grand')[i % 2]} {i}" for i in range(80)]
    splits = dict(train=(texts, np.arange(80) % 2), test=(texts[:20], np.arange(20) % 2))
    assert prepare_data.bag_of_words(splits)["test"] == 1

ROWS = [(f"row {i}", "ab"[i % 2]) for i in range(60)]

def as_csv(rows=ROWS, head="text,label", end="\n"):
    return end.join([head, *(f"{text},{label}" for text, label in rows)]) + end

def as_jsonl(**odd):
    return "\n".join(json.dumps({**dict(text=text, label=label), **odd}) for text, label in ROWS)

USED = {  # what a table may hold, and the classes that it has then
    "carriage returns": (as_csv(end="\r\n"), "a b"), "old ones": (as_csv(end="\r"), "a b"),
    "breaks": (as_csv([(f'"{text}\nand ""more"""', label) for text, label in ROWS]), "a b"),
    "blanks": (as_csv([(f"row {i}", (" a", "a\u00a0", "b", "\ufeffb")[i % 4]) for i in range(60)]), "a b"),
    "accents": (as_csv([(f"row {i}", ("\u00e9", "e\u0301", "b")[i % 3]) for i in range(60)]), "b \u00e9"),
    "names": (as_csv(head=" text , label "), "a b"), "empty lines": ("\n\n" + as_csv(end="\n\n"), "a b"),
    "numbers": ("".join(f'{{"text": {i}, "label": {(1, 1.0, 2)[i % 3]}}}\n' for i in range(60)), "1 2"),
    "first lines": ("\n\n" + as_jsonl(), "a b"),
    "surrogates": (as_jsonl().replace("row", "row \\ud800"), "a b"),
    "zeros": (as_csv().replace("row", "row \0"), "a b")}

@each("kind", USED)
def test_strange_tables(tmp_path, kind):
    # catches: a traceback of the json module, one label that becomes two
    content, classes = USED[kind]
    (tmp_path / "t").write_bytes(content.encode("utf-8"))
    folder = prepare("table", str(tmp_path / "data"), source=str(tmp_path / "t"))
    assert load_meta(folder)["classes"] == classes.split() and counts(folder, "train") == [48]

REFUSED = (
    ("", "is empty"), ("text,mark\nx,1\n", "no label in its rows"), ("text,label\n", "no text in its rows"),
    (as_csv() + "x\n", "row 61 has more or fewer"), (as_csv() + "x,a,b\n", "row 61 has more or fewer"),
    (as_csv() + '"x,a\n', "row 61 cannot be read"), (as_jsonl() + '\n{"text": \n', "row 61 cannot be read"),
    (as_jsonl() + "\n[1]\n", "row 61 cannot be read"),
    (as_jsonl() + "\n" + "[" * 100_000, "row 61 cannot be read"),
    (as_csv([(text, "a") for text, _ in ROWS]), "1 different labels"),
    (as_csv([(text, i / 7) for i, (text, _) in enumerate(ROWS)]), "right column"),
    (as_csv(ROWS[:2]), "too few to train on"),
    (as_csv([("", label) for _, label in ROWS]), "no text in its rows"),
    (as_jsonl(label=math.nan), "no label in its rows"), ("[" + as_jsonl() + "]", "row 1 cannot be read"))

def test_tables_that_cannot_be_used_are_one_line(tmp_path):
    # catches: a traceback of the csv module, a column of numbers taken for labels, a row that lost a field
    data, path = str(tmp_path / "data"), tmp_path / "t.csv"
    for content, words in REFUSED:
        path.write_text(content)
        with refusal(words) as said:
            prepare("table", data, source=str(path))
        assert len(str(said.value).splitlines()) == 1
    for source, words in ((f"{path},", "no file ''"), ("", "no file ''"), (str(tmp_path), "directory")):
        with refusal(words):
            prepare("table", data, source=source)
    path.write_text(as_csv())
    with refusal("lower --held_out"):
        prepare("table", data, source=str(path), held_out=1000)
    (tmp_path / "v.csv").write_text("text,label\nnew,c\n")
    said = run("prepare_data.py", "--dataset=table", "--source=t.csv,v.csv", cwd=tmp_path)
    assert "train has no row of the labels c" in said and os.listdir(data) == ["table"]

def test_two_preparations_of_one_data_set(tmp_path):
    # catches: a half-written folder deleted by the second, a lock that a kill or a forked child leaves held
    data, flags = tmp_path / "data", ["--dataset=pathfinder", "--rows=3000"]
    first = start("prepare_data.py", *flags, cwd=tmp_path)
    until((data / "pathfinder.tmp-new").exists, first)
    second = start("prepare_data.py", *flags, "--force", cwd=tmp_path)
    third = start("prepare_data.py", *flags, cwd=tmp_path)
    for p in (first, second, third):
        out, err = p.communicate(timeout=170)
        assert p.returncode == 0, err
        assert p == first or "waiting for it" in out
    assert os.listdir(data) == ["pathfinder"] and load_meta(data / "pathfinder")
    killed = start("prepare_data.py", *flags, "--force", cwd=tmp_path)
    until((data / "pathfinder.tmp-new").exists, killed)
    time.sleep(0.5)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=30)
    assert "is there already" in run("prepare_data.py", *flags, cwd=tmp_path)
    assert os.listdir(data) == ["pathfinder"]

def test_a_data_set_with_a_name_of_its_own(tmp_path):
    # catches: a second corpus that replaces the first, a name that hides another data set
    write_lines(tmp_path / "t", (f"sentence number {i}, and more of it" for i in range(400)))
    flags = ["--dataset=text", "--source=t", "--tokenizer=bytes"]
    said = run("prepare_data.py", *flags, "--name=mine", cwd=tmp_path)
    assert "next: python train.py --dataset=mine\n" in said and os.listdir(tmp_path / "data") == ["mine"]
    assert "is there already" in run("prepare_data.py", *flags, "--name=mine", cwd=tmp_path)
    train = [*TINY, "--mixer=haar", "--block_size=32", "--max_iters=1"]
    run("train.py", *train, "--dataset=mine", cwd=tmp_path)
    said = run("prepare_data.py", "--dataset=recall", "--name=mine", cwd=tmp_path, code=1)
    assert "data/mine was made with --dataset=text: --force replaces it" in said
    for name in ("imdb", "a/b", "..", "a b", "-", "x.y"):
        said = run("prepare_data.py", *flags, f"--name={name}", cwd=tmp_path, code=2)
        assert "--name=" in said and said.count("\n") == 1
    said = run("train.py", *train, "--dataset=yours", "--out_dir=o", cwd=tmp_path, code=1)
    assert "unknown data set yours" in said and "prepare_data.py --dataset=... --name=yours" in said
    shutil.copy(tmp_path / "t", tmp_path / "data" / "mine" / "my.txt")
    (tmp_path / "data" / "bad").mkdir()
    (tmp_path / "data" / "bad" / "meta.json").write_text("[]")
    assert "rows" in run("prepare_data.py", *flags, "--name=bad", "--force", cwd=tmp_path)
    said = run("prepare_data.py", *flags, "--name=mine", "--force", cwd=tmp_path, code=1)
    assert "holds my.txt, which would be lost" in said and "my.txt" in os.listdir(tmp_path / "data" / "mine")
    os.remove(tmp_path / "data" / "mine" / "train.bin")
    said = run("train.py", *train, "--dataset=mine", "--out_dir=o", cwd=tmp_path, code=1)
    assert "--dataset=... --name=mine" in said

def test_a_tokenizer_is_used_again(tmp_path):
    # catches: ids that mean something else in the second data set, another tokenizer that changes nothing
    a = write_lines(tmp_path / "a", (f"the cat number {i}" for i in range(100)))
    b = write_lines(tmp_path / "b", (f"die Katze Nummer {i}" for i in range(100)))
    c = write_lines(tmp_path / "c", (f"the cat, {i}, sat" for i in range(2000)))
    t = write_lines(tmp_path / "t", ["text,label", *(f"the cat {i},{'xy'[i % 2]}" for i in range(100))])
    data = str(tmp_path / "data")
    first = prepare("parallel", data, source=f"{a},{b}", vocab_size=280)
    spec = load_meta(first)["tokenizer"]
    again = prepare("parallel", data, name="again", source=f"{b},{a}", tokenizer_from=first)
    table = prepare("table", data, source=t, tokenizer_from=first)
    text = prepare("text", data, source=c, tokenizer_from=first)
    for folder in (again, table, text):
        assert load_meta(folder)["tokenizer"] == spec and spec["kind"] == "bpe"
    assert all(row.startswith("the cat ") for row in rows_of(table, "train.src"))
    other = prepare("numbers", data, rows=100)
    textless = prepare("recall", data, rows=50, n_pairs=2)
    for name, flags, words in (
            ("table", dict(source=t, tokenizer_from=other), "made with another tokenizer_from: --force"),
            ("parallel", dict(source=f"{a},{b}", tokenizer_from=first, vocab_size=280), "leave out"),
            ("text", dict(source=c, tokenizer_from=first, tokenizer="bytes"), "leave out"),
            ("lego", dict(tokenizer_from=first), "--tokenizer_from is no flag of lego"),
            ("text", dict(source=c, tokenizer_from=textless), "knows no text"),
            ("text", dict(source=c, tokenizer_from=f"{tmp_path}/none"), "none is no whole data")):
        with refusal(words):
            prepare(name, data, **flags)

def test_text_of_several_files(tmp_path):
    # catches: a file's last line glued to the next file's first, a benchmark's own split mixed or thinned
    def lines_of(name, n):
        return "\n".join(f"{name}, a line of text, the {i}th" for i in range(n))
    flags, data = dict(tokenizer="bytes"), str(tmp_path / "data")
    source, own = tmp_path / "s", tmp_path / "own"
    source.mkdir()
    own.mkdir()
    for name in ("c.txt", "a.txt", "b.txt", "notes.md"):
        (source / name).write_text(lines_of(name[0], 200))
    listed = f"{source}/b.txt,{source}/a.txt"
    for name, given, order in (("list", listed, "ba"), ("folder", str(source), "abc")):
        folder = prepare("text", data, name=name, source=given, **flags)
        whole = "\n".join(lines_of(name, 200) for name in order)
        assert "".join(text_of(folder, split) for split in ("train", "val", "test")) == whole
    with refusal("has no .*txt"):
        prepare("text", data, name="own", source=str(own), **flags)
    (own / "train.txt").write_text(lines_of("x", 300))
    with refusal("has only train of train, val and test.txt"):
        prepare("text", data, name="own", source=str(own), **flags)
    (own / "val.txt").write_text(lines_of("x", 40) + "\n" + lines_of("v", 40))
    (own / "test.txt").write_text(lines_of("t", 80))
    folder = prepare("text", data, name="own", source=str(own), **flags)
    for split in ("train", "val", "test"):
        assert text_of(folder, split) == (own / f"{split}.txt").read_text()
    (own / "test.txt").write_text(lines_of("u", 80))
    with refusal("another source"):
        prepare("text", data, name="own", source=str(own), **flags)

# -----------------------------------------------------------------------------
# bench.py

def test_speed_bench(tmp_path):
    # catches: a base that is left out, a run that overwrites the earlier ones, a crossover that is not sure,
    # two kinds of machines in one median
    import bench
    arm = "wersa, causal, m=128"
    flags = ["--lengths=64,256", f"--only={arm}", "--compile=False", "--prompt=300", "--json=s.json"]
    for _ in range(2):
        said = run("bench.py", "speed", *flags, cwd=tmp_path)
    runs = json.load(open(tmp_path / "s.json"))
    assert len(runs) == 2 and arm in said
    cells = {(c["arm"], c["T"], c["form"]): c for c in runs[0]["cells"]}
    for name in (arm, bench.CAUSAL):
        for T in (64, 256):
            assert (name, T, "eager") in cells
    for (name, T, form), c in cells.items():
        assert c["seconds"] > 0
        if name == arm and form == "eager":
            low, middle, high = c["ratio"]
            assert low <= middle <= high
    _, both = bench.merged(runs)
    slow = copy.deepcopy(runs)
    for c in slow[0]["cells"]:
        c["ratio"] = [0.1, 0.2, 0.3]
    assert bench.crossover(bench.merged(slow)[1], arm, "eager").startswith("not up to")
    assert len(both) == len(cells)
    elsewhere = copy.deepcopy(runs[0])
    elsewhere["card"]["name"] = "another"
    assert bench.by_machine([elsewhere, *runs]) == [runs, [elsewhere]]

def test_fast_forward_is_the_state_at_that_position():
    # catches: a decode timing at position 0 that claims to be one at 65,536
    import bench
    for text in ("attention", "haar", "wersa", "wavspa levels=1"):
        m = build_mixer(config(text, n_embd=8, n_head=2, block_size=64), causal=True)
        with torch.no_grad():
            real = chunked(m, rand(1, 40, 8), cuts=(40,))[1]
            ahead = bench.fast_forward(m.init_state(1), 40)
            m(rand(1, 1, 8), state=ahead)
        for a, b in zip(tree_leaves(real), tree_leaves(ahead), strict=True):
            assert a == b if isinstance(a, int) else a.shape == b.shape

def test_flags_of_the_bench_belong_to_a_command(tmp_path):
    # catches: a flag that is taken and does nothing, an arm of one's own that is not trained as it says
    wrong = [
        ("report", "--suite=numbers", "--suite is no flag of report"),
        ("variants", "--only=haar", "--only is no flag of variants"),
        ("quality", "--lengths=64", "--lengths is no flag of quality")]
    for command, flag, words in wrong:
        assert words in run("bench.py", command, flag, cwd=tmp_path, code=2)
    assert "label: --flag=value" in run("bench.py", "quality", "--arm=haar", cwd=tmp_path, code=1)
    copied(tmp_path)  # whose results are its own
    mine = "--arm=tiny: --mixer=haar --levels=2 --n_embd=8 --max_iters=2"
    command = [sys.executable, "bench.py", "quality", "--suite=smoke", "--only=tiny", mine]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    import bench
    row, = bench.read_rows(tmp_path / "results" / "smoke.csv")
    assert row["arm"] == "tiny" and "--levels=2" in row["flags"] and row["steps"] == "2"

def test_peers_of_the_transforms(tmp_path, capsys):
    # catches: a peer that is timed at something else, a library that must be there
    import bench
    fields = dict(arch="decoder", n_embd=8, levels=4, block_size=64)
    ours, theirs = (kind(ModelConfig(**fields), True) for kind in (bench.Multires, bench.Dilated))
    theirs.load_state_dict(ours.state_dict())
    close(theirs(rand(2, 50, 8)), ours(rand(2, 50, 8)), 1e-6)
    bench.transforms(argparse.Namespace(lengths=[64], json=str(tmp_path / "t.json")))
    (run,) = json.load(open(tmp_path / "t.json"))
    assert [row["ms"] for row in run["rows"]] == ["haar, 64", "db2, 64", "db8, 64"]
    assert "| haar, 64 |" in capsys.readouterr().out
    assert bench.installed("no_such_library") is None

def test_what_a_gpu_is_wanted_for(tmp_path, monkeypatch, capsys):
    # catches: a flag that its command has not, a piece that is done again, a failed one that counts as done
    import bench
    for command in bench.GPU.values():
        script, what, *flags = command.split()
        if script == "bench.py":
            for flag in [*flags, "--json="]:
                assert flag[2:].partition("=")[0] in bench.FLAGS[what].split(), command
    pieces = dict(one="bench.py steps --lengths=32", bad="bench.py steps --prompt=3")
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "GPU", pieces)
    args = argparse.Namespace(only=None, nanogpt=None)
    bench.gpu(args)
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-one.json"]
    table = bench.run_table(tmp_path / "gpu-one.json")
    assert "block_size 32" in table and "| mixer=wersa |" in table
    bench.gpu(args)
    assert capsys.readouterr().out.count("gpu-bad.json") == 2
    assert len(json.load(open(tmp_path / "gpu-one.json"))) == 1

def test_variants_take_up_every_mixer(tmp_path):
    # catches: a mixer of the reader's own that bench does not see, a leak that it does not count
    lines = "import torch, torch.nn as nn, model", inspect.getsource(Mean), "model.MIXERS['mean'] = Mean"
    (tmp_path / "mine.py").write_text("\n".join(lines))
    said = run("bench.py", "variants", "--mixers_from=mine.py", cwd=tmp_path)
    rows = [line for line in said.splitlines() if line.startswith("| mixer=")]
    for row in rows:  # leak, chunks, pads, half precision
        leak, chunks, pads, half = map(float, row.split("|")[3:7])
        assert "paper's" in row or leak == 0 and chunks < 1e-5 and pads < 1e-5 and half < 0.03, row
    assert any(line.startswith("| mixer=mean ") for line in rows) and len(rows) > 25
    flags = [*TINY, "--mixer=mean,attention", "--n_layer=2", "--mixers_from=mine.py", "--out_dir=own",
             "--max_iters=2"]
    prepare_data.prepare("numbers", str(tmp_path / "data"), rows=200)
    run("train.py", *flags, cwd=tmp_path)

@each("name", ["conv", "lazy", "random", "shortconv", "multires", "softmax"])
def test_controls_keep_the_promises(name):
    # catches: a control that leaks, or that is not what it says, so that nothing is controlled
    import bench  # noqa: F401, it registers them
    test_no_leak(name)
    test_chunks(name)
    m, x, mask = mixer(name, False), rand(2, 33, 16), mask_of(33, 33, 20)
    y = m(x, mask)
    close(m(F.pad(x, (0, 0, 0, 9)), F.pad(mask, (0, 9)))[:, :33][mask], y[mask])
    close(m(x[1:, :20])[0], y[1, :20])
    y.sum().backward()
    assert all(p.grad is not None for p in m.parameters())

def copied(folder):
    for name in ("bench.py", "model.py", "prepare_data.py", "sample.py", "train.py", "README.md"):
        shutil.copy(os.path.join(HERE, name), folder)

def test_the_tables_come_from_the_csv(tmp_path):
    # catches: a table that no longer says what was measured
    copied(tmp_path)
    no_figures = shutil.ignore_patterns("*.png")
    shutil.copytree(os.path.join(HERE, "results"), tmp_path / "results", ignore=no_figures)
    p = subprocess.run([sys.executable, "bench.py", "report"], cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode == 0 and "Traceback" not in p.stderr, p.stderr
    for name in ("README.md", os.path.join("results", "README.md")):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert text == open(os.path.join(HERE, name), encoding="utf-8").read(), name
        for image in re.findall(r"\((?:results/)?([\w/]+\.png)\)", text):
            assert os.path.exists(os.path.join(HERE, "results", image)), image
    # and by hand, for one of them
    rows = list(csv.DictReader(open(os.path.join(HERE, "results", "decoders.csv"))))
    score = [float(r["test_metric"]) for r in rows if r["arm"] == "attention"]
    assert f"| attention | 832,784 | {np.mean(score):.3f} ± {np.std(score, ddof=1):.3f} |" in text

MINIATURE = """
import argparse, bench
s = bench.SUITES['smoke']
s['arms'] = {'recall: haar': s['arms']['recall: haar']}
s['prepare']['recall']['rows'] = 400
s.update(seeds=(1, 2), rates=(2e-3, 0.0))
s['base'] += ['--max_iters=4', '--eval_interval=2', '--eval_rows=2', '--metric_rows=1']
bench.quality(argparse.Namespace(
    suite='smoke', data_dir='data', source=None, translate=None, jobs=1, only='haar', arm=None))
"""

def test_a_suite_appends_rows_and_skips_them(tmp_path):
    # catches: a finished run trained again, an interrupted one begun again, a row that lacks its flags, a
    # rate chosen on the test set, by seeds that not all rates saw or by a row without a loss
    copied(tmp_path)
    (tmp_path / "miniature.py").write_text(MINIATURE)

    def begin():
        return subprocess.Popen([sys.executable, "miniature.py"], cwd=tmp_path, text=True,
                                stdout=subprocess.PIPE, start_new_session=True)
    first = begin()
    runs = tmp_path / "data" / "runs" / "smoke"
    while not list(runs.glob("*/ckpt.pt")) and first.poll() is None:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGINT)
    assert first.wait() and not (tmp_path / "results").exists()
    assert len(list(runs.iterdir())) == 1  # none has begun after it
    said = [begin().communicate()[0] for _ in range(2)]
    assert re.findall(r"(\d of \d) runs", said[0]) == ["2 of 2", "1 of 1"], said
    assert re.findall(r"(\d of \d) runs", said[1]) == ["0 of 2", "0 of 1"], said
    assert not list(runs.iterdir())  # a run that begins anew moves the earlier one aside
    rows = list(csv.DictReader(open(tmp_path / "results" / "smoke.csv")))
    assert [(r["seed"], r["learning_rate"]) for r in rows] == [("1", "0.002"), ("1", "0.0"), ("2", "0.002")]
    assert all("--mixer=haar" in r["flags"] and float(r["val_loss"]) > 0 and r["machine"] for r in rows)
    import bench
    lines = """arm,seed,learning_rate,val_loss,test_metric
        a,1,1,2.0,0.9; a,1,2,1.0,0.5; a,2,2,9.0,0.4
        b,1,1,,0.9; b,2,1,3.0,0.8; b,1,2,2.0,0.5
        c,1,1,,0.9; c,1,2,2.0,0.5
        d,1,1,nan,0.9; d,1,2,2.0,0.5"""
    (tmp_path / "x.csv").write_text(re.sub(r"[;\n] *", "\n", lines))
    best = bench.arms_of(tmp_path / "x.csv")
    assert [r["test_metric"] for r in best["a"]] == ["0.5", "0.4"]
    for arm in "bcd":
        assert [r["test_metric"] for r in best[arm]] == ["0.5"]
    table = (tmp_path / "results" / "smoke.csv").read_text()
    (tmp_path / "results" / "smoke.csv").write_text(table.replace(f",{rows[0]['data_tokens']},", ",7,"))
    other = subprocess.run([sys.executable, "miniature.py"], cwd=tmp_path, capture_output=True, text=True)
    assert other.returncode and "has rows of another recall, of 7 training tokens" in other.stderr

def test_translations_of_a_suite_are_kept(work, tmp_path, monkeypatch):
    # catches: translations of a rate that val did not choose, of other weights or of another file
    import bench
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    out = tmp_path / "run"
    shutil.copytree(os.path.join(work, "whole"), out)
    (out / "test.hyp.txt").write_text("eins\n")
    (tmp_path / "new.en").write_text("twenty-one\nfive\n")
    (tmp_path / "other.txt").write_text("one\n")
    args = argparse.Namespace(suite="mini", translate=str(tmp_path))
    row = dict(arm="a, b", seed=1, val_loss=2.0, flags="--beam=2")
    bench.keep_translations(args, out, row)
    model, tokenizer, _ = load_model(str(out / "best.pt"))
    new = (tmp_path / "unseen" / "mini-a-b-1.new.de").read_text()
    assert new.split("\n")[:-1] == translate(model, tokenizer, ["twenty-one", "five"], 2)[0]
    assert len(list((tmp_path / "unseen").iterdir())) == 1
    kept = tmp_path / "hyp" / "mini-a-b-1.test.de.gz"
    assert gzip.decompress(kept.read_bytes()) == b"eins\n"
    (tmp_path / "mini.csv").write_text('arm,seed,val_loss\n"a, b",1,2.0\n')
    (out / "test.hyp.txt").write_text("zwei\n")
    bench.keep_translations(args, out, dict(row, val_loss=3.0))
    assert gzip.decompress(kept.read_bytes()) == b"eins\n"
    bench.keep_translations(args, out, dict(row, val_loss=1.0))
    assert gzip.decompress(kept.read_bytes()) == b"zwei\n"

def test_arms_are_matched():
    # catches: an arm that is larger than what it is compared with, a flag that train.py does not take
    import bench
    for path in glob.glob(os.path.join(HERE, "results", "*.csv")):
        rows = list(csv.DictReader(open(path)))
        base = [int(r["params"]) for r in rows if r["arm"] == "attention"]
        if not path.endswith("numbers.csv"):
            assert all(abs(int(r["params"]) / base[0] - 1) < 0.1 for r in rows), path
    flags = set(re.findall(r"--\w+", run("train.py", "--help", cwd=HERE)))
    for suite in bench.SUITES.values():
        for arm in suite["arms"].values():
            words = [*suite["base"], *arm]
            assert {w.split("=")[0] for w in words} <= flags, words
            bench.config_of(words, arch="encoder", block_size=2048)

def test_curves_of_several_runs(tmp_path, monkeypatch):
    # catches: a folder without a log that is drawn as nothing, a command that takes no folders
    import bench
    drawn = []
    monkeypatch.setattr(bench, "draw_curves", lambda *given: drawn.append(given))
    for name in ("out-a", "out-b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.csv").write_text("step,loss\n0,1.0\n")
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(folders=["out-a", "out-b"], png="c.png")
    bench.curves(args)
    assert drawn == [(["out-a", "out-b"], "c.png")]
    for folders, words in ((["out-a", "out-c"], "out-c has no log.csv"), (None, "say which runs")):
        with pytest.raises(SystemExit, match=words):
            bench.curves(argparse.Namespace(folders=folders, png="c.png"))
    assert "out-c has no log.csv" in run("bench.py", "curves", "out-a", "out-c", cwd=tmp_path, code=1)
    assert "--png is no flag of report" in run("bench.py", "report", "--png=c.png", cwd=tmp_path, code=2)
    assert "--folders is no flag of report" in run("bench.py", "report", "out-a", cwd=tmp_path, code=2)

# -----------------------------------------------------------------------------
# README

def test_readme_commands_parse_and_the_snippet_runs():
    # catches: a renamed flag, a snippet that has gone stale
    readme = open(os.path.join(HERE, "README.md"), encoding="utf-8").read()
    script = r"(?:python|torchrun .*?) ((?:train|sample|prepare_data|bench)\.py[^#`\n]*)"
    commands = re.findall(script, readme)
    assert len(commands) >= 6
    flags = {}
    for script in ("train.py", "sample.py", "prepare_data.py", "bench.py"):
        text = run(script, "--help", cwd=HERE)
        flags[script] = set(re.findall(r"--\w+", text))
        assert max(map(len, text.splitlines())) <= 80
    for command in commands:
        script, *words = shlex.split(command)
        for word in words:
            assert not word.startswith("--") or word.split("=")[0] in flags[script], command
    assert len(readme.splitlines()) <= 220 and len(readme.encode()) <= 16_000
    mixers = dict(M.MIXERS)
    try:
        for snippet in re.findall(r"```python\n(.*?)```", readme, re.S):  # in your own model; adding a mixer
            exec(compile(snippet, "README.md", "exec"), {})
        test_no_leak("mean")
        test_chunks("mean")
    finally:
        M.MIXERS.clear()
        M.MIXERS.update(mixers)

# python test_model.py 20 > results/faults.md; python test_model.py 20 data: only faults with that word
if __name__ == "__main__":
    times, *words = sys.argv[1:]
    print("| fault | tries | lost |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make_work(folder)
        for name, fault in FAULTS.items():
            if not words or any(word in name for word in words):
                tries = math.ceil(int(times) * OFTEN.get(name, 1))
                tried, lost = fault(folder, np.random.default_rng(0), tries)
                print(f"| {name} | {tried:,} | {lost} |", flush=True)
