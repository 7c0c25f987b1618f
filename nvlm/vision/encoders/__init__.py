"""The vision encoders: `interface` defines what an encoder provides, `registry` lists them by name.

Each encoder has a folder with a `description.py`, which needs no torch, so that the launcher can refuse a wrong folder
or setting before importing torch. SigLIP and CLIP are towers: `tower` has what they share. The Megatron modules are in
`model.py`, on top of `layers`; `inference` makes a module for inference alone of any of them. No code outside this
folder names an encoder.
"""
