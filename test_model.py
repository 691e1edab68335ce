"""
The promises of model.py, each held against something slow and obvious: PyWavelets, dense matrices, loops over t, the papers'
formulas, finite differences; then the scripts as a user runs them. python -m pytest -q runs all of it, -n 2 in two processes,
-k wersa a part. PyWavelets and hypothesis are wanted by a few tests, which are skipped without them. The comment at a test's
head names wrong versions it catches. python test_model.py 20 prints the table of faults.
"""

import contextlib
import copy
import csv
import glob
import hashlib
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

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import model as M
import prepare_data
import sample
from model import ModelConfig, WaveletTransformer, Wavelet, build_cross, build_mixer, daubechies, dwt, idwt
from prepare_data import Tokenizer, de, en
from sample import load_checkpoint, load_model, translate

torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))
each = pytest.mark.parametrize
BOTH = (True, False)  # causal, bidirectional
PREFIXES = (1, 2, 3, 7, 8, 15, 16, 31, 33, 63)

# every mixer with every value of every flag that it reads, two names: the flags over something tiny
VARIANTS = """
haar
haar gate=0 levels=3
haar levels=0
haar wavelet=db2 levels=3
haar wavelet=db4 levels=2 wavelet_params=fixed gate=0
haar wavelet_params=ada undecimated=yes
haar wavelet_params=ortho wavelet=db2 levels=3 undecimated=decoder
haar wavelet_params=lift undecimated=decoder
haar undecimated=no
haar undecimated=no wavelet=db2 wavelet_params=free levels=3 gate=0
haar undecimated=no levels=0
wavspa
wavspa gate=0 levels=2 undecimated=yes
wavspa levels=0
wavspa wavelet=db2 levels=3 inner=wersa undecimated=yes
wavspa wavelet=db4 wavelet_params=fixed levels=2 undecimated=decoder
wavspa wavelet_params=ada wavspa_shared=0 levels=2 wavelet=db2
wavspa wavelet_params=free levels=2
wavspa wavelet_params=lift inner=wersa levels=3 wavspa_shared=0 feature_map=exp pos=none
wavspa levels=2 window=5
wavspa undecimated=no levels=4
wavspa inner=fourier
wersa
wersa gate=0 n_features=7
wersa levels=0
wersa levels=3 pos=none wavelet=db2 undecimated=yes
wersa wavelet=db4 wavelet_params=ada gate=0
wersa wavelet_params=free undecimated=decoder levels=3
wersa wavelet_params=ortho wavelet=db2 feature_map=exp
wersa wavelet_params=lift levels=3 undecimated=yes
wersa feature_map=exp levels=3
wersa undecimated=no
attention
attention gate=0 pos=none
attention window=7
fourier
fourier gate=0
""".strip().splitlines()
# a mixer that you have added to MIXERS is tested like ours
VARIANTS += [name for name in M.MIXERS if name not in {v.split()[0] for v in VARIANTS}]
CAUSAL = [v for v in VARIANTS if "fourier" not in v and "undecimated=no" not in v]
FORMS = [(v, False) for v in VARIANTS] + [(v, True) for v in CAUSAL]

READERS = """
cross=attention
cross=attention pos=none
cross=wersa
cross=wersa feature_map=exp cross_ratio=0.5
cross=aligned levels=2
cross=aligned cross_ratio=1.5
cross=place cross_ratio=0.5 levels=2
""".strip().splitlines()

MIXED = """
attention
attention window=7
haar
haar undecimated=decoder wavelet=db2 levels=3
haar pos=learned
wavspa levels=2
wavspa wavelet_params=lift inner=wersa wavspa_shared=0
wersa
wersa feature_map=exp pos=none
haar,attention
haar,haar,attention n_layer=3
wersa,attention window=7 gate=0
""".strip().splitlines()

def config(text="", **kw):
    """config("wersa levels=2", n_embd=8): the flags in text, overruled by the keywords, over something tiny."""
    cfg = dict(arch="encoder", vocab_size=13, block_size=64, n_head=2, n_embd=16)
    for word in text.split():
        key, _, value = word.rpartition("=")
        key = key or "mixer"
        kind = type(getattr(ModelConfig, key))
        cfg[key] = value if kind is str else kind(float(value))
    return ModelConfig(**{**cfg, **kw})

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

def continued(m, x, *cuts):
    """x in pieces of these lengths, each going on where the last one stopped -> y, the last state."""
    ys = []
    state = m.init_state(x.size(0), x.device, x.dtype)
    for part in x.split(cuts, 1):
        y, state = m(part, state=state)
        ys.append(y)
    return torch.cat(ys, 1), state

def any_cut(T, seed):
    """A random cut of T tokens into pieces of at least one."""
    rng = np.random.default_rng(seed)
    ends = sorted(rng.choice(range(1, T), min(T - 1, 6), replace=False).tolist()) if T > 1 else []
    return np.diff([0, *ends, T]).tolist()

def close(a, b, tol=1e-5):
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    error = ((a - b).abs().max() / b.abs().max().clamp(min=1)).item() if a.numel() else 0
    assert error <= tol, f"off by {error:.2e}, allowed {tol:.0e}"

def grads_of(y, w, *inputs):
    return torch.autograd.grad((y * w).sum(), inputs)

SOURCE = tokens(2, 30, seed=0) * mask_of(30, 30, 11)

@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    """wersa walks T in small steps here, so that a short sequence has several; monkeypatch.undo() for the real ones."""
    monkeypatch.setattr(M, "SEGMENT", 8)
    monkeypatch.setattr(M, "CHUNK", 4)

# -----------------------------------------------------------------------------
# every mixer: the promises

def leaks(f, x):
    """The prefixes t at which f(x)[:, :t] notices x[:, t:]: t if by a bit of its value, -t if by a gradient."""
    y = f(x.requires_grad_())
    found = set()
    for t in PREFIXES:
        dx, = torch.autograd.grad((y * torch.randn_like(y))[:, :t].sum(), x, retain_graph=True)
        assert t < 3 or dx[:, :t].any()
        if dx[:, t:].any():
            found.add(-t)
        if not torch.equal(f(loud(x, t))[:, :t], y[:, :t]):
            found.add(t)
    return found

@each("text", CAUSAL)
def test_no_leak(text):
    # catches: block means in a decoder, a maximum over T, a coefficient read a token early, a chunk that sees its own end
    m = mixer(text)
    assert leaks(m, rand(2, 65, 16)) == set()
    assert leaks(lambda x: continued(m, x, 20, 1, 44)[0], rand(2, 65, 16)) == set()

def test_leaks_are_caught():
    # catches: a leak checker that finds nothing; a literal haar that does not leak would be no literal one
    everywhere = {s * t for t in PREFIXES for s in (1, -1)}
    literal = mixer("haar undecimated=no")
    assert leaks(literal, rand(2, 65, 16)) == everywhere
    close(continued(literal, rand(2, 64, 16), 64)[0], literal(rand(2, 64, 16)))
    m = mixer("wersa undecimated=yes", False)
    assert leaks(m, rand(2, 65, 16)) == everywhere

@each("text", CAUSAL)
def test_any_cut_equals_the_whole(text):
    # catches: a state that is changed in place, positions off by one, a cache cut short, a chunk shorter than the filters
    m = mixer(text)
    x = rand(2, 65, 16)
    with torch.no_grad():
        whole = m(x)
        for cuts in ([65], [1] * 65, [3] * 21 + [2], [64, 1], [1, 64], any_cut(65, 0), any_cut(65, 1)):
            close(continued(m, x, *cuts)[0], whole)
        # try another future, then go back: neither the old state nor what was said may change
        said, state = continued(m, x[:, :20], 13, 7)
        before = copy.deepcopy((said, state))
        first, _ = m(x[:, 20:], state=state)
        m(1e4 * rand(2, 9, 16), state=m(1e4 * rand(2, 1, 16), state=state)[1])
        again, _ = m(x[:, 20:], state=state)
        assert torch.equal(first, again)
        for a, b in zip(tree_leaves((said, state)), tree_leaves(before)):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        close(first, whole[:, 20:])
    # gradients go through the state
    w = rand(2, 65, 16, seed=2)
    x.requires_grad_()
    inputs = [x, *(p for p in m.parameters() if p.numel())]
    parts = grads_of(continued(m, x, 9, 1, 30, 25)[0], w, *inputs)
    for a, b in zip(parts, grads_of(m(x), w, *inputs)):
        close(a, b, 1e-4)

@each("text", ["haar", "haar wavelet=db2 levels=5", "wersa", "wersa feature_map=exp", "wavspa", "attention", "attention window=9"])
@torch.no_grad()
def test_long_chunks(text, monkeypatch):  # catches: what goes wrong only from the second real segment on
    monkeypatch.undo()
    m = mixer(text, block_size=2048)
    x = rand(1, 2500, 16)
    close(continued(m, x, 1030, 1, 1469)[0], m(x))

@each("text", [v for v in CAUSAL if v.startswith(("haar", "wersa")) or "inner=wersa" in v or "window" in v])
@torch.no_grad()
def test_state_does_not_grow(text):  # catches: a history kept, a view that keeps all of x alive
    m = mixer(text)
    x = rand(2, 129, 16)

    def size(T):
        leaves = [u for u in tree_leaves(continued(m, x[:, :T], T - 1, 1)[1]) if torch.is_tensor(u)]
        return sum(u.numel() for u in leaves), sum(u.untyped_storage().nbytes() for u in leaves)
    assert size(20) == size(65) == size(129)

@each("text,causal", FORMS)
def test_masks(text, causal):
    # catches: means over padding, a wrap into padding, masked keys that weigh, the NaN of a softmax over nothing
    n = [65, 40, 33, 1]
    m = mixer(text, causal)
    x = rand(4, 65, 16)
    mask = mask_of(65, *n)
    holes = mask & (rand(4, 65) < 0.5)
    holes[:, 0] = True
    for seen in (mask, holes):
        y = m(x, seen)
        other = m(torch.where(seen[..., None], x, 1e4 * torch.randn_like(x)), seen)
        assert y.isfinite().all() and torch.equal(y[seen], other[seen])
        assert torch.equal(m(x, seen.long()), y) and torch.equal(m(x, 0.5 * seen), y)
    y = m(x, mask)
    close(m(F.pad(x, (0, 0, 0, 9), value=3.0), F.pad(mask, (0, 9)))[:, :65][mask], y[mask])
    for i, T in enumerate(n):
        close(m(x[i:i + 1, :T])[0], y[i, :T])
    y = m(x.requires_grad_(), mask_of(65, 65, 0, 3, 0))  # rows with nothing in them
    inputs = [x, *(p for p in m.parameters() if p.numel())]
    assert y.isfinite().all() and all(g.isfinite().all() for g in grads_of(y, 1, *inputs))
    with pytest.raises(ValueError, match="pad on the right"):
        m(x, mask.flip(1))

@each("T", [1, 2, 3, 63, 64, 65])
@torch.no_grad()
def test_odd_shapes(T):  # catches: dh = 1 or odd under rope, a batch of one squeezed away, T below one block, or beyond all
    for (text, causal), (C, H) in product(FORMS, ((4, 4), (6, 2), (5, 1))):
        m = mixer(text, causal, n_embd=C, n_head=H)
        x = rand(1, T, C)
        y = m(x)
        assert y.shape == x.shape and y.isfinite().all()
        if causal and T < 4:
            close(continued(m, x, *[1] * T)[0], y)

@each("text,causal", FORMS)
def test_every_parameter_learns(text, causal):
    # catches: a weight never read, a detach, a level that T = 2^L does not reach, a parameter of no elements (DDP waits for it)
    m = mixer(text, causal)
    x = rand(4, 64, 16).requires_grad_()
    (m(x) * rand(4, 64, 16, seed=2)).sum().backward()
    for name, p in m.named_parameters():
        assert p.grad is not None and p.grad.any(), name
        if name.split(".")[-1] in ("taps", "band", "scale") or p.dim() == 3:
            assert p.grad.bool().all(), f"a part of {name}"

# -----------------------------------------------------------------------------
# every mixer is a plain module

@each("text,causal", FORMS)
def test_gradcheck(text, causal):  # catches: a detach, a write in place that autograd misses, float32 somewhere on the way
    m = mixer(text, causal, n_embd=4, block_size=16).double()
    x = rand(2, 9, 4, dtype=torch.float64).requires_grad_()
    mask = mask_of(9, 9, 6)
    named = {n: p for n, p in m.named_parameters() if p.numel()}

    def f(x, *params):
        return torch.func.functional_call(m, dict(zip(named, params)), (x, mask))
    assert f(x, *named.values()).dtype == torch.float64
    assert torch.autograd.gradcheck(f, (x, *named.values()), atol=1e-6, fast_mode=True)

@each("text,causal", FORMS)
def test_plain_autograd(text, causal):
    # catches: an in-place trick or a look at values under vmap, a lost second derivative, a module that cannot be copied
    m = mixer(text, causal)
    x = rand(3, 9, 16)
    y = m(x)
    mask = mask_of(9, 9, 4, 1)
    assert torch.equal(copy.deepcopy(m)(x), y)
    close(torch.func.vmap(lambda u: m(u[None])[0])(x), y)
    masked = torch.func.vmap(lambda u, real: m(u[None], real[None])[0])(x, mask)
    close(masked[mask], m(x, mask)[mask])
    named = {n: p for n, p in m.named_parameters() if p.numel()}
    x.requires_grad_()

    def loss(params, x):
        return torch.func.functional_call(m, params, (x,)).square().sum()
    params, dx = torch.func.grad(loss, (0, 1))({n: p.detach() for n, p in named.items()}, x.detach())
    wants = torch.autograd.grad(loss(named, x), [x, *named.values()])
    for mine, want in zip([dx, *params.values()], wants, strict=True):
        close(mine, want, 1e-4)
    m = mixer(text, causal, block_size=16, n_embd=4).double()
    x = rand(1, 9, 4, dtype=torch.float64).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # torch's flash kernel for the CPU has no second derivative
        assert torch.autograd.gradgradcheck(m, (x,), atol=1e-5, fast_mode=True)

@each("text,causal", FORMS)
def test_checkpointing_and_meta(text, causal):
    # catches: a block that cannot be made anew, weights that only the CPU can hold
    cfg = config(text)
    torch.manual_seed(0)
    block = M.Block(cfg, causal)
    x = rand(2, 20, 16).requires_grad_()
    inputs = [x, *(p for p in block.parameters() if p.numel())]
    w = rand(2, 20, 16, seed=2)
    stored = grads_of(block(x), w, *inputs)
    for reentrant in BOTH:
        x.grad = None
        (checkpoint(block, x, use_reentrant=reentrant) * w).sum().backward()
        close(x.grad, stored[0])
    for a, b in zip(grads_of(checkpoint(block, x, use_reentrant=False), w, *inputs), stored):
        close(a, b)
    with torch.device("meta"):
        m = build_mixer(cfg, causal)
    assert all(u.device.type == "meta" for u in m.state_dict().values())
    other = build_mixer(cfg, causal)
    m.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(m(x), other(x))

class Doubled(nn.Linear):
    """What an adapter such as LoRA puts in a Linear's place."""

    def forward(self, x):
        return 2 * super().forward(x)

@each("text,causal", [*FORMS, *((r, None) for r in READERS)])
@torch.no_grad()
def test_a_replaced_linear_is_the_one_used(text, causal):  # catches: weights read past their module
    x = rand(2, 20, 16)
    if causal is None:
        m = shaken(build_cross, text)
        inputs = (x, rand(2, 15, 16))
    else:
        m = mixer(text, causal)
        inputs = (x,)
    for name, linear in m.named_modules():
        if isinstance(linear, nn.Linear):
            parent, _, child = name.rpartition(".")
            doubled = Doubled(linear.in_features, linear.out_features, linear.bias is not None)
            doubled.load_state_dict(linear.state_dict())
            other = copy.deepcopy(m)
            setattr(other.get_submodule(parent), child, doubled)
            want = copy.deepcopy(m)
            for p in want.get_submodule(name).parameters():
                p.data *= 2
            close(other(*inputs), want(*inputs))
            assert not torch.equal(other(*inputs), m(*inputs)) or "c_attn" in name, name

HALVES = [("attention", True), ("attention window=9", True), ("haar", True), ("haar", False), ("haar undecimated=no", False),
          ("wersa", True), ("wersa", False), ("wersa feature_map=exp", True), ("wersa feature_map=exp", False),
          ("wavspa levels=4 undecimated=yes", False), ("wavspa levels=4", True), ("wavspa levels=4", False)]

