"""The models: one file each, on what they share (`base`, `losses`); `matching` builds them."""
