"""Twenty-five transformers from small configurations, with a head on top wherever there is one for the architecture."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final

import torch

from tests.support.torchvision_shim import import_torchvision
from tests.support.zoo_sources import Blueprint, Shape

if TYPE_CHECKING:
    from torch import nn

_WORDS: Final = 100
_SHAPES: Final[Mapping[str, Shape]] = {  # of one example; integers are drawn for the ids
    "input_ids": (12,),
    "decoder_input_ids": (7,),
    "pixel_values": (3, 32, 32),
    "input_features": (8, 40),
    "input_values": (800,),
}


def _options(*parts: Mapping[str, Any], **further: Any) -> dict[str, Any]:
    """Returns the entries of all parts, and further ones."""
    return {key: value for part in (*parts, further) for key, value in part.items()}


_SIZES: Final = _options(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
_TEXT: Final = _options(_SIZES, vocab_size=_WORDS)
_IMAGE: Final = _options(_SIZES, image_size=32, patch_size=8)
_GROUPED: Final = _options(_TEXT, num_key_value_heads=2, max_position_embeddings=64, use_cache=False)
_LAYERS: Final = _options(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
_TWO_SIDED: Final = _options(_LAYERS, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48)
_RESNET: Final = _options(embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], out_features=["stage4"])
_SPEECH: Final = _options(num_feat_extract_layers=3, conv_dim=(16, 16, 16), conv_stride=(5, 2, 2), conv_kernel=(10, 3, 3))
_STAGES: Final = _options(depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 4, 4], decoder_hidden_size=16)
_BOTH_IDS: Final = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True)
class Configuration:
    """One network.

    Attributes:
        model: name of its class.
        config: name of its configuration's class.
        options: of the configuration; those named `<Class>:key` are built as that configuration class first.
        inputs: names of the arguments that it is fed.
        shapes: of one example, where they are not the usual ones.
    """

    model: str
    config: str
    options: Mapping[str, Any]
    inputs: tuple[str, ...] = ("input_ids",)
    shapes: Mapping[str, Shape] | None = None


_PIXELS: Final = ("pixel_values",)
_LARGER: Final = {"pixel_values": (3, 64, 64)}
CONFIGURATIONS: Final[Mapping[str, Configuration]] = {
    "bert": Configuration("BertForMaskedLM", "BertConfig", _TEXT),
    "roberta": Configuration("RobertaForMaskedLM", "RobertaConfig", _TEXT),
    "distilbert": Configuration(
        "DistilBertForMaskedLM", "DistilBertConfig", _options(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=_WORDS)
    ),
    "albert": Configuration("AlbertForMaskedLM", "AlbertConfig", _options(_TEXT, embedding_size=16)),
    "gpt2": Configuration("GPT2LMHeadModel", "GPT2Config", _options(n_embd=32, n_layer=2, n_head=4, vocab_size=_WORDS, use_cache=False)),
    "gpt_neox": Configuration("GPTNeoXForCausalLM", "GPTNeoXConfig", _options(_TEXT, use_cache=False)),
    "llama": Configuration("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "qwen2": Configuration("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": Configuration("Qwen3ForCausalLM", "Qwen3Config", _options(_GROUPED, head_dim=8)),
    "mistral": Configuration("MistralForCausalLM", "MistralConfig", _GROUPED),
    "mixtral": Configuration("MixtralForCausalLM", "MixtralConfig", _options(_GROUPED, num_local_experts=4)),
    "gemma2": Configuration("Gemma2ForCausalLM", "Gemma2Config", _options(_GROUPED, head_dim=8)),
    "phi3": Configuration("Phi3ForCausalLM", "Phi3Config", _options(_GROUPED, pad_token_id=0)),
    "t5": Configuration(
        "T5ForConditionalGeneration",
        "T5Config",
        _options(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=_WORDS, use_cache=False),
        _BOTH_IDS,
    ),
    "bart": Configuration(
        "BartForConditionalGeneration",
        "BartConfig",
        _options(_TWO_SIDED, vocab_size=_WORDS, use_cache=False, max_position_embeddings=64),
        _BOTH_IDS,
    ),
    "vit": Configuration("ViTForImageClassification", "ViTConfig", _IMAGE, _PIXELS),
    "deit": Configuration("DeiTForImageClassification", "DeiTConfig", _IMAGE, _PIXELS),
    "swin": Configuration(
        "SwinForImageClassification",
        "SwinConfig",
        _options(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4),
        _PIXELS,
    ),
    "convnext": Configuration(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        _options(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
        _PIXELS,
        _LARGER,
    ),
    "segformer": Configuration(
        "SegformerForSemanticSegmentation", "SegformerConfig", _options(_STAGES, hidden_sizes=[8, 16, 32, 32]), _PIXELS, _LARGER
    ),
    "detr": Configuration(
        "DetrForObjectDetection",
        "DetrConfig",
        _options(
            {**_TWO_SIDED, "ResNetConfig:backbone_config": _RESNET},
            num_queries=6,
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
        ),
        _PIXELS,
        _LARGER,
    ),
    "clip": Configuration(
        "CLIPModel",
        "CLIPConfig",
        _options(text_config=_options(_TEXT, max_position_embeddings=64), vision_config=_IMAGE, projection_dim=16),
        ("input_ids", "pixel_values"),
    ),
    "whisper": Configuration(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _options(
            _TWO_SIDED,
            vocab_size=_WORDS,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=30,
            pad_token_id=0,
            use_cache=False,
        ),
        ("input_features", "decoder_input_ids"),
    ),
    "wav2vec2": Configuration(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        _options(_SIZES, _SPEECH, vocab_size=32, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4),
        ("input_values",),
    ),
    "mamba": Configuration(
        "MambaForCausalLM",
        "MambaConfig",
        _options(hidden_size=32, num_hidden_layers=2, vocab_size=_WORDS, state_size=4, use_cache=False),
    ),
}


@cache
def library() -> Any:
    """Returns the module transformers; no weights are ever fetched."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import_torchvision()
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    return transformers


def names() -> tuple[str, ...]:
    """Returns the names of the configurations."""
    return tuple(CONFIGURATIONS)


def blueprint(name: str, size: int | None) -> Blueprint:
    """Returns how to build a network, see `zoo_sources.blueprint`; their sizes are part of the configurations."""
    del size
    if name not in CONFIGURATIONS:
        message = f"Unknown model: there is no small configuration of {name!r}, only of {', '.join(CONFIGURATIONS)}"
        raise ValueError(message)
    configuration = CONFIGURATIONS[name]
    return Blueprint(partial(_make, configuration), ((),), partial(_arguments, configuration))


def _make(configuration: Configuration) -> nn.Module:
    transformers = library()
    options = {}
    for key, value in configuration.options.items():
        inner, _, option = key.rpartition(":")
        options[option] = getattr(transformers, inner)(**value) if inner else value
    model: nn.Module = getattr(transformers, configuration.model)(getattr(transformers, configuration.config)(**options))
    return model


def _arguments(configuration: Configuration, batch: int, shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Returns the keyword arguments."""
    del shape
    shapes = {**_SHAPES, **(configuration.shapes or {})}
    drawn = {}
    for name in configuration.inputs:
        if name.endswith("ids"):
            drawn[name] = torch.randint(3, _WORDS - 5, (batch, *shapes[name]), generator=generator)
        else:
            drawn[name] = torch.randn(batch, *shapes[name], generator=generator, dtype=torch.float64)
    return drawn
