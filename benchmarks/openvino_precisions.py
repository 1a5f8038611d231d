"""Which precision of OpenVINO is near to torch, which is small, and which is fast on this processor?

    python benchmarks/openvino_precisions.py pictures     # embedded teacher and its students, whole pictures
    python benchmarks/openvino_precisions.py unet         # U-Net of Stable Diffusion v1.4 by recipe tiny
    python benchmarks/openvino_precisions.py arithmetic   # bfloat16 beside float32, on what export_parity.py wrote

Pictures are compared with torch's as `bksdm export` does it. The full-size U-Net has random weights; it is converted to
float32 from torch, and to the rest from that, each in a process of its own. Its steps, with guidance at 256x256 pixels
on one thread, take turns with torch's in float32, and ratios are formed within rounds.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import PNDMScheduler, UNet2DConditionModel
from export_parity import export_path
from numpy.typing import NDArray
from torch import Tensor

from bksdm.common.runs import provenance, write_text
from bksdm.evaluate.timing import Interval, Spread, take_turns
from bksdm.export.calibration import Step, denoising_steps
from bksdm.export.components import UNET, Component, components
from bksdm.export.formats import Source
from bksdm.export.parity import check_parity
from bksdm.export.to_openvino import FORMAT, MODEL_FILE, beside, save_graph, to_graph, write_graph
from bksdm.families import derive, family_of
from bksdm.families.recipe import load_recipe
from bksdm.families.unet.graph import unet_graph
from bksdm.models.pipelines import image_size, load_pipeline, quiet_libraries
from bksdm.options.pruning import PruneOptions
from bksdm.pruning.run import prune
from bksdm.runtime.networks import Array
from bksdm.runtime.openvino_networks import OpenvinoNetworks

ROOT = Path(__file__).parents[1]
LATENT, TOKENS, CONTEXT = 32, 77, 768
RECIPES = ("tiny", "small", "base")


def full_size() -> UNet2DConditionModel:
    """The U-Net of SD v1.4 by recipe tiny, with random weights."""
    torch.manual_seed(0)
    config = json.loads((ROOT / "tests" / "data" / "unet_sd_v1.4.json").read_text())
    return UNet2DConditionModel.from_config(derive(load_recipe("tiny"), config).student_config).eval()


def inputs() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(1, 4, LATENT, LATENT, generator=rng).repeat(2, 1, 1, 1),
        "timestep": torch.tensor([801]),
        "encoder_hidden_states": torch.randn(2, TOKENS, CONTEXT, generator=rng),
    }


@torch.inference_mode()
def denoised(unet: UNet2DConditionModel) -> list[Step]:
    """Steps of one picture."""
    scheduler = PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)
    scheduler.set_timesteps(8)
    given, steps = inputs(), []
    sample, context = given["sample"][:1], given["encoder_hidden_states"]
    for timestep in scheduler.timesteps:
        both = sample.repeat(2, 1, 1, 1)
        at = np.array([int(timestep)])
        steps.append({"sample": both.numpy(), "timestep": at, "encoder_hidden_states": context.numpy()})
        empty, prompted = unet(both, timestep, context, return_dict=False)[0].chunk(2)
        sample = scheduler.step(empty + 7.5 * (prompted - empty), timestep, sample).prev_sample
    return steps


def convert(precision: str, work: Path) -> None:
    """Write the U-Net in one precision, and print seconds, bytes and the peak of memory."""
    began = time.perf_counter()
    file = work / precision / MODEL_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    if precision == "fp32":
        unet, given = full_size(), inputs()
        tokens = given["encoder_hidden_states"].shape[1]
        graph = unet_graph(unet, family_of(unet.config), given["sample"], tokens)
        write_graph(Component.of(UNET, graph, ""), file, precision, [])
    else:
        import openvino  # noqa: PLC0415

        steps = denoised(full_size()) if precision == "w8a8" else []
        save_graph(openvino.Core().read_model(work / "fp32" / MODEL_FILE), file, precision, steps)
    found = {
        "precision": precision,
        "seconds": time.perf_counter() - began,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "bytes": file.with_suffix(".bin").stat().st_size,
    }
    print(json.dumps(found))


def converted(work: Path, precisions: list[str]) -> list[dict[str, Any]]:
    found = []
    for precision in precisions:
        record = work / f"{precision}.json"
        if not record.exists():
            command = [sys.executable, __file__, "convert", "--work", str(work), "--precisions", precision]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            write_text(record, done.stdout.splitlines()[-1])
        found.append(json.loads(record.read_text()))
        print(found[-1], flush=True)
    return found


def step_seconds(work: Path, precisions: list[str], rounds: int) -> tuple[list[list[float]], list[float]]:
    """Seconds of a step by rival and round, torch the first; and how far each is from torch, as a share of its RMS."""
    import openvino  # noqa: PLC0415

    unet, given, core = full_size(), inputs(), openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"}
    arrays = {name: tensor.numpy() for name, tensor in given.items()}
    compiled = [core.compile_model(work / precision / MODEL_FILE, "CPU", settings) for precision in precisions]
    rivals = [partial(in_torch, unet, given), *(partial(in_openvino, model, arrays) for model in compiled)]
    with torch.inference_mode():
        exact = rivals[0]()
        errors = [float(np.sqrt(np.mean((rival() - exact) ** 2) / np.mean(exact**2))) for rival in rivals]
    seconds = take_turns({"step": rivals}, rounds=rounds, warmup=1, device=torch.device("cpu"))["step"]
    return seconds, errors


def in_torch(unet: UNet2DConditionModel, given: dict[str, Tensor]) -> Array:
    found: Array = unet(**given, return_dict=False)[0].numpy()
    return found


def in_openvino(model: Any, given: dict[str, NDArray[Any]]) -> Array:
    found: Array = model(given)[0]
    return found


def measure_unet(work: Path, precisions: list[str], rounds: int) -> str:
    records = converted(work, precisions)
    seconds, errors = step_seconds(work, precisions, rounds)
    parameters = sum(parameter.numel() for parameter in full_size().parameters())
    lines = [
        "| precision | written in, s | peak, GiB | weights, MiB | error of a step | step, s | step / torch's |",
        "|---|---|---|---|---|---|---|",
        f"| torch fp32 | | | {4 * parameters / 2**20:.0f} | | {Spread.of(seconds[0]).median:.2f} | 1 |",
    ]
    for record, taken, error in zip(records, seconds[1:], errors[1:], strict=True):
        ratio = Interval.of([ours / torchs for ours, torchs in zip(taken, seconds[0], strict=True)])
        lines.append(
            f"| {record['precision']} | {record['seconds']:.0f} | {record['peak'] / 2**30:.1f} | "
            f"{record['bytes'] / 2**20:.0f} | {error:.1e} | {Spread.of(taken).median:.2f} | "
            f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) |"
        )
    title = f"U-Net of Stable Diffusion v1.4 by recipe tiny, {parameters / 1e6:.0f} million random weights"
    return "\n".join([f"{title}; {rounds} rounds on one thread.", "", *lines])


def measure_pictures(work: Path, precisions: list[str]) -> str:
    """Parity by model and precision; each network is converted once."""
    lines = ["| model | precision | weights, MiB | largest difference, of 255 | PSNR, dB |", "|---|---|---|---|---|"]
    for name in (*RECIPES, "teacher"):
        model = "emoji" if name == "teacher" else str(work / name)
        if name != "teacher" and not Path(model).exists():
            prune(PruneOptions("emoji", name, model))
        pipeline = load_pipeline(model)
        side, _ = image_size(pipeline)
        steps = denoising_steps(Source(model, pipeline, None, "w8a8", side, side)) if "w8a8" in precisions else []
        graphs = {key: to_graph(component) for key, component in components(pipeline, side, side).items()}
        for precision in precisions:
            with tempfile.TemporaryDirectory() as folder:
                for key, graph in graphs.items():
                    (Path(folder) / key).mkdir()
                    chosen = precision if key == UNET else beside(precision)
                    save_graph(graph.clone(), Path(folder) / key / MODEL_FILE, chosen, steps)
                found = check_parity(pipeline, OpenvinoNetworks(Path(folder)), side, side)
                size = sum(file.stat().st_size for file in Path(folder).rglob("*.bin")) / 2**20
            lines.append(f"| {name} | {precision} | {size:.1f} | {found.largest} | {found.psnr:.1f} |")
            print(lines[-1], flush=True)
    return "\n".join(["Whole pictures against torch's: the embedded teacher and its pruned students.", "", *lines])


def measure_arithmetic(exports: Path) -> str:
    """Parity of exported folders by what they are computed in; w8a8 keeps its integers in both."""
    lines = ["| model | weights | arithmetic | largest difference, of 255 | PSNR, dB |", "|---|---|---|---|---|"]
    models = {"teacher": "emoji"} | {name: str(exports / f"{name}-kd" / "student") for name in RECIPES}
    for name, model in models.items():
        pipeline = load_pipeline(model)
        side, _ = image_size(pipeline)
        for precision in ("fp32", "w8a8"):
            folder = export_path(exports, FORMAT, precision, model)
            for arithmetic in ("f32", "bf16"):
                found = check_parity(pipeline, OpenvinoNetworks(folder, precision=arithmetic), side, side)
                lines.append(f"| {name} | {precision} | {arithmetic} | {found.largest} | {found.psnr:.1f} |")
    title = "Whole pictures against torch's in float32: the embedded teacher and its retrained students."
    return "\n".join([title, "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("pictures", "unet", "arithmetic", "convert"))
    parser.add_argument("--precisions", nargs="+", default=list(FORMAT.precisions))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", type=Path, default=Path("runs/openvino_precisions"))
    parser.add_argument("--exports", type=Path, default=Path("runs/export_parity"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    if arguments.part == "convert":
        convert(arguments.precisions[0], arguments.work)
        return
    if arguments.part == "pictures":
        table = measure_pictures(arguments.work, arguments.precisions)
    elif arguments.part == "arithmetic":
        table = measure_arithmetic(arguments.exports)
    else:
        table = measure_unet(arguments.work / "unet", arguments.precisions, arguments.rounds)
    made_by = provenance()
    machine = f"{made_by['processors']} cores of {made_by['processor']}, {made_by['started'][:10]}."
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out / f"openvino_{arguments.part}.md", f"{table}\n\n{machine}\n")
    print(table)


if __name__ == "__main__":
    main()
