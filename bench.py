"""
Measure: what every variant promises, and what trained models score.

    python bench.py speed                                        # time and memory against flash attention, crossovers, a plot
    python bench.py steps --nanogpt=DIR                          # training steps, tokens a second, beside nanoGPT's
    python bench.py variants                                     # each variant's reconstruction, leak, step error, state size
    python bench.py quality --suite=decoders --source=my.txt     # train a grid, one row of results/SUITE.csv per run
    python bench.py report                                       # results/*.csv -> the README's tables and figures

A suite's rows that are already in its CSV are skipped, so it may be stopped at any time and started again.
"""

import argparse
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
from contextlib import nullcontext, redirect_stdout
from itertools import takewhile
from multiprocessing import get_context
from pathlib import Path
from threading import Lock

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import model
from model import ModelConfig, Wavspa, build_mixer
from prepare_data import Parser, comma_separated, prepare, replacing, writable
from sample import keep_freed_pages, learned, load_model

HERE = Path(__file__).resolve().parent

# -----------------------------------------------------------------------------
# variants

VARIANTS = {
    "attention": dict(mixer="attention"),
    "attention, gated": dict(mixer="attention", gate=True),
    "haar atrous": dict(mixer="haar"),
    "haar atrous, concat": dict(mixer="haar", haar_aggregate="concat"),
    "haar atrous, gated": dict(mixer="haar", gate=True),
    "haar atrous, fixed taps": dict(mixer="haar", haar_learnable=False),
    "haar partial": dict(mixer="haar", haar_causal="partial"),
    "haar partial, tiled": dict(mixer="haar", haar_causal="partial", haar_tile=True),
    "haar literal (leaks)": dict(mixer="haar", haar_causal="literal"),
    **{f"wavspa {w} {p}": dict(mixer="wavspa", levels=3, wavelet=w, wavelet_params=p) for w in ("haar", "db2", "db20") for p in ("fixed", "ada", "ortho", "lift")},
    "wavspa, one attention a band": dict(mixer="wavspa", levels=3, wavspa_shared=False),
    "wavspa around wersa": dict(mixer="wavspa", levels=3, inner="wersa"),
    "wavspa sorted": dict(mixer="wavspa", levels=3, wavspa_causal="sorted"),
    **{f"wersa {f}, L={l}": dict(mixer="wersa", feature_map=f, wersa_levels=l) for f in ("relu", "exp") for l in (0, 2, 4)},
    "wersa orthogonal": dict(mixer="wersa", orthogonal_features=True),
}


def state_bytes(state):
    if torch.is_tensor(state):
        return state.numel() * state.element_size()
    return sum(map(state_bytes, state)) if isinstance(state, (list, tuple)) else 0


def reconstruction(m, x):
    """max |IDWT(DWT(x)) - x| of a mixer's own transform, with its parameters shaken first, or None if it has no inverse."""
    if not isinstance(m, Wavspa):
        return None
    for q in m.parameters():
        q.data.add_(0.3 * torch.randn_like(q))
    return m.reconstruction_error(x)


@torch.no_grad()
def variants(args):
    """Leak: positions whose output moves, by a bit, when only later tokens change. Step: max |step - parallel|."""
    print(f"{'variant':30s} {'parameters':>10s} {'reconstruction':>14s} {'leak':>5s} {'step error':>10s} {'state at 64':>12s} {'at 256':>10s}  (C=64, H=4, float32)")
    for name, kw in VARIANTS.items():
        torch.manual_seed(0)
        m = build_mixer(ModelConfig(n_embd=64, block_size=256, **kw), causal=True).eval()
        x, sizes, leak = torch.randn(2, 256, 64), {}, 0
        y, state, steps = m(x), m.init_state(2, dtype=x.dtype), []
        for t in range(256):
            y_t, state = m.step(x[:, t], state)
            steps.append(y_t)
            sizes[t + 1] = state_bytes(state) // 2
        for t in (1, 2, 3, 7, 8, 15, 16, 31, 33, 63, 100, 255):
            other = x.clone()
            other[:, t:] = 100 * torch.randn_like(other[:, t:])
            leak += (m(other)[:, :t] != y[:, :t]).any(-1).sum(1).max().item()
        error, rec = (torch.stack(steps, 1) - y).abs().max().item(), reconstruction(m, x)
        print(f"{name:30s} {sum(q.numel() for q in m.parameters()):10,d} {'-' if rec is None else f'{rec:.1e}':>14s} {leak:5d} {error:10.1e} {sizes[64]:10,d} B {sizes[256]:8,d} B")


# -----------------------------------------------------------------------------
# speed


class Softmax(model.Attention):
    """What the papers compare with: softmax attention that stores its T x T matrix."""

    def forward(self, x, mask=None):
        q, k, v = (self.heads(u) for u in self.c_attn(x).chunk(3, -1))
        W = self.turns(q, 0)
        scores = model.turn(q, W) @ model.turn(k, W).mT / math.sqrt(q.size(-1))
        if self.causal:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -math.inf)
        return self.out(scores.softmax(-1) @ v)


class StoredWersa(model.Wersa):
    """Linear attention as one would first write it: all features of all tokens stored, autograd for the rest."""

    def attend(self, qkv, R, W, w, real, how):
        phi, (q, k, v) = model.Features(how, R, W, w, real), qkv.transpose(1, 3).unbind(2)
        return model.normalise(phi(phi.load(q), True) @ (phi(phi.load(k)).mT @ model.ones(v, real, (slice(None),) * 3)))[0]


class HaarCore(model.Haar):
    """haar without its projection, to be held against a copy of the tensor."""

    def forward(self, x, mask=None):
        return self.block(x)[0]


class Copy(nn.Module):
    def __init__(self, cfg, causal=False):
        super().__init__()

    def forward(self, x):
        return x.clone()


KINDS = {"softmax": Softmax, "stored": StoredWersa, "core": HaarCore, "copy": Copy}
SPEED = {  # arm -> (kind, causal, what it is compared with, its flags, longest T on a CPU)
    "flash SDPA": ("attention", False, "flash SDPA", {}, 32768),
    "softmax, matrix stored": ("softmax", False, "flash SDPA", {}, 4096),
    "haar": ("haar", False, "flash SDPA", {}, 32768),
    "haar undecimated, L=8": ("haar", False, "flash SDPA", dict(haar_encoder="atrous", levels=8), 32768),
    "haar undecimated, gated, L=8": ("haar", False, "flash SDPA", dict(haar_encoder="atrous", levels=8, gate=True), 32768),
    "wavspa, 1 level": ("wavspa", False, "flash SDPA", dict(levels=1), 8192),
    "wersa": ("wersa", False, "flash SDPA", {}, 32768),
    "wersa m=1024": ("wersa", False, "flash SDPA", dict(n_features=1024), 32768),
    "wersa m=1024, features stored": ("stored", False, "flash SDPA", dict(n_features=1024), 8192),
    "flash SDPA causal": ("attention", True, "flash SDPA causal", {}, 8192),
    "softmax causal, matrix stored": ("softmax", True, "flash SDPA causal", {}, 4096),
    "haar atrous, L=8": ("haar", True, "flash SDPA causal", dict(levels=8), 32768),
    "haar partial": ("haar", True, "flash SDPA causal", dict(haar_causal="partial"), 32768),
    "wavspa atrous, 1 level": ("wavspa", True, "flash SDPA causal", dict(levels=1), 8192),
    "wavspa sorted, 1 level": ("wavspa", True, "flash SDPA causal", dict(levels=1, wavspa_causal="sorted"), 8192),
    "wersa causal": ("wersa", True, "flash SDPA causal", {}, 32768),
    "haar, no projection": ("core", False, "copy", {}, 8192),
    "copy": ("copy", False, "copy", {}, 8192),
}
STORED = {"flash SDPA": "softmax, matrix stored", "flash SDPA causal": "softmax causal, matrix stored"}
CLAIMS = [  # (what, against, T, mode, median or memory, what we aim at): the ratios that people ask for first
    ("wersa m=1024", "flash SDPA", 8192, "forward and backward", "median", "3"),
    ("wersa m=1024", "wersa m=1024, features stored", 8192, "forward and backward", "median", "4"),
    ("wersa m=1024", "wersa m=1024, features stored", 8192, "forward and backward", "memory", "6"),
    ("wersa m=1024", "flash SDPA", 32768, "forward and backward", "memory", "at most 1.5"),
    ("wersa", "flash SDPA", 8192, "forward and backward", "median", "12"),
    ("wersa causal", "flash SDPA causal", 8192, "forward and backward", "median", "5"),
    ("haar", "flash SDPA", 8192, "forward and backward", "median", "50"),
    ("haar, no projection", "copy", 8192, "forward", "median", "at most 6"),
    ("haar atrous, L=8", "flash SDPA causal", 8192, "forward and backward", "median", "15"),
    ("haar undecimated, L=8", "flash SDPA", 8192, "forward and backward", "median", "15"),
    ("wavspa, 1 level", "flash SDPA", 8192, "forward and backward", "median", "1.6"),
]
MODES = {"forward and backward": True, "forward": False}


