"""A small decoder in the place of a VAE's own: that it decodes what it should, and that it is learnt."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from bksdm.common.errors import InputError
from bksdm.common.randomness import Draws
from bksdm.data.folder import data_folder, read_captions
from bksdm.data.pictures import to_pixels
from bksdm.distill.conditions import Conditions
from bksdm.distill.data import open_data
from bksdm.distill.decoder import distill_decoder, newest_decoder
from bksdm.distill.decoding import Coder, DecoderDistillation, Taught, decoded, taught_bytes
from bksdm.distill.loop import Interrupted
from bksdm.distill.losses import edge_loss
from bksdm.evaluate.sources import Drawn, Sampling
from bksdm.generate.requests import Request
from bksdm.generate.sampling import decode, sample, sample_latents
from bksdm.models.decoder import fresh_autoencoder, load_decoder, upsampling, with_autoencoder, with_decoder
from bksdm.models.pipelines import load_pipeline, save_pipeline
from bksdm.options.distill import DecoderOptions
from bksdm.runtime.defaults import Defaults
from fast import slow
from tiny_models import LATENT, PICTURE
from verbs import Run, read_lines, told

pytest_plugins = ["verbs_fixtures"]

WEIGHTS = "diffusion_pytorch_model.safetensors"
RED = [Request("red apple", 3)]


def fresh(pipeline: StableDiffusionPipeline, channels: int = 8, blocks: int = 1) -> AutoencoderTiny:
    return fresh_autoencoder(pipeline.vae.config, channels, blocks, seed=1).eval()


@pytest.fixture
def small(exported: StableDiffusionPipeline, tmp_path: Path) -> Path:
    """An untrained decoder on the disk, to be damaged."""
    fresh(exported).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def change_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def train(teacher: Path | str, data: Path | str, out: Path, **changes: object) -> Path:
    settings: dict[str, object] = {"steps": 4, "channels": 8, "blocks": 1, "batch_size": 4, "warmup": 0, "log_every": 1}
    settings |= {"precision": "fp32", "checkpoint_every": 2}
    return distill_decoder(DecoderOptions(str(teacher), str(data), str(out), **settings | changes))


# Scaling


class OwnDecoder(nn.Module):
    """The decoder of a VAE in the manner of a small one: it takes the latents of the U-Net."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        vae = self.vae
        return vae.decoder(vae.post_quant_conv(latents / vae.config.scaling_factor))


@pytest.fixture(scope="module")
def emoji() -> StableDiffusionPipeline:
    return load_pipeline("emoji")


def test_a_decoder_that_is_the_vaes_own_gives_the_same_pictures(emoji: StableDiffusionPipeline) -> None:
    small = fresh(emoji)
    small.decoder = OwnDecoder(emoji.vae)
    wanted, got = (next(sample(each, RED, steps=2)) for each in (emoji, with_autoencoder(emoji, small)))
    assert np.abs(np.asarray(wanted[0], int) - np.asarray(got[0], int)).max() <= 1
    assert np.asarray(wanted[0]).std() > 10


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_small_decoder_draws_as_in_the_pipeline_of_diffusers(
    exported: StableDiffusionPipeline, factor: float
) -> None:
    small = fresh(exported)
    small.register_to_config(scaling_factor=factor)
    stock = StableDiffusionPipeline(**exported.components | {"vae": small}, requires_safety_checker=False)
    wanted, got = (next(sample(each, RED, steps=2)) for each in (stock, with_autoencoder(exported, small)))
    assert np.abs(np.asarray(wanted[0], int) - np.asarray(got[0], int)).max() <= 1


def test_final_latents_become_the_pictures_of_the_pipeline(exported: StableDiffusionPipeline, small: Path) -> None:
    pipeline = with_decoder(exported, small)
    (latents,) = sample_latents(pipeline, RED, steps=2)
    ((wanted,),) = sample(pipeline, RED, steps=2)
    assert decode(pipeline, latents)[0].tobytes() == wanted.tobytes()


def test_the_encoder_stays_and_the_pipeline_given_is_as_it_was(exported: StableDiffusionPipeline, small: Path) -> None:
    before = {name: id(module) for name, module in exported.vae.named_modules()}
    pipeline, pixels = with_decoder(exported, small), torch.rand(1, 3, PICTURE, PICTURE)
    own, kept = (each.vae.encode(pixels).latent_dist.mean for each in (exported, pipeline))
    assert torch.equal(own, kept)
    assert {name: id(module) for name, module in exported.vae.named_modules()} == before
    assert pipeline.vae.config.scaling_factor == exported.vae.config.scaling_factor
    ((picture,),) = sample(pipeline, RED, steps=2, image=Image.new("RGB", (PICTURE, PICTURE), "red"))
    assert picture.size == (PICTURE, PICTURE)


