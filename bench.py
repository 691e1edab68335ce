"""
Measure: what every mixer promises, how fast it is, what trained models score.

    python bench.py variants  # reconstruction, leak, chunks, state of every variant
    python bench.py speed --json=results/speed.json  # time and memory beside flash attention, by turns
    python bench.py steps --nanogpt=DIR  # whole training steps beside nanoGPT's
    python bench.py compiled  # what the compiler costs, and from which step on it pays
    python bench.py flops  # operations of each mixer by length, counted
    python bench.py transforms  # dwt and idwt beside PyWavelets and ptwt
    python bench.py gpu --nanogpt=DIR  # all of it that wants a GPU, in pieces, results/gpu-*.json
    python bench.py quality --suite=numbers  # train a grid, one row of results/numbers.csv per run
    python bench.py curves out-a out-b  # log.csv of several runs, laid over one another
    python bench.py report  # results/ -> tables in both READMEs, and the figures

Rows that a suite's CSV has are skipped: it may be stopped at any time and started again. The experiments'
controls and peers are mixers that register themselves when this file is imported:

    python train.py --mixers_from=bench.py --mixer=shortconv
"""

import csv
import dataclasses
import gzip
import importlib
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from threading import Lock

import numpy as np
import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import model
from model import CHOICES, MIXERS, ModelConfig, build_mixer
from prepare_data import Parser, comma_separated, draw_curves, prepare, replacing, writable
from sample import compile_blocks, keep_freed_pages, register

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

# -----------------------------------------------------------------------------
# controls and peers: mixers that are no part of the model, each a subclass of one that is

def short(x, taps, causal, mask=None, past=None):
    """x (B,T,C), each channel convolved with its own taps (F, C) -> y (B,T,C), past for the next chunk."""
    if mask is not None:
        x = x * mask[..., None]
    T, reach = x.size(1), len(taps) - 1
    if past is None:
        ahead = 0 if causal else reach // 2
        x = nn.functional.pad(x, (0, 0, reach - ahead, ahead))
    else:
        x = torch.cat((past, x), 1)
    return sum(taps[m] * x[:, m:m + T] for m in range(len(taps))), x[:, T:].clone()

class Conv(model.Attention):
    """Control for wavspa: a learned convolution of 4 taps a channel, then attention. No transform."""

    def __init__(self, cfg, causal=False):
        super().__init__(cfg, causal)
        self.taps = nn.Parameter(torch.randn(4, cfg.n_embd) / 2)

    def init_state(self, B, device=None, dtype=None):
        past = torch.zeros(B, 3, self.taps.size(1), device=device, dtype=dtype)
        return past, super().init_state(B, device, dtype)

    def forward(self, x, mask=None, state=None):
        past, state = (None, None) if state is None else state
        x, past = short(x, self.taps, self.causal, model.as_mask(mask), past)
        y = super().forward(x, mask, state)
        return y if state is None else (y[0], (past, y[1]))

class Lazy(model.Wavspa):
    """Control for wavspa: a "wavelet" that only parts even from odd samples."""

    def __init__(self, cfg, causal=False):
        super().__init__(replace(cfg, mixer="wavspa", wavelet="haar", wavelet_params="fixed"), causal)
        self.wavelet.taps.copy_(torch.eye(2))  # low (1, 0), high (0, 1)

class Random(model.Wavspa):
    """Control for wavspa: 4 random orthonormal taps, drawn once and kept with the weights."""

    def __init__(self, cfg, causal=False):
        super().__init__(replace(cfg, mixer="wavspa", wavelet="db2", wavelet_params="fixed"), causal)
        pair = model.lattice(model.rotations(2 * math.pi * torch.rand(2, 1)))
        self.wavelet.taps.copy_(torch.stack(pair)[..., 0])  # (2, 4)

class ShortConv(model.Wersa):
    """Control for wersa: no wavelets, but a learned convolution of 4 taps on q and k (arXiv 2505.15105)."""

    def __init__(self, cfg, causal=False):
        super().__init__(replace(cfg, mixer="wersa", levels=0), causal)
        self.taps = nn.Parameter(torch.randn(4, 2 * cfg.n_embd) / 2)
        self.L = 1  # so that forward weighs q and k

    def init_state(self, B, device=None, dtype=None):
        t, total, _, S = super().init_state(B, device, dtype)
        return t, total, torch.zeros(B, 3, self.taps.size(1), device=device, dtype=dtype), S

    def weigh(self, qk, mean, mask, past):
        return short(qk, self.taps, self.causal, mask, past)

class OnePair(model.Wavelet):
    """A learned filter pair that all levels share."""

    def __init__(self, name, L, C):
        super().__init__(name, "free", L, C)
        if L > 0:
            one = self.taps.detach()[:1]  # (1, 2, F, C)
            self.taps = nn.Parameter(one + 0.02 * torch.randn_like(one))

    def filters(self, l, **kw):
        return super().filters(0, **kw)

class Multires(model.Haar):
    """Peer of haar: MultiresConv (arXiv 2305.01638) with two taps, one filter pair for all levels."""

    def __init__(self, cfg, causal=False):
        super().__init__(replace(cfg, mixer="haar", wavelet_params="free", undecimated="yes"), causal)
        self.wavelet = OnePair(cfg.wavelet, self.L, cfg.n_embd)

class Dilated(Multires):
    """Multires as its authors write it: a grouped, dilated conv1d a filter. To be timed; it has no state."""

    def forward(self, x, mask=None):
        low, high = (taps.mT[:, None].contiguous() for taps in self.wavelet.filters(0))  # (C, 1, 2)
        a, y = x.mT, 0
        for l in range(self.L):
            padded = nn.functional.pad(a, (2 ** l, 0))
            d = nn.functional.conv1d(padded, high, dilation=2 ** l, groups=len(high))
            a = nn.functional.conv1d(padded, low, dilation=2 ** l, groups=len(low))
            y = y + self.weight[l].mT * d
        y = y + self.weight[self.L].mT * a
        return self.c_proj(y.mT)

class Softmax(model.Attention):
    """What the papers compare with: attention that stores its T x T matrix."""

    def forward(self, x, mask=None, state=None):
        with sdpa_kernel(SDPBackend.MATH):
            return super().forward(x, mask, state)

MIXERS.update(conv=Conv, lazy=Lazy, random=Random, shortconv=ShortConv, multires=Multires, softmax=Softmax)

# -----------------------------------------------------------------------------
# variants

def all_variants():
    """Every causal mixer, the wavelet ones with each wavelet and what is learned of it, as config fields."""
    for mixer in MIXERS:
        if mixer in ("haar", "wavspa", "wersa"):
            for wavelet in ("haar", "db2"):
                for learned in CHOICES["wavelet_params"][1:]:
                    yield dict(mixer=mixer, wavelet=wavelet, wavelet_params=learned)
        elif mixer != "fourier":  # it has no causal form
            yield dict(mixer=mixer)
    yield dict(mixer="haar", gate=False)
    yield dict(mixer="haar", undecimated="no")
    yield dict(mixer="wavspa", inner="wersa", wavspa_shared=False, levels=3)
    yield dict(mixer="wersa", feature_map="exp")
    yield dict(mixer="wersa", levels=0)
    yield dict(mixer="attention", window=16)

def state_bytes(state):
    if torch.is_tensor(state):
        return state.numel() * state.element_size()
    return sum(map(state_bytes, state)) if isinstance(state, (list, tuple)) else 0

def leaking_positions(m, x, y):
    """How many outputs move, by a bit, when only tokens behind them change."""
    leak = 0
    for t in (1, 2, 3, 7, 8, 15, 16, 31, 33, 63, 100, 255):
        other = x.clone()
        other[:, t:] = 100 * torch.randn_like(other[:, t:])
        leak += (m(other)[:, :t] != y[:, :t]).any(-1).sum(1).max().item()
    return leak

def in_chunks(m, x, cuts):
    """x (B,T,C) read from cut to cut -> y, and the state's bytes a row at each cut."""
    state, ys, sizes = m.init_state(len(x), x.device, x.dtype), [], {}
    for start, end in zip([0, *cuts], cuts):
        y, state = m(x[:, start:end], state=state)
        ys.append(y)
        sizes[end] = state_bytes(state) // len(x)
    return torch.cat(ys, 1), sizes

def reconstruction(m):
    """max |idwt(dwt(x)) - x| of a mixer's own transform, its parameters shaken first, if it has one."""
    for w in m.modules():
        if isinstance(w, model.Wavelet) and w.L > 0:
            for q in w.parameters():
                q.add_(0.3 * torch.randn_like(q))
            x = torch.randn(2, 256, w.C, device=w.taps.device)
            return f"{(w.idwt(w.dwt(x)) - x).abs().max():.0e}"
    return ""

def pad_error(fields, x):
    """max |y - y'| of an encoder's rows with and without 56 rows of noise behind them, which a mask hides."""
    T = x.size(1) - 56
    cfg = ModelConfig(arch="encoder", n_embd=x.size(2), block_size=256, **fields)
    m = build_mixer(cfg).to(x.device).eval()
    mask = torch.arange(x.size(1), device=x.device).expand(len(x), -1) < T
    return (m(x, mask)[:, :T] - m(x[:, :T], mask[:, :T])).abs().max().item()