def peak():
    """The most memory that this process has held so far, in bytes."""
    import resource                                            # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fast_forward(state, t):
    """A decoder's state as it would be at position t: counters set, caches of attention filled with zeros."""
    if torch.is_tensor(state):
        return torch.zeros(*state.shape[:2], t, state.size(3), device=state.device, dtype=state.dtype) if state.dim() == 4 and state.size(2) == 0 else state
    return type(state)(fast_forward(s, t) for s in state) if isinstance(state, (list, tuple)) else t if isinstance(state, int) else state


def build(kind, causal, flags, card, T):
    torch.manual_seed(0)
    cfg = ModelConfig(n_embd=card["n_embd"], n_head=card["n_head"], block_size=max(T, 256), **{"mixer": kind if kind in model.MIXERS else "haar", **flags})
    return KINDS.get(kind, build_mixer)(cfg, causal).to(card["device"], getattr(torch, card["dtype"])).eval()


def earlier(path):
    """--compare=old.json -> what speed --json wrote."""
    try:
        found = json.load(open(path))
        return dict(cells=found["cells"], card=found["card"])
    except (OSError, ValueError, KeyError, TypeError):
        raise argparse.ArgumentTypeError(f"{path} was not written by bench.py speed --json")


def chosen(arms, word):
    """The arm that --only names, or all whose name holds it."""
    found = {name: arm for name, arm in arms.items() if not word or word == name or word in name and word not in arms}
    if not found:
        print(f"no arm's name holds --only={word}, there are: {'; '.join(arms)}", file=sys.stderr)
        sys.exit(2)
    return found


def holding_model(folder):
    if not os.path.exists(os.path.join(folder, "model.py")):
        raise argparse.ArgumentTypeError(f"{folder} holds no model.py: copy it from github.com/karpathy/nanoGPT")
    return folder


def cell(job):
    """One arm at one length, in a process of its own -> {mode: dict(seconds=[...], memory=bytes at the peak over module and
    input)}; None where it did not fit."""
    kind, causal, flags, T, mode, card = job
    cuda = card["device"].startswith("cuda")
    torch.set_num_threads(card["threads"])
    keep_freed_pages()                                         # as train.py does
    sync = torch.cuda.synchronize if cuda else lambda: None
    m = build(kind, causal, flags, card, T)
    if mode:                                                   # decode
        m.requires_grad_(False)
        x, state, seconds = torch.randn(1, card["n_embd"], device=card["device"], dtype=getattr(torch, card["dtype"])), None, []
        for i in range(5):
            state = fast_forward(m.init_state(1, card["device"], x.dtype), T)
            for _ in range(8 if i else 32):                    # what was written into the state costs its first touch once
                _, state = m.step(x, state)
            sync(), (began := time.perf_counter())
            for _ in range(64):
                _, state = m.step(x, state)
            sync(), seconds.append((time.perf_counter() - began) / 64)
            if seconds[-1] > 0.01:                             # a cache so long that its speed is not in question
                break
        return {mode: dict(seconds=seconds, memory=None)}
    x = torch.randn(card["batch"], T, card["n_embd"], device=card["device"], dtype=getattr(torch, card["dtype"]), requires_grad=True)
    dy, run, found = torch.randn_like(x), torch.compile(m) if card["compile"] else m, {}

    def once(back, T=T):
        with torch.set_grad_enabled(back):
            y = run(x[:, :T])
            if back:
                y.backward(dy[:, :T])
                x.grad = None
                m.zero_grad(set_to_none=True)
    try:
        once(True, 8)                                          # threads, autograd's engine and lazy imports have a memory of their own
        before = torch.cuda.memory_allocated() if cuda else peak()
        if cuda:
            once(True), torch.cuda.reset_peak_memory_stats()   # compilation has buffers of its own
        for mode, back in MODES.items():
            sync(), (began := time.perf_counter())
            once(back), sync()
            first = time.perf_counter() - began
            if back:
                memory = (torch.cuda.max_memory_allocated() if cuda else peak()) - before
            if not back and first > 4:                         # so long that its speed is not in question
                break
            seconds = [first] if first > 3 else []
            while first <= 3 and len(seconds) < 200 and (len(seconds) < 3 or sum(seconds) < card["budget"]) and sum(seconds) < 4:
                sync(), (began := time.perf_counter())
                once(back), sync(), seconds.append(time.perf_counter() - began)
            found[mode] = dict(seconds=seconds, memory=memory if back else None)
    except torch.cuda.OutOfMemoryError:
        found = None
    return found


def promises(kind, causal, flags, card):
    """Finite, and without a leak, or there is nothing to time."""
    m, x = build(kind, causal, flags, card, 64), torch.randn(2, 64, card["n_embd"], device=card["device"], dtype=getattr(torch, card["dtype"]))
    with torch.no_grad():
        y, other = m(x), x.clone()
        other[:, 40:] += 1
        if not y.isfinite().all() or causal and not torch.equal(m(other)[:, :40], y[:, :40]):
            raise SystemExit(f"{kind} {flags} is not finite or leaks: not timed")


def speed(args):
    cuda = torch.cuda.is_available()
    card = dict(device="cuda" if cuda else "cpu", name=machine_name(), threads=torch.get_num_threads(), torch=torch.__version__,
                dtype=args.dtype or ("bfloat16" if cuda else "float32"), compile=cuda, git=git_state(), batch=1, n_embd=args.n_embd, n_head=args.n_head, budget=0.15)
    lengths = args.lengths or [2**i for i in (range(10, 18) if cuda else (9, 10, 11, 12, 13, 15))]
    wanted = chosen(SPEED, args.only)
    arms = {name: arm for name, arm in SPEED.items() if name in wanted or name in {SPEED[w][2] for w in wanted}}
    print("  ".join(f"{k} {v}" for k, v in card.items() if k != "budget"))
    for kind, causal, _, flags, _ in arms.values():
        promises(kind, causal, flags, card)
    print("parameters: " + ", ".join(f"{name} {sum(q.numel() for q in build(kind, causal, flags, card, 256).parameters()):,}" for name, (kind, causal, _, flags, _) in arms.items()))
    if args.profile:
        return profile(arms, card)
    jobs = [((kind, causal, flags, T, None, card), name) for T in lengths for name, (kind, causal, _, flags, most) in arms.items() if cuda or args.lengths or T <= most]
    jobs += [((kind, True, flags, T, "decode", card), name) for T in (1024, 65536) for name, (kind, causal, _, flags, _) in arms.items() if causal and kind != "softmax"]
    cells, fresh = [], get_context("forkserver")
    fresh.set_forkserver_preload(["torch", "numpy", "tqdm"])            # imported once, before the fork
    for job, name in tqdm(jobs, unit="cell", leave=False):
        with ProcessPoolExecutor(1, fresh) as process:         # a fresh process: its peak is this cell's own
            try:
                found = process.submit(cell, job).result()
            except BrokenProcessPool:                          # the kernel's answer to too much memory
                found = None
        for mode, c in (found or {mode: dict(seconds=[], memory=None) for mode in MODES}).items():
            t = np.quantile(c["seconds"], (0.5, 0.2, 0.8)).tolist() if c["seconds"] else [None] * 3
            cells.append(dict(arm=name, T=job[3], mode=mode, median=t[0], p20=t[1], p80=t[2], memory=c["memory"], n=len(c["seconds"])))
    result = dict(card=card, cells=cells, **summary(cells))
    for line in speed_tables(result):
        print(line)
    if args.md:
        with replacing(args.md) as f:
            f.write("\n".join(speed_tables(result)) + "\n")
    if args.csv:
        with replacing(args.csv) as f:
            w = csv.DictWriter(f, list(cells[0]), lineterminator="\n")
            w.writeheader(), w.writerows(cells)
    if args.json:
        with replacing(args.json) as f:
            json.dump(result, f, indent=1)
    if args.png:
        speed_plot(result, args.png)
    if args.compare:
        compare(args.compare, result)
    print(json.dumps(result))


