from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from transformers import LEDConfig, LongformerConfig
from transformers.models.led.modeling_led import LEDEncoder, LEDEncoderSelfAttention
from transformers.models.longformer.modeling_longformer import LongformerModel, LongformerSelfAttention

from modelops.stages._windows import STAND_INS

SIZES = {"vocab_size": 50, "attention_window": [4, 8]}


def _longformer():
    config = LongformerConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=80, **SIZES,
    )  # fmt: skip
    return LongformerModel(config).eval()


def _led():
    config = LEDConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=24,
        max_encoder_position_embeddings=80, **SIZES,
    )  # fmt: skip
    return LEDEncoder(config).eval()


@pytest.mark.parametrize("length", [1, 7, 16, 37])
@pytest.mark.parametrize("made", [_longformer, _led])
def test_windows_of_any_length_give_what_transformers_gives(made, length):
    torch.manual_seed(0)
    model = made()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids, mask = torch.randint(3, 50, (3, length)), torch.ones(3, length, dtype=torch.long)
    mask[1, (length + 1) // 2 :] = 0  # padded
    globals_ = torch.zeros(3, length, dtype=torch.long)
    globals_[0, [0, length // 2]] = 1
    globals_[1, 0] = 1
    for given in ({}, {"global_attention_mask": globals_}):
        with torch.no_grad():
            wanted = model(ids, mask, **given).last_hidden_state
            with _stood_in():
                found = model(ids, mask, **given).last_hidden_state
        torch.testing.assert_close(found, wanted)


def _stood_in():
    from contextlib import ExitStack

    stack = ExitStack()
    for cls in (LongformerSelfAttention, LongformerModel, LEDEncoderSelfAttention, LEDEncoder):
        for name, method in STAND_INS[cls.__name__].items():
            stack.enter_context(patch.object(cls, name, method))
    return stack
