"""
Train a wavelet encoder-decoder (or encoder, or decoder): one GPU, one CPU, or many under torchrun.

    python train.py --mixer=wersa                                        # the default data set, minutes on a laptop
    python train.py --dataset=multi30k --mixer=attention --out_dir=out-multi30k
    python train.py --resume                                             # go on where out/ckpt.pt stopped
    torchrun --standalone --nproc_per_node=4 train.py --mixer=haar       # 4 GPUs, or 4 CPU processes
    torchrun --nnodes=2 --node_rank=0 --master_addr=HOST --nproc_per_node=8 ...   # and node_rank=1 on the other node

A step is batch_size * gradient_accumulation_steps rows, however many processes share them: data order is a function of
(seed, step) and dropout one of (seed, step, process), so a run may be killed, resumed, and resumed on another number of
processes, where dropout alone is drawn anew. Nodes share --data_dir and --out_dir.
"""

import csv
import dataclasses
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from contextlib import nullcontext
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from model import CHOICES, ModelConfig, WaveletTransformer
from prepare_data import BOS, EOS, PAD, Parser, Tokenizer, comma_separated, load_meta, prepare, read_ragged, replacing, stopped
from sample import FORMAT, KINDS, build, collate, keep_freed_pages, load_checkpoint, there, translate

PRESETS = {  # flags on the command line come first, then the preset, then what the data set says
    "laptop": dict(),  # the defaults below; chosen on a CPU
    "gpu": dict(n_layer=4, n_head=8, n_embd=256, dropout=0.1, batch_size=256, learning_rate=1e-3, max_iters=3000, warmup_iters=300, eval_interval=500),
    "lmwt-base": dict(mixer="haar", dataset="wmt16", n_layer=6, n_head=8, n_embd=512, dropout=0.1, batch_size=128, gradient_accumulation_steps=4,
                      learning_rate=5e-4, max_iters=100000, warmup_iters=4000, eval_interval=2000),
    "wersa-imdb": dict(mixer="wersa", dataset="imdb", arch="encoder", n_layer=2, n_head=4, n_embd=128, n_features=1024, dropout=0.1, block_size=1024, batch_size=32, max_iters=8000),
    "wavspa-lra": dict(mixer="wavspa", arch="encoder", wavelet_params="ada", levels=2, n_layer=4, n_head=4, n_embd=128, dropout=0.1, batch_size=32, max_iters=10000),
}
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "V100": 125e12, "T4": 65e12}  # dense 16-bit FLOP/s

# -----------------------------------------------------------------------------
# flags

p = Parser(description=__doc__)
p.section("what to train")
p.add("--preset", default=None, choices=list(PRESETS), help="default: gpu on a GPU, laptop elsewhere")
p.add("--dataset", default="numbers", help="a folder under --data_dir; made on first use where that needs no --source")
p.add("--data_dir", default="data", help="where prepare_data.py puts data sets")
p.add("--out_dir", default="out", help="checkpoints, log.csv, config.json; an earlier run found there is moved aside")
p.add("--resume", type=bool, default=False, help="go on from out_dir/ckpt.pt, with its settings; start anew where there is none")
p.add("--leak", type=bool, default=False, help="allow a decoder with --haar_causal=literal, which reads its own labels")
p.section("model (a data set sets arch, vocab_size, block_size, n_classes, pool)")
comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(ModelConfig), re.M))
for f in dataclasses.fields(ModelConfig):
    p.add(f"--{f.name}", type=f.type, default=f.default, choices=CHOICES.get(f.name), help=comments.get(f.name, ""))
