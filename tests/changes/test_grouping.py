"""Layers and modules, from the names that real architectures give their tensors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaweights.changes.grouping import place_tensors

#: Architecture, a tensor's name, its stack, layer, module and part.
NAMES = [
    ("llama", "model.layers.40.self_attn.q_proj.weight", "model.layers", 40, "self_attn.q_proj", "attention"),
    ("llama", "model.layers.40.self_attn.q_norm.weight", "model.layers", 40, "self_attn.q_norm", "norms"),
    ("llama", "model.layers.9.mlp.down_proj.weight", "model.layers", 9, "mlp.down_proj", "MLP"),
    ("llama", "model.layers.9.input_layernorm.weight", "model.layers", 9, "input_layernorm", "norms"),
    ("llama", "model.embed_tokens.weight", "", None, "model.embed_tokens", "embeddings"),
    ("llama", "model.norm.weight", "", None, "model.norm", "norms"),
    ("llama", "lm_head.weight", "", None, "lm_head", "head"),
    ("llama, Meta's", "layers.3.attention.wq.weight", "layers", 3, "attention.wq", "attention"),
    ("llama, Meta's", "layers.3.feed_forward.w1.weight", "layers", 3, "feed_forward.w1", "MLP"),
    ("llama, Meta's", "tok_embeddings.weight", "", None, "tok_embeddings", "embeddings"),
    ("llama, Meta's", "output.weight", "", None, "output", "head"),
    ("gpt2", "h.11.attn.c_attn.weight", "h", 11, "attn.c_attn", "attention"),
    ("gpt2", "transformer.h.0.mlp.c_fc.bias", "transformer.h", 0, "mlp.c_fc", "MLP"),
    ("gpt2", "h.0.ln_1.weight", "h", 0, "ln_1", "norms"),
    ("gpt2", "wpe.weight", "", None, "wpe", "embeddings"),
    ("gpt_neox", "gpt_neox.layers.5.attention.query_key_value.weight", "gpt_neox.layers", 5,
     "attention.query_key_value", "attention"),
    ("gpt_neox", "gpt_neox.layers.5.mlp.dense_h_to_4h.bias", "gpt_neox.layers", 5, "mlp.dense_h_to_4h",
     "MLP"),
    ("gpt_neox", "embed_out.weight", "", None, "embed_out", "head"),
    ("bert", "encoder.layer.2.attention.self.query.weight", "encoder.layer", 2, "attention.self.query",
     "attention"),
    ("bert", "encoder.layer.2.attention.output.dense.weight", "encoder.layer", 2, "attention.output.dense",
     "attention"),
    ("bert", "encoder.layer.2.attention.output.LayerNorm.bias", "encoder.layer", 2,
     "attention.output.LayerNorm", "norms"),
    ("bert", "encoder.layer.2.output.dense.weight", "encoder.layer", 2, "output.dense", "MLP"),
    ("bert", "embeddings.word_embeddings.weight", "", None, "embeddings.word_embeddings", "embeddings"),
    ("bert", "pooler.dense.weight", "", None, "pooler.dense", "head"),
    ("t5", "decoder.block.7.layer.1.EncDecAttention.k.weight", "decoder.block", 7,
     "layer.1.EncDecAttention.k",
     "attention"),
    ("t5", "encoder.block.0.layer.1.DenseReluDense.wi.weight", "encoder.block", 0,
     "layer.1.DenseReluDense.wi",
     "MLP"),
    ("t5", "shared.weight", "", None, "shared", "embeddings"),
    ("whisper", "model.encoder.layers.3.self_attn.k_proj.weight", "model.encoder.layers", 3,
     "self_attn.k_proj", "attention"),
    ("whisper", "model.decoder.layers.3.fc1.weight", "model.decoder.layers", 3, "fc1", "MLP"),
    ("mamba", "backbone.layers.1.mixer.in_proj.weight", "backbone.layers", 1, "mixer.in_proj", "mixer"),
    ("mamba", "backbone.layers.1.mixer.A_log", "backbone.layers", 1, "mixer.A_log", "mixer"),
    ("qwen2-vl", "visual.blocks.3.attn.qkv.weight", "visual.blocks", 3, "attn.qkv", "attention"),
    ("qwen2-vl", "visual.merger.mlp.2.weight", "", None, "visual.merger.mlp.2", "MLP"),
    ("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight", "down_blocks", 1,
     "attentions.0.transformer_blocks.0.attn1.to_q", "attention"),
    ("unet", "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj.weight", "down_blocks", 1,
     "attentions.0.transformer_blocks.0.ff.net.0.proj", "MLP"),
    ("resnet", "layer1.0.bn1.running_mean", "layer", 1, "0.bn1", "norms"),
    ("resnet", "layer2.1.conv1.weight", "layer", 2, "1.conv1", "conv1"),
    ("gguf", "blk.0.attn_q.weight", "blk", 0, "attn_q", "attention"),
    ("gguf", "blk.1.ffn_gate.weight", "blk", 1, "ffn_gate", "MLP"),
    ("sentence-transformers", "0.auto_model.encoder.layer.3.output.dense.weight",
     "0.auto_model.encoder.layer", 3, "output.dense", "MLP"),
    ("FP8", "model.layers.0.mlp.up_proj.weight_scale_inv", "model.layers", 0, "mlp.up_proj", "MLP"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "name", "stack", "layer", "module", "part"), NAMES, ids=str)
def test_names_of_real_architectures(
    model: str, name: str, stack: str, layer: int | None, module: str, part: str
) -> None:
    place = place_tensors([own for other, own, *_ in NAMES if other == model])[name]
    assert (place.stack, place.layer, place.module, place.part) == (stack, layer, module, part)


def test_experts_are_one_module_and_layers_are_not() -> None:
    names = [f"model.layers.{n}.mlp.experts.{k}.up_proj.weight" for n in range(3) for k in range(64)]
    places = place_tensors(names).values()
    assert {place.module for place in places} == {"mlp.experts.*.up_proj"}
    assert {place.layer for place in places} == {0, 1, 2}


def test_numbers_count_layers_where_no_word_says_so() -> None:
    places = place_tensors([f"net.{k}.linear.weight" for k in range(3)])
    assert [place.layer for place in places.values()] == [0, 1, 2]
    alone = place_tensors(["net.0.linear.weight", "net.0.linear.bias"])
    assert {(place.layer, place.module) for place in alone.values()} == {(None, "net.0.linear")}


@given(st.lists(st.text(max_size=40) | st.from_regex(r"[a-z.0-9]{0,40}", fullmatch=True), unique=True))
def test_any_name_has_a_place(names: list[str]) -> None:
    places = place_tensors(names)
    assert list(places) == names
    for place in places.values():
        assert place.module
        assert place.part
        assert (place.layer is None) == (place.stack == "")
        assert place.layer is None or 0 <= place.layer < 10**6


def test_endless_names_cost_little() -> None:
    name = "0." * 100_000
    assert place_tensors([name, "1." * 100_000])[name].part
