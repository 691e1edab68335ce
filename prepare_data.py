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
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

FORMAT = 1
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
        self.bpe = None  # bytes
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
        self.vocab_size = N_SPECIAL + (self.bpe.n_vocab if self.bpe else 256)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 65535 else np.uint32)

    def encode(self, text):
        return [t + N_SPECIAL for t in (self.bpe.encode_ordinary(text) if self.bpe else text.encode("utf-8", "replace"))]

    def decode(self, ids):
        raw = [int(i) - N_SPECIAL for i in ids if N_SPECIAL <= i < self.vocab_size]
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

def read_text(path):
    raw = Path(path).read_bytes()
    if not raw.strip():
        raise SystemExit(f"{path} is empty")
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as e:
        raise SystemExit(f"{path} is not UTF-8: byte 0x{raw[e.start]:02x} at offset {e.start}")

def first_gap(a, b):
    """The row near which two sides part: the lengths of true pairs go together, those of shifted pairs do not."""
    x, y = (np.log1p([len(row) for row in side[:min(len(a), len(b))]]) for side in (a, b))
    shift = np.median(x - y)
    by_chance = np.abs(x - np.random.default_rng(0).permutation(y) - shift).mean()
    return int(np.argmax(np.cumsum(np.r_[0, 0.75 * by_chance - np.abs(x - y - shift)])))

def hub(source, repo, patterns, get):
    """{split: list of get(row)} from a folder in the hub's layout, or from the hub, or from its cache when offline."""
    if source is None:
        requests, endpoint = need("requests"), need("huggingface_hub.constants").ENDPOINT
        offline = within(4, lambda: [requests.head(endpoint, timeout=3)]) is None
        try:
            source = need("huggingface_hub").snapshot_download(
                repo, repo_type="dataset", allow_patterns=list(patterns.values()), local_files_only=offline)
        except Exception as e:
            why = "no network" if offline else " ".join(str(e).split())[:150]
            raise SystemExit(f"{repo} cannot be fetched from the hub ({why}): name a local copy with --source=DIR")
    files = {split: sorted(glob.glob(f"{glob.escape(source)}/{pattern}")) for split, pattern in patterns.items()}
    for split, pattern in patterns.items():
        if not files[split]:
            raise SystemExit(f"{source} has no {pattern}: --source must be a copy of {repo} in the hub's own layout")
    kind = "json" if files["train"][0].endswith(".jsonl") else "parquet"
    with tempfile.TemporaryDirectory() as cache:  # for this call alone: cached rows silently come back old
        try:
            rows = need("datasets").load_dataset(kind, data_files=files, cache_dir=cache)
            return {split: [get(row) for row in tqdm(rows[split], f"read {split}", leave=False)] for split in files}
        except Exception as e:
            why = " ".join(str(e.__cause__ or e).split())[:150]
            raise SystemExit(f"{source}: its {kind} rows cannot be read or lack a field ({type(e).__name__}: {why})")

# ---- writing ----