p.section("optimisation")
p.add("--batch_size", type=int, default=64, low=1, high=2**31, help="rows of one forward pass")
p.add("--gradient_accumulation_steps", type=int, default=1, low=1, high=2**31, help="forward passes per step, shared by all processes")
p.add("--max_iters", type=int, default=800, low=0, high=2**40, help="optimiser steps in all")
p.add("--learning_rate", type=float, default=2e-3, low=0, high=100)
p.add("--min_lr", type=float, low=0, high=100, help="default: learning_rate / 20")
p.add("--warmup_iters", type=int, default=100, low=0, high=2**40)
p.add("--weight_decay", type=float, default=0.1, low=0, high=100)
p.add("--beta1", type=float, default=0.9, low=0, high=0.999999)
p.add("--beta2", type=float, default=0.98, low=0, high=0.999999)
p.add("--grad_clip", type=float, default=1.0, low=0, high=1e9, help="0 = off")
p.section("evaluation, log, machine")
p.add("--eval_interval", type=int, default=200, low=1, high=2**40, help="steps between evaluations, each followed by a checkpoint")
p.add("--eval_rows", type=int, default=1000, low=1, high=2**40, help="validation rows whose loss is taken")
p.add("--metric_rows", type=int, default=200, low=1, high=2**40, help="validation rows that are decoded for exact match or BLEU")
p.add("--eval_block_size", type=lambda s: s if s == "0" else ",".join(map(str, comma_separated(s))), help="test at this length too, or at several, joined by commas, on the split long where there is one; default: the longest of that split; 0 = do not")
p.add("--beam", type=int, default=1, low=1, high=1000, help="beams of the last test; 1 = greedy")
p.add("--log_interval", type=int, default=10, low=1, high=2**40)
p.add("--seed", type=int, default=1337, low=0, high=2**63 - 1)
p.add("--device", default="auto", type=lambda name: name if name == "auto" else there(name), help="auto, cpu, cuda, cuda:1, mps")
p.add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="auto: 16 bits on CUDA, 32 elsewhere")
p.add("--dist_timeout", type=float, default=600, low=1, high=1e6, help="seconds that a process waits for the others before it gives up")
p.add("--compile", type=bool, default=None, help="torch.compile; default: on for CUDA, off elsewhere")
args = p.parse_args()
given = p.given  # the flags that were really typed

# -----------------------------------------------------------------------------
# processes, device, dtype

world, rank, local_rank = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
master = rank == 0


def stop(sentence, code=1):
    if master:
        print(sentence, file=sys.stderr)
    sys.exit(code)


def unforeseen(kind, e, trace):
    """What to say instead of a traceback where the cause lies outside."""
    said = " ".join(str(e).split())
    if world > 1 and kind is not KeyboardInterrupt and re.search("(?i)gloo|nccl|peer|timed? ?out|socket|store", said):
        print(f"process {rank} of {world} has lost the others ({said[:150]}): see what the first of them said, then go on with --resume", file=sys.stderr)
    elif "memory" in said and issubclass(kind, (MemoryError, RuntimeError)):
        print(f"out of memory ({said[:150]}): lower --batch_size and raise --gradient_accumulation_steps by the same factor, or take a smaller model", file=sys.stderr)
    else:
        stopped(kind, e, trace)
    os._exit(1) if world > 1 else None                         # a process group that is broken must not wait at its end


sys.excepthook = unforeseen


def say(*a):
    if master:
        print(*a, flush=True)


auto = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
device = auto if args.device == "auto" else args.device
if device == "cuda" and world > 1:
    device = f"cuda:{local_rank}"
device_type = device.split(":")[0]
if device_type == "cpu":
    keep_freed_pages()
if device_type == "cuda":
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
if world > 1:
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timedelta(seconds=args.dist_timeout))
    sys.excepthook = unforeseen                                # torch's own holds back what is said, until an end that never comes

out = os.path.normpath(args.out_dir)
ckpt_path, best_path, log_path = (os.path.join(out, name) for name in ("ckpt.pt", "best.pt", "log.csv"))
if args.resume and not os.path.exists(ckpt_path):
    say(f"{ckpt_path} does not exist: starting anew")
    args.resume = False
ckpt = load_checkpoint(ckpt_path, kinds=KINDS | dict(optimizer=dict, scaler=dict, config=dict, evaluated=bool, seconds=float, log_bytes=int, skipped=int, in_a_row=int)) if args.resume else None
kept = {}
if ckpt:                                                       # read as if typed, so that a stranger's file can bring nothing that no flag takes
    p.parse_args([f"--{k}={v}" for k, v in ckpt["config"].items() if v is not None and k not in given])
    kept = p.given
preset = given.get("preset") or kept.get("preset", "gpu" if device_type == "cuda" else "laptop")
settings = {**vars(args), **PRESETS[preset], **kept, **given, "preset": preset}

# -----------------------------------------------------------------------------
# data

if not settings["dataset"].replace("-", "").replace("_", "").isalnum():
    stop(f"--dataset={settings['dataset']} must be the plain name of a folder in --data_dir")
folder = os.path.join(settings["data_dir"], settings["dataset"])
if master and not os.path.exists(os.path.join(folder, "meta.json")):
    prepare(settings["dataset"], settings["data_dir"])
if world > 1:
    dist.barrier()
