"""
Turns a data set into a folder of token files that train.py memory-maps.

    python prepare_data.py --dataset=numbers
    python prepare_data.py --dataset=multi30k                          # from the hub
    python prepare_data.py --dataset=wmt16 --source=DIR                # from a copy in the hub's own layout
    python prepare_data.py --dataset=parallel --source=train.en,train.de
    python prepare_data.py --dataset=text --source=my.txt              # --tokenizer=bytes --name=mine
    python prepare_data.py --dataset=table --source=my.csv             # CSV, TSV, JSONL: --text=, --label=

data/NAME then holds meta.json (sizes, tokenizer, settings) and, for a decoder, train.bin, one stream; for an
encoder-decoder train.src.bin, all rows in a line, and train.src.idx, their rows + 1 int64 offsets; the same
for .tgt, val, test, and test.src.txt, the raw rows; for an encoder .src and .label.bin. Ids 0, 1, 2 are PAD,
BOS, EOS, which the loader adds; token t is stored as t + 3. To add a data set, write one function and name it
in DATASETS: its parameters are the flags that it takes.
"""
import argparse
import base64
import contextlib
import csv
import difflib
import hashlib
import importlib
import inspect
import io
import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
import unicodedata
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

FORMAT = 3
PAD, BOS, EOS, N_SPECIAL = 0, 1, 2, 3
LONGEST = 256  # tokens of a sentence and its eos
# GPT-4's way of cutting text into words before any merge, but with digits in pairs
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
           r"|\s+(?!\S)|\s+")

def need(module):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise SystemExit(f"the Python package {module} is missing: pip install {module}")

def check(ok, sentence):  # a mistake ends in one sentence that says what to change
    if not ok:
        raise SystemExit(sentence)

# ---- tokenizers ----

def plain(text):
    """A row of text as models are trained on it and asked: one blank wherever there is any white space, be it
    a tab, a no-break or an ideographic space, or a line separator; letters in their composed form; no byte
    order mark and no half of a surrogate pair."""
    text = unicodedata.normalize("NFC", "" if text is None else str(text))
    return " ".join(text.replace("\ufeff", "").split()).encode("utf-8", "replace").decode("utf-8")

def twin(text):
    """What two rows that a reader takes for one have in common, whatever invisible marks are in them."""
    return re.sub("[\u00ad\u200b-\u200f\u2060]", "", plain(text)).strip()

def pieces(text):
    """Parts of at most 50,000 characters, as a BPE gives up on a longer run; cut where a line begins, if one
    does, since tokenizers cut there too."""
    if len(text) <= 50_000:
        return [text]
    return re.findall(r"(?s).{1,50000}(?<=[^\n]\n)(?=\S)|.{1,50000}", text)

class Tokenizer:
    """Text to ids and back, made from the plain dict that meta.json and every checkpoint carry."""

    def __init__(self, spec):
        self.spec = spec
        self.words = spec.get("words")
        self.bpe = None  # without words either: bytes, or the grey values of pixels
        if spec["kind"] == "gpt2":
            try:
                self.bpe = need("tiktoken").get_encoding("gpt2")
            except Exception:
                raise SystemExit("GPT-2's BPE files cannot be fetched: point TIKTOKEN_CACHE_DIR to a folder "
                                 "that holds them, or prepare with --tokenizer=bytes")
        elif spec["kind"] == "bpe":
            ranks = {base64.b64decode(word): rank for rank, word in enumerate(spec["ranks"])}
            encoding = need("tiktoken").Encoding
            self.bpe = encoding("bpe", pat_str=spec["pattern"], mergeable_ranks=ranks, special_tokens={})
        elif spec["kind"] not in ("bytes", "pixels", "words"):
            raise ValueError(f"the tokenizer {spec['kind']} is unknown")
        self.vocab_size = N_SPECIAL + (self.bpe.n_vocab if self.bpe else len(self.words or range(256)))
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 65535 else np.uint32)

    def encode(self, text):
        if self.words:
            raw = []
            for word in text.split():
                check(word in self.words, f"{word!r} is no word of this data set: {' '.join(self.words)}")
                raw.append(self.words.index(word))
        elif self.bpe:
            raw = [t for piece in pieces(text) for t in self.bpe.encode_ordinary(piece)]
        else:
            raw = text.encode("utf-8", "replace")
        return [t + N_SPECIAL for t in raw]

    def decode(self, ids):
        raw = [int(i) - N_SPECIAL for i in ids if N_SPECIAL <= i < self.vocab_size]
        if self.words:
            return " ".join(self.words[t] for t in raw)
        joined = self.bpe.decode_bytes(raw) if self.bpe else bytes(raw)
        return joined.decode("utf-8", errors="replace")

    def encode_rows(self, texts, label):
        texts = tqdm(texts, f"tokenize {label}", unit="row", leave=False)
        return [np.array(self.encode(text), self.dtype) for text in texts]

def train_bpe(sides, vocab_size):  # joint: names and numbers, alike in both languages, get the same ids
    check(vocab_size >= 259, f"--vocab_size={vocab_size} is too small: 256 bytes and 3 special ids make 259")
    bpe = need("rustbpe").Tokenizer()
    texts = [piece for side in sides for text in side for piece in pieces(text)]
    with tqdm(texts, "train bpe", unit="row", leave=False) as bar:  # dying in there it would eat a Ctrl-C
        bpe.train_from_iterator(bar, vocab_size - N_SPECIAL, pattern=PATTERN)
    ranks = sorted(bpe.get_mergeable_ranks(), key=lambda pair: pair[1])
    words = [base64.b64encode(bytes(word)).decode() for word, _ in ranks]
    return {"kind": "bpe", "pattern": PATTERN, "ranks": words}

# ---- reading ----
def read_text(path):  # a UTF-8 file without its byte order mark
    try:
        return Path(path).read_bytes().decode("utf-8").removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError) as e:
        raise SystemExit(f"{path} cannot be read, or is not UTF-8, to which iconv converts it ({e})")

def first_gap(a, b):  # where two sides part: lengths of true pairs go together, of shifted ones they do not
    x, y = (np.log1p([len(row) for row in side[:min(len(a), len(b))]]) for side in (a, b))
    shift = np.median(x - y)
    by_chance = np.abs(x - np.random.default_rng(0).permutation(y) - shift).mean()
    # up to the gap most rows are nearer than chance would have them, behind it they are not
    nearer = 0.75 * by_chance - np.abs(x - y - shift)
    return int(np.argmax(np.cumsum(np.r_[0, nearer])))

def json_rows(whole):
    def number(digits):  # the label 1.0 is the label 1
        value = float(digits)
        return int(value) if value.is_integer() else value
    for line in filter(str.strip, whole.split("\n")):
        yield json.loads(line, parse_float=number, parse_constant=lambda name: None)  # NaN is no label

def hub(source, repo, files, get, revision=None):
    """{split: list of get(row)} from the JSONL or Parquet files that match files[split], in a folder in the
    hub's layout or in the hub."""
    if source is None:
        try:  # without a network this takes what an earlier call has fetched
            fetch = need("huggingface_hub").snapshot_download
            source = fetch(repo, repo_type="dataset", revision=revision, allow_patterns=list(files.values()))
        except Exception as e:
            why = textwrap.shorten(str(e), 150)
            raise SystemExit(f"{repo} cannot be fetched ({why}): name a local copy with --source=DIR")
    splits = {}
    for split, pattern in files.items():
        paths = sorted(Path(source).glob(pattern))
        check(paths, f"{source} has no {pattern}: --source must be a copy of {repo} in the hub's own layout")
        splits[split] = []
        for path in tqdm(paths, f"read {split}", unit="file", leave=False):
            try:
                if path.suffix == ".jsonl":
                    rows = json_rows(read_text(path))
                else:
                    batches = need("pyarrow.parquet").ParquetFile(path).iter_batches(1000)
                    rows = (row for batch in batches for row in batch.to_pylist())
                splits[split] += map(get, rows)
            except Exception as e:
                why = textwrap.shorten(f"{type(e).__name__}: {e}", 150)
                raise SystemExit(f"{path}: its rows cannot be read or lack a field ({why})")
    return splits

