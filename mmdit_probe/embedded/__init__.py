"""Recipes that train what ``assets`` ships: the scene parser, the VAE, the text encoders and the small SD3."""
