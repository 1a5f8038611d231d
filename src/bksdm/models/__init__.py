"""Models as they lie on the disk: pipelines, single files, decoders, and what others made for them."""
