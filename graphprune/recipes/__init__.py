"""Recipes: what was removed from which model, as a small record that travels with the shrunk model, to disk and back, without pickle.

speedup ──▶ Recipe on the module ──save──▶ one safetensors file ──load──▶ freshly built dense model, shrunk and filled again.
"""

from graphprune.recipes.files import save
from graphprune.recipes.replay import load, slice_state_dict
from graphprune.surgery.recipe import Recipe, Step, recipe_of

__all__ = ["Recipe", "Step", "load", "recipe_of", "save", "slice_state_dict"]