@torch.no_grad()
def variants(args):
    """256 tokens, C = 64: what the promises come to, on the GPU if there is one."""
    rows = []
    for fields in all_variants():
        torch.manual_seed(0)
        m = build_mixer(ModelConfig(n_embd=64, block_size=256, **fields), causal=True).to(DEVICE).eval()
        x, cuts = torch.randn(2, 256, 64), sorted({64, 256, *torch.randint(1, 256, (8,)).tolist()})
        x = x.to(DEVICE)
        y = m(x)
        with torch.autocast(DEVICE, torch.bfloat16):
            half = (m(x).float() - y).norm() / y.norm()
        pieces, sizes = in_chunks(m, x, cuts)
        name = " ".join(f"{k}={v}" for k, v in fields.items()) + " (the paper's)" * ("undecimated" in fields)
        rows.append({"causal mixer": name, "parameters": sum(q.numel() for q in m.parameters()),
                     "leak": leaking_positions(m, x, y), "chunks": f"{(pieces - y).abs().max():.0e}",
                     "pads, encoder": f"{pad_error(fields, x):.0e}", "bf16": f"{half:.0e}",
                     "bytes of state at 64": sizes[64], "at 256": sizes[256],
                     "idwt(dwt)": reconstruction(m)})
    print(as_table(rows[0], [row.values() for row in rows]))
    if args.json:
        save_run(args.json, dict(card=card_of(args), rows=rows))

# -----------------------------------------------------------------------------
# speed

class Core(model.Haar):
    """haar without its projection, to be held against a copy of the tensor."""

    def __init__(self, cfg, causal=False):
        super().__init__(cfg, causal)
        self.c_proj = nn.Identity()

class Copy(nn.Identity):
    def forward(self, x):
        return x.clone()

FLASH, CAUSAL = "flash SDPA", "flash SDPA, causal"
SPEED = {  # arm -> (mixer, causal, what it is held against, its fields); ungated where nothing is said
    FLASH: ("attention", False, None, {}),
    "softmax, matrix stored": ("softmax", False, FLASH, {}),
    "haar, decimated": ("haar", False, FLASH, dict(undecimated="no")),
    "haar, L=8": ("haar", False, FLASH, dict(levels=8)),
    "haar, gated, L=8": ("haar", False, FLASH, dict(levels=8, gate=True)),
    "wersa, m=128": ("wersa", False, FLASH, dict(n_features=128)),
    "wersa, m=1024": ("wersa", False, FLASH, dict(n_features=1024)),
    "wavspa, 1 level": ("wavspa", False, FLASH, dict(wavelet="db2", levels=1)),
    CAUSAL: ("attention", True, None, {}),
    "softmax, causal, matrix stored": ("softmax", True, CAUSAL, {}),
    "haar, causal, L=8": ("haar", True, CAUSAL, dict(levels=8)),
    "wersa, causal, m=128": ("wersa", True, CAUSAL, dict(n_features=128)),
    "wersa, causal, m=1024": ("wersa", True, CAUSAL, dict(n_features=1024)),
    "wavspa, causal, 1 level": ("wavspa", True, CAUSAL, dict(wavelet="db2", levels=1)),
    "MultiresConv, causal, L=8": ("multires", True, CAUSAL, dict(levels=8)),
    "MultiresConv by conv1d, causal, L=8": (Dilated, True, CAUSAL, dict(levels=8)),
    "haar core, no projection": (Core, False, "copy", dict(undecimated="no")),
    "copy": (Copy, False, None, {}),
}
SHOWN = ["haar, L=8", "haar, causal, L=8", "wersa, m=128", "wersa, causal, m=128", "wavspa, 1 level",
         "wavspa, causal, 1 level"]  # the README's six rows
AT, POSITIONS = 8192, (1024, 65536)  # where the tables look first; where a token is decoded

def sync():
    if CUDA:
        torch.cuda.synchronize()

def by_turns(calls, budget=2.0):
    """{name: call} -> {name: seconds of each turn}. One call of each by turns, so that whatever else the
    machine does meets all of them alike; at least three turns, unless they take long."""
    seconds, spent = {name: [] for name in calls}, 0.0
    for n in range(1, 101):
        for name, call in calls.items():
            sync()
            began = time.perf_counter()
            call()
            sync()
            seconds[name].append(time.perf_counter() - began)
            spent += seconds[name][-1]
        if spent > 10 * budget or (n >= 3 and spent > budget):
            break
    return seconds

def times_faster(mine, other):
    """Two lists of seconds, pair by pair -> [p20, median, p80] of other / mine."""
    return np.quantile(np.array(other) / np.array(mine), (0.2, 0.5, 0.8)).tolist()

def build(name, card, T):
    kind, causal, _, own = SPEED[name]
    known = isinstance(kind, str)
    fields = dict(arch="decoder" if causal else "encoder", mixer=kind if known else "haar", gate=False,
                  block_size=max(T, 256), n_embd=card["n_embd"], n_head=card["n_head"]) | own
    torch.manual_seed(0)
    m = (build_mixer if known else kind)(ModelConfig(**fields), causal)
    return m.to(card["device"], getattr(torch, card["dtype"]))

def load_library(folder, name):
    """DIR/model.py as a module of another name."""
    path = os.path.join(folder, "model.py")
    if not os.path.exists(path):
        raise SystemExit(f"{path} does not exist: name a copy of that repository")
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    return library

def row_of(card, T):
    return torch.randn(1, T, card["n_embd"], device=card["device"], dtype=getattr(torch, card["dtype"]))

def passes(m, card, T):
    """-> a call that runs m forward and backward once on a row of T tokens."""
    x, dy = row_of(card, T).requires_grad_(), row_of(card, T)

    def call():
        m(x).backward(dy)
        x.grad = None
        m.zero_grad(set_to_none=True)
    return call

def peak():
    """The most memory that this process has held so far, on a GPU since the last reset, in bytes."""
    if CUDA:
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def memory_of(call):
    """How far a call raises the peak, in bytes. On a CPU this sees no more than what a process never had."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    before = peak()
    call()
    sync()
    return peak() - before

def operations(call):
    """FLOPs of a call, counted."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()

def floor_of(call, m, card, T):
    """Seconds that a call of m, forward and backward, would take at this GPU's own limits: its matrix
    products, or x, y, their gradients and the weights touched once."""
    size = getattr(torch, card["dtype"]).itemsize
    touched = size * (4 * T * card["n_embd"] + 3 * sum(q.numel() for q in m.parameters()))
    return max(operations(call) / card["flops"], touched / card["bandwidth"])

def limits(dtype):
    """What this GPU copies (bytes a second, read and written) and multiplies (FLOP a second) at best."""
    a = torch.randn(8192, 8192, device=DEVICE).to(dtype)
    calls = {"matmul": lambda: a @ a, "copy": lambda: a.clone()}
    by_turns(calls, 0)
    best = {name: min(seconds) for name, seconds in by_turns(calls, 1.0).items()}
    return dict(flops=2 * 8192**3 / best["matmul"], bandwidth=2 * a.nbytes / best["copy"])

def cell(name, T, card):
    """One arm at one length: its peak memory over module and input, then its time by turns with what it is
    held against -> a dict for each form."""
    modules = {"eager": build(name, card, T)}
    call, against = passes(modules["eager"], card, T), SPEED[name][2]
    keep_freed_pages(False)
    passes(build(name, card, 8), card, 8)()  # threads, autograd's engine, lazy imports
    memory, found = memory_of(call), []
    keep_freed_pages()
    floor = floor_of(call, modules["eager"], card, T) if CUDA else 0.0
    if against:
        modules["eager rival"] = build(against, card, T)
    if card["compile"]:
        for who, m in list(modules.items()):
            modules[who.replace("eager", "compiled")] = torch.compile(m, dynamic=True)
    calls = {who: passes(m, card, T) for who, m in modules.items()}
    by_turns(calls, 0)  # warms up, and compiles
    seconds = by_turns(calls)
    for form in ("eager", "compiled"):
        if form in seconds:
            taken = statistics.median(seconds[form])
            c = dict(arm=name, T=T, form=form, seconds=taken, memory=memory, of_floor=floor / taken)
            if against:
                c["ratio"] = times_faster(seconds[form], seconds[f"{form} rival"])
            found.append(c)
    return found

def fast_forward(state, t):
    """A decoder's state as it would be at position t: counters set, caches of attention filled with zeros."""
    if torch.is_tensor(state):
        empty = state.dim() == 4 and state.size(2) == 0
        return state.new_zeros(*state.shape[:2], t, state.size(3)) if empty else state
    if isinstance(state, (list, tuple)):
        return type(state)(fast_forward(s, t) for s in state)
    return t if isinstance(state, int) else state

@torch.no_grad()
def decode_cell(name, T, card):
    """A token at either of POSITIONS; a prompt of T tokens through state, over one parallel pass."""
    m, token, prompt = build(name, card, T).eval(), row_of(card, 1), row_of(card, T)
    start = m.init_state(1, card["device"], prompt.dtype)
    early, late = (fast_forward(start, t) for t in POSITIONS)
    tokens = {"early": lambda: m(token, state=early), "late": lambda: m(token, state=late)}
    prompts = {"state": lambda: m(prompt, state=start), "whole": lambda: m(prompt)}
    by_turns(tokens | prompts, 0)
    one, read = by_turns(tokens), by_turns(prompts)
    ms = [statistics.median(one[when]) * 1e3 for when in ("early", "late")]
    return [dict(arm=name, T=T, form="decode", seconds=statistics.median(read["state"]), ms=ms,
                 ratio=times_faster(read["whole"], read["state"]))]