@each("text,causal", HALVES)
@torch.no_grad()
def test_half_precision(text, causal, monkeypatch):
    # catches: a sum over T in float16 (4,096 tokens around 6 overflow it) or in bfloat16 (it stalls at 256)
    monkeypatch.undo()
    m = mixer(text, causal, block_size=4096)
    x = rand(1, 4096, 16) + 6
    want = copy.deepcopy(m).double()(x.double())

    def error(y):
        return ((y - want).square().mean() / want.square().mean()).sqrt().item()
    with torch.autocast("cpu", torch.bfloat16):
        assert error(m(x)) < 0.02
        if causal:  # the state's dtype is not the activations'
            assert error(continued(m, x, 1500, 1, 2595)[0]) < 0.02
    half = copy.deepcopy(m).half()
    assert error(half(x.half())) < 0.005
    if causal:
        assert error(continued(half, x.half(), 1500, 1, 2595)[0]) < 0.005
    assert error(m.bfloat16()(x.bfloat16())) < 0.04

@each("text,causal", FORMS)
@torch.no_grad()
def test_extremes(text, causal, monkeypatch):
    # catches: 300^2 in float16, a division by nothing seen, a length of zero or one, 65,536 ones added up in half precision
    monkeypatch.undo()
    m = mixer(text, causal)
    none = torch.zeros(2, 9, dtype=torch.bool)
    most = 300 if "gate=0" in text else 60  # a gated output is a product: 300's true value is no float16
    half = copy.deepcopy(m).half()
    for y in (m(torch.zeros(2, 9, 16)), m(rand(2, 9, 16), none), m(rand(2, 1, 16)), half(most * rand(1, 64, 16).half())):
        assert y.isfinite().all()
    if text in ("haar", "haar gate=0 levels=3", "wersa", "wersa feature_map=exp levels=3", "haar undecimated=no"):
        x = torch.ones(1, 65536, 16)
        want = m(x)
        assert (half(x.half()) - want).abs().max() < 0.02 * want.abs().max()

class Largest(TorchDispatchMode):
    """Counts the numbers in the largest tensor that any operation returned."""
    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.n = max([self.n, *(o.numel() for o in tree_leaves(out) if torch.is_tensor(o))])
        return out

@each("text", ["haar", "haar undecimated=decoder wavelet=db2", "wersa n_features=512", "wersa levels=3 feature_map=exp",
               "wavspa inner=wersa", "cross=aligned", "cross=place", "cross=wersa n_features=512"])
def test_linear_memory(text, monkeypatch):  # catches: a T x T or T x S product, or a mask of that size, also in the backward
    monkeypatch.undo()
    sizes = []
    for T in (512, 2048):
        x = rand(1, T, 16).requires_grad_()
        mask = torch.ones(1, T, dtype=torch.bool)
        with Largest() as most:
            if "cross" in text:
                shaken(build_cross, text)(x, x, mask).sum().backward()
            else:
                mixer(text, True)(x).sum().backward()
                mixer(text, False)(x, mask).sum().backward()
        sizes.append(most.n)
    assert sizes[1] <= min(4.2 * sizes[0], 1024 * 2048)

def test_a_readers_mixer(monkeypatch):  # catches: a promise that only our own classes can keep, a place where a new one must be added
    class Average(nn.Module):
        """y[t] = a y[t-1] + (1 - a) x[t]."""

        def __init__(self, cfg, causal=False):
            super().__init__()
            self.logit = nn.Parameter(torch.randn(cfg.n_embd))
            self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd)

        def init_state(self, B, device=None, dtype=None):
            return torch.zeros(B, len(self.logit), device=device, dtype=dtype)

        def forward(self, x, mask=None, state=None):
            mask, a = M.as_mask(mask), self.logit.sigmoid()
            y, ys = 0 * x[:, 0] if state is None else state, []
            for t in range(x.size(1)):
                y = a * y + (1 - a) * (x[:, t] if mask is None else x[:, t] * mask[:, t, None])
                ys.append(y)
            out = self.c_proj(torch.stack(ys, 1))
            return out if state is None else (out, y)

    monkeypatch.setitem(M.MIXERS, "average", Average)
    for text in ("average", "average gate=0"):
        test_no_leak(text)
        test_any_cut_equals_the_whole(text)
        test_state_does_not_grow(text)
        for causal in BOTH:
            test_masks(text, causal)
            test_every_parameter_learns(text, causal)
            test_gradcheck(text, causal)
            test_plain_autograd(text, causal)
            test_checkpointing_and_meta(text, causal)
            test_a_replaced_linear_is_the_one_used(text, causal)
    test_decoder("average,attention", "attention")
    test_generate("average", "encdec")
    test_encoder("average", "mean")
    test_overfits_one_batch("average,haar")

# -----------------------------------------------------------------------------
# wavelets

KINDS = ["fixed", "free", "ada", "ortho", "lift"]
EXACT = ["fixed", "ortho", "lift"]

def wavelet(name, learned, L, C=3, noise=0.1):
    """A float64 Wavelet, its parameters shaken where the inverse stays exact."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        w = Wavelet(name, learned, L, C)
    finally:
        torch.set_default_dtype(torch.float32)
    for p in w.parameters():
        p.data += (noise if learned in EXACT else 0) * torch.randn_like(p)
    return w

@each("T", [1, 2, 3, 5, 16, 17, 100, 255, 1000])
def test_reconstruction(T):  # catches: a wrap wrong for T < F, an odd T cropped at the wrong end, an inverse right only at the start
    most = math.ceil(math.log2(T))
    x = rand(2, T, 3, dtype=torch.float64)
    for levels, name in product({0, 1, most // 2, most} & set(range(most + 1)), ("haar", "db2", "db3", "db9", "db20")):
        bands = dwt(x, name, levels)
        assert [b.size(1) for b in bands[1:]] == [-(-T // 2 ** l) for l in range(levels, 0, -1)]
        close(idwt(bands, name, T), x, 1e-10)
        for learned in KINDS:
            w = wavelet(name, learned, levels)
            mine = w.dwt(x)
            close(w.idwt(mine)[:, :T], x, 1e-9)
            if learned == "fixed":
                for a, b in zip(mine, bands, strict=True):
                    close(a, b, 1e-12)
    close(torch.cat(dwt(x), 1), torch.cat(dwt(x, "haar", most), 1))  # None: as many levels as T takes
    x = rand(2, 2, T, 3, dtype=torch.float64)  # any leading dimensions
    close(idwt(dwt(x, daubechies(2)), daubechies(2), T), x, 1e-10)
    assert dwt(x)[0].shape == (2, 2, 1, 3)

@each("name,learned", product(("haar", "db2", "db9"), KINDS))
def test_rows_of_own_length(name, learned):  # catches: a row that wraps at the batch's end, or reads padding
    n = torch.tensor([1, 2, 3, 5, 16, 17, 30, 31])
    w = wavelet(name, learned, 4)
    x = rand(8, 31, 3, dtype=torch.float64)
    bands = w.dwt(x, n)
    back = w.idwt(bands, n)
    for i, T in enumerate(n.tolist()):
        close(back[i, :T], x[i, :T], 1e-10)
        for b, alone in zip(bands, w.dwt(x[i:i + 1, :T])):
            close(b[i, :alone.size(1)], alone[0], 1e-12)

@pytest.mark.filterwarnings("ignore::UserWarning")
@each("T", [2, 3, 5, 16, 17, 63, 64, 100])
def test_pywavelets(T):  # catches: a sign, bands in the wrong order, an odd T extended by zero, levels drifting apart
    pywt = pytest.importorskip("pywt")
    x = rand(1, T, 1, dtype=torch.float64)
    for levels, n in product(range(1, math.ceil(math.log2(T)) + 1), (1, 2, 3, 4, 8, 20)):
        theirs = pywt.wavedec(x[0, :, 0].numpy(), f"db{n}", mode="periodization", level=levels)
        for a, b in zip(dwt(x, daubechies(n), levels), map(torch.tensor, theirs), strict=True):
            close(a[0, :, 0], b, 1e-10)

@each("n", range(1, 21))
def test_filters(n):
    # catches: roots found in float64 (1e-6 off at n = 20), the maximum-phase twin, a lattice peeled in the wrong order,
    # lifting steps that do not start at the wavelet, a mirror with the other sign
    name = "haar" if n == 1 else f"db{n}"
    h = daubechies(n)
    g = torch.tensor([(-1) ** m * h[2 * n - 1 - m] for m in range(2 * n)], dtype=torch.float64)
    assert abs(h.sum() - math.sqrt(2)) < 1e-14
    for kind, l in product(KINDS, (0, 1)):
        for mine, want in zip(wavelet(name, kind, 2, noise=0).filters(l), (h, g)):
            close(mine, want[:, None].expand_as(mine), 1e-13)
    moved = wavelet(name, "ortho", 1)
    moved.taps.data = 7 * rand(*moved.taps.shape, dtype=torch.float64)  # orthonormal for any angles
    pairs = [torch.stack(moved.filters(0))[..., 1].detach(), torch.stack((h, g))]
    for pair in pairs:
        for k in range(n):  # to its own even shifts, and low-pass to high-pass
            close(pair[:, :2 * n - 2 * k] @ pair[:, 2 * k:].T, (k == 0) * torch.eye(2, dtype=torch.float64), 1e-13)
    close(h, torch.tensor(pytest.importorskip("pywt").Wavelet(f"db{n}").rec_lo, dtype=torch.float64), 1e-14)

@each("T,levels", [(2, 1), (8, 3), (16, 2), (24, 3), (40, 1)])
def test_dense_matrix(T, levels):  # catches: an inverse right only near Daubechies' angles, energy lost at the wrap
    unit = torch.eye(T, dtype=torch.float64)[..., None]
    x = rand(3, T, 2, dtype=torch.float64)
    sizes = [T >> l for l in (levels, *range(levels, 0, -1))]
    moved = wavelet("db5", "ortho", 1, 1)
    moved.taps.data = rand(*moved.taps.shape, dtype=torch.float64)
    for h in ("haar", daubechies(4), moved.filters(0)[0].detach()):
        W = torch.cat(dwt(unit, h, levels), 1)[..., 0].T  # its columns: the transforms of the unit vectors
        y = torch.cat(dwt(x, h, levels), 1)
        close(W @ W.T, unit[..., 0], 1e-13)
        close(y, W @ x, 1e-13)
        close(y.square().sum(), x.square().sum(), 1e-13)
        close(idwt(list(unit.split(sizes, 1)), h)[..., 0], W, 1e-13)  # the inverse is the transpose

@each("name,learned", product(("haar", "db2", "db4"), KINDS))
def test_undecimated_bands(name, learned):  # catches: taps in reverse, a delay at the wrong level, an encoder's bands off centre
    torch.manual_seed(0)
    w = Wavelet(name, learned, 3, 2).double()
    for p in w.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x = rand(1, 21, 2, dtype=torch.float64)
    for causal in BOTH:
        bands, _ = w.undecimated(x, causal)
        a, want = x[0], []
        for l in range(3):
            low, high = ((taps / math.sqrt(2)).expand(-1, 2) for taps in w.filters(l))
            reach = (len(low) - 1) * 2 ** l
            ahead = 0 if causal else (reach + 1) // 2
            coarse, fine = torch.zeros_like(a), torch.zeros_like(a)
            for t, m in product(range(21), range(len(low))):
                s = t + ahead - reach + m * 2 ** l
                if 0 <= s < 21:
                    coarse[t] = coarse[t] + low[m] * a[s]
                    fine[t] = fine[t] + high[m] * a[s]
            want.insert(0, -fine if learned == "free" else a - coarse)
            a = coarse
        for mine, theirs in zip(bands, [a, *want], strict=True):
            close(mine[0], theirs, 1e-12)
        if learned != "free":
            close(sum(bands), x, 1e-12)

@each("call,words", [
    (lambda: dwt(torch.ones(2, 8, 3, dtype=torch.long)), "floats"),
    (lambda: dwt(rand(2, 8)), r"\(\.\.\., T, C\)"),
    (lambda: dwt(rand(2, 0, 3)), r"\(\.\.\., T, C\)"),
    (lambda: dwt(rand(2, 8, 3), "haar", 4), "levels=4"),
    (lambda: dwt(rand(2, 8, 3), "haar", -1), "levels=-1"),
    (lambda: dwt(rand(2, 1, 3), "haar", 1), "levels=1"),
    (lambda: dwt(rand(2, 8, 3), "db21"), "db21"),
    (lambda: dwt(rand(2, 8, 3), "sym4"), "sym4"),
    (lambda: dwt(rand(2, 8, 3), torch.ones(3)), "even number"),
    (lambda: dwt(rand(2, 8, 3), torch.ones(4) / 2), "orthonormal"),
    (lambda: dwt(rand(2, 8, 3), torch.tensor([0.3536, 1.0607, 0.3536, 0, 0, 0])), "orthonormal"),
    (lambda: dwt(rand(2, 8, 3), daubechies(2).flip(0)), "reverse"),
    (lambda: idwt(dwt(rand(2, 8, 3)), torch.ones(5)), "even number"),
    (lambda: idwt(dwt(rand(2, 8, 3)), daubechies(4).flip(0)), "reverse"),
    (lambda: daubechies(0), "db0"),
    (lambda: daubechies("db21"), "db21"),
    (lambda: Wavelet("db1"), "db1"),
    (lambda: Wavelet("haar", "auto"), "auto"),
])
def test_bad_transforms(call, words):  # catches: garbage for what pywt calls dec_lo, an index error deep inside, a silent crop
    with pytest.raises(ValueError, match=words) as e:
        call()
    assert "\n" not in str(e.value)

# -----------------------------------------------------------------------------
# every mixer: a slow twin

@each("text,causal", [(f"haar gate=0 undecimated={u} wavelet={name} wavelet_params={learned}", causal)
                      for u, causal in (("yes", True), ("yes", False), ("no", False), ("no", True))
                      for name, learned in (("haar", "free"), ("db2", "ada"), ("db3", "ortho"), ("db2", "lift"), ("haar", "fixed"))])
def test_haar_dense(text, causal):
    # catches: halves or taps swapped, a weight at the wrong level, a reach of 2^l, an end that wraps, a tail left out
    for T in (1, 5, 16, 21):
        m = mixer(text, causal, n_embd=4, block_size=16).double()
        x = rand(2, T, 4, dtype=torch.float64)
        mixed = torch.zeros_like(x)
        for c in range(4):
            a = torch.eye(T, dtype=torch.float64)  # its rows: what a coefficient takes from each x_t
            W = torch.zeros_like(a)
            for l in range(m.L + 1):
                if l < m.L:
                    low, high = (taps.expand(-1, 4)[:, c] for taps in m.wavelet.filters(l))
                    places = range(len(a)) if m.undecimated else range(0, len(a), 2)
                    stride = 2 ** l if m.undecimated else 1
                    first = -(len(low) // 2 - 1)
                    if m.undecimated:
                        first = -(len(low) - 1) * stride + (0 if causal else ((len(low) - 1) * stride + 1) // 2)
                    coarse, d = [], []
                    for k in places:
                        reach = [(i, k + first + i * stride) for i in range(len(low))]
                        coarse.append(sum(low[i] * a[s] if 0 <= s < len(a) else 0 * a[0] for i, s in reach))
                        d.append(sum(high[i] * a[s] if 0 <= s < len(a) else 0 * a[0] for i, s in reach))
                    a = coarse
                else:
                    d = a
                for t in range(T):
                    block = min(l + 1, m.L)
                    half = 0 if m.undecimated else (t >> (block - 1)) % 2
                    W[t] = W[t] + m.weight[l, half, c] * d[t if m.undecimated else t >> block]
            mixed[..., c] = x[..., c] @ W.T
        close(m(x), m.c_proj(mixed), 1e-12)

def test_haar_forms():  # catches: halves of a block that start alike (rank T/2), channels that start alike, a block that reaches out
    torch.manual_seed(0)
    for text, rank in (("haar undecimated=no", 32), ("haar", 32)):
        m = build_mixer(config(text, block_size=32, gate=False))
        m.c_proj = nn.Identity()
        unit = torch.eye(32)[:, :, None].expand(-1, -1, 16)
        assert torch.linalg.matrix_rank(m(unit)[..., 3], rtol=1e-5) == rank
        assert m.weight.std() > 0.2 and m.wavelet.taps.std(-1).min() > 0.005
    m = mixer("haar undecimated=no levels=3")
    with pytest.warns(UserWarning, match="raise --levels"):
        y = m(rand(1, 16, 16))
    assert torch.equal(m(loud(rand(1, 16, 16), 8))[:, :8], y[:, :8])

@each("text", ["attention", "haar", "haar undecimated=no", "wersa", "wavspa", "fourier"])
def test_gate(text):  # catches: a gate made of what was mixed, a gate after the projection, a mixer projected twice or not at all
    m = mixer(text, False)
    plain = mixer(text, False, gate=False)
    x = rand(2, 9, 16)
    if hasattr(plain, "c_proj"):
        inner = copy.deepcopy(m.mixer)
        inner.c_proj = m.c_proj
        plain.load_state_dict(inner.state_dict())
        close(plain(x), m.c_proj(m.mixer(x)))
    gate = m.gate(x)
    close(m(x), m.c_proj(m.mixer(x) * gate / (1 + (-gate).exp())))

@each("text,causal", [(v, c) for v, c in FORMS if v.startswith("wavspa")])
def test_wavspa_identity(text, causal):  # catches: an inverse that is none, a row's own length ignored, bands that do not add up
    m = mixer(text, causal, gate=False)
    if m.wavelet.learned in EXACT or "ada" in text and m.undecimated:
        for i in range(len(m.inner)):
            m.inner[i] = nn.Identity()
            m.inner[i].forward = lambda c, mask=None: c
        m.band.data *= 0
        x = rand(3, 37, 16)
        mask = mask_of(37, 37, 20, 3)
        close(m(x, mask)[mask], x[mask])

@each("text,causal", [(f"wavspa gate=0 levels=3 wavelet=db2 {more}", c) for more in ("", "wavspa_shared=0", "undecimated=yes inner=wersa")
                      for c in BOTH])
def test_wavspa_bands(text, causal):  # catches: a band embedding or an inner mixer of another band, a band left out
    m = mixer(text, causal)
    x = rand(2, 21, 16)
    bands = m.wavelet.undecimated(x, causal)[0] if causal or "yes" in text else m.wavelet.dwt(x)
    out = []
    for i, c in enumerate(bands):
        inner = m.inner[0] if len(m.inner) == 1 else m.inner[i]
        out.append(inner(c + m.band[i]))
    assert len(m.inner) == (4 if "shared=0" in text else 1) and len(out) == 4
    close(m(x), sum(out) if causal or "yes" in text else m.wavelet.idwt(out)[:, :21])

def turn(u, t):
    """RoPE by complex numbers: u (..., dh) at place t, a number or (T, 1, 1)."""
    n = u.size(-1) // 2
    angle = torch.as_tensor(t, dtype=torch.float64) * 10000.0 ** (-torch.arange(n, dtype=torch.float64) / n)
    u = torch.complex(u[..., :n].double(), u[..., n:].double()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((u.real, u.imag), -1)

def phi(u, R, kind, query=False):
    """The features of u (..., dh), float64."""
    dh, m = R.shape
    u, R = u.double(), R.double()
    if kind == "relu":
        return (u @ R).relu() / m ** 0.5
    u = u / dh ** 0.25
    shift = (u @ R).amax(-1, keepdim=True).detach() if query else u.square().sum(-1, keepdim=True) / 2
    return (u @ R - shift).exp()

def matrices(m, T, causal):
    """The T x T matrix of each of a wersa's bands, a_L, d_L, ..., d_1: fixed wavelets only."""
    unit = torch.eye(T, dtype=torch.float64)
    if not m.undecimated:
        taps = m.wavelet.taps[0].detach()
        bands = dwt(unit[..., None], taps, m.L)
        only = [[c if i == j else 0 * c for j, c in enumerate(bands)] for i in range(len(bands))]
        return [idwt(some, taps, T)[..., 0].T for some in only]
    a, details = unit, []
    for l in range(m.L):
        low = m.wavelet.taps[0].detach() / math.sqrt(2)
        reach = (len(low) - 1) * 2 ** l
        ahead = 0 if causal else (reach + 1) // 2
        A = torch.zeros_like(unit)
        for t, i in product(range(T), range(len(low))):
            s = t + ahead - reach + i * 2 ** l
            if 0 <= s < T:
                A[t, s] += low[i]
        details.insert(0, a - A @ a)
        a = A @ a
    return [a, *details]

