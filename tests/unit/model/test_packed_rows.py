"""A packed row computes what its samples do in rows of their own: outputs, gradients, auxiliary losses.

Models are fp32. Differences come from the order of sums alone; the largest seen is 1.5e-7, of values up to 8.
"""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe import moe_utils

from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.conversation import IGNORE_INDEX
from megatron_evomoe.model import attention
from megatron_evomoe.model.llava import LlavaModel
from megatron_evomoe.parallel import topology
from tests.tiny import rows, tiny_config

pytestmark = pytest.mark.usefixtures("one_rank")

PHI = {
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "parallel_residual": True,
    "activation": "gelu_tanh",
    "gated_linear_unit": False,
    "rotary_percent": 0.5,
}
LANGUAGES = {
    "plain": {},
    "shared heads, norms of queries and keys": {
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "qk_layernorm": True,
    },
    "a window": {"window_size": 5},
    "Phi-2": PHI,
    "llama3's rotations": {"rope_scaling_type": "llama3", "rope_scaling_factor": 4.0},
    "stretched rotations": {"rope_scaling_type": "linear", "rope_scaling_factor": 3.0},
}
MIXTURES = {
    "dtr": {"router": "dtr"},
    "linear": {"router": "linear"},
    "linear, top-2, capacity, z-loss": {
        "router": "linear",
        "moe_router_topk": 2,
        "moe_expert_capacity_factor": 1.0,
        "moe_z_loss_coeff": 0.1,
    },
}
RECOMPUTES = {
    "full": {"recompute_granularity": "full"},
    "attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "FFN": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "mixture": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


def samples() -> dict[str, torch.Tensor]:
    """Four padded rows: two images, none, one, and a sample of one position."""
    batch = rows([2, 0, 1, 0], length=20, answer=(3, 5))
    batch["token_types"][3, 1:] = TokenType.PADDING
    batch["labels"][3] = IGNORE_INDEX
    batch["labels"][3, 0] = 7
    return batch


def packed(batch: dict[str, torch.Tensor], padding: int = 3) -> dict:
    """The samples of padded rows one after the other in one row, and a segment of padding."""
    real = batch["token_types"] != TokenType.PADDING

    def joined(name: str, fill: int) -> torch.Tensor:
        return torch.nn.functional.pad(batch[name][real], (0, padding), value=fill)[None]

    return {
        "tokens": joined("tokens", 0),
        "labels": joined("labels", IGNORE_INDEX),
        "token_types": joined("token_types", TokenType.PADDING),
        "images": batch["images"],
        "segments": (*real.sum(1).tolist(), *([padding] if padding else [])),
    }


def run(model: LlavaModel, batch: dict) -> dict[str, torch.Tensor]:
    """Losses of the supervised positions, gradients of all parameters, and logged auxiliary losses."""
    tracker = moe_utils.get_moe_layer_wise_logging_tracker()
    tracker.clear()
    model.zero_grad()
    supervised = batch["labels"] != IGNORE_INDEX
    arguments = {k: v for k, v in batch.items() if k != "keys"}
    losses = model(**arguments)[supervised]
    losses.mean().backward()
    found = {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters()}
    found |= {name: values["values"].clone() for name, values in tracker.items()}
    return {"losses": losses.detach(), **found}


def model_of(kind: str, language: dict, moe: dict, train: dict) -> LlavaModel:
    config = tiny_config(kind, language=language, moe=moe, train=train)
    topology.seed_everything(3)
    model = LlavaModel(config.for_stage(kind), stage_kind=kind)
    with torch.no_grad():
        for parameter in model.parameters():  # far from where attention is even and routing is a draw
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (got[name] - value).abs().max() <= 1e-6 * (1 + value.abs().max()), name


@pytest.mark.parametrize("language", LANGUAGES.values(), ids=LANGUAGES)
def test_dense(language):
    model, batch = model_of("warmup", language, {}, {}), samples()
    assert_same(run(model, packed(batch)), run(model, batch))


@pytest.mark.parametrize("moe", MIXTURES.values(), ids=MIXTURES)
def test_mixtures(moe):
    """Routing, capacity and auxiliary losses count real tokens alone, however they lie in rows."""
    model, batch = model_of("route", {}, {"moe_aux_loss_coeff": 0.5, **moe}, {}), samples()
    got, wanted = run(model, packed(batch)), run(model, batch)
    assert wanted["load_balancing_loss"].any()
    assert_same(got, wanted)


@pytest.mark.parametrize("recompute", RECOMPUTES.values(), ids=RECOMPUTES)
@pytest.mark.parametrize(
    ("kind", "language", "moe"),
    [
        ("warmup", {}, {}),
        ("warmup", PHI, {}),
        ("evolve", {}, {}),
        ("route", {}, MIXTURES["dtr"]),
        ("route", {}, MIXTURES["linear"]),
    ],
)
def test_recompute(kind, language, moe, recompute):
    """Recomputed segments are those of the microbatch, although another one ran in between."""
    batch, moe = samples(), {**moe, "moe_aux_loss_coeff": 0.0}  # the other microbatch would add to it
    plain = run(model_of(kind, language, moe, {}), packed(batch))
    model = model_of(kind, language, moe, recompute)
    one, two = packed(batch), packed(rows([1, 1], seed=5))
    total = model(**one)[one["labels"] != IGNORE_INDEX].mean()
    other = model(**two).sum() * 0
    (total + other).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, plain[f"{name}.grad"]), name


@pytest.mark.parametrize("kind", ["warmup", "route"])
def test_each_sample_alone(kind):
    """A sample's logits are those of a row that it fills, wherever it lies among how many segments."""
    model, batch = model_of(kind, {}, {}, {}).eval(), samples()
    row = packed(batch)
    arguments = {name: row[name] for name in ("tokens", "token_types", "images", "segments")}
    with torch.no_grad():
        together = model(**arguments).split(row["segments"], dim=1)
        images = batch["images"].split([2, 0, 1, 0])
        for i, length in enumerate(row["segments"][:-1]):
            alone = model(
                batch["tokens"][i : i + 1, :length], batch["token_types"][i : i + 1, :length], images[i]
            )
            assert (together[i] - alone).abs().max() <= 1e-5, i
            filled = model(
                batch["tokens"][i : i + 1, :length],
                batch["token_types"][i : i + 1, :length],
                images[i],
                segments=(length,),
            )
            assert torch.equal(filled, alone)


def test_these_tests_see_what_crosses_segments(monkeypatch):
    """With attention across segments, or positions that do not restart, outputs and gradients differ."""
    model, batch = model_of("warmup", {}, {}, {}), samples()
    wanted = run(model, batch)
    one_segment = {**packed(batch), "segments": (packed(batch)["tokens"].shape[1],)}
    with pytest.raises(AssertionError, match="losses"):
        assert_same(run(model, one_segment), wanted)
    monkeypatch.setattr(
        attention.SdpaAttention,
        "_attend_segments",
        lambda self, q, k, v, packed, causal: self._attend(*(x[:, None] for x in (q, k, v)), causal)[:, 0],
    )
    with pytest.raises(AssertionError, match="losses"):
        assert_same(run(model, packed(batch)), wanted)


@pytest.mark.parametrize(("rows_of", "segments"), [([0], (20,)), ([0, 0], (24,)), ([0], ())])
def test_segments_fill_one_row(rows_of, segments):
    batch = rows(rows_of)
    with pytest.raises(ValueError, match="must fill one row"):
        model_of("warmup", {}, {}, {})(
            batch["tokens"], batch["token_types"], batch["images"], batch["labels"], segments
        )
