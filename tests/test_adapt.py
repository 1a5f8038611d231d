"""Adapters cross the pruning: what changes which layer, on the teacher and on its students."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    MotionAdapter,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bksdm.common.errors import InputError
from bksdm.families import derive, skip_connections
from bksdm.families.recipe import Pruning, Recipe, load_recipe
from bksdm.families.sd import StableDiffusion
from bksdm.families.unet.names import UNET, unet_places
from bksdm.models.adapters.controlnet import StudentControlNet, load_controlnet
from bksdm.models.adapters.kinds import LORA_FILE
from bksdm.models.adapters.lora import merge_lora
from bksdm.models.adapters.lora_out import KOHYA_FILE
from bksdm.models.adapters.motion import motion_unet, student_config
from bksdm.models.adapters.peft_config import PeftConfig
from bksdm.models.adapters.run import Adapted, adapt
from bksdm.models.adapters.training import add_lora, save_lora
from bksdm.models.pipelines import load_pipeline
from bksdm.options.adapt import AdaptOptions
from bksdm.pruning.inherit import prune_unet
from fast import slow
from lora_layouts import LAYOUTS, Made, kept, parameters
from tiny_models import CONTEXT, LATENT, MAX_TOKENS, PICTURE, XL_WIDTHS, added_conditions, random_inputs
from verbs import Run, make_student

pytest_plugins = ["verbs_fixtures"]

CASES = [("v1", "base"), ("v1", "small"), ("v1", "tiny"), ("xl", "base"), ("xl", "ssd-1b"), ("xl", "koala-700m")]


@dataclass(frozen=True)
class Crossing:
    """A teacher, on the disk too, one of its students there, and what the recipe does."""

    teacher: DiffusionPipeline
    folder: Path
    student: Path
    pruning: Pruning

    def adapt(self, source: Path, out: Path) -> Adapted:
        return adapt(AdaptOptions(str(source), str(self.student), str(self.folder), str(out)))

    def inputs(self, batch: int = 2) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """What its U-Nets take: latents, timesteps and context, and what SDXL's take besides."""
        return random_inputs(batch), added_conditions(self.teacher.unet.config, batch)


SHOWN = [("v1", "tiny"), ("xl", "ssd-1b")]  # the others are slow


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, marks=() if case in SHOWN else pytest.mark.slow) for case in CASES],
    ids="-".join,
)
def crossing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Crossing:
    """Students of both families in turn."""
    family, recipe = request.param
    teacher, folder = (request.getfixturevalue(f"{family}_{kind}") for kind in ("teacher", "folder"))
    student = make_student(teacher, tmp_path_factory.mktemp("crossing") / recipe, recipe)
    return Crossing(teacher, folder, student, derive(load_recipe(recipe), teacher.unet.config))


