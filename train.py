"""
Train a wavelet encoder-decoder (or encoder, or decoder): one GPU, one CPU, or many under torchrun.

    python train.py --mixer=wersa            # the default data set, minutes on a laptop
    python train.py --dataset=multi30k --mixer=haar,attention --out_dir=out-m30k
    python train.py --resume                 # go on where out/ckpt.pt stopped
    python train.py --init_from=out/best.pt --dataset=parallel --out_dir=tuned    # its weights and settings
    torchrun --standalone --nproc_per_node=4 train.py    # 4 GPUs, or 4 CPU processes
    torchrun --nnodes=2 --node_rank=0 --master_addr=HOST ...   # --node_rank=1 on the second node

A step is batch_size * gradient_accumulation_steps rows, however many processes share them. Data order is a
function of (seed, step), dropout one of (seed, step, process), so a run may be killed and resumed, on another
number of processes too, where dropout alone is drawn anew. Nodes share --data_dir and --out_dir.
"""

import csv
import dataclasses
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from argparse import ArgumentTypeError
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from model import CHOICES, ModelConfig, WaveletTransformer
from prepare_data import PAD, Parser, Tokenizer, comma_separated, draw_curves, load_meta, lock, macro_f1, need
from prepare_data import open_split, prepare, replacing, roc_auc, stopped
from sample import FORMAT, KINDS, build, compile_blocks, keep_freed_pages, load_checkpoint, marks, one_line
from sample import read_lines, refuse_idle, register, there, translate

PRESETS = {  # flags on the command line come first, then the preset, then what the data set says
    "laptop": dict(),  # the defaults below; chosen on a CPU
    "gpu": dict(n_layer=4, n_head=8, n_embd=256, dropout=0.1, batch_size=256, learning_rate=1e-3,
                max_iters=3000, warmup_iters=300, eval_interval=500),
    "lmwt-base": dict(dataset="wmt16", mixer="haar", undecimated="decoder", gate=False, n_layer=6, n_head=8,
                      n_embd=512, dropout=0.1, batch_size=128, gradient_accumulation_steps=4,
                      max_iters=100000, learning_rate=5e-4, warmup_iters=4000, eval_interval=2000),
    "wersa-imdb": dict(dataset="imdb", arch="encoder", mixer="wersa", n_features=1024, gate=False, n_layer=2,
                       n_head=4, n_embd=128, dropout=0.1, block_size=1024, batch_size=32, max_iters=8000),
    "wavspa-lra": dict(arch="encoder", mixer="wavspa", wavelet="db2", wavelet_params="ada", levels=2,
                       wavspa_shared=False, gate=False, n_layer=4, n_head=4, n_embd=128, dropout=0.1,
                       batch_size=32, max_iters=10000),
}

PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "V100": 125e12,
        "T4": 65e12}  # dense 16-bit FLOP/s

# ---- flags
p = Parser(description=__doc__)
p.section("what to train")
p.add("--preset", choices=list(PRESETS), help="default: gpu on a GPU, laptop elsewhere")
p.add("--dataset", help="a folder of --data_dir, made at first if it needs no --source", default="numbers")
p.add("--data_dir", default="data", help="where prepare_data.py puts data sets")
p.add("--out_dir", default="out", help="checkpoints, log.csv, config.json; moves an earlier run aside")
p.add("--resume", bool, "go on from out_dir/ckpt.pt with its settings, or start anew", default=False)
p.add("--init_from", help="best.pt or ckpt.pt of another run: its weights, its model's settings, new data")
p.add("--mixers_from", help="a Python file that registers more mixers in model.MIXERS first")
p.add("--leak", bool, "let haar with --undecimated=no read its own labels in a decoder", default=False)
p.section("model (a data set sets arch, vocab_size, block_size, n_classes, pool)")
comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(ModelConfig), re.M))
for f in dataclasses.fields(ModelConfig):
    choices = None if f.name == "mixer" else CHOICES.get(f.name)  # of mixers, ModelConfig knows
    p.add(f"--{f.name}", f.type, comments.get(f.name, ""), default=f.default, choices=choices)
p.section("optimisation")
p.add("--batch_size", int, "rows of one forward pass", 1, 2**31, default=64)
p.add("--gradient_accumulation_steps", int, "forward passes per step, of all processes", 1, 2**31, default=1)
p.add("--max_iters", int, "optimiser steps in all", 0, 2**40, default=800)
p.add("--learning_rate", float, "", 0, 100, default=2e-3)
p.add("--min_lr", float, "default: learning_rate / 20", 0, 100)
p.add("--warmup_iters", int, "", 0, 2**40, default=100)
p.add("--weight_decay", float, "", 0, 100, default=0.1)
p.add("--beta1", float, "", 0, 0.999999, default=0.9)
p.add("--beta2", float, "", 0, 0.999999, default=0.98)
p.add("--grad_clip", float, "0 = off", 0, 1e9, default=1.0)
p.section("evaluation, log, machine")
p.add("--eval_interval", int, "steps between evaluations, which end in a checkpoint", 1, 2**40, default=200)
p.add("--eval_rows", int, "validation rows whose loss is taken", 1, 2**40, default=1000)
p.add("--metric_rows", int, "validation rows that are decoded for exact match or BLEU", 1, 2**40, default=200)
p.add("--eval_block_size", lambda s: s if s == "0" or comma_separated(s) else None,
      "test at these lengths too, on the split long if there is one; default: its longest; 0 = do not")