meta = load_meta(folder)
from_data = {k: meta[k] for k in ("arch", "vocab_size", "block_size", "n_classes", "pool") if k in meta} | {"cross_ratio": meta.get("ratio", 1.0), "pad_id": PAD}
for k, v in from_data.items():
    if k in ("vocab_size", "n_classes", "pad_id") and given.get(k, v) != v:
        stop(f"--{k}={given[k]} is {v} in {settings['dataset']}: leave it out", 2)
    if k not in given and k not in PRESETS[preset] and not ckpt:
        settings[k] = v
cfg = type(args)(**settings)
try:
    model_cfg = ModelConfig(**{f.name: settings[f.name] for f in dataclasses.fields(ModelConfig)})
except ValueError as e:
    stop(e, 2)
if ckpt:
    old, new = ckpt["model_args"], dataclasses.asdict(model_cfg)
    changed = [f"{k}: {old.get(k)} in the checkpoint, {new[k]} now" for k in new if k not in ("dropout", "label_smoothing") and old.get(k) != new[k]]
    if [ckpt["meta"].get(k) for k in ("files", "tokenizer")] != [meta[k] for k in ("files", "tokenizer")]:
        stop(f"{folder} is not the data set that this run began with: prepare that one again, or start a new run with --out_dir")
    if changed:
        stop(f"--resume cannot change the model ({'; '.join(changed)}): leave these flags out, or start a new run with --out_dir")
if cfg.arch != "encoder" and cfg.mixer == "haar" and cfg.haar_causal == "literal" and not cfg.leak:
    stop("--haar_causal=literal leaks: each position sees the rest of its block, its own label included, so its loss means nothing; "
         "use atrous or partial, or --leak to train it all the same")
if cfg.arch != meta["arch"]:
    stop(f"--arch={cfg.arch} cannot train on {cfg.dataset}, which is made for --arch={meta['arch']}: choose another --dataset, or leave --arch out")
step_rows, T_max = cfg.batch_size * cfg.gradient_accumulation_steps, cfg.block_size
if step_rows % world:
    stop(f"--batch_size={cfg.batch_size} * --gradient_accumulation_steps={cfg.gradient_accumulation_steps} rows cannot be shared by {world} processes", 2)