@pytest.fixture(scope="module")
def students(v1_teacher: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("students")
    return {recipe: make_student(v1_teacher, folder / recipe, recipe) for recipe in ("base", "small", "tiny")}


@pytest.fixture(scope="module")
def lora(v1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the teacher's U-Net and text encoder, none of whose matrices is zero."""
    pipeline, folder = load_pipeline(v1_folder), tmp_path_factory.mktemp("lora")
    networks = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    torch.manual_seed(1)
    for parameter in add_lora(networks, StableDiffusion.projections, 2, seed=0).parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_lora(networks, folder, StableDiffusion())
    return folder


@pytest.fixture(scope="module")
def controlnet(v1_teacher: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet of the v1 teacher."""
    return make_controlnet(v1_teacher, tmp_path_factory.mktemp("controlnet"))


def make_controlnet(teacher: DiffusionPipeline, folder: Path) -> Path:
    """A ControlNet of a teacher whose residuals are not zero."""
    torch.manual_seed(2)
    made = ControlNetModel.from_unet(teacher.unet, conditioning_embedding_out_channels=(8, 8, 16))
    for block in (*made.controlnet_down_blocks, made.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.2)
    made.save_pretrained(folder)
    return folder


def merged_by_diffusers(model: Path, lora: Path) -> dict[str, Tensor]:
    """By how much stock diffusers changes the weights of a model."""
    pipeline = load_pipeline(model, torch.float64)
    was = {name: parameter.clone() for name, parameter in parameters(pipeline).items()}
    pipeline.load_lora_weights(lora)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    now = parameters(pipeline)
    assert now.keys() == was.keys()
    return {name: p - was[name] for name, p in now.items() if not torch.equal(p, was[name])}


# LoRAs


OTHERS = ("diffusers, config in the header (rsLoRA, patterns)", "DoRA, diffusers", "diffusers, biases")


@pytest.mark.parametrize(
    ("crossing", "layout"),
    [
        *(pytest.param(("v1", "small"), layout, id=f"v1-small-{layout}") for layout in ("kohya", *OTHERS)),
        pytest.param(("xl", "ssd-1b"), "kohya", id="xl-ssd-1b-kohya"),
        *(slow(("xl", "ssd-1b"), layout, id=f"xl-ssd-1b-{layout}") for layout in OTHERS),
    ],
    indirect=["crossing"],
)
def test_stock_diffusers_reads_what_is_carried(crossing: Crossing, tmp_path: Path, layout: str) -> None:
    torch.manual_seed(3)
    lora = LAYOUTS[layout](crossing.teacher)
    made = crossing.adapt(lora.write(tmp_path / "it"), tmp_path / "out")
    wanted = kept(lora.changes, crossing.pruning)
    found = merged_by_diffusers(crossing.student, made.out)
    assert found.keys() == wanted.keys()
    for name, change in found.items():
        assert (change - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


def test_dora_has_a_file_for_diffusers_and_one_for_others(
    students: dict[str, Path], v1_folder: Path, v1_teacher: StableDiffusionPipeline, tmp_path: Path
) -> None:
    """Under kohya's names, diffusers leaves out the magnitudes; under its own, others do not read them."""
    lora = LAYOUTS["DoRA, by output"](v1_teacher).write(tmp_path / "it")
    out = adapt(AdaptOptions(str(lora), str(students["base"]), str(v1_folder), str(tmp_path / "out"))).out
    assert any(name.endswith("lora_magnitude_vector.weight") for name in load_file(out / LORA_FILE))
    assert any(name.endswith(".dora_scale") for name in load_file(out / KOHYA_FILE))


def test_dora_that_diffusers_misreads_is_said_to_be(
    done: Run, students: dict[str, Path], v1_folder: Path, v1_teacher: StableDiffusionPipeline, tmp_path: Path
) -> None:
    lora = LAYOUTS["DoRA, by input"](v1_teacher).write(tmp_path / "it")
    outcome = done("adapt", lora, "--model", students["base"], "--teacher", v1_folder, "--out", tmp_path / "out")
    assert any("stock diffusers reads this LoRA without its DoRA magnitudes" in line for line in outcome.said)


def test_queries_without_outputs_have_a_file_for_diffusers_too(
    students: dict[str, Path], v1_folder: Path, v1_teacher: StableDiffusionPipeline, tmp_path: Path
) -> None:
    """Under kohya's names, diffusers leaves out a text encoder's queries where no output projection is changed."""
    lora = LAYOUTS["kohya"](v1_teacher)
    lora.tensors = {name: tensor for name, tensor in lora.tensors.items() if "out_proj" not in name}
    lora.changes = {name: tensor for name, tensor in lora.changes.items() if "out_proj" not in name}
    out = tmp_path / "out"
    adapt(AdaptOptions(str(lora.write(tmp_path / "it")), str(students["base"]), str(v1_folder), str(out)))
    found = merged_by_diffusers(students["base"], out)
    wanted = kept(lora.changes, derive(load_recipe("base"), v1_teacher.unet.config))
    assert found.keys() == wanted.keys()
    assert (out / KOHYA_FILE).is_file()


def test_other_programs_find_every_layer_by_its_name(crossing: Crossing, tmp_path: Path) -> None:
    """ComfyUI and InvokeAI list names by the layers of a model; here are those of the student, by the same rules."""
    lora = LAYOUTS["kohya"](crossing.teacher).write(tmp_path / "it")
    out = crossing.adapt(lora, tmp_path / "out").out
    unet = UNet2DConditionModel.from_pretrained(crossing.student / "unet").state_dict()
    known = {f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}" for key in unet if key.endswith(".weight")}
    projections = (
        "self_attn_q_proj",
        "self_attn_k_proj",
        "self_attn_v_proj",
        "self_attn_out_proj",
        "mlp_fc1",
        "mlp_fc2",
    )
    encoders = ("lora_te1_", "lora_te2_") if isinstance(crossing.teacher, StableDiffusionXLPipeline) else ("lora_te_",)
    known |= {
        f"{encoder}text_model_encoder_layers_{n}_{name}"
        for encoder in encoders
        for n in range(32)
        for name in projections
    }
    known |= {f"{encoder}text_projection" for encoder in encoders[1:]}
    file = out / (KOHYA_FILE if (out / KOHYA_FILE).is_file() else LORA_FILE)
    names = {name.partition(".")[0] for name in load_file(file)}
    assert names <= known
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    assert header["ss_network_module"] == "networks.lora"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "4.0")


def test_stock_loading_puts_it_on_other_layers_without_a_word(
    students: dict[str, Path], lora: Path, v1_folder: Path, tmp_path: Path
) -> None:
    """What this verb is for: by name alone, layer 1 of an up stage is not the layer that it was."""
    stock = StableDiffusionPipeline.from_pretrained(students["small"], safety_checker=None)
    stock.load_lora_weights(lora)
    carried = adapt(AdaptOptions(str(lora), str(students["small"]), str(v1_folder), str(tmp_path / "out")))
    name = "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q"
    naive = stock.unet.get_submodule(name).lora_B["default_0"].weight
    there = name.replace("attentions.1", "attentions.2")
    ours, theirs = load_file(carried.out / LORA_FILE), load_file(lora / LORA_FILE)
    up = "lora_unet_{}.lora_up.weight"
    assert torch.equal(naive, theirs[up.format(name.replace(".", "_"))])
    assert torch.equal(ours[up.format(name.replace(".", "_"))], theirs[up.format(there.replace(".", "_"))])
    assert carried.moved[f"unet.{there}"] == f"unet.{name}"
    with pytest.raises(InputError, match="layers that this model does not have"):
        merge_lora(load_pipeline(students["small"]), lora)


def test_bundled_words_come_along(
    done: Run, students: dict[str, Path], lora: Path, v1_folder: Path, tmp_path: Path
) -> None:
    vectors = torch.randn(2, CONTEXT)
    save_file(
        load_file(lora / LORA_FILE) | {"bundle_emb.thing.string_to_param.*": vectors}, tmp_path / "it.safetensors"
    )
    words = ["--model", students["base"], "--teacher", v1_folder, "--out", tmp_path / "out"]
    done("adapt", tmp_path / "it.safetensors", *words)
    for model, file in ((v1_folder, tmp_path / "it.safetensors"), (students["base"], tmp_path / "out")):
        pipeline = merge_lora(load_pipeline(model), file)
        numbers = pipeline.tokenizer.convert_tokens_to_ids(["thing", "thing_1"])
        assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[numbers], vectors)
    stock = StableDiffusionPipeline.from_pretrained(students["base"], safety_checker=None)
    stock.load_lora_weights(tmp_path / "out")
    stock.load_textual_inversion(tmp_path / "out" / "embeddings" / "learned_embeds.safetensors")
    assert "thing" in stock.tokenizer.get_vocab()


def test_a_file_that_was_adapted_brings_its_words(
    done: Run, students: dict[str, Path], lora: Path, v1_folder: Path, tmp_path: Path
) -> None:
    words = {"bundle_emb.thing.string_to_param.*": torch.randn(2, CONTEXT)}
    of_the_middle = {name: t for name, t in load_file(lora / LORA_FILE).items() if "unet_mid_block" in name}
    words_of = ["--model", students["small"], "--teacher", v1_folder, "--out"]
    save_file(load_file(lora / LORA_FILE) | words, tmp_path / "it.safetensors")
    assert "it brings the words thing" in done("adapt", tmp_path / "it.safetensors", *words_of, tmp_path / "out").said
    pipeline = merge_lora(load_pipeline(students["small"]), tmp_path / "out" / LORA_FILE)
    assert "thing_1" in pipeline.tokenizer.get_vocab()
    save_file(of_the_middle | words, tmp_path / "mid.safetensors")
    made = done("adapt", tmp_path / "mid.safetensors", *words_of, tmp_path / "mid", "--json").json
    assert made["kind"] == "textual_inversion"
    assert len(made["dropped"]) == len(of_the_middle) // 3
    assert list(load_file(tmp_path / "mid" / "learned_embeds.safetensors")) == ["thing"]


def test_a_lora_is_carried_once_and_counts_on_its_student_alone(
    done: Run, run: Run, students: dict[str, Path], lora: Path, v1_folder: Path, tmp_path: Path
) -> None:
    out = adapt(AdaptOptions(str(lora), str(students["small"]), str(v1_folder), str(tmp_path / "out"))).out
    for source in (out, out / LORA_FILE):
        outcome = run("adapt", source, "--model", students["base"], "--teacher", v1_folder, "--out", tmp_path / "again")
        assert outcome.code == 2
        assert outcome.said[0].endswith("was carried over to a student already; give the one of the teacher")
    for model, this in ((v1_folder, "this model is a teacher"), (students["base"], "this one is of 'base'")):
        words = ["--prompt", "red", "--steps", 1, "--lora", out, "--out", tmp_path / "pictures"]
        outcome = run("generate", model, *words)
        assert outcome.code == 2
        assert f"was made for a student of recipe 'small', and {this}; give another LoRA" in outcome.said[0]
    done("generate", students["small"], *words)


# Textual inversions


@pytest.mark.parametrize("as_folder", [False, True])
def test_vectors_of_words_go_over_as_they_are(
    done: Run, students: dict[str, Path], v1_folder: Path, tmp_path: Path, as_folder: bool
) -> None:
    file = tmp_path / "it" / "learned_embeds.safetensors"
    file.parent.mkdir()
    vectors = torch.randn(3, CONTEXT)
    save_file({"<thing>": vectors}, file)
    words = ["--model", students["base"], "--teacher", v1_folder, "--out", tmp_path / "out", "--json"]
    assert done("adapt", file.parent if as_folder else file, *words).json["kind"] == "textual_inversion"
    pipeline = StableDiffusionPipeline.from_pretrained(students["base"], safety_checker=None)
    pipeline.load_textual_inversion(tmp_path / "out")
    numbers = pipeline.tokenizer.convert_tokens_to_ids(["<thing>", "<thing>_1", "<thing>_2"])
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[numbers], vectors)


