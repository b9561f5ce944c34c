"""From a recipe to a plan: models are found, opened and matched, tensors laid out, and all of it priced."""