p.add("--patience", int, "end after so many evaluations without a lower loss; 0 = off", 0, 10**6, default=0)
p.add("--average", int, "test the mean weights of so many last evaluations; 0 = the best", 0, 1000, default=0)
p.add("--beam", int, "beams of the last test; 1 = greedy", 1, 1000, default=1)
p.add("--log_interval", int, "", 1, 2**40, default=10)
p.add("--seed", int, "", 0, 2**63 - 1, default=1337)
p.add("--device", lambda s: s if s == "auto" else there(s), "auto, cpu, cuda, cuda:1, mps", default="auto")
p.add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="auto: 16 on CUDA")
p.add("--dist_timeout", float, "seconds that a process waits for the others", 1, 1e6, default=600)
p.add("--compile", bool, "torch.compile; default: on for CUDA, off elsewhere")
args = p.parse_args()
given = p.given  # the flags that were really typed
if args.mixers_from:
    register(args.mixers_from)

# ---- settings
world = int(os.environ.get("WORLD_SIZE", 1))
rank = int(os.environ.get("RANK", 0))
master = rank == 0
out = os.path.normpath(args.out_dir)
ckpt_path = os.path.join(out, "ckpt.pt")  # the last state
best_path = os.path.join(out, "best.pt")  # the lowest validation loss
log_path = os.path.join(out, "log.csv")
COUNTERS = dict(iter_num=0, best_loss=math.inf, seconds=0.0, evaluated=False, skipped=0, in_a_row=0)
FIELDS = [f.name for f in dataclasses.fields(ModelConfig)]

def say(*a, to="stdout"):
    if master:
        try:
            print(*a, file=getattr(sys, to), flush=True)
        except OSError:  # the terminal was closed, or head has ended: log.csv goes on
            setattr(sys, to, open(os.devnull, "w"))

def stop(sentence, code=1):
    say(sentence, to="stderr")
    sys.exit(code)

@contextmanager
def writing(path):
    try:
        yield
    except (OSError, RuntimeError) as e:  # torch.save has its own
        stop(f"{path} cannot be written ({one_line(e)}): make room or take another --out_dir; a checkpoint "
             "that was there is intact, --resume goes on from it")

def own():
    """Make --out_dir and hold it until this process ends: two runs in one folder would lose one of them."""
    with writing(out):
        os.makedirs(out, exist_ok=True)
        return lock(os.path.join(out, "lock"), "end that run first, or take another --out_dir")

def unforeseen(kind, e, trace):
    """What to say instead of a traceback where memory is short."""
    if kind is MemoryError or re.search("out of memory|can't allocate memory", str(e)):
        print(f"out of memory ({one_line(e)}): lower --batch_size and raise --gradient_accumulation_steps by "
              "the same factor, or take a smaller model", file=sys.stderr)
    else:
        stopped(kind, e, trace)
    if world > 1:
        os._exit(1)  # a broken process group must not wait at its end

def as_if_typed(config):
    """Settings of a file, so that a stranger's can bring nothing that no flag takes."""
    p.parse_args([f"--{k}={v}" for k, v in config.items()])
    return p.given

ckpt, kept = None, {}  # this run's checkpoint and settings, to go on with
begun = "auto"  # its device
source, inherited = None, {}  # another run's, to start from
if args.resume and os.path.exists(ckpt_path):
    if given.pop("init_from", None):  # the same command starts a job and starts it again
        args.init_from = None
        say(f"--init_from is left out, as this run goes on from {ckpt_path}")
    kinds = KINDS | dict(optimizer=dict, scaler=dict, config=dict, log_bytes=int)
    ckpt = load_checkpoint(ckpt_path, kinds=kinds | {name: type(value) for name, value in COUNTERS.items()})
    config = {k: v for k, v in ckpt["config"].items() if v is not None and k not in given}
    begun = str(config.pop("device", "auto"))
    with suppress(ArgumentTypeError):  # auto, or what this machine has not
        args.device = there(begun)
    kept = as_if_typed(config)
    if "mixers_from" in kept:  # and no file is run that was not asked for
        stop(f"{ckpt_path} was trained with --mixers_from={kept['mixers_from']}: give that flag again", 2)
else:
    if args.resume:
        say(f"{ckpt_path} does not exist: starting anew")
    if args.init_from:
        source = load_checkpoint(args.init_from)
        had = source["model_args"]
        inherited = as_if_typed({k: had[k] for k in FIELDS if k in had and k not in given})

device = args.device
if device == "auto":
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
if device == "cuda" and world > 1:
    device = f"cuda:{os.environ['LOCAL_RANK']}"
device_type = device.split(":")[0]
if device_type == "cpu":
    keep_freed_pages()
if device_type == "cuda":
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")

