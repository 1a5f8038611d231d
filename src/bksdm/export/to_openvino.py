"""OpenVINO: graphs for Intel's processors and GPUs, in the folder that openvino-genai's C++ pipelines load.

Batch, height and width are left open. Beside the networks lies the tokenizer as a graph too, which pads to the model's
length. Whatever the precision, inputs and outputs are float32.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from diffusers import SchedulerMixin
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from bksdm.common.progress import bar, say
from bksdm.export.calibration import Step, denoising_steps
from bksdm.export.components import UNET, Component, components, least_side
from bksdm.export.formats import Format, Source
from bksdm.export.genai import for_genai, genai_draws
from bksdm.export.layout import component_folder, why_not, write_layout, write_scheduler
from bksdm.export.openvino_weights import to_int4, to_int8, to_w8a8
from bksdm.families import family_of_pipeline
from bksdm.models.openvino import to_openvino
from bksdm.models.pipelines import scheduler_config, tokenizers
from bksdm.runtime.networks import DEEP, Networks
from bksdm.runtime.openvino_networks import OpenvinoNetworks, quiet

MODEL_FILE, TOKENIZER_FILE = "openvino_model.xml", "openvino_tokenizer.xml"


def write(source: Source, folder: Path) -> None:
    """The whole pipeline in `folder`, in the source's precision."""
    write_layout(source.pipeline, folder)
    family = family_of_pipeline(source.pipeline)
    _write_scheduler(source.pipeline.scheduler, folder, family.unsaid)
    if source.sampling and source.sampling.sigmas is not None:
        say("openvino-genai draws by even noise levels, and not by those that this model has learnt; bksdm does")
    own = tokenizers(source.pipeline)
    for name, tokenizer, length in zip(family.tokenizers, own, family.token_lengths(own), strict=True):
        write_tokenizer(family.tokenizer_for_readers(tokenizer), folder / name / TOKENIZER_FILE, length)
    least = least_side(source.pipeline)
    networks = components(source.pipeline, least, least)
    steps = denoising_steps(source) if source.precision == "w8a8" else []
    with bar(len(networks), "networks") as progress:
        for component in networks.values():
            write_graph(component, component_folder(component, folder) / MODEL_FILE, source.precision, steps)
            progress.advance()


def _write_scheduler(scheduler: SchedulerMixin, folder: Path, unsaid: Collection[str] = ()) -> None:
    """The scheduler so that openvino-genai draws by it or refuses it, and never by another one."""
    config = scheduler_config(scheduler)
    write_scheduler(for_genai(config, unsaid), folder)
    if not genai_draws(config):
        say(f"openvino-genai does not draw by this {config['_class_name']}, bksdm does; --scheduler gives it another")


def write_graph(component: Component, file: Path, precision: str, steps: list[Step]) -> None:
    """A network as an .xml file with its weights in a .bin file beside it.

    Arguments:
        component: The network.
        file: The .xml file.
        precision: Of the U-Net; text encoder and VAE have 8-bit weights where the U-Net has fewer bits or w8a8.
        steps: Denoising steps that w8a8 is fitted to.
    """
    with quiet():
        graph = to_graph(component)
    save_graph(graph, file, precision if component.denoises else beside(precision), steps)


def to_graph(component: Component) -> Any:
    """A network as an OpenVINO model in float32, with the component's names and open dimensions."""
    # openvino-genai gives U-Nets whole timesteps; `OpenvinoNetworks` makes room for others.
    whole = "timestep" if component.name == UNET else None
    examples = {name: value.long() if name == whole else value for name, value in component.inputs.items()}
    model = to_openvino(component.keeping or component.module, tuple(examples.values()))
    if component.keeping:  # a name within the model alone: openvino-genai takes U-Nets of one output
        result = model.outputs[-1].get_node()
        deep = result.input_value(0)
        model.remove_result(result)
        deep.get_tensor().set_names({DEEP})
    for port, name in zip([*model.inputs, *model.outputs], [*examples, *component.outputs], strict=True):
        port.get_tensor().set_names({name})
    model.reshape(
        {
            name: [-1 if at in component.axes[name] else size for at, size in enumerate(example.shape)]
            for name, example in component.inputs.items()
        }
    )
    return model


def save_graph(graph: Any, file: Path, precision: str, steps: list[Step]) -> None:
    """Lower a float32 graph, which changes it, to a precision, and write it."""
    import openvino  # noqa: PLC0415

    with quiet():
        if precision == "int8":
            graph = to_int8(graph)
        elif precision == "int4":
            graph = to_int4(graph)
        elif precision == "w8a8":
            graph = to_w8a8(graph, steps)
        openvino.save_model(graph, file, compress_to_fp16=precision != "fp32")


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, file: Path, length: int) -> None:
    """A tokenizer as a graph from strings (B,) to `input_ids` (B, L), cut to this length, and CLIP's padded to it."""
    import openvino  # noqa: PLC0415
    import openvino_tokenizers  # noqa: PLC0415

    padded = isinstance(tokenizer, CLIPTokenizer)
    with quiet():
        graph = openvino_tokenizers.convert_tokenizer(
            tokenizer, use_max_padding=padded, truncation=True, max_length=length
        )
        openvino.save_model(graph, file, compress_to_fp16=False)


def beside(precision: str) -> str:
    """The precision of text encoder and VAE."""
    return precision if precision in ("fp32", "fp16") else "int8"


def _open(folder: Path, source: Source) -> Networks:  # noqa: ARG001
    return OpenvinoNetworks(folder)


FORMAT = Format(
    name="openvino",
    precisions=("fp32", "fp16", "int8", "int4", "w8a8"),
    packages={"openvino": "openvino", "nncf": "nncf", "openvino_tokenizers": "openvino-tokenizers"},
    write=write,
    pools_keys=True,
    networks=_open,
    why_not=why_not,
    least_psnr={"fp16": 30.0, "int8": 20.0},
    memory=2.3,
    of_unets=("w8a8",),
)
