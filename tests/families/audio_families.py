"""diffusers' transformers of sound."""

from __future__ import annotations

import torch
from family import HEADS, TEXT, TEXT_WIDTH, noise, of_diffusers, real, text

FAMILIES = [
    of_diffusers(
        "StableAudioDiTModel",
        converted=2, dense={"short": 2}, tokens=("1 + ?",),
        config={
            "sample_size": 64, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 2, "num_key_value_attention_heads": 1, "cross_attention_dim": 16,
            "cross_attention_input_dim": TEXT_WIDTH, "time_proj_dim": 8, "global_states_input_dim": 8,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 4, 64), "timestep": torch.ones(1), "encoder_hidden_states": text(),
            "global_hidden_states": noise(1, 1, 8), "rotary_embedding": (noise(65, 8), noise(65, 8)),
        },
    ),
    of_diffusers(
        "StableAudio3DiTModel (differential attention)",
        converted=4, dense={"short": 4}, tokens=("4 + ?",),
        config={
            "io_channels": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "cond_token_dim": TEXT_WIDTH,
            "global_cond_dim": 8, "local_add_cond_dim": 4, "timestep_features_dim": 8, "num_memory_tokens": 4,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 8, 64), "timestep": torch.ones(1), "encoder_hidden_states": text(),
            "global_hidden_states": noise(1, 8),
        },
    ),
    of_diffusers(
        "T5FilmDecoder",
        converted=2, dense={"short": 2}, tokens=("?",),
        config={
            "input_dims": 8, "targets_length": 64, "d_model": 32, "num_layers": 2, "num_heads": 2, "d_kv": 16,
            "d_ff": 32, "dropout_rate": 0.0,
        },
        inputs=lambda: {
            "encodings_and_masks": [(text(), torch.ones(1, TEXT).long())], "decoder_input_tokens": noise(1, 64, 8),
            "decoder_noise_time": torch.full((1,), 0.5),
        },
    ),
    of_diffusers(
        "LongCatAudioDiTTransformer",
        converted=2, dense={"short": 2}, tokens=("?",),
        config={"dit_dim": 32, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": TEXT_WIDTH, "latent_dim": 8},
        inputs=lambda: {
            "hidden_states": noise(1, 64, 8), "encoder_hidden_states": text(), "encoder_attention_mask": real(12),
            "timestep": torch.ones(1), "latent_cond": noise(1, 64, 8),
        },
    ),
    of_diffusers(
        "AceStepTransformer1DModel (every other layer has a sliding window)",
        converted=1, dense={"short": 2, "bias": 1}, tokens=("?",),
        config={
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "in_channels": 24, "audio_acoustic_hidden_dim": 8,
            "sliding_window": 8, "encoder_hidden_size": TEXT_WIDTH,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 96, 8), "timestep": torch.ones(1), "timestep_r": torch.ones(1),
            "encoder_hidden_states": text(), "context_latents": noise(1, 96, 16),
        },
    ),
    of_diffusers(
        "MiniMaxMusic3Transformer1DModel",
        converted=2, tokens=("1 + ?",),
        config={
            **HEADS, "in_channels": 8, "condition_dim": 8, "num_layers": 2, "ff_inner_dim": 32, "rotary_dim": 8,
            "fourier_embedding_dim": 8,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 8, 64), "timestep": torch.ones(1), "encoder_hidden_states": noise(1, 64, 8)
        },
    ),
    of_diffusers(
        "MiniMaxMusic3RVQDepthDecoder",
        converted=0, dense={"causal": 2},
        config={
            "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
            "audio_vocab_size": 8, "num_codebooks": 4, "max_position_embeddings": 48,
        },
        inputs=lambda: {"inputs_embeds": noise(1, 48, 32)},
    ),
]  # fmt: skip