def summary(cells):
    """Per arm: the smallest T from which on it is faster (or smaller) than what it is compared with, and the exponents."""
    at, crossover, exponent = {(c["arm"], c["T"], c["mode"]): c for c in cells}, {}, {}
    for name, (_, _, base, _, _) in SPEED.items():
        mine = [c for c in cells if c["arm"] == name and c["mode"] == "forward and backward"]
        for key in ("median", "memory"):
            better = [(c["T"], c[key] < b[key]) for c in mine if (b := at.get((base, c["T"], c["mode"]))) and c[key] and b[key]]
            if better and name != base:
                wins = list(takewhile(lambda x: x[1], reversed(better)))
                crossover.setdefault(name, {})[key] = wins[-1][0] if wins else f"not reached up to {better[-1][0]}"
            long = [(c["T"], c[key]) for c in mine if c["T"] >= 2048 and c[key]]
            if len(long) > 1:
                exponent.setdefault(name, {})[key] = float(np.polyfit(*np.log(np.array(long)).T, 1)[0])
    return dict(crossover=crossover, exponent=exponent)


def speed_tables(result):
    at = {(c["arm"], c["T"], c["mode"]): c for c in result["cells"]}
    lengths, names = sorted({c["T"] for c in result["cells"] if c["mode"] != "decode"}), list(dict.fromkeys(c["arm"] for c in result["cells"]))

    def ratios(name, T, mode, key):                            # ", 3.10x (9.21x)": against its base, and against softmax
        base, c = SPEED[name][2], at.get((name, T, mode))
        found = [c and b and b[key] and c[key] and b[key] / c[key] for b in (at.get((other, T, mode)) for other in (base, STORED.get(base)))]
        return (f", {found[0]:.2f}x" if found[0] and name != base else "") + (f" ({found[1]:.2f}x)" if found[1] and name != STORED[base] else "")
    for mode in MODES:
        yield f"\n{mode}: ms (p20-p80), times faster than what it is compared with (and than softmax that stores its matrix)\n"
        yield "| | compared with | " + " | ".join(f"T={T:,}" for T in lengths) + " |"
        yield "|---|---|" + "---|" * len(lengths)
        for name in names:
            base, row = SPEED[name][2], []
            for T in lengths:
                c, r = at.get((name, T, mode)), ratios(name, T, mode, "median")
                row.append("" if not c else "out of memory" if not c["n"] else f"{c['median'] * 1e3:.2f} ({c['p20'] * 1e3:.2f}-{c['p80'] * 1e3:.2f}){r}")
            yield f"| {name} | {base if base != name else '-'} | " + " | ".join(row) + " |"
    yield "\nforward and backward: peak memory over module and input, MiB, times less than the same\n"
    yield "| | " + " | ".join(f"T={T:,}" for T in lengths) + " |"
    yield "|---|" + "---|" * len(lengths)
    for name in names:
        row = []
        for T in lengths:
            c, r = at.get((name, T, "forward and backward")), ratios(name, T, "forward and backward", "memory")
            row.append("" if not c else "out of memory" if not c["n"] else f"{c['memory'] / 2**20:.1f}{r}")
        yield f"| {name} | " + " | ".join(row) + " |"
    yield "\n" + "\n".join(speed_summary(result))


def speed_summary(result):
    """The ratios that people ask for first, the crossovers and exponents, what decoding takes."""
    at, names = {(c["arm"], c["T"], c["mode"]): c for c in result["cells"]}, list(dict.fromkeys(c["arm"] for c in result["cells"]))
    yield "| what | against | at T= | measured | aim |\n|---|---|---|---|---|"
    for what, against, T, mode, key, aim in CLAIMS:
        a, b = at.get((what, T, mode)), at.get((against, T, mode))
        if a and b and a[key] and b[key]:
            r = b[key] / a[key]
            least = f"{1 / r:.2f} times its {'time' if key == 'median' else 'memory'}" if aim.startswith("at most") else f"{r:.2f} times {'faster' if key == 'median' else 'less memory'}"
            yield f"| {what}, {mode} | {against} | {T:,} | {least} | {aim} |"
    yield "\n| | faster from T= | less memory from T= | exponent of time | of memory |\n|---|---|---|---|---|"
    for name in names:
        c, e = result["crossover"].get(name, {}), result["exponent"].get(name, {})
        yield f"| {name} | {c.get('median', '-')} | {c.get('memory', '-')} | " + " | ".join(f"{e[k]:.2f}" if k in e else "-" for k in ("median", "memory")) + " |"
    positions = sorted({c["T"] for c in result["cells"] if c["mode"] == "decode"})
    if positions:
        yield "\n| decode, ms a token | " + " | ".join(f"at {t:,}" for t in positions) + " | ratio |\n|---|" + "---|" * (len(positions) + 1)
        for name in names:
            ms = [at[name, t, "decode"]["median"] * 1e3 for t in positions if (name, t, "decode") in at]
            if ms:
                yield f"| {name} | " + " | ".join(f"{v:.3f}" for v in ms) + f" | {ms[-1] / ms[0]:.2f} |"


def against_length(ax, result, key, scale, label, names):
    """Time or memory of these arms by length; a ring where an arm gets ahead of flash SDPA for good."""
    for name in names:
        _, causal, base, _, _ = SPEED[name]
        points = [(c["T"], c[key] * scale) for c in result["cells"] if c["arm"] == name and c["mode"] == "forward and backward" and c[key]]
        if points and base.startswith("flash"):
            line, = ax.plot(*zip(*points), marker=".", ls="--" if causal else "-", lw=2.5 if name == base else 1.2, label=name)
            cross = result["crossover"].get(name, {}).get(key)
            ax.plot(*[p for p in zip(*[p for p in points if p[0] == cross])] or ([], []), "o", ms=9, mfc="none", color=line.get_color())
    ax.set(yscale="log", xlabel="tokens", ylabel=label)
    ax.set_xscale("log", base=2)
    ax.legend(fontsize=7)