# what was typed comes first, then what the checkpoint, the preset and the data set say
preset = given.get("preset") or kept.get("preset") or ("gpu" if device_type == "cuda" else "laptop")
said = {**PRESETS[preset], **inherited, **kept, **given, "preset": preset}
settings = {**vars(args), **said}
if world > 1:
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=settings["dist_timeout"]))
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=30))  # for work of any length
# set after torch.distributed's own, which holds back what it prints, so that os._exit would lose it
sys.excepthook = unforeseen

folder = os.path.join(settings["data_dir"], settings["dataset"])
if master and not os.path.exists(os.path.join(folder, "meta.json")):
    own()  # and let go again: an --out_dir that cannot be written ends this before the data are made
    prepare(settings["dataset"], settings["data_dir"])
if world > 1:
    dist.barrier(group=patient)
meta = load_meta(folder)
fixed = {k: meta[k] for k in ("vocab_size", "n_classes") if k in meta}
fixed["pad_id"] = PAD
advice = {k: meta[k] for k in ("arch", "block_size", "pool") if k in meta}
advice["cross_ratio"] = meta.get("ratio", 1.0)
for k in ("arch", "pool", "cross_ratio"):
    if k in inherited and (k in advice or inherited[k] == "token"):  # new data have their own
        said[k] = advice.get(k, "mean")
settings = {**settings, **advice, **said, **fixed}
cfg = SimpleNamespace(**settings)
try:
    model_cfg = ModelConfig(**{k: settings[k] for k in FIELDS})
except ValueError as e:
    stop(e, 2)
if cfg.arch != meta["arch"]:
    stop(f"--arch={cfg.arch} cannot train on {cfg.dataset}, which is for {meta['arch']}: leave it out")
if cfg.arch == "encoder" and (cfg.pool == "token") != (meta["labels"] == "token"):
    stop(f"--pool={cfg.pool} does not suit {cfg.dataset}, where a {meta['labels']} has a label: leave it out")
if ckpt:
    if any(ckpt["meta"].get(k) != meta[k] for k in ("files", "tokenizer")):
        stop(f"{folder} is not the data set of this run: bring that back, or take another --out_dir")
    old, new = ckpt["model_args"], dataclasses.asdict(model_cfg)
    differs = [f"{k}: {old.get(k)} in the checkpoint, {new[k]} now" for k in new
               if old.get(k) != new[k] and k not in ("dropout", "label_smoothing")]
    if differs:
        stop(f"--resume cannot change the model ({'; '.join(differs)}): take another --out_dir for that")

T_max = cfg.block_size
far, asked = "test", "0"  # what is measured at --eval_block_size, by default
if "long" in meta["splits"]:
    far, asked = "long", str(np.max(meta["splits"]["long"]["longest"]) + 1)
Ts_far = [int(T) for T in (cfg.eval_block_size or asked).split(",") if T != "0"]
known = [T for T in Ts_far if T <= T_max or cfg.pos != "learned"]
layers = [model_cfg.of_layer(i) for i in range(cfg.n_layer)]
mixers = {c.mixer for c in layers}
unused = set(cfg.mixer.split(",")) - mixers
if unused:
    stop(f"--mixer={cfg.mixer} has no layer for {', '.join(unused)}: raise --n_layer={cfg.n_layer}", 2)
used = mixers | {c.inner for c in layers if c.mixer == "wavspa"}
crosses = {c.cross_kind for c in layers if cfg.arch == "encdec"}
wavy = mixers & {"haar", "wavspa", "wersa"}
banded = any(c.mixer in wavy and c.n_levels > 0 for c in layers)
literal = any(c.mixer == "haar" and c.n_levels > 0 and not c.is_undecimated(causal=True) for c in layers)
leaky = literal and cfg.arch != "encoder"
idle = [("vocab_size n_classes pad_id", True, "the data set says it"),
        ("cross cross_ratio", cfg.arch != "encdec", "it needs --arch=encdec"),
        ("pool", cfg.arch != "encoder", "it needs --arch=encoder"),
        ("beam", cfg.arch != "encdec", "it is for translations"),
        ("leak", not leaky, "nothing leaks"),
        ("eval_block_size", known != Ts_far, f"--pos=learned knows no position beyond {T_max}")]
if mixers <= wavy | {"attention", "fourier"}:  # one of a reader's own may look at anything
    idle += [("window", "attention" not in used, "it needs attention, as a mixer or in wavspa"),
             ("levels", not (wavy or crosses & {"aligned", "place"}), "it needs wavelets"),
             ("wavelet wavelet_params undecimated", not banded, "it needs wavelets, with --levels"),
             ("inner wavspa_shared", "wavspa" not in mixers, "it needs --mixer=wavspa"),
             ("n_features feature_map", "wersa" not in used | crosses, "it needs wersa")]
refuse_idle(given, idle, lambda sentence: stop(sentence, 2))
if leaky and not cfg.leak:
    stop("--undecimated=no leaks in a decoder: each position sees the rest of its block, its own label too; "
         "--undecimated=decoder has the paper's encoder and a sound decoder, --leak trains it all the same")
