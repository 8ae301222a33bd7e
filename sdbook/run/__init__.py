"""What runs need besides the idea: written by hand, taught in no chapter.

A training's settings, checkpoint files, log, progress, memory and plan; the tables of
the cache; what a training of the UNet, and a fine-tuning, start from; and the commands
`sample`, `evaluate`, `plot` and `check`.
"""
