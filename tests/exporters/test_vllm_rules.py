import pytest
import torch
from hf_cases import checkpoint, fused

from exporters.refusal import Refusal
from exporters.vllm_rules import DEVICES, LAYOUTS, MIXTURE, Kernel, family, kernel, kernels, limits, with_fused
from lrqat.fused import FusedCheckpoint, FusedSpec, Spec
from lrqat.grid import Grid


@pytest.mark.parametrize(
    ("layout", "grid", "device", "takes"),
    [
        ("gptq", "w4g32", "cpu", "CPUWNA16"),
        ("gptq", "w4g128", "gpu", "Marlin"),
        ("gptq", "w8", "gpu", "Marlin"),
        ("awq", "w4g32", "cpu", "CPUWNA16"),
        ("awq", "w4g16-asym", "cpu", "CPUWNA16"),
        ("awq", "w4-asym", "gpu", "Marlin"),
        ("awq", "w4g256-asym", "gpu", "AWQ"),
        ("compressed-tensors", "w4g32-asym", "cpu", "CPUWNA16"),
        ("compressed-tensors", "w8g128", "gpu", "Marlin"),
        ("compressed-tensors", "w4g256-asym", "gpu", "TritonW4A16"),
        ("compressed-tensors", "w8g64-asym", "gpu", "Machete"),
        ("compressed-tensors", "w3g32", "gpu", "Humming"),
    ],
)
def test_kernels_that_take_a_linear(layout: str, grid: str, device: str, takes: str) -> None:
    found = kernel(layout, Grid.parse(grid), (256, 256), device)
    assert isinstance(found, Kernel) and found.name == takes
    assert bool(found.needs) == (takes in ("Machete", "Humming"))


@pytest.mark.parametrize(
    ("layout", "grid", "shape", "device", "says"),
    [
        ("gptq", "w4g32-asym", (64, 64), "cpu", "symmetric GPTQ only"),
        ("gptq", "w4g16", (64, 64), "gpu", "groups of 32, 64, 128"),
        ("gptq", "w8g32", (64, 64), "cpu", "8-bit weights on GPUs only"),
        ("gptq", "w3g32", (64, 64), "gpu", "4 or 8 bits, not 3"),
        ("awq", "w8g32", (64, 64), "gpu", "AWQ with 4 bits, not 8"),
        ("awq", "w4g16", (64, 64), "gpu", "on GPUs"),
        ("compressed-tensors", "w2g32", (64, 64), "cpu", "2-bit weights on GPUs only"),
        ("compressed-tensors", "w4", (64, 48), "cpu", "in_features that are a multiple of 32, not 48"),
        ("compressed-tensors", "w4", (48, 64), "cpu", "out_features that are a multiple of 32, not 48"),
        ("compressed-tensors", "w4g9", (64, 288), "cpu", "even groups"),
        ("compressed-tensors", "w4g32-min", (64, 64), "gpu", "no kernel for grid w4g32-min"),
        ("compressed-tensors", "q4_k", (64, 256), "cpu", "no kernel for grid q4_k"),
    ],
)
def test_refusals_say_why_and_what_to_do(
    layout: str, grid: str, shape: tuple[int, int], device: str, says: str
) -> None:
    found = kernel(layout, Grid.parse(grid), shape, device, name="x.weight")
    assert isinstance(found, Refusal)
    assert says in found.reason and found.reason.startswith("x.weight: ") and found.remedy and "\n" not in str(found)


def test_every_layout_grid_and_device_has_an_answer() -> None:
    for layout in LAYOUTS:
        for device in DEVICES:
            for grid in ("w2", "w3g32", "w4g32", "w5-asym", "w8g64-asym", "w4g32-min", "q6_k", "mxfp4"):
                assert isinstance(kernel(layout, Grid.parse(grid), (256, 256), device), Kernel | Refusal)


@pytest.mark.parametrize("device", DEVICES)
def test_int8_activations_meet_symmetric_channels_alone(device: str) -> None:
    found = kernel("compressed-tensors", Grid.parse("w8"), (7, 5), device, activations="int8")
    assert isinstance(found, Kernel) and "Int8ScaledMM" in found.name
    for grid in ("w8g32", "w8-asym", "w4"):
        refusal = kernel("compressed-tensors", Grid.parse(grid), (64, 64), device, activations="int8")
        assert isinstance(refusal, Refusal) and "use --grid w8" in str(refusal)


def test_families_are_those_that_vllm_loads_as_one() -> None:
    attention = [f"a.0.self_attn.{x}_proj" for x in "qkv"]
    assert family(f"{attention[1]}.weight") == ("a.0.self_attn.qkv_proj", [f"{name}.weight" for name in attention])
    assert family("a.0.mlp.down_proj.weight") == ("a.0.mlp.down_proj", ["a.0.mlp.down_proj.weight"])
    assert with_fused(attention) == [*attention, "a.0.self_attn.qkv_proj"]
    assert with_fused(attention[:2]) == attention[:2]