step_rows = cfg.batch_size * cfg.gradient_accumulation_steps
if step_rows % world:
    stop(f"{world} processes cannot share --batch_size * --gradient_accumulation_steps = {step_rows} rows", 2)
owner = own() if master else None

# ---- data
if meta["metric"] == "bleu":
    need("sacrebleu")
tokenizer = Tokenizer(meta["tokenizer"])
labels = meta.get("labels")  # row, token, or None
splits = {split: open_split(folder, meta, split, T_max) for split in ("train", "val", "test")}
beyond = {T: open_split(folder, meta, far, T) for T in known}
train = splits["train"]
micro_steps = -(-step_rows // (world * cfg.batch_size))

def to_device(tensors):
    if device_type == "cuda":
        return [t.pin_memory().to(device, non_blocking=True) for t in tensors]
    return [t.to(device) for t in tensors]

def micro_batches(step):
    """This process's part of a step, built on the host: [(tensors, share of the step's targets)], and how its
    targets compare with an average step's: short rows count for less, as all targets count the same."""
    rows = train.at(step, step_rows, cfg.seed)
    total, batches = train.weight(rows), []
    for part in np.array_split(rows[rank::world], micro_steps):
        tensors, n = train.batch(part)
        batches.append((to_device(tensors), n / total))
    return batches, total / (step_rows * train.per_row)

def total_over_ranks(*values):
    """Sum floats over all processes."""
    t = torch.tensor(values, dtype=torch.float64, device=device if device_type == "cuda" else "cpu")
    if world > 1:
        dist.all_reduce(t)
    return t.tolist()

def from_all_ranks(mine):
    """The values of rows that were dealt out by [rank::world], in their order."""
    parts = [mine]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, mine)
    whole = [None] * sum(map(len, parts))
    for r, part in enumerate(parts):
        whole[r::world] = part
    return whole

# ---- model and optimiser
torch.manual_seed(cfg.seed)
model = build(ckpt_path, ckpt, model_cfg) if ckpt else WaveletTransformer(model_cfg)
if source:
    wanted = model.state_dict()
    fits = {k: v for k, v in source["model"].items()
            if k in wanted and getattr(v, "shape", None) == wanted[k].shape}
    if not fits.keys() & dict(model.named_parameters()).keys():
        stop(f"nothing in {args.init_from} fits this model: leave out the flags that make it another one")
    model.load_state_dict(fits, strict=False)
    fresh = ", ".join(k for k in wanted if k not in fits) or "none"
    say(f"weights      those of step {source['iter_num']} of {args.init_from}; fresh: {fresh}")
    if source["meta"].get("tokenizer") != meta["tokenizer"]:
        had = os.path.join(cfg.data_dir, str(source["meta"].get("name")))
        say("             its embeddings mean other words, as its tokenizer is another: prepare the data "
            f"with --tokenizer_from={had}")
best_iter = 0
if ckpt and ckpt["best_loss"] < math.inf:
    best_iter = load_checkpoint(best_path)["iter_num"]  # a best.pt that is gone is missed now, not at the end
model.to(device)
betas = (cfg.beta1, cfg.beta2)
optimizer = model.configure_optimizers(cfg.weight_decay, cfg.learning_rate, betas, device_type)
dtype = cfg.dtype
if dtype == "auto":
    dtype = "float32"
    if device_type == "cuda":  # what a GPU emulates is slow
        dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
autocast = nullcontext() if dtype == "float32" else torch.autocast(device_type, getattr(torch, dtype))
if device_type == "cpu" and dtype != "float32" and T_max <= 128:
    torch.backends.cuda.enable_flash_sdp(False)  # the CPU's too, whose 16-bit backward is 2 to 6 times slower
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
sums = np.zeros(3)  # since the last line of log.csv: losses, without label smoothing, and steps
iter_num, best_loss, seconds, evaluated, skipped, in_a_row = ((ckpt or COUNTERS)[name] for name in COUNTERS)
launched = iter_num
if ckpt:
    # its moments, with the settings of today
    optimizer.load_state_dict(dict(optimizer.state_dict(), state=ckpt["optimizer"]["state"]))
    if scaler.is_enabled() and ckpt["scaler"]:  # a run that comes from a CPU has none
        scaler.load_state_dict(ckpt["scaler"])
    sums += ckpt.get("sums", 0)
net = model
compiled = device_type == "cuda" if cfg.compile is None else cfg.compile
why = f"default for {device_type}" if cfg.compile is None else "as asked"
if compiled:
    try:  # something small shows whether there is a compiler
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(lambda x: x.sin().sum())(x).backward()
        compile_blocks(model)
    except Exception as e:
        compiled, why = False, "no compiler"
        say(f"no compiler works here ({one_line(e)}): going on without, as --compile=False does at once")
if world > 1:
    net = DDP(net, device_ids=[device] if device_type == "cuda" else None)
    steps = sorted(set(from_all_ranks([iter_num])))
    if len(steps) > 1:
        stop(f"the processes are at different steps ({', '.join(map(str, steps))}): --out_dir={out} must be "
             "one folder for all")

