"""What users get wrong: every case is code 2 and one line on stderr that names the value, and leaves nothing behind."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bksdm.common.assets import asset
from bksdm.common.runs import open_run
from bksdm.evaluate.inception import Inception
from bksdm.models.pipelines import save_pipeline
from bksdm.options.distill import DistillOptions
from bksdm.options.evaluate import EvaluateOptions
from bksdm.options.generate import GenerateOptions
from bksdm.options.pruning import PruneOptions
from bksdm.options.quickstart import QuickstartOptions
from tiny_models import V1_UNET, build_pipeline
from verbs import Run, captioned

pytest_plugins = ["verbs_fixtures"]
pytestmark = pytest.mark.usefixtures("without_charts")

TOKENIZER_FILES = [f"tokenizer/{name}" for name in ("tokenizer.json", "vocab.json", "merges.txt")]
UNET = "unet/diffusion_pytorch_model.safetensors"


@dataclass
class World:
    """What a user has at hand, and the command lines to get wrong with it."""

    tmp: Path
    teacher: Path
    student: Path
    other_student: Path
    pictures: Path

    @property
    def out(self) -> Path:
        return self.tmp / "out"

    def file(self, content: str | bytes, name: str = "file.txt") -> Path:
        path = self.tmp / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def copy(self, source: Path) -> Path:
        return Path(shutil.copytree(source, self.tmp / "copy"))

    def empty(self) -> Path:
        folder = self.tmp / "empty"
        folder.mkdir()
        return folder

    def built(self, **unet: object) -> Path:
        """A pipeline whose U-Net differs from the teacher's in its config."""
        save_pipeline(build_pipeline(V1_UNET | unet), self.tmp / "built")
        return self.tmp / "built"

    def data(self, metadata: str | None, name: str = "metadata.jsonl") -> Path:
        """The pictures with another metadata file."""
        folder = self.copy(self.pictures)
        (folder / "metadata.jsonl").unlink()
        if metadata is not None:
            (folder / name).write_text(metadata)
        return folder

    def data_with(self, content: bytes) -> Path:
        """The pictures, one of them with another content."""
        folder = self.copy(self.pictures)
        (folder / "3.png").write_bytes(content)
        return folder

    def beside(self, *names: str) -> Path:
        """The pictures without a metadata file, and text files of these names beside them."""
        folder = self.data(None)
        for name in names:
            (folder / name).write_text("red")
        return folder

    def encoder(self) -> Path:
        return self.copy(asset("emoji", "encoder"))

    def describe(self, model: object, *words: object) -> list[object]:
        return ["describe", model, *words]

    def prune(self, *words: object, teacher: object = None, recipe: object = "small") -> list[object]:
        return ["prune", teacher or self.teacher, "--recipe", recipe, "--out", self.out, *words]

    def distill(
        self, *words: object, teacher: object = None, student: object = None, data: object = None
    ) -> list[object]:
        given = ["--student", student or self.student, "--data", data or self.pictures, "--out", self.out]
        small = ["--steps", 1, "--batch_size", 1, "--accumulation", 1, "--sample_every", 0, "--precision", "fp32"]
        return ["distill", teacher or self.teacher, *given, *small, *words]

    def prepare(self, *words: object, data: object = None) -> list[object]:
        return ["prepare", data or self.pictures, "--teacher", self.teacher, "--out", self.out, *words]

    def generate(self, *words: object, model: object = None, prompt: bool = True) -> list[object]:
        what = ["--prompt", "red"] if prompt else []
        return ["generate", model or self.teacher, "--out", self.out, "--steps", 2, *what, *words]

    def evaluate(self, *words: object, model: object = None, reference: object = None) -> list[object]:
        reference = reference or self.pictures
        given = ["--reference", reference, "--out", self.out, "--encoder", "emoji", "--steps", 1, "--latency", 0]
        return ["evaluate", model or self.teacher, *given, "--scores", "frechet_distance", "clip_score", *words]

    def inception(self) -> Path:
        """The weights of a random Inception network."""
        save_file(Inception.random().state_dict(), self.tmp / "inception.safetensors")
        return self.tmp / "inception.safetensors"

    def quickstart(self, *words: object) -> list[object]:
        return ["quickstart", self.out, "--steps", 1, *words]


@pytest.fixture
def world(tmp_path: Path, v1_folder: Path, v1_student: Path, v2_student: Path, pictures: Path) -> World:
    return World(tmp_path, v1_folder, v1_student, v2_student, pictures)


@pytest.fixture
def quick_world(
    tmp_path: Path, exported_model: Path, exported_student: Path, v2_student: Path, pictures: Path
) -> World:
    """The same with a smaller teacher, for what learns and draws to the end."""
    return World(tmp_path, exported_model, exported_student, v2_student, pictures)


def noise_png(world: World) -> bytes:
    picture = Image.effect_noise((32, 32), 90).convert("RGB")
    picture.save(world.tmp / "noise.png")
    return (world.tmp / "noise.png").read_bytes()


