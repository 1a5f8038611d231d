"""Transformers that recipes cannot be used on yet, and what stands in the way."""

REFUSED = {
    "SD3Transformer2DModel": (
        "the last block of Stable Diffusion 3 and 3.5 has weights of its own shape, its dual_attention_layers are "
        "numbers of blocks, and ComfyUI and stable-diffusion.cpp take its width for 64 times its depth, so that they "
        "read no shallower one"
    ),
    "QwenImageTransformer2DModel": (
        "Qwen-Image tells its network captions by a text encoder that looks at pictures too, which is not known here"
    ),
    "ChromaTransformer2DModel": (
        "the modulations of all blocks of Chroma come from one network, whose output would have to be cut with them, "
        "and stable-diffusion.cpp takes 19 and 38 blocks for granted"
    ),
    "PixArtTransformer2DModel": "PixArt is told captions by T5 in a pipeline that is not known here",
    "HunyuanDiT2DModel": (
        "the second half of the blocks of Hunyuan-DiT takes what those of the first half gave, so that they only go in "
        "pairs"
    ),
    "AuraFlowTransformer2DModel": "AuraFlow is drawn by a pipeline that is not known here",
    "Lumina2Transformer2DModel": "Lumina 2 is drawn by a pipeline that is not known here",
    "SanaTransformer2DModel": "Sana has a linear attention and an autoencoder that are not known here",
}