def speed_plot(result, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for ax, key, scale, label in ((axes[0], "median", 1e3, "ms, forward and backward"), (axes[1], "memory", 2**-20, "peak MiB over module and input")):
        against_length(ax, result, key, scale, label, SPEED)
    card = result["card"]
    figure.suptitle(f"{card['name']}, {card['dtype']}, torch {card['torch']}, {card['n_embd']} channels, {card['n_head']} heads; a ring: from here on ahead of flash SDPA", fontsize=9)
    figure.savefig(path, dpi=110)


def compare(old, new):
    was = {(c["arm"], c["T"], c["mode"]): c["median"] for c in old["cells"]}
    print(f"\nagainst {old['card']['git']} on {old['card']['name']}: how many times faster now")
    for c in new["cells"]:
        before = was.get((c["arm"], c["T"], c["mode"]))
        if before and c["median"]:
            print(f"{c['arm']:32s} {c['mode']:22s} T={c['T']:<7,d} {before / c['median']:.2f}x")


def profile(arms, card):
    """Where the time of each arm goes, forward and backward at T = 4,096."""
    for name, (kind, causal, _, flags, _) in arms.items():
        m, x = build(kind, causal, flags, card, 4096), torch.randn(1, 4096, card["n_embd"], device=card["device"], dtype=getattr(torch, card["dtype"]), requires_grad=True)
        m(x).sum().backward()
        with torch.profiler.profile() as p:
            m(x).sum().backward()
        print(f"\n{name}\n" + p.key_averages().table(sort_by=f"self_{card['device']}_time_total", row_limit=8, max_name_column_width=40))


def steps(args):
    """Tokens a second of whole training steps, ours and by turns nanoGPT's own GPT (--nanogpt, a copy of github.com/karpathy/nanoGPT),
    at the shapes of its Shakespeare example for this device; or of 2 rows of --lengths tokens."""
    cuda = torch.cuda.is_available()
    device, shape = ("cuda", dict(n_layer=6, n_head=6, n_embd=384, block_size=256)) if cuda else ("cpu", dict(n_layer=4, n_head=4, n_embd=128, block_size=64))
    B = 64 if cuda else 12
    if args.lengths:                                           # the WERSA paper's small model on one long text
        B, shape = 2, dict(n_layer=2, n_head=4, n_embd=64, block_size=args.lengths[0])
    arms = {f"{m}, learned positions": dict(mixer=m, pos="learned") for m in ("attention", "haar", "wersa")} | {"attention, rotary": dict(mixer="attention")}
    arms = {name: model.WaveletTransformer(ModelConfig(arch="decoder", vocab_size=65, **shape, **kw)) for name, kw in arms.items()}
    if args.nanogpt:
        spec = importlib.util.spec_from_file_location("nanogpt", os.path.join(args.nanogpt, "model.py"))
        sys.modules["nanogpt"] = theirs = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(theirs)
        with redirect_stdout(None):
            arms = {"nanoGPT": theirs.GPT(theirs.GPTConfig(vocab_size=65, dropout=0.0, bias=False, **shape))} | arms
    idx, seconds = torch.randint(1, 65, (2, B, shape["block_size"]), device=device), {name: [] for name in arms}
    with redirect_stdout(None):
        arms = {name: (torch.compile(m.to(device)) if cuda else m, m.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device)) for name, m in arms.items()}
    keep_freed_pages()
    n = 1 if args.lengths else 10
    for turn in range(4 if args.lengths else 21):
        for name, (net, optimizer) in arms.items():
            began = time.perf_counter()
            for _ in range(n):
                with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
                    loss = net(*idx)[1]
                loss.backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            loss.item()
            if turn:                                           # the first warms up
                seconds[name].append((time.perf_counter() - began) / n)
    first = statistics.median(seconds[next(iter(seconds))])
    print(f"{machine_name()}, torch {torch.__version__}, {git_state()}: {B} rows of {shape['block_size']} tokens, {shape}\n\n| | ms a step | tokens a second | against the first |\n|---|---|---|---|")
    for name, s in seconds.items():
        print(f"| {name} | {statistics.median(s) * 1e3:.1f} | {idx[0].numel() / statistics.median(s):,.0f} | {first / statistics.median(s):.2f} |")


def machine_name():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        return re.search(r"model name\s*: (.*)", open("/proc/cpuinfo").read())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def git_state():
    """The commit, and -dirty if the code is not the commit's; the results that are being added do not count."""
    git = lambda *command: subprocess.run(["git", "-C", HERE, *command], capture_output=True, text=True)
    return git("describe", "--always").stdout.strip() + "-dirty" * (git("diff", "--quiet", "HEAD", "--", "*.py").returncode == 1)


# -----------------------------------------------------------------------------
# quality