def test_ranks_must_not_cut_groups_or_words() -> None:
    def of(leaf: str, grid: str, rows: int, columns: int, ranks: int) -> str:
        whole = checkpoint({f"model.layers.0.{leaf}.weight": fused(grid, rows, columns)})
        return str(limits("compressed-tensors", whole, "gpu", ranks))

    assert of("mlp.down_proj", "w4g64", 64, 256, 2) == "None"
    assert "cut in_features 192 inside a group" in of("mlp.down_proj", "w4g64", 64, 192, 2)
    assert of("mlp.down_proj", "w4", 64, 192, 2) == "None"  # a row's scale belongs to every rank
    assert of("self_attn.k_proj", "w4g64", 64, 192, 2) == "None"
    assert "cut out_features 64 inside a word" in of("self_attn.k_proj", "w4g64", 64, 192, 16)


def test_shards_of_a_fused_linear_share_their_grid() -> None:
    def of(layout: str, **grids: str) -> str:
        tensors = {f"model.layers.0.self_attn.{n}_proj.weight": fused(g, 32, 64) for n, g in grids.items()}
        return str(limits(layout, checkpoint(tensors)))

    assert of("compressed-tensors", q="w4g32", k="w4g32-fp16", v="w4g32") == "None"
    assert "fuses q_proj, k_proj, v_proj, but they are on different grids" in of(
        "compressed-tensors", q="w4g32", k="w4g32-asym", v="w4g32"
    )
    assert of("awq", q="w4g32", k="w4g32-asym", v="w4g32") == "None"
    dense = checkpoint(
        {"model.layers.0.self_attn.q_proj.weight": fused("w4g32", 32, 64)},
        {"model.layers.0.self_attn.k_proj.weight": torch.zeros(32, 64)},
    )
    assert "some of them are dense" in str(limits("awq", dense))


def mixture(grids: dict[str, str], dense: str = "") -> FusedCheckpoint:
    """One layer of two experts; `grids` by a part of the name, "" for the others."""
    specs, kept = {}, {}
    for expert in range(2):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.0.mlp.experts.{expert}.{leaf}.weight"
            grid = next((g for part, g in grids.items() if part and part in name), grids[""])
            if dense and dense in name:
                kept[name] = Spec(torch.float16, (64, 64))
            else:
                specs[name] = FusedSpec(Grid.parse(grid), (64, 64))
    return FusedCheckpoint({}, {}, specs, kept, {}, {})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_experts_of_a_layer_are_one_layer_for_vllm(layout: str) -> None:
    assert kernels(layout, mixture({"": "w4g32"})) == [MIXTURE]
    for wrong in (mixture({"": "w4g32", "experts.1": "w4g64"}), mixture({"": "w4g32", "down_proj": "w4g64"})):
        assert "loads all experts as one layer" in str(limits(layout, wrong, "gpu"))
    assert "or some are dense" in str(limits(layout, mixture({"": "w4g32"}, "experts.1.up")))


def test_patterns_name_the_layer_that_holds_all_experts() -> None:
    layers = [f"model.layers.0.mlp.experts.{n}.{leaf}" for n in range(2) for leaf in ("gate_proj", "up_proj")]
    assert "model.layers.0.mlp.experts" in with_fused(layers)


def test_models_that_vllm_does_not_serve_in_float16_need_portable_scales() -> None:
    specs = {"model.layers.0.mlp.down_proj.weight": FusedSpec(Grid.parse("w4g32-fp16"), (64, 64))}
    checkpoint = FusedCheckpoint({}, {}, specs, {}, {"model_type": "gemma3_text"}, {})
    assert "does not serve gemma3_text in float16" in str(limits("compressed-tensors", checkpoint))


def test_zeros_of_fused_shards_fill_whole_words() -> None:
    rows = {"q_proj": 64, "k_proj": 4, "v_proj": 4}
    grid = Grid.parse("w4g32-asym")
    specs = {f"model.layers.0.self_attn.{n}.weight": FusedSpec(grid, (r, 64)) for n, r in rows.items()}
    found = limits("compressed-tensors", FusedCheckpoint({}, {}, specs, {}, {}, {}), "gpu")
    assert "whose zeros do not fill whole words" in str(found)


def test_a_kernel_that_needs_something_says_so() -> None:
    specs = {"linear.weight": FusedSpec(Grid.parse("w3g64"), (64, 64))}
    found = kernels("compressed-tensors", FusedCheckpoint({}, {}, specs, {}, {}, {}), "gpu")
    assert found == ["Humming (needs the humming package)"]
