"""Which way to 8 bits in ONNX is near to torch? The whole picture of the embedded tiny student, U-Net quantised.

    python benchmarks/onnx_quantization.py

Dynamic quantisation rounds what flows through the network as well as the weights; `bksdm export` rounds weights alone.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from bksdm.common.runs import provenance
from bksdm.export.parity import check_parity
from bksdm.export.run import export
from bksdm.export.to_onnx import MODEL_FILE, to_integers
from bksdm.models.pipelines import load_pipeline
from bksdm.options.export import ExportOptions
from bksdm.options.pruning import PruneOptions
from bksdm.pruning.run import prune
from bksdm.runtime.onnx_networks import OnnxNetworks

PRODUCTS, CONVOLUTIONS = ["MatMul", "Gemm"], ["Conv"]


def dynamic(file: Path, **choices: Any) -> None:
    """Replace a graph by onnxruntime's dynamically quantised one."""
    made = file.with_name("quantized.onnx")
    quantize_dynamic(file, made, weight_type=QuantType.QInt8, extra_options={"DefaultTensorType": 1}, **choices)
    model = onnx.load(made)
    made.unlink()
    (file.parent / f"{MODEL_FILE}.data").unlink()
    onnx.save(model, file)


WAYS: dict[str, Callable[[Path], None]] = {
    "dynamic, matrix products": partial(dynamic, op_types_to_quantize=PRODUCTS),
    "dynamic, matrix products by channel": partial(dynamic, op_types_to_quantize=PRODUCTS, per_channel=True),
    "dynamic, convolutions by channel": partial(dynamic, op_types_to_quantize=CONVOLUTIONS, per_channel=True),
    "dynamic, both by channel": partial(dynamic, per_channel=True),
    "dynamic, both by channel in 7 bits": partial(dynamic, per_channel=True, reduce_range=True),
    "weights alone, as bksdm export does": to_integers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/onnx_quantization"))
    out: Path = parser.parse_args().out
    prune(PruneOptions("emoji", "tiny", str(out / "tiny")))
    whole = export(ExportOptions(str(out / "tiny"), "onnx", str(out / "onnx"))).out
    pipeline = load_pipeline(out / "tiny")
    print("| U-Net | MiB | largest difference of 255 | PSNR, dB |\n|---|---|---|---|")
    for name, change in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(shutil.copytree(whole, Path(folder) / "onnx"))
            change(copy / "unet" / MODEL_FILE)
            size = sum(file.stat().st_size for file in (copy / "unet").iterdir()) / 2**20
            found = check_parity(pipeline, OnnxNetworks(copy, threads=1), 64, 64)
            print(f"| {name} | {size:.1f} | {found.largest} | {found.psnr:.1f} |", flush=True)
    about = provenance()
    print(f"\n{about['processor']}, {about['started'][:10]}; torch {about['versions']['torch']}.")


if __name__ == "__main__":
    main()