TEXT = "--dataset=text --block_size=128 --batch_size=16 --n_layer=4 --max_iters=400 --warmup_iters=40 --eval_interval=200 --metric_rows=400 --eval_block_size=256,512".split()
PAIR = "--dataset=multi30k --n_layer=3 --dropout=0.1 --label_smoothing=0.1 --batch_size=128 --max_iters=2500 --eval_interval=500 --beam=4".split()
ATROUS = ["--mixer=haar", "--haar_encoder=atrous"]
SORTED, UNDECIMATED = (["--mixer=wavspa", f"--wavspa_causal={form}"] for form in ("sorted", "atrous"))
EACH = [*UNDECIMATED, "--wavspa_shared=False"]                 # one attention a band
MIX = {m: [f"--mixer={m}"] for m in ("wersa", "haar", "attention", "wavspa")}
SUITES = {  # name -> arms (label -> flags), seeds, learning rates; an arm's width makes its parameters match the first's
    "numbers": dict(seeds=(1337,), rates=(2e-3,), base=[], arms={**MIX, "wavspa": ["--mixer=wavspa", "--levels=2"]}),
    "positions": dict(seeds=(1337,), rates=(2e-3,), base=["--mixer=wersa"], arms={p: [f"--pos={p}"] for p in ("rope", "learned", "none")}),
    "multi30k": dict(seeds=(1337, 1, 2), rates=(2e-3, 4e-3, 1e-3), base=PAIR, arms={
        "attention": ["--mixer=attention"], "wersa": ["--mixer=wersa"], "haar": ["--mixer=haar", "--n_embd=136"],
        "haar, attention cross": ["--mixer=haar", "--cross=attention", "--n_embd=136"],
        "haar, wersa cross": ["--mixer=haar", "--cross=wersa", "--n_embd=136"], "wavspa": ["--mixer=wavspa"],
        "haar, undecimated encoder": [*ATROUS, "--n_embd=136"],
        "attention, gated": ["--mixer=attention", "--gate"],
        "attention, aligned cross": ["--mixer=attention", "--cross=aligned"], "wersa, aligned cross": ["--mixer=wersa", "--cross=aligned", "--n_embd=124"],
        "haar, undecimated encoder, gated": [*ATROUS, "--gate"],
        "haar, undecimated encoder, gated, by place alone": [*ATROUS, "--gate", "--aligned_content=False", "--n_embd=136"],
        **{f"haar, undecimated encoder, gated, {c} cross": [*ATROUS, "--gate", f"--cross={c}", "--n_embd=136"] for c in ("attention", "wersa")},
        "haar, undecimated encoder, 3 levels": [*ATROUS, "--levels=3", "--n_embd=136"]}),
    "decoders": dict(seeds=(1, 2, 3), rates=(2e-3, 4e-3, 8e-3), base=TEXT, prepare={"text": dict(tokenizer="bytes")}, arms={
        "attention": ["--mixer=attention"],
        "haar atrous": ["--mixer=haar", "--n_embd=148"],
        "haar atrous, gated": ["--mixer=haar", "--gate", "--n_embd=136"],
        "haar atrous, fixed taps": ["--mixer=haar", "--haar_learnable=False", "--n_embd=148"],
        "haar atrous, 3 levels": ["--mixer=haar", "--levels=3", "--n_embd=148"],
        "haar atrous, gated, 3 levels": ["--mixer=haar", "--levels=3", "--gate", "--n_embd=136"],
        "attention, gated": ["--mixer=attention", "--gate", "--n_embd=124"],
        "haar partial": ["--mixer=haar", "--haar_causal=partial", "--n_embd=148"],
        "wavspa sorted": [*SORTED, "--levels=3"], "wavspa sorted, 1 level": [*SORTED, "--levels=1"],
        "wavspa atrous, 3 levels, shared": [*UNDECIMATED, "--levels=3"],
        "wersa": ["--mixer=wersa"], "wersa, gated": ["--mixer=wersa", "--gate", "--n_embd=124"],
        "wersa without wavelets": ["--mixer=wersa", "--wersa_levels=0"],
        "wavspa atrous, 1 level": [*EACH, "--levels=1", "--n_embd=112"], "wavspa atrous, 2 levels": [*EACH, "--levels=2", "--n_embd=100"],
        "wavspa atrous, 1 level, gated": [*EACH, "--levels=1", "--gate", "--n_embd=104"],
    }),
}
TASKS = {  # every data set with a short training of one mixer, to be held against its trivial scores
    "numbers, wersa": "",
    "listops, haar": "--dataset=listops --mixer=haar --n_embd=64 --max_iters=1500 --batch_size=64 --eval_interval=500",
    "lego, attention": "--dataset=lego --mixer=attention --n_layer=3 --n_embd=64 --max_iters=1500 --learning_rate=1e-3 --eval_interval=500",
    "pathfinder, attention": "--dataset=pathfinder --mixer=attention --n_layer=2 --n_embd=64 --max_iters=800 --batch_size=32 --learning_rate=1e-3 --eval_interval=200",
    "recall, attention": "--dataset=recall --mixer=attention --n_embd=64 --n_head=2 --batch_size=128 --max_iters=3000 --learning_rate=5e-4 --eval_interval=1000",
    "multi30k, wersa": "--dataset=multi30k --max_iters=600 --eval_interval=300 --dropout=0.1 --label_smoothing=0.1",
    "wmt16, attention": "--dataset=wmt16 --mixer=attention --max_iters=2500 --eval_interval=1250 --metric_rows=100",
    "imdb, wersa": "--dataset=imdb --n_embd=64 --block_size=512 --batch_size=32 --max_iters=600 --learning_rate=1e-3",
    "text, haar": "--dataset=text --mixer=haar --block_size=128 --batch_size=16 --n_layer=4 --max_iters=400 --warmup_iters=40",
}
SMALL = "--n_embd=64 --warmup_iters=50".split()
LISTOPS = ["--dataset=listops", *SMALL, "--batch_size=32", "--max_iters=1500", "--eval_interval=500"]
LEGO = ["--dataset=lego", *SMALL, "--batch_size=64", "--n_layer=4", "--max_iters=1000", "--eval_interval=500"]
RECALL = ["--dataset=recall", *SMALL, "--n_head=2", "--warmup_iters=200", "--batch_size=64", "--max_iters=6000", "--eval_interval=1000"]
IMDB = ["--dataset=imdb", *SMALL, "--block_size=256", "--eval_block_size=512", "--batch_size=32", "--dropout=0.1", "--max_iters=500", "--eval_interval=100"]
SHORT = {"listops": dict(min_len=10, max_len=100), "lego": dict(n_links=6, n_tr=3), "recall": dict(n_pairs=4, n_keys=16), "imdb": dict(tokenizer="gpt2")}
SUITES["lmwt"] = dict(seeds=(1, 2, 3), rates=(4e-3,), base=[*SMALL, "--batch_size=32", "--max_iters=600", "--eval_interval=300"], arms={
    "attention": ["--mixer=attention"],
    "attention, aligned cross": ["--mixer=attention", "--cross=aligned", "--n_embd=60"],
    "haar, aligned cross": ["--mixer=haar", "--n_embd=68"],
    "attention, gated": ["--mixer=attention", "--gate"],
    "haar, wersa cross": ["--mixer=haar", "--cross=wersa", "--n_embd=72"],
    "haar, attention cross": ["--mixer=haar", "--cross=attention", "--n_embd=72"],
    "haar, aligned cross, fixed taps": ["--mixer=haar", "--haar_learnable=False", "--n_embd=68"],
    "haar, aligned cross, 3 levels": ["--mixer=haar", "--levels=3", "--n_embd=68"],
    "haar, aligned cross, undecimated encoder": [*ATROUS, "--n_embd=68"],
    "haar, aligned cross, undecimated encoder, gated": [*ATROUS, "--gate"],
    "haar, aligned cross, undecimated encoder, gated, by place alone": [*ATROUS, "--gate", "--aligned_content=False", "--n_embd=68"],
    **{f"haar, {c} cross, undecimated encoder": [*ATROUS, f"--cross={c}", "--n_embd=72"] for c in ("attention", "wersa")},
    **{f"haar, {c} cross, undecimated encoder, gated": [*ATROUS, "--gate", f"--cross={c}", "--n_embd=68"] for c in ("attention", "wersa")},
    "haar, aligned cross, undecimated encoder, 3 levels": [*ATROUS, "--levels=3", "--n_embd=68"],
    "haar, aligned cross, concat": ["--mixer=haar", "--haar_aggregate=concat", "--n_embd=52"],
    "haar, aligned cross, by place alone": ["--mixer=haar", "--aligned_content=False", "--n_embd=68"],
    "haar literal, aligned cross (leaks)": ["--mixer=haar", "--haar_causal=literal", "--leak", "--n_embd=68"],
})
WAVSPA = {
    **{m: [f"--mixer={m}", f"--n_embd={n}"] for m, n in (("attention", 64), ("wersa", 60), ("fourier", 80))},
    **{f"attention in {p}": ["--mixer=wavspa", f"--wavelet_params={p}", "--levels=2"] for p in ("fixed", "ada", "ortho", "lift")},
    "control: even and odd samples": ["--mixer=wavspa", "--levels=2", "--wavelet_params=fixed", "--wavelet=lazy"],
    "control: random orthonormal taps": ["--mixer=wavspa", "--levels=2", "--wavelet_params=fixed", "--wavelet=random"],
    "control: convolution, then attention": ["--mixer=wavspa", "--wavelet_params=conv"],
    **{f"attention in ortho, {l} level{'s' * (l > 1)}": ["--mixer=wavspa", f"--levels={l}"] for l in (1, 4)},
    "attention in ortho, one a band": ["--mixer=wavspa", "--levels=2", "--wavspa_shared=False", "--n_embd=48"],
    **{f"{m} in ortho": ["--mixer=wavspa", "--levels=2", f"--inner={m}", f"--n_embd={n}"] for m, n in (("fourier", 76), ("wersa", 56))},
}
for name, base, rates in (("listops", LISTOPS, (2e-3, 5e-4)), ("lego", LEGO, (1e-3,))):
    SUITES[f"wavspa_{name}"] = dict(seeds=(1, 2, 3), rates=rates, base=base, arms=WAVSPA, prepare=SHORT, data="short")
WERSA = {
    "attention": ["--mixer=attention"],
    "haar": ["--mixer=haar", "--n_embd=72"],
    **{f"wersa{', exp features' * (f == 'exp')}, L={l}": ["--mixer=wersa", f"--wersa_levels={l}", f"--feature_map={f}", f"--n_embd={n}"]
       for f, l, n in (("relu", 0, 64), ("relu", 2, 60), ("exp", 0, 64), ("exp", 2, 60))},
}
MORE = {**{f"wersa, L={l}": ["--mixer=wersa", f"--wersa_levels={l}", "--n_embd=60"] for l in (1, 4, 6)},
        **{f"wersa, L=2, m={m}": ["--mixer=wersa", f"--n_features={m}", "--n_embd=60"] for m in (16, 256, 1024)},
        "wersa, L=2, gains not adaptive": ["--mixer=wersa", "--wersa_adaptive=False"],
        "wersa, L=2, orthogonal features": ["--mixer=wersa", "--orthogonal_features", "--n_embd=60"]}