@each("text,causal", [(f"wersa gate=0 {more}", c) for c in BOTH for more in (
    "", "levels=0", "levels=3 pos=none", "wavelet=db2 undecimated=yes", "feature_map=exp", "feature_map=exp levels=3 wavelet=db2")])
def test_wersa_loop(text, causal):
    # catches: gains from the whole mean or on the wrong band, means of the wrong span, two different R, a missing stabiliser,
    # a segment that forgets the ones before it, and the gradient of any of it
    m = mixer(text, causal).double()
    m.c_attn.weight.data[:16] *= 3  # long queries
    T = 29
    x = rand(2, T, 16, dtype=torch.float64).requires_grad_()
    q, k, v = m.c_attn(x).chunk(3, -1)
    v = v.unflatten(-1, (2, 8))
    bands = matrices(m, T, causal)
    fq, fk, outs = [], [], []
    for t in range(T):
        qt, kt = q[:, t].view(2, 2, 8), k[:, t].view(2, 2, 8)
        if m.L > 0:
            mean = q[:, :t + 1].mean(1) if causal else q.mean(1)
            gains = m.filter(mean).view(2, 2, m.L + 1) * m.scale  # (B, H, L+1)
            qt = sum(gains[..., i, None] * torch.einsum("s,bsc->bc", A[t], q).view(2, 2, 8) for i, A in enumerate(bands))
            kt = sum(gains[..., i, None] * torch.einsum("s,bsc->bc", A[t], k).view(2, 2, 8) for i, A in enumerate(bands))
        if m.rope:
            qt, kt = turn(qt, t), turn(kt, t)
        fq.append(phi(qt, m.R, m.kind, query=True))
        fk.append(phi(kt, m.R, m.kind))
    for t in range(T):
        top, bottom = 0, 1e-6
        for s in range(t + 1 if causal else T):
            weight = (fq[t] * fk[s]).sum(-1, keepdim=True)  # (B, H, 1)
            top, bottom = top + weight * v[:, s], bottom + weight
        outs.append((top / bottom).flatten(1))
    want = m.c_proj(torch.stack(outs, 1))
    y = m(x)
    # relu's angles are float32 in the model where they are float64 here
    close(y, want, 1e-6)
    w = rand(2, T, 16, seed=2, dtype=torch.float64)
    names = [n for n, p in m.named_parameters() if p.numel()]
    inputs = [x, *(p for p in m.parameters() if p.numel())]
    for name, a, b in zip(["x", *names], grads_of(y, w, *inputs), grads_of(want, w, *inputs), strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max(), name

@each("T,kind", product([1, 31, 32, 33, 1023, 1024, 1025, 2100], ["relu", "exp"]))
def test_linear_attention(T, kind, monkeypatch):  # catches: a segment or chunk that forgets its own tokens, or its gradient
    monkeypatch.undo()
    for causal in BOTH:
        m = mixer("wersa gate=0 levels=0 pos=none", causal, n_embd=4, n_features=16, feature_map=kind).double()
        x = rand(1, T, 4, dtype=torch.float64).requires_grad_()
        q, k, v = (u.unflatten(-1, (2, 2)).transpose(1, 2) for u in m.c_attn(x).chunk(3, -1))
        weights = phi(q, m.R, kind, query=True) @ phi(k, m.R, kind).mT
        weights = weights.tril() if causal else weights
        want = m.c_proj((weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)).transpose(1, 2).flatten(2))
        y = m(x)
        close(y, want, 1e-12)
        w = rand(1, T, 4, seed=2, dtype=torch.float64)
        inputs = [x, *(p for p in m.parameters() if p.numel())]
        for a, b in zip(grads_of(y, w, *inputs), grads_of(want, w, *inputs)):
            close(a, b, 1e-10)

@each("kind", ["relu", "exp"])
def test_feature_kernels(kind):  # catches: a missing 1/sqrt(m), exp without |x|^2/2, a wrong temperature
    torch.manual_seed(0)
    q, k = 0.5 * torch.randn(64, 8), 0.5 * torch.randn(64, 8)
    cos = F.cosine_similarity(q, k)
    if kind == "relu":  # the arc-cosine kernel of order 1 (Cho and Saul 2009)
        want = q.norm(dim=-1) * k.norm(dim=-1) * ((1 - cos ** 2).sqrt() + (math.pi - cos.acos()) * cos) / (2 * math.pi)
    else:
        want = ((q * k).sum(-1) / math.sqrt(8)).exp()
    sizes, errors = [64, 1024, 4096], []
    for m in sizes:
        found = []
        for _ in range(32):
            R = build_mixer(config("wersa gate=0", n_features=m)).R
            fq, fk = M.features(q, R, kind), M.features(k, R, kind)
            found.append((fq * fk).sum(-1) / (1 if kind == "relu" else m))
        errors.append((torch.stack(found) - want).square().mean().sqrt().item())
    slope = math.log(errors[-1] / errors[0]) / math.log(sizes[-1] / sizes[0])
    assert -0.6 < slope < -0.4 and errors[-1] < 0.06 * want.mean(), (slope, errors)

