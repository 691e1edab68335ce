"""
Turns a data set into a folder of token files that train.py memory-maps.

    python prepare_data.py --dataset=numbers
    python prepare_data.py --dataset=multi30k                          # from the hub
    python prepare_data.py --dataset=wmt16 --source=DIR                # from a copy in the hub's own layout
    python prepare_data.py --dataset=parallel --source=train.en,train.de
    python prepare_data.py --dataset=text --source=my.txt [--tokenizer=bytes]
    python prepare_data.py --dataset=imdb

Afterwards data/NAME holds meta.json (sizes, tokenizer, settings) and, for a decoder, train.bin, one stream of tokens;
for an encoder-decoder train.src.bin, all rows in a line, with train.src.idx, their rows + 1 int64 offsets; the same for
.tgt, val and test, and test.src.txt, the raw rows, because scores are computed on text. For an encoder, .src and .label.bin.
Ids 0, 1, 2 are PAD, BOS, EOS and token t is stored as t + 3; the loader adds BOS and EOS, they are not stored.
To add a data set, write one function and name it in DATASETS: its parameters are the flags that it takes.
"""
import argparse
import array
import base64
import contextlib
import difflib
import glob
import hashlib
import importlib
import inspect
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

FORMAT = 3
PAD, BOS, EOS, N_SPECIAL = 0, 1, 2, 3
# GPT-4's way of cutting text into words before any merge, but with digits in pairs
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
           r"|\s+(?!\S)|\s+")

def need(module):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise SystemExit(f"the Python package {module} is missing: pip install {module}")

def within(seconds, call):
    """call()'s result, or None if it fails or hangs: a silent firewall outlasts every timeout of a socket."""
    result = []
    def work():
        with contextlib.suppress(Exception):
            result.append(call())
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else None

# ---- tokenizers ----

class Tokenizer:
    """Text to ids and back, made from the plain dict that meta.json and every checkpoint carry."""

    def __init__(self, spec):
        if str(spec["kind"]) not in ("bytes", "pixels", "words", "bpe", "gpt2"):
            raise ValueError(f"the tokenizer {spec['kind']} is unknown")
        self.bpe, self.words = None, spec.get("words")  # neither: bytes, or the grey values of pixels
        if spec["kind"] == "gpt2":
            tiktoken = need("tiktoken")
            self.bpe = within(20, lambda: tiktoken.get_encoding("gpt2"))
            if self.bpe is None:
                raise SystemExit("GPT-2's BPE files cannot be fetched: point TIKTOKEN_CACHE_DIR to a folder that holds "
                                 "them, or prepare with --tokenizer=bytes")
        elif spec["kind"] == "bpe":
            ranks = {base64.b64decode(b): rank for rank, b in enumerate(spec["ranks"])}
            self.bpe = need("tiktoken").Encoding("bpe", pat_str=spec["pattern"], mergeable_ranks=ranks,
                                                 special_tokens={})
        self.vocab_size = N_SPECIAL + (self.bpe.n_vocab if self.bpe else len(self.words or range(256)))
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 65535 else np.uint32)

    def encode(self, text):
        if self.words:
            for word in text.split():
                if word not in self.words:
                    raise SystemExit(f"{word!r} is no word of this data set, which knows only: {' '.join(self.words)}")
            return [self.words.index(word) + N_SPECIAL for word in text.split()]
        return [t + N_SPECIAL for t in (self.bpe.encode_ordinary(text) if self.bpe else text.encode("utf-8", "replace"))]

    def decode(self, ids):
        raw = [int(i) - N_SPECIAL for i in ids if N_SPECIAL <= i < self.vocab_size]
        if self.words:
            return " ".join(self.words[t] for t in raw)
        return (self.bpe.decode_bytes(raw) if self.bpe else bytes(raw)).decode("utf-8", errors="replace")

    def encode_rows(self, texts, label):
        """All ids in one line, and the length of each row."""
        flat, lengths = array.array(self.dtype.char), []
        for text in tqdm(texts, f"tokenize {label}", unit="row", leave=False):
            ids = self.encode(text)
            flat.extend(ids)
            lengths.append(len(ids))
        return np.frombuffer(flat, dtype=self.dtype), np.array(lengths, dtype=np.int64)

def train_bpe(sides, vocab_size):
    """A joint BPE: names and numbers, alike in both languages, get the same ids."""
    if vocab_size < 256 + N_SPECIAL:
        raise SystemExit(f"--vocab_size={vocab_size} is too small: 256 bytes and {N_SPECIAL} special ids make 259")
    bpe, texts = need("rustbpe").Tokenizer(), [text for side in sides for text in side]
    with tqdm(texts, "train bpe", unit="row", leave=False) as bar:  # a bar that dies in there would swallow a Ctrl-C
        bpe.train_from_iterator(bar, vocab_size - N_SPECIAL, pattern=PATTERN)
    ranks = sorted(bpe.get_mergeable_ranks(), key=lambda pair: pair[1])
    return {"kind": "bpe", "pattern": PATTERN, "ranks": [base64.b64encode(bytes(b)).decode() for b, _ in ranks]}

# ---- reading ----

def read_text(path, empty=True):
    """A UTF-8 file, its byte order mark left out; empty=False refuses one that holds nothing."""
    try:
        raw = Path(path).read_bytes()
        if not empty and not raw.strip():
            raise SystemExit(f"{path} is empty")
        return raw.decode("utf-8").removeprefix("\ufeff")
    except OSError as e:
        raise SystemExit(f"{path} cannot be read: {e.strerror}")
    except UnicodeDecodeError as e:
        raise SystemExit(f"{path} is not UTF-8 (byte 0x{raw[e.start]:02x} at offset {e.start}): convert it first, for example with iconv")

def first_gap(a, b):
    """The row near which two sides part: the lengths of true pairs go together, those of shifted pairs do not."""
    x, y = (np.log1p([len(row) for row in side[:min(len(a), len(b))]]) for side in (a, b))
    shift = np.median(x - y)
    by_chance = np.abs(x - np.random.default_rng(0).permutation(y) - shift).mean()
    return int(np.argmax(np.cumsum(np.r_[0, 0.75 * by_chance - np.abs(x - y - shift)])))