def in_a_process(job):
    """(work, name, lengths, card) -> what work finds at each length, up to the first that is too long."""
    work, name, lengths, card = job
    torch.set_num_threads(card["threads"])
    keep_freed_pages()
    found = []
    for T in lengths:
        try:
            found += work(name, T, card)
        except torch.cuda.OutOfMemoryError:
            break
    return found

def chosen(arms, word):
    """The arm that --only names, or all whose name holds it."""
    found = [word] if word in arms else [name for name in arms if not word or word in name]
    if not found:
        raise SystemExit(f"no arm's name holds --only={word}, there are: {'; '.join(arms)}")
    return found

def card_of(args):
    """What a run was made on, and with."""
    return dict(name=machine_name(), device=DEVICE, threads=torch.get_num_threads(), torch=torch.__version__,
                git=git_state(), date=time.strftime("%Y-%m-%d"))

def speed(args):
    lengths = args.lengths or [2 ** i for i in (range(10, 18) if CUDA else range(9, 14))]
    dtype = args.dtype or ("bfloat16" if CUDA else "float32")
    card = dict(card_of(args), dtype=dtype, n_embd=args.n_embd, n_head=args.n_head, compile=args.compile)
    if CUDA:
        card.update(limits(getattr(torch, dtype)))
    if args.json:
        load_runs(args.json)  # a bad file is found before the work
    names, jobs, cells = chosen(SPEED, args.only), [], []
    print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in card.items()))
    names += {SPEED[name][2] for name in names} - {None, *names}
    for name in names:
        stored = "stored" in name
        mine = [T for T in lengths if CUDA or args.lengths or T <= 4096 or not stored]
        if CUDA:  # compiles once for all lengths
            jobs.append((cell, name, mine, card))
        else:  # each wants a peak of its own
            jobs += [(cell, name, [T], card) for T in mine]
        if SPEED[name][1] and not stored and isinstance(SPEED[name][0], str):
            jobs.append((decode_cell, name, [args.prompt], card))
    fresh = get_context("forkserver")
    fresh.set_forkserver_preload(["torch", "numpy", "tqdm"])  # imported once, before the fork
    for job in tqdm(jobs, unit="cell", leave=False):
        with ProcessPoolExecutor(1, fresh) as process:
            try:
                cells += process.submit(in_a_process, job).result()
            except BrokenProcessPool:  # the kernel's answer to too much memory
                pass
    run = dict(card=card, cells=cells)
    print("\n" + all_speed_tables([run]))
    if args.json:
        save_run(args.json, run)

def save_run(path, run):
    """Add a run to the list of runs in that file."""
    runs = [*load_runs(path), run]
    with replacing(path) as f:
        json.dump(runs, f, indent=1)

def load_runs(path):
    """The list of runs to which speed --json appends."""
    try:
        runs = json.loads(Path(path).read_text()) if os.path.exists(path) else []
        assert isinstance(runs, list) and all("card" in run for run in runs)
    except (OSError, ValueError, AssertionError, AttributeError, TypeError):
        raise SystemExit(f"{path} holds no list of runs of bench.py speed --json: move it away")
    return runs

def by_machine(runs):
    """Runs on one kind of machine belong together -> a list of such lists, the longest first."""
    kinds = {}
    for run in runs:
        kind = tuple(run["card"][k] for k in ("name", "dtype", "n_embd", "n_head", "threads"))
        kinds.setdefault(kind, []).append(run)
    return sorted(kinds.values(), key=len, reverse=True)

def merged(runs):
    """Runs on one kind of machine -> what it was, {(arm, T, form): cell}. A figure is the median of their
    medians, a ratio has the range, of one run p20 and p80. sure: in every run p20 is above 1."""
    found, cells = {}, {}
    for run in runs:
        for c in run["cells"]:
            found.setdefault((c["arm"], c["T"], c["form"]), []).append(c)
    # of any cell, as a run may hold some of them only
    most = max(len(same) for (_, _, form), same in found.items() if form != "decode")
    where = f"{most} run{'s' * (most > 1)}"
    for k in runs[0]["card"]:
        values = [run["card"].get(k) for run in runs]
        values = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in values]
        where += f", {k} " + " ".join(dict.fromkeys(values))
    for key, same in found.items():
        m = cells[key] = dict(ratio="", sure=all(c.get("ratio", [0])[0] > 1 for c in same))
        for k in ("seconds", "memory", "ms", "of_floor"):
            if all(k in c for c in same):
                m[k] = np.median([c[k] for c in same], 0)
        triples = [c["ratio"] for c in same if "ratio" in c]
        middle = sorted(t[1] for t in triples)
        if len(triples) == 1:
            m["ratio"] = interval(*triples[0])
        elif triples:
            m["ratio"] = interval(middle[0], statistics.median(middle), middle[-1])
    return where, cells

def interval(low, middle, high):
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"

def crossover(cells, name, form):
    """The first of several lengths from which on name is surely faster than what it is held against."""
    lengths = sorted(T for arm, T, f in cells if (arm, f) == (name, form))
    if len(lengths) < 2:
        return ""
    first = f"not up to {lengths[-1]:,}"
    for T in reversed(lengths):
        if not cells[name, T, form]["sure"]:
            break
        first = f"{T:,}"
    return first

def exponent(cells, name, form):
    """x in time ~ T^x, from the first length of at least 2,048 tokens to the last."""
    lengths = sorted(T for arm, T, f in cells if (arm, f) == (name, form) and T >= 2048)
    if len(lengths) < 2:
        return ""
    first, *_, last = lengths
    grown = cells[name, last, form]["seconds"] / cells[name, first, form]["seconds"]
    return f"{math.log(grown) / math.log(last / first):.2f} up to {last:,}"

def as_table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])

def speed_tables(runs):
    """What speed has found on one kind of machine, as Markdown."""
    where, cells = merged(runs)
    lengths = sorted({T for _, T, form in cells if form == "eager"})
    arms = [name for name in SPEED if any(arm == name for arm, _, _ in cells)]
    at, nothing, rows = AT if AT in lengths else lengths[-1], dict(ratio=""), []
    yield f"{where}. One row, forward and backward: times as fast as what it stands against, {at:,} tokens.\n"
    for name in arms:
        against = SPEED[name][2]
        c, base = cells.get((name, at, "eager")), cells.get((against, at, "eager"))
        if c and base:
            compiled = cells.get((name, at, "compiled"), nothing)
            memory = c["memory"] / max(base["memory"], 1)
            rows.append([name, against, c["ratio"], crossover(cells, name, "eager"), compiled["ratio"],
                         crossover(cells, name, "compiled"), f"{memory:.2f}"])
            if c.get("of_floor"):
                rows[-1].append(f"{max(c['of_floor'], compiled.get('of_floor', 0)):.0%}")
    head = ["", "against", "eager", "ahead from T", "compiled", "ahead from T", "its memory"]
    yield as_table(head + ["of the GPU's limit"] * (len(rows[0]) > len(head) if rows else 0), rows)
    rows = [[arm, *(f"{ms:.3f}" for ms in c["ms"]), f"{T:,}", f"{c['seconds']:.3f}", c["ratio"]]
            for (arm, T, form), c in cells.items() if form == "decode" and arm in arms]
    if rows:
        at = [f"at {t:,}" for t in POSITIONS]
        yield "\n" + as_table(["ms a token", *at, "a prompt of", "seconds", "times one parallel pass"], rows)
    rows = [[arm, *(exponent(cells, arm, form) for form in ("eager", "compiled"))] for arm in arms]
    rows = [row for row in rows if row[1]]
    if rows:
        yield "\n" + as_table(["time grows as T to the", "eager", "compiled"], rows)
    for form, key, unit, scale in (("eager", "seconds", "ms", 1e3), ("compiled", "seconds", "ms", 1e3),
                                   ("eager", "memory", "peak MiB over module and input", 2 ** -20)):
        rows = []
        for name in arms:
            row = [cells.get((name, T, form)) for T in lengths]
            if any(row):
                ratio = [f" · {c['ratio']}" if c and c["ratio"] and unit == "ms" else "" for c in row]
                rows.append([name, *(f"{c[key] * scale:.2f}{r}" if c else "" for c, r in zip(row, ratio))])
        if rows:
            yield "\n" + as_table([f"{form}, {unit}", *(f"T={T:,}" for T in lengths)], rows)

def all_speed_tables(runs):
    """The tables of each kind of machine, one below the other."""
    return "\n\n".join("\n".join(speed_tables(alike)).strip() for alike in by_machine(runs))

def short_speed_table(runs):
    """The README's rows: how many times as fast as flash SDPA on each kind of machine."""
    head, rows, where = [""], [[name] for name in SHOWN], []
    for alike in by_machine(runs):
        _, cells = merged(alike)
        name, threads = (alike[0]["card"][k] for k in ("name", "threads"))
        there = [run for run in alike if any(c["T"] == AT for c in run["cells"])]
        commits = " ".join(dict.fromkeys(run["card"]["git"] for run in there))
        where.append(f"{name}, {threads} threads, commits {commits}")
        head += [f"{name}: eager", "compiled"]
        for row in rows:
            row += [cells.get((row[0], AT, form), dict(ratio=""))["ratio"] for form in ("eager", "compiled")]
    return f"{'; '.join(where)}.\n\n{as_table(head, rows)}"

