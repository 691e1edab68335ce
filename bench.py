"""
Measure: what every mixer promises, how fast it is, what trained models score.

    python bench.py variants  # reconstruction, leak, chunks, state of every variant
    python bench.py speed --json=results/speed.json  # time and memory beside flash attention, by turns
    python bench.py steps --nanogpt=DIR  # whole training steps beside nanoGPT's
    python bench.py quality --suite=numbers  # train a grid, one row of results/numbers.csv per run
    python bench.py curves out-a out-b  # log.csv of several runs, laid over one another
    python bench.py report  # results/ -> tables in both READMEs, and the figures

Rows that a suite's CSV has are skipped: it may be stopped at any time and started again. The experiments'
controls and peers are mixers that register themselves when this file is imported:

    python train.py --mixers_from=bench.py --mixer=shortconv
"""

import csv
import dataclasses
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
from tqdm import tqdm

import model
from model import CHOICES, MIXERS, ModelConfig, build_mixer
from prepare_data import Parser, comma_separated, prepare, replacing, writable
from sample import keep_freed_pages, register

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"

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
    state, ys, sizes = m.init_state(len(x), dtype=x.dtype), [], {}
    for start, end in zip([0, *cuts], cuts):
        y, state = m(x[:, start:end], state=state)
        ys.append(y)
        sizes[end] = state_bytes(state) // len(x)
    return torch.cat(ys, 1), sizes

def reconstruction(m):
    """max |idwt(dwt(x)) - x| of a mixer's own transform, its parameters shaken first; - if it has none."""
    for w in m.modules():
        if isinstance(w, model.Wavelet) and w.L > 0:
            for q in w.parameters():
                q.add_(0.3 * torch.randn_like(q))
            x = torch.randn(2, 256, w.C)
            return f"{(w.idwt(w.dwt(x)) - x).abs().max().item():.1e}"
    return "-"

@torch.no_grad()
def variants(args):
    print(" " * 53 + "parameters idwt(dwt)  leak  chunks state at 64    at 256 of 256 tokens, C=64, causal")
    for fields in all_variants():
        torch.manual_seed(0)
        m = build_mixer(ModelConfig(n_embd=64, block_size=256, **fields), causal=True).eval()
        x, cuts = torch.randn(2, 256, 64), sorted({64, 256, *torch.randint(1, 256, (8,)).tolist()})
        y = m(x)
        pieces, sizes = in_chunks(m, x, cuts)
        leak, error = leaking_positions(m, x, y), (pieces - y).abs().max()
        params, lost = sum(q.numel() for q in m.parameters()), reconstruction(m)
        name = " ".join(f"{k}={v}" for k, v in fields.items()) + " (the paper's)" * ("undecimated" in fields)
        print(f"{name:52s} {params:10,d} {lost:>9s} {leak:5d} {error:7.1e}",
              f"{sizes[64]:9,d} B {sizes[256]:7,d} B")

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
    "haar core, no projection": (Core, False, "copy", dict(undecimated="no")),
    "copy": (Copy, False, None, {}),
}
SHOWN = ["haar, L=8", "haar, causal, L=8", "wersa, m=128", "wersa, causal, m=128", "wavspa, 1 level",
         "wavspa, causal, 1 level"]  # the README's six rows
AT, POSITIONS = 8192, (1024, 65536)  # where the tables look first; where a token is decoded

def sync():
    if torch.cuda.is_available():
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

