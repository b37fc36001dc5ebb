"""The inventory agrees with models that are built without memory.

Compared are names, order, shapes, parts and checkpoint keys. `tests/distributed/test_plan.py` compares it
with what the ranks of real runs hold.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_evomoe.checkpoint import store
from megatron_evomoe.config import StageKind
from megatron_evomoe.model import inventory
from megatron_evomoe.model.build import freeze
from megatron_evomoe.model.llava import LlavaModel
from megatron_evomoe.model.transformer_config import shapes_only
from megatron_evomoe.moe.router import ROUTERS
from tests.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("one_rank")
BUILDS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # all examples share the process groups
)


@st.composite
def configurations(draw):
    """A stage kind and a configuration that vary every choice on which tensors or shapes depend."""
    kind = draw(st.sampled_from(list(StageKind)))
    heads = draw(st.sampled_from([2, 4]))
    tied = draw(st.booleans())
    language = {
        "num_layers": draw(st.integers(1, 3)),
        "hidden_size": draw(st.sampled_from([16, 24])),
        "ffn_hidden_size": draw(st.sampled_from([20, 48])),
        "num_attention_heads": heads,
        "num_query_groups": draw(st.sampled_from([None, 1, 2])),
        "kv_channels": draw(st.sampled_from([None, 6])),
        "vocab_size": draw(st.integers(40, 90)),
        "normalization": draw(st.sampled_from(["RMSNorm", "LayerNorm"])),
        "gated_linear_unit": draw(st.booleans()),
        "add_qkv_bias": draw(st.booleans()),
        "add_bias_linear": draw(st.booleans()),
        "qk_layernorm": draw(st.booleans()),
        "parallel_residual": draw(st.booleans()),
        "tie_word_embeddings": tied,
        "lm_head_bias": not tied and draw(st.booleans()),
    }
    size = {"min_size": language["num_layers"], "max_size": language["num_layers"]}
    patterns = st.lists(st.integers(0, 1), **size).filter(any)
    moe = {
        "router": draw(st.sampled_from(list(ROUTERS))),
        "num_experts": draw(st.integers(2, 3)),
        "moe_layer_freq": draw(patterns),
    }
    vision = {
        "model_type": draw(st.sampled_from(["clip", "siglip"])),
        "num_layers": draw(st.integers(2, 3)),
        "feature_layer": draw(st.sampled_from([-1, -2])),
    }
    return kind, tiny_config(kind.value, language=language, moe=moe, vision=vision)


@BUILDS
@given(configurations())
def test_names_order_and_shapes_are_the_models(one_rank, case):
    kind, config = case
    with shapes_only():
        model = LlavaModel(config, stage_kind=kind)
    stated = [(t.name, t.shape) for t in inventory.tensors(config, kind)]
    assert stated == [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    assert inventory.count(config, kind).parameters == sum(p.numel() for p in model.parameters())


@BUILDS
@given(configurations())
def test_keys_and_whole_shapes_are_those_of_a_checkpoint(one_rank, case):
    """`evolve` saves the experts beside the dense FFN, under the keys of a mixture."""
    kind, config = case
    with shapes_only():
        state = LlavaModel(config, stage_kind=kind).sharded_state_dict(metadata=store.metadata())
    saved = {}
    for entry in state.values():
        entry = entry.build()[0] if isinstance(entry, ShardedTensorFactory) else entry
        if isinstance(entry, ShardedTensor) and not re.search(r"\.mlp\.evolution\.", entry.key):
            saved[entry.key] = tuple(entry.global_shape)
    evolving = inventory.tensors(config, StageKind.ROUTE) if kind == StageKind.EVOLVE else ()
    stated = [*inventory.tensors(config, kind), *(t for t in evolving if t.part == "experts")]
    experts = config.moe.num_experts
    assert {t.key: t.shape if t.expert is None else (experts, *t.shape) for t in stated} == saved


@pytest.mark.parametrize("kind", StageKind)
def test_parts_are_what_freezing_goes_by(kind):
    """The inventory's parts agree with what freezing trains.

    This is also true of a pipeline chunk that does not begin at layer 0, whose names count from its own first
    layer.
    """
    config = tiny_config(kind.value, language={"num_layers": 4})
    with shapes_only():
        model = LlavaModel(config, stage_kind=kind)
    freeze(model, config, kind, first_layer=0)
    every = list(inventory.tensors(config, kind))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert inventory.count(config, kind).trainable == trained > 0
    for tensor in every:
        if tensor.layer is not None and tensor.layer >= 1:
            assert inventory.part_of(tensor.local_name(1), config, kind, first_layer=1) == tensor.part


def test_counts_of_a_mixture():
    """Top-1 of four experts in one of two layers leaves three experts inactive for a token."""
    config = tiny_config("route")
    counts = inventory.count(config, StageKind.ROUTE)
    expert = 3 * 32 * 48
    assert counts.parameters - counts.active == 3 * expert
    router = 4 * 32 + 2 * (4 * 32 + 4 + 5 * 8 * 32 + 5 * 4 * 32)
    assert counts.trainable == router


@pytest.mark.parametrize("tied", [True, False])
def test_places_are_those_of_pipeline_chunks(tied):
    """Under pipelining the last stage has a copy of a tied matrix; a model on one rank has none."""
    config = tiny_config("route", language={"tie_word_embeddings": tied})
    ends = ({"first": True, "last": False}, {"first": False, "last": True}, {"first": False, "last": False})
    first, last, middle = (list(inventory.tensors(config, StageKind.ROUTE, [1], **end)) for end in ends)
    assert {t.place for t in middle} == {"layer"} and {t.layer for t in middle} == {1}
    assert {t.place for t in first} == {"first", "layer"} and {t.place for t in last} == {"last", "layer"}
    assert any(t.name == "language_model.output_layer.weight" for t in last)
    whole = [t.name for t in inventory.tensors(config, StageKind.ROUTE)]
    assert ("language_model.output_layer.weight" in whole) is not tied


def test_neither_torch_nor_megatron_core_is_imported():
    code = (
        "import sys; from megatron_evomoe.model import inventory; "
        "found = {'torch', 'megatron'} & {name.split('.')[0] for name in sys.modules}; assert not found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