def hub_with_val(source, repo, get, seed, rows):  # a tenth of train becomes val: test chooses nothing
    splits = hub(source, repo, {split: f"plain_text/{split}-*.parquet" for split in ("train", "test")}, get)
    pairs = splits["train"]
    k = max(1, len(pairs) // 10)
    order = np.random.default_rng(seed).permutation(len(pairs))
    splits["train"] = [pairs[i] for i in order[k:][:rows]]
    splits["val"] = [pairs[i] for i in order[:k]]
    return splits

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

def lock(path, advice=None):
    """Hold path until the file that is returned is closed or this process ends, however it ends. Where
    another one holds it: say which, and end with the advice, or without advice wait. A platform or a disk
    without locks holds nothing."""
    file = open(path, "a+", encoding="utf-8")
    try:
        import fcntl  # not on Windows
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, no forked child inherits it
    except BlockingIOError:
        time.sleep(0.5)  # until its name is there
        file.seek(0)
        holder = f"{path} is held by {file.read() or 'another process'}"
        check(not advice, f"{holder}: {advice}")
        print(f"{holder}: waiting for it", flush=True)
        fcntl.lockf(file, fcntl.LOCK_EX)
    except (ImportError, OSError):
        pass
    if not (os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path))):
        return lock(path, advice)  # its last holder has removed it
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file

def writable(path):  # the type of a flag that names a file to write: found out before the work, not after it
    if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written")
    return path

def comma_separated(text):  # the type of a flag that takes lengths: 512,1024 -> [512, 1024]
    if not re.fullmatch(r"[1-9]\d{0,7}(,[1-9]\d{0,7})*", text):
        raise argparse.ArgumentTypeError(f"{text} must be numbers of tokens, joined by commas")
    return [int(t) for t in text.split(",")]

def write_ragged(out, stem, rows, dtype):
    """Rows of any length in one line, and where each begins."""
    np.concatenate(rows).astype(dtype).tofile(out / f"{stem}.bin")
    np.cumsum([0, *map(len, rows)], dtype=np.int64).tofile(out / f"{stem}.idx")

def bleu_tokenizer(texts):
    """sacreBLEU's tokenizer for this script: its own, 13a, takes a line of Chinese or Thai for one word."""
    letters = "".join(texts)
    han = len(re.findall("[\u3400-\u9fff\U00020000-\U0003ffff]", letters))
    # Thai, Lao, Tibetan, Burmese; Khmer; kana
    others = len(re.findall("[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff]", letters))
    if han + others < len(letters) / 3:
        return "13a"
    return "zh" if others < han / 10 else "char"

def tidy(splits):  # {split: pairs of plain text}, both there, and {what was left out: how many}
    full, skipped = {}, {}
    for split, pairs in splits.items():
        pairs = [tuple(map(plain, pair)) for pair in pairs]
        full[split] = [pair for pair in pairs if all(map(twin, pair))]
        check(full[split], f"no row of {split} has text on both sides")
        skipped[f"{split}: one side empty"] = len(pairs) - len(full[split])
    return full, skipped