def run_table(path):
    """A file of runs of speed, or the last run of another command, as Markdown."""
    runs = load_runs(path)
    if "cells" in runs[-1]:
        return all_speed_tables(runs)
    card, rows = runs[-1]["card"], runs[-1]["rows"]
    made = ", ".join(f"{k} {v}" for k, v in card.items())
    return f"{made}.\n\n{as_table(rows[0], [row.values() for row in rows])}"

@contextmanager
def figure(path, n, size):
    """n axes, which become a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, n, figsize=size, layout="constrained")
    yield axes
    fig.savefig(path, dpi=100, metadata=dict(Software=None))
    plt.close(fig)

def against_length(ax, runs, names):
    """Time of these arms by length, the faster of eager and compiled, on the machine with most runs; causal
    ones dashed."""
    alike, *_ = by_machine(runs)
    _, cells = merged(alike)
    for name in names:
        points = {}
        for arm, T, form in sorted(cells):
            if arm == name and form != "decode":
                points[T] = min(points.get(T, math.inf), cells[arm, T, form]["seconds"] * 1e3)
        if points:
            width = 2.5 if name in (FLASH, CAUSAL) else 1.2
            dashes = "--" if "causal" in name else "-"
            ax.plot(*zip(*points.items()), marker=".", ls=dashes, lw=width, label=name)
    where = alike[0]["card"]["name"]
    ax.set(yscale="log", xlabel="tokens", ylabel="ms", title=f"{where}: forward and backward")
    ax.set_xscale("log", base=2)
    ax.legend(fontsize=7)

def training_step(net, batch, compiled):
    """-> a call that takes a whole training step of a decoder on batch, (idx, targets)."""
    with redirect_stdout(None):  # nanoGPT's own says what it configures
        optimizer = net.to(DEVICE).configure_optimizers(0.1, 1e-3, (0.9, 0.99), DEVICE)
    run = torch.compile(net, dynamic=True) if compiled else net

    def call():
        with torch.autocast("cuda", torch.bfloat16) if CUDA else nullcontext():
            loss = run(*batch)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return call

def steps(args):
    """Tokens a second of whole training steps, ours and by turns nanoGPT's own GPT (--nanogpt, a copy of
    github.com/karpathy/nanoGPT), at the shapes of its Shakespeare example; or of 2 rows of --lengths."""
    B, shape = 12, dict(n_layer=4, n_head=4, n_embd=128, block_size=64)
    if CUDA:
        B, shape = 64, dict(n_layer=6, n_head=6, n_embd=384, block_size=256)
    if args.lengths:  # the WERSA paper's small model on one long text
        B, shape = 2, dict(n_layer=2, n_head=4, n_embd=64, block_size=args.lengths[0])
    nets, rows = {}, []
    if args.nanogpt and not args.lengths:
        theirs = load_library(args.nanogpt, "nanogpt")
        with redirect_stdout(None):
            nets["nanoGPT"] = theirs.GPT(theirs.GPTConfig(vocab_size=65, dropout=0.0, bias=False, **shape))
    for fields in (dict(mixer="attention", gate=False, pos="learned"), dict(mixer="attention"),
                   dict(mixer="haar"), dict(mixer="wersa"), dict(mixer="wavspa", wavelet="db2"),
                   dict(mixer="haar,haar,haar,attention")):
        name = " ".join(f"{k}={v}" for k, v in fields.items())
        nets[name] = model.WaveletTransformer(ModelConfig(arch="decoder", vocab_size=65, **shape, **fields))
    idx = torch.randint(1, 65, (2, B, shape["block_size"]), device=DEVICE)
    flops, memory = {}, {}
    calls = {name: training_step(net, idx, compiled=CUDA) for name, net in nets.items()}
    keep_freed_pages()
    if CUDA:
        best = limits(torch.bfloat16)["flops"]
        for name, net in nets.items():
            with torch.autocast("cuda", torch.bfloat16):
                flops[name] = operations(lambda: net(*idx)[1].backward())
    by_turns(calls, 1.0)
    if CUDA:
        memory = {name: memory_of(call) for name, call in calls.items()}
    seconds = by_turns(calls, 20.0)
    for name, s in seconds.items():
        taken = statistics.median(s)
        row = {"": name, "ms a step": f"{taken * 1e3:.1f}",
               "tokens a second": f"{idx[0].numel() / taken:,.0f}",
               "times as fast as the first": interval(*times_faster(s, next(iter(seconds.values()))))}
        if CUDA:
            row["of the GPU's FLOP/s"] = f"{flops[name] / taken / best:.1%}"
            row["peak MiB"] = f"{memory[name] / 2**20:,.0f}"
        rows.append(row)
    card = dict(card_of(args), rows=B, **shape)
    print("  ".join(f"{k} {v}" for k, v in card.items()) + "\n")
    print(as_table(rows[0], [row.values() for row in rows]))
    if args.json:
        save_run(args.json, dict(card=card, rows=rows))

def compiled_cell(arch, mixer, card):
    """Training steps of ten ragged batches, eager and compiled block by block, as train.py does -> a row."""
    torch.manual_seed(0)
    fields = dict(block_size=card["block_size"], n_embd=card["n_embd"], n_head=card["n_head"])
    net = model.WaveletTransformer(ModelConfig(arch=arch, mixer=mixer, **fields)).to(DEVICE)
    batches = []
    for T in torch.linspace(card["block_size"] // 32, card["block_size"] // 8, 10).long().tolist():
        idx = torch.randint(1, 256, (8, 8 * T), device=DEVICE)  # batches are filled up to a multiple of 8
        target = idx[:, 0] % 2 if arch == "encoder" else idx
        batches.append((idx, target, idx) if arch == "encdec" else (idx, target))

    def train():  # once through all lengths -> seconds of each
        seconds = []
        for batch in batches:
            began = time.perf_counter()
            with torch.autocast("cuda", torch.bfloat16) if CUDA else nullcontext():
                loss = net(*batch)[1]
            loss.backward()
            net.zero_grad(set_to_none=True)
            sync()
            seconds.append(time.perf_counter() - began)
        return seconds
    train()  # warms up
    from torch._inductor.utils import fresh_inductor_cache
    compile_blocks(net)
    with fresh_inductor_cache():  # what an earlier run compiled costs nothing
        first = train()
    seconds = dict(force_eager=[], default=[])
    for _ in range(5):  # by turns
        for stance, taken in seconds.items():
            with torch.compiler.set_stance(stance):
                taken += train()
    eager, compiled = seconds.values()
    won = statistics.mean(eager) - statistics.mean(compiled)
    cost = sum(first) - len(first) * statistics.mean(compiled)
    pays = f"{cost / won:,.0f}" if won > 0 else "never"
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return [{"": f"{arch}, {mixer}", "graphs": graphs, "compiled in, seconds": f"{cost:.0f}",
             "eager, ms": f"{statistics.mean(eager) * 1e3:.1f}",
             "compiled, ms": f"{statistics.mean(compiled) * 1e3:.1f}",
             "times as fast": interval(*times_faster(compiled, eager)), "pays from step": pays}]

def compiled(args):
    """What the compiler costs and wins, for each mixer: 8 rows of ten lengths up to a block of 512."""
    card, rows = dict(card_of(args), n_embd=args.n_embd, n_head=args.n_head, block_size=512, n_layer=2), []
    print("  ".join(f"{k} {v}" for k, v in card.items()) + "\n")
    fresh = get_context("forkserver")
    for arch in ("decoder", "encoder", "encdec"):
        for mixer in ("attention", "haar", "wavspa", "wersa"):
            if args.only and args.only not in f"{arch}, {mixer}":
                continue
            with ProcessPoolExecutor(1, fresh) as process:
                rows += process.submit(in_a_process, (compiled_cell, arch, [mixer], card)).result()
            print(as_table(rows[0], [row.values() for row in rows]).splitlines()[-1], flush=True)
    print("\n" + as_table(rows[0], [row.values() for row in rows]))
    if args.json:
        save_run(args.json, dict(card=card, rows=rows))

def transforms(args):
    """dwt, and dwt, idwt and their gradient, beside PyWavelets and ptwt where they are installed, by turns:
    5 levels of 16 channels, float32."""
    rows, pywt, ptwt = [], installed("pywt"), installed("ptwt")
    compiled_dwt = torch.compile(model.dwt, dynamic=True)

    def gradient(x, y):
        y.square().sum().backward()
        x.grad = None
    for wavelet in ("haar", "db2", "db8"):
        for T in args.lengths or (2 ** n for n in range(10, 21, 2)):
            x, h = torch.randn(1, T, 16), model.daubechies(wavelet).float()
            leaf, lines = x.clone().requires_grad_(), x[0].mT.clone().requires_grad_()
            array, constant = x[0].numpy(), lines.detach()
            calls = {"dwt": lambda: model.dwt(x, h, 5), "compiled": lambda: compiled_dwt(x, h, 5),
                     "gradient": lambda: gradient(leaf, model.idwt(model.dwt(leaf, h, 5), h))}
            if pywt:
                calls["pywt"] = lambda: pywt.wavedec(array, wavelet, "periodization", 5, axis=0)
            if ptwt:
                there = dict(wavelet=wavelet, mode="periodic", level=5)
                calls["ptwt"] = lambda: ptwt.wavedec(constant, **there)
                calls["ptwt, gradient"] = lambda: gradient(
                    lines, ptwt.waverec(ptwt.wavedec(lines, **there), wavelet))
            by_turns(calls, 0)
            seconds = by_turns(calls)
            row = {"ms": f"{wavelet}, {T:,}"}
            row.update({name: f"{statistics.median(s) * 1e3:.2f}" for name, s in seconds.items()})
            for other, ours in (("pywt", "dwt"), ("ptwt", "dwt"), ("ptwt, gradient", "gradient")):
                if other in seconds:
                    row[f"{other} / {ours}"] = interval(*times_faster(seconds[ours], seconds[other]))
            rows.append(row)
    print(as_table(rows[0], [row.values() for row in rows]))
    if args.json:
        save_run(args.json, dict(card=card_of(args), rows=rows))

def flops(args):
    """Operations of a mixer's forward pass on one row, counted, not timed, and their share of attention's."""
    arms = [name for name, (kind, causal, *_) in SPEED.items()
            if not causal and kind in ("attention", "haar", "wersa", "wavspa")]
    card, rows = dict(device="meta", dtype="float32", n_embd=args.n_embd, n_head=args.n_head), []
    for T in args.lengths or [2 ** n for n in range(9, 18)]:
        counted = {}
        for name in arms:
            m, x = build(name, card, T), row_of(card, T)
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                counted[name] = operations(lambda: m(x))
        row = {"GFLOP": f"{T:,}", FLASH: f"{counted[FLASH] / 1e9:.3f}"}
        for name in arms[1:]:
            row[name] = f"{counted[name] / 1e9:.3f}, {counted[name] / counted[FLASH]:.1%}"
        rows.append(row)
    print(as_table(rows[0], [row.values() for row in rows]))
    if args.json:
        save_run(args.json, dict(card=dict(git=git_state(), **card), rows=rows))

def installed(name):
    return importlib.import_module(name) if importlib.util.find_spec(name) else None

GPU = {  # piece -> what it runs: a command of this file, or a training; each ends within minutes
    "variants": "bench.py variants", "steps": "bench.py steps",
    "steps-131072": "bench.py steps --lengths=131072",
    **{f"speed-{C}-{arm}": f"bench.py speed --n_embd={C} --n_head={C // 64} --only={arm}"
       for C in (1024, 512) for arm in ("haar", "wersa", "wavspa")},
    **{f"compiled-{arch}": f"bench.py compiled --only={arch}" for arch in ("decoder", "encoder", "encdec")},
    **{f"numbers-{mixer}": f"train.py --preset=gpu --mixer={mixer} --resume --out_dir=data/runs/gpu-{mixer}"
       for mixer in ("wersa", "haar", "attention", "wavspa", "haar,attention")}}

def gpu(args):
    """All that a GPU is wanted for, in pieces that each leave a results/gpu-NAME.json and are skipped where
    that is there: a run that is cut off loses the piece at hand."""
    for name, command in GPU.items():
        path = RESULTS / f"gpu-{name}.json"
        if path.exists() or args.only and args.only not in name:
            continue
        began, (script, *flags) = time.time(), command.split()
        print(f"\n## {path.name}: python {command}\n", flush=True)
        if script == "bench.py":
            flags.append(f"--json={path}")
        if args.nanogpt and flags[0] == "steps":
            flags.append(f"--nanogpt={args.nanogpt}")
        ended = subprocess.run([sys.executable, HERE / script, *flags])
        if ended.returncode == 0 and script == "train.py":
            found = json.loads(Path(flags[-1].partition("=")[2], "result.json").read_text())
            row = {found["metric"]: f"{found['test_metric']:.3f}", "parameters": f"{found['params']:,}",
                   "minutes": f"{found['seconds'] / 60:.1f}"}
            save_run(path, dict(card=card_of(args), rows=[row]))
        print(f"\n{name}: exit code {ended.returncode}, {time.time() - began:.0f} s", flush=True)

def machine_name():
    if CUDA:
        return torch.cuda.get_device_name()
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()

def git_state():
    """The commit, and -dirty if the code is not the commit's; results that are being added do not count."""
    def git(*command):
        return subprocess.run(["git", "-C", HERE, *command], capture_output=True, text=True)
    changed = git("diff", "--quiet", "HEAD", "--", "*.py").returncode == 1
    return git("describe", "--always").stdout.strip() + "-dirty" * changed

