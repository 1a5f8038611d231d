#!/usr/bin/env bash
# On Linux, openvino 2026.4.1 gives the thread that first compiles for the CPU another alternate signal stack
# (sigaltstack(2)), whoever set up the one before: here Python's faulthandler. It is there so that the handlers have
# room for the registers of processors with AMX, and each core has one of its own.
#
# It matters for programs that live on after OpenVINO and listen for signals, since Python runs its handlers on that
# stack: where several cores came and went, such a program was seen to end by SIGSEGV at its next SIGTERM instead of
# stopping in good order. One core as long as the process lives has no such end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q openvino==2026.4.1
"$folder/venv/bin/python" - <<'PYTHON'
import ctypes
import faulthandler

import openvino
from openvino import opset13


class Stack(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def stack():
    now = Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(now)) == 0
    return now.start


faulthandler.enable()
before = stack()
core = openvino.Core()
made = stack()
given = opset13.parameter([1], openvino.Type.f32)
compiled = core.compile_model(openvino.Model([opset13.relu(given)], [given]), "CPU")
after = stack()
print(openvino.__version__, f"faulthandler's stack {before:#x}; with a core {made:#x}; after compiling {after:#x}")
assert before and made == before, "a core alone changes it now"
assert after != before, "faulthandler's stack stays now"
PYTHON
