"""LoRAs of Flux.1, FLUX.2 and Z-Image on their students, under the names of every trainer."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from bksdm.families import derive
from bksdm.families.recipe import load_recipe
from bksdm.models.adapters.lora import merge_lora
from bksdm.models.pipelines import load_pipeline
from fast import one_flow
from lora_layouts import LAYOUTS
from tiny_flow import build_z_pipeline
from verbs import Run

pytest_plugins = ["verbs_fixtures", "flow_fixtures"]

RANK = 2
Rows = list[tuple[str, slice]]
Matrices = dict[str, tuple[Tensor, Tensor]]


def rows(path: str) -> Rows:
    """Those of queries, keys and values, 32 of each."""
    return [(path.format(name), slice(32 * n, 32 * n + 32)) for n, name in enumerate("qkv")]


# By hand, from the checkpoints of the authors: their layer, with the rows of it that each of ours is.
FUSED: dict[str, dict[str, Rows]] = {
    "flux": {
        "double_blocks.3.img_attn.qkv": rows("transformer_blocks.3.attn.to_{}"),
        "double_blocks.0.txt_attn.qkv": rows("transformer_blocks.0.attn.add_{}_proj"),
        "double_blocks.0.img_mlp.2": [("transformer_blocks.0.ff.net.2", slice(None))],
        "double_blocks.3.txt_mod.lin": [("transformer_blocks.3.norm1_context.linear", slice(None))],
        "single_blocks.5.linear1": [
            ("single_transformer_blocks.5.attn.to_q", slice(0, 32)),
            ("single_transformer_blocks.5.attn.to_k", slice(32, 64)),
            ("single_transformer_blocks.5.attn.to_v", slice(64, 96)),
            ("single_transformer_blocks.5.proj_mlp", slice(96, 224)),
        ],
        "single_blocks.2.linear2": [("single_transformer_blocks.2.proj_out", slice(None))],
        "vector_in.in_layer": [("time_text_embed.text_embedder.linear_1", slice(None))],
    },
    "klein": {
        "double_blocks.2.img_attn.qkv": rows("transformer_blocks.2.attn.to_{}"),
        "double_blocks.0.txt_mlp.0": [("transformer_blocks.0.ff_context.linear_in", slice(None))],
        "single_blocks.4.linear1": [("single_transformer_blocks.4.attn.to_qkv_mlp_proj", slice(None))],
        "double_stream_modulation_txt.lin": [("double_stream_modulation_txt.linear", slice(None))],
        "img_in": [("x_embedder", slice(None))],
    },
    "z": {
        "layers.5.attention.qkv": rows("layers.5.attention.to_{}"),
        "noise_refiner.1.attention.qkv": rows("noise_refiner.1.attention.to_{}"),
        "layers.2.attention.out": [("layers.2.attention.to_out.0", slice(None))],
        "layers.2.feed_forward.w2": [("layers.2.feed_forward.w2", slice(None))],
        "final_layer.linear": [("all_final_layer.2-1.linear", slice(None))],
    },
}
LAST = {"flux": "norm_out.linear", "klein": "norm_out.linear"}  # scale before shift here, and after it there
NAMES = {
    "as they are": ("", ".", ("lora_A.weight", "lora_B.weight")),
    "for ComfyUI": ("diffusion_model.", ".", ("lora_A.weight", "lora_B.weight")),
    "by kohya's scripts": ("lora_unet_", "_", ("lora_down.weight", "lora_up.weight")),
}


def linears(transformer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}


def matrices(transformer: torch.nn.Module) -> Matrices:
    """A pair for every layer."""
    draw = torch.Generator().manual_seed(1)
    return {
        name: (
            torch.randn(RANK, layer.in_features, generator=draw),
            torch.randn(layer.out_features, RANK, generator=draw),
        )
        for name, layer in linears(transformer).items()
    }


def change(pipeline: DiffusionPipeline, flow_folder: Path, lora: Path) -> dict[str, Tensor]:
    """By how much a LoRA changes each layer of the transformer."""
    changed = merge_lora(load_pipeline(flow_folder), lora).transformer.state_dict()
    whole = pipeline.transformer.state_dict()
    return {
        name.removesuffix(".weight"): changed[name] - tensor
        for name, tensor in whole.items()
        if not torch.equal(changed[name], tensor)
    }


def test_a_lora_gives_each_block_what_it_gave_the_teachers(
    flow_teacher: DiffusionPipeline, flow_folder: Path, done: Run, tmp_path: Path
) -> None:
    student, pairs = tmp_path / "half", matrices(flow_teacher.transformer)
    done("prune", flow_folder, "--recipe", "half", "--out", student)
    named = {f"transformer.{name}.lora_A.weight": down for name, (down, _) in pairs.items()}
    named |= {f"transformer.{name}.lora_B.weight": up for name, (_, up) in pairs.items()}
    save_file(named, tmp_path / "lora.safetensors")
    words = ("adapt", tmp_path / "lora.safetensors", "--model", student, "--teacher", flow_folder)
    told = done(*words, "--out", tmp_path / "carried", "--json").json
    pruning = derive(load_recipe("half"), dict(flow_teacher.transformer.config))
    gone = [name for name in pairs if pruning.student_key(name) is None]
    assert sorted(told["dropped"]) == sorted(f"transformer.{name}" for name in gone)
    assert gone
    pruned = load_pipeline(student)
    found = change(pruned, student, tmp_path / "carried")
    assert set(found) == set(linears(pruned.transformer))
    for name, delta in found.items():
        down, up = pairs[pruning.teacher_key(name)]
        torch.testing.assert_close(delta, up @ down, rtol=1e-4, atol=1e-5)

    before = {name: tensor.clone() for name, tensor in pruned.transformer.state_dict().items()}
    pruned.load_lora_weights(tmp_path / "carried")  # as diffusers does it
    pruned.fuse_lora()
    for name, layer in pruned.transformer.named_modules():
        if name.endswith(".base_layer"):
            own = name.removesuffix(".base_layer")
            down, up = pairs[pruning.teacher_key(own)]
            torch.testing.assert_close(layer.weight - before[f"{own}.weight"], up @ down, rtol=1e-4, atol=1e-5)


@one_flow
def test_those_of_others_are_refused(
    flow_folder: Path, v1_teacher: DiffusionPipeline, run: Run, tmp_path: Path
) -> None:
    """In a line that says whose they are, or what of them this model does not have."""
    lora = LAYOUTS["kohya"](v1_teacher)
    save_file(lora.tensors, tmp_path / "sd.safetensors", {"ss_base_model_version": "sd_v1"})
    other = torch.zeros(2, 8)
    names = ("transformer.joint_transformer_blocks.0.attn.to_q.lora_A.weight",)
    save_file({**dict.fromkeys(names, other)}, tmp_path / "other.safetensors")
    for name, said in (
        ("sd", "is of Stable Diffusion 1.x or 2.x, and this model of "),
        ("other", "that this model does not have"),
    ):
        words = ("generate", flow_folder, "--prompt", "a", "--lora", tmp_path / f"{name}.safetensors")
        outcome = run(*words, "--out", tmp_path / "out")
        assert outcome.code == 2
        assert said in outcome.said[-1]


@pytest.mark.parametrize("how", ["LoKr", "DoRA by input"])
def test_what_cannot_be_parted_is_refused(how: str, run: Run, tmp_path: Path) -> None:
    pipeline = build_z_pipeline()
    pipeline.save_pretrained(tmp_path / "teacher")
    name = "diffusion_model.layers.0.attention.qkv"
    if how == "LoKr":
        tensors = {f"{name}.lokr_w1": torch.randn(3, 2), f"{name}.lokr_w2": torch.randn(32, 16)}
    else:
        tensors = {
            f"{name}.lora_down.weight": torch.randn(2, 32),
            f"{name}.lora_up.weight": torch.randn(96, 2),
            f"{name}.dora_scale": torch.ones(1, 32),
        }
    save_file(tensors, tmp_path / "lora.safetensors")
    words = ("generate", tmp_path / "teacher", "--prompt", "a", "--lora", tmp_path / "lora.safetensors")
    outcome = run(*words, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "cannot be parted, so nothing is read" in outcome.said[-1]


@pytest.mark.parametrize("names", NAMES)
def test_names_of_the_authors_are_read(
    flow_kind: str, flow_teacher: DiffusionPipeline, flow_folder: Path, tmp_path: Path, names: str
) -> None:
    prefix, dot, endings = NAMES[names]
    layers, draw, tensors, expected = linears(flow_teacher.transformer), torch.Generator().manual_seed(2), {}, {}
    for original, parts in FUSED[flow_kind].items():
        count = sum(layers[path].out_features for path, _ in parts)
        down = torch.randn(RANK, layers[parts[0][0]].in_features, generator=draw)
        up = torch.randn(count, RANK, generator=draw)
        name = prefix + original.replace(".", dot)
        tensors |= {f"{name}.{endings[0]}": down, f"{name}.{endings[1]}": up, f"{name}.alpha": torch.tensor(RANK / 2)}
        expected |= {path: up[own] @ down / 2 for path, own in parts}
    if flow_kind in LAST:
        layer = layers[LAST[flow_kind]]
        down, up = (
            torch.randn(RANK, layer.in_features, generator=draw),
            torch.randn(layer.out_features, RANK, generator=draw),
        )
        name = prefix + "final_layer.adaLN_modulation.1".replace(".", dot)
        tensors |= {f"{name}.{endings[0]}": down, f"{name}.{endings[1]}": up}
        shift, scale = (up @ down).chunk(2)
        expected[LAST[flow_kind]] = torch.cat([scale, shift])
    save_file(tensors, tmp_path / "lora.safetensors")
    found = change(flow_teacher, flow_folder, tmp_path / "lora.safetensors")
    assert set(found) == set(expected)
    for name, delta in found.items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-4, atol=1e-5)
