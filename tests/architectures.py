"""Tiny configs of models whose blocks, or what lies around them, are not like Llama's."""

from __future__ import annotations

from typing import Any

COMMON = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 96}
ROPE = {"intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}


def unusual() -> dict[str, Any]:
    """By what is unusual."""
    from transformers import (
        BambaConfig,
        CTRLConfig,
        FalconConfig,
        Gemma3nTextConfig,
        GlmMoeDsaConfig,
        GPTBigCodeConfig,
        Mamba2Config,
        MambaConfig,
        OpenAIGPTConfig,
        OPTConfig,
        ProphetNetConfig,
        Zamba2Config,
    )

    mamba = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
    layers = ["sliding_attention", "full_attention"]
    return {
        "narrow embeddings": OPTConfig(
            **COMMON, num_hidden_layers=2, ffn_dim=96, word_embed_proj_dim=32, max_position_embeddings=64
        ),
        "lists from blocks": OpenAIGPTConfig(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64),
        "scaled in place": CTRLConfig(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64, dff=96),
        "state space": MambaConfig(
            hidden_size=64,
            state_size=8,
            num_hidden_layers=2,
            vocab_size=96,
            time_step_rank=8,
            tie_word_embeddings=False,
        ),
        "state space in heads": Mamba2Config(
            hidden_size=64, state_size=8, num_hidden_layers=2, vocab_size=96, num_heads=8, head_dim=16, chunk_size=8
        ),
        "hybrid": BambaConfig(
            **COMMON, **ROPE, **mamba, num_hidden_layers=3, attn_layer_indices=[1], tie_word_embeddings=True
        ),
        "stacked streams, keys handed on": Gemma3nTextConfig(
            **COMMON,
            num_hidden_layers=4,
            intermediate_size=96,
            num_key_value_heads=2,
            max_position_embeddings=64,
            head_dim=16,
            layer_types=2 * layers,
            sliding_window=8,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=96,
            laurel_rank=8,
            activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0],
        ),
        "indices handed on": GlmMoeDsaConfig(
            **COMMON,
            intermediate_size=96,
            num_hidden_layers=3,
            max_position_embeddings=64,
            first_k_dense_replace=3,
            indexer_types=["full", "shared", "full"],
            index_topk=4,
            index_head_dim=16,
            index_n_heads=2,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
        ),
        "several predictions": ProphetNetConfig(
            hidden_size=64,
            vocab_size=96,
            num_decoder_layers=2,
            num_decoder_attention_heads=4,
            decoder_ffn_dim=96,
            max_position_embeddings=64,
            is_decoder=True,
            is_encoder_decoder=False,
            add_cross_attention=False,
        ),
        "linears in several blocks": Zamba2Config(
            **COMMON,
            num_hidden_layers=4,
            layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
            hybrid_layer_ids=[1, 3],
            intermediate_size=96,
            num_key_value_heads=4,
            attention_hidden_size=128,
            attention_head_dim=32,
            n_mamba_heads=8,
            mamba_d_state=8,
            mamba_headdim=16,
            mamba_ngroups=1,
            chunk_size=8,
            adapter_rank=8,
            num_query_groups=4,
            max_position_embeddings=64,
        ),
        "linears of its own": FalconConfig(**COMMON, num_hidden_layers=2),
        "initialized by its parent": GPTBigCodeConfig(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64),
    }


UNUSUAL = list(unusual())
