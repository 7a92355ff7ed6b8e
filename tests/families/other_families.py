"""Models of transformers, x-transformers and timm, and the attention of torch.nn."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from family import Family, Inputs, image, noise
from torch import Tensor, nn

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VISION = {**WIDTHS, "image_size": 32, "patch_size": 4, "num_channels": 3}
FRAMES = {**VISION, "num_frames": 4, "tubelet_size": 2, "image_size": 16}
LANGUAGE = {**WIDTHS, "vocab_size": 24, "max_position_embeddings": 64, "pad_token_id": 0}
SPEECH = {
    **WIDTHS, "conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 8), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip


class LastHiddenState(nn.Module):
    """A model's last hidden state: its further outputs, such as poolers, have no say in attention."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        return self.model(**inputs).last_hidden_state  # type: ignore[no-any-return]


def of_transformers(name: str, config: Inputs, inputs: str, attention: str = "eager", **expected: Any) -> Family:
    """A model of transformers, its attention spelled out ("eager") or called ("sdpa"), on one of `INPUTS`."""

    def make() -> tuple[nn.Module, Inputs]:
        import transformers

        configuration = getattr(transformers, f"{name.removesuffix('Model').removesuffix('Encoder')}Config")(**config)
        configuration._attn_implementation = attention
        return LastHiddenState(getattr(transformers, name)(configuration)), INPUTS[inputs]()

    return Family(name=f"{name} ({attention})", library="transformers", make=make, **expected)


def words() -> Tensor:
    return torch.arange(48)[None] % 20 + 1


INPUTS = {
    "words": lambda: {"input_ids": words()},
    "padded words": lambda: {"input_ids": words(), "attention_mask": (torch.arange(48) < 40)[None].long()},
    "picture": lambda: {"pixel_values": image(3, 32)},
    "video": lambda: {"pixel_values": noise(1, 4, 3, 16, 16)},
    "large video": lambda: {"pixel_values": noise(1, 4, 3, 32, 32)},
    "sound": lambda: {"input_values": noise(1, 1200)},
    "spectrogram": lambda: {"input_values": noise(1, 32, 32)},
}