# -----------------------------------------------------------------------------
# quality: the suites

def arms(text, **more):
    """"label: mixer field=value ...", parted by ; or a new line -> {label: [flags]}; more: fields of all."""
    found = {}
    for arm in re.split(r"[;\n]", text.strip()):
        label, _, words = arm.rpartition(": ")
        mixer, *fields = words.split()
        fields = [*(f"{k}={v}" for k, v in more.items()), *fields]
        flags = [f"--mixer={mixer}", *(f"--{field}" for field in fields)]
        if mixer in ("conv", "lazy", "random", "shortconv", "multires"):
            flags.insert(0, "--mixers_from=bench.py")
        found[label.strip()] = flags
    return found

def some(arms, names):
    return {name: arms[name] for name in names.split("; ")}

SUITES = {}

def suite(name, what, base, arms, seeds=(1, 2, 3), rates=(2e-3,), data="", prepare=None, match=True):
    """what: its protocol in words; base: flags of all arms; the first seed tries all rates; data: a folder of
    data_dir; match: an arm without an n_embd of its own is as wide as gives it the first one's parameters."""
    SUITES[name] = dict(what=what, base=base.split(), arms=arms, seeds=seeds, rates=rates, data=data,
                        prepare=prepare or {}, match=match)

suite("numbers", "English number names to German, default settings and widths", "", arms("""
    attention: attention; haar: haar; wersa: wersa
    wavspa: wavspa wavelet=db2 levels=2; hybrid: haar,attention"""),
      seeds=(1337, 1, 2), match=False)

TEXT = ("--dataset=text --block_size=128 --batch_size=16 --n_layer=4 --max_iters=400 --warmup_iters=40 "
        "--eval_interval=200 --metric_rows=400 --eval_block_size=256,512")
BYTES = dict(rates=(4e-3,), prepare=dict(text=dict(tokenizer="bytes")))
DECODERS = arms("""attention: attention n_embd=124
    haar: haar n_embd=136; haar, 3 levels: haar levels=3 n_embd=140
    wersa: wersa n_embd=120; wavspa: wavspa wavelet=db2 levels=1 n_embd=120
    hybrid: haar,haar,haar,attention n_embd=136""", gate=True) | arms("""
    attention, no gate: attention n_embd=128; haar, no gate: haar n_embd=148
    wersa, no gate: wersa n_embd=128""", gate=False)
suite("decoders", "Shakespeare as bytes; hybrid: 3 layers of haar, 1 of attention", TEXT, DECODERS, **BYTES)
suite("decoders_longer", "decoders, at five times the steps",
      TEXT + " --max_iters=2000 --warmup_iters=100 --eval_interval=500",
      some(DECODERS, "attention; haar; haar, 3 levels; hybrid; attention, no gate"), **BYTES)
suite("peers", "decoders: the wavelets of wersa and haar beside a short convolution and MultiresConv", TEXT,
      some(DECODERS, "attention; haar; wersa") | arms("""wersa without wavelets: wersa levels=0
    wersa, convolution on q and k: shortconv; MultiresConv, gated: multires
    hybrid, 16 tokens: haar,haar,haar,attention window=16""", gate=True), **BYTES)

suite("hybrids", "decoders: where attention stands among layers of haar, and how far it sees", TEXT,
      some(DECODERS, "attention; haar") | arms("""last: haar,haar,haar,attention
    first: attention,haar,haar,haar; every other: haar,attention
    every other, 16 tokens: haar,attention window=16; all, 16 tokens: attention window=16""", gate=True),
      **BYTES)
suite("beyond", "decoders: reading further than was trained, by attention without positions or with a window",
      TEXT, some(DECODERS, "haar") | arms("""attention: attention; no positions: attention pos=none
    window of 128 tokens: attention window=128""", gate=True) | arms("""attention, no gate: attention
    no positions, no gate: attention pos=none
    window of 128 tokens, no gate: attention window=128""", gate=False), **BYTES)
suite("documents", "decoders, in blocks of 1,024 tokens", TEXT + " --block_size=1024 --batch_size=4 "
      "--metric_rows=100 --eval_block_size=2048,4096", arms("""attention: attention n_embd=124; haar: haar
    wersa: wersa; hybrid: haar,haar,haar,attention""", gate=True), **BYTES)