machine = torch.cuda.get_device_name() if device_type == "cuda" else f"{torch.get_num_threads()} threads"
peak = None  # an unknown GPU shows no MFU
if device_type == "cuda" and dtype != "float32":
    peak = next((flops for name, flops in PEAK.items() if name in machine), None)
tokens_per_row = [float(np.mean(n)) for n in train.lengths]
tokens_per_step = int(step_rows * sum(tokens_per_row))
n_params, n_mix = model.num_params(), model.num_params("mixer") + model.num_params("cross")
n_emb = model.num_params("wte") + model.num_params("wpe")
# forward and backward: 6 a weight, of which a token of encdec meets about half, and what attention adds
weights = n_params - n_emb * (cfg.arch == "encoder")
flops_per_token = 6 * weights / len(tokens_per_row)
flops_per_token += 12 * cfg.n_embd * tokens_per_row[-1] * sum(c.mixer == "attention" for c in layers)
kind = f"{cfg.arch}, {cfg.mixer}"
if cfg.arch == "encdec":
    kind += f", cross {','.join(sorted(crosses))}" + " (auto)" * (cfg.cross == "auto")
sizes = ", ".join(f"{len(data):,} {split}" for split, data in splits.items())
cut = ", ".join(f"{data.cut:,} of {len(data):,} {split}" for split, data in splits.items() if data.cut)
say(f"device       {device} ({machine}), {world} process{'es' * (world > 1)}")
if begun != "auto":
    where = "as" if begun == args.device else f"{begun} is not there, where"
    say(f"             {where} this run began")
say(f"dtype        {dtype}, compile {'on' if compiled else 'off'} ({why})")
say(f"data         {cfg.dataset}: {sizes} rows, vocabulary {cfg.vocab_size:,}, block {T_max}")
if cut:
    say(f"             rows longer than --block_size={T_max}, cut: {cut}")
say(f"model        {kind}: {n_params:,} parameters ({n_mix:,} in mixers, {n_emb:,} in embeddings)")
for group, name in zip(optimizer.param_groups, ("decay", "no decay")):
    n = sum(q.numel() for q in group["params"])
    say(f"optimiser    {name}: {len(group['params'])} tensors, {n:,} parameters")
say(f"step         {cfg.batch_size} rows * {cfg.gradient_accumulation_steps} = {step_rows} rows, about "
    f"{tokens_per_step:,} tokens, {flops_per_token / 1e6:.1f} MFLOP a token")

# ---- evaluation
METRIC = {"exact": "exact match", "bleu": "BLEU", "bpb": "bits per byte", "acc": "accuracy"}[meta["metric"]]
caught, compiling = [], False  # signals

def on_signal(number, frame=None):
    if compiling:  # for minutes perhaps, of which a scheduler grants seconds
        say(f"stopped while compiling: --resume goes on from step {launched}", to="stderr")
        os._exit(128 + number)
    if caught and world == 1:  # the second Ctrl-C means now; torchrun sends several
        sys.exit(128 + number)
    caught.append(number)

def heed(stopping=False):
    """Where a signal came and all is saved: exit with its number, on which a scheduler can start anew. An
    evaluation is not waited for, as it can be repeated."""
    if caught or stopping:
        number = caught[0] if caught else signal.SIGTERM
        stop(f"stopped after step {iter_num}, saved: go on with --resume", 128 + number)

@torch.compiler.set_stance("force_eager")  # what runs seldom, or at a length that grows, is not compiled
@torch.no_grad()
def evaluate(data, limit):
    """The first rows of a split, the same each time, shared by all processes -> loss (mean per target),
    accuracy (of the likeliest answers), groups (the same by group), and of row labels the mean over classes
    of auc and f1."""
    model.eval()
    n_groups = 1 if data.groups is None else int(data.groups.max()) + 1
    total = 0.0
    right, asked = np.zeros(n_groups), np.zeros(n_groups)
    probs, answers = [], []
    mine = data.first(limit)[rank::world]
    for start in range(0, len(mine), cfg.batch_size):
        heed()
        rows = mine[start:start + cfg.batch_size]
        tensors, n = data.batch(rows)
        targets = tensors[1]
        with autocast:
            logits, loss = model(*to_device(tensors))
        total += loss.item() * n
        counted = targets >= 0 if labels else targets != PAD
        hit = (logits.argmax(-1).cpu() == targets)[counted]
        group = torch.zeros_like(targets) if data.groups is None else data.beside(rows, data.groups)
        right += np.bincount(group[counted], hit, n_groups)
        asked += np.bincount(group[counted], minlength=n_groups)
        if labels == "row":
            probs += list(logits.float().softmax(-1).cpu().numpy())
            answers += targets.tolist()
    model.train()
    total, *counts = total_over_ranks(total, *right, *asked)
    right, asked = counts[:n_groups], counts[n_groups:]
    found = dict(loss=total / sum(asked), accuracy=sum(right) / sum(asked))
    if data.groups is not None:
        found["groups"] = {g: right[g] / asked[g] for g in range(n_groups) if asked[g]}
    if labels == "row":
        probs, answers = np.array(from_all_ranks(probs)), np.array(from_all_ranks(answers))
        classes = range(probs.shape[1])[-1:] if probs.shape[1] == 2 else range(probs.shape[1])
        aucs = [roc_auc(probs[:, c], answers == c) for c in classes if len(set(answers == c)) == 2]
        found["f1"] = macro_f1(probs.argmax(1), answers)
        found["auc"] = sum(aucs) / len(aucs) if aucs else None
    if meta["metric"] == "bleu" and (found["loss"] < math.log(3.5) or found["accuracy"] > 0.75):
        say(f"warning: perplexity {math.exp(found['loss']):.2f}, token accuracy {found['accuracy']:.2f}: on "
            "real text this is a leak (a mixer that sees its own label, test rows in training)")
    return found