def build(name, card, T, library=model):
    kind, causal, _, own = SPEED[name]
    known = isinstance(kind, str)
    fields = dict(arch="decoder" if causal else "encoder", mixer=kind if known else "haar", gate=False,
                  block_size=max(T, 256), n_embd=card["n_embd"], n_head=card["n_head"]) | own
    if library is not model and kind == "haar":  # what the first edition called it
        fields["haar_encoder"] = "block" if fields.pop("undecimated", None) else "atrous"
    torch.manual_seed(0)
    m = (library.build_mixer if known else kind)(library.ModelConfig(**fields), causal)
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
    """The most memory that this process has held so far, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def cell(name, T, card):
    """One arm at one length, in a process of its own: its peak memory over module and input, then its time by
    turns with what it is held against -> a dict for each form."""
    modules = {"eager": build(name, card, T)}
    call, against = passes(modules["eager"], card, T), SPEED[name][2]
    passes(modules["eager"], card, 8)()  # threads, autograd's engine, lazy imports
    before = peak()
    call()
    memory, found = peak() - before, []
    if against:
        modules["eager rival"] = build(against, card, T)
    if card["compile"]:
        for who, m in list(modules.items()):
            modules[who.replace("eager", "compiled")] = torch.compile(m, dynamic=True)
    if card["first_at"] == T and SPEED[name][0] in ("haar", "wersa", "wavspa"):
        modules["first"] = build(name, card, T, load_library(card["first"], "first_edition"))
    calls = {who: passes(m, card, T) for who, m in modules.items()}
    by_turns(calls, 0)  # warms up, and compiles
    seconds = by_turns(calls)
    for form in ("eager", "compiled"):
        if form in seconds:
            c = dict(arm=name, T=T, form=form, seconds=statistics.median(seconds[form]), memory=memory)
            if against:
                c["ratio"] = times_faster(seconds[form], seconds[f"{form} rival"])
            if "first" in seconds:  # of the first edition's time
                c["of_first"] = times_faster(seconds["first"], seconds[form])
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
    work, name, T, card = job
    torch.set_num_threads(card["threads"])
    keep_freed_pages()
    try:
        return work(name, T, card)
    except torch.cuda.OutOfMemoryError:
        return []

def chosen(arms, word):
    """The arm that --only names, or all whose name holds it."""
    found = [word] if word in arms else [name for name in arms if not word or word in name]
    if not found:
        raise SystemExit(f"no arm's name holds --only={word}, there are: {'; '.join(arms)}")
    return found

def speed(args):
    cuda = torch.cuda.is_available()
    lengths = args.lengths or [2 ** i for i in (range(10, 18) if cuda else range(9, 14))]
    dtype = args.dtype or ("bfloat16" if cuda else "float32")
    card = dict(name=machine_name(), device="cuda" if cuda else "cpu", threads=torch.get_num_threads(),
                dtype=dtype, torch=torch.__version__, git=git_state(), date=time.strftime("%Y-%m-%d"),
                n_embd=args.n_embd, n_head=args.n_head, compile=args.compile)
    runs = load_runs(args.json) if args.json else []  # a bad file is found before the work
    if args.first:
        load_library(args.first, "first_edition")
    names, jobs, cells = chosen(SPEED, args.only), [], []
    print("  ".join(f"{k} {v}" for k, v in card.items()))
    names += {SPEED[name][2] for name in names} - {None, *names}
    more = dict(card, first=args.first, first_at=args.first and (AT if AT in lengths else lengths[-1]))
    for name in names:
        stored = "stored" in name
        jobs += [(cell, name, T, more) for T in lengths if cuda or args.lengths or T <= 4096 or not stored]
        if SPEED[name][1] and not stored:
            jobs.append((decode_cell, name, args.prompt, card))
    fresh = get_context("forkserver")
    fresh.set_forkserver_preload(["torch", "numpy", "tqdm"])  # imported once, before the fork
    for job in tqdm(jobs, unit="cell", leave=False):
        with ProcessPoolExecutor(1, fresh) as process:
            try:
                cells += process.submit(in_a_process, job).result()
            except BrokenProcessPool:  # the kernel's answer to too much memory
                pass
    run = dict(card=card, cells=cells)
    print("\n" + "\n".join(speed_tables([run])))
    if args.json:
        with replacing(args.json) as f:
            json.dump([*runs, run], f, indent=1)

def load_runs(path):
    """The list of runs to which speed --json appends."""
    try:
        runs = json.loads(Path(path).read_text()) if os.path.exists(path) else []
        assert isinstance(runs, list) and all({"card", "cells"} <= run.keys() for run in runs)
    except (OSError, ValueError, AssertionError, AttributeError, TypeError):
        raise SystemExit(f"{path} holds no list of runs of bench.py speed --json: move it away")
    return runs

def merged(runs):
    """Runs on the last one's kind of machine -> what it was, {(arm, T, form): cell}. A figure is the median
    of their medians, a ratio has the range, of one run p20 and p80. sure: in every run p20 is above 1."""
    kind = ("name", "dtype", "n_embd", "n_head", "threads")
    runs = [run for run in runs if all(run["card"][k] == runs[-1]["card"][k] for k in kind)]
    where, found, cells = f"{len(runs)} run{'s' * (len(runs) > 1)}", {}, {}
    for k in runs[0]["card"]:
        where += f", {k} " + " ".join(dict.fromkeys(str(run["card"][k]) for run in runs))
    for run in runs:
        for c in run["cells"]:
            found.setdefault((c["arm"], c["T"], c["form"]), []).append(c)
    for key, same in found.items():
        m = cells[key] = dict(ratio="", of_first="", sure=all(c.get("ratio", [0])[0] > 1 for c in same))
        for k in ("seconds", "memory", "ms"):
            if k in same[0]:
                m[k] = np.median([c[k] for c in same], 0)
        for k in ("ratio", "of_first"):
            triples = [c[k] for c in same if k in c]
            middle = sorted(t[1] for t in triples)
            if len(triples) == 1:
                m[k] = interval(*triples[0])
            elif triples:
                m[k] = interval(middle[0], statistics.median(middle), middle[-1])
    return where, cells

def interval(low, middle, high):
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"

def crossover(cells, name, form):
    """The first length from which on name is surely faster than what it is held against."""
    lengths = sorted(T for arm, T, f in cells if (arm, f) == (name, form))
    first = f"not up to {lengths[-1]:,}" if lengths else ""
    for T in reversed(lengths):
        if not cells[name, T, form]["sure"]:
            break
        first = f"{T:,}"
    return first

def as_table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])

def speed_tables(runs, names=None):
    """What speed has found, as Markdown; names: the short tables, of these arms alone."""
    where, cells = merged(runs)
    lengths = sorted({T for _, T, form in cells if form == "eager"})
    arms = names or [name for name in SPEED if any(arm == name for arm, _, _ in cells)]
    at, nothing, rows = AT if AT in lengths else lengths[-1], dict(ratio="", of_first=""), []
    yield f"{where}. One row, forward and backward: times as fast as what it stands against, {at:,} tokens.\n"
    for name in arms:
        against = SPEED[name][2]
        c, base = cells.get((name, at, "eager")), cells.get((against, at, "eager"))
        if c and base:
            compiled = cells.get((name, at, "compiled"), nothing)
            memory = c["memory"] / max(base["memory"], 1)
            rows.append([name, against, c["ratio"], crossover(cells, name, "eager"), compiled["ratio"],
                         crossover(cells, name, "compiled"), f"{memory:.2f}"])
    yield as_table(["", "against", "eager", "ahead from T", "compiled", "ahead from T", "its memory"], rows)
    rows = [[arm, *(f"{ms:.3f}" for ms in c["ms"]), f"{T:,}", f"{c['seconds']:.3f}", c["ratio"]]
            for (arm, T, form), c in cells.items() if form == "decode" and arm in arms]
    if rows:
        at = [f"at {t:,}" for t in POSITIONS]
        yield "\n" + as_table(["ms a token", *at, "a prompt of", "seconds", "times one parallel pass"], rows)
    if names:
        return
    rows = [[arm, f"{T:,}", c["of_first"], cells.get((arm, T, "compiled"), nothing)["of_first"]]
            for (arm, T, form), c in cells.items() if form == "eager" and c["of_first"]]
    if rows:
        head = ["time, second / first edition", "T", "eager / eager", "compiled / eager"]
        yield "\n" + as_table(head, rows)
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
    """Time of these arms by length, the faster of eager and compiled; causal ones dashed."""
    cells = merged(runs)[1]
    for name in names:
        points = {}
        for arm, T, form in sorted(cells):
            if arm == name and form != "decode":
                points[T] = min(points.get(T, math.inf), cells[arm, T, form]["seconds"] * 1e3)
        if points:
            width = 2.5 if name in (FLASH, CAUSAL) else 1.2
            dashes = "--" if "causal" in name else "-"
            ax.plot(*zip(*points.items()), marker=".", ls=dashes, lw=width, label=name)
    ax.set(yscale="log", xlabel="tokens", ylabel="ms", title="forward and backward, eager or compiled")
    ax.set_xscale("log", base=2)
    ax.legend(fontsize=7)

def steps(args):
    """Tokens a second of whole training steps, ours and by turns nanoGPT's own GPT (--nanogpt, a copy of
    github.com/karpathy/nanoGPT), at the shapes of its Shakespeare example; or of 2 rows of --lengths."""
    cuda = torch.cuda.is_available()
    device, B, shape = "cpu", 12, dict(n_layer=4, n_head=4, n_embd=128, block_size=64)
    if cuda:
        device, B, shape = "cuda", 64, dict(n_layer=6, n_head=6, n_embd=384, block_size=256)
    if args.lengths:  # the WERSA paper's small model on one long text
        B, shape = 2, dict(n_layer=2, n_head=4, n_embd=64, block_size=args.lengths[0])
    nets = {}
    if args.nanogpt:
        theirs = load_library(args.nanogpt, "nanogpt")
        with redirect_stdout(None):
            nets["nanoGPT"] = theirs.GPT(theirs.GPTConfig(vocab_size=65, dropout=0.0, bias=False, **shape))
    for fields in (dict(mixer="attention", gate=False, pos="learned"), dict(mixer="attention"),
                   dict(mixer="haar"), dict(mixer="wersa"), dict(mixer="haar,haar,haar,attention")):
        name = " ".join(f"{k}={v}" for k, v in fields.items())
        nets[name] = model.WaveletTransformer(ModelConfig(arch="decoder", vocab_size=65, **shape, **fields))
    idx = torch.randint(1, 65, (2, B, shape["block_size"]), device=device)
    keep_freed_pages()

    def training_step(net):
        with redirect_stdout(None):
            optimizer = net.to(device).configure_optimizers(0.1, 1e-3, (0.9, 0.99), device)
        run = torch.compile(net, dynamic=True) if cuda else net

        def call():
            with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
                loss = run(*idx)[1]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return call
    calls, rows = {name: training_step(net) for name, net in nets.items()}, []
    by_turns(calls, 1.0)
    seconds = by_turns(calls, 20.0)
    for name, s in seconds.items():
        rate = idx[0].numel() / statistics.median(s)
        ratio = interval(*times_faster(s, next(iter(seconds.values()))))
        rows.append([name, f"{statistics.median(s) * 1e3:.1f}", f"{rate:,.0f}", ratio])
    print(f"{machine_name()}, torch {torch.__version__}, {git_state()}: {B} rows of {shape}\n")
    print(as_table(["", "ms a step", "tokens a second", "times as fast as the first"], rows))

def machine_name():
    if torch.cuda.is_available():
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
suite("multi30k_long", "multi30k, larger and longer, joint BPE of 10,000",
      TRANSLATE + " --n_layer=4 --dropout=0.2 --beam=5 --max_iters=12000 --warmup_iters=1000 "
      "--eval_interval=1000",
      some(PAIRS, "attention; attention, no gate; wersa; haar; haar, attention cross; hybrid"),
      rates=(2e-3, 1e-3, 4e-3), data="long", prepare=dict(multi30k=dict(vocab_size=10_000)))
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

suite("tasks", "every data set with a short training of one mixer", "--n_embd=64 --max_iters=1500", arms("""
    numbers, wersa: wersa n_embd=128 max_iters=800
    listops, haar: haar dataset=listops; lego, attention: attention dataset=lego n_layer=3 learning_rate=1e-3
    pathfinder, attention: attention dataset=pathfinder batch_size=32 max_iters=800 learning_rate=1e-3
    recall, attention: attention dataset=recall n_head=2 batch_size=128 max_iters=3000 learning_rate=5e-4
    multi30k, wersa: wersa dataset=multi30k n_embd=128 max_iters=600 dropout=0.1 label_smoothing=0.1
    wmt16, attention: attention dataset=wmt16 n_embd=128 max_iters=2500 metric_rows=100
    imdb, wersa: wersa dataset=imdb block_size=512 batch_size=32 max_iters=600 learning_rate=1e-3
    text, haar: haar dataset=text n_embd=128 block_size=128 batch_size=16 n_layer=4 max_iters=400"""),
      seeds=(1337,), data="tasks", match=False, prepare=dict(
          listops=SHORT["listops"], pathfinder=dict(rows=20_000), wmt16=dict(vocab_size=4000),
          recall=dict(n_pairs=8, n_keys=32), text=dict(tokenizer="bytes")))

SMOKE = {f"numbers: {arm}": PAIRS[arm] for arm in ("attention", "haar", "haar, attention cross")}
SMOKE |= {f"listops: {arm}": ["--dataset=listops", *flags] for arm, flags in WAVSPA.items()}
SMOKE |= {f"recall: {arm}": ["--dataset=recall", *flags] for arm, flags in WERSA.items()}
suite("smoke", "a miniature of three suites", "--n_embd=32 --n_head=2 --batch_size=32 --warmup_iters=5 "
      "--max_iters=20 --eval_interval=20 --eval_rows=50 --metric_rows=20", SMOKE, (1,), match=False, **TINY)

# -----------------------------------------------------------------------------
# quality: the runner

COLUMNS = ("suite arm seed learning_rate params steps seconds val_loss test_loss test_metric metric n "
           "trivial groups far data_rows data_tokens data_seconds git machine torch threads flags").split()

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

def quality(args):
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
        out = Path(args.data_dir) / "runs" / args.suite / re.sub(r"\W+", "-", f"{arm} {seed} {rate} {git}")
        if git.endswith("-dirty") and out.exists():  # what was trained before an edit is not gone on with
            print(f"{arm}, seed {seed}, rate {rate}: begun anew, the code is not committed", flush=True)
            shutil.rmtree(out)
        flags = [f"--seed={seed}", *arms[arm], f"--learning_rate={rate}"]
        typed = [flag.replace("=bench.py", f"={HERE / 'bench.py'}") for flag in flags]
        typed += [f"--data_dir={data_dir}", f"--out_dir={out}", "--resume"]
        run = subprocess.run([sys.executable, HERE / "train.py", *typed], capture_output=True, text=True,
                             env=dict(os.environ, OMP_NUM_THREADS=str(threads)))
        if run.returncode:
            failed.append(job)
            raise SystemExit(f"{arm}, seed {seed}: {(run.stderr.strip() or 'killed').splitlines()[-1]}")
        result = json.loads((out / "result.json").read_text())
        row = dict(result, suite=args.suite, arm=arm, seed=seed, learning_rate=rate, flags=" ".join(flags),
                   git=git, machine=machine_name(), torch=torch.__version__, threads=threads)
        row.update({f"data_{k}": v for k, v in result["data"].items()})
        row["groups"] = result["test"].get("groups", {})
        row.update({k: json.dumps(row[k]) for k in ("far", "trivial", "groups")})
        with writing:  # as a whole: a kill leaves the old file or the new one
            rows = [*read_rows(path), row]
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as f:
                w = csv.DictWriter(f, COLUMNS, extrasaction="ignore", restval="", lineterminator="\n")
                w.writeheader()
                w.writerows(rows)
        shutil.rmtree(out)
        print(f"{arm}, seed {seed}, rate {rate}: {result['metric']} {result['test_metric']:.4f}, "
              f"{result['params']:,} parameters, {result['seconds']:.0f} s", flush=True)

    first, *more = map(str, suite["seeds"])  # the first tries all rates, the others the best on val
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
    """A suite's CSV -> {arm: its rows at the rate that is best on val, by the seeds that tried them all}."""
    arms, best = {}, {}
    for r in read_rows(path):
        arms.setdefault(r["arm"], {}).setdefault(r["learning_rate"], []).append(r)

    def losses(rows):
        found = [float(r["val_loss"]) for r in rows if r.get("val_loss")]  # early rows have none
        return [v if math.isfinite(v) else math.inf for v in found]
    for arm, rates in arms.items():
        tried = [{r["seed"] for r in rows} for rows in rates.values()]
        common = set.intersection(*tried) or set.union(*tried)

        def loss(rows):
            shared = [r for r in rows if r["seed"] in common]
            return statistics.mean(losses(shared) or losses(rows) or [math.inf])
        best[arm] = min(rates.values(), key=loss)
    return best