micro_steps = -(-step_rows // (world * cfg.batch_size))
tokenizer = Tokenizer(meta["tokenizer"])
ragged = cfg.arch == "encdec" or "labels" in meta             # rows; else one long text


class Rows:
    """Sentence pairs, or rows with labels, of one split, cut to T tokens, and an order that is a function of (seed, step)."""

    def __init__(self, split, T=T_max):
        self.sides = [read_ragged(folder, f"{split}.{side}", meta["dtype"], cfg.vocab_size) for side in (("src", "tgt") if cfg.arch == "encdec" else ("src",))]
        room = T - (cfg.arch != "encoder")                     # for bos or eos
        self.lengths = [np.minimum(np.diff(idx), room) for _, idx in self.sides]
        self.cut = int(sum(np.diff(idx) > room for _, idx in self.sides).astype(bool).sum())
        of = lambda name: np.memmap(os.path.join(folder, f"{split}.{name}.bin"), dtype=np.int32, mode="r")
        self.labels, self.groups = of("label") if "labels" in meta else None, of("group") if "groups" in meta else None
        if self.labels is not None and not -1 <= self.labels.min() <= self.labels.max() < (cfg.n_classes if cfg.arch == "encoder" else cfg.vocab_size):
            stop(f"{folder}/{split}.label.bin has the label {self.labels.max()}, beyond the {cfg.n_classes} classes: prepare the data set again")
        self.asked = self.lengths[-1] + 1 if self.labels is None else np.ones(len(self), dtype=int)     # targets of each row
        if meta.get("labels") == "token":
            before, begin = np.r_[0, np.cumsum(self.labels >= 0)], self.sides[0][1][:-1]
            self.asked = before[begin + self.lengths[0]] - before[begin]
            if not self.asked.all():
                stop(f"--block_size={T} cuts {(self.asked == 0).sum()} {split} rows of {cfg.dataset} so short that nothing is asked in them: raise it")
        self.epoch, self.plan = None, None

    def __len__(self):
        return len(self.lengths[0])

    def at(self, step):
        """The rows of a step: a shuffled epoch, cut in pools that are sorted by length, cut in batches, shuffled."""
        if len(self) < step_rows:
            stop(f"{cfg.dataset} has {len(self)} training rows, a step takes {step_rows}: lower --batch_size or --gradient_accumulation_steps", 2)
        epoch, i = divmod(step, len(self) // step_rows)
        if epoch != self.epoch:
            rng = np.random.default_rng([cfg.seed, epoch])
            order = rng.permutation(len(self))[:len(self) // step_rows * step_rows]
            pools = [pool[np.lexsort([n[pool] for n in self.lengths])] for pool in np.split(order, range(50 * step_rows, len(order), 50 * step_rows))]
            self.epoch, self.plan = epoch, rng.permutation(np.concatenate(pools).reshape(-1, step_rows))
        return self.plan[i]

    def batch(self, rows):
        """-> (idx, targets, src) or (idx, targets), padded at their ends, and how many targets count."""
        texts = [[tokens[idx[r]:idx[r] + n[r]] for r in rows] for (tokens, idx), n in zip(self.sides, self.lengths)]
        if self.labels is not None:
            return (collate(texts[0], head=[BOS] * (cfg.arch == "decoder")), self.beside(rows, self.labels)), self.weight(rows)
        src, tgt = texts
        return (collate(tgt, head=[BOS]), collate(tgt, tail=[EOS]), collate(src, tail=[EOS])), self.weight(rows)

    def beside(self, rows, values):
        """Labels or groups of rows: (B,), or (B, T) beside the tokens, -1 where there is none."""
        if meta["labels"] == "row":
            return torch.from_numpy(values[rows].astype(np.int64))
        (_, idx), n = self.sides[0], self.lengths[0]
        return collate([values[idx[r]:idx[r] + n[r]] for r in rows], head=[-1] * (cfg.arch == "decoder"), fill=-1)

    def weight(self, rows=slice(None)):
        return int(self.asked[rows].sum())


class Stream:
    """One long text: training windows of T tokens anywhere, drawn by (seed, step); evaluation windows side by side."""

    cut, groups = 0, None

    def __init__(self, split, T=T_max):
        self.tokens, self.T = read_ragged(folder, split, meta["dtype"], cfg.vocab_size)[0], T
        self.starts = np.arange(0, len(self.tokens) - 1, T)
        if len(self.tokens) <= T:
            stop(f"{folder}/{split}.bin has {len(self.tokens)} tokens, fewer than --{'' if T == T_max else 'eval_'}block_size={T}: lower it, or bring more text")

    def __len__(self):
        return len(self.starts)

    def at(self, step):
        return np.random.default_rng([cfg.seed, step]).integers(0, len(self.tokens) - self.T, step_rows)

    def batch(self, starts):
        rows = [self.tokens[s:s + self.T + 1] for s in starts]
        return (collate([r[:-1] for r in rows]), collate([r[1:] for r in rows])), sum(len(r) - 1 for r in rows)

    def weight(self, starts):
        return sum(min(self.T, len(self.tokens) - 1 - s) for s in starts)


Data = Rows if ragged else Stream
splits = {s: Data(s) for s in ("train", "val", "test")}
far = "long" if "long" in meta["splits"] else "test"           # what is measured at --eval_block_size
if cfg.eval_block_size is None:
    Ts_far = [int(np.max(meta["splits"]["long"]["longest"])) + 1] if far == "long" else []
else:
    Ts_far = [] if cfg.eval_block_size == "0" else comma_separated(cfg.eval_block_size)
beyond = {T: Data(far, T) for T in Ts_far if T <= T_max or cfg.pos != "learned"}       # what is missing there is told now
train = splits["train"]
average = step_rows * (train.weight() / len(train) if ragged else T_max)     # targets in a step


def to_device(tensors):
    if device_type == "cuda":
        return [t.pin_memory().to(device, non_blocking=True) for t in tensors]
    return [t.to(device) for t in tensors]


def micro_batches(step):
    """This process's share of a step, built on the host: [(tensors, share of the step's targets)], and how the step's
    targets compare with an average step's: a batch of short rows counts for less, as each target counts the same."""
    rows = train.at(step)
    total = train.weight(rows)
    return [(to_device(t), n / total) for t, n in map(train.batch, np.array_split(rows[rank::world], micro_steps))], total / average


# -----------------------------------------------------------------------------
# model and optimiser

torch.manual_seed(cfg.seed)
model = (build(ckpt_path, ckpt, model_cfg) if ckpt else WaveletTransformer(model_cfg)).to(device)
optimizer = model.configure_optimizers(cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2), device_type)
configured = [dict(group) for group in optimizer.param_groups]
dtype = cfg.dtype
if dtype == "auto":
    dtype = "float32" if device_type != "cuda" else "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
autocast = nullcontext() if dtype == "float32" else torch.autocast(device_type, getattr(torch, dtype))
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
iter_num, best_loss, seconds, evaluated, skipped, in_a_row = 0, math.inf, 0.0, False, 0, 0
if ckpt:
    iter_num, best_loss, seconds, evaluated, skipped, in_a_row = (ckpt[k] for k in ("iter_num", "best_loss", "seconds", "evaluated", "skipped", "in_a_row"))
    try:
        optimizer.load_state_dict(ckpt["optimizer"])
        if scaler.is_enabled() and ckpt["scaler"]:             # a run that comes from a CPU has none
            scaler.load_state_dict(ckpt["scaler"])
        for group, fresh in zip(optimizer.param_groups, configured):
            group.update({k: v for k, v in fresh.items() if k != "params"})
        assert all(v.shape == q.shape for q in optimizer.state for k, v in optimizer.state[q].items() if k != "step")
    except Exception:                                          # as many as there are ways to be no optimiser
        stop(f"{ckpt_path} has an optimiser that is not this model's: restore it from a copy, or train again")
compiled = device_type == "cuda" if cfg.compile is None else cfg.compile
net = torch.compile(model) if compiled else model
if world > 1:                                                  # sorted wavspa leaves out bands that short rows have nothing in
    net = DDP(net, device_ids=[local_rank] if device_type == "cuda" else None, find_unused_parameters=cfg.mixer == "wavspa" and cfg.wavspa_causal == "sorted")
    dist.all_gather_object(steps := [None] * world, iter_num)
    if len(set(steps)) > 1:
        stop(f"the processes are at different steps ({', '.join(map(str, sorted(set(steps))))}): --out_dir={out} must be one folder that all nodes see")

n_params, n_mix, n_emb = model.num_params(), model.num_params("mixer") + model.num_params("cross"), model.num_params("wte") + model.num_params("wpe")
tokens_per_row = [float(np.mean(n)) for n in train.lengths] if ragged else [T_max]
tokens_per_step = int(step_rows * sum(tokens_per_row))
flops_per_token = model.flops_per_token(tokens_per_row[-1])
peak = next((v for k, v in PEAK.items() if device_type == "cuda" and dtype != "float32" and k in torch.cuda.get_device_name()), None)
say(f"device       {device}" + (f" ({torch.cuda.get_device_name()})" if device_type == "cuda" else f" ({torch.get_num_threads()} threads)") + f", {world} process{'es' * (world > 1)}")
say(f"dtype        {dtype}" + (" (autocast)" if dtype != "float32" else "") + f", compile {'on' if compiled else 'off'} ({'as asked' if cfg.compile is not None else 'default for ' + device_type})")
say(f"data         {cfg.dataset}: " + ", ".join(f"{len(d):,} {s}" for s, d in splits.items()) + {"encdec": " pairs", "encoder": " rows", "decoder": " windows"}[cfg.arch] + f", vocabulary {cfg.vocab_size:,}, block {T_max}")
cut = ", ".join(f"{d.cut:,} of {len(d):,} {s}" for s, d in splits.items() if d.cut)
if cut:
    say(f"             rows longer than --block_size={T_max}, cut: {cut}")
say(f"model        {cfg.arch}, {cfg.mixer}" + (f", cross {cfg.cross}" if cfg.arch == "encdec" else "") + f": {n_params:,} parameters ({n_mix:,} in mixers, {n_emb:,} in embeddings)")
for group, name in zip(optimizer.param_groups, ("decay", "no decay")):
    say(f"optimiser    {name}: {len(group['params'])} tensors, {sum(q.numel() for q in group['params']):,} parameters")
say(f"step         {cfg.batch_size} rows * {cfg.gradient_accumulation_steps} = {step_rows} rows, about {tokens_per_step:,} tokens, {flops_per_token / 1e6:.1f} MFLOP a token")

# -----------------------------------------------------------------------------
# evaluation, checkpoints, log


def total_over_ranks(*values):
    """Sum floats over all processes."""
    t = torch.tensor(values, dtype=torch.float64, device=device if device_type == "cuda" else "cpu")
    if world > 1:
        dist.all_reduce(t)
    return t.tolist()


def roc_auc(score, positive):
    """Area under the ROC curve, the chance that a positive row scores above a negative one, ties counting half."""
    _, at, count = np.unique(score, return_inverse=True, return_counts=True)
    rank, n = (np.cumsum(count) - (count - 1) / 2)[at], positive.sum()
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))