suite("nanogpt", "nanoGPT's CPU settings on its own Shakespeare; --source is a folder of its two halves: "
      "train.txt, the first 1,003,854 bytes, and the rest as val.txt and as test.txt, on which rates are "
      "chosen, too, as nanoGPT has no third part; hybrid: a layer of attention, then 3 of haar",
      "--dataset=text --block_size=64 --batch_size=12 --n_layer=4 --max_iters=2000 --warmup_iters=100 "
      "--beta2=0.99 --eval_interval=500 --eval_rows=2000",
      arms("""nanoGPT's form: attention n_embd=128 gate=False pos=learned
    attention, no gate: attention gate=False""") | arms("""attention: attention; haar: haar
    haar, 3 levels: haar levels=3; hybrid: attention,haar,haar,haar
    wersa: wersa; wavspa: wavspa wavelet=db2 levels=1""", gate=True),
      rates=(2e-3, 4e-3, 8e-3), data="nanogpt", prepare=dict(text=dict(tokenizer="bytes")))
suite("wavelets", "decoders: Daubechies' longer filters, learned (haar) or not", TEXT,
      some(DECODERS, "attention; haar; wersa") | arms("""haar, db2: haar wavelet=db2
    haar, db4: haar wavelet=db4; haar, db8: haar wavelet=db8; haar, fixed: haar wavelet_params=fixed
    haar, db2, fixed: haar wavelet=db2 wavelet_params=fixed
    haar, db8, fixed: haar wavelet=db8 wavelet_params=fixed
    wersa, db2: wersa wavelet=db2; wersa, db4: wersa wavelet=db4""", gate=True), **BYTES)

PAIRS = arms("""attention: attention; haar: haar
    haar, attention cross: haar cross=attention; haar, wersa cross: haar cross=wersa
    haar, by place alone: haar cross=place; hybrid: haar,attention
    wersa: wersa; wavspa: wavspa wavelet=db2 levels=1""", gate=True) | arms("""attention, no gate: attention
    attention, no gate, aligned cross: attention cross=aligned
    haar, no gate: haar; haar, no gate, 3 levels: haar levels=3
    haar, no gate, decimated encoder: haar undecimated=decoder""", gate=False)
TRANSLATE = "--dataset=multi30k --dropout=0.1 --label_smoothing=0.1 --batch_size=128 --beam=4"
suite("multi30k", "English to German, joint BPE of 4,000; sacreBLEU",
      TRANSLATE + " --n_layer=3 --max_iters=2500 --eval_interval=500", PAIRS | arms("""wersa, no gate: wersa
    wersa, no gate, aligned cross: wersa cross=aligned""", gate=False), (1337, 1, 2), (4e-3, 2e-3, 1e-3))
suite("anchor", "English to German as transformer_tiny of arXiv 2105.14462: joint BPE of 10,000, about 4,096 "
      "target tokens a step, the mean of the last 10 checkpoints; 4,000 updates where it has 8,000",
      "--dataset=multi30k --n_layer=4 --dropout=0.3 --label_smoothing=0.1 --batch_size=288 --max_iters=4000 "
      "--warmup_iters=1000 --eval_interval=100 --metric_rows=50 --patience=10 --average=10 --beam=5 "
      "--dtype=bfloat16",
      arms("""attention: attention; haar, attention cross: haar cross=attention; haar: haar
    hybrid: haar,haar,haar,attention""", gate=True),
      seeds=(1, 2), rates=(5e-3,), data="long", prepare=dict(multi30k=dict(vocab_size=10_000)))
SMALL = "--n_embd=64 --warmup_iters=50 "
suite("lmwt", "numbers", SMALL + "--batch_size=32 --max_iters=600 --eval_interval=300", PAIRS | arms("""
    haar, no gate, db2: haar wavelet=db2; haar, no gate, attention cross: haar cross=attention
    haar, no gate, wersa cross: haar cross=wersa
    haar, no gate, decimated encoder, 3 levels: haar undecimated=decoder levels=3
    haar, no gate, decimated encoder, fixed: haar undecimated=decoder wavelet_params=fixed
    haar literal, no gate (leaks): haar undecimated=no leak=True""", gate=False), rates=(4e-3,))

WAVSPA = arms("attention: attention; fourier: fourier", gate=False) | arms("""
    attention in fixed: wavspa wavelet_params=fixed; attention in ada: wavspa wavelet_params=ada
    attention in ortho: wavspa; attention in lift: wavspa wavelet_params=lift
    attention in ortho, 1 level: wavspa levels=1; attention in ortho, 4 levels: wavspa levels=4
    attention in ortho, one a band: wavspa wavspa_shared=False
    fourier in ortho: wavspa inner=fourier; wersa in ortho: wavspa inner=wersa
    control: even and odd samples: lazy; control: random orthonormal taps: random
    control: convolution, then attention: conv""", gate=False, wavelet="db2", levels=2)
WERSA = arms("""attention: attention; haar: haar; wersa, L=0: wersa levels=0; wersa, L=2: wersa
    control: convolution on q and k: shortconv""", gate=False)
GATED = arms("attention, gated: attention; haar, gated: haar", gate=True)
MORE = arms("""wersa, L=1: wersa levels=1; wersa, L=4: wersa levels=4; wersa, L=6: wersa levels=6
    wersa, L=2, db2: wersa wavelet=db2; wersa, L=2, m=16: wersa n_features=16
    wersa, L=2, m=256: wersa n_features=256; wersa, L=2, m=1024: wersa n_features=1024
    wersa, exp features, L=0: wersa feature_map=exp levels=0
    wersa, exp features, L=2: wersa feature_map=exp""", gate=False)
SHORT = dict(listops=dict(min_len=10, max_len=100, test_rows=20_000),
             lego=dict(n_links=6, n_tr=3, test_rows=20_000),
             recall=dict(n_pairs=4, n_keys=16, test_rows=20_000), imdb=dict(tokenizer="gpt2"))
TINY = dict(data="short", prepare=SHORT)
LISTOPS = f"--dataset=listops {SMALL} --batch_size=32 --max_iters=1500 --eval_interval=500"
suite("listops", "nested lists of 10 to 100 tokens", LISTOPS, WAVSPA | WERSA,
      rates=(1e-3, 5e-4, 2.5e-4), **TINY)
suite("wersa_listops", "listops: levels, features and wavelets of wersa", LISTOPS,
      some(WERSA, "attention; wersa, L=2") | MORE, rates=(1e-3,), **TINY)
suite("lego", "chains of 6 signs, of which training asks for the first 3",
      f"--dataset=lego {SMALL} --n_layer=4 --max_iters=1000 --eval_interval=500",
      some(WAVSPA, "attention; attention in ada; control: convolution, then attention")
      | some(WERSA, "haar; wersa, L=2"), range(1, 11), (1e-3, 2e-3, 5e-4), **TINY)
suite("wersa_recall", "which value stood behind this key, of 1 to 4 pairs",
      f"--dataset=recall {SMALL} --n_head=2 --warmup_iters=200 --max_iters=6000 --eval_interval=1000", WERSA,
      rates=(5e-4,), **TINY)
suite("imdb", "is a review good or bad, from 256 tokens of BPE", f"--dataset=imdb {SMALL} --batch_size=32 "
      "--block_size=256 --eval_block_size=512 --dropout=0.1 --max_iters=500 --eval_interval=100",
      WERSA | some(WAVSPA, "attention in fixed; attention in ada") | GATED, rates=(1e-3,), **TINY)
# the papers' sizes, for a GPU: minutes a run there, hours on a CPU
LONG = "--n_layer=4 --dropout=0.1 --batch_size=32 --warmup_iters=500 --max_iters=10000 --eval_interval=1000"
for name, flags, what in (("listops", "", "500 to 2,000 tokens"), ("pathfinder", "", "32 x 32 pixels"),
                          ("imdb", "--block_size=4096", "4,096 bytes of a review")):
    suite(f"{name}_long", what, f"--dataset={name} {flags} {LONG}",
          WERSA | some(MORE, "wersa, L=2, m=1024") | WAVSPA | GATED, rates=(1e-3, 3e-4), data="long")

SMOKE = {f"numbers: {arm}": PAIRS[arm] for arm in ("attention", "haar", "haar, attention cross")}
SMOKE |= {f"listops: {arm}": ["--dataset=listops", *flags] for arm, flags in WAVSPA.items()}
SMOKE |= {f"recall: {arm}": ["--dataset=recall", *flags] for arm, flags in WERSA.items()}
suite("smoke", "a miniature of three suites", "--n_embd=32 --n_head=2 --batch_size=32 --warmup_iters=5 "
      "--max_iters=20 --eval_interval=20 --eval_rows=50 --metric_rows=20", SMOKE, (1,), match=False, **TINY)

# -----------------------------------------------------------------------------
# quality: the runner

COLUMNS = ("suite arm seed learning_rate params steps seconds val_loss test_loss test_metric metric n "
           "trivial groups far lowercased data_rows data_tokens data_seconds git machine torch threads "
           "flags").split()

def last(flags, name, default=None):
    """What the last --name= of these flags says."""
    return next((f.split("=", 1)[1] for f in reversed(flags) if f.startswith(f"--{name}=")), default)

def config_of(flags, **fields):
    """The model that a run's flags name; fields: what its data set says."""
    kinds = {f.name: f.type for f in dataclasses.fields(ModelConfig)}
    for name, _, value in (flag.removeprefix("--").partition("=") for flag in flags):
        if name in kinds:
            fields[name] = value.lower() not in ("false", "0") if kinds[name] is bool else kinds[name](value)
    return ModelConfig(**fields)

