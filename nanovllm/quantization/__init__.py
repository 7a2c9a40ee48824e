"""Narrower numbers, each kind in a file of its own that may be skipped.

kv_cache.py         scales of keys and values in fp8
fp8.py              weights and activations in fp8: the numbers, and a product of them in torch
fp8_weights.py      a model that holds its weights so, and how they get there
fp8_checkpoints.py  what config.json says of a checkpoint that is in fp8 already
"""