def hub(source, repo, patterns, get, revision=None):
    """{split: list of get(row)} from a folder in the hub's layout, or from the hub, or from its cache when offline; and
    the names of the classes, if the rows have labels with names. A pattern may hold several, joined by |: the first that
    matches counts."""
    if source is None:
        requests, endpoint = need("requests"), need("huggingface_hub.constants").ENDPOINT
        offline = within(4, lambda: [requests.head(endpoint, timeout=3)]) is None
        try:
            source = need("huggingface_hub").snapshot_download(
                repo, repo_type="dataset", allow_patterns=[p for pattern in patterns.values() for p in pattern.split("|")],
                revision=revision, local_files_only=offline)
        except Exception as e:
            why = "no network" if offline else " ".join(str(e).split())[:150]
            raise SystemExit(f"{repo} cannot be fetched from the hub ({why}): name a local copy with --source=DIR")
    found = lambda pattern: (sorted(glob.glob(f"{glob.escape(source)}/{p}")) for p in pattern.split("|"))
    files = {split: next(filter(None, found(pattern)), None) for split, pattern in patterns.items()}
    for split, pattern in patterns.items():
        if not files[split]:
            raise SystemExit(f"{source} has no {pattern.split('|')[0]}: --source must be a copy of {repo} in the hub's own layout")
    kind = "json" if files["train"][0].endswith(".jsonl") else "parquet"
    with tempfile.TemporaryDirectory() as cache:  # for this call alone: cached rows silently come back old
        try:
            rows = need("datasets").load_dataset(kind, data_files=files, cache_dir=cache)
            names = getattr(rows["train"].features.get("label"), "names", None)
            return {split: [get(row) for row in tqdm(rows[split], f"read {split}", leave=False)] for split in files}, names
        except Exception as e:
            why = " ".join(str(e.__cause__ or e).split())[:150]
            raise SystemExit(f"{source}: its {kind} rows cannot be read or lack a field ({type(e).__name__}: {why})")

# ---- writing ----

@contextlib.contextmanager
def replacing(path, mode="w"):
    """open(path) for writing, all there or not there: a temporary file, flushed to the disk, then renamed."""
    try:
        with open(f"{path}.tmp", mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.tmp", path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")
        raise

def writable(path):
    """The type of a flag that names a file to write: found out before the work, not after it."""
    if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written")
    return path

def comma_separated(text):
    """The type of a flag that takes lengths: 512,1024 -> [512, 1024]"""
    if not re.fullmatch(r"[1-9]\d{0,7}(,[1-9]\d{0,7})*", text):
        raise argparse.ArgumentTypeError(f"{text} must be numbers of tokens, joined by commas")
    return [int(t) for t in text.split(",")]

def write_ragged(out, stem, ids, lengths):
    """Rows of any length in one line, and where each begins."""
    ids.tofile(out / f"{stem}.bin")
    np.r_[0, np.cumsum(lengths)].tofile(out / f"{stem}.idx")