def matched(flags, reference, meta):
    """flags, and the --n_embd at which their model's parameters come closest to the reference's."""
    fields = {f.name: meta[f.name] for f in dataclasses.fields(ModelConfig) if f.name in meta}

    def params(flags):
        with torch.device("meta"):
            return model.WaveletTransformer(config_of(flags, **fields)).num_params()
    C, step = int(last(reference, "n_embd", ModelConfig.n_embd)), math.lcm(4, int(last(flags, "n_head", 4)))
    goal, widths = params(reference), [w for w in range(step, 2 * C, step) if w > C / 2]
    best = min(widths, key=lambda w: abs(params([*flags, f"--n_embd={w}"]) - goal))
    return [*flags, f"--n_embd={best}"]

def read_rows(path):
    with open(path, newline="", encoding="utf-8") if path.exists() else nullcontext([]) as f:
        return list(csv.DictReader(f))

def prepared(suite, all_flags, args, path):
    """Make the data sets of these flags, where they are missing -> their folder, the last one's meta.json."""
    data_dir = os.path.join(args.data_dir, suite["data"])
    names = sorted({last(flags, "dataset", "numbers") for flags in all_flags})
    for name in names:
        source = args.source if len(names) == 1 else None
        folder = prepare(name, data_dir, source=source, **suite["prepare"].get(name, {}))
        meta = json.loads(Path(folder, "meta.json").read_text(encoding="utf-8"))
        tokens = str(int(np.sum(meta["splits"]["train"]["tokens"])))
        for r in read_rows(path):  # the rows of one CSV are all of the same data
            same = last(r["flags"].split(), "dataset", "numbers") == name
            if same and r["data_tokens"] not in ("", tokens):
                raise SystemExit(
                    f"{path} has rows of another {name}, of {r['data_tokens']} training tokens, not {tokens}:"
                    " give the --source of that one with another --data_dir, or move the file away")
    return data_dir, meta

def keep_translations(args, out, row):
    """What a run made of its test set into results/hyp, and of every .en file in --translate=DIR into
    results/unseen, unless a run of this arm and seed at another rate was better on val."""
    rows = [r for r in read_rows(RESULTS / f"{args.suite}.csv") if r["arm"] == row["arm"]]
    rivals = [float(r["val_loss"]) for r in rows if r["seed"] == str(row["seed"])]
    if not (out / "test.hyp.txt").exists() or row["val_loss"] > min(rivals, default=math.inf):
        return
    name = re.sub(r"\W+", "-", f"{args.suite} {row['arm']}") + f"-{row['seed']}"
    for folder in ("hyp", "unseen"):
        (RESULTS / folder).mkdir(parents=True, exist_ok=True)
    with gzip.GzipFile(RESULTS / "hyp" / f"{name}.test.de.gz", "wb", mtime=0) as f:
        f.write((out / "test.hyp.txt").read_bytes())
    flags = row["flags"].split()
    weights = "average.pt" if last(flags, "average") else "best.pt"
    for source in sorted(Path(args.translate).glob("*.en")) if args.translate else []:
        translated = RESULTS / "unseen" / f"{name}.{source.stem}.de"
        subprocess.run([sys.executable, HERE / "sample.py", f"--out_dir={out}", f"--ckpt={weights}",
                        f"--input={source}", f"--output={translated}", f"--beam={last(flags, 'beam', 1)}"],
                       check=True)

def train_one(args, arm, seed, rate, flags, data_dir, git, threads):
    """One run of train.py, gone on with where it was stopped -> its row."""
    name = re.sub(r"\W+", "-", f"{arm} {seed} {rate} {git}")
    out = Path(args.data_dir) / "runs" / args.suite / name
    if git.endswith("-dirty") and out.exists():  # what was trained before an edit is not gone on with
        print(f"{arm}, seed {seed}, rate {rate}: begun anew, the code is not committed", flush=True)
        shutil.rmtree(out)
    flags = [f"--seed={seed}", *flags, f"--learning_rate={rate}"]
    typed = [flag.replace("=bench.py", f"={HERE / 'bench.py'}") for flag in flags]
    typed += [f"--data_dir={data_dir}", f"--out_dir={out}", "--resume"]
    run = subprocess.run([sys.executable, HERE / "train.py", *typed], capture_output=True, text=True,
                         env=dict(os.environ, OMP_NUM_THREADS=str(threads)))
    if run.returncode:
        raise SystemExit(f"{arm}, seed {seed}: {(run.stderr.strip() or 'killed').splitlines()[-1]}")
    result = json.loads((out / "result.json").read_text())
    row = dict(result, suite=args.suite, arm=arm, seed=seed, learning_rate=rate, flags=" ".join(flags),
               git=git, machine=machine_name(), torch=torch.__version__, threads=threads)
    row.update({f"data_{k}": v for k, v in result["data"].items()})
    row["lowercased"] = result["test"].get("lowercased", "")  # BLEU
    row["groups"] = result["test"].get("groups", {})
    row.update({k: json.dumps(row[k]) for k in ("far", "trivial", "groups")})
    keep_translations(args, out, row)
    shutil.rmtree(out)
    return row

def add_row(path, row):
    """Write a suite's CSV with one row more as a whole: a kill leaves the old file or the new one."""
    rows = [*read_rows(path), row]
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as f:
        w = csv.DictWriter(f, COLUMNS, extrasaction="ignore", restval="", lineterminator="\n")
        w.writeheader()
        w.writerows(rows)

