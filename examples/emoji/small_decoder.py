"""Train the small decoder of the embedded model, and put it into the package.

    python examples/emoji/small_decoder.py train     # goes on where it was stopped
    python examples/emoji/small_decoder.py ship      # at any moment of the training

`ship` writes `decoder/` of the package's `emoji` assets from the newest checkpoint, in half precision.
`benchmarks/decoder.py embedded` measures it.
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from bksdm.common.assets import asset
from bksdm.common.runs import replace_folder
from bksdm.distill.decoder import distill_decoder, newest_decoder
from bksdm.models.pipelines import quiet_libraries
from bksdm.options.distill import DecoderOptions

HERE = Path(__file__).parent
OPTIONS = DecoderOptions(
    teacher="emoji",
    data="emoji",
    out=str(HERE / "work" / "decoder"),
    steps=3000,
    channels=16,
    lr=3e-3,
    checkpoint_every=250,
    precision="fp32",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "ship"))
    parser.add_argument("--out", type=Path, default=Path(OPTIONS.out), help="Folder of the run.")
    arguments = parser.parse_args()
    quiet_libraries()
    options = dataclasses.replace(OPTIONS, out=str(arguments.out))
    if arguments.what == "train":
        print(f"decoder in {distill_decoder(options)}")
        return
    small, steps = newest_decoder(options)
    with replace_folder(asset("emoji", "decoder")) as partial:
        small.to(torch.float16).save_pretrained(partial, safe_serialization=True)
    print(f"{steps} of {options.steps} steps; {sum(p.numel() for p in small.decoder.parameters()):,} parameters")


if __name__ == "__main__":
    main()
