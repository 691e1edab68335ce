"""
Use a trained checkpoint: an encoder-decoder translates, a decoder continues text, an encoder classifies.

    python sample.py --start="four hundred and twenty-one"
    python sample.py --out_dir=out --input=test.en --output=test.de --beam=4
    python sample.py --out_dir=out-text --start=FILE:prompt.txt --top_k=50
    python sample.py --show=wavelets          # what the wavelet layers have learned, as a table and a PNG

A checkpoint carries its tokenizer, so nothing else is needed; one that was trained on a GPU runs on a CPU.
"""

import argparse
import ctypes
import os
import signal
import sys
import zipfile
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from model import Haar, ModelConfig, WaveletTransformer, Wavspa, Wersa, lattice, wavelet_angles
from prepare_data import BOS, EOS, N_SPECIAL, PAD, Parser, Tokenizer, read_text, replacing, writable

FORMAT = 1  # of ckpt.pt and best.pt


KINDS = dict(model=dict, model_args=dict, meta=dict, iter_num=int, best_loss=float)


def load_checkpoint(path, device="cpu", kinds=KINDS):
    """A ckpt.pt or best.pt written by train.py -> dict of tensors and plain types. Nothing in the file is executed, and a
    file with a changed bit is refused."""
    try:
        with zipfile.ZipFile(path) as z:                       # torch writes checksums, but does not read them
            intact = z.testzip() is None
        ckpt = torch.load(path, map_location=device, weights_only=True) if intact else None
    except FileNotFoundError:
        raise SystemExit(f"{path} does not exist: train first (python train.py), or name the folder with --out_dir")
    except Exception:                                          # a broken pickle can fail in any way it likes
        intact = False
    if not intact:
        raise SystemExit(f"{path} is damaged or not a checkpoint of train.py: restore it from a copy, or train again")
    if not isinstance(ckpt, dict) or ckpt.get("format") != FORMAT or not all(isinstance(ckpt.get(k), kind) for k, kind in kinds.items()):
        raise SystemExit(f"{path} is not a checkpoint of this version of train.py (format {FORMAT}): train again")
    return ckpt


