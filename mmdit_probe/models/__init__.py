"""What is probed: loading, families, layouts, tokens, latents."""

import importlib
import warnings

# On import, in a notebook without ipywidgets, tqdm warns of bars that nobody asked for; every later import is silent.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    importlib.import_module("tqdm.auto")