RELU = {arm: flags for arm, flags in WERSA.items() if "exp" not in arm}
for name, base, arms, rates in (("wersa_listops", LISTOPS, RELU | MORE | WERSA, (3e-3,)), ("wersa_recall", RECALL, RELU, (5e-4,)),
                                ("imdb", IMDB, RELU | {"haar": ["--mixer=haar"], "haar, undecimated, gated": [*ATROUS, "--gate"]} | {arm: WAVSPA[arm] for arm in ("attention in ada", "attention in fixed")}, (1e-3,))):
    SUITES[name] = dict(seeds=(1, 2, 3), rates=rates, base=base, arms=arms, prepare=SHORT, data="short")
# the papers' sizes, for a GPU: minutes a run there, hours on a CPU
LONG = "--n_layer=4 --dropout=0.1 --batch_size=32 --warmup_iters=500 --max_iters=10000 --eval_interval=1000".split()
ENCODERS = {
    "attention": ["--mixer=attention"], "fourier": ["--mixer=fourier", "--n_embd=156"],
    **{f"wersa, L={l}": ["--mixer=wersa", f"--wersa_levels={l}"] for l in (0, 2)}, "wersa, L=2, m=1024": ["--mixer=wersa", "--n_features=1024"],
    "haar": ["--mixer=haar", "--n_embd=144"], "haar, undecimated, gated": [*ATROUS, "--gate", "--n_embd=136"],
    **{f"attention in {p}": ["--mixer=wavspa", f"--wavelet_params={p}", "--levels=2"] for p in ("fixed", "ada", "ortho", "lift")},
    "wersa in ada": ["--mixer=wavspa", "--wavelet_params=ada", "--levels=2", "--inner=wersa"],
    "control: convolution, then attention": ["--mixer=wavspa", "--wavelet_params=conv"],
}
for name, flags in (("listops", []), ("pathfinder", []), ("imdb", ["--block_size=4096"])):
    SUITES[f"{name}_long"] = dict(seeds=(1, 2, 3), rates=(1e-3, 3e-4), base=[f"--dataset={name}", *flags, *LONG], arms=ENCODERS, data="long")
SUITES["multi30k_long"] = dict(seeds=(1, 2, 3), rates=(2e-3, 1e-3, 4e-3), base=[*PAIR, "--n_layer=4", "--max_iters=12000", "--eval_interval=1000", "--warmup_iters=1000", "--dropout=0.2", "--beam=5"], prepare={
    "multi30k": dict(vocab_size=10_000)}, data="long", arms={arm: SUITES["multi30k"]["arms"][arm] for arm in ("attention", "attention, gated", "wersa", *(f"haar, undecimated encoder, gated{c}" for c in ("", ", attention cross")))})
SUITES["decoders_longer"] = dict(SUITES["decoders"], base=[*TEXT, "--max_iters=2000", "--warmup_iters=100", "--eval_interval=500"], arms={
    arm: SUITES["decoders"]["arms"][arm] for arm in ("haar atrous, gated", "attention, gated", "attention")})
SUITES["decoders_time"] = dict(SUITES["decoders"], seeds=(1,), rates=(2e-3,), base=[*TEXT, "--max_iters=40", "--eval_interval=40", "--eval_rows=1", "--eval_block_size=0"])   # alone on the machine
SUITES["smoke"] = dict(seeds=(1,), rates=(2e-3,), base=["--n_embd=32", "--n_head=2", "--warmup_iters=5", "--max_iters=20", "--eval_interval=20", "--eval_rows=50", "--metric_rows=20"], prepare=SHORT, data="short", arms={
    **{f"numbers: {arm}": flags for arm, flags in list(SUITES["lmwt"]["arms"].items())[:3]},
    **{f"listops: {arm}": ["--dataset=listops", "--batch_size=32", *flags] for arm, flags in WAVSPA.items()},
    **{f"recall: {arm}": ["--dataset=recall", *flags] for arm, flags in WERSA.items()},
})
SUITES["smoke"]["arms"] = {arm: [f for f in flags if not f.startswith("--n_embd")] for arm, flags in SUITES["smoke"]["arms"].items()}
SUITES["tasks"] = dict(seeds=(1337,), rates=(2e-3,), base=[], data="tasks", arms={arm: flags.split() for arm, flags in TASKS.items()}, prepare={
    "listops": dict(min_len=10, max_len=100), "pathfinder": dict(rows=20_000), "wmt16": dict(vocab_size=4000), "recall": dict(n_pairs=8, n_keys=32), "text": dict(tokenizer="bytes")})
COLUMNS = ("suite arm seed learning_rate params steps seconds val_loss test_loss test_metric metric n trivial groups far moved data_rows data_tokens data_seconds "
           "git machine torch threads flags").split()
LOWER = ("bits per byte",)                                     # metrics of which less is better


def dataset_of(flags):
    return next((f.split("=")[1] for f in reversed(flags) if f.startswith("--dataset=")), "numbers")


def read_rows(path):
    with open(path, newline="") if path.exists() else nullcontext([]) as f:
        return list(csv.DictReader(f))