def quality(args):
    """Train what a suite lacks: its first seed at all rates, the others at the rate that was best on val."""
    suite, path, git = SUITES[args.suite], RESULTS / f"{args.suite}.csv", git_state()
    if args.arm:
        label, found, flags = args.arm.partition(": ")
        if not found or not flags.startswith("--") or label in suite["arms"]:
            raise SystemExit(f'--arm="{args.arm}" must be "label: --flag=value ...", with a label of its own')
        suite["arms"][label] = flags.split()
    arms = {arm: [*suite["base"], *suite["arms"][arm]] for arm in chosen(suite["arms"], args.only)}
    data_dir, meta = prepared(suite, arms.values(), args, path)
    reference = [*suite["base"], *next(iter(suite["arms"].values()))]
    for arm, flags in arms.items():
        if suite["match"] and last(suite["arms"][arm], "n_embd") is None:
            arms[arm] = matched(flags, reference, meta)
    threads, writing, failed = max(1, torch.get_num_threads() // args.jobs), Lock(), []

    def one(job):
        arm, seed, rate = job
        if failed:  # after Ctrl-C, or a run that failed, no other begins
            return
        try:
            row = train_one(args, arm, seed, rate, arms[arm], data_dir, git, threads)
        except BaseException:
            failed.append(job)
            raise
        with writing:
            add_row(path, row)
        print(f"{arm}, seed {seed}, rate {rate}: {row['metric']} {row['test_metric']:.4f}, "
              f"{row['params']:,} parameters, {row['seconds']:.0f} s", flush=True)

    first, *more = map(str, suite["seeds"])
    for seeds in ([first], more):
        best, jobs = arms_of(path), []
        for seed in seeds:
            for arm, flags in arms.items():
                rates = suite["rates"] if seed == first else {r["learning_rate"] for r in best.get(arm, [])}
                jobs += [(arm, seed, last(flags, "learning_rate", str(rate))) for rate in rates]
        done = {(r["arm"], r["seed"], r["learning_rate"]) for r in read_rows(path)}
        jobs = list(dict.fromkeys(jobs))
        todo = [job for job in jobs if job not in done]
        print(f"{args.suite}: {len(todo)} of {len(jobs)} runs to do, {args.jobs} at a time, "
              f"{threads} thread(s) each", flush=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(one, todo))

# -----------------------------------------------------------------------------
# report

LOWER = ("bits per byte",)  # metrics of which less is better

def arms_of(path):
    """A suite's CSV -> {arm: its rows at the rate that is best on val, by the seeds that tried all}."""
    arms = {}
    for r in read_rows(path):
        rates = arms.setdefault(r["arm"], {})
        rates.setdefault(r["learning_rate"], []).append(r)
    best = {}
    for arm, rates in arms.items():
        tried = [{r["seed"] for r in rows} for rows in rates.values()]
        seeds = set.intersection(*tried) or set.union(*tried)
        best[arm] = min(rates.values(), key=lambda rows: val_loss(rows, seeds))
    return best

def val_loss(rows, seeds):
    """The mean over these seeds, infinite where one has diverged."""
    losses = [float(r["val_loss"] or "nan") for r in rows if r["seed"] in seeds]
    mean = statistics.mean(losses)
    return math.inf if math.isnan(mean) else mean

def said(values):
    """mean ± standard deviation"""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"

def against(rows, other):
    """How far an arm's scores lie from another's, and two-sided p of Welch's t-test."""
    import scipy.stats
    a, b = score(rows), score(other)
    if rows is other or min(len(a), len(b)) < 2:
        return ""
    p = scipy.stats.ttest_ind(a, b, equal_var=False).pvalue
    return f"{statistics.mean(a) - statistics.mean(b):+.3f}, p = {p:.1g}"

def score(rows, key="test_metric"):
    return [float(r[key]) for r in rows]

def listed(scores):
    return ", ".join(f"{name} {v:.3f}" for name, v in scores.items())

def in_order(arms):
    """The arms of a suite, best first."""
    lower = next(iter(arms.values()))[0]["metric"] in LOWER
    return sorted(arms, key=lambda arm: statistics.mean(score(arms[arm])), reverse=not lower)

def table(path):
    """One suite's CSV -> a Markdown table, best arm first, what knows nothing last."""
    best, rows, lines = arms_of(path), read_rows(path), []
    far = {arm: [json.loads(r["far"]) for r in rs] for arm, rs in best.items()}
    beyond = min((f for fs in far.values() for f in fs), key=len)  # the lengths that all arms have
    rates = sorted({r["learning_rate"] for r in rows}, key=float)
    head = ["arm", "parameters", f"{rows[0]['metric']}, test"]
    lowercased = all(r.get("lowercased") for rs in best.values() for r in rs)
    if lowercased:
        head.append("lower-cased")
    order = in_order(best)
    others = dict.fromkeys([next(iter(best)), order[0]])  # held against the first arm, and against the best
    head += [*(f"at up to {f['block_size']} tokens" for f in beyond), "test loss", "n"]
    head += [f"less {other}" for other in others]
    if len(rates) > 1:  # what val chose, and the choice itself
        head += ["rate", *(f"test at {rate}" for rate in rates)]
    for arm in order:
        rs = best[arm]
        line = [arm, f"{int(rs[0]['params']):,}", said(score(rs))]
        if lowercased:
            line.append(said(score(rs, "lowercased")))
        line += [said([f[i]["metric"] for f in far[arm]]) for i in range(len(beyond))]
        line += [said(score(rs, "test_loss")), len(rs), *(against(rs, best[other]) for other in others)]
        if len(rates) > 1:
            line.append(rs[0]["learning_rate"])
            for rate in rates:
                at = [r for r in rows if (r["arm"], r["learning_rate"]) == (arm, rate)]
                line.append(said(score(at)) if at else "")
        lines.append(line)
    trivial = json.loads(rows[0]["trivial"])
    text = as_table(head, lines)
    if trivial:
        text += f"\n\nWhat knows nothing: {listed(trivial)}"
        for f in beyond:
            if f["trivial"] != trivial:
                text += f"; at up to {f['block_size']} tokens: {listed(f['trivial'])}"
        text += "."
    return text

def protocol(name):
    """What a suite is, and where its rows were made."""
    suite, rows = SUITES[name], read_rows(RESULTS / f"{name}.csv")
    made = [" ".join(dict.fromkeys(r[key] for r in rows)) for key in ("git", "machine", "torch")]
    base, rates = " ".join(suite["base"]) or "the defaults", " ".join(map(str, suite["rates"]))
    return (f"`python bench.py quality --suite={name}`: {suite['what']}. All arms: `{base}`; rates {rates}.\n"
            f"Commit {made[0]}; {made[1]}; torch {made[2]}.\n")

def overall():
    """The README's one table: suites by mixers."""
    names, lines = ("attention", "haar", "wavspa", "wersa", "hybrid"), []
    for suite in ("numbers", "decoders", "nanogpt", "multi30k", "anchor"):
        best = arms_of(RESULTS / f"{suite}.csv")
        if best:
            metric, line = next(iter(best.values()))[0]["metric"], []
            for rs in (best.get(name) for name in names):
                size = int(rs[0]["params"]) / 1e6 if rs else 0
                line.append(f"{said(score(rs))}, n = {len(rs)}, {size:.2f} M" if rs else "")
            if sum(map(bool, line)) > 1:  # a mixer alone says nothing
                lines.append([f"{suite}: {metric}, {'less' if metric in LOWER else 'more'} is better", *line])
    return as_table(["", *names], lines) if lines else ""

def overview(runs):
    """The decoders' scores, and time against length."""
    best = arms_of(RESULTS / "decoders.csv")
    if not best or not runs:
        return
    with figure(RESULTS / "overview.png", 2, (12, 4)) as axes:
        order = in_order(best)[::-1]
        for i, arm in enumerate(order):
            values, blue = score(best[arm]), arm.startswith("attention")
            error = statistics.stdev(values) if len(values) > 1 else 0
            axes[0].errorbar(statistics.mean(values), i, xerr=error, fmt="o", color="C0" if blue else "C1")
        labels = [f"{arm}  {said(score(best[arm]))}" for arm in order]
        axes[0].set(yticks=range(len(order)), yticklabels=labels, title="text, bits per byte: less is better")
        against_length(axes[1], runs, (FLASH, CAUSAL, *SHOWN[:4]))

def fill(path, blocks):
    """Put each block between <!-- NAME --> and <!-- end --> of a file, where it has that marker."""
    text = path.read_text(encoding="utf-8")
    for name, new in blocks.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
        text = block.sub(lambda m: f"{m[1]}{new}\n{m[2]}", text)
    with replacing(path) as f:
        f.write(text)

def report(args):
    """results/ -> the tables of results/README.md, two of the main README, and the figures."""
    own, runs, blocks = RESULTS / "README.md", load_runs(RESULTS / "speed.json"), {}
    text = own.read_text(encoding="utf-8")
    for path in sorted(RESULTS.glob("*.json")):
        if "speed" not in path.stem or path.stem.startswith("gpu"):
            command = GPU.get(path.stem.removeprefix("gpu-"), f"bench.py {path.stem}")
            blocks[path.stem] = f"`python {command}`; {run_table(path)}"
    for path in sorted(RESULTS.glob("*.csv")):
        blocks[path.stem] = f"{protocol(path.stem)}\n{table(path)}"
    for path in RESULTS.glob("faults.md"):  # python test_model.py 20 > results/faults.md
        blocks[path.stem] = path.read_text(encoding="utf-8").strip()
    for name in blocks:
        if f"<!-- {name} -->" not in text:  # its first rows: a section of its own
            section = f"### {name}\n\n<!-- {name} -->\n<!-- end -->\n\n"
            text = text.replace("## Negative results", section + "## Negative results", 1)
    main = {"results": overall()}
    if runs:
        blocks["speed"], main["speed"] = all_speed_tables(runs), short_speed_table(runs)
        with figure(RESULTS / "speed.png", 1, (7, 5)) as ax:
            against_length(ax, runs, SPEED)
    with replacing(own) as f:
        f.write(text)
    fill(own, blocks)
    fill(HERE / "README.md", main)
    overview(runs)

def curves(args):
    """log.csv of several runs, laid over one another."""
    if not args.folders:
        raise SystemExit("say which runs to draw: python bench.py curves out-a out-b")
    for folder in args.folders:
        if not (Path(folder) / "log.csv").exists():
            raise SystemExit(f"{folder} has no log.csv: name folders that train.py wrote")
    draw_curves(args.folders, args.png)
    print(f"drawn to {args.png}")

FLAGS = dict(  # of each command
    variants="mixers_from json", speed="only lengths prompt n_embd n_head dtype compile json",
    steps="lengths nanogpt json", compiled="only n_embd n_head json", transforms="lengths json",
    flops="lengths n_embd n_head json",
    gpu="only nanogpt", quality="suite only arm source translate data_dir jobs", curves="folders png",
    report="")

if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head is no error
    p = Parser(description=__doc__)
    p.add("what", choices=list(FLAGS), help="what to measure, or to draw")
    p.add("folders", nargs="*", help="curves: what train.py wrote")
    p.add("--png", type=writable, default="curves.png", help="curves: where to draw")
    p.add("--only", help="one arm, or all whose name holds this (speed, compiled, gpu, quality)")
    p.add("--mixers_from", help="variants: a Python file that registers more mixers")
    p.section("quality")
    p.add("--suite", default="decoders", choices=list(SUITES), help="a stopped one goes on where it was")
    p.add("--arm", help='one arm more: "label: --mixer=haar --levels=5"')
    p.add("--source", help="where the data set comes from: a text for decoders, a folder for multi30k")
    p.add("--translate", help="a folder whose .en files each run translates, into results/unseen")
    p.add("--data_dir", default="data")
    p.add("--jobs", type=int, default=1, low=1, high=1024, help="trainings at a time, sharing the cores")
    p.section("speed")
    p.add("--lengths", type=comma_separated, help="512,1024; steps: one length, of 2 rows")
    p.add("--prompt", type=int, default=20_000, low=1, high=2**24, help="tokens that state reads")
    p.add("--n_embd", type=int, default=128, low=1, high=2**16)
    p.add("--n_head", type=int, default=4, low=1, high=2**16)
    p.add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: 16 bits on CUDA")
    p.add("--compile", type=bool, default=True, help="time the compiled modules too")
    p.add("--json", type=writable, help="add this run to the list of runs in that file (not quality)")
    p.add("--nanogpt", help="steps, gpu: a copy of nanoGPT, timed beside ours")
    args = p.parse_args()
    if args.n_embd % args.n_head:
        p.error(f"--n_embd={args.n_embd} must be divisible by --n_head={args.n_head}")
    for flag in p.given:  # one that belongs to another command would change nothing here
        if flag != "what" and flag not in FLAGS[args.what].split():
            p.error(f"--{flag} is no flag of {args.what}, it takes: {FLAGS[args.what] or 'none'}")
    if args.mixers_from:
        register(args.mixers_from)
    globals()[args.what](args)  # the function of that name