def write_encdec(out, spec, splits, trivial, cap=None):
    """Tokenises {split: (sources, targets)}; train rows that do not fit cap are dropped, others left to the loader.
    trivial(sources, targets) scores the sources as translations of themselves."""
    tok, stats, skipped = Tokenizer(spec), {}, {}
    for split, sides in splits.items():
        encoded = [tok.encode_rows(texts, f"{split}.{side}") for texts, side in zip(sides, ("src", "tgt"))]
        longest = np.maximum(encoded[0][1], encoded[1][1])
        keep = longest < (cap or np.inf)
        if not keep.all():
            reason = "longer than block_size" + (", kept and cut by the loader" if split != "train" else "")
            skipped[f"{split}: {reason}"] = int((~keep).sum())
        keep |= split != "train"
        if not keep.any():
            raise SystemExit(f"no {split} row is shorter than {cap} tokens")
        for (ids, lengths), texts, side in zip(encoded, sides, ("src", "tgt")):
            write_ragged(out, f"{split}.{side}", ids[np.repeat(keep, lengths)], lengths[keep])
            if split != "train":
                (out / f"{split}.{side}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
        lengths = [lengths[keep] for _, lengths in encoded]
        stats[split] = {"rows": int(keep.sum()), "tokens": [int(n.sum()) for n in lengths],
                        "longest": [int(n.max()) for n in lengths], "trivial": {"copy the source": trivial(*sides)}}
    longest = max(max(stats[split]["longest"]) for split in ("train", "val", "test"))
    return {"arch": "encdec", "vocab_size": tok.vocab_size, "dtype": tok.dtype.name, "tokenizer": spec,
            "block_size": min(longest // 8 * 8 + 8, cap or longest + 8),  # the row and one special id, in multiples of 8
            "splits": stats, "skipped": skipped, "ratio": stats["train"]["tokens"][0] / stats["train"]["tokens"][1]}

def write_translation(out, splits, vocab_size, rows=None, seed=None):
    """From {split: pairs of text} to files; with a seed, val and test are drawn from train."""
    skipped = {}
    for split, pairs in splits.items():
        pairs = [tuple(" ".join(str(text or "").splitlines()).strip() for text in pair) for pair in pairs]
        splits[split] = [pair for pair in pairs if all(pair)]
        if len(splits[split]) < len(pairs):
            skipped[f"{split}: one side empty"] = len(pairs) - len(splits[split])
    if seed is not None:
        pairs = splits["train"]
        order, k = np.random.default_rng(seed).permutation(len(pairs)), max(1, min(2000, len(pairs) // 100))
        parts = {"train": np.sort(order[2 * k:]), "val": order[k:2 * k], "test": order[:k]}
        splits = {split: [pairs[i] for i in part] for split, part in parts.items()}
    splits["train"] = splits["train"][:rows]
    for split, pairs in splits.items():
        if not pairs:
            raise SystemExit(f"too few rows with text on both sides: none is left for {split}")
        splits[split] = list(zip(*pairs))
    bleu = lambda src, tgt: need("sacrebleu").corpus_bleu(src, [tgt]).score
    meta = write_encdec(out, train_bpe(splits["train"], vocab_size), splits, lambda src, tgt: bleu(src[:2000], tgt[:2000]), cap=256)
    return {"metric": "bleu", **meta, "skipped": {**skipped, **meta["skipped"]}}

def write_labelled(out, spec, splits, block_size, **meta):
    """From {split: (ids, lengths, labels)} or {split: (ids, lengths, labels, groups)} to a ragged file of tokens and its
    labels, one a row or one a token (-1: nothing is asked there); groups, one a label, are what the accuracy is broken
    down by. An empty row is skipped, a long one is the loader's to cut."""
    tok, stats, skipped, most = Tokenizer(spec), {}, {}, None
    for split, (ids, lengths, *labels) in splits.items():
        labels = [np.asarray(label, dtype=np.int32) for label in labels]
        if len(labels[0]) == len(lengths):
            labels = [label[lengths > 0] for label in labels]
        elif len(labels[0]) != len(ids):
            raise ValueError(f"{split}: {len(labels[0])} labels for {len(lengths)} rows of {len(ids)} tokens")
        write_ragged(out, f"{split}.src", np.asarray(ids, dtype=tok.dtype), lengths[lengths > 0])
        for name, label in zip(("label", "group"), labels):
            label.tofile(out / f"{split}.{name}.bin")
        asked = labels[0][labels[0] >= 0]
        most = np.bincount(asked).argmax() if split == "train" else most
        stats[split] = {"rows": int((lengths > 0).sum()), "tokens": int(lengths.sum()), "longest": int(lengths.max()),
                        "trivial": {"majority class": float((asked == most).mean())}}
        for count, what in (((lengths == 0).sum(), "empty, skipped"), ((lengths > block_size).sum() * (split != "long"), f"longer than {block_size} tokens, cut by the loader")):
            skipped |= {f"{split}: {what}": int(count)} if count else {}
    return {"arch": "encoder", "metric": "acc", "vocab_size": tok.vocab_size, "dtype": tok.dtype.name, "tokenizer": spec,
            "block_size": block_size, "labels": "row" if len(labels[0]) == stats[split]["rows"] else "token",
            "splits": stats, "skipped": skipped, **meta}

def hold_out(pairs, seed, rows):
    """A tenth of the training rows becomes val, so that test chooses nothing."""
    order, k = np.random.default_rng(seed).permutation(len(pairs)), len(pairs) // 10
    return {"train": [pairs[i] for i in order[k:][:rows]], "val": [pairs[i] for i in order[:k]]}

def pixels(images):
    """(n, height, width) grey values -> ids and lengths of rows."""
    flat = images.reshape(len(images), -1)
    return flat.ravel().astype(np.uint16) + N_SPECIAL, np.full(len(flat), flat.shape[1])

def picture(path, images, names):
    """The first 16 images and their classes, to look at."""
    need("matplotlib").use("Agg")
    figure, axes = need("matplotlib.pyplot").subplots(2, 8, figsize=(12, 3.6), layout="constrained")
    for ax, image, name in zip(axes.flat, images, names):
        ax.imshow(image, cmap="gray", vmin=0, vmax=255)
        ax.set_title(name)
    for ax in axes.flat:
        ax.axis("off")
    figure.savefig(path, dpi=100)

# ---- the data sets: each writes its files into `out` and returns its share of meta.json ----

EN = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
      "seventeen eighteen nineteen").split()
EN_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
DE = ("null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn "
      "siebzehn achtzehn neunzehn").split()
DE_TENS = "- - zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()

def en(n):
    if n < 20:
        return EN[n]
    if n < 100:
        return EN_TENS[n // 10] + ("-" + EN[n % 10] if n % 10 else "")
    unit, word = next((u, w) for u, w in ((10**6, "million"), (1000, "thousand"), (100, "hundred")) if n >= u)
    head, rest = divmod(n, unit)
    return f"{en(head)} {word}" + ((" and " if rest < 100 else " ") + en(rest) if rest else "")

def de(n, one="eins"):  # 1 is "eins" at the end, "ein" before another number word, "eine" before Million
    if n < 20:
        return one if n == 1 else DE[n]
    if n < 100:
        return (de(n % 10, "ein") + "und" if n % 10 else "") + DE_TENS[n // 10]
    if n < 10**6:
        unit, word = (1000, "tausend") if n >= 1000 else (100, "hundert")
        return de(n // unit, "ein") + word + (de(n % unit, one) if n % unit else "")
    head, rest = divmod(n, 10**6)
    return de(head, "eine") + (" Million" if head == 1 else " Millionen") + (" " + de(rest) if rest else "")

def numbers(out, seed=1337, rows=100_000):
    """English number names to German: "twenty-one" to "einundzwanzig", so units and tens change places."""
    rng, held, val, test = np.random.default_rng(seed), np.zeros(10**6, dtype=bool), [], []
    for digits in (3, 4, 5, 6):  # below 100 nothing is held out: a word that was never seen cannot be guessed
        values = rng.permutation(np.arange(10**(digits - 1), 10**digits))
        if digits == 3:
            values = np.r_[421, values[values != 421]]  # the documented example is always in test
        values = values[:len(values) // 20]
        held[values] = True
        k = min(len(values) // 2, (1000 - len(test)) // (7 - digits))  # few have three digits, the others fill up
        test, val = test + values[:k].tolist(), val + values[k:2 * k].tolist()
    val, test = rng.permutation(val).tolist(), test[:1] + rng.permutation(test[1:]).tolist()  # any first rows are a fair sample
    def bounds(digits):
        return np.where(digits == 1, 0, 10**(digits - 1)), 10**digits
    # a digit more is twice as likely: the short ones are few and soon known, the long ones hold all the combinations
    far = rng.integers(*bounds(rng.integers(7, 10, 500)))
    low, high = bounds(rng.choice(np.arange(1, 7), rows, p=2.0 ** np.arange(6) / 63))
    train = rng.integers(low, high)
    while (bad := held[train]).any():
        train[bad] = rng.integers(low[bad], high[bad])
    values = {"train": train.tolist(), "val": val, "test": test, "long": far.tolist()}
    splits = {split: ([en(n) for n in ns], [de(n) for n in ns]) for split, ns in values.items()}
    return {"metric": "exact", **write_encdec(out, {"kind": "bytes"}, splits, lambda src, tgt: float(np.mean([a == b for a, b in zip(src, tgt)]))),
            "note": "split long: 500 numbers of 7 to 9 digits, beyond the trained range"}

# 4,000: in 29,000 captions a rarer token is seen too seldom to be learned, and its table would outweigh a small model
def multi30k(out, source=None, vocab_size=4000, rows=None):
    """Multi30k image captions, English to German; test is test_2016_flickr, raw and cased."""
    files = {"train": "train.jsonl", "val": "val.jsonl", "test": "test.jsonl"}
    return write_translation(out, hub(source, "bentrevett/multi30k", files, lambda row: (row["en"], row["de"]))[0],
                             vocab_size, rows)

def wmt16(out, source=None, vocab_size=16_000, rows=None):
    """WMT16, English to German."""
    files = {"train": "de-en/train-*.parquet", "val": "de-en/validation-*.parquet", "test": "de-en/test-*.parquet"}
    get = lambda row: (row["translation"]["en"], row["translation"]["de"])
    return write_translation(out, hub(source, "wmt/wmt16", files, get)[0], vocab_size, rows)

def parallel(out, source, vocab_size=8000, seed=1337, rows=None):
    """Your own two files whose lines belong together; the first is translated into the second."""
    paths, splits = source.split(","), {}
    if len(paths) not in (2, 6):
        raise SystemExit(f"--source names {len(paths)} file(s): give train.en,train.de or these, val.* and test.* (six)")
    for split, a, b in zip(("train", "val", "test"), paths[::2], paths[1::2]):
        # not splitlines(): it also cuts at rare separators inside a row, and the two sides would drift apart
        src, tgt = (read_text(path, empty=False).removesuffix("\n").split("\n") for path in (a, b))
        if len(src) != len(tgt):
            raise SystemExit(f"{a} has {len(src)} lines and {b} has {len(tgt)}: they seem to part near line "
                             f"{first_gap(src, tgt) + 1}")
        splits[split] = list(zip(src, tgt))
    return write_translation(out, splits, vocab_size, rows, seed if len(paths) == 2 else None)

def text(out, source, tokenizer="gpt2"):
    """Any plain text, for a decoder: 90 % train, 5 % val, 5 % test, in the order of the file, cut at line breaks."""
    whole, tok, block_size, start, stats, sizes = read_text(source, empty=False), Tokenizer({"kind": tokenizer}), 256, 0, {}, {}
    for split, percent in (("train", 90), ("val", 95), ("test", 100)):
        end = len(whole) * percent // 100
        end = end if percent == 100 else whole.rfind("\n", max(0, end - 10_000), end) + 1 or end
        part, start = whole[start:end], end
        # pieces end where a line begins, so that they are cut where the tokenizer cuts too
        ids, _ = tok.encode_rows(re.findall(r"(?s).{1,50000}(?<=[^\n]\n)(?=\S)|.{1,50000}", part), split)
        if len(ids) <= block_size:
            raise SystemExit(f"{source} is too short: its {split} split has {len(ids)} tokens and needs {block_size + 1}")
        ids.tofile(out / f"{split}.bin")
        sizes[split], seen = len(part.encode("utf-8")), np.bincount(ids, minlength=tok.vocab_size)
        frequency = (seen[N_SPECIAL:] + 1) / (seen[N_SPECIAL:] + 1).sum() if split == "train" else frequency
        stats[split] = {"rows": 1, "tokens": len(ids), "longest": len(ids),
                        "trivial": {"token frequencies": float(-np.log2(frequency[ids - N_SPECIAL]).sum() / sizes[split])}}
    return {"arch": "decoder", "metric": "bpb", "vocab_size": tok.vocab_size, "dtype": tok.dtype.name,
            "block_size": block_size, "splits": stats, "bytes": sizes, "skipped": {}, "tokenizer": {"kind": tokenizer}}

def imdb(out, source=None, seed=1337, rows=None, tokenizer="bytes"):
    """IMDB reviews as bytes or GPT-2's BPE, negative or positive; val is a tenth of train, so that test chooses nothing."""
    files = {split: f"plain_text/{split}-*.parquet" for split in ("train", "test")}
    splits, _ = hub(source, "stanfordnlp/imdb", files, lambda row: (row["text"], row["label"]))
    splits |= hold_out(splits["train"], seed, rows)
    spec = {"kind": tokenizer}
    return write_labelled(out, spec, encode_labelled(spec, splits), 1024, n_classes=2, classes=["negative", "positive"])

def encode_labelled(spec, splits):
    """{split: [(text, label)]} -> {split: (ids, lengths, labels)}"""
    tok = Tokenizer(spec)
    return {split: (*tok.encode_rows([text for text, _ in pairs], split), [label for _, label in pairs]) for split, pairs in splits.items()}

def arxiv(out, source=None, rows=None, tokenizer="gpt2", min_len=0):
    """Long papers of 11 arXiv categories (He et al. 2019). The no_ref rows are taken, where they are there: the others
    spell the class in the text. --min_len keeps the longest documents only (WERSA's ArXiv-128k)."""
    stems = {"train": "train", "val": "validation", "test": "test"}
    files = {split: f"no_ref/{s}/*.parquet|no_ref/{s}*.parquet|default/{s}/*.parquet|*/{s}*.parquet|{s}*.parquet" for split, s in stems.items()}
    splits, names = hub(source, "ccdv/arxiv-classification", files, lambda row: (row["text"], row["label"]), "refs/convert/parquet")
    splits["train"] = splits["train"][:rows]
    spec, names = {"kind": tokenizer}, names or [str(c) for c in range(1 + max(label for pairs in splits.values() for _, label in pairs))]
    splits, skipped = encode_labelled(spec, splits), {}
    for split, (ids, lengths, labels) in splits.items():
        keep = lengths >= min_len
        if not keep.any():
            raise SystemExit(f"no {split} document has {min_len} tokens, the longest has {lengths.max()}: lower --min_len")
        skipped |= {f"{split}: shorter than {min_len} tokens, left out": int((~keep).sum())} if min_len else {}
        splits[split] = ids[np.repeat(keep, lengths)], lengths[keep], np.asarray(labels)[keep]
    meta = write_labelled(out, spec, splits, 4096, n_classes=len(names), classes=names)
    return {**meta, "skipped": {**skipped, **meta["skipped"]}}

def cifar10(out, source=None, seed=1337, rows=None):
    """CIFAR-10 as rows of 1,024 grey pixels, read line by line (Long Range Arena's Image)."""
    image = need("PIL.Image")
    def get(row):
        img = row["img"] if not isinstance(row["img"], dict) else image.open(io.BytesIO(row["img"]["bytes"]))
        return np.asarray(img.convert("L").resize((32, 32)), dtype=np.uint8), row["label"]
    files = {split: f"plain_text/{split}-*.parquet" for split in ("train", "test")}
    splits, names = hub(source, "uoft-cs/cifar10", files, get)
    splits |= hold_out(splits["train"], seed, rows)
    names = names or "airplane automobile bird cat deer dog frog horse ship truck".split()
    arrays = {split: [np.array(side) for side in zip(*pairs)] for split, pairs in splits.items()}
    picture(out / "samples.png", arrays["train"][0], [names[label] for label in arrays["train"][1][:16]])
    return write_labelled(out, {"kind": "pixels"}, {split: (*pixels(x), y) for split, (x, y) in arrays.items()}, 1024,
                          n_classes=len(names), classes=names, image=[32, 32])

OPERATORS = ["[MIN", "[MAX", "[MED", "[SM"]  # smallest, largest, median (rounded down), sum modulo 10

def listops_rows(rng, count, min_len, max_len, max_depth, seen):
    """count rows of the grammar with min_len < tokens < max_len, none of them in seen: flat token numbers (digits 0-9,
    operators 10-13, closing bracket 14), lengths, values. Many trees grow at once, a level at a time."""
    rows, values, idle = [], [], 0
    while len(rows) < count:
        n = max(256, min(20_000, 10**7 // max_len))
        tree, kids, levels, length = np.arange(n), rng.integers(2, 11, n), [], np.zeros(n, dtype=int)  # a root is an operator: a digit is too short
        for depth in range(1, max_depth + 1):
            length += np.bincount(tree, 1 + (kids > 0), n).astype(int)
            kids[length[tree] >= max_len] = 0          # too long already: let it wither
            levels.append((tree, kids))
            tree = np.repeat(tree, kids)
            kids = rng.integers(2, 11, len(tree)) * (rng.random(len(tree)) < 0.25) * (depth + 1 < max_depth)
        keep = (min_len < length) & (length < max_len)
        levels = [(tree[keep[tree]], kids[keep[tree]]) for tree, kids in levels]
        value = size = np.zeros(0, dtype=int)
        nodes = []
        for tree, kids in reversed(levels):            # values and sizes, from the leaves up
            is_op, start = kids > 0, np.cumsum(kids) - kids
            code, total = rng.integers(0, 10, len(kids)), np.ones(len(kids), dtype=int)
            if is_op.any():
                k, at = kids[is_op], start[is_op]
                op, order = rng.integers(0, 4, len(k)), np.lexsort((value, np.repeat(np.arange(len(k)), k)))
                ranked = value[order]
                answers = ranked[at], ranked[at + k - 1], (ranked[at + (k - 1) // 2] + ranked[at + k // 2]) // 2, np.add.reduceat(value, at) % 10
                total[is_op] = 2 + np.add.reduceat(size, at)
            value_here = code.copy()
            if is_op.any():
                value_here[is_op], code[is_op] = np.choose(op, answers), 10 + op
            nodes.append((code, total, kids, start, is_op, size))
            value, size = value_here, total
        length = size
        flat, pos = np.zeros(length.sum(), dtype=np.uint8), np.cumsum(length) - length
        begin = pos
        for code, total, kids, start, is_op, below in reversed(nodes):  # places, from the root down
            flat[pos] = code
            flat[(pos + total - 1)[is_op]] = 14
            before = np.cumsum(below) - below              # tokens of all nodes to the left, one level down
            first = np.repeat(before[start[is_op]], kids[is_op])
            pos = np.repeat(pos[is_op] + 1, kids[is_op]) + before - first
        had = len(rows)
        for b, l, v in zip(begin, length, value):
            key = flat[b:b + l].tobytes()
            if key not in seen and len(rows) < count:
                seen.add(key)
                rows.append(flat[b:b + l])
                values.append(v)
        idle = 0 if len(rows) > had else idle + 1
        if idle == 20:
            raise SystemExit(f"the grammar gives only {len(rows)} different rows of {min_len} to {max_len} tokens with --max_depth={max_depth}: "
                             f"lower --min_len or --rows, or raise --max_len or --max_depth")
    return np.concatenate(rows), np.array([len(r) for r in rows]), np.array(values)

def listops(out, seed=1337, rows=96_000, min_len=500, max_len=2000, max_depth=10):
    """Nested lists of digits, what is their value? The grammar of Long Range Arena (arXiv 2011.04006; Nangia & Bowman
    2018): an argument is an operator with probability 1/4, of 2 to 10 arguments. Split long: twice as long."""
    if not 1 <= min_len < max_len or max_depth < 2:
        raise SystemExit(f"--min_len={min_len}, --max_len={max_len}, --max_depth={max_depth}: a row needs 1 <= min_len < max_len, and a max_depth of at least 2")
    rng, seen, splits, held = np.random.default_rng(seed), set(), {}, max(1, min(2000, rows // 8))
    for split, count, low, high in (("train", rows, min_len, max_len), ("val", held, min_len, max_len), ("test", held, min_len, max_len),
                                    ("long", min(500, held), max_len, 2 * max_len)):
        try:
            splits[split] = listops_rows(rng, count, low, high, max_depth, seen)
        except SystemExit:
            if split != "long":
                raise                                      # so shallow a tree cannot be twice as long
    roots = {split: ids[np.cumsum(n) - n] - 10 for split, (ids, n, _) in splits.items()}
    best = [np.bincount(splits["train"][2][roots["train"] == op], minlength=1).argmax() for op in range(4)]
    spec = {"kind": "words", "words": [str(d) for d in range(10)] + OPERATORS + ["]"]}
    meta = write_labelled(out, spec, {split: (ids + N_SPECIAL, n, y) for split, (ids, n, y) in splits.items()}, max_len,
                          n_classes=10, classes=[str(d) for d in range(10)])
    for split, (_, _, y) in splits.items():
        meta["splits"][split]["trivial"]["root operator"] = float((np.take(best, roots[split]) == y).mean())
    return meta

def lego(out, seed=1337, rows=50_000, n_links=12, n_tr=6):
    """A chain of signs told in any order: "b = - a ; a = + 1 ;", what is each letter? (arXiv 2206.04301.) In train and
    val only the first n_tr links of the chain are asked for, in test all; split long has twice the links, 26 at most."""
    if not 1 <= n_tr <= n_links <= 26:
        raise SystemExit(f"--n_tr={n_tr}, --n_links={n_links}: a chain needs 1 <= n_tr <= n_links <= 26, a letter a link")
    rng, splits = np.random.default_rng(seed), {}
    letters, equals, sign, one, end = [chr(97 + i) for i in range(26)], 26, 27, 29, 30
    for split, count, links, asked in (("train", rows, n_links, n_tr), ("val", 1000, n_links, n_tr), ("test", 2000, n_links, n_links),
                                       ("long", 1000, min(26, 2 * n_links), 26)):
        names, minus = rng.random((count, 26)).argsort(1)[:, :links], rng.integers(0, 2, (count, links))
        source = np.concatenate((np.full((count, 1), one), names[:, :-1]), 1)
        clauses = np.stack((names, np.full_like(names, equals), sign + minus, source, np.full_like(names, end)), -1)
        link, order = np.broadcast_to(np.arange(links), names.shape), rng.random(names.shape).argsort(1)
        label, group = np.full(clauses.shape, -1), np.zeros(clauses.shape, dtype=int)
        label[..., 0], group[..., 0] = np.where(link < asked, minus.cumsum(1) % 2, -1), link + 1
        ids, label, group = (np.take_along_axis(v, order[..., None], 1).ravel() for v in (clauses, label, group))
        splits[split] = ids + N_SPECIAL, np.full(count, 5 * links), label, group
    return write_labelled(out, {"kind": "words", "words": letters + ["=", "+", "-", "1", ";"]}, splits, 5 * n_links,
                          n_classes=2, classes=["+1", "-1"], pool="token", groups="link", asked_every=5,
                          note=f"train and val ask for the first {n_tr} of {n_links} links, test for all")

def recall(out, seed=1337, rows=50_000, n_pairs=32, n_keys=128):
    """Multi-query associative recall (arXiv 2312.04927): "k7 v3 k1 v9 ...", then every key again, in any order, for its
    value. 1, 2, 4, ... n_pairs pairs a row; split long has 2 and 4 times n_pairs."""
    if not 1 <= n_pairs <= n_keys:
        raise SystemExit(f"--n_pairs={n_pairs}, --n_keys={n_keys}: needs 1 <= n_pairs <= n_keys, as a key has one value")
    rng, splits = np.random.default_rng(seed), {}
    powers, more = [2**i for i in range(n_pairs.bit_length())], [p for p in (2 * n_pairs, 4 * n_pairs) if p <= n_keys]
    for split, count, choice in (("train", rows, powers), ("val", 1000, powers), ("test", 2000, powers), ("long", 500, more)):
        pairs = rng.choice(choice, count) if choice else []
        ids, label, group = [], [], []
        for p in pairs:
            keys, values = rng.permutation(n_keys)[:p], n_keys + rng.integers(0, n_keys, p)
            told = np.stack((keys, values), 1)
            again = rng.permutation(told)
            ids += [told.ravel(), again.ravel()[:-1]]  # after the last answer nothing is asked
            label += [np.full(2 * p, -1), np.stack((again[:, 1] + N_SPECIAL, np.full(p, -1)), 1).ravel()[:-1]]
            group.append(np.full(4 * p - 1, p))
        if ids:
            splits[split] = np.concatenate(ids) + N_SPECIAL, 4 * np.asarray(pairs) - 1, np.concatenate(label), np.concatenate(group)
    words = [f"k{i}" for i in range(n_keys)] + [f"v{i}" for i in range(n_keys)]
    meta = write_labelled(out, {"kind": "words", "words": words}, splits, 4 * n_pairs, groups="pairs", arch="decoder")
    for split, (_, _, label, group) in splits.items():
        meta["splits"][split]["trivial"] = {"a value of the row": float((1 / group[label >= 0]).mean())}
    return meta

# size: length and thickness of a dash, gaps (the wide one fits less often), distance kept between contours and between the
# first ends of the two long ones, radius of a disc, continuity (turns are below a right angle / continuity), short contours,
# brightness
PATHFINDER = {32: (2, 0.5, (1.15,), 3.75, 7, 1.5, 1.0, 5, 1.0), 128: (5, 1.5, (4, 6, 6, 6), 10, 20, 3, 1.8, 8, 0.9)}
LONG, SHORT = 14, 14 // 3  # dashes in a contour
NOWHERE = 1e4

def pathfinder_layouts(rng, size, tries=1024):
    """Both ends of all dashes as x + iy, a row for each of the tries in which the two long contours found room."""
    length, thick, gaps, clearance, apart, radius, continuity, n_short, _ = PATHFINDER[size]
    unit = np.exp(2j * np.pi * np.arange(64) / 64).round(6).astype(np.complex64)  # rounded: the same on every machine
    turns = np.arange(-16, 17)
    odds = np.cos(np.pi / 2 * np.minimum(abs(turns) * continuity / 16, 1)) ** 2
    n = 2 * LONG + SHORT * n_short  # the dashes of the long contours alternate, then come the short ones
    before = np.arange(n) - np.where(np.arange(n) < 2 * LONG, 2, 1)
    before[:2] = before[2 * LONG::SHORT] = -1
    room = np.full((n, 2), clearance / 2, np.float32)
    for end in room[:2, 0], room[2 * LONG - 2:2 * LONG, 1]:  # a disc may go there
        end += radius - thick / 2
    gap = rng.choice(gaps, (tries, 1)).astype(np.float32)
    ends, heading = np.full((tries, n, 2), NOWHERE, np.complex64), np.zeros((tries, n), np.int64)

    def inside(z):
        return (z.real > 1) & (z.real < size - 2) & (z.imag > 1) & (z.imag < size - 2)

    # where a block of dashes fails it is grown again, up to 8 times, then the try (of a short contour: only that) is dropped
    for block in np.split(np.arange(n), [*range(8, 2 * LONG, 8), *range(2 * LONG, n, SHORT)]):
        todo = np.arange(len(ends))
        for _ in range(8):
            if not len(todo):
                break
            e, h, g, shape = ends[todo], heading[todo], gap[todo], (len(todo), 12)
            for j in block:  # of 12 candidates the first that fits, rather one that does not run into the border next
                if before[j] >= 0:
                    last = h[:, before[j], None]
                    new = (last + rng.choice(turns, shape, p=odds / odds.sum())) % 64
                    start = e[:, before[j], 1:] + (g + thick) / 2 * (unit[last] + unit[new])
                else:
                    new = rng.integers(0, 64, shape)
                    start = (1 + (size - 3) * rng.random((len(e), 24), np.float32)).view(np.complex64)
                    if j == 1:
                        start = e[:, 0, :1] + apart * unit[rng.integers(0, 64, shape)]
                dash = np.stack([start, start + (length - thick) * unit[new]], 2)
                others = np.arange(j) != before[j]
                away = dash[..., None] - e[:, :j][:, others].reshape(len(e), 1, 1, -1)
                free = away.real ** 2 + away.imag ** 2 > (room[j, :, None] + room[:j][others].ravel()) ** 2
                fits = (inside(dash) & free.all(3)).all(2)
                choice = np.arange(len(e)), (fits * np.where(inside(dash[..., 1] + length * unit[new]), 2, 1)).argmax(1)
                e[:, j], h[:, j] = np.where(fits[choice][:, None], dash[choice], NOWHERE), new[choice]
            ok = (e[:, block, 0] != NOWHERE).all(1)
            ends[todo[ok]], heading[todo[ok]] = e[ok], h[ok]
            todo = todo[~ok]
        if block[0] < 2 * LONG:
            ends, heading, gap = (np.delete(a, todo, 0) for a in (ends, heading, gap))
    return ends

def pathfinder_images(n, size=32, seed=0):
    """
    Pathfinder (Linsley et al. 2018) with the settings that the Long Range Arena's pathfinder.py lists for its hard set at
    size 32 and for Path-X at size 128. Label 1: the two discs are on the ends of one of the two contours of 14 dashes.
    Unlike there, contours stay farther apart than a gap is wide (at 32 that takes gaps of 1.15 pixels, not 2), so that whoever
    follows the path knows the label. Returns n uint8 pictures and n labels; a larger n only appends.
    """
    length, thick, _, _, _, radius, _, _, brightness = PATHFINDER[size]
    rng, images, labels, done = np.random.default_rng(seed), np.zeros((n, size, size), np.uint8), np.zeros(n, np.int64), 0
    w = int(np.ceil(max(length / 2, radius) + 1))
    square = np.arange(-w, w + 1)  # that a dash or disc is drawn in
    while done < n:
        ends = pathfinder_layouts(rng, size)
        rows, which, label = np.arange(len(ends)), *rng.integers(0, 2, (2, len(ends)))
        discs = np.stack([ends[rows, which, 0], ends[rows, 2 * LONG - 1 - (which ^ label), 1]], 1)
        strokes = np.concatenate([ends, np.stack([discs, discs], 2)], 1)  # a disc is a thick dash of length 0
        image, index = np.nonzero(strokes[..., 0] != NOWHERE)
        (a, b), disc = strokes[image, index].T[..., None, None], (index >= ends.shape[1])[:, None, None]
        x, y = np.rint((a + b).real / 2) + square, np.rint((a + b).imag / 2) + square[:, None]
        dx, dy = (b - a).real, (b - a).imag
        along = np.clip(((x - a.real) * dx + (y - a.imag) * dy) / (length - thick) ** 2, 0, 1)
        away = np.sqrt((x - a.real - along * dx) ** 2 + (y - a.imag - along * dy) ** 2)
        edge = np.where(disc, radius, thick / 2) + 0.5
        ink = np.clip((edge - away) / np.minimum(edge, 1), 0, 1) * np.where(disc, 255, 255 * brightness)
        canvas = np.zeros((len(ends), size + 2 * w, size + 2 * w), np.uint8)
        np.maximum.at(canvas, (image[:, None, None], y.astype(int) + w, x.astype(int) + w), np.rint(ink).astype(np.uint8))
        images[done:done + len(ends)], labels[done:done + len(ends)] = canvas[:n - done, w:-w, w:-w], label[:n - done]
        done += len(ends)
    return images, labels

def pathfinder(out, seed=1337, rows=160_000, size=32):
    """Are the two discs on one dashed contour? Pixels line by line, at Long Range Arena's sizes 32 and 128 (Path-X)."""
    if size not in PATHFINDER:
        raise SystemExit(f"--size={size} is unknown: " + " or ".join(map(str, PATHFINDER)))
    splits, held, part = {}, max(1, min(20_000, rows // 8)), 2000
    pool = ProcessPoolExecutor(mp_context=get_context("fork"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        for number, (split, count) in enumerate((("train", rows), ("val", held), ("test", held))):
            # each part has a seed of its own: the number of cores changes nothing
            parts = [(min(part, count - at), size, [seed, number, at]) for at in range(0, count, part)]
            images, labels = zip(*tqdm(pool.map(pathfinder_images, *zip(*parts)), f"draw {split}", total=len(parts), unit=f" * {part} images", leave=False))
            splits[split] = np.concatenate(images), np.concatenate(labels)
    finally:
        pool.shutdown(cancel_futures=True)
    picture(out / "samples.png", splits["train"][0], ["connected" if label else "apart" for label in splits["train"][1][:16]])
    return write_labelled(out, {"kind": "pixels"}, {split: (*pixels(x), y) for split, (x, y) in splits.items()}, size * size,
                          n_classes=2, classes=["apart", "connected"], image=[size, size])

DATASETS = {"numbers": numbers, "multi30k": multi30k, "wmt16": wmt16, "text": text, "parallel": parallel, "listops": listops,
            "lego": lego, "recall": recall, "pathfinder": pathfinder, "imdb": imdb, "cifar10": cifar10, "arxiv": arxiv}

# ---- what train.py and sample.py import ----

def crc32(path):
    """Checksum of a file, a block at a time."""
    value = 0
    with open(path, "rb") as f:
        while block := f.read(2**24):
            value = zlib.crc32(block, value)
    return value

def checksum(meta):
    """Of all of meta.json but itself."""
    return zlib.crc32(json.dumps({key: value for key, value in meta.items() if key != "checksum"}, sort_keys=True).encode())

def plausible(meta):
    """Whether train.py may trust what a well-formed meta.json claims, whoever wrote it."""
    kinds = dict(name=str, arch=str, metric=str, dtype=str, vocab_size=int, block_size=int, tokenizer=dict, splits=dict, files=dict, skipped=dict, seconds=(int, float))
    splits = [meta["splits"][s] for s in {"train", "val", "test"} | meta["splits"].keys()]
    return (all(isinstance(meta[key], kind) for key, kind in kinds.items()) and meta["arch"] in ("encdec", "encoder", "decoder")
            and meta["metric"] in ("exact", "bleu", "bpb", "acc") and meta["dtype"] in ("uint16", "uint32") and 1 <= meta["block_size"] <= 2**24
            and meta["vocab_size"] == Tokenizer(meta["tokenizer"]).vocab_size and (meta["arch"] != "encoder" or 1 <= meta["n_classes"] == len(meta["classes"]))
            and all(s["rows"] >= 1 and np.min(s["tokens"]) >= 1 and np.max(s["longest"]) >= 0 and dict(s["trivial"]) for s in splits))

def load_meta(folder):
    """meta.json of a data set whose files are all there and unchanged, by size and checksum."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] == FORMAT:
            there, why = {p.name: p.stat().st_size for p in folder.iterdir()}, "has a damaged meta.json"
            if meta["checksum"] == checksum(meta) and plausible(meta):
                short = [file for file, (size, _) in meta["files"].items() if there.get(file) != size]
                wrong = short or [file for file, (_, crc) in meta["files"].items() if crc32(folder / file) != crc]
                if not wrong:
                    return meta
                why = f"is damaged, {wrong[0]} " + ("is missing or has a wrong size" if short else "has changed since it was written")
        else:
            why = f"has format {meta['format']} and this code reads {FORMAT}"
    except (FileNotFoundError, NotADirectoryError):
        why = "holds no data set"
    except OSError as e:
        why = f"cannot be read ({e.strerror})"
    except Exception:  # as many as there are ways to be no meta.json
        why = "has a damaged meta.json"
    raise SystemExit(f"{folder} {why}: make it anew with python prepare_data.py --dataset={folder.name} "
                     f"--data_dir={folder.parent} --force")

def read_ragged(folder, stem, dtype, vocab_size=2**32):
    """Tokens and offsets, so that row i is tokens[offsets[i]:offsets[i + 1]]; a stream without .idx is one row."""
    path = Path(folder) / stem
    tokens = np.memmap(f"{path}.bin", dtype=dtype, mode="r")
    idx = np.memmap(f"{path}.idx", dtype=np.int64, mode="r") if os.path.exists(f"{path}.idx") else np.array([0, len(tokens)])
    if idx[0] != 0 or idx[-1] != len(tokens) or (np.diff(idx) < 0).any():
        raise SystemExit(f"{path}.idx does not say where the rows of {path}.bin begin: prepare the data set again")
    if tokens.max() >= vocab_size:
        raise SystemExit(f"{path}.bin has the id {tokens.max()}, beyond its vocabulary of {vocab_size}: prepare the data set again")
    return tokens, idx

def fingerprint(source):
    """sha256 over the source files, so that an edited file counts as another source."""
    digest = hashlib.sha256()
    for path in map(Path, source.split(",")):
        if not path.exists():
            raise SystemExit(f"--source: there is no {path}")
        inside = [p for pattern in ("*.jsonl", "*/*.parquet") for p in sorted(path.glob(pattern))]
        for file in inside if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()

def prepare(name, data_dir="data", force=False, exact=False, source=None, **flags):
    """Makes data_dir/name unless it is there, and returns its path. An option left at None means the data set's default,
    or whatever an existing folder was made with; exact compares an existing folder with the defaults too."""
    if name not in DATASETS:
        raise SystemExit(unknown("data set", name, DATASETS))
    given = {key: value for key, value in dict(flags, source=source).items() if value is not None}
    options = {key: p.default for key, p in inspect.signature(DATASETS[name]).parameters.items() if key != "out"}
    for key in given.keys() - options.keys() - {"seed"}:
        raise SystemExit(f"--{key} is no flag of {name}, which takes " + ", ".join(f"--{known}" for known in options))
    options.update({key: value for key, value in given.items() if key in options})
    settings = {**options, "source": fingerprint(source) if source else None}

    folder = Path(data_dir) / name
    for old in Path(data_dir).glob(f"{name}.tmp-*"):  # left by killed runs
        try:
            os.kill(int(old.name.split("-")[1]), 0)
        except ProcessLookupError:
            if old.name.endswith("-old") and not folder.exists():  # killed between two renames
                old.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        except (PermissionError, ValueError):
            pass
    if (folder / "meta.json").exists() and not force:
        meta = load_meta(folder)
        for key, value in settings.items():
            if value != meta["settings"].get(key) and (key in given or exact and key != "source"):
                was = "another source" if key == "source" else f"{key}={meta['settings'].get(key)}, not {value}"
                raise SystemExit(f"{folder} was made with {was}: --force replaces it")
        print(f"{folder} is there already, made by: {meta['created_by']}")
        return str(folder)
    if folder.exists() and not (folder / "meta.json").exists():
        raise SystemExit(f"{folder} exists and is no data set of ours: move it away or choose another --data_dir")
    if options.get("source") is inspect.Parameter.empty:
        raise SystemExit(f"{name} is made from your own: python prepare_data.py --dataset={name} --source=" + ("train.en,train.de" if name == "parallel" else "FILE"))

    tmp = Path(data_dir) / f"{name}.tmp-{os.getpid()}"
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        started = time.time()
        meta = {"format": FORMAT, "name": name, "note": "", **DATASETS[name](tmp, **options), "settings": settings,
                "seconds": round(time.time() - started, 1),
                "files": {p.name: [p.stat().st_size, crc32(p)] for p in sorted(tmp.iterdir())},
                "created_by": "python " + shlex.join(sys.argv)}
        meta["tokenizer"] = meta.pop("tokenizer", None)  # last, because a BPE fills thousands of lines
        with replacing(tmp / "meta.json") as f:
            json.dump(meta | {"checksum": checksum(meta)}, f, indent=1)
        if folder.exists():
            folder.rename(f"{tmp}-old")
        tmp.rename(folder)
    except OSError as e:
        raise SystemExit(f"{folder} cannot be made: {e}")
    finally:
        for leftover in (tmp, f"{tmp}-old"):
            shutil.rmtree(leftover, ignore_errors=True)
    return str(folder)

# ---- command line ----

def unknown(kind, word, known):
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]
    return f"unknown {kind} {word}: did you mean {near}?"

def stopped(kind, e, trace):
    """Ctrl-C ends in one word and the exit code of a signal."""
    if kind is not KeyboardInterrupt:
        return sys.__excepthook__(kind, e, trace)
    print("stopped", file=sys.stderr, flush=True)
    os._exit(130)

class Parser(argparse.ArgumentParser):
    """argparse with one line a mistake: the nearest known flag, no abbreviations; --flag, --flag=0 and --flag=False."""

    def __init__(self, description):
        lines, width = [], min(80, shutil.get_terminal_size().columns)
        for line in description.split("\n"):
            command, _, comment = line.partition(" # ")
            if len(line) < width or line.startswith(" "):
                lines += [line] if len(line) < width else [f"    # {comment.strip()}", command.rstrip()]
            else:
                lines += textwrap.wrap(line, width - 1)
        super().__init__(description="\n".join(lines), allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.to = self
        sys.excepthook = stopped

    def section(self, title):
        self.to = self.add_argument_group(title)

    def add(self, flag, type=str, help="", low=None, high=None, **kw):
        """A flag, its type, and the numbers that it takes, low..high."""
        if type is bool:
            words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
            kw.update(nargs="?", const=True, metavar="BOOL")
            type = lambda s: words[s.lower()] if s.lower() in words else self.error(f"{flag}={s} must be True or False")
        elif low is not None:
            word, kind = "number" if type is float else "whole number", type
            def type(s):
                with contextlib.suppress(ValueError):
                    if low <= kind(s) <= high:
                        return kind(s)
                self.error(f"{flag}={s} must be a {word} from {low:g} to {high:g}")
        if len("".join(kw.get("choices") or ())) > 40:
            kw["metavar"], help = "NAME", help or ", ".join(kw["choices"])
        shown = "" if kw.get("default") is None else f" [{kw['default']}]"
        self.to.add_argument(flag, type=type, help=(help + shown).replace("%", "%%") or " ", **kw)

    def parse_args(self, argv=None):
        """Also leaves the flags that were really typed in self.given."""
        unset = object()
        args, extra = self.parse_known_args(argv, argparse.Namespace(**{a.dest: unset for a in self._actions if a.dest != "help"}))
        if extra:
            flag = extra[0].split("=")[0]
            self.error(unknown("argument", flag, [o for a in self._actions for o in a.option_strings]) + " (--help lists all)")
        self.given = {k: v for k, v in vars(args).items() if v is not unset}
        return argparse.Namespace(**{k: self.get_default(k) if v is unset else v for k, v in vars(args).items()})

    def error(self, message):
        self.exit(2, f"{self.prog}: " + " ".join(message.split()) + "\n")

def summary(folder, meta, seconds):
    both = lambda x: " + ".join(f"{n:,}" for n in (x if isinstance(x, list) else [x]))
    print(f"{folder}: {meta['arch']}, vocab {meta['vocab_size']:,}, block_size {meta['block_size']}, {seconds:.1f} s")
    for split, s in meta["splits"].items():
        print(f"  {split:5s} | rows {s['rows']:,} | tokens {both(s['tokens'])} | longest {both(s['longest'])}")
    for reason, count in meta["skipped"].items():
        print(f"  {count:,} rows {reason}")
    print("  trivial scores on test |", ", ".join(f"{name} {score:.3f}" for name, score in meta["splits"]["test"]["trivial"].items()))
    if meta["note"]:
        print(f"  {meta['note']}")
    if meta["arch"] == "encdec":
        print("  test 0 |", " -> ".join(read_text(f"{folder}/test.{side}.txt").split("\n")[0] for side in ("src", "tgt")))
    elif os.path.exists(f"{folder}/samples.png"):
        print(f"  16 images are drawn in {folder}/samples.png")
    else:
        ids = np.fromfile(f"{folder}/train{'.src' * ('labels' in meta)}.bin", dtype=meta["dtype"], count=64)
        print(f"  train begins | {Tokenizer(meta['tokenizer']).decode(ids)[:100]!r}")

def main():
    parser = Parser(description=__doc__)
    parser.add("--dataset", default="numbers", help=", ".join(DATASETS))
    parser.add("--source", help="a file, files joined by commas, or a folder in the hub's own layout")
    parser.add("--data_dir", default="data", help="the data set is written to data_dir/NAME")
    parser.add("--vocab_size", type=int, low=1, high=2**24, help="ids of the trained BPE, special ones included")
    parser.add("--tokenizer", choices=["gpt2", "bytes"], help="for text, arxiv [gpt2] and imdb [bytes]")
    parser.add("--rows", type=int, low=1, high=10**9, help="use only so many training rows")
    parser.add("--seed", type=int, low=0, high=2**63, help="for what is drawn or shuffled [1337]")
    for flag, what in dict(min_len="listops: a row is longer than so many tokens; arxiv: a document has at least as many", max_len="listops: and shorter than this",
                           max_depth="listops: levels of nesting", n_links="lego: clauses of a row", n_tr="lego: links whose values are told in training",
                           n_pairs="recall: the most pairs of a row", n_keys="recall: keys, and as many values", size="pathfinder: width and height in pixels, 32 or 128").items():
        parser.add(f"--{flag}", type=int, low=int(flag != "min_len"), high=2**24, help=what)
    parser.add("--force", type=bool, default=False, help="replace a data set made with other settings")
    args = parser.parse_args()
    if args.dataset not in DATASETS:
        parser.error(unknown("data set", args.dataset, DATASETS))
    name, started = args.dataset, time.time()
    options = {key: value for key, value in vars(args).items() if key != "dataset"}
    try:
        folder = prepare(name, **options, exact=True)
    except KeyboardInterrupt:
        print("\nstopped: nothing was changed", file=sys.stderr)
        sys.exit(130)
    except SystemExit as e:
        parser.error(e.code) if str(e.code).startswith("--") else sys.exit(e.code)
    summary(folder, load_meta(folder), time.time() - started)
    print(f"next: python train.py --dataset={name}" + f" --data_dir={args.data_dir}" * (args.data_dir != "data"))

if __name__ == "__main__":
    main()