def quality(args):
    suite, path = SUITES[args.suite], HERE / "results" / f"{args.suite}.csv"
    arms = {arm: [*suite["base"], *flags] for arm, flags in chosen(suite["arms"], args.only).items()}
    names, data_dir = {dataset_of(flags) for flags in arms.values()}, os.path.join(args.data_dir, suite.get("data", ""))
    for name in sorted(names):
        folder = prepare(name, data_dir, source=args.source if len(names) == 1 else None, **suite.get("prepare", {}).get(name, {}))
        tokens = str(int(np.sum(json.load(open(os.path.join(folder, "meta.json")))["splits"]["train"]["tokens"])))      # prepare has checked it
        others = {r["data_tokens"] for r in read_rows(path) if r["arm"] in arms and r.get("data_tokens") and dataset_of(r["flags"].split()) == name} - {tokens}
        if others:
            raise SystemExit(f"{path} has rows of another {name}, of {min(others)} training tokens, not {tokens}: give the --source of that one with another --data_dir, or move the file away")
    rate_of = lambda arm, rate: next((f.split("=")[1] for f in arms[arm] if f.startswith("--learning_rate=")), str(rate))
    git = git_state()
    threads, writing, failed = max(1, torch.get_num_threads() // args.jobs), Lock(), []

    def one(job):
        arm, seed, rate = job
        if failed:                                             # after Ctrl-C, or a run that failed, no other begins
            return
        out = Path(args.data_dir) / "runs" / args.suite / re.sub(r"\W+", "-", f"{arm} {seed} {rate} {git}")
        if git.endswith("-dirty") and out.exists():            # what was trained before an edit is not gone on with
            print(f"{arm}, seed {seed}, rate {rate}: begun anew, as the code has changes that are not committed", flush=True)
            shutil.rmtree(out)
        flags = [f"--seed={seed}", f"--learning_rate={rate}", *arms[arm], f"--data_dir={data_dir}"]
        run = subprocess.run([sys.executable, str(HERE / "train.py"), *flags, f"--out_dir={out}", "--resume"], capture_output=True, text=True,
                             env=dict(os.environ, OMP_NUM_THREADS=str(threads)))
        if run.returncode:
            failed.append(job)
            raise SystemExit(f"{arm}, seed {seed}: {(run.stderr.strip() or 'killed').splitlines()[-1]}")
        result = json.load(open(out / "result.json"))
        trained, *_ = load_model(out / "best.pt")
        row = dict(result, suite=args.suite, arm=arm, seed=seed, learning_rate=rate, git=git, torch=torch.__version__, threads=threads,
                   machine=machine_name(), flags=" ".join(flags[:-1]), trivial=json.dumps(result["trivial"]), groups=json.dumps(result["test"].get("groups", {})),
                   moved=json.dumps({name: [round(row[0], 4) for row in rows] for name, rows in learned(trained).items()}), far=json.dumps(result["far"]), **{f"data_{k}": v for k, v in result["data"].items()})
        with writing:                                          # the file is rewritten as a whole, so that a kill leaves the old one or the new one
            rows = [*read_rows(path), row]
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as f:
                w = csv.DictWriter(f, COLUMNS, extrasaction="ignore", restval="", lineterminator="\n")
                w.writeheader(), w.writerows(rows)
        shutil.rmtree(out)
        print(f"{arm}, seed {seed}, rate {row['learning_rate']}: {result['metric']} {result['test_metric']:.4f}, {result['params']:,} parameters, {result['seconds']:.0f} s", flush=True)

    first, *more = map(str, suite["seeds"])                    # the first seed tries all rates, the others go on at the one that is best on val
    with ThreadPoolExecutor(args.jobs) as pool:
        for seeds, rates in (([first], lambda arm: suite["rates"]), (more, lambda arm: {rs[0]["learning_rate"] for a, rs in arms_of(path).items() if a == arm})):
            jobs = list(dict.fromkeys((arm, seed, rate_of(arm, rate)) for seed in seeds for arm in arms for rate in rates(arm)))
            todo = [job for job in jobs if job not in {(r["arm"], r["seed"], r["learning_rate"]) for r in read_rows(path)}]
            print(f"{args.suite}: {len(todo)} of {len(jobs)} runs to do, {args.jobs} at a time on {threads} thread(s) each", flush=True)
            list(pool.map(one, todo))


def arms_of(path):
    """A suite's CSV -> {arm: its rows at the learning rate that is best on val, by the seed that tried them all}."""
    arms, best = {}, {}
    for r in read_rows(path):
        arms.setdefault(r["arm"], {}).setdefault(r["learning_rate"], []).append(r)
    for arm, rates in arms.items():
        tried = [{r["seed"] for r in rs} for rs in rates.values()]
        common = set.intersection(*tried) or set.union(*tried)
        val = lambda rs: [v if math.isfinite(v := float(r["val_loss"])) else math.inf for r in rs if r.get("val_loss")]       # early rows have none
        best[arm] = min(rates.values(), key=lambda rs: statistics.mean(val(r for r in rs if r["seed"] in common) or val(rs) or [math.inf]))
    return best


def mean_std(values):
    """-> mean, sample standard deviation or None."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def said(values):
    mean, std = mean_std(values)
    return f"{mean:.3f}" + (f" ± {std:.3f}" if std is not None else "")


def score(rs, key="test_metric"):
    return [float(r[key]) for r in rs]


def trivial(r):
    return json.loads(r.get("trivial") or "{}")


def far(r):
    """What was measured at the lengths of --eval_block_size, a dict for each."""
    return json.loads(r.get("far") or "[]")


def table(path):
    """One suite's CSV -> a Markdown table, mean ± standard deviation over n seeds, best arm first, trivial scores last. Where the
    arms are data sets: each with its size and its trivial scores."""
    arms = arms_of(path)
    first, listed = next(iter(arms.values()))[0], lambda scores: ", ".join(f"{name} {v:.3f}" for name, v in scores.items())
    if len({(r["n"], r["metric"]) for rs in arms.values() for r in rs}) > 1:               # several test sets
        lines = ["| arm | rows | tokens | prepared in | test score | trivial | steps |", "|---|---|---|---|---|---|---|"]
        for arm, rs in arms.items():
            r = rs[0]
            lines.append(f"| {arm} | {int(r['data_rows']):,} | {int(r['data_tokens']):,} | {float(r['data_seconds']):.1f} s | {r['metric']} {said(score(rs))} | {listed(trivial(r))} | {r['steps']} |")
        return "\n".join(lines)
    rows, beyond = read_rows(path), far(first) if all(far(r) for rs in arms.values() for r in rs) else []  # early rows have none
    at = lambda rate, arm: [r for r in rows if (r["learning_rate"], r["arm"]) == (rate, arm)]
    columns = {"arm": lambda rs: rs[0]["arm"], "parameters": lambda rs: f"{int(rs[0]['params']):,}", f"{first['metric']}, test": lambda rs: said(score(rs))}
    for i, f in enumerate(beyond):
        columns[f"at up to {f['block_size']} tokens"] = lambda rs, i=i: said([far(r)[i]["metric"] for r in rs])
    columns |= {"test loss": lambda rs: said(score(rs, "test_loss")), "n": len}
    rates = sorted({r["learning_rate"] for r in rows}, key=float)
    if len(rates) > 1:                                         # what val chose, and the choice itself
        columns["rate"] = lambda rs: rs[0]["learning_rate"]
        for rate in rates:
            columns[f"test at {rate}"] = lambda rs, rate=rate: said(score(at(rate, rs[0]["arm"]))) if at(rate, rs[0]["arm"]) else ""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for rs in sorted(arms.values(), key=lambda rs: statistics.mean(score(rs)), reverse=first["metric"] not in LOWER):
        lines.append("| " + " | ".join(str(f(rs)) for f in columns.values()) + " |")
    if trivial(first):
        lines.append(f"\nWhat knows nothing: {listed(trivial(first))}" + "".join(f"; at up to {f['block_size']} tokens: {listed(f['trivial'])}" for f in beyond if f["trivial"] != trivial(first)) + ".")
    return "\n".join(lines)


def bars(ax, arms, title):
    """Every arm's score, mean and standard deviation."""
    order = sorted(arms, key=lambda arm: statistics.mean(score(arms[arm])))
    for i, arm in enumerate(order):
        mean, std = mean_std(score(arms[arm]))
        ax.barh(i, mean, xerr=std or 0, color="tab:gray" if arm.startswith("control") else "tab:blue" if "attention" == arm.split(",")[0] else "tab:orange")
    ax.set(yticks=range(len(order)), yticklabels=[f"{arm}  {statistics.mean(score(arms[arm])):#.3g}" for arm in order], title=title, xlabel=next(iter(arms.values()))[0]["metric"])
    for v in trivial(arms[order[0]][0]).values():
        ax.axvline(v, color="black", ls=":", lw=1)


def look(i):
    """Of arm i in a figure: ten colours, and then the next marker."""
    return dict(color=f"C{i}", marker="osD^"[i // 10 % 4])


def dots(ax, x, y, e, arm=None, i=0):
    """Means y at x with their standard deviations, 0 where there is none."""
    ax.errorbar(x, y, [v or 0 for v in e], capsize=3, label=arm, **look(i))


def curve(ax, arms, pattern, xlabel, default=None):
    """The score of the arms that pattern matches, against the number in their name."""
    points = [(int(m[1]), arm) for arm in arms if (m := re.fullmatch(pattern, arm))] + [default] * (default is not None)
    x, y, e = zip(*((x, *mean_std(score(arms[arm]))) for x, arm in sorted(points)))
    dots(ax, x, y, e)
    ax.axhline(statistics.mean(score(arms["attention"])), ls="--", color="tab:gray", label="attention")
    ax.set(xlabel=xlabel, ylabel=next(iter(arms.values()))[0]["metric"], ylim=(0, None), xticks=x, xticklabels=x), ax.legend(loc="lower left")


def by_group(ax, arms, xlabel, read):
    """Accuracy by group; read(row) -> {group: accuracy}."""
    for i, (arm, rs) in enumerate(arms.items()):
        found = [read(r) for r in rs]
        x = sorted(map(int, found[0]))
        ax.plot(x, [statistics.mean(f[str(g)] for f in found) for g in x], ls="--" if "L=0" in arm else "-", label=arm, **look(i))
    ax.set(xlabel=xlabel, ylabel="accuracy"), ax.legend(fontsize=8)
    ax.set_xscale("log" if x[-1] > 2 * len(x) else "linear"), ax.set_xticks(x, x), ax.minorticks_off()


def moved(ax, rs, title):
    """How far the taps of each layer went from where they began, by level."""
    found = [json.loads(r["moved"]) for r in rs]
    for layer in found[0]:
        ax.plot(range(1, len(found[0][layer]) + 1), np.mean([f[layer] for f in found], 0), marker="o", label=layer.partition(".mixer")[0])
    ax.set(xlabel="level", ylabel="RMS distance", title=title, ylim=(0, None)), ax.legend(fontsize=7)


def config_of(flags, **more):
    """The model that a run's flags name, for what can be told without its data set and weights."""
    fields = {f.name: f.type for f in dataclasses.fields(ModelConfig)}
    words = {k: v for k, _, v in (f.removeprefix("--").partition("=") for f in flags.split()) if k in fields}
    return ModelConfig(**more | {k: fields[k](v) if fields[k] is not bool else v.lower() not in ("false", "0") for k, v in words.items()})


def state_against(ax, arms, times):
    """Bits per byte against the seconds of a training step, and against the bytes of state per token of context."""
    for i, (arm, rs) in enumerate(arms.items()):
        y, e = mean_std(score(rs))
        cfg = config_of(rs[0]["flags"], arch="decoder")
        size = state_bytes(fast_forward(model.WaveletTransformer(cfg).init_state(1)["mixers"], cfg.block_size)) / cfg.block_size
        for a, x in ((ax[0], float(times[arm][0]["seconds"]) / int(times[arm][0]["steps"]) if arm in times else None), (ax[1], size)):
            if x:
                dots(a, [x], [y], [e], arm, i)
    ax[0].figure.legend(*ax[1].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    ax[0].set(xlabel="seconds of a training step, one core", ylabel="bits per byte, test", xlim=(0, None))
    ax[1].set(xlabel=f"bytes of decoding state per token of context, at {cfg.block_size}", xscale="log")
    ticks = [t for t in (100, 200, 500, 1000, 2000, 5000, 10000) if ax[1].get_xlim()[0] < t < ax[1].get_xlim()[1]]
    ax[1].set_xticks(ticks, ticks), ax[1].minorticks_off()


def by_length(ax, arms):
    """The test score against the length of the windows in which the test set is read, the first one as trained."""
    for i, (arm, rs) in enumerate(arms.items()):
        lengths = list(zip(*map(far, rs)))                     # all seeds at one length, at the next
        x = [config_of(rs[0]["flags"], arch="decoder").block_size] + [seeds[0]["block_size"] for seeds in lengths]
        y, e = zip(*map(mean_std, [score(rs), *([f["metric"] for f in seeds] for seeds in lengths)]))
        dots(ax, x, y, e, arm, i)
    ax.set_xscale("log", base=2)
    ax.set_xticks(x, x), ax.set(xlabel=f"tokens of a window (trained at {x[0]})", ylabel=rs[0]["metric"])


def figures(folder):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    have = {path.stem: arms_of(path) for path in sorted((HERE / "results").glob("*.csv"))}

    def draw(name, needs, n, fill, size=(11, 4)):
        if needs <= have.keys():
            figure, axes = plt.subplots(1, n, figsize=size, layout="constrained")
            fill(axes)
            figure.savefig(folder / f"{name}.png", dpi=100, metadata=dict(Software=None))
            plt.close(figure)
    speed = json.load(open(HERE / "results" / "speed.json"))
    draw("overview", {"multi30k", "decoders"}, 3, lambda ax: (
        bars(ax[0], have["multi30k"], "Multi30k, English to German"),
        by_length(ax[1], {arm: rs for arm, rs in have["decoders"].items() if arm in ("attention", "attention, gated", "haar atrous, gated", "wersa")}),
        ax[1].set_title("Shakespeare, bytes"), ax[1].legend(fontsize=8),
        against_length(ax[2], speed, "median", 1e3, "ms, forward and backward", ("flash SDPA", "haar", "haar undecimated, gated, L=8", "wersa")), ax[2].set_title("one mixer")), (15, 4))
    draw("lmwt", {"lmwt"}, 1, lambda ax: bars(ax, have["lmwt"], "numbers: mixers and crosses"), (8, 4))
    draw("wavspa", {"wavspa_listops"}, 1, lambda ax: bars(ax, have["wavspa_listops"], "short ListOps: wavelet space, and controls"), (8, 5))
    draw("wersa", {"wersa_listops"}, 2, lambda ax: (curve(ax[0], have["wersa_listops"], r"wersa, L=(\d+)", "levels, short ListOps"),
                                                  curve(ax[1], have["wersa_listops"], r"wersa, L=2, m=(\d+)", "features per head, short ListOps", (60, "wersa, L=2"))))
    groups, beyond = lambda r: json.loads(r["groups"]), lambda r: far(r)[0]["groups"]
    draw("recall", {"wersa_recall"}, 1, lambda ax: by_group(ax, have["wersa_recall"], "pairs in the row (trained on 1 to 4)", lambda r: groups(r) | beyond(r)), (8, 4.5))
    draw("lego", {"wavspa_lego"}, 2, lambda ax: (by_group(ax[0], have["wavspa_lego"], "link, rows of 6 (trained on links 1 to 3)", groups),
                                                 by_group(ax[1], have["wavspa_lego"], "link, rows of 12", beyond)))
    draw("decoders", {"decoders", "decoders_time"}, 3, lambda ax: (state_against(ax, have["decoders"], have["decoders_time"]), by_length(ax[2], have["decoders"])), (17, 4))
    draw("taps", {"lmwt", "wavspa_listops"}, 2, lambda ax: (moved(ax[0], have["lmwt"]["haar, aligned cross"], "haar on numbers"),
                                                            moved(ax[1], have["wavspa_listops"]["attention in ada"], "ada on ListOps: all levels share their taps")))


def report(args):
    """results/*.csv -> the tables between <!-- SUITE --> and <!-- end --> in README.md, and the figures."""
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name in re.findall(r"<!-- (\w+) -->", text):
        if name != "end":
            path = HERE / "results" / name
            if name == "speed":
                new = "\n".join(speed_summary(json.load(open(path.with_suffix(".json")))))
            elif path.with_suffix(".md").exists():             # python test_model.py 20 > results/faults.md
                new = path.with_suffix(".md").read_text().strip()
            else:
                new = table(path.with_suffix(".csv"))
            text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{new}\n{m[2]}", text, flags=re.S)
            print(f"{name}\n\n{new}\n")
    with replacing(readme) as f:
        f.write(text)
    figures(HERE / "results")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)          # | head is no error
    p = Parser(description=__doc__)
    p.add("what", choices=["speed", "steps", "variants", "quality", "report"], help="what to measure")
    p.add("--suite", default="decoders", choices=list(SUITES), help="which grid of trainings; an interrupted one goes on where it stopped, on the same commit in the middle of a run too")
    p.add("--source", help="where the suite's data set comes from: a text for decoders, a folder for multi30k")
    p.add("--data_dir", default="data")
    p.add("--only", help="one arm, or all whose name holds this (speed, quality)")
    p.add("--jobs", type=int, default=1, low=1, high=1024, help="trainings at a time, sharing the cores")
    p.section("speed")
    p.add("--lengths", type=comma_separated, help="tokens, joined by commas; default: up to 32,768 on a CPU, 131,072 on a GPU; steps: one length, for 2 rows of a small model")
    p.add("--n_embd", type=int, default=128, low=1, high=2**16)
    p.add("--n_head", type=int, default=4, low=1, high=2**16)
    p.add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU, float32 on a CPU")
    for what in ("csv", "json", "md", "png"):
        p.add(f"--{what}", type=writable, help=f"write the result to this .{what} too")
    p.add("--compare", type=earlier, help="an earlier --json file: print how many times faster each cell is now")
    p.add("--nanogpt", type=holding_model, help="steps: a copy of nanoGPT to be timed beside ours")
    p.add("--profile", type=bool, default=False, help="where the time goes, instead of the table")
    args = p.parse_args()
    if args.n_embd % args.n_head:
        p.error(f"--n_embd={args.n_embd} must be divisible by --n_head={args.n_head}")
    {"speed": speed, "steps": steps, "variants": variants, "quality": quality, "report": report}[args.what](args)
