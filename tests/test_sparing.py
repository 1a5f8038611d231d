"""Drawing with less work: guidance at some noise levels, the U-Net's inside in some steps, keys of fewer tokens."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from bksdm.common.errors import InputError
from bksdm.export import to_openvino
from bksdm.export.components import components
from bksdm.export.formats import Source
from bksdm.export.run import export
from bksdm.families import family_of_pipeline
from bksdm.families.recipe import Recipe
from bksdm.generate import runtimes
from bksdm.generate.exported import export_facts, open_exported, sample_exported
from bksdm.generate.requests import Request
from bksdm.generate.runtimes import Choice, choose, converted
from bksdm.generate.sampling import sample, scheduler_named
from bksdm.models.drawing import drawing
from bksdm.models.pipelines import denoiser, save_pipeline
from bksdm.options.export import ExportFormat, ExportOptions
from bksdm.pruning.inherit import prune_unet, with_denoiser
from bksdm.runtime.pipeline import Pipeline
from bksdm.runtime.spared import NOTHING, Spared
from fast import slow
from tiny_models import CONTEXT, MAX_TOKENS, TWO_STAGES, build_pipeline
from verbs import Run

pytest_plugins = ["verbs_fixtures", "flow_fixtures"]

ASKED = [Request("red apple", 3), Request("green car", 4)]
STEPS, GUIDANCE = 6, 5.0


def drawn(
    pipeline: DiffusionPipeline, *, steps: int = STEPS, guidance: float = GUIDANCE, **spared: Any
) -> list[Image.Image]:
    (found,) = sample(pipeline, ASKED, steps=steps, guidance=guidance, spared=Spared(**spared))
    return found


def drawn_by_export(pipeline: Pipeline, *, guidance: float = GUIDANCE, **spared: Any) -> list[Image.Image]:
    (found,) = sample_exported(pipeline, ASKED, steps=STEPS, guidance=guidance, spared=Spared(**spared))
    return found


def same(one: list[Image.Image], other: list[Image.Image]) -> bool:
    return all(np.array_equal(np.array(a), np.array(b)) for a, b in zip(one, other, strict=True))


def level(pipeline: DiffusionPipeline, timestep: float) -> float:
    share = float(pipeline.scheduler.alphas_cumprod[int(timestep)])
    return float(np.sqrt(1 / share - 1))


# What looks at the loop around a U-Net: at the quickest, and at one that is told more in the long checks.
any_unet = pytest.mark.parametrize("kind", ["exported", slow("shallow_xl", id="xl")], indirect=True)


@pytest.fixture
def by_ddim(kind_teacher: DiffusionPipeline) -> DiffusionPipeline:
    """A teacher of every family, of which six timesteps are plain."""
    made = with_denoiser(kind_teacher, denoiser(kind_teacher))
    made.scheduler = DDIMScheduler.from_config(kind_teacher.scheduler.config)
    made.scheduler.set_timesteps(STEPS)
    return made


@pytest.fixture
def between(by_ddim: DiffusionPipeline) -> tuple[float, float]:
    """An interval with the third and the fourth of the six timesteps in it."""
    levels = [level(by_ddim, timestep) for timestep in by_ddim.scheduler.timesteps]
    return (levels[3] + levels[4]) / 2, (levels[1] + levels[2]) / 2


@any_unet
def test_guidance_at_all_levels_and_at_none_are_guidance_and_none(by_ddim: DiffusionPipeline) -> None:
    assert same(drawn(by_ddim, interval=(0.0, 1e9)), drawn(by_ddim))
    assert same(drawn(by_ddim, interval=(1e8, 1e9)), drawn(by_ddim, guidance=1.0))
    assert not same(drawn(by_ddim), drawn(by_ddim, guidance=1.0))


@any_unet
def test_outside_the_interval_the_u_net_is_asked_for_captions_alone(
    by_ddim: DiffusionPipeline, between: tuple[float, float]
) -> None:
    """As by hand: where a step is outside, what the caption gives is taken as it is."""
    sizes: list[int] = []
    network = denoiser(by_ddim)
    whole = drawn(by_ddim, interval=between)
    seen = network.conv_in.register_forward_hook(lambda module, given, output: sizes.append(len(output)))
    assert same(drawn(by_ddim, interval=between), whole)
    seen.remove()
    assert sizes == [2, 2, 4, 4, 2, 2]

    def by_hand(module: Any, given: Any, output: Any) -> Any:
        if between[0] <= level(by_ddim, given[1]) <= between[1]:
            return None
        towards = output[0].chunk(2)[1]
        return (torch.cat([towards, towards]), *output[1:])

    replaced = network.register_forward_hook(by_hand)
    for one, other in zip(whole, drawn(by_ddim), strict=True):
        assert np.abs(np.array(one, int) - np.array(other, int)).max() <= 1
    replaced.remove()


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        pytest.param("exported", Recipe("without", mid=False), id="no middle"),
        pytest.param("shallow_xl", Recipe("whole"), id="xl-whole"),
        slow("v1", Recipe("whole"), id="v1-whole"),
        slow("v1", Recipe("without", mid=False), id="v1-no middle"),
        slow("shallow_xl", Recipe("without", mid=False), id="xl-no middle"),
    ],
    indirect=["kind"],
)
def test_kept_insides_are_those_of_the_step_that_computed_them(by_ddim: DiffusionPipeline, recipe: Recipe) -> None:
    """Of students too, with a middle block or without: as if the second last up stage gave what it gave before."""
    student, _ = prune_unet(denoiser(by_ddim), recipe)
    pipeline = with_denoiser(by_ddim, student.eval())
    calls: list[int] = []
    counted = student.down_blocks[1].resnets[0].register_forward_hook(lambda *given: calls.append(len(given[2])))
    found = drawn(pipeline, reuse=3)
    counted.remove()
    assert calls == [4, 4]  # the first and the fourth of six steps
    assert same(drawn(pipeline, reuse=1), drawn(pipeline))
    assert not same(found, drawn(pipeline))

    kept: list[torch.Tensor] = []

    def third(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        kept.append(output if len(kept) % 3 == 0 else kept[-1])
        return kept[-1]

    replaced = student.up_blocks[-2].register_forward_hook(third)
    assert same(found, drawn(pipeline))
    replaced.remove()


@any_unet
def test_both_go_together(by_ddim: DiffusionPipeline, between: tuple[float, float]) -> None:
    """Where guidance begins there are more samples than were kept, so that the inside is computed anew."""
    network = denoiser(by_ddim)
    calls: list[int] = []
    counted = network.down_blocks[1].resnets[0].register_forward_hook(lambda *given: calls.append(len(given[2])))
    both = drawn(by_ddim, interval=between, reuse=2)
    counted.remove()
    assert calls == [2, 4, 2]  # the first, the third and the fifth
    assert not same(both, drawn(by_ddim, interval=between))
    assert same(drawn(by_ddim), drawn(by_ddim))  # nothing stays behind


@pytest.mark.parametrize("side", [2, 3])
def test_outermost_self_attentions_have_keys_and_values_of_squares(
    v1_teacher: StableDiffusionPipeline, side: int
) -> None:
    """Written out; three divides neither side, so that squares at two edges hold fewer tokens."""
    network = v1_teacher.unet
    attention = network.up_blocks[-1].attentions[-1].transformer_blocks[0].attn1
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    counts: dict[str, int] = {}
    hooks = [attention.register_forward_hook(lambda module, given, output: seen.append((given[0], output)))]
    for name, module in network.named_modules():
        if name.endswith("attn1.to_k"):
            hooks.append(
                module.register_forward_hook(lambda *given, name=name: counts.update({name: given[2].shape[1]}))
            )
    asked = torch.randn(2, 4, 8, 16), 500, torch.randn(2, MAX_TOKENS, CONTEXT)
    family, scheduler = family_of_pipeline(v1_teacher), v1_teacher.scheduler
    with torch.no_grad(), family.sparing(network, scheduler, Spared(pool_keys=side)):
        network(*asked)
    for hook in hooks:
        hook.remove()

    ((tokens, found),) = seen
    grid = tokens.unflatten(1, (8, 16))
    corners = [(y, x) for y in range(0, 8, side) for x in range(0, 16, side)]
    pooled = torch.stack([grid[:, y : y + side, x : x + side].mean((1, 2)) for y, x in corners], dim=1)

    def heads(layer: torch.nn.Module, given: torch.Tensor) -> torch.Tensor:
        return layer(given).unflatten(2, (attention.heads, -1)).transpose(1, 2)

    query, key, value = heads(attention.to_q, tokens), heads(attention.to_k, pooled), heads(attention.to_v, pooled)
    weights = (query @ key.mT * attention.scale).softmax(dim=-1)
    expected = attention.to_out[0]((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    outermost = {name for name in counts if name.startswith(("down_blocks.0.", "up_blocks.3."))}
    assert len(outermost) == 5
    assert {counts[name] for name in outermost} == {len(corners)}
    assert {count for name, count in counts.items() if name not in outermost} == {4 * 8, 2 * 4, 1 * 2}


def test_pooled_keys_go_with_the_others(exported: StableDiffusionPipeline) -> None:
    """Each changes the picture; squares of one token are tokens, and nothing stays behind."""
    few = partial(drawn, exported, steps=3)
    ways = [{"interval": (0.5, 5.0)}, {"reuse": 3}, {"pool_keys": 2}, {"pool_keys": 1}]
    plain = few()
    assert [same(few(**way), plain) for way in ways] == [False, False, False, True]
    together = {name: value for way in ways[:3] for name, value in way.items()}
    assert not same(few(**together), few(**together | {"pool_keys": None}))
    assert same(few(), plain)


def test_what_is_spared_leaves_no_trace_after_an_error(v1_teacher: DiffusionPipeline) -> None:
    network: UNet2DConditionModel = denoiser(v1_teacher)
    hooks = [(dict(module._forward_hooks), dict(module._forward_pre_hooks)) for module in network.modules()]
    family, scheduler = family_of_pipeline(v1_teacher), v1_teacher.scheduler
    with pytest.raises(RuntimeError, match="stop"), family.sparing(network, scheduler, Spared((1.0, 2.0), 2, 2)):
        raise RuntimeError("stop")
    assert [(dict(module._forward_hooks), dict(module._forward_pre_hooks)) for module in network.modules()] == hooks
    assert not any("forward" in vars(module) for module in network.modules())


@pytest.mark.parametrize("folder", ["onnx_folder", slow("xl_openvino_folder")])
def test_the_runtime_without_torch_guides_within_the_same_interval(folder: str, request: pytest.FixtureRequest) -> None:
    pipeline = open_exported(request.getfixturevalue(folder), scheduler="DDIMScheduler")
    sizes: list[int] = []
    predict = pipeline.networks.predict

    def seen(latents: Any, timestep: float, told: Any) -> Any:
        sizes.append(len(latents))
        return predict(latents, timestep, told)

    pipeline.networks.predict = seen  # type: ignore[method-assign]
    drawn_by = {
        name: drawn_by_export(pipeline, guidance=guidance, interval=interval)
        for name, guidance, interval in (
            ("all", GUIDANCE, (0.0, 1e9)),
            ("plain", GUIDANCE, None),
            ("none", GUIDANCE, (1e8, 1e9)),
            ("unguided", 1.0, None),
            ("between", GUIDANCE, (0.5, 5.0)),
        )
    }
    assert sizes[-STEPS:].count(4) in range(1, STEPS)
    assert same(drawn_by["all"], drawn_by["plain"])
    assert same(drawn_by["none"], drawn_by["unguided"])
    assert not same(drawn_by["between"], drawn_by["plain"])


def largest(one: list[Image.Image], other: list[Image.Image]) -> int:
    return max(int(np.abs(np.array(a, int) - np.array(b, int)).max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("folder", ["onnx_folder", "openvino_folder", "xl_openvino_folder", slow("xl_onnx_folder")])
def test_the_runtime_without_torch_keeps_the_same_insides(folder: str, request: pytest.FixtureRequest) -> None:
    exported: DiffusionPipeline = request.getfixturevalue("xl_exported" if "xl" in folder else "exported")
    by_torch = with_denoiser(exported, denoiser(exported))
    by_torch.scheduler = scheduler_named("DDIMScheduler", exported.scheduler)
    pipeline = open_exported(request.getfixturevalue(folder), scheduler="DDIMScheduler", spared=Spared(reuse=3))
    for interval in (None, (0.5, 5.0)):
        ways = {reuse: {"reuse": reuse, "interval": interval} for reuse in (3, 1, None)}
        ours = {reuse: drawn_by_export(pipeline, **way) for reuse, way in ways.items()}
        assert largest(ours[3], drawn(by_torch, **ways[3])) <= 1
        assert same(ours[1], ours[None])
        assert not same(ours[3], ours[None])


@pytest.mark.slow
@pytest.mark.parametrize("to", ["openvino", "onnx"])
def test_a_student_without_a_middle_block_keeps_what_it_has(
    to: ExportFormat, exported: StableDiffusionPipeline, tmp_path: Path
) -> None:
    student, _ = prune_unet(exported.unet, Recipe("without", mid=False))
    pipeline = with_denoiser(exported, student.eval())
    save_pipeline(pipeline, tmp_path / "student")
    export(ExportOptions(str(tmp_path / "student"), to, str(tmp_path / "export")))
    ours = drawn_by_export(open_exported(tmp_path / "export", spared=Spared(reuse=3)), reuse=3)
    assert largest(ours, drawn(pipeline, reuse=3)) <= 1
    assert not same(ours, drawn(pipeline))


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_folders_of_before_say_what_mends_them(
    to: str, run: Run, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    old = shutil.copytree(request.getfixturevalue(f"{to}_folder"), tmp_path / "old")
    for part in (old / "unet").glob("model.onnx.[ko]*"):
        part.unlink()
    for graph in (old / "unet").glob("*.xml"):
        graph.write_text(graph.read_text().replace('names="deep"', 'names="7"'))
    outcome = run("generate", old, "--prompt", "red", "--reuse", 2, "--out", tmp_path / "out")
    assert outcome.code == 2
    mend = f"{old / 'unet'} was exported without what reuse needs; export the model again, or leave it out"
    assert mend in outcome.said[0]
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="export the model again"):
        open_exported(old).sample(["red"], reuse=2)


def test_a_conversion_with_pooled_keys_draws_so_without_being_told(
    exported: StableDiffusionPipeline,
    exported_model: Path,
    openvino_folder: Path,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def u_net_alone(source: Source, folder: Path) -> None:
        """The other networks are those of the folder that is there, which are the same."""
        shutil.copytree(openvino_folder, folder, ignore=shutil.ignore_patterns("export.json"), dirs_exist_ok=True)
        network = components(source.pipeline, source.height, source.width)["unet"]
        to_openvino.write_graph(network, folder / "unet" / to_openvino.MODEL_FILE, "fp32", [])

    quick = dataclasses.replace(to_openvino.FORMAT, write=u_net_alone, networks=None)
    monkeypatch.setattr(to_openvino, "FORMAT", quick)
    monkeypatch.setenv("BKSDM_CACHE", str(tmp_path / "cache"))
    folder = converted(str(exported_model), "openvino", pool_keys=2)
    monkeypatch.setattr(runtimes, "_worth_it", lambda *given: Choice("torch", "it is not converted"))
    chosen = [
        choose(str(exported_model), torch.device("cpu"), "auto", None, None, 1, spared).runtime
        for spared in (Spared(pool_keys=2), NOTHING)
    ]
    assert chosen == ["openvino", "torch"]
    assert (export_facts(folder)["pool_keys"], export_facts(openvino_folder)["pool_keys"]) == (2, None)
    opened = open_exported(folder, spared=Spared(reuse=3, pool_keys=2))
    for reuse in (None, 3):
        ours = drawn_by_export(opened, reuse=reuse)
        assert largest(ours, drawn(exported, reuse=reuse, pool_keys=2)) <= 1
        assert not same(ours, drawn(exported, reuse=reuse))
    for other in (folder, openvino_folder):
        outcome = run("generate", other, "--prompt", "red", "--pool_keys", 3, "--out", tmp_path / "out")
        mend = "was exported without pool_keys 3; export it with --pool_keys 3, or leave it out"
        assert (outcome.code, outcome.said) == (2, [f"bksdm: {other} {mend}"])
    assert not (tmp_path / "out").exists()


def test_exports_and_models_draw_alike(exported_model: Path, onnx_folder: Path, done: Run, tmp_path: Path) -> None:
    words = ["--prompt", "red", "--steps", STEPS, "--guidance_interval", 0.5, 5, "--scheduler", "DDIMScheduler"]
    words += ["--reuse", 2]
    done("generate", exported_model, *words, "--runtime", "torch", "--out", tmp_path / "torch")
    done("generate", onnx_folder, *words, "--out", tmp_path / "onnx")
    pictures = [np.array(Image.open(tmp_path / name / "00000.png"), int) for name in ("torch", "onnx")]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2
    for name in ("torch", "onnx"):
        with Image.open(tmp_path / name / "00000.png") as picture:
            told = json.loads(picture.text["bksdm"])
        assert (told["guidance_interval"], told["reuse"]) == ([0.5, 5.0], 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--guidance_interval", 5, 0.3], "guidance_interval is 5 0.3; give two noise levels, the lower first"),
        (["--guidance_interval", 5], "guidance_interval is 5; give two noise levels"),
        (["--reuse", 0], "reuse is 0; give at least 1"),
        (["--fast", "--reuse", 0], "reuse is 0; give at least 1"),
        (["--pool_keys", 0], "pool_keys is 0; give at least 1"),
    ],
)
def test_what_cannot_be_is_refused(
    run: Run, v1_folder: Path, tmp_path: Path, words: list[object], message: str
) -> None:
    outcome = run("generate", v1_folder, "--prompt", "red", "--out", tmp_path / "out", *words)
    assert outcome.code == 2
    assert message in outcome.said[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["generate", "export"])
def test_a_u_net_without_outermost_attentions_has_no_keys_to_pool(
    run: Run, xl_folder: Path, tmp_path: Path, verb: str
) -> None:
    words = ["--prompt", "red"] if verb == "generate" else ["--to", "onnx"]
    outcome = run(verb, xl_folder, *words, "--pool_keys", 2, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "has no self-attention in the outermost stage of its U-Net, and pool_keys pools" in outcome.said[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--guidance_interval", 0.3, 5], ["--reuse", 2], ["--pool_keys", 2], ["--fast"]])
def test_transformers_are_refused(run: Run, z_folder: Path, tmp_path: Path, words: list[object]) -> None:
    outcome = run("generate", z_folder, "--prompt", "red", "--out", tmp_path / "out", *words)
    assert outcome.code == 2
    assert f"for which there is no generate {words[0]} yet" in outcome.said[0]


def test_fast_is_what_the_table_recommends(
    done: Run, run: Run, v1_folder: Path, onnx_folder: Path, tmp_path: Path
) -> None:
    """Where nothing else is asked for; what draws in few steps already refuses."""
    for folder, model, words in (
        ("fast", v1_folder, ["--fast"]),
        ("said", v1_folder, ["--steps", 10, "--scheduler", "DPMSolverMultistepScheduler", "--reuse", 3]),
        ("other", v1_folder, ["--fast", "--steps", 3, "--reuse", 1, "--scheduler", "DDIMScheduler"]),
        ("export", onnx_folder, ["--fast", "--steps", 2]),
    ):
        done("generate", model, "--prompt", "red", "--out", tmp_path / folder, *words)
    pictures = {path.parent.name: Image.open(path) for path in tmp_path.glob("*/00000.png")}
    assert np.array_equal(np.array(pictures["fast"]), np.array(pictures["said"]))
    told = {name: json.loads(picture.text["bksdm"]) for name, picture in pictures.items()}
    assert [told["fast"][name] for name in ("steps", "reuse")] == [10, 3]
    assert [told["other"].get(name) for name in ("steps", "reuse", "scheduler")] == [3, None, "DDIMScheduler"]
    done(
        "generate", v1_folder, "--prompt", "red", "--out", tmp_path / "said", "--fast"
    )  # the same run, by its short name
    assert told["export"]["reuse"] == 3
    few = shutil.copytree(v1_folder, tmp_path / "few")
    (few / "sampling.json").write_text('{"num_inference_steps": 4, "guidance_scale": 1.0}')
    outcome = run("generate", few, "--prompt", "red", "--fast", "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "fast is for models of many steps, and" in outcome.said[0]


def test_a_way_of_drawing_has_them(v1_folder: Path) -> None:
    assert drawing(v1_folder, 4, 2.0, Spared.asked([0.3, 5], 3, 2)).to_dict() == {
        "steps": 4,
        "guidance": 2.0,
        "interval": (0.3, 5),
        "reuse": 3,
        "pool_keys": 2,
    }
    assert Spared.asked(pool_keys=1) == NOTHING
    with pytest.raises(InputError, match="reuse is -1"):
        Spared.asked(reuse=-1)


def test_a_u_net_that_is_told_of_guidance_is_left_alone(done: Run, tmp_path: Path) -> None:
    """It is called once a step, so that a batch of two is two pictures and no halves."""
    pipeline = build_pipeline(TWO_STAGES | {"time_cond_proj_dim": 16})
    assert same(drawn(pipeline, interval=(1e8, 1e9)), drawn(pipeline))
    pipeline.save_pretrained(tmp_path / "m")
    asked = ("--prompt", "red apple", "--steps", 1, "--guidance_interval", 0.3, 5)
    assert (
        "the model is told of guidance, in one call"
        in done("generate", tmp_path / "m", *asked, "--out", tmp_path / "o").err
    )