def build(path, ckpt, cfg=None):
    """The model of a checkpoint, its weights loaded; before anything large is made, their shapes are compared."""
    try:
        cfg, weights = cfg or ModelConfig(**ckpt["model_args"]), ckpt["model"]
        with torch.device("meta"):
            shapes = {k: v.shape for k, v in WaveletTransformer(replace(cfg, n_layer=min(cfg.n_layer, len(weights)))).state_dict().items()}
        if shapes != {k: v.shape for k, v in weights.items()}:
            raise ValueError("its weights are another model's than its settings name")
        model = WaveletTransformer(cfg)
        model.load_state_dict(weights)
    except (TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise SystemExit(f"{path} does not fit this version of model.py ({' '.join(str(e).split())[:150]}): train again")
    return model


def load_model(path, device="cpu"):
    """-> model in eval mode, tokenizer, the data set's meta."""
    ckpt = load_checkpoint(path, device)
    model, meta = build(path, ckpt), ckpt["meta"]
    try:
        tokenizer = Tokenizer(meta["tokenizer"])
        known = tokenizer.vocab_size == model.config.vocab_size and (model.config.arch != "encoder" or len(meta["classes"]) == model.config.n_classes)
    except Exception:                                          # whatever a stranger writes there
        known = False
    if not known:
        raise SystemExit(f"{path} has a tokenizer that is not its model's: restore it from a copy, or train again")
    return model.to(device).eval(), tokenizer, meta


def keep_freed_pages():
    """On a CPU a step asks for the same sizes again and again, and pages that went back to the kernel cost it a tenth and more."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *a: 0)
        mallopt(-3, 2**25), mallopt(-1, 2**30)


def collate(rows, head=(), tail=(), fill=PAD):
    """Lists of ids -> (B, T) int64, each row between head and tail, filled up at its end to a multiple of 8."""
    n = max(len(r) for r in rows) + len(head) + len(tail)
    out = np.full((len(rows), n + -n % 8), fill, dtype=np.int64)
    for i, r in enumerate(rows):
        out[i, :len(head) + len(r) + len(tail)] = [*head, *r, *tail]
    return torch.from_numpy(out)


def by_length(rows, batch_size):
    """Indices of rows in batches of alike lengths, the longest first (so that too little memory shows at once)."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    return [order[i:i + batch_size] for i in range(0, len(order), batch_size)]


def translate(model, tokenizer, texts, beam=1, length_penalty=0.6, temperature=0.0, top_k=None, batch_size=128,
              max_new_tokens=None, progress=False, block_size=None, heed=lambda: None):
    """One output string per text, in the order given, and how many texts were cut to --block_size. Empty in, empty out."""
    device, block_size = model.wte.weight.device, block_size or model.config.block_size
    rows = [tokenizer.encode(t.strip()) for t in texts]
    cut = sum(len(r) > block_size - 1 for r in rows)
    rows, out = [r[:block_size - 1] for r in rows], [""] * len(texts)
    todo = [i for i, r in enumerate(rows) if r]
    for batch in tqdm(by_length([rows[i] for i in todo], batch_size), disable=not progress, unit="batch"):
        heed()
        batch = [todo[i] for i in batch]
        src, n = collate([rows[i] for i in batch], tail=[EOS]).to(device), max_new_tokens or block_size
        if beam > 1:
            ids = model.beam_search(src, BOS, EOS, n, beam, length_penalty)
        else:
            ids = model.generate(torch.full((len(batch), 1), BOS, device=device), n, src, temperature, top_k, EOS)[:, 1:]
        for i, row in zip(batch, ids.tolist()):
            out[i] = tokenizer.decode(row[:row.index(EOS)] if EOS in row else row)
    return out, cut


def there(name):
    """A --device that this machine has, or an error that argparse shows."""
    try:
        torch.empty(0, device=name)
        return name
    except (RuntimeError, AssertionError, ValueError):
        raise argparse.ArgumentTypeError(f"{name} is not there; cpu is")


def main():
    p = Parser(description=__doc__)
    p.add("--out_dir", default="out", help="folder that train.py wrote")
    p.add("--ckpt", default="best.pt", help="best.pt (lowest validation loss) or ckpt.pt (last)")
    p.add("--start", default=None, help="text to translate, continue or classify; FILE:name reads it from a file")
    p.add("--input", default=None, help="a file to translate or classify line by line")
    p.add("--output", type=writable, default=None, help="where --input's results go, one line each; default: standard output")
    p.add("--beam", type=int, default=1, low=1, high=1000, help="beams of a translation; 1 = greedy")
    p.add("--length_penalty", type=float, default=0.6, low=-10, high=10, help="exponent of the beams' length normalisation")
    p.add("--temperature", type=float, low=0, high=1e6, help="0 = the likeliest token; default 0 to translate, 0.8 to continue")
    p.add("--top_k", type=int, low=1, high=2**31, help="sample among the k likeliest tokens only")
    p.add("--num_samples", type=int, default=1, low=1, high=10**6, help="how many continuations or translations of --start")
    p.add("--max_new_tokens", type=int, low=1, high=2**24, help="default: the block size, or what it has room for with --pos=learned")
    p.add("--batch_size", type=int, default=128, low=1, high=2**31, help="lines at a time")
    p.add("--seed", type=int, default=1337, low=0, high=2**63 - 1)
    p.add("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=there, help="cpu, cuda, cuda:1, mps")
    p.add("--show", default=None, choices=["wavelets"], help="print what the wavelet layers have learned, and draw it")
    args = p.parse_args()
    if not args.start and args.input is None and not args.show:
        p.error('say what to read: --start="some text", --start=FILE:name or --input=FILE')
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)          # | head is no error
    torch.manual_seed(args.seed)
    model, tokenizer, meta = load_model(os.path.join(args.out_dir, args.ckpt), args.device)
    arch = model.config.arch
    if args.show:
        return show_wavelets(model, os.path.join(args.out_dir, "wavelets.png"))

    if args.input is not None:
        if arch == "decoder":
            p.error("--input goes line by line, which a decoder's checkpoint cannot: use --start=FILE:name")
        texts = read_text(args.input).replace("\r\n", "\n").split("\n")
        texts = texts[:-1] if texts[-1] == "" else texts       # the last line's own line end
    else:
        is_file = args.start.startswith("FILE:") and "image" not in meta
        texts = [read_text(args.start[5:]) if is_file else args.start] * args.num_samples

    if arch == "encdec":
        sampled = dict(temperature=args.temperature or 0.0, top_k=args.top_k, beam=args.beam, length_penalty=args.length_penalty)
        if args.input is None:
            texts = [" ".join(t.split()) for t in texts]
        results, cut = translate(model, tokenizer, texts, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens,
                                 progress=args.input is not None, **sampled)
        if cut:
            print(f"{cut} of {len(texts)} inputs were longer than {model.config.block_size - 1} tokens and were cut", file=sys.stderr)
        write_lines(args.output, [" ".join(r.splitlines()) for r in results])
    elif arch == "encoder":
        rows, results = [read_image(t, meta["image"]) if "image" in meta else tokenizer.encode(t) for t in texts], []
        cut = sum(len(r) > model.config.block_size for r in rows)
        rows = [r[:model.config.block_size] or [EOS] for r in rows]
        if cut:
            print(f"{cut} of {len(rows)} inputs were longer than {model.config.block_size} tokens and were cut", file=sys.stderr)
        for i in range(0, len(rows), args.batch_size):
            with torch.no_grad():
                logits, _ = model(collate(rows[i:i + args.batch_size]).to(args.device))
            for row, prob in zip(rows[i:i + args.batch_size], logits.softmax(-1)):
                best = [meta["classes"][c] for c in prob.argmax(-1).view(-1)]
                if model.config.pool == "token":               # one answer for each token that is asked for
                    results.append(" ".join(f"{tokenizer.decode([row[t]])}={best[t]}" for t in range(0, len(row), meta["asked_every"])))
                else:
                    results.append(f"{best[0]}\t{prob.max():.3f}")
        write_lines(args.output, results)
    else:
        temperature = 0.8 if args.temperature is None else args.temperature
        for text in texts:
            ids = tokenizer.encode(text)
            ids = [BOS] * ("labels" in meta or not ids) + ids  # windows of one long text begin anywhere
            room = model.config.block_size if model.wpe is None else max(1, model.config.block_size + 1 - len(ids))
            try:
                out = model.generate(torch.tensor([ids], device=args.device), args.max_new_tokens or room, None, temperature, args.top_k)
            except ValueError as e:
                raise SystemExit(e)
            print(tokenizer.decode(out[0].tolist()))
            print("---------------")


def read_image(name, shape):
    """FILE:x.png -> the ids of its grey pixels, line by line."""
    import matplotlib.image
    try:
        pixels = matplotlib.image.imread(name.removeprefix("FILE:"))
    except Exception as e:                                     # as many as there are formats
        raise SystemExit(f"{name.removeprefix('FILE:')} cannot be read as an image ({e}): this checkpoint classifies --start=FILE:x.png")
    pixels = pixels * 255.0 if pixels.dtype == np.float32 else pixels.astype(float)
    grey = pixels if pixels.ndim == 2 else pixels[..., :3] @ [0.299, 0.587, 0.114]
    if list(grey.shape) != shape:
        raise SystemExit(f"{name.removeprefix('FILE:')} has {grey.shape[1]} x {grey.shape[0]} pixels, this checkpoint was trained on {shape[1]} x {shape[0]}: scale it first")
    return (grey.round().astype(int).ravel() + N_SPECIAL).tolist()


def learned(model, show=lambda *a: None):
    """What the wavelet layers have learned -> {layer: [(moved, weight)]} by level: the RMS distance of the taps (or gains)
    from where they started, and the RMS weight of the level's band in the output. show=print says it as a table too."""
    lines = {}
    for name, m in model.named_modules():
        if isinstance(m, Haar):
            show(f"{name}: level   alpha    beta   gamma   delta   moved  weight")
            start, weight = torch.tensor([[1.0, 1.0], [1.0, -1.0]])[..., None] / 2 ** 0.5, m.weight.detach().square().mean((1, 2)).sqrt()
            for l, taps in enumerate(m.taps.detach().cpu()):
                row = [*taps.mean(-1).flatten().tolist(), (taps - start).square().mean().sqrt().item(), weight[l].item()]
                show(" " * len(name) + f"  {l + 1:5d} " + " ".join(f"{v:7.3f}" for v in row))
                lines.setdefault(name, []).append(row[-2:])
            show(" " * len(name) + f"  a_L: weight {weight[-1].item():.3f}")
        elif isinstance(m, Wavspa):
            h, start = m.filters()[0].detach().cpu(), lattice(wavelet_angles(model.config.wavelet)).float()
            error = m.reconstruction_error(torch.randn(1, 64, m.band.size(1), device=m.band.device))
            h = h if h.dim() > 1 else h[:, None]
            show(f"{name}: mean taps " + " ".join(f"{v:.3f}" for v in h.mean(1)) + f", reconstruction error {error:.1e}")
            if len(h) == len(start) and model.config.wavelet != "random":
                lines[name] = [((h - start[:, None]).square().mean().sqrt().item(), w) for w in m.band.detach().square().mean(1).sqrt().tolist()]
        elif isinstance(m, Wersa) and m.L:
            gains = m.scale.detach().mean(0).tolist()
            show(f"{name}: gain scale, d_1 ... d_L, a_L: " + " ".join(f"{v:.3f}" for v in gains))
            lines[name] = [(abs(v - 1), v) for v in gains]
    return lines


def show_wavelets(model, path):
    """learned, printed and as a picture."""
    lines = learned(model, print)
    if not lines:
        raise SystemExit(f"--show=wavelets: a model of --mixer={model.config.mixer} has no wavelets")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    _, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for ax, i, title in zip(axes, (0, 1), ("distance from the initial taps (RMS)", "weight of the band (RMS)")):
        for name, rows in lines.items():
            ax.plot(range(1, len(rows) + 1), [r[i] for r in rows], marker="o", label=name)
        ax.set(xlabel="level", title=title, ylim=(0, None))
    axes[0].legend(fontsize=7)
    plt.savefig(path, dpi=120)
    print(f"drawn to {path}")


def write_lines(path, lines):
    if path is None:
        return print("\n".join(lines))
    try:
        with replacing(path) as f:
            f.writelines(line + "\n" for line in lines)
    except OSError as e:
        raise SystemExit(f"{path} cannot be written: {e.strerror}")


if __name__ == "__main__":
    main()