def own(splits, seed, held_out):
    """tidy for a user's own rows: test and val are drawn from train where they are not given, and what stands
    in them is trained on nowhere, as its source leaves train with all its twins."""
    splits, skipped = tidy(splits)
    missing = [split for split in ("test", "val") if split not in splits]
    check(missing or not held_out, "--held_out is for what is drawn from train: leave it out")
    train = splits.pop("train")
    held = {twin(source) for pairs in splits.values() for source, _ in pairs}
    first = {}  # of the rows with the same source
    for row in train:
        if twin(row[0]) not in held:
            first.setdefault(twin(row[0]), row)
    k = held_out or max(1, min(2000, len(first) // 10))
    check(k * len(missing) < len(first), f"{len(first)} different rows are too few to train on and to hold "
          f"out {k} for each of val and test: give more, or lower --held_out")
    order = np.random.default_rng(seed).permutation(len(first))
    rows = list(first.values())
    for split in missing:
        splits[split] = [rows[i] for i in order[:k]]
        held.update(twin(source) for source, _ in splits[split])
        order = order[k:]
    kept = [row for row in train if twin(row[0]) not in held]
    twins = len(train) - len(kept) - k * len(missing)
    skipped["train: same source as a row of val or test, left out"] = twins
    return {"train": kept, "val": splits["val"], "test": splits["test"]}, skipped

def write_encdec(out, metric, splits, skipped, vocab_size=None, limit=None, spec=None):
    """From {split: tidy pairs} to files of tokens, those of spec or of a BPE of vocab_size, for limit rows of
    train. One with a side of LONGEST tokens leaves train; in the other splits the loader cuts it."""
    splits["train"] = splits["train"][:limit]
    sources, targets = zip(*splits["train"])
    bleu = bleu_tokenizer(targets)
    tok = Tokenizer(spec or train_bpe((sources, targets), vocab_size))
    stats = {}
    for split, pairs in splits.items():
        src, tgt = zip(*pairs)
        rows = list(zip(tok.encode_rows(src, f"{split}.src"), tok.encode_rows(tgt, f"{split}.tgt")))
        if split == "train":
            short = [pair for pair in rows if max(map(len, pair)) < LONGEST]
            check(short, f"no train row is shorter than {LONGEST} tokens")
            skipped["train: longer than block_size"] = len(rows) - len(short)
            rows = short
        if metric == "bleu":
            scorer = need("sacrebleu").metrics.BLEU(tokenize=bleu)
            copied = scorer.corpus_score(src[:2000], [tgt[:2000]]).score
        else:
            copied = float(np.mean([a == b for a, b in pairs]))
        sides = list(zip(*rows))
        stats[split] = {"rows": len(rows), "tokens": [sum(map(len, ids)) for ids in sides],
                        "longest": [max(map(len, ids)) for ids in sides],
                        "trivial": {"copy the source": copied}}
        for side, texts, ids in zip(("src", "tgt"), (src, tgt), sides):
            write_ragged(out, f"{split}.{side}", ids, tok.dtype)
            if split != "train":
                (out / f"{split}.{side}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    longest = max(max(stats[split]["longest"]) for split in ("train", "val", "test"))  # not long's
    size = min(longest // 8 * 8 + 8, LONGEST)  # the row and one special id, in multiples of 8
    ratio = stats["train"]["tokens"][0] / stats["train"]["tokens"][1]
    return dict(arch="encdec", metric=metric, tokenizer=tok, block_size=size, splits=stats, skipped=skipped,
                ratio=ratio, bleu_tokenizer=bleu)

def write_labelled(out, tok, splits, block_size, classes=(), arch="encoder", **meta):
    """From {split: (rows of ids, labels)} to files. A label is a row's, or a row of labels stands beside its
    tokens (-1: nothing is asked there), and behind them such rows of groups, by which the accuracy is split.
    A long row is the loader's to cut."""
    stats = {}
    for split, (rows, labels, *groups) in splits.items():
        kind = "token" if np.ndim(labels[0]) else "row"
        labels = np.hstack(labels)
        write_ragged(out, f"{split}.src", rows, tok.dtype)
        labels.astype(np.int32).tofile(out / f"{split}.label.bin")
        if groups:
            np.hstack(groups[0]).astype(np.int32).tofile(out / f"{split}.group.bin")
        asked = labels[labels >= 0]
        if split == "train":
            most = np.bincount(asked).argmax()
        lengths = list(map(len, rows))
        stats[split] = {"rows": len(rows), "tokens": sum(lengths), "longest": max(lengths),
                        "trivial": {"majority class": float((asked == most).mean())}}
    if classes:
        meta.update(classes=classes, n_classes=len(classes))
    return dict(arch=arch, metric="acc", tokenizer=tok, block_size=block_size, splits=stats, labels=kind,
                **meta)

# ---- the data sets: each writes its files into `out` and returns its share of meta.json ----
EN = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
      "seventeen eighteen nineteen").split()
EN_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
DE = ("null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn "
      "sechzehn siebzehn achtzehn neunzehn").split()
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
    """English number names to German: "twenty-one" to "einundzwanzig", so units and tens change places. Split
    long: 500 numbers of 7 to 9 digits, beyond the trained range."""
    rng, held = np.random.default_rng(seed), np.zeros(10**6, bool)
    val, test = [], []
    for digits in (3, 4, 5, 6):  # below 100 nothing is held out: a word that was never seen cannot be guessed
        values = rng.permutation(np.arange(10**(digits - 1), 10**digits))
        if digits == 3:
            values = np.r_[421, values[values != 421]]  # the documented example is always in test
        values = values[:len(values) // 20]
        held[values] = True
        k = min(len(values) // 2, (1000 - len(test)) // (7 - digits))  # few have three digits, others fill up
        test += values[:k].tolist()
        val += values[k:2 * k].tolist()
    val = rng.permutation(val)  # any first rows are a fair sample
    test = test[:1] + rng.permutation(test[1:]).tolist()
    digits = rng.integers(7, 10, 500)
    far = rng.integers(10**(digits - 1), 10**digits)
    # a digit more is twice as likely: the short ones are soon known, the long ones hold all the combinations
    digits = rng.choice(np.arange(1, 7), rows, p=2.0 ** np.arange(6) / 63)
    low = np.where(digits == 1, 0, 10**(digits - 1))
    train = rng.integers(low, 10**digits)
    while (bad := held[train]).any():
        train[bad] = rng.integers(low[bad], 10**digits[bad])
    splits = {"train": train, "val": val, "test": test, "long": far}
    for split, values in splits.items():
        splits[split] = [(en(n), de(n)) for n in map(int, values)]
    return write_encdec(out, "exact", splits, {}, spec={"kind": "bytes"})

STEMS = {"train": "train", "val": "validation", "test": "test"}  # what the hub calls them

# 4,000: in 29,000 captions a rarer token is not learned, and its table would outweigh a small model
def multi30k(out, source=None, vocab_size=4000, rows=None, tokenizer_from=None):
    """Multi30k image captions, English to German; test is test_2016_flickr, raw and cased."""
    files = {split: f"{split}.jsonl" for split in ("train", "val", "test")}
    splits = hub(source, "bentrevett/multi30k", files, lambda row: (row["en"], row["de"]))
    return write_encdec(out, "bleu", *tidy(splits), vocab_size, rows, tokenizer_from)

def wmt16(out, source=None, vocab_size=16_000, rows=None, tokenizer_from=None):
    """WMT16, English to German."""
    files = {split: f"de-en/{stem}-*.parquet" for split, stem in STEMS.items()}
    splits = hub(source, "wmt/wmt16", files, lambda row: [row["translation"][x] for x in ("en", "de")])
    return write_encdec(out, "bleu", *tidy(splits), vocab_size, rows, tokenizer_from)

def parallel(out, source, vocab_size=None, seed=1337, rows=None, held_out=None, tokenizer_from=None):
    """Your own two files whose lines belong together; the first is translated into the second."""
    paths, splits = source.split(","), {}
    check(len(paths) in (2, 6), f"--source={source}: give train.en,train.de or these, val.* and test.* (six)")
    for split, a, b in zip(("train", "val", "test"), paths[::2], paths[1::2]):
        # not splitlines(): it also cuts at rare separators inside a row, and the two sides would drift apart
        src, tgt = (read_text(path).removesuffix("\n").split("\n") for path in (a, b))
        if len(src) != len(tgt):
            raise SystemExit(f"{a} has {len(src)} lines and {b} has {len(tgt)}: they seem to part near line "
                             f"{first_gap(src, tgt) + 1}")
        splits[split] = list(zip(src, tgt))
    splits, skipped = own(splits, seed, held_out)
    letters = sum(len(text) for pair in splits["train"][:rows] for text in pair)
    vocab_size = vocab_size or min(8000, 259 + letters // 1000)  # more are not learned
    return write_encdec(out, "bleu", splits, skipped, vocab_size, rows, tokenizer_from)

def cut_in_three(whole):
    """90 % train, 5 % val, 5 % test, cut at line breaks, and how many lines left train as they stand in val
    or test too. One of fewer than 20 characters, a name perhaps, may stand anywhere."""
    start, parts = 0, {}
    for split, percent in (("train", 90), ("val", 95), ("test", 100)):
        end = len(whole) * percent // 100
        if split != "test":
            end = whole.rfind("\n", max((start + end) // 2, end - 10_000), end) + 1 or end
        parts[split] = whole[start:end]
        start = end
    held = {twin(line) for split in ("val", "test") for line in parts[split].splitlines()}
    lines = parts["train"].splitlines(keepends=True)
    kept = [line for line in lines if len(twin(line)) < 20 or twin(line) not in held]
    return {**parts, "train": "".join(kept)}, len(lines) - len(kept)

def text(out, source, tokenizer="gpt2", tokenizer_from=None):
    """Any plain text, for a decoder: a file, files joined by commas, or a folder of *.txt, cut in three in
    their order. A folder with train.txt, val.txt and test.txt is split already."""
    tok = Tokenizer(tokenizer_from or {"kind": tokenizer})
    paths, parts, twins = source.split(","), {}, 0
    if Path(source).is_dir():
        paths = sorted(Path(source).glob("*.txt"))
        check(paths, f"{source} has no *.txt")
        parts = {path.stem: read_text(path) for path in paths if path.stem in ("train", "val", "test")}
        check(len(parts) in (0, 3), f"{source} has only {', '.join(parts)} of train, val and test.txt")
    if not parts:
        parts, twins = cut_in_three("\n".join(map(read_text, paths)))
    sizes, stats = {}, {}
    for split in ("train", "val", "test"):
        ids = np.concatenate(tok.encode_rows(pieces(parts[split]), split))
        check(len(ids) > 256, f"{source} is too short: its {split} split has {len(ids)} tokens and needs 257 "
              f"({twins} lines of train, which stand in val or test, were left out)")
        ids.tofile(out / f"{split}.bin")
        if split == "train":
            seen = np.bincount(ids, minlength=tok.vocab_size)[N_SPECIAL:] + 1
        bits = -np.log2(seen / seen.sum())[ids - N_SPECIAL]
        sizes[split] = len(parts[split].encode("utf-8"))
        stats[split] = {"rows": 1, "tokens": len(ids), "longest": len(ids),
                        "trivial": {"token frequencies": float(bits.sum() / sizes[split])}}
    return dict(arch="decoder", metric="bpb", tokenizer=tok, block_size=256, splits=stats, bytes=sizes,
                skipped={"train: lines that stand in val or test, left out": twins})

def bag_of_words(splits):
    """TF-IDF + logistic regression, from {split: (texts, labels)} to {split: accuracy}."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        words, line = TfidfVectorizer(token_pattern=r"\w+"), LogisticRegression(max_iter=1000)
        line.fit(words.fit_transform(splits["train"][0]), splits["train"][1])
        return {split: line.score(words.transform(texts), y) for split, (texts, y) in splits.items()}
    except (ImportError, ValueError):  # not installed; no words, or one class only
        return {}

def write_texts(out, spec, splits, block_size, classes, min_len=1, skipped={}):
    """From {split: [(text, label)]} to files, without the texts of fewer than min_len tokens."""
    tok, skipped, known, longest = Tokenizer(spec), dict(skipped), {}, 0
    for split, pairs in splits.items():
        texts = [plain(text) for text, _ in pairs]
        rows = tok.encode_rows(texts, split)
        keep = [i for i, row in enumerate(rows) if len(row) >= min_len]
        check(keep, f"no text of {split} has {min_len} tokens or more")
        skipped[f"{split}: fewer than {min_len} tokens, left out"] = len(rows) - len(keep)
        labels = [pairs[i][1] for i in keep]
        check(0 <= min(labels) <= max(labels) < len(classes), f"{split} has labels that are none of the "
              f"{len(classes)} classes")
        splits[split] = [rows[i] for i in keep], labels
        known[split] = [texts[i] for i in keep], labels
        longest = max(longest, *map(len, rows))
    meta = write_labelled(out, tok, splits, min(block_size, longest // 8 * 8 + 8), classes, skipped=skipped)
    for split, accuracy in bag_of_words(known).items():
        meta["splits"][split]["trivial"]["TF-IDF + logistic regression"] = accuracy
    return meta

def csv_rows(path, whole):
    head, *lines = filter(str.strip, whole.split("\n"))
    tabs = head.count("\t")
    quoting = csv.QUOTE_MINIMAL
    if '"' not in head and tabs and all(line.count("\t") == tabs for line in lines):
        quoting = csv.QUOTE_NONE  # in a TSV whose lines are its rows a quotation mark is one of the text's
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(io.StringIO(whole, newline=""), delimiter=max(",;\t", key=head.count),
                          quoting=quoting, skipinitialspace=True, strict=True)
    rows.fieldnames = [name.strip() for name in rows.fieldnames]
    for i, row in enumerate(rows, 1):
        fits = None not in row and None not in row.values()
        check(fits, f"{path}: row {i} has more or fewer fields than the first line names")
        yield row

def read_table(path, *columns):
    """Columns of a JSONL, CSV or TSV file, a list a row; which of these it is shows in its first line."""
    whole = read_text(path).lstrip("\r\n")
    check(whole.strip(), f"{path} is empty")
    rows = []
    try:
        for row in json_rows(whole) if whole.startswith("{") else csv_rows(path, whole):
            rows.append([row.get(column) for column in columns])
    except (ValueError, AttributeError, RecursionError, csv.Error) as e:
        raise SystemExit(f"{path}: row {len(rows) + 1} cannot be read ({e})")
    for i, column in enumerate(columns):
        check(any(plain(row[i]) for row in rows), f"{path} has no {column} in its rows, it begins "
              f"{whole[:100]!r}: name the columns with --text= and --label=, a row a line")
    return rows

def table(out, source, text="text", label="label", tokenizer="bytes", tokenizer_from=None, seed=1337,
          rows=None, held_out=None):
    """Your own labelled texts: train.csv, or train.csv,test.csv, or train.csv,val.csv,test.csv."""
    paths = source.split(",")
    check(len(paths) <= 3, f"--source names {len(paths)} files: give train.csv, or with it val.csv, test.csv")
    names = [("train",), ("train", "test"), ("train", "val", "test")][len(paths) - 1]
    splits = {split: read_table(path, text, label) for split, path in zip(names, paths)}
    splits, skipped = own(splits, seed, held_out)
    splits["train"] = splits["train"][:rows]
    trained = {name for _, name in splits["train"]}
    check(1 < len(trained) <= max(2, len(splits["train"]) // 2), f"{len(trained)} different labels in "
          f"{len(splits['train'])} rows of train teach nothing: is --label={label} the right column?")
    classes = {name for pairs in splits.values() for _, name in pairs}
    classes = sorted(classes, key=lambda name: (name.isdigit() * len(name), name))  # 2 before 10
    for split, pairs in splits.items():
        splits[split] = [(words, classes.index(name)) for words, name in pairs]
    if len(classes) > len(trained):
        never = ", ".join(name for name in classes if name not in trained)
        print(f"warning: train has no row of the labels {never}")
    return write_texts(out, tokenizer_from or {"kind": tokenizer}, splits, 1024, classes, skipped=skipped)

def labelled(row):
    return row["text"], int(row["label"])

def imdb(out, source=None, seed=1337, rows=None, tokenizer="bytes", tokenizer_from=None):
    """IMDB reviews as bytes or GPT-2's BPE, negative or positive."""
    splits = hub_with_val(source, "stanfordnlp/imdb", labelled, seed, rows)
    return write_texts(out, tokenizer_from or {"kind": tokenizer}, splits, 1024, ["negative", "positive"])

def arxiv(out, source=None, rows=None, tokenizer="gpt2", tokenizer_from=None, min_len=1):
    """Long papers of 11 arXiv categories (He et al. 2019), the no_ref rows, as the others spell the class in
    the text. --min_len keeps the longest documents only (WERSA's ArXiv-128k)."""
    files = {split: f"no_ref/{stem}/*.parquet" for split, stem in STEMS.items()}
    splits = hub(source, "ccdv/arxiv-classification", files, labelled, revision="refs/convert/parquet")
    splits["train"] = splits["train"][:rows]
    classes = "math.AC cs.CV cs.AI cs.SY math.GR cs.CE cs.PL cs.IT cs.DS cs.NE math.ST".split()
    return write_texts(out, tokenizer_from or {"kind": tokenizer}, splits, 4096, classes, min_len)

def write_images(out, splits, classes):
    """From {split: (images (n, size, size), labels)} to rows of pixels."""
    for split, (images, labels) in splits.items():
        pixels = np.array(images, np.uint16) + N_SPECIAL
        size = pixels.shape[1]
        splits[split] = pixels.reshape(-1, size * size), labels
    tok = Tokenizer({"kind": "pixels"})
    return write_labelled(out, tok, splits, size * size, classes, image=[size, size])

def cifar10(out, source=None, seed=1337, rows=None):
    """CIFAR-10 as rows of 1,024 grey pixels, read line by line (Long Range Arena's Image)."""
    image = need("PIL.Image")
    def get(row):
        picture = image.open(io.BytesIO(row["img"]["bytes"]))
        return np.asarray(picture.convert("L").resize((32, 32)), np.uint8), int(row["label"])
    splits = hub_with_val(source, "uoft-cs/cifar10", get, seed, rows)
    splits = {split: tuple(zip(*pairs)) for split, pairs in splits.items()}
    return write_images(out, splits, "airplane automobile bird cat deer dog frog horse ship truck".split())

def listops_row(draw, max_len, max_depth):
    """A nested list and its value; one that gets too long ends before its end. 0-9 are digits, 10-13 are
    operators, 14 is the closing bracket; draw() gives a number below 1."""
    row = bytearray()
    def grow(depth):
        if len(row) >= max_len:
            return 0
        if depth > 1 and not (depth < max_depth and draw() < 0.25):
            row.append(int(10 * draw()))
            return row[-1]
        op = int(4 * draw())
        count = 2 + int(9 * draw())
        row.append(10 + op)
        args = sorted(grow(depth + 1) for _ in range(count))
        row.append(14)
        median = (args[(count - 1) // 2] + args[count // 2]) // 2
        return (args[0], args[-1], median, sum(args) % 10)[op]
    value = grow(1)
    return bytes(row), value

def listops(out, seed=1337, rows=96_000, min_len=500, max_len=2000, max_depth=10, test_rows=2000):
    """Nested lists of digits, what is their value? The grammar of Long Range Arena (arXiv 2011.04006): an
    argument is an operator with probability 1/4, of 2 to 10 arguments. Split long: twice as long."""
    check(1 <= min_len < max_len, "--min_len and --max_len: a row needs 1 <= min_len < max_len")
    check(2 <= max_depth <= 100, "--max_depth must be 2 to 100")
    draw, seen, splits = random.Random(seed).random, set(), {}
    def fill(split, count, low, high):  # with so many rows of low < tokens < high, all different
        found, values, idle = [], [], 0
        with tqdm(total=count, desc=f"draw {split}", unit="row", leave=False) as bar:
            while len(found) < count:
                row, value = listops_row(draw, high, max_depth)
                idle += 1
                check(idle < 100_000, f"the grammar gives only {len(found)} different rows of {low} to "
                      f"{high} tokens with --max_depth={max_depth}: ask for fewer, or for other lengths")
                if low < len(row) < high and row not in seen:
                    idle = 0
                    seen.add(row)
                    found.append(np.frombuffer(row, np.uint8) + N_SPECIAL)
                    values.append(value)
                    bar.update()
        splits[split] = found, np.array(values)
    fill("train", rows, min_len, max_len)
    fill("val", max(1, min(2000, rows // 8)), min_len, max_len)
    fill("test", test_rows, min_len, max_len)
    with contextlib.suppress(SystemExit):  # so shallow a tree may not get twice as long
        fill("long", -(-test_rows // 2), max_len, 2 * max_len)
    digits = [str(d) for d in range(10)]
    spec = {"kind": "words", "words": [*digits, "[MIN", "[MAX", "[MED", "[SM", "]"]}
    meta = write_labelled(out, Tokenizer(spec), splits, max_len, digits)
    # what the first operator alone tells: its most frequent value in train
    votes = np.zeros((20, 10))
    for row, value in zip(*splits["train"]):
        votes[row[0], value] += 1
    for split, (rows, values) in splits.items():
        guesses = votes.argmax(1)[[row[0] for row in rows]]
        meta["splits"][split]["trivial"]["root operator"] = float((guesses == values).mean())
    return meta

def lego(out, seed=1337, rows=50_000, n_links=12, n_tr=6, test_rows=2000):
    """A chain of signs told in any order: "b = - a ; a = + 1 ;", what is each letter? (arXiv 2206.04301.) In
    train and val only its first n_tr links are asked for, in test all; split long has twice the links."""
    check(1 <= n_tr <= n_links <= 26, "--n_tr and --n_links: 1 <= n_tr <= n_links <= 26, a letter a link")
    rng, splits = np.random.default_rng(seed), {}
    words = [*"abcdefghijklmnopqrstuvwxyz=+-1;"]
    equals, plus, one, end = (words.index(word) for word in "=+1;")
    longer = min(26, 2 * n_links)
    for split, count, links, asked in (("train", rows, n_links, n_tr), ("val", 1000, n_links, n_tr),
                                       ("test", test_rows, n_links, n_links),
                                       ("long", -(-test_rows // 2), longer, longer)):
        names = rng.random((count, 26)).argsort(1)[:, :links]
        minus = rng.integers(0, 2, (count, links))
        clauses = np.full((count, links, 5), [0, equals, plus, one, end])
        clauses[..., 0] = names
        clauses[..., 2] += minus
        clauses[:, 1:, 3] = names[:, :-1]
        label, group = np.full(clauses.shape, -1), np.zeros(clauses.shape, int)
        label[:, :asked, 0] = minus.cumsum(1)[:, :asked] % 2
        group[..., 0] = np.arange(links) + 1
        order = rng.random(names.shape).argsort(1)[..., None]
        splits[split] = []
        for values in (clauses + N_SPECIAL, label, group):  # told in another order
            splits[split].append(np.take_along_axis(values, order, 1).reshape(count, -1))
    tok = Tokenizer({"kind": "words", "words": words})
    return write_labelled(out, tok, splits, 5 * n_links, ["+1", "-1"], pool="token", groups="link",
                          asked_every=5)

def recall(out, seed=1337, rows=50_000, n_pairs=32, n_keys=128, test_rows=2000):
    """Multi-query associative recall (arXiv 2312.04927): "k7 v3 k1 v9 ...", then every key again, in any
    order, for its value. 1, 2, 4, ... n_pairs pairs a row; split long has 2 and 4 times n_pairs."""
    check(1 <= n_pairs <= n_keys, "--n_pairs and --n_keys: 1 <= n_pairs <= n_keys, as a key has one value")
    rng, splits, chance = np.random.default_rng(seed), {}, {}
    powers = [2**i for i in range(n_pairs.bit_length())]
    cases = [("train", rows, powers), ("val", 1000, powers), ("test", test_rows, powers)]
    if 2 * n_pairs <= n_keys:
        cases.append(("long", -(-test_rows // 2), [p for p in (2 * n_pairs, 4 * n_pairs) if p <= n_keys]))
    for split, count, sizes in cases:
        pairs = rng.choice(sizes, count)
        ids, label, group = [], [], []
        for p in pairs:
            told = np.stack((rng.permutation(n_keys)[:p], n_keys + rng.integers(0, n_keys, p)), 1)
            again = rng.permutation(told)
            ids.append(np.r_[told.ravel(), again.ravel()[:-1]] + N_SPECIAL)  # nothing is asked after the last
            label.append(np.full(4 * p - 1, -1))
            label[-1][2 * p::2] = again[:, 1] + N_SPECIAL
            group.append(np.full(4 * p - 1, p))
        splits[split] = ids, label, group
        chance[split] = float(count / pairs.sum())  # one of p values, p times a row
    spec = {"kind": "words", "words": [f"{letter}{i}" for letter in "kv" for i in range(n_keys)]}
    meta = write_labelled(out, Tokenizer(spec), splits, 4 * n_pairs, arch="decoder", groups="pairs")
    for split in splits:
        meta["splits"][split]["trivial"] = {"a value of the row": chance[split]}
    return meta

# size: length and thickness of a dash, gaps (the wide one fits less often), distance kept between contours
# and between the first ends of the two long ones, radius of a disc, continuity (turns are below a right angle
# / continuity), short contours, brightness
PATHFINDER = {32: (2, 0.5, (1.15,), 3.75, 7, 1.5, 1.0, 5, 1.0),
              128: (5, 1.5, (4, 6, 6, 6), 10, 20, 3, 1.8, 8, 0.9)}
LONG, SHORT, NOWHERE = 14, 14 // 3, 1e4  # dashes in a contour; the place of those that were dropped

def pathfinder_layouts(rng, size, tries=1024):
    """Both ends of all dashes as x + iy, a row for each of the tries in which both long contours had room."""
    length, thick, gaps, clearance, apart, radius, continuity, n_short, _ = PATHFINDER[size]
    unit = np.exp(2j * np.pi * np.arange(64) / 64).round(6).astype(np.complex64)  # alike on every machine
    turns = np.arange(-16, 17)
    odds = np.cos(np.pi / 2 * np.minimum(abs(turns) * continuity / 16, 1)) ** 2
    odds /= odds.sum()
    n = 2 * LONG + SHORT * n_short  # the dashes of the long contours alternate, then come the short ones
    before = np.arange(n) - np.where(np.arange(n) < 2 * LONG, 2, 1)
    before[:2] = before[2 * LONG::SHORT] = -1
    room = np.full((n, 2), clearance / 2, np.float32)
    room[:2, 0] += radius - thick / 2  # a disc may go there
    room[2 * LONG - 2:2 * LONG, 1] += radius - thick / 2
    gap = rng.choice(gaps, (tries, 1)).astype(np.float32)
    ends, heading = np.full((tries, n, 2), NOWHERE, np.complex64), np.zeros((tries, n), np.int64)
    def inside(z):
        return (z.real > 1) & (z.real < size - 2) & (z.imag > 1) & (z.imag < size - 2)
    # a block of dashes that fails is grown again, 8 times, then the try (if short: that contour) is dropped
    for block in np.split(np.arange(n), [*range(8, 2 * LONG, 8), *range(2 * LONG, n, SHORT)]):
        todo = np.arange(len(ends))
        for _ in range(8):
            if not len(todo):
                break
            e, h, g = ends[todo], heading[todo], gap[todo]
            each, shape = np.arange(len(todo)), (len(todo), 12)
            for j in block:  # of 12 candidates the first that fits, rather one not about to reach the border
                if before[j] >= 0:
                    last = h[:, before[j], None]
                    new = (last + rng.choice(turns, shape, p=odds)) % 64
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
                best = (fits * np.where(inside(dash[..., 1] + length * unit[new]), 2, 1)).argmax(1)
                e[:, j] = np.where(fits[each, best][:, None], dash[each, best], NOWHERE)
                h[:, j] = new[each, best]
            ok = (e[:, block, 0] != NOWHERE).all(1)
            ends[todo[ok]], heading[todo[ok]] = e[ok], h[ok]
            todo = todo[~ok]
        if block[0] < 2 * LONG:
            ends, heading, gap = (np.delete(a, todo, 0) for a in (ends, heading, gap))
    return ends

def pathfinder_images(n, size=32, seed=0):
    """Pathfinder (Linsley et al. 2018) with the settings that Long Range Arena's pathfinder.py lists for its
    hard set at size 32 and for Path-X at size 128. Label 1: the two discs are on the ends of one of the two
    contours of 14 dashes. Unlike there, contours stay farther apart than a gap is wide (at 32 by gaps of 1.15
    pixels, not 2): who follows the path knows the label. n uint8 pictures, n labels; more n only append."""
    length, thick, _, _, _, radius, _, _, brightness = PATHFINDER[size]
    rng, done = np.random.default_rng(seed), 0
    images, labels = np.zeros((n, size, size), np.uint8), np.zeros(n, np.int64)
    w = int(np.ceil(max(length / 2, radius) + 1))
    square = np.arange(-w, w + 1)  # that a dash or disc is drawn in
    while done < n:
        ends = pathfinder_layouts(rng, size)
        rows = np.arange(len(ends))
        which, label = rng.integers(0, 2, (2, len(ends)))
        discs = np.stack([ends[rows, which, 0], ends[rows, 2 * LONG - 1 - (which ^ label), 1]], 1)
        strokes = np.concatenate([ends, np.stack([discs, discs], 2)], 1)  # a disc is a thick dash of length 0
        image, index = np.nonzero(strokes[..., 0] != NOWHERE)
        a, b = strokes[image, index].T[..., None, None]
        disc = (index >= ends.shape[1])[:, None, None]
        x, y = np.rint((a + b).real / 2) + square, np.rint((a + b).imag / 2) + square[:, None]
        dx, dy = (b - a).real, (b - a).imag
        along = np.clip(((x - a.real) * dx + (y - a.imag) * dy) / (length - thick) ** 2, 0, 1)
        away = np.sqrt((x - a.real - along * dx) ** 2 + (y - a.imag - along * dy) ** 2)
        edge = np.where(disc, radius, thick / 2) + 0.5
        ink = np.clip((edge - away) / np.minimum(edge, 1), 0, 1) * np.where(disc, 255, 255 * brightness)
        canvas = np.zeros((len(ends), size + 2 * w, size + 2 * w), np.uint8)
        place = image[:, None, None], y.astype(int) + w, x.astype(int) + w
        np.maximum.at(canvas, place, np.rint(ink).astype(np.uint8))
        images[done:done + len(ends)] = canvas[:n - done, w:-w, w:-w]
        labels[done:done + len(ends)] = label[:n - done]
        done += len(ends)
    return images, labels

def pathfinder(out, seed=1337, rows=160_000, size=32):
    """Are two discs on one dashed contour? Pixels line by line, at Long Range Arena's sizes 32 and 128."""
    check(size in PATHFINDER, f"--size={size} is unknown: " + " or ".join(map(str, PATHFINDER)))
    splits, held, part = {}, max(1, min(20_000, rows // 8)), 2000
    pool = ProcessPoolExecutor(None, get_context("fork"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        for number, (split, count) in enumerate((("train", rows), ("val", held), ("test", held))):
            # each part has a seed of its own: the number of cores changes nothing
            parts = [(min(part, count - at), size, [seed, number, at]) for at in range(0, count, part)]
            drawn = pool.map(pathfinder_images, *zip(*parts))
            drawn = tqdm(drawn, f"draw {split}", len(parts), leave=False, unit=f" * {part} images")
            splits[split] = [np.concatenate(side) for side in zip(*drawn)]
    finally:
        pool.shutdown(cancel_futures=True)
    return write_images(out, splits, ["apart", "connected"])

DATASETS = {data_set.__name__: data_set for data_set in (
    numbers, multi30k, wmt16, text, parallel, table, listops, lego, recall, pathfinder, imdb, cifar10, arxiv)}

# ---- what train.py and sample.py import ----
def crc32(path):
    return zlib.crc32(np.memmap(path, np.uint8, "r")) if os.path.getsize(path) else 0

def checksum(meta):  # of all of meta.json but itself
    rest = {key: value for key, value in meta.items() if key != "checksum"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())

def plausible(meta):
    """May train.py trust what a well-formed meta.json claims, whoever wrote it?"""
    tok = Tokenizer(meta["tokenizer"])
    fine = [meta["vocab_size"] == tok.vocab_size,
            meta["dtype"] == tok.dtype.name,
            1 <= meta["block_size"] <= 2**24,
            meta["arch"] in ("encdec", "encoder", "decoder"),
            meta["metric"] in ("exact", "bleu", "bpb", "acc"),
            meta.get("bleu_tokenizer", "13a") in ("13a", "zh", "char"),
            meta["arch"] != "encoder" or meta["n_classes"] == len(meta["classes"])]
    for split in {"train", "val", "test"} | meta["splits"].keys():
        s = meta["splits"][split]
        fine.append(min(s["rows"], *np.ravel(s["tokens"]), *np.ravel(s["longest"])) >= 1)
        fine.append(all(score >= 0 for score in s["trivial"].values()))
    return all(fine)

def load_meta(folder):
    """meta.json of a data set whose files are all there and unchanged."""
    folder, why = Path(folder), "is damaged"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            why = f"has format {meta['format']} and this code reads {FORMAT}"
        elif meta["checksum"] == checksum(meta) and plausible(meta):
            bad = [name for name, (_, crc) in meta["files"].items() if crc32(folder / name) != crc]
            why = f"is damaged, {bad[0]} is not what was written" if bad else None
    except (FileNotFoundError, NotADirectoryError) as e:
        why = f"is no whole data set, {e.filename} is missing"
    except Exception:  # as many as there are ways to be no meta.json
        pass
    flag = "dataset" if folder.name in DATASETS else "dataset=... --name"
    check(not why, f"{folder} {why}: make it anew with python prepare_data.py --{flag}={folder.name} "
          f"--data_dir={folder.parent} --force")
    return meta

def read_ragged(folder, stem, dtype, vocab_size=2**32):
    """Tokens and offsets, so that row i is tokens[offsets[i]:offsets[i + 1]]; without .idx all is one row."""
    path = Path(folder) / stem
    tokens = np.memmap(f"{path}.bin", dtype, "r")
    idx = np.array([0, len(tokens)])
    if os.path.exists(f"{path}.idx"):
        idx = np.memmap(f"{path}.idx", np.int64, "r")
    fine = idx[0] == 0 and idx[-1] == len(tokens) and (np.diff(idx) >= 0).all() and tokens.max() < vocab_size
    check(fine, f"{path}.idx does not say where rows begin, or {path}.bin has ids beyond its vocabulary of "
          f"{vocab_size}: prepare the data set again")
    return tokens, idx

def collate(rows, head=(), tail=(), fill=PAD, most=2**31):
    """Lists of ids -> (B, T) int64, each between head and tail, filled up to a multiple of 8, or most."""
    import torch  # here, as preparing needs none
    rows = [[*head, *row, *tail] for row in rows]
    n = max(map(len, rows))
    out = np.full((len(rows), max(n, min(n + -n % 8, most))), fill, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, :len(row)] = row
    return torch.from_numpy(out)

def open_split(folder, meta, split, T):
    """A split of a data set, its rows or windows cut to T tokens."""
    kind = Rows if meta["arch"] == "encdec" or "labels" in meta else Stream
    return kind(folder, meta, split, T)

class Rows:
    """Sentence pairs, or rows with labels, of one split, each cut to T tokens."""

    def __init__(self, folder, meta, split, T):
        self.T = T
        self.arch = meta["arch"]
        self.kind = meta.get("labels")  # of labels: row, token, or None
        self.sides = []
        for side in ("src", "tgt") if self.arch == "encdec" else ("src",):
            self.sides.append(read_ragged(folder, f"{split}.{side}", meta["dtype"], meta["vocab_size"]))
        whole = [np.diff(begin) for _, begin in self.sides]
        room = T - (self.arch != "encoder")  # for bos or eos
        self.lengths = [np.minimum(n, room) for n in whole]
        self.cut = int((np.maximum(whole[0], whole[-1]) > room).sum())
        path = Path(folder) / split
        self.groups = np.memmap(f"{path}.group.bin", np.int32, "r") if "groups" in meta else None
        self.labels = np.memmap(f"{path}.label.bin", np.int32, "r") if self.kind else None
        self.asked = self.lengths[-1] + 1  # how many targets each row has
        if self.kind == "row":
            self.asked = np.ones(len(self), dtype=int)
        elif self.kind == "token":
            before = np.r_[0, np.cumsum(self.labels >= 0)]
            begin = self.sides[0][1][:-1]
            self.asked = before[begin + self.lengths[0]] - before[begin]
        check(self.asked.all(), f"--block_size={T} cuts {(self.asked == 0).sum()} {split} rows before "
              "anything is asked in them: raise it")
        self.per_row = self.asked.mean()
        self.epoch = None

    def __len__(self):
        return len(self.lengths[0])

    def first(self, limit):
        return np.arange(min(limit, len(self)))

    def at(self, step, size, seed):
        """The rows of a step: a shuffled epoch, in pools sorted by length, cut in batches, shuffled."""
        per_epoch, pool = len(self) // size, 50 * size
        check(per_epoch, f"a step takes {size} rows, train has {len(self)}: lower --batch_size")
        epoch, i = divmod(step, per_epoch)
        if epoch != self.epoch:
            rng = np.random.default_rng([seed, epoch])
            order = rng.permutation(len(self))[:per_epoch * size]
            for start in range(0, len(order), pool):
                rows = order[start:start + pool]
                order[start:start + pool] = rows[np.lexsort([n[rows] for n in self.lengths])]
            self.epoch, self.plan = epoch, rng.permutation(order.reshape(-1, size))
        return self.plan[i]

    def cut_out(self, rows, values, side=0):
        begin, n = self.sides[side][1], self.lengths[side]
        return [values[begin[r]:begin[r] + n[r]] for r in rows]

    def batch(self, rows):
        """-> (idx, targets, src) or (idx, targets), padded at their ends, and how many targets count."""
        src = self.cut_out(rows, self.sides[0][0])
        if self.kind:
            head = [BOS] if self.arch == "decoder" else []
            return (collate(src, head, most=self.T), self.beside(rows, self.labels)), self.weight(rows)
        tgt = self.cut_out(rows, self.sides[1][0], side=1)
        idx = collate(tgt, head=[BOS], most=self.T)
        targets = collate(tgt, tail=[EOS], most=self.T)
        return (idx, targets, collate(src, tail=[EOS], most=self.T)), self.weight(rows)

    def beside(self, rows, values):
        """Labels or groups of rows: (B,), or (B, T) beside the tokens, -1 where there is none."""
        if self.kind == "row":
            import torch
            return torch.from_numpy(values[rows].astype(np.int64))
        head = [-1] if self.arch == "decoder" else []
        return collate(self.cut_out(rows, values), head, fill=-1, most=self.T)

    def weight(self, rows):
        return int(self.asked[rows].sum())

class Stream:
    """One long text: training windows of T tokens anywhere, evaluation windows side by side."""
    cut, groups = 0, None

    def __init__(self, folder, meta, split, T):
        self.T = self.per_row = T
        self.tokens, _ = read_ragged(folder, split, meta["dtype"], meta["vocab_size"])
        n = len(self.tokens)
        check(n > T, f"{folder}/{split}.bin has {n} tokens, too few for windows of {T}: lower --block_size "
              "or --eval_block_size")
        self.lengths = [np.full(len(self), T)]

    def __len__(self):
        return -(-(len(self.tokens) - 1) // self.T)

    def first(self, limit):
        return self.T * np.arange(min(limit, len(self)))

    def at(self, step, size, seed):
        return np.random.default_rng([seed, step]).integers(0, len(self.tokens) - self.T, size)

    def batch(self, starts):
        rows = [self.tokens[s:s + self.T + 1] for s in starts]
        idx = collate([row[:-1] for row in rows], most=self.T)
        return (idx, collate([row[1:] for row in rows], most=self.T)), self.weight(starts)

    def weight(self, starts):
        return int(np.minimum(self.T, len(self.tokens) - 1 - starts).sum())

def roc_auc(score, positive):
    """Area under the ROC curve: the chance that a positive row scores above a negative one, a tie is half."""
    _, at, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[at]
    n = positive.sum()
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))

def macro_f1(guess, answer):
    """The mean over classes of 2 hits / (guesses + answers), which a majority class alone does not carry."""
    each = []
    for c in np.union1d(guess, answer):
        hits = (guess == c) & (answer == c)
        each.append(2 * hits.sum() / ((guess == c).sum() + (answer == c).sum()))
    return float(np.mean(each))

def draw_curves(folders, path):
    """Runs laid over one another, one colour each, from the log.csv in their folders to a PNG."""
    from matplotlib.figure import Figure  # here, as training goes without it; of pyplot no state stays
    figure = Figure(figsize=(14, 4), layout="constrained")
    losses, metric, rate = figure.subplots(1, 3)
    losses.set(title="loss: thin in training, dots on val", yscale="log")
    losses.yaxis.set_major_formatter("{x:g}")
    losses.yaxis.set_minor_formatter("{x:g}")
    metric.set(title="metric on val")
    rate.set(title="learning rate")
    for i, folder in enumerate(folders):
        text = read_text(os.path.join(folder, "log.csv"))
        text = text[:text.rfind("\n") + 1]  # the last line may be half written
        rows = csv.DictReader(io.StringIO(text))
        check("nll" in (rows.fieldnames or ()), f"{folder}/log.csv is no log of train.py: name another")
        rows = list(rows)
        for panel, column, style in ((losses, "nll", dict(linewidth=0.7)),
                                     (losses, "val_loss", dict(marker="o")),
                                     (metric, "val_metric", dict(marker="o")), (rate, "lr", dict())):
            there = [row for row in rows if row[column]]
            steps = [int(row["step"]) for row in there]
            values = [float(row[column]) for row in there]
            panel.plot(steps, values, color=f"C{i}", label=Path(folder).resolve().name, **style)
            panel.set_xlabel("step")
            panel.grid(alpha=0.3)
    rate.legend()
    with replacing(path, "wb") as f:
        figure.savefig(f, dpi=100, format="png")

def fingerprint(source):
    """sha256 over the source files, so that an edited file counts as another source."""
    digest = hashlib.sha256()
    for name in source.split(","):
        path = Path(name)
        check(name and (path.is_file() or path.is_dir()), f"--source={source}: there is no file {name!r}")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file == path or file.suffix in (".txt", ".jsonl", ".parquet"):
                digest.update(file.read_bytes())
    return digest.hexdigest()

@contextlib.contextmanager
def alone(folder):
    """Hold the place of a folder that is to be made; before and after, away with what was left half done. An
    old data set between two renames moves back."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    held = lock(f"{folder}.tmp-lock")
    new, old = Path(f"{folder}.tmp-new"), Path(f"{folder}.tmp-old")
    def sweep():
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(new, ignore_errors=True)
    try:
        sweep()
        yield new, old
    finally:
        sweep()
        os.remove(held.name)
        held.close()

def prepare(dataset, data_dir="data", name=None, force=False, **flags):
    """Makes data_dir/name unless it is there, and returns its path. A flag left at None means the default, or
    what an existing folder was made with."""
    name = name or dataset
    hint = unknown("data set", dataset, DATASETS)
    check(dataset in DATASETS, f"--dataset: {hint} One of your own is made by python prepare_data.py "
          f"--dataset=... --name={name}")
    plain_name = name.replace("-", "").replace("_", "").isalnum()
    check(plain_name and (name == dataset or name not in DATASETS), f"--name={name} must be a name of your "
          "own, of letters, digits, - and _")
    given = {key: value for key, value in flags.items() if value is not None}
    _, *known = inspect.signature(DATASETS[dataset]).parameters.values()
    options = {p.name: given.get(p.name, p.default) for p in known}
    for key in given.keys() - {"seed"}:
        check(key in options, f"--{key} is no flag of {dataset}, which takes --{', --'.join(options)}")
    settings, folder = dict(options), Path(data_dir) / name
    try:
        if "source" in given:
            settings["source"] = fingerprint(given["source"])
        if "tokenizer_from" in given:
            check(not given.keys() & {"tokenizer", "vocab_size"}, "--tokenizer_from brings its own "
                  "vocabulary: leave out --tokenizer and --vocab_size")
            spec = load_meta(given["tokenizer_from"])["tokenizer"]
            check(spec["kind"] in ("bpe", "gpt2", "bytes"), "--tokenizer_from: that data set's tokenizer "
                  f"knows no text, only {spec['kind']} of its own")
            options["tokenizer_from"] = spec
            settings["tokenizer_from"] = checksum(spec)
        there = folder / "meta.json"
        if force or not there.exists() or any(folder.parent.glob(f"{name}.tmp-*")):
            with alone(folder) as (new, old):
                if force or not there.exists():
                    make(new, folder, dataset, options, settings)
                    if folder.exists():
                        folder.rename(old)
                    new.rename(folder)
                    return str(folder)
    except OSError as e:
        raise SystemExit(f"{folder} cannot be made: {e}")
    meta = load_meta(folder)
    made_with = {"dataset": meta.get("dataset", name), **meta["settings"]}
    for key in ("dataset", *given):
        had = made_with.get(key)
        if had != {"dataset": dataset, **settings}.get(key):
            was = f"another {key}" if key in ("source", "tokenizer_from") else f"--{key}={had}"
            raise SystemExit(f"{folder} was made with {was}: --force replaces it")
    print(f"{folder} is there already, made by: {meta['created_by']}")
    return str(folder)

def make(tmp, folder, dataset, options, settings):
    """Makes a data set in tmp, to replace folder when all is there."""
    check((folder / "meta.json").exists() or not folder.exists(), f"{folder} exists and is no data set of "
          "ours: move it away or choose another --data_dir")
    check(options.get("source") is not inspect.Parameter.empty, f"{dataset} is made from your own files: "
          f"python prepare_data.py --dataset={dataset} --source=FILE (parallel: train.en,train.de)")
    # a damaged one is repaired
    with contextlib.suppress(FileNotFoundError, ValueError, LookupError, TypeError):
        ours = {"meta.json", *json.loads((folder / "meta.json").read_text(encoding="utf-8"))["files"]}
        alien = sorted({path.name for path in folder.iterdir()} - ours)
        check(not alien, f"{folder} holds {', '.join(alien)}, which would be lost: move it away")
    started = time.time()
    tmp.mkdir()
    made = DATASETS[dataset](tmp, **options)
    tok = made.pop("tokenizer")
    skipped = {reason: n for reason, n in made.pop("skipped", {}).items() if n}
    meta = {"format": FORMAT, "name": folder.name, "dataset": dataset, **made, "vocab_size": tok.vocab_size,
            "dtype": tok.dtype.name, "skipped": skipped, "settings": settings,
            "seconds": round(time.time() - started, 1),
            "files": {path.name: [path.stat().st_size, crc32(path)] for path in sorted(tmp.iterdir())},
            "created_by": "python " + shlex.join(sys.argv),
            "tokenizer": tok.spec}  # last, because a BPE fills thousands of lines
    with replacing(tmp / "meta.json") as f:
        json.dump(meta | {"checksum": checksum(meta)}, f, indent=1)

# ---- command line ----
HABITS = {  # what other programs call a flag, and ours; of several the first that the script has
    "learning_rate": "lr", "weight_decay": "wd", "max_iters": "epochs num_epochs steps max_steps num_steps",
    "batch_size": "batch bs", "n_head": "heads num_heads", "n_layer": "layers num_layers depth",
    "n_embd": "d_model dim hidden_size hidden_dim", "block_size": "seq_len max_length context_length",
    "dtype=float16": "fp16 half amp", "dtype=bfloat16": "bf16", "init_from": "checkpoint load pretrained",
    "ckpt": "checkpoint load", "out_dir": "output_dir save_dir", "source": "file path input",
    "start": "prompt", "max_new_tokens": "max_tokens", "beam": "num_beams beam_size"}
ELSEWHERE = {"wandb": "what a run logs is in out_dir/log.csv, drawn in curve.png",
             "gpus": "torchrun starts a process on each GPU, as python train.py --help shows"}

def unknown(kind, word, known):
    near = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    return f"unknown {kind} {word}: {hint}"

def stopped(kind, e, trace):  # Ctrl-C ends in one word and the exit code of a signal
    if kind is not KeyboardInterrupt:
        return sys.__excepthook__(kind, e, trace)
    print("stopped", file=sys.stderr, flush=True)
    os._exit(130)

class Parser(argparse.ArgumentParser):
    """argparse with one line a mistake: the nearest known flag, no abbreviations, --flag or --flag=False."""

    def __init__(self, description):
        lines, width = [], max(40, min(80, shutil.get_terminal_size().columns) - 1)
        for line in re.sub(r"(?m)^( +\S.*?) +# (.*)$", r"    # \2\n\1", description or "").split("\n"):
            lines += [line] if line.startswith(" ") else textwrap.wrap(line, width) or [""]
        super().__init__(description="\n".join(lines), allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.to, self.defaults = self, {}
        sys.excepthook = stopped

    def section(self, title):
        self.to = self.add_argument_group(title)

    def add(self, flag, type=str, help="", low=None, high=None, default=None, **kw):
        """A flag, its type, and the numbers that it takes, low..high."""
        words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        def read(text):
            with contextlib.suppress(KeyError, ValueError):
                value = words[text.lower()] if type is bool else type(text)
                if low is None or low <= value <= high:
                    return value
            kind = {bool: "True or False", int: "a whole number"}.get(type, "a number")
            limits = "" if low is None else f" from {low:g} to {high:g}"
            self.error(f"{flag}={text} must be {kind}{limits}")
        if type is bool:
            kw.update(nargs="?", const=True, metavar="BOOL")
        if len("".join(kw.get("choices") or ())) > 40:
            kw["metavar"] = "NAME"
            help = help or ", ".join(kw["choices"])
        if default is not None:
            help += f" [{default}]"
        self.defaults[flag.lstrip("-")] = default
        help = help.replace("%", "%%") or " "
        self.to.add_argument(flag, type=read, help=help, default=argparse.SUPPRESS, **kw)

    def parse_args(self, argv=None):  # also leaves the flags that were really typed in self.given
        with contextlib.suppress(AttributeError):  # what a terminal cannot show becomes its \\u number
            sys.stdout.reconfigure(errors="backslashreplace")
        args, extra = self.parse_known_args(argv)
        if extra:
            self.error(f"unknown argument {extra[0].split('=')[0]}: {self.hint(extra[0])}")
        self.given = vars(args)
        return argparse.Namespace(**{**self.defaults, **self.given})

    def hint(self, typed):
        """What whoever typed an unknown flag may have meant."""
        word = typed.split("=")[0].strip("-").replace("-", "_").lower()
        for name, sentence in ELSEWHERE.items():
            if name in word:
                return sentence
        for ours, habits in HABITS.items():
            if word in habits.split() and ours.split("=")[0] in self.defaults:
                return f"did you mean --{ours}?"
        near = difflib.get_close_matches(word, self.defaults, n=1)
        return f"did you mean --{near[0]}?" if near else "--help lists all that are known"

    def error(self, message):
        self.exit(2, f"{self.prog}: " + " ".join(message.split()) + "\n")

def summary(folder, meta):
    print(f"{folder}: {meta['arch']}, vocab {meta['vocab_size']:,}, block_size {meta['block_size']}, "
          f"{meta['seconds']} s")
    for split, s in meta["splits"].items():
        tokens, longest = (" + ".join(f"{n:,}" for n in np.ravel(s[what])) for what in ("tokens", "longest"))
        print(f"  {split:5s} | rows {s['rows']:,} | tokens {tokens} | longest {longest}")
    for reason, count in meta["skipped"].items():
        print(f"  {count:,} rows {reason}")
    test = meta["splits"]["test"]
    trivial = ", ".join(f"{name} {score:.3f}" for name, score in test["trivial"].items())
    print("  trivial scores on test |", trivial)
    if test["rows"] < 100 and meta["arch"] != "decoder":
        print(f"  warning: test has only {test['rows']} rows, a score on so few means little")
    for stem in ("train", "train.src", "train.tgt"):
        if f"{stem}.bin" in meta["files"] and "image" not in meta:
            ids = np.fromfile(f"{folder}/{stem}.bin", dtype=meta["dtype"], count=64)
            print(f"  {stem} begins | {Tokenizer(meta['tokenizer']).decode(ids)[:100]!r}")

def main():
    parser = Parser(description=__doc__)
    parser.add("--dataset", default="numbers", help=", ".join(DATASETS))
    parser.add("--source", help="a file, files joined by commas, a folder of *.txt or in the hub's layout")
    parser.add("--text", help="table: the texts' column [text]")
    parser.add("--label", help="table: the labels' column [label]")
    parser.add("--data_dir", default="data", help="the data set is written to data_dir/NAME")
    parser.add("--name", help="a name of its own, instead of the data set's")
    parser.add("--tokenizer", choices=["gpt2", "bytes"], help="text, arxiv [gpt2], table, imdb [bytes]")
    parser.add("--tokenizer_from", help="the folder of a data set whose tokenizer, a BPE too, is used again")
    parser.add("--seed", int, "for what is drawn or shuffled [1337]", 0, 2**63)
    parser.add("--force", bool, "replace a data set made with other settings", default=False)
    for flag, help in (
            ("rows", "use only so many training rows"),
            ("vocab_size", "ids of the trained BPE, special ones included"),
            ("held_out", "rows of each, val and test, drawn from yours [a tenth, at most 2,000]"),
            ("min_len", "listops: a row is longer than so many tokens; arxiv: a document at least as long"),
            ("max_len", "listops: and shorter than this"), ("max_depth", "listops: levels of nesting"),
            ("n_links", "lego: clauses of a row"), ("n_tr", "lego: links whose values are told in training"),
            ("n_pairs", "recall: the most pairs of a row"), ("n_keys", "recall: keys, and as many values"),
            ("test_rows", "listops, lego, recall: rows of test [2000], twice those of the longer split"),
            ("size", "pathfinder: width and height in pixels, 32 or 128")):
        parser.add(f"--{flag}", int, help, 1, 2**30)
    args = parser.parse_args()
    try:
        folder = prepare(**vars(args))
    except KeyboardInterrupt:
        print("\nstopped: nothing was changed", file=sys.stderr)
        sys.exit(130)
    except SystemExit as e:
        parser.error(e.code) if str(e.code).startswith("--") else sys.exit(e.code)
    summary(folder, load_meta(folder))
    where = f" --data_dir={args.data_dir}" if "data_dir" in parser.given else ""
    print(f"next: python train.py --dataset={args.name or args.dataset}{where}")

if __name__ == "__main__":
    main()
