"""The vision encoders: `interface` says what the package asks of one, `registry` has them by name.

Each encoder has a folder with two files. `description.py` holds what is known of it without torch: the launcher refuses
a wrong folder or a wrong setting before it imports torch. `model.py` holds its Megatron modules. Nothing outside this
folder knows an encoder by name.
"""
