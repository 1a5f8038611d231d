"""What is small and shared by all rooms."""