@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def score(split, found, limit, beam=1, T=T_max):
    """The task's own metric: bits per byte or accuracy, which evaluate found, or exact match or BLEU of text
    that the model decodes here."""
    if meta["metric"] == "bpb":
        return found["loss"] / math.log(2) * meta["splits"][split]["tokens"] / meta["bytes"][split]
    if meta["metric"] == "acc":
        return found["accuracy"]
    src, tgt = (read_lines(os.path.join(folder, f"{split}.{side}.txt"))[:limit] for side in ("src", "tgt"))
    model.eval()
    with autocast:
        mine, _ = translate(model, tokenizer, src[rank::world], beam, batch_size=max(1, 256 // beam),
                            block_size=T, heed=heed)
    model.train()
    answers = from_all_ranks(mine)
    result, signature = marks(meta, answers, tgt)
    if signature and limit >= meta["splits"][split]["rows"]:
        say(f"sacreBLEU signature: {signature}")
        found["lowercased"], _ = marks(meta, answers, tgt, lowercase=True)
        write(f"{out}/{split}.hyp.txt", lambda f: f.writelines(line + "\n" for line in answers))
    return result

# ---- checkpoints and log
LOGGED = ("step", "loss", "norm", "lr", "skipped", "val_loss", "val_metric", "nll")

def write(path, into, mode="w"):
    """Only rank 0 writes, and what it writes is all there or not there."""
    if master:
        with writing(path), replacing(path, mode) as f:
            into(f)

def log(**row):
    """One line of log.csv; nothing in it depends on the clock, so that two equal runs write equal files."""
    if master:
        with writing(log_path), open(log_path, "a", newline="") as f:
            csv.writer(f).writerow([row.get(name, "") for name in LOGGED])

def save(evaluated, best=False):
    state = dict(format=FORMAT, model=model.state_dict(), model_args=dataclasses.asdict(model_cfg), meta=meta,
                 iter_num=iter_num, best_loss=best_loss)
    if best:
        write(best_path, lambda f: torch.save(state, f), "wb")
    if evaluated and cfg.average:
        write(f"{out}/weights-{iter_num:08d}.pt", lambda f: torch.save(state, f), "wb")
        if master:
            for older in kept_weights()[:-cfg.average]:
                os.remove(older)
    last = dict(state, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), config=settings,
                evaluated=evaluated, skipped=skipped, in_a_row=in_a_row, sums=sums.tolist(),
                seconds=seconds + time.time() - t_start, log_bytes=os.path.getsize(log_path) if master else 0)
    write(ckpt_path, lambda f: torch.save(last, f), "wb")

def kept_weights():
    """The files that --average takes the mean of: the weights at each of this run's last evaluations."""
    names = sorted(name for name in os.listdir(out) if name.startswith("weights-"))
    return [os.path.join(out, name) for name in names if name <= f"weights-{iter_num:08d}.pt"]

def average():
    """Take the mean of the kept weights, as arXiv 1706.03762, section 6.1; it is left in average.pt."""
    paths = kept_weights()
    if not paths:
        stop(f"{out} has no weights of earlier evaluations to average: leave out --average", 2)
    states = [load_checkpoint(path) for path in paths]
    weights = [state["model"] for state in states]
    mean = {name: sum(w[name].double() for w in weights) / len(weights) for name in weights[0]}
    model.load_state_dict(mean)
    last = dict(states[-1], model=model.state_dict())
    write(f"{out}/average.pt", lambda f: torch.save(last, f), "wb")
    say(f"average      of the weights at {len(paths)} evaluations, in {out}/average.pt")

