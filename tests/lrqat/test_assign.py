"""Assignments: which pattern means which weight, which rule wins, and what is refused before weights are loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lrqat.assign import Assignment
from lrqat.errors import LrqatError
from lrqat.grid import Grid
from lrqat.plan import plan

DOWN, UP = "model.layers.1.mlp.down_proj.weight", "model.layers.10.mlp.up_proj.weight"


def assignment(*overrides: str, skip: tuple[str, ...] = ()) -> Assignment:
    return Assignment.make(Grid.parse("w4g32"), overrides, skip)


def skeleton(tied: bool = True, **changes: Any) -> Any:
    """A Llama without weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, **changes},
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("down_proj", [DOWN]),
        ("mlp", [DOWN, UP]),
        ("mlp.down_proj", [DOWN]),
        ("mlp.down_proj.weight", [DOWN]),
        ("layers.1", [DOWN]),
        ("model.layers.10.mlp.up_proj", [UP]),
        ("down", []),
        ("proj", []),
        ("re:.*down_proj", [DOWN]),
        ("re:.*down", [DOWN]),
        ("re:down_proj", []),
        (r"re:model\.layers\.1", [DOWN, UP]),
        (r"re:model\.layers\.(?=1\.)", [DOWN]),
        (r"re:.*\.mlp\.(?!up)", [DOWN]),
        (r"re:.*_proj$", [DOWN, UP]),
    ],
)
def test_a_pattern_means_whole_parts_of_the_name_or_a_regular_expression_from_its_start(
    pattern: str, meant: list[str]
) -> None:
    rules = assignment(f"{pattern}=w8")
    assert [name for name in (DOWN, UP) if rules.of(name) == Grid.parse("w8")] == meant
    assert all(rules.of(name) == Grid.parse("w4g32") for name in (DOWN, UP) if name not in meant)


def test_the_last_rule_that_matches_wins_and_skip_beats_them() -> None:
    assert str(assignment("mlp=w8", "down_proj=q4_k").of(DOWN)) == "q4_k"
    assert str(assignment("down_proj=q4_k", "mlp=w8").of(DOWN)) == "w8"
    assert assignment("mlp=w8", "down_proj=dense").of(DOWN) is None
    assert assignment("down_proj=w8", skip=(r"layers\.1\.",)).of(DOWN) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("down_proj", "expected PATTERN=GRID"),
        ("=w8", "expected PATTERN=GRID"),
        ("re:=w8", "expected PATTERN=GRID"),
        ("down_proj=", "expected PATTERN=GRID"),
        ("down_proj=w9", "grid 'w9'.* or dense"),
        ("re:(=w8", "is no regular expression"),
    ],
)
def test_what_is_no_override_is_one_line_that_names_it(text: str, message: str) -> None:
    with pytest.raises(LrqatError, match=rf"^--override '[^\n]*{message}[^\n]*$"):
        assignment(text)


def test_a_plan_counts_every_matrix_and_leaves_head_and_embeddings_alone() -> None:
    found = plan(skeleton(tied=False), assignment("re:.*down_proj=q4_k", skip=(r"layers\.0\.self_attn",)))
    assert len(found.sites) == 16 and len(found.grids) == 10
    assert [name for name, grid in found.grids.items() if str(grid) == "q4_k"] == [
        f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)
    ]
    assert found.skipped == [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkvo"]
    assert str(found) == "8 weights w4g32, 2 weights q4_k; 4 skipped"


@pytest.mark.parametrize(
    ("override", "name"), [("lm_head=w8g32", "lm_head"), ("re:.*embed=q8_0", "model.embed_tokens")]
)
def test_only_an_override_reaches_head_and_embeddings(override: str, name: str) -> None:
    assert plan(skeleton(tied=False), assignment(override)).grids.keys() - plan(
        skeleton(tied=False), assignment()
    ).grids.keys() == {f"{name}.weight"}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (assignment("no_proj=w8"), "--override 'no_proj=w8': matches no weight of LlamaForCausalLM.*model.layers"),
        (assignment(skip=("no_proj",)), "--skip 'no_proj': matches no weight"),
        (assignment("lm_head=w8"), "lm_head is tied to model.embed_tokens.*--override model.embed_tokens=w8"),
        (
            assignment("re:.*q_proj=q4_k"),
            "--override 're:.*q_proj=q4_k': model.layers.0.self_attn.q_proj.weight: super",
        ),
        (assignment("q_proj=w4g48"), "--override 'q_proj=w4g48': .*group_size 48 does not divide in_features 64"),
        (Assignment.make(Grid.parse("w4g48")), "^model.layers.0.*group_size 48 does not divide"),
        (assignment(skip=(".",)), "no linear layer to quantize.*--skip"),
    ],
)
def test_what_cannot_be_is_one_line_with_its_remedy(rules: Assignment, message: str) -> None:
    with pytest.raises(LrqatError, match=rf"^(?=[^\n]*$).*{message.removeprefix('^')}"):
        plan(skeleton(), rules)


def test_a_rank_that_exceeds_a_trained_weight_is_refused_with_one_that_does_not() -> None:
    with pytest.raises(LrqatError, match=r"k_proj\.weight: rank 33 exceeds 32x64; use --rank 32"):
        plan(skeleton(), assignment(), rank=33)
    plan(skeleton(vocab_size=16), assignment("embed_tokens=w8"), rank=32)


def test_leaving_a_tied_head_alone_may_be_said() -> None:
    assert plan(skeleton(), assignment(skip=("lm_head",))).skipped == []


def test_matrices_in_no_layer_that_lrqat_knows_are_named_or_skipped_and_counted() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
    for rules in (assignment(), assignment("experts=w8")):
        with pytest.raises(LrqatError, match=r"gate_up_proj \[2, 64, 64\] is in no linear layer[^\n]*--skip"):
            plan(model, rules)
    found = plan(model, assignment(skip=("experts",)))
    assert [name.rpartition(".")[2] for name in found.skipped] == ["gate_up_proj", "down_proj"]
    assert all("self_attn" in name for name in found.grids)
