"""A tiny made-up language model in a GGUF file, quantized as SmolLM2's is, and what it computes, in NumPy."""

import gguf
import numpy as np
import tokenizers

LAYERS, WIDTH, HEADS, KV_HEADS, HIDDEN = 2, 32, 4, 2, 64
EPSILON, BASE = 1e-5, 1e4
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LETTERS = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
MERGES = ["Ġ t", "h e", "Ġt he"]
WORDS = [*MARKS, *LETTERS, *("".join(pair.split(" ")) for pair in MERGES)]

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": LAYERS,
    "llama.embedding_length": WIDTH,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.feed_forward_length": HIDDEN,
    "llama.vocab_size": len(WORDS),
    "llama.rope.dimension_count": WIDTH // HEADS,
    "llama.rope.freq_base": BASE,
    "llama.attention.layer_norm_rms_epsilon": EPSILON,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": WORDS,
    "tokenizer.ggml.token_type": [3] * len(MARKS) + [1] * (len(WORDS) - len(MARKS)),
    "tokenizer.ggml.merges": MERGES,
}


def tensors():
    """Float32 arrays by their names in a file, outputs first."""
    kv = WIDTH // HEADS * KV_HEADS
    shapes = {"token_embd": (len(WORDS), WIDTH), "output_norm": (WIDTH,)}
    for i in range(LAYERS):
        layer = {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (kv, WIDTH),
            "attn_v": (kv, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (HIDDEN, WIDTH),
            "ffn_up": (HIDDEN, WIDTH),
            "ffn_down": (WIDTH, HIDDEN),
            "attn_norm": (WIDTH,),
            "ffn_norm": (WIDTH,),
        }
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    rng = np.random.default_rng(0)
    made = {f"{name}.weight": rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: array + ("norm" in name) for name, array in made.items()}


def write(path, metadata=METADATA, arrays=None, kind=gguf.GGMLQuantizationType.Q4_1):
    """Writes a file; matrices are quantized, the embedding to 8 bits.

    Args:
        path: Where.
        metadata: What it says of itself.
        arrays: Its tensors.
        kind: How matrices are quantized; None leaves them in float32.

    Returns:
        The arrays as a reader should find them.
    """
    writer = gguf.GGUFWriter(path, metadata.get("general.architecture", "llama"))
    for name, value in metadata.items():
        if name != "general.architecture":
            put(writer, name, value)
    read = {}
    for name, array in (tensors() if arrays is None else arrays).items():
        if array.ndim == 1 or kind is None:
            writer.add_tensor(name, array)
            read[name] = array
            continue
        chosen = gguf.GGMLQuantizationType.Q8_0 if name.startswith("token_embd") else kind
        stored = gguf.quants.quantize(array, chosen)
        writer.add_tensor(name, stored, raw_dtype=chosen)
        read[name] = gguf.quants.dequantize(stored, chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def put(writer, name, value):
    kinds = {
        str: writer.add_string,
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
    }
    kinds[type(value)](name, value)


def logits(arrays, tokens, *, layers=LAYERS, heads=HEADS, kv_heads=KV_HEADS, base=BASE, epsilon=EPSILON):
    """Those of one row of tokens, in float64, head by head and place by place.

    Args:
        arrays: A file's, dequantized; neighbours in queries and keys turn together.
        tokens: Their numbers.
        layers: How many.
        heads: Of queries.
        kv_heads: Of keys and values.
        base: Of the rotary embedding.
        epsilon: Of the norms.
    """
    w = {name.removesuffix(".weight"): np.asarray(array, np.float64) for name, array in arrays.items()}

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale

    def turned(x):
        size = x.shape[1]
        waves = np.exp(1j * np.arange(len(x))[:, None] / base ** (np.arange(0, size, 2) / size))
        y = (x[:, ::2] + 1j * x[:, 1::2]) * waves
        return np.stack([y.real, y.imag], axis=-1).reshape(x.shape)

    x = w["token_embd"][tokens]
    for i in range(layers):
        part = {name.split(".")[2]: w[name] for name in w if name.startswith(f"blk.{i}.")}
        normed = norm(x, part["attn_norm"])
        size, mixed = x.shape[1] // heads, []
        for head in range(heads):
            own, shared = (slice(j * size, (j + 1) * size) for j in (head, head * kv_heads // heads))
            query, key = turned(normed @ part["attn_q"][own].T), turned(normed @ part["attn_k"][shared].T)
            scores = np.where(np.tri(len(x), dtype=bool), query @ key.T / np.sqrt(size), -np.inf)
            shares = np.exp(scores - scores.max(axis=1, keepdims=True))
            mixed.append(shares / shares.sum(axis=1, keepdims=True) @ (normed @ part["attn_v"][shared].T))
        x = x + np.concatenate(mixed, axis=1) @ part["attn_output"].T
        normed = norm(x, part["ffn_norm"])
        gate = normed @ part["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (normed @ part["ffn_up"].T)) @ part["ffn_down"].T
    return norm(x, w["output_norm"]) @ w["token_embd"].T