had = ckpt["config"] if ckpt else settings
changed = [f"{k}={v} was {had.get(k)}" for k, v in settings.items() if v != had.get(k) and k != "resume"]
if master:
    with writing(out):
        if not ckpt and (os.path.exists(ckpt_path) or os.path.exists(best_path)):
            n = next(n for n in range(1, 10**6) if not os.path.exists(f"{out}.{n}"))
            os.rename(out, f"{out}.{n}")
            say(f"{out} held an earlier run: moved to {out}.{n} (to go on with a run instead, say --resume)")
            owner = own()  # of the new folder, as the lock has moved too
        copies = (3 if ckpt else 7) + cfg.average  # ckpt.pt has two moments; at first best.pt, ckpt.pt twice
        megabytes = copies * sum(v.nbytes for v in model.state_dict().values()) / 1e6
        disk = shutil.disk_usage(out)
        if disk.total and disk.free < 1e6 * megabytes:  # some disks say 0 of 0
            stop(f"{out} has room for {disk.free / 1e6:,.0f} MB, the checkpoints need {megabytes:,.0f} MB: "
                 "make room, or take another --out_dir")
        if ckpt and os.path.exists(log_path) and os.path.getsize(log_path) >= ckpt["log_bytes"]:
            os.truncate(log_path, ckpt["log_bytes"])  # what was logged after the checkpoint happens again
        else:
            if ckpt and os.path.exists(log_path):
                os.rename(log_path, f"{out}/log.{iter_num:05d}.csv")
                say(f"{log_path} has lost lines: kept as log.{iter_num:05d}.csv, a new one begins")
            with open(log_path, "w", newline="") as f:
                csv.writer(f).writerow(LOGGED)
        earlier = f"{out}/config.{iter_num:05d}.json"
        if changed and os.path.exists(f"{out}/config.json") and not os.path.exists(earlier):
            os.rename(f"{out}/config.json", earlier)  # what held up to this step
        write(f"{out}/config.json", lambda f: json.dump(settings, f, indent=1))
say(" ".join(f"{k}={v}" for k, v in settings.items() if v != p.defaults.get(k)))
if changed:
    say(f"changed from step {iter_num} on: {', '.join(changed)}")

# ---- the loop
PATIENCE = 25  # steps that may fail in a row; float16 may need 16
t_start = t_told = time.time()
told = iter_num  # up to this step
drawing = master

def step_of():
    return f"step {iter_num:05d}/{cfg.max_iters:05d}"

def get_lr(it):
    """Linear warm-up, then cosine to min_lr at max_iters."""
    low = cfg.learning_rate / 20 if cfg.min_lr is None else cfg.min_lr
    if it < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / (cfg.warmup_iters + 1)
    ratio = (it - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)
    return low + 0.5 * (1 + math.cos(math.pi * min(1.0, ratio))) * (cfg.learning_rate - low)

def passes(batches, size):
    """Forward and backward of this process's part of a step, which has size times an average step's targets
    -> its loss, and the same without smoothing."""
    loss_sum = nll_sum = 0.0
    for i, (tensors, share) in enumerate(batches):
        if world > 1:
            net.require_backward_grad_sync = i == len(batches) - 1
        with autocast:
            logits, loss = net(*tensors)
        loss = nll = loss * share  # shares add up to 1 over all passes of all processes
        scaler.scale(loss * size * world).backward()  # DDP averages, the step sums
        if cfg.label_smoothing:
            targets = tensors[1]
            if cfg.arch != "encoder":
                targets = targets.masked_fill(targets == PAD, -1)
            flat = logits.detach().flatten(0, -2).float()
            nll = share * F.cross_entropy(flat, targets.flatten(), ignore_index=-1)
        loss_sum = loss_sum + loss.detach()
        nll_sum = nll_sum + nll.detach()
    return loss_sum, nll_sum

def compile_now():
    """Compile, on the lengths of ten steps, and say from which step on that pays. Nothing is learned."""
    global compiling
    heed()
    compiling = True
    taken = dict(default=[], force_eager=[])
    for stance, seconds in taken.items():
        for step in range(iter_num, iter_num + 10):
            part = micro_batches(step)
            began = time.time()
            with torch.compiler.set_stance(stance):
                passes(*part)[0].item()
            seconds.append(time.time() - began)
    optimizer.zero_grad(set_to_none=True)
    compiling = False
    fast, slow = np.median(taken["default"]), np.median(taken["force_eager"])
    cost = sum(taken["default"]) - 10 * fast
    pays = iter_num + cost / (slow - fast) if fast < slow else math.inf
    advice = f"it pays from step {pays:.0f} on" if pays < cfg.max_iters else "--compile=False is faster here"
    say(f"compiled in {cost:.1f} s; a step {fast * 1e3:.1f} ms, uncompiled {slow * 1e3:.1f} ms: {advice}")

def validate():
    """Loss and metric on val, into log.csv, checkpoints and a picture."""
    global best_loss, best_iter, drawing
    save(evaluated=False)  # an evaluation may take longer than a scheduler waits
    found = evaluate(splits["val"], cfg.eval_rows)
    metric = score("val", found, cfg.metric_rows)
    best = found["loss"] < best_loss
    if best:
        best_loss, best_iter = found["loss"], iter_num
    say(f"{step_of()} | val loss {found['loss']:.4f} | val {METRIC} {metric:.4f}{' | best' * best}")
    log(step=iter_num, val_loss=found["loss"], val_metric=metric)
    save(evaluated=True, best=best)
    if drawing:
        try:
            draw_curves([out], os.path.join(out, "curve.png"))
        except (Exception, SystemExit) as e:  # a picture ends no training
            drawing = False
            say(f"curve.png is not drawn ({one_line(e)})")
    if world > 1:
        dist.barrier(group=patient)  # what the master writes and draws has no limit of time either

