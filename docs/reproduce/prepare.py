"""Prepare the text of the experiments: Wikipedia articles, tokenised by GPT-2's BPE and by a BPE of 4,096 entries.

    python docs/reproduce/prepare.py --source ../shared/data/wiki2015 --tokenizers ../shared/data/tokenizers

The source holds train_*.txt.xz and valid.txt.xz, plain text with a form feed between articles. The tokens go to
.prepared, which git ignores.
"""

from __future__ import annotations

import argparse
import json
import lzma
import tarfile
from pathlib import Path

from hgrn2.data import prepare

# parts of the training text; the first alone suffices for the ablations
LANGUAGE_PARTS, ABLATION_PARTS = 2, 1


def write_articles(source: Path, out: Path) -> None:
    """Write the articles of a compressed file as lines of JSON."""
    if out.is_file():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    text = lzma.decompress(source.read_bytes()).decode("utf-8")
    partial = out.with_suffix(".part")
    with partial.open("w", encoding="utf-8") as file:
        for article in text.split("\f"):
            if article.strip():
                file.write(json.dumps({"text": article.strip()}, ensure_ascii=False) + "\n")
    partial.replace(out)


def write_gpt2_tokenizer(archive: Path, out: Path) -> None:
    """Write GPT-2's published vocabulary and merges as tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if out.is_file():
        return
    with tarfile.open(archive) as files:
        found = {Path(member.name).name: files.extractfile(member) for member in files if member.isfile()}
        texts = {name: file.read().decode("utf-8") for name, file in found.items() if file and name.startswith("gpt2_")}
    vocab = json.loads(texts["gpt2_encoder.json"])
    lines = texts["gpt2_vocab.bpe"].splitlines()
    pairs = [line.split() for line in lines if line and not line.startswith("#version")]
    merges = [(one, other) for one, other in pairs]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out))


def main() -> None:
    """Read the arguments and prepare both texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("../shared/data/wiki2015"))
    parser.add_argument("--tokenizers", type=Path, default=Path("../shared/data/tokenizers"))
    parser.add_argument("--out", type=Path, default=Path(".prepared"))
    parser.add_argument("--only", choices=("gpt2", "bpe4096"), help="one of the two; default: both")
    arguments = parser.parse_args()
    out, text = arguments.out, arguments.out / "text"
    jobs = []
    if arguments.only != "bpe4096":
        write_gpt2_tokenizer(arguments.tokenizers / "tokenizers.tar.xz", out / "gpt2" / "tokenizer.json")
        jobs.append(("wiki-gpt2", str(out / "gpt2"), LANGUAGE_PARTS))
    if arguments.only != "gpt2":
        jobs.append(("wiki-bpe4096", "bpe:4096", ABLATION_PARTS))
    write_articles(arguments.source / "valid.txt.xz", text / "valid.jsonl")
    for name, tokenizer, num_parts in jobs:
        parts = [text / f"train_{i}.jsonl" for i in range(num_parts)]
        for i, part in enumerate(parts):
            write_articles(arguments.source / f"train_{i}.txt.xz", part)
        found = prepare([str(p) for p in parts], tokenizer, out / name, validation=[str(text / "valid.jsonl")])
        print(f"{out / name}: {found.summary()}")


if __name__ == "__main__":
    main()
