"""A subject from a few pictures, learnt by a teacher or a student (DreamBooth, arXiv 2208.12242; LoRA, 2106.09685)."""
