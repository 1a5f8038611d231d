"""Pictures: in torch, by exported folders, as files, on a page."""
