"""Exported pipelines without PyTorch: numpy, `tokenizers` and onnxruntime or OpenVINO are all that this package needs.

`bksdm.runtime.folder.open_folder` is the library's door, `python -m bksdm.runtime` the command line's.
"""
