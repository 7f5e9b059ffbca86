"""Accuracy against batch size, for AGVM and for what else one would pick: docs/evidence-tables.md.

The setting: thin models on the bundled digits at 64x64 pixels, from a backbone trained on digit
classification (benchmarks/pretrain.py) whose first stage is frozen; a fixed budget of images,
whatever the batch; micro-batches of 16 images, so BatchNorm sees 16 in each method.
"""
