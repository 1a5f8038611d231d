"""A small teacher in the shape of SDXL that draws the emoji art, made from the embedded model's parts.

    python examples/emoji/sdxl.py --out runs/sdxl/teacher      # about an hour on two cores
    bksdm quickstart runs/sdxl/quickstart --teacher runs/sdxl/teacher

Its VAE and first text encoder are the embedded model's, its second text encoder is the embedded dual encoder's. The
U-Net begins with the embedded one's ResNet blocks, which have its widths, and learns from its answers.
"""

import argparse
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from objectives import Succession
from pretrain import CHUNK, SIZE, InMemory, Pace, fit, trained
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from bksdm.data.folder import data_folder, read_captions
from bksdm.data.pictures import PictureSamples
from bksdm.data.stream import Batch
from bksdm.distill.conditions import Conditions
from bksdm.evaluate.encoder import DualEncoder
from bksdm.families.noise import NoiseSchedule
from bksdm.models.pipelines import load_pipeline, save_pipeline, tokenizing
from bksdm.runtime.defaults import Defaults, as_files

NUMBERS = 6  # that SDXL is told of a picture


def build_unet(context: int, pooled: int) -> UNet2DConditionModel:
    """12.1 M parameters: SDXL's three stages of two layers, of which the first does not attend, 1, 2 and 4 deep."""
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(48, 80, 112),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 4),
        attention_head_dim=(3, 5, 7),
        cross_attention_dim=context,
        use_linear_projection=True,
        norm_num_groups=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=pooled + NUMBERS * 32,
    )
    for name, module in unet.named_modules():
        if name.endswith("proj_out"):  # attentions change nothing at first
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return unet


def inherit(unet: UNet2DConditionModel, embedded: UNet2DConditionModel) -> None:
    """Everything but attentions: the embedded U-Net has the same stages, and one more inside of them."""
    weights = embedded.state_dict()
    for key, tensor in unet.state_dict().items():
        first, _, rest = key.partition(".")
        number, _, inside = rest.partition(".")
        source = f"up_blocks.{int(number) + 1}.{inside}" if first == "up_blocks" else key
        if ".attentions." not in key and first not in ("add_embedding", "mid_block"):
            tensor.copy_(weights[source])


def build_second_encoder(encoder: DualEncoder) -> CLIPTextModelWithProjection:
    """The text tower of a CLIP."""
    config = CLIPTextConfig(**encoder.clip.config.text_config.to_dict())
    made = CLIPTextModelWithProjection(config)
    text = {key: value for key, value in encoder.clip.state_dict().items() if key.startswith("text_")}
    missing, unexpected = made.load_state_dict(text, strict=False)
    assert not missing, missing
    assert not unexpected, unexpected
    return made.eval()


def build_pipeline() -> StableDiffusionXLPipeline:
    """The pipeline before its U-Net has learnt."""
    embedded, encoder = load_pipeline("emoji"), DualEncoder.load("emoji")
    second = build_second_encoder(encoder)
    widths = embedded.text_encoder.config.hidden_size, second.config.hidden_size
    unet = build_unet(sum(widths), second.config.projection_dim)
    inherit(unet, embedded.unet)
    return StableDiffusionXLPipeline(
        vae=embedded.vae,
        text_encoder=embedded.text_encoder,
        text_encoder_2=second,
        tokenizer=embedded.tokenizer,
        tokenizer_2=encoder.tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )


@torch.no_grad()
def texts(pipeline: StableDiffusionXLPipeline, conditions: Conditions, captions: list[str]) -> Batch:
    """What captions tell the U-Net that learns, and, as `taught`, what they tell the embedded one."""
    ids = torch.stack([tokenizing(pipeline)(text) for text in captions])
    return conditions.embedded(ids) | {"taught": pipeline.text_encoder(ids[:, 0]).last_hidden_state}


def samples(pipeline: StableDiffusionXLPipeline, conditions: Conditions) -> InMemory:
    """The embedded art as latents, and what both U-Nets are told of it."""
    entries = read_captions(data_folder("emoji/train"))
    pictures = PictureSamples(entries, SIZE, tokenizing(pipeline), told=conditions.of_fitted)
    found = []
    for start in range(0, len(entries), CHUNK):
        seen = [pictures.seen(index, flipped=False) for index in range(start, min(start + CHUNK, len(entries)))]
        columns = {name: torch.stack([one[name] for one in seen]) for name in seen[0]}
        mean, std = conditions.posterior(columns.pop("pixel_values"))
        columns |= {"latents_mean": mean, "latents_std": std}
        columns |= texts(pipeline, conditions, [entry.text for entry in entries[start : start + CHUNK]])
        found += [{name: column[row] for name, column in columns.items()} for row in range(len(seen))]
    return InMemory(found)


def learn(pipeline: StableDiffusionXLPipeline, folder: Path, pace: Pace) -> None:
    """Train the U-Net, or go on with it."""
    unet, embedded = pipeline.unet.train(), load_pipeline("emoji").unet.eval().requires_grad_(False)
    for network in (unet, embedded):
        network.to(memory_format=torch.channels_last)
    conditions = Conditions.of(pipeline)
    family = conditions.family
    empty = texts(pipeline, conditions, [""])
    objective = Succession(
        lambda latents, timesteps, told: family.answer(unet, latents, timesteps, told),
        lambda noisy, context: embedded(noisy.latents, noisy.timesteps, context).sample,
        conditions.latents,
        NoiseSchedule.from_scheduler(pipeline.scheduler),
        empty=family.without_caption(pipeline, empty) | {"taught": empty["taught"]},
        caption_dropout=0.1,
    )
    fit(unet, objective, samples(pipeline, conditions), folder, pace)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sdxl/teacher"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    pipeline, run = build_pipeline(), arguments.out.with_name(f"{arguments.out.name}-training")
    learn(pipeline, run, Pace(arguments.steps, arguments.batch_size, arguments.lr, ema_decay=0.99))
    trained(pipeline.unet, run)
    save_pipeline(pipeline, arguments.out, as_files(Defaults(steps=25, guidance=2.5)))


if __name__ == "__main__":
    main()
