from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from modelops.errors import StageFailed
from modelops.sources._parts import choose


def _config(**values):
    config = SimpleNamespace(**{"vocab_size": 64, "is_encoder_decoder": False, **values})
    config.get_text_config = lambda: config
    return config


class Text(torch.nn.Module):
    """Takes tokens, and gives a cache beside its scores unless told not to."""

    main_input_name = "input_ids"

    def __init__(self, **config):
        super().__init__()
        self.config = _config(**config)

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        found = {"logits": input_ids.float()}
        return found if use_cache is False else {**found, "past_key_values": object()}


class Sound(torch.nn.Module):
    """Takes frames of mel bins; of one length where it is ``strict``."""

    main_input_name = "input_features"

    def __init__(self, strict):
        super().__init__()
        self.config, self.strict = _config(num_mel_bins=8), strict

    def forward(self, input_features):
        if input_features.shape[-1] != 8 or (self.strict and input_features.shape[1] != 96):
            raise ValueError("of another shape")
        return input_features.mean(1), SimpleNamespace(length=3)


class Detector(torch.nn.Module):
    main_input_name = "pixel_values"

    def __init__(self, needs_words):
        super().__init__()
        self.config = _config(is_encoder_decoder=True, image_size=32, num_channels=1)
        self.needs_words, self.encoder = needs_words, torch.nn.Identity()
        self.encoder.forward = lambda pixel_values: pixel_values
        self.encoder.main_input_name = "pixel_values"

    def get_encoder(self):
        return self.encoder

    def forward(self, pixel_values, decoder_input_ids=None):
        if self.needs_words and decoder_input_ids is None:
            raise ValueError("You have to specify decoder_input_ids")
        return pixel_values.sum((2, 3))


def test_no_cache_is_asked_for_where_the_model_would_give_one(tmp_path):
    chosen = choose(Text(), tmp_path)
    assert chosen.settings == {"use_cache": False} and chosen.notes == ()
    assert [str(spec) for spec in chosen.examples.specs] == [
        "input_ids:int64[batch,sequence]",
        "attention_mask:int64[batch,sequence]",
    ]


def test_what_stands_for_an_image_is_no_word_of_made_up_text(tmp_path):
    assert choose(Text(image_token_id=60), tmp_path).examples.ranges == {"input_ids": 60}
    assert choose(Text(image_token_id=6), tmp_path).examples.ranges == {"input_ids": 64}


@pytest.mark.parametrize(("strict", "shape"), [(False, ("batch", "frames", 8)), (True, ("batch", 96, 8))])
def test_a_length_is_dynamic_only_where_the_model_itself_takes_another(strict, shape, tmp_path):
    chosen = choose(Sound(strict), tmp_path)
    assert chosen.examples.specs[0].shape == shape
    assert any("refuses another size" in note for note in chosen.notes) == strict


def test_outputs_that_are_no_tensors_are_left_out_by_name(tmp_path):
    chosen = choose(Sound(False), tmp_path)
    assert "outputs left out: 1" in chosen.notes
    (only,) = chosen.module(input_features=torch.ones(2, 96, 8))
    assert only.shape == (2, 8)


def test_of_what_writes_text_the_encoder_is_converted_and_of_what_finds_things_the_whole(tmp_path):
    detector, writer = Detector(False), Detector(True)
    assert choose(detector, tmp_path).module is detector
    assert choose(writer, tmp_path).module is writer.encoder


def test_a_model_that_runs_on_nothing_known_is_refused_with_what_was_tried(tmp_path):
    class Odd(Text):
        def forward(self, input_ids, weather):
            return input_ids

    with pytest.raises(
        StageFailed, match=r"no example inputs are known for Odd, which takes input_ids, weather"
    ) as caught:
        choose(Odd(), tmp_path)
    assert "file.py:function" in caught.value.hint