def from_all_ranks(mine):
    """The values of rows that were dealt out by [rank::world], in their order."""
    parts = [mine]
    if world > 1:
        dist.all_gather_object(parts := [None] * world, mine)
    out = [None] * sum(map(len, parts))
    for r, part in enumerate(parts):
        out[r::world] = part
    return out


class Interrupted(Exception):
    """A signal during an evaluation, which is not waited for: it can be repeated."""


def heed():
    if caught:
        raise Interrupted


caught = []                                                    # signals


@torch.no_grad()
def evaluate(data, limit):
    """The first rows of a split, the same each time, shared by all processes -> loss (mean per target), accuracy (of the
    likeliest answers), groups (the same for each group of targets), auc (of row labels, mean over classes)."""
    model.eval()
    most = int(data.groups.max()) + 1 if data.groups is not None else 0
    total, count, right, asked, probs, labels = 0.0, 0, np.zeros(most + 1), np.zeros(most + 1), [], []
    rows = np.arange(min(limit, len(data)))[rank::world] if ragged else data.starts[:limit][rank::world]
    for i in range(0, len(rows), cfg.batch_size):
        heed()
        chunk = rows[i:i + cfg.batch_size]
        tensors, n = data.batch(chunk)
        tensors = to_device(tensors)
        with autocast:
            logits, loss = model(*tensors)
        total, count, targets = total + loss.item() * n, count + n, tensors[1].cpu()
        counted = targets >= 0 if "labels" in meta else targets != PAD
        group = data.beside(chunk, data.groups)[counted] if most else torch.full((int(counted.sum()),), most)
        hit = logits.argmax(-1).cpu()[counted] == targets[counted]
        right, asked = right + np.bincount(group, hit, most + 1), asked + np.bincount(group, minlength=most + 1)
        if meta.get("labels") == "row":
            probs, labels = probs + list(logits.float().softmax(-1).cpu().numpy()), labels + targets.tolist()
    model.train()
    total, count, *both = total_over_ranks(total, count, *right, *asked)
    right, asked = both[:most + 1], both[most + 1:]
    result = dict(loss=total / count, accuracy=sum(right) / sum(asked))
    if most:
        result["groups"] = {g: right[g] / asked[g] for g in range(most) if asked[g]}
    if meta.get("labels") == "row":
        probs, labels = np.array(from_all_ranks(probs)), np.array(from_all_ranks(labels))
        present = [c for c in range(probs.shape[1]) if 0 < (labels == c).sum() < len(labels)][-1 if probs.shape[1] == 2 else 0:]
        result["auc"] = float(np.mean([roc_auc(probs[:, c], labels == c) for c in present])) if present else None
    if meta["metric"] == "bleu" and (result["loss"] < math.log(3.5) or result["accuracy"] > 0.75):
        say(f"warning: perplexity {math.exp(result['loss']):.2f}, token accuracy {result['accuracy']:.2f} with the true words before each: on real text "
            "this is a leak, not a breakthrough (a mixer that sees its own label, test rows in training), unless the rows are very regular")
    return result


