"""Make text-to-image diffusion models small and fast.

Block pruning and feature distillation of Stable Diffusion's U-Net, after *BK-SDM: A Lightweight,
Fast, and Cheap Version of Stable Diffusion* (arXiv 2305.15798). `bksdm.api` is the library's door,
`bksdm --help` the command line's.
"""
