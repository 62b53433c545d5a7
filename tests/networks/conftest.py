"""A model of one block with random weights, and a Qwen3 of one layer, for tests of whole networks."""

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3Model

from library.anima_runtime.config import AnimaConfig, LLMAdapterConfig
from library.anima_runtime.transformer import AnimaTransformer


@pytest.fixture
def make_model():
    """make_model() -> the same frozen transformer each time."""
    config = AnimaConfig(
        latent_channels=16, patch_size=2, width=64, depth=1, head_size=32, mlp_width=128, context_width=32,
        adaln_rank=8,
        llm_adapter=LLMAdapterConfig(
            vocabulary=64, width=32, depth=1, head_size=16, mlp_width=48, source_width=24, context_width=32
        ),
    )  # fmt: skip

    def make() -> AnimaTransformer:
        torch.manual_seed(0)
        return AnimaTransformer(config).requires_grad_(False)

    return make


@pytest.fixture
def model(make_model) -> AnimaTransformer:
    return make_model()


@pytest.fixture
def text_encoder() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen3Model(Qwen3Config(vocab_size=40, num_hidden_layers=1, head_dim=12, **sizes)).requires_grad_(False)
