"""What runs need besides the idea: written by hand, taught in no chapter.

A training's settings, checkpoint files, log, progress, memory and plan; the tables of
the cache; the UNet's presets and frozen parts; near twins for CLIP's training; the
plan and the files of a fine-tuning; the networks and report files of an evaluation.
"""
