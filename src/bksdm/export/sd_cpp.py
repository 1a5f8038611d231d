"""stable-diffusion.cpp in a process of its own: what crashes there is one line here, and leaves nothing behind.

The bindings have no other way to say that a model does not fit: the C++ code ends the process.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGE = "stable_diffusion_cpp"


def convert(folder: Path, file: Path, kind: str) -> None:
    """Write the networks of a diffusers folder into one GGUF file.

    Arguments:
        folder: With `unet`, `vae` and `text_encoder`, each with its safetensors file.
        file: To be written.
        kind: Of the weights, as ggml names it: f16, q8_0, q4_0.

    Raises:
        RuntimeError: It was not written.
    """
    _start({"task": "convert", "input_path": str(folder), "output_path": str(file), "output_type": kind})
    if not file.is_file():
        raise RuntimeError(f"stable-diffusion.cpp did not write {file.name}")


def draw(model: Path, picture: Path, **settings: Any) -> None:
    """Let stable-diffusion.cpp make a picture with the random numbers that torch draws on a CPU.

    Arguments:
        model: GGUF file, or another that stable-diffusion.cpp reads.
        picture: PNG to be written.
        settings: As `StableDiffusion.generate_image` of its bindings takes them: prompt, width, seed and so on.

    Raises:
        RuntimeError: The file cannot be read, or the process ended.
    """
    _start({"task": "draw", "model_path": str(model), "picture": str(picture), **settings})


def _start(work: Mapping[str, Any]) -> None:
    run([sys.executable, "-m", "bksdm.export.sd_cpp", json.dumps(work)])


def run(command: Sequence[str]) -> None:
    """Wait for a process that stable-diffusion.cpp is in.

    Raises:
        RuntimeError: It failed, or was ended by a signal; in one line.
    """
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = _last_error(done.stderr + done.stdout)
        raise RuntimeError(f"stable-diffusion.cpp {_how_it_ended(done.returncode)}{f': {said}' if said else ''}")


def _how_it_ended(code: int) -> str:
    if code < 0:
        return f"crashed ({signal.Signals(-code).name})"
    return f"failed (exit code {code})"


def _last_error(output: str) -> str:
    """The last line that speaks of an error, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if any(word in line.lower() for word in ("error", "assert", "fail"))]
    return (telling or lines or [""])[-1]


def _main(work: dict[str, Any]) -> None:
    import stable_diffusion_cpp as bindings  # noqa: PLC0415

    task = work.pop("task")
    if task == "convert":
        made = bindings.StableDiffusion(vae_decode_only=True).convert(**work)
        if not made:
            raise SystemExit("error: the conversion failed")
        return
    model, picture = work.pop("model_path"), work.pop("picture")
    network = bindings.StableDiffusion(model, vae_decode_only=True, rng_type="cpu", sampler_rng_type="cpu")
    network.generate_image(**work)[0].save(picture)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