def test_several_words_get_a_file_each(done: Run, students: dict[str, Path], v1_folder: Path, tmp_path: Path) -> None:
    save_file({"<cat>": torch.ones(CONTEXT), "<dog/2>": torch.zeros(CONTEXT)}, tmp_path / "two.safetensors")
    words = ["--model", students["base"], "--teacher", v1_folder, "--out", tmp_path / "out", "--json"]
    assert done("adapt", tmp_path / "two.safetensors", *words).json["kept"] == 2
    pipeline = StableDiffusionPipeline.from_pretrained(students["base"], safety_checker=None)
    for name in ("0-cat", "1-dog2"):
        pipeline.load_textual_inversion(tmp_path / "out" / f"{name}.safetensors")
    assert {"<cat>", "<dog/2>"} <= set(pipeline.tokenizer.get_vocab())


def test_a_word_without_a_name_is_called_as_its_file(
    done: Run, students: dict[str, Path], v1_folder: Path, tmp_path: Path
) -> None:
    save_file({"emb_params": torch.ones(2, CONTEXT)}, tmp_path / "charm.safetensors")
    done(
        "adapt",
        tmp_path / "charm.safetensors",
        "--model",
        students["base"],
        "--teacher",
        v1_folder,
        "--out",
        tmp_path / "out",
    )
    assert list(load_file(tmp_path / "out" / "learned_embeds.safetensors")) == ["charm"]


