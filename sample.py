"""
Use a trained checkpoint: an encoder-decoder translates, a decoder continues text, an encoder classifies.

    python sample.py --start="four hundred and twenty-one"
    python sample.py --out_dir=out --input=test.en --output=test.de --beam=4
    python sample.py --out_dir=out-text --start=FILE:prompt.txt --top_k=50
    python sample.py --out_dir=out --score=test.en,test.de --beam=4    # or --score=FILE: perplexity of a text
    python sample.py --show=wavelets          # what the wavelet layers have learned, as a table and a PNG
    python sample.py --show=source --start="ninety-one"     # and what each output token has read

A checkpoint carries its tokenizer, so nothing else is needed; one that was trained on a GPU runs on a CPU.
"""

import argparse
import ctypes
import importlib.machinery
import importlib.util
import math
import os
import signal
import sys
import zipfile
from contextlib import contextmanager
from itertools import chain

import numpy as np
import torch
from torch.utils._pytree import tree_map
from tqdm import tqdm

from model import CrossAttention, Haar, ModelConfig, Wavelet, WaveletTransformer, Wavspa, Wersa
from prepare_data import BOS, EOS, N_SPECIAL, PAD, Parser, Tokenizer, collate, first_gap, need, plain
from prepare_data import read_text, replacing, writable

FORMAT = 2  # of ckpt.pt and best.pt
KINDS = dict(model=dict, model_args=dict, meta=dict, iter_num=int, best_loss=float)

def load_checkpoint(path, device="cpu", kinds=KINDS):
    """ckpt.pt or best.pt -> dict of tensors and plain types. Nothing in it runs, no changed bit passes."""
    try:
        with zipfile.ZipFile(path) as z:
            if z.testzip() is not None:  # torch writes checksums, but does not read them
                raise ValueError
        ckpt = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"{path} does not exist: train first (python train.py), or name its --out_dir")
    except Exception:  # a broken pickle can fail in any way it likes
        raise SystemExit(f"{path} is damaged or not a checkpoint of train.py: restore a copy, or train again")
    number = ckpt.get("format") if isinstance(ckpt, dict) else None
    if number != FORMAT or not all(isinstance(ckpt.get(name), kind) for name, kind in kinds.items()):
        raise SystemExit(f"{path} is not a checkpoint of this train.py, format {FORMAT} (format 1 is that of "
                         "the first edition, commit 9d7600d): train again")
    return ckpt

def register(path):
    """Run a Python file that adds classes to model.MIXERS. Only ever one whose path the user has typed."""
    loader = importlib.machinery.SourceFileLoader("mixers_from", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("mixers_from", loader))
    sys.modules["mixers_from"] = module
    try:
        loader.exec_module(module)
    except Exception as e:  # whatever is wrong in it
        raise SystemExit(f"--mixers_from={path} cannot be imported ({type(e).__name__}: {one_line(e)})")

def one_line(e):
    return " ".join(str(e).split())[:150]

