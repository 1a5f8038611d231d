"""The web: a folder of static files that draws in the visitor's browser, by onnxruntime-web and JavaScript of ours.

The networks are those of the ONNX export, cut into files that browsers and static hosts take. `manifest.json` says how
they are drawn from, and gives a digest of each. The folder holds all that the page loads; nothing comes from elsewhere.
"""

import hashlib
import json
import re
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from bksdm.common.assets import asset
from bksdm.common.errors import InputError
from bksdm.common.progress import say
from bksdm.common.runs import write_text
from bksdm.export import layout, to_onnx
from bksdm.export.components import components, multiple
from bksdm.export.formats import Format, Source
from bksdm.export.npm import Package, take
from bksdm.export.onnx_pieces import into_pieces
from bksdm.models.decoder import SmallDecoder
from bksdm.models.pipelines import called, captions, pixels_a_side, scheduler_config
from bksdm.runtime.defaults import Defaults
from bksdm.runtime.files import MANIFEST
from bksdm.runtime.kinds import Scale
from bksdm.runtime.parameters import sampler_name
from bksdm.runtime.schedulers import check_scheduler, options_of, with_scheduler
from bksdm.runtime.tokens import saved_words

MOST_BYTES = 95 * 2**20  # of a file; GitHub takes 100 MB
_BUILDS = {  # of onnxruntime-web, of which a visitor's browser fetches one
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
}
RUNTIME = Package(
    "onnxruntime-web",
    "1.30.0",
    "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
    ("package.json", *(f"dist/{name}" for names in _BUILDS.values() for name in names)),
)
TOKENIZERS = Package(
    "@huggingface/tokenizers",
    "0.2.0",
    "sha512-LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
    ("package.json", "LICENSE", "dist/tokenizers.min.mjs"),
)
_PAGE = "web"
_MEMORY = 4 * 2**30  # all that WebAssembly can address
# What `samplers.js` has, in the order in which the page offers it beside a model's own.
SAMPLERS = ("PNDMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "LCMScheduler")
_LAWS = ("use_karras_sigmas", "use_exponential_sigmas")


def write(source: Source, folder: Path) -> None:
    """The page, what it runs on, and the networks in the source's precision."""
    if not isinstance(source.pipeline.vae.decoder, SmallDecoder):
        say("most of the time will go into decoding by the whole VAE; --decoder takes a small one")
    add_page(source, folder)
    to_onnx.write_networks(source, folder)
    add_manifest(source, folder)


def add_page(source: Source, folder: Path) -> None:
    """The page, the JavaScript, and the packages that it runs on."""
    shutil.copytree(asset(_PAGE), folder, dirs_exist_ok=True)
    for package in (RUNTIME, TOKENIZERS):
        take(package, source.npm, folder / "vendor" / package.name.rpartition("/")[2])
    write_text(folder / "package.json", json.dumps(_package(source), indent=2) + "\n")


def add_manifest(source: Source, folder: Path) -> None:
    """Cut the networks of an ONNX folder into pieces, and say how they are drawn from."""
    write_text(folder / MANIFEST, json.dumps(_manifest(source, folder), indent=1) + "\n")


def _manifest(source: Source, folder: Path) -> dict[str, Any]:
    """What `worker.js` is told of the folder."""
    in_bytes = source.precision in ("int8", "int4")
    networks = {}
    for name in components(source.pipeline, source.height, source.width):
        file = folder / name / to_onnx.MODEL_FILE
        pieces = into_pieces(file, MOST_BYTES, in_bytes=in_bytes)
        networks[name] = {"graph": entry(file, folder), "weights": [entry(piece, folder) for piece in pieces]}
    how, pad = source.sampling or Defaults(), source.pipeline.tokenizer.pad_token_id
    (caption,) = captions(source.pipeline)
    return {
        "model": called(source.model),
        "precision": source.precision,
        "defaults": {"steps": how.steps, "guidance": how.guidance},
        "schedulers": list(_schedulers(source)),
        "shape": _shape(source),
        "captions": caption_facts(folder / "tokenizer" / "tokenizer.json", caption["length"], pad),
        "tokenizer": {
            name: entry(folder / "tokenizer" / file, folder)
            for name, file in (("tokenizer", "tokenizer.json"), ("config", "tokenizer_config.json"))
        },
        "networks": networks,
        "runtime": {build: _runtime_bytes(folder, names) for build, names in _BUILDS.items()},
        "memory": memory(source),
    }


def _runtime_bytes(folder: Path, names: tuple[str, ...]) -> int:
    return sum((folder / "vendor" / RUNTIME.name / name).stat().st_size for name in names)


def entry(file: Path, folder: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"path": file.relative_to(folder).as_posix(), "bytes": file.stat().st_size, "sha256": digest}


def memory(source: Source) -> int:
    """Bytes, about, that the networks of text-to-image take when they are loaded, as floats."""
    networks = components(source.pipeline, source.height, source.width)
    return 4 * sum(component.parameters for name, component in networks.items() if name != "vae_encoder")


def why_not(source: Source) -> str | None:
    """Why the page could not draw with the source's scheduler, or could not hold its networks."""
    reason = layout.why_not(source) or _why_unknown(scheduler_config(source.pipeline.scheduler))
    if reason is None and memory(source) > _MEMORY:
        reason = (
            f"its networks take {memory(source) / 2**30:.1f} GiB as floats, and WebAssembly addresses 4 GiB; take a "
            f"smaller recipe"
        )
    return reason


def _why_unknown(config: dict[str, Any]) -> str | None:
    """Why `samplers.js` does not have a scheduler that the torch-free runtime has; None where it does."""
    name, mend = config["_class_name"], "give --scheduler with one of DDIMScheduler, DPMSolverMultistepScheduler"
    if name not in SAMPLERS:
        return f"scheduler {name} is not known in the browser; {mend}"
    options = options_of(config)
    if options.get("skip_prk_steps") is False:
        return f"{name} without skip_prk_steps is not known in the browser; {mend}"
    law = next((law for law in _LAWS if options.get(law)), None)
    return f"{name} has {law}, which is not known in the browser; give --scheduler DDIMScheduler" if law else None


def _schedulers(source: Source) -> Iterator[dict[str, Any]]:
    """The model's own scheduler with all of its options, and others for models that did not learn to draw by one."""
    own = scheduler_config(source.pipeline.scheduler)
    yield scheduler(own)
    for name in SAMPLERS[:-1] if own["_class_name"] != SAMPLERS[-1] else ():
        other = with_scheduler(own, name)
        if name != own["_class_name"] and is_known(other):
            yield scheduler(other)


def is_known(config: dict[str, Any]) -> bool:
    """Whether the page draws by a scheduler with these options."""
    try:
        check_scheduler(config)
    except InputError:
        return False
    return _why_unknown(config) is None


def scheduler(config: dict[str, Any]) -> dict[str, Any]:
    """All options of a scheduler, for `samplers.js` has no defaults, and what people call it."""
    # JSON has no infinity, which is the usual `lambda_min_clipped`.
    options = {name: value for name, value in options_of(config).items() if value != float("-inf")}
    return {"options": {"_class_name": config["_class_name"], **options}, "sampler": sampler_name(config)}


def _shape(source: Source) -> dict[str, Any]:
    vae = source.pipeline.vae.config
    scale = Scale.of(vae)
    return {
        "channels": vae.latent_channels,
        "factor": pixels_a_side(source.pipeline),
        "multiple": multiple(source.pipeline),
        "height": source.height,
        "width": source.width,
        "scaling": scale.factor,
        "shift": scale.shift,
    }


def caption_facts(file: Path, length: int, pad: int) -> dict[str, Any]:
    """How captions become tokens: as many as `length`, filled up with `pad`, by the tokenizer in a file."""
    added = tokenizers.Tokenizer.from_file(str(file)).get_added_tokens_decoder().values()
    return {"length": length, "pad": pad, "words": saved_words([token.content for token in added])}


def _package(source: Source) -> dict[str, Any]:
    """For `npm pack`: all but what says how the folder was made."""
    plain = unicodedata.normalize("NFKD", called(source.model)).encode("ascii", "ignore").decode()  # as npm wants names
    name = re.sub("[^a-z0-9]+", "-", f"bksdm-{plain}".lower()).strip("-")
    return {
        "name": name,
        "version": "1.0.0",
        "description": f"{called(source.model)}, a text-to-image model that draws in the browser",
        "type": "module",
        "exports": {".": "./bksdm.js", "./*": "./*"},
        "files": ["*", "!config.yaml", "!provenance.json", "!export.json"],
    }


FORMAT = Format(
    name="web",
    precisions=("int8", "int4", "fp16", "fp32"),
    packages=to_onnx.FORMAT.packages,
    write=write,
    pools_keys=True,
    networks=to_onnx.FORMAT.networks,
    prefers_small_decoder=True,
    told=("context",),
    why_not=why_not,
    least_psnr=to_onnx.FORMAT.least_psnr,
    unets_alone="the page draws by a U-Net and one text encoder",
)
