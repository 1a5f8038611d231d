"""What a recipe removes, what that costs and what each block is worth."""
