"""
Measure: what every variant promises, and what trained models score.

    python bench.py variants                                     # each variant's reconstruction, leak, step error, state size
    python bench.py quality --suite=decoders --source=my.txt     # train a grid, one row of results/SUITE.csv per run
    python bench.py report                                       # results/*.csv -> the README's tables

A suite's rows that are already in its CSV are skipped, so it may be stopped at any time and started again.
"""

import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from model import ModelConfig, Wavspa, build_mixer
from prepare_data import Parser, prepare

HERE = Path(__file__).resolve().parent

# -----------------------------------------------------------------------------
# variants

VARIANTS = {
    "attention": dict(mixer="attention"),
    "haar atrous": dict(mixer="haar"),
    "haar atrous, concat": dict(mixer="haar", haar_aggregate="concat"),
    "haar atrous, fixed taps": dict(mixer="haar", haar_learnable=False),
    "haar partial": dict(mixer="haar", haar_causal="partial"),
    "haar partial, tiled": dict(mixer="haar", haar_causal="partial", haar_tile=True),
    "haar literal (leaks)": dict(mixer="haar", haar_causal="literal"),
    **{f"wavspa {w} {p}": dict(mixer="wavspa", levels=3, wavelet=w, wavelet_params=p) for w in ("haar", "db2", "db20") for p in ("fixed", "ada", "ortho", "lift")},
    "wavspa, one attention a band": dict(mixer="wavspa", levels=3, wavspa_shared=False),
    "wavspa around wersa": dict(mixer="wavspa", levels=3, inner="wersa"),
    "wavspa atrous": dict(mixer="wavspa", levels=3, wavspa_causal="atrous"),
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
# quality

TEXT = "--dataset=text --block_size=128 --batch_size=16 --n_layer=4 --max_iters=400 --warmup_iters=40 --eval_interval=200 --metric_rows=400".split()
PAIR = "--dataset=multi30k --n_layer=3 --dropout=0.1 --label_smoothing=0.1 --batch_size=128 --max_iters=2500 --eval_interval=500 --beam=4".split()
MIX = {m: [f"--mixer={m}"] for m in ("wersa", "haar", "attention", "wavspa")}
SUITES = {  # name -> arms (label -> flags), seeds, learning rates; an arm's width makes its parameters match the first's
    "numbers": dict(seeds=(1337,), rates=(2e-3,), base=[], arms={**MIX, "wavspa": ["--mixer=wavspa", "--levels=2"]}),
    "positions": dict(seeds=(1337,), rates=(2e-3,), base=["--mixer=wersa"], arms={p: [f"--pos={p}"] for p in ("rope", "learned", "none")}),
    "multi30k": dict(seeds=(1337,), rates=(2e-3,), base=PAIR, arms={**MIX, "haar, attention cross": ["--mixer=haar", "--cross=attention"], "haar, wersa cross": ["--mixer=haar", "--cross=wersa"]}),
    "decoders": dict(seeds=(1, 2, 3), rates=(2e-3,), base=TEXT, arms={
        "attention": ["--mixer=attention"],
        "haar atrous": ["--mixer=haar", "--n_embd=148"],
        "haar partial": ["--mixer=haar", "--haar_causal=partial", "--n_embd=148"],
        "wavspa sorted": ["--mixer=wavspa", "--levels=3"],
        "wersa": ["--mixer=wersa"],
        "wersa without wavelets": ["--mixer=wersa", "--wersa_levels=0"],
    }),
}
COLUMNS = ["suite", "arm", "seed", "learning_rate", "params", "steps", "seconds", "test_loss", "test_metric", "metric", "n", "git", "machine", "torch", "threads", "flags"]


def quality(args):
    suite, path = SUITES[args.suite], HERE / "results" / f"{args.suite}.csv"
    name = next((f.split("=")[1] for f in suite["base"] if f.startswith("--dataset=")), "numbers")
    prepare(name, args.data_dir, source=args.source, tokenizer="bytes" if name == "text" else None)
    done = {(r["arm"], r["seed"], r["learning_rate"]) for r in csv.DictReader(open(path))} if path.exists() else set()
    todo = [(arm, seed, rate) for seed in suite["seeds"] for rate in suite["rates"] for arm in suite["arms"] if (arm, str(seed), str(rate)) not in done]
    git = subprocess.run(["git", "-C", HERE, "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    threads = max(1, (os.cpu_count() or 1) // args.jobs)

    def one(job):
        arm, seed, rate = job
        with tempfile.TemporaryDirectory() as out:
            flags = [*suite["base"], *suite["arms"][arm], f"--seed={seed}", f"--learning_rate={rate}", f"--data_dir={args.data_dir}"]
            run = subprocess.run([sys.executable, str(HERE / "train.py"), *flags, f"--out_dir={out}/run"], capture_output=True, text=True,
                                 env=dict(os.environ, OMP_NUM_THREADS=str(threads)))
            if run.returncode:
                raise SystemExit(f"{arm}, seed {seed}: {run.stderr.strip().splitlines()[-1]}")
            result = json.load(open(f"{out}/run/result.json"))
        row = dict(result, suite=args.suite, arm=arm, seed=seed, learning_rate=rate, git=git, torch=torch.__version__, threads=threads,
                   machine=platform.processor() or platform.machine(), flags=" ".join(flags[:-1]))
        path.parent.mkdir(exist_ok=True)
        new = not path.exists()
        with open(path, "a", newline="") as f:
            w = csv.DictWriter(f, COLUMNS, extrasaction="ignore")
            w.writeheader() if new else None
            w.writerow(row)
        print(f"{arm}, seed {seed}, rate {rate}: {result['metric']} {result['test_metric']:.4f}, {result['params']:,} parameters, {result['seconds']:.0f} s", flush=True)

    print(f"{args.suite}: {len(todo)} of {len(todo) + len(done)} runs to do, {args.jobs} at a time on {threads} thread(s) each")
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, todo))


def table(path):
    """One suite's CSV -> a Markdown table, mean ± std over seeds at each arm's best rate, best arm first."""
    rows, arms = list(csv.DictReader(open(path))), {}
    for r in rows:
        arms.setdefault(r["arm"], {}).setdefault(r["learning_rate"], []).append(r)
    lower, lines = rows[0]["metric"] in ("bits per byte",), []
    mean = lambda rs: statistics.mean(float(r["test_metric"]) for r in rs)
    for arm, rates in arms.items():
        rate, rs = (min if lower else max)(rates.items(), key=lambda kv: mean(kv[1]))
        std = f" ± {statistics.stdev(float(r['test_metric']) for r in rs):.3f}" if len(rs) > 1 else ""
        lines.append((mean(rs), f"| {arm} | {int(rs[0]['params']):,} | {mean(rs):.3f}{std} | {len(rs)} | {rate} | {statistics.median(float(r['seconds']) for r in rs):.0f} |"))
    head = [f"| arm | parameters | {rows[0]['metric']}, test | n | learning rate | seconds |", "|---|---|---|---|---|---|"]
    return "\n".join(head + [line for _, line in sorted(lines, reverse=not lower)])


def report(args):
    for path in sorted((HERE / "results").glob("*.csv")):
        print(f"<!-- {path.stem} -->\n{table(path)}\n<!-- end -->\n")


if __name__ == "__main__":
    p = Parser(description=__doc__)
    p.add("what", choices=["variants", "quality", "report"], help="what to measure")
    p.add("--suite", default="decoders", choices=list(SUITES), help="which grid of trainings")
    p.add("--source", help="where the suite's data set comes from: a text for decoders, a folder for multi30k")
    p.add("--data_dir", default="data")
    p.add("--jobs", type=int, default=1, help="trainings at a time, sharing the cores")
    args = p.parse_args()
    {"variants": variants, "quality": quality, "report": report}[args.what](args)
