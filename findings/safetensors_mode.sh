#!/usr/bin/env bash
# safetensors writes files that only their owner can read, whatever the umask says.
#
# save_file makes its file with mode 0600; open() in the same folder gives 0644 under the usual umask of 022. It matters
# where one user makes models and another serves them: from_pretrained fails there with "permission denied". Set the
# mode after saving.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.4.6
cd "$folder"
umask 022
"$folder/venv/bin/python" - <<'PYTHON'
import stat
from importlib.metadata import version
from pathlib import Path

import numpy
from safetensors.numpy import save_file

print("safetensors", version("safetensors"))
save_file({"a": numpy.zeros(2)}, "weights.safetensors")
Path("text.txt").touch()
modes = {name: oct(stat.S_IMODE(Path(name).stat().st_mode)) for name in ("weights.safetensors", "text.txt")}
print(modes)
assert modes == {"weights.safetensors": "0o600", "text.txt": "0o644"}, "the umask counts now"
PYTHON