def test_a_pipeline_with_a_small_decoder_is_not_saved_as_what_it_is_not(
    exported: StableDiffusionPipeline, small: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"cannot write .*small decoder.*save it without"):
        save_pipeline(with_decoder(exported, small), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_the_decoder_takes_the_number_format_of_the_vae(exported_model: Path, small: Path) -> None:
    pipeline = with_decoder(load_pipeline(exported_model, torch.bfloat16), small)
    assert {p.dtype for p in pipeline.vae.parameters()} == {torch.bfloat16}
    assert pipeline.vae.decode(torch.zeros(1, 4, LATENT, LATENT, dtype=torch.bfloat16)).sample.dtype == torch.bfloat16


@pytest.mark.parametrize("option", ["enable_slicing", "enable_tiling"])
def test_slices_and_tiles_still_work(exported: StableDiffusionPipeline, small: Path, option: str) -> None:
    pipeline = with_decoder(exported, small)
    getattr(pipeline.vae, option)()
    assert pipeline.vae.decode(torch.zeros(2, 4, 2 * LATENT, LATENT)).sample.shape == (2, 3, 2 * PICTURE, PICTURE)


def test_the_embedded_decoder_draws_as_the_vaes_own(emoji: StableDiffusionPipeline) -> None:
    pixels = to_pixels(read_captions(data_folder("emoji/heldout"))[0].open(), 64)[None]
    with torch.no_grad():
        latents = emoji.vae.encode(pixels).latent_dist.mean * emoji.vae.config.scaling_factor
        own, small = (decoded(each.vae, latents) for each in (emoji, with_decoder(emoji, "emoji")))
    assert ((own - small) / 2).square().mean() < 10**-2.6


# What is refused


def refused(pipeline: StableDiffusionPipeline, decoder: Path | str, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        with_decoder(pipeline, decoder)
    assert "\n" not in str(error.value)


def test_latents_of_other_channels_are_refused(exported: StableDiffusionPipeline, tmp_path: Path) -> None:
    AutoencoderTiny(latent_channels=16).save_pretrained(tmp_path / "wide")
    refused(exported, tmp_path / "wide", "latents of 16 channels, and this model's have 4")


def test_another_factor_is_refused(exported: StableDiffusionPipeline, tmp_path: Path) -> None:
    AutoencoderTiny().save_pretrained(tmp_path / "taesd")
    refused(exported, tmp_path / "taesd", "makes 8 pixels of a latent, and this model's VAE 4")


def test_a_pickle_is_refused(exported: StableDiffusionPipeline, small: Path) -> None:
    torch.save(load_file(small / WEIGHTS), small / "diffusion_pytorch_model.bin")
    (small / WEIGHTS).unlink()
    refused(exported, small, "is a pickle, which can run code and is not loaded")


def test_damaged_weights_are_refused(exported: StableDiffusionPipeline, small: Path) -> None:
    whole = (small / WEIGHTS).read_bytes()
    (small / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    refused(exported, small, "cut short or damaged")


def test_a_config_that_does_not_go_with_the_weights_is_refused(exported: StableDiffusionPipeline, small: Path) -> None:
    change_config(small, num_decoder_blocks=[2, 1, 1])
    refused(exported, small, "lacks .* of its tensors|cannot be loaded")


def test_another_network_is_refused(exported: StableDiffusionPipeline, exported_model: Path) -> None:
    refused(exported, exported_model / "vae", "holds AutoencoderKL; give the folder of AutoencoderTiny")


def test_a_folder_without_a_config_is_refused(exported: StableDiffusionPipeline, exported_model: Path) -> None:
    refused(exported, exported_model, "has no config.json")


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where"])
def test_what_is_not_there_is_refused(exported: StableDiffusionPipeline, name: str) -> None:
    refused(exported, name, f"decoder {name} does not exist.*; give the folder of an AutoencoderTiny")


@pytest.mark.parametrize(
    ("option", "value"),
    [("steps", 0), ("channels", 0), ("blocks", -1), ("edges_weight", -1.0), ("latent_noise", -0.1), ("ema_decay", 1.0)],
)
def test_options_that_cannot_be_are_refused(pictures: Path, tmp_path: Path, option: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{option} is {value}; give"):
        train("emoji", pictures, tmp_path / "run", **{option: value})
    assert not (tmp_path / "run").exists()


# What is learnt


def test_the_edges_of_equal_pictures_are_equal_and_a_shade_has_none() -> None:
    pictures = torch.rand(2, 3, 8, 8)
    assert edge_loss(pictures, pictures) == 0
    assert edge_loss(pictures, pictures + 0.5) < 1e-6
    # One step of height 1: 8 of 56 differences across, none down; halved, 4 of 12 and 0.
    step = torch.zeros(1, 1, 8, 8)
    step[..., 4:] = 1
    assert edge_loss(step, torch.zeros_like(step), scales=2) == pytest.approx((8 / 56 + 4 / 12) / 4)


def test_pictures_that_are_decoded_once_are_those_of_the_teacher(
    exported: StableDiffusionPipeline, pictures: Path
) -> None:
    samples = open_data(str(pictures), None, True, 1.0).samples(exported)
    conditions = Conditions.of(exported)
    taught = Taught(samples, conditions, True, 0, torch.device("cpu"))
    assert len(taught) == 8
    plain, mirrored = taught.sample(2, 0), taught.sample(2, 1)
    assert not torch.equal(plain["latents"], mirrored["latents"])
    for drawn in (plain, mirrored):
        wanted = decoded(exported.vae, drawn["latents"][None])[0]
        assert (drawn["taught"].float() / 127.5 - 1 - wanted).abs().max() <= 1 / 255 + 1e-4
        assert sum(value.numel() * value.element_size() for value in drawn.values()) * 16 == taught_bytes(
            8, True, drawn["taught"].numel(), drawn["latents"].numel()
        )


def test_noise_on_latents_meets_both(exported: StableDiffusionPipeline, pictures: Path) -> None:
    samples = open_data(str(pictures), None, True, 1.0).samples(exported)
    batch = {name: value[None] for name, value in samples.sample(0, 0).items()}
    conditions = Conditions.of(exported)
    coder = Coder(fresh(exported))
    terms = [DecoderDistillation(coder, conditions, 1.0, noise)(batch, Draws(0, "noise")) for noise in (0.0, 0.0, 0.5)]
    assert terms[0] == terms[1]
    assert terms[0]["latents"] != terms[2]["latents"]
    for each in terms:
        assert each["loss"] == each["pixels"] + each["edges"] + each["latents"]


@pytest.fixture(scope="module")
def finished(exported_model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Not to be changed."""
    out = tmp_path_factory.mktemp("decoder") / "run"
    train(exported_model, pictures, out, steps=40, checkpoint_every=20, lr=3e-3, ema_decay=0.9)
    return out


def test_a_run_leaves_its_config_its_losses_and_a_decoder_that_learns(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} >= {
        "config.yaml",
        "provenance.json",
        "metrics.jsonl",
        "checkpoints",
        "decoder",
    }
    records = read_lines(finished / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 41))
    assert records[-1]["pixels"] < 0.8 * records[0]["pixels"]
    assert records[-1]["latents"] < records[0]["latents"]
    assert records[-1]["psnr"] > records[0]["psnr"] + 1


def test_the_decoder_is_stock_and_stands_in_for_the_teachers(finished: Path, exported: StableDiffusionPipeline) -> None:
    small = AutoencoderTiny.from_pretrained(finished / "decoder")
    assert (upsampling(small), small.config.scaling_factor) == (exported.vae_scale_factor, 1.0)
    latents = torch.randn(1, 4, LATENT, LATENT, generator=torch.Generator().manual_seed(0))
    pipeline = with_decoder(exported, finished / "decoder")
    with torch.no_grad():
        own = pipeline.vae.decode(latents / exported.vae.config.scaling_factor).sample
        assert torch.allclose(own, small.decode(latents).sample, atol=1e-5)
        assert small.encode(own).latents.shape == latents.shape


def test_the_newest_checkpoint_is_what_a_finished_run_saved(finished: Path, exported_model: Path) -> None:
    options = DecoderOptions(str(exported_model), "", str(finished), channels=8, blocks=1)
    small, steps = newest_decoder(options)
    saved = load_file(finished / "decoder" / WEIGHTS)
    assert steps == 40
    assert all(torch.equal(value, saved[name]) for name, value in small.state_dict().items())


@pytest.mark.parametrize("noise", [0.2, slow(0.0)])
def test_a_stopped_run_goes_on_to_the_same_bits(
    exported_model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: float
) -> None:
    whole = train(exported_model, pictures, tmp_path / "whole", latent_noise=noise)
    from bksdm.distill import state

    save = state.Checkpoints.save

    def stop_after(self: state.Checkpoints, current: state.TrainState) -> None:
        save(self, current)
        raise Interrupted(current.step, 15)

    with monkeypatch.context() as patch:
        patch.setattr(state.Checkpoints, "save", stop_after)
        with pytest.raises(Interrupted):
            train(exported_model, pictures, tmp_path / "stopped", latent_noise=noise)
    assert not (tmp_path / "stopped" / "decoder").exists()
    resumed = train(exported_model, pictures, tmp_path / "stopped", latent_noise=noise)
    wanted, got = load_file(whole / WEIGHTS), load_file(resumed / WEIGHTS)
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_a_finished_run_is_left_as_it_is(finished: Path, exported_model: Path, pictures: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(f"out: {finished}", f"out: {run}"))
    before = (run / "decoder" / WEIGHTS).stat().st_mtime_ns
    train(exported_model, pictures, run, steps=40, checkpoint_every=20, lr=3e-3, ema_decay=0.9)
    assert (run / "decoder" / WEIGHTS).stat().st_mtime_ns == before
    with pytest.raises(InputError, match="holds another run"):
        train(exported_model, pictures, run, steps=40, checkpoint_every=20, lr=1e-3, ema_decay=0.9)


# The verbs


def test_pictures_with_another_decoder_are_other_pictures(exported_model: Path, small: Path, tmp_path: Path) -> None:
    """`evaluate` keeps features under the digest of what draws, and shares those that were made without one."""
    drawn = [
        Drawn(str(exported_model), RED, Defaults(1, 1.0), Sampling(None, 1, "fp32", "cpu", decoder), tmp_path)
        for decoder in (None, str(small))
    ]
    assert drawn[0].digest != drawn[1].digest
    own, other = (each.pictures(range(1), "none")[0] for each in drawn)
    assert own.tobytes() != other.tobytes()


def test_generate_draws_with_it(done: Run, exported_model: Path, finished: Path, tmp_path: Path) -> None:
    words = ("generate", exported_model, "--prompt", "red", "--steps", 1, "--out")
    done(*words, tmp_path / "own")
    done(*words, tmp_path / "small", "--decoder", finished / "decoder")
    paths = [tmp_path / name / "00000.png" for name in ("own", "small")]
    own, small = (Image.open(path) for path in paths)
    assert own.size == small.size
    assert own.tobytes() != small.tobytes()
    assert [told(path).get("decoder") for path in paths] == [None, str(finished / "decoder")]


@pytest.mark.slow
def test_benchmark_measures_every_model_with_both(done: Run, exported_model: Path, finished: Path) -> None:
    decoder = finished / "decoder"
    words = ("--decoder", decoder, "--batch_sizes", 1, "--rounds", 1, "--warmup", 0, "--steps", 1, "--json")
    own, small = done("benchmark", exported_model, *words).json["models"]
    assert (own["model"], small["model"]) == (str(exported_model), f"{exported_model} + {decoder}")
    wanted = sum(p.numel() for p in load_decoder(decoder).decoder.parameters())
    assert small["params"]["decoder"] == wanted != own["params"]["decoder"]
    assert small["params"]["unet"] == own["params"]["unet"]


@pytest.mark.slow
def test_decoder_and_evaluate_are_verbs_that_take_it(
    done: Run, pictures: Path, exported_model: Path, tmp_path: Path
) -> None:
    words = ("decoder", exported_model, "--data", pictures, "--out", tmp_path / "run", "--steps", 1, "--channels", 4)
    made = done(*words, "--json").json["decoder"]
    assert made == str(tmp_path / "run" / "decoder")
    scored = done(
        *("evaluate", exported_model, "--out", tmp_path / "scores", "--decoder", made, "--steps", 1, "--limit", 4),
        *("--scores", "clip_score", "--resamples", 2, "--latency", 1, "--json"),
    ).json
    assert scored["protocol"]["decoder"] == made
