"""Run every verb that takes a device on the embedded model, and say which of them fails.

    PYTHONPATH=src python3 scripts/gpu/check_verbs.py --device cuda

Prints a line a verb with its seconds; exits with 1 if one fails.
"""

import argparse
import shlex
import sys
import tempfile
import time
from pathlib import Path

from bksdm.cli import main as bksdm

VERBS = """
prune emoji --recipe small --out {root}/student
prepare emoji/heldout --teacher emoji --out {root}/latents --text_embeddings
distill --teacher emoji --student {root}/student --data {root}/latents --steps 4 --out {root}/distilled
lcm --teacher emoji --student {root}/student --data emoji/heldout --steps 4 --out {root}/lcm
decoder --teacher emoji --data emoji/heldout --steps 4 --out {root}/decoder
generate {root}/distilled/student --prompt "red apple, flat style" --steps 5 --out {root}/pictures
generate emoji --prompt "red apple, flat style" --precision fp16 --steps 5 --decoder emoji --out {root}/fp16
generate emoji --prompt "blue fish" --image {root}/pictures/00000.png --strength 0.5 --steps 5 --out {root}/edited
personalize emoji --images {root}/pictures --prompt "a photo of sks" --lora --steps 4 --out {root}/lora
evaluate emoji {root}/student --limit 64 --steps 5 --resamples 20 --teacher emoji --out {root}/scores
benchmark emoji {root}/student --rounds 2 --steps 5
sensitivity emoji --data emoji/heldout --scores output --pictures 8 --out {root}/worth
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device, failed = parser.parse_args().device, []
    with tempfile.TemporaryDirectory() as root:
        for line in VERBS.format(root=Path(root)).strip().splitlines():
            arguments = [*shlex.split(line), "--debug"]
            if arguments[0] != "prune":
                arguments += ["--device", device]
            began = time.perf_counter()
            try:
                bksdm(arguments)
            except SystemExit as stop:
                good = not stop.code
            print(f"{'ok' if good else 'FAILED'} {time.perf_counter() - began:.1f} s: {line}", flush=True)
            failed += [] if good else [line]
    print(f"{len(failed)} of {len(VERBS.strip().splitlines())} failed", *failed, sep="\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