def write_encdec(out, spec, splits, cap=None):
    """Tokenises {split: (sources, targets)}; train rows that do not fit cap are dropped, others left to the loader."""
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
            ids[np.repeat(keep, lengths)].tofile(out / f"{split}.{side}.bin")
            np.r_[0, np.cumsum(lengths[keep])].tofile(out / f"{split}.{side}.idx")
            if split != "train":
                (out / f"{split}.{side}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
        lengths = [lengths[keep] for _, lengths in encoded]
        stats[split] = {"rows": int(keep.sum()), "tokens": [int(n.sum()) for n in lengths],
                        "longest": [int(n.max()) for n in lengths]}
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
    meta = write_encdec(out, train_bpe(splits["train"], vocab_size), splits, cap=256)
    return {"metric": "bleu", **meta, "skipped": {**skipped, **meta["skipped"]}}

def write_labelled(out, spec, splits, classes, block_size):
    """From {split: (texts, labels)} to one ragged file of tokens and one label a row; a long row is the loader's to cut."""
    tok, stats = Tokenizer(spec), {}
    for split, (texts, labels) in splits.items():
        ids, lengths = tok.encode_rows(texts, split)
        keep = lengths > 0
        ids.tofile(out / f"{split}.src.bin")                   # an empty row adds nothing to it
        np.r_[0, np.cumsum(lengths[keep])].tofile(out / f"{split}.src.idx")
        np.asarray(labels, dtype=np.int64)[keep].tofile(out / f"{split}.label.bin")
        stats[split] = {"rows": int(keep.sum()), "tokens": int(lengths.sum()), "longest": int(lengths.max()),
                        "empty": int((~keep).sum()), "cut": int((lengths > block_size).sum())}
    skipped = {f"{split}: {what}": s[key] for key, what in (("empty", "empty, skipped"), ("cut", "longer than block_size, cut by the loader"))
               for split, s in stats.items() if s[key]}
    return {"arch": "encoder", "metric": "acc", "vocab_size": tok.vocab_size, "dtype": tok.dtype.name, "tokenizer": spec,
            "n_classes": len(classes), "classes": classes, "block_size": block_size, "splits": stats, "skipped": skipped}

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
    return {"metric": "exact", **write_encdec(out, {"kind": "bytes"}, splits),
            "note": "split long: 500 numbers of 7 to 9 digits, beyond the trained range"}

# 4,000: in 29,000 captions a rarer token is seen too seldom to be learned, and its table would outweigh a small model
def multi30k(out, source=None, vocab_size=4000, rows=None):
    """Multi30k image captions, English to German; test is test_2016_flickr, raw and cased."""
    files = {"train": "train.jsonl", "val": "val.jsonl", "test": "test.jsonl"}
    return write_translation(out, hub(source, "bentrevett/multi30k", files, lambda row: (row["en"], row["de"])),
                             vocab_size, rows)

def wmt16(out, source=None, vocab_size=16_000, rows=None):
    """WMT16, English to German."""
    files = {"train": "de-en/train-*.parquet", "val": "de-en/validation-*.parquet", "test": "de-en/test-*.parquet"}
    get = lambda row: (row["translation"]["en"], row["translation"]["de"])
    return write_translation(out, hub(source, "wmt/wmt16", files, get), vocab_size, rows)

def parallel(out, source, vocab_size=8000, seed=1337, rows=None):
    """Your own two files whose lines belong together; the first is translated into the second."""
    paths, splits = source.split(","), {}
    if len(paths) not in (2, 6):
        raise SystemExit(f"--source names {len(paths)} file(s): give train.en,train.de or these, val.* and test.* (six)")
    for split, a, b in zip(("train", "val", "test"), paths[::2], paths[1::2]):
        # not splitlines(): it also cuts at rare separators inside a row, and the two sides would drift apart
        src, tgt = (read_text(path).removesuffix("\n").split("\n") for path in (a, b))
        if len(src) != len(tgt):
            raise SystemExit(f"{a} has {len(src)} lines and {b} has {len(tgt)}: they seem to part near line "
                             f"{first_gap(src, tgt) + 1}")
        splits[split] = list(zip(src, tgt))
    return write_translation(out, splits, vocab_size, rows, seed if len(paths) == 2 else None)

def text(out, source, tokenizer="gpt2"):
    """Any plain text, for a decoder: 90 % train, 5 % val, 5 % test, in the order of the file, cut at line breaks."""
    if tokenizer not in ("gpt2", "bytes"):
        raise SystemExit(f"--tokenizer={tokenizer} is unknown: gpt2 or bytes")
    whole, tok, block_size, start, stats, sizes = read_text(source), Tokenizer({"kind": tokenizer}), 256, 0, {}, {}
    for split, percent in (("train", 90), ("val", 95), ("test", 100)):
        end = len(whole) * percent // 100
        end = end if percent == 100 else whole.rfind("\n", max(0, end - 10_000), end) + 1 or end
        part, start = whole[start:end], end
        # pieces end where a line begins, so that they are cut where the tokenizer cuts too
        ids, _ = tok.encode_rows(re.findall(r"(?s).{1,50000}(?<=[^\n]\n)(?=\S)|.{1,50000}", part), split)
        if len(ids) <= block_size:
            raise SystemExit(f"{source} is too short: its {split} split has {len(ids)} tokens and needs {block_size + 1}")
        ids.tofile(out / f"{split}.bin")
        stats[split], sizes[split] = {"rows": 1, "tokens": len(ids), "longest": len(ids)}, len(part.encode("utf-8"))
    return {"arch": "decoder", "metric": "bpb", "vocab_size": tok.vocab_size, "dtype": tok.dtype.name,
            "block_size": block_size, "splits": stats, "bytes": sizes, "skipped": {}, "tokenizer": {"kind": tokenizer}}

def imdb(out, source=None, seed=1337, rows=None):
    """IMDB reviews as bytes, negative or positive; val is a tenth of train, so that test chooses nothing."""
    files = {split: f"plain_text/{split}-*.parquet" for split in ("train", "test")}
    splits = hub(source, "stanfordnlp/imdb", files, lambda row: (row["text"], row["label"]))
    order = np.random.default_rng(seed).permutation(len(splits["train"]))
    pairs, k = [splits["train"][i] for i in order], len(order) // 10
    splits = {"train": pairs[k:][:rows], "val": pairs[:k], "test": splits["test"]}
    return write_labelled(out, {"kind": "bytes"}, {s: list(zip(*pairs)) for s, pairs in splits.items()}, ["negative", "positive"], 1024)

DATASETS = {"numbers": numbers, "multi30k": multi30k, "wmt16": wmt16, "text": text, "parallel": parallel, "imdb": imdb}

# ---- what train.py and sample.py import ----

def load_meta(folder):
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] == FORMAT:
            there = {p.name: p.stat().st_size for p in folder.iterdir()}
            bad = [file for file, size in meta["files"].items() if there.get(file) != size]
            if not bad:
                return meta
            why = f"is damaged, {bad[0]} is missing or has a wrong size"
        else:
            why = f"has format {meta['format']} and this code reads {FORMAT}"
    except FileNotFoundError:
        why = "holds no data set"
    except (ValueError, KeyError, TypeError, AttributeError):
        why = "has a damaged meta.json"
    raise SystemExit(f"{folder} {why}: make it anew with python prepare_data.py --dataset={folder.name} "
                     f"--data_dir={folder.parent} --force")

