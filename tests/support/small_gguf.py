"""A tiny language model in one GGUF file, with its tokenizer."""

from pathlib import Path

import gguf
import jax
import numpy as np
import tokenizers

from fedjax_qp.models.language.llama import LlamaConfig, initial_weights

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "h i", "Ġ hi", "1 2"]
TOKENS = [
    *SPECIAL,
    *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    *(pair.replace(" ", "") for pair in MERGES),
]
MODEL = LlamaConfig(
    vocabulary=len(TOKENS), width=32, layers=1, heads=4, key_value_heads=2, head_size=8, hidden=64, rope_theta=1e4,
    rope_scaling=None, norm_epsilon=1e-5, tied=True, maximum_positions=128,
)  # fmt: skip
NAMES = {
    "input_norm": "attn_norm", "post_norm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
    "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def write_model(file: Path) -> Path:
    writer = gguf.GGUFWriter(str(file), "llama")
    for add, value in (
        (writer.add_context_length, MODEL.maximum_positions),
        (writer.add_embedding_length, MODEL.width),
        (writer.add_block_count, MODEL.layers),
        (writer.add_feed_forward_length, MODEL.hidden),
        (writer.add_head_count, MODEL.heads),
        (writer.add_head_count_kv, MODEL.key_value_heads),
        (writer.add_layer_norm_rms_eps, MODEL.norm_epsilon),
        (writer.add_rope_freq_base, MODEL.rope_theta),
        (writer.add_rope_dimension_count, MODEL.head_size),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "smollm"),
        (writer.add_token_list, TOKENS),
        (writer.add_token_merges, MERGES),
        (writer.add_token_types, [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL))),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_pad_token_id, 2),
    ):
        add(value)
    weights = jax.tree.map(np.asarray, initial_weights(MODEL, jax.random.key(0)))
    tensors = {"token_embd.weight": weights["embed"], "output_norm.weight": weights["norm"]}
    for name, stack in weights["blocks"].items():
        array = stack["kernel"] if isinstance(stack, dict) else stack
        tensors[f"blk.0.{NAMES[name]}.weight"] = np.ascontiguousarray(array[0].T)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
