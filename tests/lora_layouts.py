"""LoRAs in every layout that is read, with the change of weights that each format defines, written out here.

`LAYOUTS` are makers: from a pipeline to a file or folder, and what it should add to which weight or bias. The formulas
are those of the formats' own papers and trainers, in double precision, and use nothing of the package.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from bksdm.families.recipe import Pruning

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0"
MOVED = "up_blocks.1.attentions.2.transformer_blocks.0"
UNET = (
    "conv_in",
    "time_embedding.linear_1",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.resnets.0.time_emb_proj",
    "down_blocks.0.downsamplers.0.conv",
    "down_blocks.1.resnets.0.conv_shortcut",
    "down_blocks.1.attentions.0.proj_in",
    f"{ATTENTION}.attn1.to_q",
    f"{ATTENTION}.attn2.to_k",
    f"{ATTENTION}.attn2.to_out.0",
    f"{ATTENTION}.ff.net.0.proj",
    f"{ATTENTION}.ff.net.2",
    "down_blocks.1.attentions.1.proj_out",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_v",
    "up_blocks.1.resnets.1.conv2",
    "up_blocks.1.resnets.2.conv1",
    f"{MOVED}.attn1.to_out.0",
    f"{MOVED}.attn2.to_v",
    "up_blocks.1.upsamplers.0.conv",
    "conv_out",
    # Those that follow, SDXL's U-Net alone has here.
    "add_embedding.linear_1",
    "down_blocks.2.attentions.0.transformer_blocks.6.attn1.to_q",
    "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2",
    "mid_block.attentions.0.transformer_blocks.7.attn2.to_k",
    "up_blocks.0.attentions.0.transformer_blocks.2.attn2.to_out.0",
    "up_blocks.0.attentions.2.transformer_blocks.9.attn1.to_v",
    "up_blocks.1.attentions.0.transformer_blocks.1.attn2.to_q",
)
TEXT = (
    "encoder.layers.0.self_attn.q_proj",
    "encoder.layers.0.self_attn.out_proj",
    "encoder.layers.1.mlp.fc1",
    "text_projection",
)
PROJECTIONS = tuple(path for path in UNET if ".attn" in path)
# Their names in original checkpoints of a U-Net with two layers a stage.
ORIGINAL = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "down_blocks.0.resnets.0.time_emb_proj": "input_blocks.1.0.emb_layers.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    f"{ATTENTION}.attn1.to_q": "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    f"{MOVED}.attn2.to_v": "output_blocks.5.1.transformer_blocks.0.attn2.to_v",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "down_blocks.2.attentions.0.transformer_blocks.6.attn1.to_q": "input_blocks.7.1.transformer_blocks.6.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.7.attn2.to_k": "middle_block.1.transformer_blocks.7.attn2.to_k",
    "up_blocks.0.attentions.2.transformer_blocks.9.attn1.to_v": "output_blocks.2.1.transformer_blocks.9.attn1.to_v",
}
RANK = 4


@dataclass
class Made:
    """What a maker writes, and what it should do, by the names of parameters: `unet.PATH.weight`."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    changes: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, object] = field(default_factory=dict)
    header: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        if self.config:
            save_file(tensors, folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text(json.dumps(self.config))
            return folder
        save_file(tensors, folder / "it.safetensors", metadata=self.header or None)
        return folder / "it.safetensors"


@dataclass(frozen=True)
class Layer:
    """A layer of the pipeline that is changed."""

    part: str
    path: str
    module: nn.Module
    begins: str  # in kohya's names

    @property
    def name(self) -> str:
        return f"{self.part}.{self.path}"

    @property
    def weight(self) -> Tensor:
        return self.module.weight.detach().double()

    @property
    def kohya(self) -> str:
        return self.begins + self.diffusers.removeprefix(f"{self.part}.").replace(".", "_")

    @property
    def diffusers(self) -> str:
        outside = self.part == "unet" or self.path == "text_projection"
        return self.name if outside else f"{self.part}.text_model.{self.path}"


def networks(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """U-Net and text encoders."""
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: getattr(pipeline, name) for name in names if hasattr(pipeline, name)}


def layers(pipeline: DiffusionPipeline, unet: tuple[str, ...] = UNET, text: tuple[str, ...] = TEXT) -> Iterator[Layer]:
    """Those at the paths, of what the pipeline has there."""
    found = networks(pipeline)
    one = "text_encoder_2" not in found
    begins = {"unet": "lora_unet_", "text_encoder": "lora_te_" if one else "lora_te1_", "text_encoder_2": "lora_te2_"}
    for part, network in found.items():
        modules = {name.removeprefix("text_model."): module for name, module in network.named_modules()}
        for path in unet if part == "unet" else text:
            if path in modules:
                yield Layer(part, path, modules[path], begins[part])


def random(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.2


def factors(layer: Layer, rank: int = RANK) -> tuple[Tensor, Tensor, Tensor]:
    """Two matrices for a layer, those of a convolution as trainers write them, and their product."""
    outputs, inputs, *kernel = layer.weight.shape
    down, up = random(rank, inputs, *kernel), random(outputs, rank, *([1, 1] if kernel else []))
    return down, up, (up.flatten(1).double() @ down.flatten(1).double()).reshape(layer.weight.shape)


def renormed(weight: Tensor, delta: Tensor, magnitude: Tensor, dims: tuple[int, ...]) -> Tensor:
    """DoRA's change: the new direction at the magnitude, less what was there."""
    changed = weight + delta
    return magnitude.double() * changed / changed.pow(2).sum(dims, keepdim=True).sqrt() - weight


def kohya(pipeline: DiffusionPipeline) -> Made:
    made = Made()
    for layer in layers(pipeline):
        down, up, product = factors(layer)
        made.tensors |= {f"{layer.kohya}.lora_down.weight": down, f"{layer.kohya}.lora_up.weight": up}
        made.tensors[f"{layer.kohya}.alpha"] = torch.tensor(1.0)
        made.changes[f"{layer.name}.weight"] = product / RANK
    return made


def kohya_original_numbers(pipeline: DiffusionPipeline) -> Made:
    made = Made()
    for layer in layers(pipeline, tuple(ORIGINAL), ()):
        down, up, product = factors(layer)
        name = f"lora_unet_{ORIGINAL[layer.path].replace('.', '_')}"
        made.tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(2.0),
        }
        made.changes[f"{layer.name}.weight"] = product * 2 / RANK
    return made


def kohya_without_alpha(pipeline: DiffusionPipeline) -> Made:
    made = kohya(pipeline)
    made.tensors = {name: tensor for name, tensor in made.tensors.items() if not name.endswith(".alpha")}
    made.changes = {name: change * RANK for name, change in made.changes.items()}
    return made


def kohya_that_differs(pipeline: DiffusionPipeline) -> Made:
    made = Made()
    for number, layer in enumerate(layers(pipeline)):
        rank, alpha = 2 + number % 3, 1.0 + number % 4
        down, up, product = factors(layer, rank)
        made.tensors |= {f"{layer.kohya}.lora_down.weight": down, f"{layer.kohya}.lora_up.weight": up}
        made.tensors[f"{layer.kohya}.alpha"] = torch.tensor(alpha)
        made.changes[f"{layer.name}.weight"] = product * alpha / rank
    return made


def comfy(pipeline: DiffusionPipeline) -> Made:
    """Original names with dots, as ComfyUI saves a LoRA of its own."""
    made = Made()
    for layer in layers(pipeline, tuple(ORIGINAL), ()):
        down, up, product = factors(layer)
        name = f"diffusion_model.{ORIGINAL[layer.path]}"
        made.tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        made.changes[f"{layer.name}.weight"] = product
    return made


def tucker(pipeline: DiffusionPipeline) -> Made:
    made = kohya(pipeline)
    for layer in layers(pipeline):
        if layer.weight.ndim == 4 and layer.weight.shape[-1] > 1:
            outputs, inputs, *kernel = layer.weight.shape
            down, core, up = random(RANK, inputs, 1, 1), random(RANK, RANK, *kernel), random(outputs, RANK, 1, 1)
            names = {"lora_down.weight": down, "lora_mid.weight": core, "lora_up.weight": up}
            made.tensors |= {f"{layer.kohya}.{name}": tensor for name, tensor in names.items()}
            whole = torch.einsum("ri,srkl,os->oikl", down[:, :, 0, 0].double(), core.double(), up[:, :, 0, 0].double())
            made.changes[f"{layer.name}.weight"] = whole / RANK
    return made


def dora_by_output(pipeline: DiffusionPipeline) -> Made:
    return with_magnitudes(kohya(pipeline), pipeline)


def dora_by_input(pipeline: DiffusionPipeline) -> Made:
    return with_magnitudes(kohya(pipeline), pipeline, axis=1)


def with_magnitudes(made: Made, pipeline: DiffusionPipeline, axis: int = 0) -> Made:
    """The same with DoRA, by output or by input."""
    for layer in layers(pipeline):
        dims = tuple(dim for dim in range(layer.weight.ndim) if dim != axis)
        magnitude = 1 + torch.rand([count if dim == axis else 1 for dim, count in enumerate(layer.weight.shape)])
        made.tensors[f"{layer.kohya}.dora_scale"] = magnitude
        name = f"{layer.name}.weight"
        made.changes[name] = renormed(layer.weight, made.changes[name], magnitude, dims)
    return made


def loha(pipeline: DiffusionPipeline) -> Made:
    made = Made()
    for layer in layers(pipeline):
        (one_down, one_up, one), (two_down, two_up, two) = factors(layer), factors(layer)
        parts = {"hada_w1_a": one_up, "hada_w1_b": one_down, "hada_w2_a": two_up, "hada_w2_b": two_down}
        made.tensors |= {f"{layer.kohya}.{name}": tensor.flatten(1) for name, tensor in parts.items()}
        made.tensors[f"{layer.kohya}.alpha"] = torch.tensor(2.0)
        made.changes[f"{layer.name}.weight"] = one * two * 2 / RANK
    return made


def loha_tucker(pipeline: DiffusionPipeline) -> Made:
    made = Made()
    for layer in layers(pipeline, tuple(path for path in UNET if path.endswith(("conv1", "conv2"))), ()):
        outputs, inputs, *kernel = layer.weight.shape
        halves = []
        for half in ("1", "2"):
            core, b, a = random(RANK, RANK, *kernel), random(RANK, inputs), random(RANK, outputs)
            names = {f"hada_t{half}": core, f"hada_w{half}_a": a, f"hada_w{half}_b": b}
            made.tensors |= {f"{layer.kohya}.{name}": tensor for name, tensor in names.items()}
            halves.append(torch.einsum("rskl,ro,si->oikl", core.double(), a.double(), b.double()))
        made.tensors[f"{layer.kohya}.alpha"] = torch.tensor(1.0)
        made.changes[f"{layer.name}.weight"] = halves[0] * halves[1] / RANK
    return made


def kron(first: Tensor, second: Tensor) -> Tensor:
    """Kronecker's product of a matrix and a matrix or convolution."""
    blocks = torch.einsum("ab,cd...->acbd...", first.double(), second.double())
    return blocks.reshape(first.shape[0] * second.shape[0], first.shape[1] * second.shape[1], *second.shape[2:])


def divided(size: int) -> int:
    """A factor of a size that is not the whole of it."""
    return next((factor for factor in (4, 3, 2) if size % factor == 0), 1)


def lokr(pipeline: DiffusionPipeline) -> Made:
    """The second factor is whole in some layers and a product in others; only products have a scale."""
    made = Made()
    for number, layer in enumerate(layers(pipeline)):
        outputs, inputs, *kernel = layer.weight.shape
        o, i = divided(outputs), divided(inputs)
        first, shape = random(o, i), (outputs // o, inputs // i, *kernel)
        made.tensors |= {f"{layer.kohya}.lokr_w1": first, f"{layer.kohya}.alpha": torch.tensor(1.0)}
        if number % 2:
            second, scale = random(*shape), 1.0
            made.tensors[f"{layer.kohya}.lokr_w2"] = second
        else:
            a, b, scale = random(shape[0], RANK), random(RANK, math.prod(shape[1:])), 1 / RANK
            second = (a.double() @ b.double()).reshape(shape)
            made.tensors |= {f"{layer.kohya}.lokr_w2_a": a, f"{layer.kohya}.lokr_w2_b": b.reshape(RANK, *shape[1:])}
        made.changes[f"{layer.name}.weight"] = kron(first, second) * scale
    return made


def lokr_dora(pipeline: DiffusionPipeline) -> Made:
    return with_magnitudes(lokr(pipeline), pipeline)


def whole_differences(pipeline: DiffusionPipeline) -> Made:
    made = Made()
    for layer in layers(pipeline, (*UNET, "conv_norm_out", "down_blocks.0.resnets.1.norm1", f"{ATTENTION}.norm1")):
        kind = "w_norm" if layer.weight.ndim == 1 else "diff"
        own = random(*layer.weight.shape)
        made.tensors[f"{layer.kohya}.{kind}"] = own
        made.changes[f"{layer.name}.weight"] = own.double()
        if layer.module.bias is not None:
            moved = random(*layer.module.bias.shape)
            made.tensors[f"{layer.kohya}.{'b_norm' if kind == 'w_norm' else 'diff_b'}"] = moved
            made.changes[f"{layer.name}.bias"] = moved.double()
    return made


def ia3(pipeline: DiffusionPipeline) -> Made:
    made = Made()
    for number, layer in enumerate(layers(pipeline)):
        axis = number % 2
        vector = random(layer.weight.shape[axis])
        shape = [-1 if n == axis else 1 for n in range(layer.weight.ndim)]
        made.tensors |= {f"{layer.kohya}.weight": vector, f"{layer.kohya}.on_input": torch.tensor(axis)}
        made.changes[f"{layer.name}.weight"] = layer.weight * vector.double().reshape(shape)
    return made


def diffusers(pipeline: DiffusionPipeline) -> Made:
    made = Made()
    for layer in layers(pipeline):
        down, up, product = factors(layer)
        made.tensors |= {f"{layer.diffusers}.lora_A.weight": down, f"{layer.diffusers}.lora_B.weight": up}
        made.changes[f"{layer.name}.weight"] = product
    return made


def diffusers_with_metadata(pipeline: DiffusionPipeline) -> Made:
    """Alphas by patterns that match the end of a path, and the square root of rsLoRA."""
    made = diffusers(pipeline)
    config = {"r": RANK, "lora_alpha": 2, "use_rslora": True, "alpha_pattern": {"to_q": 6, r"ff\.net\.\d+(\.proj)?": 1}}
    made.header["lora_adapter_metadata"] = json.dumps(
        {f"{part}.{key}": value for part in networks(pipeline) for key, value in config.items()}
    )
    for name, change in made.changes.items():
        alpha = 6 if name.endswith("to_q.weight") else 1 if ".ff." in name else 2
        made.changes[name] = change * alpha / math.sqrt(RANK)
    return made


def diffusers_dora(pipeline: DiffusionPipeline) -> Made:
    made = diffusers(pipeline)
    for layer in layers(pipeline):
        size, dims = layer.weight.shape[0], tuple(range(1, layer.weight.ndim))
        magnitude = 1 + torch.rand(size)
        made.tensors[f"{layer.diffusers}.lora_magnitude_vector"] = (
            magnitude if len(dims) == 1 else magnitude.view(1, -1, 1, 1)
        )
        name = f"{layer.name}.weight"
        made.changes[name] = renormed(layer.weight, made.changes[name], magnitude.view(-1, *[1 for _ in dims]), dims)
    return made


def diffusers_bias(pipeline: DiffusionPipeline) -> Made:
    made = diffusers(pipeline)
    for layer in layers(pipeline):
        if layer.module.bias is None:
            made.tensors = {n: t for n, t in made.tensors.items() if not n.startswith(f"{layer.diffusers}.")}
            del made.changes[f"{layer.name}.weight"]
            continue
        moved = random(*layer.module.bias.shape)
        made.tensors[f"{layer.diffusers}.lora_B.bias"] = moved
        made.changes[f"{layer.name}.bias"] = moved.double()
    return made


def diffusers_before_peft(pipeline: DiffusionPipeline) -> Made:
    """Processors of their own, and other names for the text encoder's projections."""
    made = Made()
    for layer in layers(pipeline, PROJECTIONS, TEXT[:1]):
        down, up, product = factors(layer)
        block, _, projection = layer.diffusers.removesuffix(".0").rpartition(".")
        name = f"{block}.processor.{projection}_lora" if layer.part == "unet" else f"{block}.to_q_lora"
        made.tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
        made.changes[f"{layer.name}.weight"] = product
    return made


def diffusers_linear_layers(pipeline: DiffusionPipeline) -> Made:
    made = Made()
    for layer in layers(pipeline, PROJECTIONS):
        down, up, product = factors(layer)
        kind = "lora" if layer.part == "unet" else "lora_linear_layer"
        made.tensors |= {f"{layer.diffusers}.{kind}.down.weight": down, f"{layer.diffusers}.{kind}.up.weight": up}
        made.changes[f"{layer.name}.weight"] = product
    return made


def eight_bit_floats(pipeline: DiffusionPipeline) -> Made:
    made = Made()
    for layer in layers(pipeline):
        down, up, _ = (tensor.to(torch.float8_e4m3fn) for tensor in factors(layer))
        made.tensors |= {f"{layer.kohya}.lora_down.weight": down, f"{layer.kohya}.lora_up.weight": up}
        product = up.double().flatten(1) @ down.double().flatten(1)
        made.changes[f"{layer.name}.weight"] = product.reshape(layer.weight.shape)
    return made


def matrices_for_points(pipeline: DiffusionPipeline) -> Made:
    """A convolution of one point is a matrix: some trainers write it as one."""
    made = kohya(pipeline)
    made.tensors = {
        name: tensor[:, :, 0, 0] if "proj_in" in name and tensor.ndim == 4 else tensor
        for name, tensor in made.tensors.items()
    }
    return made


def pefts_config(kind: str, **more: object) -> dict[str, object]:
    alpha = {"lora_alpha": 2} if kind == "LORA" else {} if kind == "IA3" else {"alpha": 2}
    return {"peft_type": kind, "r": RANK, "target_modules": list(UNET), **alpha, **more}


def pefts_lora(pipeline: DiffusionPipeline) -> Made:
    made = Made(
        config=pefts_config("LORA", use_dora=False, rank_pattern={}, alpha_pattern={"conv_in": 8}, lora_dropout=0.1)
    )
    for layer in layers(pipeline, text=()):
        down, up, product = factors(layer)
        name = f"base_model.model.{layer.path}"
        made.tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        made.changes[f"{layer.name}.weight"] = product * (8 if layer.path == "conv_in" else 2) / RANK
    return made


def pefts_loha(pipeline: DiffusionPipeline) -> Made:
    made, plain = Made(config=pefts_config("LOHA")), loha(pipeline)
    for layer in layers(pipeline, text=()):
        for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"):
            made.tensors[f"base_model.model.{layer.path}.{name}"] = plain.tensors[f"{layer.kohya}.{name}"]
        made.changes[f"{layer.name}.weight"] = plain.changes[f"{layer.name}.weight"]
    return made


def pefts_lokr(pipeline: DiffusionPipeline) -> Made:
    """peft scales two whole factors too."""
    made, plain = Made(config=pefts_config("LOKR")), lokr(pipeline)
    for layer in layers(pipeline, text=()):
        names = [name for name in plain.tensors if name.startswith(f"{layer.kohya}.lokr")]
        for name in names:
            kind, tensor = name.rpartition(".")[2], plain.tensors[name]
            made.tensors[f"base_model.model.{layer.path}.{kind}"] = tensor.flatten(1) if kind == "lokr_w2_b" else tensor
        scale = 1 if any(name.endswith("w2") for name in names) else 1 / RANK
        made.changes[f"{layer.name}.weight"] = plain.changes[f"{layer.name}.weight"] / scale * 2 / RANK
    return made


def pefts_ia3(pipeline: DiffusionPipeline) -> Made:
    made = Made(config=pefts_config("IA3", feedforward_modules=["ff.net.2", "conv1"]))
    for layer in layers(pipeline, text=()):
        outputs, inputs, *kernel = layer.weight.shape
        on_input = layer.path.endswith(("ff.net.2", "conv1"))
        shape = [1, inputs if on_input else outputs, 1, 1] if kernel else [1, inputs] if on_input else [outputs, 1]
        vector = 1 + random(*shape)
        made.tensors[f"base_model.model.{layer.path}.ia3_l"] = vector
        along = [1, -1] if on_input else [-1, 1]
        made.changes[f"{layer.name}.weight"] = layer.weight * (
            vector.double().reshape(*along, *[1 for _ in kernel]) - 1
        )
        if not on_input and layer.module.bias is not None:
            made.changes[f"{layer.name}.bias"] = layer.module.bias.detach().double() * (vector.double().flatten() - 1)
    return made


LAYOUTS: dict[str, Callable[[DiffusionPipeline], Made]] = {
    "kohya": kohya,
    "kohya, ranks and alphas that differ": kohya_that_differs,
    "kohya, no alpha": kohya_without_alpha,
    "kohya, numbers of original checkpoints": kohya_original_numbers,
    "kohya, 1x1 convolutions as matrices": matrices_for_points,
    "ComfyUI, original names": comfy,
    "diffusers": diffusers,
    "diffusers, config in the header (rsLoRA, patterns)": diffusers_with_metadata,
    "diffusers, biases": diffusers_bias,
    "diffusers, lora_linear_layer": diffusers_linear_layers,
    "diffusers, attention processors": diffusers_before_peft,
    "peft, folder": pefts_lora,
    "LoCon with Tucker's core": tucker,
    "DoRA, by output": dora_by_output,
    "DoRA, by input": dora_by_input,
    "DoRA, diffusers": diffusers_dora,
    "LoHa": loha,
    "LoHa with Tucker's cores": loha_tucker,
    "LoHa, peft": pefts_loha,
    "LoKr": lokr,
    "LoKr with DoRA": lokr_dora,
    "LoKr, peft": pefts_lokr,
    "whole differences, norms too": whole_differences,
    "(IA)^3": ia3,
    "(IA)^3, peft": pefts_ia3,
    "8-bit floats": eight_bit_floats,
}


def parameters(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """Those of U-Net and text encoder themselves, by the names that `Made.changes` has."""
    return {
        f"{part}.{name.removeprefix('text_model.')}": parameter.detach()
        for part, network in networks(pipeline).items()
        for name, parameter in network.named_parameters()
    }


def kept(wanted: Mapping[str, Tensor], pruning: Pruning) -> dict[str, Tensor]:
    """Changes of a teacher's parameters as those of its student, of what stays there."""
    found = {}
    for name, tensor in wanted.items():
        part, _, path = name.partition(".")
        if here := pruning.student_key(path) if part == "unet" else path:
            found[f"{part}.{here}"] = tensor
    return found