@torch.no_grad()
def score(split, found, limit, beam=1, T=T_max):
    """The task's own metric: bits per byte or accuracy, which evaluate found, or, on text that the model decodes here,
    exact match or BLEU."""
    if meta["metric"] == "bpb":
        return found["loss"] / math.log(2) * meta["splits"][split]["tokens"] / meta["bytes"][split]
    if meta["metric"] == "acc":
        return found["accuracy"]
    model.eval()
    src, ref = (open(os.path.join(folder, f"{split}.{side}.txt"), encoding="utf-8").read().split("\n")[:-1][:limit] for side in ("src", "tgt"))
    with autocast:
        mine, _ = translate(model, tokenizer, src[rank::world], beam=beam, batch_size=max(1, 256 // beam), block_size=T, heed=heed)
    model.train()
    hyp = from_all_ranks(mine)
    if meta["metric"] == "exact":
        return sum(h == r for h, r in zip(hyp, ref)) / len(ref)
    import sacrebleu
    bleu = sacrebleu.metrics.BLEU()
    result = bleu.corpus_score(hyp, [ref]).score
    if limit >= meta["splits"][split]["rows"]:
        say(f"sacreBLEU signature: {bleu.get_signature()}")
    return result


PATIENCE = 25                                                  # steps in a row that may fail; float16's scale needs up to 16 at first
METRIC = {"exact": "exact match", "bleu": "BLEU", "bpb": "bits per byte", "acc": "accuracy"}[meta["metric"]]


def write(path, into, mode="w"):
    """Only rank 0 writes, and what it writes is all there or not there."""
    if master:
        try:
            with replacing(path, mode) as f:
                into(f)
        except (OSError, RuntimeError) as e:
            stop(f"{path} cannot be written ({' '.join(str(e).split())[:150]}): the last checkpoint is intact; make room and go on with --resume")


def save(evaluated):
    common = dict(format=FORMAT, model=model.state_dict(), model_args=dataclasses.asdict(model_cfg), meta=meta, iter_num=iter_num, best_loss=best_loss)
    if evaluated and val_loss == best_loss:
        write(best_path, lambda f: torch.save(common, f), "wb")
    state = common | dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), config=settings, evaluated=evaluated, skipped=skipped, in_a_row=in_a_row,
                          seconds=seconds + time.time() - t_start, log_bytes=os.path.getsize(log_path) if master else 0)
    write(ckpt_path, lambda f: torch.save(state, f), "wb")