@each("text,causal", [(f"attention gate=0 {more}", c) for more in ("", "pos=none", "window=1", "window=5", "window=6") for c in BOTH])
def test_attention_loop(text, causal):  # catches: a window one off, one-sided in an encoder, keys turned at the wrong place
    m = mixer(text, causal)
    x = rand(2, 21, 16)
    q, k, v = (u.unflatten(-1, (2, 8)).double() for u in m.c_attn(x).chunk(3, -1))
    if m.rope:
        t = torch.arange(21)[:, None, None]
        q, k = turn(q, t), turn(k, t)
    want = []
    for t in range(21):
        seen = [s for s in range(21) if (s <= t or not causal) and (m.window == 0 or (abs(t - s) < m.window if causal
                                                                                     else abs(t - s) <= m.window // 2))]
        weights = ((q[:, t, None] * k[:, seen]).sum(-1) / math.sqrt(8)).softmax(1)  # (B, seen, H)
        want.append((weights[..., None] * v[:, seen]).sum(1).flatten(1))
    close(m(x), m.c_proj(torch.stack(want, 1).float()))

def test_fourier():  # catches: an FFT over padding, a missing real part
    m = build_mixer(config("fourier gate=0"))
    x = rand(3, 20, 6)
    for i, T in enumerate((20, 7, 1)):
        dft = []
        for n in (T, 6):
            angle = -2 * math.pi / n * torch.outer(torch.arange(n), torch.arange(n))
            dft.append(torch.polar(torch.ones(n, n), angle) / math.sqrt(n))
        want = (dft[0] @ x[i, :T].cfloat() @ dft[1]).real
        close(m(x, mask_of(20, 20, 7, 1))[i, :T], want)
        close(m(x[i:i + 1, :T])[0], want)

# -----------------------------------------------------------------------------
# cross

@each("text", READERS)
def test_cross(text):  # catches: source padding that is read, targets that see each other, a step at the wrong place, a weight never used
    m = shaken(build_cross, text)
    n = [50, 21, 1]
    x, memory, mask = rand(3, 70, 16), rand(3, 50, 16, seed=2), mask_of(50, *n)
    y = m(x, memory, mask)
    source = m.digest(memory, mask)
    assert torch.equal(m(x, torch.where(mask[..., None], memory, 1e4 * torch.randn_like(memory)), mask), y)
    assert torch.equal(m(x, memory, mask.int()), y) and torch.equal(m(x, memory, 0.5 * mask), y)
    close(m(x, F.pad(memory, (0, 0, 0, 13), value=5.0), F.pad(mask, (0, 13))), y)
    close(m(x, memory), m(x, memory, mask_of(50, 50, 50, 50)))
    for i, S in enumerate(n):
        close(m(x[i:i + 1], memory[i:i + 1, :S])[0], y[i])
    for t in (1, 2, 31, 63, 64, 65):
        assert torch.equal(m(loud(x, t), memory, mask)[:, :t], y[:, :t])
        close(m.read(x[:, t:t + 1], source, t), y[:, t:t + 1])
        close(m.read(x[:, t:], source, t), y[:, t:])
    assert m(x[:, :1], memory[:, :1]).shape == (3, 1, 16)
    assert m(x, memory, mask_of(50, 0, 3, 0)).isfinite().all()
    with pytest.raises(ValueError, match="pad on the right"):
        m(x, memory, mask.flip(1))
    (y * torch.randn_like(y)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in m.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert (m(x, memory, mask) - y).abs().max() < 0.1 * y.abs().max()
    double = m.double()(x.double(), memory.double(), mask)
    assert double.dtype == torch.float64
    close(double.float(), y, 1e-4)

@each("text", READERS)
def test_cross_gradients(text):  # catches: a weight whose derivative is wrong, float32 on the way
    m = shaken(build_cross, text, n_embd=4, block_size=8).double()
    named = dict(m.named_parameters())

    def f(x, memory, *params):
        return torch.func.functional_call(m, dict(zip(named, params)), (x, memory, mask_of(9, 9, 6)))
    inputs = [rand(2, T, 4, seed=T, dtype=torch.float64).requires_grad_() for T in (7, 9)]
    assert torch.autograd.gradcheck(f, (*inputs, *named.values()), atol=1e-6, fast_mode=True)

@each("text", READERS)
def test_cross_loop(text):  # catches: slots shifted within a chunk, block means over padding, an edge block taken for real, a wider reach
    m = shaken(build_cross, text)
    n = [60, 13]
    x, memory = rand(2, 70, 16), rand(2, 60, 16, seed=2)
    near = isinstance(m, M.Aligned)
    q = k = None
    if m.c_q is not None:
        q, k = (u.unflatten(-1, (2, 8)).double() for u in (m.c_q(x), m.c_kv(memory)[..., :16]))
    v = m.c_kv(memory)[..., -16:].unflatten(-1, (2, 8)).double()
    if m.rope and not near:
        q = turn(q, m.ratio * torch.arange(70, dtype=torch.float64)[:, None, None])
        k = turn(k, torch.arange(60)[:, None, None])
    want = torch.zeros_like(x)
    for i, t in product(range(2), range(70)):
        blocks, place = [(s, s + 1) for s in range(n[i])], 0
        if near:  # a window of tokens, and two blocks on either side at each level
            p = min(int(m.ratio * t), n[i] - 1)
            blocks = [(p + o, p + o + 1) for o in range(-4, 5)]
            for l, o in product(range(1, m.L + 1), range(-2, 3)):
                blocks.append((((p >> l) + o) << l, ((p >> l) + o + 1) << l))
            place = m.place(x[i, t]).view(2, -1)[:, [0 <= a < n[i] for a, _ in blocks]].double()
        spans = [slice(a, min(b, n[i])) for a, b in blocks if 0 <= a < n[i]]
        V = torch.stack([v[i, s].mean(0) for s in spans], 1)  # (H, blocks, dh)
        scores = place
        if k is not None:
            K = torch.stack([k[i, s].mean(0) for s in spans], 1)
            scores = place + (q[i, t][:, None] * K).sum(-1) / math.sqrt(8)
        weights = scores.exp()
        if isinstance(m, M.CrossWersa):
            weights = (phi(q[i, t], m.R, m.kind)[:, None] * phi(K, m.R, m.kind)).sum(-1)
        mixed = ((weights / weights.sum(-1, keepdim=True))[..., None] * V).sum(1)
        want[i, t] = m.c_proj(mixed.flatten().float())
    close(m(x, memory, mask_of(60, *n)), want, 1e-4)

# -----------------------------------------------------------------------------
# the model

def decoded(m, idx, src=None, *cuts):
    ys = []
    state = m.init_state(idx.size(0), src)
    for part in idx.split(cuts, 1):
        y, state = m.decode(part, state)
        ys.append(y)
    return torch.cat(ys, 1)

@each("text,cross", product(MIXED, [None, "attention", "wersa", "aligned", "place"]))
@torch.no_grad()
def test_decoder(text, cross):  # catches: a leak between blocks, a chunk that forgets its position, a source whose padding counts
    src = SOURCE if cross else None
    m = transformer(text, "encdec" if cross else "decoder", cross=cross or "auto", block_size=65)
    idx = tokens(2, 65)
    logits = m(idx, src=src)[0]
    for t in PREFIXES:
        other = torch.cat((idx[:, :t], tokens(2, 65 - t, seed=t)), 1)
        assert torch.equal(m(other, src=src)[0][:, :t], logits[:, :t])
    close(decoded(m, idx, src, 65), logits)
    close(decoded(m, idx, src, *[1] * 65), logits)
    close(decoded(m, idx, src, *any_cut(65, 0)), logits)
    if cross:
        close(m(idx, src=F.pad(src, (0, 5)))[0], logits)
        close(m(idx[1:], src=src[1:, :11])[0], logits[1:])
        assert (m(idx, src=src.flip(0))[0] - logits).abs().max() > 1e-3  # and it does read the source

@each("text,arch", product(MIXED, ["decoder", "encdec"]))
@torch.no_grad()
def test_generate(text, arch):
    # catches: a state one token behind, dropout left on, a prompt not fed, a row that goes on after its eos, a short row that
    # reads the padding behind it, or continues behind it
    src = SOURCE if arch == "encdec" else None
    m = transformer(text, arch, dropout=0.5)
    idx = tokens(2, 5)

    def slow(row, n, src):
        for _ in range(n):
            row = torch.cat((row, m(row, src=src)[0][:, -1:].argmax(-1)), 1)
        return row
    want = slow(idx, 20, src)
    assert torch.equal(m.train().generate(idx, 20, src=src, temperature=0), want) and m.training
    assert torch.equal(m.generate(idx, 20, src=src, temperature=0.7, top_k=1), want)
    assert torch.equal(m.generate(idx, 0, src=src), idx)
    eos = want[0, 9].item()
    rows = [cut(row, eos) for row in want[:, 5:].tolist()]
    rows = [row + [0] * (max(map(len, rows)) - len(row)) for row in rows]
    assert m.generate(idx, 20, src=src, temperature=0, eos_id=eos)[:, 5:].tolist() == rows
    m.eval()
    ragged = tokens(3, 7, seed=3) * mask_of(7, 2, 7, 4)
    src = tokens(3, 9, seed=4) if arch == "encdec" else None
    got = m.generate(ragged, 9, src=src, temperature=0)
    for i, n in enumerate((2, 7, 4)):
        alone = slow(ragged[i:i + 1, :n], 9, None if src is None else src[i:i + 1])
        assert torch.equal(got[i, :n + 9], alone[0]) and not got[i, n + 9:].any()

def test_sampling():  # catches: a temperature multiplied, top_k that keeps k + 1 or masks the wrong side
    m = transformer("attention")
    idx = tokens(1, 4).expand(4000, -1)
    logits = m(idx[:1])[0][0, -1].detach() / 0.2
    for k in (None, 4, 100):
        torch.manual_seed(0)
        new = m.generate(idx, 1, temperature=0.2, top_k=k)[:, -1]
        least = logits.sort()[0][-min(k or 13, 13)]
        close(torch.bincount(new, minlength=13) / 4000, logits.masked_fill(logits < least, -math.inf).softmax(-1), 0.03)

def test_modes_are_restored(monkeypatch):  # catches: a model left in eval mode, half of it, by an interrupted generation
    m = transformer("haar", dropout=0.5).train()

    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(m, "decode", stop)
    with pytest.raises(KeyboardInterrupt):
        m.generate(tokens(1, 4), 4)
    assert all(module.training for module in m.modules())

@torch.no_grad()
def score(m, src, seq, alpha=0.6):
    """log p of one sequence after bos = 1, normalised for its length."""
    logp = m(torch.tensor([[1] + seq[:-1]]), src=src)[0][0].log_softmax(-1)
    return logp.gather(-1, torch.tensor(seq)[:, None]).sum().item() / ((5 + len(seq)) / 6) ** alpha

@each("text", ["attention", "attention window=3", "haar", "wersa", "wavspa", "haar,attention"])
def test_beam(text):  # catches: states not reordered with their hypotheses, tokens after eos, scores mixed between rows
    m = transformer(text, "encdec")
    src = tokens(6, 12, low=3) * mask_of(12, 12, 5, 12, 1, 9, 12)
    one, four = (sample.beam_search(m, src, 1, 2, 15, beam=b) for b in (1, 4))
    greedy = m.generate(torch.ones(6, 1, dtype=torch.long), 15, src=src, temperature=0, eos_id=2)[:, 1:]
    assert torch.equal(one, greedy)
    for i in range(6):
        alone = src[i:i + 1, :(src[i] > 0).sum()]
        row = cut(four[i].tolist(), 2)
        assert score(m, alone, row) >= score(m, alone, cut(one[i].tolist(), 2)) - 1e-5 and not four[i, len(row):].any()
        assert cut(sample.beam_search(m, alone, 1, 2, 15, beam=4)[0].tolist(), 2) == row

@each("alpha", [0.0, 0.6, 2.0])
def test_beam_exhaustive(alpha):  # catches: an ended hypothesis dropped, a length penalty on the wrong side
    m = transformer("wersa", "encdec", vocab_size=5)
    src = tokens(3, 6, low=3, high=5)
    m.wte.weight.data *= 4
    every = {tuple(cut(s, 2)) for s in product(range(5), repeat=3)}
    got = sample.beam_search(m, src, 1, 2, 3, beam=125, length_penalty=alpha)
    for i in range(3):
        assert cut(got[i].tolist(), 2) == list(max(every, key=lambda s: score(m, src[i:i + 1], list(s), alpha)))

def test_reorder():  # catches: a leaf of the state that stays behind, a number taken for a row
    m = transformer("haar,attention,wersa,wavspa", "encdec", n_layer=4, cross="aligned")
    src, idx = tokens(3, 9), tokens(3, 12, seed=2)
    with torch.no_grad():
        _, state = m.decode(idx[:, :7], m.init_state(3, src))
        rows = torch.tensor([2, 0, 0, 1])
        got, _ = m.decode(idx[rows, 7:], sample.reorder(state, rows))
        close(got, m(idx[rows], src=src[rows])[0][:, 7:])

@each("text,pool", product([*MIXED, "fourier", "haar undecimated=no", "wersa,fourier"], ["mean", "cls", "token"]))
@torch.no_grad()
def test_encoder(text, pool):  # catches: a mean over padding, cls out of its place, class 0 taken for padding
    m = transformer(text, "encoder", pool=pool, n_classes=3)
    labels, seen = torch.tensor([0, 2]), slice(None)
    if pool == "token":
        seen = SOURCE > 0
        labels = torch.where(seen, SOURCE % 3, -1)
    logits, loss = m(SOURCE)
    assert logits.shape == ((2, 30, 3) if pool == "token" else (2, 3)) and loss is None
    close(m(F.pad(SOURCE, (0, 7)))[0][:, :30][seen], logits[seen])
    close(m(SOURCE[1:, :11])[0], logits[1:, :11])
    close(m(SOURCE, labels)[1], F.cross_entropy(logits[seen], labels[seen]), 1e-6)
    assert m(0 * SOURCE)[0].isfinite().all()

@each("pad", [0, 7])
def test_loss(pad):  # catches: pad targets counted, smoothing left on in evaluation, a pad_id of 0 hard-wired
    m = transformer("wersa", "encdec", pad_id=pad, label_smoothing=0.2)
    src = SOURCE.where(SOURCE > 0, pad)
    src = src.where((SOURCE == 0) | (src != pad), 8)
    src = src.where(SOURCE > 0, pad)
    targets = tokens(2, 10, seed=2, low=0)
    targets[0, 4:] = pad
    targets[1, 8:] = -1
    counted = (targets != pad) & (targets != -1)
    logits, loss = m(tokens(2, 10), targets, src)
    close(loss, F.cross_entropy(logits[counted], targets[counted]), 1e-6)
    smooth = F.cross_entropy(logits[counted], targets[counted], label_smoothing=0.2)
    close(m.train()(tokens(2, 10), targets, src)[1], smooth, 1e-6)

@each("text", ["haar", "haar,attention", "wavspa", "wavspa wavelet_params=ada wavspa_shared=0 wavelet=db2", "wavspa wavelet_params=lift inner=wersa",
               "wersa wavelet_params=free", "wersa feature_map=exp", "attention pos=learned"])
def test_parameters(text):  # catches: an R that is not saved, untied embeddings, decayed taps, a global init that overwrites them
    torch.manual_seed(0)
    m, other = (WaveletTransformer(config(text, arch="encdec", cross="wersa", block_size=32)).eval() for _ in range(2))
    optimizer = m.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    grouped = [id(p) for g in optimizer.param_groups for p in g["params"]]
    decayed = [id(p) for g in optimizer.param_groups for p in g["params"] if g["weight_decay"] > 0]
    assert sorted(grouped) == sorted(id(p) for p in m.parameters()) and m.lm_head.weight is m.wte.weight
    for name, p in m.named_parameters():
        assert (id(p) in decayed) == (p.dim() == 2 and name.endswith(".weight")), name
    for module in m.modules():
        if isinstance(module, Wavelet):
            h = daubechies(m.config.wavelet).float()[:, None]
            assert all((module.filters(l)[0] - h).abs().max() < 0.1 for l in range(module.L))
        if isinstance(module, M.Haar):
            assert module.weight.std() > 0.2
    m(tokens(2, 32), tokens(2, 32, seed=2), SOURCE)[1].backward()
    assert all(p.grad is not None and p.grad.any() for p in m.parameters() if p.numel())
    optimizer.step()
    torch.save(m.state_dict(), file := io.BytesIO())
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert torch.equal(m(tokens(2, 32), src=SOURCE)[0], other(tokens(2, 32), src=SOURCE)[0])
    assert m.num_params() == sum(p.numel() for p in m.parameters()) > m.num_params("mixer") > 0

@each("text", MIXED)
def test_overfits_one_batch(text):  # catches: what only training shows: targets shifted, a source not read
    torch.manual_seed(0)
    m = WaveletTransformer(config(text, arch="encdec", block_size=16, n_embd=32))
    src, out = tokens(8, 12, low=2), tokens(8, 12, seed=2, low=2)
    optimizer = m.configure_optimizers(0.0, 1e-2, (0.9, 0.95), "cpu")
    loss = torch.tensor(9.0)
    for _ in range(150):
        if loss > 0.05:
            loss = m(F.pad(out[:, :-1], (1, 0), value=1), out, src)[1]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            optimizer.step()
    assert loss < 0.05

# train.py pads a batch to a multiple of 8
LENGTHS = (40, 24, 48, 120, 64, 88, 56, 104, 32, 72)

COMPILED = ["attention", "attention window=7", "haar", "haar undecimated=decoder wavelet=db2 levels=3", "wavspa levels=2", "fourier",
            "wavspa inner=wersa wavelet_params=lift undecimated=yes", "wersa", "wersa feature_map=exp wavelet=db2", "haar,attention"]
COMPILED += [name for name in M.MIXERS if name not in " ".join(COMPILED)]

@each("text,arch", [(v, a) for v in COMPILED for a in ("encoder", "decoder")
                    if a == "encoder" or v not in ("fourier", "wersa feature_map=exp wavelet=db2")])
@pytest.mark.filterwarnings("ignore")
def test_one_graph_for_all_lengths(text, arch, monkeypatch):
    # catches: a Python number read from a tensor, a list of shapes that the compiler cannot follow, a graph for each length
    monkeypatch.undo()
    import torch._dynamo.utils
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layers = 2 if "," in text else 1
    m = transformer(text, arch, block_size=16, n_layer=layers).train()
    used = set()

    def counting(graph, inputs):
        f = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        def call(*args):  # what is compiled twice at once runs as one
            used.add(f)
            return f(*args)
        return call
    compiled = torch.compile(m, backend=counting, dynamic=True)
    for T in LENGTHS:
        idx = tokens(3, T, seed=T) * (mask_of(T, T, T // 2, 3) if arch == "encoder" else 1)
        targets = torch.tensor([0, 1, 1]) if arch == "encoder" else tokens(3, T, seed=T + 1)
        loss = compiled(idx, targets)[1]
        loss.backward()
        close(loss, m(idx, targets)[1], 1e-4)
    broken = torch._dynamo.utils.counters["graph_break"]
    assert not broken and 1 <= len(used) <= 2, (broken, len(used))

# -----------------------------------------------------------------------------
# settings

@each("text", """n_embd=15 n_embd=0 n_head=0 n_layer=0 block_size=0 vocab_size=0 n_classes=0 levels=-2 levels=8 n_features=-1 window=-1
      dropout=1 dropout=-0.1 dropout=nan label_smoothing=1 cross_ratio=0 cross_ratio=nan pad_id=-1 arch=decodr mixer=mamba mixer=
      mixer=haar,mamba mixer=haar,, mixer=fourier,arch=decoder mixer=fourier,arch=encdec mixer=haar+fourier,arch=decoder
      inner=fourier,mixer=wavspa,arch=decoder inner=wavspa cross=haar wavelet=db21 wavelet=db1 wavelet_params=lattice pos=alibi
      feature_map=elu pool=max undecimated=maybe undecimated=no,mixer=wersa,arch=decoder undecimated=no,mixer=wavspa,arch=encdec
      undecimated=no,mixer=haar+wersa,arch=decoder""".split())
def test_bad_configuration(text):  # catches: an assertion or an index error deep inside, a sentence that names no flag
    if not text.startswith(("mixer=haar,", "mixer=,")):
        text = text.replace(",", " ").replace("+", ",")
    flag, _, value = text.partition("=")
    with pytest.raises(ValueError, match="--" + flag) as e:
        ModelConfig(**{flag: value}) if flag == "mixer" and " " not in value else config(text)
    assert "\n" not in str(e.value)

def test_bad_calls():  # catches: a silent crop, an index error, a check that is skipped when a field is set later
    cfg = config()
    cfg.dropout = 1.0
    m = transformer("haar pos=learned", block_size=12)
    both = transformer("haar", "encdec")
    for words, call in {
        "--dropout": lambda: WaveletTransformer(cfg),
        "--mixer=fourier": lambda: build_mixer(config("fourier"), causal=True),
        "src=": lambda: both(tokens(2, 4)),
        "with --arch": lambda: m(tokens(2, 4), src=SOURCE),
        "--block_size": lambda: m(tokens(2, 13)),
        "pad on the right": lambda: both(tokens(2, 4), src=SOURCE.flip(1)),
        "13 tokens": lambda: m.generate(tokens(2, 2), 12),
        "--temperature": lambda: m.generate(tokens(2, 2), 1, temperature=-1.0),
        "--top_k": lambda: m.generate(tokens(2, 2), 1, top_k=0),
        "at least one token": lambda: m.generate(tokens(2, 0), 1),
        "needs at least one token": lambda: m(tokens(2, 0)),
        "--beam": lambda: sample.beam_search(both, SOURCE, 1, 2, 5, beam=0),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()

def test_a_mixer_that_cannot_continue_is_told(monkeypatch):  # catches: a reader's causal mixer that fails at the first generation
    class Half(nn.Module):
        def __init__(self, cfg, causal):
            super().__init__()

        def forward(self, x, mask=None):
            return x
    monkeypatch.setitem(M.MIXERS, "half", Half)
    assert build_mixer(config("half"))(rand(1, 3, 16)).shape == (1, 3, 16)
    with pytest.raises(ValueError, match="init_state"):
        build_mixer(config("half"), causal=True)

@each("name", ["wavspa", "wersa"])
def test_decimated_is_never_causal(name):  # catches: a leak by build_mixer where the config's own check does not reach
    with pytest.raises(ValueError, match="--undecimated"):
        build_mixer(config(f"{name} undecimated=no"), causal=True)

def test_the_meaning_of_auto():  # catches: a default that moved
    for name, levels, learned, encoder in (("haar", 6, "free", True), ("wavspa", 1, "ortho", False), ("wersa", 2, "fixed", False)):
        for causal in BOTH:
            m = build_mixer(config(name), causal).mixer
            assert m.L == m.wavelet.L == levels and m.wavelet.learned == learned and len(m.wavelet.filters(0)[0]) == 2
            assert m.undecimated == (causal or encoder)
        assert config(f"{name},attention", n_layer=2).of_layer(2).n_levels == levels
    kinds = {name: type(build_cross(config(name, arch="encdec"))) for name in ("attention", "haar", "wersa", "wavspa")}
    assert kinds == dict(attention=M.CrossAttention, haar=M.Aligned, wersa=M.CrossWersa, wavspa=M.CrossWersa)

def test_random_configurations():  # catches: the combination that nobody listed
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    fields = {k: st.sampled_from([w for w in v if w != "fourier"]) for k, v in M.CHOICES.items() if k != "arch"}
    names = [name for name in M.MIXERS if name != "fourier"]
    fields |= dict(mixer=st.sampled_from(names), gate=st.booleans(), wavspa_shared=st.booleans(), block_size=st.integers(1, 40))
    fields |= dict(n_head=st.integers(1, 4), levels=st.integers(-1, 5), n_features=st.integers(0, 9), window=st.integers(0, 9))

    @hypothesis.settings(max_examples=80, deadline=None, derandomize=True, database=None)
    @hypothesis.given(st.fixed_dictionaries(fields), st.integers(1, 6), st.sampled_from([0, 0, 0, 0, 1]), st.integers(1, 45), st.booleans())
    @torch.no_grad()
    def promises(kw, dh, off, T, causal):
        x = rand(2, T, kw["n_head"] * dh + off)
        try:
            m = mixer("", causal, n_embd=x.size(-1), **kw)
        except ValueError as e:
            assert str(e).startswith("--"), e
            return
        y = m(x)
        assert y.shape == x.shape and y.isfinite().all()
        if causal and kw["undecimated"] != "no":
            assert all(torch.equal(m(loud(x, t))[:, :t], y[:, :t]) for t in range(1, T, 3))
            close(continued(m, x, *any_cut(T, dh))[0], y)
        if not causal:
            mask = mask_of(T, T, (T + 1) // 2)
            close(m(x[1:, :(T + 1) // 2])[0], m(x, mask)[1, :(T + 1) // 2])
    promises()

def test_model_py_is_small_and_plain():  # catches: growth that nobody decided on
    path = os.path.join(HERE, "model.py")
    source = open(path, encoding="utf-8").read()
    lines = source.splitlines()
    assert len(lines) <= 900 and os.path.getsize(path) <= 51_200, (len(lines), os.path.getsize(path))
    assert not [i + 1 for i, line in enumerate(lines) if len(line) > 110]
    assert "autograd.Function" not in source

# -----------------------------------------------------------------------------
# the scripts, as a user runs them

HERE = os.path.dirname(os.path.abspath(__file__))
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
TINY = ("--device=cpu --n_embd=16 --n_head=2 --n_layer=1 --batch_size=8 --max_iters=12 --warmup_iters=2 "
        "--eval_interval=4 --log_interval=1 --eval_rows=16 --metric_rows=2 --dropout=0.1").split()

def script(path, argv, cwd, out):
    """What a child of the fork server does: run a script, its words into files."""
    os.chdir(cwd)
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.argv = [path, *argv]
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{out}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), fd)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal; a shell's jobs ignore it
    try:
        runpy.run_path(path, run_name="__main__")
    except KeyboardInterrupt:  # python ends by the signal then, a child of multiprocessing in 1
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)

class Forked:
    """subprocess.Popen's face for a script, forked where torch, most of a short run, is imported already."""
    server = get_context("forkserver")
    server.set_forkserver_preload(["torch", "torch._dynamo", "numpy", "test_model"])

    def __init__(self, name, flags, cwd):
        self.folder = tempfile.TemporaryDirectory()
        self.words = os.path.join(self.folder.name, "words")
        args = (os.path.join(HERE, name), flags, str(cwd), self.words)
        self.process = self.server.Process(target=script, args=args)
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def send_signal(self, sig):
        os.kill(self.pid, sig)

    def communicate(self, timeout=None):
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.words, timeout)
        files = [f"{self.words}.{name}" for name in ("out", "err")]
        return [open(f, encoding="utf-8").read() if os.path.exists(f) else "" for f in files]

def start(script, *flags, cwd, launcher=()):
    if not launcher:
        return Forked(script, flags, cwd)
    return popen([*launcher, os.path.join(HERE, script), *flags], cwd)

def popen(command, cwd, **kw):
    env = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONPATH=HERE)
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *command], cwd=cwd, env=env, text=True, stdout=pipe, stderr=pipe, **kw)

def run(script, *flags, cwd, code=0, **kw):
    p = start(script, *flags, cwd=cwd, **kw)
    out, err = p.communicate(timeout=170)
    assert p.returncode == code, (p.returncode, out, err)
    assert "Traceback" not in err, err
    return out + err

def train(*flags, cwd, **kw):
    return run("train.py", *TINY, *flags, cwd=cwd, **kw)

def kill_after(step, sig, *flags, cwd, out, **kw):
    """Start train.py and send sig once log.csv has reached a step; -> exit code."""
    p = start("train.py", *TINY, *flags, f"--out_dir={out}", cwd=cwd, **kw)
    path = os.path.join(cwd, out, "log.csv")
    while p.poll() is None:
        time.sleep(0.005)
        if os.path.exists(path) and any(line.startswith(f"{step},") for line in open(path)):
            p.send_signal(sig)
            break
    p.communicate(timeout=60)
    return p.returncode

def prepared(cwd, name, **flags):
    return prepare_data.prepare(name, os.path.join(cwd, "data"), **flags)

def result_of(*folder):
    return json.load(open(os.path.join(*folder, "result.json")))

def logged(*folder):
    return list(csv.DictReader(open(os.path.join(*folder, "log.csv"))))

@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a small numbers data set and one finished run."""
    d = str(tmp_path_factory.mktemp("work"))
    prepared(d, "numbers", rows=400)
    train("--mixer=haar", "--out_dir=whole", cwd=d)
    return d

def left(folder):
    """What a run leaves behind, but for the clock: log.csv, and the weights and counters of its checkpoints."""
    found = [open(os.path.join(folder, "log.csv")).read()]
    for name in ("ckpt.pt", "best.pt"):
        ckpt = load_checkpoint(os.path.join(folder, name))
        found += [ckpt["iter_num"], ckpt["best_loss"]]
        found += [hashlib.sha256(v.numpy().tobytes()).hexdigest() for v in ckpt["model"].values()]
    return found

def test_killed_and_resumed_equals_undisturbed(work):
    # catches: data order or dropout from a generator's state, log rows written twice, AdamW state lost
    flags = ["--mixer=haar"]
    assert kill_after(2, signal.SIGINT, *flags, cwd=work, out="broken") == 128 + signal.SIGINT
    assert kill_after(7, signal.SIGKILL, *flags, "--resume", cwd=work, out="broken") == -signal.SIGKILL
    train(*flags, "--out_dir=broken", "--resume", cwd=work)
    whole, broken = os.path.join(work, "whole"), os.path.join(work, "broken")
    assert left(whole) == left(broken) and not os.path.exists(f"{broken}/ckpt.pt.tmp")

def test_two_processes_equal_one(work):
    # catches: the mean of per-process means on ragged batches, a rank reading another's rows, unsummed gradients
    flags = "--mixer=haar,attention --n_layer=2 --dropout=0 --gradient_accumulation_steps=2 --max_iters=8".split()
    train(*flags, "--out_dir=one", cwd=work)
    train(*flags, "--out_dir=two", cwd=work, launcher=[*TORCHRUN, "2"])
    one, two = logged(work, "one"), logged(work, "two")
    assert [r["step"] for r in one] == [r["step"] for r in two] and len(one) == 11
    for a, b in zip(one, two):
        for k in ("loss", "norm", "val_loss", "val_metric"):
            assert (a[k] == b[k] == "") or abs(float(a[k]) - float(b[k])) < 1e-5, (k, a, b)

def test_two_processes_say_what_ends_them(work, tmp_path):
    # catches: words lost in torch's own excepthook, a weight without a gradient, nodes that do not share --out_dir
    head = f"import os, runpy, sys; sys.path.insert(0, {HERE!r})\n"
    for name, line in (("breaks", "import model; model.WaveletTransformer.num_params = lambda *a: 1 / 0"),
                       ("apart", "os.chdir(os.environ['RANK'])")):
        path = os.path.join(HERE, "train.py")
        (tmp_path / f"{name}.py").write_text(f"{head}{line}\nrunpy.run_path({path!r}, run_name='__main__')")
    two = dict(cwd=tmp_path, launcher=[*TORCHRUN, "2"])

    def said(name, *flags):
        return start(str(tmp_path / name), *TINY, *flags, **two).communicate(timeout=170)[1]
    prepared(tmp_path, "recall", rows=100, n_pairs=4, n_keys=16)
    prepared(tmp_path, "listops", rows=100, min_len=10, max_len=30)
    for i in "01":
        (tmp_path / i).mkdir()
    shutil.copytree(os.path.join(work, "whole"), tmp_path / "0" / "out")
    assert "ZeroDivisionError" in said("breaks.py", "--dataset=recall")
    apart = said("apart.py", "--mixer=haar", "--resume", f"--data_dir={work}/data", "--max_iters=14")
    assert "different steps (0, 12): --out_dir=out must be one folder" in apart
    for flags in ("--dataset=recall --mixer=wavspa --wavspa_shared=False", "--dataset=recall --mixer=haar --levels=0",
                  f"--dataset=listops --mixers_from={HERE}/bench.py --mixer=conv"):
        train("--max_iters=2", *flags.split(), **two)

def test_resume_refuses_another_model_and_keeps_earlier_runs(work):
    # catches: weights silently left at their init, a finished run overwritten, a GPU's run that no CPU goes on with
    said = run("train.py", "--resume", "--out_dir=whole", "--n_layer=2", cwd=work, code=1)
    assert "n_layer: 1 in the checkpoint, 2 now" in said and said.count("\n") == 1
    before = open(os.path.join(work, "whole", "log.csv")).read()
    shutil.copytree(os.path.join(work, "whole"), os.path.join(work, "again"))
    train("--mixer=haar", "--out_dir=again/", "--max_iters=1", cwd=work)
    assert open(os.path.join(work, "again.1", "log.csv")).read() == before
    path = os.path.join(work, "again", "ckpt.pt")
    ckpt = load_checkpoint(path)
    ckpt["config"]["device"] = "cuda"
    torch.save(ckpt, path)
    run("train.py", "--resume", "--device=cpu", "--out_dir=again", "--max_iters=2", cwd=work)
    torch.save(dict(ckpt, format=1), path)
    for script, flags in (("train.py", ["--resume"]), ("sample.py", ["--start=one", "--ckpt=ckpt.pt"])):
        said = run(script, *flags, "--out_dir=again", cwd=work, code=1)
        assert "first edition" in said and said.count("\n") == 1
    said = train("--resume", "--out_dir=nowhere", "--max_iters=1", cwd=work)
    assert "nowhere/ckpt.pt does not exist: starting anew" in said

def test_a_mixer_of_ones_own_through_the_scripts(work):
    # catches: a file of mixers that is run unasked, one that is needed and not named, a mixer that cannot generate
    with open(os.path.join(work, "mine.py"), "w") as f:
        f.write("import model\nclass Mine(model.Haar):\n    pass\nmodel.MIXERS['mine'] = Mine\n")
    flags = ["--mixers_from=mine.py", "--mixer=mine,attention", "--n_layer=2", "--out_dir=mine"]
    train(*flags, "--max_iters=2", cwd=work)
    said = run("train.py", "--resume", "--out_dir=mine", "--max_iters=3", cwd=work, code=2)
    assert "--mixers_from" in said and said.count("\n") == 1
    train(*flags, "--resume", "--max_iters=3", cwd=work)
    sampling = ["--out_dir=mine", "--start=one", "--max_new_tokens=3", "--device=cpu"]
    said = run("sample.py", *sampling, cwd=work, code=1)
    assert "--mixers_from" in said and said.count("\n") == 1
    run("sample.py", *sampling, "--mixers_from=mine.py", cwd=work)

def test_sample_lines_in_lines_out(work):
    # catches: order lost by length-batching, an empty line dropped, a separator inside an answer, a cut not told
    lines = ["seven", "", "  ", "one hundred and two", "x" * 300, "emoji 🙂", "eins\u2028zwei", "\u0000"]
    with open(os.path.join(work, "a.en"), "w", newline="") as f:
        f.write("\ufeff" + "\r\n".join(lines) + "\r\n")
    flags = ["--out_dir=whole", "--input=a.en", "--output=a.de", "--max_new_tokens=8", "--device=cpu"]
    said = run("sample.py", *flags, cwd=work)
    got = open(os.path.join(work, "a.de"), encoding="utf-8").read().split("\n")
    assert len(got) == len(lines) + 1 and got[-1] == "" and got[1] == got[2] == "" and "1 of 8 inputs" in said
    model, tokenizer, _ = load_model(os.path.join(work, "whole", "best.pt"))
    alone = [translate(model, tokenizer, [t], max_new_tokens=8)[0][0] for t in lines]
    assert [" ".join(a.splitlines()) for a in alone] == got[:-1]
    for extra in ("--beam=3", "--temperature=0.7"):
        said = run("sample.py", "--out_dir=whole", "--start=one\ntwo", "--max_new_tokens=5", extra, cwd=work)
        assert said.count("\n") == 1

def test_what_the_wavelets_have_learned(work):  # catches: a table of other taps, a picture that nothing draws
    said = run("sample.py", "--out_dir=whole", "--show=wavelets", "--device=cpu", cwd=work)
    assert said.count("Haar, ") == 2 and os.path.getsize(os.path.join(work, "whole", "wavelets.png")) > 10_000

def test_decoder_from_text(work):
    # catches: bits per byte from token counts, a decoder that trains on its own labels
    with open(os.path.join(work, "t.txt"), "w") as f:
        f.write("".join(f"{i} little words, {en(i)}.\n" for i in range(1500)))
    prepared(work, "text", source=os.path.join(work, "t.txt"), tokenizer="bytes")
    flags = ["--dataset=text", "--block_size=32", "--out_dir=text", "--mixer=haar"]
    assert "leaks" in train(*flags, "--undecimated=no", cwd=work, code=1)
    train(*flags, "--undecimated=no", "--leak", "--max_iters=1", cwd=work)
    said = train(*flags, "--eval_block_size=32,64", cwd=work)
    result = result_of(work, "text")
    same, far = result["far"]
    assert same["metric"] == result["test_metric"] != far["metric"]
    assert (same["block_size"], far["block_size"], far["split"]) == (32, 64, "test")
    assert far["n"] == -(-same["n"] // 2) and abs(far["metric"] - far["loss"] / math.log(2)) < 1e-3
    loss, bpb = (float(re.search(rf"test {what} ([\d.]+)", said)[1]) for what in ("loss", "bits per byte"))
    assert abs(bpb - loss / math.log(2)) < 1e-3  # bytes: one token each
    assert "little" in run("sample.py", "--out_dir=text", "--start=0 little", "--max_new_tokens=5", cwd=work)
    flags[2] = "--out_dir=places"
    train(*flags, "--pos=learned", "--max_iters=1", cwd=work)  # whose table has room for 32 tokens read
    model, tokenizer, _ = load_model(os.path.join(work, "places", "best.pt"))
    ids = tokenizer.encode("0 little")
    ids = model.generate(torch.tensor([ids]), 33 - len(ids), temperature=0)[0].tolist()
    said = run("sample.py", "--out_dir=places", "--start=0 little", "--temperature=0", "--device=cpu", cwd=work)
    assert said == f"{tokenizer.decode(ids)}\n---------------\n"

WRONG = [line.split(" | ") for line in """
train.py --mixr=wersa | 2 | --mixer
train.py --mixer=wers | 2 | --mixer
train.py --n_head=3 | 2 | --n_head
train.py --compile=maybe | 2 | --compile
train.py --max_iters=ten | 2 | --max_iters
train.py --levels=99 | 2 | --levels
train.py --dataset=nombres | 1 | numbers
train.py --dataset=../data | 1 | --dataset
train.py --arch=decoder | 1 | --arch
train.py --batch_size=0 | 2 | --batch_size
train.py --mixer=fourier | 2 | fourier
train.py --max_iters=-1 | 2 | --max_iters
train.py --mixer=attention --wavelet=db2 | 2 | --wavelet
train.py --mixer=haar --n_features=8 | 2 | --n_features
train.py --mixer=wersa --window=8 | 2 | --window
train.py --mixer=wersa --undecimated=no | 2 | --undecimated
train.py --mixers_from=none.py | 1 | none.py
sample.py | 2 | --start
sample.py --start=a --out_dir=none | 1 | none/best.pt does not exist
sample.py --start=a --out_dir=whole --ckpt=log.csv | 1 | damaged
sample.py --input=none --out_dir=whole | 1 | none cannot be read
sample.py --start=a --beam=0 | 2 | --beam
sample.py --start=a --out_dir=whole --length_penalty=1 | 2 | --beam
prepare_data.py --dataset=multi | 2 | multi30k
prepare_data.py --dataset=text --data_dir=none | 1 | --source
prepare_data.py --dataset=multi30k --source=. | 1 | train.jsonl
bench.py speed --only=nothing | 1 | --only
bench.py quality --suite=number | 2 | --suite
""".strip().splitlines()]

def test_wrong_input_is_one_line(work):
    # catches: tracebacks, silent defaults, flags that change nothing, messages that do not say what to change
    def said(wrong):
        script, *flags = wrong[0].split()
        return run(script, *flags, cwd=work, code=int(wrong[1]))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (command, _, word), text in zip(WRONG, pool.map(said, WRONG)):
            assert word in text and len(text.strip().splitlines()) == 1, (command, text)

def test_a_strangers_checkpoint_runs_nothing(work):  # catches: torch.load without weights_only
    class Evil:
        def __reduce__(self):
            return os.mkdir, (os.path.join(work, "pwned"),)
    torch.save({"format": 2, "model": Evil()}, os.path.join(work, "evil.pt"))
    said = run("sample.py", "--start=a", "--out_dir=.", "--ckpt=evil.pt", cwd=work, code=1)
    assert "damaged or not a checkpoint" in said and not os.path.exists(os.path.join(work, "pwned"))

# -----------------------------------------------------------------------------
# faults: each does its worst so many times, from a fixed seed, and counts what was lost. pytest tries each once;
# python test_model.py 20 tries each 20 times and prints the table of results/faults.md

LIMITED = """import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv[:2] = []
runpy.run_path(sys.argv[0], run_name='__main__')"""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)

def broke(err):
    """Whether a script ended in a traceback; Ctrl-C may end in one while it still imports."""
    return "Traceback" in err and "KeyboardInterrupt" not in err

def killed(work, rng, tries, flags):
    """Start, kill at a random moment, the same command again, until tries kills are done; let it end; compare."""
    began, done, lost = time.time(), 0, 0
    flags = [*TINY, *flags.split(), "--resume"]
    run("train.py", *flags, "--out_dir=undisturbed", cwd=work)
    seconds, whole = time.time() - began, left(os.path.join(work, "undisturbed"))
    while done < tries:
        code = None
        while code != 0:
            p = start("train.py", *flags, "--out_dir=disturbed", cwd=work)
            try:
                err = p.communicate(timeout=rng.uniform(0.2, 1.0) * seconds if done < tries else 170)[1]
            except subprocess.TimeoutExpired:
                p.send_signal(SIGNALS[done % 3])
                err = p.communicate(timeout=30)[1]
                done += 1
            code = p.returncode
            lost += broke(err) or code not in (0, 130, 143, -9, -15, -2)
        lost += left(os.path.join(work, "disturbed")) != whole
        shutil.rmtree(os.path.join(work, "disturbed"))
    shutil.rmtree(os.path.join(work, "undisturbed"))
    return done, lost

def fault_killed_in_training(work, rng, tries):
    return killed(work, rng, tries, "--mixer=haar --max_iters=60 --eval_interval=20 --metric_rows=1")

def fault_killed_in_writing_checkpoints(work, rng, tries):
    return killed(work, rng, tries, "--mixer=attention --max_iters=30 --eval_interval=1 --eval_rows=1 "
                                    "--metric_rows=1 --n_embd=128")

def fault_killed_in_evaluation(work, rng, tries):
    return killed(work, rng, tries, "--mixer=wersa --max_iters=4 --eval_interval=2 --eval_rows=1000 --metric_rows=100")

def fault_killed_in_preparation(work, rng, tries):
    flags, lost, folder = ["--dataset=lego", "--rows=60000"], 0, os.path.join(work, "killed")

    def files(d):
        paths = [p for p in sorted(glob.glob(os.path.join(d, "lego", "*"))) if not p.endswith("meta.json")]
        return [(os.path.basename(p), hashlib.sha256(open(p, "rb").read()).hexdigest()) for p in paths]
    run("prepare_data.py", *flags, "--data_dir=undisturbed", cwd=work)
    for i in range(tries):
        p = start("prepare_data.py", *flags, "--force", "--data_dir=killed", cwd=work)
        try:
            p.communicate(timeout=rng.uniform(0.1, 1.6))
        except subprocess.TimeoutExpired:
            p.send_signal(SIGNALS[i % 3])
            lost += broke(p.communicate(timeout=30)[1])
        if i % 5 == 4 or i + 1 == tries:
            run("prepare_data.py", *flags, "--data_dir=killed", cwd=work)
            prepare_data.load_meta(os.path.join(folder, "lego"))
            lost += files(folder) != files(os.path.join(work, "undisturbed")) or os.listdir(folder) != ["lego"]
    shutil.rmtree(folder)
    shutil.rmtree(os.path.join(work, "undisturbed"))
    return tries, lost

def fault_disk_full(work, rng, tries):
    lost, flags, out = 0, [*TINY, "--mixer=haar", "--resume", "--out_dir=full"], os.path.join(work, "full")
    for _ in range(tries):
        run("train.py", *flags, "--max_iters=4", cwd=work)
        before = open(f"{out}/ckpt.pt", "rb").read()
        limit = str(rng.integers(5_000, len(before) - 1000))
        p = start("train.py", *flags, cwd=work, launcher=["-c", LIMITED, limit])
        err = p.communicate(timeout=60)[1].strip().splitlines()
        lost += p.returncode != 1 or len(err) != 1 or "cannot be written" not in err[0]
        lost += open(f"{out}/ckpt.pt", "rb").read() != before or any(f.endswith(".tmp") for f in os.listdir(out))
        shutil.rmtree(out)
    return tries + 1, lost + ("cannot be written" not in train("--out_dir=/proc/nowhere", cwd=work, code=1))

def fault_number_of_processes_changed(work, rng, tries):
    """Stopped and gone on with 2, 4 and 1 processes, against 1 throughout; no number divides 37 evaluation rows."""
    lost = 0
    for i in range(tries):
        steps = 50 if tries > 2 else 14
        flags = f"--dropout=0 --gradient_accumulation_steps=2 --max_iters={steps} --eval_rows=37".split()
        flags += [f"--eval_interval={steps // 2}", "--mixer=" + ("haar", "attention", "wersa", "wavspa")[i % 4]]
        train(*flags, "--out_dir=one", cwd=work)
        at = sorted(rng.choice(range(1, steps - 4), 3, replace=False))
        for n, step in zip((1, 2, 4) if i % 2 else (4, 2), at):
            launcher = [*TORCHRUN, str(n)] if n > 1 else []
            code = kill_after(step, signal.SIGTERM, *flags, "--resume", cwd=work, out="some", launcher=launcher)
            lost += code == 0 and step < steps - 8
        train(*flags, "--resume", "--out_dir=some", cwd=work, launcher=[*TORCHRUN, "2"])
        one, some = logged(work, "one"), logged(work, "some")
        lost += [r["step"] for r in one] != [r["step"] for r in some]
        for k, most in dict(loss=1e-5, val_loss=1e-5, norm=1e-3).items():
            lost += max(abs(float(a[k] or 0) - float(b[k] or 0)) for a, b in zip(one, some)) > most
        shutil.rmtree(os.path.join(work, "one"))
        shutil.rmtree(os.path.join(work, "some"))
    return tries, lost

def fault_one_of_two_processes_dies(work, rng, tries):
    lost = 0
    for _ in range(tries):
        flags = [*TINY, "--max_iters=100000", "--eval_interval=100000", "--out_dir=dies", "--dist_timeout=10"]
        p = start("train.py", *flags, cwd=work, launcher=[*TORCHRUN, "2"])
        path = os.path.join(work, "dies", "log.csv")
        while not os.path.exists(path) or len(open(path).readlines()) < 4:
            time.sleep(0.05)
        workers = subprocess.run(["pgrep", "-P", str(p.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(workers[rng.integers(2)]), signal.SIGKILL)
        began, err = time.time(), p.communicate(timeout=60)[1]
        said = "SIGKILL" in err.replace("Signal 9", "SIGKILL")
        lost += p.returncode == 0 or time.time() - began > 45 or not said
        load_checkpoint(os.path.join(work, "dies", "ckpt.pt"))
        shutil.rmtree(os.path.join(work, "dies"))
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
    """Whether call ends in one clear line, rather than in a result, a traceback or two lines."""
    try:
        call()
    except SystemExit as e:
        return isinstance(e.code, str) and "\n" not in e.code
    return False

def same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b

def fault_damaged_checkpoints(work, rng, tries):
    path, whole, lost = os.path.join(work, "damaged.pt"), os.path.join(work, "whole", "ckpt.pt"), 0
    raw, sound = open(whole, "rb").read(), load_checkpoint(whole)
    for _ in range(tries):
        open(path, "wb").write(mutated(raw, rng))
        # a byte that means nothing may differ
        lost += not refused(lambda: load_model(path)) and not same(load_checkpoint(path), sound)
    return tries, lost

def fault_strange_checkpoints(work, rng, tries):
    """Well-formed files of someone else: parts missing, of a wrong type, absurd."""
    path, tried, lost = os.path.join(work, "strange.pt"), 0, 0
    sound = load_checkpoint(os.path.join(work, "whole", "best.pt"))
    wrong = [None, -1, 0, 10**12, "x", [], {}, 1e300, float("nan"), True, "../../x", torch.zeros(3)]
    while tried < tries:
        ckpt = copy.deepcopy(sound)
        part = (ckpt, ckpt["model_args"], ckpt["meta"], ckpt["model"])[rng.integers(4)]
        keys = ["tokenizer"] if part is ckpt["meta"] else list(part)
        key, value = keys[rng.integers(len(keys))], wrong[rng.integers(len(wrong))]
        # another number or word may be right
        alike = type(value) is type(part[key]) and not torch.is_tensor(value)
        if alike or key in ("iter_num", "best_loss") or isinstance(value, bool) and isinstance(part[key], int):
            continue
        if tried % 4:
            part[key] = value
        else:
            del part[key]
        tried += 1
        torch.save(ckpt, path)
        try:
            model, *_ = load_model(path)  # a setting that this model does not use may be missing or absurd
            lost += not same(dict(model.state_dict()), dict(sound["model"]))
        except SystemExit as e:
            lost += not isinstance(e.code, str) or "\n" in e.code
    return tried, lost

def fault_damaged_data(work, rng, tries):
    folder, lost = os.path.join(work, "data", "numbers"), 0
    for _ in range(tries):
        names = sorted(os.listdir(folder))
        path = os.path.join(folder, names[rng.integers(len(names))])
        raw = open(path, "rb").read()
        bad = mutated(raw, rng)
        open(path, "wb").write(bad)
        lost += bad != raw and not refused(lambda: prepare_data.load_meta(folder)) and json.loads(bad) != json.loads(raw)
        open(path, "wb").write(raw)
    return tries, lost

def fault_strange_data(work, rng, tries):
    """Data sets whose checksums are right and whose contents are not."""
    lost = 0
    for i in range(tries):
        folder, kind = os.path.join(work, "strange", "numbers"), i % 4
        shutil.copytree(os.path.join(work, "data", "numbers"), folder)
        meta = json.load(open(f"{folder}/meta.json"))
        if kind == 0:  # offsets beyond the end, or backwards
            idx = np.fromfile(f"{folder}/train.src.idx", dtype=np.int64)
            idx[rng.integers(len(idx))] = rng.choice([-5, 10**12])
            idx.tofile(f"{folder}/train.src.idx")
        elif kind == 1:  # ids beyond the vocabulary
            ids = np.fromfile(f"{folder}/val.tgt.bin", dtype=np.uint16)
            ids[rng.integers(len(ids))] = rng.integers(259, 2**16)
            ids.tofile(f"{folder}/val.tgt.bin")
        elif kind == 2:
            meta[("block_size", "vocab_size")[rng.integers(2)]] = int(rng.choice([-1, 0, 10**15]))
        else:
            meta[sorted(meta)[rng.integers(len(meta))]] = [None, "x", -1][rng.integers(3)]
        if kind < 2:
            for name in meta["files"]:
                path = f"{folder}/{name}"
                meta["files"][name] = [os.path.getsize(path), prepare_data.crc32(path)]
        json.dump(meta | {"checksum": prepare_data.checksum(meta)}, open(f"{folder}/meta.json", "w"))
        flags = [*TINY, "--data_dir=strange", "--out_dir=strange/out", "--max_iters=1"]
        p = start("train.py", *flags, cwd=work)
        err = p.communicate(timeout=60)[1].strip()
        lost += "Traceback" in err or p.returncode != 0 and len(err.splitlines()) != 1
        lost += kind < 3 and p.returncode == 0
        shutil.rmtree(os.path.join(work, "strange"))
    return tries, lost

def fault_wrong_flags(work, rng, tries):
    """Every flag of every script with a wrong type, a negative, a zero, a huge number and a misspelling: a result, or
    one line and exit code 2 that name the flag (a wrong name or place of a file may end in 1). A twentieth of them
    where tries is small."""
    base = {"train.py": [*TINY, "--max_iters=1", "--eval_rows=2"],
            "sample.py": ["--out_dir=whole", "--start=one", "--max_new_tokens=2", "--device=cpu"],
            "prepare_data.py": ["--dataset=recall", "--rows=50", "--data_dir=flags", "--force"],
            "bench.py": ["speed", "--lengths=8", "--only=copy", "--compile=0"]}
    files = "out_dir data_dir dataset source start input output ckpt csv json md png show mixers_from first nanogpt only"
    files = [f"--{name}" for name in files.split()]
    jobs = []
    for name, flags in base.items():
        for flag in sorted(set(re.findall(r"^  (--\w+)", run(name, "--help", cwd=work), re.M))):
            for word in ("=x?y", "=-1", "=0", "=1000000000000", "x=1"):
                jobs.append((name, flags, flag, flag + word))
    jobs = [job for job in jobs if tries > 9 or rng.random() < 0.05]

    def one(i, job):
        name, flags, flag, word = job
        out = os.path.join(work, f"flag {i:04d}")
        where = [f"--out_dir={out}"] if name == "train.py" and flag != "--out_dir" else []
        p = start(name, *flags, word, *where, cwd=work)
        try:
            said = p.communicate(timeout=8)[1].strip()
        except subprocess.TimeoutExpired:  # a run that goes on: it is to stop when told to
            p.send_signal(signal.SIGTERM)
            said = p.communicate(timeout=30)[1].strip()
        code, file = p.returncode, flag in files
        one_line = len(said.splitlines()) == 1 and (flag in said or file)
        fine = code in (0, 143) and "Traceback" not in said or one_line and (code == 2 or code == 1 and file)
        if word == f"{flag}x=1":
            fine = code == 2 and one_line
        elif word.endswith("?y") and not file:
            fine = fine and code != 0
        if not fine:
            print(name, word, code, said[-300:], file=sys.stderr)
        shutil.rmtree(out, ignore_errors=True)
        return not fine
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return len(jobs), sum(pool.map(one, range(len(jobs)), jobs))

def fault_any_text(work, rng, tries):
    """Any Unicode, control characters, line ends, a megabyte: one line out for each line in."""
    lost = 0
    for i in range(tries):
        odd = ["\u0000", "\ufeff", "\u2028", "\x85", "\x0b\x0c", "\U0001f642", "\u05e9\u05dc\u05d5\u05dd", "\ufffd",
               "\u0627\u202e\u0644", "a\u0301", "\r", "\t", " ", "", "x" * 2**20 if i == 0 else "y"]
        lines = []
        for _ in range(200):
            some = "".join(odd[k] for k in rng.integers(len(odd), size=rng.integers(4)))
            some += "".join(map(chr, rng.integers(32, 0xd7ff, size=rng.integers(20))))
            lines.append(some.rstrip("\r"))
        end = ("\n", "\r\n")[i % 2]
        with open(os.path.join(work, "any.txt"), "w", encoding="utf-8", newline="") as f:
            f.write(end.join(lines) + end)
        flags = ["--out_dir=whole", "--input=any.txt", "--output=any.out", "--max_new_tokens=4", "--device=cpu"]
        said = run("sample.py", *flags, cwd=work)
        got = open(os.path.join(work, "any.out"), encoding="utf-8", newline="").read().split("\n")
        lost += len(got) != len(lines) + 1 or i == 0 and "were cut" not in said or any("\r" in g for g in got)
    return tries * 200, lost

def growth(p, at=lambda: True):
    """Watch a process while at() holds -> how its memory, in bytes, and its open files grew over the second half."""
    seen = []
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(p.communicate)  # a pipe that nobody reads stops it
        while not ended.done():
            with contextlib.suppress(OSError, TypeError):  # it ends while we look
                status = open(f"/proc/{p.pid}/status").read()
                memory = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024
                if at():
                    seen.append((memory, len(os.listdir(f"/proc/{p.pid}/fd"))))
            time.sleep(0.05)
    assert p.returncode == 0 and len(seen) > 8, (p.returncode, len(seen))
    (memory, files), last = seen[len(seen) // 2], seen[-1]
    return last[0] - memory, last[1] - files

def fault_long_runs(work, rng, tries):
    """2,000 steps and 2,000 translated lines (300 each in a short test): memory and open files, end against middle."""
    if sys.platform != "linux":
        pytest.skip("growth reads what Linux's kernel tells of a process")
    n, path = 2000 if tries > 2 else 300, os.path.join(work, "long", "log.csv")

    def training():
        return 20 < len(open(path).readlines()) < n
    flags = [*TINY, "--mixer=wersa", f"--max_iters={n}", f"--eval_interval={n}", "--out_dir=long"]
    found = [growth(start("train.py", *flags, cwd=work), training)]
    with open(os.path.join(work, "long.txt"), "w") as f:
        f.writelines(f"{en(int(i))}\n" for i in rng.integers(10**6, size=n))
    flags = "--out_dir=whole --input=long.txt --output=long.out --max_new_tokens=40 --batch_size=8 --device=cpu"
    found.append(growth(start("sample.py", *flags.split(), cwd=work)))
    shutil.rmtree(os.path.join(work, "long"))
    return 2 * n, sum(memory > 2e6 + 500 * n or files > 0 for memory, files in found)

def fault_not_finite(work, rng, tries):
    """Steps whose loss is not finite are left out and counted; where none succeeds, training ends with advice."""
    source, lost = open(os.path.join(HERE, "train.py"), encoding="utf-8").read(), 0
    for i in range(tries):
        bad, value = sorted(rng.choice(range(1, 12), 3, replace=False).tolist()), ("nan", "inf")[i % 2]
        sick = source.replace("scaler.scale(loss * size * world)",
                              f"scaler.scale(loss * size * world * (float('{value}') if iter_num in {bad} else 1))")
        assert sick != source
        with open(os.path.join(work, "sick.py"), "w") as f:
            f.write(sick)
        p = popen(["sick.py", *TINY, "--mixer=haar", "--out_dir=sick"], work)
        p.communicate()
        rows = [r for r in logged(work, "sick") if r["loss"]]
        lost += p.returncode != 0 or [int(r["skipped"]) for r in rows] != [sum(b <= t for b in bad) for t in range(12)]
        weights = load_checkpoint(os.path.join(work, "sick", "ckpt.pt"))["model"].values()
        lost += not all(v.isfinite().all() for v in weights)
        shutil.rmtree(os.path.join(work, "sick"))
    flags = "--learning_rate=100 --grad_clip=0 --warmup_iters=0 --max_iters=300 --mixer=attention --dtype=float16"
    said = train(*flags.split(), "--out_dir=sick", cwd=work, code=1)
    return tries + 1, lost + ("steps in a row" not in said or "--learning_rate" not in said)

# how often, for each time that is asked for
OFTEN = {"number of processes changed": 0.2, "one of two processes dies": 0.2, "disk full": 0.25, "not finite": 0.25,
         "long runs": 0.2, "any text": 0.2, "damaged checkpoints": 5, "strange checkpoints": 5, "damaged data": 5}
FAULTS = {name[6:].replace("_", " "): f for name, f in list(globals().items()) if name.startswith("fault_")}

@each("name", FAULTS)
def test_faults(work, name):  # catches: what a user would lose overnight
    tried, lost = FAULTS[name](work, np.random.default_rng(0), math.ceil(OFTEN.get(name, 1)))
    assert tried and not lost

# -----------------------------------------------------------------------------
# data

NAMES = """
0 | zero | null
1 | one | eins
21 | twenty-one | einundzwanzig
101 | one hundred and one | einhunderteins
421 | four hundred and twenty-one | vierhunderteinundzwanzig
1001 | one thousand and one | eintausendeins
17000 | seventeen thousand | siebzehntausend
101000 | one hundred and one thousand | einhunderteintausend
312405 | three hundred and twelve thousand four hundred and five | dreihundertzwölftausendvierhundertfünf
2300001 | two million three hundred thousand and one | zwei Millionen dreihunderttausendeins
"""

def test_number_names():  # catches: "einsundzwanzig", "eintausendeinhundert" lost, a missing British "and"
    for line in NAMES.strip().splitlines():
        n, english, german = line.split(" | ")
        assert (en(int(n)), de(int(n))) == (english, german)
    assert len({de(n) for n in range(20000)}) == len({en(n) for n in range(20000)}) == 20000

def test_numbers_held_out_are_never_trained_on(tmp_path):
    # catches: held-out values in training, one row twice in a test
    folder = prepared(tmp_path, "numbers", rows=2000)
    tok = Tokenizer(prepare_data.load_meta(folder)["tokenizer"])
    ids, idx = prepare_data.read_ragged(folder, "train.src", "uint16")
    trained = {tok.decode(ids[i:j]) for i, j in zip(idx, idx[1:])}
    for split in ("val", "test"):
        rows = open(os.path.join(folder, f"{split}.src.txt")).read().split("\n")[:-1]
        assert len(set(rows)) == 1000 and not trained & set(rows)

def made(name, tmp_path, **flags):
    """-> the folder of a generated data set, its meta, and a function: split -> rows of words."""
    folder = prepared(tmp_path, name, **flags)
    meta = prepare_data.load_meta(folder)
    words = meta["tokenizer"]["words"]

    def rows(split):
        ids, idx = prepare_data.read_ragged(folder, f"{split}.src", meta["dtype"])
        return [[words[t - 3] for t in ids[i:j]] for i, j in zip(idx, idx[1:])]
    return folder, meta, rows

def labels_of(folder, split, name="label"):
    return np.fromfile(os.path.join(folder, f"{split}.{name}.bin"), dtype=np.int32)

DIGESTS = dict(numbers="3cafe6170ca1", listops="bfca5b66779b", lego="cbca611bfd40", recall="641cbef869dc",
               pathfinder="783775a10bb2")

@each("name", DIGESTS)
def test_generated_data_are_the_same_everywhere(name, tmp_path):
    # catches: order of a set or dict, a seed not used, a generator that follows the number of cores
    more = dict(min_len=5, max_len=60, max_depth=5) if name == "listops" else {}
    digests = []
    for i, seed in enumerate((1337, 1337, 7)):
        folder = prepared(tmp_path / str(i), name, rows=160, seed=seed, **more)
        files = [f for f in sorted(os.listdir(folder)) if f.endswith((".bin", ".idx", ".txt"))]
        whole = b"".join(open(os.path.join(folder, f), "rb").read() for f in files)
        digests.append(hashlib.sha256(whole).hexdigest()[:12])
    assert digests[0] == digests[1] == DIGESTS[name] != digests[2]

def value_and_depth(words):
    """A ListOps row read word by word with a stack: its value, its depth, how many arguments each operator has."""
    stack, depth, arguments = [[]], 0, []
    for w in words:
        if w[0] == "[":
            stack.append([w])
            depth = max(depth, len(stack) - 1)
        elif w == "]":
            op, *v = stack.pop()
            arguments.append(len(v))
            v.sort()
            middle = v[len(v) // 2] if len(v) % 2 else int((v[len(v) // 2 - 1] + v[len(v) // 2]) / 2)
            stack[-1].append({"[MIN": v[0], "[MAX": v[-1], "[MED": middle, "[SM": sum(v) % 10}[op])
        else:
            stack[-1].append(int(w))
    (value,), = stack
    return value, depth + 1, arguments  # the deepest operator's digits are one level below it

def test_listops_against_a_stack(tmp_path):
    # catches: a median rounded up, an argument beside its list, a row in train and test, lengths off by one
    folder, meta, rows = made("listops", tmp_path, rows=3000, min_len=20, max_len=90, max_depth=6)
    seen, arguments = {}, []
    for split in ("train", "val", "test", "long"):
        low, high = (90, 180) if split == "long" else (20, 90)
        for words, label in zip(rows(split), labels_of(folder, split), strict=True):
            value, depth, args = value_and_depth(words)
            assert value == label and low < len(words) < high and depth <= 6
            assert seen.setdefault(" ".join(words), split) == split
            arguments += args
    assert set(arguments) == set(range(2, 11)) and abs(np.mean(arguments) - 6) < 0.5
    assert max(value_and_depth(w)[1] for w in rows("long")) == 6
    trivial, votes = meta["splits"]["test"]["trivial"], {}
    for op in ("[MIN", "[MAX", "[MED", "[SM"):
        votes[op] = np.bincount([y for w, y in zip(rows("train"), labels_of(folder, "train")) if w[0] == op]).argmax()
    right = [votes[w[0]] == y for w, y in zip(rows("test"), labels_of(folder, "test"))]
    assert trivial["root operator"] == np.mean(right) > trivial["majority class"] > 0.1
    with pytest.raises(SystemExit, match="only 4.. different rows"):
        prepare_data.listops(tmp_path, rows=1000, min_len=1, max_len=5, max_depth=2)

def test_lego_chains_can_be_followed(tmp_path):
    # catches: a clause that names the wrong letter, a label out of step with the clauses, later links told in training
    folder, meta, rows = made("lego", tmp_path, rows=300, n_links=8, n_tr=3)
    for split, links, told in (("train", 8, 3), ("val", 8, 3), ("test", 8, 8), ("long", 16, 16)):
        labels, groups = (labels_of(folder, split, name).reshape(-1, links, 5) for name in ("label", "group"))
        assert (labels[..., 1:] == -1).all() and (groups[..., 1:] == 0).all()
        for words, label, group in zip(rows(split), labels[..., 0], groups[..., 0], strict=True):
            clauses = [words[i:i + 5] for i in range(0, len(words), 5)]
            of = {c[0]: (c[3], c[2] == "-") for c in clauses}
            for c, y, g in zip(clauses, label, group):
                letter, minus, link = c[0], 0, 0
                while letter != "1":
                    letter, flip = of[letter]
                    minus ^= flip
                    link += 1
                assert link == g and y == (minus if link <= told else -1)

def test_recall_rows_answer_themselves(tmp_path):
    # catches: a key with two values, an answer before its question, a key that is never asked
    folder, meta, rows = made("recall", tmp_path, rows=300, n_pairs=8, n_keys=40)
    index = meta["tokenizer"]["words"].index
    for split, sizes in (("train", {1, 2, 4, 8}), ("test", {1, 2, 4, 8}), ("long", {16, 32})):
        labels, groups, at, seen = labels_of(folder, split), labels_of(folder, split, "group"), 0, set()
        for words in rows(split):
            p, end = (len(words) + 1) // 4, at + len(words)
            told = dict(zip(words[:2 * p:2], words[1:2 * p:2]))
            assert len(words) == 4 * p - 1 and len(told) == p and sorted(told) == sorted(words[2 * p::2])
            want = [-1] * 2 * p
            for key in words[2 * p::2]:
                want += [index(told[key]) + 3, -1]
            assert labels[at:end].tolist() == want[:-1] and (groups[at:end] == p).all()
            at = end
            seen.add(p)
        assert at == len(labels) and seen == sizes

def follow(image):
    """Whether the second disc of a Pathfinder picture can be reached from the first over lit pixels, never stepping
    farther than the gap between two dashes."""
    box, join = {32: (1, 5), 128: (2, 53)}[len(image)]  # a disc's half, the longest step squared
    view = np.lib.stride_tricks.sliding_window_view(np.pad(image.astype(int), box), (2 * box + 1,) * 2)
    windows, discs = view.sum((2, 3)), []
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
    # catches: contours that touch, a gap wider than the way to the next contour, discs on the wrong ends
    images, labels = prepare_data.pathfinder_images(count, size, seed=3)
    assert [follow(i) for i in images] == labels.tolist() and 0.4 < labels.mean() < 0.6
    assert not np.array_equal(images[:9], prepare_data.pathfinder_images(9, size, seed=4)[0])
    ink = images.reshape(count, -1).astype(float).sum(1)
    assert abs(np.corrcoef(ink, labels)[0, 1]) < 0.25

def test_token_labels_groups_and_longer_rows_through_training(work):
    # catches: labels shifted against their tokens, groups of another row, a longer test that is silently cut
    prepared(work, "lego", rows=400, n_links=2, n_tr=1)
    prepared(work, "recall", rows=800, n_pairs=2, n_keys=4)
    more = ("--n_embd=32 --max_iters=200 --eval_interval=100 --learning_rate=1e-2 --log_interval=100 --dropout=0 "
            "--mixer=attention").split()
    said = train(*more, "--dataset=lego", "--out_dir=lego", cwd=work)
    result = result_of(work, "lego")
    assert result["test"]["groups"]["1"] > 0.95 and set(result["test"]["groups"]) == {"1", "2"}
    assert 0.4 < result["trivial"]["majority class"] < 0.6 and "trivial: majority class" in said
    assert set(result["far"][0]["groups"]) == {"1", "2", "3", "4"} and result["far"][0]["block_size"] >= 20
    assert "a=-1" in run("sample.py", "--out_dir=lego", "--start=a = - 1 ; b = + a ;", cwd=work)
    train(*more, "--dataset=recall", "--out_dir=recall", "--n_layer=2", cwd=work)
    result = result_of(work, "recall")
    assert result["test"]["groups"]["1"] > 0.9 and set(result["far"][0]["groups"]) == {"4"}
    assert result["test_metric"] > result["trivial"]["a value of the row"]
    flags = ["--out_dir=recall", "--start=k1 v2 k1", "--max_new_tokens=1", "--temperature=0"]
    assert run("sample.py", *flags, cwd=work).startswith("k1 v2 k1 v2")

def test_evaluation_is_the_loop_over_rows(work):
    # catches: a last batch that weighs as much as a full one, padding counted as right, another split at far lengths
    train("--mixer=attention", "--out_dir=far", "--max_iters=4", "--eval_block_size=120", cwd=work)
    result, (model, tok, meta) = result_of(work, "far"), load_model(os.path.join(work, "far", "best.pt"))
    for found, split, n in ((result["test"], "test", 1000), (result["far"][0], "long", 500)):
        loss = right = count = 0
        files = [os.path.join(work, "data", "numbers", f"{split}.{side}.txt") for side in ("src", "tgt")]
        src, tgt = (open(f, encoding="utf-8").read().split("\n")[:-1] for f in files)
        for a, b in zip(src, tgt):
            a, b = tok.encode(a), tok.encode(b)
            want = torch.tensor(b + [2])
            with torch.no_grad():
                logits, _ = model(torch.tensor([[1] + b]), src=torch.tensor([a + [2]]))
            loss += F.cross_entropy(logits[0], want, reduction="sum").item()
            right += (logits[0].argmax(-1) == want).sum().item()
            count += len(want)
        assert abs(found["loss"] - loss / count) < 1e-4 and abs(found["accuracy"] - right / count) < 2e-4
        assert len(src) == n
    assert result["far"][0]["split"] == "long" and result["far"][0]["block_size"] == 120

def test_roc_auc_and_the_leak_alarm(work):
    # catches: ties counted whole, an alarm that never rings, one that rings on generated words
    source = open(os.path.join(HERE, "train.py"), encoding="utf-8").read()
    scope = dict(np=np)
    exec(re.search(r"def roc_auc.*?(?=\n\S)", source, re.S)[0], scope)
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 6, 200), rng.random(200) < 0.3
    wins = [(a > b) + (a == b) / 2 for a in score[positive] for b in score[~positive]]
    assert abs(scope["roc_auc"](score, positive) - np.mean(wins)) < 1e-12
    for name, words in (("en", "the same words again\n"), ("de", "immer die gleichen Worte\n")):
        with open(os.path.join(work, name), "w") as f:
            f.write(words * 400)
    prepared(work, "parallel", source=f"{work}/en,{work}/de", vocab_size=260)
    flags = ("--dataset=parallel --mixer=attention --out_dir=alarm --max_iters=100 --eval_interval=50 "
             "--learning_rate=1e-2 --log_interval=50")
    said = train(*flags.split(), cwd=work)
    assert said.count("warning: perplexity") >= 1 and "nrefs:1|case:mixed" in said
    assert "warning: perplexity" not in train("--mixer=haar", "--out_dir=quiet", "--max_iters=1", cwd=work)

def test_translation_data_from_the_hubs_layout(tmp_path):
    # catches: a BPE that has seen the test set, lost umlauts, rows with an empty side, sides drifting apart
    for split, n in (("train", 60), ("val", 5), ("test", 5)):
        rows = [dict(en=f"{split} sentence {i}: {en(i)}.", de=f"Satz {i}: {de(i)}, größer.") for i in range(n)]
        rows += [dict(en="x", de="")] * (split == "train")
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    folder = prepared(tmp_path, "multi30k", source=str(tmp_path), vocab_size=300)
    meta = prepare_data.load_meta(folder)
    assert meta["splits"]["train"]["rows"] == 60 and sum(meta["skipped"].values()) == 1 and meta["vocab_size"] <= 300
    tok = Tokenizer(json.loads(json.dumps(meta["tokenizer"])))
    ids, idx = prepare_data.read_ragged(folder, "val.tgt", "uint16")
    decoded = [tok.decode(ids[i:j]) for i, j in zip(idx, idx[1:])]
    assert decoded == open(f"{folder}/val.tgt.txt").read().split("\n")[:-1]
    assert tok.decode(tok.encode("neue Wörter 🙂")) == "neue Wörter 🙂"

def write_parquet(path, **columns):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)

def test_imdb_from_the_hubs_layout_trains_an_encoder(tmp_path):
    # catches: a test row that chose the checkpoint, labels out of step with skipped rows, accuracy over a batch only
    for split, n in (("train", 200), ("test", 40)):
        texts = [("good " if i % 2 else "bad ") * (1 + i % 3) + f"{split} {i}" for i in range(n)] + [""]
        path = tmp_path / "plain_text" / f"{split}-00000-of-00001.parquet"
        write_parquet(path, text=texts, label=[i % 2 for i in range(n)] + [0])
    meta = prepare_data.load_meta(prepared(tmp_path, "imdb", source=str(tmp_path)))
    sizes = [meta["splits"][s]["rows"] for s in ("train", "val", "test")]
    assert sizes == [180, 20, 40] or sum(meta["skipped"].values()) == 2
    flags = ("--dataset=imdb --mixer=wersa --block_size=32 --max_iters=100 --log_interval=50 --eval_interval=50 "
             "--learning_rate=5e-3 --metric_rows=40 --out_dir=out")
    said = train(*flags.split(), cwd=tmp_path)
    assert float(re.search(r"test accuracy ([\d.]+) \(n=40", said)[1]) > 0.95
    assert run("sample.py", "--start=good good movie", cwd=tmp_path).startswith("positive\t")

def test_cifar10_from_the_hubs_layout(tmp_path):  # catches: colours read as three rows, labels named wrongly
    image = pytest.importorskip("PIL.Image")

    def png(i):
        pixels = np.full((32, 32, 3), (10 + i % 2 * 200, 0, i), dtype=np.uint8)
        image.fromarray(pixels).save(f := io.BytesIO(), "PNG")
        return dict(bytes=f.getvalue(), path=None)
    for split, n in (("train", 100), ("test", 30)):
        path = tmp_path / "c" / "plain_text" / f"{split}-00000-of-00001.parquet"
        write_parquet(path, img=[png(i) for i in range(n)], label=[i % 2 for i in range(n)])
    folder = prepared(tmp_path, "cifar10", source=str(tmp_path / "c"))
    meta = prepare_data.load_meta(folder)
    ids, idx = prepare_data.read_ragged(folder, "test.src", meta["dtype"])
    assert [meta["splits"][s]["rows"] for s in ("train", "val", "test")] == [90, 10, 30] and set(np.diff(idx)) == {1024}
    assert ids[idx[2]] == 3 + int(10 * 0.299 + 2 * 0.114) and ids[idx[3]] == 3 + int(210 * 0.299 + 3 * 0.114 + 0.5)
    assert meta["classes"][0] == "airplane"
    flags = "--dataset=cifar10 --mixer=haar --learning_rate=1e-2 --max_iters=20 --out_dir=c10".split()
    train(*flags, cwd=tmp_path)
    assert result_of(tmp_path, "c10")["test"]["auc"] > 0.9
    (tmp_path / "x.png").write_bytes(png(1)["bytes"])
    (tmp_path / "y.png").write_bytes(b"no image")
    said = run("sample.py", "--out_dir=c10", "--start=FILE:x.png", cwd=tmp_path)
    assert said.split("\t")[0] in ("airplane", "automobile")
    said = run("sample.py", "--out_dir=c10", "--start=FILE:y.png", cwd=tmp_path, code=1)
    assert "cannot be read as an image" in said

def test_arxiv_from_the_hubs_layout(tmp_path):  # catches: documents cut in the files, a class that the text spells
    for config in ("no_ref", "default"):
        for split, n in (("train", 40), ("validation", 10), ("test", 12)):
            rows = [(f"{config} " + "abc"[i % 3] * (40 + i)) * (i % 4) for i in range(n)]
            path = tmp_path / "a" / config / split / "0000.parquet"
            write_parquet(path, text=rows, label=[i % 3 for i in range(n)])
    folder = prepared(tmp_path, "arxiv", source=str(tmp_path / "a"), tokenizer="bytes", min_len=60)
    meta = prepare_data.load_meta(folder)
    ids, idx = prepare_data.read_ragged(folder, "train.src", meta["dtype"])
    assert bytes((ids[:7] - 3).astype(np.uint8)) == b"no_ref " and np.diff(idx).min() >= 60
    short = sum((47 + i) * (i % 4) < 60 for i in range(40))
    assert meta["skipped"]["train: shorter than 60 tokens, left out"] == short and len(meta["classes"]) == 3
    flags = "--dataset=arxiv --mixer=wersa --block_size=131072 --batch_size=2 --max_iters=2 --out_dir=ax"
    said = train(*flags.split(), cwd=tmp_path)
    assert "block 131,072" in said and "test AUC" in said

def test_preparation_is_all_or_nothing(tmp_path):
    # catches: a half-written folder taken for a data set, temporary files left, another format read as this one
    for source, words in (("", "empty"), ("  \n", "empty"), ("abc", "too short")):
        (tmp_path / "t").write_text(source)
        with pytest.raises(SystemExit, match=words):
            prepared(tmp_path, "text", source=str(tmp_path / "t"), tokenizer="bytes")
    path = os.path.join(HERE, "prepare_data.py")
    p = popen(["-c", LIMITED, "20000", path, "--dataset=lego", "--rows=20000"], tmp_path)
    err = p.communicate()[1]
    assert p.returncode == 1 and err.strip().splitlines()[-1].startswith("data/lego cannot be made")
    p = start("prepare_data.py", "--dataset=listops", cwd=tmp_path)
    while not any("tmp" in f for f in os.listdir(tmp_path / "data")):
        time.sleep(0.01)
    time.sleep(0.3)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=30)
    assert p.returncode == 130 and "nothing was changed" in err and "Traceback" not in err
    assert os.listdir(tmp_path / "data") == []
    run("prepare_data.py", "--dataset=listops", "--rows=20", "--min_len=5", "--max_len=30", cwd=tmp_path)
    assert os.listdir(tmp_path / "data") == ["listops"]
    path = tmp_path / "data" / "listops" / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(dict(meta, format=1)))
    said = train("--dataset=listops", cwd=tmp_path, code=1)
    assert "has format 1 and this code reads" in said and "--force" in said and said.count("\n") == 1
    began = time.time()
    with pytest.raises(SystemExit, match="--source=DIR"):
        os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
        prepared(tmp_path, "cifar10")
    assert time.time() - began < 15 and os.listdir(tmp_path / "data") == ["listops"]

def test_damaged_data_is_one_line(tmp_path):  # catches: a truncated file read as a shorter data set
    folder = prepared(tmp_path, "numbers", rows=100)
    with open(f"{folder}/train.src.bin", "ab") as f:
        f.write(b"x")
    with pytest.raises(SystemExit, match="train.src.bin is missing or has a wrong size"):
        prepare_data.load_meta(folder)
    for name, content in dict(a=b"one\ntwo\nthree\n", b=b"eins\nzwei\n", c=b"ab\xff").items():
        (tmp_path / name).write_bytes(content)
    for other, words in (("b", "3 lines and .*2"), ("c", "not UTF-8"), ("none", "no .*none")):
        with pytest.raises(SystemExit, match=words):
            prepared(tmp_path, "parallel", source=f"{tmp_path}/a,{tmp_path}/{other}")
    assert os.listdir(tmp_path / "data") == ["numbers"]

# -----------------------------------------------------------------------------
# bench.py, README

SCRIPTS = ("bench.py", "model.py", "prepare_data.py", "sample.py", "train.py")

def test_speed_bench(tmp_path):  # catches: a base that is left out, a peak that no cell owns, a run that is not added
    flags = ["speed", "--lengths=64,512", "--only=wersa, causal, m=128", "--compile=0", "--prompt=300", "--json=s.json"]
    said = run("bench.py", *flags, "--png=s.png", cwd=tmp_path)
    run("bench.py", "speed", "--lengths=64", "--only=copy", "--compile=0", "--json=s.json", cwd=tmp_path)
    one, two = json.load(open(tmp_path / "s.json"))
    cells = {(c["arm"], c["T"], c["form"]): c for c in one["cells"]}
    eager = {(arm, T) for arm, T, form in cells if form == "eager"}
    assert eager == set(product(("flash SDPA, causal", "wersa, causal, m=128"), (64, 512)))
    for T in (64, 512):
        c = cells["wersa, causal, m=128", T, "eager"]
        assert c["seconds"] > 0 and c["memory"] > 2**12 * T // 64
        assert c["ratio"][0] <= c["ratio"][1] <= c["ratio"][2] and f"{c['ratio'][1]:.2f}" in said
    assert {c["arm"] for c in two["cells"]} == {"copy"} and (tmp_path / "s.png").stat().st_size > 10_000
    decode = cells["wersa, causal, m=128", 300, "decode"]
    assert min(decode["ms"]) > 0

def test_crossover():  # catches: a crossover below a length at which it loses
    import bench
    for wins, want in (("110", "not up to 4"), ("011", "2"), ("101", "4"), ("111", "1")):
        cells = {("x", 2 ** i, "eager"): dict(sure=win == "1") for i, win in enumerate(wins)}
        assert bench.crossover(cells, "x", "eager") == want

def test_fast_forward_is_the_state_at_that_position():
    # catches: a decode timing at position 0 that claims to be one at 65,536
    import bench
    for text in ("attention", "haar", "wersa", "wavspa levels=1", "wavspa levels=1 inner=wersa"):
        m = mixer(text, n_embd=8)
        _, state = continued(m, rand(1, 40, 8), 40)
        ahead = bench.fast_forward(m.init_state(1), 40)
        m(rand(1, 1, 8), state=ahead)
        for a, b in zip(tree_leaves(ahead), tree_leaves(state), strict=True):
            assert a.shape == b.shape if torch.is_tensor(a) else a == b == 40

def test_the_tables_and_figures_come_from_the_csv(tmp_path):
    # catches: a table that no longer says what was measured, a figure that nothing draws
    for name in (*SCRIPTS, "README.md"):
        shutil.copy(os.path.join(HERE, name), tmp_path)
    shutil.copytree(os.path.join(HERE, "results"), tmp_path / "results")
    p = popen(["bench.py", "report"], tmp_path)
    _, err = p.communicate()
    assert p.returncode == 0 and "Traceback" not in err, err
    for name in ("README.md", "results/README.md"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert text == open(os.path.join(HERE, name), encoding="utf-8").read(), name
        for figure in re.findall(r"\(((?:results/|first/)?[\w/]+\.png)\)", text):
            assert (tmp_path / name).parent.joinpath(figure).exists(), figure
    rows = list(csv.DictReader(open(os.path.join(HERE, "results", "first", "decoders.csv"))))
    mine = [r for r in rows if r["arm"] == "attention" and r["learning_rate"] == "0.004"]
    score = [float(r["test_metric"]) for r in mine]  # and by hand, for one of them
    assert f"| attention | 820,736 | {np.mean(score):.3f} ± {np.std(score, ddof=1):.3f} |" in text

MINIATURE = """import sys, bench
s = bench.SUITES['smoke']
s['arms'] = {'recall: haar': s['arms']['recall: haar']}
s['prepare']['recall']['rows'] = 400
s.update(seeds=(1, 2), rates=(2e-3, 0.0))
s['base'] += ['--max_iters=4', '--eval_interval=2', '--eval_rows=2', '--metric_rows=1']
sys.argv = ['bench.py', 'quality']
bench.quality(bench.argparse.Namespace(suite='smoke', data_dir='data', source=None, jobs=1, only='haar'))
"""
CHOSEN = """arm,seed,learning_rate,val_loss,test_metric
a,1,1,2.0,0.9\na,1,2,1.0,0.5\na,2,2,9.0,0.4
b,1,1,,0.9\nb,2,1,3.0,0.8\nb,1,2,2.0,0.5
c,1,1,,0.9\nc,1,2,2.0,0.5\nd,1,1,nan,0.9\nd,1,2,2.0,0.5
"""

def test_a_suite_appends_rows_and_skips_them(tmp_path):
    # catches: a finished run trained again, an interrupted one begun again, a row that lacks its flags, a rate chosen
    # on the test set, by seeds that not all rates saw or by a row without a loss
    for name in SCRIPTS:
        shutil.copy(os.path.join(HERE, name), tmp_path)
    (tmp_path / "miniature.py").write_text(MINIATURE)
    runs, results = tmp_path / "data" / "runs" / "smoke", tmp_path / "results" / "smoke.csv"
    first = popen(["miniature.py"], tmp_path, start_new_session=True)
    while not list(runs.glob("*/ckpt.pt")) and first.poll() is None:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGINT)
    assert first.wait() and not results.exists() and len(list(runs.iterdir())) == 1  # and none begun after it
    said = [popen(["miniature.py"], tmp_path).communicate()[0] for _ in range(2)]
    assert re.findall(r"(\d of \d) runs", said[0]) == ["2 of 2", "1 of 1"], said
    assert re.findall(r"(\d of \d) runs", said[1]) == ["0 of 2", "0 of 1"], said
    assert not list(runs.iterdir())  # a run that begins anew moves the earlier one aside
    rows = list(csv.DictReader(open(results)))
    assert [(r["seed"], r["learning_rate"]) for r in rows] == [("1", "0.002"), ("1", "0.0"), ("2", "0.002")]
    for r in rows:
        assert r["arm"] == "recall: haar" and "--mixer=haar" in r["flags"] and float(r["val_loss"]) > 0 and r["machine"]
    import bench
    (tmp_path / "x.csv").write_text(CHOSEN)
    best = bench.arms_of(tmp_path / "x.csv")
    chosen = [[r["test_metric"] for r in best[arm]] for arm in "abcd"]
    assert chosen == [["0.5", "0.4"], ["0.5"], ["0.5"], ["0.5"]]
    results.write_text(results.read_text().replace(f",{rows[0]['data_tokens']},", ",7,"))
    other = popen(["miniature.py"], tmp_path)
    _, err = other.communicate()
    assert other.returncode and "has rows of another recall, of 7 training tokens" in err

def test_arms_are_matched():  # catches: an arm larger than what it is compared with, a flag that train.py does not take
    import bench
    for path in glob.glob(os.path.join(HERE, "results", "**", "*.csv"), recursive=True):
        name = os.path.basename(path)[:-4]
        rows = list(csv.DictReader(open(path)))
        if name not in ("tasks", "numbers", "positions", "smoke"):
            base = next(int(r["params"]) for r in rows if r["arm"] == "attention")
            assert all(abs(int(r["params"]) / base - 1) < 0.1 for r in rows), path
    flags = set(re.findall(r"--\w+", run("train.py", "--help", cwd=HERE)))
    for suite in bench.SUITES.values():
        reference = [*suite["base"], *next(iter(suite["arms"].values()))]
        for arm in suite["arms"].values():
            words = [*suite["base"], *arm]
            assert {w.split("=")[0] for w in words} <= flags, words
            if suite["match"] and bench.last(arm, "n_embd") is None:
                meta = dict(arch="encoder" if "fourier" in str(words) else "encdec", vocab_size=300, block_size=64)
                for f in (bench.matched(words, reference, meta), reference):
                    with torch.device("meta"):
                        m = WaveletTransformer(bench.config_of(f, **meta))
                    if f is not reference:
                        mine = m.num_params()
                assert abs(mine / m.num_params() - 1) < 0.1, words

def test_every_control_keeps_the_promises():
    # catches: a control of the experiments that leaks, forgets, or reads padding: no control then
    import bench
    assert {"conv", "lazy", "random", "shortconv", "multires"} <= M.MIXERS.keys() and bench
    for name in ("conv", "lazy", "random", "shortconv", "multires", "softmax"):
        test_no_leak(name)
        test_any_cut_equals_the_whole(name)
        for causal in BOTH:
            test_masks(name, causal)
            test_every_parameter_learns(name, causal)

def test_readme_commands_parse_and_the_snippet_runs():  # catches: a renamed flag, a snippet that has gone stale
    readme = open(os.path.join(HERE, "README.md"), encoding="utf-8").read()
    found = r"^(?:\$ )?(?:.*&& )?(?:python|torchrun .*?) ?((?:train|sample|prepare_data|bench)\.py.*?)(?: +#.*)?$"
    commands = re.findall(found, readme, re.M)
    assert len(commands) >= 6
    scripts = sorted({c.split()[0] for c in commands})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        helps = dict(zip(scripts, pool.map(lambda s: run(s, "--help", cwd=HERE), scripts)))
    assert not [line for text in helps.values() for line in text.splitlines() if len(line) > 80]
    for c in commands:
        script, *words = shlex.split(c)
        flags = set(re.findall(r"--\w+", helps[script]))
        assert {w.split("=")[0] for w in words if w.startswith("--")} <= flags, c
    snippets = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})

# python test_model.py 20 [flags text]: every fault (whose name holds a word) so many times, as a table
if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as d:
        prepared(d, "numbers", rows=400)
        train("--mixer=haar", "--out_dir=whole", cwd=d)
        print("| fault | tries | lost |\n|---|---|---|", flush=True)
        for name, f in FAULTS.items():
            if not sys.argv[2:] or any(word in name for word in sys.argv[2:]):
                tried, lost = f(d, np.random.default_rng(0), math.ceil(int(sys.argv[1]) * OFTEN.get(name, 1)))
                print(f"| {name} | {tried:,} | {lost} |", flush=True)