@pytest.fixture(scope="module")
def xl_student(xl_teacher: StableDiffusionXLPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_student(xl_teacher, tmp_path_factory.mktemp("students") / "xl", "koala-700m")


def xl_words() -> dict[str, Tensor]:
    """Three vectors for each text encoder of the SDXL teacher."""
    torch.manual_seed(7)
    return {name: torch.randn(3, width) for name, width in zip(("clip_l", "clip_g"), XL_WIDTHS, strict=True)}


def check_words(pipeline: StableDiffusionXLPipeline, word: str) -> None:
    """Its tokens have the vectors in both text encoders."""
    pairs = ((pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2))
    for (tokenizer, encoder), vectors in zip(pairs, xl_words().values(), strict=True):
        numbers = tokenizer.convert_tokens_to_ids([word, f"{word}_1", f"{word}_2"])
        assert torch.equal(encoder.get_input_embeddings().weight[numbers], vectors)


def test_a_word_of_two_text_encoders_is_called_as_its_file(xl_student: Path, xl_folder: Path, tmp_path: Path) -> None:
    save_file(xl_words(), tmp_path / "thing.safetensors")
    file = (
        adapt(
            AdaptOptions(str(tmp_path / "thing.safetensors"), str(xl_student), str(xl_folder), str(tmp_path / "out"))
        ).out
        / "thing.safetensors"
    )
    stock, vectors = StableDiffusionXLPipeline.from_pretrained(xl_student), load_file(file)
    for name, encoder, tokenizer in (
        ("clip_l", stock.text_encoder, stock.tokenizer),
        ("clip_g", stock.text_encoder_2, stock.tokenizer_2),
    ):
        stock.load_textual_inversion(vectors[name], token="thing", text_encoder=encoder, tokenizer=tokenizer)
    check_words(stock, "thing")


def test_words_of_two_text_encoders_come_with_a_lora(
    done: Run, xl_student: Path, xl_folder: Path, xl_teacher: StableDiffusionXLPipeline, tmp_path: Path
) -> None:
    lora = LAYOUTS["kohya"](xl_teacher)
    lora.tensors |= {f"bundle_emb.my/thing.{name}": vectors for name, vectors in xl_words().items()}
    file = lora.write(tmp_path / "it")
    done("adapt", file, "--model", xl_student, "--teacher", xl_folder, "--out", tmp_path / "out")
    for model, source in ((xl_folder, file), (xl_student, tmp_path / "out")):
        check_words(merge_lora(load_pipeline(model), source), "my/thing")
    words = ["--prompt", "a my/thing", "--steps", 1, "--lora", tmp_path / "out", "--out", tmp_path / "pictures"]
    done("generate", xl_student, *words)


# ControlNets


def test_residuals_are_those_of_the_layers_that_stay(crossing: Crossing, tmp_path: Path) -> None:
    controlnet = make_controlnet(crossing.teacher, tmp_path / "controlnet")
    made = crossing.adapt(controlnet, tmp_path / "out")
    whole, ours = ControlNetModel.from_pretrained(controlnet), load_controlnet(made.out)
    assert isinstance(ours, StudentControlNet)
    inputs, added = crossing.inputs()
    picture = torch.rand(2, 3, PICTURE // 2, PICTURE // 2)  # two halvings, as the picture's eight pixels a latent
    picture = torch.nn.functional.interpolate(picture, size=(LATENT * 4, LATENT * 4))
    with torch.no_grad():
        downs, mid = whole(*inputs, picture, added_cond_kwargs=added, return_dict=False)
        taken, middle = ours(*inputs, picture, added_cond_kwargs=added, return_dict=False)
    taps = dict(zip(skip_connections(crossing.teacher.unet.config), downs, strict=True))
    student = UNet2DConditionModel.from_pretrained(crossing.student / "unet").eval()
    outputs = _skips(student, inputs, added)
    assert list(outputs) == list(skip_connections(student.config))
    for (path, output), residual in zip(outputs.items(), taken, strict=True):
        assert output.shape == residual.shape
        assert torch.equal(residual, taps[crossing.pruning.teacher_key(path)])
    if crossing.pruning.recipe.drop_innermost:
        assert not middle.any()
        assert "mid_block" in made.dropped
    else:
        assert torch.equal(middle, mid)
    residuals = {"down_block_additional_residuals": taken, "mid_block_additional_residual": middle}
    with torch.no_grad():
        plain = student(*inputs, added_cond_kwargs=added).sample
        led = student(*inputs, added_cond_kwargs=added, **residuals).sample
    assert (plain - led).abs().max() > 1e-3


def _skips(unet: UNet2DConditionModel, inputs: tuple[Tensor, ...], added: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the modules of the skip connections give, in the order in which they do."""
    found: dict[str, Tensor] = {}

    def keep(path: str, output: object) -> None:
        found[path] = output[0] if isinstance(output, tuple) else output

    hooks = [
        unet.get_submodule(path if not path.endswith("downsamplers") else f"{path}.0").register_forward_hook(
            lambda module, given, output, path=path: keep(path, output)
        )
        for path in skip_connections(unet.config)
    ]
    with torch.no_grad():
        unet(*inputs, added_cond_kwargs=added)
    for hook in hooks:
        hook.remove()
    return found


def test_the_stock_pipeline_draws_with_it(
    students: dict[str, Path], controlnet: Path, v1_folder: Path, tmp_path: Path
) -> None:
    made = adapt(AdaptOptions(str(controlnet), str(students["small"]), str(v1_folder), str(tmp_path / "out")))
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        students["small"], controlnet=load_controlnet(made.out), safety_checker=None
    )
    hint = Image.new("RGB", (PICTURE, PICTURE), "red")
    pictures = [
        pipeline(
            "red",
            image=hint,
            num_inference_steps=2,
            controlnet_conditioning_scale=scale,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        for scale in (0.0, 1.0)
    ]
    assert (pictures[0] - pictures[1]).abs().max() > 0.01


def test_a_whole_controlnet_does_not_fit_a_student(students: dict[str, Path], controlnet: Path) -> None:
    student = UNet2DConditionModel.from_pretrained(students["small"] / "unet").eval()
    latents, timesteps, context = random_inputs()
    with torch.no_grad():
        downs, mid = ControlNetModel.from_pretrained(controlnet)(
            latents, timesteps, context, torch.rand(2, 3, 4 * LATENT, 4 * LATENT), return_dict=False
        )
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            student(
                latents, timesteps, context, down_block_additional_residuals=downs, mid_block_additional_residual=mid
            )


@pytest.mark.parametrize(
    ("crossing", "layout"),
    [
        (("v1", "tiny"), "original"),
        (("v1", "tiny"), "original, prefixed"),
        (("v1", "tiny"), "diffusers"),
        (("xl", "koala-700m"), "original"),
        slow(("xl", "koala-700m"), "diffusers"),
    ],
    indirect=["crossing"],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_controlnet_in_one_file_is_the_same(crossing: Crossing, tmp_path: Path, layout: str) -> None:
    whole = ControlNetModel.from_unet(crossing.teacher.unet, conditioning_embedding_out_channels=(4, 8, 12, 16))
    tensors = whole.state_dict() if layout == "diffusers" else as_authors_write_it(whole)
    prefix = "control_model." if layout == "original, prefixed" else ""
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "control.safetensors")
    ours = load_controlnet(crossing.adapt(tmp_path / "control.safetensors", tmp_path / "out").out)
    assert ours.selection is not None
    found = ours.state_dict()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_a_controlnet_that_attends_nowhere_is_carried_all_the_same(
    xl_student: Path, xl_folder: Path, xl_teacher: StableDiffusionXLPipeline, tmp_path: Path
) -> None:
    """As the small ones of SDXL are: what it gives is as much."""
    config = dict(ControlNetModel.from_unet(xl_teacher.unet, load_weights_from_unet=False).config)
    plain = {"down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D"}
    ControlNetModel.from_config(config | plain).save_pretrained(tmp_path / "it")
    made = adapt(AdaptOptions(str(tmp_path / "it"), str(xl_student), str(xl_folder), str(tmp_path / "out")))
    assert made.kept == 1 + len(skip_connections(UNet2DConditionModel.load_config(xl_student / "unet")))


def test_what_is_no_part_of_a_controlnet_is_refused(
    students: dict[str, Path], v1_folder: Path, v1_teacher: StableDiffusionPipeline, tmp_path: Path
) -> None:
    whole = ControlNetModel.from_unet(v1_teacher.unet, conditioning_embedding_out_channels=(4, 8, 12, 16))
    tensors = {f"control_model.{name}": tensor for name, tensor in as_authors_write_it(whole).items()}
    save_file(tensors | {"control_model.more": torch.zeros(3)}, tmp_path / "control.safetensors")
    options = AdaptOptions(
        str(tmp_path / "control.safetensors"), str(students["base"]), str(v1_folder), str(tmp_path / "out")
    )
    with pytest.raises(InputError, match=r"has control_model.more, which is no part of a ControlNet"):
        adapt(options)


@pytest.mark.parametrize("arguments", [{"max_shard_size": "100KB"}, {"variant": "fp16"}, {}])
def test_a_controlnet_in_pieces_or_of_a_variant_loads_after_it_was_carried(
    students: dict[str, Path], controlnet: Path, v1_folder: Path, tmp_path: Path, arguments: dict[str, str]
) -> None:
    whole = ControlNetModel.from_pretrained(controlnet)
    whole.save_pretrained(tmp_path / "pieces", **arguments)
    made = adapt(AdaptOptions(str(tmp_path / "pieces"), str(students["base"]), str(v1_folder), str(tmp_path / "out")))
    ours = load_controlnet(made.out).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in whole.state_dict().items())


def as_authors_write_it(controlnet: ControlNetModel) -> dict[str, Tensor]:
    """A ControlNet's tensors under the names of its authors' files: those of a U-Net's way down, and of its own."""
    own, found = controlnet.state_dict(), {}
    places = unet_places(key for key in own if not key.startswith("controlnet"))
    found |= {place.name.removeprefix(UNET): own[key] for key, place in places.items()}
    hints = ["conv_in", *(f"blocks.{n}" for n in range(len(controlnet.controlnet_cond_embedding.blocks))), "conv_out"]
    for number, name in enumerate(hints):
        for kind in ("weight", "bias"):
            found[f"input_hint_block.{2 * number}.{kind}"] = own[f"controlnet_cond_embedding.{name}.{kind}"]
    for number in range(len(controlnet.controlnet_down_blocks)):
        for kind in ("weight", "bias"):
            found[f"zero_convs.{number}.0.{kind}"] = own[f"controlnet_down_blocks.{number}.{kind}"]
    return found | {f"middle_block_out.0.{kind}": own[f"controlnet_mid_block.{kind}"] for kind in ("weight", "bias")}


# T2I-Adapters


def make_t2i_adapter(teacher: DiffusionPipeline, folder: Path, kind: str = "full") -> Path:
    """SDXL's halve pictures once more at first, and give the middle a residual."""
    widths, xl = list(teacher.unet.config.block_out_channels), isinstance(teacher, StableDiffusionXLPipeline)
    channels = [*widths, widths[-1]] if xl else widths if kind == "full" else widths[:-1]  # light ones repeat the last
    T2IAdapter(
        channels=channels,
        num_res_blocks=1,
        downscale_factor=teacher.vae_scale_factor * (2 if xl else 1),
        adapter_type=f"{kind}_adapter{'_xl' if xl else ''}",
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("crossing", "kind"),
    [
        (("v1", "tiny"), "full"),
        (("v1", "tiny"), "light"),
        (("xl", "ssd-1b"), "full"),
        slow(("v1", "small"), "full"),
    ],
    indirect=["crossing"],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_t2i_adapter_gives_each_place_what_it_gave_the_teachers(
    crossing: Crossing, tmp_path: Path, kind: str
) -> None:
    torch.manual_seed(4)
    made = crossing.adapt(make_t2i_adapter(crossing.teacher, tmp_path / "adapter", kind), tmp_path / "out")
    residuals = T2IAdapter.from_pretrained(made.out)(torch.rand(2, 3, PICTURE, PICTURE))
    teacher, student = crossing.teacher.unet, UNet2DConditionModel.from_pretrained(crossing.student / "unet").eval()
    places = [*(f"down_blocks.{n}" for n in range(len(teacher.down_blocks))), "mid_block"][: len(residuals)]
    there = [path for path in places if student.state_dict().keys() & {f"{path}.resnets.0.conv1.weight"}]
    assert made.dropped == tuple(path for path in places if path not in there)
    for path in (there[0], there[-1]):
        number = places.index(path)
        alone = [residual * (n == number) for n, residual in enumerate(residuals)]
        for model in (teacher, student):
            plain, led = (last_of(model, path, given, crossing) for given in (None, alone))
            torch.testing.assert_close(led - plain, residuals[number], atol=1e-5, rtol=1e-5)


def last_of(unet: UNet2DConditionModel, path: str, residuals: list[Tensor] | None, crossing: Crossing) -> Tensor:
    """What the middle gives, or what a down stage keeps for its way up: of its last layer, where attention follows."""
    kept: list[Tensor] = []
    module = unet.get_submodule(path)
    sampled = getattr(module, "downsamplers", None) and getattr(module, "has_cross_attention", False)
    hook = module.register_forward_hook(
        lambda module, given, output: kept.append(output if path == "mid_block" else output[1][-2 if sampled else -1])
    )
    inputs, added = crossing.inputs()
    with torch.no_grad():
        given = residuals and [*residuals]  # which the U-Net empties
        unet(*inputs, added_cond_kwargs=added, down_intrablock_additional_residuals=given)
    hook.remove()
    return kept[0]


# IP-Adapters


def test_an_ip_adapter_gives_each_attention_what_it_gave_the_teachers(crossing: Crossing, tmp_path: Path) -> None:
    torch.manual_seed(5)
    whole, pruning = crossing.teacher.unet, crossing.pruning
    theirs = [name.removesuffix(".processor") for name in whole.attn_processors]
    tensors = {"image_proj.proj.weight": torch.randn(4 * CONTEXT, 16), "image_proj.proj.bias": torch.randn(4 * CONTEXT)}
    tensors |= {f"image_proj.norm.{kind}": torch.randn(CONTEXT) for kind in ("weight", "bias")}
    for number, path in enumerate(theirs):
        if path.endswith("attn2"):
            shape = whole.get_submodule(path).to_k.weight.shape
            tensors |= {f"ip_adapter.{number}.to_{kind}_ip.weight": torch.randn(*shape) for kind in "kv"}
    save_file(tensors, tmp_path / "ip-adapter.safetensors")
    made = crossing.adapt(tmp_path / "ip-adapter.safetensors", tmp_path / "out")
    teacher, student = (load_pipeline(model).unet for model in (crossing.folder, crossing.student))
    load_ip_adapter(teacher, tmp_path / "ip-adapter.safetensors")
    load_ip_adapter(student, made.out / "ip-adapter.safetensors")
    for path in (name.removesuffix(".processor") for name in student.attn_processors if "attn2" in name):
        own, theirs_ = (
            unet.get_submodule(p).processor for unet, p in ((student, path), (teacher, pruning.teacher_key(path)))
        )
        assert torch.equal(own.to_k_ip[0].weight, theirs_.to_k_ip[0].weight)
        assert torch.equal(own.to_v_ip[0].weight, theirs_.to_v_ip[0].weight)
    assert set(made.dropped) == {
        path for path in theirs if path.endswith("attn2") and pruning.student_key(path) is None
    }
    inputs, added = crossing.inputs()
    with torch.no_grad():
        image = {"image_embeds": [torch.randn(2, 1, 16)]}
        assert (student(*inputs, added_cond_kwargs=added | image).sample).isfinite().all()


def load_ip_adapter(unet: UNet2DConditionModel, file: Path) -> None:
    """As stock pipelines do."""
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(file).items():
        part, _, rest = name.partition(".")
        state.setdefault(part, {})[rest] = tensor
    unet._load_ip_adapter_weights([state])


# Motion modules


def test_motion_modules_follow_their_layers(crossing: Crossing, tmp_path: Path) -> None:
    torch.manual_seed(6)
    config = {"motion_layers_per_block": 2, "motion_norm_num_groups": 8, "motion_num_attention_heads": 2}
    whole = MotionAdapter(block_out_channels=crossing.teacher.unet.config.block_out_channels, **config)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    whole.save_pretrained(tmp_path / "motion")
    whole.save_pretrained(tmp_path / "motion", variant="fp16")  # beside it, as people publish it
    made = crossing.adapt(tmp_path / "motion", tmp_path / "out")
    motion = MotionAdapter.from_pretrained(made.out)
    modules = dict(whole.named_modules())
    seen = set()
    for name, module in motion.named_modules():
        if name.count(".") == 3 and "motion_modules" in name and "blocks" in name and "mid" not in name:
            stage, layer = name.split(".motion_modules.")
            there = crossing.pruning.teacher_key(f"{stage}.resnets.{layer}").replace("resnets", "motion_modules")
            seen.add(there)
            own, theirs = module.state_dict(), modules[there].state_dict()
            assert own.keys() == theirs.keys()
            assert all(torch.equal(own[key], theirs[key]) for key in own)
    assert seen | set(made.dropped) >= {
        n for n in modules if n.count(".") == 3 and n.startswith(("down", "up")) and "motion_modules" in n
    }
    student = load_pipeline(crossing.student).unet
    unet = motion_unet(student, motion)
    assert (unet.mid_block is None) == (student.mid_block is None)
    for name, parameter in unet.named_parameters():
        if name.endswith(("proj_out.weight", "proj_out.bias")) and "motion_modules" in name:
            torch.nn.init.zeros_(parameter)  # modules that move nothing
    (latents, _, context), added = crossing.inputs(batch=1)
    frames = latents[:, :, None].expand(-1, -1, 3, -1, -1)
    with torch.no_grad():
        still, picture = (
            unet(frames, 5, context.expand(3, -1, -1), added_cond_kwargs=added).sample,
            student(latents, 5, context, added_cond_kwargs=added).sample,
        )
    torch.testing.assert_close(still, picture[:, :, None].expand_as(still), atol=1e-5, rtol=1e-4)


def test_motion_modules_go_around_a_middle_block_of_one_resnet(v1_teacher: StableDiffusionPipeline) -> None:
    unet, _ = prune_unet(v1_teacher.unet, Recipe("mine", mid="resnet"))
    config = {"motion_layers_per_block": 2, "motion_norm_num_groups": 16, "motion_num_attention_heads": 2}
    made = motion_unet(unet, MotionAdapter(**student_config(config, unet.config)))
    hidden, time = torch.randn(1, 64, 1, 1), torch.randn(1, 128)
    latents = torch.randn(1, 4, 3, LATENT, LATENT)
    with torch.no_grad():
        assert torch.equal(made.mid_block(hidden, time, num_frames=3), unet.mid_block(hidden, time))
        assert made(latents, 5, torch.randn(3, MAX_TOKENS, CONTEXT)).sample.shape == latents.shape


def test_motion_modules_in_one_file_keep_their_names(
    students: dict[str, Path], v1_folder: Path, v1_teacher: StableDiffusionPipeline, tmp_path: Path
) -> None:
    tensors = {}
    for stage, width in enumerate(reversed(v1_teacher.unet.config.block_out_channels)):
        for layer in range(3):
            name = f"up_blocks.{stage}.motion_modules.{layer}.temporal_transformer"
            tensors |= {
                f"{name}.norm.weight": torch.full((width,), 10.0 * stage + layer),
                f"{name}.proj_in.bias": torch.zeros(width),
            }
    save_file(tensors, tmp_path / "mm.safetensors")
    made = adapt(
        AdaptOptions(str(tmp_path / "mm.safetensors"), str(students["tiny"]), str(v1_folder), str(tmp_path / "out"))
    )
    found = load_file(made.out / "mm.safetensors")
    norms = {name.split(".temporal")[0]: float(t[0]) for name, t in found.items() if name.endswith("norm.weight")}
    stages = {0: 10.0, 1: 20.0, 2: 30.0}
    assert norms == {
        f"up_blocks.{s}.motion_modules.{n}": stages[s] + layer for s in stages for n, layer in enumerate((0, 2))
    }


# Bad input


@pytest.mark.parametrize("kind", ["lora", "captions of a LoRA", "words", "controlnet", "t2i-adapter"])
def test_what_was_made_for_stable_diffusion_is_refused_by_sdxl(
    xl_student: Path, xl_folder: Path, v1_teacher: StableDiffusionPipeline, controlnet: Path, tmp_path: Path, kind: str
) -> None:
    source, line = tmp_path / "it.safetensors", r"is of Stable Diffusion 1.x or 2.x.*give one of SDXL"
    captions = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    if kind == "lora":
        source = LAYOUTS["kohya"](v1_teacher).write(tmp_path / "it")
    elif kind == "captions of a LoRA":
        save_file(
            {f"{captions}.lora_down.weight": torch.zeros(1, 768), f"{captions}.lora_up.weight": torch.zeros(16, 1)},
            source,
        )
    elif kind == "words":
        save_file({"<thing>": torch.ones(CONTEXT // 2)}, source)
    elif kind == "controlnet":
        source = controlnet
    else:
        T2IAdapter(channels=(16, 16, 32, 32), num_res_blocks=1, downscale_factor=4).save_pretrained(tmp_path / "it")
        source, line = (
            tmp_path / "it",
            "makes 48 channels of a picture, and one of this teacher 64 or 192; it is of another",
        )
    with pytest.raises(InputError, match=line):
        adapt(AdaptOptions(str(source), str(xl_student), str(xl_folder), str(tmp_path / "out")))


LAYER = "lora_unet_conv_in"
PLAIN = {f"{LAYER}.lora_down.weight": torch.zeros(1, 4, 3, 3), f"{LAYER}.lora_up.weight": torch.zeros(32, 1, 1, 1)}
PEFTS = {
    "base_model.model.conv_in.lora_A.weight": torch.zeros(1, 4, 3, 3),
    "base_model.model.conv_in.lora_B.weight": torch.zeros(32, 1, 1, 1),
}
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "a word of another width": (
        {"<thing>": torch.ones(CONTEXT + 1)},
        r"'<thing>' has vectors of 33 numbers, and the text encoder takes 32",
    ),
    "words of SDXL": (
        {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)},
        r"'it' in .* is of SDXL, and this model of Stable Diffusion 1.x or 2.x; give one of Stable Diffusion",
    ),
    "half a LoRA": (
        {f"{LAYER}.lora_up.weight": torch.zeros(32, 1, 1, 1)},
        "its unet.conv_in is a LoRA and has no lora_down.weight",
    ),
    "a tensor of no layout": (
        PLAIN | {f"{LAYER}.lora_side.weight": torch.zeros(1)},
        "lora_side.weight, which is not understood",
    ),
    "an OFT": ({f"{LAYER}.oft_blocks": torch.zeros(8, 4, 4)}, "oft_blocks of an OFT or BOFT, which is not understood"),
    "a LoRA with what means nothing there": (
        PLAIN | {f"{LAYER}.hada_t1": torch.zeros(1)},
        "is a LoRA and has hada_t1 besides",
    ),
    "two names for one layer": (
        PLAIN | {"unet.conv_in.lora_A.weight": torch.zeros(1, 4, 3, 3)},
        "has two tensors lora_down.weight for unet.conv_in",
    ),
    "ranks that differ": (PLAIN | {f"{LAYER}.lora_up.weight": torch.zeros(32, 2, 1, 1)}, "shapes do not go together"),
    "a layer of other widths": (
        PLAIN | {f"{LAYER}.lora_up.weight": torch.zeros(64, 1, 1, 1)},
        "conv_in is 4 to 64, 3 x 3, and the model's 4 to 32, 3 x 3",
    ),
    "magnitudes of another width": (
        PLAIN | {f"{LAYER}.dora_scale": torch.ones(5, 1, 1, 1)},
        "has 5 magnitudes, and the model's 32 outputs",
    ),
    "a bias of another width": (
        PLAIN | {f"{LAYER}.diff_b": torch.ones(5)},
        "moves a bias of 5, and the model's has 32",
    ),
    "layers of SDXL": (
        PLAIN | {"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)},
        "is of SDXL, and this model of Stable Diffusion 1.x or 2.x; give one of Stable Diffusion",
    ),
    "whole numbers": ({f"{LAYER}.diff": torch.zeros(32, 4, 3, 3, dtype=torch.int8)}, "diff in int8; give floats"),
    "numbers that are not finite": (
        {f"{LAYER}.diff": torch.full((32, 4, 3, 3), torch.nan)},
        "diff has numbers that are not finite",
    ),
    "a whole checkpoint": (
        {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)},
        "is a whole checkpoint, which cannot be carried",
    ),
    "a Control-LoRA": ({"lora_controlnet": torch.zeros(0)}, "is a Control-LoRA, which cannot be carried"),
    "something else": ({"encoder.0.weight": torch.zeros(1)}, "is no adapter that is known .it has encoder.0.weight."),
    "nothing": ({}, "is no adapter that is known .it has no tensor."),
    "matrices without a rank": (
        {f"{LAYER}.lora_down.weight": torch.zeros(0, 4, 3, 3), f"{LAYER}.lora_up.weight": torch.zeros(32, 0, 1, 1)},
        "has matrices of rank 0 for unet.conv_in; remove them",
    ),
    "differences of a ControlNet": (
        {"difference": torch.ones(1), "input_hint_block.0.weight": torch.zeros(8, 3, 3, 3)},
        "holds differences from a U-Net; give a whole ControlNet",
    ),
    "a SparseCtrl": (
        {"controlnet_cond_embedding.weight": torch.zeros(1), "up_blocks.0.motion_modules.0.proj.bias": torch.zeros(1)},
        "has controlnet_cond_embedding.weight, which is no motion module's; give motion modules alone",
    ),
    "layers of another model": (
        {"text_encoders.clip_l.q_proj.lora_down.weight": torch.zeros(1, 4), **PLAIN},
        "that this model does not have, first text_encoders.clip_l.q_proj; give one of this teacher",
    ),
    "peft's without its config": (PEFTS, "has no adapter_config.json beside it, which says its scale; give the folder"),
    "an IP-Adapter of another family": (
        {"ip_adapter.1.to_k_ip.weight": torch.zeros(9, 9)},
        "to_k_ip.weight is 9 to 9, and the teacher's 32 to 32",
    ),
    "an IP-Adapter with more attentions": (
        {"ip_adapter.99.to_k_ip.weight": torch.zeros(9, 9)},
        "to_k_ip.weight, and the teacher has 32 attentions",
    ),
    "a T2I-Adapter of other widths": (
        {f"body.{n}.block2.weight": torch.zeros(8, 8, 1, 1) for n in range(8)},
        r"residuals of \[8, 8, 8, 8\] channels, and the teacher's stages have \[32, 64, 64, 64\]",
    ),
    "motion modules of other widths": (
        {"up_blocks.0.motion_modules.0.temporal_transformer.norm.weight": torch.zeros(8)},
        "a module of 8 channels behind layer 0 of up_blocks.0, where the teacher has one of 64",
    ),
    "a ControlNet of another shape": (
        {
            "input_hint_block.0.weight": torch.zeros(8, 3, 3, 3),
            **{f"input_hint_block.{n}.weight": torch.zeros(8, 8, 3, 3) for n in (4, 8, 12)},
        },
        "was not made for a U-Net of this teacher's shape",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_its_name(
    run: Run, students: dict[str, Path], v1_folder: Path, tmp_path: Path, case: str
) -> None:
    tensors, line = REFUSED[case]
    save_file(tensors, tmp_path / "it.safetensors")
    outcome = run(
        "adapt",
        tmp_path / "it.safetensors",
        "--model",
        students["base"],
        "--teacher",
        v1_folder,
        "--out",
        tmp_path / "out",
    )
    assert outcome.code == 2
    assert re.search(line, outcome.said[0]), outcome.said
    assert not (tmp_path / "out").exists()


CONFIGS: dict[str, tuple[dict[str, object], str]] = {
    "another type": (
        {"peft_type": "BOFT"},
        "is an adapter of peft's type BOFT; those of LORA, LOHA, LOKR, IA3 are read",
    ),
    "weights changed at the start": (
        {"init_lora_weights": "pissa"},
        "was begun by pissa, which changes the model's own weights",
    ),
    "whole modules": (
        {"modules_to_save": ["conv_out"]},
        r"has modules_to_save \['conv_out'\], which is not understood; merge it with peft",
    ),
    "a rank without a scale": ({"lora_alpha": None}, "has lora_alpha None; write a number"),
    "a pattern without a scale": ({"alpha_pattern": {"to_q": None}}, "has alpha_pattern to_q None; write a number"),
    "patterns as a list": (
        {"rank_pattern": ["to_q"]},
        r"has rank_pattern \['to_q'\]; write patterns",
    ),
    "a broken pattern": ({"alpha_pattern": {"(": 1}}, "alpha_pattern has '.', which is no regular expression"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_is_not_understood_is_refused(
    run: Run, students: dict[str, Path], v1_folder: Path, tmp_path: Path, case: str
) -> None:
    config, line = CONFIGS[case]
    folder = Made(tensors=PEFTS, config={"peft_type": "LORA", "r": 1, "lora_alpha": 1} | config).write(tmp_path / "it")
    outcome = run("adapt", folder, "--model", students["base"], "--teacher", v1_folder, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert re.search(line, outcome.said[0]), outcome.said
    assert "cannot be read" not in outcome.said[0]


QUERY = "encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "pattern", [QUERY, "q_proj", f"text_model.{QUERY}", f"^text_model.{QUERY}", r"text_model\..*q_proj"]
)
def test_patterns_may_have_the_level_that_transformers_had_once(pattern: str) -> None:
    config = PeftConfig({"r": 4, "lora_alpha": 4, "alpha_pattern": {pattern: 12}}, "it")
    assert config.scale(QUERY, 4) == 3
    assert config.scale(QUERY.replace("q_", "k_"), 4) == 1
    assert PeftConfig({"feedforward_modules": [f"text_model.{QUERY}"]}, "it").on_input(QUERY)


def test_adapters_of_others_are_refused(
    students: dict[str, Path], lora: Path, controlnet: Path, v1_folder: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    config = json.loads((controlnet / "config.json").read_text())
    other = tmp_path / "other"
    ControlNetModel.from_config(config | {"layers_per_block": 1}).save_pretrained(other)
    (tmp_path / "it.pt").write_bytes(b"")
    with pytest.raises(InputError, match="is not of this teacher: its layers_per_block is 1, and the teacher's 2"):
        adapt(AdaptOptions(str(other), str(students["base"]), str(v1_folder), out))
    with pytest.raises(InputError, match="names no recipe and has as many blocks as its teacher"):
        adapt(AdaptOptions(str(lora), str(v1_folder), str(v1_folder), out))
    with pytest.raises(InputError, match=r"adapter .*nothing does not exist"):
        adapt(AdaptOptions(str(tmp_path / "nothing"), str(students["base"]), str(v1_folder), out))
    with pytest.raises(InputError, match=r"it.pt is a pickle, which is never loaded; give its .safetensors"):
        adapt(AdaptOptions(str(tmp_path / "it.pt"), str(students["base"]), str(v1_folder), out))
    with pytest.raises(InputError, match=r"is a ControlNet, and no LoRA"):
        merge_lora(load_pipeline(v1_folder), controlnet)
    assert not Path(out).exists()


def test_the_same_command_says_the_same_and_another_is_refused(
    done: Run, run: Run, students: dict[str, Path], lora: Path, v1_folder: Path, tmp_path: Path
) -> None:
    words = ["--teacher", v1_folder, "--out", tmp_path / "out", "--json"]
    first = done("adapt", lora, "--model", students["tiny"], *words).json
    assert done("adapt", lora, "--model", students["tiny"], *words).json == first
    assert first["out"] == str(tmp_path / "out")
    outcome = run("adapt", lora, "--model", students["base"], *words)
    assert outcome.code == 2
    assert "holds another run" in outcome.said[0]
