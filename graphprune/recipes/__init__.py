"""Recipes: what was removed from which model, as a small record that travels with the shrunk model, to disk and back, without pickle.

speedup ──▶ Recipe on the module ──save──▶ one safetensors file ──load──▶ freshly built dense model, shrunk and filled again.
"""