def read_ragged(folder, stem):
    """Tokens and offsets, so that row i is tokens[offsets[i]:offsets[i + 1]]; a stream without .idx is one row."""
    path = Path(folder) / stem
    dtype = json.loads((path.parent / "meta.json").read_text(encoding="utf-8"))["dtype"]
    tokens = np.memmap(f"{path}.bin", dtype=dtype, mode="r")
    has_rows = os.path.exists(f"{path}.idx")
    return tokens, np.memmap(f"{path}.idx", dtype=np.int64, mode="r") if has_rows else np.array([0, len(tokens)])

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

def prepare(name, data_dir="data", source=None, vocab_size=None, seed=None, rows=None, tokenizer=None, force=False,
            exact=False):
    """Makes data_dir/name unless it is there, and returns its path. An option left at None means the data set's default,
    or whatever an existing folder was made with; exact compares an existing folder with the defaults too."""
    if name not in DATASETS:
        raise SystemExit(unknown("data set", name, DATASETS))
    flags = dict(source=source, vocab_size=vocab_size, seed=seed, rows=rows, tokenizer=tokenizer)
    given = {key: value for key, value in flags.items() if value is not None}
    options = {key: p.default for key, p in inspect.signature(DATASETS[name]).parameters.items() if key != "out"}
    for key in given.keys() - options.keys() - {"seed"}:
        raise SystemExit(f"{name} takes no --{key}, only " + ", ".join(f"--{known}" for known in options))
    if rows is not None and rows < 1:
        raise SystemExit(f"--rows={rows} must be at least 1")
    options.update({key: value for key, value in given.items() if key in options})
    settings = {**options, "source": fingerprint(source) if source else None}

    folder = Path(data_dir) / name
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
        raise SystemExit(f"{name} needs --source=" + ("train.en,train.de" if name == "parallel" else "FILE"))

    tmp = Path(data_dir) / f"{name}.tmp-{os.getpid()}"
    try:
        for old in Path(data_dir).glob(f"{name}.tmp-*"):  # left by killed runs
            try:
                os.kill(int(old.name.split("-")[1]), 0)
            except ProcessLookupError:
                shutil.rmtree(old)
            except (PermissionError, ValueError):
                pass
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        meta = {"format": FORMAT, "name": name, "note": "", **DATASETS[name](tmp, **options), "settings": settings,
                "files": {p.name: p.stat().st_size for p in sorted(tmp.iterdir())},
                "created_by": "python " + shlex.join(sys.argv)}
        meta["tokenizer"] = meta.pop("tokenizer", None)  # last, because a BPE fills thousands of lines
        (tmp / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
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

class Parser(argparse.ArgumentParser):
    """argparse with one line a mistake: the nearest known flag, no abbreviations; --flag, --flag=0 and --flag=False."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.to = self
        sys.excepthook = lambda kind, *rest: (print("stopped", file=sys.stderr) if kind is KeyboardInterrupt
                                              else sys.__excepthook__(kind, *rest))

    def section(self, title):
        self.to = self.add_argument_group(title)

    def add(self, flag, type=str, help="", **kw):
        if type is bool:
            words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
            kw.update(nargs="?", const=True, metavar="BOOL")
            type = lambda s: words[s.lower()] if s.lower() in words else self.error(f"{flag}={s} must be True or False")
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
        self.exit(2, f"{self.prog}: {message}\n")

def summary(folder, meta, seconds):
    both = lambda x: " + ".join(f"{n:,}" for n in (x if isinstance(x, list) else [x]))
    print(f"{folder}: {meta['arch']}, vocab {meta['vocab_size']:,}, block_size {meta['block_size']}, {seconds:.1f} s")
    for split, s in meta["splits"].items():
        print(f"  {split:5s} | rows {s['rows']:,} | tokens {both(s['tokens'])} | longest {both(s['longest'])}")
    for reason, count in meta["skipped"].items():
        print(f"  {count:,} rows {reason}")
    if meta["arch"] == "encdec":
        print("  test 0 |", " -> ".join(read_text(f"{folder}/test.{side}.txt").split("\n")[0] for side in ("src", "tgt")))
    elif meta["arch"] == "decoder" and meta["tokenizer"]:
        ids = np.fromfile(f"{folder}/train.bin", dtype=meta["dtype"], count=64)
        print(f"  train begins | {Tokenizer(meta['tokenizer']).decode(ids)[:100]!r}")

def main():
    parser = Parser(description=__doc__)
    parser.add("--dataset", default="numbers", help=", ".join(DATASETS))
    parser.add("--source", help="a file, files joined by commas, or a folder in the hub's own layout")
    parser.add("--data_dir", default="data", help="the data set is written to data_dir/NAME")
    parser.add("--vocab_size", type=int, help="ids of the trained BPE, special ones included")
    parser.add("--tokenizer", help="for text: gpt2 (default) or bytes")
    parser.add("--rows", type=int, help="use only so many training rows")
    parser.add("--seed", type=int, help="for what is drawn or shuffled, 1337 by default")
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
    summary(folder, load_meta(folder), time.time() - started)
    print(f"next: python train.py --dataset={name}" + f" --data_dir={args.data_dir}" * (args.data_dir != "data"))

if __name__ == "__main__":
    main()
