"""Narrower numbers, each kind in a file of its own that may be skipped.

kv_cache.py      scales of keys and values in fp8
"""