def tell(norm, lr):
    """A line of log.csv and of the screen, with the means since the line before."""
    global told, t_told
    loss, nll = sums[:2] / sums[2] if sums[2] else (math.nan, math.nan)
    log(step=iter_num, loss=loss, norm=norm, lr=lr, skipped=skipped, nll=nll)
    sums[:] = 0
    dt = (time.time() - t_told) / (iter_num + 1 - told)
    told, t_told = iter_num + 1, time.time()
    speed = f"{dt * 1e3:.1f} ms | {tokens_per_step / dt:,.0f} tok/s"
    if peak:
        speed += f" | mfu {flops_per_token * tokens_per_step / dt / (peak * world):.1%}"
    eta = f"eta {dt * (cfg.max_iters - iter_num) / 60:.1f}m" + f" | skipped {skipped}" * (skipped > 0)
    say(f"{step_of()} | loss {loss:.4f} | norm {norm:.2f} | lr {lr:.1e} | {speed} | {eta}")

signal.signal(signal.SIGINT, on_signal)
signal.signal(signal.SIGTERM, on_signal)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup ignores
    signal.signal(signal.SIGHUP, on_signal)
model.train()
batches, size = micro_batches(iter_num)
while True:
    at_end = iter_num >= cfg.max_iters
    if (iter_num % cfg.eval_interval == 0 or at_end) and not evaluated:
        validate()
        told, t_told = iter_num, time.time()
    evaluated = False
    if cfg.patience and iter_num - best_iter >= cfg.patience * cfg.eval_interval:
        say(f"{step_of()} | no lower validation loss in {cfg.patience} evaluations: the end")
        at_end = True
    if at_end:
        break
    if compiled and iter_num == launched:
        compile_now()
        t_told = time.time()

    torch.manual_seed(hash((cfg.seed, iter_num, rank)) % 2**31)  # dropout, too, can be repeated
    lr = get_lr(iter_num)
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss, nll = passes(batches, size)
    batches, size = micro_batches(iter_num + 1)  # while the GPU is still busy
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
    mine = loss.item(), nll.item(), norm.item() / world, len(caught)
    loss, nll, norm, stopping = total_over_ranks(*mine)
    if math.isfinite(loss + norm):
        scaler.step(optimizer)
        in_a_row = 0
        sums += loss, nll, 1
    else:  # this step is left out
        skipped += 1
        in_a_row += 1
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if in_a_row == PATIENCE:
        stop(f"loss or gradient was not finite {PATIENCE} steps in a row, up to step {iter_num}: lower "
             "--learning_rate, raise --warmup_iters or take --dtype=float32; then --resume")
    if iter_num % cfg.log_interval == 0:
        tell(norm, lr)
    iter_num += 1
    if stopping:
        save(evaluated=False)
        if world > 1:
            dist.barrier()  # torchrun stops all when the first one ends
        heed(stopping)

# ---- the test set, once, with the checkpoint that validation chose
seconds += time.time() - t_start
if world > 1:
    dist.barrier()
if cfg.average:
    average()
    best_loss = evaluate(splits["val"], cfg.eval_rows)["loss"]
else:
    model.load_state_dict(load_checkpoint(best_path, device)["model"])

def test(split, data, T):
    """All of a split at up to T tokens a row -> what was found; says it."""
    found = evaluate(data, 10**9)
    metric = score(split, found, 10**9, cfg.beam, T)
    trivial = meta["splits"][split]["trivial"]
    where = split if T == T_max else f"{split} at up to {T} tokens (trained at {T_max})"
    known = ", ".join(f"{name} {value:.3f}" for name, value in trivial.items())
    say(f"{where} loss {found['loss']:.4f} | {split} {METRIC} {metric:.4f} (n={len(data)}) | trivial {known}")
    if cfg.arch == "encdec":
        say(f"{where} perplexity {math.exp(found['loss']):.3f}, token accuracy {found['accuracy']:.4f}, "
            "given the true tokens before each")
    if labels == "row":
        auc = "none, one class only" if found["auc"] is None else f"{found['auc']:.4f}"
        say(f"{where} AUC {auc}, macro F1 {found['f1']:.4f}")
    if "groups" in found:
        groups = ", ".join(f"{g}: {v:.3f}" for g, v in found["groups"].items())
        say(f"{where} accuracy by {meta['groups']}: {groups}")
    return dict(found, split=split, block_size=T, metric=metric, n=len(data), trivial=trivial)

say(f"{iter_num} steps in {seconds / 60:.1f} minutes")
found = test("test", splits["test"], T_max)
data = {name: int(np.sum(meta["splits"]["train"][name])) for name in ("rows", "tokens")}
result = dict(params=n_params, steps=iter_num, seconds=round(seconds, 1), val_loss=best_loss,
              test_loss=found["loss"], test_metric=found["metric"], metric=METRIC, n=found["n"],
              trivial=found["trivial"], test=found, data=dict(data, seconds=meta["seconds"]),
              far=[test(far, data, T) for T, data in beyond.items()])
write(os.path.join(out, "result.json"), lambda f: json.dump(result, f, indent=1))
if world > 1:
    dist.destroy_process_group()