def said(values):
    """mean ± standard deviation"""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"

def score(rows, key="test_metric"):
    return [float(r[key]) for r in rows]

def listed(scores):
    return ", ".join(f"{name} {v:.3f}" for name, v in scores.items())

def in_order(arms):
    """The arms of a suite, best first."""
    lower = next(iter(arms.values()))[0]["metric"] in LOWER
    return sorted(arms, key=lambda arm: statistics.mean(score(arms[arm])), reverse=not lower)

def table(path):
    """One suite's CSV -> a Markdown table, best arm first, trivial scores last. Where the arms are data sets:
    each with its size and its own trivial scores."""
    best, rows, lines = arms_of(path), read_rows(path), []
    if len({(r["n"], r["metric"]) for r in rows}) > 1:  # several test sets
        for arm, rs in best.items():
            r = rs[0]
            size = [f"{int(r[k]):,}" for k in ("data_rows", "data_tokens")]
            lines.append([arm, *size, f"{float(r['data_seconds']):.1f} s", f"{r['metric']} {said(score(rs))}",
                          listed(json.loads(r["trivial"])), r["steps"]])
        return as_table(["arm", "rows", "tokens", "prepared in", "test score", "trivial", "steps"], lines)
    far = {arm: [json.loads(r.get("far") or "[]") for r in rs] for arm, rs in best.items()}
    early = any(not f for fs in far.values() for f in fs)  # rows that have none
    beyond = [] if early else next(iter(far.values()))[0]
    rates = sorted({r["learning_rate"] for r in rows}, key=float)
    head = ["arm", "parameters", f"{rows[0]['metric']}, test"]
    head += [*(f"at up to {f['block_size']} tokens" for f in beyond), "test loss", "n"]
    if len(rates) > 1:  # what val chose, and the choice itself
        head += ["rate", *(f"test at {rate}" for rate in rates)]
    for arm in in_order(best):
        rs = best[arm]
        line = [arm, f"{int(rs[0]['params']):,}", said(score(rs))]
        line += [said([f[i]["metric"] for f in far[arm]]) for i in range(len(beyond))]
        line += [said(score(rs, "test_loss")), len(rs)]
        if len(rates) > 1:
            line.append(rs[0]["learning_rate"])
            for rate in rates:
                at = [r for r in rows if (r["arm"], r["learning_rate"]) == (arm, rate)]
                line.append(said(score(at)) if at else "")
        lines.append(line)
    trivial = json.loads(next(iter(best.values()))[0].get("trivial") or "{}")
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
    for suite in ("numbers", "decoders", "multi30k"):
        best = arms_of(RESULTS / f"{suite}.csv")
        if best:
            metric, line = next(iter(best.values()))[0]["metric"], []
            for rs in (best.get(name) for name in names):
                size = int(rs[0]["params"]) / 1e6 if rs else 0
                line.append(f"{said(score(rs))}, n = {len(rs)}, {size:.2f} M" if rs else "")
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
    for path in sorted(RESULTS.glob("**/*.csv")):
        name = path.relative_to(RESULTS).with_suffix("").as_posix()
        blocks[name] = f"{protocol(name)}\n{table(path)}" if name in SUITES else table(path)
        if name in SUITES and f"<!-- {name} -->" not in text:  # its first rows: a section of its own
            section = f"### {name}\n\n<!-- {name} -->\n<!-- end -->\n\n"
            text = text.replace("## First edition", section + "## First edition", 1)
    for path in RESULTS.glob("**/faults.md"):  # python test_model.py 20 > results/faults.md
        name = path.relative_to(RESULTS).with_suffix("").as_posix()
        blocks[name] = path.read_text(encoding="utf-8").strip()
    main = {"results": overall()}
    if runs:
        blocks["speed"] = "\n".join(speed_tables(runs)).strip()
        main["speed"] = "\n".join(speed_tables(runs, SHOWN)).strip()
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
    from prepare_data import draw_curves
    draw_curves(args.folders, args.png)
    print(f"drawn to {args.png}")