def leave():
    """A signal came, and all is saved: exit with its number, on which a scheduler can start anew."""
    stop(f"stopped after step {iter_num}, saved: go on with --resume", 128 + (caught or [signal.SIGTERM])[0])


LOGGED = ("step", "loss", "norm", "lr", "skipped", "val_loss", "val_metric")


def log(**row):
    """One line of log.csv; nothing in it depends on the clock, so that two equal runs write equal files."""
    if master:
        try:
            with open(log_path, "a", newline="") as f:
                csv.writer(f).writerow([row.get(k, "") for k in LOGGED])
        except OSError as e:
            stop(f"{log_path} cannot be written ({e.strerror}): the last checkpoint is intact; make room and go on with --resume")


if master:
    try:
        if not ckpt and os.path.exists(ckpt_path):
            n = next(n for n in range(1, 10**6) if not os.path.exists(f"{out}.{n}"))
            os.rename(out, f"{out}.{n}")
            say(f"{out} held an earlier run: moved to {out}.{n} (to go on with a run instead, say --resume)")
        os.makedirs(out, exist_ok=True)
        if ckpt and os.path.exists(log_path) and os.path.getsize(log_path) >= ckpt["log_bytes"]:
            os.truncate(log_path, ckpt["log_bytes"])           # what was logged after the checkpoint happens again
        else:
            with open(log_path, "w", newline="") as f:
                csv.writer(f).writerow(LOGGED)
        with replacing(os.path.join(out, "config.json")) as f:
            json.dump(settings, f, indent=1)
    except OSError as e:
        stop(f"--out_dir={out} cannot be written: {e.strerror}")
say(" ".join(f"{k}={v}" for k, v in settings.items() if v != p.get_default(k)))


def get_lr(it):
    """Linear warm-up, then cosine to min_lr at max_iters."""
    low = cfg.learning_rate / 20 if cfg.min_lr is None else cfg.min_lr
    if it < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / (cfg.warmup_iters + 1)
    ratio = (it - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)
    return low + 0.5 * (1 + math.cos(math.pi * min(1.0, ratio))) * (cfg.learning_rate - low)


# -----------------------------------------------------------------------------
# the loop

def on_signal(number, frame):
    if caught and world == 1:                                  # the second Ctrl-C means now; torchrun sends its own after one
        sys.exit(128 + number)
    caught.append(number)


for s in (signal.SIGINT, signal.SIGTERM):
    signal.signal(s, on_signal)

