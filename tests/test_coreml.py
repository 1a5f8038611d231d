"""`bksdm export --to coreml`: packages that Apple's Swift runtime takes, compared with torch without Core ML."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel

from bksdm.common.errors import InputError
from bksdm.export import parity, swift
from bksdm.export.formats import Source, format_named
from bksdm.export.mil import OPERATIONS, Program, quiet_coremltools
from bksdm.export.run import Exported, export
from bksdm.export.split_einsum import split_attention
from bksdm.export.to_coreml import CoreMLNetworks, Package, _TextEncoder, convert, palettize
from bksdm.families.graph import TextEncoder
from bksdm.families.sd import StableDiffusion
from bksdm.models.pipelines import save_pipeline
from bksdm.options.export import ExportOptions
from bksdm.options.pruning import PruneOptions
from bksdm.pruning.run import prune
from tiny_models import CONTEXT, LATENT, MAX_TOKENS, V1_UNET, V2_UNET, build_pipeline, random_inputs

# Two stages of one layer and no middle block: every kind of operation, in a quarter of the time.
SMALLEST = V1_UNET | {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "mid_block_type": None,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coreml") / "model"
    save_pipeline(build_pipeline(SMALLEST), folder)
    return folder


@pytest.fixture(scope="module")
def exported(model: Path) -> Exported:
    return export(ExportOptions(str(model), "coreml", str(model.parent / "out"), attention="split_einsum"))


def source(**changes: object) -> Source:
    return dataclasses.replace(Source("a model", build_pipeline(SMALLEST), None, "fp16", 32, 32), **changes)


def program(build: Callable[..., object], *shapes: tuple[int, ...]) -> object:
    """A coremltools model of a function of MIL's builder and its inputs in half precision."""
    with quiet_coremltools() as ct:
        from coremltools.converters.mil import Builder
        from coremltools.converters.mil.mil import types

        specs = [Builder.TensorSpec(shape, types.fp16) for shape in shapes]
        made = Builder.program(input_specs=specs, opset_version=ct.target.iOS16)(build)
        return ct.convert(made, minimum_deployment_target=ct.target.iOS16, skip_model_load=True)


def opened(model: object, folder: Path) -> Program:
    with quiet_coremltools():
        model.save(str(folder / "made.mlpackage"))
    return Program(folder / "made.mlpackage")


# Attention


@pytest.mark.parametrize("config", [V1_UNET, V2_UNET])
def test_split_einsum_is_the_attention_of_diffusers(config: dict) -> None:
    unet = build_pipeline(config).unet
    inputs, own = random_inputs(), dict(unet.attn_processors)
    with torch.no_grad():
        theirs = unet(*inputs).sample
        with split_attention(unet):
            ours = unet(*inputs).sample
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.equal(ours, theirs)  # another way to the same numbers
    assert unet.attn_processors == own


# The evaluator


def test_what_is_in_half_precision_is_rounded(tmp_path: Path) -> None:
    from coremltools.converters.mil import Builder

    made = opened(program(lambda x: Builder.add(x=x, y=np.float16(0.125), name="sum"), (2,)), tmp_path)
    found = made({"x": torch.tensor([2048.0, 0.1])})["sum"]
    assert found.tolist() == [2048.0, float(np.float16(np.float16(0.1) + np.float16(0.125)))]


def test_an_operation_that_is_not_known_is_named(tmp_path: Path) -> None:
    from coremltools.converters.mil import Builder

    made = program(lambda x: Builder.erf(x=x), (2,))
    with pytest.raises(NotImplementedError, match="operation erf"):
        opened(made, tmp_path)


def test_inputs_of_another_shape_are_refused(tmp_path: Path) -> None:
    from coremltools.converters.mil import Builder

    made = opened(program(lambda x: Builder.square(x=x), (2,)), tmp_path)
    with pytest.raises(ValueError, match=r"input x has shape \(3,\)"):
        made({"x": torch.zeros(3)})


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        (
            "pad",
            {"pad": torch.tensor([1, 0, 0, 2]), "mode": "constant", "constant_val": 7.0},
            [[7.0] * 4, [1, 2, 7, 7]],
        ),
        ("reduce_argmax", {"axis": 1, "keep_dims": False}, [1]),
        ("gather", {"indices": torch.tensor([1, 0, 1]), "axis": 1}, [[2.0, 1.0, 2.0]]),
        ("gather", {"indices": 1, "axis": 1}, [2.0]),
        (
            "batch_norm",
            {"mean": torch.tensor([1.0, 0.0]), "variance": torch.tensor([1.0, 4.0]), "epsilon": 0.0},
            [[0.0, 1.0]],
        ),
        ("slice_by_index", {"begin": torch.tensor([0, 1]), "end": torch.tensor([1, 2])}, [[2.0]]),
        ("gather_nd", {"indices": torch.tensor([[0, 1]])}, [2.0]),
        (
            "avg_pool",
            {
                "x": torch.tensor([[[[1.0, 3.0, 5.0]]]]),
                **{name: torch.tensor([1, 2]) for name in ("kernel_sizes", "strides")},
                **{"pad_type": "valid", "exclude_padding_from_average": True, "ceil_mode": True},
            },
            [[[[2.0, 5.0]]]],
        ),
        ("matmul", {"y": torch.tensor([[3.0, 4.0]]), "transpose_x": True}, [[3.0, 4.0], [6.0, 8.0]]),
    ],
)
def test_operations_by_hand(name: str, given: dict, expected: list) -> None:
    assert OPERATIONS[name]({"x": torch.tensor([[1.0, 2.0]]), **given}).tolist() == expected


