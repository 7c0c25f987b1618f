"""The vision encoders: `interface` defines what an encoder provides, `registry` lists them by name.

Each encoder has a folder with two files. `description.py` needs no torch, so that the launcher can refuse a wrong
folder or setting before importing torch. `model.py` holds the Megatron modules. No code outside this folder names an
encoder.
"""