model.train()
t_start = t_log = time.time()
first, val_loss = iter_num, math.inf
batches, size = micro_batches(iter_num)
while True:
    if (iter_num % cfg.eval_interval == 0 or iter_num >= cfg.max_iters) and not evaluated:
        save(evaluated=False)                                  # an evaluation may take longer than a scheduler waits
        try:
            found = evaluate(splits["val"], cfg.eval_rows)
            val_loss, val_metric = found["loss"], score("val", found, cfg.metric_rows)
        except Interrupted:
            leave()
        best_loss = min(best_loss, val_loss)
        say(f"step {iter_num:05d}/{cfg.max_iters:05d} | val loss {val_loss:.4f} | val {METRIC} {val_metric:.4f}" + (" | best" if val_loss == best_loss else ""))
        log(step=iter_num, val_loss=val_loss, val_metric=val_metric)
        save(evaluated=True)
        t_log, first = time.time(), iter_num
    evaluated = False
    if iter_num >= cfg.max_iters:
        break

    torch.manual_seed(hash((cfg.seed, iter_num, rank)) % 2**31)  # dropout, too, can be repeated
    lr = get_lr(iter_num)
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss_sum = 0.0
    for i, (tensors, share) in enumerate(batches):
        if world > 1:
            net.require_backward_grad_sync = i == len(batches) - 1
        with autocast:
            loss = net(*tensors)[1] * share                    # shares add up to 1 over all passes of all processes
        scaler.scale(loss * size * world).backward()           # DDP averages, the step sums
        loss_sum = loss_sum + loss.detach()
    batches, size = micro_batches(iter_num + 1)                # while the GPU is still busy
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
    loss_sum, norm, stopping = total_over_ranks(loss_sum.item(), norm.item() / world, len(caught))
    if math.isfinite(loss_sum + norm):
        scaler.step(optimizer)
        in_a_row = 0
    else:                                                      # this step is left out
        skipped, in_a_row = skipped + 1, in_a_row + 1
        if in_a_row == PATIENCE:
            stop(f"the loss or its gradient was not finite {PATIENCE} steps in a row, up to step {iter_num}: lower --learning_rate, raise --warmup_iters"
                 + (", or take --dtype=float32" if dtype != "float32" else "") + "; then --resume from the last checkpoint")
    scaler.update()
    optimizer.zero_grad(set_to_none=True)

    if iter_num % cfg.log_interval == 0:
        log(step=iter_num, loss=loss_sum, norm=norm, lr=lr, skipped=skipped)
        dt = (time.time() - t_log) / (iter_num + 1 - first)
        t_log, first = time.time(), iter_num + 1
        say(f"step {iter_num:05d}/{cfg.max_iters:05d} | loss {loss_sum:.4f} | norm {norm:.2f} | lr {lr:.1e} | {dt * 1e3:.1f} ms | {tokens_per_step / dt:,.0f} tok/s"
            + (f" | mfu {flops_per_token * tokens_per_step / dt / (peak * world):.1%}" if peak else "") + f" | eta {dt * (cfg.max_iters - iter_num) / 60:.1f}m"
            + f" | skipped {skipped}" * (skipped > 0))
    iter_num += 1
    if stopping:
        save(evaluated=False)
        if world > 1:
            dist.barrier()                                     # torchrun stops all when the first one ends
        leave()

# -----------------------------------------------------------------------------
# the test set, once, with the checkpoint that validation chose

seconds += time.time() - t_start
if world > 1:
    dist.barrier()
model.load_state_dict(load_checkpoint(best_path, device)["model"])


def measure(split, data, T):
    """-> what evaluate found in all of a split, and its score."""
    try:
        found = evaluate(data, 10**9)
        return found, score(split, found, 10**9, cfg.beam, T)
    except Interrupted:
        stop("stopped while testing: go on with --resume", 128 + caught[0])


found, test_score = measure("test", splits["test"], T_max)
result = dict(params=n_params, steps=cfg.max_iters, seconds=round(seconds, 1), val_loss=best_loss, test_loss=found["loss"], test_metric=test_score, metric=METRIC,
              n=len(splits["test"]), test=found, trivial=meta["splits"]["test"]["trivial"],
              data=dict(rows=meta["splits"]["train"]["rows"], tokens=int(np.sum(meta["splits"]["train"]["tokens"])), seconds=meta["seconds"]))
say(f"{cfg.max_iters} steps in {seconds / 60:.1f} minutes | test loss {found['loss']:.4f} | test {METRIC} {test_score:.4f} (n={len(splits['test'])}, best.pt) | trivial: "
    + ", ".join(f"{name} {value:.3f}" for name, value in result["trivial"].items()))
if meta["metric"] in ("bleu", "exact"):
    say(f"test perplexity {math.exp(found['loss']):.3f}, token accuracy {found['accuracy']:.4f}, given the true tokens before each")
if found.get("auc"):
    say(f"test AUC {found['auc']:.4f}")
by_group = lambda found: f"by {meta['groups']}: " + ", ".join(f"{g}: {v:.3f}" for g, v in found["groups"].items())
if "groups" in found:
    say(f"test accuracy {by_group(found)}")
for T in Ts_far:
    if T not in beyond:
        say(f"{far} at {T} tokens: left out, --pos=learned knows no position beyond --block_size={T_max}")
result["far"] = []
for T, data in beyond.items():
    found, far_score = measure(far, data, T)
    result["far"].append(dict(found, split=far, block_size=T, metric=far_score, n=len(data), trivial=meta["splits"][far]["trivial"]))
    say(f"{far} at up to {T} tokens (trained at {T_max}) | loss {found['loss']:.4f} | {METRIC} {far_score:.4f} (n={len(data)})"
        + (f" | {by_group(found)}" if "groups" in found else ""))
write(os.path.join(out, "result.json"), lambda f: json.dump(result, f, indent=1))
if world > 1:
    dist.destroy_process_group()
