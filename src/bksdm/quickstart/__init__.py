"""The whole story on the embedded model, and its page."""
