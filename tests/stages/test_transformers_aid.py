from __future__ import annotations

import pytest
import torch

from modelops.stages._recurrences import channel_delta_rule, gated_delta_rule, linear_scan, selective_scan
from modelops.stages._transformers import aid_for, needs_aid, rotated


@pytest.mark.parametrize("length", [1, 2, 37])
def test_a_scan_gives_what_a_loop_over_all_elements_gives(length):
    gates = torch.rand(2, 3, length, 4, dtype=torch.float64)
    values = torch.randn(2, 3, length, 4, dtype=torch.float64)
    _, found = linear_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (gates, values), dim=2)
    state = torch.zeros(2, 3, 4, dtype=torch.float64)
    for place in range(length):
        state = gates[:, :, place] * state + values[:, :, place]
        torch.testing.assert_close(found[:, :, place], state)


def test_only_models_of_transformers_are_aided():
    assert aid_for(torch.nn.Linear(2, 2)) is None


def test_experts_in_a_loop_are_grouped_while_they_are_exported_and_give_the_same():
    from transformers import OpenAIPrivacyFilterConfig, OpenAIPrivacyFilterModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = OpenAIPrivacyFilterModel(OpenAIPrivacyFilterConfig(**sizes, **heads, pad_token_id=0)).eval()
    ids = torch.randint(1, 50, (2, 5))
    assert model.config._experts_implementation == "eager" and needs_aid(model)
    with torch.no_grad():
        wanted = model(ids).last_hidden_state
        with aid_for(model).patched():
            assert model.config._experts_implementation == "grouped_mm"
            found = model(ids).last_hidden_state
    assert model.config._experts_implementation == "eager"
    torch.testing.assert_close(found, wanted)


def test_sums_of_decays_are_rounded_as_torch_rounds_them():
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 48, 2, 8, generator=draw) for _ in range(3))
    gates = {"g": -30 * torch.rand(2, 48, 2, generator=draw), "beta": torch.rand(2, 48, 2, generator=draw)}
    wanted, _ = torch_chunk_gated_delta_rule(query, key, value, **gates, use_qk_l2norm_in_kernel=True)

    def summed(self, dim):  # as onnxruntime does it, rounding at every step
        steps = list(self.unbind(dim))
        for place in range(1, len(steps)):
            steps[place] = steps[place - 1] + steps[place]
        return torch.stack(steps, dim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cumsum", summed)
        found, _ = gated_delta_rule(query, key, value, **gates, use_qk_l2norm_in_kernel=True)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 2e-6


@pytest.mark.parametrize("length", [1, 7, 70])
def test_the_gated_delta_rule_gives_what_transformers_gives(length):
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, length, 2, 8, generator=draw) for _ in range(2))
    value = torch.randn(2, length, 4, 6, generator=draw)
    gates = {"g": -torch.rand(2, length, 4, generator=draw), "beta": torch.rand(2, length, 4, generator=draw)}
    flags = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    wanted = torch_chunk_gated_delta_rule(query, key, value, **gates, **flags)
    torch.testing.assert_close(gated_delta_rule(query, key, value, **gates, **flags), wanted)


@pytest.mark.parametrize("length", [1, 7])
def test_the_gated_delta_rule_takes_a_decay_for_each_channel(length):
    from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention

    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, length, 2, 8, generator=draw) for _ in range(3))
    gates = {"g": -torch.rand(2, length, 2, 8, generator=draw), "beta": torch.rand(2, length, 2, generator=draw)}
    flags = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    wanted = chunk_kimi_delta_attention(query, key, value, **gates, **flags)
    torch.testing.assert_close(channel_delta_rule(query, key, value, **gates, **flags), wanted)


@pytest.mark.parametrize("length", [1, 9])
def test_the_selective_scan_gives_what_transformers_gives(length):
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    draw = torch.Generator().manual_seed(0)
    values, dt = torch.randn(2, length, 4, 6, generator=draw), torch.randn(2, length, 4, generator=draw)
    read, write = (torch.randn(2, length, 2, 5, generator=draw) for _ in range(2))
    given = (values, dt, -torch.rand(4, generator=draw), write, read, 8)
    flags = {"D": torch.ones(4), "dt_bias": torch.ones(4), "dt_softplus": True, "return_final_states": True}
    torch.testing.assert_close(selective_scan(*given, **flags), mamba2_chunk_scan(*given, **flags))


def test_rotations_in_real_numbers_are_those_of_llama_4():
    from transformers.models.llama4.modeling_llama4 import apply_rotary_emb

    draw = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 5, 4, 8, generator=draw), torch.randn(2, 5, 2, 8, generator=draw)
    angles = torch.rand(2, 5, 4, generator=draw)
    turns = torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(rotated(query, key, turns), apply_rotary_emb(query, key, turns))
