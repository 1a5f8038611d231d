"""What the U-Nets of Stable Diffusion and SDXL have in common."""