@pytest.mark.parametrize(("bits", "colours"), [(6, 64), (4, 16)])
def test_a_palette_has_as_many_values_as_its_bits_say(tmp_path: Path, bits: int, colours: int) -> None:
    from coremltools.converters.mil import Builder

    weight = np.random.default_rng(0).standard_normal((48, 48)).astype(np.float16)
    made = program(lambda x: Builder.linear(x=x, weight=weight, name="product"), (48, 48))
    found = opened(palettize(made, bits), tmp_path)({"x": torch.eye(48)})["product"].T.numpy()
    assert len(np.unique(found)) == colours
    assert 0 < np.abs(found - weight).max() < 1


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])  # of versions 1 and 2
def test_tokens_beyond_half_precision_keep_apart(tmp_path: Path, activation: str) -> None:
    torch.manual_seed(0)
    widths = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = CLIPTextConfig(
        **widths, vocab_size=49408, max_position_embeddings=4, hidden_act=activation, eos_token_id=9
    )
    encoder = CLIPTextModel(config).eval()
    tokens = torch.tensor([[49406, 49405, 49403, 9]])
    module = _TextEncoder(TextEncoder(encoder, StableDiffusion.text_outputs[0]))
    package = Package(
        "TextEncoder", module, {"input_ids": torch.zeros(1, 4)}, ("last_hidden_state", "pooled_outputs"), True
    )
    found = opened(convert(package, half=True), tmp_path)({"input_ids": tokens.float()})
    with torch.no_grad():
        expected = encoder(tokens)
    torch.testing.assert_close(found["last_hidden_state"], expected.last_hidden_state, atol=0.02, rtol=0)
    torch.testing.assert_close(found["pooled_outputs"], expected.pooler_output, atol=0.02, rtol=0)


# The folder


def test_names_shapes_and_types_are_those_of_apples_runtime(exported: Exported) -> None:
    expected = {
        "TextEncoder": ({"input_ids": ((1, MAX_TOKENS), "FLOAT32")}, {"last_hidden_state", "pooled_outputs"}),
        "Unet": (
            {
                "sample": ((2, 4, LATENT, LATENT), "FLOAT16"),
                "timestep": ((2,), "FLOAT16"),
                "encoder_hidden_states": ((2, CONTEXT, 1, MAX_TOKENS), "FLOAT16"),
            },
            {"noise_pred"},
        ),
        "VAEDecoder": ({"z": ((1, 4, LATENT, LATENT), "FLOAT16")}, {"image"}),
        "VAEEncoder": ({"x": ((1, 3, 32, 32), "FLOAT16")}, {"latent"}),
    }
    with quiet_coremltools() as ct:
        for name, (inputs, outputs) in expected.items():
            described = ct.models.MLModel(str(exported.out / f"{name}.mlpackage"), skip_model_load=True).get_spec()
            kinds = {each.name: each.type.multiArrayType for each in described.description.input}
            numbers = ct.proto.FeatureTypes_pb2.ArrayFeatureType
            found = {key: (tuple(kind.shape), numbers.ArrayDataType.Name(kind.dataType)) for key, kind in kinds.items()}
            assert found == inputs
            given = {each.name: each.type.multiArrayType.dataType for each in described.description.output}
            assert given == dict.fromkeys(outputs, numbers.FLOAT32)


def test_the_picture_is_that_of_torch(exported: Exported, model: Path) -> None:
    found = json.loads((exported.out / "export.json").read_text())
    assert (found["format"], found["precision"], found["height"], found["batch_size"]) == ("coreml", "fp16", 32, 1)
    assert found["parity"]["psnr"] > 40
    pixels = np.random.default_rng(0).uniform(-1, 1, (3, 3, 32, 32)).astype(np.float32)
    ours = CoreMLNetworks(exported.out).moments(pixels)  # one by one
    np.testing.assert_allclose(ours, parity.TorchNetworks(build_pipeline(SMALLEST)).moments(pixels), atol=0.02)