def build(path, ckpt, cfg=None):
    """The model of a checkpoint, its weights loaded; shapes are compared before anything large is made."""
    try:
        cfg = cfg or ModelConfig(**ckpt["model_args"])
        with torch.device("meta"):
            wanted = WaveletTransformer(cfg).state_dict()
        shapes = {name: v.shape for name, v in wanted.items()}
        if shapes != {name: v.shape for name, v in ckpt["model"].items()}:
            raise ValueError("its weights are another model's than its settings name")
        model = WaveletTransformer(cfg)
        model.load_state_dict(ckpt["model"])
    except (TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise SystemExit(f"{path} does not fit this model.py ({one_line(e)}): name the file of its mixers "
                         "with --mixers_from, or train again")
    return model

def load_model(path, device="cpu"):
    """-> model in eval mode, tokenizer, the data set's meta."""
    ckpt = load_checkpoint(path, device)
    model, meta = build(path, ckpt), ckpt["meta"]
    try:
        tokenizer = Tokenizer(meta["tokenizer"])
        n_classes = len(meta["classes"]) if model.config.arch == "encoder" else model.config.n_classes
        if (tokenizer.vocab_size, n_classes) != (model.config.vocab_size, model.config.n_classes):
            raise ValueError
    except Exception:  # whatever a stranger writes there
        raise SystemExit(f"{path} has a tokenizer that is not its model's: restore a copy, or train again")
    return model.to(device).eval(), tokenizer, meta

def keep_freed_pages(keep=True):
    """On a CPU each step asks for the same sizes; pages that went back to the kernel cost it a tenth. Without
    keep they go at once, so that a process's peak is what its tensors take."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *a: 0)
        mallopt(-3, 2**25 if keep else 2**16)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**30 if keep else 2**16)  # M_TRIM_THRESHOLD

def compile_blocks(model):
    """torch.compile, block by block: one graph for all lengths, and for all blocks that are alike."""
    torch._dynamo.config.cache_size_limit = 64  # kinds of blocks, which a hybrid has many of
    for block in [*getattr(model, "encoder", ()), *getattr(model, "decoder", ())]:
        block.compile(dynamic=True)

def there(name):
    """A --device that this machine has, or an error that argparse shows."""
    try:
        torch.empty(0, device=name)
        return name
    except (RuntimeError, AssertionError, ValueError):
        raise argparse.ArgumentTypeError(f"{name} is not there; cpu is")

def draw(logits, temperature=0.0, top_k=None, top_p=1.0):
    """logits (B, V) -> ids (B,): the likeliest, or one drawn among the top_k likeliest and the nucleus, the
    fewest whose probabilities add up to top_p (arXiv 1904.09751)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / max(temperature, 1e-6)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    prob = logits.softmax(-1)
    if top_p < 1:
        ranked, ids = prob.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked
        prob = prob.scatter(-1, ids, ranked.masked_fill(before >= top_p, 0.0))
    return torch.multinomial(prob, 1)[:, 0]

@torch.no_grad()
def continued(model, ids, max_new_tokens, src=None, **how):
    """ids (B, T) -> the token after them (B, 1), the one after that, ... as soon as each is there."""
    state = model.init_state(len(ids), src)
    for _ in range(max_new_tokens):
        logits, state = model.decode(ids, state)
        ids = draw(logits[:, -1], **how)[:, None]
        yield ids

def reorder(state, rows):
    """Pick rows (n,) of every tensor in a state: what a beam search does to its hypotheses."""
    return tree_map(lambda u: u.index_select(0, rows) if torch.is_tensor(u) else u, state)

@torch.no_grad()
def beam_search(model, src, bos_id, eos_id, max_new_tokens, beam=4, length_penalty=0.6):
    """src (B,S) -> the best hypothesis of each row (B, <= max_new_tokens), without bos, padded after its eos.
    Scores are log p / ((5 + length) / 6)^length_penalty (arXiv 1609.08144, eq. 14)."""
    if beam < 1:
        raise ValueError(f"--beam={beam} must be at least 1")
    B, device, was_training = src.size(0), src.device, model.training
    first = beam * torch.arange(B, device=device)  # where each row's beams begin
    model.eval()
    try:
        state = reorder(model.init_state(B, src), torch.arange(B, device=device).repeat_interleave(beam))
        ids = torch.full((B * beam, 1), bos_id, device=device)
        score = torch.tensor([0.0] + [-math.inf] * (beam - 1), device=device).repeat(B)  # one live beam
        length = torch.zeros(B * beam, device=device)
        ended = torch.zeros(B * beam, dtype=torch.bool, device=device)
        for _ in range(max_new_tokens):
            logits, state = model.decode(ids[:, -1:], state)
            logp = logits[:, -1].float().log_softmax(-1)  # (B beam, V)
            V = logp.size(-1)
            free = torch.full((V,), -math.inf, device=device)  # an ended beam goes on at no cost
            free[model.config.pad_id] = 0.0
            total = score[:, None] + torch.where(ended[:, None], free, logp)
            length = length + ~ended
            normed = total / ((5 + length[:, None]) / 6) ** length_penalty
            best = normed.view(B, -1).topk(beam).indices  # (B, beam), among beam * V
            rows = (first[:, None] + best // V).flatten()
            new = (best % V).flatten()
            score, length = total[rows, new], length[rows]
            ended = ended[rows] | (new == eos_id)
            ids = torch.cat((ids[rows], new[:, None]), 1)
            state = dict(state, mixers=reorder(state["mixers"], rows))  # the beams of a row share its source
            if ended.all():
                break
    finally:
        model.train(was_training)
    return ids[first, 1:]  # topk puts the best of each row first

def answers(model, src, max_new_tokens, beam=1, length_penalty=0.6, **how):
    """src (B, S) -> a list of ids for each row, without eos."""
    if beam > 1:
        ids = beam_search(model, src, BOS, EOS, max_new_tokens, beam, length_penalty)
    else:
        begin, new, ended = torch.full_like(src[:, :1], BOS), [], False
        for ids in continued(model, begin, max_new_tokens, src, **how):
            new.append(ids)
            ended = ended | (ids == EOS)
            if ended.all():
                break
        ids = torch.cat(new, 1)
    return [row[:row.index(EOS)] if EOS in row else row for row in ids.tolist()]

def translate(model, tokenizer, texts, beam=1, batch_size=128, max_new_tokens=None, progress=False,
              block_size=None, heed=lambda: None, **how):
    """One string per text, in the order given, and how many were cut to block_size. Empty in, empty out.
    heed is called before each batch, and may raise."""
    block_size = block_size or model.config.block_size
    rows = [tokenizer.encode(plain(text)) for text in texts]
    cut = sum(len(row) > block_size - 1 for row in rows)
    out = [""] * len(texts)
    # alike lengths share a batch, and the longest come first, so that too little memory shows at once
    todo = sorted((i for i, row in enumerate(rows) if row), key=lambda i: -min(len(rows[i]), block_size - 1))
    for start in tqdm(range(0, len(todo), batch_size), disable=not progress or not todo, unit="batch"):
        heed()
        batch = todo[start:start + batch_size]
        src = collate([rows[i][:block_size - 1] for i in batch], tail=[EOS], most=block_size)
        src = src.to(model.wte.weight.device)
        for i, ids in zip(batch, answers(model, src, max_new_tokens or block_size, beam, **how)):
            out[i] = tokenizer.decode(ids)
    return out, cut

def say(tokenizer, stream):
    """Print ids as they come; the bytes of a character wait until it is whole."""
    held, between = [], ""
    for i in stream:
        held.append(i)
        text = tokenizer.decode(held)
        if text and not text.endswith("\ufffd"):
            print(between + text, end="", flush=True)
            held, between = [], " " if tokenizer.words else ""
    print(tokenizer.decode(held))

def classify(model, tokenizer, meta, texts, batch_size):
    """One line per text, its class and how likely that is, or the label of each token that is asked; and how
    many texts were cut."""
    most, results = model.config.block_size, []
    if "image" in meta:
        rows = [read_image(text, meta["image"]) for text in texts]
    else:
        rows = [tokenizer.encode(plain(text)) for text in texts]
    for start in range(0, len(rows), batch_size):
        batch = [row[:most] or [EOS] for row in rows[start:start + batch_size]]
        with torch.no_grad():
            logits, _ = model(collate(batch, most=most).to(model.wte.weight.device))
        for row, prob in zip(batch, logits.softmax(-1)):
            best = [meta["classes"][c] for c in prob.argmax(-1).view(-1)]
            if model.config.pool == "token":
                asked = range(0, len(row), meta["asked_every"])
                results.append(" ".join(f"{tokenizer.decode([row[t]])}={best[t]}" for t in asked))
            else:
                results.append(f"{best[0]}\t{prob.max():.3f}")
    return results, sum(len(row) > most for row in rows)

def read_image(name, shape):
    """FILE:x.png -> the ids of its grey pixels, line by line."""
    import matplotlib.image
    name = name.removeprefix("FILE:")
    try:
        pixels = matplotlib.image.imread(name)
    except Exception as e:  # as many as there are formats
        raise SystemExit(f"{name} cannot be read as an image ({e}): this checkpoint takes --start=FILE:x.png")
    pixels = pixels * 255.0 if pixels.dtype == np.float32 else pixels.astype(float)
    grey = pixels if pixels.ndim == 2 else pixels[..., :3] @ [0.299, 0.587, 0.114]
    if list(grey.shape) != shape:
        (h, w), (H, W) = grey.shape, shape
        raise SystemExit(f"{name} has {w} x {h} pixels, the checkpoint reads {W} x {H}: scale it first")
    return (grey.round().astype(int).ravel() + N_SPECIAL).tolist()

@contextmanager
def writing(path, mode="w"):
    try:
        with replacing(path, mode) as f:
            yield f
    except OSError as e:
        raise SystemExit(f"{path} cannot be written: {e.strerror}")

def save(figure, path, dpi):
    with writing(path, "wb") as f:
        figure.savefig(f, dpi=dpi, format="png")
    print(f"drawn to {path}")

@torch.no_grad()
def show_wavelets(model, path):
    """What the wavelet layers have learned, printed and drawn, by level: how far the taps are from the named
    wavelet's, and the band's weight (haar), embedding (wavspa) or the gain's scale (wersa), all RMS."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4), layout="constrained")
    moves, weights = figure.subplots(1, 2)
    moves.set(title="distance from the named wavelet's taps (RMS)", xlabel="level")
    weights.set(title="weight of the band (RMS)", xlabel="level")
    start = torch.stack(Wavelet(model.config.wavelet).filters(0))  # (2, F, 1)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (Haar, Wavspa, Wersa)) and m.L}
    if not layers:
        raise SystemExit(f"--show=wavelets: this model of --mixer={model.config.mixer} has no wavelets")
    for name, m in layers.items():
        if isinstance(m, Haar):
            bands = m.weight.flatten(1)
        else:
            bands = m.band.flip(0) if isinstance(m, Wavspa) else m.scale.T.flip(0)
        weight = bands.square().mean(1).sqrt().tolist()  # d_1, ..., d_L, a_L
        moved = []
        x = torch.randn(1, 64, m.wavelet.C, device=bands.device)
        error = ""
        if not isinstance(m, Haar):  # which never goes back
            error = f", reconstruction error {(m.wavelet.idwt(m.wavelet.dwt(x)) - x).abs().max():.1e}"
        print(f"{name}: {type(m).__name__}, {m.wavelet.learned} {model.config.wavelet}{error}\n"
              "  level   moved  weight  mean low-pass | high-pass")
        for l in range(m.L):
            taps = torch.stack(m.wavelet.filters(l)).cpu()  # (2, F, C)
            moved.append((taps - start).square().mean().sqrt().item())
            low, high = (" ".join(f"{tap:.3f}" for tap in h) for h in taps.mean(-1))
            print(f"  {l + 1:5d} {moved[l]:7.3f} {weight[l]:7.3f}  {low} | {high}")
        print(f"    a_L         {weight[-1]:7.3f}")
        moves.plot(range(1, m.L + 1), moved, marker="o")
        weights.plot(range(1, m.L + 1), weight[:-1], marker="o", label=name)
    weights.legend(fontsize=7)
    save(figure, path, dpi=120)

def marks(meta, answers, wanted, lowercase=False):
    """What answers score against what was wanted, by the data set's metric, and sacreBLEU's signature."""
    if meta["metric"] == "exact":
        return sum(a == b for a, b in zip(answers, wanted)) / len(wanted), ""
    tokenize = meta.get("bleu_tokenizer", "13a")
    bleu = need("sacrebleu").metrics.BLEU(tokenize=tokenize, lowercase=lowercase)
    return bleu.corpus_score(answers, [wanted]).score, str(bleu.get_signature())

@torch.no_grad()
def likelihood(model, rows, batch_size):
    """Rows of ids (read, predicted) or (read, predicted, source) -> a line of what train.py's evaluation
    finds, and the mean loss."""
    total = np.zeros(3)
    for start in tqdm(range(0, len(rows), batch_size), unit="batch"):
        sides = zip(*rows[start:start + batch_size])
        tensors = [collate(side, most=model.config.block_size) for side in sides]
        logits, loss = model(*(tensor.to(model.wte.weight.device) for tensor in tensors))
        targets = tensors[1]
        asked = targets != PAD
        n = asked.sum().item()
        total += loss.item() * n, (logits.argmax(-1).cpu() == targets)[asked].sum().item(), n
    n = int(total[2])
    loss, accuracy = total[:2] / n
    return f"loss {loss:.4f}, perplexity {math.exp(loss):.3f}, token accuracy {accuracy:.4f} (n={n})", loss

def score(model, tokenizer, meta, names, batch_size, n, **beams):
    """What a decoder's text, or answers to the first file's lines held against the second's, score: lines to
    print, how many texts there were, and how many of them were cut."""
    T, arch = model.config.block_size, model.config.arch
    files = names.split(",")
    takes = "FILE" if arch == "decoder" else "FILE,FILE of lines that belong together"
    if len(files) != len(takes.split(",")) or "image" in meta or meta.get("labels") == "token":
        raise SystemExit(f"--score={names} does not suit this checkpoint: --score={takes} is for texts")
    if arch == "decoder":
        text = read_text(names)
        ids = tokenizer.encode(text)
        if len(ids) < 2:
            raise SystemExit(f"{names} has {len(ids)} tokens, and the first one is not predicted: add some")
        windows = [ids[t:t + T + 1] for t in range(0, len(ids) - 1, T)]
        line, loss = likelihood(model, [(row[:-1], row[1:]) for row in windows], batch_size)
        bits = loss / math.log(2) * len(ids) / len(text.encode())
        return [f"{line}, bits per byte {bits:.4f}"], 1, 0
    texts, wanted = ([plain(line) for line in read_lines(name)] for name in files)
    if not texts:
        raise SystemExit(f"{files[0]} is empty")
    if len(texts) != len(wanted):
        raise SystemExit(f"{files[0]} has {len(texts)} lines and {files[1]} has {len(wanted)}: they seem to "
                         f"part near line {first_gap(texts, wanted) + 1}")
    if arch == "encoder":
        answers, cut = classify(model, tokenizer, meta, texts, batch_size)
        hits = [answer.rsplit("\t", 1)[0] == label for answer, label in zip(answers, wanted)]
        return [f"accuracy {np.mean(hits):.4f} (n={len(hits)})"], len(texts), cut
    sides = [[tokenizer.encode(line) for line in lines] for lines in (texts, wanted)]
    cut = sum(max(len(src), len(tgt)) > T - 1 for src, tgt in zip(*sides))
    rows = [([BOS] + tgt[:T - 1], tgt[:T - 1] + [EOS], src[:T - 1] + [EOS]) for src, tgt in zip(*sides)]
    line, _ = likelihood(model, rows, batch_size)
    answers, _ = translate(model, tokenizer, texts, batch_size=batch_size, max_new_tokens=n, progress=True,
                           **beams)
    value, signature = marks(meta, answers, wanted)
    name = "exact match" if meta["metric"] == "exact" else "BLEU"
    return [f"{line}, given the true tokens before each",
            f"{name} {value:.4f} (n={len(answers)}) {signature}".strip()], len(texts), cut

def read_lines(path):
    lines = read_text(path).replace("\r\n", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]  # the last line's own line end

def source_shares(model, src, new):
    """src (1, S), the ids that answer it -> {what: (T, S)}, how much each output token read of each source
    token: gradient x input (arXiv 1312.6034) of its logit, which sees through any cross and mixer; and where
    every cross is plain attention, its weights."""
    embedded, queries = [], []
    hooks = [model.wte.register_forward_hook(lambda module, args, x: embedded.append(x))]
    for block in model.decoder:
        hooks.append(block.ln_x.register_forward_hook(lambda module, args, x: queries.append(x)))
    logits, _ = model(torch.tensor([[BOS] + new[:-1]], device=src.device), src=src)
    for hook in hooks:
        hook.remove()
    x, rows = embedded[-1], []  # forward embeds what was answered, then the source
    for t, i in enumerate(new):
        gradient, = torch.autograd.grad(logits[0, t, i], x, retain_graph=True)
        rows.append((gradient * x).sum(-1)[0].abs())
    share = torch.stack(rows).detach()
    found = {"share of |gradient x input|": share / share.sum(1, keepdim=True).clamp(min=1e-30)}
    crosses = [block.cross for block in model.decoder]
    if all(type(cross) is CrossAttention for cross in crosses):
        weights = []
        with torch.no_grad():
            for cross, x, (k, _, _) in zip(crosses, queries, model.digest(src)):
                q = cross.placed(cross.heads(cross.c_q(x)), 0, cross.ratio)
                weights.append((q @ k.mT / math.sqrt(q.size(-1))).softmax(-1).mean((0, 1)))  # over heads
        found["cross-attention, mean of heads and layers"] = torch.stack(weights).mean(0)
    return found

def show_source(model, tokenizer, text, path, max_new_tokens, **beams):
    """Which source tokens each token of the translation read: drawn, and if they are few printed."""
    ids = tokenizer.encode(plain(text))[:model.config.block_size - 1] + [EOS]
    src = torch.tensor([ids], device=model.wte.weight.device)
    new = (answers(model, src, max_new_tokens, **beams)[0] + [EOS])[:max_new_tokens]
    read, said = ([tokenizer.decode([i]).replace(" ", "\u2423") or "eos" for i in row] for row in (ids, new))
    shares = source_shares(model, src, new)
    if len(new) <= 32:
        for name, row in zip(said, next(iter(shares.values()))):
            top = row.topk(min(3, len(ids))).indices
            print(f"{name:>16} <- " + "  ".join(f"{read[s]} {row[s]:.2f}" for s in top))
    from matplotlib.figure import Figure
    size = len(shares) * (2.0 + 0.25 * max(8, len(ids))), 2.0 + 0.25 * len(new)
    figure = Figure(figsize=size, layout="constrained")
    crosses = {model.config.of_layer(i).cross_kind for i in range(model.config.n_layer)}
    model_name = f"mixer {model.config.mixer}, cross {', '.join(sorted(crosses))}"
    figure.suptitle(f"What each output token read\n{model_name}")
    for ax, (what, share) in zip(figure.subplots(1, len(shares), squeeze=False)[0], shares.items()):
        image = ax.imshow(share.cpu(), cmap="Blues", vmin=0, aspect="auto")
        ax.set_xticks(range(len(ids)), read, rotation=90, parse_math=False)
        ax.set_yticks(range(len(new)), said, parse_math=False)
        ax.set(xlabel="source", ylabel="output")
        figure.colorbar(image, ax=ax, label=what)
    save(figure, path, dpi=80)

def how_many(model, asked, n):
    """How many tokens to put behind n: as asked, else the block size, or what --pos=learned has room for."""
    most = model.config.block_size
    if model.wpe is None:
        return asked or most
    room = most + 1 - n  # the last one is never read
    if room < max(1, asked or 0):
        raise SystemExit(f"--max_new_tokens={asked or 1} behind {n}: --pos=learned has room for {most + 1} "
                         "in all, lower it or cut --start")
    return asked or room

def refuse_idle(given, rules, error):
    """A typed flag that would change nothing ends in one sentence: (flags, are they idle?, why), ..."""
    for flags, idle, why in rules:
        for flag in flags.split():
            if idle and flag in given:
                error(f"--{flag} changes nothing here, {why}: leave it out")

def main():
    p = Parser(description=__doc__)
    p.add("--out_dir", help="folder that train.py wrote", default="out")
    p.add("--ckpt", help="best.pt (lowest validation loss) or ckpt.pt (last)", default="best.pt")
    p.add("--start", help="text to translate, continue or classify; FILE:name reads it from a file")
    p.add("--input", help="a file to translate or classify line by line")
    p.add("--score", help="a text to predict, or FILE,FILE: what to translate or classify, and the answers")
    p.add("--output", writable, "where the lines go; default: standard output")
    p.add("--beam", int, "beams of a translation; 1 = greedy", 1, 1000, default=1)
    p.add("--length_penalty", float, "exponent of the beams' length normalisation", -10, 10, default=0.6)
    p.add("--temperature", float, "0 = the likeliest token; default 0 to translate, 0.8 to continue", 0, 1e6)
    p.add("--top_k", int, "sample among the k likeliest tokens only", 1, 2**31)
    p.add("--top_p", float, "sample among the likeliest that add up to this only", 1e-6, 1, default=1.0)
    p.add("--num_samples", int, "how many continuations or translations of --start", 1, 10**6, default=1)
    p.add("--max_new_tokens", int, "default: the block size, or what --pos=learned has room for", 1, 2**24)
    p.add("--batch_size", int, "lines at a time", 1, 2**31, default=128)
    p.add("--seed", int, "", 0, 2**63 - 1, default=1337)
    p.add("--device", there, "cpu, cuda, cuda:1, mps", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add("--mixers_from", help="a Python file that registers more mixers in model.MIXERS first")
    shows = "print and draw what the wavelet layers have learned, or what of --start each output token read"
    p.add("--show", help=shows, choices=["wavelets", "source"])
    args = p.parse_args()
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head is no error
    if not (args.start or args.input is not None or args.show or args.score):
        p.error('say what to read: --start="some text", --start=FILE:name, --input=FILE or --score=FILE')
    if args.mixers_from:
        register(args.mixers_from)
    torch.manual_seed(args.seed)
    model, tokenizer, meta = load_model(os.path.join(args.out_dir, args.ckpt), args.device)
    arch = model.config.arch
    lines = args.input is not None
    scored = args.score is not None
    if args.temperature is None:
        args.temperature = 0.8 if arch == "decoder" else 0.0
    likeliest = arch == "encoder" or args.beam > 1 or scored
    refuse_idle(p.given, [
        ("start input score", args.show == "wavelets", "--show=wavelets looks at the weights"),
        ("start input", scored, "--score says what to read"),
        ("start", lines, "--input says what to read"),
        ("input output", arch == "decoder" or args.show, "it is for translated or classified lines"),
        ("batch_size", args.show or not scored and arch == "decoder", "it is for lines and --score"),
        ("num_samples", lines or scored or args.show or arch == "encoder", "it is for answers to --start"),
        ("beam", arch != "encdec", "it is for translations"),
        ("max_new_tokens", arch == "encoder" or scored and arch == "decoder", "nothing is written"),
        ("length_penalty", args.beam == 1, "it weighs the beams of --beam=4"),
        ("temperature top_k top_p", likeliest, "an encoder, --beam and --score take the likeliest"),
        ("top_k top_p num_samples", args.temperature == 0, "--temperature=0 draws nothing"),
    ], p.error)
    if args.show == "wavelets":
        return show_wavelets(model, os.path.join(args.out_dir, "wavelets.png"))
    if args.show and (arch != "encdec" or not args.start):
        p.error('--show=source draws a translation: an encoder-decoder and --start="a sentence"')

    most = model.config.block_size
    room = None
    cut = 0
    if arch == "encdec":
        most -= 1  # and eos
        room = how_many(model, args.max_new_tokens, 1)
    drawn = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    beams = dict(beam=args.beam, length_penalty=args.length_penalty)
    texts = []
    if lines:
        texts = read_lines(args.input)
    elif args.start:
        is_file = args.start.startswith("FILE:") and "image" not in meta
        texts = [read_text(args.start[5:]) if is_file else args.start] * args.num_samples
    n = len(texts)
    if args.show:
        path = os.path.join(args.out_dir, "source.png")
        return show_source(model, tokenizer, texts[0], path, room, **beams, **drawn)
    if scored:
        results, n, cut = score(model, tokenizer, meta, args.score, args.batch_size, room, **beams)
    elif arch == "encoder":
        results, cut = classify(model, tokenizer, meta, texts, args.batch_size)
    elif arch == "encdec":
        results, cut = translate(model, tokenizer, texts, batch_size=args.batch_size, max_new_tokens=room,
                                 progress=lines, **beams, **drawn)
        results = [" ".join(result.splitlines()) for result in results]
    else:
        for text in texts:
            ids = tokenizer.encode(text)
            if "labels" in meta or not ids:  # rows begin with BOS; windows of one long text anywhere
                ids = [BOS] + ids
            n = how_many(model, args.max_new_tokens, len(ids))
            new = continued(model, torch.tensor([ids], device=args.device), n, **drawn)
            say(tokenizer, chain(ids, (i.item() for i in new)))
            print("---------------", flush=True)
        return
    if cut:
        print(f"{cut} of {n} inputs were longer than {most} tokens and were cut", file=sys.stderr)
    if args.output is None:
        for line in results:
            print(line)
        return
    with writing(args.output) as f:
        f.writelines(line + "\n" for line in results)

if __name__ == "__main__":
    main()