FLAGS = dict(variants="mixers_from", quality="suite only arm source data_dir jobs", report="",
             curves="folders png",
             speed="only lengths prompt n_embd n_head dtype compile json first", steps="lengths nanogpt")

if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head is no error
    p = Parser(description=__doc__)
    p.add("what", choices=list(FLAGS), help="what to measure, or to draw")
    p.add("folders", nargs="*", help="curves: what train.py wrote")
    p.add("--png", type=writable, default="curves.png", help="curves: where to draw")
    p.add("--only", help="one arm, or all whose name holds this (speed, quality)")
    p.add("--mixers_from", help="variants: a Python file that registers more mixers")
    p.section("quality")
    p.add("--suite", default="decoders", choices=list(SUITES), help="a stopped one goes on where it was")
    p.add("--arm", help='one arm more: "label: --mixer=haar --levels=5"')
    p.add("--source", help="where the data set comes from: a text for decoders, a folder for multi30k")
    p.add("--data_dir", default="data")
    p.add("--jobs", type=int, default=1, low=1, high=1024, help="trainings at a time, sharing the cores")
    p.section("speed")
    p.add("--lengths", type=comma_separated, help="512,1024; steps: one length, of 2 rows")
    p.add("--prompt", type=int, default=20_000, low=1, high=2**24, help="tokens that state reads")
    p.add("--n_embd", type=int, default=128, low=1, high=2**16)
    p.add("--n_head", type=int, default=4, low=1, high=2**16)
    p.add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: 16 bits on CUDA")
    p.add("--compile", type=bool, default=True, help="time the compiled modules too")
    p.add("--json", type=writable, help="add this run to the list of runs in that file")
    p.add("--first", help="a copy of the first edition (commit 9d7600d), timed beside ours")
    p.add("--nanogpt", help="steps: a copy of nanoGPT, timed beside ours")
    args = p.parse_args()
    if args.n_embd % args.n_head:
        p.error(f"--n_embd={args.n_embd} must be divisible by --n_head={args.n_head}")
    for flag in p.given:  # one that belongs to another command would change nothing here
        if flag != "what" and flag not in FLAGS[args.what].split():
            p.error(f"--{flag} is no flag of {args.what}, it takes: {FLAGS[args.what] or 'none'}")
    if args.mixers_from:
        register(args.mixers_from)
    commands = dict(variants=variants, speed=speed, steps=steps, quality=quality, report=report,
                    curves=curves)
    commands[args.what](args)
