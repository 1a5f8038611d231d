"""What lies beside Core ML packages for a Mac: the script that compiles them and the page that says how to draw.

Commands and file names are those of apple/ml-stable-diffusion. Nothing here could be run where it was written.
"""

from collections.abc import Sequence

from bksdm.export.formats import Source

RESOURCES = "Resources"
_SCALE = 0.18215  # Apple's Swift code divides latents by it unless an app says otherwise
_BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}


def script(names: Sequence[str]) -> str:
    """Shell commands that compile packages into the folder that Swift reads."""
    lines = [
        "#!/bin/sh",
        "# Compiles the packages into Resources, on a Mac with Xcode.",
        "set -e",
        'cd "$(dirname "$0")"',
        "command -v xcrun > /dev/null || { echo 'compile.sh needs a Mac with Xcode: no xcrun here' >&2; exit 2; }",
    ]
    for name in names:
        lines += [f"rm -rf {RESOURCES}/{name}.mlmodelc", f"xcrun coremlcompiler compile {name}.mlpackage {RESOURCES}"]
    return "\n".join([*lines, ""])


def guide(source: Source) -> str:
    """The page in the folder: what it holds, how it is compiled and run, and what Swift's defaults would get wrong."""
    units = "cpuAndNeuralEngine" if source.attention == "split_einsum" else "cpuAndGPU"
    text = f"""# {source.model} for Core ML

Pictures of {source.width} x {source.height} pixels, {source.batch_size} at a time, weights {source.precision},
attention {source.attention}. iOS 16.2, macOS 13.1 or later.

1. On a Mac with Xcode run `./compile.sh`: it compiles the packages into `{RESOURCES}`, where `vocab.json` and
   `merges.txt` are.
2. Get https://github.com/apple/ml-stable-diffusion and run there:

       swift run StableDiffusionSample "a red apple" --resource-path /path/to/{RESOURCES} \\
           --output-path /path/to/pictures --step-count 25 --seed 0 --disable-safety --compute-units {units}

In an app, `StableDiffusionPipeline(resourcesAt:controlNet:configuration:disableSafety:reduceMemory:)` opens the same
folder.

Apple's code has not been run with this folder: its names, shapes and types are what the code reads, and the packages
were compared with PyTorch (`export.json`).
"""
    warnings = _warnings(source)
    return "\n".join([text, "## What to set", "", *(f"- {line}" for line in warnings), ""]) if warnings else text


def _warnings(source: Source) -> list[str]:
    pipeline = source.pipeline
    scale, schedule = pipeline.vae.config.scaling_factor, pipeline.scheduler.config
    found = []
    if abs(scale - _SCALE) > 1e-6:
        found.append(
            f"This VAE's scaling factor is {scale:g}: set `decoderScaleFactor` and `encoderScaleFactor` of the "
            f"pipeline's configuration to it; the sample command has {_SCALE} and cannot be told."
        )
    if schedule.prediction_type != "epsilon":
        found.append(
            f"This U-Net predicts {schedule.prediction_type}; Apple's schedulers take epsilon only, so bring your own."
        )
    if any(schedule.get(name, value) != value for name, value in _BETAS.items()):
        found.append("This model's noise schedule is not that of Apple's schedulers, so bring your own.")
    if source.batch_size != 1:
        found.append(
            f"The U-Net takes {2 * source.batch_size} samples; Apple's pipeline gives it 2. "
            "Export with batch_size 1 for it."
        )
    if pipeline.tokenizer.pad_token != "<|endoftext|>":
        found.append(
            f"This tokenizer pads with {pipeline.tokenizer.pad_token}: give it to `BPETokenizer` as `padToken`; "
            "the sample command pads with <|endoftext|>."
        )
    return found
