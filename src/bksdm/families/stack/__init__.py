"""Transformers that are stacks of blocks, one after the other: what recipes, features and pictures have in common."""
