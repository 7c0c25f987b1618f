"""The adapter for lmms-eval (`pip install -e '.[lmms]'`): `python -m lmms_eval --model nvlm ...`."""