def cut_picture(world: World) -> bytes:
    whole = noise_png(world)
    return whole[: len(whole) // 2]


def change(path: Path, change_bytes: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change_bytes(path.read_bytes()))
    return path


def cut(path: Path) -> Path:
    return change(path, lambda whole: whole[: len(whole) // 2])


def damaged(world: World, part: str = UNET, folder: str = "teacher") -> Path:
    """A copy of a model or encoder with a file that is cut short."""
    copy = world.encoder() if folder == "encoder" else world.copy(world.teacher)
    cut(copy / part)
    return copy


def without(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def pickled(world: World) -> Path:
    folder = world.copy(world.teacher)
    (folder / UNET).rename((folder / UNET).with_suffix(".bin"))
    return folder


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def other_run(world: World, options: object, verb: str) -> Path:
    """The out folder, taken by a run with these options."""
    folder = open_run(world.out, verb, dataclasses.asdict(options))
    (folder / "artefact").write_text("made")
    return folder


def foreign(world: World) -> Path:
    world.out.mkdir()
    (world.out / "thesis.tex").write_text("years of work")
    return world.out


def taken(world: World) -> Path:
    world.out.write_text("a file")
    return world.out


def below_a_file(world: World) -> list[object]:
    return ["--out", world.file("a file") / "deeper" / "out"]


Build = Callable[[World], list[object]]


def case(name: str, build: Build, *fragments: str) -> object:
    """A command line, and what its message must hold; `{tmp}` is the folder of the test."""
    return pytest.param(build, fragments, id=name)


MODELS = [
    case("missing folder", lambda w: w.generate(model=w.tmp / "nowhere"), "{tmp}/nowhere does not exist"),
    case("missing folder, describe", lambda w: w.describe(w.tmp / "nowhere"), "{tmp}/nowhere does not exist"),
    case("missing folder, prune", lambda w: w.prune(teacher=w.tmp / "nowhere"), "{tmp}/nowhere does not exist"),
    case("missing folder, distill", lambda w: w.distill(teacher=w.tmp / "nowhere"), "{tmp}/nowhere does not exist"),
    case("missing folder, evaluate", lambda w: w.evaluate(model=w.tmp / "nowhere"), "{tmp}/nowhere does not exist"),
    case("unknown name", lambda w: w.generate(model="emojis"), "model emojis does not exist", "'emoji'"),
    case("empty folder", lambda w: w.generate(model=w.empty()), "{tmp}/empty is not a diffusers pipeline"),
    case("empty folder, describe", lambda w: w.describe(w.empty()), "{tmp}/empty has no unet/config.json"),
    case("not a pipeline", lambda w: w.prune(teacher=w.pictures), "pictures is not a diffusers pipeline"),
    case("not a pipeline, describe", lambda w: w.describe(w.pictures), "pictures has no unet/config.json"),
    case("not a U-Net", lambda w: w.describe(w.teacher / "vae"), "it is a AutoencoderKL"),
    case("truncated weights", lambda w: w.generate(model=damaged(w)), f"{{tmp}}/copy/{UNET} is cut short or damaged"),
    case("truncated weights, prune", lambda w: w.prune(teacher=damaged(w)), f"{{tmp}}/copy/{UNET} is cut short"),
    case("truncated weights, distill", lambda w: w.distill(teacher=damaged(w)), f"{{tmp}}/copy/{UNET} is cut short"),
    case("truncated weights, evaluate", lambda w: w.evaluate(model=damaged(w)), f"{{tmp}}/copy/{UNET} is cut short"),
    case("broken config", lambda w: w.generate(model=damaged(w, "unet/config.json")), "{tmp}/copy"),
    case("broken config, describe", lambda w: w.describe(damaged(w, "unet/config.json")), "config.json", "JSON"),
    case("pickle only", lambda w: w.generate(model=pickled(w)), "model.bin is a pickle, which can run code"),
    case(
        "a .ckpt file",
        lambda w: w.generate(model=w.file("x", "sd.ckpt")),
        "{tmp}/sd.ckpt is a pickle",
        "--to ldm --unpickle",
    ),
    case("a .ckpt file, prune", lambda w: w.prune(teacher=w.file("x", "sd.ckpt")), "{tmp}/sd.ckpt"),
    case("a .ckpt file, describe", lambda w: w.describe(w.file("x", "sd.ckpt")), "{tmp}/sd.ckpt"),
    case(
        "a .safetensors file that is none",
        lambda w: w.generate(model=w.file("<html>", "sd.safetensors")),
        "{tmp}/sd.safetensors is cut short or damaged",
    ),
    case(
        "a text encoder of another model",
        lambda w: w.generate(model=w.built(cross_attention_dim=48)),
        "{tmp}/built does not fit together",
        "32",
        "48",
    ),
    *(
        case(
            f"a U-Net like SDXL's, {verb}",
            lambda w, start=start: start(
                w,
                w.built(
                    addition_embed_type="text_time",
                    addition_time_embed_dim=8,
                    projection_class_embeddings_input_dim=64,
                ),
            ),
            "model {tmp}/built is a StableDiffusionPipeline around a U-Net of SDXL; copy the whole pipeline",
        )
        for verb, start in {
            "generate": lambda w, model: w.generate(model=model),
            "prune": lambda w, model: w.prune(teacher=model),
            "distill": lambda w, model: w.distill(teacher=model),
        }.items()
    ),
    case(
        "a U-Net for inpainting",
        lambda w: w.generate(model=w.built(in_channels=9)),
        "{tmp}/built is one for in-painting; give it --image and --mask, or another model",
    ),
    case(
        "a U-Net for depth",
        lambda w: w.generate(model=w.built(in_channels=5)),
        "{tmp}/built has a U-Net of 5 channels, and its latents have 4",
    ),
    case(
        "a U-Net for inpainting, distill",
        lambda w: w.distill(teacher=w.built(in_channels=9)),
        "{tmp}/built has a U-Net of 9 channels, and its latents have 4",
    ),
    case("no U-Net", lambda w: w.generate(model=without(w.copy(w.teacher), "unet")), "{tmp}/copy has no folder unet"),
    case(
        "no tokenizer files",
        lambda w: w.generate(model=without(w.copy(w.teacher), *TOKENIZER_FILES)),
        "{tmp}/copy/tokenizer",
    ),
    case(
        "no tokenizer config",
        lambda w: w.generate(model=without(w.copy(w.teacher), "tokenizer/tokenizer_config.json")),
        "{tmp}/copy",
        "tokenizer_config.json",
    ),
]


RECIPES = [
    case("unknown recipe", lambda w: w.prune(recipe="smal"), "unknown recipe 'smal'; give base, "),
    case("unknown recipe, describe", lambda w: w.describe(w.teacher, "--recipe", "smal"), "unknown recipe 'smal'"),
    case("unknown recipe, quickstart", lambda w: w.quickstart("--recipe", "smal"), "unknown recipe 'smal'"),
    case(
        "recipe that removes nothing, quickstart",
        lambda w: w.quickstart("--recipe", w.file("name: whole", "r.yaml")),
        "recipe {tmp}/r.yaml removes nothing",
    ),
    case("a folder as recipe", lambda w: w.prune(recipe=w.pictures), "pictures", "YAML file"),
    case("recipe that is no YAML", lambda w: w.prune(recipe=w.file("name: [", "r.yaml")), "{tmp}/r.yaml is not YAML"),
    case("recipe that is no text", lambda w: w.prune(recipe=w.file(b"\xff\xfe", "r.yaml")), "{tmp}/r.yaml is not text"),
    case("recipe that is a list", lambda w: w.prune(recipe=w.file("- a", "r.yaml")), "{tmp}/r.yaml is not a mapping"),
    case("recipe without a name", lambda w: w.prune(recipe=w.file("down: [0]", "r.yaml")), "{tmp}/r.yaml has no name"),
    case(
        "recipe with an unknown key",
        lambda w: w.prune(recipe=w.file("name: x\nmiddle: false", "r.yaml")),
        "{tmp}/r.yaml has the unknown key 'middle'; known are",
    ),
    case(
        "recipe with a wrong value",
        lambda w: w.prune(recipe=w.file("name: x\ndown: some", "r.yaml")),
        "{tmp}/r.yaml: down is 'some'; write",
    ),
    case(
        "recipe that keeps a layer that is not there",
        lambda w: w.prune(recipe=w.file("name: x\ndown: [7]\nup: [0, -1]", "r.yaml")),
        "recipe 'x' does not fit this teacher",
        "layer 7 of down_blocks.0, which has 2 layers",
    ),
    case(
        "recipe that cuts too deep",
        lambda w: w.describe(w.teacher, "--recipe", w.file("name: x\ndrop_innermost: 4", "r.yaml")),
        "recipe 'x' does not fit this teacher",
        "drop_innermost is 4, and the teacher has 4 stages",
    ),
]

OPTIONS = [
    case(
        "a scheduler whose library is not there",
        lambda w: w.generate("--scheduler", "DPMSolverSDEScheduler"),
        "scheduler DPMSolverSDEScheduler needs a library that is not installed",
        "torchsde",
    ),
    case("no pictures, evaluate", lambda w: w.evaluate("--images_per_prompt", 0), "images_per_prompt is 0"),
    case(
        "a teacher of other widths, evaluate",
        lambda w: w.evaluate("--teacher", "emoji"),
        "teacher emoji and model",
        "cross_attention_dim: 128 and 32",
    ),
    case("pruning into the current folder", lambda w: w.prune("--out", "."), "out is ., the folder that you are in"),
    case("unknown option", lambda w: w.generate("--step", 3), "bksdm generate", "--step"),
    case("stray word", lambda w: w.generate("--seed", 1, "apple"), "bksdm generate", "apple"),
    case("wrong type", lambda w: w.generate("--steps", "many"), "steps is many; give a whole number"),
    case("wrong type, fraction", lambda w: w.distill("--steps", "1.5"), "steps is 1.5; give a whole number"),
    case(
        "wrong choice",
        lambda w: w.generate("--precision", "fp8"),
        "precision is fp8; give one of auto, fp32, bf16, fp16",
    ),
    case("missing options", lambda w: ["distill", w.teacher], "required", "student", "data", "out"),
    case("missing out", lambda w: ["prune", w.teacher, "--recipe", "small"], "required", "out"),
    case("no options", lambda _: ["evaluate"], "required", "models", "out"),
    case("missing config", lambda w: w.generate("--config", w.tmp / "no.yaml"), "{tmp}/no.yaml"),
    case("config that is no YAML", lambda w: w.generate("--config", w.file("steps: [", "c.yaml")), "config", "parsing"),
    case("config that is a list", lambda w: w.generate("--config", w.file("- 1", "c.yaml")), "config"),
    case("unknown key in config", lambda w: w.generate("--config", w.file("step: 3", "c.yaml")), "step"),
    case("wrong type in config", lambda w: ["generate", "--config", w.file("steps: many", "c.yaml")], "steps", "many"),
    case("wrong list in config", lambda w: w.generate("--config", w.file("prompts: [a]", "c.yaml")), "prompts"),
    case("zero steps", lambda w: w.generate("--steps", 0), "steps is 0; give at least 1"),
    case("negative steps", lambda w: w.generate("--steps=-3"), "steps is -3; give at least 1"),
    case("zero steps, distill", lambda w: w.distill("--steps", 0), "steps is 0; give at least 1"),
    case("zero steps, evaluate", lambda w: w.evaluate("--steps", 0), "steps is 0; give at least 1"),
    case("zero steps, quickstart", lambda w: w.quickstart("--steps", 0), "steps is 0; give at least 1"),
    case("batch size 0", lambda w: w.generate("--batch_size", 0), "batch_size is 0; give at least 1"),
    case("batch size 0, distill", lambda w: w.distill("--batch_size", 0), "batch_size is 0; give at least 1"),
    case("batch size 0, evaluate", lambda w: w.evaluate("--batch_size", 0), "batch_size is 0; give at least 1"),
    case("no pictures", lambda w: w.generate("--images_per_prompt", 0), "images_per_prompt is 0; give at least 1"),
    case("negative seed", lambda w: w.generate("--seed", -1), "seed is -1; give"),
    case("seed too large", lambda w: w.generate("--seed", 2**64), f"seed is {2**64}; give"),
    case("negative learning rate", lambda w: w.distill("--lr=-1"), "lr is -1.0; give 0 or more"),
    case("learning rate nan", lambda w: w.distill("--lr", "nan"), "lr is nan; give a number"),
    case("guidance nan", lambda w: w.generate("--guidance", "nan"), "guidance is nan; give a number"),
    case("negative weight", lambda w: w.distill("--task_weight=-1"), "task_weight is -1.0; give 0 or more"),
    case("EMA decay of 1", lambda w: w.distill("--ema_decay", 1), "ema_decay is 1.0; give"),
    case("mask of 0", lambda w: w.distill("--mask_features", 0), "mask_features is 0.0; give 1 or more standard"),
    case(
        "inputs of the teacher of a U-Net",
        lambda w: w.distill("--teacher_inputs"),
        "for which there is no distill --teacher_inputs yet",
    ),
    case("guidance of 1", lambda w: w.distill("--guided_output", 1), "guided_output is 1.0; give more than 1"),
    case("all captions dropped", lambda w: w.distill("--caption_dropout", 1), "caption_dropout is 1.0; give a number"),
    case("negative dropout", lambda w: w.distill("--caption_dropout=-0.1"), "caption_dropout is -0.1; give a number"),
    case("more than all pictures", lambda w: w.distill("--cutmix", 1.5), "cutmix is 1.5; give a number from 0 to 1"),
    case("negative rate", lambda w: w.distill("--random_conditioning=-1"), "random_conditioning is -1.0; give 0 or"),
    case(
        "unknown taps",
        lambda w: w.distill("--taps", "cross"),
        "taps is cross; give one of stages, self_attention, both, layers",
    ),
    case(
        "a pool that nothing draws from",
        lambda w: w.distill("--caption_pool", w.file("red")),
        "caption_pool is {tmp}/file.txt, and nothing draws from it; give --random_conditioning too",
    ),
    case(
        "missing pool",
        lambda w: w.distill("--random_conditioning", 5, "--caption_pool", "no.txt"),
        "caption_pool no.txt does not exist; give a text file with one prompt a line",
    ),
    case(
        "empty pool",
        lambda w: w.distill("--random_conditioning", 5, "--caption_pool", w.file(" ")),
        "caption_pool {tmp}/file.txt is empty",
    ),
    case("no accumulation", lambda w: w.distill("--accumulation", 0), "accumulation is 0; give at least 1"),
    case("negative workers", lambda w: w.distill("--workers=-1"), "workers is -1; give 0 or more"),
    case("odd resolution", lambda w: w.distill("--resolution", 33), "resolution is 33; give a multiple of 8"),
    case("odd height", lambda w: w.generate("--height", 33), "height is 33; give a multiple of 8"),
    case("no width", lambda w: w.generate("--width", 0), "width is 0; give a multiple of 8"),
    case("strength 0", lambda w: w.generate("--strength", 0), "strength is 0.0; give"),
    case("strength 1.5", lambda w: w.generate("--strength", 1.5), "strength is 1.5; give"),
    case(
        "strength too small for the steps",
        lambda w: w.generate("--strength", 0.3, "--image", w.pictures / "0.png"),
        "strength 0.3 of 2 steps leaves no step to do",
    ),
    case("unknown scheduler", lambda w: w.generate("--scheduler", "Euler"), "scheduler 'Euler'", "DDIMScheduler"),
    case("abstract scheduler", lambda w: w.generate("--scheduler", "SchedulerMixin"), "scheduler 'SchedulerMixin'"),
    case(
        "scheduler of other models",
        lambda w: w.generate("--scheduler", "FlowMatchEulerDiscreteScheduler"),
        "'FlowMatchEulerDiscreteScheduler'",
        "DDIMScheduler",
    ),
    case("unknown device", lambda w: w.generate("--device", "gpu"), "device 'gpu' is not available here", "cpu"),
    case("unknown device, distill", lambda w: w.distill("--device", "tpu"), "device 'tpu' is not available here"),
    case("unknown device, evaluate", lambda w: w.evaluate("--device", "tpu"), "device 'tpu' is not available here"),
    case("a device with a wrong number", lambda w: w.generate("--device", "cpu:x"), "device 'cpu:x' is not available"),
]

PROMPTS = [
    case("both kinds of prompts", lambda w: w.generate("--prompts", w.file("red")), "either --prompt or --prompts"),
    case("no prompts", lambda w: w.generate(prompt=False), "either --prompt or --prompts"),
    case(
        "an option without its prompts", lambda w: w.generate("--prompt", prompt=False), "either --prompt or --prompts"
    ),
    case("missing prompts", lambda w: w.generate("--prompts", "no.txt", prompt=False), "prompts no.txt does not exist"),
    case(
        "empty prompts",
        lambda w: w.generate("--prompts", w.file(" \n\n"), prompt=False),
        "prompts {tmp}/file.txt is empty; write one prompt a line",
    ),
    case(
        "prompts that are not UTF-8",
        lambda w: w.generate("--prompts", w.file(b"caf\xe9"), prompt=False),
        "{tmp}/file.txt is not UTF-8 text (byte 3)",
    ),
    case(
        "prompts without the column text",
        lambda w: w.generate("--prompts", w.file("alt\nred\n", "p.csv"), prompt=False),
        "{tmp}/p.csv has no column text or caption or prompt, only alt; rename one",
    ),
    case(
        "prompts of a table without a first line",
        lambda w: w.generate("--prompts", w.file("a cat\tred\na dog\tblue\n", "p.tsv"), prompt=False),
        "{tmp}/p.tsv has no column text or caption or prompt, only a cat, red; rename one",
    ),
    case(
        "prompts with a broken line",
        lambda w: w.generate("--prompts", w.file('{"text": "red"}\n{"text', "p.jsonl"), prompt=False),
        "{tmp}/p.jsonl line 2 is not JSON",
    ),
    case("missing prompts, evaluate", lambda w: w.evaluate("--prompts", "no.txt"), "prompts no.txt does not exist"),
    case(
        "one prompt, evaluate",
        lambda w: w.evaluate("--prompts", w.file("red")),
        "has 1 picture; scores of a set need two or more",
    ),
    case(
        "missing prompts, distill",
        lambda w: w.distill("--sample_prompts", "no.txt"),
        "bksdm: sample_prompts no.txt does not exist",
    ),
]

DATA = [
    case("missing data", lambda w: w.distill(data=w.tmp / "no"), "{tmp}/no is not a folder; give a folder of pictures"),
    case("missing reference", lambda w: w.evaluate(reference=w.tmp / "no"), "{tmp}/no is not a folder"),
    case("no metadata", lambda w: w.distill(data=w.data(None)), "{tmp}/copy has no metadata.csv or metadata.jsonl"),
    case(
        "no captions, evaluate",
        lambda w: w.evaluate(reference=w.data(None)),
        "reference {tmp}/copy has no captions to draw; give --prompts",
    ),
    case("empty metadata", lambda w: w.distill(data=w.data("")), "{tmp}/copy/metadata.jsonl lists no pictures"),
    case(
        "missing pictures",
        lambda w: w.distill(data=w.data(lines(*({"file_name": f"{n}.png", "text": "red"} for n in range(10))))),
        "{tmp}/copy/metadata.jsonl lists 2 of 10 pictures that are not there, first 8.png",
    ),
    case(
        "no column text",
        lambda w: w.distill(data=w.data("file_name,alt\n0.png,red\n", "metadata.csv")),
        "{tmp}/copy/metadata.csv has no column text or caption or prompt, only file_name, alt; rename one, or give "
        "--text_column to bksdm prepare",
    ),
    case(
        "no column file_name",
        lambda w: w.evaluate(reference=w.data(lines({"file": "0.png", "text": "red"}))),
        "{tmp}/copy/metadata.jsonl has no column file_name, only file, text; rename one",
    ),
    case(
        "broken JSON lines",
        lambda w: w.distill(data=w.data(lines({"file_name": "0.png", "text": "red"}) + '{"file_name": "1.p')),
        "{tmp}/copy/metadata.jsonl line 2 is not JSON",
    ),
    case("missing picture", lambda w: w.generate("--image", w.tmp / "no.png"), "{tmp}/no.png does not exist"),
    case(
        "corrupt picture, generate",
        lambda w: w.generate("--image", w.file("x", "a.png")),
        "{tmp}/a.png is not a",
    ),
    case(
        "truncated picture, generate",
        lambda w: w.generate("--image", w.file(cut_picture(w), "a.png")),
        "{tmp}/a.png is not a",
    ),
    case("a folder as picture", lambda w: w.generate("--image", w.pictures), "pictures is not a readable picture"),
    case(
        "some pictures without captions",
        lambda w: w.distill(data=w.beside("0.txt", "1.txt")),
        "6 of 8 pictures in {tmp}/copy have no caption beside them, first 2.png; write a .txt of the same name",
    ),
    case(
        "a picture of a kind that is not read",
        lambda w: w.evaluate(reference=w.beside("8.jxl")),
        "1 of 9 pictures in {tmp}/copy are of kinds that cannot be read here, first 8.jxl; convert it to PNG or JPEG",
    ),
    case(
        "a column that is not there, prepare",
        lambda w: w.prepare("--text_column", "alt"),
        "pictures/metadata.jsonl has no column 'alt'; give --text_column, one of file_name, text",
    ),
    case(
        "pictures of a column that is not there, prepare",
        lambda w: w.prepare("--image_column", "jpg"),
        "pictures/metadata.jsonl has no column 'jpg'; give --image_column, one of file_name, text",
    ),
    case(
        "a column where there are none, prepare",
        lambda w: w.prepare("--image_column", "jpg", data=w.beside(*(f"{number}.txt" for number in range(8)))),
        "{tmp}/copy is a folder of pictures with captions beside them, where --image_column jpg means nothing",
    ),
    case(
        "a part where there are none, prepare",
        lambda w: w.prepare("--split", "test"),
        "pictures is a folder of pictures, where --split test means nothing; leave it out",
    ),
    case(
        "a packed tar",
        lambda w: w.prepare(data=w.file("x", "a.tar.gz")),
        "{tmp}/a.tar.gz is packed; unpack it",
    ),
    case(
        "reference with one picture",
        lambda w: w.evaluate(reference=captioned(w.tmp / "one", [Image.new("RGB", (32, 32))])),
        "the reference has 1 picture; scores of a set need two or more",
    ),
]

# What is seen only when a picture's turn comes. The same command goes on once the picture is mended.
LATE = [
    case("corrupt picture", lambda w: w.distill(data=w.data_with(b"GIF89a?")), "{tmp}/copy/3.png is not a"),
    case("truncated picture", lambda w: w.distill(data=w.data_with(cut_picture(w))), "{tmp}/copy/3.png is not a"),
    case(
        "corrupt picture that is not cached",
        lambda w: w.distill("--cache_gb", 0, "--steps", 8, data=w.data_with(b"GIF89a?")),
        "{tmp}/copy/3.png is not a",
    ),
    case(
        "corrupt picture that another process reads",
        lambda w: w.distill("--cache_gb", 0, "--steps", 8, "--workers", 1, data=w.data_with(b"GIF89a?")),
        "{tmp}/copy/3.png is not a",
    ),
    case(
        "corrupt picture, evaluate",
        lambda w: w.evaluate("--resamples", 10, reference=w.data_with(b"GIF89a?")),
        "{tmp}/copy/3.png is not a",
    ),
]

STUDENTS = [
    case(
        "a student that was not pruned",
        lambda w: w.distill(student=w.teacher),
        "names no recipe and has as many blocks as its teacher; run bksdm prune first",
    ),
    case(
        "a student with another recipe",
        lambda w: w.distill(student=other_recipe(w)),
        "{tmp}/copy was not made from teacher",
    ),
    case(
        "a student of another teacher",
        lambda w: w.distill(student=w.other_student),
        "v2 was not made from teacher",
        "attention_head_dim is",
    ),
    case("a missing student", lambda w: w.distill(student=w.tmp / "no"), "{tmp}/no does not exist"),
]


def other_recipe(world: World) -> Path:
    folder = world.copy(world.student)
    shutil.copy(asset("recipes", "base.yaml"), folder / "recipe.yaml")
    return folder


ENCODERS = [
    case(
        "missing encoder",
        lambda w: w.evaluate("--encoder", w.tmp / "no"),
        "encoder {tmp}/no does not exist; give the folder",
    ),
    case("empty encoder", lambda w: w.evaluate("--encoder", w.empty()), "encoder {tmp}/empty is not a CLIP"),
    case("a pipeline as encoder", lambda w: w.evaluate("--encoder", w.teacher), "teacher is not a CLIP folder"),
    case("a VAE as encoder", lambda w: w.evaluate("--encoder", w.teacher / "vae"), "vae is not a CLIP folder"),
    case(
        "a text encoder as encoder",
        lambda w: w.evaluate("--encoder", w.teacher / "text_encoder"),
        "text_encoder is not a CLIP folder",
    ),
    case(
        "encoder that is cut short",
        lambda w: w.evaluate("--encoder", damaged(w, "model.safetensors", "encoder")),
        "encoder {tmp}/copy",
    ),
    case(
        "encoder without its colours",
        lambda w: w.evaluate("--encoder", without(w.encoder(), "preprocessor_config.json")),
        "encoder {tmp}/copy is not a CLIP folder or hub id: it has neither preprocessor_config.json nor processor_con",
    ),
    case(
        "encoder that cannot be had",
        lambda w: w.evaluate("--encoder", "nowhere/at-all"),
        "encoder nowhere/at-all is not in the hub's cache here, and the hub does not have it or cannot be reached",
    ),
    case("missing teacher, evaluate", lambda w: w.evaluate("--teacher", w.tmp / "no"), "{tmp}/no does not exist"),
]


def statistics(world: World, size: int) -> Path:
    path = world.tmp / "statistics.npz"
    np.savez(path, mu=np.zeros(size), sigma=np.eye(size))
    return path


def mixed(world: World) -> Path:
    return captioned(world.tmp / "mixed", [Image.new("RGB", (32, 32)), Image.new("RGB", (48, 32))])


EVALUATIONS = [
    case(
        "unknown score", lambda w: w.evaluate("--scores", "fid"), "unknown score 'fid'", "give one of frechet_distance"
    ),
    case(
        "Inception Score of another network",
        lambda w: w.evaluate("--scores", "inception_score"),
        "scores has inception_score, which needs --features inception",
    ),
    case(
        "output error without a teacher",
        lambda w: w.evaluate("--scores", "output_error"),
        "scores has output_error, which needs a --teacher",
    ),
    case(
        "error left without a teacher",
        lambda w: w.evaluate("--scores", "error_left"),
        "scores has error_left, which needs a --teacher",
    ),
    case(
        "error left of no captions",
        lambda w: w.evaluate("--scores", "error_left_unseen", "--teacher", w.teacher),
        "scores has error_left_unseen, which needs captions as --unseen",
    ),
    case(
        "captions without a teacher that draws them",
        lambda w: w.evaluate("--unseen", "emoji/unseen"),
        "unseen is emoji/unseen, which is for the score error_left_unseen; give the --teacher too",
    ),
    case(
        "captions that no score is for",
        lambda w: w.evaluate("--unseen", "emoji/unseen", "--teacher", w.teacher),
        "unseen is emoji/unseen, which is for the score error_left_unseen; add it to --scores",
    ),
    case(
        "missing captions",
        lambda w: w.evaluate("--unseen", "no.txt", "--teacher", w.teacher, "--scores", "error_left_unseen"),
        "unseen no.txt does not exist; give a text file with one prompt a line",
    ),
    case(
        "no captions",
        lambda w: w.evaluate("--unseen", w.file("\n"), "--teacher", w.teacher, "--scores", "error_left_unseen"),
        "unseen {tmp}/file.txt is empty; write one prompt a line",
    ),
    case(
        "missing distractors",
        lambda w: w.evaluate("--distractors", "no.txt"),
        "distractors no.txt does not exist; give a text file with one prompt a line",
    ),
    case(
        "unknown features",
        lambda w: w.evaluate("--features", "vgg"),
        "features is 'vgg'; give inception, or the encoder (emoji)",
    ),
    case(
        "statistics of another network",
        lambda w: w.evaluate("--prompts", w.pictures, reference=statistics(w, 2048)),
        "{tmp}/statistics.npz has statistics of 2048 features, and the pictures get 64",
    ),
    case(
        "statistics where pictures are needed",
        lambda w: w.evaluate("--prompts", w.pictures, "--scores", "recall", reference=statistics(w, 64)),
        "scores has recall, which needs the pictures of the reference",
    ),
    case(
        "a text as statistics",
        lambda w: w.evaluate("--prompts", w.pictures, reference=w.file("x", "a.npz")),
        "{tmp}/a.npz",
    ),
    case(
        "finished pictures of mixed sizes",
        lambda w: w.evaluate(model=mixed(w)),
        "{tmp}/mixed has pictures of mixed sizes (0.png 32x32, 1.png 48x32)",
    ),
    case(
        "real pictures of mixed sizes",
        lambda w: [
            *("evaluate", w.teacher, "--reference", mixed(w), "--out", w.out, "--steps", 1, "--preparation", "none"),
            *("--inception_weights", w.inception(), "--scores", "frechet_distance"),
        ],
        "{tmp}/mixed has pictures of mixed sizes (0.png 32x32, 1.png 48x32)",
    ),
    case(
        "fewer pictures than features",
        lambda w: ["evaluate", w.teacher, "--reference", w.pictures, "--encoder", "emoji", "--out", w.out],
        "the reference has 8 pictures, and the Fréchet distance compares 64 features",
        "name the --scores that you want",
    ),
    case(
        "weights of another network",
        lambda w: [
            *("evaluate", w.teacher, "--reference", w.pictures, "--out", w.out, "--scores", "frechet_distance"),
            *("--inception_weights", w.file("x", "weights.pth")),
        ],
        "{tmp}/weights.pth is not the published Inception",
    ),
    case(
        "prompts for some of the pictures",
        lambda w: w.evaluate("--prompts", w.file("red"), model=bare(w)),
        "{tmp}/bare has 2 pictures and no metadata.jsonl, and there are 1 prompts",
    ),
    case(
        "annotations of objects",
        lambda w: w.evaluate("--prompts", w.file('{"annotations": [{"image_id": 1, "bbox": []}]}', "instances.json")),
        "{tmp}/instances.json annotation 0 has no caption",
    ),
    case(
        "a JSON without annotations",
        lambda w: w.evaluate("--prompts", w.file("[1]", "a.json")),
        "{tmp}/a.json has no annotations",
    ),
    case("two of one name", lambda w: ["evaluate", w.teacher, w.teacher, "--out", w.out], "two models have the name"),
    case(
        "unknown scheduler, evaluate",
        lambda w: w.evaluate("--scheduler", "Euler"),
        "unknown scheduler 'Euler'; give one of",
    ),
    case("no prompts wanted", lambda w: w.evaluate("--limit", 0), "limit is 0; give at least 1"),
    case("negative resamples", lambda w: w.evaluate("--resamples", -1), "resamples is -1; give 0 or more"),
]


def bare(world: World) -> Path:
    folder = captioned(world.tmp / "bare", [Image.new("RGB", (32, 32))] * 2)
    (folder / "metadata.jsonl").unlink()
    return folder


FOLDERS = [
    case("a file as folder, prune", lambda w: w.prune("--out", taken(w)), "{tmp}/out is a file"),
    case("a file as folder, distill", lambda w: w.distill("--out", taken(w)), "{tmp}/out is a file"),
    case("a file as folder, generate", lambda w: w.generate("--out", taken(w)), "{tmp}/out is a file"),
    case("a file as folder, evaluate", lambda w: w.evaluate("--out", taken(w)), "{tmp}/out is a file"),
    case("a file as folder, quickstart", lambda w: w.quickstart("--out", taken(w)), "{tmp}/out is a file"),
    case("a folder below a file, prune", lambda w: w.prune(*below_a_file(w)), "cannot write", "{tmp}/file.txt/deeper"),
    case("a folder below a file, distill", lambda w: w.distill(*below_a_file(w)), "{tmp}/file.txt/deeper"),
    case("a folder below a file, generate", lambda w: w.generate(*below_a_file(w)), "{tmp}/file.txt/deeper"),
    case("a folder below a file, evaluate", lambda w: w.evaluate(*below_a_file(w)), "{tmp}/file.txt/deeper"),
    case("a folder below a file, quickstart", lambda w: w.quickstart(*below_a_file(w)), "{tmp}/file.txt/deeper"),
    case("other files, prune", lambda w: w.prune("--out", foreign(w)), "{tmp}/out is not empty and holds no run"),
    case("other files, distill", lambda w: w.distill("--out", foreign(w)), "{tmp}/out is not empty and holds no run"),
    case("other files, generate", lambda w: w.generate("--out", foreign(w)), "{tmp}/out is not empty and holds no run"),
    case("other files, evaluate", lambda w: w.evaluate("--out", foreign(w)), "{tmp}/out is not empty and holds no run"),
    case("other files, quickstart", lambda w: w.quickstart("--out", foreign(w)), "{tmp}/out is not empty and holds no"),
    case(
        "another run, prune",
        lambda w: w.prune("--out", other_run(w, PruneOptions(str(w.teacher), "base", str(w.out)), "prune")),
        "{tmp}/out holds another run (recipe: 'base' there, 'small' now)",
    ),
    case(
        "another run, distill",
        lambda w: w.distill(
            "--out", other_run(w, DistillOptions(str(w.teacher), "other", str(w.pictures), str(w.out)), "distill")
        ),
        "{tmp}/out holds another run (student: 'other' there",
    ),
    case(
        "another run, generate",
        lambda w: w.generate("--out", other_run(w, GenerateOptions(str(w.teacher), str(w.out), ["blue"]), "generate")),
        "{tmp}/out holds another run (prompt: ['blue'] there, ['red'] now)",
    ),
    case(
        "another run, evaluate",
        lambda w: w.evaluate("--out", other_run(w, EvaluateOptions([str(w.teacher)], str(w.out), "emoji"), "evaluate")),
        "{tmp}/out holds another run (reference: 'emoji' there",
    ),
    case(
        "another run, quickstart",
        lambda w: w.quickstart("--out", other_run(w, QuickstartOptions(str(w.out), "tiny"), "quickstart")),
        "{tmp}/out holds another run (recipe: 'tiny' there, 'small' now)",
    ),
    case(
        "a run of another verb",
        lambda w: w.generate("--out", other_run(w, PruneOptions(str(w.teacher), "base", str(w.out)), "prune")),
        "{tmp}/out holds another run (verb: 'prune' there, 'generate' now)",
    ),
    case("the student as folder of the run", lambda w: w.distill("--out", w.student), "is not empty and holds no run"),
]

EARLY = [*MODELS, *RECIPES, *OPTIONS, *PROMPTS, *DATA, *STUDENTS, *ENCODERS, *EVALUATIONS, *FOLDERS]


def refused(run: Run, world: World, words: list[object], fragments: tuple[str, ...]) -> None:
    outcome = run(*words)
    assert (outcome.code, outcome.out) == (2, ""), outcome.err
    assert len(outcome.said) == 1, outcome.err
    assert outcome.said[0].startswith("bksdm: ")
    assert "Traceback" not in outcome.err
    for fragment in fragments:
        assert fragment.replace("{tmp}", str(world.tmp)) in outcome.said[0]


def everything_in(path: Path) -> dict[Path, bytes]:
    """Files and their contents in a folder."""
    return {file: file.read_bytes() for file in [path, *path.rglob("*")] if file.is_file()}


@pytest.mark.parametrize(("build", "fragments"), EARLY)
def test_wrong_input_is_refused_in_one_line(run: Run, world: World, build: Build, fragments: tuple[str, ...]) -> None:
    words = build(world)
    before = everything_in(world.out)
    refused(run, world, words, fragments)
    assert everything_in(world.out) == before, "what was refused left something behind"


@pytest.mark.parametrize(("build", "fragments"), LATE)
def test_wrong_input_that_shows_late_is_refused_too(
    run: Run, world: World, build: Build, fragments: tuple[str, ...]
) -> None:
    refused(run, world, build(world), fragments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(run: Run, world: World) -> None:
    outcome = run(*world.generate("--device", "cuda"))
    assert (outcome.code, outcome.said) == (2, ["bksdm: device 'cuda' is not available here; there is cpu"])


@pytest.mark.parametrize(
    "verb", ["prune", *(pytest.param(verb, marks=pytest.mark.slow) for verb in ("distill", "generate", "evaluate"))]
)
def test_a_command_can_be_mended_in_the_same_folder(run: Run, done: Run, world: World, verb: str) -> None:
    command: Callable[..., list[object]] = getattr(world, verb)
    mistake = {"model" if verb in ("generate", "evaluate") else "teacher": world.tmp / "nowhere"}
    assert run(*command(**mistake)).code == 2
    done(*command())


# Checkpoints


@pytest.fixture
def stopped(done: Run, quick_world: World) -> Path:
    """The checkpoints of a run of two steps."""
    done(*quick_world.distill("--steps", 2, "--checkpoint_every", 1))
    return quick_world.out / "checkpoints"


@pytest.mark.parametrize("name", ["tensors.safetensors", pytest.param("state.json", marks=pytest.mark.slow)])
def test_a_checkpoint_that_is_cut_short_is_named(
    run: Run, done: Run, quick_world: World, stopped: Path, name: str
) -> None:
    newest = stopped / "step-00000002"
    cut(newest / name)
    outcome = run(*quick_world.distill("--steps", 3, "--checkpoint_every", 1))
    assert (outcome.code, outcome.out, len(outcome.said)) == (2, "", 1)
    assert f"checkpoint {newest} cannot be read" in outcome.said[0]
    assert "remove it to go on from the one before" in outcome.said[0]
    shutil.rmtree(newest)
    done(*quick_world.distill("--steps", 3, "--checkpoint_every", 1))
    assert [path.name for path in sorted(stopped.iterdir())] == ["step-00000002", "step-00000003"]


# Pictures of every kind are no mistake


def kinds(folder: Path) -> list[Path]:
    """Greyscale, palette, CMYK, alpha and 16-bit pictures, of many shapes."""
    folder.mkdir(exist_ok=True)
    colour = Image.linear_gradient("L").resize((48, 40)).convert("RGB")
    grey16 = Image.new("I;16", (40, 30), 0x8000)
    wanted = {
        "grey.png": colour.convert("L"),
        "grey.jpg": colour.convert("L"),
        "bits.png": colour.convert("1"),
        "palette.png": colour.quantize(8),
        "palette.gif": colour.quantize(8),
        "cmyk.jpg": colour.convert("CMYK"),
        "cmyk.tiff": colour.convert("CMYK"),
        "alpha.png": colour.convert("RGBA"),
        "alpha.webp": colour.convert("RGBA"),
        "greyalpha.png": colour.convert("LA"),
        "sixteen.png": grey16,
        "sixteen.tiff": grey16,
        "tall.png": colour.resize((8, 100)),
        "point.png": colour.resize((1, 1)),
    }
    for name, picture in wanted.items():
        picture.save(folder / name)
    quantized = colour.quantize(8)
    quantized.save(folder / "see-through.gif", transparency=0)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("cache_gb", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_distill_takes_pictures_of_every_kind(done: Run, quick_world: World, cache_gb: int) -> None:
    paths = kinds(quick_world.tmp / "kinds")
    metadata = lines(*({"file_name": path.name, "text": path.stem} for path in paths))
    (quick_world.tmp / "kinds" / "metadata.jsonl").write_text(metadata)
    done(*quick_world.distill("--cache_gb", cache_gb, "--batch_size", len(paths), data=quick_world.tmp / "kinds"))


def test_generate_starts_from_pictures_of_many_kinds(done: Run, quick_world: World) -> None:
    """They are opened as those are that are learnt from."""
    for path in kinds(quick_world.tmp / "kinds")[::4]:
        out = quick_world.tmp / path.name
        done(*quick_world.generate("--image", path, "--out", out))
        with Image.open(out / "00000.png") as picture:
            assert (picture.mode, picture.size) == ("RGB", (32, 32))