def test_heads_are_apart_in_the_program(exported: Exported) -> None:
    layers, heads = 3, V1_UNET["attention_head_dim"]  # which counts heads, in version 1's U-Nets
    attentions = 2 * layers * heads
    with quiet_coremltools() as ct:
        spec = ct.models.MLModel(str(exported.out / "Unet.mlpackage"), skip_model_load=True).get_spec()
    (function,) = spec.mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    assert sum(operation.type == "einsum" for operation in block.operations) == 2 * attentions


def test_swift_finds_its_vocabulary(exported: Exported) -> None:
    resources = exported.out / "Resources"
    assert json.loads((resources / "vocab.json").read_text())["<|endoftext|>"] > 0
    assert (resources / "merges.txt").read_text().splitlines()[1] == "r e"


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac may have what the script asks for")
def test_the_script_says_what_it_needs(exported: Exported) -> None:
    done = subprocess.run([exported.out / "compile.sh"], capture_output=True, text=True, check=False)
    assert (done.returncode, "needs a Mac with Xcode" in done.stderr) == (2, True)


def test_the_script_compiles_every_package(tmp_path: Path) -> None:
    """With a compiler that only notes what it is asked for."""
    bins = tmp_path / "bin"
    bins.mkdir()
    (bins / "xcrun").write_text('#!/bin/sh\necho "$@" >> asked.txt\n')
    (bins / "xcrun").chmod(0o755)
    (tmp_path / "compile.sh").write_text(swift.script(["Unet", "TextEncoder"]))
    subprocess.run(["sh", tmp_path / "compile.sh"], env={"PATH": f"{bins}:/usr/bin:/bin"}, check=True)
    assert (tmp_path / "asked.txt").read_text().splitlines() == [
        "coremlcompiler compile Unet.mlpackage Resources",
        "coremlcompiler compile TextEncoder.mlpackage Resources",
    ]


def test_the_page_says_what_apples_defaults_get_wrong() -> None:
    plain = source()
    assert "## What to set" not in swift.guide(plain)
    assert "cpuAndGPU" in swift.guide(plain)
    assert "cpuAndNeuralEngine" in swift.guide(dataclasses.replace(plain, attention="split_einsum"))
    other = source(pipeline=build_pipeline(SMALLEST, "v_prediction"), batch_size=2)
    other.pipeline.vae.register_to_config(scaling_factor=0.5)
    page = swift.guide(other)
    for said in ("scaling factor is 0.5", "predicts v_prediction", "takes 4 samples"):
        assert said in page
    assert "noise schedule is not that of Apple's" not in page
    other.pipeline.scheduler = DDIMScheduler.from_config(other.pipeline.scheduler.config, rescale_betas_zero_snr=True)
    assert "noise schedule is not that of Apple's" in swift.guide(other)


# Bad input


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": "int8"}, "precision is int8, and coreml has fp16, fp32, 6bit, 4bit"),
        ({"height": 30}, "height is 30; give a multiple of 8"),
        ({"width": 36}, "width is 36; give a multiple of 8"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_options_that_cannot_be_are_refused(model: Path, tmp_path: Path, changes: dict[str, object], said: str) -> None:
    options = dataclasses.replace(ExportOptions(str(model), "coreml", str(tmp_path / "out")), **changes)
    with pytest.raises(InputError, match=said):
        export(options)
    assert not list(tmp_path.iterdir())


def test_a_unet_that_apples_runtime_cannot_feed_is_refused(tmp_path: Path) -> None:
    kind = format_named("coreml")
    assert kind.why_not(source()) is None
    inpainting = source(pipeline=build_pipeline(SMALLEST | {"in_channels": 9}))
    assert "its U-Net takes 9 channels" in kind.why_not(inpainting)


# Whole models


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "attention", "least"),
    [
        ("fp32", "original", None),
        ("fp32", "split_einsum", None),
        ("fp16", "original", 30),
        ("fp16", "split_einsum", 30),
        ("6bit", "original", 15),
        ("4bit", "original", 5),
    ],
)
@pytest.mark.parametrize("config", [V1_UNET, V2_UNET])
def test_students_are_near_torch(
    tmp_path: Path, config: dict, precision: str, attention: str, least: float | None
) -> None:
    save_pipeline(build_pipeline(config), tmp_path / "teacher")
    prune(PruneOptions(str(tmp_path / "teacher"), "tiny", str(tmp_path / "tiny")))
    options = ExportOptions(
        str(tmp_path / "tiny"), "coreml", str(tmp_path / "out"), precision=precision, attention=attention, batch_size=2
    )
    made = export(options)
    assert made.parity is not None
    if least is None:
        assert made.parity.largest <= 2
    else:
        assert made.parity.psnr > least
