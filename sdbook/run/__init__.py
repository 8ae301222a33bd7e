"""What a long run needs besides the idea: written by hand, taught in no chapter."""