TRANSFORMERS = [
    of_transformers("BertModel", LANGUAGE, "padded words", converted=2, tokens=("?",), fast=True),
    of_transformers("BertModel", LANGUAGE, "padded words", "sdpa", converted=2, tokens=("?",)),
    of_transformers("RobertaModel", LANGUAGE, "padded words", converted=2, tokens=("?",)),
    of_transformers(
        "ElectraModel", {**LANGUAGE, "embedding_size": 32}, "padded words", converted=2, tokens=("?",)
    ),
    of_transformers("LlamaModel", {**LANGUAGE, "num_key_value_heads": 1}, "words", dense={"mask": 2}, converted=0),
    of_transformers(
        "LlamaModel", {**LANGUAGE, "num_key_value_heads": 1}, "words", "sdpa", dense={"causal": 2}, converted=0
    ),
    of_transformers(
        "T5EncoderModel",
        {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 24}, "words",
        dense={"bias": 2}, converted=0,
    ),
    of_transformers("ViTModel", VISION, "picture", converted=2, tokens=("1 + 1x8x8",), fast=True),
    of_transformers("ViTModel", VISION, "picture", "sdpa", converted=2, tokens=("1 + 1x8x8",)),
    of_transformers("DeiTModel", VISION, "picture", converted=2, tokens=("2 + 1x8x8",)),
    of_transformers("Dinov2Model", VISION, "picture", converted=2, tokens=("1 + 1x8x8",)),
    of_transformers("BeitModel", VISION, "picture", converted=2, tokens=("1 + 1x8x8",)),
    of_transformers("CLIPVisionModel", VISION, "picture", converted=2, tokens=("1 + 1x8x8",)),
    of_transformers("SiglipVisionModel", VISION, "picture", converted=2, dense={"short": 1}, tokens=("1x8x8",)),
    of_transformers(
        "SiglipVisionModel", VISION, "picture", "sdpa", converted=2, dense={"short": 1}, tokens=("1x8x8",)
    ),
    of_transformers("VideoMAEModel", FRAMES, "video", converted=2, tokens=("2x4x4",)),
    of_transformers("VivitModel", {**FRAMES, "tubelet_size": [2, 4, 4]}, "video", converted=2, tokens=("1 + 2x4x4",)),
    of_transformers(
        "TimesformerModel", {**FRAMES, "image_size": 32}, "large video",
        converted=2, dense={"short": 2}, tokens=("1 + ?",),
    ),
    of_transformers("Wav2Vec2Model", SPEECH, "sound", converted=2, tokens=("?",)),
    of_transformers("HubertModel", SPEECH, "sound", converted=2, tokens=("?",)),
    of_transformers(
        "ASTModel",
        {**WIDTHS, "patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 32, "num_mel_bins": 32},
        "spectrogram", converted=2, tokens=("2 + 1x8x8",),
    ),
]  # fmt: skip


def of_x_transformers(title: str, layers: Inputs, mask: bool = False, **expected: Any) -> Family:
    def make() -> tuple[nn.Module, Inputs]:
        from x_transformers import ContinuousTransformerWrapper, Encoder

        encoder = Encoder(dim=32, depth=2, heads=2, attn_dim_head=16, **layers)
        model = ContinuousTransformerWrapper(dim_in=8, dim_out=8, max_seq_len=64, attn_layers=encoder)
        inputs: Inputs = {"x": noise(1, 48, 8)}
        return model, {**inputs, "mask": torch.arange(48)[None] < 40} if mask else inputs

    return Family(name=f"Encoder ({title})", library="x_transformers", make=make, **expected)


def picture_of_x_transformers() -> tuple[nn.Module, Inputs]:
    from x_transformers import Encoder, ViTransformerWrapper

    encoder = Encoder(dim=32, depth=2, heads=2, attn_dim_head=16)
    model = ViTransformerWrapper(image_size=32, patch_size=4, num_classes=4, attn_layers=encoder)
    return model, {"img": image(3, 32)}


X_TRANSFORMERS = [
    of_x_transformers("plain", {}, converted=2, tokens=("?",), fast=True),
    of_x_transformers("padding mask", {}, mask=True, converted=2, tokens=("?",)),
    of_x_transformers("rotary", {"rotary_pos_emb": True}, converted=2, tokens=("?",)),
    of_x_transformers("q and k normalised", {"attn_qk_norm": True}, converted=2, tokens=("?",)),
    of_x_transformers("flash", {"attn_flash": True}, converted=2, tokens=("?",)),
    of_x_transformers("one head of keys", {"attn_one_kv_head": True}, converted=2, tokens=("?",)),
    of_x_transformers("relative bias", {"rel_pos_bias": True}, converted=0, dense={"bias": 2}),
    Family(
        name="ViTransformerWrapper", library="x_transformers", make=picture_of_x_transformers,
        converted=2, tokens=("1x8x8",),
    ),
]  # fmt: skip


def of_timm(name: str, fused: bool, **expected: Any) -> Family:
    def make() -> tuple[nn.Module, Inputs]:
        timm = importlib.import_module("timm")
        size = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
        model = timm.create_model(name, num_classes=4, **size)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        return model, {"x": image(3, 32)}

    return Family(name=f"{name} ({'fused' if fused else 'unfused'})", library="timm", make=make, **expected)


TIMM = [
    of_timm("vit_tiny_patch16_224", False, converted=2, tokens=("1 + 1x8x8",)),
    of_timm("vit_tiny_patch16_224", True, converted=2, tokens=("1 + 1x8x8",)),
    of_timm("deit_tiny_patch16_224", False, converted=2, tokens=("1 + 1x8x8",)),
    of_timm("eva02_tiny_patch14_224", False, converted=2, tokens=("1 + 1x8x8",)),
    of_timm("beit_base_patch16_224", False, converted=0, dense={"bias": 2}),
]


class OwnKeys(nn.Module):
    """nn.MultiheadAttention as people call it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(32), nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attn(y, y, y)[0]  # type: ignore[no-any-return]


def encoder() -> tuple[nn.Module, Inputs]:
    layer = nn.TransformerEncoderLayer(32, 2, 48, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), {"src": noise(1, 48, 32)}


def encoder_and_decoder() -> tuple[nn.Module, Inputs]:
    model = nn.Transformer(32, 2, 1, 1, 48, dropout=0.0, batch_first=True)
    return model, {"src": noise(1, 48, 32), "tgt": noise(1, 40, 32)}


TORCH = [
    Family(
        name="nn.MultiheadAttention", library="torch", make=lambda: (OwnKeys(), {"x": noise(1, 48, 32)}),
        converted=1, tokens=("?",), fast=True,
    ),
    Family(name="nn.TransformerEncoder", library="torch", make=encoder, converted=2, tokens=("?",)),
    Family(name="nn.Transformer", library="torch", make=encoder_and_decoder, converted=3, tokens=("-", "?")),
]  # fmt: skip

FAMILIES = [*TRANSFORMERS, *X_TRANSFORMERS, *TIMM, *TORCH]
